"""A user's mistake ends a script in one line on stderr and exit status 2, without a traceback."""

import argparse
import os
import sys
from contextlib import contextmanager

MAX_LENGTH = 3000  # of a message: it may quote anything


class UserError(Exception):
    """The message says what is wrong, where, and what to do."""

    def __init__(self, message):
        if len(message) > MAX_LENGTH:
            message = f"{message[: MAX_LENGTH // 2]} ... {message[-MAX_LENGTH // 3 :]}"
        super().__init__(message)


@contextmanager
def writing(path, hint="", also=()):
    """Around whatever writes to path: an OSError, or one of `also`, becomes a UserError with the hint at its end.

    PIL raises ValueError for endings that it does not know.
    """
    try:
        yield
    except (OSError, *also) as error:
        cause = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: can't be written ({cause}){hint}") from None


LESS_MEMORY = "a smaller --image-size takes less; in training also a smaller --device-batch or --checkpoint-activations"


def run_script(main, less_memory=LESS_MEMORY):
    """Calls a script's main; UserErrors and a full GPU end it in one line and status 2."""
    for stream in (sys.stdout, sys.stderr):  # file names may hold any bytes, consoles have any encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # as in `python datasets.py DIR | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("stopped: the output was closed", file=sys.stderr)
        sys.exit(141)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing torch would slow every error down
            raise
        print(f"error: the GPU's memory is full; {less_memory}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class Offline(argparse.Action):
    """A script's --offline: nothing is downloaded from then on; what is in the caches still opens."""

    def __init__(self, **options):
        help = "download nothing: use only local files and the caches"
        super().__init__(**options | dict(nargs=0, default=argparse.SUPPRESS, help=help))

    def __call__(self, *_):
        from huggingface_hub import constants

        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
