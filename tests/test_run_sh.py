"""run.sh: what it starts for which arguments, what it refuses before anything is fetched, where it can be started."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
# Notes what it is asked to do, and does only what is quick: to ask the program what its arguments mean.
NOTING_PYTHON = f"""#!/bin/sh
case "$1" in
-) exec '{sys.executable}' "$@" ;;
esac
[ -e run.sh ] && printf '%s\\n' "$*" >> "$NOTES"
"""
OURS = ("NGPU", "TRAIN_SHARDS", "DATA_PATH", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "PYTHON")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OURS}


@pytest.fixture
def run(tmp_path):
    """Runs run.sh; returns its exit status, its last line on stderr and what it has started."""
    (tmp_path / "python").write_text(NOTING_PYTHON)
    (tmp_path / "python").chmod(0o755)
    notes = tmp_path / "notes"
    environment = {**ENVIRONMENT, "PYTHON": str(tmp_path / "python"), "NOTES": str(notes), "CUDA_VISIBLE_DEVICES": ""}

    def run(*arguments, command=(REPOSITORY / "run.sh",), **env):
        notes.write_text("")
        command = [*map(str, command), *arguments]
        result = subprocess.run(
            command, env=environment | env, cwd=tmp_path, capture_output=True, text=True, timeout=100
        )
        assert "Traceback" not in result.stderr
        return result.returncode, result.stderr.strip().rpartition("\n")[2], notes.read_text().splitlines()

    return run


@pytest.fixture
def plan(monkeypatch, capsys):
    """What run.sh makes of arguments, on a machine with that many GPUs: (GPUs, processes, data); or it exits."""
    (program,) = re.findall(r"<<'END'\n(.*?)\nEND\n", (REPOSITORY / "run.sh").read_text(), re.DOTALL)

    def plan(*arguments, gpus=0, **env):
        monkeypatch.setattr(os, "environ", ENVIRONMENT | env)
        monkeypatch.setattr(sys, "argv", ["-", *arguments])
        monkeypatch.setattr(sys, "path", [str(REPOSITORY), *sys.path])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "default_generators", (None,) * gpus)
        exec(program, {})
        processes, data = capsys.readouterr().out.split()
        return int(processes), data

    return plan


def test_without_a_gpu_it_makes_the_sample_and_trains_on_it(plan):
    assert plan() == (1, "sample")
    assert plan("--preset=auto", NGPU="2") == (2, "sample")
    assert plan("--preset=speedrun") == (1, "fineweb10B")


@pytest.mark.parametrize(("gpus", "processes"), [(1, 1), (2, 2), (3, 2), (6, 4), (8, 8), (9, 8)])
def test_on_gpus_it_fetches_fineweb_and_trains_on_all_that_share_a_step_evenly(plan, gpus, processes):
    assert plan(gpus=gpus) == (processes, "fineweb10B")
    assert plan("--preset=smoke", gpus=gpus, NGPU="1") == (1, "sample")


@pytest.mark.parametrize("argument", ["--resume=some", "--train_files=mine/*.bin", "--val_files=mine/*.bin"])
@pytest.mark.parametrize("preset", ["speedrun", "smoke"])
def test_a_run_that_is_resumed_or_has_its_own_data_fetches_nothing(plan, preset, argument):
    assert plan(f"--preset={preset}", argument) == (1, "none")


def test_resume_auto_fetches_data_only_where_there_is_no_checkpoint(plan, tmp_path):
    arguments = ["--resume=auto", "--run_id=mine", f"--log_dir={tmp_path}"]
    assert plan(*arguments) == (1, "sample")
    (tmp_path / "mine_step000010.pt").touch()
    assert plan(*arguments) == (1, "none")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("help", "argument 'help' is not of the form --name=value"),
        ("--val_tokens=5", "--val_tokens must be a multiple"),
        ("--preset=speedrn", "--preset=speedrn: choose one of speedrun, smoke"),
        ("--dtype=float32", "--dtype=float32: attention on a GPU takes bfloat16"),
    ],
)
def test_what_the_program_refuses_is_refused_in_its_words(plan, argument, words):
    with pytest.raises(SystemExit, match=words) as exit:
        plan(argument, gpus=1)
    assert exit.value.code.startswith("train_gpt.py: error: ")


def test_more_processes_than_gpus_are_refused(plan):
    with pytest.raises(SystemExit, match="NGPU=4: this host has 2 GPUs"):
        plan(NGPU="4", gpus=2)


def test_refused_arguments_start_nothing(run):
    status, message, started = run("--val_los_every=5")
    assert status == 1 and "train_gpt.py: error: unknown hyperparameter --val_los_every" in message and started == []


COUNTS = [("NGPU", value) for value in ("0", "3", "x", "16", "-1")]
COUNTS += [("TRAIN_SHARDS", value) for value in ("x", "0", "104", "1.5")]


@pytest.mark.parametrize(("name", "value"), COUNTS)
def test_a_wrong_count_starts_nothing(run, name, value):
    status, message, started = run(**{name: value})
    assert status == 1 and message.startswith(f"run.sh: {name}={value}: ") and started == []


def test_processes_of_one_host_meet_without_a_name_of_the_host(run, tmp_path):
    """The launcher must work where the host's own name does not resolve: no rank may be given that name."""
    status, _, (data, command) = run("--seed=1", NGPU="2")
    assert (status, data) == (0, "data/sample.py") and command.endswith(" train_gpt.py --seed=1")
    (tmp_path / "train_gpt.py").write_text("import os; os.write(1, os.environ['MASTER_ADDR'].encode() + b'\\n')")
    command = [sys.executable, *command.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.stdout.splitlines() == ["127.0.0.1"] * 2, result.stderr


def test_it_runs_through_a_link_with_sh_and_in_a_folder_of_any_name(run, tmp_path):
    (tmp_path / "link").symlink_to(REPOSITORY / "run.sh")
    copy = tmp_path / "a [v2] *?"
    copy.mkdir()
    shutil.copy(REPOSITORY / "run.sh", copy)
    for command in ([tmp_path / "link"], ["sh", "link"], ["sh", REPOSITORY / "run.sh"], [copy / "run.sh"]):
        for option in ("--help", "-h"):
            assert run(option, command=command) == (0, "", ["train_gpt.py --help"])


def test_what_would_run_is_told_before_anything_is_fetched(run):
    assert run("--describe", "--length=0.25", NGPU="2") == (0, "", ["train_gpt.py --describe --length=0.25"])


@pytest.fixture
def checkout(tmp_path):
    """A folder with run.sh and a program that needs no package; what runs run.sh there, with its own .venv."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    shutil.copy(REPOSITORY / "run.sh", folder)
    (folder / "train_gpt.py").write_text("print('helped')")
    (folder / "requirements.txt").touch()

    def run(**env):
        command = [folder / "run.sh", "--help"]
        return subprocess.run(command, env=ENVIRONMENT | env, capture_output=True, text=True, timeout=200)

    run.folder = folder
    return run


@pytest.mark.parametrize("lacking", ["Python", "pip"])
def test_a_venv_that_lacks_its_python_or_pip_is_mended(checkout, lacking):
    venv = checkout.folder / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (venv / "own").touch()
    shutil.copy(checkout.folder / "requirements.txt", venv / "installed-requirements.txt")
    if lacking == "Python":
        (venv / "bin" / "python").unlink()
        (venv / "bin" / "python").symlink_to("/nowhere/python3")
    result = checkout()
    assert (result.returncode, result.stdout) == (0, "helped\n"), result.stderr
    assert "making the virtual environment" in result.stderr and "installing" in result.stderr
    assert (venv / "own").exists() == (lacking == "pip"), "what works is kept"
    result = checkout()
    assert (result.returncode, result.stdout, result.stderr) == (0, "helped\n", ""), "the second time all is there"


@pytest.mark.parametrize(
    ("has_ensurepip", "words"),
    [("false", "apt install python3-venv"), ("true", "could not make .venv, for the reason above")],
)
def test_python3_venv_is_advised_only_where_it_is_what_lacks(checkout, tmp_path, has_ensurepip, words):
    (tmp_path / "python3").write_text(
        f"""#!/bin/sh
case "$*" in
*ensurepip*) exec {has_ensurepip} ;;
"-m venv"*) exit 1 ;;
esac
"""
    )
    (tmp_path / "python3").chmod(0o755)
    result = checkout(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 1 and result.stderr.endswith(f"{words}\n")
    assert ("apt" in result.stderr) == ("apt" in words)


def test_a_checkout_that_cannot_be_written_says_so(checkout):
    sandbox = ["unshare", "--map-root-user", "--mount"]
    if os.geteuid():  # root may write everywhere, but not to a mount that is read-only
        sandbox, prepare = [], f"chmod a-w '{checkout.folder}'"
    else:
        prepare = f"mount --bind -o ro '{checkout.folder}' '{checkout.folder}'"
    command = [*sandbox, "sh", "-c", f"{prepare} && exec '{checkout.folder}/run.sh' --help"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    if "run.sh" not in result.stderr:
        pytest.skip(f"no read-only mount here: {result.stderr}")
    assert result.returncode == 1
    assert re.search(rf"run\.sh: cannot write to {checkout.folder}: no permission, or read-only\n$", result.stderr)
    assert "apt" not in result.stderr


def test_a_checkout_with_windows_line_ends_keeps_scripts_as_they_are(tmp_path):
    def git(*arguments, cwd):
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        return subprocess.run(["git", *who, *arguments], cwd=cwd, check=True, capture_output=True)

    source, names = tmp_path / "source", ["run.sh", "train_gpt.py", ".ci/run", "data/sample.py"]
    source.mkdir()
    for name in (".gitattributes", *names):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)
    git("init", "-q", cwd=source)
    git("add", ".", cwd=source)
    git("commit", "-qm", "all", cwd=source)
    git(
        "-c",
        "core.autocrlf=true",
        "-c",
        "core.eol=crlf",
        "clone",
        "-q",
        str(source),
        str(tmp_path / "clone"),
        cwd=tmp_path,
    )
    for name in names:
        assert (tmp_path / "clone" / name).read_bytes() == (REPOSITORY / name).read_bytes()
