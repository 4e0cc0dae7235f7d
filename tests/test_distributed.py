"""Several processes on the CPU (gloo), as torchrun starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_commands import command

BACKBONE = ["--backbone", "dinov3-vits16", "--backbone-weights", "none", "--image-size", "48", "--num-queries", "10", "--batch-size", "4"]  # no batch statistics


def torchrun(processes, *arguments, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.Popen([*launch, str(ROOT / "train.py"), *map(str, arguments)], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] if (folder / "log.jsonl").exists() else []


@pytest.mark.parametrize("detector", ["detr", "detr-2020"])
def test_two_processes_have_the_loss_of_one(detector, tiny_data, tmp_path):
    arguments = ["--data", tiny_data, "--detector", detector, *BACKBONE, "--steps", 1]
    alone = command("train.py", *arguments, "--out", tmp_path / "one", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    together = torchrun(2, *arguments, "--out", tmp_path / "two", cwd=tmp_path)
    said, _ = together.communicate(timeout=200)
    assert together.returncode == 0, said
    one, two = rows_of(tmp_path / "one")[0], rows_of(tmp_path / "two")[0]
    assert one["losses"].keys() == two["losses"].keys()
    for name, value in one["losses"].items():
        assert two["losses"][name] == pytest.approx(value, rel=1e-5, abs=2e-5), name
    assert said.count("test: ") + said.count("val2017: ") == 1  # the second process prints nothing


def test_a_lost_process_ends_the_run_and_it_can_be_gone_on_with(tiny_data, tmp_path):
    run = tmp_path / "run"
    started = torchrun(2, "--data", tiny_data, *BACKBONE, "--steps", 18, "--out", run, cwd=tmp_path)
    for _ in range(1200):
        if rows_of(run):
            break
        time.sleep(0.1)
    victim = next(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and is_second(p, tmp_path))
    os.kill(victim, signal.SIGKILL)
    killed = time.time()
    said, _ = started.communicate(timeout=100)
    assert time.time() - killed < 60 and started.returncode != 0
    assert "another process was lost" in said and f"--resume {run}" in said
    saved = torch.load(run / "last.pth", map_location="cpu", weights_only=True)["training"]["step"]
    assert saved >= 3
    resumed = command("train.py", "--resume", run, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert rows_of(run)[-1]["step"] == 18


def is_second(process, cwd):
    try:
        environment = (process / "environ").read_bytes().split(b"\0")
        return b"RANK=1" in environment and (process / "cwd").resolve() == cwd.resolve() and b"train.py" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_a_batch_that_can_not_be_shared(tiny_data, tmp_path):
    process = torchrun(3, "--data", tiny_data, *BACKBONE, "--steps", 1, "--out", tmp_path / "run", cwd=tmp_path)
    said, _ = process.communicate(timeout=200)
    assert process.returncode != 0 and "a batch of 4 can't be shared by 3 processes" in said
