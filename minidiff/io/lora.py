"""LoRA (Hu et al., 2106.09685) and its relatives: files that change a model's weights, of kohya, diffusers and PEFT.

    W' = W + scale · Δ,   of a LoRA Δ = (alpha/rank)·up·down; the other kinds are in `minidiff.io.lycoris`
"""

import itertools
import json
import math
import re
from collections.abc import Iterable
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.io import rename
from minidiff.io.checkpoint import CONTENTS, OTHERS, TITLES, WIDTHS, context_width, kind
from minidiff.io.lycoris import Change, Kind, build, fits, strength, tensors
from minidiff.io.plain_text import parse, read_json
from minidiff.io.weight_file import read_notes
from minidiff.io.weights import first_ten, load_state, nonfinite, save_state

# the end of a key; before it stands the name of the layer, and in old files `_lora`
PAIR = re.compile(r"(.+?)(?:_lora|\.lora|\.lora_linear_layer)?\.(lora_down|lora_A|down|lora_up|lora_B|up)"
                  r"(?:\.default)?\.weight")
PART = re.compile(r"(.+?)\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|diff|diff_b|w_norm|b_norm|on_input|"
                  r"lora_mid|dora_scale|lora_magnitude_vector|weight)(?:\.default)?(?:\.weight)?")
ALIAS = {"lora_mid": "mid", "lora_magnitude_vector": "dora_scale"}
METHODS = ("LORA", "LOHA", "LOKR")  # of PEFT's settings
PEFT = ("adapter_model.safetensors", "adapter_model.bin")
KOHYA = {"unet": ("lora_unet_", "lycoris_"), "text_encoder": ("lora_te_", "lora_te1_"),
         "text_encoder_2": ("lora_te2_",)}
COMFY = {"unet": ("diffusion_model.",), "text_encoder": ("text_encoders.clip_l.transformer.", "clip_l.transformer."),
         "text_encoder_2": ("text_encoders.clip_g.transformer.", "clip_g.transformer.")}
NORMS = (nn.GroupNorm, nn.LayerNorm)
OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}


Lora = dict[str, Kind]  # by the name of the layer, as "unet.mid_block.attentions.0.proj_in"; of a bias with ".bias"


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
            weight = _weight(self.parts, name)
            original = self.originals.setdefault(name, weight.data).to(weight)
            changes = [(lora[name], scale) for lora, scale in self.loaded.values() if name in lora]
            if changes:
                total = sum(scale * change.delta(original) for change, scale in changes)
                weight.data = (original.float() + total).to(original.dtype)
            else:
                weight.data = original
                del self.originals[name]


def load_lora(path: str | Path, parts: dict[str, nn.Module]) -> Lora:
    """Read a LoRA file: kohya's and LyCORIS' (also on CompVis names, as for SDXL), diffusers' of every age, PEFT's,
    ComfyUI's.

    LoRA, also of convolutions with a core, LoHa, LoKr, IA3, DoRA of each, and whole differences of weights, biases and
    norms.

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
    if what in OTHERS.values():
        raise ValueError(f"{path} is of the kind {what}, which is not supported; LoRA, LoHa, LoKr, DoRA and IA3 are")
    made, own = context_width(state), getattr(getattr(parts.get("unet"), "config", None), "cross_attention_dim", None)
    if made and own and made != own:
        raise ValueError(f"{path} is a LoRA of {_family(made)}, and this model is of {_family(own)}")
    pairs: dict[str, dict[str, Tensor]] = {}
    names, alphas, odd, twice = _spellings(_layers(parts) | _layers(parts, NORMS)), {}, [], []
    for key, tensor in state.items():
        pair = PAIR.fullmatch(key)
        match = pair or PART.fullmatch(key)
        spelled = match[1] if match else key.removesuffix(".alpha")
        name = names.get(spelled.replace(".processor.", ".").removeprefix("base_model.model."))
        if not name or not tensor.numel() or not (match and (not pair or tensor.ndim > 1) or key.endswith(".alpha")
                                                  and tensor.numel() == 1 and not tensor.is_complex()):
            odd.append(key)
            continue
        part = "" if not match else ALIAS.get(match[2], match[2]) if not pair else \
            "down" if match[2] in ("lora_down", "lora_A", "down") else "up"
        name += ".bias" if part in ("diff_b", "b_norm") else ""
        if part in pairs.get(name, {}) if match else name in alphas:
            twice.append(key)
        elif match:
            # PEFT's lengths are always those of the outputs, though a convolution's have the shape (1, out, 1, 1)
            pairs.setdefault(name, {})[part] = tensor.flatten() if "magnitude" in match[2] else tensor
        else:
            alphas[name] = float(tensor)
    settings, lora, halves = _settings(path), {}, sorted(alphas.keys() - pairs.keys())
    for name, found in pairs.items():
        try:
            lora[name] = build(found, partial(_factor, name, alphas=alphas, settings=settings))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    halves = [name for name, change in lora.items() if change is None] + halves
    shapes = [f"{name} {'·'.join(str(list(part.shape)) for part in reversed(tensors(change)))} for "
              f"{list(_weight(parts, name).shape)}" for name, change in lora.items()
              if change is not None and not fits(change, _weight(parts, name))]
    whole = [key for key, tensor in state.items()
             if not tensor.is_floating_point() and not key.endswith((".alpha", ".on_input"))]
    problems = {"unknown": odd, "for a layer that has one already": twice, "without its counterpart": halves,
                "of the wrong shape": shapes, "not of real numbers": whole}
    if said := "; ".join(f"{what}: {first_ten(keys)}" for what, keys in problems.items() if keys):
        raise ValueError(f"{path} does not fit this model; {said}")
    if not lora:
        raise ValueError(f"{path} holds no LoRA: it is empty")
    if broken := [name for name, change in lora.items() if not math.isfinite(strength(change))
                  or nonfinite({str(i): part for i, part in enumerate(tensors(change))})]:
        raise ValueError(f"{path} holds NaN or infinite numbers in {first_ten(broken)}")
    return lora


def save_lora(lora: Lora, path: str | Path, *, kohya: bool = False, dtype: torch.dtype | None = None) -> None:
    """Write a plain LoRA: in PEFT's naming, which diffusers loads, or in kohya's, which the web UIs do.

    Rank and alpha stand beside the weights, each as its readers expect it.

    Args:
        dtype: of the file; None: as they are.

    Raises:
        ValueError: a change of another kind.

    >>> import tempfile
    >>> folder, net = tempfile.TemporaryDirectory(), nn.Sequential(nn.Linear(2, 3))
    >>> save_lora({"unet.0": Change(torch.ones(1, 2), torch.ones(3, 1), 0.5)}, f"{folder.name}/a.safetensors")
    >>> load_lora(f"{folder.name}/a.safetensors", {"unet": net})["unet.0"].factor
    0.5
    """
    if odd := [name for name, change in lora.items() if not isinstance(change, Change) or change.mid is not None]:
        raise ValueError(f"only plain LoRAs are written, not those of {first_ten(odd)}")
    state, settings = {}, {}
    for name, change in lora.items():
        part, _, layer = name.partition(".")
        rank, alpha = len(change.down), change.factor * len(change.down)
        layer = layer.replace(".", "_") if kohya else layer.removeprefix("text_model.")  # as peft finds it
        if kohya:
            key = KOHYA[part][0] + layer
            state |= {f"{key}.lora_down.weight": change.down, f"{key}.lora_up.weight": change.up,
                      f"{key}.alpha": torch.tensor(alpha)}
        else:
            state |= {f"{name}.lora_A.weight": change.down, f"{name}.lora_B.weight": change.up}
        said = settings.setdefault(part, {"r": rank, "lora_alpha": alpha, "target_modules": [], "rank_pattern": {},
                                          "alpha_pattern": {}})
        said["target_modules"].append(layer)
        said["rank_pattern"] |= {layer: rank} if rank != said["r"] else {}
        said["alpha_pattern"] |= {layer: alpha} if alpha != said["lora_alpha"] else {}
    if kohya:
        first = next(iter(settings.values()), {"r": 0, "lora_alpha": 0.0})
        notes = {"ss_network_module": "networks.lora", "ss_network_dim": str(first["r"]),
                 "ss_network_alpha": f"{first['lora_alpha']:g}"}
    else:
        notes = {"lora_adapter_metadata": json.dumps({f"{part}.{key}": value for part, said in settings.items()
                                                      for key, value in said.items()})}
    save_state({key: tensor.to(dtype or tensor.dtype) for key, tensor in state.items()}, path, notes)


def _family(width: int) -> str:
    """By the width of its context."""
    return TITLES[WIDTHS[width]] if width in WIDTHS else f"another family (its context is {width} wide)"


def _layers(parts: dict[str, nn.Module], kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d)) -> dict[str, nn.Module]:
    """{"unet.conv_in": …}: every layer that a LoRA can change."""
    return {f"{part}.{name}": layer for part, net in parts.items() for name, layer in net.named_modules()
            if isinstance(layer, kinds)}


def _weight(parts: dict[str, nn.Module], name: str) -> nn.Parameter:
    """The weight of a layer, or its bias where the name ends so."""
    part, _, path = name.removesuffix(".bias").partition(".")
    layer = parts[part].get_submodule(path)
    return layer.bias if name.endswith(".bias") else layer.weight


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
            layer_of |= {prefix + spelled: name for prefix in COMFY[part]}
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


def _factor(name: str, rank: int, *, alphas: dict[str, float], settings: dict[str, Any]) -> float:
    """alpha/rank, or with use_rslora alpha/√rank (2312.03732); alpha of the layer, else of its part, else the rank.

    Rank 0 is that of a change of which no part is of low rank.
    """
    part, _, path = name.partition(".")
    if (method := settings.get(f"{part}.peft_type") or "LORA") not in METHODS:
        raise ValueError(f"the LoRA's settings for {part} say {method}; supported are {', '.join(METHODS)}")
    said = "lora_alpha" if method == "LORA" else "alpha"
    patterns, whole, root = (settings.get(f"{part}.{key}") for key in ("alpha_pattern", said, "use_rslora"))
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
    if not rank:                                            # nothing is of low rank: alpha counts for PEFT alone
        rank, alphas = settings.get(f"{part}.r"), {}
        if not rank:
            return 1.0
    alpha = next((a for a in (alphas.get(name), *matching[:1], whole) if a is not None), rank)
    return alpha / (rank ** 0.5 if root else rank)
