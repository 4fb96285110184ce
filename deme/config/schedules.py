"""The schedules that a search is judged by, beside those that it draws candidates with."""

from deme.config.experiment import Config
from deme.config.sections import DDIM, Sample

MOST = 3  # by default


def other_schedules(config: Config) -> list[Sample]:
    """`sample` with each schedule that is not searched, but scored by the report of the search.

    With search.schedules these are by default half of the fewest steps, twice the most, and another kind of sampler.
    """
    items, searched = config.search.report_schedules, config.schedules_of(config.search)
    names = {one.schedule for one in searched}
    if items is not None or not config.search.schedules:
        others = [config.drawn_by(config.search, item) for item in items or []]
        return [one for one in others if one.schedule not in names]
    steps = [one.num_inference_steps for one in searched]
    twice = min(2 * max(steps), config.timesteps.num_train_timesteps)
    other = DDIM[0] if config.sample.scheduler not in DDIM else "dpmsolver++"
    items = [{"steps": max(1, min(steps) // 2)}, {"steps": twice}]
    items += [{"steps": count, "scheduler": other} for count in steps if config.sample.eta == 0]
    others = [config.drawn_by(config.search, item) for item in items]
    return [one for one in others if one.schedule not in names][:MOST]
