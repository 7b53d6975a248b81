"""Prefill and the decode loop: two compiled programs over one ``DecodeState``.

    prefill_chunk   T prompt positions of every row: target and head forward, commit. Called until the prompts are in.
    launch          lax.while_loop over round_step: draft, verify, accept, commit, stop. No host in between.

Prefill commits all of a prompt but its last token; that one is the root of the first round. So the first token comes out
of the same program as every other, and a prompt of one token needs no prefill. Knows token ids only, no strings.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle.cache import KVCache, Prefix, commit
from jeagle.draft import DraftState, propose
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.sampling import Filters, RowSampling, choose
from jeagle.tree import OFF, Tree, TreePlan
from jeagle.verify import accept

__all__ = ["FINISH_REASONS", "Batch", "DecodeState", "Decoder", "Program", "round_step"]

FINISH_REASONS = (None, "stop", "length")  # DecodeState.finish_B indexes it


@dataclass(frozen=True)
class Program:
    """What is compiled in: with the shapes of the state, the whole key of a compiled decode program."""

    plan: TreePlan = OFF
    filters: Filters = Filters()
    num_logprobs: int | None = None  # None: no log-probabilities; n: the chosen token's and the n best
    attention: str = "auto"

    @property
    def num_path(self) -> int:
        """P: most tokens a round can emit."""
        return self.plan.max_depth + 1

    @property
    def drafts(self) -> bool:
        return self.plan.num_nodes > 1


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
    output_BO: jax.Array  # int32: emitted tokens
    num_output_B: jax.Array  # int32: how many of them
    logprobs: Logprobs | None
    finish_B: jax.Array  # int32: index into FINISH_REASONS; 0 while running
    num_rounds_B: jax.Array  # int32: target forwards this row took part in
    acceptance_BP: jax.Array  # int32: how many rounds kept 0, 1, .. P-1 draft tokens

    @property
    def prefix(self) -> Prefix:
        return Prefix.full(self.page_table_BM, self.length_B)


@dataclass(frozen=True)
class Batch:
    """Requests of one batch, on the host. Rows beyond the requests are padding: ``max_tokens`` 0."""

    prompts: list[np.ndarray]  # int32 ids, each at least one
    sampling: RowSampling
    stop_id_BI: np.ndarray
    max_tokens_B: np.ndarray


def round_step(target: Llama, head: EagleHead | None, state: DecodeState, program: Program) -> DecodeState:
    """One round for every row: propose a tree, verify it in one target forward, keep what the target chose."""
    running_B = state.finish_B == 0
    prefix, remaining_B = state.prefix, state.max_tokens_B - state.num_output_B
    pending_kv = None
    if state.draft is None or head is None or not program.drafts:
        tree = Tree.root_only(state.root_B)
    else:
        tree, pending_kv = propose(
            head,
            target,
            state.draft,
            prefix,
            state.root_B,
            remaining_B,
            state.sampling,
            plan=program.plan,
            filters=program.filters,
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
    chosen_BT = choose(logits_BTV, position_BT + 1, state.sampling, program.filters)
    path_BP, num_accepted_B = accept(tree, chosen_BT, program.num_path)

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
    draft = state.draft
    if draft is not None and pending_kv is not None:
        # The barrier orders this write after the last read of the head's cache; without that dependency XLA may copy
        # the whole cache to keep both versions alive.
        pending_kv, _ = jax.lax.optimization_barrier((pending_kv, num_emitted_B))
        committed = prefix.with_length(state.length_B - draft.count_B)
        draft = DraftState(
            commit(draft.cache, pending_kv, committed, jnp.where(running_B, draft.count_B, 0)),
            jnp.take_along_axis(forward.feature_BTX, path_BP[:, :, None], axis=1),
            emitted_BP,
            num_emitted_B,
        )

    def put(output: jax.Array, new: jax.Array) -> jax.Array:
        """Append the emitted part of ``new`` [B, P, ...] to ``output`` [B, O, ...]."""
        slot_BP = jnp.where(index_P < num_emitted_B[:, None], state.num_output_B[:, None] + index_P, output.shape[1])
        return output.at[jnp.arange(output.shape[0])[:, None], slot_BP].set(new.astype(output.dtype), mode="drop")

    logprobs = state.logprobs
    if logprobs is not None:
        path_logits_BPV = jnp.take_along_axis(logits_BTV, path_BP[:, :, None], axis=1)
        all_BPV = jax.nn.log_softmax(path_logits_BPV, axis=-1)
        chosen_BP = jnp.take_along_axis(all_BPV, emitted_BP[:, :, None], axis=2)[..., 0]
        top, top_id = jax.lax.top_k(all_BPV, program.num_logprobs or 0)
        logprobs = Logprobs(
            put(logprobs.chosen_BO, chosen_BP), put(logprobs.top_BOn, top), put(logprobs.top_id_BOn, top_id)
        )

    last_B = jnp.maximum(num_emitted_B - 1, 0)[:, None]
    histogram_BP = (index_P == num_emitted_B[:, None] - 1).astype(jnp.int32)
    return dataclasses.replace(
        state,
        cache=cache,
        draft=draft,
        length_B=state.length_B + num_emitted_B,
        root_B=jnp.where(running_B, jnp.take_along_axis(emitted_BP, last_B, axis=1)[:, 0], state.root_B),
        output_BO=put(state.output_BO, emitted_BP),
        num_output_B=num_output_B,
        logprobs=logprobs,
        finish_B=finish_B,
        num_rounds_B=state.num_rounds_B + running_B,
        acceptance_BP=state.acceptance_BP + histogram_BP,
    )


def _launch(definitions, params, state: DecodeState, most_rounds: jax.Array, *, program: Program) -> DecodeState:
    """Rounds until every row has finished or ``most_rounds`` have run."""

    def go_on(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        rounds, state = carry
        return (rounds < most_rounds) & jnp.any(state.finish_B == 0)

    def one_round(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        rounds, state = carry
        return rounds + 1, round_step(*_merge(definitions, params), state, program)

    return jax.lax.while_loop(go_on, one_round, (jnp.int32(0), state))[1]


def _prefill_chunk(
    definitions, params, state: DecodeState, token_BT1: jax.Array, offset: jax.Array, prompt_B: jax.Array, *, program
) -> DecodeState:
    """Positions [offset, offset + T) of every prompt; rows whose prompt has ended keep nothing.

    token_BT1: T + 1 ids from ``offset`` on, as the head reads the token after each position. prompt_B: prompt lengths.
    """
    target, head = _merge(definitions, params)
    B, T = token_BT1.shape[0], token_BT1.shape[1] - 1
    # The prompt's last token stays out: it is the root of the first round.
    wanted_B = prompt_B - 1
    count_B = jnp.clip(wanted_B - offset, 0, T)
    prefix = Prefix.full(state.page_table_BM, jnp.minimum(wanted_B, offset))
    position_BT = jnp.broadcast_to(offset + jnp.arange(T, dtype=jnp.int32), (B, T))
    causal = jnp.tril(jnp.ones((1, T, T), bool))
    forward = target(
        token_BT1[:, :-1],
        position_BT,
        causal,
        state.cache,
        prefix,
        taps=() if head is None else head.config.taps,
        attention=program.attention,
    )
    draft = state.draft
    if draft is not None and head is not None:
        ran = head(
            token_BT1[:, 1:],
            head.fuse(forward.feature_BTX),
            position_BT,
            causal,
            draft.cache,
            prefix,
            target=target,
            attention=program.attention,
        )
        # The last pair (feature of the last committed position, root) stays pending: the first round extends it.
        last_B = wanted_B - 1 - offset
        here_B = (last_B >= 0) & (last_B < T)
        index_B11 = jnp.clip(last_B, 0, T - 1)[:, None, None]
        feature_BX = jnp.take_along_axis(forward.feature_BTX, index_B11, axis=1)[:, 0]
        feature_BX = jnp.where(here_B[:, None], feature_BX, draft.feature_BPX[:, 0])
        draft = DraftState(
            commit(draft.cache, ran.new_kv, prefix, jnp.clip(wanted_B - 1 - offset, 0, T)),
            draft.feature_BPX.at[:, 0].set(feature_BX),
            draft.token_BP,
            draft.count_B,
        )
    cache = commit(state.cache, forward.new_kv, prefix, count_B)
    return dataclasses.replace(state, cache=cache, draft=draft, length_B=prefix.length_B + count_B)


def _merge(definitions, params) -> tuple[Llama, EagleHead | None]:
    target, head = (None if d is None else nnx.merge(d, p) for d, p in zip(definitions, params, strict=True))
    assert target is not None
    return target, head


class Decoder:
    """A target, perhaps a head, and their compiled programs."""

    def __init__(self, target: Llama, head: EagleHead | None = None, *, page_size: int = 64, attention: str = "auto"):
        if head is not None:
            check_pair(target, head)
        self.target_config = target.config
        self.head_config = None if head is None else head.config
        self.page_size = page_size
        self.attention = attention
        self.dtype = target.embed[...].dtype
        split = [(None, None) if m is None else nnx.split(m) for m in (target, head)]
        definitions = tuple(d for d, _ in split)
        # Weights are arguments, not constants baked into the program; states are donated so that caches are updated in
        # place; graph definitions are closed over, as hashing them on every call costs milliseconds.
        self.params = tuple(p for _, p in split)
        self._prefill = jax.jit(
            partial(_prefill_chunk, definitions), static_argnames=("program",), donate_argnums=(1,)
        )
        self._launch = jax.jit(partial(_launch, definitions), static_argnames=("program",), donate_argnums=(1,))

    def start(self, batch: Batch, program: Program, *, capacity: int) -> DecodeState:
        """The state before prefill: empty caches of ``capacity`` positions per row."""
        B, P = len(batch.max_tokens_B), program.num_path
        M = -(-capacity // self.page_size)
        pages = dict(num_pages=B * M, page_size=self.page_size, dtype=self.dtype)
        prompt_B = np.array([len(p) for p in batch.prompts] + [1] * (B - len(batch.prompts)))
        root_B = np.array([p[-1] for p in batch.prompts] + [0] * (B - len(batch.prompts)), np.int32)
        draft = None
        if self.head_config is not None and program.drafts:
            draft = DraftState(
                KVCache.create(self.head_config, **pages),
                jnp.zeros((B, P, self.head_config.feature_width), self.dtype),
                jnp.zeros((B, P), jnp.int32).at[:, 0].set(root_B),
                jnp.asarray(prompt_B > 1, jnp.int32),
            )
        logprobs = None
        if program.num_logprobs is not None:
            shape = (B, capacity, program.num_logprobs)
            logprobs = Logprobs(jnp.zeros(shape[:2]), jnp.zeros(shape), jnp.zeros(shape, jnp.int32))
        zero_B = np.zeros(B, np.int32)
        return DecodeState(
            cache=KVCache.create(self.target_config, **pages),
            draft=draft,
            page_table_BM=jnp.arange(B * M, dtype=jnp.int32).reshape(B, M),
            length_B=jnp.asarray(zero_B),
            root_B=jnp.asarray(root_B),
            sampling=batch.sampling,
            stop_id_BI=jnp.asarray(batch.stop_id_BI),
            max_tokens_B=jnp.asarray(batch.max_tokens_B),
            output_BO=jnp.zeros((B, capacity), jnp.int32),
            num_output_B=jnp.asarray(zero_B),
            logprobs=logprobs,
            finish_B=jnp.asarray(np.where(batch.max_tokens_B > 0, 0, 2).astype(np.int32)),
            num_rounds_B=jnp.asarray(zero_B),
            acceptance_BP=jnp.zeros((B, P), jnp.int32),
        )

    def prefill(self, state: DecodeState, prompts: list[np.ndarray], program: Program, *, chunk: int) -> DecodeState:
        """Run the prompts in chunks of ``chunk`` positions, all rows side by side, each to its own length."""
        B = state.root_B.shape[0]
        prompt_B = np.array([len(p) for p in prompts] + [1] * (B - len(prompts)), np.int32)
        longest = int(prompt_B.max()) - 1
        num_chunks = -(-longest // chunk)
        token_BT = np.zeros((B, num_chunks * chunk + 1), np.int32)
        for row, prompt in zip(token_BT, prompts, strict=False):
            row[: len(prompt)] = prompt
        for i in range(num_chunks):
            piece = token_BT[:, i * chunk : (i + 1) * chunk + 1]
            # Prefill does not depend on the plan's shape or on sampling: one program serves all of them.
            state = self._prefill(
                self.params,
                state,
                jnp.asarray(piece),
                jnp.int32(i * chunk),
                jnp.asarray(prompt_B),
                program=Program(attention=program.attention),
            )
        return state

    def launch(self, state: DecodeState, program: Program, most_rounds: int) -> DecodeState:
        """Up to ``most_rounds`` rounds on the device; returns at once, the state is a promise."""
        return self._launch(self.params, state, jnp.int32(most_rounds), program=program)


def check_pair(target: Llama, head: EagleHead) -> None:
    """Raises ValueError when the head was not made for this target."""
    t, h = target.config, head.config
    if h.target_width != t.width:
        raise ValueError(f"the draft head was made for a target of width {h.target_width}; this one has {t.width}")
    if h.vocab_size != t.vocab_size:
        raise ValueError(f"the draft head's vocabulary is {h.vocab_size}; the target's is {t.vocab_size}")
    if any(tap > t.num_layers for tap in h.taps) or h.target_layers not in (None, t.num_layers):
        raise ValueError(f"the draft head taps blocks {h.taps} of {h.target_layers}; the target has {t.num_layers}")
