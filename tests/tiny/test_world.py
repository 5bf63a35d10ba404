"""The tiny world and its judge: what is rendered is what is judged, and every kind of mistake is seen."""

from __future__ import annotations

import random

import numpy as np
import pytest

from leapalign.prompts.files import read_prompts
from leapalign.storage.embedded import FOLDER
from leapalign.tiny.judge import detect, judge, untidiness
from leapalign.tiny.world import (
    BACKGROUND,
    CELL_SIZE,
    COLORS,
    FAMILIES,
    IMAGE_SIZE,
    SHAPES,
    Placed,
    Prompt,
    Thing,
    all_prompts,
    balanced_prompts,
    draw_scene,
    hard_negative,
    prompts_by_text,
    render,
    split_prompts,
)

LEFT_TOP, RIGHT_TOP, LEFT_BOTTOM, RIGHT_BOTTOM = ((x, y) for y in (16.0, 48.0) for x in (16.0, 48.0))


def scene(*items: tuple[str, tuple[float, float]]) -> np.ndarray:
    """An image from items such as ``("red circle", LEFT_TOP)``."""
    placed = []
    for text, (x, y) in items:
        color, shape = text.split()
        placed.append(Placed(shape, color, x, y))
    return render(placed)


def verdict_of(prompt: str, image: np.ndarray) -> tuple[bool, bool]:
    result = judge(image, prompts_by_text()[prompt])
    return result.exact, result.lenient


@pytest.mark.parametrize("prompt", all_prompts(), ids=lambda prompt: prompt.text)
def test_a_scene_drawn_for_a_prompt_passes_and_its_hard_negative_does_not(prompt: Prompt) -> None:
    rng = random.Random(prompt.text)
    for _ in range(3):
        assert judge(render(draw_scene(prompt, rng)), prompt).exact
        negative = hard_negative(prompt, rng)
        assert negative != prompt
        assert not judge(render(draw_scene(negative, rng)), prompt).exact


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_every_object_is_recognised_through_noise(shape: str, color: str) -> None:
    rng = np.random.default_rng(0)
    image = scene((f"{color} {shape}", RIGHT_BOTTOM))
    noisy = np.clip(image + rng.normal(0, 0.06, image.shape), 0, 1)
    for picture in (image, noisy):
        found = detect(picture)
        assert found.unrecognised == 0
        (item,) = found.objects
        assert (item.shape, item.color) == (shape, color)
        assert abs(item.x - 48) <= 2
        assert abs(item.y - 48) <= 2


@pytest.mark.parametrize(
    ("prompt", "items", "expected"),
    [
        ("a circle", [("red circle", LEFT_TOP)], (True, True)),
        ("a circle", [("red square", LEFT_TOP)], (False, False)),
        # Something extra: GenEval's rule does not mind, the exact one does.
        ("a circle", [("red circle", LEFT_TOP), ("blue cross", RIGHT_TOP)], (False, True)),
        ("a circle", [("red circle", LEFT_TOP), ("blue circle", RIGHT_TOP)], (False, True)),
        ("a circle and a cross", [("red circle", LEFT_TOP), ("red cross", RIGHT_TOP)], (True, True)),
        ("a circle and a cross", [("red circle", LEFT_TOP)], (False, False)),
        ("two circles", [("red circle", LEFT_TOP), ("blue circle", RIGHT_TOP)], (True, True)),
        ("two circles", [("red circle", LEFT_TOP)], (False, False)),
        ("two circles", [("red circle", p) for p in (LEFT_TOP, RIGHT_TOP, LEFT_BOTTOM)], (False, False)),
        ("a red circle", [("red circle", LEFT_TOP)], (True, True)),
        ("a red circle", [("blue circle", LEFT_TOP)], (False, False)),
        ("a circle left of a cross", [("red circle", LEFT_TOP), ("red cross", RIGHT_BOTTOM)], (True, True)),
        ("a circle left of a cross", [("red circle", RIGHT_TOP), ("red cross", LEFT_TOP)], (False, False)),
        ("a circle left of a cross", [("red circle", LEFT_TOP), ("red cross", LEFT_BOTTOM)], (False, False)),
        ("a circle above a cross", [("red circle", LEFT_TOP), ("red cross", RIGHT_BOTTOM)], (True, True)),
        ("a circle below a cross", [("red circle", LEFT_TOP), ("red cross", RIGHT_BOTTOM)], (False, False)),
        ("a red circle and a blue cross", [("red circle", LEFT_TOP), ("blue cross", RIGHT_TOP)], (True, True)),
        ("a red circle and a blue cross", [("blue circle", LEFT_TOP), ("red cross", RIGHT_TOP)], (False, False)),
    ],
)
def test_verdicts(prompt: str, items: list[tuple[str, tuple[float, float]]], expected: tuple[bool, bool]) -> None:
    assert verdict_of(prompt, scene(*items)) == expected


def test_merged_blobs_are_wrong() -> None:
    image = scene(("red circle", LEFT_TOP), ("red circle", RIGHT_TOP))
    image[:, 14:18, 16:48] = np.asarray(COLORS["red"])[:, None, None]
    assert detect(image).unrecognised == 1
    assert verdict_of("two circles", image) == (False, False)


def test_texture_and_foreign_shapes_are_not_objects() -> None:
    striped = scene(("red square", LEFT_TOP))
    for row in range(4, 28, 4):
        striped[:, row : row + 2, :32] = np.asarray(COLORS["blue"])[:, None, None]
    assert not judge(striped, prompts_by_text()["a red square"]).clean
    bar = np.broadcast_to(np.asarray(BACKGROUND)[:, None, None], (3, IMAGE_SIZE, IMAGE_SIZE)).copy()
    bar[:, 8:12, 4:28] = np.asarray(COLORS["red"])[:, None, None]
    assert detect(bar).unrecognised == 1


def test_dust_is_ignored_and_an_empty_image_holds_nothing() -> None:
    image = scene(("red circle", LEFT_TOP))
    image[:, 60:62, 60:62] = 0
    assert verdict_of("a red circle", image) == (True, True)
    assert detect(render([])).objects == ()
    assert verdict_of("a circle", render([])) == (False, False)


@pytest.mark.parametrize("prompt", balanced_prompts(all_prompts(), 24), ids=lambda prompt: prompt.text)
def test_a_rendered_scene_is_tidy_wherever_the_judge_sees_its_objects(prompt: Prompt) -> None:
    image = render(draw_scene(prompt, random.Random(prompt.text)))
    assert untidiness(image, detect(image)) == 0


def test_untidiness_is_the_mean_difference_to_a_drawing_of_what_is_found() -> None:
    image = scene(("red circle", LEFT_TOP))
    stained = image.copy()
    stained[:, 40:44, :] += 0.05  # too faint to be an object: 4 of 64 rows
    assert untidiness(stained, detect(stained)) == pytest.approx(0.05 * 4 / 64, rel=1e-3)
    moved = np.roll(image, 2, axis=2)
    found = detect(moved)
    assert (found.unrecognised, len(found.objects)) == (0, 1)
    assert untidiness(moved, found) == pytest.approx(float(np.abs(moved - image).mean())), (
        "and it is not where it belongs"
    )


def test_scenes_open_to_color_and_place_vary() -> None:
    rng = random.Random(0)
    prompt = Prompt("single", (Thing("circle"),))
    drawn = {(item.color, item.x, item.y) for _ in range(300) for item in draw_scene(prompt, rng)}
    assert len(drawn) == len(COLORS) * (IMAGE_SIZE // CELL_SIZE) ** 2


def test_held_out_prompts_are_apart_and_cover_every_family() -> None:
    training, held_out = split_prompts()
    texts = {prompt.text for prompt in training}
    assert texts.isdisjoint(prompt.text for prompt in held_out)
    assert len(training) + len(held_out) == len(all_prompts()) == len(prompts_by_text())
    for part in (training, held_out):
        assert {prompt.family for prompt in part} == set(FAMILIES)
    families = [prompt.family for prompt in balanced_prompts(held_out, 432)]
    assert {families.count(family) for family in FAMILIES} == {72}


def test_shipped_training_prompts_are_the_training_split_in_equal_shares() -> None:
    shipped = read_prompts(FOLDER / "training_prompts.txt")
    assert set(shipped) == {prompt.text for prompt in split_prompts()[0]}
    families = [prompts_by_text()[text].family for text in shipped]
    assert {families.count(family) for family in FAMILIES} == {len(shipped) / len(FAMILIES)}
