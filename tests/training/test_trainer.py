import copy
import errno
import json
import math
import shutil
import time
from concurrent.futures import wait
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import tiny_unet
from safetensors.torch import load_file, save_file

from benchmarks.trainers import make_trainer
from deme.config.trainings import Finetune, Pretrain
from deme.data.crops import CroppedImages
from deme.errors import RunError, UserError
from deme.method.posthoc_ema import combination, combine
from deme.models.denoisers import load_denoiser, with_projections
from deme.models.weights import WEIGHTS
from deme.training.progress import MAX_SKIPPED_STEPS
from deme.training.session import Objective
from deme.training.state import CheckpointWriter, list_checkpoints, load_newest_checkpoint
from deme.training.trainer import Trainer

OBJECTIVE = Objective(
    "test", stream=(0, 2, 250, 500), ranges=[(250, 500)], global_probability=0.3, consistency_weight=1.0
)
LEARNED = Objective("test", stream=(0, 1), ranges=[(0, 500), (500, 1000)], uncertainty_learning_rate=0.025)
SETTINGS = {"max_steps": 6, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3, "log_every": 1}

pytestmark = pytest.mark.usefixtures("one_thread")  # equal bit for bit needs equal thread counts


def trainer(
    folder, objective=OBJECTIVE, precision="no", unet=None, settings_class=Finetune, held_out=None, **settings
) -> Trainer:
    unet = tiny_unet(dropout=0.1) if unet is None else unet
    pixels = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    folder.mkdir(exist_ok=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    if precision == "fp16":  # accelerate scales the loss on GPUs only
        accelerator.scaler = torch.amp.GradScaler("cpu")
    training = settings_class(**(SETTINGS | settings))
    options = {"projected": False, "random_flip": True, "held_out": held_out}
    return make_trainer(accelerator, unet, list(pixels), training, folder, objective, **options)


def pretrainer(folder, every=1000, patience=None, **settings) -> Trainer:
    """Plain training that measures its loss on seven held-out images."""
    objective = Objective("plain", stream=(0, 0), ranges=[(0, 1000)])
    pixels = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = CroppedImages(list(pixels.permute(0, 2, 3, 1).numpy()), 8, center_crop=True, random_flip=False)
    settings |= {"held_out_every": every, "patience": patience}
    return trainer(folder, objective, settings_class=Pretrain, held_out=images, **settings)


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def newest_tensors(folder) -> dict[str, torch.Tensor]:
    newest = list_checkpoints(folder / "checkpoints")[0]
    return {f"{file.name}/{k}": v for file in newest.glob("*.safetensors") for k, v in load_file(file).items()}


def test_ema_decays_are_the_published_ones(tmp_path):
    """min(0.9999, 1 − n^(−3/4)) after optimizer step n: 0, 0.4054, 0.5613, 0.6464, 0.7009."""
    trainer(tmp_path, max_steps=5).run()
    decays = [line["ema_decay"] for line in log(tmp_path)]
    assert decays == pytest.approx([0, 0.4054, 0.5613, 0.6464, 0.7009], abs=5e-5)


def test_ema_is_capped(tmp_path):
    trainer(tmp_path, max_steps=3, ema_decay=0.5).run()
    assert log(tmp_path)[-1]["ema_decay"] == 0.5


def test_the_student_ends_with_the_ema_weights(tmp_path):
    """The EMA of the checkpoint follows from the students of all steps by its recurrence."""
    run = trainer(tmp_path, checkpoint_every=1, checkpoints_kept=9)
    assert run.run()
    students = [
        load_file(path / "student.safetensors") for path in reversed(list_checkpoints(tmp_path / "checkpoints"))
    ]
    expected = students[0]
    for n, student in enumerate(students[1:], start=2):
        decay = 1 - n**-0.75
        expected = {name: decay * expected[name] + (1 - decay) * student[name] for name in student}
    for name, weight in run.student.state_dict().items():
        torch.testing.assert_close(weight, expected[name], msg=name)


@pytest.fixture
def short_previews(monkeypatch):
    monkeypatch.setattr("deme.training.progress.PREVIEW_IMAGES", 8)
    monkeypatch.setattr("deme.training.progress.PREVIEW_STEPS", 3)


def test_the_teacher_never_changes(tmp_path, short_previews):
    run = trainer(tmp_path, preview_every=2)
    images, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    before, student = run.teacher(images, timesteps).sample, copy.deepcopy(run.student.state_dict())
    run.run()
    assert not run.teacher.training
    assert not any(p.requires_grad for p in run.teacher.parameters())
    assert torch.equal(run.teacher(images, timesteps).sample, before)
    assert any(not torch.equal(weight, student[name]) for name, weight in run.student.state_dict().items())
    assert len(list((tmp_path / "previews").glob("step-*.png"))) == 3


def test_previews_and_log_frequency_do_not_change_the_weights(tmp_path, short_previews):
    for name, settings in {
        "plain": {},
        "previews": {"preview_every": 1, "log_every": 4, "checkpoint_every": 2},
    }.items():
        trainer(tmp_path / name, **settings).run()
    plain, previews = (newest_tensors(tmp_path / name) for name in ("plain", "previews"))
    assert all(torch.equal(plain[key], previews[key]) for key in plain)


@pytest.mark.parametrize("scheduler", ["constant", "cosine"])
def test_learning_rate_schedules_count_optimizer_steps(tmp_path, scheduler):
    """Two micro-batches a step; warm-up over 2 steps from 0, then the cosine from 1 to 0 over the other 4."""
    name = "constant_with_warmup" if scheduler == "constant" else scheduler
    trainer(tmp_path, lr_scheduler=name, lr_warmup_steps=2).run()
    cosine = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    factors = [0, 0.5, *([1] * 4 if scheduler == "constant" else cosine)]
    assert [line["learning_rate"] for line in log(tmp_path)] == pytest.approx([1e-3 * f for f in factors])


@pytest.mark.parametrize("objective", [OBJECTIVE, LEARNED], ids=["expert", "learned weights of the loss"])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, objective):
    """Student, EMA, optimizer state and logged losses equal those of a run never stopped, dropout included."""
    assert trainer(tmp_path / "whole", objective).run()
    stopped = 0
    while not trainer(tmp_path / "parts", objective).run(deadline=time.monotonic()):
        stopped += 1
    assert stopped == SETTINGS["max_steps"] - 1
    whole, parts = newest_tensors(tmp_path / "whole"), newest_tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []
    clocks = {"images_per_second", "peak_memory_gib"}
    timeless = [
        [{k: v for k, v in line.items() if k not in clocks} for line in log(tmp_path / n)] for n in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]


def test_learned_weights_of_the_loss_move_at_their_own_rate(tmp_path):
    """Adam's first step is the learning rate: up, to the logarithm of an untrained network's loss, which is above 1."""
    run = trainer(tmp_path, LEARNED, max_steps=1, adam_weight_decay=0.5)
    run.run()
    learned = load_file(list_checkpoints(tmp_path / "checkpoints")[0] / "loss_weighting.safetensors")["log_variances"]
    torch.testing.assert_close(learned, torch.full((2,), 0.025), rtol=1e-3, atol=0)
    assert [log(tmp_path)[0][f"log_variance_{k}"] for k in (0, 1)] == pytest.approx(learned.tolist())


def test_a_weighting_changes_the_loss_by_its_mean_weight(tmp_path):
    """Constant weights are none for a network that predicts the noise; others give another loss."""
    for name, weighting in {"none": None, "constant": "constant", "min_snr": "min_snr"}.items():
        trainer(tmp_path / name, loss_weighting=weighting, max_steps=1).run()
    none, constant, min_snr = (log(tmp_path / name)[0]["denoising_loss"] for name in ("none", "constant", "min_snr"))
    assert constant == pytest.approx(none, rel=1e-5)
    assert abs(min_snr - none) > 0.01 * none


def edited(**values):
    """state.json with other values."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def changed_tensors(change):
    """A file of tensors, changed."""

    def damage(path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut short": ("ema.safetensors", lambda path: path.write_bytes(b"short")),
    "no values": ("state.json", lambda path: path.write_text("{}")),
    "no text": ("state.json", lambda path: path.write_bytes(b"\xff\xfe")),
    "nested": ("state.json", lambda path: path.write_text("[" * 100_000)),
    "a list": ("state.json", lambda path: path.write_text("[1]")),
    **{f"step {step!r}": ("state.json", edited(step=step)) for step in (7, 5, -6, 6.0, "6", None, 10**400)},
    "a flipped bit": ("student.safetensors", flip_a_bit),
    "NaN": ("student.safetensors", changed_tensors(lambda t: t["conv_in.weight"].fill_(torch.nan))),
    "a moment less": ("optimizer.safetensors", changed_tensors(lambda t: t.pop("conv_in.weight/exp_avg"))),
    "another shape": ("ema.safetensors", changed_tensors(lambda t: t.update({"conv_in.bias": torch.ones(3)}))),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    trainer(tmp_path / "whole").run()
    trainer(tmp_path / "broken", max_steps=6, checkpoint_every=2).run()
    newest = list_checkpoints(tmp_path / "broken" / "checkpoints")[0]
    name, change = damage
    change(newest / name)
    assert trainer(tmp_path / "broken", max_steps=6, checkpoint_every=2).run()
    assert f"{newest}: unreadable" in capsys.readouterr().out
    whole, mended = newest_tensors(tmp_path / "whole"), newest_tensors(tmp_path / "broken")
    assert all(torch.equal(whole[key], mended[key]) for key in whole)
    assert [line["step"] for line in log(tmp_path / "broken")] == [1, 2, 3, 4, 5, 6]


def test_only_unreadable_checkpoints_are_an_error(tmp_path):
    trainer(tmp_path).run()
    for path in list_checkpoints(tmp_path / "checkpoints"):
        (path / "state.json").write_text("{")
    with pytest.raises(UserError, match="none of the 1 checkpoints can be read"):
        trainer(tmp_path).run()


def test_rotation_never_leaves_only_unreadable_checkpoints(tmp_path):
    """Step 6 is broken: the run goes on from 4 and its checkpoint of step 5 must be what is kept."""
    trainer(tmp_path, checkpoint_every=2).run()
    (tmp_path / "checkpoints" / "step-00000006" / "state.json").write_text("{")
    trainer(tmp_path, checkpoints_kept=1).run(deadline=time.monotonic())
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000005"]


def snapshots(folder) -> dict[str, bytes]:
    """The content of all files in snapshots/."""
    files = filter(Path.is_file, (folder / "snapshots").rglob("*"))
    return {str(file.relative_to(folder / "snapshots")): file.read_bytes() for file in files}


def test_snapshots_are_the_ema_weights_of_their_steps(tmp_path):
    """In half precision, as networks that can be loaded, projections included; the training does not notice them."""
    for name, every in {"plain": None, "kept": 2}.items():
        settings = {"checkpoint_every": 1, "checkpoints_kept": 9, "snapshot_every": every, "max_steps": 5}
        trainer(tmp_path / name, unet=with_projections(tiny_unet()), **settings).run()
    plain, kept = (newest_tensors(tmp_path / name) for name in ("plain", "kept"))
    assert all(torch.equal(plain[key], kept[key]) for key in plain)
    folder = tmp_path / "kept"
    assert not (tmp_path / "plain" / "snapshots").exists()
    assert sorted(path.name for path in (folder / "snapshots").iterdir()) == ["00000002", "00000004"]
    for step in (2, 4):
        ema = load_file(folder / "checkpoints" / f"step-{step:08d}" / "ema.safetensors")
        weights = load_denoiser(folder / "snapshots" / f"{step:08d}" / "unet").state_dict()
        assert weights.keys() == ema.keys()
        assert all(torch.equal(weights[name], ema[name].half().float()) for name in ema)


def test_a_resumed_run_writes_the_snapshots_of_one_that_was_never_stopped(tmp_path):
    """Bit for bit, also over one that a kill before the checkpoint left, and one of a run that was given up."""
    options = {"checkpoint_every": 2, "snapshot_every": 1}
    trainer(tmp_path / "whole", **options).run()
    parts = tmp_path / "parts"
    for left in ("00000002", "00000004", ".writing-00000001-abcdefgh"):
        (parts / "snapshots" / left / "unet").mkdir(parents=True)
    for _ in range(3):
        trainer(parts, **options).run(deadline=time.monotonic())
    shutil.copytree(tmp_path / "whole" / "snapshots" / "00000001", parts / "snapshots" / "00000005")
    assert trainer(parts, **options).run()
    assert len(snapshots(parts)) == 3 * SETTINGS["max_steps"]
    assert snapshots(parts) == snapshots(tmp_path / "whole")


@pytest.mark.parametrize("width", [0.05, 0.07, 0.15])
def test_a_width_that_was_also_tracked_comes_back_from_the_snapshots_of_two_others(tmp_path, width):
    """To 1e-3 of the change of the weights; one of the two exactly. Today's EMA is what it is without them."""
    profiles = {"max_steps": 160, "snapshot_every": 5, "ema_profiles": [0.05, 0.1, 0.07, 0.15]}
    start = tiny_unet(dropout=0.1).state_dict()
    trainer(tmp_path, **profiles, log_every=160).run()
    kept = [(step, tracked) for step in range(5, 161, 5) for tracked in (0.05, 0.1)]
    coefficients, _ = combination(kept, (160, width))

    def average(step, width):
        return load_file(tmp_path / "snapshots" / f"{step:08d}" / f"ema-{width:.3f}" / "unet" / WEIGHTS)

    found, expected = combine([average(*profile) for profile in kept], coefficients), average(160, width)
    assert found.keys() == expected.keys() == start.keys()
    error, change = ({n: m[n] - expected[n] for n in m} for m in (found, start))
    error, change = (torch.cat([tensor.ravel() for tensor in m.values()]).norm().item() for m in (error, change))
    assert error == 0 if width == 0.05 else 0 < error < 1e-3 * change


def test_averages_of_other_widths_leave_the_training_alone_and_are_resumed(tmp_path):
    profiles = {"ema_profiles": [0.05, 0.1], "snapshot_every": 2, "checkpoint_every": 4}
    for name, settings in {"plain": {}, "whole": profiles, "parts": profiles}.items():
        while not trainer(tmp_path / name, **settings).run(time.monotonic() if name == "parts" else math.inf):
            pass
    plain, whole, parts = (newest_tensors(tmp_path / name) for name in ("plain", "whole", "parts"))
    assert {key.partition("/")[0] for key in whole.keys() - plain.keys()} == {
        "ema-0.050.safetensors",
        "ema-0.100.safetensors",
    }
    assert all(torch.equal(plain[key], whole[key]) for key in plain)
    assert all(torch.equal(parts[key], whole[key]) for key in whole)
    assert len(snapshots(tmp_path / "whole")) == 3 * 7
    assert snapshots(tmp_path / "whole") == snapshots(tmp_path / "parts")


def test_weights_beyond_half_precision_make_no_snapshot(tmp_path):
    run = trainer(tmp_path, snapshot_every=2, checkpoint_every=1)
    run.student.conv_in.bias.data[0] = 1e5
    expected = r"test: the weights do not fit half precision at step 2: finetune.snapshot_every .*step-00000001"
    with pytest.raises(RunError, match=expected):
        run.run()
    assert snapshots(tmp_path) == {}


def test_a_loss_that_is_not_finite_is_blamed_for_a_snapshot_that_is_not(tmp_path):
    run = pretrainer(tmp_path, snapshot_every=3, max_steps=3, log_every=50)
    run.losses = lambda batch: (run.student.conv_in.bias.sum() * math.nan, torch.zeros(()))
    with pytest.raises(RunError, match="the loss or its gradient is not finite at step 1;"):
        run.run()
    assert snapshots(tmp_path) == {}


def test_a_full_disk_stops_a_snapshot_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("deme.training.trainer.write_denoiser", full)
    with pytest.raises(RunError, match=r"snapshots/00000003: cannot be written: .*No space left"):
        trainer(tmp_path, snapshot_every=3).run()
    assert snapshots(tmp_path) == {}


def test_optimizer_states_are_loaded_to_the_device_and_format_of_their_parameters(tmp_path):
    trainer(tmp_path).run()
    run = trainer(tmp_path)
    run.student.to(memory_format=torch.channels_last)  # as on a GPU
    load_newest_checkpoint(tmp_path / "checkpoints", run.state, 6)
    strides = set()
    for parameter in run.student.parameters():
        moments = run.state.optimizer.state[parameter]
        assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == parameter.stride()
        assert all(value.device == parameter.device for value in moments.values())
        strides.add(parameter.is_contiguous())
    assert strides == {True, False}  # channels_last is among them


def test_the_rate_covers_the_time_that_the_device_takes(tmp_path, monkeypatch):
    """Reading the losses waits for the device; that time counts."""
    run = trainer(tmp_path, max_steps=1)
    reduce = run.accelerator.reduce

    def slow(*args):
        time.sleep(0.5)
        return reduce(*args)

    monkeypatch.setattr(run.accelerator, "reduce", slow)
    run.run()
    assert log(tmp_path)[0]["images_per_second"] <= 8 / 0.5


def test_old_checkpoints_are_deleted(tmp_path):
    trainer(tmp_path, checkpoint_every=1, checkpoints_kept=2).run()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000006", "step-00000005"]


def test_what_a_kill_left_beyond_them_goes_with_the_next_start(tmp_path):
    """Between the last checkpoint and the deletion of the one before: the run that goes on has nothing left to save."""
    trainer(tmp_path, checkpoint_every=1, checkpoints_kept=4).run()
    trainer(tmp_path, checkpoint_every=1, checkpoints_kept=2).run()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000006", "step-00000005"]


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path):
    """The bad step is named though it is read only later, and the checkpoint before it stays the newest."""
    trainer(tmp_path, max_steps=6, checkpoint_every=2).run(deadline=time.monotonic() - 1)
    run = trainer(tmp_path, max_steps=6, checkpoint_every=5, log_every=5)
    poison = run.losses

    def losses(batch):
        terms = poison(batch)
        return (terms[0] * float("nan"), terms[1]) if run.state.step == 2 else terms

    run.losses = losses
    with pytest.raises(RunError, match=r"test: the loss or its gradient is not finite at step 3; .*step-00000001"):
        run.run()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]


def test_weights_that_the_last_step_broke_are_not_saved(tmp_path):
    """No later loss would show it."""
    trainer(tmp_path, max_steps=2, checkpoint_every=1).run(deadline=time.monotonic())
    run = trainer(tmp_path, max_steps=2, checkpoint_every=1)
    run.optimizer.param_groups[0]["initial_lr"] = 1e38
    with pytest.raises(RunError, match=r"test: the weights are not finite at step 2; last good .*step-00000001"):
        run.run()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]


def test_every_log_line_tells_the_whole_story(tmp_path):
    trainer(tmp_path).run()
    keys = {"step", "loss", "denoising_loss", "consistency_loss", "gradient_norm", "skipped_steps", "learning_rate"}
    keys |= {"ema_decay", "images_per_second", "peak_memory_gib"}
    for line in log(tmp_path):
        assert line.keys() == keys
        assert line["peak_memory_gib"] > 0.01
        assert line["gradient_norm"] > 0


def test_lines_that_a_crash_left_unfinished_are_dropped(tmp_path):
    """Also zeros, as file systems leave them: each step is logged once after the resume."""
    trainer(tmp_path, checkpoint_every=2).run(deadline=time.monotonic())
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "loss": 0.5}\n\0\0\0\0\n7\n{"step": 3, "lo')
    assert trainer(tmp_path, checkpoint_every=2).run()
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert all("gradient_norm" in line for line in log(tmp_path))


def test_fp16_stops_after_50_skipped_steps_in_a_row(tmp_path):
    """The loss scaler skips steps of infinite gradients: the weights stay as they were."""
    run = trainer(tmp_path, precision="fp16", max_steps=99, log_every=10)
    before = copy.deepcopy(run.student.state_dict())
    finite = run.losses
    run.losses = lambda batch: tuple(term * float("inf") for term in finite(batch))
    with pytest.raises(RunError, match=f"{MAX_SKIPPED_STEPS} steps in a row without finite gradients up to step 50"):
        run.run()
    assert all(torch.equal(weight, before[name]) for name, weight in run.student.state_dict().items())


def test_bf16_trains(tmp_path):
    run = trainer(tmp_path, precision="bf16")
    assert run.run()
    assert all(weight.dtype == torch.float32 for weight in run.student.state_dict().values())


def test_training_lowers_the_loss(tmp_path):
    """Plain training on ten images: the mean loss of the last quarter is well below that of the first."""
    objective = Objective("plain", stream=(0, 0), ranges=[(0, 1000)])
    trainer(tmp_path, objective, unet=tiny_unet(), max_steps=80, lr_warmup_steps=0, learning_rate=3e-3).run()
    losses = [line["loss"] for line in log(tmp_path)]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])


def held_out_losses(folder) -> dict[int, float]:
    return {line["step"]: line["held_out_loss"] for line in log(folder) if "held_out_loss" in line}


def test_the_held_out_loss_is_that_of_the_ema_weights_and_disturbs_nothing(tmp_path):
    """Measured every 2 steps with the same draws: equal to the same measurement of the saved network."""
    assert pretrainer(tmp_path / "plain", every=99).run()
    run = pretrainer(tmp_path / "measured", every=2)
    assert run.run()
    plain, measured = newest_tensors(tmp_path / "plain"), newest_tensors(tmp_path / "measured")
    assert all(torch.equal(plain[key], measured[key]) for key in plain)
    losses = held_out_losses(tmp_path / "measured")
    assert list(losses) == [2, 4, 6]
    run.state.ema.shadow_params = [weight.clone() for weight in run.student.parameters()]  # the network that is saved
    assert run.measure_held_out() == losses[6]
    steps = [line["step"] for line in log(tmp_path / "measured")]
    assert steps == sorted(set(steps))


def test_training_stops_when_the_held_out_loss_has_stopped_falling(tmp_path):
    """A learning rate that moves nothing: the second and third measurement are no lower than the first."""
    settings = {"max_steps": 50, "learning_rate": 1e-12, "every": 2, "patience": 2}
    assert pretrainer(tmp_path / "whole", **settings).run()
    assert list(held_out_losses(tmp_path / "whole")) == [2, 4, 6]
    while not pretrainer(tmp_path / "parts", **settings).run(deadline=time.monotonic()):
        pass
    assert held_out_losses(tmp_path / "parts") == held_out_losses(tmp_path / "whole")
    assert pretrainer(tmp_path / "parts", **settings).run()  # complete: not a step more
    assert list_checkpoints(tmp_path / "parts" / "checkpoints")[0].name == "step-00000006"


def test_training_goes_on_while_the_held_out_loss_falls(tmp_path):
    assert pretrainer(tmp_path, max_steps=12, learning_rate=3e-3, every=3, patience=1).run()
    losses = held_out_losses(tmp_path)
    assert list(losses) == [3, 6, 9, 12]
    assert losses[12] < losses[3]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_checkpointing_does_not_change_the_weights(tmp_path, precision):
    """Dropout included: the second forward pass repeats the first one's draws."""
    trainer(tmp_path / "plain", precision=precision).run()
    AcceleratorState._reset_state(reset_partial_state=True)
    run = trainer(tmp_path / "checkpointed", precision=precision, gradient_checkpointing=True)
    assert run.student.is_gradient_checkpointing
    run.run()
    plain, checkpointed = newest_tensors(tmp_path / "plain"), newest_tensors(tmp_path / "checkpointed")
    assert [key for key in plain if not torch.equal(plain[key], checkpointed[key])] == []


def test_the_loss_is_the_sum_of_its_terms(tmp_path):
    objective = Objective("weighted", stream=(0, 2, 250, 500), ranges=[(0, 500)], consistency_weight=0.5)
    trainer(tmp_path, objective).run()
    for line in log(tmp_path):
        assert line["loss"] == pytest.approx(line["denoising_loss"] + 0.5 * line["consistency_loss"], rel=1e-5)


def test_a_checkpoint_holds_the_state_it_was_taken_from(tmp_path, monkeypatch):
    """Training goes on while it is written: the weights change right after the call returns."""
    run = trainer(tmp_path, max_steps=2)
    assert run.run()
    (tmp_path / "more").mkdir()
    writer = CheckpointWriter(tmp_path / "more", keep=1)
    weights = {name: tensor.clone() for name, tensor in run.student.state_dict().items()}
    monkeypatch.setattr("deme.job.files.sync_to_disk", lambda log: time.sleep(0.2))
    writer.write(run.state, run.log.file)
    with torch.no_grad():
        for parameter in run.student.parameters():
            parameter.zero_()
    assert not list((tmp_path / "more").glob("step-*"))
    writer.wait()
    saved = load_file(tmp_path / "more" / "step-00000002" / "student.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in weights.items())


def test_a_checkpoint_that_cannot_be_written_stops_the_run(tmp_path):
    """At the latest when it ends: nothing is called complete."""
    run = trainer(tmp_path, max_steps=2)
    (tmp_path / "checkpoints").mkdir()
    run.writer.folder = tmp_path / "checkpoints" / "absent"
    with pytest.raises(RunError, match=r"absent/step-00000002: cannot be written: No such file"):
        run.run()


def test_a_last_checkpoint_is_tried_where_the_one_before_could_not_be_written(tmp_path, capsys):
    """The disk was full for a while; a signal's checkpoint is written all the same, an ordinary one stops the run."""
    run = trainer(tmp_path, max_steps=2)
    assert run.run()
    for last in (False, True):
        writer = CheckpointWriter(tmp_path / "absent", keep=1)
        writer.write(run.state, run.log.file)
        wait([writer.unfinished])
        writer.folder = tmp_path / "checkpoints"
        with nullcontext() if last else pytest.raises(RunError, match=r"absent/step-00000002: cannot be written"):
            writer.write(run.state, run.log.file, last)
        writer.wait()
    assert "absent/step-00000002: cannot be written" in capsys.readouterr().out
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]


def test_a_checkpoint_that_cannot_be_written_stops_the_run_at_the_next_log_line(tmp_path):
    run = trainer(tmp_path, max_steps=1000, checkpoint_every=500, log_every=1)
    (tmp_path / "checkpoints").mkdir()
    run.state.step, run.writer.folder = 499, tmp_path / "checkpoints" / "absent"
    with pytest.raises(RunError, match=r"absent/step-00000500: cannot be written"):
        run.run()
    assert run.state.step < 999


def test_an_error_waits_for_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    """Else the folder's lock would go while the thread still writes there."""
    run = trainer(tmp_path, max_steps=4, checkpoint_every=2, preview_every=2)
    written = run.writer._write
    monkeypatch.setattr(run.writer, "_write", lambda *arguments: (time.sleep(0.3), written(*arguments)))

    def full() -> None:
        raise RunError("full")

    monkeypatch.setattr(run, "_preview", full)
    with pytest.raises(RunError, match="full"):
        run.run()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), torch.OutOfMemoryError("no memory")])
def test_a_checkpoint_that_may_be_readable_later_is_not_passed_over(tmp_path, monkeypatch, error):
    """Going on from the one before it would delete it."""
    trainer(tmp_path, checkpoint_every=2).run()

    def load_file(path):
        raise error

    monkeypatch.setattr("deme.training.state.load_file", load_file)
    with pytest.raises((RunError, torch.OutOfMemoryError), match=r"step-00000006: cannot be read|no memory"):
        trainer(tmp_path, checkpoint_every=2).run()


def test_skipped_steps_leave_the_logged_gradient_norm_finite(tmp_path):
    """fp16: the first steps find the loss scale by overflowing."""
    run = trainer(tmp_path, precision="fp16", log_every=3)
    finite = run.losses

    def losses(batch):
        terms = finite(batch)
        return (terms[0] * (1e38 if run.state.step == 1 else 1), terms[1])

    run.losses = losses
    assert run.run()
    first, second = log(tmp_path)
    assert first["gradient_norm"] > 0
    assert second["gradient_norm"] > 0
