"""What the measuring scripts share: where a number was measured, the questions asked, fair timing, the result file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measuring import compiled_before
from tqdm import tqdm

from jeagle import LLM, RequestMetrics, RequestOutput, SamplingParams
from jeagle.host import described
from jeagle.inputs import Message
from jeagle.results import summed
from jeagle.text import REFERENCE_DATE

__all__ = [
    "Question",
    "add_mesh",
    "chat",
    "chat_in_pairs",
    "environment",
    "exit_code",
    "load_questions",
    "mesh",
    "pooled",
    "spread",
    "tokens_per_second",
    "write_result",
]


def environment() -> dict[str, Any]:
    """command, device ("kind (processor, cores)"), jax (version), versions (of what else matters), commit, load_average
    (processes, over the last minute).

    commit is the abbreviated hash, with "-dirty" where tracked files had changed; None outside a git checkout. Ask at
    the start of a run: later the load average counts the run itself.
    """
    return dict(
        command=shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        device=described(),
        jax=jax.__version__,
        versions=dict(python=platform.python_version()) | {name: version(name) for name in ("jaxlib", "flax", "numpy")},
        commit=_commit(),
        load_average=os.getloadavg()[0],
    )


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """The options that ``mesh`` reads."""
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="devices that share a layer")
    parser.add_argument("--data-parallel-size", type=int, default=1, metavar="N", help="groups of them, sharing rows")


def mesh(args: argparse.Namespace) -> dict[str, Any]:
    """Over how many devices an ``LLM`` is laid out, in its own words, for it and for the result."""
    return {name: getattr(args, name) for name in ("tensor_parallel_size", "data_parallel_size")}


@dataclass(frozen=True)
class Question:
    """What a user says, turn by turn; the answers are the model's."""

    line: int  # its place in the file, from 1
    question_id: int | str
    category: str
    turns: tuple[str, ...]  # at least one
    system: str | None = None

    @property
    def opening(self) -> list[dict[str, str]]:
        """The conversation up to the first answer."""
        system = [] if self.system is None else [dict(role="system", content=self.system)]
        return [*system, dict(role="user", content=self.turns[0])]


def load_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The questions of a JSON-lines file, at least one; with a limit so many of them, spread evenly over the file, as
    files are sorted by category. Example: 3 of 10 are those at 0, 3 and 6.

    A line is in EAGLE's and MT-bench's form, {"question_id": 81, "category": "writing", "turns": ["...", "..."]}, to
    which {"system": "..."} may be added, or a conversation, {"messages": [{"role": ..., "content": ...}, ...]} or
    ShareGPT's {"conversations": [{"from": "human", "value": ...}, ...]}, of which the system message and the user's
    turns are taken: the assistant's words are for the model to find. Without a category the file's name is the
    category, without an id the line's number. Raises ValueError with one sentence.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"the limit must be at least 1 question, got {limit}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also split at U+2028 within a text
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    questions = [_question(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise ValueError(f"{path} holds no questions")
    count = min(limit or len(questions), len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def _question(line: str, path: Path, number: int) -> Question:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    turns: Any = None
    system = None
    if isinstance(entry, dict):
        turns, system = entry.get("turns"), entry.get("system")
        messages = entry.get("messages", _from_sharegpt(entry.get("conversations")))
        if turns is None and isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
            turns = [m.get("content") for m in messages if m.get("role") == "user"]
            system = next((m.get("content") for m in messages if m.get("role") == "system"), None)
    said = [*turns, *([] if system is None else [system])] if isinstance(turns, list) and turns else [None]
    if not all(isinstance(text, str) for text in said):
        raise ValueError(
            f'{path}, line {number} needs "turns", a list of texts, "messages", a list of roles and contents with at '
            'least one user\'s, or "conversations", a list of "from" and "value" with at least one human\'s'
        )
    category = str(entry.get("category", path.stem))
    return Question(number, entry.get("question_id", number), category, tuple(turns), system)


def _from_sharegpt(said: Any) -> Any:
    """Messages of a ShareGPT conversation; anything else is None."""
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        return None
    roles = {"human": "user", "user": "user", "system": "system"}
    return [dict(role=roles.get(turn.get("from", ""), "assistant"), content=turn.get("value")) for turn in said]


def pooled(metrics: Sequence[RequestMetrics]) -> RequestMetrics:
    """Several answers' counts as one, so that every ratio is one of totals. Times are left out: rows share batches."""
    rounds_by_tree: Counter[str] = Counter()
    for m in metrics:
        rounds_by_tree.update(m.rounds_by_tree)
    return RequestMetrics(
        num_rounds=sum(m.num_rounds for m in metrics),
        num_emitted=sum(m.num_emitted for m in metrics),
        acceptance_histogram=summed([m.acceptance_histogram for m in metrics]),
        lookup_histogram=summed([m.lookup_histogram for m in metrics]),
        prefill_seconds=0.0,
        decode_seconds=0.0,
        tree=metrics[0].tree,
        rounds_by_tree=dict(rounds_by_tree),
        synthetic_acceptance=metrics[0].synthetic_acceptance,
    )


def chat(
    llm: LLM,
    conversations: Sequence[Sequence[Message]],
    params: SamplingParams | Sequence[SamplingParams],
    **options: Any,
) -> list[RequestOutput]:
    """``llm.chat`` on a day that stays the same: measured again, a target is asked the same."""
    prompts = [llm.apply_chat_template(messages, today=REFERENCE_DATE) for messages in conversations]
    return llm.generate(prompts, params, **options)


def chat_in_pairs(
    llm: LLM, conversations: Sequence[Sequence[Message]], params: Sequence[SamplingParams]
) -> tuple[list[RequestOutput], list[RequestOutput]]:
    """Plain and speculative answers at batch 1, in turns: plain, speculative, plain, speculative, ...

    So a machine that slows down slows both alike. A run that had to compile is made again, and only the second counts.
    """
    answers: tuple[list[RequestOutput], list[RequestOutput]] = ([], [])
    for messages, p in zip(tqdm(conversations, desc="in pairs", disable=None), params, strict=True):
        for speculative in (False, True):
            run = partial(chat, llm, [messages], p, speculative=speculative, use_tqdm=False)
            answers[speculative].extend(compiled_before(llm, run))
    return answers


def tokens_per_second(outputs: Sequence[RequestOutput], *, prefill: bool = True) -> float:
    """All tokens over all seconds of requests served one at a time; with or without the prompts' prefill."""
    seconds = sum(o.metrics.decode_seconds + o.metrics.prefill_seconds * prefill for o in outputs)
    return sum(o.metrics.num_emitted for o in outputs) / seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes, as JSON wants them."""
    names = ("min", "quartile_1", "median", "quartile_3", "max")
    return dict(zip(names, np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist(), strict=True))


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """``result`` as indented JSON."""
    Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def exit_code(
    measure: Callable[[], dict[str, Any]],
    show: Callable[[dict[str, Any]], None] = lambda result: None,
    out: str | Path | None = None,
) -> int:
    """Measure, show, write, and print the JSON as the last line: 0, or 1 for an error said in one sentence, or 130 for
    Ctrl-C."""
    try:
        result = measure()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    show(result)
    if out:
        write_result(out, result)
    print(json.dumps(result))
    return 0
