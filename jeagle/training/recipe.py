"""A recipe: everything a training run depends on, as one small TOML file.

Unknown, missing and mistyped fields are refused by name, so a typo never trains a different head.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jeagle.config import EagleConfig, LlamaConfig
from jeagle.training.losses import LOSSES
from jeagle.training.unroll import Objective

__all__ = ["OptimizerRecipe", "Recipe", "RecipeError", "load_recipe"]


class RecipeError(ValueError):
    """A recipe that cannot be run, said in one sentence that names the file and the field."""


UNIONS = (types.UnionType, typing.Union)  # the second is what Literal[..] | None makes

# Fields of a head's recipe that ``EagleConfig`` has too.
FORM = (
    "num_layers",
    "num_kv_heads",
    "mlp_width",
    "draft_vocab_size",
    "taps",
    "tap_norm",
    "norm_before_residual",
    "norm_output",
)


@dataclass(frozen=True, kw_only=True)
class HeadRecipe:
    """The head: a published form, and what to change about it (fields of ``EagleConfig``).

    A field that is left out is as the comment says, or, of a head to go on from, as that head has it. Such a head
    keeps its form: what is stated must be what it has, but ``mlp_width`` and ``draft_vocab_size`` may be larger, and
    the head is widened (see initial.py).
    """

    kind: Literal["eagle1", "eagle3", "meta"]
    start: str = "target"  # "target" (its own last block and LM head), "random", or a head to go on from
    num_layers: int | None = None  # None: 1
    num_kv_heads: int | None = None  # None: the target's; more let more of the newest token through (see initial.py)
    copy_heads: int = 0  # kv heads that begin by copying what followed a token before (see copying.py)
    mlp_width: int | None = None  # None: the target's
    draft_vocab_size: int | None = None  # None: the target's vocabulary
    taps: tuple[int, ...] | None = None  # None: the published ones
    tap_norm: Literal["none", "joint", "each"] | None = None  # None: "none"
    norm_before_residual: bool | None = None  # None: False
    norm_output: bool | None = None  # None: as published

    def stated(self) -> dict[str, Any]:
        """The fields of its form that are not left out, by their names in ``EagleConfig``."""
        return {name: getattr(self, name) for name in FORM if getattr(self, name) is not None}

    def config(self, target: LlamaConfig) -> EagleConfig:
        changes = self.stated()
        if self.draft_vocab_size is not None:
            changes["own_lm_head"] = self.draft_vocab_size < target.vocab_size or self.kind == "eagle3"
        return EagleConfig.for_target(target, self.kind, **changes)


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    files: tuple[str, ...]  # or directories of shards; jeagle/training/documents.py says what they hold
    pack_length: int = 2048
    long_documents: Literal["error", "cut", "drop"] = "error"
    held_out: int = 64  # documents of the first file, or directory, that are only ever measured


@dataclass(frozen=True, kw_only=True)
class ObjectiveRecipe:
    """``jeagle.training.unroll.Objective`` by name."""

    loss: str = "kl"
    depth: int = 7
    decay: float = 0.8
    reach: float = 0.0
    token_weight: float = 1.0
    feature_weight: float = 0.0
    top_k: int | None = None
    own_temperature: bool = False
    feature_noise: float = 0.0
    remat: bool = False

    def objective(self) -> Objective:
        return Objective(**{**dataclasses.asdict(self), "loss": LOSSES[self.loss]})


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """AdamW, or Muon for matrices inside the head and AdamW for the rest, with linear warm-up and cosine decay to
    ``final`` of the peak."""

    learning_rate: float
    method: Literal["adamw", "muon"] = "adamw"
    warmup: float = 0.04  # share of all updates
    final: float = 0.05
    b1: float = 0.9  # of AdamW
    b2: float = 0.95
    weight_decay: float = 0.0  # of matrices; norms are left alone
    clip: float = 0.5  # global gradient norm


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    steps: int
    rows: int = 8  # R, per micro-batch, over all devices
    accumulate: int = 1  # A
    updates: int = 1  # U: updates per pass of the target
    echo: int = 1  # how often each is made
    dtype: Literal["float32", "bfloat16"] = "float32"  # of target and head while they compute
    save_dtype: Literal["float32", "bfloat16", "fp8"] = "bfloat16"  # of the finished head
    seed: int = 0
    save_every: int = 100  # steps
    evaluate_every: int = 100
    keep: int = 2  # checkpoints

    @property
    def total_updates(self) -> int:
        return self.steps * self.updates * self.echo


@dataclass(frozen=True, kw_only=True)
class Recipe:
    target: str  # a converted checkpoint, an HF directory or a hub name
    head: HeadRecipe
    data: DataRecipe
    optimizer: OptimizerRecipe
    run: RunRecipe
    objective: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_table(cls, table: dict[str, Any], file: str) -> Recipe:
        """A checked recipe from nested tables; ``file`` is what errors name. None stands for a field left out."""
        recipe = _build(cls, table, file, "")
        _check(recipe, file)
        return recipe


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe. Paths in it are taken from the current directory. Raises RecipeError."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path} ({error.strerror})") from error
    except ValueError as error:  # of TOML or UTF-8
        raise RecipeError(f"{path} is not TOML: {error}") from error
    return Recipe.from_table(table, str(path))


def _build(cls: type, table: dict[str, Any], file: str, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise RecipeError(f"{file}: {prefix}{unknown[0]} is not a field; the fields here are {', '.join(fields)}")
    values = {}
    for name, f in fields.items():
        hint = hints[name]
        if table.get(name) is None:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise RecipeError(f"{file}: {prefix}{name} is missing")
            continue
        value: Any = table[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise RecipeError(f"{file}: {prefix}{name} must be a table, [{prefix}{name}]")
            values[name] = _build(hint, value, file, f"{prefix}{name}.")  # type: ignore[arg-type]
            continue
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, hint):
            raise RecipeError(f"{file}: {prefix}{name} must be {_say(hint)}, got {table[name]!r}")
        values[name] = float(value) if hint is float else value
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin in UNIONS:
        return any(_fits(value, a) for a in args if a is not type(None))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _say(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in UNIONS:
        return _say(next(a for a in args if a is not type(None)))
    if origin is tuple:
        return f"a list, each {_say(args[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[hint]


def _check(recipe: Recipe, file: str) -> None:
    def check(ok: bool, name: str, rule: str) -> None:
        if not ok:
            value: Any = recipe
            for part in name.split("."):
                value = getattr(value, part)
            raise RecipeError(f"{file}: {name} must be {rule}, got {value!r}")

    check(recipe.objective.loss in LOSSES, "objective.loss", "one of " + ", ".join(LOSSES))
    check(bool(recipe.data.files), "data.files", "a list of at least one file")
    o, t, r = recipe.objective, recipe.optimizer, recipe.run
    for name in ("steps", "rows", "accumulate", "updates", "echo", "save_every", "evaluate_every", "keep"):
        check(getattr(r, name) >= 1, f"run.{name}", "at least 1")
    check(o.depth >= 1, "objective.depth", "at least 1")
    check(o.depth < recipe.data.pack_length, "objective.depth", "less than data.pack_length")
    check(o.top_k is None or o.top_k >= 1, "objective.top_k", "at least 1")
    check(0 < o.decay <= 1, "objective.decay", "above 0 and at most 1")
    for name in ("reach", "token_weight", "feature_weight", "feature_noise"):
        check(getattr(o, name) >= 0, f"objective.{name}", "0 or more")
    check(recipe.data.pack_length >= 4, "data.pack_length", "at least 4")
    check(recipe.data.held_out >= 0, "data.held_out", "0 or more")
    check(recipe.head.num_layers is None or recipe.head.num_layers >= 1, "head.num_layers", "at least 1")
    check(recipe.head.copy_heads >= 0, "head.copy_heads", "0 or more")
    check(t.learning_rate > 0, "optimizer.learning_rate", "above 0")
    check(0 <= t.warmup < 1, "optimizer.warmup", "a share from 0 to below 1")
    check(t.clip > 0, "optimizer.clip", "above 0")
