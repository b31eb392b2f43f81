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

from minidiff.commands import bench, evaluate, grade, info, recipes, train, web
from minidiff.generate import DTYPES, EXAMPLE, generate, read_prompts, settings_of
from minidiff.io.plain_text import one_line

SAMPLERS = ("ddim", "ddpm", "ddpm_large", "euler", "euler_ancestral", "heun", "lms", "plms", "dpmpp_2m", "dpmpp_2m_sde",
            "dpmpp_sde", "unipc", "lcm")
OTHER_NAMES = {"image": "--init-image", "pipe.offload()": "--offload", "tile=512": "--tile 512",
               "dtype=torch.float16": "--dtype float16"}  # what Python's messages call what is an option here


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
        warnings.showwarning = lambda message, *_: print(f"minidiff: {said(message)}", file=sys.stderr)
        parser = None

        def said(message: object) -> str:
            return one_line(_with_options(str(message), parser))

        try:
            args, odd = _parser().parse_known_args(argv)
            parser = args.parser
            if odd:
                parser.error(_unknown(odd, parser))
            args = {name: value for name, value in vars(args).items() if name != "parser"}
            args.pop("run")(**args)
            sys.stdout.flush()
            return 0
        except KeyboardInterrupt as stop:
            print(f"minidiff: {said(stop) or 'stopped'}", file=sys.stderr)
            return getattr(stop, "code", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # Python flushes once more at its end
            return 0
        except OSError as error:
            print(f"minidiff: {said(_reason(error))}", file=sys.stderr)
        except ValueError as error:
            print(f"minidiff: {said(error)}", file=sys.stderr)
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
        parser.set_defaults(run=run, parser=parser)
        return parser

    p = command("generate", _generate, "draw pictures of a prompt", argument_default=argparse.SUPPRESS,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                epilog=f'example:\n  minidiff generate "{EXAMPLE}" --seed 3 --film night.webp')
    _what(p.add_argument_group("what to draw"))
    _how(p.add_argument_group("how"))
    _from(p.add_argument_group("from a picture"))
    _with(p.add_argument_group("with which model"))
    _files(p.add_argument_group("files"))

    p = command("train", _train, "train a network of mini-sd")
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="see --list")
    p.add_argument("--list", action="store_true", help="show the recipes")
    p.add_argument("--out", metavar="FOLDER", help="where weights, log and samples go")
    p.add_argument("--steps", type=_whole, help="optimizer steps")
    p.add_argument("--seconds", type=_real, help="stop after so long; --resume goes on")
    p.add_argument("--size", type=_whole, help="side of the pictures in pixels (default: that of the shipped weights)")
    p.add_argument("--batch", type=_whole, help="pictures per step (default: the recipe's own number)")
    p.add_argument("--accumulate", type=_whole, metavar="N", help="in N parts, one after the other: less memory")
    p.add_argument("--device", help="cpu, cuda or mps")
    p.add_argument("--threads", type=_whole, help="CPU threads")
    p.add_argument("--data", metavar="FOLDER",
                   help="your own pictures; captions from metadata.jsonl, .txt files beside them, or their names; of "
                        "lora and inversion also cat or watercolour, 24 drawings each")
    p.add_argument("--init", metavar="MODEL", help="start from these weights: mini-sd, a model's folder, or its part's")
    p.add_argument("--rank", type=_whole, help="of lora (default 8), and of lcm, which is then a LoRA")
    p.add_argument("--text-encoder", action="store_true", default=None, help="of lora: the text encoder learns too")
    p.add_argument("--prior", metavar="PROMPT",
                   help='of lora: what must stay as it is, such as "a tree", or scenes for all that mini-sd draws')
    p.add_argument("--checkpointing", action="store_true", default=None, help="of lora: slower, in less memory")
    p.add_argument("--word", help="of inversion: the word of the captions to learn (default: that in <brackets>)")
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

    p = command("info", _info, "show what a model file or folder holds, or how a picture was made")
    p.add_argument("path", metavar="PATH", help="mini-sd, a model folder, a weight file or a picture")
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
    p.add_argument("--no-solutions", dest="solutions", action="store_false", help="without the exercises' solutions")

    p = command("grade", _grade, "run a folder of handed-in notebooks and count their exercises; it runs their code")
    p.add_argument("folder", metavar="FOLDER", help="with the notebooks")
    p.add_argument("--csv", dest="csv_file", metavar="FILE", help="also write the marks there, for a spreadsheet")
    p.add_argument("--seconds", type=_real, default=300.0, help="stop a cell that takes longer (default 300)")
    p.add_argument("--overwrite", action="store_true", help="replace the file of --csv if it exists")

    for kind, what in (("slides", "slides for a projector; C shows the code, S the speaker's notes"),
                       ("pages", "web pages")):
        p = command(kind, _web, f"write the notebooks as {what}; any browser opens them, without a network")
        p.set_defaults(kind=kind)
        p.add_argument("folder", metavar="FOLDER", help="gets an .html file for each notebook, and what they need")
        p.add_argument("--source", metavar="NOTEBOOKS", help="a folder of notebooks, or one (default: those that ship)")
        p.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return top


def _what(g: argparse._ArgumentGroup) -> None:
    g.add_argument("prompt", metavar="PROMPT", nargs="*", help="what to draw, in quotes")
    g.add_argument("--prompts", metavar="FILE", help="a text file instead, a prompt on each line; # begins a comment")
    g.add_argument("--like", metavar="PICTURE", help="as this picture was made, but for what is given here")
    g.add_argument("--negative-prompt", metavar="TEXT", help="what to stay away from")
    g.add_argument("--weights", action="store_true",
                   help="read (red:1.3), [red], BREAK and <lora:FILE:0.8> as AUTOMATIC1111's web UI does")
    g.add_argument("--long", action="store_true", help="read prompts beyond 77 tokens instead of cutting them off")
    g.add_argument("--clip-skip", type=_whole, metavar="N",
                   help="leave out the text encoder's last N layers (default 0)")
    g.add_argument("--seed", type=_seed,
                   help="another number, another picture; up to 4294967295, or random (default 0)")
    g.add_argument("--num-images", type=_whole, metavar="N",
                   help="pictures of each prompt (default 1); the seeds of all go on from SEED")


def _how(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--steps", type=_whole, help="from noise to picture, 1 to 1000 (default 25; by lcm 4)")
    g.add_argument("--sampler", metavar="NAME",
                   help=f"one of {', '.join(SAMPLERS)}; some may end in _karras, _exponential or _beta; or the web "
                        'UI\'s name, "DPM++ 2M Karras"; default: the model\'s own')
    g.add_argument("--guidance-scale", type=_real, metavar="X",
                   help="how strongly the prompt counts; 1 is off (default 7.5; by lcm 1, or 8.5 if told)")
    g.add_argument("--guidance-rescale", type=_real, metavar="X",
                   help="0 to 1: take back what guidance adds in contrast (default 0)")
    g.add_argument("--eta", type=_real, metavar="X", help="0 to 1: share of fresh noise, of samplers that have some")
    g.add_argument("--churn", type=_real, metavar="X", help="of euler: noise added back on the way (default 0)")
    g.add_argument("--size", type=_whole, metavar="PIXELS",
                   help="side of the pictures (default: what the model was trained at, where it draws best)")
    g.add_argument("--height", type=_whole, metavar="PIXELS", help="instead of --size")
    g.add_argument("--width", type=_whole, metavar="PIXELS", help="instead of --size")
    g.add_argument("--enlarge", type=_real, metavar="X",
                   help="draw, enlarge X times, redraw with --strength (default 0.3; mini-sd 0.1): sizes beyond the "
                        "model's own")


def _from(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--init-image", metavar="FILE", help="a picture to start from, instead of noise")
    g.add_argument("--strength", type=_real, metavar="X",
                   help="how much of --init-image is redrawn, 0 to 1 (default 0.6; with --mask 1)")
    g.add_argument("--mask", metavar="FILE", help="a picture: repaint --init-image only where this is white")
    g.add_argument("--controlnet", metavar="FOLDER", action="append",
                   help="a ControlNet, for --control-image, or edges or masks, which ship with mini-sd; both may be "
                        "given several times")
    g.add_argument("--control-image", metavar="FILE", action="append",
                   help="the picture that --controlnet is told; edges takes a photograph too")
    g.add_argument("--control-scale", type=_real, metavar="X", action="append",
                   help="how strongly it counts (default 1); for several ControlNets once for all or once for each")
    g.add_argument("--control-start", type=_real, metavar="X", action="append",
                   help="the share of the steps from which it counts (default 0)")
    g.add_argument("--control-end", type=_real, metavar="X", action="append", help="and up to which (default 1)")


def _with(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--model", metavar="MODEL",
                   help="mini-sd (default) or mini-sd-lcm, which draws in 4 steps: both ship; a model's folder, its "
                        'single file, or "owner/name" of the Hugging Face Hub')
    g.add_argument("--download", action="store_true", help="fetch what is missing of owner/name")
    g.add_argument("--variant", metavar="NAME", help='which of a folder\'s weight files, such as "fp16"')
    g.add_argument("--tokenizer", metavar="FOLDER", help="the tokenizer of a single file, which carries none")
    g.add_argument("--config", metavar="NAME", help="its family: sd1, sd2-base, sd2, sdxl, or a folder of its shape")
    g.add_argument("--prediction-type", metavar="NAME",
                   help="what the model predicts, if its file does not say it: epsilon, v_prediction or sample")
    g.add_argument("--vae", metavar="FILE", help="another VAE, a file or a folder")
    g.add_argument("--lora", metavar="FILE[=X]", action="append",
                   help="a LoRA to load, X times as strong; watercolour, cat and lcm ship; may be given several times")
    g.add_argument("--embedding", metavar="FILE[=WORD]", action="append",
                   help="a textual inversion to load, as WORD, or cat, the word <cat>; may be given several times")
    g.add_argument("--device", metavar="NAME", help="cpu, cuda or mps (default: the fastest there is)")
    g.add_argument("--dtype", metavar="NAME",
                   help=f"{', '.join(DTYPES)} (default: float16 on cuda, which takes half the memory and is faster, "
                        "else float32)")
    g.add_argument("--offload", action="store_true", help="keep on the device only the network at work: less memory")
    g.add_argument("--tile", type=_whole, metavar="PIXELS", help="decode in tiles of this size: less memory, try 512")
    g.add_argument("--compile", action="store_true", help="torch.compile the model: slow once, then faster")


def _files(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--grid", action="store_true", help="all pictures side by side in one file")
    g.add_argument("--film", metavar="FILE", help="how the first picture came about: .png, .gif or .webp")
    g.add_argument("--out", metavar="FILE", help="file (default: minidiff-0001.png, the next free number)")
    g.add_argument("--overwrite", action="store_true", help="replace files that exist")
    g.add_argument("--no-metadata", dest="metadata", action="store_false",
                   help="do not write into the files how they were made, and from which others, for info and --like")


def _seed(text: str) -> int | str:
    return text if text == "random" else _whole(text)


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


def _generate(prompt: Sequence[str] = (), prompts: str | None = None, like: str | None = None, **options) -> None:
    if len(prompt) > 1:
        raise ValueError(f'quote the prompt: minidiff generate "{" ".join(prompt)}"')
    if prompt and prompts is not None:
        raise ValueError("give either a PROMPT or --prompts")
    given = {"prompt": prompt[0]} if prompt else {} if prompts is None else {"prompt": read_prompts(prompts)}
    known = {} if like is None else settings_of(like)
    if "size" in options:
        known = {name: value for name, value in known.items() if name not in ("height", "width")}
    given = known | given
    for name, option in (("init_image", "--init-image"), ("mask", "--mask"), ("control_image", "--control-image")):
        for file in [known[name]] if isinstance(known.get(name), str) else known.get(name, []):
            if name not in options and not os.path.isfile(file):
                raise ValueError(f"{like} was made from {file}, which is not there; {option} names another")
    if "prompt" not in given:
        raise ValueError(f'a PROMPT is missing: minidiff generate "{EXAMPLE}"')
    for path in generate(**given | options, say=lambda line: print(f"minidiff: {one_line(line)}", file=sys.stderr)):
        print(path)


def _unknown(words: list[str], parser: argparse.ArgumentParser) -> str:
    """What to say of arguments that a command does not have."""
    from difflib import get_close_matches

    from minidiff.sd.settings import ELSEWHERE

    options = [option for action in parser._actions for option in action.option_strings]
    near = "--" + ELSEWHERE.get(words[0].lstrip("-").replace("-", "_"), "").replace("_", "-")
    near = [near] if near in options else get_close_matches(words[0], options, 1)
    return f"there is no {' '.join(words)}{f'; here it is {near[0]}' if near and words[0][:1] == '-' else ''}"


def _with_options(message: str, parser: argparse.ArgumentParser | None) -> str:
    """A message of Python's, with the names that its arguments have on the command line."""
    names = {action.dest: action.option_strings[-1] for action in (parser._actions if parser else [])
             if action.option_strings}
    for theirs, ours in OTHER_NAMES.items():
        if ours.split()[0] in names.values() and not theirs.isidentifier():
            message = message.replace(theirs, ours)
    names |= {theirs: ours for theirs, ours in OTHER_NAMES.items() if ours in names.values() and theirs.isidentifier()}
    word = "|".join(map(re.escape, names)) or "(?!)"
    alone = r"(?<![\w\"'./-])"

    def option(found: re.Match) -> str:
        return names[found[1]]

    message = re.sub(rf"{alone}({word})=(True\b|(?=[,;]))?",                                    # weights=True
                     lambda found: option(found) + (" " if found[2] is None else ""), message)
    message = re.sub(rf"^({word})(?= (?:is|are|needs|belongs|[0-9.]+ of)\b)", option, message)  # steps is 0; …
    return re.sub(rf"{alone}({word})\b(?![\"'./=])", lambda found: option(found) if "_" in found[1] else found[1],
                  message)


def _train(recipe: str | None, list: bool, **options) -> None:
    if list:
        for name, about in recipes().items():
            print(f"{name:16} {about}")
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
    if "picture" in model and not as_json:
        print(one_line(model["path"]), one_line(model["picture"]), sep="\n")
        for line in (model["text"] or "it does not say how it was made").splitlines():
            print(f"  {one_line(line)}")
        text = model["text"] or ""
        more = [f"{name} {value}" for name, value in (model["settings"] or {}).items()
                if name in ("grid", "num_images", "init_image", "mask", "weights", "long", "vae", "lora", "embedding",
                            "controlnet", "control_image", "dtype", "variant", "tile", "churn")]
        if more and "Version: minidiff" in text:
            print(f"  with {one_line(', '.join(more))}")
        return
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
    r = bench(**options)
    print(f"{r['model']}, {r['batch']} × {r['size']}×{r['size']} pixels, {r['dtype']}, on {r['device']}")
    lines = {"a guided step": f"{_time(r['step_seconds'])}, {r['steps_per_second']:.3g} a second",
             "arithmetic": f"{1000 * r['tflops']:,.0f} GFLOP/s, {100 * r['share']:.0f} % of what this machine's matrix "
                           f"products reach"}
    if r["picture_seconds"] is not None:
        lines["a picture"] = f"{_time(r['picture_seconds'])}, of {options.get('steps', 25)} steps"
    if r["compile_seconds"] is not None:
        lines["compiling"] = f"{_time(r['compile_seconds'])}, once"
    if r["peak_bytes"] is not None:
        lines["memory at most"] = f"{r['peak_bytes'] / 2**30:.2f} GiB"
    if "ratio" in r:
        median, low, high = r["ratio"]
        theirs = _time(r["diffusers_step_seconds"])
        lines["beside diffusers"] = f"its step takes {theirs}; ours {median:.2f} of it ({low:.2f} to {high:.2f})"
    for name, text in lines.items():
        print(f"  {name:17} {text}")


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _lab(**options) -> None:
    from minidiff.teach.lab import lab

    if code := lab(**options):
        raise SystemExit(code)


def _grade(**options) -> None:
    print(grade(**options))


def _web(**options) -> None:
    print(f"open {web(**options)}")


def _share(value) -> str:
    return f"{value['value']:.4f}  [{value['low']:.4f}, {value['high']:.4f}]" if isinstance(value, dict) else str(value)


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.strerror and error.filename else str(error)
