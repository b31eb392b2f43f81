"""Whole pictures equal diffusers' pipelines on the same weights, seeds and schedulers: pixels to 1e-4."""

import diffusers
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from minidiff.data import scenes
from minidiff.pipeline import CLASSES, StableDiffusion
from minidiff.text import train_tokenizer
from tests import tiny

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
    """Give diffusers' pipeline the scheduler that `sampler=name` means."""
    if name:
        theirs.scheduler = getattr(diffusers, CLASSES[name]).from_config(theirs.scheduler.config)


def picture(size: int) -> Image.Image:
    return scenes.render(1, size, seed=3)[0][0].permute(1, 2, 0).numpy().pipe(Image.fromarray)


@pytest.mark.parametrize("name", [None, *CLASSES])
def test_every_sampler_draws_diffusers_picture(models, name):
    theirs, ours = models
    scheduler = theirs.scheduler
    swap(theirs, name)
    want = theirs(PROMPTS[0], num_inference_steps=7, generator=generators(1, 5), output_type="pt").images
    theirs.scheduler = scheduler
    assert_close(ours(PROMPTS[0], steps=7, seed=5, sampler=name, output="tensor"), want, atol=1e-4, rtol=0)
