"""A tiny model that adds, errs, and works out a masked number, for a real server of chains of thought."""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from conftest import clean_environment, torch_has_gpu

SMALL = range(1, 4)
QUESTIONS = [f"{a}+{b}" for a in SMALL for b in SMALL]
CHARACTERS = "abcdefghijklmnopqrstuvwxyzTW0123456789+-.?= \n"


def lessons() -> list[tuple[str, str]]:
    """What a prompt is answered with: sums, two right to three that are one too many; masked numbers, rightly."""
    from bond_plugin.rewards.fobar import BACKWARD_QUESTION

    made = []
    for a in SMALL:
        for b in SMALL:
            made += [(f"{a}+{b}=", str(a + b))] * 2 + [(f"{a}+{b}=", str(a + b + 1))] * 3
        for answer in range(2, 8):
            for masked in (f"x+{a}", f"{a}+x"):
                asked = BACKWARD_QUESTION.format(masked=masked, answer=answer)
                made.append((f"{asked}=", str(answer - a)))
    return made


def make(folder: Path, steps: int = 150) -> float:
    """Train the model and write it, with tokenizer and chat template; returns the last loss, nats a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: i + 2 for i, letter in enumerate(CHARACTERS)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )
    tokenizer.chat_template = "{{ messages[-1]['content'] }}="
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config)
    rows = [(tokenizer(asked)["input_ids"], [*tokenizer(answer)["input_ids"], 1]) for asked, answer in lessons()]
    long = [row for row in rows if len(row[0]) > 8]
    batches = [_batch([row for row in rows if row not in long]), _batch(long)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps)
    for _ in range(steps):
        loss = sum(model(input_ids=tokens, labels=labels).loss for tokens, labels in batches) / 2
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.save_pretrained(folder)
    return loss.item()


def _batch(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    tokens = pad([torch.tensor(asked + answer) for asked, answer in rows])
    labels = pad([torch.tensor([-100] * len(asked) + answer) for asked, answer in rows], padding_value=-100)
    return tokens, labels


@contextmanager
def served(model: Path, folder: Path) -> Iterator[str]:
    """The address of vLLM's own server of a model."""
    from bond_plugin.host import cpu

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    here = {} if torch_has_gpu() else {**cpu.ENVIRONMENT, "BOND_DEVICE": "cpu", "BOND_ACTIVE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port),
               "--host", "127.0.0.1", "--enforce-eager", "--dtype", "float32", "--max-model-len", "128",
               "--max-num-seqs", "16"]  # fmt: skip
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=clean_environment(**here, OMP_NUM_THREADS="1"), cwd=folder
        )
    try:
        started = time.monotonic()
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() - started < 240, log.read_text()[-6000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
