"""Which caption an image has, and prompts as people keep them."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from deme.config.sections import Data
from deme.data.crops import CroppedImages, choose_caption
from deme.data.decoding import flat_images
from deme.data.examples import load_training_images
from deme.data.opening import data_hashes, open_source
from deme.data.samples import PROMPTS, claim_prompts, load_prompts, read_prompts
from deme.errors import UserError

COUNT = 20_000


def captioned(captions: list[list[str]], dropout: float) -> CroppedImages:
    """As many gray 2×2 images as captions."""
    sizes = np.full((len(captions), 2), 2)
    images = flat_images(np.zeros(4 * len(captions), dtype=np.uint8), sizes, np.arange(len(captions)), 1)
    return CroppedImages(images, 2, True, False, captions=captions, caption_dropout=dropout)


def test_captions_are_dropped_with_their_probability():
    """Bernoulli(p) for each image: the share lies within four standard errors, and other captions are drawn equally."""
    images = captioned([["a", "b", "c"]] * COUNT, dropout=0.1)
    texts = np.array(images.batch(range(COUNT), np.random.default_rng(0)).captions)
    error = np.sqrt(0.1 * 0.9 / COUNT)
    assert abs((texts == "").mean() - 0.1) < 4 * error
    for text in "abc":
        assert abs((texts == text).mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / COUNT)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_nothing_or_everything_is_dropped(dropout):
    images = captioned([["a"], ["b"]], dropout)
    assert images.batch([1, 0], np.random.default_rng(0)).captions == (["b", "a"] if dropout == 0 else ["", ""])


def test_without_a_generator_the_first_caption_is_taken_and_none_dropped():
    """As held-out images are measured."""
    assert captioned([["a", "b"]] * 50, dropout=0.9).batch(range(50)).captions == ["a"] * 50
    assert choose_caption("abc", "", 0.9, None) == "a"


def test_images_without_captions_draw_what_they_have_always_drawn():
    """A single caption and no dropout draw nothing, so crops and what follows them stay as they are."""
    random = np.random.default_rng(0)
    captioned([["a"]] * 5, dropout=0.0).batch(range(5), random)
    assert random.random() == np.random.default_rng(0).random()


def test_digits_have_captions(tmp_path):
    images = load_training_images(open_source(Data(caption_column="caption")), 1, tmp_path).training
    assert images.batch([3, 0]).captions == ["a handwritten three", "a handwritten zero"]
    assert torch.equal(
        images.batch([3]).pixels, load_training_images(open_source(Data()), 1, tmp_path).training.batch([3])
    )


def test_captions_are_part_of_what_is_read(tmp_path):
    """Of a training run; statistics of images do not depend on them."""
    captioned = Data(caption_column="caption")
    with_captions, without = (
        data_hashes(open_source(data), tmp_path, with_captions=True) for data in (captioned, Data())
    )
    assert with_captions != without
    assert data_hashes(open_source(captioned), tmp_path) == data_hashes(open_source(Data()), tmp_path)


@pytest.mark.parametrize(
    ("caption", "shown", "is_skipped"),
    [
        ("", "''", True),
        (" \n", r"' \\n'", True),
        ([], r"\[\]", True),
        (["", " "], r"\['', ' '\]", True),
        ([None], "null", True),
        (["a cat", ""], r"\['a cat', ''\]", False),
        (["a cat", None], r"\['a cat', None\]", False),
    ],
)
def test_blank_captions_are_refused_by_row(tmp_path, caption, shown, is_skipped):
    """An image without any other can be left out."""
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    fine = ["a dog"] if isinstance(caption, list) else "a dog"
    (tmp_path / "table").mkdir()
    columns = {"image": [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}] * 3, "text": [fine, caption, fine]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "table" / "train.parquet")
    data = Data(name=str(tmp_path / "table"), label_column=None, caption_column="text")
    remedy = "; data.skip_uncaptioned=true leaves such rows out" if is_skipped else ""
    with pytest.raises(UserError, match=f"^data.caption_column=text: row 1 has the caption {shown}{remedy}$"):
        open_source(data)
    if is_skipped:
        assert open_source(replace(data, skip_uncaptioned=True)).captions == [["a dog"]] * 2


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "a,b\n1,2\n", "has no column prompt"),
        ("a.jsonl", '{"prompt": 1}\n', "row 0 holds the prompt 1"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "row 0 holds the prompt"),
        ("a.jsonl", "{", "line 1: JSONDecodeError"),
        ("a.txt", "a\n\nb\n", "row 1 holds the prompt"),
        ("a.txt", "", "holds no prompts"),
        ("a.parquet", "PAR1", "cannot be read"),
        ("a.csv", "prompt\na cat, asleep\n", "row 0 has more values than the first line has columns"),
        ("a.csv", "prompt,n\n,1\n", "row 0 holds the prompt null"),
        ("a.json", '[["a"]]', "row 0 is not an object"),
        ("a.yaml", "- a", "the suffix .yaml is of no table; .csv, .tsv, .json"),
        ("a.rtf", "a", "the suffix .rtf is of no table"),
    ],
)
def test_prompts_that_are_none_are_named(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason):
        load_prompts(str(tmp_path / name), "prompt")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a", "NA\nb, c"),
        ("a.TXT", "NA\nb, c\n"),
        ("a.CSV", 'prompt\nNA\n"b, c"\n'),
        ("a.tsv", "n\tprompt\n1\tNA\n2\tb, c\n"),
        ("a.JSON", '["NA", "b, c"]'),
        ("a.json", '[{"prompt": "NA"}, {"prompt": "b, c"}]'),
        ("a.NDJSON", '{"prompt": "NA"}\n{"prompt": "b, c"}\n'),
    ],
)
def test_prompt_files_are_read_by_their_suffix_in_any_case(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert load_prompts(str(tmp_path / name), "prompt") == ["NA", "b, c"]


@pytest.mark.parametrize("lost", ["all", "a line", "its end"])
def test_images_whose_prompts_are_not_recorded_are_refused_or_drawn_again(tmp_path, lost):
    """Old images never pass for those of other prompts, whatever became of prompts.jsonl."""
    images = [tmp_path / f"{i:06d}.png" for i in range(3)]

    def claim(prompts: str, overwrite: bool = False) -> None:
        claim_prompts(tmp_path, dict(enumerate(prompts)), overwrite)

    claim("abc")
    for image in images[:2]:
        image.touch()
    claim("abd")  # only of an image that is not there
    file = tmp_path / PROMPTS
    lines = file.read_text().splitlines(keepends=True)
    file.write_text({"all": "", "a line": "".join(lines[1:]), "its end": "".join(lines)[:-50]}[lost])
    if lost == "all":
        file.unlink()
    with pytest.raises(
        UserError, match=r"line 2: not a JSON|of prompts that prompts\.jsonl does not tell, such as 0000"
    ):
        claim("xbd")
    claim("xbd", overwrite=True)
    assert not images[0].exists()
    assert read_prompts(tmp_path, images) == ["x", "b", "d"]


def test_a_prompt_in_the_place_of_a_file_is_no_file():
    for prompt in ("a cat", "a cat, " * 99, "a\0b"):
        with pytest.raises(UserError, match="no such file"):
            load_prompts(prompt, "prompt")


def test_prompts_are_read_as_they_were_written(tmp_path):
    """Quotes, line separators that are none to files, other alphabets."""
    prompts = ['a "quoted" one', "one\u2028two", "模型"]
    images = [tmp_path / f"{i:06d}.png" for i in range(3)]
    claim_prompts(tmp_path, dict(enumerate(prompts)), overwrite=False)
    assert read_prompts(tmp_path, images) == prompts
    (tmp_path / "prompts.txt").write_text("\r\n".join(prompts) + "\n", encoding="utf-8-sig")
    assert load_prompts(str(tmp_path / "prompts.txt"), "") == prompts
