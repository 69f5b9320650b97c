"""
From a handful of logs to a claim: statistics, the rules one by one, and a verdict.

    python records/report.py logs/                                   # a folder, or logs
    python records/report.py logs/a*.txt --baseline records/2026-01-30_Name --plot runs.png
    python records/report.py logs/ --markdown                        # tables for a README; --json for programs
    python records/report.py --history                               # writes records/README.md and history.svg
    python records/report.py --history --check                       # exit status 1 if they are not current
"""

import argparse
import json
import math
import sys
from pathlib import Path

from runlog import (
    RECORDS,
    REFERENCE,
    TARGET,
    Comparison,
    Group,
    Record,
    Rule,
    Run,
    Stats,
    clean,
    compare,
    exit_with,
    judge,
    md,
    newest_alike,
    p_text,
    read_records,
    read_runs,
    verdict,
)

MARKS = {True: "holds", False: "BROKEN", None: "unknown"}


def run_rows(group: Group) -> list[list[str]]:
    """A table of the runs: heading, then a row a run."""
    rows = [["run", "steps", "final loss", "time (s)", "peak memory (MiB)", ""]]
    for run in group.runs:
        done = f"{run.step}" if run.step == run.total else f"{run.step} of {run.total}"
        figures = [as_logged(run.loss), f"{run.seconds:.3f}"] if run.complete else ["-", "-"]
        remarks = [f"{'not a whole run: ' * bool(run.problems)}{'; '.join(run.problems)}"] if run.problems else []
        rows.append([run.name, done, *figures, str(run.peak[0]) if run.peak else "-", "; ".join(remarks + run.notes)])
    return rows


def summary(group: Group) -> list[tuple[str, str]]:
    """Name and text of every statistic."""
    stages = group.stage_ms()
    peaks = [run.peak for run in group.counted if run.peak]
    return [
        ("runs", f"{len(group.counted)} complete of {len(group.runs)}"),
        ("loss", f"{spread(group.loss)}; p = {p_text(group.p)} (one-sided t-test against {group.target:g})"),
        ("time (s)", spread(group.time)),
        ("ms a step", ", ".join(f"{name} {ms.mean:.2f}" for name, ms in stages.items()) or "by stage: unknown"),
        ("peak memory", memory(max(peaks, key=lambda peak: peak[0])) if peaks else "unknown"),
        ("hardware", clean("; ".join(group.each("hardware"))) or "unknown"),
        ("versions", clean("; ".join(group.each("software"))) or "unknown"),
    ]


def as_logged(loss: float) -> str:
    """Four decimals, or more if the log has more."""
    return f"{loss:.{min(max(len(str(loss).partition('.')[2]), 4), 6)}f}"


def memory(peak: tuple[int, int | None]) -> str:
    return f"{peak[0]} MiB allocated" + (f", {peak[1]} reserved" if peak[1] else "")


def spread(s: Stats) -> str:
    if not s.n:
        return "no complete run"
    return f"mean {s.mean:.4f}, std {s.std:.4f}" if s.n > 1 else f"{s.mean:.4f} (one run)"


def comparison_lines(new: Group, old: Group, c: Comparison) -> list[tuple[str, str]]:
    """Name and text of every line of a comparison."""
    if not (new.counted and old.counted):
        return [("baseline", "nothing to compare: no complete run on one side")]
    direction = "faster" if c.time < 0 else "slower"
    lines = [
        (
            "baseline",
            f"loss {spread(old.loss)}; time (s) {spread(old.time)}; {len(old.counted)} of {len(old.runs)} runs",
        ),
        ("loss", f"{c.loss:+.4f} ± {error(c.loss_error, 4)}"),
        ("time (s)", f"{c.time:+.4f} ± {error(c.time_error, 4)}: {abs(c.time):.2f} s {direction}"),
    ]
    if c.steps is None:
        lines.append(("at equal loss", "unknown: no validation in the second half to take the slope from"))
    else:
        word = "fewer" if c.steps >= 0 else "more"
        text = f"about {abs(c.steps):.1f} steps {word} ({abs(c.steps_seconds):.2f} s), by the slope at the runs' end"
        lines.append(("at equal loss", text))
    return lines + [("beware", warning) for warning in c.warnings]


def error(value: float, digits: int) -> str:
    return "unknown" if math.isnan(value) else f"{value:.{digits}f}"


def as_text(group: Group, rules: list[Rule], lines: list[tuple[str, str]]) -> str:
    out = [aligned(run_rows(group))]
    out += ["", *(f"{name:13} {text}" for name, text in summary(group))]
    out += ["", *(f"{MARKS[rule.holds]:8} {rule.name}: {rule.detail}" for rule in rules)]
    out += ["", verdict(group, rules)]
    out += ["", *(f"{name:13} {text}" for name, text in lines)] if lines else []
    return "\n".join(out)


def as_markdown(group: Group, rules: list[Rule], lines: list[tuple[str, str]]) -> str:
    out = [table(run_rows(group)), "", table([["", ""], *map(list, summary(group))]), ""]
    out += [table([["", "rule", ""], *([MARKS[r.holds], r.name, r.detail] for r in rules)]), ""]
    out += [md(verdict(group, rules))]
    out += ["", table([["against the baseline", ""], *map(list, lines)])] if lines else []
    return "\n".join(out)


def aligned(rows: list[list[str]]) -> str:
    """A table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def table(rows: list[list[str]]) -> str:
    """A markdown table of plain texts."""
    head, *body = ["| " + " | ".join(map(md, row)) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def as_json(group: Group, rules: list[Rule], comparison: Comparison | None, old: Group | None) -> str:
    data = {
        "target": group.target,
        "runs": [run_data(run) for run in group.runs],
        "statistics": group_data(group),
        "rules": [rule._asdict() for rule in rules],
        "verdict": verdict(group, rules),
        "baseline": old and group_data(old),
        "comparison": comparison and comparison._asdict(),
    }
    return json.dumps(finite(data), indent=2, allow_nan=False)


def run_data(run: Run) -> dict:
    return {
        "file": run.name,
        "complete": run.complete,
        "problems": run.problems,
        "notes": run.notes,
        "steps": run.step,
        "total_steps": run.total,
        "loss": run.loss if run.complete else None,
        "seconds": run.seconds if run.complete else None,
        "validations": {
            step: [loss, run.times[step] / 1000 if step in run.times else None] for step, loss in run.losses.items()
        },
        "untimed_steps": run.untimed,
        "stage_ms": run.stage_ms(),
        "peak_memory_mib": run.peak,
        "gpus": run.gpus,
        "versions": run.versions,
        "overrides": run.overrides,
    }


def group_data(group: Group) -> dict:
    return {
        "complete_runs": len(group.counted),
        "loss": group.loss._asdict(),
        "p": group.p,
        "seconds": group.time._asdict(),
        "stage_ms": {name: ms._asdict() for name, ms in group.stage_ms().items()},
    }


def finite(value):
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ======================================================================================================================
# History
# ======================================================================================================================

INTRODUCTION = """# Records

Generated by `python records/report.py --history`; do not edit. The rules stand in the project's README; `submit.py`
makes a folder from logs, `report.py` says what logs show. Times are training times in seconds, "the one before" is the
newest of the same setting (hardware, overrides, validation data, about as many steps), losses are mean final validation
losses, ± is the sample standard deviation, p is the one-sided t-test's against 3.28. Runs on other hardware than 8
H100s, or on other data, are no records of the speedrun; the column "rules" says so.

![Training time of the records](history.svg)

"""


def history(records: list[Record]) -> str:
    """records/README.md."""
    rows = ["| date | record | time | against the one before | loss | runs | p | steps | hardware | rules |"]
    rows.append("|" + " --- |" * 10)
    for i, record in enumerate(records):
        group, link = record.group, f"[{md(record.name)}]({record.folder.name}/)"
        if not group.counted:
            rows.append(f"| {record.date} | {link} | no complete run |" + " |" * 7)
            continue
        hardware, before = "; ".join(group.each("hardware")), newest_alike(records[:i], group)
        change = f"{group.time.mean - before.group.time.mean:+.2f}" if before else ""
        # The data section is left out: today's source may differ from the day's.
        broken = [rule.called for rule in judge(group) if rule.holds is False]
        cells = [change, pm(group.loss, 4), str(len(group.counted)), p_text(group.p)]
        cells += [", ".join(map(str, group.steps())), md(hardware), md("no: " + ", ".join(broken)) if broken else "yes"]
        rows.append(f"| {record.date} | {link} | {pm(group.time, 2)} | " + " | ".join(cells) + " |")
    if not records:
        rows.append("| | none yet |" + " |" * 8)
    return INTRODUCTION + "\n".join(rows) + "\n"


def pm(s: Stats, digits: int) -> str:
    return f"{s.mean:.{digits}f}" + (f" ± {s.std:.{digits}f}" if s.n > 1 else "")


def write_history(records: Path, check: bool) -> int:
    """Writes README.md and history.svg, or with `check` compares. Returns the exit status."""
    from picture import history_svg

    if not records.is_dir():
        print(f"--records {clean(str(records))}: no such folder; the record folders lie in records/", file=sys.stderr)
        return 2
    found = read_records(records)
    stale = []
    for name, text in (("README.md", history(found)), ("history.svg", history_svg(found))):
        path = records / name
        if not path.is_file() or path.read_bytes() != text.encode():
            stale.append(name)
            try:
                if not check:
                    path.write_bytes(text.encode())
            except OSError as problem:
                sys.exit(f"{clean(str(path))}: cannot write ({problem.strerror})")
    if check and stale:
        print(f"{' and '.join(stale)} not current: run python records/report.py --history", file=sys.stderr)
        return 1
    print(f"{len(found)} records; " + (f"wrote {' and '.join(stale)}" if stale else "current"))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", type=Path, metavar="FOLDER_OR_LOGS")
    parser.add_argument("--target", type=float, default=TARGET, help="loss to be below (default %(default)s)")
    parser.add_argument("--baseline", type=Path, metavar="FOLDER", help="compare with the logs there")
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="source with the right data section")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="loss against time and step; .png or .svg")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true")
    form.add_argument("--json", action="store_true")
    form.add_argument("--history", action="store_true", help="write README.md and history.svg of the record folders")
    parser.add_argument("--check", action="store_true", help="with --history: compare instead of writing")
    parser.add_argument("--records", type=Path, default=RECORDS, help="where the record folders are")
    options = parser.parse_args(arguments)
    if options.history:
        return write_history(options.records, options.check)
    if not options.logs:
        parser.error("which logs? give a folder or files")
    for name in ("baseline", "reference"):
        if (path := getattr(options, name)) and not path.exists() and path != REFERENCE:
            parser.error(f"--{name} {clean(str(path))}: no such file or folder")
    if options.plot and options.plot.suffix not in (".png", ".svg"):
        parser.error(f"--plot {options.plot}: the name must end in .png or .svg")
    group = Group(read_runs(options.logs), options.target)
    old = Group(read_runs([options.baseline]), options.target) if options.baseline else None
    reference = options.reference.read_text(errors="replace") if options.reference.is_file() else None
    rules = judge(group, reference)
    comparison = compare(group, old) if old else None
    if options.json:
        print(as_json(group, rules, comparison, old))
    else:
        lines = comparison_lines(group, old, comparison) if old else []
        print((as_markdown if options.markdown else as_text)(group, rules, lines))
    if options.plot:
        plot(options, group, old)
    return 0 if group.counted else 1


def plot(options: argparse.Namespace, group: Group, old: Group | None) -> None:
    """The picture; without --baseline the newest record of the same setting stands beside the runs, if there is one."""
    from picture import plot_losses

    name = options.baseline.resolve().name if options.baseline else ""
    if not old:
        record = newest_alike(read_records(options.records), group)
        old, name = (record.group, record.folder.name) if record else (None, "")
        beside = f"beside {clean(name)}" if record else "alone: there is no other record"
        print(f"{clean(str(options.plot))}: drawn {beside} of this setting ({group.setting()})", file=sys.stderr)
    names = (options.logs[0].resolve().stem if len(options.logs) == 1 else "runs", name)
    try:
        plot_losses(options.plot, group, old, names)
    except OSError as problem:
        sys.exit(f"{options.plot}: cannot write ({problem.strerror})")


if __name__ == "__main__":
    exit_with(main)
