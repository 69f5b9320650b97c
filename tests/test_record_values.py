"""The record's own values, each once and only here: what a change of the tables or defaults is meant to break.

Every other test derives what it expects from the tables, for any number of stages and layers.
"""

from dataclasses import asdict

import describe
import pytest
import torch
from bench import flops_per_token

import train_gpt
from train_gpt import (
    FINAL_WINDOWS,
    GATE_HIDDEN,
    GATE_SCALE,
    GPT,
    HEAD_GATE,
    LAYERS,
    PARAMETERS,
    PRESETS,
    SCALARS,
    SOFTCAP,
    STAGES,
    VALUE_GATE,
    XSA_GATE,
    Hyperparameters,
    TrainingSchedule,
)

SPEEDRUN = TrainingSchedule(Hyperparameters())

# ---------------------------------------------------------------------------- stages


def test_four_stages_that_share_3312_steps_are_followed_by_an_extension_of_96():
    assert SPEEDRUN.starts == (0, 736, 2208, 3128, 3312) and SPEEDRUN.hp.total_steps == 3408
    assert [stage.share for stage in STAGES] == [1, 2, 1.25, 0.25, None]


def test_stages_are_shares_rounded_down_and_the_last_has_the_rest():
    for scheduled in range(7, 1600):
        first, second, third = scheduled * 2 // 9, scheduled * 4 // 9, scheduled * 5 // 18
        schedule = TrainingSchedule(Hyperparameters(num_scheduled_iterations=scheduled))
        assert schedule.starts == (0, first, first + second, first + second + third, scheduled)


def test_the_batch_grows_once_from_65536_tokens_to_twice_that():
    assert [stage.tokens for stage in STAGES] == [*2 * [65_536], *3 * [131_072]]
    tokens = sum(SPEEDRUN.stage(step).tokens for step in range(3408))
    assert tokens == 2208 * 65_536 + (3408 - 2208) * 131_072


def test_the_joined_micro_batches_of_one_gpu_have_one_length():
    hp = Hyperparameters()
    sizes = {SPEEDRUN.size(step)[0] for step in SPEEDRUN.starts}
    assert {size * train_gpt.micro_batches_together(size, hp, train_gpt.World()) for size in sizes} == {65_536}


def test_adam_updates_in_each_step_of_the_first_stage_and_then_in_every_second():
    assert [stage.adam for stage in STAGES] == [1, 2, 2, 2, 2]


def test_documents_are_cut_at_896_tokens_in_the_first_stage_and_at_2048_then():
    sizes = [SPEEDRUN.size(step) for step in (0, 735, 736, 2207, 2208, 3128, 3312)]
    expected = [*2 * [(8192, 896)], *2 * [(8192, 2048)], *3 * [(16_384, 2048)]]
    assert [size[:2] for size in sizes] == expected


def test_the_softmax_has_12288_classes_at_first_then_17408_and_all_in_the_last_280_steps():
    classes = [SPEEDRUN.size(step)[2] for step in (0, 735, 736, 2207, 2208, 3127, 3128, 3312, 3407)]
    assert classes == [12_288, 12_288, 12_288, 12_288, 17_408, 17_408, 0, 0, 0]  # 0: all


def test_windows_grow_from_stage_to_stage_and_once_more_for_the_final_validation():
    windows = [SPEEDRUN.windows(step) for step in (0, 736, 2208, 3128, 3312)]
    assert [w["short"] for w in windows] == [128, 384, 640, 640, 768]
    assert [w["long"] for w in windows] == [384, 896, 1408, 1408, 1664]
    assert SPEEDRUN.window_tokens(*FINAL_WINDOWS) == {"short": 768, "long": 2560}


def test_the_learning_rate_follows_the_batch_and_cools_down_from_step_662_to_three_tenths():
    assert [SPEEDRUN.lr(step) for step in (0, 661, 662)] == [0.85, 0.85, 0.85]
    for step, multiplier in ((663, 0.85), (735, 0.85), (736, 1.0), (2207, 1.0), (2208, 1.2), (3128, 1.2), (3311, 1.2)):
        t = (step - 662) / (3312 - 662)
        assert SPEEDRUN.lr(step) == pytest.approx((1 - t) * multiplier + 0.3 * t, rel=1e-12)
    assert {SPEEDRUN.lr(step) for step in (3312, 3370, 3407)} == {0.3}


def test_matrices_and_embeddings_end_as_their_average_over_every_fourth_of_the_last_341_steps():
    banks, tables = ["qk_bank", "narrow_qk_bank", "mlp_bank", "vo_bank"], ["spellings", "embed"]
    assert [row.name for row in PARAMETERS if row.averaged] == banks[:2] + tables + banks[2:]
    weights = {step: weight for step in range(3408) if (weight := SPEEDRUN.average_weight(step))}
    assert [*weights] == [*range(3067, 3408, 4)]
    assert weights.pop(3067) == 1 and {*weights.values()} == {8 / 341}


def test_momentum_rises_over_560_steps_and_falls_back_over_the_last_376():
    expected = {0: 0.85, 280: 0.89, 559: 0.85 + 0.08 * 559 / 560, 560: 0.93, 561: 0.93, 1000: 0.93}
    expected |= {3031: 0.93, 3032: 0.93, 3033: 0.93 - 0.08 / 376, 3220: 0.89, 3407: 0.85 + 0.08 / 376}
    assert {step: SPEEDRUN.momentum(step) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_three_next_tokens_and_a_prefix_are_predicted_at_first_and_one_token_at_last():
    expected = {0: [1, 0.5, 0.25, 0.25], 368: [1, 0.5, 0.125, 0.25], 735: [1, 0.5, 0.25 / 736, 0.25]}
    expected |= {736: [1, 0.5, 0.25], 1472: [1, 0.25, 0.125], 2207: [1, 0.5 / 1472, 0.25 / 1472]}
    expected |= {step: [1, 0] for step in (2208, 3128, 3312, 3407)}
    for step, weights in expected.items():
        assert SPEEDRUN.target_weights(step) == pytest.approx(weights, rel=1e-9)


# ---------------------------------------------------------------------------- the model


def those(condition):
    return [i for i, layer in enumerate(LAYERS) if condition(layer)]


def test_eleven_layers_ten_with_attention_between_a_row_at_the_start_and_one_at_the_end():
    assert len(LAYERS) == 13 and those(lambda layer: not layer.mlp) == [0, 12]
    assert those(lambda layer: layer.window is None) == [0, 7, 12]
    assert those(lambda layer: layer.window == "long") == those(lambda layer: layer.key_offset) == [4, 11]
    assert those(lambda layer: layer.head_gates) == [4, 11]
    assert those(lambda layer: layer.paired) == [1, 3, 6]
    assert those(lambda layer: layer.value_embed) == [2, 3, 9, 11]
    assert those(lambda layer: layer.xsa) == [2, 4, 8]


def test_four_outputs_are_kept_and_four_networks_say_how_much_of_them_is_added_where():
    assert {layer.keep: i for i, layer in enumerate(LAYERS) if layer.keep} == dict(start=0, early=4, middle=8, late=10)
    assert those(lambda layer: layer.gates) == [0, 5, 11, 12]
    assert {i: LAYERS[i].reads for i in those(lambda layer: layer.reads)} == dict.fromkeys((9, 11), "middle")
    assert {i: LAYERS[i].values for i in those(lambda layer: layer.values)} == {
        **{i: dict(ngrams=0.0) for i in (2, 3, 9)},
        11: dict(start=0.0, middle=0.0, late=0.0, ngrams=0.0),
    }
    ngrams = dict(ngrams=0.05)
    assert {i: layer.adds for i, layer in enumerate(LAYERS)} == {
        1: {}, **dict.fromkeys((0, 2, 3, 4, 5, 6, 8, 9, 10), ngrams), 7: dict(early=0.09),
        11: dict(start=0.0, middle=0.0, late=0.0, ngrams=0.05), 12: dict(start=0.0, early=0.0, middle=-0.5, late=0.0),
    }  # fmt: skip
    assert (XSA_GATE, HEAD_GATE, VALUE_GATE, GATE_HIDDEN, GATE_SCALE) == (0.0, 0.25, 1.0, 64, 0.1)
    assert SOFTCAP == (23.0, 5.0, 7.5)


def test_learned_scalars_start_at_their_values_and_learn_at_their_rates():
    by_layer = {"attn_resid": (13, 1.1, 5.0), "mlp_out": (13, 1.0, 5.0)}
    copying = {"copy_gain": (1, 1.0, 5.0), "copy_bias": (1, 15.0, 5.0)}
    assert {**by_layer, "qkv_lambda": (13, 0.5, 5.0), **copying} == SCALARS


def test_parameters_have_the_records_shapes():
    model = GPT(Hyperparameters(), torch.device("meta"), torch.bfloat16)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "scalars": (41,),
        "gate_in": (4, 64, 768),
        # the first network, of rows 0 to 4, has the most: 1 + 0 + (6 + 6 + 1 + 1) + (6 + 1 + 1) + (6 + 6 + 1)
        "gate_out": (4, 36, 64),
        "gate_bias": (4, 36),
        "copy_qk": (256, 768),
        "copy_sentinel": (1, 768),
        "qk_bank": (16, 256, 768),  # two layers' three pairs of heads, for queries and keys
        "narrow_qk_bank": (48, 128, 768),  # the other eight's
        "vo_bank": (24, 768, 768),
        "mlp_bank": (12, 2, 3072, 768),
        "embed": (50304, 768),
        "spellings": (50304, 768),
        "value_embeds": (4 * 50304, 768),
    }
    assert model.tensors()["ngrams"].shape == (8_388_608, 768)
    # All layers' products with weights, in FP8 all but W_o
    (total, _), (_, in_fp8) = (flops_per_token(train_gpt, model, fp8) for fp8 in (False, True))
    assert (round(total / 1e6), round(in_fp8 / 1e6)) == (656, 621)


# ---------------------------------------------------------------------------- the optimizer


def test_each_parameter_has_its_algorithm_and_multipliers():
    rows = {row.name: (row.algorithm, row.sharded, row.lr, row.wd, row.betas) for row in PARAMETERS}
    assert rows == {
        "scalars": ("adam", False, (5,) * 41, 0, (0.9, 0.99)),
        "gate_in": ("adam", False, (0.2,), 1, (0.9, 0.99)),
        "gate_out": ("adam", False, (0.2,), 1, (0.9, 0.99)),
        "gate_bias": ("adam", False, (0.2,), 0, (0.9, 0.99)),
        "copy_qk": ("adam", False, (0.2,), 1, (0.9, 0.99)),
        "copy_sentinel": ("adam", False, (0.05,), 1, (0.9, 0.99)),
        "value_embeds": ("adam", True, (75,), 5, (0.75, 0.95)),
        "embed": ("adam", True, (1,), 150, (0.5, 0.95)),
        "spellings": ("adam", True, (0.5,), 150, (0.5, 0.95)),
        "qk_bank": ("normuon", True, (1,), 1, None),
        "narrow_qk_bank": ("normuon", True, (1,), 1, None),
        "vo_bank": ("normuon", True, (1,), 1, None),
        "mlp_bank": ("normuon", True, (1, 2), 1, None),  # W_fc, W_proj
        "ngrams": ("rowwise", True, (70,), 5, (0, 0.95)),
    }
    # what is there soonest, tables, the longest update, what waits and is waited for, a short message; then the small
    large = ["qk_bank", "narrow_qk_bank", "value_embeds", "spellings", "embed", "mlp_bank", "ngrams", "vo_bank"]
    small = ["scalars", "gate_in", "gate_out", "gate_bias", "copy_qk", "copy_sentinel"]
    assert [row.name for row in PARAMETERS] == [*large, *small]
    assert train_gpt.NGRAM_FACTORS == {2: (36313, 27191), 3: (17351, 60961, 45259)}


# ---------------------------------------------------------------------------- every number of a run


def test_the_speedruns_hyperparameters():
    values = asdict(Hyperparameters())
    assert PRESETS["speedrun"] == {}
    expected = dict(
        train_files="data/fineweb10B/fineweb_train_*.bin",
        val_files="data/fineweb10B/fineweb_val_*.bin",
        train_max_seq_len=2048,
        micro_batch_tokens=65_536,
        val_tokens=10_485_760,
        val_batch_size=2_097_152,
        num_scheduled_iterations=3312,
        num_extension_iterations=96,
        length=1.0,
        cooldown_frac=0.8,
        lr_end=0.3,
        average_frac=0.1,
        vocab_size=50257,
        bos=50256,
        vocabulary="data/gpt2.tiktoken",
        ngram_rows=8_388_608,
        copy_width=128,
        num_heads=6,
        head_dim=128,
        mlp_ratio=4,
        window_block=128,
        adam_lr=0.008,
        adam_eps=1e-10,
        adam_wd=0.005,
        muon_lr=0.028,
        muon_wd=1.2,
        muon_beta2=0.95,
        muon_momentum_warmup=560,
        muon_momentum_cooldown=376,
        grad_scale=2.0,
        val_loss_every=250,
        seed=0,
    )
    assert {name: values[name] for name in expected} == expected


def test_the_smoke_run_goes_through_the_same_stages_with_a_128th_of_the_tokens():
    schedule = TrainingSchedule(Hyperparameters(**PRESETS["smoke"]))
    assert schedule.starts == (0, 10, 30, 42, 46) and schedule.hp.total_steps == 50
    assert [schedule.size(step)[0] for step in schedule.starts] == [*2 * [64], *3 * [128]]
    assert {schedule.size(step)[1] for step in schedule.starts} == {256}
    assert schedule.windows(0) == {"short": 16, "long": 48}
    assert (schedule.hp.model_dim, schedule.hp.val_tokens, schedule.hp.val_batch_size) == (48, 16_384, 8_192)
    assert schedule.hp.copy_width == 16


def test_a_run_takes_the_memory_that_describe_tells():
    run = describe.Run(train_gpt, train_gpt.parse_arguments([], has_gpu=True)[0])
    held = sum(describe.states_bytes(run, 1).values()) + describe.fp8_bytes(run)
    told = (held + describe.most_kept(run, 1)) / 2**30
    assert told == pytest.approx(44.9, rel=0.06)  # measured: 46,617 MiB, less 603 that the warm-up held then
    assert f"{told:.2f}  " in describe.text(train_gpt, run.hp)
    # On eight processes stages differ: the last have micro-batches twice as long
    stages = [stage._replace(classes=0) for stage in run.hp.stages]
    kept = [sum(describe.kept_bytes(run, *of).values()) for of in zip(stages, run.micro_batches(8), strict=True)]
    assert describe.most_kept(run, 8) == kept[-1] > 1.9 * kept[0]
