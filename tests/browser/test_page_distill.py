"""A distillation as a user sees it, in ComfyUI's own page: every page under test with the nodes that a canvas draws, and with Vue's.

Pictures of the page lie in the test's folder.
"""
import json
import re

import pytest
from helpers_page import BANK, DISTILL, RECIPE, STEPS, TEACHER, look_at_distill, small_graph, steps_of
from playwright.sync_api import expect

from wanlite_model.files import write_json

LINKS = (
    ("UNETLoader", "MODEL", "WanLiteCreateStudent", "model"), ("UNETLoader", "MODEL", "WanLiteDistill", "model"),
    ("UNETLoader", "MODEL", "WanLiteCompare", "teacher"),
    ("EmptyHunyuanLatentVideo", "LATENT", "WanLiteCreateStudent", "latent"), ("EmptyHunyuanLatentVideo", "LATENT", "WanLiteDistill", "latent"),
    ("EmptyHunyuanLatentVideo", "LATENT", "WanLiteCompare", "latent"), ("VAELoader", "VAE", "WanLiteDistill", "vae"),
    ("VAELoader", "VAE", "WanLiteCompare", "vae"),
    ("WanLiteEncodePrompts", "prompts", "WanLiteCreateStudent", "prompts"), ("WanLiteEncodePrompts", "prompts", "WanLiteDistill", "prompts"),
    ("WanLiteEncodePrompts", "prompts", "WanLiteCompare", "prompts"), ("WanLiteCreateStudent", "student", "WanLiteDistill", "student"),
    ("WanLiteRecipe", "recipe", "WanLiteDistill", "recipe"), ("WanLiteDistill", "student", "WanLiteSaveStudent", "student"),
    ("WanLiteDistill", "model", "WanLiteCompare", "student"))


BOTH = pytest.mark.parametrize("server, graph", [("own page", False), ("newest page", True)], indirect=True)          # a page and its nodes, each once


@pytest.fixture
def files(server):
    return server.base


def size_of_distill(page):
    return page.evaluate(f"[...{DISTILL}.size]")


def build_by_hand(graph, run):
    """Five nodes and their recipe from the menu, beside the stock loaders, and every wire with the mouse."""
    graph.begin(scale=0.5)
    for kind, at in (("UNETLoader", [950, 300]), ("VAELoader", [950, 600]), ("EmptyHunyuanLatentVideo", [950, 900])):
        graph.add(kind, at)
    graph.open_menu()
    for name, at in (("WanLite Encode Prompts", (700, 120)), ("WanLite Create Student", (700, 600)), ("WanLite Distill", (1000, 120)),
                     ("WanLite Save Student", (1250, 120)), ("WanLite Compare", (1250, 450)), ("WanLite Recipe", (1000, 560))):
        graph.drag(name, at)
    for kind, output, other, name in LINKS:
        graph.wire(kind, output, other, name)
    graph.page.get_by_label("Node Library").click()
    graph.set("UNETLoader", unet_name=TEACHER)
    graph.set("EmptyHunyuanLatentVideo", width=64, height=64, length=5)
    graph.set("WanLiteEncodePrompts", bank=f"input/{BANK}")
    graph.set("WanLiteRecipe", **RECIPE)
    graph.set("WanLiteDistill", run_name=run, steps=STEPS)
    graph.set("WanLiteSaveStudent", name=run)
    graph.set("WanLiteCompare", teacher_steps=2, student_steps=2, clips=1)
    assert graph.links() == set(LINKS)


def test_from_an_empty_canvas_to_a_finished_student(graph, files, tmp_path, request):
    """Dragged, wired, queued, watched, cancelled, queued again, reloaded, finished and compared."""
    page, run = graph.page, "by hand " + re.sub(r"\W+", " ", request.node.name)[-25:].strip()
    build_by_hand(graph, run)
    page.screenshot(path=tmp_path / "1-built.png")
    look_at_distill(page)
    panel, size = graph.panel(), size_of_distill(page)
    expect(panel.status).to_have_text(f"Run “{run}” has not begun.")
    graph.run()
    first = panel.wait_for_step(3)
    early = panel.drawn()
    panel.wait_for_step(STEPS // 25 + first)
    assert panel.drawn() > early
    page.screenshot(path=tmp_path / "2-training.png")
    graph.cancel.click()
    expect(panel.status).to_have_text(re.compile("^Stopped at step"))
    page.screenshot(path=tmp_path / "3-cancelled.png")
    assert size_of_distill(page) == size                 # nothing has moved
    done = steps_of(files, run)
    graph.run()
    assert panel.wait_for_step(len(done) + 1) > len(done) == done[-1]
    page.reload()
    page.wait_for_function(f"window.app?.graph && {DISTILL}")
    look_at_distill(page)
    again, size = panel.wait_for_step(len(done) + 2), size_of_distill(page)         # an old page's Vue nodes are larger after a reload, all of them
    panel.wait_for_step(again + 1)
    page.screenshot(path=tmp_path / "4-reloaded.png")
    panel.element.get_by_role("button", name="Finish now").click()
    expect(page.get_by_text("Finishing", exact=True)).to_be_visible()
    expect(panel.status).to_have_text(re.compile("^Finished after"))
    caption, there = panel.clip()
    assert caption == f"teacher | student · step {steps_of(files, run)[-1]}" and there
    assert [re.sub(r"[\d.]+", "0", entry) for entry in panel.legend()] == ["loss 0", "held-out error 0 (best 0)", "plain cut 0"]
    graph.wait()
    expect(panel.element.locator(".wanlite-disk")).to_contain_text("answers")
    page.screenshot(path=tmp_path / "5-finished.png")
    assert "times as fast" in graph.told("Compare")
    assert size_of_distill(page) == size
    assert (files / "models/diffusion_models" / run / "diffusion_model.safetensors").exists()
    with page.context.expect_page() as opened:
        panel.element.get_by_role("button", name="Open run").click()
    expect(opened.value.locator("#status")).to_have_text(re.compile("^Finished after"))
    expect(opened.value.locator("#report")).to_contain_text("plain cut")
    opened.value.screenshot(path=tmp_path / "6-run.png", full_page=True)


def test_finish_now_inside_a_subgraph(graph, server, files, tmp_path, request):
    name = "nested " + re.sub(r"\W+", " ", request.node.name)[-25:].strip()
    page = graph.page
    graph.open()
    graph.load(small_graph(name, server.object_info()))
    page.evaluate(f"app.graph.convertToSubgraph(new Set([{DISTILL}])); undefined")
    page.wait_for_timeout(500)
    page.evaluate(f"app.canvas.setGraph({DISTILL}.graph)")
    look_at_distill(page)
    panel = graph.panel()
    graph.run()
    done = panel.wait_for_step(4)
    page.screenshot(path=tmp_path / "training.png")
    panel.element.get_by_role("button", name="Finish now").click()
    expect(page.get_by_text("Finishing", exact=True)).to_be_visible()
    expect(panel.status).to_have_text(re.compile("^Finished after"))
    graph.wait()
    page.screenshot(path=tmp_path / "finished.png")
    assert done <= len(steps_of(files, name)) < STEPS
    assert (files / "models/diffusion_models" / name / "diffusion_model.safetensors").exists()


def write_run(base, name, steps, finished):
    """A run as its folder tells of it."""
    folder = base / "output/wanlite/runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "step", "step": step, "loss": 1 / step} for step in range(1, steps + 1)] + [{"kind": "eval", "step": steps, "error": 0.02}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    told = {"job": {"latents": ""}, "last": 90, "baseline": {"plain_cut": {"error": 0.05}, "yardstick": "plain cut of the same size"}}
    write_json(folder / "job.json", {**told, **({"finished": {"step": steps, "report": "It is done."}} if finished else {})})


def test_two_charts_at_once_in_a_light_page(graph, server, files, tmp_path):
    """Each shows the run that its name says, from disk; a third has a name that no run has, and shows another's once it has another's name."""
    page = graph.page
    write_run(files, "whole", 90, finished=True)
    write_run(files, "half", 45, finished=False)
    graph.change_setting("Comfy.ColorPalette", "light")
    graph.begin(scale=0.8)
    for number, name in enumerate(("whole", "half", "nobody")):
        graph.add("WanLiteDistill", [150 + 520 * number, 150])
        rename(page, number, name)
    page.evaluate("app.canvas.setDirty(true, true)")
    whole, half, nobody = (graph.panel(number) for number in range(3))
    expect(whole.status).to_have_text("Finished after 90 steps: held-out error 0.02, 2.5 times below the plain cut of the same size.")
    expect(half.status).to_have_text("Stopped at step 45 of 90. Run the same again: it goes on there.")
    expect(nobody.status).to_have_text("Run “nobody” has not begun.")
    assert whole.drawn() > half.drawn() > 0
    button, line = (whole.element.locator(name).bounding_box() for name in (".wanlite-clear", ".wanlite-disk"))
    assert button["x"] + button["width"] <= line["x"] + line["width"] + 1           # not beyond what is seen
    expect(whole.element.locator(".wanlite-told")).to_have_text("It is done.")
    page.screenshot(path=tmp_path / "light.png")
    rename(page, 0, "nobody")
    expect(whole.status).to_have_text("Run “nobody” has not begun.")
    expect(whole.element.locator(".wanlite-told")).to_have_text("")
    graph.change_setting("Comfy.ColorPalette", "dark")


def rename(page, number, name):
    page.evaluate("""([number, name]) => {
        const widget = app.graph.nodes[number].widgets.find(widget => widget.name === "run_name");
        widget.value = name;
        widget.callback(name);
    }""", [number, name])


@BOTH
def test_a_page_in_the_background_draws_nothing_and_catches_up(graph, server, files):
    page = graph.page
    graph.open()
    graph.load(small_graph("background", server.object_info()))
    look_at_distill(page)
    panel = graph.panel()
    graph.run()
    seen = panel.wait_for_step(2)
    page.evaluate("""() => {
        window.drawings = window.requests = 0;
        Object.defineProperty(document, "hidden", { configurable: true, get: () => true });
        const { fillText } = CanvasRenderingContext2D.prototype, canvas = document.querySelector(".wanlite canvas"), { fetch } = window;
        CanvasRenderingContext2D.prototype.fillText = function (...given) { window.drawings += this.canvas === canvas; return fillText.apply(this, given); };
        window.fetch = (...given) => { window.requests += String(given[0]).includes("wanlite"); return fetch(...given); };
    }""")
    at = panel.step()
    page.wait_for_timeout(2500)
    assert panel.step() == at and page.evaluate("[window.drawings, window.requests]") == [0, 0]
    page.evaluate("() => { delete document.hidden; document.dispatchEvent(new Event('visibilitychange')); }")
    assert panel.wait_for_step(at + 1) > seen and page.evaluate("window.drawings") > 0
