"""What a training step costs, counted and not timed: what grows here, somebody has to want."""

import json
import subprocess
import sys
import weakref

import benchmark
import peers
import pytest
import record
import torch
from conftest import ROOT, tiny_config
from PIL import Image
from test_commands import called
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from checkpoint import save_checkpoint
from detr_model import build_model
from ecvit import fuse
from settings import DEFAULTS

CONFIG = DEFAULTS | dict(
    backbone="ecvit-nano",
    backbone_weights=None,
    size="nano",
    num_classes=5,
    num_queries=50,
    hidden_dim=128,
    num_heads=4,
    ffn_dim=512,
    encoder_layers=1,
    decoder_layers=2,
    num_denoising=40,
)
# detector: GFLOPs of a step, MiB kept for the backward pass, GFLOPs of detecting. How many operators there are depends
# on the version of PyTorch: of those only how their number grows is looked at.
MOST = {"detr": (2.8, 14, 0.75), "ecdet": (2.4, 21.5, 0.52), "dino": (2.8, 17, 0.7), "detr-2020": (1.1, 8, 0.37)}


class Counter(TorchDispatchMode):
    """Counts the operators that compute (no views), and the operations of products, convolutions and attention."""

    def __init__(self):
        super().__init__()
        self.operators, self.flops = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.operators += not function.is_view
        count = flop_registry.get(function._overloadpacket)
        self.flops += count(*args, **(kwargs or {}), out_val=found) if count else 0
        return found


class Kept:
    def __init__(self, tensor):
        self.tensor = tensor


def cost(detector, pictures=2, objects=3, side=96, **changes):
    torch.manual_seed(0)
    model, criterion, _ = build_model(CONFIG | {"detector": detector} | changes)
    images, mask = torch.randn(pictures, 3, side, side), torch.zeros(pictures, side, side, dtype=torch.bool)
    targets = [
        {"labels": torch.randint(5, (objects,)), "boxes": 0.3 + 0.2 * torch.rand(objects, 4)} for _ in range(pictures)
    ]
    kept = weakref.WeakSet()  # what the forward pass itself gave up again is not kept

    def keep(tensor):
        kept.add(entry := Kept(tensor))
        return entry

    with Counter() as step:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda entry: entry.tensor):
            loss = sum(criterion(model(images, mask, targets), targets).values())
        sizes = {entry.tensor.untyped_storage().data_ptr(): entry.tensor.untyped_storage().nbytes() for entry in kept}
        loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(size for pointer, size in sizes.items() if pointer not in weights)
    model = fuse(model.eval())
    with torch.no_grad(), Counter() as detecting:
        model(images, mask)
    return step.flops / 1e9, activations / 2**20, detecting.flops / 1e9, step.operators


@pytest.mark.parametrize("detector", MOST)
def test_a_step_costs_no_more_than_it_did(detector):
    found = cost(detector)[:3]
    assert all(0 < value <= most for value, most in zip(found, MOST[detector])), [round(value, 3) for value in found]


@pytest.mark.parametrize("detector", MOST)
def test_many_objects_pictures_and_classes_take_no_more_operators(detector):
    """All layers, pictures and objects are computed at once."""
    few = cost(detector)
    for changes in (dict(objects=20), dict(pictures=6), dict(num_classes=1203)):
        assert cost(detector, **changes)[3] < 1.1 * few[3], changes


@pytest.mark.parametrize("detector", ["detr", "ecdet", "detr-2020"])
def test_costs_grow_no_faster_than_what_they_are_for(detector):
    operations, kept, *_ = cost(detector)
    twice = cost(detector, pictures=4)
    assert twice[0] < 2.05 * operations and twice[1] < 2.05 * kept
    larger = cost(detector, side=192)  # four times the pixels: the attention among them is quadratic, all else is not
    assert larger[0] < 7 * operations and larger[1] < 4.5 * kept
    queries = cost(detector, num_queries=100)  # self-attention among them is quadratic
    assert queries[0] < 2 * operations and queries[1] < 2.2 * kept
    classes, more = cost(detector, num_classes=1000), cost(detector, num_classes=2000)
    assert (
        more[0] - classes[0] < 1.05 * (classes[0] - operations) * 1000 / 995
        and more[1] - classes[1] < 1.05 * (classes[1] - kept) * 1000 / 995
    )


class Host:
    """Stands for the host in a step on the meta device, which has shapes and no values: who asks it for one fails."""

    def __init__(self):
        self.copies = 0

    def __call__(self, tensor):
        self.copies += 1
        return torch.rand(tensor.shape)


@pytest.mark.parametrize("detector", MOST)
def test_a_step_waits_for_the_device_where_objects_are_matched_and_nowhere_else(detector, monkeypatch):
    """One copy to the host a matching: of the layers' costs, and with them of what the dense outputs need."""
    host = Host()
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: host(tensor) if tensor.is_meta else tensor)
    with torch.device("meta"):
        model, criterion, _ = build_model(CONFIG | {"detector": detector})
    mask = torch.zeros(2, 96, 96, dtype=torch.bool)
    mask[1, 64:] = True
    targets = [
        {"labels": torch.zeros(n, dtype=torch.long, device="meta"), "boxes": torch.zeros(n, 4, device="meta")}
        for n in (3, 1)
    ]
    outputs = model(torch.zeros(2, 3, 96, 96, device="meta"), mask, targets)
    assert host.copies == 0
    sum(criterion(outputs, targets).values()).backward()
    assert host.copies == (2 if detector == "detr" else 1)


def test_the_benchmark_compares_the_same_network():
    """With transformers' weights ours gives transformers' outputs; the others only have to give losses."""
    ours, theirs = (model.eval() for model in peers.detr())
    images, mask = torch.randn(1, 3, 56, 56), torch.zeros(1, 56, 56, dtype=torch.bool)
    with torch.no_grad():
        found, expected = ours(images, mask), theirs(images, mask)
    assert (found["pred_logits"] - expected.logits).abs().max() < 1e-3 and (
        found["pred_boxes"] - expected.pred_boxes
    ).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["matcher", "loading"])
def test_the_benchmark_prints_both(name, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "product_rate", lambda device: 1e9)
    status, out, err = called(benchmark.main, ["--peers", name, "--repeats", 1], monkeypatch, capsys)
    assert status == 0, err
    assert out.splitlines()[-1].count(" ms ") == 2
    status, _, err = called(benchmark.main, ["--peers", "yolo"], monkeypatch, capsys)
    assert status == 2 and "--peers yolo: there are detr, ecdet" in err


def test_both_evaluations_find_the_same_and_growth_is_drawn(monkeypatch, capsys, tmp_path):
    figures, summaries = [], []
    measured, summarize = benchmark.measure, benchmark.COCOeval.summarize
    monkeypatch.setattr(benchmark, "measure", lambda *given: figures.append(measured(*given)[0]))
    monkeypatch.setattr(
        benchmark.COCOeval, "summarize", lambda self: (summarize(self), summaries.append(self.stats.tolist()))
    )
    benchmark.compare_evaluation(torch.device("cpu"), 1, pictures=6)
    ours, theirs = summaries  # each made its own
    assert ours == theirs and 0 < figures[0]["AP"] == ours[0] < 1
    monkeypatch.setattr(benchmark, "GROWTH", {"pixels": (64, 128), "classes": (3, 300)})
    status, out, err = called(
        benchmark.main,
        ["--growth", tmp_path / "growth.png", "--detector", "ecdet", "--size", "nano"],
        monkeypatch,
        capsys,
    )
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["pixels", "classes"] and (
        tmp_path / "growth.png"
    ).stat().st_size > 10_000


def test_a_detector_on_its_own_backbone_imports_no_model_of_transformers():
    code = (
        "import sys, detector; print([name for name in sys.modules "
        "if name.startswith('transformers.models.') and '.modeling_' in name])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


@pytest.mark.parametrize("script", ["train", "infer", "evaluate", "datasets", "export", "check_dims"])
def test_help_waits_for_no_library_that_it_does_not_need(script):
    assert imported(f"{script}.py", "--help") == set()


def test_detection_imports_only_what_it_needs(tmp_path):
    """Not even transformers, for a backbone that is not one of its models."""
    config = tiny_config("detr", num_classes=2, image_size=64)
    content = {"model": build_model(config)[0].state_dict(), "config": config, "classes": ["a", "b"]}
    save_checkpoint(tmp_path / "best.pth", content | {"category_ids": [1, 2]})
    Image.new("RGB", (60, 40)).save(tmp_path / "image.png")
    out = "--out", tmp_path / "out"
    assert imported("infer.py", tmp_path / "image.png", "--checkpoint", tmp_path / "best.pth", *out) == set()
    assert (tmp_path / "out" / "detections.json").exists()


def imported(*command):
    """-> which of the slow libraries a command imports."""
    run = subprocess.run([sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    names = {line.split("|")[-1].strip().split(".")[0] for line in run.stderr.splitlines() if "|" in line}
    assert "torch" in names
    return names & {"transformers", "matplotlib", "pycocotools", "scipy", "onnxruntime"}


def test_a_machine_is_recorded_and_set_beside_another(tiny_data, tmp_path, monkeypatch, capsys):
    file, other = tmp_path / "mine.json", tmp_path / "yours.json"
    small = ["--side", 64, "--batch-size", 2, "--repeats", 1, "--detectors", "detr", "ssd"]
    status, _, error = called(record.main, [file, "steps", *small], monkeypatch, capsys)
    assert status == 0, error
    more = ["learning", "--data", tiny_data, "--side", 48, "--minutes", 0.05]
    status, _, error = called(record.main, [file, *more], monkeypatch, capsys)
    assert status == 0, error
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}  # those of the first part are still there
    assert not [row for row in rows.values() if "error" in row]
    for detector in ("detr", "ssd"):
        step = next(row for name, row in rows.items() if name.startswith(f"{detector}: train"))
        assert step["images/s"] == pytest.approx(2000 / step["ms"], rel=1e-2) and 0 < step["limit"] < 1
    assert any("0.05 minutes" in name and row["AP"] >= 0 for name, row in rows.items())

    monkeypatch.setattr(record, "CASES", {"detr": "no such backbone"})  # a row that fails says why, and costs no other
    status, _, error = called(record.main, [other, "steps", *small[:-1]], monkeypatch, capsys)
    assert status == 0, error
    status, out, error = called(record.main, [file, other], monkeypatch, capsys)
    assert status == 0, error
    lines = out.splitlines()
    assert len(lines) == 2 + len(rows) and all(line.count(" | ") == 2 for line in lines[2:])
    assert any("error UserError" in line for line in lines)
    for arguments, message in [
        ([file, "learning"], "learning: name a dataset, --data DIR"),
        ([file, "steps", "speed"], "speed: there are steps, peers, learning"),
        ([file, "speed"], "speed: no such file, nor a part to measure"),
        ([tiny_data / "train2017" / "000.png"], "not a file of tools/record.py"),
    ]:
        status, _, error = called(record.main, arguments, monkeypatch, capsys)
        assert status == 2 and message in error and error.count("\n") == 1
