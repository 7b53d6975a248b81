"""What a model is: frozen, complete and validated descriptions of a target and of its EAGLE head.

The converter fills every field, so no layer ever falls back to a default. The same dataclasses are written to and read
from ``config.json`` of our checkpoints (``to_json`` / ``from_json``). Letters in comments are the shape key of
``jeagle/__init__.py``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

__all__ = ["BlockConfig", "ConfigError", "EagleConfig", "LlamaConfig", "RopeScaling", "default_taps"]


class ConfigError(ValueError):
    """A model description that cannot be built, said in one sentence."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the pre-training one.

    ``linear`` divides every frequency by ``factor``. ``llama3`` divides only the slow ones and blends in between (Llama
    3.1 release notes; HF ``rope_type: llama3``); the last three fields belong to it alone.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ConfigError(f"rope_scaling kind {self.kind!r} is not supported; it must be 'linear' or 'llama3'")
        if not self.factor >= 1.0:
            raise ConfigError(f"rope_scaling factor must be at least 1, got {self.factor}")
        # Equal in Llama 4 Scout, where no frequency lies between the two.
        if self.kind == "llama3" and not self.high_freq_factor >= self.low_freq_factor > 0:
            raise ConfigError(
                f"rope_scaling high_freq_factor ({self.high_freq_factor}) must be at least low_freq_factor "
                f"({self.low_freq_factor}), which must be positive"
            )
        length = self.original_max_position
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length < 1 << 63:
            raise ConfigError(f"rope_scaling original_max_position must be a positive whole number, got {length!r}")


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The transformer block that targets and heads share."""

    family: ClassVar[str]  # what config.json calls this kind of model

    width: int  # D
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    mlp_width: int  # F
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    attention_bias: bool
    mlp_bias: bool
    vocab_size: int  # V: the target's vocabulary, for a head too
    max_position: int

    def __post_init__(self) -> None:
        for name in (
            "width",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_width",
            "vocab_size",
            "max_position",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if not self.norm_eps > 0 or not self.rope_theta > 0:
            raise ConfigError(f"norm_eps and rope_theta must be positive, got {self.norm_eps} and {self.rope_theta}")

    @property
    def axis_prefix(self) -> str:
        """What the names of this model's split axes begin with (``jeagle.sharding.Rules``)."""
        return ""

    @property
    def kv_axis(self) -> str:
        return self.axis_prefix + "kv_heads"

    @property
    def queries_per_kv(self) -> int:
        """G = N / K."""
        return self.num_heads // self.num_kv_heads

    def kv_copies(self, devices: int) -> int | None:
        """r: how often each kv head is repeated, the fewest times, so that ``devices`` share K*r of them evenly and
        its G query heads are dealt to its copies evenly. None where no r does both: ``devices`` do not divide N."""
        for copies in range(1, self.queries_per_kv + 1):
            if self.num_kv_heads * copies % devices == 0 and self.queries_per_kv % copies == 0:
                return copies
        return None

    def to_json(self) -> dict[str, Any]:
        return {"family": self.family, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Inverse of ``to_json``. Raises ConfigError on missing, unknown or mistyped fields."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        data = dict(data)
        family = data.pop("family", None)
        if family != cls.family:
            raise ConfigError(f"config.json says family {family!r}, expected {cls.family!r}")
        unknown = sorted(set(data) - set(fields))
        missing = sorted(set(fields) - set(data))
        if unknown or missing:
            raise ConfigError(f"config.json: unknown fields {unknown}, missing fields {missing}; convert it again")
        if data["rope_scaling"] is not None:
            data["rope_scaling"] = RopeScaling(**data["rope_scaling"])
        for name, value in data.items():
            if isinstance(value, list):
                data[name] = tuple(value)
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(BlockConfig):
    """A dense Llama target: Llama 2, 3.x and every ``LlamaForCausalLM``."""

    family: ClassVar[str] = "llama"

    tie_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for token in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if not 0 <= token < self.vocab_size:
                raise ConfigError(f"special token id {token} is outside the vocabulary of {self.vocab_size}")

    @property
    def num_parameters(self) -> int:
        d, f, h = self.width, self.mlp_width, self.head_dim
        block = d * h * (2 * self.num_heads + 2 * self.num_kv_heads) + 3 * d * f + 2 * d
        return self.num_layers * block + d + (1 if self.tie_embeddings else 2) * self.vocab_size * d

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """A model for tests: two layers, 32 wide, random weights run in microseconds."""
        return cls(
            **{
                **dict(
                    width=32,
                    num_layers=2,
                    num_heads=4,
                    num_kv_heads=2,
                    head_dim=8,
                    mlp_width=64,
                    norm_eps=1e-5,
                    rope_theta=10000.0,
                    rope_scaling=None,
                    attention_bias=False,
                    mlp_bias=False,
                    vocab_size=97,
                    max_position=256,
                    tie_embeddings=False,
                    bos_token_id=1,
                    eos_token_ids=(2,),
                ),
                **overrides,
            }
        )


@dataclass(frozen=True, kw_only=True)
class EagleConfig(BlockConfig):
    """An EAGLE head. Two ways of fusing what the target knows, everything else by flags.

    ``concat`` (EAGLE-1/2, HASS, Meta's multi-layer dense head): every step feeds ``fc([embedding ; feature])`` to
    ordinary blocks; the feature is the target's final normed hidden state, then the head's own output.

    ``attention`` (EAGLE-3, 3.1): ``fc`` maps the target's tapped residual streams to one feature, once; the first
    block's attention reads ``[norm(embedding) ; norm(feature)]`` and its residual stream is the feature.
    """

    family: ClassVar[str] = "eagle"

    fusion: Literal["concat", "attention"]
    target_width: int
    target_layers: int | None  # None where the source does not say; checked when head and target meet
    taps: tuple[int, ...]  # residual stream entering block i of the target; () taps the final normed hidden state
    draft_vocab_size: int  # W; below V the head carries draft_to_target
    own_embedding: bool  # False: the target's embedding
    own_lm_head: bool  # False: the target's LM head
    fc_bias: bool
    input_norms: bool  # concat only: norms on embedding and feature before fc (HASS)
    first_block_norm: bool  # concat only: EAGLE-1 has no input norm in block 0, Meta's head has
    tap_norm: Literal["none", "joint", "each"]  # attention only: RMSNorm before fc, over all taps or per tap (3.1)
    norm_before_residual: bool  # attention only: the residual stream starts from the normed feature
    final_norm: bool  # a norm before the LM head
    norm_output: bool  # the feature handed to the next step is the normed output (Meta, EAGLE-3.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fusion not in ("concat", "attention"):
            raise ConfigError(f"fusion must be 'concat' or 'attention', got {self.fusion!r}")
        if self.tap_norm not in ("none", "joint", "each"):
            raise ConfigError(f"tap_norm must be 'none', 'joint' or 'each', got {self.tap_norm!r}")
        if self.fusion == "attention":
            if not self.taps:
                raise ConfigError("taps must name at least one block of the target for an EAGLE-3 head")
            if self.input_norms or not self.first_block_norm:
                raise ConfigError("input_norms and first_block_norm=False belong to EAGLE-1 heads, not to EAGLE-3")
        else:
            if self.taps or self.tap_norm != "none" or self.norm_before_residual:
                raise ConfigError("taps, tap_norm and norm_before_residual belong to EAGLE-3 heads, not to EAGLE-1")
            if self.width != self.target_width:
                raise ConfigError(
                    f"an EAGLE-1 head is as wide as its target: width {self.width}, target_width {self.target_width}"
                )
        if self.target_layers is not None and any(not 0 <= t <= self.target_layers for t in self.taps):
            raise ConfigError(f"taps {self.taps} must lie in 0..{self.target_layers}, the target's blocks")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ConfigError(
                f"draft_vocab_size ({self.draft_vocab_size}) must lie in 1..vocab_size ({self.vocab_size})"
            )
        if not self.own_lm_head and self.draft_vocab_size != self.vocab_size:
            raise ConfigError("a reduced draft_vocab_size needs the head's own lm_head")
        if self.width != self.target_width and not (self.own_embedding and self.own_lm_head):
            raise ConfigError(
                f"a head of width {self.width} on a target of width {self.target_width} needs its own embedding and "
                "lm_head"
            )
        if self.norm_output and not self.final_norm:
            raise ConfigError("norm_output needs final_norm")

    @property
    def axis_prefix(self) -> str:
        return "draft_"

    @property
    def feature_width(self) -> int:
        """Width of what the target hands over per position: all taps side by side, or the final hidden state."""
        return self.target_width * max(1, len(self.taps))

    @property
    def reduced_vocabulary(self) -> bool:
        return self.draft_vocab_size < self.vocab_size

    @classmethod
    def for_target(cls, target: LlamaConfig, kind: Literal["eagle1", "eagle3", "meta"], **overrides: Any) -> Self:
        """A head of the published form for ``target``: EAGLE-1, EAGLE-3 (three taps) or Meta's dense head."""
        shared = {f.name: getattr(target, f.name) for f in dataclasses.fields(BlockConfig)}
        layers = target.num_layers
        values = dict(
            shared,
            num_layers=1,
            fusion="attention" if kind == "eagle3" else "concat",
            target_width=target.width,
            target_layers=layers,
            taps=default_taps(layers) if kind == "eagle3" else (),
            draft_vocab_size=target.vocab_size,
            own_embedding=False,
            own_lm_head=kind == "eagle3",
            fc_bias=False,
            input_norms=False,
            first_block_norm=kind != "eagle1",
            tap_norm="none",
            norm_before_residual=False,
            final_norm=kind != "eagle1",
            norm_output=kind == "meta",
        )
        return cls(**{**values, **overrides})


def default_taps(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's taps: the inputs of blocks 2, L//2 and L-3 (clamped for models of fewer than five layers)."""
    low, middle, high = 2, num_layers // 2, num_layers - 3
    return min(low, num_layers), middle, max(high, 0)
