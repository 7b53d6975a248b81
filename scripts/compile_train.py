"""Does a training step fit a GPU? Answered on a machine that has none.

    python scripts/compile_train.py scripts/recipes/llama-3.1-8b-eagle3.toml --shape llama-3.1-8b --plugin .h100
    python scripts/compile_train.py RECIPE.toml --devices 8      its target's config, and the rows split over eight

Compiles a recipe's step, target, head, losses and optimizer, and says what each device holds: weights, optimizer and
rows, and what is temporary. Attention is XLA's here, as cuDNN's needs its device, so the temporaries are the most that
they will be. ``make test-h100-compile`` fetches the plugin.

The last line is one JSON object. Exit code 1 where it does not fit, 2 where nothing can be compiled.
"""

# ruff: noqa: E402  (JAX reads its environment when it is imported)
from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from jeagle.plan_command import COMPILE_ENVIRONMENT

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
parser.add_argument("recipe", help="a TOML file; see scripts/recipes")
parser.add_argument("--shape", help="of the target, by name (llama-3.1-8b, ..); else the recipe's, a directory")
parser.add_argument("--gpu", default="h100", choices=["h100", "h200"])
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--plugin", type=Path, help="folder that jax-cuda13-plugin and -pjrt were installed to")
parser.add_argument("--out", metavar="FILE.json")
args = parser.parse_args()
os.environ.update(COMPILE_ENVIRONMENT)
if args.plugin is not None:
    sys.path.insert(0, str(args.plugin.absolute()))

import jax
import jax.numpy as jnp
from common import environment, write_result

from jeagle.checkpoint import abstract
from jeagle.compile_only import CannotCompile, absent_mesh
from jeagle.config import ConfigError, LlamaConfig
from jeagle.devices import DEVICES, MEMORY_SHARE
from jeagle.sizes import find_config
from jeagle.training.packing import Rows
from jeagle.training.recipe import Recipe, load_recipe
from jeagle.training.step import Trainable, TrainState, jit_step
from jeagle.training.trainer import make_optimizer

TYPES = Rows(jnp.int32, jnp.int32, jnp.int32, jnp.bool_, jnp.float32)


def compile_step(recipe: Recipe, target: LlamaConfig) -> dict[str, Any]:
    """Bytes on each device."""
    run, dtype = recipe.run, jnp.dtype(recipe.run.dtype)
    optimizer = make_optimizer(recipe.optimizer, run.total_updates)
    models = abstract(target, dtype), abstract(recipe.head.config(target), jnp.float32)
    parts, params = Trainable.split(*models)
    state = jax.eval_shape(lambda params: TrainState(params, optimizer.init(params), jnp.int32(0)), params)
    shape = run.updates, run.accumulate, run.rows, recipe.data.pack_length
    rows = Rows(*(jax.ShapeDtypeStruct(shape, each) for each in TYPES))
    mesh, objective = absent_mesh(args.gpu, args.devices, 1), recipe.objective.objective()
    jitted = jit_step(parts, optimizer, objective, echo=run.echo, seed=run.seed, mesh=mesh, dtype=dtype)
    memory = jitted.lower(state, parts.target_params, parts.head_tables, rows).compile().memory_analysis()
    return dict(argument_bytes=memory.argument_size_in_bytes, temp_bytes=memory.temp_size_in_bytes)


def main() -> int:
    try:
        recipe = load_recipe(args.recipe)
        if args.devices < 1 or recipe.run.rows % args.devices:
            raise ValueError(f"run.rows ({recipe.run.rows}) must be a multiple of --devices, got {args.devices}")
        target = find_config(args.shape or recipe.target)
        if not isinstance(target, LlamaConfig):
            raise ValueError(f"{args.shape or recipe.target} is a head; name the target that it drafts for")
        found = compile_step(recipe, target)
    except CannotCompile as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}" + ("; --shape names one" if isinstance(error, ConfigError) else ""), file=sys.stderr)
        return 1
    usable = MEMORY_SHARE * DEVICES[args.gpu].memory_bytes
    needed = found["argument_bytes"] + found["temp_bytes"]
    print(
        f"each of {args.devices} {args.gpu} holds {found['argument_bytes'] / 1e9:.1f} GB of weights, optimizer and "
        f"rows and {found['temp_bytes'] / 1e9:.1f} GB of temporaries, of {usable / 1e9:.1f} GB"
    )
    about = dict(script="compile_train", **environment(), recipe=args.recipe, shape=args.shape, gpu=args.gpu)
    result = dict(about, devices=args.devices, **found, fits=needed <= usable)
    if args.out:
        write_result(Path(args.out), result)
    print(json.dumps(result))
    return int(needed > usable)


if __name__ == "__main__":
    sys.exit(main())
