"""Which of a job's processes this is, before accelerate is imported."""

import os


def is_main_process() -> bool:
    """Whether this process speaks for its job: the only one, or the first that a launcher started."""
    return os.environ.get("RANK", "0") == "0"
