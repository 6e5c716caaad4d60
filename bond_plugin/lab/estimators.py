"""What a gradient estimator is on average, beside the gradient that was wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bond_plugin.lab.learner import Learner, Training
from bond_plugin.lab.methods import Method
from bond_plugin.lab.problem import EnumerablePolicy, Goal, Problem


@dataclass(frozen=True)
class GradientError:
    """How far the mean of a gradient estimator is from the exact gradient g; norms are relative to that of g."""

    bias: float  # norm of the bias, from an unbiased estimate of its square (0 where that is negative)
    resolution: float  # norm of the standard error of the mean: biases far below it cannot be seen
    z: float  # that estimate of the square in units of its standard deviation without bias; above 4 is a bias
    noise: float  # norm of one batch's standard deviation
    cosine: float  # of the angle between the mean and g; 1 for an estimator that is right up to its scale

    @property
    def biased(self) -> bool:
        return self.z > 4


def draw_gradients(
    problem: Problem,
    method: Method,
    policy: EnumerablePolicy,
    training: Training,
    batches: int = 200,
) -> Tensor:
    """``[batches, d]``: gradients of independent batches, by the reference for an anchor and a perfect classifier.

    The arguments are those of :func:`~bond_plugin.lab.learner.train`, and so are the errors; the policy stays where
    it is. Cached rewards are drawn anew for each batch, so that a bias of the cache's size M shows.
    """
    learner = Learner(problem, method, policy, training)
    learner.anchor.zero_()  # all zeros is the reference
    learner.classifier = torch.logit(problem.levels()[1], eps=1e-9).requires_grad_()
    found = []
    for _ in range(batches):
        if learner.cache is not None:
            learner.draw_cache()
        found.append(torch.autograd.grad(learner.losses()[0], policy.parameters)[0])
    return torch.stack(found)


def gradient_error(gradients: Tensor, exact: Tensor) -> GradientError:
    """Compare the mean of independent ``gradients``, ``[B, d]`` with B >= 2, with the ``exact`` one, ``[d]``.

    With b_i = g_i - g, the mean of b_i . b_j over pairs i != j is an unbiased estimate of the square of the
    bias.
    """
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


def jeffreys_objective(
    problem: Problem, n: Goal, beta: float, scale: float = 1.0, backward_target: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """``scale`` times J_beta(pi || Best-of-n of the reference, or another target), Eq. 11 of arXiv 2407.14622.

    ``backward_target``, ``[S]`` log-probabilities up to a constant, takes the place of Best-of-n in KL(pi || .).
    """
    target = problem.best_of(n)
    aim = target if backward_target is None else backward_target

    def objective(log_pi: Tensor) -> Tensor:
        forward = (target.exp() * (target - log_pi)).sum()
        backward = (log_pi.exp() * (log_pi - aim)).sum()
        return scale * ((1 - beta) * forward + beta * backward)

    return objective


def jbond_objective(problem: Problem, beta: float) -> Callable[[Tensor], Tensor]:
    """What J-BOND descends with the reference for its anchor: J_beta with Eq. 17's reward for the log-quantile.

    In expectation that reward is -log 16 (1 - p)^2 with p the quantile, uniform in [p_<, p_<=] as ties are
    broken at random.
    """
    p_lt, p_le = problem.levels()
    crude = -math.log(16) * ((1 - p_lt) ** 3 - (1 - p_le) ** 3) / (3 * (p_le - p_lt))
    return jeffreys_objective(problem, 2, beta, backward_target=problem.log_ref + crude)


def halfway(problem: Problem, n: Goal) -> EnumerablePolicy:
    """The full policy half-way, in logits, from the reference to Best-of-n: where estimators are looked at."""
    policy = problem.policy("full")
    with torch.no_grad():
        policy.parameters.copy_((problem.best_of(n) - problem.log_ref) / 2)
    return policy
