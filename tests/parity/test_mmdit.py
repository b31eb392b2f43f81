"""Stable Diffusion 3's network against diffusers' SD3Transformer2DModel, on copied weights of shrunken shapes."""

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel

from minidiff.nets.mmdit import MMDiT, MMDiTConfig
from tests.close import assert_same
from tests.test_mmdit import PUBLISHED

SMALL = {"sample_size": 8, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 6,
         "caption_projection_dim": 16, "pooled_projection_dim": 5, "pos_embed_max_size": 12}
SHAPES = {"3-medium": {}, "3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1]},
          "3.5-large": {"qk_norm": "rms_norm"}}


@pytest.fixture(params=SHAPES)
def case(request, tmp_path):
    """(diffusers' net, ours read from the folder that diffusers wrote)."""
    torch.manual_seed(0)
    theirs = SD3Transformer2DModel.from_config({**SMALL, **SHAPES[request.param]}).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    return theirs, MMDiT.from_pretrained(tmp_path)


INPUTS = torch.randn(2, 16, 8, 12), torch.randn(2, 7, 6), torch.randn(2, 5)
TIMES = torch.tensor([3.0, 700.5])


def with_torch_norms(theirs):
    """diffusers takes the mean square in float32 in every dtype; torch's norm of the same weights does not."""
    for block in theirs.transformer_blocks:
        for attention in (block.attn, block.attn2):
            for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                if getattr(attention, name, None) is not None:
                    norm = torch.nn.RMSNorm(8, eps=1e-6)
                    norm.load_state_dict(getattr(attention, name).state_dict())
                    setattr(attention, name, norm)
    return theirs


def test_same_prediction_as_diffusers(case):
    theirs, net = case
    x, context, pooled = INPUTS
    with torch.inference_mode():
        torch.testing.assert_close(net(x, TIMES, context, pooled), theirs(x, context, pooled, TIMES).sample, atol=1e-5,
                                   rtol=1e-5)

    def pairs(dtype):
        for each in case:
            each.to(dtype)
        x, context, pooled = (part.to(dtype) for part in INPUTS)
        return [(net(x, TIMES, context, pooled), theirs(x, context, pooled, TIMES).sample)]

    with_torch_norms(theirs)
    with torch.inference_mode():
        assert_same(pairs)


def test_same_gradients_as_diffusers(case):
    theirs, net = with_torch_norms(case[0]).double(), case[1].double()
    x, context, pooled = (part.double() for part in INPUTS)
    net(x, TIMES, context, pooled).square().mean().backward()
    theirs(x, context, pooled, TIMES).sample.square().mean().backward()
    ours, reference = dict(net.named_parameters()), dict(theirs.named_parameters())
    assert ours.keys() == reference.keys()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, reference[name].grad)


def test_what_we_save_loads_in_diffusers_and_is_the_same(case, tmp_path):
    theirs, net = case
    net.save_pretrained(tmp_path / "ours")
    back = SD3Transformer2DModel.from_pretrained(tmp_path / "ours")
    assert list(back.config.dual_attention_layers) == list(theirs.config.dual_attention_layers)
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_diffusers_keys_and_shapes(name):
    with init_empty_weights(include_buffers=True):
        theirs = SD3Transformer2DModel.from_config(PUBLISHED[name].config)
    with torch.device("meta"):
        ours = MMDiT(MMDiTConfig.from_dict(PUBLISHED[name].config))
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()}
