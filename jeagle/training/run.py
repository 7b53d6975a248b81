"""From a recipe to a trainer that is ready to run: target, tokenizer, documents, vocabulary and head put together."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jeagle.checkpoint import load_eagle, load_llama
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.distributed import explained
from jeagle.eagle import EagleHead, check_pair
from jeagle.host import take_memory
from jeagle.llama import Llama
from jeagle.llama4_config import Llama4Config
from jeagle.locate import cache_directory, check_vocabulary, locate
from jeagle.text import Tokenizer, load_tokenizer, vocabulary_hash
from jeagle.training.copying import graft_copying
from jeagle.training.documents import DataError, Document, fingerprint, read_documents
from jeagle.training.initial import new_head, with_more_tokens, with_wider_mlp
from jeagle.training.packing import Rows, pack
from jeagle.training.prompts import end_of_turn
from jeagle.training.recipe import Recipe, RecipeError
from jeagle.training.shards import hashes, shard_files
from jeagle.training.trainer import SMALLER_STEPS, Trainer
from jeagle.training.vocabulary import choose_vocabulary, coverage

__all__ = ["Run", "check_form", "check_length", "load_documents", "prepare", "starting_head"]

COPYING_ROWS = 32  # rows of text that heads which copy are fitted to


class Run(NamedTuple):
    trainer: Trainer
    source: dict[str, Any]  # where the finished head comes from, for its source.json
    summary: str  # one line for the user


@explained(SMALLER_STEPS)
def prepare(
    recipe: Recipe,
    directory: str | Path,
    *,
    devices: list[jax.Device] | None = None,
    on_report: Callable[[dict[str, Any]], None] = lambda line: None,
) -> Run:
    """Load what the recipe names, check that it fits together, and resume ``directory`` if it holds this run.

    Raises RecipeError, DataError, CheckpointError, ConversionError, DeviceMemoryError or TrainingError, each in one
    sentence.
    """
    take_memory()
    target_dir = locate(recipe.target, cache_directory(), kind="llama")
    target = load_llama(target_dir, dtype=recipe.run.dtype)
    check_length(recipe, target.config)
    tokenizer = load_tokenizer(target_dir)
    learnt, measured = load_documents(recipe, target.config, tokenizer)
    options: Any = dict(long_documents=recipe.data.long_documents)
    rows = pack(learnt, recipe.data.pack_length, **options)
    held_out = _by_temperature(measured, recipe.data.pack_length, options) if measured else {}
    head = starting_head(recipe, target, learnt, rows)

    vocabulary = vocabulary_hash(target_dir)
    identity = {
        "documents": fingerprint([*learnt, *measured], temperatures=recipe.objective.own_temperature),
        "vocabulary": vocabulary,
        "draft_vocabulary": _digest(head),
        # Of the weights, a converted target's source.json has the hashes of the files they are from.
        "target": hashes([target_dir / "config.json", target_dir / "source.json"]),
    }
    trainer = Trainer(
        recipe, directory, target, head, rows, held_out, identity=identity, devices=devices, on_report=on_report
    )
    source = {"source": f"trained by jeagle for {recipe.target}", "target_vocabulary": vocabulary}
    tokens = int((rows.segment_BT > 0).sum())
    filled = float((rows.segment_BT > 0).mean())
    inside = 1.0 if head.draft_to_target is None else _covered(head, learnt, target.config.vocab_size)
    weights = sum(x.size for x in jax.tree.leaves(trainer.state.params))
    summary = (
        f"{len(learnt)} documents, {tokens} tokens, {len(rows.token_BT)} rows of {recipe.data.pack_length} "
        f"({filled:.0%} filled); {len(measured)} documents held out; {weights / 1e6:.1f}M weights, draft vocabulary "
        f"{head.config.draft_vocab_size} ({inside:.1%} of the answers' tokens)"
    )
    if long := sum(len(document) > recipe.data.pack_length for document in learnt):
        done = {"cut": "cut there", "drop": "left out"}[recipe.data.long_documents]
        summary += f"; longer than {recipe.data.pack_length} tokens and {done}: {long} documents"
    if rewritten := sum(document.rewritten for document in [*learnt, *measured]):
        summary += f"; answers cut or left out, as the chat template writes them otherwise in later turns: {rewritten}"
    return Run(trainer, source, summary)


def check_length(recipe: Recipe, target: LlamaConfig) -> None:
    """Raises RecipeError where a document could be longer than the target reads, or cross a border of its attention
    chunks: a row of training sees all of its document."""
    if recipe.data.pack_length > target.max_position:
        raise RecipeError(
            f"data.pack_length is {recipe.data.pack_length}, but {recipe.target} has {target.max_position} positions; "
            "choose at most as many"
        )
    chunk = target.attention_chunk if isinstance(target, Llama4Config) else None
    if chunk is not None and recipe.data.pack_length > chunk:
        raise RecipeError(
            f"data.pack_length is {recipe.data.pack_length}, but {recipe.target} attends in chunks of {chunk} "
            f"positions; choose at most {chunk}"
        )


def load_documents(recipe: Recipe, target: LlamaConfig, tokenizer: Tokenizer) -> tuple[list[Document], list[Document]]:
    """The recipe's documents, (learnt, only measured). Raises DataError.

    Measured is a random choice from the first file or directory, the same whatever the seed and the files after it: a
    run that goes on from another's head, with more text, has not learnt what it measures.
    """
    if not target.eos_token_ids:
        raise DataError(f"{recipe.target} names no eos_token_ids, so no answer can end; convert it again")
    ids = dict(vocab_size=target.vocab_size, end_of_turn=end_of_turn(tokenizer, target.eos_token_ids))
    first, *others = (read_documents(shard_files(Path(file)), tokenizer, **ids) for file in recipe.data.files)
    number = recipe.data.held_out
    if number >= len(first):
        raise DataError(
            f"data.held_out is {number}, but {recipe.data.files[0]} has only {len(first)} documents; lower it or give "
            "more data"
        )
    chosen = set(np.random.default_rng(0).choice(len(first), number, replace=False).tolist())
    measured = [d for i, d in enumerate(first) if i in chosen]
    return [d for i, d in enumerate(first) if i not in chosen] + [d for each in others for d in each], measured


def starting_head(recipe: Recipe, target: Llama, documents: list[Document], rows: Rows) -> EagleHead:
    """What training begins with, float32: a new head, or the one to go on from; with heads that copy, if the recipe
    wants some.

    Raises RecipeError where the recipe does not fit the head to go on from, and what locating and loading that raise.
    """
    if recipe.head.start in ("target", "random"):
        head = _new(recipe, target, documents, Rows(*(x[:2] for x in rows)))
    else:
        head = _gone_on_from(recipe, target, documents)
    if recipe.head.copy_heads:
        few = slice(None, None, -(-len(rows.token_BT) // COPYING_ROWS))
        try:
            graft_copying(head, target, Rows(*(x[few] for x in rows)), recipe.head.copy_heads)
        except ValueError as error:
            raise RecipeError(f"head.copy_heads: {error}") from error
    return head


def _gone_on_from(recipe: Recipe, target: Llama, documents: list[Document]) -> EagleHead:
    cache = cache_directory()
    target_dir = locate(recipe.target, cache, kind="llama")
    directory = locate(recipe.head.start, cache, kind="eagle", target=target_dir)
    check_vocabulary(directory, target_dir)
    head = load_eagle(directory, dtype="float32")
    check_pair(target, head)
    check_form(recipe, head.config)
    wanted = recipe.head.draft_vocab_size
    if wanted is not None and wanted > head.config.draft_vocab_size:
        assert head.draft_to_target is not None
        known = np.asarray(head.draft_to_target[...]).tolist()
        ids = choose_vocabulary(documents, vocab_size=target.config.vocab_size, size=wanted, always=known)
        head = with_more_tokens(head, target, ids)
    width = recipe.head.mlp_width
    return head if width in (None, head.config.mlp_width) else with_wider_mlp(head, width, seed=recipe.run.seed)


def check_form(recipe: Recipe, has: EagleConfig) -> None:
    """Raises RecipeError where the recipe states a form that the head to go on from neither has nor can grow to."""
    kind = "eagle3" if has.fusion == "attention" else "meta" if has.first_block_norm else "eagle1"
    most = {"mlp_width": math.inf, "draft_vocab_size": has.vocab_size}  # of what may grow
    mend = {
        "kind": "state that",
        "mlp_width": "give as many or more, or leave the field out",
        "draft_vocab_size": f"give as many to {has.vocab_size}, or leave the field out",
    }
    for name, wanted in {"kind": recipe.head.kind, **recipe.head.stated()}.items():
        had = kind if name == "kind" else getattr(has, name)
        if wanted != had and not (name in most and had < wanted <= most[name]):
            raise RecipeError(
                f"head.{name} is {wanted!r}, but {recipe.head.start} has {had!r}; "
                f"{mend.get(name, 'leave the field out')} to go on from that head"
            )


def _new(recipe: Recipe, target: Llama, documents: list[Document], sample: Rows) -> EagleHead:
    """A new head of the recipe's form. ``sample``: a few rows to measure the target's residual stream on."""
    config = recipe.head.config(target.config)
    ids = None
    if config.reduced_vocabulary:
        chosen = choose_vocabulary(
            documents, vocab_size=config.vocab_size, size=config.draft_vocab_size, always=target.config.eos_token_ids
        )
        ids = jnp.asarray(chosen)
    copied = recipe.head.start == "target"
    return new_head(config, target, ids, seed=recipe.run.seed, sample=sample if copied else None)


def _digest(head: EagleHead) -> str | None:
    """Of its draft ids, which come from where it started, not from a run's checkpoints."""
    if head.draft_to_target is None:
        return None
    return hashlib.sha256(np.asarray(head.draft_to_target[...], "<i4").tobytes()).hexdigest()


def _covered(head: EagleHead, documents: list[Document], vocab_size: int) -> float:
    assert head.draft_to_target is not None
    return coverage(documents, np.asarray(head.draft_to_target[...]), vocab_size=vocab_size)


def _by_temperature(documents: list[Document], length: int, options: dict[str, Any]) -> dict[str, Rows]:
    """Rows of the documents of each temperature that ``pack`` keeps one of. Raises what it raises of all of them."""
    pack(documents, length, **options)
    groups: dict[str, list[Document]] = {}
    for document in documents:
        name = "unknown" if document.temperature is None else f"{document.temperature:g}"
        groups.setdefault(name, []).append(document)
    rows = {}
    for name in sorted(groups):
        with contextlib.suppress(DataError):
            rows[name] = pack(groups[name], length, **options)
    return rows
