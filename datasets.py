"""Labelled pictures from disk to tensors: `DetectionDataset` turns a `Split` of layouts.py into what a detector trains on.

A target has `boxes` (T, 4), `labels` (T,) in 0..K-1 in the order of `classes`, `area`, `iscrowd`, `image_id`, `orig_size` and `size` (height, width).
Category ids of any kind stay in `category_ids`, for results files.
"""

import itertools

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from transforms import mix_up, mosaic


def read_image(path, upright=True):
    """Any picture file -> RGB PIL image: turned as its EXIF says, transparency over white, 16 bits scaled to 8."""
    with Image.open(path) as image:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image, dtype=np.float32)
            top = 65535 if image.mode.startswith("I") and values.max() > 255 else max(values.max(), 1) if image.mode == "F" else 255
            image = Image.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


class DetectionDataset(torch.utils.data.Dataset):
    """Records as (image, target) after `transforms`; decoded pictures are kept in memory up to `cache_bytes`.

    Indexed by (index, seed, draw, mixed) as well as by index: the augmentation depends on nothing but these, see EndlessBatches,
    whichever process draws it and whenever; so a resumed run sees the same pictures. Where `mixed`, half of the pictures are
    mosaics, and in half of the batches pictures are mixed up.
    """

    def __init__(self, split, transforms, cache_bytes=0):
        self.split, self.transforms = split, transforms
        pixels = sum(r.width * r.height * 3 for r in split.records)
        self.cache = {} if pixels <= cache_bytes else None

    def __len__(self):
        return len(self.split.records)

    def __getitem__(self, index):
        index, seed, draw, mixed = index if isinstance(index, tuple) else (index, index, None, False)
        sample = self.load(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            is_mosaic = mixed and float(torch.rand(())) < 0.5
            if is_mosaic:
                sample = mosaic([sample, *(self.load(i) for i in torch.randint(len(self), (3,)).tolist())])
            return self.transforms(*sample, draw, is_mosaic)

    def __getitems__(self, indices):
        """A batch at once, as DataLoader asks for it."""
        samples = [self[index] for index in indices]
        first = indices[0]
        if isinstance(first, tuple) and first[3]:
            chance, share = torch.rand(2, generator=torch.Generator().manual_seed(first[1])).tolist()
            if chance < 0.5:
                samples = mix_up(samples, 0.45 + 0.1 * share)
        return samples

    def load(self, index):
        """-> the whole picture as uint8 tv_tensors.Image (3, H, W) and its target, boxes xyxy in pixels."""
        record = self.split.records[index]
        image = None if self.cache is None else self.cache.get(index)
        if image is None:
            image = TF.pil_to_tensor(read_image(record.path, record.upright))
            if self.cache is not None:
                self.cache[index] = image
        keep = ~record.ignored
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(record.boxes[keep]).float(), format="XYXY", canvas_size=(record.height, record.width)
        )
        target = {
            "boxes": boxes,
            "labels": torch.from_numpy(record.labels[keep]),
            "area": torch.from_numpy(record.areas[keep]).float(),
            "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.long),
            "image_id": index,
            "orig_size": torch.tensor([record.height, record.width]),
        }
        return tv_tensors.Image(image), target


class EndlessBatches:
    """Batches of (index, seed, draw, mixed) without end, for DataLoader's batch_sampler: permutation after permutation of the
    data set, each picture once in each, cut into full batches. `first` batches are left out, to go on where a run was stopped.

    phase: (pictures shown so far) -> "plain", "varied" or "mixed", see transforms. `draw` is a number in [0, 1) that a whole
    batch shares, None where it is plain.
    """

    def __init__(self, length, batch_size, seed, phase, first=0):
        self.length, self.batch_size, self.seed, self.phase, self.first = length, batch_size, seed, phase, first

    def __iter__(self):
        start = self.first * self.batch_size
        batch = []
        for position in itertools.count(start):
            round_, place = divmod(position, self.length)
            if place == 0 or position == start:
                order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + round_)).tolist()
            seed = (self.seed * 1_000_003 + position) % 2**31
            if not batch:
                phase = self.phase(position)
                draw = None if phase == "plain" else float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
            batch.append((order[place], seed, draw, phase == "mixed"))
            if len(batch) == self.batch_size:
                yield batch
                batch = []


def collate(batch, divisor=32):
    """[(image, target)] -> images (B, 3, H, W) padded at the right and bottom to multiples of divisor, mask (B, H, W) True on padding, targets."""
    images, targets = zip(*batch)
    h, w = (-(-max(i.shape[d] for i in images) // divisor) * divisor for d in (1, 2))
    padded = images[0].new_zeros(len(images), 3, h, w)
    mask = torch.ones(len(images), h, w, dtype=torch.bool)
    for image, row, row_mask in zip(images, padded, mask):
        row[:, : image.shape[1], : image.shape[2]] = image
        row_mask[: image.shape[1], : image.shape[2]] = False
    return padded, mask, list(targets)
