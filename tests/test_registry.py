"""Names to classes: what is found, what is refused, and that nothing runs before it is known to be of the kind."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mllm_factory import (
    ConfigError,
    Encoder,
    Metric,
    Projector,
    Schedule,
    Tuning,
    build,
    names,
    packs,
    register,
    registry,
)
from mllm_factory.errors import one_line
from mllm_factory.interfaces import KINDS
from mllm_factory.schema import Misfit, coerce, of_class

HEAD = "from mllm_factory import *\nimport torch\n"
GRAY = (
    HEAD
    + '''
class Gray(Projector):
    """A user's projector."""

    def __init__(self, in_dim: int, out_dim: int, in_tokens: int, gain: float = 2.0) -> None:
        super().__init__()
        self.num_tokens, self.gain = in_tokens, gain

    def forward(self, features):
        return features * self.gain
'''
)
GIVEN = {"in_dim": 4, "out_dim": 4, "in_tokens": 2}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """``module("name", source)`` writes an importable module that disappears after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written: list[str] = []

    def write(name: str, source: str) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(source))
        written.append(name)
        return path

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packs are looked for anew, and what a test registers is forgotten."""
    before = {kind: dict(table) for kind, table in registry._classes.items()}
    caches = (packs.packs, packs.load_packs, packs.scan, registry.index)
    for cached in caches:
        cached.cache_clear()
    yield
    for kind, table in before.items():
        registry._classes[kind].clear()
        registry._classes[kind].update(table)
    for cached in caches:
        cached.cache_clear()


def pack(folder: Path, name: str, *sources: str) -> None:
    """Install a pack by hand: a module and a distribution with an entry point."""
    (folder / f"{name}.py").write_text("\n\n".join([HEAD, *map(textwrap.dedent, sources)]))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mllm_factory.components]\n{name} = {name}\n")


def projector(name: str, cls: str) -> str:
    return f"""
        @register("{name}")
        class {cls}(Projector):
            def __init__(self, in_dim: int, out_dim: int, in_tokens: int) -> None:
                super().__init__()
                self.num_tokens = in_tokens

            def forward(self, features):
                return features
        """


# ---------------------------------------------------------------- the same answers, asleep and alive


def test_entry_points_equal_those_of_importlib() -> None:
    for group in ("console_scripts", packs.GROUP, "nothing.of.the.kind"):
        expected = sorted((e.name, e.module) for e in importlib.metadata.entry_points(group=group))
        assert sorted(map(tuple, packs.entry_points(group))) == expected


def test_source_index_equals_the_imported_registry() -> None:
    registry.load_packs()
    for kind, table in registry._classes.items():
        builtin = {name: cls for name, cls in table.items() if cls.__module__.startswith("mllm_factory.components")}
        assert {n: (p.module, p.cls) for n, p in registry.index()[kind].items()} == {
            n: (cls.__module__, cls.__qualname__) for n, cls in builtin.items()
        }
        assert names(kind) == sorted(builtin)
    assert registry.index()["Projector"], "there are built-in parts"


def test_source_schema_equals_the_live_signature() -> None:
    for kind, table in registry.index().items():
        for name in table:
            live = of_class(registry.resolve(KINDS[kind], name))
            asleep = registry.find(kind, name)
            assert list(asleep.params) == list(live.params), name
            for option, param in asleep.params.items():
                assert (param.default, param.annotation) == (
                    live.params[option].default,
                    live.params[option].annotation,
                )


def test_index_and_schemas_of_built_in_parts_do_not_import_torch() -> None:
    code = (
        "import sys; from mllm_factory import registry as r\n"
        "[r.find(kind, name) for kind, table in r.index().items() for name in table]\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# ---------------------------------------------------------------- names and paths


def test_registered_name() -> None:
    made = build(Projector, {"name": "mlp", "depth": 1}, in_dim=4, out_dim=6, in_tokens=3)
    assert made(torch.zeros(2, 3, 4)).shape == (2, 3, 6)


def test_path_of_a_class(module) -> None:
    module("parts_a", GRAY)
    made = build(Projector, {"name": "parts_a:Gray", "gain": "1e-1"}, **GIVEN)
    assert made.gain == pytest.approx(0.1)
    torch.testing.assert_close(made(torch.ones(1, 2, 4)), torch.full((1, 2, 4), 0.1))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mpl", r"no Projector is named 'mpl'; did you mean 'mlp'\? known: .*mlp"),
        ("timm", r"no Projector is named 'timm' \('timm' is a Encoder\)"),
        ("parts_b.Gray", "a class of yours is written parts_b:Gray"),
        ("no_such_module:Gray", "no module named 'no_such_module'; is it installed, or in the current folder"),
        ("os:system", "'os:system' is not a subclass of mllm_factory.Projector"),
        ("os.path:join", "is not a subclass"),
        ("collections:OrderedDict", "is not a subclass"),
        ("parts_b:Grey", "module 'parts_b' has no class 'Grey'; did you mean 'Gray'"),
        ("parts_b:helper", "is not a subclass"),
        ("parts_b:Other", "is not a subclass"),
        (":Gray", "the path of a class is written package.module:Class"),
        ("..:Gray", "the path of a class is written package.module:Class"),
        (
            "no_package.parts:Gray",
            "cannot be imported: ModuleNotFoundError: No module named 'no_package'; is it installed",
        ),
    ],
)
def test_wrong_names(module, name: str, says: str) -> None:
    module("parts_b", GRAY + "\ndef helper(): pass\n\nclass Other(Schedule):\n    def before_step(self, state): pass\n")
    with pytest.raises(ConfigError, match=says):
        registry.find("Projector", name)
    with pytest.raises(ConfigError, match=says):
        build(Projector, {"name": name}, "projector", **GIVEN)


def test_module_with_a_syntax_error_is_named_with_its_line(module) -> None:
    module("parts_c", "x = 1\nclass Gray(:\n")
    with pytest.raises(ConfigError, match=r"parts_c\.py:2: "):
        registry.find("Projector", "parts_c:Gray")


def test_module_that_fails_to_import(module) -> None:
    module("parts_d", "import a_library_nobody_has\n" + GRAY.replace("(Projector)", "(Base)"))
    with pytest.raises(
        ConfigError, match="cannot be imported: ModuleNotFoundError: No module named 'a_library_nobody_has'"
    ):
        registry.find("Projector", "parts_d:Gray")


def test_wrong_names_do_not_import_torch() -> None:
    code = """
        import sys
        from mllm_factory import registry
        from mllm_factory.errors import ConfigError
        for name in ("mpl", "os:system", "sys:exit", "collections:OrderedDict", "nope:Gray"):
            try:
                registry.find("Projector", name)
            except ConfigError:
                continue
            raise SystemExit(f"{name} was accepted")
        print("torch" in sys.modules)
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_kind_is_checked_before_anything_is_called(module, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    module("parts_e", f"class Evil:\n    def __init__(self, **kw):\n        open({str(touched)!r}, 'w')\n")
    with pytest.raises(ConfigError, match="is not a subclass of"):
        build(Encoder, {"name": "parts_e:Evil"})
    assert not touched.exists()


def test_class_of_the_current_folder_by_command(run_cli, tmp_path: Path) -> None:
    linear = GRAY.replace("= in_tokens, gain", "= in_tokens, torch.nn.Linear(in_dim, out_dim)")
    (tmp_path / "mine.py").write_text(linear.replace("features * self.gain", "self.gain(features)"))
    for options, code in (["+projector.name=mine:Gray"], 0), (["+projector.name=mine:Gray", "+projector.gian=1"], 2):
        done = run_cli("check", "experiment=smoke", "~projector", *options, "--json")
        report = json.loads(done.stdout)
        assert (done.returncode, report["ok"]) == (code, code == 0), done.stderr


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dpth": 1}, "mlp has no option 'dpth'; did you mean 'depth'"),
        ({"depth": "two"}, r"projector\.depth: expected a whole number, got 'two'"),
        ({"depth": True}, "expected a whole number, got True"),
        ({"depth": 1.0}, r"expected a whole number, got 1\.0"),
        ({"depth": "???"}, r"projector\.depth: needs a value"),
        ({"hidden_dim": "wide"}, "expected a whole number or null, got 'wide'"),
        ({"in_dim": 3}, "'in_dim' of mlp follows from the other parts; remove it"),
        ({"depth": 0}, "mlp: depth"),
    ],
)
def test_wrong_options(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(Projector, {"name": "mlp", **options}, "projector", **GIVEN)


def test_all_problems_of_a_node_come_at_once() -> None:
    _, problems = registry.validate(
        "Tuning", {"name": "lora", "rnk": 1, "alpha": "x", "dropout": None}, "tuning.backbone"
    )
    assert [p.key for p in problems] == ["tuning.backbone.rnk", "tuning.backbone.alpha", "tuning.backbone.dropout"]


@pytest.mark.parametrize("node", [None, 3, "mlp", {}, {"name": 3}, ["mlp"]])
def test_a_node_is_a_mapping_with_a_name(node: object) -> None:
    with pytest.raises(ConfigError, match="a Projector is a mapping with a 'name'"):
        build(Projector, node, **GIVEN)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "annotation", "result"),
    [
        ("1e-3", "float", 1e-3),
        (3, "float", 3.0),
        ("1e-3", "str", "1e-3"),
        (None, "int | None", None),
        ([0.9, "1e-1"], "list[float]", [0.9, 0.1]),
        ([1, 2], "tuple[int, int]", (1, 2)),
        ([1, 2, 3], "tuple[int, ...]", (1, 2, 3)),
        ({"a": 1}, "dict[str, float | None] | None", {"a": 1.0}),
        (["a"], "list[int] | list[str]", ["a"]),
        ("all", "list[str] | str", "all"),
        ("b", "Literal['a', 'b']", "b"),
        ({"x": [1]}, "dict", {"x": [1]}),
    ],
)
def test_values_that_fit(value: object, annotation: str, result: object) -> None:
    coerced = coerce(value, annotation)
    assert coerced == result
    assert type(coerced) is type(result)


@pytest.mark.parametrize(
    ("value", "annotation", "path"),
    [
        (True, "int", ()),
        (1, "bool", ()),
        ("true", "bool", ()),
        (True, "float", ()),
        ("nan", "float", ()),
        (3, "str", ()),
        ([1, "a"], "list[int]", ("1",)),
        ([1], "tuple[int, int]", ()),
        ({"a": "x"}, "dict[str, float | None] | None", ("a",)),
        ("c", "Literal['a', 'b']", ()),
        ("x", "Path", ()),
    ],
)
def test_values_that_do_not_fit(value: object, annotation: str, path: tuple[str, ...]) -> None:
    with pytest.raises(Misfit) as caught:
        coerce(value, annotation)
    assert caught.value.path == path


# ---------------------------------------------------------------- classes


def test_intermediate_class_and_inherited_options(module) -> None:
    module("parts_f", GRAY + "\n\nclass Darker(Gray):\n    pass\n")
    assert build(Projector, {"name": "parts_f:Darker", "gain": 0.5}, **GIVEN).gain == 0.5
    with pytest.raises(ConfigError, match="has no option 'gian'; did you mean 'gain'"):
        build(Projector, {"name": "parts_f:Darker", "gian": 1}, **GIVEN)


def test_keyword_arguments_are_refused(module) -> None:
    module("parts_g", GRAY.replace("gain: float = 2.0", "**options"))
    with pytest.raises(ConfigError, match=r"parts_g:Gray takes \*\*options: a component names every option"):
        build(Projector, {"name": "parts_g:Gray"}, **GIVEN)


def test_class_that_takes_no_sizes_is_told_so(module) -> None:
    module("parts_h", GRAY.replace("in_tokens: int, ", "").replace("= in_tokens, gain", "= 2, gain"))
    with pytest.raises(ConfigError, match="must take 'in_tokens', which the engine gives"):
        build(Projector, {"name": "parts_h:Gray"}, **GIVEN)


def test_abstract_class_is_told_what_it_lacks(module) -> None:
    module("parts_i", GRAY.replace("def forward", "def forwards"))
    with pytest.raises(ConfigError, match="parts_i:Gray does not define forward, which every Projector needs"):
        build(Projector, {"name": "parts_i:Gray"}, **GIVEN)


def test_class_of_no_kind_or_two_cannot_register() -> None:
    with pytest.raises(TypeError, match="must subclass exactly one of"):
        register("x")(type("X", (), {}))
    with pytest.raises(TypeError, match="must subclass exactly one of"):
        register("x")(type("X", (Schedule, Tuning), {}))


def test_errors_of_a_constructor_are_one_line(module) -> None:
    source = GRAY.replace("super().__init__()", 'raise ValueError("no\\n  good")')
    module("parts_j", source)
    with pytest.raises(ConfigError) as caught:
        build(Projector, {"name": "parts_j:Gray"}, "projector", **GIVEN)
    assert str(caught.value) == "projector: parts_j:Gray: no good"


def test_a_bug_in_a_constructor_is_not_hidden(module) -> None:
    module("parts_k", GRAY.replace("super().__init__()", "super().__init__(); self.nothing_there"))
    with pytest.raises(AttributeError):
        build(Projector, {"name": "parts_k:Gray"}, **GIVEN)


# ---------------------------------------------------------------- nested kinds


class Several(Metric):
    """Takes components in every form."""

    def __init__(
        self, one: Metric, some: list[Metric], named: dict[str, Projector] | None = None, maybe: Metric | None = None
    ) -> None:
        self.one, self.some, self.named, self.maybe = one, some, named, maybe

    def update(self, model: object, batch: object, output: object) -> None: ...

    def compute(self) -> dict[str, float]:
        return {}


SEVERAL = f"{__name__}:Several"
LOSS = {"name": "answer_loss"}


def test_nested_components_are_built() -> None:
    made = build(Metric, {"name": SEVERAL, "one": LOSS, "some": [LOSS, {"name": "exact_match", "max_new_tokens": 3}]})
    assert [type(m).__name__ for m in (made.one, *made.some)] == ["AnswerLoss", "AnswerLoss", "ExactMatch"]
    assert (made.some[1].max_new_tokens, made.named, made.maybe) == (3, None, None)


def test_problems_of_nested_components_carry_their_place() -> None:
    node = {
        "name": SEVERAL,
        "one": {"name": "los"},
        "some": [LOSS, {"name": "exact_match", "max": 3}],
        "named": {"a": LOSS},
    }
    _, problems = registry.validate("Metric", node, "metrics.m")
    assert [p.key for p in problems] == ["metrics.m.one.name", "metrics.m.some.1.max", "metrics.m.named.a.name"]
    assert "'answer_loss' is a Metric" in problems[2].message


@pytest.mark.parametrize("option", ["one", "some"])
def test_classes_outside_the_registry_are_refused_unread(option: str, tmp_path: Path, module) -> None:
    touched = tmp_path / "touched"
    module("parts_l", f"open({str(touched)!r}, 'w')\n")
    node = {"name": "parts_l:M"}
    nodes = {"one": LOSS, "some": [], **({"one": node} if option == "one" else {"some": [node]})}
    _, problems = registry.validate("Metric", {"name": "ablation", "score": node}, "metrics.a", registered_only=True)
    assert "'parts_l:M' is a class outside the registry; add trust_components=true" in problems[0].message
    _, problems = registry.validate("Metric", {"name": SEVERAL, **nodes}, "metrics.m", registered_only=True)
    assert problems
    assert not touched.exists()


# ---------------------------------------------------------------- packs


@pytest.mark.usefixtures("fresh")
def test_pack_adds_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path, "pack_one", projector("one", "One"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "one" in names(Projector)
    assert registry.index()["Projector"]["one"].pack == "pack_one"
    assert isinstance(build(Projector, {"name": "one"}, **GIVEN), Projector)


@pytest.mark.usefixtures("fresh")
def test_pack_with_a_base_class_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    derived = """
        @register("derived")
        class Derived(Base):
            '''Inherits its options.'''
        """
    pack(tmp_path, "pack_two", projector("base", "Base"), derived)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"base", "derived"} <= set(names("Projector"))
    assert list(registry.find("Projector", "derived").params) == ["in_dim", "out_dim", "in_tokens"]
    assert "pack_two" not in sys.modules, "sources were enough"


@pytest.mark.usefixtures("fresh")
def test_pack_that_registers_in_a_loop_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = """
        for name in ("loop_a", "loop_b"):
            register(name)(type(name, (Plain,), {}))
        """
    pack(tmp_path, "pack_three", projector("plain", "Plain"), loop)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"plain", "loop_a", "loop_b"} <= set(names("Projector"))


@pytest.mark.usefixtures("fresh")
def test_two_packs_with_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path, "pack_a", projector("same", "A"))
    pack(tmp_path, "pack_b", projector("same", "B"))
    monkeypatch.syspath_prepend(str(tmp_path))
    both = r"'same' is registered twice: pack_a\.A .*pack_b\.B"
    with pytest.raises(ConfigError, match=both):
        names(Projector)
    with pytest.raises(ConfigError, match=r"pack 'pack_b' .*'same' is registered twice"):
        registry.load_packs()


@pytest.mark.usefixtures("fresh")
def test_broken_pack_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path, "pack_bad", "raise RuntimeError('half\\n installed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"pack 'pack_bad' \(pack_bad\) cannot be imported: RuntimeError: half installed;"
    ):
        build(Projector, {"name": "mlp"}, **GIVEN)


@pytest.mark.usefixtures("fresh")
def test_pack_whose_module_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path, "pack_gone", "")
    (tmp_path / "pack_gone.py").unlink()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="pack 'pack_gone' .*there is no module 'pack_gone'; repair or uninstall it"):
        names(Projector)


@pytest.mark.usefixtures("fresh")
def test_a_name_cannot_be_given_twice() -> None:
    class First(Projector):
        def forward(self, features: Tensor) -> Tensor:
            return features

    class Second(First):
        pass

    register("twice")(First)
    assert register("twice")(First) is First, "the same class again changes nothing"
    with pytest.raises(ValueError, match=r"'twice' is registered twice: .*First.*Second; rename one"):
        register("twice")(Second)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (ValueError("two\n  lines"), False, "two lines"),
        (ValueError("two\n  lines"), True, "ValueError: two lines"),
        (KeyError(), False, "KeyError"),
        (KeyError(), True, "KeyError"),
    ],
)
def test_an_error_on_one_line_is_never_empty(error: Exception, kind: bool, told: str) -> None:
    assert one_line(error, kind=kind) == told
    assert one_line(error, 3).startswith(told.removeprefix("ValueError: ")[:3])
