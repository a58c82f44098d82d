"""Which of 2.2 A14B's two experts a MODEL is: the user says so, since the files look alike, and connects the other one."""
from __future__ import annotations

from typing import Any

from ...wanlite_model.config import WanConfig
from ...wanlite_model.errors import WanLiteError
from ...wanlite_model.experts import Other
from ...wanlite_model.formats.card import StudentCard
from ...wanlite_model.roles import Role, boundary_of, is_expert
from .choices import AS_MADE, EVERY_LEVEL, SIDE_OF, WHOLE
from .teacher import ComfyTeacher

LARGE = 5120            # width of a 14B
HOW = (f"Choose its side as the expert and connect the other MODEL; or '{EVERY_LEVEL}', where the low one makes all steps alone (of single pictures, for "
       "instance).")


def other_of(teacher: ComfyTeacher, other: Any, choice: str, boundary: float = 0.0, card: StudentCard | None = None) -> Other | None:
    """The other expert and the role of the teacher, or None for a whole WAN. boundary: 0 is the card's, else WAN's own. card: of the student.

    Raises WanLiteError when it was not said, was said otherwise when the student was made, or the other expert is not there.
    """
    # A student of this teacher that is not on a side was made at every level, or of a whole WAN: that has been said.
    said = choice == AS_MADE and other is None and card is not None and not card.expert and card.teacher_fingerprint == teacher.fingerprint
    role = role_of(teacher.config, other, EVERY_LEVEL if said else choice, boundary, card)
    if role is None:
        return None
    found = Other(teacher=ComfyTeacher(other), role=role)
    found.beside(teacher)               # refused here, in the node's first second
    return found


def role_of(config: WanConfig, other: Any, choice: str, boundary: float = 0.0, card: StudentCard | None = None) -> Role | None:
    """Which of two experts a MODEL is, from what was chosen and whether the other one is connected; as other_of says."""
    made, told = (card.expert if card else ""), SIDE_OF.get(choice, "")
    if made and told and made != told or made and choice in (WHOLE, EVERY_LEVEL):
        raise WanLiteError(f"The student was made as the expert of {made} noise, and '{choice}' is chosen.", "", f"Choose '{AS_MADE}', or create the student anew.")
    side = told or made
    if choice == EVERY_LEVEL and other is not None:
        raise WanLiteError(f"'{EVERY_LEVEL}' is chosen, and a second expert is connected.", "The low one then makes whole pictures by itself.",
                           "Disconnect the other expert, or choose a side.")
    if not side:
        if other is not None:
            raise WanLiteError("A second expert is connected, and it was not said which of the two is taught.", "Their files look alike.", HOW)
        if is_expert(config) and choice != EVERY_LEVEL:
            raise WanLiteError("This MODEL is one of the two experts of 2.2 I2V-A14B, and it was not said which.",
                               "Each is right on its own side of the boundary alone.", HOW)
        return None
    if other is None:
        raise WanLiteError(f"The expert of {side} noise is chosen, and the other one is not connected.", "A video is made by both, one after the other.",
                           f"Connect the MODEL of the expert of {'low' if side == 'high' else 'high'} noise as the other expert.")
    return Role(side=side, boundary=boundary or (card.boundary if card else 0.0) or boundary_of(config))


def expert_note(config: WanConfig, other: object, choice: str) -> tuple[str, ...]:
    """A sentence where nobody said that a MODEL is one of two, and it may be."""
    if config.dim != LARGE or config.img_emb or other is not None or choice not in (WHOLE, AS_MADE):
        return ()
    return ("If this is one expert of Wan 2.2 A14B, say which in the WanLite nodes that ask for it, and connect the other one there: its file looks like that "
            "of a whole 14B.",)
