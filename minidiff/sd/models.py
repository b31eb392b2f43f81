"""Whole models: parts that fit each other, where they work, and how folders and single files hold them."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from minidiff import samplers
from minidiff.device import find_device, vae_dtype
from minidiff.io import checkpoint, rename
from minidiff.io.hub import find
from minidiff.io.lora import Loras
from minidiff.io.plain_text import read_json
from minidiff.io.tokenizer import find_vocabulary, load_tokenizers, save_tokenizer
from minidiff.io.weight_file import read_notes
from minidiff.io.weights import load_state, save_state, variant_of
from minidiff.io.write import write_atomic
from minidiff.nets.clip import CLIPText
from minidiff.nets.unet import UNet
from minidiff.nets.vae import VAE
from minidiff.sd.scheduler import discrete, named
from minidiff.sd.settings import Settings
from minidiff.text import EOS, Text

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}  # diffusers' name -> ours
PIPELINES = re.compile(r"StableDiffusion(XL)?(ControlNet)?(Img2Img|Inpaint)?Pipeline|"
                       r"LatentConsistencyModel(Img2Img)?Pipeline")
CLASS_OF = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel(WithProjection)?",
            "text_encoder_2": "CLIPTextModel(WithProjection)?", "tokenizer": "CLIPTokenizer(Fast)?",
            "tokenizer_2": "CLIPTokenizer(Fast)?"}  # of the parts
ADVICE = {"lora": "load a model first, then pipe.load_lora(path)",
          "embedding": "load a model first, then pipe.load_textual_inversion(path)",
          "controlnet": "load it with ControlNet.from_pretrained, and a model beside it",
          "vae": "load it with VAE.from_pretrained, and a model beside it",
          "unet": "load it with UNet.from_pretrained, and a model beside it"}


class Model:
    """A text encoder, a U-Net and a VAE that belong together, and where they work: what a run needs.

    Args:
        scheduler: `scheduler_config.json`. zeros: whether no negative prompt means zeros (SDXL), not "".

    Raises:
        ValueError: parts of different families, or a scheduler config that is not supported.
    """

    def __init__(self, text: Text, unet: UNet, vae: VAE, scheduler: dict, zeros: bool = False):
        self.text, self.unet, self.vae, self.zeros = text, unet, vae, zeros
        # NOTE: diffusers' pipelines of SD 1 and 2 force these on their scheduler: test_pipeline_forces_steps_offset.
        self.scheduler = scheduler if text.pooled else {**scheduler, "steps_offset": 1, "clip_sample": False}
        for what, wants, given in (("prompts of width", unet.config.cross_attention_dim, text.width),
                                   ("pooled prompts:", bool(unet.config.addition_embed_type), text.pooled),
                                   ("pooled prompts of width", unet.config.pooled,
                                    text.encoders[-1].config.projection_dim if text.pooled else None),
                                   ("latents of channels", unet.config.out_channels, vae.config.latent_channels)):
            if wants != given:
                raise ValueError(f"the parts are of different families: the U-Net expects {what} {wants}, not {given}")
        self.schedule = discrete(self.scheduler)
        kind = self.scheduler.get("prediction_type") or "epsilon"
        if kind not in PREDICTIONS:
            raise ValueError(f"prediction_type is {kind!r}; supported are {', '.join(PREDICTIONS)}")
        self.kind = PREDICTIONS[kind]
        self.compiled, self.worker = False, None
        self.loras = Loras({"unet": unet, **dict(zip(("text_encoder", "text_encoder_2"), text.encoders))})

    @classmethod
    def from_pretrained(cls, source: str | Path, *, tokenizer: str | Path | None = None,
                        config: str | Path | None = None, variant: str | None = None, ema: bool = False,
                        device: str | torch.device | None = None, dtype: torch.dtype | None = None,
                        download: bool = False, prediction_type: str | None = None,
                        vae: str | Path | None = None) -> Self:
        """Load a model.

        Args:
            source: "mini-sd" or "mini-sd-lcm", which ship with the package; a folder in diffusers' layout; a single
                .safetensors or .ckpt file; or a repository of the Hugging Face Hub, "owner/name", from the local cache.
            tokenizer: folder with vocab.json and merges.txt, or tokenizer.json; single files carry none. None: the
                model's own; for a file see `minidiff.io.tokenizer.find_vocabulary`.
            config: of a single file: "sd1", "sd2-base", "sd2", "sdxl", or a folder in diffusers' layout of the same
                shape; None: as its weights tell. They cannot tell "sd2-base" from "sd2", which is then assumed unless
                its metadata says something else.
            variant: tag of a folder's weight files, such as "fp16"; a part that has none of that tag is read without.
            ema: of a single file that has both, the running average of the U-Net's weights.
            device: None: cuda, else mps, else cpu.
            dtype: of the weights and the networks' arithmetic; None: float32. In float16 the VAE stays float32.
            download: fetch what the cache lacks of a repository; without it the network is never used.
            prediction_type: what the U-Net predicts: "epsilon", "v_prediction" or "sample"; None: what the model says.
            vae: a VAE instead of the model's own: a folder, or a file, which is read in the shape of the model's own.

        Raises:
            FileNotFoundError: there is no such model, or a part of it is missing.
            ValueError: a file is garbled, does not fit, holds NaN, or is of another kind of model.
        """
        if prediction_type is not None and prediction_type not in [*PREDICTIONS]:
            raise ValueError(f"prediction_type is {prediction_type!r}; supported are {', '.join(PREDICTIONS)}")
        source, device = find(source, variant, download), find_device(device)
        options = {"device": device, "dtype": dtype}, {"device": device, "dtype": vae_dtype(dtype)}
        if not source.is_dir():
            *nets, scheduler, zeros = _from_file(source, tokenizer, config, ema, *options)
        elif config is not None or ema:
            raise ValueError(f"config and ema are for single files; {source} is a folder and has its own configs")
        else:
            *nets, scheduler, zeros = _from_folder(source, tokenizer, variant, *options)
        if vae is not None:
            nets[2] = _other_vae(Path(vae), nets[2], options[1])
        said = {} if prediction_type is None else {"prediction_type": prediction_type}
        return cls(*nets, {**scheduler, **said}, zeros)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model to a folder in diffusers' layout, or, if the path ends in .safetensors, to a single file.

        Args:
            dtype: of the numbers in the files; None: that of the networks.

        Raises:
            ValueError: the path ends in .ckpt; safetensors serve the same programs.
        """
        if Path(path).suffix in (".ckpt", ".bin", ".pt", ".pth"):
            raise ValueError(f"{path}: models are written as a folder, or as a single file that ends in .safetensors")
        write = _to_file if Path(path).suffix == ".safetensors" else _to_folder
        write(self, Path(path), dtype)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the networks and change their dtype, in place; with a device, they stay there: no `offload`."""
        if device is not None:
            device, self.worker = find_device(device), None
        self.text.to(device=device, dtype=dtype)
        self.unet.to(device=device, dtype=dtype)
        self.vae.to(device=device, dtype=vae_dtype(dtype))
        return self

    def offload(self, device: str | torch.device | None = None) -> Self:
        """Keep the networks on the CPU and move each to `device` only while it works: memory for the largest alone.

        Args:
            device: None: cuda, else mps, else cpu.

        >>> import minidiff as md
        >>> md.StableDiffusion.from_pretrained("mini-sd").offload("cpu")("a red house", steps=2)[0].size
        (128, 128)
        """
        self.to("cpu").worker = find_device(device)
        return self

    def compile(self, mode: str | None = None, backend: str = "inductor") -> Self:
        """Translate the U-Net and the VAE's decoder with torch.compile when they first run: slow once, then faster.

        Args:
            mode, backend: of `torch.compile`; "reduce-overhead" and "max-autotune" are made for GPUs.
        """
        self.unet.compile(mode=mode, backend=backend)
        self.vae.decoder.compile(mode=mode, backend=backend)
        self.compiled = True
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks work."""
        return self.worker or next(self.unet.parameters()).device

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures that the model was trained on."""
        height, width = self.unet.config.sides
        return height * self.vae.factor, width * self.vae.factor

    @property
    def size(self) -> int:
        """The longer of its `sides`."""
        return max(self.sides)

    @property
    def spreads(self) -> bool:
        """Whether img2img spreads all steps over what strength leaves, as in LatentConsistencyModelImg2ImgPipeline."""
        return bool(self.unet.config.time_cond_proj_dim) and not self.text.pooled

    def settled(self, s: Settings) -> Settings:
        """Settings with the steps and the guidance scale that suit this model, where they were left open."""
        told = bool(self.unet.config.time_cond_proj_dim)
        if isinstance(s.sampler, tuple):
            lcm = s.sampler[0] is samplers.lcm
        else:
            name = self.scheduler["_class_name"] if s.sampler is None else named(s.sampler)["_class_name"]
            lcm = name == "LCMScheduler"
        return s.settled(lcm, told)

    @contextmanager
    def at_work(self, net: nn.Module) -> Iterator[nn.Module]:
        """A network where it works: with `offload` it is brought there, and back to the CPU at the end."""
        try:
            if self.worker: net.to(self.worker)
            yield net
        finally:
            if self.worker: net.to("cpu")


def _from_folder(folder: Path, tokenizer: str | Path | None, variant: str | None, options: dict, of_vae: dict) -> tuple:
    """The arguments of `Model`, read from a folder in diffusers' layout."""
    index, unet, vae = _index(folder), folder / "unet", folder / "vae"
    text = Text.from_pretrained(folder, tokenizer=tokenizer, variant=variant, **options)
    # diffusers takes the class from the index, whatever the config says
    file = folder / "scheduler" / "scheduler_config.json"
    scheduler = {**read_json(file), "_class_name": checkpoint.named(index, "scheduler")}
    try:
        checkpoint.scheduler_config(scheduler)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return (text, UNet.from_pretrained(unet, variant=variant_of(unet, variant), **options),
            VAE.from_pretrained(vae, variant=variant_of(vae, variant), **of_vae), scheduler,
            text.pooled and bool(index.get("force_zeros_for_empty_prompt", True)))


def _from_file(file: Path, tokenizer: str | Path | None, config: str | Path | None, ema: bool, options: dict,
               of_vae: dict) -> tuple:
    """The arguments of `Model`, read from a single file."""
    state = load_state(file)
    if (kind := checkpoint.kind(state)) != "checkpoint":
        raise ValueError(f"{file} is no whole model but a {checkpoint.CONTENTS.get(kind, kind)}"
                         + (f": {ADVICE[kind]}" if kind in ADVICE else ""))
    configs = checkpoint.configs(config, state, file, read_notes(file))
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in configs]
    cut = {name: checkpoint.part(state, name, ema and name == "unet") for name in ("unet", "vae", *encoders)}
    parts = {name: tensors for name, (tensors, prefix) in cut.items() if prefix}
    if missing := [name for name in cut if name not in parts]:
        raise ValueError(f"{file} is incomplete: it lacks {', '.join(missing)}")
    text = Text(_tokenizers(file, tokenizer, config, [configs[name] for name in encoders]),
                [CLIPText.from_state(configs[name], parts[name], file, **options) for name in encoders])
    return (text, UNet.from_state(configs["unet"], parts["unet"], file, **options),
            VAE.from_state(configs["vae"], parts["vae"], file, **of_vae), configs["scheduler"], text.pooled)


def _other_vae(source: Path, own: VAE, options: dict) -> VAE:
    """A VAE from a folder, or from a file, which has no config: that of the model's own."""
    if not source.is_file():
        return VAE.from_pretrained(source, **options)
    state = load_state(source)
    tensors, _ = checkpoint.part(state, "vae")
    if (kind := checkpoint.kind(state)) not in ("vae", "checkpoint"):
        raise ValueError(f"{source} is no VAE but a {checkpoint.CONTENTS.get(kind, kind)}")
    return VAE.from_state(own.config.to_dict(), tensors, source, **options)


def _to_folder(model: Model, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a model in diffusers' layout: safetensors, configs, tokenizers, model_index.json."""
    model.unet.save_pretrained(folder / "unet", dtype)
    model.vae.save_pretrained(folder / "vae", dtype)
    index: dict[str, Any] = {
        "_class_name": _pipeline(model), "_diffusers_version": "0.42.1", "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", model.scheduler["_class_name"]], "unet": ["diffusers", "UNet2DConditionModel"]}
    for end, tokenizer, encoder in zip(("", "_2"), model.text.tokenizers, model.text.encoders):
        encoder.save_pretrained(folder / f"text_encoder{end}", dtype)
        save_tokenizer(tokenizer, folder / f"tokenizer{end}")
        index[f"text_encoder{end}"] = ["transformers", *encoder.config.to_dict()["architectures"]]
        index[f"tokenizer{end}"] = ["transformers", "CLIPTokenizer"]
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    if model.text.pooled:
        index["force_zeros_for_empty_prompt"] = model.zeros
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    for path, values in (("scheduler/scheduler_config.json", model.scheduler), ("model_index.json", index)):
        write_atomic(folder / path, json.dumps(values, indent=2) + "\n")


def _to_file(model: Model, path: Path, dtype: torch.dtype | None) -> None:
    """Write a model's weights to one safetensors file, in CompVis' and OpenCLIP's naming.

    Neither configs nor tokenizers are in such a file, but what the U-Net predicts is, see `checkpoint.predicts`.
    """
    prefixes, state = checkpoint.PARTS, {}
    first, *second = model.text.encoders
    parts = [(prefixes["unet"][0], model.unet, rename.unet), (prefixes["vae"][0], model.vae, rename.vae)]
    if second:
        parts += [(prefixes["text_encoder"][2], first, None),
                  (prefixes["text_encoder_2"][0], second[0], rename.openclip)]
    elif first.config.hidden_act == "gelu":                              # OpenCLIP's; OpenAI's is quick_gelu
        parts.append((prefixes["text_encoder"][1], first, rename.openclip))
    else:
        parts.append((prefixes["text_encoder"][0], first, None))
    for prefix, net, places in parts:
        tensors = net.state_dict()
        named = rename.to_theirs(places(tensors), tensors) if places else tensors
        state |= {prefix + name: tensor.to(dtype) if dtype else tensor for name, tensor in named.items()}
    kind = model.scheduler.get("prediction_type") or "epsilon"
    marks = {"v_pred": kind == "v_prediction", "ztsnr": bool(model.scheduler.get("rescale_betas_zero_snr"))}
    state |= {name: torch.zeros(0) for name, said in marks.items() if said}
    save_state(state, path, {"modelspec.prediction_type": "v" if kind == "v_prediction" else kind})


def _index(folder: Path) -> dict[str, Any]:
    """`model_index.json`, if it is of a pipeline that we know, and names all its parts."""
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if not isinstance(name, str) or not PIPELINES.fullmatch(name):
        raise ValueError(f"{folder} is a {name}; supported are pipelines of Stable Diffusion 1, 2, XL and latent "
                         "consistency models")
    for key in ("requires_aesthetics_score", "force_zeros_for_empty_prompt"):
        if not isinstance(index.get(key), bool | None):
            raise ValueError(f"{folder} has {key} = {index[key]!r}; it should be true or false")
    if index.get("requires_aesthetics_score"):
        raise ValueError(f"{folder} has requires_aesthetics_score = true, as the refiner of Stable Diffusion XL; it is "
                         "not supported")
    needed = ["unet", "vae", "scheduler", "text_encoder", "tokenizer"]
    needed += ["text_encoder_2", "tokenizer_2"] if "XL" in name else []
    if missing := [part for part in needed if checkpoint.named(index, part) is None]:
        raise ValueError(f"{folder} is incomplete: its model_index.json names no {', '.join(missing)}")
    for part, known in CLASS_OF.items():
        if (given := checkpoint.named(index, part)) and not re.fullmatch(known, given):
            raise ValueError(f"{folder} has a {given} as its {part}; supported is {known.split('(')[0]}")
    return index


def _tokenizers(source: Path, tokenizer: str | Path | None, config: str | Path | None, texts: list[dict]) -> list:
    if config is not None and config not in checkpoint.FAMILIES:
        return load_tokenizers(tokenizer or config, [None] * len(texts))
    if tokenizer is None and (tokenizer := find_vocabulary(source, texts[0].get("vocab_size", 49408))) is None:
        raise ValueError(f"{source} carries no tokenizer, like all single files, and none is beside it, in the cache "
                         "of the Hugging Face Hub, or in an installed open_clip or clip package: give tokenizer=, a "
                         "folder with vocab.json and merges.txt. To fetch them: hf download "
                         "openai/clip-vit-large-patch14 vocab.json merges.txt --local-dir clip-tokenizer")
    # one vocabulary in all families, but padding of its own in those of OpenCLIP
    return load_tokenizers(tokenizer, ["!" if text.get("hidden_act") == "gelu" else EOS for text in texts])


def _pipeline(model: Model) -> str:
    if model.unet.config.time_cond_proj_dim:
        return "LatentConsistencyModelPipeline"
    inpaint = "Inpaint" if model.unet.config.in_channels != model.unet.config.out_channels else ""
    return f"StableDiffusion{'XL' if model.text.pooled else ''}{inpaint}Pipeline"
