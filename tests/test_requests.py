"""Requests on the host: refused before anything runs, or packed into few shapes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jeagle.requests import (
    SMALLEST_CAPACITY,
    Bucket,
    Row,
    bucket,
    check_prompt,
    chunk_sizes,
    make_batch,
    make_rows,
    queues,
    wanted,
)
from jeagle.sampling import Filters, SamplingParams, seed_keys


def rows_of(*lengths: int, max_tokens: int = 8, **fields) -> list[Row]:
    params = SamplingParams(max_tokens=max_tokens, seed=0, **fields)
    return make_rows([list(range(3, 3 + n)) for n in lengths], [params] * len(lengths), (2,))


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt 3 is empty; give at least one token"),
        ([1, "two"], {}, "prompt 3 must be a string or a list of token ids, got 'two'"),
        ([1.0], {}, "prompt 3 must be a string or a list of token ids, got 1.0"),
        ([True], {}, "prompt 3 must be a string or a list of token ids, got True"),
        ([5, 100], {}, "prompt 3 holds token id 100, outside the vocabulary of 100"),
        ([5, -1], {}, "prompt 3 holds token id -1, outside the vocabulary of 100"),
        (
            [5] * 57,
            {},
            "prompt 3 has 57 tokens and max_tokens is 8; together they exceed the limit of 64 positions: "
            "shorten the prompt or lower max_tokens",
        ),
        ([5], dict(stop_token_ids=[7, 100]), "stop_token_ids holds 100, outside the vocabulary of 100"),
    ],
)
def test_what_cannot_be_generated_from_is_refused(prompt, params, message):
    with pytest.raises(ValueError) as caught:
        check_prompt(prompt, SamplingParams(max_tokens=8, **params), index=3, vocab_size=100, limit=64, positions=64)
    assert str(caught.value) == message


@pytest.mark.parametrize("prompt", [[0], [99], [5] * 56, [np.int32(4), np.int64(5)]])
def test_what_just_fits_is_accepted(prompt):
    check_prompt(
        prompt, SamplingParams(max_tokens=8, stop_token_ids=[99]), index=0, vocab_size=100, limit=64, positions=64
    )


def test_a_row_per_prompt_and_sample():
    params = [SamplingParams(n=2, seed=5), SamplingParams(n=1, seed=6, stop_token_ids=[9, 2, 4])]
    rows = make_rows([[1, 2], [3]], params, eos_ids=(7, 2))
    assert [(row.request, row.sample) for row in rows] == [(0, 0), (0, 1), (1, 0)]
    assert [row.prompt.tolist() for row in rows] == [[1, 2], [1, 2], [3]]
    assert all(row.prompt.dtype == np.int32 for row in rows)
    assert [row.stop_ids for row in rows] == [(2, 7), (2, 7), (2, 4, 7, 9)]
    assert rows[0].num_positions == 2 + 128 - 1


def test_ignore_eos_keeps_the_ids_that_were_asked_for():
    (row,) = make_rows([[1]], [SamplingParams(ignore_eos=True, stop_token_ids=[9])], eos_ids=(2,))
    assert row.stop_ids == (9,)
    (row,) = make_rows([[1]], [SamplingParams(ignore_eos=True)], eos_ids=(2,))
    assert row.stop_ids == ()


def test_one_seed_is_one_key_in_any_company():
    mine = SamplingParams(seed=77, n=2)
    alone = make_rows([[1, 2, 3]], [mine], (2,))
    others = [SamplingParams(seed=77), SamplingParams(n=3), mine, SamplingParams(seed=1)]
    together = make_rows([[4], [5, 6], [1, 2, 3], [7]], others, (2,))
    got = [row.key for row in together if row.request == 2]
    np.testing.assert_array_equal(got, [row.key for row in alone])
    np.testing.assert_array_equal(got, seed_keys(77, 2))
    np.testing.assert_array_equal(together[0].key, got[0])  # the seed alone counts, not the prompt
    places = {5: together[0], 0: together[3]}
    seed_B2 = np.asarray(make_batch(places, Bucket(8, 256, 64, 2)).sampling.seed_B2)
    for place, row in places.items():
        np.testing.assert_array_equal(row.key, seed_B2[place])


def test_unseeded_samples_all_differ():
    rows = make_rows([[1]] * 20, [SamplingParams(n=3)] * 20, (2,))
    assert len({tuple(row.key) for row in rows}) == 60


@given(st.lists(st.integers(1, 900), min_size=1, max_size=20), st.integers(1, 8))
def test_queues_lose_nobody_and_begin_with_the_longest(lengths, most):
    found = queues(rows_of(*lengths), most)
    assert sorted(row.request for queue in found for row in queue) == list(range(len(lengths)))
    assert all(len(queue) >= most for queue in found[:-1])
    for queue in found:
        in_queue = [len(row.prompt) for row in queue]
        assert in_queue == sorted(in_queue, reverse=True)


def test_only_rows_of_like_size_wait_for_one_batch():
    def got(*lengths: int) -> list[list[int]]:
        return [[len(row.prompt) for row in queue] for queue in queues(rows_of(*lengths), 4)]

    small, large = [10, 20, 30, 40, 50], [4000, 4050]
    assert got(*large, *small) == [[50, 40, 30, 20, 10], [4050, 4000]]
    assert got(*large, *small[:3]) == [[4050, 4000, 30, 20, 10]]  # three small ones would leave a place empty
    assert got(*large, 1500, 1600, *small[:3]) == [[1500, 30, 20, 10], [4050, 4000, 1600]]
    assert got(300, *small) == [[300, *reversed(small)]]  # 512 positions for rows of 299 in the mean
    assert got(900, *small) == [[50, 40, 30, 20, 10], [900]]  # 1,024 for rows of 384
    assert got() == []


@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=9),
    st.integers(1, 300),
    st.sampled_from([16, 64, 100, 128]),
    st.integers(0, 1500),
)
def test_buckets_hold_their_rows_and_no_more_than_the_limit(lengths, max_tokens, page_size, spare):
    rows = rows_of(*lengths, max_tokens=max_tokens)
    limit = max(lengths) + max_tokens + spare  # what check_prompt lets through
    got = bucket(rows, len(rows), page_size=page_size, chunks=chunk_sizes(256), limit=limit, full=256)
    needed = max(row.num_positions for row in rows)
    assert got.batch >= len(rows) and is_power_of_two(got.batch) and got.batch < 2 * len(rows) + 1
    assert got.capacity >= needed and got.capacity >= max_tokens and got.capacity % page_size == 0
    assert got.capacity < limit + page_size
    assert got.capacity < max(2 * needed, SMALLEST_CAPACITY) + page_size
    assert got.chunk in (64, 128, 256) and (got.chunk == 64 or max(lengths) - 1 > 64)


def test_buckets_are_few():
    """Every mix of up to 8 prompts of up to 1,000 tokens falls into 4 batch sizes, 3 capacities and 3 chunks."""
    seen = {
        bucket(rows_of(*[1] * (n - 1), length), 8, page_size=64, chunks=chunk_sizes(256), limit=2048, full=256)
        for n in range(1, 9)
        for length in (1, 2, 64, 65, 66, 100, 250, 400, 505, 506, 700, 1000)
    }
    assert {b.batch for b in seen} == {1, 2, 4, 8}
    assert {b.capacity for b in seen} == {256, 512, 1024}
    assert {b.chunk for b in seen} == {64, 128, 256}


def test_bucket_examples():
    def got(length: int, longest_chunk: int, limit: int):
        return bucket(rows_of(length), 8, page_size=64, chunks=chunk_sizes(longest_chunk), limit=limit, full=256)

    assert got(249, 256, 4096).capacity == 256  # 249 + 8 - 1 positions
    assert got(250, 256, 4096).capacity == 512
    assert got(250, 256, 300).capacity == 320
    # Large ones in quarters: at most a fifth of the cache stays empty.
    assert [got(n, 256, 8192).capacity for n in (1017, 1018, 1500, 2041, 2042, 3058, 4195, 7200)] == [
        *(1024, 1280, 1536, 2048, 2560, 3072, 5120, 8192)
    ]
    assert got(5, 32, 20).capacity == 64 and got(5, 32, 20).chunk == 32


def test_chunks_pad_little_and_read_the_weights_seldom():
    assert [chunk_sizes(n) for n in (256, 96, 100, 130, 8)] == [[64, 128, 256], [96], [100], [65, 130], [8]]

    def chunk(rows: int, longest: int) -> int:
        prompts = rows_of(*[5] * (rows - 1), longest)
        return bucket(prompts, 8, page_size=64, chunks=chunk_sizes(256), limit=2048, full=256).chunk

    # The last token of a prompt is not prefilled, so one more than the chunk still fits.
    assert [chunk(1, n) for n in (1, 65, 66, 129, 130, 287)] == [64, 64, 128, 128, 256, 256]
    # Rows beside a longer one run as far as it, but seldom: what they read the weights for weighs as much.
    assert [chunk(4, n) for n in (65, 107, 130, 1025)] == [64, 128, 256, 256]


def test_rows_go_through_prompts_in_groups():
    def got(*lengths: int, **kwargs) -> tuple[int, int]:
        found = bucket(rows_of(*lengths), 64, page_size=64, chunks=chunk_sizes(256), limit=2048, **kwargs)
        return found.chunk, found.rows

    assert got(*[60] * 64, full=256) == (64, 16)  # 1,024 positions a forward: a quarter more for the weights
    assert got(*[60] * 64, full=32) == (64, 2)
    assert got(*[60] * 3, full=256) == (64, 4)  # never more than the batch
    assert got(*[60] * 31, 1000, full=256) == (128, 8)  # seven beside the long one, not fifteen
    assert got(*[60] * 3, 1000, full=256) == (256, 4)
    assert got(*[60] * 64, full=256, shards=2, prefill_shards=2) == (64, 64)
    assert got(*[60] * 64, full=256, shards=2) == (64, 16)  # filled in elsewhere


def test_batches_are_padded_with_finished_rows():
    rows = make_rows(
        [[5, 6], [7, 8, 9], [4]],
        [
            SamplingParams(max_tokens=3, temperature=0.5, top_k=4, seed=1),
            SamplingParams(max_tokens=4, seed=2, ignore_eos=True),
            SamplingParams(max_tokens=5, seed=3, stop_token_ids=[10, 11, 12, 13]),
        ],
        (2,),
    )
    shapes = bucket(rows, 8, page_size=64, chunks=[64], limit=2048, full=32)
    assert (shapes.batch, shapes.stop_ids) == (4, 8)
    batch = make_batch(dict(enumerate(rows)), shapes)
    assert [p.tolist() for p in batch.prompts] == [[5, 6], [7, 8, 9], [4], [0]]
    assert batch.max_tokens_B.tolist() == [3, 4, 5, 0]
    # Widths are powers of two from 4 on, so stop ids seldom make a new shape.
    assert batch.stop_id_BI.shape == (4, 8) and batch.stop_id_BI.dtype == np.int32
    assert [sorted(set(row) - {-1}) for row in batch.stop_id_BI.tolist()] == [[2], [], [2, 10, 11, 12, 13], []]
    sampling = batch.sampling
    assert sampling.seed_B2.shape == (4, 2) and sampling.seed_B2.dtype == np.uint32
    np.testing.assert_array_equal(np.asarray(sampling.temperature_B), np.array([0.5, 0, 0, 0], np.float32))
    assert sampling.top_k_B.tolist() == [4, 0, 0, 0] and sampling.top_p_B.tolist() == [1] * 4
    assert wanted(rows, 100) == (Filters(sample=True, top_k=True), None)
    assert bucket(rows[:2], 8, page_size=64, chunks=[64], limit=2048, full=32).stop_ids == 4

    batch = make_batch({2: rows[0]}, shapes)  # in a place of its own
    assert [p.tolist() for p in batch.prompts] == [[0], [0], [5, 6], [0]]
    assert batch.max_tokens_B.tolist() == [0, 0, 3, 0] and batch.stop_id_BI[2, 0] == 2
    assert np.asarray(batch.sampling.temperature_B).tolist() == [0, 0, 0.5, 0]


def test_more_rows_than_places_ask_for_no_larger_batch():
    rows = rows_of(*[60] * 20, 100)
    got = bucket(rows, 6, page_size=64, chunks=chunk_sizes(256), limit=2048, full=256)
    assert (got.batch, got.rows) == (8, 8)
    assert bucket(rows, 6, page_size=64, chunks=[64], limit=2048, full=256, shards=4).batch == 8


@pytest.mark.parametrize(
    ("asked", "width"), [([None, None], None), ([0, None], 0), ([1, 0], 5), ([5], 5), ([6, 1], 20)]
)
def test_few_widths_of_logprobs(asked, width):
    rows = make_rows([[1]] * len(asked), [SamplingParams(logprobs=n) for n in asked], (2,))
    assert wanted(rows, 100)[1] == width
    assert wanted(rows, 4)[1] == (None if width is None else min(4, width))
