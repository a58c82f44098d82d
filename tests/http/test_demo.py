"""The demo's own path, cut short: its files, its two graphs through a real server, its measurements, its picture."""
import pytest
from PIL import Image

from demo import compare, main, timing
from demo.sheet import draw
from demo.workflows import STUDENT

SHORT = {"WanLiteDistill": {"steps": 12}, "WanLiteRecipe": {"teacher_steps": 3, "renoised": 0.25, "evaluations": 1, "batch_size": 4},
         "WanLiteCreateStudent": {"method": "interleaved"}, "KSampler": {"steps": 3},        # as many as the saved workflow then has
         "WanLiteCompare": {"teacher_steps": 2, "student_steps": 2, "clips": 1}}


@pytest.fixture(scope="module")
def demo(server, tmp_path_factory):
    """Both graphs, run: the folder that the newest clips and pictures were copied to."""
    main.prepare(server.base)
    graph = main.shipped_graph(server)
    for node in graph.values():
        node["inputs"].update(SHORT.get(node["class_type"], {}))
    main.queue_shown(server, graph)
    stock = main.stock_graph(server)
    for node in stock.values():
        if node["class_type"] == "SaveAnimatedWEBP":
            node["inputs"]["lossless"] = True           # as in the shipped graph: the clips are compared to the bit
    main.queue_shown(server, stock)
    kept = tmp_path_factory.mktemp("kept")
    main.keep_clips(server.base / "output" / "wanlite", kept)
    return kept


def test_the_shipped_graph_and_the_saved_workflow_leave_their_clips(demo):
    assert {path.stem for path in demo.iterdir()} == {"student", "compare", "stock", "chart"}


def test_what_distill_said_is_found_for_the_table(demo, server):
    assert "plain cut" in main.distill_report(server.base).splitlines()[0]


def test_the_saved_workflow_draws_what_the_graphs_own_model_drew(demo):
    clips = [Image.open(demo / f"{name}.webp") for name in ("student", "stock")]
    assert clips[0].n_frames == clips[1].n_frames == 9
    for frame in range(9):
        for clip in clips:
            clip.seek(frame)
        assert clips[0].convert("RGB").tobytes() == clips[1].convert("RGB").tobytes()


def test_teacher_plain_cut_and_student_are_measured_and_drawn(comfyui, demo, server, tmp_path, monkeypatch):
    for module, name, value in ((compare, "PAIRS", 4), (compare, "ERROR_PAIRS", 2), (timing, "ROUNDS", 1)):
        monkeypatch.setattr(module, name, value)
    result = compare.measure(server.base, STUDENT, main.CUT)
    summary = result.summary
    assert list(summary) == ["teacher", "plain_cut", "student"]
    assert [row["blocks"] for row in summary.values()] == [12, 8, 8]
    assert summary["teacher"]["evaluations"] == 60 and summary["student"]["evaluations"] == summary["student"]["steps"]
    assert summary["teacher"]["velocity_error"] == 0 < summary["student"]["velocity_error"]
    assert all(row["seconds"] > 0 for row in summary.values())
    draw(result, tmp_path / "demo.png")
    with Image.open(tmp_path / "demo.png") as picture:
        assert min(picture.size) > 400
        assert len(picture.getcolors(maxcolors=2**24)) > 100
    assert "adherence" in result.table() and "(CPU)" in result.table()


def test_an_older_demos_folder_is_made_again_only_when_what_it_was_made_from_changed(tmp_path):
    base = tmp_path / "base"
    main.forget_another_demo(base)
    main.prepare(base)
    main.forget_another_demo(base)
    assert (base / "input").exists()
    (base / main.STAMP).write_text("of another graph", encoding="utf-8")
    main.forget_another_demo(base)
    assert not base.exists()
