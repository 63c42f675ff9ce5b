"""Configuration, random streams, and everything that is written into a run's folder: checkpoints, log, results.

A message for the user is a `UserError` of one line; `main_guard` prints it and exits with status 2.
"""

import argparse
import contextlib
import csv
import difflib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
import yaml
from tqdm import tqdm

CONFIG_FILE = Path(__file__).with_name("config.yaml")
SECTIONS = {"train": ("train",), "test": ("evaluation",), "visualize": ("evaluation", "figures")}
CHECKPOINT_FORMAT = 1


class UserError(Exception):
    """What is wrong, with which value, and what to do: one line for the user."""


def main_guard(main: Callable[[list[str]], None]) -> None:
    """Run a script's `main`; a UserError becomes one line on stderr and exit status 2. What can no longer be printed does not end it."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Unfailing, streams)
    try:
        main(sys.argv[1:])
    except (UserError, PermissionError, ConnectionError) as error:
        if rank():
            time.sleep(
                5
            )  # if the first process stops for the same reason, torchrun ends this one before it says it again
        what = (
            f"{error.filename!r}: permission denied"
            if isinstance(error, PermissionError)
            else error
        )
        print(f"error: {f'process {rank()}: ' if rank() else ''}{what}", file=sys.stderr)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sys.stderr.flush()
            os._exit(
                2
            )  # the threads of a process group that was not left in peace would abort a regular exit, now and then
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.close_for_good()
        sys.stdout, sys.stderr = streams


class _Unfailing:
    """A stream for messages: a full disk, a closed pipe or terminal must not end days of work."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def close_for_good(self) -> None:
        """What cannot be flushed is dropped, or Python would complain of it at its end."""
        try:
            self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def rank() -> int:
    """The number of this process among those that torchrun started; 0 is the one that speaks."""
    return (
        int(os.environ["RANK"])
        if "WORLD_SIZE" in os.environ and os.environ.get("RANK", "").isdigit()
        else 0
    )


def checked(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function whose ValueErrors are meant for the user."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise UserError(str(error)) from None


# --------------------------------------------------------------------------------------------------------------- random streams


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """A CPU generator for one purpose at one step; streams are mixed, not added, so that they never overlap."""
    name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    state = np.random.SeedSequence([seed, name, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


# ---------------------------------------------------------------------------------------------------------------- configuration


class _Loader(yaml.SafeLoader):
    """safe_load in which 1e-4 is a number (YAML 1.1 reads a string) and a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise UserError(
                f"the key {', '.join(sorted(twice))} stands twice in a configuration: keep one"
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file (safe loading, no tags); UserError if it cannot be read."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"config {str(path)!r} cannot be read: {error.strerror}") from None
    except (
        yaml.YAMLError,
        ValueError,
    ) as error:  # ValueError: bytes that are no text, dates that are none
        raise UserError(
            f"config {str(path)!r} is not valid YAML: {' '.join(str(error).split())}"
        ) from None


class Key:
    """One key of config.yaml: its default, its comment, and what it accepts."""

    def __init__(self, name: str, default: Any, comment: str) -> None:
        match = re.match(r"<([^>]*)>\s*(.*)", comment)
        self.name, self.default, self.help = name, default, match[2] if match else comment
        self.kind = (
            match[1] if match else "bool" if isinstance(default, bool) else type(default).__name__
        )
        self.is_list = self.kind.startswith("list ")
        self.is_bool = self.kind == "bool"
        self.choices = [
            word
            for word in self.kind.removeprefix("list ").split("|")
            if word.split()[0] not in ("int", "float", "str", "bool", "null", "auto", "none")
        ]
        self.takes_text = "str" in self.kind.removeprefix("list ").split("|")

    def accepts(self, value: Any) -> Any:
        """The value in its type; UserError if it is of the wrong type or out of range."""
        kind = self.kind.removeprefix("list ")
        if self.is_list:
            if isinstance(value, (list, tuple)) and value:
                if (
                    len(value) > 1 and isinstance(self.default[0], str) and self.default[0] in value
                ):  # auto, none, all
                    raise UserError(
                        f"--{self.name} {' '.join(map(str, value))}: {self.default[0]} stands alone, give it or the others"
                    )
                return [self._one(v, kind) for v in value]
            raise UserError(f"--{self.name} {value!r} must be a list, such as {self.default}")
        return self._one(value, kind)

    def _one(self, value: Any, kind: str) -> Any:
        for alternative in kind.split("|"):
            word, _, interval = alternative.partition(" ")
            low, _, high = interval.partition("..")
            number = (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and abs(value) < 1e300
            )  # neither nan nor inf
            if word == "int" and number and float(value).is_integer() or word == "float" and number:
                if (not low or value >= float(low)) and (not high or value <= float(high)):
                    return int(value) if word == "int" else float(value)
            elif (word == "str" and isinstance(value, str) and value) or (
                word == "bool" and isinstance(value, bool)
            ):
                return value
            elif (word == "null" and value is None) or (
                word == value and word not in ("int", "float")
            ):
                return value
        raise UserError(f"--{self.name} {value!r} is not valid: it must be {_in_words(kind)}")


def _in_words(kind: str) -> str:
    """What a key accepts, as a sentence part."""
    words = []
    for alternative in kind.split("|"):
        word, _, interval = alternative.partition(" ")
        low, _, high = interval.partition("..")
        name = {
            "int": "a whole number",
            "float": "a number",
            "str": "text",
            "bool": "true or false",
        }.get(word, word)
        words.append(
            name
            + (f" from {low}" if low else "")
            + (f" to {high}" if high else " up" if low else "")
        )
    return " or ".join(words)


def config_keys(script: str) -> dict[str, Key]:
    """The keys that a script (train, test, visualize) reads, from config.yaml, in its order."""
    tree = read_yaml(CONFIG_FILE)
    text = CONFIG_FILE.read_text(encoding="utf-8")
    keys = {}
    for section in SECTIONS[script]:
        part = re.split(rf"^{section}:", text, flags=re.MULTILINE)[1]
        part = re.split(r"^\w", part, flags=re.MULTILINE)[0]
        comments = dict(re.findall(r"^ +(\w+): [^#\n]*?# (.*)$", part, re.MULTILINE))
        keys |= {
            name: Key(name, value, comments.get(name, ""))
            for name, value in _flat(tree[section]).items()
        }
    return keys


def _flat(tree: dict) -> dict[str, Any]:
    """Sections of a configuration merged into one level."""
    flat = {}
    for name, value in (tree or {}).items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (see --help)")


def load_config(script: str, argv: list[str]) -> SimpleNamespace:
    """The configuration of a script: defaults, then --preset, then --config, then flags; every key checked.

    Raises UserError for an unknown key, flag or preset, and for a value of the wrong type or out of range.
    """
    keys = config_keys(script)
    parser = Parser(
        prog=f"python {script}.py",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        nargs="+",
        action="extend",
        help="named sets of values, a later one wins: "
        + ", ".join(read_yaml(CONFIG_FILE)["presets"]),
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file of values, such as the config.yaml of a run"
    )
    for key in keys.values():
        default = (
            "null"
            if key.default is None
            else " ".join(map(str, key.default))
            if key.is_list
            else key.default
        )
        choices = f" [{', '.join(key.choices)}]" * (len(key.choices) > 1)
        options = {"help": f"{key.help}{choices} (default: {default})".replace("%", "%%")}
        if key.is_bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {
                "metavar": key.name.rsplit("_")[-1].upper(),
                "nargs": "+" if key.is_list else None,
            }
        parser.add_argument(f"--{key.name}", **options)
    for word, value in zip(argv, [*argv[1:], ""]):
        name, _, value = word.partition("=") if "=" in word else (word, "", value)
        if (
            (key := keys.get(name.removeprefix("--").removeprefix("no-")))
            and key.is_bool
            and value
            and not value.startswith("-")
        ):
            raise UserError(
                f"--{key.name} takes no value, not {value!r}: write --{key.name} or --no-{key.name}"
            )
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), keys, n=1)
        raise UserError(
            f"unknown argument {unknown[0]!r}: {f'did you mean --{near[0]}?' if near else 'see --help'}"
        )
    flags = {
        name: _from_text(keys[name], value) for name, value in vars(given).items() if name in keys
    }
    layers = [(_preset(name), "preset") for name in getattr(given, "preset", [])]
    layers += [(_mapping(given.config) if "config" in given else {}, "config"), (flags, "flag")]
    values = {name: key.default for name, key in keys.items()}
    for layer, source in layers:
        _refuse_unknown(layer, source)
        values |= {name: value for name, value in layer.items() if name in keys}
    return SimpleNamespace(**{name: keys[name].accepts(value) for name, value in values.items()})


def _from_text(key: Key, value: Any) -> Any:
    """A flag's text as the value that YAML would give it (text stays text where the key takes text)."""
    if isinstance(value, list):
        return [_from_text(key, v) for v in value]
    if isinstance(value, bool) or (key.takes_text and value != "null"):
        return value
    try:
        return yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        return value


def _mapping(path: str) -> dict:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"config {path!r} holds no keys: write lines such as 'batch_size: 128'")
    try:
        return _flat(content)
    except RecursionError:
        raise UserError(f"config {path!r} refers to itself: write its values out") from None


def _preset(name: str) -> dict[str, Any]:
    presets = read_yaml(CONFIG_FILE)["presets"]
    if name not in presets:
        raise UserError(f"preset {name!r} is not known: choose one of {', '.join(presets)}")
    return presets[name]


def _refuse_unknown(layer: dict[str, Any], source: str) -> None:
    """A preset or file may hold keys for any script, but none that no script knows."""
    known = {name for script in SECTIONS for name in config_keys(script)}
    for name in layer:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise UserError(
                f"unknown key {name!r} in the {source}: {f'did you mean {near[0]}?' if near else 'config.yaml lists them all'}"
            )


def describe(cfg: SimpleNamespace, title: str) -> str:
    """The resolved configuration, as few lines."""
    text, lines = (
        [
            f"{k}={' '.join(map(str, v)) if isinstance(v, list) else v}"
            for k, v in vars(cfg).items()
        ],
        [f"{title}:"],
    )
    for item in text:
        if len(lines) == 1 or len(lines[-1]) + len(item) > 116:
            lines.append("  " + item)
        else:
            lines[-1] += "  " + item
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- files of a run


def atomic_write(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one; UserError if it cannot be written."""
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as file:
            temporary = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = (
            error if isinstance(error, OSError) else error.__context__
        )  # torch.save on a full disk raises another error on top
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{str(path)!r} cannot be written: {cause.strerror or cause}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder outlive a power cut."""
    number = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems cannot, and need not
        os.fsync(number)
    os.close(number)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, content: Any) -> None:
    atomic_write(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def read_json(path: str | Path) -> Any:
    """The content of a JSON file, None if it is not there or not whole."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_csv(path: str | Path, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    text = "\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def read_csv(path: str | Path, needed: Iterable[str] = ()) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers; a last line that a crash cut short is left out. UserError if one of the `needed` is missing."""
    try:
        whole = Path(path).read_bytes().rpartition(b"\n")[0].decode()
        header, *rows = list(csv.reader(whole.splitlines())) or [[]]
        rows = [list(map(float, row)) for row in rows if len(row) == len(header)]
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{str(path)!r} is damaged: {error}: move it away") from None
    missing = [name for name in needed if name not in header]
    if missing:
        raise UserError(
            f"{str(path)!r} is damaged: it has no column {', '.join(missing)}: move it away"
        )
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def write_yaml(path: str | Path, cfg: SimpleNamespace) -> None:
    text = yaml.safe_dump(vars(cfg), sort_keys=False, default_flow_style=None)
    atomic_write(path, lambda file: file.write(text.encode()))


def run_folder(output_root: str, dataset_name: str, exp_version: str) -> Path:
    """output_root/dataset_name/exp_version; UserError unless both names can be those of a folder."""
    for name in (dataset_name, exp_version):
        if name in (".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > 200:
            raise UserError(
                f"{name[:60]!r} cannot name a data set or a run, which is a folder: leave out / and keep it short (--output_root may be any path)"
            )
    return Path(output_root) / dataset_name / exp_version


class FolderLock:
    """Keeps other processes out of a folder. The system frees it when its process ends, however that ends; child processes do not inherit it."""

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self.folder, self.name = folder, name
        self._file: BinaryIO | None = None

    def take(self, wait: bool = False) -> None:
        """Lock the folder, which must exist; nothing if this process has it already. UserError if another process has, unless `wait`."""
        if self._file is not None:
            return
        try:
            self._file = open(self.folder / self.name, "a+b")
        except OSError as error:
            raise UserError(
                f"{str(self.folder)!r} cannot be written: {error.strerror}: choose another folder"
            ) from None
        try:
            fcntl.lockf(
                self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
            )  # flock's would live on in orphaned workers
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._file.seek(0)
                owner = self._file.read(200).decode(errors="replace") or "another process"
                raise UserError(
                    f"{str(self.folder)!r} is in use by {owner}: wait for it, stop it, or name another --exp_version"
                ) from None
            print(
                f"warning: the file system of {str(self.folder)!r} has no locks ({error.strerror}): see to it yourself that no second run writes there",
                file=sys.stderr,
            )
        with contextlib.suppress(OSError):  # on a full disk it has no name
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def prepare_run_folder(folder: Path, lock: FolderLock, resume: bool, overwrite: bool) -> None:
    """Create the folder of a run and lock it; an earlier run in it is continued (`resume`), deleted (`overwrite`), or an error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.take()
        earlier = any((folder / name).exists() for name in ("config.yaml", "log.csv")) or any(
            folder.glob("checkpoints/*.pth.tar")
        )
        if earlier and not (resume or overwrite):
            raise UserError(
                f"{str(folder)!r} holds an earlier run: continue it with --resume, replace it with --overwrite, "
                "or name another --exp_version"
            )
        if overwrite:  # the checkpoints first: a run that has none is begun anew
            for name in (
                "checkpoints",
                "eval",
                "tensorboard",
                "loss.png",
                "knn.png",
                "config.yaml",
                "log.csv",
            ):
                _remove(folder / name)
        if not resume:
            _remove(folder / "unreadable.txt")
        (folder / "checkpoints").mkdir(exist_ok=True)
        for left in (
            *folder.glob(".*.tmp"),
            *folder.glob("checkpoints/.*.tmp"),
        ):  # by a run that was killed while it wrote
            left.unlink(missing_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{str(folder)!r} cannot be written: {error.strerror or error}: choose another --output_root"
        ) from None


def _remove(path: Path) -> None:
    """A file or folder; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def checkpoint_to_resume(folder: Path) -> tuple[dict[str, Any] | None, Path]:
    """The last sound checkpoint of a run and its path: last.pth.tar, or the newest epoch's if that is damaged or gone; None if there is none at all.

    Raises UserError if there are checkpoints, but none of them is sound.
    """
    last = folder / "checkpoints" / "last.pth.tar"
    paths = [
        path
        for path in (last, *(path for _, path in sorted(_epochs(folder), reverse=True)))
        if path.exists()
    ]
    for path in paths:
        try:
            checkpoint = load_checkpoint(path)
        except UserError as error:
            if rank() == 0:
                print(f"warning: {error}", file=sys.stderr)
            continue
        if path != last and rank() == 0:
            print(
                f"warning: {str(last)!r} cannot be used: going on from {path.name}", file=sys.stderr
            )
        return checkpoint, path
    if paths:
        raise UserError(
            f"none of the {len(paths)} checkpoints in {str(folder)!r} can be used: start again with --overwrite, or name another --exp_version"
        )
    return None, last


def _epochs(folder: Path) -> list[tuple[int, Path]]:
    return [
        (int(m[1]), p)
        for p in folder.glob("checkpoints/epoch_*.pth.tar")
        if (m := re.match(r"epoch_(\d+)\.", p.name))
    ]


def checkpoint_path(folder: Path, epoch: int | None) -> Path:
    """The checkpoint of an epoch, or the last one; UserError that lists the epochs that exist."""
    path = (
        folder / "checkpoints" / ("last.pth.tar" if epoch is None else f"epoch_{epoch:04d}.pth.tar")
    )
    if path.exists():
        return path
    epochs = [number for number, _ in sorted(_epochs(folder))]
    if not folder.is_dir():
        runs = sorted(p.parent.parent.name for p in folder.parent.glob("*/checkpoints/*.pth.tar"))
        raise UserError(
            f"there is no run {str(folder)!r}: {'runs there: ' + ', '.join(dict.fromkeys(runs)) if runs else 'train one with train.py'}"
        )
    what = "last checkpoint" if epoch is None else f"checkpoint of epoch {epoch}"
    raise UserError(
        f"{str(folder)!r} has no {what}: it has {'epochs ' + ', '.join(map(str, epochs)) if epochs else 'none'}"
    )


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    atomic_write(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **content}, file))


def load_checkpoint(path: str | Path, bare: bool = False) -> dict[str, Any]:
    """A checkpoint's content on the CPU, tensors and plain values only (no code runs); UserError if it cannot be used.

    `bare` takes a file that is a state_dict itself, too, such as torchvision's weights.
    """
    try:
        with open(path, "rb") as file:
            file.peek(1)
    except OSError as error:
        raise UserError(f"checkpoint {str(path)!r} cannot be read: {error.strerror}") from None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:  # torch.load passes over the checksums
                    raise UserError(
                        f"checkpoint {str(path)!r} is refused: its checksum is wrong, so it is damaged"
                    )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever bytes from anywhere make of themselves
        code = "weights_only" in str(error) and "global" in str(error).lower()
        reason = (
            "it holds pickled code, which is never run"
            if code
            else "it is damaged, or no checkpoint"
        )
        raise UserError(f"checkpoint {str(path)!r} is refused: {reason}") from None
    if (
        bare
        and isinstance(content, dict)
        and content
        and all(isinstance(value, torch.Tensor) for value in content.values())
    ):
        content = {"state_dict": content}
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"checkpoint {str(path)!r} has no state_dict: it is not a MoCo checkpoint")
    wrong = [
        name
        for name, kind in {
            "format": int,
            "epoch": int,
            "step": int,
            "arch": str,
            "config": dict,
            "images": int,
        }.items()
        if not isinstance(content.get(name, kind()), kind)
    ]
    if wrong:
        raise UserError(
            f"checkpoint {str(path)!r} is damaged: its {', '.join(wrong)} cannot be what they are"
        )
    if content.get("format", 0) > CHECKPOINT_FORMAT:
        raise UserError(
            f"checkpoint {str(path)!r} is of a newer version ({content['format']}) than this code ({CHECKPOINT_FORMAT}): update the code"
        )
    return content


class Lines:
    """A text file that grows by lines, below a `head` where it is new. What cannot be written waits for the next try; a crash may at most cut
    the last line short, and what stands after the last whole line goes. UserError if it cannot be read."""

    def __init__(self, path: Path, head: str = "") -> None:
        self.path, self.head, self._waiting = path, head, []
        try:
            self.lines = (
                os.fsdecode(path.read_bytes().rpartition(b"\n")[0]).split("\n")
                if path.exists()
                else []
            )  # those that are there
        except OSError as error:
            raise UserError(
                f"{str(path)!r} cannot be read: {error.strerror}: move it away"
            ) from None
        self._size = sum(len(os.fsencode(line)) + 1 for line in self.lines if self.lines != [""])

    def append(self, line: str) -> None:
        """Write a line, or say once that it must wait."""
        self._waiting.append(line)
        try:
            self.flush()
        except UserError as error:
            if len(self._waiting) == 1:
                print(
                    f"warning: {error}: its lines wait for the next try",
                    file=sys.stderr,
                    flush=True,
                )

    def flush(self, to_disk: bool = False) -> None:
        """Write what waits (`to_disk`: so that it outlives a power cut); UserError if it cannot be written."""
        try:
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                file.seek(min(self._size, file.seek(0, os.SEEK_END)))
                file.truncate()  # half a line, of a try that failed
                file.write(os.fsencode(self.head) if file.tell() == 0 else b"")
                file.write(b"".join(os.fsencode(line) + b"\n" for line in self._waiting))
                file.flush()
                self._size, self._waiting = file.tell(), []
                if to_disk:
                    os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{str(self.path)!r} cannot be written: {error.strerror}") from None


class Log(Lines):
    """log.csv: a row every `log_every` steps; on resume, rows after the checkpoint's step go."""

    def __init__(self, path: Path, header: list[str], step: int) -> None:
        self.header = header
        old = (
            read_csv(path, ["step", "loss"])
            if path.exists() and path.stat().st_size and step
            else {"step": []}
        )
        if step and not old["step"]:
            print(
                f"warning: {str(path)!r} is gone: its rows up to step {step} are lost",
                file=sys.stderr,
            )
        keep = [i for i, s in enumerate(old["step"]) if s <= step]
        write_csv(
            path,
            header,
            [
                [f"{old[name][i] if name in old else math.nan:.10g}" for name in header]
                for i in keep
            ],
        )  # a column may be new
        super().__init__(path, head=",".join(header) + "\n")

    def add(self, row: dict[str, float]) -> None:
        self.append(",".join(f"{row[name]:.10g}" for name in self.header))


class Saver:
    """Saves a run's checkpoints, the log first. A save that fails leaves the old file and is tried again; the second failure in a row ends the run."""

    RETRY_S = 10.0

    def __init__(self, folder: Path, log: Log, every_minutes: float, step: int | None) -> None:
        self.folder, self.log, self.every_minutes = folder / "checkpoints", log, every_minutes
        self._step, self._failed = step, False  # of the last checkpoint that is sound

    def save(
        self, content: dict[str, Any], epoch: int | None = None, last_chance: bool = False
    ) -> None:
        """Write last.pth.tar, and an epoch's own file if one is given; UserError if it fails twice in a row.

        A failure waits for the next save, but one of an epoch's file, or a `last_chance` before the run ends, only RETRY_S seconds.
        """
        names = ([f"epoch_{epoch:04d}.pth.tar"] if epoch is not None else []) + ["last.pth.tar"]
        while True:
            try:
                self.log.flush(
                    to_disk=True
                )  # a checkpoint never knows of steps that the log has lost
                for name in names:
                    save_checkpoint(self.folder / name, content)
                self._step, self._failed = content["step"], False
                return
            except UserError as error:
                good = (
                    "there is no checkpoint yet"
                    if self._step is None
                    else f"the last good checkpoint is of step {self._step}"
                )
                if self._failed:
                    raise UserError(
                        f"{error}, twice in a row; {good}: make room, then go on with --resume"
                    ) from None
                self._failed, soon = True, last_chance or epoch is not None
                print(
                    f"warning: {error}; {good}, and the next try comes in {duration(self.RETRY_S if soon else 60 * self.every_minutes)}",
                    file=sys.stderr,
                    flush=True,
                )
                if not soon:
                    return
                time.sleep(self.RETRY_S)


# ---------------------------------------------------------------------------------------------------------- what a run shows


def progress(
    iterable: Iterable, desc: str, total: int | None = None, every_s: float = 20.0
) -> Iterator:
    """A tqdm bar on a terminal; elsewhere a line every `every_s` seconds, and none for what is done sooner. Of several processes, the first shows it."""
    if rank():
        yield from iterable
        return
    if sys.stderr.isatty():
        yield from tqdm(iterable, desc=desc, total=total, leave=False, dynamic_ncols=True)
        return
    total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
    start = last = time.monotonic()
    for done, item in enumerate(iterable):
        now = time.monotonic()
        if now - last >= every_s:
            print(
                f"{desc}: {done}{f'/{total}' if total else ''} after {now - start:.0f} s",
                flush=True,
            )
            last = now
        yield item


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 5 s, 2 h 10 min, 1 d 3 h."""
    s = int(seconds + 0.5)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    return (
        f"{s // 3600} h {s % 3600 // 60} min"
        if s < 86400
        else f"{s // 86400} d {s % 86400 // 3600} h"
    )


@functools.cache
def provenance() -> dict[str, Any]:
    """What made a result: commit, whether the tree was changed, versions, machine."""

    def git(*args: str) -> str:
        try:
            return subprocess.run(
                ["git", *args], cwd=CONFIG_FILE.parent, capture_output=True, text=True, timeout=10
            ).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    return {
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "changed": bool(git("status", "--porcelain", "-uno")),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


class Stopwatch:
    """Where the time goes: each lap is the time since the one before. On a GPU events measure it, which are read with `read` alone, so nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._laps = device.type == "cuda", []
        self.total: dict[str, float] = {}
        self.lap("start")

    def lap(self, name: str) -> None:
        if self._on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._laps.append((name, moment))

    def read(self) -> dict[str, float]:
        """Seconds by name since the last call; waits for the device."""
        spent: dict[str, float] = {}
        if self._on_gpu:
            self._laps[-1][1].synchronize()
        for (_, start), (name, end) in zip(self._laps, self._laps[1:]):
            spent[name] = spent.get(name, 0.0) + (
                start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
            )
        self._laps = self._laps[-1:]
        self.total = {
            name: self.total.get(name, 0.0) + spent.get(name, 0.0)
            for name in {**self.total, **spent}
        }
        return spent


class Board:
    """TensorBoard's files in a run's folder. What was logged after `step` by a run that is resumed there goes."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an optional extra

        self.broken = False
        self.writer = self._try(SummaryWriter, folder / "tensorboard", purge_step=step + 1)

    def scalars(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            if name != "step" and not math.isnan(value):
                self._try("add_scalar", name, value, int(row["step"]))
        self._try("flush")

    def figure(self, name: str, figure: Any, step: int) -> None:
        self._try("add_figure", name, figure, step)

    def features(self, features: torch.Tensor, labels: list[str], step: int) -> None:
        """Features (n, D) for the projector."""
        self._try("add_embedding", features, metadata=labels, global_step=step, tag="features")

    def _try(self, write: Callable | str, *args: Any, **kwargs: Any) -> Any:
        """Call it, or the writer's method of this name: a full disk must not end a run for the sake of a picture."""
        try:
            if not self.broken:
                return (getattr(self.writer, write) if isinstance(write, str) else write)(
                    *args, **kwargs
                )
        except OSError as error:
            self.broken = True
            print(
                f"warning: TensorBoard's files cannot be written ({error.strerror or error}): the run goes on without them",
                file=sys.stderr,
                flush=True,
            )


class StopSignal:
    """SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ask the loop to stop after its step; a second Ctrl-C quits at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._interrupted = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            if (
                number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
            ):  # nohup wants it ignored
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: Any) -> None:
        if self._interrupted and number == signal.SIGINT:
            os._exit(130)
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.received = self.received or number
