"""`minidiff generate`: pictures of prompts as files, which say how they were made."""
from __future__ import annotations

import itertools
import math
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff import __version__, values
from minidiff.io.emphasis import cut_loras, parse

if TYPE_CHECKING:
    from PIL import Image
    from tqdm import tqdm

    from minidiff.sd.pipeline import StableDiffusion
    from minidiff.sd.settings import Settings

EXAMPLE = "a large red house on the left, snow, night, stars"
BATCH = 16  # pictures drawn at once
DTYPES = ("float32", "float16", "bfloat16")
File = str | Path


def generate(prompt: str | Sequence[str], *, model: File = "mini-sd", tokenizer: File | None = None,
             config: File | None = None, variant: str | None = None, vae: File | None = None,
             prediction_type: str | None = None, download: bool = False, device: str | None = None,
             dtype: str | None = None, offload: bool = False, compile: bool = False, steps: int | None = None,
             sampler: str | None = None, guidance_scale: float | None = None, guidance_rescale: float = 0.0,
             eta: float | None = None, churn: float | None = None, seed: int | str = 0, num_images: int = 1,
             negative_prompt: str | None = None, weights: bool = False, long: bool = False, clip_skip: int = 0,
             size: int | None = None, height: int | None = None, width: int | None = None, tile: int | None = None,
             enlarge: float | None = None, init_image: File | None = None, strength: float | None = None,
             mask: File | None = None, lora: Sequence[str] = (), embedding: Sequence[str] = (),
             controlnet: File | Sequence[File] = (), control_image: File | Sequence[File] = (),
             control_scale: float | Sequence[float] = (), control_start: float | Sequence[float] = (),
             control_end: float | Sequence[float] = (), grid: bool = False, film: File | None = None,
             out: File | None = None, overwrite: bool = False, metadata: bool = True,
             say: Callable[[str], None] | None = None) -> list[Path]:
    """Draw pictures of prompts and write them to files.

    Args:
        prompt: what to draw; of several prompts, each num_images times.
        model, tokenizer, config, variant, vae, prediction_type, download, device: see
            `StableDiffusion.from_pretrained`. Tokenizer and config are for single files.
        dtype: float32, float16 or bfloat16; None: float16 on CUDA, else float32.
        offload, compile: see `StableDiffusion.offload` and `compile`.
        steps … clip_skip, tile: see `minidiff.sd.settings.Settings`. A seed may be "random".
        size: height and width in pixels, unless these are given; None: those the model was trained at. Far from them, a
            model repeats or cuts what it draws.
        enlarge: draw in two passes, see `StableDiffusion.two_pass`, this many times as large; then `strength` is how
            much the second pass redraws (None: 0.3; with mini-sd, which draws smaller objects into larger ones, 0.1).
        init_image: a picture file to start from, on white where it is transparent, cut and resized to the size drawn;
            see `strength`.
        mask: a picture file of the same proportions, cut and resized likewise: repaint init_image only where it is
            white; what is transparent is not.
        lora: LoRA files to load, each with its scale behind "=" unless that is 1: "mine.safetensors=0.8"; "watercolour"
            and "cat" ship with mini-sd.
        embedding: files of textual inversions, each with its word behind "=" unless the file says it; or "cat".
        controlnet, control_image: ControlNets' folders or files, or "edges" and "masks", which ship with mini-sd; and
            the picture file that each is told, cut and resized. Those two find the edges of a photograph, take white on
            black as it is, and invert a drawing on white, see `minidiff.data.hints.read`.
        control_scale, control_start, control_end: one for all or one for each.
        grid: one file with all pictures side by side instead of one file each.
        film: also write how the (first) picture came about: the state beside the guess, ends in .png, .gif or .webp.
        out: the picture's file (several: -1, -2 … is added); None: minidiff-0001.png, the next free number.
        overwrite: whether an existing file may be replaced.
        metadata: whether the files say how they were made, also by which files, see `minidiff.io.parameters`.
        say: gets a line at the end, which says what was drawn, where and how; before it one for each control image of
            the shipped ControlNets, with what was made of it.

    Returns:
        The files written.

    Raises:
        ValueError, OSError: a setting out of range, a file that cannot be read or written, or one that exists.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> [path.name for path in generate("a red house", steps=2, out=f"{folder.name}/house.png")]
    ['house.png']
    """
    from minidiff.io import images as io
    from minidiff.io import parameters
    from minidiff.io.hub import MODELS
    from minidiff.io.write import claimed, targets
    from minidiff.sd.pipeline import redrawn
    from minidiff.sd.settings import Settings
    from minidiff.teach.film import check_suffix, frame, thin, write_film

    texts = [prompt] if isinstance(prompt, str) else [*prompt]
    for text in (*texts, negative_prompt or ""):
        values.text(text)
    if not texts:
        raise ValueError("there is no prompt")
    count = len(texts) * values.whole("num_images", num_images, 1, 10**6)
    if seed == "random":
        seed = secrets.randbelow(2**32 - count)
    sides = height or size, width or size
    settings = {"steps": steps, "sampler": sampler, "guidance_scale": guidance_scale, "eta": eta, "churn": churn,
                "guidance_rescale": guidance_rescale, "strength": strength, "negative_prompt": negative_prompt,
                "weights": weights, "long": long, "clip_skip": clip_skip, "tile": tile}
    Settings(seed=seed, num_images=count, height=sides[0], width=sides[1], **settings)
    if enlarge is not None:
        if not values.number("enlarge", enlarge) > 0 or init_image is not None:
            raise ValueError("--enlarge is a positive number, and draws without --init-image")
        settings["strength"] = None
    paths = targets(out, 1 if grid else count)
    kinds = [io.image_format(path) for path in paths]
    if film is not None:
        check_suffix(film)
    given = _pictures(init_image, mask, _listed(controlnet), _listed(control_image))
    pipe = _load(model, device, dtype, offload, compile, tokenizer=tokenizer, config=config, variant=variant, vae=vae,
                 prediction_type=prediction_type, download=download, lora=lora, embedding=embedding)
    sides = tuple(side or own for side, own in zip(sides, pipe.sides))
    settings |= {"height": sides[0], "width": sides[1]}
    settings |= {name: io.fit(picture, *sides) for name, picture in given.items() if name in ("image", "mask")}
    seen: list[str] = []
    settings |= _controls(pipe, given, sides, controlnet, control_scale, control_start, control_end, seen=seen)
    io.check_writable([*paths, *([Path(film)] if film else [])], overwrite)
    settled = pipe.settled(Settings(**settings))
    if enlarge is not None:
        strength = redrawn(settled.steps, 0.1 if strength is None and model in MODELS else strength)
    elif init_image is not None:
        strength = settled.taken
    known = _known(pipe, settled, locals())
    of_each = [{"prompt": texts[i // num_images], "seed": seed + i} for i in range(count)]
    if grid:
        of_each = [{"prompt": texts[0] if len(texts) == 1 else texts, "seed": seed, "num_images": num_images,
                    "grid": True}]
    notes = [parameters.for_saving(known | of, __version__, kind) if metadata else {}
             for of, kind in zip(of_each, kinds, strict=True)]
    images, moments, image = [], [], None
    jobs = list(_batches([text for text in texts for _ in range(num_images)], apart=weights))
    passes = [settings]
    if enlarge is not None:
        passes.append(settings | {"strength": strength})
    taken = [_taken(pipe, part, settled) for part in passes]
    with _progress(sum(taken) * len(jobs), f"drawing on {pipe.device}, seed {seed}", "step") as bar:
        for first, batch in jobs:
            for number, part in enumerate(passes):
                if number:                                              # the second: from the first's, enlarged
                    image = io.enlarged(image, enlarge, pipe.vae.factor)
                    part = part | {"image": image, "height": image.shape[2], "width": image.shape[3]}
                for i, step in enumerate(pipe.stream(batch, seed=seed + first, **part)):
                    if i == first == number == 0 and model in MODELS and not embedding:  # behind what may be wrong
                        _warn_unknown(" ".join(map(_plain, texts)), {Path(_scaled(file)[0]).stem for file in lora})
                    bar.update(i > 0)
                    if film is not None and first == number == 0:       # which of them to show is known at the end
                        moments.append(step._replace(x=step.x[:1].cpu(),
                                                     x0=None if step.x0 is None else step.x0[:1].cpu()))
                image = io.to_unit(pipe.decode(step.x, tile))
            images += io.to_pil(image)
    written = []
    with claimed(paths, out is None) as paths:
        for path, image, more in zip(paths, [_sheet(images)] if grid else images, notes, strict=True):
            io.save_image(image, path, **more)
            written.append(path)
    if film is not None:
        write_film([frame(pipe, step) for step in thin(moments)], film)
        written.append(Path(film))
    if say is not None:
        for line in seen:
            say(line)
        say(_said(pipe, known, images[0].size, taken, seed, count))
    return written


def settings_of(picture: File) -> dict[str, Any]:
    """The keyword arguments of `generate` with which a picture was made, by what its file says.

    Raises:
        FileNotFoundError, ValueError: there is no such picture, or it does not say.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> house, = generate("a red house", steps=2, seed=3, out=f"{folder.name}/house.png")
    >>> again, = generate(**settings_of(house), out=f"{folder.name}/again.png")
    >>> house.read_bytes() == again.read_bytes()
    True
    """
    from minidiff.io.parameters import read

    found = read(picture)
    if found is None:
        raise ValueError(f"{picture} does not say how it was made")
    return found["settings"]


def read_prompts(file: File) -> list[str]:
    """The prompts of a text file, one a line; empty lines and those that begin with # are left out.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is no text in UTF-8, or holds no prompt.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file} of prompts")
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"{file} holds no prompt; write one on each line")
    return prompts


def _listed(value: object) -> list:
    """One of a thing, several or none, as a list."""
    return [*value] if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _pictures(init_image: File | None, mask: File | None, controlnets: list, hints: list) -> dict[str, Any]:
    """The pictures to start from, opened: `image`, `mask`, and for the ControlNets `hints`."""
    from minidiff.io.images import open_image

    if len(controlnets) != len(hints):
        raise ValueError("--controlnet and --control-image go together: "
                         + ("one of them is missing" if not (controlnets and hints) else
                            f"there are {len(controlnets)} and {len(hints)}"))
    if mask is not None and init_image is None:
        raise ValueError("--mask needs --init-image, the picture to repaint")
    given: dict[str, Any] = {"hints": [open_image(hint) for hint in hints]}
    if init_image is not None:
        given["image"] = image = open_image(init_image)
    if mask is not None:
        given["mask"] = mask = open_image(mask, "black")
        if abs(mask.width * image.height - mask.height * image.width) > max(*mask.size, *image.size):
            raise ValueError(f"--mask is {mask.width}×{mask.height} pixels, --init-image {image.width}×"
                             f"{image.height}: give a mask of the same proportions, or it is cut elsewhere")
    return given


def _load(model: File, device: str | None, dtype: str | None, offload: bool, compile: bool, *, lora: Sequence[str],
          embedding: Sequence[str], **options) -> StableDiffusion:
    """The model where it is to work, with what is added to it."""
    import torch

    from minidiff.device import find_device
    from minidiff.sd.pipeline import StableDiffusion

    where = find_device(device)
    if dtype is None:
        dtype = "float16" if where.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    pipe = StableDiffusion.from_pretrained(model, device="cpu" if offload else where, dtype=getattr(torch, dtype),
                                           **options)
    if offload:
        pipe.offload(where)
    for path, scale in map(_scaled, lora):
        pipe.load_lora(path, scale)
    for file in embedding:
        path, _, word = file.rpartition("=") if not Path(file).is_file() and "=" in file else (file, "", None)
        pipe.load_textual_inversion(path, word)
    return pipe.compile() if compile else pipe


def _controls(pipe: StableDiffusion, given: dict, sides: tuple, nets: object, *numbers: object,
              seen: list[str]) -> dict[str, Any]:
    """The settings of the ControlNets: nothing without any. What is made of a control image is added to `seen`."""
    from minidiff.data.hints import HINTS, read
    from minidiff.io.images import fit, to_tensor, to_unit
    from minidiff.io.weights import weights_dir
    from minidiff.nets.controlnet import ControlNet

    nets = _listed(nets)
    columns = {}
    for name, value, default in zip(("control_scale", "control_start", "control_end"), numbers, (1.0, 0.0, 1.0)):
        listed = _listed(value) or [default]
        if len(listed) not in (1, len(nets)) and (nets or len(listed) > 1):
            raise ValueError(f"there are {len(nets)} ControlNets, but {len(listed)} of {name}")
        if value not in ((), []) and not nets:
            raise ValueError(f"{name} needs --controlnet and --control-image")
        columns[name] = [float(number) for number in listed] * (len(nets) if len(listed) == 1 else 1)
    if not nets:
        return {}
    places = [weights_dir() / f"controlnet-{net}" if net in HINTS else net for net in nets]
    loaded = [ControlNet.from_pretrained(net, device=pipe.device, dtype=pipe.unet.conv_in.weight.dtype)
              for net in places]
    hints = [fit(hint, *sides) for hint in given["hints"]]
    for k, net in enumerate(nets):
        if net in HINTS:
            hints[k], said = read(to_unit(to_tensor(hints[k], *sides)), net)
            seen.append(f"control image: {said}")
    return {"controlnet": loaded, "control_image": hints, **columns}


def _known(pipe: StableDiffusion, s: Settings, options: dict[str, Any]) -> dict[str, Any]:
    """What `parameters` keeps of a run: arguments of `generate` that make the picture, as they were settled."""
    from minidiff.io.parameters import KINDS
    from minidiff.sd.scheduler import name_of, named

    known = {}
    for name, kinds in KINDS.items():
        value = options[name]
        if kinds == (list,):
            value = [part if isinstance(part, (int, float)) else str(part) for part in _listed(value)]
        value = str(value) if isinstance(value, Path) else value
        if not (value is None or value is False or value == [] or name in ("prompt", "seed", "num_images", "grid")):
            known[name] = value                                         # a 0 counts: eta has another default
    known |= {"steps": s.steps, "guidance_scale": s.guidance_scale, "height": s.height, "width": s.width,
              "sampler": name_of({**pipe.scheduler, **(named(s.sampler) if s.sampler else {})}),
              "dtype": str(pipe.unet.conv_in.weight.dtype).removeprefix("torch.")}
    unsaid = ("guidance_rescale", 0.0), ("clip_skip", 0)
    return {name: value for name, value in known.items() if (name, value) not in unsaid}


def _plain(text: str) -> str:
    """The words of a prompt, without what the web UI reads otherwise."""
    try:
        return " ".join(part[0] for part in parse(cut_loras(text)[0]) if part)
    except ValueError:
        return text


def _said(pipe: StableDiffusion, known: dict[str, Any], size: tuple[int, int], taken: list[int], seed: int,
          count: int) -> str:
    """The line that says what was drawn, where and how."""
    seeds = f"seed {seed}" if count == 1 else f"seeds {seed} to {seed + count - 1}"
    name, sides = Path(known["model"]).name, f"{size[0]}×{size[1]} pixels"
    cut = [f"the last {n} of " * (n < known["steps"]) + f"{known['steps']}" for n in taken]
    return (f"{name} on {pipe.device}, {known['dtype']}: {sides}, {' and '.join(cut)} steps of {known['sampler']}, "
            f"guidance scale {known['guidance_scale']:g}, {seeds}")


def _batches(texts: list[str], apart: bool) -> Iterator[tuple[int, list[str]]]:
    """At most BATCH prompts at once, each with the place of the first; `apart`: different prompts are."""
    groups = [list(group) for _, group in itertools.groupby(texts)] if apart else [texts]
    first = 0
    for group in groups:
        for start in range(0, len(group), BATCH):
            batch = group[start:start + BATCH]
            yield first, batch
            first += len(batch)


def _taken(pipe: StableDiffusion, settings: dict[str, Any], settled: Settings) -> int:
    """Steps of one pass: img2img takes the last ones only."""
    from minidiff.sd.settings import Settings

    cut = (settings.get("image") is not None or settings["strength"] is not None) and not pipe.spreads
    share = Settings(**{"image": True, **settings}).taken if cut else 1
    return int(settled.steps * share)


def _scaled(lora: str) -> tuple[str, float]:
    """A LoRA file and its scale."""
    path, _, scale = str(lora).rpartition("=")
    if not path:
        return lora, 1.0
    try:
        return path, float(scale)
    except ValueError:
        return lora, 1.0  # a file with "=" in its name


def _sheet(images: list[Image.Image]) -> Image.Image:
    from minidiff.io.images import contact_sheet

    return contact_sheet(images, columns=math.ceil(math.sqrt(len(images))), scale=1)


def _warn_unknown(prompt: str, taught: set[str]) -> None:
    """Of words that neither mini-sd has seen nor a LoRA is called."""
    from minidiff.data.scenes import ATTRIBUTES, unknown_words

    if unknown := [word for word in unknown_words(prompt) if word not in taught]:
        known = "; ".join(" ".join(words) for words in ATTRIBUTES.values())
        warnings.warn(f"mini-sd has never seen: {', '.join(unknown)}. It draws {known}. For example: {EXAMPLE!r}",
                      stacklevel=3)


@contextmanager
def _progress(total: int, label: str, unit: str) -> Iterator[tqdm]:
    """A bar on stderr that appears after a second."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit=unit, delay=1.0, leave=False) as bar:
        yield bar
