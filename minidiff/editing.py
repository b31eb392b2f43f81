"""Pictures changed instead of drawn anew: interpolation, DDIM inversion, prompt-to-prompt, and where words look."""
from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minidiff.grid import Grid, Step
from minidiff.samplers import ddim
from minidiff.text import tokenize

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985): along the great circle from a to b, so that noise stays noise.

        sin((1 − share)·θ)/sin θ·a + sin(share·θ)/sin θ·b,   cos θ = a·b/(|a||b|)

    The straight line between two independent unit noises has a standard deviation of √½ in its middle.

    Args:
        a, b: (B,...), each row an own pair. share: 0 gives a, 1 gives b.

    >>> slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5)
    tensor([[0.7071, 0.7071]])
    """
    axes = tuple(range(1, a.ndim))
    dot = (a * b).sum(axes, keepdim=True) / (a.square().sum(axes, keepdim=True)
                                             * b.square().sum(axes, keepdim=True)).sqrt()
    angle = dot.clamp(-1, 1).acos()
    straight = angle.sin() < 1e-4                                        # (anti)parallel: the line is as good
    bottom = angle.sin().masked_fill(straight, 1.0)
    first = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / bottom)
    return first * a + torch.where(straight, share, (share * angle).sin() / bottom) * b


def invert(denoise: Callable, x: Tensor, grid: Grid) -> Iterator[Step]:
    """DDIM inversion (Song et al. 2020, arXiv 2010.02502, section 4.3): from a picture up the grid to its noise.

    `ddim` on the reversed grid: each step uses the eps of the level that it leaves, where the way down would use that
    of the level that it comes to; the difference, and with it the error of going up and down again, falls with the
    number of steps.

    Args:
        denoise: (x, level) -> Pred; without guidance, which makes the difference large.
        x: (B,...), data: the state at grid[-1]. grid: as for the way down.

    Yields:
        len(grid) steps; the x of the last one is what `ddim` starts from, `grid.start` left out.

    >>> from minidiff.sd.scheduler import preset
    >>> from minidiff.prediction import oracle
    >>> grid = preset("sd-ddim", 5)
    >>> *_, up = invert(oracle(3.0), torch.tensor(3.1), grid)
    >>> *_, down = ddim(oracle(3.0), up.x, grid); round(down.x.item(), 4)
    3.1
    """
    return ddim(denoise, x, tuple(reversed(grid)))


def aligned(tokenizer: Tokenizer, source: str, target: str) -> Tensor:
    """For each of the 77 tokens of `target` the place of the one in `source` that it keeps or replaces, −1: it is new.

    Where a run of words gives way to as many tokens, they correspond one by one.

    >>> from minidiff.io.weights import weights_dir
    >>> from minidiff.io.tokenizer import load_tokenizer
    >>> tokenizer = load_tokenizer(weights_dir() / "mini-sd" / "tokenizer")
    >>> aligned(tokenizer, "a red house", "a blue house")[:5], aligned(tokenizer, "a house", "a red house")[:5]
    (tensor([0, 1, 2, 3, 4]), tensor([ 0,  1, -1,  2,  3]))
    """
    old, new = tokenize(tokenizer, [source, target]).tolist()
    places = torch.full((len(new),), -1)
    for _, i, i2, j, j2 in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if i2 - i == j2 - j:
            places[j:j2] = torch.arange(i, i2)
    return places


def prompt_to_prompt(places: Tensor, steps: int, *, words: float = 0.8, layout: float = 0.4) -> Callable:
    """The change for `minidiff.nets.attention.watched` that draws another prompt with the look of a first one.

    Hertz et al. 2022 (arXiv 2208.01626, section 3.2). In a run of P source prompts and then their P targets, from the
    same P noises, each target uses its source's attention: to the prompt, word by word, in the first share `words` of
    the steps, and of the picture to itself in the first share `layout`. What a word that is new looks at is its own.

    Args:
        places: (P,77), a row of `aligned` for each pair. steps: U-Net calls of the run.
        words, layout: shares in [0, 1]; 0 and 0 change nothing.

    >>> import minidiff as md
    >>> from minidiff.nets.attention import watched
    >>> pipe = md.StableDiffusion.from_pretrained("mini-sd")
    >>> pair = ["a red house, snow, day", "a blue house, snow, day"]
    >>> change = prompt_to_prompt(aligned(pipe.text.tokenizers[0], *pair)[None], steps=10)
    >>> with watched(pipe.unet, change):
    ...     images = pipe(pair, latents=torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1), steps=10)
    """
    calls: dict[str, int] = {}
    pairs, new = len(places), (places < 0)[:, None, None]                # (P,1,1,77)
    index = places.clamp(min=0)[:, None, None]

    def change(name: str, maps: Tensor) -> Tensor:
        step = calls[name] = calls.get(name, -1) + 1
        across = "attn2" in name
        if step >= steps * (words if across else layout):
            return maps
        source, edited = maps[-2 * pairs:].split(pairs)                  # in front of them, rows without prompt
        if across:
            taken = source.gather(-1, index.to(maps.device).expand_as(source))
            source = torch.where(new.to(maps.device), edited, taken)
        return torch.cat([maps[:-pairs], source])

    return change


def look(seen: dict[str, list[Tensor]], places: list[int], sides: tuple[int, int], row: int = -1) -> Tensor:
    """Where tokens are looked at from: the noted maps of `minidiff.nets.attention.watched`, one size for all layers.

    Args:
        seen: of a U-Net with a prompt. places: the tokens of a word, see `minidiff.text.words`; their maps add up.
        sides: (h, w) of the latent. row: of the batch; −1 is the last picture's, with its prompt.

    Returns:
        (steps, layers, h, w), the mean over heads of the share of each position's attention.

    >>> look({"attn2": [torch.full((1, 2, 4, 77), 1 / 77)] * 3}, [1, 2], (4, 4)).shape
    torch.Size([3, 1, 4, 4])
    """
    layers = []
    for name, calls in seen.items():
        if "attn2" in name:
            maps = torch.stack([call[row, ..., places].sum(-1).mean(0) for call in calls])   # (steps, N)
            coarser = math.isqrt(sides[0] * sides[1] // maps.shape[-1])
            maps = maps.unflatten(-1, (-1, sides[1] // coarser))[:, None].float()
            layers.append(torch.nn.functional.interpolate(maps, size=sides, mode="bilinear")[:, 0])
    return torch.stack(layers, dim=1)
