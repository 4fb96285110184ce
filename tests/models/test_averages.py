import shutil

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import tiny_unet
from safetensors.torch import load_file

from benchmarks.trainers import make_trainer
from deme.config.trainings import Finetune
from deme.errors import UserError
from deme.job.records import AVERAGE, RUN, Record, read_record
from deme.models.averages import recorded_average, write_average
from deme.models.denoisers import load_denoiser
from deme.models.weights import WEIGHTS

KEY = "merge.ema_width"
MADE_FROM = {"seed": 0, "finetune.range": "continued", "finetune.max_steps": 16, "finetune.ema_profiles": [0.05, 0.1]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training of 16 steps with a snapshot of each second one."""
    folder = tmp_path_factory.mktemp("finetuned") / "continued"
    folder.mkdir()
    settings = Finetune(max_steps=16, batch_size=2, learning_rate=1e-3, snapshot_every=2, ema_profiles=[0.05, 0.1])
    pixels = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    trainer = make_trainer(Accelerator(cpu=True), tiny_unet(), list(pixels), settings, folder)
    trainer.made_from = MADE_FROM
    trainer.run()
    Record(RUN, MADE_FROM, {"free": {}}).write(folder)
    return folder


@pytest.fixture
def training(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "continued")


def snapshot(training, step, width="ema-0.100"):
    return training / "snapshots" / f"{step:08d}" / width / "unet"


def test_a_tracked_width_is_the_last_snapshot(training):
    """Bit for bit, with its architecture; made once, and the record names the one snapshot that was read."""
    network = write_average(training, 0.1, KEY)
    found, expected = load_file(network / WEIGHTS), load_file(snapshot(training, 16) / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert load_denoiser(network).config == load_denoiser(snapshot(training, 16)).config
    about = recorded_average(network)
    assert (about["ema_width"], about["step"], list(about["snapshots"])) == (
        0.1,
        16,
        ["snapshots/00000016/ema-0.100/unet"],
    )
    before = (network / WEIGHTS).stat()
    assert write_average(training, 0.1, KEY) == network == training / "ema-0.100" / "unet"
    assert (network / WEIGHTS).stat() == before
    assert recorded_average(snapshot(training, 16)) == {}


def test_a_width_between_them_lies_between_them_and_near(training):
    """Its distance from either is less than theirs."""
    found = load_file(write_average(training, 0.07, KEY) / WEIGHTS)
    wide, narrow = (load_file(snapshot(training, 16, name) / WEIGHTS) for name in ("ema-0.100", "ema-0.050"))

    def distance(first, second):
        return sum((first[name] - second[name]).square().sum() for name in first).sqrt()

    assert 0 < distance(found, wide) < distance(narrow, wide)
    assert 0 < distance(found, narrow) < distance(narrow, wide)
    assert len(recorded_average(training / "ema-0.070" / "unet")["snapshots"]) == 16


def test_what_another_run_left_is_replaced(training, capsys):
    """A training that was deleted in part, and begun anew with other settings."""
    network = write_average(training, 0.1, KEY)
    record = read_record(AVERAGE, network.parent)
    Record(AVERAGE, record.made_from | {"seed": 1}, record.beside).write(network.parent)
    (network / WEIGHTS).write_bytes(b"other weights")
    write_average(training, 0.1, KEY)
    assert "ema-0.100 was made from something else: replacing it" in capsys.readouterr().out
    assert load_file(network / WEIGHTS).keys() == load_file(snapshot(training, 16) / WEIGHTS).keys()


def edited(path, key=None, **values):
    """A damage: other values in a YAML file, at its top or below a key."""

    def damage(training) -> None:
        file = training / path
        content = yaml.safe_load(file.read_text())
        (content if key is None else content[key]).update(values)
        file.write_text(yaml.safe_dump(content))

    return damage


def removed(path):
    return lambda training: shutil.rmtree(training / path) if (training / path).is_dir() else (training / path).unlink()


AGAIN = r"delete \S+/continued and train again: finetune.py finetune.range=continued finetune.snapshot_every=2 "
REFUSED = {
    "too wide": (0.25, lambda training: None, r"0.25: the snapshots in \S+/continued can give 0.0\d\d … 0.2\d\d; more"),
    "too narrow": (0.01, lambda training: None, r"0.01: the snapshots in \S+/continued can give 0.0"),
    "no snapshots": (
        0.1,
        removed("snapshots"),
        r"continued/snapshots: holds no averages of finetune.ema_profiles; delete .* finetune.snapshot_every=1 ",
    ),
    "the last one is missing": (0.1, removed("snapshots/00000016"), rf"00000016/ema-0.050/unet: missing; {AGAIN}"),
    "one average is missing": (
        0.1,
        removed("snapshots/00000004/ema-0.100"),
        rf"00000004/ema-0.100/unet: missing; {AGAIN}",
    ),
    "no record": (0.1, removed("snapshots/00000004/snapshot.yaml"), rf"00000004/snapshot.yaml: missing; {AGAIN}"),
    "of another run": (
        0.1,
        edited("snapshots/00000008/snapshot.yaml", seed=3),
        rf"00000008: of another run: seed=0 \(was 3\); {AGAIN}",
    ),
    "of another step": (
        0.1,
        edited("snapshots/00000008/snapshot.yaml", step=6),
        rf"00000008: of another run: step=8 \(was 6\); {AGAIN}",
    ),
    "no training": (
        0.1,
        removed("config.yaml"),
        r"continued/config.yaml: missing, so this is no training of finetune.py",
    ),
    "a damaged record": (
        0.1,
        edited("config.yaml", "trained_from", **{"finetune.max_steps": "x"}),
        r"config.yaml: finetune.max_steps is not a whole",
    ),
}


@pytest.mark.parametrize(("width", "damage", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_had_is_refused(training, width, damage, message):
    damage(training)
    with pytest.raises(UserError, match=rf"^merge\.ema_width=.*{message}"):
        write_average(training, width, KEY)
    assert not (training / f"ema-{width:.3f}").exists()
