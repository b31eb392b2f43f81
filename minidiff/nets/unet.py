"""The U-Net of Stable Diffusion (Rombach et al., 2112.10752; SDXL: 2307.01952), diffusers' UNet2DConditionModel."""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.nets.attention import Kept, SpatialTransformer
from minidiff.nets.layers import Config, Downsample, Embedding, Net, ResBlock, Upsample, silu, sinusoid

CROSS = {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D"}
PLAIN = {"DownBlock2D", "UpBlock2D"}


@dataclasses.dataclass(frozen=True)
class UNetConfig(Config):
    """Shape of a U-Net; the defaults are diffusers', close to Stable Diffusion 1.

    Fields that are given per resolution may be one value for all; they run from the finest resolution to the coarsest.

    Args:
        sample_size: side of the training latents; information only.
        in_channels, out_channels: 4 and 4; 9 and 4 for inpainting.
        down_block_types: "CrossAttnDownBlock2D" (with attention) or "DownBlock2D", per resolution.
        up_block_types: "CrossAttnUpBlock2D" or "UpBlock2D", from the coarsest to the finest.
        mid_block_type: "UNetMidBlock2DCrossAttn", or None for no middle.
        block_out_channels: channels per resolution, divisible by `norm_num_groups`.
        layers_per_block: residual blocks per resolution on the way down; one more on the way up.
        heads: NUMBER of attention heads per resolution, in the file as `attention_head_dim` (a historic misnomer).
        transformer_layers_per_block: depth of each spatial transformer, per resolution.
        cross_attention_dim: width D of the context; None: self-attention only.
        use_linear_projection: the transformers' projections are stored as Linear (SD 2, SDXL), not as convolutions.
        norm_num_groups, norm_eps: of the residual blocks' GroupNorms.
        flip_sin_to_cos, freq_shift: of the time embedding, see `sinusoid`.
        num_class_embeds: number of classes of a class-conditional net; `vec` then holds class numbers.
        addition_embed_type: "text_time" (SDXL) or None.
        addition_time_embed_dim: width of the sinusoid of each of SDXL's sizes (256).
        projection_class_embeddings_input_dim: width of `vec` (SDXL: 2816).
        time_cond_proj_dim: width of the embedding of the guidance weight `w` (latent consistency models: 256).

    Raises:
        ValueError: an unknown block type, or numbers that do not divide each other.

    >>> UNetConfig.from_dict({"attention_head_dim": [5, 10, 20, 20]}).heads
    (5, 10, 20, 20)
    """

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    heads: int | tuple[int, ...] = 8
    transformer_layers_per_block: int | tuple[int, ...] = 1
    cross_attention_dim: int | None = 1280
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    num_class_embeds: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None

    saved: ClassVar = {"_class_name": "UNet2DConditionModel"}
    renamed: ClassVar = {"heads": "attention_head_dim"}
    default: ClassVar = {
        "act_fn": "silu", "downsample_padding": 1, "mid_block_scale_factor": 1, "resnet_time_scale_shift": "default",
        "resnet_out_scale_factor": 1, "time_embedding_type": "positional", "conv_in_kernel": 3, "conv_out_kernel": 3,
        "attention_type": "default", "addition_embed_type_num_heads": 64}
    ignored: ClassVar = frozenset({"upcast_attention"})                  # no effect on fused attention, facts: 1.4

    def __post_init__(self):
        n = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(types := getattr(self, name)) != n or set(types) - CROSS - PLAIN:
                raise ValueError(f"{name} is {types}, it needs {n} of {', '.join(sorted(CROSS | PLAIN))}")
        if self.mid_block_type not in ("UNetMidBlock2DCrossAttn", None):
            raise ValueError(f"mid_block_type is {self.mid_block_type!r}, supported: UNetMidBlock2DCrossAttn, None")
        if self.addition_embed_type not in ("text_time", None):
            raise ValueError(f"addition_embed_type is {self.addition_embed_type!r}, supported: text_time, None")
        for name in ("layers_per_block", "heads", "transformer_layers_per_block"):
            if len(self.each(name)) != n:
                raise ValueError(f"{name} is {getattr(self, name)}, it needs one value or {n}")
        for ch, heads in zip(self.block_out_channels, self.each("heads")):
            if ch % self.norm_num_groups or ch % heads:
                raise ValueError(f"{ch} channels are not divisible by {self.norm_num_groups} groups and {heads} heads")

    def each(self, name: str) -> tuple:
        """A field's value per resolution.

        >>> UNetConfig(heads=4).each("heads")
        (4, 4, 4, 4)
        """
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


class UNet(Net):
    """The network that is trained to predict eps (or v, x0, flow) from a noisy latent.

    Down through the resolutions, keeping every intermediate map; middle; up again, each residual block reading the
    last map kept (U-Net, 1505.04597). Time enters every residual block, the prompt every cross-attention.
    Matches: diffusers' UNet2DConditionModel, tests/parity/test_unet.py.

    >>> unet = UNet(UNetConfig(block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    ...     up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), heads=2, cross_attention_dim=6, norm_num_groups=4))
    >>> unet(torch.zeros(2, 4, 8, 8), 500, torch.zeros(2, 77, 6)).shape
    torch.Size([2, 4, 8, 8])
    """

    Config = UNetConfig

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        c = config
        first, last, emb = c.block_out_channels[0], c.block_out_channels[-1], 4 * c.block_out_channels[0]
        levels = list(zip(c.block_out_channels, c.each("layers_per_block"), c.each("heads"),
                          c.each("transformer_layers_per_block")))

        def attention(ch: int, heads: int, depth: int) -> SpatialTransformer:
            return SpatialTransformer(ch, heads, depth, c.cross_attention_dim, c.norm_num_groups,
                                      c.use_linear_projection)

        def resnet(ch: int, out: int) -> ResBlock:
            return ResBlock(ch, out, emb, c.norm_num_groups, c.norm_eps)

        self.conv_in = nn.Conv2d(c.in_channels, first, 3, padding=1)
        self.time_embedding = Embedding(first, emb, c.time_cond_proj_dim)
        if c.num_class_embeds:
            self.class_embedding = nn.Embedding(c.num_class_embeds, emb)
        if c.addition_embed_type:
            self.add_embedding = Embedding(c.projection_class_embeddings_input_dim, emb)

        ch, skips = first, [first]                                       # channels now, and of every map kept
        self.down_blocks = nn.ModuleList()
        for i, (kind, (out, layers, heads, depth)) in enumerate(zip(c.down_block_types, levels)):
            block = Block()
            for _ in range(layers):
                block.resnets.append(resnet(ch, out))
                if kind in CROSS:
                    block.attentions.append(attention(out, heads, depth))
                ch = out
                skips.append(ch)
            if i < len(levels) - 1:
                block.downsamplers = nn.ModuleList([Downsample(ch)])
                skips.append(ch)
            self.down_blocks.append(block)

        if c.mid_block_type:
            self.mid_block = Block()
            self.mid_block.resnets.extend([resnet(last, last), resnet(last, last)])
            self.mid_block.attentions.append(attention(last, *levels[-1][2:]))

        self.up_blocks = nn.ModuleList()
        for i, (kind, (out, layers, heads, depth)) in enumerate(zip(c.up_block_types, levels[::-1])):
            block = Block()
            for _ in range(layers + 1):
                block.resnets.append(resnet(ch + skips.pop(), out))
                if kind in CROSS:
                    block.attentions.append(attention(out, heads, depth))
                ch = out
            if i < len(levels) - 1:
                block.upsamplers = nn.ModuleList([Upsample(ch)])
            self.up_blocks.append(block)

        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, first, c.norm_eps)
        self.conv_out = nn.Conv2d(first, c.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | float, context: Tensor | Kept | None = None, vec: Tensor | None = None,
                w: Tensor | float | None = None, residuals: tuple[Tensor, ...] | None = None) -> Tensor:
        """The raw prediction.

        Args:
            x: (B, in_channels, H, W) noisy latent (in the net's own coordinates), any H and W.
            t: (B,) or one number, 0 … T−1, fractions allowed.
            context: (B, N, D) prompt embedding; `Kept(context)` where it stays the same.
            vec: (B, V) for SDXL, see `micro_conditioning`; (B,) class numbers with `num_class_embeds`; else unused.
            w: guidance weight, (B,) or one number, `guidance_scale − 1`, for latent consistency models.
            residuals: ControlNet's, one for every map kept, in order, and one for the middle.

        Returns:
            (B, out_channels, H, W)
        """
        emb = F.silu(self.embed(x, t, vec, w))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for x in block(x, emb, context):
                skips.append(x)
        if self.config.mid_block_type:
            resnet0, resnet1 = self.mid_block.resnets
            x = resnet1(self.mid_block.attentions[0](resnet0(x, emb), context), emb)
        if residuals is not None:
            skips = [skip + r for skip, r in zip(skips, residuals[:-1], strict=True)]
            x = x + residuals[-1]
        for block in self.up_blocks:
            x = block.up(x, skips, emb, context)
        return self.conv_out(silu(self.conv_norm_out(x)))

    def embed(self, x: Tensor, t: Tensor | float, vec: Tensor | None = None, w: Tensor | float | None = None) -> Tensor:
        """The vector (B or 1, 4·C0) that tells all residual blocks the time, SDXL's sizes or the class, and LCM's w."""
        c = self.config
        dtype = self.conv_in.weight.dtype
        cond = None
        if c.time_cond_proj_dim and w is not None:                       # LCM, 2310.04378: w in thousandths
            cond = sinusoid(1000.0 * _numbers(w, x), c.time_cond_proj_dim, flip=False, shift=1).to(dtype)
        time = sinusoid(_numbers(t, x), c.block_out_channels[0], flip=c.flip_sin_to_cos, shift=c.freq_shift)
        emb = self.time_embedding(time.to(dtype), cond)
        if c.num_class_embeds:
            emb = emb + self.class_embedding(vec)
        if c.addition_embed_type:
            emb = emb + self.add_embedding(vec)
        return emb


class Block(nn.Module):
    """Residual blocks at one resolution, each followed by attention if the block has any, then a change of resolution.

    The lists are filled by `UNet`.
    """

    def __init__(self):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        self.downsamplers = self.upsamplers = ()

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | Kept | None) -> list[Tensor]:
        """Down: all maps, the last one being the result."""
        maps = []
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attentions:
                x = self.attentions[j](x, context)
            maps.append(x)
        for down in self.downsamplers:
            maps.append(down(x))
        return maps

    def up(self, x: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor | Kept | None) -> Tensor:
        """Up: each residual block takes the last map kept off `skips`."""
        for j, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
            if self.attentions:
                x = self.attentions[j](x, context)
        for up in self.upsamplers:
            x = up(x, skips[-1].shape[2:])
        return x


def micro_conditioning(pooled: Tensor, sizes: Tensor, dim: int = 256) -> Tensor:
    """SDXL's vector of the pooled prompt and the picture's sizes (2307.01952 §2.2).

        [pooled, sinusoid(size) for each size]

    Args:
        pooled: (B, P), 1280 wide in SDXL.
        sizes: (B, 6): original height, width, crop top, left, target height, width (the refiner has 5).
        dim: width of each sinusoid, `addition_time_embed_dim`.

    Returns:
        (B, P + 6·dim), the `vec` of `UNet.forward`.

    >>> micro_conditioning(torch.zeros(1, 1280), torch.tensor([[1024, 1024, 0, 0, 1024, 1024]])).shape
    torch.Size([1, 2816])
    """
    flat = sinusoid(sizes.flatten(), dim).reshape(len(sizes), -1)        # (B, 6·dim)
    return torch.cat([pooled, flat.to(pooled.dtype)], dim=-1)


def _numbers(value: Tensor | float, x: Tensor) -> Tensor:
    """One number, or one for each of the batch, as (1,) or (B,) on the device of x."""
    return torch.as_tensor(value, device=x.device).reshape(-1)
