"""Warm-up, the run and what it leaves behind: in this process, and end to end through the launcher."""

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import threading
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_run
import torch
from checkpoint import piece_paths, read_pieces
from conftest import rows_in_use

import train_gpt
from train_gpt import (
    FINAL_WINDOWS,
    PRESETS,
    STAGES,
    Clock,
    Hyperparameters,
    Log,
    Progress,
    Trainer,
    TrainLoader,
    World,
    Yarn,
    find_files,
    prefix_table,
    validation_batches,
)

CPU = torch.device("cpu")
# Nats at steps 0, 5 and 10, the types' rounding, which ten steps magnify differently on each PyTorch and processor;
# measured up to 1e-4, 8e-3, 1.1e-2 with 2.13 and 1.2e-2, 4.6e-2, 4.7e-2 with 2.11 (three seeds). Within these steps the
# loss falls by 0.8.
BF16_LOSS_TOLERANCE = 0.07
# Nats between one process and two, as logged; measured 1.3e-3: documents of joined micro-batches lie elsewhere in the
# rotary tables, which are bf16. Meanwhile the loss falls by 0.45.
LOSS_TOLERANCE = 5e-3
REPOSITORY = Path(train_gpt.__file__).resolve().parent

# ---------------------------------------------------------------------------- warm-up


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small_run.write_text(folder)
    return folder


def everything_of(trainer):
    """Every tensor and number that a step can change, by name."""
    out = {}
    for name, slot in trainer.optimizer.slots.items():
        p = trainer.ngrams.algorithm.p if name == "ngrams" else trainer.model.get_parameter(name)
        out[f"{name}"], out[f"{name}.grad"] = p.detach(), slot.p.grad
        for state in ("m", "v", "second_moment", "low_bits", "updates", "last"):
            value = getattr(slot.algorithm, state, None)
            if value is not None:
                out[f"{name}.{state}"] = value
    yarn = trainer.model.yarn
    out.update({"yarn.frequencies": yarn.frequencies, "yarn.cos": yarn.cos, "yarn.sin": yarn.sin})
    out.update({"yarn.scale": yarn.scale, "stage_index": trainer.stage_index})
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in out.items()}


def different(before, after):
    """Names of what is not the same to the bit."""
    assert before.keys() == after.keys()

    def bits(value):
        return value.contiguous().view(torch.uint8) if isinstance(value, torch.Tensor) else torch.tensor([value])

    return {name for name in before if not torch.equal(bits(before[name]), bits(after[name]))}


def run_of(folder, name, warm, **overrides):
    """A trainer after its run; what it was before and after its warm-up, its losses, and the shapes the model saw."""
    hp = small_run.small_hyperparameters(folder, run_id=name, val_loss_every=5, **overrides)
    trainer = Trainer(hp, World())
    found = SimpleNamespace(trainer=trainer, before=everything_of(trainer), shapes={"warm-up": set(), "run": set()})
    at = "warm-up"

    def note(module, arguments):
        batch, _, target_weights, *_ = arguments
        stage = stages[-1] if torch.is_grad_enabled() else None
        found.shapes[at].add((len(batch.inputs), stage, len(target_weights), torch.is_grad_enabled()))

    def note_stage(step, *arguments):
        stages.append(trainer.schedule.stage_index(step))
        micro_step(step, *arguments)

    stages, micro_step, trainer.micro_step = [], trainer.micro_step, note_stage
    trainer.model.register_forward_pre_hook(note)
    val_batches, train_paths = validation_batches(find_files(hp.val_files), hp, World()), find_files(hp.train_files)
    changed = set()
    reset = trainer.optimizer.reset

    def reset_after_a_look():
        changed.update(different(found.before, everything_of(trainer)))
        reset()

    trainer.optimizer.reset = reset_after_a_look
    if warm:
        trainer.warm_up(train_paths, val_batches)
    found.changed, found.after = changed, everything_of(trainer)
    at = "run"
    log = Log(hp, World())
    found.losses = trainer.run(log, train_paths, val_batches)
    log.close()
    found.end = everything_of(trainer)
    return found


class Runs:
    """In a type of the parameters: the run after a warm-up, and the run without, each made when first asked for."""

    def __init__(self, folder, dtype):
        self.folder, self.dtype = folder, dtype

    @cached_property
    def warm(self):
        return run_of(self.folder, f"warm_{self.dtype}", warm=True, dtype=self.dtype)

    @cached_property
    def cold(self):
        return run_of(self.folder, f"cold_{self.dtype}", warm=False, dtype=self.dtype)


@pytest.fixture(scope="module")
def runs(folder):
    return {dtype: Runs(folder, dtype) for dtype in ("float32", "bfloat16")}


in_both_types = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@in_both_types
def test_warm_up_puts_back_every_bit(runs, dtype):
    warm = runs[dtype].warm
    assert different(warm.before, warm.after) == set()
    # The comparison means something: until the optimizer's reset, states, frequencies and the stage were others.
    # (Parameters are back by then, and every step clears its gradients.)
    yarn = {f"yarn.{name}" for name in ("frequencies", "scale", "cos", "sin")}
    assert {*yarn, "stage_index"} <= warm.changed
    further_bits = ("low_bits",) if dtype == "bfloat16" else ()
    for row in rows_in_use():  # moments of a gradient that is zero at first stay zero
        states = ("m", "second_moment", *further_bits) if row.algorithm == "normuon" else ("updates",)
        assert {f"{row.name}.{state}" for state in states} <= warm.changed
    assert {"embed.m", "embed.v", "scalars.v", "ngrams", "ngrams.v", "ngrams.last"} <= warm.changed


@in_both_types
def test_a_run_after_a_warm_up_is_to_the_bit_the_run_without(runs, dtype):
    warm, cold = runs[dtype].warm, runs[dtype].cold
    assert warm.losses == cold.losses and len(warm.losses) == 3
    assert different(warm.end, cold.end) == set()
    assert different(cold.before, cold.end) >= {row.name for row in rows_in_use()}


def test_warm_up_sees_every_stage_and_shape_of_the_run(runs):
    shapes = runs["float32"].warm.shapes
    assert shapes["run"] == shapes["warm-up"]
    assert {stage for _, stage, _, training in shapes["run"] if training} == {*range(len(STAGES))}


@pytest.mark.parametrize("size", [2, 4, 8])
def test_gpus_compile_in_turns_each_of_them_everything_and_first_what_no_other_does(folder, size):
    trainer = Trainer(small_run.small_hyperparameters(folder), World())
    paths, starts = find_files(trainer.hp.train_files), trainer.schedule.starts
    batches = [*TrainLoader(paths, [trainer.schedule.size(step) for step in starts], trainer.hp, World())]
    val_batch, exchange = validation_batches(find_files(trainer.hp.val_files), trainer.hp, World())[0]
    trainer.micro_step = lambda step, batch, _: seen.append((step, len(batch.inputs), batch.classes is None))
    trainer.validation_losses = lambda batch, _, ngrams: seen.append(("validation", len(batch.inputs), len(ngrams)))
    orders = []
    for rank in range(size):
        trainer.world, seen = SimpleNamespace(rank=rank, size=size, on_gpu=True, device=CPU), []
        trainer.compile_in_turns([*zip(starts, batches, strict=True)], val_batch, exchange)
        orders.append(seen)
    assert {step for step, *_ in orders[0]} == {*starts, "validation"}
    assert ("validation", len(val_batch[0].inputs), 1 + int(val_batch[0].slots.max())) in orders[0]
    assert all(len(order) == len(orders[0]) and {*order} == {*orders[0]} for order in orders)
    assert len({order[0] for order in orders}) == size


def test_rotary_frequencies_follow_the_long_window_at_each_stages_first_step(folder):
    trainer = Trainer(small_run.small_hyperparameters(folder), World())
    yarn, windows = Yarn(trainer.hp.head_dim, 8, CPU), [stage.long_window for stage in trainer.hp.stages]
    for i, start in enumerate(trainer.schedule.starts):
        if i:
            yarn.grow(*(window * trainer.hp.window_block for window in windows[i - 1 : i + 1]))
        for step in (start, start + 1):
            trainer.enter_step(min(step, trainer.hp.total_steps - 1))
            assert trainer.model.yarn.scale == yarn.scale
            assert torch.equal(trainer.model.yarn.frequencies, yarn.frequencies)


def test_validation_sees_as_far_as_training_has_so_far_and_the_final_one_further(folder):
    hp = small_run.small_hyperparameters(folder, run_id="windows", val_steps=tuple(range(STEPS)))
    trainer, seen = Trainer(hp, World()), []
    trainer.validate = lambda batches, windows: seen.append(windows) or 1.0
    trainer.add_gradients, trainer.update = lambda step, batch: None, lambda step, following: None
    trainer.run(Log(hp, World()), find_files(hp.train_files), [])
    so_far = [trainer.schedule.windows(step) for step in (0, *range(STEPS - 1))]
    assert seen == [*so_far, trainer.schedule.window_tokens(*FINAL_WINDOWS)]


def test_bfloat16_follows_float32(runs):
    narrow, wide = runs["bfloat16"].cold, runs["float32"].cold
    assert narrow.trainer.model.embed.dtype == torch.bfloat16 and wide.trainer.model.embed.dtype == torch.float32
    for ours, theirs in zip(narrow.losses, wide.losses, strict=True):
        assert abs(ours - theirs) < BF16_LOSS_TOLERANCE
    assert wide.losses[-1] < wide.losses[0] - 0.3


@pytest.mark.parametrize("progress", [None, Progress(step=2, val_losses=[5.0])], ids=["begun", "resumed"])
def test_prefixes_are_looked_up_on_the_clock(folder, monkeypatch, progress):
    hp = small_run.small_hyperparameters(folder, run_id=f"prefixes_{progress is None}")
    trainer, happened = Trainer(hp, World()), []

    def note(name, function):
        monkeypatch.setattr(train_gpt, name, lambda *args: (happened.append(name), function(*args))[1])

    note("Clock", Clock)
    note("prefix_table", prefix_table)
    trainer.update = lambda step, following: happened.append("step")
    assert (trainer.model.prefixes == -1).all()
    log, files = Log(hp, World()), find_files(hp.train_files)
    trainer.run(log, files, validation_batches(find_files(hp.val_files), hp, World()), progress)
    log.close()
    assert happened[:3] == ["Clock", "prefix_table", "step"] and happened.count("prefix_table") == 1
    assert torch.equal(trainer.model.prefixes, prefix_table(hp)) and trainer.model.prefixes.max() > 0


def test_validation_counts_next_tokens_without_their_prefixes(folder):
    hp = small_run.small_hyperparameters(folder)
    trainer, batches = Trainer(hp, World()), validation_batches(find_files(hp.val_files), hp, World())
    windows = trainer.schedule.windows(0)
    without = trainer.validate(batches, windows)
    trainer.model.prefixes.copy_(torch.arange(hp.padded_vocab).flip(0))
    assert trainer.validate(batches, windows) == without


@pytest.mark.parametrize("prefix", [(0.25, 0.0), (0.0, 0.0)])
def test_a_prefix_is_a_target_in_stages_that_give_it_a_weight(folder, prefix):
    hp, seen = small_run.small_hyperparameters(folder), set()
    hp = replace(hp, stages=tuple(stage._replace(prefix=prefix) for stage in hp.stages))
    trainer = Trainer(hp, World())
    (batch,) = TrainLoader(find_files(hp.train_files), [trainer.schedule.size(0)], hp, World())

    def note(module, arguments, named):
        seen.add((len(arguments[2]), named["prefix"]))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.add_gradients(0, batch)
    assert seen == {(len(hp.stages[0].target_weights) + any(prefix), any(prefix))}


def test_adam_updates_in_each_step_or_in_every_second_one_by_the_stage(folder):
    stages = [stage._replace(adam=adam) for stage, adam in zip(small_run.SMALL["stages"], (1, 2, 1, 2, 2), strict=True)]
    trainer = Trainer(small_run.small_hyperparameters(folder, stages=tuple(stages)), World())
    assert trainer.schedule.starts == (0, 2, 4, 6, 9)
    updated, adam = [], trainer.optimizer.slots["scalars"].algorithm
    for step in range(10):
        before = adam.updates
        trainer.optimizer.slots["ngrams"].algorithm.update = lambda *_: torch.zeros(1)  # no row was looked up
        trainer.update(step)
        updated += [step] * (adam.updates - before)
    assert updated == [0, 1, 3, 4, 5, 7, 9]


# ---------------------------------------------------------------------------- micro-batches through a stage's graph


def trainer_with_classes(folder, classes):
    """A trainer whose stages all have so many classes, and its first step."""
    hp = small_run.small_hyperparameters(folder)
    trainer = Trainer(replace(hp, stages=tuple(stage._replace(classes=classes) for stage in hp.stages)), World())
    (batch,) = TrainLoader(find_files(hp.train_files), [trainer.schedule.size(0)], trainer.hp, World())
    return trainer, batch


def gradients_of(trainer):
    return {name: value for name, value in everything_of(trainer).items() if name.endswith(".grad")}


@pytest.mark.parametrize("classes, in_graph", [(0, True), (96, True), (16, False)], ids=["all", "some", "too few"])
def test_a_micro_batch_of_too_many_different_targets_takes_all_classes_past_the_graph(folder, classes, in_graph):
    trainer, batch = trainer_with_classes(folder, classes)
    assert all((b.classes is None) == (classes != 96) for b in batch.micro_batches) and len(batch.micro_batches) == 2
    unused, replayed = gradients_of(trainer), []
    trainer.graphs[0, classes == 0] = lambda *inputs: replayed.append(inputs)
    trainer.add_gradients(0, batch)
    if in_graph:
        assert [(id(b), weights.tolist()) for b, weights in replayed] == [
            (id(b), trainer.target_weights[0].tolist()) for b in batch.micro_batches
        ]
        assert different(unused, gradients_of(trainer)) == set()
    else:
        whole, same = trainer_with_classes(folder, 0)
        whole.add_gradients(0, same)
        assert replayed == [] and different(gradients_of(whole), gradients_of(trainer)) == set()
        assert "embed.grad" in different(unused, gradients_of(trainer))


def test_of_a_step_only_the_micro_batches_without_classes_go_past_the_graph(folder):
    trainer, batch = trainer_with_classes(folder, 96)
    with_classes, other = batch.micro_batches
    rare, replayed = other._replace(classes=None), []
    trainer.graphs[0, False] = lambda micro_batch, _: replayed.append(micro_batch)
    trainer.add_gradients(0, batch._replace(micro_batches=[with_classes, rare]))
    whole, _ = trainer_with_classes(folder, 0)
    whole.micro_step(0, rare, whole.target_weights[0])
    assert len(replayed) == 1 and replayed[0] is with_classes
    assert different(gradients_of(whole), gradients_of(trainer)) == set()


@pytest.fixture
def deterministic_as_it_was(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles for the CPU")
@pytest.mark.parametrize("switch", [False, True])
def test_the_deterministic_switch_holds_for_every_graph_that_is_compiled(switch, folder, deterministic_as_it_was):
    model = Trainer(small_run.small_hyperparameters(folder, compile="on", deterministic=switch), World()).model
    for tokens in (3, 5):  # PyTorch takes a setting of its compiler's back after the first
        model.normed_input(torch.ones(tokens, 16), None, None)
        assert torch._inductor.config.deterministic is torch.are_deterministic_algorithms_enabled() is switch
    assert not torch.utils.deterministic.fill_uninitialized_memory


# ---------------------------------------------------------------------------- end to end

STEPS = 7
SMALLER = [
    "--preset=smoke",
    "--num_scheduled_iterations=6",
    "--num_extension_iterations=1",
    "--num_heads=2",
    "--ngram_rows=64",
    "--val_tokens=1024",
    "--val_batch_size=1024",
    "--muon_momentum_warmup=4",
    "--adam_lr=0.03",
    "--adam_eps=1e-06",  # as in small_run.py
]
STEP_LINE = re.compile(rf"step:(\d+)/{STEPS} train_time:(\d+)ms step_avg:(\d+\.\d\d)ms")
VAL_LINE = re.compile(rf"step:(\d+)/{STEPS} val_loss:(\d+\.\d{{4}}) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms")


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """The folder whose data/sample/ holds the offline sample."""
    if (REPOSITORY / "data" / "sample" / "sample_val_000000.bin").exists():
        return REPOSITORY
    root = tmp_path_factory.mktemp("sample")
    script = REPOSITORY / "data" / "sample.py"
    subprocess.run([sys.executable, str(script), "--out", str(root / "data" / "sample")], check=True, timeout=120)
    return root


def launch(folder, sample, processes, *arguments, stderr=subprocess.PIPE):
    """train_gpt.py under the launcher, started in the folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment.update(DATA_PATH=str(sample), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.run(
        [*command, str(REPOSITORY / "train_gpt.py"), *SMALLER, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=240,
    )


def parse_log(path):
    """Source, header lines, {step: train time}, {step: validation loss}, remaining lines. Order is asserted."""
    text = path.read_text()
    rule = "=" * 100
    source, header, body = re.split(rf"^{rule}\n", text, maxsplit=2, flags=re.MULTILINE)
    steps, losses, rest, last = {}, {}, [], 0
    for line in body.splitlines():
        if match := STEP_LINE.fullmatch(line):
            step, time, average = int(match[1]), int(match[2]), float(match[3])
            assert step == last + 1
            steps[step] = time
        elif match := VAL_LINE.fullmatch(line):
            step, time, average = int(match[1]), int(match[3]), float(match[4])
            assert step == last  # after the step's own line
            losses[step] = float(match[2])
        else:
            assert not line.startswith("step:"), line
            rest.append(line)
            continue
        assert abs(time - max(step, 1) * average) <= 0.5 + 0.005 * max(step, 1) + 1e-6
        last = step
    assert list(steps) == sorted(steps) and list(steps.values()) == sorted(steps.values())
    return source, header.splitlines(), steps, losses, rest


class Run(SimpleNamespace):
    """The folder a run was started in, its result, what was on its screen."""

    @cached_property
    def log(self):
        (path,) = self.folder.glob("logs/*.txt")
        return parse_log(path)


@pytest.fixture(scope="module")
def one_process(sample, tmp_path_factory):
    """A run with output that is not a terminal's."""
    folder = tmp_path_factory.mktemp("one")
    result = launch(folder, sample, 1, "--run_id=one", "--val_loss_every=2", "--val_steps=3", "--save_checkpoint=true")
    assert result.returncode == 0, result.stderr
    return Run(folder=folder, result=result)


@pytest.fixture(scope="module")
def two_processes(sample, tmp_path_factory):
    """A run whose standard error is a terminal."""
    folder = tmp_path_factory.mktemp("two")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # a new one has no width, and no bar
    screen = []

    def read():
        try:
            while piece := os.read(ours, 4096):
                screen.append(piece)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        result = launch(folder, sample, 2, "--run_id=two", "--val_loss_every=0", stderr=theirs)
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    screen = b"".join(screen).decode()
    assert result.returncode == 0, screen
    return Run(folder=folder, result=result, screen=screen)


def test_a_run_learns_0_4_nats_in_seven_steps(one_process, two_processes):
    losses = one_process.log[3]
    assert abs(losses[0] - 10.7) < 0.1  # ln 50257 is 10.82; a little is copied before anything is learned
    assert losses[STEPS] < losses[0] - 0.4
    assert two_processes.log[3][STEPS] < losses[0] - 0.4


def test_two_processes_reach_the_loss_of_one(one_process, two_processes):
    assert abs(one_process.log[3][STEPS] - two_processes.log[3][STEPS]) < LOSS_TOLERANCE


def test_the_log_begins_with_the_program_that_ran(one_process):
    assert one_process.log[0].rstrip("\n") == (REPOSITORY / "train_gpt.py").read_text().rstrip("\n")


def test_the_log_names_versions_and_overrides(one_process, two_processes):
    for run, name in ((one_process, "one"), (two_processes, "two")):
        header = run.log[1]
        assert header[0].startswith(f"Running Python {sys.version.split()[0]}")
        assert any(
            re.search(rf"Running PyTorch {re.escape(torch.__version__)} .*CUDA .*Triton ", line) for line in header
        )
        (line,) = [line for line in header if line.startswith("preset: smoke; overrides: ")]
        for override in (*SMALLER, f"--run_id={name}"):
            assert override in line.split()


def test_every_step_has_its_line_and_times_only_grow(one_process, two_processes):
    for run in (one_process, two_processes):
        assert list(run.log[2]) == list(range(1, STEPS + 1))


def test_validation_comes_every_so_many_steps_and_where_it_is_asked_for_and_at_the_end(one_process):
    assert list(one_process.log[3]) == [0, 2, 3, 4, 6, STEPS]


def test_without_a_period_validation_comes_only_at_the_end(two_processes):
    assert list(two_processes.log[3]) == [STEPS]


def test_the_log_ends_with_the_final_loss_and_a_sample_of_what_was_learned(one_process, two_processes):
    *_, last, sample = one_process.log[4]
    assert f"{one_process.log[3][STEPS]:.4f}" in last and "logs/one.txt" in last
    assert re.fullmatch(r"""sample: ['"].{20,}['"]""", sample) and sample.isprintable()
    assert one_process.result.stdout.splitlines()[-1] == sample
    assert two_processes.result.stdout.count("sample: ") == 1
    assert two_processes.log[4][-1].startswith("sample: ")


def test_without_a_terminal_the_output_has_the_logs_lines_and_no_bar(one_process):
    text = (one_process.folder / "logs" / "one.txt").read_text()
    lines = [line for line in text.splitlines() if line.startswith("step:")]
    assert [line for line in one_process.result.stdout.splitlines() if line.startswith("step:")] == lines
    assert "\r" not in one_process.result.stderr and "%|" not in one_process.result.stderr


def test_on_a_terminal_a_bar_stands_for_the_steps_lines(two_processes):
    assert f"{STEPS}/{STEPS}" in two_processes.screen and "\r" in two_processes.screen
    shown = [line for line in two_processes.result.stdout.splitlines() if line.startswith("step:")]
    assert len(shown) == 1 and "val_loss:" in shown[0]  # validations are printed as ever, steps are not
    assert "validation loss" in two_processes.result.stdout


def test_only_the_first_process_writes(two_processes):
    assert [path.name for path in two_processes.folder.rglob("*") if path.is_file()] == ["two.txt"]
    assert two_processes.result.stdout.count("validation loss") == 1
    assert len(re.findall(rf"{STEPS}/{STEPS} \[[^\r\n]*\r?\n", two_processes.screen)) == 1  # one bar's last state


def test_a_checkpoint_gives_the_final_validation_loss_again(one_process, sample, monkeypatch):
    path, *pieces = sorted(one_process.folder.rglob("*.pt"))
    assert pieces == piece_paths(path)
    assert path.parent.name == "logs" and path.name == f"one_step{STEPS:06d}.pt"
    assert not list(one_process.folder.rglob("*.part"))
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["step"] == STEPS
    hp = Hyperparameters(**checkpoint["hyperparameters"], stages=PRESETS["smoke"]["stages"])
    monkeypatch.setattr(train_gpt, "ROOT", sample)
    trainer = Trainer(replace(hp, seed=1), World())
    trainer.model.load_state_dict(checkpoint["model"])
    rows = read_pieces(path, checkpoint)
    trainer.ngrams.algorithm.p.copy_(torch.cat([piece["p"] for piece in rows]))
    trainer.enter_step(STEPS - 1)  # the rotary frequencies follow from the step
    batches = validation_batches(find_files(hp.val_files), hp, World())
    loss = trainer.validate(batches, trainer.schedule.window_tokens(*FINAL_WINDOWS))
    assert f"{loss:.4f}" == f"{one_process.log[3][STEPS]:.4f}"


# ---------------------------------------------------------------------------- the clock


@pytest.fixture
def time_of_day(monkeypatch):
    """Seconds, as a test sets them."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: now.seconds)
    return now


def test_the_clock_counts_milliseconds_and_their_average_over_steps(time_of_day):
    clock = Clock(CPU)
    time_of_day.seconds += 8.7014
    clock.step_issued()
    assert clock.text(250) == "train_time:8701ms step_avg:34.81ms"


def test_the_clock_leaves_out_the_time_between_stop_and_start(time_of_day):
    clock = Clock(CPU)
    time_of_day.seconds += 2
    clock.stop()
    time_of_day.seconds += 1000
    assert clock.text(4) == "train_time:2000ms step_avg:500.00ms"
    clock.start()
    time_of_day.seconds += 1
    assert clock.text(4) == "train_time:3000ms step_avg:750.00ms"
    clock.stop()
    assert clock.text(4) == "train_time:3000ms step_avg:750.00ms"
    assert Clock(CPU, clock.elapsed).text(4) == "train_time:3000ms step_avg:750.00ms"


def test_the_clock_can_be_read_before_the_first_step(time_of_day):
    assert Clock(CPU).text(0) == "train_time:0ms step_avg:0.00ms"
