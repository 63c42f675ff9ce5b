"""The scripts of benchmarks/ as modules, run in this process."""

import importlib.util
import sys
from types import ModuleType

from pages import ROOT

FOLDER = ROOT / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


def load(name: str) -> ModuleType:
    """A script by its file: some share their names with modules of the repository."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # for `common`
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module
