"""Shrunken random-weight models of every family of Stable Diffusion, built and written by diffusers itself."""

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from minidiff.io.tokenizer import train_tokenizer
from minidiff.sd.scheduler import NAMES
from tests import tiny

XL_UNET = {**tiny.UNET, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 24 + 32,
           "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
           "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "attention_head_dim": (2, 4),
           "transformer_layers_per_block": (1, 2), "projection_class_embeddings_input_dim": 20 + 6 * 8}
# samplers whose pictures diffusers' classes draw otherwise, and the test that says why
OTHERWISE = {"dpmpp_sde": "test_dpmpp_sde_equals_diffusers_on_the_same_brownian_path",
             "ddpm_large": "test_the_last_step_adds_no_noise"}
SAMPLERS = [name for name in NAMES if name not in OTHERWISE]
FAMILIES = {
    "sd1": {"scheduler": "PNDMScheduler", "skip_prk_steps": True},
    "sd2": {"prediction_type": "v_prediction", "unet": {"use_linear_projection": True, "attention_head_dim": (2, 4)}},
    "zero-snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "inpaint": {"pipeline": "StableDiffusionInpaintPipeline", "unet": {"in_channels": 9}},
    "lcm": {"pipeline": "LatentConsistencyModelPipeline", "scheduler": "LCMScheduler",
            "unet": {"time_cond_proj_dim": 16}},
    "sdxl": {"pipeline": "StableDiffusionXLPipeline", "scheduler": "EulerDiscreteScheduler", "unet": XL_UNET},
}


def scheduler_of(sampler: str, config: dict):
    """What diffusers' class of this sampler makes of a model's config; plms is PNDM without Runge-Kutta steps."""
    made = NAMES[sampler]
    return getattr(diffusers, made["_class_name"]).from_config({"skip_prk_steps": True, **config, **made})


def build(folder, name: str) -> diffusers.DiffusionPipeline:
    """The model of a family, in `folder`/model too."""
    family = {"pipeline": "StableDiffusionPipeline", "scheduler": "DDIMScheduler", "unet": {}, **FAMILIES[name]}
    own, unet = getattr(diffusers, family.pop("pipeline")), family.pop("unet")
    scheduler = getattr(diffusers, family.pop("scheduler")).from_config({**tiny.SCHEDULER, **family})
    train_tokenizer(tiny.CAPTIONS, folder / "words")
    words = CLIPTokenizer.from_pretrained(folder / "words")
    ids = {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    n = len(tiny.VAE_["block_out_channels"])
    torch.manual_seed(0)
    parts = {"text_encoder": CLIPTextModel(CLIPTextConfig(**tiny.TEXT, **ids)), "tokenizer": words,
             "unet": diffusers.UNet2DConditionModel(**{**tiny.UNET, **unet}), "scheduler": scheduler,
             "vae": diffusers.AutoencoderKL(**tiny.VAE_, down_block_types=("DownEncoderBlock2D",) * n,
                                            up_block_types=("UpDecoderBlock2D",) * n, latent_channels=4)}
    if name == "sdxl":
        second = CLIPTextConfig(**{**tiny.TEXT, **ids, "hidden_size": 32, "projection_dim": 20, "hidden_act": "gelu"})
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(second), "tokenizer_2": words,
                  "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    theirs = own(**parts)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "model")
    return theirs


def as_class(theirs: diffusers.DiffusionPipeline, name: str) -> diffusers.DiffusionPipeline:
    """The same networks and scheduler in another of diffusers' pipelines."""
    more = {} if "XL" in name else {"requires_safety_checker": False}
    pipe = getattr(diffusers, name)(**theirs.components, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe
