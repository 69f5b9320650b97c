"""
Reads the logs of training runs and judges them by the rules of the speedrun.

A log holds the whole source that ran, a line of "=", versions and nvidia-smi, a second line of "=", then the run's
lines. Two kinds are read: those of this repository's train_gpt.py (`Run.own`), which also name preset, overrides,
world, data and stages, and those of the public speedruns, which do not. Logs are data from strangers: nothing in them
is executed, every search is linear in their size, and every text taken from them is cut to one printable line.

Contents: Reading, Statistics, Comparison, Rules, Record folders, Text for people.
"""

import math
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

RECORDS = Path(__file__).resolve().parent
REFERENCE = RECORDS.parent / "train_gpt.py"
TARGET, ALPHA = 3.28, 0.01  # nats; the t-test's level
VAL_TOKENS, GPUS, GPU_NAME = 10_485_760, 8, "H100"
SHARD_TOKENS = 100_000_000  # of a FineWeb10B file
MAX_BYTES = 16 << 20  # a log of a run is 0.1 to 0.5 MB
MAX_DEPTH = 3  # of the subfolders in which logs are looked for
# As overrides.
HARMLESS = {
    "run_id",
    "log_dir",
    "val_loss_every",
    "val_steps",
    "save_checkpoint",
    "seed",
    "preset",
    "checkpoint_every",
    "resume",
    "hang_timeout",
}
LENGTHS = {"num_scheduled_iterations", "num_extension_iterations", "length"}  # overrides that the step lines show
PLAIN_COMPILE = {"dynamic", "fullgraph"}  # the arguments of torch.compile that the public baseline has
UNTIMED = 50  # a clock that begins again later than here does not merely leave out the first steps

# ======================================================================================================================
# Reading
# ======================================================================================================================

HEADER = re.compile(r"^={20,}[ \t]*\n(?:[ \t]*\n)?(?=Running[ \t]{1,9}(?:Python|PyTorch)[ \t])", re.M | re.I)
RULE_LINE = re.compile(r"^={20,}[ \t]*$", re.M)
STEP_LINE = re.compile(r"^[ \t]{0,9}step:[ \t]?([0-9]{1,7})(?:/([0-9]{1,7}))?[ \t]([^\n]{1,400})", re.M)
# In the rest of a step line. A unit is never the beginning of another: a line may be cut off behind it.
TIME = re.compile(r"\btrain_time:[ \t]?([0-9.]{1,20})[ \t]?(ms|s|min|h)\b")
AVERAGE = re.compile(r"\bstep_avg:[ \t]?([0-9.]{1,20})[ \t]?(ms|s|min|h)\b")
VAL_LOSS = re.compile(r"\bval_loss:[ \t]?(\S{1,40})[ \t]")
UNITS = {"ms": 1.0, "s": 1e3, "min": 6e4, "h": 3.6e6}
RESUMED = re.compile(r"^resumed at step ([0-9]{1,7}) from ", re.M)
ERROR = re.compile(r"^train_gpt\.py: error: (.{0,100})", re.M)
PEAK = re.compile(r"^peak memory (?:allocated|consumption): ([0-9]{1,7}) MiB(?: reserved: ([0-9]{1,7}) MiB)?", re.M)
WORLD = re.compile(r"^world: ([0-9]{1,4}) x ([^,\n]{1,100})", re.M)
PUBLIC_WORLD = re.compile(r"^Running (.{1,250}) with world_size[ :=]{1,3}([0-9]{1,4})", re.M)
LENGTH = re.compile(r"^run: .{1,200}, ([0-9]{1,7}) steps, ", re.M)
STARTS = re.compile(r"^stages: begin at steps (.{1,900})", re.M)
# How this repository's program computed its stages' first steps before its logs stated them.
THIRDS = """\
        third = hp.num_scheduled_iterations // 3
        self.starts = (0, third, 2 * third, hp.num_scheduled_iterations)
"""
DATA = re.compile(
    r"^data: ([0-9]{1,5}) train shards, ([0-9,]{1,20}) tokens; ([0-9,]{1,20}) of ([0-9,]{1,20}) validation tokens", re.M
)
PRESET = re.compile(r"^preset: (\w{1,30}); overrides: (.*)$", re.M)
GPU_ROW = re.compile(r"^\| {1,9}[0-9]{1,3} {1,9}(\S[^|\n]{0,60}?) {1,60}(?:On|Off|N/A) {1,9}\|", re.M)
VERSIONS = {
    "Python": re.compile(r"^Running[ \t]{1,9}Python[ \t]{1,9}([^\s,]{1,40})", re.M | re.I),
    "PyTorch": re.compile(r"^Running .{0,200}?\bPyTorch[ \t]{1,9}([^\s,]{1,60})", re.M | re.I),
    "CUDA": re.compile(r"compiled for CUDA ([^\s,]{1,20})"),
    "Triton": re.compile(r"^Running .{0,200}Triton (?:version )?(\S{1,40})", re.M),
    "driver": re.compile(r"Driver Version: (\S{1,20})"),
}
# Python's strings and comments; one that never ends goes to the end of its line, or of the text. Never backtracks.
STRING_OR_COMMENT = re.compile(
    r'"""(?:[^"\\]|\\(?:.|\Z)|"(?!""))*+(?:"""|\Z)'
    r"|'''(?:[^'\\]|\\(?:.|\Z)|'(?!''))*+(?:'''|\Z)"
    r'|"(?:[^"\\\n]|\\(?:.|\Z))*+(?:"|$)'
    r"|'(?:[^'\\\n]|\\(?:.|\Z))*+(?:'|$)"
    r"|#[^\n]*+",
    re.S | re.M,
)
COMPILE_CALL = re.compile(r"(?<!\bre)\.compile\b\s*+(\((?:[^()]|\([^()]*+\))*+\)|[^\n]*+)")
BANNER = r"^# ={20,}\n"


@dataclass
class Run:
    """What a log says. `problems` are why it is not one whole run; `notes` are worth knowing."""

    path: Path
    given: str = ""  # its name below the folder that was given
    source: str = ""
    own: bool = False
    preset: str = ""
    overrides: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)  # a name each
    data: tuple[int, ...] = ()  # train shards, their tokens, validation tokens used, validation tokens there
    total: int = 0  # steps
    starts: list[int] | None = None  # the stages' first steps, where the log states them
    losses: dict[int, float] = field(default_factory=dict)  # validation loss by steps done
    times: dict[int, float] = field(default_factory=dict)  # milliseconds of training by steps done
    untimed: int | None = None  # first steps that the clock leaves out; None: the log does not tell
    peak: tuple[int, int | None] | None = None  # MiB allocated, reserved
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return clean(self.given or self.path.name)

    @property
    def step(self) -> int:
        """Steps done."""
        return max(self.times, default=0)

    @property
    def complete(self) -> bool:
        return not self.problems

    @property
    def loss(self) -> float:
        """The final validation's; of a complete run."""
        return self.losses[self.total]

    @property
    def seconds(self) -> float:
        """Training time; of a complete run."""
        return self.times[self.total] / 1000

    @property
    def hardware(self) -> str:
        return ", ".join(f"{n} x {name}" for name, n in Counter(self.gpus).items()) or "unknown hardware"

    @property
    def software(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.versions.items()) or "unknown versions"

    def numbers(self, name: str) -> list[int]:
        """Values of a whole-number hyperparameter: the override, or what the source says, in its order."""
        texts = [self.overrides[name]] if name in self.overrides else assignments(self.source, name)
        products = (re.match(r"[0-9_]{1,15}(?:\s*\*\s*[0-9_]{1,15})*", text) for text in texts)
        parts = ([p.strip().strip("_") for p in m[0].split("*")] for m in products if m)
        return [math.prod(map(int, p)) for p in parts if all(p)]

    def files(self, name: str) -> str:
        """A file pattern: the override, or what the source says; '' if that cannot be found."""
        if name in self.overrides:
            return self.overrides[name]
        quoted = [m[1] for text in assignments(self.source, name) if (m := re.search(r"""["']([^"'\n]+)["']""", text))]
        return (quoted[-1] if self.preset == "smoke" else quoted[0]) if quoted else ""

    def stage_starts(self) -> list[int]:
        """First steps of the stages, the extension's last; [] where the log does not tell."""
        if self.starts is not None:
            return self.starts
        if self.own and THIRDS in self.source:
            for scheduled in self.numbers("num_scheduled_iterations"):
                if any(scheduled + extension == self.total for extension in self.numbers("num_extension_iterations")):
                    return [0, scheduled // 3, 2 * (scheduled // 3), scheduled]
        return []

    def stages(self) -> dict[str, tuple[int, int]]:
        """First step and end of each stage that has steps, by name; {} where the log does not tell."""
        starts = self.stage_starts()
        names = [*(f"stage {i}" for i in range(1, len(starts))), "extension"]
        ends = zip(names, starts, [*starts[1:], self.total], strict=False)
        return {name: (start, end) for name, start, end in ends if start < end}

    def stage(self, step: int) -> str:
        """Name of the stage that goes on when `step` steps are done."""
        begun = [name for name, (start, _) in self.stages().items() if start <= step]
        return begun[-1] if begun else ""

    def stage_ms(self) -> dict[str, float]:
        """Milliseconds a step by stage, where the log has the times at both ends of the stage."""
        first = self.untimed or 0
        times = {first: 0.0, **self.times}
        spans = [(name, max(start, first), end) for name, (start, end) in self.stages().items()]
        return {s: (times[b] - times[a]) / (b - a) for s, a, b in spans if a < b and a in times and b in times}


def clean(text: str, limit: int = 120) -> str:
    """One printable line: what comes from a log must not steer a terminal or break a table."""
    text = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def exit_with(main: Callable[[], int | None]) -> None:
    """Ends the program with what `main` returns; whoever reads its output may go away."""
    sys.stdout.reconfigure(errors="replace")  # a terminal need not know every letter of a log or a text
    try:
        sys.exit(main())
    except BrokenPipeError:  # as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def assignments(source: str, name: str) -> list[str]:
    """What stands right of `name =` or `name: type =` at the start of a line, at most ten."""
    pattern = rf"^[ \t]*{name}(?:\s?:\s?\w{{1,20}})?\s?=\s?([^=\n][^\n]{{0,300}})"
    return [m[1] for m in re.finditer(pattern, source, re.M)][:10]


def read_run(path: Path, name: str = "") -> Run:
    """A log, whatever is in the file: what is wrong with it stands in `problems`."""
    run = Run(Path(path), name)
    try:
        if path.is_dir() or (path.exists() and not path.is_file()):
            run.problems.append("not a file")
            return run
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        run.problems.append(f"cannot be read: {getattr(error, 'strerror', None) or error}")
        return run
    if not data:
        run.problems.append("an empty file")
    elif len(data) > MAX_BYTES:
        run.problems.append(f"larger than {MAX_BYTES >> 20} MiB: not a log")
    elif b"\0" in data:
        run.problems.append("a binary file")
    else:
        parse(run, data.decode("utf-8", errors="replace").replace("\r\n", "\n"))
    return run


def parse(run: Run, text: str) -> None:
    """Fills `run` from a log's text."""
    header = find_header(text)
    if header is None:
        run.problems.append("no line of '=' before 'Running Python': another program's log, or cut off in the source")
        return
    run.source = text[: header.start()]
    first = STEP_LINE.search(text, header.end())
    end = first.start() if first else len(text)
    rule = RULE_LINE.search(text, header.end(), end)
    head = text[header.end() : rule.start() if rule else end]
    body = text[rule.end() if rule else end :]
    run.versions = {name: clean(m[1]) for name, pattern in VERSIONS.items() if (m := pattern.search(head))}
    run.gpus = [clean(m[1]) for m in GPU_ROW.finditer(head)][:64]
    if world := PUBLIC_WORLD.search(head):
        run.gpus = [clean(world[1].rpartition(" on ")[2])] * int(world[2])
    if preset := PRESET.search(head):
        run.own, run.preset = True, preset[1]
        parts = re.split(r"(?:^|(?<= ))--(\w{1,40})=", preset[2][:5000])[1:]
        run.overrides = {name: clean(value.strip()) for name, value in zip(parts[::2], parts[1::2], strict=True)}
    if worlds := list(dict.fromkeys(WORLD.findall(body))):
        run.gpus = [clean(worlds[0][1])] * int(worlds[0][0]) if len(worlds) == 1 else []
    if len(worlds) > 1:
        run.notes.append("on changing hardware: " + clean(", then ".join(f"{n} x {name}" for n, name in worlds)))
    if data := DATA.search(body):
        run.data = tuple(int(number.replace(",", "") or 0) for number in data.groups())
    if peaks := PEAK.findall(body):
        run.peak = (int(peaks[-1][0]), int(peaks[-1][1]) if peaks[-1][1] else None)
    body = without_lost_steps(run, body)
    parse_steps(run, body)
    if not run.total and (length := LENGTH.search(body)):
        run.total = int(length[1])
    if starts := STARTS.search(body):
        run.starts = [int(start) for start in re.findall(r"[0-9]{1,7}", starts[1])]
        steps = [0, *run.starts[1:], run.total]
        if run.starts[:1] != [0] or steps != sorted(steps) or " ".join(map(str, run.starts)) != starts[1].strip():
            run.notes.append(f"stages that cannot be: {clean(starts[1])}")
            run.starts = []
    if HEADER.search(body):
        run.problems.append("several runs in one file (a restart): their lines cannot be told apart")
    if error := ERROR.search(body):
        run.problems.append(f"ended with an error: {clean(error[1])}")
    if epoch := re.search(r"^epoch [0-9]{1,4}: .{0,100}", body, re.M):
        run.notes.append(clean(epoch[0]))


def find_header(text: str) -> re.Match | None:
    """The line of '=' that ends the source: the first one that is not inside one of the source's strings."""
    candidates = list(HEADER.finditer(text))
    if not candidates:
        return None
    # Both in order. A string that never ends is no string but the log's own prose.
    strings = (m for m in STRING_OR_COMMENT.finditer(text) if m[0].endswith(('"""', "'''")))
    string = next(strings, None)
    for candidate in candidates:
        while string and string.end() <= candidate.start():
            string = next(strings, None)
        if not string or candidate.start() < string.start():
            return candidate
    return None


def without_lost_steps(run: Run, body: str) -> str:
    """The body of a log without the steps, and the error, after which the run went on from an earlier checkpoint."""
    first, *rest = RESUMED.split(body)
    if not rest:
        return body
    parts, limit = [rest[-1]], math.inf
    for text, step in zip([first, *rest[1:-1:2]][::-1], rest[::2][::-1], strict=True):
        limit = min(limit, int(step))
        # From step 0 a run begins anew, with a validation of its own there.
        text = STEP_LINE.sub(lambda m, limit=limit: m[0] if limit and int(m[1]) <= limit else "lost", text)
        parts.append(ERROR.sub("", text))
    run.notes.append(f"resumed {len(rest) // 2} times, the last time at step {rest[-2]}")
    return "".join(parts[::-1])


class Step(NamedTuple):
    """A line on a step; times are milliseconds and how much they may be rounded."""

    line: str
    step: int  # steps done
    total: int | None  # None: it does not say
    time: tuple[float, float] | None  # None: the line cannot be read
    loss: float | None  # a validation's
    average: tuple[float, float] | None  # time of a step so far, as the log says


def step_lines(text: str) -> Iterator[Step]:
    """The lines on steps in a log's body, or in a part of it, in their order."""
    for m in STEP_LINE.finditer(text):
        if "train_time:" in m[3]:
            ended = text[m.end() : m.end() + 1] == "\n"  # else the last figure may be cut off
            found = VAL_LOSS.search(m[3] + " " * ended)
            loss = number(found[1]) if found else None
            time = measured(TIME, m[3]) if loss is not None or "val_loss" not in m[3] else None
            yield Step(m[0], int(m[1]), int(m[2]) if m[2] else None, time, loss, measured(AVERAGE, m[3]))


def parse_steps(run: Run, body: str) -> None:
    """Losses and times, and what is wrong with them."""
    totals, step_times, val_times, averages = set(), {}, {}, []
    twice = contradictions = 0
    for line, step, total, time, loss, average in step_lines(body):
        if time is None or (total is not None and step > total):
            if len(run.notes) < 5:
                run.notes.append(f"unreadable line: {clean(line, 60)}")
            continue
        totals.update([] if total is None else [total])
        seen, value = (step_times if loss is None else val_times), (time[0], loss)
        if step in seen:
            twice += 1
            contradictions += repr(seen[step]) != repr(value)
        seen[step] = value
        if loss is not None and average:
            averages.append((step, time, average))
    run.total = max(totals, default=0)
    run.losses = {step: loss for step, (_, loss) in sorted(val_times.items())}
    # A validation's time is the exact one: the GPU has finished by then.
    merged = {**step_times, **val_times}
    run.times = {step: merged[step][0] for step in sorted(merged)}
    bad = [step for step, loss in run.losses.items() if not math.isfinite(loss)]
    if len(totals) > 1:
        run.problems.append(f"steps of different runs: {', '.join(map(str, sorted(totals)[:5]))} in all")
    if contradictions:
        run.problems.append(f"{contradictions} steps stand twice with different figures (a restart): not one run")
    elif twice:
        run.notes.append(f"{twice} lines stand twice")
    if bad:
        run.problems.append(f"validation loss is {run.losses[bad[0]]} at step {bad[0]}")
    read_clock(run, averages)
    if not run.times:
        run.problems.append("no steps: cut off before the first")
    elif not totals:
        run.problems.append("its lines do not tell how many steps there are in all")
    elif run.total not in run.losses:
        what = "no final validation" if run.step == run.total else f"cut off at step {run.step} of {run.total}"
        run.problems.append(what)


def read_clock(run: Run, averages: list[tuple]) -> None:
    """Finds the first steps that the clock leaves out, and leaves their times out, too.

    Programs of 2024 set the clock to zero after ten steps, while everything was compiled: it is the final time's clock
    that counts. `averages` are step, time and mean time of validations, the times as `measured`.
    """
    times, total = run.times, max(run.total, run.step)
    mean = times[run.step] / max(run.step, 1) if times else 0.0
    # Step lines may be a step off, no more.
    back = [
        (a, b)
        for a, b in pairwise(times)
        if times[b] < times[a] - 1000 or (times[b] < times[a] / 2 and times[b] < times[a] - 2 * mean)
    ]
    if len(back) == 1:
        (before, after), pace = back[0], times[run.step] / (run.step - back[0][0])
        if before <= UNTIMED and 2 * before < total and times[after] <= 2 * pace * (after - before) + 1000:
            run.notes.append(f"the clock began again at step {after}")
            run.untimed = before if times[after] > pace / 4 else after
            run.times = {run.untimed: 0.0, **{step: time for step, time in times.items() if step >= after}}
            return
    if back:
        run.problems.append("the clock runs backwards")
    elif averages and (left_out := steps_left_out(averages)) is not None:
        run.untimed = left_out
    elif 1 in times:
        run.untimed = 0


def steps_left_out(averages: list[tuple]) -> int | None:
    """How many steps less than all the means are of; None if they are of something else.

    Every line has rounded figures, so that each gives a range. A step more or less is a way of counting.
    """
    low, high = -math.inf, math.inf
    for step, (time, time_error), (average, average_error) in averages:
        if step and time and average:
            timed = time / average
            error = timed * (time_error / time + average_error / average) + 1e-6
            low, high = max(low, step - timed - error), min(high, step - timed + error)
    if not math.isfinite(low) or high < -1 or math.ceil(low) > math.floor(high):
        return None
    if low > 1:
        return math.ceil(low)
    return 0 if high < 2 else None


def measured(pattern: re.Pattern, text: str) -> tuple[float, float] | None:
    """A time in milliseconds, and how much it may be rounded."""
    if not (m := pattern.search(text)) or (value := number(m[1])) is None:
        return None
    return round(value * UNITS[m[2]], 6), UNITS[m[2]] * 0.5 / 10 ** len(m[1].partition(".")[2])


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def logs_in(folder: Path) -> list[Path]:
    """The logs (*.txt, *.log) in a folder and its subfolders, but for linked and hidden folders; links come last."""
    found = []
    for parent, folders, files in os.walk(folder):
        depth = len(Path(parent).relative_to(folder).parts)
        folders[:] = [name for name in folders if depth < MAX_DEPTH and not name.startswith(".")]
        found += [Path(parent, name) for name in files if Path(name).suffix in (".txt", ".log")]
    return sorted(found, key=lambda path: (path.is_symlink(), path))


def read_runs(arguments: list[Path]) -> list[Run]:
    """The logs given, and those in the folders given, each once. Problems stand in the runs."""
    paths: dict[str, tuple[Path, str]] = {}
    runs = []
    for argument in map(Path, arguments):
        if not os.path.isdir(argument):
            paths.setdefault(os.path.realpath(argument), (argument, argument.name))
            continue
        inside = logs_in(argument)
        if not inside:
            runs.append(Run(argument, problems=["no logs (*.txt, *.log) in this folder"]))
        for path in inside:
            name, real = str(path.relative_to(argument)), os.path.realpath(path)
            if Path(real).is_relative_to(os.path.realpath(argument)):
                paths.setdefault(real, (path, name))
            else:
                runs.append(Run(path, name, problems=["a link out of the folder: give the file itself"]))
    runs += [read_run(path, name) for path, name in paths.values()]
    seen: dict[tuple, Run] = {}
    for run in runs:
        if run.complete and (first := seen.setdefault((*run.times.items(), *run.losses.items()), run)) is not run:
            run.problems.append(f"the same run as {first.name}")
    return runs


# ======================================================================================================================
# Statistics
# ======================================================================================================================


class Stats(NamedTuple):
    """Of a sample; std is the sample standard deviation, NaN for one value."""

    n: int
    mean: float
    std: float

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.std / self.n**0.5 if self.n else math.nan


def stats(values: list[float]) -> Stats:
    n = len(values)
    return Stats(n, statistics.fmean(values) if n else math.nan, statistics.stdev(values) if n > 1 else math.nan)


def p_value(losses: list[float], target: float = TARGET) -> float:
    """One-sided one-sample t-test against "the mean loss is target or more"; NaN where it is not defined."""
    if len(losses) < 2 or len(set(losses)) == 1:
        return math.nan
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(losses, target, alternative="less").pvalue)


def runs_needed(losses: Stats, target: float = TARGET, most: int = 1000) -> int | None:
    """Runs that would make p < 0.01 at this mean and standard deviation."""
    if not (losses.std > 0 and losses.mean < target):
        return None
    from scipy.stats import t

    distance = (target - losses.mean) / losses.std
    return next((n for n in range(2, most) if t.sf(distance * n**0.5, n - 1) < ALPHA), None)


class Group:
    """Several logs; statistics are over the complete ones."""

    def __init__(self, runs: list[Run], target: float = TARGET):
        self.runs, self.target = runs, target
        self.counted = [run for run in runs if run.complete]
        self.loss = stats([run.loss for run in self.counted])
        self.time = stats([run.seconds for run in self.counted])
        self.p = p_value([run.loss for run in self.counted], target)

    def stage_ms(self) -> dict[str, Stats]:
        runs = [run.stage_ms() for run in self.counted]
        names = sorted({name for ms in runs for name in ms}, key=lambda name: (name == "extension", len(name), name))
        return {name: stats([ms[name] for ms in runs if name in ms]) for name in names}

    def each(self, attribute: str) -> list[str]:
        """The different values of a text attribute, the most frequent first."""
        return [value for value, _ in Counter(getattr(run, attribute) for run in self.counted).most_common()]

    def overrides(self) -> list[str]:
        """What this repository's program was told in its complete runs, as far as it changes the training."""
        return told(self.counted)

    def setting(self) -> "Setting":
        """Of the complete runs; where there are none, of the runs."""
        runs = self.counted or self.runs
        totals = [run.total for run in runs if run.total]
        return Setting(
            {run.hardware for run in runs},
            set(told(runs, HARMLESS | LENGTHS)),
            (min(totals), max(totals)) if totals else (0, 0),
            {run.data[3] for run in runs if run.data},
        )

    def steps(self) -> list[int]:
        return sorted({run.total for run in self.counted})

    def time_at(self, step: float) -> float | None:
        """Mean seconds at a step."""
        return mean_of([interpolate(run.times, step) for run in self.counted], 1e-3)

    def loss_at(self, step: float) -> float | None:
        """Mean validation loss at a step, on the line between the validations beside it."""
        return mean_of([interpolate(run.losses, step) for run in self.counted])


def told(runs: list[Run], but: set[str] = HARMLESS) -> list[str]:
    """Overrides and presets of this repository's program, but for those named."""
    own = [run for run in runs if run.own]
    changed = sorted({f"--{k}={v}" for run in own for k, v in run.overrides.items() if k not in but})
    return changed + sorted({f"preset {run.preset}" for run in own if run.preset != "speedrun"})


def interpolate(points: dict[float, float], x: float) -> float | None:
    """Linear between points in ascending order; None outside of them."""
    if x in points:
        return points[x]
    below, above = [p for p in points if p < x], [p for p in points if p > x]
    if not below or not above:
        return None
    a, b = below[-1], above[0]
    return points[a] + (points[b] - points[a]) * (x - a) / (b - a)


def mean_of(values: list[float | None], scale: float = 1.0) -> float | None:
    known = [value for value in values if value is not None]
    return scale * statistics.fmean(known) if known else None


# ======================================================================================================================
# Comparison
# ======================================================================================================================


class Setting(NamedTuple):
    """What must be alike for one program's times and losses to say something about a change of it."""

    hardware: set[str]
    told: set[str]  # without what the number of steps shows
    steps: tuple[int, int]  # of the shortest and the longest run
    validation: set[int]  # tokens in the validation files, where the logs name them

    def like(self, other: "Setting") -> bool:
        """The same but for some steps: a change may save a few; a run of half the steps is another kind of run."""
        alike = self.hardware == other.hardware and self.told == other.told
        same_text = not (self.validation and other.validation) or self.validation == other.validation
        return alike and same_text and max(*self.steps, *other.steps) < 1.5 * min(*self.steps, *other.steps)

    def __str__(self) -> str:
        steps = "-".join(map(str, sorted({*self.steps})))
        return clean(", ".join([*sorted(self.hardware), f"{steps} steps", *sorted(self.told)]), 300)


class Comparison(NamedTuple):
    """New minus old; negative is better."""

    loss: float  # difference of mean losses
    loss_error: float  # its standard error
    time: float  # seconds
    time_error: float
    steps: float | None  # fewer steps that would reach the old loss; negative: more steps
    steps_seconds: float | None  # what those steps take
    warnings: list[str]


def compare(new: Group, old: Group) -> Comparison:
    """Two groups. `steps` divides the difference of losses by the slope of loss at the end of the runs.

    That slope is a run's own, in its cooldown, and steeper than the final loss of longer and longer runs: the true
    number of steps is larger.
    """
    steps = seconds = None
    slopes = [s for run in new.counted + old.counted if (s := final_slope(run))]
    loss, time = new.loss.mean - old.loss.mean, new.time.mean - old.time.mean
    if slopes and math.isfinite(loss):
        slope, last_ms = zip(*slopes, strict=True)
        if statistics.fmean(slope) < 0:
            steps = loss / statistics.fmean(slope)
            seconds = steps * statistics.fmean(last_ms) / 1000
    warnings = [
        f"{what} differ ({clean('; '.join(new.each(name)))} and {clean('; '.join(old.each(name)))}): {advice}"
        for what, name, advice in (
            ("hardware", "hardware", "times cannot be compared"),
            ("versions", "software", "time both on the same machine"),
        )
        if new.counted and old.counted and set(new.each(name)) != set(old.each(name))
    ]
    loss_error = math.hypot(new.loss.error, old.loss.error)
    return Comparison(loss, loss_error, time, math.hypot(new.time.error, old.time.error), steps, seconds, warnings)


def final_slope(run: Run) -> tuple[float, float] | None:
    """Loss a step, and milliseconds a step, between the last validation and one at least 2% of the run before it."""
    earlier = [step for step in run.losses if step <= run.total - max(1, run.total // 50)]
    if not earlier or earlier[-1] < run.total / 2:
        return None
    a, b = earlier[-1], run.total
    return (run.losses[b] - run.losses[a]) / (b - a), (run.times[b] - run.times[a]) / (b - a)


# ======================================================================================================================
# Rules
# ======================================================================================================================


class Rule(NamedTuple):
    name: str
    holds: bool | None  # None: these logs do not tell
    detail: str
    called: str = ""  # what logs that break it are, as in "... is no record: <called>"


def judge(group: Group, reference: str | None = None) -> list[Rule]:
    """The rules, one by one; `reference` is a source whose data section is the right one."""
    runs = group.counted
    rules = [runs_rule(group), complete_rule(group)]
    if not runs:
        return rules
    tokens = [run.data[2] if run.data else next(iter(run.numbers("val_tokens")), None) for run in runs]
    rules += [
        each_rule(f"{VAL_TOKENS:,} validation tokens", runs, tokens, lambda n: n == VAL_TOKENS, "other validation"),
        fineweb_rule(runs),
        gpu_rule(runs),
        clock_rule(runs),
    ]
    sources = {run.source for run in runs}
    if len(sources) > 1:
        rules.append(Rule("one source in all logs", False, f"{len(sources)} different sources", "of different sources"))
    elif len(group.steps()) > 1:
        detail = f"the same source, but {' and '.join(map(str, group.steps()))} steps"
        rules.append(Rule("one source in all logs", False, detail, "of different lengths"))
    else:
        rules.append(Rule("one source in all logs", True, "the same in all"))
    changed = group.overrides()
    detail = clean(" ".join(changed)) or "none that changes the training"
    if any(run.own for run in runs):
        rules.append(Rule("no overrides", not changed, detail, "with overrides"))
    flags = sorted({flag for source in sources for flag in compile_flags(source)})
    detail = clean(", ".join(flags)) or "none"
    rules.append(Rule("no extra compile flags", not flags, detail, "with extra compile flags"))
    rules.append(data_rule(sources, reference))
    return rules


def verdict(group: Group, rules: list[Rule]) -> str:
    """One sentence."""
    n = len(group.counted)
    what = f"{n} complete run{'s' * (n != 1)}"
    broken, unknown = [r for r in rules if r.holds is False], [r for r in rules if r.holds is None]
    if broken:
        return f"Not a record: {what}, " + ", ".join(dict.fromkeys(rule.called for rule in broken)) + "."
    if unknown:
        return f"A record if these hold, which the logs do not tell: {'; '.join(rule.name for rule in unknown)}."
    return f"A record by every rule that logs can show: {what}."


def runs_rule(group: Group) -> Rule:
    name, loss = f"enough runs for p < {ALPHA}", group.loss
    if loss.n < 2:
        return Rule(
            name, False, f"{loss.n} complete run{'s' * (loss.n != 1)}; a t-test takes 2 or more", "too few runs"
        )
    if math.isnan(group.p):
        return Rule(name, False, "all losses alike: the t-test is not defined", "all of one loss")
    detail = f"{loss.n} runs, p = {p_text(group.p)}"
    if group.p < ALPHA:
        return Rule(name, True, detail)
    if loss.mean >= group.target:
        return Rule(name, False, f"{detail}; the mean loss is not below {group.target}", f"not below {group.target}")
    needed = runs_needed(loss, group.target)
    more = f"; about {needed} runs would do at this mean and std" if needed else ""
    return Rule(name, False, detail + more, f"too few to show a loss below {group.target}")


def complete_rule(group: Group) -> Rule:
    broken = len(group.runs) - len(group.counted)
    detail = f"{broken} of {len(group.runs)} logs are not whole runs" if broken else f"all {len(group.runs)}"
    return Rule("every run complete", not broken and bool(group.runs), detail, "beside logs that are not whole runs")


def each_rule(name: str, runs: list[Run], values: list[int | None], right: Callable[[int], bool], called: str) -> Rule:
    """A rule on one number of each run; None: unknown."""
    different = clean(", ".join(f"{v:,}" for v in sorted({v for v in values if v is not None})))
    if any(v is not None and not right(v) for v in values):
        return Rule(name, False, different, called)
    if None in values:
        return Rule(name, None, "cannot be found in the logs")
    return Rule(name, True, f"in {'all' if len(runs) > 1 else 'the'} log{'s' * (len(runs) > 1)}")


def fineweb_rule(runs: list[Run]) -> Rule:
    name, called = "FineWeb files", "on another corpus"
    files = {(run.files("train_files"), run.files("val_files")) for run in runs}
    for train, val in files:
        for pattern, part in ((train, "train"), (val, "val")):
            if pattern and not re.search(rf"(?:^|/)fineweb_{part}_[^/]*\.bin$", pattern):
                return Rule(name, False, clean(pattern), called)
    for shards, tokens, _, val_tokens in {run.data for run in runs if run.data}:
        # The last of the 103 train files may be shorter.
        if not (shards - 1) * SHARD_TOKENS < tokens <= shards * SHARD_TOKENS or val_tokens % SHARD_TOKENS:
            detail = f"{shards} train files of {tokens:,} tokens, {val_tokens:,} validation tokens: not FineWeb10B's"
            return Rule(name, False, detail, called)
    if any(not (train and val) for train, val in files):
        return Rule(name, None, "their names cannot be found in the logs")
    return Rule(name, True, clean(", ".join(sorted({name for pair in files for name in pair}))))


def gpu_rule(runs: list[Run]) -> Rule:
    name = f"{GPUS} {GPU_NAME} GPUs"
    detail = clean("; ".join(sorted({run.hardware for run in runs})))
    for run in runs:
        if run.gpus and not (
            len(run.gpus) == GPUS and all(GPU_NAME in gpu.split() and "MIG" not in gpu for gpu in run.gpus)
        ):
            return Rule(name, False, detail, f"on {clean(run.hardware)}")
    return Rule(name, True if all(run.gpus for run in runs) else None, detail)


def clock_rule(runs: list[Run]) -> Rule:
    name = "the clock covers every training step"
    if left_out := sorted({run.untimed for run in runs if run.untimed}):
        detail = f"it leaves out the first {' or '.join(map(str, left_out))} steps"
        return Rule(name, False, detail, "with steps that the clock leaves out")
    if any(run.untimed is None for run in runs):
        return Rule(name, None, "cannot be found in the logs")
    return Rule(name, True, f"in {'all' if len(runs) > 1 else 'the'} log{'s' * (len(runs) > 1)}")


def compile_flags(source: str) -> list[str]:
    """Arguments of torch.compile beyond the baseline's, and settings of torch._inductor, in the code of a source."""
    flags = set()

    def keep(match: re.Match) -> str:
        if match[0][0] == "#":
            return ""
        if "\n" not in match[0]:
            flags.update(re.findall(r"TORCHINDUCTOR_\w{1,40}|TORCH_COMPILE_\w{1,40}", match[0]))
        return '""'

    code = STRING_OR_COMMENT.sub(keep, source)
    for call in COMPILE_CALL.finditer(code):
        flags.update(f"{k}=" for k in re.findall(r"\b(\w{1,40})\s?=(?!=)", call[1]) if k not in PLAIN_COMPILE)
        flags.update(["**"] if "**" in call[1] else [])
    flags.update("_inductor.config" + m[1] for m in re.finditer(r"_inductor\.config((?:\.\w{1,60}){0,3})", code))
    flags.update(["_inductor.config"] if re.search(r"_inductor import [^\n]*\bconfig\b", code) else [])
    return sorted(flags)


def data_section(source: str) -> str | None:
    """What stands under the banner "Data" of train_gpt.py."""
    match = re.search(BANNER + r"# Data\n" + BANNER + rf"(.*?)(?={BANNER}|\Z)", source, re.M | re.S)
    return match[1].rstrip() if match else None


def data_rule(sources: set[str], reference: str | None) -> Rule:
    name = "data section unchanged"
    right = data_section(reference) if reference else None
    sections = [data_section(source) for source in sources]
    if right is None:
        return Rule(name, None, "no reference to compare with")
    if any(section is not None and section != right for section in sections):
        return Rule(name, False, "differs from the reference's: the token stream may too", "with another data section")
    if None in sections:
        return Rule(name, None, "cannot be compared: not a source of this repository")
    return Rule(name, True, "as in the reference")


# ======================================================================================================================
# Record folders
# ======================================================================================================================

FOLDER = re.compile(r"(\d{4}-\d{2}-\d{2})_(\w[\w.-]*)", re.A)


class Record(NamedTuple):
    folder: Path
    date: str
    name: str
    group: Group


def newest_alike(records: list[Record], group: Group) -> Record | None:
    """The newest record of the setting that these runs have, unless they are its own; None if there is none."""
    setting, own = group.setting(), [Path(os.path.realpath(run.path)) for run in group.runs]
    for record in reversed(records):
        folder = os.path.realpath(record.folder)
        itself = any(path.is_relative_to(folder) for path in own)
        if record.group.counted and not itself and record.group.setting().like(setting):
            return record
    return None


def read_records(records: Path = RECORDS) -> list[Record]:
    """The record folders, oldest first; of one day, the slower first."""
    folders = [p for p in records.iterdir() if p.is_dir() and FOLDER.fullmatch(p.name)] if records.is_dir() else []
    found = [Record(p, *FOLDER.fullmatch(p.name).groups(), Group(read_runs([p]))) for p in folders]
    return sorted(found, key=lambda r: (r.date, -r.group.time.mean if r.group.counted else -math.inf, r.name))


# ======================================================================================================================
# Text for people
# ======================================================================================================================


def p_text(p: float) -> str:
    return "undefined" if math.isnan(p) else f"{p:.4f}" if p >= 0.0001 else f"{p:.1e}"


def md(text: str) -> str:
    """A text from a log, a file or a command line as plain text of a markdown table or paragraph."""
    text = re.sub(r"([\\`*_{}\[\]<>#!|~&$])", r"\\\1", clean(text, 1000))
    return text.replace("://", ":&#47;/").replace("www.", "www&#46;")  # no links by themselves either
