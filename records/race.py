"""
Two or more programs on the same text: is one better, by how much, how sure?

    python records/race.py base=HEAD new=train_gpt.py 'hot=train_gpt.py --muon_lr=0.031' \\
        --runs 3 --lengths 0.2,0.25 --target 3.337 --out races/hot [-- --name=value ...]

A contestant is NAME=PROGRAM: a file, a git revision (its train_gpt.py), or a record folder or log, whose source is
taken out of the log, with the settings of its logs but for counts of steps, data, and what does not change the
training. Its own arguments follow it; what follows `--` goes to all. The first contestant is what others are held
against.

A length is a share of a program's own full run: --length=F where its --help lists that, else every count of steps
(COUNTS) times F, momentum's too, so that a quarter is the whole run in small. A count that the contestant is given is
its full run's. Runs validate at every quarter of their way, unless they are told when.

Round k runs each contestant at each length with --seed=k, so that losses are compared in pairs; from round to round
contestants start in another order and get another card. Sources are copied first: an edit does not change the race.

OUT holds race.json (what the race is), sources/, caches/ (of compiling, by source), journal.jsonl (who ran where),
runs/NAME/LENGTH/*.txt (the logs, for report.py), and at the end README.md, results.json and race.png. The same command
goes on with what is missing, also with more --runs or --lengths; `submit.py RECORD OUT` makes a record of it.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from answer import Result
from rerun import ROOT, Refusal, command, environment, git, gpus_here, logged_program, logged_settings, named, place
from runlog import HARMLESS, TARGET, Group, Run, clean, interpolate, number, read_run, step_lines

COUNTS = (
    *("num_scheduled_iterations", "num_extension_iterations"),  # these two are the run
    *("muon_momentum_warmup", "muon_momentum_cooldown"),
)
RACE_SETS = {"run_id", "log_dir", "seed", "resume", "bench", "profile", "checkpoint_every", "save_checkpoint"}
FILES = {"train_files", "val_files"}
DATA = {*FILES, "val_tokens", "val_batch_size"}  # alike for all: given after `--`
LAST_FAILURE = 2  # then a contestant's other runs are left out
BEFORE = {"race.part", "lock", "sources"}  # what may be in OUT before race.json is

# ======================================================================================================================
# Contestants
# ======================================================================================================================


@dataclass
class Contestant:
    name: str
    told: str  # PROGRAM and arguments, as given
    source: str  # digest
    arguments: list[str]
    known: dict[str, str]  # hyperparameters and defaults of its preset


def read_program(program: str) -> tuple[str, list[str]]:
    """A program's source, and the arguments that a record's logs add. Raises Refusal."""
    path = Path(program).expanduser()
    if path.suffix == ".py":
        try:
            return path.read_bytes().decode(errors="replace"), []
        except OSError as problem:
            raise Refusal(f"{program}: cannot be read ({problem.strerror})") from None
    if path.exists():
        source, runs = logged_program(path)
        kept = logged_settings(runs, HARMLESS - {"preset"} | DATA | {*COUNTS, "length"})
        return source, [f"--{name}={value}" for name, value in kept.items()]
    source = git("show", "--end-of-options", f"{program}:train_gpt.py")
    if not source:
        raise Refusal(f"{clean(program)}: no file or record folder, and no git revision with a train_gpt.py")
    return source.decode(errors="replace"), []


def enlist(text: str, common: list[str], out: Path, on_gpu: bool) -> Contestant:
    """A contestant from NAME=PROGRAM; its source is placed in OUT. Raises Refusal."""
    name, _, told = text.partition("=")
    try:
        program, *given = shlex.split(told)
    except ValueError as problem:
        raise Refusal(f"{clean(text)}: {str(problem) or 'NAME=PROGRAM, with a program'}") from None
    source, logged = read_program(program)
    path = place(source, out / "sources")
    try:
        known = dict(hyperparameters(path))
    except Refusal as problem:
        raise Refusal(f"{name}: {program}: {problem}") from None
    if not on_gpu and "preset" in known:
        logged = [*logged, "--preset=smoke"]
    settings = named([*logged, *common, *given])
    for setting in named([*common, *given]):
        if setting in RACE_SETS:
            raise Refusal(f"{name}: --{setting} is the race's to set")
        if setting not in known:
            raise Refusal(f"{name}: {program} knows no --{setting}")
    if not 0 < (number(settings.get("length", "1")) or 0) < math.inf:
        raise Refusal(f"{name}: --length={clean(settings['length'])} is no share of a run")
    if not_alike := DATA & named(given).keys():
        raise Refusal(f"{name}: --{min(not_alike)} must be alike for all: give it after --")
    if settings.get("preset") == "smoke":  # --help prints the speedrun's: the smoke preset's stand in the source
        for count in known.keys() & {*COUNTS}:
            known[count] = str((Run(path, source=source).numbers(count)[1:2] or [known[count]])[0])
    contestant = Contestant(name, told, path.parent.name, [*logged, *common, *given], known)
    if "length" not in known and not counts(contestant):
        raise Refusal(f"{name}: {program} knows neither --length nor --{COUNTS[0]}: it has no lengths")
    return contestant


@cache
def hyperparameters(program: Path) -> dict[str, str]:
    """Names and defaults of a program, as its --help prints them. Raises Refusal."""
    settings = {**environment(on_gpu=False), "CUDA_VISIBLE_DEVICES": ""}
    try:
        ran = subprocess.run(
            command(program, ["--help"]),
            env=settings, stdin=subprocess.DEVNULL, capture_output=True, timeout=300,
        )  # fmt: skip
        known = dict(re.findall(r"^ +--(\w+)=(.*)$", ran.stdout.decode(errors="replace"), re.M))
        why = last_line(ran.stderr.decode(errors="replace")) or f"exit status {ran.returncode}"
    except subprocess.TimeoutExpired:
        known, why = {}, "it did not end in five minutes"
    if not {"run_id", "log_dir"} <= known.keys():
        raise Refusal(f"no program for a race, its --help lists no --run_id= and --log_dir= ({why})")
    return known


def counts(contestant: Contestant) -> dict[str, int]:
    """Counts of steps of its full run; {} without the first."""
    values = {**contestant.known, **named(contestant.arguments)}
    found = {name: number(values[name]) for name in COUNTS if name in values}
    found = {name: int(value) for name, value in found.items() if value is not None and math.isfinite(value)}
    return found if COUNTS[0] in found else {}


def length_arguments(contestant: Contestant, length: float) -> list[str]:
    """What makes it run this share of its full run, and validate at every quarter of that."""
    given, full = named(contestant.arguments), counts(contestant)
    length *= float(given.get("length", 1))
    short = {name: max(round(value * length), min(value, 1)) for name, value in full.items()}
    settings = {name: str(value) for name, value in short.items()}
    if "length" in contestant.known:
        settings = {"length": f"{length:g}"}
    if full and "val_loss_every" in contestant.known and not {"val_loss_every", "val_steps"} & given.keys():
        settings["val_loss_every"] = str(math.ceil(sum(short.get(name, 0) for name in COUNTS[:2]) / 4))
    return [f"--{name}={value}" for name, value in settings.items()]


def last_line(output: str) -> str:
    """What a failed program said: its error, else its last line with a word in it."""
    if errors := re.findall(r"^train_gpt\.py: error: (.+)$", output, re.M):
        return clean(errors[-1], 200)
    lines = [line for line in output.splitlines() if re.search(r"\w", line)]
    return clean(lines[-1].strip(), 200) if lines else ""


# ======================================================================================================================
# The race's folder
# ======================================================================================================================


class Job(NamedTuple):
    """One run."""

    name: str
    length: float
    round: int  # and seed

    @property
    def run_id(self) -> str:
        return f"{self.name}-{self.length:g}-{self.round}"

    def log(self, out: Path) -> Path:
        return out / "runs" / self.name / f"{self.length:g}" / f"{self.run_id}.txt"


class Race:
    """What race.json says, and the runs that are there."""

    def __init__(self, options: argparse.Namespace, common: list[str], on_gpu: bool):
        """Begins it, or goes on with one that was begun. Raises Refusal."""
        self.out, self.notes = options.out, []
        self.lengths, self.runs, self.target = options.lengths, options.runs, options.target
        fixed = {"gpus": options.gpus, "common": common, "on_gpu": on_gpu}
        told = dict(text.split("=", 1) for text in options.contestants)
        path = self.out / "race.json"
        if path.is_file():
            try:
                begun = json.loads(path.read_text())
                self.contestants = [Contestant(**c) for c in begun["contestants"]]
            except (ValueError, KeyError, TypeError):
                raise Refusal(f"{path}: not a race's") from None
            before = {c.name: c.told for c in self.contestants}
            pairs = [(name, before.get(name), told.get(name)) for name in {**before, **told}]
            pairs += [(name, begun.get(name), value) for name, value in fixed.items()]
            for name, old, new in pairs:
                if old != new:
                    old, new = ("without it" if text is None else repr(text) for text in (old, new))
                    raise Refusal(f"{self.out} was begun with {name}: {old}, not {new}; give another --out")
            for c in self.contestants:
                with contextlib.suppress(Refusal):
                    source = read_program(shlex.split(c.told)[0])[0]
                    if source.encode(errors="replace") != self.source(c).read_bytes():
                        self.notes.append(f"{c.name}: the source changed meanwhile; the race has the one it began with")
        else:
            self.contestants = [enlist(text, common, self.out, on_gpu) for text in options.contestants]
        manifest = {"contestants": [asdict(c) for c in self.contestants], **fixed}
        manifest |= {"lengths": self.lengths, "runs": self.runs, "target": self.target}
        write_whole(path, json.dumps(manifest, indent=2) + "\n")
        self.processes, self.on_gpu, self.common = options.gpus, on_gpu, common
        self.names = [c.name for c in self.contestants]
        self.logs = {job: read_run(job.log(self.out)) for job in self.plan()}

    def source(self, contestant: Contestant) -> Path:
        return self.out / "sources" / contestant.source / "train_gpt.py"

    def plan(self) -> list[Job]:
        """All runs, in the order in which one card would do them: who begins changes from length to length."""
        jobs = []
        for k in range(self.runs):
            for i, length in enumerate(self.lengths, k):
                first = i % len(self.names)
                jobs += [Job(name, length, k) for name in self.names[first:] + self.names[:first]]
        return jobs

    def pairs(self, name: str, length: float) -> list[tuple[Run, Run]]:
        """Its complete runs of a length, each with the first contestant's of the same round."""
        jobs = [job for job in self.logs if (job.name, job.length) == (name, length)]
        pairs = [(self.logs[job], self.logs[job._replace(name=self.names[0])]) for job in jobs]
        return [(new, old) for new, old in pairs if new.complete and old.complete]

    def group(self, name: str, length: float | None = None) -> Group:
        """A contestant's runs, of one length or of all."""
        jobs = [job for job in self.logs if job.name == name and length in (None, job.length)]
        return Group([self.logs[job] for job in jobs if self.logs[job].complete], self.target)


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


# ======================================================================================================================
# Runs
# ======================================================================================================================


@dataclass
class Running:
    """A run that is under way."""

    job: Job
    card: int
    process: subprocess.Popen
    log: Path
    began: float = field(default_factory=time.monotonic)
    read: int = 0  # bytes of the log
    step: int = 0
    total: int = 0
    losses: dict[float, float] = field(default_factory=dict)  # by share of the run

    def look(self) -> None:
        """Reads what has come to the log since."""
        with contextlib.suppress(OSError), open(self.log, "rb") as file:
            file.seek(self.read)
            lines = file.read()
            lines = lines[: lines.rfind(b"\n") + 1]
            self.read += len(lines)
            for line in step_lines(lines.decode(errors="replace")):
                self.step, self.total = line.step, line.total or 0
                if self.total and line.loss is not None:
                    self.losses[self.step / self.total] = line.loss


def shares(run: Run) -> dict[float, float]:
    """Loss by share of the run."""
    return {step / run.total: loss for step, loss in run.losses.items()} if run.total else {}


class Track:
    """Deals the runs that are missing over the cards and sees them through."""

    def __init__(self, race: Race, cards: list[str]):
        self.race = race
        n = race.processes
        self.cards = [",".join(cards[i : i + n]) for i in range(0, len(cards) - n + 1, n)] or [""]
        self.pending = [job for job in race.plan() if not race.logs[job].complete]
        self.done, self.all = len(race.logs) - len(self.pending), len(race.logs)
        self.running: dict[int, Running] = {}
        self.failures: list[tuple[Job, str]] = []
        self.left_out: list[Job] = []
        self.used: Counter = Counter()  # runs by card, contestant, length
        self.walls: dict[str, list[float]] = {}  # seconds from start to end of a whole run, by contestant
        self.journal = race.out / "journal.jsonl"
        for line in self.journal.read_text().splitlines() if self.journal.is_file() else ():
            with contextlib.suppress(ValueError, KeyError):  # a line that was cut short
                entry = json.loads(line)
                self.count(Job(*entry["job"]), entry["card"], entry["seconds"])

    def count(self, job: Job, card: str, seconds: float) -> None:
        self.used[card, job.name, job.length] += 1
        self.walls.setdefault(job.name, []).append(seconds / job.length)

    def choose(self, card: str) -> Job:
        """Of the round that is due, what this card has had least."""
        due = [job for job in self.pending if job.round == self.pending[0].round]
        return min(due, key=lambda job: self.used[card, job.name, job.length])

    def start(self, job: Job, card: int) -> Running:
        race, log = self.race, job.log(self.race.out)
        contestant = next(c for c in race.contestants if c.name == job.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():  # of a run that did not come to its end
            aside = (log.with_suffix(f".aside{i}") for i in range(1, 1000))
            log.rename(next(path for path in aside if not path.exists()))
        settings = {"run_id": job.run_id, "log_dir": str(log.parent)}
        settings |= {"seed": str(job.round)} if "seed" in contestant.known else {}
        arguments = [*contestant.arguments, *length_arguments(contestant, job.length)]
        arguments += [f"--{name}={value}" for name, value in settings.items()]
        caches = race.out / "caches" / contestant.source
        env = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
        env |= environment(race.on_gpu)
        if race.on_gpu:
            order = {} if "CUDA_VISIBLE_DEVICES" in env else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # nvidia-smi's
            env |= order | {"CUDA_VISIBLE_DEVICES": self.cards[card]}
        end_with = signal.SIGTERM if race.processes > 1 else signal.SIGKILL  # torchrun ends its processes
        with open(log.with_suffix(".out"), "wb") as out:
            process = subprocess.Popen(
                command(race.source(contestant), arguments, race.processes),
                env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=lambda: LIBC and LIBC.prctl(1, end_with),  # PR_SET_PDEATHSIG: if this process is killed
            )  # fmt: skip
        return Running(job, card, process, log)

    def run(self, display: "Display") -> None:
        """Until nothing is pending; whatever ends it ends the runs."""
        try:
            while self.pending or self.running:
                for card in range(len(self.cards)):
                    if self.pending and card not in self.running:
                        job = self.choose(self.cards[card])
                        self.pending.remove(job)
                        self.running[card] = self.start(job, card)
                display.show(self)
                time.sleep(display.interval)
                for running in list(self.running.values()):
                    running.look()
                    if running.process.poll() is not None:
                        self.finish(running, display)
        finally:
            end([running.process for running in self.running.values()])

    def finish(self, running: Running, display: "Display") -> None:
        job, seconds = running.job, time.monotonic() - running.began
        del self.running[running.card]
        self.race.logs[job] = run = read_run(running.log)
        if run.complete:
            self.done += 1
            self.count(job, self.cards[running.card], seconds)
            entry = {"job": job, "card": self.cards[running.card], "seconds": round(seconds, 1)}
            with open(self.journal, "a") as journal:
                print(json.dumps(entry), file=journal)
            difference = self.against(job, shares(run))
            told = f", {difference} against {self.race.names[0]}" if difference else ""
            display.say(f"{self.where(running)}: loss {run.loss:.4f}, {run.seconds:.2f} s{told}")
            return
        out = running.log.with_suffix(".out").read_bytes()[-20_000:].decode(errors="replace")
        why = last_line(out) or "; ".join(run.problems)
        self.failures.append((job, why))
        display.say(f"{self.where(running)}: FAILED (exit status {running.process.returncode}): {why}")
        if sum(failed.name == job.name for failed, _ in self.failures) == LAST_FAILURE:
            self.left_out += [other for other in self.pending if other.name == job.name]
            self.pending = [other for other in self.pending if other.name != job.name]
            if self.left_out:
                display.say(f"{job.name}: its other runs are left out; the same command tries them again")

    def where(self, running: Running) -> str:
        card = f" on {self.card_name(running.card)}" if self.race.on_gpu else ""
        return f"[{self.done}/{self.all}] {running.job.run_id}{card}"

    def card_name(self, card: int) -> str:
        return f"GPU {self.cards[card]}" if self.race.on_gpu else "CPU"

    def against(self, job: Job, curve: dict[float, float]) -> str:
        """Its newest loss minus the first contestant's, of the same round if that is so far, at the same share."""
        first, share = self.race.names[0], max(curve, default=0)
        if job.name == first or not curve:
            return ""
        logs = {other: shares(run) for other, run in self.race.logs.items() if run.complete}
        curves = logs | {running.job: running.losses for running in self.running.values()}
        alike = [other for other in curves if (other.name, other.length) == (first, job.length)]
        alike.sort(key=lambda other: other.round != job.round)
        there = (interpolate(curves[other], share) for other in alike)
        return next((f"{curve[share] - loss:+.4f}" for loss in there if loss is not None), "")

    def seconds_left(self) -> float | None:
        """By the runs so far, of this contestant or of any, and by how far those under way are."""
        known = [wall for walls in self.walls.values() for wall in walls]
        now = time.monotonic()
        left = 0.0
        for running in self.running.values():
            typical = self.walls.get(running.job.name) or known
            passed = now - running.began
            if typical:
                left += max(0.0, fmean(typical) * running.job.length - passed)
            elif running.step:
                left += passed * (running.total / running.step - 1)
                known.append(passed * running.total / running.step / running.job.length)
        if not known:
            return None
        left += sum(fmean(self.walls.get(job.name) or known) * job.length for job in self.pending)
        return left / len(self.cards)


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end(processes: list[subprocess.Popen]) -> None:
    """Ends them and whatever they started."""
    handlers = [(which, signal.signal(which, signal.SIG_IGN)) for which in (signal.SIGINT, signal.SIGTERM)]
    for which, patience in ((signal.SIGTERM, 40), (signal.SIGKILL, 10)):  # torchrun waits 30 s for its processes
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, which)
        until = time.monotonic() + patience
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    for which, handler in handlers:
        signal.signal(which, handler)


class Display:
    """A line for each run that has ended; on a terminal also a table of those under way."""

    def __init__(self, title: str):
        self.title, self.live, self.interval = title, None, 0.2
        if sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(auto_refresh=False, transient=True)
            self.live.start()

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone, or a pipe's reader: the race goes on
            if self.live:
                self.live.console.print(clean(line, 300), markup=False, highlight=False)
            else:
                print(clean(line, 300), flush=True)

    def show(self, track: Track) -> None:
        if not self.live:
            return
        from rich.table import Table
        from rich.text import Text

        left = track.seconds_left()
        told = f"{self.title}: {track.done} of {track.all} runs" + (f", {minutes(left)} left" if left else "")
        rows = Table(title=Text(told), title_justify="left")
        for column in ("run", "on", "step", "loss", f"against {track.race.names[0]}"):
            rows.add_column(Text(column))
        for card, running in sorted(track.running.items()):
            job, share = running.job, max(running.losses, default=0)
            loss = f"{running.losses[share]:.4f} at {share:.0%}" if running.losses else ""
            step = f"{running.step}/{running.total}" if running.total else "starts"
            cells = (job.run_id, track.card_name(card), step, loss, track.against(job, running.losses))
            rows.add_row(*map(Text, cells))
        for job, why in track.failures:
            rows.add_row(*map(Text, (job.run_id, "failed", "", "", why)), style="red")
        with contextlib.suppress(OSError):
            self.live.update(rows, refresh=True)

    def close(self) -> None:
        if self.live:
            with contextlib.suppress(OSError):
                self.live.stop()


def minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


# ======================================================================================================================
# main
# ======================================================================================================================


def read_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and what follows `--`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestants", nargs="+", metavar="NAME=PROGRAM", help="the first is the one to beat")
    parser.add_argument("--runs", type=int, default=3, help="rounds (default %(default)s)")
    parser.add_argument("--lengths", default="1", help="shares of a full run, as 0.22,0.25 (default %(default)s)")
    parser.add_argument("--target", type=float, default=TARGET, help="loss (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the race")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs a run, through torchrun (default 1)")
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, common = parser.parse_intermixed_args(arguments[:at]), arguments[at + 1 :]
    try:
        options.lengths = sorted({float(text) for text in options.lengths.split(",")})
    except ValueError:
        raise Refusal(f"--lengths {options.lengths}: shares of a run as 0.22,0.25") from None
    if not all(0 < length <= 10 for length in options.lengths):
        raise Refusal(f"--lengths {','.join(f'{n:g}' for n in options.lengths)}: shares of a run, above 0")
    for name in ("runs", "gpus"):
        if getattr(options, name) < 1:
            raise Refusal(f"--{name} {getattr(options, name)}: 1 or more")
    if not math.isfinite(options.target):
        raise Refusal(f"--target {options.target}: a loss")
    names = [text.partition("=")[0] for text in options.contestants]
    for name, text in zip(names, options.contestants, strict=True):
        if "=" not in text or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}", name):
            raise Refusal(f"{clean(text)}: a contestant is NAME=PROGRAM, its name of letters, digits, _ . -")
    if len({name.lower() for name in names}) < len(names):
        raise Refusal(f"contestants {', '.join(names)}: each takes a name of its own")
    return options, common


@contextlib.contextmanager
def locked(out: Path):
    """The folder, for one race at a time. Raises Refusal."""
    if out.is_dir() and not (out / "race.json").exists() and (strange := {p.name for p in out.iterdir()} - BEFORE):
        raise Refusal(f"{out}: there is something else in it ({clean(min(strange))})")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refusal(f"{out}: another race.py is at work in it") from None
        yield


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: all runs are there. 1: some failed. 2: refused."""
    try:
        options, common = read_options(sys.argv[1:] if arguments is None else arguments)
        cards = gpus_here()
        if 0 < len(cards) < options.gpus:
            raise Refusal(f"--gpus {options.gpus}: there are {len(cards)} GPUs here")
        options.out = options.out.absolute()
        with locked(options.out):
            return hold(options, common, cards)
    except (Refusal, OSError) as problem:
        print(f"race.py: {'refused: ' * isinstance(problem, Refusal)}{problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("race.py: stopped, its runs ended; the same command goes on", file=sys.stderr)
        return 130


def hold(options: argparse.Namespace, common: list[str], cards: list[str]) -> int:
    """The race from its beginning, or from where it is, to its answer."""
    race = Race(options, common, on_gpu=bool(cards))
    track = Track(race, cards)
    if track.pending and any(
        named(c.arguments).get("preset") == "smoke" and not FILES & named(c.arguments).keys() for c in race.contestants
    ):
        made = subprocess.run([sys.executable, ROOT / "data" / "sample.py"], capture_output=True, text=True)
        if made.returncode:
            raise Refusal(f"data/sample.py could not make the smoke preset's data: {last_line(made.stderr)}")
    display = Display(options.out.name)
    try:
        for note in race.notes:
            display.say(f"note: {note}")
        display.say(f"{options.out}: {track.done} of {track.all} runs are there")
        track.run(display)
    finally:
        display.close()
    missing = [job.run_id for job, run in race.logs.items() if not run.complete]
    troubles = [f"{job.run_id} failed: {why}" for job, why in track.failures]
    result = Result(race, troubles + ([f"missing: {', '.join(missing)}"] if missing else []))
    for name, text in (("README.md", result.markdown()), ("results.json", result.json())):
        write_whole(race.out / name, text)
    result.plot(race.out / "race.png")
    print(f"\n{result.text()}\n\n{options.out / 'README.md'}, results.json and race.png say the same")
    return int(bool(missing))


def stop(*_) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) is signal.SIG_DFL:  # not as nohup leaves it
            signal.signal(name, stop)
    sys.stdout.reconfigure(errors="replace")  # a terminal need not know every letter of a log
    sys.exit(main())
