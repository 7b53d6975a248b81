"""The training loop: loads, steps, measures, saves, resumes.

A run directory holds::

    run.json        the recipe and fingerprints of target, data and draft ids: what a resumed run must agree with
    checkpoints/    Orbax: weights, optimizer state and step, the newest few
    metrics.jsonl   a line per step and per evaluation
    head/           the finished head, a checkpoint like any other

A run that was killed goes on from its newest checkpoint with the batches it would have seen: in float32 its losses
are those of a run that was never stopped, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
from flax import nnx

from jeagle.checkpoint_writer import save
from jeagle.distributed import explained
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.sharding import data_mesh, replicated
from jeagle.training.packing import Loader, Rows, groups
from jeagle.training.recipe import OptimizerRecipe, Recipe
from jeagle.training.shards import alone_in
from jeagle.training.step import Trainable, TrainState, make_evaluation, make_step
from jeagle.training.unroll import Measures

__all__ = ["SMALLER_STEPS", "Trainer", "TrainingError", "make_optimizer"]

# What may differ when a run goes on: how long it is, how often it looks up, and what tames one that diverged. The
# schedule follows the new length and rate.
RESUMABLE = {"run": ("steps", "save_every", "evaluate_every", "keep"), "optimizer": ("learning_rate", "clip")}


SMALLER_STEPS = (  # where a device's memory is full
    "set objective.remat, or lower run.rows (and raise run.accumulate by as much), data.pack_length or "
    "head.draft_vocab_size, and train into another directory: scripts/compile_train.py says what fits"
)


class TrainingError(RuntimeError):
    """Training cannot go on, said in one sentence that names the step and what is safe."""


class Trainer:
    """One run of a recipe.

    Args:
      target: the frozen target, in the recipe's compute dtype. head: where to start; its weights become the state's.
      rows: packed training rows. held_out: packed rows that are only measured, by the temperature of their answers.
      identity: what else a resumed run must agree with (target, data, tokenizer, draft ids), by name.
      on_report: called with every line of metrics.jsonl.
    """

    def __init__(
        self,
        recipe: Recipe,
        directory: str | Path,
        target: Llama,
        head: EagleHead,
        rows: Rows,
        held_out: dict[str, Rows],
        *,
        identity: dict[str, Any],
        devices: list[jax.Device] | None = None,
        on_report: Callable[[dict[str, Any]], None] = lambda line: None,
    ):
        run = recipe.run
        self.recipe, self.directory = recipe, Path(directory).absolute()
        self.changed: dict[str, tuple[Any, Any]] = {}  # of RESUMABLE since the run was last begun: before, and now
        self.head_config = head.config
        self.on_report = on_report
        self.mesh = data_mesh(devices)
        if run.rows % self.mesh.size:
            raise TrainingError(
                f"run.rows ({run.rows}) must be a multiple of the number of devices ({self.mesh.size}); change it, or "
                "train on fewer devices"
            )
        self.loader = Loader(rows, (run.updates, run.accumulate, run.rows), seed=run.seed)
        self.held_out = held_out
        dtype = jnp.dtype(run.dtype)
        objective = recipe.objective.objective()
        optimizer = make_optimizer(recipe.optimizer, run.total_updates)
        parts, params = Trainable.split(target, head)
        self.parts = parts.on(self.mesh)
        self._step = make_step(
            self.parts, optimizer, objective, echo=run.echo, seed=run.seed, mesh=self.mesh, dtype=dtype
        )
        self._evaluate = make_evaluation(self.parts, objective, mesh=self.mesh, dtype=dtype)
        self.state = jax.device_put(TrainState(params, optimizer.init(params), jnp.int32(0)), replicated(self.mesh))
        with _explained(self.directory, 0):
            self.directory.mkdir(parents=True, exist_ok=True)
            with alone_in(self.directory, TrainingError):
                self._open(identity)

    def _open(self, identity: dict[str, Any]) -> None:
        """Begin in the directory, or go on from its newest checkpoint."""
        run = self.recipe.run
        self._agree({"recipe": self.recipe.to_json(), **identity})
        self._manager = ocp.CheckpointManager(
            self.directory / "checkpoints",
            options=ocp.CheckpointManagerOptions(max_to_keep=run.keep, enable_async_checkpointing=False),
        )
        self.saved = self._manager.latest_step() or 0
        if self.saved > run.steps:
            raise TrainingError(
                f"run.steps is {run.steps}, but {self.directory} holds a run of {self.saved} steps already; give as "
                "many or more, or train into another directory"
            )
        if self.saved:
            self.state = self._restore(self.saved)
        self._cut_metrics(self.saved)

    @property
    def step(self) -> int:
        return int(self.state.step)

    def train(self, until: int | None = None) -> None:
        """Run to the recipe's last step, or to ``until``. Saves at the end of either. Raises TrainingError, also where
        another process trains in the directory."""
        with alone_in(self.directory, TrainingError):
            self._train(until)

    def _train(self, until: int | None) -> None:
        run = self.recipe.run
        last = run.steps if until is None else min(until, run.steps)
        begin = self.step
        if begin < last:
            rows = self.loader[begin]
        for step in range(begin, last):
            began = time.perf_counter()
            with explained(SMALLER_STEPS):
                self.state, report = self._step(self.state, rows)
                tokens = int((rows.segment_BT > 0).sum())
                if step + 1 < last:
                    rows = self.loader[step + 1]  # while the device is at work
                report = jax.device_get(report)
            seconds = time.perf_counter() - began
            self._check_finite(step, report)
            self._write(
                {
                    "step": step + 1,
                    "epoch": round((step + 1) / self.loader.steps_per_epoch, 4),
                    "loss": float(np.mean(report["loss"][: run.updates])),
                    **Measures(*report["measures"]).means(),
                    "grad_norm": float(report["grad_norm"]),
                    "tokens": tokens,
                    "seconds": round(seconds, 3),
                }
            )
            done = step + 1
            if done % run.evaluate_every == 0 or done == last:
                self._write({"step": done, "held_out": self.evaluate()})
            if done % run.save_every == 0 or done == last:
                self.save()

    def evaluate(self) -> dict[str, Any]:
        """Means over the held-out rows, and over those of each temperature; {} when there are none."""
        totals: dict[str, Measures] = {}
        for name, rows in self.held_out.items():
            for part in groups(rows, self.recipe.run.rows):
                with explained(SMALLER_STEPS):
                    found = jax.device_get(self._evaluate(self.state.params, part))
                totals[name] = jax.tree.map(np.add, totals[name], found) if name in totals else found
        if not totals:
            return {}
        total = jax.tree.map(lambda *sums: np.sum(sums, axis=0), *totals.values())
        return {**total.means(), "by_temperature": {name: found.means() for name, found in totals.items()}}

    def save(self) -> None:
        """A checkpoint of this step, complete or not there at all."""
        step = self.step
        if step == self.saved:
            return
        with _explained(self.directory, self.saved):
            self._manager.save(step, args=ocp.args.StandardSave(_as_dict(self.state)))
            self._manager.wait_until_finished()
        self.saved = step

    def export(self, destination: str | Path, *, source: dict[str, Any]) -> Path:
        """Write the head as a checkpoint that ``LLM`` and ``load_eagle`` read."""
        head = self.parts.head(self.state.params, self.parts.head_tables, jnp.dtype("float32"))
        return save(head, destination, dtype=self.recipe.run.save_dtype, source=source)

    def close(self) -> None:
        self._manager.close()

    def _restore(self, step: int) -> TrainState:
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(self.state))
        return TrainState(**self._manager.restore(step, args=ocp.args.StandardRestore(wanted)))

    def _agree(self, identity: dict[str, Any]) -> None:
        """Refuse to go on with a directory that another run made."""
        path = self.directory / "run.json"
        text = json.dumps(identity, indent=1) + "\n"
        if path.exists():
            old, new = json.loads(path.read_text()), json.loads(text)
            # A run of an older version lacks the fields that came later; it was made with what they are by default.
            old["recipe"] = json.loads(json.dumps(Recipe.from_table(old["recipe"], str(path)).to_json()))
            for section, names in RESUMABLE.items():
                for name in names:
                    then, now = (run["recipe"][section].pop(name, None) for run in (old, new))
                    if then != now:
                        self.changed[f"{section}.{name}"] = then, now
            difference = _difference(old, new)
            if difference:
                changed = {"draft_vocabulary": self.recipe.head.start, "target": self.recipe.target}.get(difference)
                why = f", as {changed} has changed since it began" if changed else ""
                raise TrainingError(
                    f"{self.directory} holds a run with another {difference}{why}; train into another directory, or "
                    "remove this one"
                )
        _replace(path, text)

    def _check_finite(self, step: int, report: dict[str, Any]) -> None:
        bad = ~np.isfinite(report["loss"])
        if bad.any() or not math.isfinite(report["grad_norm"]):
            safe = f"the checkpoint of step {self.saved} is good" if self.saved else "nothing was saved yet"
            raise TrainingError(
                f"step {step + 1}: the loss is {report['loss'][np.argmax(bad)]}, the gradient norm "
                f"{report['grad_norm']}; {safe}: lower optimizer.learning_rate or optimizer.clip and run again"
            )

    def _write(self, line: dict[str, Any]) -> None:
        with _explained(self.directory, self.saved), (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.on_report(line)

    def _cut_metrics(self, step: int) -> None:
        """Lines of steps that were run but not saved will be written again."""
        path = self.directory / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]  # a kill may tear the last
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            _replace(path, "".join(line + "\n" for line in kept))


def make_optimizer(recipe: OptimizerRecipe, total_updates: int) -> optax.GradientTransformation:
    """AdamW or Muon under a global-norm clip, linear warm-up and cosine decay; norms and biases are not decayed.

    Muon (Jordan, 2024; arXiv:2502.16982) makes the update of a matrix orthogonal and scales it to AdamW's usual size,
    so the learning rates of both are alike. It suits matrices between states; tables with a row per token are left to
    AdamW, as there, and are not decayed either.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=recipe.learning_rate,
        warmup_steps=int(recipe.warmup * total_updates),
        decay_steps=total_updates,
        end_value=recipe.learning_rate * recipe.final,
    )

    if recipe.method == "muon":
        update = optax.contrib.muon(
            schedule,
            adam_b1=recipe.b1,
            adam_b2=recipe.b2,
            weight_decay=recipe.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        update = optax.adamw(
            schedule,
            b1=recipe.b1,
            b2=recipe.b2,
            weight_decay=recipe.weight_decay,
            mask=lambda params: jax.tree.map_with_path(lambda path, x: x.ndim > 1 and not _is_bias(path), params),
        )
    return optax.chain(optax.clip_by_global_norm(recipe.clip), update)


def _matrices(params: Any) -> Any:
    """Which axes of a kernel are read and which written, for Muon; None for what is no matrix between states."""

    def of(path: Any, parameter: Any) -> optax.contrib.MuonDimensionNumbers | None:
        axes = parameter.get_metadata()["axes"]
        if len(axes) < 2 or _is_bias(path) or any(axis is not None and axis.endswith("vocab") for axis in axes):
            return None
        last = len(axes) - 1
        read, written = (range(last), (last,)) if axes[-1] == "width" else ((0,), range(1, last + 1))
        return optax.contrib.MuonDimensionNumbers(tuple(read), tuple(written))

    return jax.tree.map_with_path(of, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _is_bias(path: Any) -> bool:
    """By name: that of a product with several outputs has as many axes as a matrix."""
    return any(getattr(key, "key", None) == "bias" for key in path)


@contextlib.contextmanager
def _explained(directory: Path, saved: int) -> Iterator[None]:
    """Turn what the disk says, directly or through Orbax (whose ValueErrors quote it), into one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        full = os.strerror(errno.ENOSPC)
        if not isinstance(error, OSError) and full not in str(error):
            raise
        reason = getattr(error, "strerror", None) or (full if full in str(error) else error)
        safe = f"the checkpoint of step {saved} is good" if saved else "no checkpoint was made yet"
        raise TrainingError(f"cannot write in {directory}: {reason}; {safe}: make room and run again") from error


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def _difference(old: Any, new: Any, name: str = "") -> str | None:
    """The dotted name of the first field that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = _difference(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
            if found:
                return found
        return None
    return None if old == new else name


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(path)
