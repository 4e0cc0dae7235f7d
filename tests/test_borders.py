"""Objects that touch the border of their image are trained on: each transform keeps the box of what is visible."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from datasets import DetectionDataset, Draw
from transforms import MEAN, STD, eval_transforms, mosaic, resized_sides, train_transforms

COLOURS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [255, 255, 0]])
KNOWN = [
    (416, 416, 224),
    (612, 612, 640),
    (600, 600, 640),
    (300, 300, 640),
    (600, 800, 640),
    (375, 500, 800),
    (427, 640, 480),
    (480, 640, 224),
]


def sample(h, w):
    """A black image with an object at each border and one in the middle, each in a colour of its own."""
    short = min(h, w)
    a, b = short // 3, short // 5
    boxes = [
        [0, h // 2, b, h // 2 + b],
        [w - b, h // 2, w, h // 2 + b],
        [a, 0, a + b, b],
        [a, h - b, a + b, h],
        [w // 2, h // 3, w // 2 + b // 2, h // 3 + b // 2],
    ]
    image = torch.zeros(3, h, w, dtype=torch.uint8)
    for (x1, y1, x2, y2), colour in zip(boxes, COLOURS):
        image[:, y1:y2, x1:x2] = colour[:, None, None]
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(h, w), dtype=torch.float32),
        "labels": torch.arange(5),
        "area": torch.ones(5),
        "iscrowd": torch.zeros(5, dtype=torch.long),
        "image_id": 0,
        "orig_size": torch.tensor([h, w]),
    }
    return tv_tensors.Image(image), target


def seen(image):
    """Where pixels have each of the colours -> [[x1, y1, x2, y2], or None]."""
    pixels = (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).clamp(0, 1)
    apart = [(pixels - colour[:, None, None] / 255).abs().sum(0) for colour in COLOURS]
    black, mean = pixels.sum(0), (pixels - torch.tensor(MEAN)[:, None, None]).abs().sum(0)
    nearest = torch.stack([*apart, black, mean]).argmin(0)
    places = []
    for colour in range(len(COLOURS)):
        ys, xs = (nearest == colour).nonzero(as_tuple=True)
        places.append([int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1] if len(ys) else None)
    return places


def cases(count, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    return KNOWN + [(draw(300, 1000), draw(300, 1000), draw(224, 800)) for _ in range(count)]


class Whole(v2.Transform):
    """Stands for changed colours."""

    def __init__(self, **_):
        super().__init__()

    def forward(self, *inputs):
        return inputs


def check(image, target, allowed=(), loose=0.0):
    """Boxes are where the pixels are, `loose` pixels larger at most.

    The labels without one are those `allowed` and those of which less than a pixel is visible.
    """
    h, w = image.shape[-2:]
    boxes = dict(zip(target["labels"].tolist(), target["boxes"] * torch.tensor([w, h, w, h])))
    for label, place in enumerate(seen(image)):
        if label in boxes:
            cx, cy, bw, bh = boxes[label].tolist()
            box = [cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2]
            assert -1e-3 <= min(box) and box[2] <= w + 1e-3 and box[3] <= h + 1e-3
            if place is not None and min(place[2] - place[0], place[3] - place[1]) > 4:
                outwards = [place[0] - box[0], place[1] - box[1], box[2] - place[2], box[3] - place[3]]
                assert all(-1.6 <= value <= 1.6 + loose for value in outwards), (label, box, place, (h, w))
        elif label not in allowed:
            assert place is None or min(place[2] - place[0], place[3] - place[1]) <= 1, (label, place, (h, w))
    return len(boxes)


@pytest.mark.parametrize("square", [False, True], ids=["in proportion", "square"])
@pytest.mark.parametrize("kind", ["evaluation", "plain", "zoom", "meta", "strong"])
def test_an_object_at_the_border_keeps_its_box(kind, square, monkeypatch):
    windows = []
    real = v2.RandomIoUCrop.make_params

    def recorded(transform, inputs):
        boxes, window = next(x for x in inputs if isinstance(x, tv_tensors.BoundingBoxes)), real(transform, inputs)
        windows.append((boxes.clone(), window))
        return window

    monkeypatch.setattr(v2.RandomIoUCrop, "make_params", recorded)
    monkeypatch.setattr(v2, "RandomPhotometricDistort", Whole)
    found = 0
    for seed, (h, w, size) in enumerate(cases(10, 1)):
        transform = (
            eval_transforms(size, square)
            if kind == "evaluation"
            else train_transforms(size, "zoom" if kind == "plain" else kind, square=square)
        )
        torch.manual_seed(seed)
        windows.clear()
        image, target = transform(*sample(h, w), None if kind in ("evaluation", "plain") else seed * 0.37 % 1)
        outside = set()
        for boxes, window in windows:
            if window:  # the rule of RandomIoUCrop: an object whose centre is outside goes
                x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).unbind(1)
                inside = (
                    (x > window["left"])
                    & (x < window["left"] + window["width"])
                    & (y > window["top"])
                    & (y < window["top"] + window["height"])
                )
                outside |= set((~inside).nonzero()[:, 0].tolist())
        boxes = check(image, target, outside)
        assert kind not in ("evaluation", "plain") or boxes == 5, (h, w, size)
        found += boxes
    assert found > 2 * 18


@pytest.mark.parametrize("kind", ["zoom", "meta", "strong"])
def test_thin_images_go_through_every_transform(kind):
    for number, (h, w) in enumerate([(1, 1), (2, 300), (300, 1), (3, 3), (5, 900), (900, 7)] * 4):
        torch.manual_seed(number)
        target = sample(40, 40)[1] | {
            "boxes": tv_tensors.BoundingBoxes(
                [[0, 0, w, h]] * 5, format="XYXY", canvas_size=(h, w), dtype=torch.float32
            )
        }
        image, target = train_transforms(96, kind)(
            tv_tensors.Image(torch.zeros(3, h, w, dtype=torch.uint8)), target, None if number < 6 else number / 24
        )
        assert min(image.shape) >= 1 and image.isfinite().all() and target["boxes"].isfinite().all()


def test_a_mosaic_keeps_the_boxes_at_its_inner_borders():
    for seed, (h, w, size) in enumerate(cases(12, 2)):
        torch.manual_seed(seed)
        first = sample(h, w)
        nothing = {key: first[1][key][:0] for key in ("labels", "area", "iscrowd")} | {
            "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(h, w))
        }
        blank = tv_tensors.Image(torch.zeros(3, h, w, dtype=torch.uint8)), first[1] | nothing
        place = seed % 4
        image, target = mosaic([first if i == place else blank for i in range(4)])
        image, target = train_transforms(size, "strong")(image, target, None)
        # A box around a turned object that reaches over the border is larger than what is left of the object.
        check(image, target, loose=0.5 * max(image.shape))


def test_every_image_of_a_batch_has_the_side_that_was_drawn():
    for h, w, size in cases(150, 3):
        for side in (size, 480 * size // 800, 608):
            found = resized_sides(h, w, side, 1333 * side // 800)
            assert min(found) == side or max(found) == 1333 * side // 800, (h, w, side, found)
            assert abs(found[0] / found[1] - h / w) < 0.01 * h / w
    assert resized_sides(10, 5000, 640, 1066) == (2, 1066) and resized_sides(1, 5000, 640, 1066) == (1, 1066)
    for kind, sides in (("zoom", (384, 480, 544, 640)), ("strong", (480, 576, 672, 800))):
        transform = train_transforms(640, kind)
        for draw, side in zip((0.0, 0.34, 0.6, 0.999), sides):
            for h, w in ((427, 640), (612, 500), (333, 480), (480, 640)):
                found = transform(*sample(h, w), draw)[0].shape[1:]
                assert min(found) == side or max(found) == 1066 * side // 640, (kind, draw, side, found)


def test_a_data_set_keeps_them_too(tmp_path):
    """From files, with everything on the way: the classic export of 416 pixels under the smallest backbone's size."""
    from conftest import write_coco

    from layouts import load_splits

    root = write_coco(tmp_path, {"train": 4, "val": 1}, size=(416, 416))
    train = load_splits(root)[0]
    for record in train.records:
        record.boxes = record.boxes * 0 + torch.tensor([[300, 300, 416, 416], [0, 0, 100, 416]]).numpy()
    data = DetectionDataset(train, train_transforms(224))
    for seed in range(8):
        _, target = data[Draw(seed % 4, seed)]
        edges = target["boxes"][:, :2] + target["boxes"][:, 2:] / 2
        assert len(edges) == 2 and (edges[:, 1] - 1).abs().max() < 1e-6
