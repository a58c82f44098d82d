"""A distillation as a user sees it: Run, Cancel and Finish now are pressed in ComfyUI's own page, and every Run goes on where the last one stopped.

Pictures of the page lie in the test's folder.
"""
import json
import time

import pytest
from helpers_tiny import random_bank, random_wan
from playwright.sync_api import expect
from safetensors.torch import save_file

from demo.main import prepare
from demo.workflows import SETTINGS, TINY, build

STEPS = 5000        # more than are ever done here
SMALL = {**SETTINGS[TINY], "teacher": "page-teacher.safetensors", "size": (64, 64, 5), "steps": 2, "job": {"steps": STEPS},
         "text": {"prompts": ("WanLiteEncodePrompts", 1, {"bank": "input/page-bank.safetensors"})},
         "recipe": {"learning_rate": 2e-3, "batch_size": 2, "teacher_steps": 2, "renoised": 0.5, "evaluations": 2},
         "compare": {"teacher_steps": 2, "student_steps": 2, "clips": 1}}
DISTILL = "[...app.graph.nodes, ...[...app.graph.subgraphs.values()].flatMap(each => each.nodes)].find(node => node.type === 'WanLiteDistill')"


@pytest.fixture(scope="module")
def files(server):
    """The demo's VAE, a smaller teacher, and two prompts."""
    prepare(server.base)
    save_file(dict(random_wan(seed=3, ffn_dim=128).state_dict()), server.base / "models/diffusion_models" / SMALL["teacher"])
    random_bank(2).save(server.base / "input/page-bank.safetensors")
    return server.base


def open_template(page, server, name, vue_nodes):
    """Opens the demo's graph, made small, as one of the pack's templates; returns it as it was saved."""
    saved = build({**SMALL, "name": name}, server.object_info())
    (server.base / f"custom_nodes/WanLite/example_workflows/{name}.json").write_text(json.dumps(saved), encoding="utf-8")
    page.request.post(f"{server.url}/settings/Comfy.VueNodes.Enabled", data=json.dumps(vue_nodes))
    page.goto(f"{server.url}/?template={name}&source=WanLite")          # after the graph that the page opens with
    page.wait_for_function(f"window.app?.graph && {DISTILL}")
    return saved


def look_at_distill(page):
    page.evaluate(f"() => {{ app.canvas.ds.scale = 1; app.canvas.centerOnNode({DISTILL}); app.canvas.setDirty(true, true); }}")
    page.wait_for_timeout(1000)         # until it is drawn, and with Vue's nodes until their widgets are there again


def press_on_canvas(page):
    """Presses Finish now where the canvas draws it."""
    page.mouse.click(*page.evaluate(f"""() => {{
        const node = {DISTILL}, button = node.widgets.find(widget => widget.name === "Finish now");
        return app.canvasPosToClientPos([node.pos[0] + node.size[0] / 2, node.pos[1] + button.y + 10]);
    }}"""))


def widget_values(nodes):
    """{node id: values} of a saved workflow's nodes, without what PreviewAny shows."""
    return {node["id"]: node.get("widgets_values", []) for node in nodes if node["type"] != "PreviewAny"}


def run_again(page, server, name, steps=4):
    """Presses Run and waits for so many more steps; what was done before is still there. Returns all that are done."""
    before = log(server, name)
    page.get_by_role("button", name="Run", exact=True).first.click()         # newer pages call the arrow beside it Run too
    deadline = time.monotonic() + 120
    while len(now := log(server, name)) < len(before) + steps:
        assert time.monotonic() < deadline, server.log()
        page.wait_for_timeout(100)
    assert now[:len(before)] == before and [row["step"] for row in now] == list(range(1, len(now) + 1))
    return now


def log(server, name):
    """The steps that the run's log tells of, whole lines only."""
    path = server.base / "output/wanlite/runs" / name / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == "step"]


def test_run_and_cancel_twice_then_run_and_finish_now(page, server, files, tmp_path):
    saved = open_template(page, server, "pressed", vue_nodes=False)
    assert widget_values(page.evaluate("app.graph.serialize().nodes")) == widget_values(saved["nodes"])
    look_at_distill(page)
    page.screenshot(path=tmp_path / "1-opened.png")
    press_on_canvas(page)
    expect(page.get_by_text("there is nothing to finish")).to_be_visible()
    page.screenshot(path=tmp_path / "2-nothing-to-finish.png")
    cancel = page.get_by_label("Cancel current run")
    for turn in (3, 4):
        run_again(page, server, "pressed")
        cancel.click()
        expect(cancel).to_be_disabled()
        page.screenshot(path=tmp_path / f"{turn}-cancelled.png")
    done = len(run_again(page, server, "pressed"))
    press_on_canvas(page)
    expect(page.get_by_text("Finishing", exact=True)).to_be_visible()
    page.screenshot(path=tmp_path / "5-finishing.png")
    expect(cancel).to_be_disabled()
    expect(page.locator(".wanlite-told")).to_contain_text("To save memory: none needed")
    page.screenshot(path=tmp_path / "6-finished.png")
    assert done <= len(log(server, "pressed")) < STEPS
    reports = page.evaluate("app.graph.nodes.filter(node => node.type === 'PreviewAny').map(node => node.widgets[0].value)")
    assert any("plain cut" in report for report in reports) and any("verified" in report for report in reports)
    assert (files / "models/diffusion_models/pressed/diffusion_model.safetensors").exists()
    assert widget_values(page.evaluate("app.graph.serialize().nodes")) == widget_values(saved["nodes"])


def test_finish_now_on_a_vue_node_inside_a_subgraph(page, server, files, tmp_path):
    open_template(page, server, "nested", vue_nodes=True)
    page.evaluate(f"() => {{ const {{ subgraph }} = app.graph.convertToSubgraph(new Set([{DISTILL}])); app.canvas.setGraph(subgraph); }}")
    look_at_distill(page)
    done = len(run_again(page, server, "nested"))
    page.get_by_role("button", name="Finish now").click()
    expect(page.get_by_text("Finishing", exact=True)).to_be_visible()
    page.screenshot(path=tmp_path / "finishing.png")
    expect(page.get_by_label("Cancel current run")).to_be_disabled()
    assert done <= len(log(server, "nested")) < STEPS
    assert (files / "models/diffusion_models/nested/diffusion_model.safetensors").exists()
