"""The choice of the tree: acceptance by depth and rank, costs and their files, gains, probes, and ``LLM`` with it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from test_exactness import markov_head, markov_target

from jeagle import LLM, SamplingParams
from jeagle.acceptance import LOOKUP_SHARE, Acceptance, Rates, expected_tokens
from jeagle.costs import CostTable, Setting
from jeagle.dispatch import PROBE_ROUNDS, Dispatch, Dispatcher, plans_of, seconds_with_lookups
from jeagle.tree import OFF, StaticTree, parse_tree

CHAIN_1, CHAIN_3 = StaticTree.chain(1), StaticTree.chain(3)


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


def test_rates_of_lookups() -> None:
    """How often there is one and how far it goes; rounds of plans without say nothing, and the head's are counted
    apart."""
    plan = StaticTree(CHAIN_3.paths, lookup=3)
    acceptance = Acceptance([plan])
    acceptance.add(CHAIN_3, np.array([1000, 1000, 500, 250]), np.array([1000, 500, 250, 125]))
    assert acceptance.rates.lookup_share == LOOKUP_SHARE
    head = np.array([100_000, 60_000, 30_000, 15_000]), np.array([100_000, 30_000, 15_000, 7_500])
    acceptance.add(plan, *head, np.array([4_000, 0, 6_000, 30_000]))
    rates = acceptance.rates
    assert rates.lookup_share == pytest.approx(0.4, abs=1e-3)
    np.testing.assert_allclose(rates.lookup_rate_D, [0.9, 1.0, 30 / 36], atol=1e-3)
    drafted = expected_tokens(CHAIN_3, acceptance.rate_DC)
    assert rates.tokens(CHAIN_3) == drafted == pytest.approx(1.875, abs=1e-2)
    assert rates.tokens(plan) == pytest.approx(0.6 * drafted + 0.4 * (1 + 0.9 + 0.9 + 0.75), abs=1e-3)
    longer = StaticTree((), lookup=4)  # as deep as the prior reaches, or as the deepest known
    assert Rates(np.zeros((0, 0)), 0.5, np.array([1.0, 0.5])).tokens(longer) == 0.5 + 0.5 * (1 + 1 + 0.5 + 0.25 + 0.125)


def test_rounds_in_which_no_row_asks_the_head() -> None:
    """One row alone looks up more often than all of four do, and what no head drafts takes the time of lookups."""
    looked, alone = StaticTree(CHAIN_3.paths, lookup=3), StaticTree((), lookup=3)
    seconds = {OFF: 0.010, alone: 0.012, looked: 0.020}
    assert seconds_with_lookups(seconds, 0.5) == {OFF: 0.010, alone: 0.012, looked: pytest.approx(0.016)}
    assert seconds_with_lookups({looked: 0.020}, 0.5) == {looked: 0.020}
    costs = CostTable({Setting(batch, 256, False): seconds for batch in (1, 4)})
    d = Dispatcher(Dispatch(candidates=["chain-3+lookup"], costs=costs))
    one, four = d.values(Setting(1, 256, False)), d.values(Setting(4, 256, False))
    assert one[looked] > four[looked] and one[OFF] == four[OFF] and set(one) == {OFF, looked}


# The choice.


TABLE = CostTable(
    {
        Setting(1, 256, False): {OFF: 0.010, CHAIN_1: 0.011, CHAIN_3: 0.014},
        Setting(32, 256, False): {OFF: 0.020, CHAIN_1: 0.026, CHAIN_3: 0.070},
    }
)


def dispatcher(**options) -> Dispatcher:
    return Dispatcher(Dispatch(candidates=["chain-1", "chain-3"], costs=TABLE, **options))


def teach(d: Dispatcher, setting: Setting, rate: float, rounds: int = 500) -> None:
    """Rounds of a chain whose every draft is taken with probability ``rate``."""
    kept = rounds * rate ** np.arange(4)
    d.acceptance[setting.sampled].add(CHAIN_3, np.array([rounds, *kept[:-1]]), kept)
    d._tries[setting.sampled] += rounds


ONE, MANY = Setting(1, 256, False), Setting(32, 256, False)


@pytest.mark.parametrize(
    ("setting", "rate", "best"),
    [(ONE, 0.9, CHAIN_3), (ONE, 0.2, CHAIN_1), (ONE, 0.0, OFF), (MANY, 0.5, OFF), (MANY, 0.95, CHAIN_1)],
)
def test_the_most_expected_tokens_per_second(setting: Setting, rate: float, best: StaticTree) -> None:
    d = dispatcher()
    teach(d, setting, rate, 100_000)
    even = {plan: d.acceptance[False].rates.evenness(plan, setting.batch) for plan in d.plans}
    tokens = {plan: sum(rate**k for k in range(plan.num_nodes)) for plan in d.plans}
    worth = {plan: tokens[plan] * even[plan] / TABLE.rounds[setting][plan] for plan in d.plans}
    for plan, value in d.values(setting).items():
        assert value == pytest.approx(worth[plan], rel=1e-3)
    assert max(worth, key=lambda plan: worth[plan]) == d.choose(setting).plan == best


def served(d: Dispatcher, setting: Setting, rounds: int, kept: float) -> StaticTree:
    """One launch of at most ``rounds`` rounds, as ``Course`` has it."""
    plan, most = d.choose(setting)
    rounds = rounds if most is None else min(rounds, most)
    counts = rounds * kept ** np.arange(len(plan.paths) + 1)
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
    # So does the first choice; and a tree in use may fall as low as plain decoding, not below it.
    d = dispatcher(probe_share=0.0)
    teach(d, ONE, 0.133, 100_000)
    assert d.choose(ONE).plan == OFF
    d = dispatcher(probe_share=0.0)
    teach(d, ONE, 0.3, 100_000)
    assert (drafting := served(d, ONE, 64, 0.3)) != OFF
    teach(d, ONE, 0.133, 100_000)
    assert d.values(ONE)[OFF] < d.values(ONE)[drafting] and d.choose(ONE).plan == drafting
    teach(d, ONE, 0.08, 100_000)
    assert 0.95 < d.values(ONE)[drafting] / d.values(ONE)[OFF] < 1 and d.choose(ONE).plan == OFF


def test_evenness_is_what_a_batchs_slowest_row_leaves() -> None:
    """Rows whose drafts are kept as the normal distribution has it, drawn many times."""
    rates, rng = Rates(np.full((3, 1), 0.7), spread=0.2), np.random.default_rng(0)
    tokens = rates.tokens(CHAIN_3)
    for batch in (1, 2, 8, 64):
        calls_NB = 1 + (tokens - 1) * np.maximum(0, rng.normal(1, rates.spread, (2_000, batch)))
        rounds_NB = 1 / calls_NB
        drawn = (rounds_NB.mean(1) / rounds_NB.max(1)).mean()
        assert rates.evenness(CHAIN_3, batch) == pytest.approx(drawn, abs=0.02)
    assert rates.evenness(OFF, 64) == Rates(np.full((3, 1), 0.7), spread=0.0).evenness(CHAIN_3, 64) == 1
    assert rates.evenness(CHAIN_1, 64) > rates.evenness(CHAIN_3, 64)


def test_spread_is_learnt_from_batches_that_drafted() -> None:
    acceptance = Acceptance([CHAIN_1], prior=Rates(np.zeros((0, 0)), spread=0.2))
    ended = acceptance.ended
    for rounds_B in (np.array([64, 64]), np.array([0, 64]), np.array([48, 0])):  # no draft kept, or one row alone
        ended(np.array([64, 64]), rounds_B, 1.0)
    assert acceptance.rates.spread == 0.2
    # Rows that would have ended apart anyway are as even as can be; half of the batch was plain: it counts for half.
    ended(np.array([32, 64, 0]), np.array([16, 32, 0]), 0.5)
    assert acceptance.rates.spread == pytest.approx(0.2 * 0.85)
    for _ in range(99):
        ended(np.array([64, 64]), np.array([32, 64]), 1.0)
    # It explains what such batches lose: their 1.33 tokens per call gain them nothing.
    chain = Rates(np.array([[1 / 3]]), spread=acceptance.rates.spread)
    assert chain.evenness(CHAIN_1, 2) == pytest.approx(0.75)
    for _ in range(99):
        ended(np.array([64, 64]), np.array([64, 64]), 0.0)  # forgotten, little by little
    assert acceptance.rates.spread == pytest.approx(0.2, abs=0.02)


def test_what_uneven_rows_lose_can_make_plain_decoding_the_choice() -> None:
    d = dispatcher(probe_share=0.0)
    teach(d, MANY, 0.95, 100_000)
    assert served(d, MANY, 64, 0.95) == CHAIN_1
    for _ in range(20):
        d.ended(MANY, np.array([64, 64, 0]), np.array([32, 64, 0]), 1.0)  # the last row is padding
    assert served(d, MANY, 64, 0.95) == OFF
    values, queued = d.values(MANY), d.values(MANY, refilled=True)  # where others take their places nobody waits
    assert values[OFF] == queued[OFF] and values[CHAIN_1] < queued[CHAIN_1]
    assert d.choose(MANY, refilled=True).plan == CHAIN_1


def test_probes_are_bounded_and_take_turns() -> None:
    d = dispatcher(probe_share=0.01)
    teach(d, MANY, 0.1, 100_000)
    seconds = dict.fromkeys(d.plans, 0.0)
    for _ in range(2000):
        before = d._served.copy()
        plan = served(d, MANY, 16, 0.1)
        seconds[plan] += (d._served[plan] - before[plan]) * TABLE.rounds[MANY][plan]
    # Lost at most: what their rounds took, less a plain round for the token that each yields at least.
    lost = sum(spent * (1 - TABLE.rounds[MANY][OFF] / TABLE.rounds[MANY][p]) for p, spent in seconds.items())
    assert 0.005 < lost / seconds[OFF] <= 0.01
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
    assert used == [CHAIN_1] * 8 + [OFF] * 4


@pytest.mark.parametrize("options", [{}, dict(half_life=30.0)])
def test_a_head_that_is_no_good_is_soon_known(options: dict) -> None:
    """Also where old tries fade before they are enough; lookups, which teach nothing of it, are no such try."""
    lookup = parse_tree("lookup-8")
    costs = CostTable({ONE: {OFF: 1.0, CHAIN_1: 1.7, lookup: 4.0}})
    d = Dispatcher(Dispatch(candidates=["chain-1", "lookup-8"], costs=costs, probe_share=1e-6, **options))
    used = [served(d, ONE, 64, 0.0) for _ in range(60)]
    assert used == [CHAIN_1] * 8 + [OFF] * 52


def test_lookups_alone_can_be_chosen_between() -> None:
    lookup = parse_tree("lookup-4")
    d = Dispatcher(Dispatch(candidates=["lookup-4"], costs=CostTable({ONE: {OFF: 1.0, lookup: 2.0}})))
    assert d.choose(ONE).plan == OFF


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


def test_what_is_prepared_serves_every_candidate(tmp_path) -> None:
    """A head's caches are filled for the largest plan: one that drafts, be a lookup larger."""
    plans, dispatcher = plans_of(Dispatch(candidates=["chain-1", "lookup-8"]), None, (1, 1), tmp_path)
    assert dispatcher is not None and plans.largest == parse_tree("chain-1")


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


def test_lookups_are_learnt(tmp_path) -> None:
    costs = CostTable({Setting(1, 256, False): {OFF: 1.0, parse_tree("lookup-5"): 0.1}})
    llm = make_llm(tmp_path, tree=Dispatch(candidates=["lookup-5"], costs=costs, half_life=np.inf))
    (out,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=60, ignore_eos=True), use_tqdm=False)
    assert llm.dispatcher is not None
    acceptance, looked = llm.dispatcher.acceptance[False], np.array(out.metrics.lookup_histogram)
    assert looked.sum() > 3 and looked[2:].sum() > 0
    kept_D = [looked[k:].sum() for k in range(6)]  # rounds that looked up, and that kept 1, 2, .. of it
    np.testing.assert_allclose(acceptance.looked_kept_D, kept_D)
    np.testing.assert_allclose(acceptance.looked_tried_D, [out.metrics.num_rounds, *kept_D[:-1]])


def test_a_course_tells_how_even_its_rows_were(tmp_path, monkeypatch) -> None:
    told = []
    monkeypatch.setattr(Dispatcher, "ended", lambda self, *given: told.append(given))
    llm = make_llm(tmp_path, tree=Dispatch(candidates=["chain-1", "chain-3"], costs=TABLE))
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (20, 3, 9)]
    outs = llm.generate([[1], [1, 2], [1, 2, 3]], params, use_tqdm=False)
    ((setting, num_output_B, num_rounds_B, drafted),) = told
    assert setting.batch == 4 and sorted(num_output_B.tolist()) == [0, 3, 9, 20]
    rounds = sum(out.metrics.num_rounds for out in outs)
    assert num_rounds_B.sum() == rounds
    assert drafted == pytest.approx(1 - sum(out.metrics.rounds_by_tree.get("off", 0) for out in outs) / rounds)
