"""Conversion on a full disk, stopped, killed, met by another, short of memory: nothing half-written is left."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CONFIG, D, F, H, K, L, N, V, check, make_hf, make_tensors, reconfig, small_disk, with_header  # noqa: F401
from helpers import PeakBytes

import convert
from convert.__main__ import main
from jeagle import checkpoint_writer
from jeagle.checkpoint import CheckpointError


def test_full_disk(tmp_path, small_disk, capsys, monkeypatch):  # noqa: F811
    source = make_hf(
        tmp_path / "hf", {**make_tensors(), "model.embed_tokens.weight": np.ones((V << 13, D), np.float32)}
    )
    reconfig(vocab_size=V << 13, tie_word_embeddings=True)(source)
    for free, said in ((None, "make room"), (1 << 40, "disk is full")):
        if free is not None:  # what another process takes meanwhile
            monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 40}))
        assert main([str(source), str(small_disk / "ours")]) == 1
        assert said in capsys.readouterr().err
        assert list(small_disk.iterdir()) == []


def test_sources_that_may_not_be_read(tmp_path, monkeypatch, capsys):
    """Root reads everything, so the disk's answer is made up."""
    source, real = make_hf(tmp_path / "hf"), Path.stat
    (source / "tokenizer.json").write_text("{}")

    def refuse(path: Path):
        def answer(self, *args, **kwargs):
            if self == path:
                raise PermissionError(13, "Permission denied", str(self))
            return real(self, *args, **kwargs)

        return answer

    for path in (source, source / "config.json", source / "tokenizer.json"):
        monkeypatch.setattr(Path, "stat", refuse(path))
        assert main([str(source), str(tmp_path / "ours")]) == 1
        assert f"error: cannot read {path} (Permission denied)" in capsys.readouterr().err
    assert main([300 * "n", str(tmp_path / "ours")]) == 1
    assert "(File name too long); check its name" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_interrupt_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    source = make_hf(tmp_path / "hf")
    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "finish", interrupted)
    assert main([str(source), str(tmp_path / "ours")]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_two_at_once_into_one_destination(tmp_path, monkeypatch):
    source, both_written, results = make_hf(tmp_path / "hf"), threading.Barrier(2, timeout=600), []
    finish = checkpoint_writer.CheckpointWriter.finish

    def finish_together(*args):
        both_written.wait()
        return finish(*args)

    def work():
        try:
            results.append(convert.convert(source, tmp_path / "ours", progress=False))
        except CheckpointError as error:
            results.append(str(error))

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "finish", finish_together)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused, made = sorted(results, key=lambda result: isinstance(result, Path))
    assert "another process" in refused
    check(made, make_tensors())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"]


KILLED = """
import os, sys, time, convert
from jeagle.checkpoint_writer import CheckpointWriter
add = CheckpointWriter.add
def told(self, path, *rest, **options):
    add(self, path, *rest, **options)
    self._commit()
    print(path, flush=True)
    told.left -= 1
    if told.left == 0:
        time.sleep(3600)
told.left = int(sys.argv[3])
CheckpointWriter.add = told
convert.convert(sys.argv[1], sys.argv[2], progress=False)
"""


@pytest.mark.parametrize("written", [1, 2 + 1 + 6 * L])
def test_sigkill_leaves_no_destination(tmp_path, written):
    """Killed after the first tensor, and after the last: no destination, and the next run sweeps up and succeeds."""
    source = make_hf(tmp_path / "hf")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "ours"), str(written)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert process.stdout is not None
    with process, process.stdout:
        for _ in range(written):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = [p.name for p in tmp_path.iterdir() if p != source]
    assert len(left) == 1
    assert left[0].startswith(".ours.tmp-")
    check(convert.convert(source, tmp_path / "ours"), make_tensors())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"]


@pytest.mark.skipif(not PeakBytes.can_be_read(), reason="reads Linux's /proc")
def test_memory_stays_at_one_tensor(tmp_path, monkeypatch):
    """A 540 MB model of zeros through 34 MB tensors: two of those, what is being written and threads' buffers. Holding
    all of it would show three times over."""
    monkeypatch.setattr(checkpoint_writer, "COMMIT_BYTES", 16 << 20)
    monkeypatch.setattr(checkpoint_writer, "CHUNK_BYTES", 8 << 20)
    width, mlp, layers = 1024, 4096, 8
    source = make_hf(
        tmp_path / "hf", hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=8
    )
    shapes = {"model.embed_tokens.weight": (V, width), "model.norm.weight": (width,), "lm_head.weight": (V, width)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.{n}.weight": s
            for n, s in {
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
                "self_attn.q_proj": (width, width),
                "self_attn.k_proj": (width // 4, width),
                "self_attn.v_proj": (width // 4, width),
                "self_attn.o_proj": (width, width),
                "mlp.gate_proj": (mlp, width),
                "mlp.up_proj": (mlp, width),
                "mlp.down_proj": (width, mlp),
            }.items()
        }
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with_header(text)(source)
    os.truncate(source / "model.safetensors", 8 + len(text) + end)

    convert.convert(make_hf(tmp_path / "small"), tmp_path / "warm", progress=False)  # modules, threads' arenas
    with PeakBytes() as peak:
        convert.convert(source, tmp_path / "ours", progress=False)
    assert end > 440 << 20
    assert peak.bytes < 256 << 20
