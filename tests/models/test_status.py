# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Reports on the state of layers and models; the values of the released package are in the golden script."""

import pytest
from support.helpers import llama, refused
from torch import nn

from peft import (
    LoHaConfig,
    LoraConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.quantization_utils import Bnb8bitBackend


def lora(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **options})


def test_every_layer_and_wrapper_is_listed_once() -> None:
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    status = get_layer_status(get_peft_model(llama(), config))
    assert [(layer.name, layer.module_type) for layer in status] == [
        ("model.model.embed_tokens.token_adapter", "TrainableTokensLayer"),
        ("model.model.layers.0.self_attn.q_proj", "lora.Linear"),
        ("model.model.layers.1.self_attn.q_proj", "lora.Linear"),
        ("model.lm_head", "ModulesToSaveWrapper"),
    ]
    for layer in status:
        assert layer.enabled is True
        assert layer.active_adapters == layer.available_adapters == ["default"]
        assert (layer.merged_adapters, layer.requires_grad) == ([], {"default": True})
        assert (layer.devices, layer.quantization_backend) == ({"default": ["cpu"]}, None)


def test_model_counts_a_tied_parameter_once() -> None:
    model = get_peft_model(llama(tied=True), lora(target_modules=["embed_tokens"], ensure_weight_tying=True))
    status = model.get_model_status()
    assert status.num_adapter_layers == 2
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    # the head follows the embedding: it owns nothing, and says what the owner's tensors do
    assert [layer.requires_grad for layer in model.get_layer_status()] == [{"default": True}] * 2


def test_two_adapters() -> None:
    model = get_peft_model(llama(), lora(target_modules=["q_proj"]))
    model.add_adapter("other", lora())
    status = get_model_status(model)
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.adapter_model_type == "LoraModel"
    assert status.peft_types == {"default": "LORA", "other": "LORA"}
    assert status.requires_grad == {"default": True, "other": False}
    assert status.available_adapters == ["default", "other"]
    by_name = {layer.name: layer.available_adapters for layer in model.get_layer_status()}
    assert by_name["model.model.layers.0.self_attn.q_proj"] == ["default", "other"]
    assert by_name["model.model.layers.0.self_attn.v_proj"] == ["other"]


def test_what_layers_do_not_agree_on_is_irregular() -> None:
    model = get_peft_model(llama(), lora())
    first = model.get_base_model().model.layers[0].self_attn.q_proj
    first.merge()
    assert get_model_status(model).merged_adapters == "irregular"
    first.unmerge()
    assert get_model_status(model).merged_adapters == []
    first.lora_A["default"].weight.requires_grad_(False)
    assert model.get_layer_status()[0].requires_grad == {"default": "irregular"}
    assert get_model_status(model).requires_grad == {"default": "irregular"}
    first.set_adapter("none")
    first.enable_adapters(False)
    status = get_model_status(model)
    assert (status.enabled, status.active_adapters) == ("irregular", "irregular")


def test_layers_without_an_adapter_have_no_say_on_its_merging() -> None:
    model = get_peft_model(llama(), lora(modules_to_save=["lm_head"]))
    model.add_adapter("other", lora(target_modules=["q_proj"]))
    model.base_model.merge_adapter(["other"])
    assert get_model_status(model).merged_adapters == ["other"]


def test_disabled_and_merged() -> None:
    model = get_peft_model(llama(), lora())
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    with model.disable_adapter():
        status = model.get_model_status()
    assert (status.enabled, status.merged_adapters) == (False, [])


def test_tensors_without_storage() -> None:
    model = get_peft_model(llama(), lora(), low_cpu_mem_usage=True)
    assert model.get_model_status().devices == {"default": ["meta"]}
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["default"].to_empty(device="cpu")
    assert model.get_layer_status()[0].devices == {"default": ["cpu", "meta"]}


def test_model_without_wrapper() -> None:
    model = inject_adapter_in_model(lora(), llama(), "mine")
    assert get_layer_status(model)[0].name == "model.layers.0.self_attn.q_proj"
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "None")
    assert status.peft_types == {} and status.available_adapters == ["mine"]
    status = get_model_status(inject_adapter_in_model(lora(target_modules=["0"]), nn.Sequential(nn.Linear(4, 4))))
    assert (status.base_model_type, status.peft_types) == ("other", {})


def test_mixed_model() -> None:
    model = get_peft_model(llama(), lora(), adapter_name="a", mixed=True)
    model.add_adapter("b", LoHaConfig(r=2, target_modules=["q_proj"]))
    status = model.get_model_status()
    assert status.adapter_model_type == "MixedModel"
    assert status.peft_types == {"a": "LORA", "b": "LOHA"}
    names = {layer.name: layer.module_type for layer in model.get_layer_status()}
    assert names["model.model.layers.0.self_attn.q_proj"] == "loha.Linear"
    assert names["model.model.layers.0.self_attn.q_proj.base_layer"] == "lora.Linear"


def test_tokens_as_a_method() -> None:
    model = get_peft_model(llama(), TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]))
    assert [layer.module_type for layer in model.get_layer_status()] == ["TrainableTokensLayer"]


@pytest.mark.parametrize("report", [get_layer_status, get_model_status])
def test_models_without_adapter_layers_are_refused(report: object) -> None:
    base = llama()
    with refused(base, ValueError, "no adapter layer", "LlamaForCausalLM"):
        report(base)
    prompted = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with refused(prompted, TypeError, "prompt learning"):
        report(prompted)
    with refused(None, ValueError, "Linear"):
        report(nn.Linear(2, 2))


def test_every_method_of_prompt_learning_is_refused_alike() -> None:
    kinds = [cls for cls in PEFT_TYPE_TO_CONFIG_MAPPING.values() if issubclass(cls, PromptLearningConfig)]
    assert PromptTuningConfig in kinds
    for cls in kinds:
        model = get_peft_model(llama(), cls(task_type="CAUSAL_LM", num_virtual_tokens=2))
        with refused(model, TypeError):
            model.get_layer_status()


@pytest.mark.parametrize("module", ["__main__", "mine", "mine.tuners", "tuners", "mine.layers"])
def test_methods_of_a_module_that_is_in_no_package(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(llama(), lora())
    layer_cls = type(model.get_base_model().model.layers[0].self_attn.q_proj)
    monkeypatch.setattr(layer_cls, "__module__", module)
    assert model.get_layer_status()[0].module_type == "Linear"
    assert get_model_status(model).num_adapter_layers == 4


def test_quantisation_is_named() -> None:
    model = get_peft_model(llama(), lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    layers = [block.self_attn.q_proj for block in model.get_base_model().model.layers]
    for layer, whole in zip(layers, ("irregular", "bnb 8bit"), strict=True):
        layer.quantization_backend = Bnb8bitBackend()
        assert layer.quantization_backend.backend_name == "bnb 8bit"
        assert get_model_status(model).quantization_backend == whole
    assert [status.quantization_backend for status in get_layer_status(model)] == ["bnb 8bit", "bnb 8bit", None]


def test_a_module_that_an_inactive_adapter_trains_is_no_disagreement() -> None:
    model = get_peft_model(llama(), lora())
    model.add_adapter("other", lora(modules_to_save=["lm_head"]))
    assert get_layer_status(model)[-1].active_adapters == []
    assert get_model_status(model).active_adapters == ["default"]
    model.set_adapter("other")
    assert get_layer_status(model)[-1].active_adapters == ["other"]
