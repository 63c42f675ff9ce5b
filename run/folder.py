"""Where a run is kept, who may write there, and what becomes of an earlier run."""

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from utils import UserError, check_writable, warn

# What --overwrite deletes, the checkpoints first: without them a run starts anew.
OF_A_RUN = ("checkpoints", "eval", "tensorboard", "loss.png", "knn.png", "config.yaml", "log.csv")
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def path_of(output_root: str, dataset_name: str, exp_version: str) -> Path:
    """output_root/dataset_name/exp_version; UserError if a name cannot be that of a folder."""
    for name in (dataset_name, exp_version):
        odd = "/" in name or not name.isprintable()  # nor is a byte that is no UTF-8
        if name in (".", "..") or odd or len(os.fsencode(name)) > 200:
            remedy = "use plain letters, no /, and keep it short (--output_root may be any path)"
            raise UserError(f"{name[:60]!r} cannot name a data set or a run: {remedy}")
    return Path(output_root) / dataset_name / exp_version


class FolderLock:
    """Keeps other processes out of a folder until this one ends; its workers do not hold it."""

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self.folder, self.path = folder, folder / name
        self._lock = FileLock(self.path, fallback_to_soft=False)

    def take(self, wait: bool = False) -> None:
        """Lock the folder, if this object has not; UserError if it is in use, unless `wait`."""
        try:
            self._lock.acquire(blocking=wait)
            with contextlib.suppress(OSError):  # the disk is full, but the lock holds
                self.path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        except Timeout:
            owner = self.path.read_text(errors="replace")[:200] or "another process"
            remedy = "wait for it, stop it, or name another --exp_version"
            raise UserError(f"{str(self.folder)!r} is in use by {owner}: {remedy}") from None
        except OSError as error:
            folder, reason = repr(str(self.folder)), error.strerror or error
            if error.errno not in NO_LOCKS:
                failure = f"{folder} cannot be written: {reason}"
                raise UserError(f"{failure}: choose another folder") from None
            remedy = "make sure that no second run writes there"
            warn(f"the file system of {folder} has no locks ({reason}): {remedy}")

    def release(self) -> None:
        self._lock.release(force=True)


def claim(folder: Path, lock: FolderLock, resume: bool, overwrite: bool) -> None:
    """Create and lock a run's folder; UserError for an earlier run there without either flag.

    Raises UserError, too, if the folder is in use or cannot be written.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock.take()
        files = [folder / "config.yaml", folder / "log.csv", *folder.glob("checkpoints/*.pth.tar")]
        if any(path.exists() for path in files) and not (resume or overwrite):
            remedy = "continue it with --resume, replace it with --overwrite, or name another"
            raise UserError(f"{str(folder)!r} holds an earlier run: {remedy} --exp_version")
    check_writable(folder, "--output_root")


def clear(folder: Path, resume: bool, overwrite: bool) -> None:
    """Delete an earlier run, if that is asked for, and what one that was killed left half written.

    It comes after everything that can still go wrong before the first step.
    """
    with _writing(folder):
        for name in OF_A_RUN if overwrite else ():
            _remove(folder / name)
        if not resume:
            _remove(folder / "unreadable.txt")
        (folder / "checkpoints").mkdir(exist_ok=True)
        for temporary in (*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"{str(folder)!r} cannot be written: {error.strerror or error}"
        raise UserError(f"{reason}: choose another --output_root") from None


def _remove(path: Path) -> None:
    """Delete a file or folder; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
