"""A run of ten steps in a few seconds, for tests; as a program, one process of it:

python tests/small_run.py FOLDER DTYPE

with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment, writes what it found to FOLDER/<size>_<rank>.pt.
"""

import hashlib
import os
import random
import sys
from dataclasses import replace
from itertools import pairwise, zip_longest
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shard_files import BOS, write_shard

import train_gpt
from train_gpt import (
    FINAL_WINDOWS,
    STAGES,
    Hyperparameters,
    Layer,
    Trainer,
    TrainLoader,
    World,
    find_files,
    parse_arguments,
    prefix_table,
    validation_batches,
)

STEPS = 10
FILES = dict(train_files="train_*.bin", val_files="val_*.bin")
SMALL = dict(
    stages=tuple(
        stage._replace(share=stage.share and 1, tokens=8 * min(16 + 8 * i, 32)) for i, stage in enumerate(STAGES)
    ),
    micro_batch_tokens=96,  # four of 16 and 24 tokens are joined, two of 32, as far as a rank has them
    num_scheduled_iterations=9,
    num_extension_iterations=1,
    average_frac=0.9,  # of 10 steps: after the 2nd, the 6th and the last
    adam_eps=1e-5,  # else a gradient of 1e-7, rounded otherwise on another number of ranks, steps as far the other way
    muon_momentum_warmup=4,
    muon_momentum_cooldown=2,
    window_block=4,
    num_heads=2,
    ngram_rows=512,
    val_tokens=512,
    val_batch_size=256,
)


GPT2_VOCABULARY = Path(train_gpt.__file__).resolve().parent / "data" / "gpt2.tiktoken"
# Its first tokens, among them all that write_text takes: with all of them a small run takes half as long again.
SMALL_VOCABULARY = dict(vocab_size=512, bos=511, vocabulary="small.tiktoken")
STATES = dict(adam=("m", "v", "updates"), normuon=("m", "second_moment", "low_bits"), rowwise=("v", "last", "updates"))


def write_text(folder: Path, bos: int = BOS, scale: int = 1) -> None:
    """Shards of documents of random lengths, in which few of the vocabulary's tokens occur: soon learned.

    scale: by what shards and documents are longer than for micro-batches of 16 to 32 tokens.
    """
    generator = random.Random(0)

    def text(tokens: int) -> list[int]:
        out = []
        while len(out) < tokens:
            out += [bos, *(int(generator.paretovariate(0.7)) % 300 for _ in range(generator.randint(2, 40 * scale)))]
        return out

    write_shard(folder / "train_1.bin", text(2500 * scale))
    write_shard(folder / "train_2.bin", text(2500 * scale))
    write_shard(folder / "val_0.bin", text(600 * scale))


def write_vocabulary(folder: Path) -> None:
    """SMALL_VOCABULARY's file."""
    lines = GPT2_VOCABULARY.read_text().splitlines(keepends=True)
    (folder / SMALL_VOCABULARY["vocabulary"]).write_text("".join(lines[: SMALL_VOCABULARY["bos"]]))


def small_hyperparameters(folder: Path, **overrides) -> Hyperparameters:
    """The smoke run's code path with micro-batches of 16 to 32 tokens and a model 16 wide."""
    hp, _ = parse_arguments(["--preset=smoke", f"--log_dir={folder}", "--run_id=small"], has_gpu=False)
    files = {name: str(folder / pattern) for name, pattern in FILES.items()}  # absolute: not below the program's folder
    return replace(hp, **{**SMALL, **files, "val_loss_every": 0, **overrides})


def record_gradients(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """Fills up with the first two gradients (of this rank's slices) that the optimizer updates with, by parameter."""
    gradients, table = {name: [] for name in trainer.optimizer.slots}, trainer.ngrams.algorithm.p
    for name, slot in trainer.optimizer.slots.items():

        def reduced(reduced=slot.communication.reduced, name=name):
            gradient = reduced()
            if len(gradients[name]) < 2:
                dense = gradient if isinstance(gradient, torch.Tensor) else spread(gradient, len(table))
                gradients[name].append(dense.detach().clone())
            return gradient

        slot.communication.reduced = reduced
    return gradients


def spread(gradient: tuple[torch.Tensor, torch.Tensor], count: int) -> torch.Tensor:
    """As a dense one, with zeros where there is no row."""
    rows, values = gradient
    dense = values.new_zeros(count, values.shape[1])
    dense[rows] = values
    return dense


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of all of them, of the table of n-grams the rows of all ranks."""
    whole = trainer.ngrams.communication.full(trainer.ngrams.algorithm.p)
    return {name: p.detach().clone() for name, p in (*trainer.model.named_parameters(), ("ngrams", whole))}


def digest(parameters: dict[str, torch.Tensor]) -> str:
    """Of every bit of them."""
    total = hashlib.sha256()
    for _, p in sorted(parameters.items()):
        total.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def train(hp: Hyperparameters, world: World) -> dict:
    """What a test may ask about a run of all steps."""
    trainer = Trainer(hp, world)
    trainer.model.prefixes.copy_(prefix_table(hp))
    found = dict(begin=parameters(trainer))
    found["begin_digest"] = digest(found["begin"])
    found["gradients"] = record_gradients(trainer)
    found["inputs"] = []
    val_batches = validation_batches(find_files(hp.val_files), hp, world)
    windows = trainer.schedule.window_tokens(*FINAL_WINDOWS)
    found["losses"] = [trainer.validate(val_batches, windows)]
    sizes = [trainer.schedule.size(step) for step in range(hp.total_steps)]
    batches = [*TrainLoader(find_files(hp.train_files), sizes, hp, world)]
    for step, (batch, following) in enumerate(zip_longest(batches, batches[1:])):
        found["inputs"].append([micro_batch.inputs for micro_batch in batch.micro_batches])
        trainer.enter_step(step)
        trainer.add_gradients(step, batch)
        trainer.update(step, following if step % 3 else None)  # whether it is known makes no difference
    found["losses"].append(trainer.validate(val_batches, windows))
    found["end"] = parameters(trainer)
    found["end_digest"] = digest(found["end"])
    found["state"] = {}
    for name, slot in trainer.optimizer.slots.items():
        found["state"][name] = {state: getattr(slot.algorithm, state) for state in STATES[slot.row.algorithm]}
    return found


def tables_of(layers: list[Layer]) -> dict[str, object]:
    """What the program makes of a table of layers, by name."""
    places = dict(ATTENTION_LAYERS="window", VALUE_LAYERS="value_embed", MLP_LAYERS="mlp")
    tables = {name: [i for i, a in enumerate(layers) if getattr(a, column)] for name, column in places.items()}
    networks = [*(i for i, a in enumerate(layers) if a.gates), len(layers)]
    tables["NETWORK_LAYERS"] = [tuple(layers[begin:end]) for begin, end in pairwise(networks)]
    scalars = {name: (len(layers) if n > 1 else 1, *rest) for name, (n, *rest) in train_gpt.SCALARS.items()}
    lrs = tuple(lr for n, _, lr in scalars.values() for _ in range(n))
    rows = tuple(row._replace(lr=lrs) if row.name == "scalars" else row for row in train_gpt.PARAMETERS)
    return dict(tables, LAYERS=tuple(layers), SCALARS=scalars, SCALAR_LRS=lrs, PARAMETERS=rows)


def main(folder: Path, dtype: str) -> None:
    torch.set_num_threads(1)
    world = World.from_environment()
    world.start()
    # On a GPU as on a CPU: without compiling, and FP8 takes micro-batches of multiples of 16 tokens.
    found = train(small_hyperparameters(folder, dtype=dtype, compile="off", fp8="off"), world)
    if world.rank:
        found.update(begin=None, end=None)  # the digest tells whether they are the same
    temporary = folder / f"{world.rank}.part"
    torch.save(found, temporary)
    temporary.rename(folder / f"{world.size}_{world.rank}.pt")
    if world.size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), *sys.argv[2:])
