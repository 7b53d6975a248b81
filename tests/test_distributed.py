"""Two processes of four devices each, on one machine: the tokens of one process, and an end when one of them dies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import tiny_llama
from reciter import make_head
from tiny_tokenizer import VOCAB_SIZE, tokenizer_files

from jeagle import LLM, SamplingParams, distributed
from jeagle.checkpoint_writer import save
from jeagle.config import EagleConfig

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [3]]
PARAMS = [dict(max_tokens=20), dict(max_tokens=20, temperature=0.8, seed=3), dict(max_tokens=9, temperature=1.0)]
OPTIONS = dict(tree="chain-2", page_size=8)
QUEUED = [[20 + i] for i in range(5)]  # for two places
STOPPING = dict(max_tokens=30, temperature=1.0, seed=1, stop=list("abcdefghijklmnopqrstuvwxyz"))
DISPATCH = 'Dispatch(candidates=["chain-2", "chain-3"], probe_share=0.5)'  # looks at both often

WORKER = """
import json, os, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from jeagle import LLM, Dispatch, SamplingParams, dispatch, distributed
process, port, target, head = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
distributed.connect(f"127.0.0.1:{port}", 2, process, heartbeat_seconds=10)
# To one process drafts seem cheap, so that they are tried and found not worth it; the other would try none.
dispatch.measure_rounds = lambda decoder, program, plans, setting: {
    plan: 1 + (0.08 if process == 0 else 3.0) * (plan.num_nodes - 1) for plan in plans
}
llm = LLM(target, head, tree=%(tree)s, page_size=8, tensor_parallel_size=4, data_parallel_size=2)
turns = LLM(target, head, tree="chain-2", page_size=8, max_batch_size=2, tensor_parallel_size=4, data_parallel_size=2)
answers = turns.generate(%(queued)s, SamplingParams(**%(stopping)s), use_tqdm=False)
llm.tokenizer.chat_template = "{{ strftime_now('%%Y%%m%%d') }}"
day = "".join(map(chr, llm.apply_chat_template([{"role": "user", "content": ""}])))
print(json.dumps({"day": day}), flush=True)
print(json.dumps({"queued": [out.outputs[0].token_ids for out in answers]}), flush=True)
def ids():
    outputs = llm.generate(%(prompts)s, [SamplingParams(**p) for p in %(params)s], use_tqdm=False)
    return [out.outputs[0].token_ids for out in outputs], [out.metrics.rounds_by_tree for out in outputs]
print(json.dumps([ids() for _ in range(3)]), flush=True)
if process == 1:
    os._exit(3)
while True:
    ids()
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("pair")
    target = tiny_llama(num_heads=8, num_kv_heads=4, num_layers=1, vocab_size=VOCAB_SIZE)
    head = make_head(EagleConfig.for_target(target.config, "eagle3", taps=(0, 1)))
    return str(save(target, directory / "target", extra_files=tokenizer_files())), str(save(head, directory / "head"))


def start(process: int, port: int, checkpoints: tuple[str, str], directory: Path) -> subprocess.Popen:
    """What it says goes into files, as a pipe that no one reads yet would fill and stop it."""
    code = WORKER % dict(tree=DISPATCH, prompts=PROMPTS, params=PARAMS, queued=QUEUED, stopping=STOPPING)
    cache = str(Path(checkpoints[0]).parent / "cache")  # no costs of an earlier run
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "1", "JEAGLE_CACHE": cache}
    environment["TZ"] = ("EAST-14", "WEST+11")[process]  # never the same day
    with (directory / f"out{process}").open("wb") as out, (directory / f"err{process}").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(process), str(port), *checkpoints],
            stdout=out,
            stderr=err,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_then_one(checkpoints, tmp_path):
    """The same tokens as one device, on both, under the same trees, whatever each has measured of them; when one dies,
    the other says so and ends soon."""
    for _ in range(2):  # another program may take the port before process 0 does
        port, began = free_port(), time.monotonic()
        with start(0, port, checkpoints, tmp_path) as one, start(1, port, checkpoints, tmp_path) as two:
            try:
                while one.poll() is None and two.poll() is None and time.monotonic() < began + 1200:
                    time.sleep(0.1)
                died = time.monotonic()
                one.wait(timeout=300)
                lasted = time.monotonic() - died
            finally:
                one.kill()
                two.kill()
        survivor, other, said = ((tmp_path / name).read_text() for name in ("out0", "out1", "err0"))
        if "Failed to start RPC server" not in said:
            break
    llm = LLM(*checkpoints, **OPTIONS)
    alone = llm.generate(PROMPTS, [SamplingParams(**p) for p in PARAMS], use_tqdm=False)
    queued = llm.generate(QUEUED, SamplingParams(**STOPPING), use_tqdm=False)
    assert "stop" in {out.outputs[0].finish_reason for out in queued}
    for said_by_one in (survivor, other):
        (line,) = (line for line in said_by_one.splitlines() if line.startswith('{"queued"'))
        assert json.loads(line)["queued"] == [out.outputs[0].token_ids for out in queued]
    days = [next(line for line in text.splitlines() if line.startswith('{"day"')) for text in (survivor, other)]
    assert days[0] == days[1]  # and so what a chat template makes of it
    first, second = (
        json.loads(next(line for line in text.splitlines() if line.startswith("[[")))  # Gloo prints too
        for text in (survivor, other)
    )
    assert first == second  # and so the seed that no one gave is one
    for ids, _ in first:
        assert ids[:2] == [out.outputs[0].token_ids for out in alone][:2]
    assert len({tree for _, rounds in first for by_tree in rounds for tree in by_tree}) > 1
    assert one.returncode != 0 and lasted < 200
    assert "lost another process" in said or "another task died" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(coordinator="host:1"), "give num_processes and process_id too"),
        (dict(coordinator="host:1", num_processes=2, process_id=2), "process_id must lie in 0..1, got 2"),
        (dict(coordinator="host:1", num_processes=0, process_id=0), "num_processes must be at least 1, got 0"),
        (dict(coordinator="host", num_processes=2, process_id=0), "must be HOST:PORT"),
    ],
)
def test_settings_that_do_not_fit(settings, said):
    with pytest.raises(ValueError, match=said):
        distributed.connect(**settings)
