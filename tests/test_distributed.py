"""One to eight real processes (gloo, on the CPU; two with NCCL, on GPUs): the same run, whatever their number."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import small_run
import torch
from conftest import relative_error, rows_in_use

from train_gpt import Hyperparameters, Trainer, TrainLoader, World, find_files

SMALL_RUN, STEPS = Path(small_run.__file__).resolve(), small_run.STEPS
SIZES = (1, 2, 4, 8)
NAMES = [row.name for row in rows_in_use()]
SHARDED = [row.name for row in rows_in_use() if row.sharded]

# Only the order in which gradients are summed differs, in float32; Polar Express turns that into up to 800 times as
# much where a singular value is small, and later gradients are taken at parameters that differ by it. Losses in nats.
LOSS_TOLERANCE = 1e-4  # 5e-8 after ten steps
# As relative norms. Joined, documents lie at other positions, whose rotation is rounded to bf16 otherwise: measured for
# two, four and eight processes 1.2e-3 in gradients and 2.4e-3 of the way gone for the bank of queries and keys, 1e-3 at
# most elsewhere. A micro-batch lost or counted twice, or an average, is off by a tenth and more.
TOLERANCE = 5e-3
# Of the way gone with rows of n-grams, of which a gradient's rounding error may turn one or the other; measured 6e-3.
WAY_TOLERANCE = 2e-2
# In bfloat16 gradients are rounded to 2^-9 of themselves before they are summed; measured 5e-3 nats.
BF16_LOSS_TOLERANCE = 0.03
# After steps that rounding has made a little different: measured on two H100s 8e-2 for the embedding, which first steps
# by itself at the tenth. Half of the micro-batches, or an average, would be off by 0.5 and more.
BF16_GRADIENT_TOLERANCE = 0.2


def start(folder, dtype, size, gpus=""):
    """What each of `size` processes found, by rank. They may not take a minute: waiting for each other is a failure."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus, "WORLD_SIZE": str(size)}
    base.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes, outputs = [], []
    try:
        for rank in range(size):
            outputs.append(folder / f"{size}_{rank}.out")
            command = [sys.executable, str(SMALL_RUN), str(folder), dtype]
            environment = {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(outputs[-1], "w") as out:
                processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
        for process, output in zip(processes, outputs, strict=True):
            assert process.wait(timeout=150) == 0, output.read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{size}_{rank}.pt", map_location="cpu") for rank in range(size)]


class Runs(dict):
    """By number of processes: what each rank found in the float32 run, which starts when it is first asked for."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        small_run.write_text(folder)

    def __missing__(self, size):
        alone = size == 1 and [small_run.train(small_run.small_hyperparameters(self.folder), World())]
        self[size] = alone or start(self.folder, "float32", size)
        return self[size]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("float32"))


def whole(name, slices):
    """A state or gradient of which the ranks hold slices (or, of replicated parameters, all of it)."""
    return torch.cat(slices) if name in SHARDED else slices[0]


@pytest.mark.parametrize("size", SIZES[1:])
def test_all_ranks_begin_and_end_with_the_same_bits(runs, size):
    for at in ("begin_digest", "end_digest"):
        assert len({rank[at] for rank in runs[size]}) == 1
    assert runs[size][0]["begin_digest"] == runs[1][0]["begin_digest"] != runs[size][0]["end_digest"]


@pytest.mark.parametrize("size", SIZES)
def test_a_run_learns_and_every_rank_knows_the_same_loss(runs, size):
    first, last = runs[size][0]["losses"]
    assert last < first - 0.3
    assert all(rank["losses"] == [first, last] for rank in runs[size])


@pytest.mark.parametrize("size", SIZES[1:])
def test_the_loss_after_ten_steps_is_that_of_one_process(runs, size):
    for loss, alone in zip(runs[size][0]["losses"], runs[1][0]["losses"], strict=True):
        assert abs(loss - alone) < LOSS_TOLERANCE


@pytest.mark.parametrize("size", SIZES)
def test_the_ranks_share_the_same_eight_micro_batches_of_each_step(runs, size):
    for step in range(STEPS):
        alone = torch.cat(runs[1][0]["inputs"][step]).view(8, -1)
        together = min({16: 4, 24: 4, 32: 2}[alone.shape[1]], 8 // size)
        for rank, found in enumerate(runs[size]):
            assert torch.equal(torch.cat(found["inputs"][step]).view(8 // size, -1), alone[rank::size])
            assert {len(joined) for joined in found["inputs"][step]} == {together * alone.shape[1]}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES[1:])
def test_the_gradient_is_that_of_one_process(runs, size, name):
    # Compared by itself: NorMuon and Adam hardly notice an average in the place of a sum.
    alone = runs[1][0]["gradients"][name]
    assert alone[-1].any()
    for update, gradient in enumerate(alone):  # of the first two updates; some gradients are zero at first
        shared = whole(name, [rank["gradients"][name][update] for rank in runs[size]])
        if gradient.any():
            assert relative_error(shared, gradient) < TOLERANCE
        else:
            assert not shared.any()


@pytest.fixture(scope="module")
def plain_gradients(tmp_path_factory):
    """By parameter: of the sum of the losses of all tokens of the first step, by autograd alone."""
    folder = tmp_path_factory.mktemp("plain")
    small_run.write_text(folder)
    hp = small_run.small_hyperparameters(folder, grad_scale=12.0)  # has no part in it
    trainer = Trainer(hp, World())
    trainer.model.prefixes.copy_(small_run.prefix_table(hp))
    for batch in TrainLoader(find_files(hp.train_files), [trainer.schedule.size(0)], hp, World()):
        for micro_batch in batch.micro_batches:
            trainer.model(micro_batch, trainer.schedule.windows(0), trainer.target_weights[0]).sum().backward()
    return {name: p.grad for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("name", [row.name for row in rows_in_use() if row.algorithm == "normuon"])  # at every step
@pytest.mark.parametrize("size", SIZES)
def test_the_optimizer_sees_an_eighth_of_grad_scale_times_the_gradient_of_a_steps_loss(
    runs, plain_gradients, size, name
):
    expected = Hyperparameters().grad_scale / 8 * plain_gradients[name]
    shared = whole(name, [rank["gradients"][name][0] for rank in runs[size]])
    assert relative_error(shared.reshape(expected.shape), expected) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES[1:])
def test_the_steps_taken_are_those_of_one_process(runs, size, name):
    begin, alone, end = runs[1][0]["begin"][name], runs[1][0]["end"][name], runs[size][0]["end"][name]
    assert relative_error(end - begin, alone - begin) < WAY_TOLERANCE


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("size", SIZES[1:])
def test_each_rank_keeps_its_share_of_the_state_and_together_that_of_one_process(runs, size, name):
    for state, alone in runs[1][0]["state"][name].items():
        slices = [rank["state"][name][state] for rank in runs[size]]
        if not isinstance(alone, torch.Tensor):
            assert slices == [alone] * size
            continue
        assert all(len(part) == len(alone) // size for part in slices)
        assert relative_error(torch.cat(slices), alone) < TOLERANCE


def test_two_processes_in_bfloat16_hold_the_same_bits_and_reach_the_loss_of_one(tmp_path):
    small_run.write_text(tmp_path)
    alone = small_run.train(small_run.small_hyperparameters(tmp_path, dtype="bfloat16"), World())
    ranks = start(tmp_path, "bfloat16", 2)
    assert len({rank["end_digest"] for rank in ranks}) == 1
    assert all(p.dtype == torch.bfloat16 for n, p in ranks[0]["end"].items() if n.endswith("bank"))
    assert abs(ranks[0]["losses"][-1] - alone["losses"][-1]) < BF16_LOSS_TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_hold_the_same_bits_and_take_the_steps_of_one(tmp_path):
    small_run.write_text(tmp_path)
    (alone,), ranks = (start(tmp_path, "bfloat16", size, gpus="0,1") for size in (1, 2))
    assert len({rank["end_digest"] for rank in ranks}) == 1
    for losses in zip(ranks[0]["losses"], alone["losses"], strict=True):
        assert losses[0] == pytest.approx(losses[1], abs=BF16_LOSS_TOLERANCE)
    for name in SHARDED:
        for update, gradient in enumerate(alone["gradients"][name]):
            shared = whole(name, [rank["gradients"][name][update] for rank in ranks])
            if gradient.any():
                assert relative_error(shared, gradient) < BF16_GRADIENT_TOLERANCE, name
