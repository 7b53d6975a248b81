"""DIR/<part>.json: one row per thing measured, written as soon as it is known and kept from run to run.

A row is its key (what was measured), ``status`` and figures. Statuses: "measured"; "skipped" and "unsupported", with
``why``; "error", with the error in a line; "crashed": the process ended, or was stopped, while it was measured.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from common import write_result

__all__ = ["DeviceLost", "OutOfTime", "Rows", "Settings", "Skip", "in_a_line", "read_part", "update_part"]

# Fields of a row that say what was measured; all others say what was found.
KEYS = ("what", "operation", "implementation", "case", "shape", "dtype", "flags", "tree", "B", "T", "length")
COPY_BANDWIDTH = dict(what="copy bandwidth")


class Skip(Exception):
    """Why a row cannot be measured here, in one sentence."""


class OutOfTime(Exception):
    """The part's time is up; what is left waits for the next run."""


class DeviceLost(Exception):
    """After an error the device computes nothing any more: only a new process can go on."""


@dataclass(frozen=True)
class Settings:
    tiny: bool  # minuscule shapes, for a CPU
    attention: str  # the implementation that models run with
    variant: str  # which of the part's processes this is
    smollm2: Path  # the converted checkpoint


class Rows:
    """The rows of one part. Those that stand in the file are not measured again; errors are tried again.

    ``only``: a regular expression. Rows whose key, as it is printed, it does not find are left out, but for the copy
    bandwidth, which others are held against.

    Raises ValueError where the file's rows come from another device, another JAX or other sizes.
    """

    def __init__(self, path: Path, heading: dict[str, Any], *, deadline: float, only: str = ""):
        self.path, self.heading, self.deadline, self.only = path, heading, deadline, re.compile(only)
        before = read_part(path)
        for field in ("device", "jax", "tiny"):
            if before.get("rows") and before[field] != heading[field]:
                raise ValueError(
                    f"{path} holds rows of {field} {before[field]!r}, this is {heading[field]!r}; give another --out"
                )
        self._rows = {_name(row): row for row in before.get("rows", [])}
        update_part(path, **heading, rows=before.get("rows", []))

    def measure(self, function: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The row of ``key``: as it stands in the file, or with the figures that ``function`` finds now; {} if it is
        left out."""
        assert set(key) <= set(KEYS), key
        said = ", ".join(str(x) for x in key.values())
        if key != COPY_BANDWIDTH and not self.only.search(said):
            return {}
        found = self._rows.get(_name(key))
        if found is not None and found["status"] in ("measured", "crashed"):
            return found
        if time.monotonic() > self.deadline:
            raise OutOfTime
        # Should the process die, this is what the file says.
        self._put({**key, "status": "crashed", "why": "the process ended while this was measured"})
        began = time.monotonic()
        try:
            row = {**key, "status": "measured", **function()}
        except (Skip, ImportError) as why:  # a package that is not installed
            row = {**key, "status": "skipped", "why": in_a_line(str(why))}
        except NotImplementedError as why:
            row = {**key, "status": "unsupported", "why": in_a_line(str(why))}
        except Exception as error:
            row = {**key, "status": "error", "why": in_a_line(error)}
        except BaseException:  # interrupted: nothing is known
            del self._rows[_name(key)]
            self._write()
            raise
        row |= dict(took_s=round(time.monotonic() - began, 2), commit=self.heading["commit"])
        if row["status"] == "error" and not _device_lives():
            row["status"] = "crashed"
        self._put(row)
        print("  ", said, "-", row.get("why", row["status"]), flush=True)
        if row["status"] == "crashed":
            raise DeviceLost(row["why"])
        return row

    def _put(self, row: dict[str, Any]) -> None:
        self._rows[_name(row)] = row
        self._write()

    def _write(self) -> None:
        update_part(self.path, rows=list(self._rows.values()))


def _name(row: dict[str, Any]) -> tuple:
    return tuple((field, row[field]) for field in KEYS if field in row)


def _device_lives() -> bool:
    """After an illegal access every call of the process fails."""
    try:
        return float(jnp.ones(2).sum()) == 2
    except RuntimeError:  # XLA's errors are
        return False


def in_a_line(said: Exception | str) -> str:
    """The first line of a message, or an error as the last line of its traceback begins; cut to a table's width."""
    name = "" if isinstance(said, str) else f"{type(said).__name__}: "
    return (name + next((line for line in str(said).splitlines() if line.strip()), ""))[:300]


def read_part(path: Path) -> dict[str, Any]:
    """What is known of a part; nothing yet: an empty dict."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def update_part(path: Path, **fields: Any) -> None:
    """Replace fields of a part's file. A reader, or a process killed here, finds the old file or the new one."""
    new = path.with_suffix(".new")
    write_result(new, read_part(path) | fields)
    os.replace(new, path)
