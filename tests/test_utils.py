"""Configuration, random streams, and the files of a run."""

import os
import pickle
import re
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import utils
from utils import UserError, load_config

ROOT = Path(utils.__file__).parent


def test_the_bare_command_has_the_documented_defaults():
    cfg = load_config("train", ["--dataset_root=x", "--shuffle_bn"])
    documented = {
        "arch": "resnet50",
        "crop": 64,
        "batch_size": 256,
        "num_keys": 65536,
        "feature_dim": 128,
        "momentum": 0.999,
        "temperature": 0.07,
        "lr": 0.03,
        "sgd_momentum": 0.9,
        "weight_decay": 1e-4,
        "max_epoch": 200,
        "schedule": [120, 160],
        "save_weight_epoch": 20,
        "dataset_name": "IMAGENET-64",
        "exp_version": "v1",
        "output_root": "output",
        "resize": "auto",
        "bn_groups": "auto",
        "queue_init": "keys",
        "precision": "auto",
        "seed": 0,
        "cosine": False,
        "mlp": False,
        "aug_plus": False,
    }
    assert {name: getattr(cfg, name) for name in documented} == documented
    assert cfg.dataset_root == "x" and cfg.shuffle_bn is True


@pytest.mark.parametrize(
    "flags, preset",
    [
        (["--exp_version=M0", "--momentum=0", "--shuffle_bn"], "M0"),
        (["--exp_version=M1", "--momentum=0.9", "--shuffle_bn"], "M1"),
        (["--exp_version=M2", "--momentum=0.999"], "M2"),
        (["--exp_version=M3", "--momentum=0.999", "--shuffle_bn"], "M3"),
    ],
)
def test_presets_are_the_commands_of_the_readme(flags: list[str], preset: str):
    assert load_config("train", flags) == load_config("train", ["--preset", preset])


def test_mocov2_preset():
    cfg = load_config("train", ["--preset", "mocov2"])
    assert (cfg.mlp, cfg.aug_plus, cfg.cosine, cfg.temperature) == (True, True, True, 0.2)


def test_later_wins(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("momentum: 0.5\nlr: 1e-4\n")
    cfg = load_config("train", ["--preset", "M1", "--config", str(file), "--lr", "2e-3"])
    assert (cfg.momentum, cfg.lr, cfg.exp_version) == (0.5, 2e-3, "M1")
    assert load_config("train", ["--config", str(file)]).lr == 1e-4, "1e-4 in YAML is a number"


def test_a_saved_configuration_reads_back(tmp_path: Path):
    cfg = load_config("train", ["--preset", "mocov2", "--schedule", "3", "4", "--no-shuffle_bn"])
    utils.write_yaml(tmp_path / "config.yaml", cfg)
    assert load_config("train", ["--config", str(tmp_path / "config.yaml")]) == cfg


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--momentum", "1.5"], "--momentum 1.5 is not valid: it must be a number from 0 to 1"),
        (["--momentum", "-0.1"], "--momentum"),
        (["--batch_size", "2.5"], "--batch_size 2.5"),
        (["--batch_size", "1"], "--batch_size 1"),
        (["--lr", "fast"], "--lr 'fast'"),
        (["--lr", "nan"], "--lr"),
        (["--lr", ".inf"], "--lr"),
        (["--precision", "fp8"], "auto or fp32 or bf16 or fp64"),
        (["--bn_groups", "0"], "--bn_groups 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--shufle_bn"], "did you mean --shuffle_bn"),
        (["--batch", "3"], "did you mean --batch_size"),
        (["--preset", "M9"], "preset 'M9' is not known: choose one of demo"),
        (["--config", "/nowhere.yaml"], "'/nowhere.yaml' cannot be read"),
        (["--schedule", "3", "x"], "--schedule 'x'"),
        (["--lr"], "--lr"),
        (["stray"], "stray"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], message: str):
    with pytest.raises(UserError) as error:
        load_config("train", flags)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("momentun: 0.9", "unknown key 'momentun' in the config: did you mean momentum?"),
        ("momentum: high", "--momentum 'high'"),
        ("momentum: [0.9]", "--momentum"),
        ("shuffle_bn: 1", "--shuffle_bn 1"),
        ("lr: true", "--lr True"),
        ("- a", "holds no keys"),
        ("a: [", "not valid YAML"),
        ("lr: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("lr: 1\nlr: 2", "stands twice"),
        ("schedule: 3", "must be a list"),
    ],
)
def test_bad_config_files_are_one_line(tmp_path: Path, text: str, message: str):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_config("train", ["--config", str(file)])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("script", ["train", "test", "visualize"])
def test_every_key_has_a_comment_and_a_valid_default(script: str):
    for key in utils.config_keys(script).values():
        assert key.help, f"{key.name} has no comment"
        assert key.accepts(key.default) == key.default
    for preset in utils.read_yaml(ROOT / "config.yaml")["presets"]:
        load_config(script, ["--preset", preset])


def test_help_shows_default_and_comment(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        load_config("train", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "--num_keys KEYS K, keys in the queue (default: 65536)" in text


def test_streams_are_reproducible_and_apart():
    draw = lambda *key: torch.randint(2**62, (4,), generator=utils.generator(*key)).tolist()
    assert draw(1, "query", 5) == draw(1, "query", 5)
    others = [
        draw(1, "query", 6),
        draw(2, "query", 5),
        draw(1, "key", 5),
        draw(6, "query", 0),
        draw(5, "query", 1),
    ]
    assert len({tuple(x) for x in [draw(1, "query", 5), *others]}) == 6


def test_a_checkpoint_that_finds_no_room_is_one_line_and_keeps_the_old_one(tmp_path: Path):
    """A limit on the size of files stands for the full disk; torch.save hides the system's error behind another."""
    path = tmp_path / "last.pth.tar"
    utils.save_checkpoint(path, {"state_dict": {}, "step": 1})
    limits, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(UserError, match="last.pth.tar' cannot be written: File too large"):
            utils.save_checkpoint(path, {"state_dict": {"x": torch.zeros(1_000_000)}, "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert utils.load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["last.pth.tar"]


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path: Path):
    path = tmp_path / "a" / "file"
    utils.atomic_write(path, lambda file: file.write(b"old"))

    def broken(file) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        utils.atomic_write(path, broken)
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_log_drops_rows_after_the_checkpoint_and_a_torn_line(tmp_path: Path):
    header = ["step", "loss"]
    log = utils.Log(tmp_path / "log.csv", header, 0)
    for step in (2, 4, 6):
        log.add({"step": step, "loss": step / 10})
    with open(tmp_path / "log.csv", "a") as file:
        file.write("8")  # the power went
    utils.Log(tmp_path / "log.csv", header, 4)
    assert utils.read_csv(tmp_path / "log.csv") == {"step": [2, 4], "loss": [0.2, 0.4]}
    utils.Log(tmp_path / "log.csv", header, 0)
    assert utils.read_csv(tmp_path / "log.csv")["step"] == []


def test_checkpoint_path_lists_what_exists(tmp_path: Path):
    folder = tmp_path / "DATA" / "v1"
    for name in ("epoch_0020", "epoch_0040", "last"):
        utils.save_checkpoint(folder / "checkpoints" / f"{name}.pth.tar", {"state_dict": {}})
    assert (
        utils.checkpoint_path(folder, 40).name == "epoch_0040.pth.tar"
        and utils.checkpoint_path(folder, None).name == "last.pth.tar"
    )
    with pytest.raises(UserError, match="no checkpoint of epoch 30: it has epochs 20, 40"):
        utils.checkpoint_path(folder, 30)
    with pytest.raises(UserError, match="no run .*v9.*: runs there: v1"):
        utils.checkpoint_path(folder.parent / "v9", None)


class _Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_checkpoints_that_cannot_be_trusted_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    good = tmp_path / "good"
    utils.save_checkpoint(good, {"state_dict": {"a": torch.ones(1000)}, "epoch": 1})
    assert utils.load_checkpoint(good)["epoch"] == 1
    torch.save({"state_dict": {}, "x": _Code()}, tmp_path / "code")
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-500])
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"state_dict": {}}))
    torch.save([1], tmp_path / "list")
    torch.save({"state_dict": {}, "format": 99}, tmp_path / "new")
    expected = {
        "code": "pickled code",
        "cut": "damaged",
        "text": "refused",
        "empty": "refused",
        "list": "no state_dict",
        "new": "newer version",
        "missing": "No such file",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message) as error:
            utils.load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    assert "must not run" not in capsys.readouterr().out


def test_a_flipped_bit_anywhere_is_one_line_or_harmless(tmp_path: Path):
    """Whatever bit of a checkpoint flips: it is refused, or what it holds is what was saved."""
    good, content = (
        tmp_path / "good",
        {
            "state_dict": {"a": torch.arange(40.0)},
            "epoch": 1,
            "step": 2,
            "arch": "resnet18",
            "config": {"lr": 0.1},
        },
    )
    utils.save_checkpoint(good, content)
    data, bad, refused = good.read_bytes(), tmp_path / "bad", 0
    for position in range(len(data)):
        bad.write_bytes(
            data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :]
        )
        try:
            loaded = utils.load_checkpoint(bad)
        except UserError:
            refused += 1
            continue
        assert torch.equal(loaded["state_dict"]["a"], content["state_dict"]["a"]) and all(
            loaded[name] == content[name] for name in content if name != "state_dict"
        )
    assert refused > len(data) / 4  # the rest is padding and what nobody reads


def test_epochs_are_sorted_by_number(tmp_path: Path):
    for epoch in (9999, 10000, 2):
        utils.save_checkpoint(
            tmp_path / "checkpoints" / f"epoch_{epoch:04d}.pth.tar",
            {"state_dict": {}, "epoch": epoch},
        )
    assert utils.checkpoint_to_resume(tmp_path)[0]["epoch"] == 10000


def test_prepare_run_folder(tmp_path: Path):
    folder = tmp_path / "D" / "v1"
    utils.prepare_run_folder(folder, utils.FolderLock(folder), resume=False, overwrite=False)
    (folder / "eval").mkdir()  # of an untrained encoder, evaluated before
    utils.prepare_run_folder(folder, utils.FolderLock(folder), resume=False, overwrite=False)
    assert (folder / "eval").exists()
    (folder / "config.yaml").write_text("x")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--resume.*--overwrite"):
        utils.prepare_run_folder(folder, utils.FolderLock(folder), resume=False, overwrite=False)
    utils.prepare_run_folder(folder, utils.FolderLock(folder), resume=True, overwrite=False)
    assert (folder / "config.yaml").exists()
    utils.prepare_run_folder(folder, utils.FolderLock(folder), resume=False, overwrite=True)
    assert not (folder / "config.yaml").exists() and (folder / "notes.txt").exists(), (
        "only what a run wrote is deleted"
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        utils.prepare_run_folder(
            tmp_path / "file" / "v1",
            utils.FolderLock(tmp_path / "file" / "v1"),
            resume=False,
            overwrite=False,
        )


def test_durations():
    assert [utils.duration(s) for s in (41.6, 185, 7800, 97200)] == [
        "42 s",
        "3 min 5 s",
        "2 h 10 min",
        "1 d 3 h",
    ]


def test_describe_shows_every_key():
    cfg = load_config("train", [])
    text = utils.describe(cfg, "configuration")
    assert (
        all(re.search(rf"\b{name}=", text) for name in vars(cfg))
        and max(map(len, text.splitlines())) <= 120
    )
    assert utils.describe(SimpleNamespace(a=[1, 2]), "t") == "t:\n  a=1 2"


# ---------------------------------------------------------------------------------------------------------------------- presets

PUBLISHED = {  # what the papers and the reference's scripts and notebook say
    "mocov2": {
        "mlp": True,
        "aug_plus": True,
        "blur": 0.5,
        "cosine": True,
        "temperature": 0.2,
        "shuffle_bn": True,
        "num_keys": 65536,
        "momentum": 0.999,
        "lr": 0.03,
        "batch_size": 256,
        "weight_decay": 1e-4,
        "max_epoch": 200,
        "feature_dim": 128,
        "crop_scale": [0.2, 1.0],
        "symmetric": False,
    },
    "cifar10": {
        "arch": "resnet18",
        "small_stem": True,
        "crop": 32,
        "num_keys": 4096,
        "momentum": 0.99,
        "temperature": 0.1,
        "feature_dim": 128,
        "batch_size": 512,
        "lr": 0.06,
        "cosine": True,
        "weight_decay": 5e-4,
        "max_epoch": 200,
        "aug_plus": True,
        "blur": 0.0,
        "grayscale": 0.2,
        "crop_scale": [0.08, 1.0],
        "mlp": False,
        "mean": [0.4914, 0.4822, 0.4465],
        "std": [0.2023, 0.1994, 0.2010],
        "symmetric": False,
    },
    "M0": {"momentum": 0.0, "shuffle_bn": True},
    "M1": {"momentum": 0.9, "shuffle_bn": True},
    "M2": {"momentum": 0.999, "shuffle_bn": False},
    "M3": {"momentum": 0.999, "shuffle_bn": True},
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_what_was_published(preset: str) -> None:
    cfg = vars(utils.load_config("train", ["--preset", preset]))
    assert {name: cfg[name] for name in PUBLISHED[preset]} == PUBLISHED[preset]


@pytest.mark.parametrize(
    "flags",
    [
        ["--preset", "claims", "M0"],
        ["--preset", "claims", "--preset", "M0"],
        ["--preset=claims", "--preset=M0"],
    ],
)
def test_several_presets_add_up_however_they_are_given(flags: list[str]) -> None:
    cfg = utils.load_config("train", flags)
    assert (cfg.arch, cfg.momentum, cfg.exp_version) == ("resnet18", 0.0, "M0")
    assert (
        utils.load_config("train", ["--preset", "M0", "M3"]).momentum == 0.999
    )  # a later one wins
