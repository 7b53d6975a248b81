"""Let a target write its own training text: shards of token ids and a manifest, resumable.

    python scripts/synthesize.py models/smollm2-135m OUT --documents 10000 --exclude scripts/prompts/*.jsonl
    python scripts/synthesize.py MODEL OUT --prompts questions.jsonl        answers to given prompts
    python scripts/synthesize.py MODEL OUT --continue texts.jsonl           texts continued

Run again after an interruption, the same command goes on where it stopped. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from common import add_mesh, mesh

from jeagle import LLM
from jeagle.host import described
from jeagle.training.synthesis import Settings, synthesize


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 for an error said in one sentence, 2 for wrong usage, 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        settings = Settings(  # wrong settings are said before a model is loaded
            documents=args.documents,
            shard_size=args.shard_size,
            seed=args.seed,
            temperatures=args.temperatures,
            top_p=args.top_p,
            max_user_tokens=args.max_user_tokens,
            max_answer_tokens=args.max_answer_tokens,
            prompt_tokens=args.prompt_tokens,
        )
        llm = LLM(args.model, args.draft, dtype=args.dtype, max_batch_size=args.batch, **mesh(args))
        print(f"{args.tensor_parallel_size * args.data_parallel_size} of: {described()}", file=sys.stderr)
        manifest = synthesize(
            llm,
            args.out,
            settings,
            prompts=args.prompts,
            texts=args.texts,
            exclude=args.exclude,
            head=args.draft,
        )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on after the last complete shard", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({name: manifest[name] for name in ("documents", "tokens", "response_tokens", "dropped")}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="the target: converted checkpoint, HF directory, hub name or .gguf")
    parser.add_argument("out", type=Path, help="directory of the shards and the manifest")
    parser.add_argument("--documents", type=int, required=True, help="how many to keep")
    parser.add_argument("--shard-size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32, help="rows generated side by side")
    parser.add_argument("--max-user-tokens", type=int, default=200)
    parser.add_argument("--max-answer-tokens", type=int, default=400)
    parser.add_argument(
        "--prompt-tokens", type=int, default=64, help="with --continue: tokens of a text that are given"
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0], help="of answers, in turns")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exclude", type=Path, nargs="+", default=[], help="evaluation questions, EAGLE's format")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompts", type=Path, help='JSON lines {"messages": [...]} or {"turns": [...]} to answer')
    source.add_argument("--continue", type=Path, dest="texts", help='JSON lines {"text": ...} to continue')
    parser.add_argument("--draft", help="an EAGLE head")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    add_mesh(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
