"""ControlNet against diffusers: the network on copied weights, then whole pictures."""

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from torch.testing import assert_close

from minidiff.nets.controlnet import ControlNet, ControlNetConfig
from minidiff.nets.unet import UNet, micro_conditioning
from minidiff.sd.pipeline import StableDiffusion
from tests import test_unet as published
from tests import tiny
from tests.parity import families
from tests.parity.test_families import load, mask
from tests.parity.test_pipeline import PROMPTS, build, generators, picture, swap
from tests.parity.test_unet import MINI, SD1, SD2, XL

LOOK = {"conditioning_embedding_out_channels": (4, 8, 8)}  # three convolutions: pixels to latents fourfold smaller
PLAIN = {"block_out_channels": [16, 32], "down_block_types": ["DownBlock2D"] * 2, "norm_num_groups": 8,
         "mid_block_type": "UNetMidBlock2D", "attention_head_dim": 4}
SHAPES = {"sd1": SD1, "sd2": SD2, "sdxl": XL, "mini": {**MINI, "layers_per_block": 1}, "no-attention": PLAIN,
          "bgr": {**PLAIN, "controlnet_conditioning_channel_order": "bgr", "conditioning_channels": 4},
          "pooled": {**PLAIN, "global_pool_conditions": True}}


def control_net(seed: int, **config) -> diffusers.ControlNetModel:
    """diffusers' net, its zero convolutions filled with numbers."""
    torch.manual_seed(seed)
    net = diffusers.ControlNetModel.from_config({**LOOK, **config}).eval()
    for name, p in net.named_parameters():
        if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")):
            torch.nn.init.normal_(p, std=0.2)
    return net


@pytest.mark.parametrize("guess", [False, True], ids=["", "guess"])
@pytest.mark.parametrize("name", SHAPES)
def test_same_residuals_as_diffusers(name, guess, tmp_path):
    config = {k: v for k, v in SHAPES[name].items() if k != "up_block_types"}
    theirs = control_net(0, **config)
    theirs.save_pretrained(tmp_path)
    ours = ControlNet.from_pretrained(tmp_path)
    x, context = torch.randn(2, 4, 16, 24), torch.randn(2, 7, 24)
    image, t = torch.rand(2, config.get("conditioning_channels", 3), 64, 96), torch.tensor([3.0, 961.0])
    vec, added = None, None
    if name == "sdxl":
        pooled, sizes = torch.randn(2, 10), torch.tensor([[96.0, 64, 0, 8, 96, 64], [64.0, 64, 3, 0, 64, 80]])
        vec, added = micro_conditioning(pooled, sizes, 8), {"text_embeds": pooled, "time_ids": sizes}
    with torch.no_grad():
        down, middle = theirs(x, t, context, image, 1.0, added_cond_kwargs=added, guess_mode=guess, return_dict=False)
        got = ours(x, t, context, vec, hint=ours.look(image), guess=guess)
    assert len(got) == len(down) + 1
    for mine, want in zip(got, [*down, middle]):
        assert_close(mine, want, atol=1e-5, rtol=1e-5)
    assert got[-1].abs().max() > 0.01


@pytest.mark.parametrize("name", ["SD1", "SD2", "XL"])
def test_published_networks_have_diffusers_keys_and_shapes(name):
    config = {k: v for k, v in getattr(published, name).items() if k not in ("up_block_types", "sample_size")}
    with torch.device("meta"):
        ours = ControlNet(ControlNetConfig.from_dict(config)).state_dict()
    with init_empty_weights():
        theirs = diffusers.ControlNetModel.from_config(config).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_diffusers_loads_what_we_save(tmp_path):
    control_net(0, **SHAPES["mini"] | {"up_block_types": None}).save_pretrained(tmp_path / "theirs")
    ours = ControlNet.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    theirs, report = diffusers.ControlNetModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(theirs.state_dict()[k], v) for k, v in ours.state_dict().items())


def test_gradients_are_diffusers_on_copied_weights(tmp_path):
    theirs = control_net(3, **SHAPES["mini"] | {"up_block_types": None})
    theirs.save_pretrained(tmp_path)
    ours = ControlNet.from_pretrained(tmp_path).double()
    theirs = theirs.double()
    g = torch.Generator().manual_seed(0)
    c = ours.config
    x = torch.randn(2, c.in_channels, 8, 8, generator=g).double()
    context = torch.randn(2, 7, c.cross_attention_dim, generator=g).double()
    picture = torch.rand(2, 3, 8 * c.factor, 8 * c.factor, generator=g).double()
    residuals = ours(x, 7.0, context, hint=ours.look(picture))
    down, middle = theirs(x, 7.0, context, controlnet_cond=picture, return_dict=False)
    for mine, other in zip(residuals, (*down, middle), strict=True):
        assert_close(mine, other)
    sum(r.square().sum() for r in residuals).backward()
    sum(r.square().sum() for r in (*down, middle)).backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, wanted[name].grad, rtol=1e-6, atol=1e-9)


def test_from_unet_copies_what_diffusers_copies(tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**tiny.UNET)
    theirs.save_pretrained(tmp_path)
    want = diffusers.ControlNetModel.from_unet(theirs, conditioning_embedding_out_channels=(4, 8, 8)).state_dict()
    got = ControlNet.from_unet(UNet.from_pretrained(tmp_path), (4, 8, 8)).state_dict()
    assert got.keys() == want.keys()
    free = "controlnet_cond_embedding"                                   # drawn at random
    assert all(torch.equal(got[k], v) for k, v in want.items() if not k.startswith(free) or "conv_out" in k)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """diffusers' pipeline and ours, and two ControlNets for each."""
    folder = tmp_path_factory.mktemp("controlled")
    theirs = build(folder)
    nets = [control_net(seed, **{k: tiny.UNET[k] for k in ("block_out_channels", "layers_per_block", "norm_num_groups",
                                                           "cross_attention_dim", "down_block_types",
                                                           "attention_head_dim")}) for seed in (1, 2)]
    for i, net in enumerate(nets):
        net.save_pretrained(folder / f"{i}")
    ours = [ControlNet.from_pretrained(folder / f"{i}") for i in range(2)]
    return theirs, StableDiffusion.from_pretrained(folder / "model", device="cpu"), nets, ours


def controlled_pipe(theirs, nets, kind: str = ""):
    pipe = getattr(diffusers, f"StableDiffusionControlNet{kind}Pipeline")(
        **theirs.components, controlnet=nets, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


THEIRS = {"control_scale": "controlnet_conditioning_scale", "control_start": "control_guidance_start",
          "control_end": "control_guidance_end"}


@pytest.mark.parametrize("settings", [
    {"control_scale": 0.7}, {"guess_mode": True}, {"guess_mode": True, "guidance_scale": 1.0}, {"guidance_scale": 1.0},
    {"control_start": 0.2, "control_end": 0.7}, {"control_end": 0.5, "control_scale": 2.0}, {"height": 24, "width": 40},
    ], ids=lambda settings: "-".join(settings))
def test_controlled_pictures_are_diffusers(models, settings):
    theirs, ours, nets, mine = models
    want = controlled_pipe(theirs, nets[0])(
        PROMPTS[0], picture(32), num_inference_steps=6, generator=generators(1), output_type="pt",
        **{THEIRS.get(k, k): v for k, v in settings.items()}).images
    run = {"steps": 6, "output": "tensor"}
    got = ours(PROMPTS[0], controlnet=mine[0], control_image=picture(32), **run, **settings)
    assert_close(got, want, atol=1e-4, rtol=0)
    plain = {k: v for k, v in settings.items() if "control" not in k and k != "guess_mode"}
    assert (ours(PROMPTS[0], **run, **plain) - got).abs().max() > 0.01


@pytest.mark.parametrize("sampler", ["heun", "plms", "unipc", "euler_ancestral"])
def test_the_window_counts_network_calls_as_diffusers_does(models, sampler):
    theirs, ours, nets, mine = models
    scheduler = theirs.scheduler
    swap(theirs, sampler)
    want = controlled_pipe(theirs, nets[0])(
        PROMPTS[0], picture(32), num_inference_steps=5, generator=generators(1), output_type="pt",
        control_guidance_start=0.3, control_guidance_end=0.75).images
    theirs.scheduler = scheduler
    got = ours(PROMPTS[0], steps=5, sampler=sampler, output="tensor", controlnet=mine[0], control_image=picture(32),
               control_start=0.3, control_end=0.75)
    assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guess", [False, True], ids=["", "guess"])
def test_two_controlnets_add_up_as_in_diffusers(models, guess):
    theirs, ours, nets, mine = models
    images = [picture(32), picture(32).rotate(90)]
    want = controlled_pipe(theirs, nets)(
        PROMPTS, images, num_inference_steps=5, generator=generators(4, 3), output_type="pt", guess_mode=guess,
        num_images_per_prompt=2, controlnet_conditioning_scale=[0.5, 1.2], control_guidance_start=[0.0, 0.3],
        control_guidance_end=[0.8, 1.0]).images
    got = ours(PROMPTS, steps=5, seed=3, output="tensor", num_images=2, controlnet=mine, control_image=images,
               guess_mode=guess, control_scale=[0.5, 1.2], control_start=[0.0, 0.3], control_end=[0.8, 1.0])
    assert_close(got, want, atol=1e-4, rtol=0)


def test_without_a_size_the_control_image_gives_it(models):
    theirs, ours, nets, mine = models
    image = picture(64).crop((0, 0, 47, 38))
    want = controlled_pipe(theirs, nets[0])(PROMPTS[0], image, num_inference_steps=4, generator=generators(1),
                                            output_type="pt").images
    got = ours(PROMPTS[0], steps=4, output="tensor", controlnet=mine[0], control_image=image)
    assert got.shape == (1, 3, 36, 44)
    assert_close(got, want, atol=1e-4, rtol=0)


def test_controlled_img2img_is_diffusers(models):
    theirs, ours, nets, mine = models
    want = controlled_pipe(theirs, nets[0], "Img2Img")(
        PROMPTS[0], picture(32), picture(32).rotate(90), strength=0.6, num_inference_steps=8, generator=generators(1),
        output_type="pt", controlnet_conditioning_scale=0.9, control_guidance_end=0.6).images
    got = ours.img2img(PROMPTS[0], picture(32), strength=0.6, steps=8, output="tensor", controlnet=mine[0],
                       control_image=picture(32).rotate(90), control_scale=0.9, control_end=0.6)
    assert_close(got, want, atol=1e-4, rtol=0)


ENCODER = ("block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim", "down_block_types",
           "attention_head_dim", "use_linear_projection", "addition_embed_type", "addition_time_embed_dim",
           "transformer_layers_per_block", "projection_class_embeddings_input_dim")


@pytest.mark.parametrize("guess", [False, True], ids=["", "guess"])
def test_controlled_sdxl_pictures_are_diffusers(guess, tmp_path):
    theirs = families.build(tmp_path, "sdxl")
    net = control_net(1, **{k: v for k, v in theirs.unet.config.items() if k in ENCODER})
    net.save_pretrained(tmp_path / "net")
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**theirs.components, controlnet=net, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    want = pipe(PROMPTS[0], image=picture(32), num_inference_steps=4, generator=generators(1), output_type="pt",
                controlnet_conditioning_scale=0.8, guess_mode=guess, negative_prompt="night").images
    got = load(tmp_path / "model")(
        PROMPTS[0], steps=4, output="tensor", controlnet=ControlNet.from_pretrained(tmp_path / "net"),
        control_image=picture(32), control_scale=0.8, guess_mode=guess, guidance_scale=5.0, negative_prompt="night")
    assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["inpaint", "sd2"])
def test_controlled_inpainting_is_diffusers(name, tmp_path):
    theirs = families.build(tmp_path, name)
    net = control_net(1, **{k: v for k, v in theirs.unet.config.items() if k in ENCODER})
    net.save_pretrained(tmp_path / "net")
    components = {"image_encoder": None, **theirs.components}
    pipe = diffusers.StableDiffusionControlNetInpaintPipeline(**components, controlnet=net,
                                                              requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    want = pipe(PROMPTS[0], picture(32), mask(), picture(32).rotate(90), num_inference_steps=5, generator=generators(1),
                output_type="pt", controlnet_conditioning_scale=0.8).images
    got = load(tmp_path / "model").inpaint(
        PROMPTS[0], picture(32), mask(), steps=5, output="tensor", control_scale=0.8,
        controlnet=ControlNet.from_pretrained(tmp_path / "net"), control_image=picture(32).rotate(90))
    assert_close(got, want, atol=1e-4, rtol=0)
