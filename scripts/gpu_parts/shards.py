"""Part 3c: what one of eight devices computes of Llama 3.3 70B and Llama 4 Maverick, on the one device that there is.

The model of a shard: an eighth of the heads, of every MLP and expert and of the vocabulary, all layers, random bf16
weights, batch 1, a context of 8k. Its collectives are left out, and stand beside the measured compute as ``jeagle
plan`` models them, next to the plan's floor of the same forward: labelled, as no one measured the sum of the two.
"""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any

from gpu_parts.rows import Rows, Settings
from gpu_parts.steps import Subject, contexts, pieces
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.devices import DEVICES
from jeagle.floor import Forward, Job
from jeagle.footprint import Split
from jeagle.llama4_config import Llama4Config
from jeagle.plan import make_plan
from jeagle.sizes import head_for, size
from jeagle.tree import StaticTree

MODELS = ("llama-3.3-70b", "llama-4-maverick")
DEVICES_IN_ALL = 8
DRAFTS = 3  # a chain
STEPS = ("plain step", 1), ("verify step", DRAFTS + 1), ("draft step", 1)


def shard_of[C: LlamaConfig | EagleConfig](config: C, devices: int) -> C:
    """A model of what one device of a tensor axis holds."""
    parts: dict[str, Any] = {
        name: getattr(config, name) // devices for name in ("num_heads", "num_kv_heads", "mlp_width", "vocab_size")
    }
    if isinstance(config, Llama4Config):
        parts["expert_mlp_width"] = config.expert_mlp_width // devices
    if isinstance(config, LlamaConfig):
        parts |= dict(bos_token_id=None, eos_token_ids=())  # ids beyond the shard's vocabulary
    if isinstance(config, EagleConfig):
        parts["draft_vocab_size"] = config.draft_vocab_size // devices
    return dataclasses.replace(config, **parts)


def whole_model(model: str, tiny: bool) -> tuple[LlamaConfig, EagleConfig]:
    if tiny:
        config = LlamaConfig.tiny(head_dim=16, num_layers=1, num_heads=8, num_kv_heads=8, vocab_size=96)
        return config, EagleConfig.for_target(config, "eagle3", draft_vocab_size=48)
    return size(model), head_for(size(model), "eagle3")[0]


def planned(model: str, context: int, tiny: bool) -> dict[tuple[str, int], Forward]:
    """The plan's forwards of the whole model on H100s; the draft step is the second of the round."""
    target, head = whole_model(model, tiny)
    plan = make_plan(
        Job(
            name=model,
            target=target,
            head=head,
            device=DEVICES["h100"],
            split=Split(tensor=DEVICES_IN_ALL),
            context=context,
            tree=StaticTree.chain(DRAFTS),
        )
    )
    return dict(zip(STEPS, (plan.plain, plan.verify, plan.drafts[1]), strict=True))


def measure(rows: Rows, settings: Settings) -> None:
    for model in MODELS[: 1 if settings.tiny else None]:
        target, head = whole_model(model, settings.tiny)
        shards = shard_of(target, DEVICES_IN_ALL), shard_of(head, DEVICES_IN_ALL)
        subject = cache(partial(Subject, *shards, settings))
        context = max(contexts(settings))
        forwards = planned(model, context, settings.tiny)
        for key, make in pieces(subject, settings.tiny, verified=DRAFTS + 1):
            if (forward := forwards.get((key["what"], key["T"]))) is None:
                continue

            def time_it(make=make, forward=forward, context=context) -> dict[str, Any]:
                modelled = dict(modelled_collectives_s=forward.collectives, plan_floor_s=forward.seconds)
                return dict(seconds=make().seconds(context), **modelled)

            shape = f"one of {DEVICES_IN_ALL} shards of {model}"
            rows.measure(time_it, shape=shape, implementation=settings.attention, length=context, **key)
