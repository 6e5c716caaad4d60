"""The laboratory: a policy and a reward small enough to enumerate, where pi_BoN and all divergences are exact.

A response has at most three tokens out of four, one of which ends it: 40 responses. So expectations are sums,
and what training reaches can be compared with what it aims at. Nothing is replaced: the objects that
training runs (:class:`~bond_plugin.algorithms.Algorithm` with its ``select``, ``advantages`` and registered
policy loss, or :class:`~bond_plugin.algorithms.RewardTransform`) are given batches sampled from the enumerable
policy, and their gradient moves it. Imports torch and nothing of the host.

    >>> problem = Problem.make()
    >>> run = train(problem, BOND(BONDConfig(n=4, beta=1.0)), problem.policy("full"), n=4)
    >>> run.end.kl_to_bon
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bond_plugin import registry
from bond_plugin.algorithms.base import (
    AdvantageInputs,
    AdvantageOutputs,
    Algorithm,
    LossInputs,
    LossOutputs,
    RewardTransform,
    TransformInputs,
    TransformOutputs,
)
from bond_plugin.algorithms.bond import BOND
from bond_plugin.algorithms.vbon import VBoN
from bond_plugin.bestofn.distribution import bon_log_probs, level_probabilities
from bond_plugin.bestofn.divergences import backward_kl, centre
from bond_plugin.bestofn.pooled import harmonic_log_quantile_among

VOCABULARY, LENGTH, EOS = 4, 3, 0
POLICIES = ("full", "restricted")
REWARDS = ("strict", "tied")
#: What ``--bond.reward_cache`` is here: rewards of the reference that the laboratory draws before training.
CACHE = "lab"

#: Which of the problems of this kind (see :meth:`Problem.make`): one in which each single direction of the divergence
#: raises the other above where it started, in the restricted class and for N = 4. That is not so in most of them.
_PROBLEM_SEED = 36

Method = Algorithm | RewardTransform


class LabError(ValueError):
    """A method breaks its contract. The message says which part of it."""


def _responses() -> list[tuple[int, ...]]:
    """All responses: those that end with EOS, shortest first, then those that are cut off at ``LENGTH``."""
    ended, going = [], [()]
    for _ in range(LENGTH):
        longer = [(*prefix, token) for prefix in going for token in range(VOCABULARY)]
        ended += [r for r in longer if r[-1] == EOS]
        going = [r for r in longer if r[-1] != EOS]
    return ended + going


RESPONSES = _responses()
#: ``[S, A]``: 1 on the tokens of each response.
MASK = torch.tensor([[float(i < len(r)) for i in range(LENGTH)] for r in RESPONSES], dtype=torch.float64)
_PREFIXES = sorted({r[:i] for r in RESPONSES for i in range(len(r) + 1)})
#: ``[prefixes, S]``: 1 where the response begins with the prefix.
_BEGINS = torch.tensor([[float(r[: len(p)] == p) for r in RESPONSES] for p in _PREFIXES], dtype=torch.float64)
#: ``[S, A + 1]``: the prefixes of each response, whole responses repeated.
_CHAIN = torch.tensor([[_PREFIXES.index(r[:i]) for i in range(LENGTH + 1)] for r in RESPONSES])


class EnumerablePolicy:
    """log pi(y) = log_softmax(log pi_ref(y) + features(y) . parameters): a few numbers, or one a response.

    Attributes:
        log_ref: ``[S]`` float64, the reference, where all parameters are 0.
        features: ``[S, d]``. The identity makes every distribution possible; fewer columns restrict it.
        parameters: ``[d]`` float64, with gradient.
    """

    def __init__(self, log_ref: Tensor, features: Tensor) -> None:
        self.log_ref = log_ref
        self.features = features
        self.parameters = torch.zeros(features.shape[-1], dtype=torch.float64, requires_grad=True)

    def log_probs(self, parameters: Tensor | None = None) -> Tensor:
        """``[S]``, log pi of whole responses, at ``parameters`` (``[d]``; the policy's own by default)."""
        at = self.parameters if parameters is None else parameters
        return (self.log_ref + self.features @ at).log_softmax(dim=-1)

    def token_log_probs(self, parameters: Tensor | None = None) -> Tensor:
        """``[S, A]``, log pi(token | tokens before it), 0 outside the mask; rows add up to :meth:`log_probs`."""
        mass = (_BEGINS @ self.log_probs(parameters).exp()).clamp(min=1e-300).log()
        chain = mass[_CHAIN]
        return chain[:, 1:] - chain[:, :-1]


@dataclass(frozen=True)
class Point:
    """A distribution, measured exactly. Divergences in nats.

    Attributes:
        step: optimiser steps taken.
        kl_to_bon: KL(pi || pi_BoN), backward.
        kl_from_bon: KL(pi_BoN || pi), forward.
        reward: E[r(y)].
        quantile: E[(p_< + p_<=) / 2], the quantile of the reward under the reference; 0.5 for the reference.
        kl_ref: KL(pi || pi_ref).
    """

    step: int
    kl_to_bon: float
    kl_from_bon: float
    reward: float
    quantile: float
    kl_ref: float

    @property
    def jeffreys(self) -> float:
        """Half the sum of both directions: Eq. 11 of arXiv 2407.14622 at beta = 0.5."""
        return (self.kl_to_bon + self.kl_from_bon) / 2


@dataclass(frozen=True)
class Problem:
    """A reference distribution over :data:`RESPONSES` and a reward.

    Attributes:
        log_ref: ``[S]`` float64, normalised.
        rewards: ``[S]`` float64.
        features: ``[S, 2]``, what the restricted policy can change: how many tokens 3 a response has, and
            whether it has a token 1.
    """

    log_ref: Tensor
    rewards: Tensor
    features: Tensor

    @classmethod
    def make(cls, rewards: str = "strict") -> Problem:
        """The laboratory's problem.

        Token 3 is skill: each one raises the reward by 1/2. Token 1 is risk: with it the reward has five times
        the spread, so that the best responses have it and the worst ones too. A policy that can only have more
        or less of each cannot copy Best-of-N. Imitating Best-of-N (forward KL) takes the risk, for the best
        responses; avoiding what Best-of-N avoids (backward KL) keeps away from it, for the worst ones.

        Args:
            rewards: ``strict``, all different; ``tied``, 1 for the best of those, about a quarter of the
                reference's mass, and 0 for the others.

        Raises:
            ValueError: another name.
        """
        if rewards not in REWARDS:
            raise ValueError(f"rewards must be one of {', '.join(REWARDS)}, got {rewards!r}")
        generator = torch.Generator().manual_seed(_PROBLEM_SEED)
        table = 0.5 * torch.randn(len(_PREFIXES), VOCABULARY, generator=generator, dtype=torch.float64)
        log_token = table.log_softmax(dim=-1)
        log_ref = torch.stack(
            [sum(log_token[_PREFIXES.index(r[:i]), r[i]] for i in range(len(r))) for r in RESPONSES]
        )
        features = torch.tensor([[r.count(3), float(1 in r)] for r in RESPONSES], dtype=torch.float64)
        noise = torch.randn(len(RESPONSES), generator=generator, dtype=torch.float64)
        values = features[:, 0] / 2 + noise * (1 + 4 * features[:, 1])
        if rewards == "tied":
            _, not_higher = level_probabilities(log_ref.exp(), values)
            values = (not_higher > 0.75).double()
        return cls(log_ref, values, features)

    def policy(self, kind: str = "full") -> EnumerablePolicy:
        """A policy that starts at the reference: ``full`` (any distribution) or ``restricted`` (two numbers).

        Raises:
            ValueError: another name.
        """
        if kind not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {kind!r}")
        identity = torch.eye(len(RESPONSES), dtype=torch.float64)
        return EnumerablePolicy(self.log_ref, identity if kind == "full" else self.features)

    def best_of(self, n: float) -> Tensor:
        """``[S]`` log pi_BoN, exactly, ties at random. A real n >= 1 fills the curve between whole ones.

        Raises:
            ValueError: n < 1.
        """
        if float(n).is_integer():
            return bon_log_probs(self.log_ref, self.rewards, int(n))
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        p_lt, p_le = level_probabilities(self.log_ref.exp(), self.rewards)
        return self.log_ref + ((p_le**n - p_lt**n) / (p_le - p_lt)).log()

    def measure(self, log_probs: Tensor, n: float, step: int = 0) -> Point:
        """Measure the distribution ``log_probs`` (``[S]``) against Best-of-n of the reference."""
        with torch.no_grad():
            target = self.best_of(n)
            mass = log_probs.exp()
            p_lt, p_le = level_probabilities(self.log_ref.exp(), self.rewards)
            return Point(
                step=step,
                kl_to_bon=(mass * (log_probs - target)).sum().item(),
                kl_from_bon=(target.exp() * (target - log_probs)).sum().item(),
                reward=(mass * self.rewards).sum().item(),
                quantile=(mass * (p_lt + p_le) / 2).sum().item(),
                kl_ref=(mass * (log_probs - self.log_ref)).sum().item(),
            )

    def curve(self, largest: float, points: int = 60) -> list[tuple[float, Point]]:
        """(N, Best-of-N) for real N from 1 to ``largest``, evenly spaced in log N."""
        ns = [largest ** (i / (points - 1)) for i in range(points)]
        return [(n, self.measure(self.best_of(n), n)) for n in ns]

    def worth(self, point: Point) -> tuple[float, float]:
        """Where a policy stands beside the curve of Best-of-N (reward against KL to the reference).

        Returns:
            (N, gap): the real N whose Best-of-N is as far from the reference as the policy (at most 10,000),
            and the policy's reward minus that Best-of-N's: 0 on the curve. It can be positive: Best-of-N knows
            the order of rewards alone, and is not the most reward at its KL.
        """
        low, high = 0.0, math.log(1e4)
        for _ in range(60):
            middle = (low + high) / 2
            if self.measure(self.best_of(math.exp(middle)), 1).kl_ref < point.kl_ref:
                low = middle
            else:
                high = middle
        n = math.exp((low + high) / 2)
        return n, point.reward - self.measure(self.best_of(n), 1).reward


def ppo_loss(inputs: LossInputs) -> LossOutputs:
    """What ``policy_loss = "ppo"`` stands for: the host's loss at the weights that drew the samples.

    There every ratio pi / pi_old is 1 and nothing is clipped. The host divides by the number of tokens of the
    whole batch, which is the same up to a factor.
    """
    ratio = torch.where(inputs.mask.bool(), inputs.log_probs - inputs.old_log_probs, 0.0).exp()
    row_loss = -(ratio * inputs.advantages * inputs.mask).sum(dim=-1)
    return LossOutputs(row_loss, torch.zeros((), dtype=row_loss.dtype))


@dataclass(frozen=True)
class Training:
    """How a policy is trained.

    Attributes:
        steps: optimiser steps (Adam).
        lr: learning rate. It falls to 0 along a cosine over the run, or from each renewal of a periodic anchor
            to the next; under a moving average, whose target never rests, it stays.
        prompts: P, copies of the one problem in a batch.
        samples: n, samples of the policy a prompt.
        cached: M, rewards of the reference a prompt that are drawn before training, where they are wanted.
        seed: of everything that is drawn.
    """

    steps: int = 160
    lr: float = 0.25
    prompts: int = 256
    samples: int = 8
    cached: int = 300
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """What :func:`train` returns.

    Attributes:
        trajectory: exact measurements, the first before any step and the last at the end.
        rounds: one at the end of each period of a periodic anchor.
        log_probs: ``[S]``, the trained policy.
        metrics: the method's own, of the last step.
    """

    trajectory: list[Point]
    rounds: list[Point]
    log_probs: Tensor
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def end(self) -> Point:
        return self.trajectory[-1]

    @property
    def closest(self) -> Point:
        """The point with the smallest KL(pi || pi_BoN): for methods whose target moves on past it."""
        return min(self.trajectory, key=lambda point: point.kl_to_bon)


class Learner:
    """A method at work on a policy: it draws batches, and holds what training holds beside the policy.

    That is the anchor (a moving average or a periodic copy of the parameters), the cached rewards of the
    reference, and the classifier of quantiles: one logit a response, which is the same for every prompt as
    all prompts are copies of one.
    """

    def __init__(self, problem: Problem, method: Method, policy: EnumerablePolicy, training: Training) -> None:
        if training.prompts * training.samples < 2 or training.samples < 1:
            raise LabError("a batch needs at least two samples of the policy")
        self.problem, self.method, self.policy, self.training = problem, method, policy, training
        self.generator = torch.Generator().manual_seed(training.seed)
        self.needs = method.needs() if isinstance(method, Algorithm) else None
        self.anchor = policy.parameters.detach().clone()
        self.classifier = torch.zeros(len(RESPONSES), dtype=torch.float64, requires_grad=True)
        self.metrics: dict[str, float] = {}
        self.loss_function: Callable[[LossInputs], LossOutputs] = ppo_loss
        if isinstance(method, Algorithm) and method.policy_loss != "ppo":
            self.loss_function = registry.load(registry.POLICY_LOSSES, method.policy_loss)
        self.cache: Tensor | None = None
        if self.needs is None or self.needs.reward_cache:
            self.draw_cache()

    def draw_cache(self) -> None:
        """Draw the cached rewards anew, ``[P, M]``."""
        cached = self._draw(self.problem.log_ref, self.training.cached)
        self.cache = self.problem.rewards[cached]

    def losses(self) -> tuple[Tensor, Tensor | None]:
        """The loss of one fresh batch, and that of the classifier, each ``[]`` with gradient.

        The loss is the host's: the mean over prompts of (the mean over the policy's samples + the mean over the
        selected companions).

        Raises:
            LabError: the method returns something of another shape than its interface says, or not finite.
        """
        with torch.no_grad():
            log_probs = self.policy.log_probs()
            drawn = self._draw(log_probs, self.training.samples)
        if isinstance(self.method, RewardTransform):
            companions = drawn[:, :0]
            outputs = self._transformed(self.method, drawn, log_probs)
        else:
            companions, outputs = self._advantages(self.method, drawn, log_probs)
        self.metrics = outputs.metrics

        advantages = _per_token("advantages", outputs.advantages, drawn.shape)
        if companions.shape[-1]:
            extra = _per_token("selected_advantages", outputs.selected_advantages, companions.shape)
            advantages = torch.cat([advantages, extra], dim=1)
        rows = torch.cat([drawn, companions], dim=-1)
        companion = torch.zeros(rows.shape, dtype=torch.bool)
        companion[:, drawn.shape[-1] :] = True
        flat = rows.flatten()
        tokens = self.policy.token_log_probs()[flat]
        found = self.loss_function(
            LossInputs(
                log_probs=tokens,
                old_log_probs=tokens.detach(),
                advantages=advantages.flatten(0, 1) * MASK[flat],
                mask=MASK[flat],
                from_source=companion.flatten(),
                on_policy=True,
                clip_low=0.2,
                clip_high=0.2,
            )
        )
        by_prompt = _checked("row_loss", found.row_loss, flat.shape).reshape(rows.shape)
        loss = by_prompt[:, : drawn.shape[-1]].mean()
        if companions.shape[-1]:
            loss = loss + by_prompt[:, drawn.shape[-1] :].mean()

        classified = None
        if self.needs is not None and self.needs.classifier:
            targets = _checked("classifier_targets", outputs.classifier_targets, drawn.shape)
            classified = torch.nn.functional.binary_cross_entropy_with_logits(self.classifier[drawn], targets)
        return loss, classified

    def gradient(self) -> Tensor:
        """``[d]``: the gradient that one batch gives."""
        return torch.autograd.grad(self.losses()[0], self.policy.parameters)[0]

    def move_anchor(self, step: int) -> bool:
        """After optimiser step ``step`` (from 1); returns whether a periodic anchor has been renewed."""
        if self.needs is None or not self.needs.anchor:
            return False
        with torch.no_grad():
            if self.needs.anchor_eta is not None:
                self.anchor += self.needs.anchor_eta * (self.policy.parameters - self.anchor)
            elif step % self.needs.anchor_interval == 0:
                self.anchor.copy_(self.policy.parameters)
                return True
        return False

    @property
    def _source(self) -> Tensor:
        """The parameters of what the companions come from."""
        return torch.zeros_like(self.anchor) if self.needs.source == "reference" else self.anchor

    def _draw(self, log_probs: Tensor, count: int) -> Tensor:
        size = self.training.prompts * count
        drawn = torch.multinomial(log_probs.exp(), max(size, 1), replacement=True, generator=self.generator)
        return drawn[:size].reshape(self.training.prompts, count)

    @torch.no_grad()
    def _transformed(self, method: RewardTransform, drawn: Tensor, log_probs: Tensor) -> AdvantageOutputs:
        """REINFORCE on the transformed reward less its KL penalty, with the mean of the others as baseline."""
        log_ref = self.problem.log_ref[drawn]
        found = method.transform(TransformInputs(self.problem.rewards[drawn], self.cache, log_ref))
        rewards = _checked("rewards", found.rewards, drawn.shape)
        returns = rewards - method.kl_coefficient * (log_probs[drawn] - log_ref)
        return AdvantageOutputs(centre(returns, "batch"), metrics=found.metrics)

    @torch.no_grad()
    def _advantages(self, method: Algorithm, drawn: Tensor, log_probs: Tensor) -> tuple[Tensor, AdvantageOutputs]:
        needs = self.wants
        source = self.policy.log_probs(self._source)
        companions = self._draw(source, needs.source_samples)
        selected = companions[:, :0]
        if needs.selected_samples:
            chosen = method.select(self.problem.rewards[companions], self.generator)
            chosen = _checked("select's indices", chosen, (self.training.prompts, needs.selected_samples))
            if not ((chosen >= 0) & (chosen < needs.source_samples)).all():
                raise LabError(
                    f"select's indices must lie in 0 ... {needs.source_samples - 1}, as companions has as many"
                )
            selected = companions.gather(-1, chosen)
        rows = torch.cat([drawn, selected], dim=-1)
        tokens = self.policy.token_log_probs()[rows]
        to_reference = tokens - self.policy.token_log_probs(torch.zeros_like(self.anchor))[rows]
        return selected, method.advantages(
            AdvantageInputs(
                rewards=self.problem.rewards[drawn],
                log_probs=log_probs[drawn],
                source_rewards=self.problem.rewards[companions],
                selected_log_probs=log_probs[selected],
                source_log_probs=source[drawn] if needs.source_log_probs else None,
                generator=self.generator,
                reference_rewards=self.cache,
                classifier_logits=self.classifier.detach()[drawn] if needs.classifier else None,
                source_log_ratios=(tokens - self.policy.token_log_probs(self._source)[rows])
                if needs.source_log_probs
                else None,
                reference_log_ratios=to_reference if needs.reference_log_probs else None,
            )
        )


def _per_token(name: str, values: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """``[P, n, A]``: numbers a token, or one a response for all of its tokens."""
    tokens = (*shape, LENGTH)
    if isinstance(values, Tensor) and values.dim() == len(tokens):
        return _checked(name, values, tokens)
    return _checked(name, values, shape).unsqueeze(-1).expand(tokens)


def _checked(name: str, values: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(values, Tensor) or tuple(values.shape) != tuple(shape):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise LabError(f"{name} must be a tensor of shape {tuple(shape)}, got {found}")
    if not torch.isfinite(values).all():
        raise LabError(f"{name} must be finite: look for the logarithm of 0, or a division by it")
    return values


def train(
    problem: Problem,
    method: Method,
    policy: EnumerablePolicy,
    n: int,
    training: Training = Training(),
    every: int = 5,
) -> Run:
    """Train ``policy`` in place, measuring it exactly against Best-of-n of the reference as it goes.

    Args:
        problem: where rewards and reference come from.
        method: an algorithm or a reward transform, as training builds it.
        policy: from :meth:`Problem.policy`; its parameters move.
        n: of the Best-of-n it is measured against, which need not be the method's own.
        training: batch, steps, learning rate and seed.
        every: steps between two measurements.

    Raises:
        LabError: see :meth:`Learner.losses`.
        RegistryError: the method's policy loss is not registered.
    """
    learner = Learner(problem, method, policy, training)
    parameters = [{"params": [policy.parameters]}, {"params": [learner.classifier]}]
    optimiser = torch.optim.Adam(parameters, lr=training.lr)
    needs = learner.wants
    moving = needs is not None and bool(needs.anchor_eta)
    period = (needs.anchor_interval if needs is not None else None) or training.steps
    trajectory = [problem.measure(policy.log_probs().detach(), n)]
    rounds: list[Point] = []
    for step in range(1, training.steps + 1):
        part = ((step - 1) % period) / period
        for group in optimiser.param_groups:
            group["lr"] = training.lr * (1.0 if moving else (1 + math.cos(math.pi * part)) / 2)
        loss, classified = learner.losses()
        optimiser.zero_grad()
        (loss if classified is None else loss + classified).backward()
        optimiser.step()
        renewed = learner.move_anchor(step)
        if renewed or step % every == 0 or step == training.steps:
            point = problem.measure(policy.log_probs().detach(), n, step)
            if not math.isfinite(point.kl_ref):
                raise LabError(f"the policy is no longer finite after step {step}: lower the learning rate")
            trajectory.append(point)
            if renewed:
                rounds.append(point)
    return Run(trajectory, rounds, policy.log_probs().detach(), learner.metrics)


# Estimators: what a batch's gradient is on average, beside the gradient that was wanted.


@dataclass(frozen=True)
class GradientError:
    """How far the mean of a gradient estimator is from the exact gradient g.

    Attributes:
        bias: the norm of the bias over the norm of g, from an unbiased estimate of its square (0 where that is
            negative).
        resolution: the norm of the standard error of the mean over the norm of g: biases far below it cannot
            be seen.
        z: that estimate of the square in units of its standard deviation without bias; above 4 is a bias.
        noise: the norm of one batch's standard deviation over the norm of g.
        cosine: of the angle between the mean and g; 1 for an estimator that is right up to its scale.
    """

    bias: float
    resolution: float
    z: float
    noise: float
    cosine: float

    @property
    def biased(self) -> bool:
        return self.z > 4


def draw_gradients(
    problem: Problem,
    method: Method,
    policy: EnumerablePolicy,
    batches: int = 200,
    training: Training = Training(samples=4),
    classifier: Tensor | None = None,
) -> Tensor:
    """The gradients of independent batches, with the reference for an anchor.

    Args:
        problem, method, policy: as for :func:`train`; the policy stays where it is.
        batches: how many. Cached rewards are drawn anew for each, so that a bias of the cache's size M shows.
        training: of which prompts, samples, cached and seed count.
        classifier: ``[S]``, the classifier's logits where the method uses one.

    Returns:
        ``[batches, d]``.

    Raises:
        LabError: see :meth:`Learner.losses`.
    """
    learner = Learner(problem, method, policy, training)
    learner.anchor.zero_()  # all zeros is the reference
    if classifier is not None:
        learner.classifier = classifier.detach().clone().requires_grad_()
    found = []
    for _ in range(batches):
        if learner.cache is not None:
            learner.draw_cache()
        found.append(learner.gradient())
    return torch.stack(found)


def gradient_error(gradients: Tensor, exact: Tensor) -> GradientError:
    """Compare the mean of independent gradients with the exact one.

    With b_i = g_i - g, the mean of b_i . b_j over pairs i != j is an unbiased estimate of the square of the
    bias.

    Args:
        gradients: ``[B, d]``, from :func:`draw_gradients`.
        exact: ``[d]``, from :func:`exact_gradient`.

    Raises:
        ValueError: fewer than two gradients, or shapes that do not fit.
    """
    if gradients.dim() != 2 or len(gradients) < 2 or gradients.shape[1:] != exact.shape:
        raise ValueError(
            f"need gradients [B >= 2, d] and exact [d], got {tuple(gradients.shape)} and {tuple(exact.shape)}"
        )
    batches = len(gradients)
    off = gradients - exact
    square = (off.sum(dim=0).square().sum() - off.square().sum()) / (batches * (batches - 1))
    covariance = torch.cov(off.T).reshape(off.shape[-1], off.shape[-1])
    spread = (2 * covariance.square().sum() / (batches * (batches - 1))).sqrt()
    size, trace = exact.norm().item(), covariance.trace().item()
    return GradientError(
        bias=math.sqrt(max(0.0, square.item())) / size,
        resolution=math.sqrt(trace / batches) / size,
        z=(square / spread).item(),
        noise=math.sqrt(trace) / size,
        cosine=torch.nn.functional.cosine_similarity(gradients.mean(dim=0), exact, dim=0).item(),
    )


def exact_gradient(policy: EnumerablePolicy, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """``[d]``: the gradient of ``objective(log pi)``, a function of ``[S]`` log-probabilities, by autograd."""
    return torch.autograd.grad(objective(policy.log_probs()), policy.parameters)[0]


def jeffreys_objective(problem: Problem, n: int, beta: float, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """``scale`` times J_beta(pi || Best-of-n of the reference), Eq. 11 of arXiv 2407.14622."""
    target = problem.best_of(n)

    def objective(log_pi: Tensor) -> Tensor:
        forward = (target.exp() * (target - log_pi)).sum()
        backward = (log_pi.exp() * (log_pi - target)).sum()
        return scale * ((1 - beta) * forward + beta * backward)

    return objective


def jbond_objective(problem: Problem, beta: float) -> Callable[[Tensor], Tensor]:
    """What J-BOND descends with the reference for its anchor: J_beta with Eq. 17's reward for the log-quantile.

    In expectation that reward is -log 16 (1 - p)^2 with p the quantile, uniform in [p_<, p_<=] as ties are
    broken at random.
    """
    target = problem.best_of(2)
    p_lt, p_le = level_probabilities(problem.log_ref.exp(), problem.rewards)
    crude = -math.log(16) * ((1 - p_lt) ** 3 - (1 - p_le) ** 3) / (3 * (p_le - p_lt))

    def objective(log_pi: Tensor) -> Tensor:
        forward = -(target.exp() * log_pi).sum()
        backward = (log_pi.exp() * (log_pi - problem.log_ref - crude)).sum()
        return (1 - beta) * forward + beta * backward

    return objective


def halfway(problem: Problem, n: int) -> EnumerablePolicy:
    """The full policy half-way, in logits, from the reference to Best-of-n: where estimators are looked at."""
    policy = problem.policy("full")
    with torch.no_grad():
        policy.parameters.copy_((problem.best_of(n) - problem.log_ref) / 2)
    return policy


class VBoNByN(VBoN):
    """The exact reward divided by N, as in the authors' code, with the coefficient 1 / (N - 1) all the same."""

    def transform(self, batch: TransformInputs) -> TransformOutputs:
        found = super().transform(batch)
        return replace(found, rewards=found.rewards * (self.config.n - 1) / self.config.n)


class HarmonicVBoN(VBoN):
    """log F by the harmonic estimate, :func:`~bond_plugin.bestofn.harmonic_log_quantile_among`."""

    def transform(self, batch: TransformInputs) -> TransformOutputs:
        found = super().transform(batch)
        return replace(found, rewards=harmonic_log_quantile_among(batch.rewards, batch.reference_rewards))


class HarmonicBOND(BOND):
    """BOND with a reward cache and log F by the harmonic estimate, for beta = 1."""

    def advantages(self, batch: AdvantageInputs) -> AdvantageOutputs:
        log_quantile = harmonic_log_quantile_among(batch.rewards, batch.reference_rewards)
        log_ratio = batch.log_probs - batch.source_log_probs
        return AdvantageOutputs(-backward_kl(log_ratio, (self.config.n - 1) * log_quantile, "batch").weights)


# The programme of `bond lab`.


def method_class(name: str) -> type[Method]:
    """The algorithm or reward transform that any installed package registers as ``name``.

    Raises:
        RegistryError: nobody does, it cannot be imported, or it is not of the class it should be.
    """
    kinds = ((registry.ADVANTAGE_ESTIMATORS, Algorithm), (registry.REWARD_TRANSFORMS, RewardTransform))
    for group, base in kinds:
        if name in registry.names(group):
            return registry.load_class(group, name, base)
    known = ", ".join(name for group, _ in kinds for name in registry.names(group))
    raise registry.RegistryError(f"no installed package registers an algorithm '{name}' (known: {known or 'none'})")


def build(name: str, **settings: object) -> Method:
    """The method ``name`` with the fields of its ``Config``; a reward transform gets its cache from the lab."""
    found = method_class(name)
    if issubclass(found, RewardTransform) and "reward_cache" in found.Config.__dataclass_fields__:
        settings.setdefault("reward_cache", CACHE)
    return found(found.Config(**settings))


@dataclass(frozen=True)
class Row:
    """A line of a :class:`Table`: a distribution, how it was reached, and the way there."""

    name: str
    point: Point
    note: str = ""
    trajectory: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """Rows of one problem and one class of policies, measured against Best-of-``n``."""

    title: str
    policy: str
    rewards: str
    n: int
    rows: list[Row]

    def row(self, name: str) -> Row:
        """The row called ``name``."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class Round:
    """The end of a period of iterative BOND: the policy beside Best-of-n^m of the reference.

    Attributes:
        n: n^m.
        policy, exact: the policy, and that Best-of-N, measured.
        worth, gap: where the policy stands beside the whole curve, see :meth:`Problem.worth`.
    """

    n: int
    policy: Point
    exact: Point
    worth: float
    gap: float


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator beside an exact gradient."""

    name: str
    against: str
    error: GradientError


@dataclass(frozen=True)
class Cached:
    """What M cached rewards of the reference are good for: see :func:`sensitivity`.

    Attributes:
        bound: of vBoN.
        samples: M.
        kl_to_bon: mean KL(pi* || pi_BoN) over the caches, in nats.
        low, high: the middle 90 % of the caches.
    """

    bound: str
    samples: int
    kl_to_bon: float
    low: float
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


@dataclass(frozen=True)
class _Entry:
    """A run of the programme; ``passing`` marks methods whose target moves on past Best-of-n."""

    name: str
    method: Method
    passing: bool = False
    steps: int = 160
    prompts: int | None = None


Say = Callable[[str], None]
N = 4
_PERIOD, _ROUNDS = 60, 4


def programme(seed: int = 0, say: Say = lambda _: None) -> Report:
    """Train everything, measure everything: what ``bond lab`` runs without ``--algorithm``. About 40 s."""
    strict, tied = Problem.make("strict"), Problem.make("tied")

    def bond(**settings: object) -> Method:
        return build("bond", **{"n": N, "beta": 1.0, **settings})

    def cached(method: type[BOND]) -> Method:
        return method(BOND.Config(n=N, beta=1.0, reward_cache=CACHE))

    harmonic = HarmonicVBoN(VBoN.Config(n=N, reward_cache=CACHE))

    def paper(**settings: object) -> Method:
        return build("jbond", eta=0.01, n_anchor_samples=2, **settings)

    iterative = bond(n=2, beta=0.5, n_anchor_samples=64, anchor="periodic", anchor_interval=_PERIOD)
    full = [
        _Entry("bond beta 1, k 16", bond()),
        _Entry("bond beta 1, k 64", bond(n_anchor_samples=64)),
        _Entry("bond beta 0.5, k 16", bond(beta=0.5)),
        _Entry("bond beta 0", bond(beta=0.0)),
        _Entry("bond beta 1, without (B)", bond(correction=False)),
        _Entry("bond beta 1, learned quantile", bond(correction=False, quantile="learned")),
        _Entry("bon_sft", build("bon_sft", n=N)),
        _Entry("vbon exact", build("vbon", n=N, bound="exact")),
        _Entry("vbon exact, by 1/N", VBoNByN(VBoN.Config(n=N, bound="exact", reward_cache=CACHE))),
        _Entry("vbon tied", build("vbon", n=N, bound="tied")),
        _Entry("vbon l1", build("vbon", n=N, bound="l1")),
        _Entry("vbon l1, harmonic", harmonic),
        _Entry("bond beta 1, cached", cached(BOND)),
        _Entry("bond beta 1, cached, harmonic", cached(HarmonicBOND)),
        _Entry("bond n 2, periodic", iterative, passing=True, steps=_PERIOD * _ROUNDS),
        _Entry("bond n 2, ema 0.01", bond(n=2, beta=0.5, anchor="ema", eta=0.01), passing=True, steps=200),
        _Entry("bond beta 1, pooled", bond(n_anchor_samples=0)),
        _Entry("bond beta 0.5, pooled", bond(beta=0.5, n_anchor_samples=0)),
        _Entry("jbond paper, eta 0.01", paper(), passing=True, steps=200),
        _Entry("jbond pooled, eta 0.01", build("jbond", eta=0.01), passing=True, steps=200),
        _Entry("jbond pooled, n 4, eta 0.01", build("jbond", n=4, eta=0.01), passing=True, steps=200),
    ]
    restricted = [
        _Entry("bond beta 0, k 64", bond(beta=0.0, n_anchor_samples=64), prompts=128),
        _Entry("bond beta 0.5, k 64", bond(beta=0.5, n_anchor_samples=64), prompts=128),
        _Entry("bond beta 1, k 64", bond(n_anchor_samples=64), prompts=128),
        _Entry("bon_sft", build("bon_sft", n=N)),
        _Entry("vbon exact", build("vbon", n=N, bound="exact")),
    ]
    binary = [
        _Entry("bond beta 1", bond()),
        _Entry("bond beta 1, without (B)", bond(correction=False)),
        _Entry("bond beta 0.5", bond(beta=0.5)),
        _Entry("bond beta 0.5, without (B)", bond(beta=0.5, correction=False)),
        _Entry("vbon tied", build("vbon", n=N, bound="tied")),
        _Entry("vbon exact", build("vbon", n=N, bound="exact")),
        _Entry("vbon l1", build("vbon", n=N, bound="l1")),
        _Entry("vbon l1, harmonic", harmonic),
        _Entry("bond beta 1, cached", cached(BOND)),
        _Entry("bond beta 1, cached, harmonic", cached(HarmonicBOND)),
        _Entry("jbond paper, ties expected", paper(), passing=True, steps=200),
        _Entry("jbond paper, ties textbook", paper(ties="textbook"), passing=True, steps=200),
        _Entry("jbond pooled", build("jbond", eta=0.01), passing=True, steps=200),
    ]
    plan = {
        "full": ("A policy that can be any distribution", strict, "full", "strict", full),
        "restricted": ("A policy with two parameters: Best-of-N is out of reach", strict, "restricted", "strict",
                       restricted),
        "tied": ("Rewards 0 and 1: most samples tie", tied, "full", "tied", binary),
    }  # fmt: skip
    tables, rounds, draw = {}, [], seed * 1000
    for key, (title, problem, kind, rewards, entries) in plan.items():
        rows = _levels(problem, N)
        for entry in entries:
            draw += 1
            training = training_of(entry.method, entry.steps, draw)
            training = replace(training, prompts=entry.prompts or training.prompts)
            run = train(problem, entry.method, problem.policy(kind), N, training)
            point = run.closest if entry.passing else run.end
            note = f"closest, step {point.step} of {entry.steps}" if entry.passing else ""
            rows.append(Row(entry.name, point, note, run.trajectory))
            say(f"{kind}, {rewards}: {entry.name}: KL to Best-of-{N} {point.kl_to_bon:.4f}")
            if entry.method is iterative:
                rounds = _rounds(problem, 2, run)
        tables[key] = Table(title, kind, rewards, N, rows)
    estimators = _estimators(strict, bond, draw, say)
    cached = sensitivity(strict, N, seed=seed)
    return Report(seed, tables, rounds, estimators, strict.curve(2.0**_ROUNDS * 1.25), cached)


def sensitivity(
    problem: Problem,
    n: int,
    sizes: Sequence[int] = (4, 8, 16, 32, 64, 128, 300, 1000, 3000),
    draws: int = 400,
    seed: int = 0,
) -> list[Cached]:
    """How far from Best-of-n vBoN ends up with a cache of M rewards, for each of its bounds and each M.

    Needs no training: with coefficient c the optimum for a cache is pi* = pi_ref exp(r / c), normalised, where r
    is what the reward transform itself makes of that cache. The mean is over ``draws`` caches.

    Args:
        problem: where rewards and reference come from.
        n: >= 2.
        sizes: the M to try.
        draws: caches drawn for each M.
        seed: of the caches.
    """
    generator = torch.Generator().manual_seed(seed)
    target = problem.best_of(n)
    found = []
    for bound in ("exact", "tied", "l1"):
        method = build("vbon", n=n, bound=bound)
        for size in sizes:
            drawn = torch.multinomial(
                problem.log_ref.exp().expand(draws, -1), size, replacement=True, generator=generator
            )
            out = method.transform(
                TransformInputs(
                    rewards=problem.rewards.expand(draws, -1),
                    reference_rewards=problem.rewards[drawn],
                    reference_log_probs=problem.log_ref.expand(draws, -1),
                )
            )
            optimum = (problem.log_ref + out.rewards / method.kl_coefficient).log_softmax(dim=-1)
            kl = (optimum.exp() * (optimum - target)).sum(dim=-1)
            low, high = torch.quantile(kl, torch.tensor([0.05, 0.95], dtype=kl.dtype)).tolist()
            found.append(Cached(bound, size, kl.mean().item(), low, high))
    return found


def training_of(method: Method, steps: int = 160, seed: int = 0) -> Training:
    """The batch that suits a method: cached rewards stay from step to step, so fewer prompts have more samples."""
    return Training(steps=steps, seed=seed, **({"prompts": 64, "samples": 32} if _cached(method) else {}))


def _batch(method: Method) -> Training:
    """The same for :func:`draw_gradients`."""
    return replace(training_of(method), prompts=64, samples=16) if _cached(method) else Training(samples=4)


def _cached(method: Method) -> bool:
    return isinstance(method, RewardTransform) or method.needs().reward_cache


def examine(
    name: str, method: Method, n: int, training: Training, policy: str = "full", rewards: str = "strict"
) -> Report:
    """Train one method, and look at its gradient: what ``bond lab --algorithm NAME`` runs.

    Its gradient, with the reference for an anchor and half-way from it to Best-of-N, is laid beside those of
    both directions and of Jeffreys' divergence, times the KL coefficient for a reward transform. N is the
    method's own; without one it is 2 for a moving anchor, as in J-BOND, else n. An estimator that is right up
    to a factor has the cosine 1 with one of them.

    Args:
        name: for the table.
        method: from :func:`build`.
        n: of the Best-of-n that it is measured against.
        training: batch, steps, learning rate and seed.
        policy, rewards: one of :data:`POLICIES` and of :data:`REWARDS`.

    Raises:
        LabError: see :meth:`Learner.losses`.
        RegistryError: the method's policy loss is not registered.
    """
    problem = Problem.make(rewards)
    run = train(problem, method, problem.policy(policy), n, training)
    rows = [*_levels(problem, n), Row(name, run.end, "at the end", run.trajectory)]
    moving = isinstance(method, Algorithm) and method.needs().anchor
    if moving:
        rows.append(Row(f"{name}, closest", run.closest, f"step {run.closest.step} of {training.steps}"))
    own = getattr(method.config, "n", None) or (2 if moving else n)
    start = halfway(problem, own)
    _, p_le = level_probabilities(problem.log_ref.exp(), problem.rewards)
    batch = replace(_batch(method), cached=training.cached, seed=training.seed + 1)
    gradients = draw_gradients(problem, method, start, training=batch, classifier=torch.logit(p_le, eps=1e-9))
    scale = method.kl_coefficient if isinstance(method, RewardTransform) else 1.0
    beta = getattr(method.config, "beta", 0.5)
    estimators = [
        Estimator(f"{name}, N {own}", against, gradient_error(gradients, exact_gradient(start, objective)))
        for against, objective in (
            ("KL(BoN || pi)", jeffreys_objective(problem, own, 0.0, scale)),
            ("KL(pi || BoN)", jeffreys_objective(problem, own, 1.0, scale)),
            (f"Jeffreys {beta:g}", jeffreys_objective(problem, own, beta, scale)),
        )
    ]
    table = Table(f"{name}, against Best-of-{n}", policy, rewards, n, rows)
    largest = max(2.0 * n, problem.worth(run.end)[0] * 1.25)
    return Report(training.seed, {"one": table}, _rounds(problem, own, run), estimators, problem.curve(largest))


def _levels(problem: Problem, n: int) -> list[Row]:
    return [
        Row("reference", problem.measure(problem.log_ref, n)),
        Row(f"Best-of-{n}, exact", problem.measure(problem.best_of(n), n)),
    ]


def _rounds(problem: Problem, base: int, run: Run) -> list[Round]:
    found = []
    for m, point in enumerate(run.rounds, start=1):
        n = base**m
        found.append(Round(n, point, problem.measure(problem.best_of(n), n), *problem.worth(point)))
    return found


def _estimators(problem: Problem, bond: Callable[..., Method], seed: int, say: Say) -> list[Estimator]:
    policy = halfway(problem, N)
    _, p_le = level_probabilities(problem.log_ref.exp(), problem.rewards)
    perfect = torch.logit(p_le, eps=1e-9)
    forward = ("KL(BoN || pi)", jeffreys_objective(problem, N, 0.0))
    backward = ("KL(pi || BoN)", jeffreys_objective(problem, N, 1.0))
    both = ("Jeffreys 0.5", jeffreys_objective(problem, N, 0.5))
    scaled = ("KL(pi || BoN)/(N-1)", jeffreys_objective(problem, N, 1.0, 1 / (N - 1)))
    pairs = ("Jeffreys 0.5 to Bo2", jeffreys_objective(problem, 2, 0.5))
    crude = ("the same, with Eq. 17", jbond_objective(problem, 0.5))
    by_n = VBoNByN(VBoN.Config(n=N, bound="exact", reward_cache=CACHE))
    rows: list[tuple[str, Method, tuple[str, Callable[[Tensor], Tensor]], int]] = [
        ("bond beta 0", bond(beta=0.0), forward, 0),
        ("bon_sft", build("bon_sft", n=N), forward, 0),
        ("bond beta 1, k 16", bond(), backward, 0),
        ("bond beta 1, k 128", bond(n_anchor_samples=128), backward, 0),
        ("bond beta 1, k 16, without (B)", bond(correction=False), backward, 0),
        ("bond beta 1, perfect classifier", bond(correction=False, quantile="learned"), backward, 0),
        ("bond beta 0.5, k 16", bond(beta=0.5), both, 0),
        ("vbon exact, M 16", build("vbon", n=N, bound="exact"), scaled, 16),
        ("vbon exact, M 300", build("vbon", n=N, bound="exact"), scaled, 300),
        ("vbon exact, M 300, by 1/N", by_n, scaled, 300),
        ("vbon tied, M 300", build("vbon", n=N, bound="tied"), scaled, 300),
        ("vbon l1, M 300", build("vbon", n=N, bound="l1"), scaled, 300),
        ("bond beta 0.5, pooled", bond(beta=0.5, n_anchor_samples=0), both, 0),
        ("jbond paper", build("jbond", n_anchor_samples=2), pairs, 0),
        ("jbond paper", build("jbond", n_anchor_samples=2), crude, 0),
        ("jbond pooled", build("jbond"), pairs, 0),
        ("jbond pooled, normalised", build("jbond", normalised=True), pairs, 0),
    ]
    found = []
    for i, (name, method, (against, objective), cached) in enumerate(rows, start=1):
        training = replace(_batch(method), cached=max(cached, 1), seed=seed + i)
        gradients = draw_gradients(problem, method, policy, training=training, classifier=perfect)
        error = gradient_error(gradients, exact_gradient(policy, objective))
        found.append(Estimator(name, against, error))
        say(f"estimators: {name}: bias {error.bias:.1%} of the gradient, seen from {error.resolution:.1%}")
    return found
