"""
Continues a text with a trained model: what has a run learned to write?

    python records/sample.py logs/ID_step002672.pt --prompt "The sea was"
    python records/sample.py CHECKPOINT --tokens 200 --temperature 0.7 --top_k 40 --seed 3

The smoke run of train_gpt.py calls log_line, for the last line of its log.

CHECKPOINT is a file of --save_checkpoint or --checkpoint_every. The text is one document: it starts with the token that
documents begin with, then the prompt, and ends with the next such token or after --tokens tokens. The same seed gives
the same text on the same machine; temperature 0 takes the likeliest token each time. Every token takes a forward pass
over the whole text, so a long one is slow.

Tokens are those that the run's --vocabulary names, GPT-2's unless it was told otherwise; text of data/sample.py, on
which the smoke preset trains, is in single bytes.
"""

import argparse
import codecs
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise, takewhile
from pathlib import Path

from rerun import ROOT, Refusal
from runlog import exit_with

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "data"))
import numpy as np
import torch
from checkpoint import copy_saved, piece_paths, read_checkpoint, read_pieces, settings_of
from checks import vocabulary_in_words
from shards import DataError, home_path
from tokenize_text import encoding_from, utf8
from torch import Tensor

import train_gpt
from train_gpt import GPT, Hyperparameters, MicroBatch, Trainer, TrainingSchedule, UserError, World

SMALL = 256  # a model of this width or less has so little to do that threads only wait for each other


@torch.no_grad()
def load_model(
    path: Path, device: torch.device | str = "cpu", vocabulary: Path | None = None
) -> tuple[GPT, Hyperparameters, dict[str, int]]:
    """A checkpoint's model, hyperparameters, and windows, as its run's validation there has them. Raises UserError.

    vocabulary: the run's, where it lies at another place by now: of it are the model's spellings and signs. Raises
    Refusal for one that can't be the run's. A run without one has none here, either.
    """
    content, device = read_checkpoint(path), torch.device(device)
    pieces = read_pieces(path, content)
    hp, step = settings_of(path, content), content["step"]
    if vocabulary:
        Vocabulary(hp, vocabulary)
        hp = replace(hp, vocabulary=hp.vocabulary and str(vocabulary.absolute()))
    told = f"{hp.vocabulary}: its tokens are not those of the run; --vocabulary takes the file that the run had"
    train_gpt.require(vocabulary_in_words(train_gpt, hp) == content["vocabulary"], told)
    schedule = TrainingSchedule(hp)
    for place in (torch.device("meta"), device):  # first the shapes alone: a stranger's may take any memory
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # what is drawn is of no use
            model = GPT(schedule.hp, place, train_gpt.choose_dtype(schedule.hp, World(device=device)))
        for name, p in model.named_parameters():
            copy_saved(p, content["model"].get(name), f"{path}: {name}", partial(Tensor.to, dtype=p.dtype))
        model.ngrams = torch.empty(model.ngram_shape, dtype=model.embed.dtype, device=place)
        for part, piece, name in zip(model.ngrams.chunk(len(pieces)), pieces, piece_paths(path), strict=True):
            copy_saved(part, piece.get("p"), f"{name}: ngrams", partial(Tensor.to, dtype=part.dtype))
    for windows in pairwise(schedule.long_windows[: schedule.stage_index(max(step - 1, 0)) + 1]):
        model.yarn.grow(*windows)
    return model, schedule.hp, schedule.val_windows(step)


def make_micro_batch(
    tokens: np.ndarray, edges: np.ndarray, canonical: np.ndarray, rows: int, device: torch.device
) -> MicroBatch:
    """A micro-batch for a model with all `rows` of the n-grams' table; tokens and edges as in join_micro_batches."""
    arrays = inputs, _, starts, _ = next(train_gpt.join_micro_batches([(tokens, edges)], 1))
    slots = train_gpt.hashed_ngrams(canonical[inputs], starts, rows)
    orders = map(train_gpt.sorting_order, (slots, inputs))
    return MicroBatch.of(train_gpt.to_device([*arrays, slots, *orders], device))


@torch.no_grad()
def generate(model: GPT, hp: Hyperparameters, windows, tokens, temperature=1.0, top_k=0, seed=0) -> Iterator[int]:
    """What follows a document's tokens, one by one, with BOS at the end. Temperature 0: the likeliest; top_k 0: all."""
    draws, count = torch.Generator().manual_seed(seed), min(top_k or hp.vocab_size, hp.vocab_size)
    canonical = train_gpt.canonical_tokens(hp)
    while True:  # each from the whole text, or its end, as far as the rotary tables reach: slow, but one forward pass
        seen = tokens[15 - len(model.yarn.position) // 2 :]
        n, fill = len(seen), -len(seen) % 16 * [hp.bos]  # a document behind it, which it does not see: whole tiles
        edges = np.array([0, n, n + len(fill)])
        tokens_and_next = np.array([*seen, *fill, 0])
        batch = make_micro_batch(tokens_and_next, edges, canonical, hp.ngram_rows, model.embed.device)
        z, ids = model.logits(batch, windows, n - 1)[: hp.vocab_size].double().cpu().topk(count if temperature else 1)
        drawn = torch.multinomial((z - z[0]).div(temperature or 1).softmax(-1), 1, generator=draws)
        yield (tokens := [*tokens, ids[drawn].item()])[-1]


def log_line(trainer: Trainer) -> str:
    """What a smoke run's log ends with, escaped as Python does. Raises UserError where there is no vocabulary."""
    hp, windows = trainer.hp, trainer.schedule.val_windows(trainer.hp.total_steps)
    words = {i: word for word, i in train_gpt.read_vocabulary(hp).items()}
    train_gpt.require(words, "a sample takes a --vocabulary")
    torch.set_num_threads(1)  # for tensors so small: more threads wait for each other
    made = islice(generate(trainer.model, hp, windows, [hp.bos], temperature=0.5), 60)
    text = b"".join(takewhile(bool, map(words.get, made)))
    return f"sample: {text.decode(errors='replace')!r}"


class Vocabulary:
    """Text to tokens and back, as the data of a run has them. Raises Refusal and DataError."""

    def __init__(self, hp: Hyperparameters, path: Path | None = None):
        remedy = "--vocabulary takes the .tiktoken file that the data was tokenized with"
        if not (path or hp.vocabulary):
            raise Refusal(f"the run had no --vocabulary: {remedy}, for GPT-2's {ROOT / 'data' / 'gpt2.tiktoken'}")
        paths = [path] if path else [folder / hp.vocabulary for folder in (train_gpt.ROOT, ROOT)]
        path = next((path for path in paths if path.exists()), paths[0])
        try:
            self.encoding = encoding_from(path)
        except DataError as error:
            raise Refusal(f"{error}; {remedy}") from None
        ours, theirs = (self.encoding.n_vocab, self.encoding.eot_token), (hp.vocab_size, hp.bos)
        if ours != theirs:
            told = "{} tokens, of which documents begin with {}"
            raise Refusal(f"{path}: {told.format(*ours)}; the model has {told.format(*theirs)}; {remedy}")
        self.bytewise = hp.train_files == train_gpt.PRESETS["smoke"]["train_files"]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without the one that a document begins with."""
        try:
            data = text.encode()
        except UnicodeEncodeError:  # bytes that are no text, as the command line hands them over
            raise Refusal("--prompt: not valid UTF-8") from None
        if self.bytewise:
            return [self.encoding.encode_single_token(bytes([byte])) for byte in data]
        return self.encoding.encode_ordinary(text)

    def decode(self, token: int) -> bytes:
        """Of a character's bytes perhaps only some."""
        return self.encoding.decode_single_token_bytes(token)


def printable(text: str) -> str:
    """Without what could move a terminal's cursor, or more."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def sample(options: argparse.Namespace) -> None:
    """Prints the prompt and, token by token, what follows. Raises Refusal, UserError and DataError."""
    model, hp, windows = load_model(options.checkpoint, options.device, options.vocabulary)
    vocabulary = Vocabulary(hp, options.vocabulary)
    tokens = [hp.bos, *vocabulary.encode(options.prompt)]
    if hp.model_dim <= SMALL:
        torch.set_num_threads(1)
    print(printable(options.prompt), end="", flush=True)
    made = generate(model, hp, windows, tokens, options.temperature, options.top_k, options.seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in islice(takewhile(lambda token: token != hp.bos, made), options.tokens):
        print(printable(decoder.decode(vocabulary.decode(token))), end="", flush=True)
    print(printable(decoder.decode(b"", final=True)))


def check(options: argparse.Namespace) -> None:
    """Raises Refusal for what can be known to be wrong before anything is read."""
    if not options.checkpoint.is_file():
        raise Refusal(f"{options.checkpoint}: no such file")
    for name in ("tokens", "top_k"):
        if getattr(options, name) < 0:
            raise Refusal(f"--{name} {getattr(options, name)}: must not be negative")
    if not 0 <= options.temperature < math.inf:
        raise Refusal(f"--temperature {options.temperature:g}: 0, for the likeliest token, or more")
    if not -(2**63) <= options.seed < 2**64:
        raise Refusal(f"--seed {options.seed}: from -2**63 to 2**64 - 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: PyTorch finds no GPU here")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=home_path, metavar="CHECKPOINT")
    add("--prompt", type=utf8, default="", metavar="TEXT", help="what the text begins with (default: nothing)")
    add("--tokens", type=int, default=100, metavar="N", help="at most so many more (default %(default)s)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest token (default %(default)s)")
    add("--top_k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0: from all (default)")
    add("--seed", type=int, default=0, metavar="S", help="default %(default)s")
    add("--vocabulary", type=home_path, metavar="FILE", help="tokens as in a .tiktoken file (default: the run's)")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=here, help="default: cuda where there is a GPU")
    options = parser.parse_args(arguments)
    try:
        check(options)
        sample(options)
    except (Refusal, UserError, DataError) as problem:
        print(f"sample.py: refused: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    exit_with(main)
