"""Pictures of a run: boxes on images, grids of them, curves."""

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as TF

from transforms import MEAN, STD

PALETTE = [
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe", "#008080",
    "#e6beff", "#9a6324", "#fffac8", "#800000", "#aaffc3", "#808000", "#ffd8b1", "#000075", "#ffe119", "#808080",
]  # fmt: skip

LINES = ["-", "--", ":", "-.", (0, (1, 4))]  # of curves


def draw_boxes(image, boxes, labels, names, scores=None, smallest_side=480):
    """A copy of a PIL image with boxes (T, 4) xyxy pixels, named; small pictures are enlarged so that names can be read."""
    factor = max(1.0, smallest_side / min(image.size))
    image = image.convert("RGB").resize((round(image.width * factor), round(image.height * factor)))
    draw = ImageDraw.Draw(image)
    line = max(2, round(min(image.size) / 240))
    font = ImageFont.load_default(max(12, round(min(image.size) / 36)))
    order = range(len(boxes)) if scores is None else sorted(range(len(boxes)), key=lambda i: float(scores[i]))
    captions = []
    for i in order:
        x1, y1, x2, y2 = (float(v) * factor for v in boxes[i])
        colour = PALETTE[int(labels[i]) % len(PALETTE)]
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        text = names[int(labels[i])] + ("" if scores is None else f" {float(scores[i]):.2f}")
        captions.append((x1, y1, text, colour))
    for x, y, text, colour in captions:  # after all boxes, so that no line crosses a name
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + 2 * line, bottom - top + 2 * line
        x = min(max(x, 0), image.width - width)
        y = y - height if y >= height else y
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        dark = sum(c * w for c, w in zip(Image.new("RGB", (1, 1), colour).getpixel((0, 0)), (0.3, 0.59, 0.11))) < 140
        draw.text((x + line - left, y + line - top), text, fill="white" if dark else "black", font=font)
    return image


def tile(pictures, columns, gap=6):
    """PIL images -> one image, in rows, each scaled to the width of its column."""
    width = max(p.width for p in pictures)
    pictures = [p.resize((width, round(p.height * width / p.width))) for p in pictures]
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(p.height for p in row) for row in rows]
    sheet = Image.new("RGB", (min(columns, len(pictures)) * (width + gap) - gap, sum(heights) + gap * (len(rows) - 1)), "white")
    y = 0
    for row, height in zip(rows, heights):
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * (width + gap), y))
        y += height + gap
    return sheet


def heading(picture, text):
    """The picture with a line of text above it, as large as fits."""
    size = next((size for size in range(22, 8, -1) if ImageFont.load_default(size).getlength(text) <= picture.width - 16), 9)
    font = ImageFont.load_default(size)
    out = Image.new("RGB", (picture.width, picture.height + 34), "white")
    out.paste(picture, (0, 34))
    ImageDraw.Draw(out).text((8, 4), text, fill="black", font=font)
    return out


def draw_batch(images, mask, targets, names, limit=9):
    """What the network is shown: (B, 3, H, W) normalised, mask (B, H, W), targets -> PIL image with the boxes drawn."""
    pictures = []
    for image, padding, target in list(zip(images, mask, targets))[:limit]:
        pixels = image.float().cpu() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        pixels = pixels.clamp(0, 1).masked_fill(padding.cpu(), 0.5)
        h, w = target["size"].tolist()
        cx, cy, bw, bh = (target["boxes"].cpu() * torch.tensor([w, h, w, h])).unbind(-1)
        boxes = torch.stack([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2], dim=-1)
        pictures.append(draw_boxes(TF.to_pil_image(pixels), boxes, target["labels"], names))
    return tile(pictures, 3)


def draw_samples(samples, names):
    """[(PIL image, truth, detections)] -> truth and detections side by side, a row each."""
    pairs = []
    for image, truth, found in samples:
        pairs.append(heading(draw_boxes(image, truth["boxes"], truth["labels"], names), "truth"))
        pairs.append(heading(draw_boxes(image, found["boxes"], found["labels"], names, found["scores"]), "detected"))
    return tile(pairs, 4 if len(pairs) > 2 else 2)


def pyplot():
    """matplotlib.pyplot without a window; imported late, as it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_curves(log_path, out):
    """log.jsonl -> a picture of the losses and of AP over the epochs."""
    plt = pyplot()
    rows = [json.loads(line) for line in Path(log_path).read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharex=True, layout="constrained")
    epochs = [row["epoch"] for row in rows]
    final = sorted(key for key in rows[-1]["losses"] if "aux" not in key)
    left.plot(epochs, [sum(row["losses"].values()) for row in rows], "k", label="total")
    terms = [key.removeprefix("loss_").split("_", 1) for key in final]  # a colour for what is measured, a line for where
    kinds, places = (list(dict.fromkeys(parts)) for parts in ([t[0] for t in terms], [t[1] if t[1:] else "" for t in terms]))
    for key, (kind, *place) in zip(final, terms):
        style = LINES[places.index("".join(place)) % len(LINES)]
        left.plot(epochs, [row["losses"].get(key) for row in rows], color=f"C{kinds.index(kind)}", linestyle=style, label="_".join([kind, *place]))
    left.set(xlabel="epoch", ylabel="loss", yscale="log", title="training losses")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=8)  # lines are everywhere inside
    measured = [row for row in rows if "AP" in row]
    for key in ("AP", "AP50", "AP75"):
        right.plot([row["epoch"] for row in measured], [row[key] for row in measured], ".-", label=key)
    right.set(xlabel="epoch", ylim=(0, 1), title="validation")
    right.legend()
    right.grid(alpha=0.3)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_growth(found, out):
    """{name: ([times as much], [times as long])} -> a log-log picture, with what grows in proportion and as the square beside."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    most, longest = (max(max(values[i]) for values in found.values()) for i in (0, 1))
    for power, style in ((1, "--"), (2, ":")):
        axes.plot([1, most], [1, most**power], color="grey", linestyle=style, label="in proportion" if power == 1 else "as the square")
    for name, (much, long) in found.items():
        axes.plot(much, long, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="times as much", ylabel="times as long", ylim=(0.7, 1.5 * longest), title="how a training step grows")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_precision_recall(curves, out):
    """curves: {name: (AP50, precision at 101 recalls from 0 to 1)} -> a picture, the classes with the lowest AP first in the legend."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    recall = [i / 100 for i in range(101)]
    order = sorted(curves, key=lambda name: curves[name][0])
    for number, name in enumerate(order):
        ap, precision = curves[name]
        shown = number < 20  # more names than that can't be told apart
        axes.plot(recall, precision, color=f"C{number % 10}" if shown else "lightgrey", linestyle=LINES[number // 10 % len(LINES)], label=f"{name} {ap:.2f}" if shown else None, zorder=2 if shown else 1)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="precision and recall at IoU 0.5" + (" (the 20 lowest named)" if len(order) > 20 else ""))
    axes.grid(alpha=0.3)
    if order:
        figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_confusion(counts, names, out):
    """counts (K + 1, K + 1) of mistakes.confusion -> a picture; shares of each row as colour, numbers where there is room."""
    plt = pyplot()
    size = len(counts)
    side = min(24.0, max(5.0, 0.45 * size + 2))
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [*names, "nothing"]
    axes.set_xticks(range(size), labels, rotation=90 if size > 6 else 0, fontsize=8)
    axes.set_yticks(range(size), labels, fontsize=8)
    axes.set(xlabel="detected as", ylabel="is", title="what was taken for what (IoU 0.5)")
    if size <= 40:
        for (row, column), count in ((place, counts[place]) for place in zip(*counts.nonzero())):
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color="white" if shares[row, column] > 0.5 else "black")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_cases(cases, load, names, side=300):
    """mistakes.Case and load (index -> PIL image) -> a contact sheet: each with what is around it, and what went wrong above it."""
    pictures = []
    for case in cases:
        image = load(case.index)
        x1, y1, x2, y2 = case.box
        reach = max(0.75 * max(x2 - x1, y2 - y1), 32)
        cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
        left, top = (max(0, min(round(c - reach), n - round(2 * reach))) for c, n in ((cx, image.width), (cy, image.height)))
        crop = image.convert("RGB").crop((left, top, left + round(2 * reach), top + round(2 * reach)))  # black beyond the picture
        factor = side / crop.width
        crop = crop.resize((side, side))
        box = [(x1 - left) * factor, (y1 - top) * factor, (x2 - left) * factor, (y2 - top) * factor]
        missed = case.detected is None
        ImageDraw.Draw(crop).rectangle(box, outline="#ffe119" if missed else "#e6194b", width=3)
        text = f"missed: {names[case.truth]}" if missed else f"{names[case.detected]} {case.score:.2f}, " + ("nothing there" if case.truth is None else f"is {names[case.truth]}")
        pictures.append(heading(crop, text))
    return tile(pictures, 4)
