"""Makes faulty kernels from the source of correct ones, to show that a test finds the fault."""

import importlib.util
from pathlib import Path
from types import ModuleType


def replaced(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1, f"found {source.count(old)} times: {old}"
    return source.replace(old, new)


def moved(source: str, line: str, above: str) -> str:
    """Moves a line up, to just before the one that begins with `above`."""
    lines = source.splitlines()
    (target,) = (i for i, text in enumerate(lines) if text.strip().startswith(above))
    origin = next(i for i in range(target, len(lines)) if lines[i].strip() == line)
    indent = lines[target][: -len(lines[target].lstrip())]
    return "\n".join([*lines[:target], indent + line, *lines[target:origin], *lines[origin + 1 :]])


def source_of(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text()


def module_of(source: str, folder: Path) -> ModuleType:
    """Imports the source from a file, which Triton needs to read kernels."""
    path = folder / f"faulty_{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
