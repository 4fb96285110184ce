"""Networks whose own records or pipelines say that they were made for another pretrained network."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_unet
from safetensors.torch import save_file

from deme.config.networks import Network
from deme.config.reading import load_config
from deme.errors import UserError
from deme.job.files import sha256, write_yaml
from deme.job.records import AVERAGE, PRETRAINED_WEIGHTS, RUN, SCHEDULE, SNAPSHOT, Record
from deme.models.trained import check_predicts, check_timesteps, check_trained, recorded, tell_other_bases
from deme.models.variants import find_model
from deme.models.weights import WEIGHTS, weights_hash

SCHEDULE_FILE = "scheduler/scheduler_config.json"


@pytest.fixture
def network(tmp_path, pretrained):
    """The folder of a network that was trained from the pretrained one."""
    tiny_unet(seed=1).save_pretrained(tmp_path / "training" / "unet")
    write_record(tmp_path / "training", {**true_record(pretrained), "timesteps.num_train_timesteps": 1000})
    return tmp_path / "training" / "unet"


def true_record(pretrained) -> dict[str, str]:
    return {PRETRAINED_WEIGHTS: weights_hash(pretrained / "unet"), SCHEDULE: sha256(pretrained / SCHEDULE_FILE)}


def write_record(folder, made_from, kind=RUN) -> None:
    recorded.cache_clear()
    Record(kind, made_from, {"free": {}} if kind is RUN else {"snapshots": {}} if kind is AVERAGE else {}).write(folder)


def test_a_training_from_another_base_is_told_once(pretrained, tmp_path, capsys):
    """By the record of the first of its networks: its own, those of its snapshots, those of averages."""
    made_from, networks = true_record(pretrained) | {PRETRAINED_WEIGHTS: "0" * 64}, []
    for name, kind, beside in (
        ("c", SNAPSHOT, {"step": 2}),
        ("b", AVERAGE, {"step": 4, "ema_width": 0.1}),
        ("a", RUN, {}),
    ):
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, made_from | beside, kind)
        networks.append(tmp_path / name / "unet")
    for given in (networks, networks[:1]):
        tell_other_bases(pretrained / "unet", made_from[PRETRAINED_WEIGHTS], given)
        assert capsys.readouterr().out == ""
    for _ in range(2):  # as by several steps of one command
        tell_other_bases(pretrained / "unet", weights_hash(pretrained / "unet"), networks)
    [line] = capsys.readouterr().out.splitlines()
    record = tmp_path / "c" / SNAPSHOT.file
    assert line.startswith(f"{record}: trained from other weights than those in {pretrained / 'unet'}; unless they")


def test_a_network_of_another_noise_schedule_is_told(config_file, network, pretrained, capsys):
    """Also where only it is drawn, to which its base does not matter."""
    paths = load_config(config_file, []).paths
    for folder in paths.experts:
        shutil.copytree(network.parent, folder.parent)
    write_record(paths.experts[1].parent, {PRETRAINED_WEIGHTS: "0" * 64, SCHEDULE: "0" * 64})
    assert find_model("ensemble", paths).denoisers == paths.experts
    [line] = capsys.readouterr().out.splitlines()
    record = paths.experts[1].parent / RUN.file
    assert line.startswith(f"{record}: trained with another noise schedule than {pretrained / SCHEDULE_FILE}, or with")


def test_a_file_that_is_no_safetensors_is_refused(tmp_path, pretrained):
    (tmp_path / "lora.bin").touch()
    with pytest.raises(UserError, match=r"lora\.bin: a file; LoRAs must be \.safetensors, and a network is named by"):
        check_trained(pretrained, [Network("a", tmp_path / "lora.bin")])


def test_of_networks_that_say_nothing_else_nothing_is_told(network, pretrained, tmp_path, capsys):
    """A pretrained folder that was moved, records of older versions, of a merged network's training, none, others'."""

    def look(pipeline) -> None:
        recorded.cache_clear()
        assert check_trained(pipeline, [Network("a", network)]) == [network]
        tell_other_bases(pipeline / "unet", weights_hash(pipeline / "unet"), [network])

    look(shutil.copytree(pretrained, tmp_path / "elsewhere"))
    file = network.parent / RUN.file
    for made_from in ({"seed": 0}, {"merged weights (SHA-256)": "0" * 64}):
        write_record(network.parent, made_from)
        look(pretrained)
    write_yaml(file, {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion"}})  # of another program
    look(pretrained)
    file.unlink()
    look(pretrained)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("is_flat", [False, True])
def test_a_network_whose_own_pipeline_predicts_something_else_is_refused(network, pretrained, is_flat):
    folder = network if is_flat else network.parent / "scheduler"
    shutil.copytree(pretrained / "scheduler", folder, dirs_exist_ok=True)
    assert check_predicts(pretrained, [network]) == [network]
    edit(folder / "scheduler_config.json", _class_name="LCMScheduler", beta_end=0.02)  # others only sample
    assert check_predicts(pretrained, [network]) == [network]
    edit(folder / "scheduler_config.json", prediction_type="v_prediction")
    message = f"{folder}/scheduler_config.json: prediction_type=v_prediction, but epsilon by {pretrained}/scheduler/"
    with pytest.raises(UserError, match=message):
        check_predicts(pretrained, [network])
    (folder / "scheduler_config.json").write_text('{"_class_name": "OtherScheduler"}')  # has no known default
    assert check_predicts(pretrained, [network]) == [network]


def edit(file, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("header", [None, {"timesteps": "[[0, 500]]"}, {}, {"timesteps": "all"}])
def test_an_expert_that_was_trained_on_other_timesteps_is_refused(network, header, tmp_path):
    """By a LoRA's header, or a network's record; others tell nothing, or were trained on some of the timesteps."""
    write_record(network.parent, {"finetune.range": "0000-0500"})
    path = network if header is None else tmp_path / "a.safetensors"
    if header is not None:
        save_file({"a": torch.ones(1)}, path, header)
    told = header is None or header.get("timesteps") == "[[0, 500]]"
    with pytest.raises(UserError, match=r"trained on the timesteps \[\(0, 500\)\], but") if told else nullcontext():
        check_timesteps([Network("a", path, timesteps=(500, 1000))])
    check_timesteps([Network("a", path), Network("b", path, timesteps=(250, 1000))])


def test_a_missing_network_is_named(tmp_path, pretrained):
    with pytest.raises(UserError, match=rf"{tmp_path}/unet/{WEIGHTS}: missing; merge.experts must name"):
        check_trained(pretrained, [Network("a", tmp_path / "unet")])
