"""Requests on the host: checked before anything runs, then queued for batches of a few compiled shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from jeagle.decoder import Batch
from jeagle.sampling import Filters, RowSampling, SamplingParams, drawn_seed, seed_keys
from pallas_kernels.plan import power_of_two

__all__ = [
    "FULL_FORWARD",
    "Bucket",
    "Row",
    "bucket",
    "check_prompt",
    "chunk_sizes",
    "make_batch",
    "make_rows",
    "queues",
    "wanted",
]

SHORT_CHUNK = 64  # no shorter prefill chunk is made of a longer one
# Positions whose arithmetic takes about as long as all that a forward does besides: reading the weights, launching. Two
# AVX2 cores in float32: 28, of SmolLM2's 114 to 994 ms for 32 to 512 positions. An H100 in bfloat16: 295 by its data
# sheet, but a small model waits for launches: 1,024 prompts of 60 tokens take SmolLM2 0.26 s in groups that this makes
# of 256, and 0.09 s in those of 1,024.
FULL_FORWARD = dict(cpu=32, gpu=1024)
SMALLEST_CAPACITY = 256
LARGE_CAPACITY = 1024
MOST_SPACE = 2  # times what its rows need is what the cache of a queue may take


@dataclass(frozen=True)
class Row:
    """One sample of one request: what becomes a row of a batch."""

    request: int
    sample: int
    prompt: np.ndarray  # int32 ids
    params: SamplingParams
    key: np.ndarray  # uint32 [2]
    stop_ids: tuple[int, ...]

    @property
    def num_positions(self) -> int:
        """Cache positions the row can come to need: the last emitted token is never committed."""
        return len(self.prompt) + self.params.max_tokens - 1


@dataclass(frozen=True)
class Bucket:
    """The shapes a batch compiles for; few by design."""

    batch: int
    capacity: int
    chunk: int  # prompt positions of one prefill forward
    rows: int  # and how many of the batch's rows run through theirs side by side
    stop_ids: int = 4  # most ids that end a row


def check_prompt(
    prompt: object, params: SamplingParams, *, index: int, vocab_size: int, limit: int, positions: int
) -> list[int]:
    """The prompt's ids. limit: of positions; positions: the model's. Raises ValueError, naming the prompt, for anything
    that could not be generated from."""
    if not isinstance(prompt, (list, tuple)):
        raise ValueError(f"prompt {index} must be a string or a list of token ids, got {prompt!r}")
    if not prompt:
        raise ValueError(f"prompt {index} is empty; give at least one token")
    wrong = [t for t in prompt if not isinstance(t, (int, np.integer)) or isinstance(t, bool)]
    if wrong:
        raise ValueError(f"prompt {index} must be a string or a list of token ids, got {wrong[0]!r}")
    outside = [t for t in prompt if not 0 <= t < vocab_size]
    if outside:
        raise ValueError(f"prompt {index} holds token id {outside[0]}, outside the vocabulary of {vocab_size}")
    if len(prompt) + params.max_tokens > limit:
        more = ", or raise max_model_len" if limit < positions else ""
        raise ValueError(
            f"prompt {index} has {len(prompt)} tokens and max_tokens is {params.max_tokens}; together they exceed the "
            f"limit of {limit} positions: shorten the prompt or lower max_tokens{more}"
        )
    outside = [t for t in params.stop_token_ids if t >= vocab_size]
    if outside:
        raise ValueError(f"stop_token_ids holds {outside[0]}, outside the vocabulary of {vocab_size}")
    return [int(t) for t in prompt]


def make_rows(prompts: list[list[int]], params: list[SamplingParams], eos_ids: tuple[int, ...]) -> list[Row]:
    """A row per prompt and sample. Equal seeds give a request the same key in whatever company it comes; those without
    one share what is drawn for the call, and differ by their place in it."""
    rows = []
    drawn = drawn_seed() if any(p.seed is None for p in params) else []
    for request, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        stop_ids = tuple(sorted({*(() if p.ignore_eos else eos_ids), *p.stop_token_ids}))
        for sample, key in enumerate(seed_keys([*drawn, request] if p.seed is None else p.seed, p.n)):
            rows.append(Row(request, sample, np.asarray(prompt, np.int32), p, key, stop_ids))
    return rows


def queues(rows: list[Row], max_batch_size: int) -> list[list[Row]]:
    """Rows that take turns in one batch. Every row of a batch has a cache as large as the largest needs, so rows that
    would leave most of it empty have a queue of their own, if they fill a batch. The longest prompts come first: little
    of a prefill is padding, and little is left to wait for in the end."""
    found, queue = [], list[Row]()
    for capacity, alike in groupby(sorted(rows, key=_capacity), key=_capacity):
        joined = [*queue, *alike]
        if len(queue) >= max_batch_size and capacity * len(joined) > MOST_SPACE * sum(map(_capacity, joined)):
            found.append(queue)
            joined = joined[len(queue) :]
        queue = joined
    found += [queue] if queue else []
    return [sorted(queue, key=lambda row: (-len(row.prompt), -row.num_positions)) for queue in found]


def chunk_sizes(longest: int) -> list[int]:
    """The prefill chunks to choose from, the shortest first. Example: 256 gives 64, 128, 256."""
    sizes = [longest]
    while sizes[0] % 2 == 0 and sizes[0] // 2 >= SHORT_CHUNK:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def bucket(
    rows: Sequence[Row],
    most: int,
    *,
    page_size: int,
    chunks: list[int],
    limit: int,
    full: int,
    shards: int = 1,
    prefill_shards: int = 1,
) -> Bucket:
    """What serves ``rows``, at most ``most`` of them side by side: a power of two, times ``shards``, and few
    capacities, which stop at the model's limit, rounded up to whole pages.

    Rows go through their prompts in groups, each as far as its longest and in whole chunks, so that ``rows`` of like
    length pad little. A group is as large as makes reading the weights (``full`` positions' worth of time) a quarter of
    the arithmetic, and of the chunks the one is taken that ends soonest. Where prefill runs over several shards all
    rows are one group, as each has its own.
    """
    capacity = -(-min(max(map(_capacity, rows)), limit) // page_size) * page_size
    batch = shards * power_of_two(-(-min(len(rows), most) // shards))

    def group(chunk: int) -> int:
        return batch if prefill_shards > 1 else min(batch, power_of_two(-(-4 * full // chunk)))

    def cost(chunk: int) -> int:
        size = group(chunk)
        longest = [max(len(row.prompt) for row in rows[i : i + size]) - 1 for i in range(0, len(rows), size)]
        return sum(-(-n // chunk) for n in longest) * (size // prefill_shards * chunk + full)

    chunk = min(chunks, key=lambda c: (cost(c), c))
    return Bucket(batch, capacity, chunk, group(chunk), power_of_two(max(4, *(len(row.stop_ids) for row in rows))))


def make_batch(rows: Mapping[int, Row], bucket: Bucket) -> Batch:
    """Arrays of the rows in their places; in all others are padding rows, finished from the start."""
    B = bucket.batch
    params, keys = [SamplingParams()] * B, np.zeros((B, 2), np.uint32)
    prompts = [np.zeros(1, np.int32)] * B
    stop_id_BI = np.full((B, bucket.stop_ids), -1, np.int32)
    max_tokens_B = np.zeros(B, np.int32)
    for i, row in rows.items():
        params[i], keys[i], prompts[i] = row.params, row.key, row.prompt
        stop_id_BI[i, : len(row.stop_ids)] = row.stop_ids
        max_tokens_B[i] = row.params.max_tokens
    return Batch(prompts, RowSampling.stack(params, keys), stop_id_BI, max_tokens_B)


def wanted(rows: Sequence[Row], vocab_size: int) -> tuple[Filters, int | None]:
    """The filters and the number of log-probabilities that a program must have to serve all of them."""
    asked = [row.params.logprobs for row in rows if row.params.logprobs is not None]
    # One compiled width for all top-n requests; 0 (the chosen token alone) is cheap enough to keep apart.
    num_logprobs = None if not asked else min(vocab_size, 20 if max(asked) > 5 else 5 if max(asked) else 0)
    return Filters.needed([row.params for row in rows]), num_logprobs


def _capacity(row: Row) -> int:
    """Cache positions of a batch made for such rows, were there no limit: powers of two while they are small, then
    quarters of them, as an empty half of a large cache is memory that other rows could have. Example: 5,120 for 4,195.
    """
    n = power_of_two(row.num_positions)
    if n <= LARGE_CAPACITY:
        return max(n, SMALLEST_CAPACITY)
    return -(-row.num_positions // (n // 8)) * (n // 8)
