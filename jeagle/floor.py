"""How long one forward of a target or a head takes at best: a roofline over weights, keys and values, and links.

For B rows of T positions over a context of S, in seconds on each device:

    weights      bytes of the weights read / bandwidth. Of E routed experts E (1 - (1 - 1/E)^(B T k)) are read: uniform,
                 independent routing, an upper estimate, as tokens of one chain choose alike
    KV           bytes of the keys and values that B rows see / bandwidth; min(S, chunk) of them in chunked layers
    compute      operations of all products / the tensor cores' peak for the weights' format
    collectives  per all-reduce a latency and 2 (n-1)/n of its bytes / link bandwidth; two per block, one for the
                 embedding, one for the choice over the split vocabulary; a split head's fc has one more

    forward  =  max(weights + KV, compute) / efficiency  +  collectives

With an efficiency of 1 this is a floor: launches, norms, sampling, acceptance and the host take no time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jeagle.config import BlockConfig, EagleConfig, LlamaConfig
from jeagle.devices import MEMORY_SHARE, Device
from jeagle.footprint import FORMATS, Format, PlanError, Split, Weight, head_weights, position_bytes, target_weights
from jeagle.llama4_config import Llama4Config

if TYPE_CHECKING:
    from jeagle.tree import TreePlan

__all__ = ["Forward", "Job", "all_reduce_seconds", "draft_forwards", "expected_experts", "target_forward"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to run on what. Raises PlanError where the parts do not go together."""

    name: str  # the target's, for messages
    target: LlamaConfig
    head: EagleConfig | None  # None: plain decoding
    device: Device
    split: Split
    format: Format = FORMATS["bfloat16"]  # of the target's weights
    draft_format: Format = FORMATS["bfloat16"]
    cache_format: Format = FORMATS["bfloat16"]  # of both caches
    batch: int = 1  # rows over all data shards
    context: int  # cache positions per row: prompt, output and the tree's root
    tree: TreePlan | None
    tokens_per_call: float = 1.0  # bonus token included, as ``RequestMetrics`` counts; 1 without a head
    efficiency: float = 1.0  # share of bandwidth and peak that is reached
    memory_fraction: float = MEMORY_SHARE
    link_latency: float | None = None  # seconds per all-reduce; None: the device's

    def __post_init__(self) -> None:
        for name in ("batch", "context"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("efficiency", "memory_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise PlanError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if self.batch % self.split.data:
            raise PlanError(
                f"a batch of {self.batch} rows does not divide over a data axis of {self.split.data}; choose a "
                f"multiple of {self.split.data}"
            )
        if self.context > self.target.max_position:
            raise PlanError(
                f"context must be at most {self.target.max_position}, the max_position of {self.name}, got "
                f"{self.context}"
            )
        if self.link_latency is not None and self.link_latency < 0:
            raise PlanError(f"link_latency must not be negative, got {self.link_latency}")
        if (self.head is None) != (self.tree is None or not self.tree.levels):
            raise PlanError("a draft needs a tree and a tree needs a draft; name both, or turn both off")
        longest = 1 if self.tree is None else self.tree.max_depth + 1
        if not 1 <= self.tokens_per_call <= longest:
            raise PlanError(
                f"tokens_per_call must lie in 1..{longest}, what this tree can yield, got {self.tokens_per_call}"
            )

    @property
    def rows(self) -> int:
        """On each device."""
        return self.batch // self.split.data

    @property
    def usable_bytes(self) -> int:
        """Of each device's memory."""
        return int(self.device.memory_bytes * self.memory_fraction)

    @property
    def latency(self) -> float:
        return self.device.link_latency if self.link_latency is None else self.link_latency


def expected_experts(num_experts: int, choices: int) -> float:
    """How many of E experts ``choices`` independent uniform choices hit: E (1 - (1 - 1/E)^choices)."""
    return num_experts * (1 - (1 - 1 / num_experts) ** choices)


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The terms of one forward, seconds on each device."""

    name: str
    weights: float
    kv: float
    compute: float
    collectives: float
    weight_bytes: int  # read on each device
    all_reduces: int

    @property
    def terms(self) -> dict[str, float]:
        """What adds up to ``seconds``: memory and arithmetic go on side by side, so the lesser of them is hidden."""
        hidden = self.compute < self.weights + self.kv
        work = dict(weights=self.weights, KV=self.kv) if hidden else dict(compute=self.compute)
        return {**work, "collectives": self.collectives}

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One forward of a model, as each device of ``tensor`` sees it."""

    name: str
    model: BlockConfig
    tensor: int
    body: list[Weight]
    lm_head: list[Weight]  # its own or the target's
    positions: int
    scored: int  # positions that the LM head reads
    format: Format
    lm_head_format: Format
    messages: list[float]  # bytes of each all-reduce


def _forward(job: Job, call: _Call) -> Forward:
    model, device = call.model, job.device
    read = seconds = kv_bytes = 0.0
    for weights, positions, format in (
        (call.body, call.positions, call.format),
        (call.lm_head, call.scored, call.lm_head_format),
    ):
        operations = 0.0
        for weight in weights:
            read += _share_read(job, model, weight, positions) * weight.bytes(format)
            operations += 2 * positions * _share_used(model, weight) * weight.numbers * weight.blocks / weight.parts
        seconds += operations / device.peak(format.bits)
    for layer in range(model.num_layers):
        seen = _seen(model, layer, job.context)
        kv_bytes += job.rows * seen * position_bytes(model, call.tensor, job.cache_format)
        products = 4 * call.positions * seen * model.num_heads * model.head_dim / call.tensor
        seconds += products / device.peak(16)
    return Forward(
        name=call.name,
        weights=read / device.bandwidth / job.efficiency,
        kv=kv_bytes / device.bandwidth / job.efficiency,
        compute=seconds / job.efficiency,
        collectives=sum(all_reduce_seconds(job, size) for size in call.messages),
        weight_bytes=round(read),
        all_reduces=len(call.messages),
    )


def _share_read(job: Job, model: BlockConfig, weight: Weight, positions: int) -> float:
    """Of a weight's bytes on a device, what one forward reads."""
    if weight.kind == "table":
        return min(1.0, positions * model.width * weight.parts / weight.numbers)
    if weight.experts and isinstance(model, Llama4Config):
        hit = expected_experts(weight.experts, positions * model.experts_per_token)
        # Where whole experts are dealt out, the slowest device has one to read even if that is the only one hit.
        return max(hit, job.split.tensor if job.split.experts == "experts" else 0) / weight.experts
    return 1.0


def _share_used(model: BlockConfig, weight: Weight) -> float:
    """Of a weight's numbers, those that one position is multiplied by."""
    if weight.kind == "table" or not weight.channels:
        return 0.0
    if weight.experts and isinstance(model, Llama4Config):
        return model.experts_per_token / weight.experts
    return 1.0


def _seen(model: BlockConfig, layer: int, context: int) -> int:
    """Positions that a layer reads: in chunked layers the current chunk's, at most."""
    if isinstance(model, Llama4Config) and model.attention_chunk is not None and layer not in model.nope_layers:
        return min(context, model.attention_chunk)
    return context


def all_reduce_seconds(job: Job, size: float) -> float:
    """Seconds for ``size`` bytes that every device of the tensor axis has a summand of."""
    n = job.split.tensor
    return job.latency + 2 * (n - 1) / n * size / job.device.link_bandwidth


def target_forward(job: Job, name: str, nodes: int) -> Forward:
    """The target over ``nodes`` positions per row, all of which are scored."""
    config, tensor, positions = job.target, job.split.tensor, job.rows * nodes
    activations = positions * config.width * job.format.plain_bytes
    # The embedding, two per block, and the choice: of each position a number and an id from every shard.
    messages: list[float] = [activations for _ in range(2 * config.num_layers + 1)]
    messages.append(positions * 8 * tensor)
    weights = target_weights(config, job.split)
    call = _Call(
        name=name,
        model=config,
        tensor=tensor,
        body=[w for w in weights if w.kind != "lm_head"],
        lm_head=[w for w in weights if w.kind == "lm_head"],
        positions=positions,
        scored=positions,
        format=job.format,
        lm_head_format=job.format,
        messages=messages if tensor > 1 else [],
    )
    return _forward(job, call)


def draft_forwards(job: Job) -> Iterator[Forward]:
    """The head, once per level. The first runs over all positions of the last path and scores its end."""
    config, tree, split = job.head, job.tree, job.split.of_draft
    assert config is not None and tree is not None
    frontiers = [tree.max_depth + 1, *(level.frontier_size for level in tree.levels[:-1])]
    own = head_weights(config, job.split)
    borrowed = [] if config.own_lm_head else [w for w in target_weights(job.target, job.split) if w.kind == "lm_head"]
    for i, (level, frontier) in enumerate(zip(tree.levels, frontiers, strict=True)):
        positions, scored = job.rows * frontier, job.rows * (1 if i == 0 else frontier)
        # EAGLE-3 fuses the target's taps once per round; the others mix embedding and feature at every step.
        fused = i == 0 or config.fusion == "concat"
        body = [w for w in own if w.kind != "lm_head" and (w.kind != "fusion" or fused)]
        size = positions * config.width * job.draft_format.plain_bytes
        embedding = [size] * (split.tensor > 1 or not config.own_embedding)
        choice = [scored * level.branch * 8 * job.split.tensor] * (split.tensor > 1 or not config.own_lm_head)
        blocks = [size] * ((2 * config.num_layers + fused) * (split.tensor > 1))
        call = _Call(
            name=f"draft {i + 1}",
            model=config,
            tensor=split.tensor,
            body=body,
            lm_head=borrowed or [w for w in own if w.kind == "lm_head"],
            positions=positions,
            scored=scored,
            format=job.draft_format,
            lm_head_format=job.format if borrowed else job.draft_format,
            messages=[*embedding, *blocks, *choice] if job.split.tensor > 1 else [],
        )
        yield _forward(job, call)
