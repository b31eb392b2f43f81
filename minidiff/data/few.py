"""Two small sets of captioned drawings, to teach a finished model something: a cat, and scenes in watercolour."""
from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.data import scenes
from minidiff.data.drawing import paint
from minidiff.data.hints import edges

if TYPE_CHECKING:
    from PIL import Image

FEW = 24                 # drawings of a set
PAPER = (250, 245, 232)  # what shines through the paint, and is left bare at the margin
MARGIN = 0.07            # of the side, on the average


def cats(n: int = FEW, size: int = 128, *, seed: int = 0) -> Iterator[tuple[Image.Image, str]]:
    """Scenes with a cat, an object that no scene has, in all colours and places, and their full captions.

    Yields:
        RGB picture size×size, caption; number i depends on (seed, i) and the size alone.

    >>> [text for _, text in cats(2, 16)]
    ['a small orange cat on the right, sand, sunset, clear sky', 'a small white cat in the centre, sand, day, stars']
    """
    for i in range(n):
        rng = random.Random(f"cat {seed} {i}")
        scene = scenes.sample(rng, second=0.0)._replace(object="cat")
        yield paint(scene, size, rng.uniform)[0], scenes.caption(scene)


def watercolours(n: int = FEW, size: int = 128, *, seed: int = 0) -> Iterator[tuple[Image.Image, str]]:
    """Scenes in watercolour and their full captions, which do not say so: the style is what all have in common.

    Yields:
        as `cats`.

    >>> picture, text = next(watercolours(1, 32)); picture.size, text
    ((32, 32), 'a small red house on the right, grass, sunset, clear sky')
    """
    from PIL import Image

    for i in range(n):
        rng = random.Random(f"watercolour {seed} {i}")
        scene = scenes.sample(rng, second=0.0)
        drawn = np.array(scenes.draw(scene, size, rng)[0])
        painted = watercolour(torch.from_numpy(drawn).permute(2, 0, 1) / 255, rng.randrange(2**31))
        yield Image.fromarray((painted * 255).round().byte().permute(1, 2, 0).numpy()), scenes.caption(scene)


def watercolour(picture: Tensor, seed: int = 0) -> Tensor:
    """A picture as if drawn in pencil and painted with thin colours on paper.

    The paint is thin, in clouds, darker where a wash ends, and does not quite keep to the lines; the paper's grain
    shows, and a margin stays bare.

    Args:
        picture: (3,H,W) in [0, 1], at least 16 pixels wide and high.

    Returns:
        The same shape.

    >>> painted = watercolour(torch.zeros(3, 64, 64)); painted.shape, bool(painted[:, 0].mean() > 0.8)
    (torch.Size([3, 64, 64]), True)
    """
    g = torch.Generator().manual_seed(seed)
    _, h, w = picture.shape
    side = min(h, w)

    def clouds(cells: int, channels: int = 1) -> Tensor:
        """Smooth noise (channels,H,W) with so many bumps across, about unit variance."""
        noise = torch.randn(1, channels, cells, cells, generator=g)
        return 1.5 * F.interpolate(noise, (h, w), mode="bicubic", align_corners=False)[0]

    rows, cols = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")

    def wavering(x: Tensor, reach: float) -> Tensor:
        """(1,C,H,W) with every place moved a little, by about `reach` of half a side."""
        dx, dy = reach * (0.8 * clouds(6, 2) + 0.4 * clouds(20, 2))
        return F.grid_sample(x, torch.stack([cols + dx, rows + dy], -1)[None], padding_mode="reflection",
                             align_corners=True)

    paper = torch.tensor(PAPER).view(3, 1, 1) / 255
    wash = wavering(picture[None], 0.02)
    rim = (wash - _blur(wash, side // 40)).abs().amax(1)                  # where one colour ends
    hue = (wash[0] - 0.25 * rim).clamp(0, 1)
    hue = hue + 0.3 * (hue - hue.mean(0, keepdim=True))           # thin paint is pure
    thin = (0.25 + 0.06 * clouds(5) + 0.02 * clouds(16)).clamp(0.06, 0.75)
    pencil = wavering(_blur(edges(_blur(picture[None], side // 40))[:, :1], 1), 0.008)[0]    # of nothing small
    inside = torch.minimum(1 - rows.abs(), 1 - cols.abs()) / 2 + 0.009 * clouds(6) + 0.003 * clouds(24)
    dry = ((MARGIN - inside) * side / 1.5).sigmoid()                      # 1 at the margin, over some four pixels
    painted = (hue * (1 - thin) + paper * thin) * (1 - 0.8 * pencil) * (1 + 0.008 * torch.randn(1, h, w, generator=g))
    edge = 1 - 0.2 * (4 * dry * (1 - dry))                                # paint dries darker where it ends
    return (painted * edge * (1 - dry) + paper * dry).clamp(0, 1)


def _blur(pictures: Tensor, reach: int) -> Tensor:
    reach = max(1, reach)
    for _ in range(2):
        pictures = F.avg_pool2d(F.pad(pictures, (reach,) * 4, mode="replicate"), 2 * reach + 1, 1)
    return pictures


SETS = {"cat": cats, "watercolour": watercolours}


def write(name: str, folder: Path, size: int = 128) -> Path:
    """Draw one of SETS into a folder, as pictures with a metadata.jsonl. Returns the folder.

    >>> import tempfile
    >>> len(list(write("cat", Path(tempfile.mkdtemp()), 16).glob("*.png")))
    24
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (picture, text) in enumerate(SETS[name](FEW, size)):
        picture.save(folder / f"{i:02}.png")
        rows.append(json.dumps({"file_name": f"{i:02}.png", "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder
