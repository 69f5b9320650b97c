"""Shard files for tests, built by hand from the description of the format."""

import struct
from pathlib import Path

from train_gpt import Hyperparameters

BOS = Hyperparameters.bos


def write_shard(path: Path, tokens, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """A shard: 256 int32 of header (magic, version, number of tokens), then the tokens as uint16."""
    tokens = list(tokens)
    header = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}H", *tokens))
    return path


def text_of(lengths, first_id: int = 0) -> list[int]:
    """Tokens of documents of these lengths; the ids between two BOS count up, so that each place is recognisable."""
    tokens, number = [], first_id
    for length in lengths:
        tokens.append(BOS)
        tokens += [(number + i) % BOS for i in range(length - 1)]
        number += length - 1
    return tokens
