"""The table of n-grams: hashes against plain Python integers, its optimizer in float64, its ways between ranks.

As in test_kernels.py, kernels run in Triton's interpreter where there is no GPU.
"""

import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import checkpoint
import numpy as np
import pytest
import small_run
import torch
import torch.nn.functional as F
from conftest import relative_error
from small_run import small_hyperparameters, write_text
from test_kernels import interpreted, poisoned_memory
from test_model import plain_ngrams
from test_sample import load_model

import train_gpt
from train_gpt import Hyperparameters, Log, Progress, Trainer, TrainLoader, UserError, World, find_files

CPU = torch.device("cpu")
C = 24  # not a power of two


# ---------------------------------------------------------------------------- rows, slots


def starts_of(ends):
    return np.repeat(ends[:-1], np.diff(ends))


# The first documents have a token, two and three; the last is longer than the rest.
ENDS = [0, 1, 3, 6, 7, 300, 1000]


@pytest.mark.parametrize("rows", [16, 4096, 2_097_152, 21_000_000, 2**31 - 16])
@pytest.mark.parametrize("vocabulary", [3, 65536])
def test_rows_are_hashes_in_wrapping_int32_inside_a_document(rows, vocabulary):
    tokens = np.random.default_rng(0).integers(vocabulary, size=1000).astype(np.uint16)
    found = train_gpt.hashed_ngrams(tokens, starts_of(ENDS), rows)
    assert found.dtype == np.int32 and found.tolist() == [*plain_ngrams(tokens.tolist(), rows, ENDS[:-1])]


def test_rows_of_known_ngrams():
    tokens, half = np.array([2, 3, 60000], dtype=np.uint16), 2048
    bigrams = 108939 ^ 54382, (36313 * 60000 - 2**32) ^ (27191 * 3)
    trigram = (17351 * 60000) ^ (60961 * 3) ^ (45259 * 2)
    assert bigrams[1] < 0 < trigram
    assert train_gpt.hashed_ngrams(tokens, np.zeros(3, int), 4096).tolist() == [
        [half - 1, bigrams[0] % (half - 1), bigrams[1] % (half - 1)],
        [4095, 4095, half + trigram % (half - 1)],
    ]


def test_what_lacks_tokens_has_the_last_row_of_its_half():
    starts = starts_of(ENDS)
    rows, before = train_gpt.hashed_ngrams(np.arange(3, 1003), starts, 4096), np.arange(1000) - starts
    for k, order in enumerate((2, 3)):
        assert ((rows[k] == 2048 * (k + 1) - 1) == (before < order - 1)).all()


def step_of(tmp_path, rank, ranks, **overrides):
    """A step's batch and, in the order of its tokens, what its own micro-batches hold."""
    if not (tmp_path / "train_1.bin").exists():
        write_text(tmp_path)
    hp = small_hyperparameters(tmp_path, **overrides)
    (batch,) = TrainLoader(find_files(hp.train_files), [(24, 64, 0)], hp, World(rank, ranks))
    return hp, batch


def plain_rows_of(batch, hp):
    """By hand, of the micro-batches apart, as they were dealt; tokens count as the first that is spelled alike."""
    spelled = [train_gpt.canonical_tokens(hp)[b.inputs.numpy()].tolist() for b in batch.micro_batches]
    starts = [{*b.documents.starts.tolist()} for b in batch.micro_batches]
    return [plain_ngrams(tokens, hp.ngram_rows, of) for tokens, of in zip(spelled, starts, strict=True)]


@pytest.mark.parametrize("joined", [1, 96, 1024])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_slots_stand_for_the_rows_that_ranks_give_each_other(tmp_path, ranks, joined):
    """The exchange by hand: each rank's share gives what its `asked` says, in the order of ranks."""
    steps = [step_of(tmp_path, rank, ranks, micro_batch_tokens=joined, ngram_rows=512) for rank in range(ranks)]
    share, (hp, _) = 512 // ranks, steps[0]
    given = []
    for rank, (_, batch) in enumerate(steps):
        rows, asked, _, taken, counts = batch.exchange
        assert rows.diff().gt(0).all() and rows.min() >= 0 and rows.max() < share
        if ranks == 1:
            given.append([rows.tolist()])
            assert taken == [len(rows)]
            continue
        assert {*asked.tolist()} == {*range(len(rows))}  # nothing that nobody asks for
        given.append([(rank * share + rows[places]).tolist() for places in asked.split(counts)])
    for rank, (_, batch) in enumerate(steps):
        cache = [row for owner in range(ranks) for row in given[owner][rank]]
        assert batch.exchange.taken == [len(given[owner][rank]) for owner in range(ranks)]
        assert cache == sorted({*cache})
        for b, rows in zip(batch.micro_batches, plain_rows_of(batch, hp), strict=True):
            assert np.array(cache)[b.slots.numpy()].tolist() == [*rows]
            assert b.slots.dtype == torch.int32
        assert {*cache} == {row for rows in plain_rows_of(batch, hp) for of_order in rows for row in of_order}
        assert len(cache) <= train_gpt.cache_rows(hp, World(rank, ranks))


def test_a_rank_that_nobody_asks_has_nothing_to_give():
    places = np.zeros(64, np.int32)
    by_rank = [np.array([[1, 2, 1], [9, 9, 9]], np.int32), np.array([[40, 3, 1], [3, 41, 3]], np.int32)]
    by_rank += [np.array([[1], [40]], np.int32)] * 2
    expected = [
        ([0, 1, 0, 2, 2, 2], [1, 2, 3, 9], [0, 1, 3, 0, 2, 0, 0], [3, 0, 0, 0], [3, 2, 1, 1]),
        ([2, 1, 0, 1, 3, 1], [], [], [2, 0, 2, 0], [0, 0, 0, 0]),
        ([0, 1], [8, 9], [0, 1, 0, 0], [1, 0, 1, 0], [0, 2, 1, 1]),
        ([0, 1], [], [], [1, 0, 1, 0], [0, 0, 0, 0]),
    ]
    for rank, (slots, rows, asked, taken, given) in enumerate(expected):
        found, (*parts, sources, found_taken, found_given) = train_gpt.exchange_rows(by_rank, rank, places, True)
        assert found.flatten().tolist() == slots
        assert [*map(list, parts)] == [rows, asked]
        assert [found_taken, found_given] == [taken, given]
        asked_by = np.split(np.array(asked, int), np.cumsum(given)[:-1])
        begin = np.cumsum([0, *given])
        plain = [[begin[q] + [*a].index(i) if i in a else -1 for i in range(len(rows))] for q, a in enumerate(asked_by)]
        assert sources.tolist() == plain
        _, (_, _, none, _, _) = train_gpt.exchange_rows(by_rank, rank, places, False)
        assert none.size == 0  # as for a validation, where no gradient comes back


@pytest.mark.parametrize("values", [[], [3], [5, 5, 5], [7, 0, 7, 2**31 - 1, 0]])
def test_unique_rows_are_ascending_and_none_comes_twice(values):
    found = train_gpt.unique(np.array(values, np.int32).reshape(1, -1))
    assert found.tolist() == sorted({*values}) and found.dtype == np.int32


# ---------------------------------------------------------------------------- between ranks

ROWS = 64
LOOKED_UP = {  # by name, what each of `size` ranks looks up, in a table of 64 rows
    "here and there": lambda rank, size: np.random.default_rng(rank).integers(ROWS, size=(2, 15)),
    "all that the last rank owns": lambda rank, size: np.arange(ROWS - ROWS // size, ROWS)[None],
    "each its own": lambda rank, size: np.arange(ROWS // size)[None] + ROWS // size * rank,
    "each the next one's": lambda rank, size: np.arange(ROWS // size)[None] + ROWS // size * ((rank + 1) % size),
    "the first rank alone, all": lambda rank, size: np.arange(ROWS if rank == 0 else 0)[None],
}


def whole_table(dtype):
    return torch.arange(ROWS * C).view(ROWS, C).sin().to(dtype)


def gradients_of(rank, rows):
    """Of a rank's rows, multiples of a quarter: sums are exact in float32, in bf16 they are rounded."""
    return (torch.arange(len(rows) * C).view(-1, C) % 7 - 3) * (rank + 1) * 4 + 0.25


def exchange_once(folder, rank, size, dtype):
    """As one of several processes; what it was given, by name."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    world, found = World(rank, size), {}
    for name, rows_of in LOOKED_UP.items():
        by_rank = [rows_of(q, size).astype(np.int32) for q in range(size)]
        slots, (*indices, taken, given) = train_gpt.exchange_rows(by_rank, rank, np.zeros(ROWS, np.int32), True)
        exchange = train_gpt.Exchange(*map(torch.from_numpy, indices), taken, given)
        communication = train_gpt.ShardedRowCache(torch.zeros(ROWS, C, dtype=dtype), world, ROWS)
        communication.slice.copy_(whole_table(dtype).chunk(size)[rank])
        communication.fill(exchange)
        grad = torch.zeros(ROWS, C, dtype=dtype)
        grad[: sum(taken)] = gradients_of(rank, np.unique(by_rank[rank]))
        communication.reduce(grad)
        fetched = communication.fetch(exchange)
        gradient = small_run.spread(communication.reduced(), ROWS // size)
        communication.clear(grad)
        whole = communication.full(communication.slice)
        caches, slots = [communication.p.clone()], torch.from_numpy(slots.astype(np.int64))
        for fills in (2, 1):
            communication.slice.neg_()
            communication.coming = exchange
            communication.gather()
            communication.gathered()
            communication.slice.neg_()
            if fills == 1:  # back to the start of a run, whose table is another
                communication.clear(grad, whole=True)
            for _ in range(fills):  # what has been fetched ahead does for the first time only
                communication.fill(exchange)
                caches.append(communication.p.clone())
        caches = [cache[slots] for cache in caches]
        found[name] = dict(caches=caches, fetched=fetched, gradient=gradient, whole=whole, left=grad)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)


@pytest.mark.parametrize("size, dtype", [(2, torch.bfloat16), (4, torch.float32), (8, torch.bfloat16)])
def test_rows_come_from_their_owners_and_gradients_go_there_and_add_up(tmp_path, size, dtype):
    context = torch.multiprocessing.get_context("fork")  # PyTorch is imported already
    processes = [context.Process(target=exchange_once, args=(tmp_path, rank, size, dtype)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    found, table = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)], whole_table(dtype)
    for name, rows_of in LOOKED_UP.items():
        total = torch.zeros(ROWS, C)
        for rank in range(size):
            rows = np.unique(rows_of(rank, size))
            total[rows] += gradients_of(rank, rows).to(dtype).float()
            ranks = found[rank][name]
            there = table[rows_of(rank, size)]
            assert [*map(torch.equal, ranks["caches"], (there, -there, there, there))] == [True] * 4
            assert torch.equal(ranks["fetched"], table[rows]) and torch.equal(ranks["whole"], table)
            assert not ranks["left"].any()
        gradient = torch.cat([found[rank][name]["gradient"] for rank in range(size)])
        assert torch.equal(gradient, total.to(dtype)), name


SUMS = [
    pytest.param(train_gpt.sum_rows_reference, "cpu", torch.bfloat16, id="reference"),
    pytest.param(train_gpt.sum_rows_triton, "cpu", torch.float16, marks=interpreted, id="kernel"),
    pytest.param(train_gpt.sum_rows, "cuda", torch.bfloat16, marks=pytest.mark.gpu, id="cuda"),
]


@pytest.mark.parametrize("sum_rows, device, dtype", SUMS)
@pytest.mark.parametrize("size", [2, 8])
def test_gradients_of_a_row_are_summed_over_the_ranks_and_rounded_once(sum_rows, device, dtype, size):
    share = ROWS // size
    for rows_of in LOOKED_UP.values():
        by_rank = [rows_of(q, size).astype(np.int32) for q in range(size)]
        gradients = [(rows := np.unique(looked_up), gradients_of(q, rows)) for q, looked_up in enumerate(by_rank)]
        for rank in range(size):
            _, (rows, _, sources, *_) = train_gpt.exchange_rows(by_rank, rank, np.zeros(ROWS, np.int32), True)
            here = [(looked_up[own], grad[own].to(dtype)) for looked_up, grad in gradients
                    for own in [looked_up // share == rank]]  # fmt: skip
            received = torch.cat([grad for _, grad in here]), torch.from_numpy(sources)
            with poisoned_memory():
                found = sum_rows(*(t.to(device) for t in received)).cpu()
            total = torch.zeros(ROWS, C)
            for looked_up, grad in here:
                total[looked_up] += grad.float()
            assert torch.equal(found, total[rank * share + rows].to(dtype))


# ---------------------------------------------------------------------------- the optimizer

UPDATES = [
    pytest.param(train_gpt.update_rows_reference, "cpu", torch.float32, id="reference-float32"),
    pytest.param(train_gpt.update_rows_reference, "cpu", torch.bfloat16, id="reference-bfloat16"),
    pytest.param(train_gpt.update_rows_triton, "cpu", torch.float32, marks=interpreted, id="kernel-float32"),
    pytest.param(train_gpt.update_rows_triton, "cpu", torch.float16, marks=interpreted, id="kernel-float16"),
    pytest.param(train_gpt.update_rows, "cuda", torch.bfloat16, marks=pytest.mark.gpu, id="cuda-bfloat16"),
]
on_each = pytest.mark.parametrize("update_rows, device, dtype", UPDATES)
# Float32 sums; in narrow types a value may now and then be rounded the other way, after which it is a unit in the last
# place off. Measured: 1e-7, 0, 0.
TABLE_TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


class Plain:
    """The optimizer in float64 but for the table, which is rounded to its type; all rows' v decay at each update."""

    def __init__(self, rows, dtype):
        self.p, self.v, self.n, self.dtype = np.zeros((rows, C)), np.zeros(rows), 0, dtype

    def update(self, gradients, lr, wd, beta2, eps):
        """lr, wd: with all their multipliers; gradients by row."""
        self.n += 1
        self.v *= beta2
        for row, g in gradients.items():
            self.v[row] += (1 - beta2) * np.mean(g**2)
            u = lr * (1 - beta2**self.n) ** 0.5 * g / (self.v[row] ** 0.5 + eps)
            p = self.p[row]
            u = u + np.where(u * p > 0, lr * lr * wd * p, 0)
            self.p[row] = torch.from_numpy(p - u).float().to(self.dtype).double().numpy()


@on_each
def test_rows_follow_the_plain_optimizer_over_many_updates_between_which_some_rest(
    monkeypatch, update_rows, device, dtype
):
    monkeypatch.setattr(train_gpt, "update_rows", update_rows)
    row = train_gpt.Row("ngrams", "rowwise", True, (50.0,), 300.0, (0.0, 0.9))
    hp, N = Hyperparameters(adam_wd=0.05), 40
    algorithm = train_gpt.RowAdam(row, hp, torch.zeros(N, C, dtype=dtype, device=device), 0)
    plain, generator, moved, decayed = Plain(N, dtype), torch.Generator().manual_seed(0), set(), False
    for n in range(30):
        chosen = torch.randperm(N - 5, generator=generator)[: (12, 1, 0, 30)[n % 4]].sort().values
        values = torch.randn(len(chosen), C, generator=generator) * 10.0 ** -(n % 5)
        factor = 1 - 0.02 * n
        gradient = chosen.int().to(device), values.to(device)
        with poisoned_memory():
            squares = algorithm.update(gradient, factor, 0.9)
        before = plain.p.copy()
        gradients = dict(zip(chosen.tolist(), values.double().numpy(), strict=True))
        plain.update(gradients, hp.adam_lr * 50 * factor, 0.05 * 300, 0.9, hp.adam_eps)
        decayed |= bool((np.abs(plain.p) < np.abs(before)).any())
        moved |= gradients.keys()
        assert squares[-1] == 0 and len(squares) == len(chosen) + 1
        assert torch.allclose(squares[:-1].cpu(), values.square().mean(1), rtol=1e-5, atol=0)
        assert relative_error(algorithm.p, torch.from_numpy(plain.p)) < TABLE_TOLERANCE[dtype], n
    assert decayed and 30 < len(moved) <= 35
    caught_up = algorithm.v.cpu().double() * 0.9 ** (algorithm.updates - algorithm.last.cpu().double())
    assert relative_error(caught_up, torch.from_numpy(plain.v)) < 2e-6
    assert not algorithm.p[35:].any() and not algorithm.v[35:].any() and not algorithm.last[35:].any()
    algorithm.reset()
    assert not any(getattr(algorithm, name).any() for name in ("p", "v", "last")) and algorithm.updates == 0


@on_each
def test_a_row_that_is_left_out_keeps_its_bits(update_rows, device, dtype):
    p, v, last = torch.randn(9, C).to(device, dtype), torch.rand(9).to(device), torch.arange(9).int().to(device)
    before = [t.clone() for t in (p, v, last)]
    rows = torch.tensor([1, 4, 8], dtype=torch.int32, device=device)
    update_rows(p, v, last, rows, torch.ones(3, C, device=device), 20, 0.9, 0.1, 0.1, 1e-10)
    rest = [0, 2, 3, 5, 6, 7]
    for now, then in zip((p, v, last), before, strict=True):
        assert torch.equal(now[rest], then[rest]) and not torch.equal(now[rows.long()], then[rows.long()])


@on_each
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_its_rows_mean_square(update_rows, device, dtype, bad):
    p, v, last = (torch.zeros(4, C).to(device, dtype), torch.zeros(4).to(device), torch.zeros(4).int().to(device))
    grad = torch.ones(2, C, device=device)
    grad[1, 3] = bad
    squares = update_rows(p, v, last, torch.tensor([0, 2]).int().to(device), grad, 1, 0.9, 0.1, 0.1, 1e-10)
    assert squares[0] == 1 and not squares[1].isfinite()


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_numbers_are_found():
    """5 GB: both what is fetched and what is updated lie where an int32 has wrapped around."""
    N, width = 3_400_000, 768
    communication = train_gpt.RowCache(torch.zeros(4, width, dtype=torch.bfloat16, device="cuda"), World(), N)
    table, rows = communication.slice, torch.tensor([3, 2_796_203, N - 1], dtype=torch.int32, device="cuda")
    assert table.numel() > 2**31
    table[rows.long()] = torch.arange(1.0, 4.0, dtype=torch.bfloat16, device="cuda")[:, None].expand(3, width)
    none = rows[:0]
    communication.fill(train_gpt.Exchange(rows, none, none, [3], [0]))
    assert communication.p[:, 0].tolist() == [1, 2, 3, 0]
    v, last = torch.zeros(N, device="cuda"), torch.zeros(N, dtype=torch.int32, device="cuda")
    train_gpt.update_rows(table, v, last, rows, torch.ones(3, width, device="cuda"), 1, 0.75, 0.5, 0.0, 0.0)
    assert table[rows.long()].unique(dim=1).flatten().tolist() == [0, 1, 2]  # v = 1/4, so that u = 1
    assert v.count_nonzero() == last.count_nonzero() == 3 and table.count_nonzero() == 2 * width


def trainer_of(tmp_path, **overrides):
    if not (tmp_path / "train_1.bin").exists():
        write_text(tmp_path)
    return Trainer(small_hyperparameters(tmp_path, **overrides), World())


def steps_of(trainer, first=0, end=None, position=(1, 0)):
    """Takes these steps; yields behind each."""
    hp = trainer.hp
    steps = range(first, hp.total_steps if end is None else end)
    sizes = [trainer.schedule.size(step) for step in steps]
    for step, batch in zip(steps, TrainLoader(find_files(hp.train_files), sizes, hp, World(), position), strict=True):
        trainer.enter_step(step)
        trainer.add_gradients(step, batch)
        before = trainer.ngrams.p.grad.clone()
        trainer.update(step)
        yield step, batch, before


def test_lookups_that_collide_add_up_and_the_update_sees_their_sum(tmp_path, monkeypatch):
    trainer, seen = trainer_of(tmp_path, ngram_rows=16), []  # 7 rows of each order, and those for what lacks tokens
    reduced = trainer.ngrams.communication.reduced

    def seen_and_kept():
        rows, values = reduced()
        seen.append((rows, values.clone()))  # the cache's own, cleared later
        return rows, values

    monkeypatch.setattr(trainer.ngrams.communication, "reduced", seen_and_kept)
    ((_, batch, _),) = steps_of(trainer, 0, 1)
    (rows, values), exchange = seen[0], batch.exchange
    # The same by autograd alone, of the table as it was: zero
    again = trainer_of(tmp_path, ngram_rows=16)
    monkeypatch.setattr(train_gpt, "Lookup", SimpleNamespace(apply=lambda table, rows, order: F.embedding(rows, table)))
    again.model.ngrams = table = torch.zeros(16, again.hp.model_dim, requires_grad=True)
    for b in batch.micro_batches:
        whole = b._replace(slots=exchange.rows[b.slots])
        again.micro_step(0, whole, again.target_weights[0])
    assert rows.tolist() == [*range(16)] and sum(b.slots.numel() for b in batch.micro_batches) > 200
    assert relative_error(values, table.grad) < 1e-5


def test_gradients_are_cleared_behind_each_update_and_every_step_updates(tmp_path):
    trainer = trainer_of(tmp_path)
    algorithm, cache = trainer.ngrams.algorithm, trainer.ngrams.p
    begin, address = algorithm.p.clone(), (cache.data_ptr(), cache.grad.data_ptr())
    for step, batch, grad in steps_of(trainer):
        count, rows = len(batch.exchange.rows), batch.exchange.rows
        assert batch.exchange.taken == [count]
        assert grad[:count].any() and not grad[count:].any() and not cache.grad.any()
        assert algorithm.updates == step + 1 and (algorithm.last[rows.long()] == step + 1).all()
        assert "ngrams" in trainer.optimizer.largest[-1][1]
    assert not torch.equal(begin, algorithm.p)
    assert (cache.data_ptr(), cache.grad.data_ptr()) == address and trainer.model.ngrams is cache
    assert not {"ngrams"} & {*trainer.model.state_dict()}


def test_the_warm_up_leaves_no_trace_in_the_table(tmp_path):
    trainer = trainer_of(tmp_path)
    hp = trainer.hp
    trainer.warm_up(find_files(hp.train_files), train_gpt.validation_batches(find_files(hp.val_files), hp, World()))
    algorithm = trainer.ngrams.algorithm
    assert not any(getattr(algorithm, name).any() for name in ("p", "v", "last")) and algorithm.updates == 0
    assert not trainer.ngrams.p.grad.any() and trainer.model.ngrams is trainer.ngrams.p
    assert not any(trainer.ngrams.communication.exchange.taken)


def test_the_table_is_held_once_and_a_cache_no_larger_than_a_step(tmp_path):
    trainer = trainer_of(tmp_path, ngram_rows=1 << 16)
    assert len(trainer.ngrams.algorithm.p) == 1 << 16
    assert len(trainer.ngrams.p) == 2 * max(stage.tokens for stage in trainer.hp.stages)
    assert len(trainer_of(tmp_path, ngram_rows=16).ngrams.p) == 16


# ---------------------------------------------------------------------------- checkpoints


def saved_run(tmp_path, steps=6, **overrides):
    """A run's trainer after `steps`, and its checkpoint; rows have rested since different steps."""
    trainer = trainer_of(tmp_path, ngram_rows=512, run_id="small", checkpoint_every=2, **overrides)
    files = train_gpt.files_of(trainer.hp)
    trainer.checkpoints = checkpoint.Checkpoints(trainer.hp, World(), files)
    position = [batch.position for _, batch, _ in steps_of(trainer, 0, steps)][-1]
    log = Log(trainer.hp, World())
    trainer.checkpoints.save(trainer, log, Progress(steps, 1.0, position, [9.0]))
    log.close()
    return trainer, tmp_path / f"small_step{steps:06d}.pt", position


def restored(path):
    content = checkpoint.read_checkpoint(path)
    content["rows"] = checkpoint.read_pieces(path, content)
    return content


def test_a_run_whose_vocabulary_is_lost_still_leaves_checkpoints(tmp_path):
    vocabulary = shutil.copy(small_run.GPT2_VOCABULARY, tmp_path)
    trainer, path, position = saved_run(tmp_path, vocabulary=str(vocabulary))
    kept = checkpoint.read_checkpoint(path)["vocabulary"]
    Path(vocabulary).unlink()
    train_gpt.read_vocabulary.cache_clear()
    path.unlink()
    log = Log(replace(trainer.hp, resume="small"), World())
    trainer.checkpoints.save(trainer, log, Progress(6, 1.0, position, [9.0]))
    log.close()
    assert checkpoint.read_checkpoint(path)["vocabulary"] == kept


def test_a_checkpoint_has_eight_pieces_that_make_the_table_and_its_states(tmp_path):
    trainer, path, _ = saved_run(tmp_path)
    pieces = checkpoint.piece_paths(path)
    assert [piece.name for piece in pieces] == [f"small_step000006_rows{k}.pt" for k in range(8)]
    content = restored(path)
    for name in ("p", "v", "last"):
        whole = torch.cat([piece[name] for piece in content["rows"]])
        assert torch.equal(whole, getattr(trainer.ngrams.algorithm, name)) and whole.any()
        assert {len(piece[name]) for piece in content["rows"]} == {64}
    assert len({*trainer.ngrams.algorithm.last.tolist()}) > 3
    assert content["optimizer"]["ngrams.updates"] == 6 and not [n for n in content["model"] if "ngram" in n]
    # A piece of a view is not written with all that it is a view of
    size = 64 * (trainer.hp.model_dim + 2) * 4
    assert all(size < piece.stat().st_size < size + 4096 for piece in pieces)


def test_a_run_goes_on_to_the_same_bits_with_rows_that_decay_later(tmp_path):
    trainer, path, position = saved_run(tmp_path)
    other = Trainer(trainer.hp, World())
    progress = checkpoint.restore(other, restored(path))
    assert (progress.step, progress.position) == (6, position)
    for _ in zip(steps_of(trainer, 6, 10, position), steps_of(other, 6, 10, position), strict=True):
        pass
    for name in ("p", "v", "last", "updates"):
        ours, theirs = (torch.as_tensor(getattr(t.ngrams.algorithm, name)) for t in (trainer, other))
        assert torch.equal(ours, theirs), name
    for (name, p), q in zip(trainer.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("size", [2, 4, 8])
def test_each_of_several_ranks_takes_its_pieces(tmp_path, size):
    trainer, path, _ = saved_run(tmp_path)
    content, share = restored(path), 512 // size
    for rank in range(size):
        algorithm = train_gpt.RowAdam(trainer.ngrams.row, trainer.hp, torch.zeros(share, trainer.hp.model_dim), 0)
        fake = SimpleNamespace(
            model=trainer.model, world=World(rank, size), ngrams=SimpleNamespace(algorithm=algorithm),
            optimizer=trainer.optimizer,
        )  # fmt: skip
        checkpoint.restore(fake, content)
        for name in ("p", "v", "last"):
            whole = getattr(trainer.ngrams.algorithm, name)
            assert torch.equal(getattr(algorithm, name), whole[rank * share :][:share])


@contextmanager
def small_preset():
    """Of a checkpoint's settings, stages are the preset's."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small_run.SMALL.items():
            patch.setitem(train_gpt.PRESETS["smoke"], name, value)
        yield


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def exchange_with_another(path):
    other = path.with_name(path.name.replace("rows3", "rows4"))
    shutil.copy(other, path)


@pytest.mark.parametrize(
    "harm, words",
    [
        (Path.unlink, "No such file"),
        (damage, "damaged or cut short, its checksum differs"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "damaged or cut short"),
        (exchange_with_another, "not the piece that was written with small_step000006.pt"),
    ],
    ids=["missing", "damaged", "cut short", "another"],
)
def test_a_piece_that_is_missing_or_damaged_is_named_and_an_earlier_checkpoint_is_taken(tmp_path, harm, words):
    trainer, *_ = saved_run(tmp_path, 6)
    log = Log(replace(trainer.hp, resume="small"), World())
    trainer.checkpoints.save(trainer, log, Progress(8, 1.0, (1, 0), [9.0]))
    log.close()
    later = tmp_path / "small_step000008.pt"
    hp = replace(trainer.hp, resume="small")
    with small_preset():
        assert checkpoint.resume(hp, {"resume": "small"})[1]["step"] == 8
        harm(later.with_name("small_step000008_rows3.pt"))
        if "small_step000006" in words:
            words = words.replace("6", "8")
        _, content, lines = checkpoint.resume(hp, {"resume": "small"})
        assert content["step"] == 6 and len(content["rows"]) == 8
        assert len(lines) == 2 and lines[0].startswith(f"checkpoint not used: {tmp_path}/small_step000008_rows3.pt: ")
        assert words in lines[0]
        with pytest.raises(UserError, match="rows3"):
            load_model(later)


def test_pieces_go_with_their_checkpoint_and_those_without_one_at_the_next(tmp_path):
    trainer, *_ = saved_run(tmp_path, 2)
    orphans = [tmp_path / "small_step000003_rows5.pt", tmp_path / "small_step000009_rows0.part"]
    others = tmp_path / "smaller_step000003_rows5.pt"
    for path in (*orphans, others):
        path.write_bytes(b"")
    log = Log(replace(trainer.hp, resume="small"), World())
    for step in (4, 6):
        trainer.checkpoints.save(trainer, log, Progress(step, 1.0, (1, 0), [9.0]))
        assert not any(orphan.exists() for orphan in orphans) and others.exists()
    log.close()
    steps = [f"small_step{step:06d}" for step in (4, 6)]
    names = sorted(f"{step}{piece}.pt" for step in steps for piece in ["", *(f"_rows{k}" for k in range(8))])
    assert sorted(p.name for p in tmp_path.glob("small_step*")) == names


def test_no_checkpoint_is_left_when_a_piece_cannot_be_written(tmp_path, monkeypatch, capsys):
    trainer, path, _ = saved_run(tmp_path, 2)
    write = checkpoint.write_checkpoint

    def full(to, content):
        if "000004_rows5" in to.name:
            raise OSError(28, "No space left on device")
        return write(to, content)

    monkeypatch.setattr(checkpoint, "write_checkpoint", full)
    log = Log(replace(trainer.hp, resume="small"), World())
    trainer.checkpoints.save(trainer, log, Progress(4, 1.0, (1, 0), [9.0]))
    log.close()
    said = capsys.readouterr().out
    assert "no checkpoint at step 4: " in said and "small_step000004_rows5.pt: [Errno 28]" in said
    assert {p.name[:16] for p in tmp_path.glob("small_step*")} == {"small_step000002"}  # what the others wrote is gone
    assert restored(path)["step"] == 2


def test_a_loaded_model_has_the_whole_table_and_a_final_one_has_no_states(tmp_path):
    trainer, path, _ = saved_run(tmp_path)
    log = Log(replace(trainer.hp, resume="small"), World())
    trainer.checkpoints.save(trainer, log)
    log.close()
    final = tmp_path / f"small_step{trainer.hp.total_steps:06d}.pt"
    assert all({*piece} == {"p"} for piece in restored(final)["rows"])
    with small_preset():
        for each in (path, final):
            model, _, _ = load_model(each)
            assert torch.equal(model.ngrams, trainer.ngrams.algorithm.p) and model.ngrams.any()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(algorithm="adam"), "PARAMETERS, ngrams: algorithm is 'rowwise'"),
        (dict(betas=(0.5, 0.9)), "betas of which the first is 0"),
        (dict(betas=None), "betas of which the first is 0"),
        (dict(sharded=False), "rowwise is sharded"),
        (dict(lr=(1.0, 2.0)), "takes one lr"),
    ],
)
def test_a_row_of_parameters_that_the_table_cannot_have_is_refused(monkeypatch, change, words):
    rows = [row._replace(**change) if row.name == "ngrams" else row for row in train_gpt.PARAMETERS]
    monkeypatch.setattr(train_gpt, "PARAMETERS", rows)
    with pytest.raises(UserError, match=words):
        train_gpt.parse_arguments(["--preset=smoke"], has_gpu=False)


def test_no_other_parameter_is_updated_by_rows(monkeypatch):
    rows = [row._replace(algorithm="rowwise") if row.name == "embed" else row for row in train_gpt.PARAMETERS]
    monkeypatch.setattr(train_gpt, "PARAMETERS", rows)
    with pytest.raises(UserError, match="embed: algorithm is 'adam' or 'normuon'"):
        train_gpt.parse_arguments(["--preset=smoke"], has_gpu=False)
