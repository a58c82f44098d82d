"""The workflows that come with students, as ComfyUI's own page opens them: it would queue what is meant.

Pictures of the page lie in the test's folder.
"""
import pytest
from helpers_variants import RELEASED
from playwright.sync_api import expect

from demo.graph import to_api
from wanlite_model.formats.card import StudentCard
from wanlite_model.formats.workflow import stock_workflow

GRAPHS = {**{name: (config, {}) for name, config in RELEASED.items()},
          "i2v 2.2, one of two": (RELEASED["i2v 2.2"], {"expert": "low", "boundary": 0.9})}


def meaning(prompt):
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}


@pytest.mark.parametrize("server", ["own page"], indirect=True)
def test_the_page_queues_what_the_saved_workflow_says(page, server, tmp_path):
    page.goto(server.url)
    page.wait_for_function("window.app?.graph")
    for name, (config, expert) in GRAPHS.items():
        workflow = stock_workflow("student.safetensors", StudentCard(steps=6, cfg=1.0, size=(64, 96, 9), **expert), config)
        page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        page.evaluate("() => { app.canvas.ds.scale = 0.6; app.canvas.ds.offset = [400, 200]; app.canvas.setDirty(true, true); }")
        page.wait_for_timeout(500)          # until it is drawn
        page.screenshot(path=tmp_path / f"{name}.png")
        assert meaning(page.evaluate("async () => (await app.graphToPrompt()).output")) == meaning(to_api(workflow, server.object_info())), name


def test_the_templates_are_offered_with_pictures_and_one_opens(server, page, tmp_path, request):
    """An old page in a browser without a screen asks for no pictures that a search has found, of stock templates neither."""
    names = sorted(path.stem for path in (server.base / "custom_nodes/WanLite/example_workflows").glob("*.json"))
    pictures = {}
    page.on("response", lambda answer: "/workflow_templates/WanLite/" in answer.url and pictures.update({answer.url.rpartition("/")[2]: answer.status}))
    page.goto(server.url)
    page.wait_for_function("window.app?.graph?.nodes.length")
    page.get_by_role("button", name="Templates").first.click()
    page.get_by_placeholder("Search").first.fill("wanlite")
    for name in names:
        expect(page.get_by_text(name, exact=True)).to_be_visible()
    page.wait_for_timeout(1000)         # until the pictures are drawn
    page.screenshot(path=tmp_path / "templates.png")
    if request.node.callspec.params["server"] == "newest page":
        assert pictures == {f"{name}.jpg": 200 for name in names}
    page.get_by_text("wanlite_tiny_demo", exact=True).click()
    page.wait_for_function("window.app.graph.nodes.some(node => node.type === 'WanLiteDistill')")
    page.wait_for_timeout(1000)
    page.screenshot(path=tmp_path / "opened.png")
