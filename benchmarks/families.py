"""What the models of four families need in the profiles of FLUX.1-dev, simulated.

    python benchmarks/families.py > benchmarks/results/families.jsonl

All weights are trained. Models that do not take guidance as an input sample with classifier-free guidance, one velocity
after the other.
"""

from __future__ import annotations

import json
from pathlib import Path

from leapalign.config import load_config
from leapalign.planning.simulate import simulate, step_seconds

CONFIGS = Path(__file__).parents[1] / "configs" / "flux1_dev"
PROFILES = ("80gb", "48gb", "24gb")
GUIDED = ("model.true_cfg_scale=4", "model.true_cfg_batched=false")
MODELS = {
    "black-forest-labs/FLUX.1-dev": (),
    "black-forest-labs/FLUX.2-klein-base-9B": GUIDED,
    "stabilityai/stable-diffusion-3.5-large": GUIDED,
    "Qwen/Qwen-Image": GUIDED,
}


def main() -> None:
    for model, settings in MODELS.items():
        for profile in PROFILES:
            found = simulate(load_config(CONFIGS / f"{profile}.yaml", (f"model.path={model}", *settings)))
            seconds = step_seconds(found, "RTX 4090" if profile == "24gb" else "H100")
            line = {
                "model": model,
                "profile": profile,
                "trainable_parameters": found.trainable_parameters,
                "device_peak_bytes": found.device_peak,
                "host_peak_bytes": found.host_peak,
                "transfer_per_compute": {
                    name: seconds[name]["transfer"] / seconds[name]["compute"] for name in ("rollout", "surrogate")
                },
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
