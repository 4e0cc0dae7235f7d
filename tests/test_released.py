"""ECDet's released files, as files of the same names and shapes with other weights: they open, detect, fine-tune."""

import json
import shutil
import urllib.error

import pytest
import torch
from conftest import reference_state
from PIL import Image
from safetensors.torch import save_file
from test_commands import called

import evaluate
import infer
import train
from checkpoint import coco_classes, load_detector, read_checkpoint, start_from
from detr_model import build_model
from errors import UserError

CONSTANTS = {
    "up": torch.tensor([0.5]),
    "reg_scale": torch.tensor([4.0]),
    "num_points_scale": torch.tensor([1 / 3] * 3 + [1 / 6] * 6 + [1 / 3] * 3),
}


@pytest.fixture(scope="module")
def state():
    state = reference_state("ecdet_s")
    return {key: CONSTANTS.get(key.rsplit(".")[-1], value).clone() for key, value in state.items()}


@pytest.fixture(scope="module")
def released(state, tmp_path_factory):
    """The three forms: averaged weights beside others, plain weights, a folder of the hub."""
    folder = tmp_path_factory.mktemp("released")
    (folder / "ECDet_S").mkdir()
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"ema": {"module": state, "updates": 7}, "model": other, "date": "2026"}, folder / "ecdet_s.pth")
    torch.save({"model": state}, folder / "plain.pth")
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "ECDet_S" / "model.safetensors")
    (folder / "ECDet_S" / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["ecdet_s.pth", "plain.pth", "ECDet_S", "ECDet_S/model.safetensors"])
def test_a_released_file_detects_and_fine_tunes(name, released, state, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 60), "red").save("a.png")
    status, out, error = called(
        infer.main,
        ["a.png", "--checkpoint", released / name, "--threshold", 0, "--image-size", 64],
        monkeypatch,
        capsys,
    )
    assert status == 0 and "80 classes" in out and "constants" not in out, error
    found = json.loads((tmp_path / "detections" / "detections.json").read_text())
    names, ids = coco_classes()
    assert found and all(dict(zip(ids, names))[d["category_id"]] == d["category"] for d in found)

    arguments = [
        "--data",
        tiny_data,
        "--detector",
        "ecdet",
        "--init",
        released / name,
        "--image-size",
        64,
        "--batch-size",
        2,
        "--steps",
        1,
    ]
    status, out, error = called(train.main, arguments, monkeypatch, capsys)
    assert status == 0 and "newly initialised: kind 7, kind 300, kind 90001" in out, error
    run = read_checkpoint(tmp_path / "runs" / tiny_data.name / "last.pth")
    assert run["classes"] == ["kind 7", "kind 300", "kind 90001"] and run["config"]["size"] == "s"
    key = "encoder.fpn_blocks.0.cv1.conv.weight"  # one step of warm-up hardly moves a weight
    assert (run["model"][key] - state[key]).abs().max() < 1e-3
    assert run["model"]["decoder.dec_score_head.3.weight"].shape == (3, 192)


def test_coco_has_80_classes_with_its_own_ids():
    names, ids = coco_classes()
    assert (
        len(names) == len(set(ids)) == 80
        and (names[0], ids[0]) == ("person", 1)
        and (names[-1], ids[-1]) == ("toothbrush", 90)
    )


def test_rows_of_classes_with_the_same_name_are_kept(released, state, capsys):
    content = read_checkpoint(released / "plain.pth")
    model = build_model(content["config"] | {"num_classes": 3})[0]
    before = model.decoder.dec_score_head[1].weight.clone()
    start_from(model, content, ["dog", "axolotl", "person"], "plain.pth")
    old = state["decoder.dec_score_head.1.weight"]
    names = coco_classes()[0]
    assert torch.equal(model.decoder.dec_score_head[1].weight[0], old[names.index("dog")])
    assert torch.equal(model.decoder.dec_score_head[1].weight[2], old[0])
    assert torch.equal(model.decoder.dec_score_head[1].weight[1], before[1])
    embedding = state["decoder.denoising_class_embed.weight"]
    assert torch.equal(model.decoder.denoising_class_embed.weight[[0, 2, 3]], embedding[[names.index("dog"), 0, 80]])
    out = capsys.readouterr().out
    assert "kept by name: dog, person" in out and "newly initialised: axolotl" in out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("decoder.pre_bbox_head.layers.0.bias"), "1 missing: decoder.pre_bbox_head.layers.0.bias"),
        (lambda s: s.update({"decoder.extra": torch.zeros(1)}), "1 unexpected: decoder.extra"),
        (lambda s: s.update({"decoder.enc_bbox_head.layers.0.bias": torch.zeros(5)}), "1 of another shape"),
        (
            lambda s: s.update({"encoder.encoder.0.layers.0.linear1.weight": torch.zeros(700, 192)}),
            "of none of the sizes",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_a_line(change, message, state, tmp_path, monkeypatch, capsys):
    state = dict(state)
    change(state)
    torch.save({"model": state}, tmp_path / "odd.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    status, _, error = called(
        infer.main, [tmp_path / "a.png", "--checkpoint", tmp_path / "odd.pth"], monkeypatch, capsys
    )
    assert status == 2 and message in error and error.count("\n") == 1


def test_constants_of_the_architecture_are_not_taken_from_the_file(state, tmp_path, capsys):
    torch.save(
        {
            "model": state
            | {"decoder.up": torch.zeros(1), "decoder.decoder.layers.0.cross_attn.num_points_scale": torch.zeros(12)}
        },
        tmp_path / "a.pth",
    )
    content = read_checkpoint(tmp_path / "a.pth")
    assert content["model"]["decoder.decoder.layers.0.cross_attn.num_points_scale"].min() > 0.1
    assert "2 constants are not those of the architecture" in capsys.readouterr().out


def test_folding_changes_nothing_but_the_size(released):
    content = read_checkpoint(released / "plain.pth")
    whole = build_model(content["config"])[0].eval()
    whole.load_state_dict(content["model"])
    folded = load_detector(released / "plain.pth")[0]
    images = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 96, 64, dtype=torch.bool)
    with torch.no_grad():
        a, b = whole(images, mask), folded(images, mask)
    for key in ("pred_logits", "pred_boxes"):
        assert (a[key] - b[key]).abs().max() < 1e-4, key
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in whole.parameters())


def test_a_released_file_has_no_data_of_its_own(released, tiny_data, monkeypatch, capsys):
    status, _, error = called(evaluate.main, [released / "plain.pth"], monkeypatch, capsys)
    assert status == 2 and "give --data" in error
    arguments = ["--data", tiny_data, "--init", released / "plain.pth", "--backbone", "ecvits"]
    status, _, error = called(train.main, arguments, monkeypatch, capsys)
    assert status == 2 and "--backbone ecvits" in error


def test_a_released_file_that_is_not_here_is_downloaded_once(released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    calls = []

    def download(url, path):
        calls.append(url)
        if len(calls) == 1:
            raise urllib.error.URLError("no network")
        shutil.copy(released / "ecdet_s.pth", path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError, match="ecdet_s.pth: can't be downloaded .*no network.*as --init or --checkpoint"):
        read_checkpoint("ecdet_s.pth")
    for _ in range(2):
        assert read_checkpoint("ecdet_s.pth")["config"]["size"] == "s"
    assert calls == ["https://github.com/capsule2077/edgecrafter/releases/download/edgecrafterv1/ecdet_s.pth"] * 2
