"""Attention against its formula, and the keys and values that are kept."""

import math

import pytest
import torch

from minidiff.nets.attention import Attention, MapAttention, SpatialTransformer, TransformerBlock, kept, watched
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


@torch.inference_mode()
def test_kept_keys_and_values_are_computed_once_for_each_context_and_attention():
    net = torch.nn.ModuleList([TransformerBlock(12, 3, 6), TransformerBlock(12, 3, 6)])
    contexts, x = torch.randn(2, 2, 7, 6).unbind(), torch.randn(2, 5, 12)
    asked = []
    for block in net:
        block.attn2.to_k.register_forward_hook(lambda layer, args, out: asked.append((layer, args[0])))
    plain = [block(x, context) for block in net for context in contexts]
    asked.clear()
    with kept(net):
        for _ in range(3):  # other states meet the same prompts
            again = [block(x, context) for block in net for context in contexts]
            assert all(map(torch.equal, again, plain))
            net[0](torch.randn(2, 5, 12), contexts[0])
    assert len(asked) == 4


@torch.inference_mode()
def test_what_is_kept_ends_with_the_run_also_where_two_overlap_or_one_fails():
    net, context, x = TransformerBlock(12, 3, 6), torch.randn(2, 7, 6), torch.randn(2, 5, 12)
    first, second = kept(net), kept(net)
    first.__enter__()
    second.__enter__()
    net(x, context)
    first.__exit__(None, None, None)
    net(x, context)
    second.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="inside"), kept(net):
        net(x, context)
        raise RuntimeError("inside")
    assert "keys_values" not in vars(net.attn2) and "keys_values" not in vars(net.attn1)
    before = net(x, context)
    context.mul_(2)
    assert not torch.allclose(net(x, context), before)


def test_what_a_map_attends_to_in_itself_is_not_kept():
    net = TransformerBlock(12, 3, 6)
    with kept(net):
        assert "keys_values" in vars(net.attn2) and "keys_values" not in vars(net.attn1)


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
        with kept(net):
            assert torch.equal(net(x, 500, context), plain) and torch.equal(net(x, 500, context), plain)
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
