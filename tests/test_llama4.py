"""Llama 4: what HF transformers computes, and the same text with and without a draft, across borders of chunks.

The goldens' chunks are 16 positions long and their texts up to 87, so prompts, trees and answers all cross borders.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_parity import TOLERANCE, full_logits

import convert
from jeagle import LLM, SamplingParams, moe
from jeagle.cache import Prefix
from jeagle.checkpoint import load_llama
from jeagle.config import ConfigError, EagleConfig, LlamaConfig
from jeagle.decode import Program
from jeagle.decoder import Batch, Decoder
from jeagle.draft import Candidates, select
from jeagle.eagle import EagleHead
from jeagle.llama import View
from jeagle.llama4 import Llama4, Llama4EagleHead, chunk_view, query_scale
from jeagle.llama4_config import Llama4Config, Llama4EagleConfig, TemperatureTuning
from jeagle.moe import Experts, run_experts
from jeagle.sampling import Filters, RowSampling, seed_keys
from jeagle.tree import OFF, DynamicTree, StaticTree

CONFIG = Llama4Config.tiny(num_layers=2, moe_layers=(1,), nope_layers=(1,))
CHUNK = CONFIG.attention_chunk
CHAIN, DYNAMIC = StaticTree.chain(3), DynamicTree(depth=3, top_k=2, total=7)
HEADS = {
    "eagle3": EagleConfig.for_target(CONFIG, "eagle3", draft_vocab_size=48),
    "meta": Llama4EagleConfig.for_target(CONFIG, num_layers=2, nope_layers=(1,)),
}


def numpy_experts(x_mD, expert_m, gate_up_ED2F, down_EFD):
    gate_up = np.einsum("md,mdcf->mcf", x_mD, gate_up_ED2F[expert_m])
    return np.einsum("mf,mfd->md", gate_up[:, 0] / (1 + np.exp(-gate_up[:, 0])) * gate_up[:, 1], down_EFD[expert_m])


# The model against HF's.


@pytest.fixture(scope="module", params=["llama4_scout", "llama4_maverick"])
def published(request, golden, tmp_path_factory):
    converted = tmp_path_factory.mktemp("llama4") / request.param
    convert.convert(golden / request.param, converted)
    with np.load(golden / request.param / "expected.npz") as expected:
        assert expected["margin"] > 100 * TOLERANCE
        return converted, {name: expected[name] for name in expected}


def test_logits_of_long_texts(published):
    """One forward over prompt and answer, and so over several chunks."""
    converted, expected = published
    texts = [[*expected[f"prompt_{i}"].tolist(), *expected[f"greedy_{i}"].tolist()] for i in range(3)]
    assert max(map(len, texts)) > 5 * CHUNK
    for i, logits_TV in enumerate(full_logits(load_llama(converted), texts)):
        prompt, greedy = expected[f"prompt_{i}"], expected[f"greedy_{i}"]
        np.testing.assert_allclose(logits_TV[: len(prompt)], expected[f"logits_{i}"], rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(logits_TV[len(prompt) - 1 : -1].argmax(-1), greedy)


def test_greedy_tokens(published):
    """Prompt chunks, cache and decode steps; the prompts' lengths are 2, 21 and 47."""
    converted, expected = published
    outputs = LLM(str(converted), prefill_chunk=8).generate(
        [expected[f"prompt_{i}"].tolist() for i in range(3)],
        SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True),
    )
    for i, output in enumerate(outputs):
        assert list(output.outputs[0].token_ids) == expected[f"greedy_{i}"].tolist()


# The text does not depend on speculation.


def sharpened(module, factor: float = 8.0):
    """Scales all matrices, so that random logits are peaked and greedy choices are no near-ties."""
    nnx.update(module, jax.tree.map(lambda x: x * factor if x.ndim > 1 else x, nnx.state(module, nnx.Param)))
    return module


def make_batch(seed: int, *, sampled: bool) -> Batch:
    """Six rows whose prompts end before, at and behind borders."""
    rng = np.random.default_rng(seed)
    lengths = [1, 14, 16, 17, 31, 48]
    params = [SamplingParams(temperature=t if sampled else 0.0) for t in (0.0, 0.7, 1.0, 0.0, 1.3, 1.0)]
    return Batch(
        prompts=[rng.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in lengths],
        sampling=RowSampling.stack(params, seed_keys(seed, 6)),
        stop_id_BI=np.full((6, 4), -1, np.int32),
        max_tokens_B=np.full(6, 40, np.int32),
    )


class Bench:
    """Decoders whose weights can be exchanged without compiling again."""

    def __init__(self) -> None:
        self.target = sharpened(Llama4(CONFIG, rngs=nnx.Rngs(0)))
        self.decoders = {
            None: Decoder(self.target, page_size=8),
            "eagle3": Decoder(self.target, EagleHead(HEADS["eagle3"], rngs=nnx.Rngs(1)), page_size=8),
            "meta": Decoder(self.target, Llama4EagleHead(HEADS["meta"], rngs=nnx.Rngs(1)), page_size=8),
        }

    def run(self, name: str | None, batch: Batch, plan, target=None, head=None):
        decoder, program = self.decoders[name], Program(plan=plan, filters=Filters(sample=True))
        kept = decoder.params
        decoder.params = tuple(p if m is None else nnx.state(m) for m, p in zip((target, head), kept, strict=True))
        state = decoder.launch(decoder.start(batch, program, capacity=96, chunk=8), program, 1000)
        decoder.params = kept
        return state


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def copying(model, *, attention: float = 0.0):
    """A model whose blocks add nothing: what comes next depends on the last token alone.

    attention: how much attention adds all the same.
    """
    rng = np.random.default_rng(7)
    for block in model.blocks:
        shape = block.out.kernel.shape
        block.out.kernel[...] = jnp.asarray(attention * rng.standard_normal(shape), jnp.float32)
        block.down.kernel[...] = jnp.zeros_like(block.down.kernel[...])
        if getattr(block, "experts", None) is not None:
            block.experts.down[...] = jnp.zeros_like(block.experts.down[...])
    return model


def copying_pair(attention: float = 0.0) -> tuple[Llama4, Llama4EagleHead]:
    """A head that is right wherever the target's attention does not matter."""
    target = copying(sharpened(Llama4(CONFIG, rngs=nnx.Rngs(3))), attention=attention)
    head = copying(Llama4EagleHead(HEADS["meta"], rngs=nnx.Rngs(1)))
    head.fc.kernel[...] = jnp.concatenate([jnp.eye(CONFIG.width), jnp.zeros((CONFIG.width, CONFIG.width))])
    head.norm.scale[...] = target.norm.scale[...]
    return target, head


@pytest.mark.parametrize(("name", "plan"), [("eagle3", CHAIN), ("meta", DYNAMIC)])
def test_random_heads_change_no_text(bench, name, plan):
    batch = make_batch(0, sampled=True)  # greedy rows beside sampled ones
    expected, got = bench.run(None, batch, OFF), bench.run(name, batch, plan)
    np.testing.assert_array_equal(got.text_BS, expected.text_BS)
    np.testing.assert_array_equal(got.num_output_B, 40)


@pytest.mark.parametrize("plan", [CHAIN, DYNAMIC], ids=["chain", "dynamic"])
def test_good_heads_change_no_text(bench, plan):
    """Drafts reach borders and attention sways the target: a node behind a border, if accepted, would show."""
    target, head = copying_pair(attention=0.05)
    accepted = 0
    for seed in range(4):
        batch = make_batch(seed, sampled=seed % 2 == 1)
        expected, got = bench.run(None, batch, OFF, target), bench.run("meta", batch, plan, target, head)
        np.testing.assert_array_equal(got.text_BS, expected.text_BS)
        accepted += int(got.num_output_B.sum() - got.num_rounds_B.sum())
    assert 0.2 < accepted / (4 * 6 * 40) < 0.75


def test_trees_are_cut_at_borders(bench):
    """Of a head that is always right, every round keeps all four tokens, but none that lies in the next chunk."""
    target, head = copying_pair()
    batch = make_batch(7, sampled=False)
    expected, got = bench.run(None, batch, OFF, target), bench.run("meta", batch, CHAIN, target, head)
    np.testing.assert_array_equal(got.text_BS, expected.text_BS)
    for row, prompt in enumerate(batch.prompts):
        length, left, rounds = len(prompt) - 1, 40, 0
        while left:
            kept = min(4, left, CHUNK - length % CHUNK) if length else 1  # nothing to draft from at the start
            length, left, rounds = length + kept, left - kept, rounds + 1
        assert int(got.num_rounds_B[row]) == rounds


def test_room(bench):
    target = bench.target
    np.testing.assert_array_equal(target.room_B(jnp.array([0, 1, 15, 16, 47])), [16, 15, 1, 16, 1])
    whole = Llama4(Llama4Config.tiny(attention_chunk=None), rngs=nnx.Rngs(0))
    assert whole.room_B(jnp.array([3])) is None
    candidates = Candidates(*(jnp.array([x]) for x in ([5, 6, 7], [-1.0, -2.0, -3.0], [-1, 0, 1], [1, 2, 3])))
    tree = select(jnp.array([4]), candidates, remaining_B=target.room_B(jnp.array([14])), plan=CHAIN)
    np.testing.assert_array_equal(tree.valid_BT, [[True, True, False, False]])


def test_prompt_chunks_must_not_cross_borders(bench):
    for positions in (1, 4, 8, 16, 32):
        bench.target.check_chunk(positions)
    with pytest.raises(ValueError, match=r"chunks of 12 positions cross .* attention_chunk 16; choose a prefill_chunk"):
        bench.target.check_chunk(12)
    with pytest.raises(ValueError, match="chunks of 24"):
        Llama4EagleHead(HEADS["meta"], rngs=nnx.Rngs(1)).check_chunk(24)


def test_shorter_chunks_must_not_cross_borders_either():
    """LLM halves its chunk where that pads less: 96 positions would cross the border at 64, 64 do not."""
    target = Llama4(
        Llama4Config.tiny(num_layers=2, moe_layers=(1,), nope_layers=(1,), attention_chunk=64), rngs=nnx.Rngs(0)
    )
    assert LLM(target, prefill_chunk=192)._chunks == [192]
    assert LLM(target, prefill_chunk=256)._chunks == [64, 128, 256]


def test_views_of_a_draft_that_runs_ahead():
    """Chunks of 4, five committed positions, a pending one at 5 and levels at 6, 7 and 8: 8 sees itself alone."""
    prefix = Prefix.full(jnp.zeros((1, 1), jnp.int32), jnp.array([5]))
    all_seen = jnp.ones((1, 1, 4), bool)
    for position, start, seen in ((7, 4, [1, 1, 1]), (8, 8, [0, 0, 0, 1])):
        keys = jnp.array([[5, 6, 7, 8][: len(seen)]])
        view = chunk_view(View(all_seen[..., : len(seen)], prefix), jnp.array([[position]]), keys, 4)
        np.testing.assert_array_equal(view.suffix_mask[0, 0], np.array(seen, bool))
        assert int(view.prefix.start_B[0]) == start


def test_query_scale():
    """HF's formula: positions 0..2 are in the first step of 4, position 3 (the fourth token) begins the second."""
    tuning = TemperatureTuning(floor_scale=4, attn_scale=0.5)
    scale = query_scale(tuning, jnp.array([[0, 2, 3, 7, 10]]))
    np.testing.assert_allclose(scale[0], 1 + 0.5 * np.log([1, 1, 2, 3, 3]), rtol=1e-6)
    assert query_scale(None, jnp.array([[0]])) is None


# Experts.


@pytest.mark.parametrize("rows", [1, 3, 17, 40])
@pytest.mark.parametrize("spread", ["one", "all", "two"])
def test_experts_against_numpy(rows, spread, monkeypatch):
    monkeypatch.setattr(moe, "BLOCK", 8)  # so that 17 rows are several blocks
    rng = np.random.default_rng(rows)
    E, D, F = 5, 8, 12
    x_mD, gate_up, down = (rng.standard_normal(s).astype(np.float32) for s in ((rows, D), (E, D, 2, F), (E, F, D)))
    expert_m = {"one": np.full(rows, 4), "all": rng.integers(0, E, rows), "two": rng.choice([0, 3], rows)}[spread]
    got = jax.jit(run_experts)(x_mD, jnp.asarray(expert_m, jnp.int32), gate_up, down)
    np.testing.assert_allclose(got, numpy_experts(x_mD, expert_m, gate_up, down), rtol=2e-5, atol=2e-5)


def test_unchosen_experts_are_not_read():
    """What nobody chose may even be NaN."""
    rng = np.random.default_rng(0)
    gate_up, down = (rng.standard_normal(s).astype(np.float32) for s in ((6, 8, 2, 4), (6, 4, 8)))
    gate_up[[0, 2, 5]], down[[0, 2, 5]] = np.nan, np.nan
    x_mD = rng.standard_normal((9, 8)).astype(np.float32)
    expert_m = jnp.array([1, 3, 4, 4, 3, 1, 1, 1, 3], jnp.int32)
    assert np.isfinite(jax.jit(run_experts)(x_mD, expert_m, gate_up, down)).all()


@pytest.mark.parametrize("per_token", [1, 2])
def test_routed_experts_against_numpy(per_token):
    """The sigmoid of the logit scales the expert's input; and no token depends on the others of the call."""
    experts = sharpened(Experts(16, 24, 6, per_token, dtype=jnp.float32, rngs=nnx.Rngs(2)))
    rng = np.random.default_rng(1)
    x_BTD = rng.standard_normal((3, 7, 16)).astype(np.float32)
    x_nD, router, gate_up, down = (
        x_BTD.reshape(21, 16),
        *(np.asarray(w[...]) for w in (experts.router, experts.gate_up, experts.down)),
    )
    logits = x_nD @ router
    expected = np.zeros_like(x_nD)
    for token, best in enumerate(np.argsort(-logits)[:, :per_token]):
        for e in best:
            score = 1 / (1 + np.exp(-logits[token, e]))
            expected[token] += numpy_experts(score * x_nD[token : token + 1], np.array([e]), gate_up, down)[0]
    np.testing.assert_allclose(experts(x_BTD).reshape(21, 16), expected, rtol=1e-4, atol=1e-5)
    alone = jnp.stack([experts(x_nD[None, None, i])[0, 0] for i in range(4)])
    np.testing.assert_allclose(alone, expected[:4], rtol=1e-4, atol=1e-5)


def test_rows_of_absent_experts_are_zeros():
    """Whole experts dealt out: two halves of the experts add up to all of them, for one row too."""
    rng = np.random.default_rng(4)
    gate_up, down = (rng.standard_normal(s).astype(np.float32) for s in ((4, 8, 2, 4), (4, 4, 8)))
    for rows in (1, 7):
        x_mD, expert_m = rng.standard_normal((rows, 8)).astype(np.float32), rng.integers(0, 4, rows)
        half = jax.jit(partial(run_experts, all_here=False))
        halves = [half(x_mD, jnp.asarray(expert_m - at, jnp.int32), gate_up[at:][:2], down[at:][:2]) for at in (0, 2)]
        np.testing.assert_allclose(sum(halves), numpy_experts(x_mD, expert_m, gate_up, down), rtol=2e-5, atol=2e-5)


# The description.


def test_config_round_trip_and_families():
    head = HEADS["meta"]
    assert Llama4Config.from_json(CONFIG.to_json()) == CONFIG
    assert Llama4EagleConfig.from_json(head.to_json()) == head
    for wrong, config in ((LlamaConfig, CONFIG), (Llama4Config, LlamaConfig.tiny()), (EagleConfig, head)):
        with pytest.raises(ConfigError, match="says family"):
            wrong.from_json(config.to_json())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts_per_token": 5}, "exceeds num_experts"),
        ({"moe_layers": (1, 2)}, r"moe_layers must list blocks in 0\.\.1"),
        ({"nope_layers": (1, 0)}, "nope_layers must list"),
        ({"attention_chunk": 0}, "attention_chunk must be"),
        ({"num_experts": 0}, "num_experts must be"),
        ({"mlp_bias": True}, "mlp_bias must be False"),
    ],
)
def test_config_mistakes(changes, said):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(CONFIG, **changes)


def test_num_parameters(bench):
    assert CONFIG.num_parameters == sum(x.size for x in jax.tree.leaves(nnx.state(bench.target, nnx.Param)))


def test_every_weight_names_its_axes(bench):
    for path, parameter in nnx.iter_graph(bench.target):
        if isinstance(parameter, nnx.Param):
            assert len(parameter.get_metadata()["axes"]) == parameter.ndim, path
