"""The constructor is the schema: options of a class read from its source, and values checked against them.

Reading the source instead of importing it keeps torch out of listing, completion and configuration errors. A class whose
source cannot be read is inspected alive by ``of_class``; a test compares both ways over the whole registry.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

GIVEN: dict[str, tuple[str, ...]] = {"Projector": ("in_dim", "out_dim", "in_tokens")}
"""Per kind, the constructor arguments that the engine gives; they follow from other parts and are refused in YAML."""

MISSING = "???"
"""What stands in a tree for a value that the user must give."""

KIND_NAMES = ("Encoder", "Projector", "Backbone", "Tuning", "Schedule", "Metric", "Source")


@dataclass(frozen=True)
class Param:
    """One option: its annotation as written, and its default (``...`` where the option is required)."""

    name: str
    annotation: str
    default: Any = ...

    @property
    def required(self) -> bool:
        """True where the option has no default."""
        return self.default is ...


@dataclass(frozen=True)
class Schema:
    """What a class takes and where it stands."""

    cls: str
    module: str
    bases: tuple[str, ...]
    params: dict[str, Param] = field(default_factory=dict)
    doc: str = ""
    file: str = ""
    line: int = 0
    unsupported: str = ""
    own_init: bool = True

    @property
    def kind(self) -> str | None:
        """The kind it inherits from directly, or None where the source does not show one."""
        return kind_among(self.bases)

    @property
    def complete(self) -> bool:
        """True where the source shows every option: an ``__init__`` of its own, or no base that could bring one."""
        return self.own_init or all(base.rpartition(".")[2] in (*KIND_NAMES, "Module", "ABC") for base in self.bases)


def kind_among(bases: Iterable[str]) -> str | None:
    """The one kind among base classes as written, or None."""
    kinds = [name for base in bases if (name := base.strip().rpartition(".")[2]) in KIND_NAMES]
    return kinds[0] if len(kinds) == 1 else None


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"), filename=file)


def of_source(file: str, module: str, cls: str) -> Schema | None:
    """The schema of top-level class ``cls`` in ``file``, or None where there is no such class statement."""
    for node in _tree(file).body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
            params, unsupported = _params(init.args) if init else ({}, "")
            bases = tuple(ast.unparse(base) for base in node.bases)
            doc = inspect.cleandoc(ast.get_docstring(node) or "")
            return Schema(cls, module, bases, params, doc, file, node.lineno, unsupported, init is not None)
    return None


def classes_in(file: str | None) -> list[str]:
    """Names of the top-level classes of a source file."""
    return [n.name for n in _tree(file).body if isinstance(n, ast.ClassDef)] if file and file.endswith(".py") else []


def _params(args: ast.arguments) -> tuple[dict[str, Param], str]:
    positional = [*args.posonlyargs, *args.args][1:]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults))
    defaults = [*missing, *args.defaults][-len(positional) :] if positional else []
    pairs = [*zip(positional, defaults, strict=True), *zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    params = {
        arg.arg: Param(
            arg.arg,
            ast.unparse(arg.annotation) if arg.annotation else "Any",
            ... if default is None else _literal(default),
        )
        for arg, default in pairs
    }
    return params, f"**{args.kwarg.arg}" if args.kwarg else f"*{args.vararg.arg}" if args.vararg else ""


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def of_class(cls: type) -> Schema:
    """The schema of a live class, for one whose source does not show it (built in a notebook, or derived from another)."""
    params, unsupported = {}, ""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    plain = owner is object or owner.__module__.startswith("torch.nn.")  # they take nothing that YAML could say
    for p in [] if plain else list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]:
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            unsupported = f"{'**' if p.kind == p.VAR_KEYWORD else '*'}{p.name}"
            continue
        annotation = "Any" if p.annotation is p.empty else p.annotation
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        params[p.name] = Param(p.name, text, ... if p.default is p.empty else p.default)
    bases = tuple(base.__name__ for base in cls.__mro__ if base.__name__ in KIND_NAMES)
    return Schema(cls.__qualname__, cls.__module__, bases, params, inspect.getdoc(cls) or "", unsupported=unsupported)


def schema_of(cls: type) -> Schema:
    """The schema of a live class: from its source where that shows it, else from its signature."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    found = of_source(file, cls.__module__, cls.__qualname__) if file and file.endswith(".py") else None
    return found if found is not None and "__init__" in vars(cls) else of_class(cls)


def child_kind(annotation: str) -> tuple[str, str] | None:
    """``("one" | "list" | "dict", kind)`` where an option takes components (``Metric``, ``list[Encoder]``), else None."""
    for part in annotation.replace("'", "").split("|"):
        head, _, inner = part.strip().rstrip("]").rpartition("[")
        kind = inner.rpartition(",")[2].strip().rpartition(".")[2]
        if kind in KIND_NAMES and head in ("", "list", "dict"):
            return (head or "one", kind)
    return None


def missing(value: Any, key: str) -> Iterator[str]:
    """The dotted keys of missing values in a value, at any depth."""
    if value == MISSING:
        yield key
    elif isinstance(value, Mapping | list):
        items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, item in items:
            yield from missing(item, f"{key}.{name}")


class Misfit(ValueError):
    """A value that cannot become what its annotation says; ``path`` leads to the culprit inside lists and mappings."""

    def __init__(self, message: str, path: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.path = path


def coerce(value: Any, annotation: str) -> Any:
    """``value`` as the type that ``annotation`` names.

    Raises:
        Misfit: it cannot be one; the message says what was expected.
    """
    return _coerce(value, _parsed(annotation.strip("'\"")))


@cache
def _parsed(annotation: str) -> ast.expr:
    return ast.parse(annotation, mode="eval").body


def _coerce(value: Any, kind: ast.expr) -> Any:
    if isinstance(kind, ast.BinOp) and isinstance(kind.op, ast.BitOr):
        return _coerce_union(value, kind)
    if isinstance(kind, ast.Subscript):
        return _coerce_container(value, kind)
    if isinstance(kind, ast.Constant):
        return _coerce_constant(value, kind.value)
    name = _name(kind)
    if name == "Any":
        return value
    if name in _BARE:
        return _coerce(value, _parsed(_BARE[name]))
    if name not in _SCALARS:
        raise Misfit(_NO_YAML.format(ast.unparse(kind)))
    fits, what = _SCALARS[name]
    if not fits(value):
        raise Misfit(f"expected {what}, got {value!r}")
    return float(value) if name == "float" else value


def _coerce_constant(value: Any, annotation: Any) -> Any:
    if annotation is None:
        if value is not None:
            raise Misfit(f"expected null, got {value!r}")
        return None
    return _coerce(value, _parsed(annotation))  # a quoted forward reference


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return math.isfinite(float(value))
        except ValueError:
            return False
    return isinstance(value, int | float)


_SCALARS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "float": (_is_number, "a number"),
    "str": (lambda value: isinstance(value, str), "text"),
}
_BARE = {"list": "list[Any]", "tuple": "tuple[Any, ...]", "dict": "dict[Any, Any]"}
_NO_YAML = (
    "no YAML value can be a '{}'; annotate the option with int, float, bool, str, Literal[...], list[...], "
    "dict[..., ...] or several of them joined by |"
)


def _name(kind: ast.expr) -> str:
    return ast.unparse(kind).rpartition(".")[2]


def _coerce_union(value: Any, kind: ast.BinOp) -> Any:
    errors, inside = [], None
    for member in sorted(_members(kind), key=lambda m: _name(m) == "str"):  # text last: 1e-3 is a number first
        try:
            return _coerce(value, member)
        except Misfit as error:
            inside = error if error.path else inside
            errors.append(str(error).removeprefix("expected ").partition(", got")[0])
    raise inside or Misfit(f"expected {' or '.join(errors)}, got {value!r}")


def _members(kind: ast.expr) -> list[ast.expr]:
    if isinstance(kind, ast.BinOp):
        return [*_members(kind.left), *_members(kind.right)]
    return [kind]


def _coerce_container(value: Any, kind: ast.Subscript) -> Any:
    name = _name(kind.value)
    inner = list(kind.slice.elts) if isinstance(kind.slice, ast.Tuple) else [kind.slice]
    if name == "Literal":
        choices = [ast.literal_eval(choice) for choice in inner]
        if value not in choices:
            raise Misfit(f"expected one of {', '.join(map(str, choices))}, got {value!r}")
        return value
    if name in ("dict", "Mapping"):
        if not isinstance(value, Mapping):
            raise Misfit(f"expected a mapping, got {value!r}")
        return {_inside(k, k, inner[0]): _inside(k, v, inner[1]) for k, v in value.items()}
    if name not in ("list", "Sequence", "tuple"):
        raise Misfit(_NO_YAML.format(ast.unparse(kind)))
    fixed = name == "tuple" and not isinstance(inner[-1], ast.Constant)
    if not isinstance(value, list | tuple) or (fixed and len(value) != len(inner)):
        raise Misfit(f"expected a list{f' of {len(inner)}' if fixed else ''}, got {value!r}")
    items = [_inside(i, item, inner[i if fixed else 0]) for i, item in enumerate(value)]
    return tuple(items) if name == "tuple" else items


def _inside(place: Any, value: Any, kind: ast.expr) -> Any:
    try:
        return _coerce(value, kind)
    except Misfit as error:
        raise Misfit(str(error), (str(place), *error.path)) from None
