"""Products of few rows on a CPU: the same numbers by another way, and only where that pays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle import few_rows
from jeagle.few_rows import LARGE, MOST_ROWS, multiply_rows

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="only CPUs go other ways")


def multiply(x, weights):
    return jnp.tensordot(x, weights, axes=1)


def multiply_tied(x, weights):
    return jnp.einsum("...D,VD->...V", x, weights)


def products(function, *args) -> tuple[int, bool]:
    """How many products XLA makes of it, and whether YNNPACK has them."""
    text = jax.jit(function).lower(*args).compile().as_text()
    assert "conditional(" not in text  # the platform is known, so nothing is left to choose when it runs
    assert "convolution(" not in text  # of width one: a plain product by now
    return text.count(" dot("), "ynn" in text


def ways(shape, weights, product=multiply, **options) -> tuple[int, bool]:
    return products(lambda x, w: multiply_rows(x, w, lambda x: product(x, w), **options), jnp.zeros(shape), weights)


def as_ever(shape, weights, product=multiply) -> tuple[int, bool]:
    """Without us: YNNPACK, where XLA has it."""
    return products(product, jnp.zeros(shape), weights)


@on_cpu
@pytest.mark.parametrize("outputs", [(LARGE // 256,), (3, 5, 64), (2, 1536), (LARGE // 256 + 1,)])
def test_two_rows_go_apart_and_more_to_eigen(outputs, monkeypatch):
    large = jnp.zeros((256, *outputs))
    for wide, products in ((False, 2), (True, 1)):  # with AVX-512 two do as well
        monkeypatch.setattr(few_rows, "has_avx512", lambda wide=wide: wide)
        assert ways((2, 256), large) == (products, False)
    for rows in (3, 4, 8, MOST_ROWS):
        assert ways((rows, 256), large) == (1, False)
    assert ways((2, 4, 256), large) == (1, False)  # batch and tree together
    for rows in (1, MOST_ROWS + 1):
        assert ways((rows, 256), large) == as_ever((rows, 256), large)


@on_cpu
def test_small_matrices_and_other_dtypes_are_left_alone():
    assert ways((4, 8), jnp.zeros((8, 8))) == as_ever((4, 8), jnp.zeros((8, 8)))
    weights = jnp.zeros((256, LARGE // 256), jnp.bfloat16)
    x = jnp.zeros((4, 256), jnp.bfloat16)
    made = jax.make_jaxpr(lambda x: multiply_rows(x, weights, lambda x: multiply(x, weights)))(x)
    assert "conv" not in str(made)


@on_cpu
def test_a_tied_lm_head_goes_apart_for_two_rows_only():
    embedding = jnp.zeros((LARGE // 256, 256))
    tied = dict(product=multiply_tied, inputs_first=False)
    assert ways((2, 256), embedding, **tied) == (2, False)
    assert ways((4, 256), embedding, **tied) == as_ever((4, 256), embedding, multiply_tied)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, MOST_ROWS])
def test_the_numbers_are_those_of_the_product(rows):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, 1, 256)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((256, 2, LARGE // 512)), jnp.float32)
    got = jax.jit(lambda x: multiply_rows(x, weights, lambda x: multiply(x, weights)))(x)
    assert got.shape == (rows, 1, 2, LARGE // 512) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.tensordot(x, weights, axes=1), rtol=1e-4, atol=1e-4)


@on_cpu
def test_two_rows_are_those_of_plain_steps():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 2, 256)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((256, LARGE // 256)), jnp.float32)
    together = jax.jit(lambda x: multiply_rows(x, weights, lambda x: multiply(x, weights)))(x)
    one = jax.jit(lambda x: multiply(x, weights))
    for t in range(2):
        np.testing.assert_array_equal(together[0, t], one(x[:, t])[0])
