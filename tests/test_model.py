import pytest
import torch
import transformers
from conftest import FixedFeatures
from peers import detr_weights

from detr_loss import HungarianMatcher, SetCriterion, to_xyxy
from detr_model import DETECTORS, DETR, ROUNDS, PlainDETR, build_model, is_duplicate, select_distinct
from layers import attend, make_cells
from settings import DEFAULTS

CONFIG = DEFAULTS | dict(
    detector="detr",
    backbone="ecvit-nano",
    backbone_weights=None,
    num_classes=3,
    num_queries=20,
    hidden_dim=32,
    num_heads=2,
    ffn_dim=64,
    decoder_layers=2,
    dropout=0.0,
)


def transformers_detr():
    """transformers' DETR, tiny, on a tiny ResNet, with random weights."""
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=15,
        num_labels=5,
        auxiliary_loss=True,
        dropout=0.0,
    )
    return transformers.DetrForObjectDetection(config).eval()


def test_published_detr_and_its_losses_agree_with_transformers():
    theirs = transformers_detr()
    images = torch.randn(2, 3, 96, 128)
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 70:], mask[1, :, 90:] = True, True
    features = []
    hook = theirs.model.backbone.register_forward_hook(lambda module, inputs, output: features.append(output))
    labels = [
        {"class_labels": torch.tensor([1, 4, 0]), "boxes": torch.rand(3, 4) * 0.3 + 0.2},
        {"class_labels": torch.tensor([2]), "boxes": torch.rand(1, 4) * 0.3 + 0.2},
    ]
    with torch.no_grad():
        expected = theirs(images, pixel_mask=(~mask).long(), labels=labels)
    hook.remove()
    maps = features[0]
    while not torch.is_tensor(maps):  # the nesting differs between versions of transformers
        maps = maps[-1] if isinstance(maps, list) or not torch.is_tensor(maps[0]) else maps[0]
    ours = DETR(
        FixedFeatures([maps if maps.shape[1] == 24 else None], [32]),
        5,
        15,
        32,
        4,
        48,
        encoder_layers=2,
        decoder_layers=3,
        dropout=0.0,
    ).eval()
    ours.load_state_dict(detr_weights(theirs))  # every weight of ours has to be met
    with torch.no_grad():
        outputs = ours(images, mask)
    assert (outputs["pred_logits"] - expected.logits).abs().max() < 1e-4
    assert (outputs["pred_boxes"] - expected.pred_boxes).abs().max() < 1e-4

    criterion = SetCriterion(HungarianMatcher(1, 5, 2, class_loss="softmax"), class_loss="softmax")
    losses = criterion(outputs, [{"labels": t["class_labels"], "boxes": t["boxes"]} for t in labels])
    assert float(sum(losses.values())) == pytest.approx(float(expected.loss), rel=1e-5)
    weights = {"ce": ("class", 1), "bbox": ("bbox", 5), "giou": ("giou", 2)}
    for key, value in expected.loss_dict.items():
        name, _, layer = key.removeprefix("loss_").partition("_")
        if name in weights:
            ours_name, weight = weights[name]
            suffix = f"_aux_{layer}" if layer else ""
            assert float(losses[f"loss_{ours_name}{suffix}"]) == pytest.approx(weight * float(value), rel=1e-5), key


@pytest.mark.parametrize("detector", ["detr", "detr-2020"])
def test_outputs_keep_the_contract(detector):
    torch.manual_seed(0)
    model, criterion, postprocess = build_model(CONFIG | {"detector": detector})
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    outputs = model(torch.randn(2, 3, 64, 96), mask)
    classes = 4 if detector == "detr-2020" else 3
    for layer in [outputs, *outputs["aux_outputs"]]:
        assert layer["pred_logits"].shape == (2, 20, classes) and layer["pred_boxes"].shape == (2, 20, 4)
        assert (layer["pred_boxes"] >= 0).all() and (layer["pred_boxes"] <= 1).all()
    targets = [
        {"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])},
        {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]
    sum(criterion(outputs, targets).values()).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert all(name.startswith("backbone.") for name in unused), unused
    detections = postprocess(outputs, torch.tensor([[480, 640], [100, 50]]))
    for found, (h, w) in zip(detections, ((480, 640), (100, 50))):
        assert (found["boxes"] >= 0).all() and (found["boxes"][:, 2] <= w).all() and (found["boxes"][:, 3] <= h).all()
        assert (found["scores"].diff() <= 0).all() and found["labels"].max() < 3


@pytest.mark.parametrize(
    "kind, more",
    [(DETR, {}), *[(PlainDETR, dict(attention=a, distinct=d)) for a in ("local", "global") for d in (0.1, 0.7, 0.0)]],
)
def test_padding_changes_nothing(kind, more):
    """The same features with more padding around them give the same detections."""
    torch.manual_seed(0)
    inner = torch.randn(1, 8, 4, 6)
    outer = torch.full((1, 8, 8, 10), 7.0)
    outer[:, :, :4, :6] = inner
    backbone = FixedFeatures([inner], [16])
    model = kind(backbone, 3, 22, 32, 2, 64, **more).eval()  # of 24 cells
    for p in model.parameters():  # heads start at zero
        torch.nn.init.normal_(p, std=0.05) if p.ndim > 1 else None
    if kind is PlainDETR:
        model.neck.mix = torch.nn.ModuleList()  # 3x3 convolutions do look across the border, as in every detector
        backbone.strides = [8]
        model.neck = type(model.neck)([8], [8], 32).eval()
        model.neck.mix = torch.nn.ModuleList()
    stride = backbone.strides[0]
    small = model(torch.zeros(1, 3, 4 * stride, 6 * stride), torch.zeros(1, 4 * stride, 6 * stride, dtype=torch.bool))
    backbone.maps = [outer]
    mask = torch.ones(1, 8 * stride, 10 * stride, dtype=torch.bool)
    mask[:, : 4 * stride, : 6 * stride] = False
    large = model(torch.zeros(1, 3, 8 * stride, 10 * stride), mask)
    assert torch.allclose(small["pred_boxes"], large["pred_boxes"], atol=1e-5)
    assert torch.allclose(small["pred_logits"], large["pred_logits"], atol=1e-5)


def test_cells_are_counted_in_units_of_the_unpadded_picture():
    mask = torch.zeros(2, 32, 64, dtype=torch.bool)
    mask[1, 24:], mask[1, :, 40:] = True, True
    cells = make_cells(mask, [(4, 8)], [8])
    x, y = cells.centres.unflatten(1, (4, 8)).unbind(-1)
    assert torch.allclose(y[0, :, 0], torch.tensor([4.0, 12, 20, 28]) / 32)
    assert torch.allclose(x[1, 0, :5], torch.tensor([4.0, 12, 20, 28, 36]) / 40)
    assert torch.allclose(cells.sizes[:, 0], torch.tensor([[8 / 64, 8 / 32], [8 / 40, 8 / 24]]))
    padding = cells.padding.unflatten(1, (4, 8))
    assert padding[1, :, 0].tolist() == [False, False, False, True] and padding[1, 0].sum() == 3
    assert torch.allclose(cells.valid_ratios[:, 0], torch.tensor([[1.0, 1.0], [40 / 64, 24 / 32]]))


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16, 32), (14,), (16,), (32,)])
def test_every_kind_of_backbone_map_is_accepted(strides):
    maps = [torch.randn(1, 6, -(-224 // s), -(-224 // s)) for s in strides]
    model = PlainDETR(FixedFeatures(maps, strides), 2, 30, 32, 2, 64)
    outputs = model(torch.zeros(1, 3, 224, 224), torch.zeros(1, 224, 224, dtype=torch.bool))
    assert outputs["pred_boxes"].shape == (1, 30, 4)
    h, w = maps[0].shape[-2:]
    assert model.neck.stride in (7, 8, 16) and outputs["dense"]["pred_boxes"].shape[1] >= 14 * 14


def test_the_published_detr_starts_as_pytorchs_transformer_does():
    """Every weight's standard deviation is that of nn.Transformer with Xavier over its matrices, the authors' code."""
    torch.manual_seed(0)
    theirs = torch.nn.Transformer(64, 4, 2, 2, 256)
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            torch.nn.init.xavier_uniform_(parameter)
    ours = DETR(
        FixedFeatures([torch.zeros(1, 32, 2, 2)], (32,)),
        5,
        hidden_dim=64,
        num_heads=4,
        ffn_dim=256,
        encoder_layers=2,
        decoder_layers=2,
    )
    names = {"self_attn": "self_attn", "cross_attn": "multihead_attn"}
    for part in ("encoder", "decoder"):
        for layer, reference in zip(getattr(ours, part), getattr(theirs, part).layers):
            for name, attention in layer.named_children():
                if name in names:
                    twin = getattr(reference, names[name])
                    for projection in ("q_proj", "k_proj", "v_proj"):
                        assert getattr(attention, projection).weight.detach().std() == pytest.approx(
                            float(twin.in_proj_weight.detach().std()), rel=0.05
                        )
                        assert (getattr(attention, projection).bias == 0).all()
                    assert (
                        attention.out_proj.weight.detach().std()
                        == pytest.approx(float(twin.out_proj.weight.detach().std()), rel=0.05)
                        and (attention.out_proj.bias == 0).all()
                    )
            for name in ("linear1", "linear2"):
                assert getattr(layer, name).weight.detach().std() == pytest.approx(
                    float(getattr(reference, name).weight.detach().std()), rel=0.05
                )


@pytest.mark.parametrize("detector", DETECTORS)
def test_heads_compute_in_float32_also_under_bfloat16(detector):
    """Boxes of 2 % of the image would lose 4 % of their overlap to eight bits: what comes out has more of them."""
    torch.manual_seed(0)
    model = build_model(
        DEFAULTS | CONFIG | {"detector": detector, "size": "nano", "num_denoising": 8, "encoder_layers": 1}
    )[0].eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    images, mask = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = model(images, mask)
    for key in ("pred_logits", "pred_boxes"):
        value = outputs[key]
        assert value.dtype == torch.float32 and (value == value.bfloat16().float()).float().mean() < 0.1, key


@pytest.mark.parametrize("detector", DETECTORS)
def test_an_image_thinner_than_half_a_cell_is_no_padding_alone(detector):
    """Two pixels high next to another of 64: its first row of cells counts, so there is something to learn from."""
    torch.manual_seed(0)
    model, criterion, postprocess = build_model(
        DEFAULTS | CONFIG | {"detector": detector, "size": "nano", "num_denoising": 8, "encoder_layers": 1}
    )
    images, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[0, 2:], mask[1, :, 3:] = True, True
    targets = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.9]])}] * 2
    losses = criterion(model.train()(images, mask, targets), targets)
    assert all(value.isfinite() for value in losses.values()) and float(sum(losses.values()).detach()) < 300
    with torch.no_grad():
        found = postprocess(model.eval()(images, mask), torch.tensor([[2, 96], [64, 3]]))
    assert all(d["boxes"].isfinite().all() and d["scores"].isfinite().all() for d in found)


def iou(a, b):
    """Of two boxes cxcywh."""
    w, h = (
        min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2) - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2) for i in (0, 1)
    )
    return max(w, 0) * max(h, 0) / (a[2] * a[3] + b[2] * b[3] - max(w, 0) * max(h, 0))


def doubles_by_a_loop(boxes, order, overlap):
    """Best first: a box is a double where its IoU with one that was kept is over `overlap`."""
    kept = []
    for i in order:
        if all(iou(boxes[i], boxes[j]) <= overlap for j in kept):
            kept.append(i)
    return set(order) - set(kept)


@pytest.mark.parametrize("overlap", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_queries_are_kept_apart_as_a_plain_loop_keeps_them(overlap, seed):
    """Best first; the doubles of what was kept come after all others, and padding last."""
    torch.manual_seed(seed)
    scores, boxes = torch.randn(3, 90), torch.cat([torch.rand(3, 90, 2), 0.3 + 0.1 * torch.rand(3, 90, 2)], dim=-1)
    padding = torch.rand(3, 90) < 0.2
    scores[padding] = -1e4
    found = select_distinct(scores, boxes, padding, 90, overlap)
    for image in range(3):
        real = [i for i in sorted(range(90), key=lambda i: -scores[image, i]) if not padding[image, i]]
        double = doubles_by_a_loop(boxes[image].tolist(), real, overlap)
        first, second = [i for i in real if i not in double], [i for i in real if i in double]
        assert first and second and found[image, : len(real)].tolist() == first + second
        assert sorted(found[image].tolist()) == list(range(90))
        assert select_distinct(scores, boxes, padding, 7, overlap)[image].tolist() == (first + second)[:7]


@pytest.mark.parametrize("length", [3, 4, 5, 30])
def test_a_chain_of_doubles(length):
    """Boxes side by side, each overlapping its neighbours alone: every other one is kept.

    Of a chain that is longer than there are rounds some are doubles that a loop would keep, and none is kept that it
    wouldn't.
    """
    boxes = torch.tensor([[[0.1 + 0.03 * i / 2, 0.5, 0.1, 0.2] for i in range(length)]])
    assert iou(boxes[0, 0].tolist(), boxes[0, 2].tolist()) < 0.7 < iou(boxes[0, 0].tolist(), boxes[0, 1].tolist())
    kept = (~is_duplicate(to_xyxy(boxes), 0.7))[0].nonzero()[:, 0].tolist()
    wanted = list(range(0, length, 2))
    assert set(kept) <= set(wanted) and kept[: (ROUNDS + 1) // 2] == wanted[: (ROUNDS + 1) // 2]


def test_more_queries_than_candidates_and_a_crowd_of_cells():
    """Of many cells the best are looked through; as many queries come out as were asked for, none twice."""
    torch.manual_seed(0)
    scores, boxes = (
        torch.randn(1, 5000),
        torch.cat([torch.rand(1, 5000, 2), 0.2 + 0.2 * torch.rand(1, 5000, 2)], dim=-1),
    )
    for count in (300, 2000):
        found = select_distinct(scores, boxes, torch.zeros(1, 5000, dtype=torch.bool), count, 0.5)[0]
        assert len(set(found.tolist())) == count and found[0] == scores.argmax()
        apart = boxes[0, found[:20]].tolist()
        assert all(iou(a, b) <= 0.5 for i, a in enumerate(apart) for b in apart[:i])


def test_a_query_of_the_default_looks_around_its_box_alone():
    """What is far from a query's box changes nothing of what its cross-attention finds; what is inside does."""
    torch.manual_seed(0)
    attention = PlainDETR(FixedFeatures([torch.zeros(1, 8, 4, 4)], [8]), 3, 5, 32, 2, 64).layers[0].cross_attn
    query, box, share = torch.randn(1, 1, 32), torch.tensor([[[0.25, 0.25, 0.2, 0.2]]]), torch.ones(1, 1, 2)
    memory = torch.randn(1, 32 * 32, 32)
    far, near = memory.unflatten(1, (32, 32)).clone(), memory.unflatten(1, (32, 32)).clone()
    far[:, 16:], far[:, :, 16:] = 9.0, 9.0
    near[:, 6:11, 6:11] = 9.0
    was, with_far, with_near = (
        attention(query, box, m.flatten(1, 2) if m.ndim == 4 else m, [(32, 32)], share) for m in (memory, far, near)
    )
    assert torch.equal(was, with_far) and not torch.allclose(was, with_near, atol=1e-3)


def test_noisy_copies_do_not_change_what_the_defaults_queries_find():
    torch.manual_seed(0)
    model = PlainDETR(FixedFeatures([torch.randn(2, 8, 12, 8)], [8]), 3, 20, 32, 2, 64, 2, num_denoising=12).train()
    for p in model.parameters():  # heads start at zero
        torch.nn.init.normal_(p, std=0.05) if p.ndim > 1 else None
    images, mask = torch.zeros(2, 3, 96, 64), torch.zeros(2, 96, 64, dtype=torch.bool)
    targets = [
        {"labels": torch.tensor([0, 2]), "boxes": torch.rand(2, 4) * 0.4 + 0.1},
        {"labels": torch.tensor([1]), "boxes": torch.rand(1, 4) * 0.4 + 0.1},
    ]
    nothing = [{"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}] * 2
    alone, beside = model(images, mask, nothing), model(images, mask, targets)
    assert alone["denoising"] is None and beside["denoising"]["pred_boxes"].shape == (
        2,
        24,
        4,
    )  # six groups of two copies of two objects
    for key in ("pred_boxes", "pred_logits"):
        torch.testing.assert_close(alone[key], beside[key], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone["aux_outputs"][0][key], beside["aux_outputs"][0][key], atol=1e-5, rtol=0)
    criterion = SetCriterion(HungarianMatcher(class_cost=2))
    losses, without = criterion(beside, targets), criterion(alone, nothing)
    assert {"loss_class_dn", "loss_bbox_aux_0_dn", "loss_giou_dense"} <= losses.keys() and not any(
        "_dn" in name for name in without
    )
    assert all(torch.isfinite(value) for value in [*losses.values(), *without.values()])
    assert "denoising" not in model.eval()(images, mask) and "denoising_class_embed" in dict(model.named_children())
    assert not any(
        "denoising" in name
        for name in PlainDETR(
            FixedFeatures([torch.zeros(1, 8, 4, 4)], [8]), 3, 5, 32, 2, 64, num_denoising=0
        ).state_dict()
    )


@pytest.mark.parametrize("biased", [False, True])
def test_small_attention_in_bfloat16_is_the_fused_kernels(biased):
    """On CPUs plain products stand for the kernel where gradients are kept: the same to the digits of bfloat16."""
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, n, 16, requires_grad=True) for n in (50, 70, 70)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    bias = torch.zeros(50, 70).masked_fill(torch.rand(50, 70) < 0.3, -torch.inf) if biased else None
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=bias)
    found = attend(*rounded, bias)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    found.backward(grad.bfloat16())
    assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.05
    for x, y in zip(exact, rounded):
        assert (x.grad - y.grad).norm() < 0.02 * x.grad.norm()
