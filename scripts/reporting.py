"""What the measuring scripts share of saying what they found: tables, pictures, and where files may be written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = [
    "check_outputs",
    "grouped_bars",
    "make_console",
    "new_figure",
    "new_table",
    "save_picture",
    "synthetic_note",
    "with_picture",
]

Result = dict[str, Any]


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


def grouped_bars(
    axes: Any, groups: Sequence[str], series: Mapping[str, Sequence[dict[str, float] | float | None]]
) -> None:
    """A group of bars per name, one of each series: a number, or the median of a ``common.spread`` with quartiles as
    error bars. None leaves a gap."""
    width = 0.8 / len(series)
    for i, (name, found) in enumerate(series.items()):
        known = {at: value for at, value in enumerate(found) if value is not None}
        places = [at + (i + 0.5) * width - 0.4 for at in known]
        heights = [value["median"] if isinstance(value, dict) else value for value in known.values()]
        low, high = (
            [abs(value[end] - value["median"]) if isinstance(value, dict) else 0.0 for value in known.values()]
            for end in ("quartile_1", "quartile_3")
        )
        about = dict(yerr=(low, high), capsize=2) if any(low + high) else {}
        bars = axes.bar(places, heights, width, color=f"C{i % 10}", label=name, **about)
        axes.bar_label(bars, fmt=lambda x: f"{x:.0f}" if x >= 10 else f"{x:.1f}", padding=2, fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(x=0.02, y=0.2)  # above the highest there is room for a legend


def save_picture(figure: Any, path: Path) -> None:
    """With a grid and, where there is something to tell apart, a legend."""
    for axes in figure.axes:
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def with_picture(
    show: Callable[[Result], None], draw: Callable[[Path, Result], None], path: Path | None
) -> Callable[[Result], None]:
    """Show a result and, where there is a path, draw it as its JSON file has it: from that it can be drawn anew."""

    def both(result: Result) -> None:
        show(result)
        if path:
            draw(path, json.loads(json.dumps(result)))

    return both


def synthetic_note(profile: Iterable[float] | None) -> str:
    """What a title says where acceptance was forced; else nothing."""
    if profile is None:
        return ""
    return f", SYNTHETIC ACCEPTANCE {' '.join(f'{p:.3f}' for p in profile)} (no trained head: the text means nothing)"
