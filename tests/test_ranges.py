"""Every number among the options of every script has a range, and what is out of it is refused in a sentence."""

import importlib
import math
import re
import typing
from dataclasses import MISSING, fields, is_dataclass

import pytest

from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.ranges import check, rules
from tests.helpers import ROOT

SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("scripts", "nanochat", "megacontext", "dev")
    for path in (ROOT / folder).glob("*.py")
    if re.search(r"^class Config\b", path.read_text("utf-8"), re.MULTILINE)
)
REQUIRED = {
    "dev.bench": ["train"],
    "scripts.export_hf": ["--output=x"],
    "scripts.import_nanochat": ["--from=x"],
    "scripts.lm_eval": ["--tasks=x"],
    "scripts.mc_train": ["--hf_path=x"],  # else the defaults are those of a checkpoint
}


def numbers(cls):
    """(name, default, whole) of each numeric option, those of groups included."""
    for field in fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        if is_dataclass(hint):
            yield from numbers(hint)
        elif {int, float} & {hint, *typing.get_args(hint)}:
            yield field.name, field.default, hint is not float


def test_all_scripts_are_found():
    assert {"scripts.base_train", "scripts.chat_web", "nanochat.dataset", "dev.bench"} <= set(SCRIPTS)
    assert len(SCRIPTS) >= 22


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_of_every_script(script):
    config_class = importlib.import_module(script).Config
    required = REQUIRED.get(script, [])
    check(parse(config_class, required))  # the defaults are in their ranges
    for name, default, whole in numbers(config_class):
        for absurd in ("-7", str(10**30)) if whole else ("-7.5", "nan", "inf", "1e31"):
            with pytest.raises(UserError, match=rf"--{name}: expected .*, got "):
                parse(config_class, [*required, f"--{name}={absurd}"])
        if default not in (MISSING, None):
            parse(config_class, [*required, f"--{name}={default}"])


@pytest.mark.parametrize(
    ("script", "option", "expected"),
    [
        ("base_train", "--eval_tokens=0", "1 or more, got 0"),
        ("base_train", "--warmdown_ratio=2", "from 0 to 1, got 2.0"),
        ("base_train", "--grad_clip=-1", "0 or more, got -1.0"),
        ("base_train", "--depth=0", "from 1 to 1,000, got 0"),
        ("base_train", "--num_iterations=0", "1 or more, or -1, got 0"),
        ("base_train", "--block_size=1", "2 or more, got 1"),
        ("chat_sft", "--num_epochs=0", "1 or more, got 0"),
        ("chat_rl", "--temperature=0", "from 1e-05 to 100, got 0.0"),
        ("chat_rl", "--num_samples=1", "2 or more, got 1"),
        ("chat_eval", "--max-problems=0", "1 or more, or -1, got 0"),
        ("chat_cli", "--allocator_expand_threshold=1.5", "from 0 to 1, or -1, got 1.5"),
        ("chat_web", "--port=70000", "from 0 to 65,535, got 70000"),
    ],
)
def test_what_is_expected_is_said(script, option, expected):
    name = option.split("=")[0].replace("-", "_").replace("__", "--", 1)
    with pytest.raises(UserError, match=re.escape(f"{name}: expected {expected}")):
        parse(importlib.import_module(f"scripts.{script}").Config, [option])


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("base_train", ["--eval_every=-1", "--eval_every=0", "--target_flops=-1.0", "--target_param_data_ratio=-1"]),
        (
            "base_train",
            ["--core_metric_max_per_task=-1", "--grad_clip=0.0", "--target_flops=4e21", "--num_iterations=-1"],
        ),
        ("base_eval", ["--max-per-task=-1", "--step=-1", "--step=0"]),
        ("chat_eval", ["-x", "-1"]),
        ("chat_cli", ["-t", "0", "-k", "0", "-s", "650"]),
    ],
)
def test_habits_of_nanochats_users(script, options):
    parse(importlib.import_module(f"scripts.{script}").Config, options)


def test_rules_are_of_fields_alone():
    config_class = importlib.import_module("scripts.base_train").Config
    assert set(rules(config_class)) <= {field.name for field in fields(config_class)}
    assert math.nan not in rules(config_class)["grad_clip"]
