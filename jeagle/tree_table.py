"""What ``scripts/search_tree.py`` found of a head, kept beside it as ``trees.json``: how often its guesses are taken,
and the tree to draft at each batch size. Where to begin; other machines and texts have the last word.

    {"device": "cpu (x86_64)", "tensor_parallel_size": 1, "data_parallel_size": 1,
     "rate": [[0.42, 0.11], [0.45, 0.1]], "lookup_share": 0.3, "lookup_rate": [0.7, 0.8],
     "spread": 0.25, "best": {"1": "bush-8+lookup", "8": "off"}, "candidates": ["bush-8+lookup", "chain-1"], ..,
     "sampled": {"rate": .., "best": .., ..}}                  of sampled requests; without it, the same for both
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jeagle.acceptance import LOOKUP_SHARE, SPREAD, Rates
from jeagle.tree import StaticTree, TreePlan, parse_tree

__all__ = ["Plans", "Searched", "TreeTable"]

NAME = "trees.json"


class Searched(NamedTuple):
    rates: Rates
    best: dict[int, StaticTree]  # what to draft by batch size where nothing more is known; off for plain decoding
    candidates: tuple[StaticTree, ...]  # the fastest that draft, to choose between

    @classmethod
    def read(cls, found: Any) -> Searched:
        rate_DC, rate_D = np.array(found["rate"], float), np.array(found.get("lookup_rate", []), float)
        share = float(found.get("lookup_share", LOOKUP_SHARE))
        spread = float(found.get("spread", SPREAD))
        parsed = {int(batch): parse_tree(tree) for batch, tree in found["best"].items()}
        best = {batch: tree for batch, tree in parsed.items() if isinstance(tree, StaticTree)}
        candidates = tuple(map(parse_tree, found.get("candidates", list(found["best"].values()))))
        inside = all(((x >= 0) & (x <= 1)).all() for x in (rate_DC, rate_D, np.array(share)))
        if not 0 <= spread < math.inf:
            raise ValueError(f"spread must be 0 or more, not {spread}")
        if rate_DC.ndim != 2 or rate_D.ndim != 1 or not inside:
            raise ValueError("rates must be rows of numbers in 0..1")
        if not best or len(best) < len(parsed):
            raise ValueError("best must name a static tree for a batch size at least")
        static = tuple(tree for tree in candidates if isinstance(tree, StaticTree))
        if len(static) < len(candidates):
            raise ValueError("candidates must be static trees")
        return cls(Rates(rate_DC, share, rate_D, spread), best, static)


@dataclass(frozen=True)
class TreeTable:
    greedy: Searched
    sampled: Searched
    device: str = ""  # what they were timed on, as ``host.described`` says it
    devices: tuple[int, int] = (1, 1)  # and how many: that share the rows, that share a layer

    @classmethod
    def of_head(cls, directory: Path) -> TreeTable | None:
        """The head's, or None where it comes without. Raises ValueError with one sentence for a damaged file."""
        path = directory / NAME
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            greedy, sampled = (Searched.read(each) for each in (found, found.get("sampled", found)))
            data, tensor = (int(found.get(f"{axis}_parallel_size", 1)) for axis in ("data", "tensor"))
            return cls(greedy, sampled, str(found.get("device", "")), (data, tensor))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no table of trees ({type(error).__name__}: {error}); remove it") from None


@dataclass(frozen=True)
class Plans:
    """What to draft by batch size, of greedy batches and of those in which any row has a temperature."""

    greedy: Mapping[int, TreePlan]
    sampled: Mapping[int, TreePlan]

    @classmethod
    def always(cls, plan: TreePlan) -> Plans:
        return cls({1: plan}, {1: plan})

    @property
    def largest(self) -> TreePlan:
        return max((*self.greedy.values(), *self.sampled.values()), key=lambda plan: plan.num_nodes)

    def at(self, batch: int, sampled: bool) -> TreePlan:
        """The plan of the nearest size, of two as near the larger: what pays there pays with fewer rows."""
        plans = self.sampled if sampled else self.greedy
        return plans[min(plans, key=lambda size: (abs(math.log(size / batch)), -size))]
