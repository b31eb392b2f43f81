"""Pictures in and out of tensors and files."""

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from minidiff.io.images import enlarge, fit, latent_colors, open_image, save_image, to_pil, to_rgb, to_tensor

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


def test_fit_takes_the_middle_and_enlarge_keeps_the_shape():
    image = Image.new("RGB", (30, 10), "blue")
    image.paste("red", (10, 0, 20, 10))
    assert fit(image, 10).getcolors() == [(100, (255, 0, 0))]
    assert enlarge(image, 3).size == (90, 30)
