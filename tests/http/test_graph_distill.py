"""The whole job in a real server: stock loaders in, WanLite between, stock sampler and stock plot out; Cancel, and queue again; the end
of the server, and queue again; and an early end that is asked for.
"""
import json
import os
import shutil
import signal

import pytest
import requests
import torch
from helpers_tiny import random_bank, random_wan
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo.comfy_server import ServerError, running_comfyui
from wanlite_model.formats.read import open_wan

MODEL_FILE = "http-teacher.safetensors"
BANK_FILE = "http-bank.safetensors"


@pytest.fixture(scope="module")
def files(server):
    return put_files(server.base)


def put_files(base):
    """A teacher in models/diffusion_models, and a prompt bank in input: no text encoder is needed."""
    save_file(dict(random_wan(seed=3, ffn_dim=128).state_dict()), base / "models/diffusion_models" / MODEL_FILE)
    random_bank(2).save(base / "input" / BANK_FILE)
    return base


def graph(run_name, steps, **distil):
    """The graph that the README describes, in API form, at 64x64 pixels and 5 frames."""
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}        # noqa: E731
    return {
        "unet": node("UNETLoader", unet_name=MODEL_FILE, weight_dtype="default"),
        "shift": node("ModelSamplingSD3", model=["unet", 0], shift=3.0),
        "latent": node("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1),
        "prompts": node("WanLiteEncodePrompts", prompts="", prompt_file="none", template="{prompt}", negative="",
                        bank=f"input/{BANK_FILE}", save_as="", preview=2, folder="none", show="first frame"),
        "create": node("WanLiteCreateStudent", model=["shift", 0], prompts=["prompts", 0], latent=["latent", 0], preset="1/2 of the blocks", depth=0,
                       ffn_dim=0, keep_map="", method="greedy", block_steps=3, refit="mean", cfg=3.0, probe_seed=0,
                       expert="not one of two"),
        "recipe": node("WanLiteRecipe", objective="velocity", rank=0, start_from="none", student_steps=0, own_states=-1.0, optimizer="AdamW", learning_rate=2e-3, batch_size=2, warmup=1, max_grad_norm=1.0, weight_decay=0.0,
                       ema_decay=0.5, teacher_steps=2, renoised=0.5, full_range=0.25, evaluations=2, save_every=10.0, checkpointing="auto",
                       checkpoints_on_cpu="auto", frozen_float8="auto", optimizer_8bit="auto", gradient_release="auto", swapped_blocks=-1, gpu_gib=0.0, ram_gib=0.0,
                       disk_gib=0.0, cache_gib=0.0, runs_gib=0.0, boundary=0.0),
        "distil": node("WanLiteDistill", **{"student": ["create", 0], "model": ["shift", 0], "prompts": ["prompts", 0], "latent": ["latent", 0],
                                            "recipe": ["recipe", 0], "preset": "slim", "cfg": 3.0, "minutes": 5.0, "steps": steps,
                                            "run_name": run_name, "train_seed": 0, "expert": "as the student was made", **distil}),
        "report": node("PreviewAny", source=["distil", 3]),
    }


def with_outputs(prompt, name):
    """The same graph with everything that can follow a distillation."""
    node = lambda kind, **inputs: {"class_type": kind, "inputs": inputs}        # noqa: E731
    return {
        **prompt,
        "sampler": node("KSampler", model=["distil", 1], positive=["prompts", 1], negative=["prompts", 2], latent_image=["latent", 0], seed=1,
                        steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0),
        "latents": node("SaveLatent", samples=["sampler", 0], filename_prefix=name),
        "plot": node("LossGraphNode", loss=["distil", 2], filename_prefix="loss"),
        "chart": node("PreviewImage", images=["distil", 4]),
        "save": node("WanLiteSaveStudent", student=["distil", 0], name=name, format="folder", dtype="bf16", overwrite=False, base_model="",
                     licence=""),
    }


def logged(base, run_name):
    """The whole lines of a run's log: losses, and seconds that no second run would take again to the last digit."""
    log = next((base / "output/wanlite/runs" / run_name).glob("*.jsonl"))
    return [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def rows(base, run_name, kind="step"):
    return [line["step"] for line in map(json.loads, logged(base, run_name)) if line["kind"] == kind]


def steps(base, run_name):
    """What the log says of each step."""
    return [line for line in map(json.loads, logged(base, run_name)) if line["kind"] == "step"]


@pytest.fixture(scope="module")
def whole(server, files):
    """What the graph of a whole job tells, whose student is saved as http-student."""
    return server.run(with_outputs(graph("whole", 4), "http-student"))


def test_the_whole_job_runs_and_the_saved_student_is_a_stock_model(whole, server, files):
    assert "plain cut" in whole["report"]["text"][0] and "verified" in whole["save"]["text"][0]
    assert whole["plot"]["images"] and whole["chart"]["images"]
    assert "http-student/diffusion_model.safetensors" in server.object_info()["UNETLoader"]["input"]["required"]["unet_name"][0]
    with open_wan(files / "models/diffusion_models/http-student") as saved:
        assert saved.config.num_layers == 3 and saved.card.shift == 3.0


@pytest.mark.usefixtures("whole")
def test_the_saved_workflow_draws_what_distils_own_model_draws(server, files):
    """Its text encoder is not here: the same embeddings come from the bank. What counts is sampler, steps, cfg and shift."""
    from demo.graph import to_api
    workflow = json.loads((files / "models/diffusion_models/http-student/http-student.workflow.json").read_text(encoding="utf-8"))
    prompt = to_api(workflow, server.object_info())
    prompts = graph("unused", 1)["prompts"]
    by_kind = {node["class_type"]: number for number, node in prompt.items()}
    sampler = prompt[by_kind["KSampler"]]["inputs"]
    sampler.update(positive=["prompts", 1], negative=["prompts", 2], seed=1)
    wanted = {by_kind[kind] for kind in ("UNETLoader", "ModelSamplingSD3", "KSampler", "EmptyHunyuanLatentVideo")}
    stock = {number: node for number, node in prompt.items() if number in wanted}
    kept = {"class_type": "SaveLatent", "inputs": {"samples": [by_kind["KSampler"], 0], "filename_prefix": "stock"}}
    stock.update({"prompts": prompts, "latents": kept})
    server.run(stock)
    ours, theirs = (load_file(next((files / "output").glob(f"{name}_*.latent")))["latent_tensor"] for name in ("http-student", "stock"))
    assert ours.shape == theirs.shape
    assert torch.equal(ours, theirs)            # the run keeps its best in bf16, and bf16 is what was saved


def test_cancel_and_queue_again_continues_at_the_step_where_it_stopped(server, files):
    prompt = graph("cancelled", 400)
    first = server.queue(prompt)
    for event in server.events(first):
        if event["type"] == "progress" and event["data"]["max"] == 400 and event["data"]["value"] >= 5:
            server.interrupt()
            break
    entry = server.wait(first)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    done, before = rows(files, "cancelled"), steps(files, "cancelled")
    assert done == list(range(1, len(done) + 1)) and 5 <= len(done) < 400
    second, shown = server.queue(prompt), []
    for event in server.events(second):
        if event["type"] == "progress" and event["data"]["max"] == 400:
            shown.append(event["data"]["value"])
            if shown[-1] > len(done) + 3:
                server.interrupt()
                break
    server.wait(second)
    assert shown[0] >= len(done)
    again = rows(files, "cancelled")
    assert again == list(range(1, len(again) + 1)) and len(again) > len(done)
    assert steps(files, "cancelled")[:len(before)] == before           # none was made again


def train_until(server, prompt_id, step, total=400):
    """Follows a queued prompt until that many steps are shown to be done; returns the first that was shown."""
    first = None
    for event in server.events(prompt_id):
        if event["type"] == "wanlite.live" and event["data"]["stage"] == "training" and event["data"]["steps"] == total:
            first = event["data"]["step"] if first is None else first
            if event["data"]["step"] >= step:
                return first
    raise AssertionError(f"the prompt ended before step {step}")


def asked(server, method, path, **told):
    """The answer to what the page asks."""
    with requests.Session() as session:
        session.trust_env = False               # a proxy of the environment must not see it
        return session.request(method, f"{server.url}/wanlite/{path}", timeout=60, **told)


def ask_to_finish(server, run):
    """(status, answer) of what the button Finish now sends."""
    answer = asked(server, "POST", "finish", json={"run": run})
    return answer.status_code, answer.json()


def test_finish_now_ends_the_training_with_the_best_so_far_and_the_graph_goes_on(server, files):
    queued = server.queue(with_outputs(graph("early", 400), "http-early"))
    train_until(server, queued, 5)
    assert ask_to_finish(server, "early") == (200, {"finishing": True})
    outputs = server.outputs(queued)
    done = rows(files, "early")
    assert done == list(range(1, len(done) + 1)) and 5 <= len(done) < 400
    assert "plain cut" in outputs["report"]["text"][0] and "verified" in outputs["save"]["text"][0] and outputs["chart"]["images"]
    assert rows(files, "early", "eval")[-1] == len(done)                # what was trained last is measured, and is it when it is the best


def test_a_finish_that_no_job_waits_for_is_refused_and_does_not_end_the_next(server, files):
    status, answer = ask_to_finish(server, "whole length")
    assert status == 404 and "training run 'whole length' now" in answer["error"]
    queued = server.queue(graph("whole length", 40))
    train_until(server, queued, 3, total=40)
    assert ask_to_finish(server, "another")[0] == 404
    server.outputs(queued)
    assert rows(files, "whole length") == list(range(1, 41))


def test_the_page_is_told_of_a_run_while_it_goes_on_afterwards_and_seldom_enough(server, files):
    """Of all that the node sends, a browser gets no more than five messages a second (which a busy machine may hand on together); what it asks for later
    is what it was sent.
    """
    queued = server.queue(graph("shown", 150))
    events = list(server.events(queued))
    begun = next(k for k, event in enumerate(events) if event["type"] == "executing" and event["data"]["node"] == "distil")
    events = [event for event in events[begun:] if event["type"] in ("progress", "progress_state", "preview", "wanlite.live")]
    sent = [event["data"] for event in events if event["type"] == "wanlite.live"]
    times = [event["arrived"] for event in events]
    assert len(sent) >= 5 and len(times) <= 5 * (times[-1] - times[0]) + 5
    assert {told["run"] for told in sent} == {"shown"} and {told["node"] for told in sent} == {"distil"}
    steps = [told["step"] for told in sent]
    assert steps == sorted(steps) and [told["running"] for told in sent] == [True] * (len(sent) - 1) + [False]
    assert all(told["left"] is not None for told in sent if told["stage"] in ("asking the teacher", "training"))
    later = asked(server, "GET", "run", params={"run": "shown"}).json()
    fields = ("step", "steps", "curve", "errors", "plain_cut", "yardstick", "report", "clips", "running")
    assert {name: later[name] for name in fields} == {name: sent[-1][name] for name in fields}
    assert later["step"] == later["steps"] == 150 and len(later["errors"]) == 2 and later["plain_cut"] > 0 and "plain cut" in later["report"]
    assert later["folder"] == str(files / "output/wanlite/runs/shown") and later["job"]["steps"] == 150


@pytest.mark.parametrize("path, status, words", [("run?run=never", 200, None), ("run?run=..%2Fup", 400, "cannot be a run's name"), ("run?node=distil", 200, None),
                                                 ("clip?run=shown&step=75", 404, "No clip"), ("clip?run=..%2Fup&step=1", 400, "cannot be a run's name")])
def test_what_the_page_cannot_have_is_answered_with_a_sentence(path, status, words, server, files):
    answer = asked(server, "GET", path)
    assert answer.status_code == status and (words is None or words in answer.json()["error"])
    assert words is not None or not answer.json().get("begun")


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without telling it")
def test_a_server_that_is_ended_saves_the_job_and_the_next_one_goes_on(comfyui_folder, tmp_path):
    """Nothing else can have saved it: a checkpoint is written every ten minutes."""
    prompt, saved, logged_before, checkpoint = graph("ended", 400), 0, [], tmp_path / "output/wanlite/runs/ended/checkpoint.safetensors"
    prompt["create"]["inputs"].update(method="interleaved", block_steps=0)
    for number, code in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)):
        with running_comfyui(comfyui_folder, tmp_path, ("--cpu",)) as server:
            put_files(tmp_path)
            assert train_until(server, server.queue(prompt), saved + 5) >= saved
            server._process.send_signal(number)
            assert server._process.wait(timeout=60) == code
        with safe_open(checkpoint, "pt") as stored:
            saved, before = json.loads(stored.metadata()["wanlite.state"])["step"], saved
        assert saved == rows(tmp_path, "ended")[-1] >= before + 5
        assert steps(tmp_path, "ended")[:before] == logged_before
        logged_before = steps(tmp_path, "ended")


def test_a_bank_spares_the_text_encoder_and_a_new_prompt_asks_for_it(server, files):
    """The linked text encoder cannot be loaded at all: a graph that asks for it fails in its loader."""
    (files / "models/text_encoders/broken.safetensors").write_text("no text encoder", encoding="utf-8")
    prompt = {"clip": {"class_type": "CLIPLoader", "inputs": {"clip_name": "broken.safetensors", "type": "wan", "device": "default"}},
              "prompts": graph("unused", 1)["prompts"],
              "shown": {"class_type": "PreviewAny", "inputs": {"source": ["prompts", 1]}}}
    prompt["prompts"]["inputs"].update(clip=["clip", 0], prompts="prompt 1", preview=1)
    assert "1 prompts, 0 texts encoded now" in server.run(prompt)["prompts"]["text"][0]
    prompt["prompts"]["inputs"]["prompts"] = "prompt 1\na new one"
    with pytest.raises(ServerError, match="CLIPLoader"):
        server.run(prompt)


def test_what_widgets_decide_is_refused_before_the_queue(server, files):
    for node, changed, words in (("prompts", {"save_as": "../up"}, "a bank's name"), ("create", {"depth": 3}, "or choose 'custom'"),
                                 ("distil", {"run_name": "../up"}, "a run's name")):
        prompt = graph("refused", 2)
        prompt[node]["inputs"].update(changed)
        with pytest.raises(ServerError, match=words):
            server.run(prompt)
    assert not (files / "output/wanlite/runs/refused").exists()


def test_each_long_node_can_be_queued_alone(server, files):
    whole = graph("alone", 2)
    for last in ("prompts", "create", "distil"):
        needed = list(whole)[:list(whole).index(last) + 1]
        assert server.run({name: whole[name] for name in needed})[last]["text"]


def test_a_link_that_does_not_fit_fails_the_node_with_a_sentence(server, files):
    """What only a link decides reaches the node, whose first second says it."""
    prompt = graph("misfit", 2)
    prompt["create"]["inputs"]["latent"] = ["wrong", 0]
    prompt["wrong"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    with pytest.raises(ServerError, match="4 channels"):
        server.run(prompt)


def test_what_no_job_works_on_is_cleared_and_the_next_queue_makes_it_anew(server, files):
    def runs():
        return {path.name for path in (files / "output/wanlite/runs").iterdir()}

    def disk():
        return asked(server, "GET", "disk", params={"lost": 1}).json()

    def quick(name, steps):
        prompt = graph(name, steps)
        prompt["create"]["inputs"].update(method="interleaved", block_steps=0, refit="none")
        prompt["latent"]["inputs"].update(width=32, height=32, length=1)
        return prompt

    server.run(quick("cleared", 2))
    told = disk()
    assert min(told[name][amount] for name in ("runs", "cache", "starts") for amount in ("bytes", "count")) > 0 and told["free"] > 0
    assert told["runs"]["count"] == len(runs()) and "cleared" in told["unsaved"]

    queued = server.queue(quick("busy", 150))
    train_until(server, queued, 3, total=150)
    assert "busy" not in str(disk())
    answer = asked(server, "POST", "disk/clear").json()
    assert answer["freed"] > 0 and runs() == {"busy"}
    kept = {one["name"]: one["why"] for one in answer["kept"]}
    assert kept.keys() >= {"busy", "answers"} and any(name.startswith("start ") for name in kept)
    server.interrupt()
    server.wait(queued)
    assert rows(files, "busy") and disk()["unfinished"] == ["busy"]

    assert asked(server, "POST", "disk/clear").json()["kept"] == [] and runs() == set()
    left = disk()
    assert all(left[name] == {"bytes": 0, "count": 0} for name in ("runs", "cache", "starts")) and left["unsaved"] == left["unfinished"] == []
    assert "plain cut" in server.run(quick("cleared", 2))["report"]["text"][0] and rows(files, "cleared") == [1, 2]

    shutil.rmtree(files / "output/wanlite/starts")              # by hand, behind ComfyUI's back
    with pytest.raises(ServerError, match="not on disk any more.*Queue its graph again"):
        server.run(quick("by hand", 1))
    assert server.run(quick("by hand", 1))["report"]["text"]
