"""train_gpt.py, small, with something going wrong: python tests/fault_run.py FAULT RANK STEP [--name=value ...]

The fault happens on one rank at the beginning of a step of the run (STEPS in all). DATA_PATH must name a folder that
small_run.write_text has filled for SMALL_VOCABULARY; a step takes some hundredths of a second. With --preset=real the
run takes the speedrun's path on a GPU, for which the text must be of REAL_SCALE and GPT-2's vocabulary.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from small_run import FILES, SMALL, SMALL_VOCABULARY

import train_gpt

# In FP8, micro-batches are multiples of 16 tokens.
CHANGES = dict(**FILES, **SMALL, **SMALL_VOCABULARY, val_loss_every=5, adam_lr=0.03, fp8="off")
# Of every stage the same shapes, as each takes compiled code of its own.
REAL = dict(
    stages=tuple(s._replace(tokens=8 * 256, classes=s.classes and 4096) for s in SMALL["stages"]),
    micro_batch_tokens=512,
    num_scheduled_iterations=12,
    num_extension_iterations=2,
    head_dim=64,
    window_block=32,
    copy_width=32,
    ngram_rows=4096,
    adam_lr=0.01,
    val_tokens=4096,
    val_batch_size=4096,
    val_loss_every=0,
    val_steps=(0, 1, 2, 3, 4, 6, 8, 10, 12),
    **dict(fp8="auto", cuda_graphs="auto", compile="on"),
    **{name: getattr(train_gpt.Hyperparameters, name) for name in SMALL_VOCABULARY},
)
REAL_STEPS, REAL_SCALE = 14, 7
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.11 GiB of which 1.31 GiB is free."


def send(number):
    return lambda trainer: os.kill(os.getpid(), number)


def raise_bug(trainer):
    raise ValueError("a bug in this rank alone")


def run_out_of_gpu_memory(trainer):
    raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def fill_the_gpu(trainer):
    free, _ = torch.cuda.mem_get_info()
    torch.empty(free + torch.cuda.memory_reserved() + 2**30, dtype=torch.uint8, device="cuda")


def run_out_of_memory(trainer):
    torch.empty(1 << 60, dtype=torch.uint8)


def poison(trainer):
    with torch.no_grad():
        trainer.model.mlp_bank[3, 0, 0, 0] = float("nan")


def poison_gradient(trainer):
    trainer.model.ngrams.grad[5, 3] = float("inf")


def lose_the_next_shard(trainer):
    for path in Path(os.environ["DATA_PATH"]).glob("train_*.bin"):
        path.unlink()


def change_the_next_shard(trainer):
    for path in Path(os.environ["DATA_PATH"]).glob("train_*.bin"):
        path.touch()


def lose_the_vocabulary(trainer):
    Path(trainer.hp.vocabulary).unlink()


def lose_the_tools(trainer):
    train_gpt.__file__ = "/nowhere/train_gpt.py"  # as of a copy without records/


def stall_file_system(trainer):
    train_gpt.read_tokens = lambda *arguments: time.sleep(1e6)


FAULTS = {
    "none": lambda trainer: None,
    "die": send(signal.SIGKILL),
    "freeze": send(signal.SIGSTOP),
    "terminate": send(signal.SIGTERM),
    "wait": lambda trainer: time.sleep(1e6),
    **{
        f.__name__: f
        for f in (
            *(raise_bug, run_out_of_gpu_memory, fill_the_gpu, run_out_of_memory, poison, poison_gradient),
            *(lose_the_next_shard, change_the_next_shard, lose_the_vocabulary, lose_the_tools, stall_file_system),
        )
    },
}


def main(fault, rank, step, *arguments):
    presets = train_gpt.PRESETS
    presets["smoke"].update(CHANGES)
    presets["real"] = {**presets["smoke"], **REAL}
    if torch.cuda.device_count():  # attention's kernels take queries from 16 wide, in narrow layers half as wide as D
        presets["smoke"].update(head_dim=32)
    train_gpt.parse_arguments([], has_gpu=False)
    add_gradients, run = train_gpt.Trainer.add_gradients, train_gpt.Trainer.run
    on_the_clock = []

    def faulty_step(self, at, batch):
        if on_the_clock and at == int(step) and self.world.rank == int(rank):
            FAULTS[fault](self)
        add_gradients(self, at, batch)

    def noted_run(self, *arguments):
        on_the_clock.append(True)
        return run(self, *arguments)

    train_gpt.Trainer.add_gradients, train_gpt.Trainer.run = faulty_step, noted_run
    train_gpt.main([*arguments])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
