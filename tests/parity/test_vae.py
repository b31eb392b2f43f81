"""The VAE against diffusers' AutoencoderKL, on copied weights of a shrunken Stable Diffusion shape."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from minidiff.nets.vae import VAE
from tests.close import assert_same

SHAPES = {
    "sd": {"block_out_channels": [8, 16, 32, 32], "layers_per_block": 2, "norm_num_groups": 4},
    "mini": {"block_out_channels": [8, 16, 16], "norm_num_groups": 8, "latent_channels": 6, "scaling_factor": 0.7},
    "no-attention": {"block_out_channels": [8, 16], "norm_num_groups": 8, "mid_block_add_attention": False},
}


@pytest.fixture(params=SHAPES)
def case(request, tmp_path):
    """(diffusers' net, ours read from the folder that diffusers wrote)."""
    torch.manual_seed(0)
    shape = SHAPES[request.param]
    n = len(shape["block_out_channels"])
    types = {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
    reference = AutoencoderKL.from_config({**shape, **types}).eval()
    reference.save_pretrained(tmp_path)
    return reference, VAE.from_pretrained(tmp_path)


def test_same_latents_and_pictures_as_diffusers(case):
    reference, net = case
    image, scale = torch.randn(2, 3, 24, 40), net.config.scaling_factor
    noise = torch.randn(2, net.config.latent_channels, 24 // net.factor, 40 // net.factor)

    def pairs(dtype):
        for each in case:
            each.to(dtype)
        x, z = image.to(dtype), noise.to(dtype)
        posterior, (mean, logvar) = reference.encode(x).latent_dist, net.moments(x)
        return [(mean, posterior.mean), (logvar, posterior.logvar), (net.encode(x), scale * posterior.mode()),
                (net.encode(x, z), scale * (posterior.mean + posterior.std * z)),
                (net.decode(net.encode(x)), reference.decode(posterior.mode()).sample)]

    with torch.inference_mode():
        assert_same(pairs)


def test_same_gradients_as_diffusers(case):
    """In float64: in float32 a gradient's error is one draw, the same for all its entries, and not to be compared."""
    reference, net = (each.double() for each in case)
    image = torch.randn(2, 3, 24, 40).double()
    net.decode(net.encode(image)).square().mean().backward()
    reference.decode(reference.encode(image).latent_dist.mode()).sample.square().mean().backward()
    ours, theirs = dict(net.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    for key, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[key].grad)


def test_what_we_save_loads_in_diffusers_and_is_the_same(case, tmp_path):
    reference, net = case
    net.save_pretrained(tmp_path / "ours", dtype=torch.float16)
    again, info = AutoencoderKL.from_pretrained(tmp_path / "ours", output_loading_info=True, torch_dtype=torch.float32)
    assert not any(info.values())
    assert again.config.scaling_factor == net.config.scaling_factor
    for key, value in reference.state_dict().items():
        assert torch.equal(again.state_dict()[key], value.half().float())


def test_old_attention_names_and_old_convolutions_load(case, tmp_path):
    reference, net = case
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in load_file(tmp_path / "diffusion_pytorch_model.safetensors").items():
        head, found, end = key.partition("attentions.0.")
        for new, name in old.items():
            if found and end.startswith(f"{new}."):
                key = f"{head}{found}{name}.{end.removeprefix(new + '.')}"
                value = value[:, :, None, None] if value.ndim == 2 and new != "to_v" else value
        state[key] = value.contiguous()
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    again = VAE.from_pretrained(tmp_path)
    for key, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


@pytest.mark.parametrize("sides", [(40, 56), (16, 88), (32, 32)])
def test_tiles_are_diffusers_tiles(case, sides):
    reference, net = case
    f, tile = net.factor, 8 * net.factor
    reference.enable_tiling()
    reference.tile_sample_min_size, reference.tile_latent_min_size = tile, 8
    image = torch.randn(2, 3, *(side // f * f for side in sides))

    def pairs(dtype):
        for each in case:
            each.to(dtype)
        mean, posterior = net.encode(image.to(dtype), tile=tile), reference.encode(image.to(dtype)).latent_dist
        picture = net.decode(mean, tile=tile)
        assert (picture - net.decode(mean)).abs().max() > 1e-3 or max(sides) <= tile
        return [(mean, net.config.scaling_factor * posterior.mode()),
                (picture, reference.decode(posterior.mode()).sample)]

    with torch.inference_mode():
        assert_same(pairs)
