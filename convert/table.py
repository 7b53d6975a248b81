"""One line per tensor: where each of our tensors comes from, and how it is cut and fused.

A table is a list of ``Rule``. ``fill`` walks it against a source, one output tensor at a time, and insists that every
rule finds its sources and every source is used; what is left over on either side is an error that lists names.
``unfill`` walks the same table backwards, from our tensors to the source's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jeagle.config import BlockConfig

__all__ = [
    "ConversionError",
    "Description",
    "Rule",
    "Source",
    "TypedSource",
    "block_rules",
    "check_depth",
    "fill",
    "norm",
    "plain",
    "transposed",
    "unfill",
]


class ConversionError(ValueError):
    """A source that cannot be converted, said in one sentence that names the file or tensor and the mend."""


class Source(Protocol):
    """Named tensors that are read one by one."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored (float32, float16, bfloat16 through ml_dtypes, or an integer or bool type)."""
        ...


class TypedSource(Source, Protocol):
    """A ``Source`` that also knows dtypes without reading."""

    def dtype(self, name: str) -> np.dtype: ...


@dataclass(frozen=True, kw_only=True)
class Rule:
    """``target`` (dotted path of the module state) = make(*sources), and sources = split(target)."""

    target: str
    sources: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]
    make: Callable[..., np.ndarray]
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]  # the inverse of make; views where it can
    integer: bool = False  # integers stay integers (int32); everything else takes the checkpoint's dtype
    narrow: bool = False  # ``make`` also takes sources [rows, 1]: the scales of FP8 ones


@dataclass(frozen=True)
class Description:
    """A foreign source understood: our config, a rule per tensor, tensors left unused, lines for the CLI to print."""

    config: BlockConfig
    rules: list[Rule]
    ignore: frozenset[str]
    notes: tuple[str, ...]


def plain(target: str, source: str, *shape: int) -> Rule:
    """Taken as it is."""
    return Rule(target=target, sources=(source,), source_shapes=(shape,), make=lambda x: x, split=lambda x: (x,))


def norm(target: str, source: str, width: int) -> Rule:
    return plain(f"{target}.scale", f"{source}.weight", width)


def transposed(target: str, source: str, inputs: int, outputs: int) -> Rule:
    """torch Linear [out, in] -> ours [in, out]."""
    return Rule(
        target=target,
        sources=(source,),
        source_shapes=((outputs, inputs),),
        make=lambda x: x.T,
        split=lambda x: (x.T,),
    )


def block_rules(
    config: BlockConfig,
    target: str,
    source: str,
    *,
    input_width: int | None = None,
    attn_norm: str | None = "input_layernorm",
    mlp: str = "mlp",
    interleaved: bool = False,
) -> Iterator[Rule]:
    """One transformer block, from HF names under ``source`` to ours under ``target`` (``jeagle/layers.py``).

    mlp: what the MLP is called. interleaved: rotary embedding turns neighbours of a query or key head (Llama 4), not
    its halves: the even numbers of a head become our first half, the odd ones our second.
    """
    D, K, G, H, F = config.width, config.num_kv_heads, config.queries_per_kv, config.head_dim, config.mlp_width
    I = input_width or D
    attn, mlp = f"{source}.self_attn", f"{source}.{mlp}"

    def halves(heads):  # [K, g, H, ...]
        return np.concatenate([heads[:, :, 0::2], heads[:, :, 1::2]], axis=2) if interleaved else heads

    def pairs(heads):
        return np.stack(np.split(heads, 2, axis=2), axis=3).reshape(heads.shape) if interleaved else heads

    def fuse_qkv(q, k, v):  # [N*H, I], [K*H, I], [K*H, I] -> [I, K, G+2, H]; biases lack the I axis
        heads = [x.reshape(K, g, H, *x.shape[1:]) for x, g in ((q, G), (k, 1), (v, 1))]
        fused = np.concatenate([*map(halves, heads[:2]), heads[2]], axis=1)
        return np.moveaxis(fused, 3, 0) if fused.ndim == 4 else fused

    def split_qkv(fused):
        heads = np.moveaxis(fused, 0, 3) if fused.ndim == 4 else fused
        q, k, v = np.split(heads, (G, G + 1), axis=1)
        return tuple(x.reshape(-1, *x.shape[3:]) for x in (pairs(q), pairs(k), v))

    def fuse_gate_up(gate, up):  # [F, D] twice -> [D, 2, F]; biases [F] twice -> [2, F]
        fused = np.stack([gate, up])
        return np.moveaxis(fused, 2, 0) if fused.ndim == 3 else fused

    def split_gate_up(fused):
        return tuple(np.moveaxis(fused, 0, 2) if fused.ndim == 3 else fused)

    if attn_norm is not None:
        yield norm(f"{target}.attn_norm", f"{source}.{attn_norm}", D)
    qkv = tuple(f"{attn}.{x}_proj" for x in "qkv")
    rows = (K * G * H, K * H, K * H)
    yield Rule(
        target=f"{target}.qkv.kernel",
        sources=tuple(f"{x}.weight" for x in qkv),
        source_shapes=tuple((r, I) for r in rows),
        make=fuse_qkv,
        split=split_qkv,
    )
    yield Rule(
        target=f"{target}.out.kernel",
        sources=(f"{attn}.o_proj.weight",),
        source_shapes=((D, K * G * H),),
        make=lambda x: x.T.reshape(K, G, H, D),
        split=lambda x: (x.reshape(K * G * H, D).T,),
    )
    yield norm(f"{target}.mlp_norm", f"{source}.post_attention_layernorm", D)
    yield Rule(
        target=f"{target}.gate_up.kernel",
        sources=(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
        source_shapes=((F, D), (F, D)),
        make=fuse_gate_up,
        split=split_gate_up,
    )
    yield transposed(f"{target}.down.kernel", f"{mlp}.down_proj.weight", F, D)
    if config.attention_bias:
        yield Rule(
            target=f"{target}.qkv.bias",
            sources=tuple(f"{x}.bias" for x in qkv),
            source_shapes=tuple((r,) for r in rows),
            make=fuse_qkv,
            split=split_qkv,
        )
        yield plain(f"{target}.out.bias", f"{attn}.o_proj.bias", D)
    if config.mlp_bias:
        yield Rule(
            target=f"{target}.gate_up.bias",
            sources=(f"{mlp}.gate_proj.bias", f"{mlp}.up_proj.bias"),
            source_shapes=((F,), (F,)),
            make=fuse_gate_up,
            split=split_gate_up,
        )
        yield plain(f"{target}.down.bias", f"{mlp}.down_proj.bias", D)


def check_depth(names: Iterable[str], prefix: str, layers: int) -> None:
    """Raises ConversionError where the tensors have fewer layers than the config, before a table of all is made."""
    if not any(name.startswith(f"{prefix}{layers - 1}.") for name in names):
        found = {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
        raise ConversionError(
            f"config.json has num_hidden_layers {layers}, but the tensors have {len(found)} layers; correct it, or "
            "fetch the other tensors"
        )


def fill(rules: list[Rule], source: Source, *, ignore: Iterable[str] = ()) -> Iterator[tuple[str, np.ndarray]]:
    """(our path, array) rule by rule. Names and shapes of the whole table are compared at once, before any is read.

    ``ignore`` names source tensors that may be left unused (rotary tables, t2d).
    Raises ConversionError listing missing, unused or misshaped tensors, and NaN or inf by tensor name.
    """
    names = set(source.names())
    wanted = {name for rule in rules for name in rule.sources}
    missing, unused = sorted(wanted - names), sorted(names - wanted - set(ignore))
    if missing or unused:
        raise ConversionError(
            f"the checkpoint's tensors do not match its config: missing {_some(missing)}; not used {_some(unused)}"
        )
    for rule in rules:
        for name, shape in zip(rule.sources, rule.source_shapes, strict=True):
            if tuple(source.shape(name)) != shape:
                raise ConversionError(f"tensor {name} has shape {tuple(source.shape(name))}, the config says {shape}")
    return _made(rules, source)


def _made(rules: list[Rule], source: Source) -> Iterator[tuple[str, np.ndarray]]:
    for rule in rules:
        arrays = [source.read(name) for name in rule.sources]
        for name, array in zip(rule.sources, arrays, strict=True):
            known = np.issubdtype(array.dtype, np.integer) if rule.integer else array.dtype.name in _EXPONENT
            if not known:
                raise ConversionError(
                    f"tensor {name} has dtype {array.dtype}, expected {'integers' if rule.integer else 'floats'}"
                )
            if not rule.integer and not _finite(array):
                raise ConversionError(f"tensor {name} holds NaN or inf; the checkpoint is damaged")
        made = rule.make(*arrays)
        del arrays, array  # while the reader of this generator writes, and then the next rule reads, nothing old stays
        yield rule.target, made
        del made


def unfill(rules: list[Rule], tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (source name, array): the inverse of ``fill``, from our tensors by dotted path. Arrays may be views.

    Raises ConversionError on what ``fill`` would refuse to read back: other tensors than the rules', other shapes, NaN
    or inf, a bad d2t.
    """
    targets = {rule.target for rule in rules}
    missing, unused = sorted(targets - set(tensors)), sorted(set(tensors) - targets)
    if missing or unused:
        raise ConversionError(
            f"the model's tensors do not match its config: missing {_some(missing)}; not used {_some(unused)}; convert "
            "it again"
        )
    for rule in rules:
        array = tensors[rule.target]
        if not rule.integer and not _finite(array):
            raise ConversionError(f"tensor {rule.target} holds NaN or inf; the checkpoint is damaged")
        parts = rule.split(array)
        if rule.integer:
            rule.make(*parts)  # says what is wrong with them
        for name, shape, part in zip(rule.sources, rule.source_shapes, parts, strict=True):
            if part.shape != shape:
                raise ConversionError(f"tensor {name} would have shape {part.shape}, the model's config says {shape}")
            yield name, part


_EXPONENT = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80, "float8_e4m3fn": 0x7F}  # no inf, one NaN


def _finite(array: np.ndarray) -> bool:
    """No NaN and no inf: no exponent of ones. On the bits, as numpy's isfinite is slow on 16-bit floats."""
    exponent = _EXPONENT[array.dtype.name]
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    step = 1 << 22  # pieces: no full-size temporary
    pieces = (np.bitwise_and(bits[i : i + step], exponent) for i in range(0, bits.size, step))
    return all(int(piece.max()) < exponent for piece in pieces)


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{names[:most]}{more}"
