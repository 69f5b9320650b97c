"""Download FineWeb10B, ready tokenized, from the Hugging Face data set kjj0/fineweb10B-gpt2.

    python data/cached_fineweb10B.py [N]

gets the validation shard and the first N training shards (default 9, enough for a run; 1 to 103) of 100M tokens and
200 MB each into data/fineweb10B/ under the folder that the environment variable DATA_PATH names (default: the
repository). Each shard is checked; run again, it keeps what is there and valid and fetches the rest. Of two downloads
into one folder the second waits for the first, and then fetches what is still missing.
"""

import argparse
import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shards import HEADER_BYTES, TOKEN_BYTES, DataError, data_root, reason, root_cause, shard_problem, tell

try:
    from filelock import FileLock, Timeout  # huggingface_hub brings it
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import HfHubHTTPError
except ImportError:
    sys.exit("cached_fineweb10B.py: needs the package huggingface_hub; install it with: pip install huggingface_hub")

DATASET = "kjj0/fineweb10B-gpt2"
NUM_TRAIN_SHARDS = 103
SHARD_BYTES = HEADER_BYTES + TOKEN_BYTES * 100_000_000
PARTIAL = ".download."  # how the folders begin that hold shards in the making


def train_shard_count(text: str) -> int:
    """The command line's N. Raises argparse.ArgumentTypeError unless it is a whole number from 1 to 103."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= NUM_TRAIN_SHARDS):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {NUM_TRAIN_SHARDS}, not {text!r}")
    return int(text)


def shard_names(num_train: int) -> list[str]:
    """The names of the validation shard and of the first `num_train` training shards."""
    return ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, num_train + 1))]


def token_remedy() -> str:
    """How to take away the token that the hub's client sends; empty if it has none."""
    names = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
    return f"unset {' '.join(names)}" if names else "hf auth logout" if get_token() else ""


def is_refused(error: Exception) -> bool:
    """Whether the hub's answer is that one may not, or the token is none that could be sent at all."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    return status in (401, 403) or isinstance(error, UnicodeError)


def probe(name: str) -> dict[str, bool]:
    """Ask the hub for a file's size, once: without a network `hf_hub_download` would retry for half a minute.

    The hub refuses an expired token even for a public file. Returns what to call it with from now on: without a token
    if that helps; otherwise with the user's own, if any, which is allowed more requests.
    """

    def answer(**options) -> Exception | None:
        try:
            get_hf_file_metadata(hf_hub_url(DATASET, name, repo_type="dataset"), timeout=10, **options)
        except (HfHubHTTPError, UnicodeError) as error:
            return error

    remedy, error = token_remedy(), answer()
    if not (remedy and error and is_refused(error)):
        return {}  # other answers: hf_hub_download knows which ones are worth another try
    if (error := answer(token=False)) and is_refused(error):
        return {}
    tell(f"note: the hub refuses your token ({reason(error)}); {DATASET} is public, so this goes on without; {remedy}")
    return {"token": False}


def fetch(name: str, folder: Path, **options: bool) -> None:
    """Download one shard and move it into `folder` if it is sound. Raises DataError if it comes out wrong twice."""
    for again in (False, True):
        # In a folder of its own: other downloads and the old file, if any, stay untouched until there is a better one.
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder, ignore_cleanup_errors=True) as own:
            hf_hub_download(DATASET, name, repo_type="dataset", local_dir=own, force_download=again, **options)
            problem = shard_problem(Path(own, name), check_ids=True)
            if problem is None:
                os.replace(Path(own, name), folder / name)
                return
    raise DataError(f"{name} came out wrong twice and was deleted: {problem}; run the same command again later")


def explain(error: Exception, name: str, num_present: int, num_wanted: int, folder: Path) -> str:
    """One line for a failed download: what could not be reached or written, what is there already, what to do."""
    cause = root_cause(error)
    if isinstance(cause, OSError) and (cause.filename or cause.errno in (errno.ENOSPC, errno.EDQUOT)):
        return f"cannot write {folder / name}: {reason(cause)}"
    # The hub's answers are errors in its own words; anything else is best told by the operating system.
    why = reason(error if isinstance(error, HfHubHTTPError) else cause)
    advice = "run the same command again later, it resumes with the missing ones"
    if is_refused(error):
        advice = f"the data set {DATASET} is public and needs no token"
        if remedy := token_remedy():
            advice += f", but yours is refused (expired?); take it away with: {remedy}"
        if mirror := os.environ.get("HF_ENDPOINT"):
            advice += f"; HF_ENDPOINT={mirror} may be a mirror that wants another one: unset HF_ENDPOINT"
    return (
        f"could not get {hf_hub_url(DATASET, name, repo_type='dataset')} ({why}); {num_present} of {num_wanted} shards "
        f"are already in {folder}; {advice}, or make a small sample offline with: python data/sample.py"
    )


def partial_downloads(folder: Path) -> list[Path]:
    """What downloads that were killed have left in `folder`, this script's and older ones' of the hub's client."""
    return [*folder.glob(f"{PARTIAL}*/"), *folder.glob(".cache/huggingface/")]


def clear(folder: Path) -> None:
    """Delete partial downloads; only while no other process can be at work on one."""
    for path in partial_downloads(folder):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other downloads into `folder` waiting, and begin without what killed ones have left."""
    lock = FileLock(folder / ".lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell(f"waiting for another download into {folder}")
            lock.acquire()
        clear(folder)
    except (OSError, NotImplementedError):  # a file system without locks: at worst both fetch the same
        pass
    try:
        yield
    finally:
        lock.release()


def download(num_train: int, folder: Path) -> None:
    """Bring `folder` to the validation shard and `num_train` training shards. Raises DataError with one line."""
    names = shard_names(num_train)
    present = [name for name in names if shard_problem(folder / name) is None]
    tell(f"{len(present)} of {len(names)} shards are already in {folder}")
    if len(present) == len(names):
        if partial_downloads(folder):
            with contextlib.suppress(Timeout, OSError, NotImplementedError), FileLock(folder / ".lock", timeout=0):
                clear(folder)
        return

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise DataError(f"cannot write to {folder}: no permission")
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {reason(error)}") from None
    with alone(folder):
        fetch_missing(names, folder)
    tell(f"all {len(names)} shards are in {folder}")


def fetch_missing(names: list[str], folder: Path) -> None:
    """Fetch those of these shards that are not soundly in `folder`. Raises DataError with one line."""
    problems = {name: problem for name in names if (problem := shard_problem(folder / name)) is not None}
    missing, need = list(problems), SHARD_BYTES * len(problems)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise DataError(f"{folder} has {free / 1e9:.1f} GB free, {len(missing)} shards need {need / 1e9:.1f} GB")
    options = {}
    for done, name in enumerate(missing):
        try:
            if done == 0:
                options = probe(name) or {}
            old = "" if problems[name] == "missing" else f" anew, the file there is no good ({problems[name]})"
            tell(f"[{done + 1}/{len(missing)}] fetching {name}{old}")
            fetch(name, folder, **options)  # shows huggingface_hub's progress bar, on a terminal only
        except DataError:
            raise
        except Exception as error:
            present = len(names) - len(missing) + done
            raise DataError(explain(error, name, present, len(names), folder)) from None


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "N", nargs="?", type=train_shard_count, default=9, help="training shards, 1 to 103 (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    folder = data_root() / "data" / "fineweb10B"
    try:
        download(args.N, folder)
    except DataError as error:
        print(f"cached_fineweb10B.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cached_fineweb10B.py: interrupted; finished shards are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
