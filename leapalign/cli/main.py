"""The command line: ``leapalign demo | train | ... | doctor | kernels``, as ``leapalign --help`` lists them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from leapalign.cli import commands as run
from leapalign.cli.config_commands import config_command, configs_command
from leapalign.cli.libraries import growing_segments, no_hub_code, quiet_libraries
from leapalign.config.names import known_as
from leapalign.inputs.failures import user_error
from leapalign.inputs.paths import path_argument

OVERRIDES = "any config key can follow as section.key=value; leapalign config lists them all"
CONFIG = "YAML file, or a name from leapalign configs; given again, its keys go over those before; such as"
KERNELS = "kernels"  # everything behind this word belongs to leap_kernels
WITHOUT_CONFIG = ("config", "configs", "doctor")
CLOSED_PIPE = 141  # what a shell says of a process that SIGPIPE ended


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="leapalign", description="Align flow-matching image models with differentiable rewards."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('leapalign')}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="align the embedded tiny model, before and after", epilog=OVERRIDES)
    demo.set_defaults(execute=run.demo_command)

    train = commands.add_parser("train", help="train from a config, or continue a run", epilog=OVERRIDES)
    train.add_argument("--config", action="append", type=path_argument, help=f"{CONFIG} tiny")
    train.add_argument(
        "--resume", type=path_argument, metavar="RUN", help="run to continue, RUN/checkpoints/step-N, or latest"
    )
    train.add_argument(
        "--processes", type=int, default=1, metavar="N", help="on N GPUs of this machine, default 1 (docs/many_gpus.md)"
    )
    train.set_defaults(execute=run.train_command)

    generate = commands.add_parser("generate", help="images from a run or a base model", epilog=OVERRIDES)
    generate.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    generate.add_argument("--output", type=path_argument, required=True, help="folder for the images")
    generate.set_defaults(execute=run.generate_command)

    evaluate = commands.add_parser("evaluate", help="a run's mean rewards beside the base's", epilog=OVERRIDES)
    evaluate.add_argument("--page", type=path_argument, help="new folder for a page with the images side by side")
    evaluate.set_defaults(execute=run.evaluate_command)

    for command in (generate, evaluate):
        command.add_argument(
            "--config", action="append", type=path_argument, help=f"{CONFIG} tiny: names the base model"
        )
        command.add_argument(
            "--run", type=path_argument, help="run folder: its latest checkpoint is used, or RUN/checkpoints/step-N"
        )
        command.add_argument("--prompts", type=path_argument, help="prompt file, default the config's")
        command.add_argument("--seed", type=int, default=0, help="noise seed of the first image")

    probe = commands.add_parser("probe", help="where a reward's gradient leads, before training", epilog=OVERRIDES)
    probe.add_argument("--config", action="append", type=path_argument, required=True, help=f"{CONFIG} tiny")
    probe.add_argument("--prompts", type=path_argument, help="prompt file, default the config's")
    probe.add_argument("--images", type=int, default=16, help="to climb from, default 16")
    probe.add_argument("--steps", type=int, default=30, help="of the climb, each a fortieth of a latent's length long")
    probe.add_argument("--page", type=path_argument, help=f"new folder for a page of pictures, default {run.PROBE}")
    probe.add_argument("--seed", type=int, default=0, help="noise seed of the first image")
    probe.set_defaults(execute=run.probe_command)

    cache = commands.add_parser("cache", help="encode prompts once, for prompts.cache", epilog=OVERRIDES)
    cache.add_argument(
        "--config", action="append", type=path_argument, required=True, help=f"{CONFIG} tiny: names the model"
    )
    cache.add_argument("--prompts", type=path_argument, help="prompt file, default the config's")
    cache.add_argument(
        "--output", type=path_argument, help=f"folder, default the config's prompts.cache or {run.PROMPT_CACHE}"
    )
    cache.add_argument(
        "--quantization",
        choices=["int8"],
        help="text encoders with eight bits a weight, for small cards",
    )
    cache.set_defaults(execute=run.cache_command)

    export = commands.add_parser("export", help="a run's weights as other software reads them", epilog=OVERRIDES)
    export.add_argument("--run", type=path_argument, required=True, help="run folder, or RUN/checkpoints/step-N")
    export.add_argument(
        "--output", type=path_argument, required=True, help="new folder for the weights and their model card"
    )
    export.add_argument("--layout", choices=("diffusers", "original", "comfyui"), default="diffusers")
    export.set_defaults(execute=run.export_command)

    for command in (generate, evaluate, export):
        command.add_argument(
            "--weights", choices=("average", "last", "best"), default="average", help="of the run, default average"
        )
        command.add_argument("--step", type=int, help="of the run, default its latest checkpoint")

    memory = commands.add_parser("memory", help="simulate what an iteration needs, without a GPU", epilog=OVERRIDES)
    memory.add_argument("--config", action="append", type=path_argument, required=True, help=f"{CONFIG} flux1_dev/80gb")
    memory.add_argument("--gpu-memory", default="80GiB", help="what has to suffice, such as 24GiB")
    memory.add_argument("--auto", action="store_true", help="find the fastest settings that fit (minutes)")
    memory.set_defaults(execute=run.memory_command)

    doctor = commands.add_parser("doctor", help="versions, devices, and the backend of each kernel")
    doctor.set_defaults(execute=run.doctor_command)

    configs = commands.add_parser("configs", help="the ready configs: list them, print one, or copy it to be edited")
    configs.add_argument("name", type=path_argument, nargs="?", help="of the one to print or copy")
    configs.add_argument("--copy", type=path_argument, metavar="FILE", help="new file for it")
    configs.set_defaults(execute=configs_command)

    config = commands.add_parser("config", help="every key of a config, with type, default and meaning")
    config.add_argument("--json", action="store_true", help="print a JSON Schema of a config file")
    config.set_defaults(execute=config_command)

    commands.add_parser(KERNELS, help="list, explain, bench, audit or export the kernels", add_help=False)

    for command in (demo, train, evaluate, probe, cache, memory, doctor):
        command.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in ``argv`` (default: the process's arguments) and returns the exit code: 2 for bad input."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Who read the output has enough of it. What the interpreter flushes at its end must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


def _run(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == [KERNELS]:
        from leap_kernels.tools import main as kernels_main

        return kernels_main(argv[1:], program=f"leapalign {KERNELS}")
    parser = build_parser()
    # Overrides may stand anywhere between the options, which argparse's positionals do not allow.
    arguments, overrides = parser.parse_known_args(argv)
    for item in overrides:
        if arguments.command in WITHOUT_CONFIG:
            parser.error(f"unrecognized argument '{item}'; leapalign {arguments.command} takes no config keys")
        if item.startswith("-") or "=" not in item:
            known = known_as(item.lstrip("-").partition("=")[0])
            advice = f"; {known}" if known else ""
            parser.error(f"unrecognized argument '{item}'{advice}; config overrides read section.key=value")
    try:
        with no_hub_code():
            quiet_libraries()
            growing_segments()
            arguments.execute(arguments, overrides)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        told = user_error(error)
        if told is None:
            raise
        print(f"leapalign: {told}", file=sys.stderr)
        return 2
    return 0
