"""Token shards: the file format of the training data, shared by the scripts in this folder.

A shard `NAME.bin` is a header of 256 little-endian int32 - magic number 20240520, version 1, number of tokens, zeros -
followed by that many little-endian uint16 token ids, of GPT-2's vocabulary unless told otherwise. Every document begins
with `BOS`. train_gpt.py has its own reader, because it has to stay a single file.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import TextIO

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
BOS = 50256  # <|endoftext|>, the first token of every document
VOCAB_SIZE = 50257
MAX_TOKENS = 2**31 - 1  # the header counts in int32

# How files begin that are often found in a shard's place, and what to call them.
IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<", "an HTML or XML page, such as a server's error page"),
    (b"{", "a JSON text, such as a server's error message"),
    (b"\x1f\x8b", "a gzip file"),
)


class DataError(Exception):
    """What a data script cannot do, in one line for the person who ran it."""


def home_path(text: str | os.PathLike) -> Path:
    """An argparse type: a path whose ~ is a home folder, also where no shell has seen to it ("~/x", --out=~/x)."""
    return Path(os.path.expanduser(text))


def data_root() -> Path:
    """The folder that holds data/: the one that the environment variable DATA_PATH names, or the repository."""
    return home_path(os.environ.get("DATA_PATH") or Path(__file__).resolve().parent.parent)


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print a line on `stream` (default: stdout). What it cannot take is dropped: the data is what matters.

    That may be a character that the terminal's encoding lacks, a pipe that is closed (`| head`), a disk that is full.
    """
    stream = stream or sys.stdout
    if stream is None:  # Python was started with it closed
        return
    stream.reconfigure(errors="backslashreplace")
    try:
        print(text, file=stream, flush=True)
    except OSError:  # from here on nothing comes of it, nor of Python's own flush at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def root_cause(error: BaseException) -> BaseException:
    """The innermost cause of an exception: network libraries wrap the operating system's answer several layers deep."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def reason(error: BaseException) -> str:
    """What an exception says, without its causes, in one line of at most 200 characters, e.g. "Connection refused"."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def write_shard(path: str | os.PathLike, tokens: np.ndarray, vocab_size: int = VOCAB_SIZE) -> None:
    """Write token ids, an integer array of shape (n,) with 0 < n < 2^31, as the shard `path`, atomically.

    The tokens go to a temporary file in the same folder which replaces `path` once it is safely on disk, so that a
    crash never leaves a shard that looks complete. Raises ValueError for an array that is not a valid shard and
    OSError if it cannot be written.
    """
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or not 0 < tokens.size <= MAX_TOKENS or tokens.dtype.kind not in "iu":
        raise ValueError(f"a shard is 1 to {MAX_TOKENS} integers in one dimension, not {tokens.dtype} {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"token ids must be 0 to {vocab_size - 1}, not {tokens.min()} to {tokens.max()}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    # The name must not match the pattern *.bin, under which training looks for shards.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(header.tobytes())
            file.write(np.ascontiguousarray(tokens, dtype="<u2").data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C included
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_shard(path: str | os.PathLike) -> np.ndarray:
    """The tokens of a shard, uint16 of shape (n,), mapped from disk. Raises DataError if it is not a valid shard."""
    if problem := shard_problem(path):
        raise DataError(f"{path}: {problem}")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def shard_problem(path: str | os.PathLike, check_ids: bool = False, vocab_size: int = VOCAB_SIZE) -> str | None:
    """What is wrong with a shard, in one line without its name, or None if it is valid.

    Reads only the header and the file's size, so it is quick; `check_ids` also reads every token id.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable: {reason(error)}"
    if not head:
        return "empty file"
    magic = int.from_bytes(head[:4], "little", signed=True)
    if magic != MAGIC:
        start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        looks = next((f"; it looks like {what}" for begin, what in IMPOSTORS if start.startswith(begin)), "")
        return f"not a shard: magic number {magic} instead of {MAGIC}{looks}"
    if len(head) < HEADER_BYTES:
        return f"truncated: {len(head)} bytes, less than the header of {HEADER_BYTES}"
    version, num_tokens = (int(number) for number in np.frombuffer(head, dtype="<i4")[1:3])
    if version != VERSION:
        return f"version {version} of the format instead of {VERSION}"
    if num_tokens <= 0:
        return f"the header promises {num_tokens} tokens"
    expected = HEADER_BYTES + TOKEN_BYTES * num_tokens
    if size < expected:
        return f"truncated: the header promises {num_tokens} tokens, {expected} bytes, and the file has {size} bytes"
    if size > expected:
        return f"{size - expected} trailing bytes after the {num_tokens} tokens that the header promises"
    if check_ids:
        highest = int(np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES).max())
        if highest >= vocab_size:
            return f"token id {highest} is outside the vocabulary of {vocab_size}"
    return None
