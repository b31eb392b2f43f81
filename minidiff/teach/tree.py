"""A network's modules as a tree to open and close, in plain HTML: it works in a stored notebook too."""
from __future__ import annotations

import html

from minidiff.measure.anatomy import Part, walk

COLUMNS = "minmax(14em,2fr) minmax(9em,1fr) 8em 7em 9em"
BAR = "linear-gradient(to right, #56B4E966 {share:.0%}, transparent 0)"  # behind the operations, their share


def tree(part: Part, alt: str, *, depth: int = 2, bits: int = 16) -> None:
    """Show what `minidiff.measure.anatomy.anatomy` finds: shape, parameters, memory and operations of every module.

    Args:
        alt: what there is to see, in words.
        depth: levels that are open at first, and that a viewer without HTML prints.
        bits: of a number in memory: 16 for float16.

    Raises:
        ValueError: the alt text is empty.

    >>> tree(Part("net", "Conv2d", (1, 8, 16, 16), 224, 110_592, ()), alt="one convolution")
    module            returns      parameters    MB    GFLOP
    net Conv2d        8×16×16      224         0.00    0.000
    """
    from IPython import display, get_ipython

    if not alt.strip():
        raise ValueError("alt is empty; say in words what there is to see")
    rows = [_cells(each, bits, "  " * level) for level, each in walk(part) if level < depth]
    rows = [("module", "returns", "parameters", "MB", "GFLOP"), *rows]
    wide = [max(map(len, column)) for column in zip(*rows)]
    text = "\n".join("  ".join((cell.ljust if i < 2 else cell.rjust)(w) for i, (cell, w) in enumerate(zip(row, wide)))
                     for row in rows)
    if not get_ipython():
        print(text)
        return
    head = "".join(f"<b>{name}</b>" for name in rows[0])
    page = (f'<div role="tree" aria-label="{html.escape(alt, quote=True)}" style="font-size:13px;max-width:60em">'
            f'<div style="{_grid()}">{head}</div>{_branch(part, part.flops, depth, bits)}</div>')
    display.display({"text/html": page, "text/plain": f"{alt}\n{text}"}, raw=True)


def _cells(part: Part, bits: int, indent: str = "") -> tuple[str, ...]:
    return (f"{indent}{part.name} {part.kind}", "×".join(map(str, part.shape[1:])), f"{part.parameters:,}",
            f"{part.parameters * bits / 8e6:.2f}", f"{part.flops / 1e9:.3f}")


def _grid() -> str:
    return f"display:inline-grid;width:calc(100% - 1.5em);grid-template-columns:{COLUMNS};text-align:right"


def _branch(part: Part, whole: int, depth: int, bits: int) -> str:
    """A module's row, which opens its parts; the blue bar is its share of the operations."""
    name, *numbers = map(html.escape, _cells(part, bits))
    bar = BAR.format(share=part.flops / max(1, whole))
    row = (f'<span style="{_grid()}"><span style="text-align:left">{name}</span>'
           + "".join(f"<span>{number}</span>" for number in numbers[:-1])
           + f'<span style="background:{bar}">{numbers[-1]}</span></span>')
    if not part.children:
        return f'<div style="margin-left:1.2em;padding-left:1.1em">{row}</div>'
    inside = "".join(_branch(child, whole, depth - 1, bits) for child in part.children)
    return f'<details style="margin-left:1.2em"{" open" * (depth > 1)}><summary>{row}</summary>{inside}</details>'
