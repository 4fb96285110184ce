import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deme.config.experiment import Config
from deme.config.sections import Data
from deme.config.trainings import Finetune, Pretrain
from deme.errors import UserError
from deme.training import session
from deme.training.progress import RunLog
from deme.training.self_training import drawn_captions, training_config


def write(folder, last_step: int, steps: range, trackers: list[str]) -> RunLog:
    log = RunLog(folder, last_step, Finetune(log_with=trackers))
    for step in steps:
        log.write({"step": step, "loss": math.nan if step == 2 else 1 / step})
    return log


def test_no_tracker_is_started_that_is_not_asked_for(tmp_path):
    write(tmp_path, 0, range(1, 3), []).close()
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    write(tmp_path, 0, range(1, 8), ["tensorboard"])  # killed: never closed
    write(tmp_path, 4, range(5, 10), ["tensorboard"]).close()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path, monkeypatch):
    """Offline, and killed in between: two parts of one run; log.jsonl has each step once."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, 0, range(1, 8), ["tensorboard", "wandb"]).trackers[-1].finish()
    write(tmp_path, 4, range(5, 10), ["tensorboard", "wandb"]).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()] == list(range(1, 10))
    run_id = (tmp_path / "wandb-id.txt").read_text()
    parts = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [part.name for part in parts] == [f"run-{run_id}.wandb"] * 2
    assert all(b"loss" in part.read_bytes() and b"batch_size" in part.read_bytes() for part in parts)


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(session, "find_spec", lambda name: None)
    settings = Finetune(log_with=["tensorboard", "wandb"])
    with pytest.raises(UserError, match=r"^finetune.log_with=.*pip install wandb"):
        session.Session(Config(finetune=settings), settings)


def test_own_samples_need_no_held_out_images():
    """Which pretraining with a patience holds out of the configured data."""
    config = Config(data=Data(held_out_images=10), pretrain=Pretrain(patience=3))
    assert training_config(config).data.held_out_images == 0


def test_own_samples_of_a_text_to_image_model_need_captions():
    with pytest.raises(UserError, match=r"^data.caption_column=null: a text-to-image model needs captions$"):
        drawn_captions(Config())
    captions = drawn_captions(Config(data=Data(caption_column="caption")))
    assert len(captions) == 6000
    assert min(captions) == 20_000_000


def test_an_unknown_tracker_is_named():
    with pytest.raises(UserError, match=r"^finetune.log_with=.*tensorbord.* must be a list of tensorboard, wandb$"):
        Finetune(log_with=["tensorbord"])
