"""One way to spoil a place, and the list of all of them."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from .originals import Place

Spoil = Callable[[Random, Place], None]
MUTATIONS: list[Mutation] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """family: its line in the table. kinds: of originals that it can spoil. spoil: draws how, and changes the place."""
    family: str
    kinds: tuple[str, ...]
    spoil: Spoil

    @property
    def name(self) -> str:
        return self.spoil.__name__.replace("_", " ")


def spoils(family: str, *kinds: str) -> Callable[[Spoil], Spoil]:
    """Adds a function, whose name says what it does, to the list."""
    def added(spoil: Spoil) -> Spoil:
        MUTATIONS.append(Mutation(family=family, kinds=kinds, spoil=spoil))
        return spoil
    return added
