"""Heads that come with the package: ``LLM(target, draft="smollm2-135m-eagle3")``. Each directory holds a checkpoint,
a README.md that says what it was trained on and what it does, and a table of its trees (``tree_table.py``)."""

from __future__ import annotations

from pathlib import Path

__all__ = ["find", "names"]

_HERE = Path(__file__).parent


def names() -> list[str]:
    return sorted(p.parent.name for p in _HERE.glob("*/source.json"))


def find(name: str) -> Path | None:
    """The checkpoint of a head that comes with the package, or None."""
    return _HERE / name if name in names() else None
