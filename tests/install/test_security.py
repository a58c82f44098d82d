"""Bandit finds nothing in all code but the tests'; what cannot be otherwise says why beside its line."""
import json
import re

from helpers_install import program, tracked

from demo.comfy_path import ROOT

# The pack, the demo, run.py and the benchmarks: all that a clone's owner runs. The tests are code that asserts, and starts what it likes.
CODE = [name for name in tracked() if name.endswith(".py") and not name.startswith("tests/")]


def test_bandit_finds_nothing_but_what_was_put_there_for_it_to_find(tmp_path):
    bait = tmp_path / "bait.py"
    bait.write_text("import pickle\n\n\ndef run(text):\n    return eval(text), pickle.loads(text)\n", encoding="utf-8")
    said = tmp_path / "bandit.json"
    program("bandit", "--quiet", "--exit-zero", "--format", "json", "--output", str(said), str(bait), *(str(ROOT / name) for name in CODE), cwd=tmp_path)
    report = json.loads(said.read_text(encoding="utf-8"))
    assert {(one["test_id"], one["filename"]) for one in report["results"]} == {(rule, str(bait)) for rule in ("B403", "B307", "B301")}
    assert report["errors"] == [] and len(report["metrics"]) == len(CODE) + 2       # with the bait, and the sums


def test_every_exception_names_its_rule_and_says_why():
    excepted = [f"{name}: {line.strip()}" for name in CODE for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if "nosec" in line]
    assert excepted and [line for line in excepted if not re.search(r"# nosec B\d{3}(, B\d{3})*  # \S", line)] == []
