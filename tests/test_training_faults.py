"""What goes wrong in training is one sentence, and the last good checkpoint stays."""

import dataclasses
import errno
import fcntl
import json
import os

import jax
import numpy as np
import pytest
from test_training import losses, recipe, trainer

from jeagle.distributed import DeviceMemoryError
from jeagle.training.trainer import TrainingError


def test_rows_must_divide_over_the_devices(tmp_path):
    class Two:
        size = 2

    with (
        pytest.raises(TrainingError, match=r"run\.rows .3. must be a multiple of the number of devices .2."),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("jeagle.training.trainer.data_mesh", lambda devices: Two())
        trainer(tmp_path, recipe(run={"rows": 3}))


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    t = trainer(tmp_path, recipe())
    t.train(until=2)
    t.state = dataclasses.replace(t.state, params=jax.tree.map(lambda x: x * np.nan, t.state.params))
    with pytest.raises(TrainingError, match=r"step 3: the loss is nan.*the checkpoint of step 2 is good"):
        t.train()
    again = trainer(tmp_path, recipe())
    assert again.step == 2
    again.train()
    assert np.isfinite(losses(tmp_path)).all()


def test_full_device_memory_is_said_with_what_to_lower(tmp_path, monkeypatch):
    t = trainer(tmp_path, recipe())
    t.train(until=2)

    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore")

    monkeypatch.setattr(t, "_step", full)
    with pytest.raises(DeviceMemoryError, match=r"allocating 8 bytes.\); set objective.remat, or lower run.rows"):
        t.train()
    assert t.saved == 2


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    t = trainer(tmp_path, recipe())
    t.train(until=2)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(t._manager, "save", full)
    with pytest.raises(TrainingError, match="No space left on device; the checkpoint of step 2 is good"):
        t.train()
    assert trainer(tmp_path, recipe()).step == 2


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    t = trainer(tmp_path, recipe())
    t.train(until=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # of the step that the other process is at
        file.write('{"step": 3}\n')
    before = (tmp_path / "metrics.jsonl").read_bytes()
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    for begin in (t.train, lambda: trainer(tmp_path, recipe(run={"steps": 9}))):
        with pytest.raises(TrainingError, match="another process is writing"):
            begin()
    os.close(lock)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["run"]["steps"] == 6
