"""Detecting in what people bring: no file is overwritten or costs another, pixels mean the same however they come."""

import json
import os
import signal
import subprocess
import sys
import warnings
from fractions import Fraction

import compare_patches
import features
import numpy as np
import pytest
import torch
from conftest import ROOT, reference_state, write_coco
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from test_commands import SMALL, called
from test_detector import CLASSES, checkpoint, photo, same  # noqa: F401 - checkpoint is a fixture
from test_video import RedSquares, write_clip

import datasets
import evaluate
import export
import infer
import plots
import train
import transforms
import video
from backbones import build_backbone
from checkpoint import read_checkpoint, save_checkpoint
from detector import load, to_image
from errors import UserError
from tiles import detect_in_tiles


class Squares(RedSquares):
    """RedSquares with a device; `at` is called with the number of each image."""

    device, value_range = torch.device("cpu"), None

    def __init__(self, at=None):
        self.at, self.calls = at or (lambda number: None), 0

    def __call__(self, image):
        self.calls += 1
        self.at(self.calls - 1)
        return super().__call__(image)


@pytest.fixture
def detect(tmp_path, monkeypatch, capsys):
    """Runs infer.py with a detector of red squares -> status, stdout, stderr, rows of detections.json or None."""

    def run(*arguments, detector=None, out=tmp_path / "out"):
        monkeypatch.setattr(infer, "load", lambda *_, **options: detector or Squares())
        result = called(infer.main, [*arguments, "--checkpoint", "x", "--out", out], monkeypatch, capsys)
        written = out / "detections.json"
        return *result, json.loads(written.read_bytes().decode("utf-8")) if written.exists() else None

    return run


@pytest.fixture
def run_file(checkpoint):  # noqa: F811
    """The best.pth of a small detector."""
    return checkpoint


def red_square(path, size=(80, 60)):
    image = Image.new("RGB", size, (110, 110, 110))
    ImageDraw.Draw(image).rectangle((20, 10, 49, 39), fill=(230, 20, 20))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def content_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Names


def test_names_tell_the_folder_where_they_have_to(detect, tmp_path):
    paths = [red_square(tmp_path / p) for p in ("a/x.png", "b/x.png", "b/y.png", "c/z.png", "c/z.jpg", "c/Y2.png")]
    status, _, error, rows = detect(*paths)
    assert status == 0, error
    names = {str(row["file_name"]): row["image_id"] for row in rows}
    assert names[str(paths[0])] == "a-x" and names[str(paths[1])] == "b-x" and names[str(paths[2])] == "y"
    assert len(set(names.values())) == 6 and names[str(paths[3])] == "z-png"
    assert {p.stem for p in (tmp_path / "out").glob("*.jpg")} == set(names.values())


def test_names_that_collide_once_joined_or_in_another_case_stay_apart(tmp_path):
    paths = [tmp_path / p for p in ("a/x.png", "b/x.png", "c/a-x.png", "c/Q.png", "d/q.png", "e/q.png")]
    names = infer.output_names(paths, tmp_path / "out")
    assert len({name.lower() for name in names}) == 6


@pytest.mark.parametrize("how", ["same folder", "link", "hard link", "twice"])
def test_no_input_is_overwritten(how, detect, tmp_path):
    source = red_square(tmp_path / "in" / "x.jpg")
    red_square(tmp_path / "in" / "y.png")
    red_square(tmp_path / "in" / "y.jpg", (90, 90))  # not an input, and not ours
    inputs, out = [source, tmp_path / "in" / "y.png"], tmp_path / "in"
    if how in ("link", "hard link"):
        out = tmp_path / "out"
        out.mkdir()
        (out / "x.jpg").symlink_to(source) if how == "link" else os.link(source, out / "x.jpg")
    before = content_of(tmp_path / "in")
    for _ in range(2 if how == "twice" else 1):
        status, _, error, rows = detect(*inputs, out=out)
        assert status == 0 and len(rows) == 2, error
        after = content_of(tmp_path / "in")
        assert all(after[path] == data for path, data in before.items())
        assert all((out / f"{row['image_id']}.jpg").exists() for row in rows)


def test_a_list_of_results_that_is_an_input_is_not_overwritten(detect, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "detections.json").write_text("[1]")
    red_square(tmp_path / "out" / "x.png")
    status, _, error, rows = detect(str(tmp_path / "out" / "*"))
    assert status == 2 and error.count("\n") == 1 and "choose another --out" in error and rows == [1]


# One bad file


def test_a_file_that_fails_costs_no_other(detect, tmp_path, monkeypatch):
    paths = [red_square(tmp_path / f"{name}.png") for name in "abcde"]
    paths[1].write_bytes(b"no image")

    def fail(number):
        if number == 1:
            raise RuntimeError("a size\nthat the network can't take")

    real = Image.Image.save

    def save(image, path, **options):
        if "d.jpg" in str(path):
            raise OSError(28, "No space left on device")
        return real(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    status, _, error, rows = detect(*paths, detector=Squares(fail))
    assert status == 2 and error.count("\n") == 1 and "3 of 5 files" in error
    assert all(name in error for name in ("b.png", "c.png: a size that", "d.jpg: can't be written (No space left"))
    assert [row["image_id"] for row in rows] == ["a", "d", "e"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_was_done(number, detect, tmp_path):
    paths = [red_square(tmp_path / f"{name}.png") for name in "abcd"]
    stop = Squares(lambda call: os.kill(os.getpid(), number) if call == 2 else None)
    status, _, error, rows = detect(*paths, detector=stop)
    assert status == 130 and [row["image_id"] for row in rows] == ["a", "b"]
    assert "Traceback" not in error and not list((tmp_path / "out").glob("*.partial"))


def test_a_signal_in_a_video_ends_all(detect, tmp_path):
    write_clip(tmp_path / "clip.mp4", seconds=1)
    image = red_square(tmp_path / "x.png")
    stop = Squares(lambda call: os.kill(os.getpid(), signal.SIGINT) if call == 5 else None)
    status, _, _, rows = detect(tmp_path / "clip.mp4", image, detector=stop)
    assert status == 130 and [row["frame"] for row in rows] == [0, 1, 2, 3, 4]
    assert (tmp_path / "out" / "clip.mp4").stat().st_size > 0


WITH_SQUARES = """
import sys; sys.path[:0] = [{root!r}, {root!r} + "/tools", {root!r} + "/tests"]
import infer
from test_detecting import Squares
from errors import run_script
infer.load = lambda *_, **__: Squares()
run_script(infer.main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_file_names_of_any_bytes(encoding, tmp_path):
    names = [b"caf\xe9.png", "猫 кот.png".encode(), b"a\nb.png", b"broken\xff.png"]
    red_square(tmp_path / "x.png")
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes((tmp_path / "x.png").read_bytes())
    (tmp_path / os.fsdecode(names[3])).write_bytes(b"")
    process = subprocess.run(
        [sys.executable, "-c", WITH_SQUARES.format(root=str(ROOT)), *names, "--checkpoint", "x", "--out", "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert process.returncode == 2 and b"Traceback" not in process.stderr, process.stderr
    assert process.stderr.count(b"\n") == 1 and b"1 of 4 files" in process.stderr
    text = (tmp_path / "out" / "detections.json").read_bytes().decode("utf-8")
    rows = json.loads(text)
    assert [os.fsencode(row["file_name"]) for row in rows] == names[:3] and "猫" in text
    assert all((tmp_path / "out" / f"{row['image_id']}.jpg").exists() for row in rows)


# Names of classes


def test_class_names_are_drawn_as_letters_where_a_font_has_them(monkeypatch, capsys):
    boxes, labels = torch.tensor([[10.0, 60, 200, 200]]), [0]
    drawn = {}
    for name in ("кот", "дом", "кіт", "\ue123\ue124", "class 0"):
        plots.drawable_name.cache_clear()
        drawn[name] = np.asarray(plots.draw_boxes(Image.new("RGB", (480, 480)), boxes, labels, [name])).tobytes()
    assert len({drawn[name] for name in ("кот", "дом", "кіт")}) == 3  # letters, not boxes that are all the same
    assert drawn["\ue123\ue124"] == drawn["class 0"]  # which no font has
    assert capsys.readouterr().out.count("class 0: ") == 1
    plots.draw_boxes(Image.new("RGB", (480, 480)), boxes, labels, ["two\nlines"])


def test_the_systems_fonts_are_asked_after_matplotlibs(monkeypatch):
    assert plots.font_file("кот").endswith("DejaVuSans.ttf") and plots.font_file("cat") == ""
    assert plots.font_files()[0].endswith("DejaVuSans.ttf")
    files = plots.font_files()
    monkeypatch.setattr(plots, "font_files", lambda: ["nowhere.ttf", files[0]])
    assert plots.font_file("собака") == files[0] and plots.font_file("\ue123") is None


# The same pixels by every way in


def images_of_many_kinds():
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    alpha = np.dstack([colour, rng.integers(0, 255, (40, 60), dtype=np.uint8)])
    wide = rng.integers(0, 65535, (40, 60), dtype=np.uint16)
    yield "rgb", Image.fromarray(colour), colour
    yield "grey", Image.fromarray(colour[..., 0]), colour[..., 0]
    yield "alpha", Image.fromarray(alpha), alpha
    yield "grey alpha", Image.fromarray(alpha[..., 2:].copy(), "LA"), alpha[..., 2:]
    yield "wide", Image.fromarray(wide), wide
    yield "twelve bits", Image.fromarray(wide >> 4), wide >> 4
    yield "palette", Image.fromarray(colour).quantize(16), None
    yield "palette with alpha", Image.fromarray(alpha).quantize(16), None
    yield "one bit", Image.fromarray(colour[..., 0] > 128), colour[..., 0] > 128
    turned = Image.fromarray(colour)
    turned.getexif()[0x0112] = 6
    yield "turned", turned, None


@pytest.mark.parametrize("kind, image, array", [pytest.param(*row, id=row[0]) for row in images_of_many_kinds()])
def test_a_path_an_image_and_an_array_are_the_same(kind, image, array, tmp_path):
    image.save(tmp_path / "a.png", exif=image.getexif())
    expected = np.asarray(transforms.read_image(tmp_path / "a.png"))
    before = image.tobytes(), image.mode, image.size
    ways = [str(tmp_path / "a.png"), image, Image.open(tmp_path / "a.png"), *([] if array is None else [array])]
    for way in ways:
        given = to_image(way)
        assert given.mode == "RGB" and np.array_equal(np.asarray(given), expected), (kind, way)
    assert (image.tobytes(), image.mode, image.size) == before  # the caller's image is not changed
    if kind == "turned":
        assert expected.shape == (60, 40, 3)
    if kind in ("wide", "alpha"):
        assert 100 < expected.mean() < 220


def test_transparent_and_turned_images_are_detected_in_alike(run_file, tmp_path):
    detector = load(run_file, threshold=0.0, device="cpu")
    image = photo()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.getexif()[0x0112] = 8
    image.save(tmp_path / "a.png", exif=image.getexif())
    same(detector(tmp_path / "a.png"), detector(image))


# Videos


def test_a_missing_package_is_said_before_anything_is_done(detect, tmp_path, monkeypatch):
    image = red_square(tmp_path / "x.png")
    (tmp_path / "clip.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    status, out, error, rows = detect(image, tmp_path / "clip.mp4")
    assert status == 2 and "pip install av" in error and error.count("\n") == 1
    assert rows is None and not (tmp_path / "out").exists() and "files" not in out


def damage(path, number):
    """Overwrites one packet of a video."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
        position, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[position : position + size] = bytes(255 for _ in range(size))
    path.write_bytes(data)


def write_intra(path, times, size=(160, 120), sound=False):
    """A red square in frames at the given times, in thousandths; every frame is whole by itself."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "1"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if sound:
            audio = container.add_stream("aac", rate=44100)
        for i, time in enumerate(times):
            image = Image.new("RGB", size, (110, 110, 110))
            ImageDraw.Draw(image).rectangle((20 + i, 20, 59 + i, 59), fill=(230, 20, 20))
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            samples.sample_rate, samples.pts = 44100, 0
            container.mux(audio.encode(samples))
            container.mux(audio.encode())
    return path


def test_a_broken_packet_costs_its_frame_only(detect, tmp_path):
    clip = write_intra(tmp_path / "clip.mp4", range(0, 3000, 100))
    damage(clip, 12)
    image = red_square(tmp_path / "z.png")
    status, out, error, rows = detect(clip, image)
    assert status == 2 and error.count("\n") == 1 and "clip.mp4: 1 damaged" in error and "the first near 1." in error
    times = [row["time"] for row in rows if row["image_id"] == "clip"]
    assert times == [i / 10 for i in range(30) if i != 12] and rows[-1]["image_id"] == "z"


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_video_keeps_the_times_of_its_source(codec, detect, tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    times = [0, 33, 67, 100, 400, 401, 1000, 1900]
    clip = write_intra(tmp_path / "clip.mp4", times)
    if codec == "mpeg4":
        monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    status, _, error, rows = detect(clip)
    assert status == 0 and [round(1000 * row["time"]) for row in rows] == times, error
    with av.open(str(tmp_path / "out" / "clip.mp4")) as written:
        assert [round(1000 * frame.time) for frame in written.decode(video=0)] == times
    assert rows[0]["image_id"] == "clip"


def test_sound_is_said_to_be_left_out(detect, tmp_path):
    clip = write_intra(tmp_path / "clip.mp4", range(0, 500, 100), sound=True)
    status, out, error, _ = detect(clip)
    assert status == 0 and "sound is left out" in out, error
    status, out, _, _ = detect(write_intra(tmp_path / "quiet.mp4", range(0, 500, 100)))
    assert "its sound" not in out


def test_frames_share_batches_on_a_gpu_alone(tmp_path):
    clip, sizes = write_intra(tmp_path / "clip.mp4", range(0, 2000, 100)), []

    class OnGpu(Squares):
        device = torch.device("cuda")

        def __call__(self, images):
            sizes.append(len(images))
            return [super(OnGpu, self).__call__(image) for image in images]

    rows = []
    count, _, trouble = video.detect_in_video(str(clip), OnGpu(), tmp_path / "out.mp4", rows.append)
    assert count == 20 and trouble is None and max(sizes) > 1 and sum(sizes) == 20
    alone = []
    video.detect_in_video(str(clip), Squares(), tmp_path / "out2.mp4", alone.append)
    assert all(torch.equal(a["boxes"], b["boxes"]) and a["time"] == b["time"] for a, b in zip(rows, alone))


class OnGpu(Squares):
    """Takes several images at a time, and none that is blue; `sizes` of its batches."""

    device, tile = torch.device("cuda"), None

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __call__(self, images):
        if not isinstance(images, list):
            return self([images])[0]
        self.sizes.append(len(images))
        if any(image.getpixel((0, 0)) == (0, 0, 255) for image in images):
            raise RuntimeError("blue")
        return [super(OnGpu, self).__call__(image) for image in images]


def test_images_share_batches_on_a_gpu_and_one_that_fails_costs_no_other(detect, tmp_path):
    paths = [red_square(tmp_path / f"{i:02}.png", (80 + i, 60)) for i in range(20)]
    (tmp_path / "03.png").write_bytes(b"no image")
    Image.new("RGB", (60, 60), (0, 0, 255)).save(tmp_path / "12.png")
    gpu, good = OnGpu(), [f"{i:02}" for i in range(20) if i not in (3, 12)]
    status, out, error, rows = detect(*paths, detector=gpu)
    assert status == 2 and "2 of 20 files" in error and "12.png: blue" in error
    assert [row["image_id"] for row in rows] == good and "18 images" in out
    assert gpu.sizes == [7, 8, *[1] * 8, 4]  # the second batch again, image by image
    _, _, _, alone = detect(*paths, out=tmp_path / "alone")
    assert [row for row in alone if row["image_id"] != "12"] == rows
    assert all((tmp_path / "out" / f"{name}.jpg").exists() for name in good)


def test_a_video_that_can_not_be_written_is_detected_in_all_the_same(detect, tmp_path):
    clip = write_intra(tmp_path / "clip.mp4", range(0, 1000, 100))
    (tmp_path / "out" / "clip.mp4").mkdir(parents=True)
    status, _, error, rows = detect(clip)
    assert status == 2 and "can't be written" in error and len(rows) == 10


# Tiles and large images


def test_an_object_larger_than_a_tile_is_found_whole():
    image = Image.new("RGB", (1000, 700))
    ImageDraw.Draw(image).rectangle((100, 50, 899, 649), fill="red")
    ImageDraw.Draw(image).rectangle((20, 670, 39, 689), fill="red")
    alone = RedSquares()

    def boxes_in(images):
        found = []
        for picture in images:
            pixels = np.asarray(picture)[..., 0] > 128
            parts = [alone(picture.crop((0, 0, picture.width, min(picture.height, 650))))]
            if picture.height == 700 and pixels[670:].any():
                parts[0]["boxes"][0] = torch.tensor([100.0, 50, 900, 650])
            found.append({key: parts[0][key] for key in ("scores", "labels", "boxes")})
        return found

    found = detect_in_tiles(boxes_in, image, 256)
    assert [100, 50, 900, 650] in found["boxes"].tolist()
    areas = (found["boxes"][:, 2:] - found["boxes"][:, :2]).prod(1)
    assert (areas > 256 * 256).sum() == 1 and len(found["boxes"]) == 1  # its pieces are not others


def test_a_long_name_is_refused_in_a_line(detect, tmp_path):
    status, _, error, _ = detect(tmp_path / ("a" * 300) / "x.jpg")
    assert status == 2 and "can't be opened (File name too long)" in error and error.count("\n") == 1


def test_ctrl_c_before_the_first_frame_ends_all(detect, tmp_path, monkeypatch):
    red_square(tmp_path / "z.png")
    write_intra(tmp_path / "clip.mp4", range(0, 1000, 100))

    def stop(number):
        if number == 0:
            raise KeyboardInterrupt

    status, _, error, rows = detect(tmp_path / "clip.mp4", tmp_path / "z.png", detector=Squares(stop))
    assert status == 130 and rows == [], error


@pytest.mark.parametrize("size", [(9000, 8000), (14000, 13500)])  # the second is over Pillow's own limit
def test_a_large_image_opens_with_the_option_that_the_message_names(size, detect, tmp_path):
    Image.new("1", size).save(tmp_path / "scan.png")
    status, _, error, _ = detect(tmp_path / "scan.png")
    assert status == 2 and "decompression bomb" in error and "--large-images" in error
    if size[0] < 10_000:  # the other takes seconds
        status, _, error, rows = detect(tmp_path / "scan.png", "--large-images", detector=Small())
        assert status == 0 and rows == [], error
    else:
        transforms.allow_large_images(True)
        assert transforms.open_image(tmp_path / "scan.png").size == size
    status, _, error, _ = detect(tmp_path / "scan.png")  # the option is not kept
    assert status == 2


class Small(Squares):
    """Finds nothing, at once."""

    def __call__(self, image):
        return super().__call__(Image.new("RGB", (8, 8)))


@pytest.mark.parametrize("script", [train, infer, evaluate, datasets, export, features, compare_patches])
def test_every_script_that_opens_images_has_the_option_that_messages_name(script, monkeypatch, capsys):
    status, out, _ = called(script.main, ["--help"], monkeypatch, capsys)
    assert not status and "--large-images" in out


def test_training_has_the_option_too(tmp_path, monkeypatch, capsys):
    assert "large_images" in train.Settings().__dict__
    root = write_coco(tmp_path / "data", {"train": 2, "val": 1})
    Image.new("1", (6000, 6000)).save(root / "train" / "000.png")
    labels = root / "annotations" / "instances_train.json"
    content = json.loads(labels.read_text())
    content["images"][0] |= {"width": 6000, "height": 6000}
    labels.write_text(json.dumps(content))
    arguments = ["--data", root, *SMALL, "--steps", 1, "--out", tmp_path / "run"]
    status, _, error = called(train.main, arguments, monkeypatch, capsys)
    assert status == 2 and "--large-images" in error
    status, _, error = called(train.main, [*arguments, "--large-images"], monkeypatch, capsys)
    assert status == 0, error


# Values that can't be


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--threshold", "1.5"], "--threshold 1.5: has to be a score, in 0 .. 1"),
        (["--threshold", "-0.1"], "--threshold -0.1"),
        (["--threshold", "nan"], "--threshold nan"),
        (["--image-size", "0"], "--image-size 0: has to be in 1 .. 10,000"),
        (["--image-size", "-3"], "--image-size -3"),
        (["--device", "cuda:77"], "--device cuda:77: there is no such device here"),
        (["--device", "fridge"], "--device fridge: there is no such device here"),
        (["--device", "meta"], "--device meta: there is no such device here"),
    ],
)
def test_a_value_that_can_not_be_is_refused_in_a_line(arguments, message, run_file, tmp_path, monkeypatch, capsys):
    red_square(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    status, _, error = called(infer.main, ["x.png", "--checkpoint", run_file, *arguments], monkeypatch, capsys)
    assert status == 2 and message in error and error.count("\n") == 1, error


def test_weights_that_are_not_numbers_are_refused(run_file, tmp_path):
    content = read_checkpoint(run_file)
    key = next(iter(content["model"]))
    content["model"][key].view(-1)[0] = float("nan")
    save_checkpoint(tmp_path / "nan.pth", {k: v for k, v in content.items() if k != "format"})
    with pytest.raises(UserError, match="nan.pth: 1 of its .* weights are not finite .*--lr"):
        load(tmp_path / "nan.pth")


# Files of weights


def test_the_weights_of_a_folder_of_ours_keep_its_classes(run_file, tmp_path):
    detector = load(run_file, threshold=0.0, device="cpu")
    detector.save(tmp_path / "mine")
    again = load(tmp_path / "mine" / "model.safetensors", threshold=0.0, device="cpu")
    assert again.classes == CLASSES
    same(again(photo()), detector(photo()))


def test_cocos_names_are_for_released_files_alone(tmp_path, capsys):
    state = reference_state("ecdet_s")
    torch.save({"model": state}, tmp_path / "released.pth")
    assert read_checkpoint(tmp_path / "released.pth")["classes"][0] == "person"
    assert "taken to be COCO's" in capsys.readouterr().out
    ours = {key: v.contiguous() for key, v in state.items() if not key.endswith((".up", ".reg_scale"))}
    save_file(ours, tmp_path / "model.safetensors")  # our own weights, without the config.json that names the classes
    content = read_checkpoint(tmp_path / "model.safetensors")
    assert content["classes"][0] == "class 0" and "names are not in the file" in capsys.readouterr().out


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "backbone.", "model.", "ema.", "teacher.", "module.model."]
)
@pytest.mark.parametrize("name, file", [("dinov2-small", "dinov2_vits14"), ("ecvitt", "ecvitt")])
def test_prefixes_of_wrappers_are_taken_off(prefix, name, file, tmp_path, capsys):
    state = reference_state(file)
    torch.save(state, tmp_path / "plain.pth")
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "wrapped.pth")
    plain = build_backbone(name, tmp_path / "plain.pth").state_dict()
    assert "taken off" not in capsys.readouterr().out
    wrapped = build_backbone(name, tmp_path / "wrapped.pth").state_dict()
    assert all(torch.equal(value, wrapped[key]) for key, value in plain.items())
    said = capsys.readouterr().out
    assert "taken off" in said and all(part + "." in said for part in prefix.split(".")[:-1])


def test_prefixes_stay_where_not_all_fits_without_them(tmp_path, capsys):
    state = {"module." + key: value for key, value in reference_state("ecvitt").items()}
    state["other.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="unexpected: .*module"):
        build_backbone("ecvitt", tmp_path / "odd.pth")
    assert "taken off" not in capsys.readouterr().out


@pytest.mark.parametrize("head", ["head", "fc", "classifier", "head_dist"])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_classifiers_head_is_named_with_what_to_do(head, prefix, tmp_path):
    state = {prefix + key: value for key, value in reference_state("dinov2_vits14").items()}
    state |= {f"{head}.weight": torch.zeros(1000, 384), f"{head}.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "timm.pth")
    with pytest.raises(UserError) as caught:
        build_backbone("dinov2-small", tmp_path / "timm.pth")
    message = str(caught.value)
    assert f"{head}.weight" in message and "classifier's" in message and "save the file without them" in message
    assert "missing" not in message


# Runs whose data was moved, or that have ended


def test_a_run_goes_on_where_its_data_was_moved_to(tmp_path, monkeypatch, capsys):
    root = write_coco(tmp_path / "old", {"train": 6, "val": 2})
    arguments = ["--data", root, *SMALL, "--steps", 3, "--workers", 0, "--out", tmp_path / "run"]
    status, _, error = called(train.main, arguments, monkeypatch, capsys)
    assert status == 0, error
    content = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    content["training"]["step"], content["config"]["steps"] = 2, 3
    torch.save(content, tmp_path / "run" / "last.pth")
    root.rename(tmp_path / "new")
    resume = ["--resume", tmp_path / "run"]
    status, _, error = called(train.main, resume, monkeypatch, capsys)
    assert status == 2 and "add where it is now: --data DIR" in error and error.count("\n") == 1
    status, _, error = called(train.main, [*resume, "--data", tmp_path / "new", "--lr", 1], monkeypatch, capsys)
    assert status == 2 and "leave out --lr" in error
    other = write_coco(tmp_path / "other", {"train": 2, "val": 1}, category_ids=(1, 2, 3))
    status, _, error = called(train.main, [*resume, "--data", other], monkeypatch, capsys)
    assert status == 2 and "its classes are no longer those" in error and error.count("\n") == 1
    status, out, error = called(train.main, [*resume, "--data", tmp_path / "new"], monkeypatch, capsys)
    assert status == 0 and "warning" not in out, error
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == str(tmp_path / "new")

    torch.save(content, tmp_path / "run" / "last.pth")
    fewer = write_coco(tmp_path / "fewer", {"train": 5, "val": 2})
    status, out, error = called(train.main, [*resume, "--data", fewer], monkeypatch, capsys)
    assert status == 0 and "5 + 2 images" in out and "6 + 2" in out, error


def test_paths_are_kept_relative_to_the_run(tmp_path, monkeypatch, capsys):
    write_coco(tmp_path / "project" / "my data", {"train": 6, "val": 2})
    (tmp_path / "project" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "project" / "sub")
    arguments = ["--data", "../my data", *SMALL, "--steps", 3, "--workers", 0, "--out", "runs/a"]
    status, _, error = called(train.main, arguments, monkeypatch, capsys)
    assert status == 0, error
    content = torch.load("runs/a/last.pth", weights_only=True)
    content["training"]["step"], content["config"]["steps"] = 2, 3
    torch.save(content, "runs/a/last.pth")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project").rename(tmp_path / "moved")
    status, out, error = called(train.main, ["--resume", "moved/sub/runs/a"], monkeypatch, capsys)
    assert status == 0 and "moved/my data: coco layout" in out, error
    monkeypatch.chdir("/")
    status, out, error = called(evaluate.main, [tmp_path / "moved/sub/runs/a/best.pth"], monkeypatch, capsys)
    assert status == 0 and "AP50" in out, error


def test_a_run_that_has_ended_says_that_nothing_is_left(tmp_path, monkeypatch, capsys):
    root = write_coco(tmp_path / "my data", {"train": 4, "val": 2})
    arguments = ["--data", root, *SMALL, "--steps", 2, "--workers", 0, "--out", tmp_path / "run"]
    status, _, error = called(train.main, arguments, monkeypatch, capsys)
    assert status == 0, error
    before = (tmp_path / "run" / "last.pth").read_bytes()
    status, out, error = called(train.main, ["--resume", tmp_path / "run"], monkeypatch, capsys)
    assert status == 0 and "nothing is left" in out, error
    line = next(line for line in out.splitlines() if "train.py" in line)
    assert f"--data '{root}'" in line and f"--init {tmp_path / 'run' / 'best.pth'}" in line
    assert (tmp_path / "run" / "last.pth").read_bytes() == before


# Sheets of sane size


@pytest.mark.parametrize(
    "sizes", [[(2400, 8)] * 6, [(1200, 60), (640, 480)] * 6, [(8, 2400), (640, 480)], [(4000, 3000)] * 9]
)
def test_sheets_never_exceed_four_megapixels(sizes):
    images = [Image.new("RGB", size) for size in sizes]
    found = {"boxes": torch.tensor([[1.0, 1, 6, 6]]), "labels": torch.tensor([0]), "scores": torch.tensor([0.9])}
    drawn = [plots.draw_boxes(image, found["boxes"], [0], ["cat"]) for image in images]
    sheets = [
        plots.tile(images, 4),
        plots.tile(drawn, 3),
        plots.draw_samples([(image, found, found) for image in images], ["cat"]),
    ]
    for sheet in sheets:
        assert sheet.width * sheet.height < 4.2e6 and max(sheet.size) < 12_000 and min(sheet.size) >= 8, sheet.size
    for image, drawing in zip(images, drawn):
        assert drawing.width * drawing.height <= max(4e6, image.width * image.height)


def test_a_mistake_on_a_long_strip_is_cropped_at_once(monkeypatch):
    strip = Image.new("RGB", (60_000, 12), "grey")
    strip.paste("red", (30_000, 0, 31_000, 12))
    largest = []
    real = Image.Image.crop
    monkeypatch.setattr(
        Image.Image, "crop", lambda self, box: largest.append((box[2] - box[0]) * (box[3] - box[1])) or real(self, box)
    )
    crop, box = plots.crop_around(strip, [10.0, 0, 59_000, 12], 300)
    assert crop.size == (300, 300) and max(largest) < 5e6 and 0 <= box[0] < box[2] <= 300


def test_thin_images_are_detected_in_and_drawn(detect, tmp_path):
    for number, size in enumerate([(6000, 12), (1, 1), (2400, 8), (3, 2000)]):
        Image.new("RGB", size, (230, 20, 20)).save(tmp_path / f"{number}.png")
    status, _, error, rows = detect(*sorted(tmp_path.glob("*.png")))
    assert status == 0 and len(rows) == 4, error
    for path in (tmp_path / "out").glob("*.jpg"):
        drawing = Image.open(path)
        assert drawing.width * drawing.height <= 1e6


def test_names_of_classes_do_not_overlap(tmp_path, monkeypatch):
    names, drawn = ["traffic light", "double decker bus", "construction worker", "cat"], []
    monkeypatch.setattr(plots, "save_figure", lambda figure, out: drawn.append(figure))
    for count in (1, 3, 4):
        plots.draw_confusion(np.eye(count + 1, dtype=int), names[:count], tmp_path / "a.png")
        drawn[-1].draw_without_rendering()
        boxes = [label.get_window_extent() for label in drawn[-1].axes[0].get_xticklabels()]
        assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))


def test_diagrams_show_names_in_any_script(tmp_path):
    names = ["$a_$", "\\frac{", "猫", "كلب", "\ue000", "кот"]
    curves = {name: (0.5, [1.0] * 101) for name in names[::-1]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of letters that a font doesn't have
        plots.draw_precision_recall(curves, names, tmp_path / "a.png")
        plots.draw_confusion(np.eye(7, dtype=int), names, tmp_path / "b.png")
    assert Image.open(tmp_path / "a.png").width > 500 and Image.open(tmp_path / "b.png").width > 400
