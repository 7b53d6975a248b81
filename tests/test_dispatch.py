"""Trees that change between launches: the text stays, what is counted is right, and the choice is made of measurements."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_exactness
import test_llama4
from flax import nnx
from test_exactness import BUSH, CAPACITY, CHUNK, EVERY_FILTER, markov_head, markov_target

from jeagle.decode import DecodeState, Program
from jeagle.decoder import Batch, Decoder
from jeagle.draft import propose
from jeagle.sampling import Filters, RowSampling, SamplingParams, seed_keys
from jeagle.tree import OFF, StaticTree, TreePlan

CHAINS = {n: StaticTree.chain(n) for n in (1, 2, 3, 5)}
# Off and on again, up and down in depth; twice the same where a draft must live to be accepted.
CYCLE = (CHAINS[3], OFF, CHAINS[1], CHAINS[1], BUSH, BUSH, CHAINS[1], CHAINS[3], CHAINS[3], OFF, OFF, BUSH)


def make_batch(*, sampled: bool, seed: int = 0, vocab_size: int = test_exactness.CONFIG.vocab_size) -> Batch:
    """Four rows that end in waves and two of padding."""
    rng = np.random.default_rng(seed)
    temperatures = (0.0, 0.8, 1.0, 0.5, 0.0, 0.0) if sampled else (0.0,) * 6
    params = [SamplingParams(temperature=t) for t in temperatures]
    return Batch(
        prompts=[rng.integers(0, vocab_size, n).astype(np.int32) for n in (1, 2, 17, 30)],
        sampling=RowSampling.stack(params, seed_keys(seed, 6)),
        stop_id_BI=np.full((6, 4), -1, np.int32),
        max_tokens_B=np.array([40, 33, 26, 37, 0, 0], np.int32),
    )


def cycled(decoder: Decoder, batch: Batch, filters: Filters, chunk: int = CHUNK) -> tuple[DecodeState, dict]:
    """A round of each of CYCLE's trees in turn until all is said; tokens kept per plan."""
    program = Program(plan=CYCLE[0], filters=filters)
    state = decoder.start(batch, program, capacity=CAPACITY, chunk=chunk)
    kept: dict[TreePlan, int] = dict.fromkeys(CYCLE, 0)
    for plan in itertools.cycle(CYCLE):
        state, program = decoder.switch(state, program, new := Program(plan=plan, filters=filters)), new
        state = decoder.launch(state, program, 1)
        kept[plan] += int((np.asarray(state.acceptance_BP) @ np.arange(program.num_path)).sum())
        if np.asarray(state.finish_B).all():
            return state, kept
    raise AssertionError


def same_text(plain: DecodeState, switched: DecodeState) -> None:
    for field in ("num_output_B", "finish_B", "output_BO", "length_B"):
        np.testing.assert_array_equal(getattr(plain, field), getattr(switched, field), err_msg=field)


@pytest.fixture(scope="module")
def bench() -> test_exactness.Bench:
    return test_exactness.Bench()


@pytest.mark.parametrize("filters", [Filters(), EVERY_FILTER], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["eagle1", "eagle3", "meta"])
def test_a_switch_every_round_leaves_the_text(bench, name: str, filters: Filters) -> None:
    batch = make_batch(sampled=filters.sample)
    plain = bench.run(None, batch, OFF, filters=filters)
    same_text(plain, cycled(bench.decoders[name], batch, filters)[0])


def test_drafts_are_accepted_across_switches() -> None:
    """A head that is right stays right: after each kind of switch whole paths are kept."""
    target = markov_target()
    decoder = Decoder(target, markov_head(target), page_size=16)
    batch = make_batch(sampled=True)
    plain = Program(filters=EVERY_FILTER)
    expected = decoder.launch(decoder.start(batch, plain, capacity=CAPACITY, chunk=CHUNK), plain, 1000)
    state, kept = cycled(decoder, batch, EVERY_FILTER)
    same_text(expected, state)
    assert kept[OFF] == 0
    assert all(kept[plan] > 0 for plan in CYCLE if plan != OFF)
