"""Every path of a run, derived from the configuration.

python finetune.py --path merged        # prints one, for shell scripts
"""

import re
from pathlib import Path
from typing import Any

from deme.config.trainings import CONTINUED, DISTILLED

UNET, TRANSFORMER = SUBFOLDERS = ("unet", "transformer")  # of the network, as diffusers' pipelines call it
SECOND = "transformer_2"  # the sub-folder of a second denoiser of a Wan pipeline, for low timesteps
# a LoRA's file, as load_lora_weights of diffusers looks for it, and the same of PEFT
LORA, PEFT_LORA = LORAS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
STEM = "diffusion_pytorch_model"  # the files of a network's weights begin with it
SNAPSHOTS = "snapshots"  # the sub-folder of a training that holds its EMA weights of earlier steps


class Paths:
    """The paths of a Config; `--path` takes their `names`."""

    def __init__(self, config: Any):
        self._config = config
        outputs, run = Path(config.output_dir), Path(config.output_dir) / config.name

        def output(given: str | None, name: str) -> Path:
            return run / name if given is None else Path(given)

        self.run_folder = run  # everything that belongs to this experiment alone
        self.image_cache = outputs / "image-cache"  # decoded images that do not fit into memory, for all runs
        self.latent_cache = outputs / "latent-cache"  # encoded images and captions, for all runs
        self.control_features = outputs / "control-features"  # of the images that searches compare with, for all runs
        self.single_files = outputs / "single-files"  # folders of pipelines that were given as one file, for all runs
        self.pretraining = run / "pretraining"  # checkpoints, logs and previews of pretrain.py
        self.pretrained_here = run / "pretrained"  # the pipeline folder that pretrain.py makes
        # the pipeline that finetuning starts from: a folder or a Hub id
        self.pretrained = str(self.pretrained_here) if config.model.pretrained is None else config.model.pretrained
        self.continued = self.trained(CONTINUED)  # the control's network
        self.distilled = self.trained(DISTILLED)  # of the network that is distilled from the experts
        self.finetuned = [network.folder for network in config.merged_networks]  # the networks that are merged
        if config.merge.ema_width is not None:
            self.finetuned = self.averaged(config.merge.ema_width)
        self.searched = sum(map(self.averaged, config.search.ema_widths), self.finetuned)  # whose merge is searched
        self.own_samples = run / "own-samples"  # of the pretrained network, for self-training
        self.own_seconds = run / "own-samples-seconds.txt"  # which drawing them took: a line for each command
        self.search = output(config.search.output, "search")  # the output of search.py
        self.search_seconds = self.search / "seconds.txt"  # a line for each command
        self.best_coefficients = self.search / "best.yaml"  # the merging coefficients that search.py finds
        self.analysis = output(config.analyze.output, "analysis")  # the output of analyze.py
        self.plots = run / "plots"  # pictures
        self.report = run / "report.html"  # the page that report.py writes, beside the same as Markdown
        self.merged = output(config.merge.output, "merged")  # the pipeline folder that merge.py makes
        trainings = run / "finetuned" if config.merge.finetuned is None else Path(config.merge.finetuned)
        self.merge_statistics = trainings / "merge-statistics"  # of networks, for merge methods that need them
        self.merged_file = self.merged / f"{config.name}.safetensors"  # of merge.single_file
        self.two_experts = run / "two-experts"  # the pipeline folder of an ensemble that plain diffusers draws from
        self.neon = run / "neon"  # the pipeline folder of the model neon
        self.all_samples = run / "samples"  # the folder of the sample folders
        model = "-".join(part for part in Path(config.sample.model).parts if part not in ("/", ".", ".."))
        self.samples = output(config.sample.output, f"samples/{model}")  # the folder of sample.model's images
        self.grid = self.samples.with_name(f"grid-{self.samples.name}.png")  # the contact sheet of `samples`
        self.stats = run / "stats"  # reference statistics and the classifier
        self.classifier = self.stats / "classifier.safetensors"  # the feature network of the classifier FD
        self.results = output(config.evaluate.output, "results.json")  # the scores
        self.jobs = run / "jobs"  # logs and states of the jobs of all comparisons

    @property
    def experts(self) -> list[Path]:
        """The networks of the ranges."""
        return [network.folder for network in self._config.experts]

    def averaged(self, width: float) -> list[Path]:
        """The folders of the networks that are merged, at an EMA width."""
        return [denoiser_in(folder.parent / average_name(width), folder.name) for folder in self.finetuned]

    @property
    def pretrained_config(self) -> Path | None:
        """The folder that the settings of `pretrained` come from, if that is a single file."""
        return None if self._config.model.config is None else Path(self._config.model.config)

    @property
    def reference(self) -> Path:
        """What samples are compared with in the features of the first judge: statistics, or a folder of images."""
        return self.reference_in(self._config.evaluate.judges[0].name)

    def reference_in(self, space: str) -> Path:
        """The same in this feature space. Statistics in other features than the first judge's lie beside its own."""
        if self._config.evaluate.reference is None:
            return self.stats / f"{space}.npz"
        given = Path(self._config.evaluate.reference)
        is_own = given.is_dir() or space == self._config.evaluate.judges[0].name
        return given if is_own else given.with_name(f"{space}.npz")

    def finetuning(self, name: str) -> Path:
        """Checkpoints, logs, previews and final weights of a training of finetune.py."""
        return self.run_folder / "finetuned" / name

    def trained(self, name: str) -> Path:
        """The folder of the network that finetune.py writes under this name, or the file of the LoRA."""
        return product_of(self._config, self.finetuning(name))

    def search_picture(self, name: str) -> Path:
        """A picture of search.py, named after the search's folder."""
        return self.plots / f"{self.search.name}-{name}.png"

    def comparison(self, file: str | Path) -> Path:
        """The tables of a comparison, named after its file."""
        return self.run_folder / "comparison" / Path(file).stem

    @property
    def names(self) -> list[str]:
        """What `lines` takes."""
        return [*(name for name in vars(self) if name[0] != "_"), "experts", "reference"]

    def lines(self, name: str) -> str:
        """The path with this name; several are one a line."""
        paths = getattr(self, name)
        return "\n".join(map(for_shell, paths)) if isinstance(paths, list) else for_shell(paths)


def for_shell(path: str | Path) -> str:
    """A path that no command takes for an option."""
    return str(path) if re.match(r"[\w/.]", str(path)) else f"./{path}"


def denoiser_in(folder: Path, usual: str = UNET) -> Path:
    """The sub-folder of the network in a pipeline's folder or a training's: the one that is there, or the usual one."""
    return next((folder / name for name in SUBFOLDERS if (folder / name).is_dir()), folder / usual)


def lora_in(folder: Path) -> Path | None:
    """The file of a LoRA in a folder, unless that has the weights of a network."""
    found = (folder / name for name in LORAS if (folder / name).is_file())
    return None if any(folder.glob(f"{STEM}*")) else next(found, None)


def usual_denoiser(config: Any) -> str:
    """The name of that sub-folder in an experiment, as far as a configuration can tell; it does not ask the Hub."""
    if config.model.pretrained is None:
        own = Path(config.output_dir) / config.name / "pretrained"
        return denoiser_in(own, TRANSFORMER if config.pretrain.transformer else UNET).name
    trained = any(Path(config.output_dir, config.name, "finetuned").glob(f"*/{TRANSFORMER}"))
    return denoiser_in(Path(config.model.pretrained), TRANSFORMER if trained else UNET).name


def product_of(config: Any, training: Path) -> Path:
    """What a training writes into its folder: the folder of a network, or the file of a LoRA."""
    return denoiser_in(training, usual_denoiser(config)) if config.finetune.lora_rank is None else training / LORA


def places_of(output: Path) -> list[Path]:
    """Where an output may lie: a network in any of SUBFOLDERS, as the Hub alone may know which it will be."""
    return [output.with_name(name) for name in SUBFOLDERS] if output.name in SUBFOLDERS else [output]


def is_made(output: Path) -> bool:
    """True if it is there."""
    return any(place.exists() for place in places_of(output))


def average_name(width: float) -> str:
    """What files and folders of an average of the weights are called."""
    return f"ema-{width:.3f}"


def snapshot_path(training: Path, step: int) -> Path:
    """The snapshot of a step in a training's folder."""
    return training / SNAPSHOTS / f"{step:08d}"


def image_path(folder: Path, seed: int) -> Path:
    """The image of a seed in a folder of samples."""
    return folder / f"{seed:06d}.png"


def with_schedule(model: str, schedule: str) -> str:
    """The name of a folder of a model's images that one of several schedules draws, such as merged@ddim-20."""
    return f"{model}@{schedule}" if schedule else model


def without_schedule(folder: str) -> tuple[str, str]:
    """The model and the schedule in a sample folder's name; the latter is empty where it names none."""
    found = re.fullmatch("(.+)@([^@]+-[0-9]{1,9})", folder)
    return (found[1], found[2]) if found else (folder, "")


def sampler_and_steps(schedule: str) -> tuple[str, int]:
    """The two parts of a schedule's name; nothing and 0 of an empty one."""
    sampler, _, steps = schedule.rpartition("-")
    return sampler, int(steps or 0)
