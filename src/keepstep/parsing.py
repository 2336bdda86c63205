"""Read a recipe from YAML and flags; every mistake in one report."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, TrlParser

from .config import ConfigError, DataConfig, KeepstepConfig, Problem, Recipe


class RecipeParser(TrlParser):
    """TrlParser that raises ConfigError, all problems at once, where argparse would print usage."""

    def __init__(self) -> None:
        super().__init__((DataConfig, KeepstepConfig, ModelConfig), allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError([Problem(f"command line: {message}")])

    def parse(self, argv: Sequence[str]) -> Recipe:
        """Read `--config FILE` and `--field value` flags; flags win.

        Raises:
            ConfigError: unknown fields, values of a wrong type, an unreadable file.
        """
        arguments = list(argv)
        path, arguments = _take_config_flag(arguments)
        values = _read_yaml(path) if path else {}
        actions = {action.dest: action for action in self._actions}
        problems = [p for name, value in values.items() for p in _check(name, value, actions)]
        if problems:
            raise ConfigError(problems)
        self.set_defaults_with_config(
            **{name: _fixed(value, actions[name]) for name, value in values.items()}
        )
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(
                args=arguments, return_remaining_strings=True
            )
        except (ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError([Problem(_first_line(error))]) from error
        flags = [text for text in unknown if text.startswith("--")]
        if unknown:
            raise ConfigError([_unknown(f[2:], actions, "flag --") for f in flags or unknown])
        return Recipe(*parsed)


def parse_recipe(argv: Sequence[str]) -> Recipe:
    """The recipe that a command line asks for. Ranks: any; every rank reads the same."""
    return RecipeParser().parse(argv)


def _take_config_flag(arguments: list[str]) -> tuple[str | None, list[str]]:
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--config")
    known, rest = reader.parse_known_args(arguments)
    return known.config, rest


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        reason = f"the recipe {path} cannot be read: {error.strerror}"
        raise ConfigError([Problem(reason)]) from error
    except yaml.YAMLError as error:
        raise ConfigError([Problem(f"the recipe {path} is not YAML: {error}")]) from error
    if not isinstance(values, dict):
        raise ConfigError([Problem(f"the recipe {path} holds no `field: value` lines")])
    return values


def _check(name: str, value: Any, actions: dict[str, argparse.Action]) -> list[Problem]:
    """argparse trusts defaults that are not strings, so a recipe's values are checked here."""
    if name not in actions:
        return [_unknown(name, actions, "field ")]
    action = actions[name]
    value = _fixed(value, action)
    if action.choices and value not in action.choices:
        choices = ", ".join(map(str, action.choices))
        return [Problem(f"{name}: {value!r} is none of: {choices}")]
    if isinstance(action.type, type) and action.type in (int, float, str):
        for item in value if action.nargs and isinstance(value, list) else [value]:
            if not _fits(item, action.type):
                return [
                    Problem(
                        f"{name}: {item!r} is not a value of type {action.type.__name__}",
                        str(action.help or ""),
                    )
                ]
    return []


def _fits(value: Any, kind: type) -> bool:
    if value is None:
        return True
    if isinstance(value, (bool, dict, list)):
        return False
    if kind is int and isinstance(value, float):
        return value.is_integer()
    try:
        kind(value)
    except ValueError:
        return False
    return True


def _fixed(value: Any, action: argparse.Action) -> Any:
    """YAML reads a bare `no` as False, and `1.0e+3` for an int as a float."""
    if value is False and action.choices and "no" in action.choices:
        return "no"
    if action.type is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _unknown(name: str, actions: dict[str, argparse.Action], kind: str) -> Problem:
    close = difflib.get_close_matches(name, actions, n=1)
    return Problem(
        f"unknown {kind}{name}",
        f"did you mean `{close[0]}`?" if close else "`--help` lists every field.",
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
