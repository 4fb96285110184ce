"""What is searched: the candidates of a run, and the objectives that tell them apart."""

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from deme.config.experiment import Config
from deme.config.schedules import other_schedules
from deme.config.sections import Sample
from deme.data.decoding import Source
from deme.data.examples import load_examples
from deme.data.samples import conditions_of
from deme.errors import RunError, UserError, naming
from deme.job.processes import Processes, in_main_process, kept, locked_by_all
from deme.job.records import digest_of
from deme.measure.noisy import Noiser, draw_probes
from deme.measure.reference import load_feature_space
from deme.method.process import process_of
from deme.method.sampling import NetworkAt, ensemble, scaled
from deme.method.task_vectors import Candidates, merge_method, pattern_of, patterns_of
from deme.models.adapters import load_denoisers
from deme.models.denoisers import freeze, load_denoiser, load_scheduler
from deme.models.drawing import Drawing, try_samplers
from deme.models.encoder_loading import load_encoder, try_out
from deme.models.merging import load_merged
from deme.models.pipelines import denoiser_folder
from deme.models.searched import prediction_scales
from deme.models.variants import UNCOMPARED, ModelFiles
from deme.models.weights import weights_hash
from deme.search.distance import FrechetDistance
from deme.search.least_squares import Squares

HELD_OUT_SHARE = 0.25  # of search.images: as many more, on which the gradient descent is measured
PROBES = 3  # what the stream is for, beside those of pretraining and finetuning


class Problem:
    """A run's candidates and objectives; what an objective needs is loaded when it is first asked for.

    `pretrained` is a pipeline's folder, `hashes` are those of data and encoders for the cache of latents.
    """

    def __init__(self, config: Config, processes: Processes, pretrained: Path, data: Source, hashes: dict[str, str]):
        self.config, self.settings, self.processes = config, config.search, processes
        self.pipeline, self.data, self.hashes = pretrained, data, hashes
        self.files = ModelFiles(pretrained, [denoiser_folder(pretrained)])
        self.watched = self.files.watched()
        # what all random draws follow from; another seed_offset is another search
        self.stream = (config.seed, PROBES, config.search.seed_offset)
        self.squares = cache(self._draw_squares)

        networks = [] if config.searches_scales else config.paths.searched
        self.architecture, base, finetuned = load_merged(pretrained, networks)
        with naming("search.groups", config.search.groups):
            self.patterns = patterns_of(config.search.groups, list(base))
        group_of = {name: self.patterns.index(pattern_of(name, self.patterns)) for name in base}
        self.method = None  # the sum
        if config.searches_method:
            self.method = merge_method(config.merge.method, config.merge.settings)
            self.method.check_inputs(map(weights_hash, networks), config.paths.merge_statistics)
        self.candidates = Candidates(base, finetuned, group_of, processes.device, self.method)
        self.names = merged = config.searched_names  # of the coefficients in row-major order
        self.shape = (len(self.patterns), len(merged))  # of the coefficients
        if len(self.patterns) > 1:
            self.names = [f"{pattern} {name}" for pattern in self.patterns for name in merged]
        self.bounds = config.intervals * len(self.patterns)  # of the coefficients

        self.process = process_of(load_scheduler(pretrained))
        network = load_denoiser(self.architecture)
        self.encoder = load_encoder(pretrained, network)
        try_out(network, self.process, self.encoder)
        self.shape_drawn = self.encoder.shape_of(config.data.resolution)
        self.encoder.prepare(processes.device, config.sample.mixed_precision)
        self.network = freeze(network, processes.device, "no", may_pack=False)

    def value(self, objective: str, coefficients: np.ndarray, images: int = 0) -> tuple[float, int]:
        """The value of a candidate, the lower the better, and its UNet passes; fd draws so many images."""
        if objective != "fd":
            squares = self.squares(objective)
            return squares.value(coefficients), squares.images
        if not np.any(coefficients):  # the control itself
            return self._mean([distance.of_control for distance in self.distances]), 0
        passes, network_at, seeds = images * self.passes, self.merged(coefficients), self.seeds(images)
        try:
            values = [distance.of_features(distance.features(network_at, seeds)) for distance in self.distances]
        except RunError:  # an image is not finite
            return math.inf, passes
        return self._mean(values), passes

    def by_width(self, coefficients: np.ndarray) -> tuple[np.ndarray, int]:
        """The coefficients of the networks, and the place of their EMA width in `search.ema_widths`, counted from 1.

        0 is the training's EMA. The last coordinate of a candidate is in [place, place + 1); those without it have 0.
        """
        coefficients, widths = np.asarray(coefficients), len(self.settings.ema_widths)
        if widths == 0 or coefficients.shape[-1] < self.shape[1]:
            return coefficients, 0
        return coefficients[..., :-1], min(int(coefficients.flat[-1]), widths)

    def at_width(self, coefficients: np.ndarray, place: int) -> np.ndarray:
        """The candidate that has these coefficients of the networks at an EMA width; the inverse of `by_width`."""
        if not self.settings.ema_widths:
            return coefficients
        return np.append(coefficients, [[place % (1 + len(self.settings.ema_widths))]], axis=1)

    def network_of(self, coefficients: np.ndarray) -> np.ndarray:
        """The candidate as all others that are the same network have it: those of one EMA width."""
        return self.at_width(*self.by_width(coefficients))

    # --- match and loss

    @cached_property
    def _noiser(self) -> Noiser:
        config = self.config
        made_of = (self.data, self.encoder, self.hashes, self.processes)
        images = load_examples(config, config.finetune, *made_of).training
        self.encoder.prepare(self.processes.device, config.sample.mixed_precision)  # the cache is in finetune's
        return Noiser(images, self.encoder, self.process, self.processes)

    def _draw_squares(self, name: str, role: str = "fit") -> Squares:
        """Match or loss; the images of the roles fit, held-out and fresh differ if the data has enough."""
        timesteps, count = self.config.timesteps, self.settings.images
        held_out = max(len(timesteps.ranges), int(HELD_OUT_SHARE * count))
        start, size = {"fit": (0, count), "held-out": (count, held_out), "fresh": (count + held_out, count)}[role]
        places = range(start, start + size)
        setting = ("search.images", count) if name == "loss" else ("search.objective", name)
        with naming(*setting):
            probes = draw_probes(self._noiser, timesteps.ranges, self.stream, places, self.settings.batch_size)
            number = timesteps.num_train_timesteps
            return Squares(name, probes, self.candidates, self.network, number, self.processes)

    # --- fd

    def seeds(self, count: int) -> range:
        """The first of those that candidates are drawn from."""
        return range(self.settings.seed_offset, self.settings.seed_offset + count)

    def _mean(self, values: list[float]) -> float:
        """Of the distance with each schedule: the one, or with search.schedules those relative to the control's."""
        if not self.settings.schedules:
            return values[0]
        controls = [distance.of_control for distance in self.distances]
        return float(np.mean([value / of_control for value, of_control in zip(values, controls, strict=True)]))

    @property
    def passes(self) -> int:
        """UNet passes of an image with all schedules."""
        return sum(distance.drawing.passes for distance in self.distances)

    @cached_property
    def distances(self) -> list[FrechetDistance]:
        """The objective fd, with each of the candidates' schedules; a control is drawn once for all searches."""
        found, seeds, processes = [], self.seeds(self.settings.control_images), self.processes
        known = in_main_process(processes, self._pretrained_from)
        for sample in self.config.schedules_of(self.config.search):
            plain = self.plain_distance.by(sample)
            made_from = known | self._drawn_from(plain, seeds)
            file = self.config.paths.control_features / f"{digest_of(made_from)}.npz"
            with locked_by_all(processes, file, "output_dir", wait=True):
                make = partial(self._of_pretrained, plain, seeds)
                found.append(replace(plain, control=kept(processes, file, made_from, make)["features"]))
            if self.settings.schedules and not found[-1].of_control > 0:
                raise UserError(f"search.schedules: by {sample.schedule} the pretrained network's distance is 0")
        return found

    def _of_pretrained(self, plain: FrechetDistance, seeds: range) -> dict[str, np.ndarray]:
        return {"features": plain.features(self.merged(np.zeros(self.shape)), seeds)}

    def _pretrained_from(self) -> dict[str, Any]:
        """What determines the pretrained network, with the experts' projections if they have any, and its pipeline."""
        [network], settings = self.files.denoisers, sorted(self.network.config.items())
        unread = {*UNCOMPARED, "_use_default_values"}
        made_from = {
            "pretrained": weights_hash(network),
            "class": type(self.network).__name__,
            "architecture": {key: value for key, value in settings if key not in unread},
            **self.files.hashes(),
            **self.files.sampling(),
        }
        self.watched.check()  # what was hashed was read
        return made_from

    def _drawn_from(self, plain: FrechetDistance, seeds: range) -> dict[str, Any]:
        """What else determines the features of these seeds' images, bit for bit."""
        drawing, processes = plain.drawing, self.processes
        conditions = hashlib.sha256(json.dumps(plain.conditions).encode()).hexdigest()
        return {
            "seeds": [seeds.start, seeds.stop],
            "shape": list(drawing.shape),
            "sample": drawing.settings.tagged("samples") | {"prediction_scale": list(drawing.scales)},
            "prompts or labels (SHA-256)": conditions,
            "rounding": [drawing.settings.batch_size, processes.num_processes, processes.device.type],
            **plain.space.made_from,
        }

    @cached_property
    def reported(self) -> list[Sample]:
        """The schedules of the report beside that of sample: searched ones, and others; none unless either is set.

        Of the others by default, those count that the noise schedule allows; what is left out is told.
        """
        searched = [one for one in self.config.schedules_of(self.config.search) if self.config.search.by_images]
        others, key = other_schedules(self.config), "search.report_schedules"
        if self.settings.report_schedules is None:
            allowed = [one for one in others if self._allows(one)]
            if left_out := [one.schedule for one in others if one not in allowed]:
                self.processes.print(f"{key}=null: not {', '.join(left_out)}, which the noise schedule does not allow")
            others = allowed
        self._try(others, key)
        return [*searched, *others] if self.settings.schedules or others else []

    def _allows(self, sample: Sample) -> bool:
        with suppress(UserError):
            self._try([sample], "sample.scheduler")
            return True
        return False

    def _try(self, drawn: Sequence[Sample], key: str) -> None:
        try_samplers(drawn, self.process.scheduler, self.shape_drawn, key)

    @cached_property
    def plain_distance(self) -> FrechetDistance:
        """The distance without a control, with the first of the schedules; all are tried."""
        config, drawn = self.config, self.config.schedules_of(self.config.search)
        sample = drawn[0]
        self._try(drawn, "search.schedules" if self.settings.schedules else "sample.scheduler")
        space = load_feature_space(config, self.processes, config.evaluate.judges[0])
        conditions = conditions_of(sample, self.encoder.takes_text, self.encoder.classes)
        resolution = sample.size_on_disk or config.data.resolution
        with naming("evaluate.reference", config.evaluate.reference):
            space.reference.check_size(resolution, resolution)
        scales = [] if config.searches_scales else prediction_scales(config)
        drawing = Drawing(self.process.scheduler, self.encoder, sample, self.shape_drawn, self.processes.device, scales)
        return FrechetDistance(self.processes, drawing, space, conditions)

    @cached_property
    def sampled_network(self) -> nn.Module:
        """The network that images are drawn from, in sample.mixed_precision."""
        precision = self.config.sample.mixed_precision
        if precision == "no":
            return self.network
        return freeze(load_denoiser(self.architecture), self.processes.device, precision, may_pack=False)

    def merged(self, coefficients: np.ndarray) -> NetworkAt:
        """The candidate of these coefficients, which all groups may share, for drawing; until another one is formed.

        Or the pretrained network, its predictions divided by the scales 1 + coefficients.
        """
        if self.config.searches_scales:
            values = (1 + np.broadcast_to(coefficients, self.shape)[0]).tolist()
            pairs = zip(self.config.timesteps.ranges, values, strict=True)
            return scaled(lambda _: self.sampled_network, [(*edges, scale) for edges, scale in pairs])
        coefficients, width = self.by_width(coefficients)
        blocks = [coefficients * (place == width) for place in range(1 + len(self.settings.ema_widths))]
        self.candidates.form(self.sampled_network, np.concatenate(blocks, axis=-1))
        return lambda _: self.sampled_network

    def trained(self, path: Path) -> NetworkAt:
        """Another network that was trained, for drawing."""
        [network] = load_denoisers(self.pipeline, [path])
        network = freeze(network, self.processes.device, self.config.sample.mixed_precision)
        return lambda _: network

    def experts(self) -> NetworkAt:
        """The ensemble before merging: at each timestep the expert of its range, formed when it comes to it."""
        network = self.sampled_network  # made here: sampling would make it of inference tensors
        ranges = self.config.timesteps.ranges
        number_at = ensemble(range(len(ranges)), ranges)

        @lru_cache(maxsize=1)
        def expert(number: int) -> nn.Module:
            self.candidates.form_expert(network, number)
            return network

        return lambda timestep: expert(number_at(timestep))
