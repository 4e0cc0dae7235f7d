"""Videos and cameras, frame by frame, through PyAV (pip install av)."""

import sys
import time
from fractions import Fraction

from errors import UserError
from plots import draw_boxes

VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"}
CAMERAS = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation"), "win32": ("video={}", "dshow")}


def open_video(source):
    """A file's path, or a camera's number as text -> PyAV container. Raises UserError."""
    try:
        import av
    except ImportError:
        raise UserError(f"{source}: videos and cameras need PyAV; pip install av") from None
    try:
        if not source.isdigit():
            container = av.open(source)
        else:
            device, kind = CAMERAS[sys.platform]
            container = av.open(device.format(source), format=kind)
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise UserError(f"{source}: can't be opened as a {'camera' if source.isdigit() else 'video'} ({error})") from None
    if not container.streams.video:
        raise UserError(f"{source}: there is no video in it")
    return container


def detect_in_video(source, detector, out, report):
    """Detects in every frame of a file or camera and writes the frames with their boxes to `out`, an .mp4.

    report is called with each frame's {"frame", "time" in seconds, and a Detector's "scores", "labels", "boxes", "names"}; none is kept,
    so that a camera may run for days -> (number of frames, {"decoding", "network", "drawing": seconds}, what ended it too early or
    None). Ctrl-C ends it after the frame under way.
    """
    import av

    container = open_video(source)
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate = Fraction(stream.average_rate or 25).limit_denominator(1001)
    count, seconds, trouble, writer, track = 0, dict.fromkeys(("decoding", "network", "drawing"), 0.0), None, None, None
    frames = container.decode(stream)
    try:
        while True:
            started = time.perf_counter()
            frame = next(frames, None)
            if frame is None:
                break
            image = frame.to_image()
            turned = getattr(frame, "rotation", 0)
            image = image.rotate(turned, expand=True) if turned else image
            decoded = time.perf_counter()
            found = detector(image)
            detected = time.perf_counter()
            drawn = draw_boxes(image, found["boxes"], found["labels"], detector.classes, found["scores"])
            drawn = drawn.crop((0, 0, drawn.width // 2 * 2, drawn.height // 2 * 2))  # the codec wants even sides
            if writer is None:
                writer = av.open(str(out), "w")
                track = writer.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
                track.width, track.height, track.pix_fmt = drawn.width, drawn.height, "yuv420p"
            for packet in track.encode(av.VideoFrame.from_image(drawn)):
                writer.mux(packet)
            report({"frame": count, "time": float(frame.time if frame.time is not None else count / rate)} | found)
            count += 1
            for part, passed in zip(seconds, (decoded - started, detected - decoded, time.perf_counter() - detected)):
                seconds[part] += passed
    except KeyboardInterrupt:
        trouble = "stopped"
    except av.error.FFmpegError as error:
        trouble = f"broken after frame {count} ({error})"
    finally:
        container.close()
        if writer is not None:
            for packet in track.encode():
                writer.mux(packet)
            writer.close()
    if not count:
        raise UserError(f"{source}: no frame of it can be read" + (f"; {trouble}" if trouble else ""))
    return count, seconds, trouble
