"""Where distances are taken: a feature network and the statistics of the data in its features."""

from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from deme.config.experiment import Config
from deme.errors import naming
from deme.job.files import make_folder
from deme.job.processes import locked_by_all
from deme.measure.classifier import trained_classifier
from deme.measure.features import load_inception
from deme.measure.reference import Reference, reference_statistics


@dataclass(frozen=True)
class FeatureSpace:
    """What images are compared in, and with."""

    name: str  # inception or classifier
    network: nn.Module  # as `extract` takes it, on the device
    reference: Reference
    accuracy: float | None  # of the classifier, on images that it was not trained on


def load_feature_space(config: Config, accelerator: Accelerator) -> FeatureSpace:
    """The configured feature space, made once and kept in stats/; where another job is making it, it is waited for."""
    name = config.evaluate.features
    made_by: dict[str, str] = {}
    accuracy = None
    with locked_by_all(accelerator, config.paths.stats, "output_dir", wait=True):
        make_folder(config.paths.stats, "output_dir")
        if name == "inception":
            with accelerator.main_process_first(), naming("evaluate.features", name):
                network = load_inception().to(accelerator.device)  # one process downloads the weights
        else:
            network, accuracy, made_by = trained_classifier(config, accelerator)
            accelerator.print(f"classifier: held-out accuracy {accuracy:.1%}")
        return FeatureSpace(name, network, reference_statistics(config, accelerator, network, made_by), accuracy)
