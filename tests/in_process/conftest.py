"""What the tests of the bridge and the nodes share: a tiny WAN as ComfyUI opens it, and the error a user reads."""
import pytest
from helpers_tiny import random_wan


@pytest.fixture(scope="session")
def student():
    """A tiny WAN of random weights, as the engine's module. Never written to."""
    return random_wan(seed=3, ffn_dim=128)


@pytest.fixture
def model(comfyui, student):
    """What Load Diffusion Model hands out for these weights, in fp32; made in inference mode, as in a node."""
    import comfy.sd
    import torch
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict({name: tensor.clone() for name, tensor in student.state_dict().items()},
                                                        model_options={"dtype": torch.float32})


@pytest.fixture
def comfy_teacher(pack):
    return pack("nodes.comfy_bridge.teacher").ComfyTeacher


@pytest.fixture
def refused(pack):
    """`with refused("words")`: the one sentence that a user reads holds these words (a regular expression)."""
    error = pack("wanlite_model.errors").WanLiteError
    return lambda words: pytest.raises(error, match=words)


@pytest.fixture(scope="session")
def vae(comfyui):
    """A stock WAN VAE of random weights, 8 channels wide."""
    import comfy.ldm.wan.vae
    import comfy.sd
    import torch
    torch.manual_seed(0)
    network = comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                                       temperal_downsample=[False, True, True], dropout=0.0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 and not name.endswith("gamma"):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0 if name.endswith("gamma") else 0.0)
    return comfy.sd.VAE(sd=network.state_dict())
