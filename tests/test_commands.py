"""The commands as functions."""
import pytest

from minidiff import commands

pytestmark = pytest.mark.quick


def test_every_recipe_says_in_a_line_what_it_makes():
    assert {"clip", "vae", "unet"} <= commands.recipes().keys()
    assert all(len(about) > 20 and "\n" not in about for about in commands.recipes().values())
