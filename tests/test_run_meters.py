"""What a run measures, against closed forms and definitions written out."""

import builtins
import math
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from miniature import write_folders
from training import pretrain, state

import utils
from model import contrastive_loss
from parallel import OneDevice
from run import meters
from run.meters import Meter, Stopwatch
from utils import UserError

CPU = torch.device("cpu")


def unit_rows(seed: int, n: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1)


def entropy_rank(queue: torch.Tensor) -> float:
    singular = torch.linalg.svdvals(queue)
    p = singular / singular.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def test_a_tie_is_no_hit() -> None:
    logits = torch.ones(4, 13)
    assert meters.contrast_hits(logits) == 0
    logits[1, 0] = 1.5
    assert meters.contrast_hits(logits) == 1
    logits[2, 0], logits[2, 5] = 1.5, 1.6
    assert meters.contrast_hits(logits) == 1


def test_alignment_uniformity_and_rank_have_their_closed_forms() -> None:
    q, k = unit_rows(0, 10, 6), unit_rows(1, 10, 6)
    logits = torch.cat([(q * k).sum(1, keepdim=True) / 0.07, torch.zeros(10, 3)], 1)
    distance = float((q - k).square().sum(1).mean())
    assert float(meters.alignment(logits, 0.07)) == pytest.approx(distance)
    pairs = [(q[i] - q[j]).square().sum() for i in range(10) for j in range(i)]
    potential = sum(math.exp(-2 * float(pair)) for pair in pairs) / len(pairs)
    assert float(meters.uniformity(q)) == pytest.approx(math.log(potential))
    assert float(meters.uniformity(q[:1].expand(5, 6))) == pytest.approx(0)
    four_directions = torch.eye(6)[:, :4].repeat(1, 5)
    assert float(meters.effective_rank(four_directions)) == pytest.approx(4)
    one_direction = q[:1].T.expand(6, 30)
    assert float(meters.effective_rank(one_direction)) == pytest.approx(1, abs=1e-3)
    assert float(meters.effective_rank(q.T)) == pytest.approx(entropy_rank(q.T), rel=1e-6)
    assert math.isnan(meters.effective_rank(torch.full((6, 9), math.nan)))  # it ends no run


def test_the_log_holds_what_the_keys_of_the_queue_show(tmp_path: Path) -> None:
    """The last row against the checkpoint, whose queue holds the keys of the last batch of 16."""
    data = tmp_path / "data"
    write_folders(data, classes=4, train=20, test=5, size=20)
    base = ["--max_epoch=2", "--shuffle_bn"]
    assert pretrain(data, tmp_path, *base, "--num_keys=16").returncode == 0
    log = utils.read_csv(tmp_path / "IMAGENET-64/v1/log.csv")
    queue = state(tmp_path)["state_dict"]["module.queue"].double()
    assert log["effective_rank"][-1] == pytest.approx(entropy_rank(queue), rel=1e-3)
    assert log["uniformity"][-1] == pytest.approx(potential_of(queue.T), rel=1e-3)
    assert all(0 < a < 4 for a in log["alignment"])
    done = pretrain(data, tmp_path / "both", *base, "--symmetric", "--num_keys=32")
    assert done.returncode == 0, done.stderr
    both = utils.read_csv(tmp_path / "both/IMAGENET-64/v1/log.csv")
    whole = state(tmp_path / "both")["state_dict"]
    pointer = int(whole["module.queue_ptr"])
    # the keys of one view alone: pairs of views are no pairs of images
    first = whole["module.queue"].double().roll(-pointer, 1)[:, :16]
    assert both["uniformity"][-1] == pytest.approx(potential_of(first.T), rel=1e-3)


def potential_of(keys: torch.Tensor) -> float:
    return float((-2 * torch.pdist(keys).square()).exp().mean().log())


def make_meter() -> Meter:
    return Meter(OneDevice(), torch.float64, batch_size=8, temperature=0.5)


def test_the_meter_reads_means_since_the_last_row(tmp_path: Path) -> None:
    meter, batches = make_meter(), [torch.randn(8, 5, dtype=torch.float64) for _ in range(3)]
    for logits in batches:
        meter.add(contrastive_loss(logits, torch.zeros(8, dtype=torch.long)), logits, 8)
    meter.since -= 10  # seconds
    read, together = meter.read(3, tmp_path), torch.cat(batches)
    loss = F.cross_entropy(together, torch.zeros(24, dtype=torch.long))
    assert read["loss"] == pytest.approx(float(loss))
    hits = sum(int(row.argmax() == 0) for row in together)
    assert read["contrast_top1"] == pytest.approx(100 * hits / 24)
    assert read["alignment"] == pytest.approx(2 - float(together[:, 0].mean()))
    assert read["images_per_second"] == pytest.approx(24 / 10, rel=0.05)
    meter.reset()
    assert meter.read(3, tmp_path)["loss"] == 0


def test_the_meter_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    whole, begun, logits = make_meter(), make_meter(), torch.randn(8, 5, dtype=torch.float64)
    for meter in (whole, begun):
        meter.add(torch.tensor(2.0, dtype=torch.float64), logits, 8)
    begun.since -= 5  # seconds
    saved = begun.state_dict()
    assert saved.keys() == {"sums", "steps", "images", "seconds"}
    resumed = make_meter()
    resumed.load_state_dict(saved)
    resumed.start()  # when the first batch is there
    assert time.monotonic() - resumed.since == pytest.approx(5.0, abs=0.5)
    for meter in (whole, resumed):
        meter.add(torch.tensor(3.0, dtype=torch.float64), logits, 8)
    ours, theirs = resumed.read(2, tmp_path), whole.read(2, tmp_path)
    assert all(ours[name] == theirs[name] for name in ("loss", "contrast_top1", "alignment"))
    old = make_meter()  # older checkpoints have neither the alignment nor the time
    old.load_state_dict({"sums": saved["sums"][:2], "steps": 1, "images": 8})
    assert old.read(1, tmp_path)["loss"] == 2.0 and old.seconds == 0


def test_the_meter_names_the_first_step_that_was_not_finite(tmp_path: Path) -> None:
    logits = torch.zeros(16, 3)
    message = "the loss of step 43 was not finite: there is no checkpoint yet"
    for bad in (float("nan"), float("inf"), -float("inf")):
        meter = make_meter()
        for step, loss in enumerate([1.0, 2.0, bad, 3.0, float("nan")], start=41):
            meter.add(torch.tensor(loss), logits, 16)
            if step < 43:
                mean = 1.0 if step == 41 else 1.5
                assert meter.read(step, tmp_path)["loss"] == pytest.approx(mean)
        with pytest.raises(UserError, match=message):
            meter.read(45, tmp_path)
        again = make_meter()  # saved after two sound steps, then it went on
        sound = {"steps": 2, "sums": torch.tensor([3.0, 0.0])}
        again.load_state_dict(meter.state_dict() | sound)
        for loss in (bad, 3.0, 3.0):
            again.add(torch.tensor(loss), logits, 16)
        with pytest.raises(UserError, match=message):
            again.read(45, tmp_path)


def test_the_stopwatch_adds_up() -> None:
    watch, start = Stopwatch(CPU), time.perf_counter()
    for _ in range(3):
        time.sleep(0.02)
        watch.lap("sleep")
        watch.lap("nothing")
    spent, whole = watch.read(), time.perf_counter() - start
    assert 0.06 <= spent["sleep"] <= whole and spent["nothing"] < 0.02
    watch.lap("nothing")
    again = watch.read()
    assert set(again) == {"nothing"} and watch.total["sleep"] == spent["sleep"]
    assert watch.total["nothing"] == pytest.approx(spent["nothing"] + again["nothing"])
    assert watch.read() == {}


def test_the_memory_of_this_process_where_the_system_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 100 < meters.peak_memory_mb(CPU) < 1e5
    found = builtins.__import__

    def without_resource(name: str, *more: object) -> object:
        if name == "resource":
            raise ImportError(name)
        return found(name, *more)

    monkeypatch.setattr(builtins, "__import__", without_resource)
    assert math.isnan(meters.peak_memory_mb(CPU))
