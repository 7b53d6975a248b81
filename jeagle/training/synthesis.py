"""The target writes its own training text: questions and answers, answers to given prompts, or texts continued.

Without prompts it asks itself, the Magpie way (arXiv:2406.08464): after the chat template's empty user header a chat
model writes a user turn, which then goes through the template like any other. A head makes it faster, not different.

Written are the lines of ``writer.py`` into the shards of ``shards.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from jeagle.training.documents import DataError
from jeagle.training.overlap import NGrams, read_evaluation_prompts
from jeagle.training.prompts import read_conversations, read_texts
from jeagle.training.shards import hashes, open_shards
from jeagle.training.writer import Settings, Writer, counts
from jeagle.tree import tree_name

if TYPE_CHECKING:
    from jeagle.llm import LLM

__all__ = ["FORMAT_VERSION", "Settings", "synthesize"]

FORMAT_VERSION = 1
NGRAM = 8  # words in common with an evaluation prompt that drop a document


def synthesize(
    llm: LLM,
    out: str | Path,
    settings: Settings,
    *,
    prompts: str | Path | None = None,
    texts: str | Path | None = None,
    exclude: Sequence[str | Path] = (),
    head: str | Path | None = None,
    use_tqdm: bool = True,
) -> dict[str, Any]:
    """Write, or finish, the shards and the manifest in ``out``; returns the manifest.

    Args:
      prompts: JSON lines to answer, {"messages": [...]} (answers in there are left out and given anew) or EAGLE's
        questions {"turns": [...]}. texts: JSON lines {"text": ...} to continue. Neither: the target asks itself.
      exclude: evaluation questions, in EAGLE's format; documents whose user turns share 8 words in a row with one, or
        all of a shorter one, are dropped. Answers are not looked at: nobody gave the target the question.
      head: the name of ``llm``'s head, for the manifest.

    In float32 the documents do not depend on the head, the tree or the batch size; in bfloat16 they may (README, "The
    guarantee, and its limits"), so a run is taken up again only with the same ones.

    Raises DataError in one sentence: files that cannot be read or written, a directory made with other settings.
    """
    if prompts is not None and texts is not None:
        raise DataError("give prompts to answer or texts to continue, not both")
    out, source = Path(out), prompts or texts
    grams = NGrams((turn for path in exclude for turn in read_evaluation_prompts(path)), NGRAM)
    given: list[Any] | None = None
    if source is not None:
        given = (read_conversations if texts is None else read_texts)(Path(source))
    about = {
        "format_version": FORMAT_VERSION,
        **_engine(llm, head),
        "source": {
            "kind": "texts" if texts else "prompts" if prompts else "self",
            "files": hashes([source] if source else []),
        },
        "settings": asdict(settings),
        "exclude": {"ngram": NGRAM, "files": hashes(exclude)},
    }
    with open_shards(out, about) as shards:
        seen = {record["key"] for record in shards.records()}
        with tqdm(
            total=settings.documents,
            initial=shards.documents,
            desc="synthesize",
            unit="doc",
            disable=None if use_tqdm else True,
        ) as bar:
            writer = Writer(llm, settings, grams, given, bar)
            while shards.documents < settings.documents and not writer.exhausted(shards.next_index):
                wanted = min(settings.shard_size, settings.documents - shards.documents)
                works, next_index, dropped = writer.shard(shards.next_index, wanted, seen)
                if not works and not shards.documents:
                    raise DataError(f"{source}: no line is of use ({counts(dropped)}); give other prompts")
                shards.add([writer.record(work) for work in works], next_index=next_index, dropped=dropped)
        return shards.manifest


def _engine(llm: LLM, head: str | Path | None) -> dict[str, Any]:
    """All about the generator that its texts may depend on. source.json holds the hashes of the weights' own files."""
    if llm.checkpoint is None:
        raise DataError("a target given as a module has no files to know it by; give its checkpoint")
    directory = llm.checkpoint.resolve()
    files = sorted(path for path in directory.iterdir() if path.suffix in (".json", ".jinja", ".model"))
    return {
        "target": {"name": directory.name, "files": hashes(files)},
        "head": None if head is None else Path(head).name,
        "engine": {
            "dtype": np.dtype(llm.dtype).name,
            "tree": tree_name(llm.plan),
            "max_batch_size": llm.max_batch_size,
            "max_model_len": llm.max_model_len,
        },
    }
