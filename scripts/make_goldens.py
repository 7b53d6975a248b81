"""What do HF transformers compute? Write the answers that the parity tests compare with, into tests/golden/.

Runs in an environment of its own, because jeagle itself needs no torch:

    python -m venv /tmp/hf && /tmp/hf/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/hf/bin/python scripts/make_goldens.py                        # the tiny checkpoints, a minute
    /tmp/hf/bin/python scripts/make_goldens.py --only llama4_scout    # one of them
    /tmp/hf/bin/python scripts/make_golden_warpers.py
    /tmp/hf/bin/python scripts/make_golden_smollm2.py HF_DIR

The committed files come from CPython 3.11.7, torch 2.13.0+cpu, transformers 5.23.0. Everything is float32, eager
attention, seeded; on one machine the same versions give the same bytes.

What this script writes:

    <name>/                 a random Llama as ``save_pretrained`` leaves it; half of the configs in the classic form
    llama4_<name>/          the same of Llama 4, with prompts that cross the borders of its attention chunks
    <name>/expected.npz     prompt_i [n] int32, logits_i [n, V] float32, greedy_i [40] int32 for three prompts; margin,
                            the smallest distance between the two largest logits on the greedy paths; inputs [L, n, D]
                            float32, what each block reads of the last prompt
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
NUM_GREEDY = 40
LEAST_MARGIN = 0.02  # of a tiny model's greedy choices
PROMPT_LENGTHS = (2, 7, 23)
LONG_PROMPT_LENGTHS = (2, 21, 47)  # Llama 4: with NUM_GREEDY tokens more, across several chunks

TINY = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
    tie_word_embeddings=False,
)

# name -> (overrides of TINY, form of config.json, save_pretrained arguments)
TINY_MODELS: dict[str, tuple[dict, str, dict]] = {
    # As the hub has Llama 2: no head_dim, no bias fields, no rope_theta; every query head its own kv head.
    "llama2": (dict(num_key_value_heads=4, rms_norm_eps=1e-6), "classic", {}),
    # head_dim 16 where width / heads is 8. Wavelengths are 6, 14, 30, 65, 140, 305, 663, 1442 positions and the band
    # limits 64 and 256: three frequencies stay, two are blended, three are divided by 8.
    "llama31": (
        dict(
            head_dim=16,
            rope_theta=500.0,
            max_position_embeddings=2048,
            eos_token_id=[2, 3],
            rope_scaling=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=256,
            ),
        ),
        "v5",
        {},
    ),
    # One kv head for all queries.
    "linear": (dict(num_key_value_heads=1, rope_scaling=dict(rope_type="linear", factor=4.0)), "classic", {}),
    "biased": (dict(attention_bias=True, mlp_bias=True), "v5", {}),
    "tied": (dict(tie_word_embeddings=True, num_hidden_layers=3), "classic", {}),
    "sharded": (dict(num_hidden_layers=3, intermediate_size=48), "v5", dict(max_shard_size="40KB")),
}


TINY4 = dict(
    vocab_size=112,
    hidden_size=16,
    intermediate_size=16,
    intermediate_size_mlp=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    num_local_experts=4,
    num_experts_per_tok=1,
    attention_chunk_size=16,
    attn_temperature_tuning=True,
    floor_scale=4,
    attn_scale=0.3,
    bos_token_id=1,
    eos_token_id=[2, 3],
    pad_token_id=None,
)
TINY_VISION = dict(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=32,
    vision_output_dim=8,
    projector_input_dim=8,
    projector_output_dim=8,
    image_size=16,
    patch_size=8,
)

# name -> (overrides of TINY4, whether it is the text model of a multimodal checkpoint)
TINY4_MODELS: dict[str, tuple[dict, bool]] = {
    # Experts in every block, the last without rotary embedding; original length 64: one of four frequencies is divided.
    "llama4_scout": (
        dict(
            intermediate_size=8,
            use_qk_norm=True,
            interleave_moe_layer_step=1,
            no_rope_layer_interval=4,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=500.0,
                factor=16.0,
                low_freq_factor=1.0,
                high_freq_factor=1.0,
                original_max_position_embeddings=64,
            ),
        ),
        True,
    ),
    "llama4_maverick": (
        dict(
            use_qk_norm=False,
            interleave_moe_layer_step=2,
            no_rope_layer_interval=2,
            rope_parameters=dict(rope_type="default", rope_theta=500.0),
        ),
        False,
    ),
}


def random_model(model_name: str, seed: int) -> PreTrainedModel:
    """Weights large enough for peaked attention and logits, norms and biases that would be missed if dropped."""
    generator = torch.Generator().manual_seed(seed)
    if model_name in TINY_MODELS:
        kind, config = LlamaForCausalLM, LlamaConfig(**{**TINY, **TINY_MODELS[model_name][0]})
    else:
        overrides, multimodal = TINY4_MODELS[model_name]
        kind, config = Llama4ForCausalLM, Llama4TextConfig(**{**TINY4, **overrides})
        if multimodal:
            kind = Llama4ForConditionalGeneration
            config = Llama4Config(text_config=config.to_dict(), vision_config=TINY_VISION)
    model = kind._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif "lm_head" in name:
                parameter.copy_((0.6 if model_name in TINY_MODELS else 1.2) * noise)  # half as wide, twice as much
            else:
                parameter.copy_(0.2 * noise)
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Float32 logits [T, V] of one text in one forward without a cache."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


@torch.no_grad()
def inputs_of(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Float32 [L, T, D]: what each block reads of one text. (HF's last hidden state is the final norm's.)"""
    states = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
    return torch.cat(states[:-1]).float()


def margin_of(logits_TV: torch.Tensor) -> float:
    """Smallest distance between the largest and the second largest logit of the rows."""
    top2 = logits_TV.topk(2).values
    return float((top2[:, 0] - top2[:, 1]).min())


def greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], float]:
    """NUM_GREEDY tokens by recomputing the whole text for each one, EOS ignored; fewer where a choice is unclear."""
    text, margin = list(prompt), float("inf")
    while len(text) < len(prompt) + NUM_GREEDY and margin > LEAST_MARGIN:
        last = logits_of(model, text)[-1:]
        margin = min(margin, margin_of(last))
        text.append(int(last.argmax()))
    return text[len(prompt) :], margin


def to_classic(path: Path) -> None:
    """Rewrite config.json from transformers 5's form to the one that hub checkpoints have.

    Rope scaling of kind linear gets the oldest spelling (``type``); defaults are left out, as in Llama 2.
    """
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    if kind == "default":
        config["rope_scaling"] = None
    else:
        config["rope_scaling"] = {"type" if kind == "linear" else "rope_type": kind, **rope}
        config["rope_theta"] = theta
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]
    for name in ("attention_bias", "mlp_bias"):
        if not config[name]:
            del config[name]
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.31.0"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def routing_margin(model: PreTrainedModel, text: list[int]) -> float:
    """Smallest distance between the router logits of the last expert chosen and of the first one not; inf for none."""
    margins = [float("inf")]

    def watch(router, _, outputs) -> None:
        best = outputs[1].topk(router.top_k + 1).values
        margins.append(float((best[:, -2] - best[:, -1]).min()))

    routers = [module for path, module in model.named_modules() if path.endswith(".router")]
    hooks = [router.register_forward_hook(watch) for router in routers]
    logits_of(model, text)
    for hook in hooks:
        hook.remove()
    return min(margins)


def make_tiny(name: str) -> None:
    """Search the seeds for a model whose greedy choices are clear, save it and what it computes."""
    _, form, save = TINY_MODELS.get(name, ({}, "v5", {}))
    lengths = PROMPT_LENGTHS if name in TINY_MODELS else LONG_PROMPT_LENGTHS
    for seed in range(5000):
        model = random_model(name, seed)
        rng = random.Random(seed)
        vocab_size = model.config.get_text_config().vocab_size
        prompts = [[rng.randrange(3, vocab_size) for _ in range(n)] for n in lengths]
        paths = []
        for prompt in prompts:
            paths.append(greedy(model, prompt))
            if paths[-1][1] <= LEAST_MARGIN:
                break
        margin = min(m for _, m in paths)
        if margin <= LEAST_MARGIN or min(routing_margin(model, p + g) for p, (g, _) in zip(prompts, paths)) <= 0.0005:
            continue
        distinct = min(len(set(tokens)) for tokens, _ in paths)
        if distinct > 12:
            break
    else:
        raise SystemExit(f"{name}: no seed gives clear and varied greedy texts")

    directory = GOLDEN / name
    shutil.rmtree(directory, ignore_errors=True)
    model.generation_config.pad_token_id = None
    model.save_pretrained(directory, **save)
    for file in directory.iterdir():
        file.chmod(0o644)
    if form == "classic":
        to_classic(directory / "config.json")
    expected: dict[str, Any] = {"margin": np.float32(margin)}
    reloaded = type(model).from_pretrained(directory, attn_implementation="eager").eval()
    for i, (prompt, (tokens, _)) in enumerate(zip(prompts, paths)):
        logits_TV = logits_of(model, prompt)
        assert torch.equal(logits_TV, logits_of(reloaded, prompt)), f"{name}: the saved checkpoint computes otherwise"
        expected[f"prompt_{i}"] = np.array(prompt, np.int32)
        expected[f"logits_{i}"] = logits_TV.numpy()
        expected[f"greedy_{i}"] = np.array(tokens, np.int32)
    expected["inputs"] = inputs_of(model, prompts[-1]).numpy()
    np.savez(directory / "expected.npz", **expected)
    size = sum(f.stat().st_size for f in directory.iterdir())
    print(f"{name:15} seed {seed:3}  margin {margin:.4f}  distinct tokens >= {distinct}  {size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", choices=(*TINY_MODELS, *TINY4_MODELS), help="one tiny checkpoint")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # Scout's high_freq_factor is its low one: a warning per model
    torch.set_num_threads(1)  # the order of a sum must not depend on the machine's cores
    for name in [args.only] if args.only else (*TINY_MODELS, *TINY4_MODELS):
        make_tiny(name)


if __name__ == "__main__":
    main()
