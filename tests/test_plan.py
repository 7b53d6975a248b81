"""The arithmetic of a plan: against figures worked out by hand, term by term, and what fits."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest

from jeagle.devices import DEVICES
from jeagle.floor import Job, expected_experts
from jeagle.footprint import FORMATS, PlanError, Split, cache_bytes, num_bytes, position_bytes, target_weights
from jeagle.plan import Plan, by_batch, check_fits, make_plan, with_draft
from jeagle.published import MEASURED
from jeagle.sizes import SIZES, head_for, size
from jeagle.tree import parse_tree

H100 = DEVICES["h100"]
BF16 = FORMATS["bfloat16"]
within = partial(pytest.approx, rel=0.02)


def job(model: str, devices: int = 8, dtype: str = "bfloat16", tree: str = "chain-3", tau: float = 2.8, **more) -> Job:
    target = size(model)
    plain = dict(head=None, tree=None, tokens_per_call=1.0) if tree == "off" else {}
    values = dict(
        name=model,
        target=target,
        head=head_for(target, "eagle3")[0],
        device=H100,
        split=Split(tensor=devices),
        format=FORMATS[dtype],
        context=8192,
        tree=parse_tree(tree),
        tokens_per_call=tau,
    )
    return Job(**{**values, **plain, **more})


def read_floor(model: str, dtype: str, nodes: int, devices: int) -> float:
    """ms to read the weights of a forward once, spread evenly."""
    tree = "off" if nodes == 1 else f"chain-{nodes - 1}"
    return make_plan(job(model, 1, dtype, tree=tree)).verify.weight_bytes / (devices * H100.bandwidth) * 1e3


# These figures were worked out by hand from published configs, one H100 being 3.35 TB/s and eight 26.8. They leave out
# scales (0.1% of FP8 weights), the router, and with a head its fc, which is read once per round (up to 0.7% of it); a
# plan counts them, so it lies a little above.


@pytest.mark.parametrize(
    ("model", "parameters", "read", "floors_on_8"),
    [
        ("llama-3.1-8b", 8.03e9, 7.50e9, (0.56, 0.28, 0.14)),
        ("llama-3.3-70b", 70.55e9, 69.5e9, (5.19, 2.59, 1.30)),
        ("llama-4-scout", 107.8e9, 16.1e9, (1.20, 0.60, 0.30)),
        ("llama-4-maverick", 400.7e9, 16.2e9, (1.21, 0.60, 0.30)),
    ],
)
def test_bytes_of_a_forward(model, parameters, read, floors_on_8):
    config = SIZES[model]
    assert config.num_parameters == within(parameters)
    assert num_bytes(target_weights(config, Split()), BF16) == 2 * config.num_parameters
    assert make_plan(job(model, 1, tree="off")).plain.weight_bytes == within(2 * read)
    for dtype, floor in zip(("bfloat16", "fp8", "int4"), floors_on_8, strict=True):
        assert read_floor(model, dtype, 1, 8) == within(floor)


@pytest.mark.parametrize(
    ("model", "dtype", "floor"),
    [
        ("llama-3.1-8b", "bfloat16", 4.48),
        ("llama-3.1-8b", "fp8", 2.24),
        ("llama-3.1-8b", "int4", 1.12),
        ("llama-3.3-70b", "fp8", 20.8),
        ("llama-3.3-70b", "int4", 10.4),
        ("llama-4-scout", "int4", 2.4),
    ],
)
def test_floor_on_one_device(model, dtype, floor):
    assert read_floor(model, dtype, 1, 1) == within(floor)


@pytest.mark.parametrize(
    ("model", "bytes_per_position", "gigabytes", "ms"),
    [
        ("llama-3.1-8b", 131e3, 1.07, 0.04),
        ("llama-3.3-70b", 328e3, 2.68, 0.10),
        ("llama-4-scout", 197e3, 1.61, 0.06),
        ("llama-4-maverick", 197e3, 1.61, 0.06),
    ],
)
def test_bytes_of_keys_and_values(model, bytes_per_position, gigabytes, ms):
    config = SIZES[model]
    assert config.num_layers * position_bytes(config, 1, BF16) == within(bytes_per_position)
    assert cache_bytes(config, 1, BF16, 1, 8192) == within(gigabytes * 1e9)
    assert make_plan(job(model)).plain.kv * 1e3 == pytest.approx(ms, abs=0.005)  # printed to two places


@pytest.mark.parametrize(
    ("nodes", "scout", "maverick"),
    [
        (1, (16.1, 0.60), (16.2, 0.60)),
        (4, (32.1, 1.20), (25.1, 0.94)),
        (8, (49.1, 1.83), (36.6, 1.37)),
        (16, (72.3, 2.70), (58.7, 2.19)),
        (32, (94.5, 3.53), (98.9, 3.69)),
        (60, (104.7, 3.91), (158.2, 5.90)),
    ],
)
def test_more_nodes_read_more_experts(nodes, scout, maverick):
    for model, (billions, floor) in (("llama-4-scout", scout), ("llama-4-maverick", maverick)):
        ms = read_floor(model, "fp8", nodes, 8)
        assert ms == within(floor)
        assert ms * 8 * H100.bandwidth * 1e-3 == within(billions * 1e9)
    for model, billions, floor in (("llama-3.1-8b", 7.5, 0.28), ("llama-3.3-70b", 69.5, 2.59)):
        assert read_floor(model, "fp8", nodes, 8) == within(floor), billions


@pytest.mark.parametrize(
    ("model", "kind", "gigabytes", "ms_on_one"),
    [
        ("llama-3.1-8b", "eagle3", 0.75, 0.22),
        ("llama-3.1-8b", "eagle1", 1.55, 0.46),
        ("llama-4-scout", "eagle3", 1.53, 0.46),
        # "about 1.3 GB" there; its 0.38 ms is 1.27 GB, as here.
        ("llama-3.3-70b", "eagle3", 1.27, 0.38),
    ],
)
def test_bytes_of_a_draft_step(model, kind, gigabytes, ms_on_one):
    head = head_for(SIZES[model], kind)[0]
    step = make_plan(job(model, 1, head=head)).drafts[1]  # the first also reads fc
    assert step.weight_bytes == within(gigabytes * 1e9)
    assert step.weights * 1e3 == within(ms_on_one)


@pytest.mark.parametrize(
    ("model", "devices", "dtype", "tree", "tau", "verify", "ceiling"),
    [
        ("llama-3.1-8b", 8, "bfloat16", "chain-3", 2.79, 0.56, 4300),
        ("llama-3.1-8b", 8, "bfloat16", "dynamic-7-10-60", 6.13, 0.56, 8000),
        ("llama-3.1-8b", 1, "bfloat16", "chain-3", 2.79, 4.48, 540),
        ("llama-3.1-8b", 1, "bfloat16", "dynamic-7-10-60", 6.13, 4.48, 1015),
        ("llama-3.3-70b", 8, "bfloat16", "chain-3", 2.95, 5.19, 553),
        ("llama-3.3-70b", 8, "bfloat16", "dynamic-7-10-60", 5.63, 5.19, 1020),
        ("llama-3.3-70b", 8, "fp8", "chain-3", 2.95, 2.59, 1080),
        ("llama-4-scout", 8, "fp8", "chain-3", 2.86, 1.20, 2090),
        ("llama-4-maverick", 8, "fp8", "chain-3", 2.79, 0.94, 2510),
        ("llama-4-maverick", 8, "int4", "chain-3", 2.79, 0.47, 4360),
        ("llama-4-maverick", 8, "fp8", "dynamic-7-10-60", 4.0, 5.90, 630),
    ],
)
def test_floor_with_a_head(model, devices, dtype, tree, tau, verify, ceiling):
    """Tokens per second, as ms per token are printed to two places only (0.124 as 0.12)."""
    plan = make_plan(job(model, devices, dtype, tree, tau))
    assert len(plan.drafts) == (3 if tree == "chain-3" else 7)
    assert read_floor(model, dtype, parse_tree(tree).num_nodes, devices) == within(verify)
    assert 1 / plan.weight_floor == within(ceiling)


def test_where_meta_stands():
    """10x above the weights' floor; 6.0x above it with keys, all-reduces and fc counted."""
    plan = make_plan(job("llama-4-maverick", 8, "fp8", tau=2.79))
    (meta,) = (m for m in MEASURED if m.who.startswith("Meta"))
    assert meta.seconds_per_token / plan.weight_floor == pytest.approx(10, rel=0.02)
    assert meta.seconds_per_token / plan.seconds_per_token == pytest.approx(6.0, rel=0.02)
    # 96 all-reduces of 5.9 us are 0.57 ms there; the embedding's and the choice's are two more.
    assert plan.plain.all_reduces == 98 and plan.plain.collectives * 1e3 == within(98 * 5.9e-3)


# The model of time.


def test_expected_experts():
    assert expected_experts(16, 0) == 0
    assert expected_experts(16, 1) == pytest.approx(1)
    assert expected_experts(2, 2) == pytest.approx(1.5)  # of four equally likely pairs two hit both
    assert expected_experts(16, 10_000) == pytest.approx(16)
    rng = np.random.default_rng(0)
    hit = np.mean([len(set(rng.integers(0, 128, 64))) for _ in range(2000)])
    assert expected_experts(128, 64) == pytest.approx(hit, rel=0.01)


def test_terms_add_up():
    for model in ("llama-3.1-8b", "llama-4-scout"):
        for plan in by_batch(job(model, 8, "fp8")):
            assert sum(plan.terms.values()) == pytest.approx(plan.round_seconds)
            assert plan.speed_up == pytest.approx(plan.plain.seconds * 2.8 / plan.round_seconds)
            assert plan.tokens_per_second * plan.seconds_per_token == pytest.approx(plan.job.batch)


def test_what_binds():
    assert make_plan(job("llama-3.1-8b", 1)).binds == "weights"
    assert make_plan(job("llama-3.1-8b", 1, context=131072, batch=8)).binds == "KV"
    assert make_plan(job("llama-3.1-8b", 1, context=64, batch=256, tree="dynamic-7-10-60")).binds == "compute"
    assert make_plan(job("llama-3.2-1b", 8, link_latency=20e-6)).binds == "collectives"
    assert make_plan(job("llama-3.1-8b", 1)).verify.collectives == 0


def test_efficiency_and_latency():
    one, half = (make_plan(job("llama-3.1-8b", efficiency=e)) for e in (1.0, 0.5))
    work = one.plain.seconds - one.plain.collectives
    assert half.plain.seconds == pytest.approx(2 * work + one.plain.collectives)
    assert half.weight_floor == one.weight_floor
    slow = make_plan(job("llama-3.1-8b", link_latency=20e-6))
    assert slow.plain.seconds - one.plain.seconds == pytest.approx(66 * (20e-6 - H100.link_latency))


def test_chunked_layers_read_their_chunk():
    """Twelve of 48 layers see all of 64k positions, the others 8k; the cache holds all of them everywhere."""
    short, long = (make_plan(job("llama-4-scout", context=n)) for n in (8192, 65536))
    assert long.plain.kv == pytest.approx(short.plain.kv * (12 * 8 + 36) / 48)
    assert long.memory.cache == 8 * short.memory.cache


def test_data_parallel_rows_are_shared_and_weights_are_not():
    one = make_plan(job("llama-3.1-8b", split=Split(tensor=4), batch=4))
    two = make_plan(job("llama-3.1-8b", split=Split(data=2, tensor=4), batch=8))
    assert two.memory == one.memory and two.round_seconds == one.round_seconds
    assert two.tokens_per_second == pytest.approx(2 * one.tokens_per_second)
    assert two.largest_batch == 2 * one.largest_batch
    assert [plan.job.batch for plan in by_batch(two.job)] == [2, 4, 8, 16, 32, 64, 128, 256]
    three = job("llama-3.1-8b", split=Split(data=3), batch=3)
    assert [plan.job.batch for plan in by_batch(three, (1, 2, 4, 8))] == [3, 6, 9]


def test_head_split_or_whole():
    split, whole = with_draft(job("llama-3.1-8b"))
    assert (split.job.split.draft, whole.job.split.draft) == ("tensor", "replicated")
    assert whole.memory.draft_weights > 4 * split.memory.draft_weights
    # A whole head still reads the target's embedding, which is split: one all-reduce per step.
    # Of a split head fc is another, once per round.
    assert [d.all_reduces for d in whole.drafts] == [1, 1, 1] and [d.all_reduces for d in split.drafts] == [5, 4, 4]
    # Where all-reduces are dear and the head is small, whole is faster.
    assert with_draft(job("llama-3.2-1b", link_latency=50e-6))[0].job.split.draft == "replicated"
    odd = dataclasses.replace(head_for(SIZES["llama-3.1-8b"], "eagle3")[0], mlp_width=1001)
    (only,) = with_draft(job("llama-3.1-8b", head=odd))
    assert only.job.split.draft == "replicated"


def test_experts_dealt_out():
    """The device whose expert it is reads all of it; with many tokens both ways read alike."""
    mlp, dealt = (make_plan(job("llama-4-maverick", split=Split(tensor=8, experts=e))) for e in ("mlp", "experts"))
    assert mlp.memory.weights == dealt.memory.weights
    assert dealt.plain.weight_bytes > 2 * mlp.plain.weight_bytes
    many = [make_plan(dataclasses.replace(p.job, batch=256)).plain.weight_bytes for p in (mlp, dealt)]
    assert many[0] == many[1]


def test_a_compiled_program_may_take_the_estimates_place():
    plan = make_plan(job("llama-3.1-8b"))
    memory = dataclasses.replace(plan.memory, temp=10**12, measured=True)
    compiled = dataclasses.replace(plan, memory=memory, all_reduces=7, kernels=900)
    assert not compiled.fits and compiled.speed_up == plan.speed_up


# What fits.


def test_largest_batch_and_context_are_the_last_that_fit():
    for plan in (make_plan(job("llama-3.1-8b", 1)), make_plan(job("llama-4-maverick", 8, "fp8", batch=4))):
        batch, context = plan.largest_batch, plan.largest_context
        assert make_plan(dataclasses.replace(plan.job, batch=batch)).fits
        assert not make_plan(dataclasses.replace(plan.job, batch=batch + 1)).fits
        assert make_plan(dataclasses.replace(plan.job, context=context)).fits
        assert context == plan.job.target.max_position or context % 64 == 0
        if context < plan.job.target.max_position:
            assert not make_plan(dataclasses.replace(plan.job, context=context + 1)).fits
    assert make_plan(job("llama-3.3-70b", 1)).largest_batch == 0


def refusal(plan: Plan) -> str:
    with pytest.raises(PlanError) as error:
        check_fits(plan)
    return str(error.value)


def test_what_does_not_fit():
    said = refusal(make_plan(job("llama-3.3-70b", 1)))
    plan = make_plan(job("llama-3.3-70b", 1))
    assert f"needs {plan.memory.total / 1e9:.1f} GB on each of 1 H100" in said
    assert f"{plan.memory.total / 1e9 - 72:.1f} GB more than the 72.0 GB" in said
    assert said.endswith("what fits: 4 devices")  # int4 would fit, but nothing here loads it
    check_fits(make_plan(job("llama-3.3-70b", 4)))
    check_fits(make_plan(job("llama-3.3-70b", 1, "int4")))
    # 801 GB on 640; 16 devices do not divide 40 heads, 10 or 20 would.
    assert "what fits: weights in fp8" in refusal(make_plan(job("llama-4-maverick", 8)))
    too_many = refusal(make_plan(job("llama-3.1-8b", 1, batch=256)))
    most = make_plan(job("llama-3.1-8b", 1)).largest_batch
    assert f"what fits: a batch of at most {most}; a context of at most" in too_many
    with pytest.raises(PlanError, match="no number of devices up to 64 and no format here helps"):
        check_fits(make_plan(job("llama-3.1-405b", 1, memory_fraction=0.001)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch=0), "batch must be at least 1, got 0"),
        (dict(context=131073), "context must be at most 131072, the max_position of llama-3.1-8b, got 131073"),
        (dict(efficiency=1.5), "efficiency must be above 0 and at most 1, got 1.5"),
        (dict(memory_fraction=0.0), "memory_fraction must be above 0"),
        (dict(link_latency=-1.0), "link_latency must not be negative"),
        (dict(split=Split(data=2, tensor=4)), "a batch of 1 rows does not divide over a data axis of 2"),
        (dict(tokens_per_call=4.5), "tokens_per_call must lie in 1..4, what this tree can yield, got 4.5"),
        (dict(tokens_per_call=float("nan")), "tokens_per_call must lie in 1..4"),
        (dict(head=None), "a draft needs a tree and a tree needs a draft"),
        (dict(tree=parse_tree("off"), tokens_per_call=1.0), "a draft needs a tree and a tree needs a draft"),
    ],
)
def test_jobs_that_make_no_sense(changes, message):
    with pytest.raises(PlanError) as error:
        job("llama-3.1-8b", **changes)
    assert message in str(error.value)
