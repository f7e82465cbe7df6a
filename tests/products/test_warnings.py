# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Warnings are part of the interface: each comes exactly once, says what was found and what to do, and points at
the caller's file. Where nothing is wrong there is none.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import VOCABULARY, bert_classifier, features, gpt2, kinds, llama, opt, stack, token_ids
from support.helpers import stack_config as config

from peft import (
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoftQConfig
from peft.utils.warning import PeftWarning


Action = Callable[[], Any]


def adapted(**changes: Any) -> PeftModel:
    """A model with an adapter."""
    return get_peft_model(stack(), config(**changes))


def merged() -> PeftModel:
    """A model whose adapter is merged."""
    model = adapted()
    model.merge_adapter()
    return model


def with_two() -> PeftModel:
    """A model with the adapters "default" and "b"."""
    model = adapted()
    model.add_adapter("b", config())
    return model


# ------------------------------------------------------------------------------------------ one warning each
# Each scenario prepares and returns the one call that is to warn, and what the warning has to mention.
def unknown_field(folder: Path) -> tuple[Action, list[str]]:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "warmth": 3, "depth": 4}')
    return lambda: PeftConfig.from_pretrained(folder), ["depth, warmth", "LoraConfig"]


def unknown_field_of_an_adapter(folder: Path) -> tuple[Action, list[str]]:
    adapted().save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 2', '"r": 2, "warmth": 3'))
    return lambda: PeftModel.from_pretrained(stack(), folder), ["warmth", "LoraConfig"]


def loftq_without_use(folder: Path) -> tuple[Action, list[str]]:
    return lambda: LoraConfig(loftq_config=LoftQConfig()), ["loftq_config", "init_lora_weights"]


def eva_config_without_use(folder: Path) -> tuple[Action, list[str]]:
    return lambda: LoraConfig(eva_config=EvaConfig()), ["eva_config", "init_lora_weights"]


def corda_without_config(folder: Path) -> tuple[Action, list[str]]:
    return lambda: LoraConfig(init_lora_weights="corda"), ["corda_config", "init_lora_weights"]


def conversion_will_not_work(folder: Path) -> tuple[Action, list[str]]:
    make = lambda: LoraConfig(init_lora_weights="olora", use_rslora=True, rank_pattern={"a": 2})  # noqa: E731
    return make, ["rank_pattern", "olora"]


def conversion_will_not_work_with_corda(folder: Path) -> tuple[Action, list[str]]:
    def make() -> LoraConfig:
        return LoraConfig(
            init_lora_weights="corda", corda_config=CordaConfig(), use_rslora=True, alpha_pattern={"a": 2}
        )

    return make, ["alpha_pattern", "corda"]


def alora_for_another_task(folder: Path) -> tuple[Action, list[str]]:
    return lambda: LoraConfig(alora_invocation_tokens=[1]), ["alora_invocation_tokens", "CAUSAL_LM"]


def wrapped_twice(folder: Path) -> tuple[Action, list[str]]:
    model = adapted()
    return lambda: get_peft_model(model, config()), ["add_adapter", "unload()"]


def same_base_twice(folder: Path) -> tuple[Action, list[str]]:
    base = stack()
    get_peft_model(base, config())
    return lambda: get_peft_model(base, config(), adapter_name="b"), ["default", "b", "unload()"]


def injected_twice(folder: Path) -> tuple[Action, list[str]]:
    base = inject_adapter_in_model(config(), stack())
    return lambda: inject_adapter_in_model(config(), base), ["default", "unload()"]


def other_revision(folder: Path) -> tuple[Action, list[str]]:
    return lambda: get_peft_model(stack(), config(revision="v0"), revision="v1"), ["'v0'", "'v1'"]


def unmatched_target(folder: Path) -> tuple[Action, list[str]]:
    return lambda: adapted(target_modules=["up", "hed"]), ["'hed'", "head"]


def unmatched_target_without_a_near_name(folder: Path) -> tuple[Action, list[str]]:
    model = adapted()
    return lambda: model.add_adapter("b", config(target_modules=["up", "zzz"])), ["'zzz'", "matches no module"]


def exclusion_without_effect(folder: Path) -> tuple[Action, list[str]]:
    return lambda: adapted(exclude_modules=["down"]), ["exclude_modules", "down"]


def unmatched_module_to_save(folder: Path) -> tuple[Action, list[str]]:
    return lambda: adapted(modules_to_save=["hed"]), ["modules_to_save", "'hed'"]


def state_dict_with_more(folder: Path) -> tuple[Action, list[str]]:
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8) for name in ("head", "elsewhere")}
    targets = config(target_modules=["head"])
    return lambda: inject_adapter_in_model(targets, stack(), state_dict=tensors), ["1 modules", "elsewhere"]


def name_with_the_prefix(folder: Path) -> tuple[Action, list[str]]:
    return lambda: get_peft_model(stack(), config(), adapter_name="my_lora_1"), ["'my_lora_1'", "'lora_'"]


def other_layout(folder: Path) -> tuple[Action, list[str]]:
    return lambda: get_peft_model(gpt2(), LoraConfig(r=2)), ["fan_in_fan_out=False", "(in, out)", "True"]


def other_layout_of_a_linear_layer(folder: Path) -> tuple[Action, list[str]]:
    return lambda: adapted(fan_in_fan_out=True), ["fan_in_fan_out=True", "(out, in)", "False"]


def other_layout_in_a_second_adapter(folder: Path) -> tuple[Action, list[str]]:
    model = adapted()
    return lambda: model.add_adapter("b", config(fan_in_fan_out=True)), ["fan_in_fan_out=True", "(out, in)"]


def disabling_with_biases(folder: Path) -> tuple[Action, list[str]]:
    model = adapted(bias="all")

    def action() -> None:
        with model.disable_adapter():
            pass

    return action, ["'default'", "bias='all'"]


def disabling_layers_with_biases(folder: Path) -> tuple[Action, list[str]]:
    model = get_peft_model(opt(), LoraConfig(r=2, bias="lora_only"))
    return lambda: model.base_model.disable_adapter_layers(), ["'default'", "bias='lora_only'"]


def disabling_a_mixed_model_with_biases(folder: Path) -> tuple[Action, list[str]]:
    model = PeftMixedModel(stack(), config(bias="all"))

    def action() -> None:
        with model.disable_adapter():
            pass

    return action, ["'default'", "bias='all'"]


def deleting_the_active_adapter(folder: Path) -> tuple[Action, list[str]]:
    model = with_two()
    return lambda: model.delete_adapter("default"), ["'default' was deleted", "'b'"]


def deleting_the_active_adapter_with_modules(folder: Path) -> tuple[Action, list[str]]:
    model = adapted(modules_to_save=["layers.0.down"])
    model.add_adapter("b", config(modules_to_save=["layers.0.down"]))
    return lambda: model.delete_adapter("default"), ["'default' was deleted", "'b'"]


def setting_while_merged(folder: Path) -> tuple[Action, list[str]]:
    model = with_two()
    model.merge_adapter()
    return lambda: model.set_adapter("b"), ["merged"]


def merging_twice(folder: Path) -> tuple[Action, list[str]]:
    model = merged()
    return lambda: model.merge_adapter(), ["already merged", "default"]


def merging_a_layer_twice(folder: Path) -> tuple[Action, list[str]]:
    layer = merged().base_model.model.head
    return lambda: layer.merge(), ["already merged", "default"]


def unloading_what_is_merged(folder: Path) -> tuple[Action, list[str]]:
    model = merged()
    return lambda: model.merge_and_unload(), ["already merged", "default"]


def merging_what_is_off(folder: Path) -> tuple[Action, list[str]]:
    model = adapted()
    model.base_model.disable_adapter_layers()
    return lambda: model.merge_adapter(), ["switched off", "default", "unmerge_adapter"]


def unmerging_nothing(folder: Path) -> tuple[Action, list[str]]:
    model = adapted()
    return lambda: model.unmerge_adapter(), ["nothing to unmerge"]


def unmerging_nothing_in_a_layer(folder: Path) -> tuple[Action, list[str]]:
    layer = adapted().base_model.model.head
    return lambda: layer.unmerge(), ["nothing to unmerge"]


def missing_tensors(folder: Path) -> tuple[Action, list[str]]:
    adapted().save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if ".head." not in key}, path)
    return lambda: PeftModel.from_pretrained(stack(), folder), ["lacks 2 of 8", "head.lora_A"]


def missing_tensors_of_a_second_adapter(folder: Path) -> tuple[Action, list[str]]:
    missing_tensors(folder)
    model = adapted()
    return lambda: model.load_adapter(folder, "b"), ["lacks 2 of 8", "'b'"]


def left_out_because_of_their_size(folder: Path) -> tuple[Action, list[str]]:
    adapted(r=3).save_pretrained(folder)
    model = adapted()
    return (
        lambda: model.load_adapter(folder, "default", ignore_mismatched_sizes=True),
        ["8 tensors", "(3, 8)", "(2, 8)", "ignore_mismatched_sizes"],
    )


def left_out_of_a_state_dict(folder: Path) -> tuple[Action, list[str]]:
    tensors, model = get_peft_model_state_dict(adapted(r=3)), adapted()
    return lambda: set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True), ["8 tensors", "(3, 8)"]


def resized_vocabulary(folder: Path) -> tuple[Action, list[str]]:
    llama().save_pretrained(folder / "base")
    base = type(llama()).from_pretrained(folder / "base")
    base.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    model = get_peft_model(base, LoraConfig(r=2))
    return lambda: model.save_pretrained(folder / "adapter"), ["vocabulary", "save_embedding_layers=False"]


def embeddings_of_a_plain_module(folder: Path) -> tuple[Action, list[str]]:
    model = adapted()
    return lambda: model.save_pretrained(folder, save_embedding_layers=True), ["save_embedding_layers"]


SCENARIOS = [
    unknown_field,
    unknown_field_of_an_adapter,
    loftq_without_use,
    eva_config_without_use,
    corda_without_config,
    conversion_will_not_work,
    conversion_will_not_work_with_corda,
    alora_for_another_task,
    wrapped_twice,
    same_base_twice,
    injected_twice,
    other_revision,
    unmatched_target,
    unmatched_target_without_a_near_name,
    exclusion_without_effect,
    unmatched_module_to_save,
    state_dict_with_more,
    name_with_the_prefix,
    other_layout,
    other_layout_of_a_linear_layer,
    other_layout_in_a_second_adapter,
    disabling_with_biases,
    disabling_layers_with_biases,
    disabling_a_mixed_model_with_biases,
    deleting_the_active_adapter,
    deleting_the_active_adapter_with_modules,
    setting_while_merged,
    merging_twice,
    merging_a_layer_twice,
    unloading_what_is_merged,
    unmerging_nothing,
    unmerging_nothing_in_a_layer,
    missing_tensors,
    missing_tensors_of_a_second_adapter,
    left_out_because_of_their_size,
    left_out_of_a_state_dict,
    resized_vocabulary,
    embeddings_of_a_plain_module,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_one_warning_that_points_at_the_caller(scenario: Callable, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        action, mentions = scenario(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    ours = [w for w in caught if issubclass(w.category, UserWarning)]
    assert len(ours) == 1, [str(w.message) for w in ours]
    assert issubclass(ours[0].category, PeftWarning)
    text = str(ours[0].message)
    assert [part for part in mentions if part not in text] == [], text
    assert ours[0].filename == __file__, f"{ours[0].filename}:{ours[0].lineno}"


def test_a_warning_can_be_made_an_error() -> None:
    base = stack()
    with warnings.catch_warnings(), pytest.raises(PeftWarning, match="'hed'"):
        warnings.simplefilter("error", PeftWarning)
        get_peft_model(base, config(target_modules=["up", "hed"]))


def test_each_unmatched_entry_is_named_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted(target_modules=["up", "hed", "zzz"], modules_to_save=["qqq", "vvv"])
    texts = [str(w.message) for w in caught]
    assert len(texts) == 4
    assert [sum(repr(entry) in text for text in texts) for entry in ("hed", "zzz", "qqq", "vvv")] == [1, 1, 1, 1]


# ------------------------------------------------------------------------------------------ no warning at all
@pytest.mark.parametrize(
    ("build", "inputs", "kwargs"),
    [
        (llama, token_ids, {"task_type": "CAUSAL_LM"}),
        (llama, token_ids, {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
        (gpt2, token_ids, {"fan_in_fan_out": True}),
        (opt, token_ids, {"target_modules": r".*\.(q|v)_proj", "lora_dropout": 0.1, "use_rslora": True}),
        (bert_classifier, token_ids, {"task_type": "SEQ_CLS"}),
        (stack, features, {"target_modules": ["up", "head"], "rank_pattern": {"head": 3}, "lora_bias": True}),
        (stack, features, {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": "layers"}),
        (stack, features, {"target_modules": ["up", "down"], "exclude_modules": ["layers.0.up"]}),
        (kinds, lambda: token_ids(vocabulary=12), {"target_modules": ["emb", "lin"], "modules_to_save": ["norm"]}),
        (kinds, lambda: token_ids(vocabulary=12), {"target_modules": "all-linear"}),
    ],
)
def test_silence_where_nothing_is_wrong(
    build: Callable, inputs: Callable, kwargs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The plain way: inject, train, add, switch, save, load, merge, unload; no warning of anybody, no output."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(build(), LoraConfig(r=2, **kwargs)).train()
        output = model(inputs())
        (output.logits if hasattr(output, "logits") else output).square().sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        model.add_adapter("b", LoraConfig(r=3, **kwargs))
        model.set_adapter("b")
        with model.disable_adapter():
            model(inputs())
        model.set_adapter("default")
        model.delete_adapter("b")
        for _ in range(2):
            model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
        loaded.load_adapter(tmp_path, "b", low_cpu_mem_usage=True)
        loaded.merge_adapter()
        loaded.unmerge_adapter()
        loaded.merge_and_unload(safe_merge=True)
        model.unload()
    assert capsys.readouterr() == ("", "")
