"""One round of decoding as a pure function, and the loop that runs many of them on the device.

``round_step`` proposes a tree, verifies it in one target forward, accepts, commits and decides who has finished.
``launch`` is a ``lax.while_loop`` over it: no host, no transfer in between. Knows token ids only, no strings.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jeagle import draft, lookup, sampling
from jeagle.cache import KVCache, Prefix, after, commit
from jeagle.draft import DraftState
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.sampling import Filters, RowSampling, choose
from jeagle.sharding import rows_first, split
from jeagle.tree import OFF, StaticTree, Tree, TreePlan
from jeagle.verify import accept, force

__all__ = ["FINISH_REASONS", "DecodeState", "Logprobs", "Program", "grown", "launch", "round_step"]

FINISH_REASONS = (None, "stop", "length")  # DecodeState.finish_B indexes it


@dataclass(frozen=True)
class Program:
    """What is compiled in: with the shapes of the state, the whole key of a compiled decode program."""

    plan: TreePlan = OFF
    filters: Filters = Filters()
    num_logprobs: int | None = None  # None: no log-probabilities; n: the chosen token's and the n best
    attention: str = "auto"
    sampler: str = "auto"
    profile: tuple[float, ...] | None = None  # for measuring only: acceptance as ``verify.force`` draws it

    @property
    def num_path(self) -> int:
        """P: most tokens a round can emit."""
        return self.plan.max_depth + 1

    @property
    def drafts(self) -> bool:
        """Whether the head takes part."""
        return bool(self.plan.levels)

    @property
    def looks_up(self) -> bool:
        """Whether rows may draft from their own text. Forced drafts are the head's."""
        return self.plan.lookup > 0 and self.profile is None

    @property
    def num_counted(self) -> int:
        """N: nodes that have the same place in all the head's trees: all of a static one, the root of a dynamic one."""
        return len(self.plan.paths) + 1 if isinstance(self.plan, StaticTree) else 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """By the unwarped target, of every emitted token."""

    chosen_BO: jax.Array  # float32
    top_BOn: jax.Array  # float32, best first
    top_id_BOn: jax.Array  # int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """All that changes during decoding, and the request parameters that do not. Donated to every program."""

    cache: KVCache  # the target's
    draft: DraftState | None  # the head's; None for plain decoding
    page_table_BM: jax.Array  # int32, shared by both caches
    length_B: jax.Array  # int32: committed target positions
    root_B: jax.Array  # int32: the last emitted token, not yet in the cache
    sampling: RowSampling
    stop_id_BI: jax.Array  # int32: ids that end a row, padded with -1
    max_tokens_B: jax.Array  # int32
    text_BS: jax.Array  # int32: the prompt and all emitted tokens, each at its position; the last is the root
    num_output_B: jax.Array  # int32: how many have been emitted
    logprobs: Logprobs | None
    finish_B: jax.Array  # int32: index into FINISH_REASONS; 0 while running
    num_rounds_B: jax.Array  # int32: target forwards this row took part in
    acceptance_BP: jax.Array  # int32: how many rounds kept 0, 1, .. P-1 draft tokens
    looked_BP: jax.Array  # int32: of them, how many rounds that looked their drafts up
    # Of rounds that the head drafted; for the root of all.
    tried_BN: jax.Array  # int32: per node, rounds in which it was valid and its parent on the accepted path
    kept_BN: jax.Array  # int32: per node, rounds in which it lay on that path itself, cut by a stop token or not
    lookup_B: jax.Array  # bool: rows that may look drafts up; measurements of the head's rounds forbid it

    @property
    def prefix(self) -> Prefix:
        return Prefix.full(self.page_table_BM, self.length_B)

    def without_caches(self) -> DecodeState:
        """What has rows first: all but the caches and their pages, which are None here."""
        none: Any = None
        draft = None if self.draft is None else dataclasses.replace(self.draft, cache=none)
        return dataclasses.replace(self, cache=none, page_table_BM=none, draft=draft)

    def with_caches_of(self, other: DecodeState) -> DecodeState:
        draft = self.draft
        if draft is not None and other.draft is not None:
            draft = dataclasses.replace(draft, cache=other.draft.cache)
        return dataclasses.replace(self, cache=other.cache, page_table_BM=other.page_table_BM, draft=draft)


def round_step(target: Llama, head: EagleHead | None, state: DecodeState, program: Program) -> DecodeState:
    """One round for every row: propose a tree, verify it in one target forward, keep what the target chose."""
    running_B = state.finish_B == 0
    prefix, remaining_B = state.prefix, state.max_tokens_B - state.num_output_B
    room_B = target.room_B(state.length_B)
    if room_B is not None:
        remaining_B = jnp.minimum(remaining_B, room_B)
    tree, looked_B = Tree.root_only(state.root_B).padded(program.plan.num_nodes), jnp.zeros_like(running_B)
    given = None
    if program.looks_up:
        asked_B = state.lookup_B & running_B
        texts, temperature_B = (state.text_BS, state.length_B), state.sampling.temperature_B
        tree, looked_B = lookup.propose(*texts, remaining_B, asked_B, temperature_B, plan=program.plan)
        given = tree, looked_B | ~running_B
    pending_kv = None
    if state.draft is not None and head is not None and program.drafts:
        tree, pending_kv = draft.propose(
            head,
            target,
            state.draft,
            prefix,
            state.root_B,
            remaining_B,
            state.sampling,
            plan=program.plan,
            filters=program.filters,
            given=given,
            attention=program.attention,
        )

    # verify
    position_BT = state.length_B[:, None] + tree.depth_BT
    forward = target(
        tree.token_BT,
        position_BT,
        tree.mask_BTT,
        state.cache,
        prefix,
        taps=() if head is None else head.config.taps,
        attention=program.attention,
    )
    logits_BTV = target.logits(forward.hidden_BTD)
    chosen_BT = choose(logits_BTV, position_BT + 1, state.sampling, program.filters, sampler=program.sampler)
    if program.profile is None:
        path_BP, num_accepted_B = accept(tree, chosen_BT, program.num_path)
    else:
        seed_B2 = state.sampling.seed_B2
        path_BP, num_accepted_B = force(tree, seed_B2, state.length_B, program.profile, program.num_path)

    # emit: the path's choices up to the first stop token. Stop comes before the length limit: an EOS in the last slot
    # is reported as a stop.
    emitted_BP = jnp.take_along_axis(chosen_BT, path_BP, axis=1)
    index_P = jnp.arange(program.num_path, dtype=jnp.int32)
    is_stop_BP = jnp.any(emitted_BP[:, :, None] == state.stop_id_BI[:, None, :], axis=-1)
    is_stop_BP &= index_P <= num_accepted_B[:, None]
    stopped_B = jnp.any(is_stop_BP, axis=1) & running_B
    num_emitted_B = jnp.where(stopped_B, jnp.argmax(is_stop_BP, axis=1).astype(jnp.int32), num_accepted_B) + 1
    num_emitted_B = jnp.where(running_B, num_emitted_B, 0)
    num_output_B = state.num_output_B + num_emitted_B
    full_B = num_output_B >= state.max_tokens_B
    finish_B = jnp.where(stopped_B, 1, jnp.where(full_B & running_B, 2, state.finish_B))

    # commit: of the target's cache the path, of the head's the pending rows.
    cache = commit(state.cache, forward.new_kv, prefix, num_emitted_B, path_BP)
    drafted = state.draft
    if drafted is not None and pending_kv is not None:
        kept_B = jnp.where(running_B, drafted.count_B, 0)
        drafted = dataclasses.replace(
            drafted,
            cache=commit(drafted.cache, after(pending_kv, num_emitted_B), drafted.committed(prefix), kept_B),
            feature_BPX=jnp.take_along_axis(forward.feature_BTX, path_BP[:, :, None], axis=1),
            token_BP=emitted_BP,
            count_B=num_emitted_B,
        )

    def put(output: jax.Array, new: jax.Array, first_B: jax.Array) -> jax.Array:
        """The emitted part of ``new`` [B, P, ...] into the slots from ``first`` on of ``output`` [B, O, ...]."""
        slot_BP = jnp.where(index_P < num_emitted_B[:, None], first_B[:, None] + index_P, output.shape[1])

        def of_shard(output: jax.Array, new: jax.Array, slot_BP: jax.Array) -> jax.Array:
            return output.at[jnp.arange(len(output))[:, None], slot_BP].set(new.astype(output.dtype), mode="drop")

        arrays = output, new, slot_BP
        return split(of_shard, tuple(map(rows_first, arrays)), rows_first(output))(*arrays)

    logprobs = state.logprobs
    if logprobs is not None:
        path_logits_BPV = jnp.take_along_axis(logits_BTV, path_BP[:, :, None], axis=1)
        found = sampling.logprobs(path_logits_BPV, emitted_BP, program.num_logprobs or 0)
        logprobs = jax.tree.map(partial(put, first_B=state.num_output_B), logprobs, Logprobs(*found))

    last_B = jnp.maximum(num_emitted_B - 1, 0)[:, None]
    histogram_BP = (index_P == num_emitted_B[:, None] - 1).astype(jnp.int32)
    # Nodes that the request's end or a border made invalid were not tried: they say nothing about the head.
    N = program.num_counted
    on_path_BPN = (path_BP[:, :, None] == jnp.arange(N)) & (index_P <= num_accepted_B[:, None])[:, :, None]
    kept_BN = jnp.any(on_path_BPN, axis=1) & running_B[:, None]
    drafted_BN = (jnp.arange(N) == 0) | ~looked_B[:, None]
    kept_BN &= drafted_BN
    tried_BN = jnp.take_along_axis(kept_BN, tree.parent_BT[:, :N], axis=1) & tree.valid_BT[:, :N] & drafted_BN
    return dataclasses.replace(
        state,
        cache=cache,
        draft=drafted,
        length_B=state.length_B + num_emitted_B,
        root_B=jnp.where(running_B, jnp.take_along_axis(emitted_BP, last_B, axis=1)[:, 0], state.root_B),
        text_BS=put(state.text_BS, emitted_BP, state.length_B + 1),
        num_output_B=num_output_B,
        logprobs=logprobs,
        finish_B=finish_B,
        num_rounds_B=state.num_rounds_B + running_B,
        acceptance_BP=state.acceptance_BP + histogram_BP,
        looked_BP=state.looked_BP + jnp.where(looked_B[:, None], histogram_BP, 0),
        tried_BN=state.tried_BN + tried_BN,
        kept_BN=state.kept_BN + kept_BN,
    )


def launch(
    target: Llama,
    head: EagleHead | None,
    state: DecodeState,
    most_rounds: jax.Array,
    least_running: jax.Array,
    program: Program,
) -> DecodeState:
    """Rounds until fewer than ``least_running`` rows are unfinished, or ``most_rounds`` have run. Both int32 []."""

    def go_on(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        rounds, state = carry
        return (rounds < most_rounds) & (jnp.sum(state.finish_B == 0) >= least_running)

    def one_round(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        rounds, state = carry
        return rounds + 1, round_step(target, head, state, program)

    return jax.lax.while_loop(go_on, one_round, (jnp.int32(0), state))[1]


def grown(state: DecodeState, *, more_pages: int) -> DecodeState:
    """``more_pages`` for every row, whose pages lie in order before and after."""
    B, M = state.page_table_BM.shape
    page_size = state.cache.keys[0].shape[2]

    def longer(x: jax.Array, axis: int, by: int) -> jax.Array:
        return jnp.pad(x, [(0, by if i == axis else 0) for i in range(x.ndim)])

    def more(pages: jax.Array) -> jax.Array:
        of_rows = pages.reshape(pages.shape[0], B, M, *pages.shape[2:])
        return longer(of_rows, 2, more_pages).reshape(pages.shape[0], -1, *pages.shape[2:])

    cache = jax.tree.map(more, state.cache)
    draft, logprobs, by = state.draft, state.logprobs, more_pages * page_size
    return dataclasses.replace(
        state,
        cache=cache,
        draft=None if draft is None else dataclasses.replace(draft, cache=jax.tree.map(more, draft.cache)),
        page_table_BM=jnp.arange(B * (M + more_pages), dtype=jnp.int32).reshape(B, -1),
        text_BS=longer(state.text_BS, 1, by),
        logprobs=jax.tree.map(lambda x: longer(x, 1, by), logprobs),
    )
