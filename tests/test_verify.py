"""data/verify.py: what it says of a folder of shards, sound and not."""

import subprocess
import sys
from pathlib import Path

import pytest
from shard_files import BOS, text_of, write_shard

VERIFY = Path(__file__).resolve().parent.parent / "data" / "verify.py"
sys.path.insert(0, str(VERIFY.parent))
import verify  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    write_shard(tmp_path / "a_train_1.bin", text_of([50] * 20))
    write_shard(tmp_path / "a_val_0.bin", [7, 8, *text_of([30, 70])])
    return tmp_path


def said(capsys, *arguments):
    status = verify.main([str(a) for a in arguments])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_sound_shards_are_described(folder, capsys):
    status, out, _ = said(capsys, folder)
    assert status == 0
    assert "a_train_1.bin: 1,000 tokens, 20 documents, mean 50, longest 50\n" in out
    assert "a_val_0.bin: 102 tokens, 2 documents, mean 50, longest 70; goes on with 2 tokens" in out
    assert out.endswith("2 shards, nothing wrong; no SHA256SUMS\n")


def rewrite(name, **values):
    return lambda folder: write_shard(folder / name, text_of([50] * 20), **values)


def cut(folder):
    path = folder / "a_train_1.bin"
    path.write_bytes(path.read_bytes()[:-10])


def error_page(folder):
    (folder / "a_train_1.bin").write_bytes(b"<!DOCTYPE html><title>502</title>" + b" " * 3000)


def without_documents(folder):
    write_shard(folder / "a_train_1.bin", [1, 2, 3] * 100)


@pytest.mark.parametrize(
    "damage, words",
    [
        (rewrite("a_train_1.bin", magic=1), "magic number 1 instead of"),
        (rewrite("a_train_1.bin", version=2), "version 2"),
        (rewrite("a_train_1.bin", count=5000), "truncated"),
        (cut, "truncated"),
        (error_page, "an HTML or XML page"),
        (lambda folder: write_shard(folder / "a_train_1.bin", [BOS, 50257]), "token id 50257"),
        (without_documents, "0 documents in 300 tokens: they must begin with 50256"),
    ],
)
def test_a_shard_that_is_wrong_is_named_with_what_is_wrong(folder, capsys, damage, words):
    damage(folder)
    status, out, _ = said(capsys, folder)
    (line,) = [line for line in out.splitlines() if "WRONG" in line]
    assert status == 1 and line.startswith("a_train_1.bin: WRONG: ") and words in line
    assert "1 things wrong" in out


def test_shards_of_long_documents_are_sound(tmp_path, capsys):
    for i in (1, 10):  # a document that lies in three shards, and one in a fourth
        write_shard(tmp_path / f"book_train_{i:06d}.bin", [*text_of([100_001])][: 100_000 + i // 10])
    write_shard(tmp_path / "book_train_000002.bin", [7] * 100_000)
    write_shard(tmp_path / "book_train_000003.bin", [7] * 100_000)
    status, out, _ = said(capsys, tmp_path)
    assert status == 0 and out.count("100,000 tokens, all of a document that began in a shard before") == 2, out
    assert "book_train_000001.bin: 100,000 tokens, 1 documents, mean 100000, longest 100,000\n" in out


def test_a_shard_without_documents_goes_on_with_none_of_another_set_or_of_a_wrong_one(tmp_path, capsys):
    write_shard(tmp_path / "a_train_1.bin", text_of([50]))
    for name in ("a_val_0.bin", "b_train_1.bin", "b_train_2.bin"):
        write_shard(tmp_path / name, [7] * 50)
    status, out, _ = said(capsys, tmp_path)
    assert status == 1 and out.count("WRONG: 0 documents in 50 tokens") == 3 and "3 things wrong" in out


def test_the_beginning_of_documents_and_the_vocabulary_may_be_others(tmp_path, capsys):
    write_shard(tmp_path / "a_train_1.bin", [259, 1, 2, 259, 3])
    assert said(capsys, tmp_path)[0] == 1
    status, out, _ = said(capsys, tmp_path, "--bos", 259, "--vocab_size", 260)
    assert status == 0 and "5 tokens, 2 documents" in out
    assert "token id 259 is outside the vocabulary of 259" in said(capsys, tmp_path, "--vocab_size", 259)[1]


def test_checksums_are_those_of_sha256sum_and_find_what_nothing_else_would(folder, capsys):
    assert said(capsys, folder, "--write")[0] == 0
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)
    assert "nothing wrong; checksums checked" in said(capsys, folder)[1]
    write_shard(folder / "a_train_1.bin", [*text_of([50] * 19), *text_of([50], first_id=7)])
    (folder / "a_val_0.bin").rename(folder / "b_val_0.bin")
    status, out, _ = said(capsys, folder)
    assert status == 1 and "3 things wrong" in out
    assert "a_train_1.bin: WRONG: its checksum is not the one in SHA256SUMS" in out
    assert "b_val_0.bin: WRONG: not listed in SHA256SUMS" in out
    assert "'a_val_0.bin': WRONG: listed in SHA256SUMS, not there" in out


def test_checksums_are_not_written_over_what_is_wrong(folder, capsys):
    cut(folder)
    assert said(capsys, folder, "--write")[0] == 1
    assert not list(folder.glob("*SHA256SUMS*"))


@pytest.mark.parametrize("text", ["../a_train_1.bin", "/etc/passwd", "a\0b", "a/b"])
def test_a_checksum_file_names_no_paths(folder, capsys, text):
    (folder / "SHA256SUMS").write_text("0" * 64 + "  " + text + "\n")
    status, _, err = said(capsys, folder)
    assert status == 1 and "SHA256SUMS:1: not a line of sha256sum" in err


def test_a_folder_without_shards_is_named(tmp_path, capsys):
    status, _, err = said(capsys, tmp_path)
    assert status == 1 and err == f"verify.py: {tmp_path}: no shards (*.bin) there\n"


def test_the_command_runs_from_anywhere(folder, tmp_path):
    result = subprocess.run([sys.executable, str(VERIFY), str(folder)], cwd="/", capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.endswith("no SHA256SUMS\n")
