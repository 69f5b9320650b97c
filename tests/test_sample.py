"""A trained model, loaded again and asked to write: records/sample.py."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import checkpoint
import checks
import numpy as np
import pytest
import small_run
import torch
from conftest import records_sample

import train_gpt
from train_gpt import BetweenSteps, Log, Trainer, UserError, World

ROOT = Path(train_gpt.__file__).resolve().parent
sample = records_sample()
load_model, generate = sample.load_model, sample.generate

STEPS = small_run.STEPS
CPU = torch.device("cpu")
TEXT = "The sea, 北京 und naïve 🙂 cafés"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """That of runs whose stages are the small ones also for who loads their checkpoints."""
    folder = tmp_path_factory.mktemp("small")
    small_run.write_text(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small_run.SMALL.items():
            patch.setitem(train_gpt.PRESETS["smoke"], name, value)
        patch.setattr(checkpoint, "CHECKPOINTS_KEPT", STEPS)
        yield folder


def run_of(folder, dtype):
    """Checkpoints by step, validation losses by step: one on which to go on in each stage, and the final one."""
    steps = tuple(range(2, STEPS, 2))
    hp = small_run.small_hyperparameters(folder, run_id=dtype, dtype=dtype, checkpoint_every=2, val_steps=steps)
    files, losses, validate = train_gpt.files_of(hp), {}, BetweenSteps.validate
    trainer = Trainer(hp, World(), checkpoint.Checkpoints(hp, World(), files))
    val_batches = train_gpt.validation_batches(files["val_files"], hp, World())
    log = Log(hp, World())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BetweenSteps, "validate", lambda self, step: (validate(self, step), at.append(step)))
        at = []
        found = trainer.run(log, files["train_files"], val_batches)
    losses = dict(zip(at, found, strict=True))
    trainer.checkpoints.save(trainer, log)
    log.close()
    paths = {step: folder / f"{dtype}_step{step:06d}.pt" for step in (*steps, STEPS)}
    return SimpleNamespace(paths=paths, losses=losses, trainer=trainer, val_batches=val_batches)


@pytest.fixture(scope="module")
def runs(folder):
    """By type of the parameters, each made when first asked for."""
    return cache(partial(run_of, folder))


@pytest.fixture(scope="module")
def last(runs):
    return runs("float32").paths[STEPS]


@pytest.fixture(scope="module")
def loaded(last):
    return load_model(last)


def changed(path, to, **changes):
    """A copy of a checkpoint with other values in some places."""
    content = checkpoint.read_checkpoint(path)
    for name, value in changes.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    checkpoint.write_checkpoint(to, content)
    for piece, copy in zip(*map(checkpoint.piece_paths, (path, to)), strict=True):
        if piece != copy:
            shutil.copy(piece, copy)
    return to


# ---------------------------------------------------------------------------- load_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", [2, 6, 8, STEPS])
def test_a_loaded_model_has_the_validation_loss_of_its_run_at_that_step(runs, dtype, step):
    run = runs(dtype)
    model, hp, windows = load_model(run.paths[step])
    assert hp.run_id == dtype and hp.stages == run.trainer.hp.stages
    table, losses = model.ngrams, []
    for (batch,), exchange in run.val_batches:
        model.ngrams = table[exchange.rows]
        with torch.no_grad():
            losses.append(model(batch, windows, torch.tensor((1.0, 0.0)), head_chunk=32_768).double().sum())
    assert sum(losses).item() / hp.val_tokens == run.losses[step]


def test_the_steps_of_that_test_are_of_several_stages(runs):
    schedule = runs("float32").trainer.schedule
    assert len({schedule.stage_index(step - 1) for step in (2, 6, 8, STEPS)}) >= 3
    assert any(schedule.stage_index(step - 1) < schedule.stage_index(step) for step in (2, 6, 8))


def test_a_checkpoint_of_a_gpu_is_loaded_in_float32_on_a_cpu(runs, tmp_path):
    run = runs("bfloat16")
    path = changed(run.paths[STEPS], tmp_path / "gpu_step000010.pt", hyperparameters=dict(dtype="auto"))
    model = load_model(path)[0]
    for name, p in run.trainer.model.named_parameters():
        assert model.get_parameter(name).dtype == torch.float32
        assert torch.equal(model.get_parameter(name), p.float())
    assert model.ngrams.any() and torch.equal(model.ngrams, run.trainer.ngrams.algorithm.p.float())


def test_loading_leaves_random_numbers_and_gradients_and_processes_alone(last):
    state = torch.get_rng_state()
    load_model(last)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(hyperparameters=dict(num_heads=4)), "in the checkpoint is"),
        (dict(hyperparameters=dict(num_heads=1024, ngram_rows=2**31 - 16)), "in the checkpoint is"),
        (dict(hyperparameters=dict(more=1)), "its hyperparameters are none of this program's"),
        (dict(hyperparameters=dict(val_steps=("x",))), "its hyperparameters are none of this program's"),
        (dict(stages=[]), "the run had other STAGES"),
        (dict(model=dict(embed=None)), "in the checkpoint is no tensor"),
        (dict(model=dict(embed=torch.ones(3, 3))), "in the checkpoint is (3, 3)"),
    ],
)
def test_a_checkpoint_of_another_program_is_refused_by_name(last, tmp_path, changes, words):
    path = changed(last, tmp_path / "other_step000010.pt", **changes)
    with pytest.raises(UserError) as error:
        load_model(path)
    assert str(path) in str(error.value) or "--" in str(error.value)
    assert words in str(error.value)


# ---------------------------------------------------------------------------- generate


def by_hand(model, hp, windows, tokens, count):
    """The likeliest next token, `count` times, of the logits of the text and nothing else."""
    for _ in range(count):
        batch = sample.make_micro_batch(
            np.array([*tokens, 0]), np.array([0, len(tokens)]), train_gpt.canonical_tokens(hp), hp.ngram_rows, CPU
        )
        with torch.no_grad():
            logits = model.logits(batch, windows)
        tokens = [*tokens, logits[-1, : hp.vocab_size].argmax().item()]
    return tokens[-count:]


def test_greedy_takes_the_likeliest_token_each_time(loaded):
    _, hp, _ = loaded
    text = [hp.bos, 17, 3, 250, 4]
    model = one_that_does_not_repeat_itself(loaded)
    expected = by_hand(model, *loaded[1:], text, 12)
    assert len({*expected}) > 6
    assert [*islice(generate(model, *loaded[1:], text, temperature=0), 12)] == expected
    assert [*islice(generate(model, *loaded[1:], text, top_k=1), 12)] == expected  # drawn from one


def one_that_does_not_repeat_itself(loaded):
    """A model as large in which every parameter matters: after ten steps they hardly do."""
    model = train_gpt.GPT(loaded[1], CPU, torch.float32)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "scalars":
                p.normal_(std=1.0 if "gate" in name else 0.3, generator=generator)
        model.ngrams = 0.3 * torch.randn(model.ngram_shape, generator=generator)
    return model


def test_a_seed_gives_the_same_tokens_again_and_another_one_others(loaded):
    _, hp, _ = loaded
    first, again, other = ([*islice(generate(*loaded, [hp.bos], seed=seed), 12)] for seed in (3, 3, 4))
    assert first == again != other


def test_tokens_are_drawn_as_often_as_temperature_and_top_k_say(loaded):
    model, hp, windows = loaded
    batch = sample.make_micro_batch(
        np.array([hp.bos, 0]), np.array([0, 1]), train_gpt.canonical_tokens(hp), hp.ngram_rows, CPU
    )
    with torch.no_grad():
        p, likeliest = model.logits(batch, windows, 0)[: hp.vocab_size].double().topk(3)
    p = (p / 0.5).softmax(-1).tolist()
    count = 600
    drawn = [next(generate(*loaded, [hp.bos], temperature=0.5, top_k=3, seed=seed)) for seed in range(count)]
    assert {*drawn} <= {*likeliest.tolist()}
    for token, share in zip(likeliest.tolist(), p, strict=True):
        assert abs(drawn.count(token) / count - share) < 4 * (share * (1 - share) / count) ** 0.5


def test_of_a_text_longer_than_the_rotary_tables_the_end_is_seen(loaded):
    model = one_that_does_not_repeat_itself(loaded)
    reach = len(model.yarn.position) // 2
    text = [7 * i % 300 for i in range(3 * reach)]
    of_all, of_end, of_beginning = (
        [*islice(generate(model, *loaded[1:], part, temperature=0), 6)]
        for part in (text, text[15 - reach :], text[:reach])
    )
    assert of_all == of_end != of_beginning


# ---------------------------------------------------------------------------- the command


def main(capsys, *arguments):
    status = sample.main([*map(str, arguments)])
    return status, *capsys.readouterr()


def words_of(hp):
    """Tokens' bytes by their ids, straight from the file."""
    return [*sorted(ids := train_gpt.read_vocabulary(hp), key=ids.get)]


def test_the_prompt_and_what_follows_are_printed(loaded, last, capsys):
    _, hp, _ = loaded
    options = ("--prompt", TEXT, "--tokens", 8)
    status, greedy, said = main(capsys, last, *options, "--temperature", 0)
    assert (status, said) == (0, "")
    vocabulary = sample.Vocabulary(hp)
    tokens = vocabulary.encode(TEXT)
    assert b"".join(map(vocabulary.decode, tokens)).decode() == TEXT and len(tokens) < len(TEXT.encode())
    made = by_hand(*loaded, [hp.bos, *tokens], 8)
    assert greedy == TEXT + b"".join(words_of(hp)[i] for i in made).decode(errors="replace") + "\n"
    assert main(capsys, last, *options, "--top_k", 1)[1] == greedy
    drawn = [main(capsys, last, *options, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0].startswith(TEXT)


def test_a_text_goes_on_as_before_from_where_one_of_its_tokens_ends(loaded, last, capsys, monkeypatch):
    _, hp, _ = loaded
    vocabulary = sample.Vocabulary(hp)
    whole = vocabulary.encode("A cat sat on the mat in Winter")
    for n in (1, 3, 5):
        beginning = b"".join(map(vocabulary.decode, whole[:n])).decode()
        assert vocabulary.encode(beginning) == whole[:n]
        seen = []
        monkeypatch.setattr(
            sample, "generate", lambda model, hp, windows, tokens, *_, seen=seen: seen.append(tokens) or []
        )
        main(capsys, last, "--prompt", beginning)
        assert seen == [[hp.bos, *whole[:n]]]


def test_text_of_the_smoke_preset_is_in_the_bytes_of_its_data(last, tmp_path, capsys, monkeypatch):
    files = dict(train_files="data/sample/sample_train_*.bin")
    path = changed(last, tmp_path / "bytes_step000010.pt", hyperparameters=files)
    seen = []
    monkeypatch.setattr(sample, "generate", lambda model, hp, windows, tokens, *_: seen.append(tokens) or [])
    assert main(capsys, path, "--prompt", TEXT) == (0, TEXT + "\n", "")
    by_id = [b""] * 256  # GPT-2's order of the bytes: those that print in Latin-1, then the others
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += sorted({*range(256)} - {*order})
    by_id = [bytes([byte]) for byte in order]
    (tokens,) = seen
    assert tokens[0] == 50256 and b"".join(by_id[i] for i in tokens[1:]) == TEXT.encode()


def write(capsys, monkeypatch, path, pieces):
    """What is printed when the model makes these tokens, given as bytes, None for BOS."""
    hp = load_model(path)[1]
    ids = {word: i for i, word in enumerate(words_of(hp))}
    tokens = [hp.bos if piece is None else ids[piece] for piece in pieces]
    monkeypatch.setattr(sample, "generate", lambda *_: iter(tokens))
    status, text, said = main(capsys, path)
    assert (status, said) == (0, "")
    return text


def test_a_character_of_several_tokens_is_printed_whole(last, capsys, monkeypatch):
    assert write(capsys, monkeypatch, last, [b" caf", b"\xc3", b"\xa9", b"s"]) == " cafés\n"
    assert write(capsys, monkeypatch, last, [b"a", b"\xff", b"b", b"\xc3"]) == "a\ufffdb\ufffd\n"


def test_the_text_ends_with_the_document(last, capsys, monkeypatch):
    assert write(capsys, monkeypatch, last, [b"The", b" end", None, b"The"]) == "The end\n"


def test_control_characters_stay_away_from_the_terminal(last, capsys, monkeypatch):
    shown = write(capsys, monkeypatch, last, [b"\x1b", b"[", b"2", b"J", b"\n", b"\t", b"\x07", b"\r", b"."])
    assert shown == "\ufffd[2J\n\t\ufffd\ufffd.\n"


def checksum_of(hp, vocabulary):
    return checks.vocabulary_in_words(train_gpt, replace(hp, vocabulary=vocabulary))


def test_another_vocabulary_is_the_checkpoints_or_the_one_that_is_named(loaded, last, tmp_path, capsys, monkeypatch):
    own = tmp_path / "own.tiktoken"
    lines = (ROOT / "data" / "gpt2.tiktoken").read_text().splitlines()
    swapped = [f"{lines[i ^ 1].split()[0]} {i}" if 300 <= i < 400 else line for i, line in enumerate(lines)]
    own.write_text("\n".join(swapped) + "\n")
    its = dict(hyperparameters=dict(vocabulary=str(own)), vocabulary=checksum_of(loaded[1], str(own)))
    path = changed(last, tmp_path / "own_step000010.pt", **its)
    assert main(capsys, path, "--temperature", 0)[0] == 0
    model, hp, _ = load_model(path)
    before = model.signs
    ours, gpt2 = sample.Vocabulary(hp), sample.Vocabulary(hp, ROOT / "data" / "gpt2.tiktoken")
    assert [ours.decode(i) for i in (300, 301, 500)] == [gpt2.decode(i) for i in (301, 300, 500)]
    own.rename(tmp_path / "moved.tiktoken")
    monkeypatch.chdir(tmp_path)
    for made in (train_gpt.read_vocabulary, train_gpt.canonical_tokens):
        made.cache_clear()  # as in another process
    status, _, said = main(capsys, path)
    assert status == 1 and "own.tiktoken: No such file" in said and "--vocabulary= takes" in said
    signs = load_model(path, vocabulary=Path("moved.tiktoken"))[0].signs
    assert torch.equal(signs, before) and not torch.equal(signs, load_model(last)[0].signs)
    assert main(capsys, path, "--vocabulary", "moved.tiktoken", "--tokens", 1)[0] == 0
    # One with other tokens, though as many: the model would look up what others share
    status, _, said = main(capsys, last, "--vocabulary", "moved.tiktoken")
    assert status == 1 and "moved.tiktoken: its tokens are not those of the run" in said


def test_a_run_without_a_vocabulary_stays_without_and_one_that_is_named_is_for_its_text(loaded, last, tmp_path, capsys):
    its = dict(hyperparameters=dict(vocabulary=""), vocabulary=checksum_of(loaded[1], ""))
    path = changed(last, tmp_path / "none_step000010.pt", **its)
    status, _, said = main(capsys, path)
    assert status == 1 and "the run had no --vocabulary" in said
    gpt2 = ROOT / "data" / "gpt2.tiktoken"
    model, hp, _ = load_model(path, vocabulary=gpt2)
    assert model.spelling.tolist() == [*range(hp.padded_vocab)]
    status, text, said = main(capsys, path, "--vocabulary", gpt2, "--prompt", TEXT, "--tokens", 1)
    assert (status, said) == (0, "") and text.startswith(TEXT)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--temperature=-0.5"], "--temperature -0.5: 0, for the likeliest token, or more"),
        (["--temperature=nan"], "--temperature nan: 0"),
        (["--tokens=-1"], "--tokens -1: must not be negative"),
        (["--top_k=-1"], "--top_k -1: must not be negative"),
        ([f"--seed={2**64}"], f"--seed {2**64}: from"),
        (["--prompt", os.fsdecode(b"\xff")], "--prompt: not valid UTF-8"),
        (["--vocabulary=gone"], "gone: cannot be read (No such file or directory)"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(last, capsys, arguments, words):
    status, out, said = main(capsys, last, *arguments)
    assert (status, out) == (1, "")
    assert said.startswith(f"sample.py: refused: {words}") and said.count("\n") == 1


def test_a_file_that_is_no_checkpoint_is_refused(last, tmp_path, capsys):
    checkpoint.write_checkpoint(tmp_path / "text.pt", dict(a="text"))
    shutil.copy(last, tmp_path / "cut.pt")
    os.truncate(tmp_path / "cut.pt", 5000)
    for name, words in (("gone.pt", "no such file"), ("text.pt", "not a checkpoint"), ("cut.pt", "damaged or cut")):
        status, _, said = main(capsys, tmp_path / name)
        assert status == 1 and said.startswith(f"sample.py: refused: {tmp_path / name}: ") and words in said


def test_a_vocabulary_that_is_not_the_models_is_refused(last, tmp_path, capsys):
    lines = (ROOT / "data" / "gpt2.tiktoken").read_text().splitlines()[:300]
    (tmp_path / "small.tiktoken").write_text("\n".join(lines))
    status, _, said = main(capsys, last, "--vocabulary", tmp_path / "small.tiktoken")
    assert status == 1 and "301 tokens, of which documents begin with 300; the model has 50257" in said


def test_it_runs_from_the_command_line_without_a_network(tmp_path):
    command = [sys.executable, str(ROOT / "records" / "sample.py"), str(tmp_path / "gone.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"sample.py: refused: {tmp_path / 'gone.pt'}: no such file\n"
