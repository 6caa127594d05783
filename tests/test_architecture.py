"""The house rules that a machine can check: import directions, sizes, docstrings, the list of packages."""

from __future__ import annotations

import ast
import functools
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("lowmem", "cli", "recipes")  # in configs/ a script may lie beside the data that it made
FILES = sorted(file for folder in CODE for file in (ROOT / folder).rglob("*.py"))
LIBRARY = [file for file in FILES if file.is_relative_to(ROOT / "lowmem")]

# A room imports only from itself and from rooms before it.
ROOMS = ["report", "optim", "sources", "strategies", "models", "data", "memory", "training", "cli", "recipes"]
FREE = {
    "errors",
    "texts",
    "values",
    "combinations",
    "several",
    "config",
    "configs",
    "console",
    "outside",
}  # may be imported by all
# Inside a room the same, by floors: rooms inside it and files of one floor do not import each other.
FLOORS = {
    "optim": [
        {
            "tensors.checks",
            "tensors.marks",
            "codecs.dynamic",
            "engine.noise",
            "engine.cutting",
            "engine.parcel",
            "terms.fp32",
            "terms.its",
            "terms.overall",
            "terms.state",
            "shards",
        },
        {"int8", "terms.products"},
        {"blocks"},
        {"formulas"},
        {"terms.hyper", "terms.changes"},
        {"terms.split", "terms.asks", "projectors.bases", "int8.writer"},
        {"contract"},
        {"codecs", "writers"},
        {"engine", "terms.codes"},
        {"held"},
        {"elementwise"},
        {"rules"},
        {"residuals", "projectors", "modifiers"},
        {"subspace"},
        {"source", "schedules", "tensors.roles", "tensors.stacks"},
        {"strategy", "tensors.heads"},
        {"tensors.seats", "tensors.offload"},
        {"tensors.resting"},
        {"tensors.groups"},
        {"tensors.steps", "tensors.outside"},
        {"tensors.saved"},
        {"tensors.told"},
        {"optimizer"},
        {"release", "evaluated"},
    ],
    "optim.rules": [{"elementwise"}, {"measured"}, {"normalised"}, {"compact"}],
    "optim.schedules": [{"schedule"}, {"turns", "watching"}],
    "report": [
        {"units", "document"},
        {"charts"},
        {"page"},
        {"plan", "gpu", "quality", "accuracy"},
        {"profile", "compare"},
        {"run"},
        {"pages"},
    ],
    "memory": [
        {"device"},
        {"run"},
        {"trace", "closed_form"},
        {"count", "gather"},
        {"footprint", "exchange"},
        {"advice.kinds"},
        {"advice.ways"},
        {"between"},
        {"surface", "lengths", "advice.wording", "advice.cards", "advice.found"},
        {"advice.levers"},
        {"plan"},
        {"pictures", "advice.solve", "advice.emit"},
        {"advice.search"},
        {"advice.beside"},
        {"predict", "measure"},
    ],
}
HEAVY = {
    "transformers",
    "trl",
    "datasets",
    "matplotlib",
    "bitsandbytes",
    "peft",
    "accelerate",
    "gguf",
    "pandas",
}


def name_of(file: Path) -> str:
    """Module name under which a file is installed."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[0] == "lowmem" else ["lowmem", *parts])


@functools.cache
def tree(file: Path) -> ast.Module:
    """A file, read and parsed once."""
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def imports(file: Path, *, top_level: bool = False, types: bool = False) -> tuple[str, ...]:
    """Absolute names of the modules that a file imports, those for types alone only where asked for."""
    found = _imports(tree(file), name_of(file), file, top_level, types)
    return tuple(found)


def _imports(node: ast.AST, module: str, file: Path, top_level: bool, types: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if not types and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if top_level and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from _from(child, module, file)
        yield from _imports(child, module, file, top_level, types)


def _from(node: ast.ImportFrom, module: str, file: Path) -> Iterator[str]:
    base = node.module or ""
    if node.level:
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        parts = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parts, node.module] if node.module else parts)
    for alias in node.names:  # `from lowmem.memory import hub` imports lowmem.memory.hub
        child = [*base.split(".")[1:], alias.name]
        found = ROOT.joinpath("lowmem", *child)
        yield f"{base}.{alias.name}" if base.startswith("lowmem") and _is_module(found) else base


def _is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").is_file()


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def floor(module: str, where: str) -> tuple[int, str]:
    """The floor of a module inside a room, and the name that stands there."""
    inside = module.removeprefix(f"lowmem.{where}.")
    floors = FLOORS[where]
    for name in (inside, inside.partition(".")[0]):  # a file inside an inner room may stand lower than it
        for i, names in enumerate(floors):
            if name in names:
                return i, name
    raise AssertionError(f"{module}: {where} has no floor for it; give it one in FLOORS")


def own_imports() -> Iterator[tuple[str, str]]:
    for file in FILES:
        for target in imports(file):
            if target.split(".")[0] == "lowmem":
                yield name_of(file), target


def test_rooms_import_only_from_rooms_before_them() -> None:
    wrong = [
        f"{source} imports {target}"
        for source, target in own_imports()
        if room(source) in ROOMS
        and room(target) not in {"", *FREE}
        and ROOMS.index(room(target)) > ROOMS.index(room(source))
    ]
    assert not wrong, "\n".join(wrong)


def test_errors_and_config_import_nothing_above_them() -> None:
    for stem, allowed in (
        ("errors", set()),
        ("texts", {"errors"}),
        ("config", {"errors", "texts", "values", "combinations"}),
        ("combinations", {"several"}),
        ("several", set()),
    ):
        targets = {t for t in imports(ROOT / "lowmem" / f"{stem}.py") if t.startswith("lowmem")}
        assert targets <= {f"lowmem.{name}" for name in allowed}, f"{stem}.py imports {targets}"


def test_nobody_imports_the_command_line_or_a_recipe() -> None:
    wrong = [
        f"{source} imports {target}"
        for source, target in own_imports()
        if room(target) in ("cli", "recipes") and room(source) != room(target)
    ]
    assert not wrong, "\n".join(wrong)


def test_recipes_stand_alone() -> None:
    """A recipe is copied out and run as a script: absolute imports, and none from a sibling."""
    for file in (ROOT / "recipes").glob("*.py"):
        assert not [t for t in imports(file) if t.startswith("lowmem.recipes")], file.name


@pytest.mark.parametrize("name", FLOORS)
def test_floors_of_a_room(name: str) -> None:
    wrong = []
    for source, target in own_imports():
        if not all(module.startswith(f"lowmem.{name}.") for module in (source, target)):
            continue
        (upper, here), (lower, there) = floor(source, name), floor(target, name)
        if lower > upper or (lower == upper and here != there):
            wrong.append(f"{source} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_circles() -> None:
    """No file imports itself through others, be it inside a function or for types alone."""
    arrows: dict[str, set[str]] = {}
    for file in FILES:
        if file.name != "__init__.py":  # a face hands names on
            arrows[name_of(file)] = set(imports(file, types=True)) - {name_of(file)}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(arrows.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


def test_report_knows_documents_alone() -> None:
    wrong = [
        f"{source} imports {target}"
        for source, target in own_imports()
        if room(source) == "report" and room(target) not in ("report", "errors")
    ]
    assert not wrong, "\n".join(wrong)


def test_memory_names_no_strategy() -> None:
    wrong = [
        f"{source} imports {target}"
        for source, target in own_imports()
        if room(source) == "memory" and target.startswith("lowmem.strategies.") and "registry" not in target
    ]
    assert not wrong, "\n".join(wrong)


def test_optim_needs_torch_alone() -> None:
    third = {
        t.split(".")[0]
        for file in LIBRARY
        if room(name_of(file)) in ("optim", "sources", "strategies")
        for t in imports(file)
    }
    import sys

    assert third - set(sys.stdlib_module_names) <= {"lowmem", "torch", "__future__"}


def test_heavy_packages_are_imported_where_used() -> None:
    # Trainers, arguments and callbacks inherit from those of transformers and trl; the rest of lowmem reaches
    # them lazily.
    wrong = []
    for file in FILES:
        bases = {"transformers", "trl"} if room(name_of(file)) == "training" else set()
        heavy = {t.split(".")[0] for t in imports(file, top_level=True)} & (HEAVY - bases)
        wrong += [f"{file.relative_to(ROOT)}: {name}" for name in sorted(heavy)]
    assert not wrong, "import inside the function that needs it\n" + "\n".join(wrong)


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Name and length of each function, docstring left out."""
    for node in ast.walk(tree(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_fit_one_screen() -> None:
    long = [
        f"{file.relative_to(ROOT)}: {name} has {length} lines"
        for file in FILES
        for name, length in functions(file)
        if length > 60
    ]
    assert not long, "\n".join(long)


def test_functions_are_short_in_the_median() -> None:
    lengths = sorted(length for file in FILES for _, length in functions(file))
    assert lengths[len(lengths) // 2] <= 10


def test_files_and_docstrings_are_short() -> None:
    wrong = []
    for file in FILES:
        docstring = ast.get_docstring(tree(file)) or ""
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if not 0 < len(docstring.splitlines()) < 25 or lines > 350:
            wrong.append(
                f"{file.relative_to(ROOT)}: {lines} lines, {len(docstring.splitlines())} of docstring"
            )
    assert not wrong, "the module docstring explains the idea, in less than 25 lines\n" + "\n".join(wrong)


def test_folders_can_be_taken_in_at_a_glance() -> None:
    files = Counter(file.parent for file in FILES if file.stem != "__init__")
    wrong = [f"{folder.relative_to(ROOT)}: {count} files" for folder, count in files.items() if count > 13]
    assert not wrong, "give those that belong together a room\n" + "\n".join(wrong)


def test_library_leaves_process_and_terminal_alone() -> None:
    """No print, no exit, no environment variable set, no seeding of the global generator."""
    wrong = []
    for file in LIBRARY:
        for node in ast.walk(tree(file)):
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if call == "torch.manual_seed" and file.stem == "zoo":
                continue  # inside fork_rng, which puts the generator back
            if call in {
                "print",
                "exit",
                "sys.exit",
                "os._exit",
                "torch.manual_seed",
                "random.seed",
                "os.putenv",
            }:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} calls {call}")
            if isinstance(node, ast.Assign) and any("os.environ[" in ast.unparse(t) for t in node.targets):
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} sets an environment variable")
    assert not wrong, "\n".join(wrong)


def test_packages_listed_are_those_on_disk() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    folders = {file.parent for file in FILES}
    assert not [f for f in folders if not (f / "__init__.py").is_file()], "a folder lacks its __init__.py"
    assert sorted(listed) == sorted([*(name_of(f / "__init__.py") for f in folders), "lowmem.configs"])
    assert (ROOT / "configs" / "__init__.py").is_file()  # an editable install does not find it otherwise


@pytest.mark.parametrize("folder", ["cli", "recipes", "configs"])
def test_no_folder_shadows_the_package_map(folder: str) -> None:
    assert not (ROOT / "lowmem" / folder).exists()
