import json
import shutil

import pytest
import torch
import yaml
from conftest import run, tiny_unet
from safetensors.torch import load_file

from deme.models.denoisers import with_projections
from deme.models.weights import WEIGHTS

DISTILLED = ["finetune.range=distilled", "distill.max_steps=6"]
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


@pytest.mark.parametrize("name", ["min_snr", "ant_uw"])
def test_a_baseline_differs_from_the_control_and_can_be_sampled(config_file, name):
    """As long as the control, on all timesteps, to other weights; by its name."""
    for chosen in ("continued", name):
        run("finetune.py", config_file, f"finetune.range={chosen}")
    root = config_file.parent
    assert len(losses(root, name)) == len(losses(root, "continued")) == 2 * 6
    control, baseline = (weights(root, chosen) for chosen in ("continued", name))
    assert control.keys() == baseline.keys()
    assert any(not torch.equal(control[key], baseline[key]) for key in control)
    run("sample_ddp.py", config_file, f"sample.model={name}")
    assert len(list((root / "tiny" / "samples" / name).glob("*.png"))) == 6


def test_two_processes_learn_the_same_weights_of_the_loss(config_file):
    """Their gradients are exchanged, though they are not in the model whose gradients accelerate exchanges."""
    for processes in (1, 2):
        run("finetune.py", config_file, "finetune.range=ant_uw", f"name={processes}", processes=processes)
    one, two = (
        [json.loads(line) for line in (config_file.parent / name / "finetuned/ant_uw/log.jsonl").open()]
        for name in "12"
    )
    for key in ("loss", "log_variance_0", "log_variance_1"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], abs=1e-5)


def test_a_single_range_merged_with_one_is_that_network(config_file):
    """N = 1: its task vector, added whole."""
    single = ["timesteps.num_ranges=1", "merge.coefficients=[1.0]"]
    run("finetune.py", config_file, *single)
    run("merge.py", config_file, *single)
    merged = load_file(config_file.parent / "tiny" / "merged" / "unet" / WEIGHTS)
    expert = weights(config_file.parent, "0000-1000")
    assert merged.keys() == expert.keys()
    for key in expert:
        torch.testing.assert_close(merged[key], expert[key], rtol=1e-6, atol=1e-7)


def test_two_processes_train_on_what_one_does(config_file):
    """The same losses to 1e-5 and the same weights up to float error, in twice the processes."""
    root = config_file.parent
    options = ["finetune.range=1", "finetune.max_steps=20", "finetune.snapshot_every=10"]
    one = run("finetune.py", config_file, *options)
    expected, reference = losses(root, "0500-1000"), weights(root, "0500-1000")
    folder = root / "tiny/finetuned/0500-1000/snapshots"
    before = {path.parent.parent.name: load_file(path) for path in folder.rglob("*.safetensors")}
    record = yaml.safe_load((folder / "00000010/snapshot.yaml").read_text())
    assert (record["step"], record["finetune.max_steps"], record["finetune.range"]) == (10, 20, "0500-1000")
    shutil.rmtree(root / "tiny")
    two = run("finetune.py", config_file, *options, processes=2)
    assert before.keys() == {"00000010", "00000020"}
    for step, snapshot in before.items():
        for name, weight in load_file(folder / step / "unet" / WEIGHTS).items():
            torch.testing.assert_close(weight, snapshot[name], rtol=2e-3, atol=1e-3, msg=name)
    assert "1 process(es) on cpu" in one.stdout
    assert "2 process(es) on cpu" in two.stdout
    assert len(expected) == 20
    assert losses(root, "0500-1000") == pytest.approx(expected, rel=1e-5)
    for name, weight in weights(root, "0500-1000").items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-3, atol=1e-4, msg=name)


def merge_experts(config_file, *overrides) -> None:
    """Two experts, made without training, and their merge."""
    for index, name in enumerate(["0000-0500", "0500-1000"]):
        folder = config_file.parent / "tiny" / "finetuned" / name / "unet"
        with_projections(tiny_unet(index)).save_pretrained(folder)
    run("merge.py", config_file, *overrides)


def test_distillation_holds_the_merged_network_to_the_experts_alone(config_file):
    """Its own number of steps; the loss is the distance to the experts; what it is made from is recorded by hash."""
    merge_experts(config_file)
    root = config_file.parent
    run("finetune.py", config_file, *DISTILLED)
    folder = root / "tiny" / "finetuned" / "distilled"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] == line["consistency_loss"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert weights(root, "distilled").keys() == load_file(root / "tiny" / "merged" / "unet" / WEIGHTS).keys()
    record = yaml.safe_load((folder / "config.yaml").read_text())["trained_from"]
    assert {f"{name} weights (SHA-256)" for name in ("merged", "0000-0500", "0500-1000")} <= record.keys()
    assert record["distill.max_steps"] == 6
    assert not {"finetune.max_steps", "pretrained weights (SHA-256)"} & record.keys()
    gone = "model.pretrained=gone"  # which is not needed
    assert "is complete" in run("finetune.py", config_file, *DISTILLED, gone).stdout

    refused = run("finetune.py", config_file, *DISTILLED[:1], "distill.max_steps=7", status=2).stderr
    assert "distilled: holds a run of other settings: distill.max_steps=7 (was 6); set this back" in refused
    run("merge.py", config_file, "merge.coefficients=[0.5,0.5]")
    refused = run("finetune.py", config_file, *DISTILLED, status=2).stderr
    assert "distilled: holds a run of other settings: merged weights (SHA-256); set this back" in refused


def test_a_merged_network_that_is_the_only_expert_has_nothing_to_learn(config_file):
    folder = config_file.parent / "tiny" / "finetuned" / "0000-1000" / "unet"
    with_projections(tiny_unet(1)).save_pretrained(folder)
    options = ["timesteps.num_ranges=1", "merge.coefficients=[1.0]"]
    run("merge.py", config_file, *options)
    shutil.copy(folder / WEIGHTS, config_file.parent / "tiny" / "merged" / "unet")  # a merge has float error
    run("finetune.py", config_file, *options, *DISTILLED)
    assert losses(config_file.parent, "distilled")[0] == 0.0


def test_a_stopped_distillation_resumes_bit_for_bit(config_file):
    merge_experts(config_file)
    root = config_file.parent
    run("finetune.py", config_file, *DISTILLED)
    expected, whole = losses(root, "distilled"), weights(root, "distilled")
    shutil.rmtree(root / "tiny" / "finetuned" / "distilled")
    for _ in range(2):
        stopped = run("finetune.py", config_file, *DISTILLED, "finetune.max_minutes=0.0001")
        assert "stopped after finetune.max_minutes=0.0001" in stopped.stdout
    run("finetune.py", config_file, *DISTILLED)
    assert losses(root, "distilled") == expected
    assert [name for name, weight in weights(root, "distilled").items() if not torch.equal(weight, whole[name])] == []


def test_two_processes_distil_what_one_does(config_file):
    merge_experts(config_file)
    root = config_file.parent
    run("finetune.py", config_file, *DISTILLED)
    expected, reference = losses(root, "distilled"), weights(root, "distilled")
    shutil.rmtree(root / "tiny" / "finetuned" / "distilled")
    two = run("finetune.py", config_file, *DISTILLED, processes=2)
    assert "2 process(es) on cpu" in two.stdout
    assert losses(root, "distilled") == pytest.approx(expected, rel=1e-5)
    for name, weight in weights(root, "distilled").items():
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
