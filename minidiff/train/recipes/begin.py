"""What a recipe begins with: random weights, those of a folder, or a smaller VAE's in a larger one."""
from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from minidiff.io.plain_text import read_json
from minidiff.nets.config import Config
from minidiff.nets.vae import VAE
from minidiff.train.trainer import Run

Built = TypeVar("Built")


def start(net: type, config: Config, run: Run, init: Path | None, *same: str) -> nn.Module:
    """A network with the weights in `init`, which must be as `config` says in the fields `same`, or with random ones.

    Raises:
        ValueError: it is not.
    """
    if not init:
        return seeded(lambda: net.build(config), run.seed)
    loaded = net.from_pretrained(init)
    for name in same:
        given, needed = (attrgetter(name)(each) for each in (loaded.config, config))
        if given != needed:
            raise ValueError(f"the weights in {init} are made for {name.split('.')[-1]} {given}, this run needs "
                             f"{needed}: give others, or the options that they were made with")
    return loaded


def fitted(run: Run, examples: int) -> Run:
    """The run with a batch no larger than what there is; that it was made smaller is said."""
    if run.batch > examples:
        warnings.warn(f"{examples} pictures are fewer than a batch of {run.batch}: it is {examples} now", stacklevel=3)
    return replace(run, batch=min(run.batch, examples))


def model_parts(init: Path, out: Path, name: str) -> Path:
    """Where a recipe's own part of a whole model is; what `unet` needs beside goes to `out`, if it is not there.

    Raises:
        ValueError: the recipe trains no part of a model that it could go on from, or the model is of another kind.
    """
    if name not in ("vae", "unet"):
        raise ValueError(f"{init} is a whole model; {name} does not go on from one" + (
            ", but from the two towers in train/clip/model of an earlier run" if name == "clip" else ""))
    if name == "unet":
        said = read_json(init / "scheduler" / "scheduler_config.json").get("prediction_type") or "epsilon"
        if (init / "text_encoder_2").is_dir() or said != "epsilon":
            raise ValueError(f"{init} has a second text encoder or predicts {said}; unet goes on from models with one, "
                             "that predict epsilon")
        for part in ("tokenizer", "text_encoder", "vae"):
            if not (out / part).is_dir():
                shutil.copytree(init / part, out / part)
    return init / name


def seeded(build: Callable[[], Built], seed: int) -> Built:
    """build() with torch's random numbers seeded, the generator put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@torch.no_grad()
def grown(small: VAE, seed: int = 0) -> VAE:
    """The VAE with one level of resolution more: twice the picture, the same latent (Karras et al. 2018, 1710.10196).

    The new level adds nothing at first: the encoder takes means of 2×2 features behind its first convolution, the
    decoder doubles the features before its last one.

    >>> small = VAE(VAE.Config(block_out_channels=(8, 16), norm_num_groups=4))
    >>> grown(small).encode(torch.zeros(1, 3, 16, 16)).shape, small.encode(torch.zeros(1, 3, 8, 8)).shape
    (torch.Size([1, 4, 4, 4]), torch.Size([1, 4, 4, 4]))
    """
    config = small.config
    first, *_ = chs = config.block_out_channels
    size = config.sample_size * 2 if isinstance(config.sample_size, int) else None
    net = seeded(lambda: VAE.build(replace(config, block_out_channels=(first, *chs), sample_size=size)), seed)
    deeper = {re.sub(r"(?<=encoder\.down_blocks\.)\d+", lambda found: str(int(found[0]) + 1), key): value
              for key, value in small.state_dict().items()}
    net.load_state_dict(net.state_dict() | deeper)
    down, up = net.encoder.down_blocks[0], net.decoder.up_blocks[-1]
    for block in (*down.resnets, *up.resnets):                        # each adds nothing to its input
        for parameter in block.conv2.parameters():
            parameter.zero_()
    halve, double = down.downsamplers[0].conv, net.decoder.up_blocks[-2].upsamplers[0].conv
    for conv in (halve, double):
        nn.init.dirac_(conv.weight)
        conv.bias.zero_()
    halve.weight[:, :, :2, :2] = halve.weight[:, :, 1:2, 1:2] / 4
    return net
