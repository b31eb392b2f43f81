"""The command line: `python -m minidiff generate | train | evaluate | info | bench | lab`; each is a function too."""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

EXAMPLE = "a large red house on the left, snow, night, stars"
SAMPLERS = ("ddim", "ddpm", "euler", "euler_ancestral", "heun", "lms", "plms", "dpmpp_2m", "unipc", "lcm")
SMALL = 256  # smaller pictures get an enlarged copy of this side
BATCH = 16  # pictures drawn at once


def generate(prompt: str, *, model: str = "mini-sd", tokenizer: str | Path | None = None,
             config: str | None = None, prediction_type: str | None = None, steps: int = 25, sampler: str | None = None,
             guidance_scale: float = 7.5, seed: int = 0, num_images: int = 1, negative_prompt: str | None = None,
             init_image: str | Path | None = None, strength: float | None = None,
             mask: str | Path | None = None, lora: Sequence[str] = (),
             controlnet: str | Path | None = None, control_image: str | Path | None = None, grid: bool = False,
             film: str | Path | None = None, out: str | Path | None = None, overwrite: bool = False) -> list[Path]:
    """Draw pictures of a prompt and write them to files.

    Args:
        prompt … num_images, negative_prompt: see `minidiff.sd.settings.Settings`.
        model, tokenizer, config, prediction_type: see `StableDiffusion.from_pretrained`.
        init_image: a picture file to start from, on white where it is transparent, cut and resized to the model's
            size; see `strength`.
        mask: a picture file of the same proportions, cut and resized likewise: repaint init_image only where it is
            white; what is transparent is not.
        lora: LoRA files to load, each with its scale behind "=" unless that is 1: "watercolour.safetensors=0.8".
        controlnet, control_image: a ControlNet's folder, and the picture file that it is told, cut and resized.
        grid: one file with all pictures side by side instead of one file each.
        film: also write how the (first) picture came about: the state beside the guess, ends in .png, .gif or .webp.
        out: the picture's file (several: -1, -2 … is added); None: minidiff-0001.png, the next free number.
        overwrite: whether an existing file may be replaced.

    Returns:
        The files written; pictures smaller than 256 pixels come with an enlarged copy, …-large.png.

    Raises:
        ValueError, OSError: a setting out of range, a file that cannot be read or written, or one that exists.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> [path.name for path in generate("a red house", steps=2, out=f"{folder.name}/house.png")]
    ['house.png', 'house-large.png']
    """
    from minidiff import values
    from minidiff.io import images as io
    from minidiff.nets.controlnet import ControlNet
    from minidiff.sd.conditions import plan
    from minidiff.sd.pipeline import StableDiffusion
    from minidiff.sd.settings import Settings
    from minidiff.teach.film import check_suffix, frame, thin, write_film

    for text in (prompt, negative_prompt or ""):
        values.text(text)
    settings = {"steps": steps, "sampler": sampler, "guidance_scale": guidance_scale, "strength": strength,
                "negative_prompt": negative_prompt}
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
    if init_image is not None:
        settings["image"] = io.fit(init_image, *pipe.sides)
    if mask is not None:
        settings["mask"] = io.fit(mask, *pipe.sides)
    if control_image is not None:
        settings |= {"controlnet": ControlNet.from_pretrained(controlnet, device=pipe.device),
                     "control_image": io.fit(control_image, *pipe.sides)}
    for path, scale in map(_scaled, lora):
        pipe.load_lora(path, scale)
    copies = [_large(path) for path in targets] if pipe.size < SMALL else []
    io.check_writable([*targets, *copies, *([Path(film)] if film else [])], overwrite)
    if model == "mini-sd":
        _warn_unknown(prompt)

    images, frames = [], []
    firsts = range(0, num_images, BATCH)
    taken = len(plan(pipe.scheduler, pipe.schedule, Settings(**settings), pipe.spreads)[1]) - 1
    moments = thin(range(taken + 1)) if film is not None else []
    with _progress(taken * len(firsts), "drawing", "step") as bar:
        for first in firsts:
            n = min(BATCH, num_images - first)
            for i, step in enumerate(pipe.stream(prompt, seed=seed + first, num_images=n, **settings)):
                bar.update(i > 0)
                if first == 0 and i in moments:
                    frames.append(frame(pipe, step))
            images += io.to_pil(io.to_unit(pipe.decode(step.x)))
    written = []
    for path, image in zip(targets, [_sheet(images)] if grid else images, strict=True):
        io.save_image(image, path)
        written.append(path)
        if copies:
            io.save_image(io.enlarge(image, max(2, SMALL // pipe.size)), _large(path))
            written.append(_large(path))
    if film is not None:
        write_film(frames, film)
        written.append(Path(film))
    return written


def train(recipe: str, *, out: str | Path | None = None, steps: int | None = None, seconds: float | None = None,
          size: int | None = None, device: str | None = None, threads: int | None = None,
          data: str | Path | None = None, init: str | Path | None = None, resume: bool = False) -> Path:
    """Train one of the networks of mini-sd; returns the folder with its weights, log and sample pictures.

    Args:
        recipe: a name that `train --list` shows.
        out … resume: see `minidiff.train.recipes.run`; None takes the recipe's own value.
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
    check_writable([sheet], overwrite)
    if json_file is not None:
        check_writable([Path(json_file), sheet], overwrite=True)
    return measure(model, n=n, json_path=json_file, sheet_path=sheet, progress=True, **settings), sheet


def info(path: str | Path) -> dict:
    """What a model file or folder holds: see `minidiff.io.info.describe`."""
    from minidiff.io.info import describe

    return describe(path)


def bench(model: str | Path = "mini-sd", *, threads: int | None = None, json_file: str | Path | None = None,
          **options) -> dict:
    """How fast a model runs: `minidiff.measure.bench`. threads: of the CPU. json_file: also write the result there."""
    import torch

    from minidiff.io.images import check_writable
    from minidiff.measure.bench import bench as measure

    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        torch.set_num_threads(threads)
    if json_file is not None:
        check_writable([Path(json_file)], overwrite=True)
    result = measure(model, **options)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(result, indent=2) + "\n")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 2 for bad input (one line on stderr), 130 after Ctrl-C.

    What the terminal's encoding lacks is printed as an escape; a reader of the output that leaves early is no error.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                                             # closed by who started us
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):                             # a notebook's cannot, and need not
            getattr(sys, name).reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print(f"minidiff: {message}", file=sys.stderr)
        try:
            args = vars(_parser().parse_args(argv))
            args.pop("run")(**args)
            sys.stdout.flush()
            return 0
        except KeyboardInterrupt as stop:
            print(f"minidiff: {stop}" if str(stop) else "minidiff: stopped", file=sys.stderr)
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # Python flushes once more at its end
            return 0
        except OSError as error:
            print(f"minidiff: {_one_line(_reason(error))}", file=sys.stderr)
        except ValueError as error:
            print(f"minidiff: {_one_line(error)}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for an error, and the vocabulary in the help of `generate`."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def format_help(self) -> str:
        if not self.prog.endswith("generate"):
            return super().format_help()
        lines = [f"  {name:8} {', '.join(words)}" for name, words in _attributes().items()]
        return super().format_help() + "\n".join(["\nwhat mini-sd can draw:", *lines, ""])


def _parser() -> argparse.ArgumentParser:
    top = _Parser("minidiff", description="Draw pictures from words with a diffusion model, and train your own.",
                  epilog=f'start with: minidiff generate "{EXAMPLE}"')
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run, about: str, **texts) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=about, description=about, **texts)
        parser.set_defaults(run=run)
        return parser

    p = command("generate", _generate, "draw pictures of a prompt",
                formatter_class=argparse.RawDescriptionHelpFormatter,
                epilog=f'example:\n  minidiff generate "{EXAMPLE}" --seed 3 --film night.webp')
    p.add_argument("prompt", metavar="PROMPT", help="what to draw, in quotes")
    p.add_argument("--model", default="mini-sd",
                   help="mini-sd, which ships with minidiff (default), a model's folder, or its single file")
    p.add_argument("--tokenizer", metavar="FOLDER", help="the tokenizer of a single file, which carries none")
    p.add_argument("--config", metavar="NAME", help="its family: sd1, sd2-base, sd2, sdxl, or a folder of its shape")
    p.add_argument("--prediction-type", metavar="NAME",
                   help="what the model predicts, if its file does not say it: epsilon, v_prediction or sample")
    p.add_argument("--steps", type=int, default=25, help="steps from noise to picture, 1 to 1000 (default 25)")
    p.add_argument("--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLERS)}; default: the model's own")
    p.add_argument("--guidance-scale", type=float, default=7.5, metavar="X",
                   help="how strongly the prompt counts; 1 is off (default 7.5)")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to stay away from")
    p.add_argument("--seed", type=int, default=0, help="another number, another picture; up to 4294967295 (default 0)")
    p.add_argument("--num-images", type=int, default=1, metavar="N",
                   help="pictures, with seeds SEED, SEED + 1, ... (default 1)")
    p.add_argument("--init-image", metavar="FILE", help="a picture to start from, instead of noise")
    p.add_argument("--strength", type=float, metavar="X",
                   help="how much of --init-image is redrawn, 0 to 1 (default 0.6; with --mask 1)")
    p.add_argument("--mask", metavar="FILE", help="a picture: repaint --init-image only where this is white")
    p.add_argument("--lora", metavar="FILE[=X]", action="append", default=[],
                   help="a LoRA to load, X times as strong; may be given several times")
    p.add_argument("--controlnet", metavar="FOLDER", help="a ControlNet, for --control-image")
    p.add_argument("--control-image", metavar="FILE", help="the picture that --controlnet is told")
    p.add_argument("--grid", action="store_true", help="all pictures side by side in one file")
    p.add_argument("--film", metavar="FILE", help="how the first picture came about: .png, .gif or .webp")
    p.add_argument("--out", metavar="FILE", help="file (default: minidiff-0001.png, the next free number)")
    p.add_argument("--overwrite", action="store_true", help="replace files that exist")

    p = command("train", _train, "train a network of mini-sd")
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="see --list")
    p.add_argument("--list", action="store_true", help="show the recipes")
    p.add_argument("--out", metavar="FOLDER", help="where weights, log and samples go")
    p.add_argument("--steps", type=int, help="optimizer steps")
    p.add_argument("--seconds", type=float, help="stop after so long; --resume goes on")
    p.add_argument("--size", type=int, help="side of the pictures in pixels (default: that of the shipped weights)")
    p.add_argument("--device", help="cpu, cuda or mps")
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--data", metavar="FOLDER", help="pictures and metadata.jsonl, instead of scenes")
    p.add_argument("--init", metavar="FOLDER", help="start from these weights")
    p.add_argument("--resume", action="store_true", help="go on where a stopped run was")

    p = command("evaluate", _evaluate, "measure how well pictures show what their prompts say")
    p.add_argument("model", metavar="MODEL", nargs="?", default="mini-sd", help="mini-sd (default) or a model folder")
    p.add_argument("-n", type=int, default=1000, help="prompts in each of three sets (default 1000)")
    p.add_argument("--json", dest="json_file", metavar="FILE", help="also write the numbers there")
    p.add_argument("--out", metavar="FILE", help="contact sheet (default: minidiff-0001.png, the next free number)")
    p.add_argument("--overwrite", action="store_true", help="replace the contact sheet if it exists")
    p.add_argument("--steps", type=int, default=25, help="as in generate (default 25)")
    p.add_argument("--guidance-scale", type=float, default=7.5, metavar="X", help="as in generate (default 7.5)")
    p.add_argument("--sampler", metavar="NAME", help="as in generate; default: the model's own")

    p = command("info", _info, "show what a model file or folder holds")
    p.add_argument("path", metavar="PATH", help="mini-sd, a model folder or a weight file")
    p.add_argument("--json", dest="as_json", action="store_true", help="as JSON")

    p = command("bench", _bench, "measure how fast a model runs here, beside diffusers where that is installed")
    p.add_argument("model", metavar="MODEL", nargs="?", default="mini-sd",
                   help="mini-sd (default), a model, or sd1, sd2, sdxl: that shape with random weights")
    p.add_argument("--tokenizer", metavar="FOLDER", help="as in generate")
    p.add_argument("--config", metavar="NAME", help="as in generate")
    p.add_argument("--batch", type=int, default=1, help="pictures at once (default 1)")
    p.add_argument("--size", type=int, help="side of the pictures in pixels (default: the model's own)")
    p.add_argument("--steps", type=int, default=25, help="of the whole picture (default 25)")
    p.add_argument("--pairs", type=int, default=5, help="how often each side is timed, in turn (default 5)")
    p.add_argument("--device", help="cpu, cuda or mps")
    p.add_argument("--dtype", default="float32", help="float32 (default), float16 or bfloat16")
    p.add_argument("--compile", action="store_true", help="torch.compile both sides first")
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--json", dest="json_file", metavar="FILE", help="also write the numbers there")

    p = command("lab", _lab, "copy the notebooks and open them in JupyterLab, without a network")
    p.add_argument("folder", metavar="FOLDER", nargs="?", default="minidiff-notebooks",
                   help="where your copies go (default: minidiff-notebooks); what is there is kept")
    p.add_argument("--no-browser", dest="browser", action="store_false", help="print the address instead of opening it")
    return top


def _generate(**options) -> None:
    for path in generate(**options):
        print(path)


def _train(recipe: str | None, list: bool, **options) -> None:
    if list:
        for name, about in recipes().items():
            print(f"{name:10} {about}")
    elif recipe is None:
        raise ValueError("which recipe? minidiff train --list shows them")
    else:
        print(train(recipe, **options))


def _evaluate(**options) -> None:
    result, sheet = evaluate(**options)
    for name, value in result.items():
        for row, share in {name: value}.items() if not isinstance(value, dict) or "value" in value else value.items():
            label = row if row == name else f"{name}: {row}"
            print(f"{label:30} {_share(share)}")
    print(sheet)


def _info(path: str, as_json: bool) -> None:
    found = info(path)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['path']}\n{found['family']}, {found['parameters']:,} parameters, {found['dtype']}")
    known = {"predicts": found["prediction_type"], "scheduler": found["scheduler"],
             "with": "zero terminal SNR" if found["zero_terminal_snr"] else None}
    if any(known.values()):
        print(", ".join(f"{name} {value}" for name, value in known.items() if value))
    for name, part in found["parts"].items():
        print(f"  {name:16} {part.get('class', ''):28} {part['parameters']:>15,}  {part['dtype']}")


def _bench(**options) -> None:
    for name, value in bench(**options).items():
        if value is not None:
            parts = value if isinstance(value, list) else [value]
            shown = [f"{part:.4g}" if isinstance(part, float) else str(part) for part in parts]
            print(f"{name:24} {'  '.join(shown)}")


def _lab(**options) -> None:
    from minidiff.teach.lab import lab

    lab(**options)


def _share(value) -> str:
    return f"{value['value']:.4f}  [{value['low']:.4f}, {value['high']:.4f}]" if isinstance(value, dict) else str(value)


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


def _large(path: Path) -> Path:
    return path.with_stem(f"{path.stem}-large")


def _sheet(images: list[Image.Image]) -> Image.Image:
    from minidiff.data.scenes import contact_sheet

    return contact_sheet(images, columns=math.ceil(math.sqrt(len(images))), scale=1)


def _warn_unknown(prompt: str) -> None:
    from minidiff.data.scenes import unknown_words

    if unknown := unknown_words(prompt):
        known = "; ".join(" ".join(words) for words in _attributes().values())
        warnings.warn(f"mini-sd has never seen: {', '.join(unknown)}. It draws {known}. For example: {EXAMPLE!r}",
                      stacklevel=3)


def _attributes() -> dict[str, tuple[str, ...]]:
    from minidiff.data.scenes import ATTRIBUTES

    return ATTRIBUTES


@contextmanager
def _progress(total: int, label: str, unit: str):
    """A bar on stderr that appears after a second."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit=unit, delay=1.0, leave=False) as bar:
        yield bar


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.strerror and error.filename else str(error)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
