"""Imported first by each worker: the device that it runs on, and the hooks armed for it."""

import os

DEVICE = os.environ.setdefault("BOND_DEVICE", "cpu")
BACKEND = "nccl" if DEVICE == "cuda" else "gloo"

from bond_plugin.host import cpu, hooks

if DEVICE == "cpu":
    os.environ.update(cpu.ENVIRONMENT)
hooks.arm()

import torch

if DEVICE == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
