"""What GRPO, with and without its KL, and DPH-RL forget: 64 prompts of one small policy, all numbers exact.

    python recipes/miniature/forgetting.py

A prompt has 16 responses, three of which are right. The initial policy solves a third of the prompts nearly always,
the others with a chance between 0.5 % and 50 %. The policy is the initial one with logits that are linear in 16
features of the prompt, fewer than there are prompts: what it learns on one moves the others. Pass@k is that of the
policy's own probabilities, 1 - (1 - p)^k, and not an estimate.

All methods draw as many samples: what DPH-RL draws before training is taken off its steps, and what it draws on
prompts where it has no use for them counts. The losses are those that training runs (`bond_plugin.algorithms`).
GRPO with a KL is KDRL with the initial policy for a teacher.

What came out (five tasks, 153,600 samples each): the divergence keeps the variety of right responses on solved
prompts (KL 0.07 to 0.4 nats from the initial policy's, GRPO 2.3), and that is all that it is better at. GRPO goes
on training on those prompts, where a single wrong response has a large advantage, and forgets less of them; its
Pass@1 is higher, and with a KL of 0.3 so is its Pass@16. Pass@16 falls on one unsolved prompt in seven under
either. So the paper's ordering (arXiv 2509.07430) is not reproduced here, where a policy is linear and prompts have
nothing in common.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from statistics import mean, stdev

import torch
from torch import Tensor

from bond_plugin import registry
from bond_plugin.algorithms import AdvantageInputs, Algorithm, LossInputs, assemble
from bond_plugin.algorithms.dph import DPH, DPHConfig
from bond_plugin.algorithms.kdrl import KDRL, KDRLConfig

PROMPTS, RESPONSES, FEATURES, RIGHT = 64, 16, 16, 3
SAMPLES, STORED, K = 8, 8, 16
STEPS, RATE, SEEDS = 300, 0.05, 5


@dataclass(frozen=True)
class Task:
    """Prompts, their responses, and what was drawn of the initial policy before training.

    Attributes:
        log_ref: ``[P, S]``, the initial policy.
        right: ``[P, S]``, 0 or 1.
        features: ``[P, d]``.
        stored: ``[P, M]`` places of responses.
    """

    log_ref: Tensor
    right: Tensor
    features: Tensor
    stored: Tensor

    @classmethod
    def make(cls, seed: int) -> Task:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        right = torch.zeros(PROMPTS, RESPONSES, dtype=torch.float64)
        right.scatter_(1, noise(PROMPTS, RESPONSES).topk(RIGHT).indices, 1.0)
        chance = 0.005 * 100 ** torch.rand(PROMPTS, 1, generator=generator, dtype=torch.float64)
        chance[: PROMPTS // 3] = 0.99
        logits = noise(PROMPTS, RESPONSES)
        parts = [
            torch.where(right == kind, logits, -torch.inf).log_softmax(dim=-1) + share.log()
            for kind, share in ((1.0, chance), (0.0, 1 - chance))
        ]
        log_ref = torch.logaddexp(*parts)
        stored = torch.multinomial(log_ref.exp(), STORED, replacement=True, generator=generator)
        return cls(log_ref, right, noise(PROMPTS, FEATURES) / FEATURES**0.5, stored)

    @property
    def solved(self) -> Tensor:
        """``[P]`` bool: D_pef, where all stored responses are right."""
        return (self.right.gather(1, self.stored) == 1).all(dim=-1)

    def log_probs(self, weights: Tensor) -> Tensor:
        return (self.log_ref + self.features @ weights).log_softmax(dim=-1)


@dataclass(frozen=True)
class Outcome:
    """Of a policy.

    Attributes:
        pass_1, pass_k: means over all prompts.
        lost: share of the prompts in D_exp whose Pass@K is lower than the initial policy's, by more than 0.01.
        forgotten: on D_pef, how much smaller the chance of a right response has become, where it has; a mean.
        narrowed: on D_pef, KL(pi_ref(. | right) || pi(. | right)) in nats: 0 where the right responses have kept
            their proportions, large where one has taken the place of the others.
    """

    pass_1: float
    pass_k: float
    lost: float
    forgotten: float
    narrowed: float


def measure(task: Task, log_probs: Tensor) -> Outcome:
    right, before = ((p.exp() * task.right).sum(dim=-1) for p in (log_probs, task.log_ref))
    k, k_before = 1 - (1 - right) ** K, 1 - (1 - before) ** K
    held = task.solved
    ratio = (task.log_ref - before.log().unsqueeze(-1)) - (log_probs - right.log().unsqueeze(-1))
    narrowed = (task.log_ref.exp() * task.right * ratio).sum(dim=-1) / before
    return Outcome(
        pass_1=right.mean().item(),
        pass_k=k.mean().item(),
        lost=(k < k_before - 0.01)[~held].double().mean().item(),
        forgotten=(before - right)[held].clamp(min=0).mean().item(),
        narrowed=narrowed[held].mean().item(),
    )


def losses(algorithm: Algorithm, task: Task, weights: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """The loss of one step: fresh samples of all prompts, through what training runs."""
    log_probs, needs = task.log_probs(weights), algorithm.needs()
    drawn = torch.multinomial(log_probs.detach().exp(), SAMPLES, replacement=True, generator=generator)
    places = torch.rand(PROMPTS, STORED, generator=generator).argsort(dim=-1)[:, : needs.source_samples]
    source = task.stored.gather(1, places)
    rewards, source_rewards = task.right.gather(1, drawn), task.right.gather(1, source)
    chosen = assemble.select(algorithm, SAMPLES, source_rewards, generator)
    rows = torch.cat([drawn, source], dim=-1).gather(1, chosen)
    own = log_probs.gather(1, rows)
    under = {"teacher": task.log_ref.gather(1, rows)}
    under["behaviour"] = torch.where(torch.arange(rows.shape[-1]) < SAMPLES, own.detach(), under["teacher"])
    under = {name: values.unsqueeze(-1) for name, values in under.items()}
    batch = AdvantageInputs(
        rewards, source_rewards, {"policy": own.detach().unsqueeze(-1), **under}, generator,
        reference_rewards=task.right.gather(1, task.stored), step=step,
    )  # fmt: skip
    found = assemble.advantages(algorithm, batch)
    counted = assemble.Rows(SAMPLES, needs.selected_samples)
    inputs = LossInputs(
        log_probs=own.reshape(-1, 1),
        old_log_probs=own.detach().reshape(-1, 1),
        advantages=found.advantages.reshape(-1, 1),
        mask=torch.ones(rows.numel(), 1),
        from_source=counted.from_source(PROMPTS).flatten(),
        on_policy=True,
        clip_low=0.2,
        clip_high=0.2,
        under={name: values.reshape(-1, 1) for name, values in under.items()},
    )
    name = "jbond" if algorithm.policy_loss == "ppo" else algorithm.policy_loss  # on-policy the same gradient
    found = assemble.weighed_loss(registry.policy_loss(name, algorithm), inputs, counted)
    return found.row_loss.sum() / PROMPTS


def train(algorithm: Algorithm, task: Task, steps: int, seed: int) -> Outcome:
    """Train, for as many samples as ``steps`` of a method that draws nothing before, and measure."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(FEATURES, RESPONSES, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([weights], lr=RATE)
    before = STORED // SAMPLES if algorithm.needs().reward_cache else 0
    for step in range(steps - before):
        optimiser.zero_grad()
        losses(algorithm, task, weights, step, generator).backward()
        optimiser.step()
    return measure(task, task.log_probs(weights.detach()))


def grpo(kl_coef: float) -> Algorithm:
    return KDRL(KDRLConfig(kl_coef=kl_coef, anneal_steps=0))


def dph(divergence: str, eta: float) -> Algorithm:
    return DPH(DPHConfig(divergence=divergence, eta=eta, n_stored=STORED, reward_cache="-"))


METHODS: dict[str, Algorithm] = {
    "GRPO": grpo(0.0),
    **{f"GRPO, KL {beta}": grpo(beta) for beta in (0.1, 0.3)},
    **{f"DPH, forward KL, eta {eta}": dph("forward_kl", eta) for eta in (0.1, 1.0, 10.0)},
    **{f"DPH, Jensen-Shannon, eta {eta}": dph("jensen_shannon", eta) for eta in (1.0, 10.0)},
}


def line(name: str, found: list[Outcome]) -> str:
    def cell(key: str) -> str:
        values = [getattr(outcome, key) for outcome in found]
        return f"{mean(values):9.3f} ± {stdev(values) / len(values) ** 0.5:.3f}"

    return f"{name:31}" + "".join(cell(f.name) for f in fields(Outcome))


def main() -> None:
    torch.set_num_threads(1)
    tasks = [Task.make(seed) for seed in range(SEEDS)]
    held = mean(task.solved.double().mean().item() for task in tasks)
    print(
        f"{SEEDS} tasks of {PROMPTS} prompts, {held:.0%} of them in D_pef; {STEPS * PROMPTS * SAMPLES:,} samples each"
    )
    print(" " * 31 + "".join(f"{name:>17}" for name in ("Pass@1", f"Pass@{K}", "lost", "forgotten", "narrowed")))
    print(line("initial policy", [measure(task, task.log_ref) for task in tasks]))
    for name, algorithm in METHODS.items():
        print(line(name, [train(algorithm, task, STEPS, seed) for seed, task in enumerate(tasks)]))


if __name__ == "__main__":
    main()
