"""
Command lines from typed dataclasses.

A script declares its options as a dataclass (name, type, default, help in the string under the field) and
starts with `run(main, Config)`. Options are taken as --a_b=1, --a_b 1, --a-b=1 and --a-b 1; a boolean as
--flag, --flag=1 or --flag false; `-i` style short forms where the dataclass names one; --help explains.
A lone `--`, as in `torchrun … -m scripts.base_train -- --depth=20`, is passed over.
"""

import dataclasses
import sys
import typing

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from nanochat.common import UserError, fail

TRUE, FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


group = tyro.conf.arg(name="")
"""Annotation for options that are a dataclass of their own: `megacontext: Annotated[MCConfig, group]`."""


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
        if value.lower() in TRUE | FALSE:  # anything else is left for the parser to complain about
            value = str(value.lower() in TRUE)
        out += [key, value]
    return out


def _booleans(config_class) -> set[str]:
    """Names of the boolean options, those of groups among them."""
    names = set()
    for name, hint in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            names |= _booleans(hint)
        elif hint is bool:
            names.add(name)
    return names


def parse(config_class, argv=None):
    """An instance of config_class from the command line. Exits with a message on options that do not fit."""
    argv = sys.argv[1:] if argv is None else argv
    argv = _spell_out_booleans([arg for arg in argv if arg != "--"], _booleans(config_class))
    return tyro.cli(
        config_class,
        args=argv,
        description=sys.modules[config_class.__module__].__doc__,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    )


def run(main, config_class):
    """Entry point of a script: parse the command line, call main(config), show a UserError as one message."""
    try:
        main(parse(config_class))
    except UserError as error:
        fail(error)
