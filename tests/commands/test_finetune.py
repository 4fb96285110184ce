import json
import shutil

import pytest
import torch
from conftest import run
from safetensors.torch import load_file

from deme.models.weights import WEIGHTS

PROJECTIONS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]


def weights(root, name) -> dict[str, torch.Tensor]:
    return load_file(root / "tiny" / "finetuned" / name / "unet" / WEIGHTS)


def losses(root, name) -> list[float]:
    lines = (root / "tiny" / "finetuned" / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_every_range_in_turn_equals_each_alone(config_file):
    """Both ranges in one command, then each by finetune.range: the same weights, projections included."""
    root = config_file.parent
    run("finetune.py", config_file)
    together = {name: weights(root, name) for name in ("0000-0500", "0500-1000")}
    shutil.rmtree(root / "tiny")
    for index, name in enumerate(together):
        run("finetune.py", config_file, f"finetune.range={index}")
        alone = weights(root, name)
        assert [key for key in alone if not torch.equal(alone[key], together[name][key])] == []
        assert {f"{block}.projection.weight" for block in PROJECTIONS} <= alone.keys()
    assert not torch.equal(*(model["conv_in.weight"] for model in together.values()))
    again = run("finetune.py", config_file)
    assert again.stdout.count("is complete") == 2


def test_the_control_trains_as_long_as_all_ranges_without_teacher_or_projection(config_file):
    run("finetune.py", config_file, "finetune.range=continued")
    folder = config_file.parent / "tiny" / "finetuned" / "continued"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 2 * 6 + 1))
    assert {line["consistency_loss"] for line in lines} == {0.0}
    assert not any("projection" in name for name in weights(config_file.parent, "continued"))


def test_two_processes_train_on_what_one_does(config_file):
    """The same losses to 1e-5 and the same weights up to float error, in twice the processes."""
    root = config_file.parent
    one = run("finetune.py", config_file, "finetune.range=1", "finetune.max_steps=20")
    expected, reference = losses(root, "0500-1000"), weights(root, "0500-1000")
    shutil.rmtree(root / "tiny")
    two = run("finetune.py", config_file, "finetune.range=1", "finetune.max_steps=20", processes=2)
    assert "1 process(es) on cpu" in one.stdout
    assert "2 process(es) on cpu" in two.stdout
    assert len(expected) == 20
    assert losses(root, "0500-1000") == pytest.approx(expected, rel=1e-5)
    for name, weight in weights(root, "0500-1000").items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-3, atol=1e-4, msg=name)


def test_time_is_up(config_file):
    """max_minutes stops at a checkpoint with status 0; the next command goes on from there."""
    stopped = run("finetune.py", config_file, "finetune.max_minutes=0.0001")
    assert "stopped after finetune.max_minutes=0.0001; the same command resumes" in stopped.stdout
    folder = config_file.parent / "tiny" / "finetuned" / "0000-0500"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000001"]
    assert "resuming from" in run("finetune.py", config_file, "finetune.range=0").stdout
    assert (folder / "unet" / WEIGHTS).exists()


def test_nan_stops_with_status_1_and_one_line(config_file):
    """Nothing but a huge learning rate is needed; the message names the range, the step and the checkpoint."""
    options = ["finetune.range=1", "finetune.learning_rate=1e30", "finetune.max_grad_norm=1e30"]
    result = run("finetune.py", config_file, *options, status=1)
    assert "0500-1000: the loss or its gradient is not finite at step" in result.stderr
    assert "last good checkpoint: none" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((config_file.parent / "tiny").rglob("*.safetensors"))
