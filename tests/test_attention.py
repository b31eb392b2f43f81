"""Attention against its formula, and the keys and values that are kept."""

import math

import pytest
import torch

from minidiff.nets.attention import Attention, Kept, MapAttention, SpatialTransformer

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
