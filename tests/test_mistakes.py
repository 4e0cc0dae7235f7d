import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.cocoeval import COCOeval
from test_commands import SMALL, called

import evaluate
import metrics
import plots
import runs
import train
from evaluate import suppressed
from layouts import load_splits
from mistakes import Case, cases_of, confusion, doubles, judge, worst
from splits import Split, make_record


def a_split():
    rows = [
        (0, 0, 10, 10, 0, 100, False),
        (20, 0, 30, 10, 1, 100, False),
        (40, 0, 70, 30, 1, 900, False),
        (0, 40, 10, 50, 0, 100, True),
    ]
    return Split(
        "val",
        ["cat", "dog"],
        [1, 2],
        [make_record(1, Path("a.png"), (80, 60), rows), make_record(2, Path("b.png"), (80, 60), [])],
    )


def detections(*rows):
    table = torch.tensor(rows).reshape(-1, 6)
    return {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": table[:, 5]}


def test_every_detection_and_object_is_told_apart():
    found = {
        0: detections(
            [0, 0, 10, 10, 0, 0.9],
            [1, 0, 11, 10, 0, 0.8],  # right, and the same again
            [20, 0, 30, 10, 0, 0.7],  # a dog taken for a cat
            [0, 40, 10, 50, 0, 0.9],  # a difficult object: left out
            [60, 40, 70, 50, 1, 0.6],
            [40, 0, 70, 30, 1, 0.1],
        ),  # nothing there; too unsure to count
        1: detections(),
    }
    cases = cases_of(judge(a_split(), found))
    told = sorted((str(c.truth), str(c.detected), round(c.score, 1)) for c in cases)
    assert told == sorted(
        [("0", "0", 0.9), ("None", "0", 0.8), ("1", "0", 0.7), ("None", "1", 0.6), ("1", "None", 0.0)]
    )
    counts = confusion(cases, 2)
    assert counts.tolist() == [[1, 0, 0], [1, 0, 1], [1, 1, 0]]
    assert counts[:2].sum() == 3  # each object that counts once
    assert [(c.detected, round(c.score, 1)) for c in worst(cases)] == [(0, 0.8), (0, 0.7), (1, 0.6), (None, 0.0)]
    assert worst(cases, 2)[1].box == [40, 0, 70, 30]


def test_a_double_has_no_object_of_its_own():
    rows = [
        (0, 0, 20, 20, 0, 400, False),
        (2, 0, 22, 20, 0, 400, False),
        (40, 0, 60, 20, 1, 400, False),
    ]  # two cats that overlap by 0.82, and a dog
    split = Split("val", ["cat", "dog"], [1, 2], [make_record(1, Path("a.png"), (80, 60), rows)])
    both, dog = ([0, 0, 20, 20, 0, 0.9], [2, 0, 22, 20, 0, 0.8]), [40, 0, 60, 20, 1, 0.7]
    assert doubles(judge(split, {0: detections(*both, dog)})) == 0
    again, unsure, other, apart = (
        [1, 0, 21, 20, 0, 0.6],
        [1, 0, 21, 20, 0, 0.3],
        [1, 0, 21, 20, 1, 0.6],
        [40, 8, 60, 28, 1, 0.6],
    )
    assert doubles(judge(split, {0: detections(*both, dog, again)})) == 1 / 4
    assert doubles(judge(split, {0: detections(*both, dog, unsure, other, apart)})) == 0
    assert doubles(judge(split, {0: detections()})) == 0


def test_suppressed_are_those_that_a_better_one_of_their_class_overlaps():
    found = {0: detections([0, 0, 20, 20, 0, 0.5], [2, 0, 22, 20, 0, 0.8], [2, 0, 22, 20, 1, 0.7]), 3: detections()}
    assert (
        suppressed(found, 0.9)[0]["scores"].tolist() == pytest.approx([0.8, 0.7, 0.5])
        and len(suppressed(found, 0.9)[3]["scores"]) == 0
    )
    assert suppressed(found, 0.7)[0]["scores"].tolist() == pytest.approx([0.8, 0.7]) and suppressed(found, 0.7)[0][
        "labels"
    ].tolist() == [0, 1]


def test_a_detection_of_the_right_class_goes_before_a_nearer_one():
    split = Split(
        "val", ["cat", "dog"], [1, 2], [make_record(1, Path("a.png"), (80, 60), [(0, 0, 10, 10, 0, 100, False)])]
    )
    cases = cases_of(judge(split, {0: detections([0, 0, 10, 10, 1, 0.9], [1, 0, 11, 10, 0, 0.5])}))
    assert sorted((str(c.truth), c.detected) for c in cases) == [("0", 0), ("None", 1)]


def test_curves_are_coco_evaluations(tiny_data):
    _, val = load_splits(tiny_data)
    perfect = {
        i: {
            "boxes": torch.from_numpy(r.boxes).float(),
            "labels": torch.from_numpy(r.labels),
            "scores": torch.ones(len(r.boxes)),
        }
        for i, r in enumerate(val.records)
    }
    figures, curves = metrics.measure(val, perfect)
    assert (
        set(curves) == {"kind 7", "kind 300"}
        and figures["AP50"] == pytest.approx(1)
        and all(ap == pytest.approx(1) and min(p) > 0.99 for ap, p in curves.values())
    )
    half = {i: {key: value[:1] for key, value in d.items()} for i, d in perfect.items()}  # the first class alone
    figures, curves = metrics.measure(val, half)
    assert curves["kind 7"][0] == pytest.approx(1) and curves["kind 300"][0] == 0


HERE, of_a_class = os.getpid(), metrics.class_curves


def elsewhere(task):
    assert os.getpid() != HERE
    return of_a_class(task)


def killed(task):
    if os.getpid() != HERE:
        os.kill(os.getpid(), signal.SIGKILL)
    return of_a_class(task)


def many_detections():
    rng, records, found = np.random.default_rng(0), [], {}
    for i in range(
        12
    ):  # nothing is of class 3, nothing is taken for class 2, some are crowds, pictures 10 and 11 are empty
        objects = [
            (*corner, *(corner + side), rng.integers(3), side.prod(), rng.random() < 0.1)
            for corner, side in zip(rng.uniform(0, 300, (6, 2)), rng.uniform(5, 150, (6, 2)))
        ]
        records.append(make_record(i, Path(f"{i}.png"), (640, 480), objects if i < 10 else []))
        boxes = np.array([o[:4] for o in objects]).repeat(40, 0) + rng.normal(0, 8, (240, 4))
        found[i] = {
            "boxes": torch.from_numpy(boxes).float(),
            "labels": torch.from_numpy(rng.choice([0, 1, 3], 240)),
            "scores": torch.from_numpy(rng.random(240).round(1)).float(),
        }
    return Split("val", ["a", "b", "c", "d"], [1, 2, 3, 4], records), found


def test_figures_are_pycocotools_of_the_whole():
    split, found = many_detections()
    truth = metrics.coco_of(range(12), dict(enumerate(split.classes)), metrics.annotations_of(split))
    theirs = COCOeval(truth, truth.loadRes(metrics.result_rows(found)), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    figures, curves = metrics.measure(split, found)
    assert (
        list(figures.values())[:12] == theirs.stats.tolist()
        and 0 < figures["AP"] < 1
        and set(curves) == {"a", "b", "c"}
    )
    assert (
        figures["class/a"] == theirs.eval["precision"][:, :, 0, 0, 2].mean()
        and figures["class/c"] == 0
        and figures["class/d"] == -1
    )


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="metrics.in_processes forks on Linux alone; elsewhere there is one process, as in the test above",
)
def test_figures_are_the_same_in_several_processes_also_where_one_is_killed(monkeypatch):
    split, found = many_detections()
    alone = metrics.measure(split, found)
    monkeypatch.setattr(metrics, "MANY", 0)
    monkeypatch.setattr(metrics.os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(metrics, "class_curves", elsewhere)
    assert metrics.measure(split, found) == alone
    monkeypatch.setattr(metrics, "class_curves", killed)
    assert metrics.measure(split, found) == alone  # done again here


def test_cases_are_cut_out_where_they_are(tmp_path):
    image = Image.new("RGB", (200, 100), "grey")
    image.paste("red", (180, 80, 200, 100))
    sheet = plots.draw_cases(
        [Case(0, None, 0, 0.9, [180, 80, 200, 100]), Case(0, 1, None, 0.0, [0, 0, 150, 90])],
        lambda index: image,
        ["cat", "a dog with a very long name indeed"],
    )
    pixels = np.asarray(sheet)
    assert (np.abs(pixels[:, :300].astype(int) - (255, 0, 0)).sum(-1) < 30).sum() > 300  # the object is on its crop
    plots.draw_confusion(np.arange(9).reshape(3, 3), ["cat", "dog"], tmp_path / "c.png")
    plots.draw_precision_recall(
        {"cat": (0.5, [1.0] * 101), "dog": (0.1, [0.2] * 101)}, ["cat", "dog"], tmp_path / "p.png"
    )
    assert (tmp_path / "c.png").stat().st_size > 0 and (tmp_path / "p.png").stat().st_size > 0


def test_a_run_ends_with_its_report_and_evaluate_draws_it_again(tiny_data, tmp_path, monkeypatch, capsys):
    status, out, err = called(
        train.main, ["--data", tiny_data, *SMALL, "--steps", 3, "--out", tmp_path / "run"], monkeypatch, capsys
    )
    assert status == 0, err
    pictures = {"precision_recall.png", "confusion.png", "mistakes.png"}
    assert pictures <= {p.name for p in (tmp_path / "run").iterdir()}
    status, out, err = called(
        evaluate.main, [tmp_path / "run" / "best.pth", "--pictures", tmp_path / "again"], monkeypatch, capsys
    )
    assert status == 0 and {p.name for p in (tmp_path / "again").iterdir()} == pictures, err


def test_patience_ends_a_run_that_gets_no_better(tiny_data, tmp_path, monkeypatch, capsys):
    aps = iter([0.5, 0.6, 0.4, 0.3, 0.2, 0.1])
    real = runs.evaluate

    def falling(*args):
        figures, *more = real(*args)
        return figures | {"AP": next(aps)}, *more

    monkeypatch.setattr(runs, "evaluate", falling)
    status, out, err = called(
        train.main,
        ["--data", tiny_data, *SMALL, "--epochs", 6, "--eval-every", 1, "--patience", 2, "--out", tmp_path / "run"],
        monkeypatch,
        capsys,
    )
    assert status == 0 and "no better AP in 2 epochs; ended after step 12" in out, err
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["AP"] for row in rows] == [0.5, 0.6, 0.4, 0.3]
    status, out, err = called(train.main, ["--resume", tmp_path / "run"], monkeypatch, capsys)
    assert status == 0 and "nothing is left" in out and "after step 12" in out, err


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_other_trackers_get_the_same_where_they_are_installed(name, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    arguments = ["--data", tiny_data, *SMALL, "--steps", 1, f"--{name}"]
    status, _, err = called(train.main, [*arguments, "--out", tmp_path / "without"], monkeypatch, capsys)
    assert status == 2 and f"pip install {name}" in err
    logged, begun = {}, {}

    class Fake:
        def init(self, **options):
            begun.update(options["config"])
            return self

        def start_run(self, run_name):
            begun["name"] = run_name

        log_params = staticmethod(begun.update)

        def log(self, scalars, step):
            logged.update({name: (value, step) for name, value in scalars.items()})

        log_metrics = log

    monkeypatch.setitem(sys.modules, name, Fake())
    status, _, err = called(train.main, [*arguments, "--out", tmp_path / "with"], monkeypatch, capsys)
    row = json.loads((tmp_path / "with" / "log.jsonl").read_text())
    assert status == 0 and str(begun["batch_size"]) == "4", err
    assert logged["losses/giou"] == (row["losses"]["loss_giou"], 1) and logged["validation/AP"] == (row["AP"], 1)
    assert any(key.startswith("validation/class/kind") for key in logged)


def test_tensorboard_where_it_is_installed(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    arguments = ["--data", tiny_data, *SMALL, "--steps", 1, "--tensorboard"]
    status, _, err = called(train.main, [*arguments, "--out", tmp_path / "without"], monkeypatch, capsys)
    assert status == 2 and "pip install tensorboard" in err
    written = {}

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written[name] = value, step

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("fake", (), {"SummaryWriter": SummaryWriter}))
    status, _, err = called(train.main, [*arguments, "--out", tmp_path / "with"], monkeypatch, capsys)
    row = json.loads((tmp_path / "with" / "log.jsonl").read_text())
    assert (
        status == 0
        and written["losses/giou"] == (row["losses"]["loss_giou"], 1)
        and written["validation/AP"] == (row["AP"], 1)
    ), err


def test_more_objects_than_coco_counts_are_said_and_counted(capsys):
    """140 of one class in an image, all found: COCO's AP counts 100 of them."""
    corners = np.stack([np.arange(140) % 14, np.arange(140) // 14], axis=1) * 40.0
    boxes = np.concatenate([corners, corners + 30], axis=1)
    crowded = make_record(
        0,
        Path("0.png"),
        (600, 600),
        [(*box, 0, 900, False) for box in boxes] + [(0, 0, 600, 600, 1, 360000, False)] * 20,
    )
    split = Split("val", ["a", "b"], [1, 2], [crowded])
    found = {
        0: {
            "boxes": torch.from_numpy(boxes).float(),
            "labels": torch.zeros(140, dtype=torch.long),
            "scores": torch.linspace(1, 0.5, 140),
        }
    }
    figures, curves = metrics.measure(split, found)
    assert figures["class/a"] == pytest.approx(100 / 140, abs=0.01) and figures["AP"] == pytest.approx(
        0.5 * 100 / 140, abs=0.01
    )
    assert figures["AP_all"] == pytest.approx(0.5) and len(curves["a"][1]) == 101
    assert "140 objects of one class" in metrics.crowding(split) and "AP_all" in metrics.crowding(split)
    for ignored in (True, False):
        few = Split(
            "val",
            ["a", "b"],
            [1, 2],
            [
                make_record(
                    0,
                    Path("0.png"),
                    (600, 600),
                    [(*box, i % 2, 900, ignored and i > 100) for i, box in enumerate(boxes)],
                )
            ],
        )
        assert metrics.crowding(few) is None and "AP_all" not in metrics.measure(few, found)[0]  # 70 of each
