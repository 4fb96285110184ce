"""Stable Diffusion 3, SANA and Wan: transformers of text and latents, trained by flow matching."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, run
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
)
from PIL import Image
from safetensors.torch import load_file
from test_text_to_image import PROMPTS, images, losses
from text_to_image import tiny_conditional_unet, tiny_pipeline, tiny_sana_pipeline, tiny_sd3_pipeline, tiny_wan_pipeline

from deme.config.paths import LORA
from deme.config.sections import Sample
from deme.config.trainings import Finetune
from deme.errors import UserError
from deme.models import variants
from deme.models.denoisers import compute_in, load_denoiser, load_scheduler, with_projections
from deme.models.drawing import Drawing
from deme.models.encoder_loading import load_encoder
from deme.models.pipelines import INDEX, experts_in, find_pipeline
from deme.models.weights import load_tensors
from scripts.estimate import Size, encoder_cost, gpu_memory, unet_cost

SD3_5 = {"qk_norm": "rms_norm", "dual_attention_layers": [0]}


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Path:
    """A pipeline's folder."""
    folder = tmp_path_factory.mktemp("sd3") / "pretrained"
    tiny_sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sana(tmp_path_factory) -> Path:
    """A pipeline's folder."""
    folder = tmp_path_factory.mktemp("sana") / "pretrained"
    tiny_sana_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """A pipeline's folder."""
    folder = tmp_path_factory.mktemp("wan") / "pretrained"
    tiny_wan_pipeline().save_pretrained(folder)
    return folder


def drawn(folder: Path, settings: Sample, shape: tuple[int, ...]) -> np.ndarray:
    network = load_denoiser(find_pipeline(str(folder)) / "transformer")
    drawing = Drawing(load_scheduler(folder), load_encoder(folder, network), settings, shape, torch.device("cpu"))
    return drawing.images(lambda _: network, range(6), PROMPTS)[:, 0].numpy()


def latents(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(6)])


def assert_drawn_alike(found: np.ndarray, pipeline: DiffusionPipeline, **given) -> None:
    """The images are those of diffusers' pipeline, to one grey level."""
    output = pipeline(PROMPTS, negative_prompt=["blurred"] * len(PROMPTS), output_type="np", **given)
    expected = output.frames[:, 0] if "frames" in output else output.images
    assert found.std() > 5
    assert np.abs(found - np.round(expected[..., 0] * 255)).max() <= 1


@pytest.mark.parametrize("settings", [{}, {"has_t5": False}, SD3_5], ids=["3", "without T5", "3.5"])
def test_images_are_those_of_stable_diffusion_3(tmp_path, settings):
    """From the same latents, prompts and schedule, to one grey level."""
    tiny_sd3_pipeline(**settings).save_pretrained(tmp_path)
    shape, guidance = (4, 4, 4), {"guidance_scale": 7.0, "num_inference_steps": 3}
    found = drawn(tmp_path, Sample(**guidance, scheduler="euler", negative_prompt="blurred"), shape)
    without = {} if settings.get("has_t5", True) else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, **without)
    assert_drawn_alike(found, pipeline, height=8, width=8, latents=latents(shape), **guidance)


@pytest.mark.parametrize(
    ("family", "kind", "scale", "sampler"),
    [
        ("sana", SanaPipeline, 4.5, "euler"),
        ("sana", SanaPipeline, 4.5, "dpmsolver++"),
        ("wan", WanPipeline, 5.0, "euler"),
        ("wan", WanPipeline, 5.0, "unipc"),
    ],
)
def test_images_are_those_of_sana_and_single_frames_of_wan(request, family, kind, scale, sampler):
    """From the same latents, prompts and schedule, to one grey level; DPM++ and UniPC are the pipelines' own."""
    folder, shape = request.getfixturevalue(family), (4, 16, 16) if family == "sana" else (4, 8, 8)
    guidance = {"guidance_scale": scale, "num_inference_steps": 3}
    found = drawn(folder, Sample(**guidance, scheduler=sampler, negative_prompt="blurred"), shape)
    pipeline = kind.from_pretrained(folder)
    if sampler == "euler":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    given = {"height": 32, "width": 32, "use_resolution_binning": False, "latents": latents(shape)}
    if family == "wan":
        given = {"height": 16, "width": 16, "num_frames": 1, "latents": latents(shape)[:, :, None]}
    assert_drawn_alike(found, pipeline, **given, **guidance)


def edited(folder: Path, target: Path, file: str, **values) -> Path:
    """A copy with other settings in a file; ... removes one."""
    shutil.copytree(folder, target)
    found = json.loads((target / file).read_text()) | values
    (target / file).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))
    return target


@pytest.mark.parametrize(
    ("family", "file", "values", "message"),
    [
        ("sana", "transformer/config.json", {"guidance_embeds": True}, "guidance_embeds=true: not false"),
        ("sana", "transformer/config.json", {"timestep_scale": 0.001}, "timestep_scale=0.001: not 1.0"),
        ("sana", "vae/config.json", {"_class_name": "AutoencoderKL"}, "_class_name=AutoencoderKL: not AutoencoderDC"),
        ("sd3", "vae/config.json", {"_class_name": "AutoencoderTiny"}, "_class_name=AutoencoderTiny: not one of Auto"),
        ("sd3", "vae/config.json", {"shift_factor": "large"}, "shift_factor=large: must be a finite number"),
        ("sd3", INDEX, {"vae": ["diffusers", "AutoencoderDC"]}, "vae=AutoencoderDC: not AutoencoderKL"),
        (
            "sd3",
            INDEX,
            {"text_encoder": ["transformers", "CLIPTextModel"]},
            "CLIPTextModel: not CLIPTextModelWithProje",
        ),
        ("sd3", INDEX, {"controlnet": ["diffusers", "SD3ControlNetModel"]}, "the part=controlnet: not one of"),
        ("sd3", INDEX, {"_class_name": "SanaPipeline"}, "its network is a SD3Transformer2DModel"),
        ("sd3", INDEX, {"tokenizer_3": [None, None]}, "has text_encoder_3 but no tokenizer_3"),
        (
            "sd3",
            INDEX,
            {"text_encoder_3": ..., "tokenizer_3": ...},
            "text_encoder_3: model_index.json does not name it",
        ),
        ("wan", INDEX, {"expand_timesteps": True}, "expand_timesteps=true: not false"),
        ("wan", INDEX, {"_class_name": "WanImageToVideoPipeline"}, "WanImageToVideoPipeline: not one of"),
        ("wan", "transformer/config.json", {"image_dim": 1280}, "image_dim=1280: not null"),
        ("wan", "transformer/config.json", {"patch_size": [2, 2, 2]}, r"patch_size=\[2, 2, 2\]: must be \[1, n, n\]"),
        ("wan", "vae/config.json", {"patch_size": 2}, "patch_size=2: not null"),
        ("wan", "vae/config.json", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std=.*: must be z_dim=4 finite num"),
        ("wan", "vae/config.json", {"latents_mean": None}, "latents_mean=null: must be z_dim=4 finite numbers"),
        ("sd3", "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "predict=epsilon: not flow_pred"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(request, tmp_path, family, file, values, message):
    folder = edited(request.getfixturevalue(family), tmp_path / "copy", file, **values)
    with pytest.raises(UserError, match=message) as error:
        find_pipeline(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["sd3", "sd3 without T5", "sana", "wan"])
def test_merged_folders_are_pipelines_that_diffusers_loads(request, tmp_path, family):
    """With the encoders and the classes of the pretrained one, also those that older versions named."""
    if family == "sd3 without T5":
        tiny_sd3_pipeline(has_t5=False).save_pretrained(tmp_path / "copy")
    else:
        name = {"sana": "GemmaTokenizerFast", "wan": "T5TokenizerFast"}.get(family, "CLIPTokenizerFast")
        edited(request.getfixturevalue(family), tmp_path / "copy", INDEX, tokenizer=["transformers", name])
    pretrained, merged = find_pipeline(str(tmp_path / "copy")), tmp_path / "merged"
    folder = pretrained / "transformer"
    config = json.loads((folder / "config.json").read_text())
    variants.write_denoiser(merged, load_tensors(folder), config)
    variants.write_pipeline_files(merged, pretrained)
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (pretrained, find_pipeline(str(merged))))
    unused = ("_diffusers_version", "feature_extractor", "image_encoder", "boundary_ratio", "expand_timesteps")
    assert after == {key: value for key, value in before.items() if key not in unused}
    without = dict.fromkeys(("text_encoder_3", "tokenizer_3")) if family == "sd3 without T5" else {}
    assert type(DiffusionPipeline.from_pretrained(merged, **without)).__name__ == before["_class_name"]
    edited(merged, tmp_path / "projected", "transformer/config.json", _class_name=f"Projected{config['_class_name']}")
    variants.write_pipeline_files(tmp_path / "projected", pretrained)
    assert find_pipeline(str(tmp_path / "projected"))


@pytest.mark.parametrize("family", ["sd3", "sana", "wan"])
@pytest.mark.parametrize("whole", [True, False])
def test_bf16_changes_predictions_by_rounding_alone(request, family, whole):
    """Whole networks, as on a GPU, and linear layers and convolutions alone, as on a CPU; also with projections."""
    folder = request.getfixturevalue(family)
    network = load_denoiser(folder / "transformer")
    encoder = load_encoder(folder, network)
    inputs = torch.randn(2, *encoder.shape_of(8 if family == "sd3" else 32))
    condition = encoder.condition(PROMPTS[:2])
    with torch.no_grad():
        expected = network(inputs, torch.tensor(700.5), **condition).sample
        projected = with_projections(network)
        torch.testing.assert_close(load_encoder(folder, projected).condition(PROMPTS[:2]), condition)
        torch.testing.assert_close(projected(inputs, torch.tensor(700.5), **condition).sample, expected)
        compute_in(torch.bfloat16, projected, whole)
        kept = (*(projected._keep_in_fp32_modules or ()),)
        tensors = {**dict(projected.named_parameters()), **dict(projected.named_buffers())}
        assert torch.bfloat16 in {tensor.dtype for tensor in tensors.values()}
        for name, tensor in tensors.items():
            assert tensor.dtype is torch.float32 or kept == () or {*kept}.isdisjoint(name.split(".")), name
        found = projected(inputs, torch.tensor(700.5), **condition).sample.float()
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_encoders_of_another_family_are_refused(sd3):
    """A UNet that is trained from nothing between them, whose pipeline would ignore the shift of latents."""
    with pytest.raises(UserError, match="text_encoder=CLIPTextModelWithProjection: not CLIPTextModel"):
        load_encoder(sd3, tiny_conditional_unet())


def test_a_shift_of_latents_that_another_pipeline_would_ignore_is_refused(tmp_path):
    """StableDiffusionPipeline ignores it."""
    tiny_pipeline().save_pretrained(tmp_path / "plain")
    folder = edited(tmp_path / "plain", tmp_path / "copy", "vae/config.json", shift_factor=0.1)
    with pytest.raises(UserError, match=r"shift_factor=0\.1: not one of null, 0"):
        find_pipeline(str(folder))


DRAW = """
import json, sys
import diffusers, numpy, torch
kind, folder, lora, output, options = sys.argv[1:]
pipeline = getattr(diffusers, kind).from_pretrained(folder)
pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
options = json.loads(options)
shape = options.pop("shape")
options["latents"] = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(6)])
images = []
for file in ("", lora):
    if file:
        pipeline.load_lora_weights(file)
    drawn = pipeline(output_type="np", **options)
    images.append((drawn.frames[:, 0] if "frames" in drawn else drawn.images)[..., 0])
numpy.save(output, numpy.stack(images))
assert not any(name.partition(".")[0] == "deme" for name in sys.modules)
"""
FAMILIES = {  # pixels along an image's side, and what a pipeline is called with
    "sd3": (8, {"shape": [4, 4, 4]}, "StableDiffusion3Pipeline"),
    "sana": (32, {"shape": [4, 16, 16], "use_resolution_binning": False}, "SanaPipeline"),
    "wan": (16, {"shape": [4, 1, 8, 8], "num_frames": 1}, "WanPipeline"),
}


@pytest.fixture
def own_images(tmp_path) -> Path:
    """Images with a caption each."""
    folder = tmp_path / "images"
    folder.mkdir()
    lines = ["file_name,text"]
    for number, prompt in enumerate(PROMPTS):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{prompt}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_recipe(request, config_file, own_images, tmp_path, family):
    """LoRAs by flow matching from cached texts and latents; plain diffusers draws the same with the merged one."""
    folder, (side, call, kind) = request.getfixturevalue(family), FAMILIES[family]
    config = yaml.safe_load(config_file.read_text())
    config["model"] = {"pretrained": str(folder), "projection": False}
    config["data"] = {"name": str(own_images), "caption_column": "text", "label_column": None, "resolution": side}
    config["data"] |= {"center_crop": True, "cache_latents": True}
    config["timesteps"] |= {"density": "logit_normal"}
    config["finetune"] |= {"lora_rank": 2, "learning_rate": 0.05, "max_steps": 4, "batch_size": 4}
    config["sample"] |= {"prompts": PROMPTS, "scheduler": "euler", "guidance_scale": 4.5}
    config_file.write_text(yaml.safe_dump(config))
    run("finetune.py", config_file)
    cached = losses(tmp_path)
    if family == "sd3":
        shutil.rmtree(tmp_path / "tiny" / "finetuned")
        run("finetune.py", config_file, "data.cache_latents=false")
        assert losses(tmp_path) == pytest.approx(cached, rel=1e-4)
        objective = ["search.method=closed_form", "search.objective=match", "search.images=6", "search.report_images=0"]
        run("search.py", config_file, *objective)
        best = yaml.safe_load((tmp_path / "tiny" / "search" / "best.yaml").read_text())
        assert best["value"] < best["value of the pretrained network"]
        refused = run("merge.py", config_file, "merge.lora_format=kohya", status=2).stderr
        assert "merge.lora_format=kohya: has no known name for transformer." in refused
    run("merge.py", config_file)
    run("sample_ddp.py", config_file)
    found = np.stack(list(images(tmp_path / "tiny" / "samples" / "merged").values()))

    lora, output = tmp_path / "tiny" / "merged" / LORA, tmp_path / "plain.npy"
    blocks = "blocks" if family == "wan" else "transformer_blocks"
    assert all(key.startswith(f"transformer.{blocks}.") for key in load_file(lora))
    call = call | {"prompt": PROMPTS, "height": side, "width": side, "num_inference_steps": 3, "guidance_scale": 4.5}
    command = [sys.executable, "-c", DRAW, kind, str(folder), str(lora), str(output), json.dumps(call)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    without, expected = np.round(np.load(output) * 255)
    assert np.abs(found - without).max() > 2
    assert np.abs(found - expected).max() <= 1


DRAW_PAIR = """
import json, sys
import diffusers, numpy, torch
folder, output = sys.argv[1:]
pipeline = diffusers.WanPipeline.from_pretrained(folder)
pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
options = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 4, "guidance_scale": 4.5}
generators = [torch.Generator().manual_seed(i) for i in range(6)]
options["latents"] = torch.stack([torch.randn(4, 1, 8, 8, generator=generator) for generator in generators])
numpy.save(output, pipeline(json.load(sys.stdin), output_type="np", **options).frames[:, 0, ..., 0])
"""


def test_two_experts_in_one_pipeline(wan, config_file, own_images, tmp_path):
    """An ensemble of two ranges is written in Wan 2.2's form: plain diffusers draws the same, as sample.model does.

    Experts in that form can be merged into one on another pretrained network.
    """
    config = yaml.safe_load(config_file.read_text())
    config["model"] = {"pretrained": str(wan), "projection": False}
    config["data"] = {"name": str(own_images), "caption_column": "text", "label_column": None, "resolution": 16}
    config["timesteps"] = {"edges": [0, 875, 1000]}
    config["finetune"] |= {"lora_rank": 2, "learning_rate": 0.05, "max_steps": 4, "batch_size": 4}
    config["sample"] |= {"prompts": PROMPTS, "scheduler": "euler", "guidance_scale": 4.5, "num_inference_steps": 4}
    config_file.write_text(yaml.safe_dump(config))
    run("finetune.py", config_file)
    pair = tmp_path / "tiny" / "two-experts"
    run("scripts/two_experts.py", config_file)
    assert "two-experts: exists; delete it first" in run("scripts/two_experts.py", config_file, status=2).stderr
    run("sample_ddp.py", config_file, "sample.model=ensemble")
    run("sample_ddp.py", config_file, f"sample.model={pair}", f"sample.output={tmp_path / 'pair'}")
    found = np.stack(list(images(tmp_path / "tiny" / "samples" / "ensemble").values()))
    assert (found == np.stack(list(images(tmp_path / "pair").values()))).all()

    output = tmp_path / "plain.npy"
    command = [sys.executable, "-c", DRAW_PAIR, str(pair), str(output)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, input=json.dumps(PROMPTS), text=True)
    assert np.abs(found - np.round(np.load(output) * 255)).max() <= 1

    refused = run("finetune.py", config_file, f"model.pretrained={pair}", status=2).stderr
    assert "transformer_2 makes it two experts" in refused
    experts = f"merge.experts=[{pair}/transformer_2,{pair}/transformer]"
    run("merge.py", config_file, experts, "merge.coefficients=[0.5,0.5]", "finetune.lora_rank=null")
    merged = load_tensors(tmp_path / "tiny" / "merged" / "transformer")
    low, high = (load_tensors(pair / part) for part in ("transformer_2", "transformer"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (low[name] + high[name]) / 2)


@pytest.mark.parametrize("ratio", [None, 0, 1.0, 0.8755, "0.875", True])
def test_a_boundary_must_be_a_timestep(tmp_path, ratio):
    tiny_wan_pipeline(experts=2).save_pretrained(tmp_path / "pair")
    folder = edited(tmp_path / "pair", tmp_path / "copy", INDEX, boundary_ratio=ratio)
    with pytest.raises(UserError, match=r"boundary_ratio=.*: must be in"):
        experts_in(find_pipeline(str(folder)))
    [(low, below), (high, above)] = experts_in(find_pipeline(str(tmp_path / "pair")))
    assert (low.name, below, high.name, above) == ("transformer_2", (0, 875), "transformer", (875, 1000))


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_the_script_makes_one_lora(request, own_images, tmp_path, family):
    """On a tiny pipeline: one LoRA of four ranges, or of Wan's two."""
    folder, (side, *_) = request.getfixturevalue(family), FAMILIES[family]
    options = [f"model.pretrained={folder}", f"data.name={own_images}", f"data.resolution={side}"]
    options += ["finetune={max_steps: 2, lora_rank: 2, batch_size: 2, mixed_precision: no, base_precision: null}"]
    command = ["bash", str(REPOSITORY / "scripts/sd3_lora.sh"), *options, f"output_dir={tmp_path}"]
    environment = os.environ | {"AS_IT_IS": "1", "CONFIG": f"configs/{family}_lora.yaml"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    tensors = load_file(tmp_path / f"{family}_lora" / "merged" / LORA)
    assert {len(tensor) for name, tensor in tensors.items() if name.endswith("lora_A.weight")} == {
        4 if family == "wan" else 8
    }
    assert "of each GPU's memory" in result.stdout


PUBLISHED = {  # transformer/config.json where it is not the class's default, parameters, and embeddings of positions
    "Stable Diffusion 3 medium": (
        {"_class_name": "SD3Transformer2DModel", "num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}
        | {"caption_projection_dim": 1536},
        2_028_328_000,
        1536 * 192**2,
    ),
    "Stable Diffusion 3.5 medium": (
        {"_class_name": "SD3Transformer2DModel", "num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 384}
        | {"caption_projection_dim": 1536, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))},
        2_243_171_520,
        1536 * 384**2,
    ),
    "SANA 1.6B": ({"_class_name": "SanaTransformer2DModel"}, 1_604_462_752, 0),
    "Wan 2.1 1.3B": (
        {"_class_name": "WanTransformer3DModel", "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
        1_418_996_800,
        2 * 1024 * 128,
    ),
    "Wan 2.2 14B": ({"_class_name": "WanTransformer3DModel"}, 14_288_491_584, 2 * 1024 * 128),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_estimate_of_the_published_networks(name):
    """On the meta device: parameters, and the memory of a LoRA's training with a base in bf16."""
    config, parameters, positions = PUBLISHED[name]
    finetune = Finetune(lora_rank=16, base_precision="bf16", mixed_precision="bf16")
    found, trained, buffers, flops = unet_cost(config, finetune, 128)
    assert (found, buffers) == (parameters, positions)
    size = Size(found, trained, buffers, flops, 3, 0.0, 0, 0, lambda _: 1, 100, ["merged"])
    assert sum(gpu_memory(finetune, size, is_cached=True).values()) == 2 * found + 4 * buffers + 20 * trained


@pytest.mark.parametrize(
    ("family", "tokens", "resolution"), [("sd3", 77 + 256 + 1, 8), ("sana", 300, 32), ("wan", 512, 16)]
)
def test_the_estimate_counts_texts_and_encoders(request, family, tokens, resolution):
    folder = request.getfixturevalue(family)
    network = load_denoiser(folder / "transformer")
    encoder = load_encoder(folder, network)
    channels, flops, encoded, parameters = encoder_cost(folder, resolution)
    pixels = torch.zeros(1, 1, resolution, resolution, dtype=torch.uint8)
    moments, embedding = encoder.moments(pixels), encoder.embed(["a cat"])
    assert embedding.shape[1] == tokens
    assert (channels, encoded) == (1, pytest.approx(2 * (moments.numel() + embedding.numel()), rel=0.01))
    assert parameters == sum(part.num_parameters() for part in (encoder.vae, *encoder.text_encoders))
    assert flops > 0


def test_texts_of_another_width_are_refused(sd3, sana, tmp_path):
    folder = shutil.copytree(sana, tmp_path / "copy")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(sd3 / "text_encoder_3", folder / "text_encoder")
    with pytest.raises(UserError, match="copy/text_encoder: "):
        load_encoder(folder, load_denoiser(folder / "transformer"))
