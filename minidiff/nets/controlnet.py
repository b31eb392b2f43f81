"""ControlNet (Zhang et al., 2302.05543), diffusers' ControlNetModel: a U-Net's encoder that also sees a picture."""

import dataclasses
import math
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.nets.encoder import Encoder, EncoderConfig
from minidiff.nets.unet import UNet

ORDERS = ("rgb", "bgr")


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """Shape of a ControlNet; the defaults are diffusers', close to Stable Diffusion 1.

    Args:
        in_channels … projection_class_embeddings_input_dim: see `EncoderConfig`.
        conditioning_channels: of the picture.
        conditioning_embedding_out_channels: of the convolutions that read it; each after the first halves its sides.
        controlnet_conditioning_channel_order: "rgb", or "bgr" for a net that wants the channels the other way round.
        global_pool_conditions: only the mean of each residual over the picture is used.

    Raises:
        ValueError: an unknown block type or channel order, or numbers that do not divide each other.

    >>> ControlNetConfig().factor
    8
    """

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    saved: ClassVar = {"_class_name": "ControlNetModel"}

    def __post_init__(self):
        super().__post_init__()
        if (order := self.controlnet_conditioning_channel_order) not in ORDERS:
            raise ValueError(f"controlnet_conditioning_channel_order is {order!r}, supported: {', '.join(ORDERS)}")
        if not self.conditioning_embedding_out_channels:
            raise ValueError("conditioning_embedding_out_channels is empty; it needs one number or more")

    @property
    def factor(self) -> int:
        """Pixels of the picture per side of a latent."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


class Look(nn.Module):
    """The picture at the size of the latents: 3×3 convolutions with SiLU; the last one starts at zero."""

    def __init__(self, inputs: int, channels: tuple[int, ...], out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for ch, wider in zip(channels, channels[1:]):
            self.blocks.append(nn.Conv2d(ch, ch, 3, padding=1))
            self.blocks.append(nn.Conv2d(ch, wider, 3, padding=1, stride=2))
        for conv in (self.conv_in, *self.blocks):
            # NOTE: torch's own start, which diffusers keeps, makes a picture 3·10⁻⁵ of what leaves seven of these, and
            # a net deaf for thousands of steps; 1.68² is 1/E[silu(z)²]: test_a_new_net_hears_its_picture.
            nn.init.normal_(conv.weight, std=1.68 / math.sqrt(conv.weight[0].numel()))
            nn.init.zeros_(conv.bias)
        self.conv_out = zero(nn.Conv2d(channels[-1], out, 3, padding=1))

    def forward(self, picture: Tensor) -> Tensor:
        """(B,3,H,W) in [0, 1] to (B,C,H/f,W/f)."""
        x = F.silu(self.conv_in(picture))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    """A copy of a U-Net's encoder, told by a picture what to add to the maps that the U-Net keeps.

        residual_i = zero_i(map_i(x + look(picture))),   zero_i a 1×1 convolution that starts at zero

    so that before training nothing changes (section 3.1).
    Matches: diffusers' ControlNetModel, tests/parity/test_controlnet.py.

    >>> from minidiff.nets.unet import UNetConfig
    >>> unet = UNet(UNetConfig(block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    ...     up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), heads=2, cross_attention_dim=6, norm_num_groups=4))
    >>> net, x, context = ControlNet.from_unet(unet), torch.randn(1, 4, 8, 8), torch.randn(1, 77, 6)
    >>> residuals = net(x, 500, context, hint=net.look(torch.rand(1, 3, 64, 64)))
    >>> torch.equal(unet(x, 500, context, residuals=residuals), unet(x, 500, context))
    True
    """

    Config = ControlNetConfig
    part = "controlnet"

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        c = config
        self.controlnet_cond_embedding = Look(c.conditioning_channels, c.conditioning_embedding_out_channels,
                                              c.block_out_channels[0])
        self.controlnet_down_blocks = nn.ModuleList(zero(nn.Conv2d(ch, ch, 1)) for ch in self.kept)
        self.controlnet_mid_block = zero(nn.Conv2d(self.kept[-1], self.kept[-1], 1))

    @classmethod
    def from_unet(cls, unet: UNet, channels: tuple[int, ...] = (16, 32, 96, 256)) -> Self:
        """A ControlNet to train: the encoder is copied from the U-Net, what is new starts at zero.

        Args:
            unet: stays as it is.
            channels: `conditioning_embedding_out_channels`, one more than halvings from pixels to latents.
        """
        shared = {f.name: getattr(unet.config, f.name) for f in dataclasses.fields(EncoderConfig)}
        net = cls(ControlNetConfig(**shared, conditioning_embedding_out_channels=channels))
        names = net.state_dict().keys()
        net.load_state_dict({k: v for k, v in unet.state_dict().items() if k in names}, strict=False)
        return net.to(unet.conv_in.weight)

    def look(self, picture: Tensor) -> Tensor:
        """What `forward` is told of a picture (B, conditioning_channels, f·H, f·W) in [0, 1]: a map (B, C0, H, W)."""
        flip = self.config.controlnet_conditioning_channel_order == "bgr"
        return self.controlnet_cond_embedding(picture.flip(1) if flip else picture)

    def forward(self, x: Tensor, t: Tensor | float, context: Tensor | None = None, vec: Tensor | None = None, *,
                hint: Tensor, guess: bool = False) -> tuple[Tensor, ...]:
        """The residuals of the U-Net's call with the same arguments.

        Args:
            x … vec: see `UNet.forward`; of an inpainting U-Net's x only the noisy latent.
            hint: (B, C0, H, W), `look(picture)`: it stays the same for all steps.
            guess: the finer a residual, the less it counts: times 0.1 … 1, equally spaced in their logarithms.

        Returns:
            One map for every map that the U-Net keeps, and one for the middle; with `global_pool_conditions` 1×1.
        """
        emb = F.silu(self.embed(x, t, vec))
        skips, middle = self.encode(self.conv_in(x) + hint, emb, context)
        maps = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        maps.append(self.controlnet_mid_block(middle))
        if self.config.global_pool_conditions:
            maps = [residual.mean((2, 3), keepdim=True) for residual in maps]
        elif guess:
            maps = [residual * k for residual, k in zip(maps, torch.logspace(-1, 0, len(maps)).tolist())]
        return tuple(maps)


def zero(layer: nn.Module) -> nn.Module:
    """The same layer, its parameters zero.

    >>> zero(nn.Linear(2, 1))(torch.ones(2)).item()
    0.0
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
