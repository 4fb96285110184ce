import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import PICKLED_WEIGHTS, REPOSITORY, run
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

import merge
from deme.config.experiment import Config
from deme.config.reading import load_config
from deme.errors import UserError
from deme.job.files import sha256
from deme.job.records import PRETRAINED_WEIGHTS, RUN, Record
from deme.measure.scores import Score, save_scores
from deme.method.projection import PROJECTION_SUFFIX
from deme.method.task_vectors import merge_method
from deme.models.denoisers import load_denoiser, with_projections
from deme.models.searched import read_searched
from deme.models.weights import WEIGHTS


@pytest.fixture
def experts(config_file, pretrained):
    """Two projected finetuned UNets, made without training."""
    folders = []
    for index, name in enumerate(["0000-0500", "0500-1000"]):
        unet = with_projections(UNet2DModel.from_pretrained(pretrained / "unet"))
        torch.manual_seed(index + 1)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        folders.append(config_file.parent / "tiny" / "finetuned" / name / "unet")
        unet.save_pretrained(folders[-1])
    return folders


def output_of(program: str, folder, **environment: str) -> str:
    """What a Python program prints that runs in `folder` and sees of this project only what `environment` says."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"} | environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_merged_folder_is_a_pipeline_of_the_formula(config_file, pretrained, experts):
    run("merge.py", config_file)
    output = config_file.parent / "tiny" / "merged"
    base, merged = load_file(pretrained / "unet" / WEIGHTS), load_file(output / "unet" / WEIGHTS)
    first, second = (load_file(folder / WEIGHTS) for folder in experts)
    assert merged.keys() == first.keys()
    for name, weight in merged.items():
        pretrained_weight = base[name] if name in base else torch.eye(len(weight))[:, :, None, None]
        expected = (
            pretrained_weight + 0.5 * (first[name] - pretrained_weight) + 0.25 * (second[name] - pretrained_weight)
        )
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6, msg=name)
    scheduler = "scheduler/scheduler_config.json"
    assert (output / scheduler).read_bytes() == (pretrained / scheduler).read_bytes()
    record = yaml.safe_load((output / "merge.yaml").read_text())
    assert record["coefficients"] == {"*": [0.5, 0.25]}
    assert [entry["timesteps"] for entry in record["finetuned"]] == ["0000-0500", "0500-1000"]
    assert len(record["pretrained"]["sha256"]) == 64
    middle = [name for name in first if name.startswith("mid_block.")]  # its projection, too
    assert "mid_block.projection.weight" in middle
    like = {name: base.get(name, torch.eye(len(first[name]))[:, :, None, None]) for name in middle}
    norms = [sum(float((part[name] - like[name]).square().sum()) for name in middle) ** 0.5 for part in (first, second)]
    assert record["moved"]["mid_block"] == pytest.approx([0.5 * norms[0], 0.25 * norms[1]], rel=1e-4)
    assert "is complete" in run("merge.py", config_file).stdout


def test_networks_of_an_ema_width_are_searched_and_merged(config_file):
    """Of a tracked one: the formula with the last snapshots, which merge.yaml names; a finished merge is left alone."""
    run("finetune.py", config_file, "finetune.snapshot_every=2", "finetune.ema_profiles=[0.05,0.1]")
    options = ["merge.ema_width=0.1", "merge.coefficients=search"]
    small = ["search.method=closed_form", "search.images=16", "search.report_images=0"]
    run("search.py", config_file, options[0], *small, processes=2)  # of which one writes the networks
    run("merge.py", config_file, *options)
    root = config_file.parent / "tiny"
    record = yaml.safe_load((root / "merged/merge.yaml").read_text())
    merged, expected = load_file(root / "merged/unet" / WEIGHTS), {}
    for entry, coefficient in zip(record["finetuned"], record["coefficients"]["*"], strict=True):
        folder = root / "finetuned" / entry["timesteps"]
        assert entry["path"] == str(folder / "ema-0.100/unet")
        [(name, digest)] = entry["snapshots"].items()
        assert (entry["ema_width"], entry["step"], name) == (0.1, 6, "snapshots/00000006/ema-0.100/unet")
        assert digest == entry["sha256"] == sha256(folder / name / WEIGHTS)
        expected = {
            key: expected.get(key, 0) + coefficient * w for key, w in load_file(folder / name / WEIGHTS).items()
        }
    base, rest = load_file(Path(record["pretrained"]["path"]) / "unet" / WEIGHTS), 1 - sum(record["coefficients"]["*"])
    for key in base:
        torch.testing.assert_close(merged[key], expected[key] + rest * base[key], rtol=1e-4, atol=1e-5, msg=key)
    assert "merged is complete" in run("merge.py", config_file, *options).stdout
    refused = run("merge.py", config_file, options[1], status=2).stderr
    assert "merge.coefficients=search: found for other networks; search again" in refused


def test_a_file_of_coefficients_may_name_no_networks(tmp_path):
    """One of search.py names those that it searched, and is refused for others."""
    file, method, config = tmp_path / "own.yaml", merge_method("task_arithmetic", {}), Config()
    file.write_text("coefficients: {'*': [0.1, 0.2]}\n")
    merge.check_searched(config, read_searched(file), ["a", "b", "c"], method)
    file.write_text("{coefficients: {'*': [0.1, 0.2]}, pretrained: a, finetuned: [b, d]}\n")
    with pytest.raises(UserError, match="found for other networks"):
        merge.check_searched(config, read_searched(file), ["a", "b", "c"], method)


@pytest.mark.parametrize("given", ["0.5,0.5", "1 -0.5e-3", "1e-3,+2"])
def test_a_list_of_coefficients_without_brackets_is_answered_with_what_is_read(config_file, given):
    wrong = load_config(config_file, [f"merge.coefficients={given}"])
    with pytest.raises(UserError, match=r": no file; a list is written \[.*\]$") as refusal:
        merge.find_searched(wrong)
    right = load_config(config_file, [f"merge.coefficients={str(refusal.value).rpartition(' ')[2]}"])
    assert right.coefficient_groups == {"*": [float(number) for number in re.split("[, ]", given)]}
    with pytest.raises(UserError, match=r"best-2.yaml is missing; search\.py makes it"):
        merge.find_searched(load_config(config_file, ["merge.coefficients=best-2.yaml"]))


def test_weights_are_hashed_once_and_tell_of_a_copy_and_of_another_base(
    config_file, pretrained, experts, monkeypatch, capsys
):
    shutil.copy(experts[0] / WEIGHTS, experts[1])
    Record(RUN, {PRETRAINED_WEIGHTS: "0" * 64}, {"free": {}}).write(experts[0].parent)
    hashed, digest = Counter(), hashlib.file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda file, name: hashed.update([file.name]) or digest(file, name))
    merge.main(load_config(config_file, []))
    assert [hashed[f"{folder / WEIGHTS}"] for folder in (pretrained / "unet", *experts)] == [1, 1, 1]
    told = capsys.readouterr().out
    assert f"{experts[1]}: has the same weights as {experts[0]}\n" in told
    assert f"{experts[0].parent / RUN.file}: trained from other weights than those in {pretrained / 'unet'};" in told


def test_three_lines_load_it(config_file, experts):
    """As the README shows; a folder elsewhere loads as well, with the pretrained betas."""
    run("merge.py", config_file, "merge.output=elsewhere")
    program = """
import deme.projection
from diffusers import DDIMPipeline
pipeline = DDIMPipeline.from_pretrained("elsewhere")
assert type(pipeline.unet).__name__ == "ProjectedUNet2DModel"
assert pipeline.scheduler.config.beta_end == 0.03
print(pipeline(batch_size=2, num_inference_steps=2).images[1].size)
"""
    assert output_of(program, config_file.parent, PYTHONPATH=str(REPOSITORY)) == "(8, 8)"


def test_without_projections_diffusers_alone_loads_it(config_file):
    """Finetuned with model.projection=false, merged, and drawn from where this project can't be imported."""
    for script in ("finetune.py", "merge.py"):
        run(script, config_file, "model.projection=false", "finetune.max_steps=2")
    program = """
import importlib.util
assert importlib.util.find_spec("deme") is None
from diffusers import DDIMPipeline
pipeline = DDIMPipeline.from_pretrained("tiny/merged")
assert type(pipeline.unet).__name__ == "UNet2DModel"
assert pipeline.scheduler.config.beta_end == 0.03
print(pipeline(batch_size=2, num_inference_steps=2).images[1].size)
"""
    assert output_of(program, config_file.parent) == "(8, 8)"


def test_the_model_card_says_how_it_was_made_and_how_to_load_it(config_file, pretrained, experts):
    """Its code runs as it stands; scores appear once there are some of this network, and only of this network."""
    run("merge.py", config_file)
    output = config_file.parent / "tiny" / "merged"
    card = (output / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "diffusers"
    assert "| tensors | timesteps 0000-0500 | 0500-1000 |" in card
    assert "| `*` | 0.5 | 0.25 |" in card
    assert str(pretrained) in card
    assert "`digits`" in card
    assert "## Scores" not in card
    program = card.split("```python\n")[1].split("```")[0] + "print(len(images))"
    assert output_of(program, config_file.parent, PYTHONPATH=str(REPOSITORY)) == "16"

    kid = {"kid": 0.001, "kid_standard_error": 0.0001, "kid_degrees_of_freedom": 2}
    network = [sha256(output / "unet" / WEIGHTS)]
    found = Score("a", network, 1000, 3.25, [3.25], 3.25, None, **kid, precision=0.5, recall=0.25)
    other = replace(found, weights=["other"], pooled=9.75)
    save_scores(config_file.parent / "tiny" / "results.json", "inception", [found, other], {})
    assert "is complete" in run("merge.py", config_file).stdout
    card = (output / "README.md").read_text()
    assert "- 1,000 images: FID 3.2500, KID 0.001000, precision 0.500, recall 0.250" in card
    assert "9.75" not in card


def test_the_merged_folder_is_uploaded_whole(config_file, experts, monkeypatch):
    """The Hub's client is replaced by one that records what it is given."""
    created, uploaded = [], {}

    def upload_folder(self, repo_id, folder_path, commit_message):
        uploaded[repo_id] = {str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()}

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, exist_ok: created.append(name))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    merge.main(load_config(config_file, ["merge.push_to_hub=someone/merged"]))
    assert created == ["someone/merged"]
    files = {"README.md", "merge.yaml", "model_index.json", "scheduler/scheduler_config.json"}
    assert uploaded == {"someone/merged": files | {"unet/config.json", f"unet/{WEIGHTS}"}}
    card = (config_file.parent / "tiny" / "merged" / "README.md").read_text()
    folder = config_file.parent / "tiny" / "merged"
    monkeypatch.setattr("huggingface_hub.snapshot_download", {"someone/merged": str(folder)}.__getitem__)
    names = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert len(names["images"]) == 16


@pytest.mark.parametrize("form", ["shards", "half precision", "pickled"])
def test_experts_in_any_form_are_found_and_merged_alike(config_file, experts, form):
    """By merge.py, search.py and analyze.py; the values are ones that half precision holds."""
    output = config_file.parent / "tiny" / "merged" / "unet" / WEIGHTS
    for folder in experts:
        unet = load_denoiser(folder).half().float()
        unet.save_pretrained(folder)
    run("merge.py", config_file)
    expected = load_file(output)
    for folder in experts:
        unet = load_denoiser(folder)
        (folder / WEIGHTS).unlink()
        if form == "shards":
            unet.save_pretrained(folder, max_shard_size="20KB")
        elif form == "half precision":
            unet.half().save_pretrained(folder, variant="fp16")
        else:
            torch.save(unet.state_dict(), folder / PICKLED_WEIGHTS)
        assert not (folder / WEIGHTS).exists()
    run("merge.py", config_file)
    found = load_file(output)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    run("search.py", config_file, "search.method=closed_form", "search.images=16", "search.report_images=0")
    assert "pretrained" in run("analyze.py", config_file, "analyze.analyses=[task_vectors]").stdout


@pytest.mark.parametrize("projected", ["0000-0500", "0500-1000"])
def test_experts_some_of_which_have_projections_are_merged_as_if_all_had(config_file, experts, projected):
    """What has none counts as having identities, in merge.py, search.py and analyze.py; the result has projections."""
    search = ["search.method=closed_form", "search.images=16", "search.report_images=0"]
    root = config_file.parent / "tiny"
    [folder] = [folder for folder in experts if projected not in str(folder)]
    tensors = load_file(folder / WEIGHTS)
    plain = UNet2DModel.from_config(load_denoiser(folder).config)
    plain.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.endswith(PROJECTION_SUFFIX)})
    with_projections(plain).save_pretrained(folder)  # all have some: identities here
    run("merge.py", config_file)
    run("search.py", config_file, *search)
    expected, coefficients = load_file(root / "merged" / "unet" / WEIGHTS), yaml.safe_load(best(root).read_text())
    plain.save_pretrained(folder)
    shutil.rmtree(root / "search")
    run("merge.py", config_file)
    run("search.py", config_file, *search)
    found = load_file(root / "merged" / "unet" / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert type(load_denoiser(root / "merged" / "unet")).__name__ == "ProjectedUNet2DModel"
    again = yaml.safe_load(best(root).read_text())
    assert again["coefficients"]["*"] == pytest.approx(coefficients["coefficients"]["*"], rel=1e-4)
    run("analyze.py", config_file, "analyze.analyses=[task_vectors,activation_change]", "analyze.images=4")


def best(root):
    return root / "search" / "best.yaml"


@pytest.mark.parametrize("script", ["merge.py", "search.py", "analyze.py"])
def test_experts_that_compute_otherwise_are_refused_by_the_setting(config_file, experts, script):
    settings = json.loads((experts[1] / "config.json").read_text())
    (experts[1] / "config.json").write_text(json.dumps(settings | {"act_fn": "relu"}))
    options = {"search.py": ["search.method=closed_form"], "analyze.py": ["analyze.analyses=[task_vectors]"]}
    result = run(script, config_file, *options.get(script, []), status=2)
    assert f"{experts[1] / 'config.json'}: act_fn=relu, but silu in " in result.stderr
    assert not (config_file.parent / "tiny" / "merged").exists()


def test_weights_that_can_not_be_merged_are_told_before_they_are_trained(config_file, pretrained):
    """float8, which torch reads."""
    folder = config_file.parent / "copy"
    shutil.copytree(pretrained, folder)
    tensors = load_file(folder / "unet" / WEIGHTS)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, folder / "unet" / WEIGHTS)
    result = run("finetune.py", config_file, f"model.pretrained={folder}", status=2)
    assert "is of type torch.float8_e4m3fn" in result.stderr
    assert not (config_file.parent / "tiny" / "finetuned").exists()


@pytest.mark.parametrize("is_private", [True, False])
def test_nothing_private_is_uploaded_to_a_public_repository(tmp_path, monkeypatch, is_private):
    """Made private where it does not exist; one that was public before stays so, which is looked at first."""
    asked, uploaded = [], []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **options: asked.append(options))
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda self, name: SimpleNamespace(private=is_private))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **given: uploaded.append(given))
    expected = nullcontext() if is_private else pytest.raises(UserError, match=r"push_to_hub=a/b: .* public")
    with expected:
        merge.push_to_hub(tmp_path, "a/b", private=True)
    assert asked == [{"exist_ok": True, "private": True}]
    assert len(uploaded) == is_private


def test_an_upload_that_fails_loses_nothing(config_file, experts, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    result = run("merge.py", config_file, "merge.push_to_hub=someone/merged", status=2, fresh=True)
    assert "merge.py: error: merge.push_to_hub=someone/merged: " in result.stderr
    assert "Traceback" not in result.stderr
    assert (config_file.parent / "tiny" / "merged" / "unet" / WEIGHTS).exists()
    result = run("merge.py", config_file, "merge.push_to_hub=merged", status=2)
    assert "merge.push_to_hub=merged: must be a Hub id, owner/name" in result.stderr


def test_merging_again_is_a_no_op_and_other_coefficients_replace(config_file, experts):
    weights = config_file.parent / "tiny" / "merged" / "unet" / WEIGHTS
    run("merge.py", config_file)
    before = weights.stat().st_mtime_ns
    assert "is complete" in run("merge.py", config_file).stdout
    assert weights.stat().st_mtime_ns == before
    assert "replacing it" in run("merge.py", config_file, "merge.coefficients=[0,0]").stdout
    assert load_file(weights)["conv_in.weight"].shape == (8, 1, 3, 3)
    assert weights.stat().st_mtime_ns != before
