"""A folder with a page that shows, prompt by prompt, the base's image left and the run's right."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from leapalign.evaluation.evaluate import RUN, Scores, figures, summary
from leapalign.inputs.validation import UserError
from leapalign.reports.pages import image, table, write_page
from leapalign.reports.pictures import to_picture

SHOWN = 200
"""Prompts on the page: the first ones."""


class EvaluationPage:
    """The new folder ``folder``. Raises UserError where it exists."""

    def __init__(self, folder: Path) -> None:
        if folder.exists():
            raise UserError(f"'{folder}' already exists; choose another --page")
        self.folder = folder

    def keep(self, arm: str, number: int, images: Tensor) -> None:
        """Saves those of ``images (B, 3, H, W)`` that are shown; the first one has ``number``."""
        for position, picture in enumerate(images[: max(SHOWN - number, 0)], start=number):
            path = self.folder / _picture(arm, position)
            path.parent.mkdir(parents=True, exist_ok=True)
            to_picture(picture, picture.shape[-1]).save(path)

    def write(self, prompts: Sequence[str], scores: Scores, sampling: str) -> Path:
        """Writes and returns ``index.html``; the images must have been kept before, sampled as ``sampling`` says."""
        note = f"{len(prompts)} images, {sampling}; the same prompts and noise in every column."
        if RUN in scores:
            note += " Difference: run minus base, image by image."
        shown = prompts[:SHOWN]
        heading = "Images" if len(shown) == len(prompts) else f"Images: the first {len(shown)} of {len(prompts)}"
        pairs = "".join(_pair(number, prompt, scores) for number, prompt in enumerate(shown))
        page = self.folder / "index.html"
        mean = table(*figures(summary(scores))) + f'<p class="note">{note}</p>'
        write_page(page, "Evaluation", [("Rewards", mean), (heading, pairs)])
        return page


def _pair(number: int, prompt: str, scores: Scores) -> str:
    shown = "".join(
        f"<figure>{image(_picture(arm, number), f'{arm}: {prompt}')}<figcaption>{html.escape(_caption(arm, values))}"
        "</figcaption></figure>"
        for arm, values in ((arm, {name: of[number] for name, of in scores[arm].items()}) for arm in scores)
    )
    return f'<h3>{html.escape(prompt)}</h3><div class="pair">{shown}</div>'


def _caption(arm: str, values: dict[str, float]) -> str:
    return f"{arm}: {', '.join(f'{name} {value:.3f}' for name, value in values.items())}"


def _picture(arm: str, number: int) -> str:
    """Where an image lies, relative to the page."""
    return f"{arm}/{number:05d}.png"
