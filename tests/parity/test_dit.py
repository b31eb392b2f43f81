"""Diffusion transformers against diffusers' DiTTransformer2DModel, on copied weights."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from minidiff.nets.dit import DiT, DiTConfig
from tests.close import assert_same

SHAPES = {
    "learned-variance": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8,
                         "out_channels": 8, "num_embeds_ada_norm": 5},
    "patches-of-4": {"num_attention_heads": 3, "attention_head_dim": 4, "num_layers": 2, "sample_size": 16,
                     "patch_size": 4, "in_channels": 3, "num_embeds_ada_norm": 4, "attention_bias": False},
}


def reference(shape, shared):
    """diffusers' net, all its weights drawn; `shared`: embeddings as in files that come from the paper's code."""
    torch.manual_seed(0)
    net = DiTTransformer2DModel.from_config(shape).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if shared:
        for block in net.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    return net


@pytest.fixture(params=[(name, shared) for name in SHAPES for shared in (True, False)],
                ids=lambda param: f"{param[0]}-{'one' if param[1] else 'each'}")
def case(request, tmp_path):
    """(diffusers' net, ours read from the folder that diffusers wrote)."""
    name, shared = request.param
    net = reference(SHAPES[name], shared)
    net.save_pretrained(tmp_path)
    return net, DiT.from_pretrained(tmp_path)


def call(net):
    side = net.config.sample_size
    x = torch.randn(2, net.config.in_channels, side, side)
    return x, torch.tensor([3.0, 961.0]), torch.tensor([1, net.config.num_embeds_ada_norm])


def test_same_prediction_as_diffusers(case):
    """To 1e-5; the second picture is told no class."""
    theirs, net = case
    x, t, label = call(net)

    def pairs(dtype):
        for each in case:
            each.to(dtype)
        return [(net(x.to(dtype), t, vec=label), theirs(x.to(dtype), t, label).sample)]

    with torch.inference_mode():
        assert_same(pairs)
        torch.testing.assert_close(net.float()(x, t, vec=label), theirs.float()(x, t, label).sample, atol=1e-5,
                                   rtol=1e-5)


def test_same_gradients_as_diffusers(case):
    theirs, net = (each.double() for each in case)
    x, t, label = call(net)
    net(x.double(), t, vec=label).square().mean().backward()
    theirs(x.double(), t, label).sample.square().mean().backward()
    told, grads = {}, {}
    for name, parameter in theirs.named_parameters():            # of one embedding in all blocks the gradients add up
        told.setdefault(name if net.transformer_blocks[0].norm1.emb is not net.transformer_blocks[1].norm1.emb
                        else name.replace(".1.norm1.emb", ".0.norm1.emb").replace(".2.norm1.emb", ".0.norm1.emb"),
                        []).append(parameter.grad)
    grads = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert grads.keys() == told.keys()
    for name, parts in told.items():
        torch.testing.assert_close(grads[name], sum(parts))


def test_what_we_save_loads_in_diffusers_and_is_the_same(case, tmp_path):
    theirs, net = case
    net.save_pretrained(tmp_path / "ours")
    back = DiTTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_a_class_is_dropped_by_none_and_by_the_number_after_the_last(case):
    _, net = case
    x, t, _ = call(net)
    last = torch.full((2,), net.config.num_embeds_ada_norm)
    with torch.inference_mode():
        assert torch.equal(net(x, t), net(x, t, vec=last)) and not torch.equal(net(x, t), net(x, t, vec=last - 1))


def test_a_file_without_a_weight_is_refused(case, tmp_path):
    _, net = case
    net.save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("transformer_blocks.1.ff.net.2.weight")
    save_file(state, file)
    with pytest.raises(ValueError, match="ff.net.2.weight"):
        DiT.from_pretrained(tmp_path / "ours")


def test_the_class_of_a_config_is_checked():
    with pytest.raises(ValueError, match="PixArt"):
        DiTConfig.from_dict({"_class_name": "PixArtTransformer2DModel"})
