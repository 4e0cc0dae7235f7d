"""Opening text files without trust: a broken or hostile one costs a message, and nothing else."""

import contextlib
import gc
import os

from errors import UserError

# What parsing raises where the content has an unexpected form
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def read_bytes(path):
    """The content of a regular file; pipes and devices could block for ever. Raises UserError."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None


def read_text(path):
    """A text file in UTF-8, or in UTF-16 with its byte order mark -> str, lines ended by \\n. Raises UserError."""
    content = read_bytes(path)
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save it in that encoding") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path):
    """The lines of a text file that are not blank, stripped. Raises UserError."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def require_inside(home, paths):
    """Raises UserError if a path, links followed, lies outside of the folder home; with home None all may."""
    if home is None:
        return
    home = os.path.realpath(home)
    real_parents = {}  # each folder is resolved once, as a large dataset has many files in few folders
    for path in paths:
        try:
            if path.parent not in real_parents:
                real_parents[path.parent] = os.path.realpath(path.parent)
            if path.name == ".." or path.is_symlink():
                real = os.path.realpath(path)
            else:
                real = os.path.join(real_parents[path.parent], path.name)
            is_outside = os.path.commonpath([home, real]) != home
        except (OSError, ValueError) as error:
            raise UserError(f"{home}: {str(path)[:200]!r} is not a valid path ({error})") from None
        if is_outside:
            raise UserError(
                f"{path}: lies outside of {home}, in {os.path.dirname(real)}; if that is intended, add --allow-outside"
            )


def require_string(value):
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is not a string")
    return value


@contextlib.contextmanager
def garbage_collection_paused():
    """Searching millions of new objects for garbage takes a seventh to a quarter of the time, and there is none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
