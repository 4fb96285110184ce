"""Write a run's two experts as one pipeline that plain diffusers draws from, in the form of Wan 2.2, without a merge.

    python scripts/two_experts.py --config configs/wan_lora.yaml

Writes runs/<name>/two-experts/: the expert of high timesteps is its `transformer`, that of low ones `transformer_2`,
and `boundary_ratio` says where one ends and the other begins. A LoRA is added to the pretrained network.
sample_ddp.py draws from the folder, too: sample.model=FOLDER.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import json

from deme.config.experiment import Config
from deme.config.networks import is_lora
from deme.errors import UserError
from deme.job.command import run_script
from deme.job.files import atomic_folder, locked, read_json
from deme.models.kinds import SECOND, WAN, denoiser_class, look_up
from deme.models.pipelines import INDEX, RATIO, denoiser_folder
from deme.models.trained import check_trained
from deme.models.variants import find_pretrained, write_denoiser, write_pipeline_files


def plan(config: Config) -> str:
    """What this command would do."""
    return "\n".join([f"write to {config.paths.two_experts}", *(f"  {folder}" for folder in config.paths.experts)])


def main(config: Config) -> None:
    """Write the pipeline."""
    from deme.models.merging import load_changed

    timesteps, output, pretrained = config.timesteps, config.paths.two_experts, find_pretrained(config.paths)
    timesteps.check("num_ranges", len(timesteps.ranges) == 2, "must be 2: one expert above a timestep, one below")
    low, high = check_trained(pretrained, config.experts)
    base = denoiser_folder(pretrained)
    look_up(f"{base}: the network", denoiser_class(read_json(base / "config.json")), (WAN,))
    if output.exists():
        raise UserError(f"{output}: exists; delete it first")
    with locked(output, "output_dir"), atomic_folder(output) as temporary:
        for path, subfolder in ((high, "transformer"), (low, SECOND)):
            settings = read_json((base if is_lora(path) else path) / "config.json")
            look_up(f"{path}: the network", settings.get("_class_name"), (WAN,))  # plain diffusers knows no projections
            write_denoiser(temporary, dict(load_changed(pretrained, path)), settings, subfolder)
        write_pipeline_files(temporary, pretrained)
        index = read_json(temporary / INDEX)
        index |= {SECOND: index["transformer"], RATIO: timesteps.ranges[1][0] / timesteps.num_train_timesteps}
        (temporary / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    print(f"wrote {output}")


if __name__ == "__main__":
    run_script(__doc__, plan, main)
