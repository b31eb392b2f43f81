"""How far each sampler's picture is from the finished one, over the steps: mini-sd, 16 prompts.

    python tests/benchmarks/convergence.py --out data/convergence.json --threads 1

The finished picture: 60 steps of Heun, 119 calls of the U-Net for each of the two rows of guidance. Prompt i of the
fixed list and its own noise are the same for all. For each sampler and number of steps: the calls, and the mean
difference of a pixel, in [0, 1], of each prompt's picture from the finished one; median and 95 % bootstrap interval.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff import StableDiffusion  # noqa: E402
from minidiff.data import scenes  # noqa: E402
from minidiff.measure import metrics  # noqa: E402
from minidiff.measure.evaluate import prompt_set  # noqa: E402

SAMPLERS, STEPS, REFERENCE = ("ddim", "euler", "heun", "lms", "plms", "dpmpp_2m", "unipc"), (8, 12, 25, 50), 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=16, help="prompts")
    parser.add_argument("--out", type=Path, default=ROOT / "data/convergence.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = StableDiffusion.from_pretrained("mini-sd", device="cpu")
    prompts = [scenes.caption(scene) for scene in prompt_set("seen", args.n)]
    forward, calls = pipe.unet.forward, []

    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    def drawn(sampler: str, steps: int) -> torch.Tensor:
        calls.clear()
        return pipe(prompts, sampler=sampler, steps=steps, seed=0, output="tensor")

    pipe.unet.forward = counted
    fine = drawn("heun", REFERENCE)
    rows = {"n": args.n, "reference": {"sampler": "heun", "steps": REFERENCE, "calls": len(calls)}}
    for sampler in SAMPLERS:
        for steps in STEPS:
            far = (drawn(sampler, steps) - fine).abs().mean((1, 2, 3))
            low, high = metrics.bootstrap(lambda x: x.median().item(), far, n=1000)
            row = {"calls": len(calls), "value": far.median().item(), "low": low, "high": high}
            rows.setdefault(sampler, {})[steps] = {name: round(value, 4) for name, value in row.items()}
            print(sampler, steps, rows[sampler][steps], flush=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
