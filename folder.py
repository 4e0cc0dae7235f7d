"""All files of a dataset's folder, listed once, and found by the end of the paths that annotations give.

Names tell the split that a file belongs to, see PART. Links that lead out of the folder are not followed.
"""

import os
import re
import unicodedata
from collections import defaultdict
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from errors import UserError
from files import read_bytes, require_inside
from transforms import IMAGE_SUFFIXES

MOST_FILES = 2_000_000
MOST_LOOKED_INTO = 64  # files, to detect a layout
CROWDED = 64  # files of one name: to compare all of them for each annotation would take hours
# In the name of a split's folder or file: train2017, valid, my_test; but not in trains, values, latest
PART = re.compile(r"(?<![a-z])(train|val|test)(?:ing|id|idation|set|data|images)?(?![a-z])")
BOTH = re.compile(r"(?<![a-z])train[_-]?val(?![a-z])")
# The last folder of images that are annotations themselves, such as annotations/trimaps
ANNOTATIONS = re.compile(r"^(annotations?|labels?|xmls?|masks?|gt|ground.?truth|panoptic|semantic|instances?|depth)$")
MASKS = re.compile(rf"trimap|mask|segm|{ANNOTATIONS.pattern}")
by_path = attrgetter("folders", "file")


def parts_of(names):
    """The kinds of split that the names of some folders or files tell: train, val, test; trainval is both."""
    kinds = []
    for name in map(str.lower, names):
        match = PART.search(name)
        kinds += ["train", "val"] if BOTH.search(name) else [match[1]] if match else []
    return kinds


class Place(NamedTuple):
    """A file or a folder of a dataset."""

    folders: tuple  # from the dataset's folder on
    stem: str  # of a folder: its name with a slash behind
    suffix: str  # in lower case
    file: str  # the path


class Folder:
    """All files below a dataset's folder, listed once. Raises UserError where there are too many.

    Hidden files, such as macOS leaves next to others, are passed over. home: the folder that files have to lie in, or
    None; links to folders are followed only within it.
    """

    def __init__(self, root, home):
        self.root, self.home = root, home
        self.by_stem = defaultdict(list)  # {stem: [Place]}
        self.by_end = defaultdict(list)  # {(last folder, stem) or (folders but the last, "beside", stem): [Place]}
        self.files = set()
        self.image_folders, self.with_images = set(), {}  # {kinds of split: see has_part}
        self.moved = {}  # {file: path in an annotation} of those that lie elsewhere
        self.strayed = set()  # files in a folder of another kind of split than they are for
        self.closed = []  # folders that are not looked into
        top = os.path.realpath(root)
        pending, links, seen, count = [((), str(root))], [], set(), 0
        while pending or links:  # links last: of two ways to a folder, the plain one counts
            folders, path = (pending or links).pop()
            real = os.path.realpath(path)
            if real in seen:
                continue
            if home is not None and real != top and not real.startswith(top.rstrip(os.sep) + os.sep):
                self.closed.append(path)
                continue
            seen.add(real)
            if folders:
                self.by_stem[folders[-1] + "/"].append(Place(folders[:-1], folders[-1] + "/", "", path))
            for entry in self.entries(path):
                count += 1
                if count > MOST_FILES:
                    raise UserError(f"{root}: more than {MOST_FILES:,} files; --data takes the folder of one dataset")
                if entry.is_dir():
                    (links if entry.is_symlink() else pending).append(((*folders, normal(entry.name)), entry.path))
                elif entry.is_file():
                    *more, name = normal(entry.name).split("\\")  # as an archive from Windows is unpacked elsewhere
                    stem, suffix = os.path.splitext(name)
                    place = Place((*folders, *more), stem, suffix.lower(), entry.path)
                    self.by_stem[stem].append(place)
                    self.files.add(place.file)
                    self.by_end[place.folders[-1:], stem].append(place)
                    self.by_end[place.folders[:-1], "beside", stem].append(place)
                    if place.suffix in IMAGE_SUFFIXES:
                        self.image_folders.add(place.folders)

    def entries(self, path):
        """The entries of a folder in the order of their names, without hidden ones, macOS's archives, broken links."""
        try:
            with os.scandir(path) as entries:
                entries = [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]
        except OSError:
            self.closed.append(path)
            return []
        return sorted((e for e in entries if not e.is_symlink() or os.path.exists(e.path)), key=attrgetter("name"))

    def places(self, suffixes):
        """The files with one of some suffixes, in the order of their paths."""
        return sorted((p for places in self.by_stem.values() for p in places if p.suffix in suffixes), key=by_path)

    def images(self, stem):
        """The images of a name, whatever their suffix."""
        return self.named(normal(stem), IMAGE_SUFFIXES)

    def named(self, stem, suffixes, folders=(), near=()):
        """The Places of a name with one of some suffixes.

        Of very many, those in a folder that is called like the last of `folders`, or else those next to the folder
        `near`, if there are any.
        """
        every = self.by_stem.get(stem, ())
        keys = ((tuple(folders)[-1:], stem), (tuple(near)[:-1], "beside", stem)) if len(every) > CROWDED else ()
        for places in (*(self.by_end.get(key, ()) for key in keys), every):
            found = [place for place in places if place.suffix in suffixes]
            if found:
                return found
        return []

    def own(self, path):
        """A path -> the same below the dataset's folder as it was given, if it lies in it: one image has one path."""
        if str(path).startswith(str(self.root) + os.sep):
            return path
        for real in (os.path.abspath, os.path.realpath):
            top, full = real(self.root).rstrip(os.sep) + os.sep, real(path)
            if full.startswith(top):
                return self.root / full[len(top) :]
        return path

    def find(self, text, **where):
        """The file or folder/ that a path in an annotation means -> Path, or None if there is none. Raises UserError.

        The path may be another machine's or URL-encoded, with slashes or backslashes: its end decides, see `nearest`.
        """
        best = None
        for spelled in dict.fromkeys((normal(text), normal(unquote(text)))):
            *folders, name = [name for name in re.split(r"[/\\]+", spelled) if name not in ("", ".")] or [""]
            stem, suffix = (name + "/", "") if spelled.endswith("/") else os.path.splitext(name)
            places = self.named(stem, {suffix.lower()}, folders, where.get("near", ()))
            place = self.nearest(places, folders, text, **where)
            if place and place.folders[len(place.folders) - len(folders) :] == tuple(folders):
                return Path(place.file)
            best = best or place
        if best is None or folders and folders[-1] not in best.folders and self.by_stem.get(folders[-1] + "/"):
            return None  # the folder that it names is there, and the file is not in it
        other = self.moved.setdefault(best.file, text)
        if other != text:
            raise UserError(
                f"{self.root}: {other[:200]!r} and {text[:200]!r} would both be {best.file}; images seem to be missing"
            )
        return Path(best.file)

    def nearest(self, places, folders, text, near=(), parts=(), split=None):
        """The Place among some of one name that fits best, or None. Raises UserError if two fit equally well.

        It is no mask; then it shares most folders at its end with `folders`; then it lies in the folder of its split,
        by its name `split` or its kind, one of `parts`; then nearest to the folders `near`; then in images/. What lies
        in a folder of another kind of split fits only if `folders` names that, or no image lies in one of its own kind.
        """
        ranks, near, strayed = [], tuple(near), set()
        has_own = self.has_part(parts) or any(place.stem.endswith("/") for place in places)
        are_alike = len({place.suffix for place in places}) < 2
        homes = [tuple(folders), ("images", *folders), (*near, *folders), (*near, "images", *folders)]
        for place in places:
            shared = len(os.path.commonprefix([place.folders[::-1], tuple(folders)[::-1]]))
            others = {*parts_of(place.folders[: len(place.folders) - shared])} if parts else ()
            is_own = 2 if split in place.folders else len(others & {*parts}) if others else 0
            if others and not is_own:
                if has_own:
                    continue
                strayed.add(place.file)
            is_beside = place.folders == near and not ANNOTATIONS.search(own_name(near))
            is_meant = is_beside or are_alike and (shared or place.folders == near)
            is_photo = bool(is_meant) or not in_masks(place)
            near_by = len(os.path.commonprefix([place.folders, near]))
            plain = homes.index(place.folders) if place.folders in homes else -1
            in_images = place.folders[-1:] in (("images",), ("JPEGImages",))
            ranks.append(((is_photo, shared, is_own, near_by, plain, in_images), place))
        ranks.sort(key=itemgetter(0), reverse=True)
        if len(ranks) > 1 and ranks[0][0] == ranks[1][0]:
            raise UserError(
                f"{self.root}: {str(text)[:200]!r} could be {ranks[0][1].file} or {ranks[1][1].file}; "
                "leave one of them, or name its folder in the annotations"
            )
        if ranks and ranks[0][1].file in strayed:
            self.strayed.add(ranks[0][1].file)
        return ranks[0][1] if ranks else None

    def has_part(self, parts):
        """Whether images lie in a folder of one of some kinds of split."""
        key = tuple(parts)
        if key not in self.with_images:
            self.with_images[key] = any({*parts} & {*parts_of(folders)} for folders in self.image_folders)
        return self.with_images[key]

    def locate(self, text, folders, **where):
        """The file that a path in an annotation means -> Path: in one of `folders`, or else where `find` finds it.

        A path that leads out of the dataset counts only if nothing in it fits. What does not exist keeps its name.
        """
        plain = os.path.join(folders[0], text)
        if plain in self.files:  # nearly always
            return Path(plain)
        exists = next((folder / text for folder in folders if os.path.exists(folder / text)), None)
        top = os.path.abspath(self.home or os.sep).rstrip(os.sep) + os.sep
        is_plain = exists is not None and (exists == folders[0] / text or ".." in text)
        if is_plain and os.path.abspath(exists).startswith(top):
            return Path(os.path.normpath(self.own(exists)))
        return self.find(text, **where) or exists or folders[0] / text.lstrip(os.sep)

    def match(self, suffix):
        """Annotation files, one for an image -> {image Place: annotation Place}, [annotation file without an image].

        An annotation's image is the nearest one of its name; where others lie beside their images, only one beside it.
        Raises UserError if an image has two.
        """
        pairs = []
        for place in self.places({suffix}):
            where = {"near": place.folders, "parts": parts_of(place.folders)}
            images = self.named(place.stem, IMAGE_SUFFIXES, place.folders, place.folders)
            pairs.append((place, self.nearest(images, place.folders, place.file, **where)))
        pairs.sort(key=lambda pair: bool(pair[1]) and disagree(*pair))  # those of another split come last
        beside = {place.folders for place, image in pairs if image and image.folders == place.folders}
        matched, unmatched = {}, []
        for place, image in pairs:
            if image is None or place.folders in beside and image.folders != place.folders:
                unmatched.append(place.file)
            elif image in matched and disagree(place, image):
                unmatched.append(place.file)
            elif image in matched:
                raise UserError(f"{image.file}: {matched[image].file} and {place.file} are both for it; remove one")
            else:
                matched[image] = place
        return matched, unmatched

    def mentions(self, place, words):
        """Whether a file holds all of some words, bytes; false if it can't be read."""
        try:
            require_inside(self.home, [Path(place.file)])
            content = read_bytes(Path(place.file))
        except UserError:
            return False
        return all(word in content for word in words)


def disagree(one, other):
    """Whether two Places lie in folders of different kinds of split."""
    kinds, others = ({*parts_of(place.folders)} for place in (one, other))
    return bool(kinds and others and not kinds & others)


def in_masks(place):
    """Whether an image lies in a folder of masks: the last one whose name tells no split."""
    return is_of_masks(own_name(place.folders))


def own_name(folders):
    """The last of some folders' names that tells no split, in lower case."""
    return next((name.lower() for name in reversed(folders) if not parts_of([name])), "")


def is_of_masks(name):
    """Whether the name of a folder says that its images are masks."""
    return bool(MASKS.search(name.lower()))


def normal(name):
    """A name with its letters composed: macOS writes some as two characters, annotations seldom do."""
    return unicodedata.normalize("NFC", name)


def depth(place):
    return len(place.folders)


def count_paths(paths, text):
    """A line that counts some paths, if there are any -> [line]."""
    paths = list(paths)
    return [f"{len(paths)} {text}: {first_paths(paths)}"] if paths else []


def first_paths(paths):
    """The first three of some paths, for messages."""
    paths = list(paths)
    return ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")


def listing(folder):
    """The first names in a folder, for messages."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more or "nothing"
