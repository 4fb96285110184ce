"""How the benchmarks measure: variants in turn, medians with their spread, and the machine's ceiling."""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from deme.job.processes import computes_in_bf16, peak_memory

INSTRUCTION_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")  # both to avx2: as on an older processor
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices of the matrix product
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**32}


def parse(description: str, **options: dict) -> argparse.Namespace:
    """Parse the options of every benchmark and its own ones: name → arguments of add_argument."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    for name, settings in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    return arguments


def has_bf16() -> bool:
    """True if the CPU has bf16 instructions and they are not disabled."""
    return computes_in_bf16() and not any(variable in os.environ for variable in INSTRUCTION_LIMITS)


def seconds(work: Callable[[], object], device: str) -> float:
    """Seconds that `work` takes, including its work on the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(contenders: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each variant. The variants take turns in rounds, so variations of the machine affect all alike."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats + 1):
        for name, work in contenders.items():
            taken = seconds(work, device)
            if number > 0:  # the first round warms up
                found[name].append(taken)
    return found


def ratios(reference: list[float], values: list[float]) -> list[float]:
    """Speed relative to the reference in the same round, which cancels variations of the machine."""
    return [first / second for first, second in zip(reference, values, strict=True)]


def spread(values: list[float], digits: int = 3) -> str:
    """The median and half the range."""
    return f"{number(statistics.median(values), digits)} ± {number((max(values) - min(values)) / 2, 1)}"


def number(value: float, digits: int) -> str:
    """A number with so many significant digits, and no exponent if more digits precede the point."""
    return f"{value:,.0f}" if value >= 10**digits else f"{value:.{digits}g}"


def memory_taken(device: str) -> int:
    """Bytes at the peak: what torch has reserved of a GPU; on a CPU, what this process has had resident."""
    return torch.cuda.max_memory_reserved() if device == "cuda" else peak_memory(device)


def ceiling(device: str) -> dict[str, float]:
    """The machine's own limits: FLOP/s of matrix products by type, bytes/s of a memory copy (read and written)."""
    size = MATRIX[device]
    found = {}
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" or has_bf16() else (torch.float32,):
        matrix = torch.randn(size, size, device=device).to(dtype)
        taken = alternate({"": lambda matrix=matrix: matrix @ matrix}, 5, device)[""]
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / statistics.median(taken)
    source = torch.randint(0, 256, (COPIED_BYTES[device],), dtype=torch.uint8, device=device)  # zeros may go faster
    target = torch.empty_like(source)
    taken = alternate({"": lambda: target.copy_(source)}, 5, device)[""]
    return found | {"copy": 2 * len(source) / statistics.median(taken)}


def ceiling_line(found: dict[str, float]) -> str:
    types = [name for name in ("float32", "bfloat16") if name in found]
    products = ", ".join(f"{found[name] / 1e12:.3g} TFLOP/s in {name}" for name in types)
    copy = f"memory copy {found['copy'] / 1e9:.3g} GB/s"
    return f"This machine's ceiling in the same run: matrix products {products}; {copy}."
