"""The method against oracles written here, closed forms, and the equality of two routes."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from encoders import build_encoder
from model import GroupBatchNorm2d, MoCo, contrastive_loss, shuffle, unshuffle
from run.meters import contrast_hits


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def small_moco(**changes) -> MoCo:
    return (
        MoCo(**{"encoder": "resnet18", "feature_dim": 8, "num_keys": 12, **changes})
        .double()
        .train()
    )


def images(n: int = 8, side: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, side, side, dtype=torch.float64)


class PlainReference:
    """Algorithm 1 written out: two ResNets, an update per parameter, a loop over columns."""

    def __init__(self, moco: MoCo) -> None:
        self.q = torchvision.models.resnet18(num_classes=8).double().train()
        self.q.load_state_dict(moco.encoder_q.state_dict())
        self.k = copy.deepcopy(self.q)
        self.queue, self.ptr, self.m, self.t = moco.queue.clone(), 0, moco.m, moco.T

    def step(self, im_q: torch.Tensor, im_k: torch.Tensor) -> torch.Tensor:
        q = F.normalize(self.q(im_q), dim=1)
        with torch.no_grad():
            for pk, pq in zip(self.k.parameters(), self.q.parameters(), strict=True):
                pk.data = pk.data * self.m + pq.data * (1 - self.m)
            k = F.normalize(self.k(im_k), dim=1)
        logits = (
            torch.stack(
                [
                    torch.cat([(q[i] * k[i]).sum()[None], q[i] @ self.queue.clone()])
                    for i in range(len(q))
                ]
            )
            / self.t
        )
        for row in k:
            self.queue[:, self.ptr] = row
            self.ptr = (self.ptr + 1) % self.queue.shape[1]
        return logits


def test_five_steps_equal_a_plain_rendering_of_the_paper():
    moco = small_moco(momentum=0.9)
    plain = PlainReference(moco)
    ours, theirs = (
        torch.optim.SGD(moco.encoder_q.parameters(), 0.1, 0.9),
        torch.optim.SGD(plain.q.parameters(), 0.1, 0.9),
    )
    for _ in range(5):  # 5 x 8 keys wrap a queue of 12 three times
        a, b = images(), images()
        logits, labels, keys = moco(a, b)
        expected = plain.step(a, b)
        torch.testing.assert_close(logits, expected, rtol=1e-7, atol=1e-9)
        for loss, optimizer in (
            (contrastive_loss(logits, labels), ours),
            (F.cross_entropy(expected, labels), theirs),
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moco.enqueue(keys)
    assert moco.queue_ptr.item() == plain.ptr == 40 % 12
    torch.testing.assert_close(moco.queue, plain.queue, rtol=1e-7, atol=1e-9)
    for (name, value), expected in zip(
        moco.encoder_k.state_dict().items(), plain.k.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8, msg=name)


def test_loss_is_minus_log_softmax_of_the_positive():
    logits = torch.randn(5, 7, dtype=torch.float64)
    by_hand = [
        -math.log(math.exp(row[0]) / sum(math.exp(x) for x in row)) for row in logits.tolist()
    ]
    assert contrastive_loss(logits, torch.zeros(5, dtype=torch.long)).item() == pytest.approx(
        sum(by_hand) / 5, rel=1e-12
    )


def test_loss_is_chance_when_nothing_can_be_told_apart():
    moco = small_moco()
    moco.queue.copy_(F.normalize(torch.ones_like(moco.queue), dim=0))
    for encoder in (moco.encoder_q, moco.encoder_k):
        nn.init.zeros_(encoder.fc.weight)
        nn.init.ones_(encoder.fc.bias)
    logits, labels, _ = moco(images(), images())
    assert contrastive_loss(logits, labels).item() == pytest.approx(math.log(12 + 1), rel=1e-12)
    exact = torch.ones(4, 13)
    assert contrast_hits(exact) == 0, "a tie is no hit"
    exact[1, 0] = 1.5
    assert contrast_hits(exact) == 1


def test_logits_are_cosines_over_temperature():
    logits, _, keys = small_moco(temperature=0.25)(images(), images())
    assert logits.shape == (8, 13) and logits.abs().max() <= 4 + 1e-9
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(8, dtype=torch.float64))
    assert not keys.requires_grad and logits.requires_grad


@pytest.mark.parametrize("n, k", [(4, 12), (5, 12), (12, 12), (7, 3), (8, 5), (25, 12)])
def test_queue_is_first_in_first_out_for_any_sizes(n: int, k: int):
    together, single = small_moco(num_keys=k), small_moco(num_keys=k)
    history = list(together.queue.T.clone())
    single.queue.copy_(together.queue)
    for _ in range(4):
        keys = F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=1)
        together.enqueue(keys)
        for key in keys:
            single.enqueue(key[None])
        history = (history + list(keys))[-k:]
        pointer = together.queue_ptr.item()
        oldest_first = together.queue.roll(-pointer, dims=1).T
        torch.testing.assert_close(oldest_first, torch.stack(history), rtol=0, atol=0)
    assert torch.equal(together.queue, single.queue) and torch.equal(
        together.queue_ptr, single.queue_ptr
    )


@pytest.mark.parametrize("m", [0.0, 0.9, 0.999, 1.0])
def test_momentum_update_closed_form(m: float):
    moco = small_moco(momentum=m)
    start = [p.clone() for p in moco.encoder_k.parameters()]
    for p in moco.encoder_q.parameters():
        p.data.add_(torch.randn_like(p))
    for _ in range(4):
        moco.update_key_encoder()
    for k0, k, q in zip(
        start, moco.encoder_k.parameters(), moco.encoder_q.parameters(), strict=True
    ):
        torch.testing.assert_close(k, m**4 * k0 + (1 - m**4) * q, rtol=1e-12, atol=1e-12)
        assert m != 0 or torch.equal(k, q), "m = 0: the key encoder is the query encoder"
        assert m != 1 or torch.equal(k, k0)


@pytest.mark.parametrize("groups, n", [(1, 8), (2, 8), (4, 8), (3, 8), (6, 256)])
def test_grouped_batch_norm_is_batch_norm_of_each_chunk(groups: int, n: int):
    grouped = GroupBatchNorm2d(5, groups).double().train()
    nn.init.normal_(grouped.weight)
    x, gradient = (
        torch.randn(n, 5, 3, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(n, 5, 3, 3, dtype=torch.float64),
    )
    y = grouped(x)
    y.backward(gradient)
    x2, outputs, means, variances = x.detach().clone().requires_grad_(), [], [], []
    for chunk in x2.chunk(groups):
        mean, var = (
            chunk.mean((0, 2, 3), keepdim=True),
            chunk.var((0, 2, 3), unbiased=False, keepdim=True),
        )
        outputs.append(
            (chunk - mean) / (var + grouped.eps).sqrt() * grouped.weight[:, None, None]
            + grouped.bias[:, None, None]
        )
        means.append(chunk.mean((0, 2, 3)))
        variances.append(chunk.var((0, 2, 3)))
    torch.cat(outputs).backward(gradient)
    torch.testing.assert_close(y, torch.cat(outputs))
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(grouped.running_mean, 0.1 * torch.stack(means).mean(0))
    torch.testing.assert_close(grouped.running_var, 0.9 + 0.1 * torch.stack(variances).mean(0))
    assert grouped.num_batches_tracked == 1, "one update a step, whatever the number of groups"


def test_groups_are_used_in_training_only():
    grouped = GroupBatchNorm2d(5, 4).eval()
    x = torch.randn(8, 5, 3, 3)
    torch.testing.assert_close(
        grouped(x),
        F.batch_norm(x, grouped.running_mean, grouped.running_var, grouped.weight, grouped.bias),
    )


@pytest.mark.parametrize("groups, changes", [(1, False), (2, True), (4, True)])
def test_shuffling_changes_keys_only_with_several_groups(groups: int, changes: bool):
    plain = small_moco(bn_groups=groups)
    shuffled = copy.deepcopy(plain)
    a, b, permutation = images(), images(), torch.tensor([3, 6, 1, 0, 7, 2, 5, 4])
    logits, _, keys = plain(a, b)
    logits2, _, keys2 = shuffled(a, b, shuffle=permutation)
    assert torch.allclose(keys, keys2, rtol=1e-7, atol=1e-9) is not changes
    assert torch.allclose(logits, logits2, rtol=1e-6, atol=1e-8) is not changes
    same = copy.deepcopy(plain).encode_keys(b, torch.arange(8))
    torch.testing.assert_close(same, copy.deepcopy(plain).encode_keys(b), rtol=0, atol=0)


def test_shuffled_keys_are_those_of_the_permuted_groups():
    moco = small_moco(bn_groups=2)
    b, permutation = images(), torch.randperm(8)
    expected = torch.empty(8, 8, dtype=torch.float64)
    for half in permutation.chunk(
        2
    ):  # each group of the shuffled batch by itself, through an encoder with plain batch norm
        encoder = build_encoder("resnet18", 8).double().train()
        encoder.load_state_dict(moco.encoder_k.state_dict())
        expected[half] = F.normalize(encoder(b[half]), dim=1)
    torch.testing.assert_close(moco.encode_keys(b, permutation), expected, rtol=1e-7, atol=1e-9)


def test_unshuffle_inverts_shuffle():
    x, permutation = torch.randn(9, 3), torch.randperm(9)
    assert torch.equal(unshuffle(shuffle(x, permutation), permutation), x)
    assert not torch.equal(shuffle(x, permutation), x)


def test_running_statistics_take_one_update_a_step_and_none_while_the_queue_fills():
    moco = small_moco(bn_groups=4)
    before = [b.clone() for b in moco.encoder_k.buffers()]
    queue = moco.queue.clone()
    moco.fill_queue(images())
    assert all(torch.equal(a, b) for a, b in zip(before, moco.encoder_k.buffers(), strict=True))
    assert not torch.equal(queue, moco.queue)
    moco(images(), images())
    for encoder in (moco.encoder_q, moco.encoder_k):
        assert encoder.bn1.num_batches_tracked == 1
        assert not torch.equal(encoder.bn1.running_mean, torch.zeros_like(encoder.bn1.running_mean))


def test_first_queue_holds_the_keys_that_training_would_compute():
    moco, x = small_moco(bn_groups=2), images(12)
    expected = copy.deepcopy(moco).encode_keys(x)
    moco.fill_queue(x)
    assert torch.equal(moco.queue.T, expected) and moco.queue_ptr.item() == 0


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_weights_load_into_a_plain_torchvision_resnet(arch: str):
    encoder = MoCo(arch, 8, 4, bn_groups=4).encoder_q.eval()
    plain = torchvision.models.get_model(arch, num_classes=8).eval()
    plain.load_state_dict(encoder.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(x), plain(x), rtol=1e-4, atol=1e-5)


def test_state_dict_has_the_names_of_the_reference():
    names = small_moco(mlp=True).state_dict().keys()
    assert {
        "encoder_q.conv1.weight",
        "encoder_k.layer4.1.bn2.running_var",
        "encoder_q.fc.0.weight",
        "encoder_q.fc.2.bias",
        "queue",
        "queue_ptr",
    } <= set(names)


def test_bf16_computes_the_logits_in_float32():
    moco = small_moco().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _, keys = moco(images().float(), images().float())
    assert logits.dtype == keys.dtype == moco.queue.dtype == torch.float32


def test_a_copy_is_independent():
    moco = small_moco()
    twin = copy.deepcopy(moco)
    nn.init.zeros_(moco.encoder_q.fc.weight)
    nn.init.zeros_(moco.encoder_q.fc.bias)
    logits, _, _ = twin(images(), images())
    assert logits[:, 0].abs().min() > 0, "the copy runs its own encoder"


def test_several_devices_do_what_connect_says():
    """Two "processes" that hold half a batch each give the logits and keys of one with all."""
    moco, a, b, permutation = small_moco(), images(), images(), torch.randperm(8)
    whole, halves = copy.deepcopy(moco).eval(), copy.deepcopy(moco).eval()
    logits, _, keys = whole(a, b, shuffle=permutation)
    for rows in (slice(0, 4), slice(4, 8)):
        part = copy.deepcopy(halves)
        part.connect(
            encode_q=part.encoder_q.__call__,
            encode_k=part.encoder_k.__call__,
            shuffle=lambda x, p: shuffle(x, p),
            gather=lambda keys: keys,
            rows=rows,
        )
        part_logits, labels, part_keys = part(a[rows], b, shuffle=permutation)
        torch.testing.assert_close(part_keys, keys)
        torch.testing.assert_close(part_logits, logits[rows])
        assert len(labels) == 4


def test_statistics_that_are_deferred_wait_for_the_one_who_takes_them():
    taken, x = [], torch.randn(8, 5, 3, 3)
    plain, deferred = GroupBatchNorm2d(5, 2), GroupBatchNorm2d(5, 2)
    deferred.defer = taken.append
    torch.testing.assert_close(deferred(x), plain(x))
    assert deferred.num_batches_tracked == 0 and taken[0].shape == (2, 2, 5)
    deferred.update_running(taken[0])
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, deferred.get_buffer(name)), name
