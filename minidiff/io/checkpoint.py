"""Single files: which family of Stable Diffusion one is, the configs that it does not carry, and its parts."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from minidiff.io.plain_text import read_json
from minidiff.io.weights import State

PARTS = {  # what the names of a network's weights begin with
    "unet": ("model.diffusion_model.",), "vae": ("first_stage_model.", "vae."), "controlnet": ("control_model.",),
    "text_encoder": ("cond_stage_model.transformer.", "cond_stage_model.model.",
                     "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("conditioner.embedders.1.model.",)}
EMA = "model_ema.diffusion_model"  # then the U-Net's names without dots

_BETAS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
          "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
_PNDM = {"_class_name": "PNDMScheduler", **_BETAS, "skip_prk_steps": True, "prediction_type": "epsilon"}
_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
_CLIP = {"eos_token_id": 2, "architectures": ["CLIPTextModel"], "hidden_size": 768, "intermediate_size": 3072,
         "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768}
_UNET = {"sample_size": 64, "cross_attention_dim": 768}
_UNET_2 = {"sample_size": 64, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
           "use_linear_projection": True}
_SD_2 = {"unet": _UNET_2, "vae": _VAE, "scheduler": _PNDM,
         "text_encoder": {**_CLIP, "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
                          "num_attention_heads": 16, "num_hidden_layers": 23, "projection_dim": 512}}
# the published configs, as far as they are not the classes' defaults
FAMILIES: dict[str, dict[str, dict]] = {
    "sd1": {"unet": _UNET, "vae": _VAE, "text_encoder": _CLIP, "scheduler": _PNDM},
    "sd2-base": _SD_2,
    "sd2": {**_SD_2, "unet": {**_UNET_2, "sample_size": 96},
            "scheduler": {"_class_name": "DDIMScheduler", **_BETAS, "prediction_type": "v_prediction"}},
    "sdxl": {
        "unet": {"sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
                 "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                 "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                 "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
                 "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                 "projection_class_embeddings_input_dim": 2816},
        "vae": {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder": _CLIP,
        "text_encoder_2": {**_CLIP, "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu",
                           "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
                           "num_hidden_layers": 32, "projection_dim": 1280},
        "scheduler": {"_class_name": "EulerDiscreteScheduler", **_BETAS, "prediction_type": "epsilon"}}}
TITLES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}
WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # of the U-Net's context
FOREIGN = {  # a name that only the files of this kind have: what they are
    "lora_controlnet": "Control-LoRA", "edm_mean": "model of Playground 2.5", "edm_vpred.sigma_max": "model of CosXL",
    "difference": "difference of ControlNets",
    "conditioner.embedders.0.model.ln_final.weight": "refiner of Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "model of Stable Diffusion 3",
    "joint_blocks.0.x_block.attn.qkv.weight": "model of Stable Diffusion 3",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "model of FLUX",
    "double_blocks.0.img_attn.qkv.weight": "model of FLUX",
    "single_transformer_blocks.0.attn.to_q.weight": "model of FLUX",
    "transformer_blocks.0.attn.add_k_proj.weight": "model of Stable Diffusion 3"}
OTHERS = {".oft_blocks": "OFT", ".oft_diag": "OFT", ".oft_R": "OFT", ".boft_R": "BOFT", ".a1.weight": "GLoRA",
          ".ia3_l": "IA3 of PEFT", ".vera_": "VeRA", "ip_adapter.": "IP-Adapter"}  # a part of a name that only files
# of this kind have
RELATIVES = ("lora", "lycoris_", ".hada_", ".lokr_", ".dora_scale", ".diff", ".w_norm", ".b_norm", ".on_input")
CONTENTS = {"checkpoint": "whole model", "lora": "LoRA", "controlnet": "ControlNet", "unet": "U-Net", "vae": "VAE",
            "text_encoder": "text encoder", "embedding": "textual inversion", "unknown": "file of an unknown kind"}


def kind(state: State) -> str:
    """What a file's names say that it is.

    Returns:
        A key of CONTENTS, or one of the values of FOREIGN and OTHERS, which nothing here loads.

    >>> import torch
    >>> kind({"lora_unet_conv_in.alpha": torch.ones(())})
    'lora'
    """
    def has(*names: str) -> bool:
        return any(key.startswith(names) for key in state)

    if foreign := next((title for name, title in FOREIGN.items() if name in state), None):
        return foreign
    if has(*PARTS["unet"]):
        return "checkpoint"
    if stranger := next((title for part, title in OTHERS.items() if any(part in key for key in state)), None):
        return stranger
    if any(part in key for key in state for part in RELATIVES):
        return "lora"
    if has(*PARTS["controlnet"], "zero_convs.", "controlnet_"):
        return "controlnet"
    if has("conv_norm_out.", "input_blocks."):
        return "unet"
    if has(*PARTS["vae"], "post_quant_conv.", "decoder.conv_in."):
        return "vae"
    if any(key.endswith(("final_layer_norm.weight", "ln_final.weight")) for key in state):
        return "text_encoder"
    words = len(state) == 1 or state.keys() == {"clip_l", "clip_g"}
    return "embedding" if words and all(v.ndim in (1, 2) for v in state.values()) else "unknown"


def family(state: State) -> str | None:
    """The family of a U-Net or ControlNet, alone or in a whole model, by the width of its context; None: another.

    Nothing in a file of Stable Diffusion 2 tells "sd2" (768 pixels, v) from "sd2-base" (512, eps): it is said to be
    "sd2", as in the reference, but for inpainting models, which were only published as the latter.

    >>> import torch
    >>> family({"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 768)})
    'sd1'
    """
    known = WIDTHS.get(next((v.shape[-1] for key, v in state.items() if key.endswith("attn2.to_k.weight")), None))
    first = next((state[key] for key in ("model.diffusion_model.input_blocks.0.0.weight", "input_blocks.0.0.weight",
                                         "conv_in.weight") if key in state), None)
    return "sd2-base" if known == "sd2" and first is not None and first.shape[1] == 9 else known


def context_width(state: State) -> int | None:
    """The width of the context of the U-Net that tensors belong to, or change (a LoRA's matrix `down`); None: unsaid.

    >>> import torch
    >>> context_width({"lora_unet_down_blocks_0_attn2_to_k.lora_down.weight": torch.zeros(4, 768)})
    768
    """
    return next((tensor.shape[1] for key, tensor in state.items()
                 if "attn2" in key and "to_k" in key and tensor.ndim >= 2 and ".up." not in key and "_up." not in key
                 and "lora_B" not in key), None)


def predicts(state: State, notes: dict[str, Any]) -> dict[str, Any]:
    """What a single file says itself of its noise levels and prediction, as entries of a `scheduler_config.json`.

    It is said by marker tensors, `v_pred` and `ztsnr` (zero terminal SNR: then the first time is the last of training,
    2305.08891 §3.3), by `modelspec.prediction_type` of its metadata, or in the original files of Stable Diffusion 2
    base by how long it was trained, or `modelspec.architecture`.

    >>> import torch
    >>> predicts({"v_pred": torch.ones(0), "ztsnr": torch.ones(0)}, {})["prediction_type"]
    'v_prediction'
    """
    said = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction",
            "sample": "sample"}.get(str(notes.get("modelspec.prediction_type", "")).lower().replace("-", "_"))
    base = (str(notes.get("modelspec.architecture", "")).startswith("stable-diffusion-v2-512")
            or notes.get("global_step") == 875000)                       # 512-base-ema.ckpt, as in diffusers
    if base and family(state) == "sd2":
        said = said or "epsilon"
    options = {"prediction_type": "v_prediction" if "v_pred" in state else said}
    if "ztsnr" in state:
        options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {key: value for key, value in options.items() if value}


def configs(config: str | Path | None, state: State, source: str | Path,
            notes: dict[str, Any] | None = None) -> dict[str, dict]:
    """The configs of all parts: {"unet": …, "vae": …, "text_encoder": …, "scheduler": …, perhaps "text_encoder_2"}.

    Args:
        config: a family's name, or a folder in diffusers' layout; None: the family that the file seems to be.
        state: of the file: what it says of itself goes before the family's config.
        source: its path, for messages. notes: what it says beside its tensors, see `read_notes`.

    Raises:
        ValueError: the family cannot be told, or is not the one that was given.
    """
    seems, said = family(state), predicts(state, notes or {})
    if config is not None and config not in FAMILIES:
        parts = _folder(Path(config))
        return {**parts, "scheduler": {**parts["scheduler"], **said}}
    name = config or ("sd2-base" if seems == "sd2" and said.get("prediction_type") == "epsilon" else seems)
    if name is None:
        raise ValueError(f"{source} is of no family that minidiff knows ({', '.join(FAMILIES)}); give config=, the "
                         "folder of a model in diffusers' layout that has the same shape")
    if seems is not None and seems.split("-")[0] != name.split("-")[0]:
        raise ValueError(f"{source} is a file of {TITLES[seems.split('-')[0]]}: config={config!r} does not fit it")
    parts = dict(FAMILIES[name])
    unet, _ = part(state, "unet")
    if "input_blocks.0.0.weight" in unet:
        parts["unet"] = {**parts["unet"], "in_channels": unet["input_blocks.0.0.weight"].shape[1]}
        if parts["unet"]["in_channels"] == 9 and name == "sd1":
            parts["scheduler"] = {**parts["scheduler"], "_class_name": "DDIMScheduler"}
    if "time_embed.cond_proj.weight" in unet:
        parts["unet"] = {**parts["unet"], "time_cond_proj_dim": unet["time_embed.cond_proj.weight"].shape[1]}
        parts["scheduler"] = {**parts["scheduler"], "_class_name": "LCMScheduler"}
    if config is not None and seems == "sd2":        # "sd2" or "sd2-base" was given to say what the metadata may not
        said = predicts(state, {})
    if said.get("rescale_betas_zero_snr") and parts["scheduler"]["_class_name"] == "PNDMScheduler":
        said = {**said, "_class_name": "DDIMScheduler"}                  # plms divides by alpha, which is 0 at first
    parts["scheduler"] = {**parts["scheduler"], **said}
    return parts


def named(index: dict[str, Any], part: str) -> str | None:
    """The class of a part in a `model_index.json`; None: the model has no such part.

    Raises:
        ValueError: the index says something else there.

    >>> named({"vae": ["diffusers", "AutoencoderKL"], "image_encoder": [None, None]}, "vae")
    'AutoencoderKL'
    """
    value = index.get(part)
    if value is None or value == [None, None]:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(name, str) for name in value)):
        raise ValueError(f"model_index.json has {part} = {value!r}; it should be a library and a class, or two nulls")
    return value[1]


def values(name: str, config: str | Path | None, state: State, source: str | Path,
           notes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config of one network that is in a file.

    Args:
        name: "unet", "vae", "controlnet" …; the others as in `configs`. A VAE's numbers tell nothing: None means what
            `modelspec.architecture` of its metadata says, else "sd1", whose latents are scaled by 0.18215; SDXL's by
            0.13025.

    Raises:
        ValueError: the file is of another kind, or see `configs`.
    """
    if config is not None and (Path(config) / "config.json").is_file():
        return read_json(Path(config) / "config.json")
    if (held := kind(state)) not in ("checkpoint", name):
        raise ValueError(f"{source} is no {CONTENTS[name]} but a {CONTENTS.get(held, held)}")
    xl = str((notes or {}).get("modelspec.architecture", "")).startswith("stable-diffusion-xl")
    parts = configs(config or (("sdxl" if xl else "sd1") if held == "vae" else None), state, source)
    if name == "controlnet" and name not in parts:                       # shaped like the U-Net that it belongs to
        free = ("_class_name", "sample_size", "in_channels", "out_channels", "up_block_types")
        return {key: value for key, value in parts["unet"].items() if key not in free}
    return parts[name]


def part(state: State, name: str, ema: bool = False) -> tuple[State, str]:
    """One network's tensors, and what their names begin with in the file; all of them, "", if no name does.

    Args:
        ema: of a U-Net, the running average of its weights, where the file has it.

    Raises:
        ValueError: the file has no such average.

    >>> import torch
    >>> part({"vae.quant_conv.bias": torch.ones(1), "betas": torch.ones(9)}, "vae")
    ({'quant_conv.bias': tensor([1.])}, 'vae.')
    """
    prefix = next((p for p in PARTS[name] if any(key.startswith(p) for key in state)), "")
    tensors = {key[len(prefix):]: tensor for key, tensor in state.items() if key.startswith(prefix)}
    if ema:
        averages = {key: state.get(EMA + key.replace(".", "")) for key in tensors}
        if missing := [key for key, tensor in averages.items() if tensor is None]:
            raise ValueError(f"ema=True: the file holds no running average of {missing[0]}, and {len(missing)} in all")
        tensors = averages
    return tensors, prefix


def _folder(folder: Path) -> dict[str, dict]:
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"config is {str(folder)!r}; it should be one of {', '.join(FAMILIES)}, or a folder in "
                                "diffusers' layout, with a model_index.json")
    index: dict[str, Any] = read_json(folder / "model_index.json")
    files = {"scheduler": "scheduler_config.json"}
    names = [name for name in (*PARTS, "scheduler") if named(index, name)]
    if missing := [name for name in ("unet", "vae", "text_encoder", "scheduler") if name not in names]:
        raise ValueError(f"config is {str(folder)!r}, whose model_index.json names no {', '.join(missing)}")
    parts = {name: read_json(folder / name / files.get(name, "config.json")) for name in names}
    parts["scheduler"]["_class_name"] = named(index, "scheduler")
    return parts


# The types of the values of a scheduler_config.json
WHOLE = {"num_train_timesteps": 1, "steps_offset": 0, "original_inference_steps": 1, "solver_order": 1}  # the least
MOST = 100_000  # times of training: a table of them is made
REAL = ("beta_start", "beta_end", "clip_sample_range", "timestep_scaling")
TEXTS = ("_class_name", "prediction_type", "beta_schedule", "timestep_spacing", "final_sigmas_type",
         "interpolation_type", "algorithm_type", "solver_type", "timestep_type", "variance_type")
FLAGS = ("rescale_betas_zero_snr", "clip_sample", "set_alpha_to_one", "skip_prk_steps", "thresholding",
         "lower_order_final", "euler_at_final", "use_karras_sigmas", "predict_x0")


def scheduler_config(config: dict[str, Any]) -> dict[str, Any]:
    """A `scheduler_config.json` whose values have their types: whole floats as ints, null numbers and texts left out.

    Raises:
        ValueError: a value of another type, or one that nothing can be made of, by name.

    >>> scheduler_config({"num_train_timesteps": 1000.0, "beta_start": None})
    {'num_train_timesteps': 1000}
    >>> scheduler_config({"steps_offset": "1"})
    Traceback (most recent call last):
    ValueError: the scheduler's config has steps_offset = '1'; it should be a whole number from 0 to 100,000
    """
    typed = {key: value for key, value in config.items() if value is not None or key not in (*WHOLE, *REAL, *TEXTS)}
    for key, value in typed.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if key in WHOLE:
            fits = number and WHOLE[key] <= value <= MOST and value == value // 1
            what = f"a whole number from {WHOLE[key]} to {MOST:,}"
            typed[key] = int(value) if fits else value
        elif key in REAL:
            fits, what = number and value > 0, "a number above 0"
            if key.startswith("beta"):
                fits, what = fits and value <= 1, "a number above 0, at most 1"
        elif key in TEXTS:
            fits, what = isinstance(value, str), "a text"
        elif key in FLAGS:
            fits, what = value is None or value in (0, 1), "true or false"
        elif key == "trained_betas":
            fits = value is None or isinstance(value, list | tuple) and 1 < len(value) <= MOST and all(
                isinstance(beta, int | float) and 0 < beta <= 1 for beta in value)
            what = f"a list of numbers between 0 and 1, at most {MOST:,}"
        else:
            continue
        if not fits:
            raise ValueError(f"the scheduler's config has {key} = {value!r}; it should be {what}")
    return typed
