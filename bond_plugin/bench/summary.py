"""The numbers of the report: what each trained policy reaches, how the methods compare, and how sure that is.

A *point* is a method at one strength with its seeds pooled; a *method* is its points, ordered by KL. Everything
is computed twice, for the mean reward and for the win rate against the reference (:data:`MEASURES`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bond_plugin.bench.matrix import short
from bond_plugin.bench.resampling import NOT_DEFINED, RESAMPLES, Estimate, Resampling, envelope, limit_by_prompt
from bond_plugin.bench.results import PER_PROMPT, Example, Measured, Result, Results
from bond_plugin.bestofn import limits

#: What is traded against the KL.
MEASURES = ("reward", "win_rate")
#: The N of the Best-of-N rows, as far as there are samples for them; the curve has every N up to the last.
BEST_OF = (1, 2, 4, 8, 16, 32, 64)

_GRID = 33  # KLs at which two fronts are compared, and areas added up


@dataclass(frozen=True)
class Policy:
    """A method at one strength, its seeds pooled.

    Attributes:
        estimates: of the names in :data:`~bond_plugin.bench.results.PER_PROMPT`, ``distinct_1``, ``distinct_2``,
            ``backward_kl_N``, ``forward_kl_N``, ``pass_at_N``, and for each of :data:`MEASURES` the ``..._gain``
            over the reference and, at the point's own KL: ``..._share`` of the limit, ``..._bon_share`` of the
            limit that Best-of-N has there, and ``..._above_bon``, the vertical distance to the Best-of-N curve.
        on_front: of each measure, the share of resamples in which no other point has both a KL as low and a
            value as high.
        matches: the largest N up to the last of :data:`BEST_OF` for which Best-of-N has no more mean reward than
            the point; 0 if one sample of the reference has more. Its interval ends at the largest N whose reward
            is not significantly above the point's.
        draws: ``[B + 1]`` of reward, win rate and KL.
    """

    method: str
    label: str
    strength: str
    cells: list[Result]
    examples: list[Example]
    estimates: dict[str, Estimate]
    on_front: dict[str, float] = field(default_factory=dict)
    matches: Estimate = NOT_DEFINED
    draws: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.label} {self.strength}".strip()

    @property
    def kl(self) -> float:
        return self.estimates["kl"].value

    def training(self, key: str) -> float:
        """Mean over seeds of a number of :class:`~bond_plugin.bench.results.Costs`."""
        return sum(float(getattr(cell.training, key)) for cell in self.cells) / len(self.cells)


@dataclass(frozen=True)
class Method:
    """The points of one method, by KL.

    Attributes:
        area: of each measure, the part of all possible gains for KL from 0 to ``Summary.area_up_to`` that its
            front has.
        front_share: of each measure, the share of the points on the Pareto front of all methods that are this
            method's, averaged over resamples (as in arXiv 2407.06057).
    """

    label: str
    points: list[Policy]
    area: dict[str, Estimate]
    front_share: dict[str, float]

    @property
    def best(self) -> Policy:
        """The point with the highest mean reward."""
        return max(self.points, key=lambda point: point.estimates["reward"].value)


@dataclass(frozen=True)
class Comparison:
    """How far the front of ``first`` lies above that of ``second`` (labels), on average over the KLs that both have
    points around, from ``low`` to ``high`` nats. All NaN where there are none."""

    first: str
    second: str
    gap: Estimate
    low: float
    high: float


BEST_OF_N = "Best-of-N"


class Summary:
    """Everything that the report says. The same results give the same numbers.

    Attributes:
        reference: the reference policy as a point without cells.
        points, methods: of the runs that are done.
        best_of: N to estimates of ``kl``, of each measure with its ``..._gain`` and ``..._share`` of the limit, and
            of ``win_rate_tilted_share``: what of the limit of the win rate the policy has that is on the limit of the
            reward at the same KL, the reference tilted by its reward.
        curve: Best-of-N for each N from 1 to the last of ``best_of``.
        limits: of each measure, the highest value at a KL, corrected for its estimated bias.
        tilted: KL and win rate, ``[points]`` each, of the reference tilted by its reward.
        area_up_to: of each measure, in nats: the largest KL of any point, or where the limit ends to be supported.
        comparisons: of each measure, all pairs of methods, and each method with ``BEST_OF_N``.
        common_kl: in nats, the smallest over methods of their largest KL.
    """

    def __init__(self, results: Results, resamples: int = RESAMPLES) -> None:
        rewards = results.reference.rewards
        self.results, self.resamples = results, resamples
        self._resampling = Resampling(len(rewards), resamples)
        self._uncorrected = {"reward": limits.reward_front(rewards), "win_rate": limits.win_rate_front(rewards)}
        self.limits = {measure: limit.corrected() for measure, limit in self._uncorrected.items()}
        last = min(BEST_OF[-1], rewards.shape[1] - 1)
        self.curve = limits.best_of_n_curve(rewards, range(1, last + 1))
        average = self._resampling.mean
        self._bon = {key: average(getattr(self.curve, key)) for key in ("kl", *MEASURES)}  # [B + 1, N]
        self._front = {  # [B + 1, points of the front] each
            key: tuple(average(part) for part in limit_by_prompt(rewards, key == "win_rate")) for key in MEASURES
        }
        self.tilted = self._front["reward"][0][0], self._front["reward"][2][0]
        self.best_of = {n: self._best_of(n) for n in BEST_OF if n <= last}

        groups: dict[tuple[str, str], list[Result]] = {}
        for cell in results.done:
            groups.setdefault((cell.method, repr(sorted(cell.strength.items()))), []).append(cell)
        self.points = [self._point(cells) for cells in groups.values()]
        reference = self._measured([results.reference.evaluation])
        estimates = {key: Estimate.of(values) for key, values in reference.items()}
        self.reference = Policy("", "reference", "", [], results.reference.examples, estimates)

        shares = {measure: self._pareto(measure) for measure in MEASURES}
        largest = max((point.kl for point in self.points), default=0.0)
        self.area_up_to = {
            measure: min(largest, limit.kl[limit.supported].max().item()) for measure, limit in self.limits.items()
        }
        self.methods = []
        for key in dict.fromkeys(point.method for point in self.points):
            own = sorted((point for point in self.points if point.method == key), key=lambda point: point.kl)
            area = {measure: Estimate.of(self._area(own, measure)) for measure in MEASURES}
            self.methods.append(Method(own[0].label, own, area, {m: shares[m][key] for m in MEASURES}))
        pairs = [*itertools.combinations(self.methods, 2), *((method, None) for method in self.methods)]
        self.comparisons = {measure: [self._compare(*pair, measure) for pair in pairs] for measure in MEASURES}
        self.common_kl = min((method.points[-1].kl for method in self.methods), default=0.0)

    # Points.

    def _point(self, cells: list[Result]) -> Policy:
        draws = self._measured([cell.evaluation for cell in cells])
        for measure in MEASURES:
            draws |= self._against_the_limit(measure, draws["kl"], draws[measure])
        # Rewards of Best-of-N rise with N, up to errors of estimation.
        matches = (self._bon["reward"].cummax(dim=-1).values <= draws["reward"].unsqueeze(-1)).sum(dim=-1)
        first = cells[0]
        return Policy(
            method=first.method,
            label=first.label,
            strength=", ".join(f"{key}={short(value)}" for key, value in first.strength.items()),
            cells=cells,
            examples=first.examples,
            estimates={key: Estimate.of(values) for key, values in draws.items()},
            matches=Estimate.of(matches.double()),
            draws={key: draws[key] for key in ("kl", *MEASURES)},
        )

    def _measured(self, evaluations: list[Measured]) -> dict[str, Tensor]:
        """Draws of what the evaluations of a policy's seeds hold, over seeds and prompts."""
        seeds = self._resampling.weights(len(evaluations))

        def pooled(values: list[Tensor]) -> Tensor:
            return self._resampling.mean(torch.stack(values), seeds)

        draws = {key: pooled([getattr(one, key) for one in evaluations]) for key in PER_PROMPT}
        for name in ("backward_kl", "forward_kl", "pass_at"):
            tables = [getattr(one, name) for one in evaluations]
            for n in sorted(set.intersection(*map(set, tables))):
                draws[f"{name}_{n}"] = pooled([table[n] for table in tables])
        for key in ("distinct_1", "distinct_2"):
            draws[key] = seeds @ torch.tensor([getattr(one, key) for one in evaluations], dtype=torch.float64)
        return draws

    # Against Best-of-N and the limit.

    def _limit_at(self, measure: str, kl: Tensor) -> Tensor:
        """The limit at ``[B + 1, G]`` KLs, its bias taken off; NaN where :meth:`Front.at` does not know it either."""
        found_kl, value, _ = self._front[measure]
        limit = self._uncorrected[measure]
        bias = limits.over_root(kl, *(part.expand(len(kl), -1) for part in (limit.kl, limit.bias)))
        found = limits.over_root(kl, found_kl, value) - bias
        known = (kl <= found_kl[:, -1:]) | limit.supported[-1]
        return torch.where(known, found, math.nan)

    def _against_the_limit(self, measure: str, kl: Tensor, value: Tensor) -> dict[str, Tensor]:
        """Draws ``[B + 1]`` of the shares of the limit and the distance to the Best-of-N curve."""
        base = self._bon[measure][:, 0]
        bon = _on_curve(kl.unsqueeze(-1), self._bon["kl"], self._bon[measure]).squeeze(-1)
        room = self._limit_at(measure, kl.unsqueeze(-1)).squeeze(-1) - base
        room = torch.where(room > 1e-12, room, math.nan)  # nothing to gain at a KL of 0
        return {
            f"{measure}_gain": value - base,
            f"{measure}_share": (value - base) / room,
            f"{measure}_bon_share": (bon - base) / room,
            f"{measure}_above_bon": value - bon,
        }

    def _best_of(self, n: int) -> dict[str, Estimate]:
        """Best-of-N itself, as estimates."""
        column = {key: self._bon[key][:, n - 1] for key in ("kl", *MEASURES)}
        for measure in MEASURES:
            column |= self._against_the_limit(measure, column["kl"], column[measure])
        kl, _, win_rate = self._front["reward"]
        tilted = _on_curve(column["kl"].unsqueeze(-1), kl, win_rate).squeeze(-1)
        shares = self._against_the_limit("win_rate", column["kl"], tilted)
        column["win_rate_tilted_share"] = shares["win_rate_share"]
        own = [key for key in column if not key.endswith(("_bon_share", "_above_bon"))]  # compared with itself
        return {key: Estimate.of(column[key]) for key in own}

    # Fronts.

    def _pareto(self, measure: str) -> dict[str, float]:
        """Method to its mean share of the Pareto front; fills in ``on_front`` of the points."""
        if not self.points:
            return {}
        kl, value = (torch.stack([p.draws[key][1:] for p in self.points], dim=-1) for key in ("kl", measure))
        on = torch.stack([limits.pareto_front(*row) for row in zip(kl, value, strict=True)]).double()  # [B, points]
        of_all = (on / on.sum(dim=-1, keepdim=True)).mean(dim=0)
        shares: dict[str, float] = {}
        for point, often, share in zip(self.points, on.mean(dim=0).tolist(), of_all.tolist(), strict=True):
            point.on_front[measure] = often
            shares[point.method] = shares.get(point.method, 0.0) + share
        return shares

    def _method_front(self, points: Sequence[Policy], measure: str, kl: Tensor) -> Tensor:
        """The front of a method at ``[B + 1, G]`` KLs: the envelope of its points and the reference."""
        base = self._bon[measure][:, :1]
        kls = torch.stack([point.draws["kl"].clamp(min=0) for point in points], dim=-1)
        values = torch.stack([point.draws[measure] for point in points], dim=-1)
        zero = torch.zeros_like(base)
        return envelope(kl, torch.cat([zero, kls], dim=-1), torch.cat([base, values], dim=-1))

    def _area(self, points: Sequence[Policy], measure: str) -> Tensor:
        """Draws of the area between base and front, as a share of that between base and limit."""
        base = self._bon[measure][:, :1]
        grid = (self.area_up_to[measure] * torch.linspace(0, 1, _GRID, dtype=torch.float64) ** 2).expand(
            len(base), -1
        )
        reached = torch.trapezoid(self._method_front(points, measure, grid) - base, grid)
        possible = torch.trapezoid(self._limit_at(measure, grid) - base, grid)
        return torch.where(possible > 1e-12, reached / possible, math.nan)

    def _compare(self, first: Method, second: Method | None, measure: str) -> Comparison:
        """``second=None`` stands for Best-of-N.

        In each resample on the KLs from the larger of both methods' smallest to the smaller of their largest there:
        below a method's own points its front is a chord from the reference, far below what other strengths would
        reach. Resamples without such a KL say nothing; where most are, nothing is said at all.
        """

        def ends(method: Method | None) -> tuple[Tensor, Tensor]:
            if method is None:
                return self._bon["kl"][:, 0], self._bon["kl"][:, -1]
            kls = torch.stack([point.draws["kl"].clamp(min=0) for point in method.points])
            return kls.amin(dim=0), kls.amax(dim=0)

        (start, end), (other_start, other_end) = ends(first), ends(second)
        low, high = torch.maximum(start, other_start), torch.minimum(end, other_end)
        shared = low <= high
        grid = torch.lerp(low.unsqueeze(-1), high.unsqueeze(-1), torch.linspace(0, 1, _GRID, dtype=torch.float64))
        above = self._method_front(first.points, measure, grid)
        if second is None:
            below = _on_curve(grid, self._bon["kl"], self._bon[measure])
        else:
            below = self._method_front(second.points, measure, grid)
        said = shared & (shared.double().mean() >= 0.5)
        gap, low, high = (torch.where(said, values, math.nan) for values in ((above - below).mean(dim=-1), low, high))
        label = BEST_OF_N if second is None else second.label
        return Comparison(first.label, label, Estimate.of(gap), low[0].item(), high[0].item())


def _on_curve(kl: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Values of a curve at ``[B + 1, G]`` KLs, linear in the root of the KL (as Best-of-n would be for n between two
    whole ones); NaN beyond its end."""
    return torch.where(kl <= known[:, -1:], limits.over_root(kl, known, values), math.nan)
