"""Settings: one declaration a flag, one parser for flags, presets and files."""

import dataclasses
import re
from pathlib import Path

import pytest
from scripts import assert_one_line_error, run

import config
from config import ExportSettings, TrainSettings, VisualizeSettings
from utils import UserError

CLASSES = [TrainSettings, config.TestSettings, VisualizeSettings, ExportSettings]


def train(*flags: str) -> TrainSettings:
    return config.parse(TrainSettings, list(flags))


def test_config_yaml_and_the_flags_have_the_same_names():
    sections = config.read_yaml(config.CONFIG_FILE)
    assert list(sections) == [*config.SECTIONS, "presets"]
    for cls in CLASSES:
        without_default = {"checkpoint", "out"} if cls is ExportSettings else set()
        assert set(config.read_defaults(cls)) == set(config.names_of(cls)) - without_default


@pytest.mark.parametrize("cls", CLASSES[:3])
def test_defaults_and_presets_are_valid_and_every_flag_has_a_help(cls: type):
    for field in dataclasses.fields(cls):
        assert field.metadata["help"], field.name
    defaults = config.read_defaults(cls)
    assert dataclasses.asdict(config.parse(cls, [])) == defaults
    for preset in config.read_yaml(config.CONFIG_FILE)["presets"]:
        config.parse(cls, ["--preset", preset])


def test_traits_are_those_of_the_declaration():
    free = set(config.names_with(TrainSettings, config.MAY_CHANGE))
    local = set(config.names_with(TrainSettings, config.PER_MACHINE))
    assert local == {"dataset_root", "output_root", "knn_root", "num_workers", "pack"}
    assert local < free
    assert {"log_every", "device", "knn_every", "resume"} < free
    assert not free & {"lr", "max_epoch", "bn_groups", "precision", "seed", "resize", "cosine"}
    comparable = set(config.names_with(config.TestSettings, config.COMPARABLE))
    assert {"protocol", "linear_lrs", "knn_k", "seed", "train_fraction"} < comparable
    assert not comparable & {"trials", "num_workers", "device", "dataset_root", "pretrained"}


def test_the_bare_command_has_the_documented_defaults():
    cfg = train("--dataset_root=x", "--shuffle_bn")
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
    assert train(*flags) == train("--preset", preset)


def test_mocov2_preset():
    cfg = train("--preset", "mocov2")
    assert (cfg.mlp, cfg.aug_plus, cfg.cosine, cfg.temperature) == (True, True, True, 0.2)


def test_later_wins(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("momentum: 0.5\nlr: 1e-4\n")
    cfg = train("--preset", "M1", "--config", str(file), "--lr", "2e-3")
    assert (cfg.momentum, cfg.lr, cfg.exp_version) == (0.5, 2e-3, "M1")
    assert train("--config", str(file)).lr == 1e-4, "1e-4 in YAML is a number"


def test_a_saved_configuration_reads_back(tmp_path: Path):
    cfg = train("--preset", "mocov2", "--schedule", "3", "4", "--no-shuffle_bn")
    config.write(tmp_path / "config.yaml", cfg)
    assert train("--config", str(tmp_path / "config.yaml")) == cfg


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--momentum", "1.5"], "--momentum: '1.5' is not valid: it must be a number from 0 to 1"),
        (["--momentum", "-0.1"], "--momentum"),
        (["--batch_size", "2.5"], "--batch_size: '2.5'"),
        (["--batch_size", "1"], "--batch_size: '1'"),
        (["--lr", "fast"], "--lr: 'fast'"),
        (["--lr", "nan"], "--lr"),
        (["--lr", ".inf"], "--lr"),
        (["--precision", "fp8"], "'auto', 'fp32', 'bf16', 'fp16', 'fp64'"),
        (
            ["--bn_groups", "0"],
            "--bn_groups: '0' is not valid: it must be a whole number from 1 to 4096",
        ),
        (["--seed", "-1"], "--seed: '-1'"),
        (["--shufle_bn"], "did you mean --shuffle_bn"),
        (["--batch", "3"], "did you mean --batch_size"),
        (["--preset", "M9"], "preset 'M9' is not known: choose one of demo"),
        (["--config", "/nowhere.yaml"], "'/nowhere.yaml' cannot be read"),
        (["--schedule", "3", "x"], "--schedule: 'x'"),
        (["--lr"], "--lr"),
        (["stray"], "stray"),
        (["--mlp=true"], "--mlp"),
        (["--mlp", "true"], "unknown argument 'true'"),
        (["--exp_version="], "--exp_version: ''"),
        (["--queue_init", "zeros"], "'keys', 'random'"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], message: str):
    with pytest.raises(UserError) as error:
        train(*flags)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("momentun: 0.9", "unknown key 'momentun' in config"),
        ("momentum: high", "--momentum: 'high'"),
        ("momentum: [0.9]", "--momentum"),
        ("shuffle_bn: 1", "--shuffle_bn: 1 is not valid: it must be true or false"),
        ("lr: true", "--lr: True is not valid"),
        ("- a", "holds no keys"),
        ("a: [", "not valid YAML"),
        ("lr: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("lr: 1\nlr: 2", "appears twice"),
        ("exp_version: null", "--exp_version: null is not valid: it must be text"),
        ("exp_version: on", "--exp_version: True is not valid: it must be text"),
        ("seed: 1.5", "--seed: '1.5'"),
        ("train: {lr: 1}", "unknown key 'train'"),
        ("lr: &a [*a]", "--lr"),
    ],
)
def test_bad_config_files_are_one_line(tmp_path: Path, text: str, message: str):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        train("--config", str(file))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_single_value_serves_as_a_list_in_a_file(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("schedule: 3\nknn_root: null\nexp_version: 7\n")
    cfg = train("--config", str(tmp_path / "c.yaml"))
    assert (cfg.schedule, cfg.knn_root, cfg.exp_version) == ([3], None, "7")


def test_words_in_place_of_values():
    assert train("--schedule").schedule == []  # a constant learning rate
    assert (
        train("--seed=9007199254740993").seed == 2**53 + 1
        and train("--num_keys=1e3").num_keys == 1000
    )
    cfg = train("--bn_groups=auto", "--pack=null", "--knn_root", "null", "--resize=96")
    assert (cfg.bn_groups, cfg.pack, cfg.knn_root, cfg.resize) == ("auto", None, None, 96)
    cfg = config.parse(
        config.TestSettings, ["--load_pretrained_epoch=3", "--linear_lrs", "1", "1e-3"]
    )
    assert (cfg.load_pretrained_epoch, cfg.linear_lrs, cfg.trials) == (3, [1.0, 0.001], "auto")
    assert config.parse(VisualizeSettings, ["--figures", "loss"]).figures == ["loss"]


def test_from_values_checks_what_it_knows_and_leaves_out_the_rest():
    cfg = config.from_values(TrainSettings, {"crop": 48, "no_flag_of_ours": 1})
    assert cfg == dataclasses.replace(train(), crop=48)
    with pytest.raises(UserError, match="--crop: '4' is not valid"):
        config.from_values(TrainSettings, {"crop": 4})


def test_what_has_no_default_must_be_given():
    cfg = config.parse(ExportSettings, ["in.pth", "out.pth", "--format", "timm"])
    assert (cfg.checkpoint, cfg.out, cfg.format, cfg.overwrite) == (
        "in.pth",
        "out.pth",
        "timm",
        False,
    )
    assert config.parse(ExportSettings, ["a", "b", "--format", "null"]).format is None
    with pytest.raises(UserError, match="required"):
        config.parse(ExportSettings, ["in.pth", "--format=timm"])


def test_help_shows_group_default_and_explanation(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        config.parse(TrainSettings, ["--help"], "What it does.")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "What it does." in text
    assert "--num_keys NUM_KEYS K, the keys in the queue (default: 65536)" in text
    for group in ("data:", "augmentation:", "model:", "optimization:", "run:"):
        assert group in text


def test_describe_shows_every_value():
    cfg = train()
    text = config.describe(cfg, "configuration")
    assert all(re.search(rf"\b{name}=", text) for name in config.names_of(TrainSettings))
    assert max(map(len, text.splitlines())) <= 100


# -------------------------------------------------------------------------------- presets

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
    cfg = dataclasses.asdict(train("--preset", preset))
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
    cfg = train(*flags)
    assert (cfg.arch, cfg.momentum, cfg.exp_version) == ("resnet18", 0.0, "M0")
    assert train("--preset", "M0", "M3").momentum == 0.999, "a later one wins"


LONG, DEEP, NULL = "x" * 300, "y/" * 3000, "a\0b"


@pytest.mark.parametrize("name", [LONG, DEEP, NULL], ids=["long", "deep", "null"])
@pytest.mark.parametrize(
    "words",
    [
        "train --dataset_root",
        "train --output_root",
        "train --pack",
        "train --init",
        "train --knn_root",
        "test --encoder_output_root",
        "test --pretrained",
        "visualize --result_path",
        "export --features",
        "export file",
        "export",
    ],
)
def test_a_name_that_no_file_can_have_is_one_line(words: str, name: str) -> None:
    script, *flags = words.split()
    if flags and flags[0].startswith("--"):
        flags = [f"{flags[0]}={name}", *(["in", "out"] if script == "export" else [])]
    else:
        flags = [*flags, name, *(["out"] if not flags else []), "--format=timm"]
    assert_one_line_error(run(script, *flags), "no file can have this name")
