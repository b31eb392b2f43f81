"""A training that takes milliseconds: what the tests of the loop and of resuming share."""
from pathlib import Path

import torch
from torch import nn

from minidiff.train.trainer import Run, generator, train


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss(model, step, share):
    x = torch.randn(16, 4, generator=generator(0, step))[share]
    return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}


def fit(out, steps=120, objective=loss, ema=0.999, **options):
    run = Run(Path(out), steps, device="cpu", **options)
    return train("toy", net(), objective, run, batch=16, lr=1e-2, ema=ema)


def weights(module):
    return torch.cat([p.flatten() for p in module.parameters()])
