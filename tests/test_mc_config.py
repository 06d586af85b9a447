"""The settings: their names, what is refused, what -1 becomes."""

import dataclasses

import pytest

from megacontext.config import MCConfig
from megacontext.working_context import WorkingContext
from nanochat.common import UserError
from nanochat.configurator import parse

DEFAULTS = {
    "block_size": 32,
    "gistnet_type": "transformer",
    "gistnet_layers": 2,
    "gistnet_pooling": "mean",
    "gistnet_head": "mlp",
    "gistnet_start": "mean",
    "gistnet_deep": 3,
    "mc_gist_limit": 0,
    "mc_beside": 0.0,
    "lensnet_type": "transformer",
    "lensnet_layers": 2,
    "lensnet_head": "mlp",
    "allocator": "greedy",
    "allocator_sample_top_k": 4,
    "allocator_sample_temperature": 1.0,
    "allocator_soft_max": -1,
    "allocator_recent_tokens": -1,
    "allocator_expand_threshold": 0.1,
    "allocator_collapse_threshold": 0.1,
    "allocator_max_replacements": 4,
    "allocator_iterations": 4,
    "mc_tree": "ram",
    "mc_num_random_variants": 2,
    "mc_start": 0.0,
    "mc_past": -1,
    "mc_train_wc_length": -1,
    "mc_max_counterfactuals": 1,
    "mc_auto_batch": True,
    "mc_eval_soft_max_length": -1,
    "mc_infer_allocator_max_replacements": -1,
    "mc_infer_allocator_iterations": -1,
    "mc_infer_refocus_interval": 32,
    "mc_infer_exact": False,
    "mc_lens_loss_weight": 1.0,
    "mc_aux_dtype": "auto",
    "mc_positional": "near",
    "mc_freeze_base": False,
}


def test_names_and_defaults_are_frozen():
    assert dataclasses.asdict(MCConfig()) == DEFAULTS
    with pytest.raises(dataclasses.FrozenInstanceError):
        MCConfig().block_size = 8


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("block_size", 1, "2 or more"),
        ("gistnet_type", "lstm", "one of transformer, mean, copied"),
        ("gistnet_layers", 3, "one of 2, 4, 6"),
        ("gistnet_pooling", "max", "one of mean, query, cls"),
        ("gistnet_head", "none", "one of linear, mlp"),
        ("lensnet_type", "mean", "one of transformer"),
        ("lensnet_layers", 1, "one of 2, 4, 8"),
        ("lensnet_head", "", "one of linear, mlp"),
        ("allocator", "random", "one of greedy, stochastic_greedy"),
        ("allocator_sample_top_k", 0, "1 or more"),
        ("allocator_sample_temperature", 0.0, "1e-06 or more"),
        ("allocator_sample_temperature", float("nan"), "1e-06 or more"),
        ("allocator_sample_temperature", float("inf"), "1e-06 or more"),
        ("allocator_soft_max", 0, "1 or more, or -1"),
        ("allocator_recent_tokens", -2, "0 or more, or -1"),
        ("allocator_expand_threshold", 1.5, "from 0 to 1"),
        ("allocator_collapse_threshold", float("nan"), "from 0 to 1"),
        ("allocator_max_replacements", -1, "1 or more"),
        ("allocator_iterations", 0, "1 or more"),
        ("mc_tree", "cloud", "one of ram, disk"),
        ("mc_num_random_variants", 0, "1 or more"),
        ("mc_start", 1.0, "from 0 to 0.99"),
        ("mc_train_wc_length", -5, "1 or more, or -1"),
        ("mc_max_counterfactuals", 0, "1 or more"),
        ("mc_eval_soft_max_length", 0, "1 or more, or -1"),
        ("mc_infer_allocator_max_replacements", 0, "1 or more, or -1"),
        ("mc_infer_allocator_iterations", 0, "1 or more, or -1"),
        ("mc_infer_refocus_interval", -1, "1 or more"),
        ("mc_lens_loss_weight", -0.1, "0 or more"),
        ("mc_aux_dtype", "fp16", "one of auto, fp32, bf16"),
        ("mc_positional", "alibi", "one of near, rank, gaussian, simple"),
    ],
)
def test_bad_values_are_refused_with_what_was_expected_and_got(name, value, expected):
    with pytest.raises(UserError) as error:
        MCConfig(**{name: value})
    assert str(error.value) == f"--{name}: expected {expected}, got {value!r}"


def test_a_frozen_model_has_nothing_to_learn_alone():
    with pytest.raises(UserError, match="--mc_start: expected 0 with --mc_freeze_base"):
        MCConfig(mc_start=0.5, mc_freeze_base=True).resolve(2048)


def test_settings_of_older_checkpoints():
    """What was not yet an option when they were made is as it was then; deep gists were not yet made."""
    assert MCConfig.saved({"block_size": 8}) == MCConfig(block_size=8, gistnet_deep=0)
    assert MCConfig.saved(dataclasses.asdict(MCConfig())) == MCConfig()


def test_every_field_is_an_option_with_help(capsys):
    args = [f"--{name}={value}" for name, value in DEFAULTS.items() if value != -1]
    assert parse(MCConfig, args) == MCConfig()
    assert parse(MCConfig, ["--gistnet-layers", "4", "--mc_auto_batch", "0"]) == MCConfig(
        gistnet_layers=4, mc_auto_batch=False
    )
    with pytest.raises(SystemExit):
        parse(MCConfig, ["--help"])
    text = capsys.readouterr().out
    for name in DEFAULTS:
        assert f"--{name}" in text


def test_lengths_are_derived_from_max_seq_len():
    config = MCConfig(allocator_max_replacements=7, allocator_iterations=3).resolve(2048)
    assert (config.allocator_soft_max, config.mc_eval_soft_max_length) == (1536, 1504)
    assert (config.allocator_recent_tokens, config.mc_train_wc_length) == (128, 409)
    assert (config.mc_infer_allocator_max_replacements, config.mc_infer_allocator_iterations) == (7, 3)
    assert -1 not in dataclasses.asdict(config).values()
    assert config.resolve(2048) == config


def test_given_lengths_stay():
    lengths = {
        "allocator_soft_max": 900,
        "allocator_recent_tokens": 0,
        "mc_past": 4096,
        "mc_train_wc_length": 500,
        "mc_eval_soft_max_length": 700,
        "mc_infer_allocator_max_replacements": 2,
        "mc_infer_allocator_iterations": 5,
    }
    assert MCConfig(**lengths).resolve(2048) == MCConfig(**lengths)
    assert MCConfig(mc_train_wc_length=900).resolve(2048).mc_eval_soft_max_length == 1504


@pytest.mark.parametrize("max_seq_len", [32, 33, 64, 100, 256, 512, 1000, 2048, 8192])
def test_derived_lengths_can_be_reached(max_seq_len):
    config = MCConfig().resolve(max_seq_len)
    budget, recent = config.mc_train_wc_length, config.allocator_recent_tokens
    assert budget <= max_seq_len
    assert WorkingContext.initial(max_seq_len, 32, budget, recent).lengths().item() <= budget


@pytest.mark.parametrize(
    ("settings", "max_seq_len", "message"),
    [
        ({"block_size": 64}, 32, "--block_size: expected at most max_seq_len, 32, got 64"),
        ({"mc_train_wc_length": 100}, 64, "--mc_train_wc_length: expected at most max_seq_len, 64, got 100"),
        ({"mc_train_wc_length": 30}, 256, "--mc_train_wc_length: expected at least 39, .* newest 32 .* got 30"),
        ({"allocator_soft_max": 38}, 256, "--allocator_soft_max: expected at least 39, .* got 38"),
        ({"mc_eval_soft_max_length": 9}, 256, "--mc_eval_soft_max_length: expected at least 39, .* got 9"),
        ({"allocator_recent_tokens": 200, "mc_train_wc_length": 60}, 256, "--mc_train_wc_length.*at least 225.*got 60"),
    ],
)
def test_lengths_that_cannot_be_are_refused(settings, max_seq_len, message):
    with pytest.raises(UserError, match=message):
        MCConfig(**settings).resolve(max_seq_len)
