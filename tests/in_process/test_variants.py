"""Every kind of WAN, in each reader that takes it: the released sizes tensor for tensor, the same velocity, and who does not take what."""
import pytest
import torch
from helpers_bridge import relative
from helpers_tiny import random_wan
from helpers_variants import PICTURES, RELEASED, TINY, given
from helpers_wan_video import ask_wan_video, wan_video

from wanlite_model.formats.keymap import IMAGE_ROWS, key_map, rows_of, wan_shapes
from wanlite_model.transformer import WanLiteStudent

WAN_VIDEO = ("t2v", "i2v 2.2", "ti2v")          # what Wan 2.2's own class takes: it has no CLIP branch


def shapes_of(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def in_comfyui(shapes):
    """The model that ComfyUI makes for a file of these tensors, without memory."""
    import comfy.model_detection
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return comfy.model_detection.model_config_from_unet(state, "").get_model(state, "", device="meta")


@pytest.mark.parametrize(("name", "tensors", "numbers", "kind", "pictures", "latents"), [
    ("t2v 1.3B", 825, 1_418_996_800, "WAN21", False, "Wan21"),
    ("t2v 14B", 1095, 14_288_491_584, "WAN21", False, "Wan21"),
    ("i2v 2.1", 1303, 16_394_878_784, "WAN21", True, "Wan21"),
    ("flf2v", 1304, 16_395_536_704, "WAN21", True, "Wan21"),
    ("i2v 2.2", 1095, 14_288_901_184, "WAN21", False, "Wan21"),
    ("ti2v 5B", 825, 4_999_787_712, "WAN22", True, "Wan22"),
])
def test_the_released_sizes_are_comfyuis_own_tensor_for_tensor(comfyui, name, tensors, numbers, kind, pictures, latents):
    """What detection derives from our names and shapes is a model of exactly these, of the kind it should be, and so is our module."""
    shapes = wan_shapes(RELEASED[name])
    model = in_comfyui(shapes)
    assert shapes_of(model.diffusion_model) == shapes == shapes_of(WanLiteStudent.from_wan(RELEASED[name], device="meta"))
    assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes.values())) == (tensors, numbers)
    assert (type(model).__name__, model.image_to_video, type(model.latent_format).__name__) == (kind, pictures, latents)


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_sizes_are_diffusers_own_tensor_for_tensor(name):
    from diffusers import WanTransformer3DModel
    config = RELEASED[name]
    with torch.device("meta"):
        model = WanTransformer3DModel(**config.to_diffusers())
    names = key_map("wan", "diffusers", config.num_layers, rows_of(config))
    assert {names[name]: shape for name, shape in wan_shapes(config).items()} == shapes_of(model)


@pytest.mark.parametrize("name", ["t2v 14B", "i2v 2.2", "ti2v 5B"])
def test_the_released_sizes_are_wan_videos_own_tensor_for_tensor(name):
    with torch.device("meta"):
        model = wan_video().WanModel(**{key: value for key, value in RELEASED[name].to_wan().items() if key != "_class_name"})
    assert shapes_of(model) == wan_shapes(RELEASED[name])


def by_comfyui(folder, asked):
    import comfy.sd
    model = comfy.sd.load_diffusion_model(str(folder / "diffusion_model.safetensors"), model_options={"dtype": torch.float32})
    return model.model.diffusion_model(asked.x, asked.t, asked.context, clip_fea=asked.clip)


def opened_by_diffusers(folder):
    from diffusers import WanTransformer3DModel
    return WanTransformer3DModel.from_single_file(str(folder / "diffusion_model.safetensors"), config=str(folder), torch_dtype=torch.float32).eval()


def by_diffusers(folder, asked):
    """It takes the first 512 tokens from the end as text and all before as the picture's, and a timestep for each token."""
    t = asked.t if asked.t.ndim == 1 else asked.per_token
    return opened_by_diffusers(folder)(asked.x, t, asked.context, asked.clip, return_dict=False)[0]


def by_wan_video(folder, asked):
    return ask_wan_video(wan_video().WanModel.from_pretrained(str(folder)).eval(), asked)


@pytest.fixture(scope="module", params=TINY)
def saved(request, tmp_path_factory):
    """(kind, a folder that save_pretrained wrote, the module that was saved)."""
    student = random_wan(seed=5, **TINY[request.param])
    return request.param, student.save_pretrained(tmp_path_factory.mktemp("models") / "saved").path, student


def answer(student, asked):
    velocity = student(asked.x, asked.t, asked.context, asked.clip)
    assert velocity.abs().max() > 0.1 and velocity.std() > 0.01
    return velocity


@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported")      # Wan-Video names autocast's device
@pytest.mark.parametrize("first_clean", [False, True], ids=["one timestep", "the first frame's is 0"])
@pytest.mark.parametrize("frames", [1, 5])
def test_all_that_take_this_kind_compute_the_same_velocity(comfyui, saved, frames, first_clean):
    kind, folder, student = saved
    asked = given(student.wan.in_dim, PICTURES.get(kind, 0), (frames, 6, 10), first_clean)
    with torch.no_grad():
        velocity = answer(student, asked)
        assert relative(by_comfyui(folder, asked), velocity) <= 1e-5
        if kind != "flf2v":                     # see below
            assert relative(by_diffusers(folder, asked), velocity) <= 1e-5
        if kind in WAN_VIDEO:
            assert relative(by_wan_video(folder, asked), velocity) <= 1e-5


def test_a_saved_one_of_each_kind_is_read_back_as_it_was(saved):
    kind, folder, student = saved
    again, asked = WanLiteStudent.from_pretrained(folder), given(student.wan.in_dim, PICTURES.get(kind, 0))
    assert again.wan == student.wan
    with torch.no_grad():
        assert torch.equal(answer(again, asked), answer(student, asked))


@pytest.mark.parametrize(("saved", "pictures"), [("i2v 2.1", 0), ("flf2v", 0), ("flf2v", 1)], indirect=["saved"])
def test_without_a_picture_or_with_one_of_two_we_compute_what_comfyui_does(comfyui, saved, pictures):
    """None: it hands the text to the image branch. One of two, in a batch of two: places 0 to 256 for both."""
    kind, folder, student = saved
    asked = given(student.wan.in_dim, pictures)
    with torch.no_grad():
        velocity = answer(student, asked)
        assert relative(by_comfyui(folder, asked), velocity) <= 1e-5
        assert relative(answer(student, given(student.wan.in_dim, PICTURES[kind])), velocity) > 0.01


@pytest.mark.parametrize("saved", ["i2v 2.1"], indirect=True)
def test_without_a_picture_diffusers_asks_no_image_branch(saved):
    """Unlike ComfyUI, and so unlike us: its answer is that of values which are all 0."""
    _, folder, student = saved
    asked, silent = given(36), WanLiteStudent.from_pretrained(folder)
    for block in silent.blocks:
        torch.nn.init.zeros_(block.cross_attn.v_img.weight)
        torch.nn.init.zeros_(block.cross_attn.v_img.bias)
    with torch.no_grad():
        theirs = by_diffusers(folder, asked)
        assert relative(theirs, answer(silent, asked)) <= 1e-5
        assert relative(theirs, answer(student, asked)) > 0.01


@pytest.mark.parametrize("saved", ["flf2v"], indirect=True)
def test_diffusers_takes_a_first_and_last_frame_wan_in_its_own_names_only(saved):
    """from_single_file does not know the name of the places, and fails on what has no values then. Pictures come one by one."""
    from diffusers import WanTransformer3DModel
    _, folder, student = saved
    asked, names = given(36, pictures=2), key_map("wan", "diffusers", student.wan.num_layers, rows_of(student.wan))
    model = WanTransformer3DModel(**student.wan.to_diffusers()).eval()
    model.load_state_dict({names[name]: tensor for name, tensor in student.state_dict().items()})
    with pytest.raises(NotImplementedError, match="meta tensor"):
        opened_by_diffusers(folder)
    pictures = asked.clip.reshape(4, 257, 1280)
    with torch.no_grad():
        velocity = answer(student, asked)
        assert relative(model(asked.x, asked.t, asked.context, pictures, return_dict=False)[0], velocity) <= 1e-5


@pytest.mark.parametrize("saved", ["flf2v"], indirect=True)
def test_wan_2_2s_class_refuses_a_first_and_last_frame_wan(saved):
    with pytest.raises(AssertionError) as refused:
        wan_video().WanModel.from_pretrained(str(saved[1]))
    assert "model_type in" in str(refused.traceback[-1].statement)


@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported")
@pytest.mark.parametrize("saved", ["i2v 2.1"], indirect=True)
def test_wan_2_2s_class_opens_a_2_1_image_to_video_wan_without_its_image_branch(saved):
    """With a warning alone, and answers something else: not a reader of this kind."""
    _, folder, student = saved
    _, info = wan_video().WanModel.from_pretrained(str(folder), output_loading_info=True)
    assert set(info["unexpected_keys"]) == set(key_map("wan", "diffusers", student.wan.num_layers, IMAGE_ROWS)) and not info["missing_keys"]
    asked = given(36, pictures=1)
    with torch.no_grad():
        assert relative(by_wan_video(folder, asked), answer(student, asked)) > 0.01
