# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Carrying out a plan: making the layers of an adapter, putting them into the model, and tying what has to follow."""

from contextlib import nullcontext
from typing import Any

from torch import nn

from ..anatomy.walking import adapter_modules, base_modules, base_parameters, is_adapter_layer, stack_of
from ..config import PeftConfig
from ..layers.base_layer import BaseTunerLayer
from ..layers.merging.sharing import note_sharing
from ..layers.new_tensors import making_tensors, on_meta
from ..layers.shared_tensors import SharedParameters
from ..surgery.saved_modules import set_additional_trainable_modules
from ..surgery.shield import shield_tie_weights
from ..surgery.slots import Slots
from ..surgery.switching import cast_adapter_dtype, set_requires_grad
from ..tying.record import explaining_tie
from ..tying.settle import one_object_each
from ..utils.error import PeftRuntimeError
from ..utils.quantization_utils import accompany_layer, get_quantization_kwargs, resolve_quantization_backend
from .placement import Placement
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
        # a client that replaces the cast gets tensors of the base's type to decide about
        casts = getattr(self._cast_adapter_dtype, "__func__", None) is not Placing._cast_adapter_dtype
        making = making_tensors(on_meta=low_cpu_mem_usage, full_precision=autocast_adapter_dtype and not casts)
        with one_object_each(model), making:
            self._place_layers(plan)
            if casts:
                self._cast_adapter_dtype(name, autocast_adapter_dtype)
            # the second stage: followers are given what their owners have
            set_additional_trainable_modules(
                model, config, self.get_model_config(model), name, name in self.active_adapters, plan.additional
            )
        self._finish(name, config)
        if any(module.disable_adapters for module in present):
            known = set(map(id, present))
            for module in [module for _, module in adapter_modules(model) if id(module) not in known]:
                module.enable_adapters(False)  # as the others are

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """
        Bring an adapter's tensors that are in half precision to float32. Clients replace it.

        Args:
            adapter_name: name.
            autocast_adapter_dtype: False to leave everything as it is.
        """
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)

    def _place_layers(self, plan: AdapterPlan) -> None:
        """Make the layer of each target and put it into the model, through the hook if a client has replaced it."""
        shared = self._shared_containers()
        if shared:
            self.make_shared(plan.adapter_name, plan.config, plan.own_layers)
        placement = Placement(plan, shared, Slots(self.model))
        self.__dict__["_placement"] = placement
        place = self._place_through_hook if self._hook_is_replaced() else self._place_target
        try:
            for target in plan.targets:
                if target.parameter is None:
                    place(placement, target)
            parameters = []
            if plan.parameters:
                parameters = self._inject_parameters(plan.config, self.model, plan.adapter_name, on_meta())
        finally:
            del self.__dict__["_placement"]
        placement.report(self._create_and_replace)
        self.targeted_module_names = placement.without_left_out(plan.module_names)
        self.targeted_parameter_names = placement.without_left_out(parameters or ())

    def _place_target(self, placement: Placement, target: Target) -> BaseTunerLayer:
        """Do for one target, as it is planned, what the hook does for whatever it is given."""
        return self._make_layer(
            placement, target, placement.outermost(target.module), placement.plan.config, dict(target.arguments)
        )

    def _place_through_hook(self, placement: Placement, target: Target) -> None:
        """Call the hook for one target, and see what it has done."""
        plan, stands = placement.plan, placement.outermost(target.module)
        parent, key = placement.slots.place_of(stands)
        arguments = {} if target.parameter is None else {"parameter_name": target.parameter}
        returned = self._create_and_replace(
            plan.config, plan.adapter_name, stands, key, parent, current_key=target.name, **arguments
        )
        if target.name not in placement.layers:
            placement.note_what_was_done(target, stands, parent, key, returned, self._create_and_replace)

    def _inject_parameters(
        self, peft_config: PeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool = False
    ) -> list[str]:
        """
        Call the hook for each parameter that gets a layer. Clients replace it, to choose parameters by themselves.

        Args:
            peft_config: the adapter's config.
            model: the base model.
            adapter_name: name of the adapter.
            low_cpu_mem_usage: whether its tensors are made on the meta device.

        Returns:
            Full names of the parameters.
        """
        placement = self._running_placement("_inject_parameters")
        targets = [target for target in placement.plan.targets if target.parameter is not None]
        place = self._place_through_hook if self._hook_is_replaced() else self._place_target
        for target in targets:
            place(placement, target)
        return [target.name for target in targets]

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str | None = None,
        *,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> BaseTunerLayer:
        """
        Make the layer for one target and put it into the model: the hook that an injection calls for each of them.

        Clients replace it, on the class or on one tuner. What they then do counts: a target for which they do not call
        this gets no layer; one for which they call it with another module, such as a layer inside of the target, gets
        it there; and a layer that they put into `parent` by themselves, or return, is the target's.

        Args:
            peft_config: the adapter's config, as it applies to the model.
            adapter_name: name of the adapter that is injected.
            target: what gets the layer: a module, or the layer of other adapters around it.
            target_name: its name in `parent`.
            parent: the module that holds it.
            current_key: full name of the target in the model.
            parameter_name: the parameter of `target` that is adapted, if it is not the whole.
            kwargs: not used; for callers of the released package.

        Returns:
            The layer.

        Raises:
            PeftRuntimeError: if no adapter is being injected.
            PeftValueError: if the arguments do not belong together.
            UnsupportedLayerError: if the method has no layer for the target.
        """
        placement = self._running_placement("_create_and_replace")
        planned = placement.target_for(adapter_name, target, target_name, parent, current_key, parameter_name)
        if planned.layer_class is None or planned.module is not target:
            planned = self._redirected(planned, target, peft_config, placement)
        arguments = dict(planned.arguments)
        if peft_config is not placement.plan.config:
            arguments.update(self._layer_arguments_for(peft_config)([planned.name]))
        return self._make_layer(placement, planned, target, peft_config, arguments)

    def _make_layer(
        self, placement: Placement, planned: Target, stands: nn.Module, config: PeftConfig, arguments: dict[str, Any]
    ) -> BaseTunerLayer:
        """
        Make the layer for a target and put it into the model, or give the adapter to the layer that is there.

        Args:
            placement: the running one.
            planned: the target.
            stands: what stands in its place in the model.
            config: the adapter's config.
            arguments: what the layer is made with beside it.
        """
        adapter_name = placement.plan.adapter_name
        if planned.owner is not None:
            arguments["owner"] = placement.owner_of(planned, self._create_and_replace)
        layer = self._present_layer(stands, planned.parameter)
        explaining = explaining_tie(planned.name, placement.owners, config) if placement.owners else nullcontext()
        if layer is not None:
            with explaining:
                layer.update_layer(adapter_name, config=config, **arguments)
            if not stands.training:
                stands.train(False)
        else:
            arguments.update(placement.shared)
            with explaining:
                layer = self._create_layer(stands, planned, adapter_name, config, arguments)
            if not stands.training:
                layer.train(False)
            layer._active_adapter = self.active_adapters
            placement.put(stands, layer)
        placement.layers[planned.name] = layer
        return layer

    def _redirected(self, planned: Target, target: nn.Module, config: PeftConfig, placement: Placement) -> Target:
        """Plan anew what a hook has sent to another module, or what could not be planned without it."""
        if planned.parameter is None and planned.owner is None:
            self._check_kind(target, planned.name, follows=False)
        layer_class = self.parameter_layer_cls if planned.parameter is not None else self._layer_class(target)
        if layer_class is None:
            layer_class = type(placement.layers[planned.owner])
        arguments = planned.arguments or self._layer_arguments_for(config)([planned.name])
        return planned._replace(module=target, layer_class=layer_class, arguments=arguments)

    def _running_placement(self, called: str) -> Placement:
        placement = self.__dict__.get("_placement")
        if placement is None:
            raise PeftRuntimeError(
                f"{type(self).__name__}.{called} places layers while an adapter is injected, and none is; use "
                "get_peft_model, add_adapter or inject_adapter, which call it for each target"
            )
        return placement

    def _hook_is_replaced(self) -> bool:
        """Say whether a client has put something in the place of `_create_and_replace`."""
        return getattr(self._create_and_replace, "__func__", None) is not Placing._create_and_replace

    def _present_layer(self, module: nn.Module, parameter: str | None) -> BaseTunerLayer | None:
        """Find the layer that adapts a module, or a parameter of it, for other adapters already."""
        if not is_adapter_layer(module):
            return None
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

    def check_shared(self, config: PeftConfig, targets: dict[str, nn.Module]) -> None:
        """
        Refuse an adapter whose shared tensors cannot be made, before anything is changed. Supplied likewise.

        Args:
            config: the adapter's config.
            targets: see `make_shared`.
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
