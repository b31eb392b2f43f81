"""LoRA layers in training: nothing changes at first, merged is unmerged, the base stays, what cannot be is said."""
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from minidiff.io.lora import Loras
from minidiff.nets.low_rank import LoRA, adapt, restore
from tests import tiny

pytestmark = pytest.mark.quick
ALL = ".*"


@pytest.fixture
def unet(tmp_path):
    return tiny.pipeline(tmp_path).unet.eval()


def call(unet):
    g = torch.Generator().manual_seed(0)
    return unet(torch.randn(2, 4, 8, 8, generator=g), 7.0, torch.randn(2, 7, 24, generator=g))


def test_at_first_nothing_changes_exactly_and_only_the_new_layers_learn(unet):
    with torch.no_grad():
        before = call(unet)
    loras = adapt(unet, ALL, rank=2)
    assert torch.equal(call(unet), before)
    learning = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.{half}.weight" for name in loras for half in ("down", "up")}
    call(unet).square().mean().backward()
    assert all(lora.up.weight.grad.abs().max() > 0 and not lora.down.weight.grad.any() for lora in loras.values()
               if lora.up.weight.grad is not None)                               # up is zero: down hears nothing yet


def test_merged_is_unmerged_and_the_base_is_bit_identical_afterwards(unet):
    kept = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    loras = adapt(unet, ALL, rank=2, alpha=3.0)
    with torch.no_grad():
        for lora in loras.values():
            lora.up.weight.normal_(std=0.1)
        beside = call(unet)
        changes = {f"unet.{name}": lora.change() for name, lora in loras.items()}
        restore(unet, loras)
        assert tiny.unchanged(unet.state_dict(), kept)
        Loras({"unet": unet}).add(changes)
        assert_close(call(unet), beside, atol=1e-5, rtol=1e-5)
    assert not tiny.unchanged(unet.state_dict(), kept)


def test_the_default_takes_the_four_projections_of_every_attention(unet):
    names = list(adapt(unet))
    assert {name.rpartition("attn")[2].partition(".")[2] for name in names} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert len(names) == 4 * sum(name.endswith("to_q") for name in names)


def test_dropout_leaves_out_inputs_in_training_only():
    lora = LoRA(nn.Linear(200, 3), rank=2, dropout=0.5)
    nn.init.ones_(lora.up.weight)
    x = torch.randn(1, 200)
    torch.manual_seed(0)
    assert not torch.allclose(lora(x), lora(x))
    lora.eval()
    assert torch.equal(lora(x), lora(x))


@pytest.mark.parametrize("layer, options, said", [
    (nn.Linear(2, 2), {"rank": 0}, "rank 0"), (nn.Linear(2, 2), {"dropout": 1.0}, "dropout 1.0"),
    (nn.Linear(2, 2), {"alpha": float("nan")}, "alpha nan"), (nn.Conv2d(4, 4, 3, groups=2), {}, "of one group"),
    (nn.GroupNorm(1, 2), {}, "not GroupNorm")])
def test_what_cannot_be_is_said(layer, options, said):
    with pytest.raises(ValueError, match=said):
        LoRA(layer, **options)


def test_a_pattern_that_matches_nothing_is_said_and_changes_nothing(unet):
    with pytest.raises(ValueError, match="no linear layer or convolution has a name that matches 'nowhere'"):
        adapt(unet, "nowhere")
    assert all(p.requires_grad for p in unet.parameters())
