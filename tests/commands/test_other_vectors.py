"""Merging networks that are no experts of ranges: soups, snapshots, random directions, folders."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL_SEARCH, run, tiny_unet
from safetensors.torch import load_file, save_file

from deme.models.denoisers import with_projections
from deme.models.weights import WEIGHTS


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(folder / "unet" / WEIGHTS).items()}


def assert_is_sum(merged, base, networks, coefficients) -> None:
    for name, weight in base.items():
        pairs = zip(coefficients, networks, strict=True)
        expected = weight + sum(w * (network[name] - weight) for w, network in pairs)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_a_soup_is_trained_on_all_timesteps_with_draws_of_its_own(config_file, pretrained):
    """As plainly as the control, at a range's steps each; then merged and searched like experts."""
    run("finetune.py", config_file, "finetune.range=soup")
    finetuned = config_file.parent / "tiny" / "finetuned"
    logs = [(finetuned / f"soup-{k}" / "log.jsonl").read_text().splitlines() for k in range(2)]
    assert [len(log) for log in logs] == [6, 6]
    assert {json.loads(line)["consistency_loss"] for log in logs for line in log} == {0.0}
    first, second = (tensors(finetuned / f"soup-{k}") for k in range(2))
    assert not torch.equal(first["conv_in.weight"], second["conv_in.weight"])
    given = ["merge.experts=[soup]", "merge.coefficients=null"]
    run("merge.py", config_file, *given)
    merged = config_file.parent / "tiny" / "merged"
    assert_is_sum(tensors(merged), tensors(pretrained), [first, second], [0.5, 0.5])
    record = yaml.safe_load((merged / "merge.yaml").read_text())
    assert [part["name"] for part in record["finetuned"]] == ["soup-0", "soup-1"]
    card = (merged / "README.md").read_text()
    assert "| tensors | soup-0 | soup-1 |" in card
    assert "a [soup](https://arxiv.org/abs/2203.05482)" in card
    printed = run("search.py", config_file, *given, *SMALL_SEARCH, "search.trials=3").stdout
    places = [text.split(" at [")[1].split("]")[0] for text in printed.splitlines() if "candidate" in text]
    assert places[:3] == ["0.0, 0.0", "0.5, 0.5", "1.0, 1.0"]


def test_snapshots_of_the_control_are_merged(config_file, pretrained):
    given = ["merge.experts=[trajectory]", "finetune.snapshot_every=5", "merge.coefficients=[0.75,-0.25]"]
    missing = run("merge.py", config_file, *given, status=2).stderr
    assert "missing; train it with finetune.py finetune.range=continued finetune.snapshot_every=5; delete" in missing
    run("finetune.py", config_file, "finetune.range=continued", "finetune.snapshot_every=5")  # of 12 steps
    run("merge.py", config_file, *given)
    root = config_file.parent / "tiny"
    snapshots = [tensors(root / "finetuned" / "continued" / "snapshots" / name) for name in ("00000005", "00000010")]
    assert_is_sum(tensors(root / "merged"), tensors(pretrained), snapshots, [0.75, -0.25])
    assert "| tensors | continued-5 | continued-10 |" in (root / "merged" / "README.md").read_text()


@pytest.fixture
def experts(config_file):
    """Two experts with projections, made without training."""
    finetuned = config_file.parent / "tiny" / "finetuned"
    for seed, name in enumerate(("0000-0500", "0500-1000"), 1):
        with_projections(tiny_unet(seed)).save_pretrained(finetuned / name / "unet")
    return finetuned


def test_random_directions_are_as_long_as_the_task_vectors_in_each_tensor(experts, config_file, pretrained):
    """The projections', too; those of two ranges are orthogonal but for chance."""
    edited = tensors(experts / "0000-0500")
    edited["down_blocks.0.projection.weight"][0, 1] = 0.5
    save_file(edited, experts / "0000-0500" / "unet" / WEIGHTS)
    run("scripts/random_directions.py", config_file)
    base, vectors = tensors(pretrained), []
    for name in ("0000-0500", "0500-1000"):
        expert, directed = tensors(experts / name), tensors(experts / f"random-{name}")
        assert expert.keys() == directed.keys()
        for key, weight in directed.items():
            start = base[key] if key in base else torch.eye(len(weight))[:, :, None, None]
            assert (weight - start).norm() == pytest.approx(float((expert[key] - start).norm()), rel=1e-4, abs=1e-6)
        vectors.append(np.concatenate([(directed[key] - base[key]).flatten() for key in base]))
    cosine = np.dot(*vectors) / np.prod([np.linalg.norm(vector) for vector in vectors])
    assert abs(cosine) < 0.1
    before = (experts / "random-0000-0500" / "unet" / WEIGHTS).read_bytes()
    run("scripts/random_directions.py", config_file)
    assert (experts / "random-0000-0500" / "unet" / WEIGHTS).read_bytes() == before
    run("scripts/random_directions.py", config_file, "seed=1")
    assert (experts / "random-0000-0500" / "unet" / WEIGHTS).read_bytes() != before
    run("merge.py", config_file, "merge.experts=[random]", "merge.coefficients=null")


def test_networks_are_merged_by_statistics_that_are_measured_once(experts, config_file, pretrained):
    given = ["merge.method=fisher", "merge.coefficients=null"]
    missing = run("merge.py", config_file, *given, status=2).stderr
    assert "merge.method=fisher: " in missing
    assert "is missing; scripts/merge_statistics.py makes it" in missing
    run("scripts/merge_statistics.py", config_file, "search.images=6")
    merged, first = experts.parent / "merged", tensors(experts / "0000-0500")
    for method in ("fisher", "regmean"):
        run("merge.py", config_file, f"merge.method={method}", "merge.coefficients=[1,0]")
        merged_tensors = tensors(merged)  # the first expert, to rounding
        for key, tensor in first.items():
            torch.testing.assert_close(merged_tensors[key], tensor, rtol=1e-3, atol=1e-3)
    assert len(yaml.safe_load((merged / "merge.yaml").read_text())["statistics"]) == 2
    again = run("scripts/merge_statistics.py", config_file, "search.images=6").stdout
    assert again.count("is complete") == 2


def test_folders_with_timesteps_are_searched_by_match_like_experts(experts, config_file):
    """The same answer, bit for bit."""
    names = ("0-500", "500-1000")
    edges = [name.replace("-", ",") for name in names]
    pairs = zip(names, edges, strict=True)
    folders = [f"{{path: {experts / name / 'unet'}, timesteps: [{pair}]}}" for name, pair in pairs]
    shutil.copytree(experts / "0000-0500", experts / "0-500")
    shutil.copytree(experts / "0500-1000", experts / "500-1000")
    search = ["search.method=closed_form", "search.images=16", "search.report_images=12"]
    found = []
    for number, given in enumerate((["ranges"], folders)):
        output = config_file.parent / f"search-{number}"
        run("search.py", config_file, *search, f"merge.experts=[{', '.join(given)}]", f"search.output={output}")
        found.append(yaml.safe_load((output / "best.yaml").read_text()))
        rows = json.loads((output / "report.json").read_text())["rows"]
        assert [row["samples"] for row in rows] == ["pretrained", "ensemble", "uniform 0.5", "best"]
    assert found[0] == found[1]


def test_folders_that_do_not_fit_are_refused_by_file_and_key(experts, config_file):
    """Missing, of another architecture, without a tensor."""
    folder, other = config_file.parent / "other" / "unet", experts / "0000-0500" / "unet"

    def refused(script: str) -> str:
        given = [f"merge.experts=[{folder}, {other}]", "merge.coefficients=null", *SMALL_SEARCH]
        errors = run(script, config_file, *given, status=2).stderr
        assert errors.count("\n") == 1
        return errors

    for script in ("merge.py", "search.py"):
        message = f"{folder / WEIGHTS}: missing; merge.experts must name a network's folder"
        assert message in refused(script)
    tiny_unet(norm_num_groups=2).save_pretrained(folder)
    assert f"{folder / 'config.json'}: norm_num_groups=2, but 4 in" in refused("merge.py")
    tiny_unet().save_pretrained(folder)
    content = load_file(folder / WEIGHTS)
    del content["conv_in.bias"]
    save_file(content, folder / WEIGHTS)
    assert f"{folder}: the pretrained model's tensor conv_in.bias is missing" in refused("merge.py")
    (folder / "config.json").unlink()
    assert f"{folder / 'config.json'}" in refused("search.py")


def test_task_vectors_of_folders_are_analysed_without_experts(config_file):
    """The analyses of the ranges are left out by name."""
    folders = [config_file.parent / name / "unet" for name in "abc"]
    for seed, folder in enumerate(folders, 1):
        tiny_unet(seed).save_pretrained(folder)
    given = [f"merge.experts=[{', '.join(map(str, folders))}]", "merge.coefficients=null"]
    small = ["analyze.landscape_points=2", "analyze.landscape_images=4"]
    analyses = "analyze.analyses=[task_vectors, landscape, loss_by_timestep]"
    printed = run("analyze.py", config_file, *given, *small, analyses).stdout
    assert "left out: loss_by_timestep, activation_change: need the experts of all ranges" in printed
    assert "least at the coefficients of a, c" in printed
    assert "| task vector | norm | of the pretrained weights' | a | b | c |" in printed
    folder = config_file.parent / "tiny" / "analysis"
    assert sorted(path.name for path in folder.glob("*.md")) == ["landscape.md", "task_vectors.md"]
