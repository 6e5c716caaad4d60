"""What `bond lab` runs: every method on every problem, or one method looked at closely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bond_plugin.algorithms.base import AdvantageInputs, RewardTransform
from bond_plugin.algorithms.bond import BOND
from bond_plugin.bestofn.targets import BestOfN, Target
from bond_plugin.lab.estimators import (
    GradientError,
    draw_gradients,
    exact_gradient,
    gradient_error,
    halfway,
    jbond_objective,
    jeffreys_objective,
)
from bond_plugin.lab.learner import Run, Training, train
from bond_plugin.lab.methods import CACHE, HarmonicBOND, HarmonicVBoN, Method, VBoNByN, build
from bond_plugin.lab.problem import EnumerablePolicy, Goal, Point, Problem


@dataclass(frozen=True)
class Row:
    """A line of a :class:`Table`: a distribution, how it was reached, and the way there."""

    name: str
    point: Point
    note: str = ""
    trajectory: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """Rows of one problem and one class of policies, measured against Best-of-``n``, or another target (``None``)."""

    title: str
    policy: str
    rewards: str
    n: int | None
    rows: list[Row]


@dataclass(frozen=True)
class Round:
    """The end of a period of iterative BOND: the policy beside Best-of-n^m of the reference, ``exact``."""

    n: int  # n^m
    policy: Point
    exact: Point
    worth: float  # where the policy stands beside the whole curve, and how far off it: see Problem.worth
    gap: float


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator beside an exact gradient."""

    name: str
    against: str
    error: GradientError


@dataclass(frozen=True)
class Cached:
    """What M cached rewards of the reference are good for: see :func:`sensitivity`."""

    bound: str  # of vBoN
    samples: int  # M
    kl_to_bon: float  # mean KL(pi* || pi_BoN) over the caches, in nats
    low: float  # the middle 90 % of the caches
    high: float


@dataclass(frozen=True)
class Report:
    """Everything that ``bond lab`` finds."""

    seed: int
    tables: dict[str, Table]
    rounds: list[Round]
    estimators: list[Estimator]
    curve: list[tuple[float, Point]]
    cached: list[Cached] = field(default_factory=list)


Say = Callable[[str], None]
N = 4
_PERIOD, _ROUNDS = 60, 4
#: The M of :func:`sensitivity`, and how many caches are drawn for each.
_SIZES, _CACHES = (4, 8, 16, 32, 64, 128, 300, 1000, 3000), 400


def programme(seed: int, say: Say) -> Report:
    """Train everything, measure everything: what ``bond lab`` runs without ``--algorithm``. About a minute."""
    strict, tied = Problem.make("strict"), Problem.make("tied")

    def bond(**settings: object) -> Method:
        return build("bond", **{"n": N, "beta": 1.0, **settings})

    def paper(**settings: object) -> Method:
        return build("jbond", eta=0.01, n_anchor_samples=2, **settings)

    def vbon(bound: str) -> Method:
        return build("vbon", n=N, bound=bound)

    full = {
        "bond beta 1, k 16": bond(),
        "bond beta 1, k 64": bond(n_anchor_samples=64),
        "bond beta 0.5, k 16": bond(beta=0.5),
        "bond beta 0": bond(beta=0.0),
        "bond beta 1, without (B)": bond(correction=False),
        "bond beta 1, learned quantile": bond(correction=False, quantile="learned"),
        "bon_sft": build("bon_sft", n=N),
        "vbon exact": vbon("exact"),
        "vbon exact, by 1/N": VBoNByN(vbon("exact").config),
        "vbon tied": vbon("tied"),
        "vbon l1": vbon("l1"),
        "vbon l1, harmonic": HarmonicVBoN(vbon("l1").config),
        "bond beta 1, cached": bond(reward_cache=CACHE),
        "bond beta 1, cached, harmonic": HarmonicBOND(bond(reward_cache=CACHE).config),
        "bond n 2, periodic": bond(n=2, beta=0.5, n_anchor_samples=64, anchor="periodic", anchor_interval=_PERIOD),
        "bond n 2, ema 0.01": bond(n=2, beta=0.5, anchor="ema", eta=0.01),
        "bond beta 1, pooled": bond(n_anchor_samples=0),
        "bond beta 0.5, pooled": bond(beta=0.5, n_anchor_samples=0),
        "jbond paper, eta 0.01": paper(),
        "jbond pooled, eta 0.01": build("jbond", eta=0.01),
        "jbond pooled, n 4, eta 0.01": build("jbond", n=4, eta=0.01),
    }
    restricted = {
        "bond beta 0, k 64": bond(beta=0.0, n_anchor_samples=64),
        "bond beta 0.5, k 64": bond(beta=0.5, n_anchor_samples=64),
        "bond beta 1, k 64": full["bond beta 1, k 64"],
        "bon_sft": full["bon_sft"],
        "vbon exact": full["vbon exact"],
    }
    again = ("vbon tied", "vbon exact", "vbon l1", "vbon l1, harmonic")
    again += ("bond beta 1, cached", "bond beta 1, cached, harmonic")
    binary = {
        "bond beta 1": bond(),
        "bond beta 1, without (B)": bond(correction=False),
        "bond beta 0.5": bond(beta=0.5),
        "bond beta 0.5, without (B)": bond(beta=0.5, correction=False),
        **{name: full[name] for name in again},
        "jbond paper, ties expected": paper(),
        "jbond paper, ties textbook": paper(ties="textbook"),
        "jbond pooled": build("jbond", eta=0.01),
    }
    plan = (
        ("full", "A policy that can be any distribution", "full", "strict", full),
        ("restricted", "A policy with two parameters: Best-of-N is out of reach", "restricted", "strict", restricted),
        ("tied", "Rewards 0 and 1: most samples tie", "full", "tied", binary),
    )
    tables, rounds, draw = {}, [], seed * 1000
    for key, title, kind, rewards, methods in plan:
        problem = {"strict": strict, "tied": tied}[rewards]
        rows = _levels(problem, N)
        for name, method in methods.items():
            draw += 1
            needs = method.needs()
            steps = 200 if needs.anchor_eta else _PERIOD * _ROUNDS if needs.anchor_interval else 160
            training = training_of(method, draw, steps)
            if kind == "restricted" and isinstance(method, BOND):
                training = replace(training, prompts=128)
            run = train(problem, method, problem.policy(kind), N, training)
            # The target of a moving anchor goes on past Best-of-N.
            point = run.closest if needs.anchor else run.end
            note = f"closest, step {point.step} of {steps}" if needs.anchor else ""
            rows.append(Row(name, point, note, run.trajectory))
            say(f"{kind}, {rewards}: {name}: KL to Best-of-{N} {point.kl_to_bon:.4f}")
            rounds += _rounds(problem, 2, run)
        tables[key] = Table(title, kind, rewards, N, rows)
    estimators = _estimators(strict, full, draw, say)
    curve = strict.curve(2.0**_ROUNDS * 1.25)
    return Report(seed, tables, rounds, estimators, curve, sensitivity(strict, seed))


def sensitivity(problem: Problem, seed: int) -> list[Cached]:
    """How far from Best-of-N vBoN ends up with a cache of M rewards, for each of its bounds and each M.

    Needs no training: with coefficient c the optimum for a cache is pi* = pi_ref exp(r / c), normalised, where r
    is what the reward transform itself makes of that cache. The mean is over many caches, drawn by ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)
    target = problem.best_of(N)
    found = []
    for bound in ("exact", "tied", "l1"):
        method = build("vbon", n=N, bound=bound)
        rewards, log_ref = problem.rewards.expand(_CACHES, -1), problem.log_ref.expand(_CACHES, -1)
        for size in _SIZES:
            drawn = torch.multinomial(log_ref.exp(), size, replacement=True, generator=generator)
            under = dict.fromkeys(("policy", "reference"), log_ref.unsqueeze(-1))
            batch = AdvantageInputs(rewards, rewards[:, :0], under, generator, problem.rewards[drawn])
            out = method.transform(batch)
            optimum = (problem.log_ref + out.rewards / method.kl_coefficient).log_softmax(dim=-1)
            kl = (optimum.exp() * (optimum - target)).sum(dim=-1)
            low, high = torch.quantile(kl, torch.tensor([0.05, 0.95], dtype=kl.dtype)).tolist()
            found.append(Cached(bound, size, kl.mean().item(), low, high))
    return found


def training_of(method: Method, seed: int, steps: int = 160) -> Training:
    """The batch that suits a method: cached rewards stay from step to step, so fewer prompts have more samples."""
    needs = method.needs()
    size = {"prompts": 64, "samples": 32} if needs.reward_cache else {"samples": max(8, needs.least)}
    return Training(steps=steps, seed=seed, **size)


def examine(name: str, method: Method, n: Goal, training: Training, policy: str, rewards: str) -> Report:
    """Train one method, and look at its gradient: what ``bond lab --algorithm NAME`` runs.

    Its gradient, with the reference for an anchor and half-way from it to Best-of-N, is laid beside those of
    both directions and of Jeffreys' divergence, times the KL coefficient for a reward transform. N, or another
    target (the "aim"), is the method's own; without one it is 2 for a moving anchor, as in J-BOND, else n. An
    estimator that is right up to a factor has the cosine 1 with one of them.

    Args:
        name: for the table.
        n: of the Best-of-n that it is measured against, or another target.
        policy, rewards: see :meth:`Problem.policy` and :meth:`Problem.make`.

    Raises:
        ContractError, FloatingPointError, RegistryError: as :func:`train`.
    """
    problem = Problem.make(rewards)
    run = train(problem, method, problem.policy(policy), n, training)
    rows = [*_levels(problem, n), Row(name, run.end, "at the end", run.trajectory)]
    moving = method.needs().anchor
    if moving:
        rows.append(Row(f"{name}, closest", run.closest, f"step {run.closest.step} of {training.steps}"))
    own = other_target(method) or getattr(method.config, "n", None) or (2 if moving else n)
    scale = (method.kl_coefficient or 1.0) if isinstance(method, RewardTransform) else 1.0
    beta = getattr(method.config, "beta", 0.5)
    aim = "aim" if isinstance(own, Target) else "BoN"
    weights = ((f"KL({aim} || pi)", 0.0), (f"KL(pi || {aim})", 1.0), (f"Jeffreys {beta:g}", beta))
    targets = [(against, jeffreys_objective(problem, own, weight, scale)) for against, weight in weights]
    label = f"{name}, {own}" if isinstance(own, Target) else f"{name}, N {own}"
    policy_there, seed = halfway(problem, own), training.seed + 1
    estimators = _compared(label, problem, method, policy_there, targets, training.cached, seed)
    number = None if isinstance(n, Target) else n
    table = Table(f"{name}, against {_called(n)}", policy, rewards, number, rows)
    largest = max(2.0 * (number or 2), problem.worth(run.end)[0] * 1.25)
    rounds = [] if isinstance(own, Target) else _rounds(problem, own, run)
    return Report(training.seed, {"one": table}, rounds, estimators, problem.curve(largest))


def other_target(method: Method) -> Target | None:
    """The method's own target, if that is another than Best-of-N."""
    goal = getattr(method.config, "goal", None)
    return goal if isinstance(goal, Target) and not isinstance(goal, BestOfN) else None


def _called(n: Goal) -> str:
    return str(n) if isinstance(n, Target) else f"Best-of-{n}"


def _compared(
    name: str,
    problem: Problem,
    method: Method,
    policy: EnumerablePolicy,
    targets: list[tuple[str, Callable[[Tensor], Tensor]]],
    cached: int,
    seed: int,
) -> list[Estimator]:
    """A method's gradient beside those of ``targets``, names and objectives; from half as many samples as a step."""
    training = training_of(method, seed)
    training = replace(training, samples=max(training.samples // 2, method.needs().least), cached=cached)
    gradients = draw_gradients(problem, method, policy, training)
    return [
        Estimator(name, against, gradient_error(gradients, exact_gradient(policy, objective)))
        for against, objective in targets
    ]


def _levels(problem: Problem, n: Goal) -> list[Row]:
    return [
        Row("reference", problem.measure(problem.log_ref, n)),
        Row(f"{_called(n)}, exact", problem.measure(problem.best_of(n), n)),
    ]


def _rounds(problem: Problem, base: int, run: Run) -> list[Round]:
    ends = [(base**m, point) for m, point in enumerate(run.rounds, start=1)]
    return [Round(n, point, problem.measure(problem.best_of(n), n), *problem.worth(point)) for n, point in ends]


def _estimators(problem: Problem, methods: dict[str, Method], seed: int, say: Say) -> list[Estimator]:
    """Of some of the table's methods and of others."""
    policy = halfway(problem, N)
    forward = ("KL(BoN || pi)", jeffreys_objective(problem, N, 0.0))
    backward = ("KL(pi || BoN)", jeffreys_objective(problem, N, 1.0))
    both = ("Jeffreys 0.5", jeffreys_objective(problem, N, 0.5))
    scaled = ("KL(pi || BoN)/(N-1)", jeffreys_objective(problem, N, 1.0, 1 / (N - 1)))
    pairs = ("Jeffreys 0.5 to Bo2", jeffreys_objective(problem, 2, 0.5))
    crude = ("the same, with Eq. 17", jbond_objective(problem, 0.5))
    many = build("bond", n=N, beta=1.0, n_anchor_samples=128)
    paper, pooled = build("jbond", n_anchor_samples=2), build("jbond")
    rows = [
        ("bond beta 0", methods["bond beta 0"], forward, 0),
        ("bon_sft", methods["bon_sft"], forward, 0),
        ("bond beta 1, k 16", methods["bond beta 1, k 16"], backward, 0),
        ("bond beta 1, k 128", many, backward, 0),
        ("bond beta 1, k 16, without (B)", methods["bond beta 1, without (B)"], backward, 0),
        ("bond beta 1, perfect classifier", methods["bond beta 1, learned quantile"], backward, 0),
        ("bond beta 0.5, k 16", methods["bond beta 0.5, k 16"], both, 0),
        ("vbon exact, M 16", methods["vbon exact"], scaled, 16),
        ("vbon exact, M 300", methods["vbon exact"], scaled, 300),
        ("vbon exact, M 300, by 1/N", methods["vbon exact, by 1/N"], scaled, 300),
        ("vbon tied, M 300", methods["vbon tied"], scaled, 300),
        ("vbon l1, M 300", methods["vbon l1"], scaled, 300),
        ("bond beta 0.5, pooled", methods["bond beta 0.5, pooled"], both, 0),
        ("jbond paper", paper, pairs, 0),
        ("jbond paper", paper, crude, 0),
        ("jbond pooled", pooled, pairs, 0),
        ("jbond pooled, normalised", build("jbond", normalised=True), pairs, 0),
    ]
    found = []
    for i, (name, method, target, cached) in enumerate(rows, start=1):
        found += _compared(name, problem, method, policy, [target], cached, seed + i)
        error = found[-1].error
        say(f"estimators: {name}: bias {error.bias:.1%} of the gradient, seen from {error.resolution:.1%}")
    return found
