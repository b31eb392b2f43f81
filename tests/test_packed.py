"""Packed layers give the plain layers' output, and leave nothing behind."""

import pytest
import torch
from torch import nn

from minidiff.nets import packed as module
from minidiff.nets.packed import available, packed
from minidiff.nets.unet import UNet, UNetConfig

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not available(nn.Linear(1, 1)), reason="this torch has no oneDNN"),
]


@pytest.fixture(autouse=True)
def every_layer_counts(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", 0)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), heads=2, cross_attention_dim=12, norm_num_groups=4,
    )  # fmt: skip
    return UNet(config).eval()


def fast(net: nn.Module) -> int:
    """How many layers run packed now."""
    return sum("forward" in vars(layer) for layer in net.modules())


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 8, 8), (3, 7, 10)])
@torch.inference_mode()
def test_packed_equals_plain_and_leaves_nothing_behind(unet, batch, height, width):
    x, context = torch.randn(batch, 4, height, width), torch.randn(batch, 5, 12)
    plain = unet(x, 500.0, context)
    with packed(unet):
        assert fast(unet) > 50
        for _ in range(2):  # the second call finds the weights laid out
            torch.testing.assert_close(unet(x, 500.0, context), plain, rtol=1e-5, atol=1e-5)
    assert fast(unet) == 0
    assert torch.equal(unet(x, 500.0, context), plain)


@torch.inference_mode()
def test_nets_with_a_large_weight_and_layers_that_are_given_large_maps_stay_plain(unet, monkeypatch):
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    plain = unet(x, 500.0, context)
    largest = max(m.weight.numel() for m in unet.modules() if type(m) in module.FAST)
    for limit in (largest, largest - 1):
        monkeypatch.setattr(module, "LARGEST", limit)
        with packed(unet):
            assert bool(fast(unet)) == (limit == largest)
    monkeypatch.setattr(module, "LARGEST", 2**20)
    monkeypatch.setattr(module, "POSITIONS", 0)
    for op in module.OPS:
        monkeypatch.setattr(torch.ops.mkldnn, op, None)  # not callable
    with packed(unet):
        assert torch.equal(unet(x, 500.0, context), plain)


@torch.inference_mode()
def test_small_products_stay_plain(monkeypatch):
    linear, x = nn.Linear(64, 48), torch.randn(5, 64)
    monkeypatch.setattr(module, "SMALLEST", 5 * 64 * 48 + 1)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    with packed(linear):
        assert torch.equal(linear(x), linear(x))


@torch.inference_mode()
def test_every_form_of_layer_and_input_is_kept():
    conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2, bias=False)
    linear = nn.Linear(6, 5, bias=False)
    maps, rows = torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last), torch.randn(6, 3, 4).permute(1, 2, 0)
    with packed(conv), packed(linear):
        results = conv(maps), linear(rows), linear(torch.ones(6))
    for result, expected in zip(results, (conv(maps), linear(rows), linear(torch.ones(6))), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_weights_changed_between_runs_count():
    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    for factor in (1.0, 3.0):
        layer.weight.data.fill_(factor)
        layer.bias.data.zero_()
        with packed(layer):
            torch.testing.assert_close(layer(x), torch.full((1, 4), 4 * factor))


@torch.inference_mode()
def test_two_runs_may_interleave(unet):
    first, second = packed(unet), packed(unet)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert fast(unet) == 0


def test_an_error_inside_restores_the_layers(unet):
    with pytest.raises(RuntimeError, match="inside"), packed(unet):
        raise RuntimeError("inside")
    assert fast(unet) == 0


def test_other_dtypes_devices_and_autocast_stay_plain():
    assert not available(nn.Linear(2, 2).bfloat16())
    assert not available(nn.Linear(2, 2, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not available(nn.Linear(2, 2))
