"""What proves a notebook's own definition equal to the package's: inputs for each name that a cell is tagged with."""
import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minidiff import exact
from minidiff.data.toys import Mixture
from minidiff.grid import Grid
from minidiff.nets import dit
from minidiff.nets.controlnet import ControlNetConfig
from minidiff.nets.mlp import MLPConfig
from minidiff.nets.towers import CLIPTextConfig
from minidiff.nets.unet import UNetConfig
from minidiff.nets.vae import VAEConfig
from minidiff.prediction import Pred
from minidiff.schedule import SD, Level, amplitudes


class Made(NamedTuple):
    """For what is made before it is called, a network of a class or a wrapped function: the arguments of both."""

    how: tuple
    call: tuple


class Twice(Made):
    """The same, called twice; the second answer counts: for what changes after its first call."""


class Told(Made):
    """The same; the last argument of the call is `hint`, which goes by its name."""


Rows = tuple[tuple | Made, ...]  # the arguments of one call each


def curved(x: Tensor, level: Level) -> Pred:
    """A denoiser that is not linear, for samplers."""
    eps = torch.tanh(x + 0.3) * (0.5 + 0.2 * level.sigma / (level.alpha + level.sigma))
    return Pred((x - level.sigma * eps) / level.alpha, eps)


def reseeded(x: Tensor, level: Level) -> Pred:
    """The same, for samplers that draw: both sides then draw the same noise."""
    torch.manual_seed(0)
    return curved(x, level)


NSR = [[8 * (0.1 / 8) ** (i / n) for i in range(n + 1)] for n in (5, 16)]  # noise to signal; few steps and many
LADDERS = [Grid([Level(0.0, *amplitudes(u)) for u in NSR[1]]), Grid([Level(0.0, 1.0, u) for u in NSR[0]]),
           Grid([Level(0.0, 1 / (1 + u), u / (1 + u)) for u in [*NSR[0], 0.0]])]
LINE = torch.linspace(-1.5, 1.5, 8, dtype=torch.float64)
WALKS: Rows = tuple((curved, LINE, ladder) for ladder in LADDERS)

GRID = Grid([Level(2.0, 0.28, 0.96), Level(1.0, 0.6, 0.8), Level(0.0, 0.8, 0.6)])
PLANE = Mixture(torch.tensor([0.3, 0.7]).double(), torch.tensor([[-1.0, 0.5], [0.4, 0.2]]).double(),
                torch.tensor([0.5, 0.1]).double())
DOTS = Mixture(torch.tensor([0.5, 0.5]).double(), torch.tensor([[-1.0, 0.5], [0.4, 0.2]]).double(), 0.0)
STATES = torch.tensor([[0.1, -0.4], [1.2, 0.3], [-0.9, 0.8]]).double()


def timed(x: Tensor, t: Tensor) -> Tensor:
    """A network that is not linear and looks at the time."""
    return torch.tanh(x + t.view(-1, *[1] * (x.ndim - 1)) / 999)


KINDS = ("eps", "x0", "v", "flow")
TIMES = torch.tensor([3, 500, 999])
TOKENS, WORDS = torch.arange(80.0).view(2, 5, 8).sin(), torch.arange(84.0).view(2, 7, 6).cos()
NOISY = (torch.tensor([0.995, 0.8, 0.1]).double(), torch.tensor([0.1, 0.6, 0.995]).double())  # alpha and sigma

MAPS = torch.linspace(-2, 2, 192).sin().view(2, 4, 6, 4) * torch.linspace(1, 2, 4)
UNET = UNetConfig(block_out_channels=(8, 12), layers_per_block=2, heads=2, cross_attention_dim=4, norm_num_groups=4,
                  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
CONTROL = ControlNetConfig(block_out_channels=(8, 12), layers_per_block=2, heads=2, cross_attention_dim=4,
                           norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                           conditioning_embedding_out_channels=(4, 6))
HINT = torch.arange(384.0).view(2, 8, 6, 4).sin()
CODER = VAEConfig(in_channels=4, out_channels=4, latent_channels=3, block_out_channels=(8, 12), layers_per_block=2,
                  norm_num_groups=4)
TOWER = CLIPTextConfig(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                       max_position_embeddings=9, eos_token_id=19)
UNIT = torch.nn.functional.normalize(torch.arange(40.0).view(2, 5, 4).sin(), dim=-1)  # pictures and texts
CLASSES = torch.tensor([0.4, -1.3])
LOOKS, PLACES = torch.arange(120.0).view(4, 2, 3, 5).sin(), torch.tensor([[0, 2, -1, -1, 1]])  # attention, its tokens
READS = dit.DiTConfig(num_attention_heads=2, attention_head_dim=4, num_layers=2, sample_size=8,
                      num_embeds_ada_norm=None, cross_attention_dim=6)
KNOWS = dit.DiTConfig(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=6, num_embeds_ada_norm=3,
                      attention_bias=False, norm_eps=1e-3)
LINES = (torch.arange(216).view(3, 2, 6, 6) ** 2 % 7 < 2).long() * torch.tensor([1, 1, 0]).view(3, 1, 1, 1)  # hints
COUNTS = torch.arange(30).view(10, 3) ** 2 % 11 + torch.arange(3)  # whole numbers: measures that return no tensor


def certain(x: Tensor, level: Level) -> Tensor:
    """log p(y|x) of a class that looks at the level."""
    return torch.nn.functional.logsigmoid(level.alpha * x @ torch.tensor([1.3, -0.4]).to(x) / (level.sigma + 0.1))


def classed(x: Tensor, t: float, c: Tensor) -> Tensor:
    """A network that is told a class."""
    return torch.tanh(x * c.view(-1, 1, 1, 1) + t / 999)


def summing(x: Tensor, t: float, residuals: list[Tensor]) -> Tensor:
    """A U-Net that keeps two maps."""
    return torch.tanh(x + residuals[0]) + residuals[1] * t / 999


def looking(x: Tensor, t: float, hint: Tensor) -> tuple[Tensor, Tensor]:
    """A ControlNet of it."""
    return x.sin() * hint, hint.cos() - x * t / 999


CASES: dict[str, Rows] = {
    "schedule.linear_betas": ((), (10,), (5, 0.1, 0.3)),
    "schedule.scaled_linear_betas": ((), (10,), (5, 0.1, 0.3)),
    "schedule.cosine_betas": ((), (10,), (50, 0.02, 0.9)),
    "schedule.sigmoid_betas": ((), (10,), (5, 0.1, 0.3)),
    "schedule.amplitudes": ((0.75,), (0.0,), (14.6,), (math.inf,)),
    "train.losses.posterior": ((GRID[0], GRID[1]), (GRID[0], GRID[2]), (GRID[1], Level(0.0, 1.0, 0.0))),
    "train.losses.fixed_small": ((GRID,),),
    "train.losses.fixed_large": ((GRID,),),
    "train.losses.vlb": tuple((lambda x, level: Pred(x.tanh(), x), x0, GRID, (0.5, 0.3, 0.1), torch.ones_like)
                              for x0 in (STATES, STATES.view(1, 3, 1, 2))),
    "exact.log_joint": tuple((mixture, STATES, level) for mixture in (PLANE, DOTS) for level in GRID),
    "exact.log_density": tuple((mixture, STATES, level) for mixture in (PLANE, DOTS) for level in GRID),
    "exact.denoiser": (*(Made((mixture,), (STATES, level)) for mixture in (PLANE, DOTS) for level in GRID),
                       Made((DOTS,), (STATES.view(3, 1, 1, 2), GRID[1]))),
    "prediction.score": ((Pred(STATES, STATES.sin()), GRID[1]),),
    "prediction.denoiser": tuple(Made((lambda x, t: torch.tanh(x + 0.3) - t / 9, kind), (LINE, level))
                                 for kind in ("eps", "v") for level in GRID),
    "samplers.ddim": WALKS,
    "samplers.ddpm": tuple((reseeded, *row[1:]) for row in WALKS),
    "guidance.clip": tuple(Made((curved, *ends), (2 * LINE, level)) for ends in ((), (0.0, 0.5)) for level in GRID),
    "guidance.classifier_guidance": tuple(Made((curved, certain, scale), (STATES, level)) for scale in (0.0, 1.0, 3.5)
                                          for level in GRID),
    "guidance.cfg": tuple(Made((classed, {"c": CLASSES}, {"c": CLASSES.cos()}, *how), (MAPS, 500.0))
                          for how in ((0.0,), (1.0,), (7.5,), (7.5, 0.7), (3.0, 1.0))),
    "guidance.interval": tuple(Made((curved, lambda x, level: Pred(x.sin(), x), *ends), (LINE, level))
                               for ends in ((0.0, 1.0), (0.5, 1.5), (1.0, 9.0)) for level in GRID),
    "guidance.inpaint": tuple(kind((curved, LINE.cos(), (LINE > 0).double(), LINE.sin()), (LINE, level))
                              for kind in (Made, Twice) for level in GRID),
    "editing.slerp": tuple((*pair, share) for share in (0.0, 0.3, 1.0)
                           for pair in ((MAPS, MAPS.cos()), (TOKENS, TOKENS.cos()))),
    "editing.invert": tuple((curved, LINE, ladder) for ladder in (*LADDERS[:2], GRID)),
    "editing.prompt_to_prompt": tuple(kind((PLACES, steps), (name, LOOKS)) for kind in (Made, Twice)
                                      for steps in (1, 2, 3) for name in ("a.attn1", "a.attn2")),
    "nets.layers.sinusoid": ((TIMES, 8), (TIMES.double() / 7, 2)),
    "nets.mlp.MLP": (Made((MLPConfig(ch=8),), (STATES.float(), TIMES)),
                     Made((MLPConfig(dim=4, ch=6, layers=1),), (torch.ones(2, 4), 500))),
    "prediction.coefficients": tuple((kind, 0.8, 0.6) for kind in KINDS),
    "prediction.target": tuple((kind, STATES, STATES.sin(), 0.8, 0.6) for kind in KINDS),
    "prediction.split": tuple((kind, STATES, STATES.sin(), 0.8, 0.6) for kind in KINDS),
    "train.losses.diffusion": tuple((timed, kind, SD, x0, TIMES, x0.sin())  # for flow the package moves x
                                    for kind in KINDS[:3] for x0 in (STATES.float(), STATES.float().view(3, 2, 1, 1))),
    "prediction.moved": tuple((kind, *pair) for kind in (*KINDS, "edm") for pair in ((3.0, 0.7), NOISY)),
    "train.losses.edm_times": ((LINE,), (LINE, 0.5, 2.0)),
    "train.trainer.learning_rate": tuple((step, 90, 3.0, *more) for step in (0, 7, 60, 89) for more in ((), (5, 0.5))),
    "train.ema.constant": (Made((0.9,), (0,)), Made((0.99,), (7,))),
    "train.ema.power": tuple(Made((width,), (n,)) for width in (0.05, 0.1, 0.28) for n in (0, 1, 500)),
    "train.losses.implied_weight": tuple((kind, *pair) for kind in KINDS for pair in ((0.8, 0.6), NOISY)),
    "train.losses.min_snr": tuple((kind, *NOISY, *gamma) for kind in KINDS for gamma in ((), (2.0,))),
    "samplers.euler": WALKS,
    "samplers.heun": WALKS,
    "samplers.euler_ancestral": tuple((reseeded, *row[1:]) for row in WALKS),
    "samplers.dpmpp_2m": WALKS,
    "multistep.lagrange_integrals": (([1.0], 1.0, 0.4), ([1.0, 2.0], 1.0, 0.0), ([0.4, 0.9, 1.7, 3.1], 0.4, 0.1)),
    "multistep.lms": WALKS,
    "multistep.corrector": ((0.5, 0.3), (0.1, 0.4)),
    "multistep.unipc": WALKS,
    "nets.layers.ResBlock": (Made((4, 6, 8, 2, 1e-5), (MAPS, STATES[:2].float().repeat(1, 4))),
                             Made((4, 4, 8, 4, 1e-3), (MAPS, STATES[:1].float().repeat(1, 4)))),
    "nets.layers.Downsample": (Made((4,), (MAPS,)),),
    "nets.layers.Upsample": (Made((4,), (MAPS,)),),
    "nets.layers.Embedding": (Made((4, 16), (MAPS[:, :, 0, 0],)),),
    "nets.unet.UNet": (Made((UNET,), (MAPS, TIMES[:2], MAPS.flatten(2).transpose(1, 2))),
                       Made((UNET,), (MAPS, 7.5, MAPS.flatten(2).transpose(1, 2)))),
    "grid.karras": ((3, 10.0, 0.1), (12, 14.6, 0.03), (5, 80.0, 0.002, 3.0)),
    "nets.attention.split_heads": ((TOKENS, 2), (TOKENS, 4)),
    "nets.attention.Attention": (Made((8, 2), (TOKENS,)), Made((8, 4, 6), (TOKENS, WORDS)),
                                 Made((8, 1, None, True), (TOKENS,))),
    "nets.attention.FeedForward": (Made((8,), (TOKENS,)),),
    "nets.attention.TransformerBlock": (Made((8, 2, None), (TOKENS, None)), Made((8, 4, 6), (TOKENS, WORDS))),
    "nets.towers.quick_gelu": ((LINE,), (TOKENS,)),
    "nets.towers.SelfAttention": tuple(Made((8, heads), (TOKENS, causal))
                                       for heads in (2, 4) for causal in (True, False)),
    "nets.towers.Layer": tuple(Made((TOWER,), (TOKENS, causal)) for causal in (True, False)),
    "nets.clip.CLIPText": (Made((TOWER,), (torch.tensor([[18, 3, 7, 19, 19], [18, 0, 5, 5, 19]]),)),),
    "train.losses.contrastive": tuple((*UNIT, torch.tensor(s)) for s in (-1.0, 0.0, 2.66)),
    "nets.vae.VAE": (Made((CODER,), (MAPS, MAPS[:, :3, ::2, ::2].cos())),
                     Made((CODER,), (MAPS.sin(),))),
    "train.losses.vae": ((MAPS, MAPS.sin(), MAPS[:, :2].cos(), MAPS[:, 2:].sin()),
                         (MAPS[:1, :3], MAPS[1:, :3], STATES.float(), STATES.float().sin())),
    "metrics.frechet": ((COUNTS, COUNTS[:7, [1, 2, 0]]), (COUNTS[:5], COUNTS)),
    "metrics.without_bias": ((lambda a, b: (a.sum() - b.prod()).item(), COUNTS, COUNTS[:7] + 1),),
    "metrics.kernel_distance": ((COUNTS, COUNTS[:7, [1, 2, 0]]), (COUNTS[:5], COUNTS)),
    "metrics.nearest": ((STATES, STATES.flip(1)[:2]), (MAPS, MAPS.cos()[:1])),
    "metrics.bootstrap": ((lambda a, b: (a.sum() - 2 * b.max()).item(), COUNTS, COUNTS[:7]),
                          (lambda a: a.double().mean().item(), COUNTS)),
    "evaluate.wilson": ((0, 10), (99, 100), (7, 7), (30, 80, 2.58)),
    "likelihood.log_likelihood": tuple((f, STATES, GRID) for f in (curved, exact.denoiser(PLANE))),
    "nets.low_rank.LoRA": (Made((nn.Linear(4, 6), 2, 3.0), (MAPS,)), Made((nn.Linear(4, 3),), (MAPS,)),
                           *(Made((nn.Conv2d(4, 6, k, 1 + k // 3, k // 2), 3, 6.0), (MAPS,)) for k in (1, 3))),
    "nets.controlnet.Look": (Made((3, (4, 6, 8), 5), (MAPS[:, :3].repeat(1, 1, 2, 2),)), Made((4, (6,), 2), (MAPS,))),
    "nets.controlnet.ControlNet": tuple(Told((CONTROL,), (MAPS, times, MAPS.flatten(2).transpose(1, 2), HINT))
                                        for times in (TIMES[:2], 7.5)),
    "guidance.controlled": tuple(Made((summing, looking, hint, scale), (MAPS, 500.0))
                                 for hint in (MAPS.cos(), MAPS[:1].cos()) for scale in (1.0, 0.5, [0.3])),
    "data.hints.overlap": tuple((LINES, other, *reach) for other in (LINES.roll(1, -1), LINES.flip(1, 2))
                                for reach in ((), (0,), (2,))),
    "nets.dit.positions": ((2, 2, 8, 2), (3, 2, 12, 4)),
    "nets.dit.unpatched": ((TOKENS[:, :4], 2, 2, 2), (TOKENS[:, :3], 1, 3, 1)),
    "nets.dit.modulated": tuple((TOKENS, WORDS[:, 0].repeat(1, 2)[:, :8], TOKENS[:, 1], *eps) for eps in ((), (1e-2,))),
    "nets.dit.Block": (Made((READS, dit.Told(8, None)), (TOKENS, TIMES[:2], None, WORDS)),
                       Made((KNOWS, dit.Told(8, 3)), (TOKENS, 7.5, torch.tensor([0, 3]), None))),
    "nets.dit.DiT": (Made((READS,), (MAPS, TIMES[:2], WORDS)), Made((KNOWS,), (MAPS, 7.5, None, torch.tensor([2, 0])))),
    "io.images.to_rgb": ((MAPS / 4, WORDS[0, :5, :3] / 3),),
    "prediction.consistent": tuple(Made((lambda x, t: torch.tanh(x + 0.3) - t / 9, *how), (LINE, level))
                                   for how in ((0.02,), (0.3, 1.0)) for level in (*GRID, Level(4.0, 1.0, 0.3))),
    "train.losses.pseudo_huber": tuple((a, a.sin(), c) for a in (STATES, MAPS) for c in (0.0, 0.03, 2.0)),
    "train.losses.consistency": tuple((curved, Pred(x0, x0.cos()), *pair) for x0 in (STATES, MAPS)
                                      for pair in pairwise(GRID)),
    "samplers.consistency": tuple((reseeded, *row[1:]) for row in WALKS),
    "samplers.lcm": tuple((reseeded, LINE, ladder) for ladder in (GRID, LADDERS[0], Grid(
        [level._replace(t=level.t / 40) for level in GRID]))),
    "train.losses.lcm": tuple((timed, lambda x, t: timed(x, t).cos(), kind, SD, x0, t, x0.sin()) for kind in KINDS[:3]
                              for x0 in (STATES.float(), STATES.float().view(3, 2, 1, 1))
                              for t in (torch.tensor([19, 499, 999]), torch.tensor([0, 5, 59]))),
}


def prove(scratch, package, rows: Rows) -> None:
    """The same values for every row, and the same gradients with respect to its floating-point tensors.

    A network gets the package's weights first, and the gradients of all its parameters are compared too. Of what a
    generator yields, the tensors are compared.
    """
    for row in rows:
        how, call = row if isinstance(row, Made) else (None, row)
        made = [scratch, package] if how is None else [scratch(*how), package(*how)]
        nets = isinstance(made[1], nn.Module)
        sides, owned = [leaves(call, torch.float64 if nets else None) for _ in made], [[], []]
        for parameter in made[1].parameters() if nets else ():  # behind what starts at zero every mistake is hidden
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
        if nets:  # in float64: how far apart two gradients of float32 lie depends on the processor
            made[0].load_state_dict(made[1].state_dict())
            owned = [[own for own in net.double().parameters() if own.requires_grad] for net in made]
            for layer in [part for net in made for part in net.modules() if isinstance(part, nn.Linear)]:
                layer.register_forward_pre_hook(lambda layer, args: args[0].double())  # the embedding of t is float32
        calls = [partial(f, *side[:-1], hint=side[-1]) if isinstance(row, Told) else partial(f, *side)
                 for f, side in zip(made, sides)]
        if isinstance(row, Twice):
            for call in calls:
                call()
        outs = [tensors(call()) for call in calls]
        torch.testing.assert_close(*outs)
        wanted = [[a for a in side if differentiable(a)] + own for side, own in zip(sides, owned)]
        if wanted[0]:
            torch.testing.assert_close(*[torch.autograd.grad(total(out), side, allow_unused=True)
                                         for out, side in zip(outs, wanted)])


def leaves(row: tuple, dtype: torch.dtype | None) -> list:
    """The arguments, their floating-point tensors as leaves of a graph, in dtype or their own."""
    return [a.to(dtype, copy=True).requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in row]


def differentiable(a) -> bool:
    return torch.is_tensor(a) and a.requires_grad


def tensors(out) -> list:
    """The tensors (and numbers) of an answer, in order: those inside tuples, lists and what is yielded too."""
    if isinstance(out, (tuple, list, Iterator)):
        return [part for piece in out for part in tensors(piece)]
    return [] if out is None else [out]


def total(parts: list) -> Tensor:
    """One number in which every entry of an answer counts differently."""
    return sum((part * torch.linspace(1, 2, part.numel()).view(part.shape).to(part)).sum()
               for part in parts if torch.is_tensor(part) and part.is_floating_point())
