"""The one arrow: cli -> serve -> {train, post, evaluate, scaling} -> parallel -> {data, models} -> nn -> ops."""

import ast
from pathlib import Path

import sidlm

ROOT = Path(sidlm.__file__).parent
LAYER = {"cli": 7, "serve": 6, "scaling": 6, "train": 5, "post": 5, "evaluate": 4}
LAYER |= {"parallel": 3, "data": 2, "models": 2, "nn": 1, "ops": 0}
# the loop validates, and the server speaks post's chat format: train is above evaluate, serve
# above post; a scaling grid trains
LEAVES = {"errors", "__init__"}


def imported(path: Path) -> set[str]:
    """First part below sidlm of every import in the file, lazy ones too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import on line {node.lineno}; the house writes them whole"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "sidlm" else [node.module]
        found |= {name.split(".")[1] for name in names if name and name.startswith("sidlm.")}
    return found


def violations(root: Path) -> list[str]:
    wrong = []
    for path in sorted(root.rglob("*.py")):
        own = path.relative_to(root).parts[0].removesuffix(".py")
        if own in LEAVES:
            continue
        for other in imported(path) - {own} - {"errors", "__version__"}:
            if LAYER[other] >= LAYER[own]:
                wrong.append(f"{path.relative_to(root)} imports {other}")
    return wrong


def test_nothing_imports_upward():
    assert violations(ROOT) == []


def test_an_upward_import_is_found(tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "bad.py").write_text("def f():\n    from sidlm.models import x\n")
    assert violations(tmp_path) == ["ops/bad.py imports models"]


def test_parallel_does_not_know_data():
    assert not [path for path in (ROOT / "parallel").rglob("*.py") if "data" in imported(path)]


def test_nn_and_ops_do_not_know_transformers():
    for part in ("nn", "ops"):
        for path in (ROOT / part).rglob("*.py"):
            assert "transformers" not in {
                alias.name.split(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
            }, path
