"""The accelerator that every launched script works with; how its processes share a batch and agree."""

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
from torch import distributed

from deme.config import RunError, Training, UserError
from deme.locks import locked

Result = TypeVar("Result")


def make_accelerator(mixed_precision: str, key: str) -> Accelerator:
    """
    Args:
        mixed_precision: no, fp16 or bf16.
        key: the configuration key it comes from, for the error.

    Raises:
        UserError: fp16 on a CPU, which accelerate would accept silently; a port that another program uses.
    """
    # the training loop accumulates by itself; without the plugin accelerate takes a divisor from the environment
    plugin = GradientAccumulationPlugin(num_steps=1)
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_plugin=plugin)
    except distributed.DistNetworkError as error:
        port = os.environ.get("MASTER_PORT")
        raise UserError(f"MASTER_PORT={port}: the processes can't meet there: {' '.join(str(error).split())}") from None
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError(f"{key}=fp16: needs a GPU; on a CPU use no or bf16")
    return accelerator


def check_shares(processes: int, settings: Training) -> None:
    """
    Raises:
        UserError: the processes can't share the micro-batches of a step equally.
    """
    section, size = settings.section, settings.micro_batch_size or settings.batch_size
    micro_batches = settings.batch_size // size
    if micro_batches % processes:
        share, rest = divmod(settings.batch_size, processes)
        remedy = f"a batch_size that is a multiple of {processes}" if rest else f"micro_batch_size={share} or a divisor"
        raise UserError(
            f"{section}.micro_batch_size={settings.micro_batch_size}: {section}.batch_size={settings.batch_size} makes "
            f"{micro_batches} micro-batches of {size}, which {processes} processes can't share equally: set {remedy}"
        )


def in_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What `work` returns in the main process, in every process; where it raises an error, all stop."""
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except (UserError, RunError) as caught:
            error = caught
    result, status = broadcast_object_list([result, error and error.status])
    if error is not None:
        raise error
    if status is not None:
        sys.exit(status)  # the main process says why
    return result


@contextmanager
def locked_by_all(accelerator: Accelerator, output: Path, key: str) -> Iterator[None]:
    """`locks.locked` for all processes of a job: the main process holds it."""
    with ExitStack() as held:
        in_main_process(accelerator, lambda: held.enter_context(locked(output, key)))
        yield


def keep_freed_memory() -> None:
    """Have the C library (glibc) keep what is freed for the next allocation, instead of giving it back to the system.

    A training step frees and allocates gradients and activations anew; on a CPU clearing new pages for them took more
    than a tenth of it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has allocated on a GPU; on a CPU, the most that this process has had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Agreement:
    """A number that all processes see at the same optimizer step, without waiting for the device.

    Several processes reduce it on the CPU while a step runs, and read it after the next one.
    """

    def __init__(self):
        self.group = distributed.new_group(backend="gloo") if distributed.is_initialized() else None
        self.work, self.value = None, torch.zeros((), dtype=torch.int64)

    def __call__(self, wish: int) -> int:
        """The greatest wish of all processes; with several processes, of the call before."""
        if self.group is None:
            return wish
        agreed = self.close()
        self.value = torch.tensor(wish)
        self.work = distributed.all_reduce(self.value, distributed.ReduceOp.MAX, self.group, async_op=True)
        return agreed

    def close(self) -> int:
        """Wait for what is under way."""
        if self.work is not None:
            self.work.wait()
        self.work = None
        return int(self.value)
