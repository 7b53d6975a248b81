"""What ``scripts/search_tree.py`` found of a head, kept beside it as ``trees.json``: how often its guesses are taken,
and the tree to draft at each batch size. Where to begin; other machines and texts have the last word.

    {"device": "cpu (x86_64)", "rate": [[0.42, 0.11], [0.45, 0.1]], "lookup_share": 0.3, "lookup_rate": [0.7, 0.8],
     "best": {"1": "bush-8+lookup", "8": "chain-1"}, ..}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jeagle.acceptance import LOOKUP_SHARE, Rates
from jeagle.tree import StaticTree, parse_tree

__all__ = ["TreeTable"]

NAME = "trees.json"


@dataclass(frozen=True)
class TreeTable:
    rates: Rates
    best: dict[int, StaticTree]  # the fastest tree by batch size, plain decoding among them
    device: str = ""  # what they were timed on, JAX's device kind first

    @classmethod
    def of_head(cls, directory: Path) -> TreeTable | None:
        """The head's, or None where it comes without. Raises ValueError with one sentence for a damaged file."""
        path = directory / NAME
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rate_DC, device = np.array(found["rate"], float), str(found.get("device", ""))
            share, rate_D = (
                float(found.get("lookup_share", LOOKUP_SHARE)),
                np.array(found.get("lookup_rate", []), float),
            )
            parsed = {int(batch): parse_tree(tree) for batch, tree in found["best"].items()}
            best = {batch: tree for batch, tree in parsed.items() if isinstance(tree, StaticTree)}
            inside = all(((x >= 0) & (x <= 1)).all() for x in (rate_DC, rate_D, np.array(share)))
            if rate_DC.ndim != 2 or rate_D.ndim != 1 or not inside:
                raise ValueError("rates must be rows of numbers in 0..1")
            if not best or len(best) < len(parsed):
                raise ValueError("best must name a static tree for a batch size at least")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no table of trees ({type(error).__name__}: {error}); remove it") from None
        return cls(Rates(rate_DC, share, rate_D), best, device)
