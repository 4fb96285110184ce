import io
import struct
import zipfile
import zlib
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from sklearn.datasets import load_digits

from deme.config.sections import Data
from deme.data import opening
from deme.data.crops import CroppedImages
from deme.data.decoding import as_seen, decode_image, open_image, size_as_seen
from deme.data.examples import labels_for, load_evaluation_images, load_training_images
from deme.data.opening import data_hashes, open_source
from deme.errors import UserError
from deme.job.records import CONTENTS, DATA

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
    images = load_training_images(open_source(Data()), 1, tmp_path).training
    batch = images.batch(np.arange(len(images)), random_state())
    assert batch.shape == (1797, 1, 8, 8)
    assert batch.dtype == torch.uint8
    expected = torch.from_numpy(load_digits().images)
    torch.testing.assert_close(batch[:, 0].double() * 16 / 255, expected, rtol=0, atol=0.04)


def test_evaluation_images_are_rgb_with_labels(tmp_path):
    images, labels = load_evaluation_images(open_source(Data()), tmp_path)
    pixels = images.batch(range(len(images)))
    assert pixels.shape == (1797, 3, 8, 8)
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    assert labels.tolist() == load_digits().target.tolist()


def test_an_image_folder_is_resized_to_its_shorter_side_and_cropped(folder, tmp_path):
    images = load_training_images(open_source(Data(name=folder, resolution=3)), 3, tmp_path).training
    assert sorted(image.shape for image in images.images) == [(3, 4, 3), (4, 3, 3)]
    assert images.batch(np.array([0, 1]), random_state()).shape == (2, 3, 3, 3)
    images, labels = load_evaluation_images(open_source(Data(name=folder, resolution=3)), tmp_path)
    assert images.batch([0, 1]).shape == (2, 3, 3, 3)
    assert labels.tolist() == [0, 1]


def test_small_images_are_enlarged(folder, tmp_path):
    images = load_training_images(open_source(Data(name=folder, resolution=32)), 1, tmp_path).training
    assert images.batch(np.array([0]), random_state()).shape == (1, 1, 32, 32)


def test_crops_and_flips_follow_the_generator():
    image = torch.arange(2 * 5, dtype=torch.uint8).reshape(1, 2, 5)
    cropped = CroppedImages([image.permute(1, 2, 0).numpy()], 2, center_crop=False, random_flip=True)
    draws = {tuple(cropped.batch(np.array([0]), np.random.default_rng(seed)).flatten().tolist()) for seed in range(99)}
    windows = [image[..., left : left + 2] for left in range(4)]
    assert draws == {tuple(w.flatten().tolist()) for window in windows for w in (window, window.flip(-1))}
    again = [cropped.batch(np.array([0]), np.random.default_rng(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_sizes_of_crops_are_those_of_the_original_and_of_the_place(folder, tmp_path):
    """Height and width of the file, upright by EXIF; the crop's corner in the image as it is seen, flipped or not."""
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    pixels = np.arange(12 * 6, dtype=np.uint8).reshape(6, 12)
    Image.fromarray(pixels).save(f"{folder}/train/cat/a.png")
    Image.fromarray(pixels).save(f"{folder}/train/cat/b.jpg", exif=turned)
    data = Data(name=folder, resolution=4, random_flip=True)
    images = load_training_images(open_source(data), 1, tmp_path, takes_sizes=True).training
    known = {tuple(row) for row in images.originals.tolist()}
    assert {(6, 12), (12, 6)} <= known
    for number, original in enumerate(images.originals.tolist()):
        for seed in range(8):
            crop, sizes = images.crops([number], np.random.default_rng(seed))
            height, width, top, left, *size = sizes[0].tolist()
            assert ([height, width], size) == (original, [4, 4])
            whole = torch.from_numpy(images.images[number])[..., 0]
            windows = [image[top : top + 4, left : left + 4] for image in (whole, whole.flip(-1))]
            assert any(torch.equal(crop[0, 0], window) for window in windows)


def test_centre_crop_without_flip_ignores_the_generator():
    image = torch.arange(2 * 6, dtype=torch.uint8).reshape(1, 2, 6)
    centred = CroppedImages([image.permute(1, 2, 0).numpy()], 2, center_crop=True, random_flip=False)
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
        load_training_images(open_source(Data(**({"name": folder, "resolution": 8} | change))), 3, tmp_path)


def table(tmp_path, name: str, columns: dict, features: datasets.Features | None = None) -> str:
    """A folder of one parquet file."""
    (tmp_path / name).mkdir(parents=True)
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / name / "train.parquet")
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
        assert open_source(data).data.image_column == "image"
        assert data_hashes(open_source(data), tmp_path) == data_hashes(open_source(Data(name=name)), tmp_path)
        assert load_training_images(open_source(data), 3, tmp_path).training.batch([0], random_state()).shape == (
            1,
            3,
            8,
            8,
        )
        assert capsys.readouterr().out == f"data.image_column=img: {name} has none; image, its only images, is read\n"
    for columns in ({"a": rows, "b": rows}, {"label": [0, 1]}):
        data = Data(name=table(tmp_path, "+".join(columns), columns), image_column="img", label_column=None)
        with pytest.raises(UserError, match=f"data.image_column=img: .* has the columns {', '.join(columns)}"):
            open_source(data)


def opened_classes(root, kind: str, names: list[str], labels: list[int]):
    """A data set of grey images of these classes: a folder for each, or a table with a ClassLabel column."""
    images = [Image.new("L", (8, 8), level) for level in range(len(labels))]
    if kind == "table":
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        return open_source(Data(name=table(root, kind, {"image": images, "label": labels}, features)))
    for level, (image, label) in enumerate(zip(images, labels, strict=True)):
        (root / kind / names[label]).mkdir(parents=True, exist_ok=True)
        image.save(root / kind / names[label] / f"{level}.png")
    return open_source(Data(name=str(root / kind)))


@pytest.mark.parametrize("kind", ["folders", "table"])
def test_classes_that_are_named_by_numbers_are_those_numbers(tmp_path, kind):
    """Whatever their order; only where the numbers are the places, the hash of older runs stays."""
    source = opened_classes(tmp_path, kind, [str(i) for i in (0, 1, 10, 11, 2, 360)], [0, 1, 2, 3, 4, 5])
    levels = [int(source.decode(row, 1)[0, 0, 0]) for row in range(6)]
    numbers = [[0, 1, 10, 11, 2, 360][level] for level in levels]
    assert labels_for(source, 361) == list(source.labels) == numbers
    with pytest.raises(UserError, match="row 5 has the label 360, and the model 12 classes"):
        labels_for(source, 12)
    assert load_evaluation_images(source, tmp_path)[1].tolist() == [sorted(numbers).index(number) for number in numbers]
    places = replace(source, labels=list(range(6)))
    hashes = [data_hashes(either, tmp_path, with_labels=True) for either in (source, places)]
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize("kind", ["folders", "table"])
def test_names_of_classes_must_be_as_many_as_the_network_has(tmp_path, kind):
    """The classes of all folders and of the whole column, even if a split lacks some; then they keep their places."""
    source = opened_classes(tmp_path, kind, ["n01440764", "n02102040", "n02979186"], [0, 2, 1])
    with pytest.raises(UserError, match="label: holds 3 names, and the model has 1000 classes: give their numbers"):
        labels_for(source, 1000)
    part = open_source(replace(source.data, split="train[:2]"))
    assert labels_for(source, 3) == list(source.labels)
    assert labels_for(part, 3) == labels_for(source, 3)[:2]


def test_classes_of_a_table_keep_their_own_order(tmp_path):
    """It need not be the alphabet's; the label of an image without a class is refused."""
    assert labels_for(opened_classes(tmp_path, "table", ["dog", "cat"], [0, 1, 0]), 2) == [0, 1, 0]
    unknown = opened_classes(tmp_path / "unknown", "table", ["0", "1"], [1, -1])
    with pytest.raises(UserError, match="row 1 has the label -1, and the model 2 classes"):
        labels_for(unknown, 2)


def with_exif_rotation() -> Image.Image:
    """Stored 2 wide and 1 high, red left of white; the camera was turned: seen 1 wide and 2 high, red on top."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    file = io.BytesIO()
    Image.fromarray(np.array([[RED, WHITE]], dtype=np.uint8)).save(file, "PNG", exif=exif)
    return Image.open(file)


def png(depth: int, values: list[int], transparent: int) -> Image.Image:
    """A row of grey values, one of which is transparent."""
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = bytes([0]) + int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8))
    header = struct.pack(">IIBBBBB", len(values), 1, depth, 0, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"tRNS", struct.pack(">H", transparent)),
        (b"IDAT", zlib.compress(row)),
        (b"IEND", b""),
    ]
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        file += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return Image.open(io.BytesIO(file))


def with_profile(mode: str, colour, profile: bytes | None = None) -> Image.Image:
    """One pixel, with sRGB's profile whose red and blue primaries are exchanged, or another one."""
    if profile is None:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        profile = profile.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")
    image = Image.new(mode if mode != "P" else "RGB", (1, 1), colour)
    file = io.BytesIO()
    (image.quantize() if mode == "P" else image).save(file, "PNG", icc_profile=profile)
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
        (png(16, [0, 1000, 65535], transparent=1000), [[(0,) * 3, WHITE, WHITE]]),
        (png(4, [0, 10, 5], transparent=10), [[(0,) * 3, WHITE, (85,) * 3]]),
        (with_profile("RGB", (200, 60, 30)), [[(30, 60, 200)]]),
        (with_profile("RGBA", (200, 60, 30, 0)), [[WHITE]]),
        (with_profile("RGBA", (200, 60, 30, 255)), [[(30, 60, 200)]]),
        (with_profile("P", (200, 60, 30)), [[(30, 60, 200)]]),
        (with_profile("L", 77), [[(77,) * 3]]),
        (with_profile("RGB", RED, b"no profile"), [[RED]]),
    ],
)
def test_images_become_what_a_person_sees(image, seen):
    assert np.abs(np.asarray(as_seen(image, 3), dtype=int) - np.array(seen)).max() <= 3 * ("icc_profile" in image.info)
    assert as_seen(image, 1).mode == "L"


FORMATS = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "TIFF, compressed": {"compression": "tiff_lzw"},
    "JPEG": {"quality": 95},
    "AVIF": {"quality": 95},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_orientation_is_seen_upright(kind):
    """Its size too, without decoding; values that EXIF does not know turn nothing."""
    pixels = np.repeat(np.repeat(np.array([[250, 120, 10], [60, 200, 90]], np.uint8), 16, 0), 16, 1)
    upright = {2: np.fliplr(pixels), 3: pixels[::-1, ::-1], 4: np.flipud(pixels), 5: pixels.T}
    upright |= {6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].T, 8: np.rot90(pixels)}
    for orientation in range(1, 9) if "compressed" in kind else range(10):  # libtiff writes no other
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind.split(",")[0], exif=exif, **FORMATS[kind])
        expected = upright.get(orientation, pixels)
        found = decode_image(file.getvalue(), 32, 1)[:, :, 0]
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).mean() < 3
        assert size_as_seen(open_image(file.getvalue())) == expected.shape[::-1]


def with_tags(*tags: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of such tags, each with its type, its count, and its content of up to 8 bytes."""
    entries, values = b"", b""
    for tag, kind, count, content in tags:
        place = struct.pack("<I", 14 + 12 * len(tags) + len(values))
        entries += struct.pack("<HHI", tag, kind, count) + (content.ljust(4, b"\0") if len(content) <= 4 else place)
        values += content if len(content) > 4 else b""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + values


ORIENTATION = (274, 3, 1, struct.pack("<H", 6))
ODD = {
    "a resolution of -1 / 0": with_tags(ORIENTATION, (282, 10, 1, struct.pack("<ii", -1, 0))),
    "a resolution that is text": with_tags(ORIENTATION, (282, 2, 3, b"72\0")),
    "a rational unit": with_tags(ORIENTATION, (296, 5, 1, struct.pack("<II", 2, 1))),
    "a unit that is too large": with_tags(ORIENTATION, (296, 4, 1, struct.pack("<I", 70_000))),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP"])
def test_odd_exif_tags_do_not_keep_an_image_from_being_turned(kind, suffix):
    file = io.BytesIO()
    Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 16, 0).repeat(8, 1)).save(file, suffix, exif=ODD[kind])
    assert decode_image(file.getvalue(), 8, 1)[0, [0, -1], 0].tolist() == pytest.approx([255, 0], abs=3)


@pytest.mark.parametrize("block", [b"Exif\0\0no TIFF header", b"Exif\0\0II*\0", b"Exif\0\0II*\0\xff\xff\xff\xff"])
@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_ignored(block, suffix):
    file = io.BytesIO()
    Image.new("L", (8, 9), 7).save(file, suffix, exif=block)
    assert decode_image(file.getvalue(), 8, 1).shape == (9, 8, 1)
    assert size_as_seen(open_image(file.getvalue())) == (8, 9)


def saved(pixels: np.ndarray, suffix: str, **options) -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix, **options)
    return Image.open(file)


UNKNOWN = {
    "floating point": saved(np.array([[0.0, 1.0]], dtype=np.float32), "TIFF"),
    "32-bit integers": saved(np.array([[0, 255]], dtype=np.int32), "TIFF"),
    "signed": Image.new("I", (1, 1), -1),
    "16 bits, white is 0": saved(np.array([[0, 65535]], dtype=np.uint16), "TIFF", tiffinfo={262: 0}),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_values_whose_range_is_not_known_are_refused(kind):
    """Instead of black or white images."""
    with pytest.raises(UserError, match="whose range is not known; save it"):
        as_seen(UNKNOWN[kind], 1)


def test_16_bit_greys_of_other_formats_are_read():
    pixels = np.array([[0, 32896, 65535]], dtype=np.uint16)
    for suffix in ("TIFF", "PNG", "PPM"):
        assert np.asarray(as_seen(saved(pixels, suffix), 1)).tolist() == [[0, 128, 255]]


def test_columns_of_arrays_hold_bytes_or_are_refused(tmp_path):
    """Lists or arrays of uint8; floating point, and integers that may be cut off, by name."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    nested = datasets.List(datasets.List(datasets.List(datasets.Value("uint8"))))
    for number, feature in enumerate((nested, datasets.Array3D((8, 8, 3), "uint8"))):
        features = datasets.Features({"image": feature})
        name = table(tmp_path, f"{number}", {"image": pixels.tolist()}, features)
        for cache_gb in (0, 1):
            data = Data(name=name, label_column=None, cache_gb=cache_gb)
            images = load_training_images(open_source(data), 3, tmp_path / "cache").training.batch(
                range(2), random_state()
            )
            assert np.array_equal(images.permute(0, 2, 3, 1), pixels)
    for kind in ("float32", "int64"):
        features = datasets.Features({"image": datasets.Array3D((8, 8, 3), kind)})
        data = Data(name=table(tmp_path, kind, {"image": pixels.tolist()}, features), label_column=None)
        with pytest.raises(UserError, match=f"image_column=image: holds no images: .* {kind}, whose range is not"):
            load_training_images(open_source(data), 3, tmp_path)
    first = datasets.Features({"image": datasets.Array3D((3, 8, 8), "uint8")})
    data = Data(
        name=table(tmp_path, "first", {"image": pixels.transpose(0, 3, 1, 2).tolist()}, first), label_column=None
    )
    with pytest.raises(UserError, match=r"row 0: not a readable image: an array of uint8, \(3, 8, 8\)"):
        load_training_images(open_source(data), 3, tmp_path)


def test_images_at_addresses_are_opened_as_datasets_opens_them(tmp_path):
    """Of a table whose paths lead into an archive, here; https:// and hf:// go the same way."""
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "in/a.png")
    address = f"zip://in/a.png::{tmp_path / 'a.zip'}"
    data = Data(name=table(tmp_path, "paths", {"image": [address]}), label_column=None)
    assert load_training_images(open_source(data), 3, tmp_path).training.batch([0], random_state())[
        0, :, 0, 0
    ].tolist() == [*RED]


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_unreadable_images_stop_the_run_or_are_skipped(folder, tmp_path, capsys, content):
    bad = tmp_path / "images" / "train" / "cat" / "1.png"
    bad.write_bytes((bad.with_name("0.png")).read_bytes()[:150] if content == "truncated" else content)
    data = {"name": folder, "resolution": 8}
    with pytest.raises(UserError, match=r"row 1 \(.*cat/1\.png\): not a readable image"):
        load_training_images(open_source(Data(**data)), 3, tmp_path)
    images, labels = load_evaluation_images(open_source(Data(**data, skip_unreadable=True)), tmp_path)
    assert len(images) == 2
    assert labels.tolist() == [0, 1]
    assert "skipped 1 of 3 images" in capsys.readouterr().out


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("text")
    data = Data(name=str(tmp_path / "images"), label_column=None, skip_unreadable=True)
    with pytest.raises(UserError, match="none of its 1 images can be read"):
        load_training_images(open_source(data), 3, tmp_path)


def test_parquet_and_arrow_folders_are_read(folder, tmp_path):
    rows = datasets.load_dataset(folder, split="train")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train.parquet")
    expected = load_training_images(open_source(Data(name=folder)), 3, tmp_path)[0].batch([0, 1], random_state())
    found = load_training_images(open_source(Data(name=str(tmp_path / "parquet"))), 3, tmp_path)[0].batch(
        [0, 1], random_state()
    )
    assert torch.equal(found, expected)


def test_the_file_cache_holds_the_same_images_and_is_built_once(folder, tmp_path, monkeypatch):
    """cache_gb: 0 maps a file; the second time nothing is decoded; other preprocessing makes another file."""
    in_memory = load_training_images(open_source(Data(name=folder)), 3, tmp_path / "cache").training
    assert not (tmp_path / "cache").exists()
    mapped = load_training_images(open_source(Data(name=folder, cache_gb=0)), 3, tmp_path / "cache").training
    for one, other in zip(in_memory.images, mapped.images, strict=True):
        assert np.array_equal(one, other)
    monkeypatch.setattr("deme.data.decoding.decode_image", lambda *_: pytest.fail("decoded again"))
    again = load_training_images(open_source(Data(name=folder, cache_gb=0)), 3, tmp_path / "cache").training
    assert torch.equal(again.batch([0, 1], random_state()), in_memory.batch([0, 1], random_state()))
    monkeypatch.undo()
    load_training_images(open_source(Data(name=folder, cache_gb=0, resolution=4)), 3, tmp_path / "cache")
    load_training_images(open_source(Data(name=folder, cache_gb=0)), 1, tmp_path / "cache")
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 3


def test_held_out_images_are_the_same_for_all_and_never_trained_on(tmp_path):
    """A seeded choice; together both parts are the whole data, and without the option all of it is trained on."""

    def found(images) -> list[bytes]:
        return [image.numpy().tobytes() for image in images.batch(range(len(images)), random_state())]

    everything, none, _ = load_training_images(open_source(Data()), 1, tmp_path)
    assert len(none) == 0
    training, held_out, _ = load_training_images(open_source(Data(held_out_images=100)), 1, tmp_path)
    assert (len(training), len(held_out)) == (1697, 100)
    assert sorted(found(training) + found(held_out)) == sorted(found(everything))
    assert found(load_training_images(open_source(Data(held_out_images=100)), 1, tmp_path)[1]) == found(held_out)
    with pytest.raises(UserError, match=r"data\.held_out_images=1797: digits has 1797 images"):
        load_training_images(open_source(Data(held_out_images=1797)), 1, tmp_path)


def test_the_hash_tells_other_images_and_where_asked_for_other_labels(folder, tmp_path):
    """A training run may change its label_column; a classifier is made of it."""
    data = {label: Data(name=folder, label_column=label) for label in ("label", None)}
    before = data_hashes(open_source(data[None]), tmp_path)
    assert data_hashes(open_source(data["label"]), tmp_path) == before
    assert data_hashes(open_source(data["label"]), tmp_path, with_labels=True) != before
    Image.effect_noise((12, 9), 90).save(tmp_path / "images" / "train" / "cat" / "0.png")
    assert data_hashes(open_source(data[None]), tmp_path) != before


def test_one_image_of_many_is_not_changed_without_being_noticed(tmp_path, monkeypatch):
    """Also one that the hash of decoded images leaves out; all bytes are read once for each state of the files."""
    monkeypatch.setattr(opening, "FINGERPRINTED", 2)
    images, cache = tmp_path / "images", tmp_path / "cache"
    images.mkdir()
    for number in range(4):
        Image.effect_noise((8, 8), 90).save(images / f"{number}.png")
    data = Data(name=str(images), label_column=None)
    before = data_hashes(open_source(data), cache)
    read = []
    stored = opening._stored_bytes
    monkeypatch.setattr(opening, "_stored_bytes", lambda image: read.append(1) or stored(image))
    assert data_hashes(open_source(data), cache) == before
    assert not read
    Image.effect_noise((8, 8), 90).save(images / "1.png")
    after = data_hashes(open_source(data), cache)
    assert (after[DATA], read) == (before[DATA], [1] * 4)
    assert after[CONTENTS] != before[CONTENTS]
    monkeypatch.setattr(opening, "FINGERPRINTED", 4)
    assert data_hashes(open_source(data), cache).keys() == {DATA}  # which looks at all


def test_data_larger_than_the_caches_are_decoded_on_the_fly(folder, tmp_path):
    """cache_gb and cache_disk_gb of 0: the same images, and nothing is written."""
    cached = load_training_images(open_source(Data(name=folder)), 3, tmp_path / "cache").training
    streamed = load_training_images(
        open_source(Data(name=folder, cache_gb=0, cache_disk_gb=0)), 3, tmp_path / "cache"
    ).training
    for seed in range(5):
        batches = [images.batch([0, 1, 0], np.random.default_rng(seed)) for images in (cached, streamed)]
        assert torch.equal(*batches)
    assert not (tmp_path / "cache").exists()
    evaluated, labels = load_evaluation_images(
        open_source(Data(name=folder, cache_gb=0, cache_disk_gb=0)), tmp_path / "cache"
    )
    assert evaluated.batch([0, 1]).shape == (2, 3, 8, 8)
    assert labels.tolist() == [0, 1]


def test_unreadable_images_are_skipped_on_the_fly_after_one_pass(folder, tmp_path, capsys, monkeypatch):
    """Which rows can be read is kept; without skip_unreadable the bad one stops whoever asks for it, by name."""
    (tmp_path / "images" / "train" / "cat" / "1.png").write_text("text")
    settings = {"name": folder, "cache_gb": 0, "cache_disk_gb": 0}
    images = load_training_images(open_source(Data(**settings)), 3, tmp_path / "cache").training
    with pytest.raises(UserError, match=r"row 1 \(.*cat/1\.png\): not a readable image"):
        images.batch([0, 1, 2], random_state())
    skipping = Data(**settings, skip_unreadable=True)
    for _ in range(2):
        images = load_training_images(open_source(skipping), 3, tmp_path / "cache").training
        assert len(images) == 2
        assert images.batch([0, 1], random_state()).shape == (2, 3, 8, 8)
    assert capsys.readouterr().out.count("skipped 1 of 3 images") == 1
