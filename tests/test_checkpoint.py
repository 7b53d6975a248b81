"""Our own format: what is written comes back, stock Orbax reads it, and nothing half-made or damaged passes."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import arrays, small_disk  # noqa: F401
from flax import nnx

from jeagle import checkpoint_writer
from jeagle.checkpoint import CheckpointError, is_checkpoint, load, load_eagle, load_llama
from jeagle.checkpoint_writer import CheckpointWriter
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.eagle import EagleHead
from jeagle.llama import Llama

LLAMA = LlamaConfig.tiny(attention_bias=True, mlp_bias=True)
EAGLE = EagleConfig.for_target(LLAMA, "eagle3", draft_vocab_size=50)


def save(module, destination: Path, **changes: np.ndarray | None) -> Path:
    """Write ``module``; ``changes`` replace tensors (dots as __), or drop them (None)."""
    tensors = {**arrays(module), **{name.replace("__", "."): value for name, value in changes.items()}}
    with CheckpointWriter(destination) as writer:
        for path, array in tensors.items():
            if array is not None:
                writer.add(path, array)
        return writer.finish(module.config, {"dtype": "float32"}, {"tokenizer.json": b"{}"})


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama(LLAMA, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def head() -> EagleHead:
    head = EagleHead(EAGLE, rngs=nnx.Rngs(1))
    assert head.draft_to_target is not None
    head.draft_to_target[...] = jnp.arange(50, dtype=jnp.int32) + 17
    return head


def test_round_trip(llama, head, tmp_path):
    for module, name in ((llama, "target"), (head, "head")):
        restored = load(save(module, tmp_path / name))
        assert type(restored) is type(module)
        assert restored.config == module.config
        want, got = arrays(module), arrays(restored)
        assert want.keys() == got.keys()
        for path in want:
            np.testing.assert_array_equal(got[path], want[path], err_msg=path)
        assert is_checkpoint(tmp_path / name)
        assert (tmp_path / name / "tokenizer.json").read_bytes() == b"{}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head", "target"]


def test_stock_orbax_reads_it(llama, tmp_path):
    restored = ocp.StandardCheckpointer().restore(save(llama, tmp_path / "c") / "params")
    np.testing.assert_array_equal(restored["blocks"]["1"]["qkv"]["kernel"], llama.blocks[1].qkv.kernel[...])
    np.testing.assert_array_equal(restored["lm_head"], llama.lm_head[...])


def test_floats_are_cast_on_load_and_integers_are_not(head, tmp_path):
    restored = load_eagle(save(head, tmp_path / "c"), "bfloat16")
    assert restored.fc.kernel[...].dtype == jnp.bfloat16
    assert restored.draft_to_target[...].dtype == jnp.int32
    np.testing.assert_array_equal(restored.draft_to_target[...], np.arange(50) + 17)
    np.testing.assert_array_equal(restored.lm_head[...], head.lm_head[...].astype(jnp.bfloat16))


def test_large_tensors_go_in_pieces(tmp_path, monkeypatch):
    """Views, casts, uneven last chunks and tensors cut by a commit all come back whole."""
    monkeypatch.setattr(checkpoint_writer, "CHUNK_BYTES", 100)
    monkeypatch.setattr(checkpoint_writer, "COMMIT_BYTES", 450)
    wide = np.random.default_rng(0).standard_normal((7, 23)).astype(np.float32)
    with CheckpointWriter(tmp_path / "c") as writer:
        writer.add("transposed", wide.T)
        writer.add("cast", wide, "bfloat16")
        writer.add("small", wide[0, :3])
        writer.finish(LLAMA, {"dtype": "float32"})
    restored = ocp.StandardCheckpointer().restore(tmp_path / "c" / "params")
    np.testing.assert_array_equal(restored["transposed"], wide.T)
    np.testing.assert_array_equal(restored["cast"], wide.astype(jnp.bfloat16))
    np.testing.assert_array_equal(restored["small"], wide[0, :3])


def _edit(file: str, **changes):
    def damage(path: Path) -> None:
        data = {**json.loads((path / file).read_text()), **changes}
        (path / file).write_text(json.dumps(data))

    return damage


def _cut_data(path: Path) -> None:
    largest = max((path / "params" / "d").iterdir(), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def _flip_bit(path: Path) -> None:
    largest = max((path / "params" / "d").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / "config.json").unlink(), "cannot read"),
        (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / "config.json").write_text("[]"), "not a JSON object"),
        (lambda p: (p / "source.json").write_text("[" * 100000), "not valid JSON"),
        (lambda p: (p / "source.json").unlink(), "no source.json"),
        (_edit("source.json", format_version=99), "format_version 99"),
        (_edit("source.json", dtype="float8"), "dtype 'float8'"),
        (_edit("config.json", family="bert"), "family 'bert'"),
        (_edit("config.json", family=[]), "family []"),
        (_edit("config.json", surprise=1), "surprise"),
        (_edit("config.json", num_heads=3), "multiple of num_kv_heads"),
        (_edit("config.json", rope_scaling={"kind": "linear"}), "damaged"),
        (
            _edit("config.json", rope_scaling={"kind": "llama3", "factor": 8.0, "original_max_position": 0}),
            "whole number",
        ),
        (_edit("config.json", num_layers=1), "blocks.1.attn_norm.scale"),
        (_edit("config.json", num_layers=3), "lacks tensor blocks.2.attn_norm.scale"),
        (_edit("config.json", vocab_size=98), "embed of shape (97, 32), its config.json says (98, 32)"),
        (lambda p: (p / "params" / "manifest.ocdbt").unlink(), "missing or incomplete"),
        (lambda p: (p / "params" / "manifest.ocdbt").write_bytes(b"x"), "damaged"),
        (_cut_data, "damaged"),
        (_flip_bit, "damaged"),
    ],
)
def test_damage_is_one_sentence(llama, tmp_path, damage, said):
    path = save(llama, tmp_path / "c")
    damage(path)
    with pytest.raises(CheckpointError, match=r"^[^\n]+$") as caught:
        load(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_wrong_places(llama, head, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    target, draft = save(llama, tmp_path / "target"), save(head, tmp_path / "head")
    for call, said in (
        (lambda: load(tmp_path / "nowhere"), "does not exist"),
        (lambda: load(tmp_path / "file"), "is a file"),
        (lambda: load(tmp_path / "empty"), "not a jeagle checkpoint"),
        (lambda: load_llama(draft), "EAGLE head, not a target"),
        (lambda: load_eagle(target), "not an EAGLE head"),
        (lambda: load(target, "float8"), "dtype must be"),
    ):
        with pytest.raises(CheckpointError, match=said):
            call()
    assert not is_checkpoint(tmp_path / "empty")
    assert not is_checkpoint(tmp_path / "nowhere")


def test_existing_destination_is_refused(tmp_path):
    (tmp_path / "c").mkdir()
    with pytest.raises(CheckpointError, match="already exists"), CheckpointWriter(tmp_path / "c"):
        pass


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("new/parents/" + 300 * "x", "cannot write .*File name too long"),
        ("new/parents/" + 250 * "x", "cannot write .*File name too long"),  # of the temporary sibling alone
        ("new/a\0b", r"a\\x00b' is no name in UTF-8; choose another"),
        (os.fsdecode(b"new/\xff"), "is no name in UTF-8; choose another"),
    ],
)
def test_names_that_cannot_be_written(tmp_path, name, said):
    with pytest.raises(CheckpointError, match=said), CheckpointWriter(tmp_path / name):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_nothing(tmp_path, error):
    def fail() -> None:
        with CheckpointWriter(tmp_path / "new" / "parents" / "c") as writer:
            writer.add("a", np.zeros((4, 4), np.float32))
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_stale_siblings_go_and_living_ones_stay(llama, tmp_path):
    stale = tmp_path / ".c.tmp-00000000"
    stale.mkdir()
    (stale / "half").write_text("")
    with CheckpointWriter(tmp_path / "c") as first:
        assert not stale.exists()
        with CheckpointWriter(tmp_path / "c") as second:
            second.add("a", np.zeros(3, np.float32))
            second.finish(LLAMA, {"dtype": "float32"})
        first.add("a", np.zeros(3, np.float32))
        with pytest.raises(CheckpointError, match="another process"):
            first.finish(LLAMA, {"dtype": "float32"})
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_sibling_removed_before_its_lock_is_made_again(tmp_path, monkeypatch):
    make, removed = Path.mkdir, []

    def raced(directory, *args, **kwargs):
        make(directory, *args, **kwargs)
        if directory.name.startswith(".c.tmp-") and not removed:
            removed.append(directory)
            checkpoint_writer._remove_stale(tmp_path / "c")

    monkeypatch.setattr(Path, "mkdir", raced)
    with CheckpointWriter(tmp_path / "c") as writer:
        writer.add("a", np.zeros(3, np.float32))
        writer.finish(LLAMA, {"dtype": "float32"})
    assert removed and [p.name for p in tmp_path.iterdir()] == ["c"]


def test_too_large_for_the_disk_is_said_at_once(tmp_path):
    with pytest.raises(CheckpointError, match="make room"), CheckpointWriter(tmp_path / "c", expected_bytes=1 << 60):
        pass
    assert list(tmp_path.iterdir()) == []


def test_disk_full(small_disk, monkeypatch):  # noqa: F811
    monkeypatch.setattr(checkpoint_writer, "COMMIT_BYTES", 1 << 20)

    def fill() -> None:
        with CheckpointWriter(small_disk / "c") as writer:
            for i in range(100):
                writer.add(f"a{i}", np.ones((1 << 18,), np.float32))

    with pytest.raises(CheckpointError, match=r"^cannot write .*/c: its disk is full; [^\n]*$"):
        fill()
    assert list(small_disk.iterdir()) == []
