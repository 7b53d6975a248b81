"""Matrices as models keep them: floating-point numbers, or FP8 numbers with a float32 scale per output channel.

FP8 here is weight-only: numbers are widened on their way into a product, never added up in 8 bits. What is quantised is
every matrix, embedding (a scale per token) and LM head included; norms, biases, routers and token maps are not. The
scales of a matrix ``X`` are the parameter ``X_scale``, whose axes are those of X that no product contracts, so meshes
cut and repeat both alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle.fp8 import FP8
from jeagle.sharding import Axes

__all__ = [
    "FP8",
    "Fp8",
    "Matrix",
    "dtype_of",
    "dtype_of_name",
    "make_matrix",
    "product",
    "quantize",
    "scale_of",
    "vector_dtype",
]

LARGEST = 448.0  # of FP8's numbers
LEAST_SCALE = np.finfo(np.float32).tiny  # a channel of zeros has a scale too; below it, scales would not be precise
PIECE = 1 << 22  # numbers quantised at a time: no float32 copy of a matrix


@dataclass(frozen=True)
class Fp8:
    """The dtype of a model whose matrices are FP8: what its vectors are kept in, and what it computes in."""

    compute: Any = jnp.bfloat16


def dtype_of_name(name: Any) -> Any:
    """ "fp8", or whatever else names a dtype."""
    if isinstance(name, Fp8):
        return name
    return Fp8() if isinstance(name, str) and name == "fp8" else jnp.dtype(name)


def vector_dtype(dtype: Any) -> Any:
    """Of norms, biases, routers and activations."""
    return dtype.compute if isinstance(dtype, Fp8) else dtype


def dtype_of(module: Any) -> Any:
    """With which ``dtype`` a target or a head was made."""
    block = module.blocks[0]
    compute = block.mlp_norm.scale.dtype
    return compute if block.down.kernel_scale is None else Fp8(compute)


def scale_of(path: str) -> str:
    """The parameter that holds the scales of the matrix ``path``."""
    return f"{path}_scale"


def make_matrix(
    shape: tuple[int, ...], *, contracted: tuple[int, ...], axes: Axes, dtype: Any, rngs: nnx.Rngs
) -> tuple[nnx.Param, nnx.Param | None]:
    """A random matrix and its scales, None in a model that has none.

    contracted: the axes that products sum over; the others are channels, which have a scale each.
    """
    if not isinstance(dtype, Fp8):
        return nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, dtype), axes=axes), None
    number = nnx.initializers.normal(1.0)(rngs.params(), shape, jnp.float32).astype(FP8)
    channels = [i for i in range(len(shape)) if i not in contracted]
    scale = jnp.full([shape[i] for i in channels], 0.02, jnp.float32)
    return (
        nnx.Param(number, axes=axes, contracted=contracted),
        nnx.Param(scale, axes=tuple(axes[i] for i in channels)),
    )


class Matrix(NamedTuple):
    """A matrix in a program."""

    kernel: jax.Array
    scale: jax.Array | None  # of each channel, float32; None where the kernel is not FP8

    @classmethod
    def of(cls, kernel: nnx.Param, scale: nnx.Param | None) -> Self:
        return cls(kernel[...], None if scale is None else scale[...])

    def map(self, kernel: Callable[[jax.Array], jax.Array], scale: Callable[[jax.Array], jax.Array]) -> Matrix:
        """Both reshaped or sliced."""
        return Matrix(kernel(self.kernel), None if self.scale is None else scale(self.scale))


def product(
    x: jax.Array, matrix: Matrix, contract: Callable[..., jax.Array] = jnp.matmul, dtype: Any = None
) -> jax.Array:
    """``contract(x, kernel)`` [..., *channels] in ``dtype`` (None: x's), which takes ``preferred_element_type``.

    FP8: sums in float32, times the scale, rounded once. The kernel is widened as an operand and nothing else, so that
    XLA:GPU does it inside the GEMM and 8 bits per number are all that is read (scripts/compile_mesh.py sees no copy).
    """
    if matrix.scale is None:
        return contract(x, matrix.kernel, preferred_element_type=dtype)
    y = contract(x, matrix.kernel.astype(x.dtype), preferred_element_type=jnp.float32) * matrix.scale
    return y.astype(x.dtype if dtype is None else dtype)


def quantize(x: np.ndarray, contracted: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """On the host: FP8 numbers in x's shape, and a float32 scale per channel, its largest magnitude over 448."""
    step = max(1, PIECE * len(x) // max(1, x.size))
    pieces = [slice(start, start + step) for start in range(0, len(x), step)]
    largest = [np.max(np.abs(x[piece].astype(np.float32)), axis=contracted, keepdims=True) for piece in pieces]
    joined = 0 in contracted  # every piece has something of every channel
    scale = np.maximum.reduce(largest) if joined else np.concatenate(largest)
    scale = np.maximum(scale / np.float32(LARGEST), LEAST_SCALE)
    number = np.empty(x.shape, FP8)
    for piece in pieces:
        number[piece] = x[piece].astype(np.float32) / (scale if joined else scale[piece])
    return number, scale.squeeze(contracted)
