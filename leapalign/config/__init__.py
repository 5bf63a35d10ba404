"""The run's configuration: one YAML file, validated into dataclasses, any key overridable as ``section.key=value``."""

from leapalign.config.files import config_from, load_config, override, read_config, save_config
from leapalign.config.measuring import DiagnosticsConfig, EvaluateConfig, SamplesConfig, WatchConfig
from leapalign.config.sections import (
    HOST_OPTIMIZERS,
    CheckpointConfig,
    Config,
    EmaConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    PromptsConfig,
    RegularizationConfig,
    RolloutConfig,
    TrainConfig,
)

__all__ = [
    "HOST_OPTIMIZERS",
    "CheckpointConfig",
    "Config",
    "DiagnosticsConfig",
    "EmaConfig",
    "EvaluateConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "RegularizationConfig",
    "RolloutConfig",
    "SamplesConfig",
    "TrainConfig",
    "WatchConfig",
    "config_from",
    "load_config",
    "override",
    "read_config",
    "save_config",
]
