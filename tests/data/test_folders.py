"""Which files of a folder are images, and what is known of them: nothing is left out without a word."""

import csv
import json
import os
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from deme.config.sections import Data
from deme.data.examples import load_training_images
from deme.data.files import layout_of, list_files, read_folder
from deme.data.opening import open_source
from deme.errors import UserError


def draw(root: Path, *names: str) -> None:
    """An image in each file, whose grey level is its place."""
    for level, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), level).save(root / name)


def read(root: Path, **settings) -> list[str]:
    """The images that are read, by name."""
    settings = {"label_column": None} | settings
    rows = open_source(Data(name=str(root), **settings))
    return [os.path.relpath(row["path"], root.resolve()) for row in rows]


def with_metadata(root: Path, rows: list[dict], name: str = "metadata.csv") -> None:
    with (root / name).open("w", newline="") as file:
        if name.endswith("jsonl"):
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


WORD_NAMES = ["train.png", "a_test.png", "val-1.png", "eval 2.png", "training/dev.png"]


@pytest.mark.parametrize("name", WORD_NAMES)
def test_words_in_the_names_of_files_make_no_split(tmp_path, name):
    names = sorted([name, "0.png", "beach.png", "city/wood.png"])
    draw(tmp_path, *names)
    assert read(tmp_path) == names


def test_a_class_whose_name_is_a_splits_is_a_class(tmp_path):
    draw(tmp_path, *(f"{kind}/{i}.png" for kind in ("bus", "car", "train") for i in range(2)))
    source = open_source(Data(name=str(tmp_path)))
    assert list(source.labels) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (["train", "test"], ["train", "test"]),
        (["train2017", "val2017"], ["train", "validation"]),
        (["Training/cat", "Testing/cat"], ["train", "test"]),
        (["images/train/cat", "images/dev/cat"], ["train", "validation"]),
        (["cat/train", "cat/test", "dog/train"], ["train", "test", "train"]),
        (["train", "extra"], ["train", "train"]),
        (["", "cat"], ["train", "train"]),
        ([""], ["train"]),
        (["train_station", "bus_station"], ["train", "train"]),
    ],
)
def test_folders_are_splits_where_all_at_one_depth_tell_one(folders, splits):
    found, _ = layout_of(set(folders))
    assert [found[folder] for folder in folders] == splits


@pytest.mark.parametrize("folders", [["train", "test", "extra"], ["", "train", "val"], ["train_val", "test"]])
def test_splits_beside_other_images_are_refused(folders):
    with pytest.raises(UserError, match="which images are of which split"):
        layout_of(set(folders))


@pytest.mark.parametrize("name", ["set[1]", "a*b", "what?", "a::b", "über {x}", "zip:", "#1 ~"])
def test_special_characters_stand_for_themselves(tmp_path, name):
    """The folder beside it, which they would fit as a pattern, is not read."""
    draw(tmp_path / name, "0.png")
    draw(tmp_path / "set1", "x.png", "y.png")
    draw(tmp_path / "axb", "x.png", "y.png")
    assert read(tmp_path / name) == ["0.png"]
    assert load_training_images(
        open_source(Data(name=str(tmp_path / name), label_column=None)), 1, tmp_path
    ).training.batch([0], np.random.default_rng(0)).shape == (1, 1, 8, 8)


def test_links_and_every_suffix_that_pil_reads_are_images(tmp_path):
    draw(tmp_path / "elsewhere", "cat/0.png", "cat/1.png")
    draw(tmp_path / "set", "a.avif", "b.JPG", "c.jp2", "d.tga")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "set" / "e.png").symlink_to(tmp_path / "elsewhere" / "cat" / "0.png")
    assert [file.name for file in list_files(tmp_path / "set")] == [
        "a.avif", "b.JPG", "c.jp2", "d.tga", "e.png", "linked/0.png", "linked/1.png"
    ]  # fmt: skip
    assert len(read(tmp_path / "set")) == 7
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    with pytest.raises(UserError, match="loop/: a link that leads back to"):
        read(tmp_path / "set")


def test_what_is_not_read_is_named(tmp_path, capsys):
    draw(tmp_path, "a.png", "b.png", ".hidden.png", "__MACOSX/c.png")
    for name in ("a.txt", "b.txt", "c.txt", "d.json"):
        (tmp_path / name).write_text("{}")
    assert read(tmp_path) == ["a.png", "b.png"]
    assert capsys.readouterr().out == (
        f"data.name={tmp_path}: 2 images are read; left out: 2 hidden images (.hidden.png, __MACOSX/c.png); "
        "4 other files (a.txt, b.txt, c.txt, …)\n"
    )


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_says_which_images_are_read_and_what_they_show(tmp_path, capsys, name):
    """Also at the root of the splits; NA is a text; images that it does not list are named."""
    draw(tmp_path, *(f"{split}/{i}.png" for split in ("train", "test") for i in range(3)))
    texts = {"train/1.png": "NA", "train/0.png": "null, or None", "test/2.png": "a cat"}
    with_metadata(tmp_path, [{"file_name": key, "text": text, "label": 7} for key, text in texts.items()], name)
    data = Data(name=str(tmp_path), caption_column="text")
    source = open_source(data)
    assert (source.captions, list(source.labels)) == ([["NA"], ["null, or None"]], [7, 7])
    assert read(tmp_path) == ["train/1.png", "train/0.png"]
    assert f"2 images are read; left out: 3 images that {name} does not list" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"file_name": "x.png"}], r"metadata\.csv: row 0: names x\.png, which is no image in this folder"),
        ([{"file_name": "../a.png"}], r"names \.\./a\.png"),
        ([{"name": "a.png"}], "row 0: has no column file_name"),
        ([{"file_name": "a.png", "image": "b.png"}], "row 0: has a column image beside file_name"),
        ([{"file_name": "a.png", "mask_file_name": ""}], "row 0: mask_file_name is missing"),
        ([{"file_name": "a.png", "text": ""}], r"row 0 has the caption null; data\.skip_uncaptioned=true leaves"),
    ],
)
def test_metadata_that_does_not_fit_is_refused_by_row(tmp_path, rows, reason):
    draw(tmp_path, "a.png")
    with_metadata(tmp_path, rows)
    with pytest.raises(UserError, match=reason):
        read(tmp_path, caption_column="text" if "text" in rows[0] else None)


def test_two_metadata_files_of_one_folder_are_refused(tmp_path):
    draw(tmp_path, "a.png", "b.png")
    for name, image in (("metadata.csv", "a.png"), ("metadata.jsonl", "b.png")):
        with_metadata(tmp_path, [{"file_name": image}], name)
    with pytest.raises(UserError, match=r"metadata\.csv: another metadata file stands beside it"):
        read(tmp_path)


def test_lines_of_metadata_that_are_no_rows_are_passed_over_or_named(tmp_path):
    draw(tmp_path, "a.png")
    file = tmp_path / "metadata.jsonl"
    file.write_text('{"file_name": "a.png"}\n\n')
    assert read(tmp_path) == ["a.png"]
    file.write_text('{"file_name": "a.png"}\n{')
    with pytest.raises(UserError, match=r"metadata\.jsonl: .*line 2: "):
        read(tmp_path)


def test_columns_of_numbers_are_numbers_but_for_captions(tmp_path):
    """As labels are classes; 01 and 1 are not the same."""
    draw(tmp_path, "a.png", "b.png")
    rows = [
        {"file_name": "a.png", "label": 1, "id": "01", "text": 7},
        {"file_name": "b.png", "label": -3, "id": 1, "text": 8},
    ]
    with_metadata(tmp_path, rows)
    source = open_source(Data(name=str(tmp_path), caption_column="text"))
    assert (list(source.labels), source.captions) == ([1, -3], [["7"], ["8"]])
    assert list(open_source(Data(name=str(tmp_path), label_column="id")).labels) == ["01", "1"]


def test_two_metadata_files_of_the_same_images_are_refused(tmp_path):
    draw(tmp_path, "cat/a.png")
    with_metadata(tmp_path, [{"file_name": "cat/a.png"}])
    with_metadata(tmp_path / "cat", [{"file_name": "a.png"}])
    with pytest.raises(UserError, match=r"row 0: lists cat/a\.png, as cat/metadata\.csv does"):
        read(tmp_path)


def test_a_column_of_other_images_can_be_named(tmp_path):
    draw(tmp_path, "a.png", "masks/a.png")
    with_metadata(tmp_path, [{"file_name": "a.png", "mask_file_name": "masks/a.png"}])
    assert open_source(Data(name=str(tmp_path), label_column=None, image_column="mask"))[0]["path"].endswith("ks/a.png")
    with pytest.raises(UserError, match=r"data\.image_column=img: .* has the columns image, mask"):
        open_source(Data(name=str(tmp_path), image_column="img", label_column=None))


def test_sidecars_are_captions(tmp_path, capsys):
    """More text files than images do not matter; a line is a caption; rows without one are refused, or skipped."""
    draw(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("a cat\n\n a dog \r\n")
    for name in ("x.txt", "y.txt", "z.txt"):
        (tmp_path / name).write_text("nothing")
    data = {"name": str(tmp_path), "label_column": None, "caption_column": "sidecar"}
    with pytest.raises(UserError, match=r"data\.caption_column=sidecar: row 1 has the caption null; data\.skip_unc"):
        open_source(Data(**data))
    source = open_source(Data(**data, skip_uncaptioned=True))
    assert (len(source), source.captions) == (1, [["a cat", "a dog"]])
    assert "data.skip_uncaptioned: skipped 1 of 2 images" in capsys.readouterr().out
    (tmp_path / "b.txt").write_text("NA")
    assert open_source(Data(**data)).captions == [["a cat", "a dog"], ["NA"]]


def test_archives_are_read_as_if_they_were_unpacked(tmp_path):
    names = ["cat/0.png", "cat/1.png", "dog/0.png"]
    draw(tmp_path / "plain", *names)
    (tmp_path / "packed").mkdir()
    with zipfile.ZipFile(tmp_path / "packed" / "images.zip", "w") as archive:
        for name in reversed(names):
            archive.write(tmp_path / "plain" / name, name)
    found = []
    for folder in ("plain", "packed"):
        data = Data(name=str(tmp_path / folder))
        images = load_training_images(open_source(data), 1, tmp_path).training
        found.append((images.batch(range(3), np.random.default_rng(0)).tolist(), list(open_source(data).labels)))
    assert found[0] == found[1]
    (tmp_path / "packed" / "images.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"images\.zip: cannot be read"):
        read(tmp_path / "packed")


LAYOUTS = [
    ["0.png", "1.png", "a-b/0.png"],
    ["cat/0.png", "cat-2/0.png", "dog/1.jpg"],
    ["train/b/0.png", "train/a/1.png", "test/a/2.png", "test/b/0.png"],
    ["train/0.png", "train/1.png"],
]


@pytest.mark.parametrize("names", LAYOUTS)
def test_what_load_dataset_reads_right_is_read_the_same(tmp_path, names):
    """The order and the numbers of the classes, so that older runs go on."""
    draw(tmp_path, *names)
    for split in {name.split("/")[0] for name in names} & {"train", "test"} or {"train"}:
        expected = datasets.load_dataset(str(tmp_path), split=split).cast_column("image", datasets.Image(decode=False))
        columns, splits, classes, _ = read_folder(list_files(tmp_path), None)
        rows = [row for row, own in enumerate(splits) if own == split]
        assert [columns["image"][row].path for row in rows] == [row["path"] for row in expected["image"]]
        if "label" in expected.column_names:
            assert [columns["label"][row] for row in rows] == list(expected["label"])
            assert classes == expected.features["label"].names
        else:
            assert "label" not in columns


def test_names_that_can_be_no_folder_are_refused():
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(UserError, match=r"cannot be loaded"):
            open_source(Data(name=name))


@pytest.mark.parametrize("name", ["a.parquet", "a.zip", "a.png"])
def test_a_single_file_is_refused_with_what_to_name_instead(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{name} \(data\.split=train\): a file; name the folder that it lies in$"):
        open_source(Data(name=str(tmp_path / name)))


def test_parts_of_splits_can_be_chosen(tmp_path):
    draw(tmp_path, *(f"{split}/{i}.png" for split in ("train", "test") for i in range(4)))
    assert read(tmp_path, split="train[:50%]+test[3:]") == ["train/0.png", "train/1.png", "test/3.png"]
    with pytest.raises(UserError, match=r"cannot be loaded: ValueError: Unknown split .validation"):
        read(tmp_path, split="validation")


def test_tables_are_read_by_datasets_and_what_it_leaves_out_is_named(tmp_path, capsys):
    draw(tmp_path, "banner.png", "pictures/0.png")
    rows = {"image": [{"bytes": (tmp_path / "banner.png").read_bytes(), "path": None}]}
    for name in ("train-0.parquet", "train-1.parquet", "other.parquet"):
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / name)
    assert len(open_source(Data(name=str(tmp_path), label_column=None))) == 2
    assert "2 rows are read; left out: 3 files (banner.png, other.parquet, pictures/0.png)" in capsys.readouterr().out
    (tmp_path / "set[1]").mkdir()
    (tmp_path / "other.parquet").rename(tmp_path / "set[1]" / "train.parquet")
    with pytest.raises(UserError, match="for a pattern; rename or link the folder"):
        open_source(Data(name=str(tmp_path / "set[1]")))


@pytest.mark.parametrize("form", ["alone", "splits", "side by side"])
def test_what_map_leaves_in_a_saved_data_set_is_not_read(tmp_path, form, capsys):
    """Columns of the same names, which would count twice, and indices, which fit nothing; splits of any name are."""
    draw(tmp_path, "0.png", "1.png")
    columns = {"image": [str(tmp_path / f"{i}.png") for i in range(2)], "label": [0, 1]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    root = tmp_path / "set"
    splits = {"alone": ["train"], "splits": ["train", "extra"], "side by side": ["train", "test"]}[form]
    if form == "splits":
        datasets.DatasetDict(dict.fromkeys(splits, rows)).save_to_disk(root)
    for split in splits:
        part = root if form == "alone" else root / split
        if form != "splits":
            rows.save_to_disk(part)
        before = list(open_source(Data(name=str(root), split=split)).labels)
        saved = datasets.load_from_disk(str(part))
        saved.map(lambda row: {"label": 7 + row["label"]})
        saved.sort("label", reverse=True)
        capsys.readouterr()
        source = open_source(Data(name=str(root), split=split))
        assert before == list(source.labels) == [0, 1]
        assert [int(source.decode(row, 1)[0, 0, 0]) for row in range(2)] == [0, 1]
        assert "2 rows are read; left out: " in capsys.readouterr().out
        assert len(list(part.glob("cache-*.arrow"))) == 2


def test_pictures_beside_tables_are_not_the_data(tmp_path):
    """As many as there are tables; where there are more, a person decides. A table for each image is no data set."""
    draw(tmp_path, "preview.png")
    rows = {"image": [{"bytes": (tmp_path / "preview.png").read_bytes(), "path": None}] * 3}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    assert len(open_source(Data(name=str(tmp_path), label_column=None))) == 3
    draw(tmp_path, "logo.png")
    with pytest.raises(UserError, match=r"holds train\.parquet beside logo\.png: which are the data\?"):
        read(tmp_path)
    (tmp_path / "train.parquet").unlink()
    for name in ("preview", "logo"):
        (tmp_path / f"{name}.json").write_text("{}")
        (tmp_path / f"{name}.parquet").write_text("")
    assert read(tmp_path) == ["logo.png", "preview.png"]


def test_texts_of_a_csv_table_stay_texts(tmp_path):
    """An empty one is missing."""
    draw(tmp_path / "images", "0.png")
    (tmp_path / "table").mkdir()
    texts = ["NA", "null", "None", "nan", ""]
    with_metadata(tmp_path / "table", [{"image": tmp_path / "images" / "0.png", "text": t} for t in texts], "data.csv")
    data = Data(name=str(tmp_path / "table"), label_column=None, caption_column="text", skip_uncaptioned=True)
    assert open_source(data).captions == [[text] for text in texts[:-1]]


def test_files_replaced_with_their_time_stamps_kept_are_read_anew(tmp_path):
    """In each kind of cache: datasets' own of tables, the file of decoded images, and that of a table's paths."""

    def replace_image(file: Path, level: int) -> None:
        before = file.stat()
        Image.new("L", (8, 8), level).save(file.with_suffix(".new.png"))
        os.replace(file.with_suffix(".new.png"), file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    draw(tmp_path / "images", "0.png", "1.png")
    paths = [str(tmp_path / "images" / f"{i}.png") for i in range(2)]
    (tmp_path / "paths").mkdir()
    (tmp_path / "paths" / "data.csv").write_text("image\n" + "\n".join(paths))
    (tmp_path / "bytes").mkdir()

    def embed() -> None:
        rows = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
        datasets.Dataset.from_dict({"image": rows}).to_parquet(tmp_path / "bytes" / "data.parquet")

    def levels(folder: str, cache_gb: float) -> list[int]:
        data = Data(name=str(tmp_path / folder), label_column=None, cache_gb=cache_gb)
        images = load_training_images(open_source(data), 1, tmp_path / "cache").training
        return images.batch(range(2), np.random.default_rng(0))[:, 0, 0, 0].tolist()

    embed()
    stamp = (tmp_path / "bytes" / "data.parquet").stat()
    kinds = [(folder, cache) for folder in ("images", "paths", "bytes") for cache in (0, 1)]
    assert [levels(*kind) for kind in kinds] == [[0, 1]] * 6
    replace_image(tmp_path / "images" / "1.png", 9)
    embed()
    os.utime(tmp_path / "bytes" / "data.parquet", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert [levels(*kind) for kind in kinds] == [[0, 9]] * 6
