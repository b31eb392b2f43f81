"""A small convolutional net with an answer for every patch of a picture: two jobs in the training of a VAE."""

import dataclasses
from typing import ClassVar

import torch  # noqa: F401  (the examples use it)
from torch import Tensor, nn

from minidiff.nets.config import Config
from minidiff.nets.layers import Net, silu


@dataclasses.dataclass(frozen=True)
class PatchesConfig(Config):
    """Shape of the net.

    Args:
        in_channels: of the picture.
        block_out_channels: channels after each convolution; every one halves the side.
        out_channels: numbers in an answer.
        norm_num_groups: groups of every GroupNorm; there is none after the first convolution.
    """

    in_channels: int = 3
    block_out_channels: tuple[int, ...] = (32, 64, 96)
    out_channels: int = 1
    norm_num_groups: int = 8

    saved: ClassVar = {"_class_name": "Patches"}


class Patches(Net):
    """Strided convolutions and a linear answer at every place (the PatchGAN of Isola et al. 2017, arXiv 1611.07004).

    With one answer it is the discriminator that tells decoded patches from real ones (`train.losses.hinge`). Trained to
    name what a picture shows, its maps measure how far two pictures look apart (`train.losses.perceptual`).

    >>> logits, maps = Patches(PatchesConfig(block_out_channels=(8, 16)))(torch.zeros(1, 3, 64, 64))
    >>> logits.shape, [m.shape[1] for m in maps]
    (torch.Size([1, 1, 16, 16]), [8, 16])
    """

    Config = PatchesConfig

    def __init__(self, config: PatchesConfig):
        super().__init__(config)
        chs = (config.in_channels, *config.block_out_channels)
        self.convs = nn.ModuleList(nn.Conv2d(ch, out, 4, 2, 1) for ch, out in zip(chs, chs[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(config.norm_num_groups, ch) for ch in chs[2:])
        self.conv_out = nn.Conv2d(chs[-1], config.out_channels, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """image (B,3,H,W) in [−1, 1] -> answers (B, out_channels, H/2ⁿ, W/2ⁿ), and the maps after every convolution."""
        x, maps = image, []
        for i, conv in enumerate(self.convs):
            x = silu(self.norms[i - 1](conv(x)) if i else conv(x))
            maps.append(x)
        return self.conv_out(x), maps
