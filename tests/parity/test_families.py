"""Every family draws diffusers' picture, with every feature that the others lack: pixels to 1e-4."""

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from minidiff.data import scenes
from minidiff.io.plain_text import read_json
from minidiff.nets.unet import UNet
from minidiff.nets.vae import VAE
from minidiff.sd.pipeline import StableDiffusion
from minidiff.text import Text
from tests import rules, series
from tests.parity.families import FAMILIES, SAMPLERS, as_class, build, scheduler_of

PROMPT = "a large red house on the left, snow, night, stars"


def load(folder):
    index = read_json(folder / "model_index.json")
    return StableDiffusion(Text.from_pretrained(folder), UNet.from_pretrained(folder / "unet"),
                           VAE.from_pretrained(folder / "vae"), read_json(folder / "scheduler/scheduler_config.json"),
                           index.get("force_zeros_for_empty_prompt", False))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    found = {}

    def get(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            found[name] = build(folder, name), load(folder / "model")
        return found[name]

    return get


def generators(n=1, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def picture(size=32, seed=3):
    return Image.fromarray(scenes.render(1, size, seed=seed)[0][0].permute(1, 2, 0).numpy())


def mask(size=32):
    """A slanted grey ramp: its half-way line crosses latents."""
    return Image.linear_gradient("L").rotate(30).resize((size, size))


def same(got, want):
    assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_notebook_15_draws_with_a_checkpoint_of_every_family(models, name, tmp_path, capsys):
    models(name)[1].save_pretrained(tmp_path)
    space = {}
    for _, cell in rules.each(rules.read(series.FOLDER / "15_full_stable_diffusion.ipynb"), "code", "part"):
        exec(cell.source, space)
    assert space["run_checkpoint"](None) is None and "MINIDIFF_SD" in capsys.readouterr().out
    assert space["run_checkpoint"](str(tmp_path)).size == (32, 32)
    assert "32×32 pixels" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "inpaint"])
def test_every_family_draws_diffusers_picture(models, name):
    theirs, ours = models(name)
    want = theirs(PROMPT, num_inference_steps=5, guidance_scale=5.0, generator=generators(1, 5), output_type="pt")
    same(ours(PROMPT, steps=5, guidance_scale=5.0, seed=5, output="tensor"), want.images)


def test_a_batch_of_an_lcm_has_one_w_for_each_picture(models):
    theirs, ours = models("lcm")
    want = theirs([PROMPT, "two boats"], num_inference_steps=3, num_images_per_prompt=2, generator=generators(4),
                  guidance_scale=8.5, output_type="pt").images
    same(ours([PROMPT, "two boats"], steps=3, num_images=2, guidance_scale=8.5, output="tensor"), want)


@pytest.mark.parametrize("strength, steps", [(0.5, 4), (0.8, 3), (0.33, 16), (1.0, 4)])
def test_a_latent_consistency_model_spreads_its_steps_over_what_strength_leaves(models, strength, steps):
    theirs, ours = models("lcm")
    want = as_class(theirs, "LatentConsistencyModelImg2ImgPipeline")(
        PROMPT, image=picture(48), strength=strength, num_inference_steps=steps, guidance_scale=8.5,
        generator=generators(), output_type="pt").images
    same(ours.img2img(PROMPT, picture(48), strength=strength, steps=steps, guidance_scale=8.5, output="tensor"), want)
    with pytest.raises(ValueError, match="9 sampling steps, but only 5 are left .*take fewer, or more strength"):
        ours.img2img(PROMPT, picture(48), strength=0.1, steps=9)


@pytest.mark.parametrize("settings", [
    {}, {"negative_prompt": ""}, {"negative_prompt": "sunset"}, {"guidance_scale": 1.0}, {"guidance_rescale": 0.7},
    {"prompt_2": "two boats"}, {"original_size": (64, 48), "crops_coords_top_left": (3, 5), "target_size": (40, 40)},
    {"height": 40, "width": 24}, {"clip_skip": 1}], ids=lambda settings: "-".join(settings))
def test_sdxl_settings_mean_what_they_mean_in_diffusers(models, settings):
    theirs, ours = models("sdxl")
    want = theirs(PROMPT, num_inference_steps=5, generator=generators(), output_type="pt",
                  **{"guidance_scale": 7.5, **settings}).images
    same(ours(PROMPT, steps=5, output="tensor", **settings), want)


@pytest.mark.parametrize("sampler", ["ddpm", "heun", "lcm", "euler"])
def test_x0_is_clipped_where_config_or_class_say_so(models, sampler):
    theirs, ours = models("sdxl")
    kept, config = theirs.scheduler, {**ours.scheduler, "clip_sample_range": 0.5}
    for said in ({}, {"clip_sample": True}, {"clip_sample": False}):
        config = {key: value for key, value in config.items() if key != "clip_sample"} | said
        theirs.scheduler = scheduler_of(sampler, config)
        want = theirs(PROMPT, num_inference_steps=4, generator=generators(), guidance_scale=7.5, output_type="pt")
        other = StableDiffusion(ours.text, ours.unet, ours.vae, config, ours.zeros)
        same(other(PROMPT, steps=4, sampler=sampler, guidance_scale=7.5, output="tensor"), want.images)
    theirs.scheduler = kept


def test_sdxl_batches_and_embeddings(models):
    theirs, ours = models("sdxl")
    prompts, negative = [PROMPT, "two boats"], ["sunset", ""]
    want = theirs(prompts, negative_prompt=negative, num_inference_steps=4, num_images_per_prompt=2,
                  guidance_scale=7.5, generator=generators(4), output_type="pt").images
    given, other = ours.text(prompts), ours.text(negative)
    same(ours(prompts, negative_prompt=negative, num_images=2, steps=4, output="tensor"), want)
    same(ours(prompt_embeds=given, negative_prompt_embeds=other, num_images=2, steps=4, output="tensor"), want)


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_img2img_of_other_families(models, name):
    theirs, ours = models(name)
    xl = "XL" if name == "sdxl" else ""
    want = as_class(theirs, f"StableDiffusion{xl}Img2ImgPipeline")(
        PROMPT, image=picture(48), strength=0.6, num_inference_steps=6, guidance_scale=7.5, generator=generators(),
        output_type="pt").images
    same(ours.img2img(PROMPT, picture(48), strength=0.6, steps=6, output="tensor"), want)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", ["inpaint", "sd2", "sdxl"])
def test_inpainting_repaints_diffusers_picture(models, name, strength):
    theirs, ours = models(name)
    pipe = as_class(theirs, f"StableDiffusion{'XL' if name == 'sdxl' else ''}InpaintPipeline")
    want = pipe(PROMPT, image=picture(), mask_image=mask(), height=32, width=32, strength=strength,
                num_inference_steps=6, guidance_scale=7.5, generator=generators(1, 3), output_type="pt").images
    same(ours.inpaint(PROMPT, picture(), mask(), strength=strength, steps=6, seed=3, output="tensor"), want)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", ["inpaint", "sd2", "sdxl"])
def test_an_inpainted_picture_depends_on_its_seed_alone(models, name, strength):
    """diffusers gives all pictures of a batch the first one's sample of the VAE's posterior."""
    theirs, ours = models(name)
    pipe = as_class(theirs, f"StableDiffusion{'XL' if name == 'sdxl' else ''}InpaintPipeline")
    arguments = {"image": picture(), "mask_image": mask(), "height": 32, "width": 32, "num_inference_steps": 4,
                 "strength": strength, "guidance_scale": 7.5, "output_type": "pt"}
    alone = [pipe(PROMPT, generator=generators(1, seed), **arguments).images for seed in (7, 8)]
    batch = pipe(PROMPT, generator=generators(2, 7), num_images_per_prompt=2, **arguments).images
    got = ours.inpaint(PROMPT, picture(), mask(), steps=4, strength=strength, num_images=2, seed=7, output="tensor")
    same(got, torch.cat(alone))
    assert (batch[1:] - alone[1]).abs().max() > 1e-3


# lms and plms: diffusers cuts the list of times, not the history, facts in minidiff.multistep; at strength 1 nothing is
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddim"])
@pytest.mark.parametrize("name", ["inpaint", "sd1"])
def test_inpainting_with_every_sampler(models, name, sampler):
    theirs, ours = models(name)
    pipe = as_class(theirs, "StableDiffusionInpaintPipeline")
    pipe.scheduler = scheduler_of(sampler, pipe.scheduler.config)
    for strength in (1.0, 0.6) if sampler not in ("lms", "plms") else (1.0,):
        want = pipe(PROMPT, image=picture(), mask_image=mask(), height=32, width=32, strength=strength,
                    num_inference_steps=6, generator=generators(), output_type="pt").images
        got = ours.inpaint(PROMPT, picture(), mask(), strength=strength, steps=6, sampler=sampler, guidance_scale=7.5,
                           output="tensor")
        same(got, want)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_every_sampler_means_the_class_from_the_models_config(models, name):
    theirs, ours = models(name)
    kept = theirs.scheduler
    for sampler in SAMPLERS:
        if sampler == "plms" and ours.kind == "v":
            continue  # test_plms_averages_eps_whatever_the_kind
        theirs.scheduler = scheduler_of(sampler, kept.config)
        want = theirs(PROMPT, num_inference_steps=5, guidance_scale=7.5, generator=generators(), output_type="pt")
        same(ours(PROMPT, steps=5, sampler=sampler, guidance_scale=7.5, output="tensor"), want.images)
    theirs.scheduler = kept
