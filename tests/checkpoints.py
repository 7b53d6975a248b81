"""Tiny Hugging Face checkpoints made in code, what they must become, and a disk that is soon full.

``check`` follows the einsums of ``jeagle/layers.py`` index by index, not the converter's reshapes.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jeagle.checkpoint import load

D, L, N, K, H, F, V = 16, 2, 4, 2, 4, 24, 40
G = N // K
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "intermediate_size": F,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def make_tensors(*, bias: bool = False, tied: bool = False, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    for i in range(L):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.{n}.weight": (D,) for n in ("input_layernorm", "post_attention_layernorm")}
        linear = {"q": (N * H, D), "k": (K * H, D), "v": (K * H, D), "o": (D, N * H)}
        linear = {f"self_attn.{n}_proj": s for n, s in linear.items()}
        linear |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        shapes |= {f"{at}.{n}.weight": s for n, s in linear.items()}
        if bias:
            shapes |= {f"{at}.{n}.bias": s[:1] for n, s in linear.items()}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def make_hf(directory: Path, tensors=None, *, shards: int = 1, drop: tuple[str, ...] = (), **config) -> Path:
    """An HF directory; ``config`` changes CONFIG, ``drop`` removes fields."""
    directory.mkdir()
    data = {k: v for k, v in {**CONFIG, **config}.items() if k not in drop}
    (directory / "config.json").write_text(json.dumps(data))
    tensors = make_tensors() if tensors is None else tensors
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def check(checkpoint: Path, tensors: dict[str, np.ndarray], dtype=np.float32) -> None:
    """Every tensor of ``checkpoint`` against ``tensors``, index by index."""
    got = arrays(load(checkpoint))
    used = 0

    def same(ours: np.ndarray, theirs: np.ndarray) -> None:
        nonlocal used
        used += theirs.size
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, theirs.astype(dtype))

    same(got["embed"], tensors["model.embed_tokens.weight"])
    same(got["norm.scale"], tensors["model.norm.weight"])
    if "lm_head" in got:
        same(got["lm_head"].T, tensors["lm_head.weight"])
    for i in range(L):
        ours = {n.removeprefix(f"blocks.{i}."): x for n, x in got.items() if n.startswith(f"blocks.{i}.")}
        prefix = f"model.layers.{i}."
        theirs = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        same(ours["attn_norm.scale"], theirs["input_layernorm.weight"])
        same(ours["mlp_norm.scale"], theirs["post_attention_layernorm.weight"])
        same(ours["down.kernel"].T, theirs["mlp.down_proj.weight"])
        for c, name in enumerate(("gate", "up")):
            same(ours["gate_up.kernel"][:, c].T, theirs[f"mlp.{name}_proj.weight"])
            if "gate_up.bias" in ours:
                same(ours["gate_up.bias"][c], theirs[f"mlp.{name}_proj.bias"])
        rows = {n: lambda h: slice(h * H, (h + 1) * H) for n in "qkv"}
        for k in range(K):
            # Query head k * G + g reads kv head k.
            slots = [("q", g, k * G + g) for g in range(G)] + [("k", G, k), ("v", G + 1, k)]
            for name, j, head in slots:
                part = rows[name](head)
                same(ours["qkv.kernel"][:, k, j].T, theirs[f"self_attn.{name}_proj.weight"][part])
                if "qkv.bias" in ours:
                    same(ours["qkv.bias"][k, j], theirs[f"self_attn.{name}_proj.bias"][part])
            for g in range(G):
                columns = rows["q"](k * G + g)
                same(ours["out.kernel"][k, g].T, theirs["self_attn.o_proj.weight"][:, columns])
        if "out.bias" in ours:
            same(ours["out.bias"], theirs["self_attn.o_proj.bias"])
            same(ours["down.bias"], theirs["mlp.down_proj.bias"])
    assert used == sum(x.size for x in got.values())


def with_header(text: bytes):
    """Damage: a safetensors file with this header and nothing else."""
    return lambda source: (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def reconfig(**changes):
    """Damage: other fields in config.json; None is null."""
    return lambda source: (source / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def arrays(module) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)
