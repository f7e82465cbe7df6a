# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Quantised base models: one contract, which every backend of the registry has to keep.

bitsandbytes, HQQ and torchao are the real libraries and compute on the CPU. The others need an accelerator or a build
of their own; in their place stands a recording stand-in, a layer that quantises by itself and notes what it is given,
of a class that is named like theirs.
"""

import contextlib
import copy
import functools
import importlib
import pickle
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.effects import move
from support.helpers import assert_close, assert_equal, differs, llama, logits, token_ids, trainable, warned
from support.helpers import refused as refused_by_package
from support.method_options import OPTIONS, linear_methods
from torch import nn

import peft
from peft import (
    IA3Config,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
    weight_tying_report,
)
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tying.groups import find_tied_groups
from peft.utils import get_quantization_config, get_quantization_kwargs, resolve_quantization_backend
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizedWeightError,
    TorchaoBackend,
    is_gptqmodel_awq_layer,
    is_gptqmodel_quant_linear,
    stored_weight,
)


# blocks of bitsandbytes hold 64 weights, and on some processors none may end inside a row
WIDTH = 64
TARGETS = ["q_proj", "down_proj"]
LINEAR_METHODS = linear_methods()


# --------------------------------------------------------------------------------------------------- the backends
class RecordingStandIn(nn.Module):
    """
    A quantised linear layer that is none of a library: 8-bit codes and one scale per output.

    Args:
        linear: what to quantise.
        names: what its attributes for the codes, input and output features are called.
        transposed: store the codes as (in, out).
    """

    def __init__(self, linear: nn.Linear, names: tuple[str, str, str], transposed: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.scales = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / self.scales).round().to(torch.int8)
        self.names, self.transposed, self.given = names, transposed, []
        self.register_buffer(names[0], codes.T.contiguous() if transposed else codes)
        if not transposed:
            setattr(self, names[1], linear.in_features)
            setattr(self, names[2], linear.out_features)
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute, and note the shape and the type of the input."""
        self.given.append((tuple(x.shape), x.dtype))
        codes = getattr(self, self.names[0])
        return x @ ((codes.T if self.transposed else codes) * self.scales).to(x.dtype).T


def stand_in(module: str, name: str, codes: str, *features: str, transposed: bool = False) -> Callable:
    """Make a function from a linear layer to a stand-in for a class of some library."""
    names = (codes, *(features or ("in_features", "out_features")))
    cls = type(name, (RecordingStandIn,), {"__module__": module})
    globals()[f"{module}.{name}"] = cls
    return lambda linear: cls(linear, names, transposed)


STAND_INS = {
    "gptq": stand_in("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear", "qweight"),
    "gptq (auto_gptq)": stand_in("auto_gptq.qlinear", "QuantLinear", "qweight", "infeatures", "outfeatures"),
    "awq (gptqmodel)": stand_in("gptqmodel.nn_modules.qlinear.torch_awq", "AwqTorchQuantLinear", "qweight"),
    "awq": stand_in("awq.modules.linear.gemm", "WQLinear_GEMM", "qweight"),
    "aqlm": stand_in("aqlm.inference", "QuantizedLinear", "codes"),
    "eetq": stand_in("transformers.integrations.eetq", "EetqLinear", "weight", transposed=True),
    "inc": stand_in("neural_compressor.torch.algorithms.fp8_quant", "PatchedLinear", "weight"),
    "elsewhere": stand_in("elsewhere.layers", "ByteLinear", "weight"),
}


def replace_linear(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Replace all linear layers but the head, which transformers leaves out too."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(parent, name, make(child))
    return model


def dense_model(**changes: Any) -> nn.Module:
    return llama(tied=True, hidden_size=WIDTH, intermediate_size=2 * WIDTH, **changes)


def with_hqq() -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    config = {"nbits": 4, "group_size": 16}

    def make(linear: nn.Linear) -> nn.Module:
        settings = quantize.BaseQuantizeConfig(**config)
        return quantize.HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")

    return replace_linear(dense_model().requires_grad_(False), make)


def torchao_config(bits: int) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    if bits == 8:
        return quantization.Int8WeightOnlyConfig()
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4)


def loaded_by_transformers(folder: Any, name: str) -> nn.Module:
    """Let transformers quantise a tied model while it loads it."""
    import transformers

    pytest.importorskip("torchao" if "torchao" in name else "bitsandbytes", reason="the library is not installed")
    config = {
        "bnb 4bit": lambda: transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        "bnb 8bit": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
        "torchao int8": lambda: transformers.TorchAoConfig(torchao_config(8)),
        "torchao int4": lambda: transformers.TorchAoConfig(torchao_config(4)),
    }[name]()
    return transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config).eval()


BY_TRANSFORMERS = ["bnb 4bit", "bnb 8bit", "torchao int8", "torchao int4"]
REAL = [*BY_TRANSFORMERS, "hqq"]
EVERY = [*REAL, *STAND_INS]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], nn.Module]:
    """Give a copy of the tied model as a backend quantises it; what a test does to it stays in the test."""
    folder = tmp_path_factory.mktemp("dense")
    dense_model().save_pretrained(folder)

    @functools.cache
    def make(name: str) -> nn.Module:
        if name == "hqq":
            return with_hqq()
        if name in STAND_INS:
            return replace_linear(dense_model(), STAND_INS[name])
        return loaded_by_transformers(folder, name)

    return lambda name: copy.deepcopy(make(name))


each = pytest.mark.parametrize("name", EVERY)
each_real = pytest.mark.parametrize("name", REAL)


@pytest.fixture(autouse=True)
def quiet_libraries() -> Iterator[None]:
    """Leave out warnings that other libraries give among themselves; those of this package count."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", message="MatMul8bitLt")
        yield


def backend_name(name: str) -> str:
    return "torchao" if "torchao" in name else name.partition(" (")[0]


def adapter(method: str = "LORA", **changes: Any) -> Any:
    options = {"target_modules": TARGETS, **OPTIONS.get(method, {}), **changes}
    return PEFT_TYPE_TO_CONFIG_MAPPING[method](**options)


def adapted(model: nn.Module, config: Any, wanted: float | None = None) -> nn.Module:
    """Put an adapter in, with an effect, of a size that is wanted or of any."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="AdaLoRA")
        peft_model = get_peft_model(model, config).eval()
    parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    if wanted is not None:
        move(parameters, lambda: logits(peft_model, IDS), wanted=wanted)
    else:
        with torch.no_grad():
            for parameter in parameters:
                nn.init.normal_(parameter, mean=0.1, std=0.3)
    return peft_model


@contextlib.contextmanager
def refused(model: nn.Module | None, classes: Any, *mentions: str) -> Iterator[None]:
    """Expect a refusal that leaves the model as it was; tensors of torchao cannot be looked at bit by bit."""
    before = None if model is None else (repr(model), types_of(model), trainable(model), logits(model, IDS))
    with refused_by_package(None, classes, *mentions):
        yield
    if model is not None:
        assert before[:3] == (repr(model), types_of(model), trainable(model))
        assert_equal(logits(model, IDS), before[3])


def types_of(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def layers_of(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


IDS = token_ids()


# --------------------------------------------------------------------------------------------------- the contract
def check_contract(model: nn.Module, config: Any, fresh: Callable[[], nn.Module], folder: Any) -> None:
    """Adapt, train, switch, copy, save, load."""
    base = logits(model, IDS)
    if refuses_to_be_read(model, config):
        return
    # large against the rounding of 4 bits; reflections change little, however far they are moved
    peft_model = adapted(model, config, wanted=None if config.peft_type == "HRA" else 0.3)
    assert {p.dtype for p in peft_model.parameters() if p.requires_grad} == {torch.float32}
    expected = logits(peft_model, IDS)
    assert differs(expected, base)
    with peft_model.disable_adapter():
        assert_equal(logits(peft_model, IDS), base)

    peft_model(IDS).logits.square().mean().backward()
    with_gradient = {n for n, p in peft_model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient and with_gradient <= trainable(peft_model)
    assert all(any(target in name for target in (*TARGETS, "vector_bank")) for name in with_gradient)
    peft_model.zero_grad(set_to_none=True)

    assert_equal(logits(copy.deepcopy(peft_model), IDS), expected)
    peft_model.save_pretrained(folder)
    other = fresh()
    logits(other, IDS)  # as the first model was called: bitsandbytes rounds weights anew then, as methods see
    again = logits(PeftModel.from_pretrained(other, folder).eval(), IDS)
    assert_close(again, expected)
    check_merging(peft_model, base, expected)


def refuses_to_be_read(model: nn.Module, config: Any) -> bool:
    """Say whether the method needs a dense weight that the backend cannot give, so that it is refused."""
    before = (repr(model), trainable(model))
    try:
        get_peft_model(copy.deepcopy(model), config)
    except QuantizedWeightError:
        with pytest.raises(QuantizedWeightError, match="dense"):
            get_peft_model(model, config)
        assert before == (repr(model), trainable(model))
        return True
    return False


def check_merging(peft_model: nn.Module, base: torch.Tensor, expected: torch.Tensor) -> None:
    """Merging rounds anew or is refused, and unmerging brings every bit back."""
    layers = layers_of(peft_model)
    backend = layers[0].quantization_backend
    classes = [type(layer.get_base_layer()) for layer in layers]
    was_tied = len(find_tied_groups(peft_model))
    if peft_model.peft_config["default"].peft_type == "BEFT":  # which trains biases, and the models' layers have none
        with refused(peft_model, ValueError, "no bias to merge it into"):
            peft_model.merge_adapter()
        return
    if isinstance(backend, ForwardOnlyQuantizationBackend):
        for merge in (peft_model.merge_adapter, peft_model.merge_and_unload):
            with refused(peft_model, (NotImplementedError, TypeError), backend.name, "keep the adapter unmerged"):
                merge()
        assert_equal(logits(peft_model.unload(), IDS), base)
        return
    wanted = [layer.effective_weight().detach() for layer in layers]
    with warned(backend.name, "rounds"):
        peft_model.merge_adapter(safe_merge=True)
    for layer, weight in zip(layers, wanted, strict=True):
        found = dequantize_module_weight(layer.get_base_layer())
        # a few large entries among small ones are what 4 bits per group of torchao round worst
        assert (found - weight).norm() < (0.3 if backend.name == "torchao" else 0.25) * weight.norm()
        assert not stored_weight(layer.get_base_layer()).requires_grad
    merged = logits(peft_model, IDS)
    assert (merged - expected).norm() < 0.6 * (base - expected).norm()
    peft_model.unmerge_adapter()
    assert_equal(logits(peft_model, IDS), expected)
    with warned("rounds"):
        plain = peft_model.merge_and_unload()
    assert_equal(logits(plain, IDS), merged)
    assert not layers_of(plain)
    assert [type(layer.get_base_layer()) for layer in layers] == classes
    assert len(find_tied_groups(plain)) == was_tied


@each
def test_contract(name: str, quantized: Callable, tmp_path: Any) -> None:
    check_contract(quantized(name), adapter(), lambda: quantized(name), tmp_path)


@pytest.mark.parametrize("method", sorted(set(LINEAR_METHODS) - {"LORA"}))
@pytest.mark.parametrize("name", ["bnb 4bit", "hqq", "gptq"])
def test_methods(name: str, method: str, quantized: Callable, tmp_path: Any) -> None:
    check_contract(quantized(name), adapter(method), lambda: quantized(name), tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("method", LINEAR_METHODS)
@each
def test_methods_widely(name: str, method: str, quantized: Callable, tmp_path: Any) -> None:
    check_contract(quantized(name), adapter(method), lambda: quantized(name), tmp_path)


@each_real
def test_dora(name: str, quantized: Callable, tmp_path: Any) -> None:
    check_contract(quantized(name), adapter(use_dora=True), lambda: quantized(name), tmp_path)


def test_base_layers_are_given_what_they_would_be_without_an_adapter(quantized: Callable) -> None:
    model = quantized("gptq")
    logits(model, IDS)
    before = [layer.given.pop() for layer in model.modules() if isinstance(layer, RecordingStandIn)]
    peft_model = adapted(model, adapter())
    logits(peft_model, IDS)
    after = [layer.given for layer in model.modules() if isinstance(layer, RecordingStandIn)]
    assert after == [[given] for given in before]


# --------------------------------------------------------------------------------------------------- the registry
@each
def test_registry(name: str, quantized: Callable) -> None:
    model = quantized(name)
    found = {key: resolve_quantization_backend(module) for key, module in model.named_modules()}
    backends = {key: backend.name for key, backend in found.items() if backend is not None}
    assert set(backends) == {key for key in found if key.endswith("_proj")}
    assert set(backends.values()) == {backend_name(name)}
    assert {stored_weight(model.get_submodule(key)).device.type for key in backends} == {"cpu"}


@each
def test_all_linear_finds_quantised_layers(name: str, quantized: Callable) -> None:
    model = get_peft_model(quantized(name), LoraConfig(r=2, target_modules="all-linear"))
    assert len(layers_of(model)) == 14
    assert not isinstance(model.get_base_model().lm_head, BaseTunerLayer)
    assert f"quantization_backend={backend_name(name)!r}" in repr(layers_of(model)[0])


def test_dense_layers_have_no_backend() -> None:
    for layer in (nn.Linear(2, 2), nn.Embedding(2, 2), nn.LayerNorm(2), nn.Linear(2, 2).to(torch.float8_e4m3fn)):
        assert resolve_quantization_backend(layer) is None
    model = get_peft_model(dense_model(), LoraConfig(target_modules=["q_proj"]))
    assert "quantization_backend" not in repr(model)
    assert get_quantization_kwargs(model) == {}


def test_forward_asks_no_registry_and_builds_no_weight(quantized: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [adapted(quantized("bnb 4bit"), adapter(method)) for method in ("LORA", "IA3", "OFT", "LOHA")]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked for in a forward pass")

    for place in ("peft.layers.base_layer", "peft.anatomy.kinds", "peft.utils.quantization_utils"):
        monkeypatch.setattr(f"{place}.resolve_quantization_backend", refuse)
    monkeypatch.setattr(peft.utils.quantization_utils.Bnb4bitBackend, "get_base_weight", refuse)
    for model in models:
        assert logits(model, IDS).isfinite().all()


def test_gptqmodel_is_recognised() -> None:
    linear = nn.Linear(4, 4)
    gptq, awq = STAND_INS["gptq"](linear), STAND_INS["awq (gptqmodel)"](linear)
    assert [is_gptqmodel_quant_linear(module) for module in (gptq, awq, linear, None)] == [True, True, False, False]
    assert [is_gptqmodel_awq_layer(module) for module in (gptq, awq, linear, None)] == [False, True, False, False]
    assert not is_gptqmodel_quant_linear(STAND_INS["gptq (auto_gptq)"](linear))


def test_quantization_config(quantized: Callable) -> None:
    model = quantized("bnb 4bit")
    assert get_quantization_config(model, "bitsandbytes").load_in_4bit
    assert get_quantization_config(model, "gptq") is None
    assert get_quantization_kwargs(model) == {}
    model = quantized("torchao int8")
    (function,) = get_quantization_kwargs(model).values()
    assert type(function()) is type(torchao_config(8))
    assert get_quantization_config(dense_model(), "torchao") is None


# ------------------------------------------------------------------------------------------------- single backends
@pytest.mark.parametrize(("name", "kind"), [("bnb 4bit", "4bit"), ("bnb 8bit", "8bit")])
def test_bitsandbytes_weights(name: str, kind: str, quantized: Callable) -> None:
    dense, layer = dense_model().model.layers[0].mlp.up_proj, quantized(name).model.layers[0].mlp.up_proj
    assert get_bnb_param_type(layer.weight) == kind
    assert get_bnb_param_type(dense.weight) is False
    weight = dequantize_bnb_weight(layer.weight, state=layer.state if kind == "8bit" else None)
    assert weight.dtype == torch.float32 and weight.shape == dense.weight.shape
    assert (weight - dense.weight).norm() < 0.15 * dense.weight.norm()
    layer(torch.ones(1, WIDTH))  # which moves the scales of 8-bit weights to another place
    rounding = 2**-8 if kind == "4bit" else 0  # on some processors it also rounds those of 4-bit weights to bfloat16
    torch.testing.assert_close(dequantize_module_weight(layer), weight, atol=0, rtol=rounding)
    assert dequantize_bnb_weight(dense.weight) is dense.weight
    assert dequantize_module_weight(dense) is dense.weight
    with refused(None, TypeError, "Parameter"):
        dequantize_bnb_weight(weight)


@pytest.mark.parametrize("four_bit", [True, False])
def test_bitsandbytes_embeddings(four_bit: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model, dense = dense_model(tie_word_embeddings=False), dense_model().model.embed_tokens
    embedding = (bnb.nn.Embedding4bit if four_bit else bnb.nn.Embedding8bit)(*dense.weight.shape)
    embedding.load_state_dict(dense.state_dict())
    model.model.embed_tokens = embedding.to("cpu").requires_grad_(False)
    base = logits(model, IDS)
    peft_model = adapted(model, adapter(target_modules=["embed_tokens"]))
    assert type(layers_of(peft_model)[0]) is peft.tuners.lora.layer.Embedding
    check_merging(peft_model, base, logits(peft_model, IDS))


@pytest.mark.parametrize("nested", [True, False])
def test_codes_that_bitsandbytes_has_reordered_for_a_processor(nested: bool) -> None:
    """Its layers do so in their first forward pass without gradients, where the processor has AVX512-BF16."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    weight = bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, compress_statistics=nested).to("cpu").weight
    expected = dequantize_bnb_weight(weight)
    state = copy.deepcopy(weight.quant_state)
    reordered, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, state)
    weight.data = reordered
    for _ in range(2):  # looking must not change what the layer computes with
        found = dequantize_bnb_weight(weight)
        torch.testing.assert_close(found, expected, atol=0, rtol=2**-8)  # scales are in bfloat16 then
        assert torch.equal(weight.data, reordered)


def in_four_bits(nested: bool) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    layers = [bnb.nn.Linear4bit(WIDTH, WIDTH, compress_statistics=nested) for _ in range(3)]
    return nn.Sequential(*layers).to("cpu").eval()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("method", ["LORA", "OFT", "HRA", "IA3"])
def test_evaluating_changes_neither_gradients_nor_what_is_saved(method: str, nested: bool) -> None:
    base, x = in_four_bits(nested), torch.randn(3, WIDTH)
    saved = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = adapted(base, adapter(method, target_modules=["1"]))

    def gradients(train: bool) -> list[torch.Tensor]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.autograd.grad(model.train(train)(x).square().mean(), trained)

    expected = gradients(train=True)
    for train in (True, False):
        with torch.no_grad():
            model.eval()(x)
        for gradient, wanted in zip(gradients(train), expected, strict=True):
            # in evaluation the first layer, which no gradient passes, may compute in bfloat16
            torch.testing.assert_close(gradient, wanted, atol=0 if train else 0.05 * wanted.abs().max(), rtol=0)
    for state in (base.state_dict(), model.unload().state_dict()):
        state = {key.replace(".base_layer", ""): tensor for key, tensor in state.items()}
        for key, tensor in saved.items():
            assert_equal(state[key], tensor)
    assert not any(layer._forward_pre_hooks or layer._state_dict_pre_hooks for layer in base)


def test_evaluating_changes_no_gradients_of_prompts(quantized: Callable) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(quantized("bnb 4bit"), config)
    prompt = model.prompt_encoder["default"].embedding.weight

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(model.train()(IDS, labels=IDS).loss, [prompt])[0]

    expected = gradient()
    logits(model.eval(), IDS)
    assert_equal(gradient(), expected)


def test_llm_int8_that_trains_in_half_precision_is_not_quantised() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert resolve_quantization_backend(bnb.nn.Linear8bitLt(4, 4, has_fp16_weights=True)) is None


def test_torchao_without_its_config_trains_and_is_not_merged(quantized: Callable) -> None:
    model = quantized("torchao int8")
    del model.hf_quantizer, model.config.quantization_config
    peft_model = adapted(model, adapter("LOHA"))
    assert isinstance(layers_of(peft_model)[0].quantization_backend, TorchaoBackend)
    many = token_ids(batch=32, length=16)  # for which deltas are added to the weight where it is dense
    assert_close(logits(peft_model, many)[:2], logits(peft_model, many[:2]))
    peft_model(IDS).logits.sum().backward()
    with refused(peft_model, NotImplementedError, "torchao", "TorchAoConfig"):
        peft_model.merge_adapter()


def test_torchao_config_that_goes_by_names_is_not_merged(quantized: Callable) -> None:
    model = quantized("torchao int8")
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    by_name = quantization.FqnToConfig({"model.layers.0.self_attn.q_proj": torchao_config(8)})
    model.hf_quantizer.quantization_config.get_apply_tensor_subclass = lambda: by_name
    peft_model = adapted(model, adapter())
    with refused(peft_model, NotImplementedError, "torchao", "goes by names"):
        peft_model.merge_adapter()


@pytest.mark.parametrize("name", ["bnb 4bit", "bnb 8bit", "hqq"])  # no tensor of torchao can be pickled
def test_pickle(name: str, quantized: Callable) -> None:
    peft_model = adapted(quantized(name), adapter())
    assert_equal(logits(pickle.loads(pickle.dumps(peft_model)), IDS), logits(peft_model, IDS))


# ---------------------------------------------------------------------------------------------- several adapters
@each_real
def test_weights_are_rounded_once_however_many_adapters_are_merged(name: str, quantized: Callable) -> None:
    peft_model = adapted(quantized(name), adapter())
    peft_model.add_adapter("other", adapter())
    for layer in layers_of(peft_model):
        nn.init.normal_(layer.lora_B["other"].weight, std=0.3)
    with warned("rounds"):
        peft_model.merge_adapter(["default", "other"])
    at_once = logits(peft_model, IDS)
    peft_model.unmerge_adapter()
    for adapter_name in ("default", "other"):
        with warned("rounds"):
            peft_model.merge_adapter([adapter_name])
    assert_close(logits(peft_model, IDS), at_once)


@pytest.mark.parametrize("name", ["bnb 4bit", "hqq", "gptq"])
def test_an_adapter_per_sample(name: str, quantized: Callable) -> None:
    peft_model = adapted(quantized(name), adapter())
    mixed = logits(peft_model, IDS, adapter_names=["default", "__base__"])
    assert_close(mixed[0], logits(peft_model, IDS)[0])
    with peft_model.disable_adapter():
        base = logits(peft_model, IDS)
    assert_close(mixed[1], base[1])


@pytest.mark.parametrize("name", ["bnb 4bit", "hqq", "torchao int8"])
def test_two_methods_at_once(name: str, quantized: Callable) -> None:
    mixed = PeftMixedModel(quantized(name), adapter(init_lora_weights=False), "first")
    mixed.add_adapter("second", adapter("LOHA", init_weights=False))
    mixed.set_adapter(["first", "second"])
    mixed.eval()
    expected = logits(mixed, IDS)
    with warned("rounds"):
        mixed.merge_adapter()
    assert differs(logits(mixed, IDS), expected) and (logits(mixed, IDS) - expected).norm() < 0.2 * expected.norm()
    mixed.unmerge_adapter()
    assert_equal(logits(mixed, IDS), expected)


@each_real
def test_loading_without_storage_first(name: str, quantized: Callable, tmp_path: Any) -> None:
    peft_model = adapted(quantized(name), adapter(use_dora=True))
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(name), tmp_path, low_cpu_mem_usage=True).eval()
    assert_close(logits(loaded, IDS), logits(peft_model, IDS))


# ------------------------------------------------------------------------------------------------------- refusals
def test_what_needs_a_dense_weight_is_refused_where_there_is_none(quantized: Callable) -> None:
    model = quantized("gptq")
    with refused(model, (NotImplementedError, TypeError), "gptq", "without use_dora"):
        get_peft_model(model, adapter(use_dora=True))


@pytest.mark.parametrize("start", ["pissa", "olora"])
@each
def test_starts_that_change_base_weights_are_refused(start: str, name: str, quantized: Callable) -> None:
    model = quantized(name)
    with refused(model, TypeError, start, backend_name(name), "before the model is quantised"):
        get_peft_model(model, adapter(init_lora_weights=start))


@each
def test_quantised_layers_are_not_trained_in_full(name: str, quantized: Callable) -> None:
    model = quantized(name)
    with refused(model, TypeError, "down_proj", backend_name(name)):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"]))
    with refused(model, TypeError, "mlp", backend_name(name)):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))


@each_real
def test_parameters_of_quantised_layers_are_no_targets(name: str, quantized: Callable) -> None:
    model = quantized(name)
    parameter = "q_proj.W_q" if name == "hqq" else "q_proj.weight"
    with refused(model, NotImplementedError, backend_name(name), "target_modules"):
        get_peft_model(model, LoraConfig(target_modules=[], target_parameters=[parameter]))


# ----------------------------------------------------------------------------------------------------------- ties
@each_real
def test_end_to_end_with_a_tied_head(name: str, quantized: Callable, tmp_path: Any) -> None:
    """The head that the library left dense is tied before, while and after it is adapted."""
    model = prepare_model_for_kbit_training(quantized(name), gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    peft_model = get_peft_model(model, config).train()
    optimizer = torch.optim.Adam([p for p in peft_model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        loss = peft_model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert weight_tying_report(peft_model).holds
    expected = logits(peft_model.eval(), IDS)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(name), tmp_path).eval()
    assert_close(logits(loaded, IDS), expected, atol=1e-4)
    for tied in (loaded, peft_model):
        with warned("rounds"):
            plain = tied.merge_and_unload()
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
        assert (logits(plain, IDS) - expected).norm() < 0.1 * expected.norm()


def tied_and_quantised() -> nn.Module:
    """A model whose embedding is quantised by torchao, with a head that shares it."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    import transformers

    model, config = dense_model(), quantization.IntxWeightOnlyConfig(weight_dtype=torch.int8)
    quantization.quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Embedding))
    model.lm_head.weight = model.model.embed_tokens.weight
    model.hf_quantizer = types.SimpleNamespace(quantization_config=transformers.TorchAoConfig(config))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["lm_head", "q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ],
    ids=["embedding", "head", "head with DoRA", "tokens"],
)
def test_quantised_tied_embedding(options: dict[str, Any], tmp_path: Any) -> None:
    peft_model = adapted(tied_and_quantised(), LoraConfig(r=2, ensure_weight_tying=True, **options))
    expected = logits(peft_model, IDS)
    peft_model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(tied_and_quantised(), tmp_path).eval(), IDS), expected)
    with warned("torchao"):
        peft_model.merge_adapter()
    members = [layer for layer in layers_of(peft_model) if layer.quantization_backend is not None]
    assert len(members) == 2 and len({id(layer.stored_weight()) for layer in members}) == 1
    peft_model.unmerge_adapter()
    assert_close(logits(peft_model, IDS), expected)
    with warned("torchao"):
        plain = peft_model.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert (logits(plain, IDS) - expected).norm() < 0.05 * expected.norm()


def test_quantised_tie_that_is_adapted_apart_is_given_up_with_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", peft.PeftWarning)
        peft_model = adapted(tied_and_quantised(), LoraConfig(r=2, target_modules=["lm_head"]))
    before = dequantize_module_weight(peft_model.get_base_model().model.embed_tokens)
    with pytest.warns(peft.PeftWarning, match="no longer tied"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="merging into weights")
        plain = peft_model.merge_and_unload()
    assert_equal(dequantize_module_weight(plain.model.embed_tokens), before)
    assert differs(dequantize_module_weight(plain.lm_head), before)
    assert plain.config.tie_word_embeddings is False


# ------------------------------------------------------------------------------------------- preparing for training
@pytest.mark.parametrize("name", ["bnb 4bit", "bnb 8bit"])
def test_prepare_brings_what_is_not_quantised_to_float32(name: str, quantized: Callable) -> None:
    model = quantized(name)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    before = types_of(model)
    assert prepare_model_for_kbit_training(model) is model
    assert types_of(model) == {
        key: torch.float32 if dtype == torch.bfloat16 else dtype for key, dtype in before.items()
    }
    assert trainable(model) == set()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.is_activation_checkpointing
    assert model.get_input_embeddings()(IDS).requires_grad


@pytest.mark.parametrize("name", ["torchao int8", "hqq", *STAND_INS])
def test_prepare_leaves_types_where_layers_take_one_only(name: str, quantized: Callable) -> None:
    model = quantized(name)
    model.model.norm.to(torch.bfloat16)
    before = types_of(model)
    prepare_model_for_kbit_training(model)
    assert types_of(model) == before and trainable(model) == set() and model.is_activation_checkpointing


def test_prepare_without_checkpointing(quantized: Callable) -> None:
    model = prepare_model_for_kbit_training(quantized("bnb 4bit"), use_gradient_checkpointing=False)
    assert not model.is_activation_checkpointing
    assert not model.get_input_embeddings()(IDS).requires_grad


def test_prepare_a_model_that_is_not_quantised() -> None:
    model = prepare_model_for_kbit_training(dense_model().to(torch.float16))
    assert set(types_of(model).values()) == {torch.float32} and trainable(model) == set()
    assert not model.is_activation_checkpointing
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_prepare_a_model_that_transformers_does_not_know() -> None:
    calls = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 4, dtype=torch.bfloat16)
            self.linear = STAND_INS["gptq"](nn.Linear(4, 4))

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def gradient_checkpointing_enable(self, *options: Any) -> None:
            calls.append(options)

    model = prepare_model_for_kbit_training(Model(), gradient_checkpointing_kwargs={"use_reentrant": True})
    assert calls == [({"use_reentrant": True},)]
    assert model.embedding(IDS[:1, :1] * 0).requires_grad
    assert peft.prepare_model_for_kbit_training is peft.utils.other.prepare_model_for_kbit_training


# ----------------------------------------------------------------------------------------------------------- other
@pytest.mark.parametrize("full_precision", [True, False])
def test_adapters_never_have_the_type_that_codes_are_stored_in(full_precision: bool, quantized: Callable) -> None:
    for name in ("bnb 4bit", "bnb 8bit", "hqq", "gptq"):
        model = get_peft_model(quantized(name), adapter(), autocast_adapter_dtype=full_precision)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, name


def test_merging_for_good_keeps_no_second_copy_of_weights(quantized: Callable) -> None:
    peft_model = adapted(quantized("bnb 4bit"), IA3Config(**OPTIONS["IA3"], target_modules=["q_proj"]))
    layers = layers_of(peft_model)
    with warned("rounds"):
        peft_model.merge_and_unload()
    assert [layer._merge_state.originals for layer in layers] == [[] for _ in layers]


# ------------------------------------------------------------------------------ the names of the released package
LAYERS_BY_BACKEND = {
    "bnb 4bit": ("bnb", "Linear4bit", "dispatch_bnb_4bit"),
    "bnb 8bit": ("bnb", "Linear8bitLt", "dispatch_bnb_8bit"),
    "torchao int8": ("torchao", "TorchaoLoraLinear", "dispatch_torchao"),
    "hqq": ("hqq", "HqqLoraLinear", "dispatch_hqq"),
    "gptq": ("gptq", "GPTQLoraLinear", "dispatch_gptq"),
    "awq": ("awq", "AwqLoraLinear", "dispatch_awq"),
    "aqlm": ("aqlm", "AqlmLoraLinear", "dispatch_aqlm"),
    "eetq": ("eetq", "EetqLoraLinear", "dispatch_eetq"),
    "inc": ("inc", "IncLoraLinear", "dispatch_inc"),
}


@pytest.mark.parametrize("name", LAYERS_BY_BACKEND)
def test_layers_have_the_class_of_their_backend(name: str, quantized: Callable[[str], nn.Module], monkeypatch) -> None:
    module, cls_name, dispatch_name = LAYERS_BY_BACKEND[name]
    module = importlib.import_module(f"peft.tuners.lora.{module}")
    layer_cls, dispatch = getattr(module, cls_name), getattr(module, dispatch_name)
    model = quantized(name)
    base = model.model.layers[0].self_attn.q_proj
    by_hand = dispatch(base, "default", adapter(), r=2, lora_alpha=2)
    assert type(by_hand) is layer_cls and by_hand.get_base_layer() is base
    assert dispatch(nn.Linear(2, 2), "default", adapter(), r=2, lora_alpha=2) is None
    peft_model = adapted(model, adapter())
    assert {type(layer) for layer in layers_of(peft_model)} == {layer_cls}
    monkeypatch.setattr(layer_cls, "forward", lambda self, x: torch.zeros(*x.shape[:-1], self.out_features))
    assert differs(logits(peft_model, IDS), logits(quantized(name), IDS))


@pytest.mark.parametrize(
    "method, name, path",
    [
        ("ADALORA", "bnb 4bit", "adalora.bnb.SVDLinear4bit"),
        ("ADALORA", "bnb 8bit", "adalora.bnb.SVDLinear8bitLt"),
        ("ADALORA", "gptq", "adalora.gptq.SVDQuantLinear"),
        ("IA3", "bnb 4bit", "ia3.bnb.Linear4bit"),
        ("IA3", "bnb 8bit", "ia3.bnb.Linear8bitLt"),
    ],
)
def test_layers_of_other_methods_too(method: str, name: str, path: str, quantized: Callable) -> None:
    module, _, cls_name = path.rpartition(".")
    layer_cls = getattr(importlib.import_module(f"peft.tuners.{module}"), cls_name)
    assert {type(layer) for layer in layers_of(adapted(quantized(name), adapter(method)))} == {layer_cls}


def test_torchao_is_told_how_to_quantise(quantized: Callable[[str], nn.Module]) -> None:
    base = quantized("torchao int8").model.layers[0].self_attn.q_proj
    layer = importlib.import_module("peft.tuners.lora.torchao").TorchaoLoraLinear(
        base, "a", adapter(), r=2, lora_alpha=2, get_apply_tensor_subclass=lambda: torchao_config(8)
    )
    layer.merge()
    assert layer.merged_adapters == ["a"]


def test_layers_of_transformer_engine_stay_unmerged() -> None:
    te = importlib.import_module("peft.tuners.lora.te")
    base = type("Linear", (nn.Linear,), {"__module__": "transformer_engine.pytorch.module.linear"})(4, 3)
    layer = te.dispatch_transformer_engine(base, "a", adapter(init_lora_weights=False), r=2, lora_alpha=2)
    assert type(layer) is te.TeLinear and differs(layer(torch.ones(1, 4)), base(torch.ones(1, 4)))
    with pytest.raises(NotImplementedError, match="layers of Transformer Engine"):
        layer.merge()
    assert te.dispatch_transformer_engine(nn.Linear(4, 3), "a", adapter(), r=2, lora_alpha=2) is None
