import json

import torch

from deme.models.variants import write_denoiser


def test_a_network_names_no_path_of_the_machine_that_trained_it(tmp_path):
    settings = {"_class_name": "UNet2DModel", "act_fn": "silu"}
    write_denoiser(tmp_path, {"a": torch.ones(2)}, settings | {"_name_or_path": "/home/someone/unet"})
    assert json.loads((tmp_path / "unet" / "config.json").read_text()) == settings
