"""
Runs the program of a record again: its source stands in its logs.

    python records/rerun.py records/2026-11-27_SharedSpellings           # with the settings of its logs
    python records/rerun.py LOG --gpus 2 --run_id=again --seed=3         # on two GPUs, with settings of your own

Settings that are alike in all of the logs are used again unless they are given here; names of runs and folders,
checkpoints and resuming are not. The source goes to logs/sources/<digest>/train_gpt.py; data is looked for below
DATA_PATH, or in this repository. It is the log's program that runs: of a stranger's log, read it first.
"""

import argparse
import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from runlog import RECORDS, Run, clean, read_runs

ROOT = RECORDS.parent
OF_ONE_RUN = {"run_id", "log_dir", "resume", "checkpoint_every", "save_checkpoint"}


class Refusal(Exception):
    """Why nothing will run; one line."""


def logged_program(path: Path) -> tuple[str, list[Run]]:
    """The source in a log, or in all logs of a folder, and the logs. Raises Refusal."""
    if not path.exists():
        raise Refusal(f"{path}: no such log or folder")
    runs = [run for run in read_runs([path]) if run.source]
    if not runs:
        raise Refusal(f"{path}: no log with the source of its program in it")
    sources = {run.source.removesuffix("\n") for run in runs}  # the log has one line end more
    if len(sources) > 1:
        raise Refusal(f"{path}: logs of {len(sources)} different sources; name one of them: {runs[0].path}")
    return sources.pop(), runs


def logged_settings(runs: list[Run], but: set[str]) -> dict[str, str]:
    """What all of the logs were told alike, without `but` and what belongs to one run. Raises Refusal."""
    alike = set.intersection(*({*run.overrides.items()} for run in runs))
    settings = dict(item for item in runs[0].overrides.items() if item in alike and item[0] not in but | OF_ONE_RUN)
    if "preset" not in but and all(run.preset == "smoke" for run in runs):  # on a GPU it has to be said
        settings = {"preset": "smoke", **settings}
    if cut := [name for name, value in settings.items() if value.endswith("…")]:
        raise Refusal(f"{runs[0].path}: --{cut[0]} is too long to be taken from the log: give it")
    return {name: re.sub(r"^\((.*)\)$", r"\1", value) for name, value in settings.items()}  # a tuple as it is given


def named(arguments: list[str]) -> dict[str, str]:
    """`--name=value` by name. Raises Refusal."""
    for argument in arguments:
        if not re.match(r"--\w+(=|$)", argument):
            raise Refusal(f"argument {clean(argument)!r} is not of the form --name=value")
    return {name: value for name, _, value in (argument[2:].partition("=") for argument in arguments)}


def git(*arguments: str, given: bytes = b"") -> bytes:
    """What git prints for this repository; nothing where it fails or there is none."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], input=given, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""


def tools_of(program: bytes) -> dict[str, bytes]:
    """What a program's runs need of records/, by path; older ones have that in their source.

    As it was in the revision that brought this program; where git knows none, as after an edit, as it is today.
    """
    if b"import_tool(" not in program:
        return {}
    today = program == (ROOT / "train_gpt.py").read_bytes()
    blob = git("hash-object", "--stdin", given=program).decode().strip()
    revisions = [] if today else git("log", "--format=%h", f"--find-object={blob}").decode().split()
    names = [f"records/{tool}.py" for tool in ("checks", "guard", "logfile", "precompile")]
    if not revisions:
        return {name: (ROOT / name).read_bytes() for name in names}
    return {name: content for name in names if (content := git("show", f"{revisions[-1]}:{name}"))}


def place(source: str, folder: Path) -> Path:
    """Writes a source to folder/<digest>/train_gpt.py, whole or not at all, and returns that path.

    Beside it GPT-2's vocabulary, which a program looks for there if the data's folder lacks it, and its tools.
    """
    data, vocabulary = source.encode(errors="replace"), "data/gpt2.tiktoken"
    home = folder / hashlib.sha256(data).hexdigest()[:12]
    beside = {vocabulary: (ROOT / vocabulary).read_bytes(), **tools_of(data), "train_gpt.py": data}
    for name, content in beside.items():
        path = home / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(content)
            temporary.rename(path)
    return home / "train_gpt.py"


def command(program: Path, arguments: list[str], processes: int = 1) -> list[str]:
    """The program, by itself or several processes of it on this host."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    launcher = [*torchrun, f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(program), *arguments]


def environment(on_gpu: bool) -> dict[str, str]:
    """For a program that does not lie in this repository: where the data is, and what older ones lack on a CPU."""
    settings = {"DATA_PATH": str(ROOT)}
    if not on_gpu:  # threads that do not spin while they wait, memory that is not given back after each step
        settings |= {
            "OMP_WAIT_POLICY": "passive",
            "MALLOC_MMAP_THRESHOLD_": "1000000000",
            "MALLOC_TRIM_THRESHOLD_": "1000000000",
        }
    given = {name: value for name, value in os.environ.items() if value or name == "CUDA_VISIBLE_DEVICES"}
    return {**settings, **given}


def gpus_here() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, else all that nvidia-smi lists; without touching CUDA."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        try:
            query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
            listed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            listed = ""
    return [gpu for gpu in re.split(r"[,\s]+", listed) if gpu and gpu != "-1"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False  # --g... is the program's
    parser.add_argument("log", type=Path, metavar="FOLDER_OR_LOG")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes, a GPU each (default 1)")
    options, given = parser.parse_known_args(arguments)
    try:
        settings = named(given)
        source, runs = logged_program(options.log)
        reused = logged_settings(runs, {*settings})
        if options.gpus < 1:
            raise Refusal(f"--gpus {options.gpus}: 1 or more")
        program = place(source, ROOT / "logs" / "sources")
    except (Refusal, OSError) as problem:
        print(f"rerun.py: refused: {problem}", file=sys.stderr)
        return 1
    line = command(program, [*(f"--{name}={value}" for name, value in reused.items()), *given], options.gpus)
    print(f"rerun.py: {shlex.join(line)}", file=sys.stderr, flush=True)
    os.execve(line[0], line, environment(on_gpu=bool(gpus_here())))


if __name__ == "__main__":
    sys.exit(main())
