"""The U-Net of Stable Diffusion (Rombach et al., 2112.10752; SDXL: 2307.01952), diffusers' UNet2DConditionModel."""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.nets.encoder import CROSS, Block, Encoder, EncoderConfig
from minidiff.nets.layers import Upsample, silu, sinusoid


@dataclasses.dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """Shape of a U-Net; the defaults are diffusers', close to Stable Diffusion 1.

    What is not here is explained in `EncoderConfig`.

    Raises:
        ValueError: an unknown block type, numbers that do not divide each other, or another number of sides.

    >>> UNetConfig.from_dict({"attention_head_dim": [5, 10, 20, 20]}).heads
    (5, 10, 20, 20)
    """

    sample_size: int | tuple[int, ...] | None = None         # of the training latents, one or two; information only
    out_channels: int = 4                                    # those of the latents
    # "CrossAttnUpBlock2D" or "UpBlock2D"; from the coarsest resolution to the finest
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    time_cond_proj_dim: int | None = None                    # width of the embedding of w, the guidance weight (LCM)

    saved: ClassVar = {"_class_name": "UNet2DConditionModel"}

    def __post_init__(self):
        super().__post_init__()
        self.check_blocks("up_block_types")
        if isinstance(self.sample_size, tuple) and len(self.sample_size) != 2:
            raise ValueError(f"sample_size is {self.sample_size}, it needs one side, or height and width")

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the training latents.

        Raises:
            ValueError: the config does not say.

        >>> UNetConfig(sample_size=(8, 6)).sides, UNetConfig(sample_size=8).sides
        ((8, 6), (8, 8))
        """
        if self.sample_size is None:
            raise ValueError("the U-Net's config has no sample_size: give height and width")
        return self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,) * 2


class UNet(Encoder):
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
    part = "unet"

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        c = config
        ch, skips, coarsest = c.block_out_channels[-1], list(self.kept), len(c.block_out_channels) - 1
        self.up_blocks = nn.ModuleList()
        for level, kind in zip(range(coarsest, -1, -1), c.up_block_types):
            block = Block()
            for _ in range(c.each("layers_per_block")[level] + 1):
                block.resnets.append(c.resnet(ch + skips.pop(), c.block_out_channels[level]))
                if kind in CROSS:
                    block.attentions.append(c.attention(level))
                ch = c.block_out_channels[level]
            if level > 0:
                block.upsamplers = nn.ModuleList([Upsample(ch)])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, ch, c.norm_eps)
        self.conv_out = nn.Conv2d(ch, c.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | float, context: Tensor | None = None, vec: Tensor | None = None,
                w: Tensor | float | None = None, residuals: tuple[Tensor, ...] | None = None) -> Tensor:
        """The raw prediction.

        Args:
            x: (B, in_channels, H, W) noisy latent (in the net's own coordinates), any H and W.
            t: (B,) or one number, 0 … T−1, fractions allowed.
            context: (B, N, D) prompt embedding. With k·B rows, k prompts for each x, what comes before the first of
                them enters is computed once for all k (if t is one number).
            vec: (B, V) for SDXL, see `micro_conditioning`; (B,) class numbers with `num_class_embeds`; else unused.
            w: guidance weight, (B,) or one number, `guidance_scale − 1`, for latent consistency models.
            residuals: ControlNet's, one for every map kept, in order, and one for the middle.

        Returns:
            (B, out_channels, H, W), or k·B rows
        """
        emb = F.silu(self.embed(x, t, vec, w))
        skips, x = self.encode(self.conv_in(x), emb, context)
        if residuals is not None:
            skips = [skip + r for skip, r in zip(skips, residuals[:-1], strict=True)]
            x = x + residuals[-1]
        for block in self.up_blocks:
            x = block.up(x, skips, emb, context)
        return self.conv_out(silu(self.conv_norm_out(x)))


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
