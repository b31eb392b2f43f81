"""Notebooks as pages and as slides, for any browser, without a network: what they showed when they were last run."""
from __future__ import annotations

import html
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from minidiff.io.images import check_writable
from minidiff.io.write import write_atomic
from minidiff.teach.lab import notebooks_dir

if TYPE_CHECKING:
    from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
MATH = ("jupyter_server_mathjax", "static", "mathjax")                      # package, folder in it, its name beside us
REVEAL = ("sphinx_revealjs", "_static/revealjs", "reveal")
NEEDED = {"mathjax": ("MathJax.js", "config", "extensions", "fonts", "jax"),
          "reveal": ("dist/reset.css", "dist/reveal.css", "dist/reveal.js", "plugin/notes", "LICENSE")}
INDEX = "index.html"
# What scrolls on a narrow screen is reached by keys too.
REACHED = """
<script>MathJax.Hub.Register.StartupHook("End", () => {
    for (const each of document.querySelectorAll("p, li, .output, .MathJax_Display"))
        if (each.scrollWidth > each.clientWidth) each.tabIndex = 0; })</script>"""
IDEA = re.compile(r"(?<!\*)\*([^*]+)\*(?!\*)")  # the first words in italics of a projector's cell
TYPESET = """<script type="text/x-mathjax-config">MathJax.Hub.Config({
    tex2jax: {inlineMath: [["$", "$"]], displayMath: [["$$", "$$"]], processEscapes: true},
    messageStyle: "none", showMathMenu: false, skipStartupTypeset: STARTUP,
    "HTML-CSS": {availableFonts: [], webFont: "STIX-Web", imageFont: null}})</script>
<script src="mathjax/MathJax.js?config=TeX-AMS-MML_HTMLorMML-full"></script>"""


def pages(folder: str | Path, source: str | Path | None = None, *, overwrite: bool = False) -> Iterator[Path]:
    """Write each notebook as a web page: text, code, pictures, films. Mathematics needs no network.

    Args:
        folder: gets a .html file for each notebook, and MathJax beside them. source: a folder of notebooks; None: those
            that ship. overwrite: whether pages that are there may be replaced.

    Yields:
        The file just written.

    Raises:
        ValueError: a page exists, or MathJax is not installed. FileNotFoundError: there is no notebook.

    >>> import nbformat, tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     nbformat.write(nbformat.v4.new_notebook(), f"{place}/01.ipynb")
    ...     [page.name for page in pages(f"{place}/pages", place)]
    ['01.html']
    """
    return _write(folder, source, overwrite, (MATH,), page)


def slides(folder: str | Path, source: str | Path | None = None, *, overwrite: bool = False) -> Iterator[Path]:
    """Write each notebook as slides: of its cells that are marked as slides, what they say and show.

    Code is hidden: the key C shows that of a slide. S opens the speaker's view, with the script of the cell that is
    tagged `projector`; its pictures come row by row, its idea comes last. What is too much for one slide makes several.

    Args, Yields, Raises: as `pages`; reveal.js is needed too.

    >>> import nbformat, tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     nbformat.write(nbformat.v4.new_notebook(), f"{place}/01.ipynb")
    ...     [deck.name for deck in slides(f"{place}/slides", place)]
    ['01.html']
    """
    return _write(folder, source, overwrite, (MATH, REVEAL), deck)


def books(source: str | Path | None = None) -> list[Path]:
    """The notebooks to be written: those in a folder, one file, or those that ship.

    Raises:
        FileNotFoundError: there is none.

    >>> books()[0].name
    '00_start_here.ipynb'
    """
    source = notebooks_dir() if source is None else Path(source)
    found = [source] if source.is_file() and source.suffix == ".ipynb" else sorted(source.glob("*.ipynb"))
    if not found:
        raise FileNotFoundError(f"there is no {'notebook in' if source.is_dir() else 'folder'} {source}")
    return found


def _write(folder: str | Path, source: str | Path | None, overwrite: bool, beside: tuple,
           make: Callable) -> Iterator[Path]:
    """The files that `make` makes of notebooks, a list of them, and what they need beside them."""
    found, folder = books(source), Path(folder)
    if missing := [name for name in ("nbconvert", *(name for name, *_ in beside)) if find_spec(name) is None]:
        raise ValueError(f"{missing[0].replace('_', '-')} is not installed; pip install -r requirements.txt, or "
                         "'minidiff[web]'")
    if folder.is_file() or folder.resolve() == found[0].resolve().parent:
        what = "a file" if folder.is_file() else "where the notebooks are"
        raise ValueError(f"{folder} is {what}; name another folder")
    files = [folder / f"{book.stem}.html" for book in found]
    check_writable([*files, folder / INDEX], overwrite)
    for package, inside, name in beside:
        for part in NEEDED[name]:
            _copy(Path(find_spec(package).submodule_search_locations[0]) / inside / part, folder / name / part)

    def run() -> Iterator[Path]:
        import nbformat

        titles = []
        for book, file in zip(found, files):
            notebook = nbformat.read(book, 4)
            titles.append(_title(notebook) or book.stem)
            write_atomic(file, make(notebook, linked=[other.name for other in found], name=book.name))
            yield file
        rows = "".join(f'<li><a href="{file.name}">{html.escape(name)}</a></li>\n' for file, name in zip(files, titles))
        body = f"<main>\n<h1>Notebooks</h1>\n<ul>\n{rows}</ul>\n</main>"
        write_atomic(folder / INDEX, _document("Notebooks", body, "page.css"))

    return run()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def page(book: NotebookNode, linked: Sequence[str] = (), name: str = "") -> str:
    """A notebook as one web page.

    Args:
        linked: names of the notebooks that have pages too; links to others are left out. name: its own among them.

    >>> from nbformat.v4 import new_markdown_cell, new_notebook
    >>> page(new_notebook(cells=[new_markdown_cell("# One")]))[:15]
    '<!doctype html>'
    """
    body = "\n".join(piece for number, cell in enumerate(book.cells, 1) for piece in pieces(cell, number))
    nav = ""
    if name in linked:
        at = linked.index(name)
        ways = (("← ", linked[at - 1] if at else None), ("→ ", linked[at + 1] if at + 1 < len(linked) else None))
        links = [f'<a href="{Path(other).stem}.html">{sign}{Path(other).stem.replace("_", " ")}</a>'
                 for sign, other in ways if other]
        nav = f'<nav aria-label="notebooks"><a href="{INDEX}">all notebooks</a> {" ".join(links)}</nav>\n'
    again = nav.replace('"notebooks"', '"notebooks, once more"')
    return _document(_title(book), f"{nav}<main>\n{_linked(body, linked)}\n</main>\n{again}", "page.css",
                     TYPESET.replace("STARTUP", "false") + REACHED)


def deck(book: NotebookNode, linked: Sequence[str] = (), name: str = "") -> str:
    """A notebook as slides: a stack of slides for each cell marked "slide", a new one in it for each "subslide".

    What is marked "skip" is left out with the unmarked cells after it; so are exercises, what is said of running the
    notebook, and words that only announce code. deck.js fits all into pages of one size.
    """
    stacks: list[list[list[str]]] = []
    shown = False
    for number, cell in enumerate(book.cells, 1):
        mark, tags = cell.metadata.get("slideshow", {}).get("slide_type", "-"), cell.metadata.get("tags", [])
        shown = shown if mark == "-" else mark != "skip"
        if not shown or not cell.source.strip() or cell.source.startswith("check(") or "banner" in tags or any(
                tag.startswith("exercise:") for tag in tags):
            continue
        if mark == "slide" or not stacks:
            stacks.append([])
        if mark in ("slide", "subslide") or not stacks[-1]:
            stacks[-1].append([])
        leaf = stacks[-1][-1]
        if mark == "notes":
            leaf.append(f'<aside class="notes">{markdown(cell.source)}</aside>')
        elif "projector" in tags and (idea := IDEA.search(cell.source)):
            title, _, script = cell.source.partition("\n")
            leaf += [markdown(title), f'<aside class="notes">{markdown(script)}</aside>',
                     f'<div class="idea">{markdown(idea[1][0].upper() + idea[1][1:])}</div>']
        else:
            leaf += pieces(_for_class(cell, book.cells[number:]), number, "fragment" if mark == "fragment" else "")
    sections = "\n".join("<section>" + "".join(f'<section>{"".join(leaf)}</section>' for leaf in stack) + "</section>"
                         for stack in stacks)
    ids = {*re.findall(r' id="([^"]+)"', sections)}                      # what is left out cannot be linked to
    sections = re.sub(r'<a href="#([^"]*)">(.*?)</a>', lambda a: a[0 if unquote(a[1]) in ids else 2], sections)
    reveal = "".join(f'\n<link rel="stylesheet" href="reveal/dist/{part}.css">' for part in ("reset", "reveal"))
    reveal += "".join(f'\n<script src="reveal/{part}.js"></script>' for part in ("dist/reveal", "plugin/notes/notes"))
    body = (f'<main class="reveal"><div class="slides"></div></main>\n<div id="source">{_linked(sections, linked)}'
            f"</div>\n<script>{_text('deck.js')}</script>")
    return _document(_title(book), body, "deck.css", TYPESET.replace("STARTUP", "true") + reveal)


def _for_class(cell: NotebookNode, after: list[NotebookNode]) -> NotebookNode:
    """A cell of text without its exercises, and without a last paragraph that announces code which shows nothing."""
    if cell.cell_type != "markdown":
        return cell
    parts = [part for part in re.split(r"\n\s*\n", cell.source) if not part.startswith("**Exercise")]
    code = next(iter(after), None)
    silent = code is not None and code.cell_type == "code" and not any(output(out, 0) for out in code.outputs)
    if silent and parts and parts[-1].rstrip().endswith(":"):
        parts.pop()
    return type(cell)(cell | {"source": "\n\n".join(parts)})


def _title(book: NotebookNode) -> str:
    lines = [line for cell in book.cells for line in cell.source.splitlines()]
    return next((line.lstrip("# ") for line in lines if line.startswith("# ")), "")


def _document(title: str, body: str, style: str, head: str = "") -> str:
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n{head}\n<style>\n{_text('common.css')}{_text(style)}</style>\n"
            f"</head>\n<body>\n{body}\n</body>\n</html>\n")


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def pieces(cell: NotebookNode, number: int, name: str = "") -> list[str]:
    """A cell as HTML: its text, or its code and each of its outputs.

    Args:
        number: of the cell. name: a class that each piece gets.
    """
    def piece(text: str, kind: str = "") -> str:
        return f'<div class="{" ".join(filter(None, [kind, name]))}">{text}</div>' if kind or name else text

    if cell.cell_type == "markdown":
        return [piece(markdown(cell.source))]
    if cell.cell_type != "code" or not cell.source.strip():
        return []
    return [piece(scrolled(coloured(cell.source), f"code of cell {number}"), "code"),
            *(piece(each, "output") for out in cell.outputs if (each := output(out, number)))]


def markdown(text: str) -> str:
    """Markdown as HTML; mathematics stays as it is, for MathJax. Headings can be linked to as in JupyterLab.

    >>> markdown("## A *b* c")
    '<h2 id="A-b-c">A <em>b</em> c</h2>'
    """
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    text = MarkdownWithMath(renderer=IPythonRenderer(escape=False, anchor_link_text="")).render(text).strip()
    text = re.sub(r'<a class="anchor-link"[^>]*/>', "", text)
    text = text.replace("<table>", '<div class="wide" tabindex="0" role="group" aria-label="table"><table>')
    return text.replace("</table>", "</table></div>")


def coloured(source: str) -> str:
    """Python in colours, without what it says to the tests."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    source = source.removeprefix("# NBVAL_CHECK_OUTPUT\n")
    return highlight(source, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).rstrip()


def scrolled(text: str, name: str) -> str:
    """Preformatted HTML that scrolls where it is too wide, by keys too."""
    return f'<pre tabindex="0" role="group" aria-label="{name}">{text}</pre>'


def output(out: NotebookNode, number: int) -> str:
    """An output as HTML; a widget by the film that is stored with it."""
    from nbconvert.filters import ansi2html

    if out.output_type == "stream":
        return scrolled(ansi2html(out.text.rstrip()), f"what cell {number} prints") if out.text.strip() else ""
    if out.output_type == "error":
        return scrolled(ansi2html("\n".join(out.traceback)), f"error in cell {number}")
    data: dict[str, Any] = out.data
    if "text/html" in data:
        return data["text/html"]
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            alt = html.escape(data.get("text/plain", "a picture"), quote=True)
            return f'<figure><img alt="{alt}" src="data:{kind};base64,{data[kind].strip()}"></figure>'
    if "text/plain" not in data or any("widget-view" in kind for kind in data):
        return ""
    return scrolled(html.escape(data["text/plain"]), f"result of cell {number}")


def _linked(text: str, names: Sequence[str]) -> str:
    """Links to notebooks as links to their pages; those that lead out of the folder as plain text."""
    def link(found: re.Match) -> str:
        target, mark, words = found[1], found[2] or "", found[3]
        if target in names:
            return f'<a href="{target.removesuffix(".ipynb")}.html{mark}">{words}</a>'
        return words

    return re.sub(r'<a href="(?![a-z]+:)([^"#]+)(#[^"]*)?">(.*?)</a>', link, text, flags=re.DOTALL)
