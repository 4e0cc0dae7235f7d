"""Videos and cameras, frame by frame, through PyAV, which is only needed for these."""

import sys
import time
from fractions import Fraction
from itertools import islice

from errors import UserError
from plots import draw_boxes

VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"}
FRAMES_ON_GPU = 8  # that share a batch
SHORTEST_TIME = Fraction(1, 60_000)  # MPEG-4, which is written without libx264, has no shorter unit
STOPPED = "stopped"
CAMERAS = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation"), "win32": ("video={}", "dshow")}


def is_video(path):
    return path.suffix.lower() in VIDEO_SUFFIXES or is_camera(path)


def is_camera(path):
    return str(path).isdigit()


def detect_in_video(source, detector, out, report):
    """Detects in every frame of a file or camera and writes the frames with their boxes to `out`, an .mp4.

    report is called with {"frame", "time" in seconds, and a Detector's "scores", "labels", "boxes", "names"} for each
    frame; none is kept, so a camera can run for days. Ctrl-C ends it after the current frame. On a GPU, frames of files
    share batches. Packets that can't be decoded cost their own frames only.
    -> (number of frames, {"decoding", "network", "drawing": seconds}, what went wrong or None). Raises UserError.
    """
    container = open_video(source)
    import av

    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    if container.streams.audio:
        print(f"  {source}: its sound is left out")
    rate = Fraction(stream.average_rate or 25).limit_denominator(1001)
    on_gpu = hasattr(detector, "device") and detector.device.type != "cpu"
    batch_size = FRAMES_ON_GPU if on_gpu and not source.isdigit() else 1
    frames, writer = FrameReader(container, stream), VideoWriter(out, rate, stream.time_base)
    start = Fraction(container.start_time or 0, av.time_base)
    done, troubles = 0, []
    seconds = {"decoding": 0.0, "network": 0.0, "drawing": 0.0}
    try:
        while True:
            started = time.perf_counter()
            batch = list(islice(frames, batch_size))
            if not batch:
                break
            images = [upright(frame) for frame in batch]
            decoded = time.perf_counter()
            detections = [detector(images[0])] if batch_size == 1 else detector(images)
            detected = time.perf_counter()
            for frame, image, found in zip(batch, images, detections):
                position = done / rate if frame.time is None else frame.time
                report({"frame": done, "time": float(position)} | found)
                drawn = draw_boxes(image, found["boxes"], found["labels"], detector.classes, found["scores"])
                writer.write(drawn, done / rate if frame.pts is None else frame.pts * frame.time_base - start)
                done += 1
            seconds["decoding"] += decoded - started
            seconds["network"] += detected - decoded
            seconds["drawing"] += time.perf_counter() - detected
    except KeyboardInterrupt:
        troubles.append(STOPPED)
    except av.error.FFmpegError as error:
        troubles.append(f"broken after frame {done} ({error})")
    finally:
        container.close()
        writer.close()
    troubles += [trouble for trouble in (frames.damage, writer.trouble) if trouble]
    trouble = "; ".join(troubles) or None
    if not done and STOPPED not in troubles:
        raise UserError(f"{source}: no frame of it can be read" + (f"; {trouble}" if trouble else ""))
    return done, seconds, trouble


class FrameReader:
    """The frames of a video stream, one by one. Damaged packets are counted, and cost their own frames only."""

    def __init__(self, container, stream):
        self.frames, self.damaged, self.first = self.read(container, stream), 0, None

    def __iter__(self):
        return self.frames

    def read(self, container, stream):
        import av

        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                self.note(packet)
                continue
            for frame in frames:
                if frame.is_corrupt:  # decoded all the same, with holes
                    self.note(frame)
                yield frame

    def note(self, part):
        if self.first is None and part.pts is not None:
            self.first = float(part.pts * part.time_base)
        self.damaged += 1

    @property
    def damage(self):
        """What was damaged, in words, or None."""
        if not self.damaged:
            return None
        return f"{self.damaged} damaged packets or frames" + (
            f", the first near {self.first:.2f} s" if self.first else ""
        )


def require_av(source):
    """Raises UserError if PyAV is not installed."""
    try:
        import av  # noqa: F401 - is it there?
    except ImportError:
        raise UserError(f"{source}: videos and cameras need PyAV; pip install av") from None


def open_video(source):
    """A file's path, or a camera's number as text -> PyAV container. Raises UserError."""
    require_av(source)
    import av

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
    """Writes PIL images as the frames of an .mp4, which is opened when the first one comes and decides their size.

    rate: frames a second, on average; time_base: the unit of their times, in seconds, or None. What can't be written is
    in `trouble`, and nothing more is tried then.
    """

    def __init__(self, path, rate, time_base=None):
        self.path, self.rate, self.container, self.stream, self.trouble = path, rate, None, None, None
        self.time_base, self.last = max(time_base or 1 / rate, SHORTEST_TIME), -1

    def write(self, image, time):
        """time: Fraction, in seconds from the start."""
        import av

        if self.trouble:
            return
        try:
            image = image.crop((0, 0, image.width // 2 * 2, image.height // 2 * 2))  # the codec needs even sides
            if self.container is None:
                self.open(image)
            if image.size != (self.stream.width, self.stream.height):
                image = image.resize((self.stream.width, self.stream.height))
            frame = av.VideoFrame.from_image(image)
            self.last = max(round(time / self.time_base), self.last + 1)  # an encoder takes rising times only
            frame.pts, frame.time_base = self.last, self.time_base
            self.encode(frame)
        except (OSError, ValueError, av.error.FFmpegError) as error:
            self.trouble = f"{self.path} can't be written ({error})"

    def open(self, image):
        import av

        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self.container = av.open(str(self.path), "w")
        self.stream = self.container.add_stream(codec, rate=self.rate)
        self.stream.width, self.stream.height, self.stream.pix_fmt = image.width, image.height, "yuv420p"
        self.stream.codec_context.time_base = self.time_base

    def encode(self, frame):
        """frame: None for the end of the stream."""
        for packet in self.stream.encode(frame):
            self.container.mux(packet)

    def close(self):
        import av

        if self.container is None:
            return
        try:
            if not self.trouble:
                self.encode(None)
            self.container.close()
        except (OSError, ValueError, av.error.FFmpegError) as error:
            self.trouble = self.trouble or f"{self.path} can't be written ({error})"
