"""``make tiny`` goes on where it was stopped, and replaces the shipped weights only when all of them are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from leapalign.tiny import train
from leapalign.tiny.train import Log, Parts


def test_a_finished_part_is_not_trained_again(tmp_path: Path) -> None:
    trained: list[str] = []
    parts = Parts(tmp_path, Log(tmp_path / "training.log"))

    def fails() -> None:
        trained.append("b")
        raise KeyboardInterrupt

    parts.once("a", lambda: trained.append("a"))
    with pytest.raises(KeyboardInterrupt):
        parts.once("b", fails)
    again = Parts(tmp_path, Log(tmp_path / "training.log"))
    again.once("a", lambda: trained.append("a again"))
    again.once("b", lambda: trained.append("b again"))
    assert trained == ["a", "b", "b again"]


def test_shipped_weights_stay_until_all_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "weights"
    shipped.mkdir()
    (shipped / "old").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "FOLDER", shipped)

    def part(name: str) -> object:
        def make(self: Parts) -> None:
            (self.folder / name).mkdir(exist_ok=True)
            (self.folder / "stages").mkdir(exist_ok=True)
            self.log(name, "made")

        return make

    class Here:
        """Stands in for processes, which would not know of these stand-ins."""

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, work: object, *arguments: object) -> Here:
            work(*arguments)
            return self

        def result(self) -> None: ...

    monkeypatch.setattr(train, "ProcessPoolExecutor", lambda *_, **__: Here())
    for name in ("autoencoder", "base", "reward"):
        monkeypatch.setattr(Parts, f"train_{name}", part(name))

    def interrupted(self: Parts) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "train_critic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main()
    assert [path.name for path in shipped.iterdir()] == ["old"]
    monkeypatch.setattr(Parts, "train_critic", part("critic"))
    train.main()
    assert {path.name for path in shipped.iterdir()} == {
        *("autoencoder", "base", "reward", "critic", "training.log", "training_prompts.txt", "watch_prompts.txt")
    }
    assert (shipped / "training.log").read_text().count("base made") == 1
    assert not train.WORK.exists()
