"""The table of readers: what it measures on one kind of WAN, and that it fails where formats/readers.py does not tell the truth."""
from dataclasses import replace

import pytest

from benchmarks.readers import __main__ as command
from benchmarks.readers.exports import EXPORTS
from benchmarks.readers.opened import openers
from benchmarks.readers.tables import Outcome, contradictions
from wanlite_model.formats import readers
from wanlite_model.formats.readers import Reader

PATCHED, QUANTISED = "bf16 with a LoRA", "fp8 scaled, marked in the header"
FOLDER, FP8, GGUF = "folder bf16", "single file fp8", "GGUF Q4_0"


@pytest.fixture(scope="module")
def measured(comfyui):
    """(starts, rows) of a small part of the table: 2.1's image-to-video, which Wan 2.2's class opens and answers wrong."""
    with pytest.MonkeyPatch.context() as part:
        part.setattr(command, "VARIANTS", ("i2v 2.1",))
        part.setattr(command, "STORAGES", (PATCHED, QUANTISED))
        part.setattr(command, "EXPORTS", {name: EXPORTS[name] for name in (FOLDER, FP8, GGUF)})
        with command.quiet():
            return command.measure(None, openers(None, None))


@pytest.fixture
def printed(measured, monkeypatch, capsys):
    """What the command prints of it, and its exit status."""
    monkeypatch.setattr(command, "measure", lambda *_: measured)

    def ran(*arguments):
        status = command.main(list(arguments))
        return capsys.readouterr().out, status
    return ran


def test_a_start_is_its_model_and_its_file_alone_is_off_by_no_more_than_bf16(measured):
    patched, quantised = measured[0]
    assert (patched.storage, quantised.storage) == (PATCHED, QUANTISED)
    assert max(patched.velocity, quantised.velocity, patched.alone_velocity, patched.alone_weights) < 1e-5
    assert 1e-4 < quantised.alone_weights < 2**-8 and 1e-4 < quantised.alone_velocity < 1e-2


def test_every_reader_is_asked_and_has_its_number(measured):
    found = {(row.storage, row.export): row.outcomes for row in measured[1]}
    assert found.keys() == {(storage, export) for storage in (PATCHED, QUANTISED) for export in (FOLDER, FP8, GGUF)}
    for storage in (PATCHED, QUANTISED):
        folder, fp8, gguf = (found[storage, export] for export in (FOLDER, FP8, GGUF))
        assert all(folder[name].difference < 1e-5 for name in ("ComfyUI", "diffusers", "WanLite")) and folder["Wan 2.2's code"].difference > 0.1
        assert fp8["ComfyUI"].difference < 1e-5 and fp8["WanLite"].difference < 1e-5
        assert fp8["Wan 2.2's code"].difference > 0.1 and fp8["diffusers"].difference > 0.1         # they pass over the scales
        assert 1e-5 < gguf["WanLite"].difference < 1e-2
        assert gguf["Wan 2.2's code"].raised.startswith("OSError") and gguf["diffusers"].raised.startswith("OSError")
        assert gguf["ComfyUI-GGUF"] == Outcome(untried="not tried without --gguf") and folder["Wan 2.1's code"] == Outcome(untried="not tried without --wan21")


def test_the_tables_hold_the_largest_of_all_storages_or_each(measured, printed):
    out, status = printed()
    assert status == 0 and out.rstrip().endswith("formats/readers.py tells the truth.")
    comfyui, wan = (f"{max(row.outcomes[name].difference for row in measured[1] if row.export == FOLDER):.1e}" for name in ("ComfyUI", "Wan 2.2's code"))
    assert f"| i2v 2.1 | {FOLDER} | {comfyui} | n/a: not tried without --wan21 | {wan}: its class has no image embedding (img_emb) |" in out
    assert f"| i2v 2.1 | {PATCHED} | {measured[0][0].velocity:.1e} |" in out and "| n/a: code read only: it builds no WAN of width 256 |" in out
    each, _ = printed("--all")
    assert f"| i2v 2.1 | {QUANTISED} | {GGUF} | n/a: not tried without --gguf |" in each and each.count("| i2v 2.1 |") == out.count("| i2v 2.1 |") + 3


def test_a_start_that_is_not_its_model_is_listed(measured):
    starts, rows = measured
    found = contradictions([starts[0], replace(starts[1], velocity=0.5)], rows)
    assert found == [f"i2v 2.1, {QUANTISED}: the start's velocity differs from its MODEL's by 5.0e-01."]


@pytest.mark.parametrize(("claim", "says", "sentence"), [
    ("_wan_code", lambda version, *_: Reader(f"Wan {version}'s code", "from_pretrained"),
     f"{FOLDER}: formats/readers.py says that Wan 2.2's code opens it; of a {PATCHED} teacher it answered with a difference of "),
    ("_diffusers", lambda *_: Reader("diffusers", "from_single_file"),
     f"{GGUF}: formats/readers.py says that diffusers opens it; of a {PATCHED} teacher it raised OSError"),
    ("_wanlite", lambda _: Reader("WanLite", "from_pretrained", "it is shy"),
     f"{FP8}: formats/readers.py says that WanLite does not open it, since it is shy; of a {PATCHED} teacher it answered with a difference of ")])
def test_a_claim_that_is_not_true_is_listed_and_fails(claim, says, sentence, printed, monkeypatch):
    monkeypatch.setattr(readers, claim, says)
    out, status = printed()
    assert status == 1 and "does not tell the truth" in out
    line, = (line for line in out.splitlines() if line.startswith(f"i2v 2.1, {sentence}"))
    assert line.endswith("(2 such storages).")
