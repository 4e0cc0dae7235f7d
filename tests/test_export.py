import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from test_commands import called

import export
import infer
from checkpoint import save_checkpoint
from detector import load
from detr_model import build_model
from errors import UserError
from export import furthest


def write_checkpoint(path, detector, classes=("cat", "dog", "emu"), category_ids=(3, 5, 90), **more):
    torch.manual_seed(0)
    config = tiny_config(detector, backbone_weights="none", num_queries=30, image_size=96) | more
    model = build_model(config)[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # heads that start at zero would find the same everywhere
            if not name.startswith("backbone.") and parameter.ndim > 1:
                parameter += 0.05 * torch.randn_like(parameter)
    save_checkpoint(
        path,
        {"model": model.state_dict(), "config": config, "classes": list(classes), "category_ids": list(category_ids)},
    )
    return path


def test_the_size_of_a_fixed_graph_is_not_asked_for_in_vain(tmp_path, monkeypatch, capsys):
    """An option that would be ignored is refused; a graph for any size follows it."""
    picture = photo(tmp_path / "photo.png", (128, 96))
    for any_size in (False, True):
        checkpoint = write_checkpoint(tmp_path / "best.pth", "detr")
        status, _, err = called(
            export.main,
            [checkpoint, "--picture", picture, "--format", "torch", "--out", tmp_path / "a.pt2"]
            + ["--any-size"] * any_size,
            monkeypatch,
            capsys,
        )
        assert status == 0, err
        arguments = [
            picture,
            "--checkpoint",
            tmp_path / "a.pt2",
            "--image-size",
            64,
            "--threshold",
            0,
            "--out",
            tmp_path / "found",
        ]
        status, _, err = called(infer.main, arguments, monkeypatch, capsys)
        if any_size:
            assert status == 0, err
            at = [load(tmp_path / "a.pt2", threshold=0.0, image_size=size)(picture)["scores"] for size in (64, 96)]
            assert (at[0] - at[1]).abs().max() > 1e-4
        else:
            assert (
                status == 2
                and "--image-size 64: " in err
                and "was exported for 96x128 alone; export it with --any-size" in err
            )
        status, _, err = called(infer.main, [*arguments[:3], "--precision", "bfloat16"], monkeypatch, capsys)
        assert status == 2 and "computes as it was exported" in err


def photo(path, size):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).resize(
        (9, 7)
    ).resize(size).save(path)
    return path


@pytest.mark.parametrize(
    "detector, form, square, any_size",
    [
        ("detr", "onnx", False, False),
        ("ecdet", "onnx", True, False),
        ("detr", "onnx", False, True),
        ("ecdet", "onnx", False, True),
        ("detr", "torch", True, False),
        ("ecdet", "torch", False, False),
        ("detr", "torch", False, True),
    ],
)
def test_an_exported_file_detects_what_the_checkpoint_does(
    detector, form, square, any_size, tmp_path, monkeypatch, capsys
):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    checkpoint = write_checkpoint(tmp_path / "best.pth", detector, square=square)
    picture = photo(tmp_path / "photo.png", (96, 96) if square else (128, 96))
    status, out, err = called(
        export.main,
        [checkpoint, "--picture", picture, "--format", form] + ["--any-size"] * any_size,
        monkeypatch,
        capsys,
    )
    assert status == 0, err
    file = tmp_path / ("best.onnx" if form == "onnx" else "best.pt2")
    assert file.exists() and ("any size" if any_size else "96x96" if square else "96x128") in out
    assert "differs from PyTorch by" in out and "ms, PyTorch" in out
    pictures = [picture, photo(tmp_path / "tall.png", (96, 160))] if any_size else [picture, picture]
    ours, theirs = (
        load(checkpoint, device="cpu", threshold=0.0)(pictures, batch_size=1),
        load(file, threshold=0.0)(pictures),
    )
    for a, b in zip(ours, theirs):  # of sizes that need no resizing: the same pixels
        score, pixels = furthest(
            [a[key] for key in ("scores", "labels", "boxes")], [b[key] for key in ("scores", "labels", "boxes")]
        )
        assert score < 1e-3 and pixels < 0.5 and len(b["scores"]) == len(a["scores"])
    status, out, err = called(
        infer.main,
        [
            photo(tmp_path / "other.png", (300, 200)),
            "--checkpoint",
            file,
            "--threshold",
            0,
            "--out",
            tmp_path / "found",
        ],
        monkeypatch,
        capsys,
    )
    assert status == 0, err
    rows = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert {row["category_id"] for row in rows} <= {3, 5, 90} and all(
        row["bbox"][0] + row["bbox"][2] <= 300.1 and row["bbox"][1] + row["bbox"][3] <= 200.1 for row in rows
    )


@pytest.mark.parametrize("detector, any_size", [("detr", False), ("ecdet", False), ("dino", True)])
def test_smaller_copies_detect_nearly_the_same(detector, any_size, tiny_data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    classes = ["kind 7", "kind 300", "kind 90001"]
    checkpoint = write_checkpoint(tmp_path / "best.pth", detector, classes)
    content = torch.load(checkpoint, weights_only=True)
    for name, value in content["model"].items():
        if name.endswith("bias") and ("class" in name or "score_head" in name):
            value.zero_()  # scores near 0.5, in which a difference can be seen
    save_checkpoint(checkpoint, content)
    image = tiny_data / "val2017" / "000.png"
    arguments = [checkpoint, "--data", tiny_data, "--image", image, "--int8", "--half"] + ["--any-size"] * any_size
    status, out, err = called(export.main, arguments, monkeypatch, capsys)
    assert status == 0, err
    table = [line.split() for line in out.splitlines()[-3:]]
    sizes = {row[0].rsplit("/")[-1]: float(row[1]) for row in table}
    assert list(sizes) == ["best.onnx", "best.int8.onnx", "best.half.onnx"]
    assert sizes["best.int8.onnx"] < sizes["best.half.onnx"] < sizes["best.onnx"]
    exact, int8, half = (load(tmp_path / name, threshold=0.0)(image) for name in sizes)
    assert exact["scores"][0] > 0.4
    for found, far, pixels in ((half, 0.01, 0.5), (int8, 0.1, 5)):
        assert found["scores"][:5].tolist() == pytest.approx(exact["scores"][:5].tolist(), abs=far)
        assert torch.cdist(exact["boxes"][:5], found["boxes"], p=torch.inf).amin(1).max() < pixels
    assert load(tmp_path / "best.int8.onnx").classes == classes
    assert not list(tmp_path.glob("*.partial*"))


def test_smaller_copies_need_images_and_onnx(tiny_data, tmp_path, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path / "best.pth", "detr")
    for arguments, message in (
        (["--int8", "--format", "torch"], "--int8: is for --format onnx"),
        (["--data", tiny_data], f"--data {tiny_data}: is for --int8 and --half"),
        (["--int8"], "does not say what data it was trained with; give --data DIR"),
        (["--half", "--data", tiny_data], "its classes are not those of the checkpoint"),
    ):
        status, _, err = called(export.main, [checkpoint, *arguments], monkeypatch, capsys)
        assert status == 2 and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["best.pth"]


def test_mistakes_in_exporting(tmp_path, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path / "best.pth", "detr")
    for arguments, message in (
        ([checkpoint, "--image-size", 100, 96], "both have to be multiples of 32"),
        ([checkpoint, "--image-size", 96, 96, "--any-size", "--format", "torch"], "leave out --image-size"),
        ([write_checkpoint(tmp_path / "ssd.pth", "ssd"), "--format", "torch"], "ssd is not exported"),
    ):
        status, _, err = called(export.main, arguments, monkeypatch, capsys)
        assert status == 2 and message in err
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, _, err = called(export.main, [checkpoint], monkeypatch, capsys)
    assert status == 2 and "onnx is not installed; pip install onnx onnxscript onnxruntime" in err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "x.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match="pip install onnxruntime"):
        load(tmp_path / "x.onnx")
    (tmp_path / "x.pt2").write_bytes(b"x")
    with pytest.raises(UserError, match="x.pt2: not a file of export.py"):
        load(tmp_path / "x.pt2")
    assert not list(tmp_path.glob("*.partial*"))


def test_a_graph_has_the_shape_of_most_training_images(tmp_path, monkeypatch, capsys):
    config = {"image_size": 96}
    for common, size in (([480, 640], (96, 128)), ([1080, 1920], (96, 160)), ([900, 600], (160, 96)), (None, (96, 96))):
        assert export.canvas_size(export.drawn_image(config | {"common_size": common}), config, 32) == size
    checkpoint = write_checkpoint(tmp_path / "best.pth", "detr", common_size=[480, 640])
    status, out, error = called(export.main, [checkpoint, "--format", "torch"], monkeypatch, capsys)
    assert status == 0 and "best.pt2: 96x128; differs" in out and "most training images have" in out, error


@pytest.mark.parametrize("size", [[0, 640], "wide", [640], [-1, 5]])
def test_a_checkpoint_with_an_impossible_size_is_refused(size, tmp_path):
    with pytest.raises(UserError, match="its settings describe no detector"):
        load(write_checkpoint(tmp_path / "best.pth", "detr", common_size=size))


def test_exported_files_are_called_like_what_they_come_from(tmp_path, monkeypatch):
    (tmp_path / "v1.5").mkdir()
    (tmp_path / "best.x.pth").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "v1.5")
    for source, name in (
        (tmp_path / "v1.5", tmp_path / "v1.5.onnx"),
        (".", tmp_path / "v1.5.onnx"),
        (tmp_path / "best.x.pth", tmp_path / "best.x.onnx"),
        ("me/cats-v1.0", Path("cats-v1.0.onnx")),  # of the hub
        ("models/ecdet_s.pth", Path("models/ecdet_s.onnx")),  # to be downloaded
    ):
        assert export.default_output(source, ".onnx") == name


def test_a_device_is_not_named_in_vain(tmp_path):
    with pytest.raises(UserError, match="--device cpu: .*a.onnx computes on what its runtime finds"):
        load(tmp_path / "a.onnx", device="cpu")


def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path / "best.pth", "detr")
    monkeypatch.setattr(export, "SCORES_WITHIN", -1.0)
    status, _, err = called(export.main, [checkpoint, "--format", "torch"], monkeypatch, capsys)
    assert status == 2 and "not written: the graph's detections differ" in err
    assert [p.name for p in tmp_path.iterdir()] == ["best.pth"]


def test_the_difference_of_two_detections():
    a = (
        torch.tensor([0.9, 0.5, 0.5]),
        torch.tensor([0, 1, 1]),
        torch.tensor([[0, 0, 5, 5], [1, 1, 4, 4], [7, 7, 9, 9]]).float(),
    )
    assert furthest(a, a) == (0.0, 0.0)
    swapped = [part[[0, 2, 1]] for part in a]
    assert furthest(a, swapped) == (0.0, 0.0)
    moved = a[0], a[1], a[2] + torch.tensor([0, 0, 0, 0.25])
    assert furthest(a, moved) == (0.0, 0.25)
    assert furthest(a, (a[0], torch.tensor([0, 1, 2]), a[2])) == (
        0.0,
        6.0,
    )  # the third has no other of its class but the second
    assert furthest(a, (a[0], torch.tensor([2, 2, 2]), a[2])) == (float("inf"), float("inf"))
