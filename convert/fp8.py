"""FP8 weights as bfloat16 ones: a ``Source`` around a source, so that no table knows that they were FP8.

A weight ``X.weight`` of dtype float8_e4m3fn is to be multiplied by ``X.weight_scale``: one number, or one per output
row (compressed-tensors' float-quantized format, fbgemm_fp8). What activations were scaled by is not used here.
"""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np

from convert.table import ConversionError, TypedSource

__all__ = ["FP8", "Dequantized"]

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ACTIVATIONS = (".input_scale", ".input_scale_ub")


class Dequantized:
    """``source`` with its FP8 weights multiplied out, rounded once to bfloat16, and without their scales."""

    def __init__(self, source: TypedSource):
        self._source = source
        names = list(source.names())
        self._scale: dict[str, str] = {}
        for name in (n for n in names if source.dtype(n) == FP8):
            scale = f"{name.removesuffix('.weight')}.weight_scale"
            if not name.endswith(".weight") or scale not in names:
                raise ConversionError(
                    f"tensor {name} is stored as F8_E4M3 without a {scale}; fetch the scales too, or use a checkpoint "
                    "of float32, float16 or bfloat16 weights"
                )
            rows = source.shape(name)[0]
            if source.shape(scale) not in ((), (1,), (rows,), (rows, 1)):
                raise ConversionError(
                    f"tensor {scale} has shape {source.shape(scale)}; only one scale per weight or per output row of "
                    f"{name} converts"
                )
            self._scale[name] = scale
        hidden = {*self._scale.values(), *(n for n in names if n.endswith(ACTIVATIONS))}
        self._names = [n for n in names if n not in hidden]

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return BFLOAT16 if name in self._scale else self._source.dtype(name)

    def read(self, name: str) -> np.ndarray:
        weight = self._source.read(name)
        if name not in self._scale:
            return weight
        scale = self._source.read(self._scale[name]).astype(np.float32).reshape(-1, *[1] * (weight.ndim - 1))
        # Row by row: a product of float32 as large as the weight would be four times its size.
        product = np.empty(weight.shape, BFLOAT16)
        for row in range(0, len(weight), 256):
            part = slice(row, row + 256)
            product[part] = weight[part].astype(np.float32) * (scale if len(scale) == 1 else scale[part])
        return product
