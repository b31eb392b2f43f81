"""What a recipe begins with: random weights, or those of a folder."""
from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from minidiff.nets.layers import Config
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


def seeded(build: Callable[[], Built], seed: int) -> Built:
    """build() with torch's random numbers seeded, the generator put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
