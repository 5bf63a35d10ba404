"""Shows a demo's result: a table in the terminal, and pictures and a page in the run folder."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from leapalign.reports.pages import inline_image, table, themed_image, write_page
from leapalign.reports.pictures import Curve, before_after_grid, chart, to_picture
from leapalign.runs.run_folder import read_metrics
from leapalign.tiny.demo import HELD_OUT_REWARD, REWARD, Comparison, Pair
from leapalign.tiny.evaluate import Evaluation
from leapalign.tiny.world import FAMILIES
from leapalign.watch.records import read_watch

ARROW = " \N{RIGHTWARDS ARROW} "
HEADER = ("", "before", "after", "control")
ASKED = {
    "single": "one object of a shape",
    "two": "two shapes together",
    "counting": "so many of a shape",
    "colors": "a shape in a colour",
    "position": "one shape beside, above or below another",
    "attribute": "two shapes, each in its own colour",
}
WATCHED = {
    "held_out_reward": "reward (trained)",
    "held_out_custom": "reward (held out)",
    "saturation": "saturation",
    "sharpness": "sharpness",
    "edge_density": "edge density",
    "diversity": "diversity",
    "drift": "drift",
}


def figures(comparison: Comparison) -> list[list[str]]:
    """Rows of the before/after table: rewards, then exact and lenient accuracy, overall and by family, then looks."""
    arms = (comparison.before, comparison.after, comparison.control)
    rows = [
        ["reward (trained)", *(str(arm.score(REWARD)) for arm in arms)],
        ["reward (held out)", *(str(arm.score(HELD_OUT_REWARD)) for arm in arms)],
    ]
    for rule in ("exact", "lenient"):
        rows.append([f"{rule} accuracy", *(str(arm.accuracy(rule)) for arm in arms)])
        rows += [[f"  {family}", *(f"{arm.accuracy(rule, family).mean:.3f}" for arm in arms)] for family in FAMILIES]
    rows.append(["only known objects", *(str(arm.accuracy("clean")) for arm in arms)])
    rows.append(["tidy: difference to a drawing", *(f"{arm.untidiness().mean:.4f}" for arm in arms)])
    rows.append(["diversity between seeds", *(f"{arm.diversity():.3f}" for arm in arms)])
    return rows


def write_report(comparison: Comparison, run: Path) -> Path:
    """Writes pictures and ``index.html`` into ``run``; returns the page."""
    pairs = comparison.shown
    before_after_grid(
        [pair.before for pair in pairs],
        [pair.after for pair in pairs],
        [pair.prompt.text for pair in pairs],
        [(pair.right_before, pair.right_after) for pair in pairs],
    ).save(run / "before_after.png")
    images = len(comparison.before.prompts)
    page = run / "index.html"
    write_page(
        page,
        "LeapAlign on the tiny world",
        [
            ("What happened", _introduction(comparison, run)),
            ("Before and after", _grid(pairs)),
            ("Family by family", _families(comparison)),
            ("While it trained", _curves(run)),
            ("Is the reward being cheated?", _watch(run)),
            (
                "All figures",
                table(HEADER, figures(comparison))
                + f'<p class="note">{images} held-out prompt and noise pairs, the same in every column; mean and 95 % '
                "interval over images. Exact: nothing missing, nothing extra. Lenient: the objects named are there "
                "(GenEval's rule). Tidy: mean absolute difference to a drawing of what is in the picture, 0 to 1. "
                f"Control: {comparison.seconds:.0f} s of training without a reward, as long as the training with "
                "it.</p>",
            ),
        ],
    )
    return page


def _introduction(comparison: Comparison, run: Path) -> str:
    before, after, control = comparison.before, comparison.after, comparison.control
    iterations = len(read_metrics(run))
    alone = f"without a reward, as long: {control.accuracy().mean:.0%}"
    cards = [
        _card("right pictures", f"{before.accuracy().mean:.0%}", f"{after.accuracy().mean:.0%}", alone),
        *(
            _card(title, f"{before.score(name).mean:.2f}", f"{after.score(name).mean:.2f}", note)
            for title, name, note in (
                ("reward", REWARD, "what the training climbs"),
                ("another reward", HELD_OUT_REWARD, "never trained on"),
            )
        ),
        _card(
            "tidiness",
            f"{before.untidiness().mean:.4f}",
            f"{after.untidiness().mean:.4f}",
            "difference to a clean drawing",
        ),
    ]
    return (
        "<p>A tiny image model draws coloured shapes from a caption. Many of the captions that it learned from were "
        "wrong, so it draws cleanly and often misreads what it is asked for. LeapAlign then trained it for "
        f"{iterations} iterations, {comparison.seconds:.0f} seconds, with the gradient of a reward: a small network "
        "that scores how well a picture fits its prompt. The prompts below were not among those it trained on.</p>"
        f'<div class="tiles">{"".join(cards)}</div>'
    )


def _card(title: str, before: str, after: str, note: str) -> str:
    return f'<div class="card">{title}<br><b>{before} → {after}</b><br><span class="note">{note}</span></div>'


def _grid(pairs: Sequence[Pair]) -> str:
    right = [sum(pair.right_before for pair in pairs), sum(pair.right_after for pair in pairs)]
    parts = [
        f"<p>Left before, right after, from the same noise: {right[0]} of {len(pairs)} right before, {right[1]} after. "
        f"The first {len(pairs) // len(FAMILIES)} of each family, not the best ones. A green outline is exactly what "
        "was asked for, nothing missing and nothing extra; a green ground has become right, a red one wrong.</p>"
    ]
    for family in FAMILIES:
        tiles = "".join(_tile(pair) for pair in pairs if pair.prompt.family == family)
        parts.append(f'<h3>{family}: {ASKED[family]}</h3><div class="tiles">{tiles}</div>')
    return "".join(parts)


def _tile(pair: Pair) -> str:
    change = {1: "gain", -1: "loss"}.get(pair.right_after - pair.right_before, "")
    shown = "".join(
        f"<figure>{inline_image(to_picture(image, image.shape[-1]), when, _outline(right))}</figure>"
        for when, image, right in (
            ("before", pair.before, pair.right_before),
            ("after", pair.after, pair.right_after),
        )
    )
    caption = html.escape(pair.prompt.text)
    return f'<div class="card {change}"><div class="pair">{shown}</div>{caption}</div>'


def _outline(right: bool) -> str:
    return "pixels right" if right else "pixels wrong"


def _families(comparison: Comparison) -> str:
    def bar(arm: Evaluation, name: str, family: str) -> str:
        share = arm.accuracy("exact", family).mean
        return (
            f'<div class="bar"><span>{name}</span><i class="{name}" style="width: {50 * share:.1f}%"></i>'
            f"{share:.0%}</div>"
        )

    arms = (("before", comparison.before), ("after", comparison.after), ("control", comparison.control))
    parts = [
        f"<div><h3>{family}</h3>{''.join(bar(arm, name, family) for name, arm in arms)}</div>" for family in FAMILIES
    ]
    return f'<p>The share of pictures that are exactly right.</p><div class="wide">{"".join(parts)}</div>'


def _curves(run: Path) -> str:
    records, watched = read_metrics(run), read_watch(run)
    steps = [record["iteration"] for record in records]

    def course(*names: str) -> list[Curve]:
        return [Curve(name, steps, [record[name] for record in records]) for name in names if name in records[0]]

    at = [record["iteration"] for record in watched]
    held_out = [
        Curve(label, at, [record[name] for record in watched], raw=False)
        for name, label in list(WATCHED.items())[:2]
        if watched and name in watched[0]
    ]
    charts = {
        "reward": (course("reward"), "The reward of the pictures that were trained on."),
        "held_out": (held_out, "Both rewards on prompts that were not trained on, by the weight average."),
        "grad_norm": (course("grad_norm"), "The length of the gradient, before it is clipped."),
        "distances": (
            course("d_j", "d_end"),
            "How far a leap misses the real trajectory. A leap goes from one noise level straight to another, instead "
            "of step by step: d_j is the distance to where the trajectory really was when it lands half way, d_end "
            "that to the picture that it really ended in. The larger they are, the less a leap counts.",
        ),
    }
    parts = []
    for name, (curves, caption) in charts.items():
        if not curves:
            continue
        light, dark = f"curve_{name}.png", f"curve_{name}_dark.png"
        chart(curves, run / light)
        chart(curves, run / dark, dark=True)
        parts.append(
            f"<figure>{themed_image(light, dark, f'{name} over the iterations')}"
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f'<p>Faint: each iteration. Strong: its smoothed course.</p><div class="wide">{"".join(parts)}</div>'


def _watch(run: Path) -> str:
    records = read_watch(run)
    if not records:
        return "<p>The watch was off: set watch.every.</p>"
    rows = [
        [label, *(f"{record[name]:.3f}" for record in records)] for name, label in WATCHED.items() if name in records[0]
    ]
    return (
        "<p>A reward can rise while pictures get worse: stronger colours, texture, the same picture for every seed. "
        "The watch measures held-out prompts on the way. Good signs: the held-out reward rises too; sharpness, edges "
        "and diversity stay. Drift is how far the pictures have moved from what they were.</p>"
        + table(("iteration", *(f"{record['iteration']:.0f}" for record in records)), rows)
    )
