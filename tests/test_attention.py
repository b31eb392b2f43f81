"""Attention against its formula, and the keys and values that are kept."""

import math

import pytest
import torch

from minidiff.nets.attention import Attention, Kept, MapAttention, SpatialTransformer, watched
from minidiff.nets.unet import UNet, UNetConfig

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def by_hand(net: Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """softmax(q kᵀ/√d) v, one head after the other."""
    q, k, v = net.to_q(x), net.to_k(context), net.to_v(context)
    heads = [(a @ b.mT / math.sqrt(a.shape[-1])).softmax(-1) @ c
             for a, b, c in zip(*(y.chunk(net.heads, -1) for y in (q, k, v)))]
    return net.to_out[0](torch.cat(heads, -1))


@pytest.mark.parametrize("context", [None, torch.randn(2, 7, 6)], ids=["self", "cross"])
def test_attention_is_its_formula(context):
    net, x = Attention(12, 3, None if context is None else 6), torch.randn(2, 5, 12)
    torch.testing.assert_close(net(x, context), by_hand(net, x, x if context is None else context))


def test_attention_over_a_map_attends_to_all_positions_and_adds_its_input():
    net, x = MapAttention(8, 4), torch.randn(2, 8, 3, 5)
    tokens = net.group_norm(x).flatten(2).mT
    torch.testing.assert_close(net(x), x + by_hand(net, tokens, tokens).mT.reshape(x.shape))


def test_kept_keys_and_values_are_computed_once_and_belong_to_one_attention():
    one, other = Attention(12, 3, 6), Attention(12, 3, 6)
    context, x = torch.randn(2, 7, 6), torch.randn(2, 5, 12)
    kept = Kept(context)
    for net in (one, other, one):
        torch.testing.assert_close(net(x, kept), net(x, context))
    assert kept.keys() == {one, other}
    torch.nn.init.zeros_(one.to_k.weight)
    assert not torch.allclose(one(x, kept), one(x, context))


def test_linear_and_convolutional_projections_are_the_same_function():
    nets = [SpatialTransformer(8, 2, 1, 6, 4, linear) for linear in (False, True)]
    state = {k: v.flatten(1) if v.ndim == 4 else v for k, v in nets[0].state_dict().items()}
    nets[1].load_state_dict(state)
    x, context = torch.randn(2, 8, 3, 5), torch.randn(2, 7, 6)
    torch.testing.assert_close(nets[0](x, context), nets[1](x, context))


@torch.inference_mode()
def test_watching_notes_the_weights_and_changes_no_bit():
    torch.manual_seed(0)
    config = UNetConfig(block_out_channels=(16, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), heads=4, cross_attention_dim=24,
                        norm_num_groups=8)
    net = UNet(config).eval()
    x, context = torch.randn(2, 4, 8, 6), torch.randn(2, 7, 24)
    plain = net(x, 500, context)
    with watched(net) as maps:
        assert torch.equal(net(x, 500, context), plain)
        assert torch.equal(net(x, 500, Kept(context)), net(x, 500, Kept(context)))
    assert torch.equal(net(x, 500, context), plain) and all(len(calls) == 3 for calls in maps.values())
    shapes = {name.rpartition(".")[2]: calls[0].shape for name, calls in maps.items()}
    assert shapes == {"attn1": (2, 4, 12, 12), "attn2": (2, 4, 12, 7)}
    assert all(torch.allclose(call.sum(-1), torch.ones(())) for calls in maps.values() for call in calls)


def test_what_is_noted_are_the_weights_that_were_used():
    torch.manual_seed(0)
    net, x, context = torch.nn.ModuleList([Attention(8, 2, context=6)]), torch.randn(3, 5, 8), torch.randn(3, 7, 6)
    with watched(net) as maps:
        out = net[0](x, context)
    _, v = net[0].keys_values(context)
    torch.testing.assert_close(net[0].to_out[0]((maps["0"][0] @ v).transpose(1, 2).flatten(2)), out)
