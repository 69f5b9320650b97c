"""
Follows a running log in a terminal, against the previous record of the same setting at the same step.

    python records/watch.py                    # the newest log in logs/
    python records/watch.py logs/ID.txt --against records/2026-01-30_Name
    python records/watch.py LOG --once         # one line on where the run is

On a terminal the line is rewritten in place; elsewhere a line comes with every validation. It ends with the run.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

from runlog import RECORDS, Group, Record, Run, clean, newest_alike, read_records, read_run, read_runs


class Against(NamedTuple):
    """What a run is compared with: the logs that were named, or the newest record of its setting."""

    named: Group | None
    records: list[Record]

    def status(self, run: Run) -> str:
        """A line on the run; it says if there are records, but none to compare with."""
        if self.named or not run.times or not self.records:
            return status(run, self.named)
        record = newest_alike(self.records, Group([run]))
        return status(run, record.group) if record else f"{status(run, None)} | no record of this setting"


def status(run: Run, old: Group | None) -> str:
    """One line: stage, step, loss so far, pace, time left, and how it stands against the record."""
    if not run.times:
        return f"{run.name}: no steps yet (compiling, or not a log: {'; '.join(run.problems)})"
    step, seconds = run.step, run.times[run.step] / 1000
    parts = [f"step {step}/{run.total}", f"{seconds:.1f} s"]
    if stage := run.stage(step):
        parts.insert(0, stage)
    if run.losses:
        last = max(run.losses)
        parts.append(f"loss {run.losses[last]:.4f}" + (f" at {last}" if last != step else ""))
    if step < run.total:
        left = time_left(run, old)
        pace = recent_ms(run)
        parts.append(f"{pace:.1f} ms a step" if pace else "")
        parts.append(f"{left:.0f} s left" if left is not None else "")
    return " | ".join(part for part in [*parts, against(run, old), trouble(run)] if part)


def trouble(run: Run) -> str:
    """Problems other than that the run is not over."""
    return "; ".join(p for p in run.problems if not p.startswith(("cut off", "no final validation")))


def recent_ms(run: Run) -> float | None:
    """Milliseconds a step over about the last 20 steps that the log has, within the stage."""
    begin = max([start for start, _ in run.stages().values() if start < run.step], default=0)
    steps = [step for step in run.times if begin <= step < run.step and step >= run.step - 20]
    steps = steps or [step for step in run.times if step < run.step][-1:]
    return (run.times[run.step] - run.times[steps[0]]) / (run.step - steps[0]) if steps else None


def time_left(run: Run, old: Group | None) -> float | None:
    """Seconds: the record's rest at this part of its way, times how fast we are against it; else by the pace."""
    if old and old.counted:
        total = old.counted[0].total
        there = old.time_at(run.step * total / run.total)
        if there and there > 1:
            return (old.time.mean - there) * run.times[run.step] / 1000 / there
    pace = recent_ms(run)
    return pace * (run.total - run.step) / 1000 if pace else None


def against(run: Run, old: Group | None) -> str:
    """Seconds ahead or behind and loss above or below, each at the newest step where both are known."""
    if not (old and old.counted):
        return ""
    parts = []
    there = old.time_at(run.step)
    if there is not None:
        ahead = there - run.times[run.step] / 1000
        parts.append(f"{abs(ahead):.2f} s {'ahead' if ahead >= 0 else 'behind'}")
    common = [step for step in run.losses if old.loss_at(step) is not None]
    if common:
        above = run.losses[common[-1]] - old.loss_at(common[-1])
        exact = all(common[-1] in other.losses for other in old.counted)
        about = "" if exact else "about "
        parts.append(f"loss {about}{abs(above):.4f} {'above' if above > 0 else 'below'} at {common[-1]}")
    return "record: " + ", ".join(parts) if parts else "record: has no figures at this step"


def follow(path: Path, against: Against, interval: float, patience: float) -> int:
    """Prints until the run is over (0), or nothing has come for `patience` seconds (1)."""
    terminal = sys.stdout.isatty()
    size, quiet, shown = -1, time.monotonic(), None
    while True:
        now = path.stat().st_size if path.is_file() else 0
        if now != size:
            size, quiet, run = now, time.monotonic(), read_run(path)
            line = against.status(run)
            over = (run.total > 0 and run.total in run.losses) or any("error" in p for p in run.problems)
            if terminal:
                columns = shutil.get_terminal_size().columns - 1
                print("\r\x1b[K" + clean(line, max(columns, 20)), end="\n" if over else "", flush=True)
            elif over or len(run.losses) != shown:
                shown = len(run.losses)
                print(line, flush=True)
            if over:
                return 0
        if time.monotonic() - quiet > patience:
            print(f"{clean(str(path))}: nothing new for {patience:.0f} s", file=sys.stderr)
            return 1
        time.sleep(interval)


def newest_log(folder: Path) -> Path | None:
    logs = (path for path in folder.glob("*.txt") if path.is_file())
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", nargs="?", type=Path, default=Path("logs"), help="a log, or a folder: its newest")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="default: the newest record of its setting")
    parser.add_argument("--once", action="store_true", help="print where the run is, and end")
    parser.add_argument("--interval", type=float, default=0.5, metavar="S", help="seconds between looks")
    parser.add_argument(
        "--patience", type=float, default=1800, metavar="S", help="end when nothing new comes for so long"
    )
    parser.add_argument("--records", type=Path, default=RECORDS, help="where the record folders are")
    options = parser.parse_args(arguments)
    path = newest_log(options.log) if options.log.is_dir() else options.log
    if path is None:
        parser.error(f"{options.log}: no logs in this folder")
    if options.against:
        against = Against(Group(read_runs([options.against])), [])
        if not against.named.counted:
            parser.error(f"{options.against}: no complete run to compare with")
    else:
        against = Against(None, read_records(options.records))
    if options.once:
        print(against.status(read_run(path)))
        return 0
    try:
        return follow(path, against, options.interval, options.patience)
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal need not know every letter of a log
    sys.exit(main())
