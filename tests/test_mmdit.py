"""Stable Diffusion 3's network: sizes of the published ones, its start, what fits. Equality: tests/parity."""
from typing import NamedTuple

import pytest
import torch

from minidiff.nets.mmdit import MMDiT, MMDiTConfig

pytestmark = pytest.mark.quick

SMALL = MMDiTConfig(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, joint_attention_dim=6,
                    caption_projection_dim=16, pooled_projection_dim=5, pos_embed_max_size=6)


class Published(NamedTuple):
    """The config of a model, and its parameters and tensors."""

    config: dict
    parameters: int
    tensors: int


def config(layers, side, **more):
    return {"_class_name": "SD3Transformer2DModel", "sample_size": 128, "num_layers": layers,
            "num_attention_heads": layers, "caption_projection_dim": 64 * layers, "pos_embed_max_size": side, **more}


PUBLISHED = {
    "3-medium": Published(config(24, 192), 2_028_328_000, 683),
    "3.5-medium": Published(config(24, 384, qk_norm="rms_norm", dual_attention_layers=list(range(13))), 2_243_171_520,
                            909),
    "3.5-large": Published(config(38, 192, qk_norm="rms_norm"), 8_056_627_520, 1227)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_their_parameters(name):
    with torch.device("meta"):
        net = MMDiT(MMDiTConfig.from_dict(PUBLISHED[name].config))
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[name].parameters
    assert len(net.state_dict()) == PUBLISHED[name].tensors


@pytest.mark.parametrize(("side", "first"), [(192, 0.61139), (384, 0.99932)])
def test_the_middle_of_the_table_is_cut_out(side, first):
    """Of a 64×64 grid of patches, as for 1024×1024 pixels: the first number of the first token's code."""
    shape = MMDiTConfig(num_attention_heads=1, caption_projection_dim=64, num_layers=1, pos_embed_max_size=side)
    embed = MMDiT(shape).pos_embed
    with torch.no_grad():
        codes = embed(torch.zeros(1, 16, 128, 128)) - embed.proj.bias
    assert codes[0, 0, 0].item() == pytest.approx(first, abs=1e-5)


def test_it_begins_with_zero_and_blocks_that_change_nothing():
    net = MMDiT(SMALL)
    x, context, pooled = torch.randn(2, 16, 8, 8), torch.randn(2, 7, 6), torch.randn(2, 5)
    seen = {}
    for i, block in enumerate(net.transformer_blocks):
        block.register_forward_hook(lambda _, given, got, i=i: seen.update({i: (given[0], got[0])}))
    with torch.no_grad():
        assert not net(x, 500.0, context, pooled).any()
    assert len(seen) == 2 and all(torch.equal(*pair) for pair in seen.values())


def test_several_prompts_for_one_picture_are_rows_of_their_own():
    torch.manual_seed(0)
    net = MMDiT(SMALL)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, context, pooled = torch.randn(2, 16, 8, 8), torch.randn(4, 7, 6), torch.randn(4, 5)
    with torch.no_grad():
        torch.testing.assert_close(net(x, 500.0, context, pooled), net(torch.cat([x, x]), 500.0, context, pooled))


def test_pictures_beyond_the_table_or_between_patches_are_refused():
    net, rest = MMDiT(SMALL), (500.0, torch.zeros(1, 7, 6), torch.zeros(1, 5))
    with pytest.raises(ValueError, match="positions"):
        net(torch.zeros(1, 16, 8, 14), *rest)
    with pytest.raises(ValueError, match="do not tile"):
        net(torch.zeros(1, 16, 7, 8), *rest)


@pytest.mark.parametrize(("wrong", "said"), [
    ({"caption_projection_dim": 64}, "caption_projection_dim"), ({"qk_norm": "layer_norm"}, "rms_norm"),
    ({"num_layers": 0}, "num_layers"), ({"pos_embed_max_size": 8}, "positions"), ({"sample_size": 127}, "tiled")])
def test_configs_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        MMDiTConfig.from_dict({**config(24, 192), **wrong})
