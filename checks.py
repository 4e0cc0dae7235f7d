"""Every image of a Split is decoded once, and every box repaired or left out, before anything is trained."""

import hashlib
import json
import math
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from tqdm import tqdm

from distributed import is_main_process
from errors import UserError
from transforms import FORMATS, LARGE_IMAGES, common_range, extremes, open_image, upright_size

LARGE_IMAGE = 2**24  # pixels; only one image of more is in memory at a time
LARGE_IMAGE_LOCK = threading.Lock()
MANY_IMAGES = 2000  # of as many or more, what was found is kept for the next start
CACHE_FORMAT = 1  # of Probe; another one is not read


def check(split, skip_bad_images=False):
    """Decodes every image and repairs every box of a Split, in place; counts what was found in `split.remarks`.

    Raises UserError if images can't be read, unless skip_bad_images leaves them out.
    """
    probes = leave_out_unreadable(split, skip_bad_images)
    split.value_range = common_range([probe.extremes for probe in probes])
    counts = Counter()
    for record, probe in zip(split.records, probes):
        set_size(record, probe.stored, probe.upright, counts)
        counts["images have colours of 16 bits, of which the upper 8 count"] += probe.has_deep_colours
    clean_boxes(split.records, counts)
    repeats = Counter(record.image_id for record in split.records)
    for record in split.records:
        if repeats[record.image_id] > 1:  # the same name in several folders
            record.image_id = str(record.path)
    empty = sum(not len(r.boxes) for r in split.records)
    if empty:
        counts["images have no box (kept as background)"] = empty
    split.repairs = {what: count for what, count in counts.items() if count}
    split.remarks += [f"{count} {what}" for what, count in split.repairs.items()]


def leave_out_unreadable(split, skip_bad_images):
    """Decodes every image -> the Probes of those that can be read; the others leave the Split."""
    is_large = len(split.records) >= MANY_IMAGES
    known = KnownImages(split.records) if is_large else None
    probes = [known and known.get(record) for record in split.records]
    unknown = [i for i, probe in enumerate(probes) if probe is None]
    with ThreadPoolExecutor() as pool:
        found = pool.map(probe_image, [split.records[i] for i in unknown])
        hidden = None if len(unknown) >= MANY_IMAGES else True
        for i, probe in zip(unknown, tqdm(found, f"checking {split.name}", len(unknown), leave=False, disable=hidden)):
            probes[i] = probe
    if len(unknown) < len(probes):
        count = len(probes) - len(unknown)
        split.remarks.append(f"{count:,} images have not changed since they were checked ({known.file})")
    if is_large and is_main_process():
        known.keep(split.records, probes)
    bad = [p for p in probes if isinstance(p, str)]
    if bad:
        listed = "; ".join(bad[:10]) + (f"; and {len(bad) - 10} more" if len(bad) > 10 else "")
        if not skip_bad_images or len(bad) == len(probes):
            raise UserError(
                f"{split.name}: {len(bad)} of {len(probes)} images can't be read ({listed}). "
                "Repair them, or leave them out with --skip-bad-images"
            )
        split.remarks.append(f"{len(bad)} images left out: {listed}")
    split.records = [r for r, p in zip(split.records, probes) if not isinstance(p, str)]
    return [p for p in probes if not isinstance(p, str)]


class Probe(NamedTuple):
    """What decoding an image has shown."""

    stored: tuple  # (width, height)
    upright: tuple  # the same once it is rotated as its EXIF says
    extremes: tuple | None  # see transforms.extremes
    has_deep_colours: bool  # of 16 bits


class KnownImages:
    """The Probes of an earlier start, in a file of the user's cache, of images that have not changed since."""

    def __init__(self, records):
        paths = [os.path.abspath(record.path) for record in records]
        parts = [paths[i : i + 1000] for i in range(0, len(paths), 1000)]
        with ThreadPoolExecutor() as pool:  # a stamp takes a while on a network's disk; before the images are opened
            stamps = pool.map(lambda part: [stamp(path) for path in part], parts)
            self.stamps = dict(zip(paths, chain.from_iterable(stamps)))
        home = os.path.commonpath(paths) if len({os.path.splitdrive(path)[0] for path in paths}) == 1 else ""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "detr"
        self.file = cache / f"images-{hashlib.sha256(os.fsencode(home)).hexdigest()[:16]}.json"
        # What decides, beside the file, whether an image can be opened and what is seen in it
        self.reader = [CACHE_FORMAT, PIL.__version__, FORMATS, bool(os.environ.get(LARGE_IMAGES))]
        self.entries, self.probes = {}, {}
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, or a damaged one
            content = json.loads(self.file.read_text(encoding="utf-8"))
            if content["reader"] == self.reader:
                self.probes = {path: restored(*content["images"].get(path, (None, None))) for path in paths}
                self.entries = content["images"]

    def get(self, record):
        """-> the Probe of an image that has not changed, else None."""
        path = os.path.abspath(record.path)
        then, probe = self.probes.get(path, (None, None))
        return probe if then is not None and then == self.stamps[path] else None

    def keep(self, records, probes):
        """Writes down the Probes for the next start; images that could not be read are opened again then."""
        paths = [os.path.abspath(record.path) for record in records]
        new = {p: (self.stamps[p], probe) for p, probe in zip(paths, probes) if isinstance(probe, Probe)}
        if all(self.probes.get(path) == entry for path, entry in new.items()):
            return
        unfinished = self.file.with_suffix(f".{os.getpid()}")  # other runs may write theirs
        with suppress(OSError):  # no room, or a home that can't be written to: the next start opens the images again
            self.file.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps({"reader": self.reader, "images": self.entries | new}), encoding="utf-8")
            os.replace(unfinished, self.file)


def restored(stamp, probe):
    """An entry of the cache's file -> stamp, Probe."""
    if probe is None:
        return None, None
    stored, upright, found, has_deep_colours = probe
    return stamp, Probe(tuple(stored), tuple(upright), found and tuple(found), has_deep_colours)


def stamp(path):
    """-> what changes whenever a file does, or None if it is not there."""
    with suppress(OSError):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def probe_image(record):
    """Decodes an image -> Probe, or a str that says why it can't be read."""
    try:
        with open_image(record.path) as image:
            has_deep_colours = ";16" in str(image.tile) and not image.mode.startswith("I")  # before it is loaded
            stored, upright = image.size, upright_size(image)
            is_large = stored[0] * stored[1] > LARGE_IMAGE
            with LARGE_IMAGE_LOCK if is_large else nullcontext():
                image.draft("RGB", (max(1, stored[0] // 8), max(1, stored[1] // 8)))  # JPEGs: at an eighth of the size
                image.load()
                return Probe(stored, upright, extremes(image), has_deep_colours)
    except Exception as error:  # PIL raises many kinds on broken files; each is the file's fault
        return f"{record.path}: {error}"


def set_size(record, stored, upright, counts):
    """Gives a Record the size of its file, and boxes in pixels where they were fractions."""
    declared = (record.width, record.height)
    if declared == stored != upright:  # annotated on the stored pixels: the image is not rotated
        record.upright, upright = False, stored
    elif declared not in (upright, (0, 0)):
        counts["images differ in size from their annotations (the file's size is used)"] += 1
    record.width, record.height = upright
    if record.relative:
        record.boxes = record.boxes * (upright * 2)
        record.areas = record.areas * math.prod(upright)
        record.relative = False


def clean_boxes(records, counts):
    """Clips the boxes of Records to their images and drops the empty ones, all at once as there may be millions."""
    lengths = [len(record.boxes) for record in records]
    if not sum(lengths):
        return
    keys = "boxes", "labels", "areas", "ignored"
    boxes, labels, areas, ignored = (np.concatenate([getattr(record, key) for record in records]) for key in keys)
    limit = np.repeat([(record.width, record.height) * 2 for record in records], lengths, axis=0)
    finite = np.isfinite(boxes).all(1)
    boxes = np.where(finite[:, None], boxes, 0)
    clipped = boxes.clip(0, limit)
    sides = clipped[:, 2:] - clipped[:, :2]
    keep = finite & (sides > 0).all(1)
    outside = keep & (np.abs(clipped - boxes).max(1) > 1)  # less is rounding
    counts["boxes clipped to their image"] += int(outside.sum())
    counts["empty, inverted, outside or non-finite boxes dropped"] += int((~keep).sum())
    areas = np.where(np.isfinite(areas) & (areas > 0), areas, sides.prod(1))
    ends = np.searchsorted(np.repeat(np.arange(len(records)), lengths)[keep], np.arange(1, len(records)))
    parts = [np.split(values[keep], ends) for values in (clipped, labels, areas, ignored)]
    for record, *values in zip(records, *parts):
        record.boxes, record.labels, record.areas, record.ignored = values
