"""merge.py on LoRAs: one that plain diffusers loads, or a pipeline."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from text_to_image import tiny_pipeline, tiny_xl_pipeline

from deme.config.paths import LORA
from deme.job.files import sha256
from deme.method.lora import Factors
from deme.models.lora import folded, kohya_names, layers_of, read_lora, tensor_of, weights_of, write_lora
from deme.models.single_file import write_single_file
from deme.models.weights import WEIGHTS

LOADED = """
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.load_lora_weights(sys.argv[2])
parts = [name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipeline, name)]
pipeline.fuse_lora(components=parts)
pipeline.unload_lora_weights()
tensors = {f"{part}.{name}": tensor for part in parts for name, tensor in getattr(pipeline, part).state_dict().items()}
save_file({name.removeprefix("unet."): tensor.contiguous() for name, tensor in tensors.items()}, sys.argv[3])
assert not any(name.partition(".")[0] == "deme" for name in sys.modules)
"""
TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(base) -> list[Path]:
    """Two LoRAs of different ranks, layers and namings, one of which also changes convolutions."""
    layers, written = layers_of(base), []
    attention = [layer for layer in layers if layer.endswith((".to_q", ".to_v"))]
    convolutions = [layer for layer in layers if layer.endswith("resnets.0.conv1")]
    for seed, (names, rank) in enumerate([(attention, 2), ([*attention[:3], *convolutions], 3)]):
        torch.manual_seed(seed)
        lora = {}
        for name in names:
            shape = layers[name]
            lora[name] = Factors(torch.randn(rank, *shape[1:]), 0.1 * torch.randn(shape[0], rank))
        written.append(base.parent / f"lora{seed}.safetensors")
        write_lora(written[-1], lora, {}, kohya_names(layers) if seed == 1 else None)
    return written


@pytest.fixture
def config(tmp_path, base, files) -> Path:
    file = tmp_path / "loras.yaml"
    content = {"name": "tiny", "model": {"pretrained": str(base)}, "data": {"resolution": 8}}
    content["merge"] = {"experts": list(map(str, files)), "coefficients": {"*attn1*": [0.7, -1.5], "*": [1, 2]}}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_loras_become_one_that_diffusers_loads_as_the_pipeline_with_their_sum(config, base, files, tmp_path):
    run("merge.py", config)
    merged = tmp_path / "runs" / "tiny" / "merged"
    assert {file.name for file in merged.iterdir()} == {LORA, "merge.yaml"}
    record = yaml.safe_load((merged / "merge.yaml").read_text())
    assert [part["sha256"] for part in record["finetuned"]] == list(map(sha256, files))
    with safe_open(merged / LORA, "pt") as opened:
        header = opened.metadata()
    assert yaml.safe_load(header["pretrained"])["sha256"] == sha256(base / "unet" / WEIGHTS)
    assert yaml.safe_load(header["coefficients"]) == {"*attn1*": [0.7, -1.5], "*": [1, 2]}
    assert "is complete" in run("merge.py", config).stdout

    whole = run("merge.py", config, "merge.into=model", f"merge.output={tmp_path / 'model'}")
    assert "wrote" in whole.stdout
    command = [sys.executable, "-c", LOADED, str(base), str(merged / LORA), str(tmp_path / "fused.safetensors")]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    fused, folder = load_file(tmp_path / "fused.safetensors"), load_file(tmp_path / "model" / "unet" / WEIGHTS)
    assert {name for name in fused if not name.startswith("text_encoder")} == folder.keys()
    for name, tensor in folder.items():
        torch.testing.assert_close(fused[name], tensor, rtol=1e-4, atol=1e-5)

    model_record = yaml.safe_load((tmp_path / "model" / "merge.yaml").read_text())
    assert record["moved"].keys() == model_record["moved"].keys() >= {"down_blocks.0", "mid_block", "up_blocks.1"}
    for block, values in record["moved"].items():
        assert values == pytest.approx(model_record["moved"][block], rel=1e-4)

    layers, before = layers_of(base), load_file(base / "unet" / WEIGHTS)
    changes = [folded(before, read_lora(file, layers)) for file in files]
    for name, tensor in folder.items():
        w = (0.7, -1.5) if "attn1" in name else (1, 2)
        expected = before[name] + sum(x * (part[name] - before[name]) for x, part in zip(w, changes, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)


def test_a_truncated_lora_has_its_error_in_the_record(config, tmp_path):
    printed = run("merge.py", config, "merge.lora_rank=3", "merge.lora_format=kohya").stdout
    merged = tmp_path / "runs" / "tiny" / "merged"
    record = yaml.safe_load((merged / "merge.yaml").read_text())
    errors = record["relative errors"]
    assert 0 < errors["all layers"] < 1
    assert f"truncated to merge.lora_rank=3: relative error {errors['all layers']:.3g}" in printed
    tensors = load_file(merged / LORA)
    assert {len(value) for key, value in tensors.items() if key.endswith("lora_down.weight")} == {3}
    assert all(key.startswith("lora_unet_") for key in tensors)


def test_another_methods_lora_is_what_the_merged_model_has_truncated_with_its_error(config, base, tmp_path):
    ties = ["merge.method=ties", "merge.settings.fraction=0.5"]
    run("merge.py", config, *ties, "merge.into=model", f"merge.output={tmp_path / 'model'}")
    printed = run("merge.py", config, *ties).stdout
    merged = tmp_path / "runs" / "tiny" / "merged"
    errors = yaml.safe_load((merged / "merge.yaml").read_text())["relative errors"]
    told = f"ties is truncated to the sum of the ranks: relative error {errors['all layers']:.3g} of the merged LoRA"
    assert told in printed

    before, after = load_file(base / "unet" / WEIGHTS), load_file(tmp_path / "model" / "unet" / WEIGHTS)
    lora = folded(before, read_lora(merged / LORA, layers_of(base)))
    assert {name for name in after if not torch.equal(before[name], after[name])} == lora.lora.keys()
    lost, whole = 0, 0
    for name in lora.lora:
        squares = [float((after[name] - tensors[name]).square().sum()) for tensors in (lora, before)]
        assert (squares[0] / squares[1]) ** 0.5 == pytest.approx(errors.get(name, 0), rel=1e-3, abs=1e-5)
        lost, whole = lost + squares[0], whole + squares[1]
    assert (lost / whole) ** 0.5 == pytest.approx(errors["all layers"], rel=1e-3)


@pytest.fixture(scope="module")
def xl(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("xl") / "pipeline"
    tiny_xl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def xl_files(xl) -> list[Path]:
    """A LoRA of all layers of the UNet and both text encoders by kohya, and one of diffusers."""
    layers, written = layers_of(xl), []
    names = [layer for layer in layers if ".embeddings." not in layer]
    for seed, (chosen, kohya) in enumerate([(names, kohya_names(layers)), (names[::3], None)]):
        torch.manual_seed(seed)
        lora = {name: Factors(torch.randn(2, *layers[name][1:]), torch.randn(layers[name][0], 2)) for name in chosen}
        written.append(xl.parent / f"lora{seed}.safetensors")
        write_lora(written[-1], lora, {}, kohya)
    return written


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_loras_of_xl_become_one_that_diffusers_loads(config, xl, xl_files, tmp_path, form):
    values = [f"model.pretrained={xl}", f"merge.experts=[{','.join(map(str, xl_files))}]"]
    run("merge.py", config, *values, "merge.coefficients=[0.7,-1.5]", f"merge.lora_format={form}")
    merged = tmp_path / "runs" / "tiny" / "merged" / LORA
    if form == "kohya":
        begins = ("lora_unet_input_blocks_", "lora_unet_label_emb_0_0.", "lora_te1_text_model_", "lora_te2_text_model_")
        assert all(any(key.startswith(begin) for key in load_file(merged)) for begin in begins)
    command = [sys.executable, "-c", LOADED, str(xl), str(merged), str(tmp_path / "fused.safetensors")]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    fused, layers, weights = load_file(tmp_path / "fused.safetensors"), layers_of(xl), weights_of(xl)
    first, second = (read_lora(file, layers) for file in xl_files)
    assert first.keys() > second.keys()
    for layer, factors in first.items():
        expected = weights[layer] + 0.7 * factors.change()
        if layer in second:
            expected = expected - 1.5 * second[layer].change()
        name = tensor_of(layer)
        loaded = fused[name if name in fused else name.replace("text_encoder.text_model.", "text_encoder.")]
        torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)


def test_a_lora_is_folded_into_a_pipeline_of_xl_that_diffusers_draws_with(config, xl, tmp_path):
    layers = [layer for layer in layers_of(xl) if layer.startswith("unet.") and layer.endswith(".to_q")]
    shapes = layers_of(xl)
    lora = {name: Factors(torch.ones(1, shapes[name][1]), torch.ones(shapes[name][0], 1)) for name in layers}
    write_lora(tmp_path / "a.safetensors", lora, {})
    values = [f"model.pretrained={xl}", "merge.experts=[a.safetensors]", "merge.coefficients=[1]"]
    run("merge.py", config, *values, "merge.into=model")
    merged = tmp_path / "runs" / "tiny" / "merged"
    assert "StableDiffusionXLPipeline.from_pretrained" in (merged / "README.md").read_text()
    images = []
    for make in (lambda: DiffusionPipeline.from_pretrained(merged), lambda: tiny_xl_pipeline()):
        pipeline = make()
        pipeline.set_progress_bar_config(disable=True)
        if not images:
            assert pipeline.config.force_zeros_for_empty_prompt
        else:
            for name in layers:
                pipeline.unet.get_submodule(name.removeprefix("unet.")).weight.data += 1
        noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        drawn = pipeline("a", latents=noise, num_inference_steps=2, height=8, width=8, output_type="np").images
        images.append(torch.from_numpy(drawn))
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


SINGLE = """
import sys, torch
import diffusers
kind, file, folder = sys.argv[1:]
kind, images = getattr(diffusers, kind), []
for pipeline in (kind.from_single_file(file, config=folder, local_files_only=True), kind.from_pretrained(folder)):
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = pipeline("a", latents=latents, num_inference_steps=3, height=8, width=8, output_type="np").images
    images.append((255 * torch.from_numpy(drawn)).round())
assert images[0].std() > 5 and (images[0] - images[1]).abs().max() <= 1, images
assert not any(name.partition(".")[0] == "deme" for name in sys.modules)
"""


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_whole_pipeline_is_written_in_one_file_that_diffusers_draws_with(config, base, xl, tmp_path, kind):
    """From one file to another: a LoRA is folded into the pipeline in a file."""
    folder = base if kind == "StableDiffusionPipeline" else xl
    write_single_file(tmp_path / "base.safetensors", folder, {})
    layer = TO_K.replace("unet.", "")
    name = f"lora_unet_{layer.replace('.', '_')}"
    lora = {f"{name}.lora_down.weight": torch.ones(1, layers_of(folder)[TO_K][1])}
    save_file(lora | {f"{name}.lora_up.weight": torch.ones(16, 1)}, tmp_path / "a.safetensors")
    values = ["model.pretrained=base.safetensors", f"model.config={folder}", "merge.experts=[a.safetensors]"]
    values += ["merge.coefficients=[0.5]", "merge.into=model", "merge.single_file=true"]
    printed = run("merge.py", config, *values).stdout
    merged = tmp_path / "runs" / "tiny" / "merged"
    file = merged / "tiny.safetensors"
    assert "base.safetensors: its pipeline is in runs/single-files/base-" in printed
    assert "wrote runs/tiny/merged/tiny.safetensors" in printed
    before, after = load_file(tmp_path / "base.safetensors"), load_file(file)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
    torch.testing.assert_close(after[changed[0]], before[changed[0]] + 0.5)
    with safe_open(file, "pt") as opened:
        assert yaml.safe_load(opened.metadata()["coefficients"]) == {"*": [0.5]}
    command = [sys.executable, "-c", SINGLE, kind, str(file), str(merged)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    file.unlink()
    again = run("merge.py", config, *values).stdout
    assert "is complete" in again
    assert file.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["merge.single_file=true"], "merge.single_file=true: holds a pipeline, not a LoRA"),
        (["merge.method=slerp"], "merge.method=slerp: needs the coefficients 1 − t and t"),
        (["merge.lora_rank=0"], "merge.lora_rank=0: must be above 0"),
        (["merge.experts=[ranges,./a.safetensors]"], "LoRAs and whole networks can't be merged together"),
        (["merge.experts=[ranges]", "merge.coefficients=null", "merge.into=model"], "merge.into=model: only for LoRAs"),
        (["merge.into=model", "merge.lora_rank=2"], "merge.lora_rank=2: only for LoRAs that are merged into one"),
        (["merge.push_to_hub=a/b"], "merge.push_to_hub=a/b: uploads pipelines, not LoRAs"),
        (
            ["merge.experts=[no.safetensors]", "merge.coefficients=[1]"],
            "no.safetensors: missing; merge.experts must name",
        ),
        (["merge.coefficients=[0,0]"], "leave nothing to write"),
        (["merge.coefficients=[1]"], "1 coefficients for 2 networks"),
    ],
)
def test_mistakes_are_one_line(config, overrides, message):
    error = run("merge.py", config, *overrides, status=2).stderr
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_lora_that_does_not_fit_is_named(config, tmp_path):
    layer = TO_K.removeprefix("unet.")
    save_file(
        {f"{TO_K}.lora_A.weight": torch.ones(2, 99), f"{TO_K}.lora_B.weight": torch.ones(16, 2)},
        tmp_path / "x.safetensors",
    )
    error = run("merge.py", config, "merge.experts=[x.safetensors]", "merge.coefficients=[1]", status=2).stderr
    assert f"x.safetensors: unet.{layer}: factors of the shapes (16, 2) and (2, 99)" in error
