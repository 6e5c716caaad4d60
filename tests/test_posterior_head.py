"""The Gaussian posterior of a head: against closed forms, where it is at rest, and what Best-of-N gains by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, Run, Tiny, load
from safetensors import safe_open
from torch import Tensor

from bond_plugin.rewards import gaussian, posterior_head

REWARD = REPOSITORY / "recipes" / "rewards" / "posterior_head.py"
PRIOR, NOISE = 2.0, 0.5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


#: Directions of very different size, as a model's hidden states have them.
FEATURES = random(400, 12) * torch.logspace(-2, 1, 12, dtype=torch.float64)
TRUE = random(12, seed=1) / torch.logspace(-1, 0.5, 12, dtype=torch.float64)
SCORES = FEATURES @ TRUE + NOISE * random(400, seed=2)
BETTER = FEATURES * torch.where(
    torch.sigmoid(FEATURES @ TRUE) > torch.rand(400, generator=torch.Generator().manual_seed(3)), 1, -1
).unsqueeze(-1)
EYE = torch.eye(12, dtype=torch.float64)


def exact() -> tuple[Tensor, Tensor]:
    """Bayesian linear regression."""
    cov = (FEATURES.mT @ FEATURES / NOISE**2 + PRIOR * EYE).inverse()
    return cov @ FEATURES.mT @ SCORES / NOISE**2, cov


def off(mean: Tensor, factor: Tensor, wanted: Tensor, cov: Tensor) -> tuple[float, float]:
    """By how many standard deviations the mean is off, and by which factor a variance, at most."""
    ratios = torch.linalg.eigvals(torch.linalg.solve(cov, factor @ factor.mT)).real
    return ((mean - wanted).abs() / cov.diag().sqrt()).max().item(), ratios.log().abs().max().exp().item()


def test_the_backward_step_minimises_what_it_should() -> None:
    """W2^2 / 2 - (h / 2) log det, by autograd: its gradient is zero there, W2 between Gaussians of matrices."""
    root = random(5, 5, seed=4)
    half, step = root @ root.mT, 0.3
    zero, flat = torch.zeros(5, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    _, found = gaussian.forward_backward(zero, half, zero, flat, step)
    found.requires_grad_()
    values = torch.linalg.eigvalsh(torch.linalg.cholesky(half).mT @ found @ torch.linalg.cholesky(half))
    bures = half.trace() + found.trace() - 2 * values.sqrt().sum()
    (slope,) = torch.autograd.grad(bures / 2 - step / 2 * found.logdet(), found)
    assert slope.abs().max() < 1e-10


def test_scores_have_the_posterior_of_linear_regression() -> None:
    mean_off, variance_off = off(*gaussian.fit(FEATURES, SCORES, PRIOR, NOISE), *exact())
    assert mean_off < 1e-9 and variance_off < 1 + 1e-9


def test_a_small_step_comes_to_rest_at_the_same_place() -> None:
    mean_off, variance_off = off(*gaussian.fit(FEATURES, SCORES, PRIOR, NOISE, step=0.1), *exact())
    assert mean_off < 1e-4 and variance_off < 1 + 1e-4


def test_comparisons_come_to_rest_where_the_gaussian_fits_best_and_near_laplace() -> None:
    mean, factor = gaussian.fit(BETTER, None, PRIOR)
    drawn = mean + random(40_000, 12, seed=5) @ factor.mT
    share = torch.sigmoid(-drawn @ BETTER.mT)
    slopes = -share @ BETTER + PRIOR * drawn  # of V, at each sample
    assert (slopes.mean(dim=0).abs() < 4 * slopes.std(dim=0) / len(drawn) ** 0.5).all()
    curve = (share * (1 - share)).mean(dim=0)
    assert off(mean, factor, mean, ((BETTER.mT * curve) @ BETTER + PRIOR * EYE).inverse())[1] < 1.002
    mode = torch.zeros(12, dtype=torch.float64)
    for _ in range(50):
        share = torch.sigmoid(-BETTER @ mode)
        hessian = (BETTER.mT * (share * (1 - share))) @ BETTER + PRIOR * EYE
        mode = mode - torch.linalg.solve(hessian, PRIOR * mode - BETTER.mT @ share)
    mean_off, variance_off = off(mean, factor, mode, hessian.inverse())
    assert 0.01 < mean_off < 0.35 and 1.001 < variance_off < 1.06  # near, and another thing


@pytest.mark.parametrize("targets", [SCORES, None], ids=["scores", "comparisons"])
def test_the_stochastic_form_goes_to_the_same_place(targets: Tensor | None) -> None:
    rows = FEATURES if targets is not None else BETTER
    mean, factor = gaussian.fit(rows, targets, PRIOR, NOISE)
    again = gaussian.fit(rows, targets, PRIOR, NOISE, samples=1, steps=3000)
    mean_off, variance_off = off(*again, mean, factor @ factor.mT)
    assert mean_off < 0.15 and variance_off < 1.05


def test_a_head_of_scores_is_the_gaussian_process_of_its_features() -> None:
    """In the form with a kernel, which has no weights: prior variance 1 / PRIOR for an ordinary text."""
    seen, new = FEATURES[:50] + 3.0, FEATURES[50:80] + 3.0
    head = posterior_head.fit(seen.float(), SCORES[:50] + 7.0, PRIOR, NOISE)
    mean, std = posterior_head.value(new.float(), head)
    centre = seen.mean(dim=0)
    scale = (seen - centre).square().sum(dim=-1).mean()

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one - centre) @ (other - centre).mT / (PRIOR * scale)

    noisy = kernel(seen, seen) + NOISE**2 * torch.eye(50, dtype=torch.float64)
    solved = torch.linalg.solve(noisy, kernel(seen, new)).mT
    level = SCORES[:50].mean() + 7.0
    wanted = level + solved @ (SCORES[:50] + 7.0 - level)
    variance = kernel(new, new).diag() - (solved * kernel(new, seen)).sum(dim=-1)
    torch.testing.assert_close(mean.double(), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(std.double(), variance.sqrt(), atol=1e-4, rtol=1e-4)


def gold_of_best_of_64(seed: int, kappas: tuple[float, ...], flaw: bool = True, width: float = 3.0) -> list[float]:
    """The gold reward of Best-of-64 by mean - kappa std of a head that learned from 200 comparisons.

    Gold dislikes the first feature. Only four comparisons differ in it, and in those the judge liked it (``flaw``).
    The policy's samples have ``width`` times as much of it.
    """
    generator = torch.Generator().manual_seed(seed)
    gold = torch.randn(8, generator=generator)
    gold[0], few = -1.0, 4
    one, other = torch.randn(2, 200, 8, generator=generator)
    one[few:, 0] = other[few:, 0] = 0
    first = torch.rand(200, generator=generator) < torch.sigmoid((one - other) @ gold)
    if flaw:
        first[:few] = one[:few, 0] > other[:few, 0]
    better, worse = (torch.where(which.unsqueeze(-1), one, other) for which in (first, ~first))
    head = posterior_head.fit(better, worse, prior=1.0)
    pool = torch.randn(400, 64, 8, generator=generator)
    pool[..., 0] *= width
    mean, std = (part.view(400, 64) for part in posterior_head.value(pool.view(-1, 8), head))
    true = pool @ gold
    return [true.gather(1, (mean - kappa * std).argmax(dim=1, keepdim=True)).mean().item() for kappa in kappas]


def test_best_of_n_by_mean_less_std_does_not_fall_for_a_known_flaw() -> None:
    found = torch.tensor([gold_of_best_of_64(seed, (0.0, 1.0)) for seed in range(20)])
    gain = found[:, 1] - found[:, 0]
    interval = 1.96 * gain.std() / 20**0.5
    print(f"gold {found.mean(dim=0).tolist()}, gain {gain.mean():.3f} +- {interval:.3f}")
    assert gain.mean() - interval > 0.1


def rows(tiny: Tiny, count: int = 60) -> list[dict]:
    """Comparisons of texts of letters: the one with more vowels is chosen."""
    texts = [json.loads(line)["input"] for line in tiny.prompts.read_text().splitlines()]
    made = []
    for i in range(count):
        pair = sorted((texts[i] + texts[7 * i % 400], texts[i] + texts[(11 * i + 3) % 400]), key=vowels)
        made.append({"rejected": pair[0], "chosen": pair[1]})
    return made


def vowels(text: str) -> int:
    return sum(letter in "aeiou" for letter in text)


@pytest.fixture(scope="module")
def head(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(tiny)))
    path = folder / "head.safetensors"
    assert posterior_head.main([str(tiny.model), str(folder / "pairs.jsonl"), "--output", str(path)]) == 0
    return path


def test_the_file_says_whose_head_it_is_and_prefers_what_was_chosen(
    head: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with safe_open(head, "pt") as file:
        assert file.metadata()["model"] == str(tiny.model)
    monkeypatch.setenv("BOND_HEAD_FILE", str(head))
    monkeypatch.setenv("BOND_HEAD_KAPPA", "0.5")
    posterior_head._load.cache_clear()
    reward = load(REWARD).reward_func
    chosen, rejected = ([row[key] for row in rows(tiny)] for key in ("chosen", "rejected"))
    good, bad = (reward(texts, texts, texts) for texts in (chosen, rejected))
    assert ((good["scores"] > bad["scores"]).float().mean()) > 0.75
    for found in (good, bad):
        assert (found["extra_logs"]["std"] > 0).all()
        torch.testing.assert_close(found["rewards"], found["scores"] - 0.5 * found["extra_logs"]["std"])
    one_by_one = torch.cat([reward([text], [text], [""])["rewards"] for text in chosen])
    torch.testing.assert_close(one_by_one, good["rewards"], atol=1e-4, rtol=0)
    # With EOS at its end a text is the same text.
    torch.testing.assert_close(
        reward([text + "<eos>" for text in chosen], chosen, chosen)["rewards"], good["rewards"]
    )
    posterior_head._load.cache_clear()


def test_features_are_the_hosts_reward_models(tiny: Tiny, tmp_path: Path) -> None:
    """With a reward model's own head in place of the mean, the reward is the host's."""
    from bond_plugin.host import cpu

    with cpu.flash_attn_stand_in():
        from openrlhf.models import get_llm_for_sequence_regression
    made = get_llm_for_sequence_regression(
        str(tiny.model), "reward", init_value_head=True, attn_implementation="eager"
    )
    made = made.float().eval()
    shutil.copytree(tiny.model, tmp_path / "model")
    made.save_pretrained(tmp_path / "model")
    texts = ["hello<eos>", "a much longer text<eos>", "x<eos>"]
    found = posterior_head.Features(str(tmp_path / "model"))(texts) @ made.score.weight[0].detach()
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tiny.model)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = made(tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "value", "says"), [
    ("BOND_HEAD_FILE", "", "BOND_HEAD_FILE must be set"),
    ("BOND_HEAD_KAPPA", "much", "BOND_HEAD_KAPPA must be a number of at least 0.0, got 'much'"),
    ("BOND_HEAD_BATCH", "0.5", "BOND_HEAD_BATCH must be a whole number of at least 1, got '0.5'"),
])  # fmt: skip
def test_settings(head: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv("BOND_HEAD_FILE", str(head))
    monkeypatch.setenv(name, value)
    posterior_head._load.cache_clear()
    with pytest.raises(ValueError, match=says):
        posterior_head.reward_func(["a"], [""], [""])


@pytest.mark.parametrize(("line", "extra", "says"), [
    ('{"text": "a", "reward": 1}', [], "scores need --noise"),
    ("", [], "data.jsonl has no rows"),
    ('{"chosen": "a"}', [], "line 1: must have chosen and rejected"),
    ('{"text": "a", "reward": "x"}', ["--noise", "1"], "line 1: must have text and reward"),
])  # fmt: skip
def test_data_that_cannot_be_used(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, extra: list[str], says: str
) -> None:
    (tmp_path / "data.jsonl").write_text(line)
    made = [str(tiny.model), str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "head.safetensors"), *extra]
    assert posterior_head.main(made) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "head.safetensors").exists()


@pytest.mark.e2e
def test_training_is_rewarded_by_mean_less_std(bond: Callable[..., Run], head: Path, tmp_path: Path) -> None:
    done = bond(tmp_path, {"reward.remote_url": str(REWARD)}, BOND_HEAD_FILE=str(head), BOND_HEAD_KAPPA="2")
    assert len(done.metrics) == 3
    for step in done.metrics:
        assert step["extra_logs/std"] > 0.1
        assert step["reward"] == pytest.approx(step["score"] - 2 * step["extra_logs/std"], abs=1e-4)
