import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import run
from PIL import Image
from safetensors.torch import load_file, save_file
from text_to_image import CONTEXT, tiny_clip
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from deme.data.samples import PROMPTS, read_prompts
from deme.errors import UserError
from deme.measure.features import ClipScores, extract

TEXTS = ["a red cube", "", "Ein grüner Würfel", "long " * CONTEXT, "a red cube"]  # two are equal


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip"
    tiny_clip(folder)
    return folder


def make_samples(folder: Path, prompts: list[str] | None, brightness: int = 100) -> list[Path]:
    """A sample folder of 12 × 10 pixels, with or without prompts."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(brightness)
    paths = [folder / f"{seed:06d}.png" for seed in range(12 if prompts is None else len(prompts))]
    for path in paths:
        Image.fromarray(random.normal(brightness, 50, (8, 8, 3)).clip(0, 255).astype(np.uint8)).save(path)
    if prompts is not None:
        rows = [{"file": path.name, "prompt": prompt} for path, prompt in zip(paths, prompts, strict=True)]
        (folder / PROMPTS).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return paths


@torch.inference_mode()
def direct_score(folder: Path, path: Path, prompt: str) -> float:
    """What transformers alone gives for one image and its prompt, both towers on their own."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)([prompt], truncation=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(folder)(Image.open(path), return_tensors="pt")
    image = model.visual_projection(model.vision_model(**pixels).pooler_output)
    text = model.text_projection(model.text_model(**tokens).pooler_output)
    return 100 * torch.cosine_similarity(image, text).item()


@pytest.mark.parametrize("batch_size", [2, 5])
def test_the_score_is_that_of_transformers_alone(clip_folder, tmp_path, batch_size):
    """Whatever stands together in a batch: equal prompts, prompts of other lengths, one that is cut."""
    paths = make_samples(tmp_path / "merged", TEXTS)
    clip = ClipScores(str(clip_folder))
    prompts = read_prompts(tmp_path / "merged", paths)
    found = extract(Accelerator(cpu=True), clip, lambda part: clip.read(paths, prompts, part), range(5), batch_size, 2)
    expected = [direct_score(clip_folder, path, text) for path, text in zip(paths, TEXTS, strict=True)]
    assert found.dtype == np.float32
    assert found[:, 0] == pytest.approx(expected, abs=1e-3)
    assert np.ptp(expected) > 1


def test_equal_prompts_are_embedded_once(clip_folder, tmp_path):
    paths = make_samples(tmp_path / "merged", TEXTS)
    clip = ClipScores(str(clip_folder))
    embedded = []
    clip.model.text_model.register_forward_hook(lambda module, given, result: embedded.append(len(result[0])))
    clip.features(clip.read(paths, TEXTS, slice(0, 5)))
    assert embedded == [4]


def test_a_half_precision_model_is_read_as_float32(clip_folder, tmp_path):
    CLIPModel.from_pretrained(clip_folder).half().save_pretrained(tmp_path)
    for file in clip_folder.glob("*.json"):
        if file.name != "config.json":
            shutil.copy(file, tmp_path)
    clip = ClipScores(str(tmp_path))
    assert {tensor.dtype for tensor in clip.parameters()} == {torch.float32}
    assert not clip.model.training


def rows(config_file) -> dict[str, dict]:
    found = json.loads((config_file.parent / "tiny" / "results.json").read_text())["rows"]
    return {Path(row["samples"]).name: row for row in found}


def test_folders_with_prompts_are_scored_alike_by_one_process_and_two(config_file, clip_folder):
    """Blocks, the difference where seeds and prompts agree, and none where they don't or there are no prompts."""
    samples = config_file.parent / "tiny" / "samples"
    prompts = [f"cube {i // 2}" for i in range(6)]
    merged = make_samples(samples / "merged", prompts)
    baseline = make_samples(samples / "pretrained", prompts, 160)
    make_samples(samples / "other", prompts[::-1], 130)
    make_samples(samples / "unconditional", None)
    options = ["evaluate.blocks=3", f"evaluate.clip_model={clip_folder}", "evaluate.batch_size=2"]
    printed = run("evaluate.py", config_file, *options).stdout
    found = rows(config_file)
    blocks, before = (
        np.reshape([direct_score(clip_folder, *pair) for pair in zip(paths, prompts, strict=True)], (3, 2)).mean(1)
        for paths in (merged, baseline)
    )
    assert found["merged"]["clip_blocks"] == pytest.approx(blocks, abs=1e-3)
    assert found["merged"]["clip"] == pytest.approx(blocks.mean(), abs=1e-3)
    assert found["merged"]["clip_standard_deviation"] == pytest.approx(blocks.std(ddof=1), abs=1e-3)
    differences = blocks - before
    assert found["merged"]["clip_difference"] == pytest.approx(differences.mean(), abs=1e-3)
    error = differences.std(ddof=1) / 3**0.5
    assert found["merged"]["clip_difference_standard_error"] == pytest.approx(error, abs=1e-3)
    assert found["other"]["clip"] is not None
    assert "pretrained" in found["other"]["differences"]
    assert found["other"]["clip_difference"] is None
    assert found["unconditional"]["clip"] is None
    assert "| CLIP score ± s.d. |" in printed
    run("evaluate.py", config_file, *options, processes=2)
    again = rows(config_file)
    assert again["unconditional"]["clip_blocks"] is None
    for name in ("merged", "pretrained", "other"):
        assert again[name]["clip_blocks"] == pytest.approx(found[name]["clip_blocks"], abs=1e-3)
        assert again[name]["pooled"] == pytest.approx(found[name]["pooled"], rel=1e-4)


@pytest.mark.parametrize("model", ["null", "nowhere"])
def test_a_model_is_needed_only_where_there_are_prompts_to_score(config_file, model):
    """null: none, whatever the folder holds; a model that is missing does not matter without prompts."""
    make_samples(config_file.parent / "tiny" / "samples" / "merged", ["a cube"] * 4 if model == "null" else None)
    printed = run("evaluate.py", config_file, f"evaluate.clip_model={model}").stdout
    assert rows(config_file)["merged"]["clip"] is None
    assert "CLIP" not in printed


def test_models_that_cannot_be_had_are_told_in_one_line(config_file, clip_folder, monkeypatch):
    """No such folder; a Hub id without a network; a folder that lacks a file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = config_file.parent
    make_samples(root / "tiny" / "samples" / "merged", ["a cube"] * 4)
    shutil.copytree(clip_folder, root / "clip")
    (root / "clip" / "model.safetensors").rename(root / "clip" / "pytorch_model.bin")
    for model, reason in {
        "nowhere": "no such folder",
        "nobody/nothing": "no CLIP model can be loaded from it: OSError: ",
        "clip": "no CLIP model can be loaded from it: OSError: Error no file named model.safetensors found in ",
    }.items():
        result = run("evaluate.py", config_file, f"evaluate.clip_model={model}", status=2, fresh="/" in model)
        assert f"evaluate.py: error: evaluate.clip_model={model}: {reason}" in result.stderr
        assert "Traceback" not in result.stderr
    assert not (root / "tiny" / "results.json").exists()


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def change_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(name)
    weights |= {} if tensor is None else {name: tensor}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


DAMAGES = {
    "weights that are cut short": (lambda folder: cut(folder / "model.safetensors"), "SafetensorError"),
    "a tokenizer that is cut short": (lambda folder: cut(folder / "tokenizer.json"), "JSONDecodeError"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "its tokenizer is missing or another"),
    "no image processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config"),
    "a tensor that is missing": (
        lambda folder: change_weights(folder, "text_projection.weight", None),
        r"do not fit each other \(text_projection\.weight …\)",
    ),
    "a tensor of another size": (
        lambda folder: change_weights(folder, "text_projection.weight", torch.zeros(3, 3)),
        r"do not fit each other \(text_projection\.weight …\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models_are_refused(clip_folder, tmp_path, damage, capfd):
    """Instead of scores by weights or words that transformers makes up."""
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    change, reason = DAMAGES[damage]
    change(folder)
    with pytest.raises(UserError, match=reason) as caught:
        ClipScores(str(folder))
    assert "\n" not in str(caught.value)
    assert "REPORT" not in capfd.readouterr().err


def line(name: str, prompt: object = "a cube") -> str:
    return json.dumps({"file": name, "prompt": prompt})


FIRST, SECOND = line("000000.png"), line("000001.png")
TEXTS_NEEDED = 'not a JSON object of two texts, {"file": "000000.png", "prompt": "…"}'
DAMAGED_PROMPTS = {
    "a line short": (f"{FIRST}\n", "line 2: names no image instead of 000001.png"),
    "a line too many": (f"{FIRST}\n{SECOND}\n{line('000002.png')}\n", "line 3: names 000002.png instead of none"),
    "another order": (f"{SECOND}\n{FIRST}\n", "line 1: names 000001.png instead of 000000.png"),
    "empty": ("", "line 1: names no image instead of 000000.png"),
    "an empty line": (f"{FIRST}\n\n{SECOND}\n", f"line 2: {TEXTS_NEEDED}"),
    "a line cut short": (f"{FIRST}\n{SECOND[:-5]}", f"line 2: {TEXTS_NEEDED}"),
    "a list": (f"{FIRST}\n[1, 2]\n", f"line 2: {TEXTS_NEEDED}"),
    "a number as the prompt": (f"{line('000000.png', 3)}\n{SECOND}\n", f"line 1: {TEXTS_NEEDED}"),
    "half a character": (f"{line('000000.png', chr(0xD800))}\n{SECOND}\n", f"line 1: {TEXTS_NEEDED}"),
    "no prompt": (f'{FIRST}\n{{"file": "000001.png"}}\n', f"line 2: {TEXTS_NEEDED}"),
    "deep nesting": (f"{'[' * 100_000}\n{SECOND}\n", f"line 1: {TEXTS_NEEDED}"),
}


@pytest.mark.parametrize("damage", DAMAGED_PROMPTS)
def test_damaged_prompts_are_named_by_line(tmp_path, damage):
    paths = make_samples(tmp_path / "merged", ["a cube"] * 2)
    text, reason = DAMAGED_PROMPTS[damage]
    (tmp_path / "merged" / PROMPTS).write_text(text)
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / "merged", paths)
    assert str(caught.value) == f"prompts.jsonl, {reason}"


def test_prompts_are_read_as_they_were_written(tmp_path):
    """Without a last line feed, with line feeds of other systems, with what Unicode calls a line's end."""
    texts = ["a\nb", "a\u2028b", "猫"]
    paths = make_samples(tmp_path / "merged", texts)
    file = tmp_path / "merged" / PROMPTS
    assert read_prompts(tmp_path / "merged", paths) == texts
    unescaped = [json.dumps(json.loads(row), ensure_ascii=False) for row in file.read_text().splitlines()]
    file.write_bytes("\r\n".join(unescaped).encode())
    assert read_prompts(tmp_path / "merged", paths) == texts
    file.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=r"prompts\.jsonl: UnicodeDecodeError"):
        read_prompts(tmp_path / "merged", paths)
    file.unlink()
    assert read_prompts(tmp_path / "merged", paths) is None


def test_damaged_prompts_stop_the_script_before_anything_is_computed(config_file):
    folder = config_file.parent / "tiny" / "samples" / "merged"
    make_samples(folder, ["a cube"] * 4)
    (folder / PROMPTS).write_text(f"{FIRST}\n")
    result = run("evaluate.py", config_file, status=2)
    assert result.stderr == (
        f"evaluate.py: error: evaluate.samples={folder}: prompts.jsonl, line 2: names no image instead of 000001.png\n"
    )
    assert not (config_file.parent / "tiny" / "stats").exists()
