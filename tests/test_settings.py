from types import SimpleNamespace

import pytest
import torch

from errors import UserError
from settings import settle
from train import learning_rate_factor, update_average


def pictures(count):
    record = SimpleNamespace(width=640, height=480, boxes=[(10, 10, 90, 90)])
    return SimpleNamespace(records=[record] * count, most_objects=40, classes=["a", "b"])


def test_the_ecdet_recipe_is_as_published_where_the_data_is_as_large(capsys):
    s = settle({"data": "coco", "recipe": "ecdet", "size": "s"}, pictures(118_287))
    wanted = dict(backbone="ecvitt", batch_size=32, epochs=74, lr=5e-4, backbone_lr=2.5e-5, optimizer="adamw", weight_decay=1e-4, clip=0.1,
                  augment="strong", mosaic=0.5, image_size=640, square=True, ema_horizon=10000, num_queries=300, decoder_layers=4)  # fmt: skip
    assert {key: s[key] for key in wanted} == wanted
    assert s["warmup"] * 74 * 118_287 / 32 == pytest.approx(2000, rel=0.01) and s["plain_end"] == pytest.approx(2 / 74)
    assert settle({"data": "coco", "recipe": "ecdet", "size": "x"}, pictures(118_287))["backbone_lr"] == 2.5e-6
    shares = [learning_rate_factor(progress, s) for progress in (0.1, 0.5, 0.75, 1.0)]
    assert shares == pytest.approx([1, 1, 0.75, 0.5])


def test_it_scales_itself_to_small_data_and_says_so(capsys):
    s = settle({"data": "mine", "detector": "ecdet", "epochs": 10}, pictures(800))
    assert s["batch_size"] == 8 and s["lr"] == pytest.approx(2.5e-4) and s["backbone_lr"] == pytest.approx(1.25e-5)
    assert s["warmup"] == 0.05 and s["plain_end"] == 0.1 and s["ema_horizon"] == 83
    said = capsys.readouterr().out
    assert all(f"{key}=" in said for key in ("lr", "backbone_lr", "warmup", "plain_end", "ema_horizon", "size", "batch_size"))


def test_from_random_weights_an_ecdet_takes_the_default_recipe():
    s = settle({"data": "mine", "detector": "ecdet", "backbone_weights": "none", "image_size": 128}, pictures(800))
    assert (s["optimizer"], s["augment"], s["schedule"], s["square"]) == ("muon", "zoom", "linear", False) and s["size"] == "s"
    assert settle({"data": "mine", "detector": "ecdet", "backbone": "dinov3-vits16", "image_size": 128}, pictures(800))["size"] == "m"


def test_the_published_detr_keeps_its_learning_rate_from_random_weights():
    s = settle({"data": "mine", "recipe": "meta", "backbone_weights": "none"}, pictures(800))
    assert (s["lr"], s["backbone_lr"], s["optimizer"], s["plain_passes"]) == (1e-4, 1e-4, "adamw", 0)
    s = settle({"data": "mine", "backbone_weights": "none", "lr": 3e-4, "image_size": 128}, pictures(800))
    assert (s["lr"], s["backbone_lr"]) == (3e-4, 3e-4)


def test_the_average_ramps_up_to_its_horizon():
    weights = []
    for step in (0, 1000, 100_000):
        ours, theirs = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(ours.weight), torch.nn.init.ones_(theirs.weight)
        update_average(ours, theirs, step, 10_000)
        weights.append(float(ours.weight.detach()))
    assert weights == pytest.approx([1.0, 1 - 0.9999 * (1 - 2.718281828**-1), 1e-4], rel=1e-3)


def test_the_dino_recipe_is_as_published():
    s = settle({"data": "coco", "recipe": "dino", "backbone": "dinov2-base", "patch_size": 16}, pictures(118_287))
    wanted = dict(detector="dino", num_queries=900, encoder_layers=6, decoder_layers=6, hidden_dim=256, ffn_dim=2048, copies=100, scales=4, batch_size=16,
                  epochs=12, lr=1e-4, backbone_lr=1e-5, optimizer="adamw", clip=0.1, patch_size=16)  # fmt: skip
    assert {key: s[key] for key in wanted} == wanted
    assert [learning_rate_factor(progress, s) for progress in (0.0, 0.9, 0.92)] == [1.0, 1.0, 0.1]
    assert settle({"data": "mine", "detector": "dino", "image_size": 320}, pictures(800))["num_queries"] == 900


def test_an_option_of_the_architecture_is_refused_beside_a_checkpoint():
    initial = dict(detector="dino", backbone="dinov2-base", patch_size=16, layers="5,11", hidden_dim=256, image_size=320, num_queries=900)
    given = {"data": "mine", "init": "best.pth", "patch_size": 16, "layers": "5,11"}
    assert settle(dict(given), pictures(800), initial)["layers"] == "5,11"
    for option in ({"layers": "11"}, {"pyramid": "own"}, {"patch_size": 14}, {"backbone_weights": "none"}):
        with pytest.raises(UserError, match="leave it out"):
            settle(given | option, pictures(800), initial)
