"""Make token shards from your own text, with GPT-2's tokens or others.

    python data/tokenize_text.py FILES... --out DIR [--prefix text] [--separator STRING] [--field text]
        [--encoding FILE] [--val_fraction 0.05] [--shard_tokens 100000000] [--workers N] [--overwrite]

reads .txt and .jsonl files, also gzipped (.txt.gz, .jsonl.gz), in UTF-8, and .parquet files (with the package pyarrow,
which is not in requirements.txt), and writes DIR/<prefix>_val_000000.bin, ... and DIR/<prefix>_train_000001.bin, ...
A .jsonl file has one document per line, under the key --field; a .parquet file one per row, in the column --field. A
.txt file is one document, or several between --separator strings, in which a line break stands for any kind of line
break. Documents without any text are left out. Training reads only the first 2048 tokens of each document
(`train_max_seq_len`), so a book is better given in chapters or pages. The last line printed is a command that trains on
what was made.

--encoding FILE takes another vocabulary instead of GPT-2's, in the form of tiktoken's .tiktoken files: a line for each
token, its bytes in base64, a space, its rank. Ranks count from 0 to N - 1, every single byte is a token, and N is at
most 65,535. The text is split by GPT-2's pattern, and <|endoftext|>, with which documents begin, is token N.

Shards hold exactly --shard_tokens tokens, the last ones fewer; a document that reaches a shard's end goes on in the
next, as in FineWeb10B. The result depends only on the files, their order and these options, not on --workers. Memory
stays bounded by the shard size, the longest .jsonl line and the largest row group. Shards appear in DIR together, once
all of them are done.
"""

import argparse
import base64
import codecs
import contextlib
import glob
import gzip
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from shards import MAX_TOKENS, DataError, data_root, home_path, reason, tell, write_shard
from tqdm import tqdm

EXTENSIONS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".parquet")
LINE_BREAK = r"(?>\r\n|\n|\r)"  # of Unix, Windows, old Macs; atomic: \r\n is never two
MAX_RANKS = 65_535  # one less than 16 bits hold, for <|endoftext|>
MAX_ENCODING_BYTES = 1 << 24  # 65,535 lines are about 1 MB
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
READ_BYTES = 1 << 20
PARQUET_ROWS = 256  # read at a time
PIECE_CHARS = 1 << 20  # longer documents are encoded in pieces
MAX_PIECE_CHARS = 1 << 22  # a text without white space is cut here, at the price of one unusual token border
BATCH_CHARS = 1 << 20  # what a worker encodes at a time


class Preset(NamedTuple):
    """What train_gpt.py's presets ask of data; for the closing lines only."""

    max_seq_len: int  # tokens that training reads of a document
    steps: tuple[tuple[int, int], ...]  # of the stages that take most: tokens of a step, where documents are cut
    val_batch_size: int

    @property
    def needs(self) -> int:
        """Tokens, of a document up to max_seq_len, that fill a step for sure; a stage that cuts earlier gets fewer.

        One shard must, and each of 8 micro-batches begins with a new document.
        """
        return max(-(-(tokens + 8 * (cut + 1)) * self.max_seq_len // cut) for tokens, cut in self.steps)


SPEEDRUN, VAL_TOKENS = Preset(2048, ((65_536, 896), (131_072, 2048)), 2_097_152), 10_485_760
SMOKE = Preset(256, ((1_024, 256),), 8_192)


class Piece(NamedTuple):
    """A document or a part of one."""

    starts_document: bool
    text: str


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def last_safe_cut(text: str, end: int) -> int:
    """The last position <= `end` where text can be cut without changing its tokens, or 0 if there is none.

    GPT-2's tokens never reach from a visible character into white space after it, and its splitting pattern looks
    ahead only from white space. So both sides of such a place encode the same, together or apart.
    """
    match = re.compile(r".*\S(?=[ \n])", re.DOTALL).match(text, 0, end + 1)
    return match.end() if match else 0


def separator_pattern(separator: str) -> tuple[re.Pattern, int]:
    """A separator as a pattern, in which any line break of the separator is any line break; and its longest match."""
    parts = re.split(LINE_BREAK, separator)
    return re.compile(LINE_BREAK.join(map(re.escape, parts))), len("\r\n".join(parts))


def pieces(
    chunks: Iterable[str], separator: str = "", found: Callable[[int], object] = lambda count: None
) -> Iterator[Piece]:
    """Turn a text that comes in chunks into documents, cut at `separator` (if not empty), and long ones into pieces.

    The concatenated texts of a document's pieces are the document; blank documents are left out. Calls `found` with
    the number of separators found since the last call.
    """
    buffer, starts, held = "", True, ""
    pattern, longest = separator_pattern(separator)
    for chunk in chain(chunks, [None]):
        buffer += held + (chunk or "")
        if separator:
            held = "\r" if chunk is not None and buffer.endswith("\r") else ""  # until it is known whether \n follows
            *documents, buffer = pattern.split(buffer.removesuffix(held))
            found(len(documents))
            for text in documents:
                if not starts or text.strip():
                    yield Piece(starts, text)
                starts = True
        if len(buffer) > PIECE_CHARS:
            # What may be the beginning of a separator stays; so does the white space that makes a cut safe.
            end = len(buffer) - max(longest - 1, 1)
            cut = last_safe_cut(buffer, end) or (end if len(buffer) > MAX_PIECE_CHARS else 0)
            if cut > 0:
                yield Piece(starts, buffer[:cut])
                buffer, starts = buffer[cut:], False
    if buffer.strip() or (buffer and not starts):
        yield Piece(starts, buffer)


def text_chunks(stream: BinaryIO, path: Path) -> Iterator[str]:
    """Decode a UTF-8 stream in chunks, without its byte order mark. Raises DataError with the place of bad bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, first = 0, True
    while True:
        data = stream.read(READ_BYTES)
        waiting = len(decoder.getstate()[0])  # bytes of an unfinished character, decoded together with the next chunk
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            utf16 = " (it looks like UTF-16: iconv -f UTF-16 -t UTF-8 makes it UTF-8)" * data.startswith(UTF16_MARKS)
            raise DataError(f"{path}: not valid UTF-8 at byte {offset - waiting + error.start}{utf16}") from None
        offset += len(data)
        yield text.removeprefix("\ufeff") if first else text
        first = first and not text
        if not data:
            return


def json_document(line: bytes, field: str, where: str) -> str:
    """The text under the key `field` of one .jsonl line. Raises DataError naming the line, `where`."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{where}: not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({reason(error)})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object with the key {field!r}, not a {type(record).__name__}")
    if field not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where}: no key {field!r}, choose with --field; the keys are: {keys[:100]}")
    if not isinstance(record[field], str):
        raise DataError(f"{where}: {field!r} is a {type(record[field]).__name__}, not a string")
    return record[field]


def parquet_documents(path: Path, raw: BinaryIO, field: str, advance: Callable[[int], object]) -> Iterator[str]:
    """The texts of a .parquet file's column `field`, a row group at a time. Raises DataError and OSError."""
    try:
        file = need("pyarrow.parquet", f"{path}: a parquet file").ParquetFile(raw)
        types, groups, size, row = (
            {c.name: str(c.type) for c in file.schema_arrow},
            file.num_row_groups,
            raw.seek(0, 2),
            0,
        )
        if field not in types:
            columns = ", ".join(map(repr, types)) or "none"
            raise DataError(f"{path}: no column {field!r}, choose with --field; the columns are: {columns[:100]}")
        if types[field] not in ("string", "large_string", "string_view"):
            raise DataError(f"{path}: the column {field!r} is of type {types[field][:50]}, not string")
        for group in range(groups):
            for batch in file.iter_batches(PARQUET_ROWS, [group], [field], use_threads=False):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise DataError(f"{path}: row {row} has no {field!r} (null)")
                    yield text
            advance(size * (group + 1) // groups - size * group // groups)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not valid UTF-8 in the rows after row {row}") from None
    except (ValueError, NotImplementedError) as error:  # pyarrow's own errors are of these kinds, too
        raise DataError(f"{path}: not a sound parquet file ({reason(error)})") from None


def text_pieces(text: str) -> Iterator[Piece]:
    """A document that is wholly in memory, in pieces."""
    return pieces(text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))


def read_pieces(
    path: Path, field: str, separator: str, advance: Callable[[int], object], found: Callable[[int], object]
) -> Iterator[Piece]:
    """The documents of one input file.

    Calls `advance` with the number of bytes read from disk since the last call, and `found` likewise with the number
    of separators.
    """
    with contextlib.ExitStack() as stack:
        try:
            raw = stack.enter_context(open(path, "rb"))
            stream = stack.enter_context(gzip.open(raw)) if path.suffix == ".gz" else raw
            position = 0

            def watched(parts: Iterable) -> Iterator:
                nonlocal position
                for part in parts:
                    if raw.seekable():  # a named pipe has no position
                        advance(raw.tell() - position)
                        position = raw.tell()
                    yield part

            if path.suffix == ".parquet":
                for text in parquet_documents(path, raw, field, advance):
                    yield from text_pieces(text)
            elif ".jsonl" in path.suffixes[-2:]:
                for number, line in enumerate(watched(stream), start=1):
                    if line.strip():
                        yield from text_pieces(json_document(line, field, f"{path}:{number}"))
            else:
                yield from pieces(watched(text_chunks(stream, path)), separator, found)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip file ({reason(error)})") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({reason(error)})") from None


def batches(all_pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group pieces to batches of about BATCH_CHARS characters."""
    batch, size = [], 0
    for piece in all_pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------------------------------


def need(module: str, what: str):
    """A module of a package that this Python may lack. Raises DataError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].removesuffix("_ext")
        raise DataError(f"{what} needs the package {package}; install it with: pip install {package}") from None


def gpt2_encoding():
    """GPT-2's encoding, from the vocabulary beside this script.

    Called once a run, in the main process; the workers get the encoding from there. A test can put a smaller
    `tiktoken.Encoding` in its place.
    """
    return encoding_from(Path(__file__).resolve().parent / "gpt2.tiktoken")


def encoding_from(path: Path):
    """The tiktoken encoding whose tokens are in a .tiktoken file. Raises DataError if it is none or can't be used."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_ENCODING_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from None
    lines, ranks = data.splitlines(), {}
    if len(lines) > MAX_RANKS or len(data) > MAX_ENCODING_BYTES:
        raise DataError(f"{path}: more than {MAX_RANKS:,} tokens; with <|endoftext|> they must fit 16 bits")
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise DataError(f"{path}:{number}: not a token in base64 and its rank, as .tiktoken files have") from None
    if sorted(ranks.values()) != [*range(len(lines))]:
        raise DataError(f"{path}: its {len(lines):,} ranks must be 0 to {len(lines) - 1}, each of another token")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"{path}: lacks {len(missing)} of the 256 single bytes, so it cannot encode every text")
    tiktoken = need("tiktoken", "the program")
    pattern = need("tiktoken_ext.openai_public", "the program").r50k_pat_str
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def encode_batch(encoding, batch: list[Piece]) -> list[np.ndarray]:
    """Token ids of each piece, uint16, with BOS in front of a document's first."""
    encoded = []
    for piece in batch:
        # encode_ordinary: "<|endoftext|>" written in a text is text, not the beginning of a document
        ids = encoding.encode_ordinary(piece.text)
        encoded.append(np.array([encoding.eot_token, *ids] if piece.starts_document else ids, dtype=np.uint16))
    return encoded


def start_worker(encoding) -> None:
    """Set a worker process up: it keeps the encoding, and leaves Ctrl-C to the main process."""
    global worker_encoding
    worker_encoding = encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def encode_in_worker(batch: list[Piece]) -> list[np.ndarray]:
    """`encode_batch` in a worker process."""
    return encode_batch(worker_encoding, batch)


def encode_all(encoding, all_batches: Iterable[list[Piece]], workers: int) -> Iterator[tuple[bool, np.ndarray]]:
    """(starts a document?, token ids) of each piece, in the order of the pieces, whatever the number of workers."""
    if workers == 1:
        for batch in all_batches:
            for piece, ids in zip(batch, encode_batch(encoding, batch), strict=True):
                yield piece.starts_document, ids
        return

    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(encoding,))
    waiting = deque()  # of (starts, future); bounded, or reading would run ahead of encoding and fill the memory

    def oldest() -> Iterator[tuple[bool, np.ndarray]]:
        starts, future = waiting.popleft()
        return zip(starts, future.result(), strict=True)

    try:
        for batch in all_batches:
            waiting.append(([piece.starts_document for piece in batch], pool.submit(encode_in_worker, batch)))
            if len(waiting) > 3 * workers:
                yield from oldest()
        while waiting:
            yield from oldest()
    except BrokenProcessPool:
        raise DataError("a worker process was killed, perhaps for lack of memory; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes a stream of tokens as shards `<name>_<number>.bin` of `shard_tokens` tokens each."""

    def __init__(self, folder: Path, name: str, first_number: int, shard_tokens: int, vocab_size: int):
        self.folder, self.name, self.number, self.shard_tokens = folder, name, first_number, shard_tokens
        self.vocab_size = vocab_size
        self.total = 0  # tokens so far, in all shards
        self.parts, self.size = [], 0  # the tokens of the shard to come

    def append(self, ids: np.ndarray) -> None:
        """Add token ids, uint16 of shape (n,), writing every shard that they fill. Raises OSError."""
        self.total += len(ids)
        while len(ids):
            part, ids = np.split(ids, [self.shard_tokens - self.size])
            self.parts.append(part)
            self.size += len(part)
            if self.size == self.shard_tokens:
                self.flush()

    def flush(self) -> None:
        """Write what there is as one shard. Raises OSError."""
        if self.size:
            write_shard(self.folder / f"{self.name}_{self.number:06d}.bin", np.concatenate(self.parts), self.vocab_size)
            self.number += 1
            self.parts, self.size = [], 0


def existing_shards(folder: Path, prefix: str) -> list[Path]:
    """The shards of this prefix in `folder`, validation first."""
    return [path for kind in ("val", "train") for path in sorted(folder.glob(f"{prefix}_{kind}_*.bin"))]


@contextlib.contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A hidden folder inside `out` for shards in the making, gone afterwards; so is `out`, if it is new and empty."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".tokenize_text.", dir=out))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):
                out.rmdir()


class Made(NamedTuple):
    """What has been written: documents and tokens for training and for validation."""

    train_documents: int
    train_tokens: int
    val_documents: int
    val_tokens: int
    long_documents: int  # with more tokens than training reads of one
    read: dict[Preset, int]  # training tokens but for those that training does not read


def write_shards(encoded: Iterable[tuple[bool, np.ndarray]], args: argparse.Namespace, vocab_size: int) -> Made:
    """Deal documents to validation and training and write their shards.

    A document goes to validation whenever validation has less than its fraction of the tokens so far: the split needs
    no knowledge of what is to come, and reaches the fraction however long the documents are.
    """
    with staging_folder(args.out) as staging:
        val = ShardWriter(staging, f"{args.prefix}_val", 0, args.shard_tokens, vocab_size)
        train = ShardWriter(staging, f"{args.prefix}_train", 1, args.shard_tokens, vocab_size)
        target, documents, long_documents, length = train, {val: 0, train: 0}, 0, 0
        read = dict.fromkeys((SPEEDRUN, SMOKE), 0)
        for starts, ids in encoded:
            if starts:
                target = val if val.total < args.val_fraction * (val.total + train.total) else train
                documents[target] += 1
                length = 0
            target.append(ids)
            long_documents += length <= SPEEDRUN.max_seq_len < length + len(ids)
            for preset in read if target is train else ():
                read[preset] += min(len(ids), max(0, preset.max_seq_len - length))
            length += len(ids)
        if not documents[train]:
            raise DataError(f"nothing to tokenise: no text in {', '.join(map(str, args.files))}"[:300])
        if not documents[val] and documents[train] == 1 and args.val_fraction > 0:
            raise DataError(
                f"there is only one document, so nothing would be left for validation; split it with "
                f"{'another ' * bool(args.separator)}--separator, give more files, or make training shards only with "
                "--val_fraction 0"
            )
        val.flush()
        train.flush()

        for path in existing_shards(args.out, args.prefix):  # only with --overwrite; training would read leftovers too
            path.unlink()
        for path in existing_shards(staging, args.prefix):
            os.replace(path, args.out / path.name)
    return Made(documents[train], train.total, documents[val], val.total, long_documents, read)


def summary(made: Made, args: argparse.Namespace, encoding) -> Iterator[str]:
    """Lines that say what was made, what is odd about it, and how to train on it."""
    documents, tokens = made.train_documents + made.val_documents, made.train_tokens + made.val_tokens
    yield (
        f"{documents:,} documents: {made.train_tokens:,} training and {made.val_tokens:,} validation tokens in "
        f"{args.out}"
    )
    yield from (f"  {path.name}" for path in existing_shards(args.out, args.prefix))
    share = made.val_tokens / tokens
    if args.val_fraction and not 0.5 < share / args.val_fraction < 2:
        yield (
            f"validation has {made.val_documents:,} of {documents:,} documents and {share:.0%} of the tokens, not "
            f"--val_fraction {args.val_fraction:g}: a document goes there as a whole; cut long ones up (--separator)"
        )
    if made.long_documents:
        yield (
            f"note: {made.long_documents:,} documents have more than {SPEEDRUN.max_seq_len} tokens, and training reads "
            f"only the first {SPEEDRUN.max_seq_len} of each (train_max_seq_len); --separator cuts .txt files smaller"
        )
    yield from train_command(made, args, encoding)


def train_command(made: Made, args: argparse.Namespace, encoding) -> Iterator[str]:
    """The command that trains on the shards, with validation settings that fit them; in words where there is none."""
    spare, largest = made.val_tokens - 1, min(1, args.shard_tokens / made.train_tokens)
    fitting = [preset for preset, tokens in made.read.items() if tokens * largest >= preset.needs]
    if not fitting or spare < 8:
        yield (
            f"too little to train on: the smoke preset reads the first {SMOKE.max_seq_len} tokens of each document, "
            f"here {made.read[SMOKE]:,} in all, and needs {SMOKE.needs:,} in a shard, and 9 for validation; cut long "
            "documents up (--separator) or give more"
        )
        return
    root, out = data_root().resolve(), args.out.resolve()
    pattern = f"{glob.escape(str(out.relative_to(root) if out.is_relative_to(root) else out))}/{args.prefix}_"
    options = [f"--train_files={pattern}train_*.bin", f"--val_files={pattern}val_*.bin"]
    if SPEEDRUN not in fitting:
        yield (
            f"enough for the smoke preset only: the speedrun reads {made.read[SPEEDRUN]:,} of the training tokens, and "
            f"needs {SPEEDRUN.needs:,} in a shard"
        )
        options.append("--preset=smoke")
    # Validation reads whole batches, and one token more for the last target.
    batch = next(
        size
        for size in (SPEEDRUN.val_batch_size, SMOKE.val_batch_size, spare // 1024 * 1024, spare // 8 * 8)
        if 0 < size <= spare
    )
    options.append(f"--val_tokens={min(spare // batch * batch, VAL_TOKENS)}")
    if batch < SPEEDRUN.val_batch_size:
        options.append(f"--val_batch_size={batch}")
    if args.encoding:
        options.append(f"--vocabulary={args.encoding.resolve()}")
        options += [f"--vocab_size={encoding.n_vocab}", f"--bos={encoding.eot_token}"]
    yield f"train on it with: ./run.sh {shlex.join(options)}"


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def number_between(kind: type, low: float, high: float, below: bool = False) -> Callable[[str], float]:
    """An argparse type: a number of `kind` from `low` to `high`, without `high` itself if `below`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (below and value == high):
            what = "a whole number" if kind is int else "a number"
            upper = f"below {high}" if below else f"to {high}"
            raise argparse.ArgumentTypeError(f"must be {what} from {low} {upper}, not {text!r}")
        return value

    return parse


def prefix_name(text: str) -> str:
    """An argparse type: a beginning of file names, without the characters that glob patterns treat specially."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", text):
        raise argparse.ArgumentTypeError(f"must be of letters, digits, '_', '-' and '.', not {text!r}")
    return text


def utf8(text: str) -> str:
    """An argparse type: what the terminal gave, also where the locale knows no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that Python could not decode
        with contextlib.suppress(UnicodeDecodeError):
            return os.fsencode(text).decode()
    return text


def unescape(text: str) -> str:
    r"""An argparse type: a string in which \n, \r, \t and \\ stand for line breaks, a tab and a backslash."""
    known = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda match: known[match[1]], utf8(text))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line as a namespace; exits with a message if it is not valid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", type=home_path, metavar="FILES", help=", ".join(EXTENSIONS))
    add("--out", type=home_path, required=True, metavar="DIR", help="output folder, made if it does not exist")
    add("--prefix", type=prefix_name, default="text", help="beginning of the shards' names (default: %(default)s)")
    add("--separator", type=unescape, default="", help=r"between documents in .txt files; \n is a line break")
    add("--field", type=utf8, default="text", help="of the text in .jsonl and .parquet files (default: %(default)s)")
    add("--encoding", type=home_path, metavar="FILE", help="tokens as in a .tiktoken file (default: GPT-2's)")
    add(
        "--val_fraction",
        type=number_between(float, 0, 1, below=True),
        default=0.05,
        help="part of the tokens that goes to validation, by whole documents (default: %(default)s)",
    )
    add(
        "--shard_tokens",
        type=number_between(int, 1, MAX_TOKENS),
        default=100_000_000,
        help="tokens per shard (default: %(default)s)",
    )
    add(
        "--workers",
        type=number_between(int, 1, 1024),
        default=os.cpu_count() or 1,
        help="processes that encode (default: %(default)s, one for each CPU core)",
    )
    add("--overwrite", action="store_true", help="replace the shards of this prefix that are in DIR")
    return parser.parse_args(argv)


def check_paths(args: argparse.Namespace) -> None:
    """Find what can be known to be wrong before any work. Raises DataError."""
    for path in args.files:
        if not path.name.endswith(EXTENSIONS):
            raise DataError(f"{path}: unknown kind of file; known are {', '.join(EXTENSIONS)}")
        if path.is_dir():
            raise DataError(f"{path}: is a folder, not a file")
        if not path.exists():
            raise DataError(f"{path}: no such file")
        if path.suffix == ".parquet":
            need("pyarrow.parquet", f"{path}: a parquet file")
    if not args.overwrite and (shards := existing_shards(args.out, args.prefix)):
        raise DataError(f"{shards[0]} is there already; choose another --out or --prefix, or pass --overwrite")


def run(args: argparse.Namespace) -> None:
    """Make the shards that the parsed command line asks for. Raises DataError."""
    check_paths(args)
    encoding = encoding_from(args.encoding) if args.encoding else gpt2_encoding()
    size = sum(path.stat().st_size for path in args.files)
    separators = Counter()  # found, by file
    # disable=None: a progress bar on a terminal only
    with tqdm(total=size, unit="B", unit_scale=True, desc="tokenize", disable=None) as bar:
        documents = (
            piece
            for path in args.files
            for piece in read_pieces(
                path, args.field, args.separator, bar.update, lambda count, path=path: separators.update({path: count})
            )
        )
        # closing: on an error, wait for the workers here and now
        with contextlib.closing(encode_all(encoding, batches(documents), args.workers)) as encoded:
            try:
                made = write_shards(encoded, args, encoding.n_vocab)
            except OSError as error:  # of reading, there are none left
                raise DataError(f"cannot write to {args.out}: {reason(error)}") from None
    if args.separator and (
        whole := [path for path in args.files if ".txt" in path.suffixes[-2:] and not separators[path]]
    ):
        more = f" and {len(whole) - 1} more files" * (len(whole) > 1)
        tell(f"note: no --separator {args.separator!r} in {whole[0]}{more}", sys.stderr)
    for line in summary(made, args, encoding):
        tell(line)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit status."""
    args = parse_args(argv)
    try:
        run(args)
    except DataError as error:
        print(f"tokenize_text.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tokenize_text.py: interrupted; no shards were written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly end, which removes what is half-made
    sys.exit(main())
