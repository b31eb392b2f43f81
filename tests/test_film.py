"""Films: what is in the file."""

import pytest
import torch
from PIL import Image

from minidiff.samplers import Step
from minidiff.schedule import Level
from minidiff.teach.film import frame, thin, write_film
from tests import tiny

pytestmark = pytest.mark.quick


def test_a_long_film_is_thinned_to_25_frames_and_keeps_its_ends(tmp_path):
    write_film([Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(100)], tmp_path / "long.png")
    with Image.open(tmp_path / "long.png") as file:
        assert file.n_frames == 25 and file.info["loop"] == 0
        assert file.convert("RGB").getpixel((0, 0)) == (0, 0, 0)
        file.seek(24)
        assert file.convert("RGB").getpixel((0, 0)) == (99, 0, 0)


def test_thin_is_even():
    assert thin(range(101), 5) == [0, 25, 50, 75, 100]
    assert thin(range(3)) == [0, 1, 2]


def test_one_frame_is_a_film_too(tmp_path):
    write_film([Image.new("RGB", (4, 4))], tmp_path / "one.webp")
    assert (tmp_path / "one.webp").is_file()


@pytest.mark.parametrize(("frames", "name", "said"), [([], "no.gif", "at least one"), ([1], "a.mp4", "should end in")])
def test_what_is_no_film_is_refused(tmp_path, frames, name, said):
    with pytest.raises(ValueError, match=said):
        write_film(frames, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_frame_shows_state_guess_and_the_noise_left(tmp_path):
    pipe = tiny.pipeline(tmp_path)
    z = torch.zeros(2, 4, 8, 8)
    start = frame(pipe, Step(Level(999, 0.0, 1.0), z, None))
    assert start.getpixel((400, 100)) == (128, 128, 128)  # no guess yet
    assert start.getpixel((start.width - 2, start.height - 3)) == (68, 68, 68)  # all noise
    end = frame(pipe, Step(Level(0, 1.0, 0.0), z, z))
    assert end.getpixel((end.width // 2, end.height - 3)) == (255, 255, 255)
    left, right = (end.crop((x, 0, x + 256, 256)).tobytes() for x in (0, 264))
    assert left == right


def test_a_variance_exploding_state_is_shown_at_unit_variance(tmp_path):
    pipe = tiny.pipeline(tmp_path)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    a = frame(pipe, Step(Level(999, 0.6, 0.8), z, None))
    b = frame(pipe, Step(Level(999, 6.0, 8.0), 10 * z, None))
    assert a.tobytes() == b.tobytes()
