"""--bench and --profile: what they count, and what they print about the first steps of a small run."""

import gzip
import json
import os
import subprocess
import sys
from itertools import pairwise, takewhile
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_run
import torch
from bench import (
    KERNEL_CATEGORIES,
    Bench,
    Kernel,
    Profile,
    busy_time,
    flops_per_token,
    kernel_category,
    profile_of,
    typical_ms,
)

import train_gpt
from train_gpt import GPT, LAYERS, Hyperparameters, Log, Trainer, TrainingSchedule, World, find_files, parse_arguments

# ----------------------------------------------------------------------------------------------------------- counting


@pytest.fixture(scope="module")
def speedrun():
    """What Bench takes from a trainer of the speedrun on two GPUs; no memory for the parameters."""
    hp, _ = parse_arguments(["--preset=speedrun", "--bench"], has_gpu=True)
    model = GPT(hp, torch.device("meta"), torch.bfloat16)
    world = World(size=2, device=torch.device("cuda", 0))
    peak_memory = dict.fromkeys(range(len(hp.stages)), 3 << 29)
    return SimpleNamespace(hp=hp, model=model, world=world, schedule=TrainingSchedule(hp), peak_memory=peak_memory)


def products_of(hp, classes=0):
    """FLOP a token in the layers, in those of their products that FP8 takes (all but W_o), and in the head."""
    square = 6 * hp.model_dim**2
    mlp = 2 * hp.mlp_ratio * sum(layer.mlp for layer in LAYERS) * square
    attention = sum(layer.window is not None for layer in LAYERS) * square
    saved = sum(layer.narrow for layer in LAYERS) * square  # half of W_q and of W_k
    return mlp + 4 * attention - saved, mlp + 3 * attention - saved, 6 * hp.model_dim * (classes or hp.padded_vocab)


def test_a_product_takes_six_flop_a_token_and_weight(speedrun):
    def flops(fp8, in_layers=True):
        parts = {name: getattr(speedrun.model, name) for name in ("vo_bank", "mlp_bank", "embed")}
        return flops_per_token(train_gpt, SimpleNamespace(**parts, fp8_layers=in_layers), fp8)

    layers, in_fp8, head = products_of(speedrun.hp)
    assert flops(fp8=False) == (layers + head, 0)
    assert flops(fp8=True, in_layers=False) == (layers, head)
    assert flops(fp8=True) == (layers - in_fp8, in_fp8 + head)


@pytest.mark.parametrize(
    "category, name",
    [  # as the profiler names them on an H100
        ("communication", "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"),
        ("optimizer", "symmetric_product_kernel"),
        ("loss", "cross_entropy_kernel"),
        ("loss", "cross_entropy_backward_kernel"),
        ("loss", "copy_kernel"),
        ("loss", "copy_backward_kernel"),
        ("elementwise", "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::Tensor"),
        ("attention", "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, cutlass::bfloat16_t"),
        ("attention", "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<128, 64, 128, 8"),
        ("products", "nvjet_sm90_tst_128x160_64x5_2x4_h_bz_NTT"),
        ("products", "nvjet_sm90_qqtst_192x192_128x4_1x2_h_bz_coopB_TNN"),
        ("products", "linear_relu2_kernel"),
        ("elementwise", "transposed_kernel"),
        ("products", "void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_bf16_64x64_32x6_nt_align2>("),
        ("products", "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16"),
        ("products", "std::enable_if<true, void>::type internal::gemvx::kernel<int, int, __nv_bfloat16"),
        ("memory", "Memcpy DtoD (Device -> Device)"),
        ("memory", "Memset (Unknown)"),
        ("memory", "memcpy128"),
        ("elementwise", "triton_poi_fused__fused_rms_norm__scaled_mm__to_copy_clone_div_mul_permute_sub_2"),
        ("elementwise", "triton_red_fused__fused_rms_norm__fused_rms_norm_backward_add_mul_slice_backward_sum_3"),
        ("elementwise", "triton_poi_fused__to_copy_div_linear_relu2_transposed_2"),
        ("elementwise", "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>"),
        ("elementwise", "void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<"),
        ("elementwise", "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::BFloat16"),
        ("other", "something_new"),
        # on a CPU, with what they run in
        ("products", "aten::matmul aten::mm"),
        ("products", "aten::baddbmm"),
        ("products", "HeadLoss aten::matmul aten::mm"),
        ("loss", "HeadLossBackward aten::exp_"),
        ("memory", "aten::clone aten::copy_"),
    ],
)
def test_a_kernel_has_its_category_by_its_name(category, name):
    assert kernel_category(name) == category


def test_what_the_optimizer_launches_is_its_own_unless_it_communicates():
    assert kernel_category("nvjet_sm90_tst_192x192_64x3_2x1_v_bx_coopB_NNN", in_optimizer=True) == "optimizer"
    assert kernel_category("something_new", in_optimizer=True) == "optimizer"
    assert kernel_category("ncclDevKernel_AllGather_RING_LL", in_optimizer=True) == "communication"


@pytest.mark.parametrize(
    "intervals, busy",
    [
        ([], 0),
        ([(10, 15), (20, 22)], 7),  # a gap
        ([(20, 22), (10, 15)], 7),  # in another order
        ([(10, 15), (15, 16)], 6),  # one after the other
        ([(10, 15), (12, 18)], 8),  # an overlap
        ([(10, 20), (12, 14), (19, 21), (30, 31)], 12),  # one inside another
    ],
)
def test_time_counts_once_where_kernels_overlap_and_not_where_none_runs(intervals, busy):
    kernels = [Kernel("", "products", start, end - start) for start, end in intervals]
    assert busy_time(kernels) == busy
    assert busy_time([*kernels, Kernel("", "communication", -100.0, 300.0)]) == busy  # it waits, as far as one can see


def fake_profiler(*events):
    """A profiler of (name, device, start, end, number of the call) in microseconds, without nesting."""

    def event(name, device, start, end, number=0):
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(
            name=name,
            id=number,
            device_type=getattr(torch.autograd.DeviceType, device),
            time_range=span,
            self_cpu_time_total=end - start,
            is_user_annotation=name == "optimizer",
            cpu_parent=None,
        )

    return SimpleNamespace(events=lambda: [event(*e) for e in events])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gpus_profile_has_the_last_two_steps_and_the_optimizer_what_starts_in_its_spans(ranks):
    steps = []
    for end in range(1000, 5000, 1000):  # of four steps
        steps += [
            ("aten::mm", "CPU", end - 995, end - 990),
            ("optimizer", "CPU", end - 990, end - 985, end),  # launched long before it runs
            ("nvjet_1", "CUDA", end - 993, end - 910),
            ("optimizer", "CUDA", end - 890, end - 10, end),  # from its first to its last kernel; none itself
            ("nvjet_1", "CUDA", end - 890, end - 850),
            ("ncclDevKernel_AllGather_RING_LL", "CUDA", end - 850, end),
        ]
        if ranks > 1:  # one a stream
            steps.append(("optimizer", "CUDA", end - 850, end, end))
    last = ("cross_entropy_kernel", "CUDA", 4000, 4100)  # of the next step, which the profile's end cuts off
    assert profile_of(fake_profiler(*steps, last), on_gpu=True) == (
        [
            kernel
            for end in (3000, 4000)
            for kernel in (
                Kernel("nvjet_1", "products", end - 993, 83),
                Kernel("nvjet_1", "optimizer", end - 890, 40),
                Kernel("ncclDevKernel_AllGather_RING_LL", "communication", end - 850, 850),
            )
        ],
        2000,
    )


def test_a_profiler_that_has_not_seen_the_gpu_leaves_the_times(speedrun):
    profile = profile_of(fake_profiler(("aten::mm", "CPU", 0, 5), ("optimizer", "CPU", 100, 200)), on_gpu=True)
    written, stages = [], range(len(speedrun.hp.stages))
    bench = Bench(train_gpt, speedrun, [], SimpleNamespace(write=written.append))
    times, profiles = ({stage: value for stage in stages} for value in ([(2, 100.0), (3, 120.0)], profile))
    bench.write_times(times, profiles, ceilings=(800e12, 1400e12), fp8=True, start_seconds=1.5)
    assert "110.00" in written[0] and "nan%" in written[0]


def test_a_cpus_profile_has_all_operators_and_lasts_as_long_as_they():
    profiler = fake_profiler(("aten::mm", "CPU", 0, 5), ("optimizer", "CPU", 100, 200), ("aten::mm", "CPU", 110, 150))
    expected = [Kernel("aten::mm", "products", 0, 5), Kernel("aten::mm", "optimizer", 110, 40)]
    assert profile_of(profiler, on_gpu=False) == (expected, 45)


def test_even_and_odd_steps_weigh_the_same():
    assert typical_ms([(2, 10.0), (3, 20.0), (4, 11.0), (5, 24.0), (6, 900.0)]) == (11 + 22) / 2
    assert typical_ms([(4, 10.0), (4, 30.0)]) == 20


def rows_of(text, first_column):
    """The header that begins with `first_column` and the rows below it; columns are two spaces or more apart."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    begin = next(i for i, cells in enumerate(lines) if cells[0] == first_column)
    return list(takewhile(lambda cells: len(cells) == len(lines[begin]), lines[begin:]))


def test_rates_follow_from_the_time_of_a_step_and_the_ceilings(speedrun):
    written, stages, schedule = [], range(len(speedrun.hp.stages)), speedrun.schedule
    times = {stage: [(2, 100.0), (3, 120.0), (4, 100.0), (5, 90.0)] for stage in stages}  # an odd step's median: 105
    profiles = {stage: Profile([Kernel("", "", 0, 123_000)], 205_000) for stage in stages}
    bench = Bench(train_gpt, speedrun, [], SimpleNamespace(write=written.append))
    bench.write_times(times, profiles, ceilings=(800e12, 1400e12), fp8=True, start_seconds=1.5)
    header, *rows = rows_of("\n".join(written), "stage")
    for row, stage in zip(rows, speedrun.hp.stages, strict=True):
        layers, in_fp8, head = products_of(speedrun.hp, stage.classes)
        cells = dict(zip(header[:4] + header[5:], row[:4] + row[5:], strict=True))
        assert (cells["ms/step"], row[4]) == ("102.50", "90.00")
        assert (cells["ms/micro-batch"], cells["min"]) == ("25.62", "22.50")  # 4 a step on each of two GPUs
        tokens = stage.tokens
        assert cells["tokens"] == f"{tokens:,}" and cells["tokens/s"] == f"{tokens / 0.1025:,.0f}"
        assert cells["TFLOP/s"] == f"{tokens / 2 * (layers + head) / 0.1025 / 1e12:.3g}"  # of one GPU
        floor = tokens / 2 * ((layers - in_fp8) / 800e12 + (in_fp8 + head) / 1400e12)
        assert float(cells["of ceiling"].rstrip("%")) == pytest.approx(100 * floor / 0.1025, abs=0.06)
        assert (cells["GPU busy"], cells["peak GiB"]) == ("60.0%", "1.5")
    lengths = [end - start for start, end in zip(schedule.starts, schedule.ends, strict=True)]
    of_run = [float(row[header.index("run s")]) for row in rows]
    assert of_run == pytest.approx([0.1025 * steps for steps in lengths], abs=0.0051)
    words = written[-1].splitlines()[-1].split()
    assert " ".join(words[2:9]) == f"s for {sum(lengths)} steps on 2 x" and words[0] == "projected:"
    assert float(words[1]) == pytest.approx(0.1025 * sum(lengths), abs=0.006)
    assert float(words[10]) == pytest.approx(2 * 0.1025 * sum(lengths), abs=0.006) and words[11] == "GPU-seconds"


# ------------------------------------------------------------------------------------------------------ a small model


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """After its run: the trainer, the steps taken, what is in the log, the folder."""
    folder = tmp_path_factory.mktemp("bench")
    small_run.write_text(folder)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(train_gpt, "MICRO_BATCHES", 1)  # an eighth of the operators, whose events take time to read
    first, *_, last, extension = small_run.SMALL["stages"]
    stages = tuple(stage._replace(tokens=stage.tokens // 8) for stage in (first, last, extension))
    hp = small_run.small_hyperparameters(folder, bench=True, profile=True, bench_steps=4, stages=stages)
    trainer, log = Trainer(hp, World()), Log(hp, World())
    steps, update = [], trainer.update

    def note(step, following=None):
        steps.append((trainer.stage_index, step))
        update(step, following)

    trainer.update = note
    bench = Bench(train_gpt, trainer, find_files(hp.train_files), log)
    bench.run(start_seconds=1.5)
    log.close()
    monkeypatch.undo()
    return SimpleNamespace(bench=bench, steps=steps, text=log.path.read_text(), folder=folder, hp=hp)


def test_every_stage_runs_its_first_steps_and_even_and_odd_ones_take_turns(bench):
    schedule = TrainingSchedule(bench.hp)
    count = len(schedule.starts)
    timed, profiled = bench.steps[: 4 * count], bench.steps[4 * count :]
    for steps in (timed, profiled):
        assert [stage for stage, _ in steps] == [stage for stage in range(count) for _ in range(4)]
        for stage in range(count):
            taken = [step for k, step in steps if k == stage]
            assert taken[0] == schedule.starts[stage]
            assert all(schedule.stage_index(step) == stage for step in taken)
            if schedule.ends[stage] - schedule.starts[stage] > 1:
                assert all((a + b) % 2 for a, b in pairwise(taken))


def test_prefixes_are_targets_as_in_a_run(bench):
    prefixes = bench.bench.trainer.model.prefixes
    assert torch.equal(prefixes, train_gpt.prefix_table(bench.hp)) and (prefixes >= 0).any()


def test_the_projected_time_is_the_sum_of_the_rows(bench):
    header, *rows = rows_of(bench.text, "stage")
    schedule = TrainingSchedule(bench.hp)
    lengths = [end - start for start, end in zip(schedule.starts, schedule.ends, strict=True)]
    assert [row[0] for row in rows] == [f"{i + 1}" for i in range(len(lengths))]
    steps, ms = header.index("steps"), header.index("ms/step")
    assert [int(row[steps]) for row in rows] == lengths
    (line,) = [line for line in bench.text.splitlines() if line.startswith("projected: ")]
    expected = sum(int(row[steps]) * float(row[ms]) / 1000 for row in rows)
    assert expected > 0 and abs(float(line.split()[1]) - expected) < 0.01
    assert "10 steps on 1 x CPU" in line and "from start to first step 1.5 s" in bench.text
    for name in ("GPU busy", "peak GiB"):  # there is no GPU
        assert {row[header.index(name)] for row in rows} == {"n/a"}


def test_shares_of_the_categories_add_up_to_the_step(bench):
    tables = bench.text.split("trace: ")[1:]
    assert len(tables) == len(bench.hp.stages)
    for table in tables:
        header, *rows = rows_of(table, "ms/step")
        assert header == ["ms/step", "share", "count", "category"]
        assert {"products", "attention", "loss", "elementwise", "optimizer"} <= {row[3] for row in rows}
        assert sum(float(row[1].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.5)
        assert all(int(row[2]) >= 0 for row in rows)


def test_the_largest_kernels_are_listed_with_their_category(bench):
    for table in bench.text.split("trace: ")[1:]:
        lines = table.splitlines()
        begin = next(i for i, line in enumerate(lines) if line.endswith("name"))
        rows = [line.split() for line in lines[begin + 1 : begin + 16]]
        assert len(rows) == 15 and {row[3] for row in rows} <= {*KERNEL_CATEGORIES, "other"}
        assert sum("::" in row[4] for row in rows) > 8  # the others are autograd's own functions
        assert [float(row[0]) for row in rows] == sorted((float(row[0]) for row in rows), reverse=True)


def test_every_stage_leaves_a_trace_that_can_be_read(bench):
    for stage in range(1, len(bench.hp.stages) + 1):
        with gzip.open(bench.folder / f"small_stage{stage}.json.gz", "rt") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        assert names.count("optimizer") == 2
        assert "HeadLoss" in names


# -------------------------------------------------------------------------------------------------------- the program


def test_the_bench_is_given_the_program_that_runs_and_writes_to_its_log(tmp_path):
    program, records = Path(train_gpt.__file__), tmp_path / "records"
    small_run.write_text(tmp_path)
    records.mkdir()
    # A sixteenth of the smoke run's tokens, in less time. The whole of both files runs, as a process of its own.
    (tmp_path / "train_gpt.py").write_text(program.read_text().replace("tokens // 128", "tokens // 2048"))
    look = """
class Bench(Bench):
    def run(self, start_seconds):
        print("itself:", self.train_gpt is sys.modules["__main__"], self.train_gpt is sys.modules.get("train_gpt"))
        super().run(start_seconds)
"""
    (records / "bench.py").write_text((program.parent / "records" / "bench.py").read_text() + look)
    small = "train_files=train_*.bin val_files=val_*.bin num_heads=2 ngram_rows=64 val_tokens=512"
    fast = "val_batch_size=512 window_block=4 num_scheduled_iterations=6 num_extension_iterations=1 vocabulary="
    arguments = [f"--{setting}" for setting in f"{small} {fast} preset=smoke run_id=b bench bench_steps=4".split()]
    environment = {**os.environ, "DATA_PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train_gpt.py", *arguments]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert "itself: True True\n" in run.stdout
    logged = (tmp_path / "logs" / "b.txt").read_text()
    table = logged[logged.index("\nstage  steps") :]
    assert table in run.stdout and table.count("\n") == len(train_gpt.STAGES) + 4
    assert "\nprojected: " in table and "step:" not in run.stdout


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("name", ["bench", "profile", "save_checkpoint"])
def test_a_bool_alone_is_true(name):
    hp, overrides = parse_arguments([f"--{name}", "--seed=3"], has_gpu=False)
    assert getattr(hp, name) is True and overrides == {name: True, "seed": 3}
    assert getattr(parse_arguments([f"--{name}=false"], has_gpu=False)[0], name) is False
    assert getattr(Hyperparameters(), name) is False
