"""Aligns flow-matching image models with a differentiable reward."""

from importlib import metadata as _metadata


def _require_kernels_of_one_version() -> None:
    """The distribution leap-kernels, where there is one, is imported in place of the copy that leapalign brings."""
    try:
        ours, theirs = _metadata.version("leapalign"), _metadata.version("leap-kernels")
    except _metadata.PackageNotFoundError:
        return
    if ours != theirs:
        raise ImportError(
            f"leapalign {ours} needs leap-kernels {ours}, and {theirs} is installed: install that version, or remove "
            "leap-kernels (pip uninstall leap-kernels), as leapalign brings its own copy"
        )


_require_kernels_of_one_version()
