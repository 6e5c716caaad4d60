"""recipes/miniature: what its tasks are made of, and the host's own train_sft without a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import REPOSITORY, load

RECIPES = REPOSITORY / "recipes"

TEXTS = [
    "A dull film, but the acting is good. I liked the ending a lot.",
    "It's the funniest film of the year!",
    "the plot is thin , the jokes are old and the music is worse .",
    "One of the best films I have seen this year; the cast is wonderful.",
] * 20


@pytest.fixture(scope="module")
def prepare() -> Iterator[ModuleType]:
    """prepare.py, which puts recipes/ on sys.path when it is run."""
    path = list(sys.path)
    yield load(RECIPES / "miniature" / "prepare.py")
    sys.path[:] = path


@pytest.fixture(scope="module")
def reviews(prepare: ModuleType) -> list[Any]:
    """400 reviews of two collections, labelled by their one word of judgement."""
    from reviews.corpus import Review

    made = []
    for i in range(400):
        word = ("dreadful", "lovely")[i % 2]
        story = " ".join(f"{name}{(i * step) % 97}" for name, step in (("actor", 3), ("scene", 5), ("song", 7)))
        text = (
            f"Number{i} of the series {story} is a {word} film, and I say that as someone who has seen all of them."
        )
        made.append(Review(text, i % 2, ("imdb", "rotten_tomatoes")[i // 2 % 2]))
    return made


# Texts.


def test_plain_style() -> None:
    load(RECIPES / "miniature" / "prepare.py")
    from miniature.texts import plain

    assert plain("... Isn't “Amélie” (2001) GREAT?!  Well -- yes , of course .") == (
        "isn't amelie 2001 great? well - yes, of course."
    )


def test_openings_end_with_a_sentence_or_are_cut(prepare: ModuleType) -> None:
    from miniature.models import EOS
    from miniature.texts import LEAST_WORDS, MOST_WORDS, lesson

    assert lesson("Short one. " + "word " * LEAST_WORDS + "end. More.", EOS).endswith(f"word end.{EOS}")
    cut = lesson("word " * 100, EOS)
    assert len(cut.split()) == MOST_WORDS and EOS not in cut


def test_prompts_are_of_reviews_that_nothing_else_has_seen(prepare: ModuleType, reviews: list[Any]) -> None:
    from miniature.texts import PROMPT_WORDS, opening, prompt_of
    from reviews.corpus import draw_openings

    drawn, rest = draw_openings(reviews, 50, prompt_of, seed=0)
    assert len(drawn) == 50 and len(rest) == len(reviews) - 50
    assert not {review.text for review in drawn.values()} & {review.text for review in rest}
    for prompt, review in drawn.items():
        assert opening(review.text)[0].startswith(prompt)
        assert PROMPT_WORDS[0] <= len(prompt.split()) <= PROMPT_WORDS[1]
    assert len({len(prompt.split()) for prompt in drawn}) > 1
    assert draw_openings(reviews, 50, prompt_of, seed=0) == (drawn, rest)
    with pytest.raises(ValueError, match="only 400 distinct openings exist, 401 were asked for"):
        draw_openings(reviews, 401, prompt_of, seed=0)


def test_pairs_are_ranked_by_label_within_a_collection(prepare: ModuleType, reviews: list[Any]) -> None:
    from miniature.texts import opening, pairs

    source = {opening(review.text)[0]: review.source for review in reviews}
    made = pairs(reviews, seed=0)
    assert len(made) == 200
    assert all("lovely" in pair["chosen"] and "dreadful" in pair["rejected"] for pair in made)
    assert all(source[pair["chosen"]] == source[pair["rejected"]] for pair in made)
    assert made == pairs(reviews, seed=0) and made != pairs(reviews, seed=1)


# Tokenizers.


def test_text_tokenizer_round_trips_and_is_deterministic(prepare: ModuleType, tmp_path: Path) -> None:
    from miniature.models import EOS, text_tokenizer
    from transformers import AutoTokenizer

    for name in ("one", "two"):
        text_tokenizer(tmp_path / name, TEXTS, 400)
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "two" / "tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    for text in [*TEXTS[:4], " never seen: 42 çé "]:
        ids = tokenizer(text + EOS)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:-1]) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (0, 1, "left")
    # A prompt's tokens are the first of the whole text's: what the policy learnt is what it is asked.
    whole = tokenizer(TEXTS[0])["input_ids"]
    start = tokenizer(TEXTS[0][: TEXTS[0].index(" acting")])["input_ids"]
    assert whole[: len(start)] == start


def test_character_tokenizer_drops_the_space_before_eos(prepare: ModuleType, tmp_path: Path) -> None:
    from miniature.models import EOS, character_tokenizer
    from miniature.sums import CHARACTERS
    from transformers import AutoTokenizer

    character_tokenizer(tmp_path, CHARACTERS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(f"12-7=5 {EOS}")["input_ids"]
    assert len(ids) == 7 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == f"12-7=5{EOS}"


# Sums.


def test_sums_are_right_different_and_not_known(prepare: ModuleType) -> None:
    from miniature.sums import exercises

    held = exercises(100, seed=1)
    known = {row["input"] for row in held}
    rows = exercises(300, seed=2, known=known)
    assert len({row["input"] for row in rows}) == 300 and not known & {row["input"] for row in rows}
    for row in rows:
        assert eval(row["input"].rstrip("=")) == int(row["output"])
    assert rows == exercises(300, seed=2, known=known)


def test_more_sums_than_there_are_is_an_error_and_not_an_endless_search(prepare: ModuleType) -> None:
    from miniature.sums import exercises

    with pytest.raises(ValueError, match="19,901 different sums are asked for, but there are only 19,900"):
        exercises(19_900, seed=0, known={"1+1="})
    assert len(exercises(19_900, seed=0)) == 19_900


def test_reward_of_reviews_is_the_classifiers_logit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One text at a time, without scikit-learn's checks, and to the last digits the same."""
    import joblib
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    classifier = make_pipeline(vectorizer, LogisticRegression(C=10.0)).fit(TEXTS[:4], [0, 1, 0, 1])
    joblib.dump(classifier, tmp_path / "reward.joblib")
    monkeypatch.setenv("BOND_REVIEWS_DIR", str(tmp_path))
    texts = [*TEXTS[:4], "The best, the best, THE BEST film of the year", "", "unheard words", "dull"]
    found = load(RECIPES / "miniature" / "reward.py").reward_func([f"{text}<|end|>" for text in texts], texts, texts)
    assert found["rewards"].tolist() == pytest.approx(classifier.decision_function(texts).tolist(), abs=1e-6)
    assert len(set(found["rewards"].tolist())) == 7  # the two without a known word are alike

    other = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS[:4], [0, 1, 0, 1])
    with pytest.raises(ValueError, match="make it again"):
        load(RECIPES / "reviews" / "reward.py").Logit(other)


def test_sums_are_rewarded_by_the_exact_checker(prepare: ModuleType) -> None:
    from miniature.models import EOS
    from miniature.sums import exercises

    reward_func = load(RECIPES / "maths" / "reward.py").reward_func
    rows = exercises(20, seed=0)
    answers = [row["output"] for row in rows]
    answers[5:10] = [str(int(answer) + 1) for answer in answers[5:10]]
    answers[10:15] = [answer + "0" if answer != "0" else "1" for answer in answers[10:15]]
    answers[15:] = ["", "-", "+", "=", "1-1"]
    prompts = [row["input"] for row in rows]
    queries = [prompt + answer + EOS for prompt, answer in zip(prompts, answers, strict=True)]
    found = reward_func(queries, prompts, [row["label"] for row in rows])
    assert found["rewards"].tolist() == [1.0] * 5 + [0.0] * 15


# The steps.


@pytest.fixture
def quick(prepare: ModuleType, reviews: list[Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Small settings, a few made-up reviews, and the models untrained: which steps are done is asked, not how."""
    import shutil

    calls: list[str] = []

    def train(module: str, output: Path, log: Path, **flags: Any) -> None:
        calls.append(module)
        source = Path(flags["model__model_name_or_path"])
        if module.endswith("train_rm"):
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).save_pretrained(output)
            AutoTokenizer.from_pretrained(source).save_pretrained(output)
        else:
            shutil.copytree(source, output, dirs_exist_ok=True)

    monkeypatch.setattr(prepare, "package_file", lambda *names: Path())
    monkeypatch.setattr(prepare, "read_reviews", lambda: reviews)
    monkeypatch.setattr(prepare.models, "train", train)
    monkeypatch.setattr(prepare, "SAMPLES", 2)
    policy = prepare.Policy(hidden=32, layers=1, learning_rate=1e-3, batch_size=8, epochs=1)
    settings = prepare.Reviews(train=20, heldout=12, vocabulary=300, pairs=20, policy=policy)
    return settings, calls


def test_a_second_run_reuses_everything(prepare: ModuleType, quick: Any, tmp_path: Path) -> None:
    settings, calls = quick
    first = list(prepare.reviews_steps(tmp_path, settings))
    assert calls == ["openrlhf.cli.train_sft", "openrlhf.cli.train_rm"]
    assert not any("reused" in message for message in first)
    record = (tmp_path / "prepared.json").read_bytes()
    again = list(prepare.reviews_steps(tmp_path, settings))
    assert len(calls) == 2 and sum("reused" in message for message in again) == 3
    assert (tmp_path / "prepared.json").read_bytes() == record
    for name, count in (("train", 20), ("heldout", 12)):
        assert len(prepare.read_rows(tmp_path / f"{name}.jsonl")) == count


def test_a_lost_output_or_another_setting_remakes_what_depends_on_it(
    prepare: ModuleType, quick: Any, tmp_path: Path
) -> None:
    settings, calls = quick
    list(prepare.reviews_steps(tmp_path, settings))
    (tmp_path / "reward_model" / "model.safetensors").unlink()
    list(prepare.reviews_steps(tmp_path, settings))
    assert calls[2:] == ["openrlhf.cli.train_rm"]
    list(prepare.reviews_steps(tmp_path, replace(settings, policy=replace(settings.policy, learning_rate=1e-4))))
    assert calls[3:] == ["openrlhf.cli.train_sft", "openrlhf.cli.train_rm"]


def test_a_run_that_failed_goes_on_where_it_was(
    prepare: ModuleType, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, calls = quick
    working = prepare.models.train

    def fails(module: str, *args: Any, **flags: Any) -> None:
        if module.endswith("train_rm"):
            raise prepare.models.TrainingError("stopped")
        working(module, *args, **flags)

    with monkeypatch.context() as patched:
        patched.setattr(prepare.models, "train", fails)
        with pytest.raises(prepare.models.TrainingError):
            list(prepare.reviews_steps(tmp_path, settings))
    assert not (tmp_path / "prepared.json").exists()
    list(prepare.reviews_steps(tmp_path, settings))
    assert calls == ["openrlhf.cli.train_sft", "openrlhf.cli.train_rm"]
    assert set(json.loads((tmp_path / "prepared.json").read_text())) == {
        "prompts",
        "reward",
        "model",
        "reward_model",
        "samples",
    }


# The noise scale.


@pytest.fixture
def noise_scale(prepare: ModuleType) -> ModuleType:
    return load(RECIPES / "miniature" / "noise_scale.py")


def test_noise_scale_of_gradients_that_are_known(noise_scale: ModuleType) -> None:
    """Signal 4 and noise 50 in every batch; the other method has half the signal, 1, and the same noise."""
    import torch

    torch.manual_seed(0)
    batches, size, mean = 100, 200, torch.zeros(200, dtype=torch.float64)
    mean[:4] = 1.0
    noise = 0.5 * torch.randn(batches, size, dtype=torch.float64)
    clear, faint = mean + noise, mean / 2 + noise
    found = noise_scale.noise_scale(clear @ clear.T)
    assert found.signal == pytest.approx(4, rel=0.1) and found.noise == pytest.approx(50, rel=0.05)
    assert found.ratio == pytest.approx(4 / 50, rel=0.1)
    beside, low, high = noise_scale.compare(faint @ faint.T, clear @ clear.T)
    assert low < 0.25 < high and 0.15 < beside < 0.4 and high - low < 0.3
    assert noise_scale.compare(clear @ clear.T, clear @ clear.T) == pytest.approx([1, 1, 1])
    assert noise_scale.compare(noise[:4] @ noise[:4].T, clear[:4] @ clear[:4].T) is None
    with pytest.raises(ValueError, match="two batches"):
        noise_scale.noise_scale(torch.ones(1, 1))


def test_every_method_has_as_many_responses(noise_scale: ModuleType) -> None:
    import torch

    rewards = torch.tensor([[3.0, 1, 2, 5, 4, 6, 0.5, 2.5]], dtype=torch.float64)
    cached = torch.arange(8, dtype=torch.float64)[None]
    log_probs = torch.full((1, 8, 2), -10.0, dtype=torch.float64)

    def of(known: Any, moved: bool = False) -> dict[str, Any]:
        named = noise_scale.methods("rewards.jsonl", moved)
        return {name: noise_scale._per_token(weights(known))[0] for name, weights in named.items()}

    known = noise_scale.Known(rewards, cached, log_probs, torch.zeros_like(log_probs))
    made = {name: weights[:, 0] for name, weights in of(known).items()}
    # REINFORCE by hand: reward minus the mean of the other seven, an eighth of it.
    assert made["REINFORCE"].tolist() == pytest.approx([(r - (24 - r) / 7) / 8 for r in rewards[0].tolist()])
    # The best of the last two, the anchor's, and of the last four; and nothing of the policy's without a backward KL.
    paper = "J-BOND, Algorithm 2, beta"
    assert made[f"{paper} 0"].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert made[f"{paper} 1"][6:].tolist() == [0, 0]
    assert made["BOND, n = 4, 4 + 4, beta 0.5"][4:].tolist() == [0, 0.5, 0, 0]
    half = (made[f"{paper} 0"] + made[f"{paper} 1"]) / 2
    assert made[f"{paper} 0.5"].tolist() == pytest.approx(half.tolist())
    # Pooled, where the policy still is the anchor: twice the share of the others that are worse, less one.
    worse = (rewards[0].unsqueeze(1) > rewards[0]).sum(dim=1)
    assert made["pooled J-BOND, N = 2, beta 0"].tolist() == pytest.approx(((2 * worse / 7 - 1) / 8).tolist())
    # Once it has moved, whole log-ratios and those to come differ in the last token, and there alone by the first's.
    log_ratios = torch.rand(1, 8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = of(noise_scale.Known(rewards, cached, log_probs, log_ratios), moved=True)
    to_go, whole = moved["pooled J-BOND, N = 2, beta 1"], moved["pooled J-BOND, N = 2, beta 1, whole log-ratio"]
    torch.testing.assert_close(to_go[:, 0], whole[:, 0])
    assert not torch.allclose(to_go[:, 1], whole[:, 1])
    # A higher reward never has a smaller weight.
    for name in ("vBoN, N = 4", "vBoN, N = 16"):
        assert (made[name][rewards[0].argsort()].diff() >= 0).all() and made[name].sum().abs() < 1e-9


def test_noise_scale_from_the_command_line(
    prepare: ModuleType,
    noise_scale: ModuleType,
    quick: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("BOND_REVIEWS_DIR", "elsewhere")
    list(prepare.reviews_steps(tmp_path, quick[0]))
    prompts = [row["input"] for row in prepare.read_rows(tmp_path / "train.jsonl")]
    with pytest.raises(SystemExit):
        noise_scale.main([str(tmp_path)])
    assert "made by `bond cache`" in capsys.readouterr().err
    prepare.write_rows(
        tmp_path / "rewards-8.jsonl",
        ({"prompt": prompt, "rewards": [i / 9 - 1 for i in range(9)]} for prompt in prompts),
    )
    with pytest.raises(SystemExit, match="16 batches of 64 prompts are more than the 20"):
        noise_scale.main([str(tmp_path)])
    flags = [str(tmp_path), "--batches", "4", "--prompts", "5", "--output", str(tmp_path / "found")]
    noise_scale.main(flags)
    first = prepare.read_rows(tmp_path / "found" / "noise_scale.jsonl")
    assert [row["method"] for row in first] == list(noise_scale.methods("x"))
    noise_scale.main(flags)
    assert prepare.read_rows(tmp_path / "found" / "noise_scale.jsonl") == first

    # The gradient of one response, alone and without padding, is what it is in a batch.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", padding_side="right")  # as the host saves it
    prompts.sort(key=lambda prompt: -len(tokenizer(prompt)["input_ids"]))
    prompts = [prompts[0], prompts[-1], prompts[1]]
    assert len(tokenizer(prompts[1])["input_ids"]) < len(tokenizer(prompts[2])["input_ids"])
    drawn = noise_scale.Drawn(model, tokenizer, prompts)
    row = 13  # of the second prompt
    weights = torch.zeros(24, dtype=torch.float64)
    weights[row] = 2.0
    batched = drawn.gradient(model, weights)
    prompt = tokenizer(prompts[1], return_tensors="pt")["input_ids"]
    response = drawn.ids[row, -noise_scale.NEW_TOKENS :][drawn.trained[row].bool()][None]
    model.zero_grad()
    logits = model(torch.cat([prompt, response], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
    (2 * logits.log_softmax(dim=-1).gather(-1, response.T).sum()).backward()
    alone = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    assert torch.allclose(batched, alone, atol=1e-5) and alone.norm() > 0.1
    assert drawn.texts[row] == tokenizer.decode(torch.cat([prompt, response], dim=1)[0])


# The host.


@pytest.mark.e2e
def test_the_hosts_train_sft_teaches_a_random_model(prepare: ModuleType, tmp_path: Path) -> None:
    import torch
    from miniature import models
    from transformers import AutoModelForCausalLM

    base, model = tmp_path / "base", tmp_path / "model"
    models.text_tokenizer(base, TEXTS, 300)
    models.random_model(base, hidden=64, layers=1, seed=0)
    prepare.write_rows(tmp_path / "lessons.jsonl", ({"text": text + models.EOS} for text in TEXTS))
    models.train(
        "openrlhf.cli.train_sft",
        model,
        tmp_path / "sft.log",
        model__model_name_or_path=base,
        model__pretrain_mode_enable=True,
        data__dataset=tmp_path / "lessons.jsonl",
        data__input_key="text",
        data__max_len=64,
        train__batch_size=16,
        train__micro_batch_size=16,
        adam__lr=1e-2,
    )
    before, after = models.perplexity(base, TEXTS[:4]), models.perplexity(model, TEXTS[:4])
    assert 200 < before < 450 and after < 0.6 * before
    assert AutoModelForCausalLM.from_pretrained(model).dtype == torch.bfloat16


@pytest.mark.e2e
def test_a_failing_command_shows_the_end_of_its_log(prepare: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(prepare.models.TrainingError, match="no_such_flag"):
        prepare.models.train("openrlhf.cli.train_sft", tmp_path / "model", tmp_path / "sft.log", no_such_flag=1)
    assert not (tmp_path / "model").exists()


def test_where_jbond_comes_to_rest() -> None:
    """The closed form against a policy over 4,000 responses, moved until its advantages are all the same."""
    import torch

    stationary = load(RECIPES / "miniature" / "stationary.py")
    reference = torch.full((4000,), 1 / 4000, dtype=torch.float64)
    policy = reference.clone()
    for _ in range(400):
        own = policy.cumsum(0) - policy / 2
        pull = own + 0.5 * stationary.log_quantile(own, 8)  # beta 0.5, N = 2
        wanted = torch.softmax(reference.log() + pull / 0.6, dim=0)
        policy = 0.8 * policy + 0.2 * wanted
    kl = (policy * (policy / reference).log()).sum().item()
    win_rate = (policy * (torch.arange(4000) + 0.5) / 4000).sum().item()
    assert stationary.at_rest(0.6) == (pytest.approx(kl, abs=5e-3), pytest.approx(win_rate, abs=1e-3))
    assert win_rate < stationary.front().at(kl).item() < 1
    assert stationary.front().at(0.0).item() == pytest.approx(0.5, abs=1e-3)


def test_what_is_forgotten_is_measured_exactly_and_divergences_keep_variety() -> None:
    import torch

    forgetting = load(RECIPES / "miniature" / "forgetting.py")
    task = forgetting.Task.make(0)
    torch.testing.assert_close(task.log_ref.logsumexp(dim=-1), torch.zeros(64, dtype=torch.float64))
    start = forgetting.measure(task, task.log_ref)
    assert (start.lost, start.forgotten, start.narrowed) == (0, 0, pytest.approx(0, abs=1e-12))
    wrong = 1 - (task.log_ref.exp() * task.right).sum(dim=-1)
    all_wrong = wrong.clone()
    for _ in range(forgetting.K - 1):
        all_wrong = all_wrong * wrong
    assert start.pass_k == pytest.approx(1 - all_wrong.mean().item())
    assert (wrong[task.solved] < 0.5).all() and 0.2 < task.solved.double().mean() < 0.35
    one = task.right * task.log_ref.argsort(dim=-1)  # one right response in the place of all that are right
    place = one.argmax(dim=-1, keepdim=True)
    certain = torch.full_like(task.log_ref, -30.0).scatter(1, place, 0.0)
    narrow = forgetting.measure(task, certain)
    assert (narrow.pass_1, narrow.pass_k, narrow.forgotten) == (pytest.approx(1), pytest.approx(1), 0)
    assert narrow.narrowed > 5
    found = {
        name: forgetting.train(forgetting.METHODS[name], task, 60, seed=0)
        for name in ("GRPO", "GRPO, KL 0.3", "DPH, Jensen-Shannon, eta 10.0")
    }
    assert all(outcome.pass_1 > start.pass_1 + 0.2 for outcome in found.values())
    grpo, pulled, dph = (outcome.narrowed for outcome in found.values())
    assert grpo > 2 * pulled > 2 * dph


def test_a_teacher_helps_on_held_out_prompts_and_costs_on_practised_ones() -> None:
    teachers = load(RECIPES / "miniature" / "teachers.py")
    practice, held_out = teachers.lessons(0)
    assert practice.features.shape[0] == 64 and held_out.features.shape[0] == 512
    assert held_out.right_share(held_out.log_ref) > 0.5
    found = {}
    for name in ("GRPO", "KDRL, 0.5 to 0.1", "the teacher alone"):
        config, rewarded = teachers.METHODS[name]
        weights = teachers.train(config, practice, rewarded, seed=0)
        found[name] = [part.right_share(part.log_probs(weights)) for part in (practice, held_out)]
    practised, kept = zip(*found.values(), strict=True)
    assert practised[0] > practised[1] + 0.02 > practised[2] + 0.1
    assert kept[0] < kept[2]
    assert min(kept) > 2 / 16  # twice what the student had at the start
