"""What a run decides, a resumed and a fine-tuned run decide too: settings say it, not how an object was built."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, interrupted_at, same_weights, tiny_config
from test_commands import called
from test_matrix import FAMILIES, tiny_backbones  # noqa: F401 - a fixture

import runs
import train
from backbones import build_backbone
from checkpoint import copy_classes, read_checkpoint, start_from
from detr_model import DETECTORS, build_model
from errors import UserError
from optim import build_optimizers
from settings import DEFAULTS, Settings

TINY = ["--backbone", "ecvit-nano", "--image-size", 48, "--batch-size", 4, "--num-queries", 10, "--workers", 0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of pretrained weights, batch statistics included."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    backbone = build_backbone("ecvit-nano").train()
    backbone(torch.randn(4, 3, 64, 64))
    torch.save(backbone.state_dict(), path)
    return path


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_run_from_pretrained_weights_is_resumed_to_the_bit(
    detector, weights, tiny_data, tmp_path, monkeypatch, capsys
):
    """Stopped while the backbone is frozen, and again after; under the recipe that pretrained weights get."""
    arguments = [
        "--data",
        tiny_data,
        *TINY,
        "--detector",
        detector,
        "--backbone-weights",
        weights,
        "--steps",
        8,
        "--freeze-backbone",
        1,
        "--eval-every",
        99,
    ]
    status, _, error = called(train.main, [*arguments, "--out", tmp_path / "whole"], monkeypatch, capsys)
    assert status == 0, error
    with monkeypatch.context() as patch:
        interrupted_at({1, 4}, patch)
        for resumption in range(3):
            given = ["--resume", tmp_path / "parts"] if resumption else [*arguments, "--out", tmp_path / "parts"]
            status, out, error = called(train.main, given, monkeypatch, capsys)
            assert status == (130 if resumption < 2 else 0), error
            assert 0 < torch.load(tmp_path / "parts" / "last.pth", weights_only=True)["training"]["step"] <= 8
    same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_run_of_before_local_attention_goes_on_as_it_was(tiny_data, tmp_path, monkeypatch, capsys):
    """Its settings know neither of attention nor of doubles.

    Fine-tuned, it keeps its attention, and its queries are kept apart.
    """
    run, arguments = (
        tmp_path / "parts",
        [
            "--data",
            tiny_data,
            *TINY,
            "--attention",
            "global",
            "--distinct",
            0,
            "--num-denoising",
            0,
            "--steps",
            6,
            "--eval-every",
            99,
        ],
    )
    status, _, error = called(train.main, [*arguments, "--out", tmp_path / "whole"], monkeypatch, capsys)
    assert status == 0, error
    with monkeypatch.context() as patch:
        interrupted_at({2}, patch)
        status, _, error = called(train.main, [*arguments, "--out", run], monkeypatch, capsys)
    assert status == 130, error
    saved = torch.load(run / "last.pth", weights_only=True)
    assert (saved["config"].pop("attention"), saved["config"].pop("distinct")) == ("global", 0.0)
    saved["config"]["num_denoising"] = DEFAULTS["num_denoising"]  # a setting that only DINO read
    torch.save(saved, run / "last.pth")
    status, _, error = called(train.main, ["--resume", run], monkeypatch, capsys)
    assert status == 0, error
    same_weights(tmp_path / "whole", run)
    status, _, error = called(
        train.main,
        ["--data", tiny_data, "--init", run / "best.pth", "--steps", 1, "--out", tmp_path / "tuned"],
        monkeypatch,
        capsys,
    )
    assert status == 0, error
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert (config["attention"], config["distinct"]) == ("global", DEFAULTS["distinct"])


def test_norms_that_came_with_weights_stay_frozen_however_the_model_is_built(weights):
    config = DEFAULTS | dict(
        detector="detr",
        backbone="ecvit-nano",
        num_classes=2,
        num_queries=10,
        hidden_dim=32,
        num_heads=2,
        ffn_dim=32,
        decoder_layers=1,
    )
    for settings, frozen in (
        ({"backbone_weights": str(weights)}, True),
        ({"backbone_weights": "none"}, False),
        ({"backbone_weights": "none", "init": "best.pth"}, True),
    ):
        for load_weights in (True, False):
            model = build_model(config | settings, load_weights)[0].train()
            assert model.backbone.backbone.patch_embed.convs[0].norm.training != frozen, (settings, load_weights)
            assert model.backbone.projector[0].norm.training  # the release has none of its own


def test_a_failure_before_the_first_step_can_be_resumed(tiny_data, tmp_path, monkeypatch, capsys):
    arguments = ["--data", tiny_data, *TINY, "--steps", 4, "--eval-every", 99]
    status, _, error = called(train.main, [*arguments, "--out", tmp_path / "whole"], monkeypatch, capsys)
    assert status == 0, error
    with monkeypatch.context() as patch:
        patch.setattr(train, "collate", lambda *_, **__: (_ for _ in ()).throw(OSError("the disk is gone")))
        status, _, error = called(train.main, [*arguments, "--out", tmp_path / "run"], monkeypatch, capsys)
    assert status == 2 and "the disk is gone; what was learnt is saved, go on with --resume" in error
    assert read_checkpoint(tmp_path / "run" / "last.pth")["training"]["step"] == 0
    status, _, error = called(train.main, ["--resume", tmp_path / "run"], monkeypatch, capsys)
    assert status == 0, error
    same_weights(tmp_path / "whole", tmp_path / "run")


def test_an_evaluation_that_failed_at_the_end_is_made_after_a_resume(tiny_data, tmp_path, monkeypatch, capsys):
    arguments = ["--data", tiny_data, *TINY, "--steps", 4, "--eval-every", 99]
    status, _, error = called(train.main, [*arguments, "--out", tmp_path / "whole"], monkeypatch, capsys)
    assert status == 0, error

    def fail(*_):
        raise UserError("an image is gone")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", fail)
        status, _, error = called(train.main, [*arguments, "--out", tmp_path / "run"], monkeypatch, capsys)
    assert status == 2 and not (tmp_path / "run" / "best.pth").exists()
    status, out, error = called(train.main, ["--resume", tmp_path / "run"], monkeypatch, capsys)
    assert status == 0 and "best AP -inf" not in out, error
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("whole", "run")]
    assert [[row | {"minutes": 0} for row in rows] for rows in logs][0] == [r | {"minutes": 0} for r in logs[1]]
    best = [read_checkpoint(tmp_path / name / "best.pth") for name in ("whole", "run")]
    assert best[0]["figures"] == best[1]["figures"] and best[0]["thresholds"] == best[1]["thresholds"]
    assert all(torch.equal(value, best[1]["model"][key]) for key, value in best[0]["model"].items())


def test_what_weights_do_not_hold_is_trained_though_the_backbone_is_frozen(tiny_data, tmp_path, monkeypatch, capsys):
    """The released ECViTs are transformers alone: the 1x1 convolutions of their pyramid are random."""
    backbone = build_backbone("ecvitt")
    torch.save(backbone.backbone.state_dict(), tmp_path / "trunk.pth")
    arguments = ["--data", tiny_data, "--backbone", "ecvitt", "--backbone-weights", tmp_path / "trunk.pth"]
    arguments += ["--detector", "ssd", *TINY[2:], "--freeze-backbone", "all", "--eval-every", 99, "--no-ema"]
    for name, steps in (("whole", 4), ("run", 4)):
        with monkeypatch.context() as patch:
            if name == "run":
                interrupted_at({2}, patch)
            out = tmp_path / name
            status, _, error = called(train.main, [*arguments, "--steps", steps, "--out", out], monkeypatch, capsys)
            assert status == (130 if name == "run" else 0), error
    status, _, error = called(train.main, ["--resume", tmp_path / "run"], monkeypatch, capsys)
    assert status == 0, error
    same_weights(tmp_path / "whole", tmp_path / "run")
    content = read_checkpoint(tmp_path / "run" / "last.pth")
    trunk = {key: value for key, value in content["model"].items() if key.startswith("backbone.backbone.")}
    assert all(torch.equal(v, backbone.state_dict()[k.removeprefix("backbone.")]) for k, v in trunk.items())
    norm = next(value for key, value in content["model"].items() if key.endswith("norm.running_mean"))
    projector = {key: value for key, value in content["model"].items() if key.startswith("backbone.projector.")}
    assert any(key.endswith("running_mean") and value.abs().sum() > 0 for key, value in projector.items()), norm
    assert content["config"]["random_parts"] == ["projector", "skip"]
    model = build_model(content["config"], load_weights=False)[0]
    groups = build_optimizers(model, Settings.from_config(content["config"]))
    rates = {id(p): group["lr"] for optimizer in groups for group in optimizer.param_groups for p in group["params"]}
    lr = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert (
        lr["backbone.projector.0.norm.weight"]
        == content["config"]["lr"]
        > lr["backbone.backbone.blocks.0.norm1.weight"]
    )


def test_a_new_run_is_told_to_train_on_the_same_data(tiny_data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    options = ["--single-class", "--tile", 48, "--flip", "none"]
    arguments = ["--data", tiny_data, *TINY[:2], *TINY[4:], *options, "--steps", 2, "--out", out]
    status, _, error = called(train.main, arguments, monkeypatch, capsys)
    assert status == 0, error
    status, said, error = called(train.main, ["--resume", out], monkeypatch, capsys)
    command = next(line for line in said.splitlines() if "--init" in line)
    assert all(" ".join(map(str, words)) in command for words in (options[:1], options[1:3], options[3:]))
    words = command.split()[2:]
    status, said, error = called(train.main, [*words, "--workers", 0, "--out", tmp_path / "more"], monkeypatch, capsys)
    assert status == 0, error


def test_the_report_is_drawn_after_a_resume_too(tiny_data, tmp_path, monkeypatch, capsys):
    """Of the best epoch, which was before the interruption."""
    real, calls = runs.evaluate, []

    def falling(*arguments, **options):
        figures, *rest = real(*arguments, **options)
        calls.append(figures and figures.update(AP=1.0 - 0.1 * len(calls)))
        return figures, *rest

    monkeypatch.setattr(runs, "evaluate", falling)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupted_at({5}, patch)
        status, _, error = called(
            train.main, ["--data", tiny_data, *TINY, "--steps", 9, "--eval-every", 1, "--out", run], monkeypatch, capsys
        )
    assert status == 130 and not (run / "confusion.png").exists(), error
    status, _, error = called(train.main, ["--resume", run], monkeypatch, capsys)
    assert status == 0, error
    assert (run / "precision_recall.png").exists() and (run / "confusion.png").exists()
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert rows[0]["AP"] == max(row["AP"] for row in rows) and read_checkpoint(run / "best.pth")["figures"]["AP"] == 1.0


def test_last_pth_knows_of_every_best_pth(tiny_data, tmp_path, monkeypatch, capsys):
    """A run that is killed after its best epoch must not take a worse one for the best when it goes on."""
    written, keep = [], runs.save_checkpoint
    monkeypatch.setattr(
        runs,
        "save_checkpoint",
        lambda path, content: (
            written.append(
                (path.name, content.get("training", {}).get("best_ap"), content.get("figures", {}).get("AP"))
            ),
            keep(path, content),
        ),
    )
    status, _, error = called(
        train.main,
        ["--data", tiny_data, *TINY, "--steps", 9, "--eval-every", 1, "--out", tmp_path / "run"],
        monkeypatch,
        capsys,
    )
    assert status == 0, error
    best = [(i, figure) for i, (name, _, figure) in enumerate(written) if name == "best.pth"]
    assert written[-1][0] == "best.pth"  # with its thresholds, at the end
    assert best[:-1] and all(written[i + 1][:2] == ("last.pth", figure) for i, figure in best[:-1])


def test_last_pth_is_written_by_the_clock_and_at_the_end(tiny_data, tmp_path, monkeypatch, capsys):
    written, keep = [], runs.save_checkpoint
    monkeypatch.setattr(
        runs,
        "save_checkpoint",
        lambda path, content: (
            written.append((path.name, content.get("training", {}).get("step"))),
            keep(path, content),
        ),
    )
    for seconds, steps in (("60", {1, 8}), ("0", set(range(1, 9)))):
        written.clear()
        status, _, error = called(
            train.main,
            [
                "--data",
                tiny_data,
                *TINY,
                "--steps",
                8,
                "--eval-every",
                99,
                "--save-every",
                seconds,
                "--out",
                tmp_path / seconds,
            ],
            monkeypatch,
            capsys,
        )
        assert status == 0, error
        assert {step for name, step in written if name == "last.pth"} == steps


# Signals, and faults of the code

AT_SHUTDOWN = """
import os, signal, sys
class Late:  # its end comes when the interpreter has given up its own handlers
    def __del__(self, kill=os.kill, say=os.write, pid=os.getpid(), numbers=(signal.SIGTERM, signal.SIGINT)):
        say(2, b"signals now")
        for number in numbers:
            kill(pid, number)
late = Late()
sys.argv = ["train.py", *sys.argv[1:]]
import train
train.run_script(train.main)
"""


@pytest.mark.parametrize("stopped, status", [(False, 0), (True, 130)])
def test_a_signal_after_the_end_changes_nothing(stopped, status, tiny_data, tmp_path):
    arguments = ["--data", tiny_data, *TINY, "--steps", 2, "--out", tmp_path / "run"]
    code = (
        AT_SHUTDOWN
        if not stopped
        else AT_SHUTDOWN.replace(
            "import train\n",
            "import train\nreal = train.collate\n"
            "train.collate = lambda *a, **k: (os.kill(os.getpid(), signal.SIGINT), real(*a, **k))[1]\n",
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "signals now" in done.stderr and done.returncode == status, (done.returncode, done.stderr)
    assert read_checkpoint(tmp_path / "run" / "last.pth")["training"]["step"] == (1 if stopped else 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_the_code_keeps_its_traceback(workers, tiny_data, tmp_path, monkeypatch, capsys):
    def broken(self, indices):
        return (
            [self[index] for index in indices] if getattr(indices[0], "seed", 1) % 3 else torch.ones(2) @ torch.ones(3)
        )

    monkeypatch.setattr(train.DetectionDataset, "__getitems__", broken)
    with pytest.raises(RuntimeError, match="inconsistent tensor size|size mismatch") as caught:
        arguments = ["--data", tiny_data, *TINY[:-1], workers, "--steps", 30, "--out", tmp_path / "run"]
        pytest.fail(f"it ended with {called(train.main, arguments, monkeypatch, capsys)}")
    assert workers == 0 or "in broken" in str(caught.value)  # the worker's own lines
    assert (tmp_path / "run" / "last.pth").exists()


def test_nothing_is_said_to_be_saved_that_was_not(tmp_path):
    def loader(error):
        yield 1
        raise error

    run = object.__new__(runs.Run)
    run.can_save_alone, run.folder = False, tmp_path
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    for error, cause in ((OSError("stale"), "stale"), (killed, "was killed, perhaps because memory ran out")):
        with pytest.raises(UserError, match=f"{cause}.*; nothing was saved yet"):
            list(run.loading(loader(error)))
    (tmp_path / "last.pth").write_text("")
    with pytest.raises(UserError, match="go on with --resume"):
        list(run.loading(loader(OSError("stale"))))


# Fine-tuning to other classes


def checkpoint_of(detector, backbone, classes):
    torch.manual_seed(1)
    config = tiny_config(detector, backbone)
    model = build_model(config | {"num_classes": len(classes)})[0]
    with torch.no_grad():
        for value in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            value.add_(0.1 * torch.rand_like(value))
    return (
        config,
        {"model": model.state_dict(), "config": config, "classes": classes, "category_ids": list(range(len(classes)))},
        model,
    )


@pytest.mark.parametrize(
    "detector, family",
    [*((detector, "ecvit") for detector in DETECTORS), *(("detr", family) for family in FAMILIES if family != "ecvit")],
)
def test_every_weight_but_the_rows_of_new_classes_is_the_checkpoints(detector, family, capsys):
    old, new = ["cat", "dog", "emu"], ["emu", "axolotl", "cat", "bee"]
    config, content, before = checkpoint_of(detector, f"tiny-{family}", old)
    torch.manual_seed(2)
    model = build_model(config | {"num_classes": 4})[0]
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    start_from(model, content, new, "best.pth")
    layers = tuple(f"{name}." for name in model.class_layers())
    per_class = [key for key in fresh if key.startswith(layers)]
    assert per_class and not [key for key in per_class if key.startswith("backbone.")]
    for key, value in model.state_dict().items():
        theirs = content["model"][key]
        if key not in per_class:
            assert torch.equal(value, theirs), key
            continue
        first = 1 if detector == "ssd" else 0
        groups = model.boxes.num_anchors_per_location()[int(key.split(".")[3])] if detector == "ssd" else 1
        ours, theirs, made = (rows.unflatten(0, (groups, -1)) for rows in (value, theirs, fresh[key]))
        assert torch.equal(ours[:, :first], theirs[:, :first]) and torch.equal(
            ours[:, first + 4 :], theirs[:, first + 3 :]
        )  # background, "no object"
        for label, name in enumerate(new):
            wanted = theirs[:, first + old.index(name)] if name in old else made[:, first + label]
            assert torch.equal(ours[:, first + label], wanted), (key, name)
    assert "kept by name: emu, cat; newly initialised: axolotl, bee" in capsys.readouterr().out


@pytest.mark.parametrize("detector", DETECTORS)
def test_fine_tuning_detects_the_classes_that_it_knows_as_before(detector, capsys):
    """The rows are where the network looks for them: scores of known classes stay what they were."""
    config, content, before = checkpoint_of(detector, "tiny-ecvit", ["cat", "dog", "emu"])
    model = build_model(config | {"num_classes": 4})[0]
    start_from(model, content, ["emu", "axolotl", "cat", "bee"], "best.pth")
    images, mask = torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    features = {}
    with torch.no_grad():
        for name, network in (("before", before), ("after", model)):
            head = {
                "detr": "dense_class",
                "detr-2020": "class_head",
                "ecdet": "decoder.enc_score_head",
                "dino": "enc_class_head",
                "ssd": "head.classification_head",
            }[detector]
            network.eval().get_submodule(head).register_forward_hook(
                lambda module, inputs, output, name=name: features.update({name: output})
            )
            network(images, mask)
    columns = ([1, 3], [3, 1]) if detector == "ssd" else ([0, 2], [2, 0])  # cat and emu, before; after
    assert torch.allclose(
        features["before"][..., columns[0]], features["after"][..., [columns[1][0], columns[0][0]]], atol=1e-5
    )


def test_a_layer_made_for_something_else_is_left_to_the_strict_check():
    ours, theirs = torch.zeros(4, 2), torch.ones(9, 2)
    assert copy_classes(ours, theirs, 1, 0, 4, 3, []) is theirs


def test_an_init_and_backbone_weights_follow_one_policy(tiny_data, weights, tmp_path, monkeypatch, capsys):
    """Batch statistics of the stem stay the file's, in a run from backbone weights, and in one from its checkpoint."""
    key = "backbone.backbone.patch_embed.convs.0.norm.running_mean"
    for out, begin in (
        ("a", ["--backbone", "ecvit-nano", "--backbone-weights", weights]),
        ("b", ["--init", tmp_path / "a" / "best.pth"]),
    ):
        arguments = [
            "--data",
            tiny_data,
            *begin,
            "--image-size",
            48,
            "--batch-size",
            4,
            "--workers",
            0,
            "--steps",
            2,
            "--out",
            tmp_path / out,
        ]
        status, _, error = called(train.main, arguments, monkeypatch, capsys)
        assert status == 0, error
        assert torch.equal(
            torch.load(tmp_path / out / "last.pth", weights_only=True)["training"]["model"][key],
            torch.load(weights)[key[9:]],
        )


# float16


def test_overflows_of_float16_are_the_scalers_and_no_steps_that_went_wrong(tiny_data, tmp_path, monkeypatch, capsys):
    """Its factor starts at 65,536 and comes down until gradients fit; gradients are clipped and reach Muon unscaled.

    The factor is resumed.
    """
    scales, real = [], train.torch.amp.GradScaler

    class Scaler(real):
        def update(self, *arguments):
            super().update(*arguments)
            scales.append(self.get_scale())

    monkeypatch.setattr(
        train.torch.amp, "GradScaler", lambda device, **options: Scaler(device, init_scale=2.0**28, **options)
    )
    arguments = ["--data", tiny_data, *TINY, "--precision", "float16", "--eval-every", 99]
    status, out, error = called(train.main, [*arguments, "--steps", 24, "--out", tmp_path / "run"], monkeypatch, capsys)
    assert status == 0, error
    assert "not finite" not in out and scales[0] < 2.0**28 and scales[-1] == scales[-5]
    saved = read_checkpoint(tmp_path / "run" / "last.pth")["training"]
    assert saved["scaler"]["scale"] == scales[-1]
    monkeypatch.setattr(train.torch.amp, "GradScaler", real)
    norms, clip = {}, train.distributed.clip_gradients
    for precision in ("float32", "float16"):
        seen = norms.setdefault(precision, [])
        monkeypatch.setattr(
            train.distributed,
            "clip_gradients",
            lambda parameters, most, seen=seen: (seen.append(float(clip(parameters, most))), torch.tensor(seen[-1]))[1],
        )
        status, _, error = called(
            train.main,
            [*arguments[:-4], "--precision", precision, "--steps", 1, "--out", tmp_path / precision],
            monkeypatch,
            capsys,
        )
        assert status == 0, error
    assert norms["float16"][0] == pytest.approx(norms["float32"][0], rel=0.05)


def test_a_float16_run_is_resumed_to_the_bit(tiny_data, tmp_path, monkeypatch, capsys):
    arguments = ["--data", tiny_data, *TINY, "--precision", "float16", "--steps", 6, "--eval-every", 99]
    assert called(train.main, [*arguments, "--out", tmp_path / "whole"], monkeypatch, capsys)[0] == 0
    with monkeypatch.context() as patch:
        interrupted_at({2}, patch)
        assert called(train.main, [*arguments, "--out", tmp_path / "parts"], monkeypatch, capsys)[0] == 130
    assert called(train.main, ["--resume", tmp_path / "parts"], monkeypatch, capsys)[0] == 0
    same_weights(tmp_path / "whole", tmp_path / "parts")
