# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
What adapters start with for a seed, as the released package draws it.

`python starts.py starts.json`, run with that package, records it; `tests/products/test_starts.py` compares.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft


FACTS = Path(__file__).parent / "starts.json"
EVERY_KIND = ["emb", "one", "two", "conv1d", "conv2d", "conv3d", "transposed"]


class Net(nn.Module):
    """A layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 8, bias=False)
        self.conv1d, self.conv2d, self.conv3d = nn.Conv1d(8, 6, 3), nn.Conv2d(4, 8, 3), nn.Conv3d(4, 4, 1)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.transposed = Conv1D(6, 8)
        self.experts = nn.Parameter(torch.randn(3, 8, 6))


def cases() -> Iterator[tuple[str, peft.PeftConfig, torch.dtype]]:
    """Yield name, config and type of the base model."""

    def lora(**options: object) -> peft.PeftConfig:
        return peft.LoraConfig(r=4, **{"target_modules": EVERY_KIND, **options})

    linear = {"target_modules": ["one", "two", "transposed"]}
    yield "lora", lora(), torch.float32
    yield "lora-random", lora(init_lora_weights=False), torch.float32
    yield "lora-gaussian", lora(init_lora_weights="gaussian"), torch.float32
    yield "lora-orthogonal", lora(init_lora_weights="orthogonal", target_modules=["one", "emb", "two"]), torch.float32
    yield "lora-pissa", lora(init_lora_weights="pissa", target_modules=["one", "emb", "two"]), torch.float32
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        yield f"lora-{str(dtype)[6:]}", lora(), dtype
    yield "lora-groups", lora(target_modules=["grouped", "one"]), torch.float32
    yield "lora-bias", lora(target_modules=["one", "conv2d"], lora_bias=True), torch.float32
    yield "lora-dora", lora(target_modules=["emb", "one", "conv2d", "transposed"], use_dora=True), torch.float32
    yield "lora-pattern", lora(rank_pattern={"two": 2}, lora_dropout=0.1), torch.float32
    yield "lora-parameter", lora(target_modules=["emb"], target_parameters=["one.weight"]), torch.float32
    yield "lora-saved", lora(target_modules=["one", "two"], modules_to_save=["transposed"]), torch.float32
    for started in (True, False):
        name = "start" if started else "random"
        options = {"target_modules": ["one", "two", "conv2d"], "init_weights": started}
        yield f"loha-{name}", peft.LoHaConfig(r=4, **options), torch.float32
        yield f"lokr-{name}", peft.LoKrConfig(r=1, decompose_both=True, **options), torch.float32
        yield f"oft-{name}", peft.OFTConfig(oft_block_size=2, **options), torch.float32
        yield f"boft-{name}", peft.BOFTConfig(boft_block_size=2, **options), torch.float32
        yield f"hra-{name}", peft.HRAConfig(r=2, **options), torch.float32
        options["target_modules"] = ["one", "two", "transposed"]
        yield f"vera-{name}", peft.VeraConfig(r=4, **options), torch.float32
        yield f"fourierft-{name}", peft.FourierFTConfig(n_frequency=5, **options), torch.float32
        adalora = peft.AdaLoraConfig(init_r=4, total_step=9, init_lora_weights=started, **linear)
        yield f"adalora-{name}", adalora, torch.float32
    vblora = peft.VBLoRAConfig(vector_length=2, num_vectors=6, topk=2, r=2, target_modules=["one"])
    yield "vblora", vblora, torch.float32
    yield "tokens", peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 2]), torch.float32


def start(config: peft.PeftConfig, dtype: torch.dtype) -> dict[str, list]:
    """
    Make two adapters of a config and describe their tensors, so that what is drawn in between counts too.

    Returns:
        Name of a tensor -> sum, sum of squares, first and last entry.
    """
    torch.manual_seed(3)
    base = Net().to(dtype)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config, adapter_name="a")
    # neither PiSSA, which has changed the base weights, nor AdaLoRA, which hands out ranks, allows for two
    if config.peft_type in ("LORA", "LOHA", "VBLORA") and getattr(config, "init_lora_weights", None) != "pissa":
        model.add_adapter("b", config)
    found = {}
    for name, tensor in model.state_dict().items():
        if any(part in ("a", "b") for part in name.split(".")) and "modules_to_save" not in name:
            flat = tensor.double().flatten()
            values = (flat.sum(), flat.square().sum(), flat[0], flat[-1])
            found[name] = [float(f"{value.item():.6g}") for value in values]
    return found


def main() -> None:
    """Write what the package that is installed starts with."""
    warnings.simplefilter("ignore")
    facts = {name: start(config, dtype) for name, config, dtype in cases()}
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=0, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
