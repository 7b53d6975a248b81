"""``--picture`` of the benchmark scripts: each draws what its JSON holds, without the run that measured it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import reporting

pytest.importorskip("matplotlib")

HALF = dict(min=0.4, quartile_1=0.45, median=0.5, quartile_3=0.55, max=0.6)
ABOUT = dict(model="dir/m", title="m, float32", dtype="float32", device="cpu (x86_64, 2 cores)", batch=1)
MISSING = dict(name="vllm", status="not installed: vllm")
STEADY = dict(length=dict(tokens_per_second={"8": HALF, "64": HALF}), memory=dict(held_MB=[1.0, 2.0, 2.0, 2.0]))
ATTENTION = dict.fromkeys(("in order", "shuffled"), 1.0)
QUEUED = dict(tokens_per_second={"in turns": HALF, "in batches": HALF}, rounds={"in turns": 5, "in batches": 7})
RESULTS = {
    "bench_peers": dict(
        max_tokens=8,
        runs=[
            dict(batch=1, contenders=[dict(name="jeagle", status="measured", tokens_per_second=HALF), MISSING]),
            dict(batch=8, contenders=[dict(name="jeagle", status="failed: in its turn"), MISSING]),
        ],
    ),
    "bench_steady": dict(runs=dict(plain=STEADY, speculative=STEADY)),
    "bench_start": dict(phases={"import": HALF, "run": HALF}, seconds=HALF, cold={"import": 1.0, "run": 2.0}),
    "bench_queue": dict(lengths=[1, 9], runs=[dict(places=2, requests=4, **QUEUED)]),
    "bench_decode": dict(
        prefix=100, capacity=512, floor_ms=1.0, plain_ms=2.0, draft_ms=0.5, verify_ms={"1": 2.0, "2": 3}
    ),
    "bench_attention": dict(
        attention="xla",
        bandwidth_GBps=9.0,
        runs=[dict(rows=1, capacity=64, seen=9, new=1, milliseconds=ATTENTION, GBps=ATTENTION)],
    ),
    "bench_products": dict(layers=1, layers_ms=dict(ynnpack={"1": 1.0}), tied_head_ms=dict(ynnpack={"1": 1.0})),
}


@pytest.mark.parametrize("script", RESULTS)
def test_drawn_from_the_json(script, tmp_path):
    path = tmp_path / "picture.png"
    importlib.import_module(script).draw(path, ABOUT | RESULTS[script])
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", RESULTS)
def test_a_picture_that_cannot_be_written_is_refused_at_first(script, monkeypatch, capsys):
    given = dict(bench_peers=["m", "--prompts", "p"], bench_queue=["m", "--prompts", "p"], bench_steady=["m"])
    given["bench_start"] = ["m"]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *given.get(script, []), "--picture", "no/where.png"])
    assert importlib.import_module(script).main() == 1
    assert capsys.readouterr().err.startswith("error: no/where.png cannot be written")


def test_a_picture_is_drawn_as_the_file_has_it(tmp_path):
    """Keys that are numbers are text in JSON."""
    calls: list = []
    result = {"ms": {1: 2.0}}
    for path in (None, tmp_path / "a.png"):
        reporting.with_picture(lambda shown: calls.append(shown), lambda *given: calls.append(given), path)(result)
    assert calls == [result, result, (tmp_path / "a.png", json.loads(json.dumps(result)))]


def test_bars_stand_side_by_side_and_gaps_are_left(tmp_path):
    figure = reporting.new_figure("title", 4, 3)
    axes = figure.subplots()
    reporting.grouped_bars(axes, ["a", "b"], {"one": [HALF, None], "two": [2, 30.0]})
    bars = [(round(bar.get_x(), 6), bar.get_height()) for bar in axes.patches]
    assert bars == [(-0.4, 0.5), (0.0, 2), (1.0, 30.0)]
    assert [text.get_text() for text in axes.texts] == ["0.5", "2.0", "30"]
    reporting.save_picture(figure, tmp_path / "bars.png")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
