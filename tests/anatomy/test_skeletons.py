# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Models without weights: copies of models, and models built from a config."""

from pathlib import Path

import pytest
from support.helpers import llama
from torch import nn

from peft import LoraConfig
from peft.anatomy.skeletons import build_skeleton, copy_without_storage, model_config_path, without_storage
from peft.utils.error import PeftPathError, PeftValueError


def test_a_copy_has_the_ties_of_the_model_and_no_storage() -> None:
    model = llama(tie_word_embeddings=True)
    copied = without_storage(model)
    assert {tensor.device.type for tensor in (*copied.parameters(), *copied.buffers())} == {"meta"}
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert not any(parameter.is_meta for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        ours = copied.get_parameter(name)
        assert (ours.shape, ours.dtype, ours.requires_grad) == (
            parameter.shape,
            parameter.dtype,
            parameter.requires_grad,
        )


def test_objects_over_one_memory_become_one() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data)
    copied, originals = copy_without_storage(model)
    assert copied[1].weight is copied[0].weight
    assert originals[id(copied[0].weight)] is model[0].weight
    assert originals[id(copied[1].bias)] is model[1].bias


@pytest.mark.parametrize(
    ("task", "expected"), [("CAUSAL_LM", "LlamaForCausalLM"), ("SEQ_CLS", "LlamaForSequenceClassification")]
)
def test_the_task_of_an_adapter_says_which_model_is_built(task: str, expected: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        skeleton = build_skeleton(str(path), LoraConfig(task_type=task))
        assert type(skeleton).__name__ == expected
        assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_what_cannot_be_built_is_told(tmp_path: Path) -> None:
    with pytest.raises(PeftPathError, match="there is no file"):
        build_skeleton(str(tmp_path), LoraConfig())
    with pytest.raises(PeftPathError, match="give the folder of a transformers model"):
        model_config_path(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows"}')
    with pytest.raises(PeftValueError, match="nobody_knows"):
        build_skeleton(str(tmp_path), LoraConfig())
    assert model_config_path(str(tmp_path)) == str(tmp_path / "config.json")
