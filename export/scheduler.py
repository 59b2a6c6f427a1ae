"""The scheduler configuration of a checkpoint: the noise levels and the update rule that diffusers takes from it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import msgspec

from svd_trt.engine.manifest import SamplerInfo, SamplerName, Schedule
from svd_trt.errors import CheckpointError, first_line
from svd_trt.units import shorten

__all__ = ["make_scheduler", "read_scheduler"]

_log = logging.getLogger("svd_trt")

Config: TypeAlias = Mapping[str, Any]

_FILE = "scheduler/scheduler_config.json"
_KARRAS = "use_karras_sigmas true, sigma_min 0.002 and sigma_max 700, as published"


def read_scheduler(where: str, config: Config) -> SamplerInfo:
    """The schedule and the update rule of a scheduler configuration.

    What diffusers computes with `EulerDiscreteScheduler`, `EDMEulerScheduler` and `EDMDPMSolverMultistepScheduler` is
    read exactly. `DPMSolverMultistepScheduler` gives SVD's UNet time steps that it does not know, so its noise levels
    and its solver are read and SVD's own time steps kept, which is logged.

    Args:
        where: the checkpoint, for messages.
        config: the configuration; its ``_class_name`` is the class that the pipeline would create.

    Raises:
        CheckpointError: the scheduler is another one, or has a value that is not supported; the message says what to
            change, and where.
    """
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in _READERS:
        raise CheckpointError(
            f"{where}: the scheduler is {kind}, and svd-trt reads {', '.join(_READERS)}; set EulerDiscreteScheduler in "
            f"model_index.json and in {_FILE}, with {_KARRAS}"
        )
    _require(where, config, "prediction_type", "v_prediction", "epsilon")
    return _READERS[kind](where, config)


def make_scheduler(config: Config) -> Any:
    """The scheduler of diffusers that computes what `read_scheduler` reads from ``config``.

    Raises:
        CheckpointError: as `read_scheduler`.
    """
    import diffusers

    kind = config["_class_name"]
    if kind == "DPMSolverMultistepScheduler":
        info = read_scheduler("the checkpoint", config)
        own = "exponential" if info.schedule == "exponential" else "karras"
        return diffusers.EDMDPMSolverMultistepScheduler(
            sigma_min=info.sigma_min,
            sigma_max=info.sigma_max,
            sigma_data=1.0,
            sigma_schedule=own,
            prediction_type="v_prediction",
            solver_order=2 if info.solver == "dpmpp-2m" else 1,
        )
    return getattr(diffusers, kind).from_config(dict(config))


def _read_euler(where: str, config: Config) -> SamplerInfo:
    _require(where, config, "timestep_type", "continuous", "discrete")
    schedule = _schedule(where, config)
    low, high = _bounds(where, config)
    final = _final(where, config)
    if schedule == "training" or low is None or high is None:
        _require(where, config, "interpolation_type", "linear", "linear")
        levels = _training_sigmas(where, config)
    else:
        levels = ()
    if final == "sigma_min":
        last = (levels or _training_sigmas(where, config))[0]
    return SamplerInfo(
        sigma_min=None if schedule == "training" else low,
        sigma_max=None if schedule == "training" else high,
        rho=7.0,
        timestep_spacing=_spacing(where, config),
        schedule=schedule,
        final_sigma=last if final == "sigma_min" else 0.0,
        steps_offset=_whole(where, config, "steps_offset") if levels else 0,
        training_sigmas=levels,
    )


def _read_edm(where: str, config: Config) -> SamplerInfo:
    # SVD was trained with data of unit variance. diffusers takes 0.5 if the file does not say so.
    _require(where, config, "sigma_data", 1.0, 0.5)
    low, high = _bounds(where, {"sigma_min": 0.002, "sigma_max": 80.0} | dict(config), optional=False)
    kind = config.get("sigma_schedule", "karras")
    if kind not in ("karras", "exponential"):
        raise _wrong(where, "sigma_schedule", kind, '"karras" or "exponential"')
    rho = _positive(config.get("rho", 7.0))
    if rho is None:
        raise _wrong(where, "rho", config["rho"], "7.0, as published,")
    return SamplerInfo(
        sigma_min=low,
        sigma_max=high,
        rho=rho,
        timestep_spacing="leading",  # the noise at the start has the same standard deviation
        schedule="karras" if kind == "karras" else "exponential",
        final_sigma=None if _final(where, config) == "sigma_min" else 0.0,
    )


def _read_edm_dpm(where: str, config: Config) -> SamplerInfo:
    info = _read_edm(where, config)
    ends_at_zero = info.final_sigma == 0.0
    return msgspec.structs.replace(
        info, solver=_solver(where, config, ends_at_zero), final_sigma=0.0 if ends_at_zero else info.sigma_min
    )


def _read_dpm(where: str, config: Config) -> SamplerInfo:
    schedule = _schedule(where, config)
    for other in ("use_lu_lambdas", "use_flow_sigmas"):
        _require(where, config, other, False, False)
    low, high = _bounds(where, config)
    if schedule == "training" or low is None or high is None:
        raise CheckpointError(
            f"{where}: the noise levels of this DPMSolverMultistepScheduler are not those that SVD was trained with; "
            f"set {_KARRAS}, in {_FILE}"
        )
    _require(where, config, "final_sigmas_type", "zero", "zero")
    solver = _solver(where, config, ends_at_zero=True)
    _log.warning(
        "%s: DPMSolverMultistepScheduler gives SVD's UNet time steps that it was not trained with; videos are made "
        "with its noise levels and its solver (--sampler %s), and with SVD's time steps",
        where,
        solver,
    )
    return SamplerInfo(
        sigma_min=low, sigma_max=high, rho=7.0, timestep_spacing="leading", schedule=schedule, solver=solver
    )


_READERS: dict[str, Callable[[str, Config], SamplerInfo]] = {
    "EulerDiscreteScheduler": _read_euler,
    "EDMEulerScheduler": _read_edm,
    "EDMDPMSolverMultistepScheduler": _read_edm_dpm,
    "DPMSolverMultistepScheduler": _read_dpm,
}


def _require(where: str, config: Config, key: str, right: object, default: object) -> None:
    """Refuse another value of ``key`` than ``right``; ``default`` is what diffusers takes if there is none."""
    value = config.get(key, default)
    if value != right:
        raise _wrong(where, key, value, json.dumps(right))


def _wrong(where: str, key: str, value: object, right: str) -> CheckpointError:
    """The refusal of ``value``, in the words of a JSON file, with what to set instead."""
    return CheckpointError(f"{where}: the scheduler's {key} is {shorten(json.dumps(value))}; set {right} in {_FILE}")


def _positive(value: object) -> float | None:
    """``value`` if it is a finite number above 0; files may have NaN, Infinity, and whole numbers of any length."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if 0 < number < math.inf else None


def _schedule(where: str, config: Config) -> Schedule:
    """The schedule that the three ``use_..._sigmas`` name."""
    chosen = [name for name in ("karras", "exponential", "beta") if config.get(f"use_{name}_sigmas")]
    if len(chosen) > 1:
        both = " and ".join(f"use_{name}_sigmas" for name in chosen)
        raise CheckpointError(
            f"{where}: the scheduler has {both}, and diffusers takes one of them; keep one in {_FILE}"
        )
    if chosen == ["beta"]:
        raise CheckpointError(
            f"{where}: the scheduler has use_beta_sigmas, which svd-trt does not compute; set it to false and "
            f"use_karras_sigmas or use_exponential_sigmas to true in {_FILE}, or pass sigmas to each video"
        )
    return "karras" if chosen == ["karras"] else "exponential" if chosen else "training"


def _bounds(where: str, config: Config, *, optional: bool = True) -> tuple[float | None, float | None]:
    """sigma_min and sigma_max."""
    values = [config.get(key) for key in ("sigma_min", "sigma_max")]
    low, high = (_positive(value) for value in values)
    given = [value for value in values if not (optional and value is None)]
    known = [number for number in (low, high) if number is not None]
    if len(known) != len(given) or known != sorted(set(known)):
        has = " and ".join(shorten(json.dumps(value)) for value in values)
        raise CheckpointError(
            f"{where}: the scheduler needs 0 < sigma_min < sigma_max, and has {has}; set 0.002 and 700.0, as "
            f"published, in {_FILE}"
        )
    return low, high


def _final(where: str, config: Config) -> str:
    value = config.get("final_sigmas_type", "zero")
    if value not in ("zero", "sigma_min"):
        raise _wrong(where, "final_sigmas_type", value, '"zero"')
    return str(value)


def _spacing(where: str, config: Config) -> str:
    value = config.get("timestep_spacing", "linspace")
    if value not in ("leading", "trailing", "linspace"):
        raise _wrong(where, "timestep_spacing", value, '"leading"')
    return str(value)


def _whole(where: str, config: Config, key: str) -> int:
    value = config.get(key, 0)
    if not isinstance(value, int):
        raise _wrong(where, key, value, "a whole number")
    return int(value)


def _solver(where: str, config: Config, ends_at_zero: bool) -> SamplerName:
    """The sampler that is diffusers' DPM-Solver of this configuration."""
    order = config.get("solver_order", 2)
    if order not in (1, 2):
        raise _wrong(where, "solver_order", order, "1 or 2")
    _require(where, config, "algorithm_type", "dpmsolver++", "dpmsolver++")
    _require(where, config, "thresholding", False, False)
    if order == 1:
        return "euler"
    _require(where, config, "solver_type", "midpoint", "midpoint")
    if not ends_at_zero:  # otherwise the last step is of first order, whatever these say
        _require(where, config, "lower_order_final", True, True)
        _require(where, config, "euler_at_final", False, False)
    return "dpmpp-2m"


def _training_sigmas(where: str, config: Config) -> tuple[float, ...]:
    """The noise levels of training, as diffusers computes them, the least first."""
    from diffusers import EulerDiscreteScheduler

    from svd_trt.export.silence import silence_libraries

    try:
        with silence_libraries():
            products = EulerDiscreteScheduler.from_config(dict(config)).alphas_cumprod
        levels = [float(level) for level in ((1 - products) / products) ** 0.5]
    except Exception as error:  # diffusers checks none of these values, so anything may be raised
        raise CheckpointError(
            f"{where}: diffusers cannot read the scheduler's betas: {first_line(error)}; set {_KARRAS}, in {_FILE}"
        ) from error
    if not levels or levels != sorted(levels) or not 0 < levels[0] <= levels[-1] < float("inf"):
        raise CheckpointError(f"{where}: the scheduler's betas give no noise schedule; set {_KARRAS}, in {_FILE}")
    if (count := config.get("num_train_timesteps", 1000)) != len(levels):
        raise CheckpointError(
            f"{where}: the scheduler's num_train_timesteps is {count}, and it has {len(levels)} trained_betas; set "
            f"num_train_timesteps to {len(levels)} in {_FILE}"
        )
    return tuple(levels)
