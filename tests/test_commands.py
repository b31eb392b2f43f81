"""The commands as functions."""
import pytest
from PIL import Image, ImageChops

from minidiff import commands
from minidiff.data import scenes

pytestmark = pytest.mark.quick


def test_a_command_is_a_function(model, tmp_path):
    paths = commands.generate("a red house", model=str(model / "folder"), steps=1, out=tmp_path / "new" / "house.png")
    assert paths == [tmp_path / "new" / "house.png"]
    assert all(path.is_file() for path in paths)


def test_pictures_beyond_one_batch_continue_the_seeds(model, tmp_path, monkeypatch):
    def draw(name):
        commands.generate("a red house", model=model / "folder", steps=2, num_images=3, out=tmp_path / f"{name}.png")

    draw("a")
    monkeypatch.setattr(commands, "BATCH", 2)
    draw("b")
    for i in (1, 2, 3):
        pair = [Image.open(tmp_path / f"{name}-{i}.png") for name in "ab"]
        assert max(high for _, high in ImageChops.difference(*pair).getextrema()) <= 1
    assert ImageChops.difference(*(Image.open(tmp_path / f"a-{i}.png") for i in (1, 2))).getbbox()


def test_words_that_mini_sd_has_never_seen_get_one_line():
    with pytest.warns(UserWarning) as caught:
        commands._warn_unknown("a red dragon by a castle")
    message = str(caught[0].message)
    assert "never seen: dragon, castle" in message and commands.EXAMPLE in message and "\n" not in message
    assert all(word in message for values in scenes.ATTRIBUTES.values() for word in values)


def test_known_words_get_no_line(recwarn):
    commands._warn_unknown(commands.EXAMPLE)
    assert not recwarn.list


def test_every_recipe_says_in_a_line_what_it_makes():
    assert {"clip", "vae", "unet"} <= commands.recipes().keys()
    assert all(len(about) > 20 and "\n" not in about for about in commands.recipes().values())
