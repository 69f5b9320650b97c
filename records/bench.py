"""
What a step of each stage takes, and which kernels take it: what train_gpt.py does for --bench and --profile.

    python train_gpt.py --bench              # times, and the whole run's time projected from them
    python train_gpt.py --profile            # kernels by category, and traces; --bench --profile does both

It is started through train_gpt.py only, which hands itself over as the module `train_gpt`.

Steps are launched as in the run. Kernels come from PyTorch's profiler in a second pass, as it slows steps down.
Rates are set against what one large product reaches on the same machine, not against a data sheet. What the columns
mean stands in README.md, "Is it faster?".
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:  # for hints alone
    from train_gpt import GPT, Log, StepBatch, Trainer

UNTIMED_STEPS = 2  # at a stage's start
PROFILED_STEPS = 2  # an even and an odd one
HEATING_STEPS = 8  # a GPU's, ahead of these: it cools down while the profiler starts, and a cool one is faster
# Category of a kernel by its name, the first that matches; on a CPU, of an operator by the names of those it runs in.
# What Optimizer.step launches is the optimizer's whatever its name, unless it communicates.
KERNEL_CATEGORIES = {
    "communication": r"(?i)nccl|gloo|c10d::",
    "optimizer": r"symmetric_product|update_rows|sum_rows|adam_kernel|nesterov",
    "loss": r"cross_entropy|HeadLoss(?!.*mm\b)|\bcopy_(kernel|backward)",
    "attention": r"flash|attention|split_heads",
    "products": r"nvjet|gemm|gemv|cutlass|cublas|splitKreduce|linear_relu2_kernel|aten::\w*mm\b",
    "memory": r"(?i)memcpy|memset|aten::(copy_|zero_|fill_)",
    "elementwise": r"triton_|elementwise|transposed|reduce|add_rows|weighed_sums|at::native|aten::",
}


class Kernel(NamedTuple):
    """One launch of a kernel, or on a CPU one call of an operator without those it calls; in microseconds."""

    name: str
    category: str
    start: float
    duration: float


class Profile(NamedTuple):
    """PROFILED_STEPS steps: what ran, and how long they took, from the end of a step's optimizer, in microseconds."""

    kernels: list[Kernel]
    duration: float


@cache
def kernel_category(name: str, in_optimizer: bool = False) -> str:
    """One of KERNEL_CATEGORIES, or "other"."""
    category = next((c for c, pattern in KERNEL_CATEGORIES.items() if re.search(pattern, name)), "other")
    return "optimizer" if in_optimizer and category != "communication" else category


def profile_of(profiler: torch.profiler.profile, on_gpu: bool) -> Profile:
    """The last PROFILED_STEPS steps on the GPU; or all operators on the CPU, whose own times then are the duration."""
    kind, events = torch.autograd.DeviceType, profiler.events()
    device = kind.CUDA if on_gpu else kind.CPU  # there a span is that of the kernels which were launched in it
    marks = [e for e in events if e.name == "optimizer" and e.device_type == device]
    spans, begin, end = [mark.time_range for mark in marks], -math.inf, math.inf
    if on_gpu:
        # Of a step the last: with several ranks it has a span on NCCL's stream, too
        ends = {mark.id: mark.time_range.end for mark in sorted(marks, key=lambda mark: mark.time_range.end)}
        if len(ends) <= PROFILED_STEPS:  # the profiler has not seen the GPU
            return Profile([], math.nan)
        begin, *_, end = sorted(ends.values())[-1 - PROFILED_STEPS :]

    def path(event) -> str:
        return f"{path(event.cpu_parent)} {event.name}" if event.cpu_parent else event.name

    kernels = []
    for event in (e for e in events if e.device_type == device and not e.is_user_annotation):
        start, duration = event.time_range.start, event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        if begin <= start < end:
            category = kernel_category(path(event), any(span.start <= start <= span.end for span in spans))
            kernels.append(Kernel(event.name, category, start, duration))
    return Profile(kernels, end - begin if on_gpu else sum(kernel.duration for kernel in kernels))


def busy_time(kernels: list[Kernel]) -> float:
    """Microseconds in which at least one kernel ran: where several streams overlap, time counts once.

    Not NCCL's kernels: they run while they wait for another rank, which in a profile is long.
    """
    total, reached = 0.0, float("-inf")
    for start, end in sorted((k.start, k.start + k.duration) for k in kernels if k.category != "communication"):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def flops_per_token(train_gpt: ModuleType, model: GPT, fp8: bool, classes: int = 0) -> tuple[int, int]:
    """Of the products with weights, 2 a weight forward and 4 backward: those in the parameters' type, those in FP8.

    classes: of the softmax, 0 for all.
    """
    square, narrow = model.vo_bank[0].numel(), sum(layer.narrow for layer in train_gpt.LAYERS)
    outputs, attention = (len(train_gpt.ATTENTION_LAYERS) * n * square for n in (1, 4))
    attention -= narrow * square  # half of W_q and of W_k
    mlp = len(train_gpt.MLP_LAYERS) * model.mlp_bank[0].numel()
    head = model.embed.size(1) * (classes or len(model.embed))
    in_fp8 = fp8 * (head + model.fp8_layers * (mlp + attention - outputs))  # in the layers all but W_o
    return 6 * (attention + mlp + head - in_fp8), 6 * in_fp8


def measure_ceilings(train_gpt: ModuleType, device: torch.device, dtype: torch.dtype, fp8: bool) -> tuple[float, float]:
    """FLOP/s that this machine reaches in one large product: in the parameters' type and in FP8, if any."""
    from torch.utils.benchmark import Timer  # takes as long to import as all else here takes together

    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
    products = [lambda: a @ b]
    if fp8:
        a_fp8, b_fp8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
        products.append(partial(train_gpt.fp8_product, a_fp8, b_fp8, 1.0, 1.0, dtype))
    timers = [Timer("product()", globals={"product": p}, num_threads=torch.get_num_threads()) for p in products]
    seconds = [min(timer.timeit(5).mean for _ in range(5)) for timer in timers]  # each after two that are not timed
    return 2 * n**3 / seconds[0], 2 * n**3 / seconds[-1]


def typical_ms(times: list[tuple[int, float]]) -> float:
    """Of (step, ms): the mean of the medians of even and odd steps.

    Mostly Adam steps on odd steps only: the median of all would be the slowest of one kind or the fastest of the other.
    """
    kinds = [[ms for step, ms in times if step % 2 == odd] for odd in (0, 1)]
    return float(np.mean([np.median(kind) for kind in kinds if kind]))


def aligned(rows: list[list[str]], texts: int = 0) -> str:
    """Lines of a table: numbers to the right of their columns, the last `texts` columns to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'<' if len(widths) - i <= texts else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(form.format(*row).rstrip() for row in rows)


class Bench:
    """Times and profiles the first steps of each stage, taken as in the run, after its warm-up. All ranks take part."""

    def __init__(self, train_gpt: ModuleType, trainer: Trainer, train_paths: list[Path], log: Log):
        self.train_gpt, self.trainer, self.train_paths, self.log = train_gpt, trainer, train_paths, log
        self.hp, self.world, self.schedule = trainer.hp, trainer.world, trainer.schedule
        self.synchronize = torch.get_device_module(self.world.device).synchronize  # on a CPU it does nothing

    def steps(self, count: int) -> Iterator[tuple[int, int, int, StepBatch]]:
        """Stage, how many of its steps came before, step and its batch: `count` steps of each stage that has any.

        In a shorter stage they repeat, and even and odd steps still take turns.
        """
        spans = enumerate(zip(self.schedule.starts, self.schedule.ends, strict=True))
        lengths = [(stage, start, end - start) for stage, (start, end) in spans if start < end]
        plan = [(k, i, start + i % max(n // 2 * 2, 1)) for k, start, n in lengths for i in range(count)]
        sizes = [self.schedule.size(step) for _, _, step in plan]
        self.trainer.reset()
        loader = self.train_gpt.TrainLoader(self.train_paths, sizes, self.hp, self.world)
        return ((*where, batch) for where, batch in zip(plan, loader, strict=True))

    def launched(self, count: int) -> Iterator[tuple[int, int, int, object]]:
        """Launches the steps as in the run, while the GPU is at the one before; of each, once it is: stage, how many of
        the stage's came before, step, and its end: a CUDA event, or on a CPU seconds.
        """
        clock, steps = self.train_gpt.Clock(self.world.device), self.steps(count)
        following = next(steps)
        while following:
            stage, i, step, batch = following
            self.trainer.enter_step(step)
            self.trainer.add_gradients(step, batch)
            following = next(steps, None)
            with torch.profiler.record_function("optimizer"):
                self.trainer.update(step, following and following[-1])
            clock.step_issued()
            yield stage, i, step, clock.issued if self.world.on_gpu else time.perf_counter()

    def time_stages(self) -> dict[int, list[tuple[int, float]]]:
        """Per stage (step, milliseconds)."""
        times, ends = {}, [*self.launched(self.hp.bench_steps)]
        self.synchronize()
        for (*_, begin), (stage, i, step, end) in pairwise(ends):
            if i >= UNTIMED_STEPS:
                ms = begin.elapsed_time(end) if self.world.on_gpu else 1000 * (end - begin)
                times.setdefault(stage, []).append((step, ms))
        return times

    def profile_stages(self) -> dict[int, Profile]:
        """Per stage PROFILED_STEPS on this rank; with --profile rank 0's trace goes to a file."""
        profiles, count = {}, UNTIMED_STEPS + HEATING_STEPS * self.world.on_gpu + PROFILED_STEPS
        for stage, i, *_ in self.launched(count):
            if i == UNTIMED_STEPS - 1:
                self.synchronize()
                profiler = torch.profiler.profile(acc_events=True)
                profiler.start()
            elif i == count - 1:
                self.synchronize()
                profiler.stop()
                profiles[stage] = profile_of(profiler, self.world.on_gpu)
                if self.hp.profile and self.world.rank == 0:
                    profiler.export_chrome_trace(str(self.trace_path(stage)))
        return profiles

    def trace_path(self, stage: int) -> Path:
        """Where the stage's trace goes, for chrome://tracing or ui.perfetto.dev."""
        return self.log.path.with_name(f"{self.hp.run_id}_stage{stage + 1}.json.gz")

    def run(self, start_seconds: float) -> None:
        """What --bench and --profile ask for. start_seconds: from the start of the program to here."""
        self.trainer.model.prefixes.copy_(self.train_gpt.prefix_table(self.hp))  # as a run has them
        # Profiling comes after all timing: it can slow down what follows.
        times = self.time_stages()
        profiles = self.profile_stages() if self.hp.profile or self.world.on_gpu else {}
        if self.hp.bench:
            fp8 = self.train_gpt.use_fp8(self.hp, self.world)
            dtype = self.train_gpt.choose_dtype(self.hp, self.world)
            ceilings = measure_ceilings(self.train_gpt, self.world.device, dtype, fp8)
            self.write_times(times, profiles, ceilings, fp8, start_seconds)
        if self.hp.profile:
            for stage, profile in profiles.items():
                self.write_kernels(stage, profile)

    def write_times(self, times, profiles, ceilings: tuple[float, float], fp8: bool, start_seconds: float) -> None:
        """The table of stages and the whole run's time."""
        head = "stage steps tokens ms/step min ms/micro-batch min tokens/s TFLOP/s of_ceiling GPU_busy peak_GiB run_s"
        rows, projected = [[name.replace("_", " ") for name in head.split()]], 0.0
        micro_batches, size = self.train_gpt.MICRO_BATCHES // self.world.size, self.world.size
        for stage, stage_times in times.items():
            ms, least = typical_ms(stage_times), min(ms for _, ms in stage_times)
            steps, tokens = self.schedule.ends[stage] - self.schedule.starts[stage], self.hp.stages[stage].tokens
            *_, classes = self.schedule.size(self.schedule.starts[stage])
            of_token = flops_per_token(self.train_gpt, self.trainer.model, fp8, classes)
            flops = [tokens / size * flop for flop in of_token]
            floor_ms = sum(1000 * work / ceiling for work, ceiling in zip(flops, ceilings, strict=True))
            busy, peak = "n/a", "n/a"
            if self.world.on_gpu:
                busy = f"{busy_time(profiles[stage].kernels) / profiles[stage].duration:.1%}"
                peak = f"{self.trainer.peak_memory[stage] / 2**30:.1f}"
            seconds = steps * ms / 1000
            projected += seconds
            rows.append([
                f"{stage + 1}", f"{steps}", f"{tokens:,}", f"{ms:.2f}", f"{least:.2f}",
                f"{ms / micro_batches:.2f}", f"{least / micro_batches:.2f}", f"{1000 * tokens / ms:,.0f}",
                f"{sum(flops) / ms / 1e9:.3g}", f"{floor_ms / ms:.1%}", busy, peak, f"{seconds:.2f}",
            ])  # fmt: skip
        kind, (plain, in_fp8) = "GPU" if self.world.on_gpu else "CPU", (f"{c / 1e12:.4g} TFLOP/s" for c in ceilings)
        self.log.write(
            f"{aligned(rows)}\nceilings: {plain} in the parameters' type{f', {in_fp8} in FP8' if fp8 else ''}; "
            f"from start to first step {start_seconds:.1f} s\n"
            f"projected: {projected:.2f} s for {self.hp.total_steps} steps on {size} x {kind}, "
            f"{projected * size:.2f} {kind}-seconds"
        )

    def write_kernels(self, stage: int, profile: Profile) -> None:
        """The stage's kernels by category, and the 15 largest, with their share of a profiled step."""
        step_ms = profile.duration / 1000 / PROFILED_STEPS

        def table(*columns: str, more: tuple = ()) -> str:
            ms, launches = Counter(), Counter()
            for kernel in profile.kernels:
                key = tuple(getattr(kernel, column)[:90] for column in columns)
                ms[key] += kernel.duration / 1000 / PROFILED_STEPS
                launches[key] += 1
            rows = [(total, f"{launches[key] // PROFILED_STEPS}", *key) for key, total in ms.most_common(15)]
            rows = [[f"{total:.3f}", f"{total / step_ms:.1%}", *others] for total, *others in (*rows, *more)]
            return aligned([["ms/step", "share", "count", *columns], *rows], len(columns))

        gaps = step_ms - busy_time(profile.kernels) / 1000 / PROFILED_STEPS
        self.log.write(f"stage {stage + 1}, kernels of a step of {step_ms:.2f} ms; trace: {self.trace_path(stage)}")
        self.log.write(table("category", more=[(gaps, "", "gaps")] if self.world.on_gpu else ()))
        self.log.write(table("category", "name"))


if __name__ == "__main__":
    sys.exit("bench.py is started through train_gpt.py: ./run.sh --bench, or --profile")
