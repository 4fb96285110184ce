"""The accelerator that every launched script works with, and how its processes share a batch."""

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from deme.config import Training, UserError


def make_accelerator(mixed_precision: str, key: str) -> Accelerator:
    """
    Args:
        mixed_precision: no, fp16 or bf16.
        key: the configuration key it comes from, for the error.

    Raises:
        UserError: fp16 on a CPU, which accelerate would accept silently.
    """
    # the training loop accumulates by itself; without the plugin accelerate takes a divisor from the environment
    accelerator = Accelerator(
        mixed_precision=mixed_precision, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1)
    )
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
