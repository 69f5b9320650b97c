"""
What would run, from the tables at the top of train_gpt.py alone: as text for its --describe, and as two pictures.

    python train_gpt.py --describe --length=0.25      # text, in two seconds; takes every hyperparameter
    python train_gpt.py --describe --preset=smoke     # what runs without a GPU
    python records/describe.py                        # draws records/architecture.svg and records/schedule.svg
    python records/describe.py --length=0.25 --out /tmp

Neither GPU nor data nor environment has a say in it. The speedrun is told as it runs on GPUs that have FP8, the smoke
preset as on a CPU, memory for 1, 2, 4 and 8 processes. Counts are those of GPT's and Optimizer's tensors, made without
memory; FLOP and what a micro-batch keeps are formulas of their own (`forward_flop`, `kept_bytes`), which a new kind of
product or region takes a line in.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from types import ModuleType
from typing import NamedTuple

import picture
import torch
from bench import aligned
from torch import Tensor

RECORDS = Path(__file__).resolve().parent
SIZES = (1, 2, 4, 8)  # processes


class Run:
    """A run that does not take place: hyperparameters, schedule, parameters without memory, a piece of the optimizer.

    train_gpt: the module, handed over as to records/bench.py. Raises UserError for what no run could be told of.
    """

    def __init__(self, train_gpt: ModuleType, hp):
        self.train_gpt, self.hp, self.schedule = train_gpt, hp, train_gpt.TrainingSchedule(hp)
        train_gpt.require(not hp.resume, "--describe tells of a run from its beginning: leave --resume away")
        self.on_gpu = hp.preset == "speedrun"
        device = torch.device("cuda" if self.on_gpu else "cpu")  # a name: nothing is asked of it
        self.dtype = train_gpt.choose_dtype(hp, train_gpt.World(device=device))
        self.fp8 = {"head"} if self.on_gpu and hp.fp8 != "off" else set()
        self.fp8 |= {"layers"} if self.on_gpu and hp.fp8 == "auto" else set()
        model = train_gpt.GPT(hp, torch.device("meta"), self.dtype)
        self.parameters = model.tensors()
        rows = [row for row in train_gpt.PARAMETERS if self.parameters[row.name].numel()]
        self.slots = {row.name: self._slot(row) for row in rows}

    def _slot(self, row):
        """Of the optimizer, for the first matrix of a bank or row of another parameter: states are as long as these.

        In memory: tensors without it can't be made like others before half of PyTorch's compiler is imported, 2 s.
        """
        first = torch.zeros(1, *self.stack(row.name)[1:], dtype=self.parameters[row.name].dtype)
        program, hp = self.train_gpt, replace(self.hp, ngram_rows=1)
        return program.Slot(row, torch.nn.Parameter(first), hp, program.World(), program.compiler(False))

    def stack(self, name: str) -> torch.Size:
        """The shape of which processes share out the first dimension."""
        return self.train_gpt.as_stack(self.parameters[name]).shape

    def micro_batches(self, size: int) -> list[int]:
        """Tokens of a micro-batch as joined by each of so many processes, by stage."""
        program, world = self.train_gpt, self.train_gpt.World(size=size)
        dealt = [stage.tokens // program.MICRO_BATCHES for stage in self.hp.stages]
        return [tokens * program.micro_batches_together(tokens, self.hp, world) for tokens in dealt]

    def classes(self, stage) -> int:
        """Of the softmax in this row of STAGES."""
        return min(stage.classes or self.hp.padded_vocab, self.hp.padded_vocab)

    def spans(self) -> list[tuple[int, int]]:
        """First step of each stage, and the first after it."""
        return [*zip(self.schedule.starts, self.schedule.ends, strict=True)]


# ======================================================================================================================
# What it takes
# ======================================================================================================================


def forward_flop(run: Run, windows: dict[str, int], classes: int) -> dict[str, int]:
    """FLOP a token of the forward pass, by part; backward takes twice as many. windows: tokens, by name.

    2 for each weight that a token is multiplied by. A query meets the keys of its window and its own, in paired layers
    those of two heads, half as far back; as if no document began within. One that may copy meets the keys before it in
    the longest document, half of these on the average. Without what is done number by number.
    """
    program, hp, p = run.train_gpt, run.hp, run.parameters
    layers, C, heads = [layer for layer in program.LAYERS if layer.window], hp.model_dim, hp.num_heads
    banks = (p["narrow_qk_bank" if layer.narrow else "qk_bank"] for layer in layers)
    of_qk, of_vo = sum(heads * bank[0].numel() for bank in banks), 2 * len(layers) * C * C
    flop = {"attention's projections": 2 * (of_qk + of_vo)}
    for name in dict.fromkeys(layer.window for layer in layers):
        widths = sum(1.5 if layer.narrow else 2 for layer in layers if layer.window == name)  # scores, values
        flop[f"attention, {name} windows"] = round(2 * widths * C * (windows[name] + 1))
    flop["MLP"] = 2 * len(program.MLP_LAYERS) * p["mlp_bank"].shape[1:].numel()
    hidden = len(p["gate_in"]) * C + sum(gates_of(run, network) for network in program.NETWORK_LAYERS)
    flop["gates"] = 2 * program.GATE_HIDDEN * hidden
    if hp.copy_width:
        flop["copying's projections"] = 2 * (p["copy_qk"].numel() + p["copy_sentinel"].numel())
        flop["copying, scores"] = hp.copy_width * (hp.train_max_seq_len - 1)
    return flop | {"head": 2 * C * classes}


def gates_of(run: Run, layers) -> int:
    """How many gates a network computes for these layers."""
    return sum(map(len, run.train_gpt.gate_groups(layers, run.hp.num_heads)))


def states_bytes(run: Run, size: int) -> dict[str, int]:
    """What a process holds from beginning to end, by kind, when there are so many of them."""
    gradients = states = 0
    slots = dict(run.slots)
    ngrams = slots.pop("ngrams")
    row = total_bytes(getattr(ngrams.algorithm, name) for name in ngrams.algorithm.row_states)
    looked_up = run.train_gpt.cache_rows(run.hp, run.train_gpt.World(size=size))
    for name, slot in slots.items():
        whole = run.stack(name)[0]
        gradients += whole * slot.p.grad.nbytes
        held = (getattr(slot.algorithm, state) for state in slot.algorithm.states)
        own = whole // size if slot.row.sharded else whole
        states += own * total_bytes(state for state in held if isinstance(state, Tensor))
    yarn = run.train_gpt.Yarn(run.hp.head_dim, 1, torch.device("cpu"))  # of one position; of twice the longest's, GPT's
    positions = 2 * max(*run.micro_batches(1), run.hp.val_batch_size // run.train_gpt.MICRO_BATCHES)
    by_position = positions * total_bytes((yarn.cos, yarn.sin, yarn.position))
    by_token = run.hp.padded_vocab * (run.hp.model_dim * run.dtype.itemsize + 3 * torch.int32.itemsize)
    return {
        "parameters": total_bytes(p for name, p in run.parameters.items() if name != "ngrams"),
        "gradients": gradients,
        "states of the optimizer": states,
        "rows of n-grams, with their states": run.hp.ngram_rows // size * row,
        "those of a step, with their gradients": looked_up * total_bytes((ngrams.p, ngrams.p.grad)),
        "angles, signs, prefixes and spellings": by_position + by_token,
    }


def total_bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def fp8_bytes(run: Run) -> int:
    """The copies of weights in FP8 that the passes of a micro-batch read, each in two orders."""
    program, p, C = run.train_gpt, run.parameters, run.hp.model_dim
    layers = p["mlp_bank"].numel() + len(program.ATTENTION_LAYERS) * 3 * C * C
    return 2 * (layers * ("layers" in run.fp8) + p["embed"].numel() * ("head" in run.fp8))


def kept_bytes(run: Run, stage, tokens: int) -> dict[str, int]:
    """An estimate of what the backward pass of a micro-batch of so many tokens finds kept when it begins, by part.

    Of attention what is projected, q, k, v before and after the norm, and the result; of an MLP its operands, in FP8
    hidden units twice, once transposed; of the stream (T, C) what goes into the compiled regions of a layer and is not
    only added there, and what rows keep; of copying q and k before and after the norm; the logits and their gradient.
    """
    size, C, layers = run.dtype.itemsize, run.hp.model_dim, run.train_gpt.LAYERS
    product, hidden = (1, 2 * run.hp.mlp_ratio) if "layers" in run.fp8 else (size, run.hp.mlp_ratio)
    stream = sum(1 + sum(map(bool, (a.window, a.adds, a.values, a.keep, a.reads))) for a in layers)
    return {
        "attention": tokens * len(run.train_gpt.ATTENTION_LAYERS) * C * (product + 7 * size),
        "MLP": tokens * len(run.train_gpt.MLP_LAYERS) * (1 + hidden) * C * product,
        "stream": tokens * stream * C * size,
        "copying": tokens * 4 * run.hp.copy_width * size,
        "logits": tokens * run.classes(stage) * (size + (2 if "head" in run.fp8 else size)),
    }


def most_kept(run: Run, size: int) -> int:
    """Of the largest micro-batch of each of so many processes; the warm-up takes them over all classes, too."""
    stages = [stage._replace(classes=0) for stage in run.hp.stages]
    return max(sum(kept_bytes(run, *of).values()) for of in zip(stages, run.micro_batches(size), strict=True))


# ======================================================================================================================
# As text
# ======================================================================================================================


def show(train_gpt: ModuleType, arguments: list[str], rank: int) -> None:
    """Prints on rank 0 what --describe asks for; every rank looks at the arguments. Raises UserError."""
    hp, _ = train_gpt.parse_arguments(arguments, has_gpu=True)  # the speedrun's unless told: it is looked at elsewhere
    if rank == 0:
        print(text(train_gpt, hp))


def text(train_gpt: ModuleType, hp) -> str:
    """What --describe prints. Raises UserError."""
    run = Run(train_gpt, hp)
    return "\n\n".join(part(run) for part in (told, layers_told, parameters_told, stages_told, flop_told, memory_told))


def told(run: Run) -> str:
    """The run in two lines."""
    hp, tokens = run.hp, sum(stage.tokens * (end - start) for stage, (start, end) in zip_stages(run))
    products = {0: "the parameters' type", 1: "the parameters' type, of the head in FP8", 2: "FP8"}[len(run.fp8)]
    machine = "on GPUs that have FP8" if run.on_gpu else "on a CPU"
    other = "; without a GPU --preset=smoke runs" * run.on_gpu
    length = f", --length={hp.length:g}" if hp.length != 1 else ""
    return (
        f"{hp.preset}{length}: {hp.total_steps:,} steps, {tokens:,} tokens; {hp.model_dim} wide, {hp.num_heads} heads "
        f"of {hp.head_dim}, a vocabulary of {hp.vocab_size:,}\n"
        f"as {machine}: parameters in {str(run.dtype).removeprefix('torch.')}, products in {products}{other}"
    )


def zip_stages(run: Run):
    return zip(run.hp.stages, run.spans(), strict=True)


def flags(layer) -> list[str]:
    """What a row of LAYERS has switched on, but for the network, which is no part of the layer."""
    return [name for name, value in layer._asdict().items() if value is True and name != "gates"]


def with_gates(gates: dict[str, float]) -> str:
    return " ".join(name + (f"={gate:g}" if gate else "") for name, gate in gates.items()) or "-"


def layers_told(run: Run) -> str:
    rows, networks = [["row", "window and parts", "reads", "values", "adds", "gates", "keep"]], 0
    for i, layer in enumerate(run.train_gpt.LAYERS):
        parts, gates = " ".join([layer.window or "-", *flags(layer)]), "-"
        if layer.gates:
            gates = f"{gates_of(run, run.train_gpt.NETWORK_LAYERS[networks])}"
            networks += 1
        added = with_gates(layer.values), with_gates(layer.adds)
        rows.append([f"{i}", parts, layer.reads or "-", *added, gates, layer.keep or "-"])
    title = (
        "layers, from input to output; gates: how many the row's network gives, which reach up to the next network's"
    )
    return f"{title}\nrow; behind =: a gate's value at the start, where it is not 0\n{aligned(rows, 6)}"


def parameters_told(run: Run) -> str:
    """All of them in the optimizer's order of work, the scalars by name, and sums."""
    hp, rows, sums = run.hp, [["count", "shape", "lr", "decay", "optimizer", "state", "name"]], {}
    for name, slot in run.slots.items():
        row, p, normuon = slot.row, run.parameters[name], slot.row.algorithm == "normuon"
        tall = max(1, p.shape[-2] / p.shape[-1]) ** 0.5 if normuon else 1  # see NorMuon
        base, decay = (hp.muon_lr * tall, hp.muon_wd) if normuon else (hp.adam_lr, hp.adam_wd)
        lrs = " / ".join(f"{base * lr:.4g}" for lr in dict.fromkeys(row.lr))
        betas = " ".join([row.algorithm, *(f"{beta:g}" for beta in row.betas or ())])
        state = ("shared out" if row.sharded else "everywhere") + row.averaged * ", averaged"
        rows.append([f"{p.numel():,}", " x ".join(map(str, p.shape)), lrs, f"{decay * row.wd:.4g}", betas, state, name])
        kind = "in tables looked up by token" if name in run.train_gpt.TABLES else f"others under {row.algorithm}"
        kind = "in rows of n-grams" if row.algorithm == "rowwise" else kind
        sums[kind] = sums.get(kind, 0) + p.numel()
    count, millions = sum(sums.values()), ", ".join(f"{n / 1e6:.1f}M {kind}" for kind, n in sorted(sums.items()))
    scalars = [["count", "start", "lr", "scalar"]]
    for name, (n, start, lr) in run.train_gpt.SCALARS.items():
        scalars.append([f"{n}", f"{start:.4g}", f"{hp.adam_lr * lr:.4g}", name])
    title = "parameters, in the order of their updates; lr and decay are multiplied by the schedule's learning rate"
    return f"{title}\n{aligned(rows, 3)}\n{count:,} parameters: {millions}\n\nlearned scalars\n{aligned(scalars, 1)}"


def first_to_last(values: list[float]) -> str:
    """Of what changes over the steps of a stage."""
    texts = [f"{round(value, 3):g}" for value in values]
    return texts[0] if len({*texts}) == 1 else f"{texts[0]} to {texts[-1]}"


def stages_told(run: Run) -> str:
    """What the schedule has in each stage, at its first and its last step."""
    schedule, hp, steps_of = run.schedule, run.hp, run.spans()
    head = "stage,steps,first,tokens,a micro-batch,in all,short,long,cut at,classes,lr,momentum,loss weights,prefix"
    rows = [head.split(",")]
    for i, (stage, (start, end)) in enumerate(zip(hp.stages, steps_of, strict=True), 1):
        steps = range(start, end)
        row = [
            f"{i}",
            f"{end - start:,}",
            f"{start:,}",
            f"{stage.tokens:,}",
            f"{stage.tokens // run.train_gpt.MICRO_BATCHES:,}",
        ]
        row.append(f"{stage.tokens * (end - start):,}")
        if steps:
            cut, weights = schedule.size(start)[1], [*zip(*map(schedule.target_weights, steps), strict=True)]
            windows = schedule.windows(start)
            row += [f"{windows['short']:,}", f"{windows['long']:,}", f"{cut:,}", f"{run.classes(stage):,}"]
            row += [first_to_last([f(step) for step in steps]) for f in (schedule.lr, schedule.momentum)]
            *ahead, prefix = map(first_to_last, weights)
            row += [", ".join(ahead), prefix if any(stage.prefix) else "-"]
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    validations = {step for step in range(hp.total_steps) if hp.val_loss_every and step % hp.val_loss_every == 0}
    validations |= {*hp.val_steps, hp.total_steps}
    final = schedule.val_windows(hp.total_steps)
    each = ", ".join(f"{i}" for i, stage in enumerate(hp.stages, 1) if stage.adam == 1)
    in_each = f"in each step of stage {each}, elsewhere " if each else ""
    return (
        f"stages; the last is the extension\n{aligned(rows, 4)}\n"
        f"momentum {schedule.warmup:,} steps up, the last {schedule.cooldown:,} down; averages over the last "
        f"{schedule.averaged:,}\n"
        f"Adam updates {in_each}in every second\n"
        f"{len(validations)} validations of {hp.val_tokens:,} tokens, the last with windows of {final['short']:,} and "
        f"{final['long']:,}"
    )


def flop_told(run: Run) -> str:
    """By part and stage, and of the final validation."""
    hp, schedule = run.hp, run.schedule
    windows = [schedule.window_tokens(stage.short_window, stage.long_window) for stage in hp.stages]
    columns = [
        {part: 3 * flop for part, flop in forward_flop(run, w, run.classes(stage)).items()}
        for stage, w in zip(hp.stages, windows, strict=True)
    ]
    whole = sum(
        stage.tokens * (end - start) * sum(column.values())
        for (stage, (start, end)), column in zip(zip_stages(run), columns, strict=True)
    )
    columns.append(forward_flop(run, schedule.val_windows(hp.total_steps), hp.padded_vocab))
    unit, name = (1e6, "MFLOP") if sum(columns[0].values()) > 1e8 else (1e3, "kFLOP")
    rows = [[*(f"stage {i}" for i in range(1, len(columns))), "validation", "part"]]
    rows += [[*(f"{column[part] / unit:,.1f}" for column in columns), part] for part in columns[0]]
    rows.append([*(f"{sum(column.values()) / unit:,.1f}" for column in columns), "together"])
    return (
        f"{name} a token: products forward and, counted as twice that, backward; validation forward. Every document is "
        f"taken\nto be longer than the windows, which is more than is computed\n{aligned(rows, 1)}\n"
        f"{whole:.4g} FLOP in training"
    )


def memory_told(run: Run) -> str:
    """States by number of processes, an estimate of a micro-batch by stage, and the most of both."""
    columns = [states_bytes(run, size) for size in SIZES]
    for column in columns:
        column["weights in FP8"] = fp8_bytes(run)
    kept = [*map(partial(kept_bytes, run), run.hp.stages, run.micro_batches(1))]
    most = [most_kept(run, size) for size in SIZES]
    unit, name = (2**30, "GiB") if most[0] > 2**30 else (2**20, "MiB")
    rows = [[*(f"{size}" for size in SIZES), f"processes, {name} on each"]]
    rows += [[*(f"{column[part] / unit:.2f}" for column in columns), part] for part in columns[0]]
    with_most = (f"{(sum(column.values()) + more) / unit:.2f}" for column, more in zip(columns, most, strict=True))
    rows.append([*with_most, "with the largest micro-batch"])
    batches = [[*(f"stage {i}" for i in range(1, len(kept) + 1)), f"a micro-batch of one process, {name}, estimated"]]
    batches.append([*(f"{tokens:,}" for tokens in run.micro_batches(1)), "tokens"])
    batches += [[*(f"{parts[part] / unit:.2f}" for parts in kept), part] for part in kept[0]]
    batches.append([*(f"{sum(parts.values()) / unit:.2f}" for parts in kept), "together"])
    title = "memory; a micro-batch is an estimate of what forward keeps for backward; allocator and libraries take more"
    note = "" if run.on_gpu else "\n(on a CPU attention's scores of all pairs come on top)"
    return f"{title}{note}\n{aligned(rows, 1)}\n\n{aligned(batches, 1)}"


# ======================================================================================================================
# As pictures
# ======================================================================================================================

# SVGs written as those of records/picture.py: alike to the byte on every machine, light or dark as the reader's page.

INKS = ("ours", "other0", "other1", "other2")  # of records/picture.py; what is more than these takes them again
CENTERED, BOLD, SMALL = 'text-anchor="middle"', ' font-weight="bold"', ' font-size="12"'
ATTENTION, SWITCHES, MLP, LANES, RIGHT = 72, 186, 426, 512, 828  # x of the columns of architecture.svg
PITCH = 38  # from row to row
ARCHITECTURE = """{hp.model_dim} wide, {hp.num_heads} heads of {hp.head_dim}. {windows}. Lines at the right: an output
that a row keeps (dot), or that is made of the input, down to the rows that use it: r attention reads it instead of the
stream, v it is added to the values, + to the stream, each times a gate, whose value at the start is given where it is
not 0. Bars at the left: rows whose gates one network computes, from the stream at the bar's upper end."""


def architecture_svg(run: Run) -> str:
    """Rows of LAYERS from input to output; at the right a lane for each output that is read or added further down."""
    layers, hp = run.train_gpt.LAYERS, run.hp
    end = row_y(len(layers))  # the last row of all is what follows the layers, as the first is what precedes them
    head = head_lines("Architecture, from input to output", ARCHITECTURE.format(hp=hp, windows=windows_told(run)))
    top = 62 + 17 * len(head)
    lines = [
        *picture.sheet(top + round(end) + PITCH, "Architecture"),
        *head,
        f'<g transform="translate(0 {top})">',
        *(picture.rule(34, y - PITCH / 2, RIGHT, y - PITCH / 2, "grid") for y in map(row_y, range(len(layers) + 1))),
        picture.rule(60, row_y(-1), 60, end, "ink", ' stroke-width="2"'),
    ]
    copying = f", mixed with copying {hp.copy_width} wide" if hp.copy_width else ""
    for y, words in ((row_y(-1), "embeddings, normed"), (end, f"norm, head: {hp.padded_vocab:,} logits{copying}")):
        lines += [
            picture.rule(60, y, ATTENTION, y, "ink", ' stroke-width="2"'),
            *box(ATTENTION, y, 406, words, "quiet"),
        ]
    networks = [i for i, layer in enumerate(layers) if layer.gates]
    for begin, stop in zip(networks, [*networks[1:], len(layers)], strict=True):
        height = PITCH * (stop - begin) - 10
        lines.append(f'<rect class="quiet" x="16" y="{row_y(begin) - 14:.1f}" width="6" height="{height}" rx="3"/>')
    lines += layer_columns(layers) + lane_columns(layers)
    return "\n".join([*lines, "</g></svg>", ""])


def row_y(i: int) -> float:
    """The middle of a row of LAYERS in the picture."""
    return PITCH * (i + 1.5)


def layer_columns(layers) -> list[str]:
    """What each row does: attention, its switches, the MLP."""
    names = [name for name, value in layers[0]._asdict().items() if isinstance(value, bool)]
    names = [name for name in names if name not in ("mlp", "gates")]  # these have a place of their own
    x = {name: SWITCHES + (MLP - SWITCHES) * (i + 0.5) / len(names) for i, name in enumerate(names)}
    lines = [picture.text(ATTENTION + 50, 0, "attention", "quiet", CENTERED + SMALL)]
    lines.append(picture.text(MLP + 26, 0, "MLP", "quiet", CENTERED + SMALL))
    for name in names:
        words = name.split("_")
        for i, word in enumerate(words):
            lines.append(picture.text(x[name], -14 * (len(words) - 1 - i), word, "quiet", CENTERED + SMALL))
    for i, layer in enumerate(layers):
        y = row_y(i)
        lines.append(picture.text(50, y + 4, f"{i}", "quiet", 'text-anchor="end"' + SMALL))
        if layer.window:
            lines.append(picture.rule(60, y, ATTENTION, y, "ink", ' stroke-width="2"'))
            lines += box(ATTENTION, y, 100, f"{layer.window} window", "ours", filled=layer.window == "long")
        lines += [disc(x[name], y, "ours", 5) for name in names if getattr(layer, name)]
        lines += box(MLP, y, 52, "MLP", "other1") if layer.mlp else []
    return lines


def lane_columns(layers) -> list[str]:
    """For each kept output, first the input's, a line from where it is made down to the last row that uses it."""
    kept = {layer.keep: i for i, layer in enumerate(layers) if layer.keep}
    used = dict.fromkeys(name for a in layers for name in (a.reads, *a.values, *a.adds) if name)
    made = {name: -1 for name in used if name not in kept} | kept
    inks, lines = iter(INKS * len(kept)), []
    for number, (name, begin) in enumerate(made.items()):
        room, ink = (RIGHT - LANES) / len(made), next(inks) if begin >= 0 else "quiet"
        x, size = LANES + room * (number + 0.5), f' font-size="{min(13, room / 4):g}"'
        uses = {i: a for i, a in enumerate(layers) if name in (a.reads, *a.values, *a.adds)}
        lines.append(picture.text(x, 0, name, ink, CENTERED + size + BOLD))
        lines.append(picture.rule(x, row_y(begin), x, row_y(max([begin, *uses])), ink, ' stroke-width="2"'))
        lines.append(disc(x, row_y(begin), ink, 6))
        for i, layer in uses.items():
            marks = "r" * (name == layer.reads) + "v" * (name in layer.values) + "+" * (name in layer.adds)
            width, y = 12 + 8 * len(marks), row_y(i)
            lines += box(x - width / 2, y, width, " ".join(marks), ink, height=20)
            gates = " ".join(f"{gates[name]:g}" for gates in (layer.values, layer.adds) if gates.get(name))
            lines += [picture.text(x + width / 2 + 2, y + 16, gates, "quiet", 'font-size="10"')] if gates else []
    return lines


def windows_told(run: Run) -> str:
    """Of each kind, by stage and in the last validation."""
    schedule, steps = run.schedule, [start for start, end in run.spans() if start < end]
    final = schedule.val_windows(run.hp.total_steps)
    kinds = (f"{kind} {', '.join(f'{schedule.windows(step)[kind]:,}' for step in steps)}" for kind in final)
    last = " and ".join(f"{window:,}" for window in final.values())
    return f"Windows in tokens, by stage: {'; '.join(kinds)}; at the end {last}"


def head_lines(title: str, words: str) -> list[str]:
    """A picture's title, and what it shows."""
    lines = [picture.text(20, 28, title, "ink", 'font-size="16"' + BOLD)]
    return lines + [picture.text(20, 50 + 17 * i, line, "quiet", SMALL) for i, line in enumerate(wrap(words, 116))]


def box(x: float, y: float, width: float, words: str, ink: str, filled: bool = False, height: float = 26) -> list[str]:
    """Around words, from x on; y is its middle."""
    fill, letters = (ink, "paper") if filled else ("paper", ink)
    size = f'x="{x:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" height="{height:.1f}" rx="6"'
    return [
        f'<rect class="{fill} {ink}-line" {size} stroke-width="1.5"/>',
        picture.text(x + width / 2, y + 4.5, words, letters, CENTERED),
    ]


def disc(x: float, y: float, ink: str, radius: float) -> str:
    return f'<circle class="{ink}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


class Line(NamedTuple):
    """Of the plot: its value in each step, None where there is none; in the last validation, if that differs."""

    name: str
    values: list[float | None]
    final: float | None = None


def schedule_svg(run: Run) -> str:
    """What changes with the step, panels above each other; stages are marked."""
    total, height, lines, extension = run.hp.total_steps, 88, [], run.spans()[-1]
    for i, (title, curves) in enumerate(curves_of(run).items()):
        found = [v for curve in curves for v in (*curve.values, curve.final) if v is not None]
        low, high = min(found), max(found)
        low = 0 if low < high / 2 else low - 0.15 * (high - low or high)
        panel = picture.Panel(72, 112 + i * (height + 40), 748, height, (0, total), (low, high + 0.1 * (high - low)))
        lines += panel_lines(run, panel, title, curves)
    bottom = panel.top + height
    for step in picture.ticks(0, total):
        lines.append(picture.text(panel.x(step), bottom + 18, f"{step:,g}", "quiet", CENTERED + SMALL))
    lines.append(picture.text(panel.left + panel.width, bottom + 36, "step", "quiet", 'text-anchor="end"' + SMALL))
    for i, (start, end) in enumerate(run.spans(), 1):
        wide = panel.x(end) - panel.x(start)
        name = next((name for name, room in ((f"stage {i}", 60), (f"{i}", 12)) if wide > room), "")
        lines.append(picture.text(panel.x((start + end) / 2), 78, name, "ink", CENTERED + BOLD))
    told = f"{total:,} steps, of which {extension[1] - extension[0]:,} of the last stage, the extension"
    return "\n".join([*picture.sheet(bottom + 52, "Schedule"), *head_lines("Schedule", told), *lines, "</svg>", ""])


def curves_of(run: Run) -> dict[str, list[Line]]:
    """By panel."""
    schedule, steps = run.schedule, range(run.hp.total_steps)
    final, windows = schedule.val_windows(run.hp.total_steps), [*map(schedule.windows, steps)]
    weights, counts = [*map(schedule.target_weights, steps)], [len(schedule.stage(s).target_weights) for s in steps]
    most = range(max(counts))
    targets = [
        Line(f"token {k + 1} ahead", [w[k] if k < n else None for w, n in zip(weights, counts, strict=True)])
        for k in most
    ]
    prefixes = [w[-1] if any(schedule.stage(s).prefix) else None for s, w in zip(steps, weights, strict=True)]
    targets += [Line("prefix", prefixes)] if any(prefixes) else []
    return {
        "learning rate, times each parameter's own": [Line("", [*map(schedule.lr, steps)])],
        "momentum of NorMuon": [Line("", [*map(schedule.momentum, steps)])],
        "tokens a step": [Line("", [schedule.stage(step).tokens for step in steps])],
        "attention windows, tokens (dots: last validation)": [
            *(Line(kind, [at[kind] for at in windows], window) for kind, window in final.items()),
            Line("documents are cut at", [schedule.size(step)[1] for step in steps]),
        ],
        "weights of the loss": targets,
    }


def panel_lines(run: Run, panel, title: str, curves: list[Line]) -> list[str]:
    """A panel with its grid, stages, curves and their names."""
    right, bottom, marks = panel.left + panel.width, panel.top + panel.height, picture.ticks(*panel.losses)
    lines = []
    for value in marks[:: 1 + len(marks) // 7]:
        lines.append(picture.rule(panel.left, panel.y(value), right, panel.y(value), "grid"))
        number = f"{value:,.10g}"
        lines.append(picture.text(panel.left - 8, panel.y(value) + 4, number, "quiet", 'text-anchor="end"' + SMALL))
    for start, end in run.spans():
        if 0 < start < end:
            x = panel.x(start)
            lines.append(picture.rule(x, panel.top - 6, x, bottom, "quiet", ' stroke-dasharray="3 3"'))
    lines.append(picture.text(panel.left, panel.top - 10, title, "ink", SMALL))
    x = right - sum(34 + 6.6 * len(curve.name) for curve in curves if curve.name)
    for i, curve in enumerate(curves):
        ink = INKS[i % len(INKS)]
        for part in polylines(curve.values):
            points = " ".join(f"{panel.x(step):.1f},{panel.y(value):.1f}" for step, value in part)
            lines.append(f'<polyline class="{ink}-line" fill="none" stroke-width="2.2" points="{points}"/>')
        lines += [disc(right, panel.y(curve.final), ink, 4)] if curve.final is not None else []
        if curve.name:
            lines.append(picture.rule(x, panel.top - 14, x + 16, panel.top - 14, ink, ' stroke-width="2.2"'))
            lines.append(picture.text(x + 20, panel.top - 10, curve.name, "ink", SMALL))
            x += 34 + 6.6 * len(curve.name)
    return lines


def polylines(values: list[float | None]) -> list[list[tuple[int, float]]]:
    """Corners of the line through the values by step, the last of which lasts a step; None parts it into pieces."""
    pieces, points = [], [*enumerate(values)]
    for present, group in groupby([*points, (len(values), values[-1])], lambda point: point[1] is not None):
        piece = [*group]
        inner = (
            b
            for a, b, c in zip(piece, piece[1:], piece[2:], strict=False)
            if abs((c[1] - b[1]) - (b[1] - a[1])) > 1e-9 * max(1, abs(b[1]))
        )
        if present:
            pieces.append([piece[0], *inner, piece[-1]])
    return pieces


def main(arguments: list[str] | None = None) -> int:
    form = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    form.add_argument("--out", type=Path, default=RECORDS, metavar="FOLDER", help="where to (default %(default)s)")
    options, others = form.parse_known_args(arguments)
    sys.path.insert(0, str(RECORDS.parent))
    import train_gpt

    try:
        run = Run(train_gpt, train_gpt.parse_arguments(others, has_gpu=True)[0])
        for name, svg in (("architecture.svg", architecture_svg(run)), ("schedule.svg", schedule_svg(run))):
            (options.out / name).write_bytes(svg.encode())
    except (OSError, train_gpt.UserError) as problem:
        said = f"{problem.filename}: {problem.strerror}" if isinstance(problem, OSError) else str(problem)
        print(f"describe.py: {said}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
