"""What a model file or folder holds, from its headers: nothing is computed, weights are only mapped into memory."""
from __future__ import annotations

from pathlib import Path

from minidiff.io.weights import State, load_state, read_json, weights_dir

STEMS = ("diffusion_pytorch_model", "model")
# the first key that a single file holds tells its family (CompVis and kohya names)
FAMILIES = {
    "conditioner.embedders.1.model.ln_final.weight": "Stable Diffusion XL, single file",
    "cond_stage_model.model.ln_final.weight": "Stable Diffusion 2, single file",
    "model.diffusion_model.input_blocks.0.0.weight": "Stable Diffusion 1, single file",
    "control_model.time_embed.0.weight": "ControlNet, single file",
    "controlnet_cond_embedding.conv_in.weight": "ControlNet",
    "quant_conv.weight": "VAE", "add_embedding.linear_1.weight": "U-Net of Stable Diffusion XL",
    "conv_norm_out.weight": "U-Net", "text_projection.weight": "CLIP text encoder",
    "final_layer_norm.weight": "CLIP text encoder", "text_model.final_layer_norm.weight": "CLIP text encoder"}
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}  # of the U-Net's context


def describe(path: str | Path) -> dict:
    """Family, parameters, dtype, prediction type and parts of a model.

    Args:
        path: "mini-sd", a folder (a whole pipeline or one network), or a weight file.

    Returns:
        {"path", "family", "parameters", "dtype", "prediction_type" (None where nothing says it), "scheduler",
        "parts": {name: {"class", "parameters", "dtype"}}}

    Raises:
        FileNotFoundError, ValueError: no model is there, or a file is damaged.

    >>> describe("mini-sd")["prediction_type"]
    'epsilon'
    """
    folder = weights_dir() / path if path == "mini-sd" else Path(path)
    result = {"path": str(folder), "family": None, "parameters": 0, "dtype": None, "prediction_type": None,
              "scheduler": None, "parts": {}}
    if folder.is_file():
        state = load_state(folder)
        lora = any("lora" in name for name in state)
        family = "LoRA" if lora else next((family for key, family in FAMILIES.items() if key in state), "unknown")
        result |= {"family": family, "parts": {folder.name: count(state)}}
    elif (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        names = [name for name, value in index.items() if isinstance(value, list) and value[1]]
        result["parts"] = {name: _network(folder / name) for name in names if (folder / name / "config.json").is_file()}
        if "unet" in names:
            result["family"] = _family(read_json(folder / "unet" / "config.json"), index["_class_name"])
        if "scheduler" in names:
            config = read_json(folder / "scheduler" / "scheduler_config.json")
            result["scheduler"] = config.get("_class_name")
            result["prediction_type"] = config.get("prediction_type", "epsilon")
    elif (folder / "config.json").is_file():
        part = _network(folder)
        result |= {"family": part["class"], "parts": {folder.name: part}}
    else:
        raise FileNotFoundError(f"{folder} is no model: no weight file, and without model_index.json or config.json")
    result["parameters"] = sum(part["parameters"] for part in result["parts"].values())
    result["dtype"] = ", ".join(sorted({part["dtype"] for part in result["parts"].values()}))
    return result


def count(state: State) -> dict:
    """Number of parameters and their dtype(s).

    >>> import torch
    >>> count({"weight": torch.zeros(2, 3), "position_ids": torch.arange(4)})
    {'parameters': 6, 'dtype': 'float32'}
    """
    floats = [tensor for tensor in state.values() if tensor.is_floating_point()]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in floats})
    return {"parameters": sum(tensor.numel() for tensor in floats), "dtype": ", ".join(dtypes)}


def _network(folder: Path) -> dict:
    config = read_json(folder / "config.json")
    kind = config.get("_class_name") or (config.get("architectures") or ["unknown"])[0]
    return {"class": kind, **count(_weights(folder))}


def _weights(folder: Path) -> State:
    """Of the usual file name, or of a variant if there is nothing else."""
    for variant in (None, "fp16", "non_ema"):
        for stem in STEMS:
            try:
                return load_state(folder, stem, variant)
            except FileNotFoundError as error:
                missing = error
    raise missing


def _family(config: dict, pipeline: str) -> str:
    width = config.get("cross_attention_dim", 1280)
    return WIDTHS.get(width, f"{pipeline} of its own size (context of {width})")
