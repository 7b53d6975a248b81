"""Teacher and student on packed rows.

The teacher is the frozen target, run once over the rows. The student is the head, unrolled as decoding will run it
(EAGLE-3's training-time test, arXiv:2503.01840): step 0 reads the target's features, step k its own output of step k-1.
At row index i, step k stands for the draft of depth k+1 made when position i was the last one the target had verified:

    input     the token at i+1+k, and the feature: the target's at i (k = 0), else what step k-1 put out at i
    position  i+k
    sees      step 0's keys up to i, and of steps 1..k its own column i alone (those are its ancestors in the draft)
    predicts  the token at i+2+k, so it is held against the target's distribution at i+1+k
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jeagle import vocabulary
from jeagle.eagle import EagleHead
from jeagle.layers import LayerAttend
from jeagle.llama import Llama
from jeagle.sharding import Across
from jeagle.training.losses import acceptance, lump, smooth_l1
from jeagle.training.packing import Rows

__all__ = [
    "Measures",
    "Objective",
    "Teacher",
    "begun",
    "learn",
    "num_learnt",
    "packed_attention",
    "target_probabilities",
    "teach",
    "unroll",
]

CHUNK = 2048  # positions whose target logits are alive at once


class Teacher(NamedTuple):
    """What the head learns from, per packed position. No logits: they are made again from ``hidden`` where needed,
    over the draft vocabulary only (a V-wide array per position would be the largest thing in memory)."""

    feature_BTX: jax.Array
    hidden_BTD: jax.Array
    scale_BT: jax.Array  # what its logits are multiplied with: 1 / temperature, 0 for its choice alone
    lse_BT: jax.Array  # log-sum-exp of the scaled logits over its whole vocabulary
    best_BT: jax.Array  # its argmax
    top_p_BTk: jax.Array | None  # with top_k: probabilities of the k likeliest ids of the draft vocabulary ..
    top_id_BTk: jax.Array | None  # .. and which they are (draft ids)
    covered_BT: jax.Array | None  # .. and the probability of the whole draft vocabulary


class Objective(NamedTuple):
    """What is minimised; static."""

    loss: Callable[[jax.Array, jax.Array], jax.Array]
    depth: int  # K: how many steps the head is unrolled
    decay: float = 0.8  # step k weighs decay^k
    reach: float = 0.0  # and (chance that all earlier drafts are accepted)^reach, detached; after arXiv:2605.18810
    token_weight: float = 1.0
    feature_weight: float = 0.0  # of smooth-L1 against the target's hidden states (EAGLE-1: 1.0, with token_weight 0.1)
    top_k: int | None = None  # hold the head against the target's k likeliest ids and one class for the rest
    own_temperature: bool = False  # the target at the temperature of the answer, at 0 its choice alone, and not at 1
    feature_noise: float = 0.0  # half-width of uniform noise on the target's features
    remat: bool = False  # run each step again in the backward pass: one step's attention and logits are alive at a time

    def asked_of_target(self) -> dict[str, Any]:
        """The options of ``teach``."""
        return dict(top_k=self.top_k, own_temperature=self.own_temperature)


class Measures(NamedTuple):
    """Sums over positions, [K] each, by depth: divide by ``num``, the chain's by ``chain_num``."""

    loss: jax.Array
    num: jax.Array
    alpha: jax.Array  # expected acceptance of a sampled draft: sum min(p, q)
    match: jax.Array  # the head's best token is the target's best
    chain_alpha: jax.Array  # product of alpha over this and all earlier depths
    chain_match: jax.Array  # this and all earlier depths match
    chain_num: jax.Array  # positions with K drafts to judge
    round_match: jax.Array  # of the rounds of decoding, as ``begun`` finds them: this and all earlier depths match
    round_num: jax.Array

    def means(self) -> dict[str, Any]:
        """What to report: per-depth means, and the tokens per call that a chain of K would reach.

        ``tau_greedy`` and ``tau_sampled`` add up the chance that the first 1, 2, .. K drafts all survive, and the bonus
        token: an estimate from every position of the text, where decoding starts its rounds after a rejection.
        ``tau_rounds`` is of such rounds alone: what decoding at temperature 0 gets on answers of temperature 0.
        """
        m = {name: np.asarray(x, np.float64) for name, x in self._asdict().items()}
        num, chains, rounds = (np.maximum(m[name], 1) for name in ("num", "chain_num", "round_num"))
        return {
            "loss_by_depth": (m["loss"] / num).tolist(),
            "alpha": (m["alpha"] / num).tolist(),
            "match": (m["match"] / num).tolist(),
            "tau_greedy": 1 + float(np.sum(m["chain_match"] / chains)),
            "tau_sampled": 1 + float(np.sum(m["chain_alpha"] / chains)),
            "tau_rounds": 1 + float(np.sum(m["round_match"] / rounds)),
        }


def teach(
    target: Llama, head: EagleHead, rows: Rows, top_k: int | None = None, *, own_temperature: bool = False
) -> Teacher:
    """Run the frozen target over packed rows: tokens [B, T] -> ``Teacher``. The options are ``Objective``'s."""
    forward = target.run(rows.token_BT, rows.position_BT, packed_attention(rows), taps=head.config.taps)
    if own_temperature:
        warm_BT = rows.temperature_BT > 1e-30  # as in sampling
        scale_BT = jnp.where(warm_BT, 1.0 / jnp.where(warm_BT, rows.temperature_BT, 1.0), 0.0)
    else:
        scale_BT = jnp.ones(rows.token_BT.shape, jnp.float32)

    def read(position: tuple[jax.Array, jax.Array]):
        hidden_D, scale = position
        logits_V = target.logits(hidden_D)
        lse = jax.nn.logsumexp(scale * logits_V)
        best = vocabulary.argmax(logits_V, Across(None))
        if top_k is None:
            return lse, best
        p_W = _probabilities(_draft_columns(head, logits_V), _draft_ids(head), scale, lse, best)
        return lse, best, *jax.lax.top_k(p_W, top_k), jnp.sum(p_W)

    # Chunks of columns, not of rows: those may be split over devices, and a loop over them would gather them.
    columns = (jnp.swapaxes(x, 0, 1) for x in (forward.hidden_BTD, scale_BT))
    read_TB = jax.lax.map(jax.vmap(read), tuple(columns), batch_size=max(1, CHUNK // len(scale_BT)))
    lse, best, *top = (jnp.swapaxes(x, 0, 1) for x in read_TB)
    top_p, top_id, covered = top or (None, None, None)
    return Teacher(forward.feature_BTX, forward.hidden_BTD, scale_BT, lse, best, top_p, top_id, covered)


def packed_attention(rows: Rows) -> LayerAttend:
    """Causal attention inside each document of packed rows."""
    mask_B1TT = _document_mask(rows)[:, None]

    def attend(seen: None, q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        B, T, K, G, H = q_BTKGH.shape
        out = jax.nn.dot_product_attention(
            q_BTKGH.reshape(B, T, K * G, H), k_BTKH, v_BTKH, mask=mask_B1TT, implementation=attended_by(q_BTKGH)
        )
        return out.reshape(q_BTKGH.shape)

    return attend


def attended_by(q_BTKGH: jax.Array) -> Literal["cudnn", "xla"]:
    """cuDNN where that serves, 16 bits on a GPU, else XLA."""
    _, T, _, _, H = q_BTKGH.shape
    fast = jax.default_backend() == "gpu" and q_BTKGH.dtype.itemsize == 2 and T % 64 == 0 and H <= 128
    return "cudnn" if fast else "xla"


def num_learnt(rows: Rows, depth: int) -> jax.Array:
    """How many positions of the rows each step learns from, [K] float32."""
    return jnp.stack([jnp.sum(_learnt(rows, k), dtype=jnp.float32) for k in range(depth)])


class Unrolled(NamedTuple):
    """What a step of the head leaves to the next one."""

    feature_BTD: jax.Array
    seen: tuple[tuple[tuple[jax.Array, jax.Array], ...], ...]  # keys and values of every step so far, by block

    @classmethod
    def begin(cls, head: EagleHead, feature_BTX: jax.Array) -> Unrolled:
        return cls(head.fuse(feature_BTX), ((),) * len(head.blocks))

    def step(self, head: EagleHead, target: Llama, rows: Rows, k: int) -> tuple[Unrolled, jax.Array]:
        """Step k, and what the LM head reads of it: hidden_BTD."""
        seen = list(self.seen)

        def attend(layer: int, q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
            seen[layer] = (*seen[layer], (k_BTKH, v_BTKH))
            return _attend_unrolled(q_BTKGH, seen[layer], _document_mask(rows))

        token_BT = _shift(rows.token_BT, k + 1)
        out = head.run(token_BT, self.feature_BTD, rows.position_BT + k, attend, target=target)
        return Unrolled(out.feature_BTD, tuple(seen)), out.hidden_BTD


def unroll(head: EagleHead, target: Llama, rows: Rows, feature_BTX: jax.Array, depth: int):
    """Yields the hidden_BTD that the LM head reads, of each step."""
    unrolled = Unrolled.begin(head, feature_BTX)
    for k in range(depth):
        unrolled, hidden_BTD = unrolled.step(head, target, rows, k)
        yield hidden_BTD


def learn(
    head: EagleHead, target: Llama, rows: Rows, teacher: Teacher, count_K: jax.Array, objective: Objective, key=None
) -> tuple[jax.Array, Measures]:
    """The loss of packed rows, and what to report.

    Args:
      count_K: positions that each step's sums are divided by: ``num_learnt`` of everything that makes one update, so
        that the gradients of its micro-batches (and devices) add up to that of the whole.
      key: for the feature noise; None leaves it out (evaluation).
    """
    o = objective
    feature_BTX = teacher.feature_BTX
    if key is not None and o.feature_noise:
        noise = jax.random.uniform(key, feature_BTX.shape, minval=-o.feature_noise, maxval=o.feature_noise)
        feature_BTX = feature_BTX + noise.astype(feature_BTX.dtype)
    p_BTW = None if teacher.top_p_BTk is not None else target_probabilities(head, target, teacher)

    def judged(unrolled: Unrolled, k: int):
        unrolled, hidden_BTD = unrolled.step(head, target, rows, k)
        return unrolled, _compare(head, target, teacher, p_BTW, o, hidden_BTD, unrolled.feature_BTD, k)

    if o.remat:
        judged = jax.checkpoint(judged, static_argnums=(1,))

    unrolled = Unrolled.begin(head, feature_BTX)
    loss = jnp.float32(0)
    reach_BT = jnp.ones(rows.token_BT.shape, jnp.float32)
    learnt = [_learnt(rows, k) for k in range(o.depth)]
    everywhere_BT = reduce(jnp.logical_and, learnt)  # where the whole chain can be judged
    chain_alpha_BT = chain_match_BT = everywhere_BT.astype(jnp.float32)
    total_weight = sum(o.decay**k for k in range(o.depth))
    sums, kept = [], []
    for k, learnt_BT in enumerate(learnt):
        unrolled, (error_BT, alpha_BT, match_BT, inside_BT) = judged(unrolled, k)
        weight_BT = learnt_BT * inside_BT * reach_BT
        # where, not times: what stands in padding may be anything, and 0 * inf is NaN.
        step_loss = jnp.sum(jnp.where(weight_BT > 0, error_BT * weight_BT, 0.0))
        loss += o.decay**k / total_weight * step_loss / jnp.maximum(count_K[k], 1.0)
        if o.reach:
            reach_BT = reach_BT * jax.lax.stop_gradient(jnp.maximum(alpha_BT, 1e-3)) ** o.reach
        chain_alpha_BT, chain_match_BT = chain_alpha_BT * alpha_BT, chain_match_BT * match_BT
        kept.append(chain_match_BT)
        sums.append(
            [
                step_loss,
                jnp.sum(learnt_BT),
                jnp.sum(jnp.where(learnt_BT, alpha_BT, 0.0)),
                jnp.sum(learnt_BT & match_BT),
                jnp.sum(chain_alpha_BT),
                jnp.sum(chain_match_BT),
                jnp.sum(everywhere_BT),
            ]
        )
    begun_BT = begun(sum(kept).astype(jnp.int32), everywhere_BT)
    rounds = [[jnp.sum(match_BT * begun_BT), jnp.sum(begun_BT)] for match_BT in kept]
    columns = zip(*([*a, *b] for a, b in zip(sums, rounds, strict=True)), strict=True)
    return loss, Measures(*(jnp.stack([x.astype(jnp.float32) for x in column]) for column in columns))


def begun(kept_BT: jax.Array, judged_BT: jax.Array) -> jax.Array:
    """bool [B, T]: where decoding would begin its rounds.

    kept_BT: how many drafts a round would keep that begins there; judged_BT: whether that is known. The first round of
    a run of such positions begins with it, the next one after what was kept and the target's own token:

        kept   2 0 1 3 0 1 0 0
        begun  x     x       x
    """
    T = kept_BT.shape[1]

    def row(kept_T: jax.Array, judged_T: jax.Array) -> jax.Array:
        # Of each position, the round 1, 2, 4, ... rounds on; T stands for none.
        after = jnp.minimum(jnp.arange(T) + kept_T + 1, T)
        jump = jnp.append(jnp.where(judged_T, after, T), T)
        reached = jnp.append(judged_T & ~jnp.append(False, judged_T[:-1]), False)
        for _ in range(T.bit_length()):
            reached = reached.at[jump].max(reached)
            jump = jump[jump]
        return reached[:T] & judged_T

    return jax.vmap(row)(kept_BT, judged_BT)


def _compare(head, target, teacher: Teacher, p_BTW, o: Objective, hidden_BTD, feature_BTD, k: int):
    """Step k against the target: (error, alpha, match, inside), [B, T] each, where the last k+1 columns mean nothing.

    ``inside`` is False where the target's best token lies outside the draft vocabulary: there the reference learns
    nothing, as the renormalised target says nothing about what the head should do.
    """
    T = hidden_BTD.shape[1]
    ahead = slice(k + 1, None)
    logits_BTW = head.logits(hidden_BTD[:, : T - k - 1], target)
    scale_BT1 = teacher.scale_BT[:, ahead, None]  # decoding divides the head's logits by the temperature as well
    log_q = jax.nn.log_softmax(jnp.where(scale_BT1 > 0, scale_BT1, 1.0) * logits_BTW, axis=-1)
    draft_best = vocabulary.argmax(logits_BTW, Across(None))
    if p_BTW is not None:
        p = p_BTW[:, ahead]
    else:
        assert teacher.top_p_BTk is not None and teacher.top_id_BTk is not None and teacher.covered_BT is not None
        top_p, covered = teacher.top_p_BTk[:, ahead], teacher.covered_BT[:, ahead]
        rest = jnp.maximum(covered - jnp.sum(top_p, axis=-1), 0.0)
        p = jnp.concatenate([top_p, rest[..., None]], axis=-1)
        log_q = lump(log_q, teacher.top_id_BTk[:, ahead])
    error, alpha = o.token_weight * o.loss(p, log_q), acceptance(p, log_q)
    if o.feature_weight:
        error += o.feature_weight * smooth_l1(feature_BTD[:, : T - k - 1], teacher.hidden_BTD[:, ahead])
    best = teacher.best_BT[:, ahead]
    if head.draft_to_target is None:
        inside = jnp.ones(best.shape, bool)
    else:
        id_W = head.draft_to_target[...]
        draft_best = id_W[draft_best]
        inside = jnp.zeros(head.config.vocab_size, bool).at[id_W].set(True)[best]
    back = partial(jnp.pad, pad_width=((0, 0), (0, k + 1)))
    return back(error), back(alpha), back(draft_best == best), back(inside)


def target_probabilities(head: EagleHead, target: Llama, teacher: Teacher) -> jax.Array:
    """The target's true probabilities of the draft vocabulary, [B, T, W] float32, at the teacher's temperatures."""
    if head.draft_to_target is None:
        logits_BTW = target.logits(teacher.hidden_BTD)
    else:  # only those columns of the LM head are multiplied
        id_W = head.draft_to_target[...]
        columns = target.embed[...][id_W].T if target.lm_head is None else target.lm_head[...][:, id_W]
        logits_BTW = jnp.matmul(teacher.hidden_BTD, columns, preferred_element_type=jnp.float32)
    p_BTW = _probabilities(logits_BTW, _draft_ids(head), teacher.scale_BT, teacher.lse_BT, teacher.best_BT)
    return jax.lax.stop_gradient(p_BTW)


def _probabilities(logits, id_W, scale, lse, best) -> jax.Array:
    """[..., W] of logits [..., W]: softmax of the scaled logits; where the scale is 0, all on the target's choice."""
    scale, lse, best = (x[..., None] for x in (scale, lse, best))
    return jnp.where(scale > 0, jnp.exp(scale * logits - lse), (id_W == best).astype(jnp.float32))


def _draft_columns(head: EagleHead, logits: jax.Array) -> jax.Array:
    return logits if head.draft_to_target is None else logits[..., head.draft_to_target[...]]


def _draft_ids(head: EagleHead) -> jax.Array:
    return jnp.arange(head.config.vocab_size) if head.draft_to_target is None else head.draft_to_target[...]


def _learnt(rows: Rows, k: int) -> jax.Array:
    """Where step k has a target to learn from: i and i+1+k lie in one document, and an answer's token follows i+1+k."""
    same_BT = (_shift(rows.segment_BT, k + 1) == rows.segment_BT) & (rows.segment_BT > 0)
    return same_BT & _shift(rows.learn_BT, k + 1)


def _shift(x_BT: jax.Array, by: int) -> jax.Array:
    """x[:, i] becomes x[:, i + by]; zeros come in at the end."""
    return jnp.pad(x_BT[:, by:], ((0, 0), (0, by)))


def _document_mask(rows: Rows) -> jax.Array:
    """bool [B, T, T]: query t sees key u <= t of its own document. Padding (segment 0) sees padding: no empty rows."""
    T = rows.token_BT.shape[1]
    return (rows.segment_BT[:, :, None] == rows.segment_BT[:, None, :]) & jnp.tril(jnp.ones((T, T), bool))


def _attend_unrolled(
    q_BTKGH: jax.Array, steps: Sequence[tuple[jax.Array, jax.Array]], mask_BTT: jax.Array
) -> jax.Array:
    """Attention of the newest step: step 0's keys under ``mask_BTT``, and column i alone of every later step.

    One softmax over T + len(steps) - 1 keys. The later steps' keys are a diagonal, so they cost one dot product each
    instead of another T x T.
    """
    k_BTKH, v_BTKH = steps[0]
    q_BTKGH = q_BTKGH * jnp.asarray(q_BTKGH.shape[-1] ** -0.5, q_BTKGH.dtype)
    wide = dict(preferred_element_type=jnp.float32)
    score_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, **wide)
    score_BKGTS = jnp.where(mask_BTT[:, None, None], score_BKGTS, -jnp.inf)
    own = [jnp.einsum("BTKGH,BTKH->BKGT", q_BTKGH, k, **wide)[..., None] for k, _ in steps[1:]]
    T = mask_BTT.shape[-1]
    weight = jax.nn.softmax(jnp.concatenate([score_BKGTS, *own], axis=-1), axis=-1).astype(v_BTKH.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weight[..., :T], v_BTKH)
    for j, (_, v) in enumerate(steps[1:]):
        out += jnp.einsum("BKGT,BTKH->BTKGH", weight[..., T + j], v)
    return out
