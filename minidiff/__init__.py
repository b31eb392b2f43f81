"""minidiff: learn diffusion models by building one, then run Stable Diffusion with the same pieces.

>>> import minidiff as md
>>> pipe = md.StableDiffusion.from_pretrained("mini-sd")
>>> pipe("a large red house on the left, snow, night, stars", steps=2)[0].size
(128, 128)
"""
import sys as _sys
from importlib import import_module as _import_module
from pathlib import Path as _Path

if _sys.version_info < (3, 11):  # noqa: UP036  (the build runs this too: pip says "No matching distribution" otherwise)
    raise SystemExit("minidiff needs Python 3.11 or newer; this is " + ".".join(map(str, _sys.version_info[:2])))

__version__ = "0.1.0"

_HOME = {"StableDiffusion": "minidiff.sd.pipeline", "UNet": "minidiff.nets.unet", "VAE": "minidiff.nets.vae",
         "ControlNet": "minidiff.nets.controlnet", "DiT": "minidiff.nets.dit", "MMDiT": "minidiff.nets.mmdit",
         "Settings": "minidiff.sd.settings"}
_HERE = _Path(__file__).parent
_ROOMS = ("", "sd", "measure", "nets", "data", "io", "train", "teach")  # where a module is looked for, in this order


def __getattr__(name: str):
    """Load a public name when it is first used: `import minidiff` costs no more than torch."""
    if name in _HOME:
        return getattr(_import_module(_HOME[name]), name)
    for room in _ROOMS:
        place = _HERE / room / name
        if not name.startswith("_") and (place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()):
            return _import_module(".".join(["minidiff", *filter(None, [room]), name]))
    raise AttributeError(f"module 'minidiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    modules = (path.stem for room in _ROOMS for path in [*(_HERE / room).glob("*.py"), *_HERE.glob("*/")])
    return sorted({*globals(), *_HOME, *(name for name in modules if not name.startswith("_"))})
