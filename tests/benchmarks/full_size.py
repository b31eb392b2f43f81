"""A full-size Stable Diffusion 1.5 with random weights on the CPU, side by side with diffusers.

    python tests/benchmarks/full_size.py --folder runs/sd15 --threads 2 --pairs 3

Writes the model once (860 M + 84 M + 123 M parameters, float32, as a diffusers folder and as one CompVis file: 8.6 GB),
runs two guided steps at 512×512 in fresh processes of either side, alternating, and prints the medians of: loading; one
step (the second); from the start of the process to the end of the first step; peak memory. Linux, 16 GB.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PROMPT = "a photograph of an astronaut riding a horse"
UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {"block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
       "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4, "sample_size": 512}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
        "projection_dim": 768, "vocab_size": 49408, "hidden_act": "quick_gelu"}
FINISH = """
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"loading": loaded - began, "one step": marks[1] - marks[0], "first": marks[0],
                  "peak memory": int(peak) / 2**20}))
"""
OURS = """
import json, os, sys, time
import torch; torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
import safetensors.torch, tokenizers  # importing is not loading, for neither side
from minidiff.sd.pipeline import StableDiffusion
began = time.time()
pipe = StableDiffusion.from_pretrained(sys.argv[1], device="cpu"%s)
loaded = time.time()
steps = pipe.stream(sys.argv[2], steps=2, sampler="ddim", height=512, width=512)
marks = [time.time() for step in steps if step.x0 is not None]
""" + FINISH
THEIRS = """
import json, os, sys, time
import torch; torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
from diffusers import StableDiffusionPipeline
began = time.time()
pipe = StableDiffusionPipeline.%s
loaded, marks = time.time(), []
pipe.set_progress_bar_config(disable=True)
def note(pipe, i, t, kept): marks.append(time.time()); return kept
pipe(sys.argv[2], num_inference_steps=2, height=512, width=512, output_type="latent", callback_on_step_end=note)
""" + FINISH
FILE = 'from_single_file(sys.argv[1], config=os.path.dirname(sys.argv[1]) + "/folder", local_files_only=True)'
CODES = {"folder": (OURS % "", THEIRS % "from_pretrained(sys.argv[1])"),
         "model.safetensors": (OURS % ', tokenizer=os.path.dirname(sys.argv[1]) + "/folder/tokenizer"', THEIRS % FILE)}


def build(folder: Path) -> None:
    """Write the model in both layouts, by diffusers and transformers, with random weights and mini-sd's vocabulary."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    import minidiff as md

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "data" / "mini-sd" / "tokenizer")
    scheduler = DDIMScheduler.from_pretrained(ROOT / "data" / "mini-sd" / "scheduler")
    StableDiffusionPipeline(AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**TEXT)), tokenizer,
                            UNet2DConditionModel(**UNET), scheduler, None, None, requires_safety_checker=False,
                            ).save_pretrained(folder / "folder")
    md.StableDiffusion.from_pretrained(folder / "folder", device="cpu").save_pretrained(folder / "model.safetensors")


def run(code: str, model: Path) -> dict[str, float]:
    started = time.time()
    done = subprocess.run([sys.executable, "-c", code, str(model), PROMPT], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    result = json.loads(done.stdout.splitlines()[-1])
    first = result.pop("first") - started
    return {**result, "shell to the end of the first step": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model is, or is written to")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--layouts", nargs="+", choices=CODES, default=list(CODES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS=str(options.threads), PYTHONPATH=str(ROOT))
    if not (options.folder / "model.safetensors").is_file():
        build(options.folder)
    results = {}
    for layout in options.layouts:
        ours, theirs = [], []
        for pair in range(options.pairs):
            for i in (pair % 2, 1 - pair % 2):
                (ours, theirs)[i].append(run(CODES[layout][i], options.folder / layout))
        for name in ours[0]:
            a, b = (statistics.median(row[name] for row in rows) for rows in (ours, theirs))
            unit, ratios = "GiB" if "memory" in name else "s", [x[name] / y[name] for x, y in zip(ours, theirs)]
            results[f"{layout}, {name}"] = {"ratio": statistics.median(ratios), "minidiff": a, "diffusers": b}
            print(f"{layout + ', ' + name:52} {statistics.median(ratios):5.2f} {min(ratios):5.2f}-{max(ratios):4.2f} "
                  f"{a:7.2f} {unit:3} {b:7.2f} {unit}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
