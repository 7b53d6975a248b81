"""Train an EAGLE head by a recipe.

    python scripts/train_head.py scripts/recipes/smollm2-135m-eagle3.toml runs/smollm2

Run the same command again to go on after a kill. Writes metrics.jsonl, curves.png and, when the last step is done,
head/: a checkpoint for ``LLM(target, draft=...)`` and ``python -m convert.export``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jeagle.checkpoint import is_checkpoint, read_source
from jeagle.host import described
from jeagle.training.recipe import RecipeError, load_recipe
from jeagle.training.run import prepare
from jeagle.training.shards import alone_in
from jeagle.training.trainer import TrainingError


def draw(metrics: Path, picture: Path) -> None:
    """Loss, agreement per position and tokens per call against the step, from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    held = [{"step": line["step"], **line["held_out"]} for line in lines if line.get("held_out")]
    if not steps:
        return
    figure, (loss, match, tau) = plt.subplots(1, 3, figsize=(15, 4.2))

    def plot(axes, records: list[dict[str, Any]], value, style: str, label: str) -> None:
        axes.plot([r["step"] for r in records], [value(r) for r in records], style, label=label, markersize=4)

    depth = len(steps[0]["match"])
    plot(loss, steps, lambda r: sum(r["loss_by_depth"]) / depth, "-", "training")
    plot(loss, held, lambda r: sum(r["loss_by_depth"]) / depth, "o--", "held out")
    for k in range(depth):
        source, style = (held, "o-") if held else (steps, "-")
        plot(match, source, lambda r, k=k: r["match"][k], style, f"position {k + 1}")
    for name, label in (("tau_greedy", "greedy"), ("tau_sampled", "sampled")):
        plot(tau, steps, lambda r, n=name: r[n], "-", f"{label}, training")
        plot(tau, held, lambda r, n=name: r[n], "o--", f"{label}, held out")
    titles = (
        "loss, mean over depths",
        "head's best token is the target's",
        f"simulated tokens per call, chain of {depth}",
    )
    for axes, title in zip((loss, match, tau), titles):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def steps_of(head: Path) -> int | None:
    """After how many steps a run's head was exported; None where there is none."""
    return read_source(head).get("steps") if is_checkpoint(head) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a TOML file; see scripts/recipes")
    parser.add_argument("directory", type=Path, help="where the run lives")
    parser.add_argument("--until", type=int, help="stop (and save) after this step; run again to go on")
    args = parser.parse_args()
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    try:
        recipe = load_recipe(args.recipe)
        with Progress(*columns) as progress:
            task = progress.add_task("train", total=recipe.run.steps, text="loading")

            def show(line: dict[str, Any]) -> None:
                if "loss" in line:
                    matches = " ".join(f"{x:.2f}" for x in line["match"])
                    rate = line["tokens"] / max(line["seconds"], 1e-9)
                    text = f"loss {line['loss']:.3f}  match {matches}  tau {line['tau_greedy']:.2f}  {rate:.0f} tok/s"
                    progress.update(task, completed=line["step"], text=text)
                elif line.get("held_out"):
                    held = line["held_out"]
                    matches = " ".join(f"{x:.3f}" for x in held["match"])
                    progress.console.print(
                        f"step {line['step']}, held out: match {matches}, tokens per call {held['tau_greedy']:.3f} "
                        f"greedy, {held['tau_sampled']:.3f} at temperature 1"
                    )
                    for name, found in held["by_temperature"].items():
                        matches = " ".join(f"{x:.3f}" for x in found["match"])
                        progress.console.print(
                            f"  answers at temperature {name}: match {matches}, tokens per call of greedy rounds "
                            f"{found['tau_rounds']:.3f}"
                        )

            try:
                run = prepare(recipe, args.directory, on_report=show)
            except RecipeError as error:
                raise RecipeError(f"{args.recipe}: {error}") from error
            trainer = run.trainer
            progress.console.print(f"{run.summary}; {trainer.mesh.size} of: {described()}")
            if trainer.step:
                changed = "".join(f", {field} {new} (was {old})" for field, (old, new) in trainer.changed.items())
                progress.console.print(f"going on after step {trainer.step}{changed}")
            progress.update(task, completed=trainer.step)
            begun = trainer.step
            try:
                trainer.train(args.until)
            finally:
                if (args.directory / "metrics.jsonl").exists():
                    draw(args.directory / "metrics.jsonl", args.directory / "curves.png")
            if trainer.step == recipe.run.steps:
                head = args.directory / "head"
                # A head of these very weights stays, and a trees.json searched for it; one of a shorter run goes.
                with alone_in(args.directory, TrainingError):
                    if trainer.step > begun or steps_of(head) != trainer.step:
                        shutil.rmtree(head, ignore_errors=True)
                        trainer.export(head, source={**run.source, "steps": trainer.step})
                progress.console.print(f"the head is in {head}")
            trainer.close()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on after the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
