"""What the host and vLLM need on a machine without GPU. Nothing here runs when there is one.

OpenRLHF uses ``torch.cuda`` as its device interface throughout, imports flash-attn unconditionally, and
sends weights to vLLM over NCCL; vLLM's CPU build prepacks weights at load, which would keep the old ones
after an update. Each function below mends one of these, and is named for what it replaces. On processors
without bf16 instructions, matrix products go through fp32, which is several times faster there.
"""

from __future__ import annotations

import datetime
import operator
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NEEDS_FLASH_ATTN = "openrlhf.models.ring_attn_utils"

updates = 0  # of the weights of this process's engine

#: Environment of every process of a run on CPU.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the Ray actor, where the hooks are
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    # Threads that wait must sleep: Ray runs several processes, and a spinning one holds up all the others.
    "OMP_WAIT_POLICY": "passive",
    # oneDNN and torch each keep the kernels of the last 1,024 shapes, a new one for each number of tokens in a batch:
    # 0.3 GB or more in vLLM's engine, over the first thousand steps. To make one anew takes half a millisecond.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}


def patch_torch() -> None:
    """Let ``torch.cuda``'s device calls answer for the CPU, as soon as torch is imported.

    ``torch.cuda.is_available()`` stays False: code that asks is told the truth.
    """
    import torch

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: None
    if not native_bf16():
        torch.nn.functional.linear = _linear_through_fp32(torch.nn.functional.linear)


@contextmanager
def flash_attn_stand_in() -> Iterator[None]:
    """What the host takes from flash-attn, for the duration of one import: packing in torch, no ring attention.

    Afterwards ``import flash_attn`` fails again, as it must: the host takes that as the sign to compute
    log-probabilities without its CUDA kernel. Packed rows come to transformers with position ids that begin anew at
    each row and no attention mask, from which it makes a mask itself (``find_packed_sequence_indices``).
    """
    from einops import rearrange
    from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input

    names: dict[str, dict[str, Any]] = {
        "flash_attn": {},
        "flash_attn.bert_padding": {
            "index_first_axis": operator.getitem,
            "pad_input": _pad_input,
            "rearrange": rearrange,
            "unpad_input": _unpad_input,
        },
        "flash_attn.utils": {},
        "flash_attn.utils.distributed": {"all_gather": None},  # of ring attention, which needs a GPU
    }
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]  # transformers may have looked at one that is installed
    for name, functions in names.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(functions)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules["flash_attn"] = None  # where it is installed too: its kernels are for GPUs alone


def torch_adam(original: Any, self: Any, optim_dict: Any = None, *, max_norm: Any = None) -> dict:
    """DeepSpeed's configuration with torch's own fused Adam: its CPU Adam would be compiled first (minutes).

    With Muon too, where Adam has what is no matrix.
    """
    config = original(self, optim_dict, max_norm=max_norm)
    optimizer = config.get("optimizer")
    if optimizer and optimizer["type"] in ("AdamW", "Muon"):
        optimizer["params"] = {**optimizer["params"], "torch_adam": True, "fused": True}
    return config


def offer_fp32(parser: Any) -> None:
    """Without bf16 instructions fp32 is faster: the host's commands that train without vLLM may have it."""
    action = parser._option_string_actions.get("--ds.param_dtype")
    if action is not None and action.choices and "fp32" not in action.choices:
        action.choices = [*action.choices, "fp32"]


def torch_dtype(original: Any, param_dtype: str) -> Any:
    """``--ds.param_dtype fp32``; DeepSpeed does without 16-bit weights then, as the host sets neither flag."""
    import torch

    return torch.float32 if param_dtype == "fp32" else original(param_dtype)


def moving_average(original: Any, self: Any, model: Any, model_ema: Any, beta: float = 0.992, device: Any = None):
    """The host's own average (``--train.enable_ema``) names the device "cuda"."""
    return original(self, model, model_ema, beta, "cpu")


def replay_buffer_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """The buffer builds the device name "cuda:" + current_device()."""
    import torch

    current = torch.cuda.current_device
    torch.cuda.current_device = lambda: 0
    try:
        original(self, *args, **kwargs)
    finally:
        torch.cuda.current_device = current
    self.target_device = torch.device("cpu")


class GlooGroup:
    """The part of vLLM's NCCL communicator that weight sync uses, over gloo.

    Without it NCCL turns itself off and the engine keeps uninitialised weights.
    """

    def __init__(
        self, original: Any, master_address: str, master_port: int, rank: int, world_size: int, device: Any
    ) -> None:
        from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

        timeout = datetime.timedelta(minutes=30)
        store = TCPStore(master_address, master_port, world_size, is_master=rank == 0, timeout=timeout)
        self._group = ProcessGroupGloo(PrefixStore("bond", store), rank, world_size, timeout)
        self._store = store

    def broadcast(self, tensor: Any, src: int, stream: Any = None) -> None:
        import torch
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        data = tensor.detach().contiguous()
        self._group.broadcast([data.view(-1).view(torch.uint8)], options).wait()
        if data.data_ptr() != tensor.data_ptr():
            tensor.data.copy_(data)


def no_shm_op(original: Any) -> None:
    """DeepSpeed's shared-memory all-reduce is a C++ extension compiled at run time; gloo serves."""
    return None


def gather_one_by_one(
    original: Any, self: Any, param_list: list[Any], hierarchy: int = 0, quantize: bool = False
) -> None:
    """ZeRO-3's all-gather of several parameters, each waited for.

    DeepSpeed waits for the last one alone, by when NCCL has done the others. Gloo may not have: the next forward
    pass then read memory that nothing had been written to.
    """
    if quantize:
        original(self, param_list, hierarchy, quantize)
    else:
        self._allgather_params_sequential(param_list, hierarchy)


def live_linear(original: Any, layer: Any, remove_weight: bool) -> None:
    """vLLM's CPU linear layers keep their weight as it is, so that an update is seen.

    Without bf16 instructions they multiply by an fp32 copy, made anew after each update.
    """
    import torch

    if native_bf16() or layer.weight.dtype != torch.bfloat16 or layer.weight.ndim != 2:
        layer.cpu_linear = torch.nn.functional.linear
        return
    made: list[Any] = [None, -1]  # the copy, and the update it was made after

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        if made[1] != updates:
            made[:] = [weight.detach().as_subclass(torch.Tensor).float(), updates]
        bias = None if bias is None else bias.float()
        return torch.nn.functional.linear(x.float(), made[0], bias).to(x.dtype)

    layer.cpu_linear = linear


def native_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware. Elsewhere fp32 is several times faster."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _linear_through_fp32(original: Any) -> Any:
    """``torch.nn.functional.linear`` that multiplies bf16 operands in fp32 and rounds the result once.

    The same numbers up to rounding (bf16 kernels accumulate in fp32 as well), from kernels that are fast.
    """
    import functools

    import torch

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, bias: Any) -> Any:
            ctx.save_for_backward(x, weight)
            ctx.has_bias = bias is not None
            return original(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            x, weight = ctx.saved_tensors
            rows = grad.reshape(-1, grad.shape[-1]).float()
            x_needs, weight_needs, bias_needs = ctx.needs_input_grad
            of_x = (rows @ weight.float()).reshape(x.shape).to(x.dtype) if x_needs else None
            of_weight = (rows.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype) if weight_needs else None
            of_bias = rows.sum(0).to(weight.dtype) if ctx.has_bias and bias_needs else None
            return of_x, of_weight, of_bias

    @functools.wraps(original)
    def linear(input: Any, weight: Any, bias: Any = None) -> Any:
        if input.dtype == weight.dtype == torch.bfloat16 and input.device.type == "cpu" and weight.ndim == 2:
            return Linear.apply(input, weight, bias)
        return original(input, weight, bias)

    return linear
