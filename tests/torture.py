"""Trainings that are killed, stopped and left running for long: what the quick tests do once, often.

python tests/torture.py kill --times 30      SIGKILL at random moments, resumed each time: the weights of an
                                             undisturbed run, to the bit
python tests/torture.py stop --times 10      the same with SIGTERM and SIGINT, which save first
python tests/torture.py long --steps 2000    memory and open files after 200 steps and after 2,000, with two workers
python tests/torture.py all                  these, and 6,000 cases of fuzz.py: 20 minutes on two cores
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import ROOT, write_coco

import plots

SMALL = [
    "--backbone",
    "ecvit-nano",
    "--image-size",
    "64",
    "--batch-size",
    "4",
    "--num-queries",
    "30",
    "--decoder-layers",
    "1",
]


def start(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def weights_of(run):
    content = torch.load(run / "last.pth", weights_only=True)
    return content["training"]["step"], content["model"] | {
        f"training.{key}": value for key, value in content["training"]["model"].items()
    }


def disturbed(base, times, signals, seed=0, steps=90, epoch=3):
    """Trains once undisturbed and once with a signal at each of `times` random moments, from before the first
    checkpoint on -> (signals sent while it ran, the step that the last resumption began with).

    AssertionError where the end weights differ in one bit, where a file that says it is whole isn't, or where a run
    ended in no way that it may end in: killed, or, once it has begun to train, stopped and saved (130), or finished
    (0). last.pth is written after every step, so that there is something to resume.
    """
    rng = random.Random(seed)
    data = write_coco(base / "data", {"train": 4 * epoch, "val": 4})
    arguments = ["--data", data, *SMALL, "--steps", steps, "--eval-every", 4, "--save-every", 0]
    whole = start(*arguments, "--out", base / "whole")
    said = whole.communicate()[0]
    assert whole.returncode == 0, said
    run, sent, step = base / "disturbed", 0, 0
    while True:
        process = start("--resume", run) if (run / "last.pth").exists() else start(*arguments, "--out", run)
        if sent < times:
            try:
                said = process.communicate(timeout=wait_for(process, run, rng, steps // (times + 1)))[0]
            except subprocess.TimeoutExpired:
                given = signals[sent % len(signals)]
                process.send_signal(given)
                said = process.communicate()[0]
                sent += 1
                if (run / "last.pth").exists():
                    found = weights_of(run)[0]
                    assert found >= step, f"step {found} after {step}"
                    step = found
                for name in ("best.pth", "config.json"):
                    if (run / name).exists():
                        torch.load(run / name, weights_only=True) if name.endswith("pth") else json.loads(
                            (run / name).read_text()
                        )
                # A signal that can be caught is, from before the folder is written until after the end.
                assert process.returncode in (-signal.SIGKILL if given == signal.SIGKILL else 130, 0), said
                continue
        else:
            said = process.communicate()[0]
        assert process.returncode == 0, said
        break
    (steps_a, a), (steps_b, b) = weights_of(base / "whole"), weights_of(run)
    assert steps_a == steps_b == steps and a.keys() == b.keys() and step > 0
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, f"{len(different)} of {len(a)} tensors differ after {sent} signals: {different[:3]}"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}) and rows[-1]["step"] == steps
    return sent, step


def wait_for(process, run, rng, most):
    """Seconds until the signal, after up to `most` steps: by a clock alone, a slow machine would be killed in imports.

    config.json is written when the training begins, last.pth after every step.
    """
    steps, before = rng.randrange(most), time_of(run / "config.json")
    while process.poll() is None and time_of(run / "config.json") == before:
        time.sleep(0.002)
    before = time_of(run / "last.pth")
    while process.poll() is None and steps:
        time.sleep(0.002)
        now = time_of(run / "last.pth")
        steps, before = steps - (now != before), now
    return 0.001 + 0.05 * rng.random()


def time_of(file):
    return file.stat().st_mtime_ns if file.exists() else 0


def tree_of(pid):
    """A process and its children."""
    found, waiting = [], [pid]
    while waiting:
        pid = waiting.pop()
        try:
            waiting += [
                int(child)
                for task in Path(f"/proc/{pid}/task").iterdir()
                for child in (task / "children").read_text().split()
            ]
            found.append(pid)
        except OSError:
            continue
    return found


def load_of(pid):
    """-> (MiB of their own that a process and its children hold, their open files)."""
    mebibytes = files = 0
    for each in tree_of(pid):
        try:
            mebibytes += (
                sum(
                    int(line.split()[1])
                    for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
                    if line.startswith("Pss_Anon:")
                )
                / 1024
            )  # libraries are other processes' too
            files += len(list(Path(f"/proc/{each}/fd").iterdir()))
        except OSError:
            continue
    return mebibytes, files


def long(base, steps, early=200):
    """Trains on; -> {step: (MiB, open files)} at `early` steps and at the end."""
    data = write_coco(base / "data", {"train": 400, "val": 8})
    process = start(
        "--data", data, *SMALL, "--steps", steps + 100, "--workers", 2, "--eval-every", 100, "--out", base / "run"
    )
    log, loads = base / "run" / "log.jsonl", {}
    while process.poll() is None and len(loads) < 2:
        time.sleep(0.2)
        rows = log.read_text().splitlines() if log.exists() else []
        step = json.loads(rows[-1])["step"] if rows and rows[-1].endswith("}") else 0
        for mark in (early, steps):
            if step >= mark and mark not in loads:
                loads[mark] = load_of(process.pid)
    process.kill()
    said = process.communicate()[0]
    assert len(loads) == 2, said
    return loads


def draw_many_epochs(base, epochs=10_000):
    """-> seconds that the curves of so many epochs take."""
    losses = {f"loss_{k}": 1.0 + k for k in range(8)}
    rows = (
        {"epoch": i, "step": 3 * i, "losses": losses, "lr": 1e-4}
        | ({"AP": 0.5, "AP50": 0.6, "AP75": 0.5} if i % 3 == 0 else {})
        for i in range(1, epochs + 1)
    )
    (base / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    began = time.time()
    plots.draw_curves(base / "log.jsonl", base / "curves.png")
    return time.time() - began


def try_out(what, arguments):
    began = time.time()
    with tempfile.TemporaryDirectory() as base:
        if what == "long":
            for step, (mebibytes, files) in long(Path(base), arguments.steps).items():
                print(f"after {step} steps: {mebibytes:.1f} MiB, {files} open files")
            print(f"the curves of 10,000 epochs: {draw_many_epochs(Path(base)):.1f} s")
        else:
            signals, times = ([signal.SIGKILL], 30) if what == "kill" else ([signal.SIGTERM, signal.SIGINT], 10)
            sent, step = disturbed(Path(base), arguments.times or times, signals, arguments.seed, steps=180)
            print(
                f"{what}: {sent} signals, the last at step {step} or later; the end weights are those of an "
                "undisturbed run, to the bit"
            )
    print(f"{what}: {time.time() - began:.0f} seconds", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "stop", "long", "all"])
    parser.add_argument("--times", type=int, metavar="N", help="signals at most (default: 30 kills, 10 stops)")
    parser.add_argument("--steps", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for what in ("kill", "stop", "long") if arguments.what == "all" else (arguments.what,):
        try_out(what, arguments)
    if arguments.what == "all":
        sys.exit(
            subprocess.run(
                [
                    sys.executable,
                    str(Path(__file__).with_name("fuzz.py")),
                    "--cases",
                    "6000",
                    "--seed",
                    str(arguments.seed),
                ]
            ).returncode
        )


if __name__ == "__main__":
    main()
