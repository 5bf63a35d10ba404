"""The run's configuration: one YAML file, validated into dataclasses, any key overridable as ``section.key=value``."""

from leapalign.config.files import config_from, load_config, override, read_config, save_config
from leapalign.config.kernels import KernelsConfig
from leapalign.config.measuring import DiagnosticsConfig, EvaluateConfig, SamplesConfig, WatchConfig
from leapalign.config.memory import MemoryConfig
from leapalign.config.rollout import CacheConfig, RolloutConfig, SigmaSpacing
from leapalign.config.sections import (
    HOST_OPTIMIZERS,
    CfgGradient,
    CheckpointConfig,
    Config,
    EmaConfig,
    ModelConfig,
    OptimizerConfig,
    PromptsConfig,
    RegularizationConfig,
    TrainConfig,
)

__all__ = [
    "HOST_OPTIMIZERS",
    "CacheConfig",
    "CfgGradient",
    "CheckpointConfig",
    "Config",
    "DiagnosticsConfig",
    "EmaConfig",
    "EvaluateConfig",
    "KernelsConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "RegularizationConfig",
    "RolloutConfig",
    "SamplesConfig",
    "SigmaSpacing",
    "TrainConfig",
    "WatchConfig",
    "config_from",
    "load_config",
    "override",
    "read_config",
    "save_config",
]
