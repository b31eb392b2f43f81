"""The way down: its config, in every form that files write it, and training in less memory."""
import pytest
import torch
from torch.testing import assert_close

from minidiff.nets.attention import SpatialTransformer
from minidiff.nets.layers import ResBlock
from minidiff.nets.unet import UNet, UNetConfig
from tests import tiny
from tests.test_unet import SD1, SD2, XL

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("config", [SD1, SD2, XL], ids=["sd1", "sd2", "sdxl"])
def test_a_config_survives_the_round_trip(config):
    ours = UNetConfig.from_dict(config)
    assert UNetConfig.from_dict(ours.to_dict()) == ours
    assert hash(ours) == hash(UNetConfig.from_dict(config))


@pytest.mark.parametrize("change, message", [
    ({"resnet_time_scale_shift": "scale_shift"}, "does not support resnet_time_scale_shift = 'scale_shift'"),
    ({"act_fn": "gelu"}, "does not support act_fn = 'gelu'"),
    ({"only_cross_attention": [True, False]}, "does not support only_cross_attention"),
    ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types is .* it needs 4 of"),
    ({"attention_head_dim": [5, 10]}, "heads is .* one value or 4"),
    ({"attention_head_dim": 7}, "320 channels are not divisible by 32 groups and 7 heads"),
    ({"block_out_channels": [30, 60, 90, 90]}, "30 channels are not divisible"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type is"),
    ({"addition_embed_type": "image"}, "addition_embed_type is 'image'"),
])
def test_a_config_that_we_would_not_honour_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict({**SD1, **change})


def test_whole_floats_and_both_forms_of_the_sides_are_accepted():
    config = UNetConfig.from_dict({"sample_size": [8.0, 6], "norm_num_groups": 32.0, "norm_eps": 1,
                                   "layers_per_block": [2, 2, 2, 1], "mid_block_type": None})
    assert config.sides == config.sample_size == (8, 6) and type(config.norm_num_groups) is int
    assert type(config.norm_eps) is float and UNetConfig.from_dict({"sample_size": 8}).sides == (8, 8)
    with pytest.raises(ValueError, match=r"sample_size is \(8, 6, 4\), it needs one side, or height and width"):
        UNetConfig.from_dict({"sample_size": [8, 6, 4]})
    for zero in ({"norm_num_groups": 0}, {"attention_head_dim": 0}):
        with pytest.raises(ValueError, match="320 channels are not divisible by"):
            UNetConfig.from_dict(zero)
    with pytest.raises(ValueError, match="the config is of a UNet2DModel, not of a UNet2DConditionModel"):
        UNetConfig.from_dict({"_class_name": "UNet2DModel"})


def test_checkpointing_makes_maps_twice_and_changes_no_value_and_no_gradient():
    torch.manual_seed(0)
    net = UNet(UNetConfig.from_dict(tiny.UNET)).double()
    x, context, calls = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5, 24).double(), []
    blocks = [each for each in net.modules() if isinstance(each, ResBlock | SpatialTransformer)]
    for each in blocks:
        each.register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for on in (False, True):
        net.checkpointing(on)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            out = net(x, 7.0, context)
        out.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in net.named_parameters()}
        found.append((out.detach(), grads, len(calls), sum(kept)))
        net.zero_grad()
        calls.clear()
    (plain, grads, once, much), (again, others, twice, little) = found
    assert_close(again, plain, rtol=0, atol=0)
    assert_close(others, grads)
    assert once == len(blocks) and twice == 2 * once and little < 0.5 * much
    with torch.no_grad():
        assert_close(net(x, 7.0, context), plain)
    assert len(calls) == once                                        # nothing to keep, nothing made again
