import json

import numpy as np
import pytest
import torch
from conftest import ROOT, reference_weight

from backbones import build_backbone
from detr_loss import HungarianMatcher
from ecdet_loss import RefinementCriterion, union_of_matches
from ecdet_model import SIZES, ECDet, position_embedding
from edges import bin_distances, corners_to_boxes

GOLDEN = np.load(ROOT / "tests" / "parity" / "golden_ecdet.npz")
CONSTANTS = {"decoder.up", "decoder.reg_scale", "decoder.decoder.up", "decoder.decoder.reg_scale"}
TARGETS = [
    {"labels": torch.tensor([1, 17, 60]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.2, 0.3, 0.1, 0.2], [0.8, 0.7, 0.3, 0.5]])},
    {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.4, 0.6, 0.7, 0.6]])},
]


def build(size, num_classes=80, **changes):
    sizes = SIZES[size] | changes
    return ECDet(build_backbone(sizes.pop("backbone")), num_classes=num_classes, **sizes)


@pytest.mark.parametrize("size", ["s", "m", "l", "x"])
def test_weights_have_the_names_and_shapes_of_the_released_files(size):
    with torch.device("meta"):
        state = build(size).state_dict()
    keys = json.loads((ROOT / "tests" / "parity" / f"keys_ecdet_{size}.json").read_text())
    assert {key: list(value.shape) for key, value in state.items()} == {k: shape for k, shape in keys.items() if k not in CONSTANTS}


def no_padding(images):
    return torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)


def reference_model(size):
    """ECDet with the weights that the reference implementation was filled with, and the input of its figures."""
    model = build(size)
    state = model.state_dict()
    constant = lambda key, value: not value.is_floating_point() or key.endswith(("num_points_scale", "periods"))
    model.load_state_dict({k: v if constant(k, v) else reference_weight(k, v.shape) for k, v in state.items()})
    shape = tuple(int(n) for n in GOLDEN[f"ecdet_{size}/shape"])
    values = np.random.Generator(np.random.PCG64(int(GOLDEN[f"ecdet_{size}/seed"]))).standard_normal(shape)
    return model.eval(), torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("size", ["s", "l"])
@torch.no_grad()
def test_agrees_with_the_reference_implementation(size):
    model, images = reference_model(size)
    maps = model.encoder(model.backbone(images))
    for i, level in enumerate(maps):
        wanted = GOLDEN[f"ecdet_{size}/enc{i}"]
        channels = 16 if i < 2 else level.shape[1]
        assert np.abs(level[:, :channels].flatten()[::29].numpy() - wanted).max() < 1e-4, i
    outputs = model(images, no_padding(images))
    for key in ("pred_logits", "pred_boxes"):
        assert np.abs(outputs[key][:, :40].numpy() - GOLDEN[f"ecdet_{size}/{key}"]).max() < 1e-3, key

    model.decoder.train()
    losses = RefinementCriterion(HungarianMatcher(2, 5, 2))(model.decoder(maps), TARGETS)
    names = {key.split("/loss/")[1] for key in GOLDEN.files if key.startswith(f"ecdet_{size}/loss/")}
    ours = {name.replace("class", "mal").replace("_enc", "_enc_0"): value for name, value in losses.items()}
    assert ours.keys() == names
    for name, value in ours.items():
        assert float(value) == pytest.approx(float(GOLDEN[f"ecdet_{size}/loss/{name}"]), rel=1e-4), name


def test_positions_run_with_x_outermost_as_in_the_released_weights():
    embedding = position_embedding(2, 3, 8)  # tokens run (y, x) = (0, 0), (0, 1), (0, 2), (1, 0) ...
    x, y = torch.tensor([0, 0, 1, 1, 2, 2.0]), torch.tensor([0, 1, 0, 1, 0, 1.0])
    assert torch.allclose(embedding[:, 0], x.sin()) and torch.allclose(embedding[:, 2], x.cos())
    assert torch.allclose(embedding[:, 4], y.sin()) and torch.allclose(embedding[:, 7], (y / 100).cos())


def test_bins_are_symmetric_and_dense_around_zero():
    bins = bin_distances()
    assert len(bins) == 33 and bins[16] == 0 and torch.allclose(bins, -bins.flip(0)) and bins[-1] == 4
    assert (bins.diff() > 0).all() and bins[17] < 0.1 and bins[31] == pytest.approx(2.0)
    box = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    assert torch.allclose(corners_to_boxes(box, torch.zeros(1, 132)), box)  # an even distribution leaves the box as it is


def test_a_query_goes_to_the_target_that_most_outputs_gave_it():
    image, query, target = torch.tensor([[0, 3, 5], [0, 3, 6], [0, 3, 6], [1, 3, 9], [0, 2, 5]]).T
    found = torch.stack(union_of_matches(image, query, target, 10)).T.tolist()
    assert sorted(found) == [[0, 2, 5], [0, 3, 6], [1, 3, 9]]


@pytest.mark.parametrize("shape", [(64, 96), (128, 64)])
def test_any_multiple_of_32_and_pictures_without_objects(shape):
    torch.manual_seed(0)
    model = build("s", num_classes=3, num_queries=20, layers=2)
    images = torch.randn(2, 3, *shape)
    outputs = model(images, no_padding(images))
    assert outputs["pred_logits"].shape == (2, 20, 3) and len(outputs["aux_outputs"]) == 1
    nothing = [{"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}] * 2
    for targets in (TARGETS[1:] + nothing[:1], nothing):
        losses = RefinementCriterion(HungarianMatcher(2, 5, 2))(outputs, targets)
        assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
