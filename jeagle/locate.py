"""From what a user names as a model to a converted checkpoint on disk, converting once where that is needed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from jeagle.checkpoint import CheckpointError, is_checkpoint

__all__ = ["locate"]


def locate(source: str | Path, cache: Path, *, kind: str, target: Path | None = None) -> Path:
    """The converted checkpoint for ``source``: itself if it is one, else its conversion under ``cache``/converted.

    A local source is recognised again by path, sizes and times of its files, so an edited checkpoint is converted anew;
    a hub name by its name. Raises what ``convert.convert`` raises.
    """
    path = Path(source).expanduser()
    if path.is_dir() and is_checkpoint(path):
        return path
    identity = [str(source), str(target)]
    if path.exists():
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        identity = [str(path.resolve()), str(target)]
        identity += [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files if f.is_file()]
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:12]
    destination = cache / "converted" / f"{path.resolve().name if path.exists() else path.name}-{digest}"
    if not is_checkpoint(destination):
        from convert import ConversionError, convert  # foreign formats are imported only where one has to be read

        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            convert(path if path.exists() else source, destination, kind=kind, target=target)
        except (ConversionError, CheckpointError):
            if not is_checkpoint(destination):  # else another process has just finished the same conversion
                raise
    return destination
