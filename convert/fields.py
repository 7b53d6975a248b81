"""Typed reading of foreign JSON: every mistake is one sentence with the file and the field."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.table import ConversionError

__all__ = ["flag", "integer", "listing", "number", "read_json", "real", "said"]


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
    # JSON holds integers of any size: those beyond 64 bits are no size of anything, and may overflow a float.
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 63:
        raise ConversionError(f"config.json: {name} must be a positive integer but {said(value)}; set it")
    return value


def number(data: Mapping[str, Any], name: str) -> float:
    return real(data.get(name), name)


def real(value: Any, name: str) -> float:
    """``value`` as a float, if it is a finite number that one holds; ``name`` is what it is called in config.json."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            if math.isfinite(value):
                return float(value)
    raise ConversionError(f"config.json: {name} must be a number but {said(value)}; set it")


def flag(data: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = default if data.get(name) is None else data[name]
    if not isinstance(value, bool):
        raise ConversionError(f"config.json: {name} must be true or false but {said(value)}; set it")
    return value


def listing(data: Mapping[str, Any], name: str, kind: type, label: str | None = None) -> list[Any]:
    """A list of ``kind``, int or str; null and absence are the empty one. label: where it is, if not at the top."""
    value = [] if data.get(name) is None else data[name]
    if not isinstance(value, list) or any(not isinstance(x, kind) or isinstance(x, bool) for x in value):
        what = {int: "integers", str: "strings"}[kind]
        raise ConversionError(f"config.json: {label or name} must be a list of {what} but {said(value)}; set it")
    return value


def said(value: Any) -> str:
    """What is wrong with a field, in a sentence: a long value is cut."""
    if value is None:
        return "is missing"
    text = repr(value)
    return f"is {text}" if len(text) <= 100 else f"is {text[:100]}..."
