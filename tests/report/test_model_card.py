from dataclasses import replace

import yaml

from deme.config.experiment import Config
from deme.config.networks import Merge
from deme.config.sections import Data, Model
from deme.measure.scores import Score
from deme.report.model_card import header, score_line


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


def test_a_line_of_scores_tells_how_the_images_were_drawn():
    """As they were when they were scored; of earlier versions' results the folder's name may tell."""
    row = Score("merged", None, 4, 1.5, [1.5], 1.5, None, drawn_by="ddim-20")
    assert score_line("classifier", row) == "4 images by ddim-20: classifier FD 1.5000"
    assert score_line("classifier", replace(row, drawn_by=None)) == "4 images: classifier FD 1.5000"
    older = replace(row, drawn_by=None, samples="merged@unipc-10")
    assert score_line("classifier", older) == "4 images by unipc-10: classifier FD 1.5000"
