"""Stable Diffusion 1.5's U-Net on a GPU, random weights: the same numbers as diffusers, and how fast.

    python tests/benchmarks/gpu.py                  # cuda; --device cpu --family sd1 --size 64 tries the script itself

Parity: the largest difference from diffusers in the same dtype, and from float32, over the spread of the output.
Speed: `minidiff.measure.bench.bench` at batch 1 and 32, eager and compiled, beside diffusers measured the same way.
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff.measure import bench as b  # noqa: E402

TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # of the output's standard deviation


@torch.inference_mode()
def parity(family: str, side: int, device: str) -> bool:
    """Print one line per dtype; whether all are within TOLERANCE."""
    torch.manual_seed(0)
    unet = b._random(family, device, torch.float32)
    inputs = b._inputs(unet.config, 2, side, device, torch.float32)
    exact, good = unet(*inputs[:3], vec=inputs[3]), True
    for name, tolerance in TOLERANCE.items():
        kind = getattr(torch, name)
        unet.to(kind)
        x, t, context, vec = inputs = b._inputs(unet.config, 2, side, device, kind)
        ours, theirs = unet(x, t, context, vec=vec).float(), b._diffusers(unet)(*inputs).float()
        off, rounding = ((other - ours).abs().max() / exact.std() for other in (theirs, exact))
        good &= bool(off <= tolerance)
        print(f"{name:9} from diffusers {off:.1e} (at most {tolerance:g}), from float32 {rounding:.1e}", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--family", default="sd1")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="pictures, two rows each")
    options = parser.parse_args()
    good = parity(options.family, options.size // 8, options.device)
    for batch in options.batches:
        eager, compiled = (b.bench(options.family, batch=batch, size=options.size, device=options.device,
                                   dtype="bfloat16", compile=compile) for compile in (False, True))
        for name, row in (("eager", eager), ("compiled", compiled)):
            print(f"batch {batch:3} {name:9} {row['step_seconds'] * 1e3:9.1f} ms a guided step, {row['tflops']:6.1f} "
                  f"TFLOP/s ({row['share']:.0%} of matmul), diffusers / ours {1 / row['ratio'][0]:.2f}", flush=True)
        print(f"batch {batch:3} compiled over eager {eager['step_seconds'] / compiled['step_seconds']:.2f}, "
              f"compiling took {compiled['compile_seconds']:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
