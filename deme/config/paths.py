"""Every path of a run, derived from the configuration.

python finetune.py --path merged        # prints one, for shell scripts
"""

import re
from pathlib import Path
from typing import Any

from deme.config.sections import CONTINUED, DISTILLED, range_name

DENOISER = "unet"  # the sub-folder of the network, as diffusers' pipelines call it


class Paths:
    """The paths of a Config; `--path` takes the name of each property."""

    def __init__(self, config: Any):
        self._config = config

    def _output(self, given: str | None, name: str) -> Path:
        return Path(given) if given is not None else self.run_folder / name

    @property
    def run_folder(self) -> Path:
        """Everything that belongs to this experiment alone."""
        return Path(self._config.output_dir) / self._config.name

    @property
    def image_cache(self) -> Path:
        """Decoded images that do not fit into memory, shared by all runs of an output_dir."""
        return Path(self._config.output_dir) / "image-cache"

    @property
    def latent_cache(self) -> Path:
        """Encoded images and captions, shared by all runs of an output_dir."""
        return Path(self._config.output_dir) / "latent-cache"

    @property
    def pretraining(self) -> Path:
        """Checkpoints, logs and previews of pretrain.py."""
        return self.run_folder / "pretraining"

    @property
    def pretrained_here(self) -> Path:
        """The pipeline folder that pretrain.py makes."""
        return self.run_folder / "pretrained"

    @property
    def pretrained(self) -> str:
        """The pipeline that finetuning starts from: a folder or a Hub id."""
        given = self._config.model.pretrained
        return given if given is not None else str(self.pretrained_here)

    def finetuning(self, name: str) -> Path:
        """Checkpoints, logs, previews and final weights of a training of finetune.py."""
        return self.run_folder / "finetuned" / name

    def trained(self, name: str) -> Path:
        """The folder of the network that finetune.py writes under this name."""
        return self.finetuning(name) / DENOISER

    @property
    def continued(self) -> Path:
        """The control's UNet folder."""
        return self.trained(CONTINUED)

    @property
    def distilled(self) -> Path:
        """The UNet folder of the network that is distilled from the experts."""
        return self.trained(DISTILLED)

    @property
    def finetuned(self) -> list[Path]:
        """The UNet folders that are merged, lowest range first."""
        root = self._output(self._config.merge.finetuned, "finetuned")
        return [root / range_name(timestep_range) / DENOISER for timestep_range in self._config.timesteps.ranges]

    @property
    def search(self) -> Path:
        """The output of search.py."""
        return self._output(self._config.search.output, "search")

    @property
    def best_coefficients(self) -> Path:
        """The merging coefficients that search.py finds."""
        return self.search / "best.yaml"

    @property
    def analysis(self) -> Path:
        """The output of analyze.py."""
        return self._output(self._config.analyze.output, "analysis")

    @property
    def plots(self) -> Path:
        """Pictures."""
        return self.run_folder / "plots"

    @property
    def report(self) -> Path:
        """The page that report.py writes, beside the same as Markdown."""
        return self.run_folder / "report.html"

    def search_picture(self, name: str) -> Path:
        """A picture of search.py, named after the search's folder."""
        return self.plots / f"{self.search.name}-{name}.png"

    @property
    def merged(self) -> Path:
        """The pipeline folder that merge.py makes."""
        return self._output(self._config.merge.output, "merged")

    @property
    def all_samples(self) -> Path:
        """The folder of the sample folders."""
        return self.run_folder / "samples"

    @property
    def samples(self) -> Path:
        """The folder of sample.model's images."""
        settings = self._config.sample
        if settings.output is not None:
            return Path(settings.output)
        parts = [part for part in Path(settings.model).parts if part not in ("/", ".", "..")]
        return self.all_samples / "-".join(parts)

    @property
    def grid(self) -> Path:
        """The contact sheet of `samples`."""
        return self.samples.with_name(f"grid-{self.samples.name}.png")

    @property
    def stats(self) -> Path:
        """Reference statistics and the classifier."""
        return self.run_folder / "stats"

    @property
    def classifier(self) -> Path:
        """The feature network of the classifier FD."""
        return self.stats / "classifier.safetensors"

    @property
    def reference(self) -> Path:
        """The statistics that samples are compared with."""
        given = self._config.evaluate.reference
        return Path(given) if given is not None else self.stats / f"{self._config.evaluate.features}.npz"

    @property
    def results(self) -> Path:
        """The scores."""
        return self._output(self._config.evaluate.output, "results.json")

    def comparison(self, file: str | Path) -> Path:
        """The tables of a comparison, named after its file."""
        return self.run_folder / "comparison" / Path(file).stem

    @property
    def jobs(self) -> Path:
        """Logs and states of the jobs of all comparisons."""
        return self.run_folder / "jobs"

    @classmethod
    def names(cls) -> list[str]:
        """The names that `--path` takes."""
        return [name for name, member in vars(cls).items() if isinstance(member, property)]

    def lines(self, name: str) -> str:
        """The path with this name; several are one a line."""
        paths = getattr(self, name)
        return "\n".join(map(for_shell, paths)) if isinstance(paths, list) else for_shell(paths)


def for_shell(path: str | Path) -> str:
    """A path that no command takes for an option."""
    return str(path) if re.match(r"[\w/.]", str(path)) else f"./{path}"


def image_path(folder: Path, seed: int) -> Path:
    """The image of a seed in a folder of samples."""
    return folder / f"{seed:06d}.png"
