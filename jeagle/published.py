"""Speeds that others have published for our models, as data, to be laid beside a plan's."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LARGE_BATCH_SPEED_UP", "MEASURED", "Measured"]


@dataclass(frozen=True)
class Measured:
    """One request at a time."""

    model: str  # a name of ``sizes.SIZES``
    gpu: str
    devices: int
    tokens_per_second: float
    tokens_per_call: float  # 1: without speculation
    who: str
    bits: int = 16  # of a weight

    @property
    def seconds_per_token(self) -> float:
        return 1 / self.tokens_per_second


MEASURED = (
    Measured("llama-4-maverick", "H100", 8, 250.0, 2.8, "Meta, arXiv:2508.08192 (about 4 ms)", bits=8),
    Measured("llama-4-maverick", "B200", 8, 1000.0, 2.9, "NVIDIA, blog of May 2025 (over 1,000 tokens/s)", bits=8),
    Measured("llama-3.1-8b", "H100", 1, 158.3, 1.0, "SGLang, plain"),
    Measured("llama-3.1-8b", "H100", 1, 378.6, 5.39, "SGLang, EAGLE-3 of 8 steps"),
    Measured("llama-3.1-8b", "H200", 1, 190.0, 1.0, "SGLang, plain"),
    Measured("llama-3.1-8b", "H200", 1, 455.0, 3.91, "SGLang, EAGLE-3 chain of 7"),
    Measured("llama-3.3-70b", "H100", 8, 88.6, 1.0, "SGLang, plain, float16"),
    Measured("llama-3.3-70b", "H100", 8, 234.5, 5.88, "SGLang, EAGLE-3"),
)

LARGE_BATCH_SPEED_UP = (1.4, 2.0)  # Meta, arXiv:2508.08192, abstract: Llama models in production
