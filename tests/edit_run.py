"""Two steps of edited copies of train_gpt.py, on one process and on eight:

python tests/edit_run.py FOLDER PORT

FOLDER holds a folder with a train_gpt.py for each edit, and the shards of small_run.write_text. What a process found in
each goes to FOLDER/<size>_<rank>.pt.
"""

import importlib
import os
import sys
from itertools import count
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "records"))

import checks
import torch

SIZE = 8
BOS = 300  # small_run's text has the tokens below


COPIES = count()


def load(path: Path):
    """The module at the path, as the one that everything imported later takes for train_gpt."""
    module = sys.modules["train_gpt"] = ModuleType("train_gpt")
    module.__file__ = str(path)
    # Operators of its own: PyTorch takes away those of which it is given a second definition.
    source = path.read_text().replace('"speedrun_', f'"copy{next(COPIES)}_')
    exec(compile(source, path, "exec"), vars(module))
    return module


def two_steps(program, world, folder: Path) -> dict:
    """The first step of a run and its last odd one, in the stage that the run has come to; Adam steps on both."""
    sys.modules["train_gpt"] = program
    import small_run

    small_run = importlib.reload(small_run)  # its sizes are made from the tables
    hp = small_run.small_hyperparameters(  # eps: Adam's steps are to be as long as its learning rate
        folder, vocab_size=BOS + 1, bos=BOS, val_tokens=256, vocabulary="", adam_eps=1e-6
    )
    checks.check_hyperparameters(program, hp)
    trainer = program.Trainer(hp, world)
    trainer.model.prefixes[: BOS // 2] = torch.arange(1, BOS // 2 + 1)  # as if there were a vocabulary
    val_batches = program.validation_batches(program.find_files(hp.val_files), hp, world)
    windows = trainer.schedule.window_tokens(*program.FINAL_WINDOWS)
    losses = [trainer.validate(val_batches, windows)]
    steps = [0, (hp.total_steps - 2) | 1]
    sizes = [trainer.schedule.size(step) for step in steps]
    loader = program.TrainLoader(program.find_files(hp.train_files), sizes, hp, world)
    values = [trainer.model.scalars.detach().clone()]
    for step, batch in zip(steps, loader, strict=True):
        trainer.enter_step(step)
        trainer.add_gradients(step, batch)
        trainer.update(step)
        values.append(trainer.model.scalars.detach().clone())
    losses.append(trainer.validate(val_batches, windows))
    moved = torch.stack(values).diff(dim=0).split([count for count, *_ in program.SCALARS.values()], dim=1)
    return dict(
        losses=losses,
        digest=small_run.digest(small_run.parameters(trainer)),
        stages=[len(hp.stages), trainer.stage_index],
        layers=len(program.LAYERS),
        scalars=dict(zip(program.SCALARS, moved, strict=True)),
        algorithms={name: type(slot.algorithm).__name__ for name, slot in trainer.optimizer.slots.items()},
    )


def main(folder: Path, port: str) -> None:
    torch.set_num_threads(1)
    programs = {path.parent.name: load(path) for path in sorted(folder.glob("*/train_gpt.py"))}
    # Forked, so that eight processes import PyTorch and the copies once; the parent is the process that runs alone.
    ranks = []
    while len(ranks) < SIZE and (child := os.fork()):
        ranks.append(child)
    alone = len(ranks) == SIZE
    world = next(iter(programs.values())).World(*(0, 1) if alone else (len(ranks), SIZE))
    if not alone:
        os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(SIZE), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        world.start()
    found = {name: two_steps(program, world, folder) for name, program in programs.items()}
    torch.save(found, folder / f"{world.size}_{world.rank}.pt")
    if alone:
        sys.exit(any([os.waitpid(child, 0)[1] for child in ranks]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
