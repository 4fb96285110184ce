import json

import pytest
import torch
from safetensors.torch import save_file

from deme.errors import RunError
from deme.job.records import LORA_CONFIGS
from deme.job.repository import REPOSITORY
from deme.models.variants import ModelFiles, write_denoiser


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
