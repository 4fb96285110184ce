import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from deme.config.networks import path_of
from deme.config.paths import LORA
from deme.config.reading import load_config
from deme.data.drawing import identities
from deme.errors import RunError, UserError
from deme.job.records import ARCHITECTURE, LORA_CONFIGS, SAMPLES, Record
from deme.job.repository import REPOSITORY
from deme.models.variants import ModelFiles, find_model, write_denoiser


def test_a_network_names_no_path_of_the_machine_that_trained_it(tmp_path):
    settings = {"_class_name": "UNet2DModel", "act_fn": "silu"}
    write_denoiser(tmp_path, {"a": torch.ones(2)}, settings | {"_name_or_path": "/home/someone/unet"})
    assert json.loads((tmp_path / "unet" / "config.json").read_text()) == settings


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "style.safetensors"])
def test_the_configuration_beside_a_peft_adapter_is_one_of_its_models_files(tmp_path, name):
    file, config = tmp_path / name, tmp_path / "adapter_config.json"
    files = ModelFiles(REPOSITORY / "assets" / "digits", [file])
    save_file({"base_model.model.conv_in.lora_A.weight": torch.ones(1)}, file)
    before = files.hashes()
    assert LORA_CONFIGS not in before  # records of older versions have none
    config.write_text('{"lora_alpha": 2}')
    first, watched = files.hashes(), files.watched()
    assert first == before | {LORA_CONFIGS: first[LORA_CONFIGS]}
    config.write_text('{"lora_alpha": 16}')
    assert files.hashes()[LORA_CONFIGS] != first[LORA_CONFIGS]
    with pytest.raises(RunError, match="adapter_config"):
        watched.check()


@pytest.mark.parametrize(
    ("name", "header"), [("style.safetensors", {}), ("adapter_model.safetensors", {"lora_adapter_metadata": "{}"})]
)
def test_a_configuration_that_is_not_read_with_a_lora_is_none_of_its_files(tmp_path, name, header):
    save_file({"unet.conv_in.lora_A.weight": torch.ones(1)}, tmp_path / name, header)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert ModelFiles(tmp_path, [tmp_path / name]).lora_configs == []


@pytest.mark.parametrize(
    ("header", "suffix", "is_recorded"),
    [
        ({"lora_alpha": "4"}, "lora_A.weight", True),
        ({"lora_adapter_metadata": '{"unet": {"lora_alpha": 4}}'}, "lora_A.weight", True),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": 4, "alpha_pattern": {}}'}, "lora_A.weight", False),
        ({"lora_alpha": "4"}, "alpha", False),  # of a tensor, which counts
        ({"timesteps": "[]"}, "lora_A.weight", False),
    ],
)
def test_a_scale_that_older_versions_did_not_read_is_recorded(tmp_path, header, suffix, is_recorded):
    """So what they merged or drew at the scale 1 is out of date, and nothing else."""
    save_file({f"unet.conv_in.{suffix}": torch.ones(1)}, tmp_path / "a.safetensors", header)
    files = ModelFiles(REPOSITORY / "assets" / "digits", [tmp_path / "a.safetensors"])
    assert (LORA_CONFIGS in files.hashes()) == is_recorded


@pytest.fixture
def model(pretrained, tmp_path) -> ModelFiles:
    """A copy of the pretrained network's files."""
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    return ModelFiles(folder, [folder / "unet"])


def test_a_folder_s_network_and_its_lora_are_what_a_merge_takes(config_file, model):
    """A pipeline's is its network, but beside a LoRA."""
    paths, [network] = load_config(config_file, []).paths, model.denoisers
    for folder in (network, model.pipeline):
        save_file({"a": torch.ones(1)}, folder / LORA)
        assert find_model(str(folder), paths).denoisers == [path_of(str(folder))]


def edit_settings(model: ModelFiles, **settings) -> None:
    file = model.denoisers[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_images_of_another_architecture_are_no_images_of_the_model(config_file, model, tmp_path):
    """The weights may be the same; records of older versions did not tell."""
    config = load_config(config_file, [f"model.pretrained={model.pipeline}"])

    def record() -> Record:
        [identity] = identities([config], find_model("pretrained", config.paths), [])
        return Record(SAMPLES, identity)

    before = record()
    edit_settings(model, freq_shift=1)
    with pytest.raises(UserError, match=r"other settings: architecture \(SHA-256\)"):
        before.fits(record(), tmp_path)
    older = {key: value for key, value in before.made_from.items() if key != ARCHITECTURE}
    assert Record(SAMPLES, older).fits(record(), tmp_path)


def test_an_architecture_is_what_computes_otherwise(model):
    """Written by another version of diffusers, with defaults that were left out, or with projections it is the same."""
    before = model.architecture()
    edit_settings(model, _name_or_path="elsewhere", _diffusers_version="9", dropout=0.5, unknown=1, freq_shift=0)
    edit_settings(model, _class_name="ProjectedUNet2DModel")
    assert model.architecture() == before
    edit_settings(model, flip_sin_to_cos=False)
    assert model.architecture() != before
