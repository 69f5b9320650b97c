"""Compiles a run's Triton kernels side by side, before its warm-up, in which one would wait for the other.

A warm-up launches some fifty kernels of train_gpt.py for the first time. Compiling one takes a core half a second or
more; with empty caches that is a third of a start.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
import triton
from triton.runtime.jit import JITFunction

TOKENS = 4096  # enough to fill a GPU; else kernels depend on types, and on which sizes are multiples of 16, alone


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


def few_tokens(batch):
    """A MicroBatch with the first TOKENS positions of another. Its orders sort nothing: they are not followed."""
    orders, n = len(batch.slots), min(TOKENS, len(batch.inputs))
    inputs, targets, order = (tensor[:n] for tensor in (batch.inputs, batch.targets, batch.order))
    documents = type(batch.documents)(*(tensor[:n] for tensor in batch.documents))
    slots, slot_order = batch.slots[:, :n].contiguous(), batch.slot_order[: orders * n]
    return type(batch)(inputs, targets, documents, slots, slot_order, order, batch.classes)


def compile_kernels(trainer, batches: list) -> None:
    """Forward and backward of the steps (step, batch), an update and a validation, of few tokens, launching no kernel.

    What that computes is rubbish: parameters are the caller's to put back, all else is put back here.
    """
    with launches_compile(trainer.world.device, threads=max(1, os.cpu_count() // trainer.world.size)):
        for step, batch in batches:
            micro_batch = few_tokens(batch.micro_batches[0])
            trainer.add_gradients(step, batch._replace(micro_batches=[micro_batch]))
        trainer.update(step | 1)  # Adam's steps are odd
        trainer.validation_losses(micro_batch, trainer.schedule.windows(0), trainer.ngrams.p)
    trainer.reset()
    torch.cuda.empty_cache()
