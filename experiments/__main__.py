"""`python -m experiments NAME [FOLDER]`: answers one question by an experiment.

topk       what top-K losses do to the gradient: tables and a plot, exactly
precision  what the precision of the logits does to the gradient: a table
filter     what gradient filtering drops and saves, on a model trained here (10 minutes)

The results are written to FOLDER, by default experiments/results.
"""

import argparse
import importlib
from pathlib import Path

# The module of each experiment; its `main` writes the results to a folder.
EXPERIMENTS = {
    "topk": "experiments.topk_bias",
    "precision": "experiments.precision",
    "filter": "experiments.filter",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=EXPERIMENTS)
    default = Path(__file__).parent / "results"
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="for the results")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    importlib.import_module(EXPERIMENTS[options.name]).main(options.folder)


if __name__ == "__main__":
    main()
