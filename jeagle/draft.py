"""The EAGLE drafter: extend, grow, select.

``propose`` looks at what the last round accepted and guesses a tree. It reads the draft cache and hands back the rows
to commit; it never writes. Position i of the head pairs the target's feature at i with the token at i+1, so a tree
node of depth d sits at head position length + d - 1, and the root's own pair is the last of the pending ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jeagle.cache import KVCache, NewKV, Prefix
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.sampling import Filters, RowSampling, gumbel, warp
from jeagle.tree import Tree, TreePlan, ancestor_mask

__all__ = ["COUPLING", "DraftState", "propose"]

# Under sampling a child's score across nodes is log_softmax((log q + noise) / COUPLING): the sharper the head's guess
# of the *sample*, the smaller the best value. Simulated optima: 0.35 / 0.6 / 0.95 at a logit error of 0.5 / 1 / 1.5.
COUPLING = 0.6
# A token the draft's own filters would drop is a poor guess, but better than an empty slot: it ranks after all others.
OUTSIDE = -1e4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftState:
    """What the head remembers between rounds. Its cache shares the target's page table."""

    cache: KVCache
    feature_BPX: jax.Array  # target features of the positions the last round committed, in order
    token_BP: jax.Array  # the token after each of them; the last is the root
    count_B: jax.Array  # how many of the P are real


def propose(
    head: EagleHead,
    target: Llama,
    draft: DraftState,
    prefix: Prefix,
    root_B: jax.Array,
    remaining_B: jax.Array,
    rows: RowSampling,
    *,
    plan: TreePlan,
    filters: Filters,
    attention: str = "auto",
) -> tuple[Tree, list[NewKV]]:
    """Guess what follows ``root_B`` (position prefix.length).

    Args:
      prefix: the target's committed positions. The head has committed draft.count fewer: those are pending.
      remaining_B: tokens the request may still emit. A node of depth d yields d + 1, so deeper ones are not valid.

    Returns the tree and the head's (k_BPKH, v_BPKH) per layer of the pending rows, of which count_B are to be
    committed.
    """
    B, P = draft.token_BP.shape
    committed = prefix.with_length(prefix.length_B - draft.count_B)

    # extend: the pending positions, with the target's true features. The last one predicts the root's children.
    causal_1PP = jnp.tril(jnp.ones((1, P, P), bool))
    position_BP = committed.length_B[:, None] + jnp.arange(P)
    extended = head(
        draft.token_BP,
        head.fuse(draft.feature_BPX),
        position_BP,
        causal_1PP,
        draft.cache,
        committed,
        target=target,
        attention=attention,
    )
    last_B = jnp.maximum(draft.count_B - 1, 0)[:, None, None]
    feature_BFD, hidden_BFD = (
        jnp.take_along_axis(x, last_B, axis=1) for x in (extended.feature_BTD, extended.hidden_BTD)
    )

    # grow: level by level; the suffix is the pending rows and every node run so far.
    earlier = extended.new_kv
    seen_BFU = (jnp.arange(P) < draft.count_B[:, None])[:, None, :]  # what the frontier's nodes may attend to
    no_guess_B1 = jnp.where(draft.count_B == 0, -jnp.inf, 0.0)[:, None]
    score_BF = no_guess_B1  # cumulative; -inf where there is nothing to extend from (a prompt of one token)
    candidate_BF = jnp.full((B, 1), -1, jnp.int32)  # the frontier's own candidate numbers; -1 is the root
    tokens, scores, parents, depths = [], [], [], []
    num_candidates = 0
    for depth, level in enumerate(plan.levels, start=1):
        logits_BFW = head.logits(hidden_BFD, target)
        child_position_B1 = prefix.length_B[:, None] + depth
        token_BFC, gain_BFC = _children(head, logits_BFW, child_position_B1, rows, filters, level.branch)

        kept_n = jnp.array(level.kept)
        slot_n = kept_n // level.branch
        token_Bn = token_BFC.reshape(B, -1)[:, kept_n]
        score_Bn = (score_BF[:, :, None] + gain_BFC).reshape(B, -1)[:, kept_n]
        tokens.append(token_Bn)
        scores.append(score_Bn)
        parents.append(candidate_BF[:, slot_n])
        depths.append(jnp.full_like(token_Bn, depth))
        if depth == plan.max_depth:
            break

        if isinstance(level.frontier, int):
            score_BF, pick_BF = jax.lax.top_k(score_Bn, min(level.frontier, len(level.kept)))
        else:
            pick_BF = jnp.broadcast_to(jnp.array(level.frontier, jnp.int32), (B, len(level.frontier)))
            score_BF = jnp.take_along_axis(score_Bn, pick_BF, axis=1)
        slot_BF = slot_n[pick_BF]  # which node of the previous frontier each new one hangs from
        candidate_BF = num_candidates + pick_BF
        num_candidates += len(level.kept)
        F = pick_BF.shape[1]
        own_BFF = jnp.broadcast_to(jnp.eye(F, dtype=bool), (B, F, F))
        seen_BFU = jnp.concatenate([jnp.take_along_axis(seen_BFU, slot_BF[:, :, None], axis=1), own_BFF], axis=-1)
        step = head(
            jnp.take_along_axis(token_Bn, pick_BF, axis=1),
            jnp.take_along_axis(feature_BFD, slot_BF[:, :, None], axis=1),
            jnp.broadcast_to(prefix.length_B[:, None] + depth - 1, (B, F)),
            seen_BFU,
            draft.cache,
            committed,
            target=target,
            earlier=earlier,
            attention=attention,
        )
        feature_BFD, hidden_BFD = step.feature_BTD, step.hidden_BTD
        earlier = [
            (jnp.concatenate([k, new_k], axis=1), jnp.concatenate([v, new_v], axis=1))
            for (k, v), (new_k, new_v) in zip(earlier, step.new_kv, strict=True)
        ]

    tree = select(
        root_B,
        *(jnp.concatenate(x, axis=1) for x in (tokens, scores, parents, depths)),
        remaining_B=remaining_B,
        plan=plan,
    )
    return tree, extended.new_kv


def _children(
    head: EagleHead,
    logits_BFW: jax.Array,
    position_B1: jax.Array,
    rows: RowSampling,
    filters: Filters,
    branch: int,
) -> tuple[jax.Array, jax.Array]:
    """The ``branch`` best children of each node: target ids and scores (<= 0), both [B, F, C].

    Greedy rows score by log q. Sampled rows add the very noise the target will choose with, so the draft guesses the
    sample, not the mode (Daliri et al., arXiv:2408.07978; taking the top k under one shared noise is ours).
    """
    score_BFW = jax.nn.log_softmax(logits_BFW, axis=-1)
    id_W = jnp.arange(logits_BFW.shape[-1], dtype=jnp.int32)
    if head.draft_to_target is not None:
        id_W = head.draft_to_target[...]
    if filters.sample:
        warped_BFW = warp(logits_BFW, rows, filters)
        outside = warped_BFW == -jnp.inf
        temperature_B11 = rows.temperature_B[:, None, None]
        safe_BFW = jnp.where(outside, logits_BFW + OUTSIDE, warped_BFW)
        noisy_BFW = jax.nn.log_softmax(safe_BFW, axis=-1) + gumbel(rows.seed_B2, position_B1, id_W)
        coupled_BFW = jax.nn.log_softmax(noisy_BFW / COUPLING, axis=-1)
        score_BFW = jnp.where(temperature_B11 == 0, score_BFW, coupled_BFW)
    score_BFW = jnp.where(jnp.isnan(score_BFW), -jnp.inf, score_BFW)
    score_BFC, child_BFC = jax.lax.top_k(score_BFW, branch)
    return id_W[child_BFC], score_BFC


def select(
    root_B: jax.Array,
    token_Bn: jax.Array,
    score_Bn: jax.Array,
    parent_Bn: jax.Array,
    depth_Bn: jax.Array,
    *,
    remaining_B: jax.Array,
    plan: TreePlan,
) -> Tree:
    """The tree of the plan's num_nodes - 1 best candidates, in the order they were made, under ``root_B``.

    parent_Bn holds candidate numbers, -1 for the root. A parent scores at least as much as its child and comes first,
    so the best candidates always form a tree (arXiv:2406.16858, re-ranking).

    Example: candidates a, b (children of the root), c (of a), d (of b) with scores -1, -3, -2, -9 and 4 nodes in all:
    a, b, c are kept, as nodes 1, 2, 3 with parents 0, 0, 1.
    """
    N = plan.num_nodes - 1
    if token_Bn.shape[1] > N:
        _, best_BN = jax.lax.top_k(score_Bn, N)
        best_BN = jnp.sort(best_BN, axis=1)
    else:
        best_BN = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (token_Bn.shape[0], N))
    token_BN, score_BN, parent_BN, depth_BN = (
        jnp.take_along_axis(x, best_BN, axis=1) for x in (token_Bn, score_Bn, parent_Bn, depth_Bn)
    )
    is_parent_BNN = parent_BN[:, :, None] == best_BN[:, None, :]
    new_parent_BN = jnp.where(parent_BN < 0, 0, 1 + jnp.argmax(is_parent_BNN, axis=-1)).astype(jnp.int32)
    # Room for d drafts and the bonus token: a tree never crosses the request's limit, and the cache never overflows.
    valid_BN = (score_BN > -jnp.inf) & (depth_BN < remaining_B[:, None])

    def with_root(root_value: jax.Array, x_BN: jax.Array) -> jax.Array:
        return jnp.concatenate([root_value[:, None].astype(x_BN.dtype), x_BN], axis=1)

    zero_B = jnp.zeros_like(root_B)
    parent_BT = with_root(zero_B, new_parent_BN)
    return Tree(
        token_BT=with_root(root_B, token_BN),
        parent_BT=parent_BT,
        depth_BT=with_root(zero_B, depth_BN),
        mask_BTT=ancestor_mask(parent_BT, plan.max_depth),
        valid_BT=with_root(jnp.ones_like(root_B), valid_BN),
    )
