"""The noise that choices are made with, as plain array functions: kernels and their reference draw the same numbers.

threefry2x32 (Salmon et al., SC 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") is JAX's own generator. It is
written out here because XLA:CPU gets JAX's (``threefry2x32_p``) as a loop over the rounds, each a pass over memory: for
32 rows of 49,152 tokens 29 ms on two Zen 5 cores, where one fused pass takes 1. And a kernel cannot call it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["gumbel_of_bits", "threefry"]


def threefry(key_0: jax.Array, key_1: jax.Array, count_0: jax.Array, count_1: jax.Array) -> jax.Array:
    """The first word of threefry2x32 with 20 rounds: integers of 32 bits, which broadcast, to uint32."""
    key_0, key_1, x, y = (value.astype(jnp.uint32) for value in (key_0, key_1, count_0, count_1))
    keys = (key_0, key_1, key_0 ^ key_1 ^ jnp.uint32(0x1BD11BDA))
    x, y = x + keys[0], y + keys[1]
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = ((y << turn) | (y >> (32 - turn))) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x


def gumbel_of_bits(bits: jax.Array) -> jax.Array:
    """Gumbel(0, 1) noise of random uint32, float32: from -2.9 to 22.9.

    Exponential(1) = -log1p(-u). Converting all 32 bits keeps u's relative precision near 0, where the winners of an
    argmax lie: a 24-bit uniform would cut the noise off at 17 and starve tokens of probability below 1e-7.
    """
    u = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-u))
