"""How a CPU multiplies a few float32 rows with a large matrix: what decoding does all day.

One row is a matrix-vector product, which streams the weights. For more, XLA:CPU (0.11) takes YNNPACK, which repacks the
whole matrix on every call, and walks weights [inputs, outputs] across their rows to do so. Eigen repacks in blocks that
stay in a core's cache, and costs nearly the same from 3 rows to 12. SmolLM2's products of all layers on two AVX2 cores,
in multiples of one row's time (scripts/results/bench_products_cpu_smollm2.json):

    rows             2     3     4     6     8    12    16    32    64
    as XLA does   1.72  2.64  2.77  2.56  3.12  3.57  3.97  5.88  7.34
    rows apart    1.70  1.93  2.41  2.66  3.88
    Eigen         2.14  2.12  2.09  2.18  2.05  2.22  2.66  4.43  6.87

With AVX-512 a second row costs Eigen 0.15 of the first and rows apart 0.3, and 16 rows cost it 1.3 of one
(scripts/results/bench_products_cpu_avx512_smollm2.json), so there all go to Eigen.

XLA's only switch between the two is for a whole program, whose attention YNNPACK serves better; but a convolution of
width one becomes a plain product *after* YNNPACK has picked its own, and so goes to Eigen.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jeagle.host import has_avx512
from jeagle.sharding import on_mesh

__all__ = ["LARGE", "MOST_ROWS", "multiply_rows"]

MOST_ROWS = 48  # above it both cost the same
LARGE = 1 << 16  # numbers in a matrix that is worth it: such programs take longer to compile


def multiply_rows(
    x: jax.Array, weights: jax.Array, multiply: Callable[[jax.Array], jax.Array], *, inputs_first: bool = True
) -> jax.Array:
    """``multiply(x)``: x [..., n] with ``weights`` [n, *outputs], each row for itself; [..., *outputs].

    On a CPU few rows go another way than ``multiply``'s, to numbers that differ in the order of their sums.

    inputs_first: False for weights [outputs, n] (a tied LM head), which YNNPACK may walk along their rows.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not 1 < len(rows) <= MOST_ROWS or weights.size < LARGE or on_mesh():
        return multiply(x)
    if x.dtype != jnp.float32 or weights.dtype != jnp.float32:
        return multiply(x)
    if len(rows) > 2 and not inputs_first:
        return multiply(x)

    def on_cpu(rows: jax.Array) -> jax.Array:
        few = len(rows) == 2 and not (inputs_first and has_avx512())
        return apart(multiply, rows) if few else eigen(rows, weights)

    y = jax.lax.platform_dependent(rows, cpu=on_cpu, default=multiply)
    return y.reshape(*x.shape[:-1], *y.shape[1:])


def apart(multiply: Callable[[jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
    """``multiply`` of one row after the other."""
    return jnp.concatenate([multiply(row[None]) for row in rows])


def eigen(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """rows [R, n] times weights [n, *outputs], [R, *outputs], by Eigen."""
    matrix = weights.reshape(1, len(weights), -1)
    y = jax.lax.conv_general_dilated(
        rows[:, None], matrix, window_strides=(1,), padding="VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return y.reshape(-1, *weights.shape[1:])
