"""
What a race shows: figures by contestant and length, paired differences, and the time to the target loss.

Line, Answer and Difference are the statistics; Result puts them together as text, markdown, JSON and a plot.
"""

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from report import aligned, error, finite, group_data, pm, run_data, table
from runlog import Run, Stats, md, stats

NOTES = """Losses and times are means ± sample standard deviations of whole runs; times are training times, times the
number of processes. Differences are means of pairs with Student's 95 % interval, in millinats (mn) and seconds. The
time to the target reads off two lines by least squares through all of a contestant's runs: final loss over ln(steps),
time over steps; ± there is a standard error, by the delta method. "Within the noise": the 95 % interval holds zero, or
the ratio one. The shortest length at the target is the first whose mean loss is at most the target plus its standard
error."""


class Line(NamedTuple):
    """y = y0 + slope (x - x0) by least squares through n points, x0 their mean."""

    n: int
    x0: float
    y0: float
    slope: float
    std: float  # of the points around it; NaN for two
    spread: float  # sum of (x - x0)^2

    def at(self, x: float) -> float:
        return self.y0 + self.slope * (x - self.x0)

    def error_at(self, x: float) -> float:
        """Standard error of the line's height at x, in which those of height and slope are together."""
        return self.std * math.sqrt(1 / self.n + (x - self.x0) ** 2 / self.spread)


def line_through(xs: list[float], ys: list[float]) -> Line:
    n, x0, y0 = len(xs), fmean(xs), fmean(ys)
    spread = math.fsum((x - x0) ** 2 for x in xs)
    slope = math.fsum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / spread
    rest = math.fsum((y - y0 - slope * (x - x0)) ** 2 for x, y in zip(xs, ys, strict=True))
    return Line(n, x0, y0, slope, math.sqrt(rest / (n - 2)) if n > 2 else math.nan, spread)


class Answer(NamedTuple):
    """Where a contestant reaches the target: the final loss is a line over ln(steps), the time a line over steps."""

    loss: Line
    time: Line
    steps: float
    steps_error: float
    seconds: float  # times the number of GPUs
    seconds_error: float
    outside: bool  # of the lengths that were run

    def ratio(self, first: "Answer") -> tuple[float, float]:
        """Of the seconds to the first contestant's, and its standard error; their errors taken as independent."""
        ratio = self.seconds / first.seconds
        return ratio, ratio * math.hypot(self.seconds_error / self.seconds, first.seconds_error / first.seconds)


def final_loss(run: Run) -> float:
    return run.loss


def gpu_seconds(run: Run) -> float:
    return run.seconds * max(len(run.gpus), 1)


def answer(runs: list[Run], target: float) -> Answer | str:
    """Time to the target loss, or why there is none.

    With u = ln(steps) where the line is at the target, the delta method gives u the line's standard error there over
    its slope; steps have e^u times that, seconds have steps' error times seconds a step, and the time line's own.
    """
    steps = [run.total for run in runs]
    if len(set(steps)) < 2:
        return "a fit takes runs of two lengths or more"
    loss = line_through([math.log(n) for n in steps], [run.loss for run in runs])
    time = line_through(steps, [gpu_seconds(run) for run in runs])
    if loss.slope >= 0:
        return "the loss does not fall with the number of steps"
    u = loss.x0 + (target - loss.y0) / loss.slope
    if abs(u - loss.x0) > 5:
        return "the target is more than a hundred times as many or as few steps away"
    at, u_error = math.exp(u), loss.error_at(u) / -loss.slope
    seconds_error = math.hypot(time.slope * at * u_error, time.error_at(at))
    outside = not min(steps) <= at <= max(steps)
    return Answer(loss, time, at, at * u_error, time.at(at), seconds_error, outside)


class Difference(NamedTuple):
    """Of pairs: mean and its 95 % interval."""

    pairs: int
    mean: float
    half: float  # of the interval; NaN for less than two pairs

    def text(self, scale: float = 1.0) -> list[str]:
        """Mean, interval, and what to think of it."""
        if not self.pairs:
            return ["-", "-", "no pair"]
        mean, half = self.mean * scale, self.half * scale
        interval = "unknown" if math.isnan(half) else f"{mean - half:+.2f} to {mean + half:+.2f}"
        return [f"{mean:+.2f}", interval, judged(mean, half, ("less", "more"))]


def difference(pairs: list[tuple[Run, Run]], of: Callable[[Run], float]) -> Difference:
    """Of a figure of runs: new minus old."""
    s = stats([of(new) - of(old) for new, old in pairs])
    return Difference(s.n, s.mean, quantile(s.n - 1) * s.error)


def judged(value: float, half: float, words: tuple[str, str]) -> str:
    """A value and half of its 95 % interval, in words for negative and positive."""
    if math.isnan(half):
        return "noise unknown: too few runs"
    return "within the noise" if abs(value) <= half else words[value > 0]


def quantile(degrees: int) -> float:
    """Of Student's t, for a two-sided interval of 95 %; NaN without a degree of freedom."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees)) if degrees > 0 else math.nan


class Result:
    """All that a race shows. `troubles`: failures and what is missing."""

    def __init__(self, race, troubles: list[str]):
        self.race = race
        self.groups = {(name, length): race.group(name, length) for length in race.lengths for name in race.names}
        self.answers = {name: answer(race.group(name).counted, race.target) for name in race.names}
        self.differences = {
            (name, length): [difference(race.pairs(name, length), of) for of in (final_loss, gpu_seconds)]
            for length in race.lengths
            for name in race.names[1:]
        }
        runs = [run for group in self.groups.values() for run in group.counted]
        self.unit = "CPU-seconds" if {gpu for run in runs for gpu in run.gpus} == {"CPU"} else "GPU-seconds"
        kinds = {
            "hardware": {run.hardware for run in runs},
            "versions": {run.software for run in runs},
            "data": {" of ".join(f"{n:,}" for n in run.data) or "unknown" for run in runs},
        }
        differ = [f"{kind} differ between runs: {'; '.join(sorted(k))}" for kind, k in kinds.items() if len(k) > 1]
        self.troubles = [*race.notes, *differ, *troubles]

    def shortest(self, name: str) -> float | None:
        """The shortest length whose mean loss is at most the target plus its standard error."""
        for length in sorted(self.race.lengths):
            loss = self.groups[name, length].loss
            if loss.n and loss.mean <= self.race.target + (loss.error if loss.n > 1 else 0.0):
                return length
        return None

    def seconds(self, name: str, length: float) -> Stats:
        return stats([gpu_seconds(run) for run in self.groups[name, length].counted])

    def tables(self) -> list[tuple[str, list[list[str]]]]:
        """Titles and rows, heading first."""
        first, target = self.race.names[0], f"{self.race.target:g}"
        tables = [("Runs", self.run_rows())]
        if self.differences:
            tables.append((f"Against {first}, in pairs of one round and length", self.pair_rows()))
        return [*tables, (f"Time to a loss of {target}", [self.answer_row(name) for name in ("", *self.answers)])]

    def run_rows(self) -> list[list[str]]:
        rows = [["contestant", "length", "runs", "steps", "loss", self.unit, "ms a step by stage", "peak MiB"]]
        for (name, length), group in self.groups.items():
            row = [name, f"{length:g}", f"{len(group.counted)} of {self.race.runs}"]
            row.append(", ".join(map(str, group.steps())) or "-")
            row += [pm(group.loss, 4), pm(self.seconds(name, length), 2)] if group.counted else ["-", "-"]
            row.append(", ".join(f"{stage} {ms.mean:.2f}" for stage, ms in group.stage_ms().items()) or "unknown")
            rows.append([*row, str(max((run.peak[0] for run in group.counted if run.peak), default="unknown"))])
        return rows

    def pair_rows(self) -> list[list[str]]:
        rows = [["contestant", "length", "pairs", "loss (mn)", "95 %", "", self.unit, "95 %", ""]]
        for (name, length), (loss, seconds) in self.differences.items():
            rows.append([name, f"{length:g}", str(loss.pairs), *loss.text(1000), *seconds.text()])
        return rows

    def answer_row(self, name: str) -> list[str]:
        """A contestant's, or without a name the heading."""
        first = self.race.names[0]
        if not name:
            return ["contestant", "steps", self.unit, f"ratio to {first}", "", "shortest length at the target"]
        found, base, length = self.answers[name], self.answers[first], self.shortest(name)
        short = f"{length:g}: {pm(self.seconds(name, length), 2)}" if length else "none"
        if isinstance(found, str):
            return [name, "-", "-", "-", found, short]
        remarks = ["outside the lengths that were run"] if found.outside else []
        ratio = "1" if name == first else "-"
        if name != first and isinstance(base, Answer):
            value, ratio_error = found.ratio(base)
            ratio = f"{value:.4f} ± {error(ratio_error, 4)}"
            half = ratio_error * quantile(found.loss.n + base.loss.n - 4)
            remarks.insert(0, judged(value - 1, half, ("faster", "slower")))
        figures = [f"{found.steps:.1f} ± {error(found.steps_error, 1)}"]
        figures.append(f"{found.seconds:.2f} ± {error(found.seconds_error, 2)}")
        return [name, *figures, ratio, "; ".join(remarks), short]

    def text(self) -> str:
        parts = [f"{title}\n{aligned(rows)}" for title, rows in self.tables()]
        return "\n\n".join([*parts, "\n".join(self.troubles)]).rstrip()

    def markdown(self) -> str:
        who = [f"{md(c.name)}: {md(c.told)} (source {c.source})" for c in self.race.contestants]
        who += [f"all: {md(shlex.join(self.race.common))}"] if self.race.common else []
        parts = [f"# {md(self.race.out.name)}: a race", "\n".join(f"- {line}" for line in who)]
        parts += [f"## {md(title)}\n\n{table(rows)}" for title, rows in self.tables()]
        parts += ["![Final loss against time, a point a run](race.png)", NOTES]
        parts += ["\n".join(f"- {md(line)}" for line in self.troubles)]
        return "\n\n".join(parts).rstrip() + "\n"

    def json(self) -> str:
        race, base = self.race, self.answers[self.race.names[0]]
        data = {"target": race.target, "unit": self.unit, "contestants": {}, "lengths": [], "differences": []}
        for c in race.contestants:
            found = self.answers[c.name]
            told = {"none_because": found} if isinstance(found, str) else found._asdict()
            if isinstance(found, Answer):
                told |= {"loss": found.loss._asdict(), "time": found.time._asdict()}
                ratio = found.ratio(base) if isinstance(base, Answer) else (math.nan, math.nan)
                told |= dict(zip(("ratio", "ratio_error"), ratio, strict=True))
            data["contestants"][c.name] = asdict(c) | {"answer": told, "shortest_length": self.shortest(c.name)}
        for (name, length), group in self.groups.items():
            runs = [run_data(run) for run in group.counted]
            figures = {"steps": group.steps(), "total_seconds": self.seconds(name, length)._asdict()}
            data["lengths"].append(dict(contestant=name, length=length, **group_data(group), **figures, runs=runs))
        for (name, length), (loss, seconds) in self.differences.items():
            both = {"loss": loss._asdict(), "seconds": seconds._asdict()}
            data["differences"].append({"contestant": name, "length": length, **both})
        return json.dumps(finite({**data, "troubles": self.troubles}), indent=2, allow_nan=False) + "\n"

    def plot(self, path: Path) -> None:
        """Final loss against time, a point a run, and the fits."""
        from picture import plot_race

        sets = []
        for name, found in self.answers.items():
            runs, fit = self.race.group(name).counted, []
            if isinstance(found, Answer):
                begin, end = (of(found.steps, *(run.total for run in runs)) for of in (min, max))
                steps = [begin * (end / begin) ** (i / 60) for i in range(61)]
                fit = [(found.time.at(n), found.loss.at(math.log(n))) for n in steps]
            sets.append((name, [(gpu_seconds(run), run.loss) for run in runs], fit))
        plot_race(path, sets, self.race.target, self.unit)
