"""records/race.py and rerun.py: who is better, by how much, how sure; and nothing lost when a race is killed.

Most contestants are a toy: its losses and times follow a law, so that the right answers are known.
"""

import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent

import race  # noqa: E402
import rerun  # noqa: E402
from answer import answer, judged  # noqa: E402
from rerun import Refusal, logged_program  # noqa: E402
from runlog import Run, read_run  # noqa: E402

RECORD = ROOT / "records" / "2026-11-25_Fp8Gradients"
TOY = '''
"""Trains nothing: final loss = a - b ln(steps) + noise[seed], time = ms a step. Fails while the file `fail` exists."""
import math, os, sys, time
from pathlib import Path

DEFAULTS = dict(
    num_scheduled_iterations="100", num_extension_iterations="20", a="5", b="0.3", ms="50", noise="0", fail="",
    pause="0", run_id="", log_dir="logs", val_loss_every="50", seed="0", val_tokens="1",
)
if "--help" in sys.argv:
    print("A toy, at first --pause=1 in a sentence", *(f"  --{k}={v}" for k, v in DEFAULTS.items()), sep="\\n")
    sys.exit()
given = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
hp = {**DEFAULTS, **given}
if hp["fail"] and os.path.exists(hp["fail"]):
    sys.exit("a line before\\ntrain_gpt.py: error: told to fail\\n=====")
total = round((int(hp["num_scheduled_iterations"]) + int(hp["num_extension_iterations"])) * float(hp.get("length", 1)))
noise = hp["noise"].split(",")
loss = float(hp["a"]) - float(hp["b"]) * math.log(total) + float(noise[int(hp["seed"]) % len(noise)])
with open(Path(hp["log_dir"], hp["run_id"] + ".txt"), "x", buffering=1) as log:
    def say(*lines): print(*lines, sep="\\n", file=log)
    say(Path(__file__).read_text(), "=" * 100, "Running Python 3.12.3", "Running PyTorch 2.13.0, Triton 3.7.1")
    say("preset: speedrun; overrides: " + " ".join(f"--{k}={v}" for k, v in given.items()), "=" * 100, "world: 1 x Toy")
    say(f"card {os.environ.get('CUDA_VISIBLE_DEVICES')} cache {os.environ['TORCHINDUCTOR_CACHE_DIR']}")
    say(f"stages: begin at steps 0 1 2 {total - 1}")
    for step in range(total + 1):
        time.sleep(float(hp["pause"]))
        stamp = f"train_time:{float(hp['ms']) * step:.0f}ms step_avg:0ms"
        if step % int(hp["val_loss_every"]) == 0 or step == total:
            say(f"step:{step}/{total} val_loss:{loss if step == total else 11 - step / total:.4f} {stamp}")
        say(f"step:{step}/{total} {stamp}")
    say("peak memory allocated: 123 MiB reserved: 200 MiB")
'''


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    return path


def arguments_for(out, *arguments):
    return [sys.executable, str(ROOT / "records" / "race.py"), *map(str, arguments), "--out", str(out)]


def environment(**more):
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def run_race(monkeypatch, capsys):
    """Runs a race in this process; returns what it printed, and results.json."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # torch sets the first for itself when it compiles
        monkeypatch.delenv(name, raising=False)

    def run(out, *arguments, common=(), status=0, cards=""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cards)
        assert race.main([*map(str, arguments), "--out", str(out), "--", *common]) == status
        results = out / "results.json"
        return "".join(capsys.readouterr()), json.loads(results.read_text()) if results.exists() else None

    return run


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)


def alive(out):
    """Processes that run a source of this race."""
    found = subprocess.run(["pgrep", "-f", f"{out}/sources/"], capture_output=True, text=True)
    return found.stdout.split()


def logs(out):
    return {path.name: read_run(path) for path in out.glob("runs/*/*/*.txt")}


# ---- the answer


def independent_time_to_target(steps, losses, seconds, target):
    """(steps, error, seconds, error), through covariance matrices of numpy's fits."""

    def fit(x, y):
        (slope, height), unscaled = np.polyfit(x, y, 1, cov="unscaled")
        return slope, height, unscaled * np.sum((y - slope * x - height) ** 2) / (len(x) - 2)

    steps, losses, seconds = map(np.array, (steps, losses, seconds))
    b, a, covariance = fit(np.log(steps), losses)
    u = (target - a) / b
    gradient = np.array([-u / b, -1 / b])
    u_error = math.sqrt(gradient @ covariance @ gradient)
    d, c, covariance = fit(steps, seconds)
    at = math.exp(u)
    own = np.array([at, 1.0]) @ covariance @ np.array([at, 1.0])
    return at, at * u_error, c + d * at, math.sqrt((d * at * u_error) ** 2 + own)


def run_of(steps, loss, seconds, gpus=1):
    return Run(Path("x"), total=steps, losses={steps: loss}, times={steps: 1000 * seconds}, gpus=["H100"] * gpus)


def test_time_to_the_target_follows_a_known_law_exactly():
    """5 - 0.5 ln(steps) is 2 at e^6 = 403.43 steps; 0.1 s a step and 3 s more, on two GPUs: 86.69 GPU-seconds."""
    runs = [run_of(n, 5 - 0.5 * math.log(n), 3 + 0.1 * n, gpus=2) for n in (300, 400, 500)]
    found = answer(runs, target=2.0)
    assert found.steps == pytest.approx(math.exp(6))
    assert found.seconds == pytest.approx(2 * (3 + 0.1 * math.exp(6)))
    assert found.steps_error == pytest.approx(0, abs=1e-6)
    assert not found.outside


def test_time_to_the_target_and_its_error_are_those_of_another_formula():
    generator = np.random.default_rng(0)
    steps = [330, 330, 330, 380, 380, 450]
    losses = [5 - 0.28 * math.log(n) + e for n, e in zip(steps, generator.normal(0, 0.001, 6), strict=True)]
    seconds = [2 + 0.35 * n + e for n, e in zip(steps, generator.normal(0, 0.5, 6), strict=True)]
    for target in (3.35, 3.2):
        found = answer([run_of(*figures) for figures in zip(steps, losses, seconds, strict=True)], target)
        expected = independent_time_to_target(steps, losses, seconds, target)
        assert (found.steps, found.steps_error, found.seconds, found.seconds_error) == pytest.approx(expected)
        assert found.outside == (not 330 <= found.steps <= 450)


@pytest.mark.parametrize(
    "losses, why",
    [({300: 3.4}, "two lengths"), ({300: 3.3, 400: 3.4}, "does not fall"), ({300: 3.4, 400: 3.3999}, "hundred times")],
)
def test_there_is_no_time_to_the_target_without_a_slope_to_read_it_from(losses, why):
    assert why in answer([run_of(n, loss, n) for n, loss in losses.items()], target=3.0)


def test_a_race_of_known_laws_is_answered_as_worked_out_by_hand(toy, tmp_path, run_race):
    """120 steps are the whole run, so 60 and 90 here. Losses are logged with four decimals."""
    noise, base_noise = [0.002, -0.001, 0.0], [0.003, 0.0, -0.001]
    out = tmp_path / "out"
    told, found = run_race(
        out, f"base={toy} --noise={','.join(map(str, base_noise))}",
        f"new={toy} --b=0.31 --ms=40 --noise={','.join(map(str, noise))}",
        *("--runs", 3, "--lengths", "0.5,0.75", "--target", 3.7),
    )  # fmt: skip
    losses = {n: [round(5 - 0.31 * math.log(n) + e, 4) for e in noise] for n in (60, 90)}
    base = {n: [round(5 - 0.3 * math.log(n) + e, 4) for e in base_noise] for n in (60, 90)}
    for length, steps in ((0.5, 60), (0.75, 90)):
        entry = next(e for e in found["lengths"] if (e["contestant"], e["length"]) == ("new", length))
        assert entry["complete_runs"] == 3 and entry["steps"] == [steps]
        assert entry["loss"]["mean"] == pytest.approx(np.mean(losses[steps]))
        assert entry["loss"]["std"] == pytest.approx(np.std(losses[steps], ddof=1))
        assert entry["total_seconds"]["mean"] == pytest.approx(0.040 * steps)
        assert entry["stage_ms"]["stage 2"]["mean"] == pytest.approx(40)
        assert [run["peak_memory_mib"][0] for run in entry["runs"]] == [123] * 3
        pair = next(d for d in found["differences"] if d["length"] == length)
        interval = stats.ttest_rel(losses[steps], base[steps]).confidence_interval(0.95)
        assert pair["loss"]["mean"] - pair["loss"]["half"] == pytest.approx(interval.low)
        assert pair["loss"]["mean"] + pair["loss"]["half"] == pytest.approx(interval.high)
        assert pair["seconds"]["mean"] == pytest.approx(-0.010 * steps)
    steps = [60] * 3 + [90] * 3
    expected = independent_time_to_target(steps, losses[60] + losses[90], [0.04 * n for n in steps], 3.7)
    new, old = (found["contestants"][name]["answer"] for name in ("new", "base"))
    assert (new["steps"], new["steps_error"], new["seconds"]) == pytest.approx(expected[:3])
    expected_old = independent_time_to_target(steps, base[60] + base[90], [0.05 * n for n in steps], 3.7)
    assert (old["steps"], old["steps_error"], old["seconds"]) == pytest.approx(expected_old[:3])
    assert new["ratio"] == pytest.approx(expected[2] / expected_old[2])
    relative = math.hypot(expected[3] / expected[2], expected_old[3] / expected_old[2])
    assert new["ratio_error"] / new["ratio"] == pytest.approx(relative)
    assert new["outside"] is False and found["contestants"]["new"]["shortest_length"] == 0.75
    text = (out / "README.md").read_text()
    assert "| new | 0.75 | 3 of 3 | 90 | " in text and "faster" in text and "faster" in told
    assert (out / "race.png").read_bytes().startswith(b"\x89PNG")


def test_a_difference_within_the_noise_and_a_target_outside_are_called_so(toy, tmp_path, run_race):
    told, found = run_race(
        tmp_path / "out", f"base={toy}", f"new={toy} --noise=0.01,-0.012", "--runs", 2, "--lengths", "0.1,0.2",
        "--target", 3.0,
    )  # fmt: skip
    assert "within the noise" in told and "outside the lengths that were run" in told
    assert found["contestants"]["new"]["answer"]["outside"] is True
    told, _ = run_race(tmp_path / "one", f"base={toy}", f"new={toy} --b=0.31", "--runs", 1, "--lengths", "0.1")
    assert "noise unknown: too few runs" in told and "a fit takes runs of two lengths or more" in told


def test_what_is_not_beyond_half_of_its_interval_is_noise():
    words = ("less", "more")
    told = {(0.9, 1.0): "within the noise", (-0.9, 1.0): "within the noise", (1.1, 1.0): "more", (-1.1, 1.0): "less"}
    assert {figures: judged(*figures, words) for figures in told} == told


# ---- contestants and lengths


def test_a_length_is_a_share_of_all_counts_of_steps_that_a_record_program_has(tmp_path):
    """The record's logs are of quarters; its program's own full run is 1515 + 40 steps, momentum's counts with it."""
    contestant = race.enlist(f"base={RECORD} --muon_lr=0.02", [], tmp_path, on_gpu=True)
    assert contestant.arguments == ["--muon_lr=0.02"]
    assert race.length_arguments(contestant, 0.22) == [
        *("--num_scheduled_iterations=333", "--num_extension_iterations=9"),
        *("--muon_momentum_warmup=66", "--muon_momentum_cooldown=11", "--val_loss_every=86"),
    ]
    logged = next(RECORD.glob("*.txt")).read_text()
    assert logged.startswith((tmp_path / "sources" / contestant.source / "train_gpt.py").read_text() + "\n====")
    smoke = race.enlist(f"base={RECORD} --num_extension_iterations=8", [], tmp_path, on_gpu=False)
    assert smoke.arguments[0] == "--preset=smoke"
    assert race.length_arguments(smoke, 0.5)[:2] == ["--num_scheduled_iterations=18", "--num_extension_iterations=4"]


def test_a_program_that_knows_lengths_is_given_one(toy, tmp_path):
    toy.write_text(TOY.replace('pause="0"', 'pause="0", length="1.0"'))
    contestant = race.enlist(f"new={toy}", [], tmp_path, on_gpu=True)
    assert race.length_arguments(contestant, 0.25) == ["--length=0.25", "--val_loss_every=8"]
    own = race.enlist(f"new={toy} --length=0.5 --val_loss_every=7", [], tmp_path, on_gpu=True)
    assert race.length_arguments(own, 0.25) == ["--length=0.125"]


def test_a_contestant_is_a_file_a_revision_or_a_log_with_its_settings(tmp_path):
    (tmp_path / "log.txt").write_text(
        "print('hello')\n\n"
        + "=" * 100
        + "\nRunning Python 3.12.3\nRunning PyTorch 2.13.0\npreset: speedrun; overrides: "
        "--run_id=a --num_scheduled_iterations=380 --muon_lr=0.02 --val_files=v.bin --seed=3\n" + "=" * 100 + "\n"
    )
    assert race.read_program(str(tmp_path / "log.txt")) == ("print('hello')\n", ["--muon_lr=0.02"])
    show = subprocess.run(["git", "-C", str(ROOT), "show", "HEAD:train_gpt.py"], capture_output=True, text=True)
    if show.returncode == 0:  # not where the tests run on an unpacked archive
        assert race.read_program("HEAD") == (show.stdout, [])


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["base"], "a contestant is NAME=PROGRAM"),
        (["../x={toy}"], "a contestant is NAME=PROGRAM"),
        (["a={toy}", "A={toy}"], "a name of its own"),
        (["a={toy} --pase=1"], "knows no --pase"),
        (["a={toy} --seed=1"], "--seed is the race's to set"),
        (["a={toy} --save_checkpoint=true"], "--save_checkpoint is the race's to set"),
        (["a={toy} --val_tokens=5"], "give it after --"),
        (["a={toy}.py"], "cannot be read"),
        (["a=nothing-like-this"], "no git revision"),
        (["a={empty}"], "no logs?"),
        (["a={other}"], "no program for a race"),
        (["a={toy}", "--lengths", "0.2,x"], "--lengths 0.2,x"),
        (["a={toy}", "--lengths", "0"], "--lengths 0"),
        (["a={toy}", "--runs", "0"], "--runs 0"),
        (["a={toy} 'b"], "No closing quotation"),
    ],
)
def test_what_cannot_race_is_refused_in_one_line(toy, tmp_path, capsys, arguments, told):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.py").write_text("raise SystemExit('no such thing')\n")
    names = dict(toy=toy, empty=tmp_path / "empty", other=tmp_path / "other.py")
    assert race.main([*(a.format(**names) for a in arguments), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("race.py: refused: ") and re.search(told, said)
    assert not (tmp_path / "out" / "race.json").exists()


# ---- dealing, failing, going on


def test_runs_are_dealt_over_the_cards_so_that_each_contestant_has_each_card_as_often(toy, tmp_path, run_race):
    out = tmp_path / "out"
    run_race(
        out, f"a={toy}", f"b={toy} --b=0.31", "--runs", 2, "--lengths", "0.05,0.1", common=["--pause=0.05"],
        cards="3,5",
    )  # fmt: skip
    cards, caches = {}, set()
    for path in out.glob("runs/*/*/*.txt"):
        card, cache = re.search(r"^card (\S+) cache (\S+)$", path.read_text(), re.M).groups()
        cards.setdefault((path.parent.parent.name, path.parent.name), set()).add(card)
        caches.add(cache)
        assert read_run(path).overrides["seed"] == path.stem[-1]
    assert len(cards) == 4 and all(found == {"3", "5"} for found in cards.values())
    assert len(caches) == 1 and str(out) in caches.pop()


def test_a_card_takes_what_it_has_had_least_also_before_the_race_was_stopped(toy, tmp_path, run_race):
    """Round 1 begins with b; but card 5 has had b more often."""
    out = tmp_path / "out"
    command = [f"a={toy}", f"b={toy} --b=0.31", "--lengths", "0.05", "--runs"]
    run_race(out, *command, 1, cards="5")
    with open(out / "journal.jsonl", "a") as journal:
        journal.write('{"job": ["b", 0.05, 7], "card": "5", "seconds": 0.1}\n{"job": ["b", 0.0')
    run_race(out, *command, 2, cards="5,3", common=[])
    cards = {path.stem: re.search(r"^card (\S+)", path.read_text(), re.M)[1] for path in out.glob("runs/*/*/*.txt")}
    assert cards == {"a-0.05-0": "5", "b-0.05-0": "5", "a-0.05-1": "5", "b-0.05-1": "3"}


def test_a_contestant_that_fails_is_shown_others_go_on_and_the_same_command_tries_again(toy, tmp_path, run_race):
    out, fail = tmp_path / "out", tmp_path / "fail"
    fail.touch()
    command = [f"a={toy}", f"bad={toy} --fail={fail}", f"c={toy}", "--runs", 3, "--lengths", "0.05"]
    told, found = run_race(out, *command, status=1)
    assert told.count("FAILED (exit status 1): told to fail") == 2 and "bad: its other runs are left out" in told
    assert [entry["complete_runs"] for entry in found["lengths"]] == [3, 0, 3]
    assert any("missing: bad-0.05-0" in line for line in found["troubles"])
    fail.unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/[ac]/*/*.txt")}
    told, found = run_race(out, *command)
    assert [entry["complete_runs"] for entry in found["lengths"]] == [3, 3, 3] and "6 of 9 runs are there" in told
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_killed_race_leaves_no_process_and_goes_on_where_it_stopped(toy, tmp_path, run_race):
    """Also: a source edited meanwhile does not change it; another command or a second race there is refused."""
    out = tmp_path / "out"
    command = [f"a={toy}", f"b={toy} --pause=0.1", "--runs", 1, "--lengths", "0.1,0.15"]
    first = subprocess.Popen(arguments_for(out, *command), env=environment(), stdout=subprocess.DEVNULL)
    wait_for(lambda: (out / "runs" / "b" / "0.1" / "b-0.1-0.txt").exists())
    told, _ = run_race(out, *command, status=2)
    assert "another race.py is at work in it" in told
    first.kill()
    first.wait()
    wait_for(lambda: not alive(out))
    done = {name for name, run in logs(out).items() if run.complete}
    assert done == {"a-0.1-0.txt"} and len(logs(out)) == 2
    told, _ = run_race(out, command[0], f"b={toy} --pause=0.3", *command[2:], status=2)
    assert "was begun with b:" in told and "--pause=0.1'" in told and "--pause=0.3'" in told
    told, _ = run_race(out, command[0], *command[2:], status=2)
    assert "was begun with b:" in told
    toy.write_text("raise SystemExit('edited')\n")
    told, found = run_race(out, *command[:2], "--runs", 1, "--lengths", "0.1,0.15,0.2")
    assert "1 of 6 runs are there" in told and "a: the source changed meanwhile" in told
    assert all(entry["complete_runs"] == 1 for entry in found["lengths"]) and len(found["lengths"]) == 6
    assert (out / "runs" / "b" / "0.1" / "b-0.1-0.aside1").exists()


def test_ctrl_c_ends_the_runs_and_says_how_to_go_on(toy, tmp_path):
    out = tmp_path / "out"
    command = arguments_for(out, f"a={toy} --pause=1", "--lengths", "0.1", "--runs", 1)
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, process_group=0)
    wait_for(lambda: (out / "runs" / "a" / "0.1" / "a-0.1-0.txt").exists())
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in told and "Traceback" not in told
    assert not alive(out)


def test_a_terminal_shows_who_runs_where_and_how_it_stands(toy, tmp_path):
    command = arguments_for(
        tmp_path / "out", f"a={toy}", f"b={toy} --pause=0.1", "--lengths", "0.1", "--runs", "1", "--target", "4"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], command, environment(TERM="xterm", COLUMNS="100"))
    shown, until = b"", time.monotonic() + 120
    while time.monotonic() < until and select.select([terminal], [], [], 60)[0]:
        try:
            shown += os.read(terminal, 4096)
        except OSError:
            break
    assert os.waitpid(pid, 0)[1] == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"out: 1 of 2 runs, about \d+ s left", text) and "against a" in text
    assert re.search(r"b-0\.1-0 .*CPU .* \d+/12 .* at \d+% .*[+-]\d\.\d{4}", text)
    assert "[2/2] b-0.1-0: loss 4.2545, 0.60 s, +0.0000 against a" in text and "Time to a loss of 4" in text


def test_submit_makes_a_record_of_a_race(toy, tmp_path, run_race):
    out, records = tmp_path / "out", tmp_path / "records"
    command = [f"base={toy} --noise=0.001,0.002", f"new={toy} --b=0.31 --noise=0.001,0", f"c={toy} --noise=0,0.1"]
    run_race(out, *command, "--runs", 2, "--lengths", "0.1,0.2")
    submit = [
        sys.executable,
        ROOT / "records" / "submit.py",
        "Faster",
        out,
        "--records",
        records,
        "--date",
        "2026-12-01",
    ]
    refused = subprocess.run(submit, capture_output=True, text=True)
    assert refused.returncode == 1 and "which contestant? --contestant=new or c" in refused.stderr
    made = subprocess.run([*submit, "--contestant=new"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    folder = records / "2026-12-01_Faster"
    names = {path.name for path in folder.iterdir()}
    assert {"new-0_2-0.txt", "new-0_2-1.txt", "race.md", "race.json", "race.png", "race.zip", "loss.png"} <= names
    assert len([name for name in names if name.endswith(".txt")]) == 2
    text = (folder / "README.md").read_text()
    assert "2 complete of 2" in text and "[the race](race.md)" in text and "against the baseline" in text


# ---- with the real program


def test_a_real_race_on_the_cpu_of_a_record_and_this_program(tmp_path, run_race):
    """The record's program and today's, for five and six steps, 0.11 of the smoke preset: both learn."""
    small = ["--num_heads=2", "--val_tokens=64", "--val_batch_size=64", "--val_loss_every=0"]
    told, found = run_race(
        tmp_path / "out", f"old={RECORD}", f"new={ROOT / 'train_gpt.py'}", "--runs", 1, "--lengths", "0.11",
        common=small,
    )  # fmt: skip
    old, new = (entry for entry in found["lengths"])
    assert old["complete_runs"] == new["complete_runs"] == 1 and (old["steps"], new["steps"]) == ([5], [6])
    assert 10.4 < old["loss"]["mean"] < 10.7 and 9.9 < new["loss"]["mean"] < 10.4
    assert found["unit"] == "CPU-seconds" and "new-0.11-0" in told


def test_rerun_starts_the_program_of_a_record_with_its_settings():
    command = [sys.executable, ROOT / "records" / "rerun.py", RECORD, "--num_extension_iterations=5", "--bench_steps=3"]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    line, said = ran.stderr.splitlines()[0], ran.stderr.splitlines()[-1]
    assert "--num_scheduled_iterations=380 " in line and "--num_extension_iterations=10" not in line
    assert (
        ran.returncode == 1
        and said == "train_gpt.py: error: --bench_steps=3 must be at least 4: the first two are not timed"
    )
    program = re.search(r"\S+/logs/sources/\S+", line)[0]
    assert next(RECORD.glob("*.txt")).read_text().startswith(Path(program).read_text())


def test_rerun_uses_the_settings_again_that_all_logs_have_but_not_a_runs_own_nor_those_given_anew():
    told = dict(muon_lr="0.02", val_steps="(5, 10)", seed="0", run_id="a", log_dir="logs")
    runs = [Run(Path("x"), overrides=told), Run(Path("x"), overrides={**told, "seed": "1", "adam_lr": "0.01"})]
    assert rerun.logged_settings(runs, set()) == dict(muon_lr="0.02", val_steps="5, 10")
    assert rerun.logged_settings(runs, {"muon_lr"}) == dict(val_steps="5, 10")


@pytest.mark.parametrize("given, folder", [("/their/data", "/their/data"), ("", str(ROOT)), (None, str(ROOT))])
def test_rerun_looks_for_data_where_the_user_says_or_in_this_repository(monkeypatch, given, folder):
    monkeypatch.delenv("DATA_PATH", raising=False)
    if given is not None:
        monkeypatch.setenv("DATA_PATH", given)
    assert rerun.environment(on_gpu=False)["DATA_PATH"] == folder


def test_a_placed_program_has_the_vocabulary_beside_it_wherever_the_data_is(tmp_path):
    source = (ROOT / "train_gpt.py").read_text()
    program = rerun.place(source, tmp_path)
    check = "import train_gpt; print(len(train_gpt.read_vocabulary(train_gpt.Hyperparameters())))"
    elsewhere = {**os.environ, "DATA_PATH": str(tmp_path / "elsewhere")}
    told = subprocess.run(
        [sys.executable, "-c", check], cwd=program.parent, env=elsewhere, capture_output=True, text=True
    )
    assert program.read_text() == source and told.stdout == "50256\n", told.stderr
    assert rerun.place(source, tmp_path) == program


def test_rerun_refuses_what_has_no_source_or_several(toy, tmp_path):
    (tmp_path / "note.txt").write_text("step:1/2 train_time:3ms\n")
    with pytest.raises(Refusal, match="no log with the source"):
        logged_program(tmp_path / "note.txt")
    with pytest.raises(Refusal, match="no such log"):
        logged_program(tmp_path / "nowhere")
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"print({i})\n\n{'=' * 100}\nRunning Python 3.12\nRunning PyTorch 2.13\n")
    with pytest.raises(Refusal, match="2 different sources"):
        logged_program(tmp_path)


def test_beside_a_program_stand_the_tools_of_its_revision(tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / "records").mkdir(parents=True)
    (here / "data").mkdir()
    monkeypatch.setattr(rerun, "ROOT", here)
    (here / "data" / "gpt2.tiktoken").write_text("words")
    git = ["git", "-C", str(here), "-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    program, tools = "import_tool('checks')  # {}\n", ["checks", "guard", "logfile", "precompile"]

    def write(version, names):
        (here / "train_gpt.py").write_text(program.format(version))
        for name in names:
            (here / "records" / f"{name}.py").write_text(version)

    def beside(source):
        home = rerun.place(source, tmp_path / "sources").parent
        return {path.stem: path.read_text() for path in (home / "records").glob("*.py")}

    write("old", tools[:2])
    subprocess.run([*git, "init", "-q"], check=True)
    for message in ("one", "two"):
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", message], check=True)
        write("new", tools)
    assert beside(program.format("old")) == dict.fromkeys(tools[:2], "old")  # though a later revision replaced it
    assert beside(program.format("new")) == beside(program.format("edited")) == dict.fromkeys(tools, "new")
    assert beside("print('all in one file')\n") == {}
    monkeypatch.setenv("PATH", "")  # no git
    assert beside(program.format("old")) == dict.fromkeys(tools, "new")
