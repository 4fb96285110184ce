import pytest
import torch
from accelerate import Accelerator

from deme.config.experiment import Config
from deme.config.sections import Data, Evaluate
from deme.data.examples import load_evaluation_images
from deme.data.opening import open_source
from deme.errors import UserError
from deme.measure import features
from deme.measure.features import load_classifier, train_classifier, trained_classifier


def test_the_classifier_knows_the_digits(tmp_path):
    """At least 97 % on digits it was not trained on; saved and loaded it gives the same features."""
    source = open_source(Data())
    config = Config(output_dir=str(tmp_path), evaluate=Evaluate(classifier_epochs=12))
    config.paths.stats.mkdir(parents=True)
    images, labels = load_evaluation_images(source, tmp_path)
    pixels = images.batch(range(len(images)))
    classifier, accuracy = train_classifier(pixels, labels, config, torch.device("cpu"))
    assert accuracy >= 0.97
    loaded, saved_accuracy = trained_classifier(config, Accelerator(cpu=True), source)
    assert saved_accuracy == accuracy
    with torch.inference_mode():
        assert torch.equal(loaded.features(pixels[:9]), classifier.features(pixels[:9]))
    written = config.paths.classifier.stat().st_mtime_ns
    trained_classifier(config, Accelerator(cpu=True), source)
    assert config.paths.classifier.stat().st_mtime_ns == written
    assert load_classifier(config.paths.classifier, {"seed": 1}) is None


def test_images_too_few_for_a_test_of_the_classifier_are_refused(tmp_path, monkeypatch):
    source = open_source(Data())
    monkeypatch.setattr(features, "load_evaluation_images", lambda *_: ([None] * 4, torch.zeros(4)))
    config = Config(output_dir=str(tmp_path))
    config.paths.stats.mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"^data\.name=digits: holds 4 image\(s\), too few for evaluate\.features=classifier"
    ):
        trained_classifier(config, Accelerator(cpu=True), source)
