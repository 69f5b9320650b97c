"""What a user sees when the world is not as a run needs it: real processes, one line, at once."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from runlog import read_run
from shard_files import text_of, write_shard

TRAIN_GPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
PREFIX = "train_gpt.py: error: "
PYTHON = [sys.executable, str(TRAIN_GPT)]
DATA = ["--preset=smoke", "--train_files=train_*.bin", "--val_files=val_*.bin", "--val_tokens=8192"]


def torchrun(processes, folder):
    """The launcher, with what each process says in files of its own under the folder."""
    options = ["--standalone", f"--nproc_per_node={processes}", "--redirects=3", f"--log-dir={folder}"]
    return [sys.executable, "-m", "torch.distributed.run", *options, str(TRAIN_GPT)]


def environment(folder, **values):
    """That of a user without a launcher and without a GPU whose data lie in the folder."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    base = {name: value for name, value in os.environ.items() if name not in launcher}
    return {**base, "DATA_PATH": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **values}


def run(folder, arguments, command=PYTHON, **values):
    """What a process started in the folder says, and how it ends."""
    begin = time.monotonic()
    result = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env=environment(folder, **values),
        capture_output=True,
        text=True,
        timeout=60,
    )
    result.seconds = time.monotonic() - begin
    return result


@pytest.fixture
def folder(tmp_path):
    """Two train shards and a validation shard in which nothing is wrong, in a folder that could be a pattern."""
    tmp_path = tmp_path / "a [v2]"
    tmp_path.mkdir()
    for i in (1, 2):
        write_shard(tmp_path / f"train_{i}.bin", text_of([50] * 200, 5000 * i))
    write_shard(tmp_path / "val_0.bin", text_of([50] * 200))
    return tmp_path


def no_validation_files(folder):
    (folder / "val_0.bin").unlink()


def no_train_files(folder):
    for path in folder.glob("train_*.bin"):
        path.unlink()


def wrong_magic(folder):
    write_shard(folder / "train_2.bin", text_of([50] * 200), magic=20240801)


def wrong_version(folder):
    write_shard(folder / "val_0.bin", text_of([50] * 200), version=2)


def truncated(folder):
    path = folder / "train_2.bin"
    path.write_bytes(path.read_bytes()[:-1000])


def shorter_than_a_header(folder):
    (folder / "train_1.bin").write_bytes(b"<!DOCTYPE html>")  # what a failed download can leave behind


def header_promises_too_much(folder):
    write_shard(folder / "val_0.bin", text_of([50] * 200), count=100_000)


def id_out_of_range(folder):
    write_shard(folder / "train_1.bin", [*text_of([50] * 100), 50257, *text_of([50] * 100)])


def short_validation_set(folder):
    write_shard(folder / "val_0.bin", text_of([64] * 128))  # 8192: one token less than it takes


def few_train_tokens(folder):
    write_shard(folder / "train_1.bin", text_of([50] * 10))
    write_shard(folder / "train_2.bin", text_of([50] * 10))


def nothing(folder):
    pass


def log_of_that_name(folder):
    (folder / "kept").mkdir()
    (folder / "kept" / "first.txt").write_text("the first run")


def file_instead_of_a_log_folder(folder):
    (folder / "occupied").write_text("")


def malformed_vocabulary(folder):
    (folder / "data").mkdir()
    (folder / "data" / "gpt2.tiktoken").write_bytes(b"IQ== 0\nIg=== 1\n")


FETCH = "data/cached_fineweb10B.py"
# What is broken, further arguments, words of the line on the screen: the file or value, what is wrong, the remedy.
BROKEN = [
    (no_validation_files, [], ["{folder}/val_*.bin", "no data files match", FETCH, "DATA_PATH"]),
    (no_train_files, [], ["{folder}/train_*.bin", "no data files match", FETCH, "DATA_PATH"]),
    (wrong_magic, [], ["{folder}/train_2.bin", "magic number 20240801 instead of 20240520", FETCH]),
    (wrong_version, [], ["{folder}/val_0.bin", "version 2, this program reads version 1", FETCH]),
    (truncated, [], ["{folder}/train_2.bin", "promises 10000 tokens, the file holds 9500", FETCH]),
    (shorter_than_a_header, [], ["{folder}/train_1.bin", "truncated", "15 bytes", FETCH]),
    (header_promises_too_much, [], ["{folder}/val_0.bin", "promises 100000 tokens, the file holds 10000", FETCH]),
    (id_out_of_range, [], ["{folder}/train_1.bin", "token id 50257 at position 5000", "ends at 50256", FETCH]),
    (short_validation_set, [], ["{folder}/val_0.bin", "8192 validation tokens", "8193", "lower --val_tokens"]),
    (
        few_train_tokens,
        [],
        ["{folder}/train_1.bin", "500 train tokens in the largest shard", "a step takes 1024", FETCH],
    ),
    (
        file_instead_of_a_log_folder,
        ["--log_dir=occupied/logs"],
        ["occupied/logs/", "cannot write the log", "--log_dir="],
    ),
    (
        log_of_that_name,
        ["--log_dir=kept", "--run_id=first"],
        ["kept/first.txt", "cannot write the log", "File exists", "--run_id="],
    ),
    (nothing, ["--vocabulary=no.tiktoken"], ["{folder}/no.tiktoken: No such file", "--vocabulary= takes the file"]),
    (
        malformed_vocabulary,
        [],
        ["{folder}/data/gpt2.tiktoken: line 2 is no token in base64 and its rank", "--vocabulary= takes the file"],
    ),
    (nothing, ["--num_iterations=5"], ["unknown hyperparameter --num_iterations", "num_scheduled_iterations"]),
    (nothing, ["--seed=many"], ["--seed=many", "expected a whole number"]),
    (nothing, ["--val_tokens=9000"], ["--val_tokens", "multiple of"]),
]


def assert_one_line(text, words):
    """Of the process's own, nothing else, no stack trace."""
    assert text.startswith(PREFIX) and text.count("\n") == 1 and text.endswith("\n"), text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    "broken, arguments, words", BROKEN, ids=[" ".join((b.__name__.replace("_", " "), *a)) for b, a, _ in BROKEN]
)
def test_what_is_broken_is_said_in_one_line_at_once(folder, broken, arguments, words):
    broken(folder)
    result = run(folder, [*DATA, *arguments])
    assert result.returncode == 1
    assert_one_line(result.stderr, [word.format(folder=folder) for word in words])
    assert "step:" not in result.stdout and "warm-up" not in result.stdout
    assert result.seconds < 30  # two or three by itself; a busy machine takes longer
    assert not (folder / "logs").exists()  # a run that never began leaves no log


def test_three_processes_are_refused_by_a_value_in_the_environment(folder):
    result = run(folder, DATA, WORLD_SIZE="3", RANK="0", LOCAL_RANK="0")
    assert result.returncode == 1
    assert_one_line(result.stderr, ["3 processes", "start 1, 2, 4 or 8"])
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_an_empty_number_in_the_environment_is_said_in_one_line(folder, name):
    result = run(folder, DATA, **{name: ""})
    assert result.returncode == 1
    assert_one_line(result.stderr, [f"{name}=''", "expected a whole number"])


def test_several_processes_without_a_launcher_are_told_to_take_one(folder):
    result = run(folder, DATA, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert result.returncode == 1
    assert_one_line(result.stderr, ["MASTER_ADDR is missing", "torchrun"])
    assert not (folder / "logs").exists()


UNCHECKED = [*DATA, "--hang_timeout=2e9"]  # what a copy without checks takes
TOOLS = {"--bench": "bench", "--profile": "bench"}
TOOLS |= {argument: "checkpoint" for argument in ("--checkpoint_every=4", "--save_checkpoint", "--resume=some")}


@pytest.mark.parametrize("argument", TOOLS)
def test_a_copy_without_its_tools_says_so_at_once_if_one_is_asked_for(folder, argument):
    copy = folder / "train_gpt.py"
    copy.write_text(TRAIN_GPT.read_text())
    name = argument.partition("=")[0]
    words = [f"{name} takes {folder}/records/{TOOLS[argument]}.py", "not there", "whole checkout"]
    result = run(folder, [*DATA, argument], [sys.executable, str(copy)])
    assert result.returncode == 1 and result.stdout == "" and result.seconds < 30
    assert_one_line(result.stderr, words)
    assert not (folder / "logs").exists()


def test_a_copy_alone_has_the_whole_ones_help_and_says_in_one_line_what_is_wrong(folder):
    copy = folder / "train_gpt.py"
    copy.write_text(TRAIN_GPT.read_text())
    assert run(folder, ["--help"], [sys.executable, str(copy)]).stdout == run(folder, ["--help"]).stdout
    assert_one_line(run(folder, UNCHECKED).stderr, ["--hang_timeout=2000000000.0 must be at most 1e9"])  # of the whole
    no_validation_files(folder)
    assert_one_line(run(folder, DATA, [sys.executable, str(copy)]).stderr, ["no data files match"])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_copy_alone_runs_unchecked_and_says_so(folder, tmp_path_factory, processes):
    outputs, copy = tmp_path_factory.mktemp("outputs"), folder / "train_gpt.py"
    copy.write_text(TRAIN_GPT.read_text().replace("tokens // 128", "tokens // 2048"))  # of the smoke run's tokens
    small = "num_heads=2 ngram_rows=64 val_tokens=512 val_batch_size=512 window_block=4 vocabulary= "
    small += "num_scheduled_iterations=6 num_extension_iterations=1"
    command = [sys.executable, str(copy)] if processes == 1 else [*torchrun(2, outputs)[:-1], str(copy)]
    result = run(folder, [*UNCHECKED, *(f"--{setting}" for setting in small.split())], command)
    assert result.returncode == 0
    (log,) = (folder / "logs").glob("*.txt")
    said = [path.read_text() for path in outputs.rglob("stdout.log")] or [result.stdout]
    note = "note: a copy without records/: nothing was checked, and nothing looks after hangs\n"
    assert [text.count(note) for text in (log.read_text(), "".join(said))] == [1, 1]
    found = read_run(log)  # plain, but in the form of all logs
    assert (found.problems, found.preset, found.step, [*found.losses]) == ([], "smoke", 7, [0, 7])
    assert found.source.startswith(copy.read_text()) and found.overrides["num_heads"] == "2"


def test_a_rank_whose_copy_stands_alone_does_not_wait_for_one_that_checks(folder):
    copy = folder / "train_gpt.py"
    copy.write_text(TRAIN_GPT.read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launched = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    with ThreadPoolExecutor() as pool:
        programs = [(TRAIN_GPT, dict(RANK="0", LOCAL_RANK="0")), (copy, dict(RANK="1", LOCAL_RANK="1"))]
        runs = [pool.submit(run, folder, DATA, [sys.executable, str(p)], **launched, **rank) for p, rank in programs]
    results = [run.result() for run in runs]
    assert [result.returncode for result in results] == [1, 1]
    words = ["records/checks.py is beside the train_gpt.py of some ranks only"]
    assert_one_line(results[1].stderr, words)  # rank 0 finds that it is gone


def test_help_is_there_without_docstrings_and_on_a_terminal_that_takes_nothing(folder):
    result = run(folder, ["--help"], [sys.executable, "-OO", str(TRAIN_GPT)])
    assert result.returncode == 0 and "  --num_heads=6\n" in result.stdout and result.stderr == ""
    with open("/dev/full", "w") as full:
        assert subprocess.run([*PYTHON, "--help"], stdout=full, stderr=full, timeout=60).returncode == 0


def test_a_process_on_a_cpu_keeps_its_memory_and_lets_waiting_threads_sleep(folder):
    # What makes a step on a busy CPU several times as fast; seen where the arguments are read.
    look = """
        import os, resource, sys
        sys.path.insert(0, os.environ["PROGRAMS"])
        import train_gpt
        def look(*arguments, **options):
            for _ in range(30):  # the heap grows at first
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                train_gpt.torch.ones(10_000_000)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            print(faults, os.environ["OMP_WAIT_POLICY"], flush=True)
            os._exit(0)
        train_gpt.parse_arguments = look
        train_gpt.main([])"""
    command = [sys.executable, "-c", textwrap.dedent(look)]
    faults, policy = run(folder, [], command, PROGRAMS=str(TRAIN_GPT.parent)).stdout.split()
    assert int(faults) < 100 and policy == "passive"  # of 9,766 pages


def test_the_first_process_does_not_wait_for_others_to_say_it(folder):
    no_validation_files(folder)
    launched = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29499")
    result = run(folder, DATA, **launched)  # a second process never comes
    assert result.returncode == 1
    assert_one_line(result.stderr, ["no data files match"])


def assert_said_once(result, outputs, words):
    """By one of the launcher's processes, no other said anything on stderr."""
    assert result.returncode != 0
    texts = [path.read_text() for path in sorted(outputs.rglob("stderr.log"))]
    assert [text for text in texts if text] == texts[:1], texts
    assert_one_line(texts[0], words)
    assert result.seconds < 45


def test_three_processes_of_a_launcher_are_refused_once(folder, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    result = run(folder, DATA, torchrun(3, outputs))
    assert len(list(outputs.rglob("stderr.log"))) == 3
    assert_said_once(result, outputs, ["3 processes", "start 1, 2, 4 or 8"])


def test_two_processes_say_it_once_even_when_the_first_is_the_last_to_find_it(folder, tmp_path_factory):
    # The launcher ends all processes when one has ended: the others must not end before rank 0 has spoken.
    outputs = tmp_path_factory.mktemp("outputs")
    late = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(2)\n"
    (folder / "sitecustomize.py").write_text(late)
    no_validation_files(folder)
    result = run(folder, DATA, torchrun(2, outputs), PYTHONPATH=str(folder))
    assert_said_once(result, outputs, [f"{folder}/val_*.bin", "no data files match"])


def test_what_only_the_first_of_two_processes_finds_is_said_once(folder, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    file_instead_of_a_log_folder(folder)
    result = run(folder, [*DATA, "--log_dir=occupied/logs"], torchrun(2, outputs))
    assert_said_once(result, outputs, ["occupied/logs/", "cannot write the log"])


def test_two_processes_of_a_copy_without_its_bench_say_so_once(folder, tmp_path_factory):
    outputs, copy = tmp_path_factory.mktemp("outputs"), folder / "train_gpt.py"
    copy.write_text(TRAIN_GPT.read_text())
    result = run(folder, [*DATA, "--bench"], [*torchrun(2, outputs)[:-1], str(copy)])
    assert_said_once(result, outputs, ["--bench takes", "not there"])


def test_a_good_world_is_summed_up_in_the_first_lines_on_the_screen(folder):
    process = subprocess.Popen(
        [*PYTHON, *DATA, "--run_id=good"], cwd=folder, env=environment(folder), stdout=subprocess.PIPE, text=True
    )
    try:
        lines = [process.stdout.readline() for _ in range(4)]
    finally:
        process.kill()
        process.communicate()
    world, _, data, run = lines  # the second names the software
    assert world.startswith(
        "world: 1 x CPU, 8 micro-batches each a step, joined up to 1,024 tokens; parameters in float32"
    )
    assert data == "data: 2 train shards, 20,000 tokens; 8,192 of 10,000 validation tokens\n"
    # 30 steps of 512 tokens, 20 of 1024
    assert run == "run: good, 50 steps, 35,840 tokens (1.79 of the train files)\n"
