"""The workflows that come with students, as ComfyUI's own page opens them: it would queue what is meant.

Pictures of the page lie in the test's folder.
"""
from helpers_variants import RELEASED

from demo.graph import to_api
from wanlite_model.formats.card import StudentCard
from wanlite_model.formats.workflow import stock_workflow

GRAPHS = {**{name: (config, {}) for name, config in RELEASED.items()},
          "i2v 2.2, one of two": (RELEASED["i2v 2.2"], {"expert": "low", "boundary": 0.9})}


def meaning(prompt):
    return {key: (node["class_type"], node["inputs"]) for key, node in prompt.items()}


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
