"""Pictures in and out of tensors and files."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from minidiff.io.images import (
    fit,
    latent_colors,
    open_image,
    plain,
    save_image,
    to_mask,
    to_pil,
    to_rgb,
    to_tensor,
)

pytestmark = pytest.mark.quick


def test_pil_to_tensor_and_back_is_exact():
    image = Image.effect_noise((8, 4), 90).convert("RGB")
    batch = to_tensor(image)
    assert batch.shape == (1, 3, 4, 8) and batch.min() >= -1 and batch.max() <= 1
    assert to_pil(batch / 2 + 0.5)[0].tobytes() == image.tobytes()


def test_several_pictures_take_the_size_of_the_first():
    batch = to_tensor([Image.new("RGB", (17, 9)), Image.new("L", (40, 40), 255)], multiple=8)
    assert batch.shape == (2, 3, 8, 16)
    assert_close(batch[1], torch.ones(3, 8, 16))


def test_a_linear_code_is_shown_exactly():
    code = torch.tensor([[0.3, -1.0, 0.2], [0.5, 0.1, 0.9], [-0.2, 0.4, 0.1], [0.7, 0.3, -0.6]])  # (C, 3)

    def encode(image):
        return torch.nn.functional.avg_pool2d(torch.einsum("cd,bdhw->bchw", code, image), 4) + 0.1

    image = torch.rand(2, 3, 4, 4) * 2 - 1
    z = encode(image.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert_close(to_rgb(z, latent_colors(encode, 4)), image / 2 + 0.5, atol=1e-4, rtol=0)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".JPEG"])
def test_files_of_every_ending_are_what_they_say(tmp_path, suffix):
    save_image(Image.new("RGB", (16, 16), (200, 30, 60)), tmp_path / f"red{suffix}")
    assert max(abs(a - b) for a, b in zip(open_image(tmp_path / f"red{suffix}").getpixel((8, 8)), (200, 30, 60))) < 8


def test_a_photo_is_turned_as_its_camera_was_held(tmp_path):
    image = Image.new("RGB", (6, 2))
    image.getexif()[0x0112] = 6  # orientation: turned by 90 degrees
    image.save(tmp_path / "photo.jpg", exif=image.getexif())
    assert open_image(tmp_path / "photo.jpg").size == (2, 6)


def test_garbled_exif_data_are_no_reason_to_refuse_a_picture(tmp_path):
    Image.new("RGB", (6, 2), "red").save(tmp_path / "a.png", exif=b"Exif\0\0XXgarbage")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)
    assert to_tensor(Image.open(tmp_path / "a.png")).shape == (1, 3, 2, 6)


def test_a_dark_16_bit_netpbm_file_is_dark(tmp_path):
    for name, data in (("a.pgm", b"P5 1 1 65535\n\0\xff"), ("b.pgm", b"P2 1 1 65535\n255 "),
                       ("c.pfm", b"Pf 1 1 -1.0\n" + struct.pack("<f", 1 / 255))):
        (tmp_path / name).write_bytes(data)
        assert plain(Image.open(tmp_path / name)).getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "F", "P", "1"])
def test_a_picture_without_pixels_is_refused(mode):
    for door in (plain, lambda picture: to_tensor(picture, 8, 8), lambda picture: to_mask(picture, 8, 8)):
        with pytest.raises(ValueError, match="a picture has at least one pixel; this one is 0×5"):
            door(Image.new(mode, (0, 5)))


def test_a_picture_smaller_than_a_latent_is_named_with_its_size():
    for picture in (Image.new("RGB", (3, 9)), torch.zeros(3, 9, 3)):
        with pytest.raises(ValueError, match="the picture is 3×9 pixels, too small for multiples of 4"):
            to_tensor(picture, multiple=4)


@pytest.mark.parametrize("value, said", [
    ([], "there is no (image|mask) in the list"), (np.ones((3, 8, 8)), "not a ndarray"), ("a.png", "not a str"),
    ([Image.new("RGB", (8, 8)), torch.ones(3, 8, 8)], "only PIL pictures or only tensors, not a Image and a Tensor"),
    ([torch.ones(3, 8, 8), None], "a list of them; not a Tensor and a NoneType"),
    (torch.ones(1, 1, 3, 8, 8), r"this one is \(1, 1, 3, 8, 8\)")])
def test_what_is_no_picture_and_no_mask_is_named(value, said):
    for door in (to_tensor, lambda mask: to_mask(mask, 8, 8)):
        with pytest.raises(ValueError, match=said):
            door(value)


def test_fit_takes_the_middle():
    image = Image.new("RGB", (30, 10), "blue")
    image.paste("red", (10, 0, 20, 10))
    assert fit(image, 10).getcolors() == [(100, (255, 0, 0))]


def deep(mode, dtype, value):
    return Image.frombytes(mode, (4, 4), np.full((4, 4), value, dtype).tobytes())


GREY = Image.new("L", (4, 4), 200)
RGB = Image.new("RGB", (4, 4), (200, 200, 200))
OF_200 = {"1": GREY.point(lambda v: 255).convert("1"), "L": GREY, "LA": GREY.convert("LA"),
          "La": GREY.convert("LA").convert("La"), "P": GREY.convert("P"), "PA": RGB.convert("PA"), "RGB": RGB,
          "RGBA": RGB.convert("RGBA"), "RGBa": RGB.convert("RGBA").convert("RGBa"), "RGBX": RGB.convert("RGBX"),
          "CMYK": RGB.convert("CMYK"), "YCbCr": RGB.convert("YCbCr"), "HSV": RGB.convert("HSV"),
          "LAB": RGB.convert("LAB"), "I": GREY.convert("I"), "F": GREY.convert("F"),
          "I in 16 bits": deep("I", "<i4", 200 * 257), "I;16": deep("I;16", "<u2", 200 * 257),
          "I;16L": deep("I;16L", "<u2", 200 * 257), "I;16B": deep("I;16B", ">u2", 200 * 257),
          "F in [0, 1]": Image.fromarray(np.full((4, 4), 200 / 255, np.float32))}


@pytest.mark.parametrize("mode", OF_200)
def test_a_grey_is_the_same_grey_in_every_mode(mode):
    want = 255 if mode == "1" else 200
    near = 4 if mode in ("P", "PA", "LAB") else 0  # colours of a palette, and of another space
    assert all(abs(v - want) <= near for v in plain(OF_200[mode]).getpixel((1, 2)))
    assert abs(255 * (to_tensor(OF_200[mode])[0, 0, 0, 0] / 2 + 0.5) - want) <= near + 1e-4
    assert to_mask(OF_200[mode], 2, 3).equal(torch.ones(1, 1, 2, 3))


def test_a_dark_picture_of_16_bits_is_dark_and_masks_nothing():
    for mode, dtype in (("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")):
        assert plain(deep(mode, dtype, 300)).getpixel((0, 0)) == (1, 1, 1)
        assert not to_mask(deep(mode, dtype, 32000), 2, 2).any()


@pytest.mark.parametrize("value, dtype", [(-1, np.int32), (70_000, np.int32), (np.nan, np.float32),
                                          (np.inf, np.float32), (-0.1, np.float32)])
def test_a_picture_without_a_range_is_refused(value, dtype):
    for door in (plain, to_tensor, lambda picture: to_mask(picture, 2, 2)):
        with pytest.raises(ValueError, match="a picture of mode . has values from 0 to 65535, not from"):
            door(Image.fromarray(np.full((2, 2), value, dtype)))


def hidden(mode):
    """A picture that is red or black where it is transparent."""
    if mode == "P":
        image = Image.new("P", (2, 2))
        image.putpalette([255, 0, 0])
        image.info["transparency"] = 0
        return image
    if mode in ("L", "RGB"):
        image = Image.new(mode, (2, 2), 0 if mode == "L" else (255, 0, 0))
        image.info["transparency"] = image.getpixel((0, 0))
        return image
    if mode == "I;16":
        image = deep("I;16", "<u2", 12_345)
        image.info["transparency"] = 12_345
        return image
    return Image.new("RGBA", (2, 2), (255, 0, 0, 0)).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "PA", "P", "L", "RGB", "I;16"])
def test_what_is_transparent_is_white_and_in_a_mask_black(mode):
    assert plain(hidden(mode)).getpixel((0, 0)) == (255, 255, 255)
    assert to_tensor(hidden(mode)).equal(torch.ones(1, 3, *hidden(mode).size))
    assert not to_mask(hidden(mode), 2, 2).any()
    assert not to_mask(Image.new("RGBA", (2, 2), (255, 255, 255, 0)), 2, 2).any()


def test_half_transparent_is_half_white():
    assert plain(Image.new("RGBA", (1, 1), (255, 0, 0, 51))).getpixel((0, 0)) == (255, 204, 204)


def png(depth, color, pixel, key):
    """A PNG of one pixel, whose colour `key` is transparent."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, depth, color, 0, 0, 0))
            + chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(b"\0" + pixel)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("depth, color, pixel, key", [
    (1, 0, b"\0", b"\0\0"), (2, 0, b"\x40", b"\0\1"), (4, 0, b"\x50", b"\0\5"), (8, 0, b"\x64", b"\0\x64"),
    (16, 0, b"\x64\1", b"\x64\1"), (8, 2, b"\1\2\3", b"\0\1\0\2\0\3"), (16, 2, b"\x64\1" * 3, b"\x64\1" * 3)])
def test_the_transparent_colour_of_a_png_is_found_at_every_depth(tmp_path, depth, color, pixel, key):
    (tmp_path / "a.png").write_bytes(png(depth, color, pixel, key))
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    assert to_tensor(Image.open(tmp_path / "a.png")).equal(torch.ones(1, 3, 1, 1))
    assert open_image(tmp_path / "a.png", "black").getpixel((0, 0)) == (0, 0, 0)
    (tmp_path / "b.png").write_bytes(png(depth, color, pixel, bytes(len(key) - 1) + b"\3" if depth > 1 else b"\0\1"))
    assert open_image(tmp_path / "b.png").getpixel((0, 0)) != (255, 255, 255)


def test_pictures_that_were_not_opened_by_us_are_turned_too(tmp_path):
    image = Image.new("RGB", (6, 2))
    image.getexif()[0x0112] = 6
    image.save(tmp_path / "photo.jpg", exif=image.getexif())
    assert to_tensor(Image.open(tmp_path / "photo.jpg")).shape == (1, 3, 6, 2)


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        r, g, b = open_image(tmp_path / name).getpixel((0, 0))
        assert r > 240 and g < 15 and b < 15


@pytest.mark.parametrize("pictures, message", [
    ([GREY, torch.zeros(3, 4, 4)], "only PIL pictures or only tensors, not a Image and a Tensor"),
    ([torch.zeros(3, 4, 4), GREY], "only PIL pictures or only tensors, not a Tensor and a Image"),
    ([torch.zeros(3, 4, 4), torch.zeros(3, 8, 4)], "of one size, or height and width are given; these are 4×4, 8×4"),
    ([torch.zeros(3, 4, 4), torch.zeros(4, 4)], r"this one is \(4, 4\)"), (torch.zeros(0, 3, 4, 4), "from nan to nan"),
    (np.zeros((4, 4, 3)), "not a ndarray")])
def test_pictures_that_do_not_fit_each_other_are_named(pictures, message):
    with pytest.raises(ValueError, match=message):
        to_tensor(pictures)


def test_tensors_of_several_sizes_fit_a_size_that_is_given():
    assert to_tensor([torch.zeros(3, 4, 4), torch.ones(3, 8, 2)], 6, 5).shape == (2, 3, 6, 5)
    assert to_mask([torch.zeros(4, 4), torch.ones(8, 2)], 6, 5).flatten(1).mean(1).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"a mask is in \[0, 1\], of shape .*; this one is \(1, 3, 4, 4\)"):
        to_mask(torch.zeros(1, 3, 4, 4), 4, 4)
