"""Every family of backbones under every detector, for pictures of any shape."""

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config

import ecvit
from backbones import BACKBONES, _ecvit
from detr_model import DETECTORS, build_model
from errors import UserError

FAMILIES = {
    "dinov2": "dinov2-small",
    "dinov2-reg": "dinov2-small-reg",
    "dinov3": "dinov3-vits16",
    "dinov3-gated": "dinov3-vits16plus",
    "clip": "clip-vitb32",
    "mae": "mae-vitb16",
    "mum": "mum-vitl16",
    "vggt": "vggt-vitl14",
    "convnext": "dinov3-convnext-tiny",
    "ecvit": "ecvit-nano",
}


@pytest.fixture(scope="module", autouse=True)
def tiny_backbones():
    """A tiny backbone of every family, as tiny-FAMILY."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            ecvit.CONFIGS, "tiny-ecvit", dict(dim=32, heads=2, mlp_ratio=2, depth=2, pyramid_dim=None, skip=True)
        )
        for family, name in FAMILIES.items():
            tiny = replace(BACKBONES[name], width=32, depth=2, heads=2, ffn=88 if family == "dinov3-gated" else 64)
            if family == "convnext":
                tiny = replace(tiny, width=(8, 16, 24, 32), depth=(1, 1, 1, 1), heads=0, ffn=128)
            patch.setitem(BACKBONES, f"tiny-{family}", _ecvit("tiny-ecvit", "") if family == "ecvit" else tiny)
        yield


SIZES = {"square": (64, 64), "wide": (64, 96), "odd": (75, 61)}
# Every family under the default detector, every detector on one family of each kind of maps, and all sizes
CASES = [(family, "detr", "odd") for family in FAMILIES]
CASES += [("ecvit", detector, size) for detector in DETECTORS for size in SIZES if (detector, size) != ("detr", "odd")]
CASES += [(family, detector, "wide") for family in ("dinov2", "convnext") for detector in DETECTORS]


@pytest.mark.parametrize("family, detector, size", CASES)
def test_any_backbone_serves_any_detector(family, detector, size):
    size = SIZES[size]
    torch.manual_seed(0)
    config = tiny_config(detector, f"tiny-{family}")
    images, mask = torch.randn(2, 3, *size), torch.zeros(2, *size, dtype=torch.bool)
    mask[1, :, 50:] = True
    targets = [
        {"labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.3, 0.2, 0.1, 0.1]])},
        {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, criterion, postprocess = build_model(config)
        loss = sum(criterion(model.train()(images, mask, targets), targets).values())
        loss.backward()
        with torch.no_grad():
            outputs = model.eval()(images, mask)
        found = postprocess(outputs, torch.tensor([size, (size[0], 50)]))
    assert torch.isfinite(loss)
    entry = next(p for name, p in model.backbone.named_parameters() if "patch_embed" in name or "stages.0" in name)
    assert entry.grad.abs().sum() > 0 and torch.isfinite(entry.grad).all()
    idle = [name for name, p in model.named_parameters() if p.grad is None and not name.startswith("backbone.")]
    assert idle == []
    assert outputs["pred_boxes"].shape[:2] == outputs["pred_logits"].shape[:2]
    for detections, (height, width) in zip(found, (size, (size[0], 50))):
        boxes = detections["boxes"]
        assert (
            boxes.shape == (len(detections["scores"]), 4)
            and (boxes >= 0).all()
            and (boxes <= torch.tensor([width, height, width, height]) + 1e-3).all()
        )
        assert set(detections["labels"].tolist()) <= {0, 1, 2}
        assert (detections["scores"].diff() <= 0).all()


@pytest.mark.parametrize("pyramid", ["own", "resize", "simple"])
@pytest.mark.parametrize("detector", DETECTORS)
def test_any_pyramid_serves_any_detector(detector, pyramid):
    torch.manual_seed(0)
    backbone = "tiny-ecvit" if pyramid == "own" else "tiny-dinov3"  # ECDet wants three maps
    layers = None if pyramid == "own" else "0,1"
    config = tiny_config(detector, backbone, pyramid=pyramid, layers=layers)
    if (detector, pyramid) == ("ecdet", "own"):
        with pytest.raises(
            UserError, match="--pyramid own: this ECDet takes maps at strides 8, 16, 32 of 128 channels"
        ):
            build_model(config)
        return
    model, criterion, _ = build_model(config)
    targets = 2 * [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]])}]
    loss = sum(
        criterion(model(torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool), targets), targets).values()
    )
    loss.backward()
    assert torch.isfinite(loss)
