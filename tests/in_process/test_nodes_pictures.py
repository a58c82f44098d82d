"""Encode Prompts from a folder: captions, what image-to-video is shown, and clips to train on."""
import av
import numpy
import pytest
import torch
from helpers_bridge import TextEncoder, call, empty_latent
from PIL import Image

SIZE = (64, 48)                 # of the files; the LATENT's is another


@pytest.fixture
def node(pack):
    return pack("nodes.prompts").WanLiteEncodePrompts


@pytest.fixture
def folder(comfyui):
    """`folder(files)` fills a folder of ComfyUI's input folder: {name: text, picture [H, W, 3] or clip [F, H, W, 3] of bytes}."""
    place = comfyui.base / "input" / "mine"
    place.mkdir()

    def fill(files):
        for name, content in files.items():
            if isinstance(content, str):
                (place / name).write_text(content, encoding="utf-8")
            elif content.ndim == 3:
                Image.fromarray(content).save(place / name)
            else:
                write_clip(place / name, content)
        return "mine"
    yield fill
    for path in place.iterdir():
        path.unlink()
    place.rmdir()


def write_clip(path, frames, rate=32, times=None):
    """times: of each frame in thirty-seconds of a second; without them one after another."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)            # lossless
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "bgr0"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def picture(shade):
    return numpy.full((SIZE[1], SIZE[0], 3), shade, dtype="uint8")


def clip(frames=20):
    """At 32 frames a second, the k-th frame of shade 10 k."""
    return numpy.stack([picture(10 * k) for k in range(frames)])


def test_pictures_are_shown_as_wans_own_node_shows_them(folder, node, vae, pack):
    from comfy_extras.nodes_wan import WanImageToVideo
    name = folder({"a.png": picture(200), "a.txt": "a grey\nwall", "b.png": picture(90), "b.txt": "a dark wall"})
    latent = empty_latent(64, 64, 5)
    text = TextEncoder()
    bank, positive, _, at = call(node, clip=text, folder=name, vae=vae, latent=latent, negative="bad", template="film, {prompt}", preview=2)
    assert bank.prompts == ("film, a grey wall", "film, a dark wall") and text.asked == [*bank.prompts, "bad"]
    assert at is latent                             # a picture is no clip of five frames
    with torch.inference_mode():
        told = WanImageToVideo.execute([[torch.zeros(1, 1, 1), {}]], [[torch.zeros(1, 1, 1), {}]], vae, 64, 64, 5, 1, torch.full((1, 64, 64, 3), 90 / 255)).args[0][0][1]
    processed = pack("nodes.comfy_bridge.conditions").processed(told["concat_latent_image"])[0]
    image = bank.shown[1].image.float()
    torch.testing.assert_close(image[4:], processed, atol=5e-3, rtol=1e-3)
    assert torch.equal(image[:4].amax((0, 2, 3)), torch.tensor([1.0, 0.0])) and torch.equal(image[:4].amin((0, 2, 3)), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(positive[0][1]["concat_mask"][0, 0].amax((1, 2)), torch.tensor([0.0, 1.0]))
    assert not torch.equal(bank.shown[0].image, bank.shown[1].image)


def test_clips_are_training_data_at_wans_pace(folder, node, vae):
    name = folder({"a.mkv": clip(), "a.txt": "it grows brighter"})
    bank, *_, at = call(node, clip=TextEncoder(), folder=name, vae=vae, latent=empty_latent(64, 64, 5))
    with torch.inference_mode():
        frames = torch.stack([torch.full((64, 64, 3), shade / 255) for shade in (0, 20, 40, 60, 80)])          # every second of 32 a second
        expected = vae.encode(frames)
    torch.testing.assert_close(at["samples"], expected.float().cpu(), atol=2e-2, rtol=1e-2)
    still = vae.encode(torch.stack([frames[0]] * 5))
    assert (at["samples"] - still).abs().max() > 10 * (at["samples"] - expected).abs().max()
    assert bank.shown[0].image.shape == (20, 2, 8, 8)


def test_a_frame_that_is_held_longer_is_shown_longer(pack, tmp_path):
    write_clip(tmp_path / "held.mkv", clip(4), times=[0, 2, 4, 10])
    frames = list(pack("nodes.comfy_bridge.pictures")._resampled(tmp_path / "held.mkv", 6, 16))
    assert [round(255 * float(frame[0, 0, 0, 0])) for frame in frames] == [0, 10, 20, 20, 20, 30]


def test_a_clip_that_was_held_upright_comes_upright(pack):
    frame = av.VideoFrame.from_ndarray(numpy.stack([picture(0)[:, :, 0]] * 3, axis=-1), format="rgb24")
    held = type("Turned", (), {"rotation": -90, "to_ndarray": frame.to_ndarray})()
    assert pack("nodes.comfy_bridge.pictures")._upright(held).shape == (1, SIZE[0], SIZE[1], 3)


def test_clip_vision_sees_the_whole_picture_as_in_wans_templates(folder, node, vae):
    seen = []

    class Vision:
        def encode_image(self, picture, crop=True):
            seen.append((tuple(picture.shape), crop))
            return type("Output", (), {"penultimate_hidden_states": torch.ones(1, 257, 1280)})()

    name = folder({"a.png": picture(90), "a.txt": "a wall"})
    bank, *_ = call(node, clip=TextEncoder(), folder=name, vae=vae, clip_vision=Vision(), latent=empty_latent(64, 64, 5))
    assert seen == [((1, SIZE[1], SIZE[0], 3), False)] and bank.shown[0].clip_fea.shape == (257, 1280)


def test_deep_greys_keep_their_shade(folder, node, vae, pack):
    name = folder({"a.txt": "grey"})
    place = pack("nodes.comfy_bridge.folders").picture_folder(name) / "a.png"
    Image.fromarray(numpy.full((SIZE[1], SIZE[0]), 100 * 257, dtype="uint16")).save(place)
    assert torch.equal(pack("nodes.comfy_bridge.pictures")._picture(place), torch.full((1, SIZE[1], SIZE[0], 3), 100 / 255))


def test_a_clips_last_frame_can_be_shown_too(folder, node, vae):
    name = folder({"a.mkv": clip(), "a.txt": "it grows brighter"})
    given = {"clip": TextEncoder(), "folder": name, "vae": vae, "latent": empty_latent(64, 64, 9)}
    first, both = (call(node, **given, show=show)[0].shown[0].image.float() for show in ("first frame", "first and last frame"))
    assert first[:4].amax((0, 2, 3)).tolist() == [1, 0, 0] and both[:4].amax((0, 2, 3)).tolist() == [1, 0, 1]
    assert both[:4, 2, 0, 0].tolist() == [0, 0, 0, 1]                          # of the last four frames the last


def test_a_picture_ends_with_the_one_of_its_name(folder, node, vae):
    name = folder({"a.png": picture(20), "a_last.png": picture(220), "a.txt": "brighter"})
    given = {"clip": TextEncoder(), "folder": name, "vae": vae, "latent": empty_latent(64, 64, 9), "show": "first and last frame"}
    bank, *_ = call(node, **given)
    assert bank.prompts == ("brighter",) and bank.shown[0].image[:4].float().amax((0, 2, 3)).tolist() == [1, 0, 1]


def test_a_still_folder_of_one_frame_is_data_for_pictures(folder, node, vae):
    name = folder({"a.png": picture(20), "a.txt": "dark", "b.png": picture(220), "b.txt": "bright"})
    bank, *_, at = call(node, clip=TextEncoder(), folder=name, vae=vae, latent=empty_latent(64, 64, 1), show="nothing")
    assert bank.shown == () and at["samples"].shape == (2, 16, 1, 8, 8) and not torch.equal(*at["samples"])


def test_captions_alone_need_no_vae(folder, node):
    name = folder({"a.png": picture(20), "a.txt": "dark"})
    bank, *_, at = call(node, clip=TextEncoder(), folder=name, show="nothing")
    assert bank.prompts == ("dark",) and bank.shown == () and "no LATENT to hand on" in at.message


def test_the_folder_is_read_again_when_a_file_changes(folder, node, comfyui):
    name = folder({"a.png": picture(20), "a.txt": "dark"})
    before = node.fingerprint_inputs(folder=name)
    (comfyui.base / "input" / "mine" / "a.txt").write_text("darker")
    assert node.fingerprint_inputs(folder=name) != before


def test_a_saved_folder_can_be_queued_again(folder, node, vae, refused):
    name = folder({"a.png": picture(1), "a.txt": "a"})
    given = {"clip": TextEncoder(), "folder": name, "vae": vae, "latent": empty_latent(64, 64, 5), "save_as": "kept pictures"}
    call(node, **given)
    call(node, **given)
    folder({"a.png": picture(200)})
    with refused("kept pictures is already there"):
        call(node, **given)


def bad_folders():
    return {
        "nothing in it": ({}, {}, "no picture and no clip"),
        "no caption": ({"a.png": picture(1)}, {}, "a.png has no caption"),
        "an empty caption": ({"a.png": picture(1), "a.txt": " \n"}, {}, "a.png has no caption"),
        "pictures and clips": ({"a.png": picture(1), "a.txt": "a", "b.mkv": clip(2), "b.txt": "b"}, {}, "both pictures and clips"),
        "no picture to end with": ({"a.png": picture(1), "a.txt": "a"}, {"show": "first and last frame"}, "a_last.png"),
        "prompts beside it": ({"a.png": picture(1), "a.txt": "a"}, {"prompts": "one"}, "a folder whose captions are prompts"),
        "no VAE": ({"a.png": picture(1), "a.txt": "a"}, {"vae": None}, "WAN's VAE is not connected"),
        "a clip that is too short": ({"a.mkv": clip(9), "a.txt": "a"}, {}, "too short: 5 frames at 16 a second"),
        "no clip": ({"a.mkv": "text", "a.txt": "a"}, {}, "cannot be read as a clip"),
        "no picture": ({"a.png": "text", "a.txt": "a"}, {}, "cannot be read as a picture"),
    }


@pytest.mark.parametrize("what", bad_folders())
def test_a_wrong_folder_gets_a_sentence(what, folder, node, vae, refused):
    files, given, words = bad_folders()[what]
    with refused(words):
        call(node, **{"clip": TextEncoder(), "folder": folder(files), "vae": vae, "latent": empty_latent(64, 64, 9), **given})


def test_what_a_mac_leaves_beside_a_picture_is_no_picture(folder, node):
    name = folder({"a.png": picture(1), "a.txt": "a", "._a.png": picture(1)})
    assert call(node, clip=TextEncoder(), folder=name, show="nothing")[0].prompts == ("a",)


def test_a_picture_whose_name_ends_so_by_chance_is_kept(folder, node, refused, vae):
    name = folder({"walk_last.png": picture(1), "walk_last.txt": "a walk"})
    with refused("walk_last.png has no picture to end with"):
        call(node, clip=TextEncoder(), folder=name, vae=vae, latent=empty_latent(64, 64, 5), show="first and last frame")


def bad_conditioning():
    def told(**options):
        return [[torch.zeros(1, 512, 4096), options]]
    return {
        "an area": (told(area=(1, 1, 0, 0)), told(), "area"),
        "a control net": (told(control=object()), told(), "control"),
        "no negative": (told(), None, "the negative one is not"),
        "two negatives": (told(), told() * 2, "holds 2 prompts"),
        "another text encoder": ([[torch.zeros(1, 77, 768), {}]], told(), "4096"),
        "one picture for two": (told(concat_latent_image=torch.zeros(1, 16, 1, 8, 8)) + told(), told(), "1 pictures"),
    }


@pytest.mark.parametrize("what", bad_conditioning())
def test_a_wrong_conditioning_gets_a_sentence(what, node, refused):
    positive, negative, words = bad_conditioning()[what]
    with refused(words):
        call(node, conditioning=positive, negative_conditioning=negative)
    with refused("prompts beside it"):
        call(node, conditioning=positive, negative_conditioning=negative, prompts="one")


def test_each_entry_of_a_combined_conditioning_is_a_prompt(node):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.nn.functional.pad(torch.randn(1, 4 + i, 4096, generator=generator), (0, 0, 0, 508 - i)) for i in range(3)]
    bank, positive, negative, _ = call(node, conditioning=[[text, {"pooled_output": None}] for text in texts], negative_conditioning=[[texts[2], {}]], preview=2)
    assert len(bank) == 3 and torch.equal(positive[0][0], texts[1]) and torch.equal(negative[0][0], texts[2])
    assert [len(context) for context in bank.contexts] == [4, 5, 6] and not any(tensor.is_inference() for tensor in (*bank.contexts, bank.negative))
