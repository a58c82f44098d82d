"""One saved folder, four readers who never heard of each other: the same velocity from ComfyUI, Wan-Video, diffusers and WanLite."""
import pytest
import torch
from helpers_bridge import relative
from helpers_tiny import random_wan
from helpers_variants import given
from helpers_wan_video import wan_video

from wanlite_model.formats.read import open_wan
from wanlite_model.formats.write import write_student
from wanlite_model.transformer import WanLiteStudent

SHAPES = {
    "one head, three blocks, five frames": (dict(hidden_size=128, depth=3, ffn_dim=512), (5, 8, 12)),
    "two heads, odd ffn, one frame": (dict(hidden_size=256, depth=2, ffn_dim=301), (1, 6, 4)),
    "three heads, four blocks, three frames": (dict(hidden_size=384, depth=4), (3, 4, 10)),
}


def inputs(*size):
    asked = given(16, 0, size)
    return asked.x, asked.t, asked.context


def by_comfyui(folder, x, t, context):
    import comfy.sd
    model = comfy.sd.load_diffusion_model(str(folder / "diffusion_model.safetensors"), model_options={"dtype": torch.float32})
    return model.model.diffusion_model(x, t, context)


def by_diffusers(folder, x, t, context):
    from diffusers import WanTransformer3DModel
    model = WanTransformer3DModel.from_single_file(str(folder / "diffusion_model.safetensors"), config=str(folder), torch_dtype=torch.float32)
    return model.eval()(x, t, context, return_dict=False)[0]


def by_wan_video(folder, x, t, context):
    model = wan_video().WanModel.from_pretrained(str(folder)).eval()
    tokens = x.shape[2] * x.shape[3] * x.shape[4] // 4
    each = t.unsqueeze(1).expand(-1, tokens)
    return torch.stack([model([x[i]], each[i:i + 1], [context[i]], tokens)[0] for i in range(len(x))])


def by_wanlite(folder, x, t, context):
    return WanLiteStudent.from_pretrained(folder)(x, t, context)


@pytest.fixture(scope="module", params=SHAPES)
def saved(request, tmp_path_factory):
    """A folder, the inputs, and the velocity of the module that was saved."""
    fields, size = SHAPES[request.param]
    student = random_wan(seed=5, **fields)
    folder = student.save_pretrained(tmp_path_factory.mktemp("models") / "diffusion_models" / "cats").path
    with torch.no_grad():
        velocity = student(*inputs(*size))
    assert velocity.abs().max() > 0.1 and velocity.std() > 0.01
    return folder, inputs(*size), velocity


@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported")      # Wan-Video names autocast's device
@pytest.mark.parametrize("reader", [by_comfyui, by_diffusers, by_wan_video, by_wanlite])
def test_the_folder_gives_the_same_velocity(comfyui, saved, reader):
    folder, given, velocity = saved
    with torch.no_grad():
        assert relative(reader(folder, *given), velocity) <= 1e-5


def test_the_stock_node_lists_and_opens_a_single_file(comfyui):
    """Through ComfyUI's own folder list, as a user does, with tensors of two dtypes and an odd width in it."""
    student = random_wan(depth=2, ffn_dim=301)
    for name, parameter in student.named_parameters():
        if "norm" not in name and "modulation" not in name:
            parameter.data = parameter.data.bfloat16()
    path = comfyui.base / "models" / "diffusion_models" / "two dtypes.safetensors"
    write_student(path, config=student.wan, tensors=student.state_dict().items(), layout="single file")
    assert "two dtypes.safetensors" in comfyui.nodes.UNETLoader.INPUT_TYPES()["required"]["unet_name"][0]
    model = comfyui.nodes.UNETLoader().load_unet("two dtypes.safetensors", "default")[0].model.diffusion_model
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name].float(), tensor.float(), rtol=0, atol=0 if tensor.dtype == torch.bfloat16 else 0.01)
    path.unlink()


def test_a_sharded_diffusers_folder_is_read_as_the_wan_it_is(comfyui, saved, tmp_path):
    from diffusers import WanTransformer3DModel
    folder, given, velocity = saved
    model = WanTransformer3DModel.from_single_file(str(folder / "diffusion_model.safetensors"), config=str(folder), torch_dtype=torch.float32)
    model.save_pretrained(tmp_path / "diffusers", max_shard_size="4MB")
    assert len(list((tmp_path / "diffusers").glob("*.safetensors"))) > 1
    with open_wan(folder) as ours, open_wan(tmp_path / "diffusers") as theirs:
        assert theirs.config == ours.config
        assert set(theirs.names()) == set(ours.names())
        for name, tensor in theirs.tensors():
            assert torch.equal(tensor, ours.tensor(name)), name
    with torch.no_grad():
        assert relative(WanLiteStudent.from_pretrained(tmp_path / "diffusers")(*given), velocity) <= 1e-5


def test_wan_videos_own_folder_is_read(saved, tmp_path):
    folder, given, velocity = saved
    wan_video().WanModel.from_pretrained(str(folder)).save_pretrained(tmp_path / "wan", max_shard_size="4MB")
    with torch.no_grad():
        assert relative(WanLiteStudent.from_pretrained(tmp_path / "wan")(*given), velocity) <= 1e-5
