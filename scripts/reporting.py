"""What the measuring scripts share of saying what they found: tables, pictures, and where files may be written."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["check_outputs", "make_console", "new_figure", "new_table", "synthetic_note"]


def make_console() -> Console:
    """As wide as the terminal; wide enough for every table where the output is a file."""
    return Console(width=None if sys.stdout.isatty() else 160)


def new_table(*names: str, title: str | None = None, right: Iterable[str] = ()) -> Table:
    """An empty table. right: the columns of numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    numbers = set(right)
    for name in names:
        table.add_column(name, justify="right" if name in numbers else "left")
    return table


def check_outputs(out: Path | None, picture: Path | None) -> None:
    """Raises ValueError where a file could not be written in the end: an hour of measuring may lie in between."""
    for path in filter(None, (out, picture)):
        if not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: {path.parent} is not a directory")
    if picture is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--picture needs matplotlib, which is not installed") from None
    formats = Figure().canvas.get_supported_filetypes()
    if picture.suffix[1:].lower() not in formats:
        raise ValueError(f"--picture {picture} must end in one of .{', '.join(sorted(formats))}")


def new_figure(title: str, width: float, height: float) -> Any:
    """A matplotlib figure; without pyplot Agg draws, whatever display there is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def synthetic_note(profile: Iterable[float] | None) -> str:
    """What a title says where acceptance was forced; else nothing."""
    if profile is None:
        return ""
    return f", SYNTHETIC ACCEPTANCE {' '.join(f'{p:.3f}' for p in profile)} (no trained head: the text means nothing)"
