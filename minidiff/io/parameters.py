"""How a picture was made, kept in its file: as AUTOMATIC1111's web UI writes it, which many programs read, and as JSON.

In a PNG both are text chunks, `parameters` and `minidiff`; in a JPEG or WebP they are in the EXIF data, the text as
UserComment, the JSON as ImageDescription.
"""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from minidiff.io import plain_text
from minidiff.io.images import READ

TITLES = {"ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "lms": "LMS",
          "plms": "PLMS", "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_sde": "DPM++ SDE",
          "unipc": "UniPC", "lcm": "LCM"}  # the web UI's names
SPACINGS = ("Karras", "Exponential", "Beta")  # its "schedule types" that are a spacing of ours
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # of its last line
NEGATIVE = "Negative prompt:"
DESCRIPTION, EXIF, COMMENT = 0x010E, 0x8769, 0x9286  # tags of EXIF
LIMIT = 60_000  # bytes: a JPEG's EXIF data have at most 65,533
TEXT, TEXTS, REAL = (str,), (str, list), (int, float)
KINDS: dict[str, tuple] = {  # what the JSON may hold, keyword arguments of `generate`, and of which type
    "prompt": TEXTS, "negative_prompt": TEXT, "model": TEXT, "tokenizer": TEXT, "config": TEXT, "variant": TEXT,
    "vae": TEXT, "prediction_type": TEXT, "dtype": TEXT, "steps": (int,), "sampler": TEXT, "guidance_scale": REAL,
    "guidance_rescale": REAL, "eta": REAL, "churn": REAL, "seed": (int,), "num_images": (int,), "weights": (bool,),
    "long": (bool,), "clip_skip": (int,), "height": (int,), "width": (int,), "tile": (int,), "enlarge": REAL,
    "init_image": TEXT, "strength": REAL, "mask": TEXT, "lora": (list,), "embedding": (list,), "controlnet": (list,),
    "control_image": (list,), "control_scale": (list,), "control_start": (list,), "control_end": (list,),
    "grid": (bool,)}


def to_text(settings: dict[str, Any], version: str) -> str:
    """Settings as the web UI writes them: prompt, negative prompt, and a line of names and values.

    Args:
        settings: keyword arguments of `generate`, among them prompt, steps, sampler, guidance_scale, seed, height and
            width. version: of this package.

    >>> print(to_text({"prompt": "a red house", "steps": 25, "sampler": "dpmpp_2m_karras", "guidance_scale": 7.5,
    ...                "seed": 0, "height": 64, "width": 128, "model": "mini-sd"}, "0.1"))
    a red house
    Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 0, Size: 128x64, Model: mini-sd, ...
    """
    prompt = settings["prompt"] if isinstance(settings["prompt"], str) else "\n".join(settings["prompt"])
    name, _, spacing = settings["sampler"].rpartition("_")
    if spacing.title() not in SPACINGS:
        name, spacing = settings["sampler"], ""
    pairs = {"Steps": settings["steps"], "Sampler": TITLES.get(name, name), "Schedule type": spacing.title() or None,
             "CFG scale": settings["guidance_scale"], "Seed": settings["seed"],
             "Size": f"{settings['width']}x{settings['height']}", "Model": Path(settings["model"]).stem,
             "Denoising strength": settings.get("strength"), "CFG Rescale": settings.get("guidance_rescale"),
             "Clip skip": settings["clip_skip"] + 1 if settings.get("clip_skip") else None, "Eta": settings.get("eta"),
             "Hires upscale": settings.get("enlarge"), "Version": f"minidiff {version}"}
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value is not None)
    against = [f"{NEGATIVE} {settings['negative_prompt']}"] if settings.get("negative_prompt") else []
    return "\n".join([prompt, *against, line])


def from_text(text: str) -> dict[str, Any]:
    """Keyword arguments of `generate` from what the web UI, or a program that writes like it, has written.

    Its seeds draw other noise than ours; what has no counterpart, such as the model's hash, is left out.

    Raises:
        ValueError: what should be a number is none.

    >>> from_text("a (red:1.2) house\\nNegative prompt: fog\\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5")
    {'prompt': 'a (red:1.2) house', 'weights': True, 'negative_prompt': 'fog', 'steps': 20, 'sampler': 'Euler a',
    'seed': 5, 'guidance_scale': 7.0}
    """
    *lines, last = text.strip().split("\n")
    pairs = dict(PAIR.findall(last))
    if len(pairs) < 3:                                                       # its own rule: no line of settings
        lines, pairs = [*lines, last], {}
    at = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    prompt, against = "\n".join(lines[:at]), "\n".join(lines[at:]).removeprefix(NEGATIVE)
    result = {"prompt": prompt.strip(), "weights": True}
    result |= {"negative_prompt": against.strip()} if against.strip() else {}
    spacing = pairs.get("Schedule type", "")
    if "Sampler" in pairs and spacing in SPACINGS and not pairs["Sampler"].endswith(spacing):
        pairs["Sampler"] += f" {spacing}"
    kinds = (("Steps", "steps", int), ("Sampler", "sampler", str), ("Seed", "seed", int),
             ("CFG scale", "guidance_scale", float), ("Clip skip", "clip_skip", lambda n: int(n) - 1))
    for theirs, ours, kind in kinds:
        if theirs in pairs:
            try:
                result[ours] = kind(pairs[theirs])
            except ValueError as error:
                raise ValueError(f"{theirs} is {pairs[theirs]!r}, which is no number") from error
    if found := re.fullmatch(r"(\d+)x(\d+)", pairs.get("Size", "")):
        result |= {"width": int(found[1]), "height": int(found[2])}
    return result


def for_saving(settings: dict[str, Any], version: str, kind: str) -> dict[str, Any]:
    """The keywords of Pillow's `save` that put settings into a file.

    Args:
        kind: Pillow's name of the format: PNG, JPEG or WEBP.

    Raises:
        ValueError: a JPEG or WebP whose prompts are too long for it.
    """
    ordered = {name: settings[name] for name in KINDS if name in settings}
    text, said = to_text(settings, version), json.dumps({"minidiff": version, **ordered})
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("parameters", text)
        info.add_text("minidiff", said)
        return {"pnginfo": info}
    from PIL.Image import Exif

    exif, comment = Exif(), b"UNICODE\0" + text.encode("utf-16-be", "surrogatepass")
    if len(comment) + len(said) > LIMIT:
        raise ValueError("the prompts are too long for the metadata of a JPEG or WebP: write a PNG, or leave the "
                         "metadata out")
    exif[DESCRIPTION] = said
    exif.get_ifd(EXIF)[COMMENT] = comment
    return {"exif": exif}


def read(path: str | Path) -> dict[str, Any] | None:
    """How a picture was made: {"text", "settings"}, the latter keyword arguments of `generate`; None: it does not say.

    Raises:
        FileNotFoundError, ValueError: there is no such picture, or what it says is garbled.
    """
    from PIL import Image

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture file {path}")
    try:
        with Image.open(path, formats=READ) as image:
            text, said = _stored(image)
    except Exception as error:                                               # every decoder has its own
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    if said is None and text is None:
        return None
    try:
        return {"text": text, "settings": from_text(text) if said is None else _checked(said)}
    except ValueError as error:
        raise ValueError(f"what {path} says of itself is garbled: {error}") from error


def _stored(image: Any) -> tuple[str | None, str | None]:
    """The web UI's text, and the JSON."""
    if image.format == "PNG":
        texts = {name: str(image.info[name]) for name in ("parameters", "minidiff") if name in image.info}
        return texts.get("parameters"), texts.get("minidiff")
    exif = image.getexif()
    comment, said = exif.get_ifd(EXIF).get(COMMENT, b""), exif.get(DESCRIPTION)
    comment = comment.encode("latin-1", "replace") if isinstance(comment, str) else bytes(comment)
    code, rest = comment[:8].rstrip(b"\0"), comment[8:]
    text = {b"UNICODE": rest.decode("utf-16-be", "replace"), b"ASCII": rest.decode("ascii", "replace")}.get(code)
    return text, said if isinstance(said, str) and said.startswith('{"minidiff"') else None


def _checked(said: str) -> dict[str, Any]:
    """The JSON's settings, each of a type that `generate` takes."""
    settings = plain_text.parse(said)
    if not isinstance(settings, dict):
        raise ValueError("it is no JSON object")
    settings.pop("minidiff", None)
    for key, value in settings.items():
        if key not in KINDS:
            raise ValueError(f"it has a setting {key!r}, which this version of minidiff does not know")
        if not isinstance(value, KINDS[key]) or isinstance(value, bool) and KINDS[key] != (bool,):
            raise ValueError(f"its {key} is a {type(value).__name__}")
        if isinstance(value, list) and not all(isinstance(part, (str, int, float)) for part in value):
            raise ValueError(f"its {key} is a list of something else than texts or numbers")
    return settings


def _quoted(value: object) -> str:
    """A value as the web UI writes it: in quotes where it holds what ends one."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",\n:") else text
