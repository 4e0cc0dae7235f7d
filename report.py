"""What is said about a detector: report.html, in which any browser shows its figures and mistakes, and pictures."""

import base64
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import plots
from mistakes import HIT, IGNORED, KINDS, cases_of, confusion, costs, worst
from transforms import read_image

PAGE = Path(__file__).with_name("report_page.html")
SPACE = 15_000_000  # most bytes of a report
SIDES = (1600, 1080, 640, 480, 320)  # longest side of its images: the first at which all of them fit, else the last
LOWEST_SCORE = 0.05  # of detections that it shows, unless the threshold is still lower
STEPS = 100  # of the slider for the score


def write_report(path, title, split, findings, thresholds, figures, curves, log=()):
    """Writes the report of a Split's detections.

    findings, thresholds: see mistakes.py; figures, curves: see metrics.measure; log: the rows of log.jsonl.
    """
    _, gains = costs(findings)
    data = {
        "title": title,
        "split": split.name,
        "classes": split.classes,
        "kinds": KINDS,
        "figures": {name: rounded(value) for name, value in figures.items() if not name.startswith("class/")},
        "ap": [rounded(figures.get(f"class/{name}", -1)) for name in split.classes],
        "ap50": [rounded(curves[name][0]) if name in curves else -1 for name in split.classes],
        "precision": [rounded(curves[name][1]) if name in curves else [] for name in split.classes],
        "costs": {kind: rounded(cost) for kind, cost in gains.items()},
        "thresholds": thresholds,
        "counts": counts_by_score(findings),
        "objects": np.bincount(findings.object_label, minlength=len(split.classes)).tolist(),
        "confusion": confusion(cases_of(findings, thresholds["score"]), len(split.classes)).tolist(),
        "log": summary(log),
    }
    page = PAGE.read_text(encoding="utf-8")
    space = SPACE - len(page) - len(dumped(data)) - 1000
    data["images"], data["left_out"] = embedded_images(split, findings, thresholds["score"], space)
    Path(path).write_text(page.replace("@DATA@", dumped(data)), encoding="utf-8")


def dumped(data):
    """JSON that no browser takes for the end of its script, whatever the names in it."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def rounded(value):
    return np.round(value, 4).tolist()


def summary(log):
    """The rows of log.jsonl -> what the curves need."""
    rows = [{"epoch": row["epoch"], "loss": round(sum(row["losses"].values()), 4)} for row in log]
    for row, full in zip(rows, log):
        row |= {key: full[key] for key in ("AP", "AP50") if key in full}
    return rows


def counts_by_score(findings):
    """-> for each class [right, wrong], how many detections score at least 0, 0.01, ... 1: (K, 2, STEPS + 1)."""
    steps = np.arange(STEPS + 1) / STEPS
    counts = []
    for label in range(len(findings.classes)):
        own, hit = (findings.label == label) & (findings.kind != IGNORED), findings.kind == HIT
        scores = [np.sort(findings.score[own & right]) for right in (hit, ~hit)]
        counts.append([(len(s) - np.searchsorted(s, steps)).tolist() for s in scores])
    return counts


def embedded_images(split, findings, threshold, space):
    """The images, those with most mistakes first, as many as fit into so many bytes -> [{...}], how many do not."""
    wrong = Counter(findings.image[(findings.kind >= 0) & (findings.score >= threshold)].tolist())
    wrong += Counter(findings.object_image[findings.found_at < threshold].tolist())
    order = sorted(range(len(split.records)), key=lambda index: -wrong[index])
    for side in SIDES:
        images, left = [], space
        for index in order:
            image = describe(split, findings, index, min(threshold, LOWEST_SCORE))
            image["source"] = encoded(split, index, side)
            left -= len(dumped(image))
            if left < 0:
                break
            images.append(image)
        if len(images) == len(order):
            break
    return images, len(order) - len(images)


def encoded(split, index, side):
    """An image, shrunk to a longest side -> a data URL."""
    record = split.records[index]
    image = read_image(record.path, record.upright, detail=side, value_range=split.value_range)
    factor = min(1, side / max(image.size))
    image = image.resize([max(1, round(n * factor)) for n in image.size], Image.Resampling.BILINEAR)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def describe(split, findings, index, lowest):
    """An image: its objects [label, box, score of its hit], detections [label, box, score, kind]; boxes 0..1."""
    record, f = split.records[index], findings
    size = np.array([record.width, record.height] * 2)
    objects, detections = f.objects_of(index), f.detections_of(index)
    detections = detections[f.score[detections] >= lowest]
    found_at = np.where(np.isfinite(f.found_at[objects]), f.found_at[objects], -1)
    return {
        "name": Path(record.path).name,
        "width": record.width,
        "height": record.height,
        "objects": [
            [int(label), rounded(box / size), rounded(score)]
            for label, box, score in zip(f.object_label[objects], f.object_box[objects], found_at)
        ],
        "detections": [
            [int(label), rounded(box / size), rounded(score), int(kind)]
            for label, box, score, kind in zip(
                f.label[detections], f.box[detections], f.score[detections], f.kind[detections]
            )
        ],
    }


def draw_report(split, findings, thresholds, curves, folder):
    """Writes precision_recall.png, confusion.png and, if there are mistakes, mistakes.png -> their names in folder.

    findings, thresholds: see mistakes.py; curves: see metrics.measure.
    """

    def load(index):
        record = split.records[index]
        return read_image(record.path, record.upright, value_range=split.value_range)

    names = ["precision_recall.png", "confusion.png"]
    cases = cases_of(findings, thresholds["score"])
    plots.draw_precision_recall(curves, split.classes, folder / "precision_recall.png")
    plots.draw_confusion(confusion(cases, len(split.classes)), split.classes, folder / "confusion.png")
    if mistakes := worst(cases):
        plots.draw_cases(mistakes, load, split.classes).save(folder / "mistakes.png")
        names.append("mistakes.png")
    return names
