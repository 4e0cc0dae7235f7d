"""COCO's figures for a detector, by pycocotools."""
import contextlib, io
import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")

def ground_truth(split):
    """Split -> pycocotools COCO, picture ids 0.. in the order of the records, category ids 1.. in that of the classes."""
    annotations = [
        {"id": 0, "image_id": i, "category_id": int(label), "bbox": [*box[:2], *(box[2:] - box[:2])], "area": float(area), "iscrowd": int(ignored)}
        for i, record in enumerate(split.records)
        for box, label, area, ignored in zip(record.boxes, record.labels, record.areas, record.ignored)
    ]  # fmt: skip
    for i, annotation in enumerate(annotations):
        annotation["id"] = i + 1
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {}, "images": [{"id": i, "width": r.width, "height": r.height} for i, r in enumerate(split.records)],
            "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in enumerate(split.classes)],
        }  # fmt: skip
        coco.createIndex()
    return coco

def coco_figures(split, detections):
    truth = ground_truth(split)
    rows = [
        {"image_id": i, "category_id": int(l), "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(s)}
        for i, d in detections.items()
        for (x1, y1, x2, y2), l, s in zip(d["boxes"].tolist(), d["labels"], d["scores"])
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        e = COCOeval(truth, truth.loadRes(rows), "bbox")
        e.evaluate(); e.accumulate(); e.summarize()
    return dict(zip(NAMES, e.stats.tolist()))
