"""The VAE on its own: parameter count, what encode and decode mean, gradients, number formats."""

import pytest
import torch

from minidiff.data import scenes
from minidiff.io.weights import weights_dir
from minidiff.nets.vae import VAE, VAEConfig

pytestmark = pytest.mark.quick

TINY = VAEConfig(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=3, scaling_factor=0.5)


def test_stable_diffusions_vae_has_exactly_its_parameters():
    config = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
              "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
              "act_fn": "silu", "sample_size": 512, "norm_num_groups": 32, "_class_name": "AutoencoderKL"}
    with torch.device("meta"):
        net = VAE(VAEConfig.from_dict(config))
    assert len(net.state_dict()) == 248 and net.factor == 8
    assert sum(p.numel() for p in net.parameters()) == 83_653_863


def test_encode_is_the_scaled_mean_plus_noise_times_std():
    torch.manual_seed(0)
    net = VAE(TINY)
    image = torch.randn(2, 3, 6, 10)
    mean, logvar = net.moments(image)
    assert mean.shape == logvar.shape == (2, 3, 3, 5)
    noise = torch.randn_like(mean)
    torch.testing.assert_close(net.encode(image), 0.5 * mean)
    torch.testing.assert_close(net.encode(image, noise), 0.5 * (mean + (logvar / 2).exp() * noise))
    torch.testing.assert_close(net(image), net.decode(0.5 * mean))
    assert net(image).shape == image.shape


def test_log_variance_is_clamped():
    net = VAE(TINY)
    net.quant_conv.bias.data[3:] = 1000.0
    assert net.moments(torch.zeros(1, 3, 4, 4))[1].max() == 20
    net.quant_conv.bias.data[3:] = -1000.0
    assert net.moments(torch.zeros(1, 3, 4, 4))[1].min() == -30


def test_config_round_trip_and_unknown_keys():
    assert VAEConfig.from_dict(TINY.to_dict()) == TINY
    with pytest.raises(ValueError, match="does not support latents_mean"):
        VAEConfig.from_dict({"latents_mean": [0.1, 0.2]})
    with pytest.raises(ValueError, match="does not support use_quant_conv = False"):
        VAEConfig.from_dict({"use_quant_conv": False})


def test_gradients_are_those_of_the_function():
    torch.manual_seed(0)
    net = VAE(TINY).double()
    image = torch.randn(1, 3, 2, 4).double().requires_grad_()
    noise = torch.randn(1, 3, 1, 2).double()
    assert torch.autograd.gradcheck(lambda image: net(image, noise), (image,))


def test_trains_under_bfloat16_autocast_and_runs_without_gradients():
    torch.manual_seed(0)
    net = VAE(TINY)
    image = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(image)
    expected = net(image)
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.1)
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    before = image.clone()
    with torch.inference_mode():
        torch.testing.assert_close(net(image), expected)
    assert torch.equal(image, before)


def test_every_row_is_on_its_own():
    net = VAE(TINY).eval()
    image = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(net(image)[1:2], net(image[1:2]), atol=1e-5, rtol=1e-5)


def test_tiles_change_colours_a_little_and_shapes_not_at_all():
    """A true VAE and a true picture: four times as many pixels as the tile."""
    vae = VAE.from_pretrained(weights_dir() / "mini-sd" / "vae")
    image, _ = scenes.render(1, 128, seed=0)
    image = 2 * image.float() / 255 - 1
    with torch.inference_mode():
        z = vae.encode(image)
        whole, tiled = vae.decode(z), vae.decode(z, tile=64)
        tiled_z = vae.encode(image, tile=64)
    assert tiled.shape == whole.shape and tiled_z.shape == z.shape
    assert (whole - tiled).abs().mean() < 0.07 and (tiled_z - z).abs().mean() < 0.1
    assert torch.equal(vae.decode(z, tile=128), whole)


def test_pictures_decoded_one_by_one_are_those_decoded_together():
    net = VAE(TINY).eval()
    z = torch.randn(3, net.config.latent_channels, 4, 4)
    one_by_one = torch.cat([net.decode(part) for part in z.split(1)])
    torch.testing.assert_close(one_by_one, net.decode(z), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", [0, -8, 6])
def test_a_tile_that_cannot_be_is_named(tile):
    net = VAE(TINY).eval()
    with pytest.raises(ValueError, match=f"tile is {tile}; it must be a positive multiple of {4 * net.factor}"):
        net.decode(torch.zeros(1, net.config.latent_channels, 32, 32), tile=tile)
    with pytest.raises(ValueError, match="tile is"):
        net.encode(torch.zeros(1, 3, 64, 64), tile=tile)


@pytest.mark.parametrize("change, message", [
    ({"norm_num_groups": 0}, "groups of norm_num_groups"), ({"block_out_channels": [30]}, "divisible by the 32 groups"),
    ({"scaling_factor": None}, "scaling_factor = None; it should be a number"), ({"scaling_factor": 0}, "is 0"),
    ({"_class_name": "AutoencoderTiny"}, "is of a AutoencoderTiny, not of a AutoencoderKL"),
    ({"latent_channels": "4"}, "latent_channels = '4'; it should be a whole number"),
    ({"latents_mean": [0.1]}, "does not support latents_mean")])
def test_a_config_that_is_none_is_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict(change)
    assert VAEConfig.from_dict({"sample_size": [512, 768]}).sample_size == (512, 768)
