"""Exercises of notebook 15, full Stable Diffusion."""
from minidiff.teach.check import Exercise


def attention_size(c, d):
    """(15.1): 2c² + 2dc + c."""
    return 2 * c * c + 2 * d * c + c


def seconds(F, n, guided, R):
    """(15.2): with guidance every call sees two pictures."""
    return n * F * (2 if guided else 1) / R


def weights_memory(numbers, bits):
    """(15.3), in units of 10⁹ bytes."""
    return sum(numbers) * bits / 8 / 1e9


EXERCISES = {
    "15.1": Exercise(
        "the numbers of an attention", 2, 10, attention_size, ((320, 768), (1280, 1280), (7, 3)),
        wrong={
            "the bias of the output is missing: c numbers": lambda c, d: 2 * c * c + 2 * d * c,
            "queries, keys and values have no bias; only the output has one":
                lambda c, d: 2 * c * c + 2 * d * c + 4 * c,
            "keys and values read the context, of width d": lambda c, d: 4 * c * c + c,
            "only keys and values read the context: the query comes from the picture, c × c":
                lambda c, d: c * c + 3 * d * c + c,
            "the output matrix is missing": lambda c, d: c * c + 2 * d * c + c,
            "keys and values are matrices d × c, not d × d": lambda c, d: 2 * c * c + 2 * d * d + c,
            "keys and values are two matrices": lambda c, d: 2 * c * c + d * c + c,
        },
        also=(lambda c, d: c * (2 * (c + d) + 1),)),
    "15.2": Exercise(
        "the time of a picture", 1, 5, seconds, ((803e9, 25, True, 1e11), (7e8, 10, False, 5e10)),
        wrong={
            "guidance takes two pictures per call": lambda F, n, guided, R: n * F / R,
            "without guidance there is one picture per call": lambda F, n, guided, R: 2 * n * F / R,
            "the other way round: guidance makes it twice as long":
                lambda F, n, guided, R: n * F / R * (1 if guided else 2),
            "the number of calls is missing": lambda F, n, guided, R: F * (1 + guided) / R,
            "divide by the rate: operations over operations per second":
                lambda F, n, guided, R: n * F * (1 + guided) * R,
            "this is pictures per second": lambda F, n, guided, R: R / (n * F * (1 + guided)),
        },
        also=(lambda F, n, guided, R: (1 + guided) * n * (F / R),)),
    "15.3": Exercise(
        "the memory of the weights", 1, 5, weights_memory, (([859_520_964, 83_653_863, 123_060_480], 16), ([7, 5], 32)),
        wrong={
            "a byte has eight bits": lambda n, b: sum(n) * b / 1e9,
            "this is bytes; a gigabyte is 10⁹ of them": lambda n, b: sum(n) * b / 8,
            "this takes 2³⁰ bytes for a gigabyte; asked for is 10⁹": lambda n, b: sum(n) * b / 8 / 2**30,
            "only the largest network is counted": lambda n, b: max(n) * b / 8 / 1e9,
            "this is megabytes": lambda n, b: sum(n) * b / 8 / 1e6,
        },
        also=(lambda n, b: sum(x * b for x in n) / 8e9,), rtol=1e-6, atol=0.0),
}
