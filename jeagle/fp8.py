"""FP8 vectors: float8_e4m3fn numbers times one float32 scale, a power of two.

What a cache of 8 bits holds, and what attention must see of keys and values that are not in it yet: a key is read from
the suffix in one round, from its page in another way of decoding, and both must read the same numbers. A power of two
makes that easy: number times scale is exact in bfloat16 and float32 (e4m3 has four significant bits), and scaling
loses nothing of a floating format's precision.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["FP8", "quantize", "rounded"]

FP8 = jnp.float8_e4m3fn  # largest 448, smallest normal 2**-6, steps of 2**-9 below it; NaN, no infinity
LEAST_EXPONENT = -100  # of a scale: smaller ones and their products would leave float32's normal numbers


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors along the last axis as FP8.

    x: float [..., H]. Returns (numbers FP8 [..., H], scale float32 [...]): the least power of two that leaves no number
    beyond 448. A vector that holds anything infinite or NaN gets the scale NaN: it is NaN as a whole, never finite.
    """
    number, scale = _scaled(x)
    return number.astype(FP8), scale


def rounded(x: jax.Array) -> jax.Array:
    """``x``, in its shape and dtype, as it comes back from FP8: bit by bit number * scale of ``quantize``."""
    number, scale = _scaled(x)
    return (number * scale[..., None]).astype(x.dtype)


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 numbers that FP8 holds exactly, and their scale."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1)
    # ceil(log2(largest / 448)), read off the bits, as a logarithm would not be exact: 448 is 1.75 * 2**8, and adding
    # just under a quarter of the fraction's range carries where the fraction is above .75.
    exponent = ((lax.bitcast_convert_type(largest, jnp.int32) + 0x1FFFFF) >> 23) - 127 - 8
    exponent = jnp.maximum(exponent, LEAST_EXPONENT)
    y = x * _power_of_two(-exponent)[..., None]
    # Not a cast there and back: XLA may leave out a pair of casts (xla_allow_excess_precision), reduce_precision never.
    normal = lax.reduce_precision(y, exponent_bits=8, mantissa_bits=3)
    number = jnp.where(jnp.abs(y) < 2**-6, jnp.round(y * 2**9) * 2**-9, normal)
    return number, jnp.where(jnp.isfinite(largest), _power_of_two(exponent), jnp.nan)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2**exponent, float32, for int32 exponents of normal numbers. By its bits: exp2 is not exact everywhere."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
