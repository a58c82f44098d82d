"""What the documentation says of files, numbers and commands is what they are."""
import dataclasses
import re
import runpy
import sys
import types

import numpy
import pytest
import torch
from helpers_docs import code, tables, text_of
from helpers_tiny import random_wan
from helpers_variants import TINY
from helpers_wan_video import wan_video
from PIL import Image

from benchmarks import pictures
from demo.comfy_path import ROOT
from wanlite_model.compress.loras import REMAPPED
from wanlite_model.config import WANLITE_FIELDS
from wanlite_model.distill import inputs
from wanlite_model.distill.checkpoint import RunFolder
from wanlite_model.files import read_json
from wanlite_model.formats.card import StudentCard
from wanlite_model.formats.container import read_header
from wanlite_model.formats.gguf_file import read_gguf
from wanlite_model.formats.gguf_write import write_gguf
from wanlite_model.formats.model_card import MEASURED, Stated
from wanlite_model.formats.pairs import ALLOWED
from wanlite_model.formats.lora import Lora
from wanlite_model.formats.write import save_lora, write_diffusers, write_student
from wanlite_model.transformer import WanLiteStudent

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("web/docs/*.md"), *ROOT.glob("benchmarks/*.md")))
SAVED = text_of("docs/save-format.md")
CARD = StudentCard(steps=4, cfg=1.0, shift=5.0, keep=(0, 2), ffn_dim=301, measured={"held_out_error": 0.01})


def named(*headings):
    """The names in the first column of the tables with such a first heading, of which a cell may hold several."""
    return {name for head, rows in tables(SAVED) if head[0] in headings for row in rows for name in re.findall(r"`([^`]+)`", row[0])}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """ComfyUI's folder with a student called cats in every format, and one of each kind that has fields of its own."""
    base = tmp_path_factory.mktemp("ComfyUI")
    models = base / "models" / "diffusion_models"
    for name, fields in (("cats", TINY["t2v"]), ("flf2v", {**TINY["flf2v"], "depth": 1})):
        student = random_wan(**fields)
        parts = dict(config=student.wan, card=CARD if name == "cats" else None)

        def tensors(names=None, state=student.state_dict()):
            return ((name, state[name]) for name in (names or state))

        write_student(models / name, tensors=tensors(), stated=Stated(picture=b"a picture"), legacy=None if name == "cats" else {"hidden_size": 1000}, **parts)
        write_diffusers(base / "output/wanlite/diffusers" / name, tensors=tensors(), stated=Stated(), **parts)
        if name == "cats":
            write_student(models / "cats.safetensors", tensors=tensors(), layout="single file", dtype=torch.float8_e4m3fn, **parts)
            write_gguf(models / "cats-Q8_0.gguf", read=tensors, kind="Q8_0", **parts)
            save_lora(base / "models/loras/cats.safetensors", Lora(factors={}, diffs={"blocks.0.norm3.weight": torch.ones(384)}))
    return base


def test_every_file_of_a_saved_folder_is_named_and_no_other(saved):
    made = {path.name.replace("cats", "<name>") for path in (saved / "models/diffusion_models/cats").iterdir()}
    listed = next(block for block in code(SAVED, "") if block.startswith("models/diffusion_models/"))
    assert made == {line.split()[0] for line in listed.splitlines()[1:]}
    assert made <= named("file")


def test_every_field_of_config_json_is_explained_and_no_other(saved):
    folders = [saved / where / name for where in ("models/diffusion_models", "output/wanlite/diffusers") for name in ("cats", "flf2v")]
    written = [read_json(folder / "config.json") for folder in folders]
    said = {name for config in written for name in config["_wanlite"]}
    assert {name for config in written for name in config} | said == named("field")
    assert said - {"format", "legacy"} == {field.name for field in dataclasses.fields(StudentCard)}
    ten = next(rows for head, rows in tables(SAVED) if head[0] == "field")
    assert [row[0].strip("`") for row in ten] == list(WANLITE_FIELDS)


def test_every_key_of_the_files_headers_is_explained(saved):
    files = [*(saved / "models/diffusion_models").rglob("*.safetensors"), *saved.glob("models/loras/*"), *(saved / "output").rglob("*.safetensors")]
    found = {key for file in files for key in read_header(file).metadata} | set(read_gguf(saved / "models/diffusion_models/cats-Q8_0.gguf")[1])
    explained = named("key") | {f"wanlite.{name}" for name in named("field")} - {"wanlite.*"}
    assert found <= explained
    assert named("key") - {"wanlite.*", f"wanlite.{REMAPPED}"} <= found


def test_every_format_and_dtype_is_in_the_table():
    rows = next(rows for head, rows in tables(SAVED) if head[0] == "format")
    assert {re.sub(r" \(.*", "", row[0]): tuple(row[1].split(", ")) for row in rows} == ALLOWED


def test_what_is_measured_and_what_a_run_keeps_is_named():
    assert all(f"`{name}`" in SAVED for name in MEASURED)
    run = RunFolder(ROOT / "run")
    files = {path.name for path in (run.job, run.metrics, run.checkpoint, run.best, run.student(5), run.lora(5))}
    files |= {inputs.PROMPTS, inputs.LATENTS, inputs.START_FROM, inputs.START, inputs.TEACHER, inputs.OTHER}
    told = {name.replace("<step>", "5").rstrip("/") for name in named("file")}
    assert files <= told


@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported")      # Wan-Video names autocast's device
def test_the_commands_that_open_a_student_open_it(saved, monkeypatch, capsys):
    reference = wan_video()
    monkeypatch.chdir(saved)
    for name in ("wan", "wan.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "wan.modules.model", reference)
    expected = sum(parameter.numel() for parameter in WanLiteStudent.from_pretrained("models/diffusion_models/cats").parameters())
    opened = []
    for block in code(SAVED, "python"):
        (saved / "block.py").write_text(block, encoding="utf-8")
        names = runpy.run_path("block.py")
        opened += [sum(parameter.numel() for parameter in names["student"].parameters())] if "student" in names else []
    assert opened == [expected] * 4
    assert {"4 1.0 5.0", "wanlite.steps 4"} <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_is_there(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        place, _, part = link.partition("#")
        if not link.startswith("https://"):
            target = (ROOT / page).parent / place if place else ROOT / page
            assert target.is_file(), link
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if part else []
            assert not part or part in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], link


def test_every_template_is_in_the_table_and_no_other():
    rows = next(rows for head, rows in tables(text_of("docs/your-own-wan.md")) if head[0] == "template")
    assert sorted(row[0] for row in rows) == sorted(path.stem for path in ROOT.glob("example_workflows/*.json"))


def test_the_quality_that_is_told_is_what_was_printed():
    printed = pictures.TABLE.read_text(encoding="utf-8")
    told = next(rows for head, rows in tables(text_of("docs/what-to-expect.md")) if head[1] == "forwards a video")
    adherence = {row[1] for row in next(rows for head, rows in tables(printed) if head[0] == "row")}
    assert len(told) == 14 and {row[3] for row in told} <= adherence


def test_the_chart_shows_the_table_as_it_is():
    rows = {row.name: row for row in pictures.rows(pictures.TABLE.read_text(encoding="utf-8"))}
    assert (rows["slim"].adherence, rows["slim"].low, rows["slim"].high, round(rows["slim"].seconds, 3)) == (0.969, 0.940, 0.984, 0.107)
    assert rows["teacher"].seconds == 1 and rows["slim"].trained and not rows["teacher, 4 steps"].trained
    drawn = numpy.asarray(pictures.draw(list(rows.values())), dtype=float)
    with Image.open(pictures.TARGET) as kept:
        assert numpy.abs(drawn - numpy.asarray(kept.convert("RGB"), dtype=float)).mean() < 1
