"""Encode Prompts: a bank spares the text encoder, and what it hands out is what the stock text encoder node hands out."""
import pytest
import torch
from helpers_bridge import TextEncoder, call, tree
from helpers_tiny import random_bank


@pytest.fixture
def node(pack):
    return pack("nodes.prompts").WanLiteEncodePrompts


@pytest.fixture
def bank_file(comfyui):
    """A bank in ComfyUI's input folder, as the node's combo names it."""
    random_bank(3).save(comfyui.base / "input" / "three.safetensors")
    yield "input/three.safetensors"
    (comfyui.base / "input" / "three.safetensors").unlink()


def test_prompts_are_encoded_and_handed_out_like_the_stock_nodes(comfyui, node):
    clip = TextEncoder()
    bank, positive, negative, _ = call(node, clip=clip, prompts="a red ball\n# not this\n\na red ball\na blue box falls", negative="bad", preview=2)
    assert bank.prompts == ("a red ball", "a blue box falls") and clip.asked == ["a red ball", "a blue box falls", "bad"]
    (stock,) = comfyui.nodes.CLIPTextEncode().encode(clip, "a blue box falls")
    assert torch.equal(positive[0][0], stock[0][0]) and positive[0][1] == stock[0][1]
    assert negative[0][0].shape == (1, 512, 4096) and not any(context.is_inference() for context in bank.contexts)


def test_a_bank_needs_no_text_encoder(node, bank_file):
    bank, positive, *_ = call(node, bank=bank_file)
    expected = random_bank(3)
    assert bank.prompts == expected.prompts and bank.fingerprint == expected.fingerprint
    assert torch.equal(positive[0][0][0, :3], expected.contexts[0]) and not positive[0][0][0, 3:].any()


def test_the_text_encoder_is_asked_for_only_when_the_bank_lacks_a_text(node, bank_file):
    widgets = {"prompt_file": "none", "template": "{prompt}", "negative": "", "save_as": "", "preview": 1}
    assert node.check_lazy_status(prompts="prompt 1", bank=bank_file, clip=None, **widgets) == []
    assert node.check_lazy_status(prompts="", bank=bank_file, clip=None, **widgets) == []
    assert node.check_lazy_status(prompts="prompt 1\nnew", bank=bank_file, clip=None, **widgets) == ["clip"]
    assert node.check_lazy_status(prompts="prompt 1", bank=bank_file, clip=None, **{**widgets, "negative": "other"}) == ["clip"]
    assert node.check_lazy_status(prompts="new", bank=bank_file, **widgets) == []           # not linked: execute says so


def test_only_missing_texts_are_encoded(node, bank_file):
    clip = TextEncoder()
    bank, *_ = call(node, clip=clip, prompts="new one\nprompt 2", bank=bank_file)
    assert clip.asked == ["new one"] and bank.prompts == ("new one", "prompt 2")
    assert torch.equal(bank.contexts[1], random_bank(3).contexts[2])


def test_our_own_lists_are_offered_and_can_be_encoded(node):
    (files,) = [widget.options for widget in node.GET_SCHEMA().inputs if widget.id == "prompt_file"]
    assert {"WanLite/video.txt", "WanLite/image.txt"} <= set(files)
    clip = TextEncoder()
    bank, *_ = call(node, clip=clip, prompt_file="WanLite/video.txt")
    assert len(bank) >= 96 and len(set(bank.prompts)) == len(bank.prompts) and all(20 < len(prompt) < 200 for prompt in bank.prompts)


def test_a_template_is_put_around_each_typed_prompt(node, bank_file):
    clip = TextEncoder()
    bank, *_ = call(node, clip=clip, prompts="a cat\na dog", template="ohwx style, {prompt}")
    assert bank.prompts == ("ohwx style, a cat", "ohwx style, a dog")
    assert call(node, bank=bank_file, template="ohwx style, {prompt}")[0].prompts == random_bank(3).prompts


@pytest.mark.parametrize("count, words", [(2, "too few"), (9, "are few"), (24, None)])
def test_too_few_prompts_are_told(node, caplog, count, words):
    with caplog.at_level("INFO"):
        call(node, clip=TextEncoder(), prompts="\n".join(f"prompt number {i}" for i in range(count)))
    assert words in caplog.text if words else "few" not in caplog.text


def test_a_prompt_file_is_added(comfyui, node):
    path = comfyui.base / "input" / "prompts.txt"
    path.write_text("\ufeffein Bär\n# comment\n", encoding="utf-8")
    bank, *_ = call(node, clip=TextEncoder(), prompts="first", prompt_file="prompts.txt")
    assert bank.prompts == ("first", "ein Bär")
    before = node.fingerprint_inputs(prompt_file="prompts.txt", bank="none")
    path.write_text("another one\n", encoding="utf-8")
    assert node.fingerprint_inputs(prompt_file="prompts.txt", bank="none") != before
    path.unlink()


def test_without_a_negative_prompt_wans_own_is_used(node, pack):
    bank, *_ = call(node, clip=TextEncoder(), prompts="one")
    assert bank.negative_text == pack("wanlite_model.formats.workflow").NEGATIVE


def test_a_saved_bank_is_offered_and_never_replaced_by_another(comfyui, node, pack, refused):
    call(node, clip=TextEncoder(), prompts="one\ntwo", save_as="mine")
    assert "mine.safetensors" in pack("nodes.comfy_bridge.folders").bank_names()
    call(node, bank="mine.safetensors", save_as="mine")                                  # the same again is no change
    before, clip = tree(comfyui.base), TextEncoder()
    for given in ({"clip": clip, "prompts": "three"}, {"bank": "mine.safetensors", "prompts": "two"}):
        with refused("mine is already there"):
            call(node, **given, save_as="mine")
    assert clip.asked == [] and tree(comfyui.base) == before                              # before minutes of encoding
    again, *_ = call(node, bank="mine.safetensors")
    assert again.prompts == ("one", "two")


def bad_inputs():
    return {
        "no prompt at all": ({"prompts": " \n# only this"}, "no prompts"),
        "no text encoder": ({"prompts": "one"}, "no CLIP is connected"),
        "another text encoder": ({"prompts": "one", "clip": TextEncoder(768), "save_as": "wide"}, "4096"),
        "a preview that is not there": ({"prompts": "one", "clip": TextEncoder(), "preview": 2}, "preview is 2"),
        "a bank that is gone": ({"bank": "gone.safetensors"}, "not a WanLite prompt bank"),
        "a hostile name": ({"prompts": "one", "clip": TextEncoder(), "save_as": "../up"}, "cannot be a bank's name"),
    }


@pytest.mark.parametrize("what", bad_inputs())
def test_wrong_inputs_get_a_sentence_and_change_nothing(what, comfyui, node, refused):
    given, words = bad_inputs()[what]
    before = tree(comfyui.base)
    with refused(words):
        call(node, **given)
    assert tree(comfyui.base) == before
