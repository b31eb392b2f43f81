"""Pictures in and out: PIL to tensors and back, careful reading and atomic writing."""
from __future__ import annotations

import io
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.io.write import write_atomic

if TYPE_CHECKING:
    from PIL import Image

WHITES = {"F": (1.0, 255.0, 65535.0), "I": (255, 65535)}  # what may be white in modes that do not say it
KEYS = {"L;2": 255 / 3, "L;4": 255 / 15, "RGB;16B": 1 / 256}  # PNGs whose transparent colour Pillow does not scale
READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow starts other programs for some others, such as EPS
SIDE = 2**16 - 1  # pixels, JPEG's limit: Pillow needs memory for every row
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


class Pictures(list):
    """A list of PIL pictures, which a notebook shows side by side where it stands alone at the end of a cell."""

    def _repr_png_(self) -> bytes | None:
        data = io.BytesIO()
        try:
            contact_sheet(self, columns=min(4, len(self)), gap=2).save(data, "PNG")
        except ValueError:                                                      # none, or of several sizes
            return None
        return data.getvalue()


def to_pil(image: Tensor) -> list[Image.Image]:
    """(B,3,H,W) in [0, 1] to B `Pictures`, rounded to 8 bits.

    >>> to_pil(torch.full((1, 3, 2, 2), 0.5))[0].getpixel((0, 0))
    (128, 128, 128)
    """
    from PIL import Image

    pixels = (image.float() * 255).round().byte().permute(0, 2, 3, 1).cpu()  # (B, H, W, 3)
    return Pictures(Image.fromarray(picture.numpy()) for picture in pixels)


def contact_sheet(pictures: list[Image.Image], columns: int, *, scale: int = 1, gap: int = 0) -> Image.Image:
    """Pictures of one size, made `plain`, side by side, row after row, each enlarged `scale` times with hard pixels.

    Args:
        gap: white pixels between two pictures. What is left of the last row is white too.

    Raises:
        ValueError: no pictures, some of another size, or columns or scale < 1.

    >>> from PIL import Image
    >>> contact_sheet([Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue")], 2, scale=3).size
    (192, 192)
    """
    from PIL import Image

    if not pictures or columns < 1 or scale < 1:
        raise ValueError(f"cannot arrange {len(pictures)} pictures in {columns} columns, enlarged {scale} times")
    pictures = [plain(picture) for picture in pictures]
    if len(sizes := {picture.size for picture in pictures}) > 1:
        raise ValueError("pictures side by side are of one size; these are "
                         + ", ".join(f"{w}×{h}" for w, h in sorted(sizes)))
    w, h = (scale * side for side in pictures[0].size)
    columns, rows = min(columns, len(pictures)), -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        place = i % columns * (w + gap), i // columns * (h + gap)
        sheet.paste(picture.resize((w, h), Image.Resampling.NEAREST), place)
    return sheet


def plain(picture: Image.Image, background: str = "white") -> Image.Image:
    """Any PIL picture as RGB: turned the way its camera was held, and where it is transparent, on a background.

    16-bit greys (modes I;16…) keep their high byte, rounded. Modes I and F do not say how large white is: it is the
    smallest of 255 and 65535, for F also 1, that no pixel exceeds. Of an animation it is the frame at hand.

    Args:
        background: a colour by its name, such as "white".

    Raises:
        ValueError: mode I or F with numbers below 0, above 65535 or NaN, a mode that Pillow cannot convert, no pixels,
            or no PIL picture at all.

    >>> from PIL import Image
    >>> [plain(Image.new(*of, (1, 1), c)).getpixel((0, 0)) for *of, c in (["I;16", 25700], ["LA", (0, 0)], ["F", 0.2])]
    [(100, 100, 100), (255, 255, 255), (51, 51, 51)]
    """
    import numpy as np
    from PIL import Image, ImageOps

    if not isinstance(picture, Image.Image):
        raise ValueError(f"a picture is a PIL picture here, not a {type(picture).__name__}")
    if 0 in picture.size:
        raise ValueError(f"a picture has at least one pixel; this one is {picture.width}×{picture.height}")
    key, netpbm = _key(picture), picture.format == "PPM"                        # whose greys Pillow scales to 65535
    picture.load()
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception:                                                           # garbled EXIF says nothing
        picture = picture.copy()
    if key is not None:
        picture.info["transparency"] = key
    if picture.mode[0] in "IF":
        grey = np.asarray(picture)
        low, high = grey.min(), grey.max()
        tops = (65535,) if netpbm and picture.mode == "I" else WHITES.get(picture.mode, (65535,))
        white = next((top for top in tops if 0 <= low and high <= top), None)
        if white is None:
            raise ValueError(f"a picture of mode {picture.mode} has values from 0 to 65535, not from {low} to {high}")
        alpha = 255 * (grey != picture.info.get("transparency", -1)).astype(np.uint8)     # a PNG may name one grey
        picture = Image.fromarray((grey * (255 / white)).round().astype(np.uint8)).convert("LA")
        picture.putalpha(Image.fromarray(alpha))
    try:
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        picture = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    except (ValueError, OSError) as error:
        raise ValueError(f"a picture of mode {picture.mode} is not supported: save it as RGB") from error
    return Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")


def to_tensor(picture: Image.Image | Tensor | list, height: int | None = None, width: int | None = None,
              multiple: int = 1) -> Tensor:
    """Picture(s) to a batch (B,3,H,W) in [−1, 1], resized to height and width.

    Args:
        picture: PIL picture(s), made `plain`, resized by Lanczos; or tensor(s) (3,H,W) or (B,3,H,W) in [0, 1], resized
            by nearest.
        height, width: None: the (first) picture's own, down to a multiple of `multiple`.
        multiple: what the sides must be divisible by.

    Raises:
        ValueError: sides that do not fit, no picture, or a tensor of another shape or range; without height and width,
            tensors of several sizes.

    Matches: diffusers' VaeImageProcessor.preprocess (tests/parity/test_pipeline.py).

    >>> to_tensor(torch.ones(3, 17, 9), multiple=8).shape
    torch.Size([1, 3, 16, 8])
    """
    from PIL import Image

    pictures = _several(picture, "an image")
    if isinstance(pictures[0], Tensor):
        rule = "an image tensor is (3,H,W) or (B,3,H,W) in [0, 1]"
        pictures = [_checked(part[None] if part.ndim == 3 else part, rule, 3) for part in pictures]
        if (height is None or width is None) and len(sizes := {(*part.shape[2:],) for part in pictures}) > 1:
            raise ValueError(f"the image tensors of a list are of one size, or height and width are given; these are "
                             f"{', '.join(f'{h}×{w}' for h, w in sorted(sizes))}")
        sides = _sides(pictures[0].shape[-2:], height, width, multiple)
        return 2 * torch.cat([torch.nn.functional.interpolate(part, size=sides) for part in pictures]) - 1
    pictures = [plain(part) for part in pictures]
    height, width = _sides(pictures[0].size[::-1], height, width, multiple)
    pictures = [part.resize((width, height), Image.Resampling.LANCZOS) for part in pictures]
    flat = [torch.frombuffer(bytearray(part.tobytes()), dtype=torch.uint8) for part in pictures]
    return 2 * (torch.stack(flat).view(-1, height, width, 3).permute(0, 3, 1, 2).float() / 255) - 1


def to_mask(mask: Image.Image | Tensor | list, height: int, width: int) -> Tensor:
    """Mask(s) to a batch (B,1,height,width) of 0 and 1: 1 where a mask, a picture in grey or in [0, 1], is at least ½.

    Args:
        mask: PIL picture(s), made `plain` on black (what is transparent is 0), resized by Lanczos; or a tensor (H,W),
            (1,H,W), (B,H,W), (B,1,H,W), or a list of such.

    Raises:
        ValueError: no mask, or a tensor of another shape or range.

    >>> to_mask(torch.tensor([[0.0, 1.0]]), 1, 4)
    tensor([[[[0., 0., 1., 1.]]]])
    """
    from PIL import Image

    masks = _several(mask, "a mask")
    if isinstance(masks[0], Image.Image):
        masks = [plain(part, "black").resize((width, height), Image.Resampling.LANCZOS).convert("L") for part in masks]
        masks = [torch.frombuffer(bytearray(part.tobytes()), dtype=torch.uint8).view(height, width) / 255
                 for part in masks]
    rule = "a mask is in [0, 1], of shape (H,W), (B,H,W) or (B,1,H,W)"
    masks = [_checked(part[None, None] if part.ndim == 2 else part[:, None] if part.ndim == 3 else part, rule, 1)
             for part in masks]
    masks = [torch.nn.functional.interpolate(part, size=(height, width)) for part in masks]
    return (torch.cat(masks) >= 0.5).float()


def to_unit(image: Tensor) -> Tensor:
    """About [−1, 1] to [0, 1], clamped.

    >>> to_unit(torch.tensor([-1.2, 0.0, 1.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (image / 2 + 0.5).clamp(0, 1)


def latent_colors(encode: Callable[[Tensor], Tensor], factor: int) -> Tensor:
    """A VAE's linear map from latents to colours: the least-squares fit to its latents of colours and ramps.

    Args:
        encode: pictures (B,3,H,W) in [−1, 1] to latents (B,C,H/factor,W/factor).
        factor: pixels per latent.

    Returns:
        (C + 1, 3), for `to_rgb`; the last row is the constant.

    >>> latent_colors(lambda image: image[..., ::2, ::2], 2).shape
    torch.Size([4, 3])
    """
    side = 4 * factor
    one = torch.cartesian_prod(*[torch.tensor([-0.9, 0.0, 0.9])] * 3)[:, :, None, None]  # 27 colours
    another = one.flip(1, 0)
    ramp = one + (another - one) * torch.linspace(0, 1, side)
    image = torch.cat([one.expand(-1, -1, side, side), ramp.expand(-1, -1, side, -1)])  # (54, 3, side, side)
    z = encode(image)
    inputs = torch.cat([z, torch.ones_like(z[:, :1])], 1).permute(0, 2, 3, 1).flatten(0, 2)  # (54·16, C + 1)
    targets = torch.nn.functional.avg_pool2d(to_unit(image), factor).permute(0, 2, 3, 1).flatten(0, 2)
    return torch.linalg.lstsq(inputs.cpu(), targets).solution.to(z)


def to_rgb(z: Tensor, colors: Tensor) -> Tensor:
    """Latents (B,C,h,w) to small pictures (B,3,h,w) in [0, 1] by the map of `latent_colors`.

    >>> to_rgb(torch.ones(1, 2, 1, 1), torch.tensor([[0.5, 0, 0], [0, 0.25, 0], [0, 0, 1.0]])).flatten()
    tensor([0.5000, 0.2500, 1.0000])
    """
    return (torch.einsum("bchw,cd->bdhw", z, colors[:-1]) + colors[-1][:, None, None]).clamp(0, 1)


def open_image(path: str | Path, background: str = "white") -> Image.Image:
    """Read a picture file, of an animation the first frame, as RGB: see `plain`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture in one of the formats READ, is damaged, is too large (over 89 megapixels, or over
            65,535 along a side), or `plain` refuses it.

    >>> import tempfile; from PIL import Image
    >>> folder = tempfile.TemporaryDirectory(); Image.new("LA", (4, 3)).save(f"{folder.name}/clear.png")
    >>> open_image(f"{folder.name}/clear.png").getpixel((0, 0))       # black, but transparent: white paper shows
    (255, 255, 255)
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # of Pillow, about what is odd but readable
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=READ) as image:  # the header alone
                if max(image.size) > SIDE:
                    raise ValueError(f"it is {image.width}×{image.height} pixels; a side has at most {SIDE:,}")
                return plain(image, background)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is too large a picture: {error}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} cannot be read as a picture: it is no file of {', '.join(READ)}") from error
    except Exception as error:  # every decoder has its own
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def picture_size(path: str | Path) -> str | None:
    """Width, height and format of a picture file; None: it is none.

    >>> picture_size(__file__) is None
    True
    """
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=READ) as image:
            return f"{image.width}×{image.height} pixels, {image.format}"
    except Exception:                                                           # every decoder has its own
        return None


def save_image(image: Image.Image, path: str | Path, **more: Any) -> None:
    """Write a .png, .jpg or .webp file, all or nothing.

    Args:
        **more: of Pillow's save, such as those of `minidiff.io.parameters.for_saving`.

    Raises:
        ValueError: another ending.

    >>> import tempfile; from PIL import Image
    >>> path = Path(tempfile.mkdtemp()) / "red.png"
    >>> save_image(Image.new("RGB", (4, 4), "red"), path)
    >>> open_image(path).getpixel((0, 0))
    (255, 0, 0)
    """
    data = io.BytesIO()
    image.save(data, image_format(path), quality=95, **more)
    write_atomic(path, data.getvalue())


def check_writable(paths: list[Path], overwrite: bool = False) -> None:
    """ValueError unless every file can be written; nothing is changed but that missing folders are made.

    >>> check_writable([Path(__file__)])
    Traceback (most recent call last):
    ValueError: ...images.py exists; --overwrite replaces it, another name keeps it
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"two files to write have the same name: {', '.join(map(str, paths))}")
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give the name of a file")
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists; --overwrite replaces it, another name keeps it")
    for folder in {path.parent for path in paths}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"cannot write into {folder}: {error.strerror}") from error


def fit(image: Image.Image, height: int, width: int | None = None) -> Image.Image:
    """The middle of a picture in this shape (None: a square), resized."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (width or height, height), Image.Resampling.LANCZOS)


def enlarged(image: Tensor, scale: float, multiple: int = 1) -> Tensor:
    """Pictures (B,3,H,W) in [0, 1], their sides about `scale` times as long and divisible by `multiple`.

    >>> enlarged(torch.zeros(1, 3, 16, 24), 1.5, multiple=8).shape
    torch.Size([1, 3, 24, 40])
    """
    sides = [max(1, int(side * scale / multiple + 0.5)) * multiple for side in image.shape[-2:]]
    return torch.nn.functional.interpolate(image, size=sides, mode="bicubic", antialias=scale < 1).clamp(0, 1)


def image_format(path: str | Path) -> str:
    """Pillow's name of the format that the file name asks for; ValueError if there is none.

    >>> image_format("house.jpg")
    'JPEG'
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"the picture {path} should end in {', '.join(FORMATS)}, behind a name")
    return FORMATS[Path(path).suffix.lower()]


def _key(picture: Image.Image) -> object:
    """The colour that is transparent, in the scale of the pixels, which Pillow forgets for some files."""
    raw, key = next((str(tile[3]) for tile in getattr(picture, "tile", ())), ""), picture.info.get("transparency")
    if raw not in KEYS or key is None:
        return key
    parts = [int(KEYS[raw] * value) for value in (key if isinstance(key, tuple) else [key])]
    return tuple(parts) if len(parts) == 3 else parts[0]


def _several(pictures: object, what: str) -> list:
    """A picture or pictures as a list of PIL pictures or of tensors, or ValueError."""
    from PIL import Image

    parts = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    if not parts:
        raise ValueError(f"there is no {what.split()[1]} in the list")
    kinds = list(dict.fromkeys(type(part).__name__ for part in parts))
    if not all(isinstance(part, (Tensor, Image.Image)) for part in parts):
        raise ValueError(f"{what} is a PIL picture, a tensor, or a list of them; not a {' and a '.join(kinds)}")
    if len({isinstance(part, Tensor) for part in parts}) > 1:
        raise ValueError(f"a list holds only PIL pictures or only tensors, not a {' and a '.join(kinds)}")
    return parts


def _checked(batch: Tensor, rule: str, channels: int) -> Tensor:
    """The batch as (B,channels,H,W) float32, or ValueError: the rule, and what came instead."""
    batch = batch.float()
    low, high = (batch.min(), batch.max()) if batch.numel() else (math.nan, math.nan)
    if batch.ndim != 4 or batch.shape[1] != channels or not (low >= 0 and high <= 1):
        raise ValueError(f"{rule}; this one is {tuple(batch.shape)}, from {low:.3g} to {high:.3g}")
    return batch


def _sides(own: tuple[int, int], height: int | None, width: int | None, multiple: int) -> tuple[int, int]:
    sides = (height or own[0] // multiple * multiple, width or own[1] // multiple * multiple)
    if 0 in sides:
        raise ValueError(f"the picture is {own[1]}×{own[0]} pixels, too small for multiples of {multiple}: give height "
                         "and width, or a larger one")
    check_sides(sides, multiple)
    return sides


def check_sides(sides: tuple[int, int], multiple: int) -> None:
    """ValueError unless height and width are positive multiples of `multiple`.

    >>> check_sides((32, 30), 4)
    Traceback (most recent call last):
    ValueError: width is 30; it must be a positive multiple of 4
    """
    for name, side in zip(("height", "width"), sides):
        if side < 1 or side % multiple:
            raise ValueError(f"{name} is {side}; it must be a positive multiple of {multiple}")
