"""Attention heads that begin by copying: what followed a token's last occurrence is what they draft.

Greedy text repeats itself, and a drafter that only looks up what followed the last two tokens before gets 1.7 tokens
per call out of it where a head that was trained for hours had 1.5 (SmolLM2 on MT-Bench). The head could do the same in
one layer, as position j pairs the target's feature at j with the *next* token: an induction head (arXiv:2209.11895)
needs no second layer here. But its query and its key must already agree on how tokens are told apart before either
learns anything, so training from elsewhere does not find it in a small budget. Here it is written down:

    query   the newest token, from its embedding
    key     the token at j, from the target's feature there: by canonical correlations, the directions in which the two
            describe a token alike, on rows of text
    value   the token at j+1, from its embedding
    out     what the LM head takes for that token, by least squares over the draft vocabulary

Several heads share query and key, and split the value between them. Training goes on from there.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle.eagle import EagleHead
from jeagle.layers import rope_frequencies
from jeagle.llama import Llama
from jeagle.training.packing import Rows
from jeagle.training.unroll import packed_attention

__all__ = ["graft_copying"]

SLOW = 5 / 8  # of a head's directions tell tokens apart: the slowest, as rotary embedding turns the others away
MATCH = 20.0  # the score of a token with itself, where most others have 0 and all exponentials are summed
LIFT = 0.15  # what a copied token adds to the residual stream, as a share of its size
RIDGE = 1e-2  # of the mean variance, added to every variance


def graft_copying(head: EagleHead, target: Llama, rows: Rows, number: int) -> list[int]:
    """Set up the ``number`` kv heads of the first block that do least so far, with all their queries, to copy.

    rows: packed text, [R, T], of some thousands of tokens. Returns which heads they were. Raises ValueError where the
    form has no such heads: feature and embedding must reach attention apart (EAGLE-3's do).
    """
    config = head.config
    if config.fusion != "attention" or not 0 < number <= config.num_kv_heads:
        raise ValueError(
            f"{number} heads that copy need an EAGLE-3 head with as many kv heads; this one is fused by "
            f"{config.fusion!r} and has {config.num_kv_heads}"
        )
    block, D, H = head.blocks[0], config.width, config.head_dim
    qkv, out = (np.array(linear.kernel[...], np.float64) for linear in (block.qkv, block.out))
    # [K, G, H, D]: what a head writes of what it reads.
    size_K = np.sum(np.einsum("Dkh,kghW->kDgW", qkv[:, :, -1], out) ** 2, axis=(1, 2, 3))
    chosen = np.argsort(size_K, kind="stable")[:number].tolist()

    feature_nD, embedding_nD, stream = _described(head, target, rows)
    n = min(int(SLOW * H), D - 1)
    read_feature, read_embedding, likeness_n = _canonical(feature_nD, embedding_nD, n)
    slow_n = np.argsort(np.tile(rope_frequencies(config), 2), kind="stable")[:n]
    sharpness = MATCH * H**0.5 / np.sum(likeness_n**2)
    value, written = _values(head, target, number * H, stream)
    for i, k in enumerate(chosen):
        part = slice(i * H, (i + 1) * H)
        qkv[:, k] = out[k] = 0.0
        qkv[:D, k, :-2, slow_n] = (sharpness * likeness_n * read_embedding).T[:, :, None]
        qkv[D:, k, -2, slow_n] = read_feature
        qkv[:D, k, -1, : value[:, part].shape[1]] = value[:, part]
        out[k, 0, : len(written[part])] = written[part]  # the other queries of the group say nothing yet
    block.qkv.kernel.set_value(jnp.asarray(qkv, jnp.float32))
    block.out.kernel.set_value(jnp.asarray(out, jnp.float32))
    return chosen


def _described(head: EagleHead, target: Llama, rows: Rows) -> tuple[np.ndarray, np.ndarray, float]:
    """Every token of the rows as attention is given it: from the target's feature at its position, and from its own
    embedding, [n, D] each. And the size of the residual stream that the first block adds to."""
    assert head.hidden_norm is not None and head.embed_norm is not None
    target_def, target_params = nnx.split(target)
    head_def, head_params = nnx.split(head)

    @jax.jit
    def describe(target_params, head_params, row: Rows):
        target, head = nnx.merge(target_def, target_params), nnx.merge(head_def, head_params)
        forward = target.run(row.token_BT, row.position_BT, packed_attention(row), taps=head.config.taps)
        fused = head.fuse(forward.feature_BTX)
        return head.hidden_norm(fused), head.embed_norm(_embed(head, target, row.token_BT)), fused

    parts = [describe(target_params, head_params, Rows(*(x[i : i + 1] for x in rows))) for i in range(len(rows[0]))]
    kept = rows.segment_BT > 0
    feature, embedding, fused = (
        np.concatenate([np.asarray(part[i], np.float64) for part in parts])[kept] for i in range(3)
    )
    if head.config.norm_before_residual:
        fused = feature
    return feature, embedding, float(np.median(np.sqrt(np.mean(fused**2, axis=-1))))


def _embed(head: EagleHead, target: Llama, token: jax.Array) -> jax.Array:
    return (target.embed if head.embed is None else head.embed)[...][token]


def _canonical(x_nD: np.ndarray, y_nD: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Canonical correlation analysis: directions of x and of y [D, number] along which each varies by 1 and both agree
    most, and the correlations. There is no bias to subtract a mean with, so the directions avoid the means."""
    avoid_x, avoid_y = (partial(_without, direction=m.mean(axis=0)) for m in (x_nD, y_nD))
    x_nD, y_nD = avoid_x(x_nD), avoid_y(y_nD)
    whiten_x, whiten_y = (_inverse_root(_spread(m)) for m in (x_nD, y_nD))
    u, likeness, vt = np.linalg.svd(whiten_x @ (x_nD.T @ y_nD / len(x_nD)) @ whiten_y)
    read_x, read_y = (whiten_x @ u[:, :number]), (whiten_y @ vt[:number].T)
    return avoid_x(read_x.T).T, avoid_y(read_y.T).T, likeness[:number]


def _values(head: EagleHead, target: Llama, rank: int, stream: float) -> tuple[np.ndarray, np.ndarray]:
    """How to read a token's embedding [D, rank] and write it [rank, D] so that the LM head finds the token again."""
    config = head.config
    assert head.embed_norm is not None
    ids = jnp.arange(config.vocab_size) if head.draft_to_target is None else head.draft_to_target[...]
    embedding_WD = np.asarray(head.embed_norm(_embed(head, target, ids)), np.float64)
    if head.lm_head is not None:
        lm_head_WD = np.asarray(head.lm_head[...], np.float64).T
    elif target.lm_head is not None:
        lm_head_WD = np.asarray(target.lm_head[...], np.float64).T
    else:
        lm_head_WD = np.asarray(target.embed[...], np.float64)
    if head.norm is not None:
        lm_head_WD = lm_head_WD * np.asarray(head.norm.scale[...], np.float64)
    centred_WD = lm_head_WD - lm_head_WD.mean(axis=0)
    # Whitened, a token's row points at itself and at no other.
    wanted_WD = np.linalg.solve(_spread(centred_WD, ridge=0.1), centred_WD.T).T
    mean = embedding_WD.mean(axis=0)
    embedding_WD = _without(embedding_WD, direction=mean)
    onto_DD = np.linalg.solve(_spread(embedding_WD), embedding_WD.T @ wanted_WD / len(embedding_WD))
    u, size, vt = np.linalg.svd(onto_DD)
    rank = min(rank, len(size))
    read = _without((u[:, :rank] * size[:rank] ** 0.5).T, direction=mean).T
    write = size[:rank, None] ** 0.5 * vt[:rank]
    return read, write * (LIFT * stream / np.sqrt(np.mean((embedding_WD @ read @ write) ** 2)))


def _spread(x_nD: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Second moments [D, D] with a ridge."""
    moments = x_nD.T @ x_nD / len(x_nD)
    return moments + ridge * np.trace(moments) / len(moments) * np.eye(len(moments))


def _inverse_root(symmetric: np.ndarray) -> np.ndarray:
    value, vector = np.linalg.eigh(symmetric)
    return (vector / np.sqrt(value)) @ vector.T


def _without(x_nD: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The rows less their part along ``direction``."""
    unit = direction / np.linalg.norm(direction)
    return x_nD - np.outer(x_nD @ unit, unit)
