"""GGUF files (llama.cpp) of the Llama architecture, seen as an HF checkpoint: config, names, row order, floats.

Three things differ from HF's form: names; the rows of Q and K, which llama.cpp interleaves for its rotary embedding;
and quantised storage, undone one tensor at a time. Needs the ``gguf`` package (``pip install 'jeagle[gguf]'``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.fields import said
from convert.gguf_tokenizer import tokenizer_files
from convert.source import OpenSource
from convert.table import ConversionError
from jeagle.config import BlockConfig, ConfigError, LlamaConfig, RopeScaling
from jeagle.layers import rope_frequencies

__all__ = ["GGUFSource", "open_gguf"]

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
PIECE = 1 << 24  # elements dequantised at a time


# What the fields read here must hold, by the end of their names; [of] a list. Others are judged where they are used.
KINDS: dict[str, Any] = {
    "tokenizer.chat_template": str,
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.tokens": [str],
    "tokenizer.ggml.merges": [str],
    "tokenizer.ggml.token_type": [int],
    "_token_id": int,
    ".embedding_length": int,
    ".key_length": int,
    ".layer_norm_rms_epsilon": (int, float),
    ".freq_base": (int, float),
    ".scaling.factor": (int, float),
    ".scale_linear": (int, float),
}


class Metadata:
    """Typed access to a GGUF file's key/value fields."""

    def __init__(self, fields: Mapping[str, Any], file: str):
        self._fields, self._file = fields, file

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        if field is None:
            return default
        try:
            value = field.contents()
        except UnicodeDecodeError as error:
            raise ConversionError(f"{self._file}: field {key} is not UTF-8 ({error.reason}); fetch it again") from error
        kind = next((kind for end, kind in KINDS.items() if key.endswith(end)), object)
        if not _is(value, kind):
            raise ConversionError(f"{self._file}: field {key} {said(value)}, which it cannot be; fetch it again")
        return value

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ConversionError(f"{self._file} lacks the field {key}; it is damaged or of a form that is not known")
        return value

    def float(self, key: str, default: float | None = None) -> float:
        """Floats are stored as float32; the shortest decimal that means the same is what was meant (1e-05)."""
        value = self.require(key) if default is None else self.get(key, default)
        return float(str(np.float32(value)))


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(isinstance(x, kind[0]) for x in value)
    return isinstance(value, kind)


class GGUFSource:
    """Tensors under HF names, dequantised to float32 (bfloat16 stays) and with HF's row order, on ``read``."""

    def __init__(self, reader: Any, file: str, *, num_heads: int, num_kv_heads: int):
        import gguf.quants

        self._gguf = gguf
        self._tensors = {_hf_name(t.name, file): t for t in reader.tensors if t.name != ROPE_FACTORS}
        self._heads = {"q_proj": num_heads, "k_proj": num_kv_heads}
        for tensor in self._tensors.values():
            kind = tensor.tensor_type
            plain = kind.name in ("F32", "F16", "BF16")
            if not plain and not _dequantises(gguf.quants, kind):
                raise ConversionError(f"{file} stores tensor {tensor.name} as {kind.name}, which does not convert")

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))  # ggml counts axes from the fastest

    def dtype(self, name: str) -> np.dtype:
        bfloat16 = self._tensors[name].tensor_type.name == "BF16"
        return np.dtype(ml_dtypes.bfloat16 if bfloat16 else np.float32)

    def read(self, name: str) -> np.ndarray:
        tensor, shape = self._tensors[name], self.shape(name)
        out = np.empty(shape, self.dtype(name))
        rows, stored = out.reshape(-1, shape[-1]), tensor.data.reshape(-1, tensor.data.shape[-1])
        step = max(1, PIECE // shape[-1])
        for i in range(0, len(rows), step):
            rows[i : i + step] = self._gguf.quants.dequantize(stored[i : i + step], tensor.tensor_type)
        projection = name.split(".")[-2]
        return _undo_permutation(out, self._heads[projection]) if projection in self._heads else out


def open_gguf(path: Path) -> OpenSource:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConversionError(f"{path} needs the gguf package; pip install 'jeagle[gguf]'") from error
    try:
        reader = GGUFReader(str(path))
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ConversionError(f"{path} is damaged or not a GGUF file ({error}); fetch it again") from error
    metadata = Metadata(reader.fields, path.name)
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    config = _hf_config(metadata, shapes, path.name)
    factors = next((np.array(t.data, np.float32) for t in reader.tensors if t.name == ROPE_FACTORS), None)
    try:
        config["rope_scaling"] = _rope_scaling(metadata, config, factors, path.name)
    except ConfigError as error:
        raise ConversionError(f"{path.name}: {error}; fetch it again") from error
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    carried, notes = tokenizer_files(metadata, config)
    return OpenSource(
        name=path.name,
        config=config,
        generation={},
        tensors=GGUFSource(reader, path.name, num_heads=heads, num_kv_heads=kv_heads),
        files=(path,),
        carried=carried,
        notes=notes,
    )


def _hf_config(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], file: str) -> dict[str, Any]:
    architecture = metadata.require("general.architecture")
    if architecture != "llama":
        raise ConversionError(f"{file} holds a model of architecture {architecture!r}; only 'llama' converts")
    if metadata.get("llama.expert_count"):
        raise ConversionError(f"{file} holds a mixture of experts; only dense models convert")
    if "token_embd.weight" not in shapes:
        raise ConversionError(f"{file} lacks tensor token_embd.weight; use a GGUF file of the whole model, not a shard")
    width, heads = metadata.require("llama.embedding_length"), metadata.require("llama.attention.head_count")
    kv_heads = metadata.get("llama.attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or min(heads, kv_heads) < 1:
        raise ConversionError(f"{file} has layers of differing head counts; only uniform models convert")
    head_dim = metadata.get("llama.attention.key_length", width // heads)
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ConversionError(f"{file} rotates a part of each head; only models that rotate whole heads convert")
    # Chat models end a turn with eot or eom, which llama.cpp keeps apart from eos.
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    # Files of Llama 3's first weeks name eos alone, and how their text is split they do not say (gguf_tokenizer.py).
    tokens, bos = metadata.get("tokenizer.ggml.tokens") or [], metadata.get("tokenizer.ggml.bos_token_id")
    types = metadata.get("tokenizer.ggml.token_type") or tokens
    if tokens and (len(types) != len(tokens) or not 0 <= (bos or 0) < len(tokens)):
        raise ConversionError(
            f"{file} has {len(tokens)} tokens, {len(types)} types of tokens and bos_token_id {bos}, which do not fit; "
            "fetch it again"
        )
    ends += [tokens.index(name) for name in ("<|eot_id|>",) if name in tokens]
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": metadata.require("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": metadata.require("llama.feed_forward_length"),
        "rms_norm_eps": metadata.float("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.float("llama.rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "vocab_size": shapes["token_embd.weight"][0],
        "max_position_embeddings": metadata.require("llama.context_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": bos,
        "eos_token_id": [*dict.fromkeys(end for end in ends if end is not None)],
    }


def _rope_scaling(
    metadata: Metadata, config: Mapping[str, Any], factors: np.ndarray | None, file: str
) -> dict[str, Any] | None:
    """HF's rope_scaling. llama.cpp stores Llama 3's as a divisor of each frequency: its parameters are inferred."""
    if factors is not None:
        if np.all(factors == 1):
            return None
        for factor in (8.0, 32.0):  # Llama 3.1 and 3.3; 3.2
            if factors.shape == (config["head_dim"] // 2,) and np.allclose(
                factors, _llama3_divisors(config["head_dim"], config["rope_theta"], factor), rtol=1e-4
            ):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
        raise ConversionError(
            f"tensor {ROPE_FACTORS} in {file} is not Llama 3.1's or 3.2's rotary scaling; convert the Hugging Face "
            "checkpoint instead"
        )
    # As llama.cpp reads files of any age: linear unless another kind is named, the factor under either name.
    kind = metadata.get("llama.rope.scaling.type", "linear")
    factor = metadata.float("llama.rope.scaling.factor", metadata.float("llama.rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    return {"rope_type": kind, "factor": factor}  # the reader refuses other kinds


def _llama3_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    def frequencies(scaling: RopeScaling | None) -> np.ndarray:
        config: BlockConfig = LlamaConfig.tiny(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
        return rope_frequencies(config)

    return frequencies(None) / frequencies(RopeScaling(kind="llama3", factor=factor))


def _hf_name(name: str, file: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{leaf}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match and match[2] in BLOCK_NAMES:
        return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.{leaf}"
    raise ConversionError(f"{file} holds tensor {name}, which no Llama model has; convert its Hugging Face checkpoint")


def _undo_permutation(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from llama.cpp's order (0, H/2, 1, H/2+1, ...) to HF's two halves; biases alike."""
    if len(x) % (2 * heads):
        raise ConversionError(f"a query or key tensor has {len(x)} rows, which do not divide into {heads} heads")
    pairs = x.reshape(heads, len(x) // heads // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def _dequantises(quants: Any, kind: Any) -> bool:
    """Whether the gguf package can undo this storage: of some it only knows the size."""
    block, size = quants.GGML_QUANT_SIZES[kind]
    try:
        quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return block > 0
