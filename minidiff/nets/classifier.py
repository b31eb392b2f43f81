"""A classifier of noisy pictures, the half of a U-Net: what classifier guidance asks for the way to a class."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch  # noqa: F401  (the examples use it)
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.nets.encoder import Encoder, EncoderConfig
from minidiff.nets.layers import silu
from minidiff.schedule import Level


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(EncoderConfig):
    """Shape of a classifier.

    Args:
        in_channels … projection_class_embeddings_input_dim: see `EncoderConfig`.
        num_classes: how many answers there are.
    """

    num_classes: int = 6

    saved: ClassVar = {"_class_name": "Classifier"}


class Classifier(Encoder):
    """p(y | x_t): the class that a noisy picture shows, asked together with its time (Dhariwal & Nichol 2021).

    The way down and the middle of a U-Net, averaged over positions, and one linear layer (arXiv 2105.05233, section 4;
    there the average is an attention pooling).

    >>> net = Classifier(ClassifierConfig(in_channels=3, down_block_types=("DownBlock2D",) * 2, num_classes=6,
    ...     block_out_channels=(8, 16), heads=2, norm_num_groups=4, cross_attention_dim=None))
    >>> net(torch.zeros(2, 3, 16, 16), 500).shape
    torch.Size([2, 6])
    """

    Config = ClassifierConfig

    def __init__(self, config: ClassifierConfig):
        super().__init__(config)
        ch = config.block_out_channels[-1]
        self.norm_out = nn.GroupNorm(config.norm_num_groups, ch, config.norm_eps)
        self.head = nn.Linear(ch, config.num_classes)

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        """x (B,C,H,W), a picture with the noise of time t, (B,) or one number -> logits (B, classes)."""
        _, maps = self.encode(self.conv_in(x), F.silu(self.embed(x, t)), None)
        return self.head(silu(self.norm_out(maps)).mean((2, 3)))

    def log_prob(self, y: Tensor) -> Callable[[Tensor, Level], Tensor]:
        """(x, level) -> (B,) log p(y|x) of the classes y (B,), for `minidiff.guidance.classifier_guidance`.

        The state may be in any coordinates; the classifier sees it at alpha² + sigma² = 1, where it was trained.
        """
        def of_noisy(x: Tensor, level: Level) -> Tensor:
            k = (level.alpha**2 + level.sigma**2) ** -0.5
            return self(k * x, level.t).log_softmax(1).gather(1, y[:, None])[:, 0]

        return of_noisy
