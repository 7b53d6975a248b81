"""What do HF's warpers keep of a distribution? Write what the sampling tests compare with, tests/golden/warpers.npz.

    /tmp/hf/bin/python scripts/make_golden_warpers.py     (in the environment of scripts/make_goldens.py)

logits [rows, V]; temperature, top_k, top_p, min_p [rows] (0, 1 and 0: off); kept [rows, V] bool and probability
[rows, V] after HF's warpers in HF's order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from make_goldens import GOLDEN
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

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


def main() -> None:
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


if __name__ == "__main__":
    torch.set_num_threads(1)  # the order of a sum must not depend on the machine's cores
    main()
