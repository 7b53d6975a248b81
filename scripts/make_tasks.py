"""Write prompts of many kinds of tasks for a target to answer, beside what it asks itself.

    python scripts/make_tasks.py tasks.jsonl --count 4096 --passages scripts/data/smollm2-selfsynth.jsonl.gz
    python scripts/synthesize.py models/smollm2-135m OUT --prompts tasks.jsonl --documents 4096 --temperatures 0

A target that asks itself (jeagle/training/synthesis.py) asks what it likes best; people ask for more than that. The
kinds are those of instruction sets that people wrote (databricks-dolly-15k's: brainstorming, classification, closed and
open questions, creative writing, extraction, summaries), and sums, puzzles, code and roles. A template has blanks, and
each is filled by chance from the list of its name, so the same seed writes the same file. {passage} is a piece of
another answer of the target: no text of anybody else is needed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from jeagle.training.prompts import read_conversations

TASKS = Path(__file__).with_name("data") / "tasks.toml"
BLANK, NUMBERS = re.compile(r"\{([a-z0-9_-]+)\}"), re.compile(r"(\d+)-(\d+)")
PASSAGE_WORDS = 40, 160  # fewest, most
TRIES = 200  # in a row that gave nothing new, until a kind has run out


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 for an error said in one sentence, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help='JSON lines {"kind": ..., "messages": [...]}')
    parser.add_argument("--count", type=int, required=True, help="how many prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--passages", type=Path, required=True, help='JSON lines {"messages": [...]}: answers to quote')
    parser.add_argument("--tasks", type=Path, default=TASKS, help="templates and lists, TOML")
    args = parser.parse_args(argv)
    try:
        if args.count < 1:
            raise ValueError(f"--count must be at least 1, got {args.count}")
        made = tasks(read_tables(args.tasks), read_passages(args.passages), args.count, args.seed)
        args.out.write_text("".join(json.dumps(task) + "\n" for task in made), encoding="utf-8")
    except RecursionError:
        print(f"error: {args.tasks}: two of [blanks] have each other's blanks; take one of these out", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def tasks(tables: dict[str, Any], passages: list[str], count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` different prompts, the kinds in turns. Raises ValueError where the templates make no more."""
    rng = random.Random(seed)
    kinds: dict[str, list[str]] = tables["templates"]
    blanks = {**tables["blanks"], "passage": passages}
    made: dict[str, str] = {}  # kinds by prompts
    tries = 0
    while len(made) < count:
        kind = list(kinds)[len(made) % len(kinds)]
        text = fill(rng.choice(kinds[kind]), blanks, rng)
        text = text[:1].upper() + text[1:]
        tries = 0 if text not in made else tries + 1
        if tries == TRIES:
            raise ValueError(f"[templates] {kind} makes hardly more than {len(made) // len(kinds)} prompts; add to it")
        made.setdefault(text, kind)
    return [{"kind": kind, "messages": [{"role": "user", "content": text}]} for text, kind in made.items()]


def fill(template: str, blanks: dict[str, list[str]], rng: random.Random) -> str:
    """``template`` with its blanks filled: {name} from the list of that name (no entry twice), {2-9} with a number.

    An entry may have blanks of its own, but a passage is taken as it is. Raises ValueError for a blank that no list
    fills.
    """
    used: set[str] = set()

    def choose(match: re.Match[str]) -> str:
        name = match[1]
        if numbers := NUMBERS.fullmatch(name):
            return str(rng.randint(int(numbers[1]), int(numbers[2])))
        if name not in blanks:
            raise ValueError(f"there is no list for the blank {{{name}}} of {template!r}; add one")
        left = [entry for entry in blanks[name] if entry not in used]
        if not left:
            raise ValueError(f"{template!r} has more blanks {{{name}}} than its list has entries; add some")
        entry = rng.choice(left)
        used.add(entry)
        return entry if name == "passage" else fill(entry, blanks, rng)

    return BLANK.sub(choose, template)


def read_tables(path: Path) -> dict[str, Any]:
    """The tables ``templates`` (lists by kind) and ``blanks`` (lists by name). Raises ValueError."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of TOML or UTF-8
        raise ValueError(f"{path} is not TOML: {error}") from error
    for part in ("templates", "blanks"):
        lists = tables.get(part)
        if not isinstance(lists, dict) or (part == "templates" and not lists):
            raise ValueError(f"{path} has no [{part}], lists of texts by name; add it")
        for name, texts in lists.items():
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{path}: {name} of [{part}] must be a list of texts, at least one")
            for blank in (blank for text in texts for blank in BLANK.findall(text)):
                if blank == name and part == "blanks":
                    raise ValueError(f"{path}: {name} of [blanks] has the blank {{{name}}} itself; take it out")
                if (numbers := NUMBERS.fullmatch(blank)) and int(numbers[1]) > int(numbers[2]):
                    raise ValueError(f"{path}: {name} of [{part}] has {{{blank}}}, of which the first must be the less")
    return tables


def read_passages(path: Path) -> list[str]:
    """The first whole sentences of each answer, where they are of PASSAGE_WORDS and nobody says "I" (many of those
    say only that they cannot help). Raises DataError, or ValueError where none is left."""
    fewest, most = PASSAGE_WORDS
    passages = []
    for said in read_conversations(path):
        passage = ""
        answer = next((message["content"] for message in said if message["role"] == "assistant"), "")
        for sentence in re.split(r"(?<=[.!?])\s+", answer):
            if len(f"{passage} {sentence}".split()) > most:
                break
            passage = f"{passage} {sentence}".strip()
        ends = passage.endswith((".", "!", "?"))
        if ends and len(passage.split()) >= fewest and not re.search(r"\bI\b", passage):
            passages.append(passage)
    if not passages:
        raise ValueError(f"{path}: no answer has {fewest} words in whole sentences; give other answers")
    return passages


if __name__ == "__main__":
    sys.exit(main())
