"""The network of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206), diffusers' SD3Transformer2DModel.

Picture and prompt are two streams of tokens with weights of their own, which meet in one attention. The pieces are
those of `minidiff.nets.dit`; attribute names are parameter names, and these are diffusers'.
"""

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.nets.attention import split_heads, spread
from minidiff.nets.config import Config
from minidiff.nets.dit import MLP, AdaNorm, PatchEmbed, begin, modulated, unpatched, zero
from minidiff.nets.layers import Embedding, Net, sinusoid


@dataclasses.dataclass(frozen=True)
class MMDiTConfig(Config):
    """Shape of a joint transformer; the defaults are diffusers'.

    Stable Diffusion 3 medium has 24 layers and heads, a width of 1536 for the prompt and a table of 192; 3.5 medium a
    table of 384, "rms_norm" and dual attention in the first 13 layers; 3.5 large 38, 2432, 192 and "rms_norm".

    Raises:
        ValueError: numbers that do not fit each other.

    >>> MMDiTConfig(num_layers=24, num_attention_heads=24, caption_projection_dim=1536).dim
    1536
    """

    sample_size: int = 128                                   # side of the training latents
    patch_size: int = 2
    in_channels: int = 16                                    # those of the latents
    out_channels: int | None = 16                            # None: in_channels
    num_layers: int = 18
    num_attention_heads: int = 18
    attention_head_dim: int = 64
    joint_attention_dim: int = 4096                          # width of the prompt's embedding
    caption_projection_dim: int = 1152                       # its width inside: that of the tokens
    pooled_projection_dim: int = 2048                        # width of the pooled prompt
    pos_embed_max_size: int = 96                             # side of the table of positions, in patches
    qk_norm: str | None = None                               # "rms_norm": of queries and keys
    dual_attention_layers: tuple[int, ...] = ()              # blocks in which the picture also attends to itself alone

    saved: ClassVar = {"_class_name": "SD3Transformer2DModel"}

    def __post_init__(self):
        for name in ("sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads",
                     "attention_head_dim", "joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dim % 4 or self.caption_projection_dim != self.dim:
            raise ValueError(f"{self.num_attention_heads} heads of {self.attention_head_dim} are {self.dim} channels; "
                             "they must be a multiple of 4, and caption_projection_dim, "
                             f"{self.caption_projection_dim}, as many")
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}, supported: rms_norm, None")
        if self.sample_size % self.patch_size or self.sample_size // self.patch_size > self.pos_embed_max_size:
            raise ValueError(f"a side of {self.sample_size} is not tiled by patches of {self.patch_size}, or they are "
                             f"more than {self.pos_embed_max_size}, the positions of the table")

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim


class MMDiT(Net):
    """Predicts the velocity eps − x0 of a noisy latent at t = 1000·sigma, from it, the prompt and the pooled prompt.

        c = MLP(sinusoid(t)) + MLP(pooled);   N joint blocks, steered by c;   LN(x)·(1 + scale) + shift, Linear

    Matches: diffusers' SD3Transformer2DModel, tests/parity/test_mmdit.py.

    >>> shape = MMDiTConfig(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8,
    ...     joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=5, pos_embed_max_size=6)
    >>> MMDiT(shape)(torch.zeros(2, 16, 8, 12), 500.0, torch.zeros(2, 7, 6), torch.zeros(2, 5)).shape
    torch.Size([2, 16, 8, 12])
    """

    Config = MMDiTConfig

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        c, p = config, config.patch_size
        self.pos_embed = PatchEmbed(c.in_channels, c.dim, p, c.sample_size // p, c.pos_embed_max_size)
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": Embedding(256, c.dim),
                                              "text_embedder": Embedding(c.pooled_projection_dim, c.dim)})
        self.context_embedder = nn.Linear(c.joint_attention_dim, c.dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(c, dual=i in c.dual_attention_layers, last=i == c.num_layers - 1) for i in range(c.num_layers))
        self.norm_out = AdaNorm(c.dim, 2)
        self.proj_out = nn.Linear(c.dim, p * p * (c.out_channels or c.in_channels))
        begin(self)
        zero(self.proj_out)

    def forward(self, x: Tensor, t: Tensor | float, context: Tensor, vec: Tensor) -> Tensor:
        """The raw prediction.

        Args:
            x: (B, in_channels, H, W) noisy latent, sides that patches tile, at most as many as the table has.
            t: (B,) or one number, 0 … 1000, fractions matter.
            context: (B, N, D) prompt embedding; with k·B rows, k prompts for each x.
            vec: (B, P) pooled prompt, as many rows.

        Returns:
            (B, out_channels, H, W), or k·B rows
        """
        x = spread(x, context)
        height, width = (side // self.config.patch_size for side in x.shape[2:])
        y, text = self.pos_embed(x), self.context_embedder(context)
        time = sinusoid(torch.as_tensor(t, device=x.device).reshape(-1), 256).to(x)
        emb = self.time_text_embed["timestep_embedder"](time) + self.time_text_embed["text_embedder"](vec)
        for block in self.transformer_blocks:
            y, text = block(y, text, emb)
        scale, shift = self.norm_out(emb)                                # NOTE: the other way round than in a block
        return unpatched(self.proj_out(modulated(y, shift, scale)), height, width, self.config.patch_size)


class JointBlock(nn.Module):
    """Two streams, each normalized, steered and with an MLP of its own; one attention over the tokens of both.

    Args:
        dual: the picture also attends to itself alone. last: of the prompt only keys and values are used, it ends here.
    """

    def __init__(self, config: MMDiTConfig, dual: bool, last: bool):
        super().__init__()
        c = config
        self.norm1, self.norm1_context = AdaNorm(c.dim, 9 if dual else 6), AdaNorm(c.dim, 2 if last else 6)
        self.attn = JointAttention(c, ("to_out",) if last else ("to_out", "to_add_out"))
        if dual:
            self.attn2 = JointAttention(c, ("to_out",), joint=False)
        self.ff = MLP(c.dim)
        if not last:
            self.ff_context = MLP(c.dim)
        self.dual, self.last = dual, last

    def forward(self, x: Tensor, text: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the picture x (B,M,dim) and of the prompt (B,N,dim), and what they are told (B,dim), to both."""
        shift, scale, gate, shift1, scale1, gate1, *more = self.norm1(emb)
        if self.last:
            scale_t, shift_t = self.norm1_context(emb)                   # NOTE: the other way round
        else:
            shift_t, scale_t, gate_t, shift1_t, scale1_t, gate1_t = self.norm1_context(emb)
        seen, read = self.attn(modulated(x, shift, scale), modulated(text, shift_t, scale_t))
        add = gate[:, None] * seen
        if self.dual:                                                    # on the same x, before the line above is added
            shift2, scale2, gate2 = more
            add = add + gate2[:, None] * self.attn2(modulated(x, shift2, scale2))[0]
        x = x + add
        x = x + gate1[:, None] * self.ff(modulated(x, shift1, scale1))
        if not self.last:
            text = text + gate_t[:, None] * read
            text = text + gate1_t[:, None] * self.ff_context(modulated(text, shift1_t, scale1_t))
        return x, text


class JointAttention(nn.Module):
    """Attention over the tokens of both streams, with queries, keys, values and outputs of their own.

    Args:
        outs: the outputs there are: "to_out" of the picture, "to_add_out" of the prompt.
        joint: whether there is a prompt.
    """

    def __init__(self, config: MMDiTConfig, outs: tuple[str, ...], joint: bool = True):
        super().__init__()
        dim, self.heads, self.joint = config.dim, config.num_attention_heads, joint
        streams = ("to_{}", "add_{}_proj") if joint else ("to_{}",)
        for stream in streams:
            for what in "qkv":
                setattr(self, stream.format(what), nn.Linear(dim, dim))
        if config.qk_norm:
            for name in ("norm_q", "norm_k", *(("norm_added_q", "norm_added_k") if joint else ())):
                setattr(self, name, nn.RMSNorm(config.attention_head_dim, eps=1e-6))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])               # a list only for its name, to_out.0
        if "to_add_out" in outs:
            self.to_add_out = nn.Linear(dim, dim)
        self.normed = bool(config.qk_norm)

    def forward(self, x: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (B,M,dim), text (B,N,dim), to the same; None for a prompt that goes no further."""
        q, k, v = self.heads_of(x, "to_{}", "norm_{}")
        if text is not None:
            more = self.heads_of(text, "add_{}_proj", "norm_added_{}")
            q, k, v = (torch.cat(pair, 2) for pair in zip((q, k, v), more))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)       # (B, M + N, dim)
        of_x, of_text = seen[:, :x.shape[1]], seen[:, x.shape[1]:]
        return self.to_out[0](of_x), self.to_add_out(of_text) if hasattr(self, "to_add_out") else None

    def heads_of(self, tokens: Tensor, linear: str, norm: str) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, N, dim/heads) of a stream, by the names of its layers."""
        q, k, v = (split_heads(getattr(self, linear.format(what))(tokens), self.heads) for what in "qkv")
        if self.normed:
            q, k = getattr(self, norm.format("q"))(q), getattr(self, norm.format("k"))(k)
        return q, k, v
