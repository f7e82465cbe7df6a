# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""LoRA in all its forms: how each start, variant and optimiser is set up."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from examples.small_model import LENGTH, adamw, batch

from peft import LoraConfig, PeftModel, get_peft_model, optimizers
from peft.tuners.lora.starts.registry import registered_starts
from peft.tuners.lora.variants.registry import variants_by_field


RANK = 4
Batches = Callable[[], Iterator[dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class Setting:
    """
    One form of LoRA.

    Attributes:
        name: what it is called in tables.
        kind: "start", "variant" or "optimiser".
        options: fields of the config.
        adapt: makes the adapted model from the base model, its config and batches of the text to train on.
        optimizer_of: makes the optimiser from the model and a learning rate.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    adapt: Callable[[torch.nn.Module, LoraConfig, Batches], PeftModel] = lambda model, config, _: get_peft_model(
        model, config
    )
    optimizer_of: Callable[[torch.nn.Module, float], torch.optim.Optimizer] = adamw

    def config(self) -> LoraConfig:
        """Make the config; everything that the setting does not name is the same for all."""
        return LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **self.options
        )


# ------------------------------------------------------------------------------------------ starts that look at data
def by_eva(model: torch.nn.Module, config: LoraConfig, batches: Batches) -> PeftModel:
    """Give the factors the principal components of what the layers read."""
    from peft import initialize_lora_eva_weights

    adapted = get_peft_model(model, config)
    initialize_lora_eva_weights(adapted, list(batches()), show_progress_bar=False)
    return adapted


def by_corda(model: torch.nn.Module, config: LoraConfig, batches: Batches) -> PeftModel:
    """Decompose the weights in the metric of their inputs."""
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        with torch.no_grad():
            for inputs in batches():
                for ids in inputs["input_ids"]:
                    model(input_ids=ids[None])

    preprocess_corda(model, config, run_model=run)
    return get_peft_model(model, config)


def by_gradients(model: torch.nn.Module, config: LoraConfig, batches: Batches) -> PeftModel:
    """Start along the gradient of the weights."""
    from peft.tuners.lora.loraga import preprocess_loraga

    def step() -> None:
        for inputs in batches():
            model(**inputs, labels=inputs["input_ids"]).loss.backward()

    preprocess_loraga(model, config, step)
    return get_peft_model(model, config)


def start_setting(name: bool | str) -> Setting:
    """Set up a start; one that needs nothing beside its name is used by that."""
    from peft import EvaConfig, LoftQConfig, LoraGAConfig
    from peft.tuners.lora.config import CordaConfig

    options: dict[str, Any] = {"init_lora_weights": name}
    if name == "eva":
        return Setting("eva", "start", {**options, "eva_config": EvaConfig()}, by_eva)
    if name == "corda":
        return Setting("corda", "start", {**options, "corda_config": CordaConfig()}, by_corda)
    if name == "lora_ga":
        return Setting("lora_ga", "start", {**options, "lora_ga_config": LoraGAConfig()}, by_gradients)
    if name == "loftq":
        return Setting("loftq", "start", {**options, "loftq_config": LoftQConfig(loftq_bits=4)})
    return Setting({True: "LoRA", False: "normal A and B"}.get(name, str(name)), "start", options)


# ------------------------------------------------------------------------------------------ variants
def variant_setting(name: str) -> Setting | None:
    """Set up a variant; None for those that route to adapters instead of training one."""
    from peft import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

    special: dict[str, dict[str, Any] | None] = {
        "arrow_config": None,
        "alora_invocation_tokens": {name: [ord("\n")]},
        "use_bdlora": {name: BdLoraConfig(target_modules_bd_a=["q_proj", "v_proj"], nblocks=2)},
        "kasa_config": {name: KasaConfig()},
        "monteclora_config": {name: MontecloraConfig()},
        "velora_config": {name: VeloraConfig(num_groups=16)},
        "use_qalora": {name: True, "qalora_group_size": 8},
    }
    options = special.get(name, {name: True})
    return None if options is None else Setting(name, "variant", options)


# ------------------------------------------------------------------------------------------ optimisers
def lora_plus(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """Let B learn faster."""
    return optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=16)


def lora_fa(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """Freeze A."""
    return optimizers.create_lorafa_optimizer(model, r=RANK, lora_alpha=2 * RANK, lr=rate)


def riemannian(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """Make steps that do not depend on how the product is divided."""
    return optimizers.create_riemannian_optimizer(model, torch.optim.AdamW, lr=rate)


def settings() -> dict[str, Setting]:
    """List every form of LoRA that there is, those that were registered outside the package too."""
    found = [start_setting(name) for name in registered_starts()]
    found += [setting for name in variants_by_field() if (setting := variant_setting(name)) is not None]
    found.append(Setting("rsLoRA", "variant", {"use_rslora": True}))
    found.append(Setting("bias of B", "variant", {"lora_bias": True}))
    found += [
        Setting("LoRA+", "optimiser", optimizer_of=lora_plus),
        Setting("LoRA-FA", "optimiser", optimizer_of=lora_fa),
        Setting("Riemannian", "optimiser", optimizer_of=riemannian),
    ]
    return {setting.name: setting for setting in found}


def batches_of(text: torch.Tensor, count: int, seed: int) -> Batches:
    """Give a function that yields batches of a text."""

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            ids = batch(text, 8, generator)
            yield {"input_ids": ids, "attention_mask": torch.ones(8, LENGTH, dtype=torch.long)}

    return batches


def size_of(model: PeftModel) -> float:
    """Measure the saved adapter, in KB."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) / 1024
