"""Which device and which dtype: what there is, and one sentence for what there is not."""
import pytest
import torch

from minidiff.device import default_device, find_device, vae_dtype

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("cuda, mps, best", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_fastest_device_is_the_default(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert default_device() == best


def test_a_device_may_be_a_name_or_a_device():
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["banana", "gpu", "cuda:99", 3.5])
def test_a_device_that_is_none_is_named(name):
    with pytest.raises(ValueError, match=f"there is no device '{name}' here; cpu always works"):
        find_device(name)


def test_only_float16_is_too_small_for_the_vae():
    given = (None, torch.float32, torch.bfloat16, torch.float16)
    assert [vae_dtype(dtype) for dtype in given] == [None, torch.float32, torch.bfloat16, torch.float32]
