"""What goes on beside the training: rows of the log, checkpoints, stops, and the last words."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import config
from config import TrainSettings
from data.base import Batch
from data.failures import Failures
from evaluation.knn import nearest
from evaluation.monitor import Monitor
from parallel import Launch
from run import curves, resume
from run.board import Board
from run.checkpoints import Saver
from run.compute import Scaler, precision_dtype
from run.log import COLUMNS, Log
from run.meters import Meter, Stopwatch, effective_rank, peak_memory_mb, uniformity
from run.signals import Stopped, StopSignal
from utils import UserError, duration, say, warn


@dataclass(frozen=True)
class Due:
    """What is to be done after a step."""

    row: bool  # a row of the log
    knn: bool  # with a kNN accuracy
    keep: bool  # a checkpoint that is kept, of an epoch
    save: bool  # a checkpoint
    stop: int  # the signal that asks to stop, or 0


class Keeper:
    """Keeps a run's log and checkpoints, and knows at which steps something is due.

    Only the first process writes; all of them call each method at the same step.
    """

    def __init__(self, settings: TrainSettings, launch: Launch, folder: Path, images: int) -> None:
        self.settings, self.launch, self.folder, self.images = settings, launch, folder, images
        self.steps_per_epoch = images // settings.batch_size
        self.steps = settings.max_epoch * self.steps_per_epoch
        self.stop = StopSignal(alone=launch.processes == 1)
        self.failures = Failures(images, folder / "unreadable.txt" if launch.rank == 0 else None)
        dtype = precision_dtype(settings.precision)
        self.meter = Meter(launch, dtype, settings.batch_size, settings.temperature)
        self.board: Board | None = None
        self.scaler: Scaler | None = None
        self.skipped = 0  # steps in fp16
        self.collapsed = False

    def start(self, step: int, monitor: Monitor | None, untrained: float | None) -> Stopwatch:
        """Begin the log, or go on with that of a run which was saved after `step`.

        `untrained` is the kNN accuracy of the encoder that the training starts from.
        """
        self.monitor = monitor
        if self.launch.rank == 0:
            self.log = Log(self.folder / "log.csv", COLUMNS, step)
            minutes, keep = self.settings.save_every_minutes, self.settings.keep
            self.saver = Saver(self.folder, self.log, minutes, step or None, keep)
            if self.settings.tensorboard:
                self.board = Board(self.folder, step)
            config.write(self.folder / "config.yaml", self.settings)
            if untrained is not None:
                self._add_row(
                    dict.fromkeys(COLUMNS, math.nan)
                    | {"step": 0, "epoch": 0, "knn_top1": untrained}
                )
                say(f"untrained encoder: kNN {untrained:.1f} %")
        self.started = self.last_save = time.monotonic()
        self.meter.start()
        self.watch = Stopwatch(self.launch.device)
        return self.watch

    def save_start(
        self, step: int, moco: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep epoch 0 of a run that starts from weights of a file, which may be gone later."""
        if step == 0 and self.settings.init is not None:
            due = Due(row=False, knn=False, keep=True, save=True, stop=0)
            self.save(due, 0, moco, optimizer)

    def due(self, step: int) -> Due:
        """What is to be done after a step, the same on every process."""
        epoch, last = step // self.steps_per_epoch, step == self.steps
        epoch_ends = step % self.steps_per_epoch == 0
        knn_every, save_every = self.settings.knn_every, self.settings.save_weight_epoch
        knn = bool(knn_every) and epoch_ends and (epoch % knn_every == 0 or last)
        row = step % self.settings.log_every == 0 or last or knn
        keep = epoch_ends and (epoch % save_every == 0 or last)
        overdue = time.monotonic() - self.last_save > 60 * self.settings.save_every_minutes
        mine = [self.stop.received or 0, int(overdue), len(self.failures.unshared)]
        if self.launch.processes > 1:  # they ask each other at rows only
            mine = self.launch.largest(mine) if row else [0, 0, 0]
        stop, overdue, unshared = mine
        if unshared:
            self.failures.share(self.launch)
        return Due(row, knn, keep, save=bool(keep or stop or overdue), stop=stop)

    def read_means(self, step: int) -> None:
        """Read the meter from the device; UserError if a loss was not finite.

        So it ends here, before a broken model reaches a row or a checkpoint.
        """
        self.means = self.meter.read(step, self.folder)

    def write_row(self, step: int, lr: float, knn_top1: float, keys: Tensor, queue: Tensor) -> None:
        """A row of the log, which says the same to the user."""
        spent = self.watch.read()
        row = {
            "step": step,
            "epoch": (step - 1) // self.steps_per_epoch + 1,
            **self.means,
            "lr": lr,
            "data_wait_percent": 100 * spent.get("data", 0.0) / sum(spent.values()),
            "peak_memory_mb": peak_memory_mb(self.launch.device),
            "uniformity": float(uniformity(keys[: min(1024, self.settings.batch_size)])),
            "effective_rank": float(effective_rank(queue)),
            "knn_top1": knn_top1,
        }
        if self.launch.rank == 0:
            self._add_row(row)
        self._say_skipped()
        self._warn_of_collapse(row["effective_rank"])
        self.meter.reset()
        left = (self.steps - step) * self.settings.batch_size / row["images_per_second"]
        knn = "" if math.isnan(row["knn_top1"]) else f"kNN {row['knn_top1']:.1f} %  "
        say(
            f"epoch {row['epoch']}/{self.settings.max_epoch}  step {step}/{self.steps}  "
            f"loss {row['loss']:.3f}  contrast top-1 {row['contrast_top1']:.1f} %  {knn}"
            f"lr {row['lr']:.4g}  {row['images_per_second']:.0f} images/s  left {duration(left)}"
        )

    def _add_row(self, row: dict[str, float]) -> None:
        self.log.add(row)
        if self.board is not None:
            self.board.scalars(row)

    def _say_skipped(self) -> None:
        """Say how many steps were left out since the last row, as their gradients overflowed."""
        if self.scaler.is_enabled() and (skipped := int(self.scaler.skipped)) > self.skipped:
            scale = self.scaler.get_scale()
            say(
                f"fp16: gradients overflowed, {skipped - self.skipped} steps were skipped "
                f"({skipped} in all); the loss is scaled by {scale:g} now"
            )
            self.skipped = skipped

    def _warn_of_collapse(self, rank: float) -> None:
        """Say it, once, when the keys of the queue leave all but a few directions."""
        dim = self.settings.feature_dim
        collapsed = rank < min(5, dim / 4)
        if collapsed and not self.collapsed:
            warn(
                f"the features collapse: the keys in the queue take {rank:.1f} of {dim} directions "
                "(effective rank): try a higher --momentum, --shuffle_bn or a lower --lr"
            )
        self.collapsed = collapsed

    def show(self, due: Due, step: int, batch: Batch, views: list[Tensor]) -> None:
        """For TensorBoard: some views and, after a kNN, neighbours and features."""
        epoch_ends = step % self.steps_per_epoch == 0
        if self.board is None or not (epoch_ends or step == self.settings.log_every):
            return
        from figures import neighbours  # matplotlib is needed only here
        from figures import views as view_figures

        data = view_figures.views_data(
            batch.images[:6],
            batch.aspect[:6],
            [view[:6] for view in views],
            mean=self.settings.mean,
            std=self.settings.std,
        )
        self.board.figure("views", view_figures.views_figure(data), step)
        if not due.knn or self.stop.received:  # which may have cut the kNN short
            return
        bank, queries = self.monitor.bank, self.monitor.queries
        k = min(6, len(bank))
        blocks = [rows for _, _, rows in nearest(bank.features, queries.features, k)]
        data = neighbours.neighbours_data(
            {"trained": torch.cat(blocks)}, bank, queries, self.settings.seed
        )
        self.board.figure("neighbours", neighbours.neighbours_figure(data), step)
        names = [bank.dataset.classes[label] for label in queries.labels[:2000].tolist()]
        self.board.features(queries.features[:2000], names, step)

    def save(
        self, due: Due, step: int, moco: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """A checkpoint: last.pth.tar and, if it is to be kept, that of the epoch."""
        content = resume.snapshot(
            settings=self.settings,
            step=step,
            state=self.launch.state_dict(moco),
            optimizer=optimizer,
            meter=self.meter,
            images=self.images,
            folder=self.folder,
        )
        if self.launch.rank == 0:
            epoch = content["epoch"] if due.keep else None
            self.saver.save(content, epoch, last_chance=bool(due.stop))
        self.last_save = time.monotonic()

    def leave(self, due: Due, step: int) -> None:
        """Stop as a signal asks, unless this was the last step anyway."""
        if step < self.steps:
            say(f"stopped by signal {due.stop} after step {step}: saved; continue with --resume")
            sys.exit(128 + due.stop)

    def wait_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, up to a stop signal that comes while the run waits for one."""
        with contextlib.suppress(Stopped):
            while True:
                with self.stop.at_once():
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def measure_knn(self, monitor: Monitor, moco: torch.nn.Module) -> float:
        """kNN accuracy of the query encoder in percent; nan if a stop signal cuts it short."""
        state = self.launch.state_dict(moco.encoder_q)
        with contextlib.suppress(Stopped), self.stop.at_once():
            return monitor.top1(state)
        return math.nan

    def leave_before_start(self) -> None:
        """Stop as a signal asks, while the first queue is filled."""
        (stopped,) = self.launch.largest([self.stop.received or 0])
        if stopped:
            say(f"stopped by signal {stopped} before the first step: there is nothing to save")
            sys.exit(128 + stopped)

    def finish(self, step: int, moco: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Draw the loss, say where the time went and where everything is.

        A run that `wait_for` ended before its last step is saved, and stops.
        """
        if step == 0:
            self.leave_before_start()
        if step < self.steps:
            due = Due(row=False, knn=False, keep=False, save=True, stop=self.stop.received)
            self.read_means(step)
            self.save(due, step, moco, optimizer)
            self.leave(due, step)
        if self.launch.rank != 0:
            return
        if self.board is not None:
            self.board.close()
        self._draw()
        self.watch.read()
        total = sum(self.watch.total.values())
        parts = [f"{name} {100 * spent / total:.0f} %" for name, spent in self.watch.total.items()]
        say("time: " + (", ".join(parts) or "no step was left to do"))
        took = duration(time.monotonic() - self.started)
        say(f"done after {took}: {self.folder}/checkpoints/last.pth.tar, log.csv, loss.png")

    def _draw(self) -> None:
        from figures.curves import knn_figure, loss_figure  # matplotlib is needed only here
        from figures.style import save

        try:
            name, knn = self.settings.exp_version, curves.read_knn(self.folder)
            save(self.folder / "loss.png", loss_figure({name: [curves.read_loss(self.folder)]}))
            if knn:
                save(self.folder / "knn.png", knn_figure({name: [knn]}))
        except UserError as error:  # what counts is saved
            warn(f"a figure is not drawn: {error}")
