# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Mistakes that users make, as data: what somebody does, what it is answered with, and what the answer has to say.

Each function prepares one mistake, and gives the model that must stay as it was (or None) and the call in which the
mistake is made. It gets a folder to work in. `tests/products/test_user_mistakes.py` makes all of them.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft import (
    AutoPeftModelForCausalLM,
    LoHaConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from support.helpers import VOCABULARY, WIDTH, features, gpt2, llama, stack, token_ids


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WARNING = "warning"

Scene = tuple[nn.Module | None, Callable[[], Any]]


class Mistake(NamedTuple):
    """
    One entry.

    Attributes:
        name: what the mistake is.
        prepare: folder -> model that must stay as it was, and the call in which the mistake is made.
        answer: class that the exception must derive from, or "warning".
        words: what the message must have: the mistake, and what was meant or what to do.
    """

    name: str
    prepare: Callable[[Path], Scene]
    answer: type[Exception] | str
    words: tuple[str, ...]


MISTAKES: list[Mistake] = []


def answered_with(answer: type[Exception] | str, *words: str) -> Callable:
    """Enter a mistake."""

    def enter(prepare: Callable[[Path], Scene]) -> Callable[[Path], Scene]:
        MISTAKES.append(Mistake(prepare.__name__, prepare, answer, words))
        return prepare

    return enter


# ------------------------------------------------------------------------------------------ what is used again
def adapt(base: nn.Module | None = None, /, cls: type = LoraConfig, name: str = "default", **fields: Any) -> Scene:
    """Put an adapter into a Llama of two layers."""
    base = llama() if base is None else base
    return base, lambda: get_peft_model(base, cls(**fields), adapter_name=name)


def adapted(base: nn.Module | None = None, **fields: Any) -> PeftModel:
    """A model with an adapter on q_proj and v_proj."""
    return get_peft_model(llama() if base is None else base, LoraConfig(**{"r": 2, **fields}))


def saved(folder: Path, base: nn.Module | None = None, /, cls: type = LoraConfig, **fields: Any) -> Path:
    """A folder with such an adapter."""
    get_peft_model(llama() if base is None else base, cls(**fields)).save_pretrained(folder / "adapter")
    return folder / "adapter"


def load(folder: Path, base: nn.Module | None = None, **options: Any) -> Scene:
    """Load an adapter."""
    base = llama() if base is None else base
    return base, lambda: PeftModel.from_pretrained(base, folder, **options)


def change_config(folder: Path, *without: str, **fields: Any) -> Path:
    """Change fields of a saved config."""
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    content = {key: value for key, value in {**content, **fields}.items() if key not in without}
    (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Change tensors of a saved adapter."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def cut(folder: Path, size: int) -> Path:
    """Cut the file of an adapter off."""
    os.truncate(folder / WEIGHTS, size)
    return folder


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """A change of keys."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


# ------------------------------------------------------------------------------------------ names of modules
@answered_with(ValueError, "q_porj", "q_proj")
def typo_in_the_only_target(folder: Path) -> Scene:
    return adapt(target_modules=["q_porj"])


@answered_with(WARNING, "'v_porj'", "v_proj")
def typo_in_one_of_several_targets(folder: Path) -> Scene:
    return adapt(target_modules=["q_proj", "v_porj"])


@answered_with(ValueError, "q_porj", "q_proj")
def typo_in_a_regular_expression(folder: Path) -> Scene:
    return adapt(target_modules=r".*\.q_porj")


@answered_with(ValueError, "target_modules", "regular expression", "missing )")
def regular_expression_that_does_not_compile(folder: Path) -> Scene:
    return adapt(target_modules=r".*\.(q_proj|v_proj")


@answered_with(ValueError, "query_key_value", "q_proj", "v_proj")
def targets_of_another_architecture(folder: Path) -> Scene:
    return adapt(target_modules=["query_key_value"])


@answered_with(ValueError, "target_modules", "list", "['q_proj', 'v_proj']")
def list_of_targets_as_a_json_string(folder: Path) -> Scene:
    return adapt(target_modules='["q_proj", "v_proj"]')


@answered_with(ValueError, "target_modules", "list", "['q_proj', 'v_proj']")
def list_of_targets_as_a_string_with_commas(folder: Path) -> Scene:
    return adapt(target_modules="q_proj, v_proj")


@answered_with(ValueError, "layers.0.self_attn'", "LlamaAttention", "Linear")
def target_that_is_no_layer(folder: Path) -> Scene:
    return adapt(target_modules=["self_attn"])


@answered_with(WARNING, "modules_to_save", "'lm_haed'", "lm_head")
def typo_in_modules_to_save(folder: Path) -> Scene:
    return adapt(target_modules=["q_proj"], modules_to_save=["lm_haed"])


@answered_with(TypeError, "modules_to_save", "list", "'lm_head'")
def modules_to_save_as_a_string(folder: Path) -> Scene:
    return adapt(target_modules=["q_proj"], modules_to_save="lm_head")


@answered_with(WARNING, "exclude_modules", "layers.0.self_attn.q_porj", "layers.0.self_attn.q_proj")
def exclude_modules_that_match_nothing(folder: Path) -> Scene:
    return adapt(target_modules=["q_proj"], exclude_modules=["layers.0.self_attn.q_porj"])


@answered_with(WARNING, "rank_pattern", "'q_porj'", "q_proj")
def rank_pattern_that_matches_nothing(folder: Path) -> Scene:
    return adapt(target_modules=["q_proj", "v_proj"], rank_pattern={"q_porj": 4})


@answered_with(WARNING, "alpha_pattern", "layers\\\\.2", "model.layers.1.self_attn.q_proj")
def alpha_pattern_that_matches_nothing(folder: Path) -> Scene:
    return adapt(target_modules=["q_proj"], alpha_pattern={r"^model\.layers\.2\.self_attn\.q_proj": 4})


@answered_with(ValueError, "layers_to_transform=[9]", "no layer 9", "0 to 1")
def layers_to_transform_out_of_range(folder: Path) -> Scene:
    return adapt(target_modules=["q_proj"], layers_to_transform=[9])


@answered_with(WARNING, "layers_to_transform", "no layer 2", "0 to 1")
def last_layer_counted_from_one(folder: Path) -> Scene:
    return adapt(target_modules=["q_proj"], layers_to_transform=[1, 2])


@answered_with(ValueError, "layers_pattern='layer'", "did you mean layers?")
def typo_in_layers_pattern(folder: Path) -> Scene:
    return adapt(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layer")


@answered_with(ValueError, "target_parameters", "q_porj.weight", "q_proj.weight")
def typo_in_target_parameters(folder: Path) -> Scene:
    return adapt(target_parameters=["self_attn.q_porj.weight"])


@answered_with(ValueError, f"[{VOCABULARY}]", f"between 0 and {VOCABULARY - 1}", "resize_token_embeddings")
def token_index_out_of_range(folder: Path) -> Scene:
    return adapt(target_modules=["q_proj"], trainable_token_indices=[1, VOCABULARY])


@answered_with(ValueError, "embed_token", "embed_tokens")
def typo_in_the_module_of_tokens(folder: Path) -> Scene:
    return adapt(target_modules=["q_proj"], trainable_token_indices={"embed_token": [1]})


@answered_with(WARNING, "ensure_weight_tying=True", "no two modules", "tie_word_embeddings=False")
def tying_in_a_model_without_ties(folder: Path) -> Scene:
    return adapt(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)


# ------------------------------------------------------------------------------------------ values of fields
@answered_with(ValueError, "rank r", "integer", "8.5")
def rank_that_is_a_float(folder: Path) -> Scene:
    return adapt(r=8.5)


@answered_with(ValueError, "rank r", "integer", "'8'")
def rank_that_is_a_string(folder: Path) -> Scene:
    return adapt(r="8")


@answered_with(ValueError, "r", "-4", "positive")
def negative_rank(folder: Path) -> Scene:
    return adapt(r=-4)


@answered_with(ValueError, "rank_pattern['q_proj']", "0", "positive")
def rank_of_zero_in_a_pattern(folder: Path) -> Scene:
    return adapt(target_modules=["q_proj"], rank_pattern={"q_proj": 0})


@answered_with(ValueError, "lora_dropout", "1.5", "between 0 and 1")
def dropout_above_one(folder: Path) -> Scene:
    return adapt(lora_dropout=1.5)


@answered_with(ValueError, "init_lora_weights", "'gausian'", "gaussian")
def typo_in_the_initialisation(folder: Path) -> Scene:
    return adapt(init_lora_weights="gausian")


@answered_with(NotImplementedError, "bias='lora-only'", "lora_only")
def typo_in_bias(folder: Path) -> Scene:
    return adapt(bias="lora-only")


@answered_with(ValueError, "'CAUSAL_LLM'", "CAUSAL_LM")
def typo_in_the_task(folder: Path) -> Scene:
    return adapt(task_type="CAUSAL_LLM")


@answered_with(TypeError, "lora_droput", "lora_dropout")
def typo_in_the_name_of_a_field(folder: Path) -> Scene:
    return adapt(lora_droput=0.1)


@answered_with(TypeError, "LoHaConfig", "lora_alpha", "alpha")
def field_of_another_method(folder: Path) -> Scene:
    return adapt(cls=LoHaConfig, lora_alpha=4)


# ------------------------------------------------------------------------------------------ models and tasks
@answered_with(WARNING, "SEQ_2_SEQ_LM", "LlamaForCausalLM", "CAUSAL_LM")
def seq2seq_task_for_a_decoder(folder: Path) -> Scene:
    return adapt(task_type="SEQ_2_SEQ_LM")


@answered_with(WARNING, "SEQ_CLS", "LlamaForCausalLM", "modules_to_save")
def classification_task_for_a_model_without_a_head(folder: Path) -> Scene:
    return adapt(task_type="SEQ_CLS")


@answered_with(WARNING, "add_adapter", "unload()")
def model_that_is_a_peft_model_already(folder: Path) -> Scene:
    model = adapted()
    return None, lambda: get_peft_model(model, LoraConfig())


@answered_with(TypeError, "peft_config", "dict", "PeftConfig")
def dictionary_instead_of_a_config(folder: Path) -> Scene:
    base = llama()
    return base, lambda: get_peft_model(base, {"peft_type": "LORA", "r": 4})


@answered_with(TypeError, "peft_config", "LlamaConfig", "PeftConfig")
def config_of_the_base_model_instead_of_the_adapters(folder: Path) -> Scene:
    base = llama()
    return base, lambda: get_peft_model(base, base.config)


@answered_with(TypeError, "LlamaForCausalLM", "wrong way round")
def model_and_config_the_wrong_way_round(folder: Path) -> Scene:
    base = llama()
    return base, lambda: get_peft_model(LoraConfig(), base)


@answered_with(ValueError, "PROMPT_TUNING", "get_peft_model")
def prompt_injected_into_modules(folder: Path) -> Scene:
    base = llama()
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return base, lambda: inject_adapter_in_model(config, base)


# ------------------------------------------------------------------------------------------ adapters by name
@answered_with(ValueError, "'default'", "already", "another name")
def name_that_is_taken(folder: Path) -> Scene:
    model = adapted()
    return model, lambda: model.add_adapter("default", LoraConfig())


@answered_with(KeyError, "'v1.0'", "dots")
def name_with_a_dot(folder: Path) -> Scene:
    return adapt(name="v1.0")


@answered_with(ValueError, "'defualt'", "did you mean default?")
def activating_an_adapter_that_does_not_exist(folder: Path) -> Scene:
    model = adapted()
    return model, lambda: model.set_adapter("defualt")


@answered_with(ValueError, "'frnech'", "did you mean french?")
def activating_several_one_of_which_does_not_exist(folder: Path) -> Scene:
    model = adapted()
    model.add_adapter("french", LoraConfig())
    return model, lambda: model.base_model.set_adapter(["default", "frnech"])


@answered_with(ValueError, "'french'", "default")
def deleting_an_adapter_that_does_not_exist(folder: Path) -> Scene:
    model = adapted()
    return model, lambda: model.delete_adapter("french")


@answered_with(WARNING, "'default' was deleted", "'french'")
def deleting_the_active_adapter(folder: Path) -> Scene:
    model = adapted()
    model.add_adapter("french", LoraConfig())
    return None, lambda: model.delete_adapter("default")


@answered_with(ValueError, "'frnech'", "did you mean french?")
def saving_an_adapter_that_does_not_exist(folder: Path) -> Scene:
    model = adapted()
    model.add_adapter("french", LoraConfig())
    return model, lambda: model.save_pretrained(folder, selected_adapters=["frnech"])


@answered_with(ValueError, "LORA", "LOHA", "PeftMixedModel")
def second_adapter_of_another_method(folder: Path) -> Scene:
    model = adapted()
    return model, lambda: model.add_adapter("b", LoHaConfig(target_modules=["q_proj"]))


@answered_with(ValueError, "VERA", "LORA")
def method_that_cannot_be_mixed(folder: Path) -> Scene:
    model = get_peft_model(stack(), LoraConfig(target_modules=["up"]), mixed=True)
    return model, lambda: model.add_adapter("b", VeraConfig(target_modules=["up"]))


@answered_with(ValueError, "'frnech'", "french", "__base__")
def batch_with_an_adapter_that_does_not_exist(folder: Path) -> Scene:
    model = get_peft_model(stack(), LoraConfig(target_modules=["up"]), adapter_name="french").eval()
    return model, lambda: model(features(batch=2), adapter_names=["french", "frnech"])


# ------------------------------------------------------------------------------------------ merging
@answered_with(WARNING, "already merged", "default")
def merging_twice(folder: Path) -> Scene:
    model = adapted()
    model.merge_adapter()
    return model, lambda: model.merge_adapter()


@answered_with(WARNING, "'defualt'", "did you mean default?")
def merging_an_adapter_that_does_not_exist(folder: Path) -> Scene:
    model = adapted()
    return model, lambda: model.merge_adapter(["defualt"])


@answered_with(TypeError, "adapter_names", "list", "'default'")
def merging_a_name_instead_of_a_list(folder: Path) -> Scene:
    model = adapted()
    return model, lambda: model.merge_and_unload(adapter_names="default")


@answered_with(RuntimeError, "meta device", "load")
def merging_while_on_the_meta_device(folder: Path) -> Scene:
    base = llama()
    model = get_peft_model(base, LoraConfig(), low_cpu_mem_usage=True)
    return model, model.merge_and_unload


@answered_with(WARNING, "nothing to unmerge")
def unmerging_what_is_not_merged(folder: Path) -> Scene:
    model = adapted()
    return model, lambda: model.unmerge_adapter()


# ------------------------------------------------------------------------------------------ files
@answered_with(ValueError, CONFIG, "adapter_model.safetensors", "save_pretrained")
def folder_without_a_config(folder: Path) -> Scene:
    (saved(folder) / CONFIG).unlink()
    return load(folder / "adapter")


@answered_with(ValueError, WEIGHTS, CONFIG, "save_pretrained")
def folder_without_weights(folder: Path) -> Scene:
    (saved(folder) / WEIGHTS).unlink()
    return load(folder / "adapter")


@answered_with(ValueError, WEIGHTS, "is a file", "folder")
def path_of_the_file_instead_of_the_folder(folder: Path) -> Scene:
    return load(saved(folder) / WEIGHTS)


@answered_with(ValueError, CONFIG, "subfolder='adapter'")
def path_of_the_folder_above(folder: Path) -> Scene:
    saved(folder)
    return load(folder)


@answered_with(ValueError, WEIGHTS, "not a whole safetensors file", "again")
def file_that_is_no_safetensors(folder: Path) -> Scene:
    (saved(folder) / WEIGHTS).write_text("version https://git-lfs.example/spec/v1\noid sha256:0\nsize 10\n")
    return load(folder / "adapter")


@answered_with(ValueError, WEIGHTS, "not a whole safetensors file", "again")
def empty_file(folder: Path) -> Scene:
    return load(cut(saved(folder), 0))


@answered_with(ValueError, WEIGHTS, "not a whole safetensors file", "again")
def truncated_file(folder: Path) -> Scene:
    return load(cut(saved(folder), 3000))


@answered_with(ValueError, "2 tensors", "not finite", "lora_B", "earlier checkpoint")
def weights_that_are_not_finite(folder: Path) -> Scene:
    def diverge(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "layers.1" in key and "lora_B" in key]:
            tensors[key].fill_(float("nan"))

    return load(change_weights(saved(folder), diverge))


@answered_with(ValueError, "8 tensors", "int8", "float32", "nothing was loaded")
def weights_of_the_wrong_type(folder: Path) -> Scene:
    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.mul(100).to(torch.int8) for key, tensor in tensors.items()})

    return load(change_weights(saved(folder), quantise))


@answered_with(RuntimeError, "(8, 16)", "(4, 16)", "rank", "nothing was loaded")
def config_with_another_rank(folder: Path) -> Scene:
    return load(change_config(saved(folder), r=4))


@answered_with(RuntimeError, "LORA", "hada_w1_a", "named like those of LOHA")
def files_of_two_adapters_swapped(folder: Path) -> Scene:
    other = saved(folder / "other", cls=LoHaConfig, target_modules=["q_proj", "v_proj"])
    (other / WEIGHTS).rename(saved(folder) / WEIGHTS)
    return load(folder / "adapter")


@answered_with(RuntimeError, "transformer.model.layers", "base_model.model.model.layers", "key_mapping")
def keys_with_another_prefix(folder: Path) -> Scene:
    return load(change_weights(saved(folder), renamed("base_model.model.", "transformer.")))


@answered_with(WARNING, "2 of 8", "q_prj.lora_A.weight (near: ", "q_proj.lora_A.weight", "key_mapping")
def keys_of_one_layer_renamed(folder: Path) -> Scene:
    return load(change_weights(saved(folder), renamed("layers.1.self_attn.q_proj", "layers.1.self_attn.q_prj")))


@answered_with(WARNING, "lacks 4 of 12 tensors", "k_proj", "start values")
def config_with_more_targets_than_the_file(folder: Path) -> Scene:
    return load(change_config(saved(folder), target_modules=["q_proj", "v_proj", "k_proj"]))


@answered_with(WARNING, "4 tensors", "v_proj", "belong to nothing")
def config_with_fewer_targets_than_the_file(folder: Path) -> Scene:
    return load(change_config(saved(folder), target_modules=["q_proj"]))


@answered_with(WARNING, "lora_aplha", "did you mean lora_alpha?", "LoraConfig")
def field_of_a_config_file_misspelt(folder: Path) -> Scene:
    return load(change_config(saved(folder), lora_aplha=4))


@answered_with(WARNING, "warp_factor", "LoraConfig", "9.1.0", "newer")
def config_file_of_a_newer_version(folder: Path) -> Scene:
    return load(change_config(saved(folder), warp_factor=3, peft_version="9.1.0"))


@answered_with(KeyError, "'LORRA'", "did you mean LORA?")
def unknown_method_in_a_config_file(folder: Path) -> Scene:
    return load(change_config(saved(folder), peft_type="LORRA"))


@answered_with(KeyError, "peft_type", CONFIG)
def config_file_without_a_method(folder: Path) -> Scene:
    return load(change_config(saved(folder), "peft_type"))


@answered_with(ValueError, CONFIG, "r must be int", "'8'")
def rank_in_quotes_in_a_config_file(folder: Path) -> Scene:
    return load(change_config(saved(folder), r="8"))


@answered_with(ValueError, CONFIG, "not valid JSON", "line")
def config_file_with_a_comma_too_many(folder: Path) -> Scene:
    path = saved(folder) / CONFIG
    path.write_text(path.read_text().replace("\n}", ",\n}"))
    return load(folder / "adapter")


# ------------------------------------------------------------------------------------------ other base models
@answered_with(ValueError, "q_proj", "v_proj", "c_attn")
def adapter_for_another_architecture(folder: Path) -> Scene:
    return load(saved(folder), gpt2())


@answered_with(RuntimeError, "(8, 16)", "(8, 32)", "'somebody/small'", "'somebody/large'", "base model")
def adapter_for_a_model_of_another_width(folder: Path) -> Scene:
    small, large = llama(), llama(hidden_size=32)
    small.name_or_path, large.name_or_path = "somebody/small", "somebody/large"
    return load(saved(folder, small), large)


@answered_with(WARNING, "4 tensors", "layers.1", "belong to nothing")
def adapter_for_a_deeper_model(folder: Path) -> Scene:
    return load(saved(folder), llama(num_hidden_layers=1))


@answered_with(RuntimeError, f"({VOCABULARY + 3}, {WIDTH})", f"resize_token_embeddings({VOCABULARY + 3})")
def vocabulary_that_was_not_resized(folder: Path) -> Scene:
    grown = llama()
    grown.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    return load(saved(folder, grown, modules_to_save=["embed_tokens", "lm_head"]))


@answered_with(ValueError, "SEQ_CLS", "AutoPeftModelForSequenceClassification", "AutoPeftModelForCausalLM")
def auto_class_of_another_task(folder: Path) -> Scene:
    path = change_config(saved(folder), task_type="SEQ_CLS", base_model_name_or_path=str(folder / "base"))
    return None, lambda: AutoPeftModelForCausalLM.from_pretrained(path)


@answered_with(ValueError, "is_trainable=True", "load_adapter")
def prompt_to_be_trained_further(folder: Path) -> Scene:
    path = saved(folder, cls=PromptTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=2)
    return load(path, is_trainable=True)


@answered_with(ValueError, "config", "dict", "PeftConfig")
def config_given_as_a_dictionary(folder: Path) -> Scene:
    return load(saved(folder), config={"r": 8})


@answered_with(NotImplementedError, "PeftMixedModel", "merge_and_unload")
def saving_a_mixed_model(folder: Path) -> Scene:
    model = PeftMixedModel(stack(), LoraConfig(target_modules=["up"]))
    return model, lambda: model.save_pretrained(folder / "mixed")


@answered_with(KeyError, "'defualt'", "did you mean default?")
def state_dict_of_an_adapter_that_does_not_exist(folder: Path) -> Scene:
    model = adapted()
    return model, lambda: get_peft_model_state_dict(model, adapter_name="defualt")


@answered_with(ValueError, "2 entries", "batch of 3")
def batch_with_too_few_adapter_names(folder: Path) -> Scene:
    model = adapted().eval()
    return model, lambda: model(token_ids(batch=3), adapter_names=["default", "default"])
