"""Files that strangers wrote, opened so that a broken or hostile one costs a line and nothing else."""

import os
import warnings

from PIL import Image

from errors import UserError

# By content, whatever the ending; PIL knows many more, some of which run other programs.
Image.init()
FORMATS = [form for form in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP") if form in Image.OPEN]
BOMB = 2**25, 200  # pixels, and pixels for each byte of the file, above which a picture is not believed
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at twice as many pixels PIL refuses


def read_text(path):
    """A text file in UTF-8, or in UTF-16 with its byte order mark -> str, lines ended by \\n. Raises UserError."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no regular file")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save it in that encoding") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def open_image(path):
    """-> PIL image, its pixels not yet decoded. Raises what PIL raises, and OSError."""
    if not os.path.exists(path):
        raise FileNotFoundError("missing")
    if not os.path.isfile(path):
        raise OSError("is no regular file")
    image = Image.open(path, formats=FORMATS)
    pixels, size = image.width * image.height, os.path.getsize(path)
    if pixels > BOMB[0] and pixels > BOMB[1] * size:
        image.close()
        raise OSError(f"{pixels:,} pixels in {size:,} bytes: a decompression bomb")
    return image


def require_inside(home, paths):
    """Raises UserError where one of paths, links followed, does not lie in the folder home; home None: they may lie anywhere."""
    if home is None:
        return
    home, folders = os.path.realpath(home), {}
    for path in paths:
        try:
            if path.parent not in folders:
                folders[path.parent] = os.path.realpath(path.parent)
            real = os.path.realpath(path) if path.name == ".." or path.is_symlink() else os.path.join(folders[path.parent], path.name)
            outside = os.path.commonpath([home, real]) != home
        except (OSError, ValueError) as error:
            raise UserError(f"{home}: no file can be called {str(path)[:200]!r} ({error})") from None
        if outside:
            raise UserError(f"{path}: lies outside of {home}, in {os.path.dirname(real)}; if that is meant, add --allow-outside")
