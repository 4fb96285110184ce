"""The accelerator of every launched script; how its processes share work and agree; their arithmetic and memory."""

import ctypes
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
from torch import distributed

from deme.errors import RunError, UserError, one_line
from deme.job.command import disconnect_all
from deme.job.files import locked
from deme.job.records import Arrays, processor, read_arrays, told_by_linux, write_arrays

Result = TypeVar("Result")
Processes = Accelerator  # what all packages know of accelerate: who am I, and how do all agree
print_once = cache(print)


def make_accelerator(mixed_precision: str, key: str) -> Accelerator:
    """The accelerator of a script, one per precision (no, fp16 or bf16), which comes from the setting `key`."""
    # the training loop accumulates by itself; without the plugin accelerate takes a divisor from the environment
    plugin = GradientAccumulationPlugin(num_steps=1)
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_plugin=plugin)
    except distributed.DistNetworkError as error:
        port = os.environ.get("MASTER_PORT")
        raise UserError(f"MASTER_PORT={port}: the processes can't meet there: {one_line(error)}") from None
    if accelerator.device.type == "cpu":
        if mixed_precision == "fp16":
            raise UserError(f"{key}=fp16: needs a GPU; on this CPU use {'bf16' if computes_in_bf16() else 'no'}")
        if mixed_precision == "bf16" and not computes_in_bf16() and accelerator.is_main_process:
            print_once(f"{key}=bf16: this CPU has no bf16 instructions and takes many times as long as with no")
    return accelerator


def in_main_process(processes: Processes, work: Callable[[], Result]) -> Result:
    """The result of `work` in the main process, for every process; if it raises an error, all stop."""
    result = error = None
    if processes.is_main_process:
        try:
            result = work()
        except (UserError, RunError) as caught:
            error = caught
    result, status = broadcast_object_list([result, error and error.status])
    if status is not None:
        disconnect_all()
    if error is not None:
        raise error
    if status is not None:
        sys.exit(status)  # the main process says why
    return result


def locked_by_all(processes: Processes, output: Path, key: str, wait: bool = False) -> AbstractContextManager[None]:
    """`locked` for all processes of a job; the main process holds the lock."""
    return locked(output, key, wait, partial(in_main_process, processes))


def kept(processes: Processes, file: Path, made_from: dict[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """The arrays in a file if they were made from this, else those of `make`, which are written.

    All processes get them; all call `make`, or none.
    """
    arrays = in_main_process(processes, lambda: read_arrays(file, made_from))
    if arrays is None:
        arrays = make()
        in_main_process(processes, lambda: write_arrays(file, arrays, made_from))
    return arrays


class Agreement:
    """A number that all processes see at the same optimizer step, without waiting for the device.

    Several processes reduce it on the CPU while a step runs, and read it after the next one.
    """

    def __init__(self):
        self.group = distributed.new_group(backend="gloo") if distributed.is_initialized() else None
        self.work: distributed.Work | None = None
        self.value = torch.zeros((), dtype=torch.int64)

    def __call__(self, wish: int) -> int:
        """The greatest wish of all processes; with several processes, of the call before."""
        if self.group is None:
            return wish
        agreed = self.close()
        self.value = torch.tensor(wish)
        self.work = distributed.all_reduce(self.value, distributed.ReduceOp.MAX, self.group, async_op=True)
        return agreed

    def close(self) -> int:
        """Wait for the reduction under way."""
        if self.work is not None:
            self.work.wait()
        self.work = None
        return int(self.value)


# --- arithmetic and memory


def can_pack(in_bf16: bool) -> bool:
    """True if oneDNN takes convolutions in bfloat16, or in float32."""
    return torch.backends.mkldnn.is_available() and (not in_bf16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def computes_in_bf16() -> bool:
    """True if oneDNN multiplies bfloat16 by the processor's own instructions; emulated it is slower than float32."""
    return can_pack(in_bf16=True) and (processor().endswith("bf16)") or not told_by_linux("cpuinfo"))


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next allocation, instead of giving it back to the system.

    A training step on a CPU allocates gradients and activations anew; clearing new pages took a tenth of it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)


def peak_memory(device_type: str) -> int:
    """Bytes: the most that torch has allocated on a GPU; on a CPU, the most that this process has had resident.

    0 if the system does not tell.
    """
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    match = re.search(r"VmHWM:\s*(\d+) kB", told_by_linux("self/status"))
    return 1024 * int(match[1]) if match else 0
