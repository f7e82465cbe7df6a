# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""How FSDP divides a model with adapters."""

import pytest
from support.helpers import llama, refused

from peft import LoraConfig, get_peft_model
from peft.utils.fsdp import fsdp_auto_wrap_policy


def units(model) -> list[str]:
    """Names of the modules that become units of their own."""
    policy = fsdp_auto_wrap_policy(model)
    assert all(policy(module, True, 0) for module in model.modules())  # every module is looked into
    return [name for name, module in model.named_modules() if policy(module, False, 0)]


def test_blocks_and_trained_layers_are_units() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    found = units(model)
    blocks = [name for name in found if "lora" not in name]
    assert blocks == ["base_model.model.model.layers.0", "base_model.model.model.layers.1"]
    factors = [name for name in found if "lora" in name]
    assert len(factors) == 4 and {name.split(".")[-2] for name in factors} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("tied", [True, False])
def test_members_of_a_tie_are_in_one_unit(tied: bool) -> None:
    """Each would be given a copy of its own if both were units."""
    config = LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=tied
    )
    found = units(get_peft_model(llama(tied=tied), config))
    saved = [name for name in found if "modules_to_save" in name]
    assert len(saved) == (0 if tied else 2)


def test_blocks_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP, LlamaAttention")
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    assert [name for name in units(model) if name.endswith(("mlp", "self_attn", "layers.0"))] == [
        f"base_model.model.model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")
    ]
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaBlock")
    with refused(model, ValueError, "LlamaBlock", "LlamaDecoderLayer"):
        fsdp_auto_wrap_policy(model)
