"""Read a recipe from YAML and flags; every mistake in one report."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, get_type_hints

import yaml
from trl import ModelConfig, TrlParser

from keepstep.recipe.config import ConfigError, DataConfig, KeepstepConfig, Problem, Recipe
from keepstep.recipe.unknown import close_to, unknown
from keepstep.recipe.values import FILES, read, takes, takes_several

PARTS = (DataConfig, KeepstepConfig, ModelConfig)
PATHS = (
    *("model_name_or_path", "dataset_name", "eval_dataset_name", "output_dir"),
    *("chat_template_path", "resume_from_checkpoint", *FILES),
)
# What the constructors of PARTS raise of values that do not go together, or that they look into.
REFUSALS = (
    *(ValueError, TypeError, AttributeError, KeyError),
    *(AssertionError, ImportError, NotImplementedError),
)
# What the constructors look for on this machine: `keepstep check` may run on another one.
OF_THE_LAUNCH = ("ddp_backend", "tf32")
NOTHING = object()  # the value of a flag without one
Validate: TypeAlias = Callable[[Recipe], Iterable[Problem]]


@dataclass(frozen=True)
class CommandLine:
    """A command line, taken apart: recipes, values by field, and what is left over."""

    recipes: list[str]
    values: dict[str, Any]
    rest: list[str]


class RecipeParser(TrlParser):
    """TrlParser's flags; what they and a recipe say is read by the types of the fields."""

    def __init__(self) -> None:
        super().__init__(PARTS, allow_abbrev=False)
        hints = [(part, get_type_hints(part)) for part in PARTS]
        self.fields: dict[str, tuple[Field[Any], Any]] = {
            f.name: (f, known[f.name]) for part, known in hints for f in fields(part) if f.init
        }

    def parse(
        self, argv: Sequence[str], launched: bool = True, validate: Validate | None = None
    ) -> Recipe:
        """Read `--config FILE` and `--field value` flags; flags win.

        Args:
            launched: this process is a rank, of the machine that the recipe is meant for.
            validate: what else looks for mistakes in a recipe, so that all stand in one report:
                asked only where there is one already.

        Raises:
            ConfigError: unknown fields, values of a wrong type, an unreadable file; and what else
                is wrong with the recipe, as far as it can be told beside these.
        """
        if {"-h", "--help"} & set(argv):
            self.print_help()
            raise SystemExit(0)
        line = self._take_apart(argv)
        said, problems = _read_recipes(line.recipes)
        problems += [
            unknown(name, value, self.fields, "field ")
            for name, value in said.items()
            if name not in self.fields
        ]
        problems += self._left_over(line.rest)
        values = {}
        for name, value in (said | line.values).items():
            if name in self.fields:
                try:
                    values[name] = self._read(name, value)
                except ValueError as error:
                    problems.append(Problem(f"{name}: {error}", self._help(name)))
        later = {} if launched else {n: values.pop(n) for n in OF_THE_LAUNCH if n in values}
        recipe, refused, without = _build(values)
        if recipe is not None:
            for name, value in later.items():
                setattr(recipe.training, name, value)
        problems += refused
        if problems or recipe is None:
            named = {word for problem in problems for word in _words(str(problem))}
            known = (named & set(self.fields)) | without
            raise ConfigError([*problems, *_others(recipe, known, validate)])
        return recipe

    def _take_apart(self, argv: Sequence[str]) -> CommandLine:
        """Texts, as yet; of a flag that is given twice the second one, as everywhere."""
        reader = Flags(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        reader.add_argument("--config", action="append", default=[])
        for action in self._actions:
            if action.dest not in self.fields:
                continue
            names: dict[str, Any] = {"dest": action.dest}
            if action.nargs == 0:  # `--no_x`
                reader.add_argument(*action.option_strings, **names, action="store_false")
                continue
            _, hint = self.fields[action.dest]
            several = takes_several(hint)
            const = True if takes(hint, bool) else NOTHING
            more = {"nargs": "*"} if several else {"nargs": "?", "const": const}
            reader.add_argument(*action.option_strings, **names, **more)
        known, rest = reader.parse_known_args(list(argv))
        values = vars(known)
        return CommandLine(values.pop("config"), values, rest)

    def _read(self, name: str, value: Any) -> Any:
        """Raises: ValueError: the field does not take it; says why."""
        if value is NOTHING or (value == [] and takes_several(self.fields[name][1])):
            raise ValueError("it is given no value")
        value = read(*self.fields[name], value)
        return _path(name, value) if name in PATHS and isinstance(value, str) else value

    def _help(self, name: str) -> str:
        return str(self.fields[name][0].metadata.get("help") or "")

    def _left_over(self, rest: Sequence[str]) -> Iterator[Problem]:
        """Unknown flags, and what belongs to no flag."""
        of_unknown = False
        for text in rest:
            name, _, value = text.partition("=")
            if text.startswith("-"):
                of_unknown = not value
                yield unknown(name.lstrip("-"), None, self.fields, "flag --")
            elif of_unknown:
                continue  # its value
            elif value and close_to(name, self.fields):
                meant = close_to(name, self.fields)
                yield Problem(f"command line: {text} is no flag", f"--{meant} {value}")
            elif text.endswith((".yaml", ".yml")):
                yield Problem(f"command line: {text} belongs to no flag", f"--config {text}")
            else:
                hint = "a value follows its flag: --field value"
                yield Problem(f"command line: {text!r} belongs to no flag", hint)


class Flags(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([Problem(f"command line: {message}")])


def parse_recipe(
    argv: Sequence[str], launched: bool = True, validate: Validate | None = None
) -> Recipe:
    """The recipe that a command line asks for. Ranks: any; every rank reads the same."""
    return RecipeParser().parse(argv, launched, validate)


def _build(values: Mapping[str, Any]) -> tuple[Recipe | None, list[Problem], set[str]]:
    """The recipe, what the libraries refuse of it, and the fields that it was then built without.

    (So that they come to what else they refuse.) No recipe: it cannot be built.
    """
    parts: list[Any] = []
    problems: list[Problem] = []
    without: set[str] = set()
    for part in PARTS:
        names = {f.name for f in fields(part)}
        while len(parts) <= PARTS.index(part):
            given = {n: value for n, value in values.items() if n in names - without}
            try:
                parts.append(part(**given))
            except REFUSALS as error:
                text = str(error).strip().split("\n")[0]
                is_told = isinstance(error, ValueError) and bool(text)
                problems.append(Problem(text if is_told else f"{type(error).__name__}: {text}"))
                if not given:
                    return None, problems, without
                without |= (_words(str(error)) & given.keys()) or given.keys()
    recipe = Recipe(*parts)
    one = recipe.model.lora_target_modules
    if isinstance(one, str) and one.isidentifier():  # to peft a text is a pattern of a whole name
        recipe.model.lora_target_modules = [one]
    return recipe, problems, without


def _others(recipe: Recipe | None, known: set[str], validate: Validate | None) -> Iterator[Problem]:
    """What else is wrong with what is left of a recipe; but for what may follow from the fields of
    which that is known already."""
    for problem in validate(recipe) if recipe and validate else []:
        if problem.severity == "error" and not known & _words(problem.what):
            yield problem


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _path(name: str, value: str) -> str:
    """A path as it is meant: `~` is replaced; variables are not, that is the shell's.

    Raises:
        ValueError: it names a variable; or a file that is not there.
    """
    path = os.path.expanduser(value)
    if "$" in path and not Path(path).exists():
        raise ValueError(
            f"{value}: variables are not replaced here; write {os.path.expandvars(path)}, or "
            f'--{name} "{value}" on the command line, where the shell replaces them'
        )
    if name in FILES and not path.startswith("{") and not Path(path).is_file():
        raise ValueError(f"there is no file {value}")
    return path


class Loader(yaml.SafeLoader):
    """Of a field that is written twice, YAML's parsers take the second one, silently; and they read
    0100 as 64, and 3:30 as 210."""

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self.twice: list[str] = []

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                self.twice.append(f"{key.value}: in line {seen[key.value]}, and in line {line}")
            seen[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> Any:
        text = str(self.construct_scalar(node)).replace("_", "")
        if ":" in text:
            return text
        return int(text) if text.lstrip("+-").isdigit() else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        text = str(self.construct_scalar(node))
        return text if ":" in text else super().construct_yaml_float(node)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)


def _read_recipes(paths: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """What the recipe says, and what is wrong with how it is written.

    Raises:
        ConfigError: there are several; or it cannot be read.
    """
    if len(paths) > 1:
        told = f"--config is given {len(paths)} times: {', '.join(paths)}"
        raise ConfigError([Problem(told, "one recipe, and what differs as flags")])
    if not paths:
        return {}, []
    (path,) = paths
    try:
        loader = Loader(Path(path).expanduser().read_bytes())
        values = loader.get_single_data()
    except OSError as error:
        reason = f"the recipe {path} cannot be read: {error.strerror}"
        raise ConfigError([Problem(reason)]) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: no such date
        reason = f"the recipe {path} is not YAML: {error}"
        raise ConfigError([Problem(reason)]) from error
    if not isinstance(values, dict):
        raise ConfigError([Problem(f"the recipe {path} holds no `field: value` lines")])
    twice = [Problem(f"the recipe {path} says twice: {told}") for told in loader.twice]
    return {str(name): value for name, value in values.items()}, twice
