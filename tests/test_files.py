"""Folders of pictures, MNIST and CIFAR-10 files: what is read, and that nothing in a file can do harm."""

import builtins
import gzip
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.data import files

pytestmark = pytest.mark.quick


def folder_of(tmp_path, *rows):
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def pictures(tmp_path):
    """A wide picture (red, green in the middle, blue) and a small grey one in a subfolder."""
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("lime", (30, 0, 60, 30))
    wide.paste("blue", (60, 0, 90, 30))
    wide.save(tmp_path / "wide.png")
    (tmp_path / "sub").mkdir()
    Image.new("L", (7, 9), 128).save(tmp_path / "sub" / "grey.png")
    return folder_of(tmp_path, {"file_name": "wide.png", "text": "the middle, a café", "more": 1},
                     {"file_name": "sub/grey.png", "text": "grey"})


def test_a_folder_is_cropped_to_the_middle_square_and_resized(pictures):
    found, captions = files.load_folder(pictures, 16)
    assert captions == ["the middle, a café", "grey"] and found.dtype == torch.uint8 and found.shape == (2, 3, 16, 16)
    assert (found[0, 1, :, 2:-2] > 250).all() and (found[0, ::2, :, 2:-2] < 5).all()  # green, but for resampling
    assert (found[1] == 128).all()


def test_streaming_gives_the_same_pictures_one_by_one(pictures):
    found, captions = files.load_folder(pictures, 8)
    streamed = list(files.stream_folder(pictures, 8))
    assert [text for _, text in streamed] == captions
    assert torch.equal(torch.stack([picture for picture, _ in streamed]), found)


def test_streaming_opens_a_picture_only_when_it_is_asked_for(pictures):
    stream = files.stream_folder(pictures, 8)
    next(stream)
    (pictures / "sub" / "grey.png").write_bytes(b"broken in the meantime")
    with pytest.raises(ValueError, match="grey.png cannot be read as a picture"):
        next(stream)


@pytest.mark.parametrize("line, error, message", [
    ("{", ValueError, "line 2: not valid JSON"),
    ('{"file_name": "a.png", "text": "\\udcff"}', ValueError, "line 2: the text holds half a character"),
    ('["wide.png", "x"]', ValueError, "line 2: expected"),
    ('{"file_name": "wide.png"}', ValueError, "line 2: expected .*text"),
    ('{"file_name": "wide.png", "text": 3}', ValueError, "line 2: expected"),
    ('{"file_name": "none.png", "text": "x"}', FileNotFoundError, "line 2: there is no picture none.png"),
    ('{"file_name": "../out.png", "text": "x"}', ValueError, r"line 2: \.\./out.png leads out of the folder"),
    ('{"file_name": "/etc/passwd", "text": "x"}', ValueError, "line 2: /etc/passwd leads out of the folder")])
def test_a_wrong_line_is_named_with_its_number(pictures, line, error, message):
    Image.new("RGB", (4, 4)).save(pictures.parent / "out.png")
    with (pictures / "metadata.jsonl").open("w") as file:
        file.write('{"file_name": "wide.png", "text": "fine"}\n' + line)
    with pytest.raises(error, match=message):
        files.load_folder(pictures, 8)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_pictures_may_be_links_to_another_place(tmp_path, pictures):
    (pictures / "wide.png").rename(pictures.parent / "elsewhere.png")
    (pictures / "wide.png").symlink_to(pictures.parent / "elsewhere.png")
    assert len(files.load_folder(pictures, 8)[0]) == 2


def test_a_folder_without_pictures_or_size_is_refused(tmp_path, pictures):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        files.load_folder(tmp_path / "nowhere", 8)
    with pytest.raises(FileNotFoundError, match="no metadata.jsonl in"):
        files.load_folder(tmp_path / "sub", 8)
    with pytest.raises(ValueError, match="size is 0"):
        files.load_folder(pictures, 0)
    (pictures / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="metadata.jsonl is empty"):
        files.load_folder(pictures, 8)
    (pictures / "metadata.jsonl").write_bytes(b'{"file_name": "wide.png", "text": "caf\xe9"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        files.load_folder(pictures, 8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("ending, pack", [("", bytes), (".gz", gzip.compress)])
def test_mnist_is_read_packed_and_unpacked(tmp_path, ending, pack):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
    for stem, digits in (("train", [3, 1, 4, 1, 5]), ("t10k", [9, 2, 6, 5, 3])):
        (tmp_path / f"{stem}-images-idx3-ubyte{ending}").write_bytes(pack(idx(images)))
        (tmp_path / f"{stem}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(np.array(digits))))
    found, labels = files.load_mnist(tmp_path)
    assert torch.equal(found, torch.tensor(images, dtype=torch.uint8)[:, None]) and labels.tolist() == [3, 1, 4, 1, 5]
    assert files.load_mnist(tmp_path, train=False)[1].tolist() == [9, 2, 6, 5, 3]


GOOD = idx(np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("data, message", [
    (b"", "not an IDX file .* starts with nothing"), (b"\x89PNG....", "not an IDX file .* starts with 89 50 4e 47"),
    (b"\0\0\x0d" + GOOD[3:], "not an IDX file of unsigned bytes"), (GOOD[:-1], "should hold 2 × 3 bytes, it holds 5"),
    (GOOD + b"x", "should hold 2 × 3 bytes, it holds more"), (GOOD[:9], "it holds 0"),
    (gzip.compress(GOOD, mtime=0)[:-12], "damaged gzip file"), (b"\x1f\x8b" + b"x" * 20, "damaged gzip file")])
def test_a_damaged_idx_file_is_refused(tmp_path, data, message):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        files.read_idx(tmp_path / "a")


def test_mnist_files_must_fit_together(tmp_path):
    with pytest.raises(FileNotFoundError, match="no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in"):
        files.load_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((2, 28, 28))))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(3)))
    with pytest.raises(ValueError, match=r"images \(2, 28, 28\) and labels \(3,\)"):
        files.load_mnist(tmp_path)


def batch(n: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.integers(0, 10, n).tolist()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("key", [str, str.encode])
def test_cifar10_python_version_equals_what_was_pickled(tmp_path, protocol, key):
    for i in range(1, 6):
        data, labels = batch(3, i)
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps({key("data"): data, key("labels"): labels}, protocol))
    pictures, labels = files.load_cifar10(tmp_path)
    assert pictures.shape == (15, 3, 32, 32)
    assert labels.tolist() == [label for i in range(1, 6) for label in batch(3, i)[1]]
    assert torch.equal(pictures[3:6], torch.from_numpy(batch(3, 2)[0]).view(3, 3, 32, 32))


def test_cifar10_pickled_by_python_2_is_read(tmp_path):
    """The published files: byte strings as keys (opcode U), numpy.core, the data as one long byte string (opcode T)."""
    data, labels = batch(2, 0)
    array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x02M\x00\x0c\x86"
             b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
             b"T" + struct.pack("<I", data.size) + data.tobytes() + b"tb")
    numbers = b"(" + b"".join(b"K" + bytes([label]) for label in labels) + b"l"
    (tmp_path / "test_batch").write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u.")
    pictures, found = files.load_cifar10(tmp_path, train=False)
    assert torch.equal(pictures.view(2, -1), torch.from_numpy(data)) and found.tolist() == labels


def test_cifar10_binary_version(tmp_path):
    data, labels = batch(4, 7)
    rows = np.concatenate([np.array(labels, np.uint8)[:, None], data], 1)
    (tmp_path / "test_batch.bin").write_bytes(rows.tobytes())
    pictures, found = files.load_cifar10(tmp_path, train=False)
    assert torch.equal(pictures.view(4, -1), torch.from_numpy(data)) and found.tolist() == labels
    (tmp_path / "test_batch.bin").write_bytes(rows.tobytes()[:-1])
    with pytest.raises(ValueError, match="1 \\+ 3072 per picture"):
        files.load_cifar10(tmp_path, train=False)
    (tmp_path / "test_batch.bin").write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(ValueError, match="labels from 10 to 10"):
        files.load_cifar10(tmp_path, train=False)


class Evil:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("call, args", [(builtins.print, ("run!",)), (builtins.eval, ("1",)), (np.fromfile, ("x",)),
                                        (builtins.getattr, (1, "real")), (np.array, ([1],))])
def test_nothing_in_a_pickle_is_run(tmp_path, capsys, call, args):
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": Evil(call, *args), "labels": [1]}))
    with pytest.raises(ValueError, match="not a batch of the CIFAR-10 python version: it asks for"):
        files.load_cifar10(tmp_path, train=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [
    b"", b"not a pickle", b"\x80\x02}q\x00.", b"\x80\x04N.", pickle.dumps({"data": 3, "labels": [1]}),
    pickle.dumps({"data": batch(2, 0)[0], "labels": [1]}, 2),
    pickle.dumps({"data": np.zeros((1, 3072)), "labels": [1]}, 2),
    pickle.dumps({"data": np.asfortranarray(batch(2, 0)[0]), "labels": [1, 2]}, 2),
    pickle.dumps({"data": batch(1, 0)[0], "labels": ["cat"]}, 2),
    pickle.dumps({"data": batch(1, 0)[0], "labels": [1]}, 2)[:99]])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match="test_batch is not a batch of the CIFAR-10 python version"):
        files.load_cifar10(tmp_path, train=False)


def test_missing_cifar10_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data_batch_1 or data_batch_1.bin in"):
        files.load_cifar10(tmp_path)
