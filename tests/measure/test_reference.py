import zipfile
from dataclasses import replace

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from torch import nn

from deme.config.experiment import Config
from deme.config.sections import Data, Evaluate
from deme.data.opening import open_source
from deme.errors import UserError
from deme.measure.reference import (
    content_hash,
    load_reference,
    reference_statistics,
    save_reference,
)
from deme.measure.scores import Reference, statistics

DIGITS = Data().tagged("statistics")
CLASSIFIER = {"features": "classifier", "classifier": "ab"}


def test_references_survive_saving(tmp_path):
    """The statistics are those of all features, read in parts, and few features are all kept."""
    features = np.random.default_rng(0).normal(100, 1, size=(20, 3)).astype(np.float32)
    reference = Reference.of([features[:7], features[7:8], features[8:]], 20)
    record = {"data": DIGITS, "features": "classifier"}
    save_reference(tmp_path / "a.npz", reference, record)
    loaded, found = load_reference(tmp_path / "a.npz")
    assert found == record
    assert loaded.size == [8, 8]
    for found, expected in zip((loaded.mu, loaded.sigma), statistics(features), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.array_equal(np.sort(loaded.features, axis=0), np.sort(features, axis=0))


def test_plain_pytorch_fid_files_are_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2))
    reference, record = load_reference(tmp_path / "a.npz")
    assert record == {}
    assert reference.features is None


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", mean=np.zeros(2))
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(tmp_path / "nan.npz", mu=np.full(2, np.nan), sigma=np.eye(2))
    np.savez(tmp_path / "huge.npz", mu=np.full(2, 1e300), sigma=np.eye(2))
    np.savez(tmp_path / "skew.npz", mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0.0, 1.0]]))
    np.savez(tmp_path / "negative.npz", mu=np.zeros(2), sigma=-np.eye(2))
    np.save(tmp_path / "array.npy", np.zeros(2))
    with zipfile.ZipFile(tmp_path / "raw.npz", "w") as file:  # numpy gives such members as bytes
        for name in ("mu", "sigma", "features"):
            file.writestr(name, b"1.0")
    for name in [*(path.name for path in tmp_path.iterdir()), "absent.npz"]:
        with pytest.raises(UserError, match="--save-stats"):
            load_reference(tmp_path / name)


class Mean(nn.Module):
    """Two features: the mean and the first pixel."""

    def features(self, pixels):
        return pixels.float().flatten(1)[:, :2]


def given(reference, features="classifier", **data):
    """The statistics that evaluate.reference gives a run of the classifier `ab`, or of Inception."""
    evaluate = Evaluate(features=features, reference=str(reference))
    config = Config(output_dir=str(reference.parent / "runs"), evaluate=evaluate)
    config = replace(config, data=replace(config.data, **data))
    config.paths.stats.mkdir(parents=True, exist_ok=True)
    network = CLASSIFIER if features == "classifier" else {"features": features}
    return reference_statistics(config, Accelerator(cpu=True), Mean(), network, lambda: open_source(config.data))


def write(file, made_from, size=2):
    features = np.random.default_rng(0).normal(size=(10, size)).astype(np.float32)
    save_reference(file, Reference.of([features], 10), made_from)


def test_a_reference_of_this_feature_network_is_taken(tmp_path, capsys):
    write(tmp_path / "a.npz", {"data": DIGITS, **CLASSIFIER})
    assert given(tmp_path / "a.npz").size == [8, 8]
    assert "statistics of digits, split train, 8 pixels" in capsys.readouterr().out


def test_a_reference_of_the_column_that_is_read_is_taken(tmp_path):
    """Though the configuration names another, as that of the Hub, which the data set lacks."""
    (tmp_path / "set").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    row = {"bytes": (tmp_path / "0.png").read_bytes(), "path": None}
    datasets.Dataset.from_dict({"picture": [row, row]}).to_parquet(tmp_path / "set" / "train.parquet")
    name = str(tmp_path / "set")
    write(tmp_path / "a.npz", {"data": DIGITS | {"name": name, "image_column": "picture"}, **CLASSIFIER})
    assert given(tmp_path / "a.npz", name=name, image_column="img", label_column=None).size == [8, 8]


@pytest.mark.parametrize(
    ("made_from", "reason"),
    [
        ({"data": DIGITS, **CLASSIFIER, "classifier": "cd"}, "of another classifier"),
        ({"data": DIGITS, "features": "classifier"}, "of another classifier"),
        ({"data": DIGITS, "features": "inception"}, "in the features of inception, not"),
        ({"data": DIGITS}, "of a network that it does not name"),
        ({}, "of a network that it does not name"),
        ({"data": DIGITS | {"split": "test"}, **CLASSIFIER}, "data.split=test, not of data.split=train"),
        ({"data": DIGITS | {"image_column": "x"}, **CLASSIFIER}, "data.image_column=x, not of data.image_column=image"),
        ({"data": 1, **CLASSIFIER}, "made_from.data is not a mapping"),
        ({"data": DIGITS | {"resolution": "8"}, **CLASSIFIER}, "made_from.data.resolution is not a whole number"),
    ],
)
def test_a_reference_that_does_not_compare_is_refused(tmp_path, made_from, reason):
    """Its record names another feature network, or other images of the same data set."""
    write(tmp_path / "a.npz", made_from)
    with pytest.raises(UserError, match=rf"^evaluate\.reference={tmp_path}/a\.npz: .*{reason}"):
        given(tmp_path / "a.npz")


def test_a_reference_of_as_many_other_features_or_of_fewer_is_refused(tmp_path):
    write(tmp_path / "a.npz", {"data": DIGITS, "features": "inception"}, size=3)
    with pytest.raises(UserError, match="holds statistics of 3 features, inception has 2"):
        given(tmp_path / "a.npz", "inception")


def test_statistics_of_another_data_set_are_named(tmp_path, capsys):
    """As COCO's, which text-to-image models are compared with; its split is its own."""
    write(tmp_path / "a.npz", {"data": DIGITS | {"name": "coco", "split": "val"}, "features": "inception"})
    given(tmp_path / "a.npz", "inception")
    assert "statistics of coco, split val, 8 pixels" in capsys.readouterr().out


def test_plain_statistics_are_taken_for_inception_alone(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert given(tmp_path / "a.npz", "inception").size is None
    assert "at which size, is not known" in capsys.readouterr().out
    with pytest.raises(UserError, match="of a network that it does not name"):
        given(tmp_path / "a.npz")


def test_images_of_another_size_than_the_references_are_refused(tmp_path):
    write(tmp_path / "a.npz", {"data": DIGITS, **CLASSIFIER})
    reference = given(tmp_path / "a.npz")
    reference.check_size(8, 8)
    with pytest.raises(UserError, match="images of 16 x 8 pixels, a reference of 8 x 8 pixels"):
        reference.check_size(16, 8)


def test_the_images_of_a_folder_are_a_reference(tmp_path, capsys):
    """Made once, and again where one image is another, whatever its time stamp says."""
    folder = tmp_path / "real"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 10, 12, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    before = content_hash(folder)
    found = given(folder)
    np.testing.assert_allclose(found.mu, pixels[:, 0, :2, 0].astype(float).mean(0))
    assert found.size == [12, 10]
    assert "wrote" in capsys.readouterr().out
    given(folder)
    assert "wrote" not in capsys.readouterr().out
    Image.fromarray(pixels[1]).save(folder / "0.png")
    assert content_hash(folder) != before
    pixels[0] = pixels[1]
    np.testing.assert_allclose(given(folder).mu, pixels[:, 0, :2, 0].astype(float).mean(0))
    write(tmp_path / "a.npz", {"size": [12, 10], **CLASSIFIER})
    assert given(tmp_path / "a.npz").size == [12, 10]


def test_damaged_statistics_of_the_run_are_made_anew(tmp_path, capsys):
    folder = tmp_path / "real"
    folder.mkdir()
    for number in range(3):
        Image.new("L", (8, 8), 20 * number).save(folder / f"{number}.png")
    mu = given(folder).mu
    file = next((tmp_path / "runs").rglob("*.npz"))
    file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(given(folder).mu, mu)
    assert "unreadable, made anew" in capsys.readouterr().out
