# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Carrying out a plan: making the layers of an adapter, putting them into the model, and tying what has to follow."""

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from ..anatomy.matching import (
    pattern_lookup,
)
from ..anatomy.walking import adapter_modules, base_modules, base_parameters, stack_of, unwrapped
from ..config import PeftConfig
from ..layers.base_layer import BaseTunerLayer
from ..layers.merging.sharing import note_sharing
from ..layers.new_tensors import making_tensors
from ..layers.shared_tensors import SharedParameters
from ..surgery.saved_modules import set_additional_trainable_modules
from ..surgery.shield import shield_tie_weights
from ..surgery.slots import Slots
from ..surgery.switching import (
    set_requires_grad,
)
from ..tying.record import (
    explaining_tie,
)
from ..tying.settle import one_object_each
from ..utils.quantization_utils import accompany_layer, get_quantization_kwargs, resolve_quantization_backend
from .targets import AdapterPlan


class Placing:
    """
    How a tuner makes and places layers. A method refines what differs for it.

    See `BaseTuner` for the attributes that methods declare.
    """

    def place(self, plan: AdapterPlan, autocast_adapter_dtype: bool, low_cpu_mem_usage: bool) -> None:
        """
        Put an adapter into the model. Whatever can be refused has been refused by then.

        Args:
            plan: what to do, for this tuner's model as it is.
            autocast_adapter_dtype: keep the adapter's tensors in float32 where the base is in half precision.
            low_cpu_mem_usage: make the tensors on the meta device.
        """
        model, config, name = self.model, plan.config, plan.adapter_name
        present = [module for _, module in adapter_modules(model)]
        making = making_tensors(on_meta=low_cpu_mem_usage, full_precision=autocast_adapter_dtype)
        with one_object_each(model), making:
            targets = {**plan.modules, **plan.parameters}
            self._place_layers(model, name, config, targets, plan.all_names, set(plan.parameters))
            # the second stage: followers are given what their owners have
            set_additional_trainable_modules(
                model, config, self.get_model_config(model), name, name in self.active_adapters
            )
        self._finish(name, config)
        if any(module.disable_adapters for module in present):
            known = set(map(id, present))
            for module in [module for _, module in adapter_modules(model) if id(module) not in known]:
                module.enable_adapters(False)  # as the others are

    def _place_layers(
        self,
        model: nn.Module,
        adapter_name: str,
        config: PeftConfig,
        targets: dict[str, nn.Module],
        all_names: dict[int, list[str]],
        parameters: Collection[str] = (),
    ) -> None:
        """
        Create the layers for all targets, then put them into the model.

        Targets are modules by their full names, or their parameters by the names in `parameters`.
        """
        arguments_for = self._layer_arguments_for(config)
        ties = {**(config.target_modules_to_tie or {}), **(config.target_parameters_to_tie or {})}
        layers: dict[str, BaseTunerLayer] = {}
        created: list[tuple[nn.Module, BaseTunerLayer]] = []
        shared = self._shared_containers()
        # what follows another one counts for nothing by itself; the order is the model's, whatever is tied
        order = {number: place for place, number in enumerate(all_names)}
        own = sorted((name for name in targets if name not in ties), key=lambda name: order[id(targets[name])])
        layers_of_base = {name: unwrapped(targets[name]) for name in own}
        from_all = self._arguments_from_all(config, layers_of_base)

        def names_of(target: str) -> list[str]:
            names = all_names[id(targets[target])]
            return [f"{name}.{target.rpartition('.')[2]}" for name in names] if target in parameters else names

        if shared:
            self.make_shared(adapter_name, config, layers_of_base)
        outermost: dict[int, nn.Module] = {}
        for name, module in targets.items():
            key = name.rpartition(".")[2] if name in parameters else None
            arguments = {**arguments_for(names_of(ties.get(name, name))), **from_all.get(name, {})}
            if name in ties:  # owners come first, so it is there
                arguments["owner"] = layers[ties[name]]
            present = self._present_layer(module, key)
            if present is not None:
                with explaining_tie(name, ties, config):
                    present.update_layer(adapter_name, config=config, **arguments)
                if not module.training:
                    module.train(False)
                layers[name] = present
            else:
                arguments.update({"shared": shared} if shared else {})
                arguments.update({"parameter_name": key} if key is not None else {})
                inner = outermost.get(id(module), module)
                with explaining_tie(name, ties, config):
                    layers[name] = self._create_layer(inner, name, adapter_name, config, arguments)
                created.append((inner, layers[name]))
                outermost[id(module)] = layers[name]
        slots = Slots(model) if created else None
        for module, layer in created:
            if not module.training:
                layer.train(False)
            layer._active_adapter = self.active_adapters
            slots.replace(module, layer)

    def _present_layer(self, module: nn.Module, parameter: str | None) -> BaseTunerLayer | None:
        """Find the layer that adapts a module, or a parameter of it, for other adapters already."""
        if parameter is not None:
            return next((layer for layer in stack_of(module) if layer.parameter_name == parameter), None)
        # one method's layers may derive from another's, as AdaLoRA's do from LoRA's
        kinds = tuple(self.layer_classes.values()) or self.tuner_layer_cls
        return next((layer for layer in stack_of(module) if isinstance(layer, kinds)), None)

    def _layer_arguments_for(self, config: PeftConfig) -> Callable[[list[str]], dict[str, Any]]:
        """Give a function from the names of a target to what its layer is made with beside the config."""
        lookups = {
            field: (getattr(config, field), pattern_lookup(getattr(config, patterns)))
            for field, patterns in self.pattern_fields.items()
        }
        return lambda names: {field: lookup(names, default) for field, (default, lookup) in lookups.items()}

    def _arguments_from_all(self, config: PeftConfig, targets: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
        """
        Give what single layers are made with that depends on all of them. Supplied by methods that have some.

        Args:
            config: the adapter's config.
            targets: full name -> layer of the base model, in the model's order and without followers.

        Returns:
            Full name -> arguments.
        """
        return {}

    def make_shared(self, adapter_name: str, config: PeftConfig, targets: dict[str, nn.Module]) -> None:
        """
        Make the tensors of an adapter that its layers share. Supplied by methods that have some.

        Args:
            adapter_name: name.
            config: the adapter's config.
            targets: full name -> layer of the base model, in the model's order and without followers.
        """

    def _shared_containers(self) -> dict[str, nn.Module]:
        """Give the containers of what layers share; they stand on the tuner and on each layer."""
        names = self.tuner_layer_cls.shared_layer_names
        if not names:
            return {}
        layer = next((layer for layer in self._layers() if isinstance(layer, self.tuner_layer_cls)), None)
        for name in names:
            if layer is not None:
                self._modules[name] = layer._modules[name]
            elif name not in self._modules:
                self._modules[name] = self.tuner_layer_cls.container_classes.get(name, SharedParameters)()
        return {name: self._modules[name] for name in names}

    def _create_layer(
        self, target: nn.Module, name: str, adapter_name: str, config: PeftConfig, arguments: dict[str, Any]
    ) -> BaseTunerLayer:
        """Make the layer for one target. Methods declare `layer_classes` and seldom override this."""
        owner = arguments.get("owner")
        if "parameter_name" in arguments:
            return self.parameter_layer_cls(target, adapter_name, config=config, **arguments)
        layer_cls = self._layer_class(target) or type(owner)
        return layer_cls(target, adapter_name, config=config, **arguments)

    def _finish(self, adapter_name: str, config: PeftConfig) -> None:
        """Freeze the base model and let the active adapters be trained."""
        shield_tie_weights(self.model)
        note_sharing(self.model)
        quantization = get_quantization_kwargs(self.model)
        for layer in self.model.modules() if quantization else ():
            if isinstance(layer, BaseTunerLayer) and layer.quantization_backend is not None:
                layer.quantization_backend = resolve_quantization_backend(layer.get_base_layer(), **quantization)
        for module in base_modules(self.model):
            accompany_layer(module)
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.requires_grad = False
        active = adapter_name in self.active_adapters
        set_requires_grad(self.model, adapter_name, active and not config.inference_mode)
        for name in self.active_adapters:
            other = self._config_of(name)
            if not other.inference_mode and getattr(other, "bias", "none") != "none":
                self._train_biases(other.bias)

    def _train_biases(self, which: str) -> None:
        """Let biases of the base model be trained: all of them, or those of adapted layers."""
        if which == "all":
            for name, parameter in base_parameters(self.model):
                # the original of a module that is trained in full takes no part in the forward pass
                if (name == "bias" or name.endswith(".bias")) and ".original_module." not in name:
                    parameter.requires_grad_(True)
        else:
            for layer in self._layers():
                if getattr(layer, "bias", None) is not None:
                    layer.bias.requires_grad_(True)
