"""
How a run ends that can't go on: signals, hangs, the failures of other ranks. One message, and no process is left.

train_gpt.py loads it at its start and hands itself over as the module `train_gpt`. A copy without records/ beside it
runs without: Python then ends it as it ends other programs, and torchrun the other ranks.

While the main thread is in a collective or waits for a GPU, it runs no Python, not even a signal's handler. So a second
thread looks after signals and the other ranks, and ends the process itself.
"""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:  # for hints alone
    from logfile import LogFile

    from train_gpt import Hyperparameters, World

UNDER_TORCHRUN = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # the launcher is this process's parent


class Terminal:
    """Standard output or error as a run needs it: the log is the record, and what a terminal can't take is dropped.

    Its disk may be full, its reader gone or stopped, the terminal closed; letters that it lacks become \\u escapes.
    """

    PATIENCE = 1.0  # seconds that a reader may take; one that has taken longer is not waited for again

    def __init__(self, stream):
        self.stream, self.patience = stream or open(os.devnull, "w"), self.PATIENCE  # noqa: SIM115 - for the whole run

    def write(self, text: str) -> int:
        """Past Python's buffer, which could fail at any later moment, such as the end."""
        data = text.encode(self.stream.encoding, "backslashreplace")
        with suppress(OSError, ValueError):
            while data:
                ready = select.select([], [self.stream.fileno()], [], self.patience)[1]
                self.patience = self.PATIENCE if ready else 0.0
                data = data[os.write(self.stream.fileno(), data[: select.PIPE_BUF]) :] if ready else b""
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class Watch:
    """A thread that notices what the main thread can't while it waits for a GPU, a file or another rank.

    Ranks meet in the launcher's key-value store, to which each keeps a connection of its own. There every rank leaves
    a beat twice a second: its time, its host and where its main thread is. There also stands the run's end,
    an exit status and one message: the first rank to write it says it, all others follow.
    """

    TICK, SILENT, PATIENCE = 0.5, 5.0, 8.0  # seconds; a rank is silent when its beat has stood still for so long

    def __init__(self, train_gpt: ModuleType):
        self.train_gpt = train_gpt
        rank = os.environ.get("RANK", "0")
        self.rank, self.size, self.host = int(rank) if rank.isdecimal() else 0, 1, socket.gethostname()
        self.log: LogFile | None = None
        self.launcher = os.getppid() if UNDER_TORCHRUN else None
        self.store = None
        self.step: int | None = None  # steps done, on the clock
        self.stop = ""  # the signal that asked for an end at the next checkpoint
        self.can_stop, self.hang_timeout, self.moved = False, math.inf, math.inf
        self.doubt: float | None = None  # since when something is known to be wrong, perhaps another rank's fault
        self.verdict: tuple | None = None  # the end, if no rank turns out to be silent
        self.beats = {self.rank: (["", self.host, ""], 0.0)}  # by rank: its last beat, and when it came
        self.ending, self.closed = threading.Lock(), False

    def start(self) -> None:
        """From now on signals end the process whatever the main thread is waiting for, and a stuck terminal can't."""
        sys.stdout, sys.stderr = Terminal(sys.stdout), Terminal(sys.stderr)
        self.signals, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        signal.set_wakeup_fd(self.writer.fileno())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, lambda *_: None)
        self.thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self.thread.start()

    def join(self, world: World) -> None:
        """Meets the other ranks; after World.start."""
        self.size = world.size
        if world.size > 1:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=20))
            self.store = dist.PrefixStore(f"watch{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def follow(self, hp: Hyperparameters) -> None:
        """From now on as the hyperparameters say, which are the same on all ranks."""
        self.can_stop, self.hang_timeout = hp.checkpoint_every > 0, hp.hang_timeout or math.inf

    def at(self, step: int) -> None:
        """The main thread has come to this step."""
        self.moved, self.step = time.monotonic(), step

    def pause(self) -> None:
        """Until the next `at` it may take as long as it likes: validation, a checkpoint."""
        self.moved = math.inf

    def fail(self, error: BaseException) -> None:
        """Ends all processes with the error's message. It does not return."""
        details = "" if isinstance(error, self.train_gpt.UserError) else traceback.format_exc()
        end = 1, self._error(self.rank, self.reason_of(error)), details
        if self.store and isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            self.verdict, self.doubt = end, time.monotonic()  # perhaps another rank is gone: the thread finds out
            threading.Event().wait()
        if self.rank and not self.store:
            # torchrun ends all processes as soon as one has ended: rank 0, which finds the same, must speak first.
            # Still alive after that, this rank is the only one to know.
            time.sleep(10)
        self.end(*end)

    def reason_of(self, error: BaseException) -> str:
        """An exception in one line, with the remedy where it is known."""
        text = " ".join(str(error).split())
        if isinstance(error, self.train_gpt.UserError):
            return str(error)
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
            remedy = "fewer tokens in STAGES, a smaller --val_batch_size, or end what else uses the device's memory"
            return f"out of memory: {text[:300]} Remedies: {remedy}"
        return f"{type(error).__name__}: {text[:500]}"

    def end(self, status: int, message: str, details: str = "") -> None:
        """Ends all processes: the message comes once, and last in the log. It does not return."""
        self.ending.acquire()  # for good: one thread ends the process
        message = message.encode(errors="replace").decode()  # a file's name may hold bytes that are no text
        speaker = self.rank if status == 1 else 0  # where there is no store
        try:
            if self.store:
                try:
                    word = self.store.compare_set("end", "", f"{status} {self.rank} {message}").decode()
                    status, speaker, message = word.split(" ", 2)
                    status, speaker = int(status), int(speaker)
                except RuntimeError:  # the store is gone
                    self.store = None
            message = message if speaker != self.rank else details + message
            if self.rank == 0 and self.log:
                self.log.write(message, console=False)
                self.log.close()
                if self.store:
                    self.store.set("logged", "")
            if speaker == self.rank:
                print(message, file=sys.stderr, flush=True)
            if 0 != self.rank == speaker and self.store:
                try:
                    self.store.wait(["logged"], timedelta(seconds=3))
                except RuntimeError:  # rank 0 is gone
                    if self.log.path.exists():  # on another host it may not
                        with open(self.log.path, "a", encoding="utf-8") as file:
                            print(message, file=file)
            if self.rank == 0 and self.store and status == 1:
                time.sleep(2 * self.TICK)  # the store may end with this process or its launcher: all shall have read it
        finally:
            os._exit(status)  # without waiting for threads that wait for a file system, or a GPU for a rank

    def close(self) -> None:
        """The run has ended well. The thread must not be inside the store when Python ends."""
        self.closed = True
        self.writer.send(b"\0")
        self.thread.join()

    def _error(self, rank: int, reason: str) -> str:
        at = "" if self.step is None else f"at step {self.step}"  # others wait in the step in which a rank is gone
        where = f"rank {rank} on {self.beats[rank][0][1]} {at}".rstrip() if self.size > 1 else at
        return f"train_gpt.py: error: {where}{': ' if where else ''}{reason}"

    def _place(self) -> str:
        """Where the main thread is: the innermost function that is not a library's."""
        frame = sys._current_frames()[threading.main_thread().ident]
        while frame.f_back and any(f"/{part}/" in frame.f_code.co_filename for part in ("site-packages", "lib")):
            frame = frame.f_back
        return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"

    def _run(self) -> None:
        lost = None  # since when the store is
        while not self.closed:
            try:
                if select.select([self.signals], [], [], self.TICK)[0] and not self.closed:
                    self._signalled(signal.Signals(self.signals.recv(1)[0]))
                self._tick(time.monotonic())
                lost = None
            except RuntimeError:  # its process is gone, or the run ends at this moment
                lost = lost or time.monotonic()
                if time.monotonic() - lost > self.SILENT and not self.closed:
                    self.end(1, self._error(self.rank, "the launcher or rank 0 is gone"))

    def _signalled(self, number: signal.Signals) -> None:
        at = f" at step {self.step}" if self.step is not None else ""
        end = 128 + number, f"train_gpt.py: {number.name}: ended{at}" + (f"; log: {self.log.path}" if self.log else "")
        self.stop = number.name
        if number != signal.SIGINT and self.can_stop and self.step is not None:
            end = None  # at the next checkpoint
        elif number == signal.SIGINT or self.size == 1:
            self.end(*end)
        # Perhaps for another rank's death: torchrun signals those that are left.
        self.doubt, self.verdict = self.doubt or time.monotonic(), self.verdict or end

    def _tick(self, now: float) -> None:
        if self.launcher and os.getppid() != self.launcher:
            self.end(1, self._error(self.rank, "the launcher is gone"))
        self.beats[self.rank] = [str(now), self.host, self._place()], now
        if self.store:
            if self.store.check(["end"]):
                self.end(1, "")
            self.store.set(f"beat{self.rank}", "\n".join(self.beats[self.rank][0]))
            keys = [f"beat{rank}" for rank in range(self.size)]
            for rank, text in enumerate(self.store.multi_get(keys) if self.store.check(keys) else ()):
                beat = text.decode().split("\n")
                if rank not in self.beats or beat != self.beats[rank][0]:
                    self.beats[rank] = beat, now
        silent = [rank for rank, (_, when) in self.beats.items() if now - when > self.SILENT]
        if self.doubt and silent:
            reason = f"the process is gone or stopped: no sign of life for {self.SILENT:.0f} s"
            self.end(1, self._error(silent[0], reason))
        if self.doubt and self.verdict and now - self.doubt > self.PATIENCE:
            self.end(*self.verdict)
        if now - self.moved > self.hang_timeout:
            places = {rank: "silent" if rank in silent else beat[2] for rank, (beat, _) in sorted(self.beats.items())}
            told = "; ".join(f"rank {rank}: {place}" for rank, place in places.items())
            # A rank that does not wait for others. On GPUs no step is waited for: what stands is who reads its end.
            waiting = "reduced gathered fetch full agree_to_stop step_issued start stop validate check_gradients"
            last = min(places, key=lambda rank: (rank not in silent, places[rank].split()[0] in waiting.split()))
            self.end(1, self._error(last, f"no step has ended for {self.hang_timeout:g} s (--hang_timeout), {told}"))
