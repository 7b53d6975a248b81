"""From what a user names as a model to a converted checkpoint on disk, converting once where that is needed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from jeagle import heads
from jeagle.checkpoint import CheckpointError, is_checkpoint, read_source
from jeagle.text import vocabulary_hash

__all__ = ["cache_directory", "check_vocabulary", "locate"]


def cache_directory(given: str | Path | None = None) -> Path:
    """Where conversions and compiled programs are kept: as given, else $JEAGLE_CACHE or ~/.cache/jeagle."""
    return Path(given or os.environ.get("JEAGLE_CACHE") or "~/.cache/jeagle").expanduser()


def check_vocabulary(head: Path, target: Path | None) -> None:
    """Refuse a head that was trained with other token ids: it would run, and never guess right."""
    trained_with = read_source(head).get("target_vocabulary")
    has = None if target is None else vocabulary_hash(target)
    if trained_with and has and trained_with != has:
        raise ValueError(
            f"the head {head} was trained with another tokenizer than that of {target}; train one for this target"
        )


def locate(source: str | Path, cache: Path, *, kind: str, target: Path | None = None, dtype: str = "auto") -> Path:
    """The converted checkpoint for ``source``: itself if it is one, a head that comes with the package by its name,
    else its conversion under ``cache``/converted.

    A local source is recognised again by path, sizes and times of its files, so an edited checkpoint is converted anew;
    a hub name by its name. dtype: what to convert to. Raises what ``convert.convert`` raises.
    """
    path = Path(source).expanduser()
    if path.is_dir() and is_checkpoint(path):
        return path
    if kind == "eagle" and not path.exists() and (bundled := heads.find(str(source))):
        return bundled
    identity = [str(source), str(target)]
    if path.exists():
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        identity = [str(path.resolve()), str(target)]
        identity += [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files if f.is_file()]
    if dtype != "auto":
        identity.append(dtype)
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:12]
    destination = cache / "converted" / f"{path.resolve().name if path.exists() else path.name}-{digest}"
    if not is_checkpoint(destination):
        from convert import ConversionError, convert  # foreign formats are imported only where one has to be read

        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            convert(path if path.exists() else source, destination, kind=kind, target=target, dtype=dtype)
        except (ConversionError, CheckpointError):
            if not is_checkpoint(destination):  # else another process has just finished the same conversion
                raise
    return destination
