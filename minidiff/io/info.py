"""What a model file or folder holds, from its headers: nothing is computed, weights are only mapped into memory."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from minidiff.io.checkpoint import (
    CONTENTS,
    EMA,
    FAMILIES,
    PARTS,
    TITLES,
    WIDTHS,
    context_width,
    family,
    kind,
    named,
    part,
    predicts,
    scheduler_config,
)
from minidiff.io.hub import find
from minidiff.io.plain_text import read_json
from minidiff.io.weight_file import read_notes, read_object
from minidiff.io.weights import State, load_state

SMALL = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_model.safetensors",
         "learned_embeds.safetensors", "learned_embeds.bin")  # a LoRA or a textual inversion in a folder of its own
STEMS = ("diffusion_pytorch_model", "model")
ENCODERS = {768: "sd1", 1024: "sd2", 1280: "sdxl"}  # by the width of the (second) text encoder


def describe(path: str | Path) -> dict[str, Any]:
    """Family, parameters, dtype, prediction type and parts of a model.

    Args:
        path: "mini-sd" or "mini-sd-lcm", a folder (a whole pipeline or one network), a file (of a whole model, a
            network, a LoRA or a textual inversion), or a repository of the Hugging Face Hub that is in the local cache.

    Returns:
        {"path", "family", "parameters", "dtype", "prediction_type" (None where nothing says it), "scheduler",
        "zero_terminal_snr" (whether the last time of training was noise alone), "parts": {name: {"class", "parameters",
        "dtype"}}}

    Raises:
        FileNotFoundError, ValueError: no model is there, or a file is damaged.

    >>> describe("mini-sd")["prediction_type"]
    'epsilon'
    """
    path = find(path)
    result = {"path": str(path), "family": None, "parameters": 0, "dtype": None, "prediction_type": None,
              "scheduler": None, "zero_terminal_snr": False, "parts": {}}
    if path.is_file():
        result |= _file(path)
    elif (path / "model_index.json").is_file():
        result |= _folder(path)
    elif small := next((path / name for name in SMALL if (path / name).is_file()), None):
        result |= _file(small)
    elif (path / "config.json").is_file():
        network = _network(path)
        result |= {"family": network["class"], "parts": {path.name: network}}
    else:
        raise FileNotFoundError(f"{path} is no model: no weight file, and without model_index.json or config.json")
    result["parameters"] = sum(network["parameters"] for network in result["parts"].values())
    result["dtype"] = ", ".join(sorted({network["dtype"] for network in result["parts"].values()}))
    return result


def count(state: State) -> dict[str, Any]:
    """Number of parameters and their dtype(s): real numbers; where there are none, the dtypes of what there is.

    >>> import torch
    >>> count({"weight": torch.zeros(2, 3), "position_ids": torch.arange(4)})
    {'parameters': 6, 'dtype': 'float32'}
    """
    floats = [tensor for tensor in state.values() if tensor.is_floating_point()]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in floats or state.values()})
    return {"parameters": sum(tensor.numel() for tensor in floats), "dtype": ", ".join(dtypes)}


def _file(path: Path) -> dict[str, Any]:
    content = None if path.suffix == ".safetensors" else read_object(path)
    words = content.get("string_to_param") if isinstance(content, dict) else None
    if isinstance(words, dict):                                          # AUTOMATIC1111's textual inversion
        vectors = {name: value for name, value in words.items() if isinstance(value, Tensor)}
        if not vectors:
            raise ValueError(f"{path} is no textual inversion: its string_to_param holds no vectors")
        return {"family": _words(vectors), "parts": {path.name: count(vectors)}}
    state = load_state(path, headers=True)
    what = kind(state)
    if what == "checkpoint":
        return _checkpoint(state, read_notes(path))
    title = CONTENTS.get(what, what)
    if what == "embedding":
        title = _words(state)
    elif of := WIDTHS.get(context_width(state)):
        title += f" of {TITLES[of]}"
    return {"family": title, "parts": {path.name: count(state)}}


def _checkpoint(state: State, notes: dict[str, Any]) -> dict[str, Any]:
    """Of a single file with a whole model: what it says itself, and what its family's published config does."""
    parts, name = {}, family(state)
    for network in PARTS:
        tensors, prefix = part(state, network)
        if prefix:
            parts[network] = count(tensors)
    if average := {key: tensor for key, tensor in state.items() if key.startswith(EMA)}:
        parts["unet, average"] = count(average)
    unet, _ = part(state, "unet")
    title = "Stable Diffusion" if name is None else TITLES[name.split("-")[0]]
    told = " LCM" if "time_embed.cond_proj.weight" in unet else ""
    inpaints = "input_blocks.0.0.weight" in unet and unet["input_blocks.0.0.weight"].shape[1] == 9
    # the tensors of a file of Stable Diffusion 2 do not tell which of two it is
    usual = None if name in ("sd2", None) else FAMILIES[name]["scheduler"]["prediction_type"]
    said = predicts(state, notes)
    return {"family": f"{title}{told}{' inpainting' if inpaints else ''}, single file", "parts": parts,
            "prediction_type": said.get("prediction_type", usual),
            "zero_terminal_snr": said.get("rescale_betas_zero_snr", False)}


def _folder(folder: Path) -> dict[str, Any]:
    index, result = read_json(folder / "model_index.json"), {}
    names = [name for name, value in index.items() if isinstance(value, list) and name[0] != "_" and named(index, name)]
    result["parts"] = {name: {**_network(folder / name), "class": named(index, name)} for name in names
                       if (folder / name / "config.json").is_file()}
    if "unet" in names:
        config = read_json(folder / "unet" / "config.json")
        width = config.get("cross_attention_dim", 1280)
        known = WIDTHS.get(width) if isinstance(width, int) else None
        title = TITLES.get(known, f"{index.get('_class_name')} of its own size (context of {width})")
        latent = " LCM" if config.get("time_cond_proj_dim") else ""
        outputs = config.get("out_channels", 4)
        inpaints = isinstance(outputs, int) and config.get("in_channels", 4) == 2 * outputs + 1
        result["family"] = title + latent + (" inpainting" if inpaints else "")
    else:
        result["family"] = f"{index.get('_class_name')}, which minidiff does not draw with"
    if "scheduler" in names:
        config = scheduler_config(read_json(folder / "scheduler" / "scheduler_config.json"))
        result |= {"scheduler": named(index, "scheduler"),
                   "prediction_type": config.get("prediction_type") or "epsilon",
                   "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr"))}
    return result


def _network(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    named = config.get("_class_name") or config.get("architectures") or "unknown"
    return {"class": str(named[0] if isinstance(named, list) else named), **count(_weights(folder))}


def _weights(folder: Path) -> State:
    """Of the usual file name, or of a variant if there is nothing else."""
    names = [path.name.split(".") for path in sorted(folder.iterdir())]
    tags = {parts[1].split("-")[0] for parts in names if len(parts) == 3} - {"safetensors", "bin"}
    for variant in (None, *sorted(tags)):
        for stem in STEMS:
            try:
                return load_state(folder, stem, variant, headers=True)
            except FileNotFoundError as error:
                missing = error
    raise missing


def _words(vectors: State) -> str:
    """Of a textual inversion: for which family, by the width of the text encoder."""
    of = ENCODERS.get(max((tensor.shape[-1] for tensor in vectors.values() if tensor.ndim), default=None))
    return "textual inversion" + (f" of {TITLES[of]}" if of else "")
