"""The same recipe on a text-to-image pipeline, by every script."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import run
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from text_to_image import tiny_clip, tiny_conditional_unet, tiny_pipeline

from deme.models.weights import WEIGHTS
from deme.projection import ProjectedUNet2DConditionModel

PROMPTS = ["a handwritten three", "zero", "a red cube", "nine", "a cat", "the end"]
LONG = " ".join(["word"] * 100)


@pytest.fixture(scope="session")
def text_to_image(tmp_path_factory) -> Path:
    """A text-to-image pipeline folder."""
    folder = tmp_path_factory.mktemp("text") / "pretrained"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def text_config(config_file, text_to_image) -> Path:
    """The same configuration, with captions and prompts."""
    config = yaml.safe_load(config_file.read_text())
    config["model"]["pretrained"] = str(text_to_image)
    config["data"] = {"caption_column": "caption", "center_crop": True}
    config["finetune"]["max_steps"] = 4
    config["sample"]["prompts"] = PROMPTS
    config["evaluate"]["clip_model"] = None
    config_file.write_text(yaml.safe_dump(config))
    return config_file


def images(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.array(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def finetuned(root: Path, name: str = "0000-0500") -> dict[str, torch.Tensor]:
    return load_file(root / "tiny" / "finetuned" / name / "unet" / WEIGHTS)


def losses(root: Path, name: str = "0000-0500") -> list[float]:
    lines = (root / "tiny" / "finetuned" / name / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_the_whole_recipe(text_config, tmp_path):
    """finetune, merge, distil, sample by prompts over two processes, score with CLIP; diffusers loads the result."""
    run("finetune.py", text_config, "finetune.preview_every=4", "finetune.preview_prompts=[a,b,c]")
    assert (tmp_path / "tiny" / "finetuned" / "0000-0500" / "previews" / "step-00000004.png").exists()
    run("finetune.py", text_config, "finetune.range=continued")
    run("merge.py", text_config)
    assert "complete" in run("merge.py", text_config).stdout
    run("finetune.py", text_config, "finetune.range=distilled", "distill.max_steps=2")
    assert all(loss > 0 for loss in losses(tmp_path, "distilled"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "tiny" / "merged", safety_checker=None)
    assert isinstance(pipeline.unet, ProjectedUNet2DConditionModel)
    assert pipeline("a cat", num_inference_steps=1, output_type="np", height=8, width=8).images.shape == (1, 8, 8, 1)

    for model in ("pretrained", "continued", "ensemble", "merged", "distilled"):
        run("sample_ddp.py", text_config, f"sample.model={model}", processes=2 if model == "merged" else 1)
        assert len(images(tmp_path / "tiny" / "samples" / model)) == 6
    lines = (tmp_path / "tiny" / "samples" / "merged" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == PROMPTS

    tiny_clip(tmp_path / "clip")
    table = run("evaluate.py", text_config, f"evaluate.clip_model={tmp_path / 'clip'}").stdout
    assert "CLIP score" in table
    rows = json.loads((tmp_path / "tiny" / "results.json").read_text())["rows"]
    assert all(row["clip"] is not None for row in rows)
    run("merge.py", text_config)
    card = (tmp_path / "tiny" / "merged" / "README.md").read_text()
    assert "StableDiffusionPipeline.from_pretrained" in card
    assert "pipeline_tag: text-to-image" in card


def test_without_projections_diffusers_needs_nothing_of_ours(text_config, tmp_path):
    run("finetune.py", text_config, "model.projection=false")
    run("merge.py", text_config, "model.projection=false")
    index = json.loads((tmp_path / "tiny" / "merged" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    StableDiffusionPipeline.from_pretrained(tmp_path / "tiny" / "merged", safety_checker=None)


def test_merged_folders_share_the_encoders_files(text_config, text_to_image, tmp_path):
    """Other names for the same weights: gigabytes are not copied for each merge. Settings, which others write in place,
    are copies; a merged folder that lacks an encoder is not complete; a safety checker is not taken along."""

    def change(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        del index["requires_safety_checker"]  # as in Stable Diffusion v1-4's
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        (folder / "model_index.json").write_text(json.dumps(index))
        (folder / "safety_checker").mkdir()

    options = [*copied(text_to_image, tmp_path, change), "finetune.max_steps=1"]
    run("finetune.py", text_config, *options)
    run("merge.py", text_config, *options)
    merged = tmp_path / "tiny" / "merged"
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (merged / part).samefile(tmp_path / "copy" / part)
    assert not (merged / "vae" / "config.json").samefile(tmp_path / "copy" / "vae" / "config.json")
    index = json.loads((merged / "model_index.json").read_text())
    assert (index["safety_checker"], index["requires_safety_checker"]) == ([None, None], False)
    (merged / VAE).unlink()
    (tmp_path / "copy" / "vae" / "diffusion_pytorch_model.fp16.safetensors").touch()  # another form, which is not read
    assert "no longer holds what was merged" in run("merge.py", text_config, *options).stdout
    assert (merged / VAE).exists()
    assert "is complete" in run("finetune.py", text_config, *options).stdout


def test_a_run_may_start_from_a_merged_network(text_config, text_to_image, tmp_path):
    """Whose projections are trained on; a UNet without projections beside the encoders of one with them is its own."""
    run("finetune.py", text_config, "finetune.max_steps=1")
    run("merge.py", text_config)
    again = [f"model.pretrained={tmp_path / 'tiny' / 'merged'}", "name=again", "finetune.max_steps=1"]
    run("finetune.py", text_config, *again)
    run("merge.py", text_config, *again)
    names = [set(load_file(tmp_path / name / "merged" / "unet" / WEIGHTS)) for name in ("tiny", "again")]
    assert names[0] == names[1]
    unet = dict(tiny_conditional_unet().config)
    keys = ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "norm_num_groups")
    unet = {key: unet[key] for key in (*keys, "attention_head_dim", "cross_attention_dim")}
    options = [f"pretrain.encoders={tmp_path / 'tiny' / 'merged'}", f"pretrain.unet={json.dumps(unet)}"]
    run("pretrain.py", text_config, *options, "pretrain.max_steps=1")
    index = json.loads((tmp_path / "tiny" / "pretrained" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize("negative", ["", "blurred"])
def test_images_are_those_of_diffusers_pipeline(text_config, text_to_image, tmp_path, scale, negative):
    """StableDiffusionPipeline with DDIMScheduler from the same latents, prompts and schedule: to one grey level."""
    settings = [f"sample.guidance_scale={scale}", f"sample.negative_prompt='{negative}'", "sample.model=pretrained"]
    run("sample_ddp.py", text_config, *settings)
    scheduler = DDIMScheduler.from_pretrained(text_to_image / "scheduler")  # which names no clip_sample
    pipeline = StableDiffusionPipeline.from_pretrained(text_to_image, safety_checker=None, scheduler=scheduler)
    expected = pipeline(
        PROMPTS,
        height=8,
        width=8,
        num_inference_steps=3,
        guidance_scale=scale,
        negative_prompt=[negative] * len(PROMPTS),
        latents=torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(6)]),
        output_type="np",
    ).images
    for found, image in zip(images(tmp_path / "tiny" / "samples" / "pretrained").values(), expected, strict=True):
        assert np.abs(found - np.round(image[:, :, 0] * 255)).max() <= 1


def test_image_i_has_prompt_i_whatever_the_batch_and_the_processes(text_config, tmp_path):
    """And is what it is in a run of part of the seeds."""
    folder = tmp_path / "tiny" / "samples" / "pretrained"
    run("sample_ddp.py", text_config, "sample.model=pretrained")
    expected = images(folder)
    shutil.rmtree(folder)
    run("sample_ddp.py", text_config, "sample.model=pretrained", "sample.batch_size=1", processes=2)
    found = images(folder)
    assert all(np.abs(found[name] - image).max() <= 1 for name, image in expected.items())
    part = ["sample.num_images=2", "sample.seed_offset=3", "sample.output=part"]
    run("sample_ddp.py", text_config, "sample.model=pretrained", *part)
    assert all(np.abs(image - expected[name]).max() <= 1 for name, image in images(tmp_path / "part").items())
    [first, _] = (tmp_path / "part" / "prompts.jsonl").read_text().splitlines()
    assert json.loads(first) == {"file": "000003.png", "prompt": "nine"}


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl", "parquet"])
def test_prompts_come_from_files_too(text_config, tmp_path, suffix):
    """The same prompts, the same folder: nothing is left to draw. Other prompts are refused."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / f"prompts.{suffix}"
    prompts = [*PROMPTS, 'a "quoted", one']
    if suffix == "parquet":
        pq.write_table(pa.table({"text": prompts}), file)
    else:
        quoted = [prompt.replace('"', '""') for prompt in prompts]
        texts = {"csv": ["number,text", *(f'{i},"{prompt}"' for i, prompt in enumerate(quoted))], "txt": prompts}
        texts["jsonl"] = [json.dumps({"text": prompt}) for prompt in prompts]
        file.write_text("\n".join(texts[suffix]) + "\n")
    model = ["sample.model=pretrained", "sample.prompt_column=text"]
    run("sample_ddp.py", text_config, *model)
    assert "0 of 6 images to draw" in run("sample_ddp.py", text_config, *model, f"sample.prompts={file}").stdout
    other = run("sample_ddp.py", text_config, *model, "sample.prompts=[a,b,c,d,e,f]", status=2)
    assert "holds 6 images of other prompts, such as 000000.png; choose another folder or set" in other.stderr
    more = run("sample_ddp.py", text_config, *model, f"sample.prompts={file}", "sample.num_images=7")
    assert "1 of 7 images to draw" in more.stdout
    replaced = [f"sample.prompts={[*PROMPTS[:2], 'new', *PROMPTS[3:], prompts[-1]]}", "sample.overwrite=true"]
    result = run("sample_ddp.py", text_config, *model, *replaced, "sample.num_images=7")
    assert "1 of 7 images to draw" in result.stdout


def test_images_are_shrunk_on_the_disk(text_config, tmp_path):
    """By PIL's Lanczos filter, as the COCO protocol wants them."""
    run("sample_ddp.py", text_config, "sample.model=pretrained")
    run("sample_ddp.py", text_config, "sample.model=pretrained", "sample.size_on_disk=4", "sample.output=small")
    for path in (tmp_path / "tiny" / "samples" / "pretrained").glob("*.png"):
        expected = Image.open(path).resize((4, 4), Image.Resampling.LANCZOS)
        assert np.array_equal(np.array(expected), np.array(Image.open(tmp_path / "small" / path.name)))


@pytest.mark.long
@pytest.mark.parametrize("cached", ["true", "false"])
def test_a_killed_run_resumes_bit_for_bit(text_config, tmp_path, cached):
    from robustness.forked import Run

    options = [
        "finetune.range=0",
        "finetune.max_steps=30",
        "finetune.checkpoint_every=5",
        f"data.cache_latents={cached}",
    ]
    run("finetune.py", text_config, *options)
    expected = finetuned(tmp_path)
    shutil.rmtree(tmp_path / "tiny")
    process = Run("finetune.py", ["--config", str(text_config), *options], tmp_path)
    while process.wait(0.01) is None and len(list(tmp_path.rglob("checkpoints/step-*"))) < 2:
        pass
    process.send(signal.SIGKILL)
    process.wait()
    run("finetune.py", text_config, *options)
    found = finetuned(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_two_processes_train_as_one(text_config, tmp_path):
    """Images, captions, dropped captions, posterior samples: up to the order of sums."""
    run("finetune.py", text_config, "finetune.range=0")
    expected = losses(tmp_path)
    shutil.rmtree(tmp_path / "tiny")
    run("finetune.py", text_config, "finetune.range=0", processes=2)
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-4)


def test_cached_latents_train_as_uncached_ones(text_config, tmp_path):
    """The VAE and the text encoder run once; two processes make the same cache, which all runs share."""
    run("finetune.py", text_config, "finetune.range=0")
    expected = losses(tmp_path)
    shutil.rmtree(tmp_path / "tiny")
    run("finetune.py", text_config, "finetune.range=0", "data.cache_latents=true", processes=2)
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-4)
    [cache] = [path for path in (tmp_path / "latent-cache").iterdir() if path.is_dir()]
    assert len(list(cache.glob("part-*.safetensors"))) == 4  # of 512 images each
    made = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    run("finetune.py", text_config, "finetune.range=continued", "data.cache_latents=true")
    assert made == {path: path.stat().st_mtime_ns for path in cache.iterdir()}


@pytest.mark.long
def test_a_cache_goes_on_where_it_was_stopped(text_config, tmp_path):
    """A part that is missing is made again, and is what it was; the others are left alone."""
    options = ["finetune.range=0", "finetune.max_steps=1", "data.cache_latents=true", "data.cached_views=2"]
    options.append("data.random_flip=true")
    run("finetune.py", text_config, *options)
    [cache] = [path for path in (tmp_path / "latent-cache").iterdir() if path.is_dir()]
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert load_file(cache / "part-000000.safetensors")["moments"].shape == (512, 2, 8, 4, 4)
    (cache / "part-000001.safetensors").unlink()
    (cache / "index.json").unlink()
    shutil.rmtree(tmp_path / "tiny")
    run("finetune.py", text_config, *options)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before


def captioned_folder(root: Path) -> list[str]:
    """Images with metadata.csv in data/train: the options that read them."""
    (root / "data" / "train").mkdir(parents=True)
    lines = ["file_name,text"]
    for number, image in enumerate(load_digits().images[:20]):
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(root / "data" / "train" / f"{number}.png")
        lines.append(f"{number}.png,number {number}")
    (root / "data" / "train" / "metadata.csv").write_text("\n".join(lines) + "\n")
    return [f"data.name={root / 'data'}", "data.caption_column=text", "data.label_column=null"]


def test_captions_come_from_a_folder_with_metadata(text_config, tmp_path):
    run("finetune.py", text_config, *captioned_folder(tmp_path), "finetune.range=0")


@pytest.mark.parametrize("form", ["half", "half variant", "sharded", "sharded variant"])
def test_pipelines_in_half_precision_or_several_files_load(text_config, text_to_image, tmp_path, form):
    """Finetuned, merged and sampled; the merged folder has weights of one kind, which diffusers loads."""
    folder = tmp_path / "other"
    pipeline = StableDiffusionPipeline.from_pretrained(text_to_image, safety_checker=None).to(torch.float16)
    variant = "fp16" if "variant" in form else None
    pipeline.save_pretrained(folder, variant=variant)
    if "sharded" in form:
        shutil.rmtree(folder / "unet")
        pipeline.unet.save_pretrained(folder / "unet", variant=variant, max_shard_size="20KB")
        assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    options = [f"model.pretrained={folder}", "finetune.max_steps=1"]
    run("finetune.py", text_config, *options)
    run("merge.py", text_config, *options)
    run("sample_ddp.py", text_config, *options)
    assert len(images(tmp_path / "tiny" / "samples" / "merged")) == 6
    StableDiffusionPipeline.from_pretrained(tmp_path / "tiny" / "merged", safety_checker=None)


def copied(text_to_image: Path, root: Path, change) -> list[str]:
    """A changed copy of the pipeline: the option that takes it."""
    shutil.copytree(text_to_image, root / "copy")
    change(root / "copy")
    return [f"model.pretrained={root / 'copy'}"]


def without(part: str):
    return lambda root, pipeline: copied(pipeline, root, lambda folder: shutil.rmtree(folder / part))


def other_channels(root: Path, pipeline: Path) -> list[str]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / "unet")
        tiny_conditional_unet(in_channels=5).save_pretrained(folder / "unet")

    return copied(pipeline, root, change)


def empty_file(root: Path, pipeline: Path) -> list[str]:
    (root / "prompts.txt").write_text("")
    return [f"sample.prompts={root / 'prompts.txt'}"]


def damaged(file: str, change):
    """The tensors of a part's file changed."""

    def prepare(root: Path, pipeline: Path) -> list[str]:
        def edit(folder: Path) -> None:
            tensors = load_file(folder / file)
            change(tensors)
            save_file(tensors, folder / file, {"format": "pt"})

        return copied(pipeline, root, edit)

    return prepare


def without_vocabulary(root: Path, pipeline: Path) -> list[str]:
    return copied(pipeline, root, lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink())


VAE = "vae/diffusion_pytorch_model.safetensors"
MISTAKES = {
    "a VAE that lacks a tensor": (
        "sample_ddp.py",
        damaged(VAE, lambda tensors: tensors.pop("decoder.conv_in.weight")),
        "copy/vae: weights and config.json do not fit each other (decoder.conv_in.weight …)",
    ),
    "NaN in the VAE": (
        "sample_ddp.py",
        damaged(VAE, lambda tensors: tensors["decoder.conv_in.weight"].fill_(float("nan"))),
        "copy/vae: tensor decoder.conv_in.weight holds NaN or infinite values",
    ),
    "a text encoder that lacks a tensor": (
        "finetune.py",
        damaged("text_encoder/model.safetensors", lambda tensors: tensors.pop(next(iter(tensors)))),
        "copy/text_encoder: weights and config.json do not fit each other",
    ),
    "a tokenizer without a vocabulary": ("sample_ddp.py", without_vocabulary, "copy/tokenizer: "),
    "a pipeline without a text encoder": ("finetune.py", without("text_encoder"), "copy/text_encoder: missing"),
    "no prompts for previews": (
        "finetune.py",
        lambda root, _: ["finetune.preview_prompts=[]"],
        "finetune.preview_prompts=[]: must not be empty",
    ),
    "views that are all the same": (
        "finetune.py",
        lambda root, _: ["data.cache_latents=true", "data.cached_views=2"],
        "data.cached_views=2: data.center_crop=true and data.random_flip=false make them all the same",
    ),
    "no caption column": (
        "finetune.py",
        lambda root, _: ["data.caption_column=null"],
        "data.caption_column=null: a ",
    ),
    "a missing caption column": (
        "finetune.py",
        lambda root, _: [*captioned_folder(root), "data.caption_column=words"],
        "data.caption_column=words: ",
    ),
    "several views": (
        "finetune.py",
        lambda root, _: ["data.cache_latents=true", "data.random_flip=true"],
        "data.cache_latents=true: one view needs data.center_crop=true",
    ),
    "no prompts": ("sample_ddp.py", lambda root, _: ["sample.prompts=null"], "sample.prompts=null: sample.model="),
    "an empty prompt file": ("sample_ddp.py", empty_file, "prompts.txt: holds no prompts"),
    "a missing prompt file": (
        "sample_ddp.py",
        lambda root, _: ["sample.prompts=a.txt"],
        "prompts=a.txt: no such file",
    ),
    "a missing tokenizer": ("sample_ddp.py", without("tokenizer"), "copy/tokenizer: missing"),
    "a missing VAE": ("sample_ddp.py", without("vae"), "copy/vae"),
    "a VAE that does not fit": ("sample_ddp.py", other_channels, "in_channels=5: the encoder gives 4"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_answered_in_one_line(text_config, text_to_image, tmp_path, name):
    script, prepare, message = MISTAKES[name]
    options = prepare(tmp_path, text_to_image)
    result = run(script, text_config, *options, "sample.model=pretrained", status=2)
    [line] = [line for line in result.stderr.splitlines() if line.startswith(script)]
    assert message in line
    assert "Traceback" not in result.stderr


def test_a_ddpm_takes_no_text(config_file):
    """Neither captions nor prompts."""
    result = run("sample_ddp.py", config_file, "sample.prompts=[a,b,c,d,e,f]", "sample.model=pretrained", status=2)
    assert "sample.prompts=['a', 'b', 'c', 'd', 'e', 'f']: sample.model=pretrained takes none" in result.stderr
    result = run("finetune.py", config_file, "data.caption_column=caption", status=2)
    assert "data.caption_column=caption: the model takes no captions" in result.stderr


def test_prompts_that_are_too_long_are_cut_as_diffusers_cuts_them_and_named_once(text_config, text_to_image, tmp_path):
    prompts = f"sample.prompts=[{LONG},{LONG} and more,c,d,e,f]"
    result = run("sample_ddp.py", text_config, prompts, "sample.model=pretrained", "sample.batch_size=1")
    assert result.stdout.count("cut to 77 tokens, as all such texts: word word") == 1
    found = images(tmp_path / "tiny" / "samples" / "pretrained")
    pipeline = StableDiffusionPipeline.from_pretrained(text_to_image, safety_checker=None)
    embeddings, _ = pipeline.encode_prompt(LONG, "cpu", 1, False)
    assert embeddings.shape[1] == 77
    assert len(found) == 6
