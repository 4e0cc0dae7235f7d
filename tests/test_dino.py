import pytest
import torch
import transformers
from conftest import FixedFeatures

import dino_model
from detr_loss import HungarianMatcher, SetCriterion
from dino_model import DINO
from layers import WeightedSamples, make_cells, weighted_samples


def transformers_deformable_detr():
    """transformers' two-stage Deformable DETR with box refinement, tiny, on a tiny ResNet, with random weights."""
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DeformableDetrConfig(
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
        num_feature_levels=4,
        two_stage=True,
        with_box_refine=True,
        two_stage_num_proposals=15,
        num_queries=15,
        num_labels=1,
        dropout=0.0,
        encoder_n_points=4,
        decoder_n_points=4,
    )
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # offsets, attention and shifts start at zero, which would test little
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def weights_for(ours, theirs):
    """Their state dict under our names; what the two do not have in common keeps our values."""
    state, met = ours.state_dict(), set()
    for key, value in theirs.state_dict().items():
        last = f"{len(ours.decoder)}."
        key = key.removeprefix("model.").removeprefix("decoder.") if "_embed." in key else key.removeprefix("model.")
        for old, new in [
            (f"class_embed.{last}", "enc_class_head."),
            (f"bbox_embed.{last}", "enc_box_head."),
            ("class_embed.", "class_heads."),
            ("bbox_embed.", "box_heads."),
            ("encoder.layers", "encoder"),
            ("decoder.layers", "decoder"),
            ("encoder_attn_layer_norm", "norm2"),
            ("encoder_attn", "cross_attn"),
            ("o_proj", "out_proj"),
            ("mlp.fc1", "linear1"),
            ("mlp.fc2", "linear2"),
            ("fc1", "linear1"),
            ("fc2", "linear2"),
            ("self_attn_layer_norm", "norm1"),
        ]:
            key = key.replace(old, new)
        key = key.replace("final_layer_norm", "norm2" if key.startswith("encoder") else "norm3")
        if key in state:
            state[key] = value
            met.add(key)
    ours_alone = ("content", "denoising", "query_pos", "num_points_scale", "norm.", "backbone")
    assert {
        key for key in state.keys() - met if not key.startswith(ours_alone) and "num_points_scale" not in key
    } == set()
    return state


def test_the_transformer_agrees_with_transformers_two_stage_deformable_detr(monkeypatch):
    monkeypatch.setattr(dino_model, "TEMPERATURE", 10000)
    theirs = transformers_deformable_detr()
    images, mask = torch.randn(2, 3, 128, 192), torch.zeros(2, 128, 192, dtype=torch.bool)
    mask[1, 64:], mask[1, :, 128:] = True, True
    maps, content, query_pos = [None] * 4, torch.randn(15, 32), torch.randn(15, 32)
    for i, projection in enumerate(theirs.model.input_proj):
        projection.register_forward_hook(lambda module, inputs, output, i=i: maps.__setitem__(i, output))
    replace = {
        "inputs_embeds": content.expand(2, -1, -1),
        "object_queries_position_embeddings": query_pos.expand(2, -1, -1),
    }
    theirs.model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | replace), with_kwargs=True
    )  # DINO's queries differ
    with torch.no_grad():
        expected = theirs(images, pixel_mask=(~mask).long())

    ours = DINO(
        FixedFeatures(maps, (8, 16, 32, 64)),
        num_classes=1,
        num_queries=15,
        hidden_dim=32,
        num_heads=4,
        ffn_dim=48,
        encoder_layers=2,
        decoder_layers=3,
        pyramid="own",
    ).eval()
    ours.load_state_dict(weights_for(ours, theirs))
    ours.content.weight.data, ours.query_pos, ours.norm = content, Constant(query_pos), torch.nn.Identity()
    with torch.no_grad():
        outputs = ours(images, mask)
        ours.train()
        trained = ours(images, mask)
    assert (outputs["pred_boxes"][0] - outputs["pred_boxes"][1]).abs().max() > 1e-2
    for found in (outputs, trained):
        assert (found["pred_logits"] - expected.logits).abs().max() < 1e-4
        assert (found["pred_boxes"] - expected.pred_boxes).abs().max() < 1e-4
    assert (trained["enc"]["pred_boxes"] - expected.init_reference_points).abs().max() < 1e-4
    first = trained["aux_outputs"][0]["pred_boxes"]
    assert (first - expected.intermediate_reference_points[:, 0]).abs().max() < 1e-4


class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def test_gradients_of_the_weighted_samples():
    torch.manual_seed(0)
    values, weights = (
        torch.randn(40, 2, 4, 5, dtype=torch.float64, requires_grad=True),
        torch.rand(40, 3, 6, dtype=torch.float64, requires_grad=True),
    )
    grid = (torch.rand(40, 3, 6, 2, dtype=torch.float64) * 2.4 - 1.2).requires_grad_()
    assert torch.autograd.gradcheck(WeightedSamples.apply, (values[:17], grid[:17], weights[:17]))
    found = WeightedSamples.apply(values, grid, weights)
    with torch.no_grad():
        assert torch.equal(weighted_samples(values, grid, weights), found)


def small_dino(maps=((2, 16, 12, 8), (2, 16, 6, 4)), strides=(8, 16), **more):
    torch.manual_seed(0)
    backbone = FixedFeatures([torch.randn(shape) for shape in maps], strides)
    return DINO(
        backbone,
        num_classes=3,
        num_queries=10,
        hidden_dim=16,
        num_heads=2,
        ffn_dim=32,
        encoder_layers=1,
        decoder_layers=3,
        pyramid="own",
        **more,
    )


def test_each_layers_loss_reaches_the_shift_before_it_and_no_further():
    """Look forward twice."""
    model = small_dino().train()
    outputs = model(torch.zeros(2, 3, 96, 64), torch.zeros(2, 96, 64, dtype=torch.bool))

    def reached(loss, head):
        return torch.autograd.grad(loss, head.layers[-1].bias, retain_graph=True, allow_unused=True)[0]

    last, middle, first = (model.box_heads[i] for i in (2, 1, 0))
    loss = outputs["pred_boxes"].sum()
    assert reached(loss, last).abs().sum() > 0 and reached(loss, middle).abs().sum() > 0
    assert reached(loss, first) is None


def test_noisy_copies_do_not_change_what_the_queries_find():
    model = small_dino().train()
    images, mask = torch.zeros(2, 3, 96, 64), torch.zeros(2, 96, 64, dtype=torch.bool)
    targets = [
        {"labels": torch.tensor([0, 2]), "boxes": torch.rand(2, 4) * 0.4 + 0.1},
        {"labels": torch.tensor([1]), "boxes": torch.rand(1, 4) * 0.4 + 0.1},
    ]
    alone, beside = model(images, mask), model(images, mask, targets)
    assert "denoising" in beside and "denoising" not in alone
    assert torch.allclose(alone["pred_boxes"], beside["pred_boxes"], atol=1e-6)
    assert torch.allclose(alone["pred_logits"], beside["pred_logits"], atol=1e-5)
    losses = SetCriterion(HungarianMatcher(class_cost=2), class_loss="focal")(beside, targets)
    assert {"loss_class", "loss_class_aux_1", "loss_class_enc", "loss_giou_dn", "loss_bbox_aux_0_dn"} <= losses.keys()
    assert all(torch.isfinite(value) for value in losses.values())


def test_focal_loss_by_its_definition():
    torch.manual_seed(0)
    logits, boxes = torch.randn(1, 4, 3), torch.rand(1, 4, 4) * 0.5 + 0.2
    targets = [{"labels": torch.tensor([2]), "boxes": boxes[0, 1:2]}]
    outputs = {"pred_logits": logits, "pred_boxes": boxes, "aux_outputs": []}
    loss = SetCriterion(HungarianMatcher(class_cost=0), class_loss="focal")(outputs, targets)["loss_class"]
    p, wanted = logits[0].sigmoid(), torch.zeros(4, 3)
    wanted[1, 2] = 1
    expected = -(0.25 * wanted * (1 - p) ** 2 * p.log() + 0.75 * (1 - wanted) * p**2 * (1 - p).log()).sum()
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_padding_does_not_change_what_is_found():
    """The second image, padded at the right and below to the first one's size, gives the boxes that it gives alone."""
    torch.manual_seed(0)
    model = small_dino().eval()
    maps = model.backbone.maps
    mask = torch.zeros(2, 96, 64, dtype=torch.bool)
    mask[1, 64:], mask[1, :, 48:] = True, True
    with torch.no_grad():
        for head in model.box_heads:
            torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
        padded = model(torch.zeros(2, 3, 96, 64), mask)
        model.backbone.maps = [maps[0][1:, :, :8, :6], maps[1][1:, :, :4, :3]]
        alone = model(torch.zeros(1, 3, 64, 48), torch.zeros(1, 64, 48, dtype=torch.bool))
    assert torch.allclose(padded["pred_boxes"][1], alone["pred_boxes"][0], atol=1e-5)


def test_a_level_that_reaches_over_the_picture_is_placed_rightly():
    mask = torch.zeros(1, 96, 96, dtype=torch.bool)
    cells = make_cells(mask, [(12, 12), (2, 2)], [8, 64], border_is_padding=True)
    centres, padding = cells.centres, cells.padding
    assert torch.allclose(cells.valid_ratios[0], torch.tensor([[1.0, 1.0], [0.75, 0.75]]))
    assert torch.allclose(centres[0, -4:, 0] * 96, torch.tensor([32.0, 96.0, 32.0, 96.0]))
    assert padding[0, -4:].tolist() == [False, True, True, True] and not padding[0, :-4].any()
    assert torch.allclose(cells.sizes[0, [0, -1]], torch.tensor([[8.0, 8.0], [64.0, 64.0]]) / 96)
