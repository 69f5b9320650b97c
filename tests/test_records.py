"""records/: logs read, judged, compared, drawn, submitted and watched; nothing in a log does harm."""

import json
import math
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent

import picture  # noqa: E402
import report  # noqa: E402
import runlog  # noqa: E402
import submit  # noqa: E402
import watch  # noqa: E402

SOURCE = (ROOT / "train_gpt.py").read_text()
LOSSES = [3.2767, 3.2777, 3.2795, 3.2774, 3.2799, 3.2779, 3.2777]
TIMES = [97.825, 97.777, 97.818, 97.777, 97.745, 97.715, 97.728]
OLD_LOSSES = [3.2776, 3.2803, 3.2773, 3.2794, 3.2784, 3.2794]
OLD_TIMES = [98.908, 98.878, 98.796, 98.667, 98.800, 98.776]
CURVE = {0: 10.8284, 250: 4.5838, 500: 4.2398, 750: 3.8726, 1000: 3.5784, 1250: 3.4040, 1500: 3.2984}
RULE = "=" * 100

PUBLIC_SOURCE = """import os
import torch
# torch._inductor.config.coordinate_descent_tuning = True # banned: mode="max-autotune"
model = torch.compile(model, dynamic=False, fullgraph=True)
pattern = re.compile("x", flags=re.M)

@dataclass
class Hyperparameters:
    train_files: str = os.path.join(data_path, "data/fineweb10B/fineweb_train_*.bin") # input
    val_files: str = os.path.join(data_path, "data/fineweb10B/fineweb_val_*.bin")
    val_tokens: int = 10485760 # how many tokens
    num_scheduled_iterations: int = 1515  # number of steps to complete lr and ws schedule
    num_extension_iterations: int = 40  # number of steps to continue training at final lr and ws

print0("="*100)
print0(f"step:{step}/{train_steps} val_loss:{val_loss:.4f} train_time:{training_time_ms:.0f}ms step_avg:nanms")
"""


def smi(gpus, name):
    row = "|   {}  {:<26}   On  |   00000000:00:06.0 Off |                    0 |"
    lines = ["| NVIDIA-SMI 580.159.04     Driver Version: 580.159.04     CUDA Version: 13.0     |", "|=====|====|====|"]
    lines += [row.format(i, name) for i in range(gpus)] + [
        "|=======|",
        "|    0   N/A  N/A   2089      C   python3  518MiB |",
    ]
    return "\n".join(lines)


def stage_starts(total=1555):
    return [i * ((total - 40) // 3) for i in range(3)] + [total - 40]


def step_lines(loss, seconds, total=1555, curve=CURVE, every_step=True, until=None):
    """Steps of the three stages take 1, 2 and 3 units of time, those of the extension 3."""
    third, scheduled = (total - 40) // 3, total - 40
    units = [1 + min(step // third, 2) if step < scheduled else 3 for step in range(total)]
    unit = 1000 * seconds / sum(units)
    lines, elapsed = [], 0.0
    for step in range(total + 1):
        stamp = f"train_time:{elapsed:.0f}ms step_avg:{elapsed / max(step, 1):.2f}ms"
        if every_step and step:
            lines.append(f"step:{step}/{total} {stamp}")
        if step in curve or step == total:
            lines.append(f"step:{step}/{total} val_loss:{loss if step == total else curve[step]:.4f} {stamp}")
        if step == until:
            return lines
        elapsed += unit * units[min(step, total - 1)]
    return lines


def own_log(
    loss=3.2781, seconds=97.769, source=SOURCE, overrides="--run_id=first", gpus=8, gpu="NVIDIA H100 80GB HBM3",
    preset="speedrun", shards="9 train shards, 900,000,000 tokens; 10,485,760 of 100,000,000", **steps,
):  # fmt: skip
    """A log of this repository's trainer, as a text."""
    lines = [
        *(source, RULE, "Running Python 3.12.3 (main) [GCC 13.3.0]"),
        "Running PyTorch 2.11.0+cu130 compiled for CUDA 13.0, Triton 3.6.0",
        *(smi(gpus, gpu), "", f"preset: {preset}; overrides: {overrides}", RULE),
        f"world: {gpus} x {gpu}, 79 of 79 GiB free, 1 micro-batches each a step; parameters in bfloat16, head in FP8",
        f"data: {shards} validation tokens",
        f"run: first, {steps.get('total', 1555)} steps, 1 tokens (0.46 of the train files)",
        f"stages: begin at steps {' '.join(map(str, stage_starts(steps.get('total', 1555))))}",
        "warm-up: 33.7 s from the start of main",
        *step_lines(loss, seconds, **steps),
        "peak memory allocated: 30704 MiB reserved: 46558 MiB",
        f"validation loss {loss:.4f} after 1555 steps; log: logs/first.txt",
    ]
    return "\n".join(lines) + "\n"


def public_log(loss=3.2781, seconds=97.769, source=PUBLIC_SOURCE, gpus=8, gpu="NVIDIA H100 80GB HBM3", **steps):
    """A log of the public speedruns, as a text."""
    lines = [
        *(source, RULE, "Running Python 3.12.7 (main, Oct 16 2024, 04:37:19) [Clang 18.1.8 ]"),
        "Running PyTorch 2.10.0.dev20251210+cu126 compiled for CUDA 12.6",
        *("Running Triton version 3.6.0", smi(gpus, gpu), "", RULE, *step_lines(loss, seconds, **steps)),
        "peak memory allocated: 30704 MiB reserved: 46558 MiB",
    ]
    return "\n".join(lines) + "\n"


def write(folder, texts, name="run"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        data = text if isinstance(text, bytes) else text.encode()
        (folder / f"{name}{i}.txt").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """The seed's runs, and those of the record before it, as logs of this trainer."""
    folder = tmp_path_factory.mktemp("seed")
    for name, losses, times in (("new", LOSSES, TIMES), ("old", OLD_LOSSES, OLD_TIMES)):
        write(folder / name, [own_log(a, b) for a, b in zip(losses, times, strict=True)], name)
    return folder


def read(tmp_path, text):
    return runlog.read_runs([write(tmp_path / "one", [text])])[0]


def judged(runs, reference=SOURCE):
    group = runlog.Group(runs)
    rules = runlog.judge(group, reference)
    return {rule.name: rule for rule in rules}, runlog.verdict(group, rules)


def broken(rules):
    return [name for name, rule in rules.items() if rule.holds is False]


def printed(capsys, *arguments):
    status = report.main([str(a) for a in arguments])
    return status, capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- acceptance


def test_the_seeds_figures(seed, capsys):
    status, out = printed(capsys, seed / "new", "--baseline", seed / "old")
    assert status == 0
    assert "loss          mean 3.2781, std 0.0012; p = 0.0025 (one-sided t-test against 3.28)" in out
    assert "time (s)      mean 97.7693, std 0.0425" in out
    assert "baseline      loss mean 3.2787, std 0.0012; time (s) mean 98.8042, std 0.0848; 6 of 6 runs" in out
    assert "time (s)      -1.0349 ± 0.0382: 1.03 s faster" in out
    assert "runs          7 complete of 7" in out
    for loss, seconds in zip(LOSSES, TIMES, strict=True):
        assert f"{loss:.4f}      {seconds:.3f}" in out


def test_the_seeds_runs_are_a_record_by_every_rule(seed):
    rules, verdict = judged(runlog.read_runs([seed / "new"]))
    assert {rule.holds for rule in rules.values()} == {True} and len(rules) == 10
    assert verdict == "A record by every rule that logs can show: 7 complete runs."


def test_the_command_line_runs_from_anywhere(seed, tmp_path):
    command = [sys.executable, str(ROOT / "records/report.py"), str(seed / "new"), "--baseline", str(seed / "old")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0 and not done.stderr
    assert "p = 0.0025" in done.stdout and "-1.0349 ? 0.0382" in done.stdout


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_log_of_ours(tmp_path):
    run = read(tmp_path, own_log(3.2781, 97.769))
    assert run.complete and run.own and not run.notes
    assert (run.loss, run.seconds, run.total, run.peak) == (3.2781, 97.769, 1555, (30704, 46558))
    assert run.hardware == "8 x NVIDIA H100 80GB HBM3"
    assert run.software == "Python 3.12.3, PyTorch 2.11.0+cu130, CUDA 13.0, Triton 3.6.0, driver 580.159.04"
    assert run.source == SOURCE + "\n" and run.overrides == {"run_id": "first"}
    assert run.losses == {**CURVE, 1555: 3.2781}
    unit = 97769 / (505 * 6 + 40 * 3)
    expected = {"stage 1": unit, "stage 2": 2 * unit, "stage 3": 3 * unit, "extension": 3 * unit}
    assert run.stage_ms() == pytest.approx(expected, rel=1e-3)


def test_a_log_of_ours_with_its_versions_in_one_line(tmp_path):
    text = own_log().replace(" (main) [GCC 13.3.0]\nRunning PyTorch", ", PyTorch")
    assert read(tmp_path, text).software.startswith("Python 3.12.3, PyTorch 2.11.0+cu130, CUDA 13.0, Triton 3.6.0")


def test_a_public_log(tmp_path):
    run = read(tmp_path, public_log(3.2767, 97.825))
    assert run.complete and not run.own and (run.loss, run.seconds) == (3.2767, 97.825)
    assert run.software == "Python 3.12.7, PyTorch 2.10.0.dev20251210+cu126, CUDA 12.6, Triton 3.6.0, driver 580.159.04"
    assert run.gpus == ["NVIDIA H100 80GB HBM3"] * 8
    assert run.untimed == 0 and run.stage_ms() == {}


def test_a_public_log_cannot_be_compared_with_our_data_section(tmp_path):
    write(tmp_path, [public_log(a, b) for a, b in zip(LOSSES, TIMES, strict=True)])
    rules, verdict = judged(runlog.read_runs([tmp_path]))
    assert not broken(rules)
    assert rules["data section unchanged"].holds is None
    assert "cannot be compared" in rules["data section unchanged"].detail
    assert verdict == "A record if these hold, which the logs do not tell: data section unchanged."


def test_stages_are_unknown_where_the_log_does_not_state_them(tmp_path, capsys):
    for name, text in (("public", public_log()), ("own", re.sub("stages: .*\n", "", own_log(source="x = 1")))):
        status, out = printed(capsys, write(tmp_path / name, [text]))
        assert status == 0 and "ms a step     by stage: unknown" in out


@pytest.mark.parametrize(
    "starts, names",
    [
        ("0 500 1000 1500", ["stage 1", "stage 2", "stage 3", "extension"]),
        ("0 300 600 900 1200", ["stage 1", "stage 2", "stage 3", "stage 4", "extension"]),
        (" ".join(str(100 * i) for i in range(13)), [*(f"stage {i}" for i in range(1, 13)), "extension"]),
        ("0 500 1555", ["stage 1", "stage 2"]),  # without an extension
        ("0 0 700", ["stage 2", "extension"]),
        ("0", ["extension"]),
        ("0 700 500", []),
        ("1 700", []),
        ("0 1556", []),
        ("0 x", []),
    ],
)
def test_stages_are_those_that_the_log_states(tmp_path, starts, names):
    run = read(tmp_path, re.sub("(stages: begin at steps) .*", rf"\1 {starts}", own_log()))
    group = runlog.Group([run])
    assert run.complete and list(run.stage_ms()) == list(group.stage_ms()) == names
    for name, (begin, end) in run.stages().items():
        assert run.stage(begin) == run.stage(end - 1) == name
        assert run.stage_ms()[name] == (run.times[end] - run.times.get(begin, 0)) / (end - begin)
    assert run.stage(1555) == (names[-1] if names else "")


def test_stages_of_logs_that_do_not_state_them_are_those_that_their_source_computes(tmp_path):
    text = re.sub("stages: .*\n", "", own_log(source=PUBLIC_SOURCE + runlog.THIRDS))
    assert read(tmp_path, text).stage_starts() == [0, 505, 1010, 1515]
    assert read(tmp_path, text.replace("2 * third,", "third + 9,")).stage_starts() == []
    overrides = "--num_scheduled_iterations=380 --num_extension_iterations=10 --val_steps=(5, 10)"
    run = read(tmp_path, re.sub("overrides: .*", f"overrides: {overrides}", text.replace("/1555 ", "/390 ")))
    assert run.total == 390 and run.stage_starts() == [0, 126, 252, 380] and run.overrides["val_steps"] == "(5, 10)"


def test_the_repositorys_records_say_what_their_logs_say():
    for record in runlog.read_records():
        summary = report.summary(record.group)
        assert f"| ms a step | {dict(summary)['ms a step']} |" in (record.folder / "README.md").read_text(), record.name


def test_a_stage_without_times_at_its_ends_is_left_out(tmp_path):
    assert list(read(tmp_path, own_log(every_step=False)).stage_ms()) == []
    curve = {**CURVE, 505: 4.2}
    assert list(read(tmp_path, own_log(every_step=False, curve=curve)).stage_ms()) == ["stage 1"]


def test_validations_at_other_steps(tmp_path):
    assert list(read(tmp_path, public_log(curve={125: 4.9, 1000: 3.6})).losses) == [125, 1000, 1555]


def test_windows_line_ends(tmp_path):
    run = read(tmp_path, own_log().replace("\n", "\r\n"))
    assert run.complete and run.source == SOURCE + "\n"


EXAMPLE = f"step:3/9 val_loss:1.0000 train_time:5ms step_avg:1.00ms\n{RULE}\nstep:9/9 val_loss:1 train_time:9ms\n"


@pytest.mark.parametrize(
    "extra",
    [
        f'"""A log looks like\n{EXAMPLE}"""\n',
        f'"""A log looks like\n{RULE}\nRunning Python 3.12.3\n{RULE}\n{EXAMPLE}"""\n',
        f"TEXT = r'''\n{RULE}\nRunning PyTorch 2.1\n{RULE}\n{EXAMPLE}'''\n",
        f'# odd """ and \'\'\' in a comment\n"odd \'\'\' and # in a string"\n"""\n{RULE}\nRunning Python 3\n"""\n',
        f"{RULE}\n{RULE}\n",
        'f"""{x["a"]}"""; print0("="*100); f"step:{step}/{total} val_loss:{loss:.4f} train_time:{t:.0f}ms"\n',
    ],
)
@pytest.mark.parametrize("log", [own_log, public_log])
def test_what_looks_like_a_log_inside_the_source_is_source(tmp_path, log, extra):
    source = extra + (SOURCE if log is own_log else PUBLIC_SOURCE)
    run = read(tmp_path, log(3.2767, 97.825, source=source))
    assert run.complete and run.source == source + "\n" and run.total == 1555 and run.loss == 3.2767


def test_a_log_that_ends_inside_a_source_with_an_example_is_no_run(tmp_path):
    source = f'"""\n{RULE}\nRunning Python 3.12.3\n{RULE}\n{EXAMPLE}"""\nimport os\n'
    run = read(tmp_path, source)
    assert not run.complete and "cut off in the source" in run.problems[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("Running Python", "Running python").replace("PyTorch", "pytorch"),
        lambda text: re.sub("Running Python.*\n", "", text).replace("PyTorch", "Pytorch"),
        lambda text: text.replace("Running Python ", "\nRunning  Python\t"),
        lambda text: text.replace(f"\n{RULE}\nstep", "\nstep") + RULE + "\n",
        lambda text: re.sub(r"(\d+)ms step", lambda m: f"{int(m[1]) / 1000:.3f}s step", text),
        lambda text: re.sub(r"(\d+)ms step", lambda m: f"{int(m[1]) / 60000:.7f} min step", text),
        lambda text: re.sub(r"(step:.*) train_time", r"\1 lr:0.1 train_loss:4.1 x: 3 train_time", text),
        lambda text: re.sub(r"(val_loss:\S+) (train_time.*)", r"\2 \1", text),
        lambda text: re.sub(r"^step:(.*)", lambda m: "  step: " + m[1].replace(" ", "\t"), text, flags=re.M),
        lambda text: re.sub(r"^(step:\d+)/1555 (train)", r"\1 \2", text, flags=re.M),
        lambda text: re.sub(r" step_avg:\S+", "", text),
        lambda text: re.sub(r"step_avg:\S+", "step_avg:nanms", text).replace("\n", "\r\n"),
        lambda text: re.sub(r"(val_loss:\d\.\d+)", r"\g<1>00000000", text),
        lambda text: text.replace("peak memory allocated: 30704 MiB reserved: 46558 MiB", ""),
    ],
)
def test_public_logs_in_other_forms_are_the_same_run(tmp_path, change):
    run, text = runlog.Run(Path("x")), change(public_log())
    runlog.parse(run, text.replace("\r\n", "\n"))
    assert text != public_log() and not run.notes and not run.problems
    assert (run.loss, run.total, run.losses) == (3.2781, 1555, {**CURVE, 1555: 3.2781})
    assert run.seconds == pytest.approx(97.769, abs=1e-5) and len(run.times) == 1556
    assert run.untimed == 0 and "2.10.0.dev20251210+cu126" in run.software and len(run.gpus) == 8
    assert read(tmp_path, text).loss == run.loss


def test_a_public_log_that_names_its_gpus_in_one_line(tmp_path):
    text = re.sub(
        rf"Running Python(.|\n)*?{RULE}",
        f"Running PyTorch 2.12.0+cu130 compiled for CUDA 13.0 on NVIDIA H100 80GB HBM3 with world_size 8\n{RULE}",
        public_log(),
    ).replace("peak memory allocated: 30704 MiB reserved: 46558 MiB", "peak memory consumption: 27781 MiB")
    run = read(tmp_path, text)
    assert run.hardware == "8 x NVIDIA H100 80GB HBM3" and run.software == "PyTorch 2.12.0+cu130, CUDA 13.0"
    assert dict(report.summary(runlog.Group([run])))["peak memory"] == "27781 MiB allocated"


def test_losses_are_shown_with_the_decimals_that_the_log_has(tmp_path, capsys):
    for loss in ("3.27712", "3.2700"):
        out = printed(capsys, write(tmp_path, [public_log().replace("3.2781", loss)]))[1]
        assert f"1555   {loss} " in out


@pytest.mark.parametrize(
    "line",
    [
        "step:9/9 train_time:",
        "step:9/9 train_time:9",
        "step:9/9 val_loss:3.2 train_time:97",
        "step:9/9 train_time:9s val_loss:3.2",
        "step:9/9 train_time:9m",
    ],
)
def test_a_line_that_is_cut_off_is_no_figure(line):
    run = runlog.Run(Path("x"))
    runlog.parse(run, f"x\n{RULE}\nRunning Python 3\n{RULE}\nstep:8/9 train_time:8ms\n{line}")
    assert run.times == {8: 8} and run.losses == {} and run.problems == ["cut off at step 8 of 9"]


def test_lines_that_never_tell_the_number_of_steps(tmp_path):
    run = read(tmp_path, re.sub("/1555 ", " ", public_log()))
    assert run.problems == ["its lines do not tell how many steps there are in all"]


def clock_from(step, first_ms, ms=100, total=1000, every=1, average=True):
    """A public log whose clock begins again after `step` steps, the first of which took `first_ms`."""
    lines = [f"step:0/{total} val_loss:10.8284 train_time:0ms step_avg:nanms"]
    for i in range(1, total + 1):
        elapsed = first_ms + ms * (i - 1) if i <= step else ms * (i - step)
        mean = f" step_avg:{elapsed / (i - step) if i > step + 1 else math.nan:.2f}ms" if average else ""
        if i % every == 0:
            lines.append(f"step:{i}/{total} train_time:{elapsed}ms{mean}")
        if i % 125 == 0 or i == total:
            lines.append(f"step:{i}/{total} val_loss:{5 - 1.73 * i / total:.4f} train_time:{elapsed}ms{mean}")
    return "\n".join([PUBLIC_SOURCE, RULE, "Running python 3.12.8 (main)", RULE, *lines, ""])


CLOCK = "the clock covers every training step"


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("step, first_ms", [(10, 31_000), (10, 100), (1, 31_000), (6, 100), (40, 5000)])
def test_a_clock_that_begins_again_early_is_a_note_and_breaks_the_rule(tmp_path, step, first_ms, average):
    run = read(tmp_path, clock_from(step, first_ms, average=average))
    assert run.complete and run.loss == 3.27 and run.seconds == (1000 - step) / 10
    assert run.notes == [f"the clock began again at step {step + 1}"] and run.untimed == step
    rules, verdict = judged([run])
    assert rules[CLOCK].holds is False and rules[CLOCK].detail == f"it leaves out the first {step} steps"
    assert "with steps that the clock leaves out" in verdict
    assert run.times[step] == 0 and min(run.times) == step and run.losses[0] == 10.8284


@pytest.mark.parametrize(
    "text",
    [
        clock_from(600, 100),
        clock_from(60, 100),
        clock_from(500, 100, every=125),
        clock_from(15, 3000, total=30),
        re.sub(
            r"(step:(?!0|[1-9]/|10/).*train_time:)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 9000}", clock_from(10, 31_000)
        ),
    ],
)
def test_a_clock_that_begins_again_late_or_not_from_zero_is_no_whole_run(tmp_path, text):
    assert read(tmp_path, text).problems == ["the clock runs backwards"]


def test_a_clock_that_begins_again_twice_or_goes_back_a_little_is_no_whole_run(tmp_path):
    lines = clock_from(10, 31_000).split("\n")
    twice = [re.sub(r"train_time:\d+", f"train_time:{100 * i}", line) for i, line in enumerate(lines[-500:])]
    assert read(tmp_path, "\n".join(lines[:-500] + twice)).problems == ["the clock runs backwards"]
    little = clock_from(10, 31_000).replace("step:11/1000 train_time:100ms", "step:11/1000 train_time:20000ms")
    assert read(tmp_path, little).problems == ["the clock runs backwards"]


def test_a_validation_with_the_clock_just_set_to_zero(tmp_path):
    text = clock_from(10, 31_000).replace("step:11/", "step:10/1000 val_loss:7.0 train_time:0ms\nstep:11/", 1)
    run = read(tmp_path, text)
    assert run.untimed == 10 and run.notes == ["the clock began again at step 10"] and run.times[10] == 0


@pytest.mark.parametrize("average, untimed, holds", [(True, 10, False), (False, None, None)])
def test_validations_alone_tell_by_their_mean_what_the_clock_leaves_out(tmp_path, average, untimed, holds):
    run = read(tmp_path, clock_from(10, 31_000, every=5000, average=average))
    assert run.complete and not run.notes and run.untimed == untimed
    assert judged([run])[0][CLOCK].holds is holds


def test_a_line_that_is_a_step_off_is_no_new_beginning(tmp_path):
    text = (
        clock_from(0, 0).replace("train_time:100ms", "train_time:290ms").replace("train_time:200ms", "train_time:130ms")
    )
    run = read(tmp_path, text)
    assert run.complete and not run.notes and run.untimed == 0


def test_a_mean_that_is_rounded_tells_nothing(tmp_path):
    text = clock_from(10, 31_000, every=5000)
    assert read(tmp_path, re.sub("step_avg:[0-9.]+ms", "step_avg:0.1s", text)).untimed is None


def test_a_mean_of_something_else_tells_nothing(tmp_path):
    text = public_log(every_step=False)
    assert read(tmp_path, text).untimed == 0
    assert read(tmp_path, re.sub("step_avg:[0-9.]+", "step_avg:61.03", text)).untimed is None


def test_what_a_clock_leaves_out_is_left_out_of_figures_and_pictures(tmp_path, capsys):
    text = own_log(total=1000, overrides="--x=1")
    elapsed = int(re.search(r"^step:10/1000 train_time:(\d+)", text, re.M)[1])
    run = read(tmp_path, text)
    shifted = re.sub(
        r"(step:\d+/1000 .*?train_time:)(\d+)(ms).*",
        lambda m: m[1] + str(int(m[2]) - elapsed if int(m[2]) > elapsed else int(m[2]) * 50) + m[3],
        text,
    )
    new = read(tmp_path, shifted)
    assert new.complete and new.untimed == 10 and new.seconds == pytest.approx(run.seconds - elapsed / 1000)
    assert new.stage_ms() == pytest.approx(run.stage_ms(), rel=1e-3)
    assert printed(capsys, new.path, "--plot", tmp_path / "a.svg", "--records", tmp_path / "none")[0] == 0
    data = json.loads(printed(capsys, new.path, "--json")[1])["runs"][0]
    assert data["untimed_steps"] == 10 and data["validations"]["0"] == [10.8284, None]


def test_a_run_that_went_on_on_other_hardware_is_of_none(tmp_path):
    text = own_log().replace("step:9/", "world: 1 x NVIDIA H100 80GB HBM3, 79 of 79 GiB free\nstep:9/", 1)
    run = read(tmp_path, text)
    assert run.hardware == "unknown hardware" and run.notes[0].endswith(
        "8 x NVIDIA H100 80GB HBM3, then 1 x NVIDIA H100 80GB HBM3"
    )


def test_steps_beyond_the_checkpoint_from_which_a_run_went_on_do_not_count(tmp_path):
    before, begin, after = own_log().partition("step:1001/")
    lost = "".join(f"step:{step}/1555 train_time:{90_000 + step}ms step_avg:90.00ms\n" for step in range(1001, 1020))
    ended = "train_gpt.py: error: no sign of life\nresumed at step 1000 from logs/first_step001000.pt\n"
    run, whole = read(tmp_path, before + lost + ended + begin + after), read(tmp_path, own_log())
    assert run.problems == [] and run.notes == ["resumed 1 times, the last time at step 1000"]
    assert (run.times, run.losses) == (whole.times, whole.losses)


def test_a_run_that_begins_anew_in_its_log_has_one_validation_at_step_0(tmp_path):
    first, rest = own_log().split("step:1/")[0], own_log().partition("step:0/")
    assert "val_loss" in first and "train_time:0ms" in first
    again = "resumed at step 0 from the beginning: the run has left no usable checkpoint\n"
    lost = first.replace("train_time:0ms", "train_time:131ms")  # it is on the clock what a run reads ahead of it
    run, whole = read(tmp_path, lost + again + "".join(rest[1:])), read(tmp_path, own_log())
    assert run.problems == [] and run.notes == ["resumed 1 times, the last time at step 0"]
    assert (run.times, run.losses) == (whole.times, whole.losses)


def test_nothing_in_a_log_is_executed(tmp_path):
    source = f"open({str(tmp_path / 'pwned')!r}, 'w')\n" + SOURCE
    overrides = f"--val_steps=__import__('os').mkdir({str(tmp_path / 'pwned')!r})"
    judged([read(tmp_path, own_log(source=source, overrides=overrides))])
    assert not (tmp_path / "pwned").exists()


# ---------------------------------------------------------------------------------------------------------- robustness

HALF = "\n".join(own_log().split("\n")[:-900])
BROKEN_LOGS = {
    "empty": (b"", "an empty file"),
    "binary": (bytes(range(256)) * 40, "a binary file"),
    "other program": ("INFO: epoch 3\nstep:5/5 val_loss:1.0 train_time:5ms\n", "another program's log"),
    "only source": (SOURCE, "another program's log, or cut off in the source"),
    "cut off in the header": (own_log()[: len(SOURCE) + 300], "no steps: cut off before the first"),
    "cut off": (HALF, re.compile(r"cut off at step \d+ of 1555")),
    "nan": (own_log().replace("val_loss:3.4040", "val_loss:nan"), "validation loss is nan at step 1250"),
    "nan at the end": (own_log(math.nan), "validation loss is nan at step 1555"),
    "infinite": (own_log(math.inf), "validation loss is inf at step 1555"),
    "no final validation": (re.sub(r"step:1555/1555 val.*\n", "", own_log()), "no final validation"),
    "final line cut": (
        re.sub(r"(step:1555/1555 val_loss:3.2781 train_time:97)[^$]*", r"\1", own_log()),
        "no final valid",
    ),
    "restart": (own_log() + "\n".join(step_lines(3.2, 90.0)), re.compile(r"\d+ steps stand twice with different fig")),
    "two runs": (own_log() + own_log(3.2, 91.0), "several runs in one file"),
    "two lengths": (own_log() + "step:9/99 train_time:9ms\n", "steps of different runs: 99, 1555"),
    "clock": (own_log().replace("val_loss:3.4040 train_time:", "val_loss:3.4040 train_time:9"), "clock runs backwards"),
    "error": (HALF + "\ntrain_gpt.py: error: no GPU\n", "ended with an error: no GPU"),
}


@pytest.mark.parametrize("name", BROKEN_LOGS)
def test_a_broken_log_is_named_and_the_others_are_reported(tmp_path, capsys, name):
    text, problem = BROKEN_LOGS[name]
    write(tmp_path, [own_log(3.2781, 97.769), text, own_log(3.2777, 97.777)])
    status, out = printed(capsys, tmp_path)
    assert status == 0
    line = next(line for line in out.split("\n") if line.startswith("run1.txt"))
    assert "not a whole run: " in line
    assert problem.search(line) if isinstance(problem, re.Pattern) else problem in line
    assert "runs          2 complete of 3" in out and "loss          mean 3.2779, std 0.0003" in out
    assert "BROKEN   every run complete: 1 of 3 logs are not whole runs" in out
    assert "Not a record" in out


def test_a_log_before_its_first_step_knows_its_length_stages_and_setting(tmp_path):
    run, whole = read(tmp_path, up_to(own_log(), "warm-up: 33")), read(tmp_path / "b", own_log())
    assert (run.step, run.total, run.notes) == (0, 1555, []) and run.stages() == whole.stages()
    assert runlog.Group([run]).setting() == runlog.Group([whole]).setting()


def test_lines_that_stand_twice_alike_do_no_harm(tmp_path):
    lines = own_log().split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("step:1000/1555 val_loss"))
    run = read(tmp_path, "\n".join(lines[: at + 1] + lines[at - 9 : at + 1] + lines[at + 1 :]))
    assert run.complete and run.notes == ["10 lines stand twice"] and run.loss == 3.2781


def test_a_copy_of_a_run_does_not_count(tmp_path):
    write(tmp_path, [own_log(), own_log().replace("first", "second")])
    runs = runlog.read_runs([tmp_path])
    assert [run.problems for run in runs] == [[], ["the same run as run0.txt"]]


def test_a_log_given_twice_is_read_once(tmp_path):
    write(tmp_path, [own_log()])
    assert len(runlog.read_runs([tmp_path, tmp_path / "run0.txt"])) == 1


def test_logs_in_subfolders_are_found(tmp_path, capsys):
    outside = write(tmp_path / "outside", [own_log(3.2)])
    folder = write(tmp_path / "record", [own_log(3.2767)])
    write(folder / "logs/of two", [own_log(3.2777), own_log(3.2795)])
    write(folder / "1/2/3", [own_log(3.2774)])
    write(folder / "1/2/3/4", [own_log(3.1)])  # too deep
    write(folder / ".hidden", [own_log(3.0)])
    (folder / "loop").symlink_to(folder)
    (folder / "out").symlink_to(outside)
    (folder / "logs/twice.txt").symlink_to(folder / "run0.txt")
    names = ["1/2/3/run0.txt", "logs/of two/run0.txt", "logs/of two/run1.txt", "run0.txt"]
    assert sorted(run.name for run in runlog.read_runs([folder]) if run.complete) == names
    (folder / "out.txt").symlink_to(outside / "run0.txt")
    (folder / "self.txt").symlink_to(folder / "self.txt")
    problems = {run.name: run.problems[0] for run in runlog.read_runs([folder]) if run.problems}
    assert problems["out.txt"] == "a link out of the folder: give the file itself"
    assert problems["self.txt"].startswith("cannot be read")
    assert "logs/of two/run1.txt  1555   3.2795" in printed(capsys, folder)[1]
    assert [run.loss for run in runlog.read_runs([folder / "out.txt"])] == [3.2]


@pytest.mark.parametrize("what", ["missing.txt", "empty_folder", "pipe", "x" * 300])
def test_what_is_no_file_is_named(tmp_path, capsys, what):
    (tmp_path / "empty_folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path / "good", [own_log()])
    status, out = printed(capsys, tmp_path / what, tmp_path / "good")
    assert status == 0 and re.search(
        rf"^{what[:100]}.* .*not a whole run: (cannot be read: (No such|File name too long)|no logs|not a file)",
        out,
        re.M,
    )
    assert report.main([str(tmp_path / what)]) == 1


def test_a_huge_file_is_not_read_into_memory(tmp_path):
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(1 << 40)
    assert runlog.read_run(tmp_path / "huge.txt").problems == ["larger than 16 MiB: not a log"]


HOSTILE = "\x1b[2J\x1b]0;owned\x07‮<script>alert(1)</script>|`[x](javascript:1)![](http://evil/x)"


def test_text_of_a_log_neither_steers_the_terminal_nor_breaks_the_markdown(tmp_path, capsys):
    text = own_log(gpu="NVIDIA H100 80GB HBM3", overrides=f"--run_id=../../x --muon_lr={HOSTILE}")
    text = text.replace("Running Python 3.12.3", f"Running Python {HOSTILE}").replace("8 x NVIDIA", f"8 x {HOSTILE}")
    write(tmp_path, [text])
    for form in ([], ["--markdown"], ["--json"]):
        _, out = printed(capsys, tmp_path, *form)
        assert all(c.isprintable() or c == "\n" for c in out)
    _, out = printed(capsys, tmp_path, "--markdown")
    bare = re.sub(r"\\.", "", out)
    assert "<" not in bare and "`" not in bare and "[" not in bare and "http:" not in out.replace("http:&#47;", "")
    tables = [line for line in bare.split("\n") if line.startswith("|")]
    assert {line.count("|") for line in tables} == {7, 3, 4}


@pytest.mark.parametrize(
    "text",
    [
        '"""\\' * 400_000,
        '"\\' * 600_000,
        "'" * 1_000_000,
        f'"""\n{RULE[:20]}\nRunning Python 3\n"""\n' * 50_000,
        "'\\n" * 300_000 + f"{RULE}\nRunning Python 3\n" * 3_000,
        f"{RULE}\nRunning Python 3\n" * 9_000,
        f"x{RULE}\nRunning Python 3\n{RULE}\n" + "step:1/2 " * 100_000,
        f"x\n{RULE}\nRunning Python " + "Triton " * 100_000 + f"\n{RULE}\n" + "| 1 " * 100_000,
        f"{'(' * 500_000}\n.compile{'(' * 100_000}\n{RULE}\nRunning Python 3\n{RULE}\n" + "=" * 1_000_000,
        f"{'.compile((' * 20_000}\n{RULE}\nRunning Python 3\n{RULE}\nstep:1/1 val_loss:1 train_time:1ms\n",
        "\n".join(f"step:{i}/9999999 val_loss:1 train_time:{i}ms" for i in range(20_000)),
        f"x\n{RULE}\n" + ("Running PyTorch" + " on" * 80 + " with world_size\n") * 3_000,
        f"{RULE}\nRunning Python 3\n{RULE}\n"
        + ("step:1/2 " + "val_loss:" * 40 + " train_time:" + "9" * 30 + "\n") * 2_500,
        f"{RULE}\nRunning Python 3\n{RULE}\n" + " \t" * 200_000 + "stages: begin at steps " + "0 " * 200_000,
        f"{RULE}\nRunning Python 3\n{RULE}\n" + "run: , 1 steps" * 40_000 + "\nrun: " * 40_000,
        f"{RULE}\nRunning Python 3\n{RULE}\nstep:{'9' * 100_000}/1 val_loss:{'9' * 100_000} train_time:1.1.1ms\n",
    ],
)
def test_no_text_takes_long(tmp_path, text):
    path = write(tmp_path, [text])
    begin = time.process_time()
    judged(runlog.read_runs([path]))
    assert time.process_time() - begin < 2


def test_twenty_logs_of_4000_lines_take_less_than_two_seconds(tmp_path, capsys):
    source = SOURCE + "\n" * (4000 - len(own_log().split("\n")))
    write(tmp_path, [own_log(3.27 + i / 1e4, 97 + i / 10, source + f"# {i}") for i in range(20)])
    runlog.p_value([3.27, 3.28])  # scipy's import
    begin = time.process_time()
    status, out = printed(capsys, tmp_path)
    assert time.process_time() - begin < 2
    assert status == 0 and "20 complete of 20" in out


PIECES = st.sampled_from(
    [
        *(
            SOURCE[:3000],
            RULE + "\n",
            "Running Python 3.12\n",
            "Running PyTorch 2.1 compiled for CUDA 13.0, Triton 3\n",
        ),
        *("preset: speedrun; overrides: --num_scheduled_iterations=2 --val_tokens=_\n", "preset: smoke; overrides: \n"),
        *(
            "world: 8 x NVIDIA H100, 1\n",
            "world: 9999 x , \n",
            "data: 1 train shards, , tokens; , of 0 validation tokens\n",
        ),
        *(
            "step:0/3 val_loss:10.8 train_time:0ms\n",
            "step:1/3 train_time:5ms\n",
            "step:3/3 val_loss:nan train_time:1ms\n",
        ),
        *(
            "step:3/3 val_loss:-inf train_time:9ms\n",
            "step:3/3 val_loss:3.27 train_time:9ms\n",
            "step:0/0 train_time:.ms\n",
        ),
        *(
            "step:0/0 val_loss:3.1 train_time:0ms\n",
            "step:2/3 val_loss:1e999 train_time:7ms\n",
            "step:2 val_loss:3.2\ttrain_time:7 min step_avg:0.1s\n",
            "step:2/3 train_time:90s step_avg:45000.00ms\n",
            "stages: begin at steps 0 1 2\n",
            "stages: begin at steps 3 x\n",
            '"""',
            "'''",
            "\\",
            "\r\n",
        ),
        *(
            "val_tokens = 3 * _ * 4\n",
            "train_files = ''\n",
            "num_extension_iterations: int = 1\n",
            "torch.compile(**x)\n",
        ),
        *("peak memory allocated: 1 MiB reserved: 2 MiB\n", "torch._inductor.config.x = 1\n", "epoch 2: again\n"),
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(PIECES | st.text(max_size=20), max_size=14), min_size=1, max_size=3), st.booleans())
def test_any_text_is_reported(texts, whole):
    runs = []
    for i, pieces in enumerate(texts):
        run = runlog.Run(Path(f"{i}.txt"))
        head = f"{RULE}\nRunning Python 3\n{RULE}\n" if whole else ""
        runlog.parse(run, head + "".join(pieces))
        runs.append(run)
        assert run.complete == (not run.problems)
        if run.complete:
            assert math.isfinite(run.loss) and run.seconds >= 0
    group = runlog.Group(runs)
    rules = runlog.judge(group, SOURCE)
    lines = report.comparison_lines(group, group, comparison := runlog.compare(group, group))
    for text in (report.as_text(group, rules, lines), report.as_markdown(group, rules, lines)):
        assert all(c.isprintable() or c == "\n" for c in text)
    assert json.loads(report.as_json(group, rules, comparison, group))["runs"]
    for run in runs:
        assert all(c.isprintable() for c in watch.status(run, group))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.floats(0, 1), st.floats(0, 1))
def test_a_damaged_log_is_reported(noise, start, size):
    data = own_log(source="x = 1", every_step=False).encode()
    at = int(start * len(data))
    run = runlog.Run(Path("x.txt"))
    runlog.parse(run, (data[:at] + noise + data[at + int(size * 400) :]).decode("utf-8", errors="replace"))
    report.as_text(runlog.Group([run]), runlog.judge(runlog.Group([run])), [])


# --------------------------------------------------------------------------------------------------------------- rules

DATA = "SHARD_VERSION, HEADER_BYTES = 20240520, 1,"  # in the data section
RULES = {
    "enough runs for p < 0.01": (dict(losses=LOSSES[:4]), "too few to show a loss below 3.28"),
    "10,485,760 validation tokens": (
        dict(shards="9 train shards, 900,000,000 tokens; 2,097,152 of 100,000,000"),
        "other validation",
    ),
    "FineWeb files": (
        dict(shards="5 train shards, 122,294,600 tokens; 10,485,760 of 10,515,294"),
        "on another corpus",
    ),
    "8 H100 GPUs": (dict(gpus=1), "on 1 x NVIDIA H100 80GB HBM3"),
    "no overrides": (dict(overrides="--run_id=a --muon_lr=0.03"), "with overrides"),
    "no extra compile flags": (
        dict(source=SOURCE + "\ntorch._inductor.config.coordinate_descent_tuning = True\n"),
        "with extra compile flags",
    ),
    "data section unchanged": (
        dict(source=SOURCE.replace(DATA, "SHARD_VERSION, HEADER_BYTES = 20240520, 2,")),
        "with another data section",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_can_be_broken_alone(tmp_path, name):
    change, called = RULES[name]
    losses = change.pop("losses", LOSSES) if "losses" in change else LOSSES
    assert DATA in runlog.data_section(SOURCE)
    write(tmp_path, [own_log(loss, TIMES[i], **change) for i, loss in enumerate(losses)])
    rules, verdict = judged(runlog.read_runs([tmp_path]))
    assert broken(rules) == [name]
    assert verdict == f"Not a record: {len(losses)} complete runs, {called}."


def test_a_clock_that_leaves_out_steps_breaks_its_rule_alone(tmp_path):
    logs = [own_log(a, b, every_step=False) for a, b in zip(LOSSES, TIMES, strict=True)]
    text = [re.sub(r"(val_loss.* train_time:\d+ms).*", r"\1", log) for log in logs]
    assert judged(runlog.read_runs([write(tmp_path, text)]))[0][CLOCK].holds is None
    mean = [
        re.sub(r"step:(\d{3,})/(.*):(\d+)ms.*", lambda m: f"{m[0]} step_avg:{int(m[3]) / (int(m[1]) - 8):.2f}ms", log)
        for log in text
    ]
    rules, verdict = judged(runlog.read_runs([write(tmp_path, mean)]))
    assert broken(rules) == [CLOCK]
    assert verdict == "Not a record: 7 complete runs, with steps that the clock leaves out."


def test_logs_of_different_sources_are_no_record(tmp_path):
    write(tmp_path, [own_log(a, b, SOURCE + f"#{i % 2}") for i, (a, b) in enumerate(zip(LOSSES, TIMES, strict=True))])
    assert broken(judged(runlog.read_runs([tmp_path]))[0]) == ["one source in all logs"]


def test_a_quarter_run_on_one_gpu_is_reported_in_full_and_called_what_it_is(tmp_path, capsys):
    overrides = "--run_id=q --num_scheduled_iterations=380 --num_extension_iterations=40 --val_files=other/val_*.bin"
    write(tmp_path, [own_log(3.3357, 187.16, overrides=overrides, gpus=1, total=420, curve={0: 10.8, 400: 3.35})])
    status, out = printed(capsys, tmp_path)
    assert status == 0
    for text in (
        "3.3357",
        "187.160",
        "stage 1 ",
        "extension ",
        "30704 MiB",
        "1 x NVIDIA H100 80GB HBM3",
        "PyTorch 2.11.0",
    ):
        assert text in out
    verdict = r"^Not a record: 1 complete run, .*on another corpus, on 1 x NVIDIA H100 80GB HBM3, with overrides\.$"
    for text in (out, printed(capsys, tmp_path, "--markdown")[1]):
        assert re.search(verdict, text, re.M)


@pytest.mark.parametrize(
    "gpus, gpu, holds",
    [
        (8, "NVIDIA H100 80GB HBM3", True),
        (8, "NVIDIA H100 PCIe", True),
        (8, "NVIDIA H200", False),
        (8, "NVIDIA A100-SXM4-80GB", False),
        (4, "NVIDIA H100 80GB HBM3", False),
        (16, "NVIDIA H100 80GB HBM3", False),
        (8, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", False),
    ],
)
def test_gpus_of_the_right_kind(tmp_path, gpus, gpu, holds):
    assert judged([read(tmp_path, own_log(gpus=gpus, gpu=gpu))])[0]["8 H100 GPUs"].holds is holds
    if len(gpu) < 30:
        assert judged([read(tmp_path, public_log(gpus=gpus, gpu=gpu))])[0]["8 H100 GPUs"].holds is holds


@pytest.mark.parametrize(
    "line, flags",
    [
        ("model = torch.compile(model, dynamic=False, fullgraph=True)", []),
        ('model = torch.compile(model, mode="max-autotune")', ["mode="]),
        ("model = torch.compile(\n    net(a),\n    options={'x': 1},\n)", ["options="]),
        ("model.compile(backend='x')", ["backend="]),
        ("f = partial(torch.compile, mode='x')", ["mode="]),
        ("torch.compile(model, **settings)", ["**"]),
        ("torch._inductor.config.max_autotune = True", ["_inductor.config.max_autotune"]),
        ("from torch._inductor import config", ["_inductor.config"]),
        ("import torch._inductor.config as c", ["_inductor.config"]),
        ("os.environ['TORCHINDUCTOR_MAX_AUTOTUNE'] = '1'", ["TORCHINDUCTOR_MAX_AUTOTUNE"]),
        ("os.environ['TORCH_COMPILE_CPROFILE'] = '1'", ["TORCH_COMPILE_CPROFILE"]),
        ("# torch._inductor.config.max_autotune = True", []),
        ('"""torch.compile(x, mode=1) and torch._inductor.config.x\n"""', []),
        ("x = 'torch._inductor.config.x = 1'  # torch.compile(mode=2)", []),
        ("torch._dynamo.config.recompile_limit = 64", []),
        ("p = re.compile(r'\\d', flags=re.M)", []),
    ],
)
def test_extra_compile_flags(line, flags):
    assert runlog.compile_flags(PUBLIC_SOURCE + line + "\n") == flags


def test_files_are_the_overrides_then_the_presets_then_the_sources(tmp_path):
    fineweb = "data/fineweb10B/fineweb_train_*.bin"
    assert read(tmp_path, own_log()).files("train_files") == fineweb
    assert read(tmp_path, public_log()).files("train_files") == fineweb
    assert read(tmp_path, own_log(overrides="--train_files=a b/*.bin")).files("train_files") == "a b/*.bin"
    smoke = read(tmp_path, own_log(preset="smoke"))
    assert smoke.files("train_files").startswith("data/sample/")
    assert broken(judged([smoke])[0]) == ["enough runs for p < 0.01", "FineWeb files", "no overrides"]


@pytest.mark.parametrize(
    "shards, holds",
    [
        ("9 train shards, 900,000,000 tokens; 10,485,760 of 100,000,000", True),
        ("103 train shards, 10,253,094,512 tokens; 10,485,760 of 100,000,000", True),
        ("9 train shards, 900,000,000 tokens; 10,485,760 of 10,515,294", False),
        ("9 train shards, 800,000,000 tokens; 10,485,760 of 100,000,000", False),
        ("9 train shards, 900,000,001 tokens; 10,485,760 of 100,000,000", False),
    ],
)
def test_fineweb_is_told_by_its_token_counts_too(tmp_path, shards, holds):
    assert judged([read(tmp_path, own_log(shards=shards))])[0]["FineWeb files"].holds is holds


def test_validation_tokens_of_a_public_log_are_its_sources(tmp_path):
    for text, holds in (("10485760", True), ("20 * 524_288", True), ("10_485_761", False), ("big", None)):
        run = read(tmp_path, public_log(source=PUBLIC_SOURCE.replace("10485760", text)))
        assert judged([run])[0]["10,485,760 validation tokens"].holds is holds, text


@pytest.mark.parametrize("mean", [3.27, 3.275, 3.277, 3.278, 3.279, 3.2795])
def test_how_many_runs_would_do(mean):
    needed = runlog.runs_needed(runlog.Stats(3, mean, 0.0015))
    from scipy.stats import t

    distance = (3.28 - mean) / 0.0015
    assert t.sf(distance * needed**0.5, needed - 1) < 0.01
    assert needed == 2 or t.sf(distance * (needed - 1) ** 0.5, needed - 2) >= 0.01


def test_no_number_of_runs_would_do_above_the_target():
    assert runlog.runs_needed(runlog.stats([3.29, 3.30])) is None


@pytest.mark.parametrize("losses", [[], [3.27], [3.27, 3.27]])
def test_no_p_value_where_the_test_is_not_defined(losses):
    assert math.isnan(runlog.p_value(losses))


def test_the_target_is_an_option(seed, capsys):
    _, out = printed(capsys, seed / "new", "--target", "3.27")
    assert "against 3.27" in out and "the mean loss is not below 3.27" in out


# ---------------------------------------------------------------------------------------------------------- comparison


def test_the_steps_saved_at_equal_loss(tmp_path):
    new = runlog.Group(runlog.read_runs([write(tmp_path / "a", [own_log(3.2700, 97.0), own_log(3.2710, 97.2)])]))
    old = runlog.Group(runlog.read_runs([write(tmp_path / "b", [own_log(3.2800, 98.0), own_log(3.2810, 98.4)])]))
    c = runlog.compare(new, old)
    slope = (3.2755 - CURVE[1500]) / 55  # the mean of all four runs
    assert c.steps == pytest.approx(-0.01 / slope) and c.steps > 0
    fewer, more = (dict(report.comparison_lines(a, b, runlog.compare(a, b))) for a, b in ((new, old), (old, new)))
    assert fewer["at equal loss"].startswith(f"about {c.steps:.1f} steps fewer ({c.steps_seconds:.2f} s)")
    assert more["at equal loss"].startswith(f"about {c.steps:.1f} steps more ({c.steps_seconds:.2f} s)")
    assert c.loss == pytest.approx(-0.01) and c.time == pytest.approx(-1.1)
    assert c.loss_error == pytest.approx(math.hypot(0.0005, 0.0005))
    assert c.time_error == pytest.approx(math.hypot(0.1, 0.2))
    assert c.steps_seconds == pytest.approx(c.steps * 3 * 97.65 / (505 * 6 + 40 * 3), rel=1e-3)
    assert not c.warnings


FILES = "9 train shards, 900,000,000 tokens; 10,485,760 of 10,515,294"
SETTINGS = {
    "the run's name, seed and validations": (dict(overrides="--run_id=b --seed=3 --val_loss_every=5 --resume=b"), True),
    "fewer steps": (dict(total=1285), True),
    "fewer steps by an override": (dict(total=1285, overrides="--num_scheduled_iterations=1245"), True),
    "a length by an override": (dict(total=1400, overrides="--length=0.9"), True),
    "another source": (dict(source="x = 1"), True),
    "a quarter of the steps": (dict(total=390), False),
    "half of the steps": (dict(total=778), False),
    "an override": (dict(overrides="--muon_lr=0.02"), False),
    "another preset": (dict(preset="smoke"), False),
    "fewer GPUs": (dict(gpus=1), False),
    "other GPUs": (dict(gpu="NVIDIA H200"), False),
    "other text": (dict(shards=FILES), False),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_records_are_compared_with_runs_of_their_setting(tmp_path, what):
    change, alike = SETTINGS[what]
    records = tmp_path / "records"
    write(records / "2026-01-01_A", [own_log(3.28, source="x = 2")])
    write(records / "2026-01-02_Cut", [HALF])
    found, runs = runlog.read_records(records), [read(tmp_path, own_log(3.27, **{"source": "x = 2", **change}))]
    record = runlog.newest_alike(found, runlog.Group(runs))
    assert (record.name if record else None) == ("A" if alike else None)
    again = runlog.newest_alike([runlog.Record(tmp_path / "one", "", "", runlog.Group(runs))], found[0].group)
    assert (again is not None) == alike


def test_a_public_log_is_compared_by_hardware_and_steps(tmp_path):
    records = runlog.read_records(write(tmp_path / "r/2026-01-01_A", [own_log()]).parent)
    for change, alike in ((dict(), True), (dict(gpus=1), False), (dict(total=390), False)):
        run = read(tmp_path, public_log(**change))
        assert (runlog.newest_alike(records, runlog.Group([run])) is not None) == alike


def test_a_comparison_across_machines_says_so(tmp_path, capsys):
    write(tmp_path / "a", [own_log()])
    write(tmp_path / "b", [own_log(gpus=1)])
    _, out = printed(capsys, tmp_path / "a", "--baseline", tmp_path / "b")
    assert "beware        hardware differ" in out and "times cannot be compared" in out


def test_a_baseline_without_a_whole_run(tmp_path, capsys):
    write(tmp_path / "a", [own_log()])
    write(tmp_path / "b", [HALF])
    status, out = printed(capsys, tmp_path / "a", "--baseline", tmp_path / "b")
    assert status == 0 and "nothing to compare" in out


# ------------------------------------------------------------------------------------------------- markdown, json, plot


def test_markdown_has_every_figure(seed, capsys):
    _, out = printed(capsys, seed / "new", "--baseline", seed / "old", "--markdown")
    for text in (
        "| 3.2767 | 97.825 |",
        "p = 0.0025",
        "mean 97.7693, std 0.0425",
        "1.03 s faster",
        "A record by every rule",
    ):
        assert text in out


def test_json_has_every_figure(seed, tmp_path, capsys):
    data = json.loads(printed(capsys, seed / "new", "--baseline", seed / "old", "--json")[1])
    assert [run["loss"] for run in data["runs"]] == LOSSES and [run["seconds"] for run in data["runs"]] == TIMES
    assert data["comparison"]["time"] == pytest.approx(-1.0349, abs=1e-4)
    assert data["statistics"]["loss"]["std"] == pytest.approx(0.0012, abs=5e-5)
    assert all(rule["holds"] for rule in data["rules"]) and data["verdict"].startswith("A record")
    single = json.loads(printed(capsys, write(tmp_path, [own_log(math.nan)]), "--json")[1])
    assert single["statistics"]["p"] is None


def drawn(monkeypatch):
    """Names under which curves are drawn, as plot_losses is called."""
    calls = []
    real = picture.plot_losses
    monkeypatch.setattr(picture, "plot_losses", lambda *a: (calls.append((a[2] and a[2].counted, a[3])), real(*a)))
    return calls


def test_the_plot(seed, tmp_path, capsys):
    for name, magic in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        assert printed(capsys, seed / "new", "--baseline", seed / "old", "--plot", tmp_path / name)[0] == 0
        assert (tmp_path / name).read_bytes().startswith(magic)
    first = (tmp_path / "a.svg").read_bytes()
    printed(capsys, seed / "new", "--baseline", seed / "old", "--plot", tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes() == first
    assert printed(capsys, seed / "new", "--plot", tmp_path / "a.svg")[0] == 0
    assert len((tmp_path / "a.svg").read_bytes()) < len(first)  # without the baseline's curves
    with pytest.raises(SystemExit):
        report.main([str(seed / "new"), "--plot", str(tmp_path / "a.gif")])


def test_the_newest_record_of_the_same_setting_stands_beside_the_runs_in_the_plot(seed, tmp_path, capsys, monkeypatch):
    records = tmp_path / "records"
    write(records / "2026-01-01_Old", [own_log(3.29, 99.0)])
    write(records / "2026-02-01_New", [own_log(3.28, 98.0)])
    write(records / "2026-03-01_Quarter", [own_log(3.33, 25.0, total=390, overrides="--num_scheduled_iterations=350")])
    calls = drawn(monkeypatch)
    for logs in (seed / "new", records / "2026-02-01_New", records / "2026-03-01_Quarter"):
        assert report.main([str(logs), "--plot", str(tmp_path / "a.png"), "--records", str(records)]) == 0
    said = [line for line in capsys.readouterr().err.split("\n") if line]
    assert [name for _, (_, name) in calls] == ["2026-02-01_New", "2026-01-01_Old", ""]
    assert [runs[0].loss for runs, _ in calls[:2]] == [3.28, 3.29] and calls[2][0] is None
    assert said[0].endswith("drawn beside 2026-02-01_New of this setting (8 x NVIDIA H100 80GB HBM3, 1555 steps)")
    assert said[2].endswith("alone: there is no other record of this setting (8 x NVIDIA H100 80GB HBM3, 390 steps)")


def test_a_plot_of_no_complete_run(tmp_path, capsys):
    assert printed(capsys, write(tmp_path, [HALF]), "--plot", tmp_path / "a.png", "--records", tmp_path / "no")[0] == 1
    assert (tmp_path / "a.png").is_file()


# -------------------------------------------------------------------------------------------------------------- submit


def submitted(capsys, *arguments):
    status = submit.main([str(a) for a in arguments])
    return status, capsys.readouterr()


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


def test_a_record_folder(seed, tmp_path, capsys):
    records = tmp_path / "records"
    write(records / "2026-01-19_Before", [own_log(a, b) for a, b in zip(OLD_LOSSES, OLD_TIMES, strict=True)])
    source = SOURCE.replace("muon_lr: float = 0.028", "muon_lr: float = 0.024")
    logs = write(tmp_path / "logs", [own_log(a, b, source) for a, b in zip(LOSSES, TIMES, strict=True)])
    status, out = submitted(capsys, "Fused", logs, "--date", "2026-01-30", "--records", records)
    assert status == 0 and "2026-01-30_Fused" in out.out
    folder = records / "2026-01-30_Fused"
    assert listing(folder) == ["README.md", "loss.png", *(f"run{i}.txt" for i in range(7))]
    assert listing(records)[0] == "2026-01-19_Before" and not list(records.glob(".*"))
    for i in range(7):
        assert (folder / f"run{i}.txt").read_bytes() == (logs / f"run{i}.txt").read_bytes()
    readme = (folder / "README.md").read_text()
    for text in ("# Fused", "p = 0.0025", "1.03 s faster", "![Validation loss of the runs](loss.png)", "To be written"):
        assert text in readme
    assert re.search(r"^-\s+muon_lr: float = 0.028", readme, re.M) and re.search(
        r"^\+\s+muon_lr: float = 0.024", readme, re.M
    )
    assert "1 lines added, 1 removed." in readme
    assert os.stat(folder).st_mode & 0o055 == 0o055 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_first_record_has_no_difference(seed, tmp_path, capsys):
    assert submitted(capsys, "First", seed / "new", "--date", "2026-01-30", "--records", tmp_path / "r")[0] == 0
    assert "There is no previous record" in (tmp_path / "r/2026-01-30_First/README.md").read_text()


def test_the_previous_record_is_the_newest_of_the_same_hardware_and_overrides(seed, tmp_path, capsys):
    records, other = tmp_path / "r", own_log(3.27, 98.0, overrides="--muon_lr=0.02")
    write(records / "2026-01-01_A", [own_log(3.28, 99.0)])
    write(records / "2026-01-02_B", [own_log(3.28, 500.0, gpus=1)])
    write(records / "2026-01-03_C", [other])
    expected = "[2026-01-01\\_A]", "There is no previous record of this setting (2 x NVIDIA H100"
    for name, text, told in (("D", own_log(3.26, 97.0), expected[0]), ("E", own_log(3.26, 400.0, gpus=2), expected[1])):
        logs = write(tmp_path / name, [text])
        assert submitted(capsys, name, logs, "--date", "2026-01-04", "--records", records)[0] == 0
        assert told in (records / f"2026-01-04_{name}/README.md").read_text()
    printed(capsys, "--history", "--records", records)
    rows = [line for line in (records / "README.md").read_text().split("\n") if line.startswith("| 2026")]
    changes = {row.split("[")[1][0]: row.split(" | ")[3] for row in rows}
    assert changes == {"A": "", "B": "", "C": "", "D": "-2.00", "E": ""}


def test_a_long_difference_is_a_file_of_its_own(seed, tmp_path, capsys):
    logs = write(tmp_path / "logs", [public_log(3.27, 90.0), public_log(3.271, 90.1)])
    arguments = ("Other", logs, "--date", "2026-02-01", "--previous", seed / "new", "--records", tmp_path / "r")
    assert submitted(capsys, *arguments)[0] == 0
    folder = tmp_path / "r/2026-02-01_Other"
    assert len((folder / "change.diff").read_text().split("\n")) > 1000
    assert len((folder / "README.md").read_text().split("\n")) < 600
    assert "(change.diff)" in (folder / "README.md").read_text()


def test_the_source_cannot_leave_the_fence_of_its_difference(tmp_path, capsys):
    records = tmp_path / "r"
    write(records / "2026-01-01_A", [own_log(3.27, 98.0, "a = 1")])
    logs = write(tmp_path / "logs", [own_log(3.26, 97.0, "a = 1\n````\n# Injected\n<b>x\x1b[1m")])
    assert submitted(capsys, "B", logs, "--date", "2026-01-02", "--records", records)[0] == 0
    readme = (records / "2026-01-02_B/README.md").read_text()
    fences = [line for line in readme.split("\n") if line.startswith("`````")]
    assert fences == ["`````diff", "`````"] and "\x1b" not in readme


def test_log_names_cannot_leave_the_folder_or_overwrite(tmp_path, capsys):
    names = ["..txt", "README.md.txt", "a b.txt", "a;b.txt", "-x.log", "A_b.txt"]
    for i, name in enumerate(names):
        write(tmp_path / "logs", [])
        (tmp_path / "logs" / name).write_text(own_log(3.27 + i / 1e4, 97 + i))
    logs = [tmp_path / "logs" / name for name in names]
    assert submitted(capsys, "X", *logs, "--date", "2026-01-30", "--records", tmp_path / "r")[0] == 0
    found = listing(tmp_path / "r/2026-01-30_X")
    assert len({name.lower() for name in found}) == len(names) + 2
    assert all(re.fullmatch(r"[\w-]+\.(txt|md|png)", name) for name in found)
    assert (tmp_path / "r/2026-01-30_X/README.md").read_text().startswith("# X")


REFUSALS = {
    "a name that exists": ("Taken", [own_log()], "the name is taken"),
    "a name that exists in other letters": ("taKen", [own_log()], "the name is taken"),
    "a path": ("../x", [own_log()], "letters, digits"),
    "a hidden name": (".x", [own_log()], "letters, digits"),
    "a long name": ("x" * 65, [own_log()], "64 at most"),
    "an empty name": ("", [own_log()], "letters, digits"),
    "an incomplete log": ("X", [own_log(), HALF], "run1.txt: cut off at step"),
    "a log with NaN": ("X", [own_log(math.nan), own_log()], "run0.txt: validation loss is nan"),
    "no log": ("X", ["hello"], "run0.txt: no line of '='"),
    "different sources": (
        "X",
        [own_log(), own_log(3.2, source=SOURCE + "#")],
        "run0.txt and run1.txt were made by diff",
    ),
    "different lengths": ("X", [own_log(), own_log(total=1600)], "run1.txt 1600"),
    "a run twice": ("X", [own_log(), own_log()], "run1.txt: the same run as run0.txt"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_refused_with_nothing_left(tmp_path, capsys, why):
    name, texts, message = REFUSALS[why]
    records = tmp_path / "records"
    write(records / "2025-12-01_Taken", [own_log(3.29, 99.0)])
    before = listing(tmp_path / "records")
    logs = write(tmp_path / "logs", texts)
    status, out = submitted(capsys, name, logs, "--date", "2026-01-30", "--records", records)
    assert status == 1 and message in out.err and out.err.count("\n") == 1 and not out.out
    assert listing(records) == before and sorted(os.listdir(tmp_path)) == ["logs", "records"]


@pytest.mark.parametrize("date", ["2026-1-3", "today", "2026-01-30/..", ""])
def test_a_date_is_a_date(seed, tmp_path, capsys, date):
    status, out = submitted(capsys, "X", seed / "new", "--date", date, "--records", tmp_path / "r")
    assert status == 1 and "YYYY-MM-DD" in out.err and not (tmp_path / "r").exists()


def test_a_failure_half_way_leaves_nothing(seed, tmp_path, monkeypatch):
    records = tmp_path / "r"
    monkeypatch.setattr(submit, "plot_losses", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        submit.main(["X", str(seed / "new"), "--records", str(records)])
    assert os.listdir(records) == []


# ------------------------------------------------------------------------------------------------------------- history


def test_the_repositorys_history_is_current(capsys):
    assert report.main(["--history", "--check"]) == 0, capsys.readouterr().err


def test_history_of_a_folder_that_is_not_there(tmp_path, capsys):
    for check in ([], ["--check"]):
        assert report.main(["--history", "--records", str(tmp_path / "NO\nSUCH"), *check]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and "NO?SUCH: no such folder" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--baseline", "--reference"])
def test_what_to_compare_with_must_be_there(seed, capsys, option):
    with pytest.raises(SystemExit):
        report.main([str(seed / "new"), option, "NOSUCH"])
    assert f"{option} NOSUCH: no such file or folder" in capsys.readouterr().err


def test_history_without_records(tmp_path, capsys):
    assert printed(capsys, "--history", "--records", tmp_path)[0] == 0
    assert "none yet" in (tmp_path / "README.md").read_text()
    assert "97.77 s" in (tmp_path / "history.svg").read_text()
    assert printed(capsys, "--history", "--check", "--records", tmp_path)[0] == 0


def test_history_of_records(seed, tmp_path, capsys):
    write(tmp_path / "2026-01-19_Before", [own_log(a, b) for a, b in zip(OLD_LOSSES, OLD_TIMES, strict=True)])
    write(tmp_path / "2026-01-30_Fused", [own_log(a, b) for a, b in zip(LOSSES, TIMES, strict=True)])
    write(tmp_path / "2026-01-29_Small", [own_log(3.27, 500.0, gpus=1)])
    write(tmp_path / "2026-02-01_Lost", [HALF])
    write(tmp_path / "not a record", [own_log()])
    assert printed(capsys, "--history", "--records", tmp_path)[0] == 0
    rows = [line for line in (tmp_path / "README.md").read_text().split("\n") if line.startswith("| 2026")]
    assert [row.split(" | ")[0] for row in rows] == ["| 2026-01-19", "| 2026-01-29", "| 2026-01-30", "| 2026-02-01"]
    assert rows[2] == (
        "| 2026-01-30 | [Fused](2026-01-30_Fused/) | 97.77 ± 0.04 | -1.03 | 3.2781 ± 0.0012 | 7 | 0.0025 | 1555 "
        "| 8 x NVIDIA H100 80GB HBM3 | yes |"
    )
    assert "on 1 x NVIDIA H100" in rows[1] and "no complete run" in rows[3]
    svg = (tmp_path / "history.svg").read_text()
    assert "97.77 s" in svg and "2026-01-30 Fused" in svg and "Lost" not in svg
    assert (
        svg.count("no record") == 2
        and "97.77 s, " not in svg
        and "500.00 s, no record" in svg
        and "1555 steps, 1 x NVIDIA H100" in svg
    )


def test_history_check_fails_when_not_current(tmp_path, capsys):
    arguments = ["--history", "--check", "--records", str(tmp_path)]
    assert report.main(arguments) == 1
    assert "README.md and history.svg not current: run python records/report.py --history" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    report.main(["--history", "--records", str(tmp_path)])
    write(tmp_path / "2026-01-30_Fused", [own_log()])
    before = (tmp_path / "README.md").read_bytes()
    assert report.main(arguments) == 1 and (tmp_path / "README.md").read_bytes() == before
    report.main(["--history", "--records", str(tmp_path)])
    assert report.main(arguments) == 0
    (tmp_path / "history.svg").write_text("x")
    assert report.main(arguments) == 1 and "history.svg not current" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- watch


@pytest.fixture
def running(tmp_path):
    """A record of one run, and the text of a run that is 1% faster and 0.01 above it in loss."""
    write(tmp_path / "records/2026-01-30_Fused", [own_log(3.2800, 100.0)])
    curve = {step: loss + 0.01 for step, loss in CURVE.items()}
    return tmp_path, own_log(3.2900, 99.0, curve=curve)


def once(capsys, folder, text, *arguments):
    log = folder / "now.txt"
    log.write_text(text)
    assert watch.main([str(log), "--once", "--records", str(folder / "records"), *arguments]) == 0
    return capsys.readouterr().out.strip()


def up_to(text, mark):
    return text[: text.index("\n", text.index(mark)) + 1]


def test_watch_tells_where_a_run_is(running, capsys):
    folder, text = running
    line = once(capsys, folder, up_to(text, "step:760/1555 "))
    total, at = 505 * 6 + 40 * 3, 505 + 255 * 2
    assert line.startswith(f"stage 2 | step 760/1555 | {99 * at / total:.1f} s | loss 3.8826 at 750 | ")
    assert f"{2 * 99000 / total:.1f} ms a step" in line
    assert f"{99 * (total - at) / total:.0f} s left" in line
    assert f"record: {at / total:.2f} s ahead, loss 0.0100 above at 750" in line


def test_watch_compares_with_the_newest_record_of_the_same_setting(running, capsys):
    folder, text = running
    line = once(capsys, folder, up_to(text, "step:760/1555 "))
    quarter = dict(total=390, overrides="--num_scheduled_iterations=350", curve={0: 10.8, 200: 4.0})
    write(folder / "records/2026-02-01_Quarter", [own_log(3.33, 25.0, **quarter)])
    write(folder / "records/2026-02-02_OneGpu", [own_log(3.28, 700.0, gpus=1)])
    write(folder / "records/2026-01-29_Older", [own_log(3.28, 120.0)])
    assert once(capsys, folder, up_to(text, "step:760/1555 ")) == line and " s ahead, loss " in line
    mine = own_log(3.34, 24.0, **{**quarter, "overrides": "--run_id=q --val_steps=7 --length=0.25"})
    assert "record: 0.35 s ahead, loss 0.0000 below at 200" in once(capsys, folder, up_to(mine, "step:200/390 val"))


def test_watch_of_a_run_of_another_setting_says_that_there_is_no_record(running, capsys):
    folder, _ = running
    for change in (dict(gpus=1, gpu="CPU", preset="smoke"), dict(gpus=1), dict(overrides="--muon_lr=0.1")):
        text = own_log(3.29, 99.0, **change)
        line = once(capsys, folder, up_to(text, "step:760/1555 "))
        assert line.endswith("s left | no record of this setting") and "ahead" not in line
        assert "record" not in once(capsys, folder, up_to(text, "warm-up: 33"))
        line = once(
            capsys, folder, up_to(text, "step:760/1555 "), "--against", str(folder / "records/2026-01-30_Fused")
        )
        assert "s ahead" in line


def test_watch_without_a_record_goes_by_the_pace(running, capsys):
    folder, text = running
    line = once(capsys, folder, up_to(text, "step:1200/1555 "), "--records", str(folder / "none"))
    assert "record" not in line
    assert f"{355 * 3 * 99 / (505 * 6 + 40 * 3):.0f} s left" in line


def test_watch_paces_by_the_last_steps():
    run = runlog.Run(Path("x"), total=200, times={step: 10.0 * step + 40.0 * max(step - 80, 0) for step in range(101)})
    assert watch.recent_ms(run) == pytest.approx(50) and watch.time_left(run, None) == pytest.approx(5)


def test_watch_of_a_record_that_validates_elsewhere_says_about(running, capsys):
    folder, text = running
    write(folder / "records/2026-02-01_Next", [public_log(3.28, 98.0, curve={0: 10.8284, 600: 4.0, 800: 3.8})])
    line = once(capsys, folder, up_to(text, "step:760/1555 "))
    assert f"loss about {3.8826 - 3.85:.4f} above at 750" in line and " behind" in line


def test_watch_before_the_first_step(running, capsys):
    folder, text = running
    assert "no steps yet" in once(capsys, folder, up_to(text, "warm-up"))
    assert "no steps yet" in once(capsys, folder, "")


def test_watch_names_trouble(running, capsys):
    folder, text = running
    line = once(capsys, folder, up_to(text.replace("val_loss:3.8826", "val_loss:nan"), "step:760/1555 "))
    assert "validation loss is nan at step 750" in line and "cut off" not in line


def grow(log, text, marks):
    """Appends a log up to each mark in turn, cut in the middle of a line on the way."""
    done = 0
    for mark in [*marks, None]:
        end = len(text) if mark is None else text.index(mark)
        with open(log, "a") as file:
            file.write(text[done : end + 7 if mark else end])
        done = end + 7 if mark else end
        yield mark


def test_watch_follows_a_growing_file_without_a_terminal(running):
    folder, text = running
    log = folder / "growing.txt"
    command = [sys.executable, str(ROOT / "records/watch.py"), str(log), "--records", str(folder / "records")]
    watcher = subprocess.Popen([*command, "--interval", "0.02"], stdout=subprocess.PIPE, text=True)
    try:
        lines = []
        for mark in grow(log, text, ["warm-up", "step:100/1555 ", "step:252/1555 ", "step:502/1555 "]):
            if mark is None:
                break
            if mark != "step:100/1555 " or not lines:
                lines.append(watcher.stdout.readline())
            time.sleep(0.1)
        rest = watcher.communicate(timeout=20)[0].strip().split("\n")
    finally:
        watcher.kill()
    assert watcher.returncode == 0
    assert "no steps yet" in lines[0]
    assert rest[-1].startswith(
        "extension | step 1555/1555 | 99.0 s | loss 3.2900 | record: 1.00 s ahead, loss 0.0100 above"
    )
    assert len(lines) + len(rest) <= 6 and not any("\r" in line or "\x1b" in line for line in [*lines, *rest])


def test_watch_rewrites_its_line_on_a_terminal(running):
    folder, text = running
    log = folder / "growing.txt"
    log.write_text(up_to(text, "step:100/1555 "))
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "records/watch.py"), str(log), "--records", str(folder / "records")]
    environment = {**os.environ, "COLUMNS": "80"}
    watcher = subprocess.Popen([*command, "--interval", "0.02"], stdout=theirs, env=environment)
    os.close(theirs)
    out = b""
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    out += os.read(ours, 4096)
                except OSError:
                    break
            if b"step 100/1555" in out and log.stat().st_size < len(text):
                log.write_text(text)
        assert watcher.wait(timeout=10) == 0
    finally:
        watcher.kill()
        os.close(ours)
    lines = out.decode().split("\r\x1b[K")[1:]
    assert lines[0].startswith("stage 1 | step 100/1555") and lines[-1].startswith("extension | step 1555/1555")
    assert all(len(line.rstrip("\r\n")) <= 79 for line in lines)


def test_watch_gives_up_when_nothing_comes(running, capsys):
    folder, text = running
    log = folder / "stuck.txt"
    log.write_text(up_to(text, "step:100/1555 "))
    arguments = [str(log), "--interval", "0.01", "--patience", "0.1", "--records", str(folder / "records")]
    begin = time.monotonic()
    assert watch.main(arguments) == 1 and time.monotonic() - begin < 15
    assert "nothing new" in capsys.readouterr().err


def test_watch_takes_the_newest_log(running, capsys):
    folder, text = running
    logs = folder / "logs"
    for i, name in enumerate(("new", "old")):
        write(logs, [up_to(text, f"step:{100 + i}/1555 ")], name)
    (logs / "gone.txt").symlink_to(logs / "nowhere")
    for i, name in enumerate(("new", "old")):
        os.utime(logs / f"{name}0.txt", (1e9 - i, 1e9 - i))
    assert watch.main([str(logs), "--once", "--records", str(folder / "records")]) == 0
    assert "step 100/1555" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- the README's

FIGURES = """program,steps,step,train_time_ms,val_loss
this project at abc,390,0,0,10.8
this project at abc,390,200,48000,3.95
this project at abc,390,390,138000,3.34
"<b>$x (public; 98 s)",390,25,6434,6.0879
"<b>$x (public; 98 s)",390,390,187922,3.3372
"""


def test_the_readmes_picture_is_what_its_command_draws(tmp_path):
    command = re.search(
        r"^python records/picture.py (.+) --out records/quarter.svg", (ROOT / "README.md").read_text(), re.M
    )
    assert picture.main([*(str(ROOT / path) for path in command[1].split()), "--out", str(tmp_path / "a.svg")]) == 0
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (ROOT / "records/quarter.svg").read_bytes(), "run the command in the README again"
    assert len(drawn) < 60_000 and "records/quarter.svg)" in (ROOT / "README.md").read_text()
    assert "3.337" in picture.NOTE + drawn.decode() and "open English text instead of FineWeb" in drawn.decode()


def test_programs_beside_each_other(tmp_path):
    (tmp_path / "a.csv").write_text(FIGURES)
    record = write(tmp_path / "record", [own_log(3.33, 60.0, gpus=2), own_log(3.34, 61.0, gpus=2)])
    arguments = [str(tmp_path / "a.csv"), "--out", str(tmp_path / "a.svg"), "--target", "3.3", "--note", "here & now"]
    assert picture.main([*arguments[:1], str(record), *arguments[1:]]) == 0
    svg = (tmp_path / "a.svg").read_text()
    from xml.etree import ElementTree

    words = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
    for text in ("here & now", "target 3.3", "<b>$x", "187.9 s, 3.3372", "this program", "121.0 s, 3.3350"):
        assert text in words
    assert "138.0 s, 3.3400" not in words and svg.count("<polyline") == 3
    assert picture.main(arguments) == 0 and "138.0 s, 3.3400" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    "figures, folder, message",
    [
        (None, None, "a.csv: No such file or directory"),
        ("", None, "its first line must be program,steps,step,train_time_ms,val_loss"),
        (FIGURES.replace("3.95", "x"), None, "a.csv, line 3: must be a name and four numbers"),
        (FIGURES.replace(",3.95", ""), None, "a.csv, line 3: must be a name and four numbers"),
        (FIGURES[:41], None, "no figures"),
        (FIGURES + "x\udcff", None, "a.csv: not a file of figures"),
        (FIGURES, "empty", "empty: must hold complete runs of one length"),
        (FIGURES, "missing", "missing: must hold complete runs of one length"),
    ],
)
def test_figures_that_cannot_be_drawn_are_named(tmp_path, capsys, figures, folder, message):
    if figures is not None:
        (tmp_path / "a.csv").write_text(figures, errors="surrogateescape")
    (tmp_path / "empty").mkdir()
    arguments = [
        str(tmp_path / "a.csv"),
        *([str(tmp_path / folder)] if folder else []),
        "--out",
        str(tmp_path / "a.svg"),
    ]
    assert picture.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "a.svg").exists()
