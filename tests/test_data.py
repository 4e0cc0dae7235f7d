import itertools
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_coco
from PIL import Image
from test_commands import called
from torchvision import tv_tensors
from torchvision.ops import box_convert, box_iou

import checks
import demo_data
import transforms
from datasets import DetectionDataset, EndlessBatches, choose_image_size, collate, group_by_aspect_ratio
from demo_data import CLASSES, draw_picture, make_demo, overlap
from errors import UserError
from evaluate import batches_of
from layouts import load_splits
from metrics import measure
from runs import augmentation_phase
from splits import Record, Split
from transforms import (
    MEAN,
    STD,
    allow_large_images,
    eval_transforms,
    mix_up,
    mosaic,
    read_image,
    reduction,
    train_transforms,
)


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def write_voc(root, pictures=4, size=(60, 40)):
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for i in range(pictures):
        Image.new("RGB", size, (i * 30, 90, 90)).save(root / "JPEGImages" / f"p{i}.jpg")
        (root / "Annotations" / f"p{i}.xml").write_text(
            f"<annotation><filename>p{i}.jpg</filename><size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
            "<object><name>dog</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>"
            "<object><name>cat</name><difficult>1</difficult><bndbox><xmin>30</xmin><ymin>5</ymin><xmax>50</xmax><ymax>25</ymax></bndbox></object>"
            "</annotation>"
        )
    (root / "ImageSets" / "Main" / "train.txt").write_text("p0\np1\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("p2\np3\n")
    return root


def test_category_ids_of_any_kind_become_labels_and_go_back(tiny_data):
    train, val = load_splits(tiny_data)
    assert train.category_ids == [7, 300, 90001] and train.classes == ["kind 7", "kind 300", "kind 90001"]
    assert {int(l) for r in train.records + val.records for l in r.labels} == {0, 1}
    assert len(train.records) == 12 and len(val.records) == 4


@pytest.mark.parametrize("annotations_folder", [True, False])
def test_both_coco_layouts_are_read_alike(tmp_path, annotations_folder):
    train, val = load_splits(write_coco(tmp_path / "a", {"train": 3, "val": 2}, annotations_folder=annotations_folder))
    assert (len(train.records), len(val.records)) == (3, 2) and train.records[0].path.exists()


def test_voc_counts_pixels_from_one_and_difficult_objects_are_ignored(tmp_path):
    train, val = load_splits(write_voc(tmp_path))
    assert train.classes == ["cat", "dog"] and (train.name, val.name) == ("train", "val")
    record = val.records[0]
    assert record.boxes.tolist() == [[0, 0, 20, 30], [29, 4, 50, 25]] and record.ignored.tolist() == [False, True]
    _, target = DetectionDataset(val, eval_transforms(40))[0]
    assert target["labels"].tolist() == [1]
    miss = {
        i: {"boxes": torch.tensor([[0.0, 0, 20, 30]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
        for i in range(2)
    }
    assert measure(val, miss)[0]["AP"] == pytest.approx(1)  # the difficult cats are not missed


def test_voc_prefers_trainval_and_test_and_takes_other_names(tmp_path):
    root = write_voc(tmp_path)
    (root / "ImageSets/Main/trainval.txt").write_text("p0\np1\np2\n")
    (root / "ImageSets/Main/test.txt").write_text("p3\n")
    assert [s.name for s in load_splits(root)] == ["trainval", "test"]
    assert [s.name for s in load_splits(root, "val", "train")] == ["val", "train"]
    with pytest.raises(UserError, match="nowhere.txt is missing; there are: test, train, trainval, val"):
        load_splits(root, "nowhere")


def test_broken_boxes_are_mended_or_dropped_and_counted(tmp_path):
    root = write_coco(tmp_path, {"train": 3, "val": 1})
    bad = [
        [10, 10, 0, 5],
        [-5, -5, 20, 20],
        [500, 500, 10, 10],
        [1, 1, float("nan"), 4],
        [40, 30, 100, 100],
        [5, 5, -3, 4],
    ]

    def change(data):
        for i, box in enumerate(bad):
            data["annotations"].append(
                {"id": 100 + i, "image_id": 10, "category_id": 1, "bbox": box, "area": 4, "iscrowd": 0}
            )

    edit(root / "annotations/instances_train.json", change)
    train, _ = load_splits(root)
    assert train.records[0].boxes[2:].tolist() == [[0, 0, 15, 15], [40, 30, 64, 48]]
    assert "2 boxes clipped to their image" in train.remarks
    assert "4 empty, inverted, outside or non-finite boxes dropped" in train.remarks


def test_crowds_train_nothing_and_are_not_misses(tmp_path):
    root = write_coco(tmp_path, {"train": 2, "val": 1})
    for name in ("train", "val"):
        edit(root / f"annotations/instances_{name}.json", lambda data: data["annotations"][0].update(iscrowd=1))
    train, val = load_splits(root)
    _, target = DetectionDataset(train, eval_transforms(48))[0]
    assert target["labels"].tolist() == [1] and train.most_objects == 2
    rest = val.records[0].boxes[1:]
    found = {0: {"boxes": torch.tensor(rest), "labels": torch.tensor([1]), "scores": torch.tensor([1.0])}}
    assert measure(val, found)[0]["AP"] == pytest.approx(1)


def test_a_picture_without_boxes_is_kept(tmp_path):
    root = write_coco(tmp_path, {"train": 2, "val": 1})
    edit(
        root / "annotations/instances_train.json",
        lambda data: data.update(annotations=[a for a in data["annotations"] if a["image_id"] != 10]),
    )
    train, _ = load_splits(root)
    assert len(train.records) == 2 and "1 images have no box (kept as background)" in train.remarks
    for draw in (None, 0.0, 0.9):
        image, target = DetectionDataset(train, train_transforms(48))[0, 1, draw, False]
        assert target["boxes"].shape == (0, 4) and image.ndim == 3


def test_unreadable_pictures_are_named_ten_at_most(tmp_path):
    root = write_coco(tmp_path, {"train": 14, "val": 1})
    for i in range(11):
        (root / "train" / f"{i:03d}.png").unlink()
    whole = (root / "train" / "011.png").read_bytes()
    (root / "train" / "011.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"12 of 14 images can't be read .*000.png: missing.*and 2 more") as caught:
        load_splits(root)
    assert str(caught.value).count(".png") == 10
    train, _ = load_splits(root, skip_bad_images=True)
    assert len(train.records) == 2 and train.remarks[0].startswith("12 images left out")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["annotations"][0].update(category_id=5), "annotation 1: KeyError 5"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "annotation 1: ValueError"),
        (lambda d: d["annotations"][0].update(image_id=[]), "annotation 1: TypeError"),
        (lambda d: d["annotations"][0].pop("bbox"), "annotation 1: KeyError"),
        (lambda d: d["images"].append(d["images"][0]), "an id is used twice"),
        (lambda d: d.pop("categories"), "not a COCO annotation file"),
        (lambda d: d["images"][0].pop("file_name"), "image 10: KeyError 'file_name'"),
        (lambda d: d["categories"][0].update(name="other"), "category 1 is 'kind 1' in val but 'other' in train"),
    ],
)
def test_annotations_that_make_no_sense_are_refused_at_the_start(tmp_path, change, message):
    root = write_coco(tmp_path, {"train": 2, "val": 1})
    edit(root / "annotations/instances_train.json", change)
    with pytest.raises(UserError, match=message):
        load_splits(root)


def test_folders_that_are_no_data_set(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_splits(tmp_path / "nowhere")
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="Looked for voc: .*yolo: data.yaml.* coco: a COCO .* Found: holiday.jpg"):
        load_splits(tmp_path)
    root = write_coco(tmp_path / "x", {"train": 2, "val": 1})
    (root / "annotations/instances_train.json").write_text('{"images": [')
    with pytest.raises(UserError, match="not a COCO annotation file"):
        load_splits(root)
    write_voc(tmp_path / "voc")
    (tmp_path / "voc/Annotations/p0.xml").write_text("<annotation><object>")
    with pytest.raises(UserError, match="p0.xml: not a Pascal VOC annotation"):
        load_splits(tmp_path / "voc")
    for name in ("p0", "p1"):
        (tmp_path / f"voc/Annotations/{name}.xml").unlink()
    with pytest.raises(UserError, match="'train' has 2 images but no box .2 images have no annotation file"):
        load_splits(tmp_path / "voc")


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (8, 1))
    grey = Image.fromarray(ramp)
    pictures = {
        "grey.png": grey,
        "la.png": grey.convert("LA"),
        "rgba.png": grey.convert("RGBA"),
        "palette.png": grey.convert("P"),
        "cmyk.jpg": grey.convert("CMYK"),
        "one.png": grey.convert("1"),
        "sixteen.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "float.tiff": Image.fromarray(ramp.astype(np.float32)),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.mode == "RGB" and image.size == (64, 8), name
        values = np.asarray(image, dtype=float)[..., 1]
        assert values[:, -1].mean() > 200 and values[:, 0].mean() < 60, name
    transparent = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    transparent.save(tmp_path / "t.png")
    assert np.asarray(read_image(tmp_path / "t.png")).min() == 255


@pytest.mark.parametrize("annotated_upright", [True, False])
def test_exif_turns_the_picture_unless_the_boxes_were_drawn_on_the_stored_pixels(tmp_path, annotated_upright):
    root = write_coco(tmp_path, {"train": 1, "val": 1})
    picture = Image.new("RGB", (48, 64), "black")  # stored; shown turned by 90 degrees: 64 wide, 48 high
    picture.paste("red", (0, 0, 20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(root / "train" / "000.png", exif=exif)

    def change(data):
        w, h = (64, 48) if annotated_upright else (48, 64)
        data["images"][0].update(width=w, height=h)
        box = [34, 0, 30, 20] if annotated_upright else [0, 0, 20, 30]
        data["annotations"] = [{"id": 1, "image_id": 10, "category_id": 1, "bbox": box, "area": 600, "iscrowd": 0}]

    edit(root / "annotations/instances_train.json", change)
    train, _ = load_splits(root)
    image, target = DetectionDataset(train, eval_transforms(48)).load(0)
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert image[0, y1:y2, x1:x2].min() > 200 and (image[0] > 100).sum() == 600


@pytest.mark.parametrize("kind", ["zoom", "meta"])
def test_boxes_follow_the_picture_through_the_training_transforms(kind):
    """A coloured rectangle on black: after every transform the box is where the colour is."""
    transform = train_transforms(200, kind)
    shapes, flipped = set(), set()
    for seed in range(60):
        torch.manual_seed(seed)
        h, w = (int(n) for n in torch.randint(100, 300, (2,)))
        x, y = int(torch.randint(0, w // 2, ())), int(torch.randint(0, h // 2, ()))
        bw, bh = int(torch.randint(20, w // 2, ())), int(torch.randint(20, h // 2, ()))
        pixels = torch.zeros(3, h, w, dtype=torch.uint8)
        pixels[0, y : y + bh, x : x + bw] = 255
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                [[x, y, x + bw, y + bh]], format="XYXY", canvas_size=(h, w), dtype=torch.float32
            ),
            "labels": torch.tensor([3]),
            "area": torch.tensor([1.0]),
            "iscrowd": torch.tensor([0]),
        }
        image, target = transform(tv_tensors.Image(pixels), target, float(torch.rand(())) if seed % 6 else None)
        H, W = target["size"].tolist()
        shapes.add((H, W))
        assert image.shape == (3, H, W) and max(H, W) <= 334
        red = (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])[0] > 0.5
        if len(target["boxes"]) == 0:
            assert red.sum() <= 60
            continue
        ys, xs = red.nonzero(as_tuple=True)
        cx, cy, width, height = (target["boxes"][0] * torch.tensor([W, H, W, H])).tolist()
        seen = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        wanted = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
        assert all(abs(float(a) - b) <= 1.6 for a, b in zip(seen, wanted)), (seed, seen, wanted)
        assert target["labels"].tolist() == [3]
        flipped.add(cx / W > 0.5)
    assert len(shapes) > 20 and len(flipped) == 2


def test_evaluation_sides_are_800_and_1333_in_proportion():
    for size, picture, wanted in (
        (800, (400, 500), (800, 1000)),
        (800, (100, 400), (333, 1332)),
        (240, (480, 640), (240, 320)),
        (400, (300, 100), (666, 222)),
    ):
        target = {"boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=picture)}
        target |= {key: torch.zeros(0) for key in ("labels", "area", "iscrowd")}
        image, _ = eval_transforms(size)(tv_tensors.Image(torch.zeros(3, *picture, dtype=torch.uint8)), target, 0.0)
        assert all(abs(a - b) <= 1 for a, b in zip(image.shape[1:], wanted)), (size, picture, image.shape)


def test_the_endless_stream_shows_every_picture_once_a_round_and_goes_on_anywhere():
    def take(n, **options):
        stream = iter(EndlessBatches(10, 4, seed=3, phase=lambda shown: "varied", **options))
        return [next(stream) for _ in range(n)]

    batches = take(15)
    flat = [item[0] for batch in batches for item in batch]
    assert all(len(batch) == 4 for batch in batches)
    for i in range(6):
        assert sorted(flat[10 * i : 10 * i + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]
    assert take(8, first=7) == batches[7:]
    assert len({item[1] for batch in batches for item in batch}) == 60  # no augmentation twice
    assert all(len({item[2] for item in batch}) == 1 for batch in batches)


def test_what_is_drawn_for_a_batch_is_independent():
    """No two of a batch's draws go together, in 500 batches, nor does one batch's draw with the next one's.

    They are: its side, whether it is mixed up and how, whether its first image is a mosaic, is flipped, and how much
    of it is shown.
    """
    draws = []
    for batch in itertools.islice(EndlessBatches(64, 4, seed=0, phase=lambda shown: "mixed"), 500):
        first = batch[0]
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(first.seed)
            flipped, shown = torch.rand(2).tolist()
        draws.append(
            [first.side, first.mix is not None, first.is_mosaic, batch[1].is_mosaic, flipped < 0.5, shown, first.index]
        )
    draws = np.array(draws, dtype=float)
    together = np.corrcoef(np.concatenate([draws[1:], draws[:-1]], axis=1).T)
    assert np.abs(together - np.eye(14)).max() < 0.2, (
        np.abs(together - np.eye(14)).max().round(3)
    )  # 0.17 would be chance at 1 in 10,000
    assert all(0.4 < draws[:, i].mean() < 0.6 for i in range(6))
    mixes = [
        batch[0].mix for batch in itertools.islice(EndlessBatches(64, 4, seed=0, phase=lambda shown: "mixed"), 500)
    ]
    sides = draws[[mix is not None for mix in mixes], 0]
    assert abs(np.corrcoef(sides, [mix for mix in mixes if mix is not None])[0, 1]) < 0.2


@pytest.mark.parametrize("world, pieces", [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_a_step_has_the_same_images_however_they_are_shared(world, pieces):
    """Up to four processes, or one that takes them in four pieces, augment the same images alike; also when resumed."""
    whole = list(itertools.islice(EndlessBatches(10, 8, seed=5, phase=lambda shown: "varied"), 7))
    for first in (0, 3):
        streams = [
            iter(EndlessBatches(10, 8, 5, lambda shown: "varied", first, (rank, world), pieces=pieces))
            for rank in range(world)
        ]
        for batch in whole[first:]:
            parts = [next(stream) for stream in streams for _ in range(pieces)]
            assert all(len(part) == 8 // world // pieces for part in parts)
            assert sorted(draw for part in parts for draw in part) == sorted(batch)


def test_batches_hold_pictures_of_like_proportions():
    proportions = torch.tensor([0.5, 1.0, 1.5, 2.0])[
        torch.randint(4, (150,), generator=torch.Generator().manual_seed(0))
    ]

    def make(proportions, **options):
        return iter(EndlessBatches(150, 8, seed=3, phase=lambda shown: "plain", aspect_ratios=proportions, **options))

    def mixed(batches):
        return sum(len(proportions[batch].unique()) > 1 for batch in batches) / len(batches)

    stream, flat = make(proportions), []
    batches = [[item[0] for item in next(stream)] for _ in range(150)]  # eight rounds
    for batch in batches:
        flat += batch
    assert all(sorted(flat[i : i + 150]) == list(range(150)) for i in range(0, 1200, 150))
    chance = make(None)
    assert mixed(batches) < 0.4 and mixed([[item[0] for item in next(chance)] for _ in range(150)]) > 0.9
    assert [[item[0] for item in batch] for batch, _ in zip(make(proportions, first=31), range(40))] == batches[31:71]
    first = proportions[[batch[0] for batch in batches]]  # narrow batches come no earlier than wide ones
    assert abs(np.corrcoef(first, np.arange(150) % 18.75)[0, 1]) < 0.2
    company = [frozenset(batch) for batch in batches]
    assert len(set(company)) == len(company)  # never the same eight again
    same = torch.randperm(150)
    assert group_by_aspect_ratio(same, torch.ones(150), 8).equal(same)


def test_the_run_decides_when_pictures_are_whole_and_when_they_are_mixed(tiny_data):
    settings = SimpleNamespace(plain_passes=2, plain_end=0.1, plain_end_passes=2, mosaic=0.5)
    phases = [
        augmentation_phase(passes, progress, settings)
        for passes, progress in ((1, 0.0), (2, 0.1), (9, 0.5), (19, 0.95), (90, 0.92), (90, 0.98), (90, 1.0))
    ]
    # the last tenth, but of long runs the last two passes: 90 at 0.92 are 97.8 in all
    assert phases == ["plain", "mixed", "varied", "plain", "varied", "plain", "plain"]
    batches = list(
        itertools.islice(
            EndlessBatches(
                6, 3, seed=1, phase=lambda shown: "plain" if shown < 12 else "mixed" if shown < 18 else "varied"
            ),
            8,
        )
    )
    assert [batch[0][2] is None for batch in batches] == [True] * 4 + [False] * 4
    assert all(not item.is_mosaic and item.mix is None for batch in batches[:4] + batches[6:] for item in batch)
    always = EndlessBatches(6, 3, seed=1, phase=lambda shown: "mixed", mixing=1.0)
    assert all(item.is_mosaic and 0.45 <= item.mix <= 0.55 for batch in itertools.islice(always, 4) for item in batch)
    data = DetectionDataset(load_splits(tiny_data)[0], train_transforms(96))
    whole, varied = (
        [data[0, seed, draw, False][1]["size"] for seed, draw in enumerate(draws)]
        for draws in ([None] * 10, torch.arange(10) / 10)
    )
    assert {tuple(size.tolist()) for size in whole} == {(96, 128)} and len(
        {tuple(size.tolist()) for size in varied}
    ) > 1


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "grey"])
def test_large_jpegs_are_decoded_small_with_their_boxes(kind, orientation, tmp_path):
    """As many pixels as the transforms can show and not many more; boxes, areas and the original size are right."""
    image = Image.new("RGB", (1600, 1204), (90, 90, 90))
    image.paste((250, 200, 30), (400, 200, 1200, 1000))
    image = image.convert("L") if kind == "grey" else image
    path, form = tmp_path / ("a.png" if kind == "PNG" else "a.jpg"), "JPEG" if kind == "grey" else kind
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, form, exif=exif, **(dict(save_all=True, append_images=[image]) if kind == "MPO" else {}))
    w, h, box = (
        (1600, 1204, [400.0, 200.0, 1200.0, 1000.0])
        if orientation == 1
        else (1204, 1600, [204.0, 400.0, 1004.0, 1200.0])
    )
    record = Record(
        0, path, w, h, np.array([box]), np.zeros(1, dtype=np.int64), np.array([640000.0]), np.zeros(1, dtype=bool)
    )
    data = DetectionDataset(Split("train", ["a"], [1], [record]), None, cache_bytes=1 << 24, detail=300)
    scale = 1 if kind == "PNG" else 4
    for _ in range(2):  # the second time from memory
        pixels, target = data.load(0)
        assert pixels.shape == (3, h // scale, w // scale) and target["orig_size"].tolist() == [h, w]
        assert (
            torch.equal(target["boxes"].as_subclass(torch.Tensor), torch.tensor([box]) / scale)
            and float(target["area"]) == 640000 / scale**2
        )
        x1, y1, x2, y2 = target["boxes"][0].round().int().tolist()
        red, outside = pixels[0, y1 + 4 : y2 - 4, x1 + 4 : x2 - 4], pixels[0, : y1 - 4]
        assert (
            float(outside.float().std()) < 2
            and float(red.float().std()) < 2
            and abs(float(red.float().mean()) - float(outside.float().mean())) > 5
        )
    assert (
        data.room == (1 << 24) - pixels.nbytes
        and DetectionDataset(data.split, None, cache_bytes=pixels.nbytes - 1, detail=300).room == 0
    )
    assert read_image(path).size == (w, h)  # whole where nobody says otherwise
    assert [
        reduction(*size, 300) for size in ((1600, 1200), (1599, 1200), (4000, 3000), (4002, 3002), (500, 9000))
    ] == [4, 1, 8, 2, 1]


def test_a_mosaic_sets_four_pictures_in_a_square_and_turns_it(tiny_data):
    data = DetectionDataset(load_splits(tiny_data)[0], None)
    samples, sides, slanted = [data.load(i) for i in range(4)], [], 0
    for seed in range(20):
        torch.manual_seed(seed)
        image, target = mosaic(samples)
        assert (
            image.shape == (3, 96, 128)
            and target["image_id"] == 0
            and len(target["boxes"]) == len(target["labels"]) == 8
        )
        sound = [
            (box, label)
            for box, label in zip(target["boxes"], target["labels"])
            if 2 < box[0] and 2 < box[1] and box[2] < 126 and box[3] < 94
        ]
        for box, label in sound:
            x, y = (int(n) for n in (box[:2] + box[2:]) / 2)
            red, _, blue = image[:, y, x].float()
            assert (red > blue) == (label == 0), (seed, box)
        sides += [float((box[2] - box[0]) * (box[3] - box[1])) ** 0.5 for box, _ in sound]
        fill = (image.float() - torch.tensor([124, 116, 104])[:, None, None]).abs().sum(0) < 2
        slanted += bool(fill.any())
    assert mosaic(samples, tile=24)[0].shape == (3, 48, 64)  # of photos no more is computed than will be seen
    assert min(sides) < 10 and max(sides) > 22 and slanted > 10  # scaled by 0.5 to 1.5; turned, shifted or smaller


def test_mixed_up_pictures_have_the_boxes_of_both(tiny_data):
    data = DetectionDataset(load_splits(tiny_data)[0], eval_transforms(48))
    samples = [data[i] for i in range(3)]
    mixed = mix_up(samples, 0.6)
    assert torch.allclose(mixed[1][0], 0.6 * samples[1][0] + 0.4 * samples[0][0])
    assert (
        torch.equal(mixed[0][1]["boxes"], torch.cat([samples[0][1]["boxes"], samples[2][1]["boxes"]]))
        and len(mixed[0][1]["labels"]) == 4
    )
    assert len(mix_up(samples[:1], 0.6)[0][1]["boxes"]) == 2  # alone there is nothing to be mixed with
    other_size = [samples[0], (samples[1][0][:, :, 1:], samples[1][1])]
    assert len(mix_up(other_size, 0.6)[0][1]["boxes"]) == 2
    data = DetectionDataset(load_splits(tiny_data)[0], train_transforms(48))
    for mix, most in ((0.5, 4), (None, 2)):
        counts = {
            len(t["boxes"])
            for seed in range(8)
            for _, t in data.__getitems__([(i, seed + i, 0.5, False, mix) for i in range(4)])
        }
        assert max(counts) == most


@pytest.mark.parametrize("square", [False, True])
def test_strong_augmentation_keeps_boxes_on_their_objects(square, tiny_data):
    data = DetectionDataset(load_splits(tiny_data)[0], train_transforms(128, "strong", square=square))
    seen, sizes = 0, set()
    for seed in range(30):
        image, target = data[seed % 12, seed, seed / 30, seed % 2 == 0]
        h, w = image.shape[-2:]
        sizes.add((h, w))
        for (cx, cy, bw, bh), label in zip(target["boxes"] * torch.tensor([w, h, w, h]), target["labels"]):
            if bw > 8 and bh > 8:
                colour = image[:, int(cy), int(cx)] * torch.tensor(STD) + torch.tensor(MEAN)
                seen += 1
                assert colour.max() - colour.min() > 0.2, (
                    seed,
                    label,
                )  # channels may have changed places, grey may not
    assert seen > 30 and len(sizes) > 1 and all((h == w) == square for h, w in sizes)


def test_a_seed_decides_the_augmentation_and_leaves_the_global_generator_alone(tiny_data):
    data = DetectionDataset(load_splits(tiny_data)[0], train_transforms(48))
    torch.manual_seed(5)
    a, _ = data[3, 17, 0.5, True]
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    b, _ = data[3, 17, 0.5, True]
    assert torch.equal(a, b) and any(
        a.shape != (c := data[3, s, 0.5, True][0]).shape or not torch.equal(a, c) for s in range(5)
    )


def test_a_data_set_can_be_sent_to_worker_processes(tiny_data):
    """Workers are not always forked: on macOS, and since Python 3.14 on Linux, they get it pickled."""
    for steps in (
        train_transforms(48),
        train_transforms(48, "meta", 0.3, 10),
        train_transforms(48, "strong"),
        eval_transforms(48),
    ):
        data = pickle.loads(pickle.dumps(DetectionDataset(load_splits(tiny_data)[0], steps)))
        assert torch.equal(
            data[0, 1, 0.5, False][0], DetectionDataset(load_splits(tiny_data)[0], steps)[0, 1, 0.5, False][0]
        )


def test_batches_are_padded_to_the_divisor_and_masked():
    batch = [(torch.ones(3, 20, 30), {}), (torch.ones(3, 25, 10), {})]
    images, mask, _ = collate(batch, 16)
    assert images.shape == (2, 3, 32, 32) and mask.shape == (2, 32, 32)
    for (image, _), padded, padding in zip(batch, images, mask):
        assert (~padding).sum() == image[0].numel() == padded[0].sum()


def test_the_demo_is_as_it_says(tmp_path):
    make_demo(tmp_path / "demo", train=6, val=4, seed=1)
    make_demo(tmp_path / "again", train=6, val=4, seed=1)
    for path in sorted((tmp_path / "demo").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "demo")).read_bytes()
    train, val = load_splits(tmp_path / "demo")
    assert train.classes == list(CLASSES) and len(val.records) == 4
    seen = set()
    for i in range(40):
        picture, boxes, labels = draw_picture(np.random.default_rng(i))
        assert 1 <= len(boxes) <= 8 and picture.shape == (128, 128, 3)
        seen |= set(labels)
        for j, (x, y, w, h) in enumerate(boxes):
            assert 0.07 * 128 <= max(w, h) <= 0.42 * 128 and x >= 0 and y >= 0 and x + w <= 128 and y + h <= 128
            assert all(overlap((x, y, w, h), other) <= 0.2 for other in boxes[:j])
    assert seen == set(range(5))
    shutil.rmtree(tmp_path / "again")


def test_tiny_shapes_and_crowds_are_drawn_by_a_command(tmp_path, monkeypatch, capsys):
    for kind, sides, overlaps in (("tiny", (5, 15), (0, 0.12)), ("crowds", (0.15 * 224, 0.27 * 224), (0.7, 0.8))):
        arguments = [kind, "--out", tmp_path / kind, "--train", 12, "--val", 2]
        status, out, err = called(demo_data.main, arguments, monkeypatch, capsys)
        assert status == 0 and f"{tmp_path / kind}: 12 + 2 images" in out, err
        train, val = load_splits(tmp_path / kind)
        assert len(train.records) == 12 and len(val.records) == 2 and train.most_objects > 15
        largest = 0.0
        for record in train.records:
            longest = (record.boxes[:, 2:] - record.boxes[:, :2]).max(1)
            assert sides[0] <= longest.min() and longest.max() <= sides[1]
            pairs = box_iou(*[torch.from_numpy(record.boxes)] * 2).fill_diagonal_(0)
            largest = max(largest, float(pairs.max()))
        assert overlaps[0] <= largest <= overlaps[1]
        assert choose_image_size(train, 224) == 224  # what is so many pixels in the file is so many for the network
        status, _, err = called(demo_data.main, arguments, monkeypatch, capsys)
        assert status == 2 and "already exists" in err


@pytest.mark.parametrize("kind", ["zoom", "meta", "strong"])
@pytest.mark.parametrize("flip, ways", [("none", 1), ("horizontal", 2), ("both", 4), ("turns", 8)])
def test_flips_and_turns_move_boxes_with_the_pixels(flip, ways, kind, monkeypatch):
    """Three objects of different colours and one orientation that no flip or turn leaves alone."""
    monkeypatch.setitem(transforms.AUGMENTATIONS, kind, lambda size, square: ([[]], [[]]))
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    boxes = torch.tensor([[5.0, 5, 25, 15], [60, 5, 80, 25], [5, 40, 15, 55]])
    for channel, (x1, y1, x2, y2) in enumerate(boxes.int().tolist()):
        image[channel, y1:y2, x1:x2] = 255
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(60, 90)),
        "labels": torch.arange(3),
        "area": torch.zeros(3),
        "iscrowd": torch.zeros(3),
    }
    transform, seen = train_transforms(60, kind, flip=flip), set()
    for seed in range(120):
        torch.manual_seed(seed)
        pixels, found = transform(tv_tensors.Image(image), target, (seed % 10) / 10)
        height, width = pixels.shape[1:]
        assert (height, width) in ((60, 90), (90, 60)) and found["size"].tolist() == [height, width]
        places = box_convert(found["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height] * 2)
        for channel, (x1, y1, x2, y2) in zip(found["labels"].tolist(), places.round().int().tolist()):
            bright = pixels[channel] > pixels[channel].min() + 1
            assert bright[y1:y2, x1:x2].all() and bright.sum() == (y2 - y1) * (x2 - x1)
        seen.add((height, tuple(map(tuple, places.round().int().tolist()))))
    assert len(seen) == ways


# What is kept of a large dataset's check


def checked_images(monkeypatch, data):
    """-> how many images load_splits opens, and its splits."""
    opened, real = [], checks.probe_image
    monkeypatch.setattr(checks, "probe_image", lambda record: opened.append(record.path) or real(record))
    splits = load_splits(data)
    monkeypatch.setattr(checks, "probe_image", real)
    return opened, splits


def test_images_of_a_large_dataset_are_opened_once(tmp_path, monkeypatch):
    """Until they change; those that can't be read are opened again, and so are all where the file is damaged."""
    monkeypatch.setattr(checks, "MANY_IMAGES", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write_coco(tmp_path / "data", {"train2017": 12, "val2017": 4})
    first, before = checked_images(monkeypatch, data)
    again, after = checked_images(monkeypatch, data)
    assert len(first) == 16 and again == []
    for ours, theirs in zip(after, before):
        for a, b in zip(ours.records, theirs.records):
            assert (a.path, a.width, a.height, a.upright) == (b.path, b.width, b.height, b.upright)
            assert np.array_equal(a.boxes, b.boxes) and np.array_equal(a.labels, b.labels)
        assert ours.value_range == theirs.value_range
        assert any(f"{len(ours.records)} images have not changed" in remark for remark in ours.remarks)

    changed, broken = before[0].records[0].path, before[0].records[1].path
    Image.new("RGB", (9, 7)).save(changed)
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=f"1 of 12 images can't be read .*{broken.name}"):
        load_splits(data)
    broken.write_bytes((before[0].records[2].path).read_bytes())
    third, after = checked_images(monkeypatch, data)
    assert third == [broken]  # the other was opened, and kept, when the first start failed
    assert (after[0].records[0].width, after[0].records[0].height) == (9, 7)

    train, val = sorted((tmp_path / "cache" / "detr").glob("*.json"), key=lambda file: -file.stat().st_size)
    train.write_text('{"reader": [], "images"')
    val.write_text('{"reader": 1, "images": []}')
    assert len(checked_images(monkeypatch, data)[0]) == 16
    assert checked_images(monkeypatch, data)[0] == []
    allow_large_images(True)
    assert len(checked_images(monkeypatch, data)[0]) == 16  # what may be opened is another thing now
    allow_large_images(False)
    assert len(checked_images(monkeypatch, data)[0]) == 16
    state = os.stat(changed)
    changed.write_bytes(changed.read_bytes())
    os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns))  # as tools do that edit an image in place
    assert checked_images(monkeypatch, data)[0] == [changed]


def test_deep_images_keep_their_range_when_they_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "MANY_IMAGES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write_coco(tmp_path / "data", {"train2017": 3, "val2017": 2})
    for path in data.rglob("*.png"):
        Image.fromarray(np.full((48, 64), 3000, dtype=np.uint16)).save(path, format="PNG")
    first, before = checked_images(monkeypatch, data)
    again, after = checked_images(monkeypatch, data)
    assert len(first) == 5 and again == [] and after[0].value_range == before[0].value_range == (0, 4095)


def test_a_home_that_cannot_be_written_to_costs_time_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "MANY_IMAGES", 4)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data = write_coco(tmp_path / "data", {"train2017": 5, "val2017": 4})
    assert [len(checked_images(monkeypatch, data)[0]) for _ in range(2)] == [9, 9]


def test_evaluation_sees_the_same_batches_with_more_threads(tiny_data):
    """As it does on a GPU."""
    val = load_splits(tiny_data)[1]
    arguments, config = SimpleNamespace(image_size=48, batch_size=3), {"exact_sides": True}
    here, there = (list(batches_of(val, arguments, config, 16, SimpleNamespace(type=kind))) for kind in ("cpu", "cuda"))
    assert len(here) == len(there) == 2
    for (images, mask, targets), (others, other_mask, other_targets) in zip(here, there):
        assert torch.equal(images, others) and torch.equal(mask, other_mask)
        assert [t["image_id"] for t in targets] == [t["image_id"] for t in other_targets]
