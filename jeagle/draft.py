"""The EAGLE drafter: extend, grow, select.

``propose`` looks at what the last round accepted and guesses a tree. It reads the draft cache and hands back the rows
to commit; it never writes. Position i of the head pairs the target's feature at i with the token at i+1, so a tree
node of depth d sits at head position length + d - 1, and the root's own pair is the last of the pending ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jeagle import vocabulary
from jeagle.cache import KVCache, NewKV, Prefix, after, commit
from jeagle.eagle import EagleHead, HeadForward
from jeagle.llama import Llama
from jeagle.sampling import Filters, RowSampling, gumbel, warp
from jeagle.sharding import Across, across, rows_first, split
from jeagle.tree import Level, Tree, TreePlan, ancestor_mask

__all__ = ["COUPLING", "Candidates", "DraftState", "propose", "select", "settle"]

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
    start_B: jax.Array  # int32: the first position the head's cache has; 0 unless drafting began in mid-text

    def committed(self, prefix: Prefix) -> Prefix:
        """What the head's cache has of the target's ``prefix``: the P pending positions are yet to come."""
        return Prefix(prefix.page_table_BM, self.start_B, prefix.length_B - self.count_B)


class Candidates(NamedTuple):
    """Possible tree nodes, numbered in the order they are made."""

    token_Bn: jax.Array  # target ids
    score_Bn: jax.Array  # sum of the path's scores, <= 0; -inf where the head said nothing finite
    parent_Bn: jax.Array  # number of the parent, -1 for the root
    depth_Bn: jax.Array


class Frontier(NamedTuple):
    """The F nodes whose children come next."""

    feature_BFD: jax.Array  # what their children's step takes as its feature
    hidden_BFD: jax.Array  # what the LM head reads
    score_BF: jax.Array
    number_BF: jax.Array  # their candidate numbers, -1 for the root
    seen_BFU: jax.Array  # what of the suffix they, and their children, attend to
    earlier: list[NewKV]  # the suffix: keys and values of the pending rows and of every node run so far
    position_BU: jax.Array  # and where they are


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
    vocab = across(head.vocab_axis)

    def of_shard(logits_BFW, position_B1, rows: RowSampling, id_W) -> tuple[jax.Array, jax.Array]:
        id_W = vocabulary.ids(logits_BFW, vocab) if id_W is None else id_W
        score_BFW = _scores(logits_BFW, position_B1, rows, filters, id_W, vocab)
        score_BFC, id_BFC = vocabulary.top_k(score_BFW, branch, id_W, vocab)
        return id_BFC, score_BFC

    id_W = None if head.draft_to_target is None else head.draft_to_target[...]
    nodes = ("rows", None, None)
    inputs = (
        ("rows", None, head.vocab_axis),
        ("rows", None),
        jax.tree.map(rows_first, rows),
        None if id_W is None else (head.vocab_axis,),
    )
    return split(of_shard, inputs, (nodes, nodes))(logits_BFW, position_B1, rows, id_W)


def _scores(
    logits_BFW: jax.Array,
    position_B1: jax.Array,
    rows: RowSampling,
    filters: Filters,
    id_W: jax.Array,
    vocab: Across,
) -> jax.Array:
    """Of every child of each node, in one shard's part of the draft vocabulary."""
    score_BFW = vocabulary.log_softmax(logits_BFW, vocab)
    if filters.sample:
        warped_BFW = warp(logits_BFW, rows, filters, vocab)
        outside = warped_BFW == -jnp.inf
        temperature_B11 = rows.temperature_B[:, None, None]
        scaled_BFW = logits_BFW * (1 / jnp.where(temperature_B11 == 0, 1.0, temperature_B11))
        safe_BFW = jnp.where(outside, scaled_BFW + OUTSIDE, warped_BFW)
        # log q as it is: times 0.88 / 1.15 / 1.3 it keeps 1.96 / 2.02 / 1.97 tokens per call for 2.05 (once, by hand:
        # SmolLM2's own questions at temperature 1, a chain of 4).
        noisy_BFW = vocabulary.log_softmax(safe_BFW, vocab) + gumbel(rows.seed_B2, position_B1, id_W)
        coupled_BFW = vocabulary.log_softmax(noisy_BFW / COUPLING, vocab)
        score_BFW = jnp.where(temperature_B11 == 0, score_BFW, coupled_BFW)
    return jnp.where(jnp.isnan(score_BFW), -jnp.inf, score_BFW)


def _extend(run: Callable[..., HeadForward], head: EagleHead, draft: DraftState, committed: Prefix) -> Frontier:
    """The pending positions, with the target's true features. The last one predicts the root's children."""
    B, P = draft.token_BP.shape
    index_P = jnp.arange(P)
    causal_1PP = jnp.tril(jnp.ones((1, P, P), bool))
    position_BP = committed.length_B[:, None] + index_P
    step = run(draft.token_BP, head.fuse(draft.feature_BPX), position_BP, causal_1PP)
    last_B11 = jnp.maximum(draft.count_B - 1, 0)[:, None, None]
    feature_B1D, hidden_B1D = (jnp.take_along_axis(x, last_B11, axis=1) for x in (step.feature_BTD, step.hidden_BTD))
    # Nothing pending (the first round after a prompt of one token): nothing to predict from.
    score_B1 = jnp.where(draft.count_B == 0, -jnp.inf, 0.0)[:, None]
    seen_B1P = (index_P < draft.count_B[:, None])[:, None, :]
    root_B1 = jnp.full((B, 1), -1, jnp.int32)
    return Frontier(feature_B1D, hidden_B1D, score_B1, root_B1, seen_B1P, step.new_kv, position_BP)


def _keep(level: Level, frontier: Frontier, token_BFC: jax.Array, gain_BFC: jax.Array, depth: int) -> Candidates:
    """The children that the plan makes candidates."""
    B = token_BFC.shape[0]
    kept_n = jnp.array(level.kept)
    token_Bn = token_BFC.reshape(B, -1)[:, kept_n]
    score_Bn = (frontier.score_BF[:, :, None] + gain_BFC).reshape(B, -1)[:, kept_n]
    parent_Bn = frontier.number_BF[:, kept_n // level.branch]
    return Candidates(token_Bn, score_Bn, parent_Bn, jnp.full_like(token_Bn, depth))


def _grow(
    run: Callable[..., HeadForward],
    level: Level,
    frontier: Frontier,
    candidates: Candidates,
    made: int,
    position_B: jax.Array,
) -> Frontier:
    """Run the head over the best of a level's candidates, which are numbered from ``made`` on."""
    B, n = candidates.token_Bn.shape
    if isinstance(level.frontier, int):
        score_BF, pick_BF = _best(candidates.score_Bn, min(level.frontier, n))
    else:
        pick_BF = jnp.broadcast_to(jnp.array(level.frontier, jnp.int32), (B, len(level.frontier)))
        score_BF = jnp.take_along_axis(candidates.score_Bn, pick_BF, axis=1)
    F = pick_BF.shape[1]
    slot_BF1 = (jnp.array(level.kept) // level.branch)[pick_BF][:, :, None]  # which frontier node each one hangs from
    own_BFF = jnp.broadcast_to(jnp.eye(F, dtype=bool), (B, F, F))
    seen_BFU = jnp.concatenate([jnp.take_along_axis(frontier.seen_BFU, slot_BF1, axis=1), own_BFF], axis=-1)
    position_BF = jnp.broadcast_to(position_B[:, None], (B, F))
    step = run(
        jnp.take_along_axis(candidates.token_Bn, pick_BF, axis=1),
        jnp.take_along_axis(frontier.feature_BFD, slot_BF1, axis=1),
        position_BF,
        seen_BFU,
        earlier=frontier.earlier,
        earlier_position_BU=frontier.position_BU,
    )
    earlier = [
        (jnp.concatenate([k, new_k], axis=1), jnp.concatenate([v, new_v], axis=1))
        for (k, v), (new_k, new_v) in zip(frontier.earlier, step.new_kv, strict=True)
    ]
    position_BU = jnp.concatenate([frontier.position_BU, position_BF], axis=1)
    return Frontier(step.feature_BTD, step.hidden_BTD, score_BF, made + pick_BF, seen_BFU, earlier, position_BU)


def _best(score_Bn: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best of every row and their numbers. Split by hand: XLA's partitioner gathers all rows for a top-k."""
    rows = rows_first(score_Bn)
    return split(lambda x: tuple(jax.lax.top_k(x, k)), (rows,), (rows, rows))(score_Bn)


def select(root_B: jax.Array, candidates: Candidates, *, remaining_B: jax.Array, plan: TreePlan) -> Tree:
    """The tree of the plan's num_nodes - 1 best candidates, in the order they were made, under ``root_B``.

    A parent scores at least as much as its child and comes first, so the best candidates always form a tree
    (arXiv:2406.16858, re-ranking).

    Example: candidates a, b (children of the root), c (of a), d (of b) with scores -1, -3, -2, -9 and 4 nodes in all:
    a, b, c are kept, as nodes 1, 2, 3 with parents 0, 0, 1.
    """
    N = plan.num_nodes - 1
    B, n = candidates.token_Bn.shape
    if n > N:
        _, best_BN = _best(candidates.score_Bn, N)
        best_BN = jnp.sort(best_BN, axis=1)
    else:
        best_BN = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
    token_BN, score_BN, parent_BN, depth_BN = (jnp.take_along_axis(x, best_BN, axis=1) for x in candidates)
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
    given: tuple[Tree, jax.Array] | None = None,
    attention: str = "auto",
) -> tuple[Tree, list[NewKV]]:
    """Guess what follows ``root_B`` (position prefix.length).

    Args:
      prefix: the target's committed positions. The head has committed draft.count fewer: those are pending.
      remaining_B: tokens that this round may emit. A node of depth d yields d + 1, so deeper ones are not valid.
      given: a tree from elsewhere, of as many nodes, and bool [B], the rows that take it. Where all do, the head only
        extends.

    Returns the tree and the head's (k_BPKH, v_BPKH) per layer of the pending rows, of which count_B are to be
    committed.
    """
    committed = draft.committed(prefix)
    run = partial(head, cache=draft.cache, prefix=committed, target=target, attention=attention)
    frontier = _extend(run, head, draft, committed)

    def grown() -> Tree:
        """The head's own."""
        last, candidates = frontier, list[Candidates]()
        for depth, level in enumerate(plan.levels, start=1):
            logits_BFW = head.logits(last.hidden_BFD, target)
            position_B1 = prefix.length_B[:, None] + depth
            token_BFC, gain_BFC = _children(head, logits_BFW, position_B1, rows, filters, level.branch)
            candidates.append(_keep(level, last, token_BFC, gain_BFC, depth))
            if depth < len(plan.levels):
                made = sum(c.token_Bn.shape[1] for c in candidates[:-1])
                last = _grow(run, level, last, candidates[-1], made, prefix.length_B + depth - 1)
        joined = (jnp.concatenate(x, axis=1) for x in zip(*candidates))
        own = dataclasses.replace(plan, lookup=0)
        return select(root_B, Candidates(*joined), remaining_B=remaining_B, plan=own).padded(plan.num_nodes)

    if given is None:
        return grown(), frontier.earlier
    tree, taken_B = given

    def mixed() -> Tree:
        choose = lambda x, y: jnp.where(jnp.expand_dims(taken_B, range(1, x.ndim)), x, y)  # noqa: E731
        return jax.tree.map(choose, tree, grown())

    return jax.lax.cond(jnp.all(taken_B), lambda: tree, mixed), frontier.earlier


def settle(head: EagleHead, target: Llama, draft: DraftState, prefix: Prefix, *, attention: str = "auto") -> DraftState:
    """Commit all pending rows but the newest, which becomes the first of the P and the only real one.

    What a round does on its way, for a draft that goes on under a tree of fewer positions P.
    """
    committed = draft.committed(prefix)
    run = partial(head, cache=draft.cache, prefix=committed, target=target, attention=attention)
    frontier = _extend(run, head, draft, committed)
    newest_B = jnp.maximum(draft.count_B - 1, 0)
    index_BP = jnp.broadcast_to(newest_B[:, None], draft.token_BP.shape)  # slots 1 .. P-1 are not real: any row will do
    return dataclasses.replace(
        draft,
        cache=commit(draft.cache, after(frontier.earlier, frontier.hidden_BFD), committed, newest_B),
        feature_BPX=jnp.take_along_axis(draft.feature_BPX, index_BP[:, :, None], axis=1),
        token_BP=jnp.take_along_axis(draft.token_BP, index_BP, axis=1),
        count_B=jnp.minimum(draft.count_B, 1),
    )
