"""What docs/reliability.md promises, the quick part; the long part is tests/fuzz.py and tests/torture.py."""

import base64
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, half_background, reference_weight, write_coco
from PIL import Image
from test_commands import SMALL, called, command
from torture import disturbed

import datasets
import infer
import layout_voc
import runs
import train
from checkpoint import read_checkpoint, save_checkpoint, settings_of, write_atomically
from detector import load
from detr_model import build_model
from errors import UserError, run_script
from layouts import load_splits
from settings import DEFAULTS, Settings
from transforms import read_image, train_transforms

# Crashes


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="prctl, by which they end at once, is Linux's; elsewhere PyTorch's workers ask now and then",
)
def test_helpers_end_with_the_process_that_they_help():
    helper = "start_worker(), print(os.getpid(), flush=True), time.sleep(60)"
    code = (
        "import multiprocessing, os, time; from distributed import start_worker; "
        f"multiprocessing.get_context('fork').Process(target=lambda: ({helper})).start()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    stat = Path(f"/proc/{int(process.stdout.readline())}/stat")
    assert stat.exists()
    process.kill()
    process.wait()

    def alive():
        return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    until = time.time() + 20
    while alive() and time.time() < until:
        time.sleep(0.1)
    assert not alive()


def test_a_disturbed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    """Killed, then asked to stop in two ways."""
    sent, _ = disturbed(tmp_path, 3, [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], steps=48)
    assert sent >= 2


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows has no groups of processes")
def test_a_signal_to_the_whole_group_ends_a_run_with_loaders(tiny_data, tmp_path):
    """As torchrun, timeout and schedulers send it: loaders must not die before the run is saved."""
    arguments = ["--data", tiny_data, *SMALL, "--steps", 100_000, "--workers", 2, "--save-every", 1e6]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, [*arguments, "--out", tmp_path / "run"])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if "training will take" in line:
            break
    os.killpg(process.pid, signal.SIGTERM)
    said = process.stdout.read()
    assert process.wait() == 130 and "stopped after step" in said, said
    assert read_checkpoint(tmp_path / "run" / "last.pth")["training"]["step"] >= 10


def test_terms_that_not_each_step_has_are_summed_up(tiny_data, tmp_path, monkeypatch, capsys):
    """A batch without an object has no noisy copies."""
    data = half_background(tiny_data, tmp_path / "data")
    real, sums = runs.Run.count_losses, []

    def count(self):
        sums.append(sum(float(v["loss_class_dn"]) for v in self.step_losses if "loss_class_dn" in v))
        return real(self)

    monkeypatch.setattr(runs.Run, "count_losses", count)
    arguments = ["--data", data, *SMALL, "--batch-size", 1, "--num-denoising", 10, "--epochs", 1]
    status, _, error = called(train.main, [*arguments, "--out", tmp_path / "run"], monkeypatch, capsys)
    assert status == 0 and min(sums) == 0 < max(sums), error
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert row["losses"]["loss_class_dn"] == pytest.approx(sum(sums) / len(sums), rel=1e-3)


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path):
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"step": 1})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match="last.pth: can't be written .*what it held before is whole"):
            save_checkpoint(path, {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fails(file):
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fails)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_run_folder_has_one_process(tiny_data, tmp_path):
    first = subprocess.Popen(
        [
            sys.executable,
            ROOT / "train.py",
            "--data",
            tiny_data,
            *SMALL,
            "--steps",
            "100000",
            "--save-every",
            "0",
            "--out",
            tmp_path / "run",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        until = time.time() + 60
        while not (tmp_path / "run" / "last.pth").exists():
            assert time.time() < until, "nothing was saved"
            time.sleep(0.1)
        second = command("train.py", "--resume", tmp_path / "run")
        assert second.returncode == 2 and second.stderr.strip().endswith(
            "another process is training in it; wait for it, or choose another --out"
        )
    finally:
        first.kill()
        first.communicate()


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_folder_that_can_not_be_written(place, tiny_data, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    status, _, error = called(
        train.main, ["--data", tiny_data, *SMALL, "--steps", 1, "--out", tmp_path / place], monkeypatch, capsys
    )
    assert status == 2 and error.count("\n") == 1 and "can't be written" in error


def test_a_log_that_a_crash_cut_off_is_gone_on_with(tmp_path):
    rows = [json.dumps({"epoch": i, "step": 3 * i}) + "\n" for i in range(1, 6)]
    (tmp_path / "log.jsonl").write_text("".join(rows) + rows[-1][:9])
    runs.open_folder(tmp_path, Settings(), 12, resumed=True)
    assert (tmp_path / "log.jsonl").read_text() == "".join(rows[:4])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_vanishes_ends_a_run_that_can_be_gone_on_with(workers, tiny_data, tmp_path, monkeypatch, capsys):
    real, trouble = datasets.read_image, tmp_path / "trouble"

    def reading(path, *more):
        if trouble.exists() and "train2017" in str(path):
            raise OSError("stale file handle")
        return real(path, *more)

    keep = runs.save_checkpoint
    monkeypatch.setattr(datasets, "read_image", reading)
    monkeypatch.setattr(
        runs,
        "save_checkpoint",
        lambda path, content: (keep(path, content), trouble.touch() if path.name == "last.pth" else None),
    )
    monkeypatch.setattr(
        train, "DetectionDataset", lambda split, transforms, *_: datasets.DetectionDataset(split, transforms)
    )
    status, _, error = called(
        train.main,
        [
            "--data",
            tiny_data,
            *SMALL,
            "--steps",
            60,
            "--save-every",
            0,
            "--workers",
            workers,
            "--out",
            tmp_path / "run",
        ],
        monkeypatch,
        capsys,
    )
    assert status == 2 and error.count("\n") == 1, error
    assert (
        "train2017" in error
        and "can't be read any more (stale file handle); what was learnt is saved, go on with --resume" in error
    )
    assert read_checkpoint(tmp_path / "run" / "last.pth")["training"]["step"] >= 1


def test_a_camera_that_runs_for_days_fills_no_memory(tmp_path):
    """Rows of detections.json go to the disk as they come, under another name until all are there."""
    rows = infer.JsonList(tmp_path / "detections.json")
    rows.extend([{"a": 1}])
    rows.extend([])
    rows.extend([{"a": 2}, {"a": "<3>"}])
    assert not (tmp_path / "detections.json").exists() and rows.count == 3
    rows.close()
    assert (
        json.loads((tmp_path / "detections.json").read_text()) == [{"a": 1}, {"a": 2}, {"a": "<3>"}]
        and len(list(tmp_path.iterdir())) == 1
    )
    infer.JsonList(tmp_path / "none.json").close()
    assert json.loads((tmp_path / "none.json").read_text()) == []
    with pytest.raises(UserError, match="can't be written"):
        infer.JsonList(tmp_path / "nowhere" / "detections.json")


def test_a_full_gpu_is_said_in_a_line(monkeypatch, capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    status, _, error = called(full, [], monkeypatch, capsys)
    assert status == 2 and error.count("\n") == 1 and "--device-batch" in error
    with pytest.raises(SystemExit):
        run_script(full, "fewer images take less")
    assert capsys.readouterr().err == "error: the GPU's memory is full; fewer images take less\n"


# Numbers that go bad


def poisoned(monkeypatch, steps):
    """Pictures of these steps hold a NaN."""
    real, calls = train.collate, []

    def collate(batch, divisor):
        images, mask, targets = real(batch, divisor)
        calls.append(len(calls))
        if calls[-1] in steps:
            images[0, :, 3, 3] = torch.nan
        return images, mask, targets

    monkeypatch.setattr(train, "collate", collate)
    return calls


RUN = [
    "--backbone",
    "ecvit-nano",
    "--backbone-weights",
    "none",
    "--image-size",
    "64",
    "--batch-size",
    "4",
    "--num-queries",
    "20",
    "--workers",
    "0",
    "--eval-every",
    "99",
    "--save-every",
    "0",
]


@pytest.mark.parametrize("detector", ["detr", "ecdet", "ssd"])
def test_a_step_that_is_not_finite_is_left_out(detector, tiny_data, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {4})
    status, out, error = called(
        train.main,
        ["--data", tiny_data, *RUN, "--detector", detector, "--steps", 9, "--out", tmp_path / "run"],
        monkeypatch,
        capsys,
    )
    assert status == 0, error
    assert out.count("not finite") == 1
    content = read_checkpoint(tmp_path / "run" / "last.pth")
    for key, value in (content["model"] | content["training"]["model"]).items():
        assert value.isfinite().all(), key
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 1] and all(
        np.isfinite(list(row["losses"].values())).all() for row in rows
    )


def test_three_in_a_row_roll_back_with_half_the_learning_rate(tiny_data, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {3, 4, 5})
    restored = []
    real = train.distributed.load
    monkeypatch.setattr(
        train.distributed,
        "load",
        lambda model, optimizers, state: (
            restored.append({k: v.clone() for k, v in state["model"].items()}),
            real(model, optimizers, state),
        ),
    )
    status, out, error = called(
        train.main,
        ["--data", tiny_data, *RUN, "--steps", 12, "--keep-every", 1, "--out", tmp_path / "run"],
        monkeypatch,
        capsys,
    )
    assert status == 0, error
    assert "three in a row: back to the weights of" in out and len(restored) == 2
    kept = read_checkpoint(tmp_path / "run" / "epoch0001.pth")["model"]  # of the average, after step 3
    assert all(torch.equal(restored[1][key], value) for key, value in kept.items())
    state = read_checkpoint(tmp_path / "run" / "last.pth")["training"]
    assert state["lr_scale"] == 0.5 and state["step"] == 12


def test_when_rolling_back_does_not_help_the_pictures_are_named(tiny_data, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, set(range(3, 50)))
    status, _, error = called(
        train.main,
        ["--data", tiny_data, *RUN, "--steps", 30, "--keep-every", 1, "--out", tmp_path / "run"],
        monkeypatch,
        capsys,
    )
    assert status == 2 and error.count("\n") == 1 and "bad_batches.txt" in error
    named = (tmp_path / "run" / "bad_batches.txt").read_text().splitlines()
    assert len(named) == 12 and all(Path(name).exists() for name in named)
    first, last = (read_checkpoint(tmp_path / "run" / name)["model"] for name in ("epoch0001.pth", "last.pth"))
    assert all(torch.equal(first[key], last[key]) for key in first)


@pytest.mark.parametrize("kind", ["zoom", "meta", "strong"])
def test_no_augmentation_gives_a_box_without_a_size(kind, tmp_path):
    root = write_coco(tmp_path / "data", {"train": 8, "val": 1}, size=(120, 80))
    path = root / "annotations" / "instances_train.json"
    data = json.loads(path.read_text())
    rng = np.random.default_rng(0)
    for annotation in data["annotations"]:  # slivers, specks, boxes at the edge
        x, y = rng.uniform(0, 119), rng.uniform(0, 79)
        annotation["bbox"] = [
            x,
            y,
            float(rng.choice([1e-9, 0.01, 0.4, 2, 50, 300])),
            float(rng.choice([1e-9, 0.01, 0.4, 2, 30, 80])),
        ]
    path.write_text(json.dumps(data))
    samples = datasets.DetectionDataset(load_splits(root)[0], train_transforms(160, kind))
    kept = 0
    for seed in range(300):
        _, target = samples[(seed % 8, seed, (seed % 7) / 7 if seed % 5 else None, kind == "strong" and seed % 2 == 0)]
        assert (target["boxes"][:, 2:] > 0).all() and target["boxes"].isfinite().all()
        kept += len(target["boxes"])
    assert kept > 50


# Bad data, hostile data


def test_damaged_data_sets_are_read_right_or_refused():
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz.py", "--cases", "400", "--seed", str(1_000_000)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused" in done.stdout and "read as it was" in done.stdout


def opened_while(action):
    """-> what action opened, for reading or writing."""
    paths, listening = [], [True]
    sys.addaudithook(
        lambda event, arguments: paths.append(str(arguments[0])) if event == "open" and listening else None
    )
    try:
        action()
    finally:
        listening.clear()
    return paths


OUT_OF_THE_DATA_SET = [
    "absolute",
    "dots",
    "link",
    "folder link",
    "xml",
    "stem",
    "yolo list",
    "yolo folder",
    "annotations",
]


@pytest.mark.parametrize("how", OUT_OF_THE_DATA_SET)
def test_no_file_outside_of_the_data_set_is_read(how, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.mkdir()
    Image.new("RGB", (64, 48)).save(secret / "a.png")
    (secret / "a.txt").write_text("0 0.5 0.5 0.2 0.2")
    (secret / "a.xml").write_text(
        "<annotation><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
    )
    root = write_coco(tmp_path / "data", {"train": 2, "val": 2})
    file = root / "annotations" / "instances_train.json"
    data = json.loads(file.read_text())
    (secret / "instances_train.json").write_text(file.read_text())
    if how in ("absolute", "dots"):
        data["images"][0]["file_name"] = str(secret / "a.png") if how == "absolute" else "../../secret/a.png"
        file.write_text(json.dumps(data))
    elif how == "link":
        (root / "train" / "000.png").unlink()
        (root / "train" / "000.png").symlink_to(secret / "a.png")
    elif how == "folder link":
        data["images"][0]["file_name"] = "in/a.png"
        file.write_text(json.dumps(data))
        (root / "train" / "in").symlink_to(secret)
    elif how == "annotations":
        file.unlink()
        file.symlink_to(secret / "instances_train.json")
    elif how in ("xml", "stem"):
        for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
            (root / folder).mkdir(parents=True)
        for part in ("train", "val"):
            (root / "ImageSets" / "Main" / f"{part}.txt").write_text("../../secret/a" if how == "stem" else "a")
        if how == "xml":
            Image.new("RGB", (64, 48)).save(root / "JPEGImages" / "a.png")
            (root / "Annotations" / "a.xml").symlink_to(secret / "a.xml")
    else:
        (root / "list.txt").write_text(str(secret / "a.png"))
        place = "list.txt" if how == "yolo list" else "../secret"
        (root / "data.yaml").write_text(f"names: [cat]\ntrain: {place}\nval: {place}\n")
    refusals = []

    def read():
        with pytest.raises(UserError) as caught:
            load_splits(root)
        refusals.append(str(caught.value))

    opened = opened_while(read)
    assert not [path for path in opened if str(secret) in os.path.realpath(path)]
    assert "lies outside of" in refusals[0] and "--allow-outside" in refusals[0]
    if how not in ("xml", "stem", "yolo list", "yolo folder"):
        assert len(load_splits(root, allow_outside=True)[0].records) == 2


def test_an_expanding_annotation_is_refused_at_once(tmp_path):
    from fuzz import BOMB, OUTSIDE, header_of

    for content in (BOMB, OUTSIDE):
        (tmp_path / "a.xml").write_text(content)
        with pytest.raises(UserError, match="a.xml: not a Pascal VOC annotation .it defines entities"):
            layout_voc.read_voc_file(tmp_path / "a.xml")
    (tmp_path / "a.png").write_bytes(header_of(13000, 13000))
    with pytest.raises(OSError, match="169,000,000 pixels in .* a decompression bomb"):
        read_image(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(OSError):  # PIL would run Ghostscript
        read_image(tmp_path / "b.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (6000, 6000), dtype=np.uint8)).save(
        tmp_path / "large.png"
    )
    assert read_image(tmp_path / "large.png").size == (6000, 6000)  # large, and no bomb


CONFIG = DEFAULTS | dict(
    detector="detr",
    backbone="ecvit-nano",
    backbone_weights="none",
    num_classes=2,
    num_queries=20,
    hidden_dim=32,
    num_heads=2,
    ffn_dim=32,
    decoder_layers=1,
    image_size=64,
)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(detector="os.system"), "describe no detector"),
        (dict(backbone="../../x"), "no backbone is called"),
        (dict(hidden_dim=2**40), "hidden_dim is not in"),
        (dict(num_queries=-1), "num_queries is not in"),
        (dict(num_heads=0), "num_heads is not in"),
        (dict(num_classes=10**9), "do not belong together"),
        (dict(hidden_dim="64"), "describe no detector"),
        (dict(hidden_dim=8192), "of another shape"),
        (dict(decoder_layers=90), "missing"),
        (dict(decoder_layers=10**9), "decoder_layers is not in"),
        (dict(layers="1;import os"), "--layers"),
        (None, "describe no detector"),
        (dict(attention="sideways"), "describe no detector"),
        (dict(distinct=7), "describe no detector"),
    ],
)
def test_settings_from_a_stranger_are_not_believed(change, message, tmp_path):
    model = build_model(CONFIG | {"backbone_weights": None})[0]
    config = None if change is None else CONFIG | change
    save_checkpoint(
        tmp_path / "a.pth",
        {"model": model.state_dict(), "config": config, "classes": ["a", "b"], "category_ids": [1, 2]},
    )
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.pth", device="cpu")


def test_a_checkpoint_opens_nothing_but_itself(tmp_path):
    for name in ("weights.pth", "init.pth", "data"):
        (tmp_path / name).write_text("")
    model = build_model(CONFIG | {"backbone_weights": None})[0]
    config = CONFIG | {
        "backbone_weights": str(tmp_path / "weights.pth"),
        "init": str(tmp_path / "init.pth"),
        "data": str(tmp_path / "data"),
        "out": str(tmp_path / "out"),
    }
    save_checkpoint(
        tmp_path / "a.pth",
        {"model": model.state_dict(), "config": config, "classes": ["a", "b"], "category_ids": [1, 2]},
    )
    opened = opened_while(lambda: load(tmp_path / "a.pth", device="cpu"))
    assert {path for path in opened if str(tmp_path) in path} == {str(tmp_path / "a.pth")}


def test_a_pickle_that_poses_as_a_checkpoint_is_refused_by_name(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'sprung'}",))

    torch.save({"model": Trap(), "format": 1, "config": {}}, tmp_path / "trap.pth")
    with pytest.raises(
        UserError, match=r"trap.pth: not a checkpoint of weights alone: it holds code .*system.*never run"
    ):
        read_checkpoint(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


NO_NETWORK = """
import runpy, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        print("NETWORK", event, arguments[1:], flush=True)
sys.addaudithook(refuse)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_nothing_is_downloaded_that_was_not_asked_for(tiny_data, tmp_path):
    (tmp_path / "watch.py").write_text(NO_NETWORK)
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | {
        "TORCH_HOME": str(tmp_path / "torch"),
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": str(ROOT),
    }

    def watched(script, *arguments):
        return subprocess.run(
            [sys.executable, tmp_path / "watch.py", ROOT / script, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            timeout=200,
        )

    trained = watched(
        "train.py",
        "--data",
        tiny_data,
        *SMALL,
        "--backbone",
        "dinov2-small",
        "--image-size",
        56,
        "--backbone-weights",
        "none",
        "--steps",
        1,
        "--out",
        tmp_path / "run",
    )
    assert trained.returncode == 0, trained.stderr
    found = watched(
        "infer.py", tiny_data / "val2017", "--checkpoint", tmp_path / "run" / "best.pth", "--out", tmp_path / "found"
    )
    assert found.returncode == 0 and "NETWORK" not in trained.stdout + found.stdout
    for arguments in (
        ["--backbone", "ecvitt"],
        ["--backbone", "dinov2-small"],
        ["--init", "ecdet_s.pth"],
        ["--init", "Intellindust/ECDet_S"],
        ["--init", "someone/cats"],
    ):
        refused = watched("train.py", "--data", tiny_data, "--offline", *arguments, "--out", tmp_path / "other")
        assert refused.returncode == 2 and "NETWORK" not in refused.stdout, refused.stdout
        assert refused.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in refused.stderr


# Old files


def test_a_checkpoint_of_the_first_format_still_opens(tmp_path):
    """tests/parity/format1.json: a detector of 2026-11, its weights run-length coded, and its detections of then."""
    old = json.loads((ROOT / "tests" / "parity" / "format1.json").read_text())
    (tmp_path / "old.pth").write_bytes(gzip.decompress(base64.b64decode(old["file"])))
    picture = np.full((48, 64, 3), 90, dtype=np.uint8)
    picture[10:30, 12:40] = (200, 30, 30)
    found = load(tmp_path / "old.pth", device="cpu", threshold=0.0)(picture)
    assert found["names"] == old["names"]
    np.testing.assert_allclose(found["scores"], old["scores"], atol=1e-5)
    np.testing.assert_allclose(found["boxes"], old["boxes"], atol=1e-2)


OF_MAIN = json.loads((ROOT / "tests" / "parity" / "main_2026_11.json").read_text())


def old_picture(h, w, seed):
    rng = np.random.default_rng(seed)
    picture = np.full((h, w, 3), 90, dtype=np.uint8)
    for _ in range(6):
        x, y = rng.integers(0, w - 20), rng.integers(0, h - 20)
        picture[y : y + rng.integers(8, 60), x : x + rng.integers(8, 60)] = rng.integers(0, 255, 3)
    return picture


@pytest.mark.parametrize("name", OF_MAIN["detectors"])
def test_a_checkpoint_of_november_2026_gives_its_detections_of_then(name, tmp_path):
    """Its settings lack those that came since, which then mean what was done without them.

    Weights are drawn by key and shape.
    """
    old = OF_MAIN["detectors"][name]
    state = build_model(settings_of(old["config"]), load_weights=False)[0].state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == old["shapes"] | old["other"]
    state |= {key: reference_weight(key, shape) for key, shape in old["shapes"].items()}
    save_checkpoint(
        tmp_path / "old.pth",
        {"model": state, "config": old["config"], "classes": ["a", "b", "c"], "category_ids": [1, 2, 3]},
    )
    detector = load(tmp_path / "old.pth", device="cpu", threshold=0.0)
    for seed, ((h, w), then) in enumerate(zip(OF_MAIN["pictures"], old["found"])):
        found = detector(old_picture(h, w, seed))
        for label, score, box in zip(then["labels"], then["scores"], then["boxes"]):
            apart = 100 * (found["scores"] - score).abs() + (found["boxes"] - torch.tensor(box)).abs().amax(1)
            assert apart[found["labels"] == label].min() < 0.02, (label, score, box)


def test_a_newer_format_is_refused(tmp_path):
    torch.save({"format": 99, "model": {}, "config": {}, "classes": []}, tmp_path / "new.pth")
    with pytest.raises(UserError, match="new.pth: written by a newer version .format 99"):
        read_checkpoint(tmp_path / "new.pth")
