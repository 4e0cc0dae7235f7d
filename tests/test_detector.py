"""A detector from Python, and as a folder for the hub."""

import copy
import json
import pickle

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from test_matrix import tiny_backbones  # noqa: F401 - a fixture

import detector as module
from checkpoint import read_checkpoint, save_checkpoint
from datasets import DetectionDataset, collate, evaluation_batches
from detector import load, to_supervision
from detr_model import DETECTORS, build_model
from errors import UserError
from evaluate import evaluate
from settings import DEFAULTS
from splits import Split, make_record
from transforms import eval_transforms

CLASSES = ["cat", "dog", "emu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = DEFAULTS | dict(
        detector="detr",
        backbone="ecvit-nano",
        backbone_weights="none",
        num_classes=3,
        num_queries=10,
        hidden_dim=32,
        num_heads=2,
        ffn_dim=32,
        decoder_layers=1,
        image_size=64,
    )
    path = tmp_path_factory.mktemp("run") / "best.pth"
    model = build_model(config)[0]
    torch.nn.init.normal_(model.class_heads[0].weight, std=0.5)
    save_checkpoint(
        path,
        {
            "model": model.state_dict(),
            "config": config,
            "classes": CLASSES,
            "category_ids": [3, 5, 90],
            "figures": {"AP": 0.5, "AP_small": -1.0},
        },
    )
    return path


def photo(size=(90, 70)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def same(a, b, atol=0.0):
    assert a["names"] == b["names"] and torch.equal(a["labels"], b["labels"])
    assert torch.allclose(a["scores"], b["scores"], atol=atol) and torch.allclose(
        a["boxes"], b["boxes"], atol=100 * atol
    )


def test_a_path_an_image_and_an_array_are_the_same_picture(checkpoint, tmp_path):
    detector, image = load(checkpoint, threshold=0.0), photo()
    image.save(tmp_path / "photo.png")
    found = detector(str(tmp_path / "photo.png"))
    assert len(found["scores"]) == 30 and found["boxes"].shape == (30, 4) and (found["scores"].diff() <= 0).all()
    assert found["names"] == [CLASSES[label] for label in found["labels"]]
    assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([90, 70, 90, 70])).all()
    for other in (tmp_path / "photo.png", image, np.asarray(image), torch.from_numpy(np.array(image))):
        same(detector(other), found)
    middle = float(found["scores"][10])
    assert (
        len(detector(image, threshold=middle)["scores"]) == 11
        and len(load(checkpoint, threshold=middle)(image)["names"]) == 11
    )


def test_a_list_gives_a_list_in_its_order(checkpoint):
    detector = load(checkpoint, threshold=0.0)
    pictures = [photo((96, 64)).rotate(angle) for angle in (0, 120, 240)]  # of a size that is not padded
    alone = [detector(picture) for picture in pictures]
    for one, among in zip(alone, detector(pictures, batch_size=2)):
        same(one, among, atol=1e-5)
    assert min((alone[i]["scores"] - alone[j]["scores"]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-4
    assert detector([]) == []


@pytest.fixture(scope="module")
def tiny_family(tmp_path_factory):
    """A checkpoint on a tiny backbone of a family."""

    def make(family, detector="detr"):
        torch.manual_seed(3)
        config = tiny_config(detector, f"tiny-{family}", backbone_weights="none", num_queries=20, image_size=100)
        model = build_model(config)[0]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for name, parameter in model.named_parameters():  # scores are spread around a half
                if name.endswith("bias") and any(name.startswith(layer) for layer in model.class_layers()):
                    parameter.zero_()
        path = tmp_path_factory.mktemp(family) / "best.pth"
        save_checkpoint(
            path, {"model": model.state_dict(), "config": config, "classes": CLASSES, "category_ids": [3, 5, 90]}
        )
        return path

    return make


def furthest_apart(one, other, least=0.05):
    """Two sets of detections with scores of at least `least` -> the largest difference, in score or in 100 pixels."""
    worst = 0.0
    for a, b in ((one, other), (other, one)):
        for score, label, box in zip(a["scores"], a["labels"], a["boxes"]):
            if score >= least + 1e-3:
                apart = torch.maximum((b["scores"] - score).abs(), (b["boxes"] - box).abs().amax(1) / 100)
                worst = max(worst, float(apart[b["labels"] == label].min()))
    return worst


@pytest.mark.parametrize(
    "family, detector",
    [
        ("dinov2", "detr"),
        ("ecvit", "detr"),
        ("convnext", "detr"),
        ("ecvit", "ecdet"),
        ("ecvit", "dino"),
        ("ecvit", "detr-2020"),
        ("convnext", "ssd"),
    ],
)
def test_what_is_found_in_an_image_does_not_depend_on_its_company(family, detector, tiny_family):
    detector = load(tiny_family(family, detector), threshold=0.0, device="cpu")
    images = [
        photo(size) for size in ((90, 70), (70, 90), (200, 60), (128, 128), (91, 70), (60, 200), (300, 40), (90, 70))
    ]
    images[-1] = images[-1].rotate(180)
    among = detector(images)
    assert max(len(d["scores"]) for d in among) > 10 and max(float(d["scores"].max()) for d in among) > 0.05
    for image, found in zip(images, among):
        assert furthest_apart(detector(image), found) < 1e-4


def test_evaluation_finds_what_a_detector_finds(tiny_family, tmp_path, monkeypatch):
    """In batches of images of many sizes, which come padded to the same size or not together."""
    path, folder = tiny_family("ecvit"), tmp_path / "val"
    folder.mkdir()
    records = []
    for i, size in enumerate([(90, 70), (70, 90), (128, 128), (91, 70), (88, 70), (300, 40)]):
        photo(size).rotate(i).save(folder / f"{i}.png")
        records.append(make_record(i, folder / f"{i}.png", size, [(1, 1, 30, 30, 0, 841, False)]))
    split, detector = Split("val", CLASSES, [3, 5, 90], records), load(path, threshold=0.0, device="cpu")
    batches = evaluation_batches(split, 4, 32, 100)
    assert (
        sorted(i for batch in batches for i in batch) == list(range(6))
        and [0, 3] in batches
        and [2, 4] in batches
        and len(batches) == 4
    )
    loader = torch.utils.data.DataLoader(
        DetectionDataset(split, eval_transforms(100)), batch_sampler=batches, collate_fn=collate
    )
    found = evaluate(detector.model, detector.postprocess, loader, split, torch.device("cpu"))[2]
    for i in range(6):
        assert furthest_apart(detector(folder / f"{i}.png"), found[i]) < 1e-4


def test_an_image_with_many_objects_gets_as_many_detections_as_there_are_queries(tiny_family):
    config = read_checkpoint(tiny_family("ecvit"))["config"]
    for detector in DETECTORS:
        queries = 700
        _, _, postprocess = build_model(config | {"detector": detector, "num_queries": queries})
        if detector == "ssd":
            assert (postprocess.ssd.detections_per_img, postprocess.ssd.topk_candidates) == (700, 700)
            continue
        outputs = {
            "pred_logits": torch.randn(1, queries, 4 if detector == "detr-2020" else 3),
            "pred_boxes": torch.rand(1, queries, 4),
        }
        assert len(postprocess(outputs, torch.tensor([[100, 100]]))[0]["scores"]) == queries
        few = {key: value[:, :60] for key, value in outputs.items()}
        assert len(postprocess(few, torch.tensor([[100, 100]]))[0]["scores"]) == (
            60 if detector == "detr-2020" else 180
        )


def test_what_is_no_picture_is_refused(checkpoint, tmp_path):
    detector = load(checkpoint)
    (tmp_path / "broken.jpg").write_text("no picture")
    for wrong, message in (
        ("nowhere.jpg", "nowhere.jpg: can't be read"),
        (tmp_path / "broken.jpg", "broken.jpg: can't be read"),
        (np.zeros((4, 4, 3)), "float64 of shape"),
        (np.zeros((3, 4, 4), np.uint8), r"uint8 of shape \(3, 4, 4\)"),
        (7, "not int"),
    ):
        with pytest.raises(UserError, match=message):
            detector(wrong)


def test_a_folder_of_the_hub_gives_the_same_detections(checkpoint, tmp_path, monkeypatch):
    detector, image = load(checkpoint, threshold=0.0), photo()
    detector.save(tmp_path / "mine")
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    same(load(tmp_path / "mine", threshold=0.0)(image), detector(image))
    again = read_checkpoint(tmp_path / "mine")
    original = read_checkpoint(checkpoint)
    assert (
        again["classes"] == original["classes"]
        and again["config"] == original["config"]
        and again["category_ids"] == [3, 5, 90]
    )
    assert all(torch.equal(again["model"][key], value) for key, value in original["model"].items())
    card = (tmp_path / "mine" / "README.md").read_text()
    assert (
        "| AP | 0.500 |" in card
        and "AP_small" not in card
        and "cat, dog, emu" in card
        and "pipeline_tag: object-detection" in card
    )

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.append(name) or str(tmp_path / "mine")
    )
    same(load("someone/cats", threshold=0.0)(image), detector(image))
    assert asked == ["someone/cats"]
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="model.safetensors is missing or broken"):
        load(tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(UserError, match="newer version"):
        load(tmp_path / "mine")


def test_a_repository_that_can_not_be_had(monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        UserError, match="someone/cats: no such file or folder here, and the hub can't provide it .*no network"
    ):
        load("someone/cats")


def test_saving_overwrites_nothing_but_itself(checkpoint, tmp_path):
    detector = load(checkpoint)
    for name in ("README.md", "config.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
        with pytest.raises(UserError, match=f"{name}: would be overwritten; choose another folder"):
            detector.save(tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]
    for _ in range(2):
        detector.save(tmp_path / "mine")


@pytest.mark.parametrize("name, is_asked", [("me/cats-v1.0", True), ("me/best.pth", False), ("me/cats.onnx", False)])
def test_names_on_the_hub_may_hold_dots(name, is_asked, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        load(name)
    assert asked == [name] * is_asked


def test_pushing_uploads_what_save_writes(checkpoint, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, repo_id, folder_path, **options):
            calls.append((repo_id, sorted(p.name for p in module.Path(folder_path).iterdir()), options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    load(checkpoint).push("me/cats", commit_message="first")
    assert calls == [
        ("me/cats", {"exist_ok": True}),
        ("me/cats", ["README.md", "config.json", "model.safetensors"], {"commit_message": "first"}),
    ]


def test_supervision_where_it_is_installed(checkpoint, monkeypatch):
    class Detections:
        def __init__(self, **fields):
            self.__dict__ |= fields

    found = load(checkpoint, threshold=0.0)(photo())
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        to_supervision(found)
    monkeypatch.setitem(__import__("sys").modules, "supervision", type("fake", (), {"Detections": Detections}))
    given = to_supervision(found)
    assert (
        given.xyxy.shape == (30, 4)
        and given.class_id.dtype == np.int64
        and list(given.data["class_name"]) == found["names"]
    )


def test_a_detector_can_be_copied_and_its_network_replaced(tiny_family):
    detector, other = (load(tiny_family(family), device="cpu", threshold=0.0) for family in ("ecvit", "convnext"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    found, others = detector(image), other(image)
    for copied in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert torch.equal(copied(image)["boxes"], found["boxes"])
    detector.model = other.model
    assert torch.equal(detector(image)["boxes"], others["boxes"])
