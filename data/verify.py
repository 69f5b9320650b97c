"""Check a folder of token shards before hours are spent on it.

    python data/verify.py FOLDER [--write] [--vocab_size 50257] [--bos 50256]

reads every `*.bin` in FOLDER: header, length, every token id, and how documents lie in it - their number, their mean
and longest length, and whether the shard begins with one. The first shard of a set must have a document's beginning,
--bos; the next ones may lie inside a document that is longer than a shard. If FOLDER has a file SHA256SUMS, as
`sha256sum *.bin` prints it, each shard must have its sum and each sum its shard; --write makes that file, from shards
in which nothing is wrong. One line a shard, then one that sums up; the exit status is 1 if anything is wrong.
"""

import argparse
import contextlib
import hashlib
import os
import re
import sys
from pathlib import Path

import numpy as np
from shards import BOS, VOCAB_SIZE, DataError, home_path, read_shard, reason, shard_problem, tell

SUMS = "SHA256SUMS"
SUMS_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]{1,255})")  # a name, never a path
MAX_SUMS_BYTES = 1 << 20


def read_sums(folder: Path) -> dict[str, str] | None:
    """Checksum by name, or None if the folder has no such file. Raises DataError for lines that are none."""
    path = folder / SUMS
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SUMS_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: unreadable: {reason(error)}") from None
    if len(data) > MAX_SUMS_BYTES:
        raise DataError(f"{path}: larger than {MAX_SUMS_BYTES} bytes, not a list of checksums")
    sums = {}
    for number, line in enumerate(data.splitlines(), start=1):  # of bytes: a name may hold other kinds of line ends
        match = SUMS_LINE.fullmatch(os.fsdecode(line))
        if not match:
            raise DataError(f"{path}:{number}: not a line of sha256sum")
        sums[match[2]] = match[1]
    return sums


def sha256(path: Path) -> str:
    """Of a file, in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_of(path: Path) -> str:
    """The name that the shards of one set have in common."""
    return re.sub(r"\d+\.bin$", "", path.name)


def document_facts(path: Path, bos: int, goes_on: bool) -> tuple[str | None, str]:
    """What is wrong with how documents lie in a sound shard (or None), and what to tell about it.

    A shard without the beginning of any document is right only where it goes on with one of the shard before.
    """
    tokens = read_shard(path)
    starts = np.flatnonzero(tokens == bos)
    if not len(starts):
        if goes_on:
            return None, f"{len(tokens):,} tokens, all of a document that began in a shard before"
        return f"0 documents in {len(tokens):,} tokens: they must begin with {bos}", ""
    lengths = np.diff(starts, append=len(tokens))
    first = "" if starts[0] == 0 else f"; goes on with {starts[0]:,} tokens of the shard before"
    size = f"mean {lengths.mean():.0f}, longest {lengths.max():,}"
    return None, f"{len(tokens):,} tokens, {len(starts):,} documents, {size}{first}"


def verify(folder: Path, write: bool = False, vocab_size: int = VOCAB_SIZE, bos: int = BOS) -> int:
    """Prints what the shards of the folder are; returns how many things are wrong. Raises DataError and OSError."""
    paths = sorted(folder.glob("*.bin"))
    if not paths:
        raise DataError(f"{folder}: no shards (*.bin) there")
    sums = None if write else read_sums(folder)
    found, wrong, sound_set = {}, 0, None
    for path in paths:
        problem, facts = shard_problem(path, check_ids=True, vocab_size=vocab_size), ""
        if problem is None:
            problem, facts = document_facts(path, bos, goes_on=set_of(path) == sound_set)
        sound_set = set_of(path) if problem is None else None
        if problem is None and (write or sums is not None):
            found[path.name] = sha256(path)
            if sums is not None and sums.get(path.name) != found[path.name]:
                problem = f"its checksum is not the one in {SUMS}" if path.name in sums else f"not listed in {SUMS}"
        wrong += problem is not None
        tell(f"{path.name}: {f'WRONG: {problem}' if problem else facts}")
    for name in sorted((sums or {}).keys() - {path.name for path in paths}):
        wrong += 1
        tell(f"{name!r}: WRONG: listed in {SUMS}, not there")
    if write and not wrong:
        temporary = folder / f".{SUMS}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(os.fsencode("".join(f"{digest}  {name}\n" for name, digest in found.items())))
            os.replace(temporary, folder / SUMS)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    checked = f"checksums {'written' if write else 'checked'}" if found else f"no {SUMS}"
    tell(f"{len(paths)} shards, " + (f"{wrong} things wrong" if wrong else f"nothing wrong; {checked}"))
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=home_path)
    parser.add_argument("--write", action="store_true", help=f"write {SUMS} anew")
    parser.add_argument("--vocab_size", type=int, default=VOCAB_SIZE, help="tokens there are (default: GPT-2's)")
    parser.add_argument("--bos", type=int, default=BOS, help="the token that documents begin with (default: GPT-2's)")
    args = parser.parse_args(argv)
    try:
        return 1 if verify(args.folder, args.write, args.vocab_size, args.bos) else 0
    except DataError as error:
        print(f"verify.py: {error}", file=sys.stderr)
    except OSError as error:
        print(f"verify.py: {error.filename or args.folder}: {reason(error)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
