"""JSON of others: what is wrong with it is a sentence; nothing of it reaches the terminal as a control character."""
import json

import pytest

from minidiff.io.plain_text import LENGTH, one_line, parse, read_json

pytestmark = pytest.mark.quick


def test_read_json_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no config.json in"):
        read_json(tmp_path / "config.json")
    for text, message in (("", "is empty"), ("{", "is not valid JSON"), ("[1]", "should hold a JSON object"),
                          ("<html>", "web page"), ("version https://git-lfs x", "git-LFS")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_json(tmp_path / "config.json")


def test_configs_with_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "config.json") == {"a": 1}


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "[" * 150 + "]" * 150, "9" * 5000],
                         ids=["lists", "objects", "just too deep", "digits"])
def test_json_that_would_break_the_parser_is_a_sentence(text):
    with pytest.raises(ValueError, match="nested too deeply|digits"):
        parse(text)


def test_json_of_usual_depth_is_what_json_makes_of_it():
    text = json.dumps({"a": [[[{"b": [1, 2.5, None, True, "x"]}]] * 3] * 3})
    assert parse(text) == json.loads(text)


def test_a_message_is_one_line_without_control_characters():
    assert one_line("a\r\n\tb \x1b]0;title\x07 \u202ex \x9b31m 猫") == r"a b \x1b]0;title\x07 \u202ex \x9b31m 猫"
    assert len(one_line("ab" * 10**6)) < LENGTH + 10
