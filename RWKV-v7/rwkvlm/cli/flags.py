"""Command-line flags made from a dataclass of settings: names, types, choices, defaults and help are its fields."""

from __future__ import annotations

import argparse
import difflib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from functools import partial
from typing import Any, NoReturn, TypeVar, get_type_hints

from ..config import UserError

Settings = TypeVar("Settings")
CLOSE = 0.75  # difflib's ratio of two names
KIND = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


class Parser(argparse.ArgumentParser):
    """One whose mistakes are UserErrors of one line; every command has it."""

    cure = "--help lists all flags"
    given: Sequence[str] = ()

    def __init__(self, **how: Any) -> None:
        super().__init__(allow_abbrev=False, **how)  # a mistyped flag must not become another one

    def parse_known_args(self, args=None, namespace=None):
        """Nothing unknown is left over; a command within a command refuses it here, where its own flags are known."""
        self.given = args or ()
        values, unknown = super().parse_known_args(args, namespace)
        if unknown:
            raise self._unknown(unknown[0])
        return values, unknown

    def error(self, message: str) -> NoReturn:
        """A misspelt flag is named first: it may be why another one is missing."""
        for word in self.given if self._subparsers is None else ():  # a command's flags come after its name
            if word.startswith("--") and word != "--" and word.partition("=")[0] not in self._option_string_actions:
                raise self._unknown(word)
        for flag, word in zip(self.given, self.given[1:]):
            if message == f"argument {flag}: expected one argument" and word[:1] == "-" and word not in self._option_string_actions:
                raise UserError(f"{message}; write {flag}={word}, since {word} looks like a flag; a path may also be ./{word}")
        raise UserError(f"{message}; {self.cure}")

    def _unknown(self, argument: str) -> UserError:
        if not argument.startswith("--"):
            return UserError(f"unexpected argument {argument!r}; flags are given as --name value")
        flag, names = argument.partition("=")[0], [name.removeprefix("--") for name in self._option_string_actions]
        typed = flag.removeprefix("--")
        # --lr is lr_init, not ttt_lr, and --seed random_seed; names less alike than CLOSE are other flags, as
        # head_size_divisor and head_size_a
        longer = [name for name in names if name.startswith(f"{typed}_")] or [name for name in names if name.endswith(f"_{typed}")]
        close = longer or difflib.get_close_matches(typed, names, 1, CLOSE)
        return UserError(f"unknown flag {flag}; " + (f"did you mean --{close[0]}?" if close else "--help lists all flags"))


def parse_flags(settings: type[Settings], argv: list[str], prog: str) -> Settings:
    """An instance of the dataclass `settings` from `--name value` and `--name=value` pairs.

    Raises UserError, one line: an unknown flag with the nearest known one, a value of the wrong type, and whatever the dataclass
    itself refuses. `--help` prints all flags and exits with 0.
    """
    types = get_type_hints(settings)
    about = (settings.__doc__ or "").partition("\n")[0]
    width = min(140, shutil.get_terminal_size((142, 24)).columns - 2)  # into a pipe: 140
    wide = partial(argparse.HelpFormatter, max_help_position=40 if width > 90 else 24, width=width)
    parser = Parser(prog=prog, usage=f"{prog} [--flag value ...]", description=about, formatter_class=wide)
    for f in fields(settings):
        kind = types[f.name]
        bare = dict(nargs="?", const=True) if kind is bool else {}  # --dry_run alone means True
        parser.add_argument(
            f"--{f.name}", **bare, type=_converter(kind), default=f.default, metavar=kind.__name__.upper(), help=_help(f).replace("%", "%%")
        )
    return settings(**vars(parser.parse_args(argv)))


def _help(f: Field) -> str:
    choices = [c for c in f.metadata.get("choices") or () if c not in ("", 0, 1)]
    one_of = f"; one of {', '.join(choices)}" if len(choices) > 1 else ""
    default = f.metadata.get("unset") or ("" if f.metadata.get("of") else f.default)  # what stands for "not given" is no default
    return f"{f.metadata['help']}{one_of}{'' if default == '' else f' [{default}]'}"


def _converter(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            if kind is bool:
                return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            return kind(text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"{text!r} is not {KIND[kind]}") from None

    return convert
