"""What each command does with its arguments. Imports wait until one needs them: PyTorch takes seconds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leapalign.inputs.validation import UserError

if TYPE_CHECKING:
    from leapalign.config import Config
    from leapalign.runs.run import Run

PROMPT_CACHE = "runs/prompt_cache"
PROBE = "runs/probe"


def demo_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.config import load_config
    from leapalign.config.profiles import profiles
    from leapalign.reports.pages import text_table
    from leapalign.runs.opening import opened_run, unused_folder
    from leapalign.tiny.demo import WATCHED, run_demo, summary
    from leapalign.tiny.demo_report import HEADER, figures, write_report

    started = time.perf_counter()
    config = load_config(profiles()["tiny"], [*WATCHED, *overrides])
    config = dataclasses.replace(config, output=str(unused_folder(Path(config.output))))
    with opened_run(config, resume=False) as run:
        comparison = run_demo(run, lambda: _train(run))
    if comparison is None:
        return
    folder = Path(config.output)
    page = write_report(comparison, folder)
    result = {
        **summary(comparison),
        "iterations": run.trainer.iteration,
        "seconds": time.perf_counter() - started,
        "run": str(folder),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{text_table(HEADER, figures(comparison))}\n\n{page}  ({result['seconds']:.0f} s)")
    if arguments.json:
        print(json.dumps(result))


def train_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.cli.many import among_processes, launched

    if arguments.processes != 1:
        launched(arguments, overrides)
        return
    with among_processes():
        _train_run(arguments, overrides)


def _train_run(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.config.resuming import refuse_changes
    from leapalign.runs.opening import opened_run
    from leapalign.runs.run_folder import read_metrics

    run_folder, step = _resumed(arguments)
    if run_folder is None:
        config = _config(arguments.config, None, overrides)
    else:
        # Where the run lies now is no change of it.
        config = _config(arguments.config, run_folder, [f"output={json.dumps(str(run_folder))}", *overrides])
        refuse_changes({"output": str(run_folder)}, {"output": config.output})
    with opened_run(config, resume=run_folder is not None, step=step) as run:
        _train(run)
        stop = run.watch.stop if run.watch else None
    if arguments.json:
        end = {"run": config.output, "stopped_by": stop.rule.text if stop else None}
        print(json.dumps({**read_metrics(Path(config.output))[-1], **end}))


def _resumed(arguments: argparse.Namespace) -> tuple[Path | None, int | None]:
    """The run and the step to go on from, where they are asked for."""
    from leapalign.config import load_config
    from leapalign.runs.naming import LATEST, newest_run, run_and_step

    if arguments.resume is None:
        return None, None
    if arguments.resume != LATEST or LATEST.exists():
        return run_and_step(arguments.resume)
    run = newest_run(Path(load_config(arguments.config).output).parent if arguments.config else Path("runs"))
    print(f"continuing {run}, the run that was active last", file=sys.stderr)
    return run, None


def _train(run: Run) -> float:
    """Trains to the end, or until SIGTERM or Ctrl-C, and says so; returns the seconds spent in iterations."""
    from leapalign.runs.stopping import stop_requests

    trainer = run.trainer
    if trainer.iteration == trainer.config.train.iterations:
        print(f"all {trainer.iteration} iterations are done; raise train.iterations to go on", file=sys.stderr)
    with stop_requests() as stopping:
        seconds = run.train(stopping)
    stop, resume = run.watch.stop if run.watch else None, f"leapalign train --resume {trainer.config.output}"
    if stop or trainer.iteration < trainer.config.train.iterations:
        remedy = f", as {stop}; change this rule to continue with" if stop else "; continue with"
        print(f"stopped after iteration {trainer.iteration}{remedy} {resume}", file=sys.stderr)
    return seconds


def _config(paths: list[Path] | None, run: Path | None, overrides: list[str]) -> Config:
    """The config of the files given, else that of the run folder."""
    from leapalign.config import load_config

    if paths is None:
        if run is None:
            raise UserError("name a config with --config, a file or one that leapalign configs lists, such as tiny")
        paths = [run / "config.yaml"]
        if not paths[0].exists():
            raise UserError(f"'{run}' is not a run folder: it has no config.yaml; check the path")
    return load_config(paths, overrides)


def generate_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.evaluation.generate import image_batches, sampling_model
    from leapalign.evaluation.image_folder import save_images
    from leapalign.evaluation.sampling import as_evaluated, in_words
    from leapalign.prompts.embeddings import embeddings_to_sample
    from leapalign.prompts.geneval import prepare_folders, read_metadata

    run, step = _run_and_step(arguments)
    config, file, prompts = _config_and_prompts(arguments, run, overrides, arguments.prompt)
    config = as_evaluated(config)
    weights = _run_weights(run, step, arguments.weights)
    model = sampling_model(config, weights)
    embeddings = embeddings_to_sample(config, prompts)
    seeds = range(arguments.seed, arguments.seed + len(prompts))
    arguments.output.mkdir(parents=True, exist_ok=True)
    files = prepare_folders(arguments.output, [] if arguments.prompt else read_metadata(file))
    files = files or [arguments.output / f"{number:05d}.png" for number in range(len(prompts))]
    sigmas = model.sigmas(config.rollout.num_steps, config.rollout.sigmas)
    batches = image_batches(model, embeddings, seeds, sigmas, config.rollout.batch_size)
    save_images(batches, prompts, files, arguments.output)
    print(f"{len(prompts)} images in {arguments.output}; {in_words(config)}")


def evaluate_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.evaluation.evaluate import BASE, RUN, evaluate, evaluation_rewards, figures, summary
    from leapalign.evaluation.page import EvaluationPage
    from leapalign.evaluation.sampling import as_evaluated, in_words, sampled_with
    from leapalign.inputs.prompt_limits import warn_of_cut
    from leapalign.prompts.embeddings import embeddings_to_sample
    from leapalign.reports.pages import text_table

    page = EvaluationPage(arguments.page) if arguments.page else None
    run, step = _run_and_step(arguments)
    config, _, prompts = _config_and_prompts(arguments, run, overrides, [])
    config = as_evaluated(config)
    weights = _run_weights(run, step, arguments.weights)
    arms = {BASE: None, RUN: weights} if weights else {BASE: None}
    rewards = evaluation_rewards(config)
    warn_of_cut([(f"reward {name}", reward) for name, reward in rewards.items()], lambda: prompts)
    embeddings = embeddings_to_sample(config, prompts)
    scores = evaluate(config, arms, rewards, prompts, embeddings, arguments.seed, page.keep if page else None)
    found = summary(scores)
    print(f"{text_table(*figures(found))}\n\n{len(prompts)} images, {in_words(config)}")
    if page:
        print(page.write(prompts, scores, in_words(config)))
    if arguments.json:
        intervals = {name: {arm: one.to_json() for arm, one in of.items()} for name, of in found.items()}
        print(json.dumps({"images": len(prompts), **sampled_with(config), "rewards": intervals}))


def probe_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.probe.climb import changes, probe, verdict
    from leapalign.probe.page import figures, write_probe
    from leapalign.reports.pages import text_table
    from leapalign.runs.opening import unused_folder

    # Of one image there is no interval.
    for name, least in (("images", 2), ("steps", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} must be at least {least}")
    if arguments.page and arguments.page.exists():
        raise UserError(f"'{arguments.page}' already exists; choose another --page")
    config, _, prompts = _config_and_prompts(arguments, None, overrides, [])
    # From all over the file: many are sorted by what they ask for.
    chosen = [prompts[i * len(prompts) // arguments.images] for i in range(min(arguments.images, len(prompts)))]
    climbs = probe(config, chosen, arguments.steps, arguments.seed)
    page = write_probe(arguments.page or unused_folder(Path(PROBE)), climbs, chosen)
    print(f"{text_table(*figures(climbs))}\n\n{verdict(climbs)}\n{page}")
    if arguments.json:
        moved = {name: of[-1].to_json() for name, of in changes(climbs).items()}
        means = {name: [float(climb.values[name].mean()) for climb in climbs] for name in climbs[0].values}
        steps = [climb.steps for climb in climbs]
        found = {"images": len(chosen), "steps": steps, "means": means, "changes": moved, "verdict": verdict(climbs)}
        print(json.dumps({**found, "page": str(page)}))


def _config_and_prompts(
    arguments: argparse.Namespace, run: Path | None, overrides: list[str], given: list[str]
) -> tuple[Config, Path, list[str]]:
    """The config, the prompt file, and the prompts that are asked for: those ``given``, else the file's."""
    from leapalign.prompts.files import read_prompts
    from leapalign.storage.embedded import resolve

    config = _config(arguments.config, run, overrides)
    file = Path(arguments.prompts or resolve(config.prompts.path))
    # As those of a file: a prompt cache knows no others.
    return config, file, [prompt.strip() for prompt in given] or read_prompts(file)


def _run_and_step(arguments: argparse.Namespace) -> tuple[Path | None, int | None]:
    """The run and the step of it that are named, where they are."""
    from leapalign.runs.naming import run_and_step

    if arguments.run is not None:
        return run_and_step(arguments.run, arguments.step)
    if arguments.step is not None:
        raise UserError(f"--step {arguments.step} is one of a run; name that with --run")
    return None, None


def _run_weights(run: Path | None, step: int | None, name: str) -> Path | None:
    """The weights of the run, where one is named."""
    from leapalign.runs.checkpoint import run_weights

    return run_weights(run, name, step) if run else None


def cache_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.config import load_config
    from leapalign.evaluation.sampling import as_evaluated
    from leapalign.memory.placement import training_device
    from leapalign.prompts.filling import fill_cache
    from leapalign.storage.embedded import resolve

    config = load_config(arguments.config, overrides)
    path = Path(arguments.prompts or resolve(config.prompts.path))
    folder = Path(arguments.output or config.prompts.cache or PROMPT_CACHE)
    # With the negative prompt where either training or evaluation asks for it.
    model = next((one.model for one in (config, as_evaluated(config)) if one.model.true_cfg_scale != 1), config.model)
    result = fill_cache(folder, model, path, training_device(), arguments.quantization)
    print("{encoded} prompts encoded, {reused} reused, in {seconds:.1f} s".format(**result))
    print(f"{result['bytes'] / 2**20:,.1f} MiB in {folder}; train with prompts.cache={folder}")
    if arguments.json:
        print(json.dumps({**result, "cache": str(folder)}))


def export_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.export.export import export
    from leapalign.runs.naming import run_and_step

    run, step = run_and_step(arguments.run, arguments.step)
    config = _config(None, run, overrides)
    written = export(run, config, arguments.output, arguments.weights, arguments.layout, step)
    print(f"{arguments.output}: {written}")


def memory_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.config import load_config
    from leapalign.planning.auto import fastest
    from leapalign.planning.fit import explanation, parse_size, summary
    from leapalign.planning.simulate import simulate, simulate_probe

    gpu_memory = parse_size(arguments.gpu_memory)
    config = load_config(arguments.config, overrides)
    result: dict[str, Any] = {}
    if arguments.auto:
        settings, config, found = fastest(config, gpu_memory, lambda line: print(line, file=sys.stderr))
        result["settings"] = list(settings)
        print(f"The fastest settings that fit:\n  {' '.join(settings)}\n")
    else:
        found = simulate(config)
    climb = simulate_probe(config)
    print(explanation(found, climb, gpu_memory, config))
    if arguments.json:
        print(json.dumps({**summary(found, climb, gpu_memory, config), **result}))


def doctor_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.cli.doctor import diagnose, explanation

    report = diagnose()
    print(explanation(report))
    if arguments.json:
        print(json.dumps(report))
