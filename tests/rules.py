"""What a notebook of the series must be: `lint(path)` has one sentence for each broken rule (see CONTRIBUTING.md)."""
from __future__ import annotations

import ast
import base64
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from nbformat.v4 import new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("Goals", "Before you start", "Recap", "Where it lives in minidiff", "Quiz", "Exercises", "Deeper", "Papers")
OPTIONAL = ("Deeper",)
MOST = {"cells": 60, "words": 2500, "lines of code": 250}  # of the main line: what stands before Deeper
MOVING = re.compile(r"^(film|explore|studio)\(", re.MULTILINE)
BANNER = re.compile(r"Runs in about \d+ s of CPU time and \d+\.\d GB of memory, offline, without a GPU\.")
STARS = re.compile(r"★{1,3}☆* · \d+ min\b")
TAG = re.compile(r"# ?(checks )?((\(\d+\.\d+\)(,? |,? and )?)+)")
REMOTE = {r"<script": "has a <script>, which is dead before the notebook is run",
          r"<(?!a\b)\w[^<>]*(src|href)=.?https?:|!\[[^\]]*\]\(https?:": "has a remote image, style or frame"}
NO_ALT = re.compile(r"!\[\s*\]\(|<img (?![^>]*alt=.\w)", flags=re.I)
IN_CODE = {r"\bplt\.show\(": "calls plt.show: pictures are shown by teach.show",
           r"^\s*([%!]\s*pip|!.*\bpip)\b": "installs with pip: what is needed is in requirements.txt",
           r"\b(urlopen|urlretrieve|hf_hub_download|snapshot_download|load_dataset)\(|download=True|^\s*!\s*(wget|curl)\b":
               "downloads: notebooks run offline"}
Found = Iterator[tuple[int, str]]  # (cell, counted from 1; 0: the whole notebook), what is wrong


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def each(nb, kind: str, tag: str = "") -> list[tuple[int, nbformat.NotebookNode]]:
    """(number, cell) of the "code" or "markdown" cells, of those with a tag that starts so."""
    return [(n, cell) for n, cell in enumerate(nb.cells, 1) if kind in ("", cell.cell_type)
            and (not tag or any(own.startswith(tag) for own in cell.metadata.get("tags", [])))]


def name_of(cell, prefix: str) -> str:
    """What follows `mirrors:` or `exercise:` in the cell's tags."""
    return next(tag for tag in cell.metadata.tags if tag.startswith(prefix)).removeprefix(prefix)


def python(source: str) -> str:
    """The source without its magic lines."""
    return re.sub(r"^[ \t]*[%!].*$", "", source, flags=re.M)


def parse(source: str) -> ast.Module:
    """The syntax tree of a cell; empty where it has errors (the rule `code` reports them)."""
    try:
        return ast.parse(python(source))
    except SyntaxError:
        return ast.Module([], [])


def prose(cell, *also: str) -> str:
    """Markdown without fenced code, and without what else matches."""
    return re.sub("|".join([r"```.*?```", *also]), "", cell.source, flags=re.S)


def headings(nb) -> list[tuple[int, int, str]]:
    """(cell, level, text)"""
    return [(n, len(marks), text) for n, cell in each(nb, "markdown")
            for marks, text in re.findall(r"^(#{1,6}) +(.+?)[ #]*$", prose(cell), flags=re.M)]


def sections(nb) -> dict[str, tuple[int, str]]:
    """{text of the h2: (its cell, the markdown down to the next h2)}"""
    found, name = {}, None
    for n, cell in each(nb, "markdown"):
        for line in prose(cell).splitlines():
            name = line[3:].strip() if line.startswith("## ") else name
            if name is not None:
                found[name] = (found.get(name, (n,))[0], found.get(name, (n, ""))[1] + line + "\n")
    return found


def anatomy(nb, path: Path) -> Found:
    heads, parts = headings(nb), sections(nb)
    if [n for n, level, _ in heads if level == 1] != [1]:
        yield 0, "there must be exactly one h1, in the first cell"
    for (_, before, _), (n, level, text) in zip(heads, heads[1:]):
        if level > before + 1:
            yield n, f'the heading "{text}" skips a level: h{before}, then h{level}'
    yield from ((0, f'there is no section "## {name}"') for name in SECTIONS
               if name not in parts and name not in OPTIONAL)
    order = [name for name in parts if name in SECTIONS]
    if order != [name for name in SECTIONS if name in parts]:
        yield 0, f"the sections stand in the order {', '.join(order)}; it should be {', '.join(SECTIONS)}"
    n, text = parts.get("Goals", (0, ""))
    if n and ("After this you can" not in text or not 3 <= len(re.findall(r"^[-*] ", text, flags=re.M)) <= 5):
        yield n, 'Goals should say "After this you can …" and list 3 to 5 of them'
    for name, pattern, least, most, wanted in (
            ("Before you start", r"\]\(|href=", 1, 99, "link to what comes before"),
            ("Where it lives in minidiff", r"^\|[ :|-]+\|$", 1, 9, "be a table"),
            ("Quiz", r"<details>", 3, 3, "have exactly 3 <details>")):
        n, text = parts.get(name, (0, ""))
        if n and not least <= len(re.findall(pattern, text, flags=re.M)) <= most:
            yield n, f"{name} should {wanted}"
    for tag in ("predict", "projector"):
        if not each(nb, "", tag):
            yield 0, f"no cell is tagged `{tag}`"
    banner = each(nb, "markdown", "banner")
    if len(banner) != 1 or not BANNER.match(banner[0][1].source):
        yield 0, "one markdown cell must be tagged `banner`, and be written by `python tests/series.py execute`"
    chosen = {n for n, cell in each(nb, "") if cell.metadata.get("slideshow", {}).get("slide_type")}
    wanted = {n for n, level, _ in heads if level <= 2} | {n for n, _ in each(nb, "", "projector")[:1]}
    yield from ((n, "has no slide_type; the h1, each h2 and the projector cell need one, if only skip")
                for n in sorted(wanted - chosen))


def tracks(nb) -> tuple[list, list]:
    """The cells of the main line, and those of Deeper; the papers belong to neither."""
    parts = sections(nb)
    deeper, papers = (parts.get(name, (len(nb.cells) + 1,))[0] - 1 for name in ("Deeper", "Papers"))
    return nb.cells[:min(deeper, papers)], nb.cells[deeper:papers]


def size(cells: list) -> dict[str, int]:
    """How many cells, words of prose and lines of code these are."""
    text, code = ([cell for cell in cells if cell.cell_type == kind] for kind in ("markdown", "code"))
    return {"cells": len(cells), "words": sum(len(prose(cell).split()) for cell in text),
            "lines of code": sum(len(cell.source.splitlines()) for cell in code)}


def minutes(cells: list) -> int:
    """How long they take to read, at 200 words or 15 lines of code a minute."""
    counts = size(cells)
    return round(counts["words"] / 200 + counts["lines of code"] / 15)


def two_tracks(nb, path: Path) -> Found:
    main, deeper = tracks(nb)
    if not deeper:
        return
    yield from ((0, f"the main line has {n} {what}; the limit is {MOST[what]}") for what, n in size(main).items()
                if n > MOST[what])
    if not any(MOVING.search(cell.source) for cell in nb.cells[:10]):
        yield 0, "nothing moves within the first ten cells"
    links = " ".join(cell.source for cell in main if cell.cell_type == "markdown")
    for n, cell in enumerate(deeper, len(main) + 1):
        for title in re.findall(r"^### +(.+?)\s*$", prose(cell), flags=re.M) if cell.cell_type == "markdown" else ():
            if not re.search(r"^### .*\n+·? ?\d+ min$", prose(cell), flags=re.M):
                yield n, f"the section {title} of Deeper should say its minutes under its title, as in \"5 min\""
            if f"](#{title.replace(' ', '-')})" not in links:
                yield n, f"the main line has no link to the section {title} of Deeper"


def code(nb, path: Path) -> Found:
    cells, lengths = each(nb, "code"), [len(cell.source.splitlines()) for _, cell in each(nb, "code")]
    yield from ((n, f"has {long} lines of code; the limit is 20") for (n, _), long in zip(cells, lengths) if long > 20)
    if lengths and statistics.median(lengths) > 8:
        yield 0, f"the median code cell has {statistics.median(lengths):g} lines; the limit is 8"
    if sum(bool(re.search(r"\bassert", cell.source)) for _, cell in cells) < 2:
        yield 0, "fewer than two cells have an assert; a notebook proves two things at least"
    said = [(n, cell.cell_type) for n, cell in each(nb, "") if cell.source.strip()]
    yield from ((n, "follows a code cell without a sentence between") for (_, before), (n, kind) in zip(said, said[1:])
                if before == kind == "code")
    for n, cell in each(nb, ""):
        for pattern, text in (REMOTE | IN_CODE if cell.cell_type == "code" else REMOTE).items():
            if re.search(pattern, cell.source, flags=re.M | re.I):
                yield n, text
        if cell.cell_type == "markdown" and NO_ALT.search(prose(cell)):
            yield n, "has a picture without alt text"
    run = 0
    for n, cell in cells:
        try:
            ast.parse(python(cell.source))
        except SyntaxError as error:
            yield n, f"is not Python: {error.msg}"
        run += bool(cell.source.strip())
        if cell.source.strip() and cell.execution_count != run:
            yield n, f"has the execution count {cell.execution_count}, not {run}: execute the notebook top to bottom"
            break
    for n, cell in each(nb, "code", "mirrors:"):
        name = name_of(cell, "mirrors:")
        if name.rpartition(".")[2] not in [getattr(node, "name", "") for node in parse(cell.source).body]:
            yield n, f"is tagged mirrors:{name} and does not define {name.rpartition('.')[2]}"


def pictures(nb, path: Path) -> Found:
    for n, cell in each(nb, "code"):
        for call in (node for node in ast.walk(parse(cell.source)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if (name.split(".")[-1] in ("show", "film") or "explore" in name.split(".")) and not any(
                    word.arg == "alt" and getattr(word.value, "value", "x") for word in call.keywords):
                yield n, f"{name}(…) has no alt=…"
        seen = False
        for out in cell.outputs:
            if out.output_type == "error":
                yield n, f"its output is an error, {out.ename}"
            data, text = out.get("data", {}), "".join(out.get("text", ""))
            html = "".join(data.get("text/html", ""))
            yield from ((n, f"its output {said}") for pattern, said in REMOTE.items() if re.search(pattern, html))
            images = [("".join(value)) for kind, value in data.items() if kind.startswith("image/")]
            if images or "<img" in html:
                seen = True
                if len(re.findall(r'<img [^>]*alt="[^"]', html)) < max(1, html.count("<img")):
                    yield n, "its picture has no alt text: show it with teach.show or teach.film"
            for value in images + re.findall(r"data:image/[^,]*,([A-Za-z0-9+/=]+)", html):
                size = len(value) if value.lstrip().startswith("<") else len(base64.b64decode(value))
                if size > 1e6:
                    yield n, f"a picture in its output has {size / 1e6:.1f} MB; the limit is 1 MB"
            seen |= any("widget-view" in kind for kind in data)
            if str(ROOT) in text + "".join(data.get("text/plain", "")):
                yield n, "its output names a folder of the machine that ran it"
        said = ["".join(out.text) for out in cell.outputs if out.output_type == "stream" and out.name == "stdout"]
        if seen and not re.search(r"\d", "".join(said)):
            yield n, "shows a picture and prints no number beside it"
    if path.stat().st_size > 1.5e6:
        yield 0, f"the file has {path.stat().st_size / 1e6:.1f} MB; the limit is 1.5 MB"


def exercises(nb, path: Path) -> Found:
    called = {call.args[0].value for _, cell in each(nb, "code") for call in ast.walk(parse(cell.source))
              if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "check"
              and call.args and isinstance(call.args[0], ast.Constant)}
    if not each(nb, "code", "exercise:"):
        yield 0, "no code cell is tagged `exercise:NN.k`"
    for n, cell in each(nb, "code", "exercise:"):
        name = name_of(cell, "exercise:")
        if not re.fullmatch(path.name[:2] + r"\.\d+", name):
            yield n, f"is tagged exercise:{name}; it should be exercise:{path.name[:2]}.k"
        holes = [node.body for node in parse(cell.source).body if isinstance(node, ast.FunctionDef)]
        if len(holes) != 1 or [ast.unparse(node) for node in holes[0]][1:] != ["..."] or not isinstance(
                getattr(getattr(holes[0][0], "value", None), "value", None), str):
            yield n, f"exercise {name} should be one function whose body is a docstring and `...`"
        if n < 2 or nb.cells[n - 2].cell_type != "markdown" or not STARS.search(nb.cells[n - 2].source):
            yield n, f'the markdown above exercise {name} should say its difficulty and minutes, as "★★ · 10 min"'
        if name not in called:
            yield n, f'no cell calls check("{name}", …)'


def comments(source: str) -> list[tuple[str, bool, bool]]:
    """(tag, says "checks", stands at an assert) of each `# (3.2)` and `# checks (3.2)`."""
    source, found = python(source), []
    lines = source.splitlines()
    proofs = [node for node in ast.walk(parse(source)) if isinstance(node, ast.Assert) or isinstance(node, ast.Expr)
              and isinstance(node.value, ast.Call) and ast.unparse(node.value.func).split(".")[-1].startswith("assert")]
    for token in tokenize.generate_tokens(io.StringIO(source).readline) if parse(source).body else ():
        if token.type == tokenize.COMMENT and (match := TAG.match(token.string)):
            row = token.start[0]
            while row < len(lines) and lines[row - 1].lstrip().startswith("#"):
                row += 1
            proof = any(node.lineno <= row <= node.end_lineno for node in proofs)
            found += [(tag, bool(match[1]), proof) for tag in re.findall(r"\d+\.\d+", match[2])]
    return found


@cache
def proved(folder: Path) -> set[str]:
    """Tags that an assert in a test file names."""
    sources = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    return {tag for source in sources if re.search(r"# ?(checks )?\(\d+\.\d", source)
            for tag, _, proof in comments(source) if proof}


def text_tags(nb) -> list[tuple[int, str]]:
    """(cell, tag) of each \\tag{…} in a displayed equation."""
    return [(n, tag) for n, cell in each(nb, "markdown")
            for block in re.findall(r"\$\$.*?\$\$", prose(cell), flags=re.S)
            for tag in re.findall(r"\\tag\{([^}]*)\}", block)]


def equations(path: Path) -> tuple[list[str], list[str]]:
    """The tags of the displayed equations, and those of the lines of code that implement them."""
    nb = read(path)
    said = [entry for _, cell in each(nb, "code") for entry in comments(cell.source)]
    return [tag for _, tag in text_tags(nb)], [tag for tag, checks, proof in said if not checks and not proof]


def pairs(nb, path: Path) -> Found:
    texts, (_, codes) = text_tags(nb), equations(path)
    by_hand = {n for n, _ in each(nb, "markdown", "by-hand")}
    for n, cell in each(nb, "markdown"):
        for tag in re.findall(r"\\q?quad\s*\((\d+\.\d+)\)", prose(cell)):
            yield n, f"equation ({tag}) should be numbered by \\tag{{{tag}}}"
        for tag in re.findall(rf"\(({int(path.name[:2])}\.\d+)\)", prose(cell, r"\$\$.*?\$\$", r"\$[^$\n]*\$")):
            if tag not in [other for _, other in texts]:
                yield n, f"the text refers to ({tag}), which is no equation of this notebook"
    for place, (n, tag) in enumerate(texts):
        if not re.fullmatch(rf"{int(path.name[:2])}\.\d+", tag):
            yield n, f"equation ({tag}) should be numbered ({int(path.name[:2])}.k)"
        if tag in [other for _, other in texts[:place]]:
            yield n, f"there are two equations ({tag})"
        if tag not in codes and n not in by_hand:
            yield n, f"no line of code has the comment # ({tag}); a cell of by-hand algebra is tagged `by-hand`"
    cells = [(n, *entry, name_of(cell, "exercise:") if (n, cell) in each(nb, "code", "exercise:") else "")
             for n, cell in each(nb, "code") for entry in comments(cell.source)]
    done = {tag for _, tag, _, proof, hole in cells if proof or hole}  # a hole: by the tests of the bank
    done |= proved(ROOT / "tests")
    for n, tag, checks, proof, _ in dict.fromkeys(cells):
        if tag not in [other for _, other in texts]:
            yield n, f"# ({tag}) names no equation of this notebook"
        elif checks and not proof:
            yield n, f"# checks ({tag}) stands at no assert"
        elif tag not in done:
            yield n, f"# ({tag}) is named by no assert: put # checks ({tag}) on one, here or in tests/"


def links(nb, path: Path) -> Found:
    for n, cell in each(nb, "markdown"):
        text = prose(cell, r"`[^`\n]*`", r"\$\$.*?\$\$", r"\$[^$\n]*\$")
        for link in re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r"""(?:href|src)=["']([^"']+)""", text):
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                if not re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc):
                    yield n, f"the link {link} is not well-formed"
            elif parts.scheme not in ("mailto", "attachment", "data"):
                file = path.parent / unquote(parts.path) if parts.path else path
                if not file.exists():
                    yield n, f"the link {link} leads nowhere"
                elif parts.fragment and unquote(parts.fragment) not in anchors(file):
                    yield n, f"the link {link} names no heading"


def anchors(file: Path) -> set[str]:
    """What `#…` can name: in a notebook JupyterLab's (blanks become -), in a .md file GitHub's, and explicit ids."""
    book = file.suffix == ".ipynb"
    nb = read(file) if book else new_notebook(cells=[new_markdown_cell(file.read_text(encoding="utf-8"))])
    texts = [re.sub(r"[`*]", "", text) for _, _, text in headings(nb)]
    texts = texts if book else [re.sub(r"[^\w -]", "", text.lower()) for text in texts]
    ids = re.findall(r"""<\w+ (?:id|name)=["']([^"']+)""", "".join(cell.source for _, cell in each(nb, "markdown")))
    return {*ids, *(text.replace(" ", "-") for text in texts)}


def lint(path: Path) -> list[str]:
    """One sentence for each broken rule."""
    nb = read(path)
    rules = anatomy, two_tracks, code, pictures, exercises, pairs, links
    found = [place for rule in rules for place in rule(nb, path)]
    return [f"{path.name}{f', cell {n}' if n else ''}: {text}" for n, text in found]
