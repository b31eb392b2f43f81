"""The tree of a network: shapes and counts against what the networks say themselves, operations by hand."""
import pytest
import torch

import minidiff as md
from minidiff.measure.anatomy import anatomy, walk
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.teach import tree

pytestmark = pytest.mark.quick


def test_parts_add_up_and_the_network_is_left_alone():
    unet = md.StableDiffusion.from_pretrained("mini-sd", device="cpu").unet
    whole = anatomy(unet, torch.zeros(1, 4, 16, 16), 500, torch.zeros(1, 77, 128))
    assert whole.shape == (1, 4, 16, 16) and whole.parameters == sum(p.numel() for p in unet.parameters())
    assert whole.parameters == sum(child.parameters for child in whole.children)
    assert whole.flops == sum(child.flops for child in whole.children)
    assert unet.conv_in.weight.device.type == "cpu" and not unet.conv_in._forward_hooks


def test_operations_of_attention_and_convolution_are_those_of_the_formulas():
    unet = md.StableDiffusion.from_pretrained("mini-sd", device="cpu").unet
    parts = [part for _, part in walk(anatomy(unet, torch.zeros(1, 4, 16, 16), 500, torch.zeros(1, 77, 128)))]
    conv = next(part for part in parts if part.name == "conv_in")
    assert conv.flops == 2 * 64 * 4 * 9 * 16 * 16
    cross = next(part for part in parts if part.name == "attn2")  # 128 channels on 8×8, 77 tokens of width 128
    n, m, ch = 64, 77, 128
    assert cross.shape == (1, n, ch) and cross.flops == 2 * (2 * n * ch * ch + 2 * m * ch * ch + 2 * n * m * ch)


def test_the_full_unet_takes_no_memory_and_has_the_published_size():
    with torch.device("meta"):
        unet = UNet(UNetConfig(cross_attention_dim=768))
    whole = anatomy(unet, torch.zeros(1, 4, 64, 64), 500, torch.zeros(1, 77, 768))
    assert whole.parameters == 859_520_964 and round(whole.flops / 1e9) == 803


def test_the_tree_opens_every_module(monkeypatch, capsys):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Sequential(torch.nn.ReLU()))
    part, shown = anatomy(net, torch.zeros(1, 3, 6, 6)), []
    tree(part, "a small net")
    assert "8×4×4" in capsys.readouterr().out
    monkeypatch.setattr("IPython.get_ipython", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    tree(part, 'a "small" net', depth=1)
    page = shown[0]["text/html"]
    assert page.count("<details") == 2 and page.count(" open") == 0 and "ReLU" in page and "&quot;small&quot;" in page
    with pytest.raises(ValueError, match="alt is empty"):
        tree(part, " ")
