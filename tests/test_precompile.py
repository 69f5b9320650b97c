"""The process that compiles beside a run's warm-up: what it compiles, and how it ends."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_run
import torch

import train_gpt
from train_gpt import Trainer, TrainLoader, World, find_files, validation_batches

if not find_spec("triton"):
    pytest.skip("no Triton for this platform", allow_module_level=True)
sys.path.insert(0, str(Path(train_gpt.__file__).parent / "records"))
import precompile

CPU = torch.device("cpu")


def kind_of(x: object) -> object:
    """What the compiler looks at in an argument of a region."""
    if isinstance(x, torch.Tensor):
        return x.dtype, tuple(x.shape), x.stride(), x.requires_grad
    return x


@pytest.fixture
def compiled(monkeypatch):
    """The calls of regions: name, whether gradients are taken, arguments. Stages are gone through as on a GPU."""
    calls, warm_up_batches = set(), Trainer.warm_up_batches
    flatten = torch.utils._pytree.tree_leaves

    def noted(function):
        def call(*args):
            leaves = [kind_of(leaf) for leaf in flatten(args)]
            calls.add((function.__name__, torch.is_grad_enabled(), str(leaves)))
            return function(*args)

        return call

    def as_on_a_gpu(self, *args):
        world = SimpleNamespace(on_gpu=True, device=CPU)
        return warm_up_batches(SimpleNamespace(world=world, schedule=self.schedule), *args)

    monkeypatch.setattr(train_gpt, "compiler", lambda enabled: noted)
    monkeypatch.setattr(Trainer, "warm_up_batches", as_on_a_gpu)
    return calls


@pytest.mark.parametrize("size", [1, 2, 8])
def test_what_is_compiled_beside_a_run_is_what_the_run_would_compile(tmp_path, monkeypatch, compiled, size):
    small_run.write_text(tmp_path, scale=8)
    stages = tuple(stage._replace(classes=stage.classes and 400) for stage in small_run.SMALL["stages"])
    hp = replace(small_run.small_hyperparameters(tmp_path, stages=stages), compile="auto")
    world = World(0, size)
    trainer = Trainer(hp, World())
    steps = trainer.schedule.starts
    loader = TrainLoader(find_files(hp.train_files), [trainer.schedule.size(step) for step in steps], hp, world)
    chunk, exchange = validation_batches(find_files(hp.val_files), hp, world)[0]
    trainer.compile_in_turns([*zip(steps, loader, strict=True)], chunk, exchange)
    for slot in trainer.optimizer.slots.values():  # the part of the first rank
        if slot.row.algorithm == "normuon":
            slot.communication.world = world
            share = train_gpt.Sharded.own(slot.communication, slot.communication.p)
            algorithm = train_gpt.NorMuon(slot.row, hp, share, 0, train_gpt.compiler(True))
            with torch.no_grad():  # as Optimizer.step
                algorithm.update(train_gpt.Sharded.own(slot.communication, slot.grad), 1.0, 0.9)
    of_the_run = {*compiled}
    compiled.clear()

    kernels = []
    monkeypatch.setattr(precompile, "compile_kernels", lambda trainer, batches: kernels.append(len(batches)))
    monkeypatch.setattr(precompile, "NGRAM_ROWS", 256)
    precompile.compile_ahead(train_gpt, hp, world, precompile.MEMORY - 1)
    assert kernels == [len(steps)] and not compiled  # but for kernels too little memory, as in the next
    precompile.compile_ahead(train_gpt, replace(hp, micro_batch_tokens=65_537), world, precompile.MEMORY)
    assert not compiled
    precompile.compile_ahead(train_gpt, hp, world, precompile.MEMORY)
    assert compiled <= of_the_run
    left = of_the_run - compiled
    layers = {"embed_inputs", "gate_network", "normed_input", "qkv_weight", "layer_outputs"}
    regions = layers | {"normed_output", "copy_inputs"}
    assert {name for name, *_ in left} == regions and all(training for _, training, _ in left)
    assert {name for name, *_ in compiled} == {*regions, "normuon_update"}


# A run in whose place somebody waits: {then} says for what. Its process beside prints its own number, and does {what}.
RUN = """
import os, sys, time
from types import SimpleNamespace
sys.path.insert(0, {records!r})
import precompile
precompile.takes_several_processes = lambda: True
class UserError(Exception): pass
def from_environment():
    print(os.getpid(), flush=True)
    {what}
if os.environ.get("IGNORED"):
    import signal
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
world = SimpleNamespace(from_environment=from_environment)
end = precompile.start(SimpleNamespace(World=world, UserError=UserError), [])
{then}
"""


def run(what, then, **environment):
    """The run, once its process beside has begun, and that one's number."""
    source = RUN.format(records=str(Path(precompile.__file__).parent), what=what, then=then)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", source], env=os.environ | environment, **pipes)
    return process, process.stdout.readline()


def is_there(number, seconds=10.0):
    """Whether a process is still there after so long; returns as soon as it is not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(ProcessLookupError):
            os.kill(number, 0)
            time.sleep(0.05)
            continue
        return False
    return True


def test_the_process_beside_ends_when_the_run_has_no_more_use_for_it():
    process, line = run("time.sleep(60)", "sys.stdin.readline(); end(); sys.stdin.readline()")
    assert is_there(int(line), 0.3)
    process.stdin.write("\n")
    process.stdin.flush()
    assert not is_there(int(line)) and process.poll() is None
    process.communicate()


def test_the_process_beside_ends_with_a_run_that_is_killed():
    process, line = run("time.sleep(60)", "time.sleep(60)")
    process.kill()
    process.wait()
    assert not is_there(int(line))
    process.communicate()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("UserError('the run finds this, too')", ""),
        ("RuntimeError('no\\nmemory')", "note: what compiles beside the run has ended, and the start takes longer: "
         "RuntimeError: no memory\n"),
    ],
)  # fmt: skip
def test_the_process_beside_says_in_one_line_why_it_ended_unless_the_run_says_it(error, said):
    process, _ = run(f"raise {error}", "time.sleep(1); end(); print('went on')")
    assert process.communicate(timeout=60) == ("went on\n", said) and process.returncode == 0


@pytest.mark.parametrize("what", ["time.sleep(60)", "raise UserError()"])
def test_the_process_beside_ends_where_nobody_is_told_of_it(what):
    process, line = run(what, "time.sleep(1); end(); print('went on', flush=True)", IGNORED="1")
    assert process.communicate(timeout=30) == ("went on\n", "") and not is_there(int(line), 0.1)


@pytest.mark.parametrize("environment", [{"LOCAL_RANK": "1"}, {"CUDA_MPS_PIPE_DIRECTORY": "/"}])
def test_one_process_beside_serves_a_host_unless_a_server_shares_out_its_gpu(environment):
    process, line = run("time.sleep(60)", "time.sleep(1); end(); print('alone')", **environment)
    assert line == "alone\n" and process.communicate() == ("", "")


@pytest.mark.parametrize(("mode", "several"), [(0, True), (2, False), (3, False), (None, False)])
def test_a_gpu_that_takes_one_process_is_left_to_the_run(monkeypatch, mode, several):
    calls = []

    def attribute(out, number, device):
        calls.append((number, device))
        if mode is not None:
            out._obj.value = mode
        return mode is None

    driver = SimpleNamespace(cuInit=calls.append, cuDeviceGetAttribute=attribute)
    monkeypatch.setattr(precompile.ctypes, "CDLL", {"libcuda.so.1": driver}.get)
    assert precompile.takes_several_processes() is several
    assert calls == [0, (20, 0)]


def fails(*_):
    raise BlockingIOError("Resource temporarily unavailable")


def test_a_run_goes_on_where_there_is_no_room_for_a_second_process(monkeypatch):
    monkeypatch.setattr(os, "fork", fails)
    precompile.start(train_gpt, [])()


@pytest.mark.parametrize(
    ("arguments", "gpus", "triton", "forks"),
    [
        ([], 1, train_gpt.triton, True),
        ([], 0, train_gpt.triton, False),
        ([], 1, SimpleNamespace(), False),  # the checks have a remedy for that
        (["--help"], 1, train_gpt.triton, False),
        (["--describe"], 1, train_gpt.triton, False),
    ],
)
def test_main_forks_where_a_run_compiles(monkeypatch, capsys, arguments, gpus, triton, forks):
    def begins():
        raise train_gpt.UserError("here the run begins")

    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(train_gpt, "triton", triton)
    monkeypatch.setattr(precompile, "start", lambda program, given: started.append(given) or print)
    monkeypatch.setattr(train_gpt.World, "from_environment", begins)
    tools = {"precompile": precompile, "describe": SimpleNamespace(show=print)}
    monkeypatch.setattr(train_gpt, "import_tool", lambda name, argument="": tools.get(name))
    with suppress(SystemExit):
        train_gpt.main(arguments)
    assert started == [arguments] * forks
