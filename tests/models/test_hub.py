import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from conftest import PICKLED_WEIGHTS
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from text_to_image import tiny_pipeline, tiny_sd3_pipeline

from deme.errors import UserError
from deme.models.denoisers import load_denoiser
from deme.models.encoder_loading import load_encoder
from deme.models.pipelines import denoiser_folder, encoder_files, find_pipeline
from deme.models.weights import WEIGHTS, weights_files

COMMIT = "a" * 40
UNET, HALF = f"unet/{WEIGHTS}", "unet/diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture(scope="module")
def text_to_image(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Put files of a repository into the Hub's cache, as its client keeps them, with the listing of all that the Hub
    has; the Hub itself cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(on_hub, here: dict[str, Path], revision: str = "main") -> Path:
        folder = tmp_path / "models--tester--model"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / revision).write_text(COMMIT)
        if on_hub is not None:  # older clients keep no listing
            (folder / "trees").mkdir()
            files = {path: {"size": 1, "blob_id": hashlib.sha1(path.encode()).hexdigest()} for path in on_hub}
            (folder / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
        for path, source in here.items():
            target = folder / "snapshots" / COMMIT / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        return folder / "snapshots" / COMMIT

    return put


def files(folder: Path, *left_out: str) -> dict[str, Path]:
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name not in left_out}


OTHERS = ["README.md", "training_args.json", f"checkpoint-500/{UNET}", "unet/diffusion_pytorch_model.bin", HALF]
OTHERS += ["safety_checker/config.json", "safety_checker/model.safetensors", "unet/diffusion_pytorch_model.non_ema.bin"]


@pytest.mark.parametrize("listing", [True, False])
def test_what_is_read_is_enough_offline(cached, pretrained, listing):
    """Whatever else the Hub has, and whether the client kept the listing of that."""
    here = files(pretrained)
    folder = cached([*here, *OTHERS] if listing else None, here)
    assert find_pipeline("tester/model") == folder


@pytest.mark.parametrize("form", ["half", "half bf16", "sharded", "pickled", "sharded pickles"])
def test_weights_of_any_form_are_enough_offline(cached, pretrained, tmp_path, form):
    """As from_pretrained(variant="fp16") leaves the cache, while the Hub has full precision, too."""
    import torch

    tensors = load_file(pretrained / UNET)
    here = files(pretrained, UNET)
    made = tmp_path / "made"
    made.mkdir()
    if form == "half":
        save_file(tensors, made / Path(HALF).name)
    elif form == "half bf16":
        save_file(tensors, made / Path(HALF).name.replace("fp16", "bf16"))
    elif form == "pickled":
        torch.save(tensors, made / PICKLED_WEIGHTS)
    else:
        safe = form == "sharded"
        load_denoiser(pretrained / "unet").save_pretrained(made, max_shard_size="20KB", safe_serialization=safe)
        (made / "config.json").unlink()
    here |= {f"unet/{name}": path for name, path in files(made).items()}
    folder = cached([*here, UNET, *OTHERS], here)
    assert find_pipeline("tester/model") == folder
    assert weights_files(folder / "unet")
    assert load_denoiser(folder / "unet")


def test_a_text_to_image_pipeline_is_found_offline_part_by_part(cached, text_to_image):
    """Each part in its own form: the network in half precision alone, the others in full."""
    here = files(text_to_image, UNET) | {HALF: text_to_image / UNET}
    folder = cached(
        [*here, UNET, "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"], here
    )
    assert find_pipeline("tester/model") == folder


def test_variants_of_encoders_are_read_where_they_stand_alone(text_to_image, tmp_path):
    """Beside full precision they are not hashed, or linked into what is merged; pickles have a remedy."""
    folder = shutil.copytree(text_to_image, tmp_path / "copy")
    before = encoder_files(folder)
    full, half = folder / "vae" / WEIGHTS, folder / "vae" / "diffusion_pytorch_model.bf16.safetensors"
    shutil.copy(full, half)
    shutil.copy(full, folder / "vae" / "diffusion_pytorch_model.int4.safetensors")
    assert encoder_files(folder) == before
    full.unlink()
    assert encoder_files(folder) == before | {f"vae/{WEIGHTS}": half}
    load_encoder(folder, load_denoiser(folder / "unet"))
    half.rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"vae/diffusion_pytorch_model.bin: weights that are pickles are read of unet"):
        encoder_files(folder)


def test_t5_is_found_offline_in_shards(cached, tmp_path):
    """Beside its form in half precision, of which the Hub has shards, too."""
    pipeline = tiny_sd3_pipeline()
    pipeline.save_pretrained(tmp_path / "made")
    (tmp_path / "made" / "text_encoder_3" / "model.safetensors").unlink()
    pipeline.text_encoder_3.save_pretrained(tmp_path / "made" / "text_encoder_3", max_shard_size="40KB")
    here = files(tmp_path / "made")
    shards = [name for name in here if name.startswith("text_encoder_3/model-")]
    assert len(shards) > 1
    half = ["text_encoder_3/model.safetensors.index.fp16.json", "text_encoder_3/model.fp16-00001-of-00002.safetensors"]
    folder = cached([*here, *half], here)
    assert find_pipeline("tester/model") == folder
    assert set(shards) < encoder_files(folder).keys()
    load_encoder(folder, load_denoiser(folder / "transformer"))
    (folder / shards[0]).unlink()
    with pytest.raises(UserError, match=f"{Path(shards[0]).name}: missing"):
        find_pipeline("tester/model")


def test_a_flat_pipeline_is_found_offline(cached, pretrained):
    flat = {Path(name).name: path for name, path in files(pretrained).items()}
    folder = cached([*flat, PICKLED_WEIGHTS, "samples.png"], flat)
    assert denoiser_folder(find_pipeline("tester/model")) == folder


@pytest.mark.parametrize("lacking", [UNET, "scheduler/scheduler_config.json", "unet/config.json"])
def test_what_is_missing_offline_is_named(cached, pretrained, lacking):
    here = files(pretrained, lacking)
    cached([*here, lacking], here)
    with pytest.raises(UserError, match=f"{lacking}.*missing.*the Hub's cache does not hold all of it") as error:
        find_pipeline("tester/model")
    assert "\n" not in str(error.value)


def test_a_revision_follows_the_name(cached, pretrained):
    folder = cached(None, files(pretrained), revision="v1.0")
    assert find_pipeline("tester/model@v1.0") == folder
    assert find_pipeline(f"tester/model@{COMMIT}") == folder
    for other in ("tester/model", "tester/model@v2.0"):
        with pytest.raises(UserError, match="neither a pipeline folder nor a reachable Hub id"):
            find_pipeline(other)
    for name in ("tester/model@", "model@v1.0", "@v1.0"):
        with pytest.raises(UserError, match="no such folder"):
            find_pipeline(name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub whose client copies the files that a folder has, and says which ones it was asked for."""
    copied = set()

    def serve(source: Path) -> set[str]:
        def snapshot_download(repo_id, revision, allow_patterns, local_files_only):
            assert copied <= set() or revision == COMMIT
            for name in filter_repo_objects(files(source), allow_patterns=allow_patterns):
                (tmp_path / COMMIT / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / name, tmp_path / COMMIT / name)
                copied.add(name)
            return str(tmp_path / COMMIT)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return copied

    return serve


def test_no_more_is_downloaded_than_is_read(hub, text_to_image, tmp_path):
    source = shutil.copytree(text_to_image, tmp_path / "source")
    for name in (*OTHERS, "vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "model.ckpt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    copied = hub(source)
    folder = find_pipeline("tester/model")
    read = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", UNET, *encoder_files(folder)}
    assert copied == read


def test_nothing_but_settings_is_downloaded_of_a_model_of_another_kind(hub, text_to_image, tmp_path):
    source = shutil.copytree(text_to_image, tmp_path / "source")
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    copied = hub(source)
    with pytest.raises(UserError, match="_class_name=FluxPipeline: not one of"):
        find_pipeline("tester/model")
    assert not [name for name in copied if name.endswith(".safetensors")]
