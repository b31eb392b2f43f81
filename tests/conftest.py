"""What several test files start from."""
import pytest
from hypothesis import settings

from minidiff.io.tokenizer import load_tokenizer, train_tokenizer
from minidiff.io.weights import load_state
from tests import tiny

settings.register_profile("long", max_examples=2000)  # --hypothesis-profile long


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """The folder of a tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    train_tokenizer(tiny.CAPTIONS, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return load_tokenizer(vocabulary)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A shrunken Stable Diffusion 1, as a folder and as a file."""
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny.pipeline(folder / "words")
    pipe.save_pretrained(folder / "folder")
    pipe.save_pretrained(folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def state(model):
    """The tensors of that file."""
    return load_state(model / "model.safetensors")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """That model itself."""
    return tiny.pipeline(tmp_path_factory.mktemp("words"))
