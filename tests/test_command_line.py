"""The command line: --name=value for every number, presets, and what is refused; who a process is in the world."""

import dataclasses
import importlib.util
import os
import re
import uuid
from pathlib import Path
from types import SimpleNamespace

import checks
import pytest
import torch
from shard_files import text_of, write_shard

import train_gpt
from train_gpt import PRESETS, STAGES, Hyperparameters, Layer, TrainingStage, UserError, World, parse_arguments


def parse(*arguments, has_gpu=False):
    return parse_arguments(list(arguments), has_gpu)[0]


def refused(*arguments):
    """The message of the error; one line."""
    with pytest.raises(UserError) as error:
        parse(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------------------------------------------------- tables


FOR_ATTENTION = "narrow, paired, key_offset, value_embed, xsa, head_gates, reads, values are for layers with a window"
FLAGS = ("narrow", "paired", "value_embed", "xsa", "head_gates")
NOT_KEPT = "is not kept ahead of the network of its gates: keep it earlier, or give gates=True; it weighs ngrams, x0"
NO_STILL_HALF = "key_offset takes the half of a key that does not turn, which narrow ones lack"
EARLY = dict(early=0.1)


def check_layers(monkeypatch, *rows):
    monkeypatch.setattr(train_gpt, "LAYERS", rows)
    checks.check_tables(train_gpt, Hyperparameters())


@pytest.mark.parametrize(
    "row, words",
    [
        (Layer("wide"), "window is 'short', 'long' or None"),
        *[(Layer(None, **{name: True}), FOR_ATTENTION) for name in FLAGS],
        (Layer(None, reads="early"), FOR_ATTENTION),
        (Layer(None, values=EARLY, gates=True), FOR_ATTENTION),
        (Layer("long", narrow=True, key_offset=True), NO_STILL_HALF),
        (Layer("short", adds=("x0",)), "values and adds take names with their gates at the start, as dict(x0=0.0)"),
        (
            Layer("short", values=dict(x0="0")),
            "values and adds take names with their gates at the start, as dict(x0=0.0)",
        ),
        (Layer("short", adds=dict(late=0.1)), f"'late' {NOT_KEPT}"),
        (Layer("short", adds=EARLY), f"'early' {NOT_KEPT}"),  # the network is in the row that keeps it
        (Layer("short", values=EARLY), f"'early' {NOT_KEPT}"),
        (Layer("short", reads="late"), "reads='late' is kept by no earlier row"),
        (Layer("short", keep="early"), "the name 'early' is taken"),
        (Layer("short", keep="ngrams"), "the name 'ngrams' is taken"),
    ],
)
def test_a_row_of_layers_that_fails_later_or_has_no_effect_is_refused(monkeypatch, row, words):
    with pytest.raises(UserError) as error:
        check_layers(monkeypatch, Layer("short", gates=True, keep="early"), Layer("long"), row)
    assert str(error.value) == f"LAYERS, row 2: {words}"


@pytest.mark.parametrize(
    "name, row", [("mlp_out", (12, 1.0, 5.0)), ("copy_gain", (0, 1.0, 5.0)), ("qkv_lambda", (13, 0.5, (5.0,)))]
)
def test_a_row_of_scalars_that_fails_later_is_refused(monkeypatch, name, row):
    monkeypatch.setitem(train_gpt.SCALARS, name, row)
    with pytest.raises(UserError, match=f"SCALARS, {name}: it takes at least (13|1), and a number as learning-rate"):
        checks.check_tables(train_gpt, Hyperparameters())


@pytest.mark.parametrize(
    "gated",
    [dict(value_embed=True), dict(xsa=True), dict(head_gates=True), dict(values=EARLY), dict(adds=dict(x0=0.1))],
)
def test_gates_take_a_network_in_their_row_or_before(monkeypatch, gated):
    first, row = Layer("short", keep="early"), Layer("short", **gated)
    with pytest.raises(UserError, match="row 1: its gates take a network: give this row or an earlier one gates=True"):
        check_layers(monkeypatch, first, row)
    check_layers(monkeypatch, first, row._replace(gates=True))
    check_layers(monkeypatch, first, Layer(None, gates=True), row)


ADAM, NORMUON = dict(algorithm="adam", betas=(0.9, 0.99), lr=(1.0,)), dict(algorithm="normuon", betas=None)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("embed", dict(algorithm="sgd"), "algorithm is 'adam' or 'normuon'"),
        ("embed", {**ADAM, "betas": None}, "adam takes betas, as (0.9, 0.99)"),
        ("embed", {**ADAM, "betas": 0.9}, "adam takes betas, as (0.9, 0.99)"),
        ("embed", dict(lr=1.0), "lr=1.0 is no tuple, as (1.0,)"),
        ("mlp_bank", {**ADAM, "lr": ()}, "lr=() is no tuple, as (1.0,)"),
        ("mlp_bank", {**NORMUON, "betas": (0.9, 0.99)}, "normuon takes no betas"),
        ("ngrams", dict(averaged=True), "rowwise has no average"),
        ("gate_bias", NORMUON, "normuon is for banks of matrices, this has the shape (4, 36)"),
        ("gate_bias", dict(sharded=True), "sharded, but its first dimension 4 does not divide by 8, the most ranks"),
    ],
)
def test_a_row_of_parameters_that_fails_later_or_has_no_effect_is_refused(monkeypatch, name, change, words):
    rows = [row._replace(**change) if row.name == name else row for row in train_gpt.PARAMETERS]
    monkeypatch.setattr(train_gpt, "PARAMETERS", rows)
    assert refused() == f"PARAMETERS, {name}: {words}"


@pytest.mark.parametrize("first", [1, 2, 4, 12])
def test_what_is_sharded_is_shared_by_eight(monkeypatch, first):
    row = train_gpt.Row("p", "adam", sharded=True, lr=(1.0,), wd=0.0, betas=(0.9, 0.99))
    monkeypatch.setattr(train_gpt, "PARAMETERS", (row,))
    checks.check_parameters(train_gpt, {"p": torch.empty(24, 3)})
    with pytest.raises(UserError, match=f"p: sharded, but its first dimension {first} does not divide by 8"):
        checks.check_parameters(train_gpt, {"p": torch.empty(first, 3)})


@pytest.mark.parametrize("shape", [(8, 41, 64), (8, 64, 20)])
def test_matrices_under_normuon_have_multiples_of_eight_rows_and_columns(monkeypatch, shape):
    monkeypatch.setattr(train_gpt, "PARAMETERS", (train_gpt.Row("p", "normuon", sharded=True, lr=(1.0,), wd=0.0),))
    checks.check_parameters(train_gpt, {"p": torch.empty(8, 48, 64)})
    with pytest.raises(UserError, match=rf"p: normuon takes matrices of .* not \({shape[0]}, {shape[1]}, {shape[2]}\)"):
        checks.check_parameters(train_gpt, {"p": torch.empty(shape)})


@pytest.mark.parametrize("n, least", [(0, 0), (1, 8), (8, 8), (9, 16)])
def test_padding_is_the_least_that_does(n, least):
    assert train_gpt.round_up(n, 8) == least


def test_every_parameter_has_one_row_and_every_row_a_parameter(monkeypatch):
    first, *rest = train_gpt.PARAMETERS
    monkeypatch.setattr(train_gpt, "PARAMETERS", (*rest, rest[0], first._replace(name="tail")))
    told = {first.name: f"{first.name} has 0", rest[0].name: f"{rest[0].name} has 2", "tail": "tail is none"}
    told = ", ".join(told[name] for name in sorted(told))
    assert refused() == f"PARAMETERS takes one row for each of the model's parameters: {told}"


def test_a_sound_row_for_every_bank_under_either_algorithm_is_accepted(monkeypatch):
    for change in (ADAM, NORMUON):
        rows = [row._replace(**change) if "bank" in row.name else row for row in train_gpt.PARAMETERS]
        monkeypatch.setattr(train_gpt, "PARAMETERS", rows)
        assert parse().preset == "smoke"


ROW = TrainingStage(1, 800, 1, 3, 1.0, (1.0, 0.5), (1.0, 0.0))
LAST = ROW._replace(share=None)
NO_PREFIX_WEIGHTS = [0.25, (), (0.25,), (0.25, 0.1, 0.0), [0.25, 0.0]]
NO_PREFIX_WEIGHTS += [(-0.1, 0.0), (0.0, float("inf")), (float("nan"), 0.0), ("1", 0)]


def check_stages(*stages, **values):
    checks.check_hyperparameters(train_gpt, Hyperparameters(stages=stages, **values))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_there_are_any_number_of_stages_and_the_extension(count):
    check_stages(*[ROW] * count, LAST)


@pytest.mark.parametrize(
    "stages, words",
    [
        *[(stages, "STAGES ends with the extension") for stages in ([], [ROW], [LAST], [ROW, LAST, LAST], [LAST, ROW])],
        ([ROW, ROW._replace(share=0), LAST], "STAGES, row 2: share=0 must be positive"),
        ([ROW._replace(share=float("nan")), LAST], "STAGES, row 1: share=nan must be positive"),
        ([ROW, LAST._replace(tokens=801)], "STAGES, row 2: tokens=801 must be a multiple of 8"),
        ([ROW._replace(tokens=0), LAST], "STAGES, row 1: tokens=0 must be a multiple of 8"),
        ([ROW, LAST._replace(max_seq_len=0)], "STAGES, row 2: max_seq_len=0 must be positive"),
        ([ROW._replace(adam=3), LAST], "STAGES, row 1: adam=3: 1, an update in each step, or 2, in every second"),
        ([ROW._replace(short_window=0), LAST], "STAGES, row 1: a window has at least 1 block"),
        (
            [ROW, LAST._replace(target_weights=(1.0,))],
            "STAGES, row 2: 1 multi-token weights at the start, 2 at the end",
        ),
        *[
            (
                [ROW, LAST._replace(classes=classes)],
                f"STAGES, row 2: classes={classes}: 0 for all, or a multiple of 16",
            )
            for classes in (104, -16)  # no multiple of 16, less than none
        ],
        *[
            (
                [ROW, LAST._replace(prefix=prefix)],
                f"STAGES, row 2: prefix={prefix}: a tuple of two weights >= 0, at the start and at the end",
            )
            for prefix in NO_PREFIX_WEIGHTS
        ],
        (
            [ROW._replace(target_weights=(1.0)), LAST],
            "STAGES, row 1: multi-token weights are tuples, of one as (1.0,)",
        ),
        (
            [ROW._replace(share=0.0001), ROW, LAST],
            f"no step of {Hyperparameters.num_scheduled_iterations} falls to row 1 of STAGES",
        ),
    ],
)
def test_a_row_of_stages_that_fails_later_is_refused(stages, words):
    with pytest.raises(UserError) as error:
        check_stages(*stages)
    assert str(error.value).startswith(words)


@pytest.mark.parametrize("classes", [0, 16, 50_320])  # all of 50,304, some, more than there are
def test_a_row_of_stages_may_have_any_multiple_of_16_classes(classes):
    check_stages(ROW, LAST._replace(classes=classes))


@pytest.mark.parametrize("prefix", [(0.0, 0.0), (0.25, 0.0), (0, 2)])
def test_a_row_of_stages_may_have_any_two_weights_of_prefixes(prefix):
    check_stages(ROW, LAST._replace(prefix=prefix))


def test_a_run_that_leaves_a_stage_without_a_step_is_refused():
    with pytest.raises(UserError, match="no step of 2 falls to row 1 of STAGES: raise its share, --num_scheduled"):
        check_stages(ROW, ROW, ROW, LAST, num_scheduled_iterations=2)
    with pytest.raises(UserError, match="no step of 2 falls to row 1"):
        check_stages(ROW, ROW, ROW, LAST, num_scheduled_iterations=200, length=0.01)
    check_stages(ROW, ROW, ROW, LAST, num_scheduled_iterations=300, num_extension_iterations=0, length=0.01)


def test_the_final_windows_are_checked_as_the_stages_are(monkeypatch):
    monkeypatch.setattr(train_gpt, "FINAL_WINDOWS", (6, 0))
    assert refused() == "FINAL_WINDOWS: two windows of at least 1 block"


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "argument, name, value",
    [
        ("--num_scheduled_iterations=380", "num_scheduled_iterations", 380),
        ("--ngram_rows=251_520", "ngram_rows", 251_520),
        ("--adam_lr=0.01", "adam_lr", 0.01),
        ("--adam_eps=1e-8", "adam_eps", 1e-8),
        ("--muon_wd=2", "muon_wd", 2.0),
        ("--save_checkpoint=true", "save_checkpoint", True),
        ("--save_checkpoint=True", "save_checkpoint", True),
        ("--save_checkpoint=1", "save_checkpoint", True),
        ("--save_checkpoint=false", "save_checkpoint", False),
        ("--save_checkpoint=0", "save_checkpoint", False),
        ("--val_steps=5,10,25", "val_steps", (5, 10, 25)),
        ("--val_steps=7", "val_steps", (7,)),
        ("--val_steps=", "val_steps", ()),
        ("--train_files=some/where/*.bin", "train_files", "some/where/*.bin"),
        ("--train_files=a=b", "train_files", "a=b"),
        ("--run_id=first", "run_id", "first"),
    ],
)
def test_a_value_is_read_as_its_hyperparameters_type(argument, name, value):
    hp, overrides = parse_arguments([argument], has_gpu=False)
    assert getattr(hp, name) == value and type(getattr(hp, name)) is type(value)
    assert overrides == {name: value}


def test_every_hyperparameter_but_the_tables_can_be_given():
    for field in dataclasses.fields(Hyperparameters):
        if field.name in ("stages", "preset"):
            continue
        value = getattr(Hyperparameters(), field.name)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        hp, overrides = parse_arguments([f"--{field.name}={text}"], has_gpu=True)
        assert overrides == {field.name: value}
        assert getattr(hp, field.name) == value or field.name == "run_id"


def test_the_last_of_two_values_counts():
    assert parse("--seed=1", "--seed=2").seed == 2


def test_without_arguments_nothing_is_overridden_and_the_run_gets_a_fresh_name():
    hp, overrides = parse_arguments([], has_gpu=True)
    assert overrides == {}
    assert str(uuid.UUID(hp.run_id)) == hp.run_id
    assert parse().run_id != parse().run_id
    assert dataclasses.replace(hp, run_id="", preset="auto") == Hyperparameters()


def test_an_unknown_name_is_refused_with_the_list_of_names():
    message = refused("--num_iterations=5")
    assert "unknown hyperparameter --num_iterations" in message
    for field in dataclasses.fields(Hyperparameters):
        if field.name != "stages":
            assert re.search(rf"\b{field.name}\b", message)


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--num_scheduled_iterations=1e3", "a whole number"),
        ("--num_scheduled_iterations=", "a whole number"),
        ("--seed=0.5", "a whole number"),
        ("--adam_lr=fast", "a number"),
        ("--adam_lr=inf", "a number"),
        ("--save_checkpoint=maybe", "true or false"),
        ("--val_steps=5;10", "numbers as 5,10,25"),
    ],
)
def test_a_bad_value_is_refused_with_what_was_expected(argument, expected):
    assert refused(argument) == f"{argument}: expected {expected}"


@pytest.mark.parametrize("argument", ["--seed", "seed=3", "-seed=3", "save_checkpoint", "3", "--help"])
def test_an_argument_of_another_form_is_refused_with_the_form(argument):
    message = refused(argument)
    assert repr(argument) in message and "--name=value" in message


def test_tables_are_edited_in_the_file_not_given_on_the_command_line():
    message = refused("--stages=3")
    assert "--stages is a table" in message and "edit it at the top of train_gpt.py" in message


# ------------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("argument", [[], ["--preset=auto"]])
def test_without_a_preset_a_gpu_runs_the_speedrun_and_a_cpu_the_smoke_run(argument):
    assert parse(*argument, has_gpu=True).preset == "speedrun"
    assert parse(*argument, has_gpu=False).preset == "smoke"


@pytest.mark.parametrize(("memory", "joined"), [(79.2, 65_536), (47.4, 32_768), (39.5, 32_768)])
def test_a_small_gpu_joins_fewer_micro_batches_unless_told_otherwise(memory, joined):
    assert parse_arguments([], True, memory)[0].micro_batch_tokens == joined
    assert parse_arguments(["--micro_batch_tokens=65536"], True, memory)[0].micro_batch_tokens == 65_536
    assert parse_arguments(["--preset=smoke"], True, memory)[0].micro_batch_tokens == 1024


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_preset_that_is_given_is_taken_whatever_the_machine(has_gpu):
    speedrun, smoke = (parse(f"--preset={name}", has_gpu=has_gpu) for name in ("speedrun", "smoke"))
    assert (speedrun.preset, smoke.preset) == ("speedrun", "smoke")
    assert speedrun.stages == STAGES and speedrun.val_tokens == Hyperparameters.val_tokens
    assert smoke.stages == PRESETS["smoke"]["stages"] and smoke.val_tokens == PRESETS["smoke"]["val_tokens"]


def test_a_value_that_is_given_wins_over_the_preset_and_the_preset_over_the_default():
    hp = parse("--head_dim=16", "--preset=smoke")
    assert hp.head_dim == 16
    assert hp.window_block == PRESETS["smoke"]["window_block"] == 16
    assert hp.num_heads == Hyperparameters().num_heads


def test_the_smoke_run_waits_for_no_compiler_on_a_gpu_unless_it_is_asked_to():
    hp = parse("--preset=smoke", has_gpu=True)
    assert (hp.compile, hp.cuda_graphs) == ("off", "off")
    hp = parse("--preset=smoke", "--compile=auto", "--cuda_graphs=auto", has_gpu=True)
    assert (hp.compile, hp.cuda_graphs) == ("auto", "auto")


def test_an_unknown_preset_is_refused_with_the_list_of_presets():
    message = refused("--preset=quick")
    assert "--preset=quick" in message and "speedrun, smoke" in message


# ------------------------------------------------------------------------------------------------- inconsistent values


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--length=0"], ["--length=0", "(0, 100]"]),
        (["--length=-1"], ["--length=-1", "(0, 100]"]),
        (["--length=1e300"], ["--length=1e+300", "(0, 100]"]),
        (["--length=1%"], ["--length=1%", "expected a number"]),
        (["--num_scheduled_iterations=0"], ["--num_scheduled_iterations=0", "positive"]),
        (["--num_extension_iterations=-1"], ["--num_extension_iterations=-1", "negative"]),
        (["--num_scheduled_iterations=1000000"], ["1000004 steps", "999,999"]),
        (["--window_block=0"], ["--window_block=0", "positive"]),
        (["--window_block=-128"], ["--window_block=-128", "positive"]),
        (["--grad_scale=0"], ["--grad_scale=0", "positive"]),
        (["--adam_eps=0"], ["--adam_eps=0", "positive"]),
        (["--adam_lr=-1"], ["--adam_lr=-1", "negative"]),
        (["--adam_wd=-1"], ["--adam_wd=-1", "negative"]),
        (["--muon_lr=-1"], ["--muon_lr=-1", "negative"]),
        (["--muon_wd=-1"], ["--muon_wd=-1", "negative"]),
        (["--lr_end=-1"], ["--lr_end=-1", "negative"]),
        (["--muon_beta2=1"], ["--muon_beta2=1", "[0, 1)"]),
        (["--muon_beta2=-0.1"], ["--muon_beta2=-0.1", "[0, 1)"]),
        (["--muon_momentum_cooldown=-1"], ["--muon_momentum_cooldown=-1", "negative"]),
        (["--checkpoint_every=-1"], ["--checkpoint_every=-1", "negative"]),
        (["--hang_timeout=-1"], ["--hang_timeout=-1", "negative"]),
        (["--hang_timeout=1e10"], ["--hang_timeout=1", "at most 1e9"]),
        (["--seed=18446744073709551616"], ["--seed=18446744073709551616", "2**64 - 1"]),
        (["--seed=-9223372036854775809"], ["--seed=-9223372036854775809", "-2**63"]),
        (["--val_steps=5,51"], ["--val_steps", "the run ends after step 50", "51"]),
        (["--val_steps=-1"], ["--val_steps", "-1"]),
        (["--resume=auto"], ["--resume=auto", "--run_id="]),
        (["--val_loss_every=-5"], ["--val_loss_every=-5", "negative"]),
        (["--train_max_seq_len=0"], ["--train_max_seq_len=0", "positive"]),
        (["--micro_batch_tokens=0"], ["--micro_batch_tokens=0", "from 1 to 2 ** 20"]),
        (["--micro_batch_tokens=1048577"], ["--micro_batch_tokens=1048577", "from 1 to 2 ** 20"]),
        (["--bench_steps=1"], ["--bench_steps=1", "at least 4"]),
        (["--cooldown_frac=0"], ["--cooldown_frac=0", "(0, 1]"]),
        (["--average_frac=-0.1"], ["--average_frac=-0.1", "[0, 1]"]),
        (["--average_frac=1.1"], ["--average_frac=1.1", "[0, 1]"]),
        (["--cooldown_frac=1.5"], ["--cooldown_frac=1.5", "(0, 1]"]),
        (["--cooldown_frac=nan"], ["--cooldown_frac=nan", "expected a number"]),
        (["--val_tokens=10000"], ["--val_tokens", "multiple of", "8192"]),
        (["--val_tokens=12", "--val_batch_size=12"], ["--val_batch_size", "multiple of 8"]),
        (["--val_batch_size=0"], ["--val_batch_size=0", "positive"]),
        (["--num_heads=3"], ["--num_heads=3", "even"]),
        (["--head_dim=12"], ["--head_dim=12", "power of two"]),
        (["--head_dim=0"], ["--head_dim=0", "power of two"]),
        (["--copy_width=24"], ["--copy_width=24", "power of two from 16 to 128, or 0"]),
        (["--copy_width=8"], ["--copy_width=8", "power of two from 16 to 128, or 0"]),
        (["--copy_width=256"], ["--copy_width=256", "power of two from 16 to 128, or 0"]),
        (["--head_dim=256"], ["--head_dim=256", "power of two from 8 to 128"]),
        (["--ngram_rows=1016"], ["--ngram_rows=1016", "multiple of 16"]),
        (["--ngram_rows=0"], ["--ngram_rows=0", "below 2 ** 31"]),
        (["--ngram_rows=2147483648"], ["--ngram_rows=2147483648", "below 2 ** 31"]),
        (["--num_heads=1026"], ["--num_heads=1026", "at most 1024"]),
        (["--vocab_size=4096", "--bos=4096"], ["--bos=4096", "--vocab_size=4096"]),
        (["--bos=-1"], ["--bos=-1", "--vocab_size"]),
        (["--vocab_size=70000"], ["--vocab_size=70000", "16 bits"]),
        (["--dtype=float16"], ["--dtype=float16", "auto", "bfloat16", "float32"]),
        (["--fp8=maybe"], ["--fp8=maybe", "auto", "head", "off"]),
        (["--compile=true"], ["--compile=true", "auto", "on", "off"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_values_that_could_only_fail_later_are_refused_by_name(arguments, words):
    message = refused("--preset=smoke", *arguments)
    for word in words:
        assert word in message


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_a_seed_is_any_number_that_torch_takes(seed):
    torch.Generator().manual_seed(parse(f"--seed={seed}").seed)


@pytest.mark.parametrize("name", ["train_files", "val_files", "log_dir"])
def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(parse(f"--{name}=~/x_*.bin"), name) == f"{tmp_path}/x_*.bin"


@pytest.mark.parametrize("folder", ["a [v2]", "[!a]", "a*", "what?", "plain"])
def test_data_is_found_in_folders_whose_names_would_be_patterns(monkeypatch, tmp_path, folder):
    root = tmp_path / folder
    root.mkdir()
    paths = [write_shard(root / f"train_{i}.bin", [1]) for i in (1, 2)]
    monkeypatch.setattr(train_gpt, "ROOT", root)
    monkeypatch.chdir(tmp_path)
    assert train_gpt.find_files("train_*.bin") == train_gpt.find_files("train_[12].bin") == paths
    assert train_gpt.find_files(f"{root}/train_*.bin") == paths  # absolute: not below ROOT
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    assert train_gpt.find_files(f"{folder}/train_*.bin") == paths


@pytest.mark.parametrize("run_id", ["a/b", "/a", "../a", "a/", ".", "/"])
def test_a_run_id_with_a_path_is_refused(run_id):
    message = refused(f"--run_id={run_id}")
    assert f"--run_id={run_id}" in message and "must not contain a path" in message


# ------------------------------------------------------------------------------------------------------------ the world


@pytest.fixture
def machine(monkeypatch):
    """Sets what torchrun puts into the environment, and how many GPUs there are."""

    def set_up(gpus=0, visible=None, **environment):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(checks, "NVIDIA_DEVICE", Path("/nowhere"))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or ",".join(map(str, range(gpus))))

        def device_count():
            return gpus and len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))

        def init():
            monkeypatch.setattr(torch.cuda, "default_generators", (None,) * device_count())

        monkeypatch.setattr(torch.cuda, "device_count", device_count)
        monkeypatch.setattr(torch.cuda, "init", init)

    return set_up


def test_a_process_without_a_launcher_is_alone(machine):
    machine()
    assert World.from_environment() == World(0, 1, torch.device("cpu"))


def test_a_process_is_who_the_launcher_says(machine):
    machine(RANK=5, LOCAL_RANK=1, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4)
    assert World.from_environment() == World(5, 8, torch.device("cpu"))


def test_each_process_of_a_host_takes_its_own_gpu(machine):
    machine(gpus=4, RANK=7, LOCAL_RANK=3, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4)
    assert World.from_environment() == World(7, 8, torch.device("cuda", 0))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_it_takes_its_own_of_the_gpus_that_the_user_has_chosen(machine):
    machine(gpus=2, visible="4,GPU-5f", RANK=1, LOCAL_RANK=1, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
    assert World.from_environment().device == torch.device("cuda", 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-5f"


def test_it_takes_its_own_gpu_where_cuda_has_begun_and_still_sees_all(machine, monkeypatch):
    machine(gpus=2, RANK=1, LOCAL_RANK=1, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
    monkeypatch.setattr(torch.cuda, "default_generators", (None, None))  # NVML says 1 even now
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert World.from_environment().device == torch.device("cuda", 1)


def test_a_process_that_is_alone_leaves_the_choice_of_gpus_as_it_is(machine):
    machine(gpus=2, visible="1,0")
    assert World.from_environment().device == torch.device("cuda", 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,0"


@pytest.mark.parametrize("size, micro_batches", [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_the_micro_batches_of_a_step_are_shared_by_all_ranks(machine, size, micro_batches):
    machine(RANK=0, LOCAL_RANK=0, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    assert 8 // World.from_environment().size == micro_batches


@pytest.mark.parametrize("size", [3, 5, 6, 7, 16])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_number_of_processes_that_does_not_divide_8_is_refused(machine, size, rank):
    machine(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    with pytest.raises(UserError) as error:
        World.from_environment()
    assert str(error.value).startswith(f"{size} processes") and "start 1, 2, 4 or 8" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_ranks_count_from_0(machine, name):
    machine(**{**dict(RANK=1, LOCAL_RANK=1, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2), name: 2})
    with pytest.raises(UserError, match=f"{name}='2' in the environment: expected a whole number from 0 to 1"):
        World.from_environment()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["", "-1", "two", "1.5", "9999999"])
def test_an_environment_that_no_launcher_makes_is_refused_by_name(machine, monkeypatch, name, value):
    good = dict(RANK=1, LOCAL_RANK=1, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500)
    machine(**{**good, name: value})
    with pytest.raises(UserError) as error:
        World.from_environment()
        checks.check_launcher(train_gpt)
    assert str(error.value).startswith(name) and "\n" not in str(error.value)
    monkeypatch.setenv(name, "0")
    if name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        with pytest.raises(UserError, match=name):
            World.from_environment()
            checks.check_launcher(train_gpt)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_more_processes_than_gpus_are_refused_on_every_rank_so_that_rank_0_says_it(machine, rank):
    machine(gpus=2, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=4, LOCAL_WORLD_SIZE=4)
    with pytest.raises(UserError, match=r"more processes than GPUs.*--nproc_per_node=2"):
        World.from_environment()


@pytest.mark.parametrize(
    "cuda, driver, words",
    [
        (None, None, "built without CUDA): pip install -r requirements.txt"),
        ("13.0", "The NVIDIA driver on your system is too old (found version 12040).", "too old (found version 12040)"),
        ("13.0", "Found no NVIDIA driver", "install a driver for CUDA 13.0 or newer"),
    ],
)
def test_a_gpu_that_pytorch_cannot_use_is_an_error_not_a_smoke_run(machine, monkeypatch, tmp_path, cuda, driver, words):
    def init():
        raise RuntimeError(driver)

    machine()
    monkeypatch.setattr(checks, "NVIDIA_DEVICE", tmp_path)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError) as error:
        World.from_environment()
    assert words in str(error.value) and "CUDA_VISIBLE_DEVICES= runs on the CPU" in str(error.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not World.from_environment().on_gpu


@pytest.mark.parametrize(
    "capability, nccl, triton, tokens, words",
    [
        ((7, 5), True, True, 512, "has compute capability 7.5: the kernels take 8.0 or newer"),
        ((9, 0), False, True, 512, "no NCCL, which several GPUs need: pip install"),
        ((9, 0), True, False, 512, "Triton is missing, the kernels need it: pip install"),
        ((9, 0), True, True, 448, "STAGES, row 2: 448 tokens a step; products in FP8 take multiples of 128"),
    ],
)
def test_what_a_gpu_run_lacks_is_found_in_the_check_with_the_remedy(
    tmp_path, monkeypatch, capability, nccl, triton, tokens, words
):
    hp = small_check(tmp_path, monkeypatch, capability, tokens)
    monkeypatch.setattr(train_gpt, "triton", SimpleNamespace(__version__="3.6.0") if triton else SimpleNamespace())
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    with pytest.raises(UserError) as error:
        check_world(hp, World(0, 2, torch.device("cuda", 0)))
    assert words in str(error.value)


def check_world(hp, world):
    """What a run that passes says of itself first."""
    return checks.check_world(train_gpt, hp, world, train_gpt.files_of(hp))


def small_check(tmp_path, monkeypatch, capability, tokens=512, free=79):
    """Hyperparameters with `tokens` in stage 2, shards for them, and a GPU with `free` GiB."""
    write_shard(tmp_path / "train_1.bin", text_of([50] * 9000))
    write_shard(tmp_path / "val_0.bin", text_of([50] * 200))
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    for name, value in dict(CC="cc", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = SimpleNamespace(name="Some GPU", major=capability[0], minor=capability[1], total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, 80 << 30))
    hp = parse("--preset=smoke", "--train_files=train_*.bin", "--val_files=val_*.bin", "--val_tokens=8192")
    stages = (ROW._replace(tokens=512), ROW._replace(tokens=tokens), LAST._replace(tokens=512))
    return dataclasses.replace(hp, stages=stages)


@pytest.mark.parametrize("fp8, device", [("off", "cuda"), ("auto", "cpu")])
def test_without_fp8_a_step_may_have_any_multiple_of_eight_tokens(tmp_path, monkeypatch, fp8, device):
    hp = dataclasses.replace(small_check(tmp_path, monkeypatch, (9, 0), tokens=440), fp8=fp8)
    monkeypatch.setattr(train_gpt, "triton", SimpleNamespace(__version__="3.6.0"))
    assert check_world(hp, World(device=torch.device(device)))


@pytest.mark.parametrize("fp8, width, widest", [("auto", 1280, 1024), ("head", 1280, None), ("off", 1280, None)])
def test_a_width_beyond_the_range_of_fp8_is_refused_where_fp8_is_used(tmp_path, monkeypatch, fp8, width, widest):
    hp = dataclasses.replace(small_check(tmp_path, monkeypatch, (9, 0)), fp8=fp8, head_dim=128, num_heads=width // 128)
    monkeypatch.setattr(train_gpt, "triton", SimpleNamespace(__version__="3.6.0"))
    gpu = World(device=torch.device("cuda", 0))
    assert check_world(hp, World())
    assert check_world(dataclasses.replace(hp, num_heads=8), gpu)
    if not widest:
        assert check_world(hp, gpu)
        return
    with pytest.raises(
        UserError, match=f"width {width}: FP8 .* for widths up to {widest}: give --fp8=head, or --fp8=off"
    ):
        check_world(hp, gpu)


def test_the_summary_says_where_stages_begin_and_what_length_came_to(tmp_path, monkeypatch):
    hp = dataclasses.replace(small_check(tmp_path, monkeypatch, (9, 0)), num_scheduled_iterations=41)
    lines = check_world(hp, World())
    assert "stages: begin at steps 0 20 41" in lines and not any("--length" in line for line in lines)
    lines = check_world(dataclasses.replace(hp, length=0.5, muon_momentum_warmup=20), World())
    assert "stages: begin at steps 0 10 20" in lines
    (run,) = [line for line in lines if line.startswith("run: ")]
    assert f"{20 + hp.num_extension_iterations // 2} steps (--length=0.5; momentum 10, " in run


def test_missing_bytecode_is_noted_with_what_makes_it(tmp_path, monkeypatch):
    hp, package = small_check(tmp_path, monkeypatch, (9, 0)), tmp_path / "site" / "torch" / "__init__.py"
    bytecode = Path(importlib.util.cache_from_source(package))
    bytecode.parent.mkdir(parents=True)
    monkeypatch.setattr(torch, "__file__", str(package))
    for there in (False, True):
        (noted,) = [line for line in check_world(hp, World()) if line.startswith("note: there is no ")] or [""]
        found = re.fullmatch(r"note: there is no (\S+): each .* once: python -m compileall -q (\S+); if .*", noted)
        assert found is None if there else found.groups() == (str(bytecode), str(tmp_path / "site"))
        bytecode.touch()


# 5.8 GiB and 21.4 for 49,152 tokens: of one micro-batch, or of those that are joined; eight ranks have one each
@pytest.mark.parametrize(
    "tokens, joined, size, needed",
    [(393_216, 32_768, 1, 27), (262_144, 65_535, 1, 20), (262_144, 65_536, 1, 34), (262_144, 65_536, 8, 20)],
)
def test_too_little_gpu_memory_is_noted_with_what_the_run_needs(tmp_path, monkeypatch, tokens, joined, size, needed):
    monkeypatch.setattr(train_gpt, "triton", SimpleNamespace(__version__="3.6.0"))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    for free, noted in ((needed - 1, True), (needed + 1, False)):
        hp = small_check(tmp_path, monkeypatch, (9, 0), tokens=tokens, free=free)
        hp = dataclasses.replace(hp, head_dim=128, micro_batch_tokens=joined)
        lines = check_world(hp, World(0, size, device=torch.device("cuda", 0)))
        remedy = "lower --micro_batch_tokens or the tokens in STAGES"
        assert (f"note: about {needed} GiB are needed, {free} are free: {remedy}" in lines) == noted


# A row has 768 numbers in bf16 and two of the optimizer: 1,544 bytes. A step looks up two for each of 131,072 tokens,
# copies of 1,536 bytes with gradients of 3,072; on eight ranks an eighth.
@pytest.mark.parametrize(
    "size, rows, table, cache, most",
    [(1, 2**21, "3.02", "1.12", None), (1, 2**24, "24.12", "1.12", 10_939_104), (8, 2**24, "3.02", "0.14", None)],
)
def test_a_table_of_ngrams_that_does_not_fit_is_refused_with_one_that_does(
    tmp_path, monkeypatch, size, rows, table, cache, most
):
    monkeypatch.setattr(train_gpt, "triton", SimpleNamespace(__version__="3.6.0"))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(checks, "bytecode_notes", list)  # not of memory, and of this machine
    hp = small_check(tmp_path, monkeypatch, (9, 0), tokens=131_072, free=24)
    hp = dataclasses.replace(hp, head_dim=128, micro_batch_tokens=1, ngram_rows=rows)
    world = World(0, size, device=torch.device("cuda", 0))
    told = f"n-grams: {rows:,} rows, which take {table} GiB of each rank; those of a step {cache}"
    if most is None:
        assert told in check_world(hp, world)
        return
    with pytest.raises(UserError) as error:
        check_world(hp, world)
    assert f"--ngram_rows={rows}: they take 24.1 GiB of each rank, 24 are free and about 14 are" in str(error.value)
    given = int(re.search(r"give --ngram_rows=(\d+)", str(error.value))[1])
    assert given % 16 == 0
    fits = check_world(dataclasses.replace(hp, ngram_rows=given), world)
    assert not any("note" in line for line in fits)
    more = check_world(dataclasses.replace(hp, ngram_rows=given + 800_000), world)  # a GiB
    assert any("note: about 25 GiB are needed" in line for line in more)


@pytest.mark.parametrize("name", train_gpt.SETTINGS)
def test_the_default_of_a_setting_has_the_type_that_arguments_are_read_as(name):
    setting = train_gpt.SETTINGS[name]  # a checkpoint's settings are compared by type with these
    assert type(setting.default) is (tuple if setting.type == tuple[int, ...] else setting.type)
