"""The accelerator that every launched script works with."""

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from deme.config import UserError


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
