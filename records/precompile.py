"""
Compiles beside a run's warm-up, in a process of its own, what the warm-up will then find in the caches on the disk.

With empty caches most of a start is compiling, and most of that Python in one thread. So a run on a GPU forks a second
process. It has the same program and a small n-grams' table, and compiles first all Triton kernels of train_gpt.py, side
by side, then a validation and an update. Meanwhile the run itself compiles forward and backward of the layers.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import triton
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:  # for hints alone
    from train_gpt import Hyperparameters, MicroBatch, StepBatch, Trainer, World

TOKENS = 4096  # enough to fill a GPU; else kernels depend on types, and on which sizes are multiples of 16, alone
NGRAM_ROWS = 65_536  # a multiple of 16, as the run's
MEMORY = 72  # GiB of a GPU to be free for both: the run takes up to 46, this process took 18


def start(train_gpt: ModuleType, arguments: list[str]) -> Callable[[], None]:
    """Forks the process for this host, by its first rank; returns what ends it. To be called before CUDA begins.

    None beside a server for several processes (MPS), which does not bear that one is killed.
    """
    server = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    if os.environ.get("LOCAL_RANK", "0") != "0" or os.path.exists(server):
        return lambda: None
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError:  # no room for a second process
        return lambda: None
    if not pid:
        beside(parent, train_gpt, arguments)

    def end() -> None:
        with suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored
            if os.waitpid(pid, os.WNOHANG) == (0, 0):  # one that has ended stays until it is waited for
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    return end


def beside(parent: int, train_gpt: ModuleType, arguments: list[str]) -> None:
    """The process. It ends with its parent, and says nothing of what the parent will find, too."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # where memory ends, this process goes first
        world = train_gpt.World.from_environment()
        if os.getppid() == parent and takes_several_processes():
            # Both processes have a context now, and the run is busy with checks: what it will take is free yet.
            free, total = (size / 2**30 for size in torch.cuda.mem_get_info(world.device))
            hp, _ = train_gpt.parse_arguments(arguments, world.on_gpu, total)
            if not hp.resume:  # which takes hyperparameters from a checkpoint
                compile_ahead(train_gpt, hp, world, free)
    except train_gpt.UserError:
        pass
    except BaseException as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(f"note: what compiles beside the run has ended, and the start takes longer: {line}", file=sys.stderr)
    finally:
        os._exit(0)


def takes_several_processes() -> bool:
    """Whether the first GPU does. On some clusters it takes one at a time: this one must not be the first."""
    driver, mode = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(-1)
    driver.cuInit(0)  # nothing is on the GPU before there is a context
    driver.cuDeviceGetAttribute(ctypes.byref(mode), 20, 0)  # CU_DEVICE_ATTRIBUTE_COMPUTE_MODE
    return mode.value == 0


def compile_ahead(train_gpt: ModuleType, hp: Hyperparameters, world: World, free: float) -> None:
    """All kernels; where enough GiB are free, a validation and updates of matrices."""
    alone = train_gpt.World(device=world.device)
    alone.start()
    train_paths, val_paths = train_gpt.files_of(hp).values()
    trainer = train_gpt.Trainer(replace(hp, ngram_rows=NGRAM_ROWS), alone)
    batches = trainer.batch_of_each_stage(train_paths)
    compile_kernels(trainer, batches)
    larger = hp.micro_batch_tokens > type(hp).micro_batch_tokens
    if free < MEMORY or larger or hp.compile == "off":
        return
    one_chunk = replace(trainer.hp, val_tokens=hp.val_batch_size // train_gpt.MICRO_BATCHES)
    trainer.validate(train_gpt.validation_batches(val_paths, one_chunk, alone), trainer.schedule.windows(0))
    for slot in trainer.optimizer.slots.values():
        if slot.row.algorithm == "normuon":  # of a bank's matrices each rank updates its part
            matrices = len(slot.grad) // world.size
            part = train_gpt.NorMuon(slot.row, hp, slot.algorithm.p[:matrices], 0, train_gpt.compiler(True))
            with torch.no_grad():
                part.update(slot.grad[:matrices], 1.0, 0.9)


class Compilers(ThreadPoolExecutor):
    """Threads for Triton's AsyncCompileMode that also load what they compile, for which a launcher is compiled."""

    def submit(self, compile_kernel: Callable) -> Future:
        return super().submit(lambda: self.loaded(compile_kernel()))

    @staticmethod
    def loaded(kernel):
        _ = kernel.run  # a property that loads
        return kernel


@contextmanager
def launches_compile(device: torch.device, threads: int) -> Iterator[None]:
    """Within it a launch of a kernel hands it to `threads` that compile, and the launch itself is left out.

    At its end all are compiled. torch.compile does nothing, and backward passes run in this thread, whose mode it is.
    """

    def compile_only(kernel: JITFunction, grid: object):
        return lambda *args, **options: kernel.run(*args, grid=grid, warmup=True, **options)

    inherited = JITFunction.__getitem__
    JITFunction.__getitem__ = compile_only
    eager, one_thread = torch.compiler.set_stance("force_eager"), torch.autograd.set_multithreading_enabled(False)
    set_device = torch.get_device_module(device).set_device  # a thread begins with the first GPU
    try:
        with eager, one_thread, Compilers(threads, "", set_device, (device,)) as pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        JITFunction.__getitem__ = inherited


def first_tokens(batch: MicroBatch, count: int) -> MicroBatch:
    """The first `count` positions of a micro-batch. Their orders sort nothing: nobody follows them."""
    orders, n = len(batch.slots), min(count, len(batch.inputs))
    inputs, targets, order = (tensor[:n] for tensor in (batch.inputs, batch.targets, batch.order))
    documents = type(batch.documents)(*(tensor[:n] for tensor in batch.documents))
    slots, slot_order = batch.slots[:, :n].contiguous(), batch.slot_order[: orders * n]
    return type(batch)(inputs, targets, documents, slots, slot_order, order, batch.classes)


def compile_kernels(trainer: Trainer, batches: list[tuple[int, StepBatch]]) -> None:
    """Forward and backward of the steps (step, batch), an update and a validation, of few tokens, launching no kernel.

    What that computes is rubbish, and stays.
    """
    with launches_compile(trainer.world.device, threads=os.cpu_count() or 1):
        for step, batch in batches:
            micro_batch = first_tokens(batch.micro_batches[0], TOKENS)
            trainer.add_gradients(step, batch._replace(micro_batches=[micro_batch]))
        trainer.update(step | 1)  # Adam steps on odd steps in all stages
        trainer.validation_losses(micro_batch, trainer.schedule.windows(0), trainer.ngrams.p)
