"""The pictures that a ControlNet is told, white on black: edges of any picture, silhouettes of a scene's objects."""
from __future__ import annotations

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.data import scenes

HINTS = ("edges", "masks")
LEAST = 0.12  # of a full step from black to white: what is less steep is no edge


def edges(pictures: Tensor, least: float = LEAST) -> Tensor:
    """The edges of pictures as thin white lines on black: slopes and their ridges, after Canny (1986).

    The slope is that of the colour channel in which it is steepest, of the picture blurred by (1, 2, 1)/4. An edge is
    where it is steep, and neither neighbour across the edge is steeper.

    Args:
        pictures: (B,3,H,W) in [0, 1].
        least: the smallest step that is an edge, as a share of that from black to white.

    Returns:
        (B,3,H,W), 0 or 1.

    >>> half = torch.zeros(1, 3, 8, 8); half[..., 4:] = 1.0
    >>> edges(half)[0, 0, 4].nonzero().flatten().tolist()             # one line where the halves meet
    [3]
    """
    smooth = _blur(_blur(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), 2), 3)               # (B,3,H+2,W+2)
    slopes = torch.stack([_blur(_step(smooth, 3), 2), _blur(_step(smooth, 2), 3)])             # (2,B,3,H,W): x, y
    steep, channel = slopes.square().sum(0).sqrt().max(1)                                      # (B,H,W)
    dx, dy = slopes.gather(2, channel[None, :, None].expand(2, -1, 1, -1, -1))[:, :, 0]
    turn = (torch.atan2(dy, dx) * 4 / math.pi).round().long() % 4                              # 0: →, 1: ↘, 2: ↓, 3: ↙
    wide, (h, w) = F.pad(steep, (1, 1, 1, 1)), steep.shape[1:]
    ridge = torch.zeros_like(turn, dtype=torch.bool)
    for k, (i, j) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead, behind = (wide[:, 1 + s * i:1 + s * i + h, 1 + s * j:1 + s * j + w] for s in (1, -1))
        ridge |= (turn == k) & (steep >= ahead - 1e-6) & (steep > behind + 1e-6)               # of two equal ones one
    return (ridge & (2 * steep > least))[:, None].expand(-1, 3, -1, -1).to(pictures)


def _blur(x: Tensor, dim: int) -> Tensor:
    before, here, after = (x.narrow(dim, k, x.shape[dim] - 2) for k in range(3))
    return (before + 2 * here + after) / 4


def _step(x: Tensor, dim: int) -> Tensor:
    before, _, after = (x.narrow(dim, k, x.shape[dim] - 2) for k in range(3))
    return (after - before) / 2


def silhouettes(rows: Tensor, size: int, seed: int = 0, second: float = 0.15) -> Tensor:
    """Where the objects are in drawings of a seed: white on black, (len(rows),3,size,size), 0 or 1.

    Args:
        rows: numbers of the drawings, as in `scenes.render(n, size, seed=seed, second=second)`.

    >>> silhouettes(torch.tensor([0]), 16).shape
    torch.Size([1, 3, 16, 16])
    """
    found = []
    for row in rows.tolist():
        rng = random.Random(f"{seed} {row}")
        _, masks = scenes.draw(scenes.sample(rng, second=second), size, rng)
        found.append(np.logical_or.reduce([*masks.values()]))
    return torch.from_numpy(np.stack(found))[:, None].expand(-1, 3, -1, -1).float()


def read(picture: Tensor, kind: str) -> tuple[Tensor, str]:
    """A picture of any sort as the hint that the shipped ControlNets were trained with, and what was made of it.

    Of a grey one: white lines or areas on black are taken as they are, dark ones on white are inverted. Of any other
    "edges" finds the edges.

    Args:
        picture: (1,3,H,W) in [0, 1].
        kind: "edges" or "masks".

    Returns:
        (1,3,H,W), 0 or 1, and a phrase.

    Raises:
        ValueError: another kind, a coloured picture as a mask, or nothing to see in it.

    >>> paper = torch.ones(1, 3, 32, 32); paper[..., 16] = 0.0
    >>> hint, said = read(paper, "edges"); said, int(hint[0, 0].sum())
    ('dark lines on white, inverted (3.1 % white)', 32)
    """
    if kind not in HINTS:
        raise ValueError(f"there is no hint {kind!r}; there are {', '.join(HINTS)}")
    colour, bright = (picture.amax(1) - picture.amin(1)).mean(), picture.mean(1)
    middle = bright.median()
    what = "lines" if kind == "edges" else "areas"
    if colour < 0.02 and (middle < 0.15 or kind == "masks" and (bright < 0.5).float().mean() > 0.5):
        hint, said = bright > bright.max() / 2, f"white {what} on black, taken as they are"
    elif colour < 0.02 and (middle > 0.85 or kind == "masks"):
        hint, said = 1 - bright > (1 - bright).max() / 2, f"dark {what} on white, inverted"
    elif kind == "masks":
        raise ValueError("the control image has colours; a mask is white where the object is to be, else black")
    else:
        hint, said = edges(picture)[:, 0] > 0.5, "a picture, its edges"
    if not hint.any() or bright.max() - bright.min() < 0.1:
        raise ValueError("there is nothing to see in the control image: it is one colour")
    share = 100 * hint.float().mean().item()
    return hint[:, None].expand(-1, 3, -1, -1).to(picture), f"{said} ({share:.1f} % white)"


def overlap(one: Tensor, other: Tensor, reach: int = 1) -> Tensor:
    """How well two hints agree, (B,): intersection over union, where a white pixel also counts as met `reach` beside.

    A pixel of either is met if one of the other lies within `reach`; the share of met pixels among all white ones of
    both. 1 where both are the same, and where both are empty.

    >>> line = torch.zeros(1, 3, 8, 8); line[..., 4] = 1.0
    >>> [overlap(line, line.roll(k, -1)).item() for k in (0, 1, 2)]
    [1.0, 1.0, 0.0]
    """
    one, other = (hint[:, :1] > 0.5 for hint in (one, other))
    wide = [F.max_pool2d(hint.float(), 2 * reach + 1, 1, reach) > 0.5 for hint in (one, other)]
    met = (one & wide[1]).sum((1, 2, 3)) + (other & wide[0]).sum((1, 2, 3))
    total = one.sum((1, 2, 3)) + other.sum((1, 2, 3))
    return torch.where(total > 0, met / total.clamp(min=1), torch.ones_like(met, dtype=torch.float32))
