"""FP8 weights as bfloat16 ones, or as they are: a ``Source`` around a source, so that no table knows of scales.

A weight ``X.weight`` of dtype float8_e4m3fn is to be multiplied by ``X.weight_scale``: one number, or one per output
row (compressed-tensors' float-quantized format, fbgemm_fp8). What activations and an FP8 KV cache were scaled by is not
used: both are floats here. A checkpoint of ours in FP8 takes numbers and scales over bit by bit, where all that a
tensor of ours is made from is FP8.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from convert.table import ConversionError, Rule, TypedSource

__all__ = ["FP8", "Dequantized", "refuse_quantised"]

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
METHODS = ("compressed-tensors", "fbgemm_fp8")
FORMATS = (None, "float-quantized", "naive-quantized")  # of compressed-tensors, those that hold FP8 numbers
ACTIVATIONS = (".input_scale", ".input_scale_ub", ".output_scale", ".k_scale", ".v_scale")
LARGEST = float(ml_dtypes.finfo(FP8).max)


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """Raises ConversionError where config.json says that weights are stored in a way that is not read here."""
    quantization = config.get("quantization_config") or {}
    mapping = quantization if isinstance(quantization, Mapping) else {"quant_method": quantization}
    method, form = mapping.get("quant_method"), mapping.get("format")
    if quantization and method not in METHODS:
        raise ConversionError(
            f"config.json has a quantization_config of method {method!r}; of quantised models only FP8 ones of "
            f"{' and '.join(METHODS)} convert, convert the unquantised model instead"
        )
    if form not in FORMATS:
        raise ConversionError(
            f"config.json has a quantization_config of format {form!r}; of quantised models only FP8 ones "
            "(float-quantized) convert, convert the unquantised model instead"
        )


class Dequantized:
    """``source`` with its FP8 weights multiplied out, rounded once to bfloat16, and without their scales."""

    def __init__(self, source: TypedSource):
        self._source = source
        self._kept: frozenset[str] = frozenset()
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
            if source.dtype(scale).name not in ("float32", "float16", "bfloat16"):
                raise ConversionError(
                    f"tensor {scale} has dtype {source.dtype(scale)}, expected floats; fetch it again"
                )
            self._scale[name] = scale
        hidden = {*self._scale.values(), *(n for n in names if n.endswith(ACTIVATIONS))}
        self._names = [n for n in names if n not in hidden]

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return BFLOAT16 if name in self._scale and name not in self._kept else self._source.dtype(name)

    def read(self, name: str) -> np.ndarray:
        weight = self._source.read(name)
        if name not in self._scale or name in self._kept:
            return weight
        scale = self._scales(name).reshape(-1, *[1] * (weight.ndim - 1))
        # Row by row: a product of float32 as large as the weight would be four times its size.
        product = np.empty(weight.shape, BFLOAT16)
        for row in range(0, len(weight), 256):
            part = slice(row, row + 256)
            with np.errstate(invalid="ignore"):  # a signalling NaN: what is not finite is refused where it is used
                product[part] = weight[part].astype(np.float32) * (scale if len(scale) == 1 else scale[part])
        return product

    def keep(self, rules: Iterable[Rule], wanted: Container[str]) -> set[str]:
        """From now on FP8 weights are read as they are where a rule's sources all are, and its target is ``wanted`` in
        FP8. Returns the targets of those rules."""
        kept = [rule for rule in rules if rule.target in wanted and all(s in self._scale for s in rule.sources)]
        self._kept = frozenset(name for rule in kept for name in rule.sources)
        return {rule.target for rule in kept}

    def scale(self, rule: Rule, contracted: tuple[int, ...]) -> np.ndarray:
        """The scales of what ``rule`` makes, float32, one per output channel: made as it is, of scales as numbers."""
        scales = []
        for name, (rows, inputs) in zip(rule.sources, rule.source_shapes, strict=True):
            scales.append(np.broadcast_to(self._scales(name).reshape(-1, 1), (rows, 1 if rule.narrow else inputs)))
        made = rule.make(*scales)
        return np.ascontiguousarray(made[tuple(0 if i in contracted else slice(None) for i in range(made.ndim))])

    def _scales(self, name: str) -> np.ndarray:
        """Of FP8 numbers that are kept no one looks at the products, so here the largest of them must be finite."""
        scales = self._source.read(self._scale[name]).astype(np.float32).reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            finite = np.isfinite(scales * np.float32(LARGEST)).all()
        if not finite:
            raise ConversionError(
                f"tensor {self._scale[name]} holds NaN, inf or a scale too large for a product with FP8 numbers; the "
                "checkpoint is damaged, fetch it again"
            )
        return scales
