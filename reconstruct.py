"""Reconstructs a scene from images of it with VGGT (arXiv 2503.11651): cameras, depth, a cloud of coloured points.

    python reconstruct.py room/                                      VGGT-1B's weights from the hub: 5 GB
    python reconstruct.py a.jpg b.jpg --weights model.pt --size 252  from a file; small images need less memory
    python reconstruct.py a.jpg b.jpg --track 120,80 300,200         also follows these pixels of the first image
    python reconstruct.py room/ --keep 30                            only the 30 % most confident points

Writes depth-1.png ... (near is bright), cameras.json, points.ply and, with --track, tracks.json and tracks.jpg into
--out. The first camera's frame is the world; lengths have no unit. The weights must not be used commercially.

Two images of 84x56 take 1.5 s and 5.8 GB on two cores, with --precision bfloat16 1.1 s and 4.0 GB; the memory that a
scene needs is printed before it is taken. From Python: vggt_heads.VGGT, whose heads can be left out and whose
patch encoder can be another vision transformer.
"""

import argparse
import json
import math
import os
import re
from contextlib import nullcontext, suppress
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPUs can't do yet then runs on the CPU
import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as TF

from backbones import VGGT_FILE
from devices import find_device
from errors import Offline, UserError, run_script, writing
from infer import find_files, identity, is_video
from plots import heading, tile
from transforms import allow_large_images, read_image
from vggt import VGGT_1B, fill, read_vggt
from vggt_heads import VGGT, lower_precision, pose_to_cameras, unproject

PATCH = VGGT_1B["patch"]
SMALLEST, LARGEST = 56, 1036  # of --size
THINNEST = 20  # aspect ratio of images, which are scaled to a width before they are cut


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="images, folders and patterns; the first one is the world's frame")
    add("--weights", default="pretrained", metavar="W", help="pretrained, a released file or folder, none (random)")
    add("--size", type=int, default=518, metavar="S", help="width in pixels (default 518, as in VGGT's training)")
    add("--fit", choices=["crop", "pad"], default="crop", help="tall images: cut (default), or padded to squares")
    add("--keep", type=float, default=50, metavar="P", help="percentage of the points that are kept (default 50)")
    add("--points", choices=["depth", "head"], default="depth", help="from depth and cameras (default), or their head")
    add("--track", nargs="+", default=[], metavar="X,Y", help="pixels of the first image to find in the others")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of the aggregator (default float32)")
    add("--device", metavar="DEV", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--out", type=Path, default=Path("reconstruction"), metavar="DIR", help="default: reconstruction")
    add("--large-images", action="store_true", help="open images that look like decompression bombs")
    add("--offline", action=Offline)
    arguments = parser.parse_args()
    if not SMALLEST <= arguments.size <= LARGEST or arguments.size % PATCH:
        raise UserError(f"--size {arguments.size}: has to be a multiple of {PATCH} in {SMALLEST} .. {LARGEST}")
    if not 0 < arguments.keep <= 100:
        raise UserError(f"--keep {arguments.keep}: has to be a percentage, over 0 and at most 100")
    return arguments


@torch.no_grad()
def main():
    arguments = parse_arguments()
    allow_large_images(arguments.large_images)
    paths = find_files(arguments.images)
    if any(is_video(path) for path in paths):
        raise UserError("reconstruct.py takes images; leave out videos and cameras")
    out = arguments.out
    if identity(out) in {identity(path.absolute().parent) for path in paths} - {None}:
        raise UserError(f"{out}: holds images that would be overwritten; choose another --out")
    frames = pad_to_largest([fit(open_as_rgb(path), arguments.size, arguments.fit) for path in paths])
    images = torch.stack([frame["pixels"] for frame in frames])
    queries = parse_queries(arguments.track, frames[0])
    heads = ["camera", "depth"] + ["point"] * (arguments.points == "head") + ["track"] * bool(arguments.track)
    device = find_device(arguments.device)
    say_memory(len(images), images.shape[-2:], heads, len(arguments.track), arguments.precision, device)
    with writing(out, "; choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
    try:
        model = load_model(arguments.weights, heads, arguments.precision).to(device)
    except BaseException:
        with suppress(OSError):
            out.rmdir()  # if it is empty
        raise

    found = model(images.to(device), None if queries is None else queries.to(device))
    found = {name: value[0].cpu() for name, value in found.items()}
    extrinsics, intrinsics = pose_to_cameras(found["pose"], images.shape[-2:])
    if not intrinsics.isfinite().all():
        print("some fields of view are 0, as those of untrained weights: their focal lengths are infinite")
    if arguments.points == "head":
        points, confidence = found["points"], found["points_confidence"]
    else:
        points, confidence = unproject(found["depth"], extrinsics, intrinsics), found["depth_confidence"]
    with writing(out, "; choose another --out"):
        for old in out.iterdir():
            if re.fullmatch(r"depth-\d+\.png|tracks\.(json|jpg)", old.name):  # of another scene
                old.unlink()
        for i, depth in enumerate(found["depth"], 1):
            draw_depth(depth).save(out / f"depth-{i}.png")
        write_cameras(out / "cameras.json", paths, images.shape[-2:], extrinsics, intrinsics, frames)
        is_image = torch.stack([frame["is_image"] for frame in frames])
        count = write_points(out / "points.ply", points, confidence, is_image, images, arguments.keep)
        if arguments.track:
            write_tracks(out, paths, found, frames)
    height, width = images.shape[-2:]
    print(f"{len(paths)} images as {width}x{height}: depth, cameras.json and {count:,} points in points.ply; in {out}/")


def open_as_rgb(path):
    """-> PIL image. Raises UserError."""
    try:
        return read_image(path)
    except Exception as error:  # PIL raises exceptions of many types for broken files
        raise UserError(f"{path}: can't be read ({error})") from None


def fit(image, size, how):
    """A PIL image -> {"pixels": (3, H, W) in [0, 1], "is_image": (H, W), False on borders, "offset", "scale": (x, y)};
    a pixel of the image times scale plus offset is one of pixels.

    crop: as wide as `size`, and of what is then higher than that the middle. pad: its longer side is `size`; white
    makes it a square. Raises UserError.
    """
    width, height = image.size
    if max(width, height) > THINNEST * min(width, height):
        raise UserError(f"an image of {width}x{height}: has to be at most {THINNEST} times as long as wide")
    longer = width if how == "crop" else max(width, height)
    new_width, new_height = (max(PATCH, round(n * size / longer / PATCH) * PATCH) for n in (width, height))
    rows = min(new_height, size)
    cut = (new_height - rows) // 2
    resized = image.resize((new_width, new_height), Image.BICUBIC).crop((0, cut, new_width, cut + rows))
    frame = {
        "pixels": TF.to_dtype(TF.pil_to_tensor(resized), torch.float32, scale=True),
        "is_image": torch.ones(rows, new_width, dtype=torch.bool),
        "offset": (0, -cut),
        "scale": (new_width / width, new_height / height),
        "size": image.size,
    }
    return with_border(frame, size, size) if how == "pad" else frame


def with_border(frame, height, width):
    """A frame in the middle of white, of that size."""
    h, w = frame["is_image"].shape
    left, top = (width - w) // 2, (height - h) // 2
    border = [left, top, width - w - left, height - h - top]
    x, y = frame["offset"]
    return frame | {
        "pixels": TF.pad(frame["pixels"], border, fill=1.0),
        "is_image": TF.pad(frame["is_image"][None], border)[0],
        "offset": (x + left, y + top),
    }


def pad_to_largest(frames):
    """Frames of `fit` -> with white around smaller ones, so that all have one size."""
    height, width = (max(frame["is_image"].shape[i] for frame in frames) for i in (0, 1))
    return [with_border(frame, height, width) for frame in frames]


def parse_queries(texts, frame):
    """["X,Y"] in pixels of the first image -> (T, 2) in pixels of its frame, or None. Raises UserError."""
    queries, (width, height) = [], frame["size"]
    rows, columns = frame["is_image"].shape
    for text in texts:
        try:
            point = [float(part) for part in text.split(",")]
            x, y = point
        except ValueError:
            raise UserError(f"--track {text}: has to be X,Y, a pixel of the first image") from None
        inside = 0 <= x < width and 0 <= y < height
        x, y = (v * s + o for v, s, o in zip((x, y), frame["scale"], frame["offset"]))
        if not inside or not (0 <= x < columns and 0 <= y < rows):
            raise UserError(f"--track {text}: is not in the part of the first image ({width}x{height}) that is used")
        queries.append([x, y])
    if queries and min(rows, columns) < 140:
        raise UserError(f"--track: needs images of 140 pixels or more, not {columns}x{rows}; a larger --size")
    return torch.tensor(queries) if queries else None


def say_memory(frames, size, heads, points, precision, device):
    """Prints how much memory this will take. Raises UserError if the machine has less."""
    with torch.device("meta"):
        model = VGGT(heads)
    if precision == "bfloat16":
        lower_precision(model.aggregator)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    pixels = size[0] * size[1]
    patches = pixels // PATCH**2
    tokens = frames * (5 + patches) * 1024 * 4 * (5 * 2 + 12)  # five kept pairs of twice the width; those of a block
    maps = min(frames, 8) * 4 * (4 * 256 * 64 * patches + 2 * 128 * pixels)
    tracks = frames * 4 * (3 * 128 + 2 * points) * pixels // 4 if points else 0
    needed = (weights + tokens + maps + tracks) / 1e9
    free = torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else free_memory()
    left = f"; {free:.1f} GB are free" if math.isfinite(free) else ""
    print(f"about {needed:.1f} GB of memory are needed, {weights / 1e9:.1f} of them for weights{left}")
    if needed > free:
        raise UserError("that is more than is free; use --precision bfloat16, a smaller --size, or fewer images")


def free_memory():
    """GB of memory that is available; infinite where the system does not say."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return available[0] * 1024 / 1e9 if available else math.inf


def load_model(weights, heads, precision):
    """-> VGGT with these heads, in evaluation. Raises UserError."""
    torch.manual_seed(0)
    with nullcontext() if weights == "none" else torch.device("meta"):  # no random weights for the file to replace
        model = VGGT(heads)
    if precision == "bfloat16":
        lower_precision(model.aggregator)
    if weights != "none":
        model.name = "VGGT"
        fill(model, read_vggt(weights, ["aggregator", *(f"{head}_head" for head in heads)], VGGT_FILE), weights)
    return model.eval()


def draw_depth(depth):
    """depth (H, W) -> a grey PIL image, near is bright; between the 2nd and the 98th percentile of 1 / depth."""
    near = 1 / depth.clamp(min=1e-6)
    low, high = np.quantile(near.numpy(), [0.02, 0.98])
    grey = ((near - float(low)) / max(float(high - low), 1e-9)).clamp(0, 1)
    return Image.fromarray((255 * grey).byte().numpy())


def write_cameras(path, paths, size, extrinsics, intrinsics, frames):
    about = "extrinsics [R|t] map points of the world to the camera's frame (OpenCV: x right, y down, z ahead); a pixel"
    about += " of the image file times scale plus offset is one of height x width, to which intrinsics belong"
    cameras = []
    for image, extrinsic, intrinsic, frame in zip(paths, extrinsics, intrinsics, frames):
        matrices = {"extrinsics": finite(extrinsic.tolist()), "intrinsics": finite(intrinsic.tolist())}
        cameras.append({"image": str(image), **matrices, "offset": frame["offset"], "scale": frame["scale"]})
    content = {"about": about, "height": size[0], "width": size[1], "cameras": cameras}
    path.write_text(json.dumps(content, indent=1, allow_nan=False))


def finite(values):
    """Nested lists of numbers -> with None, which JSON has, for those that are not finite."""
    if isinstance(values, list):
        return [finite(value) for value in values]
    return values if math.isfinite(values) else None


def write_points(path, points, confidence, is_image, images, keep):
    """Writes the `keep` % most confident points to a binary PLY -> how many these are.

    points (S, H, W, 3), confidence and is_image (S, H, W), images (S, 3, H, W).
    """
    usable = (is_image & points.isfinite().all(-1) & confidence.isfinite()).flatten().nonzero()[:, 0]
    order = confidence.flatten()[usable].argsort(descending=True, stable=True)
    kept = usable[order[: math.ceil(len(usable) * keep / 100)]].sort().values
    colours = (255 * images.movedim(1, -1).reshape(-1, 3)[kept]).round().byte().numpy()
    points, names = points.reshape(-1, 3)[kept].numpy(), ("red", "green", "blue")
    vertices = np.empty(len(kept), dtype=[(n, "<f4") for n in "xyz"] + [(n, "u1") for n in names])
    for i in range(3):
        vertices["xyz"[i]], vertices[names[i]] = points[:, i], colours[:, i]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    lines += [f"property float {n}" for n in "xyz"] + [f"property uchar {n}" for n in names]
    path.write_bytes("\n".join([*lines, "end_header\n"]).encode() + vertices.tobytes())
    return len(vertices)


def write_tracks(out, paths, found, frames):
    """tracks.json, and tracks.jpg with the points on the images; both in pixels of the files."""
    rows, drawings = [], []
    for i, (path, frame) in enumerate(zip(paths, frames)):
        points = (found["tracks"][i] - torch.tensor(frame["offset"])) / torch.tensor(frame["scale"])
        visible = found["visibility"][i].tolist()
        row = {"image": str(path), "points": finite(points.tolist()), "visibility": finite(visible)}
        rows.append(row | {"confidence": finite(found["confidence"][i].tolist())})
        drawing = open_as_rgb(path)
        drawing.thumbnail((1200, 1200))
        shrunk, draw = drawing.width / frame["size"][0], ImageDraw.Draw(drawing)
        radius = max(3, drawing.width // 120)
        for number, (point, seen) in enumerate(zip(points.tolist(), visible)):
            x, y = (v * shrunk for v in point)
            if math.isfinite(x + y):
                colour = f"hsl({47 * number % 360}, 100%, 50%)"
                box, fill_colour = (x - radius, y - radius, x + radius, y + radius), colour if seen > 0.5 else None
                draw.ellipse(box, fill=fill_colour, outline=colour, width=max(2, radius // 3))
        drawings.append(heading(drawing, path.name))
    (out / "tracks.json").write_text(json.dumps(rows, indent=1, allow_nan=False))
    tile(drawings, min(3, len(drawings))).save(out / "tracks.jpg")


if __name__ == "__main__":
    run_script(main, less_memory="fewer images or a smaller --size take less")
