"""Images and diagrams of a run: boxes drawn on images, grids of images, curves."""

import json
import math
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as TF

from transforms import MEAN, STD

PALETTE = [
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe", "#008080",
    "#e6beff", "#9a6324", "#fffac8", "#800000", "#aaffc3", "#808000", "#ffd8b1", "#000075", "#ffe119", "#808080",
]  # fmt: skip
# By mistakes.KINDS, what is wrong with a detection that has no object
NOTHING = ("wrong class", "badly placed", "wrong class, badly placed", "a double", "nothing there")
WRONG, MISSED = "#e6194b", "#ffe119"  # colours of boxes in draw_cases
LINE_STYLES = ["-", "--", ":", "-.", (0, (1, 4))]
HEADING_HEIGHT = 34
SHEET_PIXELS = 4_000_000  # most pixels of a sheet of images
LONGEST_SIDE, JPEG_SIDE = 2000, 65_500  # most pixels along an image that is enlarged; along any, which JPEG can hold
UNUSUAL_STYLES = ("bold", "italic", "oblique", "thin", "light", "black", "mono", "condensed")  # of fonts, in file names
NAMED_CURVES = 20  # more names can't be told apart in a legend


# Images


def draw_boxes(image, boxes, labels, names, scores=None, smallest_side=480, most_pixels=math.inf):
    """A copy of a PIL image with boxes (T, 4) xyxy pixels, their class names and scores.

    Small images are enlarged to smallest_side, so that the names can be read; larger ones are shrunk to most_pixels.
    """
    width, height = image.size
    factor = max(1.0, min(smallest_side / min(width, height), LONGEST_SIDE / max(width, height)))
    factor = min(factor, JPEG_SIDE / max(width, height), math.sqrt(most_pixels / (width * height)))
    image = image.convert("RGB").resize(scaled_size(image, factor))
    draw = ImageDraw.Draw(image)
    line = max(2, round(min(image.size) / 240))
    font_size = max(12, round(min(image.size) / 36))
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
        name = drawable_name(names[label], label)
        text = name if scores is None else f"{name} {scores[i]:.2f}"
        captions.append((x1, y1, text, colour, font_for(name, font_size)))
    for caption in captions:  # after all boxes, so that no line crosses a name
        draw_caption(image, *caption, margin=line)
    return image


def scaled_size(image, factor):
    """(width, height) of a PIL image once it is scaled, at least one pixel each."""
    return tuple(max(1, round(side * factor)) for side in image.size)


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


# Names: PIL's own font has little more than the Latin letters


@cache
def drawable_name(name, label):
    """A class's name as it can be drawn: "class N", which is printed once, if no font here has its letters."""
    text = " ".join(name.split())
    if font_file(text) is not None:
        return text
    print(f"class {label}: this is how {name} is called in images, as no font here has its letters")
    return f"class {label}"


@lru_cache(10_000)
def font_for(text, size):
    """A PIL font that has the letters of text, if there is one."""
    file = font_file(text)
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


@lru_cache(10_000)
def font_file(text):
    """-> the file of a font that has all letters of text, "" for PIL's own font, None if there is none."""
    if text.isascii():
        return ""
    invisible = ("Cf", "Zs")  # joiners, spaces
    letters = {ord(c) for c in text if unicodedata.category(c) not in invisible and c != "\N{VARIATION SELECTOR-16}"}
    return next((file for file in font_files() if has_letters(file, letters)), None)


@cache
def font_files():
    """matplotlib's DejaVu, then the system's fonts, plain styles first."""
    import matplotlib
    from matplotlib import font_manager

    own = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return [
        str(own),
        *sorted({*font_manager.findSystemFonts(), *font_manager.findSystemFonts(fontext="ttc")}, key=order_of_font),
    ]


def order_of_font(file):
    name = Path(file).name.lower()
    return any(style in name for style in UNUSUAL_STYLES), name


def has_letters(file, letters):
    """Whether a font has all of a set of code points, and can be drawn at any size."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file)
        ImageFont.truetype(file, 16)
        return all(font.get_char_index(letter) for letter in letters)
    except Exception:  # of many types; a font of pictures in fixed sizes, or a damaged file
        return False


# Sheets


def tile(images, columns, gap=6, most_pixels=SHEET_PIXELS):
    """PIL images -> one image with them in rows, each scaled to the width of its column.

    An image that would become more than twice as high as wide keeps to that, or to its own size; all are shrunk if the
    sheet would have more than most_pixels.
    """
    width = max(image.width for image in images)
    factors = [min(width / image.width, max(2 * width / image.height, 1.0)) for image in images]
    heights = [image.height * factor for image, factor in zip(images, factors)]
    rows = [heights[i : i + columns] for i in range(0, len(heights), columns)]
    pixels = min(columns, len(images)) * width * sum(max(row) for row in rows)
    shrink = min(1.0, math.sqrt(most_pixels / pixels))
    width = max(1, round(width * shrink))
    images = [image.resize(scaled_size(image, factor * shrink)) for image, factor in zip(images, factors)]
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
        font = font_for(text, size)
        if font.getlength(text) <= width:
            return font
    return font_for(text, smallest)


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
        most = SHEET_PIXELS / min(limit, len(images))
        drawn.append(draw_boxes(TF.to_pil_image(pixels), boxes, target["labels"], names, most_pixels=most))
    return tile(drawn, 3)


def draw_samples(samples, names):
    """[(PIL image, ground truth, detections)] -> PIL image with ground truth and detections next to each other."""
    images, most = [], SHEET_PIXELS / (2 * max(1, len(samples)))
    for image, truth, detected in samples:
        objects = draw_boxes(image, truth["boxes"], truth["labels"], names, most_pixels=most)
        boxes, labels, scores = (detected[key] for key in ("boxes", "labels", "scores"))
        detections = draw_boxes(image, boxes, labels, names, scores, most_pixels=most)
        images += [heading(objects, "ground truth"), heading(detections, "detected")]
    return tile(images, 4 if len(images) > 2 else 2)


def draw_cases(cases, load, names, side=300):
    """[mistakes.Case] -> PIL image: a crop around each of them, with a line above it that says what went wrong.

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
    if size > LONGEST_SIDE:  # a crop of a long strip would be a large square, nearly all of it black
        factor = LONGEST_SIDE / 2 / size
        return crop_around(image.resize(scaled_size(image, factor)), [v * factor for v in box], side)
    left = max(0, min(round((x1 + x2) / 2 - reach), image.width - size))
    top = max(0, min(round((y1 + y2) / 2 - reach), image.height - size))
    crop = image.convert("RGB").crop((left, top, left + size, top + size))  # black beyond the image
    factor = side / size
    box = [(x1 - left) * factor, (y1 - top) * factor, (x2 - left) * factor, (y2 - top) * factor]
    return crop.resize((side, side)), box


def describe_case(case, names):
    """What went wrong in a mistakes.Case, in a few words."""
    truth = None if case.truth is None else drawable_name(names[case.truth], case.truth)
    if case.detected is None:
        return f"missed: {truth}"
    detected = f"{drawable_name(names[case.detected], case.detected)} {case.score:.2f}"
    if truth is None:
        return f"{detected}, {NOTHING[case.kind]}"
    return f"{detected}, is {truth}"


# Diagrams


def pyplot():
    """matplotlib.pyplot without a window; imported late, as it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a class may be called $
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


def drawable_names(names):
    """Class names as diagrams can show them; matplotlib learns of the fonts that have their letters."""
    pyplot()  # before the rest of matplotlib
    import matplotlib
    from matplotlib import font_manager

    texts = [drawable_name(name, label) for label, name in enumerate(names)]
    families = ["DejaVu Sans"]
    for file in dict.fromkeys(filter(None, map(font_file, texts))):
        font_manager.fontManager.addfont(file)
        families.append(font_manager.FontProperties(fname=file).get_name())
    matplotlib.rcParams["font.family"] = list(dict.fromkeys(families))
    return texts


def draw_precision_recall(curves, names, out):
    """Draws a curve for each class into the file `out`; the legend starts with the lowest AP.

    curves: {name: (AP50, precision at 101 recalls from 0 to 1)}; names: of all classes.
    """
    texts = dict(zip(names, drawable_names(names)))
    figure, axes = pyplot().subplots(figsize=(8, 5), layout="constrained")
    recall = [i / 100 for i in range(101)]
    for number, name in enumerate(sorted(curves, key=lambda name: curves[name][0])):
        ap, precision = curves[name]
        style = {"linestyle": LINE_STYLES[number // 10 % len(LINE_STYLES)]}
        if number < NAMED_CURVES:
            style |= {"color": f"C{number % 10}", "label": f"{texts[name]} {ap:.2f}", "zorder": 2}
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
    """Draws counts (K + 1, K + 1) of mistakes.confusion into the file `out`: colours are fractions of a row.

    Numbers are added if there is room.
    """
    size = len(counts)
    side = min(18.0, max(5.0, 0.45 * size + 2))
    figure, axes = pyplot().subplots(figsize=(side, side), layout="constrained")
    fractions = counts / counts.sum(1, keepdims=True).clip(min=1)
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    ticks = [*drawable_names(names), "nothing"]
    room = 9 * side / size  # letters of size 8 in a column of the picture
    axes.set_xticks(range(size), ticks, rotation=90 if max(map(len, ticks)) > room else 0, fontsize=8)
    axes.set_yticks(range(size), ticks, fontsize=8)
    axes.set(xlabel="detected as", ylabel="is", title="confusion matrix (IoU 0.5)")
    if size <= 40:
        for row, column in zip(*counts.nonzero()):
            colour = "white" if fractions[row, column] > 0.5 else "black"
            text = str(counts[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    save_figure(figure, out)
