"""Turn published DeMe weights into a diffusers pipeline folder, without running code from the file.

    python scripts/import_published.py --weights FILE --pretrained FOLDER --output FOLDER

FILE is the released merged network (a pickled module) or the state dict of a finetuned one (`adapter_list.*`), FOLDER
the pretrained pipeline that they belong to. The output is used as sample.model=FOLDER; the folders of finetuned
networks can be merged when they are called merge.finetuned/0000-0250 and so on.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deme.config.paths import UNET
from deme.errors import UserError, naming
from deme.job.command import ended_in_one_line
from deme.job.files import atomic_folder, make_folder, read_json
from deme.models.kinds import PROJECTED
from deme.models.pipelines import denoiser_folder, find_pipeline
from deme.models.variants import write_denoiser, write_pipeline_files


def main(weights: Path, pretrained: str, output: Path) -> None:
    """Read the published file, and write a pipeline folder."""
    from deme.method.projection import PROJECTION_SUFFIX
    from deme.models.denoisers import load_denoiser
    from scripts.published import read_published, rename_projections

    # --- tensors and architecture
    with naming("--pretrained", pretrained):
        pipeline = find_pipeline(pretrained)
        settings = read_json(denoiser_folder(pipeline) / "config.json")
    blocks = [settings.get(key) for key in ("down_block_types", "up_block_types")]
    if not all(isinstance(types, list) for types in blocks):
        raise UserError(f"--pretrained={pretrained}: its config.json names no down_block_types or up_block_types")
    tensors = read_published(weights)
    with naming("--weights", weights):
        tensors = rename_projections(tensors, *map(len, blocks))
    if any(name.endswith(PROJECTION_SUFFIX) for name in tensors):
        settings["_class_name"] = f"{PROJECTED}UNet2DModel"

    # --- the pipeline folder; diffusers maps the old names and checks that nothing is missing
    if output.exists():
        raise UserError(f"--output={output}: exists already")
    make_folder(output.parent, "--output")
    with atomic_folder(output) as temporary:
        folder = temporary / "published"
        write_denoiser(folder, {name: tensor.float().contiguous() for name, tensor in tensors.items()}, settings)
        try:
            unet = load_denoiser(folder / UNET)
        except UserError as error:
            raise UserError(f"--weights={weights}: {str(error).replace(str(temporary), '')}") from None
        shutil.rmtree(folder)
        unet.save_pretrained(temporary / UNET)
        write_pipeline_files(temporary, pipeline)
    print(f"wrote {output}: {unet.num_parameters():,} parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, type=Path, metavar="FILE", help="the published file")
    parser.add_argument("--pretrained", required=True, metavar="FOLDER", help="its pretrained pipeline, or a Hub id")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="the pipeline folder to write")
    arguments = parser.parse_args()
    with ended_in_one_line(parser.prog):
        main(arguments.weights, arguments.pretrained, arguments.output)
