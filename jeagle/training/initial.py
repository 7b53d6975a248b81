"""Where a head starts: from the target's own weights, which saves most of a small compute budget.

The head's first block begins as the target's last one, its LM head as the target's rows of the draft vocabulary, and
``fc`` passes the last tap through. So the feature starts in the space of the target's final hidden states, and what
the head puts out is read by an LM head that understands it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jeagle.config import EagleConfig
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.placement import filled, variables
from jeagle.training.packing import Rows
from jeagle.training.unroll import packed_attention

__all__ = ["new_head", "with_more_tokens", "with_wider_mlp"]


def new_head(
    config: EagleConfig, target: Llama, draft_to_target: jax.Array | None, *, seed: int, sample: Rows | None
) -> EagleHead:
    """A head to be trained, float32.

    draft_to_target: [W] names its vocabulary where that is reduced. sample: a few packed rows [B, T] to measure the
    target's residual stream on; None starts from random weights instead.
    """
    head = EagleHead(config, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    if head.draft_to_target is not None:
        assert draft_to_target is not None
        head.draft_to_target.set_value(jnp.asarray(draft_to_target, jnp.int32))
    if config.own_embedding and config.width == target.config.width:
        assert head.embed is not None
        head.embed.set_value(_f32(target.embed))
    if sample is not None:
        _copy_target(head, target, shrink=1.0 / _stream_size(target, sample))
    return head


def with_more_tokens(head: EagleHead, target: Llama, ids: np.ndarray) -> EagleHead:
    """``head`` with a larger draft vocabulary: ``ids`` [W], ascending target ids, all that it has among them.

    A new row of its LM head begins as what training would have made of the target's: the affine map that best takes the
    target's rows to those that the head has. Of a trained SmolLM2 head, widened from 6,144 to 16,384 ids, a chain of 4
    gets 2.34 tokens per call from its own vocabulary, 2.38 from the wider one, and 1.28 where new rows are the
    target's, as a head that has left the target's space takes them for far too likely.
    """
    assert head.lm_head is not None and head.draft_to_target is not None
    config = dataclasses.replace(head.config, draft_vocab_size=len(ids))
    wider = nnx.eval_shape(lambda: type(head)(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    known = np.searchsorted(ids, np.asarray(head.draft_to_target[...]))
    rows_WD = np.asarray(_rows(target)[ids], np.float32)
    affine_WD = np.concatenate([rows_WD, np.ones_like(rows_WD[:, :1])], axis=1)
    trained_ND = np.asarray(head.lm_head[...], np.float32).T
    new_WD = affine_WD @ np.linalg.lstsq(affine_WD[known], trained_ND)[0]
    new_WD[known] = trained_ND
    arrays = {path: variable.get_value() for path, variable in variables(head).items()}
    return filled(wider, arrays | dict(lm_head=jnp.asarray(new_WD.T), draft_to_target=jnp.asarray(ids, jnp.int32)))


def with_wider_mlp(head: EagleHead, width: int, *, seed: int) -> EagleHead:
    """``head``, float32, with an MLP of ``width`` F in each block, which puts out what it did.

    New columns of gate_up [D, 2, F] begin at random, as those of a new head, and new rows of down [F, D] at zero: they
    add nothing, but their gradient is not zero, and from the first update on neither is that of the columns.
    """
    config = dataclasses.replace(head.config, mlp_width=width)
    wider, arrays = type(head)(config, dtype=jnp.float32, rngs=nnx.Rngs(seed)), {}
    before = variables(head)
    for path, variable in variables(wider).items():
        known, fresh = before[path].get_value(), variable.get_value()
        start = jnp.zeros_like(fresh) if path.endswith("down.kernel") else fresh
        arrays[path] = known if known.shape == fresh.shape else start.at[tuple(map(slice, known.shape))].set(known)
    return filled(wider, arrays)


def _rows(target: Llama) -> jax.Array:
    """Of the target's LM head [V, D]."""
    return target.embed[...] if target.lm_head is None else target.lm_head[...].T


def _stream_size(target: Llama, rows: Rows) -> float:
    """Root mean square of the last block's output at a typical position (the median: a few tokens are giants)."""

    def measure(target: Llama) -> jax.Array:
        stream_BTD = target.run(rows.token_BT, rows.position_BT, packed_attention(rows), taps=(len(target.blocks),))
        size_BT = jnp.sqrt(jnp.mean(stream_BTD.feature_BTX.astype(jnp.float32) ** 2, axis=-1))
        return jnp.nanmedian(jnp.where(rows.segment_BT > 0, size_BT, jnp.nan))

    graph, params = nnx.split(target)
    return float(jax.jit(lambda params: measure(nnx.merge(graph, params)))(params))


def _copy_target(head: EagleHead, target: Llama, shrink: float) -> None:
    """``shrink``: the last block adds to a stream of its own size; the head's starts normed, so what it adds must be
    smaller by that factor to mean the same."""
    config, last = head.config, target.blocks[-1]
    D = config.width
    if head.norm is not None:
        head.norm.scale.set_value(_f32(target.norm.scale))
    if head.lm_head is not None:
        rows = _rows(target)
        ids = slice(None) if head.draft_to_target is None else head.draft_to_target[...]
        if rows.shape[1] == D:
            head.lm_head.set_value(rows[ids].T.astype(jnp.float32))
    same_heads = config.num_heads == target.config.num_heads and config.num_kv_heads % target.config.num_kv_heads == 0
    for block in head.blocks if (target.config.width, target.config.head_dim) == (D, config.head_dim) else ():
        if same_heads:
            block.out.kernel.set_value(_f32(last.out.kernel).reshape(block.out.kernel.shape) * shrink)
        if block.gate_up.kernel.shape == last.gate_up.kernel.shape:  # that of routed experts is the shared one
            block.gate_up.kernel.set_value(_f32(last.gate_up.kernel))
            block.down.kernel.set_value(_f32(last.down.kernel) * shrink)
            block.mlp_norm.scale.set_value(_f32(last.mlp_norm.scale))
    if config.fusion == "attention" and same_heads:
        assert head.hidden_norm is not None and last.attn_norm is not None
        # Rows [embedding; feature]: the feature is read as the last block reads its stream.
        kernel = head.blocks[0].qkv.kernel
        kernel.set_value(kernel[...].at[D:].set(_regrouped(_f32(last.qkv.kernel), config.num_kv_heads)))
        head.hidden_norm.scale.set_value(_f32(last.attn_norm.scale))
    if config.fusion == "attention":
        kernel = head.fc.kernel[...]
        head.fc.kernel.set_value(kernel.at[-D:].add(jnp.eye(D)))
        if head.tap_norms is not None:
            head.tap_norms[-1].scale.set_value(_f32(target.norm.scale))


def _regrouped(qkv_DKJH: jax.Array, num_kv_heads: int) -> jax.Array:
    """The same attention with more kv heads: queries stay, each key and value head is repeated for its share."""
    D, K, _, H = qkv_DKJH.shape
    query = qkv_DKJH[:, :, :-2].reshape(D, num_kv_heads, -1, H)
    key_value = jnp.repeat(qkv_DKJH[:, :, -2:], num_kv_heads // K, axis=1)
    return jnp.concatenate([query, key_value], axis=2)


def _f32(parameter) -> jax.Array:
    return jnp.array(parameter[...], jnp.float32)  # a copy: the step donates what it trains
