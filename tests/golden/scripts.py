# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Reading the golden scripts: sequences of calls on one model, with the outputs and values that the release gave.

A script is a list of steps. `STEPS` has one function for each action; it gets the script and the step, changes the
script's model, and returns the problems it found, if it compares anything. The step `hook` runs one of `HOOKS`:
actions of more than one call.
"""

import copy
import functools
import importlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peft
from peft import PeftModel, get_peft_model

from . import store
from .bases import Base
from .cases import MERGE_ATOL, SEED, save_adapter
from .compare import compare_tensors, decode_argument, expect_raise, is_close, make_config, trainable_shapes


Problems = Iterable[str] | None
STEPS: dict[str, Callable[["Script", dict], Problems]] = {}
HOOKS: dict[str, Callable[["Script", dict], Problems]] = {}


class Script:
    """The steps of one script, the model they work on, and what was observed; adapters are written to `folder`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.facts = store.facts()["scripts"][name]
        kind, script = name.split("/")
        self.base = Base.named(self.facts["base"])
        self.expected = store.tensors(kind, script, "expected")
        self.atol = self.facts.get("atol", 1e-5)
        self.folder = folder
        self.model: nn.Module | None = None
        for adapter, config in self.facts["adapters"].items():
            save_adapter(folder / adapter, config, store.tensors(kind, script, adapter))

    def run(self) -> Iterator[str]:
        """Run all steps and yield what differs."""
        torch.manual_seed(SEED)
        for number, step in enumerate(self.facts["steps"]):
            for problem in STEPS[step["do"]](self, step) or ():
                yield f"step {number} ({step['do']}): {problem}"

    @torch.no_grad()
    def forward(self, step: dict | None = None, model: nn.Module | None = None) -> Tensor:
        """Return the output of a model, the script's by default, with the further arguments that the step names."""
        return self.base.forward(self.model if model is None else model, (step or {}).get("extra"))

    def arguments(self, step: dict, name: str = "kwargs") -> Any:
        """Return `kwargs` or `args` of a step."""
        return decode_argument(step.get(name, {} if name == "kwargs" else []), self.folder)

    def tensor(self, name: str, got: Tensor, step: dict, floor: float = 0) -> Iterator[str]:
        """Compare a tensor with the stored one of that name."""
        if name not in self.facts.get("dropped_because_random", ()):
            yield from compare_tensors(name, got, self.expected[name], max(step.get("atol", self.atol), floor))

    def value(self, name: str, got: Any) -> Iterator[str]:
        """Compare a value with the stored one of that name."""
        if name not in self.facts.get("dropped_because_random", ()) and not is_near(got, self.facts["values"][name]):
            yield f"{name}: {str(got)[:200]}, expected {str(self.facts['values'][name])[:200]}"


def is_near(got: Any, want: Any) -> bool:
    """Whether two values in JSON form agree: numbers to a tolerance, sequences and dicts entry by entry."""
    if isinstance(want, dict) and want.get("random"):
        return isinstance(got, dict) and all(got.get(key) == want[key] for key in ("shape", "dtype"))
    if isinstance(got, float) or isinstance(want, float):
        return isinstance(got, int | float) and abs(got - want) <= 1e-4 + 2e-3 * abs(want)
    if isinstance(got, dict) and isinstance(want, dict):
        named = {str(key): value for key, value in got.items()}
        return named.keys() == want.keys() and all(is_near(named[key], want[key]) for key in want)
    if isinstance(got, list | tuple) and isinstance(want, list | tuple):
        return len(got) == len(want) and all(map(is_near, got, want))
    return got == want


def as_listed(value: Any) -> Any:
    """Return names in a fixed order: of a set, a tuple or a dict."""
    return sorted(value) if isinstance(value, set | tuple | dict) else value


def attribute(model: nn.Module, path: str) -> Any:
    """Return what lies at a dotted path."""
    return functools.reduce(getattr, path.split("."), model)


def entry(table: dict) -> Callable:
    """Enter the decorated function in a table, under its name without a leading `do_`."""

    def enter(function: Callable) -> Callable:
        table[function.__name__.removeprefix("do_")] = function
        return function

    return enter


step_function, hook_function = entry(STEPS), entry(HOOKS)


# --- steps that make or change the model


@step_function
def do_from_pretrained(script: Script, step: dict) -> None:
    folder = str(script.folder / step["dir"])
    script.model = PeftModel.from_pretrained(script.base.build(), folder, **script.arguments(step)).eval()


@step_function
def do_mixed_from_pretrained(script: Script, step: dict) -> None:
    folder = str(script.folder / step["dir"])
    script.model = peft.PeftMixedModel.from_pretrained(script.base.build(), folder, **script.arguments(step)).eval()


@step_function
def do_load_adapter(script: Script, step: dict) -> None:
    folder = str(script.folder / step["dir"])
    script.model.load_adapter(folder, *script.arguments(step, "args"), **script.arguments(step))
    script.model.eval()


@step_function
def do_get_peft_model(script: Script, step: dict) -> None:
    torch.manual_seed(SEED)
    config = make_config(step, script.folder)
    script.model = get_peft_model(script.base.build(), config, **script.arguments(step)).eval()


@step_function
def do_call(script: Script, step: dict) -> Problems:
    arguments, keywords = script.arguments(step, "args"), script.arguments(step)

    def call() -> Any:
        return attribute(script.model, step["name"])(*arguments, **keywords)

    if step.get("raises"):
        return expect_raise(step["name"], call, step["raises"])
    result = call()
    if step.get("becomes_model"):
        script.model = result.eval()
    if not step.get("keep"):
        return None
    plain = isinstance(result, int | float | str | list | dict | None)
    return script.value(step["keep"], result if plain else list(result))


@step_function
def do_module_call(script: Script, step: dict) -> None:
    function = getattr(importlib.import_module(step["module"]), step["name"])
    result = function(script.model, *script.arguments(step, "args"), **script.arguments(step))
    if step.get("becomes_model"):
        script.model = result.eval()


# --- steps that compare outputs


@step_function
def do_forward(script: Script, step: dict) -> Problems:
    output = script.forward(step)
    # The release leaves trained copies behind on unloading; as with the cases, the base itself is better.
    if step["out"] == "unloaded" and is_close(output, script.base.output, script.atol):
        return None
    return script.tensor(step["out"], output, step)


@step_function
def do_forward_raises(script: Script, step: dict) -> Problems:
    return expect_raise("forward", lambda: script.forward(step), step["raises"])


@step_function
def do_forward_disabled(script: Script, step: dict) -> Problems:
    with script.model.disable_adapter():
        output = script.forward(step)
    return script.tensor(step["out"], output, step)


@step_function
def do_merge_equal(script: Script, step: dict) -> Problems:
    plain = copy.deepcopy(script.model).merge_and_unload(**script.arguments(step)).eval()
    return script.tensor(step["out"], script.forward(model=plain), step, floor=MERGE_ATOL)


# --- steps that compare state


@step_function
def do_attr(script: Script, step: dict) -> Problems:
    return script.value(step["keep"], as_listed(attribute(script.model, step["name"])))


@step_function
def do_trainable(script: Script, step: dict) -> Problems:
    return script.value(step["keep"], trainable_shapes(script.model))


@step_function
def do_state_dict_keys(script: Script, step: dict) -> Problems:
    return script.value(step["keep"], sorted(script.model.state_dict()))


@step_function
def do_save_load(script: Script, step: dict) -> Iterator[str]:
    saved, keep = script.folder / "saved" / step["keep"], step["keep"]
    script.model.save_pretrained(str(saved), **script.arguments(step))
    files = sorted(str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file())
    yield from script.value(f"{keep}.files", [name for name in files if Path(name).name != "README.md"])
    folder = saved / step.get("subdir", "")
    config = json.loads((folder / "adapter_config.json").read_text())
    for key in step.get("config_keys", []):
        value = config.get(key)
        yield from script.value(f"{keep}.config.{key}", sorted(value) if isinstance(value, list) else value)
    file = folder / "adapter_model.safetensors"
    if file.exists():
        # the release also saves the base weights of embeddings that are targets, although they are the base model's
        wanted = script.facts["values"][f"{keep}.shapes"]
        bases = {key: shape for key, shape in wanted.items() if key.endswith(".base_layer.weight")}
        yield from script.value(f"{keep}.shapes", bases | shapes_of(load_file(file)))
    if step.get("reload"):
        again = PeftModel.from_pretrained(script.base.build(), str(folder)).eval()
        yield from script.tensor(step["out"], script.forward(step, again), step)


# --- steps that look into one layer


@step_function
def do_delta(script: Script, step: dict) -> Problems:
    layer = script.model.get_submodule(step["module"])
    return script.tensor(step["out"], layer.get_delta_weight(step.get("adapter", "default")), step)


@step_function
def do_effective(script: Script, step: dict) -> Problems:
    layer = script.model.get_submodule(step["module"])
    weight = layer.get_base_layer().weight + layer.get_delta_weight(step.get("adapter", "default"))
    return script.tensor(step["out"], weight, step)


@step_function
def do_base_weight(script: Script, step: dict) -> Problems:
    return script.tensor(step["out"], script.model.get_submodule(step["module"]).get_base_layer().weight, step)


@step_function
def do_gram(script: Script, step: dict) -> Iterator[str]:
    """Compare what a factorisation fixes: its factors only up to signs."""
    layer = script.model.get_submodule(step["module"])
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    yield from script.tensor(step["out"] + ".AAt", (a @ a.T).abs(), step)
    yield from script.tensor(step["out"] + ".BtB", (b.T @ b).abs(), step)


@step_function
def do_hook(script: Script, step: dict) -> Problems:
    return HOOKS[step["name"]](script, step)


# --- hooks


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    """Return the shape of each tensor, sorted by name."""
    return {key: list(tensors[key].shape) for key in sorted(tensors)}


def batches(base: Base) -> list[dict[str, Tensor]]:
    """Return three equal batches: the calibration data of the initialisations that need some."""
    return [{key: tensor.clone() for key, tensor in base.inputs.items()} for _ in range(3)]


@hook_function
def eva(script: Script, step: dict) -> None:
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    model = get_peft_model(script.base.build(), make_config(step, script.folder), low_cpu_mem_usage=False)
    initialize_lora_eva_weights(model, batches(script.base), show_progress_bar=False)
    script.model = model.eval()


@hook_function
def corda(script: Script, step: dict) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    model, config = script.base.build(), make_config(step, script.folder)

    @torch.no_grad()
    def run_model() -> None:
        for batch in batches(script.base):
            model(input_ids=batch["input_ids"][:1])

    preprocess_corda(model, config, run_model=run_model)
    script.model = get_peft_model(model, config).eval()


@hook_function
def loraga(script: Script, step: dict) -> None:
    model, config = script.base.build(), make_config(step, script.folder)

    def train_step() -> None:
        for batch in batches(script.base):
            model(**batch).logits.float().pow(2).mean().backward()

    peft.preprocess_loraga(model, config, train_step)
    script.model = get_peft_model(model, config).eval()


@hook_function
def arrow(script: Script, step: dict) -> None:
    general = [str(script.folder / name) for name in step.get("gks", [])]
    script.model = peft.create_arrow_model(
        script.base.build(),
        [str(script.folder / "a"), str(script.folder / "b")],
        peft.ArrowConfig(**script.arguments(step)),
        general_adapter_paths=general or None,
    ).eval()


@hook_function
def xlora(script: Script, step: dict) -> None:
    experts = {str(index): str(script.folder / f"expert{index}") for index in range(2)}
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=16, xlora_dropout_p=0.0, adapters=experts, **script.arguments(step)
    )
    script.model = get_peft_model(script.base.build(), config).eval()
    own = sorted((name, p) for name, p in script.model.named_parameters() if "xlora" in name)
    for index, (_, parameter) in enumerate(own):
        values = torch.sin(torch.arange(parameter.numel(), dtype=torch.float32) * (0.7 + 0.1 * index))
        parameter.data.copy_(values.reshape(parameter.shape))


@hook_function
def convert(script: Script, step: dict) -> Iterator[str]:
    """Approximate another method's adapter by LoRA."""
    model = PeftModel.from_pretrained(script.base.build(), str(script.folder / "a")).eval()
    yield from script.value("supports", bool(model.supports_lora_conversion()))
    config, state_dict = peft.convert_to_lora(model, rank=step["rank"])
    fields = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
    values = {name: getattr(config, name) for name in fields}
    yield from script.value("cfg", {k: sorted(v) if isinstance(v, set | list) else v for k, v in values.items()})
    yield from script.value("shapes", shapes_of(state_dict))
    script.model = get_peft_model(script.base.build(), config).eval()
    peft.set_peft_model_state_dict(script.model, state_dict)


@hook_function
def convert_save(script: Script, step: dict) -> Iterator[str]:
    """Train an adapter that changed the base weights, and save it as one that fits the original ones."""
    start, converted = script.folder / "start", script.folder / "converted"
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=step["init"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(script.base.build(), config).eval()
    yield from script.tensor("start", script.forward(model=model), step, floor=1e-4)
    live = model.peft_config["default"]
    live.init_lora_weights = True
    model.save_pretrained(str(start))
    live.init_lora_weights = step["init"]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.3)
    yield from script.tensor("trained0", script.forward(model=model), step, floor=1e-4)
    model.save_pretrained(str(converted), path_initial_model_for_weight_conversion=str(start))
    saved = json.loads((converted / "adapter_config.json").read_text())
    fields = ("r", "lora_alpha", "init_lora_weights", "use_rslora")
    yield from script.value("cfg", {name: saved[name] for name in fields})
    yield from script.value("shapes", shapes_of(load_file(converted / "adapter_model.safetensors")))
    script.model = PeftModel.from_pretrained(script.base.build(), str(converted)).eval()


@hook_function
def inject(script: Script, step: dict) -> Iterator[str]:
    """Inject without a `PeftModel` around the model, by a config or by the keys of a state dict."""
    folder = script.folder / "a"
    saved = load_file(folder / "adapter_model.safetensors")
    state_dict = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items()}
    if step.get("from_sd"):
        config, more = peft.LoraConfig(r=4, lora_alpha=8), {"state_dict": state_dict}
    else:
        config, more = peft.PeftConfig.from_pretrained(str(folder)), {}
    model = peft.inject_adapter_in_model(config, script.base.build(), adapter_name="x", **more)
    yield from script.value("class", type(model).__name__)
    result = peft.set_peft_model_state_dict(model, state_dict, adapter_name="x")
    yield from script.value("unexpected", sorted(result.unexpected_keys))
    yield from script.value("n_missing_adapter", sum("lora_" in key for key in result.missing_keys))
    yield from script.value("keys_out", sorted(peft.get_peft_model_state_dict(model, adapter_name="x")))
    script.model = model.eval()


@hook_function
def status(script: Script, step: dict) -> Iterator[str]:
    def without_devices(status: Any) -> dict:
        return {key: value for key, value in vars(status).items() if key != "devices"}

    layers = script.model.get_layer_status()
    yield from script.value("layer", [without_devices(layer) for layer in layers[:2]])
    yield from script.value("n_layers", len(peft.get_layer_status(script.model)))
    yield from script.value("model", without_devices(peft.get_model_status(script.model)))


@hook_function
def rescale(script: Script, step: dict) -> Iterator[str]:
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(script.model, step["mult"]):
        yield from script.tensor("scaled", script.forward(), {"atol": 1e-5})
    yield from script.tensor("after", script.forward(), {"atol": 1e-5})


@hook_function
def loraplus(script: Script, step: dict) -> Problems:
    from peft.optimizers import create_loraplus_optimizer

    model = PeftModel.from_pretrained(script.base.build(), str(script.folder / "a"), is_trainable=True)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    groups = [
        {
            "n": len(group["params"]),
            "numel": sum(parameter.numel() for parameter in group["params"]),
            "lr": group["lr"],
            "wd": group["weight_decay"],
        }
        for group in optimizer.param_groups
    ]
    return script.value("groups", groups)


@hook_function
def dtypes(script: Script, step: dict) -> Problems:
    """In which types adapters are held, on bases of several types."""

    def types(model: nn.Module, part: str) -> list[str]:
        return sorted({str(parameter.dtype) for name, parameter in model.named_parameters() if part in name})

    found = {}
    for name in ("float16", "bfloat16", "float32"):
        for autocast in (True, False):
            base, other = (script.base.build().to(getattr(torch, name)) for _ in range(2))
            folder = str(script.folder / "a")
            loaded = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=autocast)
            found[f"load {name} autocast={autocast}"] = types(loaded, "lora_")
            config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
            new = get_peft_model(other, config, autocast_adapter_dtype=autocast)
            parts = ("lora_", "modules_to_save", "original_module")
            found[f"new {name} autocast={autocast}"] = {part: types(new, part) for part in parts}
    return script.value("dtypes", found)


@hook_function
def base_sd(script: Script, step: dict) -> Iterator[str]:
    state_dict = peft.get_base_model_state_dict(script.model)
    yield from script.value("keys", sorted(state_dict))
    peft.set_base_model_state_dict(script.model, {key: tensor * 0.5 for key, tensor in state_dict.items()})
    yield from script.tensor("halved", script.forward(), {"atol": 1e-5})


@hook_function
def generate(script: Script, step: dict) -> Iterator[str]:
    first = {key: script.base.inputs[key][:1] for key in ("input_ids", "attention_mask")}
    for use_cache in (True, False):
        options = {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache, "eos_token_id": None}
        try:
            result = script.model.generate(**first, **options).tolist()
        except Exception as error:  # the release cannot generate in each of these ways
            result = {"raises": type(error).__name__}
        name = f"ids_cache_{use_cache}"
        if isinstance(result, list) and isinstance(script.facts["values"][name], dict):
            name = "ids_cache_True"  # where only the release fails, the cache must make no difference
        yield from script.value(name, result)


@hook_function
@torch.no_grad()
def loss(script: Script, step: dict) -> Problems:
    labels = script.base.inputs["input_ids"].clone()
    labels[1, 4:] = -100
    more = {"labels": labels}
    if step.get("labels_mask"):
        more["input_type_mask"] = torch.tensor([[1, 2, 2, 3, 4, 4], [1, 2, 3, 4, 4, 4]])
    return script.tensor("loss", script.model(**script.base.inputs, **more).loss.reshape(1), {"atol": 1e-4})


@hook_function
def frozen_tensors(script: Script, step: dict) -> Problems:
    """Adapter tensors that are not trained but follow from the base weights or a seed: order and signs aside."""
    base_keys = set(script.base.build().state_dict())
    trained = trainable_shapes(script.model)
    tensors = dict(script.model.named_buffers()) | {
        name: parameter for name, parameter in script.model.named_parameters() if name not in trained
    }
    found = {}
    for name, tensor in tensors.items():
        base_key = name.removeprefix("base_model.model.").replace(".base_layer", "")
        # SHiRA's places are no buffers in the release
        if base_key not in base_keys and "inv_freq" not in name and "shira_indices" not in name:
            found[name] = {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype),
                "abs_sum": tensor.double().abs().sum().item(),
                "sq_sum": tensor.double().pow(2).sum().item(),
                "nonzero": int((tensor != 0).sum()),
            }
    return script.value("frozen", found)
