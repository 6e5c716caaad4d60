"""The laboratory: a policy and a reward small enough to enumerate, where pi_BoN and all divergences are exact.

What training reaches can be compared there with what it aims at, because expectations are sums. Nothing is replaced:
methods are the objects that training runs, and their batches go through the host's own assembly of the loss
(:mod:`bond_plugin.algorithms.assemble`). Imports torch and nothing of the host.

    >>> problem = Problem.make()
    >>> run = train(problem, build("bond", n=4, beta=1.0), problem.policy("full"), n=4)
    >>> run.end.kl_to_bon
"""

from bond_plugin.lab.estimators import (
    GradientError,
    draw_gradients,
    exact_gradient,
    gradient_error,
    halfway,
    jbond_objective,
    jeffreys_objective,
)
from bond_plugin.lab.learner import Learner, Run, Training, train
from bond_plugin.lab.methods import CACHE, VBoNByN, build
from bond_plugin.lab.problem import POLICIES, RESPONSES, REWARDS, VOCABULARY, Point, Problem

__all__ = [
    "CACHE",
    "POLICIES",
    "RESPONSES",
    "REWARDS",
    "VOCABULARY",
    "GradientError",
    "Learner",
    "Point",
    "Problem",
    "Run",
    "Training",
    "VBoNByN",
    "build",
    "draw_gradients",
    "exact_gradient",
    "gradient_error",
    "halfway",
    "jbond_objective",
    "jeffreys_objective",
    "train",
]
