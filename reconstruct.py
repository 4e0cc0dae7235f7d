"""Reconstructs a scene from images of it with VGGT (arXiv 2503.11651): cameras, depth, a cloud of coloured points.

    python reconstruct.py room/                                      VGGT-1B's weights from the hub: 5 GB
    python reconstruct.py a.jpg b.jpg --weights model.pt --size 252  from a file; small images need less memory
    python reconstruct.py a.jpg b.jpg --track 120,80 300,200         also follows these pixels of the first image
    python reconstruct.py room/ --keep 30                            only the 30 % most confident points

Writes depth-1.png ... (near is bright), cameras.json, points.ply and, with --track, tracks.json and tracks.jpg into
--out. The first camera's frame is the world; lengths have no unit. The weights must not be used commercially.
"""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as TF

from backbones import VGGT_FILE
from devices import find_device
from errors import Offline, UserError, run_script, writing
from infer import find_files, is_video
from plots import heading, tile
from transforms import allow_large_images, read_image
from vggt import VGGT_1B, read_vggt
from vggt_heads import VGGT, pose_to_cameras, unproject
from weights import load_strictly

PATCH = VGGT_1B["patch"]
SMALLEST, LARGEST = 56, 1036  # of --size


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
    originals = [open_as_rgb(path) for path in paths]
    fitted = pad_to_largest([fit(image, arguments.size, arguments.fit) for image in originals])
    images, offsets, scales = zip(*fitted)
    queries = parse_queries(arguments.track, originals[0], offsets[0], scales[0], images[0].shape)
    heads = ["camera", "depth"] + ["point"] * (arguments.points == "head") + ["track"] * bool(arguments.track)
    say_memory(len(images), images[0].shape, heads, arguments.precision, find_device(arguments.device))
    model = load_model(arguments.weights, heads, arguments.precision).to(find_device(arguments.device))

    images = torch.stack(images)
    device = model.aggregator.camera_token.device
    found = model(images[None].to(device), queries if queries is None else queries[None].to(device))
    found = {name: value[0].cpu() for name, value in found.items()}
    extrinsics, intrinsics = pose_to_cameras(found["pose"], images.shape[-2:])
    if not intrinsics.isfinite().all():
        print("some fields of view are 0, as those of untrained weights: their focal lengths are infinite")
    out = arguments.out
    with writing(out, "; choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
        for i, depth in enumerate(found["depth"], 1):
            draw_depth(depth).save(out / f"depth-{i}.png")
        write_cameras(out / "cameras.json", paths, images.shape[-2:], extrinsics, intrinsics, offsets, scales)
        if arguments.points == "head":
            points, confidence = found["points"], found["points_confidence"]
        else:
            points, confidence = unproject(found["depth"], extrinsics, intrinsics), found["depth_confidence"]
        count = write_points(out / "points.ply", points, confidence, images, arguments.keep)
        if arguments.track:
            write_tracks(out, paths, originals, found, offsets, scales)
    height, width = images.shape[-2:]
    print(f"{len(paths)} images as {width}x{height}: depth, cameras.json and {count:,} points in points.ply; in {out}/")


def open_as_rgb(path):
    """-> PIL image. Raises UserError."""
    try:
        return read_image(path)
    except Exception as error:  # PIL raises exceptions of many types for broken files
        raise UserError(f"{path}: can't be read ({error})") from None


def fit(image, size, how):
    """A PIL image -> (3, H, W) in [0, 1], the offset (x, y) and the scale (x, y) of its pixels in it.

    crop: as wide as `size`, and of what is then higher than that the middle. pad: its longer side is `size`; white
    makes it a square.
    """
    width, height = image.size
    longer = width if how == "crop" else max(width, height)
    new_width, new_height = (max(PATCH, round(n * size / longer / PATCH) * PATCH) for n in (width, height))
    pixels = TF.to_dtype(
        TF.pil_to_tensor(image.resize((new_width, new_height), Image.BICUBIC)), torch.float32, scale=True
    )
    scale = new_width / width, new_height / height
    if how == "pad":
        left, top = (size - new_width) // 2, (size - new_height) // 2
        padding = [left, top, size - new_width - left, size - new_height - top]
        return TF.pad(pixels, padding, fill=1.0), (left, top), scale
    cut = max(0, new_height - size) // 2
    return pixels[:, cut : cut + size], (0, -cut), scale


def pad_to_largest(fitted):
    """[(pixels, offset, scale)] -> the same with white around smaller ones, so that all have one size."""
    height, width = (max(pixels.shape[i] for pixels, _, _ in fitted) for i in (1, 2))
    results = []
    for pixels, (x, y), scale in fitted:
        top, left = (height - pixels.shape[1]) // 2, (width - pixels.shape[2]) // 2
        padding = [left, top, width - pixels.shape[2] - left, height - pixels.shape[1] - top]
        results.append((TF.pad(pixels, padding, fill=1.0), (x + left, y + top), scale))
    return results


def parse_queries(texts, image, offset, scale, shape):
    """["X,Y"] in pixels of the first image -> (T, 2) in pixels of the network's input, or None. Raises UserError."""
    queries = []
    for text in texts:
        try:
            point = [float(part) for part in text.split(",")]
            x, y = point
        except ValueError:
            raise UserError(f"--track {text}: has to be X,Y, a pixel of the first image") from None
        x, y = x * scale[0] + offset[0], y * scale[1] + offset[1]
        if not (0 <= x < shape[2] and 0 <= y < shape[1]):
            raise UserError(
                f"--track {text}: is not in the part of the first image ({image.width}x{image.height}) that is used"
            )
        queries.append([x, y])
    if queries and min(shape[1:]) < 140:
        raise UserError(f"--track: needs images of 140 pixels or more, not {shape[2]}x{shape[1]}; a larger --size")
    return torch.tensor(queries) if queries else None


def say_memory(frames, shape, heads, precision, device):
    """Prints how much memory this will take. Raises UserError if the machine has less."""
    with torch.device("meta"):
        model = VGGT(heads)
    of_aggregator = sum(p.numel() for p in model.aggregator.parameters()) * (2 if precision == "bfloat16" else 4)
    of_heads = 4 * sum(p.numel() for p in model.parameters()) - 4 * sum(
        p.numel() for p in model.aggregator.parameters()
    )
    _, height, width = shape
    tokens = frames * (5 + height * width // PATCH**2)
    of_tokens = tokens * 1024 * 4 * (5 * 2 + 12)  # five kept pairs of twice the width; a block's own
    of_maps = min(frames, 8) * 4 * (4 * 256 * 64 * height * width // PATCH**2 + 2 * 128 * height * width)
    gigabytes = (of_aggregator + of_heads + of_tokens + of_maps) / 1e9
    weights = (of_aggregator + of_heads) / 1e9
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / 1e9
    else:
        free = free_memory()
    print(f"about {gigabytes:.1f} GB of memory are needed, {weights:.1f} of them for weights; {free:.1f} GB are free")
    if gigabytes > free:
        raise UserError("that is more than is free; use --precision bfloat16, a smaller --size, or fewer images")


def free_memory():
    """GB of memory that is available; infinite where the system does not say."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    if available:
        return available[0] * 1024 / 1e9
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return math.inf


def load_model(weights, heads, precision):
    """-> VGGT with these heads, in evaluation. Raises UserError."""
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with torch.device("meta"):  # no random weights that the file's replace
        model = VGGT(heads)
    model.aggregator.to(kind)
    if weights == "none":
        torch.manual_seed(0)
        model = VGGT(heads)
        model.aggregator.to(kind)
        return model.eval()
    parts = ["aggregator", *(f"{head}_head" for head in heads)]
    state = read_vggt(weights, parts, VGGT_FILE)
    model.to_empty(device="cpu")
    model.name = "VGGT"
    load_strictly(model, state, weights)
    return model.eval()


def draw_depth(depth):
    """depth (H, W) -> a grey PIL image, near is bright; between the 2nd and the 98th percentile of 1 / depth."""
    near = 1 / depth.clamp(min=1e-6)
    low, high = np.quantile(near.numpy(), [0.02, 0.98])
    grey = ((near - float(low)) / max(float(high - low), 1e-9)).clamp(0, 1)
    return Image.fromarray((255 * grey).byte().numpy())


def write_cameras(path, paths, size, extrinsics, intrinsics, offsets, scales):
    cameras = []
    for image, extrinsic, intrinsic, offset, scale in zip(paths, extrinsics, intrinsics, offsets, scales):
        camera = {"image": str(image), "extrinsics": extrinsic.tolist(), "intrinsics": intrinsic.tolist()}
        cameras.append(camera | {"offset": list(offset), "scale": list(scale)})
    about = {
        "height": size[0],
        "width": size[1],
        "about": "extrinsics [R|t] map points of the world to the camera's frame (OpenCV: x right, y down, z ahead); "
        "a pixel of the image file times scale plus offset is one of height x width, to which intrinsics belong",
        "cameras": cameras,
    }
    path.write_text(json.dumps(about, indent=1).replace("Infinity", "null"))


def write_points(path, points, confidence, images, keep):
    """points (S, H, W, 3), confidence (S, H, W), images (S, 3, H, W) -> how many points the binary PLY has."""
    threshold = np.quantile(confidence.numpy(), 1 - keep / 100)
    kept = (confidence >= float(threshold)) & points.isfinite().all(-1)
    vertices = np.empty(
        int(kept.sum()), dtype=[(n, "<f4") for n in "xyz"] + [(n, "u1") for n in ("red", "green", "blue")]
    )
    for i, name in enumerate("xyz"):
        vertices[name] = points[kept][:, i].numpy()
    colours = (255 * images.movedim(1, -1)[kept]).round().byte().numpy()
    for i, name in enumerate(("red", "green", "blue")):
        vertices[name] = colours[:, i]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    lines += [f"property float {name}" for name in "xyz"] + [f"property uchar {n}" for n in ("red", "green", "blue")]
    path.write_bytes("\n".join([*lines, "end_header\n"]).encode() + vertices.tobytes())
    return len(vertices)


def write_tracks(out, paths, originals, found, offsets, scales):
    """tracks.json, and tracks.jpg with the points on the images; both in pixels of the files."""
    rows, drawings = [], []
    for i, (path, image) in enumerate(zip(paths, originals)):
        points = (found["tracks"][i] - torch.tensor(offsets[i])) / torch.tensor(scales[i])
        visible = found["visibility"][i]
        rows.append({"image": str(path), "points": points.tolist(), "visibility": visible.tolist()})
        rows[-1]["confidence"] = found["confidence"][i].tolist()
        drawing = image.copy()
        draw, radius = ImageDraw.Draw(drawing), max(3, image.width // 120)
        for number, ((x, y), seen) in enumerate(zip(points.tolist(), visible.tolist())):
            colour = f"hsl({47 * number % 360}, 100%, 50%)"
            box = x - radius, y - radius, x + radius, y + radius
            draw.ellipse(box, fill=colour if seen > 0.5 else None, outline=colour, width=max(2, radius // 3))
        drawings.append(heading(drawing, path.name))
    (out / "tracks.json").write_text(json.dumps(rows, indent=1))
    tile(drawings, min(3, len(drawings))).save(out / "tracks.jpg")


if __name__ == "__main__":
    run_script(main)
