"""Attention (Vaswani et al., 1706.03762), and the transformers inside Stable Diffusion's U-Net (2112.10752 §3.3).

Attribute names are parameter names, and these are diffusers' (`to_out.0`, `ff.net.0.proj` …).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch  # noqa: F401  (the examples use it)
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention (1706.03762 §3.2): softmax(q kᵀ/√d) v, q from x, k and v from `context` (default: x).

    Args:
        ch: channels of x; context: channels of the context; heads: divides ch.
        bias: of q, k, v (VAE). groups: with them, x is normalized first (VAE).

    >>> Attention(8, heads=2, context=6)(torch.ones(1, 5, 8), torch.ones(1, 7, 6)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(self, ch: int, heads: int, context: int | None = None, bias: bool = False, groups: int | None = None):
        super().__init__()
        self.heads = heads
        if groups:
            self.group_norm = nn.GroupNorm(groups, ch, eps=1e-6)
        self.to_q = nn.Linear(ch, ch, bias=bias)
        self.to_k = nn.Linear(context or ch, ch, bias=bias)
        self.to_v = nn.Linear(context or ch, ch, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(ch, ch)])                 # a list only for its name, to_out.0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B,M,C) asks, context (B,N,D) (None: x) answers: (B,M,C)."""
        q = split_heads(self.to_q(x), self.heads)
        k, v = self.keys_values(x if context is None else context)
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What x attends to: keys and values (B, heads, N, C/heads)."""
        return split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads)


@contextmanager
def kept(net: nn.Module) -> Iterator[None]:
    """Inside, a transformer block computes the keys and values of a context only once: for a run, where prompts stay.

    A context is known by its tensor, which is kept too. Neither its numbers nor the weights may change until the end.

    >>> net, x, prompt = TransformerBlock(8, 2, context=6), torch.ones(1, 5, 8), torch.ones(1, 7, 6)
    >>> with kept(net):
    ...     torch.equal(net(x, prompt), net(x, prompt))
    True
    """
    # not attn1: what it attends to is new in every call, and would pile up
    layers = [block.attn2 for block in net.modules() if isinstance(block, TransformerBlock) and block.cross]
    for attention in layers:
        attention.keys_values = functools.cache(attention.keys_values)   # tensors are told apart by identity
    try:
        yield
    finally:
        for attention in layers:
            vars(attention).pop("keys_values", None)                     # gone, if another run has ended meanwhile


@contextmanager
def watched(net: nn.Module,
            change: Callable[[str, Tensor], Tensor] | None = None) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, every call of the net also notes where its attentions look; what it computes stays the same, bit for bit.

        maps = softmax(q kᵀ/√d)

    Args:
        change: (name, maps) -> the maps that weigh the values instead, and are noted; where it returns `maps` itself,
            nothing is computed anew. See `minidiff.editing`.

    Yields:
        {name of the attention in the net: one (B, heads, N, M) tensor per call}. N are the positions of the map, row by
        row, M those of the map or the context; rows add up to 1. In a U-Net, attn1 looks at the map, attn2 at the
        prompt.

    >>> net, x = nn.ModuleDict({"attn": Attention(8, heads=2)}), torch.ones(1, 5, 8)
    >>> with watched(net) as maps:
    ...     y = net["attn"](x)
    >>> maps["attn"][0].shape
    torch.Size([1, 2, 5, 5])
    """
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, attention: Attention, inputs: tuple) -> Tensor | None:
        x, context = (*inputs, None)[:2]
        q = split_heads(attention.to_q(x), attention.heads)
        k, v = attention.keys_values(x if context is None else context)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        used = change(name, weights) if change else weights
        seen.setdefault(name, []).append(used)
        return None if used is weights else attention.to_out[0]((used @ v).transpose(1, 2).flatten(2))

    hooks = [module.register_forward_hook(lambda module, inputs, _, name=name: note(name, module, inputs))
             for name, module in net.named_modules() if type(module) is Attention]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def spread(x: Tensor, told: Tensor | None) -> Tensor:
    """Maps (B, C, H, W) repeated to as many rows as what they are told has, k·B: so far they were the same for all k.

    >>> spread(torch.zeros(1, 8, 4, 3), torch.ones(2, 7, 6)).shape
    torch.Size([2, 8, 4, 3])
    """
    times = 1 if told is None else len(told) // len(x)
    return x if times < 2 else torch.cat([x] * times)                    # repeat() would lose channels_last


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) → (B, heads, N, C/heads), a view.

    >>> split_heads(torch.zeros(2, 5, 12), 3).shape
    torch.Size([2, 3, 5, 4])
    """
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class MapAttention(Attention):
    """The VAE's attention: GroupNorm, one head over all positions of a map, residual.

    >>> MapAttention(8, groups=2)(torch.ones(1, 8, 4, 3)).shape
    torch.Size([1, 8, 4, 3])
    """

    def __init__(self, ch: int, groups: int):
        super().__init__(ch, 1, bias=True, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,H,W) to the same shape."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)           # (B, HW, C)
        return super().forward(tokens).transpose(1, 2).reshape(x.shape) + x  # this order keeps channels_last


class FeedForward(nn.Module):
    """GEGLU (Shazeer, 2002.05202): W2 (value · GELU(gate)), (value, gate) = W1 x, four times as wide inside.

    >>> FeedForward(8)(torch.ones(1, 5, 8)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(self, ch: int):
        super().__init__()
        self.net = nn.ModuleList([Gate(ch, 4 * ch), nn.Identity(), nn.Linear(4 * ch, ch)])  # names net.0, net.2

    def forward(self, x: Tensor) -> Tensor:
        """(…,C) to the same shape."""
        return self.net[2](self.net[0](x))


class Gate(nn.Module):
    """value · GELU(gate), both linear in x."""

    def __init__(self, ch: int, out: int):
        super().__init__()
        self.proj = nn.Linear(ch, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        """(…,C) to (…,out)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """x += attn1(LN1 x); x += attn2(LN2 x, context), unless there is no context; x += ff(LN3 x)."""

    def __init__(self, ch: int, heads: int, context: int | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(ch)
        self.attn1 = Attention(ch, heads)
        if context:
            self.norm2 = nn.LayerNorm(ch)
            self.attn2 = Attention(ch, heads, context)
        self.norm3 = nn.LayerNorm(ch)
        self.ff = FeedForward(ch)
        self.cross = bool(context)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """x (B,M,C), context (B,N,D) to (B,M,C)."""
        x = x + self.attn1(self.norm1(x))
        if self.cross:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the positions of a map (2112.10752 §3.3), with attention to the context, and a residual.

    Args:
        ch: channels; heads: divides them; layers: transformer blocks; context: its width, None: self-attention only.
        linear: whether the two projections are stored as Linear (SD 2, SDXL) or as 1×1 convolutions (SD 1).

    >>> net = SpatialTransformer(8, heads=2, layers=1, context=6, groups=4, linear=True)
    >>> net(torch.ones(1, 8, 4, 3), torch.ones(1, 7, 6)).shape
    torch.Size([1, 8, 4, 3])
    """

    def __init__(self, ch: int, heads: int, layers: int, context: int | None, groups: int, linear: bool):
        super().__init__()
        self.norm = nn.GroupNorm(groups, ch, eps=1e-6)
        self.proj_in = nn.Linear(ch, ch) if linear else Pointwise(ch, ch, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(ch, heads, context) for _ in range(layers))
        self.proj_out = nn.Linear(ch, ch) if linear else Pointwise(ch, ch, 1)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """x (B,C,H,W), context (B,N,D) or (k·B,N,D) to as many maps as contexts."""
        x = spread(x, context)                                           # k contexts for each map make k maps of it
        y = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))        # (B, HW, C)
        for block in self.transformer_blocks:
            y = block(y, context)
        return x + self.proj_out(y).transpose(1, 2).reshape(x.shape)


class Pointwise(nn.Conv2d):
    """A 1×1 convolution of a map that is given as tokens (B, N, C): a linear layer with a convolution's weight."""

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,C) to (B,N,out)."""
        return F.linear(x, self.weight.flatten(1), self.bias)
