"""What all networks share: configs, loading and saving, and the layers of Stable Diffusion's U-Net and VAE.

Attribute names are parameter names, and these are diffusers' (`time_emb_proj`, `to_out.0`, `ff.net.0.proj` …).
Maps are (B, C, H, W), tokens (B, N, C), the embedding of time and other vectors `emb` (B, E).
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.io.weights import State, load_state, load_strict, read_json, save_state, write_atomic


@dataclasses.dataclass(frozen=True)
class Config:
    """A network's shape, read from and written to `config.json`. Subclasses add the fields.

    Class attributes of a subclass:
        saved: entries that `to_dict` adds, such as `_class_name`.
        renamed: {our field: name in the file}.
        default: {key that is no field: the one value at which it may stand}.
        ignored: keys that do not change what the network computes.
    """

    saved: ClassVar[dict[str, Any]] = {}
    renamed: ClassVar[dict[str, str]] = {}
    default: ClassVar[dict[str, Any]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make a config from a parsed `config.json`. Missing keys take diffusers' class default.

        Raises:
            ValueError: a key that we do not know says anything but null, false, empty or its default.

        >>> from minidiff.nets.vae import VAEConfig
        >>> VAEConfig.from_dict({"latent_channels": 8, "sample_size": None, "_class_name": "AutoencoderKL"}).latent_channels
        8
        """
        own = {cls.renamed.get(f.name, f.name): f.name for f in dataclasses.fields(cls)}
        given = {}
        for key, value in values.items():
            value = _tuples(value)
            if key in own:
                given[own[key]] = value
            elif not (key.startswith("_") or key in cls.ignored or value in (None, False, "", (), {})
                      or (key in cls.default and value == cls.default[key])):
                raise ValueError(f"{cls.__name__} does not support {key} = {value!r}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The entries of `config.json`, under the names in the file.

        >>> from minidiff.nets.unet import UNetConfig
        >>> UNetConfig(heads=4).to_dict()["attention_head_dim"]
        4
        """
        fields = {self.renamed.get(f.name, f.name): getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**self.saved, **fields}


class Net(nn.Module):
    """A network with a config, which can be read from a folder and written to one.

    Class attributes of a subclass: `Config`, and `stem`, the weight file's name without its ending.
    """

    Config: ClassVar[type[Config]]
    stem: ClassVar[str] = "diffusion_pytorch_model"

    def __init__(self, config: Config):
        super().__init__()
        self.config = config

    @classmethod
    def build(cls, config: Config) -> Self:
        """The network of a config, freshly initialized."""
        return cls(config)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, variant: str | None = None,
                        device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Load a network from a folder with `config.json` and weights, strictly, ready for inference.

        Args:
            folder: in diffusers' (transformers') layout.
            variant: tag of the weight file, such as "fp16".
            device: where to; None: CPU.
            dtype: of the parameters; None: float32, whatever the file has.

        Raises:
            FileNotFoundError, ValueError: see `minidiff.io.weights`.

        >>> import tempfile; from minidiff.nets.vae import VAE, VAEConfig
        >>> tmp = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        >>> VAE(VAEConfig(block_out_channels=(8,), norm_num_groups=4)).save_pretrained(tmp.name)
        >>> VAE.from_pretrained(tmp.name).config.block_out_channels
        (8,)
        """
        config = cls.Config.from_dict(read_json(Path(folder) / "config.json"))
        with torch.device("meta"):
            net = cls.build(config)
        load_strict(net, net.renamed(load_state(folder, cls.stem, variant)), folder)
        return net.to(device=device, dtype=dtype or torch.float32).eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and safetensors weights that diffusers (transformers) loads.

        Args:
            folder: is made if need be; files of the same name are replaced, each all at once.
            dtype: of the numbers in the file; None: that of the parameters.
        """
        save_state({k: v.to(dtype) if dtype else v for k, v in self.state_dict().items()},
                   Path(folder) / f"{self.stem}.safetensors")
        write_atomic(Path(folder) / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")

    def renamed(self, state: State) -> State:
        """The state with this network's names, where published files use others."""
        return state


def sinusoid(t: Tensor, dim: int, *, flip: bool = True, shift: float = 0.0) -> Tensor:
    """Sinusoidal embedding of a number (Vaswani et al., 1706.03762 §3.5; DDPM's variant).

        f_j = 10000^(−j/(dim/2 − shift)),  j = 0 … dim/2 − 1;  [cos(t·f), sin(t·f)]

    Args:
        t: (B,), any numbers; computed in float32.
        dim: even.
        flip: cosines first (Stable Diffusion); False: sines first.
        shift: 0 in Stable Diffusion, 1 in DDPM.

    Returns:
        (B, dim) float32.

    >>> sinusoid(torch.tensor([0.0]), 4)
    tensor([[1., 1., 0., 0.]])
    """
    half = dim // 2
    f = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (half - shift)))
    angle = t.float()[:, None] * f                                       # (B, dim/2)
    parts = (angle.cos(), angle.sin()) if flip else (angle.sin(), angle.cos())
    return torch.cat(parts, dim=-1)


class Embedding(nn.Module):
    """Linear, SiLU, Linear on a vector; with `cond`, a second vector is added in first (LCM's guidance weight)."""

    def __init__(self, inputs: int, emb: int, cond: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(inputs, emb)
        self.linear_2 = nn.Linear(emb, emb)
        if cond:
            self.cond_proj = nn.Linear(cond, inputs, bias=False)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """Residual block (DDPM, 2006.11239 appendix B): x + conv(SiLU(GN(conv(SiLU(GN(x))) + proj(emb)))).

    Args:
        ch, out: channels in and out; a 1×1 convolution carries the shortcut where they differ.
        emb: width of the time embedding, None in the VAE. `forward` takes SiLU(emb), computed once for all blocks.
    """

    def __init__(self, ch: int, out: int, emb: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, ch, eps)
        self.conv1 = nn.Conv2d(ch, out, 3, padding=1)
        if emb:
            self.time_emb_proj = nn.Linear(emb, out)
        self.norm2 = nn.GroupNorm(groups, out, eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(ch, out, 1) if ch != out else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


def silu(x: Tensor) -> Tensor:
    """x·sigmoid(x), in place where no gradient is taken: for fresh tensors, such as a norm's output."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class Downsample(nn.Module):
    """3×3 convolution with stride 2. Padding 1 all around (U-Net), or right and bottom only (VAE, padding 0)."""

    def __init__(self, ch: int, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, stride=2, padding=padding)
        self.pad = not padding

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad else x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement, twofold or to a given size, then a 3×3 convolution."""

    def __init__(self, ch: int):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(F.interpolate(x, scale_factor=2.0))
        return self.conv(F.interpolate(x, size=size))


class Attention(nn.Module):
    """Multi-head attention (1706.03762 §3.2): softmax(q kᵀ/√d) v, q from x, k and v from `context` (default: x).

    Args:
        ch: channels of x; context: channels of the context; heads: divides ch.
        bias: of q, k, v (VAE). groups, eps: with groups, x is normalized first (VAE).
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

    def forward(self, x: Tensor, context: "Tensor | Kept | None" = None) -> Tensor:
        q = split_heads(self.to_q(x), self.heads)
        k, v = context[self] if isinstance(context, Kept) else self.keys_values(x if context is None else context)
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What x attends to: keys and values (B, heads, N, C/heads)."""
        return split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads)


class Kept(dict):
    """A context whose keys and values each attention computes only once: for sampling, where the prompt stays.

    It stands for the context tensor (B, N, D) as long as the network's weights do not change.
    """

    def __init__(self, context: Tensor):
        self.context = context

    def __missing__(self, attention: Attention) -> tuple[Tensor, Tensor]:
        self[attention] = pair = attention.keys_values(self.context)
        return pair


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) → (B, heads, N, C/heads), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class MapAttention(Attention):
    """The VAE's attention: GroupNorm, one head over all positions of a map, residual."""

    def __init__(self, ch: int, groups: int):
        super().__init__(ch, 1, bias=True, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)           # (B, HW, C)
        return super().forward(tokens).transpose(1, 2).reshape(x.shape) + x  # this order keeps channels_last


class FeedForward(nn.Module):
    """GEGLU (Shazeer, 2002.05202): W2 (value · GELU(gate)), (value, gate) = W1 x, four times as wide inside."""

    def __init__(self, ch: int):
        super().__init__()
        self.net = nn.ModuleList([Gate(ch, 4 * ch), nn.Identity(), nn.Linear(4 * ch, ch)])  # names net.0, net.2

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Gate(nn.Module):
    """value · GELU(gate), both linear in x."""

    def __init__(self, ch: int, out: int):
        super().__init__()
        self.proj = nn.Linear(ch, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
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

    def forward(self, x: Tensor, context: Tensor | Kept | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        if self.cross:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the positions of a map (2112.10752 §3.3), with attention to the context, and a residual.

    Args:
        ch: channels; heads: divides them; layers: transformer blocks; context: its width, None: self-attention only.
        linear: whether the two projections are stored as Linear (SD 2, SDXL) or as 1×1 convolutions (SD 1).
    """

    def __init__(self, ch: int, heads: int, layers: int, context: int | None, groups: int, linear: bool):
        super().__init__()
        self.norm = nn.GroupNorm(groups, ch, eps=1e-6)
        self.proj_in = nn.Linear(ch, ch) if linear else nn.Conv2d(ch, ch, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(ch, heads, context) for _ in range(layers))
        self.proj_out = nn.Linear(ch, ch) if linear else nn.Conv2d(ch, ch, 1)

    def forward(self, x: Tensor, context: Tensor | Kept | None) -> Tensor:
        y = self.norm(x).flatten(2).transpose(1, 2)                      # (B, HW, C)
        y = F.linear(y, self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            y = block(y, context)
        y = F.linear(y, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + y.transpose(1, 2).reshape(x.shape)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, all the way down: a frozen config is hashable."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
