"""Kernels with a fault, made from the source of right ones: to see a test find it."""

import importlib.util
from pathlib import Path
from types import ModuleType


def replaced(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1, f"{source.count(old)} times: {old}"
    return source.replace(old, new)


def moved(source: str, line: str, above: str) -> str:
    """A line, further up: above the one that begins so."""
    lines = source.splitlines()
    (place,) = (i for i, text in enumerate(lines) if text.strip().startswith(above))
    old = next(i for i in range(place, len(lines)) if lines[i].strip() == line)
    indent = lines[place][: -len(lines[place].lstrip())]
    return "\n".join([*lines[:place], indent + line, *lines[place:old], *lines[old + 1 :]])


def source_of(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text()


def module_of(source: str, folder: Path) -> ModuleType:
    """Triton reads the source of a kernel from a file."""
    path = folder / f"faulty_{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
