"""The help of every node: it names what the node has, with the numbers that it has, and quotes what the node would say."""
import asyncio
import re

import pytest
from helpers_docs import messages, quoted, tables, text_of
from PIL import Image

from demo.comfy_path import ROOT
from demo.help_numbers import HELP, filled, numbers, pages
from wanlite_model.files import read_json

IDS = sorted(path.stem for path in HELP.glob("*.md"))
MOST_BYTES = 60_000     # of a picture


@pytest.fixture(scope="module")
def schemas(pack):
    nodes = asyncio.run(pack("nodes").WanLiteExtension().get_node_list())
    return {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in nodes)}


@pytest.fixture(scope="module")
def sentences():
    return messages()


def rows(text, heading):
    """{what the first column names: the other cells} of all tables that begin with this heading."""
    return {re.fullmatch(r"`(\w+)`", row[0])[1]: row[1:] for head, found in tables(text) if head[0] == heading for row in found}


def test_there_is_a_page_for_every_node_and_for_no_other(schemas):
    assert IDS == sorted(schemas)
    assert {path.name for path in HELP.iterdir() if path.is_dir()} - {"img"} <= set(schemas)


@pytest.mark.parametrize("node_id", IDS)
def test_it_names_every_input_with_its_default_and_its_range(node_id, schemas):
    page = text_of(f"web/docs/{node_id}.md")
    described = rows(page, "input")
    assert set(described) == {widget.id for widget in schemas[node_id].inputs}
    for widget in schemas[node_id].inputs:
        _, default, span = described[widget.id]
        kind = widget.io_type
        if kind in ("INT", "FLOAT"):
            assert numbers(default) == [widget.default] and numbers(span) == [widget.min, widget.max], (widget.id, default, span)
        elif kind == "BOOLEAN":
            assert (default, span) == ("on" if widget.default else "off", "on or off"), widget.id
        elif kind == "STRING":
            assert default == (f"`{widget.default}`" if widget.default else "empty"), widget.id
        elif kind == "COMBO":
            assert default == (f"`{widget.default}`" if widget.default else "the first"), widget.id
            if not re.search("found|ComfyUI's list", span):        # those are the files of this machine, and lists of ComfyUI's
                assert not (missing := [option for option in widget.options if f"`{option}`" not in page]), missing
        else:
            assert (default, span) == ("optional" if widget.optional else "required", kind), widget.id


@pytest.mark.parametrize("node_id", IDS)
def test_its_numbers_are_those_that_the_command_would_write(node_id, schemas):
    for path, to in pages(node_id).items():
        page = path.read_text(encoding="utf-8")
        assert filled(page, schemas[node_id].inputs, to) == page, "run python -m demo.help_numbers"


def test_the_command_writes_a_changed_default_and_range_and_nothing_else(schemas):
    seed = next(widget for widget in schemas["WanLiteDistill"].inputs if widget.id == "train_seed")
    page = "# A page with 5 numbers\n| `train_seed` | The seed, 3 of them. | 7 | 1 to 2 |\n| `other` | It | 7 | 1 to 2 |\n"
    assert filled(page, [seed], "to") == page.replace("3 of them. | 7 | 1 to 2", "3 of them. | 0 | 0 to 2,147,483,647")


@pytest.mark.parametrize("node_id", IDS)
def test_it_names_every_output_with_its_type(node_id, schemas):
    described = rows(text_of(f"web/docs/{node_id}.md"), "output")
    assert {name: kind for name, (kind, _) in described.items()} == {output.display_name: output.io_type for output in schemas[node_id].outputs}


@pytest.mark.parametrize("node_id", IDS)
def test_it_shows_the_node(node_id):
    [picture] = re.findall(r"!\[[^\]]+\]\((.*?)\)", text_of(f"web/docs/{node_id}.md"))
    assert picture == f"img/{node_id}.webp" and (HELP / picture).stat().st_size < MOST_BYTES
    with Image.open(HELP / picture) as drawn:
        assert 400 < drawn.width < 700 and drawn.getextrema() != ((0, 0),) * 3


@pytest.mark.parametrize("path", [f"web/docs/{name}.md" for name in IDS] + sorted(str(path.relative_to(ROOT)) for path in HELP.glob("*/*.md"))
                         + ["docs/when-it-fails.md"])
def test_what_a_page_quotes_is_what_the_code_says(path, sentences):
    shown = quoted(text_of(path))
    assert shown
    for sentence in shown:
        assert any(pattern.fullmatch(sentence) for pattern in sentences), sentence
        assert not any(pattern.fullmatch(sentence[::-1]) for pattern in sentences)         # none of them allows everything


@pytest.mark.parametrize("path", sorted(path.relative_to(HELP).as_posix() for path in HELP.glob("*/*.md")))
def test_a_translated_page_has_the_same_tables_and_messages(path):
    """What its words say no test reads; that it names the same things, as the node itself does in this language, with the same numbers, and quotes the same
    sentences.
    """
    theirs, ours = text_of(f"web/docs/{path}"), text_of(f"web/docs/{path.split('/')[0]}.md")
    assert quoted(theirs) == quoted(ours)
    names = [re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE) for text in (theirs, ours)]
    assert names[0] == names[1]
    local = read_json(ROOT / "locales" / path.split("/")[1].removesuffix(".md") / "nodeDefs.json")[path.split("/")[0]]
    assert theirs.startswith(f"# {local['display_name']}\n")
    assert all(re.search(rf"^\| `{name}` \| \*\*{re.escape(words['name'])}\*\*", theirs, re.MULTILINE) for name, words in local["inputs"].items())
    spans = [[numbers(line.rsplit("|", 3)[1] + line.rsplit("|", 3)[2]) for line in text.splitlines() if line.startswith("| `")] for text in (theirs, ours)]
    assert spans[0] == spans[1]
