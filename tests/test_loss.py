import itertools

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

import detr_loss
from detr_loss import HungarianMatcher, PostProcess, SetCriterion, assign_dense, pairwise_giou, quality_loss, to_xyxy


def random_targets(counts, classes=4):
    return [
        {
            "labels": torch.randint(classes, (n,)),
            "boxes": torch.cat([torch.rand(n, 2) * 0.6 + 0.2, torch.rand(n, 2) * 0.3 + 0.05], 1),
        }
        for n in counts
    ]


def random_outputs(layers, batch, queries, classes):
    return torch.randn(layers, batch, queries, classes), torch.rand(layers, batch, queries, 4) * 0.4 + 0.2


def test_giou_agrees_with_torchvision():
    torch.manual_seed(0)
    a, b = to_xyxy(torch.rand(30, 4)), to_xyxy(torch.rand(40, 4))
    assert torch.allclose(pairwise_giou(a[:, None], b[None])[1], generalized_box_iou(a, b), atol=1e-5)


@pytest.mark.parametrize("class_loss", ["softmax", "quality"])
def test_the_assignment_is_the_cheapest_of_all(class_loss):
    torch.manual_seed(0)
    matcher = HungarianMatcher(2, 5, 2, class_loss)
    targets = random_targets([3, 2])
    logits, boxes = random_outputs(2, 2, 5, 5)
    layer, image, query, target = matcher(logits, boxes, targets)
    cost = matcher.cost(logits, boxes, targets)
    for l, b in itertools.product(range(2), range(2)):
        mine = (layer == l) & (image == b)
        count = len(targets[b]["labels"])
        assert sorted(target[mine].tolist()) == list(range(count)) and len(set(query[mine].tolist())) == count
        found = cost[l, b][query[mine], target[mine]].sum()
        best = min(
            sum(cost[l, b, q, t] for t, q in enumerate(order)) for order in itertools.permutations(range(5), count)
        )
        assert found == pytest.approx(float(best), rel=1e-6)


def test_layers_matched_together_are_matched_as_if_alone():
    torch.manual_seed(0)
    matcher, targets = HungarianMatcher(2, 5, 2), random_targets([4, 0, 1])
    logits, boxes = random_outputs(3, 3, 6, 4)
    together = matcher(logits, boxes, targets)
    for l in range(3):
        alone = matcher(logits[l : l + 1], boxes[l : l + 1], targets)
        assert [x[together[0] == l].tolist() for x in together[1:]] == [x.tolist() for x in alone[1:]]


def test_pictures_without_objects_and_batches_without_any():
    criterion = SetCriterion(HungarianMatcher(2, 5, 2))
    for counts in ([0, 2], [0, 0]):
        logits, boxes = random_outputs(1, 2, 6, 4)
        logits.requires_grad_()
        outputs = {
            "pred_logits": logits[0],
            "pred_boxes": boxes[0],
            "aux_outputs": [],
            "dense": {"pred_logits": logits[0], "pred_boxes": boxes[0]},
        }
        losses = criterion(outputs, random_targets(counts))
        total = sum(losses.values())
        total.backward()
        assert torch.isfinite(total) and torch.isfinite(logits.grad).all()
        if counts == [0, 0]:
            assert (
                losses["loss_bbox"] == losses["loss_giou"] == losses["loss_bbox_dense"] == 0
                and losses["loss_class"] > 0
            )


def test_more_objects_than_queries_match_every_query():
    logits, boxes = random_outputs(1, 1, 3, 4)
    targets = random_targets([7])
    _, _, query, target = HungarianMatcher()(logits, boxes, targets)
    assert sorted(query.tolist()) == [0, 1, 2] and len(set(target.tolist())) == 3


def test_a_diverged_network_does_not_stop_the_matcher_and_shows_in_the_loss():
    logits, boxes = random_outputs(1, 1, 5, 4)
    logits[0, 0, 2], boxes[0, 0, 2] = torch.nan, torch.nan
    targets = random_targets([2])
    matcher = HungarianMatcher()
    assert 2 not in matcher(logits, boxes, targets)[2]
    loss = sum(
        SetCriterion(matcher)({"pred_logits": logits[0], "pred_boxes": boxes[0], "aux_outputs": []}, targets).values()
    )
    assert not torch.isfinite(loss)


def test_dense_assignment_gives_every_object_its_cheapest_pixels():
    torch.manual_seed(0)
    cost = torch.rand(2, 50, 3)
    image, pixel, target = assign_dense(cost, [3, 1], k=4)
    assert len({(i, p) for i, p in zip(image.tolist(), pixel.tolist())}) == len(image)
    assert set(target[image == 1].tolist()) == {0} and (image == 1).sum() == 4
    assert set(pixel[image == 1].tolist()) == set(cost[1, :, 0].topk(4, largest=False).indices.tolist())
    for i, p, t in zip(image.tolist(), pixel.tolist(), target.tolist()):
        assert p in cost[i, :, t].topk(4, largest=False).indices


def test_a_perfect_prediction_costs_nothing_and_the_loss_grows_with_the_error():
    targets = [{"labels": torch.tensor([1, 0]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2]])}]
    logits = torch.full((1, 4, 2), -20.0)
    logits[0, 1, 1] = logits[0, 3, 0] = 20.0
    boxes = torch.rand(1, 4, 4) * 0.1 + 0.05
    boxes[0, 1], boxes[0, 3] = targets[0]["boxes"]
    criterion = SetCriterion(HungarianMatcher(2, 5, 2))
    losses = [
        float(sum(criterion({"pred_logits": logits, "pred_boxes": boxes + e, "aux_outputs": []}, targets).values()))
        for e in (0, 0.01, 0.03)
    ]
    assert losses[0] < 1e-4 < losses[1] < losses[2]


def test_quality_loss_is_smallest_at_its_target():
    for wanted in (0.2, 0.7):
        logits = torch.linspace(-4, 4, 801)[:, None]
        loss = quality_loss(logits, torch.full_like(logits, wanted))
        assert float(logits[loss.argmin()].sigmoid()) == pytest.approx(wanted, abs=0.01)


def test_detections_are_in_pixels_of_the_picture_best_first():
    logits = torch.tensor([[[-2.0, 3.0], [1.0, -5.0]]])
    outputs = {"pred_logits": logits, "pred_boxes": torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.4, 0.4]]])}
    found = PostProcess("quality", limit=2)(outputs, torch.tensor([[100, 200]]))[0]
    assert found["labels"].tolist() == [1, 0]
    assert found["boxes"].tolist() == [[50, 25, 150, 75], [0, 0, pytest.approx(60), pytest.approx(30)]]
    found = PostProcess("softmax")(outputs, torch.tensor([[100, 200]]))[0]
    assert found["labels"].tolist() == [0, 0] and found["scores"].tolist() == sorted(
        found["scores"].tolist(), reverse=True
    )


@pytest.mark.parametrize("class_loss", ["quality", "focal", "softmax"])
def test_a_batch_in_pieces_has_the_loss_of_the_whole(class_loss):
    """One image of 1 object and one of 7: divided by the mean of a piece, not each by its own."""
    torch.manual_seed(0)
    criterion = SetCriterion(HungarianMatcher(class_loss=class_loss), class_loss=class_loss)
    outputs = {"pred_logits": torch.randn(2, 20, 4), "pred_boxes": 0.3 + 0.4 * torch.rand(2, 20, 4), "aux_outputs": []}
    if class_loss != "softmax":  # its scores are weighed within a device's images, as published
        outputs["dense"] = {"pred_logits": torch.randn(2, 30, 4), "pred_boxes": 0.3 + 0.4 * torch.rand(2, 30, 4)}
    targets = [{"labels": torch.randint(3, (n,)), "boxes": 0.3 + 0.4 * torch.rand(n, 4)} for n in (1, 7)]

    def cut(x, i):
        if isinstance(x, dict):
            return {k: cut(v, i) for k, v in x.items()}
        return x if isinstance(x, list) else x[i : i + 1]

    whole, pieces = criterion(outputs, targets), [criterion(cut(outputs, i), targets[i : i + 1], 8 / 2) for i in (0, 1)]
    alone = [criterion(cut(outputs, i), targets[i : i + 1]) for i in (0, 1)]
    for name, value in whole.items():
        if (class_loss, name) != ("softmax", "loss_class"):
            assert (pieces[0][name] + pieces[1][name]) / 2 == pytest.approx(float(value), rel=1e-5), name
    assert abs(float(alone[0]["loss_giou"] + alone[1]["loss_giou"]) / 2 - float(whole["loss_giou"])) > 1e-3


def test_dense_losses_do_not_depend_on_how_many_images_are_matched_at_once(monkeypatch):
    torch.manual_seed(3)
    sizes, classes = [3, 0, 7, 1], 5
    criterion = SetCriterion(HungarianMatcher())
    outputs = {"pred_logits": torch.randn(4, 60, classes), "pred_boxes": torch.rand(4, 60, 4) * 0.5 + 0.1}
    targets = [{"labels": torch.randint(classes, (n,)), "boxes": torch.rand(n, 4) * 0.4 + 0.2} for n in sizes]
    whole = criterion.dense_losses(outputs, targets, torch.tensor(11.0))
    asked = []
    real = criterion.matcher.cost
    monkeypatch.setattr(criterion.matcher, "cost", lambda *given: asked.append(len(given[2])) or real(*given))
    for at_once, images in ((1, [1, 1, 1, 1]), (2 * 60 * 7, [2, 2]), (10**6, [4])):
        monkeypatch.setattr(detr_loss, "COSTS_AT_ONCE", at_once)
        asked.clear()
        parts = criterion.dense_losses(outputs, targets, torch.tensor(11.0))
        assert asked == images
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("classes, objects", [(3, 20), (40, 2)])
def test_costs_are_the_same_with_more_objects_than_classes(classes, objects):
    """Against the formula written out for every pair."""
    torch.manual_seed(4)
    logits, boxes = torch.randn(2, 1, 6, classes), torch.rand(2, 1, 6, 4) * 0.4 + 0.2
    target = {"labels": torch.randint(classes, (objects,)), "boxes": torch.rand(objects, 4) * 0.4 + 0.2}
    cost = HungarianMatcher().cost(logits, boxes, [target])
    for layer, query, number in itertools.product(range(2), range(6), range(objects)):
        p = torch.sigmoid(logits[layer, 0, query, target["labels"][number]].double())
        focal = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
        box, theirs = boxes[layer, 0, query], target["boxes"][number]
        giou = generalized_box_iou(
            box_convert(box[None], "cxcywh", "xyxy"), box_convert(theirs[None], "cxcywh", "xyxy")
        )
        expected = focal + 5 * (box - theirs).abs().sum() - 2 * giou[0, 0]
        torch.testing.assert_close(cost[layer, 0, query, number].double(), expected.double(), rtol=1e-5, atol=1e-5)
