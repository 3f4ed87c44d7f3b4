"""Check that files import only from those above them in docs/architecture.md, and that no file grows too long."""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True,
                         text=True, check=True).stdout.split()
OTHERS = ("tests/", "benchmarks/", "recipes/", "docs/", "data/", "models/")  # files in these may import anything
SOURCES = [path for path in TRACKED if not path.startswith(OTHERS)]
LONGEST = 600  # lines
SCRIPTS = {"demo.py", "example_entry.py", "export.py", "train.py"}


def imported(path: str) -> set[str]:
    """Return the project's own modules that a file imports, at its top or within functions."""
    modules = set()
    for node in ast.walk(ast.parse(Path(ROOT, path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {f"{module.replace('.', '/')}.py" for module in modules} & set(TRACKED)


def test_imports_follow_the_table_of_files():
    table = Path(ROOT, "docs", "architecture.md").read_text("utf-8").partition("## Files")[2]
    floors = {path: floor for floor, path in enumerate(dict.fromkeys(re.findall(r"\]\(\.\./([\w/]+\.py)\)", table)))}
    ours = [path for path in SOURCES if not path.startswith("feedback/") or path in floors]
    assert set(ours) == set(floors), "docs/architecture.md must list exactly these files"
    backwards = [f"{path} imports {module}" for path in ours for module in imported(path)
                 if floors.get(module, len(floors)) >= floors[path]]
    assert not backwards


def test_imports_form_no_circle():
    waiting = {path: imported(path) for path in SOURCES}
    while free := [path for path, needs in waiting.items() if not needs & waiting.keys()]:
        for path in free:
            del waiting[path]
    assert not waiting, "these files import each other"


def test_nothing_imports_a_script():
    importing = {path: imported(path) & SCRIPTS for path in SOURCES}
    assert {path: scripts for path, scripts in importing.items() if scripts} == {
        "feedback/reward.py": {"train.py"}}  # also a script: it runs the trainer on pairs


def definitions(path: str) -> set[str]:
    """Return the names defined at the top of a file, and its methods as ``Class.method``."""
    names = set()
    for node in ast.parse(Path(ROOT, path).read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_the_walk_names_existing_functions():
    text = Path(ROOT, "docs/architecture.md").read_text("utf-8")
    walk = text.partition("## A walk for newcomers\n")[2].partition("\n## ")[0]
    steps = re.findall(r"^\d+\..*(?:\n {3}.*)*", walk, re.M)
    named = [re.findall(r"`([\w./]+\.py)`((?:,? (?:or )?`[\w.]+`)*)", step) for step in steps]
    assert all(named) and len(steps) > 20, "each step must name a file"
    missing = [f"{path} {name}" for step in named for path, names in step
               for name in re.findall(r"`([\w.]+)`", names) or ["a function"] if name not in definitions(path)]
    assert not missing


def test_documents_name_existing_functions():
    modules: dict[str, set[str]] = {}
    for path in SOURCES:
        modules.setdefault(Path(path).stem, {"py", "json", "safetensors"}).update(definitions(path))
    for document in Path(ROOT, "docs").glob("*.md"):
        named = re.findall(r"`(\w+)\.(\w+)`", document.read_text("utf-8"))
        missing = [f"{module}.{name}" for module, name in named if name not in modules.get(module, {name})]
        assert not missing, document


def test_no_file_grows_too_long():
    lines = {path: len(Path(ROOT, path).read_text("utf-8").splitlines()) for path in TRACKED}
    assert lines["train.py"] <= 250
    assert {path for path, count in lines.items() if count > LONGEST} <= {"models/tiny_corpus.py"}
