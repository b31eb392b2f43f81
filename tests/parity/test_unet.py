"""The U-Net against diffusers' UNet2DConditionModel, on copied weights of shrunken published shapes."""

import json

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel

from minidiff.nets.attention import kept
from minidiff.nets.unet import UNet, UNetConfig, micro_conditioning

XL_BLOCKS = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
             "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
SD1 = {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8, "cross_attention_dim": 24, "attention_head_dim": 4}
SD2 = {**SD1, "attention_head_dim": [2, 4, 4, 8], "use_linear_projection": True, "upcast_attention": True}
XL = {**SD2, **XL_BLOCKS, "block_out_channels": [16, 32, 32], "attention_head_dim": [2, 4, 4],
      "transformer_layers_per_block": [1, 2, 3], "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
      "projection_class_embeddings_input_dim": 10 + 6 * 8}
MINI = {"block_out_channels": [16, 32], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": [1, 2], "norm_num_groups": 8,
        "attention_head_dim": 4, "cross_attention_dim": 24}
SHAPES = {"sd1": SD1, "sd2": SD2, "sdxl": XL, "inpainting": {**MINI, "in_channels": 9},
          "lcm": {**MINI, "time_cond_proj_dim": 16}, "classes": {**MINI, "num_class_embeds": 5},
          "no-middle": {**MINI, "mid_block_type": None},
          "ddpm-time": {**MINI, "flip_sin_to_cos": False, "freq_shift": 1}}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=SHAPES)
def case(request, tmp_path):
    """(config, diffusers' net, ours read from the folder that diffusers wrote)."""
    reference = UNet2DConditionModel.from_config(SHAPES[request.param]).eval()
    reference.save_pretrained(tmp_path)
    return request.param, reference, UNet.from_pretrained(tmp_path)


def conditions(name: str) -> tuple[dict, dict]:
    """What else the two nets are told: ours, and the same for diffusers."""
    if name == "sdxl":
        pooled, sizes = torch.randn(2, 10), torch.tensor([[96.0, 64, 0, 8, 96, 64], [64.0, 64, 3, 0, 64, 80]])
        return ({"vec": micro_conditioning(pooled, sizes, 8)},
                {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}})
    if name == "classes":
        return {"vec": torch.tensor([1, 4])}, {"class_labels": torch.tensor([1, 4])}
    if name == "lcm":
        embedding = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.full((2,), 7.5), 16)
        return {"w": 7.5}, {"timestep_cond": embedding}
    return {}, {}


@pytest.mark.parametrize("size", [(8, 16), (14, 11)], ids=["multiple-of-8", "odd"])
def test_same_output_and_gradient_as_diffusers(case, size):
    name, reference, net = case
    x, context = torch.randn(2, net.config.in_channels, *size), torch.randn(2, 7, 24)
    t = torch.tensor([3.0, 961.5])
    ours, theirs = conditions(name)
    out, expected = net(x, t, context, **ours), reference(x, t, context, **theirs).sample
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for each in (out, expected):
        each.square().sum().backward()
    mine, other = dict(net.named_parameters()), dict(reference.named_parameters())
    assert mine.keys() == other.keys()
    for key in ("conv_in.weight", "time_embedding.linear_1.weight", "up_blocks.0.resnets.0.conv1.weight"):
        torch.testing.assert_close(mine[key].grad, other[key].grad, atol=1e-4, rtol=1e-3)


def test_what_we_save_loads_in_diffusers_and_is_the_same(case, tmp_path):
    name, reference, net = case
    net.save_pretrained(tmp_path / "ours")
    again, info = UNet2DConditionModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    for key, value in reference.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert UNetConfig.from_dict(saved) == net.config
    assert all(again.config[key] in (value, tuple(value) if isinstance(value, list) else value)
               for key, value in saved.items() if not key.startswith("_"))


@pytest.mark.parametrize("dtype, close", [(torch.bfloat16, 0.05), (torch.float64, 1e-5)])
def test_other_number_formats_agree(tmp_path, dtype, close):
    UNet2DConditionModel.from_config(XL).save_pretrained(tmp_path)
    net, same = UNet.from_pretrained(tmp_path), UNet.from_pretrained(tmp_path, dtype=dtype)
    x, context, vec = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24), torch.randn(2, 58)
    out = same(x.to(dtype), 10, context.to(dtype), vec.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), net(x, 10, context, vec), atol=close, rtol=close)


def test_residuals_enter_as_in_diffusers():
    reference = UNet2DConditionModel.from_config(SD1).eval()
    net = UNet(UNetConfig.from_dict(SD1))
    net.load_state_dict(reference.state_dict())
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24)
    shapes = [(16, 8)] * 3 + [(16, 4), (32, 4), (32, 4), (32, 2), (32, 2), (32, 2), (32, 1), (32, 1), (32, 1), (32, 1)]
    residuals = tuple(torch.randn(1, ch, side, side) for ch, side in shapes)
    expected = reference(x, 5, context, down_block_additional_residuals=residuals[:-1],
                         mid_block_additional_residual=residuals[-1]).sample
    torch.testing.assert_close(net(x, 5, context, residuals=residuals), expected, atol=1e-5, rtol=1e-5)


def test_keeping_the_prompts_keys_and_values_changes_nothing():
    net = UNet(UNetConfig.from_dict(SD1)).eval()
    context = torch.randn(2, 7, 24)
    rows = [(t, torch.randn(2, 4, 8, 8)) for t in (900, 500.5)]
    with torch.inference_mode():
        plain = [net(x, t, context) for t, x in rows]
        with kept(net):
            for (t, x), expected in zip(rows, plain):
                torch.testing.assert_close(net(x, t, context), expected, atol=1e-6, rtol=1e-6)
            asked = [layer.keys_values.cache_info() for layer in net.modules() if "keys_values" in vars(layer)]
    assert len(asked) == 16 and all(info.hits == info.misses == 1 for info in asked)  # each cross-attention
