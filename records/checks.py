"""
What can be wrong with a run, found before anything slow or on one rank while others wait, and put in words.

train_gpt.py loads it at its start and hands itself over as the module `train_gpt`, so that what is checked is that
file's, or its edited copy's. A copy without records/ beside it runs unchecked, and says so.

What torchrun says of a process is checked first; hyperparameters and tables with the arguments; data and GPU when the
world is known; and last, between the ranks, that all were started alike. Each check raises the program's UserError, one
line with the remedy. Where nothing is wrong, it is told what runs, and on what.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import math
import os
import shutil
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from guard import UNDER_TORCHRUN
from torch import Tensor

if TYPE_CHECKING:  # for hints alone
    from train_gpt import Hyperparameters, Trainer, World

INSTALL = "pip install -r requirements.txt"
NVIDIA_DEVICE = Path("/dev/nvidiactl")  # exists where a process may use a GPU
OLDEST_GPU = 8  # compute capability 8.0: bfloat16 in Triton
KERNEL_SHARED_MEMORY = 98_856  # bytes, of attention's gradients on Hopper; older GPUs' pipelines take less

# ---------------------------------------------------------------------------- hyperparameters and tables


def check_hyperparameters(train_gpt: ModuleType, hp: Hyperparameters) -> None:
    """Raises UserError for values that could only fail later."""
    require, micro_batches = train_gpt.require, train_gpt.MICRO_BATCHES
    check_tables(train_gpt, hp)
    for name, value in vars(hp).items():
        require(not isinstance(value, float) or math.isfinite(value), f"--{name}={value}: expected a number")
    require(0 < hp.micro_batch_tokens <= 2**20, f"--micro_batch_tokens={hp.micro_batch_tokens}: from 1 to 2 ** 20")
    positive = "num_scheduled_iterations train_max_seq_len val_tokens val_batch_size num_heads window_block adam_eps"
    for name in (*positive.split(), "grad_scale"):
        require(getattr(hp, name) > 0, f"--{name}={getattr(hp, name)} must be positive")
    not_negative = "num_extension_iterations val_loss_every checkpoint_every hang_timeout adam_lr adam_wd muon_lr"
    not_negative += " muon_wd lr_end muon_momentum_warmup muon_momentum_cooldown mlp_ratio"
    for name in not_negative.split():
        require(getattr(hp, name) >= 0, f"--{name}={getattr(hp, name)} must not be negative")
    require(0 <= hp.muon_beta2 < 1, f"--muon_beta2={hp.muon_beta2} must be in [0, 1)")
    require(hp.hang_timeout <= 1e9, f"--hang_timeout={hp.hang_timeout} must be at most 1e9; 0 is never")
    require(-(2**63) <= hp.seed < 2**64, f"--seed={hp.seed} must be from -2**63 to 2**64 - 1")
    require(hp.bench_steps >= 4, f"--bench_steps={hp.bench_steps} must be at least 4: the first two are not timed")
    require(0 < hp.cooldown_frac <= 1, f"--cooldown_frac={hp.cooldown_frac} must be in (0, 1]")
    require(0 <= hp.average_frac <= 1, f"--average_frac={hp.average_frac} must be in [0, 1]")
    require(0 < hp.length <= 100, f"--length={hp.length:g} must be in (0, 100]")
    require(hp.total_steps < 1_000_000, f"{hp.total_steps} steps: names of checkpoints have room for 999,999")
    for step in hp.val_steps:
        require(0 <= step <= hp.total_steps, f"--val_steps: the run ends after step {hp.total_steps}, before {step}")
    schedule = train_gpt.TrainingSchedule(hp)
    for number, (start, end) in enumerate(zip(schedule.starts[:-1], schedule.ends, strict=False), 1):
        told = f"no step of {schedule.scheduled} falls to row {number} of STAGES: raise its share"
        require(start < end, f"{told}, --num_scheduled_iterations or --length")
    told = f"--val_tokens must be a multiple of --val_batch_size={hp.val_batch_size}"
    require(hp.val_tokens % hp.val_batch_size == 0, told)
    require(hp.val_batch_size % micro_batches == 0, f"--val_batch_size must be a multiple of {micro_batches}")
    require(hp.num_heads in range(2, 1025, 2), f"--num_heads={hp.num_heads} must be even, for pairs, at most 1024")
    require(hp.head_dim in (8, 16, 32, 64, 128), f"--head_dim={hp.head_dim} must be a power of two from 8 to 128")
    told = f"--copy_width={hp.copy_width} must be a power of two from 16 to 128, or 0 not to copy"
    require(hp.copy_width in (0, 16, 32, 64, 128), told)
    told = f"--ngram_rows={hp.ngram_rows} must be a multiple of 16, two halves to shard over ranks, below 2 ** 31"
    require(0 < hp.ngram_rows < 2**31 and hp.ngram_rows % 16 == 0, told)
    told = f"--bos={hp.bos} must be a token, below --vocab_size={hp.vocab_size}, and all tokens fit 16 bits"
    require(0 <= hp.bos < hp.vocab_size <= 65536, told)
    choices_of = dict(dtype="auto bfloat16 float32", fp8="auto head off", cuda_graphs="auto off", compile="auto on off")
    for name, choices in choices_of.items():
        require(getattr(hp, name) in choices.split(), f"--{name}={getattr(hp, name)}: choose one of {choices}")
    for name in ("run_id", "resume"):
        value = getattr(hp, name)
        require(Path(value).name == value, f"--{name}={value} names files: it must not contain a path")
    check_parameters(train_gpt, train_gpt.GPT(hp, torch.device("meta"), torch.float32).tensors())


def check_tables(train_gpt: ModuleType, hp: Hyperparameters) -> None:
    """Raises UserError for rows of STAGES, SCALARS and LAYERS that would fail later, or have no effect."""
    require, micro_batches, layers = train_gpt.require, train_gpt.MICRO_BATCHES, train_gpt.LAYERS
    shares = [stage.share for stage in hp.stages]
    told = "STAGES ends with the extension, whose share is None, after one or more rows that have one"
    require(len(shares) > 1 and shares[-1] is None and None not in shares[:-1], told)
    for number, stage in enumerate(hp.stages, 1):
        row, weights = f"STAGES, row {number}", (stage.target_weights, stage.target_weights_end)
        require(all(isinstance(w, tuple) for w in weights), f"{row}: multi-token weights are tuples, of one as (1.0,)")
        first, last = map(len, weights)
        require(stage.share is None or 0 < stage.share < math.inf, f"{row}: share={stage.share} must be positive")
        told = f"{row}: tokens={stage.tokens} must be a multiple of {micro_batches}, the micro-batches of a step"
        require(stage.tokens > 0 and stage.tokens % micro_batches == 0, told)
        require(min(stage.short_window, stage.long_window) > 0, f"{row}: a window has at least 1 block")
        require(stage.max_seq_len > 0, f"{row}: max_seq_len={stage.max_seq_len} must be positive")
        require(first == last > 0, f"{row}: {first} multi-token weights at the start, {last} at the end: as many, > 0")
        told = f"{row}: prefix={stage.prefix}: a tuple of two weights >= 0, at the start and at the end, as (0.25, 0.0)"
        pair = stage.prefix if isinstance(stage.prefix, tuple) and len(stage.prefix) == 2 else (None,)
        require(all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in pair), told)
        # A checkpoint comes after an even number of steps, when no gradient waits for Adam.
        require(stage.adam in (1, 2), f"{row}: adam={stage.adam}: 1, an update in each step, or 2, in every second")
        require(stage.classes in range(0, 2**20, 16), f"{row}: classes={stage.classes}: 0 for all, or a multiple of 16")
    windows = train_gpt.FINAL_WINDOWS
    require(len(windows) == 2 and min(windows) > 0, "FINAL_WINDOWS: two windows of at least 1 block")
    for name, (count, _, lr) in train_gpt.SCALARS.items():
        least = len(layers) if name in train_gpt.LAYER_SCALARS else 1
        told = f"SCALARS, {name}: it takes at least {least}, and a number as learning-rate multiplier"
        require(count >= least and isinstance(lr, int | float), told)
    for_attention = ("narrow", "paired", "key_offset", "value_embed", "xsa", "head_gates", "reads", "values")
    kept, weighed = {"x0", "ngrams"}, set()
    for i, layer in enumerate(layers):
        row, attention = f"LAYERS, row {i}", any(getattr(layer, name) for name in for_attention)
        require(layer.window in ("short", "long", None), f"{row}: window is 'short', 'long' or None")
        require(layer.window or not attention, f"{row}: {', '.join(for_attention)} are for layers with a window")
        told = f"{row}: key_offset takes the half of a key that does not turn, which narrow ones lack"
        require(not (layer.narrow and layer.key_offset), told)
        for gates in (layer.values, layer.adds):
            told = f"{row}: values and adds take names with their gates at the start, as dict(x0=0.0)"
            require(isinstance(gates, dict) and all(isinstance(gate, int | float) for gate in gates.values()), told)
        gated = any((layer.value_embed, layer.xsa, layer.head_gates, layer.values, layer.adds))
        weighed = {*kept} if layer.gates else weighed
        require(not gated or weighed, f"{row}: its gates take a network: give this row or an earlier one gates=True")
        for name in (*layer.values, *layer.adds):
            told = f"{row}: {name!r} is not kept ahead of the network of its gates: keep it earlier, or give gates=True"
            told += f"; it weighs {', '.join(sorted(weighed))}"
            require(name in weighed, told)
        require(layer.reads is None or layer.reads in kept, f"{row}: reads={layer.reads!r} is kept by no earlier row")
        require(layer.keep not in kept, f"{row}: the name {layer.keep!r} is taken")
        kept |= {layer.keep} - {None}


def check_parameters(train_gpt: ModuleType, parameters: dict[str, Tensor]) -> None:
    """Raises UserError unless PARAMETERS has one row for each, which works on 1 to 8 ranks; empty ones need none."""
    require, table = train_gpt.require, train_gpt.PARAMETERS
    rows = [row.name for row in table]
    model = [name for name, p in parameters.items() if p.numel() or name in rows]
    odd = [name for name in sorted({*rows, *model}) if rows.count(name) != model.count(name)]
    told = (f"{name} has {rows.count(name)}" if name in model else f"{name} is none" for name in odd)
    require(not odd, f"PARAMETERS takes one row for each of the model's parameters: {', '.join(told)}")
    for name, algorithm, sharded, lr, _, betas, averaged in table:
        row, p, ranks = f"PARAMETERS, {name}", train_gpt.as_stack(parameters[name]), train_gpt.MICRO_BATCHES
        choices = ["rowwise"] if name == "ngrams" else ["adam", "normuon"]
        require(algorithm in choices, f"{row}: algorithm is {' or '.join(map(repr, choices))}")
        require(isinstance(lr, tuple) and lr, f"{row}: lr={lr} is no tuple, as (1.0,)")
        pair = isinstance(betas, tuple) and len(betas) == 2
        require(pair or algorithm != "adam", f"{row}: adam takes betas, as (0.9, 0.99)")
        told = f"{row}: rowwise is sharded and takes one lr and betas of which the first is 0, as (0.0, 0.95)"
        require((pair and betas[0] == 0 and sharded and len(lr) == 1) or algorithm != "rowwise", told)
        require(betas is None or algorithm != "normuon", f"{row}: normuon takes no betas")
        require(not averaged or algorithm != "rowwise", f"{row}: rowwise has no average")
        told = f"{row}: normuon is for banks of matrices, this has the shape {tuple(p.shape)}"
        require(p.dim() == 3 or algorithm != "normuon", told)
        told = f"{row}: normuon takes matrices of a multiple of 8 rows and columns, not {tuple(p.shape)}"
        require(algorithm != "normuon" or not (p.shape[-2] % 8 or p.shape[-1] % 8), told)
        told = f"{row}: sharded, but its first dimension {len(p)} does not divide by {ranks}, the most ranks"
        require(not sharded or len(p) % ranks == 0, told)


# ---------------------------------------------------------------------------- environment, GPU and data


def check_environment(train_gpt: ModuleType) -> None:
    """Raises UserError for what torchrun would not say of a process, and for more processes than GPUs on this host."""
    size = environment_number(train_gpt, "WORLD_SIZE", 1, 1_000_000)
    local_rank = environment_number(train_gpt, "LOCAL_RANK", 0, size - 1)
    environment_number(train_gpt, "RANK", 0, size - 1)
    local_size = environment_number(train_gpt, "LOCAL_WORLD_SIZE", 1, size)
    gpus = torch.cuda.device_count()
    told = f"more processes than GPUs on this host: start at most {gpus} (--nproc_per_node={gpus})"
    # local_size, too: every rank must see it, for rank 0 prints the message.
    train_gpt.require(not gpus or max(local_rank + 1, local_size) <= gpus, told)


def environment_number(train_gpt: ModuleType, name: str, least: int, most: int) -> int:
    """A number that torchrun sets, `least` where it has not. Raises UserError for anything else."""
    text = os.environ.get(name, str(least))
    told = f"{name}={text!r} in the environment: expected a whole number from {least} to {most}; torchrun sets it, and"
    train_gpt.require(text.isdecimal() and least <= int(text) <= most, f"{told} a single process needs none")
    return int(text)


def check_launcher(train_gpt: ModuleType) -> None:
    """Raises UserError for a process of several without a key-value store in which they meet."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        told = f"{name} is missing in the environment: start several processes with torchrun"
        train_gpt.require(os.environ.get(name), told)
    host, port = os.environ["MASTER_ADDR"], environment_number(train_gpt, "MASTER_PORT", 1, 65535)
    if UNDER_TORCHRUN:  # if its store is gone, init_process_group would try for the whole timeout
        try:
            socket.create_connection((host, port), timeout=20).close()
        except OSError as error:
            raise train_gpt.UserError(f"the launcher does not answer at {host}:{port} ({error})") from None


def keep_freed_memory() -> None:
    """On a CPU: glibc would return each step's memory to the system and fetch it again, half of a step's time."""
    with suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks, too, come from the heap ...
        mallopt(-1, 1_000_000_000)  # M_TRIM_THRESHOLD: ... which keeps up to 1 GB


def check_no_gpu(train_gpt: ModuleType) -> None:
    """Raises UserError where there is a GPU that PyTorch can't use: a run on the CPU instead is not what was wanted."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1") or not NVIDIA_DEVICE.exists():
        return
    why, remedy = "this PyTorch is built without CUDA", INSTALL
    if torch.version.cuda:
        remedy = f"install a driver for CUDA {torch.version.cuda} or newer (nvidia-smi shows the present one)"
        try:
            torch.cuda.init()
            why = "no device is found"
        except Exception as error:  # the driver's own words
            why = " ".join(str(error).split())[:200]
    told = f"PyTorch can't use this host's GPU ({why}): {remedy}; CUDA_VISIBLE_DEVICES= runs on the CPU"
    raise train_gpt.UserError(told)


def check_world(train_gpt: ModuleType, hp: Hyperparameters, world: World, files: dict[str, list[Path]]) -> list[str]:
    """Raises UserError for all that can be found wrong in two seconds; returns what runs, and what may go wrong."""
    require, micro_batches = train_gpt.require, train_gpt.MICRO_BATCHES
    require(torch.__version__ >= "2.11", f"PyTorch {torch.__version__}: 2.11 or newer is needed: {INSTALL}")
    (train, val), fetch = files.values(), train_gpt.FETCH
    largest_shard, val_tokens = max(map(train_gpt.read_header, train)), sum(map(train_gpt.read_header, val))
    told = f"{val_tokens} validation tokens, the run needs val_tokens + 1 = {hp.val_tokens + 1}; {fetch}"
    require(val_tokens > hp.val_tokens, f"{val[0]} ...: {told}, or lower --val_tokens")
    for path in (*train, *val):  # a taste; the loader checks every token of what it reads
        train_gpt.read_tokens(path, hp.vocab_size, limit=1_000_000)
    train_gpt.read_vocabulary(hp)
    largest_step = max(stage.tokens for stage in hp.stages)
    told = f"{largest_shard} train tokens in the largest shard, a step takes {largest_step}; {fetch}"
    require(largest_shard >= largest_step + micro_batches, f"{train[0]} ...: {told}")  # a step never crosses shards
    fp8 = train_gpt.use_fp8(hp, world)
    for number, stage in enumerate(hp.stages, 1):  # cuBLAS takes rows of 16 bytes and multiples, of tokens too
        told = f"{stage.tokens} tokens a step; products in FP8 take multiples of {16 * micro_batches}"
        fits = stage.tokens % (16 * micro_batches) == 0
        require(fits or not fp8, f"STAGES, row {number}: {told}: change the table, or give --fp8=off")
    scale = train_gpt.FP8_HEAD_X if hp.fp8 == "head" else train_gpt.FP8_X
    widest = round((448 * scale) ** 2)  # no number of a normed row is larger than the root of its width
    told = f"width {hp.model_dim}: FP8 in the layers is made for widths up to {widest}: give --fp8=head, or --fp8=off"
    require(not fp8 or hp.model_dim <= widest, told)
    if world.size > 1:
        check_launcher(train_gpt)
    notes = check_gpu(train_gpt, hp, world) if world.on_gpu else []
    return [*summary(train_gpt, hp, world, files), *notes, *bytecode_notes()]


def check_gpu(train_gpt: ModuleType, hp: Hyperparameters, world: World) -> list[str]:
    """Raises UserError for a GPU or software that the kernels can't take; notes a memory that may be too small."""
    require = train_gpt.require
    train_gpt.choose_dtype(hp, world)  # is there one?
    require(hasattr(train_gpt.triton, "__version__"), f"Triton is missing, the kernels need it: {INSTALL}")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    require(compiler, "Triton needs a C compiler, there is none: apt install gcc python3-dev")
    require(world.size == 1 or dist.is_nccl_available(), f"no NCCL, which several GPUs need: {INSTALL}, on Linux")
    gpu = torch.cuda.get_device_properties(world.device)
    told = f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}: the kernels take {OLDEST_GPU}.0 or newer"
    require(gpu.major >= OLDEST_GPU, told)
    shared = getattr(gpu, "shared_memory_per_block_optin", KERNEL_SHARED_MEMORY)
    told = f"{gpu.name} has {shared} bytes of shared memory a multiprocessor, the kernels' tiles take up to "
    told += f"{KERNEL_SHARED_MEMORY}: make those of attention and linear_relu2_triton smaller"
    require(gpu.major < 9 or shared >= KERNEL_SHARED_MEMORY, told)
    # Measured for the speedrun's model beside its n-grams, when it took 1.3 GiB more than now: 5.8 GiB whatever the
    # batch, 25.8 with 49,152 tokens, 27.2 with bf16 layers.
    sizes = {stage.tokens // train_gpt.MICRO_BATCHES for stage in hp.stages}
    largest = max(size * train_gpt.micro_batches_together(size, hp, world) for size in sizes)
    free, (table, cache) = torch.cuda.mem_get_info(world.device)[0] / 2**30, ngram_gib(train_gpt, hp, world)
    needed = cache + 5.8 + 21.4 * largest / 49_152 * hp.model_dim / 768
    rows = int((free - needed) / (table / hp.ngram_rows)) // 16 * 16
    told = f"--ngram_rows={hp.ngram_rows}: they take {table:.1f} GiB of each rank, {free:.0f} are free and about "
    told += f"{needed:.0f} are needed for all else: give --ngram_rows={rows}, or use more GPUs"
    require(table + cache < free or rows < 16, told)
    told = f"note: about {needed + table:.0f} GiB are needed, {free:.0f} are free: "
    return [f"{told}lower --micro_batch_tokens or the tokens in STAGES"] * (free < needed + table)


def bytecode_notes() -> list[str]:
    """A note where PyTorch's modules have no bytecode, and Python keeps none: with those of torch.compile they took
    10.2 and 13.0 s to import without it, 3.8 and 6.0 with.
    """
    packages, bytecode = Path(torch.__file__).parents[1], Path(importlib.util.cache_from_source(torch.__file__))
    told = f"note: there is no {bytecode}: each start compiles PyTorch's modules, for up to 7 s; once: "
    told += f"python -m compileall -q {packages}; if that may not be written: "
    told += "export PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX=FOLDER"
    return [told] * (not bytecode.exists())


# ---------------------------------------------------------------------------- what runs, in words


def summary(train_gpt: ModuleType, hp: Hyperparameters, world: World, files: dict[str, list[Path]]) -> list[str]:
    """What runs, and on what: the lines that records/runlog.py reads. Raises UserError for a file that is no shard."""
    schedule, (train, val) = train_gpt.TrainingSchedule(hp), files.values()
    train_tokens, val_tokens = (sum(map(train_gpt.read_header, paths)) for paths in (train, val))
    machine, (table, cache) = f"{world.size} x CPU", ngram_gib(train_gpt, hp, world)
    if world.on_gpu:
        free, whole = (size / 2**30 for size in torch.cuda.mem_get_info(world.device))
        name = torch.cuda.get_device_properties(world.device).name
        machine = f"{world.size} x {name}, {free:.0f} of {whole:.0f} GiB free"
    total = sum(schedule.stage(step).tokens for step in range(hp.total_steps))
    length = f" (--length={hp.length:g}; momentum {schedule.warmup}, {schedule.cooldown})" if hp.length != 1 else ""
    dtype = str(train_gpt.choose_dtype(hp, world)).removeprefix("torch.")
    return [
        f"world: {machine}, {train_gpt.MICRO_BATCHES // world.size} micro-batches each a step, joined up to "
        f"{hp.micro_batch_tokens:,} tokens; parameters in {dtype}, {products_in_words(train_gpt, hp, world)}",
        f"software: Python {sys.version.split()[0]}, {versions(train_gpt)}",
        f"data: {len(train)} train shards, {train_tokens:,} tokens; "
        f"{hp.val_tokens:,} of {val_tokens:,} validation tokens",
        f"run: {hp.run_id}, {hp.total_steps} steps{length}, {total:,} tokens "
        f"({total / train_tokens:.2f} of the train files)",
        f"n-grams: {hp.ngram_rows:,} rows, which take {table:.2f} GiB of each rank; those of a step {cache:.2f}",
        f"stages: begin at steps {' '.join(map(str, schedule.starts))}",
    ]


def products_in_words(train_gpt: ModuleType, hp: Hyperparameters, world: World) -> str:
    """What training's products run in, and why not in FP8."""
    products = "head" if hp.fp8 == "head" else "products"
    if train_gpt.use_fp8(hp, world):
        return f"{products} in FP8"
    if hp.fp8 == "off" or not world.on_gpu:
        return f"{products} in the parameters' type ({'--fp8=off' if hp.fp8 == 'off' else 'no GPU'})"
    major, minor = torch.cuda.get_device_capability(world.device)
    return f"{products} in bf16 (compute capability {major}.{minor} has no FP8, it takes 8.9)"


def versions(train_gpt: ModuleType) -> str:
    """Of PyTorch, CUDA and Triton."""
    triton_version = getattr(train_gpt.triton, "__version__", "none")
    return f"PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}, Triton {triton_version}"


def ngram_gib(train_gpt: ModuleType, hp: Hyperparameters, world: World) -> tuple[float, float]:
    """What n-grams take of each rank, in GiB: the table with the optimizer's two numbers a row, and a step's rows."""
    wide = hp.model_dim * train_gpt.choose_dtype(hp, world).itemsize
    rows = train_gpt.cache_rows(hp, world)
    return hp.ngram_rows * (wide + 8) / world.size / 2**30, rows * (wide + 4 * hp.model_dim) / 2**30


# ---------------------------------------------------------------------------- between ranks


def check_agreement(
    train_gpt: ModuleType,
    hp: Hyperparameters,
    overrides: dict[str, object],
    world: World,
    files: dict[str, list[Path]],
    checkpoint: dict | None,
) -> None:
    """Raises UserError, alike on all ranks, that names what they were not started alike with."""
    own = ("log_dir", "vocabulary", *train_gpt.FILES)  # a host's
    facts = {f"--{name}": getattr(hp, name) for name in train_gpt.SETTINGS if name not in own}
    facts["--vocabulary's tokens"] = vocabulary_in_words(train_gpt, hp)
    facts["--dtype"] = str(train_gpt.choose_dtype(hp, world))
    facts["--fp8"] = hp.fp8 if train_gpt.use_fp8(hp, world) else "off"
    facts["--run_id"] = overrides.get("run_id", "drawn")
    tools = [path for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem in sys.modules]
    for path in (Path(train_gpt.__file__), *tools):
        facts[path.name] = f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    facts["software"] = versions(train_gpt)
    facts["checkpoint"] = checkpoint and f"step {checkpoint['step']}, {checkpoint['progress']['elapsed']:.3f} ms"
    for name, paths in files.items():
        facts.update({f"{name}, file {i}": shard_in_words(train_gpt, path) for i, path in enumerate(paths, 1)})
    everyone: list = [None] * world.size
    dist.all_gather_object(everyone, (socket.gethostname(), facts))
    (host, first), told = everyone[0], {}
    for rank, (there, others) in enumerate(everyone):
        for name in (name for name in first | others if first.get(name) != others.get(name)):
            differs = f"{first.get(name)} on rank 0 ({host}), {others.get(name)} on rank {rank} ({there})"
            told.setdefault(name, f"{name} is {differs}")
    train_gpt.require(not told, f"the processes were not started alike: {'; '.join([*told.values()][:4])}")


def shard_in_words(train_gpt: ModuleType, path: Path) -> str:
    """Name, length and a checksum, by which ranks and a run that goes on know their shards in any folder."""
    with open(path, "rb") as file:
        beginning = hashlib.sha256(file.read(1 << 16)).hexdigest()[:8]
    return f"{path.name}, {train_gpt.read_header(path)} tokens, its beginning {beginning}"


def vocabulary_in_words(train_gpt: ModuleType, hp: Hyperparameters) -> str:
    """A checksum of its tokens and their numbers, by which they know their vocabulary in any folder."""
    tokens = repr(sorted(train_gpt.read_vocabulary(hp).items())).encode()
    return f"sha256 {hashlib.sha256(tokens).hexdigest()[:16]}"


# ---------------------------------------------------------------------------- on the way


def save_nonfinite(trainer: Trainer, log_path: Path, step: int, bad: list[str]) -> str:
    """Saves what there is when gradients of a step are not finite, beside the log; returns the end of the message.

    bad: the parameters of these gradients. Each rank that finds any saves its own states, a step or two later.
    """
    path = log_path.with_name(f"{trainer.hp.run_id}_nonfinite_rank{trainer.world.rank}.pt")
    slots = trainer.optimizer.slots.items()
    states = {f"{name}.{key}": getattr(slot.algorithm, key) for name, slot in slots for key in slot.algorithm.states}
    content = dict(step=step + 1, bad=bad, model=dict(trainer.model.state_dict()), states=states)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # on another host than rank 0's it may be missing
        torch.save(content, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of some
        with suppress(OSError):
            path.unlink()  # half of it would take the room that the log needs
        path = f"{path} could not be written ({error})"
    more = f" (nor those of {len(bad) - 1} more parameters: the forward pass is not)" if bad[1:] else ""
    return f"{more}; parameters and this rank's states a step or two later: {path}"
