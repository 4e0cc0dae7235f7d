"""Damages data sets in every way it knows and watches how they are read.

    python tests/fuzz.py --cases 20000          about a minute a thousand
    python tests/fuzz.py --seed 1234 --cases 1  one case again, with its traceback

A case is a small dataset (a key of LAYOUTS) with one to three of its files damaged. It has to be read, every box finite
and inside its image and every image of its size, or refused in one line that names the file; within 5 seconds and 1 GB.
What changes nothing (line ends, byte order marks, wrong extensions) has to be read as it was.
"""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import datasets
from errors import UserError
from layouts import load_splits

LAYOUTS = ("coco", "voc", "yolo", "coco alone", "coco masks", "voc folders", "yolo folder", "yolo lists")
SECONDS, BYTES = 5, 2**30
NUMBERS = [0, -1, 1, 1e308, -1e308, float("nan"), float("inf"), 10**400, 2**63, 0.5, 1e-320, -0.0]
WORDS = [
    "",
    "x",
    "..",
    "../../../etc/passwd",
    "/etc/passwd",
    "a\nb.png",
    "\0",
    "😀" * 50,
    "a" * 100_000,
    "NaN",
    "1e999",
    "0x10",
    "-",
    "null",
    "%s%n",
    "CON",
]
OTHERS = [None, True, [], {}, [[]], {"id": 1}, [1, 2], [None] * 4]


def picture_bytes(rng, form="PNG", size=(24, 20), mode="RGB"):
    pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def make(layout, rng):
    """-> {relative path: bytes} of a sound data set with two classes, 3 + 2 pictures.

    The layouts of two words are without splits, or have their files and names otherwise, see `moved`.
    """
    if " " in layout:
        return moved(make(layout.split()[0], rng), layout)
    files, boxes = {}, [(2, 3, 11, 13), (12, 5, 22, 19)]
    pictures = {"train": ["a", "b", "c"], "val": ["d", "e"]}
    if layout == "coco":
        for part, names in pictures.items():
            images = [{"id": i + 1, "file_name": f"{n}.png", "width": 24, "height": 20} for i, n in enumerate(names)]
            rows = [
                {
                    "id": 2 * i + k + 1,
                    "image_id": i + 1,
                    "category_id": 5 + k,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
                for i in range(len(names))
                for k, (x1, y1, x2, y2) in enumerate(boxes)
            ]
            content = {
                "images": images,
                "annotations": rows,
                "categories": [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}],
            }
            files[f"annotations/instances_{part}.json"] = json.dumps(content).encode()
            files |= {f"{part}/{n}.png": picture_bytes(rng) for n in names}
    elif layout == "voc":
        for part, names in pictures.items():
            files[f"ImageSets/Main/{part}.txt"] = "".join(f"{n}\n" for n in names).encode()
            for n in names:
                objects = "".join(
                    f"<object><name>{kind}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin>"
                    f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                    for kind, (x1, y1, x2, y2) in zip(("cat", "dog"), boxes)
                )
                files[f"Annotations/{n}.xml"] = (
                    f"<annotation><filename>{n}.jpg</filename><size><width>24</width><height>20</height>"
                    f"<depth>3</depth></size>{objects}</annotation>".encode()
                )
                files[f"JPEGImages/{n}.jpg"] = picture_bytes(rng, "JPEG")
    else:
        files["data.yaml"] = b"path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"
        for part, names in pictures.items():
            for n in names:
                files[f"images/{part}/{n}.png"] = picture_bytes(rng)
                rows = [
                    f"{k} {(x1 + x2) / 48} {(y1 + y2) / 40} {(x2 - x1) / 24} {(y2 - y1) / 20}"
                    for k, (x1, y1, x2, y2) in enumerate(boxes)
                ]
                files[f"labels/{part}/{n}.txt"] = "\n".join(rows).encode()
    return files


def moved(files, layout):
    """The files of a sound data set as tools and hands leave them."""
    if layout.startswith("coco"):
        parts = {part: json.loads(files.pop(f"annotations/instances_{part}.json")) for part in ("train", "val")}
        for part, data in parts.items():
            for image in data["images"]:
                image["file_name"] = rf"C:\\data\\{part}\\" + image["file_name"]
            for row in data["annotations"] if layout == "coco masks" else ():
                x, y, w, h = row.pop("bbox")
                polygon = {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
                run = {"size": [20, 24], "counts": [x * 20 + y, *[h, 20 - h] * (w - 1), h]}
                code = {"size": [20, 24], "counts": mask.frPyObjects(run, 20, 24)["counts"].decode()}
                row |= (polygon, {"segmentation": run}, {"segmentation": code})[row["id"] % 3]
        if layout == "coco alone":
            del parts["val"]
        files |= {f"{part}.json": json.dumps(data).encode() for part, data in parts.items()}
        return {f"images/{path}" if path.endswith(".png") else path: data for path, data in files.items()}
    if layout == "voc folders":
        names = {"JPEGImages": "images", "Annotations": "annotations"}
        files = {path: data for path, data in files.items() if not path.startswith("ImageSets")}
        return {f"{names[path.split('/')[0]]}/{path.split('/')[1]}": data for path, data in files.items()}
    del files["data.yaml"]
    files = {path.rsplit("/", 1)[1]: data for path, data in files.items()} | {"classes.txt": b"cat\ndog\n"}
    if layout == "yolo lists":
        files["obj.names"] = files.pop("classes.txt")
        files["train.txt"] = b"/home/me/a.png\n/home/me/b.png\nc.png\n"
        files["val.txt"] = b"data/d.png\ndata/e.png\n"
        files["obj.data"] = b"classes = 2\ntrain = data/train.txt\nvalid = data/val.txt\nnames = data/obj.names\n"
    return files


# Damage to any file: (files, its path, its bytes, generator) -> bytes


def cut(data, rng):
    return data[: rng.integers(0, len(data) + 1)]


def flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        if data:
            data[rng.integers(len(data))] = rng.integers(256)
    return bytes(data)


def remove(data, rng):
    start = rng.integers(0, len(data) + 1)
    return data[:start] + data[start + rng.integers(1, 40) :]


def repeat(data, rng):
    start = rng.integers(0, len(data) + 1)
    piece = data[start : start + rng.integers(1, 200)]
    return data[:start] + piece * int(rng.integers(2, 20)) + data[start:]


def strew(data, rng):
    start = rng.integers(0, len(data) + 1)
    return data[:start] + rng.bytes(rng.integers(1, 60)) + data[start:]


def replaced(data, rng):
    return [b"", b"\0" * 100, b"null", b"[]", b"{}", b"0", b"<a/>", b"\xff\xfe", rng.bytes(300)][rng.integers(9)]


def utf16(data, rng):
    try:
        return data.decode().encode("utf-16")
    except UnicodeDecodeError:
        return data


ANY = [cut, flip, remove, repeat, strew, replaced]

# Damage that knows the form


def hostile(rng):
    kind = rng.integers(4)
    if kind == 3:
        depth = int(rng.choice([50, 3000, 100_000]))
        return "DEEP%d" % depth
    pool = (NUMBERS, WORDS, OTHERS)[kind]
    return pool[rng.integers(len(pool))]


def nodes(tree, path=()):
    yield path
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from nodes(value, (*path, key))


def change_json(data, rng):
    tree = json.loads(data)
    for _ in range(rng.integers(1, 4)):
        paths = [p for p in nodes(tree) if p]
        if not paths:
            break
        path = paths[rng.integers(len(paths))]
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        action = rng.integers(4)
        if action == 0:
            del parent[path[-1]]
        elif action == 1 and isinstance(parent, list):
            parent.append(parent[path[-1]])
        else:
            parent[path[-1]] = hostile(rng)
    text = json.dumps(tree)
    return re.sub(r'"DEEP(\d+)"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), text).encode()


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi"))
    + "]><annotation>&i;</annotation>"
)
OUTSIDE = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><size><width>&x;</width></size></annotation>'


def change_xml(data, rng):
    text, action = data.decode(), rng.integers(8)
    if action == 0:
        return [BOMB, OUTSIDE, "<a>" * 200_000, "<annotation>" + "<part>" * 5000 + "</part>" * 5000 + "</annotation>"][
            rng.integers(4)
        ].encode()
    tags = sorted(set(re.findall(r"<(\w+)>", text)))
    tag = tags[rng.integers(len(tags))]
    if action == 1:
        return re.sub(rf"<{tag}>.*?</{tag}>", "", text, count=int(rng.integers(1, 3)), flags=re.S).encode()
    if action == 2:
        return re.sub(rf"(<{tag}>.*?</{tag}>)", r"\1\1", text, count=1, flags=re.S).encode()
    value = str(hostile(rng)).replace("&", "&amp;").replace("<", "&lt;").replace("\0", "")
    return re.sub(
        rf"<{tag}>[^<]*</{tag}>", lambda _: f"<{tag}>{value}</{tag}>", text, count=int(rng.integers(1, 3))
    ).encode("utf-8", "replace")


YAMLS = [
    "names: &a [x, x, x, x, x, x, x, x, x]\n"
    "b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
    "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\n"
    "d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
    "e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d]\n"
    "f: &f [*e, *e, *e, *e, *e, *e, *e, *e, *e]\n"
    "g: &g [*f, *f, *f, *f, *f, *f, *f, *f, *f]\n"
    "h: &h [*g, *g, *g, *g, *g, *g, *g, *g, *g]\n"
    "names: [*h]\ntrain: images/train\nval: images/val\n",
    "names: !!python/object/apply:os.system ['touch /tmp/sprung']\ntrain: images/train\nval: images/val\n",
    "names: [cat, dog]\ntrain: /etc\nval: ../../..\n",
    "names: [cat, dog]\ntrain: [images/train, [images/val]]\nval: {a: 1}\n",
    "names: [cat]\ntrain: images/train\nval: images/val\n",
    "names: 3\ntrain: images/train\nval: images/val\n",
    "names: {a: cat, 1: dog}\ntrain: images/train\nval: images/val\n",
    "[" * 3000,
    "[" * 100_000,
    "a: b: c",
    "- x",
    "names: [cat, dog]\ntrain: data.yaml\nval: labels/val/d.txt\n",
    "names: &n [*n]\ntrain: images/train\nval: images/val\n",
    "path: /\nnames: [cat, dog]\ntrain: ''\nval: ''\n",
    "names: [cat, dog]\ntrain: 'images/train\0'\nval: images/val\n",
    "path: [1]\nnames: [cat, dog]\ntrain: images/train\nval: images/val\n",
]


def change_words(data, rng):
    words = re.split(r"(\s+)", data.decode())
    for _ in range(rng.integers(1, 4)):
        words[rng.integers(len(words))] = str(hostile(rng))
    return "".join(words).encode("utf-8", "replace")


def change_yaml(data, rng):
    return YAMLS[rng.integers(len(YAMLS))].encode() if rng.random() < 0.6 else change_words(data, rng)


def header_of(width, height, colour=2, bits=8):
    """A PNG that says it is so large."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 5000))
        + chunk(b"IEND", b"")
    )


def change_picture(data, rng):
    kind = rng.integers(14)
    if kind == 0:
        return header_of(
            *[(60000, 60000), (2**31 - 1, 2**31 - 1), (0, 5), (13000, 13000), (1, 60000), (70000, 1)][rng.integers(6)],
            colour=int(rng.choice([0, 2, 6])),
            bits=int(rng.choice([8, 16])),
        )
    if kind == 1:
        return [
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n(/etc/passwd) (r) file\n",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"%PDF-1.4",
            b"GIF89a\xff\xff\xff\xff\0\0\0",
            b"BM" + b"\xff" * 60,
            b"II*\0\x08\0\0\0\xff\xff",
            b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        ][rng.integers(7)]
    if kind == 2:
        mode = str(rng.choice(["1", "L", "P", "RGBA", "LA"]))
        return picture_bytes(rng, "PNG", mode=mode)
    if kind == 3:
        return picture_bytes(rng, "JPEG", mode=str(rng.choice(["L", "CMYK"])))
    if kind == 4:
        return picture_bytes(rng, str(rng.choice(["GIF", "BMP", "TIFF", "WEBP"])))
    if kind == 5:
        image = Image.open(io.BytesIO(picture_bytes(rng)))
        exif = image.getexif()
        exif[0x0112] = [1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 255][rng.integers(11)]
        buffer = io.BytesIO()
        image.save(buffer, "JPEG" if rng.random() < 0.5 else "PNG", exif=exif)
        return flip(buffer.getvalue(), rng) if rng.random() < 0.3 else buffer.getvalue()
    if kind == 6:
        return picture_bytes(rng, size=tuple(int(n) for n in rng.choice([1, 2, 7, 300, 4000], 2)))
    return [cut, cut, flip, flip, remove, replaced, strew][kind - 7](data, rng)


def change_place(root, path, rng):
    """What is no regular file, lies elsewhere, or isn't there."""
    target = root / path
    target.unlink()
    kind = rng.integers(6)
    if kind == 0:
        target.mkdir()
    elif kind == 1:
        os.mkfifo(target)
    elif kind == 2:
        target.symlink_to("/etc/passwd")
    elif kind == 3:
        target.symlink_to(target.name)
    elif kind == 4:
        target.symlink_to("/dev/zero")


def harmless(files, layout, rng):
    """Changes that have to change nothing, in place."""
    for path, data in list(files.items()):
        if path.endswith((".png", ".jpg")):
            if rng.random() < 0.3:
                image, buffer = Image.open(io.BytesIO(data)), io.BytesIO()
                image.save(buffer, "BMP" if rng.random() < 0.5 else "PNG")
                files[path] = buffer.getvalue()
        else:
            kind = rng.integers(5)
            if kind == 0:
                files[path] = b"\xef\xbb\xbf" + data
            elif kind == 1:
                files[path] = data.replace(b"\n", b"\r\n")
            elif kind == 2:
                files[path] = data + b"\n"
            elif kind == 3 and path.endswith(".xml"):
                files[path] = utf16(data, rng)


def damage(files, layout, rng):
    """-> paths, paths whose place is to be changed; files are damaged in place."""
    changed, displaced = [], []
    for _ in range(rng.integers(1, 4)):
        annotations = [p for p in files if not p.endswith((".png", ".jpg"))]
        pictures = [p for p in files if p.endswith((".png", ".jpg"))]
        path = str(rng.choice(annotations if rng.random() < 0.65 else pictures))
        data = files[path]
        if rng.random() < 0.08:
            displaced.append(path)
        elif path in pictures:
            files[path] = change_picture(data, rng)
        elif rng.random() < 0.35:
            files[path] = ANY[rng.integers(len(ANY))](data, rng)
        elif rng.random() < 0.08:
            files[path] = utf16(data, rng)
        elif path not in changed:
            form = {".json": change_json, ".xml": change_xml, ".yaml": change_yaml}.get(Path(path).suffix, change_words)
            files[path] = form(data, rng)
        changed.append(path)
    return changed, displaced


def write(root, files):
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def targets_of(splits):
    return [
        [(r.width, r.height, r.boxes.round(6).tolist(), r.labels.tolist()) for r in split.records] for split in splits
    ]


def read_whole(root, skip):
    """Reads a data set as train.py and datasets.py do -> its splits, every record checked."""
    with contextlib.redirect_stdout(io.StringIO()):
        splits = load_splits(root, skip_bad_images=skip)
        for split in splits:
            datasets.describe(split)
            loaded = datasets.DetectionDataset(split, None)
            for i, record in enumerate(split.records):
                image, target = loaded.load(i)
                assert image.shape == (3, record.height, record.width), (
                    f"{record.path}: {tuple(image.shape)} is not {record.height}x{record.width}"
                )
                boxes = record.boxes
                assert np.isfinite(boxes).all() and np.isfinite(record.areas).all() and (record.areas > 0).all()
                assert (
                    (boxes[:, 2:] > boxes[:, :2]).all()
                    and (boxes >= 0).all()
                    and (boxes <= [record.width, record.height] * 2).all()
                )
                assert len(boxes) == len(record.labels) == len(record.areas) == len(record.ignored)
                assert ((record.labels >= 0) & (record.labels < len(split.classes))).all() and all(
                    isinstance(name, str) for name in split.classes
                )
                assert str(root) in str(record.path.resolve()), f"{record.path} is outside"
        datasets.find_problems(*splits)
    return splits


class Hang(BaseException):
    pass


def case(seed, root):
    """-> "read", "refused" or "read as it was"; anything else raises."""
    rng = np.random.default_rng(seed)
    layout = LAYOUTS[rng.integers(len(LAYOUTS))]
    files = make(layout, rng)
    if rng.random() < 0.1:
        write(root, files)
        before = targets_of(read_whole(root, False))
        shutil.rmtree(root)
        harmless(files, layout, rng)
        write(root, files)
        assert targets_of(read_whole(root, False)) == before, "a harmless change changed the targets"
        return "read as it was"
    _, displaced = damage(files, layout, rng)
    write(root, files)
    for path in set(displaced):
        change_place(root, path, rng)
    try:
        read_whole(root, bool(rng.random() < 0.5))
        return "read"
    except UserError as error:
        assert str(root) in str(error), f"names no file: {error}"
        assert len(str(error)) < 8000, f"{len(str(error))} characters"
        return "refused"


def alarm(*_):
    raise Hang(f"over {SECONDS} seconds")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first case; the next have the next")
    arguments = parser.parse_args()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES + 2**28,) * 2)  # a quarter more: threads' stacks
    signal.signal(signal.SIGALRM, alarm)
    outcomes, failures = Counter(), []
    base = Path(tempfile.mkdtemp())
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        root = base / str(seed)
        signal.alarm(SECONDS)
        try:
            outcomes[case(seed, root)] += 1
        except (Exception, Hang) as error:
            outcomes["failed"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            failures.append(
                f"seed {seed}: {type(error).__name__}: {str(error)[:200]} "
                f"({Path(where.filename).name}, line {where.lineno})"
            )
            if arguments.cases == 1:
                traceback.print_exc()
        finally:
            signal.alarm(0)
            shutil.rmtree(root, ignore_errors=True)
    shutil.rmtree(base, ignore_errors=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(", ".join(f"{count} {what}" for what, count in outcomes.most_common()) + f"; peak memory {peak:.2f} GiB")
    for line in failures[:40]:
        print(line)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
