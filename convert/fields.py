"""Typed reading of foreign JSON: every mistake is one sentence with the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.table import ConversionError

__all__ = ["flag", "integer", "number", "read_json"]


def read_json(path: Path) -> dict[str, Any]:
    """A file that must hold one JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"cannot read {path} ({error.strerror}); restore it") from error
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; of nesting without end
        raise ConversionError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise ConversionError(f"{path} must hold a JSON object, not {type(data).__name__}; fetch it again")
    return data


def integer(data: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer; null and absence mean ``default``, without one they are refused."""
    value = default if data.get(name) is None else data[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        said = "is missing" if value is None else f"is {value!r}"
        raise ConversionError(f"config.json: {name} must be a positive integer but {said}; set it")
    return value


def number(data: Mapping[str, Any], name: str) -> float:
    value = data.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        said = "is missing" if value is None else f"is {value!r}"
        raise ConversionError(f"config.json: {name} must be a number but {said}; set it")
    return float(value)


def flag(data: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = default if data.get(name) is None else data[name]
    if not isinstance(value, bool):
        raise ConversionError(f"config.json: {name} must be true or false but is {value!r}; set it")
    return value
