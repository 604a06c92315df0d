"""`python -m train --config FILE key=value ...`"""

import argparse
import faulthandler
import io
import sys
from dataclasses import fields

from train.config import NonFiniteError, TrainConfig, UserError, load_config, printable


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        the exit status: 2 for a user's error, 1 for a failed run, 130 after Ctrl-C, 143 after
        SIGTERM.
    """
    names = ", ".join(spec.name for spec in fields(TrainConfig))
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Trains a student on its own responses, with a teacher and rewards.",
        epilog=f"options (described in train/config.py): {names}",
    )
    parser.add_argument("--config", help="a YAML file of options")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options, after the file's"
    )
    parsed = parser.parse_args(arguments)
    try:
        config = load_config(parsed.config, parsed.overrides)
        # Imported late, so that a wrong option is reported before seconds of imports.
        from train.loop import train
        from train.stop import StoppedError
    except UserError as error:
        return _failed(error, 2)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    try:
        train(config)
    except UserError as error:
        return _failed(error, 2)
    except NonFiniteError as error:
        return _failed(error, 1)
    except StoppedError as error:
        return _failed(error, error.status)
    except KeyboardInterrupt as error:
        return _failed(error, 130)
    return 0


def _failed(error: object, status: int) -> int:
    print(f"error: {printable(str(error))}", file=sys.stderr)
    return status


if __name__ == "__main__":
    faulthandler.enable()  # a reward that crashes the process is then named
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # for terminals that can't show every character
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
