"""Exercise of notebook 00, start here."""
import torch

from minidiff.teach.check import Exercise


def noisy(x0, eps, alpha, sigma):
    """x = alpha·x0 + sigma·eps: a clean picture x0 and noise eps of one shape, mixed with two amplitudes."""
    return alpha * x0 + sigma * eps


X0, EPS = torch.linspace(-1, 1, 6).view(2, 3), torch.tensor([[0.3, -1.2, 0.5], [2.0, -0.1, 0.7]])

EXERCISES = {
    "00.1": Exercise(
        "mix a picture with noise", 1, 3, noisy, ((X0, EPS, 0.8, 0.6), (EPS, X0, 0.1, 0.995)),
        wrong={
            "sigma is squared: sigma² is the variance of the noise, what multiplies eps is its amplitude sigma":
                lambda x0, eps, a, s: a * x0 + s * s * eps,
            "the two amplitudes are swapped: alpha belongs to the picture x0, sigma to the noise eps":
                lambda x0, eps, a, s: s * x0 + a * eps,
            "wrong sign: the noise is added": lambda x0, eps, a, s: a * x0 - s * eps,
            "the picture is not scaled: multiply x0 by alpha": lambda x0, eps, a, s: x0 + s * eps,
            "the noise is not scaled: multiply eps by sigma": lambda x0, eps, a, s: a * x0 + eps,
            "alpha and sigma are amplitudes already: no square roots": lambda x0, eps, a, s: a**0.5 * x0 + s**0.5 * eps,
        },
        also=(lambda x0, eps, a, s: sum([torch.mul(x0, a), eps.mul(s)]),)),
}
