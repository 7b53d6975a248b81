"""``scripts/gpu_suite.py`` at tiny sizes: rows found, kept and never made up, failures said, targets judged."""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import gpu_suite
from gpu_parts import attention, check, report, rows, splits, timing

from jeagle.sampling import SAMPLERS

HEADING = dict(script="gpu_suite", part="steps", tiny=True, device="cpu", jax="0", commit="abc")


def open_rows(path: Path, *, seconds: float = 60, **heading) -> rows.Rows:
    return rows.Rows(path, HEADING | heading, deadline=time.monotonic() + seconds)


def suite(out: Path, *arguments: str) -> int:
    return gpu_suite.main(["--out", str(out), "--tiny", *arguments])


def read(out: Path, part: str) -> dict:
    return json.loads((out / f"{part}.json").read_text())


def test_every_part_has_a_table():
    assert report.TABLES.keys() == {part.name for part in gpu_suite.PARTS}
    row = dict(what="round", shape="8B over 8", implementation="pallas", tree="off", status="measured")
    rounds = [row | dict(flags=flags, seconds=s) for flags, s in (("default", 2e-3), ("one-shot all-reduce", 1.5e-3))]
    console = Console(width=120, record=True)
    console.print(report.TABLES["mesh"](dict(rows=rounds)))
    assert re.search(r"one-shot all-reduce +1.500 +0.75", console.export_text())


def test_only_some_rows(tmp_path, capsys):
    chosen = rows.Rows(tmp_path / "steps.json", HEADING, deadline=time.monotonic() + 60, only="8B.*plain|draft")
    figures = dict(seconds=1.0)
    assert chosen.measure(lambda: figures, what="copy bandwidth")["seconds"] == 1
    assert chosen.measure(lambda: figures, shape="8B", what="plain step", T=1)["status"] == "measured"
    assert chosen.measure(lambda: figures, shape="1B", what="draft step", T=1)["status"] == "measured"
    assert chosen.measure(lambda: 1 / 0, shape="1B", what="plain step", T=1) == {}
    assert [row["what"] for row in read(tmp_path, "steps")["rows"]] == ["copy bandwidth", "plain step", "draft step"]
    with pytest.raises(SystemExit):
        suite(tmp_path, "--only", "(")
    assert "--only '(' is no regular expression" in capsys.readouterr().err


def test_suite(tmp_path, capfd, monkeypatch):
    """Two parts run although a third fails; the second run measures nothing again and prints the same table."""
    monkeypatch.setenv("COLUMNS", "160")
    foreign = [dict(what="chat", dtype="bfloat16", implementation="xla", status="skipped", why="no model")]
    (tmp_path / "smollm2.json").write_text(json.dumps(HEADING | dict(device="H100", runs={}, rows=foreign)))
    assert suite(tmp_path, "--parts", "5", "1", "2") == 0
    first = {part: read(tmp_path, part) for part in ("check", "attention", "splits", "choosing")}
    for part in first.values():
        assert part["tiny"] and {"device", "jax", "commit", "command", "load_average"} <= set(part)
        assert all(run == {"status": "complete"} for run in part["runs"].values())
    found = {(row["operation"], row["implementation"]) for row in first["check"]["rows"]}
    assert found >= {("attention", name) for name in attention.IMPLEMENTATIONS} | {("choose", s) for s in SAMPLERS}
    done = [row for row in first["check"]["rows"] if row["status"] == "measured"]
    assert done and all(row["ok"] for row in done)
    timed = [row for row in first["attention"]["rows"] if row["status"] == "measured" and "T" in row]
    assert {row["implementation"] for row in timed} >= {"xla", "pallas"} and all(row["seconds"] > 0 for row in timed)
    assert {row["status"] for row in first["splits"]["rows"]} == {"measured"}
    chosen = [row for row in first["choosing"]["rows"] if row["status"] == "measured" and "T" in row]
    assert {row["implementation"] for row in chosen} == set(SAMPLERS) and all(row["seconds"] > 0 for row in chosen)
    reasons = {row["why"] for row in first["attention"]["rows"] if row["status"] == "skipped"}
    assert "cuDNN needs a GPU" in reasons

    run = read(tmp_path, "smollm2")["runs"]["all"]
    assert run["status"] == "failed" and "rows of device 'H100'" in run["error"]
    assert "Traceback" in (tmp_path / "smollm2.log").read_text()
    shown = capfd.readouterr().out
    for said in ("TINY SHAPES", "not measured", "cuDNN needs a GPU", "smollm2 (all): failed: ValueError"):
        assert said in shown

    assert suite(tmp_path, "--parts", "1") == 0
    kept = [row for row in read(tmp_path, "check")["rows"] if row["status"] == "measured"]
    why = {row["implementation"]: row["why"] for row in first["check"]["rows"] if row["status"] != "measured"}
    assert kept == done and set(why) == {"mosaic", "triton"} and why["triton"].startswith("attention 'triton' needs ")
    again = capfd.readouterr().out
    assert "- measured" in shown and "- measured" not in again
    # In the table once for each implementation, and where the two that do not take it are asked again.
    assert again.count("float8 pages") == len(attention.IMPLEMENTATIONS) + 2


def test_time_limit(tmp_path, capfd, monkeypatch):
    run = subprocess.run  # whatever its limit, the process is stopped before it can say anything
    monkeypatch.setattr(gpu_suite.subprocess, "run", lambda *given, **options: run(*given, **options | {"timeout": 0}))
    assert suite(tmp_path, "--parts", "5", "--seconds", "600.4") == 0
    assert read(tmp_path, "smollm2")["runs"]["all"] == {"status": "timed out", "error": "stopped after 600 s"}
    assert "timed out" in capfd.readouterr().out


def test_rows(tmp_path):
    path, calls = tmp_path / "steps.json", []

    def count(**found):
        calls.append(found)
        return found

    def fail(error):
        raise error

    first = open_rows(path)
    assert first.measure(lambda: count(seconds=1.0), what="a", T=1)["seconds"] == 1.0
    first.measure(lambda: count(seconds=2.0), what="a", T=2)
    assert first.measure(lambda: fail(rows.Skip("no room")), what="b")["why"] == "no room"
    assert first.measure(lambda: fail(NotImplementedError("width 3")), what="c")["status"] == "unsupported"
    assert first.measure(lambda: fail(OSError("first\nlast\n")), what="d")["why"] == "OSError: first"
    with pytest.raises(KeyboardInterrupt):
        first.measure(lambda: fail(KeyboardInterrupt()), what="e")
    assert {row["what"] for row in rows.read_part(path)["rows"]} == {"a", "b", "c", "d"}

    second = open_rows(path)
    assert second.measure(lambda: count(seconds=3.0), what="a", T=1)["seconds"] == 1.0
    assert second.measure(lambda: count(seconds=4.0), what="d")["seconds"] == 4.0  # errors are tried again
    assert len(calls) == 3
    with pytest.raises(rows.OutOfTime):
        open_rows(path, seconds=-1).measure(lambda: count(), what="f")
    with pytest.raises(ValueError, match="rows of device 'cpu', this is 'H100'; give another --out"):
        open_rows(path, device="H100")


def test_a_row_that_killed_its_process_is_left_out(tmp_path, monkeypatch):
    """What the file says while a row is measured is what it says after a crash."""
    path, seen = tmp_path / "steps.json", []
    found = open_rows(path)
    found.measure(lambda: seen.append(rows.read_part(path)["rows"][0]["status"]) or {}, what="a")
    assert seen == ["crashed"]
    monkeypatch.setattr(rows, "_device_lives", lambda: False)
    with pytest.raises(rows.DeviceLost, match="illegal access"):
        found.measure(lambda: (_ for _ in ()).throw(RuntimeError("illegal access")), what="b")
    assert open_rows(path).measure(dict, what="b")["status"] == "crashed"


def test_a_process_that_dies_is_followed_by_another(tmp_path, monkeypatch):
    """As long as each leaves out one more row, and the part's time lasts."""
    path, started = tmp_path / "check.json", []

    def die(part, variant, args, seconds):
        started.append(seconds)
        crashed = [dict(status="crashed")] * min(len(started), 3)
        rows.update_part(path, rows=crashed)
        gpu_suite.say(path, variant, "crashed", "exit code -11: illegal access")

    monkeypatch.setattr(gpu_suite, "run_process", die)
    args = argparse.Namespace(out=tmp_path, seconds=60.0, retry=False, tiny=True)
    gpu_suite.run_part(gpu_suite.Part(1, "check"), args)
    assert len(started) == 4 and rows.read_part(path)["runs"]["all"]["status"] == "crashed"
    args.retry, args.seconds = True, 0.0
    gpu_suite.run_part(gpu_suite.Part(1, "check"), args)
    assert len(started) == 4 and rows.read_part(path)["rows"] == []
    assert rows.read_part(path)["runs"]["all"]["status"] == "unfinished"


def test_the_references_find_mistakes(monkeypatch):
    """A wrong answer, a wrong log-sum-exp and a NaN are each seen."""
    call = check.draw(check.TINY_SHAPES["float32"])
    out, _ = jax.jit(attention.IMPLEMENTATIONS["xla"])(*call.arguments)
    assert check.distance(out, call.out) < 1e-6
    assert check.distance(out.at[0, 0, 0].multiply(1.2), call.out) > 2e-3
    assert np.isnan(check.distance(out.at[0, 0, 0, 0, 0].set(jnp.nan), call.out))
    x = np.log([[0.5, 0.3, 0.15, 0.05]])
    kept = check.reference_warp(x, check.SamplingParams(temperature=1.0, top_p=0.7))
    np.testing.assert_array_equal(np.isfinite(kept), [[True, True, False, False]])
    kept = check.reference_warp(x, check.SamplingParams(temperature=1.0, top_k=3, min_p=0.2))
    np.testing.assert_array_equal(np.isfinite(kept), [[True, True, True, False]])
    found = dict(operation="attention", implementation="xla", case="tree", status="measured", error=0.5, ok=False)
    assert report.wrong_checks(dict(rows=[found])) == ["attention, xla, tree: error 0.5"]
    failed = dict(runs=dict(all=dict(status="failed", error="no device")), rows=[])
    assert report.wrong_checks(failed) == ["failed: no device"] and not report.wrong_checks({})


def test_problems_count_their_bytes_and_turn_over_the_cache():
    problem = attention.Problem(B=1, T=4, length=8192)
    assert problem.cache_bytes == 2 * 8192 * 8 * 128 * 2
    assert problem.bytes == problem.cache_bytes + 2 * 4 * 8 * 128 * (2 + 4 + 4)
    for each in attention.problems(gpu_suite.Settings(False, "xla", "jax", Path())):
        assert each.copies(False) * each.cache_bytes > 2 * attention.SECOND_LEVEL_CACHE
        body, passes = each.calls(False)
        assert body >= each.copies(False) and passes >= 1


def test_waves_change_the_splits(monkeypatch):
    monkeypatch.setattr(splits, "ours_seconds", lambda *_: 1.0)
    problem = attention.Problem(B=8, T=32, length=8192)
    assert [splits.with_waves(waves, problem, False)["splits"] for waves in splits.WAVES] == [2, 4, 8, 16]


def test_kernels_are_counted_through_inner_loops():
    def outer(x):
        inner = lambda i, x: jnp.sort(jnp.sin(x) @ x)  # noqa: E731
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.fori_loop(0, x[0, 0].astype(int), inner, x), x)

    x = jnp.ones((8, 8))
    alone = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.sort(x), x)).lower(x).compile()
    nested = jax.jit(outer).lower(x).compile()
    assert 1 <= timing.num_kernels(alone) < timing.num_kernels(nested)
    assert timing.num_kernels(jax.jit(jnp.sin).lower(x).compile()) == 0


def results(device: str) -> dict:
    """Files as a GPU would leave them, with round numbers."""

    def row(**fields):
        return dict(status="measured", took_s=1.0, commit="abc", **fields)

    def step(what, T, length, seconds):
        key = dict(shape="8B", implementation="xla", what=what, T=T, length=length)
        return row(**key, seconds=seconds, weight_floor_s=5e-3, kernels=300)

    steps = [step("plain step", 1, 1024, 6e-3), step("plain step", 1, 8192, 7e-3), step("draft step", 1, 1024, 5e-4)]
    steps += [step("verify step", 32, 1024, 6.3e-3)]
    loop = [
        row(what="round", shape="8B", tree="off", implementation="xla", flags=f, seconds=s, known_seconds=k, kernels=9)
        for f, s, k in (("none", 6.6e-3, 6.4e-3), ("+WHILE", 6.1e-3, 6e-3))
    ]
    kernel = [
        row(implementation="pallas", B=1, T=T, length=32_768, seconds=seconds, bytes=135_000_000)
        for T, seconds in ((1, 50e-6), (32, 90e-6))
    ]
    found = dict(steps=steps, loop=loop, attention=[row(what="copy bandwidth", bytes_per_second=3e12), *kernel])
    return {part: dict(device=device, jax="0.11.2", tiny=False, rows=rows) for part, rows in found.items()}


def test_targets():
    def verdicts(device: str) -> list[str]:
        console = Console(record=True, width=200, file=io.StringIO())
        report.print_report(console, results(device))
        lines = [line.rstrip() for line in console.export_text().splitlines()]
        return [line.split("  ")[-1].strip() for line in lines if "<= " in line or ">= " in line]

    measured = [value for _, _, value, _ in report.targets(results("H100"))]
    assert [value and round(value, 3) for value in measured] == [1.2, 1.05, None, 0.5, None, 1.667, 90.0, 50.0]
    wanted = ["met", "met", "not measured", "missed", "not measured", "met", "met", "missed"]
    assert verdicts("NVIDIA H100 80GB HBM3") == wanted
    assert set(verdicts("NVIDIA H200")) == {"not judged: no H100", "not measured"}
