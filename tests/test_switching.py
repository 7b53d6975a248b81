"""Trees that change between launches: the text stays, nothing the head saw is lost, and the counts are right."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_exactness
import test_llama4
import test_sharding
from flax import nnx
from test_exactness import BUSH, CAPACITY, CHUNK, EVERY_FILTER, markov_head, markov_target

from jeagle import SamplingParams
from jeagle.decode import DecodeState, Program
from jeagle.decoder import Batch, Decoder
from jeagle.draft import propose
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.placement import place
from jeagle.sampling import Filters, RowSampling, seed_keys
from jeagle.sharding import Layout, make_mesh
from jeagle.tree import OFF, DynamicTree, StaticTree, Tree, TreePlan

CHAIN_1, CHAIN_3 = StaticTree.chain(1), StaticTree.chain(3)
LOOKUP, LOOKED = StaticTree((), lookup=4), StaticTree(CHAIN_1.paths, lookup=4)
# Off and on again, up and down in depth; more than once the same where a draft must live to be accepted.
CYCLE = (BUSH, OFF, CHAIN_1, CHAIN_1, BUSH, BUSH, CHAIN_1, CHAIN_1, OFF, OFF, BUSH, BUSH)


def make_batch(*, sampled: bool, seed: int = 0, vocab_size: int = test_exactness.CONFIG.vocab_size) -> Batch:
    """Four rows that end in waves and two of padding."""
    rng = np.random.default_rng(seed)
    temperatures = (0.0, 0.8, 1.0, 0.5, 0.0, 0.0) if sampled else (0.0,) * 6
    params = [SamplingParams(temperature=t) for t in temperatures]
    return Batch(
        prompts=[rng.integers(0, vocab_size, n).astype(np.int32) for n in (1, 2, 14, 30)],
        sampling=RowSampling.stack(params, seed_keys(seed, 6)),
        stop_id_BI=np.full((6, 4), -1, np.int32),
        max_tokens_B=np.array([40, 33, 26, 37, 0, 0], np.int32),
    )


def plain_state(decoder: Decoder, batch: Batch, filters: Filters, chunk: int = CHUNK) -> DecodeState:
    program = Program(filters=filters)
    return decoder.launch(decoder.start(batch, program, capacity=CAPACITY, chunk=chunk), program, 1000)


def cycled(
    decoder: Decoder, batch: Batch, filters: Filters, plans: tuple[StaticTree, ...] = CYCLE, chunk: int = CHUNK
) -> tuple[DecodeState, dict]:
    """A round of each tree in turn until all is said; tokens kept per plan."""
    program = Program(plan=plans[0], filters=filters)
    state = decoder.start(batch, program, capacity=CAPACITY, chunk=chunk)
    kept: dict[TreePlan, int] = dict.fromkeys(plans, 0)
    for plan in itertools.cycle(plans):
        state, program = decoder.switch(state, program, new := Program(plan=plan, filters=filters)), new
        state = decoder.launch(state, program, 1)
        kept[plan] += int((np.asarray(state.acceptance_BP) @ np.arange(program.num_path)).sum())
        if np.asarray(state.finish_B).all():
            return state, kept
    raise AssertionError


def same_text(plain: DecodeState, switched: DecodeState) -> None:
    for field in ("num_output_B", "finish_B", "text_BS", "length_B"):
        np.testing.assert_array_equal(getattr(plain, field), getattr(switched, field), err_msg=field)


# The text.


@pytest.mark.parametrize(("name", "filters"), [("eagle1", Filters()), ("eagle3", EVERY_FILTER)])
def test_a_switch_every_round_leaves_the_text(name: str, filters: Filters) -> None:
    batch = make_batch(sampled=filters.sample)
    target = test_exactness.sharpened(Llama(test_exactness.CONFIG, rngs=nnx.Rngs(0)))
    decoder = Decoder(target, EagleHead(test_exactness.HEADS[name], rngs=nnx.Rngs(1)), page_size=16)
    same_text(plain_state(decoder, batch, filters), cycled(decoder, batch, filters)[0])


def test_a_switch_every_round_in_chunked_layers() -> None:
    """Llama 4, and Meta's head with its attention: rows cross borders of 16 positions under every tree."""
    config = dataclasses.replace(test_llama4.CONFIG, moe_layers=())
    target = test_llama4.sharpened(test_llama4.Llama4(config, rngs=nnx.Rngs(0)))
    head = test_llama4.Llama4EagleHead(test_llama4.HEADS["meta"], rngs=nnx.Rngs(1))
    decoder, filters = Decoder(target, head, page_size=8), Filters()
    batch = make_batch(sampled=False, vocab_size=config.vocab_size)
    switched, _ = cycled(decoder, batch, filters, (CHAIN_3, CHAIN_3, OFF, CHAIN_3), 8)
    same_text(plain_state(decoder, batch, filters, 8), switched)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_a_switch_every_round_on_a_mesh() -> None:
    """Rows over two devices, the rest over two: states stay laid out as the compiled programs expect them."""
    target, head = test_sharding.pair()
    batch, filters = make_batch(sampled=False, vocab_size=97), Filters()
    expected = plain_state(Decoder(target, page_size=8), batch, filters)
    layout = Layout(make_mesh(2, 2))
    decoder = Decoder(place(target, layout), place(head, layout), page_size=8, layout=layout)
    same_text(expected, cycled(decoder, batch, filters, (CHAIN_3, CHAIN_1, OFF, CHAIN_1))[0])


class Swayed:
    """A target that follows its last token, and a head that mostly guesses it, though attention sways the head."""

    def __init__(self) -> None:
        self.target = markov_target()
        self.head = markov_head(self.target)
        noise = np.random.default_rng(5).standard_normal(self.head.blocks[0].out.kernel.shape)
        self.head.blocks[0].out.kernel[...] = jnp.asarray(0.06 * noise, jnp.float32)
        self.decoder = Decoder(self.target, self.head, page_size=16)
        self.program = Program(plan=BUSH, filters=EVERY_FILTER)
        self.guess = jax.jit(self.propose)

    def start(self, batch: Batch) -> DecodeState:
        return self.decoder.start(batch, self.program, capacity=CAPACITY, chunk=CHUNK)

    def propose(self, state: DecodeState) -> Tree:
        """What the next round will."""
        remaining_B = state.max_tokens_B - state.num_output_B
        given = self.head, self.target, state.draft, state.prefix, state.root_B, remaining_B, state.sampling
        return propose(*given, plan=self.program.plan, filters=self.program.filters)[0]


@pytest.fixture(scope="module")
def swayed() -> Swayed:
    return Swayed()


def test_drafts_are_accepted_after_switches(swayed: Swayed) -> None:
    """From a smaller tree, a larger one and none."""
    batch = make_batch(sampled=True)
    state, kept = cycled(swayed.decoder, batch, EVERY_FILTER)
    same_text(plain_state(swayed.decoder, batch, EVERY_FILTER), state)
    assert kept[OFF] == 0
    assert kept[CHAIN_1] > 10
    assert kept[BUSH] > 10


def test_to_lookups_and_back(swayed: Swayed) -> None:
    """With a head, which goes on where it was, and without, as to plain decoding."""
    batch = make_batch(sampled=True)
    state, kept = cycled(swayed.decoder, batch, EVERY_FILTER, (LOOKED, LOOKED, CHAIN_1, LOOKUP, LOOKUP, LOOKED))
    same_text(plain_state(swayed.decoder, batch, EVERY_FILTER), state)
    assert kept[LOOKED] > 10


def test_a_switch_loses_nothing_that_the_head_saw(swayed: Swayed) -> None:
    """Cut to fewer pending positions and back, the head guesses just what it would have guessed."""
    small = dataclasses.replace(swayed.program, plan=CHAIN_1)
    state = swayed.decoder.launch(swayed.start(make_batch(sampled=True)), swayed.program, 3)
    assert (np.asarray(state.draft.count_B) > 1).any()
    running = np.asarray(state.finish_B) == 0
    before = np.asarray(swayed.guess(state).token_BT)[running]
    state = swayed.decoder.switch(swayed.decoder.switch(state, swayed.program, small), small, swayed.program)
    assert (np.asarray(state.draft.count_B) <= 1).all()
    np.testing.assert_array_equal(np.asarray(swayed.guess(state).token_BT)[running], before)


# The counts.


def test_tried_and_kept_against_a_replay(swayed: Swayed) -> None:
    """Node by node, from the proposed trees and the finished text alone; nodes past a request's end do not count."""
    batch = make_batch(sampled=True)
    state, first_B = swayed.start(batch), batch.num_prompt_B
    tried_BN, kept_BN = np.zeros((6, BUSH.num_nodes), int), np.zeros((6, BUSH.num_nodes), int)
    cut = False
    while not np.asarray(state.finish_B).all():
        tree = jax.device_get(swayed.guess(state))
        said_B, running_B = np.array(state.num_output_B), np.asarray(state.finish_B) == 0
        state = swayed.decoder.launch(state, swayed.program, 1)
        for b in np.flatnonzero(running_B):
            node = 0
            tried_BN[b, 0] += 1
            text_S, end = np.asarray(state.text_BS)[b], first_B[b] + state.num_output_B[b]
            for token in text_S[first_B[b] + said_B[b] : end].tolist() + [None]:
                kept_BN[b, node] += 1
                children = [n for n in range(1, BUSH.num_nodes) if tree.parent_BT[b, n] == node and tree.valid_BT[b, n]]
                tried_BN[b, children] += 1
                node = next((n for n in children if tree.token_BT[b, n] == token), None)
                if node is None:
                    break
            cut |= not tree.valid_BT[b].all()
        np.testing.assert_array_equal(state.tried_BN, tried_BN)
        np.testing.assert_array_equal(state.kept_BN, kept_BN)
    assert cut
    assert kept_BN[:, 2:].any()
    assert kept_BN[:, 1:].sum() == (np.asarray(state.acceptance_BP) @ np.arange(4)).sum()


def test_of_a_dynamic_tree_rounds_are_counted() -> None:
    assert Program(plan=DynamicTree(3, 2, 7)).num_counted == 1
