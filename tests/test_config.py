"""Configs: every value is of its field's type and within its range, or a sentence names file, key and value."""
import json
import re
import time

import pytest

from minidiff.nets.unet import UNet, UNetConfig
from tests import tiny

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("key, value, should", [
    ("sample_size", "8", "a whole number from 0 to 1,048,576 or a list of whole numbers or null"),
    ("sample_size", [8, 6.5], "a whole number from 0 to 1,048,576 or a list"),
    ("sample_size", True, "a whole number"), ("layers_per_block", None, "a whole number from 0 to 1,048,576 or"),
    ("layers_per_block", -1, "a whole number from 0 to 1,048,576"), ("norm_num_groups", None, "a whole number"),
    ("layers_per_block", 2**20 + 1, "a whole number from 0 to 1,048,576"), ("norm_num_groups", 10**40, "a whole"),
    ("norm_eps", "1e-5", "a number"),
    ("block_out_channels", 320, "a list of whole numbers"), ("block_out_channels", [320, "640"], "a list"),
    ("flip_sin_to_cos", "true", "true or false"), ("flip_sin_to_cos", 1, "true or false"),
    ("down_block_types", "DownBlock2D", "a list of texts"), ("cross_attention_dim", [768], "a whole number"),
    ("norm_eps", float("nan"), "a number"), ("in_channels", 4.5, "a whole number"), ("mid_block_type", 3, "a text")])
def test_a_value_of_another_type_is_named(key, value, should):
    shown = tuple(value) if isinstance(value, list) else value
    with pytest.raises(ValueError, match=re.escape(f"UNetConfig has {key} = {shown!r}; it should be {should}")):
        UNetConfig.from_dict({key: value})


def test_a_list_that_says_no_at_every_resolution_says_nothing():
    assert UNetConfig.from_dict({"only_cross_attention": [False] * 4}) == UNetConfig()
    with pytest.raises(ValueError, match="does not support only_cross_attention"):
        UNetConfig.from_dict({"only_cross_attention": [False, False, True, True]})


@pytest.mark.parametrize("key", ["layers_per_block", "transformer_layers_per_block"])
def test_a_network_far_larger_than_its_file_is_never_built(tmp_path, key):
    UNet(UNetConfig.from_dict(tiny.UNET)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: 10**6}))
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: the config asks for more than .* tensors, far"):
        UNet.from_pretrained(tmp_path)
    assert time.monotonic() - began < 10
