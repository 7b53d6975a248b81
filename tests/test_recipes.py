"""The committed recipes: each can be read, states the form of the head it goes on from, and makes a small head."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jeagle import heads
from jeagle.checkpoint import load_config
from jeagle.config import EagleConfig
from jeagle.eagle import EagleHead
from jeagle.sizes import size
from jeagle.training.recipe import Recipe, load_recipe
from jeagle.training.run import check_form
from jeagle.weights import Fp8

ROOT = Path(__file__).resolve().parent.parent
ALL = {path.name: load_recipe(path) for path in sorted((ROOT / "scripts" / "recipes").glob("*.toml"))}
RECIPES = {name: recipe for name, recipe in ALL.items() if name.startswith("smollm2")}
LIMIT = 20e6  # bytes of a head that comes with the package, all its files
FORMS = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "fp8": Fp8()}


def made_in(directory: str) -> Recipe:
    """The recipe whose command trains into ``directory``."""
    for name, recipe in RECIPES.items():
        text = (ROOT / "scripts" / "recipes" / name).read_text()
        if re.search(rf"train_head\.py scripts/recipes/{re.escape(name)} {re.escape(directory)}\n", text):
            return recipe
    raise ValueError(f"no recipe trains into {directory}")


def form(recipe: Recipe) -> EagleConfig:
    return recipe.head.config(size("smollm2-135m"))


@pytest.mark.parametrize("name", RECIPES)
def test_it_states_the_form_of_the_head_it_goes_on_from(name):
    recipe = RECIPES[name]
    assert all((ROOT / file).exists() for file in recipe.data.files)
    start = recipe.head.start
    if start == "target":
        return
    directory = heads.find(start)
    check_form(recipe, load_config(directory) if directory else form(made_in(start.removesuffix("/head"))))


@pytest.mark.parametrize("name", RECIPES)
def test_its_head_is_small(name):
    config, dtype = form(RECIPES[name]), FORMS[RECIPES[name].run.save_dtype]
    head = nnx.eval_shape(lambda: EagleHead(config, dtype=dtype, rngs=nnx.Rngs(0)))
    beside = sum(f.stat().st_size for f in heads.find("smollm2-135m-eagle3").iterdir() if f.is_file())
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(head))) + beside < LIMIT
