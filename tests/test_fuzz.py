"""Whatever parses gets thousands of inputs that nobody meant: it reads them or says in its own words that it can't.

Logs have theirs in test_records.py (test_any_text_is_reported, test_a_damaged_log_is_reported).
"""

import argparse
import contextlib
import gzip
import json
import math
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import text_of, write_shard

import train_gpt

sys.path.insert(0, str(Path(train_gpt.__file__).parent / "data"))
import shards
import tokenize_text
from checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint

many = settings(max_examples=1500, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------------------- shards

int32 = st.integers(-(2**31), 2**31 - 1)
headers = st.builds(
    lambda magic, version, count, rest: struct.pack("<3i", magic, version, count) + rest,
    st.sampled_from([train_gpt.SHARD_MAGIC, 20240801]) | int32,
    st.sampled_from([1, 2]) | int32,
    st.integers(0, 40) | int32,
    st.just(bytes(1012)) | st.binary(max_size=1012),
)


@many
@given(headers | st.binary(max_size=50), st.binary(max_size=80))
def test_any_bytes_are_a_shard_or_an_error_that_names_the_file(folder, header, body):
    path = folder / "any.bin"
    path.write_bytes(header + body)
    problem = shards.shard_problem(path, check_ids=True)
    try:
        tokens = train_gpt.read_tokens(path, 50257)
    except train_gpt.UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        assert problem
    else:
        assert len(header + body) == 1024 + 2 * len(tokens)
        assert len(tokens) == 0 or problem is None  # an empty shard is read, but never written
        assert len(tokens) == 0 or tokens.max() < 50257


@many
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 40), st.integers(1, 64))
def test_any_lengths_of_documents_are_dealt_or_refused(folder, lengths, num_tokens, max_seq_len):
    path = write_shard(folder / "lengths.bin", text_of(lengths))
    shard = train_gpt.Shard(path, train_gpt.Hyperparameters())
    while dealt := shard.deal(num_tokens, max_seq_len):
        for tokens, ends in dealt:
            assert len(tokens) == num_tokens + 1 and ends[0] == 0 and ends[-1] == num_tokens


# ---------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(folder):
    """The bytes of a small one, and what is in it."""
    empty = {key: kind() for key, kind in CHECKPOINT.items()}
    content = {**empty, "step": 2, "model": {"p": torch.arange(30.0)}, "optimizer": {"p.updates": 1}}
    path = folder / "small.pt"
    write_checkpoint(path, content)
    return path.read_bytes(), content


def read(folder, data):
    """The content, or None where it is refused by name."""
    path = folder / "read.pt"
    path.write_bytes(data)
    try:
        return read_checkpoint(path)
    except train_gpt.UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return None


def test_a_checkpoint_is_read_as_written(folder, checkpoint):
    data, content = checkpoint
    found = read(folder, data)
    assert torch.equal(found["model"].pop("p"), content["model"]["p"])
    assert found == {**content, "model": {}}


@many
@given(st.data())
def test_a_checkpoint_with_any_bytes_changed_lost_or_added_is_refused(folder, checkpoint, data):
    whole, _ = checkpoint
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(start + 50, len(whole))) | st.just(len(whole)))
    damaged = whole[:start] + data.draw(st.binary(max_size=50)) + whole[end:]
    assert damaged == whole or read(folder, damaged) is None


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.data())
def test_a_checkpoint_of_any_bytes_with_the_right_checksum_is_read_or_refused(folder, checkpoint, data):
    whole = checkpoint[0][:-32]
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(start + 20, len(whole))))
    damaged = whole[:start] + data.draw(st.binary(max_size=20)) + whole[end:]
    read(folder, damaged + train_gpt.hashlib.sha256(damaged).digest())


# ---------------------------------------------------------------------------- arguments

names = st.sampled_from([*train_gpt.SETTINGS, "stages", "no_such"]) | st.text(max_size=8)
values = st.one_of(
    st.text(max_size=12),
    st.integers(-(10**25), 10**25).map(str),
    st.floats().map(str),
    st.sampled_from(["true", "auto", "off", "smoke", "1e999", "nan", "1,2,,3", "0x10", "١٢", "\0", "..", "."]),
)


@many
@given(st.lists(st.builds("--{}={}".format, names, values) | st.text(max_size=10), max_size=4), st.booleans())
def test_any_arguments_are_hyperparameters_or_an_error_in_one_line(arguments, has_gpu):
    try:
        hp, _ = train_gpt.parse_arguments(arguments, has_gpu)
    except train_gpt.UserError as error:
        assert str(error).isprintable()
    else:
        assert Path("logs", f"{hp.run_id}.txt").parent == Path("logs")
        assert math.isfinite(train_gpt.TrainingSchedule(hp).lr(0))


# ---------------------------------------------------------------------------- text

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "id"]), inner, max_size=2),
    max_leaves=6,
)
lines = st.one_of(
    st.binary(max_size=30),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.text(max_size=20).map(lambda text: json.dumps({"text": text}).encode()),
)


def documents(path, separator=""):
    """Texts of the documents that tokenize_text reads from the file, or None where it names the file and the reason."""
    texts = []
    try:
        for piece in tokenize_text.read_pieces(path, "text", separator, lambda size: None, lambda found: None):
            if piece.starts_document:
                texts.append("")
            texts[-1] += piece.text
    except shards.DataError as error:
        assert str(error).startswith(f"{path}:") and "\n" not in str(error)
        return None
    return texts


@many
@given(st.lists(lines, max_size=5).map(b"\n".join))
def test_any_jsonl_is_read_or_refused_with_its_line(folder, data):
    (folder / "any.jsonl").write_bytes(data)
    texts = documents(folder / "any.jsonl")
    assert texts is None or all(text.strip() for text in texts)


@many
@given(
    st.binary(max_size=40) | st.text(alphabet="ab \n#é", max_size=60).map(str.encode),
    st.sampled_from(["", "#", "##", "a\n"]),
)
def test_any_text_is_read_whole_or_refused(folder, data, separator):
    (folder / "any.txt").write_bytes(data)
    texts = documents(folder / "any.txt", separator)
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        assert texts is None
    else:
        assert texts == [t for t in (text.split(separator) if separator else [text]) if t.strip()]


@many
@given(st.binary(max_size=60), st.integers(0, 60), st.booleans())
def test_any_gzip_is_read_or_refused(folder, noise, at, whole):
    data = gzip.compress(b"some text that is long enough to be compressed, some text", mtime=0)
    (folder / "any.txt.gz").write_bytes(data if whole and not noise else data[:at] + noise)
    documents(folder / "any.txt.gz")


@pytest.mark.parametrize(
    "options", [["--shard_tokens", "0"], ["--val_fraction", "nan"], ["--workers", "-1"], ["--prefix", "../a"]]
)
def test_options_that_make_no_sense_are_refused(folder, options, capsys):
    (folder / "a.txt").write_text("some text")
    with contextlib.suppress(SystemExit, argparse.ArgumentTypeError):
        assert tokenize_text.main([str(folder / "a.txt"), "--out", str(folder / "out"), *options]) != 0
    assert not (folder / "out").exists()
