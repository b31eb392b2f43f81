"""Whether a run fits into memory: an estimate before it starts, and what to switch on if it does not."""
from __future__ import annotations

import psutil
import torch
from torch import nn

from minidiff.nets.encoder import CROSS
from minidiff.nets.unet import UNetConfig
from minidiff.nets.vae import VAEConfig

MEGAPIXEL = 2**20  # pixels that the VAE decodes at once, but one picture at least


def unet_numbers(config: UNetConfig) -> int:
    """How many numbers a U-Net holds at its peak, per picture and position of the latent; weights not counted.

        max over levels l with attention of 24·C_l/4^l + Σ_{j<l} 3·C_j/4^j

    16·C_l are those inside GEGLU (8 + 4 + 4), the others maps kept. Within 10 %: tests/test_memory.py.

    >>> unet_numbers(UNetConfig())             # Stable Diffusion 1: 120 MiB in float32 for 64×64
    7680
    """
    peaks, kept = [], 0
    for level, (kind, ch) in enumerate(zip(config.down_block_types, config.block_out_channels)):
        peaks.append((24 if kind in CROSS else 8) * ch // 4**level + kept)
        kept += 3 * ch // 4**level
    return max(peaks)


def vae_numbers(config: VAEConfig) -> int:
    """How many numbers a VAE's decoder holds at its peak, per pixel: max(5·C_0, 3·C_1). Within 10 %, as above.

    >>> vae_numbers(VAEConfig(block_out_channels=(128, 256, 512, 512)))      # 768 MiB in float32 for 512×512
    768
    """
    first, second, *_ = (*config.block_out_channels, 0)
    return max(5 * first, 3 * second) if second else 8 * first


def weights(net: nn.Module) -> int:
    """Bytes of a network's parameters.

    >>> weights(nn.Linear(10, 10, bias=False))
    400
    """
    return sum(p.numel() * p.element_size() for p in net.parameters())


def free(device: torch.device) -> int | None:
    """Bytes that a device has left for us; None where the system does not say.

    >>> found = free(torch.device("cpu")); found is None or found > 0
    True
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - \
            torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available if device.type == "cpu" else None


def check(unet: nn.Module, vae: nn.Module, device: torch.device, *, rows: int, pictures: int, sides: tuple[int, int],
          tile: int | None, offloaded: bool) -> None:
    """ValueError unless what a run will hold at its peak fits into what is free, before anything is computed.

    Args:
        rows: of the U-Net's batch, guidance included. pictures: to decode. sides: height and width in pixels.
        tile: as in `VAE.decode`. offloaded: whether the weights come to the device only to work.
    """
    left = free(device)
    pixels = sides[0] * sides[1]
    decoded = min(tile**2, pixels) if tile else pixels * max(1, min(pictures, MEGAPIXEL // pixels))
    unet_item, vae_item = (next(net.parameters()).element_size() for net in (unet, vae))
    need = {"U-Net": unet_numbers(unet.config) * rows * pixels // vae.factor**2 * unet_item,
            "VAE": vae_numbers(vae.config) * decoded * vae_item}
    if offloaded:
        need = {"U-Net": need["U-Net"] + weights(unet), "VAE": need["VAE"] + weights(vae)}
    largest = max(need, key=need.get)
    if left is not None and need[largest] > left:
        remedies = [(pictures > 1, "fewer pictures at once (num_images, prompts)"),
                    (largest == "VAE" and not tile, "tile=512"),
                    (unet_item > 2 and device.type != "cpu", "dtype=torch.float16"),
                    (not offloaded and device.type != "cpu", "pipe.offload()"), (True, "a smaller height and width")]
        raise ValueError(f"{pictures} × {sides[1]}×{sides[0]} pixels need about {need[largest] / 2**30:.2g} GiB in the "
                         f"{largest}, and {left / 2**30:.2g} GiB are free on {device}; what helps: "
                         + ", ".join(text for helps, text in remedies if helps))
