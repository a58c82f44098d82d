"""The student: its constructor's two forms, and a forward that depends on everything it should."""
import logging

import pytest
import torch
from helpers_tiny import random_wan

from wanlite_model.config import WANLITE_FIELDS, WanConfig
from wanlite_model.errors import WanLiteError
from wanlite_model.transformer import WanLiteStudent

OLD = {"model_type": "WanLiteStudent", "hidden_size": 1000, "depth": 2, "num_heads": 16, "num_channels": 4, "image_size": 256, "patch_size": 16,
       "text_max_length": 77, "text_encoder_output_dim": 1024, "projection_factor": 2.0}


def inputs(batch=2, frames=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    context = torch.zeros(batch, 512, 4096)
    context[:, :5] = torch.randn(batch, 5, 4096, generator=g)
    return torch.randn(batch, 16, frames, 4, 6, generator=g), torch.tensor([900.5, 120.25])[:batch], context


def test_the_answer_changes_with_the_latent_with_sigma_and_with_the_context():
    student, (x, t, context) = random_wan(), inputs()
    with torch.no_grad():
        base = student(x, t, context)
        changed = {"latent": student(x + 0.1, t, context), "sigma": student(x, t - 50, context), "context": student(x, t, context * 1.5)}
    for name, other in changed.items():
        assert (other - base).abs().max() > 1e-3 * base.abs().max(), name


def test_padding_of_the_text_is_attended_to_as_512_rows_of_zeros():
    """The folded padding against the plain computation, row by row."""
    student, (x, t, context) = random_wan(depth=2), inputs()
    rows = student.text_embedding(context)
    with torch.no_grad():
        folded = student(x, t, context)
        student._text = lambda _: (rows, None)
        plain = student(x, t, context)
    assert (folded - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_a_context_cut_to_its_prompt_gives_the_same_answer_and_other_lengths_do_not():
    student, (x, t, context) = random_wan(), inputs()
    with torch.no_grad():
        whole = student(x, t, context)
        torch.testing.assert_close(student(x, t, context[:, :5]), whole)
        assert (student(x, t, context[:, :4]) - whole).abs().max() > 1e-3 * whole.abs().max()


def test_one_timestep_a_sample_equals_the_same_timestep_for_each_frame_and_frames_may_differ():
    student, (x, t, context) = random_wan(), inputs()
    each = t.unsqueeze(1).expand(2, 3).clone()
    with torch.no_grad():
        torch.testing.assert_close(student(x, each, context), student(x, t, context))
        first_clean = each.clone()
        first_clean[:, 0] = 0
        assert not torch.allclose(student(x, first_clean, context), student(x, t, context), atol=1e-3)


def test_features_are_what_each_block_hands_on():
    student, (x, t, context) = random_wan(depth=3), inputs()
    seen = {}
    for i, block in enumerate(student.blocks):
        block.register_forward_hook(lambda _, given, answered, i=i: seen.update({i: answered}))
    with torch.no_grad():
        velocity, features = student(x, t, context, return_features=True)
        _, one = student(x, t, context, return_features=[1])
        torch.testing.assert_close(velocity, student(x, t, context))
    assert set(features) == {0, 1, 2} and set(one) == {1}
    assert features[1].shape == (2, 3 * 2 * 3, 128)
    assert all(torch.equal(features[i], seen[i]) for i in features)


def test_a_skipped_block_is_the_identity():
    student, (x, t, context) = random_wan(depth=3), inputs()
    without = random_wan(depth=2)
    state = {name: value for name, value in student.state_dict().items() if not name.startswith("blocks.1.")}
    without.load_state_dict({name.replace("blocks.2.", "blocks.1."): value for name, value in state.items()})
    with torch.no_grad():
        assert torch.equal(student(x, t, context, skip_blocks=[1]), without(x, t, context))


def test_gradient_checkpointing_changes_memory_and_not_the_gradients():
    def gradients(checkpointing):
        student, (x, t, context) = random_wan(depth=4), inputs()
        kept = []
        if checkpointing:
            student.enable_gradient_checkpointing()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
            student(x, t, context).square().mean().backward()
        return sum(kept), [parameter.grad for parameter in student.parameters()]

    (plain_bytes, plain), (few_bytes, recomputed) = gradients(False), gradients(True)
    assert few_bytes < plain_bytes / 2
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, recomputed))


def test_the_time_path_stays_in_fp32_in_a_half_precision_student():
    """Near t = 1000 bf16 numbers are 4 apart; the answer must still tell 998 from 999."""
    student, (x, t, context) = random_wan().to(torch.bfloat16), inputs(1)
    with torch.no_grad():
        at = [student(x, torch.tensor([value]), context) for value in (998.0, 999.0)]
    assert at[0].dtype == torch.float32 and not torch.equal(*at)


def test_every_weight_gets_a_gradient():
    student, (x, t, context) = random_wan(depth=2), inputs()
    student(x, t, context).square().mean().backward()
    # A key's bias moves all logits of a query alike, but WAN normalises keys after it, so even that one counts.
    silent = [name for name, parameter in student.named_parameters() if parameter.grad is None or not parameter.grad.abs().max() > 0]
    assert silent == []


def test_the_keyword_form_keeps_all_ten_fields_and_no_legacy_argument():
    student = WanLiteStudent(hidden_size=128, depth=2, use_gradient_checkpointing=True, device="cpu")
    assert set(WANLITE_FIELDS) <= set(student.config)
    assert not {"teacher_checkpoint_path", "device", "distributed", "use_gradient_checkpointing"} & set(student.config)
    assert student.gradient_checkpointing
    assert student.wan == WanConfig(dim=128, ffn_dim=512, num_layers=2)


@pytest.mark.parametrize(("fields", "told"), [
    ({"hidden_size": 1000}, "Set it to 896 or 1024"), ({"hidden_size": 1024, "num_heads": 16}, "Set num_heads to 8"),
    ({"num_channels": 4}, "Set num_channels to 16"), ({"patch_size": 16}, "patch is"), ({"text_max_length": 77}, "512"),
    ({"text_encoder_output_dim": 1024}, "4096"), ({"projection_factor": 2.0}, "no projection"), ({"depth": 0}, "num_layers is 0"),
    ({"model_type": "WanLiteStudent"}, "t2v"), ({"ffn_dim": 0}, "ffn_dim is 0"),
])
def test_the_keyword_form_refuses_what_no_reader_of_wan_honours(fields, told):
    with pytest.raises(WanLiteError, match=told.replace("(", r"\(")):
        WanLiteStudent(**{"hidden_size": 128, "depth": 1, **fields})


def test_the_dict_form_translates_and_warns_field_by_field(caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        student = WanLiteStudent(dict(OLD), tmp_path / "nowhere.safetensors", "cpu", True, True)
    assert student.wan == WanConfig(dim=1024, ffn_dim=4096, num_layers=2)
    assert student.gradient_checkpointing and student.config["image_size"] == 256
    told = [record.message for record in caplog.records]
    for field in ("model_type", "hidden_size", "num_heads", "num_channels", "patch_size", "text_max_length", "text_encoder_output_dim",
                  "projection_factor", "teacher_checkpoint_path", "distributed"):
        assert sum(field + "=" in line or line.startswith(f"WanLiteStudent: {field}") for line in told) == 1, field
    assert student.legacy["hidden_size"] == 1000 and "image_size" not in student.legacy
    assert list(tmp_path.iterdir()) == []       # building one reads and writes no file


def test_a_dict_without_a_width_is_translated_too_and_surplus_arguments_are_refused(caplog):
    with caplog.at_level(logging.WARNING), torch.device("meta"):
        assert WanLiteStudent({"num_heads": 16, "depth": 1}).wan.num_heads == 12
    with pytest.raises(WanLiteError, match="5 more arguments"):
        WanLiteStudent({"depth": 1}, None, None, False, False, True)


def test_a_pickle_is_never_written(tmp_path):
    with pytest.raises(WanLiteError, match="safetensors only"):
        random_wan(depth=1).save_pretrained(tmp_path / "student", safe_serialization=False)
    random_wan(depth=1).save_pretrained(tmp_path / "student", safe_serialization=True)
    assert (tmp_path / "student" / "diffusion_model.safetensors").exists()


def test_a_file_of_mixed_dtypes_opens_in_one_and_computes(tmp_path):
    student, (x, t, context) = random_wan(depth=2), inputs()
    with torch.no_grad():
        expected = student(x, t, context)
    state = {name: value.to(torch.bfloat16) if ".weight" in name and value.ndim == 2 else value for name, value in student.state_dict().items()}
    from safetensors.torch import save_file
    save_file(state, tmp_path / "mixed.safetensors")
    with torch.no_grad():
        found = WanLiteStudent.from_pretrained(tmp_path / "mixed.safetensors")(x, t, context)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_dict_that_a_wan_can_honour_is_taken_without_a_word(caplog):
    with caplog.at_level(logging.WARNING):
        student = WanLiteStudent({"model_type": "t2v", "hidden_size": 256, "depth": 1, "num_heads": 2})
    assert not caplog.records and student.legacy == {} and student.wan.num_heads == 2


@pytest.mark.parametrize(("change", "told"), [
    ({"x": torch.zeros(2, 4, 3, 4, 6)}, "takes"), ({"x": torch.zeros(2, 16, 3, 5, 6)}, "even"), ({"t": torch.zeros(3)}, "timestep"),
    ({"context": torch.zeros(2, 512, 1024)}, "umt5"), ({"context": torch.zeros(2, 513, 4096)}, "512"),
])
def test_shapes_that_no_wan_takes_are_refused_in_words(change, told):
    x, t, context = inputs()
    given = {"x": x, "t": t, "context": context, **change}
    with pytest.raises(WanLiteError, match=told):
        random_wan(depth=1)(*given.values())


def test_the_image_branch_reads_the_picture_and_without_one_the_text():
    """The second in ComfyUI's way, row by row here; tests/in_process/test_variants.py compares with ComfyUI itself."""
    student = random_wan(depth=1, model_type="i2v", in_dim=36, image_dim=1280)
    _, t, context = inputs()
    x, clip = torch.randn(2, 36, 3, 4, 6), torch.randn(2, 257, 1280)
    with torch.no_grad():
        seen, unseen = student(x, t, context, clip), student(x, t, context)
        assert not torch.allclose(seen, student(x, t, context, clip.flip(-1)), atol=1e-4)
        student.img_emb.forward = lambda _: student.text_embedding(context)
        torch.testing.assert_close(unseen, student(x, t, context, clip), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(unseen, seen, atol=1e-2)


def test_one_picture_of_a_first_and_last_frame_wan_has_the_places_of_the_first():
    """Also in a batch of two, which is no pair of pictures."""
    student = random_wan(depth=1, model_type="flf2v", in_dim=36, image_dim=1280)
    clip = torch.randn(2, 514, 1280)
    with torch.no_grad():
        both, first = student.img_emb(clip), student.img_emb(clip[:, :257])
    torch.testing.assert_close(first, both[:, :257])


@pytest.mark.parametrize(("kind", "shape", "told"), [
    ({}, (2, 257, 1280), "no image branch"),
    ({"model_type": "i2v", "in_dim": 36, "image_dim": 1280}, (2, 257, 1024), "257 for each picture"),
    ({"model_type": "i2v", "in_dim": 36, "image_dim": 1280}, (1, 257, 1280), r"takes \[2, "),
    ({"model_type": "flf2v", "in_dim": 36, "image_dim": 1280}, (2, 771, 1280), "257 for each picture"),
])
def test_clip_tokens_that_a_wan_cannot_read_are_refused_in_words(kind, shape, told):
    student, (_, t, context) = random_wan(depth=1, **kind), inputs()
    with pytest.raises(WanLiteError, match=told):
        student(torch.randn(2, student.wan.in_dim, 3, 4, 6), t, context, torch.randn(shape))
