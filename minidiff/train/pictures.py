"""What the recipes learn from: drawings or a folder of captioned pictures, and their latents, made once and cached."""
from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from minidiff.data import files, scenes
from minidiff.device import default_device
from minidiff.io.tokenizer import load_tokenizer
from minidiff.io.weights import load_state, save_state
from minidiff.nets.vae import VAE
from minidiff.text import tokenize
from minidiff.train.trainer import Run, digest

if TYPE_CHECKING:
    from PIL import Image
    from tokenizers import Tokenizer

DRAWINGS = 120_000  # pictures that CLIP, VAE and U-Net share
SHORT = 20_000      # a run that sees fewer has fewer drawn
WORDINGS = 4        # captions kept for each of them
SAMPLE = 64         # of them, by which one sees whether they are drawn as before
SOURCES = "other pictures or captions"  # what `Run.made` calls their digest


def from_bytes(pictures: Tensor) -> Tensor:
    """uint8 0…255 -> float32 in [−1, 1]."""
    return pictures.float() / 127.5 - 1.0


def crops(pictures: Tensor, side: int, g: torch.Generator) -> Tensor:
    """One random crop (n,3,side,side) of each picture (n,3,H,W), H = W ≥ side."""
    rows, cols = torch.randint(pictures.shape[-1] - side + 1, (2, len(pictures)), generator=g).tolist()
    return torch.stack([picture[:, i:i + side, j:j + side] for picture, i, j in zip(pictures, rows, cols)])


def sheet(images: Tensor, columns: int) -> Image.Image:
    """(n,3,H,W) in [−1, 1] -> one PIL picture, rows of `columns`; small ones enlarged."""
    from PIL import Image

    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return scenes.contact_sheet([Image.fromarray(picture.numpy()) for picture in pixels], columns,
                                scale=max(1, 128 // images.shape[-1]))


class Pictures:
    """Pictures of one size, held as PNG: 120,000 drawings of 128×128 pixels are 0.5 GB so, not 5.9.

    Args:
        files: one PNG after the other, (bytes,) uint8. ends: where each one ends, (n,) int64.

    >>> pictures = Pictures.of(iter(torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)))
    >>> len(pictures), pictures[torch.tensor([1])].shape, pictures[torch.tensor([1, 0])][1, 0, 0].tolist()
    (2, torch.Size([1, 3, 4, 4]), [0, 1, 2, 3])
    """

    def __init__(self, files: Tensor, ends: Tensor):
        self.files, self.ends = files, ends

    @classmethod
    def of(cls, pictures: Iterable[Tensor]) -> Pictures:
        """Those of (3,H,W) uint8 tensors."""
        return cls.joined(map(png, pictures))

    @classmethod
    def joined(cls, files: Iterable[bytes]) -> Pictures:
        """Those of PNG files."""
        files = list(files)
        ends = torch.tensor([len(file) for file in files]).cumsum(0)
        return cls(torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(len(rows),3,H,W) uint8."""
        from PIL import Image

        opened = []
        for row in rows.tolist():
            file = self.files[self.ends[row - 1] if row else 0:self.ends[row]].numpy()
            opened.append(torch.from_numpy(np.array(Image.open(io.BytesIO(file), formats=["PNG"]))))
        return torch.stack(opened).permute(0, 3, 1, 2).contiguous()


def png(picture: Tensor) -> bytes:
    """A picture (3,H,W) uint8 as a PNG file, packed quickly rather than well."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=1)
    return file.getvalue()


def enough(seen: int) -> int:
    """How many drawings to make for a run that sees so many: 1000, 2000, 4000 … for a short one, else DRAWINGS.

    >>> enough(640), enough(2_001), enough(40_000)
    (1000, 4000, 120000)
    """
    return DRAWINGS if seen > SHORT else min(DRAWINGS, 1000 * 2 ** max(0, math.ceil(math.log2(seen / 1000))))


def drawings(run: Run) -> int:
    """How many a run draws."""
    return run.made.get("drawings", DRAWINGS)


def draw(n: int, size: int, **options) -> tuple[Pictures, list[scenes.Scene]]:
    """scenes.render in several processes, with a progress bar: the same pictures as in one."""
    from tqdm.contrib.concurrent import process_map

    chunk = 1000
    work = partial(_draw_chunk, partial(scenes.render, size=size, **options))
    counts, firsts = zip(*[(min(chunk, n - first), first) for first in range(0, n, chunk)])
    parts = process_map(work, counts, firsts, max_workers=min(os.cpu_count() or 1, len(counts)), chunksize=1,
                        desc="drawing", unit="k")
    pictures = Pictures.joined(file for files, _ in parts for file in files)
    return pictures, [scene for _, drawn in parts for scene in drawn]


def _draw_chunk(work: Callable, n: int, first: int) -> tuple[list[bytes], list[scenes.Scene]]:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, and a process that waits for them hangs
    pictures, drawn = work(n, first=first)
    return list(map(png, pictures)), drawn


class Drawings:
    """The drawings of a seed, each made when it is asked for: as large as you like, and none held in memory.

    Args:
        n: how many there are. size: side in pixels. options: as for `scenes.render`.

    >>> drawings = Drawings(10, 16, seed=3)
    >>> len(drawings), drawings[torch.tensor([7, 2])].shape
    (10, torch.Size([2, 3, 16, 16]))
    """

    def __init__(self, n: int, size: int, **options):
        self.n, self.render = n, partial(scenes.render, size=size, **options)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(len(rows),3,size,size) uint8, picture i as in `scenes.render(n)`."""
        return self.shown(rows)[0]

    def shown(self, rows: Tensor) -> tuple[Tensor, list[scenes.Scene]]:
        """The pictures, and what they show."""
        pictures, drawn = zip(*[self.render(1, first=row) for row in rows.tolist()])
        return torch.cat(pictures), [scene for (scene,) in drawn]


def cache_name(size: int, data: Path | None) -> str:
    """What tells the caches of one model folder apart, to the eye: what they were made from stands in them."""
    return f"{size}-{data.resolve().name}" if data else str(size)


def captioned(drawn: list[scenes.Scene], seed: int) -> list[list[str]]:
    """WORDINGS captions for each of the first scenes of a seed."""
    return [[scenes.caption(scene, random.Random(f"{seed} {i} {k}")) for k in range(WORDINGS)]
            for i, scene in enumerate(drawn)]


def sources(size: int, data: Path | None, seed: int) -> str:
    """sha256 of all that `dataset` makes its pictures and captions from.

    Of a folder: its files, in order, with their captions. Of drawings: their seed, and what the code as it is now makes
    of the first SAMPLE of them. Of both, how they are read or drawn: by the first pictures themselves.
    """
    if data:
        rows = files.metadata(data, size)
        parts = [[hashlib.sha256(path.read_bytes()).hexdigest(), caption] for path, caption in rows]
        pictures = torch.stack([picture for picture, _ in itertools.islice(files.stream_folder(data, size), SAMPLE)])
    else:
        pictures, drawn = scenes.render(SAMPLE, size, seed=seed)
        parts = [seed, sorted(scenes.words()), captioned(drawn, seed)]
    return hashlib.sha256(json.dumps([size, parts]).encode() + pictures.numpy().tobytes()).hexdigest()


def made_of(run: Run, size: int, data: Path | None, init: Path | None, parts: tuple[str, ...]) -> dict[str, int | str]:
    """`Run.made` of a recipe: what its result depends on, among it other `parts` of the model's folder."""
    made = {"size": size, "seed": run.seed}
    if not data or data.is_dir():                                          # else the recipe says what is wrong
        made[SOURCES] = sources(size, data, run.seed)
    if init or not run.resume:                                             # a resumed run has its own weights
        made["other weights to start from"] = digest(init) if init else ""
    return made | {f"another {part.replace('_', ' ')}": digest(run.out / part) for part in parts}


def dataset(run: Run, size: int, data: Path | None) -> tuple[Pictures, list[list[str]]]:
    """Pictures and the captions of each, drawn (or read from `data`) once and cached.

    The cache, one file in out/train, is made anew as soon as its `sources` are others, or it has too few drawings.
    """
    n = drawings(run)
    cache = run.out / "train" / f"pictures-{cache_name(size, data)}.safetensors"
    source = bytearray.fromhex(run.made.get(SOURCES) or sources(size, data, run.seed))
    state = load_state(cache) if cache.is_file() else {}
    if "ends" not in state or state["sources"].tolist() != list(source) or not data and len(state["ends"]) < n:
        if data:
            rows = [(png(picture), [text]) for picture, text in files.stream_folder(data, size)]
            pictures, captions = Pictures.joined(file for file, _ in rows), [texts for _, texts in rows]
        else:
            pictures, drawn = draw(n, size, seed=run.seed)
            captions = captioned(drawn, run.seed)
        text = bytearray(json.dumps(captions).encode())
        state = {name: torch.frombuffer(part, dtype=torch.uint8) for name, part in (("captions", text),
                                                                                   ("sources", source))}
        save_state({"pictures": pictures.files, "ends": pictures.ends, **state}, cache)
        announce(cache, f"{len(pictures):,} pictures")
        state = load_state(cache)
    ends, captions = state["ends"], json.loads(state["captions"].numpy().tobytes())
    if not data:                                                           # of more, made for a longer run
        ends, captions = ends[:n], captions[:n]
    return Pictures(state["pictures"], ends), captions


def announce(cache: Path, what: str) -> None:
    """Say what a file is for that a training leaves behind, and how large it is."""
    print(f"minidiff: {what} are kept in {cache} for later runs, {cache.stat().st_size / 1e6:,.1f} MB; delete it when "
          "you need the space", file=sys.stderr)


def tokenize_all(tokenizer: Tokenizer, captions: list[list[str]]) -> Tensor:
    """(n, wordings, 77) int32."""
    texts, k = [text for row in captions for text in row], len(captions[0])
    chunks = [tokenize(tokenizer, texts[i:i + 10_000]).int() for i in range(0, len(texts), 10_000)]
    return torch.cat(chunks).unflatten(0, (-1, k))


def latents(run: Run, size: int, data: Path | None, model: Path | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled posterior means and stds (n,C,h,w) float16 and caption ids (n,wordings,77), cached in out/train.

    VAE and vocabulary are those of `model`, by default of the run's own folder. The file's name has a digest of them
    and of the pictures: others make another file.
    """
    from tqdm import tqdm

    model = model or run.out
    made = digest(model / "vae", model / "tokenizer") + (run.made.get(SOURCES) or sources(size, data, run.seed))
    made += "" if data else str(drawings(run))
    name = f"latents-{cache_name(size, data)}-{hashlib.sha256(made.encode()).hexdigest()[:16]}.safetensors"
    cache = run.out / "train" / name
    if not cache.is_file():
        pictures, captions = dataset(run, size, data)
        device = run.device or default_device()
        net = VAE.from_pretrained(model / "vae", device=device)
        means, stds = [], []
        with torch.inference_mode():
            for rows in tqdm(torch.arange(len(pictures)).split(256), "latents", unit="batch"):
                mean, logvar = net.moments(from_bytes(pictures[rows]).to(device))
                means.append((net.config.scaling_factor * mean).half().cpu())
                stds.append((net.config.scaling_factor * (0.5 * logvar).exp()).half().cpu())
        save_state({"mean": torch.cat(means), "std": torch.cat(stds),
                    "ids": tokenize_all(load_tokenizer(model / "tokenizer"), captions)}, cache)
        announce(cache, "their latents")
    state = load_state(cache)
    return state["mean"], state["std"], state["ids"]
