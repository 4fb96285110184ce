import pytest
import yaml

from deme.config.experiment import Config
from deme.config.networks import Merge
from deme.config.sections import Data, Model
from deme.errors import UserError
from deme.job.records import SAMPLES, Record
from deme.report.model_card import drawn_by, header


def test_the_metadata_name_what_the_hub_has():
    """License, base model and data set as the Hub reads them; a folder on somebody's disk is not among them."""
    config = Config(
        model=Model(pretrained="google/ddpm-cifar10-32", license="apache-2.0"), data=Data(name="uoft-cs/cifar10")
    )
    expected = {"license": "apache-2.0", "base_model": "google/ddpm-cifar10-32", "datasets": ["uoft-cs/cifar10"]}
    assert header(config).items() >= expected.items()
    revised = Config(model=Model(pretrained="google/ddpm-cifar10-32@v1.0"))
    assert header(revised)["base_model"] == "google/ddpm-cifar10-32"
    local = header(Config(model=Model(pretrained="assets/digits"), merge=Merge(push_to_hub="a/b")))
    assert local.keys() & expected.keys() == set()
    assert yaml.safe_load(yaml.safe_dump(header(config))) == header(config)


def test_the_scores_tell_how_their_images_were_drawn(tmp_path):
    """By the record of the images, or by the schedule in their folder's name."""
    assert drawn_by(tmp_path / "merged") == ""
    assert drawn_by(tmp_path / "merged@unipc-10") == " by unipc-10"
    drawn = {"sample.scheduler": "dpmsolver++", "num_inference_steps": 20}
    Record(SAMPLES, drawn, {"num_images": 4}).write(tmp_path)
    assert drawn_by(tmp_path) == " by dpmsolver++-20"
    scales = {"prediction_scale": [[0, 500, 1.01], [500, 1000, 1.0]]}
    Record(SAMPLES, drawn | scales, {"num_images": 4}).write(tmp_path)
    assert drawn_by(tmp_path) == " by dpmsolver++-20, the predicted noise divided by 1.01, 1"
    Record(SAMPLES, {"prediction_scale": "x"}, {"num_images": 4}).write(tmp_path)
    with pytest.raises(UserError, match=r"samples\.yaml: "):
        drawn_by(tmp_path)
