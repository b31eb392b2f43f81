"""The web UI's prompts: weights, BREAK, LoRAs, and what only looks like them."""
import pytest

from minidiff.io.emphasis import cut_loras, looks_weighted, parse

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("prompt, parts", [  # the first six: what AUTOMATIC1111's own docstring gives
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
     [("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
      ("sky", 1.4641), (".", 1.1)]),
    ("", [("", 1.0)]), ("BREAK", [("", 1.0), None, ("", 1.0)]),
    ("a house BREAK snow,BREAKFAST", [("a house", 1.0), None, ("snow,BREAKFAST", 1.0)]),
    ("(red:1.5) [[sea]]", [("red", 1.5), (" ", 1.0), ("sea", 1 / 1.21)]),
    ("a) b] (c:d) 12:30", [("a) b] ", 1.0), ("c:d", 1.1), (" 12:30", 1.0)]),
    ("(a:-0.5)(b:.7)(c:2.)", [("a", -0.5), ("b", 0.7), ("c", 2.0)]),
    ("\\ \\\\ \\x", [("\\ \\ \\x", 1.0)])])
def test_a_prompt_is_read_as_in_the_web_ui(prompt, parts):
    read = parse(prompt)
    assert [part and part[0] for part in read] == [part and part[0] for part in parts]
    assert [part and part[1] for part in read] == [part and pytest.approx(part[1], rel=1e-9) for part in parts]


@pytest.mark.parametrize("prompt", ["a [red:blue:0.5] house", "[cow|horse]", "[:snow:10]", "x [a::5]"])
def test_what_changes_the_prompt_on_the_way_is_refused(prompt):
    with pytest.raises(ValueError, match="would change the prompt on the way, which is not supported"):
        parse(prompt)


def test_loras_are_cut_out():
    assert cut_loras("<lora:C:\\a b.safetensors:-.5> x <lora:ink>,y") == (
        " x ,y", [("C:\\a b.safetensors", -0.5), ("ink", 1.0)])
    assert cut_loras("a < lora: b") == ("a < lora: b", [])


@pytest.mark.parametrize("prompt, found", [
    ("(red:1.3) house", "(red:1.3)"), ("x ((red)) y", "((red))"), ("a [red] house", "[red]"), ("a BREAK b", "BREAK"),
    ("a <lora:ink:0.5>", "<lora:ink:0.5>"), ("a house (old)", None), (r"\[red\]", None), ("at 12:30", None),
    ("breakfast", None)])
def test_what_the_web_ui_would_not_read_as_letters_is_found(prompt, found):
    assert looks_weighted(prompt) == found
