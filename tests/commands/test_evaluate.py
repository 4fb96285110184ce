import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import environment, run
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import shufflenet_v2_x0_5
from transformers import Dinov2Config, Dinov2Model

from deme.measure.reference import load_reference
from deme.measure.scores import load_scores, load_spaces


def make_images(folder, count, brightness, size=8):
    folder.mkdir(parents=True)
    random = np.random.default_rng(brightness)
    for seed in range(count):
        pixels = np.clip(random.normal(brightness, 50, (size, size, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed:06d}.png")


@pytest.fixture
def samples(config_file):
    folder = config_file.parent / "tiny" / "samples"
    make_images(folder / "merged", 12, 100)
    make_images(folder / "pretrained", 12, 160)
    return folder


def results(config_file) -> dict:
    return json.loads((config_file.parent / "tiny" / "results.json").read_text())


def test_classifier_scores_every_folder_against_the_pretrained_row(config_file, samples):
    first = run("evaluate.py", config_file, "evaluate.blocks=3")
    found = results(config_file)
    pretrained, merged = found["rows"]
    assert merged["samples"].endswith("merged")
    assert pretrained["differences"] == {}
    difference = merged["differences"]["pretrained"]
    differences = np.subtract(merged["blocks"], pretrained["blocks"])
    assert difference["mean"] == pytest.approx(differences.mean())
    assert difference["standard_error"] == pytest.approx(differences.std(ddof=1) / np.sqrt(3))
    assert merged["kid"] == pytest.approx(np.mean(merged["kid_blocks"]))
    assert 0 <= merged["precision"] <= 1
    assert 0 <= merged["recall"] <= 1
    assert merged["mean"] == pytest.approx(np.mean(merged["blocks"]))
    assert "| merged | 12 |" in first.stdout
    assert 0 < found["held_out_accuracy"] <= 1
    stats = config_file.parent / "tiny" / "stats"
    before = {path.name: path.stat().st_mtime_ns for path in stats.iterdir()}
    assert before.keys() == {"classifier.npz", "classifier.safetensors"}
    run("evaluate.py", config_file, "evaluate.blocks=3", processes=2)
    assert {path.name: path.stat().st_mtime_ns for path in stats.iterdir()} == before
    again = results(config_file)["rows"]
    for row, twin in zip(found["rows"], again, strict=True):
        assert twin["pooled"] == pytest.approx(row["pooled"], rel=1e-4)


@pytest.mark.long
def test_fid_agrees_with_pytorch_fid(config_file, samples, torch_home, monkeypatch):
    """The same folder against the same statistics, which evaluate.py made: equal to 1e-6 relative."""
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    data = config_file.parent / "data"
    make_images(data / "train" / "a", 10, 130)
    settings = [f"data.name={data}", "data.label_column=null", "evaluate.features=inception"]
    run("evaluate.py", config_file, *settings, f"evaluate.samples=[{samples / 'merged'}]")
    statistics = config_file.parent / "tiny" / "stats" / "inception.npz"
    theirs = subprocess.run(
        [sys.executable, "-m", "pytorch_fid", samples / "merged", statistics, "--device", "cpu", "--num-workers", "0"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert theirs.returncode == 0, theirs.stderr
    expected = float(re.search(r"FID:\s+(\S+)", theirs.stdout)[1])
    [row] = results(config_file)["rows"]
    assert expected > 1
    assert row["pooled"] == pytest.approx(expected, rel=1e-6)


def test_further_judges_score_beside_the_first(config_file, samples):
    """Each against its own statistics; the first one's scores are those that it gives alone, bit for bit."""
    root = config_file.parent
    for name, brightness in (("a", 90), ("b", 130)):
        make_images(root / "data" / "train" / name, 12, brightness)
    torch.manual_seed(0)
    save_file(shufflenet_v2_x0_5().state_dict(), root / "w.safetensors")
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(root / "dino")
    options = [f"data.name={root / 'data'}", "evaluate.blocks=3"]
    run("evaluate.py", config_file, *options)
    alone = results(config_file)
    options.append("evaluate.features=[classifier,torchvision:shufflenet_v2_x0_5=w.safetensors,dinov2=dino]")
    printed = run("evaluate.py", config_file, *options).stdout
    together, file = results(config_file), root / "tiny" / "results.json"
    assert together["rows"] == alone["rows"]
    assert load_scores(file)[0] == "classifier"
    assert "further" not in alone
    spaces = load_spaces(file)
    first, second, third = spaces
    assert (first, second[:-8], third[:-8]) == ("classifier", "torchvision-shufflenet_v2_x0_5-", "dinov2-16x1x14-")
    stats = root / "tiny" / "stats"
    assert {path.stem for path in stats.glob("*.npz")} == set(spaces)
    for name, rows in spaces.items():
        assert f"| model | images | {name} FD, all images |" in printed
        reference, record = load_reference(stats / f"{name}.npz")
        assert (record["features"], reference.features.shape[0], reference.size) == (name, 24, [8, 8])
        pretrained, merged = rows
        assert merged.to_pretrained.mean == pytest.approx(np.subtract(merged.blocks, pretrained.blocks).mean())
        assert merged.to_pretrained.degrees_of_freedom == 2
    assert len({rows[0].pooled for rows in spaces.values()}) == 3

    # statistics that evaluate.reference names: those of the other judges lie beside them
    given = [*options, f"evaluate.reference={stats / 'classifier.npz'}"]
    run("evaluate.py", config_file, *given, processes=2)
    for name, rows in load_spaces(file).items():
        assert [row.pooled for row in rows] == pytest.approx([row.pooled for row in spaces[name]], rel=1e-3)
    (stats / f"{third}.npz").rename(root / "away.npz")
    refused = run("evaluate.py", config_file, *given, status=2).stderr
    assert f"of these statistics in the other features of evaluate.features, there is no {stats / third}.npz" in refused


def test_absent_inception_weights_say_where_to_put_them(config_file, samples, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network, wherever the test runs
    result = run("evaluate.py", config_file, "evaluate.features=inception", status=2)
    assert "the Inception weights can't be downloaded" in result.stderr
    assert str(tmp_path / "empty" / "hub" / "checkpoints") in result.stderr
    assert "Traceback" not in result.stderr


def test_reference_statistics_alone(config_file):
    run("evaluate.py", config_file, "evaluate.samples=[]")
    reference, record = load_reference(config_file.parent / "tiny" / "stats" / "classifier.npz")
    assert record["data"]["name"] == "digits"
    assert reference.features.shape == (1797, 128)
    assert not (config_file.parent / "tiny" / "results.json").exists()
