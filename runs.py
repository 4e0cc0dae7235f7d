"""A training run: where it stands, what it writes into its folder, and what it does when something fails.

`Run` has a method for each thing that the loop of train.py does besides training. config.json, log.jsonl, last.pth,
best.pth and the pictures of a run are written here and nowhere else.
"""

import json
import math
import os
import re
import signal
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import distributed
import plots
from checkpoint import read_checkpoint, save_checkpoint, write_atomically
from datasets import DetectionDataset
from devices import autocast
from errors import UserError
from evaluate import evaluate
from mistakes import describe_thresholds, find_thresholds, judge
from report import draw_report, write_report
from resolve import as_options, describe_cost
from settings import DEFAULTS
from tiles import cut_into_tiles
from trackers import open_trackers, scalars_of

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

REPORT = ("precision_recall.png", "confusion.png", "report.html")  # of a run that ended
EVALUATION_COST = 9  # by default there are as many seconds of training to each one of evaluation
RENAMED = {"spent": "train_seconds", "best": "best_ap", "sums": "loss_sums", "counted": "loss_count"}  # in older files


@dataclass
class State:
    """Where a run stands; kept in last.pth."""

    step: int = 0
    train_seconds: float = 0.0  # without evaluation
    best_ap: float = -math.inf
    best_epoch: int = 0
    loss_sums: dict = field(default_factory=dict)  # of the epoch so far
    loss_count: int = 0
    lr_scale: float = 1.0  # halved whenever the run had to go back to last.pth
    out_of_patience: bool = False


class Run:
    """s: Settings; train, val: Splits; ema: the EMA of the model, or None; saved: the last.pth to resume from, or None.

    Used as a context manager, which holds the folder's lock and listens to Ctrl-C. Raises UserError.
    """

    def __init__(self, s, train, val, model, ema, optimizers, device, saved=None, given=None):
        self.s, self.train, self.val, self.device, self.given = s, train, val, device, given
        self.shown = cut_into_tiles(val, s.tile, for_training=False) if s.tile else val  # in evaluation
        self.model, self.ema, self.optimizers = model, ema, optimizers
        self.detector = model if ema is None else ema  # what is evaluated and kept
        self.scaler = torch.amp.GradScaler(device.type, enabled=s.precision == "float16")
        self.folder, self.resumed = Path(s.out), saved is not None
        self.is_main = distributed.is_main_process()
        self.can_save_alone = not s.shard or distributed.world_size() == 1
        self.steps_per_epoch = math.ceil(len(train.records) / self.images_per_step)
        self.total_steps = min(s.steps or math.inf, (s.epochs or math.inf) * self.steps_per_epoch)
        self.state = State()
        if saved:
            self.resume(saved)
        if not self.is_main:  # every process draws its own noise
            torch.manual_seed(s.seed + 1000 * distributed.rank() + self.state.step)

        self.signals = 0  # Ctrl-C so far; the first lets the step under way finish
        self.stopped = False
        self.first_step, self.warm_seconds = self.state.step, self.state.train_seconds
        self.last_saved = -math.inf  # so that there is a last.pth from the first step on
        self.save_due = False
        self.last_evaluation, self.evaluation_seconds = time.time(), 0.0
        self.figures = self.best_result = None  # of the latest evaluation; curves and detections of the best one
        self.skipped = self.skipped_before = 0  # steps without a finite gradient; by the end of the last epoch
        self.bad_batches, self.rolled_back = [], False  # the images of skipped steps in a row
        buffers = model.named_buffers()
        self.statistics = [b for name, b in buffers if name.endswith(("running_mean", "running_var"))]
        self.statistics_before = [b.clone() for b in self.statistics]
        self.trackers, self.bar = [], None

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        with ExitStack() as resources:
            if self.is_main:
                resources.enter_context(locked(self.folder))
                open_folder(self.folder, self.s, self.state.step, self.resumed)
                self.trackers = open_trackers(self.folder, self.s)
            self.resources = resources.pop_all()
        layout = "{desc} {percentage:3.0f}% {bar:20} {postfix}"
        self.bar = tqdm(total=100, bar_format=layout, disable=None if self.is_main else True, leave=False)
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        try:
            if error is not None and distributed.is_lost_process(error):
                self.explain_lost_process(error)
        finally:
            self.resources.close()

    # Where it stands

    @property
    def step(self):
        return self.state.step

    @property
    def images_per_step(self):
        return self.s.batch_size * self.s.accumulate

    @property
    def epoch(self):
        """How many epochs have begun, the one under way included."""
        return math.ceil(self.step / self.steps_per_epoch)

    @property
    def progress(self):
        """How much of the budget is used, in [0, 1]."""
        return self.progress_at(self.step)

    def progress_at(self, step):
        minutes = self.state.train_seconds / 60
        return max(step / self.total_steps, minutes / self.s.minutes if self.s.minutes else 0.0)

    @property
    def is_over(self):
        return self.progress >= 1 or self.stopped or self.state.out_of_patience

    @property
    def epoch_is_over(self):
        return self.step % self.steps_per_epoch == 0 or self.progress >= 1

    @property
    def backbone_is_frozen(self):
        freeze = self.s.freeze_backbone
        return freeze == "all" or self.step < freeze * self.steps_per_epoch

    @property
    def lacks_last_evaluation(self):
        """Whether a run that is resumed had failed in the evaluation at its end; all processes have to ask."""
        rows = read_rows(self.folder / "log.jsonl") if self.resumed and self.progress >= 1 and self.is_main else None
        return distributed.broadcast(rows is not None and not (rows and json.loads(rows[-1])["step"] == self.step))

    def phase(self, shown):
        """How the image after `shown` others is augmented, see datasets.EndlessBatches."""
        return augmentation_phase(
            shown // len(self.train.records), self.progress_at(shown // self.images_per_step), self.s
        )

    def on_signal(self, *_):
        self.signals += 1
        if self.signals > 2:
            raise KeyboardInterrupt

    def asked_to_stop(self):
        """Whether any process was sent a signal; all processes have to ask."""
        return bool(distributed.all_reduce_max([float(self.signals > 0)], self.device)[0])

    # A step

    def freeze_backbone(self):
        """What the backbone's weights hold is trained or not, as it is time; what they don't is trained in any case."""
        backbone, is_trained = self.model.backbone, not self.backbone_is_frozen
        backbone.requires_grad_(is_trained).train(is_trained)
        for name in self.s.random_parts or ():
            if getattr(backbone, name) is not None:
                getattr(backbone, name).requires_grad_(True).train()

    def begin_step(self):
        self.step_started, self.step_losses = time.time(), []
        if self.statistics:
            torch._foreach_copy_(self.statistics_before, self.statistics)

    def show_batch(self, images, mask, targets):
        """Draws the first batch of the run as the network sees it."""
        if self.step == 0 and self.is_main:
            plots.draw_batch(images, mask, targets, self.train.classes).save(self.folder / "train_batch.png")

    def add_losses(self, losses):
        self.step_losses.append({name: value.detach() for name, value in losses.items()})

    def count_losses(self):
        """After a step with finite gradients."""
        for losses in self.step_losses:
            sums = self.state.loss_sums
            sums |= {name: sums.get(name, 0.0) + value for name, value in losses.items()}  # not each step has all terms
        self.state.loss_count += len(self.step_losses)
        self.bad_batches = []

    def skip_step(self, batches):
        """After a step whose gradients are not finite, on `batches`: weights and batch statistics stay what they were.

        Three in a row lead back to last.pth, once, with half the learning rate; after that the run gives up.
        """
        if self.float16_overflowed():
            return  # the scaler halves its factor: float16 is meant to run into its range now and then
        if self.statistics:
            torch._foreach_copy_(self.statistics, self.statistics_before)
        self.skipped += 1
        self.bad_batches.append([str(self.train.records[t["image_id"]].path) for *_, ts in batches for t in ts])
        tqdm.write(f"step {self.step}: the loss or a gradient is not finite; step skipped, {self.skipped} so far")
        if len(self.bad_batches) < 3:
            return
        last = self.folder / "last.pth"
        if self.rolled_back or not distributed.broadcast(last.exists()):
            self.give_up()
        self.restore(distributed.broadcast(read_checkpoint(last) if self.is_main else None))
        self.rolled_back, self.bad_batches = True, []
        self.state.lr_scale /= 2
        tqdm.write(f"three in a row: back to the weights of {last}, with half the learning rate from now on")

    def float16_overflowed(self):
        """Whether gradients alone are not finite, and float16's scaler can still be lowered."""
        broken = not all(bool(value.isfinite()) for losses in self.step_losses for value in losses.values())
        broken = distributed.all_reduce_max([float(broken)], self.device)[0]
        return self.scaler.is_enabled() and not broken and self.scaler.get_scale() > 1

    def finish_step(self):
        """Counts the step, shows where the run stands, and saves it if that is due."""
        state = self.state
        state.step += 1
        seconds = state.train_seconds + time.time() - self.step_started
        save_due = not self.bad_batches and time.time() - self.last_saved >= self.s.save_every
        agreed = distributed.all_reduce_max([seconds, float(self.signals > 0), float(save_due)], self.device)
        state.train_seconds, self.stopped, self.save_due = agreed[0], bool(agreed[1]), bool(agreed[2])
        if state.step == self.first_step + 2:  # the first steps are slower
            self.warm_seconds = seconds
        if state.step == self.first_step + 10 and self.progress < 1:
            seconds, left = (state.train_seconds - self.warm_seconds) / 8, self.total_steps - state.step
            given, world = None if self.resumed else self.given, distributed.world_size()
            for line in describe_cost(state.train_seconds, seconds, left, self.s, given, world):
                tqdm.write(line)
        if not self.bar.disable and state.step % 5 == 0:
            self.show_progress()
        if self.save_due and not self.epoch_is_over:
            self.save_last()

    def show_progress(self):
        seconds = self.state.train_seconds
        left = seconds / self.progress - seconds
        loss = float(sum(self.step_losses[-1].values()))
        self.bar.n = min(100, 100 * self.progress)
        self.bar.set_description_str(f"epoch {self.epoch}")
        speed = f"{self.step / seconds * 60:.0f} steps/min"
        self.bar.set_postfix_str(f"loss {loss:.2f}  {speed}  {left // 60:.0f}:{left % 60:02.0f} left")

    # An epoch

    def evaluation_is_due(self):
        """At the end of an epoch; all processes have to ask. The end of the budget is saved before it is evaluated."""
        if self.progress >= 1:
            self.save_last()
            return True
        if self.s.eval_every:
            due = self.epoch % self.s.eval_every == 0
        else:
            due = time.time() - self.last_evaluation >= EVALUATION_COST * self.evaluation_seconds
        return distributed.broadcast(due) and not self.stopped

    def evaluate(self, postprocess, loader):
        """Measures the detector on the validation images and keeps it if it is the best so far."""
        started, last = time.time(), self.progress >= 1
        stop = None if last else self.asked_to_stop
        self.figures, curves, detections = self.measure(postprocess, loader, stop)
        self.last_evaluation, self.evaluation_seconds = time.time(), time.time() - started
        if self.figures is None:
            self.stopped = True
        elif self.figures["AP"] >= self.state.best_ap:
            self.state.best_ap, self.state.best_epoch = self.figures["AP"], self.epoch
            self.best_result = detections, curves
            self.save("best.pth", figures=self.figures)
            if self.is_main:
                samples = draw_samples(DetectionDataset(self.val, None), detections, self.val.classes)
                samples.save(self.folder / "val_samples.png")

    def measure(self, postprocess, loader, stop):
        distributed.broadcast_buffers(self.detector)
        with autocast(self.s.precision, self.device):
            return evaluate(self.detector, postprocess, self.loading(loader), self.shown, self.device, stop)

    def finish_epoch(self):
        """Writes a line of log.jsonl, the curves and the checkpoints that are due."""
        epoch, state, row = self.epoch, self.state, self.row()
        figures, self.figures = self.figures, None
        if figures is not None:
            row |= {name: round(value, 4) for name, value in figures.items()}
            state.out_of_patience = self.s.patience is not None and epoch - state.best_epoch >= self.s.patience
        if self.is_main:
            with open(self.folder / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            if figures is not None:
                plots.draw_curves(self.folder / "log.jsonl", self.folder / "curves.png")
        for log in list(self.trackers):
            try:
                log(scalars_of(row), row["step"])
            except Exception as error:  # a server that is gone costs no training
                self.trackers.remove(log)
                tqdm.write(f"warning: a tracker is left out from now on ({type(error).__name__}: {error})")
        measured = f"AP {row['AP']:.3f}  AP50 {row['AP50']:.3f}" if figures else "AP -"
        loss = sum(row["losses"].values())
        tqdm.write(f"epoch {epoch:3d}  {state.train_seconds / 60:5.1f} min  loss {loss:7.3f}  {measured}")
        state.loss_sums, state.loss_count = {}, 0
        if self.save_due or self.progress >= 1 or state.best_epoch == epoch:  # last.pth knows how good best.pth is
            self.save_last()
        self.rolled_back = self.rolled_back and self.skipped > self.skipped_before
        self.skipped_before = self.skipped
        if self.s.keep_every and epoch % self.s.keep_every == 0:
            self.save(f"epoch{epoch:04d}.pth")

    def row(self):
        """The epoch's line of log.jsonl, without figures."""
        state = self.state
        lr = self.optimizers[0].param_groups[-1]["lr"]
        row = {
            "epoch": self.epoch,
            "step": self.step,
            "minutes": round(state.train_seconds / 60, 3),
            "lr": lr,
            "losses": {},
        }
        for name in distributed.all_gather(dict.fromkeys(state.loss_sums)):  # a process without objects has fewer
            mean = state.loss_sums.get(name, 0.0) / max(1, state.loss_count)
            row["losses"][name] = round(float(distributed.all_reduce_mean(mean, self.device)), 5)
        return row | ({"skipped": self.skipped} if self.skipped else {})

    # The end

    def finish(self, postprocess, loader):
        """Saves what is left, draws the report of the best epoch, and says how to go on -> exit status."""
        self.bar.close()
        if self.progress < 1:
            self.save_last()
        finished = self.state.out_of_patience or self.progress >= 1
        best = self.folder / "best.pth"
        if self.resumed and self.step == self.first_step and self.is_reported:
            self.say_nothing_is_left()
            return 0
        if self.best_result is None and finished and distributed.broadcast(best.exists()):  # it was before a --resume
            content = distributed.broadcast(read_checkpoint(best) if self.is_main else None)
            distributed.load(self.detector, [], content)
            figures, curves, detections = self.measure(postprocess, loader, self.asked_to_stop)
            self.best_result = (detections, curves) if figures else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # all is saved: there is nothing left to stop
        if self.state.out_of_patience:
            print(f"no better AP in {self.s.patience} epochs; ended after step {self.step}")
        elif not finished:
            print(f"stopped after step {self.step}; go on with: python train.py --resume {self.folder}")
            return 130
        if self.best_result is not None and self.is_main:
            self.report(best)
        minutes = self.state.train_seconds / 60
        result = f"best AP {self.state.best_ap:.3f} after {minutes:.1f} minutes of training"
        print(f"{result}; curves and pictures are in {self.folder}. To detect:")
        print(f"  python infer.py IMAGE --checkpoint {best}")
        return 0

    def report(self, best):
        """Writes the report of the best epoch, and adds the thresholds that were found to best.pth."""
        content, (detections, curves) = read_checkpoint(best), self.best_result
        findings = judge(self.val, detections)
        thresholds = find_thresholds(findings)
        save_checkpoint(best, content | {"thresholds": thresholds})
        draw_report(self.val, findings, thresholds, curves, self.folder)
        log = [json.loads(row) for row in read_rows(self.folder / "log.jsonl")]
        figures = content.get("figures", {})
        write_report(
            self.folder / "report.html", str(self.folder), self.val, findings, thresholds, figures, curves, log
        )
        print(describe_thresholds(thresholds))

    @property
    def is_reported(self):
        """Whether the run ended before: its last epoch is logged and the report of its best one drawn."""
        rows = read_rows(self.folder / "log.jsonl")
        ended = bool(rows) and json.loads(rows[-1])["step"] == self.step and self.is_over
        drawn = all((self.folder / name).exists() for name in ("best.pth", *REPORT))
        return distributed.broadcast(ended and drawn)

    def say_nothing_is_left(self):
        of_data = ["layout", "train_split", "val_split", "classes", "single_class", "tile", "flip", "allow_outside"]
        of_data += ["skip_bad_images", "large_images", *(["val_fraction"] if self.train.is_fraction else [])]
        given = {"data": self.s.data, "init": str(self.folder / "best.pth")}
        given |= {key: getattr(self.s, key) for key in of_data if getattr(self.s, key) != DEFAULTS[key]}
        print(f"nothing is left: the run ended after step {self.step}, best AP {self.state.best_ap:.3f}. To train on:")
        print(f"  python train.py {as_options(given)} --epochs {max(1, math.ceil(self.epoch / 2))}")

    # Checkpoints

    def save(self, name, **more):
        """Writes a checkpoint of the detector; all processes have to take part."""
        content = {"model": distributed.unshard(self.detector.state_dict()), "config": vars(self.s)}
        content |= {"classes": self.train.classes, "category_ids": self.train.category_ids}
        if self.is_main:
            save_checkpoint(self.folder / name, content | more)

    def save_last(self):
        """Writes last.pth, from which --resume goes on as if the run had never stopped."""
        state = {f.name: getattr(self.state, f.name) for f in fields(State)}
        state |= {"model": distributed.unshard(self.model.state_dict())}
        state |= {"optimizers": [distributed.unshard(optimizer.state_dict()) for optimizer in self.optimizers]}
        state |= {"images": [len(self.train.records), len(self.val.records)]}
        state |= {"scaler": self.scaler.state_dict(), "rng": torch.get_rng_state()}
        state |= {"cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None}
        self.save("last.pth", training=state)
        self.last_saved = time.time()

    def restore(self, saved):
        """The weights, their EMA and the optimizers' state become those of a last.pth."""
        distributed.load(self.model, self.optimizers, saved["training"])
        distributed.load(self.detector, [], saved)

    def resume(self, saved):
        self.restore(saved)
        state = {RENAMED.get(key, key): value for key, value in saved["training"].items()}
        self.state = State(**{f.name: state[f.name] for f in fields(State) if f.name in state})
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])

    # Failures

    def loading(self, loader):
        """The batches of a loader. If the next can't be loaded, the run is saved first.

        Raises UserError if an image or a worker is gone, and anything else, a bug, as it came.
        """
        try:
            yield from loader
        except Exception as error:  # a worker's comes with its traceback as its message
            if self.can_save_alone:
                self.save_last()
            killed = isinstance(error, RuntimeError) and re.search("DataLoader worker .*(exited|killed)", str(error))
            if not killed and not isinstance(error, (UserError, OSError)):
                raise
            cause = str(error).strip().splitlines()[-1].removeprefix("errors.UserError: ")
            if killed:
                first = str(error).splitlines()[0][:200]
                cause = f"a worker that loads images was killed, perhaps because memory ran out ({first})"
            raise UserError(f"{cause}; {self.how_to_go_on()}") from None

    def explain_lost_process(self, error):
        """The other processes are gone: saves what can be saved. Raises UserError."""
        if self.can_save_alone:
            self.save_last()
        first = str(error).strip().splitlines()[0][:120]
        raise UserError(f"another process was lost ({first}); {self.how_to_go_on('torchrun ... train.py ')}") from None

    def how_to_go_on(self, command=""):
        if not (self.folder / "last.pth").exists():
            return "nothing was saved yet"
        return f"what was learnt is saved, go on with {command}--resume {self.folder}"

    def give_up(self):
        """Lists the images that led to numbers that are not finite. Raises UserError."""
        by_process = distributed.all_gather({distributed.rank(): self.bad_batches})
        names = [name for batches in by_process.values() for batch in batches for name in batch]
        listed = self.folder / "bad_batches.txt"
        if self.is_main:
            listed.write_text("".join(f"{name}\n" for name in names), encoding="utf-8", errors="surrogateescape")
        raise UserError(
            f"three steps in a row without a finite loss, and no way back; their {len(names)} images "
            f"({', '.join(names[:3])}, ...) are listed in {listed}. Look at them, or try a lower --lr than "
            f"{self.s.lr}, or --precision float32"
        )


def augmentation_phase(passes, progress, s):
    """passes over the data, progress in [0, 1) of the budget -> "plain", "varied" or "mixed", see EndlessBatches."""
    passes_left = passes * (1 - progress) / progress if progress else math.inf
    at_the_end = progress >= 1 - s.plain_end and passes_left <= (s.plain_end_passes or math.inf)
    if passes < s.plain_passes or at_the_end:
        return "plain"
    return "mixed" if progress < s.mosaic else "varied"


@contextmanager
def locked(folder):
    """Makes a run's folder if it is not there, and keeps other processes out of it. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = fcntl and os.open(folder, os.O_RDONLY)
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: another process is training in it; wait for it, or choose another --out") from None
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); choose another --out") from None
    try:
        yield
    finally:
        if fcntl:
            os.close(descriptor)


def open_folder(folder, s, step, resumed):
    """Starts a new run's folder, or cuts a resumed run's log back to the step that was saved. Raises UserError."""
    log = folder / "log.jsonl"
    if not resumed and (folder / "last.pth").exists():
        raise UserError(f"{folder} already holds a run; go on with --resume {folder}, or choose another --out")
    kept = [line for line in read_rows(log) if resumed and json.loads(line)["step"] <= step]
    try:
        write_atomically(folder / "config.json", json.dumps(vars(s), indent=1).encode())
        write_atomically(log, "".join(kept).encode())
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); choose another --out") from None


def read_rows(log):
    """The lines of log.jsonl, without one that was cut off by a crash."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [line for line in lines if line.endswith("}\n")]


def draw_samples(dataset, detections, classes, count=6, threshold=0.4):
    """Ground truth and detections next to each other on a dataset's first images -> PIL image."""
    samples = []
    for index in range(min(count, len(dataset))):
        image, target = dataset.load(index)
        sure = detections[index]["scores"] > threshold
        found = {key: value[sure] for key, value in detections[index].items()}
        samples.append((TF.to_pil_image(image), target, found))
    return plots.draw_samples(samples, classes)
