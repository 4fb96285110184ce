"""The two calls that measure a GPU, as far as a CPU can tell."""

import json
import subprocess
import time
from importlib import metadata

import pytest
import torch
from conftest import environment
from packaging.requirements import Requirement
from test_scripts import run_script, script_command

from benchmarks import gpu_cells, gpu_first
from benchmarks.gpu_cells import BF16, Machine
from benchmarks.gpu_first import Cell, run, tables
from scripts import first_numbers, missing_wheels


def test_a_line_stands_as_soon_as_it_is_known_whatever_comes_later(tmp_path, monkeypatch):
    """One that would take too long is left out; an error is a line; what is wrong or failed is named at the end."""
    monkeypatch.setattr(gpu_first, "START", time.monotonic())
    file = tmp_path / "cells.jsonl"

    def look() -> dict:
        return {"lines before": len(file.read_text().splitlines())}

    def fail() -> dict:
        raise torch.OutOfMemoryError("no memory")

    planned = [Cell("call, a", 1, look), Cell("call, b", 99, look), Cell("training, c", 1, fail)]
    planned += [Cell("images, d", 1, lambda: {"grey levels": 9.0, "wrong": True}), Cell("call, e", 1, look)]
    assert run(planned, 50, file) == ["training, c", "images, d"]
    rows = gpu_first.read(file)
    assert [row["cell"] for row in rows] == ["imports", "call, a", "call, b", "training, c", "images, d", "call, e"]
    assert rows[1]["lines before"] == 1
    assert rows[5]["lines before"] == 5
    assert "left out" in rows[2]
    assert rows[3]["error"] == "OutOfMemoryError: no memory"
    shown = tables(rows)
    assert "| call, a | 1 |" in shown
    assert "| images, d | 9 | True |" in shown
    assert shown.count("call, b") == shown.count("training, c") == 1


def test_every_cell_has_its_place_and_a_name_of_its_own():
    for quick in (True, False):
        names = [cell.name for cell in gpu_first.cells(Machine(quick))]
        assert names[0] == "machine"
        assert len(set(names)) == len(names)
    likely = sum(cell.seconds for cell in gpu_first.cells(Machine(quick=False)) if "compiled" not in cell.name)
    assert likely <= 310  # an estimate above what it mostly takes; what does not fit into 250 s comes last


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_cpu_agrees_with_itself(precision):
    """Within the bounds for a GPU, and without any difference in float32."""
    machine = Machine(quick=True)
    images, gradients = machine.compare_images(precision), machine.compare_gradients(precision)
    assert not images.pop("wrong")
    assert not gradients.pop("wrong")
    if precision == "no":
        assert not any([*images.values(), *gradients.values()])


def test_images_are_drawn_in_each_way():
    speeds = Machine(quick=True).draw("CIFAR-10", images=2, batch=2, steps=2)
    assert min(speeds.values()) > 0
    assert {"DDIMPipeline", "two calls", "sample_ddp.py"} < speeds.keys()


def test_what_differs_is_called_wrong(monkeypatch):
    calls = []

    def freeze(network, device, precision):
        calls.append(precision)
        if len(calls) == 1:  # the device's
            for parameter in network.parameters():
                parameter.data.mul_(1.1)
        return network

    monkeypatch.setattr(gpu_cells, "freeze", freeze)
    assert Machine(quick=True).compare_images("no")["wrong"]


def test_a_call_is_counted_in_operations():
    """The rate is that of the network's operations: more of them in a larger network, none of them measured twice."""
    machine = Machine(quick=True)
    found = machine.call("CIFAR-10", BF16._replace(precision="no"))
    _, batch = machine.networks["CIFAR-10"]
    assert found["TFLOP/s"] == pytest.approx(machine.flops("CIFAR-10") * batch / (found["ms"] / 1e3) / 1e12)
    assert found["images/s"] == pytest.approx(batch / (found["ms"] / 1e3))


def test_packages_are_missing_with_what_they_need(monkeypatch):
    """Followed through Requires-Dist, from what is missing; of this Python from what is there, too."""
    present = set(missing_wheels.installed())
    wanted = [Requirement("datasets==1.0"), Requirement("numpy")]
    without = present - {"datasets", "dill", "multiprocess"}
    found = missing_wheels.missing(wanted, without, here=False)
    assert found == [f"{name}=={metadata.version(name)}" for name in ("datasets", "dill", "multiprocess")]
    assert missing_wheels.missing(wanted, present - {"dill"}, here=False) == []  # another's datasets has what it needs
    [line] = missing_wheels.missing(wanted, present - {"dill"}, here=True)
    assert line.startswith("dill")
    assert missing_wheels.missing(missing_wheels.pinned(), present, here=True) == []


def test_a_list_of_packages_is_read_in_both_forms(tmp_path):
    file = tmp_path / "packages.txt"
    file.write_text("Pillow==13.0.0\nscikit_learn\n# note\n\nPyYAML==6.0\n")
    assert missing_wheels.listed(file).items() >= {"pillow": "13.0.0", "scikit-learn": "", "pyyaml": "6.0"}.items()


def test_a_package_of_too_old_a_version_is_missing():
    """Builds of a vendor's own count as the release that they precede."""
    present = {"filelock": "3.20.0", "optuna": "", "torch": "2.11.0a0+nv26", "diffusers": "99.0"}
    assert missing_wheels.usable(present) == {"optuna", "torch", "diffusers"}


def test_the_steps_that_fit_and_the_losses_at_each_quarter(tmp_path):
    folder = tmp_path / "pretraining"
    folder.mkdir()
    (folder / "config.yaml").write_text("config: {pretrain: {batch_size: 50}}\n")
    lines = [{"step": k, "images_per_second": 1000.0, "held_out_loss": 1 / k} for k in range(1, 9)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert first_numbers.steps_that_fit(str(tmp_path), 100) == 0.9 * 100 * 1000 / 50
    assert first_numbers.steps_that_fit(str(tmp_path), 0.01) == 2
    assert "1.00000" not in first_numbers.convergence(str(tmp_path))
    assert "0.12500 at step 8" in first_numbers.convergence(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say first, cifar10, --prepare WHEELS or --quick"),
        (["cifar10"], "cifar10 needs --data PARQUET"),
        (["first", "--seconds", "x"], "--seconds x: must be a whole number above 0"),
        (["cifar10", "--data", "none"], "--data none: no such folder"),
        (["second"], "second is not first, cifar10, --prepare, --quick, an option or an override"),
        (["--prepare"], "--prepare needs a value"),
    ],
)
def test_a_wrong_call_is_one_line(options, message):
    result = subprocess.run(script_command("gpu.sh", *options), env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, f"scripts/gpu.sh: error: {message}\n")


@pytest.mark.long
def test_the_second_call_runs_from_nothing_to_the_table(tmp_path, forked_python):
    """Small and on the digits; a row for each model, and everything in an archive."""
    variables = {"PATH": forked_python, "RUNS": str(tmp_path / "runs")}
    back = tmp_path / "back"
    output = run_script("gpu.sh", "--quick", "cifar10", "--output", str(back), **variables)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in output.splitlines() if line.startswith("| ")]
    uniform = ["uniform 0.25", "published coefficients"]
    assert rows[-7:] == ["pretrained", "continued", "distilled", "ensemble", *uniform, "best"]
    assert {file.name for file in back.iterdir()} == {"results.tgz", "summary.md"}
    assert (back / "results.tgz").stat().st_size > 1000
    assert "Held-out loss of the base: " in (back / "summary.md").read_text()
    again = run_script("gpu.sh", "--quick", "cifar10", "--output", str(back), **variables)
    assert "pretraining: 4 steps" in again
    assert "probe:" not in again
