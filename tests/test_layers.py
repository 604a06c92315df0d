"""Imports run downward only, and the package works where Triton is not installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hybrid_kernels

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hybrid_kernels"

# What each module may import from the package, if it is an entry above.
BELOW = {"triton_backend.reduce", "triton_backend.divergences", "triton_backend.sums"}
SHARED = {"triton_backend.entries", "triton_backend.memory", "triton_backend.gradient"}
ALLOWED = {
    "checks": set(),
    "types": {"checks"},
    "divergences": {"checks"},
    "rows": {"divergences"},
    "collectives": set(),
    "reference": {"types", "divergences"},
    "validate": {"checks", "types", "divergences"},
    "returns": {"checks", "rows", "validate"},
    "triton_backend": set(),
    "triton_backend.plan": set(),
    "triton_backend.reduce": {"triton_backend.plan"},
    "triton_backend.divergences": {"rows", "triton_backend.reduce"},
    "triton_backend.sums": {"rows", "triton_backend.reduce", "triton_backend.divergences"},
    "triton_backend.entries": BELOW,
    "triton_backend.memory": {"rows", "triton_backend.divergences", "triton_backend.sums"},
    "triton_backend.meeting": {"triton_backend.plan", "triton_backend.memory", *BELOW},
    "triton_backend.gradient": {"triton_backend.entries", "triton_backend.memory", *BELOW},
    "triton_backend.topk": {"rows", *BELOW, "triton_backend.entries", "triton_backend.memory"},
    "triton_backend.row": {*SHARED, "triton_backend.sums", "triton_backend.topk"},
    "triton_backend.sweep": {*BELOW, *SHARED, "triton_backend.row", "triton_backend.topk"},
    "triton_backend.packed": {"triton_backend.reduce"},
    "triton_backend.slices": {
        "triton_backend.plan",
        "triton_backend.reduce",
        "triton_backend.memory",
        "triton_backend.packed",
    },
    "triton_backend.lean": {
        "triton_backend.reduce",
        "triton_backend.divergences",
        "triton_backend.packed",
        "triton_backend.slices",
    },
    "triton_backend.resident": {
        *BELOW,
        "triton_backend.memory",
        "triton_backend.meeting",
        "triton_backend.packed",
        "triton_backend.lean",
        "triton_backend.slices",
    },
    "triton_backend.launch": {
        "divergences",
        "rows",
        "triton_backend.divergences",
        "triton_backend.meeting",
        "triton_backend.memory",
        "triton_backend.plan",
        "triton_backend.resident",
        "triton_backend.sweep",
        "triton_backend.topk",
    },
    "torch_backend": set(),
    "torch_backend.divergences": {"divergences", "rows"},
    "torch_backend.topk": {"divergences", "rows", "torch_backend.divergences"},
    "torch_backend.ordinary": {"rows", "torch_backend.divergences"},
    "torch_backend.tokens": {"rows"},
    "torch_backend.sweep": {
        "divergences",
        "rows",
        "torch_backend.divergences",
        "torch_backend.topk",
        "torch_backend.ordinary",
        "torch_backend.tokens",
    },
    "torch_backend.blocks": {
        "rows",
        "torch_backend.divergences",
        "torch_backend.topk",
        "torch_backend.ordinary",
        "torch_backend.sweep",
    },
    "torch_backend.launch": {
        "rows",
        "torch_backend.sweep",
        "torch_backend.blocks",
        "torch_backend.tokens",
        "torch_backend.topk",
    },
    "sharded": {
        "checks",
        "divergences",
        "rows",
        "validate",
        "collectives",
        "torch_backend.divergences",
        "torch_backend.topk",
    },
    "backends": {
        "checks",
        "rows",
        "validate",
        "sharded",
        "triton_backend.plan",
    },
    "autograd": set(),
    "objective": {"checks", "types", "rows", "validate"},
    "ops": {"checks", "rows", "validate", "autograd", "objective", "backends"},
    "linear": set(),
    "linear.layers": set(),
    "linear.heads": {"checks", "types", "validate", "linear.layers"},
    "linear.rows": {"rows", "linear.heads"},
    "linear.gemm": {"linear.heads"},
    "linear.chunks": {
        "rows",
        "collectives",
        "backends",
        "ops",
        "linear.heads",
        "linear.rows",
        "linear.gemm",
    },
    "linear.gradients": {"collectives", "linear.gemm", "linear.chunks"},
    "linear.ops": {
        "rows",
        "autograd",
        "objective",
        "ops",
        "linear.rows",
        "linear.chunks",
        "linear.gradients",
    },
    "call": {
        "checks",
        "types",
        "divergences",
        "rows",
        "validate",
        "objective",
        "backends",
        "ops",
        "linear.heads",
        "linear.rows",
        "linear.gemm",
        "linear.ops",
    },
    "api": {"types", "divergences", "objective", "linear.heads", "linear.rows", "call"},
    "output_layers": {"types", "linear.heads", "linear.gemm"},
    "": {"types", "divergences", "returns", "api", "output_layers"},
    "timing": set(),
    "tune": {"", "timing", "triton_backend.plan"},
    "__main__": {
        "",
        "types",
        "rows",
        "reference",
        "backends",
        "timing",
        "tune",
        "triton_backend.plan",
        "triton_backend.launch",
    },
}


def sources(folder):
    paths = sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)
    assert paths, f"{folder} holds no sources"
    return paths


def name_of(path):
    """`returns` for hybrid_kernels/returns.py, and the empty name for the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


NAMES = {name_of(path) for path in sources(PACKAGE)}


def imports(tree):
    """Dotted names of what a tree imports; for `from a import b`, a.b if that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            inner = node.module.partition("hybrid_kernels")[2].strip(".")
            for alias in node.names:
                deeper = f"{inner}.{alias.name}".strip(".")
                in_package = node.module.split(".")[0] == "hybrid_kernels"
                is_module = in_package and deeper in NAMES
                yield f"hybrid_kernels.{deeper}" if is_module else node.module


def at_import(tree):
    """The statements that run when a module is imported."""
    body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return ast.Module(body=body, type_ignores=[])


@pytest.mark.parametrize("path", sources(PACKAGE), ids=name_of)
def test_imports_run_downward(path):
    name = name_of(path)
    assert name in ALLOWED, f"{path.name} is new: say in ALLOWED what it may import"
    tree = ast.parse(path.read_text())
    inside = {i for i in imports(tree) if i.split(".")[0] == "hybrid_kernels"}
    imported = {i.removeprefix("hybrid_kernels").strip(".") for i in inside}
    assert imported <= ALLOWED[name], f"{name} imports {imported - ALLOWED[name]}"
    # `tune` is itself imported only where there is something to tune.
    if not name.startswith("triton_backend") and name != "tune":
        eager = {i.removeprefix("hybrid_kernels.") for i in imports(at_import(tree))}
        assert not any(i.split(".")[0] in ("triton", "triton_backend") for i in eager)


def test_the_table_has_every_module_and_no_cycle():
    names = list(ALLOWED)
    for position, (name, below) in enumerate(ALLOWED.items()):
        assert below <= set(names[:position]), name
    assert set(names) == NAMES


def test_the_reference_needs_no_package_but_torch():
    tree = ast.parse((PACKAGE / "reference.py").read_text())
    roots = {i.split(".")[0] for i in imports(tree)} - {"hybrid_kernels"}
    assert roots <= {"torch", "math", "collections", "typing", "__future__"}


def test_train_imports_public_names_only():
    for path in sources(ROOT / "train"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                inner = [a.name for a in node.names if a.name.startswith("hybrid_kernels.")]
                assert not inner, f"{path.name} imports {inner}"
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == (
                "hybrid_kernels"
            ):
                assert node.module == "hybrid_kernels", f"{path.name} imports {node.module}"
                names = {alias.name for alias in node.names}
                public = {*hybrid_kernels.__all__, "__version__"}
                assert names <= public, f"{path.name} imports {names - public}"


# The modules of train/, each of which may import the ones before it.
TRAIN_ORDER = (
    *("__init__", "schedules", "config", "data", "rewards", "files", "checkpoint", "rollout"),
    *("models", "batch", "objective", "metrics", "evaluate", "report", "stop", "loop"),
    *("addition", "demo", "__main__"),
)


@pytest.mark.parametrize("path", sources(ROOT / "train"), ids=lambda path: path.stem)
def test_imports_of_the_training_loop_run_downward(path):
    assert path.stem in TRAIN_ORDER, f"{path.name} is new: give it a place in TRAIN_ORDER"
    above = TRAIN_ORDER[TRAIN_ORDER.index(path.stem) :]
    for node in ast.walk(ast.parse(path.read_text())):
        assert getattr(node, "id", None) != "TYPE_CHECKING", "an import for annotations only"
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            package, _, rest = module.partition(".")
            assert package != "train" or rest.split(".")[0] not in above, module


def test_the_public_names_are_there():
    assert sorted(hybrid_kernels.__all__) == hybrid_kernels.__all__
    for name in hybrid_kernels.__all__:
        assert getattr(hybrid_kernels, name) is not None


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # any import of it now fails
import torch
import hybrid_kernels as hk
logits = torch.randn(2, 3, 50, requires_grad=True)
teacher, ids = torch.randn(2, 3, 50), torch.zeros(2, 3, dtype=torch.long)
result = hk.hybrid_loss(logits, teacher, ids, torch.ones(2, 3))
result.loss.backward()
assert logits.grad.any()
assert hk.token_terms(logits, teacher).divergence.requires_grad
try:
    hk.hybrid_loss(logits, teacher, backend="triton")
except ValueError as error:
    assert "not installed" in str(error), error
else:
    raise AssertionError("a silent fallback")
loaded = [name for name in sys.modules if name.startswith("hybrid_kernels.triton_backend")]
assert not loaded, loaded
"""


def test_the_package_works_without_triton():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
