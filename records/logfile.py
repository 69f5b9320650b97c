"""
The log of a run, which is its record: a file that loses nothing, and the same lines on the terminal as far as it can.

train_gpt.py loads it at its start and hands itself over as the module `train_gpt`. A copy without records/ beside it
writes a plain file instead, whose lines are lost where a disk is full.

In the form of the public speedrun's logs: the source that runs, the machine, a line a step; records/runlog.py reads it.
"""

from __future__ import annotations

import fcntl
import os
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import getoutput
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from checks import versions

if TYPE_CHECKING:  # for hints alone
    from train_gpt import Hyperparameters, Trainer, World


class LogFile:
    """The log file, and the same lines on the terminal, where a bar may stand for those of steps; rank 0's alone."""

    def __init__(self, train_gpt: ModuleType, hp: Hyperparameters, world: World):
        self.train_gpt, self.hp, self.path = train_gpt, hp, Path(hp.log_dir) / f"{hp.run_id}.txt"
        self.file, self.bar, self.unwritten = None, None, b""
        if world.rank:
            return
        try:
            self._open("a+b" if hp.resume else "x+b")
            if self.file.tell() and os.pread(self.file.fileno(), 1, self.file.tell() - 1) != b"\n":
                self.unwritten = b"\n"  # ends a line that was cut short, perhaps by a disk that still is full
        except OSError as error:
            told = f"{self.path}: cannot write the log ({error.strerror})"
            raise train_gpt.UserError(f"{told}; give another --run_id= or --log_dir=") from None
        if sys.stderr.isatty() and not (hp.bench or hp.profile):
            from tqdm import tqdm

            self.bar = tqdm(total=hp.total_steps, unit="step", smoothing=0.05, dynamic_ncols=True)

    def _open(self, mode: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, mode, buffering=0)  # noqa: SIM115 - for the whole run
        try:  # the kernel takes the lock back however this process ends; on NFS it holds for all hosts
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = "another process is writing it: the run is going on already; wait for its end, or end it"
            raise self.train_gpt.UserError(f"{self.path}: {told}") from None
        except OSError:  # a file system without locks
            pass

    def begin(self, overrides: dict[str, object], told: list[str]) -> None:
        """What it takes to repeat the run: source, versions, GPUs, overrides; then `told`, the lines about the run."""
        if self.file is None:
            return
        self.show("\n".join(told))
        source, rule = Path(self.train_gpt.__file__).read_text(encoding="utf-8"), "=" * 100
        if not self.file.tell():
            header = [source, rule, f"Running Python {sys.version}", f"Running {versions(self.train_gpt)}"]
            if torch.cuda.is_available():
                header.append(getoutput("timeout 30 nvidia-smi", encoding="utf-8", errors="replace"))
            overridden = " ".join(f"--{name}={value}" for name, value in overrides.items()) or "none"
            header.append(f"preset: {self.hp.preset}; overrides: {overridden}")
            self.write("\n".join([*header, rule]), console=False)  # at once: a log has all of it or nothing
            self.show(header[-1])
        elif os.pread(self.file.fileno(), len(source.encode()), 0) != source.encode():
            self.write("note: train_gpt.py is not the one that this log begins with")
        self.write("\n".join(told), console=False)

    def write(self, text: str, console: bool = True, step: int = 0) -> None:
        """Writes one or more lines at once, without a buffer; what a full disk does not take is kept for later.

        step: that which a line is of; on the terminal a bar's progress may stand for it.
        """
        if self.file is None:
            return
        told = len(self.unwritten) > 1  # has said that it can't write
        self.unwritten += text.encode(errors="replace") + b"\n"
        try:
            if os.fstat(self.file.fileno()).st_nlink == 0:  # removed: what it held is still there to be copied
                old = self.file
                self._open("x+b")
                old.seek(0)
                self.unwritten = old.read() + self.unwritten
                old.close()
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if not told:
                message = f"cannot write the log ({error.strerror}); training goes on, the lines are kept"
                print(f"{self.path}: {message}", file=sys.stderr, flush=True)
        if step and self.bar is not None:
            self.bar.update(step - self.bar.n)
        elif console:
            self.show(text)

    def show(self, text: str) -> None:
        """On the terminal alone."""
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def result(self, trainer: Trainer, val_losses: list[float]) -> None:
        """The end of a run: memory, losses and, of the smoke preset's model, a text. Every rank must call it."""
        hp, world = trainer.hp, trainer.world
        if world.on_gpu:
            allocated, reserved = torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
            self.write(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
            if world.size > 1:
                by_rank: list = [None] * world.size
                dist.all_gather_object(by_rank, allocated)
                self.write(f"peak memory allocated by rank: {' '.join(map(str, by_rank))} MiB")
        learned = " -> ".join(f"{loss:.4f}" for loss in dict.fromkeys((val_losses[0], val_losses[-1])))
        self.write(f"validation loss {learned} after {hp.total_steps} steps; log: {self.path}")
        if hp.preset == "smoke":
            trainer.model.ngrams = trainer.ngrams.communication.full(trainer.ngrams.algorithm.p)
            # The run has ended well, though its tools or the vocabulary be gone by now.
            with suppress(self.train_gpt.UserError, ImportError):
                if world.rank == 0:
                    self.write(self.train_gpt.import_tool("sample", "the sample").log_line(trainer))

    def close(self) -> None:
        """Ends bar and file; what could not be written comes on the terminal."""
        if self.bar is not None:
            self.bar.close()
        if self.file:
            self.file.close()
            self.file = None
            if self.unwritten:
                told = self.unwritten.decode(errors="replace")
                print(f"the end of {self.path}, not written:\n{told}", file=sys.stderr, flush=True)
