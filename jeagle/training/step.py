"""One jitted training step: the frozen target once over all rows, then one or more updates of the head.

Rows come as [U, A, R, T]: U updates, each the sum of A micro-batches of R rows. ``echo`` goes over the U updates that
many times per pass of the target ("data echoing", arXiv:1907.05550): where the target costs more than the head, as it
does on a CPU, its states are worth more than one gradient. They live inside the step and are gone with it.

Data parallel: rows are split over the mesh's data axis, everything else is replicated; sums over rows become sums over
devices. The gradient is a sum over micro-batches divided by the update's own counts, so neither their number nor that
of the devices changes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.sharding import replicated, split_rows
from jeagle.training.packing import Rows
from jeagle.training.unroll import Measures, Objective, learn, num_learnt, teach

__all__ = ["TrainState", "Trainable", "jit_step", "make_evaluation", "make_step"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that training changes. Donated to every step."""

    params: Any  # the head's weights, float32 whatever it computes in
    opt_state: Any
    step: jax.Array  # int32: steps done


@dataclass(frozen=True)
class Trainable:
    """A target and a head taken apart: what is trained, what is only read, and how to put them together."""

    target_def: nnx.GraphDef
    target_params: Any
    head_def: nnx.GraphDef
    head_tables: Any  # draft_to_target: part of the checkpoint, never trained

    @classmethod
    def split(cls, target: Llama, head: EagleHead) -> tuple[Trainable, Any]:
        """And the head's params."""
        target_def, target_params = nnx.split(target)
        head_def, params, tables = nnx.split(head, nnx.Param, ...)
        return cls(target_def, target_params, head_def, tables), params

    def on(self, mesh: Mesh) -> Trainable:
        """With everything that is only read on every device: once, as step and evaluation share it."""
        placed = jax.device_put((self.target_params, self.head_tables), replicated(mesh))
        return dataclasses.replace(self, target_params=placed[0], head_tables=placed[1])

    def target(self, params: Any) -> Llama:
        return nnx.merge(self.target_def, params)

    def head(self, params: Any, tables: Any, dtype: jnp.dtype) -> EagleHead:
        return nnx.merge(self.head_def, jax.tree.map(lambda x: x.astype(dtype), params), tables)


def make_step(
    parts: Trainable, *args, mesh: Mesh, **options
) -> Callable[[TrainState, Rows], tuple[TrainState, dict[str, Any]]]:
    """``step(state, rows) -> (state, report)`` with the target that ``Trainable.on`` placed on the mesh; as
    ``jit_step``."""
    jitted, split = jit_step(parts, *args, mesh=mesh, **options), split_rows(mesh, axis=2)
    return lambda state, rows: jitted(state, parts.target_params, parts.head_tables, jax.device_put(rows, split))


def jit_step(
    parts: Trainable,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    echo: int,
    seed: int,
    mesh: Mesh,
    dtype: jnp.dtype,
) -> Any:
    """``step(state, target_params, tables, rows) -> (state, report)``, jitted; ``dtype`` is what the head computes in.

    report: ``Measures`` summed over the first pass (rows that an echo shows again look better than they are), the loss
    of every update [echo * U], and the largest gradient norm.
    """

    def update(target: Llama, tables: Any, carry, chosen):
        params, opt_state = carry
        rows_ARt, teacher_ARt, key = chosen
        count_K = jnp.sum(jax.vmap(partial(num_learnt, depth=objective.depth))(rows_ARt), axis=0)

        def micro_loss(params, rows, teacher, key):
            head = parts.head(params, tables, dtype)
            return learn(head, target, rows, teacher, count_K, objective, key)

        def accumulate(total, micro):
            (loss, measures), gradient = jax.value_and_grad(micro_loss, has_aux=True)(params, *micro)
            return jax.tree.map(jnp.add, total, (loss, measures, gradient)), None

        zeros_K = jnp.zeros(objective.depth)
        nothing = (jnp.float32(0), Measures(*[zeros_K] * len(Measures._fields)), jax.tree.map(jnp.zeros_like, params))
        micro_keys = jax.random.split(key, rows_ARt.token_BT.shape[0])
        (loss, measures, gradient), _ = jax.lax.scan(accumulate, nothing, (rows_ARt, teacher_ARt, micro_keys))
        change, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, change), opt_state), (loss, measures, optax.tree.norm(gradient))

    def step(state: TrainState, target_params, tables, rows: Rows):
        target = parts.target(target_params)
        U, A = rows.token_BT.shape[:2]
        head = parts.head(state.params, tables, dtype)
        flat = jax.tree.map(lambda x: x.reshape(U * A, *x.shape[2:]), rows)
        teacher = jax.lax.map(lambda r: teach(target, head, r, **objective.asked_of_target()), flat)
        teacher = jax.tree.map(lambda x: x.reshape(U, A, *x.shape[1:]), teacher)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        orders = [jax.random.permutation(jax.random.fold_in(key, e), U) for e in range(echo)]
        order = jnp.concatenate(orders)

        def one(carry, chosen):
            index, key = chosen
            rows_A, teacher_A = jax.tree.map(lambda x: x[index], (rows, teacher))
            return update(target, tables, carry, (rows_A, teacher_A, key))

        keys = jax.random.split(jax.random.fold_in(key, echo), len(order))
        carry, (loss_U, measures, norm_U) = jax.lax.scan(one, (state.params, state.opt_state), (order, keys))
        report = {
            "loss": loss_U,
            "measures": jax.tree.map(lambda x: jnp.sum(x[:U], axis=0), measures),
            "grad_norm": jnp.max(norm_U),
        }
        return TrainState(*carry, state.step + 1), report

    whole, split = replicated(mesh), split_rows(mesh, axis=2)
    return jax.jit(step, donate_argnums=0, in_shardings=(whole, whole, whole, split), out_shardings=whole)


def make_evaluation(
    parts: Trainable, objective: Objective, *, mesh: Mesh, dtype: jnp.dtype
) -> Callable[[Any, Rows], Measures]:
    """``evaluate(params, rows [R, T]) -> Measures``: no noise, no update, and all at temperature 1, so that figures of
    different objectives can be compared."""
    objective = objective._replace(own_temperature=False)

    def evaluate(params, target_params, tables, rows: Rows) -> Measures:
        target, head = parts.target(target_params), parts.head(params, tables, dtype)
        count_K = num_learnt(rows, objective.depth)
        teacher = teach(target, head, rows, **objective.asked_of_target())
        return learn(head, target, rows, teacher, count_K, objective)[1]

    whole, split = replicated(mesh), split_rows(mesh)
    jitted = jax.jit(evaluate, in_shardings=(whole, whole, whole, split), out_shardings=whole)
    return lambda params, rows: jitted(params, parts.target_params, parts.head_tables, jax.device_put(rows, split))
