"""The one configuration: typed, frozen, validated. A preset is a YAML file of these keys.

Defaults follow the paper (arXiv 2510.01857) where it gives a value; what it does not have is off.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from airl_fast.trust import HOW_TO_TRUST

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DataConfig(Section):
    """Which prompts, and which of them come with a demonstration."""

    task: str = "arithmetic"
    path: str | None = None  # folder of the published files, or the JSON Lines file of task jsonl
    options: dict[str, int | float | str | bool | None] = {}  # keyword arguments of the task itself
    num_experts: Positive | None = None  # demonstrations used; None takes all
    num_dev: Positive = 96
    failing_experts: Literal["keep", "drop", "error"] = "drop"  # an expert whose answer fails its own verifier
    too_long: Literal["error", "drop"] = "error"  # a prompt or demonstration that exceeds a model's context
    system: str | None = None  # system message put before every prompt


class BuildConfig(Section):
    """A Qwen2 (or Llama) model and a byte-level BPE tokenizer made here, from the task's own text."""

    architecture: Literal["qwen2", "llama"] = "qwen2"
    vocab_size: Annotated[int, Field(ge=300)] = 384
    hidden_size: Positive = 64
    layers: Positive = 3
    heads: Positive = 4
    kv_heads: Positive = 2
    intermediate_size: Positive = 192
    max_length: Positive = 256


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) through PEFT; the paper's values."""

    rank: Positive = 128
    alpha: Positive = 32
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class ModelConfig(Section):
    path: str | None = None  # a local Hugging Face directory: config, weights, fast tokenizer
    build: BuildConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    fp32_logits: bool = False  # of log-probabilities; a bfloat16 model's are rounded by 2^-8
    quantise: Literal["nf4"] | None = None  # bitsandbytes; the frozen weights under the adapters
    lora: LoraConfig | None = None  # None trains every weight
    gradient_checkpointing: bool = False
    attention: Literal["auto", "flash_attn", "torch_flash", "sdpa"] = "auto"
    share_prompts: bool = True  # compute a group's prompt once
    trust_remote_code: bool = False  # run the Python files of model directories; no file can set it (see Config)
    chat_template: str | None = None  # a Jinja template used when the tokenizer brings none

    @model_validator(mode="after")
    def _one_source(self):
        if (self.path is None) == (self.build is None):
            raise ValueError("set exactly one of model.path (a local model directory) and model.build")
        if self.quantise is not None and self.lora is None:
            raise ValueError(
                f"model.quantise={self.quantise} freezes the weights, so nothing would be trained; "
                "set model.lora too, for example model.lora={}"
            )
        return self


class WarmStartConfig(Section):
    """Supervised steps before anything else, on the task's `warmstart` split. 0 updates starts from the model as is."""

    updates: Count = 0
    batch_size: Positive = 48
    learning_rate: Rate = 5e-3
    examples: Positive = 30_000


class OptimConfig(Section):
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"  # the 8-bit ones are bitsandbytes'
    learning_rate: Rate = 1e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    weight_decay: Rate = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    tokens_per_micro_batch: Positive = 65_536  # tokens of one forward; larger batches accumulate gradients


class PolicyConfig(Section):
    optim: OptimConfig = OptimConfig()
    epochs: Positive = 1  # PPO passes over one batch
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    kl_coef: Rate = 0.0  # weight of KL(policy || start policy), k3 estimator in the loss
    importance_sampling: Literal["none", "token", "sequence"] = "none"  # of trainer against sampler, truncated
    importance_ceiling: Annotated[float, Field(gt=0)] = 2.0
    expert_in_policy: Literal["none", "one", "balanced"] = "one"


class DiscriminatorConfig(Section):
    path: str = "policy"  # "policy" copies the start policy's backbone; else a local model directory
    quantise: Literal["nf4"] | None = None
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    head: Literal["linear", "action", "logprob"] = "linear"
    action_rank: Count = 0  # 0: a full [V, H] table; r > 0: U[y] = A E[y] of rank r over the token embedding
    loss: Literal["bce", "wgan", "pairwise"] = "bce"
    lipschitz: Literal["gradient_penalty", "spectral_norm"] | None = None  # WGAN needs one
    penalty_coef: Rate = 10.0
    margin: Rate = 1.0  # pairwise loss
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    neg_weight: Rate = 1.0  # weight of perturbed traces among the negatives
    perturbed_per_expert: Count = 1
    perturbed_per_prompt: Count = 0  # perturbed copies of policy traces, per prompt
    propagate: Fraction = 0.5  # share of perturbations whose error is carried through the later steps
    positives: Literal["expert", "expert_and_correct"] = "expert"
    replay_size: Count = 0  # old policy traces kept as negatives, in sequences
    replay_per_prompt: Count = 1
    warmup_steps: Count = 0  # discriminator updates before the first policy update
    warmup_learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # None: the optimiser's
    warmup_prompts: Positive = 256  # prompts the start policy is sampled on for the warm-up
    warmup_samples: Positive = 2
    warmup_batch: Positive = 16  # prompts per warm-up update
    updates_per_step: Count = 1  # 0 freezes it: an untrained reward, the control
    overlap: bool = False  # update it beside the next rollout: rewards come from the discriminator of a step before
    head_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    optim: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def _can_be_trained(self):
        if self.loss == "wgan" and self.lipschitz is None:
            raise ValueError("discriminator.loss=wgan needs discriminator.lipschitz=gradient_penalty or spectral_norm")
        if self.quantise is not None and self.lora is None:
            raise ValueError(
                f"discriminator.quantise={self.quantise} freezes the backbone's weights; set discriminator.lora too, "
                "for example discriminator.lora={}"
            )
        return self


class RewardConfig(Section):
    kind: Literal["logit", "gail", "logd"] = "logit"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    clip: Annotated[float, Field(gt=0)] | None = None
    granularity: Literal["dense", "interval", "sparse", "multiscale"] = "dense"
    interval: Count = 0  # 0: the task's step ends; n: every n tokens
    scale_weights: tuple[Rate, Rate, Rate] = (1.0, 1.0, 1.0)  # multiscale: step, think/answer block, trace
    score_before_update: bool = False
    outcome_weight: Rate = 0.0  # adds weight * correct to the last token's reward

    @model_validator(mode="after")
    def _some_scale_counts(self):
        if not any(self.scale_weights):
            raise ValueError("reward.scale_weights=[0, 0, 0] leaves no reward; give a scale a weight above 0")
        return self


class AdvantageConfig(Section):
    mode: Literal["discounted", "average", "leave_one_out"] = "discounted"
    gamma: Fraction = 0.9
    eps: Rate = 1e-6
    min_std: Rate = 0.0  # floor under the group's standard deviation
    position_baseline: bool = False  # subtract the group's mean advantage at the same completion position
    normalise: bool = False  # divide a batch's advantages by their root mean square


class RolloutConfig(Section):
    engine: Literal["builtin", "vllm"] = "builtin"
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4  # vLLM's share of the device's memory
    sync_ceiling: Annotated[float, Field(gt=0)] = 0.5  # mean |log-probability difference| that means a stale sampler
    prompts_per_step: Positive = 16
    samples_per_prompt: Annotated[int, Field(ge=1)] = 16
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 256
    batch_size: Positive = 2048  # sequences decoded at once
    cuda_graphs: bool = True  # the builtin engine's steps on a GPU

    @property
    def why_no_graphs(self) -> str | None:
        """Why the builtin engine's steps are not to be CUDA graphs; None where they may be."""
        return None if self.cuda_graphs else "rollout.cuda_graphs=false"


class EvaluateConfig(Section):
    prompts: Positive = 96
    samples: Positive = 16
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None  # of evaluation's samples; None takes rollout.top_p
    final: bool = True  # evaluate at the end of the run and write summary.json
    every: Count = 0  # dev pass@1 every n steps; 0 never
    baselines: tuple[Literal["sft", "grpo", "random"], ...] = ()
    workers: Count = 1  # processes that train the baselines beside the run; 0 trains them after it
    scorer: Literal["answer", "mean", "min_step", "last"] = "answer"  # of a trace, from its token rewards
    localise: Literal["largest_drop", "argmin", "first_below"] = "largest_drop"
    step_score: Literal["mean", "min"] = "mean"  # of a step, from its tokens, when localising


class GrpoConfig(Section):
    """Verifiable rewards of the GRPO baseline: one number a trace, added up with these weights."""

    correct: Rate = 1.0
    strict_format: Rate = 0.0
    soft_format: Rate = 0.0
    xml_count: Rate = 0.0
    integer: Rate = 0.0


class Config(Section):
    # Keys that `load_config` takes from the command line alone, with what to say where a file sets them.
    NEVER_FROM_A_FILE: ClassVar[dict[str, str]] = {
        "model.trust_remote_code": "it would run Python code that came with a model, which no file can allow; "
        + HOW_TO_TRUST
    }

    algorithm: Literal["airl", "sft", "grpo", "reward"] = "airl"  # reward: the discriminator alone, without a policy
    seed: Count = 0
    steps: Positive = 500
    device: str = "auto"
    threads: Count = 0  # torch threads; 0 leaves torch's choice
    output_dir: str = "runs"
    data: DataConfig = DataConfig()
    model: ModelConfig
    warm_start: WarmStartConfig = WarmStartConfig()
    policy: PolicyConfig = PolicyConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    baseline_overrides: dict[Literal["sft", "grpo", "random"], dict[str, Any]] = {}  # keys a baseline sets differently
    checkpoint_every: Count = 50
    keep_checkpoints: Positive = 2
    save_rollouts_every: Count = 1
    max_bad_steps: Positive = 3  # non-finite steps in a row before the run stops
    tensorboard: bool = True
    wandb: bool = False

    @property
    def learns_reward(self) -> bool:
        return self.algorithm in ("airl", "reward")

    @property
    def trains_policy(self) -> bool:
        return self.algorithm != "reward"

    @property
    def why_no_graphs(self) -> str | None:
        """The same while this trains: torch refuses a draw from its global generator, such as dropout's, while another
        thread captures."""
        lora = self.discriminator.lora
        if self.learns_reward and self.discriminator.overlap and lora is not None and lora.dropout > 0:
            return f"discriminator.lora.dropout={lora.dropout} draws beside it (discriminator.overlap)"
        return self.rollout.why_no_graphs

    @model_validator(mode="after")
    def _adapters_fit_together(self):
        discriminator, lora = self.discriminator, self.model.lora
        if lora is not None and lora.dropout > 0 and self.algorithm != "sft":
            raise ValueError(
                f"model.lora.dropout={lora.dropout} would make the ratio of the policy to its sampler noise, which "
                "PPO's clip takes for change; set it to 0 (discriminator.lora.dropout and algorithm=sft may use it)"
            )
        if discriminator.path == "policy" and self.learns_reward:
            if discriminator.lora is not None and discriminator.quantise != self.model.quantise:
                raise ValueError(
                    "discriminator.path=policy shares the policy's frozen weights as they are; set "
                    "discriminator.quantise to the value of model.quantise, or discriminator.path to a directory"
                )
            if discriminator.lora is None and self.model.quantise is not None:
                raise ValueError(
                    "discriminator.path=policy would train the policy's 4-bit weights, which is impossible; set "
                    "discriminator.lora and discriminator.quantise, or discriminator.path to a directory"
                )
        return self

    @model_validator(mode="after")
    def _groups_are_usable(self):
        """GRPO learns from how a prompt's samples differ; AIRL's groups hold the demonstration besides."""
        if self.algorithm == "grpo" and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                "algorithm=grpo has zero usable groups with rollout.samples_per_prompt=1, because it compares the "
                "samples of a prompt; set rollout.samples_per_prompt to 2 or more"
            )
        if self.algorithm == "grpo" and not any(self.grpo.model_dump().values()):
            raise ValueError(
                "algorithm=grpo has zero usable groups because every weight of the section grpo is 0; "
                "set one, such as grpo.correct=1"
            )
        return self

    @model_validator(mode="after")
    def _reward_alone_has_what_it_learns_from(self):
        """Without a policy the only negatives are perturbed demonstrations; what reads samples would do nothing."""
        if self.algorithm != "reward":
            return self
        discriminator, cannot = self.discriminator, "algorithm=reward"
        if discriminator.perturbed_per_expert == 0:
            raise ValueError(
                f"{cannot} learns from demonstrations and their perturbed copies, but "
                "discriminator.perturbed_per_expert=0 makes none; set it to 1 or more"
            )
        if discriminator.updates_per_step == 0:
            raise ValueError(
                f"{cannot} trains nothing with discriminator.updates_per_step=0; set it to 1 or more, or use "
                "algorithm=airl for the control with an untrained reward"
            )
        if self.evaluate.baselines:
            named = ",".join(self.evaluate.baselines)
            raise ValueError(
                f"{cannot} trains no policy, so evaluate.baselines=[{named}] compares nothing; set it to []"
            )
        for setting, is_set in (
            ("perturbed_per_prompt", discriminator.perturbed_per_prompt > 0),
            ("replay_size", discriminator.replay_size > 0),
            ("warmup_steps", discriminator.warmup_steps > 0),
            ("positives", discriminator.positives != "expert"),
            ("overlap", discriminator.overlap),
        ):
            if is_set:
                value = getattr(discriminator, setting)
                raise ValueError(
                    f"{cannot} samples no policy, and discriminator.{setting}={value} is about its samples; "
                    "leave it out, or use algorithm=airl"
                )
        return self
