"""The one way a notebook shows a picture: with alt text, there before anything is run; and one look for all plots."""
from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minidiff.io.images import contact_sheet, plain, to_pil
from minidiff.teach.lab import VIEW

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image, ImageFont

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito: colour-blind-safe
HEAVY = 30_000  # bytes of a PNG file; a notebook holds each picture twice, and heavier ones in lighter forms
LINE, READABLE = 18, 160  # height of a name above a picture, and how wide a picture must be to bear one, in pixels
PIXELS = 64  # a picture whose smaller side has no more is made of pixels
DPI = 110  # of a figure in the page; it is stored at twice as many
MOVE = "A film. Run this cell to move it yourself."
# Where a widget has ended with its kernel, JupyterLab's "model not found" makes room for the film.
DEAD = ("<style>.jp-OutputArea:has(.minidiff-stored):not(:has(.minidiff-live)) "
        ".jp-OutputArea-child:has(.jupyter-widgets) { display: none }</style>")
GAP = 2  # pixels between pictures that are shown together: two night skies would run into each other
STYLE = {"figure.figsize": (7.0, 3.0), "figure.constrained_layout.use": True, "savefig.dpi": DPI, "font.size": 10,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
         "axes.titlesize": 10, "axes.titlelocation": "left", "lines.linewidth": 1.8, "legend.frameon": False,
         "image.interpolation": "nearest", "image.cmap": "viridis"}


def style() -> None:
    """Give all matplotlib figures made from here on the look of the series.

    >>> style()
    """
    import matplotlib

    matplotlib.rcParams.update({**STYLE, "axes.prop_cycle": matplotlib.cycler(color=COLORS)})


def show(what: Figure | Image.Image | torch.Tensor | list, alt: str, *, width: int | None = None,
         columns: int | None = None, names: Sequence[str] | None = None, rows: Sequence[str] | None = None) -> None:
    """Show a figure or pictures in a notebook, with a description for who cannot see them.

    Args:
        what: a matplotlib figure (drawn at twice its size, closed afterwards); a PIL picture, made `plain`; pictures
            (B,3,H,W) or (3,H,W) in [0, 1]; or a list of PIL pictures of one size, side by side with a thin gap.
        alt: what there is to see, in words.
        width: in the page, in pixels; None: the picture's own. Pictures made of few pixels are enlarged as pixels.
        columns: pictures per row; None: all in one.
        names: of several pictures: one for each, which stands above it; with `rows`, one for each column.
        rows: names of the rows, which stand at their left; each row is a picture of its own on slides.

    Raises:
        ValueError: no alt text, no picture, pictures of several sizes, or not a name for each.

    >>> show(torch.zeros(2, 3, 8, 8), alt="two black squares", names=["left", "right"])
    two black squares
    """
    if hasattr(what, "savefig"):
        large = png(what)
        still = halved(large)
        return publish(packed(large), "image/webp", alt, still, width or opened(still).width)
    if names is not None or rows is not None:
        pictures = to_pil(what.clamp(0, 1)) if isinstance(what, torch.Tensor) else list(what)
        if rows is not None:
            return _rows(pictures, alt, list(rows), names, width)
        if len(pictures) != len(names):
            raise ValueError(f"there are {len(pictures)} pictures, but {len(names)} names")
        what = [labelled(picture, name) for picture, name in zip(pictures, names)]
    still = png(what, columns, width=width)
    heavy = len(still) > HEAVY
    publish(webp(still) if heavy else still, "image/webp" if heavy else "image/png", alt, still, width)


def _rows(pictures: list, alt: str, rows: list[str], names: Sequence[str] | None, width: int | None) -> None:
    """Rows of pictures with their names, each row a picture file of its own."""
    from PIL import Image, ImageDraw

    n = len(pictures) // max(len(rows), 1)
    if not pictures or len(pictures) != n * len(rows) or names is not None and len(names) != n:
        raise ValueError(f"there are {len(pictures)} pictures, but {len(rows)} rows"
                         + (f" and {len(names)} columns" if names is not None else ""))
    font = letters(13)
    left = 10 + math.ceil(min(max(map(font.getlength, rows)), 150))
    room = ((width or 790) - left) // n - GAP
    pictures = [plain(picture) for picture in pictures]
    if of_pixels(pictures[0], room):                                     # noise in all colours takes much room
        pictures = [few_colors(picture, 128) for picture in pictures]
    pictures = [enlarged(picture, room, smooth=True) for picture in pictures]
    wide, high = pictures[0].size
    strips = []
    for i, name in enumerate(rows):
        top = LINE if i == 0 and names is not None else 0
        strip = Image.new("RGB", (left + n * (wide + GAP), top + high + GAP), "white")
        draw = ImageDraw.Draw(strip)
        draw.text((0, top + high // 2 - 8), fitting(name, font, left - 8), "black", font)
        for k, picture in enumerate(pictures[i * n:(i + 1) * n]):
            if top:
                draw.text((left + k * (wide + GAP), 1), fitting(names[k], font, wide), "black", font)
            strip.paste(picture, (left + k * (wide + GAP), top))
        strips.append(strip)
    whole = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    for i, strip in enumerate(strips):
        whole.paste(strip, (0, sum(each.height for each in strips[:i])))
    still = png(whole)
    pack, mime = (webp, "image/webp") if len(still) > HEAVY else (bytes, "image/png")
    publish([pack(png(strip)) for strip in strips], mime, alt, still, width, parts=rows)


def labelled(picture: Image.Image, name: str) -> Image.Image:
    """A picture with its name above it, cut where it is too long; one of few pixels is enlarged first.

    >>> from PIL import Image
    >>> labelled(Image.new("RGB", (40, 30)), "t = 500").size
    (160, 138)
    """
    from PIL import Image, ImageDraw

    picture = enlarged(plain(picture), READABLE, smooth=True)
    whole = Image.new("RGB", (picture.width, picture.height + LINE), "white")
    whole.paste(picture, (0, LINE))
    font = letters(13)
    ImageDraw.Draw(whole).text((2, 1), fitting(name, font, picture.width - 4), "black", font)
    return whole


def of_pixels(picture: Image.Image, width: int) -> bool:
    """Whether a picture shows its pixels as squares when it is enlarged: a small one, or one enlarged many times."""
    return min(picture.size) <= PIXELS or width > 3 * picture.width


def enlarged(picture: Image.Image, width: int, *, smooth: bool = False) -> Image.Image:
    """A picture made of pixels, at least so wide and its pixels squares; others as they are: browsers enlarge them.

    Args:
        smooth: enlarge others too.

    >>> from PIL import Image
    >>> enlarged(Image.new("RGB", (40, 30)), 100).size, enlarged(Image.new("RGB", (90, 90)), 100).size
    ((120, 90), (90, 90))
    """
    from PIL import Image

    scale, hard = -(-width // picture.width), of_pixels(picture, width)
    if scale <= 1 or not (hard or smooth):
        return picture
    return picture.resize((scale * picture.width, scale * picture.height),
                          Image.Resampling.NEAREST if hard else Image.Resampling.BICUBIC)


@cache
def letters(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's font, which has Greek and fractions too; Pillow's own where there is no matplotlib.

    >>> letters(13).getlength("λ = ½") > 20
    True
    """
    from PIL import ImageFont

    try:
        import matplotlib
    except ImportError:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A text on one line of so many pixels, its end cut off where it is too long.

    >>> fitting("a large red house on the left", letters(13), 100).endswith(" …")
    True
    """
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text} …") > width:
        text = text[:-1]
    return f"{text} …"


def png(what: Figure | Image.Image | torch.Tensor | list, columns: int | None = None, *, width: int | None = None,
        fast: bool = False) -> bytes:
    """The PNG file of what `show` shows.

    Args:
        width: in the page; pictures of less than half of it are `enlarged`, browsers do the rest.
        fast: packed quickly, for a picture that is looked at and not stored: several times as large; a figure is drawn
            at its own size.

    Raises:
        ValueError: pictures that cannot be shown.

    >>> png(torch.zeros(3, 8, 8))[:4]
    b'\\x89PNG'
    """
    file = io.BytesIO()
    if hasattr(what, "savefig"):
        import matplotlib.pyplot as plt

        what.savefig(file, format="png", dpi=DPI if fast else 2 * DPI, pil_kwargs={"compress_level": 1})
        plt.close(what)
        return file.getvalue()
    if isinstance(what, torch.Tensor):
        what = what if what.ndim == 4 else what[None]
        if what.ndim != 4 or what.shape[1] != 3 or not what.is_floating_point():
            raise ValueError("a tensor to show is (B,3,H,W) or (3,H,W), floats in [0, 1]; this one is "
                             f"{tuple(what.shape)}, {what.dtype}")
        what = to_pil(what.clamp(0, 1))
    if isinstance(what, (list, tuple)):
        if not what:
            raise ValueError("there is no picture to show")
        n = columns or len(what)
        if width:
            what = [enlarged(plain(picture), width // 2 // n) for picture in what]
        what = contact_sheet(list(what), n, gap=GAP)
    else:
        what = enlarged(plain(what), (width or 0) // 2)
    what.save(file, "PNG", **({"compress_level": 1} if fast else {"optimize": True}))
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    """The picture in a file, in RGB."""
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def halved(data: bytes) -> bytes:
    """A figure at its own size, of one that is drawn at twice that: a PNG file in 256 colours."""
    from PIL import Image

    file, picture = io.BytesIO(), opened(data)
    picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX).save(file, "PNG")
    return light(file.getvalue())


def packed(data: bytes) -> bytes:
    """A figure as WebP: in 256 colours, or with small losses where that is shorter."""
    picture = opened(data)
    return _shortest((few_colors(picture, 256, 1), {"lossless": True, "method": 4}),
                     (picture, {"quality": 90, "method": 5}))


def few_colors(picture: Image.Image, n: int, rounds: int = 0) -> Image.Image:
    """A picture in its n best colours, which makes a shorter file.

    Args:
        rounds: of k-means, which finds better ones.

    >>> from PIL import Image
    >>> len(few_colors(Image.effect_noise((64, 64), 90).convert("RGB"), 16).getcolors())
    16
    """
    return picture.quantize(n, kmeans=rounds, dither=0).convert("RGB")


def _shortest(*forms: tuple[Image.Image, dict]) -> bytes:
    """Of several WebP files the shortest."""
    files = []
    for picture, options in forms:
        picture.save(file := io.BytesIO(), "WEBP", **options)
        files.append(file.getvalue())
    return min(files, key=len)


def small(data: bytes) -> bytes:
    """A PNG file of the same picture that is packed well."""
    file = io.BytesIO()
    opened(data).save(file, "PNG", optimize=True)
    return file.getvalue()


def webp(data: bytes) -> bytes:
    """A PNG file as WebP that looks the same: a quarter of the size."""
    picture = opened(data)
    return _shortest((picture, {"quality": 95, "method": 5}), (picture, {"lossless": True, "method": 4}))


def light(data: bytes) -> bytes:
    """A PNG file of the same picture in 256 colours: a third of the size."""
    from PIL import Image

    file = io.BytesIO()
    opened(data).quantize(256, kmeans=2, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def publish(data: bytes | list[bytes], mime: str, alt: str, still: bytes, width: int | None = None,
            live: Callable | None = None, parts: Sequence[str] = ()) -> None:
    """Display a picture file as text/html with alt text, and a still PNG of it for viewers that show no HTML.

    A still of more than HEAVY bytes is made `light`. Outside IPython the alt text is printed.

    Args:
        width: in the page, in pixels.
        live: returns a widget, which takes the picture's place as long as its kernel lives; a line below the picture
            says how to get it.
        parts: names of several files, which stand below each other as one picture.

    Raises:
        ValueError: the alt text is empty.
    """
    from IPython import display, get_ipython

    if not alt.strip():
        raise ValueError("alt is empty; say in words what there is to see")
    if not get_ipython():
        return print(alt)
    if len(still) > HEAVY:
        still = light(still)
    files = [(alt, data)] if isinstance(data, bytes) else list(zip(parts, data))
    size = f'width="{width}" ' if width else ""                          # no style: it goes where nothing is trusted
    look = "max-width:100%;height:auto;display:block"
    images = "".join(f'<img alt="{html.escape(name, quote=True)}" {size}style="{look}" '
                     f'src="data:{mime};base64,{base64.b64encode(each).decode()}">' for name, each in files)
    about = f' role="group" aria-label="{html.escape(alt, quote=True)}"' if parts else ""
    below = f"<figcaption>{MOVE}</figcaption>{DEAD}" if live else ""
    stored = ' class="minidiff-stored"' if live else ""
    bundle = {"text/html": f'<figure{stored}{about} style="margin:0">{images}{below}</figure>',
              "image/png": base64.b64encode(still).decode(), "text/plain": alt}
    display.display(bundle, raw=True)
    if live:
        display.display(_view(live()), raw=True)


def _view(widget: object) -> dict:
    """What a notebook shows a widget by, and nothing else that would stay when it is gone; in ipywidgets 7 and 8."""
    return {VIEW: {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}}
