"""English is what the nodes say; Chinese says the same, key by key, and not what English said once."""
import asyncio
import re
from pathlib import Path

import comfyui_frontend_package
import pytest

from demo.locales import ENGLISH, FOLDER, NODES, REST, SOURCE, definitions, hashed, texts
from wanlite_model.files import read_json

CHINESE = re.compile(r"[\u4e00-\u9fff]")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-\d+)?")


@pytest.fixture(scope="module")
def english(pack):
    """{key: text}, as the nodes say it now."""
    nodes = asyncio.run(pack("nodes").WanLiteExtension().get_node_list())
    told = definitions({node.GET_SCHEMA().node_id: vars(node.GET_SCHEMA().get_v1_info(node)) for node in nodes})
    return dict(texts({**told, **ENGLISH}))


def written(language):
    return {name: dict(texts(read_json(FOLDER / language / name))) for name in (NODES, REST)}


def test_english_is_what_the_nodes_say(english):
    files = written("en")
    assert {**files[NODES], **files[REST]} == english, "run python -m demo.locales"


def test_no_text_has_a_letter_that_the_browser_would_read_as_a_command(english):
    """Older frontends compile tooltips as messages, in which these mean something; newer ones show them as they are, so that nothing can be escaped."""
    for language in ("en", "zh"):
        files = written(language)
        assert not [key for key, text in {**files[NODES], **files[REST]}.items() if set("{}@|") & set(text)]


def test_chinese_has_every_text_in_chinese_with_the_same_numbers(english):
    files = written("zh")
    chinese = {**files[NODES], **files[REST]}
    assert chinese.keys() == english.keys()
    assert not [key for key, text in chinese.items() if not CHINESE.search(text)]
    other = {key: (sorted(NUMBER.findall(english[key])), sorted(NUMBER.findall(text))) for key, text in chinese.items() if not key.endswith(".name")}
    assert not {key: (was, now) for key, (was, now) in other.items() if was != now}


def test_what_chinese_quotes_in_chinese_is_a_name_that_the_page_shows():
    """Of a stock node, or of something of ours."""
    page = Path(comfyui_frontend_package.__file__).parent / "static" / "assets"
    stock = {name for file in page.glob("nodeDefs-*.js") for name in re.findall(r'display_name:"([^"]+)"', file.read_text(encoding="utf-8"))}
    chinese = written("zh")[NODES]
    ours = {text.removeprefix("WanLite ") for key, text in chinese.items() if key.endswith("name")}
    quotes = {name for text in chinese.values() for name in re.findall("“([^”]+)”", text) if CHINESE.search(name)}
    assert "UNet加载器" in quotes and quotes <= stock | ours


def test_chinese_was_translated_from_the_english_of_now(english):
    changed = sorted({key: hashed(text) for key, text in english.items()}.items() ^ read_json(FOLDER / "zh" / SOURCE).items())
    assert not changed, f"translate {', '.join(dict(changed))} in locales/zh, then run python -m demo.locales --translated zh"
