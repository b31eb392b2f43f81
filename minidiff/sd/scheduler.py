"""What each of diffusers' scheduler classes means: one row of a table, read as a schedule, a sampler and a grid.

A `scheduler_config.json` names a class and some of its options; absent ones take the class's defaults. To run another
class on a checkpoint's config, replace `_class_name`: like diffusers, we ignore the options of other classes.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from minidiff import samplers
from minidiff.grid import Grid, beta, distilled, exponential, inverse, karras, times
from minidiff.io.checkpoint import scheduler_config
from minidiff.schedule import (
    SD,
    Discrete,
    Level,
    amplitudes,
    cosine_betas,
    interpolate,
    linear_betas,
    scaled_linear_betas,
    sigmoid_betas,
    zero_terminal_snr,
)


class Row(NamedTuple):
    """One of diffusers' classes."""

    sampler: Callable
    spacing: str = "linspace"         # of the times, where the config has none
    coordinates: str = "VP"           # of the states: variance-preserving, or with alpha = 1 (VE)
    reads: tuple[str, ...] = ()       # options of its grid, besides COMMON
    accepts: dict[str, tuple] = {}    # options that would make it another algorithm, and their values that do not
    takes: dict[str, tuple] = {}      # keyword of the sampler -> option and its default
    turns: dict[tuple, Callable] = {} # option and its value that make it another sampler
    clips: bool | None = None         # x0, where the config does not say; None: it never does
    clean: bool = True                # whether the last level is without noise, where the config does not say
    betas: tuple = ("linear", 0.0001, 0.02)  # schedule and its ends, where the config has none


COMMON = ("timestep_spacing", "steps_offset", "rescale_betas_zero_snr")
SPACINGS = {"karras": karras, "exponential": exponential, "beta": beta}  # of sigma/alpha
SIGMAS = tuple(f"use_{name}_sigmas" for name in SPACINGS)
ENDS = ("sigma_min", "sigma_max")
REFUSED = ("use_lu_lambdas", "use_flow_sigmas", *ENDS)
NO_THRESHOLD = {"thresholding": (False,)}
LAST = {"lower_order_final": ("lower_order_final", True)}
CLASSES = {
    "DDIMScheduler": Row(samplers.ddim, "leading", reads=("set_alpha_to_one",), accepts=NO_THRESHOLD, clips=True),
    "DDPMScheduler": Row(
        samplers.ddpm, "leading", clips=True, turns={("variance_type", "fixed_large"): samplers.ddpm_large},
        accepts={**NO_THRESHOLD, "variance_type": ("fixed_small", "fixed_small_log", "fixed_large")}),
    "EulerDiscreteScheduler": Row(samplers.euler, coordinates="VE", accepts={"timestep_type": ("discrete",)},
                                  reads=(*SIGMAS, *ENDS, "final_sigmas_type", "interpolation_type")),
    "EulerAncestralDiscreteScheduler": Row(samplers.euler_ancestral, coordinates="VE"),
    "HeunDiscreteScheduler": Row(samplers.heun, coordinates="VE", reads=SIGMAS, clips=False,
                                 betas=("linear", 0.00085, 0.012)),
    "LMSDiscreteScheduler": Row(samplers.lms, coordinates="VE", reads=SIGMAS),
    "PNDMScheduler": Row(samplers.plms, "leading", reads=("set_alpha_to_one",), accepts={"skip_prk_steps": (True,)},
                         clean=False),
    "DPMSolverMultistepScheduler": Row(
        samplers.dpmpp_2m, reads=(*SIGMAS, "final_sigmas_type", "use_lu_lambdas", "use_flow_sigmas"), takes=LAST,
        turns={("algorithm_type", "sde-dpmsolver++"): samplers.dpmpp_2m_sde},
        accepts={**NO_THRESHOLD, "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"), "solver_order": (2,),
                 "euler_at_final": (False,), "lambda_min_clipped": (-math.inf,), "variance_type": (None,),
                 "use_dynamic_shifting": (False,),
                 "solver_type": ("midpoint", "logrho", "bh1", "bh2")}),  # the other solvers' names mean midpoint here
    "DPMSolverSDEScheduler": Row(samplers.dpmpp_sde, coordinates="VE", reads=SIGMAS),
    "UniPCMultistepScheduler": Row(
        samplers.unipc, reads=(*SIGMAS, *ENDS, "final_sigmas_type", "use_flow_sigmas"), takes=LAST,
        accepts={**NO_THRESHOLD, "solver_order": (2,), "predict_x0": (True,), "disable_corrector": ([], ()),
                 "solver_p": (None,), "use_dynamic_shifting": (False,), "shift_terminal": (None,),
                 "solver_type": ("bh2", "midpoint", "heun", "logrho")}),  # and here bh2
    "LCMScheduler": Row(samplers.lcm, "leading", reads=("original_inference_steps",), accepts=NO_THRESHOLD, clips=False,
                        takes={"scaling": ("timestep_scaling", 10.0)}, betas=("scaled_linear", 0.00085, 0.012)),
}
NAMES = {name: {"_class_name": theirs, **dict(made)} for theirs, row in CLASSES.items()
         for name, sampler in samplers.SAMPLERS.items()
         for made, known in (((), row.sampler), *(((of,), other) for of, other in row.turns.items()))
         if known is sampler}  # our name -> diffusers' class, and the option that makes it another sampler
NAMES["dpmpp_2m"]["algorithm_type"] = "dpmsolver++"  # whatever a checkpoint says: its other algorithm has another name
UNSAID = {"skip_prk_steps": False}  # where an absent option means one that is not supported
BETAS = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "sigmoid": sigmoid_betas}  # with two ends
SD_CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
             "set_alpha_to_one": False, "clip_sample": False}  # the explicit keys of SD 1.x's scheduler_config.json
PRESETS = {
    "sd-ddim": {"_class_name": "DDIMScheduler"},
    "sd-ddpm": {"_class_name": "DDPMScheduler"},
    "sd-euler": {"_class_name": "EulerDiscreteScheduler"},
    "sd-euler-ancestral": {"_class_name": "EulerAncestralDiscreteScheduler"},
    "sd-euler-karras": {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
    "sd-heun": {"_class_name": "HeunDiscreteScheduler"},
    "sd-lms": {"_class_name": "LMSDiscreteScheduler"},
    "sd-plms": {"_class_name": "PNDMScheduler"},
    "sd-dpmpp": {"_class_name": "DPMSolverMultistepScheduler"},
    "sd-dpmpp-karras": {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
    "sd-dpmpp-sde": {"_class_name": "DPMSolverSDEScheduler"},
    "sd-unipc": {"_class_name": "UniPCMultistepScheduler"},
    "lcm": {"_class_name": "LCMScheduler"},
}


def row(config: dict[str, Any]) -> Row:
    """The row of a config's class.

    Raises:
        ValueError: it has none.

    >>> row({"_class_name": "EulerDiscreteScheduler"}).coordinates
    'VE'
    """
    if (name := config.get("_class_name")) not in CLASSES:
        raise ValueError(f"scheduler {name!r} is not supported; supported are {', '.join(CLASSES)}")
    return CLASSES[name]


def named(name: str) -> dict[str, Any]:
    """What a sampler's name changes in a config: the class, and the spacing of sigma/alpha where the name ends in one.

    Args:
        name: of `samplers.SAMPLERS`, with _karras, _exponential or _beta behind it for a class that has them; or the
            same as AUTOMATIC1111's web UI writes it.

    Raises:
        ValueError: an unknown name, or a spacing that the class does not have.

    >>> named("DPM++ 2M Karras") == named("dpmpp_2m_karras"), named("Euler a")["_class_name"]
    (True, 'EulerAncestralDiscreteScheduler')
    """
    words = name.lower().replace("dpm++", "dpmpp").replace("_", " ").split()
    if words[:2] == ["euler", "a"]:
        words[1] = "ancestral"
    spacing = words.pop() if words and words[-1] in SPACINGS else None
    plain = "_".join(words)
    if plain not in NAMES:
        raise ValueError(f"unknown sampler {name!r}; there are {', '.join(NAMES)}, of which {', '.join(_spaced())} may "
                         f"end in {', '.join(f'_{word}' for word in SPACINGS)}")
    if spacing is None:
        return dict(NAMES[plain])
    if plain not in _spaced():
        raise ValueError(f"{plain} has no {spacing} spacing; {', '.join(_spaced())} do")
    return {**NAMES[plain], **{f"use_{word}_sigmas": word == spacing for word in SPACINGS}}


def name_of(config: dict[str, Any]) -> str:
    """The name, for `named`, of what a config means.

    Raises:
        ValueError: a class that is not supported.

    >>> name_of({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True})
    'dpmpp_2m_karras'
    """
    known, sampler = row(config), from_config({"skip_prk_steps": True, **config})[0]
    name = next(name for name, other in samplers.SAMPLERS.items() if other is sampler)
    spacing = next((word for word in SPACINGS if f"use_{word}_sigmas" in known.reads
                    and config.get(f"use_{word}_sigmas")), None)
    return f"{name}_{spacing}" if spacing else name


def _spaced() -> list[str]:
    return [name for name, made in NAMES.items() if SIGMAS[0] in CLASSES[made["_class_name"]].reads]


def discrete(config: dict[str, Any]) -> Discrete:
    """The noise levels that a config means.

    Raises:
        ValueError: an unknown `beta_schedule`, or see `scheduler_config`.

    >>> discrete({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 10}).T
    10
    """
    config = scheduler_config(config)
    unsaid, start, end = CLASSES.get(config.get("_class_name"), CLASSES["DDIMScheduler"]).betas
    T, name = config.get("num_train_timesteps", 1000), config.get("beta_schedule", unsaid)
    if (trained := config.get("trained_betas")) is not None:
        if "num_train_timesteps" in config and len(trained) != T:
            raise ValueError(f"the scheduler's config has {len(trained)} trained_betas, but num_train_timesteps is {T}")
        betas = torch.tensor(trained, dtype=torch.float32)
    elif name in BETAS:
        betas = BETAS[name](T, config.get("beta_start", start), config.get("beta_end", end))
    elif name == "squaredcos_cap_v2":
        betas = cosine_betas(T)
    else:
        raise ValueError(f"beta_schedule is {name!r}; supported are {', '.join(BETAS)} and squaredcos_cap_v2")
    table = Discrete.from_betas(betas)
    return Discrete(zero_terminal_snr(table.alpha_bar)) if config.get("rescale_betas_zero_snr") else table


def from_config(config: dict[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """The sampler that a config means, and its keyword arguments.

    `clip_sample` is a statement about x0, not about the sampler: see `clip_range`.

    Raises:
        ValueError: a class or an option that is not supported, by name.

    >>> from_config({"_class_name": "DPMSolverMultistepScheduler"})[1]
    {'lower_order_final': True}
    """
    config = scheduler_config(config)
    known = row(config)
    for key, values in known.accepts.items():
        value = UNSAID.get(key, values[0]) if config.get(key) is None else config[key]
        if value not in values:
            raise ValueError(f"{config['_class_name']} with {key} = {value!r} is not supported; supported is "
                             f"{values[0]!r}")
    sampler = next((other for (key, value), other in known.turns.items() if config.get(key) == value), known.sampler)
    options = {keyword: config.get(key, unsaid) for keyword, (key, unsaid) in known.takes.items()}
    return sampler, options | timed(sampler, discrete(config))


def timed(sampler: Callable, schedule: Discrete) -> dict[str, Callable]:
    """The keyword of samplers that visit levels beside their grid's: `time`, from sigma/alpha to the net's time.

    >>> timed(samplers.ddim, SD), round(timed(samplers.dpmpp_sde, SD)["time"](1.0), 1)
    ({}, 353.9)
    """
    has = "time" in inspect.signature(sampler).parameters
    return {"time": partial(inverse, table=schedule.nsr)} if has else {}


def clip_range(config: dict[str, Any]) -> float | None:
    """How far x0 may be from 0 by a config, for `guidance.clip`; None: any distance.

    >>> clip_range({"_class_name": "DDIMScheduler"}), clip_range({"_class_name": "EulerDiscreteScheduler"})
    (1.0, None)
    """
    config = scheduler_config(config)
    unsaid = CLASSES[config["_class_name"]].clips if config.get("_class_name") in CLASSES else None
    return config.get("clip_sample_range", 1.0) if unsaid is not None and config.get("clip_sample", unsaid) else None


def from_diffusers(config: dict[str, Any], n: int, schedule: Discrete) -> Grid:
    """The levels that diffusers visits.

    NOTE: diffusers' LMS and Heun ignore zero terminal SNR too, we do not: test_lms_and_heun_know_zero_terminal_snr.

    Args:
        n: steps. schedule: the noise levels, `discrete(config)`.

    Raises:
        ValueError: a class or an option that is not supported, by name, or steps that do not fit.

    Matches: diffusers' schedulers, tests/parity/test_samplers.py.

    >>> config = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    >>> [level.t for level in from_diffusers(config, 2, discrete(config))]
    [999.0, 499.0, 0.0]
    """
    config = scheduler_config(config)
    known, name = row(config), config["_class_name"]
    get = {key: value for key, value in config.items() if key in (*COMMON, *known.reads)}.get
    for key in REFUSED:
        if get(key):
            raise ValueError(f"{name} with {key} is not supported")
    for key, values in (("interpolation_type", ("linear",)), ("final_sigmas_type", ("zero", "sigma_min"))):
        if get(key, values[0]) not in values:
            raise ValueError(f"{key} {get(key)!r} is not supported; supported is {' or '.join(values)}")
    if len(asked := [word for word in SPACINGS if get(f"use_{word}_sigmas")]) > 1:
        raise ValueError(f"{name} is asked for the spacings {' and '.join(asked)}; there can be one")
    spacing, dpm = get("timestep_spacing") or known.spacing, known.sampler in (samplers.dpmpp_2m, samplers.unipc)
    if known.sampler is samplers.lcm:
        ts = distilled(n, schedule.T, get("original_inference_steps", 50))
    else:
        ts = times(spacing, n, schedule.T, get("steps_offset", 0), extra=int(dpm and spacing != "trailing"))
    n, vp = len(ts), known.coordinates == "VP"
    ts = [float(round(t)) for t in ts] if vp else ts
    nsr = schedule.nsr
    if dpm or not vp:
        # NOTE: these classes cap an infinite sigma/alpha (zero terminal SNR) at alpha_bar = 2^-24
        nsr = [min(u, math.sqrt(2**24 - 1)) for u in nsr] if get("rescale_betas_zero_snr") else nsr
        us = [interpolate(t, nsr) for t in ts]
        if asked:
            us = SPACINGS[asked[0]](n, *((nsr[-1], nsr[0]) if vp else (us[0], us[-1])))
            ts = [inverse(u, nsr) for u in us]
            # NOTE: diffusers rounds only Karras' times and cuts the fraction off the others', an exact 999 to 998:
            # test_every_class_with_a_spacing_has_diffusers_levels
            ts = [float(round(t)) for t in ts] if vp else ts
    else:
        us = [nsr[int(t)] for t in ts]
    clean = get("set_alpha_to_one", known.clean) and get("final_sigmas_type") != "sigma_min"
    us = [*us, 0.0 if clean else nsr[0]]
    levels = [Level(t, *(amplitudes(u) if vp else (1.0, u))) for t, u in zip([*ts, 0.0], us)]
    return Grid(levels, from_pure_noise=not vp and spacing != "leading")


def preset(name: str, n: int, schedule: Discrete = SD) -> Grid:
    """The grid that Stable Diffusion 1.x has with one of diffusers' schedulers; names: the keys of PRESETS.

    Raises:
        ValueError: there is none of this name, or steps that do not fit.

    >>> round(preset("sd-euler-karras", 10)[0].sigma, 4)
    14.6146
    """
    if name not in PRESETS:
        raise ValueError(f"unknown grid {name!r}; there are {', '.join(PRESETS)}")
    return from_diffusers({**SD_CONFIG, **PRESETS[name]}, n, schedule)
