"""Flow matching on latents, by a transformer or by any other net (Lipman et al. 2023, arXiv 2210.02747)."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.grid import Grid
from minidiff.guidance import cfg
from minidiff.nets.dit import DiT, DiTConfig
from minidiff.prediction import denoiser
from minidiff.samplers import euler
from minidiff.schedule import Flow, Level
from minidiff.sd.pipeline import StableDiffusion
from minidiff.train import losses, times
from minidiff.train.pictures import latents, sheet
from minidiff.train.recipes.adapt import frozen
from minidiff.train.recipes.begin import fitted, start
from minidiff.train.recipes.mini_sd import PROMPTS
from minidiff.train.trainer import Run, batch_indices, generator, train

FLOW = Flow()


def dit(run: Run, *, size: int = 128, data: Path | None = None, init: Path) -> None:
    """Diffusion transformer by flow matching, with the text encoder and the VAE of mini-sd, or of the model in --init.

    As many parameters as mini-sd's U-Net, and as many operations: 5 blocks of width 256, on patches of 2×2.
    """
    def build(pipe: StableDiffusion, channels: int, side: int) -> DiT:
        config = DiTConfig(num_attention_heads=4, attention_head_dim=64, num_layers=5, sample_size=side,
                           in_channels=channels, num_embeds_ada_norm=None, cross_attention_dim=pipe.text.width)
        return start(DiT, config, run, None)

    flow("dit", build, run, size, data, init).save_pretrained(run.out, dtype=torch.float16)


def flow(name: str, build: Callable, run: Run, size: int, data: Path | None, init: Path) -> nn.Module:
    """Train build(pipe, channels and side of the latents) to predict the velocity eps − x0 on the straight path.

    Times are logit-normal; a tenth of the prompts is left out.

    Returns:
        The averaged net.
    """
    means, stds, ids = latents(run, size, data, init)
    run, pipe = fitted(run, len(means)), frozen(run, init)
    encoder, device = pipe.text.encoders[0], pipe.device
    with torch.no_grad():
        nothing, _ = pipe.text([""])
    net = build(pipe, *means.shape[1:3])

    def loss(net: nn.Module, step: int, share: slice) -> dict[str, Tensor]:
        rows = batch_indices(len(means), run.batch, step, run.seed)[share]
        g = generator(run.seed, step, share.start)
        z0 = means[rows].float()
        z0 = z0 + stds[rows].float() * torch.randn(z0.shape, generator=g)
        chosen = ids[rows, torch.randint(ids.shape[1], rows.shape, generator=g)]
        untold = torch.rand(len(rows), generator=g) < 0.1
        t = FLOW.T * times.logit_normal(torch.randn(rows.shape, generator=g))
        eps = torch.randn(z0.shape, generator=g)
        with torch.no_grad():
            context, _ = encoder(chosen.long().to(device))
            context = torch.where(untold.to(device)[:, None, None], nothing, context)
        return {"loss": losses.diffusion(net, "flow", FLOW, z0.to(device), t.to(device), eps.to(device),
                                         context=context).mean()}

    def sample(net: nn.Module):
        z = torch.randn(len(PROMPTS), *means.shape[1:], generator=torch.Generator().manual_seed(run.seed)).to(device)
        return sheet(pipe.decode(drawn(net, pipe, PROMPTS, z)), 8)

    return train(name, net, loss, run, batch=run.batch, lr=1e-3, ema=0.9995, sample=sample)


@torch.inference_mode()
def drawn(net: Callable, pipe: StableDiffusion, prompts: list[str], z: Tensor, steps: int = 25,
          scale: float = 4.0) -> Tensor:
    """Latents of prompts from unit noise z (B,C,h,w), by Euler's steps along the flow, with guidance."""
    given, nothing = ({"context": pipe.text(texts)[0]} for texts in (prompts, [""] * len(prompts)))
    levels = Grid(Level(t, *FLOW(t)) for t in (FLOW.T * (1 - k / steps) for k in range(steps + 1)))
    *_, last = euler(denoiser(cfg(net, given, nothing, scale), "flow"), z, levels)
    return last.x
