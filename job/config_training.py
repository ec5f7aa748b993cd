"""The settings of model and training: the sections from `model` and `train` to `tracking`."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from job.setting_kinds import AUTO, Duration, Section, StepRange, setting

DeviceSetting = Literal["auto", "cuda", "cpu"]
Initialisation = Literal["default", "zero_projections"]
_LARGEST_BATCH_SEQUENCES = 2**20
_LEAST_TEMPERATURE = 1e-3
"""Lower limit of a temperature above 0: with it, the most likely token is nearly always taken."""
_LARGEST_WIDTH = 2**20
"""Upper limit of a layer's width: ten times the width of the largest known models."""


class Model(Section):
    """The architecture and the sizes of the model. The vocabulary size is the tokenizer's."""

    architecture: str = setting(
        "qwen2",
        "Architecture of the model: a name in job/model/architecture.py. qwen3 has no biases and normalizes queries "
        "and keys (QK-norm), for stability at large learning rates and in fp16. It is no gain in quality: pilot runs "
        "were worse with it in 5 of 5 pairs, on average by 0.8 % in bits per byte",
    )
    hidden_size: int = setting(512, "Width of the residual stream", unit="features", ge=1, le=_LARGEST_WIDTH)
    num_hidden_layers: int = setting(12, "Number of transformer layers", unit="layers", ge=1, le=2**16)
    num_attention_heads: int = setting(8, "Number of query heads", unit="heads", ge=1, le=2**16)
    num_key_value_heads: int = setting(
        2, "Number of key and value heads; each serves a group of query heads", unit="heads", ge=1, le=2**16
    )
    intermediate_size: int = setting(
        2048, "Width inside the feed-forward layers", unit="features", ge=1, le=_LARGEST_WIDTH
    )
    tie_word_embeddings: bool = setting(True, "Use the input embedding as the output head")
    rope_theta: float = setting(1_000_000.0, "Base of the rotary position embedding", gt=0)
    rms_norm_eps: float = setting(1e-6, "Number that RMSNorm adds to the mean square", gt=0)
    initializer_range: float = setting(0.02, "Standard deviation of the initial weights", gt=0)
    init: Initialisation = setting(
        "default",
        "How the weights begin. default: all matrices are random; zero_projections: o_proj and down_proj, the output "
        "projections of attention and of the feed-forward layers, are 0, so that each layer begins as the identity. "
        "With train.optimizer adamw that makes the result worse",
    )


class Train(Section):
    """The training run."""

    strategy: Literal["auto", "zero2", "ddp"] = setting(
        AUTO,
        "How processes share the work. zero2: DeepSpeed ZeRO stage 2; ddp: DistributedDataParallel of PyTorch; auto: "
        "ddp for one process and for fp16, else zero2",
    )
    device: DeviceSetting = setting(
        "auto", "Device to compute on; auto: the GPUs of this machine, or its CPU if it has no GPU"
    )
    processes: int | None = setting(
        None,
        "Training processes on this machine; null: one for each GPU, or 1 without a GPU",
        unit="processes",
        ge=1,
        le=1024,
    )
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = setting(
        AUTO,
        "Number format of matrix products; fp16 scales the loss and needs ddp; tf32 (fp32 with 10 bits of mantissa) "
        "needs a GPU; auto: bf16, or fp16 on GPUs without bf16 (before Ampere)",
    )
    compile: bool | None = setting(
        None,
        "Compile the training step with torch.compile; null: on a GPU only. If compiling fails, training goes on "
        "without it",
    )
    context_length: int = setting(
        512, "Tokens in one sequence, which the model sees at once", unit="tokens", ge=2, le=2**24
    )
    micro_batch_size: Annotated[int, Field(ge=1, le=_LARGEST_BATCH_SEQUENCES)] | Literal["auto"] = setting(
        AUTO,
        "Sequences in one forward pass of one process; auto: as many as fit into the GPU's memory, or 32 on a CPU. It "
        "changes neither the batch nor the result beyond rounding",
        unit="sequences",
    )
    global_batch_size: int = setting(
        256,
        "Sequences in one optimizer step: micro_batch_size x processes x gradient accumulation steps",
        unit="sequences",
        ge=1,
        le=_LARGEST_BATCH_SEQUENCES,
    )
    epochs: int = setting(2, "Passes over the training shards", unit="epochs", ge=1, le=10**9)
    max_steps: int | None = setting(
        None, "Stop after this number of optimizer steps; null: after the last epoch", unit="steps", ge=1
    )
    optimizer: str = setting(
        "adamw",
        "Optimizer. adamw; or muon: Muon for the matrices of the layers and AdamW for embedding, norms and biases, "
        "which needs fewer steps (a name in job/training/optimizer.py)",
    )
    learning_rate: float = setting(5e-4, "Peak learning rate", gt=0)
    muon_learning_rate: float = setting(
        0.02,
        "Muon's peak learning rate, for the matrices of the layers; learning_rate is then that of all other "
        "parameters. Both rise and fall together",
        gt=0,
    )
    muon_momentum: float = setting(0.95, "Muon's decay rate of the momentum", ge=0, lt=1)
    min_learning_rate: float = setting(0.0, "Learning rate at the end of the schedule", ge=0)
    schedule: Literal["cosine", "linear", "wsd"] = setting(
        "cosine",
        "How the learning rate falls after the warm-up. cosine: as half a cosine, until the end of the run; linear: in "
        "a straight line, until the end of the run; wsd (warm-up, stable, decay): it stays at its peak, and falls in a "
        "straight line over the last train.decay_steps steps",
    )
    warmup_steps: int = setting(200, "Length of the linear warm-up of the learning rate", unit="steps", ge=0)
    decay_steps: int | None = setting(
        None, "Length of the decay of schedule wsd; null: 20 % of the run's steps, rounded up", unit="steps", ge=1
    )
    weight_decay: float = setting(0.1, "Weight decay of the matrices; other parameters have none", ge=0)
    beta1: float = setting(0.9, "AdamW's decay rate of the first moment", ge=0, lt=1)
    beta2: float = setting(0.999, "AdamW's decay rate of the second moment", ge=0, lt=1)
    epsilon: float = setting(1e-8, "AdamW's epsilon", gt=0)
    gradient_clipping: float = setting(
        1.0, "Largest norm of the gradient; longer ones are scaled down; 0: no limit", ge=0
    )
    loss_chunk_tokens: int | None = setting(
        None,
        "Tokens whose logits are in memory at the same time; null: as many as fit into 256 MiB, or on a GPU into 1/16 "
        "of its memory, at most 8 GiB",
        unit="tokens",
        ge=1,
        le=2**40,
    )
    document_masking: bool = setting(
        False,
        "Let tokens attend only to tokens of the same document. Fast on a GPU in bf16; slower elsewhere, where an "
        "attention mask is used",
    )
    flash_attention_3: bool = setting(
        False,
        "Compute attention with FlashAttention-3, which needs a Hopper GPU and its package; without them training says "
        "so and goes on without it",
    )
    seed: int = setting(2333, "Random seed of the initial weights", ge=0, lt=2**63)
    log_every: int = setting(10, "Interval between two log lines", unit="steps", ge=1)
    profile_steps: StepRange | None = setting(
        None,
        "Steps during which rank 0 is profiled, as FIRST:END; 10:13 are three steps. The trace goes to the folder "
        "logs of run.output; null: no profile",
    )
    resume: str = setting(
        "auto",
        "Where training begins. auto: at the newest good checkpoint of the run, or at step 0 if it has none; never: at "
        "step 0; a URL: at that checkpoint. Later attempts with the same URL, or with never in the same job of a "
        "scheduler, resume the run",
    )
    max_time: Duration | None = setting(
        None, "Longest time of one attempt, such as 3h50m; it saves and stops before that; null: no limit"
    )
    stop_file: str | None = setting(
        None, "Stop the run when this file or object exists: a path or a URL; null: no stop file", min_length=1
    )
    max_attempts_without_progress: int = setting(
        3,
        "Attempts without one new checkpoint, after which the next attempt gives up with exit code 70",
        unit="attempts",
        ge=1,
    )
    max_skipped_steps: int = setting(
        10,
        "Steps skipped in a row, because of a loss or gradient that is not finite or a spike, after which the run "
        "gives up with exit code 70",
        unit="steps",
        ge=1,
    )
    spike_factor: float | None = setting(
        None,
        "Skip a step if its gradient norm is more than this many times the running median; null: skip a step only if "
        "its loss or gradient is not finite",
        gt=1,
    )
    node_timeout: Duration = setting("15m", "Longest wait for the other nodes when a run starts on several nodes")
    hang_timeout: Duration = setting(
        "10m", "Longest time without a heartbeat of a process; after it the run stops and names the process"
    )

    def compiles(self, on_gpu: bool) -> bool:
        """Return True if the training step is to be compiled."""
        return on_gpu if self.compile is None else self.compile


class Checkpoint(Section):
    """When checkpoints are written, and how many are kept."""

    every: int = setting(500, "Interval between two checkpoints", unit="steps", ge=1)
    every_minutes: float | None = setting(
        None,
        "Longest time between two checkpoints, in addition to `every`; null: no such limit",
        unit="minutes",
        gt=0,
        le=525_600,
    )
    keep: int = setting(10, "Number of newest checkpoints that are kept", unit="checkpoints", ge=1)
    keep_every: int | None = setting(
        None,
        "Keep the first checkpoint of each interval of this length forever, in addition to the newest ones; null: none",
        unit="steps",
        ge=1,
    )
    stop_deadline: Duration = setting("5m", "Longest wait for the last checkpoint when the run is asked to stop")
    scratch_dir: str | None = setting(
        None, "Folder into which a checkpoint is downloaded; null: WIKILLM_SCRATCH if set, else the temporary folder"
    )


class Evaluate(Section):
    """The validation loss, during training and by `job evaluate`."""

    every: int = setting(500, "Interval between two validations during training", unit="steps", ge=1)
    max_windows: int | None = setting(
        None,
        "Sequences evaluated in each validation during training, spread over the validation shards; null: all",
        unit="sequences",
        ge=1,
    )
    batch_size: int = setting(
        32, "Sequences in one forward pass of one process", unit="sequences", ge=1, le=_LARGEST_BATCH_SEQUENCES
    )
    model: str | None = setting(
        None, "What `job evaluate` evaluates: a run, a checkpoint or a model folder; null: run.output"
    )


class Generate(Section):
    """Continuations of prompts, during training and by `job generate`."""

    model: str | None = setting(
        None, "Model that `job generate` uses: a run, a checkpoint or a model folder; null: run.output"
    )
    prompts: list[str] = setting(["人工智能", "牛顿", "北京市", "亚洲历史"], "Texts to continue", min_length=1)
    max_new_tokens: int = setting(200, "Longest continuation", unit="tokens", ge=1, le=2**24)
    temperature: float = setting(
        0.8, "Number by which logits are divided before sampling; 0: always take the most likely token"
    )
    top_p: float = setting(
        0.95,
        "Sample from the most likely tokens whose probabilities add up to this number, from 0 to 1",
        gt=0,
        le=1,
    )
    samples: int = setting(
        1, "Continuations of each prompt by `job generate`; training makes one", unit="texts", ge=1, le=2**16
    )
    seed: int | None = setting(
        None,
        "Random seed of the sampling; null: other texts each time in `job generate`, which prints the seed, and always "
        "the same seed in training, so that its samples differ only by the weights",
        ge=0,
        lt=2**63,
    )

    @field_validator("temperature")
    @classmethod
    def _is_0_or_far_from_it(cls, value: float) -> float:
        """Refuse numbers by which a logit cannot be divided: the quotient is too large for a float32."""
        if value != 0 and value < _LEAST_TEMPERATURE:
            raise ValueError(f"0, or at least {_LEAST_TEMPERATURE:g}")
        return value


class Tracking(Section):
    """Trackers, which show the metrics of a run. logs/metrics.jsonl of the run has the metrics without any tracker."""

    to: list[str] = setting(
        ["swanlab"],
        "Trackers that get the numbers: swanlab, tensorboard (event files in log_dir; needs the package tensorboard), "
        "both as [swanlab, tensorboard], or none as []",
    )
    mode: Literal["auto", "cloud", "local", "offline", "disabled"] = setting(
        "auto",
        "SwanLab's mode. cloud: needs an API key; local: for `swanlab watch`; offline: for `swanlab sync`; disabled: "
        "no SwanLab; auto: cloud if there is a key, else local if the dashboard is installed, else offline",
    )
    project: str = setting("WikiLLM", "Project in SwanLab", pattern=r"^[0-9a-zA-Z_\-+.]{1,100}$")
    workspace: str | None = setting(
        None, "Workspace (user or team) in SwanLab; null: that of the API key", pattern=r"^[0-9a-zA-Z_\-]{1,25}$"
    )
    log_dir: str | None = setting(
        None,
        "Folder for the trackers' files on this machine; null: swanlog in WIKILLM_SCRATCH if that is set, else swanlog "
        "in the working directory",
    )

    @field_validator("to", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        """Accept the names as one text, ``swanlab,tensorboard``, which is how command lines often write a list."""
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value
