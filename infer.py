"""Detects objects in pictures with a checkpoint of train.py, or with a released ECDet.

    python infer.py picture.jpg                          with the newest run in runs/
    python infer.py picture.jpg --checkpoint ecdet_s.pth COCO's 80 classes
    python infer.py folder/ 'more/*.png' --checkpoint runs/mine/best.pth --threshold 0.3

Writes the pictures with their boxes and detections.json (COCO's results form) into --out.
"""

import argparse
import glob
import json
import time
from collections import Counter
from pathlib import Path

from datasets import read_image
from detector import load
from errors import UserError, run
from layouts import IMAGE_SUFFIXES
from plots import draw_boxes


def find_pictures(arguments):
    """Files, folders and patterns -> paths, each once, in order."""
    paths = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise UserError(f"{path}: no pictures in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            matches = sorted(Path(p) for p in glob.glob(argument, recursive=True))
            if not matches:
                raise UserError(f"{argument}: no such picture, folder or pattern")
            paths += [p for p in matches if p.is_file()]
    return list(dict.fromkeys(paths))


def newest_checkpoint():
    """best.pth of the run in runs/ that was written last."""
    found = sorted(Path("runs").glob("*/best.pth"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError("no run in runs/ has a best.pth; train first (python train.py), or give --checkpoint FILE")
    return found[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", metavar="PATH", help="pictures, folders or patterns")
    parser.add_argument("--checkpoint", metavar="FILE", help="of a run, or a released ECDet: a file, a folder, Intellindust/ECDet_S (default: the newest runs/*/best.pth)")
    parser.add_argument("--threshold", type=float, default=0.4, metavar="T", help="lowest score that is shown (default 0.4)")
    parser.add_argument("--image-size", type=int, metavar="S", help="shortest side, or both (default: that of the training)")
    parser.add_argument("--out", default="detections", metavar="DIR", help="default: detections")
    arguments = parser.parse_args()

    paths = find_pictures(arguments.pictures)
    checkpoint = Path(arguments.checkpoint) if arguments.checkpoint else newest_checkpoint()
    detector = load(checkpoint, image_size=arguments.image_size, threshold=arguments.threshold)
    classes, category_ids = detector.classes, detector.category_ids
    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: can't be made ({error.strerror}); choose another --out") from None
    print(f"{checkpoint}: {len(classes)} classes; {len(paths)} pictures; {detector.device.type}")

    results, failed, seconds, names = [], [], 0.0, Counter()
    for path in paths:
        try:
            image = read_image(path)
        except Exception as error:  # PIL raises many kinds on broken files
            failed.append(f"{path}: {error}")
            continue
        started = time.time()
        found = detector(image)
        seconds += time.time() - started
        counts = Counter(found["names"])
        print(f"  {path.name:30s} {', '.join(f'{n} {name}' for name, n in counts.most_common()) or 'nothing'}")
        for score, label, (x1, y1, x2, y2) in zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist()):
            results.append({
                "image_id": path.stem, "file_name": str(path), "category_id": category_ids[label], "category": classes[label],
                "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)], "score": round(score, 4),
            })  # fmt: skip
        names[path.stem] += 1
        name = path.stem if names[path.stem] == 1 else f"{path.stem}-{names[path.stem]}"
        draw_boxes(image, found["boxes"], found["labels"], classes, found["scores"]).save(out / f"{name}.jpg", quality=92)
    (out / "detections.json").write_text(json.dumps(results, indent=1))
    done = len(paths) - len(failed)
    print(f"{len(results)} detections in {done} pictures, {done / max(seconds, 1e-9):.1f} pictures/s; written to {out}/")
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} pictures can't be read: {'; '.join(failed[:10])}")


if __name__ == "__main__":
    run(main)
