"""Lines of code behind one text-to-image call: of the functions that it calls, and of the files in which they are.

    python tests/benchmarks/lines.py

Each side loads mini-sd in a fresh Python and draws two pictures; at the second one every function is noted that is
called. Counted are the lines with code on them (no comment, no docstring, no blank line) of these functions, and of
the files that a reader opens to follow them; diffusers' text encoder and tokenizer come from transformers, so its lines
count with diffusers'. What is only imported, or only needed to load a model, counts on neither side.
"""
import ast
import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL, PROMPT = ROOT / "data" / "mini-sd", "a red house"
OURS = (f"import minidiff as md; pipe = md.StableDiffusion.from_pretrained({str(MODEL)!r})",
        f"pipe({PROMPT!r}, steps=2)")
THEIRS = (f"from diffusers import StableDiffusionPipeline as P; pipe = P.from_pretrained({str(MODEL)!r})",
          f"pipe({PROMPT!r}, num_inference_steps=2)")
CALLED = """
import json, sys
called = set()
note = lambda frame, event, arg: called.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))
{load}
{call}
sys.setprofile(note)
{call}
sys.setprofile(None)
print(json.dumps(sorted(called)))
"""


def lines(source: str) -> set[int]:
    """The lines that hold code.

    >>> lines('x = 1  # one' + chr(10) + '# nothing' + chr(10) + chr(10) + 'y = 2')
    {1, 4}
    """
    kinds = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    held = {row for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in kinds
            for row in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(
                getattr(body[0].value, "value", None), str):
            held -= set(range(body[0].lineno, body[0].end_lineno + 1))
    return held


def called(load: str, call: str) -> dict[Path, set[int]]:
    """{file: first lines of the functions in it that are called while `call` runs for the second time}."""
    done = subprocess.run([sys.executable, "-c", CALLED.format(load=load, call=call)], cwd=ROOT, capture_output=True,
                          text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    files: dict[Path, set[int]] = {}
    for name, first in json.loads(done.stdout.splitlines()[-1]):
        files.setdefault(Path(name), set()).add(first)
    return files


def count(files: dict[Path, set[int]], package: str) -> tuple[int, int, int]:
    """(files, lines of code in them, lines of code in the functions called) of those that belong to a package."""
    own, whole, run = [file for file in files if package in file.parts], 0, 0
    for file in own:
        source = file.read_text(encoding="utf-8")
        held, inside = lines(source), set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
                inside |= set(range(first, node.end_lineno + 1)) if first in files[file] else set()
        whole, run = whole + len(held), run + len(held & inside)
    return len(own), whole, run


def main() -> None:
    theirs = called(*THEIRS)
    rows = {"minidiff": count(called(*OURS), "minidiff"),
            **{name: count(theirs, name) for name in ("diffusers", "transformers")}}
    for name, (files, whole, run) in rows.items():
        print(f"{name:14} {files:4} files {whole:7,} lines of code {run:7,} of them in functions that are called")
    for place, what in ((1, "files"), (2, "functions")):
        ours, *others = (row[place] for row in rows.values())
        print(f"minidiff / (diffusers + transformers), by {what}: {ours / sum(others):.3f}")


if __name__ == "__main__":
    main()
