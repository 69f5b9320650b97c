"""The scripts in data/: shard format, download, tokenizing, offline sample. Needs no network, only the loopback."""

import base64
import contextlib
import errno
import functools
import glob
import gzip
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train_gpt

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))  # the scripts import each other by name, and so do worker processes
shards, sample, tokenize_text, cached_fineweb10B = map(
    importlib.import_module, ("shards", "sample", "tokenize_text", "cached_fineweb10B")
)
BOS = 50256
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


def run_script(name, *args, **env):
    """Run data/<name> as a user does, with more environment variables."""
    command = [sys.executable, str(DATA / name), *map(str, args)]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", **{k: str(env[k]) for k in env}}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)


def assert_one_line(stderr, *words):
    assert "Traceback" not in stderr
    assert stderr.count("\n") == 1 and len(stderr) < 800, stderr
    for word in words:
        assert str(word) in stderr, stderr


def shard_bytes(tokens, magic=20240520, version=1, count=None):
    """A shard built by hand from the description of the format, independently of shards.py."""
    numbers = [magic, version, len(tokens) if count is None else count] + [0] * 253
    return b"".join(n.to_bytes(4, "little") for n in numbers) + b"".join(int(t).to_bytes(2, "little") for t in tokens)


def tokens_of(path):
    """The tokens of a shard, read independently of shards.py, its header checked."""
    data = Path(path).read_bytes()
    tokens = np.frombuffer(data[1024:], dtype="<u2")
    assert data[:1024] == shard_bytes([], count=len(tokens))
    return tokens


def split_documents(tokens):
    """Tokens of each document, without its BOS; the stream must begin with one."""
    starts = np.flatnonzero(tokens == BOS)
    assert len(starts) and starts[0] == 0
    return [part[1:] for part in np.split(tokens, starts[1:])]


# ---------------------------------------------------------------------------------------------------------------------
# shards.py
# ---------------------------------------------------------------------------------------------------------------------


def test_write_shard_writes_the_documented_format(tmp_path):
    shards.write_shard(tmp_path / "a.bin", np.array([BOS, 0, 258, 50255]))
    assert (tmp_path / "a.bin").read_bytes() == shard_bytes([BOS, 0, 258, 50255])
    assert shards.shard_problem(tmp_path / "a.bin", check_ids=True) is None
    assert shards.read_shard(tmp_path / "a.bin").tolist() == [BOS, 0, 258, 50255]
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("tokens", [np.array([], dtype=int), [[1, 2]], [1.5], [-1], [50257]])
def test_write_shard_refuses_what_is_not_a_shard(tmp_path, tokens):
    with pytest.raises(ValueError, match=r"a shard is|token ids must be"):
        shards.write_shard(tmp_path / "a.bin", np.array(tokens))
    assert os.listdir(tmp_path) == []


def test_a_failed_write_keeps_the_old_shard_and_leaves_nothing_behind(tmp_path, monkeypatch):
    shards.write_shard(tmp_path / "a.bin", np.array([1, 2]))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError):
        shards.write_shard(tmp_path / "a.bin", np.array([3, 4]))
    assert tokens_of(tmp_path / "a.bin").tolist() == [1, 2]
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "missing"),
        (b"", "empty file"),
        (shard_bytes([1], magic=7), "magic number 7 instead of 20240520"),
        (b"<!DOCTYPE html><html>503</html>", "HTML or XML page"),
        (b"\n  <?xml version='1.0'?>" + bytes(2000), "HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b'{"error": "rate limited"}', "JSON text"),
        (gzip.compress(shard_bytes([1, 2]), mtime=0), "gzip file"),
        (shard_bytes([1], version=2), "version 2 of the format instead of 1"),
        (shard_bytes([1])[:1000], "truncated: 1000 bytes, less than the header of 1024"),
        (shard_bytes([1, 2], count=3), "truncated: the header promises 3 tokens, 1030 bytes, and the file has 1028"),
        (shard_bytes([1, 2])[:-1], "truncated: the header promises 2 tokens"),
        (shard_bytes([1, 2, 3], count=2), "2 trailing bytes after the 2 tokens"),
        (shard_bytes([]), "promises 0 tokens"),
        (shard_bytes([], count=2**32 - 5), "promises -5 tokens"),
    ],
)
def test_shard_problem_says_in_one_line_what_is_wrong(tmp_path, content, words):
    if content is not None:
        (tmp_path / "a.bin").write_bytes(content)
    problem = shards.shard_problem(tmp_path / "a.bin")
    assert words in problem and "\n" not in problem
    with pytest.raises(shards.DataError, match=r"a\.bin"):
        shards.read_shard(tmp_path / "a.bin")


def test_shard_problem_finds_ids_outside_the_vocabulary_when_asked(tmp_path):
    (tmp_path / "a.bin").write_bytes(shard_bytes([1, 50257]))
    assert shards.shard_problem(tmp_path / "a.bin") is None
    assert "token id 50257" in shards.shard_problem(tmp_path / "a.bin", check_ids=True)


def test_shard_problem_of_a_folder_is_a_line_and_not_an_exception(tmp_path):
    assert "unreadable" in shards.shard_problem(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# cached_fineweb10B.py, against a hub on the loopback that speaks the part of the protocol that a download needs
# ---------------------------------------------------------------------------------------------------------------------

VAL, TRAIN1, TRAIN2 = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"


class Hub:
    """A hub whose files are lists of bodies: each GET takes the next one, the last one stays.

    It refuses who comes with a token that it does not know or, if it knows one, without. GETs wait for `gate`.
    """

    def __init__(self):
        self.tokens, self.gate = {""}, threading.Event()
        self.gate.set()
        self.files = {VAL: [shard_bytes([BOS, 1])], TRAIN1: [shard_bytes([BOS, 2])], TRAIN2: [shard_bytes([BOS, 3])]}
        self.requests = []

    def answer(self, handler):
        folder, name = handler.path.rsplit("/", 1)
        self.requests.append((handler.command, name))
        if handler.headers.get("Authorization", "").removeprefix("Bearer ") not in self.tokens:
            handler.send_response(401)
            handler.send_header("X-Error-Message", "Invalid credentials in Authorization header")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if handler.command == "GET":
            self.gate.wait(30)
        bodies = self.files.get(name)
        if bodies is None or folder != "/datasets/kjj0/fineweb10B-gpt2/resolve/main":
            handler.send_response(404)
            handler.send_header("X-Error-Code", "EntryNotFound")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body = bodies[0]
        handler.send_response(200)
        handler.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        handler.send_header("X-Repo-Commit", "0123456789" * 4)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)
            if len(bodies) > 1:
                bodies.pop(0)

    def downloads(self):
        return [name for command, name in self.requests if command == "GET" and name.endswith(".bin")]


@pytest.fixture
def hub():
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def root(tmp_path):
    """A DATA_PATH; the hub's client has its own cache in it, away from the real one."""
    return tmp_path / "root"


def hub_environment(root, url, **env):
    return {"DATA_PATH": root, "HF_ENDPOINT": url, "HF_HOME": root / "hf", "HF_TOKEN": "", **env}


def fetch(count, root, url, **env):
    return run_script("cached_fineweb10B.py", count, **hub_environment(root, url, **env))


def closed_port_url():
    """An address at which nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_download_gets_the_validation_shard_and_n_train_shards_and_then_nothing_more(hub, root):
    result = fetch(2, root, hub.url)
    assert result.returncode == 0, result.stderr
    folder = root / "data" / "fineweb10B"
    for name, token in ((VAL, 1), (TRAIN1, 2), (TRAIN2, 3)):
        assert tokens_of(folder / name).tolist() == [BOS, token]
    assert sorted(hub.downloads()) == sorted([VAL, TRAIN1, TRAIN2])
    assert "Traceback" not in result.stderr and "\r" not in result.stderr  # no progress bar outside a terminal

    hub.requests.clear()
    result = fetch(2, root, hub.url)
    assert result.returncode == 0 and "3 of 3 shards are already" in result.stdout
    assert hub.requests == [], "what is there and valid must not touch the network"


def test_download_replaces_a_truncated_shard_and_keeps_the_good_ones(hub, root):
    assert fetch(2, root, hub.url).returncode == 0
    folder = root / "data" / "fineweb10B"
    modified = (folder / TRAIN2).stat().st_mtime
    # Same modification time, as after a crash: the hub's client alone would believe this file to be up to date.
    (folder / TRAIN1).write_bytes((folder / TRAIN1).read_bytes()[:-1])
    os.utime(folder / TRAIN1, (modified - 5, modified - 5))
    hub.requests.clear()
    result = fetch(2, root, hub.url)
    assert result.returncode == 0, result.stderr
    assert "anew" in result.stdout and "truncated" in result.stdout
    assert tokens_of(folder / TRAIN1).tolist() == [BOS, 2]
    assert hub.downloads() == [TRAIN1]


def test_download_tries_once_more_after_an_error_page(hub, root):
    hub.files[TRAIN1].insert(0, b"<html>503 Service Unavailable</html>")
    result = fetch(1, root, hub.url)
    assert result.returncode == 0, result.stderr
    assert tokens_of(root / "data" / "fineweb10B" / TRAIN1).tolist() == [BOS, 2]
    assert hub.downloads() == [VAL, TRAIN1, TRAIN1]


@pytest.mark.parametrize(
    ("body", "words"),
    [(b"<html>503</html>", "HTML or XML page"), (shard_bytes([1, 50300]), "token id 50300 is outside the vocabulary")],
)
def test_download_deletes_a_shard_that_is_bad_twice_and_says_so(hub, root, body, words):
    hub.files[TRAIN1] = [body]
    result = fetch(1, root, hub.url)
    assert result.returncode == 1
    assert_one_line(result.stderr, TRAIN1, "twice", "deleted", words)
    assert hub.downloads() == [VAL, TRAIN1, TRAIN1]
    assert [path.name for path in (root / "data" / "fineweb10B").glob("*.bin")] == [VAL]


def test_download_that_was_cut_short_resumes_with_the_missing_shards(hub, root):
    later = hub.files.pop(TRAIN2)
    result = fetch(2, root, hub.url)
    assert result.returncode == 1
    assert_one_line(result.stderr, TRAIN2, "2 of 3 shards are already", "404")
    hub.files[TRAIN2] = later
    hub.requests.clear()
    assert fetch(2, root, hub.url).returncode == 0
    assert hub.downloads() == [TRAIN2]


def test_download_without_a_network_says_at_once_what_is_there_and_what_to_do(root):
    folder = root / "data" / "fineweb10B"
    folder.mkdir(parents=True)
    (folder / VAL).write_bytes(shard_bytes([BOS, 1]))
    (folder / TRAIN1).write_bytes(b"half")
    url, start = closed_port_url(), time.monotonic()
    result = fetch(2, root, url)
    assert result.returncode == 1
    assert_one_line(result.stderr, url, "Connection refused", "1 of 3 shards", folder, "again later", "data/sample.py")
    assert time.monotonic() - start < 15, "no half minute of retries"
    assert (folder / TRAIN1).exists(), "nothing is deleted before it can be replaced"


def test_the_hubs_client_never_sees_an_old_file_which_it_could_believe_in(tmp_path, monkeypatch):
    folder, calls = tmp_path / "data" / "fineweb10B", []

    def hf_hub_download(repo, name, repo_type, local_dir, force_download):
        calls.append((repo, name, repo_type))
        if force_download or not Path(local_dir, name).exists():
            Path(local_dir, name).write_bytes(shard_bytes([BOS]))

    folder.mkdir(parents=True)
    (folder / TRAIN1).write_bytes(b"half")
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    monkeypatch.setattr(cached_fineweb10B, "probe", lambda name: {})
    monkeypatch.setattr(cached_fineweb10B, "hf_hub_download", hf_hub_download)
    assert cached_fineweb10B.main(["1"]) == 0
    assert calls == [("kjj0/fineweb10B-gpt2", name, "dataset") for name in (VAL, TRAIN1)]


@pytest.mark.parametrize("token", ["hf_expired", "hf_größe"])
def test_a_token_that_the_hub_refuses_is_left_away_and_named(hub, root, token):
    result = fetch(1, root, hub.url, HF_TOKEN=token)
    assert result.returncode == 0, result.stderr
    assert tokens_of(root / "data" / "fineweb10B" / TRAIN1).tolist() == [BOS, 2]
    for words in ("refuses your token", "is public", "unset HF_TOKEN"):
        assert result.stdout.count(words) == 1


def test_a_saved_token_is_sent_if_it_is_good_and_its_removal_told_if_not(hub, root):
    (root / "hf").mkdir(parents=True)
    (root / "hf" / "token").write_text("hf_saved\n")
    hub.tokens = {"hf_saved"}  # a private mirror
    result = fetch(1, root, hub.url)
    assert result.returncode == 0 and "refuses" not in result.stdout, result.stderr
    hub.tokens = {""}
    result = fetch(2, root, hub.url)
    assert result.returncode == 0 and "hf auth logout" in result.stdout


@pytest.mark.parametrize(("token", "words"), [("", "needs no token"), ("hf_x", "unset HF_TOKEN")])
def test_a_hub_that_refuses_everyone_is_no_reason_to_try_later(hub, root, token, words):
    hub.tokens = set()
    result = fetch(1, root, hub.url, HF_TOKEN=token)
    assert result.returncode == 1
    assert_one_line(result.stderr, "401", "is public", words, f"HF_ENDPOINT={hub.url}", "0 of 2 shards")
    assert "later" not in result.stderr


@pytest.mark.parametrize("count", [1, 2])
def test_partial_downloads_of_killed_processes_are_cleared_away(hub, root, count):
    assert fetch(1, root, hub.url).returncode == 0
    folder = root / "data" / "fineweb10B"
    for old in (folder / ".cache/huggingface/download/x.incomplete", folder / ".download.abc/y.incomplete"):
        old.parent.mkdir(parents=True, exist_ok=True)
        old.write_bytes(b"half")
    assert fetch(count, root, hub.url).returncode == 0, "with nothing else to do, and with"
    assert not list(folder.rglob("*.incomplete")) and not list(folder.glob(".download.*"))
    assert len(list(folder.glob("*.bin"))) == count + 1


def test_of_two_downloads_into_one_folder_the_second_waits_and_fetches_only_what_is_missing(hub, root):
    hub.gate.clear()
    environment = {**os.environ, **{k: str(v) for k, v in hub_environment(root, hub.url).items()}}
    processes = []
    with contextlib.ExitStack() as stack:
        for count in (1, 2):
            command = [sys.executable, str(DATA / "cached_fineweb10B.py"), str(count)]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
            while "fetching" not in (line := process.stdout.readline()) and "waiting" not in line and line:
                pass
        assert "waiting for another download" in line
        hub.gate.set()
        assert [process.wait(30) for process in processes] == [0, 0]
    assert sorted(hub.downloads()) == sorted([VAL, TRAIN1, TRAIN2])


def test_a_file_system_without_locks_does_not_keep_a_download_from_its_work(tmp_path, monkeypatch):
    def no_locks(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    def hf_hub_download(_, name, repo_type, local_dir, force_download):
        Path(local_dir, name).write_bytes(shard_bytes([BOS]))

    others = tmp_path / "data" / "fineweb10B" / ".download.other" / TRAIN1  # of a process that may be at work
    others.parent.mkdir(parents=True)
    others.touch()
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    monkeypatch.setattr(cached_fineweb10B.FileLock, "acquire", no_locks)
    monkeypatch.setattr(cached_fineweb10B, "probe", lambda name: {})
    monkeypatch.setattr(cached_fineweb10B, "hf_hub_download", hf_hub_download)
    assert cached_fineweb10B.main(["1"]) == 0 and others.exists()


@pytest.mark.parametrize("count", ["0", "104", "-1", "two", "1.5", ""])
def test_download_refuses_a_count_outside_1_to_103(root, count):
    result = run_script("cached_fineweb10B.py", "--", count, DATA_PATH=root)
    assert result.returncode == 2
    assert "whole number from 1 to 103" in result.stderr and "Traceback" not in result.stderr


def test_download_names_shards_as_the_data_set_does_and_takes_nine_by_default(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    monkeypatch.setattr(cached_fineweb10B, "download", lambda count, folder: asked.append((count, folder)))
    assert cached_fineweb10B.main([]) == 0 and cached_fineweb10B.main(["103"]) == 0
    monkeypatch.delenv("DATA_PATH")
    assert cached_fineweb10B.main([]) == 0
    assert asked == [
        (n, base / "data" / "fineweb10B") for n, base in ((9, tmp_path), (103, tmp_path), (9, DATA.parent))
    ]
    names = cached_fineweb10B.shard_names(103)
    assert names[:2] == [VAL, TRAIN1] and names[-1] == "fineweb_train_000103.bin" and len(names) == 104


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "cannot write"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("first line\nsecond line"), 1, "first line second line"),
    ],
)
def test_download_reports_local_trouble_in_one_line(tmp_path, monkeypatch, capsys, error, status, words):
    def failing(*_, **__):
        raise error

    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    monkeypatch.setattr(cached_fineweb10B, "probe", lambda name: None)
    monkeypatch.setattr(cached_fineweb10B, "hf_hub_download", failing)
    assert cached_fineweb10B.main(["1"]) == status
    assert_one_line(capsys.readouterr().err, words)


def test_download_checks_the_free_space_and_the_folder_before_it_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    full = type("Usage", (), {"free": 200_001_023})
    monkeypatch.setattr(cached_fineweb10B.shutil, "disk_usage", lambda _: full)
    assert cached_fineweb10B.main(["1"]) == 1
    assert_one_line(capsys.readouterr().err, "0.2 GB free", "2 shards need 0.4 GB")
    (tmp_path / "file").touch()
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "file"))
    assert cached_fineweb10B.main(["1"]) == 1
    assert_one_line(capsys.readouterr().err, "cannot write to", "Not a directory")


# ---------------------------------------------------------------------------------------------------------------------
# tokenize_text.py
# ---------------------------------------------------------------------------------------------------------------------


def make_tiny_encoding():
    """A small vocabulary with GPT-2's splitting pattern: all bytes and merges inside and across white space."""
    merges = [
        b"th",
        b"the",
        b" t",
        b" th",
        b" the",
        b"  ",
        b"\n\n",
        b" \n",
        b"'s",
        b"aa",
        b" a",
        b"ab",
        b"11",
        b"!\x1c",
    ]
    ranks = {bytes([byte]): byte for byte in range(256)} | {merge: 256 + i for i, merge in enumerate(merges)}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": BOS})


TINY = make_tiny_encoding()


@pytest.fixture
def tiny(monkeypatch):
    """Stands in for GPT-2's encoding, which is larger."""
    monkeypatch.setattr(tokenize_text, "gpt2_encoding", lambda: TINY)


@pytest.fixture
def gpt2():
    """The real encoding."""
    return tokenize_text.gpt2_encoding()


def tokenize(*args):
    return tokenize_text.main([*map(str, args), *(() if "--workers" in args else ("--workers", "1"))])


def jsonl(path, texts, **more):
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts), encoding="utf-8")
    return path


def made(folder, kind):
    """The token stream of all shards of a kind."""
    return np.concatenate([tokens_of(path) for path in sorted(folder.glob(f"*_{kind}_*.bin"))])


def texts_of(tokens, encoding=TINY):
    return [encoding.decode(document.tolist()) for document in split_documents(tokens)]


def test_documents_of_every_kind_of_file_come_back_in_order_each_behind_a_bos(tiny, tmp_path):
    (tmp_path / "a.txt").write_bytes("the 1st\r\nday ü".encode())
    jsonl(tmp_path / "b.jsonl", ["the 2nd", "", "  \n", "the\u2028 3rd"])
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfthe 4th"))
    jsonl(tmp_path / "d.jsonl", ["the 5th"])
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + (tmp_path / "d.jsonl").read_bytes() + b"\n"))
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.txt.gz", "d.jsonl.gz")]
    assert tokenize(*files, "--out", tmp_path / "out", "--val_fraction", 0) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["text_train_000001.bin"]
    expected = ["the 1st\r\nday ü", "the 2nd", "the\u2028 3rd", "the 4th", "the 5th"]
    assert texts_of(made(tmp_path / "out", "train")) == expected


def test_a_literal_endoftext_in_a_text_is_encoded_as_text(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    assert tokenize(tmp_path / "a.txt", "--out", tmp_path / "out", "--val_fraction", 0) == 0
    tokens = made(tmp_path / "out", "train")
    assert (tokens == BOS).sum() == 1 and texts_of(tokens) == ["one<|endoftext|>two"]


def test_separator_cuts_txt_files_and_knows_line_breaks(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("one\n---\ntwo\n---\n\n---\nthree --- four\n---\n")
    options = ("--out", tmp_path / "out", "--val_fraction", 0, "--separator", r"\n---\n")
    assert tokenize(tmp_path / "a.txt", *options) == 0
    assert texts_of(made(tmp_path / "out", "train")) == ["one", "two", "three --- four"]


def test_windows_line_ends_are_line_breaks_to_a_separator(tiny, tmp_path):
    text = "The first text.\r\nIt has two lines.\r\n\r\nA second text,\r\nalso two lines.\r\n\r\nAnd a third.\r\n"
    documents = ["The first text.\r\nIt has two lines.", "A second text,\r\nalso two lines.", "And a third.\r\n"]
    for name, end in (("unix", "\n"), ("mac", "\r"), ("windows", "\r\n")):
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\r\n", end).encode())
        for separator in (r"\n\n", r"\r\n\r\n", "\n\n"):
            options = ("--out", tmp_path / name, "--val_fraction", 0, "--overwrite", "--separator", separator)
            assert tokenize(tmp_path / f"{name}.txt", *options) == 0
            found = texts_of(made(tmp_path / name, "train"))
            assert found == [document.replace("\r\n", end) for document in documents], "with its own line ends"


def test_a_separator_that_does_not_occur_is_said(tiny, tmp_path, capsys):
    for name, text in (("a", "one\n\ntwo"), ("b", "three\nfour"), ("c", "five")):
        (tmp_path / f"{name}.txt").write_text(text)
    files = [tmp_path / f"{name}.txt" for name in "abc"]
    assert (
        tokenize(*files, jsonl(tmp_path / "d.jsonl", ["six"]), "--out", tmp_path / "out", "--separator", r"\n\n") == 0
    )
    assert_one_line(capsys.readouterr().err, "no --separator '\\n\\n'", f"{files[1]} and 1 more")
    assert tokenize(files[0], "--out", tmp_path / "other", "--separator", r"\n\n") == 0
    assert capsys.readouterr().err == ""
    assert tokenize(files[1], "--out", tmp_path / "third", "--separator", r"\n\n") == 1
    assert_one_line(capsys.readouterr().err, "only one document", "another --separator")


def test_field_chooses_the_key_of_the_text(tiny, tmp_path):
    jsonl(tmp_path / "a.jsonl", ["no"], body="yes")
    assert tokenize(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--val_fraction", 0, "--field", "body") == 0
    assert texts_of(made(tmp_path / "out", "train")) == ["yes"]


def test_shards_hold_exactly_shard_tokens_and_together_all_of_them(tiny, tmp_path):
    texts = [f"the {i} " * (i + 1) for i in range(20)]
    options = ("--shard_tokens", 100, "--prefix", "my.set")
    assert tokenize(jsonl(tmp_path / "a.jsonl", texts), "--out", tmp_path / "out", *options) == 0
    names = sorted(os.listdir(tmp_path / "out"))
    assert names[0] == "my.set_train_000001.bin" and "my.set_val_000000.bin" in names and len(names) > 6
    sizes = [len(tokens_of(path)) for path in sorted((tmp_path / "out").glob("my.set_train_*.bin"))]
    assert set(sizes[:-1]) == {100} and 0 < sizes[-1] <= 100
    documents = texts_of(made(tmp_path / "out", "train")) + texts_of(made(tmp_path / "out", "val"))
    assert sorted(documents) == sorted(texts), "every document is there once, in training or in validation"


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_validation_gets_its_fraction_of_the_tokens(tiny, tmp_path, fraction):
    texts = ["the day " * (1 + 37 * i % 50) for i in range(400)]
    options = ("--out", tmp_path / "out", "--val_fraction", fraction)
    assert tokenize(jsonl(tmp_path / "a.jsonl", texts), *options) == 0
    val, train = made(tmp_path / "out", "val").size, made(tmp_path / "out", "train").size
    assert abs(val / (val + train) - fraction) < 0.02


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_result_does_not_depend_on_the_number_of_workers(tiny, tmp_path, monkeypatch, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(
        tokenize_text, "ProcessPoolExecutor", functools.partial(ProcessPoolExecutor, mp_context=context)
    )
    monkeypatch.setattr(tokenize_text, "BATCH_CHARS", 500)
    texts = jsonl(tmp_path / "a.jsonl", ["the day " * (1 + 37 * i % 50) + str(i) for i in range(300)])
    for workers in (1, 2):
        options = ("--out", tmp_path / str(workers), "--workers", workers, "--shard_tokens", 3000)
        assert tokenize(texts, *options) == 0
    names = os.listdir(tmp_path / "1")
    assert len(names) > 5 and sorted(os.listdir(tmp_path / "2")) == sorted(names)
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@settings(deadline=None, max_examples=300, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("the as1!' \n\t\x1c\x85\u3000éß中"), max_size=80), size=st.integers(1, 20))
def test_long_documents_encoded_in_pieces_give_the_tokens_of_the_whole(monkeypatch, text, size):
    monkeypatch.setattr(tokenize_text, "PIECE_CHARS", size)
    found = list(tokenize_text.pieces(text[i : i + size] for i in range(0, len(text), size)))
    if not text.strip():
        assert found == []
        return
    assert [piece.starts_document for piece in found] == [True] + [False] * (len(found) - 1)
    ids = [token for piece in found for token in TINY.encode_ordinary(piece.text)]
    assert ids == TINY.encode_ordinary(text)


@settings(deadline=None, max_examples=300, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(st.sampled_from(["a", "b", " ", "\n", "\r", "\r\n", "a b\r\n", "\r\n\r\n"]), max_size=30).map(
        "".join
    ),
    separator=st.text(st.sampled_from("ab \n"), min_size=1, max_size=4) | st.sampled_from(["a\n", "a b\n\n", "b\na"]),
    size=st.integers(1, 9),
)
@example(text="a b\r\n\r\nb", separator="a b\n\n", size=1)  # longer in the text than as given
def test_separators_are_found_wherever_chunks_and_pieces_end(monkeypatch, text, separator, size):
    monkeypatch.setattr(tokenize_text, "PIECE_CHARS", size)
    documents = []
    for starts, part in tokenize_text.pieces((text[i : i + size] for i in range(0, len(text), size)), separator):
        documents = [*documents, part] if starts else [*documents[:-1], documents[-1] + part]
    # A plain reader: every line break becomes a private letter, so that Windows' two are one; then it is cut.
    plain = re.sub(r"\r\n|\r|\n", lambda match: {"\r\n": "W", "\r": "M", "\n": "U"}[match[0]], text)
    expected = re.split(re.escape(separator).replace("\\\n", "[WMU]"), plain)
    expected = [part.replace("W", "\r\n").replace("M", "\r").replace("U", "\n") for part in expected]
    assert documents == [document for document in expected if document.strip()]


def test_a_huge_document_is_never_held_as_one_piece(monkeypatch):
    monkeypatch.setattr(tokenize_text, "PIECE_CHARS", 100)
    monkeypatch.setattr(tokenize_text, "MAX_PIECE_CHARS", 400)
    for text in ("the day " * 1000, "x" * 8000):
        found = list(tokenize_text.pieces(text[i : i + 100] for i in range(0, len(text), 100)))
        assert "".join(piece.text for piece in found) == text
        assert max(len(piece.text) for piece in found) <= 500


def test_reading_does_not_run_ahead_of_encoding():
    taken = []
    batches = ([tokenize_text.Piece(True, "the")] for i in range(1000) if taken.append(i) is None)
    encoded = tokenize_text.encode_all(TINY, batches, workers=2)
    next(encoded)
    assert len(taken) <= 10
    encoded.close()


# Valid at both ends, with damage in the middle that only decompression finds.
GARBLED = (whole := gzip.compress(b"the day " * 99))[:12] + b"\xff" * 8 + whole[20:]
BAD_INPUTS = {
    "unknown.md": (b"text", "unknown kind of file"),
    "missing.txt": (None, "no such file"),
    "latin.txt": (b"x" * 99 + b"\xe9 and", "not valid UTF-8 at byte 99"),
    "cut.txt": (b"caf\xc3", "not valid UTF-8 at byte 3"),
    "far.txt": (b"x" * ((1 << 20) - 1) + "é".encode() + b"y\xff", "not valid UTF-8 at byte 1048578"),
    "notepad.txt": ("text".encode("utf-16"), "not valid UTF-8 at byte 0 (it looks like UTF-16: iconv"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "latin.jsonl:2: not valid UTF-8"),
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": \n', "bad.jsonl:3: not valid JSON"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1: not valid JSON"),
    "list.jsonl": (b"[1]", "list.jsonl:1: expected a JSON object with the key 'text', not a list"),
    "field.jsonl": (
        b'{"body": "a", "id": 1}',
        "field.jsonl:1: no key 'text', choose with --field; the keys are: 'body'",
    ),
    "number.jsonl": (b'{"text": 5}', "number.jsonl:1: 'text' is a int, not a string"),
    "cut.txt.gz": (gzip.compress(os.urandom(9999))[:5000], "damaged gzip file"),
    "not.jsonl.gz": (b'{"text": "a"}', "damaged gzip file"),
    "broken.jsonl.gz": (gzip.compress(b'{"text": "a"}')[:-6] + bytes(6), "damaged gzip file"),
    "garbled.txt.gz": (GARBLED, "damaged gzip file"),
    "empty.txt": (b"", "nothing to tokenise"),
    "blank.jsonl": (b'\n{"text": " "}\n', "nothing to tokenise"),
    "single.txt": (b"one document", "only one document"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_bad_input_is_named_in_one_line_and_leaves_nothing_behind(tiny, tmp_path, capsys, name):
    content, words = BAD_INPUTS[name]
    good = [] if content in (b"", b"one document") or "blank" in name else [tmp_path / "good.txt"]
    (tmp_path / "good.txt").write_text("the day " * 100)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    status = tokenize(*good, tmp_path / name, "--out", tmp_path / "out", "--shard_tokens", 10)
    assert status == 1
    assert_one_line(capsys.readouterr().err, words, "document" if name == "single.txt" else tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_an_error_in_a_worker_run_leaves_nothing_behind_either(tiny, tmp_path, capsys):
    texts = jsonl(tmp_path / "a.jsonl", ["the day"] * 50)
    texts.write_text(texts.read_text() + "oops")
    (tmp_path / "out").mkdir()
    assert tokenize(texts, "--out", tmp_path / "out", "--workers", 2) == 1
    assert_one_line(capsys.readouterr().err, "a.jsonl:51: not valid JSON")
    assert os.listdir(tmp_path / "out") == []


def test_a_folder_as_input_or_a_file_as_output_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "d.txt").mkdir()
    assert tokenize(tmp_path / "d.txt", "--out", tmp_path / "out") == 1
    assert_one_line(capsys.readouterr().err, "d.txt", "is a folder")
    texts = jsonl(tmp_path / "a.jsonl", ["a", "b"])
    for out in (texts, texts / "out"):
        assert tokenize(texts, "--out", out) == 1
        assert_one_line(capsys.readouterr().err, "cannot write to", out)


@pytest.mark.parametrize("missing", [False, True])
def test_parquet_files_give_their_column_or_say_what_they_need(tiny, tmp_path, capsys, monkeypatch, missing):
    path, options = tmp_path / "a.parquet", ("--out", tmp_path / "out", "--val_fraction", 0)
    if missing:
        path.touch()
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        assert tokenize(path, *options) == 1
        assert_one_line(capsys.readouterr().err, path, "pip install pyarrow")
        return
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"the {i} ü" for i in range(700)]
    table = importlib.import_module("pyarrow").table
    parquet.write_table(table({"id": range(700), "text": texts}), path, row_group_size=300)
    assert tokenize(path, *options) == 0
    assert texts_of(made(tmp_path / "out", "train")) == texts
    for column, words in (
        ({"body": ["a"]}, "no column 'text', choose with --field; the columns are: 'body'"),
        ({"text": [1]}, "of type int64, not string"),
        ({"text": ["a", None]}, "row 2 has no 'text'"),
    ):
        parquet.write_table(table(column), path)
        assert tokenize(path, *options, "--overwrite") == 1
        assert_one_line(capsys.readouterr().err, path, words)
    for damaged in (b"", b"PAR1 and no more", path.read_bytes()[:-9]):
        path.write_bytes(damaged)
        assert tokenize(path, *options, "--overwrite") == 1
        assert_one_line(capsys.readouterr().err, path, "not a sound parquet file")


def tiktoken_file(path, merges=(b"th", b"the", b"the day")):
    """A .tiktoken file of all bytes and some merges."""
    tokens = [bytes([byte]) for byte in range(256)] + list(merges)
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def test_encoding_takes_another_vocabulary(tmp_path, capsys):
    encoding = tiktoken_file(tmp_path / "own.tiktoken")
    texts = jsonl(tmp_path / "a.jsonl", ["the the", "day<|endoftext|>"] + ["the day, " * 500] * 30)
    assert tokenize(texts, "--out", tmp_path / "out", "--encoding", encoding, "--workers", 2) == 0
    tokens = np.concatenate([made(tmp_path / "out", kind) for kind in ("train", "val")])
    assert tokens.max() == 259 and (tokens == 259).sum() == 32
    train = made(tmp_path / "out", "train").tolist()
    assert train[:4] == [259, 257, 32, 257], "no token reaches over a word's end: the splitting pattern is GPT-2's"
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[-3:] == [f"--vocabulary={encoding}", "--vocab_size=260", "--bos=259"]
    hp, _ = train_gpt.parse_arguments(command[command.index("./run.sh") + 1 :], has_gpu=False)
    assert train_gpt.read_vocabulary(hp)[b"the"] == 257
    verified = run_script("verify.py", tmp_path / "out", "--vocab_size", 260, "--bos", 259)
    assert verified.returncode == 0 and "nothing wrong" in verified.stdout
    assert run_script("verify.py", tmp_path / "out", "--vocab_size", 259, "--bos", 259).returncode == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file"),
        (b'{"a": 1}', "own.tiktoken:1: not a token in base64 and its rank"),
        (b"IQ== 0\nIg== x\n", "own.tiktoken:2: not a token in base64 and its rank"),
        (b"IQ== 0\nIQ== 1\n", "its 2 ranks must be 0 to 1, each of another token"),
        (b"IQ== 0\nIg== 2\n", "its 2 ranks must be 0 to 1, each of another token"),
        (b"IQ== 0\nIg== 1\n", "lacks 254 of the 256 single bytes"),
        (b"IQ== 0\n" * 65_536, "more than 65,535 tokens"),
    ],
)
def test_a_file_that_is_no_encoding_is_refused_in_one_line(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "own.tiktoken").write_bytes(content)
    texts = jsonl(tmp_path / "a.jsonl", ["a", "b"])
    assert tokenize(texts, "--out", tmp_path / "out", "--encoding", tmp_path / "own.tiktoken") == 1
    assert_one_line(capsys.readouterr().err, tmp_path / "own.tiktoken", words)
    assert not (tmp_path / "out").exists()


def test_it_is_said_when_few_documents_give_validation_another_share(tiny, tmp_path, capsys):
    books = jsonl(tmp_path / "a.jsonl", ["the day " * 900, "the day " * 1000, "the day " * 600])
    assert tokenize(books, "--out", tmp_path / "a") == 0
    assert "1 of 3 documents and 40% of the tokens, not --val_fraction 0.05" in capsys.readouterr().out
    assert tokenize(jsonl(tmp_path / "b.jsonl", ["the day"] * 100), "--out", tmp_path / "b") == 0
    assert "val_fraction" not in capsys.readouterr().out


@pytest.mark.parametrize("val_tokens", [9, 1_000, 1_026, 6_145, 8_193, 30_000, 2_097_152, 2_097_153, 20_000_000])
@pytest.mark.parametrize("train_tokens", [3_080, 166_198, 166_199])
def test_the_command_that_is_printed_fits_what_was_made(tmp_path, monkeypatch, train_tokens, val_tokens):
    folder, limit = tmp_path / "a [v2] *", min(val_tokens, 2_097_160)
    folder.mkdir()
    text = np.tile(np.array([BOS, *range(49)], dtype=np.uint16), 1 + max(train_tokens, limit) // 50)
    shards.write_shard(folder / "text_train_000001.bin", text[:train_tokens])
    for i in range(val_tokens // limit):
        shards.write_shard(folder / f"text_val_{i:06d}.bin", text[:limit])
    args = tokenize_text.parse_args(["a.txt", "--out", str(folder)])
    result = tokenize_text.Made(
        9,
        train_tokens,
        9,
        val_tokens // limit * limit,
        0,
        dict.fromkeys((tokenize_text.SPEEDRUN, tokenize_text.SMOKE), train_tokens),
    )
    *_, line = tokenize_text.train_command(result, args, TINY)
    program, *options = shlex.split(line.removeprefix("train on it with: "))
    hp, _ = train_gpt.parse_arguments(options, has_gpu=True)
    assert program == "./run.sh"
    assert hp.preset == ("speedrun" if train_tokens == 166_199 else "smoke")
    assert hp.val_tokens >= min(result.val_tokens - 1, 10_485_760) / 2 or hp.val_tokens >= val_tokens - 1024
    assert len(glob.glob(options[1].partition("=")[2])) == val_tokens // limit
    monkeypatch.setattr(train_gpt, "ROOT", Path("/"))
    train_gpt.import_tool("checks").check_world(train_gpt, hp, train_gpt.World(), train_gpt.files_of(hp))


def test_too_little_to_train_on_is_said_instead_of_a_command(tiny, tmp_path, capsys):
    assert tokenize(jsonl(tmp_path / "a.jsonl", ["the day"] * 9), "--out", tmp_path / "out") == 0
    assert "too little to train on" in capsys.readouterr().out.splitlines()[-1]
    books = jsonl(tmp_path / "b.jsonl", ["the day " * 90_000] * 3)  # much text, of which training reads little
    assert tokenize(books, "--out", tmp_path / "books") == 0
    assert "256 tokens of each document, here 512 in all" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("preset", ["speedrun", "smoke"])
def test_what_a_preset_needs_fills_a_step_whatever_the_documents(tmp_path, preset):
    needed = {"speedrun": tokenize_text.SPEEDRUN, "smoke": tokenize_text.SMOKE}[preset]
    options = [f"--preset={preset}", f"--train_max_seq_len={needed.max_seq_len}"]
    hp, _ = train_gpt.parse_arguments(options, has_gpu=True)
    schedule = train_gpt.TrainingSchedule(hp)
    for length in (2, needed.max_seq_len - 1, 5 * needed.max_seq_len):
        documents = -(-needed.needs // min(length, needed.max_seq_len))
        text = np.full((documents, length), 7, dtype=np.uint16)
        text[:, 0] = BOS
        shards.write_shard(tmp_path / "a.bin", text.ravel())
        sizes = {schedule.size(step) for step in schedule.starts}
        assert {(tokens // 8, cut) for tokens, cut in needed.steps} <= {size[:2] for size in sizes}
        for size in sizes:  # each stage's own
            assert len(list(train_gpt.TrainLoader([tmp_path / "a.bin"], [size], hp, train_gpt.World()))) == 1


def test_paths_below_the_data_root_are_printed_as_the_program_takes_them(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA_PATH", "~/base")
    jsonl(tmp_path / "a.jsonl", ["the day " * 900] * 30)
    assert tokenize("~/a.jsonl", "--out", "~/base/mine") == 0
    assert "--train_files=mine/text_train_*.bin" in shlex.split(capsys.readouterr().out)


def test_existing_shards_are_kept_unless_overwrite_is_given_and_then_all_replaced(tiny, tmp_path, capsys):
    many, few = jsonl(tmp_path / "a.jsonl", ["the day " * 50] * 9), jsonl(tmp_path / "b.jsonl", ["x", "y"])
    options = ("--out", tmp_path / "out", "--shard_tokens", 100)
    assert tokenize(many, *options) == 0
    before = made(tmp_path / "out", "train")
    assert tokenize(few, *options) == 1
    assert_one_line(capsys.readouterr().err, "text_val_000000.bin", "--overwrite")
    assert np.array_equal(made(tmp_path / "out", "train"), before)
    assert tokenize(few, *options, "--prefix", "other") == 0
    assert tokenize(few, *options, "--overwrite") == 0
    names = ["other_train_000001.bin", "other_val_000000.bin", "text_train_000001.bin", "text_val_000000.bin"]
    assert sorted(os.listdir(tmp_path / "out")) == names


def test_documents_longer_than_training_reads_are_pointed_out(tiny, tmp_path, capsys):
    assert tokenize(jsonl(tmp_path / "a.jsonl", ["x", "1 " * 1024]), "--out", tmp_path / "a") == 0
    assert "note: 1 documents have more than 2048 tokens" in capsys.readouterr().out  # 2048 and the BOS
    assert tokenize(jsonl(tmp_path / "b.jsonl", ["x", "1 " * 1023 + "1"]), "--out", tmp_path / "b") == 0
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--workers", "0", "whole number from 1"),
        ("--shard_tokens", "x", "whole number from 1"),
        ("--val_fraction", "1", "number from 0 below 1"),
        ("--val_fraction", "nan", "number from 0 below 1"),
        ("--prefix", "a*b", "letters, digits"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, capsys, option, value, words):
    with pytest.raises(SystemExit):
        tokenize_text.main(["a.txt", "--out", str(tmp_path), option, value])
    assert words in capsys.readouterr().err


def test_tokenize_script_reports_a_missing_file_in_one_line(tmp_path):
    result = run_script("tokenize_text.py", tmp_path / "missing.txt", "--out", tmp_path / "out")
    assert result.returncode == 1
    assert_one_line(result.stderr, tmp_path / "missing.txt", "no such file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_removes_what_it_has_made(tmp_path, sig):
    os.mkfifo(tmp_path / "slow.jsonl")  # never ends, so that the run is surely in the middle when interrupted
    program = (
        "import runpy, sys; here, *sys.argv[:] = sys.argv[1:]; sys.path.insert(0, here); "
        "import conftest, tiktoken, test_data_scripts; tiktoken.get_encoding = lambda _: test_data_scripts.TINY; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", program, Path(__file__).parent, DATA / "tokenize_text.py", tmp_path / "slow.jsonl"]
    command += ["--out", tmp_path / "out", "--shard_tokens", "100000", "--workers", "1"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    try:
        with open(tmp_path / "slow.jsonl", "w") as pipe:
            pipe.write((json.dumps({"text": "the day " * 1000}) + "\n") * 300)
            pipe.flush()
            deadline = time.monotonic() + 20
            while not list((tmp_path / "out").glob(".*/*.bin")) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert list((tmp_path / "out").glob(".*/*.bin")), "the run has begun to write"
            process.send_signal(sig)
            _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == (130 if sig == signal.SIGINT else 143)
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


def test_the_real_encoding_gives_gpt2s_tokens_without_a_network(tmp_path):
    (tmp_path / "a.txt").write_text("Hello world\n---\nHello<|endoftext|>\n---\nHello world")
    options = ("--separator", r"\n---\n", "--val_fraction", 0, "--workers", 2)
    closed = closed_port_url()
    env = {"TIKTOKEN_CACHE_DIR": tmp_path / "cache", "HTTPS_PROXY": closed, "https_proxy": closed}
    result = run_script("tokenize_text.py", tmp_path / "a.txt", "--out", tmp_path / "out", *options, **env)
    assert result.returncode == 0, result.stderr
    hello = [15496, 995]
    literal = [15496, 27, 91, 437, 1659, 5239, 91, 29]
    assert made(tmp_path / "out", "train").tolist() == [BOS, *hello, BOS, *literal, BOS, *hello]


# ---------------------------------------------------------------------------------------------------------------------
# sample.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample_folder(tmp_path_factory):
    """The sample, made by the script, once."""
    folder = tmp_path_factory.mktemp("sample") / "deep" / "sample"
    before = os.times()
    result = run_script("sample.py", "--out", folder)
    assert result.returncode == 0, result.stderr
    after = os.times()  # of the processor: the machine may be busy
    assert result.stderr == "" and after.children_user - before.children_user < 10
    return folder


def decode_bytes(ids):
    """Bytes of GPT-2's single-byte tokens, by the description of its byte order."""
    order = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    order += [b for b in range(256) if b not in order]
    return bytes(order[i] for i in ids)


def test_sample_has_enough_tokens_in_several_valid_shards(sample_folder):
    train = sorted(path.name for path in sample_folder.glob("*_train_*.bin"))
    assert train == [f"sample_train_{i:06d}.bin" for i in range(1, len(train) + 1)] and len(train) > 1
    assert [path.name for path in sample_folder.glob("*_val_*.bin")] == ["sample_val_000000.bin"]
    assert made(sample_folder, "train").size >= 1_000_000 and made(sample_folder, "val").size >= 131_072
    for path in sample_folder.iterdir():
        assert shards.shard_problem(path, check_ids=True) is None
        assert tokens_of(path)[0] == BOS and tokens_of(path).size > 100_000


def test_sample_decodes_to_english_documents_that_are_in_one_split_only(sample_folder):
    documents = {}
    for kind in ("train", "val"):
        ids = split_documents(made(sample_folder, kind))
        assert all(document.max() < 256 for document in ids)
        documents[kind] = [decode_bytes(document.tolist()).decode("utf-8") for document in ids]
        assert min(len(text.encode()) for text in documents[kind]) >= 200
    everything = documents["train"] + documents["val"]
    assert len(everything) == len(set(everything)), "no document twice, in one split or both"
    text = "\n".join(everything)
    assert text.count(" the ") > 5_000
    assert "statement" in text and json.__doc__.strip() in everything
    assert 6 < len(everything) / len(documents["val"]) < 10, "every eighth document is for validation"


def test_sample_tokens_are_gpt2s(gpt2, sample_folder):
    ids = split_documents(made(sample_folder, "val"))[0].tolist()
    assert gpt2.decode_bytes(ids) == decode_bytes(ids)
    assert gpt2.decode_bytes(sample.gpt2_byte_ids().tolist()) == bytes(range(256))


def test_sample_ids_of_all_bytes_follow_gpt2s_order():
    ids = sample.gpt2_byte_ids()
    assert decode_bytes(ids.tolist()) == bytes(range(256))
    assert [ids[ord(c)] for c in "!A~ \n"] == [0, 32, 93, 220, 198]


def test_sample_is_made_once_and_mended_when_damaged(sample_folder):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sample_folder.iterdir()}
    (sample_folder / "sample_val_000000.bin").write_bytes(before["sample_val_000000.bin"][0][:-2])
    other = shard_bytes([BOS] * 5)
    (sample_folder / "sample_train_000002.bin").write_bytes(other)  # valid, but not this installation's sample
    (sample_folder / "sample_train_000099.bin").write_bytes(other)
    result = run_script("sample.py", "--out", sample_folder)
    assert result.returncode == 0 and result.stdout.count("already there") == len(before) - 2
    assert {path.name: path.read_bytes() for path in sample_folder.iterdir()} == {k: v[0] for k, v in before.items()}
    kept = "sample_train_000001.bin"
    assert (sample_folder / kept).stat().st_mtime_ns == before[kept][1], "a good shard is not written again"


@pytest.mark.parametrize("other", ["MIN_TRAIN_TOKENS", "MIN_VAL_TOKENS"])
def test_sample_reports_an_installation_with_too_little_text_for_either_split(tmp_path, monkeypatch, other):
    monkeypatch.setattr(sample, other, 0)
    (tmp_path / "small.py").write_text('"""' + "A docstring of a very small library. " * 10 + '"""')
    (tmp_path / "broken.py").write_text("def")
    with pytest.raises(shards.DataError, match="text for only"):
        sample.sample_shards(tmp_path)


def test_sample_reports_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "sample_shards", lambda _: {"sample_val_000000.bin": np.array([BOS, 1])})
    (tmp_path / "file").touch()
    assert sample.main(["--out", str(tmp_path / "file" / "out")]) == 1
    assert_one_line(capsys.readouterr().err, "cannot write to", tmp_path / "file" / "out")


def test_sample_goes_to_data_sample_by_default(monkeypatch):
    folders = []
    monkeypatch.setattr(sample, "sample_shards", lambda _: {})
    monkeypatch.setattr(sample, "write_sample", lambda shards, folder: folders.append(folder))
    assert sample.main([]) == 0 and folders == [DATA / "sample"]


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["fineweb10B/fineweb_train_000001.bin", "sample/sample_val_000000.bin", "x/y.bin"])
def test_git_ignores_what_the_scripts_make(tmp_path, path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text((DATA / ".gitignore").read_text())
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).touch()
    status = subprocess.run(["git", "status", "--short", "-uall"], cwd=tmp_path, capture_output=True, text=True)
    assert status.stdout.split() == ["??", ".gitignore"]


def closed_pipe():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.fixture
def work(tmp_path, hub):
    """Commands of all the scripts, in a home folder whose name has every difficult character."""
    folder = tmp_path / "a [größe] *?"
    folder.mkdir()
    tiktoken_file(folder / "ü.tiktoken")
    (folder / "ä.txt").write_text("the day ß the night")
    shards.write_shard(folder / "ö_train_1.bin", np.array([BOS, 1]))
    tokenize = [
        DATA / "tokenize_text.py",
        "~/ä.txt",
        "--out",
        "~/out",
        "--encoding",
        "~/ü.tiktoken",
        "--separator",
        "ß",
    ]
    commands = {
        "tokenize": [*tokenize, "--workers", "1", "--overwrite"],
        "verify": [DATA / "verify.py", "~", "--write"],
        "download": [DATA / "cached_fineweb10B.py", "1"],
        "sample": [DATA / "sample.py"],
    }
    environment = {**os.environ, **hub_environment(folder, hub.url), "HOME": folder, "DATA_PATH": "~/data [1]"}

    def run(name, **options):
        extra = options.pop("env", {})
        env = {key: str(value) for key, value in {**environment, **extra}.items()}
        command = [sys.executable, *map(str, commands[name])]
        return subprocess.run(command, env=env, cwd=folder, stderr=subprocess.PIPE, timeout=50, **options)

    run.folder = folder
    return run


@pytest.mark.parametrize("name", ["tokenize", "verify", "download"])
def test_what_nobody_reads_any_more_is_dropped_and_the_work_done(work, name):
    pipe = closed_pipe()
    result = work(name, stdout=pipe)
    os.close(pipe)
    assert (result.returncode, result.stderr) == (0, b"")
    made = {
        "tokenize": "out/text_train_000001.bin",
        "verify": "SHA256SUMS",
        "download": f"data [1]/data/fineweb10B/{VAL}",
    }
    assert (work.folder / made[name]).exists()


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ASCII_TERMINAL = {"PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize(
    ("name", "locale"),
    [
        *((name, C_LOCALE) for name in ("tokenize", "verify", "download", "sample")),
        *((name, ASCII_TERMINAL) for name in ("tokenize", "verify")),
    ],
)
def test_names_that_are_not_ascii_are_no_trouble_whatever_the_locale(work, name, locale):
    result = work(name, stdout=subprocess.PIPE, env=locale)
    assert (result.returncode, result.stderr) == (0, b"")
    if name == "tokenize":
        assert b"2 documents" in result.stdout and (work.folder / "out" / "text_val_000000.bin").exists()
    if name == "verify":
        line = "  ö_train_1.bin\n".encode()
        assert (work.folder / "SHA256SUMS").read_bytes().endswith(line)
    if name == "download":
        assert (work.folder / "data [1]" / "data" / "fineweb10B" / TRAIN1).exists()
    if name == "sample":
        assert len(list((work.folder / "data [1]" / "data" / "sample").glob("*.bin"))) == 4


@pytest.mark.parametrize("script", ["cached_fineweb10B.py", "tokenize_text.py", "sample.py", "verify.py"])
def test_help_explains_the_command(script):
    result = run_script(script, "--help")
    assert result.returncode == 0 and f"python data/{script}" in result.stdout
