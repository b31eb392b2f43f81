"""Pages and slides: what is in the files, without a browser (tests/test_decks.py has one)."""
import re
from importlib.util import find_spec

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minidiff import cli
from minidiff.teach import lab, web

pytestmark = pytest.mark.quick
FILM = '<figure class="minidiff-stored"><img alt="a film" src="data:image/webp;base64,AAAA"></figure>'
VIEW = {lab.VIEW: {"model_id": "x"}, "text/plain": "VBox()"}


def slide(cell, kind: str, *tags: str):
    cell.metadata |= {"slideshow": {"slide_type": kind}, "tags": list(tags)}
    return cell


def shows(*bundles: dict):
    return [new_output("display_data", data=bundle) for bundle in bundles]


BOOK = new_notebook(cells=[
    slide(new_markdown_cell("# Noise\n\nSee [the next](02.ipynb#Two-words) and [answers](solutions/01.ipynb), [a paper]"
                            "(https://example.org).\n\n$a < b$ and\n\n| x | y |\n|---|---|\n| 1 | 2 |"), "slide"),
    new_code_cell("x = 1  # <one>\nprint(x)", outputs=[new_output("stream", text="1 < 2\n")]),
    slide(new_markdown_cell("## Two words\n\nText. [Here](#Two-words), [there](#Quiz)."), "subslide"),
    new_code_cell("explore(draw)", outputs=shows({"text/html": FILM, "text/plain": "a film"}, VIEW)),
    slide(new_markdown_cell("## Quiz"), "skip"),
    new_markdown_cell("not on slides"),
    slide(new_markdown_cell("### On the projector\n\n*one idea.* Ask them first."), "slide", "projector"),
    slide(new_code_cell("show(x)", outputs=shows({"image/png": "AAAA\n", "text/plain": 'a "still"'})), "fragment"),
    new_code_cell('check("01.1", f)', outputs=[new_output("stream", text="○ 01.1\n")]),
])


@pytest.fixture
def books(tmp_path):
    for name in ("01", "02"):
        nbformat.write(BOOK, tmp_path / f"{name}.ipynb")
    return tmp_path


def test_a_page_has_text_code_outputs_and_the_film_of_a_widget(books, tmp_path):
    first, second = web.pages(tmp_path / "out", books)
    listed = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert '<a href="01.html">Noise</a>' in listed and '<a href="02.html">Noise</a>' in listed
    text = first.read_text(encoding="utf-8")
    assert (first.name, second.name) == ("01.html", "02.html") and text.count("<title>Noise</title>") == 1
    assert '<h2 id="Two-words">Two words</h2>' in text and "$a &lt; b$" in text and "<td>2</td>" in text
    assert "&lt;one&gt;" in text and "1 &lt; 2" in text and FILM in text and "VBox" not in text
    assert 'alt="a &quot;still&quot;" src="data:image/png;base64,AAAA"' in text and "○ 01.1" in text
    for link in ('<a href="02.html#Two-words">the next</a>', '<a href="02.html">→ 02</a>',
                 'and answers, <a href="https://example.org">a paper</a>'):
        assert link in text


def test_what_scrolls_can_be_reached_by_keys_and_has_a_name(books, tmp_path):
    text = next(web.pages(tmp_path / "out", books)).read_text(encoding="utf-8")
    for tag in re.findall(r'<pre[^>]*>|<div class="wide"[^>]*>', text):
        assert 'tabindex="0"' in tag and 'role="group"' in tag and re.search('aria-label="[^"]+"', tag)


@pytest.mark.parametrize("kind", ["pages", "slides"])
def test_all_that_a_file_asks_for_lies_beside_it(books, tmp_path, kind):
    out = tmp_path / "out"
    text = next(getattr(web, kind)(out, books)).read_text(encoding="utf-8")
    asked = re.findall(r'<(?:script|link)[^>]* (?:src|href)="([^"?]+)', text)
    assert "mathjax/MathJax.js" in asked and ("reveal/dist/reveal.js" in asked) == (kind == "slides")
    assert all((out / name).is_file() for name in asked)
    assert "fonts/HTML-CSS/STIX-Web/woff/STIXMathJax_Main-Regular.woff" in {
        path.relative_to(out / "mathjax").as_posix() for path in (out / "mathjax").rglob("*.woff")}


def test_slides_follow_the_marks():
    text = web.deck(BOOK, ["01.ipynb", "02.ipynb"])
    stacks = re.findall(r"<section>(<section>.*?</section>)</section>", text, re.DOTALL)
    assert [stack.count("<section>") for stack in stacks] == [2, 1]
    assert "not on slides" not in text and "Quiz" not in text and "○ 01.1" not in text
    assert "Text." in stacks[0] and FILM in stacks[0]
    assert '<a href="#Two-words">Here</a>, there.' in stacks[0]          # what is left out cannot be linked to


def test_what_only_a_reader_needs_is_not_on_slides():
    cells = [slide(new_markdown_cell("# A\n\nWords. The loop:"), "slide"), new_code_cell("def f(): ..."),
             slide(new_markdown_cell("Runs in about 5 s"), "-", "banner"),
             new_markdown_cell("**Exercise 01.1** ★ · 5 min. Write it."),
             slide(new_code_cell("def g(): ..."), "-", "exercise:01.1"), new_markdown_cell("The same again:"),
             new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(1)", outputs=[new_output("stream", text="1\n")])]
    cells[2].metadata.pop("slideshow")
    text = web.deck(new_notebook(cells=cells))
    assert "Words." not in text.replace("<p>Words. The loop:</p>", "") and "The loop:" not in text
    assert all(words not in text for words in ("Runs in", "Exercise", "def</span> <span class=\"nf\">g", "NBVAL"))
    assert '<span class="nf">f' in text and "The same again:" in text


def test_the_script_is_for_the_speaker_and_the_idea_comes_by_itself():
    text = web.deck(BOOK)
    notes = re.search('<aside class="notes">(.*?)</aside>', text, re.DOTALL)[1]
    assert "Ask them first." in notes and text.count("Ask them first.") == 1
    assert '<div class="idea"><p>One idea.</p></div>' in text
    assert 'class="output fragment"' in text


def test_colours_can_be_read():
    """WCAG 2 asks for a contrast of 4.5; all text stands on #f5f5f5 or lighter."""
    def luminance(color: str) -> float:
        color = color if len(color) == 6 else "".join(2 * each for each in color)
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
                  for c in (int(color[i:i + 2], 16) / 255 for i in (0, 2, 4))]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    found = [color for name in ("common.css", "page.css", "deck.css")
             for color in re.findall(r"[{ ;]color: #(\w+)", (web.HERE / name).read_text())]
    assert len(found) > 8
    for color in found:
        assert (luminance("f2f2f2") + 0.05) / (luminance(color) + 0.05) >= 4.5, color


def test_nothing_is_overwritten_or_taken_from_nowhere(books, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["pages", str(out), "--source", str(books)]) == 0
    assert capsys.readouterr().out == f"open {out / 'index.html'}\n"
    (out / "02.html").write_text("mine")
    assert cli.main(["slides", str(out), "--source", str(books)]) == 2
    assert "01.html exists; --overwrite replaces it" in capsys.readouterr().err
    assert (out / "02.html").read_text() == "mine"
    assert cli.main(["slides", str(out), "--source", str(books), "--overwrite"]) == 0
    for arguments, words in (([str(out), "--source", str(tmp_path / "no")], f"there is no folder {tmp_path / 'no'}"),
                             ([str(out), "--source", str(out)], f"there is no notebook in {out}"),
                             ([str(out / "02.html")], "02.html is a file; name another folder"),
                             ([str(books), "--source", str(books)], "is where the notebooks are; name another folder")):
        assert cli.main(["slides", *arguments]) == 2 and words in capsys.readouterr().err
    assert cli.main(["pages", str(tmp_path / "one"), "--source", str(books / "01.ipynb")]) == 0
    assert {path.name for path in (tmp_path / "one").glob("*.html")} == {"index.html", "01.html"}


def test_what_is_missing_is_named(books, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "find_spec", lambda name: None if name == "sphinx_revealjs" else find_spec(name))
    list(web.pages(tmp_path / "a", books))
    with pytest.raises(ValueError, match="sphinx-revealjs is not installed; pip install -r requirements.txt"):
        web.slides(tmp_path / "b", books)
    assert not (tmp_path / "b").exists()
