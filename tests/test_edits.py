"""The edits people make, made on copies of train_gpt.py: a row, a column or a short place each, and nothing else.

Every edited program takes two steps, small, on one process and on eight.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import edit_run
import pytest
import small_run
import torch

import train_gpt

SOURCE = Path(train_gpt.__file__).read_text()

STAGE_ROW = r"^    TrainingStage\((?:\n.*\n    \),|.*)\n"  # in one line or three
# By name: what to replace, as pairs of a pattern and a text; at its first place only, but for the columns below.
EDITS = {
    "none": [],
    "a layer's window": [(r'^    Layer\("short"', '    Layer("long"')],
    "a layer more in the middle": [
        (r"(?<=^LAYERS = \(\n)((?:    .*\n){6})", r'\1    Layer("short", xsa=True, adds=dict(x0=0.0)),' + "\n")
    ],
    "a skip with a gate of its own": [(r'(adds=[^,\n]*)(?=, keep="middle")', r"\1 | dict(early=0.1)")],
    "attention on another saved activation": [('reads="middle"', 'reads="early"')],
    "no narrow layers": [(", narrow=True", "")],
    "no value embeddings": [(", value_embed=True", "")],
    "a learned scalar a layer": [
        (r"^SCALARS = \{\n", r'\g<0>    "added": (len(LAYERS), 1.0, 2.0),' + "\n"),
        (r"^    qkv_lambda: Tensor\n", r"\g<0>    added: Tensor" + "\n"),
        (r"x \+ added\b", "x + w.added * added"),
    ],
    "a bank under Adam": [(r'"mlp_bank", "normuon", (.*), averaged', r'"mlp_bank", "adam", \1, (0.9, 0.95), averaged')],
    "one token predicted": [
        (r"^(    TrainingStage\((?:[^,]*,){5}) \(.*?\), \(.*?\)", r"\1 (1.0,), (1.0,)"),
    ],
    "no prefix loss": [(r", prefix=\(.*?\)", "")],
    "a softmax over some classes": [(r"(?<=, 896, )[\d_]+", "320")],
    "a main stage more": [
        (STAGE_ROW, r"\g<0>    TrainingStage(1, 131_072, 2, 30, 1.2, (1.0, 0.5), (1.0, 0.0))," + "\n")
    ],
    "a main stage fewer": [(STAGE_ROW, "")],
}
COLUMNS = {"no narrow layers", "no value embeddings", "one token predicted", "no prefix loss"}
# In nats: of one process and eight, measured 2e-8, and the least that an edit changes, measured 5e-7 to 3e-3
LOSS_TOLERANCE, EFFECT = 1e-5, 1e-7


def edited(name, edits):
    source = SOURCE
    for pattern, text in edits:
        source, count = re.subn(pattern, text, source, count=0 if name in COLUMNS else 1, flags=re.MULTILINE)
        assert count, f"train_gpt.py has no place for this edit: {pattern}"
    return source


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By edit: what the one process found, and what each of eight."""
    folder = tmp_path_factory.mktemp("edits")
    small_run.write_text(folder, edit_run.BOS)
    for name, edits in EDITS.items():
        (folder / name).mkdir()
        (folder / name / "train_gpt.py").write_text(edited(name, edits))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, edit_run.__file__, str(folder), str(port)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    alone, *ranks = (torch.load(folder / name) for name in ("1_0.pt", *(f"8_{rank}.pt" for rank in range(8))))
    return {name: (SimpleNamespace(**alone[name]), [SimpleNamespace(**rank[name]) for rank in ranks]) for name in EDITS}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_program_takes_the_same_steps_on_one_process_and_on_eight(runs, name):
    alone, ranks = runs[name]
    assert len({rank.digest for rank in ranks}) == 1
    for rank in ranks:
        assert rank.losses == pytest.approx(alone.losses, abs=LOSS_TOLERANCE) and rank.losses == ranks[0].losses
    assert alone.losses[1] < alone.losses[0]


@pytest.mark.parametrize("name", [name for name in EDITS if name != "none"])
def test_every_edit_has_an_effect(runs, name):
    losses = zip(runs[name][0].losses, runs["none"][0].losses, strict=True)
    assert max(abs(loss - unedited) for loss, unedited in losses) > EFFECT


def test_rows_more_and_fewer_are_layers_and_stages_more_and_fewer(runs):
    found = {name: (run.layers, *run.stages) for name, (run, _) in runs.items()}
    layers, stages, last = found["none"]
    assert last == stages - 1  # the second step's
    assert found["a layer more in the middle"] == (layers + 1, stages, last)
    assert found["a main stage more"] == (layers, stages + 1, last + 1)
    assert found["a main stage fewer"] == (layers, stages - 1, last - 1)


def test_without_value_embeddings_their_parameters_are_gone(runs):
    plain, edited = (runs[name][0].algorithms for name in ("none", "no value embeddings"))
    assert {*plain} - {*edited} == {"value_embeds"}


def test_a_bank_under_adam_is_adams(runs):
    plain, edited = (runs[name][0].algorithms for name in ("none", "a bank under Adam"))
    assert plain | {"mlp_bank": "Adam"} == edited != plain


def test_a_learned_scalar_steps_at_its_own_rate(runs):
    moved = runs["a learned scalar a layer"][0].scalars  # (steps, scalars) by name
    hp, (beta1, beta2) = train_gpt.Hyperparameters(), next(r for r in train_gpt.PARAMETERS if r.name == "scalars").betas
    # With the first gradient Adam's step is as long as its learning rate, but for the count of updates. That comes with
    # the second step, here of the extension: W_proj and the n-grams are zero in the first.
    correction = (1 - beta1) / (1 - beta1**2) / ((1 - beta2) / (1 - beta2**2)) ** 0.5
    for name, multiplier in (("added", 2.0), ("mlp_out", train_gpt.SCALARS["mlp_out"][2])):
        first, second = moved[name]
        size = second[first == 0].abs().max().item()
        assert size == pytest.approx(correction * multiplier * hp.adam_lr * hp.lr_end, rel=1e-3), name


@pytest.mark.parametrize(
    "pattern, text, words",
    [
        ('reads="middle"', 'reads="center"', "LAYERS, row 9: reads='center' is kept by no earlier row"),
        (r"dict\(early=", "dict(late=", "LAYERS, row 7: 'late' is not kept ahead of the network of its gates"),
        (
            r"adds=NGRAMS\)",
            'adds=("ngrams",))',
            "LAYERS, row 2: values and adds take names with their gates at the start",
        ),
        ('"gate_in", "adam", False', '"gate_in", "adam", True', "PARAMETERS, gate_in: sharded, but its first"),
    ],
)
def test_what_cannot_work_is_refused_in_words(tmp_path, monkeypatch, pattern, text, words):
    (tmp_path / "train_gpt.py").write_text(edited("", [(pattern, text)]))
    (tmp_path / "records").symlink_to(Path(train_gpt.__file__).parent / "records")
    monkeypatch.setitem(sys.modules, "train_gpt", train_gpt)  # put back at the end
    monkeypatch.syspath_prepend(tmp_path / "records")  # taken away at the end
    program = edit_run.load(tmp_path / "train_gpt.py")
    with pytest.raises(program.UserError) as error:
        program.parse_arguments([], has_gpu=False)
    assert str(error.value).startswith(words)
