"""What is learned from a finished model: to draw in few steps (Luo et al. 2023, arXiv 2310.04378 and 2311.05556)."""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.guidance import cfg
from minidiff.io.lora import save_lora
from minidiff.nets.low_rank import adapt
from minidiff.nets.unet import UNet
from minidiff.sd.pipeline import StableDiffusion
from minidiff.train import losses
from minidiff.train.pictures import latents, sheet
from minidiff.train.recipes.adapt import LAYERS, frozen
from minidiff.train.recipes.begin import fitted, seeded
from minidiff.train.recipes.mini_sd import PROMPTS
from minidiff.train.trainer import Run, batch_indices, generator, train
from minidiff.values import whole

LEVELS = 50               # of the teacher's solver, LCMScheduler's original_inference_steps
SCALES = (2.0, 12.0)      # of guidance, between which the net learns to be told
SCALE = 7.5               # that of a LoRA, which is told none
WIDTH = 64                # of the embedding of the scale


def lcm(run: Run, *, size: int = 128, data: Path | None = None, init: Path, rank: int | None = None) -> None:
    """Latent consistency model of mini-sd, or of the model in --init, that draws in 1 to 8 steps, without guidance.

    The guidance of the teacher is learned: the net is told its scale, and writes a whole model. With a rank it is a
    LoRA of the model instead, for the one scale 7.5, to draw with at guidance 1.

    Args:
        rank: of the LoRA; None: no LoRA, all of the net learns.

    Raises:
        ValueError: a rank below 1.
    """
    if rank is not None:
        rank = whole("rank", rank, 1, 2**12, f"rank is {rank}; a LoRA has a rank of at least 1")
    means, stds, ids = latents(run, size, data, init)
    run, pipe = fitted(run, len(means)), frozen(run, init)
    teacher, encoder, device = pipe.unet, pipe.text.encoders[0], pipe.device
    with torch.no_grad():
        nothing, _ = pipe.text([""])
    skip = pipe.schedule.T // LEVELS
    scheduler = {**pipe.scheduler, "_class_name": "LCMScheduler", "original_inference_steps": LEVELS}
    whole_net = rank is None
    if whole_net:
        net = nets = told(teacher, run.seed)
    else:
        net = copy.deepcopy(teacher)
        loras = seeded(lambda: adapt(net, LAYERS, rank=rank), run.seed)
        nets = nn.ModuleList(loras.values())

    def loss(nets: nn.Module, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(means), run.batch, step, run.seed)[share]
        g = generator(run.seed, step, share.start)
        z0 = means[rows].float()
        z0 = z0 + stds[rows].float() * torch.randn(z0.shape, generator=g)
        chosen = ids[rows, torch.randint(ids.shape[1], rows.shape, generator=g)]
        t = skip * torch.randint(1, LEVELS + 1, rows.shape, generator=g) - 1
        eps = torch.randn(z0.shape, generator=g)
        scale = torch.empty(len(rows)).uniform_(*(SCALES if whole_net else (SCALE, SCALE)), generator=g).to(device)
        with torch.no_grad():
            context, _ = encoder(chosen.long().to(device))
        student = partial(net, context=context, w=scale - 1 if whole_net else None)
        guided = cfg(twice(teacher), {"context": context}, {"context": nothing.expand_as(context)},
                     scale.view(-1, 1, 1, 1))
        each = losses.lcm(student, guided, pipe.kind, pipe.schedule, z0.to(device), t.to(device), eps.to(device),
                          skip=skip)
        return {"loss": each.mean()}

    def sample(nets: nn.Module):
        drawn = StableDiffusion(pipe.text, nets if whole_net else copy.deepcopy(teacher), pipe.vae, scheduler)
        if not whole_net:
            drawn.loras.add(changes(nets))
        return sheet(torch.cat([drawn(PROMPTS, steps=steps, output="tensor") for steps in (1, 4)]) * 2 - 1, 16)

    def changes(nets: nn.ModuleList) -> dict:
        return {f"unet.{name}": each.change() for name, each in zip(loras, nets, strict=True)}

    average = train("lcm", nets, loss, run, batch=run.batch, lr=2e-4 if whole_net else 1e-3, ema=0.998, sample=sample)
    if whole_net:
        StableDiffusion(pipe.text, average, pipe.vae, scheduler).save_pretrained(run.out, dtype=torch.float16)
    else:
        save_lora(changes(average), run.out / "pytorch_lora_weights.safetensors", dtype=torch.float16)


def told(teacher: UNet, seed: int) -> UNet:
    """A copy of a U-Net that can be told a scale of guidance, and at first does not heed it."""
    config = replace(teacher.config, time_cond_proj_dim=WIDTH)
    net = seeded(lambda: UNet.build(config), seed)
    nn.init.zeros_(net.time_embedding.cond_proj.weight)
    net.load_state_dict(teacher.state_dict(), strict=False)
    return net


def twice(net: Callable) -> Callable:
    """The net for a batch that is two times as long as its times (B,), as that of `guidance.cfg` is."""
    return lambda x, t, **cond: net(x, t.repeat(len(x) // len(t)), **cond)
