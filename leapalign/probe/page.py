"""The page of a probe: what climbing made of each picture, and how the figures moved."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from leapalign.probe.climb import CLIMBED, HELD_OUT, Climb, changes, verdict
from leapalign.reports.pages import image, table, themed_image, write_page
from leapalign.reports.pictures import Curve, chart, to_picture

SHOWN = 48
"""Images on the page: the first ones."""


def figures(climbs: Sequence[Climb]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the mean of each figure before, and at each look, the change at the last with its interval."""
    found = changes(climbs)
    header = ["mean over the images", *(f"{climb.steps} steps" for climb in climbs), "change [95 % interval]"]
    rows = [
        [name, *(f"{climb.values[name].mean():.3f}" for climb in climbs), str(found[name][-1])]
        for name in climbs[0].values
    ]
    return header, rows


def write_probe(folder: Path, climbs: Sequence[Climb], prompts: Sequence[str]) -> Path:
    """Writes pictures and ``index.html`` into the new ``folder``; returns the page."""
    (folder / "images").mkdir(parents=True)
    for climb in climbs:
        for number, picture in enumerate(climb.images[:SHOWN]):
            to_picture(picture, picture.shape[-1]).save(folder / _picture(number, climb.steps))
    rewards = [name for name in climbs[0].values if name.startswith((CLIMBED, HELD_OUT))]
    steps = [float(climb.steps) for climb in climbs]
    curves = [Curve(name, steps, [float(c.values[name].mean()) for c in climbs], raw=False) for name in rewards]
    for name, dark in (("rewards.png", False), ("rewards_dark.png", True)):
        chart(curves, folder / name, "step", dark)
    shown = prompts[:SHOWN]
    heading = "Pictures" if len(shown) == len(prompts) else f"Pictures: the first {len(shown)} of {len(prompts)}"
    page = folder / "index.html"
    write_page(
        page,
        "Where the reward's gradient leads",
        [
            (verdict(climbs), themed_image("rewards.png", "rewards_dark.png", "rewards over the steps")),
            (heading, "".join(_row(number, prompt, climbs, rewards) for number, prompt in enumerate(shown))),
            (
                "Figures",
                table(*figures(climbs))
                + '<p class="note">Generated latents moved up the gradient of the reward, through the decoder, without '
                "the model. drift: how far from where they began, norm: how long they are, both in lengths of the "
                "generated ones. What a training run follows is the same gradient: a picture that gets texture here "
                "gets it there.</p>",
            ),
        ],
    )
    return page


def _row(number: int, prompt: str, climbs: Sequence[Climb], rewards: Sequence[str]) -> str:
    shown = "".join(
        f"<figure>{image(_picture(number, climb.steps), f'{prompt}, after {climb.steps} steps')}<figcaption>"
        f"{climb.steps} steps: {', '.join(f'{name} {climb.values[name][number]:.3f}' for name in rewards)}"
        "</figcaption></figure>"
        for climb in climbs
    )
    return f'<h3>{html.escape(prompt)}</h3><div class="pair">{shown}</div>'


def _picture(number: int, steps: int) -> str:
    """Where an image lies, relative to the page."""
    return f"images/{number:03d}-{steps:03d}.png"
