"""Exercises of notebook 01, forward noising."""
import torch

from minidiff.teach.check import Exercise


def alpha_bar(betas):
    """alpha_bar_t = Π_{s ≤ t} (1 − beta_s): (T,) variances of the single steps -> (T,) shares of the signal's power."""
    return torch.cumprod(1 - betas, dim=0)


def amplitudes_of_snr(snr):
    """alpha and sigma, each of snr's shape, with alpha² + sigma² = 1 and alpha²/sigma² = snr."""
    return torch.sqrt(snr / (1 + snr)), torch.sqrt(1 / (1 + snr))


def loop(betas):
    out, product = [], 1.0
    for beta in betas.tolist():
        product *= 1 - beta
        out.append(product)
    return torch.tensor(out)


BETAS = (torch.linspace(0.01, 0.3, 8),), (torch.tensor([0.5]),), (torch.linspace(1e-4, 0.02, 1000),)
SNR = (torch.logspace(-3, 3, 7),), (torch.tensor(2.0),)

EXERCISES = {
    "01.1": Exercise(
        "alpha_bar from the betas", 1, 5, alpha_bar, BETAS,
        wrong={
            "this is the product of the betas: what survives a step is 1 − beta": lambda b: b.cumprod(0),
            "these are the survivors of single steps, 1 − beta: multiply all up to t": lambda b: 1 - b,
            "this is alpha, the amplitude; alpha_bar is its square, so leave the square root out":
                lambda b: (1 - b).cumprod(0).sqrt(),
            "this is sigma², the share of noise: alpha_bar is what is left of the picture, 1 minus it":
                lambda b: 1 - (1 - b).cumprod(0),
            "off by one: alpha_bar_t includes the step t itself, so its first entry is 1 − beta_1, not 1":
                lambda b: torch.cat([torch.ones(1), (1 - b).cumprod(0)[:-1]]),
            "one entry too many: the first is 1 − beta_1, after step 1; the clean picture itself is not counted":
                lambda b: torch.cat([torch.ones(1), (1 - b).cumprod(0)]),
            "this runs from the last step back to the first; multiply from the first on":
                lambda b: (1 - b).flip(0).cumprod(0).flip(0),
            "1 minus the sum of the betas is only the first order of the product; it even becomes negative":
                lambda b: 1 - b.cumsum(0),
            "this is one number for the whole chain; keep the running product for every t": lambda b: (1 - b).prod(),
        },
        also=(loop, lambda b: torch.exp(torch.log1p(-b.double()).cumsum(0)))),
    "01.2": Exercise(
        "a schedule with a given signal-to-noise ratio", 2, 10, amplitudes_of_snr, SNR,
        wrong={
            "missing square root: SNR is a ratio of powers, alpha and sigma are amplitudes":
                lambda r: (r / (1 + r), 1 / (1 + r)),
            "the two are swapped: a high SNR means a large alpha": lambda r: amplitudes_of_snr(r)[::-1],
            "this takes SNR as alpha/sigma; it is alpha²/sigma²": lambda r: amplitudes_of_snr(r * r),
            "the ratio is right but alpha² + sigma² is not 1: divide both by √(1 + SNR)":
                lambda r: (torch.sqrt(r), torch.ones_like(r)),
            "sigma is 1 − alpha here; in a variance-preserving schedule sigma² is 1 − alpha²":
                lambda r: (torch.sqrt(r / (1 + r)), 1 - torch.sqrt(r / (1 + r))),
        },
        also=(lambda r: (torch.sigmoid(r.log()).sqrt(), torch.sigmoid(-r.log()).sqrt()),
              lambda r: (1 / torch.sqrt(1 + 1 / r), 1 / torch.sqrt(1 + r)))),
}
