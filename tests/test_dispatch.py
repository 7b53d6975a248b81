"""Trees that change between launches: the text stays, the counts are right, and the choice is made of measurements."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_exactness
import test_llama4
import test_sharding
from flax import nnx
from test_exactness import BUSH, CAPACITY, CHUNK, EVERY_FILTER, markov_head, markov_target

from jeagle import LLM, SamplingParams, dispatch
from jeagle.acceptance import Acceptance, expected_tokens
from jeagle.costs import CostTable, Setting, load_costs, modelled_costs, monotone, save_costs
from jeagle.decode import DecodeState, Program
from jeagle.decoder import Batch, Decoder
from jeagle.devices import DEVICES
from jeagle.dispatch import PROBE_ROUNDS, Dispatch, Dispatcher
from jeagle.draft import propose
from jeagle.eagle import EagleHead
from jeagle.floor import Job
from jeagle.footprint import Split
from jeagle.llama import Llama
from jeagle.placement import place
from jeagle.sampling import Filters, RowSampling, seed_keys
from jeagle.sharding import Layout, make_mesh
from jeagle.sizes import head_for, size
from jeagle.tree import OFF, DynamicTree, StaticTree, Tree, TreePlan, parse_tree

CHAIN_1, CHAIN_3 = StaticTree.chain(1), StaticTree.chain(3)
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
    for field in ("num_output_B", "finish_B", "output_BO", "length_B"):
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
    state = swayed.start(make_batch(sampled=True))
    tried_BN, kept_BN = np.zeros((6, BUSH.num_nodes), int), np.zeros((6, BUSH.num_nodes), int)
    cut = False
    while not np.asarray(state.finish_B).all():
        tree = jax.device_get(swayed.guess(state))
        said_B, running_B = np.array(state.num_output_B), np.asarray(state.finish_B) == 0
        state = swayed.decoder.launch(state, swayed.program, 1)
        for b in np.flatnonzero(running_B):
            node = 0
            tried_BN[b, 0] += 1
            for token in np.asarray(state.output_BO)[b, said_B[b] : state.num_output_B[b]].tolist() + [None]:
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


def test_rates_of_depth_and_rank() -> None:
    """What was tried often is its share; what was not follows the level above, and brothers never exceed 1."""
    acceptance = Acceptance([parse_tree("bush-8"), StaticTree.chain(4)])
    assert acceptance.rate_DC.shape == (4, 3)
    tried, kept = np.array([10_000, 10_000, 10_000, 6_000]), np.array([10_000, 6_000, 3_000, 1_500])
    acceptance.add(StaticTree(((0,), (1,), (0, 0))), tried, kept)
    rate_DC = acceptance.rate_DC
    np.testing.assert_allclose(rate_DC[0, :2], [0.6, 0.3], atol=2e-3)
    np.testing.assert_allclose(rate_DC[1, 0], 0.25, atol=2e-3)
    assert rate_DC[2, 0] == rate_DC[3, 0] == rate_DC[1, 0]
    assert (rate_DC.sum(1) <= 1).all()
    assert expected_tokens(StaticTree(((0,), (1,), (0, 1))), np.array([[0.8, 0.1], [0.5, 0.2]])) == pytest.approx(2.06)
    assert expected_tokens(OFF, Acceptance([OFF]).rate_DC) == 1


def test_old_tries_fade_where_there_are_new_ones() -> None:
    acceptance = Acceptance([CHAIN_3], half_life=100)
    acceptance.add(CHAIN_3, np.array([100, 100, 100, 100]), np.array([100, 100, 100, 0]))
    for _ in range(20):
        acceptance.add(CHAIN_1, np.array([100, 100]), np.array([100, 0]))
    assert acceptance.rate_DC[0, 0] < 0.15
    assert acceptance.rate_DC[1, 0] > 0.75  # not tried since
    assert acceptance.tried_DC[0, 0] < 201


# The costs.


def test_monotone() -> None:
    np.testing.assert_allclose(monotone(np.array([[1], [2], [3]]), np.array([5.0, 4.0, 6.0])), [4.5, 4.5, 6.0])
    rng = np.random.default_rng(0)
    sizes, value = rng.integers(0, 4, (40, 3)), rng.random(40)
    smooth = monotone(sizes, value)
    for i, j in itertools.permutations(range(40), 2):
        if (sizes[i] <= sizes[j]).all():
            assert smooth[i] <= smooth[j]
    np.testing.assert_array_equal(monotone(sizes, smooth), smooth)


TABLE = CostTable(
    {
        Setting(1, 256, False): {OFF: 0.010, CHAIN_1: 0.011, CHAIN_3: 0.014},
        Setting(32, 256, False): {OFF: 0.020, CHAIN_1: 0.036, CHAIN_3: 0.070},
    }
)


def test_a_table_outlives_its_file(tmp_path) -> None:
    save_costs(tmp_path / "new" / "costs.json", TABLE, dict(device="cpu"))
    assert load_costs(tmp_path / "new" / "costs.json") == TABLE
    assert TABLE.seconds(Setting(1, 256, False))[CHAIN_3] == 0.014
    assert TABLE.nearest(Setting(24, 4096, True)) == Setting(32, 256, False)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rounds": []}', '{"rounds": [{"batch": 1}]}', "missing"])
def test_a_file_that_is_no_table(tmp_path, text: str) -> None:
    path = tmp_path / "costs.json"
    if text != "missing":
        path.write_text(text)
    with pytest.raises(ValueError, match=r"is not a cost table .*; remove it|does not exist") as error:
        load_costs(path)
    assert "\n" not in str(error.value)


def test_modelled_costs_count_experts() -> None:
    """More rows and more nodes ask for more of Maverick's experts, so a tree costs relatively more than on a dense
    model of memory-bound rounds."""

    def ratios(model: str) -> list[float]:
        target = size(model)
        head = head_for(target, "eagle3")[0]
        split = Split(tensor=8)
        job = Job(name=model, target=target, head=head, device=DEVICES["h100"], split=split, context=4096, tree=CHAIN_3)
        table = modelled_costs(job, (OFF, CHAIN_3), (1, 8))
        return [row[CHAIN_3] / row[OFF] for row in table.rounds.values()]

    dense, routed = ratios("llama-3.3-70b"), ratios("llama-4-maverick")
    assert all(1 < of_dense < of_experts for of_dense, of_experts in zip(dense, routed, strict=True))


# The choice.


def dispatcher(**options) -> Dispatcher:
    return Dispatcher(Dispatch(candidates=["chain-1", "chain-3"], costs=TABLE, **options))


def teach(d: Dispatcher, setting: Setting, rate: float, rounds: int = 500) -> None:
    """Rounds of a chain whose every draft is taken with probability ``rate``."""
    kept = rounds * rate ** np.arange(4)
    d.acceptance[setting.sampled].add(CHAIN_3, np.array([rounds, *kept[:-1]]), kept)


ONE, MANY = Setting(1, 256, False), Setting(32, 256, False)


@pytest.mark.parametrize(
    ("setting", "rate", "best"),
    [(ONE, 0.9, CHAIN_3), (ONE, 0.2, CHAIN_1), (ONE, 0.0, OFF), (MANY, 0.7, OFF), (MANY, 0.95, CHAIN_1)],
)
def test_the_most_expected_tokens_per_second(setting: Setting, rate: float, best: StaticTree) -> None:
    d = dispatcher()
    teach(d, setting, rate, 100_000)
    worth = {plan: sum(rate**k for k in range(plan.num_nodes)) / TABLE.rounds[setting][plan] for plan in d.plans}
    for plan, value in d.values(setting).items():
        assert value == pytest.approx(worth[plan], rel=1e-3)
    assert max(worth, key=lambda plan: worth[plan]) == d.choose(setting).plan == best


def served(d: Dispatcher, setting: Setting, rounds: int, kept: float) -> StaticTree:
    """One launch of at most ``rounds`` rounds, as ``Course`` has it."""
    plan, most = d.choose(setting)
    rounds = rounds if most is None else min(rounds, most)
    counts = rounds * kept ** np.arange(plan.num_nodes)
    d.learn(setting, plan, rounds, np.array([rounds, *counts[:-1]]), counts)
    return plan


def test_what_has_never_run_gets_a_short_launch() -> None:
    d = dispatcher()
    teach(d, ONE, 0.9)
    assert d.choose(ONE) == (CHAIN_3, PROBE_ROUNDS)
    served(d, ONE, 64, 0.9)
    assert d.choose(ONE) == (CHAIN_3, None)


def test_a_switch_takes_a_gain_and_some_rounds(caplog) -> None:
    caplog.set_level(logging.INFO, logger="jeagle")
    d = dispatcher(probe_share=0.0)
    teach(d, ONE, 0.9)
    assert served(d, ONE, PROBE_ROUNDS - 1, 0.9) == CHAIN_3
    teach(d, ONE, 0.0, 100_000)
    assert d.choose(ONE).plan == CHAIN_3  # too soon
    served(d, ONE, 1, 0.0)
    assert d.choose(ONE).plan == OFF
    assert [r.getMessage().split(",")[0] for r in caplog.records] == [
        "batch 1: chain-3 at first",
        "batch 1: off instead of chain-3",
    ]
    # Off is worth 100 a second, a chain of 1 now 103: within the gain that a switch must promise.
    d = dispatcher(probe_share=0.0)
    teach(d, ONE, 0.0, 100_000)
    assert served(d, ONE, 64, 0.0) == OFF
    teach(d, ONE, 0.133, 100_000)
    values = d.values(ONE)
    assert values[OFF] < values[CHAIN_1] < 1.05 * values[OFF]
    assert d.choose(ONE).plan == OFF


def test_probes_are_bounded_and_take_turns() -> None:
    d = dispatcher(probe_share=0.01)
    teach(d, MANY, 0.1, 100_000)
    seconds = dict.fromkeys(d.plans, 0.0)
    for _ in range(2000):
        before = d._served.copy()
        plan = served(d, MANY, 16, 0.1)
        seconds[plan] += (d._served[plan] - before[plan]) * TABLE.rounds[MANY][plan]
    probing = seconds[CHAIN_1] + seconds[CHAIN_3]
    assert 0.005 < probing / sum(seconds.values()) <= 0.01
    assert min(seconds[CHAIN_1], seconds[CHAIN_3]) > 0


def test_nothing_known_is_found_out_at_once() -> None:
    """A prior that says no is not believed before the head has been tried; a tree that cannot pay is not tried."""
    costs = CostTable({ONE: {OFF: 1.0, CHAIN_1: 1.7, CHAIN_3: 4.1}})
    d = Dispatcher(Dispatch(candidates=["chain-1", "chain-3"], costs=costs))
    used = [served(d, ONE, 64, 0.95) for _ in range(12)]
    assert d.values(ONE)[OFF] == 1.0
    assert used == [CHAIN_1] * 12
    d = Dispatcher(Dispatch(candidates=["chain-1", "chain-3"], costs=costs))
    used = [served(d, ONE, 64, 0.0) for _ in range(12)]
    assert used == [CHAIN_1] * 9 + [OFF] * 3  # 72 tries, as older ones fade


def test_a_probe_finds_that_drafts_pay_again() -> None:
    d = dispatcher()
    teach(d, ONE, 0.0, 400)
    assert served(d, ONE, 64, 0.0) == OFF
    used = [served(d, ONE, 64, 0.95) for _ in range(400)]
    assert used[0] == OFF
    assert used[-1] == CHAIN_3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(candidates=["dynamic"]), "only static ones"),
        (dict(candidates="off"), "must be a list of trees"),
        (dict(candidates=["chain-x"]), "is unknown"),
        (dict(probe_share=1.0), "probe_share in 0..1"),
    ],
)
def test_options_that_cannot_be(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Dispatch(**options)


def test_a_table_without_a_candidate() -> None:
    with pytest.raises(ValueError, match="lacks bush-8"):
        Dispatcher(Dispatch(candidates=["bush-8"], costs=TABLE))


# The LLM.


def make_llm(tmp_path, **options) -> LLM:
    target = markov_target()
    return LLM(target, markov_head(target), cache_dir=tmp_path, rounds_per_launch=4, **options)


def test_generate_with_a_dispatcher(tmp_path) -> None:
    """The text is the plain one, and all rounds are accounted for."""
    costs = CostTable({Setting(2, 256, False): {OFF: 0.02, CHAIN_1: 0.021, CHAIN_3: 0.023}})
    llm = make_llm(tmp_path, tree=Dispatch(candidates=["chain-1", "chain-3"], costs=costs))
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    prompts = [[1, 2, 3], [4]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    plain = llm.generate(prompts, params, use_tqdm=False, speculative=False)
    for a, b in zip(outputs, plain, strict=True):
        assert [c.token_ids for c in a.outputs] == [c.token_ids for c in b.outputs]
        assert a.metrics.tree == "dispatch"
        assert sum(a.metrics.rounds_by_tree.values()) == a.metrics.num_rounds == sum(a.metrics.acceptance_histogram)
        assert set(a.metrics.rounds_by_tree) <= {"off", "chain-1", "chain-3"}
        assert set(b.metrics.rounds_by_tree) == {"off"}
    assert llm.dispatcher is not None
    assert llm.dispatcher.acceptance[False].kept_DC[0, 0] > 10


def test_costs_are_measured_once_and_kept(tmp_path, monkeypatch, caplog) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    tree = Dispatch(candidates=["chain-1"])
    first = make_llm(tmp_path, tree=tree).generate([[1, 2]], params, use_tqdm=False)
    (path,) = (tmp_path / "costs").glob("*.json")
    (row,) = json.loads(path.read_text())["rounds"]
    assert row["batch"] == 1
    assert set(row["seconds"]) == {"off", "chain-1"}
    assert 0 < row["seconds"]["off"] <= 10

    measured = []
    monkeypatch.setattr(dispatch, "measure_rounds", lambda *args: measured.append(args) or {OFF: 1.0, CHAIN_1: 9.0})
    second = make_llm(tmp_path, tree=tree)
    assert second.generate([[1, 2]], params, use_tqdm=False)[0].outputs == first[0].outputs
    assert not measured
    path.write_text("{")
    third = make_llm(tmp_path, tree=tree)
    (out,) = third.generate([[1, 2]], params, use_tqdm=False)
    assert len(measured) == 1
    assert "is not a cost table" in caplog.text
    assert out.metrics.rounds_by_tree == {"off": 12}
    assert load_costs(path).rounds == {Setting(1, 256, False): {OFF: 1.0, CHAIN_1: 9.0}}
