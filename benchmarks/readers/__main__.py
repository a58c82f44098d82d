"""Who opens what: `python -m benchmarks.readers [--gguf FOLDER] [--wan21 FOLDER] [--all]` from the repository's root.

Every kind of WAN, tiny and random, in every storage that a teacher can have; the start of a student of each; and that start in every export, opened by every
reader. Prints two tables of the largest differences of velocity, as shares of the largest value: of the starts, beside their MODELs and beside what is read of
the file without ComfyUI; and of the exports, beside our module in fp32 with weights rounded as the file rounds them. What `wanlite_model/formats/readers.py`
says opens a file must come within 1e-3 of that (GGUF: 1e-2), and what it says does not must raise or be off. Exit status 1 when it does not tell the truth.

It needs what `python run.py test` installs. GGUF is opened by the real ComfyUI-GGUF (github.com/city96/ComfyUI-GGUF), Wan 2.1 by its own code
(github.com/Wan-Video/Wan2.1); neither is on a package index. diffusers opens LoRAs where peft is installed.
"""
from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from helpers_tiny import random_wan
from helpers_variants import TINY

from benchmarks import result_of
from benchmarks.readers_gguf import largest
from demo.comfy_path import open_comfyui
from wanlite_model.compress.build import create_student
from wanlite_model.compress.handle import StudentHandle
from wanlite_model.transformer import WanLiteStudent

from .asked import SIZE, Asked
from .exports import EXPORTS, expected, with_lora, written
from .opened import NotTried, Reads, openers
from .storages import STORAGES, Stored, stored
from .tables import Outcome, Row, Start, claims, contradictions, export_table, start_table

VARIANTS = tuple(TINY)


def measure(custom_node: Path | None, reads: Mapping[str, Reads]) -> tuple[list[Start], list[Row]]:
    """Every combination. custom_node: ComfyUI-GGUF's folder. reads: {reader: its velocity}."""
    starts, rows = [], []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        for variant in VARIANTS:
            wan = random_wan(seed=3, **TINY[variant])
            asked = Asked.of(variant, wan.wan)
            for storage in STORAGES:
                begun, folder = time.monotonic(), Path(home) / f"{variant} {storage}"
                teacher = stored(storage, folder / "teacher", wan, custom_node)
                start, _ = result_of(create_student(teacher.teacher, None, (wan.wan.out_dim, *SIZE), folder=folder / "starts"))
                starts.append(measured_start(variant, storage, teacher, start, asked))
                for name in EXPORTS:
                    rows.append(Row(variant=variant, storage=storage, export=name, config=wan.wan, outcomes=tried(name, start, folder, asked, reads)))
                shutil.rmtree(folder, ignore_errors=True)
                sys.stderr.write(f"{variant}, {storage}: {time.monotonic() - begun:.1f} s\n")
    return starts, rows


def measured_start(variant: str, storage: str, teacher: Stored, start: StudentHandle, asked: Asked) -> Start:
    """How far the start, and what is read without ComfyUI, are from the MODEL."""
    of_model = teacher.teacher.velocity(asked.x, asked.sigma, asked.cond)
    weights = velocity = None
    if teacher.model is not None:
        alone = dict(teacher.alone())
        weights = largest(alone, dict(teacher.model.weights()))
        velocity = asked.apart(asked.answered(WanLiteStudent.filled(start.config, alone.items(), torch.float32, "cpu")), of_model)
    return Start(variant=variant, storage=storage, velocity=asked.apart(asked.answered(start.load(torch.float32)), of_model), alone_weights=weights,
                 alone_velocity=velocity)


def tried(name: str, start: StudentHandle, folder: Path, asked: Asked, reads: Mapping[str, Reads]) -> dict[str, Outcome]:
    """The start in that export, opened by all readers that formats/readers.py knows."""
    export = EXPORTS[name]
    student = with_lora(start, export.lora, folder)
    file, velocity = written(export, student, folder / name), asked.answered(expected(export, student))
    outcomes = {}
    for reader in claims(start.config, name):
        try:
            outcomes[reader.name] = Outcome(difference=asked.apart(reads[reader.name](file, asked), velocity))
        except NotTried as why:
            outcomes[reader.name] = Outcome(untried=str(why))
        except Exception as error:
            outcomes[reader.name] = Outcome(raised=f"{type(error).__name__} ({' '.join(str(error).split())[:100]})")
    return outcomes


@contextmanager
def quiet() -> Iterator[None]:
    """Without what readers log and warn of: much of what they are given is none of theirs."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, metavar="FOLDER", help="of ComfyUI-GGUF")
    parser.add_argument("--wan21", type=Path, metavar="FOLDER", help="of Wan 2.1's code, with `wan` in it")
    parser.add_argument("--all", action="store_true", help="a line of the second table for each storage, instead of the largest of all")
    given, begun = parser.parse_args(arguments), time.monotonic()
    for folder, file in ((given.gguf, "nodes.py"), (given.wan21, "wan/modules/model.py")):
        if folder is not None and not (folder / file).is_file():
            parser.error(f"{folder} holds no {file}")
    open_comfyui()
    with quiet():
        starts, rows = measure(given.gguf and given.gguf.absolute(), openers(given.gguf and given.gguf.absolute(), given.wan21))
    wrong = contradictions(starts, rows)
    asked = sum(not one.untried for row in rows for one in row.outcomes.values())
    print(start_table(starts), "", export_table(rows, given.all),
          f"\n{len(starts)} starts, {len(rows)} exports, opened or refused {asked} times, in {(time.monotonic() - begun) / 60:.1f} minutes. formats/readers.py "
          + (f"does not tell the truth, or a start is not its MODEL, {len(wrong)} times:" if wrong else "tells the truth."), *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
