"""Detects objects in images and videos with a checkpoint of train.py, or with a released ECDet.

    python infer.py image.jpg                            with the newest run in runs/
    python infer.py image.jpg --checkpoint ecdet_s.pth   COCO's 80 classes
    python infer.py folder/ 'more/*.png' --checkpoint runs/mine/best.pth --threshold 0.3
    python infer.py clip.mp4                             frame by frame; a number is a camera, Ctrl-C ends it
    python infer.py large.jpg --tile 640                 in overlapping tiles of 640 pixels

Writes the images and videos with their boxes, and detections.json in COCO's results format, into --out.
"""

import argparse
import glob
import json
import os
import sys
import time
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPUs can't do yet then runs on the CPU
from detector import load
from devices import PRECISIONS
from errors import Offline, UserError, run_script, writing
from layouts import IMAGE_SUFFIXES
from plots import draw_boxes
from transforms import read_image

VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"}
CAMERAS = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation"), "win32": ("video={}", "dshow")}


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
        "--threshold", type=float, default=0.4, metavar="T", help="lowest score that is shown (default 0.4)"
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
    parser.add_argument("--out", default="detections", metavar="DIR", help="default: detections")
    parser.add_argument("--offline", action=Offline)
    arguments = parser.parse_args()
    if arguments.tile is not None and arguments.tile < 0:
        raise UserError(f"--tile has to be more than 0, not {arguments.tile}")
    return arguments


def main():
    arguments = parse_arguments()
    paths = find_files(arguments.paths)
    checkpoint = arguments.checkpoint or newest_checkpoint()
    detector = load(
        checkpoint,
        image_size=arguments.image_size,
        threshold=arguments.threshold,
        tile=arguments.tile,
        precision=arguments.precision,
    )
    out = Path(arguments.out)
    with writing(out, "; choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
    print(f"{checkpoint}: {len(detector.classes)} classes; {len(paths)} files; {detector.device.type}")
    failed = detect_in_files(paths, detector, out)
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} files can't be read: {'; '.join(failed[:10])}")


def find_files(arguments):
    """Files, folders, patterns and numbers of cameras -> paths, each once, in order. Raises UserError."""
    paths = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
            if not inside:
                raise UserError(f"{path}: no images or videos in this folder ({', '.join(sorted(suffixes))})")
            paths += inside
        elif path.is_file() or argument.isdigit():
            paths.append(path)
        else:
            matches = sorted(Path(p) for p in glob.glob(argument, recursive=True))
            if not matches:
                raise UserError(f"{argument}: no such image, video, folder or pattern")
            paths += [p for p in matches if p.is_file()]
    return list(dict.fromkeys(paths))


def newest_checkpoint():
    """The best.pth in runs/ that was written last. Raises UserError."""
    checkpoints = sorted(Path("runs").glob("*/best.pth"), key=os.path.getmtime)
    if not checkpoints:
        raise UserError("no run in runs/ has a best.pth; train first (python train.py), or give --checkpoint FILE")
    return checkpoints[-1]


def detect_in_files(paths, detector, out):
    """Writes the results for images and videos into the folder `out` -> messages about the files that can't be read."""
    failed, seconds, count = [], 0.0, 0
    results = JsonList(out / "detections.json")
    for path, name in zip(paths, output_names(paths)):
        if is_video(path):
            try:
                detect_in_frames(path, out / f"{name}.mp4", detector, results)
            except UserError as error:
                failed.append(str(error))
            continue
        try:
            image = read_image(path)
        except Exception as error:  # PIL raises exceptions of many types for broken files
            failed.append(f"{path}: {error}")
            continue
        started = time.time()
        found = detector(image)
        seconds += time.time() - started
        count += 1
        print(f"  {path.name:30s} {count_by_name(found['names'])}")
        results.extend(rows_of(found, detector, {"image_id": path.stem, "file_name": str(path)}))
        drawn = draw_boxes(image, found["boxes"], found["labels"], detector.classes, found["scores"])
        drawn.save(out / f"{name}.jpg", quality=92)
    results.close()
    speed = f", {count / max(seconds, 1e-9):.1f} images/s" if count else ""
    print(f"{results.count} detections in {count} images{speed}; written to {out}/")
    return failed


def output_names(paths):
    """The paths' names without their endings; those that repeat are numbered: a, b, a-2."""
    used = Counter()
    for path in paths:
        used[path.stem] += 1
        yield path.stem if used[path.stem] == 1 else f"{path.stem}-{used[path.stem]}"


def is_video(path):
    return path.suffix.lower() in VIDEO_SUFFIXES or str(path).isdigit()


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
    """A file with a JSON list, written row by row under a temporary name until it is closed. Raises UserError."""

    def __init__(self, path):
        self.path, self.partial, self.count = path, path.with_name(path.name + ".partial"), 0
        with writing(self.path):
            self.file = open(self.partial, "w")

    def extend(self, rows):
        with writing(self.path):
            for row in rows:
                self.file.write((",\n" if self.count else "[\n") + json.dumps(row))
                self.count += 1

    def close(self):
        with writing(self.path):
            self.file.write("\n]\n" if self.count else "[]\n")
            self.file.close()
            self.partial.replace(self.path)


# Videos and cameras, frame by frame, through PyAV, which is only needed for these


def detect_in_frames(path, out, detector, results):
    """Writes a video with its boxes to `out` and the rows of its frames to `results`; prints the speed of each step."""
    report = partial(write_frame, path, detector, results)
    frames, seconds, trouble = detect_in_video(str(path), detector, out, report)
    speeds = ", ".join(f"{step} {frames / max(spent, 1e-9):.1f}" for step, spent in seconds.items())
    ending = f"; {trouble}" if trouble else ""
    print(f"  {path.name:30s} {frames} frames; frames/s: {speeds}, all {frames / sum(seconds.values()):.1f}{ending}")


def write_frame(path, detector, results, frame):
    where = {
        "image_id": path.stem,
        "file_name": str(path),
        "frame": frame["frame"],
        "time": round(frame["time"], 4),
    }
    results.extend(rows_of(frame, detector, where))


def detect_in_video(source, detector, out, report):
    """Detects in every frame of a file or camera and writes the frames with their boxes to `out`, an .mp4.

    report is called with {"frame", "time" in seconds, and a Detector's "scores", "labels", "boxes", "names"} for each
    frame; none is kept, so a camera can run for days. Ctrl-C ends it after the current frame.
    -> (number of frames, {"decoding", "network", "drawing": seconds}, why it ended early or None). Raises UserError.
    """
    container = open_video(source)
    import av

    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate = Fraction(stream.average_rate or 25).limit_denominator(1001)
    frames, writer = container.decode(stream), VideoWriter(out, rate)
    count, trouble = 0, None
    seconds = {"decoding": 0.0, "network": 0.0, "drawing": 0.0}
    try:
        while True:
            started = time.perf_counter()
            frame = next(frames, None)
            if frame is None:
                break
            image = upright(frame)
            decoded = time.perf_counter()
            found = detector(image)
            detected = time.perf_counter()
            writer.write(draw_boxes(image, found["boxes"], found["labels"], detector.classes, found["scores"]))
            position = count / rate if frame.time is None else frame.time
            report({"frame": count, "time": float(position)} | found)
            count += 1
            seconds["decoding"] += decoded - started
            seconds["network"] += detected - decoded
            seconds["drawing"] += time.perf_counter() - detected
    except KeyboardInterrupt:
        trouble = "stopped"
    except av.error.FFmpegError as error:
        trouble = f"broken after frame {count} ({error})"
    finally:
        container.close()
        writer.close()
    if not count:
        raise UserError(f"{source}: no frame of it can be read" + (f"; {trouble}" if trouble else ""))
    return count, seconds, trouble


def open_video(source):
    """A file's path, or a camera's number as text -> PyAV container. Raises UserError."""
    try:
        import av
    except ImportError:
        raise UserError(f"{source}: videos and cameras need PyAV; pip install av") from None
    kind = "camera" if source.isdigit() else "video"
    try:
        if kind == "camera":
            device, driver = CAMERAS[sys.platform]
            container = av.open(device.format(source), format=driver)
        else:
            container = av.open(source)
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise UserError(f"{source}: can't be opened as a {kind} ({error})") from None
    if not container.streams.video:
        raise UserError(f"{source}: there is no video in it")
    return container


def upright(frame):
    """A PyAV frame -> PIL image, rotated as the file says."""
    image, degrees = frame.to_image(), getattr(frame, "rotation", 0)  # older versions of PyAV don't have it
    return image.rotate(degrees, expand=True) if degrees else image


class VideoWriter:
    """Writes PIL images of one size as the frames of an .mp4, which is opened when the first one comes."""

    def __init__(self, path, rate):
        self.path, self.rate, self.container, self.stream = path, rate, None, None

    def write(self, image):
        import av

        image = image.crop((0, 0, image.width // 2 * 2, image.height // 2 * 2))  # the codec needs even sides
        if self.container is None:
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            self.container = av.open(str(self.path), "w")
            self.stream = self.container.add_stream(codec, rate=self.rate)
            self.stream.width, self.stream.height, self.stream.pix_fmt = image.width, image.height, "yuv420p"
        self.encode(av.VideoFrame.from_image(image))

    def encode(self, frame):
        """frame: None for the end of the stream."""
        for packet in self.stream.encode(frame):
            self.container.mux(packet)

    def close(self):
        if self.container is not None:
            self.encode(None)
            self.container.close()


if __name__ == "__main__":
    run_script(main)
