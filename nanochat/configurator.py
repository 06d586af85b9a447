"""
Command lines from typed dataclasses.

A script declares its options as a dataclass (name, type, default, help in the string under the field) and
starts with `run(main, Config)`. Options are taken as --a_b=1, --a_b 1, --a-b=1 and --a-b 1; a boolean as
--flag, --flag=1 or --flag false; in a short form such as `-i` where the dataclass names one; --help lists them.
A lone `--`, as in `torchrun … -m scripts.base_train -- --depth=20`, is ignored.

As in nanochat, the first argument may be a settings file: `python -m scripts.base_train small.py --run=mine` with
lines such as `depth = 4` in small.py. The file is parsed, never run; options after it override it.
"""

import ast
import dataclasses
import errno
import sys
import typing
from functools import partial
from pathlib import Path

import torch
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from nanochat.common import UserError, compute_cleanup, fail
from nanochat.ranges import check

TRUE, FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


group = tyro.conf.arg(name="")
"""Annotation for a group of options in its own dataclass: `megacontext: Annotated[MCConfig, group]`."""


def short(*names):
    """Annotation for short forms: `source: Annotated[str, short("-i")] = "sft"`."""
    return tyro.conf.arg(aliases=names)


OptionalInt = typing.Annotated[
    int | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: None if int(words[0]) == -1 else int(words[0]),
        is_instance=lambda value: value is None or isinstance(value, int),
        str_from_instance=lambda value: ["-1" if value is None else str(value)],
    ),
]
"""Type of an option for which users write -1, its default, where the code has None."""


def _spell_out_booleans(argv, names):
    """Give each boolean option its value as a word of its own: `--mc`, `--mc=1`, `--mc 1` → `--mc True`."""
    out, rest = [], list(argv)
    while rest:
        arg = rest.pop(0)
        key, equals, value = arg.partition("=")
        if key.lstrip("-").replace("-", "_") not in names or not key.startswith("--"):
            out.append(arg)
            continue
        if not equals:
            follows = rest and rest[0].lower() in TRUE | FALSE
            value = rest.pop(0) if follows else "true"
        if value.lower() in TRUE | FALSE:  # the parser reports any other value
            value = str(value.lower() in TRUE)
        out += [key, value]
    return out


def _booleans(config_class) -> set[str]:
    """Names of the boolean options, including those of groups."""
    names = set()
    for name, hint in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            names |= _booleans(hint)
        elif hint is bool:
            names.add(name)
    return names


def _settings(path) -> list[str]:
    """The options in a settings file: `depth = 4` is --depth=4. UserError for anything but literal values."""
    try:
        lines = ast.parse(Path(path).read_text("utf-8")).body
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as a file of settings: {error}") from error
    options = []
    for line in lines:
        try:
            if not (isinstance(line, ast.Expr) and isinstance(ast.literal_eval(line.value), str)):  # a docstring
                (name,) = line.targets
                options.append(f"--{name.id}={ast.literal_eval(line.value)}")
        except (AttributeError, ValueError) as error:
            raise UserError(
                f"{path}, line {line.lineno}: expected a name and a literal value, such as depth = 4, got "
                f"{ast.unparse(line)!r}; the file is not run"
            ) from error
    return options


def parse(config_class, argv=None):
    """
    An instance of config_class from the command line. Its method `defaults`, if it has one, gives an instance with the
    values of the options that were not given, such as those of the checkpoint that other options name.

    Exits with a message for options of other names and types; raises UserError for numbers out of range and an invalid
    settings file.
    """
    argv = [arg for arg in (sys.argv[1:] if argv is None else argv) if arg != "--"]
    if argv and argv[0].endswith(".py") and not argv[0].startswith("-"):
        argv = _settings(argv[0]) + argv[1:]
    argv = _spell_out_booleans(argv, _booleans(config_class))
    read = partial(
        tyro.cli,
        config_class,
        args=argv,
        description=sys.modules[config_class.__module__].__doc__,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    )
    config = read()
    check(config)
    if hasattr(config, "defaults"):
        config = read(default=config.defaults())
    return config


REMEDIES = {  # for what a machine may refuse a program
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EROFS: "choose a folder that can be written, such as by NANOCHAT_BASE_DIR",
    errno.EACCES: "have its permissions changed, or choose another folder, such as by NANOCHAT_BASE_DIR",
    errno.EPERM: "have its permissions changed, or choose another folder, such as by NANOCHAT_BASE_DIR",
}


def run(main, config_class):
    """
    Entry point of a script: parse the command line, call main(config), leave the process group if it joined one, show
    a user's errors as one message.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal of few characters shows ? for the others
    try:
        main(parse(config_class))
        compute_cleanup()
    except UserError as error:
        fail(error)
    except torch.OutOfMemoryError as error:
        fail(UserError(f"{error}\nLower --device_batch_size; a training then goes on from its newest checkpoint"))
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        fail(UserError(f"{error.filename or 'writing'}: {error.strerror}; {REMEDIES[error.errno]}, then run it again"))
