"""Does the picture show what the prompt says, and is the set of pictures like the drawings? Without any download.

A classifier, the reader, reads the pictures back, and its features measure the distances of sets (`measure.metrics`);
another net counts what nobody asked for; the energy of the Laplacian, beside that of drawings, says how sharp they are.
"""
from __future__ import annotations

import itertools
import json
import math
import random
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from minidiff.data import scenes
from minidiff.io.images import save_image, to_pil, to_tensor, to_unit
from minidiff.io.weights import weights_dir
from minidiff.io.write import write_atomic
from minidiff.measure import metrics
from minidiff.nets.patches import Patches
from minidiff.nets.reader import Reader
from minidiff.sd.pipeline import StableDiffusion
from minidiff.values import whole

if TYPE_CHECKING:
    from PIL import Image

BATCH = 50
SHOWN = 16  # pictures per part of the contact sheet
MOST = 2000  # prompts per set: there are 2,160 scenes with a held-out pair
SETS = ("seen", "unseen", "two")
FRESH = 2_000_000  # seed of drawings that no recipe trains on
COUNTING = 64  # side to which pictures are reduced to be counted in, that of the counter's recipe


class Drawn(NamedTuple):
    """One picture of an evaluation: what was asked, what came, and what is wrong with it: attributes that the reader
    misses, and extras.
    """

    scene: scenes.Scene
    image: torch.Tensor  # (3,H,W) in [−1, 1]
    wrong: list[str]


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22): sound near 0 and 1 too.

    >>> [round(bound, 3) for bound in wilson(99, 100)]
    [0.946, 0.998]
    """
    p = hits / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def share(hits: list[bool]) -> dict:
    """{"value", "low", "high", "n"} of a list of successes."""
    low, high = wilson(sum(hits), len(hits))
    return {"value": round(sum(hits) / len(hits), 4), "low": round(low, 4), "high": round(high, 4), "n": len(hits)}


def prompt_set(name: str, n: int) -> list[scenes.Scene]:
    """The first n different scenes of a set: "seen", "unseen" (held-out colour-object pairs) or "two" (two objects).

    Raises:
        ValueError: n is not in 1 … MOST.

    >>> {(scene.color, scene.object) for scene in prompt_set("unseen", 20)} <= scenes.HELD_OUT
    True
    """
    n = whole("n", n, 1, MOST)
    held_out, second = {"seen": (False, 0.0), "unseen": (True, 0.0), "two": (False, 1.0)}[name]
    different: dict[scenes.Scene, None] = {}
    for i in itertools.count():
        different[scenes.sample(random.Random(f"{name} {i}"), held_out=held_out, second=second)] = None
        if len(different) == n:
            return list(different)


def evaluate(model: str | Path | StableDiffusion = "mini-sd", *, n: int = 1000, device: str | None = None,
             json_path: str | Path | None = None, sheet_path: str | Path | None = None, progress: bool = False,
             **settings) -> dict:
    """Draw n different prompts per set and read the pictures back.

    Args:
        model: anything StableDiffusion.from_pretrained takes, or a pipeline.
        n: prompts per set, 1 … MOST; each names all seven attributes, prompt i has seed i.
        json_path: also write the result there.
        sheet_path: also write a picture there to look at: `contact_sheet`.
        settings: of the pipeline's call, e.g. steps=10, guidance_scale=3.0; the pipeline's defaults without.

    Returns:
        `attribute_accuracy` (mean over the seven), `per_attribute`, `picture_accuracy` (all seven right),
        `unseen_pair_accuracy` (colour and object right for pairs no net was trained on; chance 2 %),
        `binding_accuracy` (both colour-object pairs of a two-object prompt), `extras` (the share of all 3n pictures
        with a sun, moon or object that nobody asked for), `sharpness` (the mean energy of the Laplacian of the first
        set's pictures, over that of drawings of the same scenes), `ceiling` (per attribute, the reader on VAE round
        trips of those drawings, and their `extras` and `sharpness`: what the VAE and the nets that judge allow),
        `unseen_pair_ceiling` (of the second set), each with its 95 % interval; for n ≥ 8 `pictures` and `drawings`,
        what `metrics.compare` finds between n true drawings and the pictures of the first set, and between them and n
        other drawings; `images`, `seconds`.

    Raises:
        ValueError: n is not in 1 … MOST, or a setting is out of range.

    >>> result = evaluate("mini-sd", n=2, steps=5)
    >>> result["images"], sorted(result["per_attribute"])
    (6, ['color', 'ground', 'object', 'place', 'size', 'sky', 'time'])
    """
    sets = {name: prompt_set(name, n) for name in SETS}
    pipe = model if isinstance(model, StableDiffusion) else StableDiffusion.from_pretrained(model, device=device)
    reader = Reader.from_pretrained(weights_dir() / "reader")
    counter = Patches.from_pretrained(weights_dir() / "counter")
    began = time.monotonic()
    hits, shown, extra, features, energy = {}, {}, [], [], []
    with _bar(3 * n, progress) as bar:
        for name, asked in sets.items():
            read = _pairs_right if name == "two" else right
            hits[name], shown[name] = [], []
            for first in range(0, n, BATCH):
                part = asked[first:first + BATCH]
                image = pipe([scenes.caption(scene) for scene in part], seed=first, output="tensor", **settings)
                image = image.cpu() * 2 - 1
                rows, more = read(reader, part, image), extras(counter, part, image)
                hits[name] += rows
                extra += more
                if name == "seen":
                    features.append(reader.features(image))
                    energy.append(laplacian_energy(image))
                drawn = [Drawn(scene, picture, [key for key, hit in row.items() if not hit] + unasked)
                         for scene, picture, row, unasked in zip(part, image, rows, more)]
                shown[name] += [row for i, row in enumerate(drawn) if first + i < SHOWN or row.wrong]
                bar.update(len(part))
        ceiling, unseen_ceiling = (round_trips(pipe, reader, counter, sets[name]) for name in ("seen", "unseen"))
    result = {
        "attribute_accuracy": round(sum(sum(row.values()) for row in hits["seen"]) / (n * len(scenes.ATTRIBUTES)), 4),
        "per_attribute": {name: share([row[name] for row in hits["seen"]]) for name in scenes.ATTRIBUTES},
        "picture_accuracy": share([all(row.values()) for row in hits["seen"]]),
        "unseen_pair_accuracy": share([row["color"] and row["object"] for row in hits["unseen"]]),
        "binding_accuracy": share([all(row.values()) for row in hits["two"]]),
        "extras": share(list(map(bool, extra))),
        "sharpness": ratio(torch.cat(energy), ceiling.drawn),
        "ceiling": {name: share([row[name] for row in ceiling.right]) for name in scenes.ATTRIBUTES} | {
            "extras": share(list(map(bool, ceiling.extras))), "sharpness": ratio(ceiling.energy, ceiling.drawn)},
        "unseen_pair_ceiling": share([row["color"] and row["object"] for row in unseen_ceiling.right]),
        **(against_drawings(reader, torch.cat(features), pipe.size) if n >= 8 else {}),
        "images": 3 * n, "seconds": round(time.monotonic() - began, 1)}
    if json_path:
        write_atomic(json_path, json.dumps(result, indent=2) + "\n")
    if sheet_path:
        save_image(contact_sheet(shown), sheet_path)
    return result


def contact_sheet(shown: dict[str, list[Drawn]]) -> Image.Image:
    """The first 16 pictures of each set, not chosen, and the first 16 failures of all, with their prompts.

    Args:
        shown: set -> its first SHOWN pictures, and all in which something is wrong.
    """
    from PIL import Image, ImageDraw, ImageFont

    def titled(name: str) -> str:
        count = len(parts[name])
        return {"seen": "Random prompts", "unseen": "Colour-object pairs never seen in training",
                "two": "Two objects"}.get(name) or f"Failures: {count or 'none'}{' (the first)' * (count == SHOWN)}"

    def caption(row: Drawn) -> list[str]:
        wrong = f"wrong: {', '.join(row.wrong)}" if row.wrong else ""
        return textwrap.wrap(scenes.caption(row.scene), 22) + textwrap.wrap(wrong, 22)

    parts = {name: rows[:SHOWN] for name, rows in shown.items()}
    parts["failures"] = [row for rows in shown.values() for row in rows if row.wrong][:SHOWN]
    side, columns, title = 128, 8, 28
    text = 14 + 12 * max(len(caption(row)) for rows in parts.values() for row in rows)  # below a picture
    heights = {name: title + (side + text) * -(-len(rows) // columns) for name, rows in parts.items()}
    sheet = Image.new("RGB", (columns * (side + 8), sum(heights.values())), "white")
    pen, small, large = ImageDraw.Draw(sheet), ImageFont.load_default(11), ImageFont.load_default(16)
    top = 0
    for name, rows in parts.items():
        pen.text((4, top + 5), titled(name), "black", large)
        for i, row in enumerate(rows):
            x, y = i % columns * (side + 8), top + title + i // columns * (side + text)
            sheet.paste(to_pil(to_unit(row.image[None]))[0].resize((side, side), Image.Resampling.NEAREST), (x, y))
            pen.multiline_text((x + 1, y + side + 1), "\n".join(caption(row)), "firebrick" if row.wrong else "black",
                               small, spacing=1)
        top += heights[name]
    return sheet


def right(reader: Reader, part: list[scenes.Scene], image: torch.Tensor) -> list[dict[str, bool]]:
    """For each picture (B,3,H,W) in [−1, 1]: which of the seven attributes of its scene the reader finds.

    >>> scene, reader = prompt_set("seen", 1)[0], Reader.from_pretrained(weights_dir() / "reader")
    >>> all(right(reader, [scene], to_tensor([scenes.draw(scene, 64)[0]]))[0].values())
    True
    """
    read = {name: values.tolist() for name, values in reader.read(image).items()}
    truth = [scenes.labels(scene) for scene in part]
    return [{name: read[name][i] == value for name, value in row.items()} for i, row in enumerate(truth)]


@torch.inference_mode()
def extras(counter: Patches, part: list[scenes.Scene], image: torch.Tensor) -> list[list[str]]:
    """For each picture (B,3,H,W) in [−1, 1], what stands in it more often than in its scene: "extra sun" and the like.

    >>> scene = scenes.Scene("day", "moon", "sea", "boat", "pink", "large", "left")
    >>> counter = Patches.from_pretrained(weights_dir() / "counter")
    >>> extras(counter, [scene._replace(sky="sun")], to_tensor([scenes.draw(scene, 64)[0]]))
    [['extra moon']]
    """
    found = counter(F.interpolate(image, (COUNTING, COUNTING), mode="bilinear", antialias=True))[0].sum((2, 3)).round()
    return [[f"extra {name}" for (name, asked), count in zip(scenes.counts(scene).items(), row) if count > asked]
            for scene, row in zip(part, found.tolist())]


def laplacian_energy(image: torch.Tensor) -> torch.Tensor:
    """How sharp pictures (B,3,H,W) in [−1, 1] are: the mean square of their Laplacian, (B,).

    >>> flat, edge = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8).cumsum(3).gt(4).float()
    >>> laplacian_energy(flat).item(), round(laplacian_energy(edge).item(), 3)
    (0.0, 0.333)
    """
    inner, rows, columns = image[..., 1:-1, 1:-1], image[..., 1:-1], image[..., 1:-1, :]
    return (rows[..., :-2, :] + rows[..., 2:, :] + columns[..., :-2] + columns[..., 2:] - 4 * inner).square().mean(
        (1, 2, 3))


def ratio(a: torch.Tensor, b: torch.Tensor) -> dict:
    """{"value", "low", "high", "n"} of the ratio of two means, with its 95 % bootstrap interval."""
    def of(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a.mean() / b.mean()).item()

    low, high = metrics.bootstrap(of, a, b)
    return {"value": round(of(a, b), 4), "low": round(low, 4), "high": round(high, 4), "n": len(a)}


class RoundTrips(NamedTuple):
    """True drawings that went through a VAE and back: `right` and `extras` of them, and the energy of their Laplacian
    (N,), after and before.
    """

    right: list[dict[str, bool]]
    extras: list[list[str]]
    energy: torch.Tensor
    drawn: torch.Tensor


@torch.inference_mode()
def round_trips(pipe: StableDiffusion, reader: Reader, counter: Patches, asked: list[scenes.Scene]) -> RoundTrips:
    """What the VAE alone allows: drawings of the scenes, encoded and decoded."""
    rows, more, energy, before = [], [], [], []
    for first in range(0, len(asked), BATCH):
        part = asked[first:first + BATCH]
        drawn = to_tensor([scenes.draw(scene, pipe.size, random.Random(f"ceiling {first + i}"))[0]
                           for i, scene in enumerate(part)])
        image = pipe.vae.decode(pipe.vae.encode(drawn.to(pipe.device))).clamp(-1, 1).cpu()
        rows += right(reader, part, image)
        more += extras(counter, part, image)
        energy.append(laplacian_energy(image))
        before.append(laplacian_energy(drawn))
    return RoundTrips(rows, more, torch.cat(energy), torch.cat(before))


def against_drawings(reader: Reader, features: torch.Tensor, size: int) -> dict[str, dict]:
    """`metrics.compare` of N drawings of the first set's distribution with pictures of the features (N,D), and with N
    other drawings, which is what a perfect model would get."""
    n = len(features)
    drawn = scenes.render(2 * n, size, seed=FRESH, second=0.0)[0]
    real, fresh = torch.cat([reader.features(part.float() / 127.5 - 1) for part in drawn.split(BATCH)]).split(n)
    return {"pictures": metrics.compare(real, features), "drawings": metrics.compare(real, fresh)}


def _pairs_right(reader: Reader, part: list[scenes.Scene], image: torch.Tensor) -> list[dict[str, bool]]:
    """For each picture of two objects: which of the two (colour, object) pairs the reader finds."""
    index = {name: values.index for name, values in scenes.ATTRIBUTES.items()}
    rows = []
    for scene, pairs_read in zip(part, reader.things(image)):
        wanted = [(scene.color, scene.object), scene.second[:2]]
        pairs = Counter((index["color"](color), index["object"](obj)) for color, obj in wanted)
        missing = pairs - pairs_read
        rows.append({f"{color} {obj}": missing[index["color"](color), index["object"](obj)] == 0
                     for color, obj in wanted})
    return rows


def _bar(total: int, progress: bool):
    from tqdm import tqdm

    return tqdm(total=total, desc="evaluate", unit="picture", disable=not progress)
