"""How many bytes of a model each device holds, from its config alone: weights, caches, temporaries.

A model is a list of ``Weight``s, each split over as many devices as ``jeagle/sharding.py`` splits it. Sums are exact:
to the byte what a program for the same mesh takes as weights and caches; only ``temp_bytes`` is an estimate. Scaled
formats quantise every matrix, embedding and LM head included, and give each output channel a float32 scale; vectors and
the router, whose choice must not be rounded, stay in bfloat16.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

from jeagle.config import BlockConfig, EagleConfig, LlamaConfig
from jeagle.llama4_config import Llama4Config

__all__ = [
    "CACHE_FORMATS",
    "FORMATS",
    "PAGE_SIZE",
    "Format",
    "Memory",
    "PlanError",
    "Split",
    "Weight",
    "cache_bytes",
    "find_format",
    "head_weights",
    "num_bytes",
    "position_bytes",
    "repeated",
    "target_weights",
    "temp_bytes",
]

PAGE_SIZE = 64  # cache positions per page, as in ``LLM``
SCALE_BYTES = 4


class PlanError(ValueError):
    """What cannot be planned, said in one sentence that names the mend."""


@dataclass(frozen=True)
class Format:
    """How numbers are kept. Weights of ``scaled`` ones have a scale per output channel, caches one per position and kv
    head."""

    name: str
    bits: int
    scaled: bool = False
    runs: bool = True  # whether jeagle can load such weights, and not only plan for them

    @property
    def plain_bytes(self) -> int:
        """Of a number that is not quantised: vectors, activations."""
        return max(2, self.bits // 8)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("float32", 32),
        Format("bfloat16", 16),
        Format("fp8", 8, True),
        Format("int4", 4, True, runs=False),
    )
}
CACHE_FORMATS: dict[str, Format] = {name: FORMATS[name] for name in ("float32", "bfloat16", "fp8")}


_ALIASES = {"bf16": "bfloat16", "f32": "float32", "fp32": "float32", "float8": "fp8", "float8_e4m3fn": "fp8"}


def find_format(name: str, formats: Mapping[str, Format] = FORMATS) -> Format:
    """The format of that name. Raises PlanError, which lists the names."""
    known = _ALIASES.get(name, name)
    if known in formats:
        return formats[known]
    if any(sign in name for sign in ",+/"):
        raise PlanError(
            f"dtype {name!r} mixes several; a model has one: --dtype for the target, --draft-dtype for the head, "
            "--kv-cache-dtype for both caches"
        )
    raise PlanError(f"dtype {name!r} is unknown; use {', '.join(formats)}")


@dataclass(frozen=True)
class Split:
    """A mesh [data, tensor] and what lies how on it, in the words of ``sharding.Rules.choose``."""

    data: int = 1
    tensor: int = 1
    draft: Literal["tensor", "replicated"] = "tensor"
    experts: Literal["mlp", "experts"] = "mlp"

    @property
    def devices(self) -> int:
        return self.data * self.tensor

    @property
    def of_draft(self) -> Split:
        """The head's own: everything whole where it is replicated."""
        return self if self.draft == "tensor" else dataclasses.replace(self, tensor=1)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One array, or the same array of several blocks."""

    name: str
    numbers: int  # of one block, kv heads repeated and vocabulary padded
    parts: int = 1  # devices it is split over
    channels: int = 0  # outputs, each with a scale in scaled formats; 0: never quantised
    channel_parts: int = 1
    blocks: int = 1
    experts: int = 0  # routed ones in ``numbers``; 0: read whole by every forward
    kind: Literal["dense", "table", "fusion", "lm_head"] = "dense"
    number_bytes: int | None = None  # where no format applies

    def bytes(self, format: Format) -> int:
        """On each device."""
        numbers, channels = self.numbers * self.blocks // self.parts, self.channels * self.blocks // self.channel_parts
        if self.number_bytes is not None:
            return numbers * self.number_bytes
        if not self.channels or not format.scaled:
            return numbers * format.plain_bytes
        return numbers * format.bits // 8 + channels * SCALE_BYTES


def num_bytes(weights: Iterable[Weight], format: Format) -> int:
    """On each device."""
    return sum(weight.bytes(format) for weight in weights)


def repeated(config: BlockConfig, tensor: int) -> int:
    """``BlockConfig.kv_copies``. Raises PlanError where there are none."""
    copies = config.kv_copies(tensor)
    if copies is None:
        raise PlanError(
            f"a tensor axis of {tensor} devices does not divide the {config.num_heads} query heads; choose one that "
            "does, or use --data-parallel"
        )
    return copies


def _divided(what: str, width: int, parts: int) -> int:
    if width % parts:
        raise PlanError(
            f"a tensor axis of {parts} devices does not divide {what} of {width}; choose one that does, or use "
            "--data-parallel"
        )
    return parts


def _padded(vocabulary: int, parts: int) -> int:
    return -(-vocabulary // parts) * parts


def _attention(config: BlockConfig, tensor: int, blocks: int, input_width: int | None = None) -> list[Weight]:
    """qkv [D, K*r, G/r+2, H] and out [K, G, H, D] of blocks."""
    D, N, H = config.width, config.num_heads, config.head_dim
    rows = (N + 2 * config.num_kv_heads * repeated(config, tensor)) * H
    weights = [
        Weight(
            name="qkv",
            numbers=(input_width or D) * rows,
            parts=tensor,
            channels=rows,
            channel_parts=tensor,
            blocks=blocks,
        ),
        Weight(name="out", numbers=N * H * D, parts=tensor, channels=D, blocks=blocks),
    ]
    if config.attention_bias:
        weights += [
            Weight(name="qkv bias", numbers=rows, parts=tensor, blocks=blocks),
            Weight(name="out bias", numbers=D, blocks=blocks),
        ]
    return weights


def _mlp(config: BlockConfig, width: int, tensor: int, blocks: int, name: str = "MLP") -> list[Weight]:
    """gate_up [D, 2, F] and down [F, D] of blocks."""
    if not blocks:
        return []
    D, parts = config.width, _divided(f"the {name} width", width, tensor)
    weights = [
        Weight(
            name=f"{name} gate_up",
            numbers=2 * D * width,
            parts=parts,
            channels=2 * width,
            channel_parts=parts,
            blocks=blocks,
        ),
        Weight(name=f"{name} down", numbers=width * D, parts=parts, channels=D, blocks=blocks),
    ]
    if config.mlp_bias:
        weights += [
            Weight(name=f"{name} gate_up bias", numbers=2 * width, parts=parts, blocks=blocks),
            Weight(name=f"{name} down bias", numbers=D, blocks=blocks),
        ]
    return weights


def _experts(config: Llama4Config, split: Split) -> list[Weight]:
    """Router [D, E], shared expert, routed experts [E, D, 2, F] and [E, F, D] of the MoE blocks."""
    D, E, F, blocks = config.width, config.num_experts, config.expert_mlp_width, len(config.moe_layers)
    if not blocks:
        return []
    by_expert = split.experts == "experts"
    what, width = ("the experts", E) if by_expert else ("the expert MLP width", F)
    parts = _divided(what, width, split.tensor)
    routed = partial(Weight, parts=parts, blocks=blocks, experts=E)
    return [
        Weight(name="router", numbers=D * E, blocks=blocks),
        *_mlp(config, F, split.tensor, blocks, "shared expert"),
        routed(name="experts gate_up", numbers=2 * E * D * F, channels=2 * E * F, channel_parts=parts),
        # Split on what it contracts, an expert's down has whole outputs on every device.
        routed(name="experts down", numbers=E * F * D, channels=E * D, channel_parts=parts if by_expert else 1),
    ]


@cache
def target_weights(config: LlamaConfig, split: Split) -> tuple[Weight, ...]:
    """Every weight of a target. Raises PlanError when ``split`` does not divide its heads, MLPs or experts."""
    D, L, tensor = config.width, config.num_layers, split.tensor
    V = _padded(config.vocab_size, tensor)
    vocabulary = partial(Weight, numbers=V * D, parts=tensor, channels=V, channel_parts=tensor)
    moe = len(config.moe_layers) if isinstance(config, Llama4Config) else 0
    weights = [
        vocabulary(name="embed", kind="lm_head" if config.tie_embeddings else "table"),
        *_attention(config, tensor, L),
        Weight(name="norms", numbers=2 * D, blocks=L),
        *_mlp(config, config.mlp_width, tensor, L - moe),
        *(_experts(config, split) if isinstance(config, Llama4Config) else ()),
        Weight(name="norm", numbers=D),
    ]
    if not config.tie_embeddings:
        weights.append(vocabulary(name="lm_head", kind="lm_head"))
    return tuple(weights)


@cache
def head_weights(config: EagleConfig, split: Split) -> tuple[Weight, ...]:
    """Every weight of an EAGLE head, without what it borrows of the target. Raises PlanError as ``target_weights``."""
    D, L, tensor = config.width, config.num_layers, split.of_draft.tensor
    concat = config.fusion == "concat"
    fc_width = 2 * D if concat else config.feature_width
    norms = {"each": len(config.taps) * config.target_width, "joint": config.feature_width, "none": 0}[config.tap_norm]
    norms += 2 * D * (not concat or config.input_norms)  # of embedding and feature
    norms += D * (L - 1 + (concat and config.first_block_norm)) + D * L + D * config.final_norm
    weights = [
        Weight(
            name="fc",
            numbers=fc_width * D,
            parts=_divided("the features of the head's fc", fc_width, tensor),
            channels=D,
            kind="fusion",
        ),
        Weight(name="norms", numbers=norms),
        *_attention(config, tensor, 1, D if concat else 2 * D),
        *(_attention(config, tensor, L - 1) if L > 1 else ()),
        *_mlp(config, config.mlp_width, tensor, L, "draft MLP"),
    ]
    if config.fc_bias:
        weights.append(Weight(name="fc bias", numbers=D))
    if config.own_embedding:
        V = _padded(config.vocab_size, tensor)
        weights.append(
            Weight(name="embed", numbers=V * D, parts=tensor, channels=V, channel_parts=tensor, kind="table")
        )
    if config.own_lm_head:
        W = _padded(config.draft_vocab_size, tensor)
        weights.append(
            Weight(name="lm_head", numbers=W * D, parts=tensor, channels=W, channel_parts=tensor, kind="lm_head")
        )
    if config.reduced_vocabulary:
        W = _padded(config.draft_vocab_size, tensor)
        weights.append(Weight(name="draft_to_target", numbers=W, parts=tensor, number_bytes=4, kind="table"))
    return tuple(weights)


def position_bytes(config: BlockConfig, tensor: int, format: Format) -> int:
    """Keys and values of one position in one layer, on each of ``tensor`` devices: with repeated heads, FP8's with a
    scale per kv head for keys and one for values."""
    heads = config.num_kv_heads * repeated(config, tensor) // tensor
    return 2 * heads * (config.head_dim * format.bits // 8 + SCALE_BYTES * format.scaled)


def cache_bytes(config: BlockConfig, tensor: int, format: Format, rows: int, context: int) -> int:
    """A cache [K*r, pages, 64, H] per layer of ``rows`` requests per device, each of ``context`` positions, in whole
    pages."""
    pages = rows * math.ceil(context / PAGE_SIZE)
    return config.num_layers * pages * PAGE_SIZE * position_bytes(config, tensor, format)


def temp_bytes(config: LlamaConfig, tensor: int, format: Format, positions: int) -> int:
    """An estimate of the decode loop's temporaries for ``positions`` = rows * T on each device.

    XLA keeps every layer's projections apart (a command buffer lets nothing share memory that might run at once), and
    the float32 logits: within 6% of what two Llama 3.1 8B loops compiled for an H100 took
    (scripts/results/compile_h100_32_layers.json). Of a whole vocabulary, sampled rows take twice the logits' bytes more
    (the kernel's lists; compiled for an H100, not counted here). Experts are taken to be as wide as the shared one and
    experts_per_token more. Sharded over eight, one row takes more than that in plain decoding, as XLA lays attention's
    weights out anew before the loop: Llama 3.3 70B 6.8 MB against 2.0 here, Maverick in FP8 221 MB against 0.8
    (scripts/results/compile_mesh_*.json): a hundredth of all weights at most.
    """
    moe, expert = 0, 0
    if isinstance(config, Llama4Config):
        moe, expert = len(config.moe_layers), config.expert_mlp_width * (1 + config.experts_per_token)
    attention = config.num_layers * (config.num_heads + 2 * config.num_kv_heads * repeated(config, tensor))
    numbers = attention * config.head_dim + 3 * ((config.num_layers - moe) * config.mlp_width + moe * expert)
    return positions * (numbers * format.plain_bytes + 4 * _padded(config.vocab_size, tensor)) // tensor


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device. ``temp`` is an estimate until a compiled program says what it takes."""

    weights: int
    draft_weights: int
    cache: int
    draft_cache: int
    temp: int
    measured: bool = False  # a compiled program's own figures

    @property
    def total(self) -> int:
        return self.weights + self.draft_weights + self.cache + self.draft_cache + self.temp
