"""`list` and `explain`: which ops and kernels there are, and which backend an op would use here, and why."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from .._catalog import OPS
from .._dispatch import explain
from .report import text_table


def add_commands(commands: Any) -> None:
    """Add `list` and `explain` to the command line."""
    for name, execute, purpose in (
        ("list", list_ops, "the ops, their formulas and their Triton kernels"),
        ("explain", explain_ops, "the backend that each op would use on this machine, and why"),
    ):
        parser = commands.add_parser(name, help=purpose)
        parser.add_argument("op", nargs="?", choices=[op.name for op in OPS], metavar="OP", help="only this op")
        parser.add_argument("--json", action="store_true", help="print one JSON object a line")
        parser.set_defaults(execute=execute)


def list_ops(arguments: argparse.Namespace) -> int:
    """Print every op of the catalog, or one."""
    ops = [{"op": op.name, "formula": op.formula, "kernels": [spec.name for spec in op.kernels]} for op in OPS]
    _show(arguments, ops, ("op", "formula", "kernels"))
    return 0


def explain_ops(arguments: argparse.Namespace) -> int:
    """Print what `leap_kernels.explain` says, of every op or of one."""
    ops = [asdict(explanation) for explanation in explain()]
    _show(arguments, ops, ("op", "device", "backend", "reason"))
    return 0


def _show(arguments: argparse.Namespace, ops: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    ops = [op for op in ops if arguments.op in (None, op["op"])]
    if arguments.json:
        for op in ops:
            print(json.dumps(op))
        return
    cells = [[", ".join(op[c]) if isinstance(op[c], list) else op[c] for c in columns] for op in ops]
    print(text_table(columns, cells))
