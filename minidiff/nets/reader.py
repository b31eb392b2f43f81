"""The reader: a small convolutional classifier that turns a drawn scene back into its attributes.

It makes prompt adherence a number without any download. No training loss of mini-sd uses it.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.data.scenes import ATTRIBUTES
from minidiff.nets.config import Config
from minidiff.nets.layers import Net

SLOTS = len(ATTRIBUTES["place"])  # one question each: what stands here, in which colour, how large?
SCENE, THING = ("time", "sky", "ground"), ("object", "color", "size")


@dataclass(frozen=True)
class ReaderConfig(Config):
    """size: pictures are reduced to size×size pixels before reading. ch: width of the first layer."""

    size: int = 32
    ch: int = 32


class Reading(NamedTuple):
    """Logits: `scene[name]` (B, values) of time, sky and ground; `thing[name]` (B, 3 places, values) of what stands at
    the left, the centre and the right, where `object` has one more value at the end: nothing."""

    scene: dict[str, Tensor]
    thing: dict[str, Tensor]


class Reader(Net):
    """Five convolutions and one linear layer.

    >>> reading = Reader(ReaderConfig(ch=8))(torch.zeros(2, 3, 64, 64)); reading.thing["object"].shape
    torch.Size([2, 3, 7])
    """

    Config = ReaderConfig
    stem = "model"

    def __init__(self, config: ReaderConfig = ReaderConfig()):
        super().__init__(config)
        ch = config.ch
        widths = (3, ch, 2 * ch, 4 * ch, 4 * ch)
        self.trunk = nn.Sequential(*[layer for i, o in zip(widths, widths[1:]) for layer in
                                     (nn.Conv2d(i, o, 3, 1 if i == 3 else 2, 1), nn.GroupNorm(8, o), nn.SiLU())])
        self.counts = ([len(ATTRIBUTES[name]) for name in SCENE]
                       + [SLOTS * (len(ATTRIBUTES[name]) + (name == "object")) for name in THING])
        self.head = nn.Linear(4 * ch * (config.size // 8) ** 2, sum(self.counts))

    def forward(self, image: Tensor) -> Reading:
        """image (B,3,H,W) in [−1, 1] -> Reading."""
        parts = self.head(self._maps(image).flatten(1)).split(self.counts, 1)
        return Reading(dict(zip(SCENE, parts)),
                       {name: part.unflatten(1, (SLOTS, -1)) for name, part in zip(THING, parts[3:])})

    @torch.inference_mode()
    def features(self, image: Tensor) -> Tensor:
        """What `minidiff.measure.metrics` compares pictures by: the last maps, averaged over positions, (B, 4·ch).

        >>> Reader(ReaderConfig(ch=8)).features(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 32])
        """
        return self._maps(image).mean((2, 3))

    def _maps(self, image: Tensor) -> Tensor:
        size = self.config.size
        if image.shape[-2:] != (size, size):
            image = F.interpolate(image, (size, size), mode="bilinear", antialias=True)
        return self.trunk(image)

    @torch.inference_mode()
    def read(self, image: Tensor) -> dict[str, Tensor]:
        """The seven attributes of one-object pictures, as indices into ATTRIBUTES: name -> (B,) int64.

        The place is the one where `nothing` is least likely; object, colour and size are what is read there.
        """
        scene, thing = self(image)
        place = thing["object"].softmax(-1)[..., -1].argmin(1)  # (B,)
        rows = torch.arange(len(place), device=place.device)
        read = {name: logits.argmax(1) for name, logits in scene.items()}
        read |= {name: thing[name][rows, place, :len(ATTRIBUTES[name])].argmax(1) for name in THING}
        return read | {"place": place}

    @torch.inference_mode()
    def things(self, image: Tensor) -> list[Counter[tuple[int, int]]]:
        """How often each (colour, object) pair stands in each picture, as indices into ATTRIBUTES."""
        thing = self(image).thing
        obj, color = thing["object"].argmax(-1), thing["color"].argmax(-1)  # (B, 3)
        nothing = len(ATTRIBUTES["object"])
        return [Counter((c, o) for c, o in zip(cs, os) if o != nothing) for cs, os in zip(color.tolist(), obj.tolist())]
