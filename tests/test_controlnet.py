"""ControlNet on its own: published shapes, no effect before training, wrappers, settings, what does not fit."""
import pytest
import torch
from torch.testing import assert_close

from minidiff.data import scenes
from minidiff.data.hints import edges
from minidiff.guidance import controlled
from minidiff.nets.controlnet import ControlNet, ControlNetConfig, Look
from tests import tiny
from tests.test_unet import SD1, SD2, XL

pytestmark = pytest.mark.quick


@pytest.fixture
def net(pipe) -> ControlNet:
    return tiny.controlnet(pipe)


@pytest.mark.parametrize("config, tensors, parameters", [(SD1, 340, 361_279_120), (SD2, 340, 364_228_240),
                                                         (XL, 844, 1_251_014_160)], ids=["sd1", "sd2", "sdxl"])
def test_published_models_have_exactly_their_parameters(config, tensors, parameters):
    own = ControlNetConfig.from_dict({k: v for k, v in config.items() if k not in ("up_block_types", "sample_size")})
    with torch.device("meta"):
        net = ControlNet(own)
    assert len(net.state_dict()) == tensors
    assert sum(p.numel() for p in net.parameters()) == parameters
    look = {k: tuple(v.shape) for k, v in net.controlnet_cond_embedding.named_parameters() if k.endswith("weight")}
    assert list(look.values()) == [(16, 3, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3), (96, 32, 3, 3),
                                   (96, 96, 3, 3), (256, 96, 3, 3), (320, 256, 3, 3)]


def test_before_training_nothing_changes_exactly(pipe):
    net = ControlNet.from_unet(pipe.unet, (4, 8, 8))
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24)
    hint = net.look(torch.rand(2, 3, 32, 32))
    assert torch.equal(controlled(pipe.unet, net, hint)(x, 7.0, context=context), pipe.unet(x, 7.0, context))
    plain = pipe("a red house", steps=3, output="tensor")
    image = torch.rand(3, 32, 32)
    assert torch.equal(pipe("a red house", steps=3, output="tensor", controlnet=net, control_image=image), plain)


def test_a_new_net_is_trained_from_its_zeros(pipe):
    net = ControlNet.from_unet(pipe.unet, (4, 8, 8))
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24)
    residuals = net(x, 7.0, context, hint=net.look(torch.rand(1, 3, 32, 32)))
    pipe.unet(x, 7.0, context, residuals=residuals).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in net.controlnet_down_blocks.parameters())
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in net.down_blocks.parameters())


@pytest.mark.parametrize("channels", [(8, 16, 32, 64), (16, 32, 96, 256)])
def test_a_new_net_hears_its_picture(channels):
    """What reaches the last convolution, which starts at zero, differs between pictures by a tenth, not by 10⁻⁵."""
    torch.manual_seed(0)
    look, heard = Look(3, channels, 8), []
    look.conv_out.register_forward_pre_hook(lambda module, given: heard.append(given[0]))
    look(edges(scenes.render(8, 128, seed=1)[0] / 255))
    assert 0.03 < heard[0].std(0).mean() and heard[0].square().mean().sqrt() < 1
    assert not look.conv_out.weight.any()


def test_wrapping_again_adds_residuals_and_scale_multiplies_them(pipe, net):
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24)
    hint = net.look(torch.rand(1, 3, 32, 32))
    with torch.no_grad():
        once = controlled(pipe.unet, net, hint, 0.9)(x, 7.0, context=context)
        twice = controlled(controlled(pipe.unet, net, hint, 0.4), net, hint, 0.5)(x, 7.0, context=context)
        off = controlled(pipe.unet, net, hint, 0.0)(x, 7.0, context=context)
        plain = pipe.unet(x, 7.0, context)
    assert_close(twice, once, atol=1e-5, rtol=1e-5)
    assert torch.equal(off, plain)
    assert (once - plain).abs().max() > 0.01


def test_an_unknown_channel_order_is_an_error():
    with pytest.raises(ValueError, match="channel_order is 'gbr', supported: rgb, bgr"):
        ControlNetConfig(controlnet_conditioning_channel_order="gbr")


def test_a_picture_that_no_layer_reads_is_named():
    with pytest.raises(ValueError, match="conditioning_embedding_out_channels is empty"):
        ControlNetConfig.from_dict({"conditioning_embedding_out_channels": []})
