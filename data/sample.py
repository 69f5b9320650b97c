"""Make a small data set offline, from English text that every Python installation ships.

    python data/sample.py [--out DIR]

turns pydoc's topics and the docstrings of the standard library into shards sample_val_000000.bin and
sample_train_000001.bin, ..., by default in data/sample/, under DATA_PATH if that is set: over 1M training and over
131,072 validation tokens, enough to try training and to run the tests, too little to learn from. One token is one byte:
GPT-2's vocabulary begins with the 256 single bytes, and so no package has to encode. The same Python installation
always gives the same shards.
"""

import argparse
import ast
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from shards import BOS, DataError, data_root, home_path, read_shard, reason, shard_problem, tell, write_shard

MIN_DOCUMENT_BYTES = 200
VAL_EVERY = 8  # every 8th document is for validation
MIN_TRAIN_TOKENS = 1_000_000
MIN_VAL_TOKENS = 131_072
NUM_TRAIN_SHARDS = 3  # several, so that the step from one shard to the next is exercised too
# Not in every installation, or not the standard library's own text.
SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}


def gpt2_byte_ids() -> np.ndarray:
    """GPT-2's token id of each byte, uint16 of shape (256,).

    GPT-2 numbers the bytes that print in Latin-1 first, then the others, both in increasing order (Radford et al.
    2019, `bytes_to_unicode` of the released encoder).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sorted(set(range(256)) - set(printable))
    ids = np.empty(256, dtype=np.uint16)
    ids[printable + others] = np.arange(256)
    return ids


def parse(path: Path) -> ast.Module | None:
    """The syntax tree of a Python file, or None if this Python cannot read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like in other people's files
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def pydoc_topics(library: Path) -> Iterator[str]:
    """The texts that `help("topics")` lists, in the order of their file, read without importing it."""
    tree = parse(library / "pydoc_data" / "topics.py")
    for statement in tree.body if tree else ():
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            yield from ast.literal_eval(statement.value).values()


def docstrings(library: Path) -> Iterator[str]:
    """The docstrings of all modules, classes and functions under `library`, file by file in sorted order."""
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        for file in sorted(files):
            tree = parse(Path(folder, file)) if file.endswith(".py") else None
            for node in ast.walk(tree) if tree else ():
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield ast.get_docstring(node) or ""


def documents(library: Path) -> list[bytes]:
    """The sample's documents in UTF-8, each one once, without those too short to be text."""
    texts = (text.strip().encode() for source in (pydoc_topics, docstrings) for text in source(library))
    return list(dict.fromkeys(text for text in texts if len(text) >= MIN_DOCUMENT_BYTES))


def tokenize(documents: list[bytes]) -> np.ndarray:
    """BOS and the bytes' ids of each document, one after the other, uint16 of shape (tokens,)."""
    ids, bos = gpt2_byte_ids(), np.array([BOS], dtype=np.uint16)
    return np.concatenate([part for text in documents for part in (bos, ids[np.frombuffer(text, dtype=np.uint8)])])


def split_shards(documents: list[bytes], limit: float) -> Iterator[list[bytes]]:
    """Deal whole documents in order to shards that end as soon as they have `limit` tokens; only the last has fewer."""
    shard, size = [], 0
    for text in documents:
        shard.append(text)
        size += 1 + len(text)
        if size >= limit:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def sample_shards(library: Path) -> dict[str, np.ndarray]:
    """The sample as {file name: tokens}. Raises DataError if this Python installation ships too little text."""
    texts = documents(library)
    val = texts[VAL_EVERY - 1 :: VAL_EVERY]
    train = [text for i, text in enumerate(texts) if i % VAL_EVERY != VAL_EVERY - 1]
    num_train, num_val = (sum(1 + len(text) for text in part) for part in (train, val))
    if num_train < MIN_TRAIN_TOKENS or num_val < MIN_VAL_TOKENS:
        raise DataError(
            f"{library} has text for only {num_train} training and {num_val} validation tokens, and "
            f"{MIN_TRAIN_TOKENS} and {MIN_VAL_TOKENS} are needed; use a full Python installation, with its .py files"
        )
    shards = {"sample_val_000000.bin": tokenize(val)}
    for i, part in enumerate(split_shards(train, num_train / NUM_TRAIN_SHARDS), start=1):
        shards[f"sample_train_{i:06d}.bin"] = tokenize(part)
    return shards


def write_sample(shards: dict[str, np.ndarray], folder: Path) -> None:
    """Make `folder` hold these sample shards and no others; those that are there and the same stay untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("sample_*.bin"):
        if path.name not in shards:  # left by another Python version; training would read it too
            path.unlink()
    for name, tokens in shards.items():
        path = folder / name
        same = shard_problem(path) is None and np.array_equal(read_shard(path), tokens)
        if not same:
            write_shard(path, tokens)
        tell(f"{path}: {len(tokens):,} tokens{', already there' if same else ''}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = data_root() / "data" / "sample"
    parser.add_argument(
        "--out", metavar="DIR", type=home_path, default=default, help="output folder (default: %(default)s)"
    )
    folder = parser.parse_args(argv).out
    try:
        write_sample(sample_shards(Path(sysconfig.get_path("stdlib"))), folder)
    except DataError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"sample.py: cannot write to {folder}: {reason(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
