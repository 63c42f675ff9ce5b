"""Checkpoints: written whole or not at all, verified when read, never executed."""

import contextlib
import os
import pickle
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from run.log import Log
from utils import UserError, atomic_write, duration, link, warn

FORMAT = 1
TYPES = {"format": int, "epoch": int, "step": int, "arch": str, "config": dict, "images": int}
RETRY_S = 10.0  # after a failed save that cannot wait for the next one


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; UserError if it cannot be written, and then the old file stays."""
    atomic_write(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def load(path: str | Path, bare: bool = False) -> dict[str, Any]:
    """A checkpoint's tensors, on the CPU, and plain values; UserError if it cannot be used.

    `bare` also takes a file that is a state_dict itself, such as torchvision's weights, and
    test.py's linear.pth.tar of a finetuned encoder.
    """
    name = f"checkpoint {str(path)!r}"
    content = read(path)
    if bare and isinstance(content, dict) and all(map(torch.is_tensor, content.values())):
        content = {"state_dict": content}
    if bare and isinstance(content, dict) and content.get("encoders"):  # linear.pth.tar
        content = {"state_dict": content["encoders"][0], "arch": content["arch"]}
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{name} has no state_dict: it is not a MoCo checkpoint")
    wrong = [key for key, kind in TYPES.items() if not isinstance(content.get(key, kind()), kind)]
    if wrong:
        raise UserError(f"{name} is damaged: the type of its {', '.join(wrong)} is wrong")
    if content.get("format", 0) > FORMAT:
        raise UserError(f"{name} was saved by a newer version of this code: update the code")
    return content


def read(path: str | Path) -> Any:
    """What torch.save wrote, if the checksums are right, which torch.load does not verify."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"checkpoint {str(path)!r} is a pipe or a device: name a file")
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise UserError(f"checkpoint {str(path)!r} cannot be read: {error.strerror}") from None
    try:
        if zipfile.is_zipfile(path):  # files from before PyTorch 1.6 are not zip archives
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        reason = "its checksums are wrong, so it is damaged"
    except pickle.UnpicklingError:
        reason = (
            "it is no checkpoint, or it holds pickled code, which is never run: save its weights "
            "anew, by torch.save(model.state_dict(), FILE) in the program that made it"
        )
    except Exception:  # damaged bytes raise all kinds of errors
        reason = "it is damaged, or no checkpoint"
    raise UserError(f"checkpoint {str(path)!r} is refused: {reason}")


# ------------------------------------------------------------------- the checkpoints of a run


def path_of(folder: Path, epoch: int | None) -> Path:
    """A run's checkpoint of an epoch, or (None) its last; UserError, with those that it has."""
    path = _path(folder, epoch)
    if path.exists():
        return path
    if not folder.is_dir():
        runs = sorted({p.parents[1].name for p in folder.parent.glob("*/checkpoints/*.pth.tar")})
        there = f"runs there: {', '.join(runs)}" if runs else "train one with train.py"
        raise UserError(f"there is no run {str(folder)!r}: {there}")
    epochs = ", ".join(map(str, _epochs(folder)))
    if not epochs and not _path(folder, None).exists():
        raise UserError(f"{str(folder)!r} has no checkpoints yet: train the run with train.py")
    missing = "last checkpoint" if epoch is None else f"checkpoint of epoch {epoch}"
    there = f"epochs {epochs}" if epochs else "the last one alone"
    raise UserError(f"{str(folder)!r} has no {missing}: it has {there}")


def _path(folder: Path, epoch: int | None) -> Path:
    name = "last" if epoch is None else f"epoch_{epoch:04d}"
    return folder / "checkpoints" / f"{name}.pth.tar"


def _epochs(folder: Path) -> list[int]:
    """The epochs whose checkpoints were kept, by number: 9999 before 10000."""
    names = [path.name for path in folder.glob("checkpoints/*.pth.tar")]
    matches = [re.fullmatch(r"epoch_(\d+)\.pth\.tar", name) for name in names]
    return sorted(int(match[1]) for match in matches if match)


def load_last(folder: Path) -> tuple[dict[str, Any] | None, Path]:
    """A run's last checkpoint that is sound, and its path; None if the run has none at all.

    Raises UserError if there are some, but none of them is sound.
    """
    last = _path(folder, None)
    paths = [last, *(_path(folder, epoch) for epoch in reversed(_epochs(folder)))]
    paths = [path for path in paths if path.exists()]
    for path in paths:
        try:
            checkpoint = load(path)
        except UserError as error:
            warn(str(error))
            continue
        if path != last:
            warn(f"{str(last)!r} cannot be used: going on from {path.name}")
        return checkpoint, path
    if paths:
        failure = f"none of the {len(paths)} checkpoints in {str(folder)!r} can be used"
        raise UserError(f"{failure}: start again with --overwrite, or name another --exp_version")
    return None, last


def describe_last(folder: Path) -> str:
    """Where to go on from after an error."""
    path = _path(folder, None)
    return f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"


class Saver:
    """Saves a run's checkpoints, each after the log; `step` is that of the last one, or None.

    Of those of epochs it keeps the newest `keep` (None: all), and epoch 0.
    """

    def __init__(
        self,
        folder: Path,
        log: Log,
        every_minutes: float,
        step: int | None,
        keep: int | None = None,
    ) -> None:
        self.folder, self.log, self.every_minutes = folder, log, every_minutes
        self.step, self.keep = step, keep
        self.failed = False  # whether the last try did

    def save(
        self, content: dict[str, Any], epoch: int | None = None, last_chance: bool = False
    ) -> None:
        """Write last.pth.tar, and the file of an `epoch` if one is given.

        If that fails the old files stay, and the next save is the second try; for an epoch's file
        or at the `last_chance` it comes after RETRY_S. Raises UserError if that fails, too.
        """
        urgent = last_chance or epoch is not None
        next_try_s = RETRY_S if urgent else 60 * self.every_minutes
        self._try(content, epoch, next_try_s)
        if self.failed and urgent:
            time.sleep(next_try_s)
            self._try(content, epoch, next_try_s)

    def _remove_older(self) -> None:
        kept = [epoch for epoch in _epochs(self.folder) if epoch]  # not what --init started from
        for epoch in kept[: -self.keep] if self.keep else ():
            with contextlib.suppress(OSError):  # the next save tries again
                _path(self.folder, epoch).unlink()

    def _try(self, content: dict[str, Any], epoch: int | None, next_try_s: float) -> None:
        try:
            self.log.flush(to_disk=True)  # no checkpoint is of a step that the log does not have
            last = _path(self.folder, None)
            if epoch is None:
                save(last, content)
            else:
                save(_path(self.folder, epoch), content)
                try:
                    link(_path(self.folder, epoch), last)
                except OSError:  # not every file system has links
                    save(last, content)
            self.step, self.failed = content["step"], False
            self._remove_older()
        except UserError as error:
            good = "there is no checkpoint yet"
            if self.step is not None:
                good = f"the last good checkpoint is of step {self.step}"
            if self.failed:
                remedy = "make room, then go on with --resume"
                raise UserError(f"{error}, twice in a row; {good}: {remedy}") from None
            self.failed = True
            warn(f"{error}; {good}, and the next try comes in {duration(next_try_s)}")
