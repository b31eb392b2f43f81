"""The U-Net on its own: parameter counts of the published models, configs, gradients, bad configs."""
import pytest
import torch

from minidiff.nets.attention import kept
from minidiff.nets.unet import UNet, UNetConfig

pytestmark = pytest.mark.quick
SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8, "_diffusers_version": "0.6.0", "act_fn": "silu",
       "center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1, "sample_size": 64}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
       "upcast_attention": True, "dual_cross_attention": False, "class_embed_type": None}
XL = {"block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
      "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
      "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
      "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "upcast_attention": None,
      "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
TINY = UNetConfig(block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), heads=2, cross_attention_dim=6,
                  layers_per_block=1, norm_num_groups=4, in_channels=2, out_channels=2)


@pytest.mark.parametrize("config, tensors, parameters", [(SD1, 686, 859_520_964), (SD2, 686, 865_910_724),
                                                         (XL, 1680, 2_567_463_684)], ids=["sd1", "sd2", "sdxl"])
def test_published_models_have_exactly_their_parameters(config, tensors, parameters):
    with torch.device("meta"):
        net = UNet(UNetConfig.from_dict(config))
    assert len(net.state_dict()) == tensors
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("t", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0])])
def test_time_may_be_one_number_or_one_for_each(t):
    net = UNet(TINY).eval()
    x, context = torch.randn(2, 2, 4, 6), torch.randn(2, 3, 6)
    torch.testing.assert_close(net(x, t, context), net(x, torch.tensor([7, 7]), context))


def test_the_time_of_each_picture_reaches_that_picture_only():
    net = UNet(TINY).eval()
    x, context = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 6)
    both = net(x, torch.tensor([10, 800]), context)
    for i, t in enumerate((10, 800)):
        torch.testing.assert_close(both[i:i + 1], net(x[i:i + 1], t, context[i:i + 1]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both, net(x, 10, context), atol=1e-3)


def test_gradients_are_those_of_the_function():
    torch.manual_seed(0)
    net = UNet(TINY).double()
    x, context = (torch.randn(1, 2, 2, 3).double().requires_grad_(), torch.randn(1, 2, 6).double().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, context: net(x, 500, context), (x, context))


def test_without_gradients_the_output_is_the_same():
    net = UNet(TINY)
    x, context = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 6)
    before = x.clone()
    with torch.inference_mode():
        fast = net(x, 3, context)
    torch.testing.assert_close(fast, net(x, 3, context))
    assert torch.equal(x, before)


def test_trains_under_bfloat16_autocast():
    net = UNet(TINY)
    x, context = torch.randn(2, 2, 8, 8), torch.randn(2, 3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, torch.tensor([1, 999]), context)
    torch.testing.assert_close(out.float(), net(x, torch.tensor([1, 999]), context), atol=0.05, rtol=0.05)
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_a_net_without_context_attends_to_itself_only():
    config = UNetConfig.from_dict({**TINY.to_dict(), "cross_attention_dim": None, "num_class_embeds": 3})
    net = UNet(config).eval()
    x = torch.randn(2, 2, 4, 4)
    assert not any("attn2" in name for name in net.state_dict())
    out = net(x, 5, vec=torch.tensor([0, 2]))
    assert not torch.allclose(out, net(x, 5, vec=torch.tensor([1, 2])))


def test_too_few_residuals_are_noticed():
    with pytest.raises(ValueError):
        UNet(TINY)(torch.zeros(1, 2, 4, 4), 1, torch.zeros(1, 1, 6), residuals=(torch.zeros(1),) * 3)


LATE = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
NEVER = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "mid_block_type": None}


@pytest.mark.parametrize("config", [{}, LATE, NEVER, {**LATE, "num_class_embeds": 3}],
                         ids=["at-once", "late", "never", "classes"])
def test_several_prompts_for_one_state_equal_copies_of_it(config):
    torch.manual_seed(0)
    net = UNet(UNetConfig.from_dict({**TINY.to_dict(), **config})).eval()
    x, context = torch.randn(2, 2, 8, 6), torch.randn(4, 7, TINY.cross_attention_dim)
    more = {"vec": torch.tensor([0, 1, 2, 0])} if config.get("num_class_embeds") else {}
    truth = net(torch.cat([x, x]), 300, context, **more)
    torch.testing.assert_close(net(x, 300, context, **more), truth)
    with torch.inference_mode(), kept(net):
        torch.testing.assert_close(net(x, 300, context, **more), truth)


@pytest.mark.parametrize("change", [{"addition_time_embed_dim": None}, {"addition_time_embed_dim": 7},
                                    {"projection_class_embeddings_input_dim": None}])
def test_a_vec_without_its_widths_is_named(change):
    with pytest.raises(ValueError, match="addition_embed_type needs both, the first of them even"):
        UNetConfig.from_dict({"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                              "projection_class_embeddings_input_dim": 68, **change})
