"""The command line: ``leapalign demo | train | generate | evaluate | export | cache | memory | doctor | kernels``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leapalign.failures import user_error
from leapalign.libraries import no_hub_code, quiet_libraries
from leapalign.validation import UserError

if TYPE_CHECKING:
    from leapalign.config import Config
    from leapalign.trainer import Trainer

OVERRIDES = "any config key can follow as section.key=value"
KERNELS = "kernels"  # everything behind this word belongs to leap_kernels
PROMPT_CACHE = "runs/prompt_cache"
DEMO_CONFIG = Path(__file__).parent / "tiny" / "demo.yaml"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="leapalign", description="Align flow-matching image models with differentiable rewards."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="align the embedded tiny model, before and after", epilog=OVERRIDES)
    demo.set_defaults(execute=demo_command)

    train = commands.add_parser("train", help="train from a config, or continue a run", epilog=OVERRIDES)
    train.add_argument("--config", type=Path, help="YAML file, see configs/tiny.yaml")
    train.add_argument("--resume", type=Path, metavar="RUN", help="run folder to continue")
    train.set_defaults(execute=train_command)

    generate = commands.add_parser("generate", help="images from a run or a base model", epilog=OVERRIDES)
    generate.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    generate.add_argument("--output", type=Path, required=True, help="folder for the images")
    generate.set_defaults(execute=generate_command)

    evaluate = commands.add_parser("evaluate", help="a run's mean rewards beside the base's", epilog=OVERRIDES)
    evaluate.add_argument("--page", type=Path, help="new folder for a page with the images side by side")
    evaluate.set_defaults(execute=evaluate_command)

    for command in (generate, evaluate):
        command.add_argument("--config", type=Path, help="YAML file naming the base model")
        command.add_argument("--run", type=Path, help="run folder: its latest checkpoint is used")
        command.add_argument("--prompts", type=Path, help="prompt file, default the config's")
        command.add_argument("--seed", type=int, default=0, help="noise seed of the first image")

    cache = commands.add_parser("cache", help="encode prompts once, for prompts.cache", epilog=OVERRIDES)
    cache.add_argument("--config", type=Path, required=True, help="YAML file naming the model")
    cache.add_argument("--prompts", type=Path, help="prompt file, default the config's")
    cache.add_argument("--output", type=Path, help=f"folder, default the config's prompts.cache or {PROMPT_CACHE}")
    cache.set_defaults(execute=cache_command)

    export = commands.add_parser("export", help="a run's weights as other software reads them", epilog=OVERRIDES)
    export.add_argument("--run", type=Path, required=True, help="run folder: its latest checkpoint is exported")
    export.add_argument("--output", type=Path, required=True, help="new folder for the weights and their model card")
    export.add_argument("--layout", choices=("diffusers", "original", "comfyui"), default="diffusers")
    export.set_defaults(execute=export_command)

    for command in (generate, evaluate, export):
        command.add_argument(
            "--weights", choices=("average", "last", "best"), default="average", help="of the run, default average"
        )

    memory = commands.add_parser("memory", help="simulate what an iteration needs, without a GPU", epilog=OVERRIDES)
    memory.add_argument("--config", type=Path, required=True, help="YAML file, see configs/flux1_dev")
    memory.add_argument("--gpu-memory", default="80GiB", help="what has to suffice, such as 24GiB")
    memory.add_argument("--auto", action="store_true", help="find the fastest settings that fit (minutes)")
    memory.set_defaults(execute=memory_command)

    doctor = commands.add_parser("doctor", help="versions, devices, and the backend of each kernel")
    doctor.set_defaults(execute=doctor_command)

    commands.add_parser(KERNELS, help="list, explain, bench, audit or export the kernels", add_help=False)

    for command in (demo, train, evaluate, cache, memory, doctor):
        command.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == [KERNELS]:
        from leap_kernels.tools import main as kernels_main

        return kernels_main(argv[1:], program=f"leapalign {KERNELS}")
    parser = build_parser()
    # Overrides may stand anywhere between the options, which argparse's positionals do not allow.
    arguments, overrides = parser.parse_known_args(argv)
    for item in overrides:
        if item.startswith("-") or "=" not in item:
            parser.error(f"unrecognized argument '{item}'; config overrides read section.key=value")
    try:
        with no_hub_code():
            quiet_libraries()
            arguments.execute(arguments, overrides)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        told = user_error(error)
        if told is None:
            raise
        print(f"leapalign: {told}", file=sys.stderr)
        return 2
    return 0


def demo_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.config import load_config
    from leapalign.report import text_table
    from leapalign.run import opened_run, unused_folder
    from leapalign.tiny.demo import run_demo, summary
    from leapalign.tiny.demo_report import HEADER, figures, write_report

    started = time.perf_counter()
    config = load_config(DEMO_CONFIG, overrides)
    config = dataclasses.replace(config, output=str(unused_folder(Path(config.output))))
    with opened_run(config, resume=False) as trainer:
        comparison = run_demo(trainer, _train)
    if comparison is None:
        return
    run = Path(config.output)
    page = write_report(comparison, run)
    result = {
        **summary(comparison),
        "iterations": config.train.iterations,
        "seconds": time.perf_counter() - started,
        "run": str(run),
    }
    (run / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{text_table(HEADER, figures(comparison))}\n\n{page}  ({result['seconds']:.0f} s)")
    if arguments.json:
        print(json.dumps(result))


def train_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.run import opened_run
    from leapalign.run_folder import read_metrics

    config = _config(arguments.config, arguments.resume, overrides)
    if arguments.resume:
        config = dataclasses.replace(config, output=str(arguments.resume))
    with opened_run(config, resume=bool(arguments.resume)) as trainer:
        _train(trainer)
        stop = trainer.watch.stop if trainer.watch else None
    if arguments.json:
        end = {"run": config.output, "stopped_by": stop.rule.text if stop else None}
        print(json.dumps({**read_metrics(Path(config.output))[-1], **end}))


def _train(trainer: Trainer) -> float:
    """Trains to the end, or until SIGTERM or Ctrl-C, and says so; returns the seconds spent in iterations."""
    from leapalign.run import run_training
    from leapalign.stopping import stop_requests

    with stop_requests() as stopping:
        seconds = run_training(trainer, stopping)
    stop, resume = trainer.watch.stop if trainer.watch else None, f"leapalign train --resume {trainer.config.output}"
    if stop or trainer.iteration < trainer.config.train.iterations:
        remedy = f", as {stop}; change this rule to continue with" if stop else "; continue with"
        print(f"stopped after iteration {trainer.iteration}{remedy} {resume}", file=sys.stderr)
    return seconds


def _config(path: Path | None, run: Path | None, overrides: list[str]) -> Config:
    """The config file given, else that of the run folder."""
    from leapalign.config import load_config

    if path is None:
        if run is None:
            raise UserError("name a config with --config, such as configs/tiny.yaml")
        path = run / "config.yaml"
        if not path.exists():
            raise UserError(f"'{run}' is not a run folder: it has no config.yaml; check the path")
    return load_config(path, overrides)


def generate_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.generate import image_batches, sampling_model
    from leapalign.geneval import prepare_folders, read_metadata
    from leapalign.image_folder import save_images
    from leapalign.prompt_cache import embeddings_of

    config, file, prompts = _config_and_prompts(arguments, overrides, arguments.prompt)
    weights = _run_weights(arguments)
    model = sampling_model(config, weights)
    embeddings = embeddings_of(config, prompts)
    seeds = range(arguments.seed, arguments.seed + len(prompts))
    arguments.output.mkdir(parents=True, exist_ok=True)
    files = prepare_folders(arguments.output, [] if arguments.prompt else read_metadata(file))
    files = files or [arguments.output / f"{number:05d}.png" for number in range(len(prompts))]
    batches = image_batches(model, embeddings, seeds, config.rollout.num_steps, config.rollout.batch_size)
    save_images(batches, prompts, files, arguments.output)
    print(f"{len(prompts)} images in {arguments.output}")


def evaluate_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.evaluate import BASE, RUN, evaluate, evaluation_rewards, figures, summary
    from leapalign.evaluation_page import EvaluationPage
    from leapalign.prompt_cache import embeddings_of
    from leapalign.report import text_table

    page = EvaluationPage(arguments.page) if arguments.page else None
    config, _, prompts = _config_and_prompts(arguments, overrides, [])
    weights = _run_weights(arguments)
    arms = {BASE: None, RUN: weights} if weights else {BASE: None}
    rewards, embeddings = evaluation_rewards(config), embeddings_of(config, prompts)
    scores = evaluate(config, arms, rewards, prompts, embeddings, arguments.seed, page.keep if page else None)
    found = summary(scores)
    print(text_table(*figures(found)))
    if page:
        print(page.write(prompts, scores))
    if arguments.json:
        intervals = {name: {arm: one.to_json() for arm, one in of.items()} for name, of in found.items()}
        print(json.dumps({"images": len(prompts), "rewards": intervals}))


def _config_and_prompts(
    arguments: argparse.Namespace, overrides: list[str], given: list[str]
) -> tuple[Config, Path, list[str]]:
    """The config, the prompt file, and the prompts that are asked for: those ``given``, else the file's."""
    from leapalign.embedded import resolve
    from leapalign.prompts import read_prompts

    config = _config(arguments.config, arguments.run, overrides)
    file = Path(arguments.prompts or resolve(config.prompts.path))
    return config, file, given or read_prompts(file)


def _run_weights(arguments: argparse.Namespace) -> Path | None:
    """The weights of the run, where one is named."""
    from leapalign.checkpoint import run_weights

    return run_weights(arguments.run, arguments.weights) if arguments.run else None


def cache_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.config import load_config
    from leapalign.embedded import resolve
    from leapalign.fill_cache import fill_cache
    from leapalign.memory.placement import training_device

    config = load_config(arguments.config, overrides)
    path = Path(arguments.prompts or resolve(config.prompts.path))
    folder = Path(arguments.output or config.prompts.cache or PROMPT_CACHE)
    result = fill_cache(folder, config.model, path, training_device())
    print("{encoded} prompts encoded, {reused} reused, in {seconds:.1f} s".format(**result))
    print(f"{result['bytes'] / 2**20:,.1f} MiB in {folder}; train with prompts.cache={folder}")
    if arguments.json:
        print(json.dumps({**result, "cache": str(folder)}))


def export_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.export import export

    config = _config(None, arguments.run, overrides)
    written = export(arguments.run, config, arguments.output, arguments.weights, arguments.layout)
    print(f"{arguments.output}: {written}")


def memory_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.config import load_config
    from leapalign.memory.auto import fastest
    from leapalign.memory.fit import explanation, parse_size, summary
    from leapalign.memory.simulate import simulate

    gpu_memory = parse_size(arguments.gpu_memory)
    config = load_config(arguments.config, overrides)
    result: dict[str, Any] = {}
    if arguments.auto:
        settings, config, found = fastest(config, gpu_memory, lambda line: print(line, file=sys.stderr))
        result["settings"] = list(settings)
        print(f"The fastest settings that fit:\n  {' '.join(settings)}\n")
    else:
        found = simulate(config)
    print(explanation(found, gpu_memory, config))
    if arguments.json:
        print(json.dumps({**summary(found, gpu_memory, config), **result}))


def doctor_command(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from leapalign.doctor import diagnose, explanation

    report = diagnose()
    print(explanation(report))
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
