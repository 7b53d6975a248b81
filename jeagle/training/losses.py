"""What the head's distribution q is held against: the target's p, per position.

``p`` holds the target's true probabilities of the n classes that are looked at (the draft vocabulary, or its k
likeliest ids and one class for the rest), so it sums to at most 1; what is missing lies outside the draft vocabulary,
where q is 0. The chance that a draft drawn from q survives verification is alpha = sum min(p, q) = 1 - TV(p, q)
(arXiv:2211.17192).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

__all__ = ["LOSSES", "acceptance", "lump", "smooth_l1"]


def acceptance(p: jax.Array, log_q: jax.Array) -> jax.Array:
    """alpha = sum_n min(p, q): [..., n] twice -> [...]."""
    return jnp.sum(jnp.minimum(p, jnp.exp(log_q)), axis=-1)


def cross_entropy(p: jax.Array, log_q: jax.Array) -> jax.Array:
    """-sum p' log q with p' = p over the draft vocabulary, renormalised (EAGLE-3's reference)."""
    return -jnp.sum(_renormalised(p) * log_q, axis=-1)


def forward_kl(p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p' || q): the gradient of the cross-entropy, but 0 at its optimum."""
    p = _renormalised(p)
    return jnp.sum(p * (jnp.log(jnp.maximum(p, 1e-30)) - log_q), axis=-1)


def total_variation(p: jax.Array, log_q: jax.Array) -> jax.Array:
    """1 - alpha. From a cold start its gradient vanishes: begin with another loss."""
    return 1.0 - acceptance(p, log_q)


def negative_log_acceptance(p: jax.Array, log_q: jax.Array) -> jax.Array:
    """-log alpha: total variation's direction, with a boost of 1/alpha that makes it train from cold
    (arXiv:2602.23881)."""
    return -jnp.log(jnp.maximum(acceptance(p, log_q), 1e-6))


def lk_hybrid(p: jax.Array, log_q: jax.Array) -> jax.Array:
    """lambda KL + (1 - lambda) TV with lambda = exp(-3 alpha), detached: KL while the head is poor, acceptance itself
    as it improves (arXiv:2602.23881)."""
    share = jnp.exp(-3.0 * jax.lax.stop_gradient(acceptance(p, log_q)))
    return share * forward_kl(p, log_q) + (1.0 - share) * total_variation(p, log_q)


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "ce": cross_entropy,
    "kl": forward_kl,
    "tv": total_variation,
    "nla": negative_log_acceptance,
    "lk": lk_hybrid,
}


def lump(log_q: jax.Array, id_k: jax.Array) -> jax.Array:
    """log q over k chosen classes and one for all the others: [..., W], [..., k] -> [..., k+1]."""
    chosen = jnp.take_along_axis(log_q, id_k, axis=-1)
    rest = jnp.log(jnp.maximum(1.0 - jnp.sum(jnp.exp(chosen), axis=-1, keepdims=True), 1e-9))
    return jnp.concatenate([chosen, rest], axis=-1)


def smooth_l1(predicted: jax.Array, wanted: jax.Array) -> jax.Array:
    """Huber loss with delta 1, mean over the last axis: EAGLE-1's feature regression (arXiv:2401.15077)."""
    return jnp.mean(optax.losses.huber_loss(predicted.astype(jnp.float32), wanted.astype(jnp.float32)), axis=-1)


def _renormalised(p: jax.Array) -> jax.Array:
    return p / jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), 1e-9)
