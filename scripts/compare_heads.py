"""Which head learns fastest? Several variants of a recipe, trained side by side on one pass of the target.

    python scripts/compare_heads.py scripts/recipes/smollm2-135m-eagle3.toml --updates 60 \\
        'head.taps = [2, 15, 27]' 'head.taps = [2, 15, 30]' 'head.num_kv_heads = 3'

A variant is one or more lines of TOML that change the recipe's [head], [objective] or [optimizer], and begins with the
head that training would begin with. All see the same rows, ``run.rows`` an update, and are measured on the recipe's
held-out documents in the end. The target, most of a step's cost on small machines, runs once for all of them. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import environment, write_result
from flax import nnx
from reporting import check_outputs, make_console, new_table
from tqdm import tqdm

from jeagle.checkpoint import load_llama
from jeagle.config import EagleConfig
from jeagle.eagle import EagleHead
from jeagle.llama import Llama
from jeagle.locate import cache_directory, locate
from jeagle.text import load_tokenizer
from jeagle.training.documents import Document
from jeagle.training.packing import Loader, Rows, groups, pack
from jeagle.training.recipe import Recipe, RecipeError, load_recipe
from jeagle.training.run import check_length, load_documents, starting_head
from jeagle.training.step import Trainable
from jeagle.training.trainer import make_optimizer
from jeagle.training.unroll import Measures, Teacher, learn, num_learnt, target_probabilities, teach

CHANGEABLE = ("head", "objective", "optimizer")


class Variant:
    """A head in training, fed with the states that all variants share."""

    def __init__(self, recipe: Recipe, target: Llama, head: EagleHead, taps: tuple[int, ...]):
        self.recipe, self.depth = recipe, recipe.objective.depth
        parts, self.params = Trainable.split(target, head)
        objective = recipe.objective.objective()
        optimizer = make_optimizer(recipe.optimizer, recipe.run.steps)
        self.opt_state = optimizer.init(self.params)
        D = target.config.width
        columns = np.concatenate([np.arange(D) + D * taps.index(tap) for tap in head.config.taps])
        dtype = jnp.dtype(recipe.run.dtype)

        def judge(params, target_params, rows: Rows, teacher: Teacher, key: jax.Array | None = None):
            student, target = parts.head(params, parts.head_tables, dtype), parts.target(target_params)
            teacher = teacher._replace(feature_BTX=teacher.feature_BTX[..., columns])
            if objective.top_k is not None:  # of the variant's own draft ids
                p_BTW = target_probabilities(student, target, teacher)
                top_p, top_id = jax.lax.top_k(p_BTW, objective.top_k)
                teacher = teacher._replace(top_p_BTk=top_p, top_id_BTk=top_id, covered_BT=jnp.sum(p_BTW, axis=-1))
            return learn(student, target, rows, teacher, num_learnt(rows, self.depth), objective, key)

        def update(params, opt_state, target_params, rows, teacher, key):
            gradient_of = jax.value_and_grad(judge, has_aux=True)
            (_, measures), gradient = gradient_of(params, target_params, rows, teacher, key)
            change, opt_state = optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, change), opt_state, measures

        self._update = jax.jit(update, donate_argnums=(0, 1))
        self._judge = jax.jit(lambda *args: judge(*args)[1])
        self._target_params = parts.target_params

    def learn_from(self, rows: Rows, teacher: Teacher, key: jax.Array) -> None:
        given = self._target_params, rows, teacher, key
        self.params, self.opt_state, _ = self._update(self.params, self.opt_state, *given)

    def measure(self, rows: Rows, teacher: Teacher) -> Measures:
        return jax.device_get(self._judge(self.params, self._target_params, rows, teacher))


def changed(recipe: Recipe, text: str, updates: int) -> Recipe:
    """The recipe with a variant's lines applied, and a schedule of ``updates``."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"variant {text!r} is not TOML: {error}") from error
    unknown = set(table) - set(CHANGEABLE)
    if unknown:
        raise RecipeError(f"variant {text!r} changes {unknown.pop()}; it may change {', '.join(CHANGEABLE)}")
    for section, fields in table.items():
        if not isinstance(fields, dict):
            raise RecipeError(f"variant {text!r}: {section} must be a table, such as '{section}.FIELD = VALUE'")
    base = recipe.to_json()
    for section, fields in table.items():
        base[section] |= fields
    base["run"] |= dict(steps=updates, updates=1, echo=1, accumulate=1)
    recipe = Recipe.from_table(base, f"variant {text!r}")
    if recipe.head.kind != "eagle3":
        raise RecipeError(
            f"variant {text!r}: head.kind is {recipe.head.kind!r}, but all variants are taught with the target's taps, "
            "which only an eagle3 head reads; compare such heads by training them"
        )
    return recipe


def begin(recipe: Recipe, text: str, target: Llama, documents: list[Document], rows: Rows) -> EagleHead:
    """A variant's head as training would begin with it. Raises ValueError, which names the variant."""
    try:
        return starting_head(recipe, target, documents, rows)
    except ValueError as error:
        raise RecipeError(f"variant {text!r}: {error}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("variants", nargs="+", metavar="VARIANT", help="TOML, such as 'head.taps = [2, 15, 30]'")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--measured-rows", type=int, default=16, help="held-out rows to measure on")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    about = environment()
    try:
        check_outputs(args.out, None)
        base = load_recipe(args.recipe)
        if base.data.held_out < 1 or args.measured_rows < 1:
            raise RecipeError(
                f"data.held_out is {base.data.held_out} in {args.recipe}, --measured-rows {args.measured_rows}; there "
                "must be 1 or more of both to measure variants on"
            )
        recipes = {text: changed(base, text, args.updates) for text in args.variants}
        directory = locate(base.target, cache_directory(), kind="llama")
        target = load_llama(directory, dtype=base.run.dtype)
        check_length(base, target.config)
        learnt, measured = load_documents(base, target.config, load_tokenizer(directory))
        options: Any = dict(long_documents=base.data.long_documents)
        rows, held = (pack(d, base.data.pack_length, **options) for d in (learnt, measured))
        heads = {text: begin(r, text, target, learnt, rows) for text, r in recipes.items()}
    except (ValueError, OSError) as error:
        print(f"compare_heads: {error}", file=sys.stderr)
        return 1
    loader = Loader(rows, (base.run.rows,), seed=base.run.seed)
    taps = tuple(sorted({tap for head in heads.values() for tap in head.config.taps}))
    variants = {text: Variant(recipes[text], target, head, taps) for text, head in heads.items()}

    # The teacher asks a head for its taps alone.
    every = EagleConfig.for_target(target.config, "eagle3", taps=taps, own_lm_head=False)
    definition, params = nnx.split(target)
    wide = nnx.split(EagleHead(every, rngs=nnx.Rngs(0)))
    own = {text: recipe.objective.own_temperature for text, recipe in recipes.items()}

    @partial(jax.jit, static_argnums=3)
    def teach_rows(params, head_params, rows, own_temperature):
        student = nnx.merge(wide[0], head_params)
        return teach(nnx.merge(definition, params), student, rows, own_temperature=own_temperature)

    for step in tqdm(range(args.updates), desc="updates"):
        batch = jax.device_put(loader[step])
        teachers = {choice: teach_rows(params, wide[1], batch, choice) for choice in set(own.values())}
        key = jax.random.fold_in(jax.random.key(base.run.seed), step)
        for text, variant in variants.items():
            variant.learn_from(batch, teachers[own[text]], key)
    totals: dict[str, Measures | None] = dict.fromkeys(variants)
    for part in groups(Rows(*(x[: args.measured_rows] for x in held)), base.run.rows):
        batch = jax.device_put(part)
        teacher = teach_rows(params, wide[1], batch, False)  # all are measured at one temperature
        for text, variant in variants.items():
            found, before = variant.measure(batch, teacher), totals[text]
            totals[text] = found if before is None else jax.tree.map(np.add, before, found)

    names = ("variant", "loss", "agreement by depth", "alpha by depth", "tau, greedy", "tau, sampled")
    table = new_table(*names, title=f"held out, after {args.updates} updates")
    results = []
    for text, total in totals.items():
        assert total is not None
        m = total.means()
        results.append({"variant": text, "head": dataclasses.asdict(recipes[text].head), **m})
        by_depth = (" ".join(f"{x:.3f}" for x in m[name]) for name in ("loss_by_depth", "match", "alpha"))
        table.add_row(text, *by_depth, f"{m['tau_greedy']:.3f}", f"{m['tau_sampled']:.3f}")
    make_console().print(table)
    tokens = args.updates * base.run.rows * base.data.pack_length
    result = dict(
        script="compare_heads", **about, recipe=args.recipe, updates=args.updates, tokens=tokens, results=results
    )
    if args.out:
        write_result(args.out, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
