"""
The pictures: loss curves of runs, by matplotlib; the history of records and the comparison of programs, SVGs that are
alike on every machine.

    python records/picture.py records/quarter_runs.csv records/2026-11-25_Fp8Gradients --out records/quarter.svg

draws programs beside each other, loss over GPU-seconds: those of a file of figures with the columns program, steps,
step, train_time_ms, val_loss, where this project's have names that begin with "this project", and this program, from
the logs of its record.
"""

import argparse
import csv
import math
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

from runlog import Group, Record, clean, judge, number, read_runs

NEW, PALE, OLD, INK, QUIET, FAINT = "#1664d9", "#9dbff0", "#c77414", "#24292f", "#57606a", "#8b949e"
MORE = "#1a7f37", "#8250df", "#bf3989", "#6e7781"  # further contestants
PUBLIC = (
    "2026-01-30 public record",
    "1555 steps, 8 x NVIDIA H100",
    97.7693,
)  # what train_gpt.py's mathematics is that of


def plot_losses(path: Path, group: Group, old: Group | None, names: tuple[str, str]) -> None:
    """Loss against time and against step; the final points stand enlarged in the first panel's empty corner."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "records"  # the same picture from the same logs
    import matplotlib.pyplot as plt

    figure, (by_time, by_step) = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    final = by_time.inset_axes((0.50, 0.52, 0.47, 0.43))
    sets = [(old, OLD, names[1])] if old and old.counted else []
    sets.append((group, NEW, names[0]))
    low, high = group.target, group.target
    for runs, color, name in sets:
        for i, run in enumerate(runs.counted):
            steps = [step for step in run.losses if step in run.times]
            losses = [run.losses[step] for step in steps]
            label = f"{clean(name, 40)} ({len(runs.counted)} run{'s' * (len(runs.counted) > 1)})" if not i else None
            style = dict(color=color, lw=1.3, marker="o", ms=3, alpha=0.75, label=label and label.replace("$", r"\$"))
            by_time.plot([run.times[step] / 1000 for step in steps], losses, **style)
            by_step.plot(steps, losses, **style)
            final.plot(run.seconds, run.loss, "o", color=color, ms=5, alpha=0.75, mec="white", mew=0.5)
            low = min(low, run.loss)
            high = max(high, next(run.losses[step] for step in steps if step >= 0.1 * run.total))
        if runs.loss.n > 1:
            final.errorbar(
                *(runs.time.mean, runs.loss.mean),
                *(runs.loss.error, runs.time.error),
                color=color, capsize=3, lw=1.4, marker="_", ms=12, zorder=3,
            )  # fmt: skip
    for panel in (by_time, by_step, final):
        dress(panel, group.target)
    final.margins(0.15, 0.2)
    final.ticklabel_format(useOffset=False)
    final.tick_params(labelsize=8)
    final.locator_params(nbins=4)
    final.set_title("at the end, with mean and standard error", fontsize=9, color=INK)
    if high > low:
        by_time.set_ylim(low - 0.05 * (high - low), high * 1.01)
    by_time.set(xlabel="training time (s)", ylabel="validation loss (nats)")
    by_step.set(xlabel="step")
    by_step.annotate(
        f"target {group.target:g}", (0.01, group.target), xycoords=("axes fraction", "data"),
        xytext=(0, 4), textcoords="offset points", fontsize=9, color=INK,
    )  # fmt: skip
    if sets[0][0].counted:
        by_step.legend(frameon=False, loc="upper right")
    else:
        figure.suptitle("no complete runs")
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def dress(panel, target: float) -> None:
    """What all panels have."""
    panel.axhline(target, color=INK, lw=1, ls=(0, (4, 3)), zorder=1)
    panel.grid(color="#d8dee4", lw=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.tick_params(color=FAINT, labelcolor=INK)
    panel.margins(x=0.02)


Points = list[tuple[float, float]]  # seconds, loss


def plot_race(path: Path, sets: list[tuple[str, Points, Points]], target: float, unit: str) -> None:
    """Final loss against time, a point a run, with the fit of each contestant: (name, runs, fit)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, (name, runs, fit) in enumerate(sets):
        color = (OLD, NEW, *MORE)[i % (2 + len(MORE))]
        label = f"{name} ({len(runs)} run{'s' * (len(runs) != 1)})".replace("$", r"\$")
        panel.plot(*(zip(*runs, strict=True) if runs else ([], [])), "o", color=color, ms=5, alpha=0.75, label=label)
        if fit:
            panel.plot(*zip(*fit, strict=True), color=color, lw=1.2, alpha=0.75)
    dress(panel, target)
    panel.set(xlabel=unit, ylabel=f"final validation loss (nats); target {target:g}")
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def history_svg(records: list[Record], most: int = 20) -> str:
    """Training times of the newest records as bars, the public record they started from on top."""
    rows = [(*PUBLIC, FAINT)]
    for record in [record for record in records if record.group.counted][-most:]:
        group = record.group
        made = f"{' and '.join(map(str, group.steps()))} steps, {'; '.join(group.each('hardware'))}"
        broken = any(rule.holds is False for rule in judge(group))
        rows.append((f"{record.date} {record.name}", made, group.time.mean, PALE if broken else NEW))
    longest = max(row[2] for row in rows)
    height = 46 * len(rows) + 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="840" height="{height}" viewBox="0 0 840 {height}" '
        'font-family="sans-serif" font-size="14" role="img">',
        "<title>Training time of the records</title>",
        f'<rect width="840" height="{height}" fill="#ffffff"/>',
        f'<text x="308" y="26" fill="{INK}" font-weight="bold">Training time, mean of the runs</text>',
    ]
    for i, (name, made, seconds, color) in enumerate(rows):
        y, width = 42 + 46 * i, 370 * seconds / (longest or 1)
        remark = ", no record" if color == PALE else ""
        lines += [
            f'<text x="296" y="{y + 12}" fill="{INK}" text-anchor="end">{escape(clean(name, 38))}</text>',
            f'<text x="296" y="{y + 28}" fill="{QUIET}" text-anchor="end" font-size="11">'
            f"{escape(clean(made, 48))}</text>",
            f'<rect x="308" y="{y}" width="{width:.1f}" height="30" rx="3" fill="{color}"/>',
            f'<text x="{308 + width + 8:.1f}" y="{y + 20}" fill="{INK}">{seconds:.2f} s{remark}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


# ======================================================================================================================
# Programs beside each other
# ======================================================================================================================

COLUMNS = ["program", "steps", "step", "train_time_ms", "val_loss"]
NOTE = "One NVIDIA H100, a quarter of each program's steps, open English text instead of FineWeb, one or two runs each"
FEW = 6  # validations of a record that make no curve
# On white paper and on dark.
INKS = {"paper": ("#ffffff", "#0d1117"), "ink": ("#24292f", "#e6edf3"), "quiet": ("#57606a", "#9198a1")}
INKS |= {"grid": ("#d8dee4", "#262c36"), "ours": (NEW, "#58a6ff")}
INKS |= {"other0": (OLD, "#e9a352"), "other1": ("#14857a", "#4cc9b8"), "other2": ("#8250df", "#b99af5")}


class Curve(NamedTuple):
    """A program's losses by GPU-seconds; the last point is the end of its run."""

    name: str
    ink: str
    points: list[tuple[float, float]]


class Panel(NamedTuple):
    """A rectangle of the picture and the ranges of GPU-seconds and loss that it shows."""

    left: float
    top: float
    width: float
    height: float
    times: tuple[float, float]
    losses: tuple[float, float]

    @property
    def size(self) -> str:
        return f'x="{self.left}" y="{self.top}" width="{self.width}" height="{self.height}"'

    def x(self, time: float) -> float:
        return self.left + self.width * (time - self.times[0]) / (self.times[1] - self.times[0])

    def y(self, loss: float) -> float:
        return self.top + self.height * (self.losses[1] - loss) / (self.losses[1] - self.losses[0])


def read_figures(path: Path) -> list[Curve]:
    """The programs of a file of figures. Raises ValueError for what is none."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as problem:
        raise ValueError(f"{path}: not a file of figures ({problem})") from None
    if not rows or rows[0] != COLUMNS:
        raise ValueError(f"{path}: its first line must be {','.join(COLUMNS)}")
    programs: dict[str, list[tuple[float, float]]] = {}
    for i, row in enumerate(rows[1:], 2):
        name, texts = "".join(row[:1]), row[1:]
        values = [value for text in texts if (value := number(text)) is not None and 0 <= value < 1e12]
        if len(texts) != 4 or len(values) != 4:
            raise ValueError(f"{path}, line {i}: must be a name and four numbers from 0, as in x,390,25,4418,6.0716")
        programs.setdefault(name, []).append((values[2] / 1000, values[3]))
    if not programs:
        raise ValueError(f"{path}: no figures")
    others = iter(["other0", "other1", "other2", *["quiet"] * len(programs)])
    return [
        Curve(name, "ours" if name.startswith("this project") else next(others), sorted(points))
        for name, points in programs.items()
    ]


def read_folder(folder: Path) -> Curve:
    """The mean of a record's runs, of few validations only the end. Raises ValueError where there is none."""
    group = Group(read_runs([folder]))
    runs, gpus = group.counted, {len(run.gpus) or 1 for run in group.counted}
    if not runs or len(gpus) > 1 or len(group.steps()) > 1:
        raise ValueError(f"{folder}: must hold complete runs of one length on one number of GPUs")
    steps = [step for step in runs[0].losses if all(step in run.losses and step in run.times for run in runs)]
    points = [(max(gpus) * group.time_at(step), group.loss_at(step)) for step in steps]
    return Curve("this program", "ours", points if len(points) >= FEW else points[-1:])


def programs_svg(curves: list[Curve], target: float, note: str) -> str:
    """The curves, and in the empty corner the ends of the runs, enlarged and named."""
    times, losses = zip(*(curve.points[-1] for curve in curves), strict=True)
    low, high = min(*losses, target), max(*losses, target)
    spread, rise = max(times) - min(times) or 1.0, high - low or 0.01
    whole = Panel(56, 74, 764, 372, (0, 1.04 * max(times) or 1), (low - 0.1, max(1.85 * target, high + 1)))
    ends = Panel(
        *(404, 102, 414, 196),
        (min(times) - 0.12 * spread, max(times) + 0.12 * spread),
        (low - 0.9 * rise, high + 0.5 * rise),
    )
    lines = [
        *sheet(496, "Validation loss over GPU-seconds"),
        text(20, 28, "Validation loss over GPU-seconds of training", "ink", 'font-size="16" font-weight="bold"'),
        text(20, 49, note, "quiet"),
        *axes(whole, target),
        text(whole.left + 6, whole.y(target) - 6, f"target {target:g}", "ink"),
        text(whole.left + whole.width, 484, "GPU-seconds", "quiet", 'text-anchor="end"'),
        f'<clipPath id="whole"><rect {whole.size}/></clipPath><g clip-path="url(#whole)">',
    ]
    for curve in sorted(curves, key=lambda curve: curve.ink == "ours"):
        points = " ".join(f"{whole.x(time):.1f},{whole.y(loss):.1f}" for time, loss in curve.points)
        width = 2.6 if curve.ink == "ours" else 1.8
        lines.append(f'<polyline class="{curve.ink}-line" fill="none" stroke-width="{width}" points="{points}"/>')
        lines += [dot(whole, point, curve.ink, 2.5) for point in curve.points[:-1]]
        lines.append(dot(whole, curve.points[-1], curve.ink, 4.5))
    lines.append(f'</g><rect class="paper" x="{ends.left - 52}" y="70" width="488" height="258"/>')
    lines += [text(ends.left, 93, "at the end: GPU-seconds and loss", "quiet"), *axes(ends, target, frame=True)]
    lines += [dot(ends, curve.points[-1], curve.ink, 5) for curve in curves]
    lines += labels(ends, curves, target)
    return "\n".join([*lines, "</svg>", ""])


def sheet(height: int, title: str) -> list[str]:
    """The beginning of a picture 840 wide, on white paper, or on dark where the reader's is."""
    light, dark = ("".join(f".{k}{{fill:{v[i]}}}.{k}-line{{stroke:{v[i]}}}" for k, v in INKS.items()) for i in (0, 1))
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="840" height="{height}" viewBox="0 0 840 {height}" '
        'font-family="sans-serif" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{light}@media(prefers-color-scheme:dark){{{dark}}}</style>",
        f'<rect class="paper" width="840" height="{height}"/>',
    ]


def axes(panel: Panel, target: float, frame: bool = False) -> list[str]:
    """Grid, numbers and the target."""
    bottom, right, lines = panel.top + panel.height, panel.left + panel.width, []
    for time in ticks(*panel.times):
        lines.append(rule(panel.x(time), panel.top, panel.x(time), bottom, "grid"))
        lines.append(text(panel.x(time), bottom + 18, f"{time:g}", "quiet", 'font-size="12" text-anchor="middle"'))
    for loss in ticks(*panel.losses):
        lines.append(rule(panel.left, panel.y(loss), right, panel.y(loss), "grid"))
        lines.append(text(panel.left - 8, panel.y(loss) + 4, f"{loss:g}", "quiet", 'font-size="12" text-anchor="end"'))
    lines += [f'<rect class="quiet-line" fill="none" {panel.size}/>'] if frame else []
    return [*lines, rule(panel.left, panel.y(target), right, panel.y(target), "ink", ' stroke-dasharray="5 4"')]


def labels(panel: Panel, curves: list[Curve], target: float) -> list[str]:
    """Name, time and loss at each end, where neither another label nor an end nor the target's line stands.

    What this project's program did before is not named beside what it does now.
    """
    middles = [(panel.x(time), panel.y(loss)) for time, loss in (curve.points[-1] for curve in curves)]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in middles]
    taken.append((panel.left, panel.y(target) - 1, panel.left + panel.width, panel.y(target) + 1))
    ours = [i for i, curve in enumerate(curves) if curve.ink == "ours"]
    lines, right = [], panel.left + panel.width
    for i in ours[-1:] + [i for i in range(len(curves)) if i not in ours]:
        (x, y), (time, loss), name = middles[i], curves[i].points[-1], clean(curves[i].name.partition(" (")[0], 40)
        figures = f"{time:.1f} s, {loss:.4f}"
        width = max(7.5 * len(name), 6.7 * len(figures))
        spots = [(a, b) for b in (y - 17, y + 6, y - 40, y + 42) for a in (x + 10, x - 10 - width, right - 6 - width)]
        boxes = [(a, b, a + width, b + 34) for a, b in spots if panel.left < a and a + width < right]
        box = next((box for box in boxes if not any(overlap(box, other) for other in taken)), boxes[0])
        taken.append(box)
        lines.append(text(box[0], box[1] + 13, name, curves[i].ink, 'font-weight="bold"'))
        lines.append(text(box[0], box[1] + 30, figures, "ink"))
    return lines


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers between."""
    unit = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(unit * k for k in (5, 2, 1) if (high - low) / (unit * k) >= 4)
    return [round(i * step, 9) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def text(x: float, y: float, words: str, ink: str, more: str = "") -> str:
    return f'<text class="{ink}" x="{x:.1f}" y="{y:.1f}" {more}>{escape(clean(words))}</text>'


def rule(x0: float, y0: float, x1: float, y1: float, ink: str, more: str = "") -> str:
    return f'<line class="{ink}-line" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"{more}/>'


def dot(panel: Panel, point: tuple[float, float], ink: str, radius: float) -> str:
    x, y = panel.x(point[0]), panel.y(point[1])
    return f'<circle class="{ink} paper-line" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, metavar="FIGURES.csv")
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="this program's record")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.svg")
    parser.add_argument("--target", type=float, default=3.337, help="loss to mark (default %(default)s)")
    parser.add_argument("--note", default=NOTE, help="how it was measured, in a line")
    options = parser.parse_args(arguments)
    try:
        curves = read_figures(options.figures)
        if options.folder:
            curves.append(read_folder(options.folder))
        options.out.write_bytes(programs_svg(curves, options.target, options.note).encode())
    except (OSError, ValueError) as problem:
        said = f"{problem.filename}: {problem.strerror}" if isinstance(problem, OSError) else str(problem)
        print(f"picture.py: {clean(said, 300)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
