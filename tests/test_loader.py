"""The data loader on small shards, against a dealer in plain Python written from the description of the task."""

import base64
import random
import subprocess
import sys
import tempfile
import threading
import time
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small_run
import torch
from conftest import records_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import BOS, text_of, write_shard

import train_gpt
from train_gpt import (
    Hyperparameters,
    TrainLoader,
    UserError,
    World,
    canonical_tokens,
    prefix_table,
    read_vocabulary,
    validation_batches,
)

VOCAB = 50257


def documents_of(tokens):
    """The documents of a text; what stands before the first BOS belongs to none."""
    documents = []
    for token in tokens:
        if token == BOS:
            documents.append([])
        if documents:
            documents[-1].append(token)
    return documents


def with_cut(sizes, max_seq_len):
    """What a loader takes for micro-batches of these sizes, with one cut of documents throughout."""
    return [(T, max_seq_len) for T in sizes]


def deal_by_hand(texts, sizes, max_seq_len=None):
    """Per step: (epoch, 8 micro-batches of (tokens, ends)); ends with a None at a step that no file can fill.

    sizes: tokens of a micro-batch with the length at which documents are cut, or, with max_seq_len for all, alone.
    """
    texts, begun, position, steps = [documents_of(text) for text in texts], 0, 0, []
    for T, cut in with_cut(sizes, max_seq_len) if max_seq_len else sizes:
        files = [[document[:cut] for document in documents] for documents in texts]
        if all(deal_from(documents, T) is None for documents in files):
            return [*steps, None]
        while (dealt := deal_from(files[begun % len(files)][position:], T)) is None:
            begun, position = begun + 1, 0
        deal, used = dealt
        position += used
        steps.append((1 + begun // len(files), deal))
    return steps


def deal_from(documents, T):
    """8 micro-batches of T + 1 tokens and how many documents they took; None if the documents don't fill them."""
    deal, used = [], 0
    for _ in range(8):
        tokens, ends = [], [0]
        while len(tokens) < T + 1:
            if used == len(documents):
                return None
            tokens = (tokens + documents[used])[: T + 1]
            ends.append(min(len(tokens), T))
            used += 1
        deal.append((tokens, ends))
    return deal, used


APART = Hyperparameters(micro_batch_tokens=1)  # a rank's micro-batches are not joined


def load(paths, sizes, size=1, rank=0, max_seq_len=64, hp=APART):
    sizes = with_cut(sizes, max_seq_len) if max_seq_len else sizes
    return TrainLoader(paths, [(*of_step, 0) for of_step in sizes], hp, World(rank, size))


def in_dealing_order(of_ranks):
    """The micro-batches of all ranks: rank 0's first one, rank 1's first one, ..."""
    return [b for turn in zip(*(batch.micro_batches for batch in of_ranks), strict=True) for b in turn]


def epoch_of(batch, paths):
    files_begun, _ = batch.position
    return 1 + (files_begun - 1) // len(paths)


def load_all_ranks(paths, sizes, size, max_seq_len=64):
    """Per step: (epoch, the 8 micro-batches in the order they were dealt in)."""
    ranks = [list(load(paths, sizes, size, rank, max_seq_len)) for rank in range(size)]
    steps = []
    for of_ranks in zip(*ranks, strict=True):
        assert len({batch.position for batch in of_ranks}) == 1
        steps.append((epoch_of(of_ranks[0], paths), in_dealing_order(of_ranks)))
    return steps


def ends_of(batch):
    """Where documents end, 0 first, from what each position says of its own."""
    starts, ends = (t.tolist() for t in batch.documents)
    assert len(starts) == len(ends) == len(batch.inputs)
    assert {t.dtype for t in batch.documents} == {torch.int32}
    found = [0]
    while found[-1] < len(ends):
        start, end = found[-1], ends[found[-1]]
        assert starts[start:end] == [start] * (end - start) and ends[start:end] == [end] * (end - start)
        found.append(end)
    return found


def assert_dealt(step, expected):
    (epoch, batches), (expected_epoch, deal) = step, expected
    assert epoch == expected_epoch
    assert len(batches) == 8
    for batch, (tokens, ends) in zip(batches, deal, strict=True):
        T = len(tokens) - 1
        assert batch.inputs.tolist() == tokens[:-1]
        assert batch.targets.tolist() == tokens[1:]
        assert ends_of(batch) == list(dict.fromkeys(ends)) and ends[-1] == T  # the last one may be empty


def write_texts(folder, texts):
    return [write_shard(Path(folder) / f"train_{i:06d}.bin", text) for i, text in enumerate(texts)]


def ordinary_lengths(seed, count, low=2, high=90):
    generator = random.Random(seed)
    return [generator.randint(low, high) for _ in range(count)]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def two_texts(tmp_path):
    texts = [text_of(ordinary_lengths(1, 150)), text_of(ordinary_lengths(2, 120), 20_000)]
    return texts, write_texts(tmp_path, texts)


# ------------------------------------------------------------------------------------------------------ train batches


def test_every_micro_batch_starts_at_a_document(two_texts):
    for batch in load(two_texts[1], [40, 40, 100]):
        assert [int(b.inputs[0]) for b in batch.micro_batches] == [BOS] * 8


def test_targets_are_the_inputs_shifted_by_one(two_texts):
    for batch in load(two_texts[1], [40, 100]):
        for b in batch.micro_batches:
            assert torch.equal(b.inputs[1:], b.targets[:-1])
            assert b.inputs.dtype == b.targets.dtype == torch.int32


def test_a_micro_batch_has_the_tokens_its_step_asks_for(two_texts):
    sizes = [40, 7, 100, 1]
    for T, batch in zip(sizes, load(two_texts[1], sizes), strict=True):
        assert {len(b.inputs) for b in batch.micro_batches} == {len(b.targets) for b in batch.micro_batches} == {T}


def test_documents_are_cut_to_the_maximum_length(tmp_path):
    (path,) = write_texts(tmp_path, [text_of([100] * 60)])
    (batch,) = load([path], [70], max_seq_len=30)
    first, text = batch.micro_batches[0], text_of([100] * 3)
    assert ends_of(first) == [0, 30, 60, 70]
    assert first.inputs.tolist() == text[:30] + text[100:130] + text[200:210]


def test_a_stage_cuts_documents_at_its_own_length_where_that_of_the_run_is_not_less():
    stages = [train_gpt.STAGES[0]._replace(max_seq_len=cut, classes=0) for cut in (30, 1 << 30)]
    for of_run, cuts in ((64, [30, 64]), (20, [20, 20])):
        hp = Hyperparameters(stages=(*stages, train_gpt.STAGES[-1]), train_max_seq_len=of_run)
        schedule, tokens = train_gpt.TrainingSchedule(hp), train_gpt.STAGES[0].tokens // 8
        assert [schedule.size(step) for step in schedule.starts[:2]] == [(tokens, cut, 0) for cut in cuts]


def test_a_step_has_the_classes_of_its_stage_and_where_the_vocabulary_has_no_more_all():
    for classes, taken in ((0, 0), (16, 16), (368, 368), (384, 0), (400, 0)):  # 0: all
        stages = (train_gpt.STAGES[0]._replace(classes=classes), train_gpt.STAGES[-1]._replace(classes=32))
        schedule = train_gpt.TrainingSchedule(Hyperparameters(stages=stages, vocab_size=301))  # padded: 384
        assert [schedule.size(step)[2] for step in schedule.starts] == [taken, 32]


@pytest.mark.parametrize("count", [48, 64, 160, 1000])
def test_classes_of_a_softmax_are_all_targets_and_others_evenly_spread(count):
    targets = np.random.default_rng(0).integers(200, 260, 60).astype(np.uint16)
    classes = train_gpt.softmax_classes(targets, count, 1000)
    assert len(classes) == count and (np.diff(classes) > 0).all() and classes[-1] < 1000
    assert np.isin(targets, classes).all()
    others = np.setdiff1d(np.arange(1000), targets)
    chosen = np.flatnonzero(np.isin(others, classes))
    steps = np.diff([*chosen, chosen[0] + len(others)])  # round the end to the first
    assert steps.min() >= len(others) // len(chosen) and steps.max() - steps.min() <= 1
    assert np.array_equal(classes, train_gpt.softmax_classes(targets, count, 1000))  # the text alone decides
    if count < 1000:
        assert not np.array_equal(classes, train_gpt.softmax_classes(targets[::-1].copy(), count, 1000))


def test_classes_of_a_softmax_are_the_targets_alone_when_as_many_differ_and_all_there_are_when_more():
    targets = np.arange(64)[::-1] * 3
    assert train_gpt.softmax_classes(targets, 64, 1000).tolist() == sorted(targets)
    assert train_gpt.softmax_classes(targets, 63, 1000) is None


def test_a_step_of_more_different_targets_than_classes_takes_all_classes(two_texts):
    (batch,) = TrainLoader(two_texts[1], [(40, 30, 16)], Hyperparameters(), World())
    assert {b.classes for b in batch.micro_batches} == {None}


def test_all_micro_batches_of_a_step_have_the_classes_of_all_its_targets_on_any_number_of_ranks(two_texts):
    texts, paths = two_texts
    sizes, counts = [(40, 30), (40, 30), (100, 64)], (0, 320, 1008)
    by_hand = deal_by_hand(texts, sizes)
    expected = [None]
    for (_, deal), count in zip(by_hand[1:], counts[1:], strict=True):
        targets = np.array([token for tokens, _ in deal for token in tokens[1:]], dtype=np.uint16)
        expected.append(train_gpt.softmax_classes(targets, count, 50304))
    for size in (1, 2, 4, 8):
        for rank in range(size):
            for hp in (Hyperparameters(), APART):
                sized = [(*of_step, count) for of_step, count in zip(sizes, counts, strict=True)]
                steps = TrainLoader(paths, sized, hp, World(rank, size))
                for batch, classes in zip(steps, expected, strict=True):
                    for b in batch.micro_batches:
                        assert (b.classes is None) == (classes is None)
                        assert len(b.tensors()) == 7 + (classes is not None)
                        assert classes is None or b.classes.tolist() == classes.tolist()


@pytest.mark.parametrize("highest", [3, 65536, 70_000, 2**31])
def test_the_sorting_order_is_numpys_stable_one(highest):
    rows = np.random.default_rng(0).integers(highest, size=(2, 500), dtype=np.int64)
    rows[1, :250] = rows[0, :250]
    expected = np.argsort(rows, axis=None, kind="stable")
    for dtype in [np.int32] + [np.uint16] * (highest <= 65536):
        assert np.array_equal(train_gpt.sorting_order(rows.astype(dtype)), expected)


def test_micro_batches_have_the_orders_of_inputs_and_slots_unless_they_learn_nothing(tmp_path):
    small_run.write_text(tmp_path)
    hp = small_run.small_hyperparameters(tmp_path)
    (batch,) = next(iter(TrainLoader([tmp_path / "train_1.bin"], [(96, 64, 0)], hp, World(size=8)))).micro_batches
    for rows, order in ((batch.inputs, batch.order), (batch.slots.flatten(), batch.slot_order)):
        assert order.dtype == torch.int32 and torch.equal(order.long(), rows.argsort(stable=True))
    for (batch,), _ in train_gpt.validation_batches([tmp_path / "val_0.bin"], hp, World()):
        assert batch.order.numel() == batch.slot_order.numel() == 0


# ------------------------------------------------------------------------------------------------ joined micro-batches


@pytest.mark.parametrize(
    "limit, together",
    [
        (1, [1, 1, 1, 1]),  # one alone may be larger
        (100, [1, 1, 1, 1]),
        (199, [1, 1, 1, 1]),
        (200, [2, 2, 2, 1]),
        (399, [2, 2, 2, 1]),
        (400, [4, 4, 2, 1]),
        (799, [4, 4, 2, 1]),
        (800, [8, 4, 2, 1]),
        (2**20, [8, 4, 2, 1]),
    ],
)
def test_as_many_micro_batches_are_joined_as_the_limit_allows_and_divide_a_ranks_number(limit, together):
    hp = Hyperparameters(micro_batch_tokens=limit)
    found = [train_gpt.micro_batches_together(100, hp, World(0, size)) for size in (1, 2, 4, 8)]
    assert found == together


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("limit", [1, 80, 160, 320])
def test_joined_micro_batches_are_a_ranks_own_end_to_end(two_texts, size, limit):
    texts, paths = two_texts
    ((_, deal),) = deal_by_hand(texts, [40], 30)
    together = min(max(limit // 40, 1), 8 // size)
    for rank in range(size):
        (batch,) = load(paths, [40], size, rank, 30, Hyperparameters(micro_batch_tokens=limit))
        own = deal[rank::size]
        assert len(batch.micro_batches) == len(own) // together
        for b, first in zip(batch.micro_batches, range(0, len(own), together), strict=True):
            parts = own[first : first + together]
            assert b.inputs.tolist() == [token for tokens, _ in parts for token in tokens[:-1]]
            assert b.targets.tolist() == [token for tokens, _ in parts for token in tokens[1:]]
            ends = [40 * i + end for i, (_, ends) in enumerate(parts) for end in ends]
            assert ends_of(b) == list(dict.fromkeys(ends))  # a document ends at every micro-batch's end
        # What all look up: every rank's micro-batches apart
        assert [inputs.tolist() for inputs in batch.dealt] == [tokens[:-1] for tokens, _ in deal]


def test_from_one_cut_to_another_the_deal_goes_on_with_the_next_document(two_texts):
    texts, paths = two_texts
    sizes = [*[(40, 30)] * 3, *[(100, 64)] * 3, (40, 12), *[(120, 90)] * 8]
    expected = deal_by_hand(texts, sizes)
    assert {epoch for epoch, _ in expected} == {1, 2}
    for step, hand in zip(load_all_ranks(paths, sizes, 2, None), expected, strict=True):
        assert_dealt(step, hand)


def test_documents_are_dealt_in_order_each_once(two_texts):
    texts, paths = two_texts
    first_ids = [document[1] for document in documents_of(texts[0])]  # the ids count up: a document's name
    seen = []
    for epoch, batches in load_all_ranks(paths, [40] * 4, size=4):
        assert epoch == 1
        for b in batches:
            starts = [i for i, token in enumerate(b.inputs.tolist()) if token == BOS]
            seen += [int(b.targets[i]) for i in starts]
    # A document that begins at the one token which is a target only is used up, but not seen as an input.
    assert seen == sorted(set(seen))
    assert set(seen) <= set(first_ids)
    expected = deal_by_hand(texts, [40] * 4, 64)
    assert seen == [t[i + 1] for _, deal in expected for t, _ in deal for i in range(len(t) - 1) if t[i] == BOS]


def test_the_deal_is_that_of_the_plain_dealer_over_shards_and_epochs(two_texts):
    texts, paths = two_texts
    sizes = [40, 40, 64, 100, 100, 120] + [120] * 12 + [30]
    expected = deal_by_hand(texts, sizes, 64)
    assert {epoch for epoch, _ in expected} == {1, 2}
    for step, hand in zip(load_all_ranks(paths, sizes, 1), expected, strict=True):
        assert_dealt(step, hand)


def test_from_any_steps_position_the_deal_goes_on_as_if_it_had_not_stopped(two_texts):
    sizes = [(T, 64, 0) for T in [60, 120] * 8]
    steps = list(TrainLoader(two_texts[1], sizes, Hyperparameters(), World()))
    assert epoch_of(steps[-1], two_texts[1]) > 1
    for done in range(1, len(steps)):
        loader = TrainLoader(two_texts[1], sizes[done:], Hyperparameters(), World(), steps[done - 1].position)
        batch = next(iter(loader))
        assert batch.position == steps[done].position
        assert torch.equal(batch.micro_batches[0].inputs, steps[done].micro_batches[0].inputs)


def test_a_deal_that_the_shard_cannot_fill_is_dropped_whole_and_the_next_shard_starts_afresh(tmp_path):
    # 20 documents of 11 tokens: one deal of 8 micro-batches of 10 + 1 tokens, then 12 documents are left: another
    # deal, 4 documents are left, and all of them are dropped.
    texts = [text_of([11] * 20), text_of([11] * 20, 30_000)]
    steps = list(load(write_texts(tmp_path, texts), [10] * 3))
    firsts = [[b.inputs[1].item() for b in batch.micro_batches] for batch in steps]
    assert firsts == [
        [10 * i for i in range(8)],
        [10 * i for i in range(8, 16)],
        [30_000 + 10 * i for i in range(8)],
    ]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_any_number_of_ranks_deals_the_same_micro_batches(two_texts, size):
    texts, paths = two_texts
    sizes = [40, 100, 100, 120, 120, 120]
    for step, hand in zip(load_all_ranks(paths, sizes, size), deal_by_hand(texts, sizes, 64), strict=True):
        assert_dealt(step, hand)


def test_a_rank_takes_every_size_th_micro_batch_from_its_own_on(two_texts):
    texts, paths = two_texts
    ((_, deal),) = deal_by_hand(texts, [40], 64)
    (batch,) = load(paths, [40], size=4, rank=3)
    assert [b.inputs.tolist() for b in batch.micro_batches] == [deal[3][0][:-1], deal[7][0][:-1]]


def test_tokens_ahead_of_the_first_document_are_left_out(tmp_path):
    (path,) = write_texts(tmp_path, [[7, 8, 9, *text_of([20] * 30)]])
    (batch,) = load([path], [19])
    assert batch.micro_batches[0].inputs.tolist() == text_of([20])[:19]


def random_lengths(seed, count, kind):
    """Lengths of documents: all 1, short, or a mixture with documents longer than any micro-batch."""
    choices = {"ones": [1], "short": range(1, 40), "mixture": [1, 1, 1, 2, 3, 17, 60, 300]}[kind]
    return random.Random(seed).choices(choices, k=count)


length_lists = st.builds(
    random_lengths,
    st.integers(0, 1000),
    st.one_of(st.integers(0, 30), st.integers(100, 500)),
    st.sampled_from(["ones", "short", "mixture"]),
)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(length_lists, min_size=1, max_size=3),
    ahead=st.integers(0, 4),
    sizes=st.lists(st.tuples(st.integers(1, 8) | st.integers(1, 60), st.integers(1, 80)), min_size=1, max_size=6),
    size=st.sampled_from([1, 2, 4, 8]),
)
def test_any_lengths_of_documents_with_any_cuts_are_dealt_as_by_the_plain_dealer(lengths, ahead, sizes, size):
    texts = [[5] * ahead + text_of(of_file, 1000 * i) for i, of_file in enumerate(lengths)]
    expected = deal_by_hand(texts, sizes)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_texts(folder, texts)
        if expected[-1] is None:
            with pytest.raises(UserError, match="can fill a step"):
                load_all_ranks(paths, sizes, size, None)
        else:
            for step, hand in zip(load_all_ranks(paths, sizes, size, None), expected, strict=True):
                assert_dealt(step, hand)


def test_a_file_without_any_document_is_an_error_that_names_it_and_the_remedy(tmp_path):
    (path,) = write_texts(tmp_path, [range(5000)])
    with pytest.raises(UserError) as error:
        list(load([path], [40]))
    for words in (str(path), "begin with token 50256", "get more data or lower"):
        assert words in str(error.value)


def test_a_document_as_long_as_its_shard_fills_nothing_and_the_next_shard_is_taken(tmp_path):
    texts = [text_of([5000]), text_of([11] * 20)]
    paths = write_texts(tmp_path, texts)
    (batch,) = load(paths, [10])
    assert batch.micro_batches[0].inputs.tolist() == texts[1][:10]
    with pytest.raises(UserError, match="can fill a step"):
        list(load(paths[:1], [10]))


def test_one_document_can_fill_a_micro_batch_where_the_cut_allows_it(tmp_path):
    (path,) = write_texts(tmp_path, [text_of([5000] * 8)])
    (batch,) = load([path], [4000], max_seq_len=5000)
    for b in batch.micro_batches:
        assert ends_of(b) == [0, 4000]


def test_a_micro_batch_can_hold_thousands_of_documents_of_one_token(tmp_path):
    T = 3000
    (path,) = write_texts(tmp_path, [[BOS] * (8 * (T + 1))])
    (batch,) = load([path], [T])
    for b in batch.micro_batches:
        assert ends_of(b) == list(range(T + 1))


# ----------------------------------------------------------------------------------------------------------- documents


def micro_batch_of(lengths):
    tokens = np.array([*text_of(lengths), BOS], dtype=np.uint16)
    ends, canonical = np.array([0, *accumulate(lengths)]), np.arange(65536)
    return records_sample().make_micro_batch(tokens, ends, canonical, 64, torch.device("cpu"))


@pytest.mark.parametrize("T", [1, 300, 16_384, 49_152, 262_144])
@pytest.mark.parametrize("longest", [1, 3, 700, 5000])
def test_each_position_knows_where_its_document_begins_and_ends(T, longest):
    generator, lengths, left = random.Random(T * longest), [], T
    while left:
        lengths.append(min(generator.randint(1, longest), left))
        left -= lengths[-1]
    assert ends_of(micro_batch_of(lengths)) == [0, *accumulate(lengths)]


# ------------------------------------------------------------------------------------------ shards ahead and over again


def test_when_the_files_run_out_they_start_over_and_the_epoch_counts_up(tmp_path):
    texts = [text_of([11] * 17), text_of([11] * 17, 30_000)]
    paths = write_texts(tmp_path, texts)
    steps = list(load(paths, [10] * 10))
    assert [epoch_of(batch, paths) for batch in steps] == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    for earlier, later in zip(steps, steps[4:], strict=False):
        for a, b in zip(earlier.micro_batches, later.micro_batches, strict=True):
            assert torch.equal(a.inputs, b.inputs)


def test_a_run_says_in_its_log_at_which_step_the_files_start_over(tmp_path, capsys, monkeypatch):
    hp, _ = train_gpt.parse_arguments(
        ["--preset=smoke", "--num_scheduled_iterations=14", "--num_extension_iterations=2", f"--log_dir={tmp_path}"],
        has_gpu=False,
    )
    texts = [text_of(ordinary_lengths(seed, 75)) for seed in (3, 4)]
    paths = write_texts(tmp_path, texts)
    schedule = train_gpt.TrainingSchedule(hp)
    trained = []
    trainer = object.__new__(train_gpt.Trainer)  # the run's loop alone: no model
    trainer.hp, trainer.world, trainer.schedule, trainer.checkpoints = hp, World(), schedule, None
    trainer.model = SimpleNamespace(prefixes=torch.empty(hp.padded_vocab, dtype=torch.int32))
    trainer.enter_step = lambda step: None
    trainer.add_gradients, trainer.update = lambda step, batch: trained.append(batch), lambda step, following: None
    trainer.validate = lambda batches, windows: 1.0
    trainer.check_gradients = lambda log, lag: None
    log = train_gpt.Log(hp, World())
    trainer.run(log, paths, [])
    log.close()

    sizes = [schedule.size(step)[:2] for step in range(hp.total_steps)]
    epochs = [epoch for epoch, _ in deal_by_hand(texts, sizes)]
    assert len(trained) == hp.total_steps and epochs[-1] >= 3
    lines = [line for line in log.path.read_text().splitlines() if line.startswith("epoch")]
    begins = {epoch: epochs.index(epoch) for epoch in epochs if epoch > 1}
    assert lines == [f"epoch {e}: the train files ran out at step {s} and start over" for e, s in begins.items()]


def test_the_next_shard_is_read_while_the_first_is_dealt(two_texts, monkeypatch):
    _, paths = two_texts
    paths = [*paths, paths[0].with_name("not_there_yet.bin")]
    reads, read_tokens = [], train_gpt.read_tokens

    def noting_read(path, *arguments):
        reads.append((path, threading.current_thread()))
        return read_tokens(path, *arguments)

    monkeypatch.setattr(train_gpt, "read_tokens", noting_read)
    loader = load(paths, [10] * 4)
    assert wait_until(lambda: len(reads) == 2)
    assert reads[0] == (paths[0], threading.current_thread())
    assert reads[1][0] == paths[1] and reads[1][1] is not threading.current_thread()
    assert len(list(loader)) == 4 and loader.files_begun == 1
    assert len(reads) == 2  # one shard ahead, no more


def bad_id(path):
    data = bytearray(path.read_bytes())
    data[1024 + 2 * 300 : 1024 + 2 * 301] = (50257).to_bytes(2, "little")
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, words",
    [(bad_id, "token id 50257 at position 300"), (truncate, "the file holds"), (Path.unlink, "No such file")],
    ids=["id out of range", "truncated", "deleted"],
)
def test_damage_in_a_later_shard_ends_the_iteration_with_an_error_that_names_the_file(two_texts, damage, words):
    texts, paths = two_texts
    before = set(threading.enumerate())
    damage(paths[1])
    sizes = [40] * 40
    good = sum(1 for epoch, deal in deal_by_hand(texts[:1], sizes, 64) if epoch == 1)
    loader, done = load(paths, sizes), []
    steps = iter(loader)
    with pytest.raises(UserError) as error:
        while True:
            done.append(next(steps))
    assert len(done) == good > 0
    assert str(paths[1]) in str(error.value) and words in str(error.value)
    assert next(steps, "ended") == "ended"
    assert wait_until(lambda: set(threading.enumerate()) <= before, 5)


def test_threads_end_when_the_last_step_is_taken_and_when_the_iteration_is_given_up(two_texts):
    _, paths = two_texts
    before = set(threading.enumerate())
    assert len(list(load(paths, [40] * 5))) == 5
    assert wait_until(lambda: set(threading.enumerate()) <= before, 5)
    given_up = iter(load(paths, [40] * 5))
    next(given_up)
    given_up.close()
    assert wait_until(lambda: set(threading.enumerate()) <= before, 5)


def test_documents_begin_with_the_bos_that_is_given(tmp_path):
    values = dict(vocab_size=10, vocabulary="", val_tokens=80, val_batch_size=80, micro_batch_tokens=9)
    hp = Hyperparameters(bos=3, **values)
    tokens = [3, 5, 6, 7, 8] * 40
    (path,) = write_texts(tmp_path, [tokens])
    for batch in TrainLoader([path], [(9, 64, 0)], hp, World()):
        assert [b.inputs.tolist() for b in batch.micro_batches] == [tokens[:9]] * 8
        assert {tuple(ends_of(b)) for b in batch.micro_batches} == {(0, 5, 9)}
    assert [ends_of(b) for b in validation_chunks([path], hp, World())] == [[0, 5, 10]] * 8
    with pytest.raises(UserError, match="documents that begin with token 4 and count up to 64"):
        next(iter(TrainLoader([path], [(9, 64, 0)], Hyperparameters(bos=4, **values), World())))


# --------------------------------------------------------------------------------------------------------- validation


@pytest.fixture
def validation(tmp_path):
    """4 validation steps of 8 x 16 tokens, over three files; (tokens, paths, hyperparameters)."""
    tokens = text_of(ordinary_lengths(6, 40, 1, 50))
    tokens[128] = BOS  # a document that begins with a chunk
    tokens[160] = BOS  # and one that begins with the last target of one
    cuts = [0, 100, 333, len(tokens)]
    paths = [write_shard(tmp_path / f"val_{i}.bin", tokens[cuts[i] : cuts[i + 1]]) for i in range(3)]
    return tokens, paths, Hyperparameters(val_tokens=512, val_batch_size=128)


def validation_chunks(paths, hp, world):
    return [chunk for (chunk,), _ in validation_batches(paths, hp, world)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_cover_every_validation_chunk_exactly_once(validation, size):
    tokens, paths, hp = validation
    of_ranks = [validation_chunks(paths, hp, World(rank, size)) for rank in range(size)]
    assert {len(batches) for batches in of_ranks} == {32 // size}
    chunks = sorted((b.inputs.tolist(), b.targets.tolist()) for batches in of_ranks for b in batches)
    assert chunks == sorted((tokens[i : i + 16], tokens[i + 1 : i + 17]) for i in range(0, 512, 16))
    assert sum(int(b.targets.sum()) for batches in of_ranks for b in batches) == sum(tokens[1:513])


def test_validation_chunks_lie_at_fixed_offsets_in_the_stream_of_all_files(validation):
    tokens, paths, hp = validation
    for number, batch in enumerate(validation_chunks(paths, hp, World())):
        assert batch.inputs.tolist() == tokens[16 * number : 16 * number + 16]
    for number, batch in enumerate(validation_chunks(paths, hp, World(3, 4))):
        start = 16 * (4 * number + 3)
        assert batch.inputs.tolist() == tokens[start : start + 16]


def test_the_documents_of_a_validation_chunk_are_found_from_their_first_token(validation):
    tokens, paths, hp = validation
    for number, batch in enumerate(validation_chunks(paths, hp, World())):
        chunk = tokens[16 * number : 16 * number + 16]
        ends = [0, *(i for i in range(1, 16) if chunk[i] == BOS), 16]
        assert ends_of(batch) == ends


def test_validation_files_that_end_too_early_are_an_error(validation):
    _, paths, _ = validation
    hp = Hyperparameters(val_tokens=2048, val_batch_size=128)
    with pytest.raises(UserError, match="2049"):
        validation_batches(paths, hp, World())


# -------------------------------------------------------------------------------------------------------- shard files


def test_a_header_gives_the_number_of_tokens(tmp_path):
    assert train_gpt.read_header(write_shard(tmp_path / "a.bin", range(1000))) == 1000
    assert train_gpt.read_header(write_shard(tmp_path / "b.bin", [])) == 0


def make_directory(path):
    path.mkdir()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: write_shard(path, [1, 2], magic=1), "magic number 1 instead of 20240520"),
        (lambda path: write_shard(path, [1, 2], version=7), "version 7, this program reads version 1"),
        (lambda path: write_shard(path, [1, 2], count=3), "promises 3 tokens, the file holds 2"),
        (lambda path: write_shard(path, [1, 2], count=1), "promises 1 tokens, the file holds 2"),
        (lambda path: write_shard(path, [1, 2], count=-1), "promises -1 tokens"),
        (lambda path: path.write_bytes(write_shard(path, [1, 2]).read_bytes() + b"x"), "promises 2 tokens"),
        (lambda path: path.write_bytes(b"\0" * 1023), "truncated, 1023 bytes"),
        (lambda path: path.write_bytes(b""), "truncated, 0 bytes"),
        (lambda path: None, "No such file"),
        (make_directory, "Is a directory"),
    ],
)
def test_a_file_that_is_not_a_whole_shard_is_an_error_that_names_it(tmp_path, make, words):
    path = tmp_path / "shard.bin"
    make(path)
    with pytest.raises(UserError) as error:
        train_gpt.read_header(path)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value)
    assert "\n" not in str(error.value)


def test_reading_tokens_gives_them_all_or_the_first_few(tmp_path):
    path = write_shard(tmp_path / "a.bin", [5, 50256, 7])
    assert train_gpt.read_tokens(path, VOCAB).tolist() == [5, 50256, 7]
    assert train_gpt.read_tokens(path, VOCAB, limit=2).tolist() == [5, 50256]
    assert train_gpt.read_tokens(path, VOCAB, limit=9).tolist() == [5, 50256, 7]
    assert train_gpt.read_tokens(path, VOCAB, limit=0).tolist() == []


def test_an_id_outside_the_vocabulary_is_an_error_that_says_where(tmp_path):
    path = write_shard(tmp_path / "a.bin", [5, 50257, 65535])
    with pytest.raises(UserError) as error:
        train_gpt.read_tokens(path, VOCAB)
    assert str(error.value).startswith(f"{path}: token id 50257 at position 1, the vocabulary ends at 50256")
    assert train_gpt.read_tokens(path, VOCAB, limit=1).tolist() == [5]
    path = write_shard(tmp_path / "b.bin", [50256, 50257])
    with pytest.raises(UserError, match="token id 50257 at position 1"):
        train_gpt.read_tokens(path, VOCAB)


# ---------------------------------------------------------------------------- the vocabulary, spellings and prefixes


def vocabulary(path, tokens, **values):
    """Hyperparameters for tokens, which they find in a file that is written for them."""
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    return Hyperparameters(**{"vocabulary": str(path), "vocab_size": len(tokens) + 1, "bos": len(tokens), **values})


def prefixes_by_hand(tokens):
    """Of each token the longest of those that are shorter and that it begins with; -1 for none."""
    found = []
    for token in tokens:
        shorter = [other for other in tokens if len(other) < len(token) and token.startswith(other)]
        found.append(tokens.index(max(shorter, key=len)) if shorter else -1)
    return found


@given(st.lists(st.binary(min_size=1, max_size=5), min_size=1, unique=True) | st.sets(st.text("ab", min_size=1)))
@settings(deadline=None)
def test_a_tokens_prefix_is_the_longest_other_one_with_which_it_begins(tokens):
    tokens = [token if isinstance(token, bytes) else token.encode() for token in tokens]
    with tempfile.TemporaryDirectory() as folder:
        table = prefix_table(vocabulary(Path(folder, "own.tiktoken"), tokens))
    assert table.dtype == torch.int32 and len(table) % 128 == 0
    assert table.tolist() == prefixes_by_hand(tokens) + [-1] * (len(table) - len(tokens))


def test_prefixes_in_gpt2s_vocabulary_which_comes_with_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)  # a DATA_PATH with data only
    hp = Hyperparameters()
    ids, table = read_vocabulary(hp), prefix_table(hp)
    for token, prefix in {b" the": b" th", b" th": b" t", b" t": b" ", b" theater": b" theat", b"\n\n": b"\n"}.items():
        assert table[ids[token]] == ids[prefix]
    assert all(table[ids[bytes([byte])]] == -1 for byte in range(256))
    assert len(table) == 50304 and (table[50256:] == -1).all() and table.max() < 50256  # BOS, and the padding
    tokens, rng = sorted(ids, key=ids.get), random.Random(0)
    for i in rng.sample(range(50256), 50):
        shorter = [token for token in tokens if len(token) < len(tokens[i]) and tokens[i].startswith(token)]
        assert table[i] == (ids[max(shorter, key=len)] if shorter else -1)


def test_without_a_vocabulary_no_token_has_a_prefix_and_each_its_own_spelling():
    hp = Hyperparameters(vocabulary="")
    assert (prefix_table(hp) == -1).all() and len(prefix_table(hp)) == 50304
    assert canonical_tokens(hp).tolist() == [*range(50304)]


def test_spellings_differ_in_case_accents_and_space_around_only(tmp_path):
    # Among them a part of a character, one that is an accent only, ligatures, and an e with the accent apart
    tokens = [
        "the",
        " The",
        "THE\n",
        "th",
        b"\xc3",
        " ",
        "\n\t",
        "\u0301",
        "\u00e9",
        " e",
        "e\u0301",
        "\ufb01",
        "fi",
        "a  B",
        "A b ",
    ]
    tokens = [t if isinstance(t, bytes) else t.encode() for t in tokens]
    found = canonical_tokens(vocabulary(tmp_path / "own.tiktoken", tokens))
    assert found.dtype == np.int32
    assert found[: len(tokens)].tolist() == [0, 0, 0, 3, 4, 5, 5, 7, 8, 8, 8, 11, 11, 13, 13]
    assert found[len(tokens) :].tolist() == [*range(len(tokens), len(found))]


def test_gpt2s_tokens_have_about_as_many_spellings_as_the_public_record_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)  # a DATA_PATH with data only: the vocabulary is the program's
    found = canonical_tokens(Hyperparameters())
    assert len({*found[:50257].tolist()}) == 32_999  # 32,980 there
    assert (found <= np.arange(50304)).all() and (found[found] == found).all() and found[50256] == 50256


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ": No such file or directory"),
        (b"IQ== 0\nIg== x\n", ": line 2 is no token in base64 and its rank"),
        (b"IQ== 0\nIg==\n", ": line 2 is no token in base64 and its rank"),
        (b"IQ== 0\n\nIg== 1\n", ": line 2 is no token in base64 and its rank"),
        (b"!!!! 0\n", ": line 1 is no token in base64 and its rank"),
        (b"IQ== 0\nIg== 2\n", ": its 2 tokens have not the ranks 0 to 1, for --vocab_size=3"),
        (b"IQ== 0\nIg== 0\n", ": its 2 tokens have not the ranks 0 to 1, for --vocab_size=3"),
        (b"IQ== 0\nIQ== 1\n", ": its 1 tokens have not the ranks 0 to 1, for --vocab_size=3"),
        (b"IQ== 0\nIg== 1\nIw== 2\n", ": its 3 tokens have not the ranks 0 to 1, for --vocab_size=3"),
        (b"", ": its 0 tokens have not the ranks 0 to 1, for --vocab_size=3"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_named_with_what_would_be_right(tmp_path, content, words):
    path = tmp_path / "own.tiktoken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_vocabulary(Hyperparameters(vocabulary=str(path), vocab_size=3, bos=2))
    remedy = "--vocabulary= takes the file that the data was tokenized with, or nothing, for n-grams of tokens"
    assert str(error.value) == f"{path}{words}; {remedy}"


def test_a_vocabulary_whose_name_no_file_can_have_is_named():
    with pytest.raises(UserError, match="aaaa: File name too long; --vocabulary= takes"):
        read_vocabulary(Hyperparameters(vocabulary="a" * 300))


def test_a_bracket_in_the_folder_or_the_name_is_a_letter_where_no_pattern_matches(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path / "a[1]")
    (tmp_path / "a[1]").mkdir()
    for name in ("x[y]_1.bin", "x[y]_2.bin", "xz_3.bin"):
        (tmp_path / "a[1]" / name).touch()
    names = {pattern: [path.name for path in train_gpt.find_files(pattern)] for pattern in ("x[y]_*.bin", "x[z]_*.bin")}
    assert names == {"x[y]_*.bin": ["x[y]_1.bin", "x[y]_2.bin"], "x[z]_*.bin": ["xz_3.bin"]}


def test_python_ends_though_a_read_in_the_background_does_not():
    reads = "import time, train_gpt; print(train_gpt.in_background(int, '7').result()); "
    reads += "failed = train_gpt.in_background(int, 'x').exception(); print(type(failed).__name__); "
    reads += "train_gpt.in_background(time.sleep, 300)"
    folder = Path(train_gpt.__file__).parent
    ended = subprocess.run([sys.executable, "-c", reads], cwd=folder, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "7\nValueError\n", "")


def test_a_shard_that_is_lost_behind_its_header_is_named(tmp_path, monkeypatch):
    (path,) = write_texts(tmp_path, [text_of([100] * 6)])
    count = train_gpt.read_header(path)
    monkeypatch.setattr(train_gpt, "read_header", lambda path: count)
    path.unlink()
    with pytest.raises(UserError, match=r"\.bin: No such file"):
        train_gpt.read_tokens(path, 50257)
