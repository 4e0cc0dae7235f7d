"""train.py --tile: large images in windows of their own resolution, in training, evaluation and detection."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_coco
from PIL import Image
from test_commands import called

import datasets
import evaluate
import train
from checkpoint import read_checkpoint
from datasets import DetectionDataset, advise_tiles
from detector import load
from errors import UserError
from layouts import load_splits
from splits import Split, make_record
from tiles import OVERLAP, VISIBLE, cut_into_tiles, detect_in_tiles, tiles_of
from transforms import read_image


def random_split(seed, size=(500, 330), objects=60):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 1, (objects, 2)) * (np.array(size) - 40)
    boxes = np.hstack([corners, corners + rng.uniform(4, 40, (objects, 2))])
    rows = [(*box, i % 3, np.prod(box[2:] - box[:2]), i % 7 == 0) for i, box in enumerate(boxes)]
    empty = make_record(1, Path("b.png"), size, [])
    return Split("train", ["a", "b", "c"], [1, 2, 3], [make_record(0, Path("a.png"), size, rows), empty])


@pytest.mark.parametrize("seed", range(5))
def test_a_tile_has_the_objects_of_which_enough_lies_in_it(seed):
    split = random_split(seed)
    whole = split.records[0]
    tiles = [r for r in cut_into_tiles(split, 128, for_training=False).records if r.tile and r.whole == 0]
    assert [r.tile for r in tiles] == tiles_of(500, 330, 128) and len({r.image_id for r in tiles}) == len(tiles)
    for tile in tiles:
        left, top, right, bottom = tile.tile
        assert (tile.width, tile.height) == (right - left, bottom - top)
        expected = []
        for (x1, y1, x2, y2), label, ignored in zip(whole.boxes, whole.labels, whole.ignored):
            a, b, c, d = max(x1, left), max(y1, top), min(x2, right), min(y2, bottom)
            part = max(0, c - a) * max(0, d - b) / ((x2 - x1) * (y2 - y1))
            if part >= VISIBLE:
                expected.append((a - left, b - top, c - left, d - top, label, ignored))
        found = np.column_stack([tile.boxes, tile.labels, tile.ignored])
        assert found == pytest.approx(np.array(expected).reshape(-1, 6))
    objects = {tuple(box) for box in whole.boxes if (box[2:] - box[:2]).max() < OVERLAP * 128}
    inside = {tuple(np.round(box + np.array(tile.tile[:2] * 2), 6)) for tile in tiles for box in tile.boxes}
    assert {tuple(np.round(box, 6)) for box in objects} <= inside  # each is whole in some tile


def test_as_many_tiles_without_objects_are_trained_on_as_there_are_with_some():
    with pytest.raises(UserError, match="no object fits into a tile of 128 pixels"):
        cut_into_tiles(random_split(0, objects=1), 128, for_training=True)  # the only object is ignored
    tiles = cut_into_tiles(random_split(0, objects=3), 128, for_training=True)
    full = [r for r in tiles.records if r.tile and (~r.ignored).any()]
    whole = [r for r in tiles.records if r.tile is None]
    assert len(whole) == 2 and 0 < len(full) and len(tiles.records) == 2 * (len(full) + len(whole))
    assert f"2 images become {len(full) + 2}, tiles of 128 pixels with objects and whole images" in tiles.remarks[-1]


def test_tiles_are_the_pixels_of_their_image(tmp_path):
    split = load_splits(write_coco(tmp_path, {"train": 2, "val": 2}))[0]
    tiles = cut_into_tiles(split, 32, for_training=False)
    data = DetectionDataset(tiles, None)
    for index, record in enumerate(tiles.records):
        image = read_image(record.path)
        expected = np.asarray(image.crop(record.tile) if record.tile else image)
        pixels, target = data.load(index)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
        assert target["orig_size"].tolist() == [record.height, record.width]


@pytest.mark.parametrize("seed", range(3))
def test_evaluation_joins_tiles_as_detection_does(seed):
    """Every tile gives random detections; the same by either way."""
    split = random_split(seed)
    tiles = cut_into_tiles(split, 128, for_training=False)
    rng, found = np.random.default_rng(seed), {}
    for index, record in enumerate(tiles.records):
        corners = rng.uniform(0, 1, (9, 2)) * (np.array([record.width, record.height]) - 30)
        boxes = np.hstack([corners, corners + rng.uniform(5, 30, (9, 2))])
        found[index] = {
            "boxes": torch.from_numpy(boxes).float(),
            "labels": torch.from_numpy(rng.integers(0, 3, 9)),
            "scores": torch.from_numpy(rng.uniform(0.02, 1, 9)).float(),
        }
    joined = evaluate.join_all(tiles, found)
    for whole, record in enumerate(split.records):
        own = iter([[found[i]] for i, tile in enumerate(tiles.records) if tile.whole == whole])
        image = Image.new("RGB", (record.width, record.height))
        expected = detect_in_tiles(lambda images, own=own: next(own), image, 128)
        for key in ("boxes", "labels", "scores"):
            assert torch.equal(joined[whole][key], expected[key])


def test_a_run_in_tiles_is_evaluated_resumed_and_detects_in_tiles(tmp_path, monkeypatch, capsys):
    data, run = write_coco(tmp_path / "data", {"train": 5, "val": 3}), tmp_path / "run"
    options = ["--backbone", "ecvit-nano", "--batch-size", "4", "--num-queries", "10"]
    arguments = ["--data", data, *options, "--tile", 32, "--steps", 3, "--out", run]
    status, out, error = called(train.main, arguments, monkeypatch, capsys)
    assert status == 0 and "tiles of 32 pixels" in out, error
    content = read_checkpoint(run / "best.pth")
    assert content["config"]["tile"] == 32 and content["config"]["image_size"] == 32
    assert load(run / "best.pth", device="cpu").tile == 32 and load(run / "best.pth", device="cpu", tile=48).tile == 48
    status, out, error = called(evaluate.main, [run / "best.pth"], monkeypatch, capsys)
    assert status == 0, error
    figures = content["figures"]
    printed = dict(line.split()[:2] for line in out.splitlines() if line.startswith("AP"))
    assert float(printed["AP"]) == pytest.approx(figures["AP"], abs=2e-3)
    last = torch.load(run / "last.pth", weights_only=True)
    last["training"]["step"], last["config"]["steps"] = 2, 4
    torch.save(last, run / "last.pth")
    status, out, error = called(train.main, ["--resume", run], monkeypatch, capsys)
    assert status == 0 and "were" not in error, error


def test_tiles_are_advised_where_objects_lose_their_pixels(tmp_path, monkeypatch, capsys):
    small = make_record(0, Path("a.png"), (3000, 2000), [(10, 10, 40, 40, 0, 900, False)] * 3)
    split = Split("train", ["a"], [1], [small])
    assert "under 10 pixels at --image-size 640, but 30 in the files" in advise_tiles(split, 640)
    assert advise_tiles(split, 1200) is None
    tiny = make_record(0, Path("a.png"), (300, 200), [(10, 10, 14, 14, 0, 16, False)] * 3)
    assert advise_tiles(Split("train", ["a"], [1], [tiny]), 640) is None  # tiles would show no more of them
    fits = advise_tiles(Split("train", ["a"], [1], [tiny]), 64)
    assert "but 4 in the files: train.py --image-size 224 shows" in fits  # the whole image is no larger than a tile
    wide = make_record(0, Path("a.png"), (4000, 500), [(10, 10, 30, 30, 0, 400, False)] * 3)
    assert "--tile 640" in advise_tiles(Split("train", ["a"], [1], [wide]), 512)  # resized to a width of 853
    root = write_coco(tmp_path, {"train": 2, "val": 2}, size=(3000, 2000))
    status, out, error = called(datasets.main, [root, "--out", tmp_path / "s.png"], monkeypatch, capsys)
    assert status == 0 and "suspicious:" in out and "train.py --tile 640" in out, error


def test_a_tile_decides_the_image_size_whatever_else_does(tmp_path, monkeypatch, capsys):
    data = write_coco(tmp_path / "data", {"train": 4, "val": 2})
    arguments = ["--data", data, "--backbone", "ecvit-nano", "--steps", 1, "--batch-size", 2, "--out", tmp_path / "run"]
    status, _, error = called(train.main, [*arguments, "--tile", 16], monkeypatch, capsys)
    assert status == 2 and "--tile 16: has to be in 32 .. 10,000 pixels" in error and error.count("\n") == 1
    status, out, error = called(train.main, [*arguments, "--tile", 40, "--detector", "ecdet"], monkeypatch, capsys)
    assert status == 0 and "image_size=32" in out, error
