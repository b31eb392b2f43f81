"""Names of weights in single files, CompVis' and OpenCLIP's, from ours (diffusers' and transformers').

Each table says how our name becomes the file's; applied to all names of a network it can be read backwards, so one
table serves loading and saving. CompVis counts blocks through all resolutions and names layers by their place.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.io.weights import State

Rule = tuple[str, "str | Callable[[re.Match], str]"]  # a pattern, and what stands for it in the file


class Place(NamedTuple):
    """Where a tensor is in a file: its name, and how it is stored there if not as it is."""

    name: str
    third: int | None = None  # query, key and value are one tensor in OpenCLIP: which third of it
    form: str = ""  # "T": transposed; "1x1": as a convolution


Places = dict[str, Place]  # by our name


def unet(keys: Iterable[str]) -> Places:
    """Places of a U-Net's or ControlNet's weights in CompVis' files.

    Args:
        keys: all its names: they tell how many blocks there are, and where attention is.

    >>> places = unet(["up_blocks.0.attentions.0.norm.bias", "up_blocks.0.upsamplers.0.conv.bias"])
    >>> [place.name for place in places.values()]
    ['output_blocks.0.1.norm.bias', 'output_blocks.0.2.conv.bias']
    """
    keys = list(keys)
    n = 1 + len({key.split(".")[3] for key in keys if key.startswith("down_blocks.0.resnets.")})
    hints = len({key.split(".")[2] for key in keys if key.startswith("controlnet_cond_embedding.blocks.")})
    attended = {int(key.split(".")[1]) for key in keys if re.match(r"up_blocks\.\d+\.attentions", key)}

    def down(m: re.Match) -> str:
        return f"input_blocks.{1 + n * int(m[1]) + int(m[3])}.{int(m[2] == 'attentions')}"

    def up(m: re.Match) -> str:
        return f"output_blocks.{n * int(m[1]) + int(m[3])}.{int(m[2] == 'attentions')}"

    return _places(keys, [
        *((rf"(resnets\.\d+)\.{ours}\.", rf"\1.{theirs}.") for ours, theirs in (
            ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"))),
        (r"^down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", down),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{n * int(m[1]) + n}.0.op"),
        (r"^mid_block\.resnets\.(\d+)", lambda m: f"middle_block.{2 * int(m[1])}"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", up),
        (r"^up_blocks\.(\d+)\.upsamplers\.0\.conv",
         lambda m: f"output_blocks.{n * int(m[1]) + n - 1}.{1 + (int(m[1]) in attended)}.conv"),
        (r"^conv_in\.", "input_blocks.0.0."), (r"^conv_norm_out\.", "out.0."), (r"^conv_out\.", "out.2."),
        (r"^time_embedding\.linear_1", "time_embed.0"), (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^time_embedding\.cond_proj", "time_embed.cond_proj"),
        (r"^add_embedding\.linear_1", "label_emb.0.0"), (r"^add_embedding\.linear_2", "label_emb.0.2"),
        (r"^controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0"), (r"^controlnet_mid_block", "middle_block_out.0"),
        (r"^controlnet_cond_embedding\.conv_in", "input_hint_block.0"),
        (r"^controlnet_cond_embedding\.blocks\.(\d+)", lambda m: f"input_hint_block.{2 * int(m[1]) + 2}"),
        (r"^controlnet_cond_embedding\.conv_out", f"input_hint_block.{2 * hints + 2}")])


def vae(keys: Iterable[str]) -> Places:
    """Places of a VAE's weights in CompVis' files, which count the decoder's resolutions from the picture too.

    >>> places = vae(["decoder.up_blocks.0.resnets.1.conv1.bias", "decoder.up_blocks.3.resnets.0.conv1.bias"])
    >>> [place.name for place in places.values()]
    ['decoder.up.3.block.1.conv1.bias', 'decoder.up.0.block.0.conv1.bias']
    """
    keys = list(keys)
    top = max(int(key.split(".")[2]) for key in keys if key.startswith("decoder.up_blocks."))
    places = _places(keys, [
        (r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2"),
        (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
        (r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"decoder.up.{top - int(m[1])}.block.{m[2]}"),
        (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"decoder.up.{top - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut")])
    matrix = re.compile(r".*\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
    return {key: place._replace(form="1x1") if matrix.match(place.name) else place for key, place in places.items()}


def openclip(keys: Iterable[str]) -> Places:
    """Places of a text encoder's weights in OpenCLIP's files (Stable Diffusion 2, the second encoder of SDXL).

    >>> [*openclip(["text_model.encoder.layers.3.self_attn.k_proj.bias"]).values()]
    [Place(name='transformer.resblocks.3.attn.in_proj_bias', third=1, form='')]
    """
    places = _places(keys, [
        (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
        (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^text_model\.encoder\.layers", "transformer.resblocks"), (r"layer_norm(\d)", r"ln_\1"),
        (r"self_attn\.out_proj", "attn.out_proj"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
        (r"^text_model\.final_layer_norm", "ln_final"), (r"^text_projection\.weight", "text_projection")])
    for key, place in places.items():
        if match := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", place.name):
            places[key] = Place(f"{match[1]}.attn.in_proj_{match[3]}", third="qkv".index(match[2]))
        elif place.name == "text_projection":
            places[key] = place._replace(form="T")
    return places


def to_ours(places: Places, state: State) -> State:
    """The tensors of a file by our names; those without a place keep the file's.

    >>> to_ours({"a": Place("x", third=1)}, {"x": torch.arange(6), "y": torch.ones(1)})
    {'a': tensor([2, 3]), 'y': tensor([1.])}
    """
    renamed = {key: _part(state[place.name], place) for key, place in places.items() if place.name in state}
    known = {place.name for place in places.values()}
    return renamed | {name: tensor for name, tensor in state.items() if name not in known}


def to_theirs(places: Places, state: State) -> State:
    """The inverse of `to_ours`.

    >>> to_theirs({"a": Place("x", third=0), "b": Place("x", third=1)}, {"a": torch.zeros(1), "b": torch.ones(1)})
    {'x': tensor([0., 1.])}
    """
    new: dict[str, list[Tensor]] = {}
    for key, place in sorted(places.items(), key=lambda item: item[1].third or 0):
        tensor = state[key].T if place.form == "T" else state[key]
        new.setdefault(place.name, []).append(tensor[..., None, None] if place.form == "1x1" else tensor)
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in new.items()}


def _places(keys: Iterable[str], rules: Iterable[Rule]) -> Places:
    compiled = [(re.compile(pattern), new) for pattern, new in rules]

    def renamed(name: str) -> str:
        for pattern, new in compiled:
            name = pattern.sub(new, name)
        return name

    return {key: Place(renamed(key)) for key in keys}


def _part(tensor: Tensor, place: Place) -> Tensor:
    if place.third is not None and tensor.ndim and len(tensor) % 3 == 0:
        tensor = tensor.chunk(3)[place.third]
    return tensor.T.contiguous() if place.form == "T" and tensor.ndim == 2 else tensor
