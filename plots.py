"""Images and diagrams of a run: boxes drawn on images, grids of images, curves."""

import json
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as TF

from transforms import MEAN, STD

PALETTE = [
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe", "#008080",
    "#e6beff", "#9a6324", "#fffac8", "#800000", "#aaffc3", "#808000", "#ffd8b1", "#000075", "#ffe119", "#808080",
]  # fmt: skip
WRONG, MISSED = "#e6194b", "#ffe119"  # colours of boxes in draw_cases
LINE_STYLES = ["-", "--", ":", "-.", (0, (1, 4))]
HEADING_HEIGHT = 34
NAMED_CURVES = 20  # more names can't be told apart in a legend


# Images


def draw_boxes(image, boxes, labels, names, scores=None, smallest_side=480):
    """A copy of a PIL image with boxes (T, 4) xyxy pixels, their class names and scores.

    Small images are enlarged to smallest_side, so that the names can be read.
    """
    factor = max(1.0, smallest_side / min(image.size))
    image = image.convert("RGB").resize((round(image.width * factor), round(image.height * factor)))
    draw = ImageDraw.Draw(image)
    line = max(2, round(min(image.size) / 240))
    font = ImageFont.load_default(max(12, round(min(image.size) / 36)))
    order = list(range(len(boxes)))
    if scores is not None:
        scores = [float(score) for score in scores]
        order.sort(key=scores.__getitem__)  # the best ones on top
    captions = []
    for i in order:
        x1, y1, x2, y2 = (float(v) * factor for v in boxes[i])
        label = int(labels[i])
        colour = PALETTE[label % len(PALETTE)]
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        text = names[label] if scores is None else f"{names[label]} {scores[i]:.2f}"
        captions.append((x1, y1, text, colour))
    for caption in captions:  # after all boxes, so that no line crosses a name
        draw_caption(image, *caption, font, margin=line)
    return image


def draw_caption(image, x, y, text, colour, font, margin):
    """Draws text on a coloured background, in place; above (x, y) if there is room for it."""
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x = min(max(x, 0), image.width - width)
    if y >= height:
        y = y - height
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    red, green, blue = ImageColor.getrgb(colour)
    is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 140
    draw.text((x + margin - left, y + margin - top), text, fill="white" if is_dark else "black", font=font)


def tile(images, columns, gap=6):
    """PIL images -> one image with them in rows, each scaled to the width of its column."""
    width = max(image.width for image in images)
    images = [image.resize((width, round(image.height * width / image.width))) for image in images]
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    heights = [max(image.height for image in row) for row in rows]
    sheet_width = min(columns, len(images)) * (width + gap) - gap
    sheet = Image.new("RGB", (sheet_width, sum(heights) + gap * (len(rows) - 1)), "white")
    y = 0
    for row, height in zip(rows, heights):
        for column, image in enumerate(row):
            sheet.paste(image, (column * (width + gap), y))
        y += height + gap
    return sheet


def heading(image, text):
    """The PIL image with a line of text above it."""
    sheet = Image.new("RGB", (image.width, image.height + HEADING_HEIGHT), "white")
    sheet.paste(image, (0, HEADING_HEIGHT))
    ImageDraw.Draw(sheet).text((8, 4), text, fill="black", font=largest_font(text, image.width - 16))
    return sheet


def largest_font(text, width, largest=22, smallest=9):
    """The largest font in which text is at most `width` pixels wide, or the smallest font."""
    for size in range(largest, smallest, -1):
        font = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            return font
    return ImageFont.load_default(smallest)


def draw_batch(images, mask, targets, names, limit=9):
    """The first images of a batch as the network gets them, with their boxes -> PIL image.

    images (B, 3, H, W) normalised; mask (B, H, W) True on padding, which is drawn grey.
    targets: [{"size" (height, width), "boxes" (T, 4) cxcywh relative to it, "labels" (T,)}].
    """
    std, mean = torch.tensor(STD)[:, None, None], torch.tensor(MEAN)[:, None, None]
    drawn = []
    for image, padding, target in zip(images[:limit], mask, targets):
        pixels = image.float().cpu() * std + mean
        pixels = pixels.clamp(0, 1).masked_fill(padding.cpu(), 0.5)
        h, w = target["size"].tolist()
        cx, cy, bw, bh = (target["boxes"].cpu() * torch.tensor([w, h, w, h])).unbind(-1)
        boxes = torch.stack([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2], dim=-1)
        drawn.append(draw_boxes(TF.to_pil_image(pixels), boxes, target["labels"], names))
    return tile(drawn, 3)


def draw_samples(samples, names):
    """[(PIL image, ground truth, detections)] -> PIL image with ground truth and detections next to each other."""
    images = []
    for image, truth, detected in samples:
        objects = draw_boxes(image, truth["boxes"], truth["labels"], names)
        detections = draw_boxes(image, detected["boxes"], detected["labels"], names, detected["scores"])
        images += [heading(objects, "ground truth"), heading(detections, "detected")]
    return tile(images, 4 if len(images) > 2 else 2)


def draw_cases(cases, load, names, side=300):
    """[evaluate.Case] -> PIL image: a crop around each of them, with a line above it that says what went wrong.

    load: record index -> PIL image.
    """
    crops = []
    for case in cases:
        crop, box = crop_around(load(case.index), case.box, side)
        colour = MISSED if case.detected is None else WRONG
        ImageDraw.Draw(crop).rectangle(box, outline=colour, width=3)
        crops.append(heading(crop, describe_case(case, names)))
    return tile(crops, 4)


def crop_around(image, box, side):
    """A PIL image and a box, xyxy pixels -> (square crop of `side` pixels around the box, the box in the crop)."""
    x1, y1, x2, y2 = box
    reach = max(0.75 * max(x2 - x1, y2 - y1), 32)
    size = round(2 * reach)
    left = max(0, min(round((x1 + x2) / 2 - reach), image.width - size))
    top = max(0, min(round((y1 + y2) / 2 - reach), image.height - size))
    crop = image.convert("RGB").crop((left, top, left + size, top + size))  # black beyond the image
    factor = side / size
    box = [(x1 - left) * factor, (y1 - top) * factor, (x2 - left) * factor, (y2 - top) * factor]
    return crop.resize((side, side)), box


def describe_case(case, names):
    """What went wrong in an evaluate.Case, in a few words."""
    if case.detected is None:
        return f"missed: {names[case.truth]}"
    detected = f"{names[case.detected]} {case.score:.2f}"
    if case.truth is None:
        return f"{detected}, nothing there"
    return f"{detected}, is {names[case.truth]}"


# Diagrams


def pyplot():
    """matplotlib.pyplot without a window; imported late, as it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_figure(figure, path):
    """Writes a matplotlib figure and frees its memory."""
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def draw_curves(log_path, out):
    """Draws the losses and AP over the epochs, from log.jsonl, into the file `out`."""
    rows = [json.loads(line) for line in Path(log_path).read_text().splitlines()]
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4), sharex=True, layout="constrained")
    plot_losses(left, rows)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower left", ncols=8)  # outside: lines fill the axes
    evaluated = [row for row in rows if "AP" in row]
    for key in ("AP", "AP50", "AP75"):
        right.plot([row["epoch"] for row in evaluated], [row[key] for row in evaluated], ".-", label=key)
    right.set(xlabel="epoch", ylim=(0, 1), title="validation")
    right.legend()
    right.grid(alpha=0.3)
    save_figure(figure, out)


def plot_losses(axes, rows):
    """Plots the total of all losses, and each loss that isn't auxiliary.

    In a loss's name, loss_KIND or loss_KIND_PLACE, the kind chooses the colour and the place the line style.
    """
    epochs = [row["epoch"] for row in rows]
    axes.plot(epochs, [sum(row["losses"].values()) for row in rows], "k", label="total")
    kinds, places = [], []
    for key in sorted(key for key in rows[-1]["losses"] if "aux" not in key):
        name = key.removeprefix("loss_")
        kind, _, place = name.partition("_")
        if kind not in kinds:
            kinds.append(kind)
        if place not in places:
            places.append(place)
        colour, style = f"C{kinds.index(kind)}", LINE_STYLES[places.index(place) % len(LINE_STYLES)]
        axes.plot(epochs, [row["losses"].get(key) for row in rows], color=colour, linestyle=style, label=name)
    axes.set(xlabel="epoch", ylabel="loss", yscale="log", title="training losses")


def draw_growth(found, out):
    """Draws how the time of a training step grows, next to linear and quadratic growth, into the file `out`.

    found: {name: (sizes, times)}, both relative to the first measurement.
    """
    figure, axes = pyplot().subplots(figsize=(8, 5), layout="constrained")
    largest = max(max(sizes) for sizes, _ in found.values())
    longest = max(max(times) for _, times in found.values())
    axes.plot([1, largest], [1, largest], color="grey", linestyle="--", label="linear")
    axes.plot([1, largest], [1, largest**2], color="grey", linestyle=":", label="quadratic")
    for name, (sizes, times) in found.items():
        axes.plot(sizes, times, marker="o", label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="times as much",
        ylabel="times as long",
        ylim=(0.7, 1.5 * longest),
        title="how the time of a training step grows",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save_figure(figure, out)


def draw_precision_recall(curves, out):
    """Draws a curve for each class into the file `out`; the legend starts with the lowest AP.

    curves: {name: (AP50, precision at 101 recalls from 0 to 1)}.
    """
    figure, axes = pyplot().subplots(figsize=(8, 5), layout="constrained")
    recall = [i / 100 for i in range(101)]
    for number, name in enumerate(sorted(curves, key=lambda name: curves[name][0])):
        ap, precision = curves[name]
        style = {"linestyle": LINE_STYLES[number // 10 % len(LINE_STYLES)]}
        if number < NAMED_CURVES:
            style |= {"color": f"C{number % 10}", "label": f"{name} {ap:.2f}", "zorder": 2}
        else:
            style |= {"color": "lightgrey", "zorder": 1}
        axes.plot(recall, precision, **style)
    title = "precision and recall at IoU 0.5"
    if len(curves) > NAMED_CURVES:
        title += f" (the {NAMED_CURVES} lowest named)"
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    if curves:
        figure.legend(fontsize=8, loc="outside right upper")
    save_figure(figure, out)


def draw_confusion(counts, names, out):
    """Draws counts (K + 1, K + 1) of evaluate.confusion into the file `out`: colours are fractions of a row.

    Numbers are added if there is room.
    """
    size = len(counts)
    side = min(24.0, max(5.0, 0.45 * size + 2))
    figure, axes = pyplot().subplots(figsize=(side, side), layout="constrained")
    fractions = counts / counts.sum(1, keepdims=True).clip(min=1)
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    ticks = [*names, "nothing"]
    axes.set_xticks(range(size), ticks, rotation=90 if size > 6 else 0, fontsize=8)
    axes.set_yticks(range(size), ticks, fontsize=8)
    axes.set(xlabel="detected as", ylabel="is", title="confusion matrix (IoU 0.5)")
    if size <= 40:
        for row, column in zip(*counts.nonzero()):
            colour = "white" if fractions[row, column] > 0.5 else "black"
            text = str(counts[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    save_figure(figure, out)
