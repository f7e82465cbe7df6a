# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Config of LoRA and the configs of its initialisations and variants."""

import dataclasses
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal

from ...config import PeftConfig
from ...configs.checks import check_layer_selection, check_names, check_types
from ...configs.fields import Indices, Names, option, shared_field
from ...registry import PeftType, TaskType
from ...utils.warning import warn


def _found_out(text: str) -> Any:
    """A field that is set by the method, not by the user."""
    return field(default=None, init=False, metadata={"help": text})


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


@dataclass
class LoraRuntimeConfig:
    """
    Settings that hold for one run and are not saved.

    Args:
        ephemeral_gpu_offload: move weights to the accelerator only while they are initialised.
    """

    ephemeral_gpu_offload: bool = option(False, "Use the accelerator for the start-up computations only.")


@dataclass
class LoftQConfig:
    """
    Settings of the LoftQ initialisation (Li et al. 2023, arXiv:2310.08659).

    Args:
        loftq_bits: bits per quantised weight.
        loftq_iter: alternating steps between quantising and fitting the factors.
    """

    loftq_bits: int = option(4, "Bits per quantised weight.")
    loftq_iter: int = option(1, "Alternating steps between quantising and fitting the factors.")


@dataclass
class EvaConfig:
    """
    Settings of the EVA initialisation (Paischer et al. 2024, arXiv:2410.07170).

    Args:
        rho: most that a layer's rank may grow, as a factor of `r`; at least 1.
        tau: cosine similarity (0 to 1) from which on a component counts as settled.
        use_label_mask: leave out positions whose label is `label_mask_value`.
        label_mask_value: label of positions to leave out.
        whiten: scale the components to unit variance.
        adjust_scaling_factors: rescale alpha when ranks are redistributed.
    """

    rho: float = option(2.0, "Most that a layer's rank may grow, as a factor of r.")
    tau: float = option(0.99, "Cosine similarity from which on a component counts as settled.")
    use_label_mask: bool = option(True, "Leave out positions whose label is label_mask_value.")
    label_mask_value: int = option(-100, "Label of positions to leave out.")
    whiten: bool = option(False, "Scale the components to unit variance.")
    adjust_scaling_factors: bool = option(True, "Rescale alpha when ranks are redistributed.")

    def __post_init__(self) -> None:
        _require(self.rho >= 1.0, f"rho must be at least 1, found {self.rho}")
        _require(0.0 <= self.tau <= 1.0, f"tau must lie between 0 and 1, found {self.tau}")


@dataclass
class CordaConfig:
    """
    Settings of the CorDA initialisation (Yang et al. 2024, arXiv:2406.05223).

    Args:
        cache_file: file for the decomposed weights.
        covariance_file: file for the covariances of the layers' inputs.
        corda_method: "ipm" adapts to the instructions, "kpm" preserves knowledge.
        verbose: say what is being done.
        use_float16_for_covariance: gather the covariances in float16.
        prune_temporary_fields: free what the preparation has left on the modules.
    """

    cache_file: str | None = option(None, "File for the decomposed weights.")
    covariance_file: str | None = option(None, "File for the covariances of the layers' inputs.")
    corda_method: Literal["ipm", "kpm"] = option("ipm", "Adapt to the instructions (ipm) or preserve knowledge (kpm).")
    verbose: bool = option(False, "Say what is being done.")
    use_float16_for_covariance: bool = option(False, "Gather the covariances in float16.")
    prune_temporary_fields: bool = option(True, "Free what the preparation has left on the modules.")


@dataclass
class LoraGAConfig:
    """
    Settings of the LoRA-GA initialisation (Wang et al. 2024, arXiv:2407.05000).

    Args:
        direction: which singular directions of the gradient the factors take.
        scale: how the factors are scaled.
        stable_gamma: gamma of the "stable" scale.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = option("ArB2r", "Singular directions of the factors.")
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = option("stable", "How the factors are scaled.")
    stable_gamma: int = option(16, "Gamma of the stable scale.")


@dataclass
class ArrowConfig:
    """
    Settings of Arrow routing between LoRA experts (Ostapenko et al. 2024, arXiv:2405.11157).

    Args:
        top_k: experts per token.
        router_temperature: temperature of the softmax over experts.
        use_gks: subtract general-knowledge adapters.
        rng_seed: seed for ties between experts.

    Attributes:
        task_adapter_names: names of the experts.
        gks_adapter_names: names of the general-knowledge adapters.
    """

    top_k: int = option(3, "Experts per token.")
    router_temperature: float = option(1.0, "Temperature of the softmax over experts.")
    use_gks: bool = option(False, "Subtract general-knowledge adapters.")
    task_adapter_names: list[str] | None = _found_out("Names of the experts.")
    gks_adapter_names: list[str] | None = _found_out("Names of the general-knowledge adapters.")
    rng_seed: int | None = option(None, "Seed for ties between experts.")

    def __post_init__(self) -> None:
        _require(self.top_k > 0, f"top_k must be positive, found {self.top_k}")
        _require(self.router_temperature > 0, f"router_temperature must be positive, found {self.router_temperature}")


@dataclass
class BdLoraConfig:
    """
    Settings of block-diagonal LoRA.

    Args:
        target_modules_bd_a: modules whose factor A is block-diagonal.
        target_modules_bd_b: modules whose factor B is block-diagonal.
        nblocks: number of blocks.
        match_strict: refuse a target that neither list names.
    """

    target_modules_bd_a: list[str] | None = option(None, "Modules whose factor A is block-diagonal.")
    target_modules_bd_b: list[str] | None = option(None, "Modules whose factor B is block-diagonal.")
    nblocks: int = option(1, "Number of blocks.")
    match_strict: bool = option(True, "Refuse a target that neither list names.")

    def __post_init__(self) -> None:
        both = sorted(set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ()))
        _require(not both, f"{', '.join(both)} stands in target_modules_bd_a and in target_modules_bd_b; keep one")
        _require(self.nblocks > 0, f"nblocks must be positive, found {self.nblocks}")


@dataclass
class KasaConfig:
    """
    Settings of KaSA (Wang et al. 2024, arXiv:2412.06071).

    Args:
        beta: weight of the penalty on the singular values.
        gamma: weight of the penalty on orthogonality.
    """

    beta: float = option(1e-4, "Weight of the penalty on the singular values.")
    gamma: float = option(1e-3, "Weight of the penalty on orthogonality.")

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, found {getattr(self, name)}")


@dataclass
class MontecloraConfig:
    """
    Settings of MonteCLoRA (Sengupta et al. 2024, arXiv:2411.04358).

    Args:
        num_samples: samples per step.
        use_entropy: add an entropy term.
        dirichlet_prior: concentration of the prior, positive.
        sample_scaler: scale of the samples.
        kl_loss_weight: weight of the divergence from the prior.
        buffer_size: steps for which samples are drawn ahead.
    """

    num_samples: int = option(8, "Samples per step.")
    use_entropy: bool = option(False, "Add an entropy term.")
    dirichlet_prior: float = option(0.1, "Concentration of the prior.")
    sample_scaler: float = option(1e-4, "Scale of the samples.")
    kl_loss_weight: float = option(1e-5, "Weight of the divergence from the prior.")
    buffer_size: int = option(150, "Steps for which samples are drawn ahead.")

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            _require(getattr(self, name) > 0, f"{name} must be positive, found {getattr(self, name)}")


@dataclass
class VeloraConfig:
    """
    Settings of VeLoRA (Miles et al. 2024, arXiv:2405.17991).

    Args:
        num_groups: groups that the inputs are split into.
        scale: scale of the reconstruction, positive.
        init_type: how the projection is set.
    """

    num_groups: int = option(64, "Groups that the inputs are split into.")
    scale: float = option(1.0, "Scale of the reconstruction.")
    init_type: Literal["batch_average", "batch_average_once", "random"] = option(
        "batch_average", "How the projection is set."
    )

    def __post_init__(self) -> None:
        _require(self.num_groups > 0, f"num_groups must be positive, found {self.num_groups}")
        _require(self.scale > 0, f"scale must be positive, found {self.scale}")
        known = ("batch_average", "batch_average_once", "random")
        _require(self.init_type in known, f"init_type={self.init_type!r} is not known; choose one of {known}")


# nested configs: field -> class that a dictionary in that field becomes
_NESTED = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "use_bdlora": BdLoraConfig,
    "arrow_config": ArrowConfig,
    "kasa_config": KasaConfig,
}

# initialisations that read a config of their own: init_lora_weights -> its field
_INIT_CONFIGS = {"eva": "eva_config", "corda": "corda_config"}


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "init_lora_weights": (bool, str),
    "modules_to_save": (list, tuple, set, str),
    "layers_to_transform": (int, list, tuple, range),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "alora_invocation_tokens": (list, tuple),
}


@dataclass
class LoraConfig(PeftConfig):
    """
    Config of LoRA (Hu et al. 2021, arXiv:2106.09685): W x is replaced by W x + scaling * B A x.

    Args:
        r: rank of the factors.
        target_modules: names of the modules to adapt: a list of names (or their endings, from a dot on), a regular
            expression that must match the whole name, or "all-linear". Left out, the model type decides.
        exclude_modules: modules to leave out, as a list or a regular expression.
        lora_alpha: the factors' product is scaled by lora_alpha / r.
        lora_dropout: probability of dropping an input of factor A, while training.
        fan_in_fan_out: whether layers keep their weights as (in, out); corrected, with a warning, where they do not.
        bias: which of the base model's biases to train: "none", "all" or "lora_only".
        use_rslora: scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv:2312.03732).
        modules_to_save: names of modules that are trained and saved in full.
        init_lora_weights: True (A uniform, B zero), "gaussian" (A normal, B zero), False (both at random, for tests),
            or one of the named initialisations.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list of layers that the indices count.
        rank_pattern: name (or regular expression) -> rank, where it differs from r.
        alpha_pattern: name (or regular expression) -> alpha, where it differs from lora_alpha.
        megatron_config: arguments for Megatron's parallel layers.
        megatron_core: module that holds them.
        trainable_token_indices: rows of the embedding to train, beside the factors.
        loftq_config: settings of the LoftQ initialisation.
        eva_config: settings of the EVA initialisation.
        corda_config: settings of the CorDA initialisation.
        lora_ga_config: settings of the LoRA-GA initialisation.
        use_dora: learn magnitude and direction apart (Liu et al. 2024, arXiv:2402.09353).
        velora_config: settings of VeLoRA.
        alora_invocation_tokens: tokens from which on the adapter is active (aLoRA).
        use_qalora: group the inputs so that the merged weight stays quantised (QA-LoRA).
        qalora_group_size: inputs per group for QA-LoRA.
        monteclora_config: settings of MonteCLoRA.
        layer_replication: ranges of layers to stack into a deeper model, each layer with adapters of its own.
        runtime_config: settings for this run only, never saved.
        lora_bias: give factor B a bias.
        target_parameters: names of parameters to adapt, for modules that hold them directly.
        use_bdlora: settings of block-diagonal LoRA.
        arrow_config: settings of Arrow routing.
        kasa_config: settings of KaSA.
        ensure_weight_tying: keep tied modules tied: what one of them learns, all of them use.

    Raises:
        ValueError: for values that cannot work together.
        TypeError: for a value of the wrong type.

    Example:

        >>> from peft import LoraConfig
        >>> config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        >>> sorted(config.target_modules)
        ['q_proj', 'v_proj']
    """

    r: int = option(8, "Rank of the factors.")
    target_modules: Names = shared_field("target_modules")
    exclude_modules: Names = shared_field("exclude_modules")
    lora_alpha: int = option(8, "The factors' product is scaled by lora_alpha / r.")
    lora_dropout: float = option(0.0, "Probability of dropping an input of factor A, while training.")
    fan_in_fan_out: bool = shared_field("fan_in_fan_out")
    bias: Literal["none", "all", "lora_only"] = shared_field("bias")
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(r).")
    modules_to_save: list[str] | None = shared_field("modules_to_save")
    init_lora_weights: (
        bool
        | Literal[
            "gaussian",
            "eva",
            "olora",
            "pissa",
            "pissa_niter_[number of iters]",
            "corda",
            "loftq",
            "orthogonal",
            "mica",
        ]
    ) = option(True, "How the factors start.")
    layers_to_transform: Indices = shared_field("layers_to_transform")
    layers_pattern: Names = shared_field("layers_pattern")
    rank_pattern: dict | None = shared_field("rank_pattern")
    alpha_pattern: dict | None = shared_field("alpha_pattern")
    megatron_config: dict | None = option(None, "Arguments for Megatron's parallel layers.")
    megatron_core: str | None = option("megatron.core", "Module that holds Megatron's parallel layers.")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        None, "Rows of the embedding to train, as a list or per layer."
    )
    loftq_config: LoftQConfig | dict = field(
        default_factory=dict, metadata={"help": "Settings of the LoftQ initialisation."}
    )
    eva_config: EvaConfig | None = option(None, "Settings of the EVA initialisation.")
    corda_config: CordaConfig | None = option(None, "Settings of the CorDA initialisation.")
    lora_ga_config: LoraGAConfig | None = option(None, "Settings of the LoRA-GA initialisation.")
    use_dora: bool = option(False, "Learn magnitude and direction of the weight apart.")
    velora_config: VeloraConfig | dict | None = option(None, "Settings of VeLoRA.")
    alora_invocation_tokens: list[int] | None = option(None, "Tokens from which on the adapter is active.")
    use_qalora: bool = option(False, "Group the inputs so that the merged weight stays quantised.")
    qalora_group_size: int = option(16, "Inputs per group for QA-LoRA.")
    monteclora_config: MontecloraConfig | None = option(None, "Settings of MonteCLoRA.")
    layer_replication: list[tuple[int, int]] | None = option(None, "Ranges of layers to stack.")
    runtime_config: LoraRuntimeConfig = field(
        default_factory=LoraRuntimeConfig, metadata={"help": "Settings for this run only, never saved."}
    )
    lora_bias: bool = option(False, "Give factor B a bias.")
    target_parameters: list[str] | None = option(None, "Names of parameters to adapt.")
    use_bdlora: BdLoraConfig | None = option(None, "Settings of block-diagonal LoRA.")
    arrow_config: ArrowConfig | None = option(None, "Settings of Arrow routing.")
    kasa_config: KasaConfig | None = option(None, "Settings of KaSA.")
    ensure_weight_tying: bool = shared_field("ensure_weight_tying")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        check_types(self, _FIELD_TYPES)
        if not isinstance(self.target_parameters, (str, NoneType)):
            check_names("target_parameters", self.target_parameters)
        check_layer_selection(self)
        self._build_nested_configs()
        self._check_contradictions()
        self._check_initialisation()
        self._warn_of_effects()

    # kind of base layer -> layer of one's own; about a run, so neither a field nor saved
    _custom_modules = None

    def _register_custom_module(self, mapping: dict[type, type]) -> None:
        """
        Let layers of one's own be made for kinds of base layers, in models that get this config.

        They are called with the base layer and the name of the adapter, and with `config`, `r`, `lora_alpha`,
        `target_name` and `parameter_name` by keyword. The mapping is not saved: it has to be registered on the config
        that is given to `PeftModel.from_pretrained` too.

        Args:
            mapping: class of base layers -> class that derives from one of the layers of LoRA.
        """
        self._custom_modules = {**(self._custom_modules or {}), **mapping}

    def advise(self, low_cpu_mem_usage: bool) -> None:
        """Say that EVA is not done yet; see `PeftConfig.advise`."""
        if self.init_lora_weights == "eva" and not low_cpu_mem_usage:
            warn(
                "with init_lora_weights='eva' the factors start neutrally until initialize_lora_eva_weights(model, "
                "dataloader) is called; low_cpu_mem_usage=True saves making them twice"
            )

    def _build_nested_configs(self) -> None:
        """Turn dictionaries, as they stand in a file, into the configs they are."""
        for name, config_cls in _NESTED.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                found_out = {f.name for f in dataclasses.fields(config_cls) if not f.init} & value.keys()
                try:
                    config = config_cls(**{key: given for key, given in value.items() if key not in found_out})
                except TypeError as error:
                    raise TypeError(f"{name} does not fit {config_cls.__name__}: {error}") from error
                vars(config).update({key: value[key] for key in found_out})
                setattr(self, name, config)
            elif value is not None and not isinstance(value, config_cls):
                raise TypeError(
                    f"{name} must be a {config_cls.__name__}, a dictionary of its fields or None, "
                    f"found {type(value).__name__}"
                )
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = dict(vars(self.loftq_config))
        if self.loftq_config and self.init_lora_weights != "loftq":
            warn("loftq_config has no effect unless init_lora_weights='loftq'; it is left out")
            self.loftq_config = {}

    def _check_contradictions(self) -> None:
        if self.target_parameters is not None and isinstance(self.target_parameters, str):
            raise TypeError(f"target_parameters must be a list of names, found {self.target_parameters!r}")
        if self.use_dora and self.megatron_config:
            raise ValueError("use_dora does not work on the layers of megatron_core; leave one of the two out")
        if self.lora_bias and (self.init_lora_weights not in (True, False) or self.use_dora):
            raise ValueError(
                "lora_bias works with init_lora_weights True or False and without use_dora only; found "
                f"init_lora_weights={self.init_lora_weights!r}, use_dora={self.use_dora}"
            )

    def _check_initialisation(self) -> None:
        init = self.init_lora_weights
        if init == "loftq" and not self.loftq_config:
            raise ValueError("init_lora_weights='loftq' needs its settings: give loftq_config=LoftQConfig(...)")
        for name, config_field in _INIT_CONFIGS.items():
            given = getattr(self, config_field) is not None
            if init == name and not given:
                warn(f"init_lora_weights={name!r} without {config_field}; the settings are those of its defaults")
                setattr(self, config_field, _NESTED[config_field]())
            elif init != name and given:
                warn(f"{config_field} has no effect unless init_lora_weights={name!r}")
        factored = init in ("corda", "lora_ga", "olora") or str(init).startswith("pissa")
        if factored and self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            settings = " (with corda_config)" if init == "corda" else ""
            warn(
                f"an adapter with use_rslora, rank_pattern or alpha_pattern and init_lora_weights={init!r}{settings} "
                "cannot be converted to plain LoRA when it is saved"
            )

    def _warn_of_effects(self) -> None:
        if self.alora_invocation_tokens and self.task_type != TaskType.CAUSAL_LM:
            warn("alora_invocation_tokens works with task_type='CAUSAL_LM' only")
