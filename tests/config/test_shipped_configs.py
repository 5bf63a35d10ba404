"""The configs that come with the package: found by name from any folder, listed, and copied out."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import refused

from leapalign.cli import main
from leapalign.config import load_config
from leapalign.config.profiles import SCHEMA, profiles, purpose
from leapalign.inputs.validation import UserError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without configs, as of an installed package."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("form", ["{}", "{}.yaml", "configs/{}", "configs/{}.yaml"])
@pytest.mark.parametrize("name", ["tiny", "flux1_dev/80gb"])
def test_a_name_is_enough(name: str, form: str) -> None:
    assert load_config(Path(form.format(name))) == load_config(profiles()[name])


def test_a_file_comes_before_a_name_and_a_folder_does_not(elsewhere: Path) -> None:
    (elsewhere / "tiny").mkdir()
    assert load_config(Path("tiny")).output == "runs/tiny"
    (elsewhere / "tiny.yaml").write_text("output: mine")
    assert load_config(Path("tiny.yaml")).output == "mine"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("tinny", "did you mean 'tiny'?"),
        ("configs/flux1_dev/81gb.yaml", "did you mean 'flux1_dev/80gb'?"),
        ("nowhere", "valid are: flux1_dev/16gb, "),
        ("x" * 300, "there is no such file"),
        ("a\0b", "there is no such file"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(named: str, message: str) -> None:
    with pytest.raises(UserError, match=r"^cannot read config '") as told:
        load_config(Path(named))
    assert message in str(told.value)


def test_a_folder_is_no_config(elsewhere: Path) -> None:
    (elsewhere / "mine").mkdir()
    with pytest.raises(UserError, match="cannot read config 'mine': Is a directory; check --config"):
        load_config(Path("mine"))


def test_all_are_listed_with_their_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert dict(lines) == {name: purpose(file) for name, file in profiles().items()}
    assert "tiny" in dict(lines)
    for file in profiles().values():
        first = file.read_text().splitlines()[0]
        assert first.startswith("# ")
        assert first.endswith(".")


@pytest.mark.parametrize("name", ["tiny", "flux1_dev/24gb"])
def test_a_copy_is_the_same_config_and_names_its_schema(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", name, "--copy", "mine.yaml"]) == 0
    assert load_config(Path("mine.yaml")) == load_config(profiles()[name])
    first = Path("mine.yaml").read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema={SCHEMA.as_uri()}"
    capsys.readouterr()
    assert main(["configs", name]) == 0
    assert capsys.readouterr().out == Path("mine.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--copy", "mine.yaml"], "'mine.yaml' is there already; name another file"),
        (["tinny", "--copy", "new.yaml"], "did you mean 'tiny'?"),
        (["--copy", "new.yaml"], "name the config to copy"),
        (["tiny", "--copy", "no/folder/new.yaml"], "No such file or directory"),
    ],
)
def test_what_cannot_be_copied_is_told_and_nothing_is_overwritten(
    arguments: list[str], message: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "mine.yaml").write_text("output: mine\n")
    assert message in refused(["configs", *arguments], capsys)
    assert [file.read_text() for file in elsewhere.iterdir()] == ["output: mine\n"]
