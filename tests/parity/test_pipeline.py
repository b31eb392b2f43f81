"""Whole pictures equal diffusers' pipelines on the same weights, seeds and schedulers: pixels to 1e-4."""

import json

import diffusers
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from minidiff.data import scenes
from minidiff.io.tokenizer import train_tokenizer
from minidiff.sd.pipeline import StableDiffusion
from tests import tiny
from tests.parity.families import SAMPLERS, scheduler_of

PROMPTS = ["a large red house on the left, snow, night, stars", "two boats"]


def build(folder, **scheduler):
    """A random SD1-like model, written by diffusers itself; returns diffusers' pipeline."""
    train_tokenizer(tiny.CAPTIONS, folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    torch.manual_seed(0)
    config = CLIPTextConfig(**tiny.TEXT, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                            eos_token_id=tokenizer.eos_token_id, max_position_embeddings=77)
    n = len(tiny.VAE_["block_out_channels"])
    theirs = diffusers.StableDiffusionPipeline(
        text_encoder=CLIPTextModel(config), tokenizer=tokenizer, unet=diffusers.UNet2DConditionModel(**tiny.UNET),
        vae=diffusers.AutoencoderKL(**tiny.VAE_, down_block_types=("DownEncoderBlock2D",) * n,
                                    up_block_types=("UpDecoderBlock2D",) * n, latent_channels=4),
        scheduler=diffusers.DDIMScheduler.from_config({**tiny.SCHEDULER, **scheduler}),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "model")
    return theirs


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1")
    theirs = build(folder)
    return theirs, StableDiffusion.from_pretrained(folder / "model", device="cpu")


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def swap(theirs, name: str | None):
    """Give diffusers' pipeline the scheduler that `sampler=name` means; plms is PNDM without Runge-Kutta steps."""
    if name:
        theirs.scheduler = scheduler_of(name, theirs.scheduler.config)


def picture(size: int) -> Image.Image:
    return Image.fromarray(scenes.render(1, size, seed=3)[0][0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", [None, *SAMPLERS])
def test_every_sampler_draws_diffusers_picture(models, name):
    theirs, ours = models
    scheduler = theirs.scheduler
    swap(theirs, name)
    want = theirs(PROMPTS[0], num_inference_steps=7, generator=generators(1, 5), output_type="pt").images
    theirs.scheduler = scheduler
    got = ours(PROMPTS[0], steps=7, seed=5, sampler=name, guidance_scale=7.5, output="tensor")
    assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [
    {"guidance_scale": 1.0}, {"guidance_scale": 0.0}, {"guidance_scale": 3.0, "negative_prompt": "a tree, sunset"},
    {"guidance_rescale": 0.7}, {"eta": 0.6}, {"height": 40, "width": 24}], ids=lambda settings: "-".join(settings))
def test_settings_mean_what_they_mean_in_diffusers(models, settings):
    theirs, ours = models
    want = theirs(PROMPTS[0], num_inference_steps=6, generator=generators(1), output_type="pt", **settings).images
    assert_close(ours(PROMPTS[0], steps=6, output="tensor", **settings), want, atol=1e-4, rtol=0)


def test_a_batch_is_prompt_major_with_one_generator_per_image(models):
    theirs, ours = models
    negative = ["a tree", ""]
    want = theirs(PROMPTS, negative_prompt=negative, num_images_per_prompt=2, num_inference_steps=5,
                  generator=generators(4, 7), output_type="pt", eta=1.0).images
    got = ours(PROMPTS, negative_prompt=negative, num_images=2, steps=5, seed=7, output="tensor", eta=1.0)
    assert_close(got, want, atol=1e-4, rtol=0)


def test_8_bit_pictures_differ_by_rounding_only(models):
    theirs, ours = models
    want = theirs(PROMPTS[0], num_inference_steps=5, generator=generators(1)).images[0]
    got = ours(PROMPTS[0], steps=5)[0]
    assert max(high for _, high in Image.merge("RGB", [_difference(a, b) for a, b in zip(got.split(), want.split())])
               .getextrema()) <= 1


def _difference(a: Image.Image, b: Image.Image) -> Image.Image:
    from PIL import ImageChops

    return ImageChops.difference(a, b)


def test_latents_and_embeddings_can_be_given(models):
    theirs, ours = models
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    context, vec = ours.text([PROMPTS[0]])
    other, _ = ours.text(["sunset"])
    want = theirs(prompt_embeds=context, negative_prompt_embeds=other, latents=noise, num_inference_steps=5,
                  generator=generators(1), output_type="pt").images
    got = ours(prompt_embeds=(context, vec), negative_prompt_embeds=(other, None), latents=noise, steps=5,
               output="tensor")
    assert_close(got, want, atol=1e-4, rtol=0)


def img2img(theirs):
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**theirs.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# lms, plms: diffusers cuts the list of times but not the history, test_a_slice_starts_lms_with_one_derivative
@pytest.mark.parametrize("name", [None, *(name for name in SAMPLERS if name not in ("lms", "plms"))])
def test_img2img_redraws_diffusers_picture(models, name):
    theirs, ours = models
    scheduler = theirs.scheduler
    swap(theirs, name)
    want = img2img(theirs)(PROMPTS[0], picture(32), strength=0.55, num_inference_steps=8, generator=generators(1, 2),
                           output_type="pt").images
    theirs.scheduler = scheduler
    got = ours.img2img(PROMPTS[0], picture(32), strength=0.55, steps=8, seed=2, sampler=name, guidance_scale=7.5,
                       output="tensor")
    assert_close(got, want, atol=1e-4, rtol=0)


def test_img2img_takes_odd_pictures_full_strength_and_several_images(models):
    theirs, ours = models
    image = picture(64).crop((0, 0, 47, 38))
    want = img2img(theirs)(PROMPTS[0], image, strength=1.0, num_inference_steps=4, generator=generators(3), eta=1.0,
                           num_images_per_prompt=3, output_type="pt").images
    got = ours.img2img(PROMPTS[0], image, strength=1.0, steps=4, num_images=3, eta=1.0, output="tensor")
    assert_close(got, want, atol=1e-4, rtol=0)
    assert got.shape == (3, 3, 36, 44)


def test_v_prediction_follows_the_config(tmp_path):
    theirs = build(tmp_path, prediction_type="v_prediction")
    ours = StableDiffusion.from_pretrained(tmp_path / "model", device="cpu")
    want = theirs(PROMPTS[0], num_inference_steps=5, generator=generators(1), output_type="pt").images
    assert ours.kind == "v"
    assert_close(ours(PROMPTS[0], steps=5, output="tensor"), want, atol=1e-4, rtol=0)


def test_pipeline_forces_steps_offset(tmp_path):
    build(tmp_path)
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "steps_offset": 0, "clip_sample": True}))
    with pytest.warns(FutureWarning, match="should be set to"):
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(path.parent.parent))
    theirs.set_progress_bar_config(disable=True)
    ours = StableDiffusion.from_pretrained(tmp_path / "model", device="cpu")
    want = theirs(PROMPTS[0], num_inference_steps=5, generator=generators(1), output_type="pt").images
    assert_close(ours(PROMPTS[0], steps=5, output="tensor"), want, atol=1e-4, rtol=0)


def test_diffusers_loads_what_we_save(models, tmp_path):
    _, ours = models
    ours.save_pretrained(tmp_path)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    want = theirs(PROMPTS[0], num_inference_steps=5, generator=generators(1), output_type="pt").images
    assert_close(ours(PROMPTS[0], steps=5, output="tensor"), want, atol=1e-4, rtol=0)


def test_diffusers_draws_the_shipped_models_picture():
    from minidiff.io.weights import weights_dir

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(weights_dir() / "mini-sd"), dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    ours = StableDiffusion.from_pretrained("mini-sd", device="cpu")
    want = theirs(PROMPTS, num_inference_steps=25, generator=generators(2), output_type="pt").images
    assert_close(ours(PROMPTS, output="tensor"), want, atol=1e-4, rtol=0)
