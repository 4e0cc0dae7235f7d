"""report.html, the kinds of mistakes and what they cost, and the scores from which on detections count."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import write_coco
from PIL import Image
from test_commands import SMALL, called

import evaluate
import mistakes
import report
import train
from checkpoint import read_checkpoint
from detector import load
from errors import UserError
from metrics import measure
from mistakes import BACKGROUND, BOTH, CLASS, DUPLICATE, HIT, KINDS, LOCATION, judge
from splits import Split, make_record

CLASSES = ["cat", "dog", "cow"]


def random_split(seed, images=20, detections=12, ignored=0.0, folder=None):
    """A Split and detections that are right, shifted, doubled, of another class, or anywhere."""
    rng = np.random.default_rng(seed)
    records, found = [], {}
    for index in range(images):
        corners = rng.uniform(0, 60, (rng.integers(0, 5), 2))
        boxes = np.hstack([corners, corners + rng.uniform(12, 40, corners.shape)])
        labels = rng.integers(0, 3, len(boxes))
        rows = [(*box, label, 0, rng.random() < ignored) for box, label in zip(boxes, labels)]
        path = Path(folder or ".") / f"{index}.jpg"
        if folder:
            Image.fromarray(rng.integers(0, 255, (100, 100, 3), dtype=np.uint8)).save(path)
        records.append(make_record(index, path, (100, 100), rows))
        places = rng.uniform(0, 60, (detections, 2))
        guesses = np.hstack([places, places + rng.uniform(12, 40, places.shape)])
        guessed = rng.integers(0, 3, detections)
        for i in range(detections if len(boxes) else 0):
            j = rng.integers(len(boxes))
            if rng.random() < 0.7:
                guesses[i] = boxes[j] + rng.normal(0, rng.choice([0.5, 3, 8]), 4)
                guessed[i] = labels[j] if rng.random() < 0.7 else guessed[i]
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        found[index] = {
            "boxes": torch.from_numpy(guesses),
            "labels": torch.from_numpy(guessed),
            "scores": torch.from_numpy(rng.permutation(np.linspace(0.05, 0.95, detections)) + rng.uniform(0, 0.01)),
        }
    return Split("val", CLASSES, [1, 2, 3], records), found


def one_image(objects, *detections):
    """objects [(x1, y1, x2, y2, label)], detections (x1, y1, x2, y2, label, score) -> Findings."""
    split = Split("val", CLASSES, [1, 2, 3], [make_record(0, Path("a"), (99, 99), [(*o, 0, False) for o in objects])])
    table = torch.tensor(detections).double().reshape(-1, 6)
    return judge(split, {0: {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": table[:, 5]}})


CAT = (0, 0, 20, 20, 0)


@pytest.mark.parametrize(
    "detection, kind, is_about_it",
    [
        ((1, 0, 21, 20, 0, 0.5), HIT, True),
        ((1, 0, 21, 20, 1, 0.5), CLASS, True),
        ((10, 0, 30, 20, 0, 0.5), LOCATION, True),
        ((10, 0, 30, 20, 1, 0.5), BOTH, False),
        ((70, 0, 90, 20, 0, 0.5), BACKGROUND, False),
        ((18, 0, 38, 20, 0, 0.5), BACKGROUND, False),  # IoU 0.05
    ],
)
def test_kinds_of_mistakes(detection, kind, is_about_it):
    findings = one_image([CAT], detection)
    assert findings.kind.tolist() == [kind] and findings.object.tolist() == [0 if is_about_it else -1]


def test_the_second_detection_of_an_object_is_a_duplicate():
    findings = one_image([CAT], (2, 0, 22, 20, 0, 0.5), (0, 0, 20, 20, 0, 0.4))
    assert findings.kind.tolist() == [HIT, DUPLICATE] and findings.found_at.tolist() == [0.5]


@pytest.mark.parametrize("seed", range(5))
def test_ap50_is_pycocotools(seed):
    split, found = random_split(seed)
    ap50, _ = mistakes.costs(judge(split, found))
    assert ap50 == pytest.approx(measure(split, found)[0]["AP50"], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_costs_are_what_the_corrected_detections_gain(seed):
    """The mistakes of a kind are corrected one by one, and AP50 is measured again by pycocotools."""
    split, found = random_split(seed)
    findings = judge(split, found)
    _, gains = mistakes.costs(findings)
    before = measure(split, found)[0]["AP50"]
    for number, kind in enumerate(KINDS[:-1]):
        corrected, taken = {}, set()
        mended = {}  # object: score of the detection that is corrected, the best one of either kind
        for i in np.argsort(-findings.score):
            j = findings.object[i]
            if findings.kind[i] in (CLASS, LOCATION) and findings.found_at[j] == -np.inf:
                mended.setdefault(j, i)
        for index in range(len(split.records)):
            rows = []
            for i in np.flatnonzero(findings.image == index):
                box, label = findings.box[i], findings.label[i]
                if findings.kind[i] == number:
                    if mended.get(findings.object[i]) != i or number not in (CLASS, LOCATION):
                        continue
                    box = findings.object_box[findings.object[i]] if number == LOCATION else box
                    label = findings.object_label[findings.object[i]]
                rows.append((*box, label, findings.score[i]))
                taken.add(i)
            table = torch.tensor(np.array(rows).reshape(-1, 6))
            corrected[index] = {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": table[:, 5]}
        after = measure(split, corrected)[0]["AP50"]
        # a corrected detection may take an object from a worse one, which COCO then gives another
        assert gains[kind] == pytest.approx(max(0, after - before), abs=0.02), kind


@pytest.mark.skipif(importlib.util.find_spec("tidecv") is None, reason="tidecv is not installed")
@pytest.mark.parametrize("seed, ignored", [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.2), (4, 0.2)])
def test_costs_are_tidecvs(seed, ignored, monkeypatch):
    for name in ("cv2", "pandas", "seaborn"):  # its diagrams need them
        if importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, MagicMock())
    from tidecv.data import Data
    from tidecv.quantify import TIDE

    split, found = random_split(seed, ignored=ignored)
    truth, guesses = Data("truth"), Data("guesses")
    for number, name in enumerate(split.classes):
        truth.add_class(number, name)
    for index, record in enumerate(split.records):
        truth.add_image(index, str(index))
        for (x1, y1, x2, y2), label, is_ignored in zip(record.boxes, record.labels, record.ignored):
            add = truth.add_ignore_region if is_ignored else truth.add_ground_truth
            add(index, int(label), box=[x1, y1, x2 - x1, y2 - y1])
        for (x1, y1, x2, y2), label, score in zip(
            *(found[index][key].tolist() for key in ("boxes", "labels", "scores"))
        ):
            guesses.add_detection(index, label, score, box=[x1, y1, x2 - x1, y2 - y1])
    run = TIDE().evaluate(truth, guesses, mode=TIDE.BOX)
    ap50, gains = mistakes.costs(judge(split, found))
    assert ap50 == pytest.approx(run.ap / 100, abs=0.002)
    theirs = [
        value / 100 for value in run.fix_main_errors().values()
    ]  # class, box, other, duplicate, background, missed
    assert list(gains.values()) == pytest.approx(theirs, abs=0.002)


# Thresholds


@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_is_the_one_with_the_best_f1(seed):
    rng = np.random.default_rng(seed)
    scores, hits = rng.random(200).round(2), rng.random(200) < 0.4
    threshold, f1 = mistakes.best_threshold(scores, hits, 100)
    every = [mistakes.f1_score(scores, hits, 100, t) for t in np.linspace(0, 1, 2001)]
    assert f1 == pytest.approx(max(every)) and mistakes.f1_score(scores, hits, 100, threshold) == pytest.approx(f1)


def scored_split(shift, images=120):
    """Two classes whose right detections score 0.6 to 0.9, wrong ones 0.1 to 0.5; the second class's `shift` less."""
    rng = np.random.default_rng(0)
    records, found = [], {}
    for index in range(images):
        rows = [(0, 0, 20, 20, 0, 400, False), (40, 0, 60, 20, 1, 400, False)]
        records.append(make_record(index, Path(f"{index}.jpg"), (100, 100), rows))
        boxes = torch.tensor([[0, 0, 20, 20], [40, 0, 60, 20], [0, 60, 20, 80], [40, 60, 60, 80]]).double()
        scores = np.concatenate([rng.uniform(0.6, 0.9, 2), rng.uniform(0.1, 0.5, 2)]) - np.array([0, shift, 0, shift])
        found[index] = {"boxes": boxes, "labels": torch.tensor([0, 1, 0, 1]), "scores": torch.from_numpy(scores)}
    return Split("val", ["a", "b"], [1, 2], records), found


def test_a_class_has_a_threshold_of_its_own_only_where_that_gains():
    same = mistakes.find_thresholds(judge(*scored_split(0)))
    assert 0.5 <= same["score"] <= 0.6 and same["f1"] == 1 and same["by_class"] == {}
    apart = mistakes.find_thresholds(judge(*scored_split(0.3)))
    assert apart["by_class"].keys() >= {"b"} and 0.2 <= apart["by_class"]["b"] <= 0.3
    assert apart["by_class"].get("a", apart["score"]) > 0.4


def test_without_detections_there_is_the_usual_threshold():
    split, found = random_split(0)
    nothing = {i: {key: value[:0] for key, value in found[i].items()} for i in found}
    assert mistakes.find_thresholds(judge(split, nothing)) == {"score": 0.4, "f1": 0.0, "by_class": {}}
    assert mistakes.costs(judge(split, nothing))[0] == 0


def test_a_run_keeps_its_thresholds_for_detecting(tmp_path, monkeypatch, capsys):
    data = write_coco(tmp_path / "data", {"train": 6, "val": 4})
    run = tmp_path / "run"
    status, out, error = called(train.main, ["--data", data, *SMALL, "--steps", 3, "--out", run], monkeypatch, capsys)
    assert status == 0 and "best F1" in out, error
    content = read_checkpoint(run / "best.pth")
    detector = load(run / "best.pth", device="cpu")
    assert (
        detector.threshold == content["thresholds"]["score"] and detector.by_class == content["thresholds"]["by_class"]
    )
    assert load(run / "best.pth", device="cpu", threshold=0.9).threshold == 0.9
    before = (run / "best.pth").read_bytes()
    arguments = [run / "best.pth", "--report", tmp_path / "again.html"]
    status, out, error = called(evaluate.main, arguments, monkeypatch, capsys)
    assert status == 0 and "best F1" in out and (run / "best.pth").read_bytes() == before, error
    assert (run / "report.html").exists() and "@DATA@" not in (tmp_path / "again.html").read_text()
    detector.save(tmp_path / "mine")
    assert load(tmp_path / "mine", device="cpu").threshold == detector.threshold


def test_thresholds_by_class_decide_what_is_returned(tmp_path, monkeypatch, capsys):
    data = write_coco(tmp_path / "data", {"train": 6, "val": 4}, category_ids=(1, 2))
    run = tmp_path / "run"
    status, _, error = called(train.main, ["--data", data, *SMALL, "--steps", 2, "--out", run], monkeypatch, capsys)
    assert status == 0, error
    detector, image = load(run / "best.pth", device="cpu"), Image.new("RGB", (64, 48))
    everything = detector(image, threshold=0.0)
    detector.threshold, detector.by_class = 0.0, {detector.classes[1]: 2.0}
    found = detector(image)
    assert len(everything["labels"]) > len(found["labels"]) == int((everything["labels"] == 0).sum())


# The page


def write(path, split, found, log=()):
    findings = judge(split, found)
    figures, curves = measure(split, found)
    report.write_report(path, "runs/x", split, findings, mistakes.find_thresholds(findings), figures, curves, log)
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


HOSTILE = ["</script><img src=x onerror=fail()>", "&lt;b&gt;", "кот \u2028 ' \" ${1} @DATA@"]


def test_names_are_text_and_nothing_comes_from_elsewhere(tmp_path):
    split, found = random_split(0, folder=tmp_path)
    split.classes = HOSTILE
    data = write(tmp_path / "report.html", split, found)
    assert data["classes"] == HOSTILE
    page = (tmp_path / "report.html").read_text()
    assert "<img src=x" not in page and page.count("</script>") == 2
    assert not re.findall(r'(?:src|href)="?https?:|@import|url\(', page)


def test_images_are_those_with_most_mistakes_if_not_all_fit(tmp_path, monkeypatch):
    split, found = random_split(0, folder=tmp_path)
    data = write(tmp_path / "all.html", split, found)
    assert len(data["images"]) == 20 and data["left_out"] == 0
    monkeypatch.setattr(report, "SPACE", 120_000)
    data = write(tmp_path / "some.html", split, found)
    assert 0 < len(data["images"]) < 20 and len(data["images"]) + data["left_out"] == 20
    assert (tmp_path / "some.html").stat().st_size < 120_000


def test_counts_by_score_are_those_of_the_detections(tmp_path):
    split, found = random_split(1, folder=tmp_path)
    data, findings = write(tmp_path / "report.html", split, found), judge(split, found)
    for label in range(3):
        for step in (0, 37, 90):
            sure = (findings.label == label) & (findings.score >= step / 100)
            hits = int((sure & (findings.kind == HIT)).sum())
            assert [counts[step] for counts in data["counts"][label]] == [hits, int(sure.sum()) - hits]


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not chromium or not driver:
        pytest.skip("no chromium with its driver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "window-size=1300,900",
    ):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_the_page_in_a_browser(browser, tmp_path):
    split, found = random_split(0, folder=tmp_path)
    split.classes = HOSTILE
    log = [{"epoch": i, "losses": {"a": 5 - i}, "AP": i / 10, "AP50": i / 5} for i in range(1, 4)]
    data, findings = write(tmp_path / "report.html", split, found, log), judge(split, found)
    browser.get(f"file://{tmp_path / 'report.html'}")

    def choose(control, value):
        script = "const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
        browser.execute_script(script + "e.dispatchEvent(new Event('input'))", control, value)
        return browser.execute_script("return document.getElementById('total').textContent")

    def images():
        return browser.execute_script("return [...document.querySelectorAll('figcaption')].map(e => e.textContent)")

    counted = findings.kind != mistakes.IGNORED
    for step in (10, 50, 90):
        sure = counted & (findings.score >= step / 100)
        hits, total = (sure & (findings.kind == HIT)).sum(), sure.sum()
        expected = f"precision {hits / total:.3f} · recall {hits / len(findings.object_label):.3f}"
        assert expected in choose("score", step)
    mistaken = [int(re.search(r"(\d+) mistakes", text)[1]) for text in images()]
    assert mistaken == sorted(mistaken, reverse=True) and len(mistaken) == 20
    choose("score", 50)
    choose("kind", CLASS)
    choose("class", 1)
    chosen = counted & (findings.score >= 0.5) & (findings.kind == CLASS) & (findings.label == 1)
    assert len(images()) == len(set(findings.image[chosen]))
    names = browser.execute_script("return [...document.querySelectorAll('#class option')].map(e => e.textContent)")
    assert names == ["all", *HOSTILE] and data["classes"] == HOSTILE
    assert not browser.execute_script("return document.querySelectorAll('img[src=x]').length")
    for width in (380, 1600):
        browser.set_window_size(width, 900)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, errors


def test_images_with_many_objects_are_judged_whole():
    objects = [(7 * i % 90, 7 * (7 * i // 90), 7 * i % 90 + 6, 7 * (7 * i // 90) + 6, 0) for i in range(150)]
    findings = one_image(objects, *((*box, 0.9) for box in objects))
    assert (findings.kind == HIT).sum() == 150 and np.isfinite(findings.found_at).all()


def test_without_a_hit_there_is_the_usual_threshold():
    findings = one_image([CAT], (70, 0, 90, 20, 0, 0.03))
    assert mistakes.find_thresholds(findings)["score"] == 0.4


@pytest.mark.parametrize(
    "thresholds", [{"score": 0.3}, "x", {"score": 2, "by_class": {}}, {"score": 0.3, "by_class": {"a": "b"}}]
)
def test_thresholds_that_are_none_are_refused(thresholds, tmp_path, monkeypatch, capsys):
    data, run = write_coco(tmp_path / "data", {"train": 4, "val": 2}), tmp_path / "run"
    called(train.main, ["--data", data, *SMALL, "--steps", 1, "--out", run], monkeypatch, capsys)
    content = torch.load(run / "best.pth", weights_only=True)
    torch.save(content | {"thresholds": thresholds}, run / "best.pth")
    with pytest.raises(UserError, match="best.pth: "):
        load(run / "best.pth", device="cpu")
