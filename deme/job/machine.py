"""The machine under a process: its processor, and the memory that the process takes."""

import ctypes
import platform
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

INSTRUCTION_SETS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # the strongest first, as Linux names them


def processor() -> str:
    """The processor's name and its strongest instruction set, which rounding and speed depend on."""
    name = re.search(r"model name\s*:\s*(.+)", _proc("cpuinfo"))
    strongest = next((s for s in INSTRUCTION_SETS if s in (_flags() or ())), None)
    return (name[1] if name else platform.processor() or platform.machine()) + (f" ({strongest})" if strongest else "")


def computes_in_bf16() -> bool:
    """Whether the processor's own instructions, through oneDNN, multiply bfloat16; without them it is many times slower
    than float32, as oneDNN emulates it."""
    flags = _flags()
    return _onednn_takes_bf16() and (flags is None or not flags.isdisjoint(("amx_bf16", "avx512_bf16", "bf16")))


def can_pack(dtype: "torch.dtype | None") -> bool:
    """Whether oneDNN is there, and takes convolutions of a type; None: float32."""
    import torch

    return torch.backends.mkldnn.is_available() and (dtype is None or _onednn_takes_bf16())


def _onednn_takes_bf16() -> bool:
    import torch

    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _flags() -> set[str] | None:
    """The processor's instruction sets as Linux names them; None where it doesn't."""
    found = re.search(r"(?:flags|Features)\s*:\s*(.+)", _proc("cpuinfo"))
    return None if found is None else set(found[1].split())


def _proc(name: str) -> str:
    """A file of Linux's /proc; empty where there is none."""
    file = Path("/proc") / name
    return file.read_text() if file.exists() else ""


def keep_freed_memory() -> None:
    """Have the C library (glibc) keep what is freed for the next allocation, instead of giving it back to the system.

    A training step frees and allocates gradients and activations anew; on a CPU clearing new pages for them took more
    than a tenth of it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold = -1
        m_mmap_max = -4
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)


def peak_memory(device: "torch.device") -> int:
    """Bytes: the most that torch has allocated on a GPU; on a CPU, the most that this process has had resident."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if found := re.search(r"VmHWM:\s*(\d+) kB", _proc("self/status")):
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    # where Linux has this alone, it may be that of the process that started this one
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
