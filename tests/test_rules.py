"""The lint of the notebooks: notebook 01, broken in one place, gets the sentence for it."""
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from tests import rules, series

PATH = series.FOLDER / "01_forward_noising.ipynb"
NAME = "01_broken.ipynb"


def find(nb, text):
    return next(cell for cell in nb.cells if text in cell.source)


def tagged(nb, tag):
    return rules.each(nb, "", tag)[0][1]


def edit(old, new, where=None):
    """A breakage: replace a text in the first cell that has it."""
    def change(nb):
        cell = find(nb, where or old)
        assert old in cell.source
        cell.source = cell.source.replace(old, new)

    return change


def untag(tag):
    return lambda nb: tagged(nb, tag).metadata.update(tags=[])


def add(cell):
    return lambda nb: nb.cells.append(cell)


def output(**changes):
    """A breakage: change the first picture among the outputs."""
    def change(nb):
        outputs = (out for _, cell in rules.each(nb, "code") for out in cell.outputs)
        out = next(out for out in outputs if "image/png" in out.get("data", {}))
        out.data.update({key.replace("_", "/"): value for key, value in changes.items()})

    return change


def silent(nb):
    """Take the printed numbers away from a cell with a picture."""
    cell = next(cell for _, cell in rules.each(nb, "code")
                if any("image/png" in out.get("data", {}) for out in cell.outputs))
    cell.outputs = [out for out in cell.outputs if out.output_type != "stream"]


BROKEN = {
    "a second h1": (add(new_markdown_cell("# Another")), "exactly one h1"),
    "a skipped heading level": (edit("### Your own picture", "#### Your own picture"), "skips a level"),
    "a missing section": (edit("## Recap", "## Summary"), 'no section "## Recap"'),
    "sections out of order": (lambda nb: nb.cells.insert(2, nb.cells.pop(nb.cells.index(find(nb, "## Quiz")))),
                              "in the order"),
    "goals without a promise": (edit("After this you can", "You will"), "After this you can"),
    "nothing before it": (lambda nb: find(nb, "## Before you").update(source="## Before you start\nNothing."),
                          "link to what comes before"),
    "no table of what lives where": (edit("|---|---|", "", "## Where it lives"), "be a table"),
    "two quiz questions": (edit("<details>", "", "**1.**"), "exactly 3 <details>"),
    "no prediction": (untag("predict"), "tagged `predict`"),
    "no projector cell": (untag("projector"), "tagged `projector`"),
    "a banner by hand": (lambda nb: tagged(nb, "banner").update(source="Fast."), "written by"),
    "no slides": (lambda nb: find(nb, "## Recap").metadata.pop("slideshow"), "no slide_type"),
    "a long cell": (edit("alpha_bar = torch.ones", "\n" * 21 + "alpha_bar = torch.ones"), "the limit is 20"),
    "long cells everywhere": (
        lambda nb: [cell.update(source=cell.source + 6 * "\n#") for _, cell in rules.each(nb, "code")], "limit is 8"),
    "two code cells in a row": (lambda nb: nb.cells.insert(rules.each(nb, "code")[0][0], new_code_cell("1")),
                                "without a sentence between"),
    "plt.show": (edit("show(fig,", "plt.show(); show(fig,"), "calls plt.show"),
    "pip": (edit("import math", "%pip install x\nimport math"), "installs with pip"),
    "no Python": (edit("import math", "import math math"), "is not Python"),
    "not executed in order": (lambda nb: rules.each(nb, "code")[3][1].update(execution_count=99), "execution count 99"),
    "a mirror of another name": (lambda nb: tagged(nb, "mirrors:").metadata.update(tags=["mirrors:a.b"]),
                                 "does not define b"),
    "a show without alt": (edit('alt="The house at six', 'name="The house at six'), "has no alt"),
    "a picture without alt": (output(text_html="<img src='x'>"), "has no alt text"),
    "a script": (output(text_html="<script>1</script>"), "has a <script>"),
    "a remote image": (output(text_html="<img alt='a' src='https://example.org/a.png'>"), "a remote image"),
    "a huge picture": (output(image_png="A" * 1_400_000), "the limit is 1 MB"),
    "a huge file": (lambda nb: nb.metadata.update(x="x" * 1_500_000), "the limit is 1.5 MB"),
    "no number beside a picture": (silent, "prints no number"),
    "an error in an output": (lambda nb: rules.each(nb, "code")[0][1].outputs.append(
        new_output("error", ename="ZeroDivisionError", evalue="", traceback=[])), "is an error, ZeroDivisionError"),
    "a path of this machine": (output(text_plain=str(series.ROOT)), "names a folder"),
    "an exercise of another notebook": (lambda nb: tagged(nb, "exercise:").metadata.update(tags=["exercise:02.1"]),
                                        "01.k"),
    "a filled hole": (edit("    ...", "    return betas"), "docstring and `...`"),
    "an exercise without minutes": (edit("★ · 5 min. Write", "Write"), "difficulty and minutes"),
    "an exercise without a check": (edit('check("01.1", alpha_bar_of)', "", "def alpha_bar_of"), "no cell calls"),
    "an equation without code": (edit("# (1.2)", "# here"), "no line of code has the comment # (1.2)"),
    "an equation without proof": (edit("  # checks (1.9)", ""), "is named by no assert"),
    "a tag twice": (edit("\\tag{1.2}", "\\tag{1.1}"), "two equations (1.1)"),
    "a tag of another notebook": (edit("\\tag{1.2}", "\\tag{7.2}"), "should be numbered (1.k)"),
    "a tag by hand": (add(new_markdown_cell("$$ x \\quad (1.2) $$")), "numbered by \\tag{1.2}"),
    "a comment that names nothing": (edit("# (1.9)", "# (1.99)"), "names no equation"),
    "a check at no assert": (edit("# (1.9)", "# checks (1.9)"), "stands at no assert"),
    "a remote frame": (add(new_markdown_cell('<iframe src="https://example.org/"></iframe>')), "a remote image, style"),
    "a picture in the text without alt": (add(new_markdown_cell("![](01_broken.ipynb)")), "without alt text"),
    "a blank cell between": (lambda nb: [nb.cells.insert(rules.each(nb, "code")[0][0], cell)
                                         for cell in (new_code_cell("1"), new_markdown_cell(""))],
                             "without a sentence between"),
    "a download": (edit("import math", "urlopen('x')\nimport math"), "downloads"),
    "a reference to no equation": (add(new_markdown_cell("By (1.77) it follows.")), "refers to (1.77)"),
    "no proofs": (lambda nb: [cell.update(source=cell.source.replace("assert", "a"))
                              for _, cell in rules.each(nb, "code")],
                  "fewer than two cells have an assert"),
    "a long main line": (lambda nb: find(nb, "## Recap").update(source="## Recap\n" + 2500 * "word "),
                         "words; the limit is 2500"),
    "nothing that moves at first": (edit("film([state", "print([state"), "nothing moves within the first ten cells"),
    "a section of Deeper without minutes": (edit("· 6 min", "Long"), "should say its minutes"),
    "a section of Deeper without a link": (edit("[Deeper](#Two-more-schedules)", "Deeper"),
                                            "no link to the section Two more schedules"),
    "a dead link": (add(new_markdown_cell("[there](nowhere.ipynb)")), "leads nowhere"),
    "a dead anchor": (add(new_markdown_cell("[there](#Nowhere)")), "names no heading"),
    "a garbled address": (add(new_markdown_cell("[there](https:///x)")), "not well-formed"),
}


@pytest.mark.parametrize("break_it, sentence", BROKEN.values(), ids=BROKEN)
def test_each_broken_rule_gets_its_sentence(break_it, sentence, tmp_path):
    nb = rules.read(PATH)
    before = sentences(nb, tmp_path)
    break_it(nb)
    new = [text for text in sentences(nb, tmp_path) if text not in before]
    assert any(sentence in text for text in new), new


def sentences(nb, folder):
    nbformat.write(nb, folder / NAME)
    return rules.lint(folder / NAME)
