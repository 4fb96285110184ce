"""Where everything of a run lies: every path follows from the configuration here, and nowhere else.

python finetune.py --path merged        # prints one, for shell scripts
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from deme.config.sections import CONTINUED, DISTILLED, range_name

if TYPE_CHECKING:
    from deme.config.experiment import Config

DENOISER = "unet"  # the sub-folder of the network, as diffusers' pipelines call it


class Paths:
    """The paths of one experiment; each public property has a name that `--path` takes."""

    def __init__(self, config: "Config"):
        self._config = config

    @property
    def run(self) -> Path:
        """The folder of everything that belongs to this experiment alone."""
        return Path(self._config.output_dir) / self._config.name

    @property
    def image_cache(self) -> Path:
        """Decoded images that don't fit into memory, shared by all runs of an output_dir."""
        return Path(self._config.output_dir) / "image-cache"

    @property
    def latent_cache(self) -> Path:
        """Encoded images and captions, shared by all runs of an output_dir."""
        return Path(self._config.output_dir) / "latent-cache"

    @property
    def pretraining(self) -> Path:
        """Checkpoints, logs and previews of pretrain.py."""
        return self.run / "pretraining"

    @property
    def pretrained_here(self) -> Path:
        """The pipeline folder that pretrain.py makes."""
        return self.run / "pretrained"

    @property
    def pretrained(self) -> str:
        """The pipeline that finetuning starts from: a folder or a Hub id."""
        given = self._config.model.pretrained
        return given if given is not None else str(self.pretrained_here)

    def finetuning(self, name: str) -> Path:
        """Checkpoints, logs, previews and unet/ of what finetune.py trains under this name: a range's, or another."""
        return self.run / "finetuned" / name

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
        given = self._config.merge.finetuned
        root = Path(given) if given is not None else self.run / "finetuned"
        return [root / range_name(timestep_range) / DENOISER for timestep_range in self._config.timesteps.ranges]

    @property
    def search(self) -> Path:
        """What search.py makes."""
        given = self._config.search.output
        return Path(given) if given is not None else self.run / "search"

    @property
    def best_coefficients(self) -> Path:
        """The merging coefficients that it finds."""
        return self.search / "best.yaml"

    @property
    def searched(self) -> list[Path]:
        """The same where merge.coefficients asks for them; none where it does not."""
        return [self.best_coefficients] if self._config.merge.coefficients == "search" else []

    @property
    def analysis(self) -> Path:
        """What analyze.py measures."""
        given = self._config.analyze.output
        return Path(given) if given is not None else self.run / "analysis"

    @property
    def plots(self) -> Path:
        """Pictures of it."""
        return self.run / "plots"

    @property
    def report(self) -> Path:
        """The page that report.py makes; the same as Markdown lies beside it."""
        return self.run / "report.html"

    def search_picture(self, name: str) -> Path:
        """One of search.py's, called as its folder, so that those of several searches stand side by side."""
        return self.plots / f"{self.search.name}-{name}.png"

    @property
    def merged(self) -> Path:
        """The pipeline folder that merge.py makes."""
        given = self._config.merge.output
        return Path(given) if given is not None else self.run / "merged"

    @property
    def all_samples(self) -> Path:
        """The folder of the sample folders."""
        return self.run / "samples"

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
        """The contact sheet beside them."""
        return self.samples.with_name(f"grid-{self.samples.name}.png")

    @property
    def stats(self) -> Path:
        """What evaluation makes once: reference statistics and the classifier."""
        return self.run / "stats"

    @property
    def classifier(self) -> Path:
        """The feature network of the classifier FD."""
        return self.stats / "classifier.safetensors"

    @property
    def reference(self) -> Path:
        """The data's statistics in the features that are configured."""
        given = self._config.evaluate.reference
        return Path(given) if given is not None else self.stats / f"{self._config.evaluate.features}.npz"

    @property
    def results(self) -> Path:
        """The scores."""
        given = self._config.evaluate.output
        return Path(given) if given is not None else self.run / "results.json"

    def comparison(self, file: str | Path) -> Path:
        """The tables of compare.py, of a comparison's file."""
        return self.run / "comparison" / Path(file).stem

    @property
    def jobs(self) -> Path:
        """Of all its comparisons, and on all machines: logs, and which jobs have been done."""
        return self.run / "jobs"

    @classmethod
    def names(cls) -> list[str]:
        """What `--path` takes."""
        return [name for name, member in vars(cls).items() if isinstance(member, property)]

    def lines(self, name: str) -> str:
        """The path of this name; several, one a line."""
        found = getattr(self, name)
        return "\n".join(map(for_shell, found)) if isinstance(found, list) else for_shell(found)


def for_shell(path: str | Path) -> str:
    """A path that no command takes for an option, or for anything else but a path."""
    return str(path) if re.match(r"[\w/.]", str(path)) else f"./{path}"


def image_path(folder: Path, seed: int) -> Path:
    """Where the image of a seed lies in a folder of samples."""
    return folder / f"{seed:06d}.png"
