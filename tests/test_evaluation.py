"""Features, kNN and linear classifiers, by themselves."""

import math
from collections import Counter

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from evaluation_data import class_folders

import dataloader
import encoders
import parallel
import utils
from evaluation import knn, linear
from evaluation.features import Extractor, Features, dataset_features, freeze
from evaluation.knn import knn_hits
from evaluation.linear import LinearSettings, draw_order, linear_evaluation, train_linear
from evaluation.subsets import Subset, draw_fraction, hold_out


def clusters(n: int, classes: int = 4, noise: float = 0.05, seed: int = 0) -> Features:
    """Features (1, n, 6) around one centre for each class, far from standardized, and labels."""
    width, random = 6, torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    scale, shift = 10.0 ** torch.linspace(-2, 2, width), torch.linspace(-50, 50, width)
    points = centres[labels] + noise * torch.randn(n, width, generator=random)
    return Features((points * scale + shift)[None], labels)


def cosine(x: list[float], y: list[float]) -> float:
    product = sum(a * b for a, b in zip(x, y, strict=True))
    return product / math.hypot(*x) / math.hypot(*y)


def labelled(features: list[list[float]], labels: list[int]) -> Features:
    return Features(torch.tensor([features]), torch.tensor(labels))


# --------------------------------------------------------------------------------------- kNN


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_knn_is_a_vote_counted_by_hand(weighted: bool, k: int) -> None:
    bank, queries = clusters(40, noise=2.0), clusters(30, noise=2.0, seed=1)
    hits = 0
    for x, label in zip(queries.images.tolist(), queries.labels.tolist(), strict=True):
        cosines = [cosine(x, y) for y in bank.images.tolist()]
        votes = Counter()
        for i in sorted(range(40), key=lambda i: -cosines[i])[:k]:
            votes[int(bank.labels[i])] += math.exp(cosines[i] / 0.07) if weighted else 1
        hits += max(votes, key=lambda c: (votes[c], -c)) == label
    assert 0 < hits < 30
    assert knn_hits(bank, queries, k=k, weighted=weighted) == hits


def test_knn_weights_and_length_matter() -> None:
    bank = labelled([[0.01, 0.0], [60.0, 80.0], [60.0, 80.0]], [0, 1, 1])
    query = labelled([[5.0, 0.1]], [0])
    assert knn_hits(bank, query, k=3, temperature=0.07) == 1  # one near beats two far
    assert knn_hits(bank, query, k=3, weighted=False) == 0
    assert knn_hits(bank, query, k=3, temperature=100.0) == 0


def test_knn_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clusters(40, noise=2.0), clusters(30, noise=2.0, seed=1)
    whole = knn_hits(*data, k=7)
    monkeypatch.setattr(knn, "BLOCK", 3 * 40)
    assert knn_hits(*data, k=7) == whole


def test_knn_refuses_more_neighbours_than_images() -> None:
    with pytest.raises(ValueError, match="k 41"):
        knn_hits(clusters(40), clusters(8), k=41)


# ------------------------------------------------------------------------- linear classifier


def train(data: Features, test: Features, *, trials: int = 1, **settings) -> linear.Classifiers:
    return linear_evaluation(data, test, LinearSettings(**settings), range(trials), classes=4)


def test_separable_features_are_classified_without_error() -> None:
    lrs = [0.01, 0.1, 1.0]
    result = train(clusters(200), clusters(100, seed=1), epochs=10, lrs=lrs, trials=3)
    assert result.accuracy[:, -1].tolist() == [100.0] * 3


def test_saved_classifier_gives_the_reported_accuracy_on_plain_features() -> None:
    test = clusters(100, noise=1.0, seed=1)
    result = train(clusters(200, noise=1.0), test, epochs=5, lrs=[0.03], trials=2)
    for trial in range(2):
        logits = F.linear(test.images, result.weight[trial], result.bias[trial])
        assert torch.equal(result.predicted[trial], logits.argsort(dim=1, descending=True))
        top1 = 100 * float((logits.argmax(1) == test.labels).double().mean())
        assert 30 < top1 < 95
        assert float(result.accuracy[trial, -1]) == pytest.approx(top1, abs=1e-4)
    assert result.accuracy.shape == (2, 5)
    assert not torch.equal(result.weight[0], result.weight[1])


def test_the_test_split_decides_nothing() -> None:
    test = clusters(120, noise=1.0, seed=1)
    others = [test._replace(labels=test.labels.flip(0).roll(1)), test.take(slice(7))]
    options = {"epochs": 4, "lrs": [1e-5, 0.01, 0.1], "trials": 2}
    first, *rest = (train(clusters(300, noise=1.0), t, **options) for t in [test, *others])
    for other in rest:
        assert other.learning_rate == first.learning_rate
        assert other.heldout_top1 == first.heldout_top1
        assert torch.equal(other.weight, first.weight) and torch.equal(other.bias, first.bias)
        assert not torch.equal(other.accuracy, first.accuracy)


def test_learning_rate_is_the_best_on_the_held_out_part() -> None:
    result = train(clusters(300, noise=0.5), clusters(40), epochs=5, lrs=[1e-6, 0.1])
    assert result.heldout_top1["0.1"] > result.heldout_top1["1e-06"] + 20
    assert result.learning_rate == 0.1


def test_the_held_out_part_was_not_trained_on() -> None:
    """Labels that have nothing to do with the features can only be learnt by heart."""
    features = torch.randn(1, 120, 200, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(4, (120,), generator=torch.Generator().manual_seed(1))
    data = Features(features, labels)
    result = train(data, data, epochs=60, lrs=[0.1, 0.2], batch_size=32)
    assert result.accuracy[0, -1] == 100 and max(result.heldout_top1.values()) < 70


def test_all_at_once_is_each_alone() -> None:
    data, test = clusters(100, noise=1.0), clusters(40, seed=1)
    views = torch.cat([data.views, data.views.flip(1).roll(3, 1)]).double()
    data, test = data._replace(views=views), test._replace(views=test.views.double())
    lrs, trials, options = [0.003, 0.1, 1.0], [0, 3], {"epochs": 3, "seed": 5, "batch_size": 16}
    together = train_linear(data, test, LinearSettings(lrs=lrs, **options), trials, 4)
    weight, bias, accuracy = together
    assert weight.shape == (2, 3, 4, 6) and bias.shape == (2, 3, 4) and accuracy.shape == (2, 3, 3)
    for t, trial in enumerate(trials):
        for i, lr in enumerate(lrs):
            alone = train_linear(data, test, LinearSettings(lrs=[lr], **options), [trial], 4)
            torch.testing.assert_close(weight[t, i], alone[0][0, 0], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(bias[t, i], alone[1][0, 0], rtol=1e-9, atol=1e-9)
            assert torch.equal(accuracy[t, i], alone[2][0, 0])


def test_it_is_sgd_on_the_cross_entropy() -> None:
    """Against a classifier by itself, with torch's cosine schedule, in the same order."""
    data = clusters(50, noise=1.0)
    data = data._replace(views=data.views.double())
    x, n, epochs = data.images, 50, 4
    mean, std = x.mean(0), x.std(0, correction=0)
    layer = nn.Linear(6, 4).double()
    first = 0.01 * torch.randn(6, 4, generator=utils.generator(5, "linear weights", 2))
    layer.weight.data, layer.bias.data = first.T.double(), torch.zeros(4).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3 * epochs)
    for epoch in range(epochs):
        order = draw_order(torch.arange(n), n, 1, 5, 2, epoch)
        assert sorted(order.tolist()) == list(range(n))
        for now in order[:48].split(16):
            optimizer.zero_grad()
            F.cross_entropy(layer((x[now] - mean) / std), data.labels[now]).backward()
            optimizer.step()
            schedule.step()
    settings = LinearSettings(lrs=[0.2], epochs=epochs, seed=5, batch_size=16)
    weight, bias, _ = train_linear(data, data, settings, [2], 4)
    plain = (layer.weight / std).detach()
    torch.testing.assert_close(weight[0, 0], plain, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(bias[0, 0], layer.bias.detach() - plain @ mean, rtol=1e-6, atol=1e-6)


def test_an_epoch_meets_each_image_once_in_either_view() -> None:
    rows = torch.tensor([1, 4, 5, 7, 9] * 20) + 10 * torch.arange(20).repeat_interleave(5)
    order = draw_order(rows, 200, 2, seed=0, trial=0, epoch=0)
    assert sorted((order % 200).tolist()) == sorted(rows.tolist())
    assert 30 < int((order >= 200).sum()) < 70
    assert not torch.equal(order, draw_order(rows, 200, 2, seed=0, trial=0, epoch=1))
    assert not torch.equal(order, draw_order(rows, 200, 2, seed=0, trial=1, epoch=0))


def test_nothing_to_choose_on_is_said() -> None:
    data = clusters(4)
    with pytest.raises(utils.UserError, match="--linear_lrs"):
        train(data, data, epochs=1, lrs=[0.1, 1.0])
    train(data, data, epochs=1, lrs=[0.1])


def test_constant_features_do_no_harm() -> None:
    data, test = (
        each._replace(views=F.pad(each.views, (0, 2), value=7.0))
        for each in (clusters(100), clusters(40, seed=1))
    )
    result = train(data, test, epochs=10, lrs=[0.1])
    assert result.accuracy[0, -1] == 100.0 and result.weight.isfinite().all()


# ---------------------------------------------------------------------------- parts of the data


def test_held_out_part_is_stratified() -> None:
    labels = torch.tensor([0] * 100 + [1] * 31 + [2] * 4 + [3] * 2 + [4])
    kept, held = hold_out(labels, 0.1, torch.Generator().manual_seed(0))
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(len(labels)))
    assert torch.bincount(labels[held], minlength=5).tolist() == [10, 3, 1, 1, 0]
    other = hold_out(labels, 0.1, torch.Generator().manual_seed(1))[1]
    assert not torch.equal(held, other)


def test_a_fraction_is_one_of_each_class_and_the_seed_decides_which() -> None:
    order = torch.randperm(153, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)[order]
    parts = [draw_fraction(labels, 0.1, utils.generator(seed, "x")) for seed in (0, 0, 1)]
    assert torch.equal(parts[0], parts[1]) and not torch.equal(parts[0], parts[2])
    for part in parts:
        assert torch.bincount(labels[part]).tolist() == [10, 5, 1] and len(part.unique()) == 16
    assert torch.equal(draw_fraction(labels, 1.0, utils.generator(0, "x")), torch.arange(153))


# ---------------------------------------------------------------------------------- features


def extractor(encoder: nn.Module, **changes) -> Extractor:
    return Extractor(encoder, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3], parallel.OneDevice(), **changes)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Subset:
    folder = tmp_path_factory.mktemp("features")
    class_folders(folder, seed=0, per_class=4)
    dataset = dataloader.open_dataset(str(folder), "train", fit="center", resize="auto", crop=16)
    return Subset(dataset, torch.tensor([3, 0, 5, 7, 8, 9, 11]))


def resnet() -> nn.Module:
    return encoders.remove_head(encoders.build_encoder("resnet18", 8))


def test_features_are_those_of_eval_mode_whatever_the_batches(images: Subset) -> None:
    encoder = resnet().train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    encoder.layer1.eval()
    found = dataset_features(extractor(encoder), images)
    assert encoder.training and encoder.layer2[0].bn1.training  # the modes come back
    assert not encoder.layer1.training
    assert found.views.shape == (1, 7, 512) and found.views.dtype == torch.float32
    assert torch.equal(found.labels, images.dataset.labels[images.indices])
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.25, 0.3]])[..., None, None]
    x = (images.dataset.fetch(images.indices).images / 255 - mean) / std
    with torch.no_grad():
        expected = torch.stack([encoder.eval()(x), encoder(x.flip(-1))])
    torch.testing.assert_close(found.images, expected[0], rtol=1e-4, atol=1e-5)
    both = dataset_features(extractor(encoder, batch_size=3), images, mirror=True)
    torch.testing.assert_close(both.views, expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_that_changes_is_noticed(
    images: Subset, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = resnet()
    # batch norm left in train mode
    monkeypatch.setattr(type(encoder), "eval", lambda self: self.train())
    with pytest.raises(RuntimeError, match="bn1.running_mean"):
        dataset_features(extractor(encoder), images)


def test_one_bit_of_change_is_noticed_and_nan_is_not() -> None:
    encoder = nn.Linear(3, 2)
    encoder.weight.data[0, 0] = float("nan")
    with freeze(encoder):
        pass
    with pytest.raises(RuntimeError, match="weight"), freeze(encoder):
        encoder.weight.view(-1)[5] *= 1 + 2**-22


def test_features_that_are_not_finite_are_said(images: Subset) -> None:
    encoder = resnet()
    encoder.conv1.weight.data[0] = float("nan")
    with pytest.raises(utils.UserError, match="choose another"):
        dataset_features(extractor(encoder, not_finite="choose another"), images)
