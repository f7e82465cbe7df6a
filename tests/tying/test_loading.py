# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What other libraries do to a tied model with adapters: tie it again, offload, compile, checkpoint and copy it."""

import copy
import pickle
import warnings
from collections.abc import Callable

import accelerate
import pytest
import torch
import transformers
from support.helpers import through_a_file
from support.tied_models import TIED_MODELS, TiedModel, llama
from torch import nn

from peft import LoraConfig, PeftError, PeftModel, PeftWarning, get_peft_model, weight_tying_report


HUB_MODELS = [name for name in TIED_MODELS if not name.startswith("plain")]
ROUTES = ["saved", "targeted"]
IDS = torch.tensor([[3, 5, 7, 11], [2, 4, 6, 8]])


def config_for(tied: TiedModel, route: str, ensure: bool = True) -> LoraConfig:
    """Make the config of an adapter that reaches the tie by one route."""
    saved = {"modules_to_save": [tied.inputs]} if route == "saved" else {}
    targets = tied.targets if route == "saved" else [*tied.targets, tied.inputs, tied.outputs]
    return LoraConfig(
        r=2, target_modules=targets, ensure_weight_tying=ensure, init_lora_weights=False, task_type=tied.task_type,
        fan_in_fan_out="c_attn" in targets, **saved,
    )  # fmt: skip


def adapted(tied: TiedModel, route: str, ensure: bool = True, base: nn.Module | None = None) -> PeftModel:
    """Put an adapter that has an effect into a model, the same one each time."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        if not ensure:
            warnings.simplefilter("ignore", PeftWarning)
        model = get_peft_model(tied.build() if base is None else base, config_for(tied, route, ensure)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter) * 0.1)
    return model


def llama_with(route: str, **options) -> PeftModel:
    return adapted(TIED_MODELS["llama"], route, **options)


def state(model: nn.Module, tied: TiedModel) -> tuple[torch.Tensor, dict]:
    with torch.no_grad():
        return tied.forward(model), weight_tying_report(model).to_dict()


def assert_same(before: tuple, after: tuple) -> None:
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def holds_for_adapter(model: nn.Module) -> bool:
    rows = [row for row in weight_tying_report(model).rows if row.adapter is not None]
    return bool(rows) and all(row.shared for row in rows)


each_route = pytest.mark.parametrize("route", ROUTES)


# ------------------------------------------------------------------------------------------ tie_weights
@pytest.mark.parametrize("ensure", [True, False], ids=["tied", "apart"])
@each_route
@pytest.mark.parametrize("name", HUB_MODELS)
def test_the_base_is_told_to_tie(name, route, ensure):
    """Transformers does so after resizing and loading; the names that it goes by are those of the base model."""
    tied = TIED_MODELS[name]
    model = adapted(tied, route, ensure)
    before, modules = state(model, tied), [id(module) for module in model.modules()]
    base = model.get_base_model()
    for part in (base, getattr(base, "language_model", base)):
        if hasattr(part, "tie_weights"):
            part.tie_weights()
    assert_same(before, state(model, tied))
    assert [id(module) for module in model.modules()] == modules


@each_route
def test_tying_restores_a_tie_of_the_base(route):
    """It still does what it is for: loading may leave the members with tensors of their own."""
    tied = TIED_MODELS["llama"]
    model = adapted(tied, route)
    head = model.get_base_model().lm_head
    bare = head.original_module if route == "saved" else head.base_layer
    bare.weight = nn.Parameter(bare.weight.detach() + 1, requires_grad=False)
    assert not weight_tying_report(model).holds
    model.get_base_model().tie_weights()
    assert_same(state(adapted(tied, route), tied), state(model, tied))


@pytest.mark.parametrize("ensure", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_tying_while_merged(name, ensure):
    tied = TIED_MODELS[name]
    model = adapted(tied, "targeted", ensure)
    unmerged = state(model, tied)
    model.merge_adapter()
    merged = state(model, tied)
    model.get_base_model().tie_weights()
    assert_same(merged, state(model, tied))
    model.unmerge_adapter()
    torch.testing.assert_close(state(model, tied)[0], unmerged[0], rtol=1e-4, atol=1e-4)


@each_route
@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_a_model_without_adapters_ties_as_it_did(leave, route):
    tied = TIED_MODELS["llama"]
    base = getattr(adapted(tied, route), leave)()
    assert "tie_weights" not in vars(base)
    before = state(base, tied)
    base.tie_weights()
    assert_same(before, state(base, tied))


# ------------------------------------------------------------------------------------------ resizing
@each_route
def test_base_that_was_resized_before(route, tmp_path):
    base = llama()
    base.resize_token_embeddings(50)
    model = llama_with(route, base=base)
    assert holds_for_adapter(model)
    model.save_pretrained(tmp_path)
    again_base = llama()
    again_base.resize_token_embeddings(50)
    again_base.load_state_dict(base_state(base))
    again = PeftModel.from_pretrained(again_base, tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def base_state(base: nn.Module) -> dict[str, torch.Tensor]:
    """Give the state of a model as it was before an adapter was put into it."""
    return {
        key.replace("original_module.", "").replace("base_layer.", ""): value
        for key, value in base.state_dict().items()
        if "lora_" not in key and "modules_to_save." not in key
    }


@each_route
def test_base_that_was_not_resized_is_refused_with_the_sizes(route, tmp_path):
    base = llama()
    base.resize_token_embeddings(50)
    llama_with(route, base=base).save_pretrained(tmp_path)
    with pytest.raises(PeftError, match=r"(?s)50.*48|48.*50"):
        PeftModel.from_pretrained(llama(), tmp_path)


# ------------------------------------------------------------------------------------------ empty weights, offloading
@each_route
@pytest.mark.parametrize("order", ["adapter first", "base first"])
def test_model_without_storage_is_filled_later(order, route, tmp_path):
    expected = llama_with(route)
    expected.save_pretrained(tmp_path)
    with accelerate.init_empty_weights(include_buffers=False):
        base = transformers.LlamaForCausalLM(llama().config)
    base.tie_weights()
    values = llama().state_dict()
    if order == "base first":
        base.load_state_dict(values, assign=True)
        base.tie_weights()
    model = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True).eval()
    if order == "adapter first":
        inside = [key for key in base.state_dict() if "lora_" not in key and "modules_to_save." not in key]
        renamed = {key: values[key.replace("base_layer.", "").replace("original_module.", "")] for key in inside}
        base.load_state_dict(renamed, assign=True, strict=False)
        base.tie_weights()
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert weight_tying_report(model).holds
    assert torch.equal(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def dispatched(model: nn.Module, head: str, folder) -> nn.Module:
    """Spread a model: the tied modules on the given place, blocks in main memory and on disk."""
    places = {"model.embed_tokens": head, "lm_head": head, "model.layers.0": "cpu", "model.layers.1": "disk"}
    places.update({"model.norm": "disk", "model.rotary_emb": "cpu"})
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@each_route
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=["", "low_cpu_mem_usage"])
def test_base_with_offloaded_blocks(options, route, tmp_path):
    expected = llama_with(route)
    expected.save_pretrained(tmp_path / "adapter")
    base = dispatched(llama(), "cpu", tmp_path / "disk")
    assert base.model.layers[1].mlp.up_proj.weight.is_meta
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True, **options).eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    assert weight_tying_report(model).holds
    for either in (model, expected):
        either.train()
        for name, parameter in either.named_parameters():
            parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
        either(input_ids=IDS, labels=IDS).loss.backward()
    gradients = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-6)
    merged, expected = model.eval().merge_and_unload(), expected.eval().merge_and_unload()
    assert base.model.layers[1].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected(input_ids=IDS).logits)


OFFLOADS: dict[str, Callable] = {
    "dispatched": lambda model, folder: dispatched(model, "disk", folder),
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
}


@each_route
@pytest.mark.parametrize("ensure", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_tied_modules_that_are_offloaded_are_refused(offload, ensure, route, tmp_path):
    """Accelerate gives each member a placeholder of its own then, and a copy would go on computing with the base."""
    base = llama()
    base = OFFLOADS[offload](base, str(tmp_path)) or base
    modules = [id(module) for module in base.modules()]
    with pytest.raises(PeftError, match="offloaded"):
        get_peft_model(base, config_for(TIED_MODELS["llama"], route, ensure))
    assert [id(module) for module in base.modules()] == modules
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    expected = get_peft_model(llama(), config)(input_ids=IDS).logits
    torch.manual_seed(0)
    torch.testing.assert_close(get_peft_model(base, config)(input_ids=IDS).logits, expected)


# ------------------------------------------------------------------------------------------ compiling
def compiled_graphs(model: nn.Module) -> tuple[int, torch.Tensor]:
    """Compile a model; count the graphs that it comes to, and give its output."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        logits = torch.compile(model, backend=backend)(input_ids=IDS).logits
    torch._dynamo.reset()
    return len(graphs), logits


@each_route
def test_compiling_cuts_the_graph_no_more_than_without_the_tie(route):
    tied = TIED_MODELS["llama"]
    untied = get_peft_model(llama(tie=False), config_for(tied, route, ensure=False)).eval()
    model = llama_with(route)
    graphs, compiled = compiled_graphs(model)
    assert graphs <= compiled_graphs(untied)[0]
    torch.testing.assert_close(compiled, model(input_ids=IDS).logits)


# ------------------------------------------------------------------------------------------ training
def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@each_route
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant, route):
    expected = gradients(llama_with(route))
    base = llama()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(llama_with(route, base=base))
    assert got.keys() == expected.keys()
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)


@each_route
def test_autocast(route):
    model = llama_with(route)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(input_ids=IDS, labels=IDS)
    half.loss.backward()
    assert half.logits.dtype == torch.bfloat16
    torch.testing.assert_close(half.logits.float(), model(input_ids=IDS).logits, rtol=0.1, atol=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.dtype == torch.float32 for p in trained)
    assert weight_tying_report(model).holds


@each_route
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, when, route, tmp_path):
    model = llama_with(route, base=llama().to(dtype) if when == "before" else None)
    model = model.to(dtype) if when == "after" else model
    assert weight_tying_report(model).holds
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    assert output.logits.dtype == dtype
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        merged = copy.deepcopy(model).merge_and_unload()
    assert weight_tying_report(merged).holds
    torch.testing.assert_close(merged(input_ids=IDS).logits, output.logits, rtol=0.1, atol=0.1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama().to(dtype), tmp_path)
    again = again.to(dtype) if when == "after" else again
    assert torch.equal(again(input_ids=IDS).logits, output.logits)


# ------------------------------------------------------------------------------------------ copies
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": through_a_file}


@each_route
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", TIED_MODELS)
def test_copies_of_the_whole_model(name, how, route):
    tied = TIED_MODELS[name]
    model = adapted(tied, route)
    before = state(model, tied)
    copied = COPIES[how](model)
    assert_same(before, state(copied, tied))
    with torch.no_grad():  # what is tied moves together, and the original does not move at all
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    if hasattr(copied.get_base_model(), "tie_weights"):
        changed = state(copied, tied)
        copied.get_base_model().tie_weights()
        assert_same(changed, state(copied, tied))
    assert holds_for_adapter(copied)
    assert_same(before, state(model, tied))
