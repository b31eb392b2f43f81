"""Folders of captioned pictures: what is read, and what is said of what cannot be."""

import json
import os

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
    images, captions = zip(*files.stream_folder(pictures, 16))
    found, captions = torch.stack(images), list(captions)
    assert captions == ["the middle, a café", "grey"] and found.dtype == torch.uint8 and found.shape == (2, 3, 16, 16)
    assert (found[0, 1, :, 2:-2] > 250).all() and (found[0, ::2, :, 2:-2] < 5).all()  # green, but for resampling
    assert (found[1] == 128).all()


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
        list(files.stream_folder(pictures, 8))


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_pictures_may_be_links_to_another_place(tmp_path, pictures):
    (pictures / "wide.png").rename(pictures.parent / "elsewhere.png")
    (pictures / "wide.png").symlink_to(pictures.parent / "elsewhere.png")
    assert len(list(files.stream_folder(pictures, 8))) == 2


def test_a_folder_without_pictures_or_size_is_refused(tmp_path, pictures):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        list(files.stream_folder(tmp_path / "nowhere", 8))
    (tmp_path / "empty").mkdir()
    said = "no picture in .*empty, and no metadata.jsonl; it should hold either that or files that end in .png, .*"
    with pytest.raises(FileNotFoundError, match=said + "captions in .txt files beside them or as"):
        list(files.stream_folder(tmp_path / "empty", 8))
    with pytest.raises(ValueError, match="size is 0"):
        list(files.stream_folder(pictures, 0))
    (pictures / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="metadata.jsonl is empty"):
        list(files.stream_folder(pictures, 8))
    (pictures / "metadata.jsonl").write_bytes(b'{"file_name": "wide.png", "text": "caf\xe9"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        list(files.stream_folder(pictures, 8))


@pytest.mark.parametrize("name, caption", [
    ("a-red_house.png", "a red house"), ("a red house (2).jpg", "a red house"), ("cat 12.webp", "cat"),
    ("cat_3_.png", "cat"), ("7.png", "7"), ("in 2024 a tree.png", "in 2024 a tree"), ("b52.png", "b")])
def test_without_metadata_the_name_is_the_caption(tmp_path, name, caption):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [words for _, words in files.stream_folder(tmp_path, 8)] == [caption]


def test_a_text_beside_a_picture_is_its_caption(tmp_path):
    """kohya's layout, folders inside the folder included."""
    (tmp_path / "10_cat").mkdir()
    for name in ("10_cat/a.png", "10_cat/b.JPG", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    (tmp_path / "10_cat" / "a.txt").write_text("a cat,\n on a mat\n", encoding="utf-8-sig")
    (tmp_path / "10_cat" / "b.caption").write_text("another café", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("of no picture")
    assert [words for _, words in files.stream_folder(tmp_path, 8)] == ["a cat, on a mat", "another café", "c"]
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="c.txt is not UTF-8 text"):
        list(files.stream_folder(tmp_path, 8))
