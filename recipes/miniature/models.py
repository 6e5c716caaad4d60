"""Small models: their tokenizers, random weights to start from, the host's training commands, and measurements."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EOS, PAD = "<|end|>", "<|pad|>"  # recipes/reviews/reward.py drops what looks like this
HEAD_SIZE = 32  # the smallest that vLLM's attention on CPU has
CONTEXT_LENGTH = 128
_BATCH = 64
_TAIL = 25  # lines of a log that are shown when a command fails


class TrainingError(RuntimeError):
    """A training command of the host failed. The message ends with the end of its log."""


def text_tokenizer(directory: Path, texts: Iterable[str], size: int) -> None:
    """Train a byte-level BPE tokenizer with ``size`` entries on ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _save_tokenizer(tokenizer, directory)


def character_tokenizer(directory: Path, characters: str) -> None:
    """A tokenizer with one entry a character. It drops spaces: the host puts one before the EOS token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.normalizer = normalizers.Replace(" ", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    _save_tokenizer(tokenizer, directory)


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


def random_model(directory: Path, hidden: int, layers: int, seed: int) -> int:
    """Put a Llama with random weights beside the tokenizer in ``directory``; returns its number of parameters."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 32) * 32,
        hidden_size=hidden,
        intermediate_size=math.ceil(hidden * 8 / 3 / 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=hidden // HEAD_SIZE,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return model.num_parameters()


def train(module: str, output: Path, log: Path, **flags: Any) -> None:
    """Run one of the host's training commands on this machine and leave its model, in bf16, in ``output``.

    Args:
        module: ``openrlhf.cli.train_sft`` or ``openrlhf.cli.train_rm``.
        output: a folder; it appears when it is complete.
        log: what the command prints.
        flags: its flags, ``__`` for the dot; True for a switch.

    Raises:
        TrainingError: the command failed.
    """
    import torch

    work = output.with_name(output.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "bond_plugin.host.run", module, "--ckpt.output_dir", str(work)]
    here = {"ds__zero_stage": 0, "ds__attn_implementation": "sdpa", "train__micro_batch_size": 32}
    if not torch.cuda.is_available():
        here["ds__param_dtype"] = "fp32"  # see bond_plugin.host.run
    for name, value in {**here, **flags}.items():
        option = "--" + name.replace("__", ".")
        argv += [option] if value is True else [option, str(value)]
    with log.open("w") as file, tempfile.TemporaryDirectory() as cache:
        # Sums over another number of threads round otherwise, and after some thousand steps the model is another one.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": cache, "OMP_NUM_THREADS": "2"}
        status = subprocess.run(argv, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if status != 0 or not (work / "model.safetensors").exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        raise TrainingError(f"{module} ended with status {status}; the end of {log}:\n{tail}")
    _to_bf16(work / "model.safetensors", work / "config.json")
    shutil.rmtree(output, ignore_errors=True)
    os.replace(work, output)


def _to_bf16(weights: Path, config: Path) -> None:
    """Round to what training and vLLM load anyway, so that the initial policy is the same everywhere."""
    import torch
    from safetensors.torch import load_file, save_file

    said = json.loads(config.read_text())
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    if said["tie_word_embeddings"]:
        rounded.pop("lm_head.weight", None)  # the host writes the embedding twice
    save_file(rounded, weights, metadata={"format": "pt"})
    config.write_text(json.dumps({**said, "dtype": "bfloat16"}, indent=2) + "\n")


def _batches(directory: Path, texts: Sequence[str], side: str) -> Iterable[Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side=side)
    for start in range(0, len(texts), _BATCH):
        part = list(texts[start : start + _BATCH])
        yield tokenizer(part, return_tensors="pt", padding=True, add_special_tokens=False)


def perplexity(directory: Path, texts: Sequence[str]) -> float:
    """exp of the mean negative log-probability of a token, given those before it; the first is only given."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for batch in _batches(directory, texts, "right"):
        with torch.inference_mode():
            log_probs = model(**batch).logits[:, :-1].log_softmax(-1)
        found = log_probs.gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
        mask = batch["attention_mask"][:, 1:]
        total -= (found * mask).sum().item()
        count += int(mask.sum())
    return math.exp(total / count)


def sample(directory: Path, prompts: Sequence[str], n: int, new_tokens: int, seed: int) -> list[list[str]]:
    """``n`` responses to each prompt, drawn from the model's own distribution; without EOS and padding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    torch.manual_seed(seed)
    drawn: list[str] = []
    for batch in _batches(directory, [prompt for prompt in prompts for _ in range(n)], "left"):
        with torch.inference_mode():
            tokens = model.generate(**batch, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=new_tokens)
        tokens = tokens[:, batch["input_ids"].shape[1] :]
        drawn += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [drawn[i : i + n] for i in range(0, len(drawn), n)]


def scores(directory: Path, texts: Sequence[str]) -> Tensor:
    """The rewards that the reward model in ``directory`` gives to whole texts, float32 [len(texts)]."""
    import torch
    from transformers import AutoModelForSequenceClassification

    # The host's layout of a reward model, a Llama with one row in `score`, is that of this class.
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.cat([model(**batch).logits[:, 0] for batch in _batches(directory, texts, "right")])
