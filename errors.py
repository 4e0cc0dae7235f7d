"""Mistakes that a user can mend: one line on stderr and exit status 2 instead of a traceback."""

import sys


LONGEST = 3000  # characters of a message: what it quotes may be anything


class UserError(Exception):
    """The message says what is wrong, where, and what to do."""

    def __init__(self, message):
        super().__init__(message if len(message) <= LONGEST else f"{message[: LONGEST // 2]} ... {message[-LONGEST // 3 :]}")


def run(main):
    """Calls a script's main; a UserError ends it in one line and status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; this file does without torch
            raise
        print("error: the GPU's memory is full; a smaller --image-size takes less, in training a smaller --device-batch or --checkpoint-activations, too", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
