"""How fast minidiff is: measured side by side with `import torch`, and with diffusers on the same weights.

    python tests/benchmarks/ratios.py                  # everything, about five minutes on a quiet machine
    python tests/benchmarks/ratios.py --only unet vae  # rows whose name contains one of these
    python tests/benchmarks/ratios.py --threads 2 --pairs 15 --json ratios.json

Each row is the median of several pairs. A pair times both sides right after each other, and the side that goes first
alternates, so that whatever else the machine does falls on both. Both sides have the same weights, threads, scheduler,
`inference_mode` (but for training steps) and no progress bar; nets are first checked to give the same output. A ratio
under 1 means that minidiff is faster, or smaller.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff.io.weights import weights_dir  # noqa: E402
from minidiff.nets.unet import UNet, UNetConfig  # noqa: E402
from minidiff.nets.vae import VAE, VAEConfig  # noqa: E402

PROMPT = "a large red house on the left, snow, night, stars"
SAMPLE_SECONDS = 0.25  # a fast function is repeated until one timing takes about this long
MINI_SD = weights_dir() / "mini-sd"

UNET = {
    "sample_size": 32, "block_out_channels": (64, 128), "attention_head_dim": 4, "cross_attention_dim": 128,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
AUTOENCODER = {
    "sample_size": 128, "block_out_channels": (64, 128, 128), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
}

THREADS = "import os, torch; torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))"
DIFFUSERS = f"""{THREADS}
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({str(MINI_SD)!r})
pipe.set_progress_bar_config(disable=True)
with torch.inference_mode(): pipe({PROMPT!r}, num_inference_steps=25)
"""
MINIDIFF = f"""{THREADS}
import minidiff as md
md.StableDiffusion.from_pretrained({str(MINI_SD)!r}, device="cpu")({PROMPT!r}, steps=25)
"""


class Row(NamedTuple):
    """Two functions to compare. Either both return a measurement, or both return None and are timed, in ms."""

    name: str
    ours: Callable[[], float | None]
    theirs: Callable[[], float | None]
    unit: str = "ms"


def python(*args: str) -> Callable[[], None]:
    """A function that runs a fresh Python."""

    def run() -> None:
        subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, check=True)

    return run


def peak(code: str) -> Callable[[], float]:
    """A function that runs code in a fresh Python and returns the most memory that it ever had, in MiB (Linux)."""
    # not getrusage: its peak includes that of the process which started this one
    code += "\nfor line in open('/proc/self/status'):\n    if line.startswith('VmHWM'): print(line.split()[1])"

    def run() -> float:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1]) / 1024

    return run


def start_up() -> Iterator[Row]:
    torch_alone = python("-c", "import torch")
    yield Row("import minidiff / import torch", python("-c", "import minidiff"), torch_alone)
    yield Row("import minidiff.sd.pipeline / import torch", python("-c", "import minidiff.sd.pipeline"), torch_alone)
    if MINI_SD.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "picture.png")
            draw = python("-m", "minidiff", "generate", PROMPT, "--out", out, "--overwrite")
            yield Row("shell to picture, 25 steps / import torch", draw, torch_alone)


def networks() -> Iterator[Row]:
    """Forward and training step of the nets, shrunken Stable Diffusion and mini-sd."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unets = [("unet 64-128, 32x32", UNet2DConditionModel(**UNET))]
    vaes = [("vae 64-128-128, 128x128", AutoencoderKL(**AUTOENCODER))]
    if MINI_SD.is_dir():
        unets.append(("unet mini-sd", UNet2DConditionModel.from_pretrained(MINI_SD / "unet")))
        vaes.append(("vae mini-sd", AutoencoderKL.from_pretrained(MINI_SD / "vae")))
    for name, theirs in unets:
        yield from compare_unet(name, theirs)
    for name, theirs in vaes:
        yield from compare_vae(name, theirs)


def compare_unet(name: str, theirs: nn.Module) -> Iterator[Row]:
    ours = same_weights(UNet(UNetConfig.from_dict(dict(theirs.config))), theirs)
    side, ch, width = (theirs.config[key] for key in ("sample_size", "in_channels", "cross_attention_dim"))

    def inputs(batch: int) -> tuple:
        return torch.randn(batch, ch, side, side), torch.arange(batch) * 40 + 1, torch.randn(batch, 77, width)

    guided = inputs(2)  # one guided step
    yield from forward(f"{name}, forward", lambda: ours(*guided), lambda: theirs(*guided, return_dict=False)[0])
    batch = inputs(4)
    yield Row(f"{name}, training step", training(ours, lambda: ours(*batch)),
              training(theirs, lambda: theirs(*batch, return_dict=False)[0]))


def compare_vae(name: str, theirs: nn.Module) -> Iterator[Row]:
    ours = same_weights(VAE(VAEConfig.from_dict(dict(theirs.config))), theirs)
    side = theirs.config["sample_size"]

    def round_trip(image: torch.Tensor) -> torch.Tensor:
        latent = theirs.encode(image, return_dict=False)[0].mode()
        return theirs.decode(latent, return_dict=False)[0]

    image, batch = torch.randn(1, 3, side, side), torch.randn(4, 3, side, side)
    yield from forward(f"{name}, encode + decode", lambda: ours(image), lambda: round_trip(image))
    yield Row(f"{name}, training step", training(ours, lambda: ours(batch)),
              training(theirs, lambda: round_trip(batch)))


def same_weights(ours: nn.Module, theirs: nn.Module) -> nn.Module:
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours


def forward(name: str, ours: Callable, theirs: Callable) -> Iterator[Row]:
    with torch.inference_mode():
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
    yield Row(name, torch.inference_mode()(ours), torch.inference_mode()(theirs))


def training(net: nn.Module, out: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward, backward and a step of AdamW, so small that the weights stay finite."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6)

    def step() -> None:
        y = out()
        F.mse_loss(y, torch.zeros_like(y)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def pipelines() -> Iterator[Row]:
    """mini-sd from prompt to pixels, loading it, and the memory of both together."""
    if not MINI_SD.is_dir():
        return
    from diffusers import StableDiffusionPipeline

    import minidiff as md

    def load() -> StableDiffusionPipeline:
        pipe = StableDiffusionPipeline.from_pretrained(MINI_SD)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    ours, theirs = md.StableDiffusion.from_pretrained(MINI_SD, device="cpu"), load()
    yield Row("mini-sd, 25 guided steps, prompt to picture", lambda: ours(PROMPT, steps=25),
              torch.inference_mode()(lambda: theirs(PROMPT, num_inference_steps=25)))
    yield Row("mini-sd, loading", lambda: md.StableDiffusion.from_pretrained(MINI_SD, device="cpu"), load)
    yield Row("mini-sd, process from import to picture", python("-c", MINIDIFF), python("-c", DIFFUSERS))
    if sys.platform == "linux":
        yield Row("mini-sd, peak memory of that process", peak(MINIDIFF), peak(DIFFUSERS), "MiB")


def silence() -> None:
    """No progress bars and no advice from the libraries."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def measure(row: Row, pairs: int) -> dict:
    """Medians and the range of the ratio over alternating pairs."""

    def once(side: Callable[[], float | None], repeats: int) -> float:
        start = time.perf_counter()
        values = [side() for _ in range(repeats)]
        took = 1000 * (time.perf_counter() - start) / repeats
        return values[0] if isinstance(values[0], float) else took

    once(row.ours, 1), once(row.theirs, 1)  # warm caches and allocators
    start = time.perf_counter()
    once(row.theirs, 1)
    repeats = max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))
    times = []
    for i in range(pairs):
        if i % 2:
            b, a = once(row.theirs, repeats), once(row.ours, repeats)
        else:
            a, b = once(row.ours, repeats), once(row.theirs, repeats)
        times.append((a, b))
    ratios = [a / b for a, b in times]
    a, b = (statistics.median(side) for side in zip(*times, strict=True))
    return {"name": row.name, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "ours": a,
            "theirs": b, "unit": row.unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of both sides and of the processes they start")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    silence()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.manual_seed(0)

    print(f"torch {torch.__version__}, {options.threads} thread(s), {options.pairs} alternating pairs")
    print(f"{'':44} {'ratio':>6} {'range':>13} {'minidiff':>12} {'the other':>12}")
    results = []
    for part in (start_up, networks, pipelines):
        for row in part():
            if not any(text in row.name for text in options.only):
                continue
            r = measure(row, options.pairs)
            print(f"{r['name']:44} {r['ratio']:6.2f} {r['low']:6.2f}-{r['high']:<6.2f} {r['ours']:8.1f} {r['unit']:3} "
                  f"{r['theirs']:8.1f} {r['unit']:3}", flush=True)
            results.append(r)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
