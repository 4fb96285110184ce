"""Write random directions as long as the experts' task vectors, which a search is to be compared with.

    python scripts/random_directions.py
    python search.py "merge.experts=[random]" search.output=runs/digits/search-random

Writes runs/<name>/finetuned/random-0000-0250/unet/ and so on: pretrained + r ‖τ‖ / ‖r‖ in each tensor, where τ is the
task vector of the range's expert and r is drawn from a normal distribution by `seed`. Trains nothing; takes seconds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

from deme.config.experiment import Config
from deme.config.networks import RANDOM, of_word
from deme.job.command import run_script
from deme.job.files import atomic_folder, locked, make_folder, read_json
from deme.models.trained import check_trained
from deme.models.variants import find_pretrained, write_denoiser

STREAM = 7  # of the draws, apart from those of trainings


def plan(config: Config) -> str:
    """What this command would do."""
    return "\n".join(["write random directions to", *(f"  {network.folder}" for network in of_word(config, RANDOM))])


def main(config: Config) -> None:
    """Write a network for each expert."""
    from deme.method.task_vectors import check_compatible, check_finite, random_directions
    from deme.models.merging import load_merged

    pretrained = find_pretrained(config.paths)
    architecture, base, experts = load_merged(pretrained, check_trained(pretrained, config.experts))
    settings = read_json(architecture / "config.json")
    for number, (network, (source, expert)) in enumerate(zip(of_word(config, RANDOM), experts.items(), strict=True)):
        output = network.folder.parent
        check_compatible(base, expert, source)
        for key, tensor in expert.items():
            check_finite(source, key, tensor)
        tensors = dict(random_directions(base, expert, (config.seed, STREAM, number)))
        make_folder(output.parent, "output_dir")
        with locked(output, "output_dir"), atomic_folder(output) as temporary:
            write_denoiser(temporary, tensors, settings)
        print(f"wrote {network.folder}")


if __name__ == "__main__":
    run_script(__doc__, plan, main)
