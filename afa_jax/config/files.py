"""Config files: a Python file's ``get_config``, overrides from the command line, and defaults."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from afa_jax.config import schema
from afa_jax.config.fields import shown, unknown
from afa_jax.errors import InputError, why

LONGEST = 10_000
"""The most characters of a value on the command line."""
_PACKAGE = Path(__file__).parents[1]
SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
"""The folders of the package's own configs, in an installed wheel and in a checkout."""


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Load the config of ``path.py`` or ``path.py:variant``, locked and complete.

    Args:
        spec: a file; or, if no such file exists, ``NAME`` or ``configs/NAME.py`` of the package's own configs.
        overrides: values of fields, such as ``train.steps=100``.

    Raises:
        InputError: no such file, no config in it, no such variant or field, or a value that a field cannot have.
    """
    path, _, variant = spec.partition(":")
    path = _found(path)
    return _finished(_made(_module(path, spec), path, variant, spec), f"--config {spec}", overrides)


def shipped_config(name: str) -> Path | None:
    """Return the file of one of the package's own configs; None if no config has this name."""
    return next((file for folder in SHIPPED if os.path.isfile(file := folder / f"{name}.py")), None)


def _found(path: str) -> str:
    """Return the file that ``path`` names: itself, or if it does not exist, the package's own config of this name."""
    name = re.fullmatch(r"(?:configs/)?(\w+)|configs/(\w+)\.py", path)
    if name is None or os.path.exists(path):
        return path
    file = shipped_config(name[1] or name[2])
    if file is None:
        return path
    print(f"--config {path}: taken from the package, {file}", file=sys.stderr)
    return str(file)


def make_config(fields: Mapping[str, Any] | ConfigDict, overrides: Sequence[str] = ()) -> ConfigDict:
    """Return the locked, complete config of some fields; raise InputError as load_config. ``fields`` is not changed."""
    config = ConfigDict(fields) if isinstance(fields, Mapping) else ConfigDict(fields.to_dict())
    _check_names(config, "config")
    return _finished(config, "config", overrides)


def override_of(field: str, value: Any) -> str:
    """Return ``FIELD=VALUE`` for a command line, from which ``load_config`` reads this value."""
    if isinstance(value, str) and "\n" not in value:
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return f"{field}={value}"  # text without quotes
    return f"{field}={value!r}"


def check_kind(config: ConfigDict, where: str, wanted: str = "an ensemble") -> None:
    """Raise InputError for a config of another kind, of ``schema.SCHEMAS``, than a command works on."""
    if (kind := schema.kind_of(config)) != wanted:
        raise InputError(f"{where}: it is of {kind}; this command wants one of {wanted}, as {schema.SHOWN[wanted]} is")


def _finished(config: ConfigDict, where: str, overrides: Sequence[str]) -> ConfigDict:
    """Return a config with its defaults and overrides, checked and locked."""
    _explained_by(where, schema.complete, config)
    for override in overrides:  # the last of repeated overrides counts, as with any other argument
        _override(config, override)
    _explained_by(where, schema.complete, config)  # an earlier override may have replaced the section
    _explained_by(where, schema.check, config)
    config.lock()
    return config


def _explained_by(where: str, function: Callable[[ConfigDict], None], config: ConfigDict) -> None:
    try:
        function(config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _module(path: str, spec: str) -> ModuleType:
    """Import the config's file as a module.

    Raises:
        InputError: no such file, or running it raises an error; the message gives the line.
    """
    file = Path(path)
    try:
        if file.is_dir():
            raise InputError(f"--config {spec}: {path} is a folder; name the .py file in it")
        if not file.is_file():
            raise InputError(f"--config {spec}: no file {path}; name a .py file with get_config")
        source = file.read_bytes()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"--config {spec}: {path} cannot be read ({error}); name a .py file") from error
    if file.suffix != ".py":
        raise InputError(
            f"--config {spec}: {path} is not a Python file; write one with get_config, as configs/emoji.py"
        )
    module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", path)
    assert module_spec is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        code = compile(source, path, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line, what = getattr(error, "lineno", None) or 1, getattr(error, "msg", None) or why(error)
        raise InputError(f"--config {spec}: {path}:{line}: not Python ({what})") from error
    sys.modules[module_spec.name] = module  # as import does: dataclasses look up their module
    try:
        with _explained(path, spec):
            exec(code, module.__dict__)
    except BaseException:
        del sys.modules[module_spec.name]
        raise
    return module


class _explained:
    """A context that turns any error of a config's own code, which is the user's, into an InputError with its line."""

    def __init__(self, path: str, spec: str):
        self.path, self.spec = path, spec

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, KeyboardInterrupt | InputError):
            return
        frames = [frame for frame in traceback.extract_tb(trace) if frame.filename == self.path]
        line = frames[-1].lineno if frames else 1
        raise InputError(
            f"--config {self.spec}: {self.path}:{line}: {type(error).__name__}: {_text(error)}; mend it"
        ) from error


def _text(error: BaseException) -> str:
    """Return the text of an error, which may be of a class in the config: making its text can fail in any way."""
    try:
        return str(error)
    except Exception:
        return "its text cannot be made"


def _made(module: ModuleType, path: str, variant: str, spec: str) -> ConfigDict:
    """Call ``get_config`` and return its config, unlocked.

    Raises:
        InputError: there is no such function, or it returns no config.
    """
    make = getattr(module, "get_config", None)
    if not callable(make):
        raise InputError(f"--config {spec}: {path} has no function get_config; configs/emoji.py shows one")
    with _explained(path, spec):
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        takes = any(parameter.kind in by_place for parameter in inspect.signature(make).parameters.values())
        if variant and not takes:
            raise InputError(f"--config {spec}: get_config of {path} takes no variant; leave :{variant} out")
        try:
            config = make(variant) if takes else make()
        except KeyError as error:
            if not variant:  # without one, the error is the config's own
                raise
            raise InputError(f"--config {spec}: no variant {variant!r} ({_text(error)})") from error
    if isinstance(config, FrozenConfigDict) or (isinstance(config, Mapping) and not isinstance(config, ConfigDict)):
        with _explained(path, spec):
            config = ConfigDict(dict(config))
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"--config {spec}: get_config of {path} returns {type(config).__name__}; return ml_collections.ConfigDict"
        )
    _check_names(config, spec)
    config = config.copy_and_resolve_references()
    config.unlock()
    return config


def _check_names(config: ConfigDict, spec: str, path: str = "") -> None:
    """Raise InputError for a field whose name is no text; ml_collections can neither sort nor show it."""
    for name, value in config._fields.items():
        if not isinstance(name, str):
            raise InputError(f"--config {spec}: the field {path}{name!r:.80}: names of fields are texts")
        if isinstance(value, ConfigDict):
            _check_names(value, spec, f"{path}{name}.")


def _override(config: ConfigDict, override: str) -> None:
    """Set one field.

    Raises:
        InputError: no such field, or a value of another type than it has.
    """
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise InputError(f"--config.{override:.80}: write --config.FIELD=VALUE")
    if len(text) > LONGEST:
        raise InputError(f"--config.{name:.80}: a value of {len(text)} characters; write it into the config")
    *parents, field = name.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, ConfigDict) else None
    own = schema.schema_of(config)
    if not isinstance(node, ConfigDict) or not (field in node or schema.knows(own, name)):
        raise InputError(f"--config.{unknown(name, schema.names(own))}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    old = node.get(field)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise InputError(f"--config.{name}={shown(value)}: expected a finite number") from None
    if type(old) is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e4
    # The schema knows the allowed types better than the present value does.
    free = old is None or value is None or name == "base"
    alike = isinstance(old, list | tuple) and isinstance(value, list | tuple)
    if isinstance(old, ConfigDict) and not free:
        raise InputError(f"--config.{name}={shown(text)}: it is a section; set its fields, --config.{name}.FIELD=VALUE")
    if not (free or alike or type(value) is type(old)):
        raise InputError(f"--config.{name}={shown(text)}: expected {type(old).__name__}, as {shown(old)}")
    with config.ignore_type():
        node[field] = ConfigDict(value) if isinstance(value, dict) else value
