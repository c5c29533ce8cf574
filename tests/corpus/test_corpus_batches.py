import math
import threading
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfs_cli.corpus.batches import (
    ROUNDS,
    Batches,
    BatchesAhead,
    BatchesOnDevice,
    document_lengths,
    permuted,
    sample_batch,
)
from lfs_cli.corpus.shards import Tokens, write_shards
from lfs_cli.errors import ConfigError, DataError

COUNTING = np.arange(1_000, dtype=np.uint16)
ORDERS = ["random", "shuffled"]
ORDER_OF_SEED_7 = [[972, 556, 308, 604], [388, 652, 196, 740], [463, 703, 119, 839]]


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> str:
    return request.param


def batches(tokens=COUNTING, **options) -> Batches:
    return Batches(Tokens.of(tokens), **({"batch_size": 4, "context_length": 8, "seed": 0} | options))


def test_targets_are_the_tokens_moved_by_one() -> None:
    tokens_BT, targets_BT = batches().at(3)
    assert tokens_BT.shape == targets_BT.shape == (4, 8)
    assert tokens_BT.dtype == targets_BT.dtype == torch.int64
    assert tokens_BT.is_contiguous()
    assert targets_BT.is_contiguous()
    assert torch.equal(targets_BT, tokens_BT + 1)
    assert torch.equal(tokens_BT, tokens_BT[:, :1] + torch.arange(8))


def test_the_windows_of_a_seed_never_change() -> None:
    first = [batches(seed=7).at(step)[0][:, 0].tolist() for step in (0, 1, 1_000_000)]
    assert first == [[452, 807, 984, 210], [445, 662, 215, 852], [64, 709, 940, 117]]


def test_the_order_of_a_seed_never_changes() -> None:
    first = [batches(seed=7, order="shuffled").at(step)[0][:, 0].tolist() for step in (0, 1, 1_000_000)]
    assert first == ORDER_OF_SEED_7


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_windows_cut_on_the_device_are_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: type[np.unsignedinteger], device: str, order: str
) -> None:
    monkeypatch.setattr("lfs_cli.corpus.batches.COPIED_TOKENS", 7)
    tokens = np.random.default_rng(0).integers(0, 65_536, 1_000).astype(dtype)  # also ids that int16 holds as negative
    ours = batches(tokens, batch_size=6, seed=3, order=order)
    fast = BatchesOnDevice(ours, torch.device(device))
    assert tokens.max() > 60_000
    assert BatchesOnDevice.bytes_of(ours.tokens) == tokens.nbytes
    pairs = [(ours.at(step), fast.at(step)) for step in range(50)]
    pairs += zip(ours.sequential(100), fast.sequential(100), strict=True)
    assert len(pairs) > 60
    for plain, quick in pairs:
        for expected, window in zip(plain, quick, strict=True):
            assert window.device.type == device
            assert window.is_contiguous()
            assert torch.equal(window.cpu(), expected)


def test_the_next_batch_is_read_by_a_thread_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, read = batches(), []
    at = Batches.at

    def watched(self: Batches, step: int):
        read.append((step, threading.current_thread() is threading.main_thread()))
        if step == 5:
            raise DataError("the disk is gone", hint="find it")
        return at(self, step)

    expected = {step: plain.at(step) for step in (0, 1, 2, 3, 9)}
    monkeypatch.setattr(Batches, "at", watched)
    ahead = BatchesAhead(plain, pins=False)
    for step in (0, 1, 2, 9, 3):  # with a jump forward and one back
        for ours, right in zip(ahead.at(step), expected[step], strict=True):
            assert torch.equal(ours, right)
    ahead.at(4)
    for _ in range(2):  # what fails is told when it is asked for, not before, and each time
        with pytest.raises(DataError, match="the disk is gone"):
            ahead.at(5)
    ahead._reader.shutdown()
    assert [step for step, _ in read] == [0, 1, 2, 3, 9, 10, 3, 4, 5, 6, 5, 6]
    assert not any(by_main for _, by_main in read)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**40), st.integers(1, 6), st.integers(1, 4), st.sampled_from(ORDERS))
def test_ranks_together_see_the_batch_of_one(seed: int, step: int, rows: int, ranks: int, order: str) -> None:
    options = {"batch_size": rows * ranks, "seed": seed, "order": order}
    alone = batches(**options).at(step)
    shares = [batches(**options, rank=rank, ranks=ranks).at(step) for rank in range(ranks)]
    for whole, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_any_step_can_be_asked_for_first(order: str) -> None:
    going = batches(order=order)
    walked = [going.at(step)[0] for step in range(6)]
    assert torch.equal(batches(order=order).at(5)[0], walked[5])
    assert len({tuple(tokens_BT[:, 0].tolist()) for tokens_BT in walked}) == 6


def test_a_larger_batch_begins_with_the_smaller_one() -> None:
    assert torch.equal(batches(batch_size=9).at(2)[0][:4], batches().at(2)[0])


@pytest.mark.parametrize("draw", ["at", "sample_batch"])
def test_all_windows_are_equally_likely(draw: str) -> None:
    torch.manual_seed(0)
    tokens, context_length, steps, rows = COUNTING[:100], 7, 1_000, 32
    source = batches(tokens, batch_size=rows, context_length=context_length)
    starts = len(tokens) - context_length
    draws = [
        source.at(step)[0][:, 0] if draw == "at" else sample_batch(tokens, rows, context_length, "cpu")[0][:, 0]
        for step in range(steps)
    ]
    counts = torch.cat(draws).bincount(minlength=starts)

    assert len(counts) == starts  # the last possible start is drawn, and none beyond it
    expected = steps * rows / starts
    deviation = math.sqrt(steps * rows * (1 / starts) * (1 - 1 / starts))
    assert (counts - expected).abs().max() < 5 * deviation
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - (starts - 1)) < 5 * math.sqrt(2 * (starts - 1))


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(2, 300),
    context_length=st.integers(1, 20),
    batch_size=st.integers(1, 40),
    reading=st.integers(0, 2**30),
    seed=st.integers(0, 2**63),
)
def test_a_reading_has_every_window_once(length, context_length, batch_size, reading, seed) -> None:
    context_length = min(context_length, length - 1)
    options = {"batch_size": batch_size, "context_length": context_length, "seed": seed, "order": "shuffled"}
    source = batches(COUNTING[:length], **options)
    windows = max(1, (length - context_length) // context_length)
    steps = range(reading * windows // batch_size, -(-(reading + 1) * windows // batch_size))
    before = reading * windows - steps[0] * batch_size
    rows = torch.cat([source.at(step)[0] for step in steps])[before : before + windows]
    targets = torch.cat([source.at(step)[1] for step in steps])[before : before + windows]
    assert torch.equal(targets, rows + 1)
    seen = rows.flatten().sort().values
    assert torch.equal(seen, seen[0] + torch.arange(windows * context_length))  # all side by side, and none twice


def test_readings_differ_in_order_and_in_where_they_begin() -> None:
    source = batches(COUNTING[:161], batch_size=19, order="shuffled")
    orders = [source.at(reading)[0][:, 0] for reading in range(200)]
    assert len({int(order[0]) for order in orders}) > 80
    assert len({int(order.min()) for order in orders}) == 8 + 1  # each place that leaves room for 19 windows
    places = torch.stack([(order - order.min()) // 8 for order in orders])
    counts = torch.stack([places[:, row].bincount(minlength=19) for row in range(19)]).double()
    chi_square = ((counts - 200 / 19) ** 2 / (200 / 19)).sum().item()
    assert abs(chi_square - 18 * 18) < 5 * math.sqrt(2 * 18 * 18)  # all places are equally likely for all rows


def test_all_orders_of_few_windows_are_about_equally_likely() -> None:
    source, orders = batches(COUNTING[:48], batch_size=5, order="shuffled"), Counter()
    for reading in range(4_000):
        orders[tuple(source.at(reading)[0][:, 0].argsort().tolist())] += 1
    assert len(orders) == math.factorial(5)
    chi_square = sum((count - 4_000 / 120) ** 2 / (4_000 / 120) for count in orders.values())
    assert chi_square < 119 + 5 * math.sqrt(2 * 119)


def test_orders_have_names() -> None:
    with pytest.raises(ValueError, match="and is `shuffle`"):
        batches(order="shuffle")


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 5_000), seed=st.integers(0, 2**63))
def test_a_permutation_is_one(count: int, seed: int) -> None:
    keys = list(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(ROUNDS["many"]))
    numbers = np.arange(count, dtype=np.uint64)
    assert np.array_equal(np.sort(permuted(numbers, count, keys)), numbers)
    assert np.array_equal(permuted(numbers[::-3], count, keys), permuted(numbers, count, keys)[::-3])


def test_the_order_of_a_text_of_any_length_costs_no_memory() -> None:
    keys = list(np.random.Philox(key=np.array([1, 2], dtype=np.uint64)).random_raw(ROUNDS["many"]))
    numbers = np.array([0, 1, 2**40, 2**41 - 2], dtype=np.uint64)
    places = permuted(numbers, 2**41 - 1, keys)
    assert len(set(places.tolist())) == 4
    assert places.max() < 2**41 - 1
    assert np.abs(np.diff(places.astype(float))).min() > 2**30


def test_rows_and_steps_are_independent() -> None:
    starts = torch.stack(
        [batches(batch_size=64, seed=seed).at(step)[0][:, 0] for seed in (0, 1) for step in range(200)]
    )
    table = np.corrcoef(starts.numpy()) - np.eye(400)
    assert np.abs(table).max() < 6 / math.sqrt(64)


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(2, 400),
    context_length=st.integers(1, 20),
    batch_size=st.integers(1, 7),
    limit=st.integers(1, 9),
    ranks=st.integers(1, 3),
)
def test_sequential_windows_are_whole_batches_in_order(length, context_length, batch_size, limit, ranks) -> None:
    context_length = min(context_length, length - 1)
    batch_size *= ranks
    options = {"batch_size": batch_size, "context_length": context_length}
    shares = [
        list(batches(COUNTING[:length], **options, rank=rank, ranks=ranks).sequential(limit)) for rank in range(ranks)
    ]
    rows = sorted(row for share in shares for tokens_BT, _ in share for row in tokens_BT[:, 0].tolist())

    windows = (length - 1) // context_length
    expected = min(limit * batch_size, windows // batch_size * batch_size) or windows
    assert len(rows) == expected
    assert all(start % context_length == 0 for start in rows)
    assert np.diff(rows).min(initial=context_length) >= context_length
    assert all(torch.equal(targets_BT, tokens_BT + 1) for share in shares for tokens_BT, targets_BT in share)


def test_sequential_batches_are_spread_over_the_whole_text() -> None:
    starts = [tokens_BT[:, 0].tolist() for tokens_BT, _ in batches(batch_size=2).sequential(3)]
    assert starts == [[0, 160], [328, 496], [656, 824]]


def test_a_short_text_gives_one_smaller_batch() -> None:
    (only,) = batches(COUNTING[:30], batch_size=16).sequential(5)
    assert only[0].shape == (3, 8)


def test_windows_cross_the_borders_of_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", [COUNTING], vocab_size=1_000, tokenizer_hash="00" * 32, shard_tokens=5)
    tokens = Tokens.open(tmp_path, "train")
    cut = Batches(tokens, batch_size=16, context_length=20, seed=3).at(0)
    assert torch.equal(cut[0], batches(batch_size=16, context_length=20, seed=3).at(0)[0])


def test_sample_batch_follows_the_global_generator() -> None:
    torch.manual_seed(5)
    first = sample_batch(COUNTING, 8, 16, "cpu")
    torch.manual_seed(5)
    again = sample_batch(COUNTING, 8, 16, torch.device("cpu"))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], first[0] + 1)
    assert first[0].shape == (8, 16)
    assert first[0].dtype == torch.int64


def test_sample_batch_names_a_device_that_is_not_there() -> None:
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        sample_batch(COUNTING, 2, 4, "cuda:99")


def test_a_mapped_file_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "ids.bin"
    np.zeros(4_000_000, dtype=np.uint16).tofile(path)
    mapped = np.memmap(path, dtype=np.uint16, mode="r")
    tracemalloc.start()
    sample_batch(mapped, 4, 16, "cpu")
    batches(mapped).at(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_the_shortest_text_has_one_window() -> None:
    tokens_BT, targets_BT = batches(COUNTING[:9]).at(0)
    assert tokens_BT.tolist() == [list(range(8))] * 4
    assert targets_BT.tolist() == [list(range(1, 9))] * 4


@pytest.mark.parametrize(
    ("length", "hint"),
    [
        (8, "use a longer text, or a shorter context: `--set model.context_length=7`"),
        (1, "use a longer text"),
        (0, "use a longer text"),
    ],
)
def test_a_text_shorter_than_a_window_is_refused_with_numbers(length: int, hint: str) -> None:
    for attempt in (batches, lambda tokens: sample_batch(tokens, 1, 8, "cpu")):
        with pytest.raises(DataError, match=f"has {length} tokens, and a context of 8 needs at least 9") as caught:
            attempt(COUNTING[:length])
        assert caught.value.hint == hint


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`batch_size` \(4\) is not a multiple of the 3 processes") as caught:
        batches(ranks=3)
    assert caught.value.hint == "set `batch_size` to 6"


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=4))
def test_a_document_begins_at_each_row_and_behind_each_end_of_text(rows: list[list[int]]) -> None:
    starts = [7 * row + i for row, tokens in enumerate(rows) for i in range(7) if i == 0 or tokens[i - 1] == 0]

    lengths = document_lengths(torch.tensor(rows), end_of_text=0).tolist()

    assert lengths == starts + [7 * len(rows)] * (7 * len(rows) + 1 - len(starts))


def test_the_number_of_documents_is_not_asked_of_the_device() -> None:
    assert document_lengths(torch.zeros(2, 5, dtype=torch.int64, device="meta"), 0).shape == (11,)
