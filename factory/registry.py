"""Names to classes. ``build(Encoder, {"name": "timm", ...})`` is the only way a component is made.

A name is a registered name (``mlp``) or the path of any importable class (``my_parts:Gray``). Built-in and third-party parts
are found alike, through the entry-point group ``mllm_factory.components``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

from mllm_factory.errors import ConfigError, Problem, UserError, hint, one_line
from mllm_factory.packs import Place, packs, path_schema, scan, source_schema
from mllm_factory.packs import load_packs as load_packs
from mllm_factory.schema import GIVEN, KIND_NAMES, MISSING, Misfit, Schema, child_kind, classes_in, coerce, missing
from mllm_factory.schema import schema_of as schema_of

T = TypeVar("T")
_classes: dict[str, dict[str, type]] = {kind: {} for kind in KIND_NAMES}


# ---------------------------------------------------------------- alive: classes


def register(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: make a component available to configs as ``name: <name>``.

    Raises:
        TypeError: the class is of no kind, or of two.
        ValueError: another class has that name, or the name is none.
    """

    if not name or ":" in name:
        raise ValueError(f"'{name}' cannot be a name: it needs a letter, and a colon means a path")

    def decorate(cls: type[T]) -> type[T]:
        kind = kind_of(cls)
        other = _classes[kind].get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{kind} '{name}' is registered twice: {other.__module__}.{other.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}; rename one"
            )
        _classes[kind][name] = cls
        return cls

    return decorate


def kind_of(cls: type) -> str:
    """The kind that a class inherits from.

    Raises:
        TypeError: it inherits from none, or from several.
    """
    from mllm_factory.interfaces import KINDS

    kinds = [name for name, kind in KINDS.items() if issubclass(cls, kind)]
    if len(kinds) != 1:
        raise TypeError(f"{cls.__module__}.{cls.__qualname__} must subclass exactly one of {', '.join(KINDS)}")
    return kinds[0]


def resolve(kind: type[T], name: str) -> type[T]:
    """The class of a registered name or of a ``package.module:Class`` path.

    Raises:
        ConfigError: no such name, module or class, or a class of another kind.
    """
    if ":" in name:
        return _imported(kind.__name__, name)
    load_packs()
    table = _classes[kind.__name__]
    if name not in table:
        raise ConfigError(f"no {kind.__name__} is named '{name}'{hint(name, table)}")
    return table[name]


def _imported(kind: str, path: str) -> type:
    """The class at ``package.module:Class``. The kinds need torch; a module that did not load them cannot hold one."""
    module, _, attribute = path.partition(":")
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        known = classes_in(getattr(sys.modules.get(module), "__file__", None))
        raise ConfigError(
            f"{kind} '{path}': module '{module}' has no class '{attribute}'{hint(attribute, known)}"
        ) from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{kind} '{path}' cannot be imported: {reason}") from error
    interfaces = sys.modules.get("mllm_factory.interfaces")
    if interfaces is None or not isinstance(found, type) or not issubclass(found, interfaces.KINDS[kind]):
        raise ConfigError(f"'{path}' is not a subclass of mllm_factory.{kind}, so it cannot be one")
    return found


def build(kind: type[T], node: Mapping[str, Any], key: str = "", **given: Any) -> T:
    """Construct the component that a node describes.

    Args:
        kind: the abstract class it must be.
        node: ``{"name": ..., **options}``.
        key: the node's place in the tree, for messages.
        given: values known only at run time.

    Raises:
        ConfigError: unknown name or option, wrong type or kind, or a value the constructor refuses.
    """
    options, problems = validate(kind.__name__, node, key, tuple(given))
    if problems:
        raise ConfigError(problems)
    cls = resolve(kind, node["name"])
    if inspect.isabstract(cls):
        abstract = ", ".join(sorted(vars(cls)["__abstractmethods__"]))
        raise ConfigError(Problem(f"{node['name']} does not define {abstract}, which every {kind.__name__} needs", key))
    try:
        return cls(**{name: _child(cls, name, value, key) for name, value in options.items()}, **given)
    except ConfigError:
        raise
    except (ValueError, ImportError, OSError, UserError) as error:
        reason = one_line(error)
        raise ConfigError(Problem(f"{node['name']}: {reason}", key)) from error


def _child(cls: type, option: str, value: Any, key: str) -> Any:
    from mllm_factory.interfaces import KINDS

    child = child_kind(schema_of(cls).params[option].annotation)
    if child is None or value is None:
        return value
    form, kind = child[0], KINDS[child[1]]
    key = f"{key}.{option}" if key else option
    if form == "one":
        return build(kind, value, key)
    if form == "list":
        return [build(kind, node, f"{key}.{i}") for i, node in enumerate(value)]
    return {name: build(kind, node, f"{key}.{name}") for name, node in value.items()}


# ---------------------------------------------------------------- asleep: source only, torch stays out


def names(kind: type | str) -> list[str]:
    """Every registered name of a kind, sorted."""
    return sorted(index()[kind if isinstance(kind, str) else kind.__name__])


@cache
def index() -> dict[str, dict[str, Place]]:
    """Kind -> registered name -> place, read from the packs' sources.

    Raises:
        ConfigError: a pack is not there, or two classes of one kind share a name.
    """
    table: dict[str, dict[str, Place]] = {kind: {} for kind in KIND_NAMES}
    scans = {pack.name: scan(pack) for pack in packs()}
    unclear = {module: pack for pack, shown in scans.items() for module in shown.unclear}
    for kind, name, place in [*(f for shown in scans.values() for f in shown.found), *_live_registrations(unclear)]:
        other = table[kind].setdefault(name, place)
        if other[1:] != place[1:]:
            raise ConfigError(
                f"{kind} '{name}' is registered twice: {other.module}.{other.cls} (pack '{other.pack}') and "
                f"{place.module}.{place.cls} (pack '{place.pack}'); uninstall or rename one"
            )
    return table


def _live_registrations(unclear: Mapping[str, str]) -> Iterable[tuple[str, str, Place]]:
    """Everything registered, by importing the packs, if there is a module whose source does not tell."""
    if not unclear:
        return
    load_packs()
    for kind, table in _classes.items():
        for name, cls in table.items():
            file = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
            pack = unclear.get(cls.__module__, next(iter(unclear.values())))
            yield kind, name, Place(pack, cls.__module__, file, cls.__qualname__)


def find(kind: str, name: str) -> Schema:
    """The schema of a name or path without importing it where its source shows enough.

    Raises:
        ConfigError: no such name, module or class, or a class of another kind.
    """
    if ":" in name:
        return path_schema(kind, name) or schema_of(_imported(kind, name))
    table = index()[kind]
    if name not in table:
        elsewhere = next((other for other, known in index().items() if name in known), None)
        belongs = f" ('{name}' is a {elsewhere})" if elsewhere else ""
        path = f"; a class of yours is written {':'.join(name.rsplit('.', 1))}" if "." in name else ""
        raise ConfigError(f"no {kind} is named '{name}'{belongs}{path}{hint(name, table)}")
    found = source_schema(table[name])
    if found is None:
        load_packs()
        found = schema_of(_classes[kind][name])
    return found


# ---------------------------------------------------------------- checks


def validate(
    kind: str, node: Any, key: str = "", given: Iterable[str] = (), registered_only: bool = False
) -> tuple[dict[str, Any], list[Problem]]:
    """Check a component's node without building it.

    Args:
        kind: the kind's name.
        node: ``{"name": ..., **options}``.
        key: the node's place in the tree, for messages.
        given: constructor arguments that come from the engine.
        registered_only: refuse classes outside the registry, here and in nested nodes, without importing them.

    Returns:
        Its options as plain values of the right types, and every problem found.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("name"), str):
        return {}, [Problem(f"a {kind} is a mapping with a 'name', got {node!r}", key)]
    place = f"{key}.name" if key else "name"
    if node["name"] == MISSING:
        return {}, [Problem(f"needs a value: the name of a {kind}{hint('', names(kind))}", place)]
    if registered_only and ":" in node["name"]:
        what = f"'{node['name']}' is a class outside the registry"
        return {}, [Problem(f"{what}; add trust_components=true to allow this checkpoint to run it", place)]
    try:
        schema = find(kind, node["name"])
    except ConfigError as error:
        return {}, [Problem(problem.message, place) for problem in error.problems]
    options = {name: value for name, value in node.items() if name != "name"}
    fixed = {*given, *GIVEN.get(kind, ())}
    values, problems = validate_options(schema, options, key, fixed, node["name"], registered_only)
    refused = [] if schema.unsupported else sorted(fixed - schema.params.keys())
    problems += [
        Problem(f"{node['name']} must take '{name}', which the engine gives; add it to __init__", key)
        for name in refused
    ]
    return values, problems


def validate_options(
    schema: Schema,
    options: Mapping[str, Any],
    key: str,
    given: Iterable[str] = (),
    label: str = "",
    registered_only: bool = False,
) -> tuple[dict[str, Any], list[Problem]]:
    """Check options against a schema; also used for the engine's own nodes, such as the trainer's."""
    label, given = label or schema.cls, set(given)
    if schema.unsupported:
        return {}, [Problem(f"{label} takes {schema.unsupported}: a component names every option", key)]
    open_params = {name: p for name, p in schema.params.items() if name not in given}
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, value in options.items():
        place = f"{key}.{name}" if key else str(name)
        if name in given:
            problems.append(Problem(f"'{name}' of {label} follows from the other parts; remove it", place))
        elif name not in open_params:
            problems.append(Problem(f"{label} has no option '{name}'{hint(str(name), open_params)}", place))
        elif holes := list(missing(value, place)):
            problems += [Problem("needs a value", hole) for hole in holes]
        else:
            values[name], found = _check_value(open_params[name].annotation, value, place, registered_only)
            problems += found
    for name, param in open_params.items():
        if param.required and name not in options:
            problems.append(Problem(f"{label} needs a value for '{name}'", f"{key}.{name}" if key else name))
    return values, problems


def _check_value(annotation: str, value: Any, key: str, registered_only: bool) -> tuple[Any, list[Problem]]:
    child = child_kind(annotation)
    if child is None or (value is None and "None" in annotation):
        try:
            return coerce(value, annotation), []
        except Misfit as error:
            return value, [Problem(str(error), ".".join([key, *error.path]))]
    form, kind = child
    if form == "one":
        return value, validate(kind, value, key, (), registered_only)[1]
    if not isinstance(value, list if form == "list" else Mapping):
        return value, [Problem(f"expected a {form} of {kind} nodes, got {value!r}", key)]
    pairs: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
    return value, [p for i, node in pairs for p in validate(kind, node, f"{key}.{i}", (), registered_only)[1]]
