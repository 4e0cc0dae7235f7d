import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import distributed
from errors import UserError
from optim import build_optimizers, learning_rate_factor, update_ema
from resolve import resolve_settings
from runs import augmentation_phase
from settings import DEFAULTS, Settings, build_parser
from splits import Split, make_record
from train import count_pieces


def pictures(count, objects=40):
    record = make_record(0, Path("0.jpg"), (640, 480), [(10, 10, 90, 90, 0, 6400, False)] * objects)
    return Split("train", ["a", "b"], [1, 2], [record] * count, fingerprint="of these")


@pytest.mark.parametrize(
    "size, epochs, mixed, chance, whole, decay, backbone_lr",
    [
        ("s", 74, 36, 0.75, 72, 1e-4, 2.5e-5),
        ("m", 62, 30, 0.75, 60, 1e-4, 2.5e-5),
        ("l", 50, 24, 1.0, 48, 1.25e-4, 5e-6),
        ("x", 50, 24, 1.0, 48, 1.25e-4, 2.5e-6),
    ],
)
def test_the_ecdet_recipe_is_as_published_for_each_size(size, epochs, mixed, chance, whole, decay, backbone_lr, capsys):
    s = resolve_settings({"data": "coco", "recipe": "ecdet", "size": size}, pictures(118_287))
    wanted = dict(
        batch_size=32,
        epochs=epochs,
        lr=5e-4,
        backbone_lr=backbone_lr,
        optimizer="adamw",
        weight_decay=decay,
        clip=0.1,
        mosaic_chance=chance,
        augment="strong",
        image_size=640,
        square=True,
        ema_horizon=10000,
        num_queries=300,
        decoder_layers=4,
    )
    assert {key: getattr(s, key) for key in wanted} == wanted
    assert s.mosaic * epochs == pytest.approx(mixed, abs=0.01) and (1 - s.plain_end) * epochs == pytest.approx(
        whole, abs=0.01
    )
    assert s.warmup * epochs * 118_287 / 32 == pytest.approx(2000, rel=0.01)
    shares = [learning_rate_factor(progress, s) for progress in (0.1, 0.5, 0.75, 1.0)]
    assert shares == pytest.approx([1, 1, 0.75, 0.5])
    assert (
        resolve_settings(
            {"data": "coco", "recipe": "ecdet", "size": size, "mosaic": 0.2, "epochs": 7}, pictures(118_287)
        ).mosaic
        == 0.2
    )


def test_it_scales_itself_to_small_data_and_says_so(capsys):
    s = resolve_settings({"data": "mine", "detector": "ecdet", "epochs": 10}, pictures(800))
    assert s.batch_size == 8 and s.lr == pytest.approx(2.5e-4) and s.backbone_lr == pytest.approx(1.25e-5)
    assert s.warmup == 0.05 and s.plain_end == 0.1
    said = capsys.readouterr().out
    assert all(
        f"{key}=" in said for key in ("lr", "backbone_lr", "warmup", "plain_end", "mosaic", "size", "batch_size")
    )


def test_a_run_ends_with_whole_images(capsys):
    """At most two passes, which every recipe but the published ones has; an SSD sees whole images all along."""

    def end(**given):
        s = resolve_settings({"data": "mine", "backbone": "ecvit-nano", "epochs": 30} | given, pictures(800))
        return s.plain_end, s.plain_end_passes

    assert end() == end(detector="dino") == end(detector="ecdet") == end(recipe="default") == (0.15, 2.0)
    assert "plain_end=0.15, plain_end_passes=2.0" in capsys.readouterr().out
    assert end(plain_end=0.3) == (0.3, 0.0) and end(plain_end_passes=4.0) == (0.15, 4.0) and end(plain_end=0.0)[0] == 0
    assert end(recipe="meta") == end(recipe="dino") == (0.0, 0.0)
    assert end(detector="ssd") == (1.0, 0.0) and end(detector="ssd", augment="strong") == (0.15, 2.0)
    s = resolve_settings({"data": "mine", "backbone": "ecvit-nano", "detector": "ssd"}, pictures(800))
    assert {augmentation_phase(passes, passes / 30, s) for passes in range(30)} == {"plain"}


def test_from_random_weights_an_ecdet_takes_the_default_recipe():
    s = resolve_settings(
        {"data": "mine", "detector": "ecdet", "backbone_weights": "none", "image_size": 128}, pictures(800)
    )
    assert (s.optimizer, s.augment, s.schedule, s.square) == ("muon", "zoom", "linear", False) and s.size == "s"
    assert (
        resolve_settings(
            {"data": "mine", "detector": "ecdet", "backbone": "dinov3-vits16", "image_size": 128}, pictures(800)
        ).size
        == "m"
    )


def test_the_published_detr_keeps_its_learning_rate_from_random_weights():
    s = resolve_settings({"data": "mine", "recipe": "meta", "backbone_weights": "none"}, pictures(800))
    assert (s.lr, s.backbone_lr, s.optimizer, s.plain_passes) == (1e-4, 1e-4, "adamw", 0)
    s = resolve_settings({"data": "mine", "backbone_weights": "none", "lr": 3e-4, "image_size": 128}, pictures(800))
    assert (s.lr, s.backbone_lr) == (3e-4, 3e-4)


def test_the_published_detr_takes_16_images_a_step_two_at_a_time_on_a_device(monkeypatch):
    s = resolve_settings({"data": "mine", "recipe": "meta", "backbone_weights": "none"}, pictures(800))
    assert (s.batch_size, s.device_batch, s.accumulate) == (16, 2, 1)
    for world in (1, 2, 4, 8, 16):
        monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
        pieces = count_pieces(s)
        assert 16 // world // pieces * pieces * world == 16 and 16 // world // pieces <= 2, world
    with pytest.raises(UserError, match="can't be shared by 3 processes"):
        monkeypatch.setattr(distributed, "world_size", lambda: 3)
        count_pieces(s)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    assert count_pieces(replace(s, batch_size=9)) == 9
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert count_pieces(replace(s, batch_size=12, device_batch=None)) == 1
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    model.backbone = torch.nn.LayerNorm(2)

    def decays(s):
        return {group["weight_decay"] for group in build_optimizers(model, s)[0].param_groups}

    assert decays(s) == {1e-4} and decays(replace(s, decay_all=False)) == {1e-4, 0.0}


@pytest.mark.parametrize("steps", [300, 1_000, 10_000, 20_000, 273_000])
@pytest.mark.parametrize("horizon", [None, 10_000])
def test_the_average_looks_back_over_a_small_part_of_any_budget(steps, horizon):
    """The mean age of what is in it at the end, as a fraction of the run.

    EdgeCrafter's 10,000 steps are 3.7 % of COCO's 273,000.
    """
    average, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for step in range(steps):
        with torch.no_grad():
            model.weight.fill_(step)
        if step % 997 == 0 or step > steps - 3:
            update_ema(average, model, step, horizon)
        else:  # the same a thousand times faster
            weight = max(min(1.0, 12 / (step + 12)), 1 / (horizon or 10**9))
            average.weight.data.mul_(1 - weight).add_(step * weight)
    age = (steps - float(average.weight.detach())) / steps
    assert (0.03 if horizon and steps > 200_000 else 0.06) < age < 0.09, age


def test_the_average_does_not_depend_on_how_the_budget_is_given():
    given = {"data": "mine", "recipe": "ecdet", "image_size": 128}
    of = [
        resolve_settings(given | budget, pictures(800)).ema_horizon
        for budget in ({"minutes": 5}, {"steps": 300}, {"epochs": 3})
    ]
    assert of == [10_000] * 3


def test_the_dino_recipe_is_as_published():
    s = resolve_settings(
        {"data": "coco", "recipe": "dino", "backbone": "dinov2-base", "patch_size": 16}, pictures(118_287)
    )
    wanted = dict(
        detector="dino",
        num_queries=900,
        encoder_layers=6,
        decoder_layers=6,
        hidden_dim=256,
        ffn_dim=2048,
        num_denoising=100,
        scales=4,
        batch_size=16,
        epochs=12,
        lr=1e-4,
        backbone_lr=1e-5,
        optimizer="adamw",
        clip=0.1,
        patch_size=16,
    )
    assert {key: getattr(s, key) for key in wanted} == wanted
    assert [learning_rate_factor(progress, s) for progress in (0.0, 0.9, 0.92)] == [1.0, 1.0, 0.1]
    assert resolve_settings({"data": "mine", "detector": "dino", "image_size": 320}, pictures(800)).num_queries == 900


def test_an_option_of_the_architecture_is_refused_beside_a_checkpoint():
    initial = dict(
        detector="dino",
        backbone="dinov2-base",
        patch_size=16,
        layers="5,11",
        hidden_dim=256,
        image_size=320,
        num_queries=900,
    )
    given = {"data": "mine", "init": "best.pth", "patch_size": 16, "layers": "5,11"}
    assert resolve_settings(dict(given), pictures(800), initial).layers == "5,11"
    for option in ({"layers": "11"}, {"pyramid": "own"}, {"patch_size": 14}, {"backbone_weights": "none"}):
        with pytest.raises(UserError, match="leave it out"):
            resolve_settings(given | option, pictures(800), initial)
    with pytest.raises(
        UserError, match="--attention local: .*leave it out"
    ):  # the weights are of one kind; how queries are chosen is not weights
        resolve_settings(
            {"data": "mine", "init": "best.pth", "attention": "local"},
            pictures(800),
            OF_INIT | {"attention": "global", "distinct": 0.0},
        )
    s = resolve_settings(
        {"data": "mine", "init": "best.pth"}, pictures(800), OF_INIT | {"attention": "global", "distinct": 0.0}
    )
    assert (s.attention, s.num_denoising, s.distinct) == ("global", 0, DEFAULTS["distinct"])
    with pytest.raises(UserError, match="--distinct has to be an IoU"):
        resolve_settings({"data": "mine", "distinct": 1.5}, pictures(800))


@pytest.mark.parametrize(
    "classes, flip",
    [
        (["cat", "dog"], "horizontal"),
        (["left hand", "right hand"], "none"),
        (["turn-Right", "turn-Left", "stop"], "none"),
        (["left", "up"], "horizontal"),
        (list("ABCDEFGHIJ"), "none"),
        (list("0123456789"), "horizontal"),  # classes that have no names are called by their numbers
        (["a", "b"], "horizontal"),
    ],
)
def test_what_is_mirrored_depends_on_the_classes(classes, flip):
    train = pictures(800)
    train.classes = classes
    assert resolve_settings({"data": "mine"}, train).flip == flip
    assert resolve_settings({"data": "mine", "flip": "both"}, train).flip == "both"
    assert Settings.from_config({"detector": "detr"}).flip == "horizontal"  # as in runs of before


# What an option needs so that it isn't ignored: what it is given as, and settings with which it would be.
# None: it always counts.
NEEDS = {
    "val_fraction": (0.3, {}),
    "size": ("s", {"detector": "detr"}),
    "scales": (4, {"detector": "detr"}),
    "decoder_layers": (2, {"detector": "ssd"}),
    "patch_resize": ("pinv", {"backbone": "dinov2-small"}),
    "layers": ("2", {"backbone": "ecvitt"}),
    "patch_size": (16, {"backbone": "ecvitt"}),
    "pyramid": ("own", {"init": "x"}),
    "optimizer": ("muon", {"init": "x"}),
    "backbone": ("ecvits", {"init": "x"}),
    "backbone_weights": ("none", {"init": "x"}),
    "detector": ("ssd", {"init": "x"}),
    "encoder_layers": (1, {"detector": "detr"}),
    "dropout": (0.1, {"detector": "ssd"}),
    "hidden_dim": (64, {"detector": "ecdet"}),
    "num_heads": (4, {"detector": "ssd"}),
    "ffn_dim": (64, {"detector": "ssd"}),
    "lr_drop": (0.5, {}),
    "ema_horizon": (9, {"ema": False}),
    "mosaic_chance": (0.5, {}),
    "attention": ("global", {"detector": "dino"}),
    "distinct": (0.5, {"detector": "ecdet"}),
    "num_denoising": (20, {"detector": "ecdet"}),
    "backbone_lr": (1e-5, {"freeze_backbone": "all"}),
    "layer_decay": (0.8, {"freeze_backbone": "all"}),
    "shard": (True, {}),
}
ALWAYS = {
    "data",
    "layout",
    "train_split",
    "val_split",
    "image_size",
    "augment",
    "mosaic",
    "square",
    "color_jitter",
    "rotate",
    "flip",
    "workers",
    "plain_passes",
    "plain_end",
    "plain_end_passes",
    "schedule",
    "warmup",
    "warmup_steps",
    "decay_all",
    "exact_sides",
    "skip_bad_images",
    "allow_outside",
    "large_images",
    "recipe",
    "init",
    "freeze_backbone",
    "checkpoint_activations",
    "num_queries",
    "epochs",
    "steps",
    "minutes",
    "batch_size",
    "accumulate",
    "device_batch",
    "lr",
    "weight_decay",
    "clip",
    "ema",
    "precision",
    "seed",
    "out",
    "eval_every",
    "save_every",
    "keep_every",
    "patience",
    "tensorboard",
    "wandb",
    "mlflow",
    "classes",
    "single_class",
    "tile",
    "offline",
    "resume",
}
SEEN_LATER = {"layers", "patch_size", "shard"}  # when the backbone is built, when processes are counted; tested there
OF_INIT = dict(
    detector="detr",
    backbone="ecvit-nano",
    hidden_dim=128,
    num_heads=4,
    ffn_dim=512,
    decoder_layers=2,
    image_size=224,
    num_queries=300,
)


def test_every_option_is_known_to_count_or_to_need_another():
    options = {action.dest for action in build_parser("")._actions} - {"help", "version"}
    assert options == NEEDS.keys() | ALWAYS and not NEEDS.keys() & ALWAYS


@pytest.mark.parametrize("option", sorted(NEEDS.keys() - SEEN_LATER))
def test_an_option_that_would_be_ignored_is_refused(option):
    value, beside = NEEDS[option]
    given = {"data": "mine", "image_size": 128} | beside
    train = pictures(800)
    initial = OF_INIT if "init" in beside else None
    resolve_settings(given, train, initial)  # sound without it
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} {value}"):
        resolve_settings(given | {option: value}, train, initial)


@pytest.mark.parametrize("option", sorted(ALWAYS - {"resume", "offline", "recipe"}))
def test_an_option_that_is_given_is_in_the_settings(option):
    value = {
        "data": "x",
        "augment": "meta",
        "square": True,
        "ema": False,
        "init": "x",
        "freeze_backbone": "all",
        "out": "y",
        "precision": "float32",
        "schedule": "step",
        "warmup": 0.5,
        "plain_end": 0.5,
        "decay_all": True,
        "exact_sides": False,
        "tile": 640,
    }.get(option, 1)
    s = resolve_settings(
        {"data": "mine", "image_size": 128} | {option: value}, pictures(800), OF_INIT if option == "init" else None
    )
    assert getattr(s, option) == value
    json.dumps(vars(s), allow_nan=False)  # a run's config.json is JSON, also as other languages read it


@pytest.mark.parametrize(
    "given, warmup, plain_end",
    [
        ({"warmup_steps": 100, "steps": 5000}, 0.02, 0.15),
        ({"warmup_steps": 500, "minutes": 60}, 0.03, 0.15),
        ({"warmup_steps": 5000, "steps": 10_000, "warmup": 0.1}, 0.1, 0.15),
        ({"warmup_steps": 100, "steps": 10_000, "warmup": 0.1}, 0.01, 0.15),
        ({"detector": "ssd", "warmup_steps": 100, "steps": 5000}, 0.02, 1.0),
        ({"recipe": "meta", "warmup_steps": 500, "steps": 12_500}, 0.04, 0.0),
        ({"recipe": "ecdet", "size": "s", "warmup": 0.2, "steps": 1000}, 0.2, 0.1),
        ({"recipe": "ecdet", "size": "s", "warmup": 0.0, "steps": 1000}, 0.0, 0.1),
        ({"recipe": "ecdet", "size": "s", "steps": 1000}, 0.05, 0.1),
    ],
)
def test_warmup_steps_limit_the_warmup_and_nothing_else(given, warmup, plain_end):
    s = resolve_settings({"data": "mine"} | given, pictures(800))
    assert (s.warmup, s.plain_end) == (warmup, plain_end)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"detector": "dino", "encoder_layers": 0}, "--encoder-layers 0: has to be in 1 .. 100"),
        ({"hidden_dim": 100}, "--hidden-dim 100: has to be a multiple of 8"),
        ({"hidden_dim": 128, "num_heads": 3}, "--num-heads 3: has to divide --hidden-dim, 128"),
        ({"lr": -1.0}, "--lr -1.0: has to be 0 or more"),
        ({"tile": 20_000}, "--tile 20000: has to be in 32 .. 10,000 pixels"),
        ({"image_size": 20_000}, "--image-size 20000: has to be in 1 .. 10,000"),
    ],
)
def test_settings_that_no_network_or_checkpoint_could_have_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        resolve_settings({"data": "mine"} | given, pictures(800))


def test_a_narrow_ssd_has_a_head_and_mosaics_wait_where_that_is_asked():
    assert resolve_settings({"data": "mine", "detector": "ssd", "hidden_dim": 16}, pictures(800)).num_heads == 1
    assert resolve_settings({"data": "mine", "detector": "ssd", "hidden_dim": 100}, pictures(800)).hidden_dim == 100
    assert resolve_settings({"data": "mine", "mosaic": 0.4, "plain_passes": 8}, pictures(800)).plain_passes == 8


def test_a_checkpoint_decides_how_many_queries_only_where_they_are_weights(capsys):
    free = resolve_settings(
        {"data": "mine", "init": "x", "image_size": 128}, pictures(800), OF_INIT | {"num_queries": 60}
    )
    assert free.num_queries == 300  # the data's most is 40 objects
    for detector, wanted in (("ecdet", 900), ("ssd", 900)):
        initial = OF_INIT | {"num_queries": 900, "detector": detector, "size": "nano"}
        assert (
            resolve_settings({"data": "mine", "init": "x", "image_size": 128}, pictures(800), initial).num_queries
            == wanted
        )
    crowded = pictures(800, 450)
    assert (
        resolve_settings({"data": "mine", "recipe": "ecdet", "size": "s", "image_size": 128}, crowded).num_queries
        == 900
    )
    assert resolve_settings({"data": "mine", "image_size": 128, "mosaic": 0.5}, pictures(800)).plain_passes == 0
    more = resolve_settings(
        {"data": "mine", "init": "x", "image_size": 128}, pictures(800), OF_INIT | {"num_queries": 900}
    )
    assert more.num_queries == 900
    for detector in ("dino", "detr-2020"):
        initial = OF_INIT | {"detector": detector, "num_queries": 60}
        assert (
            resolve_settings({"data": "mine", "init": "x", "image_size": 128}, pictures(800), initial).num_queries == 60
        )
        with pytest.raises(UserError, match="--num-queries 90: the architecture"):
            resolve_settings({"data": "mine", "init": "x", "num_queries": 90}, pictures(800), initial)
