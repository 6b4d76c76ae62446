"""The rules of the folders, the sizes and the pages that no linter knows."""

import ast
import importlib
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "platform" / "elastrain"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
Function = ast.FunctionDef | ast.AsyncFunctionDef

every_module = pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter, started in the repository's root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- folders


def test_platform_holds_no_python_file_of_its_own() -> None:
    strays = [path.name for path in (ROOT / "platform").glob("*.py")]
    assert not strays, f"platform/{strays} replaces the standard library's `platform` and breaks torch and ray"


def test_stdlib_platform_stays_the_standard_librarys() -> None:
    found = run_python("import elastrain, platform; assert platform.system(); print(platform.__file__)")
    assert Path(found).parent == Path(sysconfig.get_path("stdlib"))


def test_tests_hold_no_init_file() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "pytest's importlib mode wants plain folders"


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=lambda path: path.name)
def test_each_folder_of_modules_is_a_package(folder: Path) -> None:
    assert (folder / "__init__.py").exists(), f"{folder.relative_to(ROOT)} has modules and no __init__.py"


def test_tests_mirror_the_package() -> None:
    """`tests/<folder>/test_<name>.py` needs no module of that name, but its folder is one of the package's."""
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    strange = [str(folder) for folder in folders if not (PACKAGE / folder).is_dir()]
    assert not strange, f"tests/{strange}: the package has no such folder"


# --- names


def test_every_public_name_loads() -> None:
    public = importlib.import_module("elastrain")
    assert len(set(public.__all__)) == len(public.__all__)
    for name in public.__all__:
        assert getattr(public, name, None) is not None, f"elastrain.{name} is promised and does not load"


def test_no_public_name_is_also_a_module() -> None:
    modules = {path.stem for path in PACKAGE.iterdir()}
    both = modules & set(importlib.import_module("elastrain").__all__)
    assert not both, f"{both}: the name turns into the module once somebody imports the module"


@every_module
def test_no_public_function_has_its_modules_name(module: Path) -> None:
    names = {node.name for node in parse(module).body if isinstance(node, Function | ast.ClassDef)}
    assert module.stem not in names


@pytest.mark.parametrize(
    "statement",
    [
        "import elastrain",
        "from elastrain.data import plan, dataset",
        "from elastrain.observe import report",
        "import elastrain.spec.train",
    ],
)
def test_planning_and_reporting_import_neither_torch_nor_ray(statement: str) -> None:
    heavy = run_python(f"{statement}; import sys; print(*sorted({{'ray', 'torch'}} & set(sys.modules)))")
    assert not heavy, f"`{statement}` imports {heavy}: seconds before the first answer"


def test_a_driver_loads_nothing_that_only_other_processes_need() -> None:
    heavy = "{'torch', 'pandas', 'ray.data', 'ray.train'}"
    loaded = run_python(f"import elastrain.elastic.run, sys; print(*sorted({heavy} & set(sys.modules)))")
    assert not loaded, f"a driver imports {loaded}: seconds before the first worker starts"


# --- sizes, docstrings


def parse(module: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(module.read_text(encoding="utf-8"))


def public_nodes(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public functions and classes of a body, and the public methods of those classes, with dotted names."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_nodes(node.body, f"{prefix}{node.name}.")


def says_nothing_new(node: Function | ast.ClassDef) -> bool:
    """An overload or an override: the docstring stands elsewhere."""
    words = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    return bool(words & {"overload", "override", "setter"})


@every_module
def test_module_is_short(module: Path) -> None:
    num_lines = len(module.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_MODULE_LINES, f"{num_lines} lines: find the second idea and give it a module"


@every_module
def test_functions_are_short(module: Path) -> None:
    functions = [node for node in ast.walk(parse(module)) if isinstance(node, Function)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}


@every_module
def test_everything_public_has_a_docstring(module: Path) -> None:
    tree = parse(module)
    assert ast.get_docstring(tree), "the module says nothing of itself"
    nodes = [(name, node) for name, node in public_nodes(tree.body) if not says_nothing_new(node)]
    silent = [name for name, node in nodes if not ast.get_docstring(node)]
    assert not silent


# --- dependencies

IMPORTED_AS = {
    "grpcio": "grpc",
    "pillow": "PIL",
    "ruamel-yaml": "ruamel",
    "scikit-learn": "sklearn",
    "tensorboardx": "tensorboardX",
}


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]


def test_constraints_lock_every_dependency_within_its_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    locked = {canonicalize_name(name): version for name, version in locked.items()}
    for requirement in requirements():
        version = locked.get(canonicalize_name(requirement.name))
        assert version, f"constraints.txt does not lock {requirement.name}"
        assert version in requirement.specifier, f"{requirement} does not admit the locked {version}"


@every_module
def test_every_imported_package_is_declared(module: Path) -> None:
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    known = (
        {IMPORTED_AS.get(name, name) for name in declared} | {"elastrain", "pydantic_core"} | sys.stdlib_module_names
    )
    nodes = list(ast.walk(parse(module)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    unknown = {name.split(".")[0] for name in imported} - known
    assert not unknown, "imported, and not among the dependencies of pyproject.toml"


# --- pages


def pages() -> Iterator[Path]:
    """Markdown files of the repository: no hidden folder, nothing that a run or a build leaves behind."""
    for folder, names, files in os.walk(ROOT):
        made = {"data", "runs", "build", "dist"} if Path(folder) == ROOT else set()
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in made)
        yield from (Path(folder) / name for name in sorted(files) if name.endswith(".md"))


def prose(page: Path) -> str:
    """A page without its fenced blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", list(pages()), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_lives(page: Path) -> None:
    for link in re.findall(r"\]\(<?([^)>\s]+)>?[^)]*\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), f"{link}: no such heading"


def section(page: Path, title: str) -> str:
    """The text under the first heading that has the title in it, up to the next heading of its level or above."""
    found = re.search(rf"^(#+) [^\n]*{title}[^\n]*$(.*)", prose(page), flags=re.DOTALL | re.MULTILINE | re.IGNORECASE)
    assert found, f"{page.name} has no heading with the word '{title}'"
    return re.split(rf"^#{{1,{len(found[1])}}} ", found[2], flags=re.MULTILINE)[0]


def test_architecture_names_every_module() -> None:
    """The table under the heading 'Modules': each row's first cell names modules as `data.plan` or `data/plan.py`."""
    rows = re.findall(r"^\|([^|]+)\|", section(ROOT / "ARCHITECTURE.md", "modules"), flags=re.MULTILINE)
    cells = [name for row in rows for name in re.findall(r"`([\w./]+)`", row)]
    named = {name.removesuffix(".py").replace("/", ".").strip(".") for name in cells}
    modules = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in MODULES}
    modules = {name for name in modules if not name.endswith("__init__")}
    packages = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/__init__.py")}
    assert not modules - named, "ARCHITECTURE.md's table of modules lacks these"
    assert not named - modules - packages - {"__init__"}, "ARCHITECTURE.md's table names what is not there"
