"""
Makes a record's folder from the logs of its runs: the logs, and a README with statistics, picture and the change.

    python records/submit.py NAME LOGS...          # records/<today>_<NAME>/
    python records/submit.py NAME races/hot        # of a race: its second contestant, or --contestant NAME

Of a race the record is the contestant's runs of the longest length, held against the first contestant's; the race's
report comes with them, and all of its logs in race.zip.

Refuses a name that exists, logs of different sources, and logs that are not whole runs. The folder appears whole or
not at all. Afterwards: write into its README why the change helps, and run `python records/report.py --history`.
"""

import argparse
import difflib
import json
import os
import re
import shutil
import sys
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZIP_DEFLATED, ZipFile

from picture import plot_losses
from report import as_markdown, comparison_lines
from runlog import (
    FOLDER,
    MAX_BYTES,
    RECORDS,
    REFERENCE,
    Group,
    Record,
    Run,
    clean,
    compare,
    judge,
    md,
    newest_alike,
    read_records,
    read_runs,
)

SHOWN_LINES = 400  # of a difference in the README; all of it is in change.diff


class Refusal(Exception):
    """Why there will be no folder; one line."""


def check(name: str, day: str, runs: list[Run], records: Path) -> None:
    """Raises Refusal."""
    if not FOLDER.fullmatch(f"{day}_{name}") or len(name) > 64:
        raise Refusal(f"name {clean(name)!r}, date {clean(day)!r}: letters, digits, _ . - (64 at most), and YYYY-MM-DD")
    taken = [p.name for p in records.iterdir() if p.name[11:].lower() == name.lower()] if records.is_dir() else []
    if taken:
        raise Refusal(f"the name is taken: {records / taken[0]}")
    broken = [f"{run.name}: {'; '.join(run.problems)}" for run in runs if not run.complete]
    if broken:
        raise Refusal("not whole runs, each once: " + " | ".join(broken))
    for run in runs[1:]:
        if run.source != runs[0].source:
            raise Refusal(f"{runs[0].name} and {run.name} were made by different sources: a record is one source")
        if run.total != runs[0].total:
            raise Refusal(f"{runs[0].name} has {runs[0].total} steps, {run.name} {run.total}: a record is one setting")


def file_names(runs: list[Run]) -> list[str]:
    """Names of the copies: the logs' own, made harmless, each different."""
    names: list[str] = []
    for run in runs:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", run.path.stem).strip("_")[:80] or "log"
        taken = {name.lower() for name in names}
        tries = (f"{stem}{(i and f'_{i}') or ''}.txt" for i in range(len(runs)))
        names.append(next(name for name in tries if name.lower() not in taken))
    return names


def difference(old: str, new: str) -> list[str]:
    """Unified diff of two sources, a printable line each."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "previous record", "this record", lineterm="")
    return [clean(line.replace("\t", "    "), 300) for line in lines]


def race_logs(race: Path, contestant: str) -> tuple[list[Path], Path | None]:
    """A contestant's logs of the longest length, and the first contestant's folder of that. Raises Refusal."""
    try:
        told = json.loads((race / "race.json").read_text())
        names, length = [c["name"] for c in told["contestants"]], f"{max(told['lengths']):g}"
    except (ValueError, KeyError, TypeError):
        raise Refusal(f"{race / 'race.json'}: not a race's") from None
    if not contestant and len(names) != 2:
        raise Refusal(f"{race}: which contestant? --contestant={' or '.join(names[1:] or names)}")
    contestant = contestant or names[1]
    if contestant not in names:
        raise Refusal(f"{race}: no contestant {clean(contestant)}; there are {', '.join(names)}")
    if not (race / "results.json").is_file():
        raise Refusal(f"{race}: the race is not over; its command goes on with it")
    first = race / "runs" / names[0] / length
    return [race / "runs" / contestant / length], first if contestant != names[0] else None


def add_race(race: Path, folder: Path) -> None:
    """The race's report, picture and figures, and every log of it."""
    for name, copy in (("README.md", "race.md"), ("results.json", "race.json"), ("race.png", "race.png")):
        shutil.copyfile(race / name, folder / copy)
    with ZipFile(folder / "race.zip", "w", ZIP_DEFLATED) as archive:
        for path in sorted((race / "runs").rglob("*.txt")):
            archive.write(path, path.relative_to(race))


def readme(name: str, day: str, group: Group, previous: Record | None, changed: list[str], race: str = "") -> str:
    reference = REFERENCE.read_text(errors="replace") if REFERENCE.is_file() else None
    against = ""
    lines = []
    if previous:
        lines = comparison_lines(group, previous.group, compare(group, previous.group))
        against = race or f"Previous record: [{md(previous.folder.name)}](../{previous.folder.name}/).\n\n"
    added, removed = (sum(line[0] == c for line in changed[2:] if line) for c in "+-")
    shown = changed[:SHOWN_LINES]
    fence = "`" * max(3, 1 + max((len(ticks) for line in shown for ticks in re.findall("`+", line)), default=0))
    if not previous:
        change = (
            f"There is no previous record of this setting ({md(str(group.setting()))}): the source is in the logs.\n"
        )
    elif not changed:
        change = "The source is that of the previous record.\n"
    else:
        cut = f" The first {SHOWN_LINES} lines of [change.diff](change.diff):" if len(changed) > SHOWN_LINES else ""
        change = f"{added} lines added, {removed} removed.{cut}\n\n{fence}diff\n" + "\n".join(shown) + f"\n{fence}\n"
    return (
        f"# {md(name)}\n\n{day}\n\n"
        "## What changed, and why it helps\n\n*To be written by whoever made the change.*\n\n"
        f"## Statistics\n\n{against}{as_markdown(group, judge(group, reference), lines)}\n\n"
        f"![Validation loss of the runs](loss.png)\n\n## Change of the source\n\n{change}"
    )


def submit(name: str, day: str, logs: list[Path], records: Path, previous: Path | None, contestant: str = "") -> Path:
    """Makes the folder and returns its path. Raises Refusal."""
    race, told = None, ""
    if len(logs) == 1 and (logs[0] / "race.json").is_file():
        race = logs[0]
        logs, first = race_logs(race, contestant)
        if first and not previous:
            previous, told = first, "Against the first contestant of [the race](race.md), run beside it.\n\n"
    runs = read_runs(logs)
    check(name, day, runs, records)
    group, final = Group(runs), records / f"{day}_{name}"
    if previous:
        before = Record(previous, "", "", Group(read_runs([previous])))
        if not before.group.counted:
            raise Refusal(f"{previous}: no complete run in it")
    else:
        before = newest_alike(read_records(records), group)
    changed = difference(before.group.counted[0].source, runs[0].source) if before else []
    records.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=records) as temporary:
        folder = Path(temporary) / final.name
        folder.mkdir()
        for run, file_name in zip(runs, file_names(runs), strict=True):
            with open(run.path, "rb") as log:
                (folder / file_name).write_bytes(log.read(MAX_BYTES))
        beside = previous.parent.name if told else before and before.folder.name  # a contestant's name
        plot_losses(folder / "loss.png", group, before and before.group, (final.name, beside))
        if len(changed) > SHOWN_LINES:
            (folder / "change.diff").write_text("\n".join(changed) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(readme(name, day, group, before, changed, told), encoding="utf-8")
        if race:
            add_race(race, folder)
        os.rename(folder, final)
    return final


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOGS")
    parser.add_argument("--date", default=date.today().isoformat(), help="default: today")
    newest = "default: the newest record of the same hardware, overrides and kind of length"
    parser.add_argument("--previous", type=Path, metavar="FOLDER", help=newest)
    parser.add_argument("--contestant", default="", metavar="NAME", help="of a race")
    parser.add_argument("--records", type=Path, default=RECORDS, help="where the record folders are")
    options = parser.parse_args(arguments)
    try:
        folder = submit(options.name, options.date, options.logs, options.records, options.previous, options.contestant)
    except (Refusal, OSError) as problem:
        print(f"submit.py: refused: {problem}", file=sys.stderr)
        return 1
    print(f"{folder}: now write into its README why the change helps, then: python records/report.py --history")
    return 0


if __name__ == "__main__":
    sys.exit(main())
