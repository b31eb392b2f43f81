"""The recipes of the weights that ship, `python -m minidiff train NAME`."""
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from minidiff.data.few import SETS, write
from minidiff.data.files import metadata
from minidiff.io.hub import SHIPPED
from minidiff.io.weights import weights_dir
from minidiff.train.pictures import DRAWINGS, enough, made_of
from minidiff.train.recipes.adapt import controlnet_edges, controlnet_masks, inversion, lora
from minidiff.train.recipes.begin import model_parts
from minidiff.train.recipes.distil import lcm
from minidiff.train.recipes.flow import dit
from minidiff.train.recipes.judges import counter, reader
from minidiff.train.recipes.mini_sd import clip, perceptual, unet, vae
from minidiff.train.recipes.on_pixels import classifier, pixels, pixels_class
from minidiff.train.resume import alone, check, made_before
from minidiff.train.trainer import Run, digest
from minidiff.values import whole

RECIPES: dict[str, Callable] = {"reader": reader, "counter": counter, "clip": clip, "perceptual": perceptual,
                                "vae": vae, "unet": unet, "pixels": pixels, "pixels-class": pixels_class,
                                "classifier": classifier, "controlnet-edges": controlnet_edges,
                                "controlnet-masks": controlnet_masks, "lora": lora, "inversion": inversion,
                                "lcm": lcm, "dit": dit}
# those of the weights that ship
STEPS = {"reader": 4_000, "counter": 2_000, "clip": 900, "perceptual": 1_500, "vae": 5_000, "unet": 9_000,
         "pixels": 3_500, "pixels-class": 3_500, "classifier": 2_500, "controlnet-edges": 1_800,
         "controlnet-masks": 1_800, "lora": 1_200, "inversion": 1_000, "lcm": 2_000, "dit": 4_500}
BATCHES = {"reader": 128, "counter": 64, "clip": 256, "perceptual": 16, "vae": 8, "unet": 64, "pixels": 64,
           "pixels-class": 64, "classifier": 64, "controlnet-edges": 16, "controlnet-masks": 16, "lora": 8,
           "inversion": 8, "lcm": 32, "dit": 64}
ONE_MODEL = {"clip", "vae", "unet"}  # these write parts of one folder
FROM_FEW = {"lora", "inversion"}     # these learn from a few pictures, which a folder holds
BESIDE = {"controlnet-edges", "controlnet-masks", "lcm", "dit"} | FROM_FEW  # these leave the model in --init as it is
OWN = ("rank", "text_encoder", "prior", "checkpointing", "word")        # options of single recipes
PARTS = ("unet", "vae", "text_encoder", "tokenizer")                    # what they depend on of it
# drawings, where fewer do
ENOUGH = {"controlnet-edges": 8_000, "controlnet-masks": 8_000, "lcm": 40_000, "dit": 40_000}


def run(name: str, *, out: str | Path | None = None, steps: int | None = None, seconds: float | None = None,
        size: int | None = None, device: str | None = None, threads: int | None = None, data: str | Path | None = None,
        init: str | Path | None = None, resume: bool = False, seed: int = 0, batch: int | None = None,
        accumulate: int | None = None, **own: Any) -> Path:
    """Train one recipe. Returns the folder it wrote to.

    Args:
        name: a key of RECIPES.
        out: the model's folder, by default runs/mini-sd for clip, vae and unet, runs/NAME for the others.
        steps: optimizer steps. seconds: stop after so much time; continue with resume=True.
        size: side of the pictures in pixels, by default 128 (counter 64, reader 32, those of pixels 16).
        data: a folder of pictures instead of scenes, see `minidiff.data.files.stream_folder` for their captions; of
            lora and inversion also "cat" or "watercolour", which are drawn into out/train/NAME (`minidiff.data.few`).
        init: weights to start from: a folder with the same part, or a whole model's, or "mini-sd"; unet takes a whole
            model's other parts too, where `out` has none.
        batch: examples per step; None: the recipe's own number. accumulate: in so many parts, one after the other.
        own: options of this recipe alone: of lora rank, text_encoder, prior and checkpointing, of inversion word, of
            lcm rank.

    Raises:
        ValueError: unknown recipe, options that do not fit it, or a run to resume that was made with others.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are: {', '.join(RECIPES)}")
    size = inspect.signature(RECIPES[name]).parameters["size"].default if size is None else size
    text = f"size is {size}; it must be a positive multiple of 16 pixels"
    size = whole("size", size, 16, 2**14, text)
    if size % 16:
        raise ValueError(text)
    init = weights_dir() / SHIPPED if init == SHIPPED else init
    known = inspect.signature(RECIPES[name]).parameters
    for option in own:
        if option not in known:
            takers = [other for other in RECIPES if option in inspect.signature(RECIPES[other]).parameters]
            have = f"; {' and '.join(takers)} {'have' if takers[1:] else 'has'}" if takers else ""
            raise ValueError(f"{name} has no option {option}{have}")
    out = Path(out or f"runs/{'mini-sd' if name in ONE_MODEL else name}")
    settings = Run(out, STEPS[name] if steps is None else steps, seconds, device, threads, resume, batch, seed=seed,
                   accumulate=1 if accumulate is None else accumulate)
    if data in SETS and name in FROM_FEW and not Path(data).exists():
        data = write(data, out / "train" / data, size)
    data, init = (Path(folder) if folder else None for folder in (data, init))
    if name in BESIDE:
        init = init or weights_dir() / SHIPPED
        if not (init / "model_index.json").is_file():
            raise ValueError(f"{init} is no whole model in diffusers' layout; {name} needs one, or {SHIPPED}")
    elif init and (init / "model_index.json").is_file():
        if data:
            metadata(data, size)                                           # before anything is written
        init = model_parts(init, out, name)
    read = () if init else ("text_encoder",)                               # a net that goes on has one of its own
    parts = ("vae", "tokenizer", *read) if name == "unet" else ()
    eye = {"another perceptual net": digest(weights_dir() / "perceptual")} if name == "vae" and size > 64 else {}
    work = out / "train" / name
    with alone(work):
        before = made_before(work) if resume else {}                       # a run goes on as it was
        usual = before.get("batch", 32 if name == "vae" and size <= 64 else BATCHES.get(name, 1))
        usual_parts = before.get("accumulate", 1) if accumulate is None else accumulate
        settings = replace(settings, batch=settings.batch or usual, accumulate=usual_parts)
        own = {option: before.get(option, known[option].default) for option in OWN if option in known} | own
        number = before.get("drawings", DRAWINGS) if resume else enough(settings.steps * settings.batch)
        number = min(number, ENOUGH.get(name, number))
        model = {"another model": digest(*(init / part for part in PARTS))} if name in BESIDE else {}
        made = made_of(settings, size, data, init, parts) | eye | model | {"drawings": number, "batch": settings.batch}
        made |= {"accumulate": settings.accumulate, **own}
        settings = replace(settings, made=made)
        check(work, settings.made, resume)
        RECIPES[name](settings, size=size, data=data, init=init, **own)
    return out
