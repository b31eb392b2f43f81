"""Exercises of notebook 08, training an image model."""
import itertools
import math

import torch

from minidiff.teach.check import Exercise


def preconditioning(sigma, d):
    """c_in, c_skip and c_out: input and target of F get variance 1, and c_out is as small as it can be."""
    total = (sigma**2 + d**2) ** 0.5
    return 1 / total, d**2 / total**2, sigma * d / total


def weights_in_average(decays):
    """The weight of the start and of the net after each of n updates in the average: (n + 1,), their sum is 1."""
    later = torch.cat([decays, torch.ones(1)]).flip(0).cumprod(0).flip(0)  # Π of the decays from update i on
    return torch.cat([later[:1], (1 - decays) * later[1:]])


def diagnosis():
    """What is wrong with A, B and C."""
    return "start", "average", "data range"


CAUSES = {"exploded": "the loss of its raw net is far below 1",
          "data range": "look at the lowest and highest number of the data it was trained on",
          "no time": "its answer does change with the time",
          "start": "look at how much picture there is in its noisiest training level, beside the noise",
          "average": "compare the loss of the averaged net with that of the raw one",
          "memorised": "its loss on fresh pictures is not above that on its own"}


def why(answer):
    """A sentence for a wrong diagnosis: of each case, what speaks against it."""
    parts = []
    for case, said, right in zip("ABC", answer, diagnosis()):
        if said != right:
            against = "that was examined and is in order" if said == "data range" else CAUSES[said]
            if said in ("start", "average"):
                against = "that number is in order"
            parts.append(f"{case} is not '{said}', {against}; {CAUSES[right]}")
    return ". ".join(parts)


ANSWERS = [answer for answer in itertools.product(CAUSES, repeat=3) if answer != diagnosis()]
SIGMAS = tuple((torch.tensor([0.02, 0.4, 3.0]), d) for d in (0.5, 1.3)) + ((2.0, 0.7),)
DECAYS = ((torch.tensor([0.1, 0.6, 0.8]),), (torch.tensor([0.9, 0.7]),), (torch.tensor([0.0, 0.3, 0.55, 0.95]),))

EXERCISES = {
    "08.1": Exercise(
        "the preconditioning of EDM", 2, 15, preconditioning, SIGMAS,
        wrong={
            "c_in is the inverse of the variance of x; to get variance 1, divide by its root":
                lambda s, d: (1 / (s**2 + d**2), *preconditioning(s, d)[1:]),
            "the noise and the picture are independent: their variances add, not their standard deviations":
                lambda s, d: (1 / (s + d), d**2 / (s + d) ** 2, s * d / (s + d)),
            "c_skip is the share of the noise in the variance of x; of x one keeps the share of the picture, d²":
                lambda s, d: (preconditioning(s, d)[0], s**2 / (s**2 + d**2), preconditioning(s, d)[2]),
            "c_skip has a root too many: it is a ratio of variances":
                lambda s, d: (preconditioning(s, d)[0], d * preconditioning(s, d)[0], preconditioning(s, d)[2]),
            "this is c_out²; c_out itself is its root": lambda s, d: (*preconditioning(s, d)[:2],
                                                                      preconditioning(s, d)[2] ** 2),
            "c_out lacks its root below the line: sigma·d/√(sigma² + d²)":
                lambda s, d: (*preconditioning(s, d)[:2], s * d / (s**2 + d**2)),
            "with c_out = sigma the target has variance 1 if c_skip = 1; with your c_skip less is left to answer for":
                lambda s, d: (*preconditioning(s, d)[:2], s + 0 * d),
            "c_skip = 1 and c_out = sigma is the ε-network: its errors are multiplied by sigma, however large":
                lambda s, d: (preconditioning(s, d)[0], s**0, s),
            "c_skip = 0 and c_out = d is the x0-network: at low noise it must copy x through all its layers":
                lambda s, d: (preconditioning(s, d)[0], 0 * s, d + 0 * s),
            "this is right for d = 1 only": lambda s, d: preconditioning(s, 1.0),
            "this is right for d = 0.5 only; use the d that is given": lambda s, d: preconditioning(s, 0.5),
            "d was taken for its square: it is a standard deviation": lambda s, d: preconditioning(s, d**0.5),
            "the order is c_in, c_skip, c_out; two of yours are swapped":
                lambda s, d: (preconditioning(s, d)[1], preconditioning(s, d)[0], preconditioning(s, d)[2]),
            "the order is c_in, c_skip, c_out; you have c_skip, c_out, c_in":
                lambda s, d: (*preconditioning(s, d)[1:], preconditioning(s, d)[0]),
        },
        also=(lambda s, d: ((s * s + d * d) ** -0.5, 1 / (1 + (s / d) ** 2), 1 / (1 / s**2 + 1 / d**2) ** 0.5),)),
    "08.2": Exercise(
        "who is in the average, and how much", 2, 15, weights_in_average, DECAYS,
        wrong={
            "1 − d of each update is its weight at that moment only: every later update multiplies it by its d":
                lambda d: torch.cat([d.prod()[None], 1 - d]),
            "the first number is that of the start: it has been multiplied by every d":
                lambda d: torch.cat([torch.zeros(1), weights_in_average(d)[1:]]),
            "the start is missing: n updates and the start are n + 1 nets": lambda d: weights_in_average(d)[1:],
            "the last net is 1 − d of the last update; yours starts with it, turn the order round":
                lambda d: weights_in_average(d).flip(0),
            "d and 1 − d are swapped: the average keeps d of itself": lambda d: weights_in_average(1 - d),
            "off by one: the net of update i is multiplied by the d of the updates after it, not by its own":
                lambda d: torch.cat([d.prod()[None], (1 - d) * d.flip(0).cumprod(0).flip(0)]),
            "these are products of the d before each update; an old net is shrunk by those after it":
                lambda d: torch.cat([d.prod()[None], (1 - d) * torch.cat([torch.ones(1), d.cumprod(0)[:-1]])]),
            "this treats all d as equal to the last one; they may change from update to update":
                lambda d: weights_in_average(d[-1].expand(len(d))),
            "the start has no 1 − d in front: nothing was mixed into it":
                lambda d: torch.cat([(1 - d[:1]) * d.prod(), weights_in_average(d)[1:]]),
        },
        also=(lambda d: torch.stack([d.prod(), *[(1 - d[i]) * d[i + 1:].prod() for i in range(len(d))]]),
              lambda d: torch.tensor([math.prod(d.tolist()), *[(1 - float(d[i])) * math.prod(d[i + 1:].tolist())
                                                               for i in range(len(d))]]))),
    "08.3": Exercise(
        "three patients", 3, 15, diagnosis, ((),),
        wrong={why(answer): lambda answer=answer: answer for answer in ANSWERS},
        also=(lambda: ["start", "average", "data range"],)),
}
