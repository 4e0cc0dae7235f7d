"""Whole commands, run as a user runs them."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import benchmark
import compare_patches
import features
import pytest
import torch
from conftest import ROOT, interrupted_at, same_weights, write_coco
from PIL import Image

import check_dims
import datasets
import evaluate
import infer
import train
from backbones import BACKBONES, build_backbone
from detr_model import DETECTORS
from errors import run_script
from resolve import describe_cost
from settings import Settings, build_parser

SMALL = ["--backbone", "ecvit-nano", "--image-size", "48", "--batch-size", "4", "--num-queries", "10"]


def command(script, *arguments, cwd=None, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        **options,
    )


def called(main, arguments, monkeypatch, capsys):
    """Runs a script's main in this process -> (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    status = 0
    try:
        run_script(main)
    except SystemExit as end:
        status = end.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def finished_run(tiny_data, tmp_path_factory):
    """A run of two epochs: (folder it was started in, run folder, the process)."""
    cwd = tmp_path_factory.mktemp("work")
    process = command("train.py", "--data", tiny_data, *SMALL, "--epochs", 2, "--workers", 1, cwd=cwd)
    assert process.returncode == 0, process.stderr
    return cwd, cwd / "runs" / tiny_data.name, process


def test_a_run_leaves_everything_it_promises(finished_run):
    _, folder, process = finished_run
    assert "leaked" not in process.stderr  # what some libraries say of objects that are still there at the end
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "log.jsonl",
        "last.pth",
        "best.pth",
        "curves.png",
        "train_batch.png",
        "val_samples.png",
        "precision_recall.png",
        "confusion.png",
        "mistakes.png",
        "report.html",
    }
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and rows[-1]["step"] == 6
    assert all("AP" in rows[-1] and row["losses"]["loss_class"] > 0 for row in rows)
    assert (
        all(f"epoch {i:3d}" in process.stdout + process.stderr for i in (1, 2)) and "python infer.py" in process.stdout
    )
    for name in ("curves.png", "train_batch.png", "val_samples.png"):
        assert Image.open(folder / name).size[0] > 400
    assert json.loads((folder / "config.json").read_text())["num_classes"] == 3


def test_infer_writes_pictures_and_coco_results(finished_run, tiny_data):
    cwd, _, _ = finished_run
    process = command("infer.py", tiny_data / "val2017", tiny_data / "train2017" / "*1.png", "--threshold", 0, cwd=cwd)
    assert process.returncode == 0, process.stderr
    results = json.loads((cwd / "detections" / "detections.json").read_text())
    assert {r["category_id"] for r in results} <= {7, 300, 90001} and results
    for r in results:
        x, y, w, h = r["bbox"]
        assert 0 <= x <= 64 and 0 <= y <= 48 and x + w <= 64.1 and y + h <= 48.1 and 0 <= r["score"] <= 1
    assert len(list((cwd / "detections").glob("*.jpg"))) == 6  # 4 and 2, of which two names repeat
    assert "images/s" in process.stdout and "best.pth" in process.stdout


def test_evaluate_gives_the_figures_of_the_run(finished_run, tiny_data):
    _, folder, _ = finished_run
    precision = json.loads((folder / "config.json").read_text())["precision"]  # a CPU may have trained in bfloat16
    process = command("evaluate.py", folder / "best.pth", "--batch-size", 4, "--doubles", "--precision", precision)
    assert process.returncode == 0, process.stderr
    figures = dict(line.rsplit(maxsplit=1) for line in process.stdout.splitlines())
    best = max(json.loads(line).get("AP", -1) for line in (folder / "log.jsonl").read_text().splitlines())
    assert float(figures["AP"]) == pytest.approx(best, abs=1e-3)
    assert " are duplicates: " in process.stdout and all(
        f"NMS at IoU {iou}: AP 0." in process.stdout for iou in (0.5, 0.7, 0.9)
    )
    assert {"AP50", "AR_100", "class/kind 7", "class/kind 300"} <= set(figures) and figures["class/kind 90001"] == "-"


STOPPED = [*SMALL, "--steps", 10, "--eval-every", 2, "--accumulate", 2, "--seed", 3, "--freeze-backbone", 2]


def test_a_stopped_run_ends_with_the_same_weights_as_one_never_stopped(tiny_data, tmp_path):
    """SIGINT in the middle of an epoch, then --resume: equal to the bit."""
    arguments = ["--data", tiny_data, *STOPPED]
    whole = command("train.py", *arguments, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments), "--out", str(tmp_path / "stopped")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (tmp_path / "stopped" / "train_batch.png").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert f"python train.py --resume {tmp_path / 'stopped'}" in output and "Traceback" not in output
    assert 0 < torch.load(tmp_path / "stopped" / "last.pth", weights_only=True)["training"]["step"] < 10
    resumed = command("train.py", "--resume", tmp_path / "stopped")
    assert resumed.returncode == 0, resumed.stderr
    same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("recipe", ["meta", "ecdet"])
def test_a_stopped_run_of_another_recipe_does_too(recipe, tiny_data, tmp_path, monkeypatch, capsys):
    """meta adds dropout and no average, ecdet noisy copies, mosaics and mix-up."""
    arguments = ["--data", tiny_data, *STOPPED, "--recipe", recipe]
    status, _, error = called(train.main, [*arguments, "--out", tmp_path / "whole"], monkeypatch, capsys)
    assert status == 0, error
    with monkeypatch.context() as patch:
        interrupted_at({7}, patch)
        status, _, error = called(train.main, [*arguments, "--out", tmp_path / "stopped"], monkeypatch, capsys)
    assert status == 130, error
    assert 0 < torch.load(tmp_path / "stopped" / "last.pth", weights_only=True)["training"]["step"] < 10
    status, _, error = called(train.main, ["--resume", tmp_path / "stopped"], monkeypatch, capsys)
    assert status == 0, error
    same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch, capsys):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"format": 1, "model": Trap(), "config": {}}, tmp_path / "trap.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    status, _, error = called(
        infer.main, [tmp_path / "a.png", "--checkpoint", tmp_path / "trap.pth"], monkeypatch, capsys
    )
    assert status == 2 and "not a checkpoint" in error and not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "main, arguments, message",
    [
        (train.main, ["--data", "nowhere"], "nowhere: no such folder"),
        (train.main, ["--data", "DATA", "--backbone", "dinov3-vit-s16"], "the nearest: dinov3-vits16"),
        (
            train.main,
            ["--data", "DATA", "--backbone", "ecvit-nano", "--backbone-weights", "pretrained"],
            "no released weights",
        ),
        (train.main, ["--data", "DATA", "--backbone-weights", "lost.pth"], "lost.pth: no such"),
        (
            train.main,
            ["--data", "DATA", "--backbone", "ecvit-nano", "--batch-size", "0"],
            "--batch-size has to be more than 0",
        ),
        (
            train.main,
            ["--data", "DATA", "--backbone", "ecvit-nano", "--freeze-backbone", "some"],
            "--freeze-backbone takes a number",
        ),
        (train.main, ["--data", "DATA", "--size", "l"], "add --detector ecdet"),
        (train.main, ["--data", "DATA", "--init", "PICTURE"], "not a checkpoint"),
        (train.main, ["--data", "DATA", "--train-split", "summer"], "no annotations for 'summer'"),
        (train.main, ["--resume", "runs/none"], "runs/none/last.pth: no such checkpoint"),
        (train.main, ["--resume", "runs/none", "--lr", "1"], "leave out --lr"),
        (train.main, ["--data", "DATA", *SMALL, "--out", "RUN"], "already holds a run"),
        (infer.main, ["nothing.jpg"], "nothing.jpg: no such image"),
        (infer.main, ["EMPTY"], "no images or videos in this folder"),
        (infer.main, ["PICTURE"], "no run in runs/ has a best.pth"),
        (infer.main, ["PICTURE", "--checkpoint", "PICTURE"], "not a checkpoint"),
        (infer.main, ["BROKEN", "--checkpoint", "BEST"], "1 of 1 files can't be read"),
        (evaluate.main, ["gone.pth"], "gone.pth: no such checkpoint"),
        (evaluate.main, ["BEST", "--layout", "coco"], "--layout coco: is for --data"),
        (datasets.main, ["SINGLE", "--val-split", "val"], "one part has all images; leave out --val-split val"),
        (
            train.main,
            ["--data", "SINGLE", "--val-split", "val"],
            "one part has all images; leave out --val-split val",
        ),
        (
            train.main,
            ["--data", "DATA", "--val-fraction", "0.3"],
            "--val-fraction 0.3: is for a dataset with one part only",
        ),
        (train.main, ["--data", "DATA", "--shard"], "--shard spreads the backbone over several processes"),
        (train.main, ["--data", "DATA", "--layers", "2"], "--layers: for plain vision transformers"),
        (train.main, ["--data", "DATA", "--precision", "float8"], "invalid choice: 'float8'"),
        (evaluate.main, ["BEST", "--data", "OTHER"], "its classes are not those of the checkpoint"),
        (check_dims.main, ["--run", "dinov2-smal"], "the nearest: dinov2-small"),
        (check_dims.main, ["--size", "0"], "--size has to be more than 0"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(
    main, arguments, message, tiny_data, finished_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xff nothing")
    names = {
        "DATA": tiny_data,
        "EMPTY": tmp_path / "empty",
        "PICTURE": tmp_path / "a.png",
        "BROKEN": tmp_path / "b.jpg",
        "BEST": finished_run[1] / "best.pth",
        "RUN": finished_run[1],
    }
    if "OTHER" in arguments:
        names["OTHER"] = write_coco(tmp_path / "other", {"train": 1, "val": 1})
    if "SINGLE" in arguments:
        names["SINGLE"] = write_coco(tmp_path / "single", {"train": 4})
        (names["SINGLE"] / "annotations" / "instances_train.json").rename(names["SINGLE"] / "all.json")
        (names["SINGLE"] / "train").rename(names["SINGLE"] / "images")
    status, _, error = called(main, [names.get(a, a) for a in arguments], monkeypatch, capsys)
    assert status == 2 and message in error, error
    assert "usage:" in error or (error.startswith("error: ") and error.count("\n") == 1), error


def test_a_mistake_prints_no_traceback_in_a_real_process(tmp_path):
    process = command("train.py", "--data", tmp_path / "nowhere")
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "Traceback" not in process.stderr


def test_check_dims_agrees_with_itself():
    process = command("check_dims.py", "--size", 640)
    assert process.returncode == 0, process.stderr
    assert "4096" in next(line for line in process.stdout.splitlines() if "vit7b16" in line)
    assert all(any(line.startswith(f"{name} ") for line in process.stdout.splitlines()) for name in BACKBONES)
    process = command("check_dims.py", "--run", "ecvit-nano", "--size", 100)
    assert process.returncode == 0 and "as the table says" in process.stdout


def test_help_explains_every_option():
    text, parser = command("train.py", "--help").stdout, build_parser("")
    for action in parser._actions:
        assert action.option_strings[0] in text and (action.help or action.dest in ("epochs", "steps", "seed", "lr")), (
            action.dest
        )


def test_a_run_says_what_it_will_cost(tiny_data, tmp_path, monkeypatch, capsys):
    status, out, error = called(
        train.main,
        ["--data", tiny_data, *SMALL, "--steps", 11, "--eval-every", 99, "--out", tmp_path / "run"],
        monkeypatch,
        capsys,
    )
    assert status == 0 and out.count("training will take about 1 min on this machine, ") == 1, out + error
    s = Settings(image_size=640, backbone="ecvitt")
    given = {"data": "my photos", "epochs": 100, "backbone_weights": "pretrained", "ema": False, "lr": 1e-4}
    lines = describe_cost(80.0, 8.0, 3790, s, given, 1)
    assert lines[0].startswith("training will take about 8 h 27 min on this machine, 8 s a step") and len(lines) == 4
    assert (
        lines[2].strip()
        == "python train.py --data 'my photos' --backbone-weights pretrained --no-ema --lr 0.0001 --minutes 20 "
        "--image-size 320"
    )
    assert (
        lines[3].strip() == "python train.py --data 'my photos' --no-ema --lr 0.0001 --minutes 20 --backbone ecvit-nano"
    )
    for line in lines[2:]:  # what is printed can be typed
        build_parser("").parse_args(shlex.split(line)[2:])
    assert "torchrun --nproc-per-node 8 train.py --data" in describe_cost(80.0, 8.0, 3790, s, given, 8)[2]
    assert (
        len(describe_cost(80.0, 8.0, 3790, s, None, 1)) == 1 and len(describe_cost(80.0, 8.0, 300, s, given, 1)) == 1
    )  # resumed; under an hour
    assert describe_cost(80.0, 8.0, math.inf, replace(s, minutes=4.5), given, 1)[0].startswith(
        "training will take about 5 min"
    )
    small = describe_cost(80.0, 8.0, 3790, replace(s, image_size=224, backbone="ecvit-nano"), given, 1)
    assert len(small) == 3 and small[2].endswith("--minutes 20")


def test_evaluation_opens_nothing_of_the_training_part(finished_run, tmp_path, monkeypatch, capsys):
    """COCO and YOLO: the training images may be gone, and another image may be one that a run had to leave out."""
    root = write_coco(tmp_path / "data", {"train2017": 3, "val2017": 3}, category_ids=(7, 300, 90001))
    for path in (root / "train2017").iterdir():
        path.unlink()
    status, out, error = called(evaluate.main, [finished_run[1] / "best.pth", "--data", root], monkeypatch, capsys)
    assert status == 0 and "AP50" in out, error
    (root / "val2017" / "001.png").write_text("")
    status, _, error = called(evaluate.main, [finished_run[1] / "best.pth", "--data", root], monkeypatch, capsys)
    assert status == 2 and "001.png" in error
    status, out, error = called(
        evaluate.main, [finished_run[1] / "best.pth", "--data", root, "--skip-bad-images"], monkeypatch, capsys
    )
    assert status == 0, error
    yolo = tmp_path / "yolo"
    for part in ("train", "val"):
        (yolo / "images" / part).mkdir(parents=True)
        (yolo / "labels" / part).mkdir(parents=True)
        (yolo / "labels" / part / "a.txt").write_text("0 0.5 0.5 0.25 0.5")
    (yolo / "images" / "train" / "a.png").write_text("no image")
    Image.new("RGB", (64, 48)).save(yolo / "images" / "val" / "a.png")
    (yolo / "data.yaml").write_text(
        "names: ['kind 7', 'kind 300', 'kind 90001']\ntrain: images/train\nval: images/val\n"
    )
    status, out, error = called(evaluate.main, [finished_run[1] / "best.pth", "--data", yolo], monkeypatch, capsys)
    assert status == 0, error


def test_a_batch_of_one_and_more_than_the_data_set_train(tmp_path, monkeypatch, capsys):
    root = write_coco(tmp_path / "data", {"train": 3, "val": 1})
    for batch in (1, 8):
        arguments = [
            "--data",
            root,
            "--backbone",
            "ecvit-nano",
            "--image-size",
            "48",
            "--batch-size",
            batch,
            "--steps",
            2,
            "--out",
            tmp_path / f"run{batch}",
        ]
        status, out, error = called(train.main, arguments, monkeypatch, capsys)
        assert status == 0, error


def test_it_learns(tmp_path, monkeypatch, capsys):
    """Red and blue rectangles on grey, from nothing: far from perfect after a minute, and far from zero."""
    root = write_coco(tmp_path / "data", {"train": 32, "val": 16}, size=(96, 64))
    arguments = [
        "--data",
        root,
        "--backbone",
        "ecvit-nano",
        "--image-size",
        "64",
        "--batch-size",
        8,
        "--steps",
        80,
        "--eval-every",
        99,
        "--out",
        tmp_path / "run",
    ]
    status, out, error = called(train.main, arguments, monkeypatch, capsys)
    assert status == 0, error
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["AP50"] > 0.5


def test_a_run_without_its_optimisers_is_not_gone_on_with(finished_run, tmp_path, monkeypatch, capsys):
    """best.pth in last.pth's place, or the last.pth of an earlier version, which had one optimiser."""
    content = torch.load(finished_run[1] / "last.pth", weights_only=True)
    content["training"]["optimizer"] = content["training"].pop("optimizers")[0]
    for number, saved in enumerate((content, {key: value for key, value in content.items() if key != "training"})):
        (tmp_path / str(number)).mkdir()
        torch.save(saved, tmp_path / str(number) / "last.pth")
        status, _, err = called(train.main, ["--resume", tmp_path / str(number)], monkeypatch, capsys)
        assert status == 2 and err.count("\n") == 1 and "holds no optimizer state" in err


@pytest.mark.parametrize(
    "options",
    [
        ["--detector", "dino"],
        ["--detector", "ssd"],
        ["--detector", "dino", "--backbone", "dinov2-small", "--patch-size", 16, "--layers", "5,11", "--scales", 5],
    ],
)
def test_other_detectors_train_infer_and_evaluate(options, tiny_data, tmp_path, monkeypatch, capsys):
    arguments = [
        "--data",
        tiny_data,
        *SMALL,
        "--backbone-weights",
        "none",
        "--steps",
        2,
        "--out",
        tmp_path / "run",
        *options,
    ]
    status, out, err = called(train.main, arguments, monkeypatch, capsys)
    assert status == 0, err
    best = tmp_path / "run" / "best.pth"
    picture = next((tiny_data / "val2017").glob("*.png"))
    status, out, err = called(
        infer.main,
        [picture, "--checkpoint", best, "--out", tmp_path / "found", "--threshold", 0.01],
        monkeypatch,
        capsys,
    )
    assert status == 0 and len(json.loads((tmp_path / "found" / "detections.json").read_text())) > 0, err
    status, out, err = called(evaluate.main, [best], monkeypatch, capsys)
    assert status == 0 and "AP50" in out, err
    status, out, err = called(
        train.main,
        ["--data", tiny_data, "--init", best, "--pyramid", "resize", "--out", tmp_path / "other"],
        monkeypatch,
        capsys,
    )
    assert status == 2 and "--pyramid resize: the architecture" in err


def test_a_sheet_of_features(finished_run, tmp_path, monkeypatch, capsys):
    Image.effect_noise((120, 80), 60).save(tmp_path / "a.png")
    build_backbone("dinov3-vits16").model.save_pretrained(tmp_path / "weights")
    capsys.readouterr()
    arguments = [
        tmp_path / "a.png",
        "--backbone",
        f"dinov3-vits16={tmp_path / 'weights'}",
        "ecvit-nano=none",
        "--layers",
        "2,5",
        "--image-size",
        64,
    ]
    status, out, err = called(
        features.main,
        [*arguments, "--checkpoint", finished_run[1] / "best.pth", "--out", tmp_path / "sheet.png"],
        monkeypatch,
        capsys,
    )
    assert status == 0, err
    assert "dinov3-vits16, block 5: 1 images, 4x6 tokens of 384" in out and out.count("ecvit-nano") == 4
    assert Image.open(tmp_path / "sheet.png").width > 6 * 120
    for wrong, message in (
        [["nowhere.jpg", "--backbone", "ecvit-nano=none"], "nowhere.jpg: can't be read"],
        [[tmp_path / "a.png"], "which features?"],
        [[tmp_path / "a.png", "--backbone", "ecvit-nano=none", "--layers", "6"], "the blocks of ecvit-nano are 0 to 5"],
    ):
        status, _, err = called(features.main, wrong, monkeypatch, capsys)
        assert status == 2 and message in err


def test_principal_colours_are_the_directions_of_most_variance():
    torch.manual_seed(0)
    spread = torch.randn(200, 8) * torch.tensor([1.0, 9.0, 1.0, 1.0, 5.0, 1.0, 3.0, 1.0])
    first, second = features.principal_colours(
        [spread[:120].unflatten(0, (10, 12)), spread[120:].unflatten(0, (8, 10))]
    )
    assert first.shape == (10, 12, 3) and 0 <= first.min() and first.max() <= 1
    colours = torch.cat([first.flatten(0, 1), second.flatten(0, 1)])
    for component, channel in enumerate((1, 4, 6)):
        assert torch.corrcoef(torch.stack([colours[:, component], spread[:, channel]]))[0, 1].abs() > 0.9


def test_patches_are_compared(tmp_path, monkeypatch, capsys):
    status, out, err = called(
        compare_patches.main,
        ["--backbone", "dinov2-small", "--weights", "none", "--grid", 4, "--out", tmp_path / "p.png"],
        monkeypatch,
        capsys,
    )
    assert status == 0, err
    away = {
        line.split("  ")[0]: float(line.split()[-1])
        for line in out.splitlines()
        if line.startswith(("pseudo", "bicubic", "none", "newly"))
    }
    assert len(away) == 4 and away["pseudo-inverse"] < 0.2 * min(v for k, v in away.items() if k != "pseudo-inverse")
    assert (tmp_path / "p.png").exists()
    status, _, err = called(compare_patches.main, ["--backbone", "ecvitt"], monkeypatch, capsys)
    assert status == 2 and "not a plain vision transformer" in err


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_benchmark_measures_any_detector(detector, monkeypatch, capsys):
    arguments = [
        "--detector",
        detector,
        "--size",
        "nano",
        "--backbone",
        "ecvit-nano",
        "--image-size",
        64,
        "--train-size",
        64,
        "--batch-size",
        2,
        "--repeats",
        1,
    ]
    status, out, err = called(benchmark.main, arguments, monkeypatch, capsys)
    assert status == 0, err
    assert "training step, 2 x 64x64, float32" in out and "inference, 1 x 64x64, float32" in out and "GFLOPs" in out
