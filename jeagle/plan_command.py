"""``jeagle plan``: from the words of a command line to a ``Job``, its figures and where they go."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jeagle.config import EagleConfig
from jeagle.devices import DEVICES, MEMORY_SHARE
from jeagle.floor import Job
from jeagle.footprint import CACHE_FORMATS, PlanError, Split, find_format
from jeagle.plan import Plan, by_batch, check_fits, compiled_plan, with_draft
from jeagle.plan_report import as_json, print_plan, save_picture
from jeagle.sizes import SIZES, draft_of, find_config

if TYPE_CHECKING:
    from jeagle.compile_only import Loop
    from jeagle.tree import TreePlan

__all__ = ["add_arguments", "job_of", "run"]

# No GPU client is to be made, and CUDA's libraries, which compiling does not need, are not to be asked for.
COMPILE_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"{', '.join(SIZES)}; a converted checkpoint or a Hugging Face directory")
    parser.add_argument("--devices", type=int, help="how many GPUs, all along the tensor axis but for --data-parallel")
    parser.add_argument("--data-parallel", type=int, default=1, metavar="N", help="groups of devices that share rows")
    parser.add_argument("--gpu", default="h100", help=", ".join(DEVICES))
    parser.add_argument(
        "--dtype", default="bfloat16", help="of the weights: bfloat16, float32, fp8; int4 to plan alone"
    )
    parser.add_argument("--kv-cache-dtype", default="auto", help="bfloat16, float32 or fp8")
    parser.add_argument("--batch", type=int, default=1, help="rows, all devices together")
    parser.add_argument("--context", type=int, default=8192, help="cache positions per row")
    parser.add_argument("--draft", default="eagle3", help="eagle3, eagle1, meta, a converted head, by name too, or off")
    parser.add_argument("--draft-dtype", default="bfloat16", help="of the head's weights")
    parser.add_argument("--draft-sharding", default="auto", choices=["auto", "tensor", "replicated"])
    parser.add_argument("--expert-sharding", default="mlp", choices=["mlp", "experts"], help="split each, or deal out")
    parser.add_argument("--tree", default="chain-3", help="as for generate")
    parser.add_argument(
        "--tokens-per-call",
        type=float,
        help="what the head reaches with this tree; needed with a head",
    )
    parser.add_argument("--efficiency", type=float, default=1.0, help="share of bandwidth and peak; 1 is the floor")
    parser.add_argument("--latency", type=float, metavar="US", help="of an all-reduce, microseconds (the GPU's)")
    parser.add_argument("--memory-fraction", type=float, default=MEMORY_SHARE, help="of each device's memory")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="ms per token and speed-up by batch")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="the figures")
    parser.add_argument("--compile", action="store_true", help="compile the decode loop for these GPUs, without any")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.compile:
        os.environ.update(COMPILE_ENVIRONMENT)  # before JAX starts
    job, notes = job_of(args)
    plans = _plans(job, args.draft_sharding)
    check_fits(plans[0])
    if args.compile:
        plans[:1] = [compiled_plan(plans[0], _compiled(plans[0].job))]
        check_fits(plans[0])
    curve = by_batch(plans[0].job)
    print_plan(plans, curve, notes)
    if args.picture:
        save_picture(args.picture, curve)
    if args.json:
        args.json.write_text(json.dumps(as_json(plans[0], curve), indent=1) + "\n", encoding="utf-8")
    return 0


def _plans(job: Job, draft_sharding: str) -> list[Plan]:
    plans = with_draft(job)
    if draft_sharding == "auto" or job.head is None or job.split.tensor == 1:
        return plans
    chosen = [plan for plan in plans if plan.job.split.draft == draft_sharding]
    if not chosen:
        raise PlanError(
            f"a tensor axis of {job.split.tensor} devices does not divide the head; use --draft-sharding replicated"
        )
    return chosen + [plan for plan in plans if plan not in chosen]


def _compiled(job: Job) -> Loop:
    """The job's decode loop. Raises PlanError where it, or anything, cannot be compiled here."""
    from jeagle.compile_only import CannotCompile, absent_mesh, compile_loop
    from jeagle.decode import Program
    from jeagle.fp8 import FP8
    from jeagle.sampling import resolve_sampler
    from jeagle.sharding import Rules
    from jeagle.tree import OFF

    split = job.split
    loaded = {"float32": "float32", "bfloat16": "bfloat16", "fp8": "bfloat16"}  # target's -> head's
    if loaded.get(job.format.name) != job.draft_format.name:
        raise PlanError(
            "--compile needs --dtype and --draft-dtype as models are loaded: both bfloat16, both float32, or fp8 and "
            f"bfloat16; got {job.format.name} and {job.draft_format.name}"
        )
    sampler = resolve_sampler("auto", whole=split.tensor == 1, platform="gpu")
    try:
        return compile_loop(
            job.target,
            job.head,
            Program(OFF if job.tree is None else job.tree, attention="pallas", sampler=sampler),
            absent_mesh(job.device.name.lower(), split.data, split.tensor),
            rules=Rules.choose(draft=split.draft, experts=split.experts),
            dtype=job.format.name,
            kv_cache_dtype=FP8 if job.cache_format.name == "fp8" else job.cache_format.name,
            batch=job.batch,
            capacity=job.context,
        )
    except CannotCompile as error:
        raise PlanError(f"--compile: {error}") from error


def job_of(args: argparse.Namespace) -> tuple[Job, Sequence[str]]:
    """The job, and what was assumed of its head. Raises PlanError, ConfigError or ConversionError in one sentence."""
    wanted = dict(
        model=f"a directory with a config.json, or one of {', '.join(SIZES)}",
        devices="say how many GPUs there are to be, as in --devices 8",
    )
    if missing := [name for name in wanted if getattr(args, name) is None]:
        raise PlanError("; ".join(f"--{name} is missing: {wanted[name]}" for name in missing))
    for path in (args.picture, args.json):
        if path is not None and not path.parent.is_dir():
            raise PlanError(f"{path} cannot be written: {path.parent} is no directory")
    if args.devices < 1:
        raise PlanError(f"--devices must be at least 1, got {args.devices}")
    if args.data_parallel < 1 or args.devices % args.data_parallel:
        raise PlanError(f"--data-parallel must divide the {args.devices} devices, got {args.data_parallel}")
    if args.gpu.lower() not in DEVICES:
        raise PlanError(f"--gpu {args.gpu!r} is unknown; use {', '.join(DEVICES)}")
    target = find_config(args.model)
    if isinstance(target, EagleConfig):
        raise PlanError(f"{args.model} holds an EAGLE head, not a target model; give it as --draft")
    head, notes = None, ["head: off"]
    if args.draft != "off":
        head, said = draft_of(args.draft, target)
        notes = [f"assumed head: {said}"]
    format = find_format(args.dtype)
    cache = ("float32" if format.bits == 32 else "bfloat16") if args.kv_cache_dtype == "auto" else args.kv_cache_dtype
    job = Job(
        name=args.model,
        target=target,
        head=head,
        device=DEVICES[args.gpu.lower()],
        split=Split(data=args.data_parallel, tensor=args.devices // args.data_parallel, experts=args.expert_sharding),
        format=format,
        draft_format=find_format(args.draft_dtype),
        cache_format=find_format(cache, CACHE_FORMATS),
        batch=args.batch,
        context=args.context,
        tree=None if head is None else _tree(args.tree),
        tokens_per_call=1.0 if head is None else _tokens_per_call(args.tokens_per_call),
        efficiency=args.efficiency,
        memory_fraction=args.memory_fraction,
        link_latency=None if args.latency is None else args.latency * 1e-6,
    )
    return job, notes


def _tree(name: str) -> TreePlan:
    from jeagle.tree import parse_tree  # imports JAX, so only where a tree is wanted

    return parse_tree("chain-3" if name == "auto" else name)  # what ``LLM`` takes on a GPU, lookups apart


def _tokens_per_call(given: float | None) -> float:
    if given is None:
        raise PlanError(
            "--tokens-per-call is missing: it is the head's and the text's to say (scripts/eval_acceptance.py measures "
            "it); Meta's heads reach 2.8 to 2.9 with chain-3"
        )
    return given
