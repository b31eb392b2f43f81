"""How fast a model runs here: against what the machine can do, and against diffusers where that is installed."""
from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.device import find_device
from minidiff.io.checkpoint import FAMILIES
from minidiff.io.images import check_sides
from minidiff.measure.anatomy import anatomy
from minidiff.nets.layers import sinusoid
from minidiff.nets.unet import UNet, UNetConfig
from minidiff.nets.vae import VAE
from minidiff.sd import memory
from minidiff.sd.pipeline import StableDiffusion
from minidiff.sd.settings import Settings
from minidiff.values import whole

PROMPT = "a large red house on the left, snow, night, stars"


def bench(model: str | Path = "mini-sd", *, tokenizer: str | Path | None = None, config: str | None = None,
          batch: int = 1, size: int | None = None, steps: int = 25, device: str | None = None, dtype: str = "float32",
          compile: bool = False, pairs: int = 5) -> dict:
    """Measure a guided step of the U-Net and a whole picture.

    Args:
        model: anything `StableDiffusion.from_pretrained` takes, or a family with random weights: sd1, sd2, sdxl, …
        tokenizer, config: of a single file, see there.
        batch: pictures at once; a guided step runs the U-Net on twice as many rows.
        size: side of the pictures in pixels; None: the model's own. steps: of the whole picture.
        dtype: float32, float16 or bfloat16. compile: measure after torch.compile; also of diffusers.
        pairs: how often each side is timed, alternating; medians are returned.

    Returns:
        `device`, `dtype`, `batch`, `size`, `step_seconds`, `steps_per_second`, `tflops` (of a step),
        `matmul_tflops` (what the machine reaches on square matrices), `share` (the one over the other),
        `compile_seconds` (None without), `picture_seconds` (None for random weights), `peak_bytes` without diffusers:
        of a GPU's tensors, or of the whole process (None where nothing says it), and, where diffusers is installed,
        `diffusers_step_seconds` and `ratio` (ours over theirs, and range).

    Raises:
        ValueError: an unknown dtype, numbers out of range, or more than fits into memory.

    >>> result = bench("mini-sd", steps=1, pairs=1)
    >>> result["steps_per_second"] > 0, result["share"] > 0
    (True, True)
    """
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; it should be float32, float16 or bfloat16")
    batch, pairs = (whole(name, n, 1, 10**6) for name, n in (("batch", batch), ("pairs", pairs)))
    Settings(steps=steps)
    device, kind = str(find_device(device)), getattr(torch, dtype)
    random = str(model) in FAMILIES
    if random:
        pipe, unet = None, _random(str(model), device, kind)
        with torch.device("meta"):
            vae = VAE.build(VAE.Config.from_dict(FAMILIES[str(model)]["vae"]))
    else:
        pipe = StableDiffusion.from_pretrained(model, tokenizer=tokenizer, config=config, device=device, dtype=kind)
        unet, vae = pipe.unet, pipe.vae
    factor = vae.factor
    size = max(unet.config.sides) * factor if size is None else size
    check_sides((size, size), factor)
    memory.check(unet, vae, torch.device(device), rows=2 * batch, pictures=batch, sides=(size, size), tile=None,
                 offloaded=False)
    inputs = _inputs(unet.config, 2 * batch, size // factor, device, kind)
    sides, seconds = [lambda: unet(*inputs[:3], vec=inputs[3])], None
    draw = sides[0] if pipe is None else lambda: pipe(PROMPT, steps=steps, num_images=batch, height=size, width=size,
                                                      output="tensor")
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        flops = _flops(unet.config, 2 * batch, size // factor)
        if compile:
            (unet if pipe is None else pipe).compile()
            began = time.perf_counter()
            sides[0]()
            synchronize(device)
            seconds = time.perf_counter() - began
        draw()
        peak = _peak(device)                             # ours: diffusers is not there yet
        if theirs := _diffusers(unet) if importlib.util.find_spec("diffusers") else None:
            torch.testing.assert_close(sides[0](), theirs(*inputs), rtol=0.05, atol=0.05)
            sides.append(lambda: theirs(*inputs))
            if compile:
                theirs.net.compile()
        times = alternate(sides, pairs, device)
        rate = flops / statistics.median(times[0]) / 1e12
        matmul = _matmul(device, kind)
    result = {"model": str(model), "device": _name(device), "dtype": dtype, "batch": batch, "size": size,
              "step_seconds": statistics.median(times[0]), "steps_per_second": 1 / statistics.median(times[0]),
              "tflops": rate, "matmul_tflops": matmul, "share": rate / matmul, "compile_seconds": seconds,
              "picture_seconds": None, "peak_bytes": peak}
    if pipe is not None:
        result["picture_seconds"] = alternate([draw], 1, device)[0][0] / batch
    if theirs is not None:
        ratios = [a / b for a, b in zip(*times)]
        result |= {"diffusers_step_seconds": statistics.median(times[1]),
                   "ratio": [statistics.median(ratios), min(ratios), max(ratios)]}
    return result


def alternate(sides: list[Callable], pairs: int, device: str) -> list[list[float]]:
    """Seconds per call of each function: `pairs` rounds after one to warm up, the side that goes first alternating.

    >>> [len(times) for times in alternate([lambda: None, lambda: None], 3, "cpu")]
    [3, 3]
    """
    for side in sides:
        side()
    times: list[list[float]] = [[] for _ in sides]
    for i in range(pairs):
        for j in range(len(sides)) if i % 2 == 0 else reversed(range(len(sides))):
            synchronize(device)
            began = time.perf_counter()
            sides[j]()
            synchronize(device)
            times[j].append(time.perf_counter() - began)
    return times


def _peak(device: str) -> int | None:
    """Bytes at most in use so far: on a GPU by tensors, on a CPU by the process; None where nothing says it."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() \
        if device.startswith("cpu") and status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    elif str(device).startswith("mps"):
        torch.mps.synchronize()


class _Theirs(nn.Module):
    """diffusers' U-Net with the weights of ours, called alike."""

    def __init__(self, net: nn.Module, pooled: int):
        super().__init__()
        self.net, self.pooled = net, pooled

    def forward(self, x: Tensor, t: Tensor, context: Tensor, vec: Tensor | None) -> Tensor:
        added = None
        if vec is not None:  # ours takes pooled prompt and sizes as one vector, theirs takes them apart
            added = {"text_embeds": vec[:, :self.pooled], "time_ids": torch.zeros(len(x), 6, device=x.device)}
        return self.net(x, t, context, added_cond_kwargs=added, return_dict=False)[0]


def _diffusers(unet: UNet) -> _Theirs:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        net = UNet2DConditionModel.from_config(unet.config.to_dict())
    net.load_state_dict(unet.state_dict(), assign=True)
    return _Theirs(net.eval(), _pooled(unet.config))


def _random(family: str, device: str, dtype: torch.dtype) -> UNet:
    config = UNetConfig.from_dict(FAMILIES[family]["unet"])
    with torch.device(device):
        return UNet(config).to(dtype).eval().requires_grad_(False)


def _inputs(config: UNetConfig, rows: int, side: int, device: str, dtype: torch.dtype) -> tuple:
    """x, t, context, vec of a U-Net call."""
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, config.in_channels, side, side, generator=g), torch.full((rows,), 500.0),
             torch.randn(rows, 77, config.cross_attention_dim, generator=g)]
    vec = None
    if config.addition_embed_type:  # the pooled prompt and the waves of six sizes; those of 0: cosines 1, sines 0
        waves = sinusoid(torch.zeros(6 * rows), config.addition_time_embed_dim).view(rows, -1)
        vec = torch.cat([torch.randn(rows, _pooled(config), generator=g), waves], 1).to(device, dtype)
    x, t, context = parts
    return x.to(device, dtype), t.to(device), context.to(device, dtype), vec


def _pooled(config: UNetConfig) -> int:
    """Width of the pooled prompt in SDXL's vec; 0 for other models."""
    return (config.projection_class_embeddings_input_dim or 0) - 6 * (config.addition_time_embed_dim or 0)


def _flops(config: UNetConfig, rows: int, side: int) -> int:
    """Floating-point operations of a U-Net call."""
    with torch.device("meta"):
        net = UNet(config)
    *inputs, vec = _inputs(config, rows, side, "meta", torch.float32)
    return anatomy(net, *inputs, vec=vec).flops


def _matmul(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of square matrices, the best of five."""
    n = 8192 if str(device).startswith("cuda") else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(alternate([lambda: a @ b], 5, device)[0]) / 1e12


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if str(device).startswith("cuda") else \
        f"{device}, {torch.get_num_threads()} threads"
