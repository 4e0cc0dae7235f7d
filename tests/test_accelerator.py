"""What only a GPU can show. One command, five minutes: python -m pytest tests/test_accelerator.py

All other tests take the CPU, also where there is a GPU (see conftest.py), and this file is skipped among them.
"""

import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import interrupted_at, tiny_config
from PIL import Image
from test_commands import called

import distributed
import evaluate
import export
import infer
import train
from detector import load
from detr_model import DETECTORS, build_model
from devices import Graphed, autocast, choose_precision

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU, and pytest tests/test_accelerator.py alone"
)
CUDA = torch.device("cuda")
TINY = ["--backbone", "ecvit-nano", "--image-size", 64, "--batch-size", 4, "--num-queries", 20, "--workers", 2]
BACKBONES = ["ecvit-nano", "dinov3-convnext-tiny"]


@pytest.fixture(autouse=True)
def exact_products():
    """float32 without TF32, as on the CPU that the GPU is compared with."""
    choose_precision("float32", CUDA)
    yield
    choose_precision("auto", CUDA)


def tiny_batch():
    images, mask = torch.randn(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 64:] = True
    boxes = torch.tensor([[0.5, 0.4, 0.3, 0.2], [0.2, 0.3, 0.1, 0.3], [0.7, 0.2, 0.2, 0.2]])
    targets = [{"labels": torch.tensor([0, 2, 1]), "boxes": boxes}, {"labels": torch.tensor([1]), "boxes": boxes[:1]}]
    return images, mask, targets


def on_gpu(images, mask, targets):
    images = images.to(CUDA, memory_format=torch.channels_last)
    return images, mask, [{key: value.to(CUDA) for key, value in t.items()} for t in targets]


def losses_and_gradients(model, criterion, images, mask, targets, precision="float32"):
    torch.manual_seed(1)
    with autocast(precision, images.device):
        outputs = model.train()(images, mask)
    losses = criterion(outputs, targets)
    sum(losses.values()).backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in losses.items()}, gradients


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_step_is_that_of_the_cpu(detector, backbone):
    """Losses to 1e-4, gradients to 1e-3 of their size; without noisy copies, whose noise each device draws itself."""
    torch.manual_seed(0)
    model, criterion, _ = build_model(tiny_config(detector, backbone, num_denoising=0))
    with (
        torch.no_grad()
    ):  # initial boxes touch each other and samples lie between cells, where rounding turns gradients
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    state, batch = {key: value.clone() for key, value in model.state_dict().items()}, tiny_batch()
    losses, gradients = losses_and_gradients(model, criterion, *batch)
    model.load_state_dict(state)
    model.zero_grad()
    model.to(CUDA, memory_format=torch.channels_last)
    found, found_gradients = losses_and_gradients(model, criterion, *on_gpu(*batch))
    assert found == pytest.approx(losses, rel=1e-4, abs=1e-5)
    assert gradients.keys() == found_gradients.keys()
    square = sum(float((g - found_gradients[name]).double().square().sum()) for name, g in gradients.items())
    whole = sum(float(g.double().square().sum()) for g in gradients.values())
    assert math.sqrt(square / whole) < 1e-3


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("detector", DETECTORS)
def test_low_precision_stays_near(detector, precision):
    torch.manual_seed(0)
    model, criterion, _ = build_model(tiny_config(detector, num_denoising=0))
    model.to(CUDA, memory_format=torch.channels_last)
    state, batch = {key: value.clone() for key, value in model.state_dict().items()}, on_gpu(*tiny_batch())
    exact, _ = losses_and_gradients(model, criterion, *batch)
    model.load_state_dict(state)
    rounded, gradients = losses_and_gradients(model, criterion, *batch, precision)
    assert sum(rounded.values()) == pytest.approx(sum(exact.values()), rel=0.05)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_step_waits_for_the_gpu_where_objects_are_matched_and_nowhere_else(detector):
    """As tests/test_speed.py says of the meta device; here the driver counts. ssd_model.py says why SSD waits more."""
    torch.manual_seed(0)
    model, criterion, _ = build_model(tiny_config(detector))
    model.to(CUDA, memory_format=torch.channels_last).train()
    images, mask, targets = on_gpu(*tiny_batch())

    def step():
        with autocast("bfloat16", CUDA):
            outputs = model(images, mask, targets)
        sum(criterion(outputs, targets).values()).backward()

    step()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing" in str(w.message)]
    places = [f"{w.filename.rsplit('/', 1)[-1]}:{w.lineno}" for w in waits]
    if detector == "ssd":
        assert all(p.startswith(("ssd", "anchor_utils", "_utils", "graph", "detr_loss")) for p in places), places
    else:
        assert len(places) <= 2 and all(place.startswith(("detr_loss", "ecdet_loss")) for place in places), places


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_run_is_resumed(detector, tiny_data, tmp_path, monkeypatch, capsys):
    """Not to the bit, as sums on a GPU come in any order; steps, random numbers and the optimizers' state go on."""
    arguments = ["--data", tiny_data, *TINY, "--detector", detector, "--steps", 6, "--eval-every", 99]
    arguments += ["--precision", "float32"]
    status, out, error = called(train.main, [*arguments, "--out", tmp_path / "whole"], monkeypatch, capsys)
    assert status == 0, error
    assert ", cuda, float32" in out
    with monkeypatch.context() as patch:
        interrupted_at({3}, patch)
        patch.setattr(train, "DataLoader", lambda *given, **more: loader(*given, **more | {"num_workers": 0}))
        loader = torch.utils.data.DataLoader
        status, _, error = called(train.main, [*arguments, "--out", tmp_path / "parts"], monkeypatch, capsys)
    assert status == 130, error
    status, _, error = called(train.main, ["--resume", tmp_path / "parts"], monkeypatch, capsys)
    assert status == 0, error
    whole, parts = (torch.load(tmp_path / run / "last.pth", weights_only=True) for run in ("whole", "parts"))
    assert whole["training"]["step"] == parts["training"]["step"] == 6
    for key, value in whole["training"]["model"].items():
        other = parts["training"]["model"][key]
        assert (value.float() - other.float()).norm() <= 2e-3 * value.float().norm() + 1e-5, key
    momenta = [state["momentum"] for state in whole["training"]["optimizers"][-1]["state"].values()]
    others = [state["momentum"] for state in parts["training"]["optimizers"][-1]["state"].values()]
    assert all((a - b).norm() <= 0.1 * a.norm() + 1e-6 for a, b in zip(momenta, others))  # a lost step halves them


@pytest.mark.parametrize("precision", ["auto", "float16"])
@pytest.mark.parametrize("detector", DETECTORS)
def test_train_evaluate_detect_export(detector, precision, tiny_data, tmp_path, monkeypatch, capsys):
    """Whole commands; a GPU's detections are the CPU's, the a file is exported."""
    run = tmp_path / "run"
    arguments = ["--data", tiny_data, *TINY, "--detector", detector, "--epochs", 3, "--precision", precision]
    status, out, error = called(train.main, [*arguments, "--out", run], monkeypatch, capsys)
    assert status == 0, error
    assert ", cuda, " + ("bfloat16" if precision == "auto" else "float16") in out
    saved = torch.load(run / "last.pth", weights_only=True)["training"]
    assert saved["cuda_rng"] is not None and ("scale" in saved["scaler"]) == (precision == "float16")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["AP"]) for row in rows if "AP" in row)
    status, out, error = called(evaluate.main, [run / "best.pth", "--data", tiny_data], monkeypatch, capsys)
    assert status == 0, error
    if precision == "float16":
        return
    pictures = sorted((tiny_data / "val2017").glob("*.png"))
    status, _, error = called(
        infer.main, [*pictures, "--checkpoint", run / "best.pth", "--out", tmp_path / "out"], monkeypatch, capsys
    )
    assert status == 0, error
    assert all((tmp_path / "out" / f"{picture.stem}.jpg").exists() for picture in pictures)
    gpu, cpu = (load(run / "best.pth", device=d, threshold=0, precision="float32") for d in ("cuda", "cpu"))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 150, 3), dtype=np.uint8))
    for image in (*pictures[:2], noise):
        compare(gpu(image), cpu(image))
    if detector == "ssd":
        return
    file = tmp_path / "run.pt2"
    status, _, error = called(export.main, [run / "best.pth", "--format", "torch", "--out", file], monkeypatch, capsys)
    assert status == 0, error
    assert load(file, threshold=0)(noise)["scores"].isfinite().all()


def compare(found, expected):
    """The twenty best scores to 1e-3, and the boxes of what stands out to a tenth of a pixel."""
    assert found["scores"][:20].tolist() == pytest.approx(expected["scores"][:20].tolist(), abs=1e-3)
    distances = torch.cdist(expected["boxes"][:5].float(), found["boxes"].float(), p=math.inf)
    assert distances.min(1).values.max() < 0.1


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recorded_networks_detect_the_same(detector, precision):
    """The third call of a shape is recorded, padded or not; SSD, which asks the host, is computed as it comes."""
    torch.manual_seed(0)
    model = build_model(tiny_config(detector))[0].to(CUDA, memory_format=torch.channels_last).eval()
    graphed = Graphed(model)
    with torch.no_grad(), autocast(precision, CUDA):
        for call in range(6):
            for padded in (False, True):
                images, mask = torch.randn(2, 3, 96, 128, device=CUDA), torch.zeros(2, 96, 128, dtype=torch.bool)
                mask[1, 70 + call :] = padded
                expected, found = model(images, mask), graphed(images, mask)
                for key in ("pred_logits", "pred_boxes") if detector != "ssd" else ("cls_logits", "bbox_regression"):
                    torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-3)
    recorded = [shape for shape, graph in graphed.graphs.items() if graph is not None]
    assert len(recorded) == 2 or detector == "ssd"


@pytest.fixture
def process_group(tmp_path):
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("detector, sharded", [("detr", False), ("ecdet", False), ("dino", False), ("detr", True)])
def test_nccl(detector, sharded, process_group):
    """One process of several: norms, gradients, clipping, buffers and figures go through NCCL and stay the same."""
    torch.manual_seed(0)
    backbone = "dinov2-small" if sharded else "ecvit-nano"
    model, criterion, _ = build_model(tiny_config(detector, backbone, num_denoising=0))
    model.to(CUDA)
    state, batch = {key: value.clone() for key, value in model.state_dict().items()}, on_gpu(*tiny_batch())
    losses, gradients = losses_and_gradients(model, criterion, *batch)
    model.load_state_dict(state)
    model.zero_grad()
    model = distributed.synchronize_norms(model, CUDA)
    if sharded:
        distributed.shard(model.backbone, CUDA)
    replica = distributed.replicate(model)
    torch.manual_seed(1)
    found = criterion(replica.train()(*batch[:2]), batch[2])
    sum(found.values()).backward()
    assert {name: float(value) for name, value in found.items()} == pytest.approx(losses, rel=1e-4, abs=1e-5)
    norm = distributed.clip_gradients(list(model.parameters()), math.inf)
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    assert float(norm) == pytest.approx(expected, rel=1e-3)
    distributed.broadcast_buffers(model)
    assert float(distributed.all_reduce_mean(3.0, CUDA)) == 3
    assert distributed.all_reduce_max([1.0, 2.5], CUDA) == [1.0, 2.5]
    assert distributed.broadcast({"a": 1}) == {"a": 1} and distributed.all_gather({2: "b"}) == {2: "b"}
    whole = distributed.unshard(model.state_dict())
    assert all(torch.isfinite(value).all() for value in whole.values())
