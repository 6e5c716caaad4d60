"""The laboratory: a policy and a reward small enough to enumerate, where pi_BoN and all divergences are exact.

What training reaches can be compared there with what it aims at, because expectations are sums. Nothing is replaced:
methods are the objects that training runs, and their batches go through the host's own assembly of the loss
(:mod:`bond_plugin.algorithms.assemble`). Imports torch and nothing of the host.

    >>> from bond_plugin.lab.learner import Training, train
    >>> from bond_plugin.lab.methods import build
    >>> from bond_plugin.lab.problem import Problem
    >>> problem = Problem.make()
    >>> run = train(problem, build("bond", n=4, beta=1.0), problem.policy("full"), 4, Training())
    >>> run.end.kl_to_bon
"""
