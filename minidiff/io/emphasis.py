"""The prompts of AUTOMATIC1111's web UI: (red:1.3), [red], BREAK and <lora:file:0.8>, as it reads them."""
from __future__ import annotations

import re

STEP = 1.1  # what one pair of brackets multiplies or divides by
PIECE = re.compile(r"\\[()\[\]\\]|[(\[\])]|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|[\\:]")
SPLIT = re.compile(r"\s*\bBREAK\b\s*")
LORA = re.compile(r"<lora:(?P<file>[^<>]+?)(?::(?P<scale>[+-]?(?:\d+\.?\d*|\.\d+)))?>")
EDIT = re.compile(r"(?<!\\)\[[^\[\]]*(?:\||:[^\[\]]*:)[^\[\]]*\]")
MARKS = re.compile(r"\([^()]*:\s*[+-]?[.\d]+\s*\)|(?<!\\)\(\([^()]*\)\)|(?<!\\)\[[^\[\]]+\]|\bBREAK\b|" + LORA.pattern)


def parse(prompt: str) -> list[tuple[str, float] | None]:
    r"""Texts and their weights, in order; None where a BREAK stands.

    (red) is red at 1.1, ((red)) at 1.1², [red] at 1/1.1, (red:1.3) at 1.3; weights multiply; a bracket that is never
    closed reaches to the end; \( is a bracket to be read.

    Raises:
        ValueError: [from:to:when] or [one|another], which change the prompt on the way.

    >>> parse(r"a (red:1.5) house [at night] BREAK \(old\)")
    [('a ', 1.0), ('red', 1.5), (' house ', 1.0), ('at night', 0.9090909090909091), None, ('(old)', 1.0)]
    """
    if edit := EDIT.search(prompt):
        raise ValueError(f"{edit[0]} would change the prompt on the way, which is not supported; weights are written "
                         "(word:1.3), and [word] for less")
    parts: list[tuple[str, float] | None] = []
    for place, section in enumerate(SPLIT.split(prompt)):
        parts += ([None] if place else []) + _weigh(section)
    return parts


def cut_loras(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """A prompt without its <lora:file:scale>, and these.

    >>> cut_loras("a house <lora:water.safetensors:0.8>, snow<lora:ink>")
    ('a house , snow', [('water.safetensors', 0.8), ('ink', 1.0)])
    """
    return LORA.sub("", prompt), [(found["file"], float(found["scale"] or 1)) for found in LORA.finditer(prompt)]


def looks_weighted(prompt: str) -> str | None:
    """The first piece of a prompt that the web UI would not read as letters, if there is one.

    >>> looks_weighted("a (red:1.3) house"), looks_weighted("a house (old)")
    ('(red:1.3)', None)
    """
    found = MARKS.search(prompt)
    return found[0] if found else None


def _weigh(section: str) -> list[tuple[str, float]]:
    """One section, without BREAK: neighbours of equal weight are joined."""
    texts, weights = [], []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each bracket that is still open began

    def multiply(start: int, by: float) -> None:
        weights[start:] = [weight * by for weight in weights[start:]]

    for found in PIECE.finditer(section):
        piece, weight = found[0], found["weight"]
        if piece in opened:
            opened[piece].append(len(texts))
        elif weight is not None and opened["("]:
            multiply(opened["("].pop(), float(weight))
        elif piece == ")" and opened["("]:
            multiply(opened["("].pop(), STEP)
        elif piece == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / STEP)
        else:
            escaped = piece[0] == "\\" and len(piece) > 1
            texts.append(piece[escaped:])
            weights.append(1.0)
    for bracket, by in (("(", STEP), ("[", 1 / STEP)):
        for start in opened[bracket]:
            multiply(start, by)
    joined: list[tuple[str, float]] = []
    for text, weight in zip(texts, weights):
        if joined and joined[-1][1] == weight:
            text = joined.pop()[0] + text
        joined.append((text, weight))
    return joined or [("", 1.0)]
