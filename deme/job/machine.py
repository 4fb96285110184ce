"""The processor, and the memory of this process."""

import ctypes
import platform
import re
import sys
from pathlib import Path

INSTRUCTION_SETS = ("amx_bf16", "avx512_bf16", "bf16", "avx512f", "avx2")  # as Linux names them, the strongest first


def processor() -> str:
    """The processor's name and its strongest instruction set, which rounding and speed depend on."""
    told = _proc("cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", told)
    flags = re.search(r"(?:flags|Features)\s*:\s*(.+)", told)
    strongest = next((f" ({one})" for one in INSTRUCTION_SETS if flags and one in flags[1].split()), "")
    return (name[1] if name else platform.processor() or platform.machine()) + strongest


def computes_in_bf16() -> bool:
    """True if oneDNN multiplies bfloat16 by the processor's own instructions; emulated it is slower than float32."""
    return _onednn_takes_bf16() and (processor().endswith("bf16)") or not _proc("cpuinfo"))


def can_pack(in_bf16: bool) -> bool:
    """True if oneDNN takes convolutions in bfloat16, or in float32."""
    import torch

    return torch.backends.mkldnn.is_available() and (not in_bf16 or _onednn_takes_bf16())


def _onednn_takes_bf16() -> bool:
    import torch

    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _proc(name: str) -> str:
    """A file of Linux's /proc; empty if there is none."""
    file = Path("/proc") / name
    return file.read_text() if file.exists() else ""


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
        import torch

        return torch.cuda.max_memory_allocated()
    match = re.search(r"VmHWM:\s*(\d+) kB", _proc("self/status"))
    return 1024 * int(match[1]) if match else 0
