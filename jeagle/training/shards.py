"""A directory of JSON lines in shards, written by one process at a time and resumable after a kill at any moment.

::

    manifest.json           what the lines depend on ("about"), totals, and per shard its hash and counts
    shard-00000.jsonl.gz    so many lines

A shard appears whole, by a rename, and only then in the manifest. A run that was killed goes on with the first shard
that the manifest does not list or that is missing; where the lines depend on what ``about`` says and on the shards
before them alone, it ends with the files, byte for byte, of a run that was not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jeagle.training.documents import DataError, read_json_lines

__all__ = ["MANIFEST", "Shards", "alone_in", "hashes", "open_shards", "shard_files"]

MANIFEST = "manifest.json"
TOTALS = ("documents", "tokens", "response_tokens")
HOW_MANY = "settings.documents"  # the one setting that no document depends on


class Shards:
    """The shards of a directory that ``open_shards`` has locked."""

    def __init__(self, directory: Path, about: dict[str, Any]):
        self._directory, self._about = directory, about
        self._listed = self._resume()

    def __len__(self) -> int:
        return len(self._listed)

    @property
    def documents(self) -> int:
        """Lines so far."""
        return sum(shard["documents"] for shard in self._listed)

    @property
    def next_index(self) -> int:
        """Where the next shard begins: the last one's ``next_index``."""
        return self._listed[-1]["next_index"] if self._listed else 0

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads(self._manifest())

    def records(self) -> Iterator[dict[str, Any]]:
        """All lines so far."""
        for shard in self._listed:
            for _, record in read_json_lines(self._directory / shard["file"]):
                yield record

    def add(self, records: Sequence[dict[str, Any]], *, next_index: int, dropped: Counter[str]) -> None:
        """Write a shard of documents, and the manifest with it.

        next_index: the index after the last one used. dropped: how many indices gave no document, by reason.
        """
        kept = len(self)
        path = self._directory / f"shard-{kept:05d}.jsonl.gz"
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        data = gzip.compress(lines.encode(), mtime=0)
        _write(path, data, kept=kept)
        self._listed.append(
            dict(
                file=path.name,
                sha256=hashlib.sha256(data).hexdigest(),
                documents=len(records),
                tokens=sum(len(record["token_ids"]) for record in records),
                response_tokens=sum(stop - start for record in records for start, stop in record["response"]),
                first_index=self.next_index,
                next_index=next_index,
                dropped=dict(sorted(dropped.items())),
            )
        )
        _write(self._directory / MANIFEST, self._manifest(), kept=kept)

    def _manifest(self) -> bytes:
        dropped = sum((Counter(shard["dropped"]) for shard in self._listed), Counter())
        totals = {name: sum(shard[name] for shard in self._listed) for name in TOTALS}
        manifest = {**self._about, **totals, "dropped": dict(sorted(dropped.items())), "shards": self._listed}
        return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()

    def _resume(self) -> list[dict[str, Any]]:
        """The manifest's shards, up to the first one that is missing."""
        out, path = self._directory, self._directory / MANIFEST
        if not path.exists():
            if any(out.glob("shard-*.jsonl.gz")):
                raise DataError(f"{out} holds shards but no {MANIFEST}; choose another directory")
            self._listed = []
            _write(path, self._manifest(), kept=0)
            return []
        try:
            manifest = json.loads(path.read_bytes())
            shards, then = manifest["shards"], _flat({name: manifest.get(name) for name in self._about})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} cannot be read ({error}); remove {out} and start again") from error
        now = _flat(self._about)
        for name in [*now, *then]:
            if now.get(name) != then.get(name) and name != HOW_MANY:
                raise DataError(
                    f"{out} was made with {name} = {then.get(name)!r}, not {now.get(name)!r}; "
                    "use the same settings or another directory"
                )
        for i, shard in enumerate(shards):
            file = out / shard["file"]
            if not file.exists():
                return shards[:i]
            if hashlib.sha256(file.read_bytes()).hexdigest() != shard["sha256"]:
                raise DataError(
                    f"{file} is not what {MANIFEST} says; remove it, and it is made again with all after it"
                )
        return shards


@contextlib.contextmanager
def open_shards(directory: Path, about: dict[str, Any]) -> Iterator[Shards]:
    """The shards of ``directory``, made where there is none, to be added to by nobody else meanwhile.

    about: all that the lines depend on, as JSON has it; a directory made with anything else is refused, except that
    ``HOW_MANY`` may differ. Raises DataError in one sentence.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the directory {directory} ({error.strerror}); choose another one") from error
    with alone_in(directory, DataError):
        yield Shards(directory, about)


@contextlib.contextmanager
def alone_in(directory: Path, refusal: type[Exception]) -> Iterator[None]:
    """Hold the lock of a directory; ``refusal``, in one sentence, where another process has it. It goes with the
    process, however that ends."""
    try:
        lock = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise refusal(f"cannot open the directory {directory} ({error.strerror}); choose another one") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise refusal(f"another process is writing {directory}; wait for it or choose another directory") from error
        yield
    finally:
        os.close(lock)


def hashes(files: Sequence[str | Path]) -> list[dict[str, str]]:
    """Names and SHA-256 of files, for ``about``."""
    return [{"file": p.name, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in map(Path, files)]


def shard_files(path: Path) -> list[Path]:
    """A directory's shards in the order of its manifest; a file itself. Raises DataError."""
    if not path.is_dir():
        return [path]
    manifest = path / MANIFEST
    try:
        names = [shard["file"] for shard in json.loads(manifest.read_bytes())["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} is a directory whose {MANIFEST} cannot be read ({reason}); give files") from error
    if not names:
        raise DataError(f"{path} has no complete shard yet; let synthesize.py write one")
    return [path / name for name in names]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves by dotted path."""
    if not isinstance(value, (dict, list, tuple)):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, inner in items for k, v in _flat(inner, f"{name}.{key}".lstrip(".")).items()}


def _write(path: Path, data: bytes, *, kept: int) -> None:
    """The file is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        full = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your disk quota is used up"}
        raise DataError(
            f"cannot write {path}: {full.get(error.errno or 0, error.strerror)}; {kept} complete shards are kept, mend "
            "that and run the same command again"
        ) from error
