"""A converted target back as a Hugging Face directory, and as a GGUF file of the same floats: what
scripts/bench_peers.py gives to other engines, so that all run the very same weights.

    python -m convert.export_target models/smollm2-135m DIRECTORY [--gguf FILE]

SmolLM2 comes to jeagle as a quantised GGUF file (``convert/smollm2.py``); what is written here are the float32 numbers
that the converter made of it. The GGUF file has no vocabulary: token ids go in and come out. Needs the gguf package.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from convert import ConversionError
from convert.__main__ import run
from convert.export import llama_config, new_path
from convert.gguf_file import BLOCK_NAMES, NAMES
from convert.llama import describe
from convert.source import CARRIED_FILES
from convert.table import unfill
from jeagle.checkpoint import load_config, load_llama, read_source
from jeagle.checkpoint_writer import check_new
from jeagle.config import EagleConfig, LlamaConfig
from jeagle.llama4_config import Llama4Config


def hf_form(config: LlamaConfig) -> dict[str, Any]:
    """config.json."""
    return llama_config(config) | dict(
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=list(config.eos_token_ids) or None,
    )


def write(checkpoint: Path, destination: Path, gguf: Path | None = None) -> Path:
    """The directory, and the GGUF file where it is asked for: both or neither.

    Raises ConversionError or CheckpointError with one sentence.
    """
    destination, gguf = destination.absolute(), gguf and gguf.absolute()
    check_new(destination)
    config = load_config(checkpoint)
    if isinstance(config, Llama4Config):
        raise ConversionError(f"{checkpoint} is a Llama 4, for which no form is written; keep the original model")
    if isinstance(config, LlamaConfig) and read_source(checkpoint)["dtype"] == "fp8":
        raise ConversionError(
            f"{checkpoint} has FP8 weights, for which no form is written; convert its source with another --dtype first"
        )
    if gguf:
        check_gguf(gguf, config, checkpoint)
    if gguf == destination:
        raise ConversionError(f"{gguf} cannot be both the directory and the GGUF file; choose another name for one")
    target = load_llama(checkpoint)
    written = hf_form(target.config) | dict(torch_dtype=target.compute_dtype.name)
    found = {".".join(map(str, path)): np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(target))}
    rules = describe(written, {}).rules
    tensors = {name: np.ascontiguousarray(part) for name, part in unfill(rules, found)}
    with new_path(destination) as directory:
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})  # HF refuses files without it
        for name in CARRIED_FILES:
            if (checkpoint / name).exists():
                shutil.copyfile(checkpoint / name, directory / name)
        if gguf:
            with new_path(gguf) as file:
                write_gguf(file, target.config, tensors)
    return destination


def check_gguf(path: Path, config: LlamaConfig | EagleConfig, checkpoint: Path) -> None:
    """Before anything is written: raises ConversionError or CheckpointError with one sentence."""
    check_new(path)
    if config.rope_scaling is not None or config.attention_bias or config.mlp_bias:
        raise ConversionError(f"{checkpoint}: a GGUF file is written of Llamas without rope_scaling and biases alone")
    if not path.parent.is_dir():
        raise ConversionError(f"{path} cannot be written: {path.parent} is not a directory")
    if importlib.util.find_spec("gguf") is None:
        raise ConversionError("--gguf needs the package gguf, which is not installed (pip install gguf)")


def write_gguf(path: Path, config: LlamaConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Float32, under llama.cpp's names and with its order of the rows of Q and K."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = {ours: theirs for theirs, ours in {**NAMES, **BLOCK_NAMES}.items()}
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for name, tensor in tensors.items():
        values = tensor.astype(np.float32)
        if name.startswith("model.layers."):
            _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
            theirs = f"blk.{layer}.{names[rest]}.weight"
            if (count := heads.get(rest.split(".")[-1])) is not None:
                # A head's rows are two halves; llama.cpp rotates neighbours: 0, H/2, 1, H/2 + 1, ...
                values = values.reshape(count, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        else:
            theirs = f"{names[name.removesuffix('.weight')]}.weight"
        writer.add_tensor(theirs, np.ascontiguousarray(values))
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.export_target", description="Write a converted target as other engines read it."
    )
    parser.add_argument("checkpoint", type=Path, help="a target's directory, as python -m convert wrote it")
    parser.add_argument("destination", type=Path, help="the directory to make; it must not exist")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="also a GGUF file, for llama.cpp")
    args = parser.parse_args(argv)

    return run(lambda: write(args.checkpoint, args.destination, args.gguf))


if __name__ == "__main__":
    sys.exit(main())
