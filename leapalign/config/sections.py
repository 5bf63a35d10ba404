"""Every key of a configuration, section by section, with its type, default and meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from leapalign.config.kernels import KernelsConfig
from leapalign.config.measuring import DiagnosticsConfig, EvaluateConfig, SamplesConfig, WatchConfig
from leapalign.config.memory import MemoryConfig
from leapalign.config.rollout import RolloutConfig
from leapalign.inputs.bounds import (
    Decay,
    FiniteFloat,
    Images,
    NonNegativeFloat,
    NonNegativeInt,
    Pixels,
    PositiveFloat,
    PositiveInt,
    Steps,
)
from leapalign.inputs.paths import PathText
from leapalign.inputs.validation import shortened

CfgGradient = Literal["full", "detached"]
"""Which velocities of classifier-free guidance carry gradient."""


@dataclass(frozen=True)
class ModelConfig:
    path: PathText = "embedded:base"
    """Folder in diffusers layout, hub id, or ``embedded:base`` for the tiny model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights, and of the arithmetic in the transformer and the decoder; latents are float32."""
    guidance: NonNegativeFloat = 3.5
    """Guidance scale, for models distilled to take it as an input."""
    max_sequence_length: PositiveInt | None = None
    """Most tokens of a prompt, of text encoders but CLIP; default: as the model's own pipeline."""
    true_cfg_scale: NonNegativeFloat = 1.0
    """Classifier-free guidance, ``v_negative + scale (v_prompt - v_negative)``; 1: off, one velocity a step."""
    negative_prompt: str = ""
    """What images should not show, with ``true_cfg_scale`` above 1."""
    true_cfg_batched: bool = True
    """Both velocities in one forward; false: one after the other, which halves the activations."""
    cfg_gradient: CfgGradient = "full"
    """Through both velocities, or the prompt's alone, which is half the work, and not the gradient of what is drawn."""
    cfg_gradient_compensated: bool = False
    """Divides gradients by ``true_cfg_scale`` where it is above 1: what moves then depends less on the scale."""
    compile: bool = False
    """Compile the transformer's repeated blocks: minutes at first, faster afterwards."""
    lora_rank: Annotated[int, Field(ge=0, le=2**14)] = 0
    """Trains adapters of this rank beside frozen weights; 0: that of ``lora_path``, without which all weights are
    trained."""
    lora_alpha: PositiveFloat | None = None
    """Adapters are scaled by ``lora_alpha / lora_rank``; null: by 1, or as ``lora_path`` says."""
    lora_path: PathText | None = None
    """Adapters to start from, which say rank, alpha and layers: folder or hub id in diffusers' or PEFT's layout."""
    lora_targets: tuple[str, ...] = ()
    """How the names of adapted linear layers end; empty: all in the blocks but for modulation."""
    quantization: Literal["nf4", "int8"] | None = None
    """Of frozen weights in blocks, beside adapters, by bitsandbytes: 4.13 or 8.5 bits a weight; null: ``dtype``."""
    height: Pixels = 64
    """Of images, in pixels."""
    width: Pixels = 64
    """Of images, in pixels."""

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, and not all weights."""
        return bool(self.lora_rank or self.lora_path)

    @property
    def gradient_divisor(self) -> float:
        """What gradients are divided by."""
        return max(self.true_cfg_scale, 1.0) if self.cfg_gradient_compensated else 1.0


@dataclass(frozen=True)
class PromptsConfig:
    path: PathText = "embedded:training_prompts.txt"
    """Text file with one prompt a line, JSON lines with a ``prompt`` key, parquet file or dataset folder with a
    ``prompt`` column."""
    cache: PathText | None = None
    """Folder that ``leapalign cache`` filled: embeddings come from there, and no text encoder is loaded."""


HOST_OPTIMIZERS = ("adamw_8bit", "adafactor")
"""Those that take float32 gradients from host memory, whatever the dtype of the weights."""


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "adamw_8bit", "adafactor", "bnb_adamw_8bit", "bnb_paged_adamw_8bit"] = "adamw"
    """``adamw``: moments in the dtype of the weights; ``adamw_8bit``: in bytes; ``adafactor``: second moments by
    row and column, no first ones. These two round bfloat16 weights stochastically. ``bnb_``: bitsandbytes' own AdamW
    with moments in bytes, and with pages of them that leave the GPU when it is full; for float32 weights."""
    learning_rate: PositiveFloat = 1e-5
    """Of AdamW a weight's largest steady step; of adafactor the largest root mean square of a tensor's."""
    beta1: Decay = 0.9
    """Of the first moments, where there are any."""
    beta2: Decay = 0.999
    """Of the second moments; adafactor's is ``1 - n^-0.8`` at step n."""
    weight_decay: NonNegativeFloat = 1e-4
    """Share of a weight that a step takes off it, times the learning rate."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm is clipped to this."""
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """Of the learning rate over the run; the last two fall to 0."""
    warmup_iterations: NonNegativeInt = 0
    """Iteration i of these has ``i / warmup_iterations`` of the rate; ``constant`` has no warm-up."""


@dataclass(frozen=True)
class EmaConfig:
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the average, which lives in host memory; bfloat16 is rounded stochastically."""
    decay: Decay = 0.995
    """Share of itself that the average keeps at an update."""
    warmup: bool = False
    """Whether update n keeps at most ``n / (9 + n)``: a short run's average then forgets the base model."""
    start: NonNegativeInt = 0
    """Iterations before the first update; until then the average is the weights."""
    interval: PositiveInt = 1
    """Iterations between updates."""


@dataclass(frozen=True)
class TrainConfig:
    iterations: PositiveInt = 300
    """Optimizer steps of the run."""
    batch_size: Images = 32
    """Images per optimizer step."""
    microbatch: PositiveInt | None = None
    """Most samples in one forward with gradient; default: a whole rollout."""
    leaps_per_rollout: Steps = 1
    """Draws of the method on each rollout, which share its reward gradient; their mean is the gradient."""
    reward_chunk: PositiveInt | None = None
    """Most images decoded and rewarded at once with gradient; default: a whole rollout."""
    image_clamp: Literal["straight_through", "plain"] = "straight_through"
    """How gradient passes decoded values outside [0, 1]: unchanged, or not at all."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: PositiveInt = 100
    """Iterations between checkpoints; the last iteration is always saved."""
    keep: PositiveInt = 3
    """So many checkpoints stay; older ones but the best are deleted once the new one is on the disk."""


@dataclass(frozen=True)
class RegularizationConfig:
    base_velocity: NonNegativeFloat = 0.0
    """Weight of the mean squared distance of the velocities that carry gradient to the base model's, at the same
    latents and noise levels (docs/methods.md); 0: off, and not measured."""


@dataclass(frozen=True)
class Config:
    output: PathText = "runs/leapalign"
    """The run folder."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every random number of a run follows from it."""
    threshold: FiniteFloat = 0.55
    """``lambda`` of the loss: an image whose reward lies above it carries no gradient."""
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    method: dict[str, Any] = field(default_factory=lambda: {"name": "leapalign"})
    """``name`` and the method's own options."""
    reward: dict[str, Any] | list[dict[str, Any]] = field(
        default_factory=lambda: {"name": "pickscore", "path": "embedded:reward"}
    )
    """``name`` and the reward's own options; or several of these, each with a ``weight`` (default 1) and a
    ``threshold`` (default ``threshold``)."""
    equal_reward_gradients: bool = False
    """Of several rewards, scale each one's gradient, image by image, to the norm of the first one's."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        if self.train.batch_size % min(self.rollout.batch_size, self.train.batch_size):
            raise ValueError(
                f"train.batch_size {self.train.batch_size} must be a multiple of rollout.batch_size "
                f"{self.rollout.batch_size}"
            )
        if self.model.cfg_gradient == "detached" and self.model.true_cfg_scale == 0:
            raise ValueError(
                "at model.true_cfg_scale 0 all gradient is the negative prompt's; set model.cfg_gradient to full"
            )
        self._check_memory()
        if self.model.lora_alpha is not None and not self.model.adapted:
            raise ValueError("model.lora_alpha scales adapters; set model.lora_rank, too")
        if self.model.lora_targets and not self.model.adapted:
            raise ValueError("model.lora_targets are layers with adapters; set model.lora_rank, too")
        for section, values in (("method", [self.method]), ("reward", self.rewards)):
            if not values or any("name" not in one for one in values):
                raise ValueError(f"'{section}.name' is missing; add it")
        for section, rewards in (("evaluate", self.evaluate.rewards), ("watch", self.watch.rewards)):
            if any("name" not in reward for reward in rewards):
                raise ValueError(f"a reward of {section}.rewards has no name; add it, as in [{{name: hpsv2}}]")
        for named in (self.method, *self.rewards, *self.evaluate.rewards, *self.watch.rewards):
            if not isinstance(named["name"], str):
                raise ValueError(f"{shortened(repr(named['name']))} is no name of a method or reward; write a word")
        self._check_watch()

    @property
    def rewards(self) -> list[dict[str, Any]]:
        """The one reward, or all."""
        return self.reward if isinstance(self.reward, list) else [self.reward]

    def _check_watch(self) -> None:
        watch = self.watch
        if watch.stop_when and not watch.every:
            raise ValueError("watch.stop_when needs measurements; set watch.every")
        if watch.every and watch.prompts is None:
            raise ValueError("watch.every needs held-out prompts; set watch.prompts to a file of them")
        if watch.every and self.checkpoint.every % watch.every:
            raise ValueError(
                f"checkpoint.every {self.checkpoint.every} must be a multiple of watch.every {watch.every}, so that "
                "each checkpoint is measured; change one of them"
            )

    def _check_memory(self) -> None:
        memory = self.memory
        if memory.optimizer == "host" and self.optimizer.name not in HOST_OPTIMIZERS:
            raise ValueError(
                f"memory.optimizer host needs optimizer.name {' or '.join(HOST_OPTIMIZERS)}; set one of them"
            )
        if memory.optimizer == "host" and self.diagnostics.true_gradient_every:
            raise ValueError(
                "diagnostics.true_gradient_every needs gradients on the device; set it to 0, or memory.optimizer to "
                "device"
            )
        if memory.optimizer == "host" and self.model.adapted:
            raise ValueError("adapters are small enough for the device; set memory.optimizer to device")
        if memory.weights == "streamed" and memory.optimizer == "device" and not self.model.adapted:
            raise ValueError("memory.weights streamed needs memory.optimizer host, where the weights live; set it")
        if memory.weights == "streamed" and self.regularization.base_velocity and not self.model.adapted:
            raise ValueError(
                "regularization.base_velocity cannot change weights that stream for the base's; set memory.weights to "
                "resident, or train adapters (model.lora_rank)"
            )
        if self.regularization.base_velocity and self.diagnostics.true_gradient_every:
            raise ValueError(
                "diagnostics.true_gradient_every compares gradients of the reward alone; set it to 0, or "
                "regularization.base_velocity to 0"
            )
        if self.model.quantization and not self.model.adapted:
            raise ValueError(
                "model.quantization rounds weights that stay frozen; train adapters (model.lora_rank), or set it to "
                "null"
            )
        if self.model.quantization and memory.weights == "streamed":
            raise ValueError("quantized weights are not streamed; set memory.weights to resident")
        if memory.weights == "streamed" and self.model.compile:
            raise ValueError("compiled blocks cannot be streamed; set model.compile to false")
        if memory.weights == "streamed" and (memory.checkpointing != "blocks" or memory.checkpoint_every != 1):
            raise ValueError(
                "memory.weights streamed needs every block recomputed, as a whole; set memory.checkpointing to blocks "
                "and memory.checkpoint_every to 1"
            )
