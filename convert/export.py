"""EAGLE heads out of jeagle: a Hugging Face directory that vLLM, SGLang and the EAGLE repository read.

``python -m convert.export HEAD DESTINATION --verifier NAME`` writes ``config.json`` and ``model.safetensors``. Tensors
go through the converter's own table, backwards, and before a byte is written the converter reads the new config: what
would come back as another head is refused. So ``convert(DESTINATION, ..., kind="eagle")`` gives the same head, bit for
bit.

Three forms. ``speculators``: EAGLE-3 and 3.1 as vllm-project/speculators writes them, read by vLLM. ``eagle``: the flat
config and ``midlayer.*`` names of SafeAILab's EAGLE-3, read by SGLang, vLLM and, as far as it goes (the three default
taps, no norm before fc), the EAGLE repository. EAGLE-1, HASS and Meta heads have only EAGLE-1's form: the config of a
``LlamaForCausalLM``, and ``fc``. Where such a head has what the published readers would leave out without a word (a
first or final norm, a bias of fc, an LM head or a vocabulary of its own), its architecture gets a name that vLLM and
SGLang refuse; only our converter reads it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from convert import DTYPES
from convert.__main__ import run
from convert.eagle import describe, head_rules
from convert.eagle_config import TAP_IDS
from convert.table import ConversionError, Rule, unfill
from jeagle import heads
from jeagle.checkpoint import load_eagle, read_source
from jeagle.checkpoint_writer import check_new, explained, locked_sibling
from jeagle.config import EagleConfig, LlamaConfig, RopeScaling
from jeagle.eagle import EagleHead
from jeagle.llama4_config import Llama4EagleConfig
from jeagle.weights import Fp8, dtype_of

__all__ = ["export", "llama_config", "main", "new_path"]

SPECULATORS_VERSION = "0.9.0"  # the release whose fields and names are written here

# What the readers of a form run; another head fails to load, or loads and drafts badly. vLLM has no bias on EAGLE-3's
# fc, and none goes without the final norm. SGLang and EAGLE know no norm_before_residual or biases.
# EAGLE has one layer, and SGLang looks for other norms in the later ones than vLLM and speculators.
_EAGLE3 = {"fc_bias": False, "final_norm": True}
_RUN: dict[str, dict[str, Any]] = {
    "speculators": _EAGLE3,
    "eagle": {**_EAGLE3, "num_layers": 1, "norm_before_residual": False, "attention_bias": False, "mlp_bias": False},
}


def export(
    head: str | Path | EagleHead,
    destination: str | Path,
    *,
    verifier: str | None = None,
    form: Literal["auto", "speculators", "eagle"] = "auto",
    dtype: str = "auto",
    speculative_tokens: int = 3,
) -> Path:
    """Write ``head`` into the new directory ``destination`` and return its path.

    Args:
      head: a converted head's directory, the name of one that comes with the package, or a module.
      verifier: the target's hub name or path, which the speculators form must record.
      form: speculators or eagle, for EAGLE-3 heads; auto: speculators for them and EAGLE-1's for all others.
      dtype: float32 (f32), bfloat16 (bf16), or auto: the head's own. d2t is int64 [W] and t2d bool [V] in any case.
      speculative_tokens: the draft length that the speculators form proposes; servers may override it.

    Raises:
      ConversionError, CheckpointError: one sentence. Nothing is left behind.
    """
    destination = Path(destination).absolute()
    check_new(destination)
    name = "the head" if isinstance(head, EagleHead) else str(head)
    if not isinstance(head, EagleHead):
        directory = (None if Path(head).exists() else heads.find(str(head))) or Path(head)
        # No reader of heads takes our scales.
        head = load_eagle(directory, "bfloat16" if read_source(directory)["dtype"] == "fp8" else "auto")
    config = head.config
    if isinstance(config, Llama4EagleConfig):
        raise ConversionError(f"{name} has Llama 4's attention, for which no form is written; keep the original head")
    if isinstance(dtype_of(head), Fp8):
        raise ConversionError(f"{name} has FP8 weights, which no form holds; export the head it was converted from")
    chosen = _choose_form(form, config, name)
    tensors = {".".join(map(str, path)): np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(head))}
    stored = _choose_dtype(dtype, tensors, name)
    if chosen == "speculators":
        written = _speculators_config(config, verifier, speculative_tokens)
    else:
        written = _eagle1_config(config) if config.fusion == "concat" else _eagle3_config(config)
    if config.target_layers is not None:
        written["num_target_layers"] = config.target_layers  # for our converter without its --target
    written["torch_dtype"] = stored
    rules = _read_back(written, config, chosen, name)
    weights = {
        source: np.ascontiguousarray(part, dtype=np.int64 if part.dtype.kind == "i" else stored)
        for source, part in unfill(rules, tensors)
    }
    if config.reduced_vocabulary:
        marked = np.zeros(config.vocab_size, bool)
        marked[tensors["draft_to_target"]] = True
        weights["t2d"] = marked
    with new_path(destination) as directory:
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})  # HF refuses files without it
    return destination


def _choose_form(form: str, config: EagleConfig, name: str) -> str:
    """speculators or eagle, after what its readers could not run has been refused."""
    if form not in ("auto", "speculators", "eagle"):
        raise ConversionError(f"form must be one of auto, speculators, eagle, got {form!r}")
    if config.fusion == "concat":
        if form == "speculators":
            raise ConversionError(f"{name} is no EAGLE-3 head, and only those have a speculators form; use form eagle")
        return "eagle"
    if form == "auto":
        form = "speculators"
    for field, runs in _RUN[form].items():
        value = getattr(config, field)
        if value != runs:
            mend = f"train it with {field} {runs}" if field in _EAGLE3 else "export it in the speculators form"
            raise ConversionError(
                f"{name} has {field} {value}, but the readers of the {form} form run {field} {runs} only; {mend}"
            )
    if list(config.taps) != sorted(set(config.taps)):
        raise ConversionError(
            f"{name} has taps {config.taps}, but vLLM, SGLang and EAGLE join taps in the order of the target's blocks; "
            "train it with ascending taps"
        )
    if form == "eagle" and config.target_layers in config.taps:
        raise ConversionError(
            f"{name} taps the output of the target's last block ({config.target_layers}), which SGLang cannot; export "
            "it in the speculators form"
        )
    return form


def _choose_dtype(asked: str, tensors: Mapping[str, np.ndarray], name: str) -> str:
    if asked != "auto":
        choices = [name for name in DTYPES if name != "fp8"]
        if asked not in choices:
            raise ConversionError(f"dtype must be one of auto, {', '.join(choices)}, got {asked!r}")
        return DTYPES[asked]
    found = {x.dtype.name for x in tensors.values() if x.dtype.kind != "i"}
    if len(found) != 1 or not found <= set(DTYPES):
        raise ConversionError(
            f"{name} has weights of {', '.join(sorted(found))}; say which dtype to write with --dtype"
        )
    return found.pop()


def _read_back(written: dict[str, Any], config: EagleConfig, form: str, name: str) -> list[Rule]:
    """The rules of what is about to be written, in its own names, after our converter has read it as the same head."""
    shapes = {s: shape for rule in head_rules(config) for s, shape in zip(rule.sources, rule.source_shapes)}
    if config.fusion == "attention" and form == "eagle":
        shapes = {s.replace("layers.0.", "midlayer."): shape for s, shape in shapes.items()}
    description = describe(written, shapes)
    for field in dataclasses.fields(config):
        ours, read = (getattr(c, field.name) for c in (config, description.config))
        if ours != read:
            raise ConversionError(
                f"{name} has {field.name} {ours}, which its published form cannot say: it would be read as {read}; "
                "keep the head as a jeagle checkpoint"
            )
    return description.rules


def llama_config(config: LlamaConfig | EagleConfig) -> dict[str, Any]:
    """What every form says of the blocks, in HF's names. Rope in the classic fields, which old and new readers know."""
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _rope_scaling(config.rope_scaling),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": False,
    }


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    common = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return common
    return {
        **common,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


def _eagle1_config(config: EagleConfig) -> dict[str, Any]:
    left_out = (config.first_block_norm, config.final_norm, config.fc_bias, config.own_lm_head)
    # EAGLE takes a missing bias for true. Its architecture is a plain Llama's, which vLLM renames.
    architecture = "JeagleEagleForCausalLM" if any(left_out) else "LlamaForCausalLM"
    written = {"architectures": [architecture], **llama_config(config), "bias": config.fc_bias}
    if config.input_norms:
        written["add_para_norm"] = True  # vLLM makes the norms of HASS by it
    return {**written, "draft_vocab_size": config.draft_vocab_size} if config.reduced_vocabulary else written


def _norm_flags(config: EagleConfig) -> dict[str, bool]:
    joint, each = config.tap_norm == "joint", config.tap_norm == "each"
    return {"norm_before_fc": joint, "fc_norm": each, "norm_output": config.norm_output}


def _eagle3_config(config: EagleConfig) -> dict[str, Any]:
    written = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **llama_config(config),
        "bias": config.fc_bias,
        # null tells SGLang to take the target's LM head; the field itself must be there.
        "draft_vocab_size": config.draft_vocab_size if config.own_lm_head else None,
        **_norm_flags(config),
        # vLLM reads the first list and takes ids for block inputs, SGLang the second and takes them for outputs.
        TAP_IDS: list(config.taps),
        "eagle_config": {TAP_IDS: [tap - 1 for tap in config.taps], "use_aux_hidden_state": True},
        "num_aux_hidden_states": len(config.taps),
    }
    # SGLang and EAGLE compute with it wherever the field exists, so null would not do.
    return written if config.target_width == config.width else {**written, "target_hidden_size": config.target_width}


def _speculators_config(config: EagleConfig, verifier: str | None, speculative_tokens: int) -> dict[str, Any]:
    if not verifier:
        raise ConversionError("the speculators form records the target; give its hub name or path with --verifier")
    if speculative_tokens < 1:
        raise ConversionError(f"speculative_tokens must be at least 1, got {speculative_tokens}")
    # vLLM makes the draft's config of transformer_layer_config and counts the taps there, not in their list.
    body = {**llama_config(config), "num_aux_hidden_states": len(config.taps)}
    proposal = {"proposal_type": "greedy", "speculative_tokens": speculative_tokens}
    proposal |= {"verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "draft_vocab_size": config.draft_vocab_size,
        "norm_before_residual": config.norm_before_residual,
        **_norm_flags(config),
        "target_hidden_size": None if config.target_width == config.width else config.target_width,
        TAP_IDS: list(config.taps),  # block inputs, like ours
        "tie_word_embeddings": False,
        "transformer_layer_config": body,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": verifier, "architectures": ["LlamaForCausalLM"]},
        },
    }


@contextlib.contextmanager
def new_path(destination: Path) -> Iterator[Path]:
    """Where to make what gets the name ``destination`` at the end, a directory or a file; any other end removes it."""
    with explained(destination), locked_sibling(destination) as temporary:
        try:
            yield temporary / destination.name
        except SafetensorError as error:
            raise OSError(f"{error}") from error
        (temporary / destination.name).rename(destination)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.export", description="Write a converted EAGLE head as vLLM, SGLang and EAGLE read it."
    )
    parser.add_argument("head", metavar="HEAD", help="a head's directory, as python -m convert wrote it, or its name")
    parser.add_argument("destination", metavar="DESTINATION", help="the directory to make; it must not exist")
    parser.add_argument("--verifier", metavar="NAME", help="the target's hub name or path (for the speculators form)")
    parser.add_argument("--form", choices=("auto", "speculators", "eagle"), default="auto")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto: the head's own (default)")
    parser.add_argument("--speculative-tokens", type=int, default=3, metavar="N", help="draft length to propose (3)")
    args = parser.parse_args(argv)
    return run(
        lambda: export(
            args.head,
            args.destination,
            verifier=args.verifier,
            form=args.form,
            dtype=args.dtype,
            speculative_tokens=args.speculative_tokens,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
