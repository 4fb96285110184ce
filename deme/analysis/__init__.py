"""The analyses of analyze.py, one module each.

Each module has the same three functions:

    measure(material) -> arrays by name, kept in the analysis folder
    plot(found, material) -> figures by name, drawn from these arrays
    table(found, material) -> the same in numbers, as Markdown

To add an analysis, write such a module and give it a line in `unet_passes`.
"""

from deme.config.experiment import Config
from deme.config.sections import GRADIENT_PASSES


def unet_passes(config: Config, networks: int) -> dict[str, int]:
    """The chosen analyses and their cost in images through the UNet.

    Args:
        networks: how many are analysed: the pretrained one, the experts and others.
    """
    settings = config.analyze
    ranges = len(config.timesteps.ranges)
    passes = {
        "gradient_conflict": GRADIENT_PASSES * settings.timesteps * settings.images,
        "loss_by_timestep": networks * settings.timesteps * settings.images,
        "task_vectors": 0,
        "landscape": (settings.landscape_points**2 + 3) * settings.landscape_images,
        "activation_change": 2 * ranges * settings.images,
    }
    return {name: passes[name] for name in settings.chosen}
