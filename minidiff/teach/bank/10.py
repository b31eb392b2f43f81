"""Exercises of notebook 10, classifier guidance."""
import torch

from minidiff.teach.check import Exercise


def guided_pair(x, eps, g, alpha, sigma, scale):
    """The correction −scale·sigma·g of eps, and x0 so that x = alpha·x0 + sigma·eps still holds."""
    x0 = (x - sigma * eps) / alpha
    return x0 + scale * sigma**2 / alpha * g, eps - scale * sigma * g


def class_gradient(logits, x, y):
    """The gradient of the sum of log p(y|x) over the batch: row by row, that of each state."""
    leaf = x.clone().requires_grad_()
    chosen = logits(leaf).log_softmax(1).gather(1, y[:, None])
    return torch.autograd.grad(chosen.sum(), leaf)[0]


def log_odds(x, m, s, alpha, sigma):
    """The squares of x drop out of (10.6); what is left is 2·alpha·m·x over the variance of the noisy blobs."""
    return 2 * alpha * m * x / (alpha**2 * s**2 + sigma**2)


def from_eps(x, eps, g, a, s, scale):
    """eps first, then x0 from the state."""
    eps = eps - scale * s * g
    return (x - s * eps) / a, eps


def pair(move, also=None):
    """x0 and eps moved by (these multiples of) g, eps(…) alone where x0 follows from it."""
    def answer(x, eps, g, a, s, scale):
        moved = eps + move(a, s, scale) * g
        return ((x - s * moved) / a if also is None else (x - s * eps) / a + also(a, s, scale) * g), moved
    return answer


def right_x0(move):
    """x0 by (10.3), and eps moved by this multiple of g: the two halves no longer add up to x."""
    return pair(move, lambda a, s, c: c * s**2 / a)


def sloped(of):
    """`class_gradient` of another number per batch."""
    def answer(logits, x, y):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(of(logits(leaf), y), leaf)[0]
    return answer


def one_by_one(logits, x, y):
    """One state at a time, its probability's logarithm."""
    rows = []
    for i in range(len(x)):
        leaf = x[i:i + 1].clone().requires_grad_()
        logits(leaf).softmax(1)[0, y[i]].log().backward()
        rows.append(leaf.grad)
    return torch.cat(rows)


def by_cross_entropy(logits, x, y):
    """The cross-entropy is −log p."""
    leaf = x.clone().requires_grad_()
    return -torch.autograd.grad(torch.nn.functional.cross_entropy(logits(leaf), y, reduction="sum"), leaf)[0]


def by_squares(x, m, s, alpha, sigma):
    """(10.6) as it stands."""
    v = (alpha * s)**2 + sigma**2
    return ((x + alpha * m)**2 - (x - alpha * m)**2) / (2 * v)


def taken(logits, y):
    return logits.gather(1, y[:, None])


G = torch.Generator().manual_seed(0)
X, EPS, SLOPE = torch.randn(3, 4, 2, generator=G)
STATES, LABELS = torch.randn(4, 3, generator=G), torch.tensor([2, 0, 4, 1])
WEIGHT, BIAS = torch.randn(3, 5, generator=G), torch.randn(5, generator=G)
NUMBERS = torch.tensor([-1.3, -0.2, 0.4, 1.1, 2.6])


def classifier(x):
    """Logits of five classes, not linear in x."""
    return torch.tanh(x @ WEIGHT) * 2 + BIAS


EXERCISES = {
    "10.1": Exercise(
        "the guided pair", 1, 5, guided_pair,
        ((X, EPS, SLOPE, 0.8, 0.6, 1.0), (X, EPS, SLOPE, 0.28, 0.96, 2.5), (X, EPS, SLOPE, 0.96, 0.28, 7.0),
         (X, EPS, SLOPE, 0.8, 0.6, 0.0)),
        wrong={
            "sigma is missing: the score is −eps/sigma, so its correction g becomes −scale·sigma·g in eps. This is the "
            "formula of many tutorials; it is too large by 1/sigma": pair(lambda a, s, c: -c),
            "sigma is missing in both halves; multiply (10.1) by −sigma first":
                pair(lambda a, s, c: -c, lambda a, s, c: c / a),
            "the wrong sign: the score is −eps/sigma, so what is added to the score is taken from eps; this steers "
            "away from the class": pair(lambda a, s, c: c * s),
            "the wrong sign in x0: what is taken from sigma·eps is given to alpha·x0":
                pair(lambda a, s, c: -c * s, lambda a, s, c: -c * s**2 / a),
            "sigma is missing in eps, whose correction is −scale·sigma·g: this is too large by 1/sigma, and the halves "
            "no longer add up to x": right_x0(lambda a, s, c: -c),
            "the wrong sign in eps: what is added to the score −eps/sigma is taken from eps; x0 is right":
                right_x0(lambda a, s, c: c * s),
            "sigma, not its square, belongs to eps; the square is that of x0, which is right":
                right_x0(lambda a, s, c: -c * s**2),
            "x0 is right; eps has to be guided too, or the two no longer add up to x": right_x0(lambda a, s, c: 0.0),
            "the scale is missing in x0": pair(lambda a, s, c: -c * s, lambda a, s, c: s**2 / a),
            "the scale is that of (10.2), where 1 is Bayes' rule; this is one more": pair(lambda a, s, c: -(1 + c) * s),
            "the correction of eps is scale·sigma·g, without alpha": pair(lambda a, s, c: -c * s / a),
            "this corrects the state; (10.3) starts from x0 = (x − sigma·eps)/alpha":
                lambda x, eps, g, a, s, c: (x + c * s**2 / a * g, eps - c * s * g),
            "in x0 = (x − sigma·eps)/alpha the noise is taken away, not added":
                lambda x, eps, g, a, s, c: ((x + s * eps) / a + c * s**2 / a * g, eps - c * s * g),
            "x0 is the one without guidance: x = alpha·x0 + sigma·eps does not hold any more":
                pair(lambda a, s, c: -c * s, lambda a, s, c: 0.0),
            "alpha is missing in x0: alpha·x0 grows by scale·sigma²·g, so divide by alpha":
                pair(lambda a, s, c: -c * s, lambda a, s, c: c * s**2),
            "x0 is multiplied by alpha where it should be divided by it":
                pair(lambda a, s, c: -c * s, lambda a, s, c: c * s**2 * a),
            "sigma should be squared in x0: once from the score, once from sigma·eps":
                pair(lambda a, s, c: -c * s, lambda a, s, c: c * s / a),
            "the correction is made twice: x0 from the guided eps has it already":
                lambda x, eps, g, a, s, c: (from_eps(x, eps, g, a, s, c)[0] + c * s**2 / a * g, eps - c * s * g),
            "x0 without guidance is (x − sigma·eps)/alpha; the division by alpha is missing":
                lambda x, eps, g, a, s, c: (x - s * eps + c * s**2 / a * g, eps - c * s * g),
            "alpha should not be squared: alpha·x0 grows by scale·sigma²·g":
                pair(lambda a, s, c: -c * s, lambda a, s, c: c * s**2 / a**2),
            "sigma, not its square, belongs to eps: amplitudes, not variances": pair(lambda a, s, c: -c * s**2),
            "this divides by sigma where (10.2) multiplies": pair(lambda a, s, c: -c / s),
            "this multiplies by alpha where (10.2) has sigma": pair(lambda a, s, c: -c * a),
            "the scale is missing": pair(lambda a, s, c: -s),
            "eps − scale·sigma·g is right, x0 + scale·g is not: see (10.3)":
                pair(lambda a, s, c: -c * s, lambda a, s, c: c),
            "the two are swapped: the answer is (x0, eps), in this order":
                lambda *row: guided_pair(*row)[::-1],
            "only one of the two came back: the answer is (x0, eps)": lambda *row: guided_pair(*row)[1],
        },
        also=(from_eps,)),
    "10.2": Exercise(
        "the gradient of a class", 2, 10, class_gradient,
        ((classifier, STATES, LABELS), (classifier, STATES[:1], LABELS[:1])),
        wrong={
            "this is the gradient of the logit; the other classes belong to it too: take log_softmax first":
                sloped(lambda out, y: taken(out, y).sum()),
            "this is the gradient of the probability, not of its logarithm":
                sloped(lambda out, y: taken(out.softmax(1), y).sum()),
            "this averages over the batch, so each gradient is divided by the number of states: sum instead":
                sloped(lambda out, y: taken(out.log_softmax(1), y).mean()),
            "the wrong sign: this leads away from the class; the cross-entropy is −log p":
                sloped(lambda out, y: -taken(out.log_softmax(1), y).sum()),
            "the wrong sign, and an average over the batch: cross_entropy is −log p, divided by the number of states":
                sloped(lambda out, y: torch.nn.functional.cross_entropy(out, y)),
            "this sums over all classes; each state has one, y": sloped(lambda out, y: out.log_softmax(1).sum()),
            "out[:, y] takes every class in y for every state: (B,B) numbers. Use gather, or out[torch.arange(B), y]":
                sloped(lambda out, y: out.log_softmax(1)[:, y].sum()),
            "this takes the likeliest class of each state; the class asked for is y":
                sloped(lambda out, y: out.log_softmax(1).amax(1).sum()),
            "the softmax has to be over the classes, dimension 1; this is over the states":
                sloped(lambda out, y: taken(out.log_softmax(0), y).sum()),
            "this is the gradient of the probability, averaged over the batch: take log_softmax, and sum":
                sloped(lambda out, y: taken(out.softmax(1), y).mean()),
            "this is the gradient of the logit, averaged over the batch: take log_softmax, and sum":
                sloped(lambda out, y: taken(out, y).mean()),
            "a logit is no probability and can be negative: log_softmax, not log":
                sloped(lambda out, y: taken(out, y).log().sum()),
            "autograd.grad answers with a tuple, one entry for each tensor asked about: take its first":
                lambda f, x, y: (class_gradient(f, x, y),),
            "x does not ask for a gradient yet: compute with a copy that does, x.clone().requires_grad_()":
                lambda f, x, y: torch.autograd.grad(taken(f(x).log_softmax(1), y).sum(), x)[0],
            "autograd wants one number: sum log p over the batch, which leaves each state's gradient as it is":
                sloped(lambda out, y: taken(out.log_softmax(1), y)),
            "this is log p itself, not its gradient": lambda f, x, y: taken(f(x).log_softmax(1), y)[:, 0],
        },
        also=(one_by_one, by_cross_entropy)),
    "10.3": Exercise(
        "log-odds of a noisy number", 2, 10, log_odds,
        ((NUMBERS, 1.2, 0.3, 0.8, 0.6), (NUMBERS, 0.7, 0.5, 0.28, 0.96), (NUMBERS, 1.2, 0.3, 1.0, 0.0)),
        wrong={
            "this is the clean classifier: it takes x for a clean number and is too sure of it":
                lambda x, m, s, a, n: 2 * m * x / s**2,
            "the noise is missing in the variance, alpha²·s² + sigma²; without it this is the clean classifier, asked "
            "about x/alpha, which is still noisy": lambda x, m, s, a, n: 2 * m * (x / a) / s**2,
            "the centres move to ±alpha·m; here they stay at ±m":
                lambda x, m, s, a, n: 2 * m * x / (a**2 * s**2 + n**2),
            "the width of the blobs shrinks with alpha too: alpha²·s² + sigma²":
                lambda x, m, s, a, n: 2 * a * m * x / (s**2 + n**2),
            "a variance has squares: alpha²·s² + sigma²; here alpha is not squared":
                lambda x, m, s, a, n: 2 * a * m * x / (a * s**2 + n**2),
            "a variance has squares: these are widths, and they do not add up":
                lambda x, m, s, a, n: 2 * a * m * x / (a * s + n),
            "this divides by the standard deviation; (10.6) divides by the variance v":
                lambda x, m, s, a, n: 2 * a * m * x / (a**2 * s**2 + n**2)**0.5,
            "the width of the blobs is missing: noise alone would be sigma² only if they were points":
                lambda x, m, s, a, n: 2 * a * m * x / max(n**2, 1e-12),
            "a variance has squares: sigma² too": lambda x, m, s, a, n: 2 * a * m * x / (a**2 * s**2 + n),
            "a variance has squares: s² too": lambda x, m, s, a, n: 2 * a * m * x / (a**2 * s + n**2),
            "alpha is squared in the variance only: the centres stand at ±alpha·m":
                lambda x, m, s, a, n: 2 * a**2 * m * x / (a**2 * s**2 + n**2),
            "either divide x by alpha, and the noise too (variance s² + sigma²/alpha²), or neither":
                lambda x, m, s, a, n: 2 * m * x / a / (a**2 * s**2 + n**2),
            "this is the slope; asked for are the log-odds at x":
                lambda x, m, s, a, n: 2 * a * m / (a**2 * s**2 + n**2),
            "the squares of alpha·m drop out, too: m stands once": lambda x, m, s, a, n: m * log_odds(x, m, s, a, n),
            "a factor of 2 is missing: the two squares differ by 4·alpha·m·x, divided by 2v":
                lambda x, m, s, a, n: a * m * x / (a**2 * s**2 + n**2),
            "this is twice too large: the difference 4·alpha·m·x of the squares is divided by 2v":
                lambda x, m, s, a, n: 4 * a * m * x / (a**2 * s**2 + n**2),
            "the sign is turned: for x on the side of +m, + must be the likelier one":
                lambda x, m, s, a, n: -2 * a * m * x / (a**2 * s**2 + n**2),
            "this is p(+|x); asked for is the log-odds, its inverse sigmoid":
                lambda x, m, s, a, n: torch.sigmoid(log_odds(x, m, s, a, n)),
            "this is log p(+|x) alone; take away log p(−|x)":
                lambda x, m, s, a, n: torch.nn.functional.logsigmoid(log_odds(x, m, s, a, n)),
        },
        also=(by_squares,)),
}
