"""
Train a 124M-parameter-class GPT from scratch on FineWeb to 3.28 validation loss, as fast as possible.

    torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node=8 train_gpt.py  # 1, 2, 4 or 8 GPUs: the same gradient
    python train_gpt.py --length=0.25                           # one process; any hyperparameter as --name=value
    python train_gpt.py --bench --profile                       # no run: time and profile some steps of each stage
    python train_gpt.py --describe                              # no run: what would run, from the tables

The mathematics began as that of the seed record: the public modded-nanogpt speedrun's of 2026-01-30 (97.77 s on 8
H100s). What was measured of this file as it is today stands in README.md and records/.

Contents, in reading order (search for the banner):
    Hyperparameters   the tables a speedrunner edits: numbers, stages, layers, learned scalars and parameters
    Distributed       who am I among the processes; the types that my device computes in
    Kernels           Triton, each beside its reference in plain PyTorch and one switch point
    Model             Yarn, the compiled regions of a layer, GPT
    Optimizer         Adam, NorMuon, Adam by rows, communication, the order of work
    Data              shards, micro-batches, rows of n-grams, read-ahead, prefixes of tokens
    Schedule          learning rate, momentum, windows, weights of targets and of averages by step
    Train             warm-up, the loop, validation, the clock
    main              a run from its arguments to its end
What has no part in the result stands in records/: checks, the guard against hangs, the log file, checkpoints, a second
process that compiles, --bench, --profile, --describe and the sample of text. A copy of this file without them trains as
well, but plainly.

Shape letters: T tokens of a micro-batch, N positions of attention (T, or 2 T where heads are paired), C model width,
H heads, D head width, F hidden units of an MLP, V padded vocabulary, P classes of a softmax, R ranks.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # CPU threads that spin while they wait hold up the others

import base64
import gc
import hashlib
import importlib
import inspect
import math
import sys
import threading
import time
import unicodedata
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial, reduce
from glob import escape, glob
from itertools import accumulate, chain, count, islice, pairwise, repeat
from operator import itemgetter, xor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton for this platform: the references run instead
    triton = tl = SimpleNamespace(jit=lambda kernel=None, **_: kernel or (lambda k: k), constexpr=lambda value: value)

ROOT = Path(os.path.expanduser(os.environ.get("DATA_PATH") or Path(__file__).resolve().parent))

# ======================================================================================================================
# Hyperparameters
# ======================================================================================================================
# First the tables, with a row for each stage, layer, learned scalar and parameter: to add one, add a row. Then a run's
# other numbers. records/checks.py refuses, in words, what could not work.

MICRO_BATCHES = 8  # in every step, dealt out to the ranks: 1, 2, 4 or 8 GPUs compute the same gradient


class TrainingStage(NamedTuple):
    """One row a stage of training; each has its own CUDA graphs (see GraphMemory.capture)."""

    share: float | None  # of the scheduled iterations, relative to the other rows; None: the extension, the last row
    tokens: int  # in a step, over all ranks
    short_window: int  # attention windows, in blocks of `window_block` tokens
    long_window: int
    lr: float  # learning-rate multiplier; grows about as the square root of the batch
    target_weights: tuple[float, ...]  # multi-token prediction: weight of the 1st, 2nd, 3rd next token at the start ...
    target_weights_end: tuple[float, ...]  # ... and at the end of the stage
    max_seq_len: int = 1 << 30  # documents are cut at this length or at train_max_seq_len, whichever is less
    classes: int = 0  # tokens of the vocabulary in a step's softmax, its targets among them (softmax_classes); 0: all
    prefix: tuple[float, float] = (0.0, 0.0)  # weight of the next token's prefix (prefix_table) at the start and end
    adam: int = 2  # steps from one update of the parameters under Adam to the next, which sums up their gradients


# Training begins with short windows and small batches, in which a token costs nearly the same and teaches more: with
# half the seed record's batches, a quarter run ended 0.06 lower. So do more updates by Adam: in stage 1 every step has
# one, later every second. Joined, micro-batches have 65,536 tokens on one GPU.
# More GPUs pay for each step with an exchange: there half as many steps of 131,072 may be faster in stage 2.
STAGES = (
    # share, tokens, short and long window, lr, multi-token weights at the start and at the end, max_seq_len, classes
    TrainingStage(1, 65_536, 1, 3, 0.85, (1.0, 0.5, 0.25), (1.0, 0.5, 0.0), 896, 12_288, prefix=(0.25, 0.25), adam=1),
    TrainingStage(2, 65_536, 3, 7, 1.0, (1.0, 0.5), (1.0, 0.0), classes=12_288, prefix=(0.25, 0.0)),
    TrainingStage(1.25, 131_072, 5, 11, 1.2, (1.0,), (1.0,), classes=17_408),
    TrainingStage(0.25, 131_072, 5, 11, 1.2, (1.0,), (1.0,)),  # all classes, to correct those that were left out
    TrainingStage(None, 131_072, 6, 13, 1.2, (1.0,), (1.0,)),  # at the learning rate lr_end, whatever lr is
)
FINAL_WINDOWS = (6, 20)  # short, long: for the validation after the last step


class Layer(NamedTuple):
    """One row a layer, which adds to the residual stream, in this order: attention, kept outputs of earlier rows, each
    times a gate, and its MLP. Two outputs are kept before the first row: "x0", the normed embedding of a token, and
    "ngrams", the sum of the embeddings of the bigram and the trigram that end with it.
    """

    window: str | None = "short"  # which of the stage's windows attention uses; None: a layer without attention
    narrow: bool = False  # queries and keys half as wide as values: only the half that rotates with the position
    paired: bool = False  # heads interleaved along time in pairs: a query sees both heads' keys, half as far back
    key_offset: bool = False  # the half of a key that does not rotate comes from the previous token
    value_embed: bool = False  # adds an embedding of the token to the values, times a head's gate
    xsa: bool = False  # exclusive self-attention: less its part along the token's own value, times tanh of a gate
    head_gates: bool = False  # multiplies what each head gives by a gate
    reads: str | None = None  # attention reads this kept output instead of the stream
    values: dict[str, float] = {}  # kept outputs added to the values: name and its gate's start  # noqa: RUF012
    adds: dict[str, float] = {}  # ... added to the stream  # noqa: RUF012
    mlp: bool = True
    # Here a small network computes, from the stream, the gates of this row and of the rows up to the next network. They
    # weigh only what rows ahead of this one have kept. Source: MUDD, arXiv 2502.12170 (2025).
    gates: bool = False
    keep: str | None = None  # the name under which the row's output is kept


# No row takes x0: added in rows 1 to 10, as the seed record has it, it made no difference in three quarters.
NGRAMS, NGRAM_VALUES = dict(ngrams=0.05), dict(ngrams=0.0)
LAYERS = (
    Layer(None, adds=NGRAMS, mlp=False, gates=True, keep="start"),  # ahead of the first layer
    Layer("short", narrow=True, paired=True),
    Layer("short", narrow=True, value_embed=True, xsa=True, values=NGRAM_VALUES, adds=NGRAMS),
    Layer("short", narrow=True, paired=True, value_embed=True, values=NGRAM_VALUES, adds=NGRAMS),
    Layer("long", key_offset=True, xsa=True, head_gates=True, adds=NGRAMS, keep="early"),
    Layer("short", narrow=True, adds=NGRAMS, gates=True),
    Layer("short", narrow=True, paired=True, adds=NGRAMS),
    Layer(None, adds=dict(early=0.09)),
    Layer("short", narrow=True, xsa=True, adds=NGRAMS, keep="middle"),
    # Late layers' attention reads the middle of the model: the stream is by now about the prediction.
    Layer("short", narrow=True, value_embed=True, reads="middle", values=NGRAM_VALUES, adds=NGRAMS),
    Layer("short", narrow=True, adds=NGRAMS, keep="late"),
    Layer("long", key_offset=True, value_embed=True, head_gates=True, reads="middle", gates=True,
          values=dict(start=0.0, middle=0.0, late=0.0) | NGRAM_VALUES,
          adds=dict(start=0.0, middle=0.0, late=0.0) | NGRAMS),
    # After the last layer: much of what the middle has put into the stream is subtracted, as in the seed record.
    Layer(None, adds=dict(start=0.0, early=0.0, middle=-0.5, late=0.0), mlp=False, gates=True),
)  # fmt: skip
XSA_GATE, HEAD_GATE, VALUE_GATE = 0.0, 0.25, 1.0  # initial values
NARROW_SCALE = 1.2  # attention's softmax scale in narrow layers, relative to the others
GATE_HIDDEN, GATE_SCALE = 64, 0.1  # hidden units of a gate network; what its results are multiplied by
# For bigrams and trigrams: what tokens are multiplied by, the last token first. The XOR of the products is a hash, by
# which an n-gram has its row in its half of the table. Source: the public speedrun's PRs 299 and 360, 2026.
NGRAM_FACTORS = {2: (36313, 27191), 3: (17351, 60961, 45259)}

ATTENTION_LAYERS = [i for i, layer in enumerate(LAYERS) if layer.window]
VALUE_LAYERS = [i for i, layer in enumerate(LAYERS) if layer.value_embed]
MLP_LAYERS = [i for i, layer in enumerate(LAYERS) if layer.mlp]
GATE_ROWS = [i for i, layer in enumerate(LAYERS) if layer.gates]
# For each gate network, the layers whose gates it gives
NETWORK_LAYERS = [LAYERS[begin:end] for begin, end in pairwise([*GATE_ROWS, len(LAYERS)])]

# Learned scalars by name: (how many, initial value, learning-rate multiplier). All are one float32 vector. Those with
# one a layer are fields of LayerWeights; where a layer has no attention, or no MLP, they stay as they are.
SCALARS = {
    "attn_resid": (len(LAYERS), 1.1, 5.0),  # weight of the stream where attention is added to it; an MLP is just added
    "mlp_out": (len(LAYERS), 1.0, 5.0),  # weight of the MLP
    "qkv_lambda": (len(LAYERS), 0.5, 5.0),  # scale of W_q, W_k, W_v
    "copy_gain": (1, 1.0, 5.0),  # scale of the scores of copying, see copy_sums
    "copy_bias": (1, 15.0, 5.0),  # bias of the score of not copying; its weights are the parameter copy_sentinel
}


class Row(NamedTuple):
    """One row a parameter of the optimizer. Gradients are reduced and parameters updated in the order of the rows."""

    name: str
    # "normuon": banks of matrices, kept in bf16 and 16 bits more, as float32 has. "adam": not in every step. "rowwise":
    # the table of n-grams, of which a step updates the rows that it has looked up
    algorithm: str
    sharded: bool  # reduce-scatter, update one's slice, all-gather; otherwise all-reduce and update everywhere
    lr: tuple[float, ...]  # multiplier; several repeat along the first dimension: in mlp_bank W_fc, W_proj, W_fc, ...
    wd: float  # weight-decay multiplier: a parameter p decays by lr^2 wd p, where an update goes that way anyway
    betas: tuple[float, float] | None = None  # adam's; rowwise has no first moment
    averaged: bool = False  # ends as its average over the last steps, see AVERAGE_EVERY


SCALAR_LRS = tuple(lr for count, _, lr in SCALARS.values() for _ in range(count))
# Messages travel beneath the longest updates, those of the matrices. So the tables come early, as their all-gathers are
# long, but after a bank whose gradient arrives soon. N-grams stand between matrices: their gradients arrive beneath the
# updates before theirs, the next step's rows beneath the one after it. Nothing hides the last bank's all-gather.
PARAMETERS = (
    #   name            algorithm  sharded  lr x         wd x   betas
    Row("qk_bank", "normuon", True, (1.0,), 1.0, averaged=True),
    Row("narrow_qk_bank", "normuon", True, (1.0,), 1.0, averaged=True),
    Row("value_embeds", "adam", True, (75.0,), 5.0, (0.75, 0.95)),
    # Ahead of embed: its gradient is made from embed's, before that is reduced
    Row("spellings", "adam", True, (0.5,), 150.0, (0.5, 0.95), averaged=True),
    Row("embed", "adam", True, (1.0,), 150.0, (0.5, 0.95), averaged=True),  # the head, too
    Row("mlp_bank", "normuon", True, (1.0, 2.0), 1.0, averaged=True),
    Row("ngrams", "rowwise", True, (70.0,), 5.0, (0.0, 0.95)),
    Row("vo_bank", "normuon", True, (1.0,), 1.0, averaged=True),
    Row("scalars", "adam", False, SCALAR_LRS, 0.0, (0.9, 0.99)),
    Row("gate_in", "adam", False, (0.2,), 1.0, (0.9, 0.99)),
    Row("gate_out", "adam", False, (0.2,), 1.0, (0.9, 0.99)),
    Row("gate_bias", "adam", False, (0.2,), 0.0, (0.9, 0.99)),
    Row("copy_qk", "adam", False, (0.2,), 1.0, (0.9, 0.99)),
    Row("copy_sentinel", "adam", False, (0.05,), 1.0, (0.9, 0.99)),
)
TABLES = ("embed", "spellings", "value_embeds")  # with a row a token
# Some parameters end as their average over the last steps, `average_frac` of all. A high learning rate learns more but
# leaves noise, which an average removes. Source: tail averages, the public speedrun's PRs 349 and 360, 2026.
AVERAGE_EVERY = 4  # steps; neighbours are nearly the same


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of a run; all but the table of stages can be given on the command line as --name=value."""

    preset: str = "auto"  # "speedrun", "smoke", or "auto": the speedrun on a GPU, the smoke run without one
    # data
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"  # glob, relative to DATA_PATH or this file's folder
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"
    train_max_seq_len: int = 2048  # documents are cut here: attention beyond it costs more than it teaches
    micro_batch_tokens: int = 65_536  # a rank joins its micro-batches up to this size; half where a GPU is small
    val_tokens: int = 10_485_760  # fixed by the rules
    val_batch_size: int = 2_097_152  # tokens; validation runs through micro-batches of an eighth of them
    # length of the run
    num_scheduled_iterations: int = 3312  # shared by the stages
    num_extension_iterations: int = 96  # at the final learning rate, with longer windows
    length: float = 1.0  # multiplies these two and the momentum's two below: 0.25 is a quarter run
    cooldown_frac: float = 0.8  # of the scheduled iterations
    lr_end: float = 0.3  # learning-rate factor at the end of the cooldown, and in the extension
    average_frac: float = 0.1  # of all steps: over the last ones parameters are averaged (see PARAMETERS); 0: none are
    stages: tuple[TrainingStage, ...] = STAGES
    # model
    vocab_size: int = 50257  # GPT-2's; padded to a multiple of 128
    bos: int = 50256  # every document begins with this token; GPT-2's <|endoftext|>
    vocabulary: str = "data/gpt2.tiktoken"  # the other tokens' bytes, for n-grams by spelling, and prefixes; "": none
    ngram_rows: int = 8_388_608  # half for bigrams, half for trigrams; a half's last: for documents' first tokens
    copy_width: int = 128  # of the queries and keys that find tokens to copy in the document; 0: no copying
    num_heads: int = 6
    head_dim: int = 128
    mlp_ratio: int = 4  # hidden units of an MLP, times the model's width
    window_block: int = 128  # tokens
    dtype: str = "auto"  # "bfloat16" on a GPU, "float32" on a CPU
    fp8: str = "auto"  # training's products in FP8, on compute capability >= 8.9; "head": the head's only; "off": none
    # optimizer
    adam_lr: float = 0.008
    adam_eps: float = 1e-10
    adam_wd: float = 0.005
    muon_lr: float = 0.028
    muon_wd: float = 1.2
    muon_beta2: float = 0.95
    muon_momentum_warmup: int = 560  # steps from 0.85 to 0.93
    muon_momentum_cooldown: int = 376  # the last steps, back to 0.85
    grad_scale: float = 2.0  # backward starts from this / 8 x the sum of losses; slightly better than 1 in FP8 and bf16
    # run
    run_id: str = ""  # names log and checkpoint; a fresh UUID if empty
    log_dir: str = "logs"
    val_loss_every: int = 250  # steps; 0: only at the end
    val_steps: tuple[int, ...] = ()  # further steps at which to validate, e.g. 5,10,25
    save_checkpoint: bool = False  # at the end: the model alone
    checkpoint_every: int = 0  # steps between checkpoints to go on from, 16 GB each; also at SIGTERM. 0: none
    resume: str = ""  # the run_id of a run to go on with, from its last checkpoint; "auto": run_id's, if there is one
    hang_timeout: float = 300.0  # seconds on the clock without a finished step after which the run is ended; 0: never
    bench: bool = False  # instead of the run: time each stage and project the whole run's time
    bench_steps: int = 24  # of each stage; the first two are not timed
    profile: bool = False  # instead of the run: kernels by category, and a trace of some steps of each stage
    describe: bool = False  # instead of the run: layers, parameters, stages, FLOP and memory, told without GPU or data
    seed: int = 0
    cuda_graphs: str = "auto"  # on a GPU, launch a micro-batch's kernels as one graph; "off" to debug or profile
    compile: str = "auto"  # torch.compile on a GPU; off on a CPU, where compiling takes longer than a smoke run
    deterministic: bool = True  # the same bits in every run on a GPU; False: the compiler times reductions, and chooses

    @property
    def model_dim(self) -> int:
        """C."""
        return self.num_heads * self.head_dim

    @property
    def padded_vocab(self) -> int:
        """V."""
        return round_up(self.vocab_size, 128)

    @property
    def total_steps(self) -> int:
        """Scheduled iterations and extension."""
        return self.steps("num_scheduled_iterations") + self.steps("num_extension_iterations")

    def steps(self, name: str) -> int:
        """A count of steps times `length`, at least 1 unless the count is 0."""
        count = getattr(self, name)
        return max(min(count, 1), round(self.length * count))


PRESETS = {
    "speedrun": {},
    # The same architecture and code path in a minute and a half on two CPU cores: everything narrower and shorter.
    "smoke": dict(
        train_files="data/sample/sample_train_*.bin",
        val_files="data/sample/sample_val_*.bin",
        train_max_seq_len=256,
        val_tokens=16_384,
        val_batch_size=8_192,
        val_loss_every=10,
        bench_steps=8,
        num_scheduled_iterations=46,
        num_extension_iterations=4,
        cooldown_frac=0.6,
        average_frac=0.4,
        # 40,960 classes: in so few steps each has to lower the logits of most of the tokens that never come.
        stages=tuple(stage._replace(tokens=stage.tokens // 128, classes=stage.classes and 40_960) for stage in STAGES),
        micro_batch_tokens=1024,
        ngram_rows=4096,
        copy_width=16,
        head_dim=8,
        window_block=16,
        muon_momentum_warmup=20,
        muon_momentum_cooldown=5,
        cuda_graphs="off",  # on a GPU compiling takes two minutes, the steps of this size two seconds
        compile="off",
    ),
}

SETTINGS = {field.name: field for field in fields(Hyperparameters) if field.name != "stages"}


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below n."""
    return -(-n // multiple) * multiple


class UserError(Exception):
    """What the user can put right; printed as one line on one rank, without a stack trace."""

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else "?" for c in super().__str__())  # it may quote a stranger's text


def require(condition: object, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def import_tool(name: str, argument: str = "") -> ModuleType | None:
    """A module of records/. Where this file is a copy without it: None, or UserError if an argument takes it."""
    path = Path(__file__).resolve().parent / "records" / f"{name}.py"
    if not path.is_file():
        require(not argument, f"{argument} takes {path}, which is not there: run the train_gpt.py of a whole checkout")
        return None
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules.setdefault("train_gpt", sys.modules[__name__])  # as __main__ it would be loaded a second time
    return importlib.import_module(name)


def parse_arguments(arguments: list[str], has_gpu: bool, gpu_memory: float = math.inf) -> tuple[Hyperparameters, dict]:
    """Hyperparameters: as given, else the preset's, else defaults; what was given, by name. Raises UserError."""
    overrides: dict[str, object] = {}
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not equals and name in SETTINGS and SETTINGS[name].type is bool:
            equals, text = "=", "true"  # --bench is --bench=true
        require(argument.startswith("--") and equals, f"argument {argument!r} is not of the form --name=value")
        require(name != "stages", "--stages is a table: edit it at the top of train_gpt.py")
        require(name in SETTINGS, f"unknown hyperparameter --{name}; there are: {', '.join(SETTINGS)}")
        overrides[name] = parse_value(name, text)
    if (preset := overrides.get("preset", "auto")) == "auto":
        preset = "speedrun" if has_gpu else "smoke"
    require(preset in PRESETS, f"--preset={preset}: choose one of {', '.join(PRESETS)}")
    hp = Hyperparameters(**{**PRESETS[preset], **overrides, "preset": preset})
    require(hp.resume != "auto" or hp.run_id, "--resume=auto: give --run_id= too, the name of the run to go on with")
    hp = replace(hp, run_id=hp.run_id or hp.resume or str(uuid.uuid4()))
    # In GiB: micro-batches joined up to 65,536 tokens reserve up to 46 in the speedrun, up to 32,768 some 10 less.
    if gpu_memory < 52 and "micro_batch_tokens" not in overrides:
        hp = replace(hp, micro_batch_tokens=min(hp.micro_batch_tokens, 32_768))
    if checks := import_tool("checks"):
        checks.check_hyperparameters(sys.modules[__name__], hp)
    return hp, overrides


def help_text() -> str:
    """The usage lines and every hyperparameter with its default."""
    lines = [f"  --{name}={field.default}" for name, field in SETTINGS.items()]
    usage = (__doc__ or "python train_gpt.py [--name=value ...]").strip()  # python -OO has no docstrings
    return "\n".join([*usage.splitlines()[:7], "Hyperparameters and their defaults:", *lines])


def parse_value(name: str, text: str) -> object:
    """The text of --name=text as the type of the setting."""
    kind = SETTINGS[name].type
    if name in ("train_files", "val_files", "vocabulary", "log_dir"):
        return os.path.expanduser(text)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind == tuple[int, ...]:
            return tuple(int(part) for part in text.split(",") if part)
        return kind(text)
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "numbers as 5,10,25")
        raise UserError(f"--{name}={text}: expected {expected}") from None


# ======================================================================================================================
# Distributed
# ======================================================================================================================
# One process a GPU. torchrun starts them and says in the environment which is which; they meet in its key-value store.


class World(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        """Whether this process computes on a GPU."""
        return self.device.type == "cuda"

    @staticmethod
    def from_environment() -> "World":
        """As torchrun describes it. Raises UserError if the processes do not divide 8, or for what checks.py finds."""
        if checks := import_tool("checks"):
            checks.check_environment(sys.modules[__name__])
        rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        size, local_size = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        require(MICRO_BATCHES % size == 0, f"{size} processes do not divide 8 micro-batches: start 1, 2, 4 or 8")
        gpus = torch.cuda.device_count()  # by NVML, so that CUDA has not begun yet
        if gpus and local_size > 1:
            # Compiled code names its device. Where each rank sees but one GPU, as number 0, one cache serves all.
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank]
        if not torch.cuda.is_available():
            if checks:
                checks.check_no_gpu(sys.modules[__name__])
                checks.keep_freed_memory()
            return World(rank, size)
        torch.cuda.init()
        seen = len(torch.cuda.default_generators)  # by CUDA: one, or all if it had begun before
        return World(rank, size, torch.device("cuda", min(local_rank, seen - 1)))

    def start(self) -> None:
        """Joins the other processes: NCCL on GPUs, gloo on CPUs."""
        if self.on_gpu:
            torch.cuda.set_device(self.device)
        if self.size > 1:
            backend, device = ("nccl", self.device) if self.on_gpu else ("gloo", None)
            # A long timeout, for ranks that compile at different speeds; a rank's death torchrun sees at once.
            dist.init_process_group(backend, device_id=device, timeout=timedelta(minutes=30))

    def thread(self, name: str) -> ThreadPoolExecutor:
        """One thread, on this process's GPU; else it would open a CUDA context on GPU 0 for every rank."""
        return ThreadPoolExecutor(1, name, partial(torch.cuda.set_device, self.device) if self.on_gpu else None)


def choose_dtype(hp: Hyperparameters, world: World) -> torch.dtype:
    """Of parameters and activations."""
    name = hp.dtype if hp.dtype != "auto" else "bfloat16" if world.on_gpu else "float32"
    require(name != "float32" or not world.on_gpu, "--dtype=float32: attention on a GPU takes bfloat16")
    return getattr(torch, name)


def use_fp8(hp: Hyperparameters, world: World) -> bool:
    """Whether training's products run in FP8, all or the head's alone: where they may and the GPU can."""
    return hp.fp8 != "off" and world.on_gpu and torch.cuda.get_device_capability(world.device) >= (8, 9)


# ======================================================================================================================
# Kernels
# ======================================================================================================================
# Triton kernels, each beside its reference in plain PyTorch: on a GPU the kernel runs, anywhere else the reference.


def switch(kernel: Callable, reference: Callable) -> Callable:
    """A function that launches the kernel if its first argument is on a GPU, and else calls the reference."""
    return lambda x, *rest, **named: (kernel if x.is_cuda else reference)(x, *rest, **named)


def custom_op(kernel: Callable, reference: Callable) -> Callable:
    """Decorator: switch(), which torch.compile takes for an operator.

    The function itself only makes memory for the results, which tells the compiler their types and shapes.
    """

    def decorate(empty_results: Callable) -> Callable:
        schema = torch.library.infer_schema(empty_results, mutates_args=())
        # The compiler's caches know an operator by its name: with other types or shapes it is to have another.
        digest = hashlib.sha256(inspect.getsource(empty_results).encode()).hexdigest()[:16]
        name, uncompiled = f"speedrun_{digest}::{empty_results.__name__}", switch(kernel, reference)
        operator = torch.library.custom_op(name, uncompiled, mutates_args=(), schema=schema)
        operator.register_fake(empty_results)

        def call(*args):  # an operator's first call imports torch.compile, which takes a process three seconds
            return (operator if torch.compiler.is_compiling() else uncompiled)(*args)

        call.operator, call.empty_results = operator, empty_results
        return call

    return decorate


def widened(x: Tensor) -> Tensor:
    """x in float32; float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------- symmetric products, for Polar Express
# X X^T is symmetric: tiles above the diagonal are copies of those below. Source: the seed record.


def symmetric_product_reference(x: Tensor, scale: Tensor, a: float = 0.0, b: float = 0.0, c: float = 1.0):
    """scale (a I + b X + c X X^T), for X (N, M, K), symmetric where b is not 0, and scale (N,) float32."""
    product = c * (x @ x.mT) + a * torch.eye(x.size(1), dtype=x.dtype, device=x.device)
    return (scale[:, None, None] * (product + b * x if b else product)).to(x.dtype)


@triton.jit
def symmetric_product_kernel(
    x_desc, tile_desc, scale_ptr, out_desc, a, b, c, M, K,
    TALL: tl.constexpr, PLUS_X: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One BLOCK x BLOCK tile on or below the diagonal, and its mirror image; TALL: descriptors are of X^T."""
    # Row i and row tiles - 1 - i have tiles + 1 tiles together up to the diagonal.
    tiles, matrix = tl.cdiv(M, BLOCK), tl.program_id(1)
    tile_row, tile_col = tl.program_id(0) // (tiles + 1), tl.program_id(0) % (tiles + 1)
    if tile_col > tile_row:
        tile_row, tile_col = tiles - 1 - tile_row, tile_col - tile_row - 1
    row, col = tile_row * BLOCK, tile_col * BLOCK
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK_K):
        if TALL:
            left = x_desc.load([matrix, k, row]).reshape(BLOCK_K, BLOCK).T
            right = x_desc.load([matrix, k, col]).reshape(BLOCK_K, BLOCK)
        else:
            left = x_desc.load([matrix, row, k]).reshape(BLOCK, BLOCK_K)
            right = x_desc.load([matrix, col, k]).reshape(BLOCK, BLOCK_K).T
        acc = tl.dot(left, right, acc)
    rows, cols = row + tl.arange(0, BLOCK), col + tl.arange(0, BLOCK)
    acc = acc * c + tl.where(rows[:, None] == cols[None, :], a, 0.0)
    if PLUS_X:  # X is symmetric, so TALL makes no difference
        acc += b * tile_desc.load([matrix, row, col]).reshape(BLOCK, BLOCK).to(tl.float32)
    out = (acc * tl.load(scale_ptr + matrix)).to(out_desc.dtype)
    out_desc.store([matrix, row, col], out.reshape(1, BLOCK, BLOCK))
    if row != col:
        out_desc.store([matrix, col, row], out.T.reshape(1, BLOCK, BLOCK))


def symmetric_product_triton(x: Tensor, scale: Tensor, a: float = 0.0, b: float = 0.0, c: float = 1.0):
    """symmetric_product_reference in one kernel, through TMA, for which rows are multiples of 16 bytes.

    X is contiguous, or the transpose of what is.
    """
    (N, M, K), tall, BLOCK, BLOCK_K = x.shape, x.stride(1) == 1, 128, 64
    tiles, stored, out = triton.cdiv(M, BLOCK), x.mT if tall else x, x.new_empty(N, M, M)
    square, of = [1, BLOCK, BLOCK], TensorDescriptor.from_tensor
    # With 4 warps and 96 KB of shared memory two programs share a multiprocessor: one multiplies, the other stores.
    symmetric_product_kernel[(tiles * (tiles + 1) // 2, N)](
        of(stored, [1, BLOCK_K, BLOCK] if tall else [1, BLOCK, BLOCK_K]), of(stored, square) if b else None,
        scale, of(out, square), a, b, c, M, K,
        TALL=tall, PLUS_X=b != 0, BLOCK=BLOCK, BLOCK_K=BLOCK_K, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


symmetric_product = switch(symmetric_product_triton, symmetric_product_reference)


# ---------------------------------------------------------------------------- products in FP8
# FP8 stores a number divided by a scale: activations and weights in e4m3, whose largest number is 448, gradients in
# e5m2. FP8_X: a normed row of C has no number beyond sqrt(C), 32 for a width of 1024. FP8_WEIGHT: weights stayed below
# 3.1 in a half run. FP8_HIDDEN: the first layer's hidden units grow with the run, to 13,000 in a half run. FP8_GRAD is
# for a loss that is not multiplied before backward. Too large a scale costs little: numbers below 2^-10 of it, in e5m2
# 2^-17, become 0. With too small a one they overflow: kernels clip them; of PyTorch's conversions those to e4m3 clip
# (2.13) or make them NaN (2.11), that to e5m2 makes them infinite. MAX_HIDDEN clips in bf16 as the kernels do in FP8.
# Source: arXiv 2209.05433 (2022).
FP8_X, FP8_WEIGHT, FP8_HIDDEN, FP8_GRAD = 32 / 448, 8 / 448, 64.0, 2.0**-6
MAX_HIDDEN = 448 * FP8_HIDDEN
cached_full = cache(torch.full)


def to_fp8(x: Tensor, scale: float, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """x / scale in FP8."""
    return (x / scale).to(dtype)


def fp8_product(a: Tensor, b: Tensor, a_scale, b_scale, out_dtype: torch.dtype, fast: bool = True) -> Tensor:
    """a_scale a b_scale b for FP8 a (M, K), row-major, and b (K, N), column-major, the layouts Hopper multiplies.

    Scales are numbers or 0-d float32 tensors. fast: sums have the tensor core's own precision, below float32's.
    """
    full = torch.full if torch.compiler.is_compiling() else cached_full  # cached, as each would be a kernel's launch
    number = dict(dtype=torch.float32, device=a.device)
    scales = (scale if isinstance(scale, Tensor) else full((), scale, **number) for scale in (a_scale, b_scale))
    return torch._scaled_mm(a, b, *scales, out_dtype=out_dtype, use_fast_accum=fast)


# A weight's gradient is a product of two transposes, (M, T) and (T, N), in which the order of tokens is free. That of
# "regrouped" ones is, for each 128 tokens, 0, 8, 64, 72; 1, 9, 65, 73; ... 7, 15, 71, 79; 16, 24, 80, 88; ...: such
# fours of a tile's 128 rows the tensor core leaves in one thread, which can store them as words of the transpose.


def transposed_reference(x: Tensor, regrouped: bool = False) -> Tensor:
    """x^T, contiguous, for x (..., M, N); or regrouped, for x (M, N) with rows of zeros up to a multiple of 128."""
    if regrouped:
        x = F.pad(x.view(torch.uint8), (0, 0, 0, -len(x) % 128)).view(x.dtype)
        x = x.unflatten(0, (-1, 2, 4, 2, 8)).permute(0, 2, 4, 1, 3, 5).flatten(0, 4)
    return x.mT.contiguous()


@triton.jit
def transposed_kernel(
    x_ptr, out_ptr, M, N, words, NEAR: tl.constexpr, FAR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """A tile of 4 ROWS x 4 COLS bytes of a (M, 4 N) matrix, moved as words of four bytes: single ones are slow.

    Of a word in a row of the result the bytes come from a row of x and those NEAR, FAR and NEAR + FAR below it.
    """
    matrix = tl.program_id(2).to(tl.int64)
    word, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    row = word + word // NEAR * NEAR  # counts the rows without the bit NEAR ...
    row += row // FAR * FAR  # ... and without FAR
    places, inside = (matrix * M + row)[:, None] * N + col[None, :], (col < N)[None, :]
    a, b, c, d = [
        tl.load(x_ptr + places + i * N, mask=inside & (row < M - i)[:, None], other=0)
        for i in (0, NEAR, FAR, NEAR + FAR)
    ]
    places, inside = (4 * (matrix * N + col) * words)[:, None] + word[None, :], (col < N)[:, None] & (word < words)
    for i in tl.static_range(4):  # their column i
        packed = (a >> 8 * i & 255) | (b >> 8 * i & 255) << 8 | (c >> 8 * i & 255) << 16 | d >> 8 * i << 24
        tl.store(out_ptr + places + i * words, tl.trans(packed), mask=inside)


def transposed_triton(x: Tensor, regrouped: bool = False) -> Tensor:
    """transposed() in one kernel, for multiples of 4 columns and, unless regrouped, rows; the tile hardly matters."""
    *batch, M, N = x.shape
    out = transposed.empty_results(x, regrouped)
    words = out.shape[-1] // 4
    transposed_kernel[(triton.cdiv(words, 32), triton.cdiv(N, 128), math.prod(batch))](
        x.contiguous().view(torch.int32), out.view(torch.int32), M, N // 4, words, *(8, 64) if regrouped else (1, 2),
        ROWS=32, COLS=32, num_warps=4,
    )  # fmt: skip
    return out


@custom_op(transposed_triton, transposed_reference)
def transposed(x: Tensor, regrouped: bool = False) -> Tensor:
    """x^T, contiguous, for matrices x (..., M, N) of an 8-bit type; regrouped: as transposed_reference has it.

    torch.compile's own takes byte by byte, and with PyTorch 2.13 and Triton 3.7 it gets some bytes wrong.
    """
    *batch, M, N = x.shape
    return x.new_empty(*batch, N, round_up(M, 128) if regrouped else M)


def fp8_weights(matrices: Tensor, scale: float = FP8_WEIGHT) -> tuple[Tensor, Tensor]:
    """Matrices W (..., N, K) in FP8, as they are, for x W^T, and transposed, for its gradient.

    Clipped, compiled or not: see above.
    """
    fp8 = to_fp8(matrices.clamp(-448 * scale, 448 * scale), scale)
    return fp8, transposed(fp8)


def fp8_weight_gradient(a_t: Tensor, b: Tensor, a_scale, b_scale, out_dtype: torch.dtype) -> Tensor:
    """(a_scale a)^T b_scale b for FP8 b (T, N) and a (T, M), given as its regrouped transpose.

    The sum is over all tokens: not fast, and their order is free.
    """
    return fp8_product(a_t, transposed(b, True).T, a_scale, b_scale, out_dtype, fast=False)


class Projection(NamedTuple):
    """The operands of a product x W^T and of its gradients; fields for FP8 are None where training is not in FP8.

    Autograd's gradients go to x and weight in either case. LayerWeights have projections without x.
    """

    weight: Tensor | tuple[Tensor, ...]  # W (N, K); in LayerWeights as the banks have it
    fp8: Tensor | None = None  # W and W^T, from fp8_weights
    fp8_t: Tensor | None = None
    grad_scale: float | None = None  # of the product's gradient
    scale: Tensor | None = None  # of W, 0-d, for queries, keys and values; an MLP's is FP8_WEIGHT
    x: Tensor | None = None  # (T, K)
    x_fp8: Tensor | None = None  # in the scale FP8_X


# ---------------------------------------------------------------------------- the MLP: linear + relu^2, both directions
# One kernel computes p = x W^T and relu^2 (Primer, arXiv 2109.08668, 2021). Of p only hidden = relu(p)^2 is stored: the
# derivative, 2 relu(p), is 2 sqrt(hidden), so that backward is the same kernel with another last step. In FP8 it stores
# the transpose as well, for weights' gradients.


def linear_relu2_reference(x: Tensor, weight: Tensor, hidden: Tensor | None = None, scale: float = 1.0):
    """relu(scale x W^T)^2 for x (T, C), W (F, C); with `hidden` (T, F), scale sqrt(hidden) (x W^T). In x's type.

    And in FP8 its regrouped transpose, else nothing, (0,).
    """
    fp8 = x.dtype.itemsize == 1
    wide = torch.bfloat16 if fp8 else x.dtype
    product = scale * (x.to(wide) @ weight.to(wide).T)
    out = (F.relu(product).square() if hidden is None else product * hidden.to(wide).sqrt()).to(x.dtype)
    return out, transposed_reference(out, True) if fp8 else out.new_empty(0)


@triton.jit
def pack_fp8(a, b, c, d, E5M2: tl.constexpr, INTERPRETED: tl.constexpr):
    """Four numbers in FP8 as the bytes of an int32; in PTX, as Triton 3.6 compiles the plain form to wrong bytes."""
    if INTERPRETED:
        fp8: tl.constexpr = tl.float8e5 if E5M2 else tl.float8e4nv
        a, b, c, d = [x.to(fp8).to(tl.uint8, bitcast=True).to(tl.int32) for x in (a, b, c, d)]
        return a | b << 8 | c << 16 | d << 24
    convert: tl.constexpr = "cvt.rn.satfinite.e5m2x2.f32" if E5M2 else "cvt.rn.satfinite.e4m3x2.f32"
    return tl.inline_asm_elementwise(
        "{.reg .b16 ab, cd; " + convert + " ab, $2, $1; " + convert + " cd, $4, $3; mov.b32 $0, {ab, cd};}",
        "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def linear_relu2_kernel(
    x_desc, weight_desc, hidden_ptr, out_desc, out_t_desc, scale, T, N, K,
    BACKWARD: tl.constexpr, FP8: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A BLOCK x BLOCK tile of the output; GROUP rows of tiles share their columns of W in the L2 cache."""
    tile, tiles_t, tiles_n = tl.program_id(0), tl.cdiv(T, BLOCK), tl.cdiv(N, BLOCK)
    first_t = tile // (GROUP * tiles_n) * GROUP
    group = min(tiles_t - first_t, GROUP)
    row = (first_t + tile % (GROUP * tiles_n) % group) * BLOCK
    col = tile % (GROUP * tiles_n) // group * BLOCK
    if BACKWARD:  # asked for ahead of the products, it arrives beneath them
        rows, cols = row + tl.arange(0, BLOCK)[:, None], col + tl.arange(0, BLOCK)[None, :]
        hidden = tl.load(hidden_ptr + rows.to(tl.int64) * N + cols, mask=(rows < T) & (cols < N), other=0.0)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(x_desc.load([row, k]), weight_desc.load([col, k]).T, acc)
    acc *= scale
    if BACKWARD:
        acc *= tl.sqrt(hidden.to(tl.float32))
    else:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        acc *= acc
    out_desc.store([row, col], acc.to(out_desc.dtype))
    if FP8:  # the regrouped transpose: a row, that 8 below it and both of the tile's other half
        upper, lower = acc.reshape(2, BLOCK // 32, 2, 8, BLOCK).permute(1, 3, 4, 0, 2).split()
        a, c = upper.split()
        b, d = lower.split()
        words = pack_fp8(a, b, c, d, BACKWARD, INTERPRETED).reshape(BLOCK // 4, BLOCK)
        out_t_desc.store([col, row // 4], words.T)


def linear_relu2_triton(x: Tensor, weight: Tensor, hidden: Tensor | None = None, scale: float = 1.0):
    """linear_relu2_reference in one kernel, through TMA, for which rows are multiples of 16 bytes."""
    (T, K), N, fp8 = x.shape, weight.shape[0], x.dtype.itemsize == 1
    out, out_t = linear_relu2.empty_results(x, weight)
    # With 4 warps and 96 KB of shared memory two programs share a multiprocessor: one multiplies while the other does
    # its last steps. Of 13 forms on H200 (C = 768, F = 3072) the best backward, and forward within 3 % of the best.
    BLOCK, BLOCK_K = 128, 128 // x.dtype.itemsize
    tile, of = [BLOCK, BLOCK], TensorDescriptor.from_tensor
    linear_relu2_kernel[(triton.cdiv(T, BLOCK) * triton.cdiv(N, BLOCK),)](
        of(x.contiguous(), [BLOCK, BLOCK_K]), of(weight.contiguous(), [BLOCK, BLOCK_K]),
        hidden, of(out, tile), of(out_t.view(torch.int32), [BLOCK, BLOCK // 4]) if fp8 else None, scale, T, N, K,
        BACKWARD=hidden is not None, FP8=fp8, INTERPRETED=not x.is_cuda,
        BLOCK=BLOCK, BLOCK_K=BLOCK_K, GROUP=8, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out, out_t


@custom_op(linear_relu2_triton, linear_relu2_reference)
def linear_relu2(
    x: Tensor, weight: Tensor, hidden: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """relu(scale x W^T)^2 or, with `hidden`, the gradient ahead of relu^2; see linear_relu2_reference."""
    T, N = len(x), len(weight)
    return x.new_empty(T, N), x.new_empty((N, round_up(T, 128)) if x.dtype.itemsize == 1 else 0)


class MLP(torch.autograd.Function):
    """relu(x W_fc^T)^2 W_proj for x (T, C) and W_fc, W_proj (F, C); with fp8, as in Projection, all products in FP8.

    In FP8 it is gain times the W_proj of fp8 that multiplies, gain (), float32; w_proj takes that product's gradient.
    """

    @staticmethod
    def forward(ctx, x, w_fc, w_proj, fp8=None, fp8_t=None, grad_scale=None, gain=None):
        ctx.grad_scale = grad_scale
        if fp8 is None:
            hidden = linear_relu2(x, w_fc)[0].clamp(max=MAX_HIDDEN)  # (T, F)
            ctx.save_for_backward(x, hidden, w_fc, w_proj)
            return hidden @ w_proj
        x_fp8 = to_fp8(x, FP8_X)
        scale = FP8_X * FP8_WEIGHT * FP8_HIDDEN**-0.5  # with s = FP8_HIDDEN: p^2 / s = (p / sqrt(s))^2
        hidden, hidden_t = linear_relu2(x_fp8, fp8[0], None, scale)
        ctx.save_for_backward(x_fp8, hidden, hidden_t, fp8, fp8_t, gain)
        return fp8_product(hidden, fp8_t[1].T, FP8_HIDDEN, FP8_WEIGHT * gain, x.dtype)

    @staticmethod
    def backward(ctx, grad_out):
        x, hidden, *rest = ctx.saved_tensors
        if ctx.grad_scale is None:
            w_fc, w_proj = rest
            grad_pre, _ = linear_relu2(grad_out, w_proj, hidden, 2.0)
            return grad_pre @ w_fc, grad_pre.T @ x, hidden.T @ grad_out, *(None,) * 4
        (hidden_t, fp8, fp8_t, gain), scale, dtype = rest, ctx.grad_scale, grad_out.dtype
        grad = to_fp8(grad_out, scale, torch.float8_e5m2)
        factor = 2 * FP8_HIDDEN**0.5 * FP8_WEIGHT  # the derivative is 2 relu(p) = 2 sqrt(s hidden)
        grad_pre, grad_pre_t = linear_relu2(grad, fp8[1], hidden, factor)
        pre_scale = scale * gain  # of grad_pre
        grad_x = fp8_product(grad_pre, fp8_t[0].T, pre_scale, FP8_WEIGHT, dtype)
        grad_fc = fp8_weight_gradient(grad_pre_t, x, pre_scale, FP8_X, dtype)
        return grad_x, grad_fc, fp8_weight_gradient(hidden_t, grad, FP8_HIDDEN, scale, dtype), *(None,) * 4


# ---------------------------------------------------------------------------- softcapped multi-token cross-entropy
# A position has n targets, next tokens (multi-token prediction, arXiv 2404.19737, 2024) and a prefix. Each direction is
# one pass over the logits. The cap, in the seed record's form, is after Gemma 2's (arXiv 2408.00118, 2024).
SOFTCAP = (23.0, 5.0, 7.5)  # cap, shift, temperature: z = cap * sigmoid((logit + shift) / temperature)


def softcapped(logits: Tensor) -> Tensor:
    """z of logits (T, V), float32 (or float64)."""
    cap, shift, temperature = SOFTCAP
    return torch.sigmoid((widened(logits) + shift).div_(temperature)).mul_(cap)


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (n, T), lse(z_t) - z_t[targets[k, t]], 0 where a target is -1, and lse (T,); targets (n, T) int."""
    z = softcapped(logits)
    lse, picked = z.logsumexp(-1), z.gather(1, targets.T.clamp(min=0).long()).T
    return torch.where(targets >= 0, lse - picked, 0), lse


def cross_entropy_backward_reference(logits, lse, targets, grad, scale: float, dtype: torch.dtype):
    """The gradient of sum(grad * losses), grad (n, T), over `scale`, as `dtype` (T, V); in 8 bits transposed, too."""
    cap, shift, temperature = SOFTCAP
    sigmoid = torch.sigmoid((logits.to(lse.dtype) + shift).div_(temperature))
    grad = torch.where(targets >= 0, grad.to(lse.dtype), 0) * cap / (temperature * scale)
    grad_z = (sigmoid * cap).sub_(lse[:, None]).exp_().mul_(grad.sum(0)[:, None])
    grad_z.scatter_add_(1, targets.T.clamp(min=0).long(), -grad.T)
    out = torch.ops.aten.sigmoid_backward(grad_z, sigmoid).to(dtype)
    return out, out.T.contiguous() if dtype.itemsize == 1 else out.new_empty(0)


CAP, SHIFT, TEMPERATURE = map(tl.constexpr, SOFTCAP)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def cap_sigmoid(logits):
    """sigmoid((logit + shift) / temperature), to 2e-7.

    These kernels are limited by the unit for exponentials and reciprocals, so 1 / d is made on the multiply-add units:
    subtracting the bits of d from a constant negates its exponent, which is a guess; each step then cubes the error.
    """
    y = logits.to(tl.float32) * (-LOG2_E / TEMPERATURE) - SHIFT * LOG2_E / TEMPERATURE
    d = 1.0 + tl.exp2(tl.minimum(y, 64.0, propagate_nan=tl.PropagateNan.ALL))  # a NaN is to reach the loss
    r = (0x7EF311C7 - d.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)  # off by up to 12 %
    for _ in tl.static_range(2):
        error = 1.0 - d * r
        r += r * (error * error + error)
    return r


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, lse_ptr, T, V, N_TARGETS: tl.constexpr, BLOCK: tl.constexpr
):
    """One row. No running maximum: z is at most 23, and exp(23) times the vocabulary is far inside float32."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * V
    cols = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + cols < V
        s = cap_sigmoid(tl.load(logits_ptr + start + cols, mask=inside, other=0.0))
        total += tl.where(inside, tl.exp2(s * (CAP * LOG2_E)), 0.0)
    lse = tl.log(tl.sum(total))
    for k in tl.static_range(N_TARGETS):
        target, loss = tl.load(targets_ptr + k * T + row), 0.0
        if target >= 0:
            loss = lse - cap_sigmoid(tl.load(logits_ptr + target)) * CAP
        tl.store(losses_ptr + k * T + row, loss)
    tl.store(lse_ptr + row, lse)


@triton.jit
def cross_entropy_gradient(
    logits_ptr, lse_ptr, sums_ptr, out_ptr, factor, T, V, first_row, first_col, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Rows offset, offset + 4, ... of a tile: the gradient without the targets' terms, written and returned."""
    in_tile = 4 * tl.arange(0, ROWS // 4) + offset
    rows, cols = first_row + in_tile, first_col + tl.arange(0, COLS)
    factor *= tl.load(sums_ptr + rows, mask=rows < T, other=0.0)
    lse_2 = tl.load(lse_ptr + rows, mask=rows < T, other=0.0) * LOG2_E
    # 64 bits for the tile's corner; 32 do inside the tile
    corner = first_row.to(tl.int64) * V + first_col
    offsets = in_tile[:, None] * V + tl.arange(0, COLS)[None, :]
    inside = (rows < T)[:, None] & (cols < V)[None, :]
    s = cap_sigmoid(tl.load(logits_ptr + corner + offsets, mask=inside, other=0.0))
    grad = factor[:, None] * tl.exp2(s * (CAP * LOG2_E) - lse_2[:, None]) * (s - s * s)
    tl.store(out_ptr + corner + offsets, grad.to(out_ptr.dtype.element_ty), mask=inside)
    return grad


@triton.jit
def cross_entropy_backward_kernel(
    logits_ptr, lse_ptr, sums_ptr, out_ptr, out_t_ptr, factor, T, V,
    TRANSPOSED: tl.constexpr, INTERPRETED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient without the targets' terms, stored as it is and, if TRANSPOSED, transposed as well.

    Bytes are slow to transpose: those of four rows are packed into words, for which T is a multiple of 4.
    """
    first_row, first_col = tl.program_id(0) * ROWS, tl.program_id(1) * COLS
    args = (logits_ptr, lse_ptr, sums_ptr, out_ptr, factor, T, V, first_row, first_col)
    a, b, c, d = [cross_entropy_gradient(*args, offset, ROWS, COLS) for offset in (0, 1, 2, 3)]
    if TRANSPOSED:
        words = pack_fp8(a, b, c, d, True, INTERPRETED)
        corner = first_col.to(tl.int64) * (T // 4) + first_row // 4
        in_tile_row, in_tile_col = tl.arange(0, ROWS // 4)[None, :], tl.arange(0, COLS)[:, None]
        inside = (first_col + in_tile_col < V) & (first_row + 4 * in_tile_row < T)
        words_ptr = out_t_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(words_ptr + corner + in_tile_col * (T // 4) + in_tile_row, tl.trans(words), mask=inside)


@triton.jit
def cross_entropy_targets_kernel(
    logits_ptr, lse_ptr, sums_ptr, targets_ptr, grad_ptr, out_ptr, out_t_ptr, factor, T, V,
    N_TARGETS: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient at the targets, over what the kernel above stored there: comparing all columns would cost more."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lse = tl.load(lse_ptr + rows, mask=rows < T, other=0.0)
    sums = tl.load(sums_ptr + rows, mask=rows < T, other=0.0)
    rows_64 = rows.to(tl.int64)
    for k in tl.static_range(N_TARGETS):
        target = tl.load(targets_ptr + k * T + rows, mask=rows < T, other=-1).to(tl.int64)
        inside = target >= 0
        s = cap_sigmoid(tl.load(logits_ptr + rows_64 * V + target, mask=inside, other=0.0))
        d_z = sums * tl.exp2((s * CAP - lse) * LOG2_E)
        for j in tl.static_range(N_TARGETS):  # equal targets add up
            other = tl.load(targets_ptr + j * T + rows, mask=rows < T, other=-1)
            d_z -= tl.where(other == target, tl.load(grad_ptr + j * T + rows, mask=rows < T, other=0.0), 0.0)
        grad = (factor * d_z * (s - s * s)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows_64 * V + target, grad, mask=inside)
        if TRANSPOSED:
            tl.store(out_t_ptr + target * T + rows, grad, mask=inside)


def cross_entropy_triton(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """cross_entropy_reference, one pass over contiguous logits."""
    (T, V), n = logits.shape, len(targets)
    losses, lse = cross_entropy.empty_results(logits, targets)
    cross_entropy_kernel[(T,)](logits, targets, losses, lse, T, V, n, BLOCK=1024, num_warps=4)  # best of 4 on H100
    return losses, lse


def cross_entropy_backward_triton(logits, lse, targets, grad, scale: float, dtype: torch.dtype):
    """cross_entropy_backward_reference in two kernels, one pass over contiguous logits."""
    T, V = logits.shape
    out, out_t = cross_entropy_backward.empty_results(logits, lse, targets, grad, scale, dtype)
    factor = SOFTCAP[0] / (SOFTCAP[2] * scale)
    sums = torch.where(targets >= 0, grad, 0).sum(0)  # (T,)
    ROWS, COLS = 128, 64  # with 4 warps among the best two of 11 on H100
    options = dict(T=T, V=V, TRANSPOSED=len(out_t) > 0, ROWS=ROWS, num_warps=4)
    cross_entropy_backward_kernel[(triton.cdiv(T, ROWS), triton.cdiv(V, COLS))](
        logits, lse, sums, out, out_t, factor, **options, INTERPRETED=not logits.is_cuda, COLS=COLS
    )
    cross_entropy_targets_kernel[(triton.cdiv(T, ROWS),)](
        logits, lse, sums, targets, grad, out, out_t, factor, **options, N_TARGETS=len(targets)
    )
    return out, out_t


@custom_op(cross_entropy_triton, cross_entropy_reference)
def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (n, T) and lse (T,); see cross_entropy_reference."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in (targets.shape, len(logits)))


@custom_op(cross_entropy_backward_triton, cross_entropy_backward_reference)
def cross_entropy_backward(
    logits: Tensor, lse: Tensor, targets: Tensor, grad: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The logits' gradient (T, V), see cross_entropy_backward_reference; in 8 bits its transpose (V, T), else (0,)."""
    T, V = logits.shape
    return logits.new_empty((T, V), dtype=dtype), logits.new_empty((V, T) if dtype.itemsize == 1 else 0, dtype=dtype)


# ---------------------------------------------------------------------------- the head, in FP8 and bf16, with its loss
# Logits and their gradient are a step's largest tensors: here the gradient is written only in the type its products
# read. FP8_HEAD_X has room for normed rows up to a width of 10,000 (see FP8_X), FP8_HEAD for weights up to 6.4: the
# seed record's stayed below 1.6, ours are sums of two.
FP8_HEAD_X, FP8_HEAD, FP8_HEAD_GRAD = 100 / 448, 6.4 / 448, 0.75 / 448


class HeadLoss(torch.autograd.Function):
    """Softcapped cross-entropy of the logits x @ head^T with n targets a position: (T, C), (V, C), (n, T) -> (n, T).

    loss_scale: what losses are multiplied by before backward, for products in FP8; None for products in x's type.
    x_fp8: x in the scale FP8_HEAD_X, where it is at hand.
    """

    @staticmethod
    def forward(ctx, x, head, targets, loss_scale, x_fp8=None):
        ctx.loss_scale, ctx.dtype = loss_scale, head.dtype
        if loss_scale is None:
            logits = x @ head.T
        else:
            x = to_fp8(x, FP8_HEAD_X) if x_fp8 is None else x_fp8
            weight, head = fp8_weights(head, FP8_HEAD)
            logits = fp8_product(x, weight.T, FP8_HEAD_X, FP8_HEAD, torch.bfloat16)
        losses, lse = cross_entropy(logits, targets)
        ctx.save_for_backward(logits, lse, targets, x, head)  # in FP8, the head is transposed
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        logits, lse, targets, x, head = ctx.saved_tensors
        grad_losses = grad_losses.contiguous()
        if ctx.loss_scale is None:
            grad, _ = cross_entropy_backward(logits, lse, targets, grad_losses, 1.0, logits.dtype)
            return grad @ head, grad.T @ x, None, None, None
        scale = ctx.loss_scale * FP8_HEAD_GRAD
        grad, grad_t = cross_entropy_backward(logits, lse, targets, grad_losses, scale, torch.float8_e5m2)
        # Not fast, as sums are over the vocabulary, and over all tokens.
        grad_x = fp8_product(grad, head.T, scale, FP8_HEAD, ctx.dtype, fast=False)
        grad_head = fp8_product(grad_t, transposed(x).T, scale, FP8_HEAD_X, ctx.dtype, fast=False)
        return grad_x, grad_head, None, None, None


# ---------------------------------------------------------------------------- lookups in the embedding tables
# Gradients are added to .grad here, row by row: autograd would fill a table with zeros, scatter into it, and add all of
# it, 600 MB for a few thousand rows. Positions are sorted, so that one program sums a row: atomic additions come in an
# order left to chance, and would end with other bits each time.


def add_rows_reference(table: Tensor, rows: Tensor, order: Tensor, grad: Tensor, gate: Tensor | None = None) -> None:
    """table[rows[t]] += grad[t], times gate[t, h] for its h-th of H parts; (rows, C), (T,), (T,), (T, C), (T, H)."""
    if gate is not None:
        grad = (gate.unsqueeze(-1) * grad.unflatten(1, (gate.size(1), -1))).flatten(1)
    total = widened(table)  # in bfloat16 the sum of a frequent token's thousands of rows would stop growing
    table.copy_(total.index_add_(0, rows, grad.to(total.dtype)))


@triton.jit
def sorted_rows(rows_ptr, order_ptr, place, T):
    """The positions at sorted places, and their rows; outside of 0 to T row -1."""
    inside = (place >= 0) & (place < T)
    t = tl.load(order_ptr + place, mask=inside, other=0)
    return t.to(tl.int64), tl.load(rows_ptr + t, mask=inside, other=-1)


@triton.jit
def add_rows_kernel(
    grad_ptr, gate_ptr, order_ptr, rows_ptr, table_ptr, T,
    C: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of the rows that begin among CHUNK of the T sorted positions; the last may go on beyond these."""
    start, part, cols = tl.program_id(0) * CHUNK, tl.program_id(1), tl.arange(0, BLOCK)
    place, here = start + tl.arange(0, CHUNK), (part * WIDTH + cols)[None, :]
    columns = (cols < WIDTH)[None, :] & (here < C)
    t, own = sorted_rows(rows_ptr, order_ptr, place, T)
    _, before = sorted_rows(rows_ptr, order_ptr, place - 1, T)
    begins, row, last = (own >= 0) & (own != before), own, tl.max(own, 0)
    acc, goes_on = tl.zeros((CHUNK, BLOCK), tl.float32), tl.max(begins.to(tl.int32), 0) == 1
    while goes_on:
        wanted = (row >= 0) & (row <= last)
        grad = tl.load(grad_ptr + t[:, None] * C + here, mask=wanted[:, None] & columns, other=0.0)
        weight = (own[:, None] == row[None, :]).to(grad.dtype)
        if gate_ptr is not None:
            weight *= tl.load(gate_ptr + t * (C // WIDTH) + part, mask=wanted, other=0.0)[None, :]
        # The next chunk is found while gradients arrive: a frequent token has dozens, one after the other.
        place += CHUNK
        t, row = sorted_rows(rows_ptr, order_ptr, place, T)
        acc = tl.dot(weight, grad, acc, input_precision="ieee")  # at each place the sum of its row
        goes_on = tl.max((row == last).to(tl.int32), 0) == 1
    table_ptr += own.to(tl.int64)[:, None] * C + here
    mask = begins[:, None] & columns
    acc += tl.load(table_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(table_ptr, acc.to(table_ptr.dtype.element_ty), mask=mask)


def add_rows_triton(table: Tensor, rows: Tensor, order: Tensor, grad: Tensor, gate: Tensor | None = None) -> None:
    """add_rows_reference in one kernel; order (T,) sorts `rows`."""
    (T, C), CHUNK = grad.shape, 64
    width = min(C, 128) if gate is None else C // gate.size(1)
    block = max(16, triton.next_power_of_2(width))  # 16: the least a tensor core multiplies
    # 64 positions and 4 warps: on H100 the best of seven
    add_rows_kernel[(triton.cdiv(T, CHUNK), triton.cdiv(C, width))](
        grad.contiguous(), gate, order, rows, table, T, C, width, CHUNK, block, num_warps=4
    )


add_rows = switch(add_rows_triton, add_rows_reference)


def table_gradient(table: Tensor) -> Tensor:
    """The table's .grad. Its type is enough: add_rows sums a micro-batch's gradients of a row ahead of its rounding."""
    if table.grad is None:
        table.grad = torch.zeros_like(table)
    return table.grad


class Lookup(torch.autograd.Function):
    """Rows of a table (rows, C) by index (T,); order (T,) sorts the indices."""

    @staticmethod
    def forward(ctx, table, rows, order):
        ctx.save_for_backward(table, rows, order)
        return F.embedding(rows, table)

    @staticmethod
    def backward(ctx, grad):
        table, *rows_and_order = ctx.saved_tensors
        add_rows(table_gradient(table), *rows_and_order, grad)
        return None, None, None


# ---------------------------------------------------------------------------- Adam, and momentum for NorMuon
# Kernels, as torch.compile would take half a second in every start for the shape of each parameter.


def adam_reference(p, grad, m, v, multipliers, lr: float, correction: float, beta1, beta2, eps: float, wd: float):
    """One Adam step with cautious weight decay, in place. The learning rate is lr times `multipliers`.

    multipliers broadcasts over p from its first dimension, (1, 1, ...) or (n, 1, ...); `correction` is for both biases.
    """
    new_m, new_v, grad, master, lr = widened(m), widened(v), widened(grad), widened(p), lr * multipliers
    new_m = new_m.lerp(grad, 1 - beta1)
    new_v = new_v.lerp(grad.square(), 1 - beta2)
    update = lr * correction * new_m / (new_v.sqrt() + eps)
    # Decay only where it points the way the update goes anyway (cautious weight decay, arXiv 2510.12402).
    update = update + torch.where(update * master > 0, lr * lr * wd * master, 0)
    for old, new in ((m, new_m), (v, new_v), (p, master - update)):
        old.copy_(new)


@triton.jit
def adam_kernel(
    p_ptr, grad_ptr, m_ptr, v_ptr, multipliers_ptr, n, blocks, lr, correction, beta1, beta2, eps, wd,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One of the `blocks` blocks of n numbers that share a multiplier."""
    part, i = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside, i = i < n, part * n + i
    grad = tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + i, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + i, mask=inside, other=0.0).to(tl.float32)
    master = tl.load(p_ptr + i, mask=inside, other=0.0).to(tl.float32)
    m += (1 - beta1) * (grad - m)
    v += (1 - beta2) * (grad * grad - v)
    lr *= tl.load(multipliers_ptr + part)
    u = lr * correction * m / (tl.sqrt(v) + eps)
    u += tl.where(u * master > 0, lr * lr * wd * master, 0.0)
    tl.store(m_ptr + i, m.to(m_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + i, v.to(v_ptr.dtype.element_ty), mask=inside)
    tl.store(p_ptr + i, (master - u).to(p_ptr.dtype.element_ty), mask=inside)


def adam_triton(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, multipliers: Tensor, *numbers: float) -> None:
    """adam_reference in one kernel, for contiguous tensors of less than 2^31 numbers."""
    parts, BLOCK = len(multipliers), 1024
    n = p.numel() // parts
    blocks = triton.cdiv(n, BLOCK)
    adam_kernel[(parts * blocks,)](p, grad, m, v, multipliers, n, blocks, *numbers, BLOCK, num_warps=4)


adam = switch(adam_triton, adam_reference)


def nesterov_reference(grad: Tensor, m: Tensor, momentum: float, out_dtype: torch.dtype) -> Tensor:
    """Nesterov momentum: moves m (float32) towards the gradient, in place, and returns the look-ahead."""
    grad = grad.to(m.dtype)
    m += (grad - m) * (1 - momentum)
    return (grad + (m - grad) * momentum).to(out_dtype)


@triton.jit
def nesterov_kernel(grad_ptr, m_ptr, out_ptr, n, momentum, BLOCK: tl.constexpr):
    """BLOCK of n numbers."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    grad = tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + i, mask=inside, other=0.0)
    m += (grad - m) * (1 - momentum)
    tl.store(m_ptr + i, m, mask=inside)
    tl.store(out_ptr + i, (grad + (m - grad) * momentum).to(out_ptr.dtype.element_ty), mask=inside)


def nesterov_triton(grad: Tensor, m: Tensor, momentum: float, out_dtype: torch.dtype) -> Tensor:
    """nesterov_reference in one kernel, for contiguous tensors of less than 2^31 numbers."""
    out, BLOCK = torch.empty_like(m, dtype=out_dtype), 1024
    nesterov_kernel[(triton.cdiv(m.numel(), BLOCK),)](grad, m, out, m.numel(), momentum, BLOCK, num_warps=4)
    return out


nesterov = switch(nesterov_triton, nesterov_reference)


# ---------------------------------------------------------------------------- Adam by rows, for the table of n-grams
# A step looks up few of millions of rows: only these move. A row has one second moment for all its numbers, as in
# FBGEMM's PARTIAL_ROWWISE_ADAM for embedding tables, and no first moment.


def update_rows_reference(p, v, last, rows, grad, update: int, beta2: float, lr: float, decay: float, eps: float):
    """Adam with beta1 = 0 and one second moment a row, on p[rows] alone, in place; returns mean(grad^2) by row.

    p (N, C), v (N,) float32, rows (n,), none twice, grad (n, C). lr includes v's bias correction, decay is a factor by
    itself. `update` is the number of this update, last (N,) int32 that of each row's latest: in between a row does not
    move, and the decay of v that it has missed is made up for. Cautious weight decay as in adam_reference.
    """
    grad, master = grad.to(v.dtype), p[rows].to(v.dtype)
    mean_square = grad.square().mean(1)
    v[rows] = v[rows] * beta2 ** (update - last[rows]) + (1 - beta2) * mean_square
    last[rows] = update
    u = (lr / (v[rows].sqrt() + eps))[:, None] * grad
    u = u + torch.where(u * master > 0, decay * master, 0)
    p[rows] = (master - u).to(p.dtype)
    return mean_square


@triton.jit(do_not_specialize=["update"])
def update_rows_kernel(
    p_ptr, v_ptr, last_ptr, rows_ptr, grad_ptr, mean_square_ptr, update, log2_beta2, one_minus_beta2, lr, decay, eps,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. p may have more than 2^31 numbers."""
    i, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + i).to(tl.int64)
    p_ptrs, inside = p_ptr + row * C + cols, cols < C
    grad = tl.load(grad_ptr + i * C + cols, mask=inside, other=0.0).to(tl.float32)
    master = tl.load(p_ptrs, mask=inside, other=0.0).to(tl.float32)
    v, missed = tl.load(v_ptr + row), update - tl.load(last_ptr + row)
    # In tl.sum all warps wait for each other, so none stores v or last below before all have loaded them.
    mean_square = tl.sum(grad * grad, 0) / C
    v = v * tl.exp2(log2_beta2 * missed.to(tl.float32)) + one_minus_beta2 * mean_square
    u = grad * (lr / (tl.sqrt(v) + eps))
    u += tl.where(u * master > 0, decay * master, 0.0)
    tl.store(p_ptrs, (master - u).to(p_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + row, v)
    tl.store(last_ptr + row, update)
    tl.store(mean_square_ptr + i, mean_square)


def update_rows_triton(p, v, last, rows, grad, update: int, beta2: float, *rates: float) -> Tensor:
    """update_rows_reference in one kernel."""
    n, C = grad.shape
    mean_square = torch.empty_like(v[:n])
    if n:
        rates = math.log2(beta2), 1 - beta2, *rates
        block = triton.next_power_of_2(C)
        update_rows_kernel[(n,)](p, v, last, rows, grad, mean_square, update, *rates, C, BLOCK=block, num_warps=4)
    return mean_square


update_rows = switch(update_rows_triton, update_rows_reference)


def sum_rows_reference(received: Tensor, sources: Tensor) -> Tensor:
    """Gradients (n, C) of n rows of the table, summed over the ranks in their order.

    received (m, C): those of rank 0, then of rank 1, ...; sources (ranks, n): which is a rank's for a row, or -1.
    """
    total = widened(received.new_zeros(sources.size(1), received.size(1)))
    for places in sources.long():
        there = places >= 0
        total[there] += received[places[there]]
    return total.to(received.dtype)


@triton.jit(do_not_specialize=["n"])
def sum_rows_kernel(
    received_ptr, sources_ptr, out_ptr, n, RANKS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row."""
    i, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, total = cols < C, tl.zeros((BLOCK,), tl.float32)
    for r in tl.static_range(RANKS):
        place = tl.load(sources_ptr + r * n + i).to(tl.int64)
        total += tl.load(received_ptr + place * C + cols, mask=inside & (place >= 0), other=0.0).to(tl.float32)
    tl.store(out_ptr + i * C + cols, total.to(out_ptr.dtype.element_ty), mask=inside)


def sum_rows_triton(received: Tensor, sources: Tensor) -> Tensor:
    """sum_rows_reference in one kernel."""
    (ranks, n), C = sources.shape, received.size(1)
    out = received.new_empty(n, C)
    if n:
        sum_rows_kernel[(n,)](received, sources, out, n, ranks, C, BLOCK=triton.next_power_of_2(C), num_warps=4)
    return out


sum_rows = switch(sum_rows_triton, sum_rows_reference)


# ---------------------------------------------------------------------------- queries, keys and values
# What lies between projection and attention, in one kernel a direction: norm, rotary embedding (RoPE, arXiv 2104.09864,
# 2021), value embeddings (arXiv 2410.17897, 2024), pairs of heads and the key offset (both from the seed record).

# float32's, as torch.compile's RMSNorm has it. bfloat16's, 2^-7, is far above the first embeddings' mean square, 3e-5.
NORM_EPS = torch.finfo(torch.float32).eps


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Adjacent pairs (a, b) of x (T, H, D) as (a cos + b sin, b cos - a sin); cos, sin (>= T, 1, >= D / 2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (table[: len(x), :, : a.size(-1)].to(x.dtype) for table in (cos, sin))
    return torch.stack((a * cos + b * sin, b * cos - a * sin), -1).flatten(-2)


class Documents(NamedTuple):
    """For each position (T,), int32: where its document begins, and the position after its end."""

    starts: Tensor
    ends: Tensor

    def paired(self) -> "Documents":
        """The same documents where every token has two positions."""
        return Documents(*((2 * t).repeat_interleave(2) for t in self))


def split_heads_reference(
    qkv, added, value_gate, table, rows, order, cos, sin, documents, num_heads: int, paired: bool
):  # fmt: skip
    """q, k, v as attention takes them, from qkv (T, H (2 D_QK + D)): heads of q, of k, of v; cos, sin: see rotate.

    D is twice the tables' width, D_QK at most that. To the values are added `added` (T, H D) and value_gate (T, H)
    times `rows` (T,) of table, whose order is as in Lookup; each may be None. Results are (T, H, .), in paired layers
    (2T, H/2, .): heads 0.. at even, the other half at odd positions. documents: None, or, for the key offset, those of
    these positions: the second half of a key then comes from the position before, except at a document's first.
    """
    T, C = len(qkv), num_heads * 2 * cos.size(-1)
    qk, v = qkv.split((qkv.size(1) - C, C), 1)
    q, k, v = *qk.view(T, 2, num_heads, -1).unbind(1), v.view(T, num_heads, -1)
    q, k = norm(q), norm(k)
    if added is not None:
        v = v + added.view_as(v)
    if value_gate is not None:
        v = v + value_gate.unsqueeze(-1) * Lookup.apply(table, rows, order).view_as(v)
    if paired:
        q, k, v = (t.reshape(2 * T, num_heads // 2, -1) for t in (q, k, v))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if documents is not None:
        rotary, stationary = k.chunk(2, dim=-1)
        position = torch.arange(len(k), device=k.device)
        k = torch.cat((rotary, stationary[torch.maximum(position - 1, documents.starts)]), dim=-1)
    return q, k, v


@triton.jit
def rotate_tile(x, cos, sin):
    """rotate() of x (BLOCK, D) by cos, sin (BLOCK, D / 2)."""
    a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(a * cos + b * sin, b * cos - a * sin), x.shape)


@triton.jit
def head_offsets(
    cos_ptr, sin_ptr, T,
    H: tl.constexpr, D_QK: tl.constexpr, D: tl.constexpr, PAIRED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """For one head of BLOCK_T tokens: tokens, positions, mask, rotation; offsets in qkv and q (or k), in qkv and v.

    Paired or not, a head has the same offsets; what it has at the next position is `H // 2` or `H` heads further on.
    Neighbouring programs take the heads of the same tokens, which read the same rows of cos and sin.
    """
    head, block, d_qk, d = tl.program_id(0) % H, tl.program_id(0) // H, tl.arange(0, D_QK), tl.arange(0, D)
    t = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    position = 2 * t + head // (H // 2) if PAIRED else t
    angles = position[:, None] * (D // 2) + tl.arange(0, D_QK // 2)[None, :]
    row = t[:, None] * H * (2 * D_QK + D)
    projected, v_projected = row + head * D_QK + d_qk[None, :], row + head * D + d[None, :] + 2 * H * D_QK
    out, v_out = (t[:, None] * H + head) * D_QK + d_qk[None, :], (t[:, None] * H + head) * D + d[None, :]
    cos = tl.load(cos_ptr + angles, mask=(t < T)[:, None], other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angles, mask=(t < T)[:, None], other=0.0).to(tl.float32)
    return head, t, position, t < T, cos, sin, projected, out, v_projected, v_out


@triton.jit
def split_heads_kernel(
    qkv_ptr, gate_ptr, table_ptr, rows_ptr, cos_ptr, sin_ptr, starts_ptr, ends_ptr, added_ptr, q_ptr, k_ptr, v_ptr, T,
    eps, H: tl.constexpr, D_QK: tl.constexpr, D: tl.constexpr, PAIRED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One head of BLOCK_T tokens."""
    head, t, position, inside, cos, sin, projected, out, v_projected, v_out = head_offsets(
        cos_ptr, sin_ptr, T, H, D_QK, D, PAIRED, BLOCK_T
    )
    mask = inside[:, None]
    for i in tl.static_range(2):
        out_ptr = q_ptr if i == 0 else k_ptr
        x = tl.load(qkv_ptr + projected + i * H * D_QK, mask=mask, other=0.0).to(tl.float32)
        x = rotate_tile(x * tl.rsqrt(tl.sum(x * x, 1) / D_QK + eps)[:, None], cos, sin).to(out_ptr.dtype.element_ty)
        if starts_ptr is not None and i == 1:  # the second half goes one position on; a document's first keeps it, too
            stationary, stride = (tl.arange(0, D_QK) >= D_QK // 2)[None, :], H // 2 if PAIRED else H
            is_first = position == tl.load(starts_ptr + position, mask=inside, other=0)
            has_next = position + 1 < tl.load(ends_ptr + position, mask=inside, other=0)
            tl.store(out_ptr + out, x, mask=mask & (~stationary | is_first[:, None]))
            tl.store(out_ptr + out + stride * D_QK, x, mask=has_next[:, None] & stationary)
        else:
            tl.store(out_ptr + out, x, mask=mask)
    v = tl.load(qkv_ptr + v_projected, mask=mask, other=0.0).to(tl.float32)
    if added_ptr is not None:
        v += tl.load(added_ptr + v_out, mask=mask, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        row = tl.load(rows_ptr + t, mask=inside, other=0).to(tl.int64)
        gate = tl.load(gate_ptr + t * H + head, mask=inside, other=0.0).to(tl.float32)
        offsets = (row[:, None] * H + head) * D + tl.arange(0, D)[None, :]
        v += gate[:, None] * tl.load(table_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(v_ptr + v_out, v.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def split_heads_backward_kernel(
    qkv_ptr, gate_ptr, table_ptr, rows_ptr, cos_ptr, sin_ptr, starts_ptr, ends_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr,
    grad_qkv_ptr, grad_gate_ptr, T, eps, factor,
    H: tl.constexpr, D_QK: tl.constexpr, D: tl.constexpr, PAIRED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One head of BLOCK_T tokens: qkv's gradient times `factor`, and value_gate's."""
    head, t, position, inside, cos, sin, projected, out, v_projected, v_out = head_offsets(
        cos_ptr, sin_ptr, T, H, D_QK, D, PAIRED, BLOCK_T
    )
    mask = inside[:, None]
    for i in tl.static_range(2):
        grad_ptr = grad_q_ptr if i == 0 else grad_k_ptr
        if starts_ptr is not None and i == 1:  # from where the second half went
            stationary, stride = (tl.arange(0, D_QK) >= D_QK // 2)[None, :], H // 2 if PAIRED else H
            is_first = position == tl.load(starts_ptr + position, mask=inside, other=0)
            has_next = position + 1 < tl.load(ends_ptr + position, mask=inside, other=0)
            grad = tl.load(grad_ptr + out, mask=mask & (~stationary | is_first[:, None]), other=0.0).to(tl.float32)
            of_next = tl.load(grad_ptr + out + stride * D_QK, mask=has_next[:, None] & stationary, other=0.0)
            grad += of_next.to(tl.float32)
        else:
            grad = tl.load(grad_ptr + out, mask=mask, other=0.0).to(tl.float32)
        grad = rotate_tile(grad, cos, -sin)
        x = tl.load(qkv_ptr + projected + i * H * D_QK, mask=mask, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / D_QK + eps)[:, None]
        x *= inverse_rms
        grad_x = inverse_rms * (grad - x * (tl.sum(grad * x, 1) / D_QK)[:, None])
        grad_x = (grad_x * factor).to(grad_qkv_ptr.dtype.element_ty)
        tl.store(grad_qkv_ptr + projected + i * H * D_QK, grad_x, mask=mask)
    grad_v = tl.load(grad_v_ptr + v_out, mask=mask, other=0.0).to(tl.float32)
    grad_qkv_v = (grad_v * factor).to(grad_qkv_ptr.dtype.element_ty)
    tl.store(grad_qkv_ptr + v_projected, grad_qkv_v, mask=mask)
    if gate_ptr is not None:
        row = tl.load(rows_ptr + t, mask=inside, other=0).to(tl.int64)
        offsets = (row[:, None] * H + head) * D + tl.arange(0, D)[None, :]
        embed = tl.load(table_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad_gate = tl.sum(grad_v * embed, 1).to(grad_gate_ptr.dtype.element_ty)
        tl.store(grad_gate_ptr + t * H + head, grad_gate, mask=inside)


class SplitHeads(torch.autograd.Function):
    """A Projection's product, then split_heads_reference in one kernel a direction."""

    @staticmethod
    def forward(ctx, added, value_gate, table, rows, order, cos, sin, documents, num_heads, paired, *projection):
        weight, fp8, fp8_t, ctx.grad_scale, scale, x, x_fp8 = projection
        qkv = x @ weight.T if fp8 is None else fp8_product(x_fp8, fp8.T, FP8_X, scale, x.dtype)
        T, H, D = len(x), num_heads, 2 * cos.size(-1)
        D_QK = (qkv.size(1) // H - D) // 2
        q, k, v = (qkv.new_empty((2 * T, H // 2, d) if paired else (T, H, d)) for d in (D_QK, D_QK, D))
        added, value_gate = (None if t is None else t.contiguous() for t in (added, value_gate))
        inputs = qkv, value_gate, table, rows, cos, sin, *(documents or (None, None))
        ctx.save_for_backward(*((x, weight) if fp8 is None else (x_fp8, fp8_t)), scale, order, *inputs)
        ctx.options = dict(H=H, D_QK=D_QK, D=D, PAIRED=paired, BLOCK_T=16, num_warps=4)
        split_heads_kernel[(H * triton.cdiv(T, 16),)](*inputs, added, q, k, v, T, NORM_EPS, **ctx.options)
        return q, k, v

    @staticmethod
    def backward(ctx, *grads):
        x, weight, scale, order, *inputs = ctx.saved_tensors  # in FP8, the weight is transposed
        grads = [grad.contiguous() for grad in grads]
        qkv, value_gate, table, rows = inputs[:4]
        grad_qkv = torch.empty_like(qkv, dtype=torch.float8_e5m2 if ctx.grad_scale else None)
        grad_gate = None if value_gate is None else torch.empty_like(value_gate)
        split_heads_backward_kernel[(ctx.options["H"] * triton.cdiv(len(qkv), 16),)](
            *inputs, *grads, grad_qkv, grad_gate, len(qkv), NORM_EPS, 1 / (ctx.grad_scale or 1.0), **ctx.options
        )
        grad_v = grads[2].view(len(qkv), -1)
        if value_gate is not None:
            add_rows(table_gradient(table), rows, order, grad_v, value_gate)
        if ctx.grad_scale is None:
            grad_x, grad_weight = grad_qkv @ weight, grad_qkv.T @ x
        else:
            grad_x = fp8_product(grad_qkv, weight.T, ctx.grad_scale, scale, qkv.dtype)
            grad_weight = fp8_weight_gradient(transposed(grad_qkv, True), x, ctx.grad_scale, FP8_X, qkv.dtype)
        # In the order of forward's arguments
        grad_added = grad_v if ctx.needs_input_grad[0] else None
        return grad_added, grad_gate, *(None,) * 8, *Projection(grad_weight, x=grad_x)


def split_heads(qkv: Projection, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """split_heads_reference of a Projection's product; the rest is as there."""
    if qkv.x.is_cuda:
        return SplitHeads.apply(*rest, *qkv)
    return split_heads_reference(F.linear(qkv.x, qkv.weight), *rest)


# ---------------------------------------------------------------------------- sums of kept outputs, each times a gate
# What a gate network's layers are given of earlier rows' outputs: all sums in one kernel, and all gradients in another.
# Sources come back as results: whoever reads one next takes that, so that its gradient is added up here, too, and not
# by autograd in a pass for each reader.


def weighed_sums_reference(gates: Tensor, columns: tuple[tuple[int, ...], ...], *sources: Tensor) -> list[Tensor]:
    """For each row of `columns` a sum of sources (T, C), source s times gates[:, row[s]] unless that is -1; sources."""
    pairs = [zip(row, sources, strict=True) for row in columns]
    return [*(sum(gates[:, k : k + 1] * x for k, x in row if k >= 0) for row in pairs), *sources]


@triton.jit
def weighed_sums_kernel(
    gates_ptr, inputs, outs, added, partners, products_ptr, C,
    COLUMNS: tl.constexpr, GATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: outs[i] is the sum of added[i], if any, and inputs[j] times the gate COLUMNS[i][j], unless that is -1.

    In backward inputs are the sums' gradients, and a gate's is the product of one with the source partners[i].
    """
    t, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    places, inside = t * C + cols, cols < C
    for i in tl.static_range(len(outs)):
        total = tl.zeros((BLOCK,), tl.float32)
        if added[i] is not None:
            total += tl.load(added[i] + places, mask=inside, other=0.0).to(tl.float32)
        if products_ptr is not None:
            partner = tl.load(partners[i] + places, mask=inside, other=0.0).to(tl.float32)
        for j in tl.static_range(len(inputs)):
            if COLUMNS[i][j] >= 0:
                gate, x = t * GATES + COLUMNS[i][j], tl.load(inputs[j] + places, mask=inside, other=0.0).to(tl.float32)
                total += tl.load(gates_ptr + gate).to(tl.float32) * x
                if products_ptr is not None:
                    tl.store(products_ptr + gate, tl.sum(x * partner, 0).to(products_ptr.dtype.element_ty))
        tl.store(outs[i] + places, total.to(outs[i].dtype.element_ty), mask=inside)


class WeighedSums(torch.autograd.Function):
    """weighed_sums_reference in one kernel a direction."""

    @staticmethod
    def forward(ctx, gates, columns, *sources):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gates, *sources)
        (T, C), none = sources[0].shape, (None,) * len(columns)
        ctx.columns, ctx.options = columns, dict(GATES=gates.size(1), BLOCK=triton.next_power_of_2(C))
        sums = tuple(torch.empty_like(sources[0]) for _ in columns)
        weighed_sums_kernel[(T,)](gates, sources, sums, none, none, None, C, columns, num_warps=4, **ctx.options)
        return *sums, *sources

    @staticmethod
    def backward(ctx, *grads):
        gates, *sources = ctx.saved_tensors
        (T, C), n = sources[0].shape, len(ctx.columns)
        grads = tuple(grad if grad is None else grad.contiguous() for grad in grads)
        grad_gates, grad_sources = torch.empty_like(gates), tuple(map(torch.empty_like, sources))
        tensors = gates, grads[:n], grad_sources, grads[n:], tuple(sources), grad_gates
        # One warp, which waits for no other when it sums up a product
        weighed_sums_kernel[(T,)](*tensors, C, tuple(zip(*ctx.columns, strict=True)), num_warps=1, **ctx.options)
        return grad_gates, None, *grad_sources


weighed_sums = switch(WeighedSums.apply, weighed_sums_reference)


# ---------------------------------------------------------------------------- attention
# FlashAttention-2 (arXiv 2307.08691, 2023) with documents, windows, XSA; its backward pass in two kernels, no atomics.


def attend_reference(q, k, v, documents: Documents, window: int, scale: float, xsa: Tensor | None = None) -> Tensor:
    """attend() over all pairs with a mask, for CPUs."""
    position = torch.arange(len(q), device=q.device)
    first = torch.maximum(documents.starts, position - window)
    mask = (position >= first[:, None]) & (position <= position[:, None])
    heads_first = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    y = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale).squeeze(0).transpose(0, 1)
    if xsa is None:
        return y
    # XSA (arXiv 2603.09078, 2026): y (N, H, D) less tanh(xsa), (N, H), times its part along the own values v
    share = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-8)
    return y - torch.tanh(xsa).unsqueeze(-1) * share * v


# The kernels see v, y as (N, H D) and q, k as (N, H D_QK) matrices and load tiles, some positions of one head, through
# TMA, which reads zeros beyond the end. The first key that a query sees, max(start of its document, itself - window),
# grows with the query, and so does the last query that sees a key. So a block of queries needs one range of keys (and a
# block of keys one of queries) whatever documents it straddles, and masks only at the ends of that range. N, H and
# window are not specialized, so that other lengths and windows compile nothing. No running maximum: scores of normed
# queries and keys stay within D_QK times the scale, 17 in the speedrun, whose exponential float32 and bfloat16 hold.


@triton.jit
def key_range(starts_ptr, row, N, window, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Queries and the first key each sees. Some see keys of [begin, end), all see all of [full_begin, full_end)."""
    rows, last = row + tl.arange(0, BLOCK_Q), min(row + BLOCK_Q, N) - 1
    begin = max(tl.load(starts_ptr + row), row - window) // BLOCK_K * BLOCK_K
    end = last + 1
    tl.assume(begin < end)  # if a loop could be skipped, ptxas would make products wait for each other
    full_begin = tl.cdiv(max(tl.load(starts_ptr + last), last - window), BLOCK_K) * BLOCK_K
    full_end = (row + 1) // BLOCK_K * BLOCK_K
    first = tl.maximum(tl.load(starts_ptr + rows, mask=rows < N, other=0), rows - window)
    return rows, first, begin, full_begin, full_end, end


@triton.jit
def query_range(ends_ptr, row, N, window, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Keys and the last query that sees each. Queries of [begin, end) see some, of [full_begin, full_end) all."""
    rows, last = row + tl.arange(0, BLOCK_K), min(row + BLOCK_K, N) - 1
    full_begin = tl.cdiv(last, BLOCK_Q) * BLOCK_Q
    full_end = min(tl.load(ends_ptr + row), row + window + 1) // BLOCK_Q * BLOCK_Q
    begin, end = row // BLOCK_Q * BLOCK_Q, min(tl.load(ends_ptr + last), last + window + 1)
    tl.assume(begin < end)
    last_query = tl.minimum(tl.load(ends_ptr + rows, mask=rows < N, other=0) - 1, rows + window)
    return rows, last_query, begin, full_begin, full_end, end


@triton.jit
def own_values(own_desc, xsa_ptr, row, head, N, H, D: tl.constexpr, BLOCK_Q: tl.constexpr):
    """For XSA of BLOCK_Q queries: their own values v (BLOCK_Q, D), v.v and tanh(gate)."""
    rows, v = row + tl.arange(0, BLOCK_Q), own_desc.load([row, head * D]).to(tl.float32)
    gate = tl.load(xsa_ptr + rows * H + head, mask=rows < N, other=0.0).to(tl.float32)
    return v, tl.sum(v * v, 1), 2 * tl.sigmoid(2 * gate) - 1


@triton.jit(do_not_specialize=["N", "H", "window"])
def attention_kernel(
    q_desc, own_desc, y_desc, k_desc, v_desc, starts_ptr, xsa_ptr, lse_ptr, share_ptr, N, H, window, scale,
    D_QK: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of one head: y, the logsumexp of scores, in base 2, and, for XSA, share = y.v / v.v."""
    row, head, scale_2 = tl.program_id(0) * BLOCK_Q, tl.program_id(1), scale * LOG2_E
    rows, first, begin, full_begin, full_end, end = key_range(starts_ptr, row, N, window, BLOCK_Q, BLOCK_K)
    q = q_desc.load([row, head * D_QK])
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, D), tl.float32)
    for col in range(begin, end, BLOCK_K):
        k, v = k_desc.load([col, head * D_QK]), v_desc.load([col, head * D])
        p = tl.exp2(tl.dot(q, k.T) * scale_2)
        if (col < full_begin) | (col >= full_end):
            cols = (col + tl.arange(0, BLOCK_K))[None, :]
            p = tl.where((cols >= first[:, None]) & (cols <= rows[:, None]), p, 0.0)
        row_sum += tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc)
    y, by_head = acc * (1 / row_sum)[:, None], head.to(tl.int64) * N + rows
    if xsa_ptr is not None:
        own, square, t = own_values(own_desc, xsa_ptr, row, head, N, H, D, BLOCK_Q)
        share = tl.sum(y * own, 1) / tl.maximum(square, 1e-8)
        tl.store(share_ptr + by_head, share, mask=rows < N)
        y -= (t * share)[:, None] * own
    y_desc.store([row, head * D], y.to(y_desc.dtype))
    tl.store(lse_ptr + by_head, tl.log2(row_sum), mask=rows < N)


# With p_ij the weight of value j in y_i, dy the gradient of y, and delta_i = dy_i . y_i, the gradients are
#     dv_j = sum_i p_ij dy_i,    ds_ij = p_ij (dy_i . v_j - delta_i),    dq_i = scale sum_j ds_ij k_j,    dk_j likewise.
# XSA's result is z = y - t s v, where t = tanh(gate), s = y.v / v.v, v the query's own value. With r = t dz.v / v.v,
#     dy = dz - r v,    dt = -s dz.v,    dv += -t s dy - r z + 2 (1 - t) r s v,    delta = dy.y = dz.z.
# The kernel of q stores the three factors in dv; that of k and v, which has registers to spare after its loop, applies
# them. Where v.v is below the least divisor, 1e-8, the last factor is -2 t r s.


@triton.jit(do_not_specialize=["N", "H", "window"])
def attention_backward_q_kernel(
    q_desc, own_desc, grad_q_desc, k_desc, v_desc, y_ptr, grad_y_ptr, starts_ptr, xsa_ptr, lse_ptr, share_ptr,
    delta_ptr, before_xsa_ptr, grad_xsa_ptr, factors_ptr, N, H, window, scale,
    D_QK: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of a head: gradients of q and gates; for the next kernel delta, dy (before_xsa) and factors."""
    row, head, scale_2 = tl.program_id(0) * BLOCK_Q, tl.program_id(1), scale * LOG2_E
    rows, first, begin, full_begin, full_end, end = key_range(starts_ptr, row, N, window, BLOCK_Q, BLOCK_K)
    by_head, mask = head.to(tl.int64) * N + rows, (rows < N)[:, None]
    places = (rows.to(tl.int64) * H + head)[:, None] * D + tl.arange(0, D)[None, :]
    # Not through TMA: one such load would wait for the other
    y, grad_y = tl.load(y_ptr + places, mask=mask, other=0.0), tl.load(grad_y_ptr + places, mask=mask, other=0.0)
    q = q_desc.load([row, head * D_QK])
    delta = tl.sum(grad_y.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(delta_ptr + by_head, delta, mask=rows < N)
    if xsa_ptr is not None:
        own, square, t = own_values(own_desc, xsa_ptr, row, head, N, H, D, BLOCK_Q)
        share, along = tl.load(share_ptr + by_head, mask=rows < N, other=0.0), tl.sum(grad_y.to(tl.float32) * own, 1)
        r = t * along / tl.maximum(square, 1e-8)
        tl.store(before_xsa_ptr + places, grad_y.to(tl.float32) - r[:, None] * own, mask=mask)
        tl.debug_barrier()  # dy is read back into shared memory, for the product: kept, it would take 32 registers
        grad_y = tl.load(before_xsa_ptr + places, mask=mask, other=0.0)
        tl.store(grad_xsa_ptr + rows * H + head, (t * t - 1) * share * along, mask=rows < N)
        tl.store(factors_ptr + by_head, -t * share, mask=rows < N)
        tl.store(factors_ptr + H * N + by_head, -r, mask=rows < N)
        tl.store(factors_ptr + 2 * H * N + by_head, 2 * (tl.where(square < 1e-8, 0, 1) - t) * r * share, mask=rows < N)
    lse = tl.load(lse_ptr + by_head, mask=rows < N, other=0.0)
    acc = tl.zeros((BLOCK_Q, D_QK), tl.float32)
    for col in range(begin, end, BLOCK_K):
        k, v = k_desc.load([col, head * D_QK]), v_desc.load([col, head * D])
        s = tl.dot(q, k.T)
        grad_p = tl.dot(grad_y, v.T)
        p = tl.exp2(s * scale_2 - lse[:, None])
        if (col < full_begin) | (col >= full_end):
            cols = (col + tl.arange(0, BLOCK_K))[None, :]
            p = tl.where((cols >= first[:, None]) & (cols <= rows[:, None]), p, 0.0)
        acc = tl.dot((p * (grad_p - delta[:, None])).to(k.dtype), k, acc)
    grad_q_desc.store([row, head * D_QK], (acc * scale).to(grad_q_desc.dtype))


@triton.jit(do_not_specialize=["N", "H", "window"])
def attention_backward_kv_kernel(
    q_desc, grad_y_desc, k_desc, v_desc, own_y_desc, own_grad_y_desc, grad_k_desc, grad_v_desc, lse_desc, delta_desc,
    ends_ptr, factors_ptr, N, H, window, scale,
    D_QK: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_K keys of one head: the gradients of k and v. Scores are (keys, queries), as both products read them."""
    row, head, scale_2 = tl.program_id(0) * BLOCK_K, tl.program_id(1), scale * LOG2_E
    rows, last_query, begin, full_begin, full_end, end = query_range(ends_ptr, row, N, window, BLOCK_Q, BLOCK_K)
    k, v = k_desc.load([row, head * D_QK]), v_desc.load([row, head * D])
    grad_k = tl.zeros((BLOCK_K, D_QK), tl.float32)
    grad_v = tl.zeros((BLOCK_K, D), tl.float32)
    for col in range(begin, end, BLOCK_Q):
        q, grad_y = q_desc.load([col, head * D_QK]), grad_y_desc.load([col, head * D])
        lse, delta = lse_desc.load([head * N + col]), delta_desc.load([head * N + col])  # beyond N: the next head's
        s = tl.dot(k, q.T)
        grad_p = tl.dot(v, grad_y.T)  # runs beneath the exponentials
        p = tl.exp2(s * scale_2 - lse[None, :])
        if (col < full_begin) | (col >= full_end):
            cols = (col + tl.arange(0, BLOCK_Q))[None, :]
            p = tl.where((cols >= rows[:, None]) & (cols <= last_query[:, None]), p, 0.0)
        grad_v = tl.dot(p.to(grad_y.dtype), grad_y, grad_v)
        grad_k = tl.dot((p * (grad_p - delta[None, :])).to(q.dtype), q, grad_k)
    grad_k_desc.store([row, head * D_QK], (grad_k * scale).to(grad_k_desc.dtype))
    if factors_ptr is not None:  # XSA
        factors_ptr += head.to(tl.int64) * N + rows
        grad_v += tl.load(factors_ptr, mask=rows < N, other=0.0)[:, None] * own_grad_y_desc.load([row, head * D])
        grad_v += tl.load(factors_ptr + H * N, mask=rows < N, other=0.0)[:, None] * own_y_desc.load([row, head * D])
        grad_v += tl.load(factors_ptr + 2 * H * N, mask=rows < N, other=0.0)[:, None] * v
    grad_v_desc.store([row, head * D], grad_v.to(grad_v_desc.dtype))


# Tiles, warps, pipeline stages and registers: the best of some 15 each on H200 for the speedrun's widths and windows.
# With 128 registers four programs share a multiprocessor, with 168 three: one's exponentials overlap others' products.
ATTENTION_TILES = dict(BLOCK_Q=64, BLOCK_K=32, num_warps=4, num_stages=3, maxnreg=128)
ATTENTION_BACKWARD_Q_TILES = dict(BLOCK_Q=64, BLOCK_K=64, num_warps=4, num_stages=2, maxnreg=168)
ATTENTION_BACKWARD_KV_TILES = dict(BLOCK_Q=64, BLOCK_K=64, num_warps=4)  # and stages as there is room for


def attention_tiles(block: int, *tensors: Tensor) -> list:
    """Descriptors of tiles of `block` positions of one head, of tensors (N, H, D), contiguous, or (N, D)."""
    return [TensorDescriptor.from_tensor(t.flatten(1), [block, t.size(-1)]) for t in tensors]


class CausalSelfAttention(torch.autograd.Function):
    """attend() in kernels. Widths of heads are powers of two from 16 to 128."""

    @staticmethod
    def forward(ctx, q, k, v, starts, ends, window, scale, xsa=None):
        (N, H, D_QK), tiles = q.shape, ATTENTION_TILES
        y, lse = v.new_empty(v.shape), q.new_empty(H, N, dtype=torch.float32)
        xsa, share = (None, None) if xsa is None else (xsa.contiguous(), torch.empty_like(lse))
        ctx.sizes, ctx.options = (N, H, window, scale), dict(D_QK=D_QK, D=v.size(2))
        descs = *attention_tiles(tiles["BLOCK_Q"], q, v, y), *attention_tiles(tiles["BLOCK_K"], k, v)
        attention_kernel[(triton.cdiv(N, tiles["BLOCK_Q"]), H)](
            *descs, starts, xsa, lse, share, *ctx.sizes, **ctx.options, **tiles
        )
        ctx.save_for_backward(q, k, v, y, lse, starts, ends, xsa, share)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        q, k, v, y, lse, starts, ends, xsa, share = ctx.saved_tensors
        (N, H, D_QK), grad_y, tiles = q.shape, grad_y.contiguous(), ATTENTION_BACKWARD_Q_TILES
        grad_q, grad_k, grad_v = map(torch.empty_like, (q, k, v))
        delta, before_xsa, grad_xsa, factors = torch.empty_like(lse), grad_y, None, None
        if xsa is not None:
            before_xsa, grad_xsa, factors = torch.empty_like(v), torch.empty_like(xsa), lse.new_empty(3, H, N)
        descs = *attention_tiles(tiles["BLOCK_Q"], q, v, grad_q), *attention_tiles(tiles["BLOCK_K"], k, v)
        outs = delta, before_xsa, grad_xsa, factors
        attention_backward_q_kernel[(triton.cdiv(N, tiles["BLOCK_Q"]), H)](
            *descs, y, grad_y, starts, xsa, lse, share, *outs, *ctx.sizes, **ctx.options, **tiles
        )
        tiles = ATTENTION_BACKWARD_KV_TILES | dict(num_stages=3 if v.size(2) > D_QK else 2)
        descs = attention_tiles(tiles["BLOCK_Q"], q, before_xsa)
        descs += attention_tiles(tiles["BLOCK_K"], k, v, y, before_xsa, grad_k, grad_v)
        descs += [TensorDescriptor.from_tensor(t.view(-1), [tiles["BLOCK_Q"]]) for t in (lse, delta)]
        attention_backward_kv_kernel[(triton.cdiv(N, tiles["BLOCK_K"]), H)](
            *descs, ends, factors, *ctx.sizes, **ctx.options, **tiles
        )
        return grad_q, grad_k, grad_v, *(None,) * 4, grad_xsa


def attend(q, k, v, documents: Documents, window: int, scale: float, xsa: Tensor | None = None) -> Tensor:
    """Causal attention inside each document, to `window` positions before each: q, k (N, H, D_QK), v -> (N, H, D)."""
    xsa = None if xsa is None else xsa.reshape(q.shape[:2])  # XSA's gates, (T, H) also where N is 2T
    if q.is_cuda and q.size(2) >= 16:  # the least a tensor core multiplies
        return CausalSelfAttention.apply(q, k, v, *documents, window, scale, xsa)
    return attend_reference(q, k, v, documents, window, scale, xsa)


# ---------------------------------------------------------------------------- copying what followed in the document
# A position t may copy its next token from its document: it scores the positions s before it. Their next tokens,
# targets[s], compete in one softmax with the model's own distribution p, whose score is the sentinel. So with
#     every_t = log sum_s exp(q_t . k_s),    matching_t likewise over the s whose target is that of t,
# the probability of the target is (exp(sentinel_t) p_t + exp(matching_t)) / (exp(sentinel_t) + exp(every_t)).
# Sources: pointer sentinel mixtures, arXiv 1609.07843 (2016); to copy what followed s: arXiv 1612.04426 (2016).

# Score of a masked pair; real ones stay within some 11 times copy_gain. While a row of the kernel has met masked keys
# only, its sums are worthless; the first real score multiplies them by exp2(MASKED - score) = 0. So a masked score is
# finite, as -inf - -inf is NaN, but not huge, as then its rounding errors alone would overflow exp2.
MASKED_SCORE = -1e5
MASKED = tl.constexpr(MASKED_SCORE)


def copy_scores(q, k, documents: Documents, window: int, rows: Tensor) -> Tensor:
    """Scores (n, T), float32, that positions `rows` (n,) give to all: MASKED_SCORE to those that they do not see."""
    position = torch.arange(len(k), device=k.device)
    first = torch.maximum(documents.starts, position - window)[rows, None]
    seen = (position >= first) & (position < rows[:, None])
    return (widened(q[rows]) @ widened(k).T).masked_fill(~seen, MASKED_SCORE)


def copy_sums_reference(q, k, targets, documents: Documents, window: int) -> Tensor:
    """every and matching as above, (2, T) float32, far below 0 where there is no s; q, k (T, D), targets (T,) int32."""
    scores = copy_scores(q, k, documents, window, torch.arange(len(q), device=q.device))
    matching = scores.masked_fill(targets[:, None] != targets, MASKED_SCORE)
    return torch.stack((scores, matching)).logsumexp(-1)


@triton.jit(do_not_specialize=["N", "window"])
def copy_kernel(
    q_desc, k_desc, starts_ptr, targets_ptr, sums_ptr, N, window, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The sums of BLOCK_Q queries. Where no target matches, the sum of exponentials is taken to be 1e-30."""
    row = tl.program_id(0) * BLOCK_Q
    rows, first, begin, _, _, end = key_range(starts_ptr, row, N, window, BLOCK_Q, BLOCK_K)
    q, target = q_desc.load([row, 0]), tl.load(targets_ptr + rows, mask=rows < N, other=-1)
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum, matching = tl.zeros((BLOCK_Q,), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    for col in range(begin, end, BLOCK_K):
        cols = col + tl.arange(0, BLOCK_K)
        seen = (cols[None, :] >= first[:, None]) & (cols[None, :] < rows[:, None])
        same = seen & (tl.load(targets_ptr + cols, mask=cols < N, other=-2)[None, :] == target[:, None])
        s = tl.where(seen, tl.dot(q, k_desc.load([col, 0]).T) * LOG2_E, MASKED)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p, rescale = tl.exp2(s - new_max[:, None]), tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        matching = matching * rescale + tl.sum(tl.where(same, p, 0.0), 1)
        row_max = new_max
    tl.store(sums_ptr + rows, (row_max + tl.log2(row_sum)) / LOG2_E, mask=rows < N)
    tl.store(sums_ptr + N + rows, (row_max + tl.log2(tl.maximum(matching, 1e-30))) / LOG2_E, mask=rows < N)


@triton.jit(do_not_specialize=["N", "window"])
def copy_backward_kernel(
    own_desc, other_desc, out_desc, starts_ptr, ends_ptr, targets_ptr, sums_ptr, grad_ptr, N, window,
    OF_QUERIES: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK queries, sum_s dscore(t, s) k_s, or of BLOCK keys, sum_t dscore(t, s) q_t."""
    row = tl.program_id(0) * BLOCK
    if OF_QUERIES:
        rows, _, begin, _, _, end = key_range(starts_ptr, row, N, window, BLOCK, BLOCK)
    else:
        rows, _, begin, _, _, end = query_range(ends_ptr, row, N, window, BLOCK, BLOCK)
    own, target = own_desc.load([row, 0]), tl.load(targets_ptr + rows, mask=rows < N, other=-1)[:, None]
    acc = tl.zeros((BLOCK, D), tl.float32)
    for col in range(begin, end, BLOCK):
        other, cols = other_desc.load([col, 0]), col + tl.arange(0, BLOCK)
        same = tl.load(targets_ptr + cols, mask=cols < N, other=-2)[None, :] == target
        t, s = (rows[:, None], cols[None, :]) if OF_QUERIES else (cols[None, :], rows[:, None])
        first = tl.maximum(tl.load(starts_ptr + t, mask=t < N, other=0), t - window)
        every = tl.load(sums_ptr + t, mask=t < N, other=0.0)
        matching = tl.load(sums_ptr + N + t, mask=t < N, other=0.0)
        score = tl.dot(own, other.T)
        grad = tl.load(grad_ptr + t, mask=t < N, other=0.0) * tl.exp2((score - every) * LOG2_E)
        of_same = tl.load(grad_ptr + N + t, mask=t < N, other=0.0) * tl.exp2((score - matching) * LOG2_E)
        grad = tl.where((s >= first) & (s < t), grad + tl.where(same, of_same, 0.0), 0.0)
        acc = tl.dot(grad.to(other.dtype), other, acc)
    out_desc.store([row, 0], acc.to(out_desc.dtype))


# The best of 7 each on H100, for a width of 128
COPY_TILES = dict(BLOCK_Q=64, BLOCK_K=128, num_warps=4, num_stages=2)
COPY_BACKWARD_TILES = dict(BLOCK=64, num_warps=4, num_stages=2)


class CopySums(torch.autograd.Function):
    """copy_sums_reference in kernels. Widths are powers of two from 16 to 128."""

    @staticmethod
    def forward(ctx, q, k, targets, documents, window):
        N, BLOCK_Q, sums = len(q), COPY_TILES["BLOCK_Q"], q.new_empty(2, len(q), dtype=torch.float32)
        descs = *attention_tiles(BLOCK_Q, q), *attention_tiles(COPY_TILES["BLOCK_K"], k)
        copy_kernel[(triton.cdiv(N, BLOCK_Q),)](*descs, documents.starts, targets, sums, N, window, **COPY_TILES)
        ctx.save_for_backward(q, k, *documents, targets, sums)
        ctx.window = window
        return sums

    @staticmethod
    def backward(ctx, grad):
        q, k, *args = ctx.saved_tensors
        (N, D), BLOCK = q.shape, COPY_BACKWARD_TILES["BLOCK"]
        grad_q, grad_k = q.new_empty(q.shape), k.new_empty(k.shape)
        q_desc, k_desc, grad_q_desc, grad_k_desc = attention_tiles(BLOCK, q, k, grad_q, grad_k)
        args += grad.contiguous(), N, ctx.window
        for of_queries, *descs in ((True, q_desc, k_desc, grad_q_desc), (False, k_desc, q_desc, grad_k_desc)):
            copy_backward_kernel[(triton.cdiv(N, BLOCK),)](*descs, *args, of_queries, D, **COPY_BACKWARD_TILES)
        return grad_q, grad_k, None, None, None


copy_sums = switch(CopySums.apply, copy_sums_reference)


# ======================================================================================================================
# Model
# ======================================================================================================================
# GPT.output goes through the rows of LAYERS; each adds to the residual stream x (T, C). An MLP's result is not added at
# once: it waits (`waiting`) for the next function that reads the stream, which joins both in a kernel that runs anyway.
# All but attention, lookups, the products that give queries, keys and values, the scores of copying and the loss is in
# a few compiled functions.


class Yarn:
    """Half-truncated rotary embedding whose frequencies and softmax scale follow the attention window.

    head_dim / 4 frequencies turn the adjacent pairs of a head's first half; the second half is stationary. One table
    serves all layers: paired layers count positions in the interleaved sequence, heads of narrow layers have the first
    half alone. Source: YaRN, arXiv 2309.00071, here applied in training each time the window grows.
    """

    def __init__(self, head_dim: int, positions: int, device: torch.device):
        self.first_frequencies = (1 / 1024) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float32, device=device)
        self.position = torch.arange(positions, dtype=torch.float32, device=device)
        # One entry a pair; in the stationary half cos 1 and sin 0, an angle of 0.
        self.cos = torch.ones(positions, 1, head_dim // 2, dtype=torch.bfloat16, device=device)
        self.sin = torch.zeros_like(self.cos)
        self.reset()

    def reset(self) -> None:
        """Back to the first stage's frequencies and softmax scale."""
        self._set(self.first_frequencies, scale=0.1)

    def grow(self, old_window: int, new_window: int) -> None:
        """Adapts to a long window that grows from `old_window` to `new_window` tokens."""
        # Frequencies of 32 rotations or more in the old window stay; those of 1 or less slow down as the window grows.
        rotations = old_window * self.frequencies / (2 * torch.pi)
        kept = ((rotations - 1) / (32 - 1)).clamp(0, 1)
        ratio = old_window / new_window
        stretched = self.frequencies * (ratio + kept * (1 - ratio))
        self._set(stretched, self.scale * (0.2 * float(np.log(new_window / old_window)) + 1))

    def _set(self, frequencies: Tensor, scale: float) -> None:
        self.frequencies, self.scale = frequencies, scale
        angle = self.position[:, None, None] * frequencies  # (positions, 1, frequencies)
        self.cos[..., : len(frequencies)] = angle.cos().to(self.cos.dtype)
        self.sin[..., : len(frequencies)] = angle.sin().to(self.sin.dtype)


def gate_groups(layers: Sequence[Layer], num_heads: int) -> list[list[float]]:
    """Initial values of a network's gates: those of all sums of kept outputs, then three groups a layer, of heads."""
    sums = [gate for layer in layers for names in (layer.values, layer.adds) for gate in names.values()]
    kinds = ("xsa", XSA_GATE), ("head_gates", HEAD_GATE), ("value_embed", VALUE_GATE)
    return [sums, *(getattr(layer, name) * num_heads * [gate] for layer in layers for name, gate in kinds)]


def bank_matrices(hp: Hyperparameters) -> dict[str, int]:
    """How many matrices each bank has that are used; behind them come those that fill it up."""
    H, narrow = hp.num_heads, [LAYERS[i].narrow for i in ATTENTION_LAYERS]
    of_heads = dict(qk_bank=H * narrow.count(False), narrow_qk_bank=H * narrow.count(True))
    return of_heads | dict(vo_bank=2 * len(narrow), mlp_bank=2 * len(MLP_LAYERS))


class LayerWeights(NamedTuple):
    """A layer's learned scalars (0-d), by their names in SCALARS, and its matrices in the layout of the banks."""

    attn_resid: Tensor
    mlp_out: Tensor
    qkv_lambda: Tensor
    mlp: Projection | None = None  # W_fc, W_proj, (2, F, C); None without an MLP, the others without attention
    qkv: Projection | None = None  # pairs of heads of W_q, then of W_k, (H, 2, D_QK, C); W_v (C, C)
    out: Tensor | None = None  # W_o (C, C)


LAYER_SCALARS = [name for name in LayerWeights._fields if name in SCALARS]


def compiler(enabled: bool) -> Callable:
    """The decorator torch.compile with static shapes; one that changes nothing unless `enabled`."""
    if not enabled:
        return lambda function: function
    # A function is compiled once for each kind of layer in each stage: more often than Dynamo's limit of 8 allows.
    torch._dynamo.config.recompile_limit = 64
    # PyTorch times each graph's guards, for which it clears the CPU's caches: 14 ms a graph for a number in a log.
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
    # A warm start finds graphs by their code, our autograd functions' included.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    # The processes that compile Triton's code take seconds to start, and kernels wait for them.
    importlib.import_module("torch._inductor.async_compile").maybe_warm_pool()
    # Compiling makes millions of objects that live on; Python's default garbage collection takes 5 % of its time.
    gc.set_threshold(100_000, 20, 100)
    return torch.compile(dynamic=False, fullgraph=True)


def sums_of_kept(gates, kept: dict[str, Tensor], layers: list[Layer]) -> list[Tensor | None]:
    """Of each layer what is added to its values, and to its stream: (T, C), or None; gates: the network's of sums.

    What is read is replaced in `kept` by what the next reader is to take: see weighed_sums.
    """
    column = count()
    wanted = [{name: next(column) for name in names} for layer in layers for names in (layer.values, layer.adds)]
    read = [*dict.fromkeys(chain(*wanted))]
    columns = tuple(tuple(of_sum.get(name, -1) for name in read) for of_sum in wanted if of_sum)
    results = weighed_sums(gates, columns, *(kept[name] for name in read)) if read else ()
    kept.update(zip(read, results[len(columns) :], strict=True))
    sums = iter(results)
    return [next(sums) if of_sum else None for of_sum in wanted]


# The functions down to copy_inputs are the compiled regions and their helpers. One compilation serves all layers of a
# kind. Attention stays outside, so that windows change without compiling.


def join(x, waiting: Tensor | None):
    """The stream (T, C): x and the MLP's result that waits, if any. Just a sum: one gradient does for both."""
    return x if waiting is None else x + waiting


def embed_inputs(x, ngrams, inputs, signs, spelling, spellings):
    """LAYERS' "x0" and "ngrams", (T, C) each, from embeddings of tokens (T, C) and of n-grams (orders, T, C).

    A token's embedding is the sum of its own and of its spelling's: of row spelling[token] of `spellings`.
    signs (V, C): an n-gram's row is multiplied by those of its last token, inputs (T,), so that n-grams which share a
    row learn nearly apart. Source: the public speedrun's PR 299, 2026, whose signs are by a hash of the n-gram.
    """
    x = norm(x + F.embedding(spelling[inputs], spellings))
    return x, (widened(ngrams).sum(0) * F.embedding(inputs, signs)).to(x.dtype)


def gate_network(x, waiting, w_in, w_out, bias, sizes: list[int]):
    """The stream (T, C), and gates in groups of these sizes (T, size), as in gate_groups; of size 0 None."""
    x = join(x, waiting)
    hidden = F.gelu(F.linear(x, w_in))
    gates = GATE_SCALE * (F.linear(hidden, w_out[: sum(sizes)]) + bias[: sum(sizes)])
    parts = iter(gates.split([size for size in sizes if size], -1))  # PyTorch 2.11 can't compile a split into nothing
    return x, [next(parts).contiguous() if size else None for size in sizes]


def normed_input(x, waiting, fp8_scale: float | None):
    """What attention reads: the stream (T, C), the stream normed, and that in FP8 in this scale, or None."""
    x = join(x, waiting)
    normed = norm(x)
    return x, normed, None if fp8_scale is None else to_fp8(normed.detach(), fp8_scale)


def normed_output(x, waiting, fp8_scale: float | None):
    """What the head reads: normed_input without the stream, for which nobody has a gradient: it would be zeros."""
    return normed_input(x, waiting, fp8_scale)[1:]


def scaled(scale, matrix):
    """scale (), times a matrix. By rows, so that scale's gradient is summed up by rows first: at once it takes long."""
    return (scale.expand(len(matrix), 1) * matrix).to(matrix.dtype)


def qkv_weight(w: LayerWeights):
    """A layer's W_q, W_k and W_v as one matrix (H (2 D_QK + D), C), and in FP8 its scale, see Projection."""
    qk, v = w.qkv.weight
    weight = scaled(w.qkv_lambda, torch.cat((qk.flatten(0, 2), v)))
    # In FP8 the lambda is part of the scale: the weight is the one that layer_weights has converted.
    return weight, None if w.qkv.fp8 is None else w.qkv_lambda.detach() * FP8_WEIGHT


def layer_outputs(x, waiting, attended, head_gates, added, w: LayerWeights):
    """The rest of a layer: adds attention's result (T, H, D) and `added` (T, C), None for none, and runs the MLP.

    Returns the stream as x (T, C) and the MLP's result, not yet added; None if there is none.
    """
    x = join(x, waiting)
    dtype = x.dtype
    if attended is not None:
        y = attended if head_gates is None else attended * head_gates.unsqueeze(-1)
        # Widened: were all in bf16, the compiler would have cuBLAS add x to the product, and first copy x.
        x = w.attn_resid * widened(x) + F.linear(y.reshape(x.shape), w.out)
    x = (x if added is None else x + added).to(dtype)
    if w.mlp is None:
        return x, None
    w_fc, w_proj = w.mlp.weight
    # With its scalar in W_proj the scalar's gradient is a sum over W_proj, not over all tokens.
    fp8 = w.mlp.fp8, w.mlp.fp8_t, w.mlp.grad_scale, w.mlp_out.detach()
    return x, MLP.apply(norm(x), w_fc, scaled(w.mlp_out, w_proj), *fp8)


def all_targets(targets, left, n: int, prefixes, classes) -> Tensor:
    """n targets of each position, (n, T): next tokens, the nearest first, then with `prefixes` (V,) the first's prefix.

    The token behind a document is still a target, those after it are -1; left (T,): positions of the document to come.
    With `classes` (P,), indices in these; a prefix that is none of them is no target, either.
    """
    ahead = [torch.where(left >= k, targets.roll(-k), -1) for k in range(n - (prefixes is not None))]
    rows = torch.stack(ahead if prefixes is None else [*ahead, prefixes[targets]])
    if classes is None:
        return rows
    places = torch.searchsorted(classes, rows, out_int32=True).clamp(max=len(classes) - 1)
    return torch.where(classes[places] == rows, places, -1)


def copy_inputs(x, qk, sentinel_weight, gain, bias):
    """From GPT.output's x (T, C): queries and keys (T, D) of copy_sums, score of not copying (T,) in float32."""
    x = x.detach()  # the stream does not learn to be searched
    q, k = norm(F.linear(x, qk).unflatten(-1, (2, -1))).unbind(1)
    return (gain * q.size(-1) ** -0.5 * q).to(x.dtype), k, widened(F.linear(x, sentinel_weight).squeeze(-1)) + bias


def head_losses(x, targets, left, copying, head, target_weights, prefixes, classes, fp8_loss_scale, x_fp8=None):
    """Loss of each position (T,), float32, weighted over its targets, from what GPT.output returns (T, C).

    copying: sentinel, every, matching, (T,) each: see above copy_scores; or nothing. head (V, C), or (P, C) with
    `classes` (P,).
    Not compiled: all that takes long are kernels, and each count of targets and classes would be a graph of its own.
    """
    targets = all_targets(targets, left, len(target_weights), prefixes, classes)
    losses = HeadLoss.apply(x, head, targets, fp8_loss_scale, x_fp8)
    if copying:
        sentinel, every, matching = copying
        first, *others = losses.unbind()
        first = torch.logaddexp(sentinel, every) - torch.logaddexp(sentinel - first, matching)
        losses = torch.stack((first, *others))
    return (target_weights[:, None] * losses).sum(0)


class MicroBatch(NamedTuple):
    """Documents end to end; all int32. The orders are for tables' gradients; without gradients they may be empty."""

    inputs: Tensor  # (T,)
    targets: Tensor  # (T,)
    documents: Documents
    slots: Tensor  # rows of GPT.ngrams, (orders, T), of the n-grams that end with each token
    slot_order: Tensor  # sorts the slots
    order: Tensor  # sorts the inputs
    classes: Tensor | None = None  # of the softmax, (P,); None: all

    def tensors(self) -> list[Tensor]:
        """What lies on the device, in the order that of() takes."""
        return [t for t in (*self[:2], *self.documents, *self[3:]) if t is not None]

    @staticmethod
    def of(tensors: list[Tensor]) -> "MicroBatch":
        """The inverse of tensors()."""
        return MicroBatch(*tensors[:2], Documents(*tensors[2:4]), *tensors[4:])


class GPT(nn.Module):
    """The model: parameters by name, as in the table PARAMETERS; losses of a micro-batch, or its logits.

    Initial values: embed normal, std 0.005; attention banks and W_fc uniform with std 0.5 C^-0.5;
    value embeddings normal, std 0.01; copy_qk normal, std C^-0.5; the first matrices of gate networks uniform in
    +-C^-0.5, their biases so that gates start as the tables say; scalars as in the table SCALARS; all else zero.
    """

    def __init__(self, hp: Hyperparameters, device: torch.device, dtype: torch.dtype, compile: bool = False):
        super().__init__()
        C, V, H = hp.model_dim, hp.padded_vocab, hp.num_heads
        self.num_heads, self.fp8_layers, self.copy_window = H, hp.fp8 == "auto", hp.train_max_seq_len

        def parameter(*shape: int, dtype: torch.dtype = dtype) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        # Initial values of the gates, by network
        gates = [[*chain(*gate_groups(layers, H))] for layers in NETWORK_LAYERS]
        most_gates = max(map(len, gates), default=0)
        self.scalars = parameter(len(SCALAR_LRS), dtype=torch.float32)
        self.gate_in = parameter(len(gates), GATE_HIDDEN, C)
        self.gate_out = parameter(len(gates), most_gates, GATE_HIDDEN)
        self.gate_bias = parameter(len(gates), most_gates)
        self.copy_qk = parameter(2 * hp.copy_width, C)
        self.copy_sentinel = parameter(min(hp.copy_width, 1), C)
        # A bank stacks matrices that the optimizer makes orthogonal one by one: of each attention layer W_q, then W_k,
        # each in H / 2 pairs of heads; W_v, W_o; and of each MLP W_fc, W_proj. Unused matrices fill a bank up so that 8
        # ranks share it evenly.
        used = bank_matrices(hp)
        self.qk_bank = parameter(round_up(used["qk_bank"], 8), 2 * hp.head_dim, C)
        self.narrow_qk_bank = parameter(round_up(used["narrow_qk_bank"], 8), hp.head_dim, C)
        self.vo_bank = parameter(round_up(used["vo_bank"], 8), C, C)
        self.mlp_bank = parameter(round_up(used["mlp_bank"], 8) // 2, 2, hp.mlp_ratio * C, C)
        self.embed = parameter(V, C)  # of tokens, and what their logits are made of: embedding and head are one
        # To it is added what tokens with the same letters share, as " the", "The" and "the"; see canonical_tokens.
        self.spellings = parameter(V, C)
        self.value_embeds = parameter(len(VALUE_LAYERS) * V, C)
        # Later the rows of n-grams that a step looks up, see RowCache. No nn.Parameter: neither copied nor saved.
        self.ngram_shape, self.ngrams = (hp.ngram_rows, C), None
        if device.type == "meta":  # only the shapes are asked for
            return
        no_prefixes = torch.full((V,), -1, dtype=torch.int32, device=device)
        self.register_buffer("prefixes", no_prefixes, persistent=False)  # Trainer.run sets it to prefix_table
        canonical = torch.tensor(canonical_tokens(hp))  # a copy: the array is cached
        signs = torch.randint(2, (V, C), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
        self.register_buffer("signs", (2 * signs - 1)[canonical.long()].to(device, dtype), persistent=False)
        self.register_buffer("spelling", canonical.to(device), persistent=False)  # each token's row of spellings
        order = torch.from_numpy(sorting_order(canonical_tokens(hp))).int()
        self.register_buffer("spelling_order", order.to(device), persistent=False)
        with torch.no_grad():
            self.scalars.copy_(torch.tensor([value for count, value, _ in SCALARS.values() for _ in range(count)]))
            bound = 3**0.5 * 0.5 * C**-0.5
            for matrices in (self.qk_bank, self.narrow_qk_bank, self.vo_bank, self.mlp_bank[:, 0]):
                matrices.uniform_(-bound, bound)
            self.gate_in.uniform_(-(C**-0.5), C**-0.5)
            self.copy_qk.normal_(std=C**-0.5)
            for bias, values in zip(self.gate_bias, gates, strict=True):
                bias[: len(values)] = torch.tensor(values) / GATE_SCALE
            self.value_embeds.normal_(std=0.01)
            self.embed.normal_(std=0.005)
        longest = max(hp.val_batch_size, *(stage.tokens for stage in hp.stages)) // MICRO_BATCHES
        self.yarn = Yarn(hp.head_dim, 2 * max(longest, hp.micro_batch_tokens), device)  # 2: pairs of heads interleaved
        compiled, regions = compiler(compile), (embed_inputs, gate_network, normed_input, qkv_weight, layer_outputs)
        for function in (*regions, normed_output, copy_inputs, fp8_weights):
            setattr(self, function.__name__, compiled(function))  # self.embed_inputs, self.gate_network, ...

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name; for the n-grams, whose table the optimizer holds, a meta tensor of its shape."""
        return dict(self.named_parameters(), ngrams=self.embed.new_empty(self.ngram_shape, device="meta"))

    def pairs_of_heads(self) -> list[Tensor]:
        """Of each attention layer H / 2 pairs of heads of W_q, then of W_k, (H, 2, D_QK, C)."""
        banks = self.qk_bank, self.narrow_qk_bank
        pairs = [iter(bank.unflatten(1, (2, -1)).split(self.num_heads)) for bank in banks]
        return [next(pairs[LAYERS[i].narrow]) for i in ATTENTION_LAYERS]

    @torch.no_grad()
    def qkv_fp8_weights(self) -> list[tuple[Tensor, Tensor]]:
        """fp8_weights of each attention layer's W_q, W_k and W_v, stacked; one call converts all of a width."""
        C, layers = self.qk_bank.size(-1), [LAYERS[i] for i in ATTENTION_LAYERS]
        qkvs = [*zip(layers, self.pairs_of_heads(), self.vo_bank[::2], strict=False)]
        by_width = {}  # what the layers of a width take in turn
        for narrow in {layer.narrow for layer in layers}:
            # W_v in the form of W_q and W_k, so that one copy joins all
            qkv = [(qk, v.view(-1, *qk.shape[1:])) for layer, qk, v in qkvs if layer.narrow == narrow]
            together = torch.cat([*chain(*qkv)]).view(len(qkv), -1, C)
            by_width[narrow] = zip(*self.fp8_weights(together), strict=True)
        return [next(by_width[layer.narrow]) for layer in layers]

    def named_scalars(self) -> dict[str, list[Tensor]]:
        """The learned scalars, as in the table SCALARS."""
        values = iter(self.scalars.unbind())
        return {name: [next(values) for _ in range(count)] for name, (count, _, _) in SCALARS.items()}

    def layer_weights(self, scalars: dict[str, list[Tensor]], fp8_loss_scale: float | None) -> list[LayerWeights]:
        """Each layer's weights; fp8_loss_scale as in forward."""
        mlps_fp8, qkvs_fp8, grad_scale = repeat((None, None)), repeat((None, None)), None
        if self.fp8_layers and fp8_loss_scale is not None:
            mlps_fp8 = zip(*self.fp8_weights(self.mlp_bank.detach()), strict=True)
            qkvs_fp8 = iter(self.qkv_fp8_weights())
            grad_scale = FP8_GRAD * fp8_loss_scale
        # By split and unbind, whose backward joins gradients in one pass; indexing would write a bank of zeros a layer.
        vo = self.vo_bank.unbind()
        mlps, outs = iter(self.mlp_bank.unbind()), iter(vo[1::2])
        qkvs = zip(self.pairs_of_heads(), vo[::2], strict=False)
        weights = []
        for i, layer in enumerate(LAYERS):
            w = LayerWeights(*(scalars[name][i] for name in LAYER_SCALARS))
            if layer.mlp:
                w = w._replace(mlp=Projection(next(mlps), *next(mlps_fp8), grad_scale))
            if layer.window:
                w = w._replace(qkv=Projection(next(qkvs), *next(qkvs_fp8), grad_scale), out=next(outs))
            weights.append(w)
        return weights

    def forward(
        self, batch: MicroBatch, windows: dict[str, int], target_weights: Tensor, fp8_loss_scale: float | None = None,
        head_chunk: int | None = None, prefix: bool = True,
    ) -> Tensor:  # fmt: skip
        """Loss of each position, (T,) float32, weighted over its targets.

        windows: tokens, by the names in LAYERS. target_weights: of the next tokens, the nearest first, then, with
        `prefix`, of the first one's prefix. fp8_loss_scale: None without FP8, else what the losses are multiplied by
        before backward. head_chunk: positions whose logits exist at once, if there is one next token.
        """
        scalars = self.named_scalars()
        x, x_fp8 = self.output(batch, windows, scalars, fp8_loss_scale)
        left = batch.documents.ends - 1 - torch.arange(len(x), device=x.device)  # how many of its document follow
        copying = []
        if len(self.copy_qk):
            q, k, sentinel = self.copying(x, scalars)
            copying = sentinel, *copy_sums(q, k, batch.targets, batch.documents, self.copy_window)
        every_row = torch.arange(len(self.embed), dtype=torch.int32, device=x.device)
        classes = every_row if batch.classes is None else batch.classes
        # Classes ascend: the order that sorts them is 0, 1, 2, ...
        head = Lookup.apply(self.embed, classes, every_row[: len(classes)]) + self.shared_embeddings(classes)
        args = head, target_weights, self.prefixes if prefix else None, batch.classes, fp8_loss_scale
        if head_chunk is None:
            return head_losses(x, batch.targets, left, copying, *args, x_fp8)
        chunks = zip(*(tensor.split(head_chunk) for tensor in (x, batch.targets, left, *copying)), strict=True)
        return torch.cat([head_losses(x, targets, left, copied, *args) for x, targets, left, *copied in chunks])

    def shared_embeddings(self, tokens: Tensor | slice = slice(None)) -> Tensor:
        """What tokens share with others of their spelling, (tokens, C), detached: see add_spellings_gradient."""
        return F.embedding(self.spelling[tokens], self.spellings.detach())

    def add_spellings_gradient(self) -> None:
        """Adds to each spelling's gradient its tokens' rows of embed.grad, once complete and before it is reduced."""
        add_rows(table_gradient(self.spellings), self.spelling, self.spelling_order, table_gradient(self.embed))

    def copying(self, x: Tensor, scalars: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """copy_inputs of output's x (T, C), with the model's parameters."""
        return self.copy_inputs(x, self.copy_qk, self.copy_sentinel, *scalars["copy_gain"], *scalars["copy_bias"])

    def output(
        self, batch: MicroBatch, windows: dict[str, int], scalars: dict[str, list[Tensor]], fp8_loss_scale: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream (T, C) behind the last row, normed; that in FP8 for the head, or None. Arguments as in forward."""
        weights = self.layer_weights(scalars, fp8_loss_scale)
        # value_embeds has one table of V rows after the other: these are 0, V, 2 V, ...
        first_rows = torch.arange(0, len(self.value_embeds), len(self.embed), device=batch.inputs.device)
        value_rows = iter(batch.inputs + first_rows.int()[:, None])
        ngrams = Lookup.apply(self.ngrams, batch.slots.flatten(), batch.slot_order).unflatten(0, batch.slots.shape)
        x0 = Lookup.apply(self.embed, batch.inputs, batch.order)
        x0, ngrams = self.embed_inputs(x0, ngrams, batch.inputs, self.signs, self.spelling, self.spellings.detach())
        documents = {False: batch.documents, True: batch.documents.paired()}
        kept, normed, gates, sums = {"x0": x0, "ngrams": ngrams}, {}, repeat(None), repeat(None)
        networks = zip(self.gate_in, self.gate_out, self.gate_bias, NETWORK_LAYERS, strict=True)
        x, waiting, keep = x0, None, None  # the stream, what join has yet to add to it, and its name in `kept`
        for layer, w in zip(LAYERS, weights, strict=True):
            fp8_scale = None if w.qkv is None or w.qkv.fp8 is None else FP8_X
            # What reads the stream joins it: in one pass, and backward adds up both gradients in one.
            if layer.gates:
                *network, layers = next(networks)
                sizes = [*map(len, gate_groups(layers, self.num_heads))]
                x, (of_sums, *of_heads) = self.gate_network(x, waiting, *network, sizes)
                waiting = None
            if layer.window and layer.reads in (None, keep):  # what is to be kept is the stream
                x, *normed[layer.reads] = self.normed_input(x, waiting, fp8_scale)
                waiting = None
            if keep:
                kept[keep] = x = join(x, waiting)
                waiting = None
            if layer.gates:
                gates, sums = iter(of_heads), iter(sums_of_kept(of_sums, kept, layers))
            xsa, head_gates, value_gate, added_values, added = *islice(gates, 3), *islice(sums, 2)
            y, keep = None, layer.keep
            if layer.window:
                if layer.reads not in normed:
                    _, *normed[layer.reads] = self.normed_input(kept[layer.reads], None, fp8_scale)
                inputs = normed[layer.reads]
                weight, scale = self.qkv_weight(w)
                projection = w.qkv._replace(weight=weight, scale=scale, x=inputs[0], x_fp8=inputs[1])
                embed_rows = next(value_rows) if layer.value_embed else None
                q, k, v = split_heads(
                    projection, added_values, value_gate, self.value_embeds, embed_rows, batch.order, self.yarn.cos,
                    self.yarn.sin, documents[layer.paired] if layer.key_offset else None, self.num_heads, layer.paired,
                )  # fmt: skip
                scale = self.yarn.scale * (NARROW_SCALE if layer.narrow else 1)
                y = attend(q, k, v, documents[layer.paired], windows[layer.window], scale, xsa)
                y = y.reshape(len(x), self.num_heads, -1)  # paired or not, one graph
            if layer.window or layer.mlp:
                x, waiting = self.layer_outputs(x, waiting, y, head_gates, added, w)
            else:  # a row that just adds
                x, waiting = join(x, waiting), added
        return self.normed_output(x, waiting, None if fp8_loss_scale is None else FP8_HEAD_X)

    def logits(self, batch: MicroBatch, windows: dict[str, int], positions: slice | int = slice(None)) -> Tensor:
        """Of these positions only, (positions, V) float32, softcapped as in the loss; beyond vocab_size meaningless.

        With copying, log probabilities: the model's own mixed with the tokens that it copies, see above copy_scores.
        """
        scalars = self.named_scalars()
        x, _ = self.output(batch, windows, scalars, None)
        rows = torch.arange(len(x), device=x.device)[positions]
        z = softcapped(x[rows] @ (self.embed + self.shared_embeddings()).T)
        if not len(self.copy_qk):
            return z
        q, k, sentinel = self.copying(x, scalars)
        scores = copy_scores(q, k, batch.documents, self.copy_window, rows.reshape(-1)).view(*rows.shape, -1)
        sentinel, every = sentinel[rows], scores.logsumexp(-1)
        total = torch.logaddexp(sentinel, every)[..., None]
        p = z.softmax(-1) * (sentinel[..., None] - total).exp()
        copied = (scores - total).exp()
        return p.scatter_add_(-1, batch.targets.long().expand_as(copied), copied).log()


# ======================================================================================================================
# Optimizer
# ======================================================================================================================
# Matrices follow NorMuon: momentum, made orthogonal by Polar Express, evened out and applied. All else follows Adam,
# the n-grams' table in a form that touches only the rows which were looked up. A Slot joins a parameter with one class
# for the algorithm (Adam, NorMuon, RowAdam) and one for the communication (Alone to ShardedRowCache); Optimizer.step
# is the order of work, which hides communication behind updates, as the public speedrun's record of 2026-01-30 does.

# Polar Express (arXiv 2505.16932): coefficients of four odd polynomials that drive singular values towards 1, made by
# that paper's method (from 0.003 on, cushion 0.02, safety 1.02): what is at least 0.0031 ends in 0.79 to 1.21.
POLAR_EXPRESS = (
    (8.089257077256764, -22.29778961176275, 15.747758643528782),
    (3.9404580091358694, -2.7839205238875935, 0.5039305903778444),
    (3.4500246431021866, -2.4844234308824102, 0.477172045301001),
    (2.506069553283399, -1.8478249362118586, 0.4383240658418055),
)


def polar_express(g: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each G (N, rows, columns), approximately, in G's type."""
    x, tall = g, g.size(-2) > g.size(-1)
    norms = torch.linalg.vector_norm(g, dim=(-2, -1), dtype=torch.promote_types(g.dtype, torch.float32))
    scale = 1 / (1.02 * norms + 1e-6)  # what X is to be multiplied by: at first the products do that
    square, one = scale.square(), torch.ones_like(scale)
    for coefficients in POLAR_EXPRESS:
        gram = symmetric_product(x.mT if tall else x, square)
        polynomial = symmetric_product(gram, scale, *coefficients)
        # Of a tall X the smaller product is X^T X, and its polynomial multiplies from the right.
        x = x @ polynomial if tall else polynomial @ x
        scale = square = one
    return x


def join_bits(p: Tensor, low_bits: Tensor) -> Tensor:
    """The float32 master value of a bf16 parameter and the 16 mantissa bits (uint16) that bf16 has no room for."""
    return ((p.view(torch.int16).to(torch.int32) << 16) | low_bits.to(torch.int32)).view(torch.float32)


def split_bits(master: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of join_bits: (bf16, uint16)."""
    bits = master.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), (bits & 0xFFFF).to(torch.uint16)


def normuon_update(p, low_bits, u, second_moment, beta2: float, lr_eff, decay):
    """Variance reduction (NorMuon, arXiv 2510.05491) of u (N, rows, columns), cautious decay and the step, in place.

    Divides rows (or columns) by the root of their running mean squares, second_moment (N, rows, 1) or (N, 1, columns),
    float32, and gives each matrix its Frobenius norm back. lr_eff (N, 1, 1); low_bits: see join_bits, None for float32.
    """
    u = u.to(second_moment.dtype)
    dim = -1 if second_moment.size(-1) == 1 else -2
    mean_square = u.square().mean(dim, keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    old_norm = mean_square.sum((-2, -1), keepdim=True).sqrt()
    new_norm = (mean_square * scale.square()).sum((-2, -1), keepdim=True).sqrt()
    u = u * (scale * (old_norm / new_norm.clamp_min(1e-10)))
    master = p.to(u.dtype) if low_bits is None else join_bits(p, low_bits)
    master = master - lr_eff * (u + torch.where(u * master >= 0, decay * master, 0))
    if low_bits is not None:
        master, low = split_bits(master)
        low_bits.copy_(low)
    p.copy_(master)


class Algorithm:
    """State and step of a parameter's slice, which begins at index `first` of the parameter.

    update takes the schedule's values; momentum is NorMuon's. Its result has a NaN or infinity if the gradient has.
    Compiled functions take numbers that change from step to step as tensors: each new Python number compiles anew.
    """

    states: tuple[str, ...] = ()  # attributes that checkpoints keep: tensors and counts
    row_states: tuple[str, ...] = ()  # those with as many rows as the n-grams' table, in files of their own

    def __init__(self, row: Row, hp: Hyperparameters, slice: Tensor, first: int):
        self.row, self.hp, self.p = row, hp, slice
        n = len(slice) if len(row.lr) > 1 else 1  # multipliers are (1, 1, ...), or (n, 1, ...) where several take turns
        lr = [row.lr[(first + i) % len(row.lr)] for i in range(n)]
        self.multipliers = torch.tensor(lr, device=slice.device).view(n, *[1] * (slice.dim() - 1))
        self.average = torch.zeros_like(slice, dtype=torch.float32) if row.averaged and hp.average_frac else None

    def reset(self) -> None:
        """Back to before the first step; the n-grams' table, too: it starts at zero, and no copy of it need be kept."""
        for name in (*self.states, *self.row_states):
            if isinstance(state := getattr(self, name), Tensor):
                state.zero_()
            elif state is not None:
                setattr(self, name, 0)


class Adam(Algorithm):
    """For parameters of any shape."""

    states = ("m", "v", "updates", "average")

    def __init__(self, row: Row, hp: Hyperparameters, slice: Tensor, first: int):
        super().__init__(row, hp, slice, first)
        self.updates = 0
        # Those of tables in their own type, as their updates take as long as reading and writing takes. With a beta
        # nearer to 1 what an update changes would be lost when bfloat16 is rounded.
        in_own_type = row.name in TABLES and max(row.betas) < 0.98
        self.m, self.v = (torch.zeros_like(slice, dtype=None if in_own_type else torch.float32) for _ in range(2))

    def update(self, grad: Tensor, lr_factor: float, momentum: float) -> Tensor:
        self.updates += 1
        beta1, beta2 = self.row.betas
        correction = (1 - beta2**self.updates) ** 0.5 / (1 - beta1**self.updates)
        numbers = self.hp.adam_lr * lr_factor, correction, beta1, beta2, self.hp.adam_eps, self.hp.adam_wd * self.row.wd
        adam(self.p, grad, self.m, self.v, self.multipliers, *numbers)
        return grad


class NorMuon(Algorithm):
    """For banks of matrices, (N, rows, columns)."""

    states = ("m", "second_moment", "low_bits", "average")

    def __init__(self, row: Row, hp: Hyperparameters, slice: Tensor, first: int, compiled: Callable):
        super().__init__(row, hp, slice, first)
        self.apply = compiled(normuon_update)
        N, rows, columns = slice.shape
        self.m = torch.zeros_like(slice, dtype=torch.float32)
        shape = (N, rows, 1) if rows >= columns else (N, 1, columns)
        self.second_moment = torch.zeros(shape, dtype=torch.float32, device=slice.device)
        self.low_bits = torch.zeros_like(slice, dtype=torch.uint16) if slice.dtype == torch.bfloat16 else None
        # An orthogonal matrix has entries of mean square 1 / max(rows, columns). A tall one takes larger steps, as in
        # Muon: those of the MLPs, both stored (F, C), step by lr times sqrt(F / C).
        self.multipliers *= max(1, rows / columns) ** 0.5
        # One rank leaves out what fills the bank up, at its end; of several the first have none, and take as long.
        self.used = min(N, bank_matrices(hp).get(row.name, N))

    def update(self, grad: Tensor, lr_factor: float, momentum: float) -> Tensor:
        lr = self.hp.muon_lr * lr_factor
        lr_eff, decay = self.multipliers * lr, torch.tensor(lr * self.hp.muon_wd * self.row.wd)
        tensors = grad, self.m, self.p, self.low_bits, self.second_moment, lr_eff
        grad, m, p, low_bits, second_moment, lr_eff = (t if t is None else t[: self.used] for t in tensors)
        u = polar_express(nesterov(grad, m, momentum, p.dtype))
        self.apply(p, low_bits, u, second_moment, self.hp.muon_beta2, lr_eff, decay)
        return self.second_moment


class RowAdam(Algorithm):
    """For the n-grams' table, row by row: see update_rows_reference."""

    states = ("updates",)
    row_states = ("p", "v", "last")

    def __init__(self, row: Row, hp: Hyperparameters, slice: Tensor, first: int):
        super().__init__(row, hp, slice, first)
        self.v = slice.new_zeros(len(slice), dtype=torch.promote_types(slice.dtype, torch.float32))
        self.last, self.updates = slice.new_zeros(len(slice), dtype=torch.int32), 0

    def update(self, grad: tuple[Tensor, Tensor], lr_factor: float, momentum: float) -> Tensor:
        self.updates += 1
        beta2, lr = self.row.betas[1], self.hp.adam_lr * lr_factor * self.row.lr[0]
        corrected = lr * (1 - beta2**self.updates) ** 0.5
        decay = lr * lr * self.hp.adam_wd * self.row.wd
        rates = self.updates, beta2, corrected, decay, self.hp.adam_eps
        mean_squares = update_rows(self.p, self.v, self.last, *grad, *rates)
        return F.pad(mean_squares, (0, 1))  # a zero more: a step may move none of this rank's rows


class Alone:
    """Communication of a parameter when there is one rank: none. Those for several ranks have the same methods."""

    def __init__(self, p: Tensor, world: World):
        self.p, self.world = p, world
        self.slice = self.own(p)  # what this rank updates

    def own(self, full: Tensor) -> Tensor:
        """This rank's slice of a whole tensor."""
        return full

    def full(self, slice: Tensor) -> Tensor:
        """The inverse of own: the whole tensor; every rank calls it with its slice."""
        return slice

    def reduce(self, grad: Tensor) -> None:
        """Starts summing up the gradient over the ranks."""
        self.grad = grad

    def reduced(self) -> Tensor:
        """Waits for the sum; returns it for this rank's slice."""
        grad, self.grad = self.grad, None
        return grad

    def gather(self) -> None:
        """Starts collecting the updated slices of all ranks."""

    def gathered(self) -> None:
        """Waits until they are here."""

    def mark_lookups(self, rank: int, rows: np.ndarray) -> None:
        """Rows of a table that a rank looks up: its gradient there may differ from zero."""

    def clear(self, grad: Tensor, whole: bool = False) -> None:
        """Sets the gradient to zero, and forgets lookups; `whole`: it was not reduced, any row may differ from zero."""
        grad.zero_()


# PyTorch 2.13 renamed these two; 2.11 has the old names only.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Replicated(Alone):
    """Every rank updates the whole of a small parameter from the all-reduced gradient."""

    def reduce(self, grad: Tensor) -> None:
        self.grad, self.work = grad, dist.all_reduce(grad, async_op=True)

    def reduced(self) -> Tensor:
        self.work.wait()
        return super().reduced()


class Sharded(Replicated):
    """Each rank updates an equal share of the first dimension: reduce-scatter, update, all-gather."""

    def own(self, full: Tensor) -> Tensor:
        return full.chunk(self.world.size)[self.world.rank]

    def full(self, slice: Tensor) -> Tensor:
        out = slice.new_empty(len(slice) * self.world.size, *slice.shape[1:])
        all_gather(out.view(torch.uint8), slice.contiguous().view(torch.uint8))  # as bytes: NCCL lacks uint16
        return out

    def reduce(self, grad: Tensor) -> None:
        self.grad = torch.empty_like(self.slice)
        self.work = reduce_scatter(self.grad, grad, async_op=True)

    def gather(self) -> None:
        self.work = all_gather(self.p, self.slice.clone(), async_op=True)

    def gathered(self) -> None:
        self.work.wait()


def add_different_rows(table: Tensor, parts: Iterator[tuple[Tensor, Tensor]]) -> None:
    """table[rows] += values for each (rows, values); in `rows` none comes twice, so that nothing is left to chance.

    Where PyTorch is to be deterministic it would sort the rows all the same, in a dozen kernels.
    """
    if deterministic := torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
    for rows, values in parts:
        table.index_add_(0, rows, values)
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)


class ShardedRows(Sharded):
    """Sharded, for tables by token, one after the other: gradient rows of a rank's own tokens go to the rows' owners.

    Every rank marks the lookups of all ranks, so that senders and receivers know the sizes without asking. Rows not
    marked are not sent.
    """

    def __init__(self, p: Tensor, world: World, vocabulary: int):
        super().__init__(p, world)
        self.first_rows = np.arange(0, len(p), vocabulary)  # of each table
        self.looked_up = np.zeros((world.size, vocabulary), dtype=bool)  # by rank and token, alike in all tables

    def mark_lookups(self, rank: int, rows: np.ndarray) -> None:
        self.looked_up[rank][rows] = True

    def reduce(self, grad: Tensor) -> None:
        rank, size, share = self.world.rank, self.world.size, len(self.slice)
        rows = [(self.first_rows[:, None] + np.flatnonzero(looked_up)).ravel() for looked_up in self.looked_up]
        # by_owner[a][b]: rows that rank a looked up and rank b owns
        by_owner = [np.split(r, np.searchsorted(r, share * np.arange(1, size))) for r in rows]
        by_owner[rank][rank] = by_owner[rank][rank][:0]  # what this rank owns stays
        sent, received = by_owner[rank], [parts[rank] for parts in by_owner]
        indices = rows[rank], np.concatenate(received) - rank * share, np.concatenate(sent)
        self.own_lookups, self.received_rows, sent_rows = to_device(indices, grad.device, np.int64)
        self.grad, values = self.own(grad), grad[sent_rows]
        self.received = values.new_empty(len(self.received_rows), grad.shape[1])
        self.sizes = [*map(len, received)]
        self.work = dist.all_to_all_single(self.received, values, self.sizes, [*map(len, sent)], async_op=True)

    def reduced(self) -> Tensor:
        grad = super().reduced()
        parts = zip(self.received_rows.split(self.sizes), self.received.split(self.sizes), strict=True)
        add_different_rows(grad, parts)  # a rank sends no row twice
        self.received = None
        return grad

    def clear(self, grad: Tensor, whole: bool = False) -> None:
        if whole:
            grad.zero_()
        else:
            grad.index_fill_(0, self.own_lookups, 0)  # setting an index copies the 0 to the GPU, and waits for it
            self.own(grad).zero_()
        self.looked_up[:] = False


class Exchange(NamedTuple):
    """Which rows of the n-grams' table a rank gets from all ranks, and gives them, for a step or validation chunk."""

    rows: Tensor  # int32, ascending: what any rank looks up of this rank's share, counted from the share's first row
    asked: Tensor  # int32, indices into `rows`: what rank 0 looks up of them, then rank 1, ...
    sources: Tensor  # int32, (ranks, rows), where gradients come back: where a rank has a row in `asked`, or -1
    taken: list[int]  # by owner, how many rows this rank looks up; a slot is a row's place among all these, ascending
    given: list[int]  # by rank, how many of `asked` are for it

    def tensors(self) -> list[Tensor]:
        """What lies on the device."""
        return [value for value in self if isinstance(value, Tensor)]


def cache_rows(hp: Hyperparameters, world: World) -> int:
    """How many rows a rank looks up in a step, at most."""
    return min(len(NGRAM_FACTORS) * max(stage.tokens for stage in hp.stages) // world.size, hp.ngram_rows)


class RowCache(Alone):
    """For the n-grams' table: before each step the few rows that it looks up are copied into a small table, p.

    Micro-batches look rows up in this cache, by slot, and their gradients arise there. `slice` is this rank's share of
    the table; of R ranks, rank r owns the r-th of R equal parts. The loader finds the rows of a step: see Exchange.
    With several ranks, a step's `gather` already fills the cache with the rows of the next step, if that is known.
    """

    def __init__(self, p: Tensor, world: World, rows: int):
        self.p, self.world = p, world
        self.slice = p.new_zeros(rows // world.size, p.shape[1])
        none, zeros = torch.empty(0, dtype=torch.int32, device=p.device), [0] * world.size
        self.exchange = self.nothing = Exchange(none, none, none.view(world.size, 0), zeros, zeros)
        self.coming: Exchange | None = None  # the next step's, if known
        self.filled: Exchange | None = None  # that for which p is filled ahead of its step

    def fetch(self, exchange: Exchange, out: Tensor | None = None) -> Tensor:
        """Copies of the rows that this rank looks up, in the order of their slots."""
        return torch.index_select(self.slice, 0, exchange.rows, out=out)

    def fill(self, exchange: Exchange) -> None:
        """Fills the cache for a step, unless it is filled already; the next reduce is for its gradients."""
        if exchange is not self.filled:
            self.fetch(exchange, self.p[: sum(exchange.taken)])
        self.exchange, self.filled = exchange, None

    def reduced(self) -> tuple[Tensor, Tensor]:
        """Of this rank's share: the rows (n,) where the gradient is not zero, and its values (n, C)."""
        return self.exchange.rows, self.grad[: len(self.exchange.rows)]

    def clear(self, grad: Tensor, whole: bool = False) -> None:
        rows = len(grad) if whole else sum(self.exchange.taken)
        grad[:rows].zero_()
        self.exchange = self.nothing
        if whole:  # as the table is reset, too
            self.filled = None


class ShardedRowCache(RowCache):
    """The same with several ranks: rows come from their owners, gradients go back to them, both in the table's type."""

    full = Sharded.full

    def fetch(self, exchange: Exchange, out: Tensor | None = None) -> Tensor:
        out = self.p.new_empty(sum(exchange.taken), self.p.shape[1]) if out is None else out
        self.start_fetch(exchange, out).wait()
        return out

    def start_fetch(self, exchange: Exchange, out: Tensor) -> dist.Work:
        values = self.slice.index_select(0, exchange.rows.index_select(0, exchange.asked))
        return dist.all_to_all_single(out, values, exchange.taken, exchange.given, async_op=True)

    def gather(self) -> None:
        """Starts to fill the cache for the next step, if that is known: beneath the updates that follow."""
        self.filled, self.coming = self.coming, None
        if self.filled:
            self.work = self.start_fetch(self.filled, self.p[: sum(self.filled.taken)])

    def gathered(self) -> None:
        if self.filled:
            self.work.wait()

    def reduce(self, grad: Tensor) -> None:
        taken, given = self.exchange.taken, self.exchange.given
        self.received = grad.new_empty(sum(given), grad.shape[1])
        self.work = dist.all_to_all_single(self.received, grad[: sum(taken)], given, taken, async_op=True)

    def reduced(self) -> tuple[Tensor, Tensor]:
        self.work.wait()
        total, self.received = sum_rows(self.received, self.exchange.sources), None
        return self.exchange.rows, total


def as_stack(p: Tensor) -> Tensor:
    """A bank as one stack of matrices, which can be shared out; other parameters as they are."""
    return p.flatten(0, -3) if p.dim() > 2 else p


class Slot:
    """A parameter, its row of the table PARAMETERS, its communication and its algorithm."""

    def __init__(self, row: Row, p: nn.Parameter, hp: Hyperparameters, world: World, compiled: Callable):
        self.row, self.p, self.shape, rowwise = row, p, as_stack(p).shape, row.algorithm == "rowwise"
        # Never replaced: captured CUDA graphs add to it at its address.
        p.grad = torch.zeros_like(p)
        self.grad = p.grad.view(self.shape)
        if rowwise:
            policy = partial(RowCache if world.size == 1 else ShardedRowCache, rows=hp.ngram_rows)
        elif world.size == 1:
            policy = Alone
        elif not row.sharded:
            policy = Replicated
        else:
            by_token = row.name == "value_embeds"  # not the embedding: as the head it has a gradient everywhere
            policy = partial(ShardedRows, vocabulary=hp.padded_vocab) if by_token else Sharded
        self.communication = policy(p.data.view(self.shape), world)
        slice = self.communication.slice
        first = world.rank * len(slice) if row.sharded else 0
        algorithms = {"adam": Adam, "normuon": partial(NorMuon, compiled=compiled), "rowwise": RowAdam}
        self.algorithm = algorithms[row.algorithm](row, hp, slice, first)


class Optimizer:
    """Steps every parameter, with the communication scheduled by hand.

    All reductions start in the order of PARAMETERS; updates run in the same order, as their gradients arrive, and
    gathers run beneath the updates that follow. Parameters under Adam wait for the last of `adam_every` steps, and then
    take the sum of their gradients. The n-grams' table is held here; the model has a cache of the rows a step looks up.
    """

    def __init__(self, model: GPT, hp: Hyperparameters, world: World, compile: bool = False):
        compiled, parameters = compiler(compile), model.tensors()
        cache = model.embed.new_zeros(cache_rows(hp, world), hp.model_dim)
        model.ngrams = parameters["ngrams"] = cache.requires_grad_()
        # Empty parameters, such as value_embeds where no layer has them, are left out.
        rows = [row for row in PARAMETERS if parameters[row.name].numel()]
        self.slots = {row.name: Slot(row, parameters[row.name], hp, world, compiled) for row in rows}
        self.model, self.world = model, world
        self.largest = deque(maxlen=8)  # (step, names, on the CPU the largest magnitude in what each update returned)

    def mark_lookups(self, dealt: list[np.ndarray]) -> None:
        """Marks what each rank looks up; dealt: inputs of all micro-batches, which go to the ranks in turn."""
        for i, tokens in enumerate(dealt):
            for slot in self.slots.values():
                slot.communication.mark_lookups(i % self.world.size, tokens)

    @torch.no_grad()
    def step(self, step: int, lr_factor: float, momentum: float, adam_every: int = 2) -> None:
        """Updates the parameters due at `step` from their .grad, then clears it; first adds up that of spellings."""
        adam_is_due = (step + 1) % adam_every == 0
        due = {n: slot for n, slot in self.slots.items() if adam_is_due or slot.row.algorithm != "adam"}
        for name, slot in due.items():
            if name == "spellings":
                self.model.add_spellings_gradient()
            slot.communication.reduce(slot.grad)
        gradients = []
        for slot in due.values():
            gradients.append(slot.algorithm.update(slot.communication.reduced(), lr_factor, momentum))
            slot.communication.gather()
        # NaN or infinite where a gradient is. Nothing waits for the copy: check_gradients reads it a step later.
        largest = torch.stack([torch.linalg.vector_norm(g, math.inf).float() for g in gradients])
        self.largest.append((step, [*due], largest.to("cpu", non_blocking=True)))
        for slot in due.values():
            slot.communication.gathered()
            slot.communication.clear(slot.grad)

    @torch.no_grad()
    def average(self, weight: float, settle: bool) -> None:
        """Moves averages to parameters by this weight (see AVERAGE_EVERY); `settle`: averages replace parameters."""
        for slot in self.slots.values():
            slice, average = slot.communication.slice, slot.algorithm.average
            if average is None:
                continue
            average.mul_(1 - weight).add_(slice, alpha=weight)
            if settle:
                slice.copy_(average)
                slot.communication.gather()
                slot.communication.gathered()

    def reset(self) -> None:
        """Back to the state before the first step; the parameters stay, but for the n-grams, which are zero again."""
        self.largest.clear()
        for slot in self.slots.values():
            slot.algorithm.reset()
            slot.communication.clear(slot.grad, whole=True)


# ======================================================================================================================
# Data
# ======================================================================================================================
# Shards are files of tokens in the public speedrun's format. Every rank deals all of a step's 8 micro-batches from them
# and keeps its own, so that a step has the same documents on 1, 2, 4 or 8 ranks and nothing about them is communicated.
# Rows of n-grams and classes of the softmax follow from the tokens here, too. Threads read and prepare one step ahead.

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
FILES = ["train_files", "val_files"]  # the hyperparameters that name shards
FETCH = "fetch it again: python data/cached_fineweb10B.py, or make shards with data/tokenize_text.py"


def find_files(pattern: str) -> list[Path]:
    """The files of a glob pattern relative to ROOT, sorted. Raises UserError when there is none."""
    root = escape(str(ROOT))  # an absolute pattern stays as it is; "[" may be meant as a letter
    found = glob(os.path.join(root, pattern)) or glob(os.path.join(root, pattern.replace("[", "[[]")))
    paths = sorted(map(Path, found))
    remedy = "get FineWeb with python data/cached_fineweb10B.py, an offline sample with python data/sample.py"
    message = f"no data files match {ROOT / pattern}: {remedy}, or set DATA_PATH to the folder that holds data/"
    require(paths, message)
    return paths


def files_of(hp: Hyperparameters) -> dict[str, list[Path]]:
    """Train and validation files: all that match. Raises UserError."""
    return {name: find_files(getattr(hp, name)) for name in FILES}


def read_header(path: Path) -> int:
    """Number of tokens of a shard file. Raises UserError naming the file for anything that is not a whole shard."""
    try:
        size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=3)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    require(size >= HEADER_BYTES, f"{path}: truncated, {size} bytes are less than a header's {HEADER_BYTES}; {FETCH}")
    magic, version, tokens = header.tolist()
    require(magic == SHARD_MAGIC, f"{path}: not a token shard, magic number {magic} instead of {SHARD_MAGIC}; {FETCH}")
    message = f"{path}: shard version {version}, this program reads version {SHARD_VERSION}; {FETCH}"
    require(version == SHARD_VERSION, message)
    message = f"{path}: the header promises {tokens} tokens, the file holds {(size - HEADER_BYTES) // 2}; {FETCH}"
    require(size == HEADER_BYTES + 2 * tokens, message)
    return tokens


def file_state(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change; None for a file that is not there."""
    try:
        return os.stat(path).st_size, os.stat(path).st_mtime_ns
    except OSError:
        return None


def read_tokens(path: Path, vocab_size: int, limit: int = sys.maxsize) -> np.ndarray:
    """Token ids of a shard (its first `limit`), uint16. Raises UserError for a bad header or an id out of range."""
    count = min(limit, read_header(path))
    try:
        tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_BYTES)
    except OSError as error:  # gone since its header was read
        raise UserError(f"{path}: {error.strerror}") from None
    require(len(tokens) == count, f"{path}: shrank while it was read; {FETCH}")
    if count and tokens.max() >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        message = f"token id {tokens[at]} at position {at}, the vocabulary ends at {vocab_size - 1}"
        raise UserError(f"{path}: {message}; {FETCH}")
    return tokens


class Shard:
    """A shard in memory, its documents dealt out front to back in micro-batches."""

    def __init__(self, path: Path, hp: Hyperparameters):
        self.tokens, self.next_document = read_tokens(path, hp.vocab_size), 0
        self.starts = np.flatnonzero(self.tokens == hp.bos)
        self.lengths = np.diff(self.starts, append=len(self.tokens))

    def deal(self, num_tokens: int, max_seq_len: int) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """The next 8 micro-batches: num_tokens + 1 tokens, and the edges of their documents, from 0 to num_tokens.

        A micro-batch's last document is cut where it is full, and the next one begins with the next document. None
        when the shard can't fill them all.
        """
        lengths = np.minimum(self.lengths, max_seq_len)
        ends, dealt, first = np.cumsum(lengths), [], self.next_document
        for _ in range(MICRO_BATCHES):
            before = ends[first - 1] if first else 0
            last = int(np.searchsorted(ends, before + num_tokens + 1))
            if last >= len(ends):
                return None
            own = slice(first, last + 1)
            pieces = [self.tokens[i : i + n] for i, n in zip(self.starts[own], lengths[own], strict=True)]
            edges = np.append(0, np.minimum(ends[own] - before, num_tokens))
            dealt.append((np.concatenate(pieces)[: num_tokens + 1], edges))
            first = last + 1
        self.next_document = first
        return dealt


def softmax_classes(targets: np.ndarray, count: int, padded_vocab: int) -> np.ndarray | None:
    """`count` ascending classes for a step's softmax: all its targets, and others spread evenly over the vocabulary.

    None if there are more targets, as for a count of 0: the softmax then takes all classes. A checksum of the targets
    chooses the others, so that every rank chooses the same. Source: sampled softmax, arXiv 1412.2007, but without its
    correction for classes left out, with which losses were worse. GPT-2's tokens are sorted by frequency: even
    spacing takes some of each.
    """
    taken = np.bincount(targets, minlength=padded_vocab) > 0
    others = np.flatnonzero(~taken)
    more = count - (padded_vocab - len(others))  # how many others
    if more > 0:
        first = zlib.crc32(targets.tobytes()) % len(others)
        taken[others[(np.arange(more) * len(others) + first) // more]] = True
    return np.flatnonzero(taken) if more >= 0 else None


def micro_batches_together(num_tokens: int, hp: Hyperparameters, world: World) -> int:
    """How many of a rank's micro-batches of num_tokens are joined into one: a divisor of their number, at least 1."""
    divisors = (n for n in (8, 4, 2, 1) if MICRO_BATCHES // world.size % n == 0)
    return next(n for n in divisors if n == 1 or n * num_tokens <= hp.micro_batch_tokens)


def join_micro_batches(dealt: list[tuple[np.ndarray, np.ndarray]], together: int) -> Iterator[list[np.ndarray]]:
    """Lays `together` micro-batches end to end at a time: inputs, targets, start and end of each position's document.

    dealt: tokens (T + 1,) of each micro-batch and the edges of its documents, from 0 to T. Documents do not see each
    other, so that losses are the same joined or not; one large micro-batch takes less time than two small ones.
    """
    for first in range(0, len(dealt), together):
        parts = []
        for i, (tokens, edges) in enumerate(dealt[first : first + together]):
            lengths, edges = np.diff(edges), edges + i * edges[-1]
            parts.append((tokens[:-1], tokens[1:], np.repeat(edges[:-1], lengths), np.repeat(edges[1:], lengths)))
        yield [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def hashed_ngrams(tokens: np.ndarray, starts: np.ndarray, rows: int) -> np.ndarray:
    """Rows of the table, (orders, T) int32, of the n-grams that end with each token (T,); products overflow as int32.

    Each order has an equal part of the table. Its last row is for tokens with too few before them in their document.
    """
    x, before = tokens.astype(np.int32), np.arange(len(tokens)) - starts
    last, found = rows // len(NGRAM_FACTORS) - 1, []
    for k, (order, factors) in enumerate(NGRAM_FACTORS.items()):
        hashed = reduce(xor, (f * np.roll(x, back) for back, f in enumerate(factors)))
        found.append(np.where(before < order - 1, last, hashed % last) + k * (last + 1))
    return np.stack(found)


def unique(rows: np.ndarray) -> np.ndarray:
    """np.unique for int32 from 0 on, by sorting: seven times as fast as NumPy 2.3's, which hashes."""
    rows = np.sort(rows, axis=None)
    return rows[np.flatnonzero(np.diff(rows, prepend=-1))]


def exchange_rows(by_rank: list[np.ndarray], rank: int, places: np.ndarray, learns: bool) -> tuple[np.ndarray, list]:
    """Slots of the rows that `rank` looks up, in their shape, and its Exchange's fields; places (rows,): scratch.

    learns: whether gradients will come back. Without, and on one rank, `sources` is empty.
    """

    def found_in(rows, different):  # index of each row among the different ones; a binary search would be slower
        places[different] = np.arange(len(different), dtype=places.dtype)
        return places[rows]

    share = len(places) // len(by_rank)
    own = unique(by_rank[rank])
    slots, taken = found_in(by_rank[rank], own), np.diff(np.searchsorted(own, share * np.arange(len(by_rank) + 1)))
    sources = own[None, :0]
    if len(by_rank) == 1:
        return slots, [own, own[:0], sources, [len(own)], [0]]
    asked = [unique(rows[rows // share == rank]) for rows in by_rank]
    rows, given = unique(np.concatenate(asked)), [*map(len, asked)]
    found = found_in(np.concatenate(asked), rows)
    if learns:
        sources = np.full((len(by_rank), len(rows)), -1, np.int32)
        sources[np.repeat(np.arange(len(by_rank)), given), found] = np.arange(len(found))
    return slots, [rows - rank * share, found, sources, taken.tolist(), given]


def sorting_order(rows: np.ndarray) -> np.ndarray:
    """np.argsort, stable, for numbers of 0 to 2^31 - 1: by the low 16 bits, then the high ones, five times as fast."""
    by_low = np.argsort(rows.astype(np.uint16), axis=None, kind="stable")
    return by_low[np.argsort((rows.ravel()[by_low] >> 16).astype(np.uint16), kind="stable")]


def make_micro_batches(
    dealt: list[tuple[np.ndarray, np.ndarray]], together: int, canonical: np.ndarray, places: np.ndarray, world: World,
    classes: list[Tensor], learns: bool,
) -> tuple[list[MicroBatch], Exchange]:  # fmt: skip
    """This rank's share of the micro-batches dealt to all ranks, joined, on its device, and their exchange.

    canonical: of canonical_tokens; places: of exchange_rows; classes: of softmax_classes, an empty list for all;
    learns: whether gradients will be taken, for which rows and tokens are sorted, and rows' sources found.
    """
    joined = [[*join_micro_batches(dealt[rank :: world.size], together)] for rank in range(world.size)]
    rows = [[hashed_ngrams(canonical[inputs], starts, len(places)) for inputs, _, starts, _ in b] for b in joined]
    slots, (*indices, taken, given) = exchange_rows([np.concatenate(r, 1) for r in rows], world.rank, places, learns)
    own, batches = joined[world.rank], []
    for arrays, part in zip(own, np.split(slots, len(own), 1), strict=True):
        arrays += [part, *(sorting_order(a) if learns else a[:0].ravel() for a in (part, arrays[0]))]
        batches.append(MicroBatch.of([*to_device(arrays, world.device), *classes]))
    return batches, Exchange(*to_device(indices, world.device), taken, given)


def to_device(arrays: Sequence[np.ndarray], device: torch.device, dtype: type = np.int32) -> list[Tensor]:
    """Copies as tensors, without waiting for a GPU."""
    tensors = [torch.from_numpy(a.astype(dtype)) for a in arrays]
    return [t.pin_memory().to(device, non_blocking=True) for t in tensors] if device.type == "cuda" else tensors


class StepBatch(NamedTuple):
    """What a step takes."""

    micro_batches: list[MicroBatch]  # this rank's
    exchange: Exchange  # of the n-grams' rows
    dealt: list[np.ndarray]  # inputs of all 8 micro-batches, which go to the ranks in turn
    position: tuple[int, int]  # where the next step goes on: files begun, and the next document of the last of them


def in_background(function: Callable, *args) -> Future:
    """function(*args) in a thread for which nobody waits: a network file system can stall for ever.

    Python waits at its end for the threads of an executor.
    """

    def work():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    future = Future()
    threading.Thread(target=work, daemon=True).start()
    return future


class TrainLoader:
    """Iterates over steps; once one is taken, a thread assembles the one after it and copies it to the GPU.

    sizes: of the steps, see TrainingSchedule.size; position: of the StepBatch before. When the files run out, they
    start over. Raises UserError for files damaged, changed since the run began, or too small for a step.
    """

    def __init__(self, paths: list[Path], sizes: list[tuple], hp: Hyperparameters, world: World, position=(1, 0)):
        self.paths, self.sizes, self.hp, self.world = paths, sizes, hp, world
        self.found = {path: file_state(path) for path in paths}
        self.files_begun, document = position
        self.shard = self._load(self.files_begun - 1)
        self.shard.next_document = document
        self.next_shard = in_background(self._load, self.files_begun)
        self.places = np.empty(hp.ngram_rows, np.int32)  # see exchange_rows
        self.stream = torch.cuda.Stream(world.device) if world.on_gpu else None
        self.assembler = world.thread("micro-batches")
        self.ahead = self.assembler.submit(self._prepare, sizes[0])

    def _load(self, number: int) -> Shard:
        path = self.reading = self.paths[number % len(self.paths)]
        if file_state(path) not in (self.found[path], None):  # if it is gone, reading it says so
            raise UserError(f"{path}: changed since the run began")
        return Shard(path, self.hp)

    def _wait(self) -> StepBatch:
        seconds = 0.8 * self.hp.hang_timeout  # before the watch ends the run: it could not name the file
        try:
            return self.ahead.result(seconds or None)
        except TimeoutError:
            message = f"not read within {seconds:g} s (--hang_timeout): does the file system stall?"
            raise UserError(f"{self.reading}: {message}") from None

    def _deal(self, num_tokens: int, max_seq_len: int) -> list[tuple[np.ndarray, np.ndarray]]:
        for _ in range(len(self.paths) + 1):
            if dealt := self.shard.deal(num_tokens, max_seq_len):
                return dealt
            self.shard = self.next_shard.result()
            self.files_begun += 1
            self.next_shard = in_background(self._load, self.files_begun)
        raise UserError(
            f"none of the {len(self.paths)} train files ({self.paths[0]} ...) can fill a step: it takes "
            f"{MICRO_BATCHES} x {num_tokens + 1} tokens of documents that begin with token {self.hp.bos} and count up "
            f"to {max_seq_len} tokens each; get more data or lower the stages' tokens"
        )

    def _prepare(self, size: tuple[int, ...]) -> StepBatch:
        num_tokens, max_seq_len, num_classes = size
        dealt = self._deal(num_tokens, max_seq_len)
        targets = np.concatenate([tokens[1:] for tokens, _ in dealt])  # of all ranks: classes are the same on each
        classes = softmax_classes(targets, num_classes, self.hp.padded_vocab)
        together, canonical = micro_batches_together(num_tokens, self.hp, self.world), canonical_tokens(self.hp)
        with torch.cuda.stream(self.stream):  # does nothing without a GPU
            classes = to_device([] if classes is None else [classes], self.world.device)
            made = make_micro_batches(dealt, together, canonical, self.places, self.world, classes, learns=True)
            if self.stream:
                self.stream.synchronize()  # here, so that the main thread need not wait for copies
        inputs = [tokens[:-1] for tokens, _ in dealt]
        return StepBatch(*made, inputs, (self.files_begun, self.shard.next_document))

    def __iter__(self) -> Iterator[StepBatch]:
        try:
            for size in [*self.sizes[1:], None]:
                batch = self._wait()
                self.ahead = self.assembler.submit(self._prepare, size) if size else None
                if self.stream:  # whose memory it is: not to be reused there while the current stream reads it
                    for tensor in chain(*(b.tensors() for b in batch.micro_batches), batch.exchange.tensors()):
                        tensor.record_stream(torch.cuda.current_stream())
                yield batch
        finally:
            self.assembler.shutdown(wait=False, cancel_futures=True)


ValidationBatches = list[tuple[list[MicroBatch], Exchange]]  # of one micro-batch each


def validation_batches(paths: list[Path], hp: Hyperparameters, world: World) -> ValidationBatches:
    """This rank's chunks of the first val_tokens, each with its exchange. Raises UserError for fewer tokens."""
    needed, tokens = hp.val_tokens + 1, np.empty(0, np.uint16)
    for path in paths:
        tokens = np.append(tokens, read_tokens(path, hp.vocab_size, needed - len(tokens)))
    require(len(tokens) == needed, f"{paths[0]} ...: {len(tokens)} validation tokens instead of {needed}; {FETCH}")
    T = hp.val_batch_size // MICRO_BATCHES
    chunks = [tokens[start : start + T + 1] for start in range(0, hp.val_tokens, T)]
    edges = [np.concatenate(([0], 1 + np.flatnonzero(chunk[1:-1] == hp.bos), [T])) for chunk in chunks]
    dealt = [*zip(chunks, edges, strict=True)]
    groups = (dealt[i : i + world.size] for i in range(0, len(dealt), world.size))
    canonical, places = canonical_tokens(hp), np.empty(hp.ngram_rows, np.int32)
    return [make_micro_batches(group, 1, canonical, places, world, [], learns=False) for group in groups]


@cache
def read_vocabulary(hp: Hyperparameters) -> dict[bytes, int]:
    """Ids of tokens by their bytes, from --vocabulary, a file in tiktoken's form; {} without. Raises UserError."""
    if not hp.vocabulary:
        return {}
    paths = [folder / hp.vocabulary for folder in (ROOT, Path(__file__).resolve().parent)]
    path, ids, number = next(filter(os.path.exists, paths), paths[0]), {}, 0
    remedy = "--vocabulary= takes the file that the data was tokenized with, or nothing, for n-grams of tokens"
    try:
        with open(path, "rb") as file:
            lines = file.read(1 << 24).splitlines()  # 16 MB; GPT-2's has 0.8
        for line in lines:
            number += 1
            token, rank = line.split()
            ids[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError) as error:
        message = error.strerror if isinstance(error, OSError) else f"line {number} is no token in base64 and its rank"
        raise UserError(f"{path}: {message}; {remedy}") from None
    message = f"its {len(ids):,} tokens have not the ranks 0 to {hp.vocab_size - 2}, for --vocab_size={hp.vocab_size}"
    require(sorted(ids.values()) == [*range(hp.vocab_size - 1)], f"{path}: {message}; {remedy}")
    return ids


@cache
def canonical_tokens(hp: Hyperparameters) -> np.ndarray:
    """(V,) int32: for each token the first one with the same letters but for case, accents, width and spaces.

    N-grams that differ in these only share a row. Without a vocabulary, each token stays itself. A run makes it before
    the clock: it says nothing about the data. Source: the public speedrun's PR 375, 2026.
    """
    canonical, first = np.arange(hp.padded_vocab, dtype=np.int32), {}
    for token, i in sorted(read_vocabulary(hp).items(), key=itemgetter(1)):
        with suppress(UnicodeDecodeError):  # a token that is part of a character stays itself
            letters = unicodedata.normalize("NFKD", token.decode())  # accents are characters of their own
            words = "".join(c for c in letters if not unicodedata.combining(c)).lower().split()
            if words or token.isspace():
                canonical[i] = first.setdefault(" ".join(words), i)
    return canonical


def prefix_table(hp: Hyperparameters) -> Tensor:
    """(V,) int32: for each token its prefix, the longest shorter token with which its bytes begin; -1 for none.

    As targets they teach a token's first letters, which other tokens share. Source: the public speedrun's PR 337, 2026.
    """
    ids, prefixes = read_vocabulary(hp), np.full(hp.padded_vocab, -1, dtype=np.int32)
    for token, i in ids.items():
        shorter = (token[:length] for length in range(len(token) - 1, 0, -1))
        prefixes[i] = next((ids[prefix] for prefix in shorter if prefix in ids), -1)
    return torch.from_numpy(prefixes)


# ======================================================================================================================
# Schedule
# ======================================================================================================================
# What depends on the step alone, hence is the same on every rank and in a run that goes on.


class TrainingSchedule:
    """Values by step, counted from 0; a stage has the steps from `starts` to before `ends`."""

    def __init__(self, hp: Hyperparameters):
        self.hp, self.scheduled = hp, hp.steps("num_scheduled_iterations")
        self.warmup, self.cooldown = hp.steps("muon_momentum_warmup"), hp.steps("muon_momentum_cooldown")
        self.averaged = round(hp.average_frac * hp.total_steps)  # how many of the last steps
        *shares, _ = (stage.share for stage in hp.stages)
        # Rounded down, 1e-9 for inexact products; the last stage before the extension takes what is left.
        lengths = [int(self.scheduled * share / sum(shares) + 1e-9) for share in shares[:-1]]
        self.starts = (0, *accumulate(lengths), self.scheduled)
        self.ends = (*self.starts[1:], hp.total_steps)
        self.long_windows = [stage.long_window * hp.window_block for stage in hp.stages]

    def stage_index(self, step: int) -> int:
        """The row of STAGES that `step` belongs to, from 0."""
        return max(i for i, start in enumerate(self.starts) if step >= start)

    def stage(self, step: int) -> TrainingStage:
        """The row of STAGES that `step` belongs to."""
        return self.hp.stages[self.stage_index(step)]

    def size(self, step: int) -> tuple[int, int, int]:
        """For the loader: tokens of a micro-batch, of a document at most; classes of the softmax, 0 for all."""
        stage = self.stage(step)
        classes = stage.classes if stage.classes < self.hp.padded_vocab else 0
        return stage.tokens // MICRO_BATCHES, min(stage.max_seq_len, self.hp.train_max_seq_len), classes

    def lr(self, step: int) -> float:
        """Learning-rate factor: the stage's multiplier, which the cooldown moves linearly to lr_end."""
        end = self.scheduled
        start = int(end * (1 - self.hp.cooldown_frac))
        t = 1 if step >= end else max(0, step - start) / max(1, end - start)
        return (1 - t) * self.stage(step).lr + t * self.hp.lr_end

    def momentum(self, step: int) -> float:
        """NorMuon's: from 0.85 to 0.93 in the first steps, and back in the last."""
        low, high = 0.85, 0.93
        if step < self.warmup:
            return low + (high - low) * step / self.warmup
        into_cooldown = max(0, step - (self.hp.total_steps - self.cooldown))
        return high - (high - low) * into_cooldown / max(1, self.cooldown)

    def average_weight(self, step: int) -> float:
        """Weight of the parameters after `step` in their exponential average: 1 the first of n times, then 2 / n."""
        ahead = self.hp.total_steps - 1 - step
        if ahead % AVERAGE_EVERY or ahead >= self.averaged:
            return 0.0  # not this time
        return 1.0 if ahead + AVERAGE_EVERY >= self.averaged else min(1.0, 2 * AVERAGE_EVERY / self.averaged)

    def target_weights(self, step: int) -> list[float]:
        """Weights of the next tokens, then of the first one's prefix; linear over the steps of a stage."""
        i, stage = self.stage_index(step), self.stage(step)
        t = (step - self.starts[i]) / max(self.ends[i] - self.starts[i], 1)
        pairs = [*zip(stage.target_weights, stage.target_weights_end, strict=True), stage.prefix]
        return [a + (b - a) * t for a, b in pairs]

    def windows(self, step: int) -> dict[str, int]:
        """Attention windows in tokens, by the names in LAYERS."""
        stage = self.stage(step)
        return self.window_tokens(stage.short_window, stage.long_window)

    def val_windows(self, step: int) -> dict[str, int]:
        """After `step` steps: the last one's; at the run's end FINAL_WINDOWS, for which Yarn does not grow further."""
        return self.window_tokens(*FINAL_WINDOWS) if step == self.hp.total_steps else self.windows(max(step - 1, 0))

    def window_tokens(self, short: int, long: int) -> dict[str, int]:
        """Converts windows from blocks."""
        return {"short": short * self.hp.window_block, "long": long * self.hp.window_block}


# ======================================================================================================================
# Train
# ======================================================================================================================
# The loop is Trainer.run. Before it, Trainer.warm_up compiles and captures what the loop will use, by the same methods;
# between steps, BetweenSteps validates, logs and saves. The clock follows the public speedrun's rules: compiling,
# validations and checkpoints do not count.


@dataclass
class Progress:
    """Where a run is between two steps, with model and optimizer all that it takes to go on."""

    step: int = 0  # done when the last checkpoint was written, or the run began
    elapsed: float = 0.0  # the clock's at that step, ms
    position: tuple[int, int] = (1, 0)  # the loader's, after the latest step
    val_losses: list[float] = field(default_factory=list)


class GraphMemory:
    """The memory that CUDA graphs share with each other and with validations: no two of them run at the same time.

    All use one stream, as freed memory goes back to the stream that had it. This class stands in for a
    torch.cuda.MemPool, of which use_mem_pool reads only `id`: a MemPool could not be freed before its graphs.
    """

    def __init__(self):
        self.id, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    @contextmanager
    def used(self) -> Iterator[None]:
        """For kernels that are launched one by one; without gradients, as autograd's thread would not use the pool."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, run: Callable[[MicroBatch, Tensor], None], batch: MicroBatch, target_weights: Tensor) -> Callable:
        """Forward and backward of a micro-batch as a CUDA graph; the function that runs it on others of its shape.

        Launching its hundreds of kernels one by one can take longer than they run. Windows and softmax scale are part
        of the capture, hence a graph for each stage.
        """
        graph = torch.cuda.CUDAGraph()
        inputs = [t.clone() for t in (target_weights, *batch.tensors())]
        # thread_local: the loader's threads go on using the GPU, which must not disturb the capture.
        with torch.cuda.graph(graph, pool=self.id, stream=self.stream, capture_error_mode="thread_local"):
            run(MicroBatch.of(inputs[1:]), inputs[0])

        def replay(batch: MicroBatch, target_weights: Tensor) -> None:
            for static, tensor in zip(inputs, (target_weights, *batch.tensors()), strict=True):
                static.copy_(tensor)
            graph.replay()

        return replay


class Trainer:
    """Model, optimizer and schedule of a run; checkpoints: records/checkpoint.py's, for a run that writes any."""

    def __init__(self, hp: Hyperparameters, world: World, checkpoints: object = None):
        self.hp, self.world, self.schedule, self.checkpoints = hp, world, TrainingSchedule(hp), checkpoints
        compile = hp.compile == "on" or (hp.compile == "auto" and world.on_gpu)
        # If deterministic, Inductor chooses no reductions by timing them; but index_put_ and the like get slower.
        # On a CPU bits are the same in any case: not called there, as it imports torch.compile, for three seconds.
        if compile or world.on_gpu:
            torch.use_deterministic_algorithms(hp.deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
        torch.manual_seed(hp.seed)
        self.model = GPT(hp, world.device, choose_dtype(hp, world), compile)
        if world.size > 1:
            for p in self.model.parameters():
                dist.broadcast(p.data, src=0)
        self.optimizer = Optimizer(self.model, hp, world, compile)
        self.ngrams = self.optimizer.slots["ngrams"]
        self.loss_scale = hp.grad_scale / MICRO_BATCHES
        self.fp8_loss_scale = self.loss_scale if use_fp8(hp, world) else None
        weights = map(self.schedule.target_weights, range(hp.total_steps))
        self.target_weights = [torch.tensor(row, device=world.device) for row in weights]  # by step, copied once
        self.stage_index = 0
        self.graph_memory = GraphMemory() if world.on_gpu and hp.cuda_graphs == "auto" else None
        self.graphs: dict[tuple[int, bool], Callable] = {}  # by stage, and whether the softmax takes all classes
        self.peak_memory: dict[int, int] = {}  # bytes, on a GPU: the most up to each stage

    def enter_step(self, step: int) -> None:
        """Moves on to the stage of `step`; Yarn adapts to the long window of each stage on the way."""
        while self.stage_index < self.schedule.stage_index(step):
            self.model.yarn.grow(*self.schedule.long_windows[self.stage_index : self.stage_index + 2])
            self.stage_index += 1

    def micro_step(self, step: int, batch: MicroBatch, target_weights: Tensor) -> None:
        """Forward and backward of one micro-batch; adds to the gradients."""
        prefix = any(self.schedule.stage(step).prefix)  # with a weight of 0 it would take 1 % of the time for nothing
        weights = target_weights if prefix else target_weights[:-1]
        losses = self.model(batch, self.schedule.windows(step), weights, self.fp8_loss_scale, prefix=prefix)
        (losses.sum() * self.loss_scale).backward()

    def add_gradients(self, step: int, batch: StepBatch) -> None:
        """Forward and backward on each micro-batch of this rank."""
        self.ngrams.communication.fill(batch.exchange)
        for micro_batch in batch.micro_batches:
            graph = self.graphs.get((self.stage_index, micro_batch.classes is None))
            (graph or partial(self.micro_step, step))(micro_batch, self.target_weights[step])
        self.optimizer.mark_lookups(batch.dealt)

    def update(self, step: int, following: StepBatch | None = None) -> None:
        """The optimizer's step, with the schedule's learning rate and momentum; averages in the last steps.

        Meanwhile rows of n-grams travel to the ranks that look them up in the `following` step.
        """
        self.ngrams.communication.coming = following and following.exchange
        schedule = self.schedule
        self.optimizer.step(step, schedule.lr(step), schedule.momentum(step), adam_every=schedule.stage(step).adam)
        if weight := schedule.average_weight(step):
            self.optimizer.average(weight, settle=step == self.hp.total_steps - 1)

    @torch.no_grad()
    def validate(self, batches: ValidationBatches, windows: dict[str, int]) -> float:
        """Mean cross-entropy of all ranks' validation tokens, in nats."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for (batch,), exchange in batches:
            with self.graph_memory.used() if self.graphs else nullcontext():
                ngrams = self.ngrams.communication.fetch(exchange)
                total += self.validation_losses(batch, windows, ngrams).double().sum()
        if self.world.size > 1:
            dist.all_reduce(total)
        return total.item() / self.hp.val_tokens

    @torch.no_grad()
    def validation_losses(self, batch: MicroBatch, windows: dict[str, int], ngrams: Tensor) -> Tensor:
        """Loss of each position, (T,); ngrams: the rows that the slots are of, maybe more than the cache has."""
        self.model.ngrams = ngrams
        one = torch.ones(1, device=self.world.device)
        losses = self.model(batch, windows, one, head_chunk=32_768, prefix=False)
        self.model.ngrams = self.ngrams.p
        return losses

    def warm_up(self, train_paths: list[Path], val_batches: ValidationBatches) -> None:
        """Compiles all that the run will use, by a step of each stage and a validation, and puts everything back."""
        saved = {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}
        schedule, batches = self.schedule, self.batch_of_each_stage(train_paths)
        self.compile_in_turns(batches, *val_batches[0])
        for step, batch in batches:
            self.enter_step(step)
            self.add_gradients(step, batch._replace(micro_batches=[]))  # what each rank does at the same time
            self.update(step)
        for step in (0, 1):  # without and with Adam
            self.optimizer.step(step, schedule.lr(0), schedule.momentum(0))
        self.validate(val_batches[:1], schedule.windows(0))
        # The largest first: the others find room in its memory.
        batches.sort(key=lambda pair: len(pair[1].micro_batches[0].inputs), reverse=True)
        for step, batch in batches if self.graph_memory else ():
            self.reset()
            self.enter_step(step)
            for micro_batch in self.warm_up_batches(step, batch):
                args = micro_batch, self.target_weights[step]
                graph = self.graph_memory.capture(partial(self.micro_step, step), *args)
                graph(*args)  # its first launch takes longer
                self.graphs[self.stage_index, micro_batch.classes is None] = graph
        self.model.load_state_dict(saved)
        self.reset()

    def batch_of_each_stage(self, train_paths: list[Path]) -> list[tuple[int, StepBatch]]:
        """The first step of each stage, if it has one, and a batch of its size."""
        steps = sorted({*self.schedule.starts} - {self.hp.total_steps})
        sizes = [self.schedule.size(step) for step in steps]
        return [*zip(steps, TrainLoader(train_paths, sizes, self.hp, self.world), strict=True)]

    def compile_in_turns(
        self, batches: list[tuple[int, StepBatch]], val_batch: list[MicroBatch], exchange: Exchange
    ) -> None:  # fmt: skip
        """Forward and backward of all stages and a chunk of validation; each rank begins elsewhere.

        What one rank has compiled the others find in the caches. Nothing is communicated: ranks would wait for it.
        """

        def forward_and_backward(step, micro_batch):
            self.micro_step(step, micro_batch, self.target_weights[step])
            if self.world.on_gpu:
                self.peak_memory[self.schedule.stage_index(step)] = torch.cuda.max_memory_allocated()

        def validation():
            ngrams = self.ngrams.p.new_zeros(sum(exchange.taken), self.hp.model_dim)
            self.validation_losses(*val_batch, self.schedule.windows(0), ngrams)

        tasks = [
            partial(forward_and_backward, step, micro_batch)
            for step, batch in batches
            for micro_batch in self.warm_up_batches(step, batch)
        ]
        tasks.append(validation)  # the last, as the process of precompile.py compiles it, too
        first = self.world.rank * len(tasks) // self.world.size
        for task in tasks[first:] + tasks[:first]:
            task()
            torch.cuda.empty_cache()  # does nothing without a GPU

    def warm_up_batches(self, step: int, batch: StepBatch) -> list[MicroBatch]:
        """What the warm-up runs: on a CPU all; on a GPU one of each shape, with all classes and with the stage's."""
        if not self.world.on_gpu:
            return batch.micro_batches
        all_classes, count = batch.micro_batches[0]._replace(classes=None), self.schedule.size(step)[2]
        classes = torch.arange(count, dtype=torch.int32, device=self.world.device)
        return [all_classes, all_classes._replace(classes=classes)] if count else [all_classes]

    def reset(self) -> None:
        """Back to the first step; the parameters stay, but for the n-grams, which become zero."""
        self.optimizer.reset()
        self.model.yarn.reset()
        self.stage_index = 0

    def run(
        self, log: "Log", train_paths: list[Path], val_batches: ValidationBatches, progress=None, watch=None
    ) -> list[float]:
        """The run on the clock, from `progress` on. Returns the validation losses."""
        now = progress or Progress()
        sizes = [self.schedule.size(step) for step in range(now.step, self.hp.total_steps)]
        batches = iter(TrainLoader(train_paths, sizes, self.hp, self.world, now.position))
        if self.world.size > 1:
            dist.barrier()  # the slowest to compile must be ready before the clock starts
        between = BetweenSteps(self, log, val_batches, now, watch or Unguarded())  # starts the clock
        self.model.prefixes.copy_(prefix_table(self.hp))  # on the clock, as the public speedrun's rules have it
        between.at(now.step)
        batch = next(batches)
        for step in range(now.step, self.hp.total_steps):
            self.enter_step(step)
            self.add_gradients(step, batch)
            following = next(batches, None)
            self.update(step, following)
            between.log_step(step, batch, len(train_paths))
            between.at(step + 1)
            batch = following
        return now.val_losses

    def check_gradients(self, log: "Log", lag: int) -> None:
        """Raises UserError if a gradient, of all but the last `lag` steps, is not finite; first saves the states."""
        while len(self.optimizer.largest) > lag:
            step, names, values = self.optimizer.largest.popleft()
            bad = [name for name, value in zip(names, values.tolist(), strict=True) if not math.isfinite(value)]
            if bad:
                message, checks = f"the gradient of {bad[0]} in step {step + 1} is not finite", import_tool("checks")
                raise UserError(message + (checks.save_nonfinite(self, log.path, step, bad) if checks else ""))


class BetweenSteps:
    """What happens between two steps of a run: lines in the log, validations, checkpoints, the end after a signal."""

    def __init__(self, trainer: Trainer, log: "Log", val_batches: ValidationBatches, now: Progress, watch: "Unguarded"):
        self.trainer, self.hp, self.log, self.val_batches, self.watch = trainer, trainer.hp, log, val_batches, watch
        self.now, self.begin, self.clock = now, now.step, Clock(trainer.world.device, now.elapsed)

    def at(self, step: int) -> None:
        """All that is due when `step` steps are done."""
        hp, watch, last = self.hp, self.watch, step == self.hp.total_steps
        watch.at(step)
        due = step in hp.val_steps or (hp.val_loss_every and step % hp.val_loss_every == 0)
        resumed_here = 0 < step == self.begin  # has validated before its checkpoint
        if last or (due and not resumed_here):
            with self.off_the_clock():
                self.validate(step)
        if last:
            return
        if self.trainer.checkpoints:
            self.trainer.checkpoints.at(step, self)
        watch.at(step)  # ends the pause

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Stops the clock and the watch for hangs, and checks the gradients of all steps so far."""
        self.clock.stop()
        self.watch.pause()
        self.trainer.check_gradients(self.log, lag=0)
        yield
        self.clock.start()

    def validate(self, step: int) -> None:
        """Logs the validation loss. Raises UserError for one that is not finite."""
        loss = self.trainer.validate(self.val_batches, self.trainer.schedule.val_windows(step))
        self.now.val_losses.append(loss)
        self.log.write(f"step:{step}/{self.hp.total_steps} val_loss:{loss:.4f} {self.clock.text(step)}")
        require(math.isfinite(loss), f"the validation loss is {loss}: a parameter has left finite numbers")

    def log_step(self, step: int, batch: StepBatch, files: int) -> None:
        """Logs a step whose kernels have been launched, and an epoch that began with it; files: of an epoch."""
        epoch_before, epoch = (1 + (begun - 1) // files for begun, _ in (self.now.position, batch.position))
        if epoch > epoch_before:
            self.log.write(f"epoch {epoch}: the train files ran out at step {step} and start over")
        self.now.position = batch.position
        self.clock.step_issued()
        self.trainer.check_gradients(self.log, lag=1)  # of the step before: step_issued has waited for it
        self.log.write(f"step:{step + 1}/{self.hp.total_steps} {self.clock.text(step + 1)}", step=step + 1)


class Clock:
    """Training time in milliseconds. It waits for all of the GPU's work only when it starts and stops."""

    def __init__(self, device: torch.device, elapsed: float = 0.0):
        self.device, self.elapsed = device, elapsed
        self.synchronize = torch.get_device_module(device).synchronize  # on a CPU it does nothing
        self.issued: torch.cuda.Event | None = None
        self.start()

    def step_issued(self) -> None:
        """Waits for the step before: the CPU launches one step ahead, no more, so that the log has the GPU's times."""
        if self.device.type == "cuda":
            before, self.issued = self.issued, torch.cuda.Event(enable_timing=True)  # for --bench
            self.issued.record()
            if before:
                before.synchronize()

    def start(self) -> None:
        """Waits for the work launched so far, and starts counting."""
        self.synchronize()
        self.since = time.perf_counter()

    def stop(self) -> None:
        """Waits for the work launched so far, and stops counting."""
        self.synchronize()
        self.elapsed += 1000 * (time.perf_counter() - self.since)
        self.since = None

    def text(self, step: int) -> str:
        """The time as in the log, after `step` steps."""
        total = self.elapsed + (1000 * (time.perf_counter() - self.since) if self.since else 0)
        return f"train_time:{total:.0f}ms step_avg:{total / max(step, 1):.2f}ms"


# ======================================================================================================================
# main
# ======================================================================================================================
# Check, log, meet the other ranks, warm up, run. Whatever is raised on the way ends in one line, by records/guard.py.


class Log:
    """The run's lines on the terminal and in a file, rank 0's, where this file is a copy without records/logfile.py."""

    def __init__(self, hp: Hyperparameters, world: World):
        self.hp, self.path, self.file = hp, Path(hp.log_dir) / f"{hp.run_id}.txt", None
        if world.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a" if hp.resume else "x", encoding="utf-8")  # noqa: SIM115

    def begin(self, overrides: dict[str, object], notes: list[str]) -> None:
        """The source that runs and what was given, with which it can be run again; then lines about the run."""
        given = " ".join(f"--{name}={value}" for name, value in overrides.items()) or "none"
        source, rule = Path(__file__).read_text(encoding="utf-8"), "=" * 100
        head = [source, rule, f"Running PyTorch {torch.__version__}", f"preset: {self.hp.preset}; overrides: {given}"]
        self.write("\n".join([*head, rule]), console=False)
        note = "note: a copy without records/: nothing was checked, and nothing looks after hangs"
        self.write("\n".join([note, *notes]))

    def write(self, text: str, console: bool = True, step: int = 0) -> None:
        """Writes one or more lines; step: that which a line is of, for a LogFile's bar."""
        if self.file:
            print(text, file=self.file, flush=True)
            if console:
                print(text, flush=True)

    result = close = lambda *_: None


class Unguarded:
    """In place of records/guard.py's Watch where this file is a copy without it: nothing is watched."""

    rank, stop = 0, ""

    start = join = follow = at = pause = close = lambda *_: None

    def fail(self, error: BaseException) -> None:
        """What the user can put right in one line, all else in Python's own way."""
        if isinstance(error, UserError):
            # torchrun ends all processes with the first: rank 0, which most often finds the same, speaks for them.
            time.sleep(0 if os.environ.get("RANK", "0") == "0" else 10)
            sys.exit(f"train_gpt.py: error: {error}")
        raise error


def main(arguments: list[str]) -> None:
    """A whole run; or, for --bench and --profile, a look at its steps, and for --help and --describe a text."""
    begin, program, guard = time.perf_counter(), sys.modules[__name__], import_tool("guard")
    words = {argument.lower() for argument in arguments}
    usage, describe = {"-h", "--help"} & words, {"--describe", "--describe=true", "--describe=1"} & words
    # A second process is forked while this one has neither CUDA nor threads of its own; GPUs are counted by NVML.
    compiles = isinstance(triton, ModuleType) and not usage and not describe and torch.cuda.device_count()
    precompile = import_tool("precompile") if compiles else None
    end_compiling = precompile.start(program, arguments) if precompile else lambda: None
    watch = guard.Watch(program) if guard else Unguarded()
    watch.start()
    try:
        if usage or describe:
            if not usage:
                import_tool("describe", "--describe").show(program, arguments, watch.rank)
            elif watch.rank == 0:
                print(help_text())
            watch.close()
            return

        # What to run, and whether it can: known in a second, before anything waits
        checks, logfile, world = import_tool("checks"), import_tool("logfile"), World.from_environment()
        # torch.compile takes seconds to import: a thread does that while CUDA begins, with the GPU chosen just now
        load = partial(importlib.import_module, "torch._inductor.compile_fx")
        imported = in_background(load).result if precompile else lambda: None
        memory = torch.cuda.get_device_properties(world.device).total_memory / 2**30 if world.on_gpu else math.inf
        hp, overrides = parse_arguments(arguments, world.on_gpu, memory)
        wanted = next((name for name in ("resume", "checkpoint_every", "save_checkpoint") if getattr(hp, name)), None)
        tool = import_tool("checkpoint", f"--{wanted}") if wanted else None
        hp, checkpoint, resumed = tool.resume(hp, overrides) if hp.resume else (hp, None, [])
        bench = import_tool("bench", "--bench" if hp.bench else "--profile") if hp.bench or hp.profile else None
        files = tool.files_of_checkpoint(hp, checkpoint) if checkpoint else files_of(hp)
        notes = checks.check_world(program, hp, world, files) if checks else []
        log = watch.log = logfile.LogFile(program, hp, world) if logfile else Log(hp, world)
        log.begin(overrides, [*notes, *resumed])

        # The other ranks
        world.start()
        watch.join(world)
        if world.size > 1:
            of_rank_0 = [hp.run_id, bool(checks)]  # each rank may have drawn a run_id of its own
            dist.broadcast_object_list(of_rank_0, src=0)
            hp = replace(hp, run_id=of_rank_0[0])
            log.path = log.path.with_name(f"{hp.run_id}.txt")
            require(bool(checks) == of_rank_0[1], "records/checks.py is beside the train_gpt.py of some ranks only")
            if checks:
                checks.check_agreement(program, hp, overrides, world, files, checkpoint)
        watch.follow(hp)

        # The run
        checkpoints = tool and tool.Checkpoints(hp, world, files)
        train_paths, val_paths = files.values()
        with world.thread("validation") as thread:  # two seconds of NumPy, beside those in which the model is made
            val_batches = thread.submit(validation_batches, val_paths, hp, world)
            imported()
            trainer = Trainer(hp, world, checkpoints)
        trainer.warm_up(train_paths, val_batches.result())
        end_compiling()
        log.write(f"warm-up: {time.perf_counter() - begin:.1f} s from the start of main")
        if bench:
            bench.Bench(program, trainer, train_paths, log).run(start_seconds=time.perf_counter() - begin)
        else:
            progress = tool.restore(trainer, checkpoint) if checkpoint else None
            val_losses = trainer.run(log, train_paths, val_batches.result(), progress, watch)
            if hp.save_checkpoint:
                checkpoints.save(trainer, log)
            log.result(trainer, val_losses)
        watch.close()
        if world.size > 1:
            dist.destroy_process_group()
        log.close()
    except Exception as error:
        watch.fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
