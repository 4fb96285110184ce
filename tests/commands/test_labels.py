"""A class-conditional transformer from nothing, by every script."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import yaml
from conftest import run
from PIL import Image
from safetensors.torch import load_file

from deme.config.paths import LORA
from deme.models.weights import WEIGHTS

TRANSFORMER = {"in_channels": 1, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
SAMPLES = ["sample.num_images=4", "sample.guidance_scale=2"]


@pytest.fixture
def dit_config(config_file) -> Path:
    """The tiny experiment with a DiT of its own on the labelled digits."""
    config = yaml.safe_load(config_file.read_text())
    del config["pretrain"]["unet"]
    config["pretrain"]["learning_rate"] = 0.05  # for labels to show after few steps
    config["pretrain"]["transformer"] = TRANSFORMER | {"num_embeds_ada_norm": 10}
    config["model"] = {"pretrained": None, "projection": False}
    config_file.write_text(yaml.safe_dump(config))
    return config_file


def test_a_transformer_is_pretrained_decoupled_merged_and_sampled_by_label(dit_config):
    root = dit_config.parent / "tiny"
    run("pretrain.py", dit_config, "pretrain.preview_every=4")
    index = json.loads((root / "pretrained" / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    run("finetune.py", dit_config)
    assert "is complete" in run("finetune.py", dit_config).stdout
    run("merge.py", dit_config)
    networks = {name: load_file(root / name / "transformer" / WEIGHTS) for name in ("pretrained", "merged")}
    networks |= {k: load_file(root / f"finetuned/{k}/transformer" / WEIGHTS) for k in ("0000-0500", "0500-1000")}
    for name, merged in networks["merged"].items():
        base, *experts = (networks[key][name] for key in ("pretrained", "0000-0500", "0500-1000"))
        expected = base + 0.5 * (experts[0] - base) + 0.25 * (experts[1] - base)
        np.testing.assert_allclose(merged, expected, atol=1e-6)
    diffusers.DiTTransformer2DModel.from_pretrained(root / "merged" / "transformer")

    run("sample_ddp.py", dit_config, *SAMPLES)
    of_all = [np.array(Image.open(path)) for path in sorted((root / "samples" / "merged").glob("0*.png"))]
    assert len(of_all) == 4
    refused = run("sample_ddp.py", dit_config, *SAMPLES, "sample.labels=[9]", status=2)
    assert "holds samples of other settings: labels=[9]" in refused.stderr
    run("sample_ddp.py", dit_config, *SAMPLES, "sample.labels=[0,1]", "sample.output=" + str(root / "by-label"))
    by_label = [np.array(Image.open(path)) for path in sorted((root / "by-label").glob("0*.png"))]
    assert [np.array_equal(*pair) for pair in zip(of_all, by_label, strict=True)] == [True, True, False, False]


def test_loras_of_a_transformer_are_trained_merged_and_drawn(dit_config):
    root, lora = dit_config.parent / "tiny", "finetune.lora_rank=2"
    run("pretrain.py", dit_config)
    run("finetune.py", dit_config, lora, "finetune.lora_targets=all-linear")
    run("merge.py", dit_config, lora)
    names = [*load_file(root / "merged" / LORA)]
    assert all(name.startswith("transformer.") for name in names)
    assert "transformer.transformer_blocks.1.ff.net.0.proj.lora_A.weight" in names
    run("sample_ddp.py", dit_config, lora, *SAMPLES)
    whole = ["merge.into=model", "merge.output=" + str(root / "whole")]
    run("merge.py", dit_config, lora, *whole)
    run("sample_ddp.py", dit_config, lora, *SAMPLES, *whole, "sample.output=" + str(root / "by-whole"))
    drawn, expected = (
        [np.array(Image.open(path)).astype(int) for path in sorted((root / folder).glob("0*.png"))]
        for folder in ("samples/merged", "by-whole")
    )
    assert len(drawn) == 4
    assert np.abs(np.subtract(drawn, expected)).max() <= 1
    refused = run("merge.py", dit_config, lora, "merge.lora_format=kohya", "merge.output=kohya", status=2)
    assert "merge.lora_format=kohya: has no known name for transformer." in refused.stderr


@pytest.mark.parametrize(
    ("script", "overrides", "message"),
    [
        ("pretrain.py", ["data.label_column=null"], "data.label_column=null: the model takes labels"),
        ("pretrain.py", ["pretrain.unet={in_channels: 1}"], "needs no pretrain.unet, no encoders"),
        (
            "pretrain.py",
            ["pretrain.transformer={layers: 3}"],
            "pretrain.transformer={'layers': 3}, pretrain.scheduler=",
        ),
        ("pretrain.py", ["pretrain.transformer.num_embeds_ada_norm=9"], "has the label 9, and the model 9 classes"),
        ("pretrain.py", ["pretrain.transformer.patch_size=3"], "the network maps (1, 1, 8, 8) to (1, 1, 6, 6)"),
    ],
)
def test_what_a_transformer_cannot_be_made_of_is_refused(dit_config, script, overrides, message):
    refused = run(script, dit_config, *overrides, status=2)
    assert message in refused.stderr
    assert not (dit_config.parent / "tiny" / "pretrained").exists()
