"""The text does not depend on speculation: speculative tokens equal plain tokens, whatever the head, tree or sampling.

One batch shape and a handful of compiled programs; hypothesis varies everything that is data: ragged prompts, limits
that end rows in waves, stop ids, temperatures, filters, seeds. Heads are arguments of a program too, so good, bad and
broken heads of one configuration share it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jeagle import LLM
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.decode import DecodeState, Program
from jeagle.decoder import Batch, Decoder
from jeagle.eagle import EagleHead
from jeagle.fp8 import FP8
from jeagle.llama import Llama
from jeagle.sampling import Filters, RowSampling, SamplingParams, seed_keys
from jeagle.tree import OFF, DynamicTree, StaticTree, TreePlan

CONFIG = LlamaConfig.tiny()
B, CAPACITY, CHUNK, PAGE = 8, 96, 16, 16
EVERY_FILTER = Filters(sample=True, top_k=True, top_p=True, min_p=True)
BUSH = StaticTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))
DYNAMIC = DynamicTree(depth=3, top_k=3, total=9)

HEADS = {
    "eagle1": EagleConfig.for_target(CONFIG, "eagle1"),
    "eagle3": EagleConfig.for_target(
        CONFIG, "eagle3", draft_vocab_size=48, tap_norm="each", norm_output=True, num_layers=2
    ),
    "meta": EagleConfig.for_target(CONFIG, "meta"),
}


def sharpened(module: nnx.Module, factor: float = 8.0) -> nnx.Module:
    """Scales all matrices, so that random logits are peaked and greedy choices are no near-ties."""
    nnx.update(module, jax.tree.map(lambda x: x * factor if x.ndim > 1 else x, nnx.state(module, nnx.Param)))
    return module


def markov_target(attention: float = 0.0) -> Llama:
    """A target whose next token depends on the last one alone: blocks add nothing to the residual stream.

    attention: how much attention adds all the same.
    """
    target = sharpened(Llama(CONFIG, rngs=nnx.Rngs(3)))
    rng = np.random.default_rng(7)
    for block in target.blocks:
        shape = block.out.kernel.shape
        noise = rng.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[:-1]))
        block.out.kernel[...] = jnp.asarray(attention * noise)
        block.down.kernel[...] = jnp.zeros_like(block.down.kernel[...])
    return target


def markov_head(target: Llama, *, wrong: bool = False) -> EagleHead:
    """Meta's form, set to compute just what ``markov_target`` does, or (``wrong``) its opposite."""
    head = EagleHead(HEADS["meta"], rngs=nnx.Rngs(0))
    D = CONFIG.width
    head.fc.kernel[...] = jnp.concatenate([jnp.eye(D), jnp.zeros((D, D))])  # the embedding passes, the feature does not
    for block in head.blocks:
        block.out.kernel[...] = jnp.zeros_like(block.out.kernel[...])
        block.down.kernel[...] = jnp.zeros_like(block.down.kernel[...])
    head.norm.scale[...] = target.norm.scale[...] * (-1 if wrong else 1)
    return head


class Bench:
    """Decoders of one target configuration, whose weights can be exchanged without compiling again."""

    def __init__(self, **options) -> None:
        self.target = sharpened(Llama(CONFIG, rngs=nnx.Rngs(0)))
        self.plain = Decoder(self.target, page_size=PAGE, **options)
        self.decoders = {
            name: Decoder(self.target, EagleHead(config, rngs=nnx.Rngs(1)), page_size=PAGE, **options)
            for name, config in HEADS.items()
        }

    def run(self, name: str | None, batch: Batch, plan: TreePlan, *, target=None, head=None, filters=EVERY_FILTER):
        decoder = self.plain if name is None else self.decoders[name]
        kept = decoder.params
        modules = (target, head)
        decoder.params = tuple(p if m is None else nnx.state(m) for m, p in zip(modules, kept, strict=True))
        program = Program(plan=plan, filters=filters)
        state = decoder.start(batch, program, capacity=CAPACITY, chunk=CHUNK)
        state = decoder.launch(state, program, 1000)
        decoder.params = kept
        return state


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def same_tokens(plain: DecodeState, speculative: DecodeState) -> None:
    for field in ("num_output_B", "finish_B", "text_BS"):
        np.testing.assert_array_equal(getattr(plain, field), getattr(speculative, field), err_msg=field)
    emitted = np.asarray(speculative.acceptance_BP) @ (1 + np.arange(speculative.acceptance_BP.shape[1]))
    np.testing.assert_array_equal(emitted, speculative.num_output_B)
    np.testing.assert_array_equal(speculative.num_rounds_B, np.asarray(speculative.acceptance_BP).sum(1))


@st.composite
def batches(draw, *, greedy: bool = False) -> Batch:
    """1 to 8 rows, ragged, ending in waves; the rest of the batch is padding."""
    rows = draw(st.integers(1, B))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = [draw(st.sampled_from([1, 2, 3, 15, 16, 17, 18, 33, 40])) for _ in range(rows)]
    params = []
    for _ in range(rows):
        sampled = not greedy and draw(st.booleans())
        params.append(
            SamplingParams(
                temperature=draw(st.sampled_from([0.3, 0.8, 1.0, 1.7])) if sampled else 0.0,
                top_k=draw(st.sampled_from([0, 1, 5, 40, 1000])),
                top_p=draw(st.sampled_from([0.1, 0.7, 0.95, 1.0])),
                min_p=draw(st.sampled_from([0.0, 0.05, 0.5])),
            )
        )
    padding = B - rows
    max_tokens = [draw(st.integers(1, 40)) for _ in range(rows)] + [0] * padding
    stop_id_BI = np.full((B, 4), -1, np.int32)
    stop_id_BI[:rows, 0] = rng.integers(0, CONFIG.vocab_size, rows)  # ends some rows early
    return Batch(
        prompts=[rng.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in lengths],
        sampling=RowSampling.stack(
            params + [SamplingParams()] * padding,
            np.concatenate([seed_keys(int(s), 1) for s in rng.integers(0, 2**63, B)]),
        ),
        stop_id_BI=stop_id_BI,
        max_tokens_B=np.array(max_tokens, np.int32),
    )


@pytest.mark.parametrize("plan", [BUSH, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", HEADS)
def test_random_heads(bench: Bench, name: str, plan: TreePlan) -> None:
    @settings(max_examples=12)
    @given(batches())
    def check(batch: Batch) -> None:
        same_tokens(bench.run(None, batch, OFF), bench.run(name, batch, plan))

    check()


@settings(max_examples=8)
@given(batches(greedy=True))
def test_chain_in_a_greedy_program(bench: Bench, batch: Batch) -> None:
    """The program without any warp in it, and a chain: the paper's setting."""
    greedy = Filters()
    plain = bench.run(None, batch, OFF, filters=greedy)
    same_tokens(plain, bench.run("eagle1", batch, StaticTree.chain(3), filters=greedy))


@settings(max_examples=8)
@given(batches())
def test_a_head_that_is_always_right(bench: Bench, batch: Batch) -> None:
    """Every round keeps the whole depth of the tree, sampled rows included: the noise is shared."""
    target = markov_target()
    plain = bench.run(None, batch, OFF, target=target)
    right = bench.run("meta", batch, BUSH, target=target, head=markov_head(target))
    same_tokens(plain, right)
    # All but two rounds of a row are full: the last is cut short, and so is the first after a prompt of one token.
    full = np.asarray(right.acceptance_BP)[:, -1]
    assert (full >= np.asarray(right.num_rounds_B) - 2).all()


def test_log_probabilities_are_those_of_the_path(tmp_path) -> None:
    """Kept drafts on side branches stand elsewhere among the nodes than on the path."""
    target = markov_target()
    llm = LLM(target, markov_head(target), tree="bush-8", cache_dir=tmp_path)
    params = [SamplingParams(max_tokens=20, temperature=1.0, seed=i, logprobs=2, ignore_eos=True) for i in range(8)]
    drafted, plain = (llm.generate([[5 + i] for i in range(8)], params, speculative=s, use_tqdm=False) for s in (1, 0))
    kept = sum(np.array(out.metrics.acceptance_histogram) for out in drafted)
    assert kept[2:].sum() > kept[:2].sum()
    for one, other in zip(drafted, plain, strict=True):
        (a,), (b,) = one.outputs, other.outputs
        assert a.token_ids == b.token_ids
        for mine, same in zip(a.logprobs, b.logprobs, strict=True):
            assert [*mine] == [*same]
            assert [x.logprob for x in mine.values()] == pytest.approx([x.logprob for x in same.values()], abs=1e-4)


@settings(max_examples=8)
@given(batches(greedy=True))
def test_a_head_that_is_always_wrong(bench: Bench, batch: Batch) -> None:
    target = markov_target()
    plain = bench.run(None, batch, OFF, target=target)
    wrong = bench.run("meta", batch, BUSH, target=target, head=markov_head(target, wrong=True))
    same_tokens(plain, wrong)
    np.testing.assert_array_equal(wrong.num_rounds_B, plain.num_rounds_B)


@settings(max_examples=6)
@given(batches(), st.sampled_from(["fc", "norm", "all"]))
def test_a_head_that_returns_nan(bench: Bench, batch: Batch, where: str) -> None:
    """It degrades to one token per call and never changes the text."""
    head = EagleHead(HEADS["meta"], rngs=nnx.Rngs(5))
    broken = {"fc": head.fc, "norm": head.norm, "all": head}[where]
    nnx.update(broken, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), nnx.state(broken, nnx.Param)))
    plain = bench.run(None, batch, OFF)
    for plan in (BUSH, DYNAMIC):
        nan = bench.run("meta", batch, plan, head=head)
        same_tokens(plain, nan)
        np.testing.assert_array_equal(nan.num_rounds_B, plain.num_rounds_B)


@settings(max_examples=6)
@given(batches())
def test_rounds_one_at_a_time(bench: Bench, batch: Batch) -> None:
    """Streaming's one round per launch gives what one long launch gives."""
    program = Program(plan=BUSH, filters=EVERY_FILTER)
    decoder = bench.decoders["eagle1"]
    state = decoder.start(batch, program, capacity=CAPACITY, chunk=CHUNK)
    for _ in range(50):
        state = decoder.launch(state, program, 1)
    same_tokens(bench.run(None, batch, OFF), state)


@settings(max_examples=6)
@given(batches(), st.sampled_from([1, 4]))
def test_prompts_a_few_rows_at_a_time(bench: Bench, batch: Batch, rows: int) -> None:
    """The caches of both models are filled as if all prompts ran side by side: the head drafts the same, too."""
    program = Program(plan=BUSH, filters=EVERY_FILTER)
    decoder = bench.decoders["eagle1"]
    state = decoder.start(batch, program, capacity=CAPACITY, chunk=CHUNK, rows=rows)
    state, together = decoder.launch(state, program, 1000), bench.run("eagle1", batch, BUSH)
    same_tokens(together, state)
    np.testing.assert_array_equal(together.acceptance_BP, state.acceptance_BP)


def test_fp8_caches() -> None:
    """A key in the suffix is the key that will be in the cache: else a fifth of these batches part from plain text.

    The target mostly follows its last token, so that half of the drafts are kept, but attention sways its choices.
    """
    bench, target = Bench(kv_cache_dtype=FP8), markov_target(attention=0.12)
    head = markov_head(target)

    @settings(max_examples=40)
    @given(batches())
    def check(batch: Batch) -> None:
        plain = bench.run(None, batch, OFF, target=target)
        same_tokens(plain, bench.run("meta", batch, BUSH, target=target, head=head))

    check()
