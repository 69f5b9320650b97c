"""Nothing lost, nothing silent: real processes are killed, real files damaged; what is said, and what is kept.

The runs are tests/fault_run.py: train_gpt.py with a small model of ten steps, and a fault at a step of a rank.
"""

import base64
import contextlib
import fcntl
import io
import math
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from contextlib import suppress
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import checkpoint
import checks
import fault_run
import guard
import logfile
import pytest
import small_run
import torch
from runlog import read_run
from small_run import STEPS

import train_gpt

FAULT_RUN = Path(fault_run.__file__).resolve()
HOST = socket.gethostname()
# Between one process and two after ten steps, nats; only the order of sums differs, measured 1e-6.
LOSS_TOLERANCE = 1e-3
ENVIRONMENT = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # of runs; test_gpu_runs.py takes the latter away


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Train shards of which a run needs more than there are."""
    folder = tmp_path_factory.mktemp("data")
    small_run.write_text(folder, bos=fault_run.CHANGES["bos"])
    small_run.write_vocabulary(folder)
    for path in sorted(folder.glob("train_*.bin")):
        tokens = train_gpt.read_tokens(path, 50257)
        path.unlink()
        for i in (0, 1):
            small_run.write_shard(path.with_stem(f"{path.stem}_{i}"), tokens[700 * i : 700 * (i + 1)])
    return folder


def start(folder, data, processes=1, fault=("none", 0, 0), arguments=(), command=(), environ=None, **options):
    """A run started in the folder, by the launcher if it has several processes; it says what it says in folder/said."""
    if "CUDA_VISIBLE_DEVICES" not in ENVIRONMENT and torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    if processes > 1:
        command = [*command, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment.update(DATA_PATH=str(data), **ENVIRONMENT, **environ or {})
    words = [*map(str, fault), "--preset=smoke", f"--log_dir={folder / 'logs'}", *arguments]
    with open(folder / "said", "w") as said:
        return subprocess.Popen(
            [sys.executable, *command, str(FAULT_RUN), *words],
            cwd=folder,
            env=environment,
            **{"stdout": said, "stderr": said, **options},
        )


def finish(process, folder, seconds=120, orphans=3):
    """The exit status and what was said; no process of the run may be left a moment later."""
    try:
        status = process.wait(timeout=seconds)
    finally:
        process.kill()
    assert wait_until(lambda: not processes_of(folder), orphans), processes_of(folder)
    return status, (folder / "said").read_text()


def run(folder, data, *arguments, seconds=120, **options):
    return finish(start(folder, data, *arguments, **options), folder, seconds)


def processes_of(folder):
    """Those that have the folder in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if f"--log_dir={folder}".encode() in text:
            found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return result


def log_of(folder):
    (path,) = (folder / "logs").glob("*.txt")
    return path


def wait_for_step(folder, step):
    logs = folder / "logs"
    assert wait_until(lambda: any(f"\nstep:{step}/" in path.read_text() for path in logs.glob("*.txt")))


def ours(said):
    """Of all that was said, the lines of the program's own."""
    return [line for line in said.splitlines() if line.startswith("train_gpt.py: ")]


def assert_said_once_and_last(folder, said, *words):
    (line,) = ours(said)
    for word in words:
        assert word in line, line
    assert log_of(folder).read_text().splitlines()[-1] == line
    return line


def bits(p):
    return p.contiguous().view({2: torch.int16, 4: torch.int32}[p.itemsize])


class Result:
    """What a run that came to its end found: its losses and, to the bit, its parameters.

    The log has four digits of a loss; the newest checkpoint on the way, if there is one, has all of those up to it.
    """

    def __init__(self, folder, steps=STEPS):
        self.run = read_run(log_of(folder))
        assert self.run.problems == []
        self.losses = self.run.losses
        (path,) = (folder / "logs").glob(f"*_step{steps:06d}.pt")
        load = partial(torch.load, map_location="cpu", weights_only=True)
        table = torch.cat([load(piece)["p"] for piece in checkpoint.piece_paths(path)])
        self.model = dict(load(path)["model"], ngrams=table)
        before = [p for p in checkpoint.checkpoints_of(self.run.path.stem, path.parent) if p < path]
        exact = load(before[-1])["progress"]["val_losses"] if before else []
        self.exact = dict(zip(sorted(self.losses), exact, strict=False))

    def __eq__(self, other):
        return not self.differences(other)

    def differences(self, other):
        """In words: at which validated step the losses part; which parameters differ, in which places, by how much."""
        told = []
        if self.losses.keys() != other.losses.keys():
            told.append(f"validated at steps {[*self.losses]} and {[*other.losses]}")
        for a, b in ((self.exact, other.exact), (self.losses, other.losses)):
            if parted := [step for step in sorted(a.keys() & b.keys()) if a[step] != b[step]]:
                told.append(f"the losses part at step {parted[0]}: {a[parted[0]]} and {b[parted[0]]}")
                break
        for name, p in self.model.items():
            q = other.model[name]
            places = (bits(p) != bits(q)).nonzero()
            if len(places):
                off, size = (p.double() - q.double()).abs().max(), q.double().abs().max()
                count = f"{len(places)} of {p.numel()} numbers differ, the first at {places[0].tolist()}"
                told.append(f"{name}: {count}, the last at {places[-1].tolist()}, by up to {off:.2g} of {size:.2g}")
        return told


KEPT = ["--run_id=kept", "--checkpoint_every=2", "--save_checkpoint=true"]
RESUMED = ["--resume=kept"]


class Whole(dict):
    """By number of processes: the result of a run in which nothing went wrong, which starts when it is first asked for.

    It makes no checkpoints on its way.
    """

    def __init__(self, data, make_folder, steps=STEPS, arguments=()):
        super().__init__()
        self.data, self.make_folder, self.steps, self.arguments = data, make_folder, steps, arguments

    def __missing__(self, processes):
        folder, arguments = self.make_folder("whole"), ["--save_checkpoint=true", *self.arguments]
        status, said = run(folder, self.data, processes, arguments=arguments, seconds=600)
        assert status == 0, said
        self[processes] = Result(folder, self.steps)
        return self[processes]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return Whole(data, tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """The folder of a run of one process that was killed in its eighth step."""
    folder = tmp_path_factory.mktemp("killed")
    status, _ = run(folder, data, fault=("die", 0, 7), arguments=KEPT)
    assert status == -signal.SIGKILL
    return folder


@pytest.fixture(scope="module")
def one_of_two_killed(data, tmp_path_factory):
    """The folder of a run of two processes, the second killed in its eighth step; what was said; how long it took."""
    folder = tmp_path_factory.mktemp("killed")
    process = start(folder, data, 2, fault=("die", 1, 7), arguments=KEPT)
    wait_for_step(folder, 7)
    begin = time.monotonic()
    status, said = finish(process, folder)
    assert status != 0
    return folder, said, time.monotonic() - begin


def copy(folder, to):
    shutil.copytree(folder / "logs", to / "logs")
    return to


# ---------------------------------------------------------------------------- checkpoints


def test_a_killed_run_goes_on_and_ends_to_the_bit_as_one_that_went_through(killed, data, whole, tmp_path):
    folder = copy(killed, tmp_path)
    shutil.copytree(data, tmp_path / "data")
    for name in ("train_1_00.bin", "train_3.bin", "val_00.bin"):  # files that were not there when it began
        small_run.write_shard(tmp_path / "data" / name, [fault_run.CHANGES["bos"], 1, 2] * 900)
    status, said = run(folder, tmp_path / "data", arguments=RESUMED)
    assert status == 0 and "resumed at step 6 from" in said
    result = Result(folder)
    assert result == whole[1]
    assert "resumed 1 times, the last time at step 6" in result.run.notes


def test_the_newest_two_checkpoints_are_kept_and_nothing_half_written(killed):
    names = sorted(path.name for path in (killed / "logs").iterdir())
    steps = [killed / "logs" / f"kept_step{step:06d}.pt" for step in (4, 6)]
    assert names == sorted(["kept.txt", *(p.name for step in steps for p in (step, *checkpoint.piece_paths(step)))])


def test_a_log_says_what_the_run_is_before_its_first_step(killed, data):
    run, (before, *_) = read_run(killed / "logs" / "kept.txt"), log_of(killed).read_text().split("\nstep:")
    assert run.hardware == "1 x CPU" and run.data[0] == len([*data.glob("train_*.bin")]) and run.step == 7
    assert run.starts == [*train_gpt.TrainingSchedule(small_run.small_hyperparameters(killed)).starts]
    for begin in ("world", "software", "data", "run", "stages", "warm-up"):
        assert before.count(f"\n{begin}: ") == 1


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100_000])


def empty(path):
    path.write_bytes(b"")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(killed, data, whole, tmp_path):
    folder = copy(killed, tmp_path)
    flip_a_bit(folder / "logs" / "kept_step000006.pt")
    status, said = run(folder, data, arguments=RESUMED)
    assert status == 0
    assert re.search(r"checkpoint not used: .*kept_step000006\.pt: damaged or cut short", said)
    assert "resumed at step 4 from" in log_of(folder).read_text()
    assert Result(folder) == whole[1]


@pytest.fixture
def resume(killed, data, tmp_path, monkeypatch):
    """In this process: what a run that is to go on from a copy of the killed one would go on with."""
    monkeypatch.setattr(train_gpt, "ROOT", data)
    monkeypatch.setitem(train_gpt.PRESETS, "smoke", {**train_gpt.PRESETS["smoke"], **fault_run.CHANGES})
    copy(killed, tmp_path)

    def resume(*arguments):
        arguments = [*RESUMED, f"--log_dir={tmp_path / 'logs'}", *arguments]
        return checkpoint.resume(*train_gpt.parse_arguments(arguments, has_gpu=False))

    return resume


@pytest.mark.parametrize("damage", [flip_a_bit, cut, empty, lambda path: path.unlink()])
def test_a_checkpoint_that_is_damaged_cut_short_or_lost_is_not_taken(resume, tmp_path, damage):
    damage(tmp_path / "logs" / "kept_step000006.pt")
    assert resume()[1]["step"] == 4


def test_a_checkpoint_that_is_cut_short_while_it_is_read_is_named(killed, tmp_path):
    path, copied = killed / "logs" / "kept_step000006.pt", tmp_path / "cut_step000006.pt"
    shutil.copy(path, copied)
    program = """
import hashlib, os, sys, types
from pathlib import Path
import train_gpt
sys.path.insert(0, "records")
import checkpoint

def sha256(*data):
    os.truncate(sys.argv[1], 100)
    return hashlib.sha256(*data)

checkpoint.hashlib = types.SimpleNamespace(sha256=sha256)
try:
    checkpoint.read_checkpoint(Path(sys.argv[1]))
except train_gpt.UserError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(copied)]  # by itself, as it may end by a signal
    result = subprocess.run(
        command, cwd=Path(train_gpt.__file__).parent, stdout=subprocess.PIPE, text=True, timeout=120
    )
    assert (result.returncode, result.stdout) == (0, f"{copied}: damaged or cut short, its checksum differs\n")


def test_the_hyperparameters_are_the_checkpoints(resume, tmp_path):
    hp, content, lines = resume("--checkpoint_every=7")
    assert content["step"] == 6 and "resumed at step 6" in lines[-1]
    assert hp.adam_lr == fault_run.CHANGES["adam_lr"] and hp.run_id == "kept" and hp.checkpoint_every == 7


def test_a_run_in_small_goes_on_as_long_as_it_was(resume, tmp_path):
    path = tmp_path / "logs" / "kept_step000006.pt"
    content = checkpoint.read_checkpoint(path)
    content["hyperparameters"].update(length=2.0, bos=7)
    checkpoint.write_checkpoint(path, content)
    for arguments in ((), ("--length=2", "--num_scheduled_iterations=9")):  # nor is it taken twice where it is repeated
        hp = resume(*arguments)[0]
        assert (hp.length, hp.total_steps, hp.bos) == (2.0, 20, 7)
    with pytest.raises(train_gpt.UserError, match=r"--length=0\.5 contradicts the run's length=2\.0"):
        resume("--length=0.5")


@pytest.mark.parametrize("damage", [cut, lambda path: path.unlink()])
def test_without_any_sound_checkpoint_a_run_does_not_begin_anew(resume, tmp_path, damage):
    for path in (tmp_path / "logs").glob("*.pt"):
        damage(path)
    with pytest.raises(train_gpt.UserError, match="--resume=kept: no usable checkpoint in"):
        resume()


@pytest.mark.parametrize("argument", ["--adam_lr=0.01", "--num_scheduled_iterations=12", "--seed=1", "--run_id=other"])
def test_what_contradicts_the_checkpoint_is_refused_by_name(resume, argument):
    with pytest.raises(train_gpt.UserError, match=rf"{argument} contradicts the run's"):
        resume(argument)


def test_a_run_goes_on_where_fewer_micro_batches_fit(resume):
    assert resume("--micro_batch_tokens=32")[0].micro_batch_tokens == 32


def test_other_averages_are_refused(resume, monkeypatch):
    rows = [row._replace(averaged=False) for row in train_gpt.PARAMETERS]
    monkeypatch.setattr(checkpoint, "PARAMETERS", rows)
    with pytest.raises(train_gpt.UserError, match="had other averages than the column `averaged` of PARAMETERS says"):
        resume()


def test_a_run_without_narrow_layers_goes_on(resume, tmp_path):
    """Their bank, which is empty then, is in no checkpoint."""
    path = tmp_path / "logs" / "kept_step000006.pt"
    content = checkpoint.read_checkpoint(path)
    states = {name: state for name, state in content["optimizer"].items() if "narrow_qk_bank" not in name}
    assert len(states) < len(content["optimizer"])
    checkpoint.write_checkpoint(path, {**content, "optimizer": states})
    assert resume()[1]["step"] == 6


def test_other_stages_are_refused(resume, monkeypatch):
    stages = train_gpt.PRESETS["smoke"]["stages"]
    monkeypatch.setitem(train_gpt.PRESETS["smoke"], "stages", (stages[0]._replace(lr=2.0), *stages[1:]))
    with pytest.raises(train_gpt.UserError, match="had other STAGES"):
        resume()


@pytest.mark.parametrize("name", ["train_2_0.bin", "val_0.bin"])
@pytest.mark.parametrize("change", ["other tokens", "other length", "gone"])
def test_other_files_than_the_run_began_with_are_refused_by_name(resume, data, tmp_path, name, change):
    shutil.copytree(data, tmp_path / "other")
    path = tmp_path / "other" / name
    tokens = train_gpt.read_tokens(path, 50257)
    path.unlink()
    if change != "gone":
        small_run.write_shard(path, tokens[::-1] if change == "other tokens" else tokens[:-1])
    else:
        small_run.write_shard(path.with_name("train_9.bin" if name.startswith("train") else "val_9.bin"), tokens)
    setting = name.split("_")[0] + "_files"
    hp, content, _ = resume(f"--{setting}={tmp_path}/other/{setting[:-6]}_*.bin")
    with pytest.raises(train_gpt.UserError, match=f"--{setting}=.*began with another file, {name}, {len(tokens)} tok"):
        checkpoint.files_of_checkpoint(hp, content)


def vocabularies(folder, path):
    """The vocabulary of GPT-2 or of the runs, `path`, at another place, and two others of its size.

    In one, " the" and a token without letters change places, in the other two tokens that no other is spelled like.
    """
    tokens = path.read_bytes()
    (folder / "same.tiktoken").write_bytes(tokens)
    a, b = (base64.b64encode(token) + b" " for token in (b" the", b"!"))
    swapped = tokens.replace(b"\n" + a, b"\n-").replace(b, a, 1).replace(b"\n-", b"\n" + b)
    (folder / "other.tiktoken").write_bytes(swapped)
    *lines, a, b = tokens.splitlines()
    swapped = b.split()[0] + b" " + a.split()[1], a.split()[0] + b" " + b.split()[1]
    (folder / "last.tiktoken").write_bytes(b"\n".join([*lines, *swapped]))
    return [folder / f"{name}.tiktoken" for name in ("same", "other", "last")]


def test_a_run_goes_on_with_its_vocabulary_wherever_it_lies_and_with_no_other(resume, data, tmp_path):
    own = small_run.SMALL_VOCABULARY["vocabulary"]
    same, *others = vocabularies(tmp_path, data / own)
    assert resume()[0].vocabulary == own
    assert resume(f"--vocabulary={same}")[0].vocabulary == str(same)
    for path in (*others, ""):
        with pytest.raises(train_gpt.UserError, match=f"--vocabulary={path}: its tokens are not those that the run"):
            resume(f"--vocabulary={path}")


def test_shards_of_another_program_in_a_checkpoint_are_refused(resume, tmp_path):
    path = tmp_path / "logs" / "kept_step000006.pt"
    content = checkpoint.read_checkpoint(path)
    for shards in (
        {},
        dict(train_files=[], val_files=[]),
        dict(train_files=["a"], val_files=[1]),
        {"train_files": "a"},
    ):
        checkpoint.write_checkpoint(path, {**content, "shards": shards})
        with pytest.raises(train_gpt.UserError, match=r"kept_step000006\.pt: its .* are none of this program's"):
            resume()


def test_a_run_that_has_ended_is_not_resumed(resume, tmp_path):
    path = tmp_path / "logs" / "kept_step000006.pt"
    checkpoint.write_checkpoint(path, {**checkpoint.read_checkpoint(path), "optimizer": {}})
    with pytest.raises(train_gpt.UserError, match="the run has ended"):
        resume()


def test_a_progress_of_another_program_is_refused(resume, tmp_path):
    path = tmp_path / "logs" / "kept_step000006.pt"
    content = checkpoint.read_checkpoint(path)
    for progress in ({}, {**content["progress"], "elapsed": "long"}, {**content["progress"], "more": 1}):
        checkpoint.write_checkpoint(path, {**content, "progress": progress})
        with pytest.raises(train_gpt.UserError, match=r"kept_step000006\.pt: its .* are none of this program's"):
            resume()


def test_two_processes_go_on_to_the_bit_too(one_of_two_killed, data, whole, tmp_path):
    folder = copy(one_of_two_killed[0], tmp_path)
    status, said = run(folder, data, 2, arguments=["--resume=auto", "--run_id=kept"])  # as a scheduler starts it again
    assert status == 0, said
    assert Result(folder) == whole[2]


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on(one_of_two_killed, data, whole, tmp_path, processes):
    folder = copy(one_of_two_killed[0], tmp_path)
    status, said = run(folder, data, processes, arguments=RESUMED)
    assert status == 0, said
    assert abs(Result(folder).losses[STEPS] - whole[2].losses[STEPS]) < LOSS_TOLERANCE


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_leaves_a_checkpoint_a_line_and_a_run_to_go_on_with(data, whole, tmp_path, processes):
    # Only one rank gets the signal: the other must stop at the same step.
    status, said = run(
        tmp_path,
        data,
        processes,
        fault=("terminate", processes - 1, 5),
        arguments=[KEPT[0], "--checkpoint_every=100", KEPT[2]],
    )
    assert status == 143 if processes == 1 else status != 0
    line = assert_said_once_and_last(tmp_path, said, "stopped at step", "--resume=kept")
    step = int(re.search(r"stopped at step (\d+)", line)[1])
    assert 6 <= step <= 8 and (tmp_path / "logs" / f"kept_step{step:06d}.pt").exists()
    assert run(tmp_path, data, processes, arguments=RESUMED)[0] == 0
    assert Result(tmp_path) == whole[processes]


def test_a_process_killed_at_any_moment_of_writing_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    content = {key: kind() for key, kind in checkpoint.CHECKPOINT.items()} | {"model": {"p": torch.arange(3000.0)}}
    path, writes = tmp_path / "kept_step000002.pt", []

    class File(io.FileIO):
        """Its process does not survive so many writes."""

        def write(self, data):
            writes.append(len(data))
            if len(writes) == survived:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(data)

    survived = 0
    monkeypatch.setattr(checkpoint, "open", File, raising=False)
    checkpoint.write_checkpoint(path, content)
    assert checkpoint.read_checkpoint(path)["step"] == 0
    path.unlink()
    count = len(writes)
    for survived in (1, 2, count // 2, count):  # noqa: B007 - File reads it
        writes.clear()
        if not (child := os.fork()):
            checkpoint.write_checkpoint(path, content)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert not path.exists() and path.with_suffix(".part").exists()


def test_with_resume_auto_a_run_killed_before_its_first_checkpoint_starts_again_in_the_same_log(data, whole, tmp_path):
    arguments = [*KEPT, "--resume=auto"]
    assert run(tmp_path, data, fault=("die", 0, 1), arguments=arguments)[0] == -signal.SIGKILL
    before = log_of(tmp_path).read_text()
    (tmp_path / "logs" / "kept_step000098.pt").write_bytes(b"damaged")
    status, said = run(tmp_path, data, arguments=arguments)
    assert status == 0 and "kept_step000098.pt: damaged or cut short" in said
    assert "resumed at step 0 from the beginning" in said and log_of(tmp_path).read_text().startswith(before)
    assert (tmp_path / "logs" / "kept_step000008.pt").exists()  # not taken for one of the newest two in its place
    assert Result(tmp_path) == whole[1]


def test_resume_auto_goes_on_with_a_sound_checkpoint_and_begins_where_there_is_none(resume, tmp_path):
    arguments = ["--resume=auto", "--run_id=kept"]
    assert resume(*arguments)[1]["step"] == 6
    assert resume("--resume=auto", "--run_id=another")[1:] == (None, [])
    for path in (tmp_path / "logs").glob("*.pt"):
        cut(path)
    hp, content, lines = resume(*arguments)
    assert (hp.run_id, content) == ("kept", None) and "resumed at step 0 from the beginning" in lines[-1]
    with pytest.raises(train_gpt.UserError, match="--resume=auto: give --run_id="):
        resume("--resume=auto")


def test_a_second_process_that_goes_on_with_a_run_is_refused_while_the_first_is_alive(data, tmp_path):
    process, other = start(tmp_path, data, fault=("wait", 0, 4), arguments=KEPT), tmp_path / "other"
    wait_for_step(tmp_path, 4)
    assert wait_until(lambda: "kept_step000004.pt\n" in log_of(tmp_path).read_text())
    before = {path: path.read_bytes() for path in (tmp_path / "logs").iterdir()}
    other.mkdir()
    status, said = run(other, data, arguments=[*RESUMED, f"--log_dir={tmp_path / 'logs'}"])
    (line,) = ours(said)
    assert status == 1 and f"error: {log_of(tmp_path)}: another process is writing it" in line
    assert {path: path.read_bytes() for path in (tmp_path / "logs").iterdir()} == before
    process.kill()
    finish(process, tmp_path)
    hp = small_run.small_hyperparameters(tmp_path / "logs", run_id="kept", resume="kept")
    logfile.LogFile(train_gpt, hp, train_gpt.World()).close()  # the lock has gone with the process


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    path = tmp_path / "evil_step000002.pt"
    checkpoint.write_checkpoint(path, dict(step=Evil()))
    with pytest.raises(train_gpt.UserError, match="not a checkpoint"):
        checkpoint.read_checkpoint(path)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------- ranks that were not started alike


def start_of(hp, data, overrides=(), checkpoint=None):
    """What check_agreement gets to know about one rank, of two."""
    files = {name: sorted(data.glob(f"{name[:-6]}_*.bin")) for name in train_gpt.FILES}
    return train_gpt, hp, dict(overrides), train_gpt.World(0, 2), files, checkpoint


@pytest.fixture
def agree(monkeypatch):
    """What becomes of the ranks' starts: None, or an error that all of them raise."""

    def agree(*starts):
        told, ends = [], set()
        monkeypatch.setattr(train_gpt.dist, "all_gather_object", lambda everyone, mine: told.append(mine))
        for start in starts:
            with pytest.raises(TypeError):  # nothing is gathered yet
                checks.check_agreement(*start)

        def gather(everyone, mine):
            everyone[:] = told

        monkeypatch.setattr(train_gpt.dist, "all_gather_object", gather)
        for start in starts:
            try:
                ends.add(checks.check_agreement(*start))
            except train_gpt.UserError as error:
                ends.add(f"error: {error}")
        (end,) = ends
        return end

    return agree


def test_ranks_may_have_drawn_other_run_ids_and_have_other_folders(agree, data, tmp_path):
    shutil.copytree(data, tmp_path / "copy")
    hp = small_run.small_hyperparameters(data, run_id="drawn by 0", dtype="auto")
    other = small_run.small_hyperparameters(tmp_path / "copy", run_id="drawn by 1", dtype="float32")
    assert agree(start_of(hp, data), start_of(other, tmp_path / "copy")) is None


def test_a_run_id_that_was_drawn_is_rank_0s_on_both_ranks(data, tmp_path):
    assert run(tmp_path, data, 2, arguments=["--save_checkpoint=true"])[0] == 0
    pieces = {path.name.partition("_step")[0] for path in (tmp_path / "logs").glob("*_rows[0-9].pt")}  # of both
    assert pieces == {log_of(tmp_path).stem}


def test_what_differs_between_ranks_is_named_with_both_values_and_hosts(agree, data, monkeypatch):
    monkeypatch.setattr(checks, "vocabulary_in_words", lambda program, hp: "")  # it takes no "other"
    hp = small_run.small_hyperparameters(data)
    for name in train_gpt.SETTINGS:
        if name in ("preset", "dtype", "fp8", "log_dir", "run_id", "vocabulary", *train_gpt.FILES):
            continue
        other = train_gpt.replace(hp, **{name: "other"})
        told = f"error: the processes were not started alike: --{name} is {getattr(hp, name)} on rank 0 ({HOST}), "
        assert agree(start_of(hp, data), start_of(other, data)) == f"{told}other on rank 1 ({HOST})"
    assert "--dtype is torch.float32 on rank 0" in agree(
        start_of(hp, data), start_of(train_gpt.replace(hp, dtype="bfloat16"), data)
    )
    assert "--run_id is a on rank 0" in agree(start_of(hp, data, dict(run_id="a")), start_of(hp, data))
    checkpoint = dict(step=6, progress=dict(elapsed=12.5))
    assert "checkpoint is None on rank 0" in agree(start_of(hp, data), start_of(hp, data, checkpoint=checkpoint))


def test_another_source_version_or_data_file_on_a_rank_is_named(agree, data, tmp_path, monkeypatch):
    hp = small_run.small_hyperparameters(data)
    shutil.copytree(data, tmp_path / "other")
    (path,) = (tmp_path / "other").glob("val_0.bin")
    small_run.write_shard(path, train_gpt.read_tokens(path, 50257)[::-1])
    assert "val_files, file 1 is val_0.bin, 600" in agree(start_of(hp, data), start_of(hp, tmp_path / "other"))
    small_run.write_shard(tmp_path / "other" / "train_9.bin", [small_run.BOS])
    assert "train_files, file 5 is None on rank 0" in agree(start_of(hp, data), start_of(hp, tmp_path / "other"))
    told = iter(["PyTorch 2.13", "PyTorch 2.11"] * 2)
    monkeypatch.setattr(checks, "versions", lambda train_gpt: next(told))
    assert "software is PyTorch 2.13 on rank 0" in agree(start_of(hp, data), start_of(hp, data))
    monkeypatch.undo()
    for name in ("train_gpt.py", "checks.py", "guard.py", "logfile.py", "checkpoint.py"):
        sources = {name: iter([b"a", b"b"] * 2)}
        monkeypatch.setattr(Path, "read_bytes", lambda path, sources=sources: next(sources.get(path.name, repeat(b""))))
        assert f"alike: {name} is sha256 ca97" in agree(start_of(hp, data), start_of(hp, data))


def test_ranks_may_have_the_vocabulary_at_different_places_but_no_other_one(agree, data, tmp_path):
    same, *others = vocabularies(tmp_path, small_run.GPT2_VOCABULARY)
    hp = small_run.small_hyperparameters(data)
    starts = [start_of(train_gpt.replace(hp, vocabulary=str(path)), data) for path in (same, *others, "")]
    assert agree(start_of(hp, data), starts[0]) is None
    for start in starts[1:]:
        assert "alike: --vocabulary's tokens is sha256 " in agree(start_of(hp, data), start)


def test_two_processes_with_different_arguments_end_before_the_warm_up(data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank, arguments in enumerate(([], ["--muon_lr=0.2", "--checkpoint_every=2"])):
        (tmp_path / f"{rank}").mkdir()
        launcher = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        processes.append(start(tmp_path / f"{rank}", data, environ=launcher, arguments=arguments))
    said = [finish(process, tmp_path / f"{rank}") for rank, process in enumerate(processes)]
    assert [status for status, _ in said] == [1, 1]
    line = assert_said_once_and_last(tmp_path / "0", said[0][1] + said[1][1], "the processes were not started alike")
    assert f"--muon_lr is {train_gpt.Hyperparameters.muon_lr} on rank 0 ({HOST}), 0.2 on rank 1 ({HOST})" in line
    assert f"--checkpoint_every is 0 on rank 0 ({HOST}), 2 on rank 1 ({HOST})" in line
    assert "\nwarm-up: " not in log_of(tmp_path / "0").read_text()


# ---------------------------------------------------------------------------- ranks that die, hang or raise


def test_a_rank_that_dies_is_named_and_all_others_end(one_of_two_killed):
    folder, said, seconds = one_of_two_killed
    line = assert_said_once_and_last(folder, said, "no sign of life")
    on_cpu = "CUDA_VISIBLE_DEVICES" in ENVIRONMENT  # on a GPU, rank 0 launches one step ahead
    assert re.search(rf"error: rank 1 on {HOST} at step {'7' if on_cpu else '[78]'}: ", line)
    assert seconds < 30


def test_a_rank_that_raises_is_named_and_all_others_end(data, tmp_path):
    status, said = run(tmp_path, data, 2, fault=("raise_bug", 1, 3))
    assert status != 0
    assert_said_once_and_last(
        tmp_path, said, f"error: rank 1 on {HOST} at step 3: ValueError: a bug in this rank alone"
    )
    assert 'in raise_bug\n    raise ValueError("a bug' in said  # where it is


@pytest.mark.parametrize(
    "fault, words",
    [
        ("wait", "rank 1: <lambda> (fault_run.py:"),
        pytest.param("freeze", "rank 1: silent", marks=pytest.mark.slow),  # torchrun waits half a minute for it
    ],
)
def test_a_rank_that_hangs_is_named_with_its_place_and_all_others_end(data, tmp_path, fault, words):
    status, said = run(tmp_path, data, 2, fault=(fault, 1, 3), arguments=["--hang_timeout=7"])
    assert status != 0
    reason = "no step has ended for 7 s (--hang_timeout), rank 0: reduced (train_gpt.py:"
    assert_said_once_and_last(tmp_path, said, f"error: rank 1 on {HOST} at step 3: ", reason, words)


def test_on_the_clock_a_run_no_longer_needs_the_vocabularys_file(tmp_path):
    small_run.write_text(tmp_path)
    vocabulary = shutil.copy(small_run.GPT2_VOCABULARY, tmp_path / "own.tiktoken")
    hp = small_run.small_hyperparameters(tmp_path, vocabulary=str(vocabulary))
    trainer, log = train_gpt.Trainer(hp, train_gpt.World()), train_gpt.Log(hp, train_gpt.World())
    train, val = (train_gpt.find_files(getattr(hp, name)) for name in train_gpt.FILES)
    val_batches = train_gpt.validation_batches(val, hp, trainer.world)
    vocabulary.unlink()
    assert len(trainer.run(log, train, val_batches)) == 1 and trainer.model.prefixes.max() > 0
    log.close()


def test_a_single_process_that_hangs_is_ended_with_its_place(data, tmp_path):
    status, said = run(tmp_path, data, fault=("wait", 0, 3), arguments=["--hang_timeout=2"])
    assert status == 1
    assert_said_once_and_last(tmp_path, said, "error: at step 3: no step has ended for 2 s", "fault_run.py")


@pytest.mark.parametrize("seconds", [0, 2, 4])
def test_without_their_launcher_no_process_is_left_that_was_still_starting(data, tmp_path, seconds):
    process = start(tmp_path, data, 2)
    assert wait_until(lambda: len(processes_of(tmp_path)) == 3)
    time.sleep(seconds)
    process.kill()
    process.wait()
    assert wait_until(lambda: not processes_of(tmp_path), 40)


def test_without_their_launcher_no_process_is_left(data, tmp_path):
    process = start(tmp_path, data, 2, fault=("wait", 0, 3))
    wait_for_step(tmp_path, 3)
    assert len(processes_of(tmp_path)) == 3  # before the launcher's end: the two that it leaves may see it at once
    process.kill()
    process.wait()
    assert wait_until(lambda: not processes_of(tmp_path), 20)


@pytest.mark.parametrize("there", [True, False])
def test_where_rank_0_is_gone_its_reason_goes_into_its_log_but_makes_no_other(tmp_path, monkeypatch, there):
    class Store:
        def compare_set(self, key, before, word):
            return word.encode()

        def wait(self, keys, timeout):
            raise RuntimeError("timed out")

    watch, path = guard.Watch(train_gpt), tmp_path / "run.txt"
    watch.rank, watch.store, watch.log = 1, Store(), train_gpt.SimpleNamespace(path=path)
    if there:
        path.write_text("step:1/10\n")
    monkeypatch.setattr(os, "_exit", lambda status: None)
    watch.end(1, "rank 0 is gone")
    assert (path.read_text() if path.exists() else None) == ("step:1/10\nrank 0 is gone\n" if there else None)


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_all_within_a_second_with_one_line(data, tmp_path, processes):
    process = start(tmp_path, data, processes, fault=("wait", 0, 3))  # the other rank is inside a collective
    wait_for_step(tmp_path, 3)
    begin = time.monotonic()
    for pid in processes_of(tmp_path) if processes > 1 else [process.pid]:
        with suppress(ProcessLookupError):  # the first to end may have ended it
            os.kill(pid, signal.SIGINT)  # as the terminal does
    workers = set(processes_of(tmp_path)) - {process.pid}
    assert wait_until(lambda: not workers & set(processes_of(tmp_path)), 5)
    if processes == 1:
        process.wait(timeout=5)
    assert time.monotonic() - begin < 1
    status, said = finish(process, tmp_path)
    assert status == 130 if processes == 1 else status != 0
    assert_said_once_and_last(tmp_path, said, "SIGINT: ended at step 3; log: ")
    assert processes > 1 or "Traceback" not in said  # torchrun prints its own


# ---------------------------------------------------------------------------- terminals


def pipe(reader):
    ours, theirs = os.pipe()
    if not reader:
        os.close(ours)
    return os.fdopen(theirs, "w", encoding="ascii")


def terminal_that_is_gone():
    ours, theirs = pty.openpty()
    os.close(ours)
    return os.fdopen(theirs, "w")


def closed_file():
    with open(os.devnull, "w") as file:
        return file


OUTPUTS = {
    "full disk": lambda: os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"),
    "closed pipe": lambda: pipe(reader=False),
    "stopped reader": lambda: pipe(reader=True),
    "closed file": closed_file,
    "terminal that is gone": terminal_that_is_gone,
    "no file at all": lambda: None,
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_terminal_that_can_t_take_a_line_drops_it(output):
    terminal = guard.Terminal(OUTPUTS[output]())
    begin = time.monotonic()
    for _ in range(200):
        print("x" * 1000, file=terminal, flush=True)
    assert time.monotonic() - begin < 10  # a stopped reader is waited for once


def test_a_terminal_shows_letters_that_it_lacks_as_escapes_and_goes_on_when_it_is_read_again(tmp_path):
    ours, theirs = os.pipe()
    terminal = guard.Terminal(os.fdopen(theirs, "w", encoding="ascii"))
    print("größe \udcff", file=terminal)
    assert os.read(ours, 1 << 20) == b"gr\\xf6\\xdfe \\udcff\n"
    print("x" * (1 << 17), file=terminal)  # more than fits
    os.read(ours, 1 << 17)
    print("again", file=terminal)
    assert os.read(ours, 1 << 20).endswith(b"again\n")


def test_a_run_whose_output_goes_nowhere_ends_well_and_its_log_is_whole(data, tmp_path, whole):
    # Its standard output is full, its errors go into a closed pipe, and it has neither UTF-8 nor its letters.
    locale = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
    with open("/dev/full", "w") as full, pipe(reader=False) as broken:
        arguments = ["--run_id=größe", "--save_checkpoint=true"]
        process = start(tmp_path, data, arguments=arguments, environ=locale, stdout=full, stderr=broken)
        assert finish(process, tmp_path)[0] == 0
    assert log_of(tmp_path).name == "größe.txt"
    assert Result(tmp_path) == whole[1]


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_goes_away_ends_a_run_with_its_reason_in_the_log_unless_it_was_started_by_nohup(
    data, tmp_path, nohup
):
    def with_a_terminal():
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        if nohup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    ours, theirs = pty.openpty()
    # Long enough not to come to its end before the signal does
    steps = ["--num_scheduled_iterations=200"] if not nohup else []
    process = start(
        *(tmp_path, data, 1, ("freeze", 0, 5), steps),
        **{"stdin": theirs, "stdout": theirs, "stderr": theirs, "preexec_fn": with_a_terminal},
    )
    os.close(theirs)
    wait_for_step(tmp_path, 5)
    assert wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "T")
    os.close(ours)
    process.send_signal(signal.SIGCONT)
    status, _ = finish(process, tmp_path)
    last = log_of(tmp_path).read_text().splitlines()[-1]
    assert (status, last[:8]) == (0, "sample: ") if nohup else (129, "train_gp"), last
    assert nohup or last.startswith("train_gpt.py: SIGHUP: ended at step ")


# ---------------------------------------------------------------------------- numbers, memory, disk, data


@pytest.mark.parametrize(
    "fault, words",
    [
        ("poison", [f"the gradient of {train_gpt.PARAMETERS[0].name} in step 4 is not finite", "more parameters"]),
        ("poison_gradient", ["the gradient of ngrams in step 4 is not finite; "]),
    ],
)
def test_a_number_that_is_not_finite_ends_the_run_and_is_named(data, tmp_path, fault, words):
    status, said = run(tmp_path, data, fault=(fault, 0, 3), arguments=[*KEPT[:1], "--checkpoint_every=2"])
    assert status == 1
    assert_said_once_and_last(tmp_path, said, *words, "kept_nonfinite_rank0.pt")
    saved = torch.load(tmp_path / "logs" / "kept_nonfinite_rank0.pt", weights_only=True)
    assert saved["step"] == 4 and saved["bad"][0] in words[0]
    assert saved["model"]["mlp_bank"].isfinite().all() == (fault == "poison_gradient")
    newest = checkpoint.checkpoints_of("kept", tmp_path / "logs")[-1]
    content = checkpoint.read_checkpoint(newest)  # from before
    assert content["step"] <= 3 and all(p.isfinite().all() for p in content["model"].values())


def test_a_state_that_is_not_finite_and_cannot_be_saved_is_told_and_half_of_it_is_removed(tmp_path, monkeypatch):
    def save(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("file write failed")

    trainer = train_gpt.Trainer(small_run.small_hyperparameters(tmp_path), train_gpt.World())
    trainer.optimizer.largest.append((3, ["embed"], torch.tensor([math.inf])))
    monkeypatch.setattr(torch, "save", save)
    words = r"embed in step 4 is not finite; .*_nonfinite_rank0\.pt could not be written \(file write failed\)$"
    with pytest.raises(train_gpt.UserError, match=words):
        trainer.check_gradients(SimpleNamespace(path=tmp_path / "logs" / "small.txt"), lag=0)
    assert not any((tmp_path / "logs").iterdir())
    monkeypatch.setattr(train_gpt, "__file__", "/nowhere/train_gpt.py")  # a copy without records/ saves nothing
    trainer.optimizer.largest.append((3, ["embed"], torch.tensor([math.inf])))
    with pytest.raises(train_gpt.UserError, match=r"embed in step 4 is not finite$"):
        trainer.check_gradients(None, lag=0)


@pytest.mark.parametrize(
    "fault, words",
    [
        ("run_out_of_gpu_memory", ["Tried to allocate 20.00 GiB", "79.11 GiB of which 1.31 GiB is free"]),
        ("run_out_of_memory", ["1152921504606846976 bytes"]),
    ],
)
def test_out_of_memory_says_what_was_asked_and_what_to_change(data, tmp_path, fault, words):
    status, said = run(tmp_path, data, fault=(fault, 0, 3))
    assert status == 1
    assert_said_once_and_last(
        tmp_path, said, "at step 3: out of memory: ", *words, "tokens in STAGES", "--val_batch_size"
    )


def limit_files(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_stops_neither_the_run_nor_leaves_a_bad_checkpoint_or_a_gap_in_the_log(data, tmp_path):
    # As large as the log may become, not nearly as large as a checkpoint; then it may not even grow any more.
    process = start(tmp_path, data, fault=("freeze", 0, 5), arguments=KEPT, preexec_fn=limit_files(1 << 20))
    wait_for_step(tmp_path, 5)
    assert wait_until(lambda: f"{Path(f'/proc/{process.pid}/stat').read_text().split()[2]}" == "T")
    size = log_of(tmp_path).stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    (tmp_path / "said").rename(tmp_path / "said_before")  # the process's own output is small
    process.send_signal(signal.SIGCONT)
    process.wait(timeout=60)
    said = (tmp_path / "said_before").read_text()
    assert "no checkpoint at step 2: " in said and "training goes on" in said
    assert not list((tmp_path / "logs").glob("*.p*"))
    assert f"{log_of(tmp_path)}: cannot write the log (File too large); training goes on" in said
    assert log_of(tmp_path).stat().st_size == size
    tail = said.partition("not written:\n")[2]
    assert tail.startswith("step:6/10") and "validation loss" in tail  # the log's end is on the terminal


def test_when_the_disk_has_room_again_the_log_has_every_line(data, tmp_path, monkeypatch, capsys):
    log = logfile.LogFile(train_gpt, small_run.small_hyperparameters(tmp_path), train_gpt.World())
    log.write("first")
    full = [True]
    log.file = Full(log.file, full)
    log.write("second")
    log.write("third")
    full.clear()
    log.write("fourth")
    log.close()
    assert log.path.read_text() == "first\nsecond\nthird\nfourth\n"
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_line_that_a_full_disk_cut_short_keeps_no_run_from_going_on_while_it_is_full(tmp_path, monkeypatch, capsys):
    hp = small_run.small_hyperparameters(tmp_path, resume="small")
    (tmp_path / "small.txt").write_bytes(b"first\nsec")
    full, opened = [True, True], open
    monkeypatch.setattr("builtins.open", lambda *a, **k: Full(opened(*a, **k), full))
    log = logfile.LogFile(train_gpt, hp, train_gpt.World())
    monkeypatch.undo()
    log.write("third")
    assert capsys.readouterr().err.count("No space left on device") == 1
    log.write("fourth")
    full.clear()
    log.write("fifth")
    log.close()
    assert log.path.read_text() == "first\nsec\nthird\nfourth\nfifth\n"
    assert "No space" not in capsys.readouterr().err


class Full:
    """A file that takes three bytes, then no more while the disk is full."""

    def __init__(self, file, full):
        self.file, self.full = file, full

    def write(self, data):
        if not self.full:
            return self.file.write(data)
        if len(self.full) == 1:
            self.full.append(True)
            return self.file.write(data[:3])
        raise OSError(28, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("fault", ["no_vocabulary", "lose_the_vocabulary", "lose_the_tools"])
def test_a_run_whose_vocabulary_or_records_are_gone_by_its_end_ends_well(data, tmp_path, fault):
    vocabulary = shutil.copy(data / small_run.SMALL_VOCABULARY["vocabulary"], tmp_path / "own.tiktoken")
    options = dict(fault=(fault, 0, 8), arguments=[f"--vocabulary={vocabulary}"])
    options = dict(arguments=["--vocabulary="]) if fault == "no_vocabulary" else options
    status, said = run(tmp_path, data, **options)
    assert status == 0 and vocabulary.exists() == (fault != "lose_the_vocabulary"), said
    last = log_of(tmp_path).read_text().splitlines()[-1]  # a vocabulary that is lost has been read
    assert last.startswith("sample: " if fault == "lose_the_vocabulary" else "validation loss ")


def test_a_log_folder_that_is_removed_comes_back_with_the_whole_log(data, tmp_path):
    process = start(tmp_path, data, fault=("freeze", 0, 5), arguments=KEPT)
    wait_for_step(tmp_path, 5)
    assert wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "T")
    shutil.rmtree(tmp_path / "logs")
    process.send_signal(signal.SIGCONT)
    assert finish(process, tmp_path)[0] == 0
    assert Result(tmp_path).run.step == STEPS
    assert log_of(tmp_path).read_text().startswith('"""')


@pytest.mark.parametrize(
    "fault, words",
    [
        ("lose_the_next_shard", ["train_", ".bin: ", "No such file"]),
        ("change_the_next_shard", ["train_", ".bin: changed since the run began"]),
        ("stall_file_system", ["train_", ".bin: not read within 2.4 s (--hang_timeout)"]),
    ],
)
def test_a_data_file_that_is_lost_changes_or_can_t_be_read_is_named(data, tmp_path, fault, words):
    mine = tmp_path / "data"
    shutil.copytree(data, mine)
    status, said = run(tmp_path, mine, fault=(fault, 0, 1), arguments=["--hang_timeout=3"])
    assert status == 1
    assert_said_once_and_last(tmp_path, said, *words)


# ---------------------------------------------------------------------------- soak


SOAK_RUNS, SOAK_STEPS = 20, 600  # together the steps of 300 smoke runs of 40
SOAK = [f"--num_scheduled_iterations={SOAK_STEPS - 3}", "--num_extension_iterations=3", "--val_loss_every=100"]


@pytest.fixture(scope="module")
def long_whole(data, tmp_path_factory):
    return Whole(data, tmp_path_factory.mktemp, SOAK_STEPS, SOAK)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SOAK_RUNS))
def test_a_run_killed_at_random_again_and_again_ends_to_the_bit(data, long_whole, tmp_path, seed):
    # SIGKILL or SIGTERM, to one process or all, at any moment of a start or a run.
    chance = random.Random(seed)
    processes = chance.choice([1, 2])
    logs = tmp_path / "logs"
    begin = ["--run_id=kept", "--checkpoint_every=20", "--save_checkpoint=true", *SOAK]
    for _ in range(20):
        arguments = RESUMED if checkpoint.checkpoints_of("kept", logs) else begin
        if arguments == begin:
            shutil.rmtree(logs, ignore_errors=True)
        process = start(tmp_path, data, processes, arguments=arguments)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=chance.uniform(1, 40))
        if process.poll() is None:
            number = chance.choice([signal.SIGKILL, signal.SIGTERM])
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice([process.pid, *processes_of(tmp_path)]), number)
        status, said = finish(process, tmp_path, orphans=20)
        if status == 0 or "the run has ended" in said:  # the kill came after the last checkpoint
            break
    else:
        status, said = run(tmp_path, data, processes, arguments=RESUMED, seconds=600)
    assert status == 0 or "the run has ended" in said, said
    assert Result(tmp_path, SOAK_STEPS) == long_whole[processes]
