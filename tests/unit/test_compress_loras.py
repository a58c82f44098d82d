"""LoRAs of the teacher on a student with other blocks: the numbers are those of a teacher that was patched before it was cut."""
import json

import pytest
import torch
from helpers_compress import result_of
from helpers_tiny import random_wan
from safetensors.torch import load_file, save_file

from wanlite_model.compress.apply import start_student
from wanlite_model.compress.ffn import FfnCut
from wanlite_model.compress.handle import StudentHandle
from wanlite_model.compress.loras import Taken, check_student, describe, read_teacher_lora, save_remapped, write_remapped
from wanlite_model.compress.plan import CompressionPlan
from wanlite_model.config import WanConfig
from wanlite_model.errors import WanLiteError
from wanlite_model.formats.card import StudentCard
from wanlite_model.formats.container import read_header
from wanlite_model.formats.keymap import wan_shapes
from wanlite_model.formats.lora import read_lora
from wanlite_model.formats.lora_parts import delta, energy
from wanlite_model.formats.neurons import to_mask

TEACHER = WanConfig(dim=128, ffn_dim=64, num_layers=6)
KEEP, NEURONS = (0, 2, 5), {0: range(0, 40), 2: range(10, 50), 5: range(24, 64)}
LAYERS = ("self_attn.q", "cross_attn.o", "ffn.0", "ffn.2")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def student(keep=KEEP, ffn_dim=64, noted=True, **card):
    """A student by its handle; what is read of its weights is their names and shapes."""
    masks = tuple(to_mask(NEURONS[block], 64) for block in keep) if ffn_dim < 64 and noted else ()
    plan = CompressionPlan(keep=keep, ffn_dim=ffn_dim, method="given", teacher_layers=6, teacher_ffn_dim=64, ffn_kept=masks)
    return StudentHandle(folder="", config=plan.student_config(TEACHER), plan=plan, fingerprint="5d", card=StudentCard(teacher_fingerprint="7e", **card))


def factors(layer, shape, rank=3, seed=0):
    parts = {"lora_down.weight": rand(rank, shape[1], seed=seed), "lora_up.weight": rand(shape[0], rank, seed=seed), "alpha": torch.tensor(1.5)}
    return {f"diffusion_model.{layer}.{part}": tensor for part, tensor in parts.items()}


def whole_lora():
    """Factors on every block, biases of the FFN, norms, and the head."""
    shapes, found = wan_shapes(TEACHER), {}
    for i, layer in enumerate(f"blocks.{block}.{leaf}" for block in range(6) for leaf in LAYERS):
        found |= factors(layer, shapes[f"{layer}.weight"], seed=i)
        found[f"diffusion_model.{layer}.diff_b"] = rand(shapes[f"{layer}.bias"][0], seed=i)
    for block in range(6):
        found[f"diffusion_model.blocks.{block}.norm3.diff"] = rand(128, seed=block)
    return found | factors("head.head", shapes["head.head.weight"])


def remapped(tmp_path, tensors, to, metadata=None):
    """(what was written, what survived)"""
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    survived = write_remapped(tmp_path / "ours.safetensors", read_teacher_lora(tmp_path / "theirs.safetensors", to), to)
    return tmp_path / "ours.safetensors", survived


@pytest.mark.parametrize("ffn_dim", [64, 40])
def test_it_changes_the_student_as_it_changed_the_teacher_before_the_cut(tmp_path, ffn_dim):
    to, teacher = student(ffn_dim=ffn_dim), random_wan(depth=6, ffn_dim=64)
    ours, survived = remapped(tmp_path, whole_lora(), to)
    weights = {name: tensor.detach() for name, tensor in teacher.state_dict().items()}
    patched = dict(read_lora(tmp_path / "theirs.safetensors", TEACHER).merged(weights.items()))

    def cut(tensors):
        cuts = {block: FfnCut(kept=torch.tensor(kept), weight=tensors[f"blocks.{block}.ffn.2.weight"][:, list(kept)],
                              bias=tensors[f"blocks.{block}.ffn.2.bias"]) for block, kept in NEURONS.items()}
        return dict(start_student(tensors.items(), to.plan, cuts))

    plain, expected = cut(weights), cut(patched)
    laid_over = dict(read_lora(ours, to.config).merged(plain.items()))
    assert laid_over.keys() == expected.keys() and (survived.kept, survived.layers) == (3 * 5 + 1, 6 * 5 + 1)
    assert sum(not torch.equal(tensor, plain[name]) for name, tensor in expected.items()) == 3 * (4 + 4 + 1) + 1        # weights, biases, a norm; the head
    for name, tensor in expected.items():
        assert torch.equal(laid_over[name], tensor) if ffn_dim == 64 else torch.allclose(laid_over[name], tensor, atol=1e-5), name


SPELLINGS = {
    "stock": "diffusion_model.blocks.{i}.cross_attn.q.lora_A.weight diffusion_model.blocks.{i}.cross_attn.q.lora_B.weight",
    "kohya": "lora_unet_blocks_{i}_cross_attn_q.lora_down.weight lora_unet_blocks_{i}_cross_attn_q.lora_up.weight",
    "Wan Fun": "lora_unet__blocks_{i}_cross_attn_q.lora_down.weight lora_unet__blocks_{i}_cross_attn_q.lora_up.weight",
    "diffusers": "transformer.blocks.{i}.attn2.to_q.lora_A.weight transformer.blocks.{i}.attn2.to_q.lora_B.weight",
    "peft": "base_model.model.blocks.{i}.cross_attn.q.lora_A.default.weight base_model.model.blocks.{i}.cross_attn.q.lora_B.default.weight",
    "peft in diffusers": "transformer.base_model.model.blocks.{i}.attn2.to_q.lora_A.weight transformer.base_model.model.blocks.{i}.attn2.to_q.lora_B.weight",
    "OneTrainer": "lora_transformer_blocks_{i}_attn2_to_q.lora_down.weight lora_transformer_blocks_{i}_attn2_to_q.lora_up.weight",
    "bare": "blocks.{i}.cross_attn.q.lora_A blocks.{i}.cross_attn.q.lora_B",
    "old diffusers": "blocks.{i}.attn2.to_q.lora.down.weight blocks.{i}.attn2.to_q.lora.up.weight",
}


@pytest.mark.parametrize("how", SPELLINGS)
def test_every_spelling_is_moved_to_the_stock_one(tmp_path, how):
    tensors = {}
    for i in range(6):
        down, up = SPELLINGS[how].format(i=i).split()
        tensors |= {down: torch.full((2, 128), float(i)), up: torch.ones(128, 2)}
    written = load_file(remapped(tmp_path, tensors, student())[0])
    keys = [f"diffusion_model.blocks.{i}.cross_attn.q.lora_{part}.weight" for i in range(3) for part in "AB"]
    assert sorted(written) == keys and [float(written[key].mean()) for key in keys[::2]] == [0.0, 2.0, 5.0]


# {kind: the parts of its change of a layer [out, in]}; those whose effect depends on the weights under them have no strength of their own.
KINDS = {
    "LoHa": lambda out, into: {"hada_w1_a": rand(out, 2), "hada_w1_b": rand(2, into), "hada_w2_a": rand(out, 2, seed=1),
                               "hada_w2_b": rand(2, into, seed=1), "alpha": torch.tensor(4.0)},
    "LoKr": lambda out, into: {"lokr_w1": rand(8, 4), "lokr_w2_a": rand(out // 8, 2), "lokr_w2_b": rand(2, into // 4), "alpha": torch.tensor(3.0)},
    "whole LoKr": lambda out, into: {"lokr_w1": rand(8, 4), "lokr_w2": rand(out // 8, into // 4), "alpha": torch.tensor(3.0)},
    "diff": lambda out, into: {"diff": rand(out, into)},
    "DoRA": lambda out, into: {"lora_A.weight": rand(2, into), "lora_B.weight": rand(out, 2), "dora_scale": rand(out, 1)},
    "GLoRA": lambda out, into: {"a1.weight": rand(into, 2), "a2.weight": rand(2, into), "b1.weight": rand(out, 2), "b2.weight": rand(2, into)},
    "OFT": lambda out, into: {"oft_blocks": rand(out // 8, 8, 8), "alpha": torch.tensor(1.0)},
    "BOFT": lambda out, into: {"oft_blocks": rand(3, out // 8, 8, 8), "rescale": rand(out, 1), "alpha": torch.tensor(1.0)},
    "a set weight": lambda out, into: {"set_weight": rand(out, into)},
}


def named(kind, *layers):
    shapes = wan_shapes(TEACHER)
    return {f"diffusion_model.{layer}.{part}": tensor for layer in layers for part, tensor in KINDS[kind](*shapes[f"{layer}.weight"]).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_change_moves_with_its_block(tmp_path, kind):
    tensors = named(kind, "blocks.1.self_attn.k", "blocks.2.self_attn.k", "blocks.5.ffn.0")
    file, survived = remapped(tmp_path, tensors, student())
    written, where = load_file(file), {"blocks.1.self_attn.k": "blocks.2.self_attn.k", "blocks.2.ffn.0": "blocks.5.ffn.0"}
    assert len(written) * 3 == len(tensors) * 2 and (survived.kept, survived.gone) == (2, (1,))
    for key, tensor in written.items():
        ours = next(layer for layer in where if layer in key)
        assert torch.equal(tensor, tensors[key.replace(ours, where[ours])])
    assert (survived.strength is None) == (kind in ("DoRA", "GLoRA", "OFT", "BOFT", "a set weight"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_narrowed_is_and_the_rest_is_left_out_and_counted(tmp_path, kind):
    tensors = named(kind, "blocks.2.ffn.0", "blocks.2.ffn.2", "blocks.0.self_attn.q")
    file, survived = remapped(tmp_path, tensors, student(ffn_dim=40))
    parts = {layer: {key.removeprefix(f"diffusion_model.{layer}."): tensor for key, tensor in load_file(file).items() if layer in key}
             for layer in ("blocks.1.ffn.0", "blocks.1.ffn.2", "blocks.0.self_attn.q")}
    assert parts["blocks.0.self_attn.q"]
    if kind not in ("LoHa", "diff", "a set weight"):
        assert not parts["blocks.1.ffn.0"] and not parts["blocks.1.ffn.2"] and sum(survived.uncut.values()) == 2
        return
    kept = list(NEURONS[2])
    for layer, index in (("ffn.0", (kept, slice(None))), ("ffn.2", (slice(None), kept))):
        whole = KINDS[kind](*wan_shapes(TEACHER)[f"blocks.2.{layer}.weight"])
        if kind == "a set weight":
            assert torch.equal(parts[f"blocks.1.{layer}"]["set_weight"], whole["set_weight"][index])
        else:
            torch.testing.assert_close(delta(parts[f"blocks.1.{layer}"]), delta(whole)[index])
    assert survived.narrowed == 2 and not survived.uncut


def test_a_note_without_effect_that_is_not_passed_on_is_no_loss(tmp_path):
    tensors = {**named("diff", "blocks.2.ffn.0"), "diffusion_model.blocks.2.ffn.0.alpha": torch.tensor(4.0)}
    file, survived = remapped(tmp_path, tensors, student(ffn_dim=40))
    assert [value.shape[0] for value in load_file(file).values()] == [40] and (survived.narrowed, survived.uncut) == (1, {})


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "whole LoKr", "diff"])
def test_the_energy_is_that_of_the_matrix_it_stands_for(kind):
    change = {**KINDS[kind](64, 128), "diff_b": rand(64)}
    assert energy(change) == pytest.approx(float(delta(change).square().sum() + change["diff_b"].square().sum()), rel=1e-5)
    lora = {"up": rand(64, 3), "down": rand(3, 128), "alpha": torch.tensor(6.0)}
    assert energy(lora) == pytest.approx(float((2 * lora["up"] @ lora["down"]).square().sum()), rel=1e-5)


def test_the_report_says_how_much_survived(tmp_path):
    """Ten layers: seven of strength 1, and three, in blocks that are gone, of strengths 4, 9 and 16: 7 of 36 is 19%."""
    tensors = {}
    for block, leaf, size in [(0, "self_attn.q", 1), (0, "self_attn.k", 1), (0, "ffn.2", 1), (2, "self_attn.q", 1), (2, "cross_attn.q", 1),
                              (5, "self_attn.v", 1), (5, "ffn.0", 1), (1, "self_attn.q", 2), (3, "self_attn.q", 3), (4, "ffn.0", 4)]:
        rows, columns = wan_shapes(TEACHER)[f"blocks.{block}.{leaf}.weight"]
        up, down = torch.zeros(rows, 2), torch.zeros(2, columns)
        up[3, 0], down[0, 5] = size, 1.0
        tensors |= {f"diffusion_model.blocks.{block}.{leaf}.lora_A.weight": down, f"diffusion_model.blocks.{block}.{leaf}.lora_B.weight": up}
    tensors |= {"diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 128), "lora_te1_text_model.alpha": torch.tensor(1.0),
                "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": torch.ones(2, 128)}
    _, survived = remapped(tmp_path, tensors, student())
    assert (survived.kept, survived.layers, survived.gone) == (7, 10, (1, 3, 4)) and survived.strength == pytest.approx(7 / 36)
    told = describe(read_teacher_lora(tmp_path / "theirs.safetensors", student()), survived, student().plan)
    assert "7 of 10 layers of theirs.safetensors, 19% of its strength; gone: blocks 1,3-4." in told
    assert "1 of its tensors that change modulation" in told and "a text encoder" in told and "other kinds of WAN" in told


def test_neurons_that_are_gone_take_their_share_of_the_strength_with_them(tmp_path):
    tensors = {"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(64)}
    file, survived = remapped(tmp_path, tensors, student(ffn_dim=40))
    assert survived.strength == pytest.approx(40 / 64) and load_file(file)["diffusion_model.blocks.0.ffn.0.diff_b"].shape == (40,)


def test_a_lora_for_as_many_blocks_as_the_student_has_is_pointed_at(tmp_path):
    tensors = {key: tensor for key, tensor in whole_lora().items() if any(f"blocks.{i}." in key for i in range(3))}
    _, survived = remapped(tmp_path, tensors, student())
    assert "blocks 0-2, as many as the student has" in describe(read_teacher_lora(tmp_path / "theirs.safetensors", student()), survived, student().plan)


def test_nothing_private_of_the_original_is_passed_on(tmp_path):
    file, _ = remapped(tmp_path, whole_lora(), student(), {"ss_output_name": "me", "ss_dataset_dirs": "/home/me", "format": "pt"})
    metadata = read_header(file).metadata
    assert set(metadata) == {"format", "wanlite.remapped"}
    assert json.loads(metadata["wanlite.remapped"]) == {"student": "5d", "keep": [0, 2, 5], "teacher_layers": 6, "ffn_dim": 64, "teacher_ffn_dim": 64}


def test_eight_bits_become_sixteen_with_the_same_values(tmp_path):
    tensors = {key: tensor.to(torch.float8_e4m3fn) if "lora" in key else tensor for key, tensor in factors("blocks.5.self_attn.q", (128, 128)).items()}
    written = load_file(remapped(tmp_path, tensors, student())[0])["diffusion_model.blocks.2.self_attn.q.lora_A.weight"]
    assert written.dtype == torch.bfloat16 and torch.equal(written.float(), tensors["diffusion_model.blocks.5.self_attn.q.lora_down.weight"].float())


def card(**fields):
    return {"format": "pt", **StudentCard(**fields).to_metadata()}


@pytest.mark.parametrize("to, words", [(student(tuple(range(6))), "fit it as they are"),
                                       (student(ffn_dim=40, noted=False), "does not say which.*Create the student again")])
def test_a_student_that_needs_none_or_cannot_get_one_is_told_so(to, words):
    with pytest.raises(WanLiteError, match=words):
        check_student(to)
    check_student(student(ffn_dim=40))


REFUSED = {
    "another width": (factors("blocks.0.self_attn.q", (256, 256)), None, {}, r"by \[256, 256\].*has \[128, 128\] there"),
    "another kind's width": ({f"blocks.0.self_attn.q.{part}": tensor for part, tensor in KINDS["LoKr"](256, 256).items()}, None, {}, r"by \[256, 256\]"),
    "another model": ({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": rand(2, 4)}, None, {}, "which no WAN that WanLite knows has"),
    "VACE": ({"diffusion_model.vace_blocks.0.self_attn.q.lora_A.weight": rand(2, 128)}, None, {}, "vace_blocks.0.*which no WAN that WanLite knows has"),
    "a text encoder": ({"lora_te1_text_model_encoder.lora_down.weight": rand(2, 4)}, None, {}, "changes a text encoder only"),
    "modulation": ({"diffusion_model.blocks.0.diff_m": rand(1, 6, 128)}, None, {}, "which ComfyUI never applies"),
    "nothing": ({}, None, {}, "changes nothing"),
    "no rank": ({"blocks.0.self_attn.q.lora_A.weight": rand(0, 128), "blocks.0.self_attn.q.lora_B.weight": rand(128, 0)}, None, {}, "an empty change of blocks.0.self_attn.q"),
    "no alpha": ({**factors("blocks.0.self_attn.q", (128, 128)), "diffusion_model.blocks.0.self_attn.q.alpha": rand(3)}, None, {}, "whose alpha is no number"),
    "an endless key": ({"a." * 50_000 + "lora_A.weight": rand(2, 128)}, None, {}, "which no WAN that WanLite knows has"),
    "a deeper WAN": (factors("blocks.9.self_attn.q", (128, 128)), None, {}, "changes block 9.*blocks 0-5.*deeper WAN"),
    "a part": ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": rand(2, 128)}, None, {}, "only a part of its change of blocks.0.self_attn.q: down"),
    "parts that do not fit": ({"blocks.0.self_attn.q.lora_A.weight": rand(2, 128), "blocks.0.self_attn.q.lora_B.weight": rand(128, 3)}, None, {},
                              "parts that do not fit each other"),
    "twice the same": (factors("blocks.0.self_attn.q", (128, 128)) | {"lora_unet_blocks_0_self_attn_q.lora_down.weight": rand(3, 128)}, None, {}, "twice"),
    "moved already": (factors("blocks.0.self_attn.q", (128, 128)), {"wanlite.remapped": '{"student": "00"}'}, {}, "moved to a student's blocks already"),
    "trained on a student": (factors("blocks.0.self_attn.q", (128, 128)), card(keep=KEEP, ffn_dim=64), {}, "trained by WanLite on a WAN of 3 blocks"),
    "the student's own FFN": (factors("blocks.0.ffn.0", (40, 128)), None, {"ffn_dim": 40}, "the student itself has what it was made for.*own LoRA loader"),
    "only what is gone": (factors("blocks.1.self_attn.q", (128, 128)), None, {}, "nothing is left.*block 1 of the teacher"),
    "only what cannot be narrowed": (named("OFT", "blocks.0.ffn.0"), None, {"ffn_dim": 40}, "nothing is left"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_lora_for_the_teacher_gets_a_sentence(tmp_path, what):
    tensors, metadata, fields, words = REFUSED[what]
    with pytest.raises(WanLiteError, match=words):
        remapped(tmp_path, tensors, student(**fields), metadata)
    assert not (tmp_path / "ours.safetensors").exists()


def test_what_was_moved_to_the_student_that_this_one_was_cut_from_is_moved_on(tmp_path):
    _, survived = remapped(tmp_path, whole_lora(), student(), {"wanlite.remapped": '{"student": "7e"}'})
    assert survived.kept == 16


def save(tmp_path, to, overwrite=False, verify=lambda file, lora: Taken(tensors=1)):
    found = {f"{name}-new.safetensors": read_teacher_lora(tmp_path / f"{name}.safetensors", to) for name in ("a", "b")}
    return result_of(save_remapped(found, to, tmp_path / "loras", verify=verify, overwrite=overwrite))


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_many_are_saved_all_or_none(tmp_path):
    save_file(whole_lora(), tmp_path / "a.safetensors")
    save_file(factors("blocks.1.self_attn.q", (128, 128)), tmp_path / "b.safetensors")
    with pytest.raises(WanLiteError, match="Of b.safetensors nothing is left"):
        save(tmp_path, student())
    assert not (tmp_path / "loras").exists()
    save_file(factors("blocks.2.self_attn.q", (128, 128)), tmp_path / "b.safetensors")
    before = tree(tmp_path)

    def refusing(file, lora):
        if lora.path.name == "b.safetensors":
            raise WanLiteError("The loader did not take it.")
        return Taken(tensors=len(load_file(file)))

    with pytest.raises(WanLiteError, match="did not take it"):
        save(tmp_path, student(), verify=refusing)
    assert tree(tmp_path) == before
    report = save(tmp_path, student())
    assert report.count("\n") == 1 and "1 of 1 layers of b.safetensors, 100% of its strength" in report
    assert set(tree(tmp_path)) - set(before) == {"loras/a-new.safetensors", "loras/b-new.safetensors"}


def test_a_taken_name_is_kept_unless_overwrite_is_on(tmp_path):
    for name in "ab":
        save_file(whole_lora(), tmp_path / f"{name}.safetensors")
    save(tmp_path, student())
    before = tree(tmp_path)
    with pytest.raises(WanLiteError, match="already there"):
        save(tmp_path, student((0, 1, 2)))
    assert tree(tmp_path) == before
    save(tmp_path, student((0, 1, 2)), overwrite=True)
    assert tree(tmp_path).keys() == before.keys() and tree(tmp_path) != before
    save_file({"a": torch.zeros(1)}, tmp_path / "loras/b-new.safetensors")
    with pytest.raises(WanLiteError, match="WanLite did not write it"):
        save(tmp_path, student(), overwrite=True)
