"""``commit``: the accepted rows reach their slots, and nothing else in the cache changes by a bit."""

from __future__ import annotations

from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jeagle.cache import KVCache, Prefix, commit
from jeagle.config import LlamaConfig
from jeagle.fp8 import quantize
from jeagle.tree import Tree, ancestor_mask
from jeagle.verify import accept

B, T, P, PAGE, M, PAGES = 3, 6, 4, 4, 3, 11
CONFIG = LlamaConfig.tiny()
run_commit = jax.jit(commit)


def draw(seed: int, dtype=np.float32) -> tuple[KVCache, list, Prefix, np.random.Generator]:
    """A cache of noise, new rows of noise, and disjoint shuffled page tables."""
    rng = np.random.default_rng(seed)

    def noise(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    layers = range(CONFIG.num_layers)
    pages = (CONFIG.num_kv_heads, PAGES, PAGE, CONFIG.head_dim)
    scales = None
    if dtype == np.uint8:
        scales = [tuple(np.exp2(rng.integers(-9, 9, pages[:-1])).astype(np.float32) for _ in range(2)) for _ in layers]
    keys, values = ([(16 * noise(*pages)).astype(dtype) for _ in layers] for _ in range(2))
    cache = KVCache(keys, values, scales)
    new = [tuple(noise(B, T, CONFIG.num_kv_heads, CONFIG.head_dim) for _ in range(2)) for _ in layers]
    table = rng.permutation(PAGES)[: B * M].reshape(B, M).astype(np.int32)
    return cache, new, Prefix.full(table, rng.integers(0, M * PAGE + 1, B).astype(np.int32)), rng


def expected(cache: KVCache, new: list, prefix: Prefix, count_B, path_BP) -> KVCache:
    """Row by row, one position after the other."""

    def write(pages: np.ndarray, new_BTKH: np.ndarray) -> np.ndarray:
        pages = pages.copy()
        for row in range(B):
            for i in range(count_B[row]):
                position = prefix.length_B[row] + i
                page = prefix.page_table_BM[row, position // PAGE]
                pages[:, page, position % PAGE] = new_BTKH[row, path_BP[row, i]].astype(pages.dtype)
        return pages

    if cache.scales is None:
        return KVCache(
            [write(pages, k) for pages, (k, _) in zip(cache.keys, new)],
            [write(pages, v) for pages, (_, v) in zip(cache.values, new)],
        )
    fp8 = [[tuple(map(np.asarray, quantize(x))) for x in kv] for kv in new]
    return KVCache(
        [write(pages, k.view(np.uint8)) for pages, ((k, _), _) in zip(cache.keys, fp8)],
        [write(pages, v.view(np.uint8)) for pages, (_, (v, _)) in zip(cache.values, fp8)],
        [(write(a, k), write(b, v)) for (a, b), ((_, k), (_, v)) in zip(cache.scales, fp8)],
    )


def assert_same_bits(got: KVCache, wanted: KVCache) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a = np.asarray(a)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.uint8])
def test_writes_the_path_and_nothing_else(dtype):
    """Counts 0 to P, within pages, across their borders and at the very end of the table; padding entries repeat."""
    for seed in range(30):
        cache, new, prefix, rng = draw(seed, dtype)
        path = rng.integers(0, T, (B, P)).astype(np.int32)
        count = np.minimum(rng.integers(0, P + 1, B), M * PAGE - prefix.length_B).astype(np.int32)
        for k, v in new:  # rejected nodes and padding must not be read, whatever they hold
            for row in range(B):
                dropped = sorted(set(range(T)) - set(path[row, : count[row]].tolist()))
                k[row, dropped], v[row, dropped] = np.nan, np.nan
        got = run_commit(cache, new, prefix, count, path)
        assert_same_bits(got, expected(cache, new, prefix, count, path))


def test_without_a_path_takes_rows_in_order():
    path = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for seed in range(20):
        cache, new, prefix, rng = draw(seed)
        count = np.minimum(rng.integers(0, T + 1, B), M * PAGE - prefix.length_B).astype(np.int32)
        assert_same_bits(run_commit(cache, new, prefix, count), expected(cache, new, prefix, count, path))


def test_the_example_of_its_docstring():
    cache, new, prefix, _ = draw(0)
    prefix = prefix.with_length(np.full(B, 5, np.int32))
    path, count = np.tile(np.array([0, 2, 4, 0], np.int32), (B, 1)), np.full(B, 3, np.int32)
    got = np.asarray(run_commit(cache, new, prefix, count, path).keys[1])
    for position, node in [(5, 0), (6, 2), (7, 4)]:
        page = prefix.page_table_BM[1, position // PAGE]
        np.testing.assert_array_equal(got[:, page, position % PAGE], new[1][0][1, node])


def test_an_accepted_side_branch_leaves_what_a_prefill_would():
    """Two requests accept second and third children; their caches then equal those of a prefill of the same text."""
    model = helpers.tiny_llama(eos_token_ids=())
    graph, weights = nnx.split(model)
    V, PROMPTS, CHUNK = model.config.vocab_size, [9, 6], 16
    rng = np.random.default_rng(5)
    texts = np.zeros((2, CHUNK), np.int32)
    for row, size in enumerate(PROMPTS):
        texts[row, :size] = rng.integers(3, V, size)
    table = np.array([[6, 1, 4, 0], [2, 7, 3, 5]], np.int32)
    empty = KVCache.create(model.config, num_pages=8, page_size=PAGE, dtype=jnp.float32)

    @partial(jax.jit, static_argnames="num_path")
    def forward(weights, token_BT, position_BT, mask, cache, length_B, count_B, tree=None, *, num_path=0):
        """Commit ``count`` rows in order, or what of ``tree`` is accepted."""
        model, prefix = nnx.merge(graph, weights), Prefix.full(table, length_B)
        out = model(token_BT, position_BT, mask, cache, prefix)
        choice_BT = jnp.argmax(model.logits(out.hidden_BTD), axis=-1).astype(jnp.int32)
        if tree is None:
            return choice_BT, commit(cache, out.new_kv, prefix, count_B)
        path_BP, accepted_B = accept(tree, choice_BT, num_path)
        return path_BP, accepted_B, commit(cache, out.new_kv, prefix, accepted_B + 1, path_BP)

    def prefill(texts, count):
        position = np.tile(np.arange(CHUNK, dtype=np.int32), (2, 1))
        causal, zero = np.tril(np.ones((1, CHUNK, CHUNK), bool)), np.zeros(2, np.int32)
        return forward(weights, texts, position, causal, empty, zero, np.array(count, np.int32))

    # What the target says next, token by token.
    said = np.zeros((2, 3), np.int32)
    for i in range(3):
        choice = np.asarray(prefill(texts, [0, 0])[0])
        for row, size in enumerate(PROMPTS):
            said[row, i] = texts[row, size + i] = choice[row, size + i - 1]

    # root -> {1, 2, 3}; row 0: 2 -> {4, 5}, 5 -> {6}; row 1: 3 -> {4, 5}, 4 -> {6}. ``right``: which node holds which
    # of the words said; all others are wrong.
    parent = np.array([[0, 0, 0, 0, 2, 2, 5], [0, 0, 0, 0, 3, 3, 4]], np.int32)
    right = [{2: 0, 5: 1, 6: 2}, {3: 0, 4: 1}]
    token = np.zeros((2, 7), np.int32)
    for row, size in enumerate(PROMPTS):
        token[row, 0] = texts[row, size - 1]
        for node in range(1, 7):
            depth = helpers.depths_of(parent[row].tolist())[node]
            at = right[row].get(node)
            token[row, node] = (said[row, depth - 1] + node) % V if at is None else said[row, at]
    depth = np.array([helpers.depths_of(p.tolist()) for p in parent], np.int32)
    mask = np.asarray(jax.jit(ancestor_mask, static_argnums=1)(parent, 3))
    tree = Tree(token, parent, depth, mask, np.ones((2, 7), bool))

    length = np.array(PROMPTS, np.int32) - 1
    _, cache = prefill(texts, length)
    before = [np.asarray(x) for x in jax.tree.leaves(cache)]
    path, accepted, cache = forward(
        weights, token, length[:, None] + depth, mask, cache, length, length, tree, num_path=4
    )
    assert accepted.tolist() == [3, 2]
    assert path.tolist() == [[0, 2, 5, 6], [0, 3, 4, 0]]

    _, wanted = prefill(texts, length + np.asarray(accepted) + 1)
    slots = np.zeros((8, PAGE), bool)
    for row, size in enumerate(PROMPTS):
        for position in range(size + int(accepted[row])):
            slots[table[row, position // PAGE], position % PAGE] = True
    for got, want, old in zip(jax.tree.leaves(cache), jax.tree.leaves(wanted), before, strict=True):
        got, want = np.asarray(got), np.asarray(want)
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.abs(want[:, slots]).min() > 0
        assert not got[:, ~slots].any()  # rejected nodes left no trace
        assert np.abs(got - old).max() > 0.1
