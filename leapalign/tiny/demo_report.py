"""Shows a demo's result: a table in the terminal, and pictures and a page in the run folder."""

from __future__ import annotations

from pathlib import Path

from leapalign.reports.pages import image, table, write_page
from leapalign.reports.pictures import before_after_grid, learning_curve
from leapalign.runs.run_folder import read_metrics
from leapalign.tiny.demo import HELD_OUT_REWARD, REWARD, Comparison
from leapalign.tiny.world import FAMILIES

PAIRS_SHOWN = 24
HEADER = ("", "before", "after", "control")


def figures(comparison: Comparison) -> list[list[str]]:
    """Rows of the before/after table: rewards, then exact and lenient accuracy, overall and by family."""
    arms = (comparison.before, comparison.after, comparison.control)
    rows = [
        ["reward (trained)", *(str(arm.score(REWARD)) for arm in arms)],
        ["reward (held out)", *(str(arm.score(HELD_OUT_REWARD)) for arm in arms)],
    ]
    for rule in ("exact", "lenient"):
        rows.append([f"{rule} accuracy", *(str(arm.accuracy(rule)) for arm in arms)])
        rows += [[f"  {family}", *(f"{arm.accuracy(rule, family).mean:.3f}" for arm in arms)] for family in FAMILIES]
    rows.append(["only known objects", *(str(arm.accuracy("clean")) for arm in arms)])
    return rows


def write_report(comparison: Comparison, run: Path) -> Path:
    """Writes pictures and ``index.html`` into ``run``; returns the page."""
    records = read_metrics(run)
    learning_curve(records, run / "learning_curve.png")
    # Prompts cycle through the families, so the first images show all of them.
    chosen = range(PAIRS_SHOWN)
    before_after_grid(
        comparison.before.images[:PAIRS_SHOWN],
        comparison.after.images[:PAIRS_SHOWN],
        [comparison.before.prompts[i].text for i in chosen],
        [(comparison.before.verdicts[i].exact, comparison.after.verdicts[i].exact) for i in chosen],
    ).save(run / "before_after.png")
    images = len(comparison.before.prompts)
    page = run / "index.html"
    write_page(
        page,
        "LeapAlign on the tiny world",
        [
            ("Before and after", image("before_after.png", "generated images before and after training")),
            (
                "Figures",
                table(HEADER, figures(comparison))
                + f'<p class="note">{images} held-out prompt and noise pairs, the same in every column; mean and 95 % '
                "interval over images. Exact: nothing missing, nothing extra. Lenient: the objects named are there "
                f"(GenEval's rule). Control: {comparison.seconds:.0f} s of training without a reward, as long as the "
                "training with it.</p>",
            ),
            ("Learning curve", image("learning_curve.png", "reward, loss, gradient norm and leap distances")),
            *sample_grids(run, records[-1]["iteration"]),
        ],
    )
    return page


def sample_grids(run: Path, last: float) -> list[tuple[str, str]]:
    """The sample grids before and after training, where there are any."""
    grids = {"first": ("samples/step-0.png", "before"), "last": (f"samples/step-{last:.0f}.png", "after")}
    return [
        (f"Samples, {name}", image(path, f"samples {when} training"))
        for name, (path, when) in grids.items()
        if (run / path).exists()
    ]
