"""The writer: indices into documents, the same index under the same settings into the same one.

A document, as a line of JSON::

    {"index": 0, "token_ids": [...], "response": [[start, stop], ...], "messages": [...],
     "temperature": 0.7, "top_p": 0.95, "seed": 123, "finish": "stop", "key": "..."}

``token_ids`` are what the target saw and wrote, to the id; ``response`` spans are what it wrote in answer, end-of-turn
tokens included. Continued texts have "text" in place of "messages". ``key`` is what repeats are known by. A document
depends on the settings and on those before it alone.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from jeagle.sampling import SamplingParams
from jeagle.text import REFERENCE_DATE, encode
from jeagle.training.documents import DataError
from jeagle.training.overlap import NGrams
from jeagle.training.prompts import around_user_turn, before_next_answer

if TYPE_CHECKING:
    from jeagle.inputs import Message
    from jeagle.llm import LLM
    from jeagle.outputs import CompletionOutput

__all__ = ["Settings", "Writer", "counts"]

SHORTEST_TURN = 8  # characters: less is a greeting at best
KEY_CHARACTERS = 80  # user turns the target wrote are repeats when they begin alike
MOST_DROPPED_IN_A_ROW = 200


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to write.

    documents: how many to keep; fewer where the given prompts run out. shard_size: documents of a shard, which is
    generated as one. seed: every document's own seed comes from it and from the document's index. temperatures: of the
    answers, taken in turns; user turns are sampled at 1. top_p: for both. max_user_tokens, max_answer_tokens: per turn.
    prompt_tokens: how much of a text is given where texts are continued.
    """

    documents: int
    shard_size: int = 1024
    seed: int = 0
    temperatures: Sequence[float] = (0.0, 0.7, 1.0)
    top_p: float = 0.95
    max_user_tokens: int = 200
    max_answer_tokens: int = 400
    prompt_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("documents", "shard_size", "max_user_tokens", "max_answer_tokens", "prompt_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DataError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not self.temperatures:
            raise DataError("temperatures must hold at least one number")
        for temperature in self.temperatures:
            SamplingParams(temperature=temperature, top_p=self.top_p, seed=self.seed)  # says what is wrong


@dataclass
class _Work:
    """A document being written."""

    index: int
    asked: str  # all user turns, or the text to continue: what evaluation prompts are looked for in
    key: str
    token_ids: list[int]
    messages: list[Message] | None = None  # so far; None for a text
    turns: list[str] = field(default_factory=list)  # user turns still to be put
    response: list[list[int]] = field(default_factory=list)
    finish: str = ""


class Writer:
    """Turns indices into documents.

    given: texts (str) to continue or conversations to answer; None: the target asks itself. grams: what a document must
    not share with an evaluation prompt.
    """

    def __init__(self, llm: LLM, settings: Settings, grams: NGrams, given: list[Any] | None, bar: tqdm):
        self._llm, self._settings, self._grams, self._given, self._bar = llm, settings, grams, given, bar
        self._tokens, self._began = 0, time.perf_counter()
        if given is None:
            llm.apply_chat_template([{"role": "user", "content": "Hello"}])  # says so when there is no template
            self._header, after = around_user_turn(llm.tokenizer)
            if not self._header or len(self._header) + settings.max_user_tokens > llm.max_model_len:
                raise DataError(
                    f"the user header has {len(self._header)} tokens and max_user_tokens is {settings.max_user_tokens};"
                    f" there must be a header, and both together must not exceed {llm.max_model_len} positions"
                )
            # What the template puts after a user turn ends it, beside EOS, where that is a special token.
            self._end_ids = [] if llm.tokenizer.decode(after[:1], skip_special_tokens=True) else after[:1]

    def exhausted(self, index: int) -> bool:
        return self._given is not None and index >= len(self._given)

    def shard(self, first: int, wanted: int, seen: set[str]) -> tuple[list[_Work], int, Counter[str]]:
        """Up to ``wanted`` documents from index ``first`` on, the index after the last one used, and what was dropped.

        Adds the documents' keys to ``seen``.
        """
        kept: list[_Work] = []
        dropped: Counter[str] = Counter()
        index, fruitless = first, 0
        while len(kept) < wanted and not self.exhausted(index):
            for work, reason in self._openings(index, wanted - len(kept)):
                if len(kept) == wanted:  # what was drawn beyond that is drawn again for the next shard
                    break
                index += 1
                reason = reason or self._refusal(work, seen)
                if reason:
                    dropped[reason] += 1
                    fruitless += 1
                else:
                    kept.append(work)
                    seen.add(work.key)
                    fruitless = 0
            if self._given is None and fruitless >= MOST_DROPPED_IN_A_ROW:
                raise DataError(
                    f"the last {fruitless} user turns were of no use (dropped in this shard: {counts(dropped)}); "
                    "raise max_user_tokens, or give prompts to a target that writes no questions"
                )
        self._answer(kept)
        return kept, index, dropped

    def record(self, work: _Work) -> dict[str, Any]:
        """The document as a line of a shard."""
        record = dict(index=work.index, token_ids=work.token_ids, response=work.response)
        if work.messages is None:
            record["text"] = self._llm.tokenizer.decode(work.token_ids, skip_special_tokens=True)
        else:
            record["messages"] = work.messages
        params = self._params(work.index)
        record |= dict(temperature=params.temperature, top_p=params.top_p, seed=params.seed)
        return record | dict(finish=work.finish, key=work.key)

    def _openings(self, first: int, count: int) -> list[tuple[_Work, str]]:
        """Documents up to where the target answers, and a reason to drop them where their turn itself gives one."""
        if self._given is not None:
            return [(self._open(first + i, said), "") for i, said in enumerate(self._given[first : first + count])]
        batch = self._llm.max_batch_size  # whole batches only: others would compile programs of their own
        indices = range(first, first - (-count // batch) * batch)
        params = [
            replace(
                self._params(index),
                temperature=1.0,
                max_tokens=self._settings.max_user_tokens,
                stop_token_ids=self._end_ids,
            )
            for index in indices
        ]
        openings = []
        for index, said in zip(indices, self._generate([self._header] * len(indices), params)):
            turn = said.text.strip()
            cut, short = said.finish_reason == "length", len(turn) < SHORTEST_TURN
            work = self._open(index, [{"role": "user", "content": turn}])
            openings.append((work, "cut" if cut else "empty" if not turn else "short" if short else ""))
        return openings

    def _open(self, index: int, said: str | list[Message]) -> _Work:
        """The document of a text to continue, or of a conversation, before the target has said anything."""
        if isinstance(said, str):
            ids = encode(self._llm.tokenizer, said)[: self._settings.prompt_tokens]
            asked = self._llm.tokenizer.decode(ids, skip_special_tokens=True)
            return _Work(index, asked, _key(asked), ids)
        system = [message for message in said if message["role"] == "system"]
        turns = [message["content"] for message in said if message["role"] == "user"]
        asked = "\n".join(turns)
        messages = [*system, {"role": "user", "content": turns.pop(0)}]
        # A turn the target wrote repeats an earlier one when both begin alike; given prompts may share a preamble.
        whole = "\n".join([*(message["content"] for message in system), asked])
        key = _key(asked, KEY_CHARACTERS) if self._given is None else _key(whole)
        return _Work(index, asked, key, self._llm.apply_chat_template(messages, today=REFERENCE_DATE), messages, turns)

    def _refusal(self, work: _Work, seen: set[str]) -> str:
        if not work.asked.strip():
            return "empty"
        if not self._has_room(work.token_ids):
            return "long"
        if work.key in seen:
            return "duplicate"
        return "overlap" if self._grams.shared(work.asked) else ""

    def _has_room(self, ids: list[int]) -> bool:
        return len(ids) + self._settings.max_answer_tokens <= self._llm.max_model_len

    def _answer(self, works: list[_Work]) -> None:
        """All documents' first answers, then their second ones, ... A cut answer ends its conversation."""
        while works:
            params = [self._params(work.index) for work in works]
            going_on = []
            for work, said in zip(works, self._generate([work.token_ids for work in works], params)):
                start = len(work.token_ids)
                work.token_ids = [*work.token_ids, *said.token_ids]
                work.response.append([start, len(work.token_ids)])
                work.finish = said.finish_reason
                if work.messages is not None:
                    work.messages.append({"role": "assistant", "content": said.text})
                if work.finish == "stop" and self._ask_next(work):
                    going_on.append(work)
                else:
                    self._bar.update()
            works = going_on

    def _ask_next(self, work: _Work) -> bool:
        """Put the next user turn, if there is one and room for it.

        The ids stay as they were written and the template's text is appended: encoded anew, an answer may differ.
        """
        if work.messages is None or not work.turns:
            return False
        ask: Message = {"role": "user", "content": work.turns.pop(0)}
        ids = before_next_answer(self._llm.tokenizer, work.messages, ask, last=work.token_ids[-1])
        if not self._has_room([*work.token_ids, *ids]):
            return False
        work.token_ids = [*work.token_ids, *ids]
        work.messages.append(ask)
        return True

    def _generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[CompletionOutput]:
        outputs = [out.outputs[0] for out in self._llm.generate(prompts, params, use_tqdm=not self._bar.disable)]
        self._tokens += sum(len(output.token_ids) for output in outputs)
        self._bar.set_postfix_str(f"{self._tokens / (time.perf_counter() - self._began):.1f} tok/s")
        return outputs

    def _params(self, index: int) -> SamplingParams:
        """How document ``index`` is answered. Seeds have 53 bits, which every reader of JSON keeps."""
        s = self._settings
        (seed,) = np.random.SeedSequence(s.seed, spawn_key=(index,)).generate_state(1, np.uint64) >> 11
        temperature = s.temperatures[index % len(s.temperatures)]
        return SamplingParams(max_tokens=s.max_answer_tokens, temperature=temperature, top_p=s.top_p, seed=int(seed))


def _key(asked: str, size: int | None = None) -> str:
    normal = " ".join(asked.casefold().split())[:size]
    return hashlib.blake2b(normal.encode(), digest_size=8).hexdigest()


def counts(dropped: Counter[str]) -> str:
    """What was dropped, in words."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items())) or "it is empty"
