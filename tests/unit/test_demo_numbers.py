"""The demo's claims are held against its numbers, and it says so when one is not true."""
import subprocess
import sys

import pytest

from demo import main, tiny
from demo.comfy_path import ROOT
from demo.compare import PAIRS, Row, promises


def rows(teacher_right: int, student_right: int, student_seconds: float) -> tuple[Row, ...]:
    def row(name: str, right: int, seconds: float) -> Row:
        return Row(name=name, blocks=8, parameters=1, steps=30, cfg=1.0, evaluations=30, right=right, velocity_error=0.0, seconds=seconds)

    return row("teacher", teacher_right, 2.0), row("plain_cut", 0, 0.5), row("student", student_right, student_seconds)


@pytest.mark.parametrize(("teacher", "student", "seconds", "kept"), [
    (120, 114, 0.99, [True, True, True]),           # 114 is 95% of 120
    (120, 113, 0.99, [True, False, True]),
    (120, 114, 1.00, [True, True, False]),
    (115, 115, 0.50, [False, True, True]),          # 0.898
    (116, 116, 0.50, [True, True, True]),           # 0.906
    (0, 0, 2.00, [False, False, False]),
])
def test_each_promise_fails_exactly_where_its_bound_is_crossed(teacher, student, seconds, kept):
    assert PAIRS == 128
    told = promises(rows(teacher, student, seconds))
    assert [promise.kept for promise in told] == kept
    assert [str(promise)[:4] for promise in told] == ["PASS" if each else "FAIL" for each in kept]


@pytest.mark.parametrize("changed", ["BANK_PROMPTS", "TINY", "ROOT"])
def test_another_graph_other_prompts_or_other_code_make_another_demo(tmp_path, monkeypatch, changed):
    for name in ("wanlite_model", "nodes"):
        (tmp_path / name).mkdir()
    (tmp_path / "wanlite_model" / "flow.py").write_text("SHIFT = 1", encoding="utf-8")
    before = main.made_from()
    assert main.made_from() == before
    monkeypatch.setattr(tiny if changed == "BANK_PROMPTS" else main, changed, {"BANK_PROMPTS": 39, "TINY": main.VAE, "ROOT": tmp_path}[changed])
    assert main.made_from() != before


def test_the_comfyui_that_was_put_first_is_the_one_that_is_timed(comfyui_folder, tmp_path):
    """run.py's choice counts only where nobody chose before."""
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "__init__.py").touch()
    (tmp_path / "comfy" / "cli_args.py").write_text("from types import SimpleNamespace\nargs = SimpleNamespace(cpu=False)\n", encoding="utf-8")
    code = ("import sys; from pathlib import Path; from demo.comfy_path import open_comfyui, put_comfyui_first; "
            "[put_comfyui_first(Path(folder)) for folder in sys.argv[1:]]; open_comfyui(); "
            "import comfy.cli_args; print(comfy.cli_args.__file__, comfy.cli_args.args.cpu)")
    for chosen, expected in (((), comfyui_folder), ((str(tmp_path),), tmp_path)):
        finished = subprocess.run([sys.executable, "-c", code, *chosen], cwd=ROOT, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.split() == [str(expected.resolve() / "comfy" / "cli_args.py"), "True"]
