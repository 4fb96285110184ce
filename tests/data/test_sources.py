import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from deme.config.sections import Data
from deme.data.decoding import as_seen
from deme.data.images import CroppedImages, StreamedImages
from deme.data.sources import as_opened, data_fingerprint, load_evaluation_images, load_training_images
from deme.errors import UserError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def random_state():
    return np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    """An image folder as datasets reads it: two classes, sizes 12×9 and 9×12, one grayscale."""
    for label, (name, size, mode) in enumerate([("cat", (12, 9), "RGB"), ("dog", (9, 12), "L")]):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        pixels = np.random.default_rng(label).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / "images" / "train" / name / "0.png")
    return str(tmp_path / "images")


def test_digits_are_all_there(tmp_path):
    images, _ = load_training_images(Data(), 1, tmp_path)
    batch = images.batch(np.arange(len(images)), random_state())
    assert batch.shape == (1797, 1, 8, 8)
    assert batch.dtype == torch.uint8
    expected = torch.from_numpy(load_digits().images)
    torch.testing.assert_close(batch[:, 0].double() * 16 / 255, expected, rtol=0, atol=0.04)


def test_evaluation_images_are_rgb_with_labels(tmp_path):
    images, labels = load_evaluation_images(Data(), tmp_path)
    pixels = images.batch(range(len(images)))
    assert pixels.shape == (1797, 3, 8, 8)
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    assert labels.tolist() == load_digits().target.tolist()


def test_an_image_folder_is_resized_to_its_shorter_side_and_cropped(folder, tmp_path):
    images, _ = load_training_images(Data(name=folder, resolution=3), 3, tmp_path)
    assert sorted(tuple(image.shape) for image in images.images) == [(3, 3, 4), (3, 4, 3)]
    assert images.batch(np.array([0, 1]), random_state()).shape == (2, 3, 3, 3)
    images, labels = load_evaluation_images(Data(name=folder, resolution=3), tmp_path)
    assert images.batch([0, 1]).shape == (2, 3, 3, 3)
    assert labels.tolist() == [0, 1]


def test_small_images_are_enlarged(folder, tmp_path):
    images, _ = load_training_images(Data(name=folder, resolution=32), 1, tmp_path)
    assert images.batch(np.array([0]), random_state()).shape == (1, 1, 32, 32)


def test_crops_and_flips_follow_the_generator():
    image = torch.arange(2 * 5, dtype=torch.uint8).reshape(1, 2, 5)
    cropped = CroppedImages([image], 2, center_crop=False, random_flip=True)
    draws = {tuple(cropped.batch(np.array([0]), np.random.default_rng(seed)).flatten().tolist()) for seed in range(99)}
    windows = [image[..., left : left + 2] for left in range(4)]
    assert draws == {tuple(w.flatten().tolist()) for window in windows for w in (window, window.flip(-1))}
    again = [cropped.batch(np.array([0]), np.random.default_rng(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_centre_crop_without_flip_ignores_the_generator():
    image = torch.arange(2 * 6, dtype=torch.uint8).reshape(1, 2, 6)
    centred = CroppedImages([image], 2, center_crop=True, random_flip=False)
    for seed in range(5):
        assert torch.equal(centred.batch(np.array([0]), np.random.default_rng(seed))[0], image[..., 2:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "/nowhere/at/all"}, r"data\.name=/nowhere/at/all"),
        ({"label_column": "class"}, r"data\.label_column=class: .* has the columns image, label"),
        ({"image_column": "label"}, r"data\.image_column=label: holds no images"),
        ({"split": "test"}, r"data\.split=test"),
    ],
)
def test_mistakes_name_the_key(folder, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_training_images(Data(**({"name": folder, "resolution": 8} | change)), 3, tmp_path)


def table(tmp_path, name: str, columns: dict) -> str:
    """A folder of one parquet file, whose columns are datasets' images where the values are."""
    (tmp_path / name).mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / name / "train.parquet")
    return str(tmp_path / name)


def test_the_only_column_of_images_is_read_where_another_is_named(tmp_path, capsys):
    """Whether the file says that it holds images or not; said once; records name the column that was read."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), RED).save(content, "PNG")
    rows = [{"bytes": content.getvalue(), "path": None}] * 2
    as_images = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    told = datasets.Dataset.from_dict({"image": rows, "label": [0, 1]}, as_images)
    (tmp_path / "told").mkdir()
    told.to_parquet(tmp_path / "told" / "train.parquet")
    for name in (str(tmp_path / "told"), table(tmp_path, "untold", {"image": rows, "label": [0, 1]})):
        data = Data(name=name, image_column="img")
        assert as_opened(data).image_column == "image"
        assert data_fingerprint(data) == data_fingerprint(Data(name=name))
        assert load_training_images(data, 3, tmp_path).training.batch([0], random_state()).shape == (1, 3, 8, 8)
        assert capsys.readouterr().out == f"data.image_column=img: {name} has none; image, its only images, is read\n"
    for columns in ({"a": rows, "b": rows}, {"label": [0, 1]}):
        data = Data(name=table(tmp_path, "+".join(columns), columns), image_column="img", label_column=None)
        with pytest.raises(UserError, match=f"data.image_column=img: .* has the columns {', '.join(columns)}"):
            as_opened(data)


def with_exif_rotation() -> Image.Image:
    """Stored 2 wide and 1 high, red left of white; the camera was turned: seen 1 wide and 2 high, red on top."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    file = io.BytesIO()
    Image.fromarray(np.array([[RED, WHITE]], dtype=np.uint8)).save(file, "PNG", exif=exif)
    return Image.open(file)


def palette_with_transparency() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([*RED, 0, 0, 255])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        (with_exif_rotation(), [[RED], [WHITE]]),
        (palette_with_transparency(), [[RED, WHITE]]),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), [[WHITE]]),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 255)), [[RED]]),
        (Image.new("LA", (1, 1), (0, 128)), [[(127, 127, 127)]]),
        (Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16)), [[(0,) * 3, (128,) * 3, (255,) * 3]]),
        (Image.new("L", (1, 1), 7), [[(7, 7, 7)]]),
        (Image.new("1", (1, 1), 1), [[WHITE]]),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [[RED]]),
    ],
    ids=["exif", "palette", "transparent", "opaque", "half transparent grey", "16 bit", "grey", "bilevel", "cmyk"],
)
def test_images_become_what_a_person_sees(image, seen):
    assert np.array_equal(np.asarray(as_seen(image, 3)), np.array(seen, dtype=np.uint8))
    assert as_seen(image, 1).mode == "L"


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_unreadable_images_stop_the_run_or_are_skipped(folder, tmp_path, capsys, content):
    bad = tmp_path / "images" / "train" / "cat" / "1.png"
    bad.write_bytes((bad.with_name("0.png")).read_bytes()[:150] if content == "truncated" else content)
    data = {"name": folder, "resolution": 8}
    with pytest.raises(UserError, match=r"row 1 \(.*cat/1\.png\): not a readable image"):
        load_training_images(Data(**data), 3, tmp_path)
    images, labels = load_evaluation_images(Data(**data, skip_unreadable=True), tmp_path)
    assert len(images) == 2
    assert labels.tolist() == [0, 1]
    assert "skipped 1 of 3 images" in capsys.readouterr().out


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("text")
    data = Data(name=str(tmp_path / "images"), label_column=None, skip_unreadable=True)
    with pytest.raises(UserError, match="none of its 1 images can be read"):
        load_training_images(data, 3, tmp_path)


def test_parquet_and_arrow_folders_are_read(folder, tmp_path):
    rows = datasets.load_dataset(folder, split="train")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train.parquet")
    expected = load_training_images(Data(name=folder), 3, tmp_path)[0].batch([0, 1], random_state())
    found = load_training_images(Data(name=str(tmp_path / "parquet")), 3, tmp_path)[0].batch([0, 1], random_state())
    assert torch.equal(found, expected)


def test_the_file_cache_holds_the_same_images_and_is_built_once(folder, tmp_path, monkeypatch):
    """cache_gb: 0 maps a file; the second time nothing is decoded; other preprocessing makes another file."""
    in_memory, _ = load_training_images(Data(name=folder), 3, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    mapped, _ = load_training_images(Data(name=folder, cache_gb=0), 3, tmp_path / "cache")
    for one, other in zip(in_memory.images, mapped.images, strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr("deme.data.sources.decode_image", lambda *_: pytest.fail("decoded again"))
    again, _ = load_training_images(Data(name=folder, cache_gb=0), 3, tmp_path / "cache")
    assert torch.equal(again.batch([0, 1], random_state()), in_memory.batch([0, 1], random_state()))
    monkeypatch.undo()
    load_training_images(Data(name=folder, cache_gb=0, resolution=4), 3, tmp_path / "cache")
    load_training_images(Data(name=folder, cache_gb=0), 1, tmp_path / "cache")
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 3


def test_held_out_images_are_the_same_for_all_and_never_trained_on(tmp_path):
    """A seeded choice; together both parts are the whole data, and without the option all of it is trained on."""

    def found(images) -> list[bytes]:
        return [image.numpy().tobytes() for image in images.batch(range(len(images)), random_state())]

    everything, none = load_training_images(Data(), 1, tmp_path)
    assert len(none) == 0
    training, held_out = load_training_images(Data(held_out_images=100), 1, tmp_path)
    assert (len(training), len(held_out)) == (1697, 100)
    assert sorted(found(training) + found(held_out)) == sorted(found(everything))
    assert found(load_training_images(Data(held_out_images=100), 1, tmp_path)[1]) == found(held_out)
    with pytest.raises(UserError, match=r"data\.held_out_images=1797: digits has 1797 images"):
        load_training_images(Data(held_out_images=1797), 1, tmp_path)


def test_the_fingerprint_tells_other_images_and_where_asked_for_other_labels(folder, tmp_path):
    """A training run may change its label_column; a classifier is made of it."""
    data = {label: Data(name=folder, label_column=label) for label in ("label", None)}
    assert data_fingerprint(data["label"]) == data_fingerprint(data[None])
    assert data_fingerprint(data["label"], with_labels=True) != data_fingerprint(data["label"])
    before = data_fingerprint(data[None])
    Image.effect_noise((12, 9), 90).save(tmp_path / "images" / "train" / "cat" / "0.png")
    assert data_fingerprint(data[None]) != before


def test_data_larger_than_the_caches_are_decoded_on_the_fly(folder, tmp_path):
    """cache_gb and cache_disk_gb of 0: the same images, and nothing is written."""
    cached = load_training_images(Data(name=folder), 3, tmp_path / "cache").training
    streamed = load_training_images(Data(name=folder, cache_gb=0, cache_disk_gb=0), 3, tmp_path / "cache").training
    assert isinstance(streamed.images, StreamedImages)
    for seed in range(5):
        batches = [images.batch([0, 1, 0], np.random.default_rng(seed)) for images in (cached, streamed)]
        assert torch.equal(*batches)
    assert not (tmp_path / "cache").exists()
    evaluated, labels = load_evaluation_images(Data(name=folder, cache_gb=0, cache_disk_gb=0), tmp_path / "cache")
    assert evaluated.batch([0, 1]).shape == (2, 3, 8, 8)
    assert labels.tolist() == [0, 1]


def test_unreadable_images_are_skipped_on_the_fly_after_one_pass(folder, tmp_path, capsys, monkeypatch):
    """Which rows can be read is kept; without skip_unreadable the bad one stops whoever asks for it, by name."""
    (tmp_path / "images" / "train" / "cat" / "1.png").write_text("text")
    settings = {"name": folder, "cache_gb": 0, "cache_disk_gb": 0}
    images = load_training_images(Data(**settings), 3, tmp_path / "cache").training
    with pytest.raises(UserError, match=r"row 1 \(.*cat/1\.png\): not a readable image"):
        images.batch([0, 1, 2], random_state())
    skipping = Data(**settings, skip_unreadable=True)
    for _ in range(2):
        images = load_training_images(skipping, 3, tmp_path / "cache").training
        assert len(images) == 2
        assert images.batch([0, 1], random_state()).shape == (2, 3, 8, 8)
    assert capsys.readouterr().out.count("skipped 1 of 3 images") == 1
