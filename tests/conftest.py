import json
import os
import shutil
import signal
import sys
import zlib
from pathlib import Path

# Tests compare bits and start several processes: they take the CPU, but for those of GPUs, which are run alone.
if not any("test_accelerator" in argument for argument in sys.argv if not argument.startswith("-")):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


def reference_weight(key, shape):
    """A weight from a generator seeded by its key, as the reference implementations of tests/parity were filled."""
    values = (
        np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(tuple(shape)).astype(np.float32)
    )
    if key.endswith("running_var"):
        values = 0.5 + np.abs(values)
    elif key.endswith("running_mean"):
        values = 0.1 * values
    elif len(shape) == 1:
        values = 1 + 0.1 * values if key.endswith("weight") else 0.1 * values
    else:
        values = values / np.sqrt(int(np.prod(shape[1:])))
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def reference_state(name):
    """The state dict of tests/parity/keys_NAME.json: what the released file of that name looks like."""
    state = {}
    for key, shape in json.loads((ROOT / "tests" / "parity" / f"keys_{name}.json").read_text()).items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.long)
        elif key.endswith("bias_mask"):  # DINOv3 masks the key bias
            state[key] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(shape[0] // 3)
        elif key.endswith("periods"):
            state[key] = 100 ** (torch.arange(shape[0]) / shape[0])
        else:
            state[key] = reference_weight(key, shape)
    return state


def write_coco(root, splits, category_ids=(1, 2), size=(64, 48), annotations_folder=True):
    """A COCO dataset of rectangles on grey: splits {name: number of images}.

    An image has two boxes, one of each of the first categories.
    """
    categories = [{"id": c, "name": f"kind {c}"} for c in category_ids]
    for number, (name, count) in enumerate(splits.items()):
        rng = np.random.default_rng(number)
        (root / name).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            picture = np.full((size[1], size[0], 3), 128, dtype=np.uint8) + rng.integers(
                0, 20, (size[1], size[0], 3), dtype=np.uint8
            )
            for k in range(2):
                w, h = rng.integers(10, 22, 2)
                x = int(rng.integers(0, size[0] // 2 - w + 1) + k * size[0] // 2)
                y = int(rng.integers(0, size[1] - h + 1))
                picture[y : y + h, x : x + w] = (250, 30, 30) if k == 0 else (30, 30, 250)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i + 10,
                        "category_id": category_ids[k],
                        "bbox": [x, y, int(w), int(h)],
                        "area": int(w * h),
                        "iscrowd": 0,
                    }
                )
            Image.fromarray(picture).save(root / name / f"{i:03d}.png")
            images.append({"id": i + 10, "file_name": f"{i:03d}.png", "width": size[0], "height": size[1]})
        path = root / "annotations" / f"instances_{name}.json" if annotations_folder else root / name / "labels.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


def half_background(source, folder):
    """A copy of a COCO dataset, in a folder, in which every other training image has no object."""
    shutil.copytree(source, folder)
    file = next((folder / "annotations").glob("*train*"))
    content = json.loads(file.read_text())
    ids = sorted(image["id"] for image in content["images"])[::2]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    file.write_text(json.dumps(content))
    return folder


def tiny_config(detector, backbone="ecvit-nano", **more):
    """The settings of a detector that is built and run in a moment."""
    from settings import DEFAULTS

    sizes = dict(
        num_classes=3, num_queries=12, hidden_dim=32, num_heads=2, ffn_dim=32, encoder_layers=1, decoder_layers=2
    )
    config = dict(detector=detector, size="nano", backbone=backbone, backbone_weights=None, num_denoising=8)
    return DEFAULTS | config | sizes | more


@pytest.fixture(autouse=True)
def signal_handlers():
    """Every test starts with Python's handlers: a run that has ended in this process ignores signals, and so does
    SIGINT whatever a shell runs in the background."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def still_online(monkeypatch):
    """A command that runs in this process with --offline switches the network off for that test alone."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", ""))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A COCO data set of 12 + 4 small pictures, with category ids that are anything but 0..K-1."""
    return write_coco(tmp_path_factory.mktemp("tiny"), {"train2017": 12, "val2017": 4}, category_ids=(7, 300, 90001))


class FixedFeatures(torch.nn.Module):
    """A backbone that returns the same maps whatever it is shown."""

    name, size_divisor = "fixed", 1

    def __init__(self, maps, strides):
        super().__init__()
        self.maps, self.strides, self.channels = maps, strides, [m.shape[1] for m in maps]

    def forward(self, images):
        return self.maps


def interrupted_at(steps, monkeypatch):
    """Ctrl-C while the batch of each of these steps is loaded, counted over all runs."""
    import train

    real, calls = train.collate, []

    def collate(batch, divisor):
        calls.append(len(calls))
        if calls[-1] in steps:
            os.kill(os.getpid(), signal.SIGINT)
        return real(batch, divisor)

    monkeypatch.setattr(train, "collate", collate)


def same_weights(a, b):
    a, b = (torch.load(path / "last.pth", weights_only=True) for path in (a, b))
    assert a["training"]["step"] == b["training"]["step"]
    for x, y in ((a["model"], b["model"]), (a["training"]["model"], b["training"]["model"])):
        different = [key for key in x if not torch.equal(x[key], y[key])]
        assert x.keys() == y.keys() and not different, different[:5]
