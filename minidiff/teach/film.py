"""Films of a process as animated PNG, GIF or WebP, by Pillow alone."""
from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minidiff.io.images import contact_sheet, plain
from minidiff.io.write import write_atomic
from minidiff.teach.show import READABLE, enlarged, few_colors, labelled, of_pixels, opened, png, publish

if TYPE_CHECKING:
    from PIL import Image

    from minidiff.samplers import Step
    from minidiff.sd.pipeline import StableDiffusion

GAP = 8  # pixels between the two pictures of a frame, and the height of its bar
FORMATS = {".png": "PNG", ".gif": "GIF", ".webp": "WEBP"}
STRIP, NARROW = 6, 210  # frames of the strip that stands for a film, and the width of each in pixels
NOISY = 16  # frames at most of a film of pixels
FRAMES = 25  # noise does not compress: so many 64×64 frames are 0.05–0.15 MB as WebP


def film(frames: Sequence, alt: str, *, names: Sequence[str] | None = None, width: int | None = None,
         seconds: float = 2.5, hold: float = 1.5) -> None:
    """Show a film in a notebook: an animated WebP with a description, and a strip of frames where films do not run.

    Args:
        frames: anything `minidiff.teach.show.show` takes, each of one size; of more than 25, 25 evenly spaced ones; of
            frames made of pixels 16.
        alt: what there is to see, in words. width: in the page, in pixels.
        names: of the frames, which stand above them, such as "t = 500"; None: "0 of 25", "1 of 25" …
        seconds, hold: as in `write_film`.

    Raises:
        ValueError: there is no frame, or not a name for each.

    >>> from PIL import Image
    >>> film([Image.new("RGB", (8, 8), (0, 0, 25 * i)) for i in range(9)], alt="a square turns blue")
    a square turns blue
    """
    frames = list(frames)
    names = [f"{i} of {len(frames) - 1}" for i in range(len(frames))] if names is None else list(names)
    if len(names) != len(frames) or not frames:
        raise ValueError(f"a film needs a frame, and a name for each; there are {len(frames)} and {len(names)}")
    room = max(READABLE, (width or 0) // 2)
    pixels = of_pixels(opened(png(frames[0], fast=True)), room)
    named = [(opened(png(frame, fast=True)), name)
             for frame, name in thin(list(zip(frames, names)), NOISY if pixels else FRAMES)]
    if pixels:                                                           # noise takes much room: few colours, and
        named = [(few_colors(picture, 64), name) for picture, name in named]  # squares of a whole number of pixels
        pictures = [labelled(enlarged(picture, max(room, 4 * picture.width)), name) for picture, name in named]
    else:
        pictures = [labelled(*each) for each in named]
    strip = contact_sheet([labelled(_narrow(picture), name) for picture, name in thin(named, STRIP)], 3, gap=4)
    if len(pictures) == 1:
        publish(png(pictures[0]), "image/png", alt, png(pictures[0]), width)
    else:
        publish(encode(pictures, ".webp", seconds=seconds, hold=hold), "image/webp", alt, png(strip), width)


def as_film(stills: Sequence[bytes], *, seconds: float = 5.0, hold: float = 1.5) -> tuple[bytes, str]:
    """PNG files of one size as one animated WebP of at most 25 frames, and its type; a single one stays a PNG."""
    if len(stills) == 1:
        return stills[0], "image/png"
    return encode([opened(still) for still in thin(stills)], ".webp", seconds=seconds, hold=hold), "image/webp"


def write_film(frames: Sequence[Image.Image], path: str | Path, *, seconds: float = 2.5, hold: float = 1.5) -> None:
    """Write pictures of one size as an endless film; the whole file appears at once.

    Args:
        frames: at least one; of more than 25, 25 evenly spaced ones are taken, the first and the last among them.
        path: ends in .png (animated PNG), .gif or .webp.
        seconds: time from the first frame to the last.
        hold: how long the last one stays.

    Raises:
        ValueError: another ending, no frames, or frames of several sizes.

    >>> import tempfile; from PIL import Image
    >>> path = Path(tempfile.mkdtemp()) / "fade.gif"
    >>> write_film([Image.new("RGB", (8, 8), (0, 0, 25 * i)) for i in range(9)], path)
    >>> Image.open(path).n_frames
    9
    """
    check_suffix(path)
    write_atomic(Path(path), encode(frames, Path(path).suffix, seconds=seconds, hold=hold))


def encode(frames: Sequence[Image.Image], suffix: str, *, seconds: float, hold: float) -> bytes:
    """The file that `write_film` writes.

    Raises:
        ValueError: no frames, or frames of different sizes.
    """
    if not frames:
        raise ValueError("a film needs at least one frame")
    frames = [plain(frame) for frame in thin(frames)]
    if len(sizes := {frame.size for frame in frames}) > 1:
        raise ValueError("the frames of a film are of one size; these are "
                         + ", ".join(f"{w}×{h}" for w, h in sorted(sizes)))
    each = round(1000 * seconds / max(1, len(frames) - 1) / 10) * 10  # GIF counts in hundredths of a second
    durations = [each] * (len(frames) - 1) + [round(1000 * hold)]

    def file(frames: Sequence[Image.Image], **options) -> bytes:
        data = io.BytesIO()
        frames[0].save(data, FORMATS[suffix.lower()], save_all=True, append_images=frames[1:], duration=durations,
                       loop=0, **options)
        return data.getvalue()

    if suffix.lower() != ".webp":
        return file(frames)
    few = [few_colors(frame, 256) for frame in frames]                   # shorter, of pixels or lines
    return min(file(frames, quality=60, method=5), file(few, lossless=True, method=4), key=len)


def _narrow(picture: Image.Image) -> Image.Image:
    """A frame as large as the strip has room for."""
    from PIL import Image

    if picture.width <= NARROW:
        return picture
    return picture.resize((NARROW, round(picture.height * NARROW / picture.width)), Image.Resampling.LANCZOS)


@torch.inference_mode()
def frame(pipe: StableDiffusion, step: Step, side: int = 256) -> Image.Image:
    """One moment of the first picture of a run: the state on the left, the guess at the result on the right.

    The state is shown at unit variance, x/√(alpha² + sigma²); the bar below shows the amplitude of its noise,
    sigma/√(alpha² + sigma²). Before the first step there is no guess, and its place is grey.

    Args:
        pipe: whose run it is.
        step: what `pipe.stream` yields.
        side: width of each of the two pictures, in pixels.
    """
    from PIL import Image, ImageDraw

    _, alpha, sigma = step.level
    norm = math.hypot(alpha, sigma)
    state = pipe.preview(step.x[:1] / norm)[0]
    guess = Image.new("RGB", state.size, "#808080") if step.x0 is None else pipe.preview(step.x0[:1])[0]
    height, width = round(side * state.height / state.width), side
    picture = Image.new("RGB", (2 * width + GAP, height + GAP), "white")
    for image, left in ((state, 0), (guess, width + GAP)):
        picture.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, 0))
    noise = round(sigma / norm * (picture.width - 1))
    ImageDraw.Draw(picture).rectangle((0, height + 2, noise, height + GAP - 1), "#444444")
    return picture


def check_suffix(path: str | Path) -> None:
    """ValueError unless the file name ends in .png, .gif or .webp.

    >>> check_suffix("noise.mp4")
    Traceback (most recent call last):
    ValueError: the film noise.mp4 should end in .png, .gif or .webp, behind a name
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"the film {path} should end in .png, .gif or .webp, behind a name")


def thin(frames: Sequence, most: int = FRAMES) -> list:
    """At most `most` frames, evenly spaced, the first and the last kept.

    >>> thin(range(9), 3)
    [0, 4, 8]
    """
    if len(frames) <= most:
        return list(frames)
    return [frames[round(i * (len(frames) - 1) / (most - 1))] for i in range(most)]
