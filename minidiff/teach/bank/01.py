"""Exercises of notebook 01, forward noising."""
import torch

from minidiff.teach.check import Exercise


def alpha_bar(betas):
    """alpha_bar_t = Π_{s ≤ t} (1 − beta_s): (T,) variances of the single steps -> (T,) shares of the signal's power."""
    return torch.cumprod(1 - betas, dim=0)


def amplitudes_of_snr(snr):
    """alpha and sigma, each of snr's shape, with alpha² + sigma² = 1 and alpha²/sigma² = snr."""
    return torch.sqrt(snr / (1 + snr)), torch.sqrt(1 / (1 + snr))


def power_at_the_floor(t, alpha, sigma):
    """alpha² · power = sigma² at step t, which has the index t − 1."""
    return (sigma[t - 1] / alpha[t - 1]) ** 2


def diagnose(broken):
    """A step x' = a x + b z should have a = √(1 − beta), b = √beta: feed it zeros, once for x and once for z."""
    one, none, beta = torch.ones(3), torch.zeros(3), 0.36
    if not torch.allclose(broken(none, beta, one), beta**0.5 * one):
        return "noise"
    return "none" if torch.allclose(broken(one, beta, none), (1 - beta) ** 0.5 * one) else "shrink"


def by_variance(broken):
    noise = broken(torch.zeros(20_000), 0.3, torch.ones(20_000)).mean() ** 2
    kept = broken(torch.ones(20_000), 0.3, torch.zeros(20_000)).mean() ** 2
    return "noise" if abs(noise - 0.3) > 1e-4 else "shrink" if abs(kept - 0.7) > 1e-4 else "none"


def squared_shrink(broken):
    kept = broken(torch.ones(1), 0.36, torch.zeros(1))
    return "none" if torch.allclose(kept, torch.tensor(0.64)) else diagnose(broken)


def squared_noise(broken):
    noise = broken(torch.zeros(1), 0.36, torch.ones(1))
    return "none" if torch.allclose(noise, torch.tensor(0.36)) else diagnose(broken)


def loop(betas):
    out, product = [], 1.0
    for beta in betas.tolist():
        product *= 1 - beta
        out.append(product)
    return torch.tensor(out)


BETAS = (torch.linspace(0.01, 0.3, 8),), (torch.tensor([0.5]),), (torch.linspace(1e-4, 0.02, 1000),)
BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)
FLOORS = tuple((t, BAR.sqrt(), (1 - BAR).sqrt()) for t in (1, 40, 500, 999))
STEPS = ((lambda x, beta, z: (1 - beta) ** 0.5 * x + beta**0.5 * z,),
         (lambda x, beta, z: (1 - beta) ** 0.5 * x + beta * z,),
         (lambda x, beta, z: (1 - beta) ** 0.5 * x + (1 - beta) ** 0.5 * z,),
         (lambda x, beta, z: x + beta**0.5 * z,),
         (lambda x, beta, z: (1 - beta) * x + beta**0.5 * z,))
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
    "01.3": Exercise(
        "the power that drowns at a given step", 2, 10, power_at_the_floor, FLOORS,
        wrong={
            "off by one: step t has the index t − 1": lambda t, a, s: (s[t] / a[t]) ** 2,
            "missing square: power is the square of an amplitude": lambda t, a, s: s[t - 1] / a[t - 1],
            "upside down: this is the signal-to-noise ratio; the power at the floor is the inverse of it":
                lambda t, a, s: (a[t - 1] / s[t - 1]) ** 2,
            "alpha is missing: the picture's own power shrinks too, to alpha² · power": lambda t, a, s: s[t - 1] ** 2,
            "alpha should be squared too": lambda t, a, s: s[t - 1] ** 2 / a[t - 1],
        },
        also=(lambda t, a, s: (1 - a[t - 1] ** 2) / a[t - 1] ** 2, lambda t, a, s: a[t - 1] ** -2 - 1)),
    "01.4": Exercise(
        "a diagnosis of a broken step", 3, 10, diagnose, STEPS,
        wrong={
            "the factor of the picture is √(1 − beta), not 1 − beta: test with that": squared_shrink,
            "the amplitude of the noise is √beta; beta is its variance": squared_noise,
            "this looks at the noise alone; a step can be wrong in the picture's factor too": lambda f: (
                "none" if diagnose(f) == "shrink" else diagnose(f)),
            "this looks at the picture's factor alone; the noise can have the wrong size too": lambda f: (
                "none" if diagnose(f) == "noise" else diagnose(f)),
            "the two names are swapped": lambda f: {"noise": "shrink", "shrink": "noise", "none": "none"}[diagnose(f)],
        },
        also=(by_variance,)),
}
