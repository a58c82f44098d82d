"""A hundred spoiled files, configs and runs: each is refused in a sentence or read as it is. And the judge of that sees what may not be."""
import sys
from collections import Counter

import pytest
from helpers_fuzz import READERS, serve_badly

from benchmarks.fuzz import __main__ as fuzz
from benchmarks.fuzz.case import REFUSED, RIGHT
from benchmarks.fuzz.mutation import MUTATIONS
from benchmarks.fuzz.originals import made


@pytest.fixture(scope="module")
def done():
    return list(fuzz.tried(range(100), seed=0))


def test_a_hundred_spoiled_things_end_in_a_sentence_or_in_what_they_hold(done):
    assert [one.told() for one in done if one.wrong] == []
    ended = Counter(one.outcome.ended for one in done)
    assert ended[REFUSED] + ended[RIGHT] == 100 and ended[REFUSED] > 40 and ended[RIGHT] > 20
    assert {one.mutation.name for one in done} == {mutation.name for mutation in MUTATIONS}
    assert "| all | 100 |" in fuzz.table(done)


def test_a_case_is_the_same_alone(done):
    among = [one for one in done if one.outcome.ended == REFUSED][-2:]
    for one, again in zip(among, fuzz.tried([one.case.number for one in among], seed=0), strict=True):
        assert (again.kind, again.reader, again.outcome.ended, again.outcome.told) == (one.kind, one.reader, one.outcome.ended, one.outcome.told)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    home = tmp_path_factory.mktemp("fuzz")
    made(home)
    process = fuzz.Process(home, 0, served=serve_badly)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fuzz, "PATIENCE", 3.0)
        try:
            yield {reader.__name__: process.tried(number).outcome for number, reader in enumerate(READERS)}
        finally:
            process.close()


@pytest.mark.parametrize(("reader", "ended", "told"), [
    ("opens_another_file", "did what it may not", "wan.safetensors was opened"), ("unpickles", "did what it may not", "makedirs was opened"),
    ("starts_a_program", "did what it may not", "os.system"), ("changes_the_file", "changed files", "wan.safetensors"),
    *([("takes_memory", "raised MemoryError", "")] if sys.platform == "linux" else []),
    ("says_a_lot", "a poor sentence", ""), ("says_nothing", "a poor sentence", ""), ("raises_another_error", "raised KeyError", "helpers_fuzz.py"),
    ("exits", "raised SystemExit", ""), ("reads_other_numbers", "read wrongly", "differs"), ("reads_what_is_there", RIGHT, ""),
    ("refuses_it", "refused what is whole", "This is whole."), ("crashes", "crashed", "exit status 3"), ("waits", "hung", "")])
def test_what_a_reader_may_not_do_is_seen(judged, reader, ended, told):
    assert judged[reader].ended == ended and told in judged[reader].told
