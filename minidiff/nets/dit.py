"""Diffusion transformers (Peebles & Xie 2022, arXiv 2212.09748): patches as tokens, adaLN-zero.

Attribute names are parameter names, and these are those of diffusers' DiTTransformer2DModel.
"""

import copy
import dataclasses
import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.io.weights import State
from minidiff.nets.attention import Attention, spread
from minidiff.nets.config import Config
from minidiff.nets.layers import Embedding, Net, sinusoid


@dataclasses.dataclass(frozen=True)
class DiTConfig(Config):
    """Shape of a diffusion transformer; the defaults are diffusers', those of DiT-XL/2.

    Raises:
        ValueError: a number below 1, a width that is no multiple of 4, or a side that patches do not tile.

    >>> DiTConfig(num_attention_heads=6, attention_head_dim=64, num_layers=12).dim
    384
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4                                     # those of the latents
    out_channels: int | None = None                          # twice as many where the variance is learned; None: in
    num_layers: int = 28
    sample_size: int = 32                                    # side of the training latents
    patch_size: int = 2
    num_embeds_ada_norm: int | None = 1000                   # classes; None: it is not told any
    attention_bias: bool = True                              # of q, k, v
    norm_eps: float = 1e-5                                   # of the norm before the MLP; of the others 1e-6
    cross_attention_dim: int | None = None                   # width of a prompt's embedding; not in diffusers' class

    saved: ClassVar = {"_class_name": "DiTTransformer2DModel"}
    default: ClassVar = {"norm_num_groups": 32, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero"}
    ignored: ClassVar = frozenset({"dropout", "upcast_attention"})       # no effect on what is drawn

    def __post_init__(self):
        for name in ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size",
                     "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dim % 4:
            raise ValueError(f"{self.num_attention_heads} heads of {self.attention_head_dim} are {self.dim} channels; "
                             "the table of positions needs a multiple of 4")
        if self.sample_size % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} do not tile a side of {self.sample_size}")

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    def to_dict(self) -> dict[str, Any]:
        """The entries of `config.json`; without a prompt those that diffusers knows."""
        told = self.cross_attention_dim is not None
        return {name: value for name, value in super().to_dict().items() if told or name != "cross_attention_dim"}


class DiT(Net):
    """The U-Net's rival: cut the latent into patches, let them attend to each other, and put them together again.

        c = MLP(sinusoid(t)) + table[class];   shift, scale, gate, … = Linear(SiLU(c))   for each block
        x += gate·Attention(LN(x)·(1 + scale) + shift);   x += Attention(LN(x), prompt);   x += gate'·MLP(LN(x)·…)

    Gates and the last layer begin at 0 (adaLN-zero): every block is the identity, and the output 0. The line of the
    prompt is PixArt-α's (arXiv 2310.00426, section 2.3), only with `cross_attention_dim`.
    Matches: diffusers' DiTTransformer2DModel, tests/parity/test_dit.py.

    >>> net = DiT(DiTConfig(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8))
    >>> net(torch.randn(1, 4, 8, 8), 500, vec=torch.tensor([3])).abs().max()
    tensor(0., grad_fn=<MaxBackward1>)
    """

    Config = DiTConfig

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        c, p = config, config.patch_size
        self.pos_embed = PatchEmbed(c.in_channels, c.dim, p, c.sample_size // p)
        told = Told(c.dim, c.num_embeds_ada_norm)            # one for all blocks, as in the paper
        self.transformer_blocks = nn.ModuleList(Block(c, told) for _ in range(c.num_layers))
        self.proj_out_1 = nn.Linear(c.dim, 2 * c.dim)
        self.proj_out_2 = nn.Linear(c.dim, p * p * (c.out_channels or c.in_channels))
        begin(self)
        for last in (self.proj_out_1, self.proj_out_2):
            zero(last)

    def forward(self, x: Tensor, t: Tensor | float, context: Tensor | None = None, vec: Tensor | None = None) -> Tensor:
        """The raw prediction.

        Args:
            x: (B, in_channels, H, W) noisy latent, sides that patches tile. At other sides than those of training the
                positions are stretched.
            t: (B,) or one number, 0 … T−1, fractions allowed.
            context: (B, N, D) prompt embedding, with `cross_attention_dim`; with k·B rows, k prompts for each x.
            vec: (B,) class numbers; the one after the last, or None: none is told.

        Returns:
            (B, out_channels, H, W), or k·B rows
        """
        x = spread(spread(x, context), vec)
        height, width = (side // self.config.patch_size for side in x.shape[2:])
        y = self.pos_embed(x)                                            # (B, height·width, dim)
        for block in self.transformer_blocks:
            y = block(y, t, vec, context)
        shift, scale = self.proj_out_1(F.silu(self.transformer_blocks[0].norm1.emb(y, t, vec))).chunk(2, dim=1)
        return unpatched(self.proj_out_2(modulated(y, shift, scale)), height, width, self.config.patch_size)

    def renamed(self, state: State) -> State:
        """Blocks get embeddings of time and class of their own where a file has different ones.

        diffusers' class has one in each block; in published files they are copies of one.
        """
        first, *rest = (f"transformer_blocks.{i}.norm1.emb." for i in range(self.config.num_layers))
        mine = {key: value for key, value in state.items() if key.startswith(first)}
        if any(not torch.equal(value, state.get(key.replace(first, other, 1), value))
               for other in rest for key, value in mine.items()):
            for block in self.transformer_blocks[1:]:
                block.norm1.emb = copy.deepcopy(block.norm1.emb)
        return state


class Told(nn.Module):
    """What all blocks are told: the time, and a class if there are any. c = MLP(sinusoid(t)) + table[class]."""

    def __init__(self, dim: int, classes: int | None):
        super().__init__()
        self.timestep_embedder = Embedding(256, dim)
        if classes is not None:
            self.class_embedder = nn.Module()
            self.class_embedder.embedding_table = nn.Embedding(classes + 1, dim)     # the last row: not told

    def forward(self, x: Tensor, t: Tensor | float, vec: Tensor | None) -> Tensor:
        """(B or 1, dim) in the dtype of x."""
        # NOTE: the paper's code has shift 0; this is how diffusers reads its weights, test_same_prediction_as_diffusers
        emb = self.timestep_embedder(sinusoid(torch.as_tensor(t, device=x.device).reshape(-1), 256, shift=1).to(x))
        if hasattr(self, "class_embedder"):
            table = self.class_embedder.embedding_table
            none = torch.tensor([table.num_embeddings - 1], device=x.device)
            emb = emb + table(none if vec is None else vec)
        return emb


class Block(nn.Module):
    """Attention of the tokens to each other, to the prompt if there is one, and an MLP, steered by what is told."""

    def __init__(self, config: DiTConfig, told: Told):
        super().__init__()
        c = config
        self.norm1 = AdaNorm(c.dim, 6)
        self.norm1.emb = told
        self.attn1 = Attention(c.dim, c.num_attention_heads, bias=c.attention_bias)
        if c.cross_attention_dim is not None:
            self.attn2 = Attention(c.dim, c.num_attention_heads, c.cross_attention_dim, bias=c.attention_bias)
        self.ff = MLP(c.dim)
        self.eps, self.cross = c.norm_eps, c.cross_attention_dim is not None

    def forward(self, x: Tensor, t: Tensor | float, vec: Tensor | None, context: Tensor | None) -> Tensor:
        """x (B,N,dim) to the same shape."""
        shift, scale, gate, shift1, scale1, gate1 = self.norm1(self.norm1.emb(x, t, vec))
        x = x + gate[:, None] * self.attn1(modulated(x, shift, scale))
        if self.cross:
            x = x + self.attn2(F.layer_norm(x, x.shape[-1:], eps=1e-6), context)
        return x + gate1[:, None] * self.ff(modulated(x, shift1, scale1, self.eps))


class AdaNorm(nn.Module):
    """n vectors per block from the one that tells it the time (adaptive norms; Perez et al. 2018, arXiv 1709.07871).

    >>> [part.shape for part in AdaNorm(8, 2)(torch.zeros(1, 8))]
    [torch.Size([1, 8]), torch.Size([1, 8])]
    """

    def __init__(self, dim: int, n: int):
        super().__init__()
        self.linear = nn.Linear(dim, n * dim)
        self.n = n

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:
        """(B,dim) to n times (B,dim)."""
        return self.linear(F.silu(emb)).chunk(self.n, dim=1)


class MLP(nn.Module):
    """W2 GELU(W1 x), four times as wide inside, GELU by its tanh formula (Hendrycks & Gimpel, arXiv 1606.08415).

    >>> MLP(8)(torch.ones(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(self, dim: int):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(dim, 4 * dim)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * dim, dim)])   # names net.0.proj, net.2

    def forward(self, x: Tensor) -> Tensor:
        """(…,C) to the same shape."""
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class PatchEmbed(nn.Module):
    """Patches as tokens: one linear map of each, and where it stood, (B,C,H,W) to (B, H/p·W/p, dim).

    Args:
        ch: of the picture. dim: of a token. patch: its side p. side: patches on a side in training.
        most: of a table of that side, kept with the weights, from whose middle positions are cut; None: they are
            computed, stretched to the picture's sides.

    >>> PatchEmbed(4, 8, 2, 16)(torch.zeros(1, 4, 32, 24)).shape
    torch.Size([1, 192, 8])
    """

    def __init__(self, ch: int, dim: int, patch: int, side: int, most: int | None = None):
        super().__init__()
        self.proj = nn.Conv2d(ch, dim, patch, stride=patch)
        self.most, self.side = most, side
        if most:
            self.register_buffer("pos_embed", positions(most, most, dim, side)[None])

    def forward(self, x: Tensor) -> Tensor:
        """Row by row.

        Raises:
            ValueError: patches do not tile the picture, or there are more than the table has.
        """
        patch = self.proj.stride[0]
        if x.shape[2] % patch or x.shape[3] % patch:
            raise ValueError(f"patches of {patch} do not tile {x.shape[2]}×{x.shape[3]} latents")
        height, width = x.shape[2] // patch, x.shape[3] // patch
        tokens = self.proj(x).flatten(2).transpose(1, 2)                 # (B, height·width, dim)
        if self.most:
            if max(height, width) > self.most:
                raise ValueError(f"{height}×{width} patches are more than the {self.most}×{self.most} positions known")
            top, left = (self.most - height) // 2, (self.most - width) // 2
            table = self.pos_embed.unflatten(1, (self.most, self.most))[:, top:top + height, left:left + width]
            return tokens + table.flatten(1, 2)
        return tokens + _kept(height, width, tokens.shape[2], self.side).to(tokens)


def positions(height: int, width: int, dim: int, side: int) -> Tensor:
    """A fixed code for each place of a grid, as in DiT and MAE (arXiv 2111.06377): (height·width, dim), float32.

        code(x, y) = [sin(x·f), cos(x·f), sin(y·f), cos(y·f)],   f_j = 10000^(−j/(dim/4)),   x and y from 0 to side

    Args:
        dim: a multiple of 4. side: to how many places the grid is stretched or squeezed.

    >>> positions(2, 2, 8, 2)[1]                                             # (x, y) = (1, 0)
    tensor([0.8415, 0.0100, 0.5403, 0.9999, 0.0000, 0.0000, 1.0000, 1.0000])
    """
    f = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = (torch.arange(n, dtype=torch.float64)[:, None] * (side / n) * f for n in (height, width))
    rows, columns = (torch.cat([part.sin(), part.cos()], 1).float() for part in (y, x))
    shape = (height, width, dim // 2)
    return torch.cat([columns[None].expand(shape), rows[:, None].expand(shape)], 2).flatten(0, 1)


@functools.lru_cache(maxsize=8)
def _kept(height: int, width: int, dim: int, side: int) -> Tensor:
    with torch.device("cpu"):
        return positions(height, width, dim, side)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x)·(1 + scale) + shift of tokens x (B,N,dim), shift and scale (B,dim).

    >>> modulated(torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 2), torch.ones(1, 2)).round()
    tensor([[[-2.,  2.]]])
    """
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def unpatched(x: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Tokens (B, height·width, p·p·C) put together as a picture (B, C, p·height, p·width).

    >>> unpatched(torch.arange(4.0).view(1, 1, 4), 1, 1, 2)[0, 0]
    tensor([[0., 1.],
            [2., 3.]])
    """
    x = x.unflatten(1, (height, width)).unflatten(3, (patch, patch, -1))  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def begin(net: nn.Module) -> None:
    """The paper's start (section 3.2 and its code): Xavier's weights, small ones of the tables, gates at 0."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1) if module.weight.ndim > 2 else module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in net.modules():
        if isinstance(module, Embedding):
            for linear in (module.linear_1, module.linear_2):
                nn.init.normal_(linear.weight, std=0.02)
        elif isinstance(module, AdaNorm):
            zero(module.linear)
        elif isinstance(module, Block) and module.cross:
            zero(module.attn2.to_out[0])


def zero(linear: nn.Linear) -> None:
    """Weights and bias at 0."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
