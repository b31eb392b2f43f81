"""LoRA (Hu et al., 2106.09685): low-rank changes of a model's weights, in the files of kohya, diffusers and PEFT.

    W' = W + scale · (alpha/rank) · up·down
"""

import itertools
import math
import re
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.io import rename
from minidiff.io.checkpoint import CONTENTS, TITLES, WIDTHS, context_width, kind
from minidiff.io.plain_text import parse, read_json
from minidiff.io.weight_file import read_notes
from minidiff.io.weights import first_ten, load_state, nonfinite, save_state

# the end of a key; before it stands the name of the layer, and in old files `_lora`
PAIR = re.compile(r"(.+?)(?:_lora|\.lora|\.lora_linear_layer)?\.(lora_down|lora_A|down|lora_up|lora_B|up)"
                  r"(?:\.default)?\.weight")
PEFT = ("adapter_model.safetensors", "adapter_model.bin")
KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}


class Change(NamedTuple):
    """What a LoRA adds to one weight: factor·up·down, with factor = alpha/rank."""

    down: Tensor  # (rank, inputs), of a convolution (rank, inputs, k, k)
    up: Tensor  # (outputs, rank), or with (…, 1, 1)
    factor: float = 1.0

    def delta(self, like: Tensor) -> Tensor:
        """The change itself, float32, of the shape and on the device of `like`.

        >>> Change(torch.ones(1, 2), torch.ones(3, 1), 0.5).delta(torch.zeros(3, 2))[0]
        tensor([0.5000, 0.5000])
        """
        up, down = (part.to(like.device, torch.float32).flatten(1) for part in (self.up, self.down))
        return self.factor * (up @ down).reshape(like.shape)

    def fits(self, weight: Tensor) -> bool:
        """Whether it can be added to this weight."""
        (out, rank), (columns, inputs) = self.up.flatten(1).shape, self.down.flatten(1).shape
        return (out, rank, inputs) == (len(weight), columns, weight[0].numel())


Lora = dict[str, Change]  # by the name of the layer, such as "unet.mid_block.attentions.0.proj_in"


class Loras:
    """The LoRAs in a model's weights. Originals are kept aside: removing a LoRA gives them back bit for bit.

    Args:
        parts: {"unet": …, "text_encoder": …, "text_encoder_2": …}.

    >>> net = nn.Sequential(nn.Linear(2, 3))
    >>> loras, before = Loras({"unet": net}), net[0].weight.clone()
    >>> handle = loras.add({"unet.0": Change(torch.ones(1, 2), torch.ones(3, 1))}, scale=0.5)
    >>> torch.allclose(net[0].weight, before + 0.5)
    True
    >>> loras.remove(handle)
    >>> torch.equal(net[0].weight, before)
    True
    """

    def __init__(self, parts: dict[str, nn.Module]):
        self.parts, self.layers = parts, _layers(parts)
        self.loaded: dict[int, tuple[Lora, float]] = {}
        self.originals: dict[str, Tensor] = {}
        self.handles = itertools.count(1)

    def add(self, lora: Lora, scale: float = 1.0) -> int:
        """Change the weights by scale times a LoRA; returns a handle to remove it by.

        Raises:
            ValueError: the scale is no finite number.
        """
        if not (isinstance(scale, Real) and math.isfinite(scale)):
            raise ValueError(f"the scale of a LoRA is {scale!r}; it must be a finite number")
        handle = next(self.handles)
        self.loaded[handle] = (lora, scale)
        self._mix(lora)
        return handle

    def remove(self, handle: int | None = None) -> None:
        """Take one LoRA out of the weights, or all of them.

        Raises:
            ValueError: there is no LoRA of this handle.
        """
        if handle is not None and handle not in [*self.loaded]:
            raise ValueError(f"no LoRA is loaded under {handle}; there are {sorted(self.loaded) or 'none'}")
        for key in list(self.loaded) if handle is None else [handle]:
            lora, _ = self.loaded.pop(key)
            self._mix(lora)

    @torch.no_grad()
    def _mix(self, names: Iterable[str]) -> None:
        """Write original + Σ scale·delta into these layers."""
        for name in names:
            weight = self.layers[name].weight
            original = self.originals.setdefault(name, weight.data).to(weight)
            changes = [(lora[name], scale) for lora, scale in self.loaded.values() if name in lora]
            if changes:
                total = sum(scale * change.delta(original) for change, scale in changes)
                weight.data = (original.float() + total).to(original.dtype)
            else:
                weight.data = original
                del self.originals[name]


def load_lora(path: str | Path, parts: dict[str, nn.Module]) -> Lora:
    """Read a LoRA file: kohya's (also on CompVis names, as for SDXL), diffusers' of every age, PEFT's.

    Args:
        path: the file, or a folder with `pytorch_lora_weights.safetensors`, or with PEFT's `adapter_model.safetensors`
            and the `adapter_config.json` that belongs to it.
        parts: the networks that it may change, see `Loras`.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read, holds no LoRA, or one of another model or kind.
    """
    path = Path(path)
    if path.is_dir() and (path / "adapter_config.json").is_file():
        path = next((path / name for name in PEFT if (path / name).is_file()), path)
    state = load_state(path, "pytorch_lora_weights")
    if (what := kind(state)) in CONTENTS and what not in ("lora", "unknown"):
        raise ValueError(f"{path} is no LoRA but a {CONTENTS[what]}")
    made, own = context_width(state), getattr(getattr(parts.get("unet"), "config", None), "cross_attention_dim", None)
    if made and own and made != own:
        raise ValueError(f"{path} is a LoRA of {_family(made)}, and this model is of {_family(own)}")
    layers, pairs, alphas, odd, twice = _layers(parts), {}, {}, [], []
    names = _spellings(layers)
    for key, tensor in state.items():
        match = PAIR.fullmatch(key)
        spelled = match[1] if match else key.removesuffix(".alpha")
        name = names.get(spelled.replace(".processor.", ".").removeprefix("base_model.model."))
        half = "down" if match and match[2] in ("lora_down", "lora_A", "down") else "up"
        if not name or not (match and tensor.ndim > 1 and tensor.numel() or key.endswith(".alpha")
                            and tensor.numel() == 1 and not tensor.is_complex()):
            odd.append(key)
        elif half in pairs.get(name, {}) if match else name in alphas:
            twice.append(key)
        elif match:
            pairs.setdefault(name, {})[half] = tensor
        else:
            alphas[name] = float(tensor)
    halves = [name for name, pair in pairs.items() if len(pair) == 1] + sorted(alphas.keys() - pairs.keys())
    settings = _settings(path)
    try:
        lora = {name: Change(**pair, factor=_factor(name, len(pair["down"]), alphas, settings))
                for name, pair in pairs.items() if len(pair) == 2}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    shapes = [f"{name} {list(c.up.shape)}·{list(c.down.shape)} for {list(layers[name].weight.shape)}"
              for name, c in lora.items() if not c.fits(layers[name].weight)]
    whole = [key for key, tensor in state.items() if not tensor.is_floating_point() and not key.endswith(".alpha")]
    problems = {"unknown": odd, "for a layer that has one already": twice, "without its counterpart": halves,
                "of the wrong shape": shapes, "not of real numbers": whole}
    if said := "; ".join(f"{what}: {first_ten(names)}" for what, names in problems.items() if names):
        raise ValueError(f"{path} does not fit this model, or is no plain LoRA (LoHa, LoKr and DoRA are not "
                         f"supported); {said}")
    if not lora:
        raise ValueError(f"{path} holds no LoRA: it is empty")
    if broken := [name for name, c in lora.items()
                  if nonfinite({"down": c.down, "up": c.up}) or not math.isfinite(c.factor)]:
        raise ValueError(f"{path} holds NaN or infinite numbers in {first_ten(broken)}")
    return lora


def save_lora(lora: Lora, path: str | Path) -> None:
    """Write a LoRA in PEFT's naming, which diffusers loads; alpha is multiplied in.

    >>> import tempfile
    >>> folder, net = tempfile.TemporaryDirectory(), nn.Sequential(nn.Linear(2, 3))
    >>> save_lora({"unet.0": Change(torch.ones(1, 2), torch.ones(3, 1), 0.5)}, f"{folder.name}/a.safetensors")
    >>> load_lora(f"{folder.name}/a.safetensors", {"unet": net})["unet.0"].up[0]
    tensor([0.5000])
    """
    state = {f"{name}.lora_A.weight": change.down for name, change in lora.items()}
    save_state(state | {f"{name}.lora_B.weight": c.factor * c.up for name, c in lora.items()}, path)


def _family(width: int) -> str:
    """By the width of its context."""
    return TITLES[WIDTHS[width]] if width in WIDTHS else f"another family (its context is {width} wide)"


def _layers(parts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """{"unet.conv_in": …}: every layer that a LoRA can change."""
    return {f"{part}.{name}": layer for part, net in parts.items() for name, layer in net.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))}


def _spellings(layers: Iterable[str]) -> dict[str, str]:
    """{name in some file: name of the layer}: underscores cannot be parsed, but they can be looked up."""
    layer_of = {}
    # kohya's SDXL files are written on CompVis' names
    compvis = rename.unet(f"{name.removeprefix('unet.')}.weight" for name in layers if name.startswith("unet."))
    for name in layers:
        part, _, path = name.partition(".")
        dotted = {short.replace(*pair) for short in (path, path.removeprefix("text_model."))
                  for pair in [("", ""), *OLD.items()]}
        for spelled in dotted:
            layer_of[f"{part}.{spelled}"] = name
            if part == "unet":
                layer_of[spelled] = name
        theirs = compvis[f"{path}.weight"].name.removesuffix(".weight") if part == "unet" else path
        for spelled in {path, theirs}:
            layer_of |= {prefix + spelled.replace(".", "_"): name for prefix in KOHYA[part]}
    return layer_of


def _settings(path: Path) -> dict[str, Any]:
    """What stands beside the weights, "unet.lora_alpha" and the like: by diffusers in a safetensors header, by PEFT in
    a file of its own, without the part's name.
    """
    path = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    config = path.parent / "adapter_config.json"
    if path.name in PEFT and config.is_file():
        return {f"{part}.{key}": value for part in KOHYA for key, value in read_json(config).items()}
    text = read_notes(path).get("lora_adapter_metadata", "{}") if path.suffix == ".safetensors" else "{}"
    try:
        noted = parse(text)
    except ValueError as error:
        raise ValueError(f"{path} has garbled lora_adapter_metadata: {error}") from error
    if not isinstance(noted, dict | None):
        raise ValueError(f"{path} has garbled lora_adapter_metadata: it is a {type(noted).__name__}, not an object")
    return noted or {}


def _factor(name: str, rank: int, alphas: dict[str, float], settings: dict[str, Any]) -> float:
    """alpha/rank, or with use_rslora alpha/√rank (2312.03732); alpha of the layer, else of its part, else the rank."""
    part, _, path = name.partition(".")
    patterns, whole, root = (settings.get(f"{part}.{key}") for key in ("alpha_pattern", "lora_alpha", "use_rslora"))
    if (method := settings.get(f"{part}.peft_type") or "LORA") != "LORA" or settings.get(f"{part}.use_dora"):
        raise ValueError(f"the LoRA's settings for {part} say {method if method != 'LORA' else 'use_dora'}; supported "
                         "are plain LoRAs")
    if not (isinstance(patterns, dict | None) and isinstance(root, bool | None) and all(
            isinstance(alpha, int | float | None) and not isinstance(alpha, bool)
            for alpha in (whole, *(patterns or {}).values()))):
        raise ValueError(f"the LoRA's settings for {part} are garbled: lora_alpha is {whole!r}, alpha_pattern "
                         f"{patterns!r}, use_rslora {root!r}")
    spelled = {pattern: pattern.removesuffix("$").replace(r"\.", ".") for pattern in patterns or {}}
    if odd := [pattern for pattern, layer in spelled.items() if not re.fullmatch(r"\^?[\w.-]+", layer)]:
        raise ValueError(f"the LoRA's settings for {part} have an alpha_pattern {odd[0]!r}; supported are names of "
                         "layers, or their ends: regular expressions of a file are not run")
    matching = [patterns[pattern] for pattern, layer in spelled.items()
                if path == layer.removeprefix("^") or f".{path}".endswith(f".{layer}")]
    alpha = next((a for a in (alphas.get(name), *matching[:1], whole) if a is not None), rank)
    return alpha / (rank ** 0.5 if root else rank)
