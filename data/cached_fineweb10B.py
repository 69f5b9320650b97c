"""Download FineWeb10B, ready tokenized, from the Hugging Face data set kjj0/fineweb10B-gpt2.

    python data/cached_fineweb10B.py [N]

gets the validation shard and the first N training shards (default 9, enough for a run; 1 to 103) of 100M tokens and
200 MB each into data/fineweb10B/ under the folder that the environment variable DATA_PATH names (default: the
repository). Each shard is checked; run again, it keeps what is there and valid and fetches the rest.
"""

import argparse
import contextlib
import errno
import os
import shutil
import sys
from pathlib import Path

from shards import HEADER_BYTES, TOKEN_BYTES, DataError, reason, root_cause, shard_problem

try:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import HfHubHTTPError
except ImportError:
    sys.exit("cached_fineweb10B.py: needs the package huggingface_hub; install it with: pip install huggingface_hub")

DATASET = "kjj0/fineweb10B-gpt2"
NUM_TRAIN_SHARDS = 103
SHARD_BYTES = HEADER_BYTES + TOKEN_BYTES * 100_000_000
REPOSITORY = Path(__file__).resolve().parent.parent


def train_shard_count(text: str) -> int:
    """The command line's N. Raises argparse.ArgumentTypeError unless it is a whole number from 1 to 103."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= NUM_TRAIN_SHARDS):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {NUM_TRAIN_SHARDS}, not {text!r}")
    return int(text)


def shard_names(num_train: int) -> list[str]:
    """The names of the validation shard and of the first `num_train` training shards."""
    return ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, num_train + 1))]


def probe(name: str) -> None:
    """Ask the hub for a file's size, once: without a network `hf_hub_download` would retry for half a minute."""
    with contextlib.suppress(HfHubHTTPError):  # an answer; hf_hub_download knows which ones are worth another try
        get_hf_file_metadata(hf_hub_url(DATASET, name, repo_type="dataset"), timeout=10)


def fetch(name: str, folder: Path) -> None:
    """Download one shard into `folder` and check it. Raises DataError if it comes out wrong twice."""
    path = folder / name
    for again in (False, True):
        path.unlink(missing_ok=True)  # left in place, the hub's client could take a bad file for an up-to-date one
        hf_hub_download(DATASET, name, repo_type="dataset", local_dir=folder, force_download=again)
        problem = shard_problem(path, check_ids=True)
        if problem is None:
            return
        path.unlink(missing_ok=True)
    raise DataError(f"{name} came out wrong twice and was deleted: {problem}; run the same command again later")


def explain(error: Exception, name: str, num_present: int, num_wanted: int, folder: Path) -> str:
    """One line for a failed download: what could not be reached or written, what is there already, what to do."""
    cause = root_cause(error)
    if isinstance(cause, OSError) and (cause.filename or cause.errno in (errno.ENOSPC, errno.EDQUOT)):
        return f"cannot write {folder / name}: {reason(cause)}"
    # The hub's answers are errors in its own words; anything else is best told by the operating system.
    why = reason(error if isinstance(error, HfHubHTTPError) else cause)
    return (
        f"could not get {hf_hub_url(DATASET, name, repo_type='dataset')} ({why}); {num_present} of {num_wanted} shards "
        f"are already in {folder}; run the same command again later, it resumes with the missing ones, or make a small "
        "sample offline with: python data/sample.py"
    )


def download(num_train: int, folder: Path) -> None:
    """Bring `folder` to the validation shard and `num_train` training shards. Raises DataError with one line."""
    names = shard_names(num_train)
    problems = {name: problem for name in names if (problem := shard_problem(folder / name)) is not None}
    missing = list(problems)
    print(f"{len(names) - len(missing)} of {len(names)} shards are already in {folder}")
    if not missing:
        return

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise DataError(f"cannot write to {folder}: no permission")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {reason(error)}") from None
    if free < SHARD_BYTES * len(missing):
        need = SHARD_BYTES * len(missing)
        raise DataError(f"{folder} has {free / 1e9:.1f} GB free, {len(missing)} shards need {need / 1e9:.1f} GB")

    for done, name in enumerate(missing):
        try:
            if done == 0:
                probe(name)
            old = "" if problems[name] == "missing" else f" anew, the file there is no good ({problems[name]})"
            print(f"[{done + 1}/{len(missing)}] fetching {name}{old}", flush=True)
            fetch(name, folder)  # shows huggingface_hub's progress bar, on a terminal only
        except DataError:
            raise
        except Exception as error:
            present = len(names) - len(missing) + done
            raise DataError(explain(error, name, present, len(names), folder)) from None
    print(f"all {len(names)} shards are in {folder}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "N", nargs="?", type=train_shard_count, default=9, help="training shards, 1 to 103 (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    folder = Path(os.environ.get("DATA_PATH") or REPOSITORY) / "data" / "fineweb10B"
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
