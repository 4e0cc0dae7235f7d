"""Detects objects in images and videos with a checkpoint of train.py, or with a released ECDet.

    python infer.py image.jpg                            with the newest run in runs/
    python infer.py image.jpg --checkpoint ecdet_s.pth   COCO's 80 classes
    python infer.py folder/ 'more/*.png' --checkpoint runs/mine/best.pth --threshold 0.3
    python infer.py clip.mp4                             frame by frame; a number is a camera, Ctrl-C ends it
    python infer.py large.jpg --tile 640                 in overlapping tiles of 640 pixels
    python infer.py folder/ --labels yolo --least-sure 9 a dataset to correct by hand; what to label next

Writes the images and videos with their boxes, and detections.json in COCO's results format, into --out; sound is left
out. No input is ever overwritten, and a file that can't be read costs no other: the exit status is then 2. Ctrl-C keeps
what is done (status 130).
"""

import argparse
import glob
import json
import os
import signal
import time
from collections import Counter
from contextlib import closing, nullcontext
from functools import partial
from itertools import chain, count
from operator import itemgetter
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPUs can't do yet then runs on the CPU
from PIL import Image

from detector import load
from devices import PRECISIONS, ahead
from errors import Offline, UserError, run_script, writing
from labels import DatasetWriter
from layouts import LAYOUTS
from mistakes import doubt
from plots import draw_boxes
from transforms import IMAGE_SUFFIXES, LARGE_IMAGES, allow_large_images, read_image
from video import STOPPED, VIDEO_SUFFIXES, detect_in_video, is_camera, is_video, require_av

IMAGES_ON_GPU = 8  # that share a batch


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="images, videos, folders or patterns; a number is a camera"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="of a run, a released ECDet or an exported file: a file, a folder, or a repository of the Hugging Face "
        "hub such as Intellindust/ECDet_S (default: the newest runs/*/best.pth)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="lowest score that is shown (default: that with the best F1 in validation, or 0.4)",
    )
    parser.add_argument(
        "--image-size", type=int, metavar="S", help="shortest side, or both (default: that of the training)"
    )
    parser.add_argument(
        "--tile",
        type=int,
        nargs="?",
        const=0,
        metavar="S",
        help="cut images larger than S pixels into overlapping tiles of S (default S: the image size)",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", *PRECISIONS],
        help="default: float32 on CPUs, bfloat16 or float16 on GPUs that are fast at it",
    )
    parser.add_argument("--device", metavar="DEV", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    parser.add_argument(
        "--large-images",
        action="store_true",
        help="open images that look like decompression bombs, such as large scans",
    )
    parser.add_argument("--out", default="detections", metavar="DIR", help="default: detections")
    parser.add_argument(
        "--labels", choices=LAYOUTS, help="also write the images and what is detected as a dataset, into OUT/dataset"
    )
    parser.add_argument(
        "--least-sure", type=int, metavar="N", help="list the N images whose detections are the most doubtful"
    )
    parser.add_argument("--offline", action=Offline)
    arguments = parser.parse_args()
    if arguments.least_sure is not None and arguments.least_sure < 1:
        raise UserError(f"--least-sure has to be at least 1, not {arguments.least_sure}")
    if arguments.tile is not None and arguments.tile < 0:
        raise UserError(f"--tile has to be more than 0, not {arguments.tile}")
    return arguments


def main():
    arguments = parse_arguments()
    allow_large_images(arguments.large_images)
    paths = find_files(arguments.paths)
    if any(is_video(path) for path in paths):
        if arguments.labels or arguments.least_sure:
            raise UserError("--labels and --least-sure are for images; leave out videos and cameras")
        require_av(next(path for path in paths if is_video(path)))
    out = Path(arguments.out)
    names = output_names(paths, out)
    checkpoint = arguments.checkpoint or newest_checkpoint()
    detector = load(
        checkpoint,
        device=arguments.device,
        image_size=arguments.image_size,
        threshold=arguments.threshold,
        tile=arguments.tile,
        precision=arguments.precision,
    )
    with writing(out, "; choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
    print(f"{checkpoint}: {len(detector.classes)} classes; {len(paths)} files; {detector.device.type}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is done is kept
    try:
        with dataset_of(arguments, detector, out) as dataset:
            failed, doubts = detect_in_files(paths, names, detector, out, dataset, arguments.least_sure)
    except KeyboardInterrupt:
        print(f"stopped; what was done is in {out / 'detections.json'}")
        raise
    for path, value in sorted(doubts.items(), key=itemgetter(1), reverse=True)[: arguments.least_sure or 0]:
        print(f"to label next: {path} (doubt {value:.2f})")
    if failed:
        more = f"; and {len(failed) - 10} more, see above" if len(failed) > 10 else ""
        raise UserError(
            f"{len(failed)} of {len(paths)} files can't be read or written in full: {'; '.join(failed[:10])}{more}"
        )


def find_files(arguments):
    """Files, folders, patterns and numbers of cameras -> paths, each once, in order. Raises UserError."""
    paths = []
    for argument in arguments:
        try:
            paths += files_of(argument)
        except OSError as error:  # no permission, a name that is too long
            raise UserError(f"{argument[:200]}: can't be opened ({error.strerror})") from None
    return list(dict.fromkeys(paths))


def files_of(argument):
    """An argument of find_files -> paths. Raises UserError and OSError."""
    path = Path(argument)
    if path.is_file() or argument.isdigit():
        return [path]
    if not path.is_dir():
        matches = sorted(Path(p) for p in glob.glob(argument, recursive=True))
        if not matches:
            raise UserError(f"{argument}: no such image, video, folder or pattern")
        files = [p for p in matches if p.is_file()]
        if not files:
            raise UserError(f"{argument}: matches folders only; name the folder, or the files in it")
        return files
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    inside = [p for p in files if p.suffix.lower() in suffixes]
    if not inside:
        raise UserError(f"{path}: no images or videos in this folder ({', '.join(sorted(suffixes))})")
    if len(inside) < len(files):
        print(f"{path}: {len(files) - len(inside)} of {len(files)} files are neither images nor videos")
    return inside


def newest_checkpoint():
    """The best.pth in runs/ that was written last. Raises UserError."""
    checkpoints = sorted(Path("runs").glob("*/best.pth"), key=os.path.getmtime)
    if not checkpoints:
        raise UserError("no run in runs/ has a best.pth; train first (python train.py), or give --checkpoint FILE")
    return checkpoints[-1]


def dataset_of(arguments, detector, out):
    """The dataset that --labels asks for; without it, nothing. Raises UserError."""
    if arguments.labels is None:
        return nullcontext()
    return DatasetWriter(out / "dataset", arguments.labels, detector.classes, detector.category_ids)


def detect_in_files(paths, names, detector, out, dataset=None, least_sure=None):
    """Writes the results for images and videos into the folder `out` -> messages about the files that failed,
    {path of an image: its doubt} if least_sure, see mistakes.doubt.

    names: of the outputs, see output_names; dataset: a labels.DatasetWriter for the images. Ctrl-C ends it, with
    detections.json of what was done.
    """
    failed, doubts, seconds, count = [], {}, 0.0, 0
    together = images_at_a_time(detector)
    with closing(opened_ahead(paths, detector, together)) as opened, JsonList(out / "detections.json") as results:
        for group in grouped(zip(paths, names, opened), together):
            started = time.time()
            found = detect_together([image for *_, image in group], detector, least_sure)
            seconds += time.time() - started
            for (path, name, image), detections in zip(group, found):
                try:
                    if image is None:
                        detect_in_frames(path, name, out / f"{name}.mp4", detector, results)
                        continue
                    if isinstance(detections, Exception):
                        raise detections
                    if least_sure:
                        doubts[path] = doubt(detections["scores"].numpy(), detector.threshold)
                        detections = above(detections, detector)
                    write_image(path, name, image, detections, out / f"{name}.jpg", detector, results)
                    count += 1
                    if dataset:
                        dataset.add(path, name, image.size, detections)
                except Exception as error:  # PIL raises exceptions of many types for broken files, torch for odd sizes
                    failed.append(say_failure(path, error))
            del group, found, image, detections  # large images: the next ones come only now
    speed = f", {count / max(seconds, 1e-9):.1f} images/s" if count else ""
    print(f"{results.count} detections in {count} images{speed}; written to {out}/")
    return failed, doubts


def images_at_a_time(detector):
    """A GPU takes several images as fast as one; a CPU takes no less for each, tiles are batches of their own, and
    large images fill the memory."""
    on_gpu = hasattr(detector, "device") and detector.device.type != "cpu"
    return IMAGES_ON_GPU if on_gpu and detector.tile is None and not os.environ.get(LARGE_IMAGES) else 1


def opened_ahead(paths, detector, count):
    """Yields PIL images; an exception for one that can't be opened, None for a video. Threads open `count` images more
    than are in use (large ones: none)."""

    def read(path):
        try:
            return None if is_video(path) else read_image(path, value_range=detector.value_range)
        except Exception as error:  # PIL raises exceptions of many types for broken files
            return error

    return ahead(read, paths, 0 if os.environ.get(LARGE_IMAGES) else count)


def grouped(files, most):
    """(path, name, image) of files -> lists of up to `most` images; a video is a list of its own."""
    group = []
    for file in files:
        if file[2] is None and group:
            yield group
            group = []
        group.append(file)
        if file[2] is None or len(group) == most:
            del file
            yield group
            group = []
    if group:
        yield group


def detect_together(images, detector, least_sure):
    """images: PIL images, exceptions, None -> for each its detections, or the exception that it is or that it raised.

    least_sure: detections down to the scores that mistakes.doubt takes, not only those that are written.
    """
    options = {}
    if least_sure:
        options = {"threshold": min(detector.threshold / 4, float(detector.lowest_scores().min()))}
    real = [image for image in images if isinstance(image, Image.Image)]
    try:
        found = iter([detector(real[0], **options)] if len(real) == 1 else detector(real, **options) if real else [])
        return [next(found) if isinstance(image, Image.Image) else image for image in images]
    except Exception as error:
        failure = error.with_traceback(None)  # which would keep the memory of what failed
    if len(images) == 1:
        return [failure]
    return [detect_together([image], detector, least_sure)[0] for image in images]  # it costs no other


def write_image(path, name, image, found, out, detector, results):
    """Writes the rows of an image to `results` and its drawing to `out`."""
    print(f"  {path.name:30s} {count_by_name(found['names'])}")
    results.extend(rows_of(found, detector, {"image_id": name, "file_name": str(path)}))
    drawn = draw_boxes(image, found["boxes"], found["labels"], detector.classes, found["scores"])
    with writing(out, also=[ValueError]):
        drawn.save(out, quality=92)


def above(found, detector):
    """The detections that reach their class's threshold."""
    keep = found["scores"] >= detector.lowest_scores()[found["labels"]]
    names = [name for name, is_kept in zip(found["names"], keep.tolist()) if is_kept]
    return {key: found[key][keep] for key in ("scores", "labels", "boxes")} | {"names": names}


def say_failure(path, error):
    """Prints in a line that a file failed -> the line."""
    cause = " ".join((str(error) or type(error).__name__).split())
    message = cause if str(path) in cause or isinstance(error, UserError) else f"{path}: {cause}"
    print(f"  {path.name:30s} failed: {cause}")
    return message


def output_names(paths, out):
    """-> a name for each path, of its outputs and in detections.json; unique, whatever the case of its letters.

    That is the file's name without its ending, with as many folders before it as tell it apart, and with the ending if
    they do not: x.jpg -> x; a/x.jpg, b/x.jpg -> a-x, b-x; a/x.jpg, a/x.png -> x-jpg, x-png. No output overwrites an
    input, nor, in a folder that holds inputs, anything else. Raises UserError.
    """
    inputs = {identity(path) for path in paths} - {None}
    if identity(out / "detections.json") in inputs:
        raise UserError(f"{out / 'detections.json'}: is an input, and would be overwritten; choose another --out")
    among_inputs = identity(out) in {identity(path.absolute().parent) for path in paths} - {None}
    candidates = [list(dict.fromkeys(possible_names(path))) for path in paths]
    counts = Counter(name.casefold() for possible in candidates for name in possible)
    names, used = [], set()
    for path, possible in zip(paths, candidates):
        base = next((name for name in possible if counts[name.casefold()] == 1), path.stem)
        suffix = ".mp4" if is_video(path) else ".jpg"
        for name in chain([base], (f"{base}-{number}" for number in count(2))):
            overwritten = identity(out / f"{name}{suffix}")
            if name.casefold() not in used and (overwritten is None or not (among_inputs or overwritten in inputs)):
                break
        used.add(name.casefold())
        names.append(name)
    return names


def possible_names(path):
    """a/b/x.jpg -> x, b-x, a-b-x, x-jpg, b-x-jpg, a-b-x-jpg."""
    parts = path.absolute().parts[1:-1]
    for ending in (path.stem, path.name.replace(".", "-")):
        for depth in range(len(parts) + 1):
            yield "-".join((*parts[len(parts) - depth :], ending))


def identity(path):
    """What two paths of the same file have in common, through links or other spellings; None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def count_by_name(names):
    """["cat", "dog", "cat"] -> "2 cat, 1 dog"."""
    return ", ".join(f"{count} {name}" for name, count in Counter(names).most_common()) or "nothing"


def rows_of(found, detector, where):
    """Detections in COCO's results format, one row each; `where` holds the first keys of every row."""
    rows = []
    for score, label, box in zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist()):
        x1, y1, x2, y2 = box
        row = {
            "category_id": detector.category_ids[label],
            "category": detector.classes[label],
            "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, 4),
        }
        rows.append(where | row)
    return rows


class JsonList:
    """A file with a JSON list in UTF-8, written row by row under a temporary name until it is closed. Raises UserError.

    As a context manager, it is closed and whole however its block ends.
    """

    def __init__(self, path):
        self.path, self.partial, self.count = path, path.with_name(path.name + ".partial"), 0
        with writing(self.path):
            # What is no character, as in file names of other encodings, becomes an escape of JSON
            self.file = open(self.partial, "w", encoding="utf-8", errors="backslashreplace")
            self.file.write("[")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def extend(self, rows):
        with writing(self.path):
            for row in rows:
                self.file.write((",\n" if self.count else "\n") + json.dumps(row, ensure_ascii=False))
                self.count += 1

    def close(self):
        with writing(self.path):
            self.file.write("\n]\n" if self.count else "]\n")
            self.file.close()
            self.partial.replace(self.path)


# Videos and cameras, frame by frame, see video.py


def detect_in_frames(path, name, out, detector, results):
    """Writes a video with its boxes to `out` and the rows of its frames to `results`; prints the speed of each step.

    Raises UserError if the video is damaged, or `out` can't be written, and KeyboardInterrupt for Ctrl-C, which only
    ends a camera.
    """
    report = partial(write_frame, path, name, detector, results)
    frames, seconds, trouble = detect_in_video(str(path), detector, out, report)
    speeds = ", ".join(f"{step} {frames / max(spent, 1e-9):.1f}" for step, spent in seconds.items())
    ending = f"; {trouble}" if trouble else ""
    overall = frames / max(sum(seconds.values()), 1e-9)  # Ctrl-C may come before the first frame
    print(f"  {path.name:30s} {frames} frames; frames/s: {speeds}, all {overall:.1f}{ending}")
    stopped = trouble is not None and trouble.startswith(STOPPED)
    if stopped and not is_camera(path):
        raise KeyboardInterrupt
    if trouble and trouble != STOPPED:
        raise UserError(f"{path}: {trouble}")


def write_frame(path, name, detector, results, frame):
    where = {
        "image_id": name,
        "file_name": str(path),
        "frame": frame["frame"],
        "time": round(frame["time"], 4),
    }
    results.extend(rows_of(frame, detector, where))


if __name__ == "__main__":
    run_script(main)
