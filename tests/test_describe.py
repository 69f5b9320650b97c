"""--describe and its pictures: what the tables say stands there, what is counted is what the program has."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import describe
import edit_run
import numpy as np
import pytest
import torch
from conftest import records_sample
from test_edits import EDITS, edited
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

ROOT = Path(train_gpt.__file__).parent
SMALL = ["--preset=smoke", "--vocab_size=301", "--bos=300", "--ngram_rows=64", "--vocabulary="]
UNTIMED = {"a bank under Adam", "a learned scalar a layer"}  # edits that no picture shows
EDITS = EDITS | {"a softmax over more classes than there are": [(r"(?<=, 896, )[\d_]+", "50_320")]}


def run_of(program=train_gpt, *arguments):
    return describe.Run(program, program.parse_arguments([*arguments], has_gpu=True)[0])


def table(text, title):
    """The rows below the title's line that has these words, split at two spaces or more, up to an empty line."""
    lines = text[text.index(title) :].splitlines()[1:]
    lines = lines[: lines.index("")] if "" in lines else lines
    return [re.split(r" {2,}", line.strip()) for line in lines]


def number(text):
    return float(text.replace(",", ""))


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Loads an edited program, by the edit's name."""
    loaded, kept = {}, sys.modules["train_gpt"]

    def load(name):
        if name not in loaded:
            path = tmp_path_factory.mktemp("edit") / "train_gpt.py"
            path.write_text(edited(name, EDITS[name]))
            try:
                loaded[name] = edit_run.load(path)
            finally:
                sys.modules["train_gpt"] = kept
        return loaded[name]

    return load


def text_of(program, *arguments):
    return describe.text(program, program.parse_arguments([*arguments], has_gpu=True)[0])


# ----------------------------------------------------------------------------------------------------- the tables' rows


@pytest.mark.parametrize("name", [name for name in EDITS if name != "none"])
def test_an_edit_of_a_table_shows_in_the_text_and_in_a_picture(programs, name):
    plain, program = run_of(), programs(name)
    run = run_of(program)
    assert text_of(program) != text_of(train_gpt)
    seen = [draw(run) != draw(plain) for draw in (describe.architecture_svg, describe.schedule_svg)]
    assert any(seen) or name in UNTIMED or "classes" in name


def test_every_layer_has_a_row_with_all_that_its_row_of_the_table_says(programs):
    program = programs("a layer more in the middle")
    rows = table(text_of(program), "row; ")[1:]
    assert len(rows) == len(program.LAYERS) == len(train_gpt.LAYERS) + 1
    for i, (row, layer) in enumerate(zip(rows, program.LAYERS, strict=True)):
        number, parts, reads, values, adds, gates, keep = row
        switches = [name for name in program.Layer._fields if getattr(layer, name) is True and name != "gates"]
        assert int(number) == i and parts.split() == [layer.window or "-", *switches]
        assert (reads, keep) == (layer.reads or "-", layer.keep or "-")
        for told, gates_of in ((values, layer.values), (adds, layer.adds)):
            found = dict(word.partition("=")[::2] for word in told.split() if word != "-")
            assert {name: float(gate or 0) for name, gate in found.items()} == gates_of
        assert (gates != "-") == layer.gates


def test_a_network_gives_the_gates_of_all_rows_up_to_the_next(programs):
    expected = []
    for layer in train_gpt.LAYERS:
        expected += [0] * layer.gates
        of_heads = layer.xsa + layer.head_gates + layer.value_embed
        expected[-1] += 6 * of_heads + len(layer.values) + len(layer.adds)
    assert [int(row[5]) for row in table(text_of(train_gpt), "row; ")[1:] if row[5] != "-"] == expected


def test_stages_have_the_steps_tokens_and_values_of_the_schedule(programs):
    program = programs("a main stage more")
    text, run = text_of(program, "--length=0.25"), run_of(program, "--length=0.25")
    rows = table(text, "stages; ")[1 : 1 + len(program.STAGES)]
    assert [number(row[1]) for row in rows] == [end - start for start, end in run.spans()]
    assert sum(number(row[1]) for row in rows) == run.hp.total_steps
    for row, stage, (start, end) in zip(rows, program.STAGES, run.spans(), strict=True):
        assert number(row[3]) == stage.tokens == 8 * number(row[4]) == number(row[5]) / (end - start)
        assert [number(row[i]) for i in (6, 7)] == [n * run.hp.window_block for n in stage[2:4]]
        assert number(row[8]) == min(stage.max_seq_len, run.hp.train_max_seq_len)
        assert number(row[9]) == run.classes(stage)
        for cell, value in ((row[10], run.schedule.lr), (row[11], run.schedule.momentum)):
            first, _, last = cell.partition(" to ")
            told = float(first), float(last or first)
            assert told == pytest.approx((value(start), value(end - 1)), abs=6e-4)


def test_a_prefix_has_a_weight_in_its_stages_only():
    stages = table(text_of(train_gpt), "stages; ")[1 : 1 + len(train_gpt.STAGES)]
    assert [row[12:] for row in stages] == [
        ["1, 0.5, 0.25 to 0", "0.25"],
        ["1, 0.5 to 0", "0.25 to 0"],
        *[["1", "-"]] * 3,
    ]
    run = run_of(train_gpt)
    (*_, line), spans = describe.curves_of(run)["weights of the loss"], run.spans()
    assert line.name == "prefix" and line.values[: spans[1][0]] == [0.25] * spans[1][0]
    assert 0 < line.values[spans[1][1] - 1] < 0.001 and {*line.values[spans[2][0] :]} == {None}
    stages = tuple(stage._replace(prefix=(0.0, 0.0)) for stage in run.hp.stages)
    lines = describe.curves_of(describe.Run(train_gpt, replace(run.hp, stages=stages)))["weights of the loss"]
    assert [line.name for line in lines] == [f"token {k} ahead" for k in (1, 2, 3)]


@pytest.mark.parametrize(
    "edit, stage, classes",
    [
        ("a softmax over some classes", 0, 320),
        ("a softmax over some classes", -1, None),
        ("a softmax over more classes than there are", 0, None),
    ],
)
def test_the_head_computes_the_classes_of_the_stage_and_keeps_their_logits(programs, edit, stage, classes):
    run = run_of(programs(edit))
    row, classes = run.hp.stages[stage], classes or run.hp.padded_vocab
    assert run.classes(row) == classes == (run.schedule.size(run.spans()[stage][0])[2] or run.hp.padded_vocab)
    assert (
        describe.forward_flop(run, run.schedule.windows(0), run.classes(row))["head"] == 2 * run.hp.model_dim * classes
    )
    # The logits in bf16, their gradient in FP8 twice, once transposed
    assert describe.kept_bytes(run, row, 100)["logits"] == 100 * classes * 4


# ------------------------------------------------------------------------------------------------- what the program has


@pytest.mark.parametrize("name", ["none", "no value embeddings", "a bank under Adam"])
@pytest.mark.parametrize("preset", ["speedrun", "smoke"])
def test_parameters_add_up_to_what_the_model_has(programs, name, preset):
    program = programs(name)
    text, run = text_of(program, f"--preset={preset}"), run_of(program, f"--preset={preset}")
    model = program.GPT(run.hp, torch.device("meta"), torch.float32)
    counts = {row[-1]: number(row[0]) for row in table(text, "parameters, ")[1:-1]}
    assert counts == {n: p.numel() for n, p in model.tensors().items() if p.numel()}
    assert f"\n{sum(p.numel() for p in model.tensors().values()):,} parameters: " in text


@pytest.mark.parametrize("name", ["none", "no value embeddings", "a bank under Adam"])
def test_gradients_and_states_are_as_large_as_the_optimizers(programs, name):
    program = programs(name)
    run = run_of(program)
    model = program.GPT(run.hp, torch.device("meta"), torch.bfloat16)
    for size in (1, 2, 4, 8):
        optimizer = program.Optimizer(model, run.hp, program.World(size=size), 0)
        states = [getattr(s.algorithm, key) for s in optimizer.slots.values() for key in s.algorithm.states]
        told = describe.states_bytes(run, size)
        assert told["states of the optimizer"] == sum(t.nbytes for t in states if isinstance(t, torch.Tensor))
        assert told["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        assert told["parameters"] == sum(p.nbytes for p in model.parameters())
        ngrams = optimizer.slots["ngrams"]
        held = (getattr(ngrams.algorithm, name) for name in ngrams.algorithm.row_states)
        assert told["rows of n-grams, with their states"] == sum(t.nbytes for t in held)
        assert told["those of a step, with their gradients"] == ngrams.p.nbytes + ngrams.p.grad.nbytes


def test_angles_signs_prefixes_and_spellings_are_as_large_as_the_models():
    run = run_of(train_gpt, *SMALL)
    model = train_gpt.GPT(run.hp, torch.device("cpu"), torch.float32)
    held = model.yarn.cos, model.yarn.sin, model.yarn.position, *model.buffers()
    assert describe.states_bytes(run, 1)["angles, signs, prefixes and spellings"] == sum(t.nbytes for t in held)


def test_learning_rates_are_those_that_the_first_update_has():
    run = run_of(train_gpt, *SMALL)
    told = {row[-1]: row[2] for row in table(text_of(train_gpt, *SMALL), "parameters, ")[1:-1]}
    model = train_gpt.GPT(run.hp, torch.device("cpu"), torch.float32)
    optimizer = train_gpt.Optimizer(model, run.hp, train_gpt.World(), 0)
    for name, slot in optimizer.slots.items():
        base = run.hp.muon_lr if slot.row.algorithm == "normuon" else run.hp.adam_lr
        multipliers = [*slot.row.lr] if name == "ngrams" else slot.algorithm.multipliers.flatten().tolist()
        rates = {float(f"{base * rate:.4g}") for rate in multipliers}
        assert {float(rate) for rate in told[name].split(" / ")} == rates, name


# ----------------------------------------------------------------------------------------------------------------- FLOP


def test_what_ends_as_an_average_is_told_and_over_how_many_steps():
    lines = text_of(train_gpt, "--num_scheduled_iterations=99", "--num_extension_iterations=1").splitlines()
    told = [line.split()[-1] for line in lines if ", averaged  " in line]
    assert told == [row.name for row in train_gpt.PARAMETERS if row.averaged]
    assert sum(line.endswith("averages over the last 10") for line in lines) == 1


@pytest.mark.parametrize(
    "steps, words",
    [([1, 2, 1, 2, 2], "in each step of stage 1, 3, elsewhere in every second"), ([2] * 5, "in every second")],
)
def test_how_often_adam_updates_is_told(steps, words):
    hp = train_gpt.parse_arguments([], has_gpu=True)[0]
    stages = [stage._replace(adam=n) for stage, n in zip(hp.stages, steps, strict=True)]
    assert f"Adam updates {words}" in describe.text(train_gpt, replace(hp, stages=tuple(stages))).splitlines()


@pytest.mark.parametrize("name", ["none", "a layer more in the middle"])
def test_the_products_are_those_that_a_forward_pass_computes(programs, name, monkeypatch):
    program, T = programs(name), 64
    run = run_of(program, *SMALL)
    model = program.GPT(run.hp, torch.device("cpu"), torch.float32)
    tokens = np.random.randint(300, size=T + 1)
    make_micro_batch, cpu = records_sample().make_micro_batch, torch.device("cpu")
    batch = make_micro_batch(tokens, np.array([0, T]), np.arange(65536), run.hp.ngram_rows, cpu)
    model.ngrams = torch.zeros(model.ngram_shape)
    monkeypatch.setattr(program, "linear_relu2", program.linear_relu2_reference)  # nobody looks into an operator
    monkeypatch.setattr(program, "attend", lambda q, k, v, *rest: v)  # counted by themselves
    monkeypatch.setattr(program, "copy_sums", lambda q, *rest: q.new_zeros(2, T))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch, dict(short=16, long=32), torch.ones(1))
    counted = counter.get_total_flops()
    flop = describe.forward_flop(run, dict(short=16, long=32), run.hp.padded_vocab)
    told = sum(n for part, n in flop.items() if not part.startswith(("attention, ", "copying, ")))
    assert counted == T * told
    C = run.hp.model_dim
    assert flop["MLP"] == sum(layer.mlp for layer in program.LAYERS) * 4 * C * run.hp.mlp_ratio * C


@pytest.mark.parametrize("paired", [False, True])
def test_a_query_meets_the_keys_of_its_window_and_its_own(paired):
    T, H, D, window = 24, 2, 48, 5
    N, heads = (2 * T, H // 2) if paired else (T, H)
    documents = train_gpt.Documents(torch.zeros(T, dtype=torch.int32), torch.full((T,), T, dtype=torch.int32))
    q, v = torch.zeros(N, heads, D), torch.eye(N, D).unsqueeze(1).expand(N, heads, D)
    y = train_gpt.attend_reference(q, q, v, documents.paired() if paired else documents, window, 1.0)
    keys = int((y[-1, 0] > 0).sum())  # with equal scores attention's result has a 1 / keys for each
    run = run_of()
    short = [layer for layer in train_gpt.LAYERS if layer.window == "short"]
    flop = describe.forward_flop(run, dict(short=window, long=9), 16)["attention, short windows"]
    assert flop == sum(2 * (64 + 128 if a.narrow else 2 * 128) for a in short) * run.hp.num_heads * keys


@pytest.mark.parametrize("width", [0, 16, 64])
def test_a_position_that_may_copy_meets_the_keys_before_it_in_the_longest_document(width):
    run = run_of(train_gpt, f"--copy_width={width}", "--train_max_seq_len=24")
    flop, T = describe.forward_flop(run, dict(short=5, long=9), 16), 24
    assert {part for part in flop if "copying" in part} == (
        {"copying's projections", "copying, scores"} if width else set()
    )
    documents = train_gpt.Documents(torch.zeros(T, dtype=torch.int32), torch.full((T,), T, dtype=torch.int32))
    k, window = torch.zeros(T, width), train_gpt.GPT(run.hp, torch.device("meta"), torch.float32).copy_window
    keys = int((train_gpt.copy_scores(k, k, documents, window, torch.arange(T)) == 0).sum())
    assert flop.get("copying, scores", 0) == 2 * width * keys / T
    assert describe.kept_bytes(run, run.hp.stages[0], 10)["copying"] == 10 * 4 * width * 2  # q and k, twice, in bf16


@pytest.mark.parametrize("ratio", [2, 4])
def test_an_mlp_keeps_its_input_and_its_hidden_units(ratio):
    run = run_of(train_gpt, "--fp8=off", f"--mlp_ratio={ratio}")
    C = run.hp.model_dim
    kept = describe.kept_bytes(run, run.hp.stages[0], 10)["MLP"]
    assert kept == 10 * len(train_gpt.MLP_LAYERS) * (C + ratio * C) * run.dtype.itemsize
    fp8 = run_of(train_gpt, f"--mlp_ratio={ratio}")  # a byte each, hidden units as they are and transposed
    kept = describe.kept_bytes(fp8, fp8.hp.stages[0], 10)["MLP"]
    assert kept == 10 * len(train_gpt.MLP_LAYERS) * (C + 2 * ratio * C)


def test_training_takes_three_times_the_forward_pass_for_each_token(programs):
    text = text_of(train_gpt)
    *parts, together, whole = table(text, "MFLOP a token")[2:]
    stages = len(train_gpt.STAGES)
    for i in range(stages):
        assert sum(number(row[i]) for row in parts) == pytest.approx(number(together[i]), abs=0.5)
    mlp = next(row for row in parts if row[-1] == "MLP")
    assert number(mlp[0]) == pytest.approx(3 * number(mlp[stages]), abs=0.2)  # validation goes forward only
    tokens = [number(row[5]) for row in table(text, "stages; ")[1 : 1 + stages]]
    summed = sum(n * 1e6 * number(flop) for n, flop in zip(tokens, together, strict=False))
    assert float(whole[0].split()[0]) == pytest.approx(summed, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------- the command

# As a machine on which every look for a GPU fails
PROGRAM = """
import sys, torch
def no_gpu(*_, **__):
    raise SystemExit("a look for a GPU")
for name in ("is_available", "device_count", "get_device_capability", "_lazy_init", "init"):
    setattr(torch.cuda, name, no_gpu)
sys.path.insert(0, sys.argv[1])
import train_gpt
train_gpt.main(sys.argv[2:])
slow = {"torch._dynamo", "sympy", "torch.utils.benchmark", "matplotlib"} & {*sys.modules}
sys.exit(f"slow to import: {slow}" if slow else 0)
"""


def command(folder, *arguments, root=ROOT, **env):
    env = {"PATH": "", "HOME": str(folder), "DATA_PATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"} | env
    line = [sys.executable, "-c", PROGRAM, str(root), *arguments]
    return subprocess.run(line, env=env, cwd=folder, capture_output=True, text=True, timeout=60)


def test_the_command_needs_no_data_looks_for_no_gpu_and_leaves_no_file(tmp_path):
    result = command(tmp_path, "--describe", "--length=0.25")
    assert (result.returncode, result.stderr, [*tmp_path.iterdir()]) == (0, "", [])
    assert result.stdout == text_of(train_gpt, "--length=0.25") + "\n"
    assert result.stdout.startswith(
        f"speedrun, --length=0.25: {run_of(train_gpt, '--length=0.25').hp.total_steps} steps, "
    )


@pytest.mark.parametrize("arguments", [["--describe=True", "--preset=smoke"], ["--help"]])
def test_of_several_processes_one_tells(tmp_path, arguments):
    result = command(tmp_path, *arguments, RANK="1", WORLD_SIZE="2")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--lenth=2"], "unknown hyperparameter --lenth"),
        (["--resume=some"], "--describe tells of a run from its beginning: leave --resume away"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line(tmp_path, arguments, words):
    result = command(tmp_path, "--describe", *arguments)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith(f"train_gpt.py: error: {words}") and result.stderr.count("\n") == 1


def test_a_copy_without_its_description_says_so(tmp_path):
    (tmp_path / "train_gpt.py").write_text(Path(train_gpt.__file__).read_text())
    result = command(tmp_path, "--describe", root=tmp_path)
    told = f"train_gpt.py: error: --describe takes {tmp_path}/records/describe.py, which is not there"
    assert result.returncode == 1 and result.stderr.startswith(told)


# --------------------------------------------------------------------------------------------------------- the pictures


@pytest.mark.parametrize("name", ["architecture.svg", "schedule.svg"])
def test_the_readmes_pictures_are_what_the_tables_draw(tmp_path, name):
    assert describe.main(["--out", str(tmp_path)]) == 0
    drawn = (tmp_path / name).read_bytes()
    assert drawn == (ROOT / "records" / name).read_bytes(), "run python records/describe.py"
    assert len(drawn) < 60_000 and f"(records/{name})" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["none", "a layer more in the middle", "a main stage more", "one token predicted"])
@pytest.mark.parametrize("preset", ["speedrun", "smoke"])
def test_all_of_a_picture_lies_on_its_paper(programs, name, preset):
    run = run_of(programs(name), f"--preset={preset}")
    for draw in (describe.architecture_svg, describe.schedule_svg):
        picture = ElementTree.fromstring(draw(run))
        width, height = float(picture.get("width")), float(picture.get("height"))
        for group in picture.iter():
            top = float(re.sub(r".* |\)", "", group.get("transform", "(0 0)")))
            for element in group:
                at = [float(element.get(key, 0)) for key in ("x", "x1", "x2", "cx")]
                down = [top + float(element.get(key, 0)) for key in ("y", "y1", "y2", "cy")]
                assert 0 <= min(at) <= max(at) <= width and 0 <= min(down) <= max(down) <= height


def test_a_kept_output_has_a_lane_from_its_row_to_the_last_that_uses_it():
    lines = describe.lane_columns(train_gpt.LAYERS)
    found = {}
    for line in lines:
        if title := re.search(r'<text .*font-weight="bold">(\w+)</text>', line):
            name = title[1]
        elif line.startswith("<line"):
            found[name] = [float(re.search(f'{key}="([^"]+)"', line)[1]) for key in ("y1", "y2")]
    rows = train_gpt.LAYERS
    for name, (top, bottom) in found.items():
        made = next((i for i, layer in enumerate(rows) if layer.keep == name), -1)
        last = max((i for i, a in enumerate(rows) if name in (a.reads, *a.values, *a.adds)), default=made)
        assert (top, bottom) == (describe.row_y(made), describe.row_y(last)), name
    assert {*found} == {"ngrams", *(layer.keep for layer in rows if layer.keep)}


def test_a_line_has_its_corners_and_is_parted_where_there_is_no_value():
    assert describe.polylines([1, 1, 1, 3, 4, 5]) == [[(0, 1), (2, 1), (3, 3), (5, 5), (6, 5)]]
    assert describe.polylines([2, 2, None, 0.5]) == [[(0, 2), (1, 2)], [(3, 0.5), (4, 0.5)]]
    assert describe.polylines([1, None]) == [[(0, 1), (0, 1)]]


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert describe.main(["--out", str(tmp_path / "none")]) == 1
    assert describe.main(["--out", str(tmp_path), "--lenth=2"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"describe.py: {tmp_path}/none/architecture.svg: No such file or directory"
    assert second.startswith("describe.py: unknown hyperparameter --lenth")
