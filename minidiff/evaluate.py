"""Does the picture show what the prompt says? Prompt adherence of mini-sd, read back by a classifier: no download."""
from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch

from minidiff.data import scenes
from minidiff.io.weights import weights_dir
from minidiff.nets.reader import Reader
from minidiff.pipeline import StableDiffusion

BATCH = 50


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
    """The fixed scenes of one set: "seen", "unseen" (held-out colour-object pairs) or "two" (two objects).

    >>> {(scene.color, scene.object) for scene in prompt_set("unseen", 20)} <= scenes.HELD_OUT
    True
    """
    held_out, second = {"seen": (False, 0.0), "unseen": (True, 0.0), "two": (False, 1.0)}[name]
    return [scenes.sample(random.Random(f"{name} {i}"), held_out=held_out, second=second) for i in range(n)]


def evaluate(model: str | Path | StableDiffusion = "mini-sd", *, n: int = 1000, device: str | None = None,
             json_path: str | Path | None = None, progress: bool = False) -> dict:
    """Draw n prompts per set with the default settings and read the pictures back.

    Args:
        model: anything StableDiffusion.from_pretrained takes, or a pipeline.
        n: prompts per set; each names all seven attributes, prompt i has seed i.
        json_path: also write the result there.

    Returns:
        `attribute_accuracy` (mean over the seven), `per_attribute`, `picture_accuracy` (all seven right),
        `unseen_pair_accuracy` (colour and object right for pairs no net was trained on; chance 2 %),
        `binding_accuracy` (both colour-object pairs of a two-object prompt), `ceiling` (per attribute, the reader on
        VAE round trips of true drawings of the first set), `unseen_pair_ceiling` (of the second), each share with
        its 95 % Wilson interval; `images`, `seconds`.

    Raises:
        ValueError: n < 1.

    >>> result = evaluate("mini-sd", n=2)
    >>> result["images"], sorted(result["per_attribute"])
    (6, ['color', 'ground', 'object', 'place', 'size', 'sky', 'time'])
    """
    if n < 1:
        raise ValueError(f"n is {n}; evaluate at least 1 prompt per set")
    pipe = model if isinstance(model, StableDiffusion) else StableDiffusion.from_pretrained(model, device=device)
    reader = Reader.from_pretrained(weights_dir() / "reader")
    began, bar = time.monotonic(), _bar(3 * n, progress)

    def pictures(drawn: list[scenes.Scene]):
        for first in range(0, n, BATCH):
            prompts = [scenes.caption(scene) for scene in drawn[first:first + BATCH]]
            yield drawn[first:first + BATCH], pipe(prompts, seed=first, output="tensor").cpu() * 2 - 1
            bar.update(len(prompts))

    seen = [row for part, image in pictures(prompt_set("seen", n)) for row in right(reader, part, image)]
    unseen = [row for part, image in pictures(prompt_set("unseen", n)) for row in right(reader, part, image)]
    bound = [_pairs(scene) <= things for part, image in pictures(prompt_set("two", n))
             for scene, things in zip(part, reader.things(image))]
    ceiling, unseen_ceiling = (round_trips(pipe, reader, prompt_set(name, n)) for name in ("seen", "unseen"))
    bar.close()
    seconds = time.monotonic() - began
    result = {
        "attribute_accuracy": round(sum(sum(row.values()) for row in seen) / (n * len(scenes.ATTRIBUTES)), 4),
        "per_attribute": {name: share([row[name] for row in seen]) for name in scenes.ATTRIBUTES},
        "picture_accuracy": share([all(row.values()) for row in seen]),
        "unseen_pair_accuracy": share([row["color"] and row["object"] for row in unseen]),
        "binding_accuracy": share(bound),
        "ceiling": {name: share([row[name] for row in ceiling]) for name in scenes.ATTRIBUTES},
        "unseen_pair_ceiling": share([row["color"] and row["object"] for row in unseen_ceiling]),
        "images": 3 * n, "seconds": round(seconds, 1)}
    if json_path:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
    return result


def right(reader: Reader, part: list[scenes.Scene], image: torch.Tensor) -> list[dict[str, bool]]:
    """For each picture (B,3,H,W) in [−1, 1]: which of the seven attributes of its scene the reader finds."""
    read = {name: values.tolist() for name, values in reader.read(image).items()}
    truth = [scenes.labels(scene) for scene in part]
    return [{name: read[name][i] == value for name, value in row.items()} for i, row in enumerate(truth)]


@torch.inference_mode()
def round_trips(pipe: StableDiffusion, reader: Reader, drawn: list[scenes.Scene]) -> list[dict[str, bool]]:
    """What the VAE alone allows: `right` for true drawings of the scenes that went through it and back."""
    rows = []
    for first in range(0, len(drawn), BATCH):
        part = drawn[first:first + BATCH]
        image = torch.stack([_tensor(scenes.draw(scene, pipe.size, random.Random(f"ceiling {first + i}"))[0])
                             for i, scene in enumerate(part)]).to(pipe.device)
        rows += right(reader, part, pipe.vae.decode(pipe.vae.encode(image)).clamp(-1, 1).cpu())
    return rows


def _tensor(picture) -> torch.Tensor:
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size[::-1], 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _pairs(scene: scenes.Scene) -> Counter[tuple[int, int]]:
    colors, objects = scenes.ATTRIBUTES["color"], scenes.ATTRIBUTES["object"]
    return Counter((colors.index(c), objects.index(o)) for c, o in [(scene.color, scene.object), scene.second[:2]])


def _bar(total: int, progress: bool):
    from tqdm import tqdm

    return tqdm(total=total, desc="evaluate", unit="picture", disable=not progress)
