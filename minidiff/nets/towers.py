"""The two towers of CLIP (Radford et al., 2103.00020), transformers over words and over patches, and their configs.

Attribute names are parameter names, and these are those of transformers' CLIPTextModel and CLIPVisionModel.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.nets.attention import split_heads
from minidiff.nets.config import Config


def quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702x), OpenAI CLIP's approximation of GELU.

    >>> round(quick_gelu(torch.tensor(1.0)).item(), 4)
    0.8458
    """
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}
LEGACY = frozenset({  # what transformers writes besides: training, generation and housekeeping
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "attention_dropout", "dropout",
    "initializer_range", "initializer_factor", "pad_token_id", "bos_token_id", "gradient_checkpointing"})


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(Config):
    """Shape of a text tower; the defaults are transformers'. Stable Diffusion 1: 768, 3072, 12, 12.

    Args:
        vocab_size, max_position_embeddings: number of tokens, and of positions (77).
        hidden_size, intermediate_size: width of the tokens, and inside the MLP.
        num_hidden_layers, num_attention_heads: the heads divide the width.
        hidden_act: "quick_gelu" (OpenAI) or "gelu" (OpenCLIP).
        layer_norm_eps: of every LayerNorm.
        projection_dim: width of the pooled output, of the space that text and pictures share.
        eos_token_id: whose position is pooled; 2, in all published configs, stands for the largest id.
        with_projection: whether the encoder has a pooled output; `architectures` says so in the file.

    >>> CLIPTextConfig.from_dict({"architectures": ["CLIPTextModelWithProjection"]}).with_projection
    True
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    with_projection: bool = False

    # NOTE: without "dtype", transformers 5 computes in the file's float16, and diffusers' U-Net in float32: an error
    saved: ClassVar = {"model_type": "clip_text_model", "dtype": "float32"}
    ignored: ClassVar = LEGACY

    def __post_init__(self):
        _check(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From transformers' `config.json`, whose `architectures` say whether there is a projection."""
        named = values.get("architectures")
        projected = "CLIPTextModelWithProjection" in (named if isinstance(named, list | tuple) else [named])
        return super().from_dict({"with_projection": projected, **values})

    def to_dict(self) -> dict[str, Any]:
        """As transformers' `config.json` has it."""
        values = super().to_dict()
        kind = "CLIPTextModelWithProjection" if values.pop("with_projection") else "CLIPTextModel"
        return {"architectures": [kind], **values, "bos_token_id": self.eos_token_id - 1}


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(Config):
    """Shape of an image tower, a vision transformer (2010.11929); the defaults are transformers'.

    Args:
        image_size, patch_size: sides in pixels; the patch divides the picture.
        num_channels: of the picture. The other fields: see `CLIPTextConfig`.

    >>> CLIPVisionConfig(image_size=32, patch_size=4).patch_size
    4
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    saved: ClassVar = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    ignored: ClassVar = LEGACY

    def __post_init__(self):
        _check(self)


class TextTower(nn.Module):
    """Embeddings, causal transformer, final LayerNorm."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Transformer(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.eos = config.eos_token_id
        init(self, config)

    def pool(self, x: Tensor, ids: Tensor) -> Tensor:
        """The token (B, D) at the first end of text."""
        # 2 in old files means: the largest id, of those that are no words added later (textual inversion)
        known = len(self.embeddings.token_embedding.weight)
        at = ids.where(ids < known, 0).argmax(-1) if self.eos == 2 else (ids == self.eos).int().argmax(-1)
        return x[torch.arange(len(x), device=x.device), at]


class VisionTower(nn.Module):
    """Patches and a class token, transformer, the class token's LayerNorm."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # sic: the published name
        self.encoder = Transformer(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        init(self, config)

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) to (B,D)."""
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(image)))[:, 0])


class TextEmbeddings(nn.Module):
    """token_embedding[ids] + position_embedding[0 … N−1]; ids beyond the vocabulary stand for the rows of `extra`.

    `extra` (n, D) holds words that were added later (`minidiff.io.embeddings`); it is not among the saved weights.
    """

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.register_buffer("extra", None, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B,N) to (B,N,D)."""
        size = len(self.token_embedding.weight)
        tokens = self.token_embedding(ids.clamp(max=size - 1))
        if self.extra is not None:
            tokens = torch.where((ids >= size)[..., None], self.extra[(ids - size).clamp(min=0)], tokens)
        return tokens + self.position_embedding.weight[:ids.shape[1]]


class PatchEmbeddings(nn.Module):
    """[class token, patches row by row] + position embedding."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(dim))
        self.patch_embedding = nn.Conv2d(config.num_channels, dim, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, dim)

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) to (B,1 + patches,D)."""
        patches = self.patch_embedding(image).flatten(2).transpose(1, 2)             # (B, patches, D)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class Transformer(nn.Module):
    """The transformer's layers; `start` and `stop` select some of them."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None, causal: bool = False) -> Tensor:
        """(B,N,D) through the layers start … stop − 1, to the same shape."""
        for layer in list(self.layers)[start:stop]:
            x = layer(x, causal)
        return x


class Layer(nn.Module):
    """x += attention(LN1(x)); x += fc2(act(fc1(LN2(x))))."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = SelfAttention(dim, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(B,N,D) to the same shape."""
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
    """Multi-head self-attention; `causal`: each token sees itself and those before it."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(B,N,D) to the same shape."""
        q, k, v = (split_heads(y, self.heads) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, dim: int, inner: int, act: str):
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        """(…,D) to the same shape."""
        return self.fc2(self.act(self.fc1(x)))


@torch.no_grad()
def init(module: nn.Module, config: CLIPTextConfig | CLIPVisionConfig) -> None:
    """OpenAI's initialization: what writes to the residual stream is scaled down by the number of its writers."""
    std = config.hidden_size ** -0.5
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            p.zero_()
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            p.normal_(std=std * (2 * config.num_hidden_layers) ** -0.5)
        elif name.endswith("fc1.weight"):
            p.normal_(std=std * 2 ** -0.5)
        elif name.endswith("embedding.weight"):                          # tokens, positions, patches
            p.normal_(std=0.02)
        elif "norm" not in name and "layr" not in name:                  # q, k, v, class token, projections
            p.normal_(std=std)


def _check(config: CLIPTextConfig | CLIPVisionConfig) -> None:
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {config.hidden_act!r}, supported are {', '.join(ACTIVATIONS)}")
    if min(config.num_attention_heads, config.hidden_size) < 1 or config.hidden_size % config.num_attention_heads:
        raise ValueError(f"{config.num_attention_heads} heads do not divide the width {config.hidden_size}")
