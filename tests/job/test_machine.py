import re
import subprocess
import sys

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import REPOSITORY

from deme.errors import UserError
from deme.job import processes
from deme.job.processes import computes_in_bf16, keep_freed_memory, peak_memory
from deme.job.records import processor


def test_the_processor_has_a_name_and_an_instruction_set():
    """One line, as records and tables show it."""
    assert re.fullmatch(r"[^\n()]+( \((amx_bf16|avx512_bf16|bf16|avx512f|avx2)\))?", processor())


def test_the_peak_is_no_less_than_what_is_held_now():
    keep_freed_memory()
    held = torch.ones(2**26)  # 256 MiB
    assert peak_memory("cpu") >= 0.99 * psutil.Process().memory_info().rss > held.nbytes


def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    held = torch.ones(2**28)  # 1 GiB
    program = "from deme.job.processes import peak_memory; print(peak_memory('cpu'))"
    started = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert 0 < int(started.stdout) < held.nbytes


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_cpu_says_what_precision_it_has(monkeypatch, capsys, has_bf16):
    """bf16 without instructions for it is warned of in one line; fp16's message names what works well here."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    processes.print_once.cache_clear()
    monkeypatch.setattr(processes, "computes_in_bf16", lambda: has_bf16)
    processes.make_accelerator("bf16", "sample.mixed_precision")
    AcceleratorState._reset_state(reset_partial_state=True)
    warning = "sample.mixed_precision=bf16: this CPU has no bf16 instructions and takes many times as long as with no\n"
    assert capsys.readouterr().out == ("" if has_bf16 else warning)
    with pytest.raises(UserError, match=f"=fp16: needs a GPU; on this CPU use {'bf16' if has_bf16 else 'no'}$"):
        processes.make_accelerator("fp16", "sample.mixed_precision")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_what_the_processor_reports_is_a_fact():
    assert computes_in_bf16() in (True, False)
