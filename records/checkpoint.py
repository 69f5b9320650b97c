"""
What a killed run goes on from, and what a trained model leaves: checkpoints.

    python train_gpt.py --run_id=mine --checkpoint_every=100     # also one at SIGTERM, where the run then ends
    python train_gpt.py --resume=mine                            # goes on with the newest sound one
    python train_gpt.py --save_checkpoint=true                   # at the end: the model alone

It is loaded by train_gpt.py for these three arguments, and by records/sample.py to read what they leave.

A run that was killed goes on to the same bits as one that was not, on any number of GPUs. A file is written under
another name, forced to the disk, then renamed: under its own name it is whole, which its checksum proves. The table
of n-grams is in as many pieces as there may be ranks, each a file that its owner writes; the checkpoint comes last,
and has their checksums.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from glob import escape
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from checks import check_hyperparameters, shard_in_words, vocabulary_in_words
from guard import Watch
from torch import Tensor

import train_gpt
from train_gpt import (
    FILES,
    MICRO_BATCHES,
    PARAMETERS,
    PRESETS,
    SETTINGS,
    BetweenSteps,
    Hyperparameters,
    Log,
    Optimizer,
    Progress,
    RowAdam,
    Trainer,
    UserError,
    World,
    require,
)

CHECKPOINT = dict(step=int, hyperparameters=dict, stages=list, shards=dict, progress=dict, vocabulary=str, rows=list)
CHECKPOINT |= dict(model=dict, optimizer=dict)
CHECKPOINTS_KEPT = 2
# What may differ when a run goes on: where things are, and what leaves the mathematics alone, up to rounding.
FREE_ON_RESUME = {"resume", "log_dir", "train_files", "val_files", "vocabulary", "checkpoint_every", "save_checkpoint"}
FREE_ON_RESUME |= {"hang_timeout", "cuda_graphs", "compile", "micro_batch_tokens"}


def checkpoints_of(run_id: str, folder: Path, suffix: str = "pt") -> list[Path]:
    """The files of a run's checkpoints in the folder, the newest last."""
    return sorted(folder.glob(f"{escape(run_id)}_step{6 * '[0-9]'}.{suffix}"))


def piece_paths(path: Path) -> list[Path]:
    """A checkpoint's pieces of the table of n-grams, in the order of its rows."""
    return [path.with_name(f"{path.stem}_rows{k}.pt") for k in range(MICRO_BATCHES)]


# ---------------------------------------------------------------------------- a run that writes them


class Checkpoints:
    """Those that a run writes, and its end at one of them when a signal asks for it; every rank has one.

    files: by hyperparameter, the run's.
    """

    def __init__(self, hp: Hyperparameters, world: World, files: dict[str, list[Path]]):
        self.shards = {name: [shard_in_words(train_gpt, path) for path in paths] for name, paths in files.items()}
        self.vocabulary = vocabulary_in_words(train_gpt, hp)  # what the run begins with: its file may go meanwhile
        self.asked = None
        # Whether to stop is agreed upon between CPUs, beside NCCL, and only where a stop leaves a checkpoint.
        self.side = dist.new_group(backend="gloo") if world.size > 1 and hp.checkpoint_every else None

    def at(self, step: int, between: BetweenSteps) -> None:
        """What is due when `step` steps are done: a checkpoint, and after a signal the end of the run."""
        trainer, now, every = between.trainer, between.now, between.hp.checkpoint_every
        # Only after an even number of steps: else a gradient that waits for Adam would be lost.
        if not every or step % 2:
            return
        stop = self.agree_to_stop(between.watch)
        if step >= now.step + every or (stop and step > now.step):
            with between.off_the_clock():
                now.step, now.elapsed = step, between.clock.elapsed
                self.save(trainer, between.log, now)
                if self.side:
                    dist.barrier(group=self.side)  # all wait off the clock while rank 0 writes
        if stop:
            self.stop_here(step, between.watch)

    def agree_to_stop(self, watch: Watch) -> bool:
        """Whether a rank had been asked to stop when this was called before: the same answer on all, and none waits."""
        if not self.side:
            return bool(watch.stop)
        asked, flag = self.asked, torch.tensor([bool(watch.stop)], dtype=torch.uint8)
        self.asked = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.side, async_op=True), flag
        return bool(asked and asked[0].wait() and asked[1])

    def stop_here(self, step: int, watch: Watch) -> None:
        """Ends all processes, after the checkpoint of this step. It does not return."""
        if self.side:
            dist.barrier(group=self.side)  # torchrun ends all when one has ended: rank 0 writes first
        run_id, folder = watch.log.path.stem, watch.log.path.parent
        then = f"go on with --resume={run_id}" if checkpoints_of(run_id, folder) else "there is no checkpoint"
        watch.end(143, f"train_gpt.py: {watch.stop or 'a signal to another rank'}: stopped at step {step}; {then}")

    def save(self, trainer: Trainer, log: Log, progress: Progress | None = None) -> None:
        """Writes the model, and with `progress` all it takes to go on, beside the log; every rank must call it.

        torch.load(path, weights_only=True) reads the files. The newest two are kept. If writing fails, the log says so.
        """
        hp, step = trainer.hp, progress.step if progress else trainer.hp.total_steps
        path = log.path.with_name(f"{hp.run_id}_step{step:06d}.pt")
        optimizer = optimizer_state(trainer.optimizer) if progress else {}
        rows = save_rows(trainer, path, RowAdam.row_states if progress else ("p",))
        if trainer.world.rank:
            return
        settings = {name: getattr(hp, name) for name in SETTINGS}
        content = dict(step=step, hyperparameters=settings, stages=[tuple(stage) for stage in hp.stages])
        content.update(shards=self.shards, progress=vars(progress) if progress else {})
        content.update(vocabulary=self.vocabulary, rows=[checksum for checksum, _ in rows])
        content.update(model=dict(trainer.model.state_dict()), optimizer=optimizer)
        errors = [error for _, error in rows if error]
        error = errors[0] if errors else try_to_write(path, content)[1]
        log.write(f"no checkpoint at step {step}: {error}; training goes on" if error else f"checkpoint: {path}")
        if not error:
            unfinished = checkpoints_of(hp.run_id, path.parent, "part")  # of a run that was killed meanwhile
            # Files of later steps are damaged: the run has gone on from an earlier one.
            done = [old for old in checkpoints_of(hp.run_id, path.parent) if old <= path]
            for old in done[:-CHECKPOINTS_KEPT] + unfinished:
                old.unlink(missing_ok=True)
        for piece in path.parent.glob(f"{escape(hp.run_id)}_step{6 * '[0-9]'}_rows[0-9].*"):
            if not piece.with_name(f"{piece.stem[: -len('_rows0')]}.pt").exists():  # its checkpoint
                piece.unlink(missing_ok=True)


def save_rows(trainer: Trainer, path: Path, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Writes this rank's pieces of the n-grams' table. Returns (checksum, error) of all ranks' pieces, in order."""
    algorithm, world, written = trainer.ngrams.algorithm, trainer.world, []
    own = len(piece_paths(path)) // world.size
    for i, piece in enumerate(piece_paths(path)[world.rank * own :][:own]):
        content = {name: getattr(algorithm, name).chunk(own)[i].to("cpu", copy=True) for name in names}
        written.append(try_to_write(piece, content))
    everyone = [written] * world.size
    if world.size > 1:
        dist.all_gather_object(everyone, written)
    return [piece for pieces in everyone for piece in pieces]


def optimizer_state(optimizer: Optimizer) -> dict[str, Tensor | int]:
    """Every state as a whole tensor on the CPU of rank 0; every rank must call it."""
    state: dict[str, Tensor | int] = {}
    for name, slot in optimizer.slots.items():
        for key in slot.algorithm.states:
            value = getattr(slot.algorithm, key)
            if isinstance(value, Tensor):
                whole = slot.communication.full(value)
                value = None if optimizer.world.rank else whole.cpu()  # one by one: the GPU need not hold them all
            if value is not None:
                state[f"{name}.{key}"] = value
    return state


# ---------------------------------------------------------------------------- a run that goes on


def resume(hp: Hyperparameters, overrides: dict[str, object]) -> tuple[Hyperparameters, dict | None, list[str]]:
    """What to go on with: the run's hyperparameters, its newest sound checkpoint, and lines that say which it is.

    Without one --resume=auto begins the run; its log goes on if there is one. Raises UserError when there is none
    otherwise, or when arguments or program contradict it.
    """
    auto, folder, lines = hp.resume == "auto", Path(hp.log_dir), []
    run_id = hp.run_id if auto else hp.resume
    for path in reversed(checkpoints_of(run_id, folder)):
        try:
            content = read_checkpoint(path)
            content["rows"] = read_pieces(path, content) if content["optimizer"] else []
            break
        except UserError as error:
            lines.append(f"checkpoint not used: {error}")
    else:
        require(auto, "; ".join([f"--resume={run_id}: no usable checkpoint in {folder}/", *lines]))
        if (folder / f"{run_id}.txt").exists():
            lines.append("resumed at step 0 from the beginning: the run has left no usable checkpoint")
        return hp, None, lines
    require(content["optimizer"], f"--resume={hp.resume}: the run has ended, {path} is its result")
    saved, shards = settings_of(path, content), content["shards"]
    sound = types_of(content["progress"]) == types_of(vars(Progress())) and [*shards] == FILES
    sound &= all(isinstance(a, list) and a and {*map(type, a)} == {str} for a in shards.values())
    require(sound, f"{path}: its progress or shards are none of this program's")
    names = {*map(str, content["optimizer"])}
    averages = {name.removesuffix(".average") for name in names if name.endswith(".average")}
    in_use = [row for row in PARAMETERS if f"{row.name}.m" in names]  # an empty parameter has no states
    averaged = {row.name for row in in_use if row.averaged and saved.average_frac}
    told = f"{path}: the run had other averages than the column `averaged` of PARAMETERS says"
    require(averages == averaged, told)
    for key in overrides.keys() - FREE_ON_RESUME:
        told = f"--{key}={getattr(hp, key)} contradicts the run's {key}={getattr(saved, key)}: leave it away"
        require(getattr(saved, key) == getattr(hp, key), told)
    hp = replace(saved, run_id=run_id, **{key: getattr(hp, key) for key in {"log_dir", *overrides} & FREE_ON_RESUME})
    told = f"--vocabulary={hp.vocabulary}: its tokens are not those that the run began with, of {saved.vocabulary!r}"
    require(vocabulary_in_words(train_gpt, hp) == content["vocabulary"], told)
    return hp, content, [*lines, f"resumed at step {content['step']} from {path}"]


def settings_of(path: Path, content: dict) -> Hyperparameters:
    """A checkpoint's, which may come from a stranger. Raises UserError for those of another program."""
    saved, defaults = content["hyperparameters"], {name: field.default for name, field in SETTINGS.items()}
    sound = types_of(saved).items() <= types_of(defaults).items() and {*map(type, saved.get("val_steps", ()))} <= {int}
    require(sound, f"{path}: its hyperparameters are none of this program's")
    hp = Hyperparameters(**{**PRESETS.get(saved.get("preset"), {}), **saved})
    check_hyperparameters(train_gpt, hp)
    require(list(hp.stages) == content["stages"], f"{path}: the run had other STAGES than the table in train_gpt.py")
    return hp


def types_of(values: dict) -> dict:
    """The type of each value, by name."""
    return {name: type(value) for name, value in values.items()}


def files_of_checkpoint(hp: Hyperparameters, checkpoint: dict) -> dict[str, list[Path]]:
    """Train and validation files: those that the run began with. Raises UserError where one is gone or another."""
    files = train_gpt.files_of(hp)
    for name, shards in checkpoint["shards"].items():
        there = [path for path in files[name] if any(shard.startswith(f"{path.name}, ") for shard in shards)]
        by_words = {shard_in_words(train_gpt, path): path for path in there}
        for shard in shards:
            require(shard in by_words, f"--{name}={getattr(hp, name)}: the run began with another file, {shard}")
        files[name] = [by_words[shard] for shard in shards]
    return files


@torch.no_grad()
def restore(trainer: Trainer, checkpoint: dict) -> Progress:
    """Takes a checkpoint's parameters and states, in place, on any number of ranks; returns where the run is."""
    for name, p in trainer.model.named_parameters():
        copy_saved(p, checkpoint["model"].get(name), name)
    load_optimizer(trainer.optimizer, checkpoint["optimizer"])
    own, rank = len(checkpoint["rows"]) // trainer.world.size, trainer.world.rank
    for i, piece in enumerate(checkpoint["rows"][rank * own :][:own]):
        for name in RowAdam.row_states:
            copy_saved(getattr(trainer.ngrams.algorithm, name).chunk(own)[i], piece.get(name), f"ngrams.{name}")
    return Progress(**checkpoint["progress"])  # enter_step then moves on to the stage and Yarn's frequencies


def load_optimizer(optimizer: Optimizer, state: dict[str, Tensor | int]) -> None:
    """Takes optimizer_state()'s, in place, as captured graphs hold addresses. Raises UserError if it doesn't fit."""
    state = dict(state)
    for name, slot in optimizer.slots.items():
        for key in slot.algorithm.states:
            value, place = getattr(slot.algorithm, key), f"{name}.{key}"
            if value is None:
                continue
            saved = state.pop(place, None)
            if isinstance(value, Tensor):
                copy_saved(value, saved, place, slot.communication.own)
            else:
                require(type(saved) is int, f"{place} in the checkpoint is no whole number ({saved!r:.20})")
                setattr(slot.algorithm, key, saved)
    require(not state, f"the checkpoint has states that this program has not: {', '.join(map(str, state))[:200]}")


def copy_saved(into: Tensor, saved: object, name: str, own: Callable = lambda whole: whole) -> None:
    """Copies this rank's part, own(saved), of a saved tensor. Raises UserError for one of another shape or type."""
    part = own(saved) if isinstance(saved, Tensor) and saved.dim() == into.dim() else None
    if part is None or part.shape != into.shape or part.dtype != into.dtype:
        found = f"{tuple(saved.shape)} in {saved.dtype}" if isinstance(saved, Tensor) else f"no tensor ({saved!r:.20})"
        raise UserError(f"{name} in the checkpoint is {found}, this program's part {tuple(into.shape)} in {into.dtype}")
    into.copy_(part)


# ---------------------------------------------------------------------------- files


def try_to_write(path: Path, content: dict) -> tuple[str, str]:
    """write_checkpoint; returns its checksum, and what went wrong, if anything."""
    try:
        return write_checkpoint(path, content), ""
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of some
        return "", f"{path}: {error}"


def write_checkpoint(path: Path, content: dict) -> str:
    """A file for torch.load, then its SHA-256, which is returned; whole or not at all, also when the machine dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, digest = path.with_suffix(".part"), hashlib.sha256()
    try:
        with open(temporary, "wb") as file:

            def write(data) -> int:  # the checksum is of what was to be written, not of what the disk made of it
                digest.update(data)
                return file.write(data)

            torch.save(content, SimpleNamespace(write=write, flush=file.flush))
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name too
        os.close(folder)
        return digest.hexdigest()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_checkpoint(path: Path) -> dict:
    """Its content, see read_file. Raises UserError for what is none."""
    content, _ = read_file(path)
    require(types_of(content) == CHECKPOINT, f"{path}: not a checkpoint of this program")
    return content


def read_pieces(path: Path, content: dict) -> list[dict]:
    """A checkpoint's pieces of the table of n-grams. Raises UserError for one that is missing, damaged or another's."""
    pieces = []
    for k, piece in enumerate(piece_paths(path)):
        rows, checksum = read_file(piece)
        require([checksum] == content["rows"][k : k + 1], f"{piece}: not the piece that was written with {path.name}")
        pieces.append(rows)
    return pieces


def read_file(path: Path) -> tuple[dict, str]:
    """What write_checkpoint has written, tensors mapped from the disk, and its checksum. Raises UserError.

    It may come from a stranger: nothing in it is executed, and it takes no memory beyond what its tensors hold.
    """
    try:
        # Not mapped until it is known to be sound: what a disk can't give of a mapped file kills the process.
        with open(path, "rb") as file:
            end, digest = os.fstat(file.fileno()).st_size - 32, hashlib.sha256()
            while block := file.read(max(0, min(end - file.tell(), 1 << 24))):
                digest.update(block)
            sound = file.read(33) == digest.digest()
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True) if sound else None
    except Exception as error:  # whatever a stranger's bytes make of torch.load
        raise UserError(f"{path}: not a checkpoint ({' '.join(str(error).split())[:120]})") from None
    require(sound, f"{path}: damaged or cut short, its checksum differs")
    require(isinstance(content, dict), f"{path}: not a checkpoint of this program")
    return content, digest.hexdigest()
