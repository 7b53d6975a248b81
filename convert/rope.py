"""Rotary settings of an HF config, in the classic form and in that of transformers 5.

Classic: ``rope_theta`` beside ``rope_scaling``. Transformers 5: one ``rope_parameters`` holding both. Where they differ
``rope_scaling`` counts, as in transformers 5, and its theta before the one at the top level, where a stale class
default may linger (NVIDIA Model-Optimizer ``_get_rope_theta``); that of the other object where nothing else says one.
Knows nothing about models: a target and a draft head each pass their own config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.fields import integer, real
from convert.table import ConversionError
from jeagle.config import ConfigError, RopeScaling

__all__ = ["DEFAULT_THETA", "parse_rope"]

DEFAULT_THETA = 10000.0  # HF's own, and what EAGLE-3 heads without a rope_theta were trained with


def parse_rope(config: Mapping[str, Any], default_theta: float = DEFAULT_THETA) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of an HF config. Raises ConversionError on rope types that ``RopeScaling`` cannot express."""
    dicts = [d for d in (_mapping(config, "rope_scaling"), _mapping(config, "rope_parameters")) if d]
    scaling: Mapping[str, Any] = dicts[0] if dicts else {}
    places = (*dicts[:1], config, *dicts[1:])
    theta = next((d["rope_theta"] for d in places if d.get("rope_theta") is not None), default_theta)
    partial = next((d for d in (*dicts, config) if d.get("partial_rotary_factor") not in (None, 1, 1.0)), None)
    if partial is not None:
        raise ConversionError(
            f"config.json has partial_rotary_factor {partial['partial_rotary_factor']}; only models that rotate whole "
            "heads convert"
        )
    theta = real(theta, "rope_theta")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None

    def field(name: str) -> float:
        return real(scaling.get(name), f"rope_scaling.{name}")

    try:
        if kind == "linear":
            return theta, RopeScaling(kind="linear", factor=field("factor"))
        if kind == "llama3":
            return theta, RopeScaling(
                kind="llama3",
                factor=field("factor"),
                low_freq_factor=field("low_freq_factor"),
                high_freq_factor=field("high_freq_factor"),
                # HF falls back to the model's own length where the original one is missing.
                original_max_position=integer(
                    scaling, "original_max_position_embeddings", config.get("max_position_embeddings")
                ),
            )
    except ConfigError as error:
        raise ConversionError(f"config.json: {error}") from error
    raise ConversionError(f"config.json has rope type {kind!r}; only 'default', 'linear' and 'llama3' convert")


def _mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ConversionError(f"config.json: {name} must be an object or null, got {value!r}")
    return value or {}
