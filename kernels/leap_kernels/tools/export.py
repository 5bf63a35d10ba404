"""`export`: leap_kernels in the layout of Hugging Face's `kernels`, which loads it from the Hub or from a folder.

The package is plain Python with relative imports, so one copy serves every backend; `build/` holds it ready to load,
`torch-ext/` as the source that kernel-builder takes. The native CPU library is compiled for one kind of machine and is
therefore left out: exported ops compute with PyTorch on the CPU.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from .._catalog import OPS
from .report import ToolError

NAME, MODULE = "leap-kernels", "leap_kernels"
# A major version of the Hub's kind; 0 says that the interface may still change, as the package's own 0.x does.
VERSION = 0
LICENSE = "Apache-2.0"
BACKENDS = ("cpu", "cuda", "rocm")
_ALLOWED = {*sys.stdlib_module_names, "torch", "triton"}

_BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = [{", ".join(f'"{backend}"' for backend in BACKENDS)}]

[torch-noarch]
"""
_FLAKE = """{
  description = "Flake for leap-kernels";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
# Versions of `kernels` that look for a package of the kernel's name find it here.
_FORWARD = '''"""The same module under the kernel's name, for versions of `kernels` that look for it there."""

import importlib.util
import sys
from pathlib import Path

_init = Path(__file__).parent.parent / "__init__.py"
_spec = importlib.util.spec_from_file_location(f"{__name__}_package", _init)
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
globals().update({name: getattr(_module, name) for name in _module.__all__})
__all__ = _module.__all__
'''


def add_commands(commands: Any) -> None:
    """Add `export` to the command line."""
    parser = commands.add_parser("export", help="write a repository that Hugging Face's `kernels` can load")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write it; new or empty")
    parser.set_defaults(execute=run)


def run(arguments: argparse.Namespace) -> int:
    """Export into the folder, and name it."""
    folder = Path(os.path.expanduser(arguments.folder))
    export(folder)
    print(f"{folder}: {NAME} version {VERSION} for {', '.join(BACKENDS)}")
    return 0


def export(folder: Path) -> None:
    """Write the repository into `folder`.

    Raises:
        ToolError: if `folder` holds something, or a module imports what an exported kernel may not.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ToolError(f"'{folder}' is not an empty folder; name a new one.")
    modules = collect(Path(__file__).parent.parent)
    _write(folder / "torch-ext" / MODULE, modules)
    _write(folder, {"build.toml": _BUILD, "flake.nix": _FLAKE, "CARD.md": _card()})
    files = {**modules, f"{MODULE}/__init__.py": _FORWARD}
    for backend in BACKENDS:
        metadata = json.dumps(_metadata(backend, files), indent=2) + "\n"
        _write(folder / "build" / f"torch-{backend}", {**files, "metadata.json": metadata})


def collect(package: Path) -> dict[str, str]:
    """Return the sources of the package's `__init__.py` and of all it imports, by file name.

    Raises:
        ToolError: if one imports anything but the standard library, torch, triton and its own package, relatively.
    """
    found: dict[str, str] = {}
    waiting = ["__init__.py"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = (package / name).read_text()
        for node in ast.walk(ast.parse(found[name])):
            if isinstance(node, ast.ImportFrom) and node.level:
                # Either `from .module import name` or `from . import module`.
                imported = [node.module] if node.module else [alias.name for alias in node.names]
                waiting += [f"{module}.py" for module in imported]
            elif isinstance(node, ast.Import | ast.ImportFrom):
                absolute = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                for module in absolute:
                    if str(module).partition(".")[0] not in _ALLOWED:
                        raise ToolError(
                            f"{name} imports {module}, which an exported kernel may not: import relatively."
                        )
    return dict(sorted(found.items()))


def _metadata(backend: str, files: dict[str, str]) -> dict[str, Any]:
    digests = {name: hashlib.sha256(text.encode()).digest() for name, text in files.items()}
    unique = hashlib.sha256(b"".join(name.encode() + digest for name, digest in digests.items())).hexdigest()[:8]
    return {
        "name": NAME,
        # The name of the imported module, and of the namespace of its ops: two versions can be loaded side by side.
        "id": f"_{MODULE}_{backend}_{unique}",
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


def _card() -> str:
    """Return the model card that the Hub shows."""
    ops = "\n".join(f"- `{op.name}`: `{op.formula}`" for op in OPS)
    return f"""---
library_name: kernels
license: {LICENSE.lower()}
---

# {NAME}

Kernels for trainers that backpropagate rewards through flow-matching samplers: Triton on a GPU, PyTorch on the CPU.

```python
from pathlib import Path

from kernels import get_local_kernel

leap_kernels = get_local_kernel(Path("path/to/this/folder"))
latents, _ = leap_kernels.leap_update(x, velocity, sigma_from, sigma_to)
```

{ops}
"""


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
