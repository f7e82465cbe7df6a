# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA on a whole model."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ...anatomy.matching import pattern_lookup
from ...anatomy.walking import (
    adapter_modules,
    base_parameters,
    is_adapter_layer,
    names_of_modules,
    stack_of,
    unwrapped,
)
from ...checkpoints.state_dict import collect_tensors
from ...config import PeftConfig
from ...surgery.replication import remove_replicas, replicate_layers, separate_replicas
from ...tying.groups import find_tied_groups, module_of
from ...utils.constants import (
    MAMBA_FUSED_LAYERS,
    MAMBA_MODEL_TYPES,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from ...utils.error import PeftNotImplementedError, PeftValueError
from ...utils.integrations import changes_weights_while_loading
from ...utils.near_names import FEW
from ...utils.old_names import old_names
from ...utils.progress import showing_progress
from ...utils.warning import warn
from ..base import BaseTuner
from ..placement import Placement
from ..plan import AdapterPlan, Target
from .combination import Combination, add_weighted_adapter
from .config import LoraConfig
from .layer import LAYER_CLASSES, Conv2d, LoraLayer, ParamWrapper
from .plain_lora import convert_on_save, without_start
from .quantized import LAYER_OF_BACKEND
from .starts import changes_base, check_start, find_start
from .starts.base_weight import warn_of_changed_bases
from .tp_layer import LoraParallelLinear, backend_of, parallel_layers, parallel_settings
from .variants import (
    Kasa,
    Monteclora,
    attach_variants,
    check_beside,
    check_targets,
    detach_variants,
    find_variant,
    penalties,
)


__all__ = ["Conv2d", "LoraModel"]


class LoraModel(BaseTuner):
    """
    A model with LoRA layers in it (Hu et al. 2021, arXiv:2106.09685).

    Args:
        model: the base model; it is changed in place.
        peft_config: a `LoraConfig`, or adapter name -> config.
        adapter_name: name of the adapter to inject.
        low_cpu_mem_usage: make the factors on the meta device.
        state_dict: adapter tensors; if given, the modules named by its keys are adapted.

    Example:

        >>> import torch
        >>> from peft import LoraConfig, LoraModel
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> LoraModel(net, LoraConfig(r=2, target_modules=["0"]), "default").targeted_module_names
        ['0']
    """

    prefix = "lora_"
    tuner_layer_cls = LoraLayer
    layer_classes = LAYER_CLASSES
    quantized_layer_classes = LAYER_OF_BACKEND
    layer_parts = {nn.MultiheadAttention: ("out_proj",)}
    parameter_layer_cls = ParamWrapper
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    pattern_fields = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
    adapts_parallel_layers = True

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        """Stack layers if the config says so."""
        super()._prepare_model(peft_config, model)
        if peft_config.layer_replication:
            replicate_layers(model, peft_config.layer_replication)

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any) -> None:
        super()._inject(model, adapter_name, *args)
        attach_variants(model, adapter_name, self.peft_config[adapter_name])

    def _unload(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        detach_variants(self.model, self.peft_config)
        model = super()._unload(merge, safe_merge, adapter_names)
        (separate_replicas if merge else remove_replicas)(model)
        return model

    def _resolve_targets(self, model: nn.Module, config: LoraConfig) -> None:
        # the weights of experts whose layers were fused have three dimensions
        if changes_weights_while_loading() and any(parameter.dim() == 3 for _, parameter in base_parameters(model)):
            from ...checkpoints.conversion.experts import conversions_of

            # clients replace the function at this path
            from ...utils.transformers_weight_conversion import convert_peft_config_for_transformers

            convert_peft_config_for_transformers(config, model, conversions_of(model))
        super()._resolve_targets(model, config)

    def _layer_class(self, target: nn.Module) -> type[LoraLayer] | None:
        """Find the layer for a kind of base layer: one that a config of the model brings, or LoRA's own."""
        base = unwrapped(target)
        for kind, layer_cls in self._layers_of_configs():
            if isinstance(base, kind):
                return layer_cls
        return super()._layer_class(target)

    def _layers_of_configs(self) -> list[tuple[type[nn.Module], type[LoraLayer]]]:
        """List the kinds of layers for which configs bring layers of their own, those of the latest config first."""
        configs = [config for config in reversed(self.peft_config.values()) if isinstance(config, LoraConfig)]
        mappings = [mapping for config in configs for mapping in (config._custom_modules, parallel_layers(config))]
        return [found for mapping in mappings if mapping for found in mapping.items()]

    def _present_layer(self, module: nn.Module, parameter: str | None) -> LoraLayer | None:
        present = super()._present_layer(module, parameter)
        if present is not None or parameter is not None or not is_adapter_layer(module):
            return present
        custom = {layer_cls for _, layer_cls in self._layers_of_configs()}
        return next((layer for layer in stack_of(module) if type(layer) in custom), None)

    def _create_layer(
        self, base: nn.Module, target: Target, adapter_name: str, config: PeftConfig, arguments: dict[str, Any]
    ) -> LoraLayer:
        if target.parameter is None and target.layer_class in (config._custom_modules or {}).values():
            arguments.update(target_name=target.name, parameter_name=None)
        if issubclass(target.layer_class, LoraParallelLinear):
            arguments.update(backend=backend_of(self.peft_config.values()))
        return super()._create_layer(base, target, adapter_name, config, arguments)

    def _prepared(
        self, config: LoraConfig, name: str, module: nn.Module, parameter: str | None, *args: Any
    ) -> dict[str, Any]:
        *args, arguments = args
        if parameter is None and find_variant(config) is not None:
            arguments = {**arguments, "target_name": name}
        return super()._prepared(config, name, module, parameter, *args, arguments)

    def _make_layer(
        self, placement: Placement, planned: Target, stands: nn.Module, config: PeftConfig, arguments: dict[str, Any]
    ) -> LoraLayer:
        if planned.parameter is None and find_variant(config) is not None:
            arguments["target_name"] = planned.name
        return super()._make_layer(placement, planned, stands, config, arguments)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        check_beside(config, {name: other for name, other in self.peft_config.items() if other is not config})
        if config.megatron_config:
            if not self.adapts_parallel_layers:
                raise PeftNotImplementedError(f"{type(self).__name__} does not have: megatron_config; leave it out")
            parallel_settings(config)  # refuses what Megatron does not take

    def _check_tied_modules(self, model: nn.Module, peft_config: LoraConfig) -> None:
        """
        Find out what the config does to tied weights; see `BaseTuner._check_tied_modules`.

        Args:
            model: the base model.
            peft_config: config with resolved targets; what is found out is recorded on it.

        Raises:
            PeftValueError: if a tie cannot be kept: biases of factors are not tied.
        """
        super()._check_tied_modules(model, peft_config)
        if peft_config.target_modules_to_tie and peft_config.lora_bias:
            ties = peft_config.target_modules_to_tie
            members = ", ".join(map(repr, dict.fromkeys([*ties.values(), *ties])))
            raise PeftValueError(
                f"lora_bias=True does not work for targets that are tied ({members}), since what is added to a bias "
                "is not tied; leave it out"
            )

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """
        Combine adapters into a new one. It is not active at first; the adapters stay as they are.

        Args:
            adapters: names of the adapters.
            weights: one number per adapter, negative ones too.
            adapter_name: name of the new adapter; if there is one of that name, nothing is done.
            combination_type: "cat" is the weighted sum exactly, of the sum of their ranks; "svd" its best
                approximation in a given rank; "linear", "ties", "dare_linear", "dare_ties" and "magnitude_prune"
                combine factors entry by entry and need equal ranks; with "_svd" at the end (not for "linear") they
                combine the deltas, and approximate the result.
            svd_rank: rank for the kinds with "svd"; left out, the greatest of the adapters'.
            svd_clamp: for the kinds with "svd": quantile of the entries beyond which they are cut off.
            svd_full_matrices: has no effect on the result; kept for callers of the released package.
            svd_driver: for the kinds with "svd": method that the GPU library uses.
            density: for "ties", "dare_*" and "magnitude_prune": share of the entries to keep.
            majority_sign_method: for "*ties": "total" or "frequency".

        Raises:
            PeftValueError: if the adapters cannot be combined like that; the model stays as it was.

        Example:

            >>> import torch
            >>> from peft import LoraConfig, get_peft_model
            >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
            >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config, adapter_name="one")
            >>> model.add_adapter("two", config)
            >>> model.add_weighted_adapter(["one", "two"], [0.5, -1.0], "both", combination_type="cat")
            >>> layer = model.get_base_model()[0]
            >>> expected = 0.5 * layer.get_delta_weight("one") - layer.get_delta_weight("two")
            >>> torch.allclose(layer.get_delta_weight("both"), expected, atol=1e-6)
            True
        """
        combination = Combination(combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
        add_weighted_adapter(self, adapters, weights, adapter_name, combination)

    def config_to_save(self, adapter_name: str) -> PeftConfig:
        """Give the config with the ranks that layers have: it may count those that there is only room for."""
        config = super().config_to_save(adapter_name)
        if "r" not in self.pattern_fields:
            return config
        rank_of, ranks = pattern_lookup(config.rank_pattern), {}
        for names, layer in layers_by_names(self.model):
            if layer.has_adapter(adapter_name) and layer.source(adapter_name) is layer:
                ranks[names[0]] = layer.r[adapter_name], rank_of(names, config.r)
        if any(own != said for own, said in ranks.values()):
            config.r = Counter(own for own, _ in ranks.values()).most_common(1)[0][0]
            config.rank_pattern = {f"^{name}": own for name, (own, _) in ranks.items() if own != config.r}
        return config

    def _get_kasa_loss(self, adapter_names: list[str] | None = None) -> torch.Tensor | float:
        """
        Compute the regulariser of KaSA, to be added to the loss; see `Kasa.penalty`.

        Args:
            adapter_names: adapters to sum over; the active ones if left out.

        Returns:
            The sum over layers and adapters; 0.0 if there is no KaSA layer.
        """
        return sum(penalties(self.model, Kasa, self.active_adapters if adapter_names is None else adapter_names), 0.0)

    def _get_monteclora_loss(self, adapter_names: list[str] | None = None) -> torch.Tensor | float:
        """
        Compute the regulariser of MonteCLoRA, to be added to the loss; see `Monteclora.penalty`.

        Args:
            adapter_names: adapters to average over; the active ones if left out.

        Returns:
            The mean over layers and adapters; 0.0 if there is none, or they are in eval mode.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        found = list(penalties(self.model, Monteclora, names))
        return sum(found, 0.0) / max(1, len(found))

    # asked by `PeftModel.save_pretrained`
    convert_on_save = staticmethod(convert_on_save)

    def subtract_mutated_init(
        self, output_state_dict: dict[str, torch.Tensor], adapter_name: str, kwargs: dict[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Make plain LoRA of an adapter whose start has changed the base weights; see `without_start`.

        Args:
            output_state_dict: the adapter's tensors, by their keys in a checkpoint.
            adapter_name: another adapter of this model, which holds the start.
            kwargs: not used; kept for callers of the released package.

        Returns:
            Tensors of an adapter of twice the rank.
        """
        start = collect_tensors(self, None, adapter_name, save_embedding_layers=False)
        return without_start(output_state_dict, {f"base_model.{key}": tensor for key, tensor in start.items()})

    def _check_targets(self, model: nn.Module, config: LoraConfig, names: list[str]) -> None:
        """Refuse what fused kernels pass by, and starts that the base weights do not allow."""
        self._check_fused_kernels(model, config, names)
        if config.lora_bias:
            _warn_of_lost_biases({name: unwrapped(model.get_submodule(name)) for name in names})
        self._check_start(model, config, {name: model.get_submodule(name) for name in names})

    def _check_target_module_compatiblity(self, peft_config: LoraConfig, model: nn.Module, target_name: str) -> None:
        """Refuse one target that fused kernels pass by; for clients that choose targets by themselves."""
        self._check_fused_kernels(model, peft_config, [target_name])

    def _check_fused_kernels(self, model: nn.Module, config: LoraConfig, names: list[str]) -> None:
        """
        Refuse layers that models of the Mamba family hand to kernels as mere weights.

        Raises:
            PeftValueError: if a target is one.
        """
        model_type = self.get_model_config(model).get("model_type")
        if model_type not in MAMBA_MODEL_TYPES:
            return
        reached = [*names, *map(module_of, config.target_parameters or ())]
        fused = [name for name in reached if name.rpartition(".")[2] in MAMBA_FUSED_LAYERS]
        if fused:
            raise PeftValueError(
                f"{fused[0]!r} is a layer of a model of type {model_type!r}, whose fused kernels read the weights of "
                f"{' and '.join(MAMBA_FUSED_LAYERS)} and never call these layers, so that factors there would not be "
                "trained. Target others, such as in_proj and x_proj, by name"
            )

    def _check_start(self, model: nn.Module, config: LoraConfig, targets: dict[str, nn.Module]) -> None:
        """Refuse a variant or a start that cannot work on the base weights; say who stands on changed ones."""
        arguments_for, ties = self._layer_arguments_for(config), config.target_modules_to_tie or {}
        holders = [{module_of(member) for member in group.members} for group in find_tied_groups(model, True)]
        own = {
            name: (unwrapped(module), module, arguments_for([name])["r"])
            for name, module in targets.items()
            if name not in ties
        }
        shared = [names - set(ties) for names in holders]
        check_targets(config, own, shared)
        start = find_start(config.init_lora_weights, config)
        if start.keeps_output_factor and find_variant(config) is not None:
            raise PeftValueError(
                f"init_lora_weights={start.name!r} trains one factor of plain LoRA, and the config asks for another "
                "form of it; use one of the two"
            )
        check_start(start, own, shared)
        warn_of_changed_bases(config.init_lora_weights, targets.values())

    def _place_layers(self, plan: AdapterPlan) -> None:
        """Create and place the layers, with a bar for what the initialisation computes."""
        name, variant_cls = plan.config.init_lora_weights, find_variant(plan.config)
        if variant_cls is not None and variant_cls.changes_base():
            name = variant_cls.field
        is_long = name is not plan.config.init_lora_weights or changes_base(name)
        with showing_progress(str(name), len(plan.targets)) if is_long else nullcontext():
            super()._place_layers(plan)


def _warn_of_lost_biases(targets: dict[str, nn.Module]) -> None:
    """Say at once which layers can never take up what `lora_bias` trains; merging is the end of training."""
    names = [name for name, layer in targets.items() if "bias" in layer._parameters and layer.bias is None]
    if names:
        warn(
            f"lora_bias=True trains biases for {', '.join(map(repr, names[:FEW]))}"
            f"{' ...' if len(names) > FEW else ''}, which have none in the base model, so that the adapter can never "
            "be merged; leave lora_bias out if it is to be"
        )


def layers_by_names(model: nn.Module) -> Iterator[tuple[list[str], LoraLayer]]:
    """
    Yield the layers of LoRA under all their names in the base model, as patterns of configs may match any of them.

    Layers of methods that are derived from LoRA are others.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names: dict[int, list[str]] = {}
    for name, module in names_of_modules(base).items():
        names.setdefault(id(unwrapped(module)), []).append(name)
    for name, module in adapter_modules(base):
        if isinstance(module, LoraLayer) and "lora_E" not in module.adapter_layer_names:
            own = names.get(id(unwrapped(module)), [name])  # wrappers of what is trained in full are not entered
            yield own if module.parameter_name is None else [f"{n}.{module.parameter_name}" for n in own], module


__getattr__ = old_names(__name__)
