"""Part 3a: the plain step, the verify step, the draft step, accept + commit, at 1k and 8k positions of context.

Models have random weights, bf16, batch 1, and run inside a loop of known length, whose carry is the cache, as decoding
does: STEPS steps per launch, the best launch over STEPS. The floor of a plain step is the target's weights read once at
the copy bandwidth measured in the same process (an untied embedding is a look-up and does not count).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_decode import STEPS, draft_steps, verify_steps
from flax import nnx
from measuring import make_batch, target_bytes

from gpu_parts.rows import Rows, Settings
from gpu_parts.timing import best_seconds, copy_bandwidth, filled, num_kernels, require_memory
from jeagle.cache import KVCache, commit
from jeagle.checkpoint import abstract
from jeagle.config import BlockConfig, EagleConfig, LlamaConfig
from jeagle.decode import DecodeState, Program
from jeagle.decoder import Decoder
from jeagle.placement import filled as module_of
from jeagle.placement import placements, repeat_kv_heads
from jeagle.sharding import Layout
from jeagle.sizes import size
from jeagle.tree import OFF, StaticTree, Tree, TreePlan, ancestor_mask
from jeagle.verify import accept

SHAPES = {"8B": "llama-3.1-8b", "1B": "llama-3.2-1b"}
CONTEXTS, NODES = (1024, 8192), (1, 32, 8, 64)
ROOM = 256  # cache positions beyond the longest context
NEVER = 1 << 30  # max_tokens of a row that is to go on


def config_of(shape: str) -> LlamaConfig:
    return LlamaConfig.tiny(head_dim=16, num_layers=1) if shape == "tiny" else size(SHAPES[shape])


def with_random_weights(config: BlockConfig, layout: Layout | None = None) -> Any:
    """A bf16 model that is never initialised twice over, as float32 and random bits would be; each device makes its
    own part."""
    stored = abstract(config, jnp.bfloat16)
    module = stored if layout is None else abstract(repeat_kv_heads(config, layout), jnp.bfloat16)
    arrays = {}
    for seed, (path, placed) in enumerate(placements(stored, module, layout).items()):
        if jnp.issubdtype(placed.dtype, jnp.integer):  # a TokenMap
            make = partial(jnp.arange, placed.shape[0], dtype=placed.dtype)
        else:
            make = partial(filled, placed.shape, placed.dtype, seed, 0.05)
        arrays[path] = jax.jit(make, out_shardings=placed.sharding)()
    return module_of(module, arrays)


class Subject:
    """A target of random weights and a head for it, ready to decode."""

    def __init__(self, config: LlamaConfig, head_config: EagleConfig, settings: Settings, layout: Layout | None = None):
        require_memory(2 * config.num_parameters * 5 // 4 // (1 if layout is None else layout.mesh.size))
        target = with_random_weights(config, layout)
        self.head = with_random_weights(head_config, layout)
        self.config, self.attention, self.contexts = config, settings.attention, contexts(settings)
        self.decoder = Decoder(target, self.head, layout=layout)
        self.definitions = tuple(nnx.graphdef(m) for m in (target, self.head))
        self.params = self.decoder.params
        self.weight_bytes = target_bytes(target)

    def program(self, plan: TreePlan = OFF) -> Program:
        return Program(plan=plan, attention=self.attention)

    def state(self, plan: TreePlan = OFF) -> DecodeState:
        """One row whose whole cache is filled: any length is a context."""
        capacity = max(self.contexts) + ROOM
        state = self.decoder.start(make_batch(1, [10], NEVER), self.program(plan), capacity=capacity, chunk=64)
        draft = state.draft
        if draft is not None:
            draft = dataclasses.replace(draft, cache=full(draft.cache), count_B=self.decoder.put(np.ones(1, np.int32)))
        return dataclasses.replace(state, cache=full(state.cache), draft=draft)


def subject_of(shape: str, settings: Settings) -> Subject:
    """With an EAGLE-3 head (draft vocabulary 32,000)."""
    config = config_of(shape)
    draft_vocab = min(32_000, config.vocab_size // 2)
    return Subject(config, EagleConfig.for_target(config, "eagle3", draft_vocab_size=draft_vocab), settings)


def contexts(settings: Settings) -> tuple[int, ...]:
    return (32, 96) if settings.tiny else CONTEXTS


def full(pages: KVCache) -> KVCache:
    return jax.tree.map(lambda x: jax.jit(partial(filled, x.shape, x.dtype), out_shardings=x.sharding)(), pages)


class Timed:
    """A compiled ``function(params, state) -> state`` of STEPS steps; the state is donated and used again."""

    def __init__(self, function: Callable[[Any, DecodeState], DecodeState], params: Any, state: DecodeState):
        self.compiled = jax.jit(function, donate_argnums=1).lower(params, state).compile()
        self.params, self.state = params, state

    def seconds(self, context: int) -> float:
        """Of one step, from ``context`` positions on."""

        def run() -> DecodeState:
            state = dataclasses.replace(self.state, length_B=jnp.full(1, context, jnp.int32))
            self.state = self.compiled(self.params, state)
            return self.state

        return best_seconds(run) / STEPS


def accept_steps(new_kv, state: DecodeState, *, num_nodes: int) -> DecodeState:
    """STEPS times: walk down a tree of four branches whose choices depend on the length, and commit the path."""
    node_1T = jnp.arange(num_nodes, dtype=jnp.int32)[None, :]
    depth_1T, deepest = (node_1T + 3) // 4, (num_nodes + 2) // 4
    parent_1T = jnp.maximum(node_1T - 4, 0)
    tree = Tree(node_1T, parent_1T, depth_1T, ancestor_mask(parent_1T, deepest), node_1T >= 0)

    def step(_, state: DecodeState) -> DecodeState:
        agrees_1T = (node_1T + state.length_B[:, None]) % 5 > 0  # else the target chooses what no node holds
        chosen_1T = jnp.where(agrees_1T, jnp.where(node_1T == 0, 1, node_1T + 4), num_nodes + 4)
        path_BP, num_accepted_B = accept(tree, chosen_1T, deepest + 1)
        num_emitted_B = num_accepted_B + 1
        pages = commit(state.cache, new_kv, state.prefix, num_emitted_B, path_BP)
        return dataclasses.replace(state, cache=pages, length_B=state.length_B + num_emitted_B)

    return jax.lax.fori_loop(0, STEPS, step, state)


def pieces(
    subject: Callable[[], Subject], tiny: bool, verified: int | None = None
) -> Iterator[tuple[dict[str, Any], Callable[[], Timed]]]:
    """(what, T) and how its program is made; those that targets ask for come first. verified: first T to verify."""

    def verify(num_nodes: int) -> Timed:
        s = subject()
        steps = partial(verify_steps, s.definitions[0], num_nodes=num_nodes, taps=s.head.config.taps)
        return Timed(partial(steps, attention=s.attention), s.params[0], s.state())

    def draft() -> Timed:
        s = subject()
        steps = partial(draft_steps, s.definitions, attention=s.attention)
        return Timed(steps, s.params, s.state(StaticTree.chain(1)))

    def accept_commit(num_nodes: int) -> Timed:
        s = subject()
        shape = (1, num_nodes, s.config.num_kv_heads, s.config.head_dim)
        new_kv = [(filled(shape, jnp.bfloat16, 1), filled(shape, jnp.bfloat16, 2)) for _ in range(s.config.num_layers)]
        return Timed(partial(accept_steps, num_nodes=num_nodes), new_kv, s.state())

    first, second, *others = (1, verified or 4) if tiny else (1, verified or NODES[1], *NODES[2:])
    for T in (first, second):
        yield dict(what="plain step" if T == 1 else "verify step", T=T), partial(verify, T)
    yield dict(what="draft step", T=1), draft
    yield dict(what="accept + commit", T=second), partial(accept_commit, second)
    for T in others:
        yield dict(what="verify step", T=T), partial(verify, T)


def measure(rows: Rows, settings: Settings) -> None:
    copied = rows.measure(lambda: copy_bandwidth(tiny=settings.tiny), what="copy bandwidth")
    for shape in ("tiny",) if settings.tiny else SHAPES:
        subject = cache(partial(subject_of, shape, settings))
        for key, make in pieces(subject, settings.tiny):
            timed = cache(make)
            for context in contexts(settings):

                def time_it(timed=timed, subject=subject, context=context) -> dict[str, Any]:
                    seconds, kernels = timed().seconds(context), num_kernels(timed().compiled)
                    floor = subject().weight_bytes / copied["bytes_per_second"]
                    return dict(seconds=seconds, kernels=kernels, weight_floor_s=floor)

                rows.measure(time_it, shape=shape, implementation=settings.attention, length=context, **key)
