# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""X-LoRA against mixtures that are written down, its files, and what it refuses."""

import copy
import json
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import refused
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, PeftWarning, XLoraConfig, get_peft_model
from peft.layers.call_context import calling, current_call
from peft.tuners.xlora.classifier import XLoraClassifier
from peft.tuners.xlora.layer import Routing, few_largest
from peft.tuners.xlora.model import in_order


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def base(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = {"vocab_size": 24, "use_cache": False, "initializer_range": 0.5, **sizes, **changes}
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Save three LoRA adapters on different layers; one is on the embedding, too."""
    root, folders = tmp_path_factory.mktemp("experts"), {}
    targets = {"law": ["q_proj", "v_proj"], "code": ["q_proj"], "maths": ["embed_tokens", "down_proj"]}
    for number, (name, modules) in enumerate(targets.items()):
        config = LoraConfig(r=2 + number, lora_alpha=6, target_modules=modules, init_lora_weights=False)
        model = get_peft_model(base(), config)
        model.save_pretrained(root / name)
        folders[name] = str(root / name)
    return folders


def adapted(experts: dict[str, str], **fields: Any) -> PeftModel:
    values = {"hidden_size": 8, "task_type": "CAUSAL_LM", "adapters": experts, **fields}
    model = base()
    torch.manual_seed(3)
    model = get_peft_model(model, XLoraConfig(**values)).eval()
    for parameter in model.internal_xlora_classifier.parameters():
        nn.init.normal_(parameter)
    return model


def logits(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**{"input_ids": IDS, **kwargs}).logits


def by_hand(experts: dict[str, str], weights: torch.Tensor, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a base model in which each layer adds its experts, token by token; give logits and hidden states."""
    model, handles, number = base(), [], 0
    tensors = {name: load_file(Path(folder) / "adapter_model.safetensors") for name, folder in experts.items()}
    for path, module in model.named_modules():
        keys = f"base_model.model.{path}.lora_"
        here = [name for name in sorted(experts) if any(key.startswith(keys) for key in tensors[name])]
        if not here:
            continue

        def add(module: nn.Module, args: tuple, output: torch.Tensor, keys=keys, here=here, number=number):
            for name in here:
                v, own = weights[:, :, number, sorted(experts).index(name)].unsqueeze(-1), tensors[name]
                if isinstance(module, nn.Embedding):
                    a, b = own[f"{keys}embedding_A"], own[f"{keys}embedding_B"]
                    term = (a.T[args[0]] * v) @ b.T
                else:
                    a, b = own[f"{keys}A.weight"], own[f"{keys}B.weight"]
                    term = (args[0] * v) @ a.T @ b.T
                output = output + term * factor * 6 / a.shape[0]
            return output

        handles.append(module.register_forward_hook(add))
        number += 1
    with torch.no_grad():
        outputs = model(input_ids=IDS, output_hidden_states=True)
    return outputs.logits, outputs.hidden_states[-1]


# ------------------------------------------------------------------------------------------ formula
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scaling_pass_value": 0.7, "global_scaling_weight": 0.5},
        {"enable_softmax": False, "xlora_depth": 3, "xlora_size": 5, "xlora_dropout_p": 0.0},
        {"softmax_temperature": 3.0, "top_k_lora": 2},
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2, "scaling_pass_value": 0.3},
    ],
)
def test_formula(experts: dict[str, str], fields: dict[str, Any], layerwise: bool) -> None:
    model = adapted(experts, layerwise_scalings=layerwise, **fields)
    found, scalings = logits(model), model.get_latest_scalings()
    assert scalings.shape == (2, 3, 7, 3)
    even = torch.full((2, 3, 7, 3), fields.get("scaling_pass_value", 0.0))
    factor, top_k = fields.get("global_scaling_weight", 1.0), fields.get("top_k_lora")
    softmax_of_few = fields.get("enable_softmax_topk", False)
    _, hidden = by_hand(experts, few_by_hand(even, top_k, softmax_of_few), factor)
    out = hidden
    linears = [m for m in model.internal_xlora_classifier.layers if isinstance(m, nn.Linear)]
    for number, linear in enumerate(linears):
        out = linear(out.relu() if number else out)
    wanted = out.view(2, 3, 7, 3) if layerwise else out.unsqueeze(2).expand(2, 3, 7, 3)
    if fields.get("enable_softmax", True):
        wanted = (wanted / fields.get("softmax_temperature", 1.0)).softmax(-1)
    torch.testing.assert_close(scalings, wanted.detach())
    expected, _ = by_hand(experts, few_by_hand(wanted.detach(), top_k, softmax_of_few), factor)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, logits(base()), atol=1e-2)


def few_by_hand(weights: torch.Tensor, top_k: int | None, with_softmax: bool) -> torch.Tensor:
    if top_k is None:
        return weights
    result = torch.zeros_like(weights)
    for place in torch.cartesian_prod(*map(torch.arange, weights.shape[:-1])).tolist():
        row = weights[tuple(place)]
        kept = row.topk(top_k).indices
        values = row[kept]
        result[(*place, kept)] = values.softmax(0) if with_softmax else values
    return result


def test_weights_that_are_zero_stay_so() -> None:
    zeros = torch.zeros(2, 3)
    assert torch.equal(few_largest(zeros, 2, True), zeros)
    assert torch.equal(few_largest(torch.tensor([1.0, 0.0, -1.0]), None, True), torch.tensor([1.0, 0.0, -1.0]))


@pytest.mark.parametrize("trained", [False, True])
def test_gradients(experts: dict[str, str], trained: bool) -> None:
    model = adapted(experts, use_trainable_adapters=trained)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        is_own = "xlora" in name or (trained and "lora_" in name.rpartition("lora_model")[2])
        assert parameter.requires_grad == is_own, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == is_own, name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointed_layers_find_the_weights_of_their_call(experts: dict[str, str]) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = adapted(experts, scaling_pass_value=0.5)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(0)
        losses = [model(input_ids=ids, labels=ids).loss for ids in (IDS, IDS.flip(0, 1))]
        sum(losses).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    torch.testing.assert_close(gradients(True), gradients(False))


# ------------------------------------------------------------------------------------------ calls
def test_generate_weighs_each_step_anew(experts: dict[str, str]) -> None:
    model, ids = adapted(experts), IDS
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    model.enable_scalings_logging()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(input_ids=IDS, **options), ids)
    assert [len(s[0]) for s in model.get_scalings_log()] == [3, 4, 5, 6]
    assert not model.get_base_model()._forward_pre_hooks and current_call() is None
    with model.disable_adapter():
        off = model.generate(input_ids=IDS, **options)
    assert torch.equal(off, base().generate(input_ids=IDS, use_cache=False, **options))


def test_inputs_may_be_given_in_other_ways(experts: dict[str, str]) -> None:
    model = adapted({name: experts[name] for name in ("law", "code")})  # no expert on the embedding
    expected = logits(model)
    embeds = base().get_input_embeddings()(IDS)
    with torch.no_grad():
        assert torch.equal(model.base_model(IDS).logits, expected)
        assert torch.equal(model(inputs_embeds=embeds).logits, expected)
    with refused(model, ValueError, "input_ids or inputs_embeds"):
        model.base_model(attention_mask=torch.ones(2, 3))


def test_calls_in_threads_have_weights_of_their_own(experts: dict[str, str]) -> None:
    model, results = adapted(experts), {}
    inputs = [torch.full((1 + i % 2, 2 + i), 3 + i) for i in range(6)]
    expected = [logits(model, input_ids=ids) for ids in inputs]

    def compute(number: int) -> None:
        results[number] = logits(model, input_ids=inputs[number])

    threads = [threading.Thread(target=compute, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(6))


def test_layers_that_are_given_other_things_than_tokens_say_so(experts: dict[str, str]) -> None:
    model = adapted(experts)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    plain = layer(torch.ones(5, layer.in_features))  # outside of a call the experts are added plainly
    assert plain.shape == (5, layer.out_features)
    routing = Routing(torch.ones(2, 3, 7, 3))
    with calling(notes={model.base_model.experts: routing}):
        torch.testing.assert_close(layer(torch.ones(6, layer.in_features))[:5], plain)  # a flattened batch
        with pytest.raises(ValueError, match=r"tokens of \(2, 3\)"):
            layer(torch.ones(5, layer.in_features))


def test_disabled(experts: dict[str, str]) -> None:
    model, expected = adapted(experts, use_trainable_adapters=True), None
    expected, trained = logits(model), [name for name, p in model.named_parameters() if p.requires_grad]
    before = model.get_latest_scalings()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
        assert not any(p.requires_grad for p in model.parameters())
    assert model.get_latest_scalings() is before  # there was one pass
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), logits(base()))
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), logits(base()))


# ------------------------------------------------------------------------------------------ settings and log
def test_settings_are_those_that_are_saved(experts: dict[str, str], tmp_path: Path) -> None:
    model = adapted(experts)
    model.set_topk_lora(1)
    model.set_global_scaling_weight(0.25)
    model.set_scaling_pass_value(None)
    assert model.get_global_scaling_weight() == 0.25
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["top_k_lora"], saved["global_scaling_weight"], saved["scaling_pass_value"]) == (1, 0.25, 1 / 3)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    expected = logits(adapted(experts, top_k_lora=1, global_scaling_weight=0.25, scaling_pass_value=1 / 3))
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="top_k_lora=4 is more than the 3"):
        model.set_topk_lora(4)
    model.set_topk_lora(None)
    assert model.peft_config["default"].top_k_lora is None


def test_log(experts: dict[str, str]) -> None:
    model = adapted(experts)
    assert model.get_latest_scalings() is None and model.get_scalings_log() == []
    logits(model)
    assert model.get_scalings_log() == []
    model.enable_scalings_logging()
    for length in (3, 2, 3):
        logits(model, input_ids=IDS[:, :length])
    model.disable_scalings_logging()
    logits(model)
    log, by_length = model.get_scalings_log(), model.get_bucketed_scalings_log()
    assert [tensor.shape[1] for tensor in log] == [3, 2, 3]
    assert {length: positions for length, (positions, _) in by_length.items()} == {3: [0, 2], 2: [1]}
    assert by_length[2][1][0] is log[1]
    log.clear()
    assert len(model.get_scalings_log()) == 3
    model.clear_scalings_log()
    assert model.get_scalings_log() == []


# ------------------------------------------------------------------------------------------ files and copies
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files_hold_the_whole_classifier(
    experts: dict[str, str], low_cpu_mem_usage: bool, depth: int, tmp_path: Path
) -> None:
    model = adapted(experts, xlora_depth=depth, xlora_size=4)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".md"} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    prefix = "base_model.internal_xlora_classifier.layers"
    assert set(keys) == {f"{prefix}.{n}.{kind}" for n in range(0, 3 * depth, 3) for kind in ("weight", "bias")}
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        again = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} == set(keys)


def test_experts_that_were_trained_are_saved(experts: dict[str, str], tmp_path: Path) -> None:
    model = adapted(experts, use_trainable_adapters=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_experts_may_be_elsewhere(experts: dict[str, str], tmp_path: Path) -> None:
    model = adapted(experts)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["adapters"] = {name: f"{folder}-moved" for name, folder in experts.items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = PeftModel.from_pretrained(base(), tmp_path, adapters=experts)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="has none"):
        PeftModel.from_pretrained(base(), experts["law"], adapters=experts)


def test_files_without_a_part_of_the_classifier_are_reported(experts: dict[str, str], tmp_path: Path) -> None:
    adapted(experts, xlora_depth=2, xlora_size=4).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor for key, tensor in load_file(file).items() if ".layers.0." not in key}
    save_file(tensors, file)
    with pytest.warns(PeftWarning, match=r"layers\.0\."):
        PeftModel.from_pretrained(base(), tmp_path)
    save_file({}, file)
    with pytest.raises(RuntimeError, match="no tensor at all"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_copies(experts: dict[str, str]) -> None:
    model = adapted(experts)
    # before transformers' hooks for hidden states are there, which cannot be pickled
    pickled = pickle.loads(pickle.dumps(model))
    expected, copied = logits(model), copy.deepcopy(model)
    for again in (copied, pickled):
        assert torch.equal(logits(again), expected)
    with torch.no_grad():
        copied.internal_xlora_classifier.layers[0].weight.add_(1)
    assert torch.equal(logits(model), expected) and not torch.equal(logits(copied), expected)


def test_names_and_configs(experts: dict[str, str]) -> None:
    model = adapted(experts)
    assert list(model.peft_config) == ["default", "0", "1", "2"]
    assert [model.peft_config[name].r for name in "012"] == [3, 2, 4]  # code, law, maths
    assert in_order({"10": "c", "9": "b", "1": "a"}) == ["a", "b", "c"]
    assert model.active_adapters == ["0", "1", "2"] and not model.base_model.training
    classifier = XLoraClassifier(XLoraConfig(hidden_size=8, adapters=experts), 3, 7)
    assert classifier(torch.randn(2, 5, 8)).shape == (2, 5, 7, 3)
    half = get_peft_model(base().to(torch.bfloat16), XLoraConfig(hidden_size=8, adapters=experts))
    assert half.internal_xlora_classifier.layers[0].weight.dtype == torch.bfloat16
    assert logits(half).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------ refusals
def test_merging_and_changes_are_refused(experts: dict[str, str]) -> None:
    model = adapted(experts)
    layer = next(m for m in model.modules() if getattr(m, "variants", None))
    inner = model.base_model.lora_model
    for merging in (model.merge_adapter, model.merge_and_unload, layer.merge, inner.merge_adapter):
        with refused(model, NotImplementedError, "each token", "unmerged"):
            merging()
    with refused(model, NotImplementedError, "one X-LoRA adapter"):
        model.add_adapter("other", XLoraConfig(hidden_size=8, adapters=experts))
    with refused(model, NotImplementedError, "one X-LoRA adapter"):
        model.base_model.inject_adapter(model.get_base_model(), "default")
    with refused(model, NotImplementedError, "unload()"):
        model.delete_adapter("default")
    with refused(model, NotImplementedError, "adapter_names"):
        model(input_ids=IDS, adapter_names=["0", "1"])
    with refused(model, NotImplementedError, "adapter_names"):
        model.generate(input_ids=IDS, adapter_names=["0", "1"])
    with refused(model, ValueError, "'0'"):
        model.set_adapter("0")
    assert not model.supports_lora_conversion()


@pytest.mark.parametrize(
    ("fields", "classes", "mentions"),
    [
        ({"adapters": {}}, ValueError, ("needs experts",)),
        ({"top_k_lora": 4}, ValueError, ("top_k_lora=4", "3 experts")),
        ({"xlora_depth": 0}, ValueError, ("xlora_depth", "0")),
    ],
)
def test_bad_configs_are_refused(
    experts: dict[str, str], fields: dict[str, Any], classes: type, mentions: tuple[str, ...]
) -> None:
    model = base()
    config = XLoraConfig(**{"hidden_size": 8, "adapters": experts, **fields})
    with refused(model, classes, *mentions):
        get_peft_model(model, config)


def test_ties_are_said_by_experts(experts: dict[str, str]) -> None:
    with pytest.warns(PeftWarning, match="ensure_weight_tying has no effect on X-LoRA"):
        adapted(experts, ensure_weight_tying=True)


def test_models_and_names_that_do_not_fit_are_refused(experts: dict[str, str]) -> None:
    model, config = base(use_cache=True), XLoraConfig(hidden_size=8, adapters=experts)
    with refused(model, ValueError, "use_cache = False"):
        get_peft_model(model, config)
    model = base()
    with refused(model, ValueError, "0, 1, 2", "another name"):
        get_peft_model(model, config, adapter_name="1")
    wide = adapted(experts, hidden_size=9)
    with pytest.raises(ValueError, match="hidden_size=9 .* 8 wide"):
        wide(input_ids=IDS)


@pytest.mark.parametrize(
    ("config", "classes", "mention"),
    [
        (LoraConfig(use_dora=True, target_modules=["q_proj"]), ValueError, "DoRA"),
        (LoraConfig(target_parameters=["layers.0.self_attn.q_proj.weight"]), ValueError, "X-LoRA does not exist"),
    ],
)
def test_experts_that_are_no_plain_lora_are_refused(
    config: LoraConfig, classes: type, mention: str, tmp_path: Path
) -> None:
    get_peft_model(base(), config).save_pretrained(tmp_path)
    model = base()
    with refused(model, classes, mention):
        get_peft_model(model, XLoraConfig(hidden_size=8, adapters={"one": str(tmp_path)}))


def test_experts_of_other_methods_and_broken_files_are_refused(experts: dict[str, str], tmp_path: Path) -> None:
    from peft import IA3Config

    get_peft_model(base(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(tmp_path)
    model = base()
    with refused(model, TypeError, "IA3"):
        get_peft_model(model, XLoraConfig(hidden_size=8, adapters={"one": str(tmp_path)}))
    broken = tmp_path / "broken"
    PeftModel.from_pretrained(base(), experts["law"]).save_pretrained(broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors["base_model.model.model.nowhere.lora_A.weight"] = torch.zeros(2, 8)
    save_file(tensors, broken / "adapter_model.safetensors")
    with refused(model, ValueError, "nowhere"):
        get_peft_model(model, XLoraConfig(hidden_size=8, adapters={"one": str(broken)}))


def test_configs_warn_of_what_has_no_effect() -> None:
    for fields, mention in (
        ({"hidden_size": None}, "hidden_size"),
        ({"adapters": None}, "adapters"),
        ({"enable_softmax": False, "enable_softmax_topk": True}, "top_k_lora"),
        ({"enable_softmax_topk": True, "top_k_lora": 1}, "twice"),
        ({"top_k_lora": 0}, "no expert"),
    ):
        with pytest.warns(PeftWarning, match=mention):
            XLoraConfig(**{"hidden_size": 8, "adapters": {}, **fields})
