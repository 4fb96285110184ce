"""Whole pipelines in one file: written, and read again by diffusers."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import tiny_unet
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file
from text_to_image import tiny_pipeline, tiny_xl_pipeline

from deme.config.experiment import Config
from deme.config.sections import Model
from deme.errors import UserError
from deme.models.denoisers import with_projections
from deme.models.single_file import check_original, open_single_file, original_tensors, write_single_file
from deme.models.variants import find_pretrained

V = {"prediction_type": "v_prediction"}
MAKERS = {"v1": tiny_pipeline, "xl": tiny_xl_pipeline}
# of a text encoder's first layer, a VAE and the noise network: what programs know the formats by
KNOWN = {
    "v1": [
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    ],
    "xl": [
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
        "conditioner.embedders.1.model.positional_embedding",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
        "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_proj.bias",
        "conditioner.embedders.1.model.ln_final.weight",
        "model.diffusion_model.label_emb.0.0.weight",
    ],
}
COMMON = [
    "first_stage_model.decoder.up.1.block.0.conv1.weight",
    "first_stage_model.decoder.up.1.upsample.conv.weight",
    "first_stage_model.encoder.down.0.downsample.conv.weight",
    "first_stage_model.encoder.mid.attn_1.proj_out.weight",
    "first_stage_model.quant_conv.weight",
    "model.diffusion_model.out.2.weight",
    "model.diffusion_model.time_embed.0.weight",
]


def saved(place: Path, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path, Path]:
    """A pipeline's folder, the same without weights, and the single file."""
    folder = place / f"{kind}-{str(dtype)[6:]}"
    config, file = place / f"{folder.name}-config", folder.with_suffix(".safetensors")
    if folder.exists():
        return folder, config, file
    pipeline = MAKERS[kind]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype)  # diffusers' own warns
    pipeline.save_pretrained(folder)
    shutil.copytree(folder, config, ignore=shutil.ignore_patterns("*.safetensors"))
    write_single_file(file, folder, {"pretrained": {"sha256": "abc"}})
    return folder, config, file


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("single")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    same = (torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    return first.keys() == second.keys() and all(same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_file_becomes_the_folder_that_it_was_made_of_and_the_same_file(place, tmp_path, kind, dtype):
    folder, config, file = saved(place, kind, dtype)
    again = open_single_file(file, config, tmp_path)
    assert equal(original_tensors(again), original_tensors(folder))
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in folder.iterdir())
    write_single_file(tmp_path / "again.safetensors", again, {})
    tensors = load_file(file)
    assert equal(load_file(tmp_path / "again.safetensors"), tensors)
    assert {*KNOWN[kind], *COMMON} <= tensors.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert open_single_file(file, config, tmp_path) == again  # is not made again


def test_a_file_of_several_types_is_read_in_float32(place, tmp_path):
    _, config, file = saved(place, "v1")
    tensors = load_file(file)
    half = {name: tensor.half() if name.startswith("first_stage") else tensor for name, tensor in tensors.items()}
    save_file(half | {"model_ema.num_updates": torch.tensor(3)}, tmp_path / "mixed.safetensors")
    again = original_tensors(open_single_file(tmp_path / "mixed.safetensors", config, tmp_path))
    assert equal(again, {name: tensor.float() for name, tensor in half.items()})


def test_the_run_starts_from_the_pipeline_in_a_file(place, tmp_path):
    folder, config, file = saved(place, "v1")
    run = Config(output_dir=str(tmp_path), model=Model(pretrained=str(file), config=str(config)))
    found = find_pretrained(run.paths)
    assert found.parent == tmp_path / "single-files"
    assert equal(original_tensors(found), original_tensors(folder))
    with pytest.raises(UserError, match=r"model\.config=x: only for model\.pretrained=FILE\.safetensors"):
        Model(pretrained=str(folder), config="x")


def test_a_file_that_is_no_whole_pipeline_is_refused_by_name(place, tmp_path):
    _, config, file = saved(place, "v1")
    tensors = load_file(file)
    text = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    fewer = {name: tensor for name, tensor in tensors.items() if name != text}
    for name, changed, message in (
        ("lora", {"lora_unet_conv_in.alpha": torch.ones(1)}, "holds no network of Stable Diffusion"),
        (
            "few",
            fewer,
            "lacks tensors of the networks that its configuration describes",
        ),
        ("more", tensors | {"first_stage_model.other": torch.ones(1)}, r"first_stage_model\.other: is in the file or"),
        ("other", tensors | {text: torch.ones(3)}, "model.config="),
    ):
        save_file(changed, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=message):
            open_single_file(tmp_path / f"{name}.safetensors", config, tmp_path)
        assert not list(tmp_path.glob(f"{name}-*"))
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        open_single_file(tmp_path / "bad.safetensors", config, tmp_path)
    with pytest.raises(UserError, match="no such file"):
        open_single_file(tmp_path / "none.safetensors", config, tmp_path)
    with pytest.raises(UserError, match=r"model\.config=nowhere: not a pipeline folder"):
        open_single_file(file, Path("nowhere"), tmp_path)


@pytest.mark.parametrize(
    ("marks", "said", "schedule", "message"),
    [
        (["v_pred"], None, {}, "v_pred: says that the network predicts v, but .* prediction_type=epsilon"),
        (["ztsnr"], None, {}, "ztsnr: says .* rescale_betas_zero_snr=false"),
        (["v_pred", "ztsnr"], None, V, "ztsnr: says .* rescale_betas_zero_snr=false"),
        (["v_pred", "ztsnr"], "v", V | {"rescale_betas_zero_snr": True}, None),
        (["edm_mean", "edm_std"], None, {}, "edm_mean: says that the network is one of EDM"),
        (["edm_vpred.sigma_max"], None, V, r"edm_vpred\.sigma_max: says"),
        ([], "v", {}, r"modelspec\.prediction_type=v in its header, but .* prediction_type=epsilon"),
        ([], "epsilon", V, r"modelspec\.prediction_type=epsilon in its header, but .* prediction_type=v_prediction"),
        ([], "epsilon", {}, None),
        ([], "velocity", {}, r"modelspec\.prediction_type=velocity in its header, but .* prediction_type=epsilon"),
        ([], "None", {}, None),
    ],
)
def test_what_a_file_says_of_its_network_is_not_passed_over(place, tmp_path, marks, said, schedule, message):
    _, config, file = saved(place, "v1")
    config = shutil.copytree(config, tmp_path / "config")
    edit(config / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler", **schedule)
    edit(config / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    header = {} if said is None else {"modelspec.prediction_type": said}
    tensors = load_file(file) | {name: torch.zeros(4) for name in marks}
    save_file(tensors, tmp_path / "marked.safetensors", {"format": "pt"} | header)
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        open_single_file(tmp_path / "marked.safetensors", config, tmp_path)
    assert len(list(tmp_path.glob("marked-*"))) == (message is None)


def test_without_a_configuration_and_the_hub_the_remedy_is_told(place, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _, _, file = saved(place, "v1")
    with pytest.raises(UserError, match=r"model\.config=FOLDER may name a pipeline of the same kind"):
        open_single_file(file, None, tmp_path)


def edit(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("unet/config.json", {"use_linear_projection": True}, "for Stable Diffusion 1 and XL, not for 2"),
        ("unet/config.json", {"layers_per_block": [1, 2]}, r"one layers_per_block, not \[1, 2\]"),
        ("unet/config.json", {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "no up_block_types AttnUpBlock2D"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "predicts noise, but .* v_prediction"),
    ],
)
def test_what_the_format_cannot_say_is_refused(place, tmp_path, part, settings, message):
    folder = shutil.copytree(saved(place, "v1")[0], tmp_path / "copy")
    check_original(folder, folder / "unet")
    edit(folder / part, **settings)
    with pytest.raises(UserError, match=message):
        check_original(folder, folder / "unet")


def test_projections_and_pixels_are_refused(place, tmp_path):
    folder = saved(place, "v1")[0]
    with_projections(tiny_pipeline().unet).save_pretrained(tmp_path / "projected")
    with pytest.raises(UserError, match=r"no projections: finetune with model\.projection=false"):
        check_original(folder, tmp_path / "projected")
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "pixels")
    with pytest.raises(UserError, match="not for a UNet2DModel"):
        check_original(tmp_path / "pixels", tmp_path / "pixels" / "unet")
