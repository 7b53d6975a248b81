"""Products with few rows on a CPU: the same numbers, row by row, and only where that pays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jeagle.layers import LARGE, ROWS_APART, by_rows


def product(x, weights):
    return jnp.tensordot(x, weights, axes=1)


def dots(shape, weights) -> int:
    lowered = jax.jit(lambda x, w: by_rows(lambda x: product(x, w), x, w)).lower(jnp.zeros(shape), weights)
    text = lowered.compile().as_text()
    assert "conditional(" not in text  # the platform is known, so nothing is left to choose when it runs
    return text.count(" dot(")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only CPUs multiply rows apart")
def test_rows_are_apart_where_they_are_few_and_the_weights_large():
    large, small = jnp.zeros((256, LARGE // 256)), jnp.zeros((8, 8))
    assert [dots((n, 256), large) for n in (1, 2, ROWS_APART, ROWS_APART + 1)] == [1, 2, ROWS_APART, 1]
    assert dots((2, 2, 256), large) == 4  # batch and tree together
    assert dots((2, 8), small) == 1


def test_rows_keep_their_shape_and_are_those_of_a_plain_step():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 2, 256)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((256, 2, LARGE // 512)), jnp.float32)
    together = jax.jit(lambda x: by_rows(lambda x: product(x, weights), x, weights))(x)
    one = jax.jit(lambda x: product(x, weights))
    assert together.shape == (2, 2, 2, LARGE // 512)
    for b in range(2):
        for t in range(2):
            np.testing.assert_array_equal(together[b, t], one(x[b : b + 1, t])[0])
