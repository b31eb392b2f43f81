"""Exercises that answer: what `check` says of right, wrong, broken and missing answers. The bank: test_notebooks.py."""

import pytest
import torch

from minidiff.teach.check import NOT_TRIED, RIGHT, WRONG, check, exercises, judge

pytestmark = pytest.mark.quick


def right(betas):
    return torch.cumprod(1 - betas, 0)


def in_place(betas):
    return betas.neg_().add_(1).cumprod(0)


def broken(betas):
    return betas.nonsense


def without_return(betas):
    """The product."""
    right(betas)


class Unreturning:
    def __call__(self, betas):
        pass


class Unprintable:
    def __eq__(self, other):
        raise ValueError("not comparable")

    def __repr__(self):
        raise ValueError("not printable")


@pytest.mark.parametrize("answer, mark, words", [
    (right, RIGHT, "alpha_bar from the betas"),
    (lambda betas: right(betas).numpy(), RIGHT, "alpha_bar"),
    (lambda betas: ..., NOT_TRIED, "not attempted"),
    (lambda betas: None, NOT_TRIED, "not attempted"),
    (without_return, WRONG, "it returns None: is `return` missing?"),
    (lambda betas: print(betas), WRONG, "print shows a value, `return` hands it back"),
    (lambda betas: betas.nonsense, WRONG, "'nonsense'; it was given (tensor(8,) [0.01, 0.0"),
    (Unreturning(), WRONG, "it returns None: is `return` missing?"),
    (..., NOT_TRIED, "not attempted"),
    (None, NOT_TRIED, "not attempted"),
    (torch.ones(3), WRONG, "give the function itself"),
    (broken, WRONG, "stops with AttributeError"),
    (lambda: 1, WRONG, "stops with TypeError"),
    (in_place, WRONG, "changes what it was given"),
    (lambda betas: betas.cumprod(0), WRONG, "product of the betas"),
    (lambda betas: exit(), WRONG, "stops with SystemExit"),
    (lambda betas: torch.nn.Linear(2, 2).load_state_dict({}), WRONG, "stops with RuntimeError: Error(s) in loading"),
    (lambda betas: right(betas)[None], WRONG, "yours is tensor(1, 8) [0.99, 0.939, 0.852, 0.737, …]; the shape should"),
    (lambda betas: right(betas).numpy()[:, None], WRONG, "yours is array(8, 1) [0.99, 0.939, 0.852, 0.737, …]; the"),
    (lambda betas: torch.complex(right(betas), betas), WRONG, "0.99+0.01j"),
    (lambda betas: torch.tensor(1j), WRONG, "yours is a value of type Tensor"),
    (lambda betas: betas.to("meta"), WRONG, "yours is a value of type Tensor"),
    (lambda betas: torch.eye(3).to_sparse(), WRONG, "yours is a value of type Tensor"),
    (lambda betas: 10**400, WRONG, "yours is a value of type int"),
    (lambda betas: Unprintable(), WRONG, "yours is a value of type Unprintable"),
    (lambda betas: "no idea", WRONG, "yours is 'no idea'"),
    (lambda betas: right(betas) * 1.01, WRONG, "the answer is tensor(8,)"),
    (lambda betas: right(betas) * float("nan"), WRONG, "nan"),
])
def test_judge(answer, mark, words):
    verdict = judge("01.1", answer)
    assert verdict.mark == mark and words in verdict.sentence and "\n" not in verdict.sentence


def test_a_known_wrong_answer_may_stop():
    late = judge("03.4", lambda net, x0, eps, t, a, s: net(x0, t))     # an index beyond the table stops it
    assert late == (WRONG, "the network counts from 0: feed it t − 1")
    assert "stops with ZeroDivisionError" in judge("04.3", lambda *row: 1 / 0).sentence


def test_noise_drawn_in_an_answer_is_named_and_the_readers_own_goes_on():
    def fresh(net, x0, eps, t, a, s):
        return (net(a[t][:, None] * x0 + s[t][:, None] * torch.randn(x0.shape), t - 1) - eps).square().mean()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert "another noise" in judge("03.1", fresh).sentence
    assert torch.equal(torch.get_rng_state(), before)


def test_two_results_in_one_tensor_are_asked_for_separately():
    stacked = judge("01.2", lambda snr: torch.stack([(snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()]))
    assert stacked.mark == WRONG and stacked.sentence.endswith("; 2 separate results are asked for")


def test_an_exercise_that_does_not_exist_is_no_exception():
    assert judge("01.99", right).mark == WRONG and "01.1" in judge("01.99", right).sentence
    assert judge("nonsense", right).mark == WRONG and exercises("nonsense") == {}


def test_the_report_has_a_line_for_every_exercise_of_the_notebook(capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["minidiff.teach.check"], "_session", {})
    check("01.1", right)
    assert capsys.readouterr().out == "✓ 01.1  alpha_bar from the betas\n"
    check.report()
    lines = capsys.readouterr().out.splitlines()
    names = list(exercises("01"))
    assert [line.split()[1] for line in lines] == names
    assert [line[0] for line in lines] == ["✓", *"○" * (len(names) - 1)]
    check("01.1", broken)
    check.report()
    assert capsys.readouterr().out.splitlines()[-len(names)].startswith("✗ 01.1")


def test_where_inputs_ask_for_gradients_an_answer_without_them_is_wrong():
    def draw(mean, logvar, noise):
        return mean + torch.exp(0.5 * logvar) * noise

    assert judge("12.2", draw).mark == RIGHT
    for f, words in ((lambda m, v, e: draw(m, v, e).detach(), "no gradient comes back to mean and logvar"),
                     (lambda m, v, e: draw(m, v, e).tolist(), "no gradient comes back to mean and logvar"),
                     (lambda m, v, e: draw(m, 2 * v.detach() - v, e), "the answer is"),
                     (lambda m, v, e: draw(m, v, e).numpy(), "stops with RuntimeError")):
        verdict = judge("12.2", f)
        assert verdict.mark == WRONG and words in verdict.sentence
    assert judge("12.2", lambda m, v, e: ...).mark == NOT_TRIED


def test_a_hole_as_the_notebooks_have_it_is_not_attempted():
    def hole(betas):
        """Returns (T,): alpha_bar."""
        ...

    def renamed(betas, more=3, *, most=1.0):
        """Returns (T,)."""
        pass

    assert judge("01.1", hole).mark == judge("01.1", renamed).mark == NOT_TRIED


@pytest.mark.parametrize("cut", [lambda loss: loss.item(), lambda loss: loss.detach(), lambda loss: float(loss)])
def test_a_loss_from_which_nothing_can_learn_is_refused(cut):
    right = exercises("03")["03.1"].solution
    assert judge("03.1", right).mark == RIGHT
    said = judge("03.1", lambda *row: cut(right(*row)))
    assert said.mark == WRONG and "the number is right, but nothing leads back from it to the weights" in said.sentence
    with_no_grad = judge("03.1", torch.no_grad()(lambda *row: right(*row)))
    assert with_no_grad == said


def test_marks_are_in_colour_in_a_notebook_and_lines_break_between_words(monkeypatch, capsys):
    from unittest.mock import MagicMock

    import IPython

    from minidiff.teach.grade import LINE

    check("01.1", lambda betas: torch.ones(3, 3))
    plain = capsys.readouterr().out
    monkeypatch.setattr(IPython, "get_ipython", MagicMock())
    check("01.1", lambda betas: torch.ones(3, 3))
    check("01.1", lambda betas: (1 - betas).cumprod(0))
    wrong, right = capsys.readouterr().out.split("\x1b[1;32m")
    assert wrong == plain.replace("✗", "\x1b[1;31m✗\x1b[0m") and right.startswith("✓\x1b[0m 01.1  ")
    assert len(plain.splitlines()) > 1 and all(len(line) <= 96 for line in plain.splitlines())
    assert LINE.findall(wrong) == LINE.findall(plain) == [("✗", "01.1")]
