"""DiT against U-Net at the same budget: the same flow-matching recipe, data, batches and steps.

    python tests/benchmarks/dit.py --train runs/flow-unet      trains mini-sd's U-Net as the recipe `dit` trains the DiT
    python tests/benchmarks/dit.py --unet runs/flow-unet       measures both, writes data/dit.json
    python tests/benchmarks/dit.py --unet runs/flow-unet --sheet data/gallery/dit.png     both, from the same noises
    python tests/benchmarks/dit.py --speed                     adds pictures per second, in alternating runs

Both read the prompt with mini-sd's frozen text encoder and are drawn by 25 steps of Euler with the guidance that suits
them best of SCALES, chosen on other prompts than are measured. The prompts are those of `minidiff.measure.evaluate`.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff.data import scenes  # noqa: E402
from minidiff.io.images import contact_sheet, save_image, to_pil, to_unit  # noqa: E402
from minidiff.io.weights import weights_dir  # noqa: E402
from minidiff.io.write import write_atomic  # noqa: E402
from minidiff.measure import metrics  # noqa: E402
from minidiff.measure.evaluate import BATCH, FRESH, _pairs_right, prompt_set, right, share  # noqa: E402
from minidiff.nets.dit import DiT  # noqa: E402
from minidiff.nets.reader import Reader  # noqa: E402
from minidiff.nets.unet import UNet  # noqa: E402
from minidiff.sd.pipeline import StableDiffusion  # noqa: E402
from minidiff.train.recipes import BATCHES, STEPS  # noqa: E402
from minidiff.train.recipes.begin import seeded  # noqa: E402
from minidiff.train.recipes.flow import drawn, flow  # noqa: E402
from minidiff.train.trainer import Run  # noqa: E402

OUT, SCALES, CHOSEN_ON = ROOT / "data" / "dit.json", (2.0, 4.0, 7.5), 100
DISTANCES = ("frechet", "recall", "precision", "kernel_distance")


def train(out: Path, threads: int, resume: bool) -> None:
    """The U-Net, with what the recipe gives the DiT."""
    made = {"drawings": 40_000, "batch": BATCHES["dit"]}
    run = Run(out, STEPS["dit"], threads=threads, batch=BATCHES["dit"], resume=resume, made=made)
    net = flow("unet", lambda pipe, *_: seeded(lambda: UNet.build(pipe.unet.config), run.seed), run, 128, None,
               weights_dir() / "mini-sd")
    net.save_pretrained(out, dtype=torch.float16)


def pictures(net: nn.Module, pipe: StableDiffusion, asked: list[scenes.Scene], scale: float) -> Tensor:
    """(n,3,128,128) in [−1, 1]; picture i has seed i."""
    found = []
    for first in range(0, len(asked), BATCH):
        part = asked[first:first + BATCH]
        z = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(first + i))
                       for i in range(len(part))])
        latents = drawn(net, pipe, [scenes.caption(scene) for scene in part], z, scale=scale)
        found.append(to_unit(pipe.decode(latents)) * 2 - 1)
    return torch.cat(found)


def read(reader: Reader, asked: list[scenes.Scene], image: Tensor, of=right) -> list[dict[str, bool]]:
    return [row for first in range(0, len(asked), BATCH)
            for row in of(reader, asked[first:first + BATCH], image[first:first + BATCH])]


def measure(net: nn.Module, pipe: StableDiffusion, reader: Reader, real: Tensor, n: int) -> dict:
    """What `evaluate` says of a model, and the distances to as many drawings."""
    others = prompt_set("seen", n + CHOSEN_ON)[n:]
    tried = {scale: sum(map(all, (row.values() for row in read(reader, others, pictures(net, pipe, others, scale)))))
             for scale in SCALES}
    scale = max(tried, key=tried.get)
    images = {name: pictures(net, pipe, prompt_set(name, n), scale) for name in ("seen", "unseen", "two")}
    seen, unseen = (read(reader, prompt_set(name, n), images[name]) for name in ("seen", "unseen"))
    features = torch.cat([reader.features(part) for part in images["seen"].split(BATCH)])
    found = {"scale": scale, "attributes": share([value for row in seen for value in row.values()]),
             "all": share([all(row.values()) for row in seen]),
             "unseen": share([row["color"] and row["object"] for row in unseen]),
             "two": share([all(row.values()) for row in
                           read(reader, prompt_set("two", n), images["two"], _pairs_right)])}
    for name in DISTANCES:
        low, high = metrics.bootstrap(metrics.MEASURES[name], real, features, n=50)
        found[name] = {key: round(value, 4) for key, value in
                       (("value", metrics.MEASURES[name](real, features)), ("low", low), ("high", high))}
    return found


def sheet(nets: dict[str, nn.Module], pipe: StableDiffusion, scales: dict[str, float], file: Path) -> None:
    """Eight random prompts and four of two objects in rows of twelve, the DiT's above, the U-Net's below."""
    asked = [*prompt_set("seen", 8), *prompt_set("two", 4)]
    images = [to_pil(to_unit(pictures(net, pipe, asked, scales[name]))) for name, net in nets.items()]
    save_image(contact_sheet(sum(images, []), columns=12, scale=1), file)


def speeds(nets: dict[str, nn.Module], pairs: int = 7) -> dict[str, dict]:
    """Pictures per second of a training step of 64 and of 25 guided steps of one picture; medians, alternating."""
    x, context, t = torch.randn(64, 4, 16, 16), torch.randn(64, 77, 128), 1000 * torch.rand(64)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(pairs):
        for name, net in nets.items():
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
                loss = net(x, t, context).float().square().mean()
            loss.backward()
            times.setdefault((name, "train_pictures_per_second"), []).append(64 / (time.perf_counter() - began))
            began = time.perf_counter()
            with torch.inference_mode():
                for _ in range(25):
                    net(x[:2], 500.0, context[:2])
            times.setdefault((name, "draw_seconds"), []).append(time.perf_counter() - began)
    rows: dict[str, dict] = {name: {} for name in nets}
    for (name, what), row in times.items():
        rows[name][what] = {"median": round(statistics.median(row), 3), "low": round(min(row), 3),
                            "high": round(max(row), 3)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--unet", type=Path)
    parser.add_argument("--only", choices=("dit", "unet"), help="measure this one alone")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.train:
        return train(args.train, args.threads, args.resume)
    result = json.loads(args.out.read_text()) if args.out.is_file() else {"n": args.n, "steps": STEPS["dit"]}
    pipe = StableDiffusion.from_pretrained("mini-sd", device="cpu")
    nets = {"dit": DiT.from_pretrained(weights_dir() / "dit"), "unet": pipe.unet}
    if args.speed:
        for name, row in speeds(nets).items():
            result.setdefault(name, {}).update(row)
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
        return None
    if args.sheet:
        nets["unet"] = UNet.from_pretrained(args.unet)
        sheet(nets, pipe, {name: result[name]["scale"] for name in nets}, args.sheet)
        return None
    logs = {"dit": weights_dir() / "logs/dit.jsonl", "unet": (args.unet or Path()) / "logs/unet.jsonl"}
    if args.only:
        nets = {args.only: nets[args.only]}
    if "unet" in nets:
        nets["unet"] = UNet.from_pretrained(args.unet)
    reader = Reader.from_pretrained(weights_dir() / "reader")
    drawings = scenes.render(args.n, 128, seed=FRESH, second=0.0)[0]
    real = torch.cat([reader.features(part.float() / 127.5 - 1) for part in drawings.split(BATCH)])
    for name, net in nets.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.zeros(1, 4, 16, 16), 5.0, torch.zeros(1, 77, 128))
        lines = [json.loads(line) for line in logs[name].read_text().splitlines()]
        result.setdefault(name, {}).update({
            "parameters": sum(p.numel() for p in net.parameters()), "gflop": round(counter.get_total_flops() / 1e9, 3),
            "curve": {str(line["step"]): line["loss"] for line in lines},
            **measure(net, pipe, reader, real, args.n)})
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
