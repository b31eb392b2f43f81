"""CLIP (Radford et al., 2103.00020): the text encoder of Stable Diffusion, and both towers for contrastive training.

Parameter names are those of transformers' CLIPModel, CLIPTextModelWithProjection and CLIPVisionModel.
"""

import dataclasses
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.io import rename
from minidiff.io.weights import State
from minidiff.nets.config import Config
from minidiff.nets.layers import Blank, Net
from minidiff.nets.towers import LEGACY, CLIPTextConfig, CLIPVisionConfig, TextTower, VisionTower, init


@dataclasses.dataclass(frozen=True)
class CLIPConfig(Config):
    """Both towers. In the file one `projection_dim` holds for both; here it is the text tower's.

    >>> CLIPConfig.from_dict({"projection_dim": 64}).text_config.projection_dim
    64
    """

    text_config: CLIPTextConfig
    vision_config: CLIPVisionConfig

    saved: ClassVar = {"model_type": "clip", "architectures": ["CLIPModel"]}
    ignored: ClassVar = LEGACY | {"logit_scale_init_value"}              # the value itself is a parameter

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From transformers' `config.json`, where both towers are dictionaries of their own."""
        values = dict(values)
        dim = {"projection_dim": values.pop("projection_dim", 512)}
        text = CLIPTextConfig.from_dict({**(values.pop("text_config", None) or {}), **dim})
        vision = CLIPVisionConfig.from_dict({**(values.pop("vision_config", None) or {}), **dim})
        return super().from_dict({**values, "text_config": text, "vision_config": vision})

    def to_dict(self) -> dict[str, Any]:
        """As transformers' `config.json` has it."""
        return {**self.saved, "projection_dim": self.text_config.projection_dim,
                "text_config": self.text_config.to_dict(), "vision_config": self.vision_config.to_dict()}


class CLIPText(Net):
    """CLIP's text encoder: token ids to the context that Stable Diffusion's U-Net attends to.

    Pre-norm transformer with causal attention; padding tokens are read like any others.
    Matches: transformers' CLIPTextModel and CLIPTextModelWithProjection, tests/parity/test_clip.py.

    >>> text = CLIPText(CLIPTextConfig(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    ...                                num_attention_heads=2, eos_token_id=98))
    >>> context, pooled = text(torch.tensor([[97, 5, 6, 98]]))
    >>> context.shape, pooled
    (torch.Size([1, 4, 16]), None)
    """

    Config = CLIPTextConfig
    part = "text_encoder"
    stem = "model"

    def __init__(self, config: CLIPTextConfig):
        super().__init__(config)
        self.text_model = TextTower(config)
        if config.with_projection:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
            init(self.text_projection, config)

    def forward(self, ids: Tensor, clip_skip: int = 0, *, norm: bool = True) -> tuple[Tensor, Tensor | None]:
        """Encode token ids.

        Args:
            ids: (B, N) int64, N ≤ 77.
            clip_skip: leave out so many of the last layers for the context (SDXL always leaves out one more).
            norm: whether the context goes through the final LayerNorm (SD 1 and 2; SDXL: False).

        Returns:
            context (B, N, D); pooled (B, P), the projected, normed end-of-text token of the last layer, or None
            where the config has no projection.

        Raises:
            ValueError: clip_skip is negative or leaves no layer.
        """
        tower = self.text_model
        layers = len(tower.encoder.layers)
        if not 0 <= clip_skip < layers:
            raise ValueError(f"clip_skip is {clip_skip}, but the text encoder has {layers} layers: 0 … {layers - 1}")
        x = tower.encoder(tower.embeddings(ids), stop=layers - clip_skip, causal=True)
        context = tower.final_layer_norm(x) if norm else x
        if not self.config.with_projection:
            return context, None
        last = tower.encoder(x, start=layers - clip_skip, causal=True)
        return context, self.text_projection(tower.pool(tower.final_layer_norm(last), ids))

    def renamed(self, state: State) -> State:
        """Accept files without the `text_model.` level (transformers ≥ 5.6), with `position_ids` (older ones), and
        OpenCLIP's, which have a projection and a scale that may not be used, in Stable Diffusion 2 one more layer too.
        """
        if "positional_embedding" in state:
            more = (f"transformer.resblocks.{self.config.num_hidden_layers}.", "logit_scale", "attn_mask",
                    *(() if self.config.with_projection else ("text_projection",)))
            used = {k: v for k, v in state.items() if not k.startswith(more)}
            return rename.to_ours(rename.openclip(self.state_dict()), used)
        outside = ("text_model.", "text_projection.")
        return {k if k.startswith(outside) else f"text_model.{k}": v for k, v in _without_position_ids(state).items()}


class CLIPVision(Net):
    """CLIP's image encoder: a vision transformer whose class token is pooled.

    Matches: transformers' CLIPVisionModel, tests/parity/test_clip.py.

    >>> vision = CLIPVision(CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                                      num_attention_heads=2, image_size=8, patch_size=4))
    >>> vision(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 16])
    """

    Config = CLIPVisionConfig
    stem = "model"

    def __init__(self, config: CLIPVisionConfig):
        super().__init__(config)
        self.vision_model = VisionTower(config)

    def forward(self, image: Tensor) -> Tensor:
        """Pooled features (B, D) of pictures (B, 3, S, S)."""
        return self.vision_model(image)

    def renamed(self, state: State) -> State:
        """The tensors of a file under our names."""
        return _without_position_ids(state)


class CLIP(Net):
    """Both towers, projected into one space and trained to agree (2103.00020, figure 3).

        logits = exp(logit_scale) · encode_image(img) @ encode_text(ids).T

    Matches: transformers' CLIPModel, tests/parity/test_clip.py.

    >>> small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    >>> clip = CLIP(CLIPTextConfig(vocab_size=9, eos_token_id=8, **small),
    ...             CLIPVisionConfig(image_size=8, patch_size=4, **small))
    >>> clip.encode_text(torch.tensor([[7, 1, 8]])).shape, clip.encode_image(torch.zeros(2, 3, 8, 8)).shape
    (torch.Size([1, 8]), torch.Size([2, 8]))
    """

    Config = CLIPConfig
    stem = "model"

    def __init__(self, text_config: CLIPTextConfig, vision_config: CLIPVisionConfig):
        super().__init__(CLIPConfig(text_config, vision_config))
        self.text_model = TextTower(text_config)
        self.vision_model = VisionTower(vision_config)
        self.text_projection = nn.Linear(text_config.hidden_size, text_config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision_config.hidden_size, text_config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))            # log(1/0.07), 2103.00020 §2.5
        init(self.text_projection, text_config)
        init(self.visual_projection, vision_config)

    @classmethod
    def build(cls, config: CLIPConfig) -> Self:
        """A net of this shape, with random weights."""
        return cls(config.text_config, config.vision_config)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Unit vectors (B, P) of token ids (B, N)."""
        tower = self.text_model
        x = tower.final_layer_norm(tower.encoder(tower.embeddings(ids), causal=True))
        return F.normalize(self.text_projection(tower.pool(x, ids)), dim=-1)

    def encode_image(self, image: Tensor) -> Tensor:
        """Unit vectors (B, P) of pictures (B, 3, S, S)."""
        return F.normalize(self.visual_projection(self.vision_model(image)), dim=-1)

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """`(encode_text(ids), encode_image(image))`."""
        return self.encode_text(ids), self.encode_image(image)

    def text_encoder(self) -> CLIPText:
        """The text tower alone, as Stable Diffusion uses it; it shares this model's parameters."""
        with torch.device("meta"), Blank():
            text = CLIPText(dataclasses.replace(self.config.text_config, with_projection=False))
        text.text_model = self.text_model
        return text

    def renamed(self, state: State) -> State:
        """The tensors of a file under our names."""
        return _without_position_ids(state)


def _without_position_ids(state: State) -> State:
    """Older files store 0, 1, 2 … as a buffer."""
    return {k: v for k, v in state.items() if not k.endswith(".position_ids")}
