"""Several processes on the CPU (gloo), as torchrun starts them."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, half_background
from test_commands import SMALL, called
from test_speed import CONFIG

import distributed
import evaluate
import train
from detr_model import build_model

# no batch norms, and float32, so that losses are those of one process
BACKBONE = [
    "--backbone",
    "dinov3-vits16",
    "--backbone-weights",
    "none",
    "--image-size",
    "48",
    "--num-queries",
    "10",
    "--batch-size",
    "4",
    "--precision",
    "float32",
]


def torchrun(processes, *arguments, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    return subprocess.Popen(
        [*launch, str(ROOT / "train.py"), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


AT_THE_END = """
main()
distributed.finish()
"""
NO_THREADS = """
threads = [path.read_text() for path in __import__("pathlib").Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), threads  # the interpreter may abort if it ends before they do
"""


def launched(script, body, after=NO_THREADS):
    """Writes a script and runs two processes of it -> what subprocess.run gives."""
    script.write_text(f"import distributed\ndef main():\n{textwrap.indent(body, '    ')}{AT_THE_END}{after}")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    return subprocess.run(
        [*launch, script],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def rows_of(folder):
    return (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        if (folder / "log.jsonl").exists()
        else []
    )


@pytest.mark.parametrize(
    "detector, alone, also",
    [
        ("detr", ["--num-denoising", 0], []),
        ("detr-2020", ["--accumulate", 2], []),
        ("detr", ["--num-denoising", 0, "--optimizer", "adamw"], ["--shard"]),
    ],
)
def test_two_processes_have_the_losses_of_one(detector, alone, also, tiny_data, tmp_path, monkeypatch, capsys):
    arguments = [
        "--data",
        tiny_data,
        "--detector",
        detector,
        *BACKBONE,
        *alone,
        "--steps",
        3,
    ]  # noisy copies are drawn by each process for itself
    status, _, error = called(train.main, [*arguments, "--out", tmp_path / "one"], monkeypatch, capsys)
    assert status == 0, error
    together = torchrun(2, *arguments, *also, "--out", tmp_path / "two", cwd=tmp_path)
    said, _ = together.communicate(timeout=200)
    assert together.returncode == 0, said
    one, two = rows_of(tmp_path / "one")[0], rows_of(tmp_path / "two")[0]
    assert one["losses"].keys() == two["losses"].keys()
    for name, value in one["losses"].items():
        assert two["losses"][name] == pytest.approx(value, rel=1e-5, abs=2e-5), name
    assert said.count("test: ") + said.count("val2017: ") == 1  # the second process prints nothing


def test_background_alone_weighs_nothing_in_a_process(tiny_data, tmp_path, monkeypatch, capsys):
    """Half of the images have no object: a process without any counts as none, not as one."""
    data = half_background(tiny_data, tmp_path / "data")
    arguments = ["--data", data, *BACKBONE[:-4], "--batch-size", 2, "--precision", "float32", "--num-denoising", 0]
    arguments += ["--steps", 8, "--lr", 1e-9, "--plain-end", 1]  # single images: some steps have a process without any
    status, _, error = called(train.main, [*arguments, "--out", tmp_path / "one"], monkeypatch, capsys)
    assert status == 0, error
    together = torchrun(2, *arguments, "--out", tmp_path / "two", cwd=tmp_path)
    said, _ = together.communicate(timeout=200)
    assert together.returncode == 0, said
    one, two = rows_of(tmp_path / "one")[0], rows_of(tmp_path / "two")[0]
    for name, value in one["losses"].items():
        assert two["losses"][name] == pytest.approx(value, rel=1e-4, abs=2e-5), name


def test_all_of_a_backbone_has_a_gradient_before_ddp_starts(tiny_data, tmp_path, monkeypatch, capsys):
    """DDP leaves out what has none then: MAE's fixed positions, which train.py trains, would drift apart."""
    real, seen = train.build_model, []

    def build(*arguments, **options):
        model, *rest = real(*arguments, **options)
        next(model.backbone.parameters()).requires_grad_(False)
        return model, *rest

    def replicate(model):
        seen.append(all(p.requires_grad for p in model.backbone.parameters()))
        return model

    monkeypatch.setattr(train, "build_model", build)
    monkeypatch.setattr(train.distributed, "replicate", replicate)
    monkeypatch.setattr(train, "fit", partial(as_two, train.fit, monkeypatch))
    arguments = ["--data", tiny_data, *BACKBONE, "--steps", 1, "--out", tmp_path / "run"]
    status, _, error = called(train.main, arguments, monkeypatch, capsys)
    assert status == 0 and seen == [True], error


def as_two(fit, monkeypatch, *arguments):
    """fit while there seem to be two processes, until they would be replicated."""
    size = iter([2])
    monkeypatch.setattr(train.distributed, "world_size", lambda: next(size, 1))
    return fit(*arguments)


def test_two_processes_evaluate_as_one_with_batch_norms(tiny_data, tmp_path, monkeypatch, capsys):
    """ECViT's batch norms see each process's own images where they can't be synchronised, which is said.

    But all evaluate with the statistics of the first, which are those that are saved.
    """
    run = tmp_path / "run"
    arguments = ["--data", tiny_data, "--backbone", "ecvit-nano", *BACKBONE[2:], "--steps", 15, "--eval-every", 1]
    together = torchrun(2, *arguments, "--out", run, cwd=tmp_path)
    said, _ = together.communicate(timeout=200)
    assert together.returncode == 0, said
    assert said.count("batch norms: each process takes the statistics of its own images") == 1
    arguments = [run / "best.pth", "--batch-size", 2]
    status, out, error = called(evaluate.main, arguments, monkeypatch, capsys)
    assert status == 0, error
    figures = dict(line.rsplit(maxsplit=1) for line in out.splitlines())
    best = max(rows_of(run), key=lambda row: (row["AP"], row["epoch"]))
    assert 0 < best["AP50"] and {name: float(figures[name]) for name in ("AP", "AP50", "AR_100")} == pytest.approx(
        {name: best[name] for name in ("AP", "AP50", "AR_100")}, abs=6e-4
    )


BUFFERS = """
import torch, distributed
device = distributed.start()
rank, world = distributed.rank(), distributed.world_size()
torch.manual_seed(rank)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
assert distributed.synchronize_norms(model, device) is model
model(torch.randn(2, 3, 5, 5))
before = [buffer.clone() for buffer in model.buffers()]
distributed.broadcast_buffers(model)
first = distributed.broadcast([buffer.clone() for buffer in model.buffers()])
assert all(map(torch.equal, first, model.buffers()))
assert rank == 0 or not torch.equal(before[0], first[0])
if rank == 0:
    assert all(map(torch.equal, before, first))  # what the first process does next is as if it had not been asked
print("agreed", rank, file=__import__("sys").stderr)
"""


UNEVEN = """
import torch, distributed
from detr_model import DETECTORS, build_model
from settings import DEFAULTS
device = distributed.start()
rank, world = distributed.rank(), distributed.world_size()
object_ = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.3]])}
none = {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
for detector in DETECTORS:
    torch.manual_seed(0)
    config = DEFAULTS | dict(
        detector=detector, size="nano", backbone="ecvit-nano", backbone_weights="none", num_classes=3, num_queries=12,
        hidden_dim=32, num_heads=2, ffn_dim=32, encoder_layers=1, decoder_layers=2, num_denoising=8,
    )
    model, criterion, _ = build_model(config)
    trained = distributed.replicate(model.train())
    targets = [object_ if rank == 0 else none] * 2
    images, mask = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
    sum(criterion(trained(images, mask, targets), targets).values()).backward()
    assert distributed.all_reduce_mean(float(rank), device) == 0.5, detector  # all are at the same place
print("all met", file=__import__("sys").stderr)
"""


def test_buffers_are_those_of_the_first_process(tmp_path):
    done = launched(tmp_path / "buffers.py", BUFFERS)
    assert done.returncode == 0 and done.stderr.count("agreed") == 2, done.stdout + done.stderr


def test_a_process_without_objects_meets_the_others(tmp_path):
    """Noisy copies are made of objects: where one process has none, it must not ask the others for fewer sums."""
    done = launched(tmp_path / "uneven.py", UNEVEN)
    assert done.returncode == 0 and done.stderr.count("all met") == 2, done.stdout + done.stderr


def test_batch_norms_are_synchronised_on_gpus(monkeypatch):
    model = build_model(CONFIG | {"detector": "ecdet", "size": "nano"})[0]
    norms, keys = (
        [name for name, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)],
        set(model.state_dict()),
    )
    assert (
        distributed.synchronize_norms(model, torch.device("cuda")) is model and len(norms) > 5
    )  # one process: nothing to do
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    model = distributed.synchronize_norms(model, torch.device("cuda"))
    assert all(isinstance(model.get_submodule(name), torch.nn.SyncBatchNorm) for name in norms)
    assert set(model.state_dict()) == keys and model.backbone.name == "ecvit-nano"


@pytest.mark.parametrize("also", [[], ["--shard"]])
def test_a_lost_process_ends_the_run_and_it_can_be_gone_on_with(also, tiny_data, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    started = torchrun(
        2, "--data", tiny_data, *SMALL, "--steps", 40, "--save-every", 1, "--out", run, *also, cwd=tmp_path
    )
    until = time.time() + 120
    while not (run / "last.pth").exists():
        assert time.time() < until and started.poll() is None, "nothing was saved"
        time.sleep(0.1)
    victim = next(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and is_second(p, tmp_path))
    os.kill(victim, signal.SIGKILL)
    killed = time.time()
    said, _ = started.communicate(timeout=100)
    assert time.time() - killed < 60 and started.returncode != 0
    assert "another process was lost" in said and f"--resume {run}" in said
    saved = torch.load(run / "last.pth", map_location="cpu", weights_only=True)["training"]["step"]
    assert 1 <= saved < 40
    # the same optimisers hold the same weights in any number of processes
    status, _, error = called(train.main, ["--resume", run], monkeypatch, capsys)
    assert status == 0, error
    assert rows_of(run)[-1]["step"] == 40


def is_second(process, cwd):
    try:
        environment = (process / "environ").read_bytes().split(b"\0")
        return (
            b"RANK=1" in environment
            and (process / "cwd").resolve() == cwd.resolve()
            and b"train.py" in (process / "cmdline").read_bytes()
        )
    except OSError:
        return False


def test_a_batch_that_can_not_be_shared(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    arguments = ["--data", tiny_data, *BACKBONE, "--steps", 1, "--out", tmp_path / "run"]
    status, _, error = called(train.main, arguments, monkeypatch, capsys)
    assert status == 2 and "a batch of 4 can't be shared by 3 processes" in error


SHARDED = """
import copy, sys, torch
import distributed
device = distributed.start()
rank, world = distributed.rank(), distributed.world_size()
torch.manual_seed(0)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = Backbone(), torch.nn.Linear(7, 3)
    def forward(self, x):
        return self.head(self.backbone(x))

class Backbone(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.last = torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(3)), torch.nn.Linear(5, 7)
    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return self.last(x)

def step(model, trained, optimizer, x):
    trained(x).square().mean().backward()
    norm = distributed.clip_gradients(list(model.parameters()), 0.01)
    optimizer.step()
    model.zero_grad()
    return float(norm)

def adam(model):
    parts = model.backbone, model.head
    return torch.optim.AdamW([{"params": list(part.parameters())} for part in parts], lr=0.1)

one = Net()
two = copy.deepcopy(one)
start = copy.deepcopy(one)
distributed.shard(two.backbone, device)
trained = distributed.replicate(two)
ours, theirs = adam(one), adam(two)
batches = torch.randn(4, 6, 5)
for i, batch in enumerate(batches):
    if i == 2:  # saved whole, and opened anew
        weights, state = distributed.unshard(two.state_dict()), distributed.unshard(theirs.state_dict())
        two = copy.deepcopy(start)
        distributed.shard(two.backbone, device)
        trained, theirs = distributed.replicate(two), adam(two)
        distributed.load(two, [theirs], {"model": weights, "optimizers": [state]})
    norms = step(one, one, ours, batch), step(two, trained, theirs, batch[rank::2])
    assert abs(norms[0] - norms[1]) < 1e-6 * norms[0] + 1e-7, norms
    for name, value in distributed.unshard(two.state_dict()).items():
        torch.testing.assert_close(value, one.state_dict()[name], rtol=1e-4, atol=1e-5)
local = sum(p.to_local().numel() for p in two.backbone.parameters())
assert local < 0.7 * sum(p.numel() for p in one.backbone.parameters())
print("the same")
"""


def test_a_sharded_backbone_is_trained_saved_and_opened_as_a_whole_one(tmp_path):
    done = launched(tmp_path / "sharded.py", SHARDED, after="")
    assert done.returncode == 0 and done.stdout.count("the same") == 1, done.stdout + done.stderr


@pytest.mark.parametrize("count, world", [(5, 1), (5, 2), (4, 2), (1, 3), (7, 4)])
def test_every_process_gets_equally_many_pictures_and_none_is_left_out(count, world, monkeypatch):
    shares = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "is_distributed", lambda: True)
        monkeypatch.setattr(distributed.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed.dist, "get_world_size", lambda: world)
        shares.append(distributed.my_part(list(range(count))))
    assert len({len(share) for share in shares}) == 1
    assert {i for share in shares for i in share} == set(range(count))
    assert sum(map(len, shares)) - count < world
