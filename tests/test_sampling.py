"""How tokens are chosen: parameters, HF's warpers, the position-keyed noise, and drafting under that same noise."""

from __future__ import annotations

import types
from dataclasses import replace

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry2x32_p

from jeagle import draft
from jeagle.requests import make_rows
from jeagle.sampling import Filters, RowSampling, SamplingParams, choose, drawn_seed, gumbel, seed_keys, warp
from pallas_kernels.noise import gumbel_of_bits, threefry

ALL = Filters(sample=True, top_k=True, top_p=True, min_p=True)
run_warp = jax.jit(warp, static_argnames="filters")
run_choose = jax.jit(choose, static_argnames="filters")
run_gumbel = jax.jit(gumbel)


# Parameters


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("max_tokens", 0, "a whole number of at least 1"),
        ("max_tokens", 2.0, "a whole number of at least 1"),
        ("max_tokens", True, "a whole number of at least 1"),
        ("temperature", -0.1, "0 (greedy) or a positive number"),
        ("temperature", float("nan"), "0 (greedy) or a positive number"),
        ("temperature", float("inf"), "0 (greedy) or a positive number"),
        ("temperature", "hot", "0 (greedy) or a positive number"),
        ("top_k", -2, "0 or -1 (off) or a positive whole number"),
        ("top_k", 1.5, "0 or -1 (off) or a positive whole number"),
        ("top_k", 2**31, "0 or -1 (off) or a positive whole number"),
        ("top_p", 0.0, "above 0 and at most 1 (off)"),
        ("top_p", 1.01, "above 0 and at most 1 (off)"),
        ("top_p", None, "above 0 and at most 1 (off)"),
        ("min_p", -0.01, "from 0 (off) to 1"),
        ("min_p", 1.5, "from 0 (off) to 1"),
        ("seed", -1, "None or a whole number from 0 to 2**64 - 1"),
        ("seed", 2**64, "None or a whole number from 0 to 2**64 - 1"),
        ("seed", "abc", "None or a whole number from 0 to 2**64 - 1"),
        ("n", 0, "a whole number of at least 1"),
        ("stop", "", "non-empty strings"),
        ("stop", ["a", 3], "non-empty strings"),
        ("stop_token_ids", [-1], "token ids, each 0 or more"),
        ("stop_token_ids", ["2"], "token ids, each 0 or more"),
        ("logprobs", 21, "None or a whole number from 0 to 20"),
        ("logprobs", -1, "None or a whole number from 0 to 20"),
        ("logprobs", True, "None or a whole number from 0 to 20"),
    ],
)
def test_wrong_parameters_are_refused_in_one_sentence(field, value, rule):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} must be {rule}, got ") and "\n" not in message


def test_parameters_are_brought_to_one_form():
    params = SamplingParams(stop="END", stop_token_ids=[3, 4], top_k=-1)
    assert (params.stop, params.stop_token_ids, params.top_k) == (("END",), (3, 4), 0)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(seed=2**64 - 1, top_p=1, min_p=1, temperature=2, logprobs=0).seed == 2**64 - 1
    assert hash(params) == hash(SamplingParams(stop=["END"], stop_token_ids=(3, 4)))


def test_filters_need_a_temperature():
    """Where a script of vLLM's, whose default is 1, says none. Whoever says 0 means it."""
    for field, value in (("top_k", 5), ("top_p", 0.5), ("min_p", 0.1)):
        with pytest.raises(ValueError, match=f"{field}={value} needs a temperature") as caught:
            SamplingParams(**{field: value})
        assert "\n" not in str(caught.value)
        assert SamplingParams(**{field: value}, temperature=0.0).temperature == 0
    assert SamplingParams(top_k=-1, top_p=1, min_p=0).temperature == 0


def test_whole_numbers_of_numpy_are_taken_as_such():
    params = SamplingParams(max_tokens=np.int8(3), top_k=np.int8(4), temperature=1.0, n=np.int64(2), seed=np.uint32(1))
    assert {type(x) for x in (params.max_tokens, params.top_k, params.n, params.seed)} == {int}
    assert len(make_rows([[5] * 200], [params], ())) == 2


def test_only_filters_that_a_sampled_row_uses_are_needed():
    greedy = SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.1)
    sampled = SamplingParams(temperature=1.0)
    assert Filters.needed([]) == Filters.needed([greedy]) == Filters()
    assert Filters.needed([greedy, sampled]) == Filters(sample=True)
    assert Filters.needed([replace(sampled, top_k=3), sampled]) == Filters(sample=True, top_k=True)
    assert Filters.needed([greedy, replace(sampled, top_p=0.9)]) == Filters(sample=True, top_p=True)
    assert Filters.needed([replace(sampled, min_p=0.1)]) == Filters(sample=True, min_p=True)
    assert Filters.needed([replace(greedy, temperature=0.1)]) == ALL


# Warping


def golden_rows(golden) -> tuple[dict[str, np.ndarray], RowSampling]:
    data = dict(np.load(golden / "warpers.npz"))
    columns = (data[name] for name in ("temperature", "top_k", "top_p", "min_p"))
    return data, RowSampling(np.zeros((len(data["logits"]), 2), np.uint32), *columns)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_warp_equals_hf(golden):
    """All of HF's settings side by side in one batch, ties and top_k above the vocabulary among them."""
    data, rows = golden_rows(golden)
    warped = np.asarray(run_warp(data["logits"][:, None], rows, filters=ALL))[:, 0]
    np.testing.assert_array_equal(warped > -np.inf, data["kept"])
    np.testing.assert_allclose(softmax(warped), data["probability"], atol=1e-6)


@pytest.mark.parametrize("field", ["top_k", "top_p", "min_p"])
def test_filters_left_out_of_the_program_change_nothing(golden, field):
    """A program with one filter serves the rows that use no other, to the last bit."""
    data, rows = golden_rows(golden)
    off = dict(top_k=0, top_p=1, min_p=0)
    alone = np.all([data[name] == value for name, value in off.items() if name != field], axis=0)
    whole = np.asarray(run_warp(data["logits"][:, None], rows, filters=ALL))
    part = np.asarray(run_warp(data["logits"][:, None], rows, filters=Filters(sample=True, **{field: True})))
    assert alone.sum() >= 8
    np.testing.assert_array_equal(part[alone], whole[alone])


def settings(*params: SamplingParams) -> RowSampling:
    return RowSampling.stack(list(params), seed_keys(0, len(params)))


def test_ties_extremes_and_greedy_rows():
    """Four rows in one batch: equal logits, a tiny top_p, top_k above the vocabulary, and a greedy one."""
    on = SamplingParams(temperature=1.0)
    rows = settings(
        replace(on, top_k=2),
        replace(on, top_p=1e-9),
        replace(on, top_k=10**9),
        SamplingParams(temperature=0, top_k=1, top_p=0.1),
    )
    logits = np.array(
        [[3, 1, -0.0, 1, 0.0, -2], [0, 5, 4.999, -1, 2, 3], [1, 2, 3, 4, 5, 6], [0.3, -7, 0, 2, 9, 1]], "f"
    )
    warped = np.asarray(run_warp(logits[:, None], rows, filters=ALL))[:, 0]
    kept = [np.flatnonzero(row > -np.inf).tolist() for row in warped]
    assert kept[0] == [0, 1, 3]  # both equal to the second largest stay
    assert kept[1] == [1]
    assert kept[2] == list(range(6))
    np.testing.assert_array_equal(warped[3], logits[3])

    rows = settings(*(replace(on, top_k=k) for k in (3, 4, 1, 6)))
    warped = np.asarray(run_warp(np.tile(logits[:1, None], (4, 1, 1)), rows, filters=ALL))[:, 0]
    # 0.0 and -0.0 are equal, so neither is kept without the other.
    assert [int((row > -np.inf).sum()) for row in warped] == [3, 5, 1, 6]


def test_what_top_p_keeps_depends_on_no_order():
    """The same tokens wherever they stand in the vocabulary, and their mass is what float64 says it is."""
    rng = np.random.default_rng(3)
    V = 50_000
    top_p = [0.3, 0.9, 0.99, 0.9999]
    rows = settings(*(SamplingParams(temperature=1.0, top_p=p) for p in top_p))
    logits = (3 * rng.standard_normal((4, 1, V))).astype(np.float32)
    filters = Filters(sample=True, top_p=True)
    kept = np.asarray(run_warp(logits, rows, filters=filters))[:, 0] > -np.inf
    for _ in range(3):
        order = rng.permutation(V)
        again = np.asarray(run_warp(logits[:, :, order], rows, filters=filters))[:, 0] > -np.inf
        np.testing.assert_array_equal(again, kept[:, order])
    mass = np.where(kept, softmax(logits[:, 0]), 0).sum(-1)
    least = np.where(kept, softmax(logits[:, 0]), 1).min(-1)
    assert (mass > np.array(top_p) - 3e-5).all() and (mass - least < np.array(top_p) + 3e-5).all()


def test_min_p_of_one_keeps_the_best_only():
    rows = settings(SamplingParams(temperature=0.5, min_p=1.0), SamplingParams(temperature=0.5, min_p=0.5))
    logits = np.log(np.array([[0.6, 0.4], [0.55, 0.45]], "f"))[:, None]
    warped = np.asarray(run_warp(logits, rows, filters=ALL))[:, 0]
    assert (warped > -np.inf).tolist() == [[True, False], [True, True]]  # (0.45 / 0.55)^2 = 0.67


# Noise


def test_noise_depends_on_seed_position_and_token_alone():
    """Some ids, other shapes, other orders, other company: the same bits. So it can be sharded over the vocabulary."""
    rng = np.random.default_rng(0)
    keys = seed_keys(7, 3)
    position = np.array([[0, 1, 5], [2**20, 9, 9], [3, 3, 4]], np.int32)
    V = 1003
    whole = np.asarray(run_gumbel(keys, position, np.arange(V)))
    assert whole.shape == (3, 3, V) and whole.dtype == np.float32

    order = rng.permutation(V)
    np.testing.assert_array_equal(run_gumbel(keys, position, order), whole[:, :, order])
    some = np.r_[rng.integers(0, V, 76), V - 1]
    np.testing.assert_array_equal(run_gumbel(keys, position, some), whole[:, :, some])
    own = rng.integers(0, V, (3, 3, 5))  # other ids at every node
    np.testing.assert_array_equal(run_gumbel(keys, position, own), np.take_along_axis(whole, own, axis=2))
    np.testing.assert_array_equal(run_gumbel(keys[1:2], position[1:2, :1], np.arange(V)), whole[1:2, :1])
    np.testing.assert_array_equal(whole[1, 1], whole[1, 2])  # one position, asked for twice


def test_noise_differs_between_seeds_positions_and_tokens():
    noise = np.asarray(run_gumbel(seed_keys(1, 4), np.tile(np.arange(8), (4, 1)), np.arange(64))).reshape(32, 64)
    assert len(np.unique(noise)) > 0.999 * noise.size
    correlation = np.corrcoef(noise) - np.eye(32)
    assert np.abs(correlation).max() < 5.5 / np.sqrt(64)


def test_noise_is_gumbel():
    """Moments, and the upper tail, where the winners of an argmax over a large vocabulary lie."""
    position = np.tile(np.arange(10), (4, 1))
    noise = np.asarray(run_gumbel(seed_keys(2, 4), position, np.arange(100_000))).astype(np.float64)
    n = noise.size
    assert abs(noise.mean() - np.euler_gamma) < 5 * np.pi / np.sqrt(6 * n)
    assert abs(noise.var() - np.pi**2 / 6) < 0.02
    edges = np.array([-np.inf, -2.2, -1.8, -1.5, -1, -0.5, 0, 0.5, 1, 2, 3, 5, 7, 9, 11, np.inf])
    law = np.diff(np.exp(-np.exp(-edges)))
    counts = np.histogram(noise, edges)[0]
    assert helpers.chi_square_p(counts, law) > 1e-4
    assert counts[-1] > 0


def test_threefry_is_that_of_jax():
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 2**32, 1000, dtype=np.uint32) for _ in range(4)]
    np.testing.assert_array_equal(jax.jit(threefry)(*words), threefry2x32_p.bind(*words)[0])


def test_noise_of_given_bits():
    """From the rarest bits to the most: finite, ordered, and exact up to 22.9 (24 bits would cut it off at 17)."""
    bits = np.array(
        [0, 1, 2, 255, 2**8 + 1, 2**16, 2**24, 2**24 + 1, 2**31, 2**32 - 2**13, 2**32 - 2**9, 2**32 - 1], np.uint32
    )
    noise = np.asarray(jax.jit(gumbel_of_bits)(bits))
    exact = -np.log(-np.log1p(-(bits.astype(np.float64) + 0.5) / 2**32))
    assert np.isfinite(noise).all() and noise[0] > 22.8
    assert (np.diff(noise) <= 0).all()
    np.testing.assert_allclose(noise[:-2], exact[:-2], rtol=1e-5, atol=1e-6)


# Choosing


@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=1.0), SamplingParams(temperature=1.6, top_k=7, top_p=0.9, min_p=0.03)],
    ids=["plain", "filtered"],
)
def test_chosen_tokens_follow_the_warped_softmax(params):
    """1e5 draws; three positions of each row, so that neighbouring positions are tested as a pair too."""
    B, V = 100_000, 11
    logits_V = 1.5 * np.random.default_rng(4).standard_normal(V).astype(np.float32)
    rows, filters = helpers.same_for_all_rows(params, B), Filters.needed([params])
    warped = np.asarray(run_warp(logits_V[None, None], jax.tree.map(lambda x: x[:1], rows), filters=filters))[0, 0]
    law = softmax(warped)
    position = np.broadcast_to(np.arange(2, dtype=np.int32), (B, 2))
    chosen = np.asarray(run_choose(np.broadcast_to(logits_V, (B, 2, V)), position, rows, filters=filters))
    for column in chosen.T:
        assert helpers.chi_square_p(np.bincount(column, minlength=V), law) > 1e-4
    pairs = np.bincount(chosen @ np.array([V, 1]), minlength=V * V)
    assert helpers.chi_square_p(pairs, np.outer(law, law)) > 1e-4


def test_rare_tokens_are_not_starved():
    """100 tokens of probability 2e-5 together come up as often as they should: 1e5 draws, about 200 times."""
    V, B = 101, 100_000
    logits_V = np.log(np.r_[1 - 2e-3, np.full(V - 1, 2e-3 / (V - 1))]).astype(np.float32)
    rows = helpers.same_for_all_rows(SamplingParams(temperature=1.0), 50, seed=9)
    position = np.tile(np.arange(B // 50, dtype=np.int32), (50, 1))
    chosen = np.asarray(run_choose(logits_V[None, None], position, rows, filters=Filters(sample=True)))
    rare = int((chosen > 0).sum())
    assert abs(rare - 200) < 5 * np.sqrt(200)


def test_greedy_rows_in_a_sampled_batch_are_greedy():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 3, 50)).astype(np.float32)
    logits[1, 0] = 0.0  # nothing known: the first token, not a random one
    logits[2] *= 100  # by the coldest temperature of float32 they would be infinite
    params = [SamplingParams(temperature=t) for t in (1.0, 0.0, 1.2e-38, 2.0)]
    position = np.tile(np.arange(3, dtype=np.int32), (4, 1))
    chosen = np.asarray(run_choose(logits, position, settings(*params), filters=ALL))
    np.testing.assert_array_equal(chosen[1:3], logits[1:3].argmax(-1))
    plain = np.asarray(run_choose(logits, position, settings(*params), filters=Filters()))
    np.testing.assert_array_equal(plain, logits.argmax(-1))
    # A row's tokens do not depend on its company.
    rows = jax.tree.map(lambda x: np.asarray(x)[[3, 3, 1, 0]], settings(*params))
    again = np.asarray(run_choose(logits[[3, 3, 1, 0]], position, rows, filters=ALL))
    np.testing.assert_array_equal(again, chosen[[3, 3, 1, 0]])


def test_bad_logits_choose_some_token():
    """Padding rows and broken models: whatever the logits hold, the choice is an id."""
    logits = np.zeros((4, 3, 50), np.float32)
    logits[1], logits[2], logits[3, :, 7] = np.nan, -np.inf, np.inf
    position = np.tile(np.arange(3, dtype=np.int32), (4, 1))
    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1)):
        chosen = np.asarray(run_choose(logits, position, settings(*[params] * 4), filters=ALL))
        assert chosen.dtype == np.int32 and ((chosen >= 0) & (chosen < 50)).all()


def test_seed_keys():
    np.testing.assert_array_equal(seed_keys(5, 3), seed_keys(5, 3))
    np.testing.assert_array_equal(seed_keys(5, 8)[:3], seed_keys(5, 3))  # sample i does not depend on n
    assert seed_keys(5, 3).dtype == np.uint32 and seed_keys(5, 3).shape == (3, 2)
    keys = np.concatenate([seed_keys(seed, 50) for seed in (0, 1, 2, 2**32, 2**64 - 1, drawn_seed(), drawn_seed())])
    assert len(np.unique(keys, axis=0)) == len(keys)


# Drafting with the target's noise


@pytest.mark.parametrize(("error", "one", "four"), [(0.5, 0.77, 0.98), (1.0, 0.58, 0.90)])
def test_coupled_drafting_accepts_as_often_as_the_simulation_says(error, one, four):
    """The design's simulation, run through the drafter's own ranking: draft logits = target logits + N(0, error^2).

    The design does not name the law of the target's logits. N(0, 3^2) over 2,000 tokens reproduces every number it does
    name: an optimum 1 - TV of 0.82 / 0.64, argmax of q 0.22 / 0.17, the top 4 of q 0.42 / 0.35.
    """
    B, V = 2000, 2000
    rng = np.random.default_rng(0)
    target = 3 * rng.standard_normal((B, 1, V), np.float32)
    guess = target + error * rng.standard_normal((B, 1, V), np.float32)
    overlap = np.minimum(softmax(target), softmax(guess)).sum(-1).mean()
    assert overlap == pytest.approx({0.5: 0.82, 1.0: 0.64}[error], abs=0.02)

    rows, filters = helpers.same_for_all_rows(SamplingParams(temperature=1.0), B), Filters(sample=True)
    position = np.arange(B, dtype=np.int32)[:, None]
    head = types.SimpleNamespace(vocab_axis="vocab", draft_to_target=None)

    @jax.jit
    def run(target, guess, rows):
        children, score = draft._children(head, guess, position, rows, filters, 4)
        return choose(target, position, rows, filters), children[:, 0], score[:, 0]

    chosen, children, score = (np.asarray(x) for x in run(target, guess, rows))
    assert (score <= 0).all() and (np.diff(score, axis=1) <= 0).all()
    hit = children == chosen
    tolerance = 3 * np.sqrt(one * (1 - one) / B) + 0.005  # the design's numbers are rounded
    assert hit[:, 0].mean() > one - tolerance
    tolerance = 3 * np.sqrt(four * (1 - four) / B) + 0.005
    assert hit.any(axis=1).mean() > four - tolerance
    # Without the noise the same head guesses the mode: far worse.
    assert (guess.argmax(-1) == chosen).mean() < 0.3


def test_children_in_target_ids_greedy_and_sampled():
    """A head of a reduced vocabulary names target ids and draws the noise of those ids; NaN is never a guess."""
    ids = np.array([4, 40, 7, 70, 12], np.int32)
    head = types.SimpleNamespace(vocab_axis="vocab", draft_to_target=jnp.asarray(ids))
    logits = np.log(np.array([[[0.1, 0.2, 0.3, 0.15, 0.25]]] * 3, np.float32))
    logits[2, 0] = np.nan
    rows = settings(SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0))
    position = np.full((3, 1), 5, np.int32)

    def run(logits, rows):
        return draft._children(head, logits, position, rows, Filters(sample=True), 5)

    children, score = (np.asarray(x)[:, 0] for x in jax.jit(run)(logits, rows))
    assert children[0].tolist() == [7, 12, 40, 70, 4]
    np.testing.assert_allclose(np.exp(score[0]), [0.3, 0.25, 0.2, 0.15, 0.1], rtol=1e-5)
    noisy = logits[1, 0] + np.asarray(run_gumbel(rows.seed_B2, position, ids))[1, 0]
    assert children[1].tolist() == ids[np.argsort(-noisy)].tolist()
    np.testing.assert_allclose(score[1], np.sort(np.log(softmax(noisy / draft.COUPLING)))[::-1], rtol=1e-4)
    assert (score[2] == -np.inf).all()


def test_tokens_the_filters_drop_rank_last():
    logits = np.log(np.array([[[0.1, 0.2, 0.3, 0.15, 0.25]]] * 2, np.float32))
    rows = settings(*[SamplingParams(temperature=1.0, top_k=2)] * 2)

    def run(logits, rows):
        head = types.SimpleNamespace(vocab_axis="vocab", draft_to_target=None)
        return draft._children(head, logits, np.zeros((2, 1), np.int32), rows, Filters(sample=True, top_k=True), 5)

    children, score = (np.asarray(x)[:, 0] for x in jax.jit(run)(logits, rows))
    for row in range(2):
        assert set(children[row, :2]) == {2, 4} and set(children[row, 2:]) == {0, 1, 3}
        assert np.isfinite(score[row]).all() and (score[row, 2:] < -1000).all()
