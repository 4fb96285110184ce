"""The analyses of analyze.py, one module each.

Each module has the same two functions:

    measure(material) -> arrays by name, kept in the analysis folder
    report(arrays, material) -> tables as Markdown, and figures by name

To add an analysis, write such a module, name it in ANALYSES of deme/config/section.py and give it a line below.
"""

from deme.config.sections import GRADIENT_PASSES

UNET_PASSES = {  # analysis → images through the UNet, given the settings and the numbers of ranges and networks
    "gradient_conflict": lambda settings, ranges, networks: GRADIENT_PASSES * settings.timesteps * settings.images,
    "loss_by_timestep": lambda settings, ranges, networks: networks * settings.timesteps * settings.images,
    "task_vectors": lambda settings, ranges, networks: 0,
    "landscape": lambda settings, ranges, networks: (settings.landscape_points**2 + 3) * settings.landscape_images,
    "activation_change": lambda settings, ranges, networks: 2 * ranges * settings.images,
}
