"""Checkpoints: ``step-N/`` with the transformer and its average in diffusers layout, and the optimizer state.

Everything random in a run is a function of seed and iteration, so the iteration number is the RNG state. A checkpoint
is whole or absent, and outlasts a power cut; what befalls it later is told by its manifest.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from leapalign.config import load_config
from leapalign.inputs.validation import UserError, brief
from leapalign.models.lora import has_adapter
from leapalign.models.weights import load_weights, read_weights, save_weights
from leapalign.optimizers.optimizer import Optimizer
from leapalign.parallel.processes import count, first, wait
from leapalign.storage.durable import make_folder, partial_of, rename, require_space, sync_tree, writing
from leapalign.storage.faults import point
from leapalign.storage.manifest import damage, write_manifest
from leapalign.storage.modes import save_file
from leapalign.watch.records import ranked

TRANSFORMER = "transformer"
AVERAGE = "transformer_ema"
BEST = "best"
WEIGHTS = {"average": AVERAGE, "last": TRANSFORMER, BEST: AVERAGE}
"""What a checkpoint holds, by the names that the command line has for it; the last is of the best, not the latest."""
_ROOM = "make room, or lower checkpoint.keep, then train again or continue with --resume"
_HEADERS = 1 << 20
"""Bytes of a checkpoint beside its tensors, at most."""
_log = logging.getLogger("leapalign")


def step_folder(run: Path, iteration: int) -> Path:
    return run / "checkpoints" / f"step-{iteration}"


def latest_checkpoint(run: Path, within: str = "") -> Path | None:
    """The newest checkpoint that is as it was saved; a warning names each that is not, and is passed over.

    within: only files in this folder of the checkpoint are wanted. Returns None where there are no checkpoints; raises
    UserError where all are damaged.
    """
    found = checkpoints_of(run)
    return _first_whole(run, [found[number] for number in sorted(found, reverse=True)], within)


def named_checkpoint(run: Path, step: int, within: str = "") -> Path:
    """The checkpoint after iteration ``step``, as it was saved; ``within`` as for `latest_checkpoint`.

    Raises UserError where there is none, or it is damaged, and says which there are.
    """
    found = checkpoints_of(run)
    there = f"there are those of {', '.join(map(str, sorted(found)))}" if found else "it holds none yet"
    if step not in found:
        raise UserError(f"'{run}' holds no checkpoint of step {step}; {there}, name one of them")
    reason = damage(found[step], within)
    if reason is not None:
        raise UserError(f"checkpoint '{found[step]}' is damaged ({reason}); {there}, name another")
    return found[step]


def best_checkpoint(run: Path, within: str = "") -> Path | None:
    """Of those that the watch measured, the checkpoint with the highest held-out reward; else as `latest_checkpoint`.

    By a reward that is not trained on, where the run's config has one in ``watch.rewards``.
    """
    found = checkpoints_of(run)
    best_first = ranked(run, load_config(run / "config.yaml").watch.best_by)
    return _first_whole(run, [found[number] for number in best_first if number in found], within)


def _first_whole(run: Path, checkpoints: Sequence[Path], within: str) -> Path | None:
    for checkpoint in checkpoints:
        reason = damage(checkpoint, within)
        if reason is None:
            return checkpoint
        _log.warning("checkpoint '%s' is damaged (%s); passing it over for another", checkpoint, reason)
    if checkpoints:
        raise UserError(f"all checkpoints of '{run}' are damaged; put one back from a copy, or choose another output")
    return None


def run_weights(run: Path, name: str, step: int | None = None) -> Path:
    """The folder of the `WEIGHTS` called ``name``, in the checkpoint of ``step``, the latest or the best.

    Raises UserError where there is none.
    """
    if step is not None and name == BEST:
        raise UserError(
            f"--weights best is a step of its own choice, and step {step} is named; leave that out, or use --weights "
            "average or last"
        )
    if step is not None:
        return named_checkpoint(run, step, WEIGHTS[name]) / WEIGHTS[name]
    checkpoint = best_checkpoint(run, AVERAGE) if name == BEST else latest_checkpoint(run, WEIGHTS[name])
    if checkpoint is None and name == BEST:
        raise UserError(
            f"'{run}' holds no checkpoint that was measured; train with watch.every, or use other --weights"
        )
    if checkpoint is None:
        raise UserError(f"'{run}' holds no checkpoint yet; let it train longer, or use --config")
    return checkpoint / WEIGHTS[name]


def save_checkpoint(
    run: Path, iteration: int, transformer: Any, optimizer: Optimizer, keep: int, best_first: Iterable[int] = ()
) -> Path:
    """Writes ``step-<iteration>``; once it is on the disk, all but the newest ``keep`` are deleted.

    The first iteration in ``best_first`` of which there is a checkpoint stays, too. Raises UserError where it cannot be
    written. Those before it are then as they were.
    """
    final = step_folder(run, iteration)
    if not first():
        _hand_over(optimizer)
        return final
    partial = partial_of(final)
    with writing(final):
        make_folder(final.parent)
        remove_partial(run)
        require_space(final.parent, _size(transformer, optimizer), "a checkpoint", _ROOM)
        try:
            _write(partial, iteration, transformer, optimizer)
            rename(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _delete_surplus(run, keep, best_first)
    wait()
    return final


def _hand_over(optimizer: Optimizer) -> None:
    """Gives the first process what it writes, in the order of `_write`, and returns when it is on the disk."""
    optimizer.weights()
    optimizer.averages()
    optimizer.tensors()
    wait()


def require_space_for_all(
    run: Path, iteration: int, saves: int, keep: int, transformer: Any, optimizer: Optimizer
) -> None:
    """Raises UserError where the disk of ``run`` lacks room for the ``saves`` checkpoints that follow ``iteration``.

    keep: so many stay, beside one that is being written.
    """
    there = [number for number in checkpoints_of(run) if number <= iteration]  # Later ones will be set aside.
    more = min(saves, max(1, keep + 1 - len(there)))
    if more:
        size = _size(transformer, optimizer)
        several = f"a checkpoint needs {size / 2**30:.2f} GiB and there will be {more} more at once, which"
        require_space(run, more * size, several if more > 1 else "a checkpoint", _ROOM)


def remove_partial(run: Path) -> None:
    """Deletes what a killed process had not finished to write, or to delete."""
    for stale in (run / "checkpoints").glob("*.partial"):
        shutil.rmtree(stale)


def _write(folder: Path, iteration: int, transformer: Any, optimizer: Optimizer) -> None:
    folder.mkdir()
    # Those in host memory themselves, and not what the device has of them, which would be copied back.
    with optimizer.changing_weights():
        save_weights(transformer, folder / TRANSFORMER, optimizer.weights() if count() > 1 else None)
    point("checkpoint file")
    save_weights(transformer, folder / AVERAGE, optimizer.averages())
    point("checkpoint file")
    save_file(optimizer.tensors(), folder / "optimizer.safetensors")
    point("checkpoint file")
    state = {"iteration": iteration, "optimizer": optimizer.scalars()}
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    point("checkpoint file")
    write_manifest(folder)
    point("checkpoint file")
    sync_tree(folder)


def _size(transformer: Any, optimizer: Optimizer) -> int:
    """Bytes that a checkpoint takes."""
    if has_adapter(transformer):
        saved = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    else:
        saved = list(transformer.state_dict().values())
    # The average is saved in their dtype.
    weights = 2 * sum(tensor.numel() * tensor.element_size() for tensor in saved)
    return weights + optimizer.state_bytes() + _HEADERS


def _delete_surplus(run: Path, keep: int, best_first: Iterable[int]) -> None:
    """Leaves the newest ``keep`` checkpoints and the best."""
    found = checkpoints_of(run)
    kept = {*sorted(found, reverse=True)[:keep], *[number for number in best_first if number in found][:1]}
    for number, path in found.items():
        if number not in kept:
            _delete(path)


def _delete(checkpoint: Path) -> None:
    # Renamed first: half of a checkpoint must not pass for one.
    partial = partial_of(checkpoint)
    rename(checkpoint, partial)
    point("delete")
    shutil.rmtree(partial)


def checkpoints_of(run: Path) -> dict[int, Path]:
    """Those with their name, whole or damaged, by iteration."""
    found = (run / "checkpoints").glob("step-*")
    return {iteration_of(path): path for path in found if path.name[5:].isdecimal()}


def iteration_of(checkpoint: Path) -> int:
    """After which it was saved, by its name."""
    return int(checkpoint.name[5:])


def load_checkpoint(folder: Path, transformer: Any, optimizer: Optimizer) -> int:
    """Restores weights, average and optimizer from ``folder``; returns the iteration.

    Raises UserError where it is of another model or optimizer.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        average = read_weights(folder / AVERAGE)
        tensors = load_file(folder / "optimizer.safetensors")
        with optimizer.changing_weights():
            load_weights(transformer, folder / TRANSFORMER)
        names = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
        optimizer.load(tensors, state["optimizer"], [average[name] for name in names])
        return int(state["iteration"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"checkpoint '{folder}' cannot be resumed ({brief(error)}); set model and optimizer back to what it was "
            "saved with, or choose another output"
        ) from None
