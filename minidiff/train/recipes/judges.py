"""The nets that judge drawn pictures: the reader, which reads attributes back, and the counter."""
from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.data import scenes
from minidiff.data.drawing import crowd
from minidiff.nets.patches import Patches, PatchesConfig
from minidiff.nets.reader import SCENE, THING, Reader, ReaderConfig
from minidiff.train.pictures import DRAWINGS, draw, drawings, from_bytes
from minidiff.train.recipes.begin import fitted, start
from minidiff.train.trainer import Run, batch_indices, generator, train


def reader(run: Run, *, size: int = 32, data: Path | None = None, init: Path | None = None) -> None:
    """Classifier that reads a drawing's seven attributes back; it measures prompt adherence.

    Raises:
        ValueError: a folder (data); it learns from scenes alone.
    """
    if data:
        raise ValueError("the reader learns the attributes of scenes; it cannot be trained on a folder (--data)")
    n, seed = min(60_000, drawings(run)), run.seed + 1_000_000  # its own drawings, all colour-object pairs
    pictures, drawn = draw(n, size, seed=seed, held_out=None, second=0.3)
    truth = {name: torch.tensor([row[name] for row in map(slots, drawn)]) for name in (*SCENE, *THING)}
    run = fitted(run, n)
    net = start(Reader, ReaderConfig(size=size), run, init, "size")

    def loss(net: Reader, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(n, run.batch, step, run.seed)[share]
        g = generator(run.seed, step, share.start)
        image = from_bytes(pictures[rows])
        image = image + 0.15 * torch.rand(len(rows), 1, 1, 1, generator=g) * torch.randn(image.shape, generator=g)
        device = next(net.parameters()).device
        reading = net(image.to(device))
        logits = {**reading.scene, **{name: part.flatten(0, 1) for name, part in reading.thing.items()}}
        return {"loss": sum(F.cross_entropy(logits[name].float(), truth[name][rows].flatten().to(device),
                                            ignore_index=-1) for name in logits)}

    train("reader", net, loss, run, batch=run.batch, lr=1e-3).save_pretrained(run.out, dtype=torch.float16)


def slots(scene: scenes.Scene) -> dict:
    """The truth the reader is trained on: three indices, then for each place what stands there (−1: not asked)."""
    values = scenes.ATTRIBUTES
    nothing = len(values["object"])
    row = {name: values[name].index(getattr(scene, name)) for name in SCENE}
    row |= {"object": [nothing] * 3, "color": [-1] * 3, "size": [-1] * 3}
    things = [(scene.place, scene.object, scene.color, scene.size)]
    if scene.second:
        color, obj, size = scene.second
        things.append(("right", obj, color, size))
    for place, *thing in things:
        for name, value in zip(THING, thing):
            row[name][values["place"].index(place)] = values[name].index(value)
    return row


def counter(run: Run, *, size: int = 64, data: Path | None = None, init: Path | None = None) -> None:
    """Net that counts the suns, moons and objects of a drawing; the evaluation finds those that nobody asked for.

    Raises:
        ValueError: a folder (data); it learns from scenes alone.
    """
    if data:
        raise ValueError("this recipe counts in scenes; it cannot be trained on a folder (--data)")
    config = PatchesConfig(block_out_channels=(16, 32, 64, 96), out_channels=3)
    net, run = start(Patches, config, run, init, "out_channels"), fitted(run, DRAWINGS)

    def loss(net: Patches, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(DRAWINGS, run.batch, step, run.seed)[share]
        pictures, counts = zip(*[counted(random.Random(f"{run.seed + 3_000_000} {row}"), size, crowded=row % 2)
                                 for row in rows.tolist()])
        g, device = generator(run.seed, step, share.start), next(net.parameters()).device
        image = from_bytes(torch.stack(pictures))
        blurred = F.interpolate(F.avg_pool2d(image, 2), scale_factor=2.0, mode="bilinear")  # as a VAE may leave it
        image = torch.lerp(image, blurred, torch.rand(len(rows), 1, 1, 1, generator=g))
        image = image + 0.15 * torch.rand(len(rows), 1, 1, 1, generator=g) * torch.randn(image.shape, generator=g)
        count, truth = net(image.to(device))[0].float().sum((2, 3)), torch.tensor(counts, device=device)
        return {"loss": F.mse_loss(count, truth.float()), "right": (count.round() == truth).all(1).float().mean()}

    train("counter", net, loss, run, batch=run.batch, lr=2e-3).save_pretrained(run.out, dtype=torch.float16)


def counted(rng: random.Random, size: int, *, crowded: bool) -> tuple[Tensor, list[int]]:
    """A drawing (3,size,size) uint8, of a scene with any pair or a crowd, and how many suns, moons and objects it has.

    >>> picture, counts = counted(random.Random(1), 16, crowded=False); picture.shape, counts
    (torch.Size([3, 16, 16]), [0, 0, 1])
    """
    if crowded:
        picture, counts = crowd(size, rng)
    else:
        scene = scenes.sample(rng, held_out=None, second=0.3)
        picture, _ = scenes.draw(scene, size, rng)
        counts = scenes.counts(scene)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1), list(counts.values())
