"""A server hands out each node's help where ComfyUI's page asks for it (frontend: src/services/nodeHelpService.ts, src/workbench/utils/nodeHelpUtil.ts)."""
import re
import urllib.request

import pytest

from demo.comfy_path import ROOT

PLAIN = urllib.request.build_opener(urllib.request.ProxyHandler({}))
TRANSLATED = sorted(path.relative_to(ROOT / "web/docs").with_suffix("").as_posix() for path in (ROOT / "web/docs").glob("*/*.md"))


@pytest.fixture(scope="module")
def help_of(server):
    """{node id: (the folder that the page resolves pictures in, the bytes of one of its pages)}"""
    def asked(path):
        with PLAIN.open(f"{server.url}{path}", timeout=30) as answer:
            assert "html" not in answer.headers["Content-Type"]          # newer pages take that for a page that is not there
            return answer.read()
    modules = {name: info["python_module"] for name, info in server.object_info().items() if name.startswith("WanLite")}
    return modules, lambda node_id: f"/extensions/{modules[node_id].split('.')[1].split('@')[0]}/docs/", asked


def test_every_node_has_its_page_and_the_picture_in_it(help_of):
    modules, base, asked = help_of
    assert len(modules) == 9
    for node_id in modules:
        page = asked(f"{base(node_id)}{node_id}.md").decode("utf-8")
        [picture] = re.findall(r"!\[[^\]]+\]\((.*?)\)", page)
        assert page.startswith("# WanLite ") and asked(base(node_id) + picture)[8:12] == b"WEBP"


@pytest.mark.parametrize("page", TRANSLATED)
def test_a_translated_page_is_found_and_its_picture_too(page, help_of):
    """Pictures of these lie where those of the plain pages do: the page that shows them knows one folder for both."""
    _, base, asked = help_of
    node_id = page.split("/")[0]
    text = asked(f"{base(node_id)}{page}.md").decode("utf-8")
    assert asked(base(node_id) + re.findall(r"!\[[^\]]+\]\((.*?)\)", text)[0])[8:12] == b"WEBP"
