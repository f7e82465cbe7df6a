# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Reading one golden case: an adapter that the release saved, and what was observed with it.

The stages are independent of each other; each yields one line for each thing that is not as it was observed. Calls
that have to raise are looked up inside `expect_raise`, because a model without the method refuses as well.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)

from . import store
from .bases import Base
from .compare import (
    comparable_config,
    compare,
    compare_dicts,
    compare_keys,
    compare_state_dicts,
    compare_tensors,
    expect_raise,
    is_close,
    make_config,
    read_config,
    trainable_shapes,
)


# Nothing that is compared may depend on it; it makes a failure repeat itself.
SEED = 20
# Merging reorders sums, so its results are compared more loosely than a forward pass.
MERGE_ATOL = 5e-5
UNMERGE_ATOL = 1e-4
# The model fills these in, and the config class resets them.
SET_BY_CPT = ("num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim")


class Case:
    """The facts and tensors of one case, its adapter written to `folder`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.facts = store.facts()["cases"][name]
        base, case = name.split("/")
        self.base = Base.named(base)
        self.saved = store.tensors(base, case, "adapter")
        self.expected = store.tensors(base, case, "expected") | {"equals_base": self.base.output}
        self.expected["equals_adapter"] = self.expected["adapter"]
        self.atol = self.facts.get("atol", 1e-5)
        self.folder = folder
        save_adapter(folder, self.facts["adapter_config"], self.saved, as_pickle=not self.is_safetensors)

    @property
    def is_safetensors(self) -> bool:
        """Whether the adapter was saved in the safetensors format."""
        return self.facts.get("save_kwargs", {}).get("safe_serialization", True)

    @property
    def asks_for_ties(self) -> bool:
        """Whether ties are kept: then one parameter stands for the release's aliases, so names and counts differ."""
        return bool(self.facts["config_kwargs"].get("ensure_weight_tying"))

    @functools.cached_property
    def loaded(self) -> PeftModel:
        """The golden adapter on the base, for the stages that leave the model as it is."""
        return self.load()

    @functools.cached_property
    def fresh(self) -> PeftModel:
        """A new adapter of the same config."""
        torch.manual_seed(SEED)
        return get_peft_model(self.base.build(), make_config(self.facts, self.folder)).eval()

    def load(self) -> PeftModel:
        """Return the golden adapter on a new base."""
        return PeftModel.from_pretrained(self.base.build(), str(self.folder)).eval()

    def forward(self, model: nn.Module) -> Tensor:
        """Return the output of a model that has the adapter."""
        return self.base.forward(model, self.facts.get("forward_kwargs"))

    def live_keys(self, loaded: bool) -> set[str]:
        """Return the keys that the model's state dict has to have; few methods have others after loading."""
        keys = (loaded and self.facts.get("state_dict_keys_loaded")) or self.facts["state_dict_keys"]
        if isinstance(keys, list):
            keys = set(keys)
        else:
            keys = {keys["prefix"] + key for key in self.base.state_dict_keys} - set(keys["minus"]) | set(keys["plus"])
        # the release saves the places of SHiRA's numbers, but they are missing in its state dict
        return keys | {key.replace("shira_weight", "shira_indices") for key in keys}

    def comparable_saved(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out base embeddings that the release wrote without being asked to."""
        if "save_embedding_layers" in self.facts.get("save_kwargs", {}):
            return state_dict
        return {key: tensor for key, tensor in state_dict.items() if not key.endswith(".base_layer.weight")}


def save_adapter(folder: Path, config: dict, weights: dict[str, Tensor], as_pickle: bool = False) -> None:
    """Write an adapter's folder as the release left it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if as_pickle:
        torch.save(weights, folder / "adapter_model.bin")
    else:
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def check_config(case: Case) -> Iterator[str]:
    """The saved config loads as the right class and saves to the same JSON."""
    config = PeftConfig.from_pretrained(str(case.folder))
    yield from compare("class", type(config).__name__, case.facts["config_class"])
    yield from compare("peft_type", getattr(config.peft_type, "value", config.peft_type), case.facts["peft_type"])
    config.save_pretrained(str(case.folder / "config"))
    ignored = SET_BY_CPT if case.facts["peft_type"] == "CPT" else ()
    again, golden = (
        {key: value for key, value in saved.items() if key not in ignored}
        for saved in (read_config(case.folder / "config"), comparable_config(case.facts["adapter_config"]))
    )
    yield from compare_dicts("saved again", again, golden)


@torch.no_grad()
def check_output(case: Case) -> Iterator[str]:
    """The adapted model gives the stored output; disabling the adapter and enabling it again work."""
    model = case.loaded
    yield from compare("model class", type(model).__name__, case.facts["model_class"])
    yield from compare_tensors("adapter", case.forward(model), case.expected["adapter"], case.atol)
    disabled = case.facts["disabled"]
    if disabled == "skip" or isinstance(disabled, dict):  # a dict is an exception: a defect of the release
        return
    with model.disable_adapter():
        output = case.forward(model)
    want = case.expected["disabled" if disabled == "stored" else disabled]
    yield from compare_tensors("disabled", output, want, case.atol)
    yield from compare_tensors("enabled again", case.forward(model), case.expected["adapter"], case.atol)


def check_state_dict(case: Case) -> Iterator[str]:
    """The live model has the keys of the release's, and gives out the tensors that were loaded."""
    if not case.asks_for_ties:
        yield from compare_keys("state_dict", case.loaded.state_dict(), case.live_keys(loaded=True))
    if "targeted_modules" in case.facts:
        yield from compare_keys("targets", case.loaded.targeted_module_names, case.facts["targeted_modules"])
    given = get_peft_model_state_dict(case.loaded, **case.facts.get("save_kwargs_sd", {}))
    yield from compare_state_dicts("given out", case.comparable_saved(given), case.comparable_saved(case.saved))


def check_saved_again(case: Case) -> Iterator[str]:
    """Saving the loaded adapter gives the same config and the same tensors."""
    folder = case.folder / "again"
    case.loaded.save_pretrained(str(folder), **case.facts.get("save_kwargs", {}))
    saved, expected = read_config(folder), comparable_config(case.facts["adapter_config"])
    if expected.get("ensure_weight_tying"):  # here the config names every member that the file has tensors for
        named, more = expected["target_modules"], saved["target_modules"]
        expected["target_modules"] = more if set(named) <= set(more) else named
    yield from compare_dicts("config", saved, expected)
    if case.is_safetensors:
        written = load_file(folder / "adapter_model.safetensors")
    else:
        written = torch.load(folder / "adapter_model.bin", weights_only=True)
    yield from compare_state_dicts("file", case.comparable_saved(written), case.comparable_saved(case.saved))


@torch.no_grad()
def check_fresh(case: Case) -> Iterator[str]:
    """A new adapter of the same config trains the same parameters, and is the identity where the release's is."""
    yield from compare("model class", type(case.fresh).__name__, case.facts["model_class"])
    if not case.asks_for_ties:
        train = case.facts["train"]
        yield from compare_dicts("trainable", trainable_shapes(case.fresh), train["names"])
        counts = (train["trainable_params"], train["all_params"])
        yield from compare("counts", tuple(case.fresh.get_nb_trainable_parameters()), counts)
        yield from compare_keys("state_dict", case.fresh.state_dict(), case.live_keys(loaded=False))
    if case.facts["init_identity"]:
        yield from compare_tensors("untrained", case.forward(case.fresh), case.base.output, 1e-4)


def check_gradients(case: Case) -> Iterator[str]:
    """With the golden weights set on a new adapter, the gradients of a loss have the stored norms."""
    if case.asks_for_ties or not case.facts.get("grad_norms"):
        return
    model, norms = case.fresh, case.facts["grad_norms"]
    set_peft_model_state_dict(model, load_peft_weights(str(case.folder), device="cpu"))
    model.zero_grad()
    output = case.forward(model)
    if case.facts.get("set_state_dict_output_equal", True):
        yield from compare_tensors("golden weights set", output, case.expected["adapter"], case.atol)
    output.float().pow(2).mean().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: parameter.grad.norm().item() for name, parameter in trained.items() if parameter.grad is not None}
    yield from compare_keys("parameters with a gradient", found, norms)
    for name in sorted(found.keys() & norms.keys()):
        if abs(found[name] - norms[name]) > 1e-5 + 2e-3 * norms[name]:
            yield f"norm of {name}: {found[name]:.6g}, expected {norms[name]:.6g}"


@torch.no_grad()
def check_merge_and_unload(case: Case) -> Iterator[str]:
    """Merging gives a model of the base's class with the adapter's output, or is refused."""
    merged = case.facts["merged"]
    if merged == "skip":
        return
    model = case.load()
    if isinstance(merged, dict):
        yield from expect_raise("merge_and_unload", lambda: model.merge_and_unload(), merged["raises"])
        return
    plain = model.merge_and_unload().eval()
    output = case.base.forward(plain) if case.facts.get("merged_plain_forward", True) else case.forward(plain)
    yield from compare_merged(case, output, case.expected["merged" if merged == "stored" else merged])
    yield from compare_plain_model(case, plain, same_keys=case.facts.get("merged_keys_equal_base"))


@torch.no_grad()
def check_merge_in_place(case: Case) -> Iterator[str]:
    """`merge_adapter` keeps the adapter's output, and `unmerge_adapter` brings it back."""
    facts = case.facts.get("merge_adapter", "skip")
    if facts == "skip":
        return
    model = case.load()
    if "raises" in facts:
        yield from expect_raise("merge_adapter", lambda: model.merge_adapter(), facts["raises"])
        return
    model.merge_adapter()
    want = case.expected["adapter" if facts["merged"] == "equals_adapter" else "merged_inplace"]
    yield from compare_merged(case, case.forward(model), want)
    if "unmerge_raises" in facts:
        yield from expect_raise("unmerge_adapter", lambda: model.unmerge_adapter(), facts["unmerge_raises"])
        return
    model.unmerge_adapter()
    if facts.get("unmerged") == "equals_adapter":
        atol = max(case.atol, UNMERGE_ATOL)
        yield from compare_tensors("unmerged", case.forward(model), case.expected["adapter"], atol)


def compare_merged(case: Case, output: Tensor, want: Tensor) -> Iterator[str]:
    """A merged model gives the stored output, or keeps that of the adapter where the release fails to."""
    atol = max(case.atol, MERGE_ATOL)
    # In the release a merge into a tied weight changes its other uses too.
    if not (case.facts.get("merged_may_equal_adapter") and is_close(output, case.expected["adapter"], atol)):
        yield from compare_tensors("merged", output, want, atol)


@torch.no_grad()
def check_unload(case: Case) -> Iterator[str]:
    """Unloading gives the base model back, or is refused."""
    unload = case.facts.get("unload", "skip")
    if unload == "skip":
        return
    model = case.load()
    if isinstance(unload, dict):
        yield from expect_raise("unload", lambda: model.unload(), unload["raises"])
        return
    plain = model.unload().eval()
    output = case.base.forward(plain)
    # The release leaves trained copies of saved modules and trained biases behind; the base itself is better.
    if not (unload == "stored" and is_close(output, case.base.output, case.atol)):
        want = case.expected["unload" if unload == "stored" else unload]
        yield from compare_tensors("unloaded", output, want, case.atol)
    yield from compare_plain_model(case, plain, same_keys=case.facts.get("unload_keys_equal_base"))


def compare_plain_model(case: Case, model: nn.Module, same_keys: bool | None) -> Iterator[str]:
    """A model without adapters has the base's class and the keys of its state dict."""
    base = case.base.build()
    yield from compare("class", type(model).__name__, type(base).__name__)
    if same_keys:
        yield from compare_keys("state_dict", model.state_dict(), base.state_dict())


STAGES = (
    check_config,
    check_output,
    check_state_dict,
    check_saved_again,
    check_fresh,
    check_gradients,
    check_merge_and_unload,
    check_merge_in_place,
    check_unload,
)
