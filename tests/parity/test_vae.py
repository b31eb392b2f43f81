"""The VAE against diffusers' AutoencoderKL, on copied weights of a shrunken Stable Diffusion shape."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from minidiff.nets.vae import VAE

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


def test_same_latents_pictures_and_gradients_as_diffusers(case):
    reference, net = case
    image = torch.randn(2, 3, 24, 40)
    posterior, scale = reference.encode(image).latent_dist, net.config.scaling_factor
    mean, logvar = net.moments(image)
    noise = torch.randn_like(mean)
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logvar, posterior.logvar, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net.encode(image), scale * posterior.mode(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net.encode(image, noise), scale * (posterior.mean + posterior.std * noise),
                               atol=1e-5, rtol=1e-5)
    out, expected = net.decode(net.encode(image)), reference.decode(posterior.mode()).sample
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for each in (out, expected):
        each.square().mean().backward()
    ours, theirs = dict(net.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    for key in ("encoder.conv_in.weight", "post_quant_conv.weight", "decoder.conv_out.weight"):
        torch.testing.assert_close(ours[key].grad, theirs[key].grad, atol=1e-5, rtol=1e-3)


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
    with torch.inference_mode():
        image = torch.randn(2, 3, *(side // f * f for side in sides))
        mean = net.encode(image, tile=tile)
        posterior = reference.encode(image).latent_dist
        torch.testing.assert_close(mean, net.config.scaling_factor * posterior.mode(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net.decode(mean, tile=tile), reference.decode(posterior.mode()).sample,
                                   atol=1e-5, rtol=1e-5)
        assert (net.decode(mean, tile=tile) - net.decode(mean)).abs().max() > 1e-3 or max(sides) <= tile
