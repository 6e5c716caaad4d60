"""The host's own policy loss beside the mean over prompts: on-policy one gradient, up to a factor a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bond_plugin.algorithms.jbond import policy_loss

PROMPTS, N, TOKENS = 6, 4, 9
ROWS = PROMPTS * N


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The host's models, which import flash-attn."""
    monkeypatch.setenv("BOND_DEVICE", "cpu")
    from bond_plugin.host import hooks

    hooks.arm()
    import openrlhf.models

    return openrlhf.models


def prompt_mean(micro_batches: int, **settings: Any) -> Any:
    from bond_plugin.host.loss import PromptMeanLoss

    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="jbond")),
        bond=SimpleNamespace(**{"n_anchor_samples": 0, **settings}),
        rollout=SimpleNamespace(n_samples_per_prompt=N, batch_size=PROMPTS),
        train=SimpleNamespace(batch_size=ROWS, max_epochs=1),
        actor=SimpleNamespace(eps_clip_low_high=(0.2, 0.2)),
    )
    return PromptMeanLoss(policy_loss, args, micro_batches)


@pytest.fixture
def rows() -> SimpleNamespace:
    """A step's responses, of 0 to TOKENS tokens, under a small model: a matrix of logits in float64."""
    random = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, TOKENS + 1, (ROWS,), generator=random)
    lengths[5] = 0
    return SimpleNamespace(
        features=torch.randn(ROWS, TOKENS, 5, generator=random, dtype=torch.float64),
        weights=torch.randn(5, 7, generator=random, dtype=torch.float64),
        taken=torch.randint(0, 7, (ROWS, TOKENS), generator=random),
        mask=(torch.arange(TOKENS) < lengths.unsqueeze(-1)).double(),
        a_response=torch.randn(ROWS, 1, generator=random, dtype=torch.float64).expand(-1, TOKENS),
        a_token=torch.randn(ROWS, TOKENS, generator=random, dtype=torch.float64),
    )


def gradient(rows: SimpleNamespace, advantages: torch.Tensor, loss: Any, micro_batches: int, **totals: Any) -> Any:
    """Of one optimiser step in so many micro-batches, over whose losses DeepSpeed takes the mean."""
    weights = rows.weights.clone().requires_grad_()
    for part in torch.arange(ROWS).chunk(micro_batches):
        scores = (rows.features[part] @ weights).log_softmax(-1)
        log_probs = scores.gather(-1, rows.taken[part].unsqueeze(-1)).squeeze(-1)
        found, *_ = loss(log_probs, log_probs.detach(), advantages[part], rows.mask[part], **totals)
        (found / micro_batches).backward()
    return weights.grad


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("advantages", ["a_response", "a_token"])
def test_the_token_mean_is_the_mean_over_prompts_up_to_the_mean_length(
    host: Any, rows: SimpleNamespace, advantages: str, micro_batches: int
) -> None:
    """Responses per token of the step: so the host's loss weighs every token of a step alike, and long responses
    are not played down."""
    tokens = rows.mask.sum()
    given = getattr(rows, advantages)
    ours = gradient(rows, given, prompt_mean(micro_batches), micro_batches)
    # The host hands its loss the tokens of the whole step, over the micro-batches.
    theirs = gradient(rows, given, host.PolicyLoss(), micro_batches, batch_num_tokens=tokens / micro_batches)
    assert ours.norm() > 0
    # Ours is a mean over prompts of means over a prompt's responses.
    torch.testing.assert_close(theirs * tokens / ROWS, ours, rtol=1e-9, atol=1e-12)


def test_the_mean_of_each_response_is_another_objective(host: Any, rows: SimpleNamespace) -> None:
    """``--actor.loss_agg_mode seq-mean-token-mean``: no factor makes it the mean over prompts of sums."""
    ours = gradient(rows, rows.a_response, prompt_mean(1), 1)
    theirs = gradient(
        rows, rows.a_response, host.PolicyLoss(token_level_loss=False), 1, global_batch_size=torch.tensor(ROWS)
    )
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) < 0.99


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_source_rows_have_a_mean_of_their_own(host: Any, micro_batches: int) -> None:
    """N of the policy and two of the anchor a prompt: the mean over prompts of both means, whatever the split."""
    random, selected = torch.Generator().manual_seed(4), 2
    loss = prompt_mean(micro_batches, n_anchor_samples=selected, estimator="pooled")
    from_source = (torch.arange(N + selected) >= N).expand(PROMPTS, -1)
    log_probs, advantages = torch.randn(2, PROMPTS, N + selected, TOKENS, generator=random, dtype=torch.float64)
    per_row = -(log_probs * advantages).sum(-1)
    wanted = per_row[:, :N].mean(-1).mean() + per_row[:, N:].mean(-1).mean()
    found = 0.0
    for part in torch.arange(from_source.numel()).chunk(micro_batches):
        values, given = log_probs.flatten(0, 1)[part], advantages.flatten(0, 1)[part]
        loss.known = {"from_source": from_source.flatten()[part]}
        found += loss(values, values.detach(), given, torch.ones_like(values))[0] / micro_batches
    torch.testing.assert_close(found, wanted)
