"""The variational autoencoder of latent diffusion (Rombach et al., 2112.10752 §3.1), diffusers' AutoencoderKL."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minidiff.io import rename
from minidiff.io.weights import State
from minidiff.nets.attention import MapAttention
from minidiff.nets.config import Config
from minidiff.nets.layers import Downsample, Net, ResBlock, Upsample, silu

EPS = 1e-6  # of every GroupNorm in the VAE, CompVis model.py
FORMAT = torch.channels_last  # 0.80 to 0.96 of the time of the default, forward and backward, 32² to 128² pixels


@dataclasses.dataclass(frozen=True)
class VAEConfig(Config):
    """Shape of a VAE. The side of a latent is the picture's divided by 2^(len(block_out_channels) − 1).

    Args:
        in_channels, out_channels: of the picture.
        latent_channels: of the latent.
        block_out_channels: channels per resolution, from the picture down; divisible by `norm_num_groups`.
        layers_per_block: residual blocks per resolution in the encoder; the decoder has one more.
        norm_num_groups: groups of every GroupNorm.
        mid_block_add_attention: attention between the middle's two residual blocks.
        scaling_factor: 1/std of the latents, which makes their variance about one.
        sample_size: side of the training pictures, or height and width; information only.
        force_upcast: whether float16 overflows in the decoder, so that it wants float32; information only.

    Raises:
        ValueError: channels that the groups do not divide, or latents scaled by 0.

    >>> VAEConfig().scaling_factor
    0.18215
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.18215  # SD 1 and 2, CompVis v1-inference.yaml
    sample_size: int | tuple[int, ...] | None = 32
    force_upcast: bool = True

    saved: ClassVar = {"_class_name": "AutoencoderKL", "act_fn": "silu"}
    default: ClassVar = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}
    ignored: ClassVar = frozenset({"down_block_types", "up_block_types"})  # other types have other parameters

    def __post_init__(self):
        if not self.block_out_channels or min(self.norm_num_groups, *self.block_out_channels) < 1 or any(
                ch % self.norm_num_groups for ch in self.block_out_channels):
            raise ValueError(f"block_out_channels is {self.block_out_channels}; they should be divisible by the "
                             f"{self.norm_num_groups} groups of norm_num_groups")
        if self.scaling_factor == 0:
            raise ValueError("scaling_factor is 0; latents are divided by it")

    def to_dict(self) -> dict[str, Any]:
        """As diffusers' `config.json` has it, with the types of the blocks."""
        n = len(self.block_out_channels)
        types = {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
        return {**super().to_dict(), **types}


class VAE(Net):
    """Picture (B, 3, H, W) in [−1, 1] to latent (B, C, H/f, W/f) and back.

        encode: z = s·(mean + std·noise);   decode: D(z/s),   s = scaling_factor

    Matches: diffusers' AutoencoderKL, tests/parity/test_vae.py.

    >>> vae = VAE(VAEConfig(block_out_channels=(8, 16), norm_num_groups=4))
    >>> z = vae.encode(torch.zeros(1, 3, 8, 16))
    >>> z.shape, vae.decode(z).shape
    (torch.Size([1, 4, 4, 8]), torch.Size([1, 3, 8, 16]))
    """

    Config = VAEConfig
    part = "vae"

    def __init__(self, config: VAEConfig):
        super().__init__(config)
        c = config.latent_channels
        self.encoder = VAEEncoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.decoder = VAEDecoder(config)

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior q(z | image), unscaled, each (B, C, H/f, W/f).

        The log-variance is clamped to [−30, 20], as in the reference.
        """
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, image: Tensor, noise: Tensor | None = None, tile: int | None = None) -> Tensor:
        """The scaled latent of a picture: the posterior's mean, or with unit noise a sample.

        Args:
            image: (B, 3, H, W) in [−1, 1], H and W divisible by f.
            noise: None, or N(0, I) of the latent's shape.
            tile: side in pixels of the tiles in which larger pictures are read, see `decode`.
        """
        both = tiled(lambda part: torch.cat(self.moments(part), 1), image, self.check_tile(tile),
                     1 / self.factor)
        z, logvar = both.chunk(2, dim=1)
        if noise is not None:
            z = z + torch.exp(0.5 * logvar) * noise
        return self.config.scaling_factor * z

    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """The picture (B, 3, H, W) of a scaled latent, about [−1, 1], not clamped.

        Args:
            tile: side in pixels, a multiple of 4·f. Larger pictures are made of tiles that overlap by a quarter:
                memory as for one tile. As norms and attention then see only a tile, colours differ a little: with
                mini-sd's VAE, at half the side, by less than 0.07 on average (tests/test_vae.py).

        Raises:
            ValueError: the tile is no multiple of 4·f.
        """
        def whole(part: Tensor) -> Tensor:
            return self.decoder(self.post_quant_conv(part / self.config.scaling_factor))

        return tiled(whole, z, self.check_tile(tile) and tile // self.factor, self.factor)

    def check_tile(self, tile: int | None) -> int | None:
        """The tile, if it is one of `decode`'s, or None.

        Raises:
            ValueError: it is no multiple of 4·f.
        """
        if tile is not None and (not isinstance(tile, int) or tile < 1 or tile % (4 * self.factor)):
            raise ValueError(f"tile is {tile}; it must be a positive multiple of {4 * self.factor}")
        return tile

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Round trip of a picture: `decode(encode(image, noise))`."""
        return self.decode(self.encode(image, noise))

    def renamed(self, state: State) -> State:
        """Old names of the two attentions, in all published SD 1 and SD 2 folders; CompVis' names, of single files."""
        if any(key.startswith("encoder.down.") for key in state):
            plain = {k: v for k, v in state.items() if not k.startswith(("loss.", "model_ema."))}  # of its training
            return rename.to_ours(rename.vae(self.state_dict()), plain)
        names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        new = {}
        for key, value in state.items():
            head, layer, end = (["", ""] + key.rsplit(".", 2))[-3:]
            if head.endswith("attentions.0") and layer in names:
                key = f"{head}.{names[layer]}.{end}"
            new[key] = value
        return new


def tiled(net: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, factor: float) -> Tensor:
    """net(x), made of the results for square tiles that overlap by a quarter, blended linearly where they do.

    Args:
        net: a map (B, C, H, W) to one `factor` times as large. tile: side, in x, divisible by 4; None: x in one piece.

    Matches: diffusers' tiled_decode and tiled_encode, tests/parity/test_vae.py.

    >>> x = torch.rand(1, 1, 20, 8)
    >>> torch.allclose(tiled(lambda part: 2 * part, x, 8, 1), 2 * x)
    True
    """
    if not tile or max(x.shape[-2:]) <= tile:
        return net(x)
    step, overlap = 3 * tile // 4, int(tile * factor) // 4
    rows = [[net(x[..., i:i + tile, j:j + tile]) for j in range(0, x.shape[-1], step)]
            for i in range(0, x.shape[-2], step)]
    for i, row in enumerate(rows):
        for j, part in enumerate(row):
            if i:
                _blend(rows[i - 1][j], part, overlap, -2)
            if j:
                _blend(row[j - 1], part, overlap, -1)
    keep = 3 * overlap
    return torch.cat([torch.cat([part[..., :keep, :keep] for part in row], -1) for row in rows], -2)


def _blend(before: Tensor, part: Tensor, overlap: int, axis: int) -> None:
    """Fade the end of `before` into the beginning of `part`, in place."""
    n = min(overlap, before.shape[axis], part.shape[axis])
    ramp = torch.arange(n, device=part.device, dtype=part.dtype).view(-1, *[1] * (-axis - 1)) / n
    old = before.narrow(axis, before.shape[axis] - n, n)
    part.narrow(axis, 0, n).mul_(ramp).add_(old * (1 - ramp))


class Mid(nn.Module):
    """Residual block, attention over all positions, residual block."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        ch, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nn.ModuleList(ResBlock(ch, ch, None, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([MapAttention(ch, groups)] if config.mid_block_add_attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) to the same shape."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Stage(nn.Module):
    """Residual blocks at one resolution, then a change of resolution if there is one."""

    def __init__(self, ch: int, out: int, layers: int, groups: int, **resampler: nn.Module):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(out if j else ch, out, None, groups, EPS) for j in range(layers))
        self.last = list(resampler)
        for name, layer in resampler.items():                            # "downsamplers" or "upsamplers"
            self.add_module(name, nn.ModuleList([layer]))

    def forward(self, x: Tensor) -> Tensor:
        """(B,in,h,w) to (B,out,h,w), halved or doubled where the stage changes the resolution."""
        for resnet in self.resnets:
            x = resnet(x)
        for name in self.last:
            x = getattr(self, name)[0](x)
        return x


class VAEEncoder(nn.Module):
    """Picture (B, 3, H, W) to the raw moments (B, 2C, H/f, W/f)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        chs, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, chs[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (ch, out) in enumerate(zip((chs[0], *chs), chs)):
            resampler = {"downsamplers": Downsample(out, padding=0)} if i < len(chs) - 1 else {}
            self.down_blocks.append(Stage(ch, out, config.layers_per_block, groups, **resampler))
        self.mid_block = Mid(config)
        self.conv_norm_out = nn.GroupNorm(groups, chs[-1], EPS)
        self.conv_out = nn.Conv2d(chs[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B,3,H,W) to (B,2C,H/f,W/f)."""
        x = self.conv_in(x.contiguous(memory_format=FORMAT))
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class VAEDecoder(nn.Module):
    """Unscaled latent (B, C, h, w) to the picture (B, 3, f·h, f·w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        chs, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, chs[0], 3, padding=1)
        self.mid_block = Mid(config)
        self.up_blocks = nn.ModuleList()
        for i, (ch, out) in enumerate(zip((chs[0], *chs), chs)):
            resampler = {"upsamplers": Upsample(out)} if i < len(chs) - 1 else {}
            self.up_blocks.append(Stage(ch, out, config.layers_per_block + 1, groups, **resampler))
        self.conv_norm_out = nn.GroupNorm(groups, chs[-1], EPS)
        self.conv_out = nn.Conv2d(chs[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) to (B,3,f·h,f·w)."""
        x = self.mid_block(self.conv_in(x.contiguous(memory_format=FORMAT)))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))
