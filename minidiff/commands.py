"""What the command line does: generate, train, evaluate, info, bench. Heavy modules are loaded when they are needed."""
from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from tqdm import tqdm

EXAMPLE = "a large red house on the left, snow, night, stars"
BATCH = 16  # pictures drawn at once


def generate(prompt: str, *, model: str = "mini-sd", tokenizer: str | Path | None = None,
             config: str | None = None, prediction_type: str | None = None, steps: int = 25, sampler: str | None = None,
             guidance_scale: float = 7.5, seed: int = 0, num_images: int = 1, negative_prompt: str | None = None,
             size: int | None = None, init_image: str | Path | None = None, strength: float | None = None,
             mask: str | Path | None = None, lora: Sequence[str] = (),
             controlnet: str | Path | None = None, control_image: str | Path | None = None, grid: bool = False,
             film: str | Path | None = None, out: str | Path | None = None, overwrite: bool = False) -> list[Path]:
    """Draw pictures of a prompt and write them to files.

    Args:
        prompt: what to draw. steps … num_images, negative_prompt: see `minidiff.sd.settings.Settings`.
        model, tokenizer, config, prediction_type: see `StableDiffusion.from_pretrained`.
        size: side in pixels of the pictures, which are square; None: those the model was trained at. Far from it, a
            model repeats or cuts what it draws.
        init_image: a picture file to start from, on white where it is transparent, cut and resized to the size drawn;
            see `strength`.
        mask: a picture file of the same proportions, cut and resized likewise: repaint init_image only where it is
            white; what is transparent is not.
        lora: LoRA files to load, each with its scale behind "=" unless that is 1: "watercolour.safetensors=0.8".
        controlnet, control_image: a ControlNet's folder, and the picture file that it is told, cut and resized.
        grid: one file with all pictures side by side instead of one file each.
        film: also write how the (first) picture came about: the state beside the guess, ends in .png, .gif or .webp.
        out: the picture's file (several: -1, -2 … is added); None: minidiff-0001.png, the next free number.
        overwrite: whether an existing file may be replaced.

    Returns:
        The files written.

    Raises:
        ValueError, OSError: a setting out of range, a file that cannot be read or written, or one that exists.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> [path.name for path in generate("a red house", steps=2, out=f"{folder.name}/house.png")]
    ['house.png']
    """
    from minidiff import values
    from minidiff.io import images as io
    from minidiff.nets.controlnet import ControlNet
    from minidiff.sd.pipeline import StableDiffusion
    from minidiff.sd.settings import Settings
    from minidiff.teach.film import check_suffix, frame, thin, write_film

    for text in (prompt, negative_prompt or ""):
        values.text(text)
    settings = {"steps": steps, "sampler": sampler, "guidance_scale": guidance_scale, "strength": strength,
                "negative_prompt": negative_prompt, "height": size, "width": size}
    Settings(seed=seed, num_images=num_images, **settings)
    targets = _targets(out, 1 if grid else num_images)
    for path in targets:
        io.image_format(path)
    if film is not None:
        check_suffix(film)
    if (controlnet is None) != (control_image is None):
        raise ValueError("--controlnet and --control-image go together: one of them is missing")
    if mask is not None and init_image is None:
        raise ValueError("--mask needs --init-image, the picture to repaint")
    if init_image is not None:
        init_image = io.open_image(init_image)
    if mask is not None:
        mask = io.open_image(mask, "black")
        if abs(mask.width * init_image.height - mask.height * init_image.width) > max(*mask.size, *init_image.size):
            raise ValueError(f"--mask is {mask.width}×{mask.height} pixels, --init-image {init_image.width}×"
                             f"{init_image.height}: give a mask of the same proportions, or it is cut elsewhere")
    if control_image is not None:
        control_image = io.open_image(control_image)
    pipe = StableDiffusion.from_pretrained(model, tokenizer=tokenizer, config=config, prediction_type=prediction_type)
    sides = pipe.sides if size is None else (size, size)
    if init_image is not None:
        settings["image"] = io.fit(init_image, *sides)
    if mask is not None:
        settings["mask"] = io.fit(mask, *sides)
    if control_image is not None:
        settings |= {"controlnet": ControlNet.from_pretrained(controlnet, device=pipe.device),
                     "control_image": io.fit(control_image, *sides)}
    for path, scale in map(_scaled, lora):
        pipe.load_lora(path, scale)
    io.check_writable([*targets, *([Path(film)] if film else [])], overwrite)
    if model == "mini-sd":
        _warn_unknown(prompt)

    images, moments = [], []
    firsts = range(0, num_images, BATCH)
    cut = init_image is not None and not pipe.spreads                   # img2img takes the last steps only
    taken = int(steps * Settings(**settings).taken) if cut else steps
    with _progress(taken * len(firsts), "drawing", "step") as bar:
        for first in firsts:
            n = min(BATCH, num_images - first)
            for i, step in enumerate(pipe.stream(prompt, seed=seed + first, num_images=n, **settings)):
                bar.update(i > 0)
                if film is not None and first == 0:                     # which of them to show is known at the end
                    moments.append(step._replace(x=step.x[:1].cpu(), x0=None if step.x0 is None else step.x0[:1].cpu()))
            images += io.to_pil(io.to_unit(pipe.decode(step.x)))
    written = []
    with _claimed(targets, out is None) as targets:
        for path, image in zip(targets, [_sheet(images)] if grid else images, strict=True):
            io.save_image(image, path)
            written.append(path)
    if film is not None:
        write_film([frame(pipe, step) for step in thin(moments)], film)
        written.append(Path(film))
    return written


def train(recipe: str, *, out: str | Path | None = None, steps: int | None = None, seconds: float | None = None,
          size: int | None = None, device: str | None = None, threads: int | None = None,
          data: str | Path | None = None, init: str | Path | None = None, resume: bool = False) -> Path:
    """Train one of the networks of mini-sd; returns the folder with its weights, log and sample pictures.

    Args:
        recipe: a name that `train --list` shows.
        out … resume: see `minidiff.train.recipes.run`, also for errors; None takes the recipe's own value.
    """
    from minidiff.train import recipes

    options = {"out": out, "steps": steps, "seconds": seconds, "size": size, "device": device, "threads": threads,
               "data": data, "init": init}
    return recipes.run(recipe, resume=resume, **{name: value for name, value in options.items() if value is not None})


def recipes() -> dict[str, str]:
    """Name and first line of the description of every training recipe."""
    from minidiff.train.recipes import RECIPES

    return {name: (recipe.__doc__ or "").strip().splitlines()[0] for name, recipe in RECIPES.items()}


def evaluate(model: str | Path = "mini-sd", *, n: int = 1000, json_file: str | Path | None = None,
             out: str | Path | None = None, overwrite: bool = False, **settings) -> tuple[dict, Path]:
    """Measure how well a model's pictures show what their prompts say: see `minidiff.measure.evaluate.evaluate`.

    Returns:
        The numbers, and the file of the contact sheet: `out`, or the next free minidiff-0001.png.
    """
    from minidiff.io.images import check_writable, image_format
    from minidiff.measure.evaluate import evaluate as measure

    sheet, = _targets(out, 1)
    image_format(sheet)
    check_writable([sheet, *([Path(json_file)] if json_file else [])], overwrite)
    with _claimed([sheet], out is None) as (sheet,):
        return measure(model, n=n, json_path=json_file, sheet_path=sheet, progress=True, **settings), sheet


def info(path: str | Path) -> dict:
    """What a model file or folder holds: see `minidiff.io.info.describe`."""
    from minidiff.io.info import describe

    return describe(path)


def bench(model: str | Path = "mini-sd", *, threads: int | None = None, json_file: str | Path | None = None,
          overwrite: bool = False, **options) -> dict:
    """How fast a model runs: `minidiff.measure.bench`.

    Args:
        threads: of the CPU. json_file: also write the result there. overwrite: whether that file may be replaced.

    Raises:
        ValueError, OSError: threads < 1, what `measure.bench` raises, or a file that cannot be written.
    """
    import torch

    from minidiff.io.images import check_writable
    from minidiff.io.write import write_atomic
    from minidiff.measure.bench import bench as measure
    from minidiff.values import whole

    if threads is not None:
        torch.set_num_threads(whole("threads", threads, 1, 4096))
    if json_file is not None:
        check_writable([Path(json_file)], overwrite)
    result = measure(model, **options)
    if json_file is not None:
        write_atomic(json_file, json.dumps(result, indent=2) + "\n")
    return result


def _scaled(lora: str) -> tuple[str, float]:
    """A LoRA file and its scale."""
    path, _, scale = lora.rpartition("=")
    if not path:
        return lora, 1.0
    try:
        return path, float(scale)
    except ValueError:
        return lora, 1.0  # a file with "=" in its name


def _targets(out: str | Path | None, n: int) -> list[Path]:
    """The n files to write: minidiff-0001.png … from the next free number on, or `out`, with -1, -2 … if n > 1."""
    if out is None:
        names = [path.stem.split("-")[1] for path in Path().glob("minidiff-*.png")]
        taken = [int(name) for name in names if name.isdecimal()]
        return [Path(f"minidiff-{max(taken, default=0) + i:04d}.png") for i in range(1, n + 1)]
    out = Path(out)
    return [out] if n == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(1, n + 1)]


@contextmanager
def _claimed(targets: list[Path], free: bool) -> Iterator[list[Path]]:
    """The files to write. Of `free` ones, whose names were the next, those that nobody else took meanwhile.

    They are there at once, empty, so that nobody takes them from now on, and go again if nothing is written.
    """
    if not free:
        yield targets
        return
    claimed, numbers = [], itertools.count(int(targets[0].stem.split("-")[1]))
    while len(claimed) < len(targets):
        path = Path(f"minidiff-{next(numbers):04d}.png")
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            claimed.append(path)
    try:
        yield claimed
    except BaseException:
        for path in claimed:
            if not path.stat().st_size:
                path.unlink()
        raise


def _sheet(images: list[Image.Image]) -> Image.Image:
    from minidiff.data.scenes import contact_sheet

    return contact_sheet(images, columns=math.ceil(math.sqrt(len(images))), scale=1)


def _warn_unknown(prompt: str) -> None:
    from minidiff.data.scenes import ATTRIBUTES, unknown_words

    if unknown := unknown_words(prompt):
        known = "; ".join(" ".join(words) for words in ATTRIBUTES.values())
        warnings.warn(f"mini-sd has never seen: {', '.join(unknown)}. It draws {known}. For example: {EXAMPLE!r}",
                      stacklevel=3)


@contextmanager
def _progress(total: int, label: str, unit: str) -> Iterator[tqdm]:
    """A bar on stderr that appears after a second."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit=unit, delay=1.0, leave=False) as bar:
        yield bar
