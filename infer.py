"""Detects objects in pictures and videos with a checkpoint of train.py, or with a released ECDet.

    python infer.py picture.jpg                          with the newest run in runs/
    python infer.py picture.jpg --checkpoint ecdet_s.pth COCO's 80 classes
    python infer.py folder/ 'more/*.png' --checkpoint runs/mine/best.pth --threshold 0.3
    python infer.py clip.mp4                             frame by frame; a number is a camera, Ctrl-C ends it
    python infer.py large.jpg --tile 640                 in overlapping tiles of 640 pixels

Writes the pictures and videos with their boxes and detections.json (COCO's results form) into --out.
"""

import argparse
import glob
import json
import os
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPUs can't do yet then runs on the CPU
from datasets import read_image
from detector import load
from devices import PRECISIONS
from errors import UserError, run
from layouts import IMAGE_SUFFIXES
from plots import draw_boxes
from video import VIDEO_SUFFIXES, detect_in_video
from weights import Offline


def find_pictures(arguments):
    """Files, folders and patterns -> paths, each once, in order."""
    paths = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES)
            if not inside:
                raise UserError(f"{path}: no pictures or videos in this folder ({', '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))})")
            paths += inside
        elif path.is_file() or argument.isdigit():
            paths.append(path)
        else:
            matches = sorted(Path(p) for p in glob.glob(argument, recursive=True))
            if not matches:
                raise UserError(f"{argument}: no such picture, folder or pattern")
            paths += [p for p in matches if p.is_file()]
    return list(dict.fromkeys(paths))


def newest_checkpoint():
    """best.pth of the run in runs/ that was written last."""
    found = sorted(Path("runs").glob("*/best.pth"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError("no run in runs/ has a best.pth; train first (python train.py), or give --checkpoint FILE")
    return found[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", metavar="PATH", help="pictures, videos, folders or patterns; a number is a camera")
    parser.add_argument("--checkpoint", metavar="FILE", help="of a run, or a released ECDet: a file, a folder, a repository of the hub as Intellindust/ECDet_S (default: the newest runs/*/best.pth)")
    parser.add_argument("--threshold", type=float, default=0.4, metavar="T", help="lowest score that is shown (default 0.4)")
    parser.add_argument("--image-size", type=int, metavar="S", help="shortest side, or both (default: that of the training)")
    parser.add_argument("--tile", type=int, nargs="?", const=0, metavar="S", help="cut pictures larger than S pixels into overlapping tiles of S (default S: the image size)")
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS], help="default: float32 on CPUs, bfloat16 or float16 on GPUs that are fast at it")
    parser.add_argument("--out", default="detections", metavar="DIR", help="default: detections")
    parser.add_argument("--offline", action=Offline)
    arguments = parser.parse_args()
    if arguments.tile is not None and arguments.tile < 0:
        raise UserError(f"--tile has to be more than 0, not {arguments.tile}")

    paths = find_pictures(arguments.pictures)
    checkpoint = arguments.checkpoint or newest_checkpoint()
    detector = load(checkpoint, image_size=arguments.image_size, threshold=arguments.threshold, tile=arguments.tile, precision=arguments.precision)
    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: can't be made ({error.strerror}); choose another --out") from None
    print(f"{checkpoint}: {len(detector.classes)} classes; {len(paths)} files; {detector.device.type}")

    failed, seconds, done, names = [], 0.0, 0, Counter()
    results = JsonList(out / "detections.json")
    for path in paths:
        names[path.stem] += 1
        name = path.stem if names[path.stem] == 1 else f"{path.stem}-{names[path.stem]}"
        if is_video(path):
            try:
                detect_in_frames(path, out / f"{name}.mp4", detector, results)
            except UserError as error:
                failed.append(str(error))
            continue
        try:
            image = read_image(path)
        except Exception as error:  # PIL raises many kinds on broken files
            failed.append(f"{path}: {error}")
            continue
        started = time.time()
        found = detector(image)
        seconds += time.time() - started
        done += 1
        counts = Counter(found["names"])
        print(f"  {path.name:30s} {', '.join(f'{n} {kind}' for kind, n in counts.most_common()) or 'nothing'}")
        results.extend(rows_of(found, detector, {"image_id": path.stem, "file_name": str(path)}))
        draw_boxes(image, found["boxes"], found["labels"], detector.classes, found["scores"]).save(out / f"{name}.jpg", quality=92)
    results.close()
    speed = f", {done / max(seconds, 1e-9):.1f} pictures/s" if done else ""
    print(f"{results.count} detections in {done} pictures{speed}; written to {out}/")
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} files can't be read: {'; '.join(failed[:10])}")


def is_video(path):
    return path.suffix.lower() in VIDEO_SUFFIXES or str(path).isdigit()


def rows_of(found, detector, where):
    """Detections in COCO's results form, one row each, with the keys of `where` before it."""
    return [
        where | {
            "category_id": detector.category_ids[label], "category": detector.classes[label],
            "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)], "score": round(score, 4),
        }
        for score, label, (x1, y1, x2, y2) in zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist())
    ]  # fmt: skip


def detect_in_frames(path, out, detector, results):
    """Writes a video with its boxes, and rows as `rows_of`, by frame, into results; prints how fast each part was."""

    def report(frame):
        where = {"image_id": path.stem, "file_name": str(path), "frame": frame["frame"], "time": round(frame["time"], 4)}
        results.extend(rows_of(frame, detector, where))

    frames, seconds, trouble = detect_in_video(str(path), detector, out, report)
    speeds = ", ".join(f"{part} {frames / max(passed, 1e-9):.1f}" for part, passed in seconds.items())
    print(f"  {path.name:30s} {frames} frames; frames/s: {speeds}, all {frames / sum(seconds.values()):.1f}" + (f"; {trouble}" if trouble else ""))


class JsonList:
    """A file with a JSON list that is written row by row, under a temporary name until it is closed. Raises UserError."""

    def __init__(self, path):
        self.path, self.partial, self.count = path, path.with_name(path.name + ".partial"), 0
        self.file = self.doing(lambda: open(self.partial, "w"))

    def extend(self, rows):
        for row in rows:
            self.doing(lambda: self.file.write(("[\n" if self.count == 0 else ",\n") + json.dumps(row)))
            self.count += 1

    def close(self):
        self.doing(lambda: self.file.write("\n]\n" if self.count else "[]\n"))
        self.doing(self.file.close)
        self.doing(lambda: self.partial.replace(self.path))

    def doing(self, action):
        try:
            return action()
        except OSError as error:
            raise UserError(f"{self.path}: can't be written ({error.strerror or error})") from None


if __name__ == "__main__":
    run(main)
