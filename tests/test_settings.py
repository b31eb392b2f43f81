"""Settings: numbers of every library, nothing that only looks like one, and a seed for each picture."""
import numpy as np
import pytest
import torch

from minidiff.sd.conditions import draw
from minidiff.sd.settings import SEEDS, Settings, check_seeds
from tests import tiny

pytestmark = pytest.mark.quick


def test_sizes_are_two_whole_numbers():
    for pair in ([np.int64(3), torch.tensor(4)], np.array([3, 4]), torch.tensor([3, 4])):
        assert Settings(original_size=pair).original_size == (3, 4)
    for value in (5, (3.0, 4), (True, 4), (1, 2, 3), ("3", 4), (10**30, 1)):
        with pytest.raises(ValueError, match="original_size is .*; it must be two whole numbers"):
            Settings(original_size=value)
    with pytest.raises(ValueError, match="crops_coords_top_left is None; it must be two whole numbers"):
        Settings(crops_coords_top_left=None)


def test_seeds_end_where_they_would_draw_the_same_again(tmp_path):
    pair = [torch.Generator().manual_seed(seed) for seed in (0, SEEDS)]
    assert draw(pair[:1], (1, 9)).equal(draw(pair[1:], (1, 9)))  # why there is a limit
    for seed, count in ((SEEDS, 1), (SEEDS - 1, 2), (2**63, 1), (-1, 1)):
        with pytest.raises(ValueError, match=f"seed is {seed}[;,] "):
            Settings(seed=seed, num_images=count)
    check_seeds(SEEDS - 2, 2)
    pipe = tiny.pipeline(tmp_path)
    assert pipe("a tree", seed=np.uint32(SEEDS - 1), steps=1, output="latent").isfinite().all()
    with pytest.raises(ValueError, match="the last of 3 pictures would have 4294967297; seeds end at 4294967295"):
        pipe(["a tree"] * 3, seed=SEEDS - 1, steps=1)
