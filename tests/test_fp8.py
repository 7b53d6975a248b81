"""FP8 vectors against ml_dtypes, and that attention reads the same of a key in the suffix and in its page."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jeagle.attention import attend
from jeagle.cache import KVCache, Prefix, commit
from jeagle.config import LlamaConfig
from jeagle.fp8 import FP8, quantize, rounded

run_quantize, run_rounded = jax.jit(quantize), jax.jit(rounded)


def loaded(number: jax.Array, scale: jax.Array, dtype=np.float32) -> np.ndarray:
    return (np.asarray(number).astype(np.float32) * np.asarray(scale)[..., None]).astype(dtype)


def vectors(dtype) -> np.ndarray:
    """[n, 16] of every size, ties, zeros of both signs, and largest numbers just below, at and above 448 * 2**n."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4000, 16)) * 2.0 ** rng.integers(-60, 60, (4000, 1)) * 2.0 ** rng.integers(-20, 1, 16)
    sixteenths = rng.integers(-64, 65, (2000, 16)) / 64.0 * 2.0 ** rng.integers(-12, 1, (2000, 16))
    edge = np.float32(448) * np.float32(2) ** np.arange(-40, 40, dtype=np.float32)
    edges = np.stack([np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(np.inf))])
    edges = edges.reshape(-1, 1) * np.linspace(-1, 1, 16)
    tiny = rng.standard_normal((10, 16)) * 1e-37
    huge = np.full((1, 16), float(jnp.finfo(dtype).max) / 2)
    return np.concatenate([noise, sixteenths, edges, tiny, huge, np.zeros((1, 16)), -np.zeros((1, 16))]).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_numbers_and_scales(dtype):
    x = vectors(dtype)
    number, scale = (np.asarray(a) for a in run_quantize(x))
    assert number.dtype == FP8 and scale.dtype == np.float32
    wide = x.astype(np.float64)
    largest = np.abs(wide).max(axis=1)
    mantissa, exponent = np.frexp(largest)
    least = np.exp2(np.maximum(exponent - 9 + (mantissa > 0.875), -100).astype(np.float64))  # 448 is 0.875 * 2**9
    some = largest > 0
    np.testing.assert_array_equal(scale[some], least[some])
    assert (largest <= 448.0 * scale.astype(float)).all() and (largest > 224 * scale.astype(float))[
        largest > 1e-25
    ].all()
    wanted = (wide / scale[:, None]).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(number.view(np.uint8), wanted.view(np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_rounding_is_a_store_and_a_load(dtype):
    """Bit by bit, and rounding again changes nothing: what is rounded may be committed."""
    x = vectors(dtype)
    once = np.asarray(run_rounded(x))
    assert once.dtype == x.dtype
    for again in (loaded(*run_quantize(x), dtype), loaded(*run_quantize(once), dtype), np.asarray(run_rounded(once))):
        np.testing.assert_array_equal(again.view(np.uint8), once.view(np.uint8))
    size = np.abs(x.astype(np.float64)).max(axis=1, keepdims=True)
    error = np.abs(once.astype(np.float64) - x.astype(np.float64))
    allowed = np.maximum(np.abs(x.astype(np.float64)) / 16, size / 224 * 2**-10) + 2.0**-109
    assert (error <= allowed).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_becomes_finite(bad):
    """One such number makes its whole vector NaN, in the suffix as in the cache, and no other vector."""
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    x[1, 5] = bad
    number, scale = run_quantize(x)
    for got in (loaded(number, scale), np.asarray(run_rounded(x))):
        np.testing.assert_array_equal(np.isnan(got).all(axis=1), [False, True, False])
        np.testing.assert_array_equal(np.isfinite(got).all(axis=1), [True, False, True])


@pytest.mark.parametrize(
    ("implementation", "dtype"), [("xla", np.float32), ("xla", jnp.bfloat16), ("pallas", np.float32)]
)
def test_attention_does_not_ask_whether_a_key_is_committed(implementation, dtype):
    """The answer is the same whether none, some or all of the new positions have been committed."""
    config = LlamaConfig.tiny(num_layers=1, head_dim=16)
    B, U, page_size, length = 2, 6, 4, np.array([5, 2], np.int32)
    K, G, H = config.num_kv_heads, config.queries_per_kv, config.head_dim
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal((B, *shape, H)).astype(dtype)

    q, k, v, old = normal(1, K, G), normal(U, K), normal(U, K), [(normal(5, K), normal(5, K))]
    prefix = Prefix.full(np.array([[4, 1, 0], [2, 5, 3]], np.int32), np.zeros(2, np.int32))

    @jax.jit
    def answer(committed: jax.Array) -> jax.Array:
        cache = KVCache.create(config, num_pages=6, page_size=page_size, dtype=FP8)
        cache = commit(cache, old, prefix, length)
        cache = commit(cache, [(k, v)], prefix.with_length(length), jnp.full(B, committed))
        mask = (jnp.arange(U) >= committed)[None, None, :]
        seen = prefix.with_length(length + committed)
        return attend(q, k, v, mask, cache.layer(0), seen, implementation=implementation).astype(jnp.float32)

    for committed in range(1, U + 1):
        np.testing.assert_allclose(answer(committed), answer(0), atol=1e-6 if dtype == np.float32 else 1e-2)


def test_an_implementation_without_scales_says_so():
    config = LlamaConfig.tiny()
    layer = KVCache.create(config, num_pages=1, page_size=16, dtype=FP8).layer(0)
    K, G, H = config.num_kv_heads, config.queries_per_kv, config.head_dim
    q, k = jnp.zeros((1, 1, K, G, H), jnp.bfloat16), jnp.zeros((1, 1, K, H), jnp.bfloat16)
    prefix = Prefix.full(np.zeros((1, 1), np.int32), np.zeros(1, np.int32))
    with pytest.raises(NotImplementedError, match=r"'mosaic'.*uint8.*without scales"):
        attend(q, k, k, np.ones((1, 1, 1), bool), layer, prefix, implementation="mosaic")
