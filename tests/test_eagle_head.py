"""The head against the published algorithm: converted weights, a prompt, then drafting steps on its own features."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference_eagle as reference
from flax import nnx
from reference_eagle import TARGET_LAYERS, VOCAB, WIDTH, Tensors

from convert.eagle import describe
from convert.table import fill
from jeagle.cache import KVCache, Prefix, commit
from jeagle.config import LlamaConfig
from jeagle.eagle import EagleHead
from jeagle.llama import Llama

PROMPT, STEPS = 6, 2
PARITY = ("eagle1", "hass", "eagle3", "eagle3_wider_target", "speculators", "eagle31", "modelopt", "meta")


def convert(config, weights, target=None):
    shapes = {name: array.shape for name, array in weights.items()}
    table = describe(config, shapes, target=target)
    # From shapes alone: what the rules do not fill stays abstract and cannot run.
    graph, state = nnx.split(nnx.eval_shape(lambda: EagleHead(table.config, rngs=nnx.Rngs(0))))
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    for path, array in fill(table.rules, Tensors(weights), ignore=table.ignore):
        assert leaves[path].shape == array.shape, path
        leaves[path].set_value(jnp.asarray(array))
    return nnx.merge(graph, state)


def lender(config):
    """A target that only lends its embedding and LM head."""
    target = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(7)
    for tensor in (target.embed, target.lm_head):
        tensor.set_value(jnp.asarray(0.18 * rng.standard_normal(tensor.shape), jnp.float32))
    return target


def make(form, seed=0):
    width = 48 if form == "eagle3_wider_target" else WIDTH
    target_config = LlamaConfig.tiny(width=width, num_layers=TARGET_LAYERS, vocab_size=VOCAB)
    target = lender(target_config)
    config, weights = reference.checkpoint(form, seed)
    head = convert(config, weights, target_config)
    rng = np.random.default_rng(seed + 1)
    tokens = rng.integers(0, VOCAB, PROMPT + 1)
    features = rng.standard_normal((PROMPT, head.config.feature_width)).astype(np.float32)
    return config, weights, head, target, tokens, features


def empty_cache(head):
    cache = KVCache.create(head.config, num_pages=2, page_size=8, dtype=jnp.float32)
    prefix = Prefix.full(jnp.array([[1, 0]], jnp.int32), jnp.zeros((1,), jnp.int32))
    return cache, prefix


def prompt_pass(head, target, tokens, features):
    """The shifted prompt as one suffix over an empty prefix."""
    cache, prefix = empty_cache(head)
    return head(
        jnp.asarray(tokens[1:], jnp.int32)[None],
        head.fuse(jnp.asarray(features)[None]),
        jnp.arange(PROMPT, dtype=jnp.int32)[None],
        jnp.tril(jnp.ones((1, PROMPT, PROMPT), bool)),
        cache,
        prefix,
        target=target,
    )


def expected(config, weights, target, tokens, features):
    embedding, lm_head = (np.asarray(a, np.float64) for a in (target.embed[...], target.lm_head[...].T))
    return reference.draft(config, weights, embedding, lm_head, tokens, features.astype(np.float64), STEPS)


@pytest.mark.parametrize("form", PARITY)
def test_parity_with_the_published_algorithm(form):
    config, weights, head, target, tokens, features = make(form)
    prompt_logits, step_logits, fed = expected(config, weights, target, tokens, features)

    out = prompt_pass(head, target, tokens, features)
    np.testing.assert_allclose(head.logits(out.hidden_BTD, target)[0], prompt_logits, atol=1e-4)

    cache, prefix = empty_cache(head)
    earlier = out.new_kv
    for step, token in enumerate(fed):
        seen = PROMPT + step + 1
        out = head(
            jnp.array([[token]], jnp.int32),
            out.feature_BTD[:, -1:],
            jnp.array([[seen - 1]], jnp.int32),
            jnp.ones((1, 1, seen), bool),
            cache,
            prefix,
            target=target,
            earlier=earlier,
        )
        np.testing.assert_allclose(head.logits(out.hidden_BTD, target)[0, 0], step_logits[step], atol=1e-4)
        earlier = [
            tuple(jnp.concatenate(pair, axis=1) for pair in zip(old, new, strict=True))
            for old, new in zip(earlier, out.new_kv, strict=True)
        ]


@pytest.mark.parametrize("form", ["eagle1", "eagle3_wider_target"])
def test_committed_prompt_is_the_same_as_an_uncommitted_one(form):
    config, weights, head, target, tokens, features = make(form)
    _, step_logits, fed = expected(config, weights, target, tokens, features)
    out = prompt_pass(head, target, tokens, features)
    cache, prefix = empty_cache(head)
    cache = commit(cache, out.new_kv, prefix, jnp.array([PROMPT], jnp.int32))
    out = head(
        jnp.array([fed[:1]], jnp.int32),
        out.feature_BTD[:, -1:],
        jnp.array([[PROMPT]], jnp.int32),
        jnp.ones((1, 1, 1), bool),
        cache,
        prefix.with_length(jnp.array([PROMPT], jnp.int32)),
        target=target,
    )
    np.testing.assert_allclose(head.logits(out.hidden_BTD, target)[0, 0], step_logits[0], atol=1e-4)


def test_draft_ids_are_mapped_to_target_ids():
    _, weights, head, *_ = make("eagle31")
    np.testing.assert_array_equal(head.draft_to_target[...], weights["d2t"] + np.arange(len(weights["d2t"])))
    assert head.draft_to_target[...].dtype == jnp.int32
    np.testing.assert_array_equal(np.flatnonzero(weights["t2d"]), head.draft_to_target[...])


def test_first_token_shift_written_out():
    """After "how can I", the target says "help": (how, can, I) have features, (can, I, help) are the tokens."""
    tokens, features = ["how", "can", "I", "help"], ["f(how)", "f(can)", "f(I)"]
    rows = list(zip(*reference.shift(tokens, features), strict=True))
    assert rows == [("can", "f(how)"), ("I", "f(can)"), ("help", "f(I)")]
    # The last row has seen "how can I help": its logits draft the token after "help".


@pytest.mark.parametrize("form", ["eagle1", "eagle3"])
def test_first_token_shift_in_the_head(form):
    """Row i reads features 0..i and tokens 1..i+1; token 0 is read by no row."""
    _, _, head, target, tokens, features = make(form)

    def logits(tokens, features):
        return np.asarray(head.logits(prompt_pass(head, target, tokens, features).hidden_BTD, target)[0])

    base = logits(tokens, features)
    row = 3

    def rows_changed(tokens, features):
        return np.flatnonzero(np.abs(logits(tokens, features) - base).max(axis=-1) > 1e-6).tolist()

    other = tokens.copy()
    other[0] = (other[0] + 1) % VOCAB
    assert rows_changed(other, features) == []
    other = tokens.copy()
    other[row + 1] = (other[row + 1] + 1) % VOCAB
    assert rows_changed(other, features) == list(range(row, PROMPT))
    changed = features.copy()
    changed[row] += 1
    assert rows_changed(tokens, changed) == list(range(row, PROMPT))
