"""Lines of code behind one text-to-image call: those of every module that it imports, for minidiff and for diffusers.

    python tests/benchmarks/lines.py

Each side loads mini-sd and draws one picture in a fresh Python. Counted are the lines with code on them (no comment, no
docstring, no blank line) of the modules of the package itself; diffusers' text encoder and tokenizer come from
transformers, so the CLIP modules of transformers that it imports are counted with it, and nothing else of transformers.
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
OURS = f"import minidiff as md; md.StableDiffusion.from_pretrained({str(MODEL)!r})({PROMPT!r}, steps=2)"
THEIRS = (f"from diffusers import StableDiffusionPipeline as P; p = P.from_pretrained({str(MODEL)!r}); "
          f"p({PROMPT!r}, num_inference_steps=2)")
FILES = """
import json, sys
names = {name: getattr(m, "__file__", None) for name, m in list(sys.modules.items()) if name.split(".")[0] == %r}
print(json.dumps({name: file for name, file in names.items() if file and file.endswith(".py")}))
"""


def lines(source: str) -> int:
    """Lines that hold code.

    >>> lines('x = 1  # one' + chr(10) + '# nothing' + chr(10) + chr(10) + 'y = 2')
    2
    """
    kinds = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found = {row for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in kinds
             for row in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(
                getattr(body[0].value, "value", None), str):
            found -= set(range(body[0].lineno, body[0].end_lineno + 1))
    return len(found)


def count(code: str, package: str, part: str = "") -> tuple[int, int]:
    """(modules, lines of code) of the package's modules, or of those with `part` in their name, that `code` imports."""
    done = subprocess.run([sys.executable, "-c", code + FILES % package], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    files = {file for name, file in json.loads(done.stdout.splitlines()[-1]).items() if part in name}
    return len(files), sum(lines(Path(file).read_text(encoding="utf-8")) for file in files)


def main() -> None:
    ours, theirs, clip = count(OURS, "minidiff"), count(THEIRS, "diffusers"), count(THEIRS, "transformers", ".clip")
    for name, (modules, code) in {"minidiff": ours, "diffusers": theirs, "CLIP of transformers": clip}.items():
        print(f"{name:22} {modules:4} modules {code:7,} lines of code")
    print(f"minidiff / (diffusers + CLIP): {ours[1] / (theirs[1] + clip[1]):.3f}")


if __name__ == "__main__":
    main()
