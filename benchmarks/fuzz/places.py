"""Folders that lead elsewhere or nowhere: indexes, links, pipes, pickles, and runs with parts missing."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

from .containers import CONTAINERS
from .mutation import spoils
from .originals import GGUF, INDEX, WANS, Place, harmful
from .texts import FOLDERS, bad_value, put

INDEXES, SPECIAL, PICKLES, RUNS = "an index that leads elsewhere", "links, pipes and folders", "pickles", "runs with parts missing"
ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ".sft", ".SAFETENSORS", ".gguf", "", ".safetensors.bin")


def _index(place: Place) -> dict[str, Any]:
    return json.loads((place.path / INDEX).read_text(encoding="utf-8"))


@spoils(INDEXES, "shards", "diffusers")
def a_file_elsewhere(draw: Random, place: Place) -> None:
    """What lies elsewhere would open well."""
    fields, there = _index(place), f"model-{draw.choice((1, 2))}.safetensors"
    old = draw.choice((there, None))
    away = place.outside / there
    new = draw.choice((f"../../{place.outside.name}/{there}", str(away), f"..\\..\\{place.outside.name}\\{there}", f"C:\\{there}", f"C:{there}",
                       f"//host/{there}", f"file://{away}",
                       f"./{there}", f"sub/../{there}", f"..∕..∕{place.outside.name}∕{there}", f"．．/{there}", f"%2e%2e%2f{there}", f"~/{there}",
                       f"$HOME/{there}", there.upper(), f" {there}", f"{there} "))
    fields["weight_map"] = {name: new if old in (None, file) else file for name, file in fields["weight_map"].items()}
    put(place.path / INDEX, fields)


@spoils(INDEXES, "shards", "diffusers")
def a_file_that_is_no_file(draw: Random, place: Place) -> None:
    fields = _index(place)
    (place.path / "folder.safetensors").mkdir()
    new = draw.choice((INDEX, "config.json", ".", "..", "", ".safetensors", "folder.safetensors", "absent.safetensors", "a\0.safetensors",
                       "n" * 300 + ".safetensors",
                       "n" * 5000 + ".safetensors", "\ud800.safetensors", "nul.safetensors", "model-1.bin", "model-1.safetensors.index.json", 5, None, [],
                       ["model-1.safetensors"]))
    for name in draw.sample(list(fields["weight_map"]), draw.choice((1, 3, len(fields["weight_map"])))):
        fields["weight_map"][name] = new
    put(place.path / INDEX, fields)


@spoils(INDEXES, "shards", "diffusers")
def an_index_without_a_map(draw: Random, place: Place) -> None:
    put(place.path / INDEX, draw.choice(({}, [], {"weight_map": {}}, {"weight_map": []}, {"weight_map": bad_value(draw, place)}, bad_value(draw, place))))


@spoils(INDEXES, "student", "shards", "diffusers")
def two_indexes_or_none_or_shards_gone(draw: Random, place: Place) -> None:
    indexes = place.files(".index.json")
    how = draw.randrange(4)
    if how == 0:
        shutil.copy(indexes[0], place.path / f"other{INDEX}")
    elif how == 1:
        indexes[0].unlink()
    else:
        files = place.files(".safetensors")
        draw.choice(files).unlink() if how == 2 else shutil.copy(files[0], place.path / "copy.safetensors")


def _any_file(draw: Random, place: Place) -> Path:
    return draw.choice([*place.files(".safetensors"), *place.files(".gguf"),
                        *(path for path in place.files(".json") if not path.name.endswith("workflow.json"))])


@spoils(SPECIAL, *CONTAINERS, GGUF)
def a_folder_of_that_name(draw: Random, place: Place) -> None:
    path = _any_file(draw, place)
    path.unlink()
    path.mkdir()
    if draw.random() < 0.5:
        (path / "config.json").mkdir()


@spoils(SPECIAL, *CONTAINERS, GGUF)
def nothing_of_that_name(draw: Random, place: Place) -> None:
    path = draw.choice((place.path, _any_file(draw, place)))
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@spoils(SPECIAL, *WANS)
def a_path_that_is_none(draw: Random, place: Place) -> None:
    place.path = draw.choice((place.path / "more", place.folder / ("n" * 300), place.folder / ("n" * 5000 + ".safetensors"),
                              place.folder / "a\0b.safetensors", place.folder / "\ud800.safetensors"))


def a_link(draw: Random, place: Place) -> None:
    """To what lies elsewhere, which is followed, since a download cache is made of such links; to itself; to nothing; to a device."""
    path, how = _any_file(draw, place), draw.randrange(9)
    moved = place.folder / f"moved{path.suffix}"
    goal = (moved, moved, path, path.parent, path.with_name("absent"), *map(Path, ("/dev/zero", "/dev/null", "/dev/full", "/dev/stdin")))[how]
    path.rename(moved) if goal == moved else path.unlink()
    place.same = goal == moved and place.kind != "start"
    path.symlink_to(goal)


def a_circle_of_folders(draw: Random, place: Place) -> None:
    folder = place.path if place.path.is_dir() else place.folder
    (folder / draw.choice(("circle", "circle.safetensors", "transformer"))).symlink_to(folder, target_is_directory=True)


def a_pipe(draw: Random, place: Place) -> None:
    """Whoever opens it waits for a writer, for ever."""
    path = _any_file(draw, place)
    path.unlink()
    os.mkfifo(path)


if os.name != "nt":             # which lets only administrators make links, and has no such pipes
    spoils(SPECIAL, *CONTAINERS, GGUF)(a_link)
    spoils(SPECIAL, *FOLDERS)(a_circle_of_folders)
    spoils(SPECIAL, *CONTAINERS, GGUF)(a_pipe)


@spoils(PICKLES, *CONTAINERS, GGUF)
def a_pickle_in_place_of_the_weights(draw: Random, place: Place) -> None:
    path = draw.choice([*place.files(".safetensors"), *place.files(".gguf")])
    path.write_bytes(harmful(place.home) + b"\0" * draw.choice((0, 5000)))


@spoils(PICKLES, "file")
def a_file_of_another_ending(draw: Random, place: Place) -> None:
    """A pickle, or the honest weights."""
    new = place.path.with_suffix(draw.choice(ENDINGS))
    place.path.rename(new)
    if draw.random() < 0.5:
        new.write_bytes(harmful(place.home))
    place.path, place.same = new, False


@spoils(PICKLES, "student", "shards", "diffusers")
def a_folder_with_a_pickle(draw: Random, place: Place) -> None:
    """Instead of the weights, or beside them."""
    instead = draw.random() < 0.7
    for path in (*place.files(".safetensors"), *place.files(".index.json")) if instead else ():
        path.unlink()
    for name in draw.sample(("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "config.pkl", "scheduler.bin"), 2):
        (place.path / name).write_bytes(harmful(place.home))
    if draw.random() < 0.5:
        put(place.path / "pytorch_model.bin.index.json", {"weight_map": {"head.modulation": "pytorch_model.bin"}})
    place.same = not instead


@spoils(RUNS, "run", "start")
def a_start_in_pieces(draw: Random, place: Place) -> None:
    start = place.path / "start" if place.kind == "run" else next(place.path.iterdir())
    how = draw.randrange(5)
    if how < 3:
        shutil.rmtree(start)
    if how == 1:
        start.mkdir()
        (start / "lora-0.safetensors").write_bytes(b"")
    elif how == 2:
        start.write_bytes(b"")
    elif how == 3:
        (start / "Aardvark").mkdir()
    elif how == 4:
        for path in list(start.rglob("*.safetensors")):
            path.unlink()


@spoils(RUNS, "run")
def notes_of_a_run(draw: Random, place: Place) -> None:
    path = place.path / "job.json"
    notes = json.loads(path.read_text(encoding="utf-8"))
    notes[draw.choice(("job", "student", "teacher", "cache"))] = bad_value(draw, place)
    put(path, notes)


@spoils(RUNS, "run")
def lines_of_a_log(draw: Random, place: Place) -> None:
    line = draw.choice((b"5\n", b"[]\n", b"null\n", b'{"step": 1}\n', b'{"kind": 5}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n", b'{"kind": "step"}\n',
                        b"9" * 5000 + b"\n", b'{"kind": "st'))
    with (place.path / "metrics.jsonl").open("ab") as file:
        file.write(line)
