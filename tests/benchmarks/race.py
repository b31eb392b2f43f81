"""How far each sampler ends from the end of its curve on mini-sd, prompt by prompt, over the number of network calls.

    python tests/benchmarks/race.py --threads 1

Picture i has prompt i of `prompt_set("seen", n)` and seed i; every sampler goes down Karras's levels from the same
noise. An error is the norm of the difference of two latents over the norm of the reference, UniPC with 80 calls;
`2M, 80 calls` is how far DPM-Solver++(2M) with as many ends from it: what the reference can be trusted for.
Heun has half as many steps as calls, and one call less, because its last step is a single one.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff import samplers  # noqa: E402
from minidiff.data import scenes  # noqa: E402
from minidiff.measure.evaluate import prompt_set  # noqa: E402
from minidiff.sd.pipeline import StableDiffusion  # noqa: E402
from minidiff.sd.scheduler import preset  # noqa: E402

SHELF = {"Euler": samplers.euler, "Heun": samplers.heun, "LMS": samplers.lms,
         "DPM-Solver++(2M)": samplers.dpmpp_2m, "UniPC": samplers.unipc}
BUDGETS = {3.0: (4, 6, 8, 12, 20), 7.5: (12, 25)}  # guidance scale -> calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=24, help="prompts")
    parser.add_argument("--out", type=Path, default=ROOT / "data/race.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = StableDiffusion.from_pretrained("mini-sd")
    prompts = [scenes.caption(scene) for scene in prompt_set("seen", args.n)]
    rows: dict = {"n": args.n}

    def latents(name: str, calls: int, scale: float) -> Tensor:
        grid = preset("sd-euler-karras", calls // 2 if name == "Heun" else calls)
        return pipe(prompts, seed=0, guidance_scale=scale, output="latent", sampler=(SHELF[name], grid)).flatten(1)

    for scale, budgets in BUDGETS.items():
        reference = latents("UniPC", 80, scale)

        def errors(name: str, calls: int, scale: float = scale, reference: Tensor = reference) -> list[float]:
            miss = (latents(name, calls, scale) - reference).norm(dim=1) / reference.norm(dim=1)
            return [round(e, 4) for e in miss.tolist()]

        rows[f"{scale:g}"] = row = {"2M, 80 calls": errors("DPM-Solver++(2M)", 80)}
        for name in SHELF:
            row[name] = {str(calls): errors(name, calls) for calls in budgets}
            print(scale, name, {calls: torch.tensor(e).median().item() for calls, e in row[name].items()}, flush=True)
    args.out.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
