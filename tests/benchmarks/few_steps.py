"""Few steps: mini-sd-lcm and its LoRA at 1, 2, 4, 8 calls beside mini-sd, read back by the reader.

    python tests/benchmarks/few_steps.py [-n 1000] [--only lcm]     writes data/few_steps.json, row by row
    python tests/benchmarks/few_steps.py --sheet data/gallery/few-steps.png      the same noises, a row for each
    python tests/benchmarks/few_steps.py --shell                    seconds from the shell to a picture, alternating

The prompts are those of `minidiff.measure.evaluate`, each names all seven attributes and has a seed of its own. A row
has the share of attributes and of whole pictures that are right, with 95 % Wilson intervals, and of the sets'
features recall, precision and kernel distance to as many drawings (`minidiff.measure.metrics`), 95 % by bootstrap.
"ddim" is mini-sd as it is called by default, whose one step begins at t = 1 ("leading" spacing); those of "trailing"
begin at t = 999, which is fairer where there are few (Lin et al. 2023, arXiv 2305.08891). "restart" is mini-sd by the
sampler of mini-sd-lcm, without guidance: what is not the distillation's doing.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from minidiff.data import scenes
from minidiff.io.images import contact_sheet, save_image
from minidiff.io.weights import weights_dir
from minidiff.io.write import write_atomic
from minidiff.measure import metrics
from minidiff.measure.evaluate import BATCH, FRESH, prompt_set, right, share
from minidiff.nets.reader import Reader
from minidiff.samplers import ddim
from minidiff.sd.pipeline import StableDiffusion
from minidiff.sd.scheduler import discrete, from_diffusers
from minidiff.train.recipes.mini_sd import SCHEDULER

OUT = Path(__file__).parents[2] / "data" / "few_steps.json"
STEPS = (1, 2, 4, 8)
TRAILING = {**SCHEDULER, "timestep_spacing": "trailing"}
DISTANCES = ("recall", "precision", "kernel_distance")
PROMPT = "a large red house on the left, snow, night, stars"


def rows() -> dict[str, tuple[str, int, dict]]:
    """name -> (model, calls of the U-Net for one picture, settings); a guided step has two calls."""
    found = {}
    for steps in STEPS:
        found[f"lcm {steps}"] = ("mini-sd-lcm", steps, {"steps": steps})
        found[f"lora {steps}"] = ("lora", steps, {"steps": steps, "sampler": "lcm", "guidance_scale": 1})
        found[f"restart {steps}"] = ("mini-sd", steps, {"steps": steps, "sampler": "lcm", "guidance_scale": 1})
        found[f"ddim {steps}"] = ("mini-sd", 2 * steps, {"steps": steps})
        grid = from_diffusers(TRAILING, steps, discrete(TRAILING))
        found[f"trailing {steps}"] = ("mini-sd", 2 * steps, {"sampler": (ddim, grid)})
        found[f"trailing {steps} unguided"] = ("mini-sd", steps, {"sampler": (ddim, grid), "guidance_scale": 1})
    return found | {"ddim 25": ("mini-sd", 50, {"steps": 25})}


def load(name: str) -> StableDiffusion:
    if name != "lora":
        return StableDiffusion.from_pretrained(name, device="cpu")
    pipe = StableDiffusion.from_pretrained("mini-sd", device="cpu")
    pipe.load_lora("lcm")
    return pipe


def measure(pipe: StableDiffusion, asked: list[scenes.Scene], settings: dict, reader: Reader,
            real: torch.Tensor) -> dict:
    """One row, from pictures of all prompts."""
    hits, features = [], []
    for first in range(0, len(asked), BATCH):
        part = asked[first:first + BATCH]
        image = pipe([scenes.caption(scene) for scene in part], seed=first, output="tensor", **settings) * 2 - 1
        hits += right(reader, part, image)
        features.append(reader.features(image))
    features, found = torch.cat(features), {}
    for name in DISTANCES:
        of = metrics.MEASURES[name]
        low, high = metrics.bootstrap(of, real, features, n=50)
        found[name] = {"value": round(of(real, features), 4), "low": round(low, 4), "high": round(high, 4)}
    attributes = share([value for row in hits for value in row.values()])
    return {"attributes": attributes, "all": share([all(row.values()) for row in hits]), **found}


def sheet(file: Path) -> None:
    """Eight prompts; rows: mini-sd-lcm at STEPS, mini-sd at as many guided steps of DDIM from t = 999, and at 25."""
    shown, images = prompt_set("seen", 8), []
    for name in (*(f"lcm {steps}" for steps in STEPS), *(f"trailing {steps}" for steps in STEPS), "ddim 25"):
        model, _, settings = rows()[name]
        images += load(model)([scenes.caption(scene) for scene in shown], seed=0, **settings)
    save_image(contact_sheet(images, columns=8, scale=1), file)


def shell(pairs: int = 7) -> dict[str, dict]:
    """Seconds from the shell to a picture at 4 calls and at 25 guided steps, alternating."""
    times: dict[str, list[float]] = {"lcm 4": [], "ddim 25": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(pairs):
            for name, more in (("lcm 4", ["--model", "mini-sd-lcm", "--steps", "4"]), ("ddim 25", [])):
                command = [sys.executable, "-m", "minidiff", "generate", PROMPT, *more, "--out",
                           f"{folder}/{name}{i}.png"]
                began = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                times[name].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(*times.values())]
    return {name: {"median": round(statistics.median(row), 2), "low": round(min(row), 2), "high": round(max(row), 2)}
            for name, row in (*times.items(), ("ratio", ratios))}


def keep(file: Path, n: int, rows: dict | None = None, **more: dict) -> None:
    """Add to what the file has."""
    result = json.loads(file.read_text()) if file.is_file() else {"n": n, "rows": {}}
    result["rows"] |= rows or {}
    write_atomic(file, json.dumps(result | more, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--only", default="", help="rows whose name begins so")
    parser.add_argument("--shell", action="store_true")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.sheet:
        sheet(args.sheet)
        return
    if args.shell:
        keep(args.out, args.n, seconds=shell())
        return
    reader, asked = Reader.from_pretrained(weights_dir() / "reader"), prompt_set("seen", args.n)
    drawn = scenes.render(args.n, 128, seed=FRESH, second=0.0)[0]
    real = torch.cat([reader.features(part.float() / 127.5 - 1) for part in drawn.split(BATCH)])
    for name, (model, calls, settings) in tqdm(rows().items()):
        if name.startswith(args.only):
            keep(args.out, args.n, {name: {"calls": calls, **measure(load(model), asked, settings, reader, real)}})


if __name__ == "__main__":
    main()
