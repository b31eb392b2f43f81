"""minidiff: learn diffusion models by building one, then run Stable Diffusion with the same pieces.

>>> import minidiff as md
>>> pipe = md.StableDiffusion.from_pretrained("mini-sd")
>>> pipe("a large red house on the left, snow, night, stars", steps=2)[0].size
(64, 64)
"""
from importlib import import_module as _import_module

__version__ = "0.1.0"

_HOME = {"StableDiffusion": "minidiff.pipeline", "UNet": "minidiff.nets.unet", "VAE": "minidiff.nets.vae",
         "ControlNet": "minidiff.nets.controlnet"}
_MODULES = ("schedule", "prediction", "grid", "exact", "samplers", "guidance", "likelihood", "nets", "text", "io",
            "data", "pipeline", "train", "evaluate", "metrics", "teach", "cli")


def __getattr__(name: str):
    """Load a public name when it is first used: `import minidiff` costs no more than torch."""
    if name in _HOME:
        return getattr(_import_module(_HOME[name]), name)
    if name in _MODULES:
        return _import_module(f"minidiff.{name}")
    raise AttributeError(f"module 'minidiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
