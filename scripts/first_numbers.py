"""Two numbers that scripts/cifar10_first.sh needs from the logs of pretraining.

python scripts/first_numbers.py steps RUN SECONDS    # how many steps fit into so many seconds at RUN's speed
python scripts/first_numbers.py converged RUN        # the held-out loss at each quarter of RUN's training
"""

import json
import sys
from pathlib import Path

MARGIN = 0.9  # of the time: the start of a script, and held-out losses, take their part


def log(run: str) -> list[dict]:
    """The lines of a run's only log of pretraining."""
    [file] = Path(run).glob("pretraining/log.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def steps_that_fit(run: str, seconds: float) -> int:
    """At the speed of the last line, which has warmed up."""
    import yaml

    settings = yaml.safe_load(Path(run, "pretraining", "config.yaml").read_text(encoding="utf-8"))
    batch_size = settings["config"]["pretrain"]["batch_size"]
    return max(2, int(MARGIN * seconds * log(run)[-1]["images_per_second"] / batch_size))


def convergence(run: str) -> str:
    """One line; whether more training would still help, the table's control says."""
    measured = [line for line in log(run) if "held_out_loss" in line]
    quarters = [measured[(len(measured) - 1) * k // 4] for k in range(1, 5)] if measured else []
    losses = ", ".join(f"{line['held_out_loss']:.5f} at step {line['step']:,}" for line in quarters)
    return (
        f"Held-out loss of the base: {losses or 'not measured'}. Plain training from there on is the row `continued`."
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case "steps", run, seconds:
            print(steps_that_fit(run, float(seconds)))
        case "converged", run:
            print(convergence(run))
        case _:
            sys.exit(__doc__)
