# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Carrying out a plan: making the layers of an adapter, putting them into the model, and tying what has to follow."""

from typing import Any

from torch import nn

from ..anatomy.walking import adapter_modules, base_modules, base_parameters, stack_of
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
from .plan import AdapterPlan, Target


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
            self._place_layers(plan)
            # the second stage: followers are given what their owners have
            set_additional_trainable_modules(
                model, config, self.get_model_config(model), name, name in self.active_adapters, plan.additional
            )
        self._finish(name, config)
        if any(module.disable_adapters for module in present):
            known = set(map(id, present))
            for module in [module for _, module in adapter_modules(model) if id(module) not in known]:
                module.enable_adapters(False)  # as the others are

    def _place_layers(self, plan: AdapterPlan) -> None:
        """Create the layers for all targets, then put them into the model."""
        name, config = plan.adapter_name, plan.config
        owners = {target.name: target.owner for target in plan.targets if target.owner is not None}
        layers: dict[str, BaseTunerLayer] = {}
        created: list[tuple[nn.Module, BaseTunerLayer]] = []
        shared = self._shared_containers()
        if shared:
            self.make_shared(name, config, plan.own_layers)
        outermost: dict[int, nn.Module] = {}
        for target in plan.targets:
            module, arguments = target.module, dict(target.arguments)
            if target.owner is not None:  # owners come first, so it is there
                arguments["owner"] = layers[target.owner]
            layer = self._present_layer(module, target.parameter)
            if layer is not None:
                with explaining_tie(target.name, owners, config):
                    layer.update_layer(name, config=config, **arguments)
                if not module.training:
                    module.train(False)
            else:
                arguments.update({"shared": shared} if shared else {})
                inner = outermost.get(id(module), module)
                with explaining_tie(target.name, owners, config):
                    layer = self._create_layer(inner, target, name, config, arguments)
                created.append((inner, layer))
                outermost[id(module)] = layer
            layers[target.name] = layer
        slots = Slots(self.model) if created else None
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
        self, base: nn.Module, target: Target, adapter_name: str, config: PeftConfig, arguments: dict[str, Any]
    ) -> BaseTunerLayer:
        """
        Make the layer for one target.

        Args:
            base: what the layer is put around.
            target: the target, as planned.
            adapter_name: name of the adapter.
            config: its config.
            arguments: what the layer is made with beside these.
        """
        if target.parameter is not None:
            arguments["parameter_name"] = target.parameter
        return target.layer_class(base, adapter_name, config=config, **arguments)

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
