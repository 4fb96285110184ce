"""Which of a job's processes this is, before accelerate is imported, and what one of them says for all."""

import os
from functools import cache


def is_main_process() -> bool:
    """Whether this process speaks for its job: the only one, or the first that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


@cache
def say_once(line: str) -> None:
    """Print a line once, in one of the processes that a launcher started."""
    if is_main_process():
        print(line)
