"""Write the tables of a document from the JSON lines in benchmarks/results.

    python benchmarks/tables.py kernels/README.md

A table stands between `<!-- table: NAME -->` and `<!-- end -->` and comes from NAME.jsonl; text around it is kept.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PROFILES = ("80gb", "80gb_1024px", "48gb", "24gb", "16gb")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

Line = dict[str, Any]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def audit_table(lines: list[Line]) -> str:
    """Return a row for each kernel, in the dtype that comes first, with the targets beside each other."""
    kernels: dict[str, dict[str, Line]] = {}
    for line in lines:
        kernels.setdefault(line["kernel"], {}).setdefault(line["target"], line)
    rows = []
    for kernel, on in kernels.items():
        targets = [on[target] for target in TARGETS]
        nvidia = [line for line in targets if line["bytes_per_element"] is not None]
        ratios = [line["bytes_ratio"] for line in nvidia if line["bytes_ratio"] is not None]
        roundings = {
            "stochastic" if name in line["rounded_stochastically"] else how
            for line in nvidia
            for name, how in line["roundings"].items()
        }
        rows.append(
            [
                f"`{kernel}`",
                *(_each(line[key] for line in targets) for key in ("registers", "spills", "vector_bits")),
                _each(line["shared_bytes"] for line in targets),
                _each(f"{line['bytes_per_element']:.3f}" for line in nvidia),
                str(targets[0]["least_bytes_per_element"]),
                f"{max(ratios):.4f}" if ratios else "-",
                ", ".join(sorted(roundings)) or "-",
                _each(f"{line['occupancy']:.0%}" for line in targets),
                _each(f"{line['roofline']['microseconds']:.0f}" if line["roofline"] else "-" for line in targets),
            ]
        )
    gpus = " / ".join(f"{kernels[lines[0]['kernel']][target]['roofline']['gpu']}" for target in TARGETS)
    header = [
        "kernel",
        "registers",
        "spills",
        "vector bits",
        "shared bytes",
        "bytes an element",
        "least",
        "worst ratio",
        "rounding",
    ]
    versions = f"Triton {lines[0]['triton']}, revision {_revisions(lines)}"
    note = f"{versions}; columns with several values: {' / '.join(TARGETS)}, one value where all agree."
    return f"{note}\n\n{markdown([*header, 'occupancy', f'us, computed: {gpus}'], rows)}"


def bench_table(lines: list[Line]) -> str:
    """Return a row for each op, size and pass, with the variants beside each other."""
    first = lines[0]
    runs: dict[tuple[str, str, str], dict[str, Line]] = {}
    for line in lines:
        if line["pass"] in ("forward", "backward"):
            runs.setdefault((line["case"], line["size"], line["pass"]), {})[line["variant"]] = line
    rows = []
    for (case, size, direction), variants in runs.items():
        ours = variants.get("native") or variants.get("triton")
        row = [f"`{case}`", size, direction, *(_milliseconds(variants.get(name)) for name in ("eager", "compile"))]
        rows.append([*row, _milliseconds(ours), *_compared(ours)])
    header = ["op", "latents", "pass", "eager ms", "compile ms", "native ms", "faster than eager", "than compile"]
    note = (
        f"{first['device']}, threads: {first['threads']}, PyTorch {first['torch']}, revision {_revisions(lines)}, "
        f"{first['dtype']}; medians of {first['repeats']}, quartiles in brackets."
    )
    return f"{note}\n\n{markdown([*header, 'GB/s', 'of copy', 'of clone', 'error', 'peak MB'], rows)}"


def gradient_agreement_table(lines: list[Line]) -> str:
    """Return a row for each method, with the bands of noise levels beside each other."""
    bands = sorted({tuple(line["sigma"]) for line in lines}, key=lambda band: (band == (0.0, 1.0), band))
    methods: dict[str, dict[tuple[float, ...], Line]] = {}
    for line in lines:
        options = ", ".join(f"{key} {value}" for key, value in line["options"].items())
        methods.setdefault(f"`{line['method']}`{' ' * bool(options)}{options}", {})[tuple(line["sigma"])] = line
    rows = [
        [name, *(_cosine(of.get(band)) for band in bands), f"{of[0.0, 1.0]['norm_ratio']:.2f}"]
        for name, of in methods.items()
    ]
    first = lines[0]
    note = (
        f"{first['rollouts']} rollouts of {first['batch_size']} images, {first['num_steps']} steps, revision "
        f"{_revisions(lines)}; cosines as mean ± standard error (number of draws)."
    )
    header = [f"sigma {low:g} to {high:g}" if (low, high) != (0.0, 1.0) else "all" for low, high in bands]
    return f"{note}\n\n{markdown(['method', *header, 'norm ratio'], rows)}"


def families_table(lines: list[Line]) -> str:
    """Return a row for each model, with its profiles beside each other."""
    models: dict[str, dict[str, Line]] = {}
    for line in lines:
        folder, profile = line["profile"].split("/")
        models.setdefault(folder, {})[profile] = line
    rows = []
    for folder, profiles in models.items():
        weights = next(iter(profiles.values()))["trainable_parameters"] / 1e9
        rows.append([f"`{folder}`", f"{weights:.1f}", *(_needs(profiles.get(name)) for name in PROFILES)])
    return markdown(["folder in `configs`", "weights, billions", *(f"`{name}`" for name in PROFILES)], rows)


def block_traffic_table(lines: list[Line]) -> str:
    """Return a row for each kind of block and code, and for all blocks of the model; MB, and shares of eager."""
    of_all: dict[str, Line] = {}
    for line in lines:
        total = of_all.setdefault(line["code"], {"blocks": 0, "saved": 0, "forward": Counter(), "backward": Counter()})
        total["blocks"] += line["in_flux"]
        total["saved"] += line["in_flux"] * line["saved"]
        for way in ("forward", "backward"):
            total[way].update({kind: line["in_flux"] * line[way][kind] for kind in ("products", "rest")})
    found = [*lines, *({"block": f"all {of['blocks']}", "code": code, **of} for code, of in of_all.items())]
    eager = {line["block"]: line for line in found if line["code"] == "eager"}
    rows = []
    for line in found:
        rest, saved = _rest(line), line["saved"]
        base = eager[line["block"]]
        moved = [line["forward"]["rest"], line["backward"]["rest"], rest]
        products = line["forward"]["products"] + line["backward"]["products"]
        rows.append(
            [
                *(line["block"], line["code"], *(f"{size / 1e6:,.0f}" for size in moved), f"{rest / _rest(base):.2f}"),
                *(f"{products / 1e6:,.0f}", f"{saved / 1e6:,.0f}", f"{saved / base['saved']:.2f}"),
            ]
        )
    header = ["block", "code", "forward", "backward", "both", "of eager", "products, both", "saved", "of eager"]
    return markdown(header, rows)


def _rest(line: Line) -> int:
    return int(line["forward"]["rest"] + line["backward"]["rest"])


def _needs(line: Line | None) -> str:
    if line is None:
        return "-"
    device, host = (line[f"{side}_peak_bytes"] / 2**30 for side in ("device", "host"))
    return f"{line['height']}: {device:.1f} + {host:.1f}"


def _cosine(line: Line | None) -> str:
    if line is None:
        return "-"
    error = "" if line["cosine_error"] is None else f" ± {line['cosine_error']:.2f}"
    return f"{line['cosine']:.2f}{error} ({line['count']})"


def _revisions(lines: list[Line]) -> str:
    return " and ".join(sorted({str(line["revision"]) for line in lines}))


def _milliseconds(line: Line | None) -> str:
    if line is None:
        return "-"
    low, median, high = line["milliseconds"]
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def _compared(line: Line | None) -> list[str]:
    if line is None:
        return ["-"] * 7
    faster = [line["times_faster_than"].get(name) for name in ("eager", "compile")]
    rate, shares = line["gigabytes_per_second"], [line["share_of_copy_rate"], line["share_of_clone_rate"]]
    return [
        *("-" if ratio is None else f"{ratio:.1f}x" for ratio in faster),
        "-" if rate is None else f"{rate:.1f}",
        *("-" if share is None else f"{share:.0%}" for share in shares),
        f"{line['error']:.0e}",
        f"{line['peak_bytes'] / 1e6:.1f}",
    ]


def _each(values: Any) -> str:
    """Join values with slashes, or give the one that all of them are."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


TABLES = {
    "audit": audit_table,
    "bench": bench_table,
    "block_traffic": block_traffic_table,
    "families": families_table,
    "gradient_agreement": gradient_agreement_table,
}


def filled(document: str, results: Path = RESULTS) -> str:
    """Return the document with every table written anew from its JSON lines."""

    def table(found: re.Match[str]) -> str:
        name = found["name"]
        lines = [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]
        return f"<!-- table: {name} -->\n{TABLES[name](lines)}\n<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>\w+) -->\n.*?<!-- end -->", table, document, flags=re.S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path)
    path = parser.parse_args().document
    path.write_text(filled(path.read_text()))
