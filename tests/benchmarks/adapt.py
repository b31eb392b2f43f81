"""A new thing for mini-sd in five ways, a style, and what each costs: notebook 18's stored measurements.

    python tests/benchmarks/adapt.py --runs runs/adapt --style runs/watercolour --threads 1

The thing: 24 drawings of cats (`minidiff.data.few`), STEPS steps each of textual inversion, LoRA and full fine-tuning
of the U-Net, the last two also with prior preservation; trainings that --runs has are not repeated. Measured on N
prompts with a cat: `cat`, the share that a small classifier (cat or not, trained here on drawings) takes for one, and
`right`, the mean share of the other six attributes that the reader finds. On N ordinary prompts: `unrelated`, the share
of pictures with all seven attributes right; `intruders`, the share taken for cats; `moved`, the median distance of the
latent from the unchanged model's with the same noise, over the latter's norm (`another seed`: of its pictures of two
noises). --style: another LoRA, at three scales:
`style`, the share that a classifier (watercolour or not) takes for one; `right`, the share of attributes that the
reader finds, and `read`, the same by a copy of the reader that has learned to read watercolours too (4,000 drawings);
beside them those numbers for drawings. `spectrum`: of the full fine-tune's change of each matrix, the share of its
squares in the r largest singular values. Memory: peak of a process that makes three steps beyond that of one that only
loads the model, and what hooks count; of Stable Diffusion 1.5 the count on the meta device. A file that is there is
continued.
"""

import argparse
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidiff.data import few, scenes  # noqa: E402
from minidiff.io.images import to_tensor  # noqa: E402
from minidiff.io.weights import load_state, save_state, weights_dir  # noqa: E402
from minidiff.measure.evaluate import right, share  # noqa: E402
from minidiff.nets.low_rank import adapt as with_loras  # noqa: E402
from minidiff.nets.reader import SCENE, THING, Reader  # noqa: E402
from minidiff.nets.unet import UNet  # noqa: E402
from minidiff.sd.pipeline import StableDiffusion  # noqa: E402
from minidiff.train import losses, recipes  # noqa: E402
from minidiff.train.recipes import adapt  # noqa: E402
from minidiff.train.recipes.judges import slots  # noqa: E402
from minidiff.train.trainer import Run, train  # noqa: E402

STEPS, N, BATCH, SEED = 1_000, 100, 20, 77
WAYS = ("inversion", "lora", "lora, prior", "full", "full, prior")
SCALES = (0.0, 0.5, 1.0)
RANKS = (1, 2, 4, 8, 16, 32)
INIT = weights_dir() / "mini-sd"


def trained(way: str, runs: Path, threads: int) -> Path:
    """The folder of a training, made if it is not there."""
    out = runs / way.replace(", ", "-")
    if list(out.glob("*.safetensors")):
        return out
    options = {"out": out, "data": "cat", "steps": STEPS, "threads": threads, "resume": (out / "logs").is_dir()}
    if way == "inversion":
        recipes.run(way, word="cat", **options)
    elif way.startswith("lora"):
        recipes.run("lora", **options, **{"prior": "scenes"} if "prior" in way else {})
    else:
        run = Run(out, STEPS, threads=threads, batch=8)
        pipe, cats, run = adapt.begin(run, 128, few.write("cat", out / "train" / "cat"), INIT)
        kept = adapt.own_pictures(pipe, "scenes", run) if "prior" in way else None
        net = train("full", pipe.unet.requires_grad_(True), adapt.lessons(pipe, cats, kept, run), run, batch=8, lr=1e-4,
                    ema=0.99)
        save_state({key: tensor.half() for key, tensor in net.state_dict().items()}, out / "unet.safetensors")
    return out


def adapted(way: str, folder: Path) -> StableDiffusion:
    pipe = StableDiffusion.from_pretrained("mini-sd", device="cpu")
    if way == "inversion":
        pipe.load_textual_inversion(folder)
    elif way.startswith("lora"):
        pipe.load_lora(folder)
    elif way != "base":
        pipe.unet.load_state_dict(load_state(folder / "unet.safetensors"))
    return pipe


def judge(name: str, runs: Path) -> nn.Module:
    """A small network that tells drawings of one of the small sets from scenes: (B,3,H,W) in [-1, 1] -> (B,)."""
    net = nn.Sequential(*[layer for i, o in ((3, 24), (24, 48), (48, 64), (64, 96)) for layer in
                          (nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(8, o), nn.SiLU())],
                        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(384, 1), nn.Flatten(0))
    file = runs / f"{name}-or-not.safetensors"
    if file.is_file():
        net.load_state_dict(load_state(file))
        return net.eval()
    vae = StableDiffusion.from_pretrained("mini-sd", device="cpu").vae
    pictures, truth = examples(name, 1_500, seed=1)
    with torch.no_grad():
        seen = torch.cat([small(part) for part in pictures.split(100)])
        coded = torch.cat([small(vae.decode(vae.encode(part))) for part in pictures.split(50)])
    optimizer, g = torch.optim.AdamW(net.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    for step in range(600):
        rows = torch.randint(len(seen), (64,), generator=g)
        x = torch.where(torch.rand(64, 1, 1, 1, generator=g) < 0.5, seen[rows], coded[rows])
        x = x + 0.1 * torch.rand(64, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)
        F.binary_cross_entropy_with_logits(net(x), truth[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 600)
    save_state(net.state_dict(), file)
    return net.eval()


def reader_of_watercolours(runs: Path) -> Reader:
    """The reader, gone on with 4,000 watercolours, half of them as the VAE gives them back, and with plain scenes."""
    net, file = Reader.from_pretrained(weights_dir() / "reader"), runs / "reader-of-watercolours.safetensors"
    if file.is_file():
        net.load_state_dict(load_state(file))
        return net.eval()
    vae, seen, truth = StableDiffusion.from_pretrained("mini-sd", device="cpu").vae, [], []
    for first in range(0, 4_000, 50):
        pictures, shown = scenes.render(50, 128, seed=1_700_000, first=first, held_out=None, second=0.0)
        painted = torch.stack([few.watercolour(picture / 255, first + i) for i, picture in enumerate(pictures)]) * 2 - 1
        if first % 100:
            with torch.no_grad():
                painted = vae.decode(vae.encode(painted)).clamp(-1, 1)
        seen += [F.interpolate(part, (32, 32), mode="bilinear", antialias=True) for part in
                 (painted, pictures / 127.5 - 1)]
        truth += [slots(scene) for scene in shown] * 2
    pictures, told = torch.cat(seen), {name: torch.tensor([row[name] for row in truth]) for name in (*SCENE, *THING)}
    optimizer, g = torch.optim.AdamW(net.train().parameters(), lr=1e-3), torch.Generator().manual_seed(0)
    for step in range(1_000):
        rows = torch.randint(len(pictures), (64,), generator=g)
        noise = 0.1 * torch.rand(64, 1, 1, 1, generator=g) * torch.randn(64, 3, 32, 32, generator=g)
        reading = net(pictures[rows] + noise)
        logits = {**reading.scene, **{name: part.flatten(0, 1) for name, part in reading.thing.items()}}
        sum(F.cross_entropy(logits[name], told[name][rows].flatten(), ignore_index=-1) for name in logits).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 1_000)
    save_state(net.state_dict(), file)
    return net.eval()


def examples(name: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n drawings of a set and n scenes, (2n,3,128,128) in [-1, 1], and 1 or 0 for each."""
    pictures = to_tensor([picture for picture, _ in few.SETS[name](n, seed=seed)])
    others, _ = scenes.render(n, 128, seed=900 + seed)
    return torch.cat([pictures, others / 127.5 - 1]), torch.arange(2 * n).lt(n).float()


def small(pictures: Tensor) -> Tensor:
    return F.interpolate(pictures, (64, 64), mode="bilinear", antialias=True)


@torch.no_grad()
def taken(net: nn.Module, pictures: Tensor) -> list[bool]:
    return (net(small(pictures)) > 0).tolist()


def drawn(pipe: StableDiffusion, prompts: list[str], seed: int) -> tuple[Tensor, Tensor]:
    """Latents, and pictures in [-1, 1]."""
    latents = torch.cat([pipe(prompts[i:i + BATCH], seed=seed + i, output="latent")
                         for i in range(0, len(prompts), BATCH)])
    with torch.no_grad():
        return latents, torch.cat([pipe.vae.decode(part) for part in latents.split(BATCH)]).clamp(-1, 1)


def thing(rows: dict, runs: Path, out: Path, threads: int) -> None:
    reader, net = Reader.from_pretrained(weights_dir() / "reader"), judge("cat", runs)
    pictures, truth = examples("cat", 200, seed=2)
    rows["cat or not"] = share([found == bool(label) for found, label in zip(taken(net, pictures), truth)])
    shown = [scenes.sample(random.Random(f"prompt {SEED} {i}"), second=0.0) for i in range(N)]
    plain = [scenes.caption(scene) for scene in shown]
    before, _ = drawn(adapted("base", runs), plain, SEED)
    if "another seed" not in rows:
        latents, _ = drawn(adapted("base", runs), plain, SEED + 1_000)
        rows["another seed"] = quartiles(distances(latents, before))
        keep(rows, out)
    for way in ("base", *WAYS):
        if way in rows:
            continue
        folder = runs if way == "base" else trained(way, runs, threads)
        pipe = adapted(way, folder)
        word = "<cat>" if way == "inversion" else "cat"
        cats = [scene._replace(object="cat") for scene in shown]
        _, made = drawn(pipe, [scenes.caption(scene).replace("cat", word) for scene in cats], SEED)
        found = right(reader, shown, made)
        others = [statistics.mean(ok for name, ok in row.items() if name != "object") for row in found]
        latents, usual = drawn(pipe, plain, SEED)
        rows[way] = {"cat": share(taken(net, made)), "right": round(statistics.mean(others), 4),
                     "each": {name: share([row[name] for row in found]) for name in found[0] if name != "object"},
                     "unrelated": share([all(row.values()) for row in right(reader, shown, usual)]),
                     "intruders": share(taken(net, usual)),
                     "moved": quartiles(distances(latents, before)),
                     "file": max((file.stat().st_size for file in folder.glob("*.safetensors")), default=0)
                     if way != "base" else 0}
        keep(rows, out)
        print(way, {key: value["value"] if isinstance(value, dict) and "value" in value else value
                    for key, value in rows[way].items() if key != "each"}, flush=True)


def distances(latents: Tensor, before: Tensor) -> list[float]:
    return ((latents - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)).tolist()


def quartiles(values: list[float]) -> list[float]:
    """Median, and between which the middle half lies."""
    return [round(q, 4) for q in torch.tensor(values).quantile(torch.tensor([0.5, 0.25, 0.75])).tolist()]


def style(rows: dict, runs: Path, folder: Path, out: Path) -> None:
    reader, net = Reader.from_pretrained(weights_dir() / "reader"), judge("watercolour", runs)
    taught = reader_of_watercolours(runs)
    pictures, truth = examples("watercolour", 200, seed=2)
    rows["watercolour or not"] = share([found == bool(label) for found, label in zip(taken(net, pictures), truth)])
    shown = [scenes.sample(random.Random(f"style {SEED} {i}"), second=0.0) for i in range(N)]
    plain = [scenes.caption(scene) for scene in shown]
    rows["style"] = {}
    for scale in SCALES:
        pipe = StableDiffusion.from_pretrained("mini-sd", device="cpu")
        pipe.load_lora(folder, scale)
        _, made = drawn(pipe, plain, SEED)
        rows["style"][str(scale)] = judged(reader, taught, net, shown, made)
        print("style", scale, {key: value["value"] for key, value in rows["style"][str(scale)].items()
                               if "value" in value}, flush=True)
    painted = torch.stack([few.watercolour(picture / 255, i) for i, picture in enumerate(
        to_tensor([scenes.draw(scene, 128, random.Random(f"{SEED} {i}"))[0] for i, scene in enumerate(shown)])
        .add(1).mul(127.5))]) * 2 - 1
    rows["style"]["drawings"] = judged(reader, taught, net, shown, painted)
    keep(rows, out)


def judged(reader: Reader, taught: Reader, net: nn.Module, shown: list, pictures: Tensor) -> dict:
    found = right(reader, shown, pictures)
    return {"style": share(taken(net, pictures)), "all": share([all(row.values()) for row in found]),
            "right": share([ok for row in found for ok in row.values()]),
            "read": share([ok for row in right(taught, shown, pictures) for ok in row.values()]),
            "each": {name: share([row[name] for row in found]) for name in found[0]}}


def spectrum(rows: dict, runs: Path, out: Path) -> None:
    """Of the change of every weight of the full fine-tune that a LoRA of the recipe would change."""
    net, shares, kept = UNet.from_pretrained(INIT / "unet"), {}, {}
    after = load_state(runs / "full" / "unet.safetensors")
    for name, weight in net.state_dict().items():
        if name.endswith(".weight") and re.fullmatch(adapt.LAYERS, name.removesuffix(".weight")):
            values = torch.linalg.svdvals((after[name].float() - weight.float()).flatten(1)).square()
            shares[name] = [round((values[:rank].sum() / values.sum()).item(), 4) for rank in RANKS]
            kept[name] = [round(value, 6) for value in (values / values.sum()).sqrt().tolist()]
    middle = {str(rank): quartiles([row[k] for row in shares.values()]) for k, rank in enumerate(RANKS)}
    some = [name for name in kept if name.endswith(("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
                                                    "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.weight",
                                                    "down_blocks.1.resnets.0.conv2.weight"))]
    rows["spectrum"] = {"layers": len(shares), "share": middle, "values": {name: kept[name][:64] for name in some}}
    keep(rows, out)
    print("spectrum", middle, flush=True)


MEMORY = {"full": {}, "full, checkpointing": {"again": True}, "full, in 4 parts": {"parts": 4}, "lora": {"rank": 8},
          "lora, checkpointing": {"rank": 8, "again": True}, "inversion": {"words": 2},
          "full, prior": {"prior": True}, "lora, prior": {"rank": 8, "prior": True}}


def prepared(unet: UNet, rank: int | None, again: bool, words: int | None, width: int) -> tuple[list, Tensor | None]:
    """What learns of a U-Net, and the vectors of an inversion."""
    unet.requires_grad_(False)
    if again:
        unet.checkpointing()
    if words:
        vectors = torch.zeros(words, width, requires_grad=True, device=unet.conv_in.weight.device)
        return [vectors], vectors
    if rank:
        loras = with_loras(unet, adapt.LAYERS, rank=rank)
        return [p for each in loras.values() for p in each.parameters() if p.requires_grad], None
    return [*unet.requires_grad_(True).parameters()], None


def probe(way: str) -> None:
    """In a process of its own: three steps; prints seconds of the last one, the peak before and after, in bytes."""
    torch.set_num_threads(1)
    options = {"rank": None, "again": False, "words": None, "parts": 1, "prior": False} | MEMORY[way]
    pipe = StableDiffusion.from_pretrained("mini-sd", device="cpu")
    parts, prior = options.pop("parts"), options.pop("prior")
    learned, vectors = prepared(pipe.unet, width=128, **options)
    optimizer = torch.optim.AdamW(learned, lr=1e-6)
    g = torch.Generator().manual_seed(0)
    z, context = torch.randn(8, 4, 16, 16, generator=g), torch.randn(8, 77, 128, generator=g)
    before, times = peak(), []
    for _ in range(3):
        begun = time.perf_counter()
        for rows in torch.arange(8).chunk(parts):
            told = context[rows] if vectors is None else context[rows] + F.pad(vectors, (0, 0, 0, 77 - len(vectors)))
            loss = sum(losses.diffusion(pipe.unet, pipe.kind, pipe.schedule, x0, 100 * rows, z[rows].sin(),
                                        context=told).mean() for x0 in [z[rows], z[rows].cos()][:1 + prior])
            (loss / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
    print(json.dumps({"before": before, "after": peak(), "seconds": min(times),
                      "parameters": sum(p.numel() for p in learned)}))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def counted(config, way: str, side: int, batch: int) -> dict[str, int]:
    """On the meta device: bytes of weights, of gradients and Adam's two means of what learns, and of the maps that are
    kept for the backward pass, all in float32.
    """
    options = {"rank": None, "again": False, "words": None, "parts": 1, "prior": False} | MEMORY[way]
    batch = max(1, batch // options.pop("parts")) * (1 + options.pop("prior"))
    with torch.device("meta"):
        unet = UNet(config)
        learned, vectors = prepared(unet, width=config.cross_attention_dim, **options)
        own = {id(p.untyped_storage()) for p in unet.parameters()}
        kept: dict[int, Tensor] = {}

        def note(x: Tensor) -> Tensor:
            if not isinstance(x, nn.Parameter):
                kept[id(x.untyped_storage())] = x
            return x

        context = torch.zeros(batch, 77, config.cross_attention_dim)
        if vectors is not None:
            context = context + F.pad(vectors, (0, 0, 0, 77 - len(vectors)))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            unet(torch.zeros(batch, config.in_channels, side, side), 10.0, context)
    maps = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)
    n = sum(p.numel() for p in learned)
    return {"parameters": n, "weights": 4 * sum(p.numel() for p in unet.parameters()), "learning": 12 * n, "maps": maps}


def memory(rows: dict, out: Path) -> None:
    base, sd1 = UNet.from_pretrained(INIT / "unet").config, UNet.Config(cross_attention_dim=768)
    rows["memory"] = {}
    for way in MEMORY:
        said = subprocess.run([sys.executable, __file__, "--probe", way], capture_output=True, text=True, check=True)
        rows["memory"][way] = json.loads(said.stdout) | {"counted": counted(base, way, 16, 8),
                                                         "sd1": counted(sd1, way, 64, 1)}
        print(way, rows["memory"][way], flush=True)
    keep(rows, out)


def keep(rows: dict, out: Path) -> None:
    out.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/adapt"))
    parser.add_argument("--style", type=Path, help="folder of the style's LoRA")
    parser.add_argument("--out", type=Path, default=ROOT / "data/adapt.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train", nargs="*", choices=WAYS, help="only train these")
    parser.add_argument("--probe", choices=MEMORY, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.probe:
        return probe(args.probe)
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.train:
        return [trained(way, args.runs, args.threads) for way in args.train] and None
    rows = json.loads(args.out.read_text()) if args.out.is_file() else {"n": N, "steps": STEPS}
    if "memory" not in rows:                # first: a process begins with the peak of the one that started it
        memory(rows, args.out)
    if args.style and "style" not in rows:
        style(rows, args.runs, args.style, args.out)
    thing(rows, args.runs, args.out, args.threads)
    if "spectrum" not in rows:
        spectrum(rows, args.runs, args.out)


if __name__ == "__main__":
    main()
