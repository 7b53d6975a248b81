"""Rotary settings of an HF config, in the classic form and in that of transformers 5.

Classic: ``rope_theta`` beside ``rope_scaling``. Transformers 5: one ``rope_parameters`` holding both, which wins where
both forms are present (a stale class default may linger at the top level, NVIDIA Model-Optimizer ``_get_rope_theta``).
Knows nothing about models: a target and a draft head each pass their own config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from convert.table import ConversionError
from jeagle.config import ConfigError, RopeScaling

__all__ = ["DEFAULT_THETA", "parse_rope"]

DEFAULT_THETA = 10000.0  # HF's own, and what EAGLE-3 heads without a rope_theta were trained with


def parse_rope(config: Mapping[str, Any], file: str = "config.json") -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of an HF config. Raises ConversionError on rope types that ``RopeScaling`` cannot express."""
    parameters = _mapping(config, "rope_parameters", file)
    scaling = parameters or _mapping(config, "rope_scaling", file)
    theta = next(
        (d["rope_theta"] for d in (parameters, config, scaling) if d.get("rope_theta") is not None), DEFAULT_THETA
    )
    partial = next((d for d in (parameters, config) if d.get("partial_rotary_factor") not in (None, 1, 1.0)), None)
    if partial is not None:
        raise ConversionError(
            f"{file} has partial_rotary_factor {partial['partial_rotary_factor']}; only models that rotate whole heads "
            "convert"
        )
    theta = _number(theta, "rope_theta", file)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None

    def field(name: str, fallback: Any = None) -> float:
        value = scaling.get(name)
        return _number(fallback if value is None else value, f"rope_scaling.{name}", file)

    try:
        if kind == "linear":
            return theta, RopeScaling(kind="linear", factor=field("factor"))
        if kind == "llama3":
            # HF falls back to the model's own length where the original one is missing.
            length = field("original_max_position_embeddings", config.get("max_position_embeddings"))
            return theta, RopeScaling(
                kind="llama3",
                factor=field("factor"),
                low_freq_factor=field("low_freq_factor"),
                high_freq_factor=field("high_freq_factor"),
                original_max_position=int(length),
            )
    except ConfigError as error:
        raise ConversionError(f"{file}: {error}") from error
    raise ConversionError(f"{file} has rope type {kind!r}; only 'default', 'linear' and 'llama3' convert")


def _mapping(config: Mapping[str, Any], name: str, file: str) -> Mapping[str, Any]:
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ConversionError(f"{file}: {name} must be an object or null, got {value!r}")
    return value or {}


def _number(value: Any, name: str, file: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConversionError(f"{file}: {name} must be a number, got {value!r}")
    return float(value)
