"""The command line: ``leapalign demo | train | generate | evaluate | export | cache | memory | doctor | kernels``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from leapalign.cli import commands as run
from leapalign.cli.libraries import no_hub_code, quiet_libraries
from leapalign.inputs.failures import user_error

OVERRIDES = "any config key can follow as section.key=value"
KERNELS = "kernels"  # everything behind this word belongs to leap_kernels


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="leapalign", description="Align flow-matching image models with differentiable rewards."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="align the embedded tiny model, before and after", epilog=OVERRIDES)
    demo.set_defaults(execute=run.demo_command)

    train = commands.add_parser("train", help="train from a config, or continue a run", epilog=OVERRIDES)
    train.add_argument("--config", type=Path, help="YAML file, see configs/tiny.yaml")
    train.add_argument("--resume", type=Path, metavar="RUN", help="run to continue, RUN/checkpoints/step-N, or latest")
    train.set_defaults(execute=run.train_command)

    generate = commands.add_parser("generate", help="images from a run or a base model", epilog=OVERRIDES)
    generate.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    generate.add_argument("--output", type=Path, required=True, help="folder for the images")
    generate.set_defaults(execute=run.generate_command)

    evaluate = commands.add_parser("evaluate", help="a run's mean rewards beside the base's", epilog=OVERRIDES)
    evaluate.add_argument("--page", type=Path, help="new folder for a page with the images side by side")
    evaluate.set_defaults(execute=run.evaluate_command)

    for command in (generate, evaluate):
        command.add_argument("--config", type=Path, help="YAML file naming the base model")
        command.add_argument(
            "--run", type=Path, help="run folder: its latest checkpoint is used, or RUN/checkpoints/step-N"
        )
        command.add_argument("--prompts", type=Path, help="prompt file, default the config's")
        command.add_argument("--seed", type=int, default=0, help="noise seed of the first image")

    cache = commands.add_parser("cache", help="encode prompts once, for prompts.cache", epilog=OVERRIDES)
    cache.add_argument("--config", type=Path, required=True, help="YAML file naming the model")
    cache.add_argument("--prompts", type=Path, help="prompt file, default the config's")
    cache.add_argument("--output", type=Path, help=f"folder, default the config's prompts.cache or {run.PROMPT_CACHE}")
    cache.set_defaults(execute=run.cache_command)

    export = commands.add_parser("export", help="a run's weights as other software reads them", epilog=OVERRIDES)
    export.add_argument("--run", type=Path, required=True, help="run folder, or RUN/checkpoints/step-N")
    export.add_argument("--output", type=Path, required=True, help="new folder for the weights and their model card")
    export.add_argument("--layout", choices=("diffusers", "original", "comfyui"), default="diffusers")
    export.set_defaults(execute=run.export_command)

    for command in (generate, evaluate, export):
        command.add_argument(
            "--weights", choices=("average", "last", "best"), default="average", help="of the run, default average"
        )
        command.add_argument("--step", type=int, help="of the run, default its latest checkpoint")

    memory = commands.add_parser("memory", help="simulate what an iteration needs, without a GPU", epilog=OVERRIDES)
    memory.add_argument("--config", type=Path, required=True, help="YAML file, see configs/flux1_dev")
    memory.add_argument("--gpu-memory", default="80GiB", help="what has to suffice, such as 24GiB")
    memory.add_argument("--auto", action="store_true", help="find the fastest settings that fit (minutes)")
    memory.set_defaults(execute=run.memory_command)

    doctor = commands.add_parser("doctor", help="versions, devices, and the backend of each kernel")
    doctor.set_defaults(execute=run.doctor_command)

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
