"""What a config names as `package.module:name`: somebody's own code, found and hashed. No torch."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from trueup.faults import told
from trueup.records import UserError

CALLABLE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
MODULE = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")


def load_object(spec: str) -> Any:
    """`package.module:name`, looked for beside the current folder too."""
    module, _, name = spec.partition(":")
    loaded = load_module(module, f"'{spec}': ")
    if not hasattr(loaded, name):
        raise UserError(f"'{spec}': module '{module}' has no '{name}'")
    return getattr(loaded, name)


def load_module(module: str, head: str = "") -> ModuleType:
    """A module, looked for beside the current folder too. Raises UserError, beginning with `head`, where it fails."""
    _look_here()
    with told(f"{head}the import of '{module}'"):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(f"{head}no module named '{error.name}' (looked in {Path.cwd()} too)") from None


def module_hash(module: str) -> str:
    """The hash of a module's source, of all files of a package; empty where there is none."""
    _look_here()
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if not spec or not spec.origin or not Path(spec.origin).is_file():
        return ""
    return hash_path(Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin))


def hash_path(path: Path) -> str:
    """The hash of a file's contents, or of all files of a folder with their names (not of Python's caches)."""
    digest = hashlib.sha256()
    files = (
        [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    )
    for file in files:
        digest.update(str(file.relative_to(path) if path.is_dir() else path.name).encode())
        with open(file, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


def _look_here() -> None:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
