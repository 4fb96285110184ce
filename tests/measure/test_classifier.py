import torch

from deme.config.experiment import Config
from deme.config.sections import Data, Evaluate
from deme.data.examples import load_evaluation_images
from deme.data.opening import open_source
from deme.measure.features import load_classifier, save_classifier, train_classifier


def test_the_classifier_knows_the_digits(tmp_path):
    """At least 97 % on digits it was not trained on; saved and loaded it gives the same features."""
    images, labels = load_evaluation_images(open_source(Data()), tmp_path)
    pixels = images.batch(range(len(images)))
    config = Config(evaluate=Evaluate(classifier_epochs=12))
    classifier, accuracy = train_classifier(pixels, labels, config, torch.device("cpu"))
    assert accuracy >= 0.97
    wanted = {"seed": 0}
    save_classifier(tmp_path / "c.safetensors", classifier, accuracy, wanted)
    assert load_classifier(tmp_path / "c.safetensors", {"seed": 1}) is None
    loaded, saved_accuracy = load_classifier(tmp_path / "c.safetensors", wanted)
    assert saved_accuracy == accuracy
    with torch.inference_mode():
        assert torch.equal(loaded.features(pixels[:9]), classifier.features(pixels[:9]))
