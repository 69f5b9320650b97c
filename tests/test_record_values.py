"""The record's own values, each once and only here: what a change of the tables or defaults is meant to break.

Every other test derives what it expects from the tables, for any number of stages and layers.
"""

from dataclasses import asdict

import pytest
import torch

from train_gpt import (
    BACKOUT_LAYER,
    FINAL_WINDOWS,
    GATE_DIMS,
    GPT,
    LAYERS,
    PARAMETERS,
    PRESETS,
    SCALARS,
    SOFTCAP,
    STAGES,
    Hyperparameters,
    TrainingSchedule,
    flops_per_token,
)

SPEEDRUN = TrainingSchedule(Hyperparameters())

# ---------------------------------------------------------------------------- stages


def test_three_stages_of_505_steps_are_followed_by_an_extension_of_40():
    assert SPEEDRUN.starts == (0, 505, 1010, 1515) and SPEEDRUN.hp.total_steps == 1555
    assert [stage.share for stage in STAGES] == [1, 1, 1, None]


def test_stages_are_thirds_rounded_down_and_the_last_has_the_rest():
    for scheduled in range(3, 1600):
        third = scheduled // 3
        schedule = TrainingSchedule(Hyperparameters(num_scheduled_iterations=scheduled))
        assert schedule.starts == (0, third, 2 * third, scheduled)


def test_embedding_and_head_untie_at_the_first_odd_step_of_stage_3():
    for scheduled, step in ((1515, 1011), (380, 253), (1512, 1009), (1518, 1013), (3, 3), (6, 5)):
        assert TrainingSchedule(Hyperparameters(num_scheduled_iterations=scheduled)).untie_step == step


def test_the_batch_grows_from_131072_tokens_to_three_times_that():
    assert [stage.tokens for stage in STAGES] == [131_072, 262_144, 393_216, 393_216]
    tokens = sum(SPEEDRUN.stage(step).tokens for step in range(1555))
    assert tokens == 505 * (131_072 + 262_144 + 393_216) + 40 * 393_216


def test_windows_grow_from_stage_to_stage_and_once_more_for_the_final_validation():
    windows = [SPEEDRUN.windows(step) for step in (0, 505, 1010, 1515)]
    assert [w["short"] for w in windows] == [128, 384, 640, 768]
    assert [w["long"] for w in windows] == [384, 896, 1408, 1664]
    assert SPEEDRUN.window_tokens(*FINAL_WINDOWS) == {"short": 768, "long": 2560}


def test_the_learning_rate_follows_the_batch_and_cools_down_from_step_681_to_a_tenth():
    assert [SPEEDRUN.lr(step) for step in (0, 504, 505, 680, 681)] == [1, 1, 1.52, 1.52, 1.52]
    for step, multiplier in ((682, 1.52), (1009, 1.52), (1010, 1.73), (1514, 1.73)):
        t = (step - 681) / (1515 - 681)
        assert SPEEDRUN.lr(step) == pytest.approx((1 - t) * multiplier + 0.1 * t, rel=1e-12)
    assert {SPEEDRUN.lr(step) for step in (1515, 1530, 1554)} == {0.1}


def test_momentum_rises_over_300_steps_and_falls_back_over_the_last_50():
    expected = {0: 0.85, 150: 0.90, 299: 0.85 + 0.1 * 299 / 300, 300: 0.95, 301: 0.95, 1000: 0.95}
    expected |= {1504: 0.95, 1505: 0.95, 1506: 0.948, 1530: 0.90, 1554: 0.852}
    assert {step: SPEEDRUN.momentum(step) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_three_next_tokens_are_predicted_at_first_and_one_at_last():
    expected = {0: [1, 0.5, 0.25], 101: [1, 0.5, 0.2], 504: [1, 0.5, 0.25 / 505]}
    expected |= {505: [1, 0.5], 606: [1, 0.4], 1009: [1, 0.5 / 505], 1010: [1], 1514: [1], 1515: [1], 1554: [1]}
    for step, weights in expected.items():
        assert SPEEDRUN.target_weights(step) == pytest.approx(weights, rel=1e-9)


# ---------------------------------------------------------------------------- the model


def test_eleven_layers_ten_with_attention():
    def those(condition):
        return [i for i, layer in enumerate(LAYERS) if condition(layer)]

    assert len(LAYERS) == 11 and those(lambda layer: layer.window is None) == [6]
    assert those(lambda layer: layer.window == "long") == those(lambda layer: layer.key_offset) == [3, 10]
    assert those(lambda layer: layer.paired) == [0, 2, 5, 9]
    assert those(lambda layer: layer.value_embed) == [0, 1, 8, 9, 10]
    assert {i: layer.skip_from for i, layer in enumerate(LAYERS) if layer.skip_from is not None} == {6: 3}
    assert (BACKOUT_LAYER, GATE_DIMS, SOFTCAP) == (7, 12, (23.0, 5.0, 7.5))


def test_learned_scalars_start_at_their_values():
    by_layer = {"resid": (11, 1.1), "bigram": (11, 0.1), "qkv": (11, 0.5), "out": (11, 1.0)}
    assert {**by_layer, "smear": (1, 0.0), "backout": (1, 0.5), "skip": (1, -1.5)} == SCALARS


def test_parameters_have_the_records_shapes():
    model = GPT(Hyperparameters(), torch.device("meta"), torch.bfloat16)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "scalars": (47,),
        "x0_lambdas": (11,),
        "smear_gate": (1, 12),
        "skip_gate": (1, 12),
        "attn_gates": (10, 6, 12),
        "value_gates": (5, 6, 12),
        "attn_bank": (10, 4, 768, 768),
        "mlp_bank": (12, 2, 3072, 768),
        "head": (768, 50304),
        "embed": (50304, 768),
        "bigram_embed": (251_520, 768),
        "value_embeds": (5 * 50304, 768),
    }
    # All layers' products with weights, in FP8 all but W_o
    total, in_fp8 = flops_per_token(model, fp8=False)[0], flops_per_token(model, fp8=True)[1]
    assert (round(total / 1e6), round(in_fp8 / 1e6)) == (685, 649)


# ---------------------------------------------------------------------------- the optimizer


def test_each_parameter_has_its_algorithm_and_multipliers():
    rows = {row.name: (row.algorithm, row.sharded, row.lr, row.wd, row.betas) for row in PARAMETERS}
    assert rows == {
        "scalars": ("adam", False, (5,), 0, (0.9, 0.99)),
        "x0_lambdas": ("adam", False, (5,), 0, (0.65, 0.95)),
        "smear_gate": ("adam", False, (0.01,), 0, (0.9, 0.99)),
        "skip_gate": ("adam", False, (0.05,), 0, (0.9, 0.99)),
        "attn_gates": ("adam", False, (1,), 1, (0.9, 0.99)),
        "value_gates": ("adam", False, (1,), 1, (0.9, 0.99)),
        "bigram_embed": ("adam", True, (75,), 5, (0.75, 0.95)),
        "value_embeds": ("adam", True, (75,), 5, (0.75, 0.95)),
        "embed": ("adam", True, (1,), 150, (0.5, 0.95)),
        "head": ("adam", True, (1,), 150, (0.5, 0.95)),
        "attn_bank": ("normuon", True, (1,), 1, None),
        "mlp_bank": ("normuon", True, (1, 2), 1, None),  # W_fc, W_proj
    }
    assert [row.name for row in PARAMETERS if row.sharded][-2:] == ["attn_bank", "mlp_bank"]  # the longest updates last


# ---------------------------------------------------------------------------- every number of a run


def test_the_speedruns_hyperparameters():
    values = asdict(Hyperparameters())
    assert PRESETS["speedrun"] == {}
    expected = dict(
        train_files="data/fineweb10B/fineweb_train_*.bin",
        val_files="data/fineweb10B/fineweb_val_*.bin",
        train_max_seq_len=2048,
        val_tokens=10_485_760,
        val_batch_size=2_097_152,
        num_scheduled_iterations=1515,
        num_extension_iterations=40,
        length=1.0,
        cooldown_frac=0.55,
        lr_end=0.1,
        vocab_size=50257,
        bos=50256,
        bigram_vocab_size=251_520,
        num_heads=6,
        head_dim=128,
        window_block=128,
        adam_lr=0.008,
        adam_eps=1e-10,
        adam_wd=0.005,
        muon_lr=0.023,
        muon_wd=1.2,
        muon_beta2=0.95,
        muon_momentum_warmup=300,
        muon_momentum_cooldown=50,
        grad_scale=2.0,
        val_loss_every=250,
        seed=0,
    )
    assert {name: values[name] for name in expected} == expected


def test_the_smoke_run_goes_through_the_same_stages_with_a_256th_of_the_tokens():
    schedule = TrainingSchedule(Hyperparameters(**PRESETS["smoke"]))
    assert schedule.starts == (0, 12, 24, 36) and schedule.hp.total_steps == 40
    assert [schedule.tokens(step) for step in schedule.starts] == [64, 128, 192, 192]
    assert schedule.windows(0) == {"short": 16, "long": 48}
    assert (schedule.hp.model_dim, schedule.hp.val_tokens, schedule.hp.val_batch_size) == (48, 16_384, 8_192)
