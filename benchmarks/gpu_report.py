"""Everything that waits for a GPU, in one go: what passes, how fast it is, and whether the computed figures were right.

    python -m benchmarks.gpu_report --profile configs/flux1_dev/80gb.yaml

Writes gpu_report.json after each part, and prints it as Markdown at the end. A part that fails says so, and the others
go on. What commands print, such as the tests, lies beside the report in a log of its own. The step of the profile's
size has random weights, so that nothing is downloaded; it is left out where its memory would not suffice.

    python -m benchmarks.gpu_report --parts large kernels --budget 1500

adds these parts to the report that is there, and begins none after 1500 seconds. `--dry-run` runs every part on the CPU
with tiny shapes: it shows that the report works, and no figure in it is a GPU's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from leap_kernels.tools.report import provenance

from benchmarks.gpu_blocks import MODELS, block_table, measured_blocks
from benchmarks.gpu_measures import bandwidth, free_memory, large_step, measured_step
from benchmarks.tables import RESULTS, markdown
from leapalign.cli.doctor import diagnose
from leapalign.config import load_config
from leapalign.inputs.paths import path_argument
from leapalign.inputs.validation import UserError, brief, did_you_mean
from leapalign.planning.simulate import gib
from leapalign.storage.durable import make_folder, write_text

ROOT = Path(__file__).parents[1]
TINY, PROFILE = ROOT / "configs" / "tiny.yaml", ROOT / "configs" / "flux1_dev" / "80gb.yaml"
ON_DEVICE = ("optimizer.name=adamw_8bit", "rollout.batch_size=8", "memory.checkpointing=blocks")
ON_HOST = (*ON_DEVICE, "memory.optimizer=host")
PLACES = {"device": ON_DEVICE, "host": ON_HOST, "streamed": (*ON_HOST, "memory.weights=streamed")}

MOST_COPIED = 1 << 30
"""Bytes of a copy whose rate is measured, or an eighth of the device's free memory if that is less."""
DRY_SIZES = ("rollout.num_steps=3", "rollout.batch_size=2", "train.batch_size=4", "threshold=2.0")
DRY = "dry run on a CPU with tiny shapes: no figure here is a GPU's"

Part = Callable[[], Any]


def parts(device: torch.device, profile: Path, output: Path, dry: bool = False) -> dict[str, Part]:
    """What the report in the file ``output`` consists of, by name; with tiny shapes in a ``dry`` run."""
    tiny = {
        f"tiny_{place}": partial(_tiny_step, (*asked, *DRY_SIZES) if dry else asked, device)
        for place, asked in PLACES.items()
    }
    large = partial(load_config, TINY, DRY_SIZES) if dry else partial(load_config, profile)
    logs = {name: output.with_name(f"{output.stem}.{name}.log") for name in ("tests", "kernels")}
    tests = ("-m", "pytest", "-m", "cuda", "--no-header", "-p", "no:cacheprovider")
    bench = ("-m", "leap_kernels", "bench", "--json", *(("--quick", "--op", "ema_update_") if dry else ()))
    return {
        "machine": diagnose,
        "tests": lambda: command(logs["tests"], *tests, *(("kernels/tests/test_cuda.py",) if dry else ()))[-1],
        "bandwidth": lambda: bandwidth(device, 1 << 20 if dry else min(MOST_COPIED, free_memory(device) // 8)),
        **tiny,
        "large": lambda: large_step(large(), device),
        **{f"blocks_{name}": partial(measured_blocks, name, device, dry) for name in MODELS},
        "kernels": lambda: [json.loads(line) for line in command(logs["kernels"], *bench) if line.startswith("{")],
    }


def _tiny_step(asked: tuple[str, ...], device: torch.device) -> dict[str, Any]:
    return measured_step(load_config(TINY, asked), device)


def assembled(
    chosen: dict[str, Part], output: Path, report: dict[str, Any], budget: float = math.inf
) -> dict[str, Any]:
    """``report`` with each part's result, or what it raised; written to ``output`` after each.

    ``budget``: seconds after which no part begins; what the report then holds of it stays. A part's `seconds` are how
    long it took. Raises UserError where ``output`` cannot be written, before any part begins.
    """
    make_folder(output.parent)
    write_text(output, json.dumps(report, indent=2) + "\n")
    begin = time.perf_counter()
    for name, part in chosen.items():
        at = time.perf_counter()
        if at - begin >= budget:
            report.setdefault(name, {"skipped": f"the budget of {budget:.0f} s was spent", "seconds": 0.0})
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            report[name] = {**_outcome(part), "seconds": time.perf_counter() - at}
        write_text(output, json.dumps(report, indent=2) + "\n")
    return report


def _outcome(part: Part) -> dict[str, Any]:
    try:
        return {"result": json.loads(json.dumps(part()))}
    except Exception as error:  # one part's failure is a finding, and the rest are wanted
        return {"failed": f"{type(error).__name__}: {brief(error)}", "traceback": traceback.format_exc()}
    finally:
        gc.collect()
        with contextlib.suppress(RuntimeError):  # a GPU that an error has stopped frees nothing
            torch.cuda.empty_cache()  # does nothing without a GPU


def begun(output: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The report that ``output`` holds, to be added to, or a new one.

    Raises UserError where it holds something else, or figures of other software or of another device.
    """
    if not output.exists():
        return {"about": about}
    try:
        report = json.loads(output.read_text())
        same = report["about"] == about
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"'{output}' is no GPU report; name another --output") from None
    if not same:
        raise UserError(f"'{output}' is of other software or another device; name another --output")
    return dict(report)


def command(log: Path, *arguments: str) -> list[str]:
    """The lines that a Python command prints, which go to the file ``log`` as they come.

    Raises RuntimeError with the last of them where it fails.
    """
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    printed = log.read_text(errors="replace").strip()
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}, see {log.name}: {printed[-100:]}")
    return printed.splitlines() or [""]


def page(report: dict[str, Any]) -> str:
    """The report in Markdown; steps stage by stage, blocks in columns, the rest as it is but for its length."""
    lines = ["# GPU report", "", ", ".join(f"{key} {value}" for key, value in report["about"].items())]
    for name, part in list(report.items())[1:]:
        lines += ["", f"## {name} ({part['seconds']:.0f} s)", ""]
        result = part.get("result")
        if "failed" in part:
            lines.append(f"**Failed.** {part['failed']}")
        elif "skipped" in part:
            lines.append(f"**Skipped:** {part['skipped']}.")
        elif isinstance(result, dict) and "peak_bytes_simulated" in result:
            lines.append(_stages(result))
        elif name.startswith("blocks_"):
            lines.append(block_table(result))
        else:
            lines.append(f"```\n{(result if isinstance(result, str) else json.dumps(result))[:2000]}\n```")
    return "\n".join(lines)


def _stages(step: dict[str, Any]) -> str:
    computed = step["seconds_computed"] or {}

    def row(stage: str, seconds: float) -> list[str]:
        ideal = computed.get(stage)
        peaks = [step[key].get(stage) for key in ("peak_bytes", "peak_bytes_reserved", "peak_bytes_simulated")]
        cells = [f"{ideal['compute']:.2f} / {ideal['transfer']:.2f}" if ideal else "-"]
        return [stage, f"{seconds:.2f}", *cells, *("-" if size is None else f"{gib(size)}" for size in peaks)]

    rows = [row(*item) for item in step["seconds"].items()]
    header = ["stage", "s measured", "s computed: compute / transfer", "GiB measured", "GiB reserved", "GiB simulated"]
    return f"{markdown(header, rows)}\n\nReserved by simulation: {gib(step['bytes_reserved_simulated'])} GiB."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("profile", PROFILE), ("output", Path("gpu_report.json"))):
        parser.add_argument(f"--{name}", type=path_argument, default=default)
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these, added to the report that is there")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="after them no part begins")
    parser.add_argument("--dry-run", action="store_true", help="every part on the CPU with tiny shapes")
    try:
        report = _reported(parser.parse_args())
    except UserError as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        return 2
    print(page(report))
    return 0


def _reported(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raises UserError without a GPU, and for what cannot be asked for."""
    dry, output = arguments.dry_run, arguments.output.absolute()
    if dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the commands
        if output.resolve().is_relative_to(RESULTS):
            raise UserError(f"a dry run has no figures to keep in '{RESULTS}'; name another --output")
    elif not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU here; run this on a machine that has one, or try --dry-run")
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    chosen = parts(device, arguments.profile, output, dry)
    for name in arguments.parts or ():
        if name not in chosen:
            raise UserError(f"there is no part {name!r}{did_you_mean(name, chosen)}")
    about = {**provenance(), "device": DRY if dry else torch.cuda.get_device_name(device)}
    report = begun(output, about) if arguments.parts else {"about": about}
    chosen = {name: part for name, part in chosen.items() if not arguments.parts or name in arguments.parts}
    return assembled(chosen, output, report, arguments.budget)


if __name__ == "__main__":
    sys.exit(main())
