"""``python -m convert SOURCE DESTINATION``: see ``convert.convert``. Errors are one sentence and exit status 1."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from convert import ConversionError, convert
from jeagle.checkpoint import CheckpointError

__all__ = ["main", "run"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert", description="Convert a Llama model or an EAGLE head into a jeagle checkpoint."
    )
    parser.add_argument("source", metavar="SOURCE", help="a Hugging Face directory, a hub name, or a .gguf file")
    parser.add_argument("destination", metavar="DESTINATION", help="the directory to make; it must not exist")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, fp8 or auto: the source's own (default)")
    parser.add_argument("--kind", choices=("auto", "llama", "eagle"), default="auto")
    parser.add_argument("--target", metavar="CHECKPOINT", help="check an EAGLE head against its target")
    parser.add_argument("--taps", choices=("input", "output"), help="what an EAGLE-3 head's tap ids name in each block")
    args = parser.parse_args(argv)
    return run(
        lambda: convert(
            args.source, args.destination, dtype=args.dtype, kind=args.kind, target=args.target, taps=args.taps
        )
    )


def run(work: Callable[[], Path]) -> int:
    """Exit status of ``work``, its errors said in one line; an interrupt or SIGTERM cleans up like an error."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        print(work())
    except (ConversionError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
