"""The command line, `python -m minidiff …`: options, help, what is printed; the work is in `commands`, `teach.lab`."""
from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress

from minidiff.commands import EXAMPLE, bench, evaluate, generate, info, recipes, train
from minidiff.io.plain_text import one_line

SAMPLERS = ("ddim", "ddpm", "euler", "euler_ancestral", "heun", "lms", "plms", "dpmpp_2m", "unipc", "lcm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 2 for bad input (one line on stderr), 130 after Ctrl-C,
    143 after SIGTERM.

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
        warnings.showwarning = lambda message, *_: print(f"minidiff: {one_line(message)}", file=sys.stderr)
        try:
            args = vars(_parser().parse_args(argv))
            args.pop("run")(**args)
            sys.stdout.flush()
            return 0
        except KeyboardInterrupt as stop:
            print(f"minidiff: {one_line(stop) or 'stopped'}", file=sys.stderr)
            return getattr(stop, "code", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # Python flushes once more at its end
            return 0
        except OSError as error:
            print(f"minidiff: {one_line(_reason(error))}", file=sys.stderr)
        except ValueError as error:
            print(f"minidiff: {one_line(error)}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for an error, and the vocabulary in the help of `generate`."""

    def error(self, message: str) -> None:
        self.exit(2, f"{one_line(f'{self.prog}: {message}; see {self.prog} --help')}\n")

    def format_help(self) -> str:
        if not self.prog.endswith("generate"):
            return super().format_help()
        from minidiff.data.scenes import ATTRIBUTES

        lines = [f"  {name:8} {', '.join(words)}" for name, words in ATTRIBUTES.items()]
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
    p.add_argument("--steps", type=_whole, default=25, help="steps from noise to picture, 1 to 1000 (default 25)")
    p.add_argument("--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLERS)}; default: the model's own")
    p.add_argument("--guidance-scale", type=_real, default=7.5, metavar="X",
                   help="how strongly the prompt counts; 1 is off (default 7.5)")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to stay away from")
    p.add_argument("--seed", type=_whole, default=0,
                   help="another number, another picture; up to 4294967295 (default 0)")
    p.add_argument("--num-images", type=_whole, default=1, metavar="N",
                   help="pictures, with seeds SEED, SEED + 1, ... (default 1)")
    p.add_argument("--size", type=_whole, metavar="PIXELS",
                   help="side of the pictures (default: what the model was trained at, where it draws best)")
    p.add_argument("--init-image", metavar="FILE", help="a picture to start from, instead of noise")
    p.add_argument("--strength", type=_real, metavar="X",
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
    p.add_argument("--steps", type=_whole, help="optimizer steps")
    p.add_argument("--seconds", type=_real, help="stop after so long; --resume goes on")
    p.add_argument("--size", type=_whole, help="side of the pictures in pixels (default: that of the shipped weights)")
    p.add_argument("--device", help="cpu, cuda or mps")
    p.add_argument("--threads", type=_whole, help="CPU threads")
    p.add_argument("--data", metavar="FOLDER", help="pictures and metadata.jsonl, instead of scenes")
    p.add_argument("--init", metavar="FOLDER", help="start from these weights")
    p.add_argument("--resume", action="store_true", help="go on where a stopped run was")

    p = command("evaluate", _evaluate, "measure how well pictures show what their prompts say")
    p.add_argument("model", metavar="MODEL", nargs="?", default="mini-sd", help="mini-sd (default) or a model folder")
    p.add_argument("-n", type=_whole, default=1000, help="prompts in each of three sets (default 1000)")
    p.add_argument("--json", dest="json_file", metavar="FILE", help="also write the numbers there")
    p.add_argument("--out", metavar="FILE", help="contact sheet (default: minidiff-0001.png, the next free number)")
    p.add_argument("--overwrite", action="store_true", help="replace files that exist")
    p.add_argument("--steps", type=_whole, default=25, help="as in generate (default 25)")
    p.add_argument("--guidance-scale", type=_real, default=7.5, metavar="X", help="as in generate (default 7.5)")
    p.add_argument("--sampler", metavar="NAME", help="as in generate; default: the model's own")

    p = command("info", _info, "show what a model file or folder holds")
    p.add_argument("path", metavar="PATH", help="mini-sd, a model folder or a weight file")
    p.add_argument("--json", dest="as_json", action="store_true", help="as JSON")

    p = command("bench", _bench, "measure how fast a model runs here, beside diffusers where that is installed")
    p.add_argument("model", metavar="MODEL", nargs="?", default="mini-sd",
                   help="mini-sd (default), a model, or sd1, sd2, sdxl: that shape with random weights")
    p.add_argument("--tokenizer", metavar="FOLDER", help="as in generate")
    p.add_argument("--config", metavar="NAME", help="as in generate")
    p.add_argument("--batch", type=_whole, default=1, help="pictures at once (default 1)")
    p.add_argument("--size", type=_whole, help="side of the pictures in pixels (default: the model's own)")
    p.add_argument("--steps", type=_whole, default=25, help="of the whole picture (default 25)")
    p.add_argument("--pairs", type=_whole, default=5, help="how often each side is timed, in turn (default 5)")
    p.add_argument("--device", help="cpu, cuda or mps")
    p.add_argument("--dtype", default="float32", help="float32 (default), float16 or bfloat16")
    p.add_argument("--compile", action="store_true", help="torch.compile both sides first")
    p.add_argument("--threads", type=_whole, help="CPU threads")
    p.add_argument("--json", dest="json_file", metavar="FILE", help="also write the numbers there")
    p.add_argument("--overwrite", action="store_true", help="replace the file of --json if it exists")

    p = command("lab", _lab, "copy the notebooks and open them in JupyterLab, without a network")
    p.add_argument("folder", metavar="FOLDER", nargs="?", default="minidiff-notebooks",
                   help="where your copies go (default: minidiff-notebooks); what is there is kept")
    p.add_argument("--no-browser", dest="browser", action="store_false", help="print the address instead of opening it")
    return top


def _whole(text: str) -> int:
    """Python's int also takes 1_0, digits of other scripts, and as many as you like."""
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at most 18 digits")
    return int(text)


def _real(text: str) -> float:
    if text.isascii() and not set(text) & set("_ "):
        with suppress(ValueError):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number")


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
    model = info(path)
    if as_json:
        print(json.dumps(model, indent=2))
        return
    known = {"predicts": model["prediction_type"], "scheduler": model["scheduler"],
             "with": "zero terminal SNR" if model["zero_terminal_snr"] else None}
    lines = [model["path"], f"{model['family']}, {model['parameters']:,} parameters, {model['dtype']}",
             ", ".join(f"{name} {value}" for name, value in known.items() if value)]
    for line in filter(None, lines):
        print(one_line(line))
    for name, part in model["parts"].items():
        row = one_line(name), one_line(part.get("class", "")), part["parameters"], part["dtype"]
        print("  {:16} {:28} {:>15,}  {}".format(*row))


def _bench(**options) -> None:
    for name, value in bench(**options).items():
        if value is not None:
            parts = value if isinstance(value, list) else [value]
            shown = [f"{part:.4g}" if isinstance(part, float) else str(part) for part in parts]
            print(f"{name:24} {'  '.join(shown)}")


def _lab(**options) -> None:
    from minidiff.teach.lab import lab

    if code := lab(**options):
        raise SystemExit(code)


def _share(value) -> str:
    return f"{value['value']:.4f}  [{value['low']:.4f}, {value['high']:.4f}]" if isinstance(value, dict) else str(value)


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.strerror and error.filename else str(error)
