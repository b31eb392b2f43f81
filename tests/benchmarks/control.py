"""How closely mini-sd with a ControlNet keeps to its hint, picture by picture, over the scale and over the training.

    python tests/benchmarks/control.py -n 200 --threads 1
    python tests/benchmarks/control.py --samples runs/edges/train/controlnet-edges/samples

Hint i is that of drawing i of a seed that no training saw; the prompt is what the drawing shows, and the seed is i. For
"edges" the agreement is `minidiff.data.hints.overlap` of the hint with the edges of the picture; for "masks" the share
of the silhouette's border that has an edge of the picture within one pixel. Scale 0 is the base model with the same
prompts and noises, what chance and the prompt alone bring; `chance` is that of these pictures with their neighbours'
hints. `right` are the shares of the prompt's seven attributes that the reader finds. With --samples: the agreement
of the sheets that a training left, by step, under --name ("curve"). A file that is there is continued. --train
trains the net for edges into a folder, STEPS steps with a sheet every 50, --deaf with torch's own start of what reads
the hint.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff.data import hints, scenes  # noqa: E402
from minidiff.io.images import open_image, to_tensor  # noqa: E402
from minidiff.io.weights import weights_dir  # noqa: E402
from minidiff.measure.evaluate import right  # noqa: E402
from minidiff.nets.controlnet import ControlNet  # noqa: E402
from minidiff.nets.reader import Reader  # noqa: E402
from minidiff.nets.unet import UNet  # noqa: E402
from minidiff.sd.pipeline import StableDiffusion  # noqa: E402
from minidiff.train import recipes  # noqa: E402
from minidiff.train.trainer import Run  # noqa: E402

SCALES, SEED, BATCH, STEPS = (0.0, 0.5, 1.0, 1.5), 31, 20, 600


def agreement(kind: str, hint: Tensor, pictures: Tensor) -> list[float]:
    """Of pictures (B,3,H,W) in [0, 1] with their hints, one number each."""
    drawn = hints.edges(pictures)
    if kind == "edges":
        return hints.overlap(hint, drawn).tolist()
    border = hints.edges(hint)[:, 0] > 0.5
    met = border & (F.max_pool2d(drawn, 3, 1, 1)[:, 0] > 0.5)
    return (met.sum((1, 2)) / border.sum((1, 2)).clamp(min=1)).tolist()


def curve(kind: str, folder: Path) -> dict[str, float]:
    """{step: mean agreement} of the sheets of a training: hints above, pictures below."""
    found = {}
    for file in sorted(folder.glob("*.png")):
        sheet = (to_tensor(open_image(file)) + 1) / 2
        hint, drawn = (torch.cat(row.split(row.shape[2], 3)) for row in sheet.chunk(2, 2))
        found[str(int(file.stem))] = round(sum(agreement(kind, hint.round(), drawn)) / len(hint), 4)
    return found


def first_steps(out: Path, deaf: bool, threads: int) -> None:
    """The recipe controlnet-edges, but short and with many sheets; `deaf`: its Look starts as torch starts layers."""
    usual = ControlNet.from_unet

    def from_unet(unet: UNet, channels: tuple[int, ...]) -> ControlNet:
        net = usual(unet, channels)
        look = net.controlnet_cond_embedding
        for conv in (look.conv_in, *look.blocks) if deaf else ():
            conv.reset_parameters()
        return net

    with patch.object(ControlNet, "from_unet", from_unet), patch.object(recipes, "Run", partial(Run, save_every=0.0)):
        recipes.run("controlnet-edges", out=out, steps=STEPS, threads=threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", choices=hints.HINTS, default=hints.HINTS)
    parser.add_argument("--net", type=Path, help="another ControlNet than the one that ships; with one --kinds")
    parser.add_argument("--samples", type=Path, nargs="*", default=[], help="in the order of --kinds")
    parser.add_argument("--name", default="curve", help="of the --samples")
    parser.add_argument("--out", type=Path, default=ROOT / "data/control.json")
    parser.add_argument("--train", type=Path, metavar="OUT")
    parser.add_argument("--deaf", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.train:
        return first_steps(args.train, args.deaf, args.threads)
    rows = json.loads(args.out.read_text()) if args.out.is_file() else {"n": args.n}
    if rows["n"] != args.n and not args.samples:
        parser.error(f"{args.out} has n = {rows['n']}; name another --out")
    for kind, folder in zip(args.kinds, args.samples):
        rows.setdefault(kind, {})[args.name] = curve(kind, folder)
        print(kind, rows[kind][args.name])
    if args.samples:
        args.out.write_text(json.dumps(rows) + "\n")
        return
    pipe, reader = StableDiffusion.from_pretrained("mini-sd"), Reader.from_pretrained(weights_dir() / "reader")
    pictures, shown = scenes.render(args.n, 128, seed=SEED, second=0.0)
    prompts = [scenes.caption(scene) for scene in shown]
    for kind in args.kinds:
        net = ControlNet.from_pretrained(args.net or weights_dir() / f"controlnet-{kind}")
        told = hints.edges(pictures / 255) if kind == "edges" else hints.silhouettes(torch.arange(args.n), 128, SEED,
                                                                                     second=0.0)
        for scale in SCALES:
            row = rows.setdefault(kind, {})
            if str(scale) in row:
                continue
            agrees, found, others = [], [], []
            for first in range(0, args.n, BATCH):
                part = slice(first, first + BATCH)
                drawn = pipe(prompts[part], seed=first, controlnet=net, control_image=told[part], control_scale=scale,
                             output="tensor")
                agrees += [round(share, 4) for share in agreement(kind, told[part], drawn)]
                others += agreement(kind, told[part].roll(1, 0), drawn)
                found += [sum(each.values()) / len(each) for each in right(reader, shown[part], drawn * 2 - 1)]
            row[str(scale)] = {"agreement": agrees, "right": [round(share, 4) for share in found]}
            if scale == 0:
                row["chance"] = round(sum(others) / args.n, 4)
            args.out.write_text(json.dumps(rows) + "\n")
            print(f"{kind}, scale {scale}: agreement {sum(agrees) / args.n:.3f}, right {sum(found) / args.n:.3f}",
                  flush=True)


if __name__ == "__main__":
    main()
