"""The half of Stable Diffusion's U-Net that it shares with ControlNet: time, the way down, the middle (2112.10752)."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidiff.io import rename
from minidiff.io.weights import State
from minidiff.nets.attention import SpatialTransformer, spread
from minidiff.nets.config import Config
from minidiff.nets.layers import Downsample, Embedding, Net, ResBlock, sinusoid

CROSS = {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D"}
PLAIN = {"DownBlock2D", "UpBlock2D"}
MIDDLES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclasses.dataclass(frozen=True)
class EncoderConfig(Config):
    """Shape of the way down; the defaults are diffusers', close to Stable Diffusion 1.

    Fields that are given per resolution may be one value for all; they run from the finest resolution to the coarsest.

    Raises:
        ValueError: an unknown block type, or numbers that do not divide each other.

    >>> EncoderConfig.from_dict({"attention_head_dim": [5, 10, 20, 20]}).heads
    (5, 10, 20, 20)
    """

    in_channels: int = 4                                     # 9 for inpainting
    # "CrossAttnDownBlock2D", with attention, or "DownBlock2D"
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"   # or "UNetMidBlock2D", one residual block; None: no middle
    # divisible by norm_num_groups
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2              # residual blocks per resolution; one more on the way up
    heads: int | tuple[int, ...] = 8                         # their NUMBER; attention_head_dim in files, a misnomer
    transformer_layers_per_block: int | tuple[int, ...] = 1  # depth of each spatial transformer
    cross_attention_dim: int | None = 1280                   # width D of the context; None: self-attention only
    use_linear_projection: bool = False                      # projections of transformers are Linear (SD 2, SDXL)
    norm_num_groups: int = 32                                # of the residual blocks' GroupNorms
    norm_eps: float = 1e-5                                   # added to the variance there
    flip_sin_to_cos: bool = True                             # of the time embedding, see `sinusoid`
    freq_shift: int = 0                                      # of its frequencies
    num_class_embeds: int | None = None                      # vec then holds class numbers
    addition_embed_type: str | None = None                   # "text_time" in SDXL
    addition_time_embed_dim: int | None = None               # width of the sinusoid of each of SDXL's sizes (256)
    projection_class_embeddings_input_dim: int | None = None  # width of vec (SDXL: 2816)

    time_cond_proj_dim: ClassVar[int | None] = None                      # a field of the whole U-Net only
    renamed: ClassVar = {"heads": "attention_head_dim"}
    default: ClassVar = {
        "act_fn": "silu", "downsample_padding": 1, "mid_block_scale_factor": 1, "resnet_time_scale_shift": "default",
        "resnet_out_scale_factor": 1, "time_embedding_type": "positional", "conv_in_kernel": 3, "conv_out_kernel": 3,
        "attention_type": "default", "addition_embed_type_num_heads": 64}
    ignored: ClassVar = frozenset({"upcast_attention"})                  # no effect on fused attention

    def __post_init__(self):
        n = len(self.block_out_channels)
        self.check_blocks("down_block_types")
        if self.mid_block_type not in MIDDLES:
            raise ValueError(f"mid_block_type is {self.mid_block_type!r}, supported: {', '.join(map(str, MIDDLES))}")
        if self.addition_embed_type not in ("text_time", None):
            raise ValueError(f"addition_embed_type is {self.addition_embed_type!r}, supported: text_time, None")
        sizes = (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        if self.addition_embed_type and not (all(sizes) and sizes[0] % 2 == 0):
            raise ValueError(f"addition_time_embed_dim and projection_class_embeddings_input_dim are {sizes}; "
                             "addition_embed_type needs both, the first of them even")
        for name in ("layers_per_block", "heads", "transformer_layers_per_block"):
            if len(self.each(name)) != n:
                raise ValueError(f"{name} is {getattr(self, name)}, it needs one value or {n}")
        for ch, heads in zip(self.block_out_channels, self.each("heads")):
            if min(ch, heads, self.norm_num_groups) < 1 or ch % self.norm_num_groups or ch % heads:
                raise ValueError(f"{ch} channels are not divisible by {self.norm_num_groups} groups and {heads} heads")

    def check_blocks(self, name: str) -> None:
        """Raise ValueError unless the field names one supported block type per resolution."""
        n, types = len(self.block_out_channels), getattr(self, name)
        if len(types) != n or set(types) - CROSS - PLAIN:
            raise ValueError(f"{name} is {types}, it needs {n} of {', '.join(sorted(CROSS | PLAIN))}")

    def each(self, name: str) -> tuple:
        """A field's value per resolution.

        >>> EncoderConfig(heads=4).each("heads")
        (4, 4, 4, 4)
        """
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def pooled(self) -> int | None:
        """The width of the pooled prompt, which `vec` holds beside six sizes; None without it."""
        return self.projection_class_embeddings_input_dim - 6 * self.addition_time_embed_dim if \
            self.addition_embed_type else None

    def resnet(self, ch: int, out: int) -> ResBlock:
        """A residual block of this net."""
        return ResBlock(ch, out, 4 * self.block_out_channels[0], self.norm_num_groups, self.norm_eps)

    def attention(self, level: int) -> SpatialTransformer:
        """A spatial transformer at a resolution: 0 is the finest, −1 the coarsest."""
        return SpatialTransformer(self.block_out_channels[level], self.each("heads")[level],
                                  self.each("transformer_layers_per_block")[level], self.cross_attention_dim,
                                  self.norm_num_groups, self.use_linear_projection)


class Encoder(Net):
    """Down through the resolutions, keeping every intermediate map, and through the middle."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        c = config
        ch, emb = c.block_out_channels[0], 4 * c.block_out_channels[0]
        self.conv_in = nn.Conv2d(c.in_channels, ch, 3, padding=1)
        self.time_embedding = Embedding(ch, emb, c.time_cond_proj_dim)
        if c.num_class_embeds:
            self.class_embedding = nn.Embedding(c.num_class_embeds, emb)
        if c.addition_embed_type:
            self.add_embedding = Embedding(c.projection_class_embeddings_input_dim, emb)

        self.kept = [ch]                                                 # channels of every map kept
        self.down_blocks = nn.ModuleList()
        for i, (kind, out) in enumerate(zip(c.down_block_types, c.block_out_channels)):
            block = Block()
            for _ in range(c.each("layers_per_block")[i]):
                block.resnets.append(c.resnet(ch, out))
                if kind in CROSS:
                    block.attentions.append(c.attention(i))
                ch = out
                self.kept.append(ch)
            if i < len(c.block_out_channels) - 1:
                block.downsamplers = nn.ModuleList([Downsample(ch)])
                self.kept.append(ch)
            self.down_blocks.append(block)

        if c.mid_block_type:
            self.mid_block = Block()
            self.mid_block.resnets.append(c.resnet(ch, ch))
            if c.mid_block_type == MIDDLES[0]:
                self.mid_block.resnets.append(c.resnet(ch, ch))
                self.mid_block.attentions.append(c.attention(-1))

    def checkpointing(self, on: bool = True) -> None:
        """Train in less memory: what is inside residual blocks and transformers is not kept for the backward pass but
        made again (Chen et al. 2016, arXiv 1604.06174). Values and gradients are the same.
        """
        for block in self.modules():
            if isinstance(block, Block):
                block.again = on

    def renamed(self, state: State) -> State:
        """Accept CompVis' names, of single files."""
        theirs = any(key.startswith("input_blocks.") for key in state)
        return rename.to_ours(rename.unet(self.state_dict()), state) if theirs else state

    def encode(self, x: Tensor, emb: Tensor, context: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """From `conv_in`'s output to every map kept, the first being x itself, and the middle's; see `UNet.forward`."""
        skips = [x := spread(x, emb)]
        for block in self.down_blocks:
            for x in block(x, emb, context):
                skips.append(x)
        x = self.mid_block.middle(x, emb, context) if self.config.mid_block_type else x
        return [spread(skip, context) for skip in skips], spread(x, context)

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

    The lists are filled by `Encoder` and `UNet`.
    """

    again = False  # see `Encoder.checkpointing`

    def __init__(self):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        self.downsamplers = self.upsamplers = ()

    def part(self, net: nn.Module, *args: Tensor | None) -> Tensor:
        """net(*args), which for the backward pass keeps its maps, or makes them again."""
        return checkpoint(net, *args, use_reentrant=False) if self.again and torch.is_grad_enabled() else net(*args)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> list[Tensor]:
        """Down: all maps, the last one being the result."""
        maps = []
        for j, resnet in enumerate(self.resnets):
            x = self.part(resnet, x, emb)
            if self.attentions:
                x = self.part(self.attentions[j], x, context)
            maps.append(x)
        for down in self.downsamplers:
            maps.append(down(x))
        return maps

    def middle(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        """Residual blocks with attention between them."""
        x = self.part(self.resnets[0], x, emb)
        for attention, resnet in zip(self.attentions, self.resnets[1:]):
            x = self.part(resnet, self.part(attention, x, context), emb)
        return x

    def up(self, x: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor | None) -> Tensor:
        """Up: each residual block takes the last map kept off `skips`."""
        for j, resnet in enumerate(self.resnets):
            x = self.part(resnet, torch.cat([x, skips.pop()], dim=1), emb)
            if self.attentions:
                x = self.part(self.attentions[j], x, context)
        for up in self.upsamplers:
            x = up(x, skips[-1].shape[2:])
        return x


def _numbers(value: Tensor | float, x: Tensor) -> Tensor:
    """One number, or one for each of the batch, as (1,) or (B,) on the device of x."""
    return torch.as_tensor(value, device=x.device).reshape(-1)
