import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import infer
import video
from detector import Detector
from errors import UserError
from tiles import OVERLAP, detect_in_tiles, merge, tile_starts


class RedSquares:
    """Stands in for a trained detector: finds what is red, exactly."""

    classes, category_ids, threshold = ["red"], [7], 0.4

    def __call__(self, image):
        red = np.asarray(image).astype(int)
        mask = (red[..., 0] > 180) & (red[..., 1] < 90) & (red[..., 2] < 90)
        if not mask.any():
            return {
                "scores": torch.zeros(0),
                "labels": torch.zeros(0, dtype=torch.long),
                "boxes": torch.zeros(0, 4),
                "names": [],
            }
        ys, xs = mask.nonzero()
        box = torch.tensor([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]).float()
        return {"scores": torch.tensor([0.9]), "labels": torch.tensor([0]), "boxes": box, "names": ["red"]}


def write_clip(path, seconds=10, rate=12, size=(640, 480)):
    """A red square that moves to the right over grey; every frame says where it is."""
    av = pytest.importorskip("av")
    container = av.open(str(path), "w")
    stream = container.add_stream("mpeg4", rate=rate)
    stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
    for i in range(seconds * rate):
        image = Image.new("RGB", size, (110, 110, 110))
        ImageDraw.Draw(image).rectangle((20 + 4 * i, 200, 20 + 4 * i + 79, 279), fill=(230, 20, 20))
        container.mux(stream.encode(av.VideoFrame.from_image(image)))
    container.mux(stream.encode())
    container.close()
    return seconds * rate


def test_every_frame_of_a_clip_comes_out_with_its_box(tmp_path):
    av = pytest.importorskip("av")
    count = write_clip(tmp_path / "clip.mp4")
    rows = []
    count, seconds, trouble = video.detect_in_video(
        str(tmp_path / "clip.mp4"), RedSquares(), tmp_path / "out.mp4", rows.append
    )
    assert count == len(rows)
    assert len(rows) == count == 120 and trouble is None and all(value > 0 for value in seconds.values())
    assert [row["frame"] for row in rows] == list(range(120)) and rows[60]["time"] == pytest.approx(5.0, abs=0.01)
    with av.open(str(tmp_path / "out.mp4")) as written:
        assert float(written.streams.video[0].average_rate) == 12
        frames = [frame.to_image() for frame in written.decode(video=0)]
    assert len(frames) == 120 and frames[0].size == (640, 480)
    line = np.array((230, 25, 75))  # the colour of the first class
    for i in (0, 50, 119):
        x = 20 + 4 * i
        assert torch.allclose(rows[i]["boxes"][0], torch.tensor([x, 200, x + 80, 280]).float(), atol=3)
        left = np.asarray(frames[i])[230:250, x - 3 : x + 4].astype(int)
        assert np.abs(left - line).sum(-1).min() < 120  # drawn around it
        assert np.abs(np.asarray(frames[i])[100, (x + 300) % 600].astype(int) - 110).max() < 20


def test_a_video_from_the_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("av")
    write_clip(tmp_path / "clip.mp4", seconds=1)
    monkeypatch.setattr(infer, "load", lambda *args, **options: RedSquares())
    monkeypatch.setattr(RedSquares, "device", torch.device("cpu"), raising=False)
    monkeypatch.setattr(
        sys, "argv", ["infer.py", str(tmp_path / "clip.mp4"), "--checkpoint", "x", "--out", str(tmp_path / "found")]
    )
    infer.main()
    said = capsys.readouterr().out
    assert "12 frames; frames/s: decoding" in said and "network" in said and "drawing" in said
    import json

    rows = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert (
        len(rows) == 12
        and rows[3]["frame"] == 3
        and rows[3]["category_id"] == 7
        and (tmp_path / "found" / "clip.mp4").stat().st_size > 0
    )


def test_what_is_no_video(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="videos and cameras need PyAV; pip install av"):
        video.open_video("clip.mp4")
    monkeypatch.undo()
    pytest.importorskip("av")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match="text.mp4: can't be opened as a video"):
        video.open_video(str(tmp_path / "text.mp4"))
    with pytest.raises(UserError, match="can't be opened as a camera"):
        video.open_video("93")


@pytest.mark.parametrize("length, side", [(100, 640), (640, 640), (641, 640), (4000, 640), (1500, 500)])
def test_tiles_cover_the_picture_and_overlap(length, side):
    starts = tile_starts(length, side)
    assert starts[0] == 0 and (len(starts) == 1 or starts[-1] + side == length)
    assert all(second - first <= side * (1 - OVERLAP) + 1 for first, second in zip(starts, starts[1:]))


def squares_in(images):
    """Every red square of 20 pixels' grid cells in an image, as it is cut: a detector that knows only its tile."""
    found = []
    for image in images:
        red = np.asarray(image)[..., 0] > 128
        boxes = []
        seen = np.zeros_like(red)
        for y, x in zip(*red.nonzero()):
            if seen[y, x]:
                continue
            y2, x2 = y, x
            while y2 < red.shape[0] and red[y2, x]:
                y2 += 1
            while x2 < red.shape[1] and red[y, x2]:
                x2 += 1
            seen[y:y2, x:x2] = True
            boxes.append([x, y, x2, y2])
        found.append(
            {
                "scores": torch.full((len(boxes),), 0.9),
                "labels": torch.zeros(len(boxes), dtype=torch.long),
                "boxes": torch.tensor(boxes).reshape(-1, 4).float(),
            }
        )
    return found


def test_each_object_of_a_large_picture_is_found_once():
    rng = np.random.default_rng(0)
    image = Image.new("RGB", (1000, 700))
    truth = []
    for y in range(0, 700, 50):
        for x in range(0, 1000, 50):
            if rng.random() < 0.6:
                w, h = rng.integers(8, 40, 2)
                ImageDraw.Draw(image).rectangle((x + 3, y + 3, x + 2 + w, y + 2 + h), fill="red")
                truth.append((x + 3, y + 3, x + 3 + w, y + 3 + h))
    found = detect_in_tiles(squares_in, image, 256)
    assert sorted(map(tuple, found["boxes"].int().tolist())) == sorted(
        (int(a), int(b), int(c), int(d)) for a, b, c, d in truth
    )


def test_within_a_tile_nothing_is_suppressed_and_classes_are_apart():
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [0, 1, 10, 11]]).float()
    detections = {"scores": torch.tensor([0.9, 0.8, 0.7, 0.6]), "labels": torch.tensor([0, 0, 1, 0]), "boxes": boxes}
    none = torch.zeros(4, dtype=torch.bool)
    assert merge(detections, none, torch.tensor([0, 0, 1, 1])).tolist() == [0, 1, 2]
    cut = torch.tensor([True, False, False, False])  # though it has the best score
    assert merge(detections, cut, torch.tensor([0, 1, 0, 1])).tolist() == [1, 2, 3]


def test_less_sure_detections_change_nothing_in_the_sure_ones():
    rng = np.random.default_rng(0)
    for _ in range(50):
        corner = torch.from_numpy(rng.integers(0, 40, (30, 2))).float()
        boxes = torch.cat([corner, corner + torch.from_numpy(rng.integers(10, 40, (30, 2)))], 1)
        found = {"scores": torch.from_numpy(rng.random(30)), "labels": torch.from_numpy(rng.integers(0, 2, 30))}
        found, cut, home = found | {"boxes": boxes}, torch.rand(30) < 0.5, torch.randint(3, (30,))
        sure = torch.tensor([0.4, 0.6])
        above = found["scores"] >= sure[found["labels"]]
        alone = merge({key: value[above] for key, value in found.items()}, cut[above], home[above], sure)
        kept = merge(found, cut, home, sure)
        assert above.nonzero().flatten()[alone].tolist() == kept[above[kept]].tolist()


def test_a_detector_with_tiles_says_what_its_detector_finds_in_each(monkeypatch):
    whole = Detector.__new__(Detector)
    whole.tile, whole.threshold, whole.classes = 256, 0.5, ["red"]
    whole.value_range, whole.by_class = None, {}
    monkeypatch.setattr(whole, "detect", squares_in, raising=False)
    image = Image.new("RGB", (900, 300))
    ImageDraw.Draw(image).rectangle((240, 100, 269, 119), fill="red")
    found = whole(image)
    assert found["boxes"].tolist() == [[240, 100, 270, 120]] and found["names"] == ["red"]
    assert whole(image, threshold=0.95)["names"] == []
