"""What goes wrong at a user's page, with the canvas' nodes on one page and with Vue's on the other: the page says what to do, and a run goes on.

Pictures of the page lie in the test's folder.
"""
import re

import pytest
from helpers_page import Graph, look_at_distill, small_graph, steps_of
from playwright.sync_api import expect

pytestmark = pytest.mark.parametrize("server, graph", [("own page", False), ("newest page", True)], indirect=True)
TITLES = {"WanLiteEncodePrompts": "WanLite Encode Prompts", "WanLiteSaveStudent": "WanLite Save Student", "WanLiteDistill": "WanLite Distill",
          "UNETLoader": "Load Diffusion Model"}
WRONG = (("WanLiteEncodePrompts", {"bank": "none"}, "There are no prompts"), ("WanLiteSaveStudent", {"name": "taken"}, "taken"),
         ("WanLiteDistill", {"run_name": "a/b"}, "cannot be a run's name"), ("UNETLoader", {"unet_name": "gone.safetensors"}, "gone.safetensors"))


def load(graph, name):
    graph.load(small_graph(name, graph.server.object_info()))


def test_what_is_wrong_is_said_before_anything_runs(graph, tmp_path):
    """An empty list of prompts, a name that is taken, one that cannot be, and a model file that is gone."""
    (graph.server.base / "models/diffusion_models/taken").mkdir()
    (graph.server.base / "models/diffusion_models/taken/mine.txt").write_text("mine", encoding="utf-8")
    graph.open()
    for kind, values, words in WRONG:
        load(graph, "refused")
        graph.set(kind, **values)
        graph.run()
        expect(graph.page.get_by_text(words).first).to_be_visible()
        graph.page.screenshot(path=tmp_path / f"{kind}.png")
        wrong = graph.page.evaluate("Object.values(app.lastNodeErrors).map(({ class_type, errors }) => [class_type, JSON.stringify(errors)])")
        assert [node for node, _ in wrong] == [kind] and words in wrong[0][1]
        expect(graph.page.get_by_text(TITLES[kind], exact=True).last).to_be_visible()
        graph.end()
        graph.page.keyboard.press("Escape")         # the page's own window of errors
        graph.page.evaluate("app.extensionManager.toast.removeAll?.()")


def test_a_wire_that_does_not_fit_is_not_made(graph, tmp_path):
    graph.begin(scale=0.6)
    for name, at in (("UNETLoader", [300, 300]), ("WanLiteDistill", [1000, 300])):
        graph.add(name, at)
    graph.page.wait_for_timeout(800)
    fits = ("UNETLoader", "MODEL", "WanLiteDistill", "model")
    graph.wire("UNETLoader", "MODEL", "WanLiteDistill", "student")
    assert graph.links() <= {fits}                  # a page may take it to where it fits
    graph.page.keyboard.press("Escape")
    graph.wire("UNETLoader", "MODEL", "WanLiteDistill", "model")
    assert graph.links() == {fits}


def test_a_closed_tab_and_a_lost_connection_end_no_run(graph, browser, tmp_path):
    graph.open()
    load(graph, "goes on")
    look_at_distill(graph.page)
    graph.run()
    seen = graph.panel().wait_for_step(3)
    graph.page.close()
    context = browser.new_context(viewport={"width": 1800, "height": 1100})            # another browser than the one that queued it
    try:
        other = Graph(context.new_page(), graph.server, graph.vue)
        other.open()
        load(other, "goes on")
        look_at_distill(other.page)
        panel = other.panel()
        assert panel.wait_for_step(seen + 1) > seen
        context.set_offline(True)
        other.page.evaluate("app.api.socket.close()")
        expect(panel.status).to_have_text(re.compile("^Connection lost"))
        other.page.screenshot(path=tmp_path / "lost.png")
        before = steps_of(graph.server.base, "goes on")[-1]
        context.set_offline(False)
        assert panel.wait_for_step(before + 1) > before
        other.page.screenshot(path=tmp_path / "back.png")
        graph.page = other.page
        graph.end()
        expect(panel.status).to_have_text(re.compile("^Stopped at step"))
    finally:
        context.close()
