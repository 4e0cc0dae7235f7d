"""infer.py --labels: detections come back as a dataset that train.py opens; --least-sure: what to label next."""

import errno
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_commands import called

import infer
from layouts import load_splits
from mistakes import doubt

CLASSES = ["cat & <dog>", "ant", "кот\x01"]


class Finds:
    """A detector whose detections depend on the image's width."""

    classes, category_ids, threshold, value_range = CLASSES, [7, 3, 90], 0.4, None
    device = torch.device("cpu")

    def __init__(self, stop_at=None):
        self.stop_at, self.calls, self.found = stop_at, 0, {}

    def lowest_scores(self):
        return torch.full((3,), 0.4)

    def __call__(self, image, threshold=0.4):
        self.calls += 1
        if self.calls == self.stop_at:
            signal.raise_signal(signal.SIGINT)
        rng = np.random.default_rng(image.width)
        corners = rng.uniform(0, 20, (4, 2))
        boxes = torch.from_numpy(np.hstack([corners, corners + rng.uniform(3, 20, (4, 2))])).float()
        scores, labels = torch.tensor([0.9, 0.8, 0.41, 0.1]), torch.from_numpy(rng.permutation([0, 1, 2, 0]))
        keep = scores >= threshold
        found = {"boxes": boxes[keep], "labels": labels[keep], "scores": scores[keep]}
        found["names"] = [CLASSES[label] for label in found["labels"]]
        if threshold == 0.4:
            self.found[image.size] = found
        return found


def images(folder):
    folder.mkdir()
    for i, name in enumerate(["a.jpg", "b c.png", "d.PNG", "e.bmp", "f.webp"]):
        Image.new("RGB", (50 + i, 40 + i)).save(folder / name)
    turned = Image.new("RGB", (60, 45))
    turned.getexif()[0x0112] = 6  # shown 45 wide and 60 high
    turned.save(folder / "turned.jpg", exif=turned.getexif())
    return folder


def detect(arguments, monkeypatch, capsys, detector=None):
    detector = detector or Finds()
    monkeypatch.setattr(infer, "load", lambda *_, **__: detector)
    return detector, *called(infer.main, ["--checkpoint", "x", *arguments], monkeypatch, capsys)


@pytest.mark.parametrize("layout", ["coco", "voc", "yolo"])
def test_labels_open_as_what_was_detected(layout, tmp_path, monkeypatch, capsys):
    folder = images(tmp_path / "in")
    arguments = [folder, "--labels", layout, "--out", tmp_path / "out"]
    detector, status, out, error = detect(arguments, monkeypatch, capsys)
    assert status == 0, error
    splits = load_splits(tmp_path / "out" / "dataset")
    assert f"{layout} layout" in capsys.readouterr().out and sum(len(s.records) for s in splits) == 6
    for split in splits:
        for record in split.records:
            found = detector.found[record.width, record.height]
            names = [split.classes[label] for label in record.labels]
            names = [name.replace("?", "\x01") for name in names]  # which XML can't hold
            assert names == found["names"] and np.abs(record.boxes - found["boxes"].numpy()).max() < 0.01
            assert record.path.read_bytes() in [path.read_bytes() for path in folder.iterdir()]


def test_labels_of_equal_names_keep_apart_and_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (50 + len(folder), 40)).save(tmp_path / folder / "x.png")
    arguments = [tmp_path / "a", tmp_path / "b", "--labels", "yolo", "--out", tmp_path / "out"]
    _, status, _, error = detect(arguments, monkeypatch, capsys)
    assert status == 0, error
    assert {p.name for p in (tmp_path / "out/dataset/images").iterdir()} == {"a-x.png", "b-x.png"}
    _, status, _, error = detect(arguments, monkeypatch, capsys)
    assert status == 2 and "dataset: already exists" in error and error.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
@pytest.mark.parametrize("layout", ["coco", "voc", "yolo"])
def test_labels_of_file_names_that_are_no_text_open(layout, tmp_path, monkeypatch, capsys):
    folder = images(tmp_path / "in")
    os.rename(folder / "f.webp", os.fsencode(folder) + b"/caf\xe9.webp")
    arguments = [folder, "--labels", layout, "--out", tmp_path / "out"]
    _, status, _, error = detect(arguments, monkeypatch, capsys)
    assert status == 0, error
    assert sum(len(s.records) for s in load_splits(tmp_path / "out" / "dataset")) == 6


def test_an_image_whose_labels_can_not_be_written_is_not_in_the_dataset(tmp_path, monkeypatch, capsys):
    folder, write = images(tmp_path / "in"), Path.write_bytes

    def fill(path, data):
        if path.name == "f.xml":
            write(path, data[:9])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fill)
    _, status, _, error = detect([folder, "--labels", "voc", "--out", tmp_path / "out"], monkeypatch, capsys)
    assert status == 2 and "f.xml: can't be written (No space left on device)" in error
    assert sum(len(s.records) for s in load_splits(tmp_path / "out" / "dataset", val_fraction=0.4)) == 5


def test_ctrl_c_leaves_a_dataset_of_what_was_done(tmp_path, monkeypatch, capsys):
    arguments = [images(tmp_path / "in"), "--labels", "coco", "--out", tmp_path / "out"]
    _, status, _, error = detect(arguments, monkeypatch, capsys, Finds(stop_at=4))
    assert status == 130, error
    assert sum(len(s.records) for s in load_splits(tmp_path / "out" / "dataset", val_fraction=0.4)) == 3


def test_videos_have_no_labels(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.mp4").write_bytes(b"")
    _, status, _, error = detect([tmp_path / "a.mp4", "--labels", "voc"], monkeypatch, capsys)
    assert status == 2 and "--labels and --least-sure are for images" in error


def test_the_most_doubtful_images_are_listed(tmp_path, monkeypatch, capsys):
    folder = images(tmp_path / "in")
    scores = {50: [0.9, 0.95], 51: [0.45], 52: [0.41, 0.9], 53: [], 54: [0.3], 45: [0.05]}

    class Doubts(Finds):
        def __call__(self, image, threshold=0.4):
            values = torch.tensor([s for s in scores[image.width] if s >= threshold])
            boxes, labels = torch.tensor([[0.0, 0, 9, 9]]).expand(len(values), 4), torch.zeros(len(values)).long()
            return {"boxes": boxes, "labels": labels, "scores": values, "names": ["ant"] * len(values)}

    arguments = [folder, "--least-sure", "3", "--out", tmp_path / "out"]
    _, status, out, error = detect(arguments, monkeypatch, capsys, Doubts())
    listed = [line.split("/")[-1] for line in out.splitlines() if line.startswith("to label next")]
    assert status == 0 and listed == ["b c.png (doubt 0.92)", "f.webp (doubt 0.75)", "d.PNG (doubt 0.58)"], out


def test_doubt_is_highest_at_the_threshold():
    assert doubt(np.array([0.4, 0.4]), 0.4) == 1 and doubt(np.array([1.0, 0.0]), 0.4) == 0
    assert doubt(np.array([]), 0.4) == 0 and doubt(np.array([0.7]), 0.4) == pytest.approx(0.5)
    assert doubt(np.array([0.2]), 0.4) == pytest.approx(0.5)
