"""`python -m bench prebuild [FOLDER]`: compiles kernels for an H100 or H200 on another machine.

Compiling what the stages launch takes minutes of the time on a borrowed GPU. So the stages run here
on meta tensors (`standin.py`), which leaves their kernels in a Triton cache. The cache is packed
into FOLDER, by default prebuilt/, to be copied to the GPU's machine. That machine must have the
same version of Triton.

Triton names the entries of its cache by its own build, the kernel's source, the assembler's version
and options. The build differs between two installations of one version, so `unpack` renames the
entries on the GPU's machine. Triton 3.6 also compiles a launcher in C for each kind of signature:
the pack contains their sources, and `build_launchers` compiles them in parallel.
"""

import argparse
import base64
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import build, cache, driver

from bench.gpu import conductor

PACK, LIMIT_MIB = "kernels.tar.xz", 20
KEYS, LAUNCHERS = "keys.jsonl", "launchers"
TARGET = GPUTarget("cuda", 90, 32)
NVIDIA = "triton.backends.nvidia.driver"


def main(arguments: list[str]) -> int:
    """Fills a cache and packs it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench prebuild",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", type=Path, default=conductor.ROOT / "prebuilt")
    names = [stage.name for stage in conductor.STAGES]
    parser.add_argument("--stages", default=",".join(names), help="the stages to compile for")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="stages at once")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "cache")
        (folder / LAUNCHERS).mkdir(parents=True)
        failed = fill(folder, options.stages.split(","), options.jobs)
        if failed:
            print(f"prebuild: these stages failed: {', '.join(failed)}")
            return 1
        kernels = pack(folder, options.folder)
    size = (options.folder / PACK).stat().st_size / 2**20
    print(
        f"{kernels} kernels, {size:.1f} MiB in {options.folder}, {time.monotonic() - begin:.0f} s"
    )
    if size > LIMIT_MIB:
        print(f"prebuild: more than {LIMIT_MIB} MiB are slow to copy; name fewer --stages")
    return int(size > LIMIT_MIB)


def fill(folder: Path, stages: list[str], jobs: int) -> list[str]:
    """Runs stages dry, `jobs` at a time; returns the names of those that failed."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_STORE_BINARY_ONLY": "1",
        "HYBRID_KERNELS_TUNING": str(folder / "none.json"),
        "BENCH_PREBUILT": str(folder),
        "BENCH_PEERS": str(folder),
    }
    waiting, running, failed = list(stages), {}, list[str]()
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            results, log = folder / "results.jsonl", (folder / f"{name}.log").open("w+")
            command = [sys.executable, "-m", "bench.gpu.stages", name, str(results)]
            command += ["--dry-run", "--compile"]
            process = subprocess.Popen(
                command, cwd=conductor.ROOT, env=environment, stdout=log, stderr=log
            )
            running[name] = log, process
        time.sleep(0.2)
        for name, (log, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            print(f"  {name}: status {process.returncode}", flush=True)
            if process.returncode:
                failed.append(name)
                log.seek(0)
                print(log.read()[-3000:])
            log.close()
    return failed


@contextlib.contextmanager
def recorded_keys() -> Iterator[None]:
    """Records the parts of each cache key, and the source of each kernel's launcher."""
    folder, original = Path(cache.knobs.cache.dir), compiler.get_cache_key

    def recorded(source: Any, backend: Any, options: Any, env_vars: Any) -> str:
        key = original(source, backend, options, env_vars)
        parts = {"name": _name(key), "source": source.hash(), "options": options.hash()}
        with (folder / KEYS).open("a") as file:
            file.write(json.dumps({**parts, "kernel": source.name}) + "\n")
        code = _launcher_source(source)
        if code is not None:
            digest = hashlib.sha256(code.encode()).hexdigest()
            (folder / LAUNCHERS / f"{digest}.c").write_text(code)
        return key

    with mock.patch.object(compiler, "get_cache_key", recorded):
        yield


def _launcher_source(source: Any) -> str | None:
    """The C source of a kernel's launcher; None if this Triton compiles no launchers."""
    make = getattr(importlib.import_module(NVIDIA), "make_launcher", None)
    return None if make is None else make(source.constants, source.signature, None)


def pack(folder: Path, target: Path) -> int:
    """Packs the cache, with a description for `unpack`; returns the number of kernels."""
    keys = {}
    for line in (folder / KEYS).read_text().splitlines():
        entry = json.loads(line)
        keys[entry["name"]] = entry
    target.mkdir(parents=True, exist_ok=True)
    (target / conductor.ABOUT).unlink(missing_ok=True)  # else `commit` could return an older one
    with tarfile.open(target / PACK, "w:xz") as archive:
        for name in sorted(keys):
            archive.add(folder / name, name)
        archive.add(folder / LAUNCHERS, LAUNCHERS)
    about = {
        "triton": triton.__version__,
        "commit": conductor.commit(target),
        "sources": conductor.sources(),
        "kernels": list(keys.values()),
    }
    (target / conductor.ABOUT).write_text(json.dumps(about))
    return len(keys)


def unpack(folder: Path) -> str:
    """Copies packed kernels into this Triton's cache, under its names; returns what it did."""
    if not (folder / PACK).exists():
        return f"there is no {PACK} in {folder}"
    about = json.loads((folder / conductor.ABOUT).read_text())
    if about["triton"] != triton.__version__:
        return f"made with Triton {about['triton']}, of no use to {triton.__version__}"
    cached = Path(cache.knobs.cache.dir)
    backend = compiler.make_backend(TARGET)
    env_vars = compiler.get_cache_invalidating_env_vars()
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(folder / PACK) as archive:
            archive.extractall(temporary, filter="data")
        for entry in about["kernels"]:
            key = compiler.get_cache_key(
                _Hashed(entry["source"]), backend, _Hashed(entry["options"]), env_vars
            )
            target = cached / _name(key)
            shutil.copytree(Path(temporary, entry["name"]), target, dirs_exist_ok=True)
            for group in target.glob("__grp__*"):
                content = json.loads(group.read_text())
                paths = content["child_paths"]
                content["child_paths"] = {n: str(target / Path(p).name) for n, p in paths.items()}
                group.write_text(json.dumps(content))
        shutil.copytree(Path(temporary, LAUNCHERS), cached / LAUNCHERS, dirs_exist_ok=True)
    same = about["sources"] == conductor.sources()
    note = "" if same else ", from OTHER SOURCES (some will be missed)"
    return f"{len(about['kernels'])} kernels, for {cache.triton_key()[:16]}{note}"


class _Hashed:
    """Replaces an object that Triton only asks for its hash."""

    def __init__(self, digest: str) -> None:
        self.digest = digest

    def hash(self) -> str:
        return self.digest


def _name(key: str) -> str:
    """The name of a cache entry's folder in Triton."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    return base64.b32encode(bytes.fromhex(digest)).decode().rstrip("=")


def build_launchers() -> str:
    """Compiles the launchers in parallel into this Triton's cache; returns what it did."""
    begin = time.monotonic()
    folder = Path(cache.knobs.cache.dir, LAUNCHERS)
    sources = [path.read_text() for path in sorted(folder.glob("*.c"))]
    active: Any = driver.active
    _ = active.utils  # compiles what all launchers share, before the pool needs it
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        built = sum(pool.map(_build, sources))
    return f"{built} of {len(sources)} in {time.monotonic() - begin:.1f} s"


def _build(code: str) -> bool:
    nvidia: Any = importlib.import_module(NVIDIA)
    try:
        build.compile_module_from_src(
            code,
            "__triton_launcher",
            library_dirs=nvidia.library_dirs(),
            include_dirs=nvidia.include_dirs,
            libraries=nvidia.libraries,
        )
    except Exception as error:  # Triton will compile it at the first launch
        print(f"launcher: {error!r}")
        return False
    return True
