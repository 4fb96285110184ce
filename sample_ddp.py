"""Draw images over all processes: exactly sample.num_images PNGs, each named by its seed.

    accelerate launch sample_ddp.py                              # from the merged model
    accelerate launch sample_ddp.py sample.model=pretrained      # or continued, ensemble, distilled, neon, or a folder
    accelerate launch sample_ddp.py sample.scheduler=ddim sample.num_inference_steps=50
    accelerate launch sample_ddp.py "sample.schedules=[{steps: 10}, {steps: 50, scheduler: ddim}]"
    accelerate launch sample_ddp.py --config configs/stable_diffusion_v1_4.yaml "sample.prompts=[a cat, a dog]" \
        sample.num_images=2

Writes runs/<name>/samples/<model>/000000.png … and the contact sheet samples/grid-<model>.png; with sample.schedules a
folder for each, <model>@<scheduler>-<steps>. An image depends on its seed alone, not on the batch or the number of
processes. A second run writes only what is missing; a folder that
another model or other settings filled is refused unless sample.overwrite=true. Of sample.blocks=8 parts of the seeds,
jobs with sample.block=0 … 7 draw one each into the same folder, at the same time; the last one counts them all.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

from itertools import product

from deme.config.experiment import Config
from deme.data.samples import conditions_of, in_turn
from deme.errors import naming
from deme.job.command import run_script
from deme.job.files import check_apart
from deme.models.pipelines import labels_of, takes_text
from deme.models.trained import check_timesteps
from deme.models.variants import find_model


def plan(config: Config) -> str:
    """What this command would do."""
    from deme.data.samples import count_samples

    lines = []
    for output, seeds in product((one.paths.samples for one in config.drawn), config.sample.chosen_blocks):
        count = count_samples(output, seeds)
        state = "complete" if count == len(seeds) else f"{count} of {len(seeds)} images"
        lines.append(f"draw seeds {seeds[0]} ... {seeds[-1]} from {config.sample.model} -> {output}: {state}")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Draw the images that are missing: image i from seed i and, where the model takes text, prompt i."""
    settings = config.sample
    with naming("sample.model", settings.model):
        model = find_model(settings.model, config.paths)
        if settings.model == "ensemble":
            check_timesteps(config.experts)
    for one in config.drawn:
        check_apart("sample.output", one.paths.samples, model.denoisers)
    watched = model.watched()
    model.check_fits(config)
    conditions = conditions_of(settings, takes_text(model.pipeline), labels_of(model.pipeline))
    texts = in_turn(conditions, settings.seeds)

    # --- torch is imported after what can be answered without it
    from deme.data.drawing import draw_samples
    from deme.job.processes import make_accelerator

    accelerator = make_accelerator(settings.mixed_precision, "sample.mixed_precision")
    draw_samples(config, model, watched, texts, accelerator)


if __name__ == "__main__":
    run_script(__doc__, plan, main)
