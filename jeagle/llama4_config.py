"""What a Llama 4 target, or Meta's head for one, is beyond ``config.py``: iRoPE, chunked attention, routed experts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from jeagle.config import BlockConfig, ConfigError, EagleConfig, LlamaConfig

__all__ = ["IRopeConfig", "Llama4Config", "Llama4EagleConfig", "TemperatureTuning"]


@dataclass(frozen=True, kw_only=True)
class TemperatureTuning:
    """Queries at position p are scaled by 1 + attn_scale * log(1 + floor((p + 1) / floor_scale)): Llama 4's attention
    without rotary embedding stays sharp in contexts longer than the training ones (arXiv:2501.19399; HF
    ``Llama4TextAttention``)."""

    floor_scale: int
    attn_scale: float

    def __post_init__(self) -> None:
        if not self.floor_scale >= 1 or not self.attn_scale > 0:
            raise ConfigError(
                f"temperature_tuning needs floor_scale >= 1 and attn_scale > 0, got {self.floor_scale} and "
                f"{self.attn_scale}"
            )


@dataclass(frozen=True, kw_only=True)
class IRopeConfig(BlockConfig):
    """Llama 4's attention, of a target or of a head: most blocks rotary and chunked, the others neither."""

    nope_layers: tuple[int, ...]  # blocks without rotary embedding: full attention, temperature tuning, no QK norm
    attention_chunk: int | None  # positions of a chunk, in blocks with rotary embedding; None: no chunks
    qk_norm: bool  # L2 norm, without weights, of rotated queries and keys
    temperature_tuning: TemperatureTuning | None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers("nope_layers", self.nope_layers, self.num_layers)
        if self.attention_chunk is not None and (not isinstance(self.attention_chunk, int) or self.attention_chunk < 1):
            raise ConfigError(f"attention_chunk must be a positive integer or None, got {self.attention_chunk!r}")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        if isinstance(data.get("temperature_tuning"), dict):
            data = {**data, "temperature_tuning": TemperatureTuning(**data["temperature_tuning"])}
        return super().from_json(data)


@dataclass(frozen=True, kw_only=True)
class Llama4Config(IRopeConfig, LlamaConfig):
    """A Llama 4 text target: iRoPE, and routed experts beside a shared one in some or all blocks."""

    family: ClassVar[str] = "llama4"

    num_experts: int  # E
    moe_layers: tuple[int, ...]  # blocks of routed experts and a shared expert; the others are dense, mlp_width wide
    expert_mlp_width: int  # F of one routed expert and of the shared expert
    experts_per_token: int  # 1 in every published model

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_experts", "expert_mlp_width", "experts_per_token"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(f"experts_per_token ({self.experts_per_token}) exceeds num_experts ({self.num_experts})")
        _check_layers("moe_layers", self.moe_layers, self.num_layers)
        if self.mlp_bias:
            raise ConfigError("mlp_bias must be False: no MLP of Llama 4 has biases")

    @property
    def num_parameters(self) -> int:
        d, f = self.width, self.expert_mlp_width
        expert, dense = 3 * d * f, 3 * d * self.mlp_width
        moe = (self.num_experts + 1) * expert + d * self.num_experts
        return super().num_parameters + len(self.moe_layers) * (moe - dense)

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """For tests: four layers, dense and routed in turn, every second without rotary embedding, chunks of 16."""
        values = dict(
            num_layers=4,
            num_experts=4,
            moe_layers=(1, 3),
            expert_mlp_width=48,
            experts_per_token=1,
            nope_layers=(1, 3),
            attention_chunk=16,
            qk_norm=True,
            temperature_tuning=TemperatureTuning(floor_scale=4, attn_scale=0.3),
        )
        return super().tiny(**{**values, **overrides})


@dataclass(frozen=True, kw_only=True)
class Llama4EagleConfig(IRopeConfig, EagleConfig):
    """Meta's head for Llama 4: its ``concat`` form, of dense blocks with Llama 4's attention. (EAGLE-3 heads for Llama
    4 are ordinary ones.)"""

    family: ClassVar[str] = "llama4_eagle"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fusion != "concat":
            raise ConfigError("a head with Llama 4's attention fuses by 'concat'; EAGLE-3 heads have Llama's")

    @classmethod
    def for_target(
        cls, target: LlamaConfig, kind: Literal["eagle1", "eagle3", "meta"] = "meta", **overrides: Any
    ) -> Self:
        """Meta's head for ``target``, every block rotary, chunked as the target's."""
        irope = {name: getattr(target, name) for name in _IROPE}
        return super().for_target(target, kind, **{**irope, "nope_layers": (), **overrides})


_IROPE = {f.name for f in dataclasses.fields(IRopeConfig)} - {f.name for f in dataclasses.fields(BlockConfig)}


def _check_layers(name: str, layers: tuple[int, ...], num_layers: int) -> None:
    if list(layers) != sorted(set(layers)) or any(not 0 <= i < num_layers for i in layers):
        raise ConfigError(f"{name} must list blocks in 0..{num_layers - 1}, each once and in order, got {layers}")
