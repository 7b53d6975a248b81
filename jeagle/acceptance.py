"""How often the target takes what is drafted: the head's guesses by depth in the tree and rank among siblings, and what
a text repeats of itself by depth.

Trees of all shapes share these statistics: a child of rank r at depth d is taken to be accepted with probability
rate[d, r] once its parent is, whoever the parent is. Texts differ in how well they are guessed, and a batch ends with
its slowest row: what that leaves of a tree's tokens is its **evenness**. Plain numpy on the host; knows no device and
no seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from jeagle.tree import StaticTree

__all__ = ["Acceptance", "Rates", "expected_tokens"]

# Where nothing else is known: how often the first child is accepted, and the share of the rest that each next one gets.
FIRST, NEXT = 0.6, 0.3
LOOKUP_SHARE, LOOKUP_RATE = 0.1, 0.6  # the same of lookups: the rounds that make one, and whether a token is accepted
PRIOR_TRIES = 10  # how many tries the prior counts for
# Where nothing else is known of ``Rates.spread``. SmolLM2's answers have 0.30, sampled ones 0.23, under a wide tree
# (the head's trees.json).
SPREAD = 0.25
NEWEST = 0.3  # weight of the batch that has just ended in what is known of it
FORGET = 0.05  # of that, with every batch that did not draft: text changes


@dataclass(frozen=True)
class Rates:
    rate_DC: np.ndarray  # how often the child of rank c at depth d + 1 is accepted once its parent is
    lookup_share: float = LOOKUP_SHARE  # of the rounds, those that look their drafts up where the plan has lookups
    lookup_rate_D: np.ndarray = field(default_factory=lambda: np.zeros(0))  # by depth; beyond, as the deepest
    spread: float = SPREAD  # between texts: the standard deviation of drafts kept per round over their mean

    def tokens(self, plan: StaticTree) -> float:
        """Expected tokens per call, the bonus token included. The share of lookups is taken to be the same under all
        plans that have them; the head's rates are those of the rounds that the head drafted."""
        drafted = expected_tokens(plan, self.rate_DC)
        if not plan.lookup:
            return drafted
        looked = 1 + float(np.cumprod(self.lookup_rates(plan.lookup)).sum())
        return (1 - self.lookup_share) * drafted + self.lookup_share * looked

    def evenness(self, plan: StaticTree, batch: int) -> float:
        """The share of the tokens that a batch's slowest row leaves, where all are to have as many: rounds of a mean
        row over those of the slowest, which keeps as little as the last of so many draws from a normal distribution."""
        return 1 - (1 - 1 / self.tokens(plan)) * min(1.0, self.spread * _largest_of(batch))

    def lookup_rates(self, depth: int) -> np.ndarray:
        """Of the first ``depth`` looked-up tokens."""
        known_D = self.lookup_rate_D if len(self.lookup_rate_D) else np.array([LOOKUP_RATE])
        return np.pad(known_D, (0, depth), mode="edge")[:depth]


class Acceptance:
    """Counts by depth (1, 2, .. in row 0, 1, ..) and rank, with a prior, older ones worth less.

    Args:
      plans: trees whose nodes will be counted.
      half_life: tries of a (depth, rank) after which an earlier one counts half. Only new tries age old ones: what is
        not tried stays what it was.
      prior: rates found elsewhere.
    """

    def __init__(self, plans: Iterable[StaticTree], *, half_life: float = math.inf, prior: Rates | None = None):
        plans = list(plans)
        paths = [path for plan in plans for path in plan.paths]
        depth = max(map(len, paths), default=0)
        branch = 1 + max((max(path) for path in paths), default=0)
        self.tried_DC = np.zeros((depth, branch))
        self.kept_DC = np.zeros((depth, branch))
        # Row 0 of lookups is whether a round makes one, the next ones are its depths.
        self.looked_tried_D = np.zeros(1 + max((plan.lookup for plan in plans), default=0))
        self.looked_kept_D = np.zeros_like(self.looked_tried_D)
        self._half_life = half_life
        self._prior = Rates(np.zeros((0, 0))) if prior is None else prior
        self._spread = self._prior.spread

    def add(
        self, plan: StaticTree, tried_N: np.ndarray, kept_N: np.ndarray, looked_P: np.ndarray | None = None
    ) -> None:
        """What rounds of ``plan`` counted per node of the head's, the root first, and of lookups by how many tokens
        were kept, as ``DecodeState`` does."""
        tried_DC, kept_DC = np.zeros_like(self.tried_DC), np.zeros_like(self.kept_DC)
        for path, tried, kept in zip(plan.paths, tried_N[1:], kept_N[1:], strict=True):
            tried_DC[len(path) - 1, path[-1]] += tried
            kept_DC[len(path) - 1, path[-1]] += kept
        self._count(self.tried_DC, self.kept_DC, tried_DC, kept_DC)
        if plan.lookup and looked_P is not None:
            kept_D = np.cumsum(looked_P[::-1])[::-1][: plan.lookup + 1]  # rounds that kept 0 or more, 1 or more, ..
            tried_D, more = np.array([kept_N[0], *kept_D[:-1]]), len(self.looked_kept_D) - len(kept_D)
            new = (np.pad(x, (0, more)) for x in (tried_D, kept_D))
            self._count(self.looked_tried_D, self.looked_kept_D, *new)

    def ended(self, num_output_B: np.ndarray, num_rounds_B: np.ndarray, drafted: float) -> None:
        """A batch is done whose rows, those of no rounds left out, had so many tokens and rounds. Its evenness is the
        mean number of rounds over the largest, against the same of tokens, which plain decoding would have had.

        Example: two rows of 64 tokens that took 32 and 64 rounds have 0.75: their 1.33 tokens per call gained the batch
        nothing.

        drafted: the share of the rounds that drafted; the others teach nothing.
        """
        served = num_rounds_B > 0
        tokens, rounds = num_output_B[served], num_rounds_B[served]
        if not drafted:
            self._spread += FORGET * (self._prior.spread - self._spread)
        elif len(rounds) > 1 and tokens.sum() > rounds.sum():
            evenness = (rounds.mean() / rounds.max()) / (tokens.mean() / tokens.max())
            gained = 1 - rounds.sum() / tokens.sum()
            found = max(0.0, float(1 - evenness) / float(gained * _largest_of(len(rounds))))
            self._spread += NEWEST * drafted * (found - self._spread)

    def _count(self, tried: np.ndarray, kept: np.ndarray, new_tried: np.ndarray, new_kept: np.ndarray) -> None:
        worth = 0.5 ** (new_tried / self._half_life)
        tried[...], kept[...] = tried * worth + new_tried, kept * worth + new_kept

    @property
    def rates(self) -> Rates:
        prior = self._prior
        prior_D = np.array([prior.lookup_share, *prior.lookup_rates(len(self.looked_tried_D) - 1)])
        rate_D = (self.looked_kept_D + PRIOR_TRIES * prior_D) / (self.looked_tried_D + PRIOR_TRIES)
        return Rates(self.rate_DC, float(rate_D[0]), rate_D[1:], self._spread)

    @property
    def rate_DC(self) -> np.ndarray:
        """Share of accepted among tried. What has not been tried is taken to be as likely as the prior has it, beyond
        that as one level up, and at the first level to get a share of what its elder siblings leave. Siblings never sum
        to more than 1."""
        rate_DC = np.zeros(self.tried_DC.shape)
        for depth, rank in np.ndindex(rate_DC.shape):
            left = 1 - float(rate_DC[depth, :rank].sum())
            prior_DC = self._prior.rate_DC
            if depth < prior_DC.shape[0] and rank < prior_DC.shape[1]:
                prior = float(prior_DC[depth, rank])
            else:
                prior = float(rate_DC[depth - 1, rank]) if depth else left * (NEXT if rank else FIRST)
            tried, kept = self.tried_DC[depth, rank] + PRIOR_TRIES, self.kept_DC[depth, rank] + PRIOR_TRIES * prior
            rate_DC[depth, rank] = min(float(kept / tried), left)
        return rate_DC


def _largest_of(count: int) -> float:
    """Of so many draws from a normal distribution, the expected largest, in standard deviations (Blom, 1958)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def expected_tokens(plan: StaticTree, rate_DC: np.ndarray) -> float:
    """Tokens per call of a round that the head drafted, the bonus token included: 1 + the sum over nodes of the rates
    along their paths.

    Example: rates [[0.8, 0.1], [0.5, 0.2]] and paths (0,), (1,), (0, 1): 1 + 0.8 + 0.1 + 0.8 * 0.2 = 2.06.
    """
    return 1.0 + sum(math.prod(rate_DC[depth, rank] for depth, rank in enumerate(path)) for path in plan.paths)
