# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Copies of saved modules on a base model in half precision: trained in float32, merged in the type of the base."""

from pathlib import Path

import pytest
import torch
from helpers import assert_close, bert_classifier, llama, logits, randomise, token_ids, trainable
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model


pytestmark = pytest.mark.filterwarnings("ignore")

HALF = [torch.float16, torch.bfloat16]


def lora(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], **options})


def types(model: nn.Module, trained: bool) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad == trained}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_what_is_trained_is_in_float32(dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = get_peft_model(llama().to(dtype), lora())
    assert types(model, trained=True) == {torch.float32} and types(model, trained=False) == {dtype}
    randomise(model, "modules_to_save.default")
    expected = logits(model, token_ids())
    assert expected.dtype == dtype
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        llama().to(dtype), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert types(again, trained=True) == {torch.float32}
    assert torch.equal(logits(again, token_ids()), expected)
    merged = again.merge_and_unload(safe_merge=True)
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert_close(logits(merged, token_ids()).float(), expected.float(), atol=0.05)


def test_types_are_kept_on_request() -> None:
    model = get_peft_model(llama().bfloat16(), lora(), autocast_adapter_dtype=False)
    assert types(model, trained=True) == {torch.bfloat16}
    model.add_adapter("other", lora())
    assert model.get_base_model().lm_head.modules_to_save["other"].weight.dtype == torch.float32


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_tied_copy_is_one_parameter(names: list[str]) -> None:
    model = get_peft_model(llama(tied=True).bfloat16(), lora(modules_to_save=names, ensure_weight_tying=True))
    base = model.get_base_model()
    embedding, head = (m.modules_to_save["default"] for m in (base.model.embed_tokens, base.lm_head))
    assert embedding.weight is head.weight and embedding.weight.dtype == torch.float32
    model.train()(token_ids()).logits.float().square().mean().backward()
    assert embedding.weight.grad.dtype == torch.float32 and embedding.weight.grad.isfinite().all()
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.lm_head.weight.dtype == torch.bfloat16


def test_a_copy_that_shares_a_bias_with_the_base_model() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.hidden, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
            self.head.weight = self.words.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.hidden(self.words(ids)))

    config = LoraConfig(target_modules=["hidden"], modules_to_save=["words"], ensure_weight_tying=True)
    model = get_peft_model(Tied().bfloat16(), config)
    head = model.get_base_model().head
    assert head.modules_to_save["default"].bias is head.original_module.bias
    assert head.modules_to_save["default"].weight.dtype == torch.float32
    output = model(torch.tensor([[1, 2]]))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert head.modules_to_save["default"].weight.grad is not None and head.original_module.bias.grad is None


def test_a_block_that_gives_a_tuple_and_a_head_that_is_trained() -> None:
    model = get_peft_model(
        bert_classifier().bfloat16(),
        LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], modules_to_save=["pooler", "layer.1"]),
    )
    assert types(model, trained=True) == {torch.float32}
    assert logits(model.eval(), token_ids()).dtype == torch.bfloat16
    assert any("layer.1" in name for name in trainable(model))


def test_batch_norm_keeps_its_buffers_in_the_type_of_the_copy() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).bfloat16()
    model = get_peft_model(base, LoraConfig(target_modules=["0"], modules_to_save=["1"])).train()
    assert model(torch.randn(5, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert base[1].modules_to_save["default"].running_mean.dtype == torch.float32
    assert model.merge_and_unload()[1].running_mean.dtype == torch.bfloat16
