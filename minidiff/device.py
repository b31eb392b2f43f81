"""Which device to work on, and in which dtype; it knows no network."""
from __future__ import annotations

import torch


def default_device() -> str:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_device(device: str | torch.device | None = None) -> torch.device:
    """A device by its name; None: the default one.

    Raises:
        ValueError: there is none of this name here.

    >>> find_device("gpu")
    Traceback (most recent call last):
    ValueError: there is no device 'gpu' here; cpu always works
    """
    device = device or default_device()
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":                                   # there are shapes on it, and no numbers
            raise TypeError
        return found
    except (RuntimeError, AssertionError, TypeError) as error:     # each backend has its own
        raise ValueError(f"there is no device {str(device)!r} here; cpu always works") from error


def vae_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """In float16 the decoders of Stable Diffusion overflow to black pictures: float32 then."""
    return torch.float32 if dtype == torch.float16 else dtype
