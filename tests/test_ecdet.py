import json

import numpy as np
import pytest
import torch
from conftest import ROOT, reference_weight

from backbones import build_backbone
from detr_loss import HungarianMatcher, to_xyxy
from detr_model import build_model
from ecdet_loss import RefinementCriterion, bin_distances, corners_to_boxes, union_of_matches
from ecdet_model import SIZES, ECDet, position_embedding
from layers import make_denoising

GOLDEN = np.load(ROOT / "tests" / "parity" / "golden_ecdet.npz")
CONSTANTS = {"decoder.up", "decoder.reg_scale", "decoder.decoder.up", "decoder.decoder.reg_scale"}
TARGETS = [
    {
        "labels": torch.tensor([1, 17, 60]),
        "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.2, 0.3, 0.1, 0.2], [0.8, 0.7, 0.3, 0.5]]),
    },
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
    assert {key: list(value.shape) for key, value in state.items()} == {
        k: shape for k, shape in keys.items() if k not in CONSTANTS
    }


def no_padding(images):
    return torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)


def reference_model(size):
    """ECDet with the weights that the reference implementation was filled with, and the input of its figures."""
    model = build(size)
    state = model.state_dict()

    def constant(key, value):
        return not value.is_floating_point() or key.endswith(("num_points_scale", "periods"))

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
        assert np.abs(outputs[key][:, :40].numpy() - GOLDEN[f"ecdet_{size}/{key}"]).max() < 1e-4, key

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
    assert torch.allclose(
        corners_to_boxes(box, torch.zeros(1, 132)), box
    )  # an even distribution leaves the box as it is


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


@pytest.mark.parametrize(
    "backbone, shape",
    [
        ("dinov3-vits16", (48, 80)),
        ("dinov2-small", (42, 70)),
        ("dinov3-convnext-tiny", (64, 96)),
        ("ecvitt", (64, 64)),
        ("ecvit-nano", (50, 90)),
    ],
)
def test_any_backbone_feeds_it(backbone, shape):
    torch.manual_seed(0)
    config = dict(
        detector="ecdet",
        size="m",
        backbone=backbone,
        backbone_weights=None,
        num_classes=3,
        num_queries=15,
        decoder_layers=2,
    )
    model, criterion, postprocess = build_model(config)
    images = torch.randn(2, 3, *shape)
    targets = [{"labels": t["labels"] % 3, "boxes": t["boxes"]} for t in TARGETS]
    outputs = model(images, no_padding(images), targets)
    losses = criterion(outputs, targets)
    assert {"loss_class", "loss_fgl_aux_0", "loss_giou_enc", "loss_bbox_pre_dn", "loss_ddf_aux_0_dn"} <= losses.keys()
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    silent = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith("backbone.")]
    assert silent == []
    detections = postprocess(model.eval()(images, no_padding(images)), torch.tensor([[100, 200]] * 2))
    assert len(detections) == 2 and (detections[0]["boxes"][:, 2] <= 200).all() and len(detections[0]["scores"]) == 45


def test_boxes_are_relative_to_the_picture_without_its_padding():
    """An untrained head leaves every box on its anchor: a cell's centre, 0.05 of the padded image on level 0."""
    torch.manual_seed(0)
    model = build("nano", num_classes=3, num_queries=40).eval()
    images = torch.randn(2, 3, 64, 128)
    mask = no_padding(images)
    mask[0, :, 64:], mask[1, 32:] = True, True
    boxes = model(images, mask)["pred_boxes"]
    assert (boxes[..., :2] < 1).all() and (boxes[..., :2] > 0).all()
    width, height = boxes[0, :, 2] * 64, boxes[0, :, 3] * 64  # pixels
    assert torch.allclose(width, 2 * height, atol=1e-3)
    level = (width / (0.05 * 128)).log2()
    assert torch.allclose(level, level.round(), atol=1e-3)
    column = boxes[0, :, 0] * 64 / (8 * 2**level) - 0.5
    assert torch.allclose(column, column.round(), atol=1e-3)


def test_noisy_copies_change_nothing_for_the_matching_queries_or_for_other_groups():
    torch.manual_seed(0)
    model = build("nano", num_classes=70, num_queries=20)
    for parameter in model.decoder.parameters():  # away from the zeros of a fresh model
        parameter.data += 0.02 * torch.randn_like(parameter)
    levels = [torch.randn(2, 128, n, n) for n in (16, 8, 4)]
    model.decoder.train()
    noisy, plain = model.decoder(levels, targets=TARGETS), model.decoder(levels)
    assert "denoising" in noisy and "denoising" not in plain
    for a, b in zip(
        (noisy, *noisy["aux_outputs"], noisy["pre"], noisy["enc"]),
        (plain, *plain["aux_outputs"], plain["pre"], plain["enc"]),
    ):
        assert torch.allclose(a["pred_logits"], b["pred_logits"], atol=1e-4) and torch.allclose(
            a["pred_boxes"], b["pred_boxes"], atol=1e-5
        )
    blocked = make_denoising(TARGETS, 70, 20).blocked
    group = torch.arange(198) // 6  # 33 groups of three objects, positive and negative
    assert torch.equal(blocked[:, :198], group[:, None] != group[None]) and not blocked[:, 198:].any()


def test_copies_of_an_object_are_moved_by_up_to_half_of_it_or_by_half_to_the_whole():
    torch.manual_seed(0)
    targets = [
        {"labels": torch.tensor([2, 0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.1], [0.4, 0.5, 0.1, 0.2]])},
        {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.4, 0.2, 0.2]])},
    ]
    noisy = make_denoising(targets, 40, 7)
    assert noisy.labels.shape == (2, 200) and noisy.boxes.shape == (2, 200, 4) and noisy.blocked.shape == (200, 207)
    image, query, target = noisy.matches
    assert (
        len(target) == 50 * 3 and set(target[image == 0].tolist()) == {0, 1} and set(target[image == 1].tolist()) == {2}
    )
    every = torch.cat([t["boxes"] for t in targets])[target]
    shift = (to_xyxy(noisy.boxes[image, query]) - to_xyxy(every)) / every[:, [2, 3, 2, 3]]
    assert shift.abs().max() <= 0.5 + 1e-5 and shift.abs().mean() == pytest.approx(0.25, abs=0.03)
    kept = (noisy.labels[image, query] == torch.tensor([2, 0, 1])[target]).float().mean()
    assert 0.65 < kept < 0.87  # a quarter drawn anew
    negative = (torch.arange(200) // 2 % 2 == 1)[None] & (noisy.labels < 40)
    negative[1, 1::2] = False
    wide = (
        noisy.boxes[0][negative[0]][::2, 2:] / 0.2
    )  # of the first object: edges moved by 1..2 halves either way, maybe crossed
    assert (wide[:, 0] <= 3.01).all() and (wide[:, 0] > 1.01).any()
    assert (noisy.labels[1, 1::2] == 40).all() and make_denoising(
        [{"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}], 40, 7
    ) is None


def test_each_term_is_the_sum_over_pictures():
    """A batch's unnormalised terms don't depend on the rest of it: two images together lose what each loses alone."""
    torch.manual_seed(0)
    model = build("nano", num_classes=70, num_queries=30)
    model.decoder.train()
    levels = [torch.randn(2, 128, n, n) for n in (16, 8, 4)]
    outputs = model.decoder(levels)

    def take(x, i):
        if isinstance(x, dict):
            return {k: take(v, i) for k, v in x.items()}
        if isinstance(x, list):
            return [take(v, i) for v in x]
        return x[i : i + 1]

    criterion = RefinementCriterion(HungarianMatcher(2, 5, 2))
    with torch.no_grad():
        both, alone = criterion(outputs, TARGETS), [criterion(take(outputs, i), TARGETS[i : i + 1]) for i in range(2)]
    for name in ("loss_class", "loss_class_enc", "loss_class_aux_0"):
        assert float(both[name]) * 4 == pytest.approx(3 * float(alone[0][name]) + float(alone[1][name]), rel=1e-4)


def test_nano_shifts_its_boxes_and_has_no_distributions():
    model = build("nano", num_classes=70, num_queries=30)
    outputs = model.decoder.train()([torch.randn(2, 128, n, n) for n in (16, 8, 4)], targets=TARGETS)
    losses = RefinementCriterion(HungarianMatcher(2, 5, 2))(outputs, TARGETS)
    assert {name.split("_")[1] for name in losses} == {"class", "bbox", "giou"} and len(losses) == 3 * (4 + 3)
    sum(losses.values()).backward()
    assert [n for n, p in model.decoder.named_parameters() if p.grad is None] == []


def test_in_bfloat16_positions_keep_their_digits():
    torch.manual_seed(0)
    model = build("nano", num_classes=70, num_queries=30).decoder
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    levels = [torch.randn(2, 128, n, n) for n in (128, 64, 32)]
    attention = model.decoder.layers[0].cross_attn
    query, boxes = 0.05 * torch.randn(2, 30, 128), torch.rand(2, 30, 4)
    wanted = attention(query, boxes, levels)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(query, boxes, levels)
        outputs = model.train()(levels, targets=TARGETS)
    assert (
        (found - wanted).abs().mean() < 0.075 * wanted.abs().mean()
    )  # offsets are rounded, which gives 0.055; rounded positions would give 0.095
    losses = RefinementCriterion(HungarianMatcher(2, 5, 2))(outputs, TARGETS)
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values()) and outputs["pred_boxes"].dtype == torch.float32
