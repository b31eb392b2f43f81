"""The one way a notebook shows a picture: with alt text, there before anything is run; and one look for all plots."""
from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from minidiff.io.images import contact_sheet, plain, to_pil

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image, ImageFont

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito: colour-blind-safe
HEAVY = 30_000  # bytes of a PNG file; a notebook holds each picture twice, and heavier ones in lighter forms
LINE, READABLE = 18, 160  # height of a name above a picture, and how wide a picture must be to bear one, in pixels
GAP = 2  # pixels between pictures that are shown together: two night skies would run into each other
STYLE = {"figure.figsize": (7.0, 3.0), "figure.constrained_layout.use": True, "savefig.dpi": 110, "font.size": 10,
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
         columns: int | None = None, names: Sequence[str] | None = None) -> None:
    """Show a figure or pictures in a notebook, with a description for who cannot see them.

    Args:
        what: a matplotlib figure (closed afterwards); a PIL picture, made `plain`; pictures (B,3,H,W) or (3,H,W) in
            [0, 1]; or a list of PIL pictures of one size, side by side with a thin gap.
        alt: what there is to see, in words.
        width: in the page, in pixels; None: the picture's own.
        columns: pictures per row; None: all in one.
        names: of several pictures: one for each, which stands above it.

    Raises:
        ValueError: no alt text, no picture, pictures of several sizes, or not a name for each.

    >>> show(torch.zeros(2, 3, 8, 8), alt="two black squares", names=["left", "right"])
    two black squares
    """
    if names is not None:
        pictures = to_pil(what.clamp(0, 1)) if isinstance(what, torch.Tensor) else list(what)
        if len(pictures) != len(names):
            raise ValueError(f"there are {len(pictures)} pictures, but {len(names)} names")
        what = [labelled(picture, name) for picture, name in zip(pictures, names)]
    figure, still = hasattr(what, "savefig"), png(what, columns)
    heavy = len(still) > HEAVY and not figure
    publish(webp(still) if heavy else still, "image/webp" if heavy else "image/png", alt, still, width)


def labelled(picture: Image.Image, name: str) -> Image.Image:
    """A picture with its name above it, cut where it is too long; one of few pixels is enlarged first, as pixels.

    >>> from PIL import Image
    >>> labelled(Image.new("RGB", (40, 30)), "t = 500").size
    (160, 138)
    """
    from PIL import Image, ImageDraw, ImageFont

    picture = plain(picture)
    if picture.width < READABLE:
        scale = -(-READABLE // picture.width)
        picture = picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)
    whole = Image.new("RGB", (picture.width, picture.height + LINE), "white")
    whole.paste(picture, (0, LINE))
    font = ImageFont.load_default(13)
    ImageDraw.Draw(whole).text((2, 1), fitting(name, font, picture.width - 4), "black", font)
    return whole


def fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A text on one line of so many pixels, its end cut off where it is too long.

    >>> from PIL import ImageFont
    >>> fitting("a large red house on the left", ImageFont.load_default(13), 100).endswith(" …")
    True
    """
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text} …") > width:
        text = text[:-1]
    return f"{text} …"


def png(what: Figure | Image.Image | torch.Tensor | list, columns: int | None = None, *, fast: bool = False) -> bytes:
    """The PNG file of what `show` shows.

    Args:
        fast: packed quickly, for a picture that is looked at and not stored: several times as large.

    Raises:
        ValueError: pictures that cannot be shown.

    >>> png(torch.zeros(3, 8, 8))[:4]
    b'\\x89PNG'
    """
    file = io.BytesIO()
    if hasattr(what, "savefig"):
        import matplotlib.pyplot as plt

        what.savefig(file, format="png", pil_kwargs={"compress_level": 1} if fast else {})
        plt.close(what)
        return file.getvalue() if fast else light(file.getvalue())
    if isinstance(what, torch.Tensor):
        what = what if what.ndim == 4 else what[None]
        if what.ndim != 4 or what.shape[1] != 3 or not what.is_floating_point():
            raise ValueError("a tensor to show is (B,3,H,W) or (3,H,W), floats in [0, 1]; this one is "
                             f"{tuple(what.shape)}, {what.dtype}")
        what = to_pil(what.clamp(0, 1))
    if isinstance(what, (list, tuple)):
        if not what:
            raise ValueError("there is no picture to show")
        what = contact_sheet(list(what), columns or len(what), gap=GAP)
    else:
        what = plain(what)
    what.save(file, "PNG", **({"compress_level": 1} if fast else {"optimize": True}))
    return file.getvalue()


def small(data: bytes) -> bytes:
    """A PNG file of the same picture that is packed well."""
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(file, "PNG", optimize=True)
    return file.getvalue()


def webp(data: bytes) -> bytes:
    """A PNG file as WebP that looks the same: a quarter of the size."""
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(file, "WEBP", quality=95, method=5)
    return file.getvalue()


def light(data: bytes) -> bytes:
    """A PNG file of the same picture in 256 colours: a third of the size."""
    from PIL import Image

    file = io.BytesIO()
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture.quantize(256, kmeans=2, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def publish(data: bytes, mime: str, alt: str, still: bytes, width: int | None = None,
            live: Callable | None = None) -> None:
    """Display a picture file as text/html with alt text, and a still PNG of it for viewers that show no HTML.

    A still of more than HEAVY bytes is made `light`.

    `live()` returns a widget, which notebooks prefer as long as their kernel lives. Outside IPython the alt text is
    printed.

    Raises:
        ValueError: the alt text is empty.
    """
    from IPython import display, get_ipython
    from PIL import Image

    if not alt.strip():
        raise ValueError("alt is empty; say in words what there is to see")
    text = html.escape(alt, quote=True)
    look = "max-width:100%"
    if width:  # enlarged pictures keep hard pixels
        hard = width > Image.open(io.BytesIO(still)).width
        look += f";width:{width}px" + ";image-rendering:pixelated" * hard
    if len(still) > HEAVY:
        still = light(still)
    source = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    bundle = {"text/html": f'<figure style="margin:0"><img alt="{text}" style="{look}" src="{source}"></figure>',
              "image/png": base64.b64encode(still).decode(), "text/plain": alt}
    if get_ipython():
        display.display((_view(live()) | bundle) if live else bundle, raw=True)
    else:
        print(alt)


def _view(widget: object) -> dict:
    """What a notebook shows a widget by; ipywidgets 7, which Colab has, displays them itself and does not tell."""
    if hasattr(widget, "_repr_mimebundle_"):
        return widget._repr_mimebundle_()
    return {"application/vnd.jupyter.widget-view+json": {"version_major": 2, "version_minor": 0,
                                                         "model_id": widget.model_id}}
