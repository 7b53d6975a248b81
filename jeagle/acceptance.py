"""How often the target takes what the head guesses, by depth in the tree and rank among siblings.

Trees of all shapes share these statistics: a child of rank r at depth d is taken to be accepted with probability
rate[d, r] once its parent is, whoever the parent is. Plain numpy on the host; knows no device and no seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from jeagle.tree import StaticTree

__all__ = ["Acceptance", "expected_tokens"]

# Where nothing else is known: how often the first child is accepted, and the share of the rest that each next one gets.
FIRST, NEXT = 0.6, 0.3
PRIOR_TRIES = 10  # how many tries the prior counts for


class Acceptance:
    """Counts by depth (1, 2, .. in row 0, 1, ..) and rank, with a prior, older ones worth less.

    Args:
      plans: trees whose nodes will be counted.
      half_life: tries of a (depth, rank) after which an earlier one counts half. Only new tries age old ones: what is
        not tried stays what it was.
      prior_DC: rates found elsewhere.
    """

    def __init__(self, plans: Iterable[StaticTree], *, half_life: float = math.inf, prior_DC: np.ndarray | None = None):
        paths = [path for plan in plans for path in plan.paths]
        depth = max(map(len, paths), default=0)
        branch = 1 + max((max(path) for path in paths), default=0)
        self.tried_DC = np.zeros((depth, branch))
        self.kept_DC = np.zeros((depth, branch))
        self._half_life = half_life
        self._prior_DC = np.zeros((0, 0)) if prior_DC is None else prior_DC

    def add(self, plan: StaticTree, tried_N: np.ndarray, kept_N: np.ndarray) -> None:
        """What rounds of ``plan`` counted per node, the root first, as ``DecodeState`` does."""
        tried_DC, kept_DC = np.zeros_like(self.tried_DC), np.zeros_like(self.kept_DC)
        for path, tried, kept in zip(plan.paths, tried_N[1:], kept_N[1:], strict=True):
            tried_DC[len(path) - 1, path[-1]] += tried
            kept_DC[len(path) - 1, path[-1]] += kept
        worth_DC = 0.5 ** (tried_DC / self._half_life)
        self.tried_DC = self.tried_DC * worth_DC + tried_DC
        self.kept_DC = self.kept_DC * worth_DC + kept_DC

    @property
    def rate_DC(self) -> np.ndarray:
        """Share of accepted among tried. What has not been tried is taken to be as likely as the prior has it, beyond
        that as one level up, and at the first level to get a share of what its elder siblings leave. Siblings never sum
        to more than 1."""
        rate_DC = np.zeros(self.tried_DC.shape)
        for depth, rank in np.ndindex(rate_DC.shape):
            left = 1 - float(rate_DC[depth, :rank].sum())
            if depth < self._prior_DC.shape[0] and rank < self._prior_DC.shape[1]:
                prior = float(self._prior_DC[depth, rank])
            else:
                prior = float(rate_DC[depth - 1, rank]) if depth else left * (NEXT if rank else FIRST)
            tried, kept = self.tried_DC[depth, rank] + PRIOR_TRIES, self.kept_DC[depth, rank] + PRIOR_TRIES * prior
            rate_DC[depth, rank] = min(float(kept / tried), left)
        return rate_DC


def expected_tokens(plan: StaticTree, rate_DC: np.ndarray) -> float:
    """Tokens per call, the bonus token included: 1 + the sum over nodes of the rates along their paths.

    Example: rates [[0.8, 0.1], [0.5, 0.2]] and paths (0,), (1,), (0, 1): 1 + 0.8 + 0.1 + 0.8 * 0.2 = 2.06.
    """
    return 1.0 + sum(math.prod(rate_DC[depth, rank] for depth, rank in enumerate(path)) for path in plan.paths)
