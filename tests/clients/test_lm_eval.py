# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""lm-eval scores a model with an adapter on it as it scores the merged model."""

import copy

import pytest
import torch
from support.client_runs import ROUTES, assert_imports_recorded, outputs, trained, write_base
from support.helpers import assert_close
from support.tied_models import VOCABULARY
from transformers import AutoModelForCausalLM


CLIENT = "lm-eval"
pytestmark = pytest.mark.own_environment

PAIRS = [("a tied weight", "is one tensor"), ("the head", "reads the embedding of the model")]


def scores(model: str, **options) -> torch.Tensor:
    """Log-likelihoods of the second half of each pair, as the tasks of lm-eval ask for them."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    reader = HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=2, max_length=16, **options)
    requests = [Instance("loglikelihood", {}, (first, " " + second), i) for i, (first, second) in enumerate(PAIRS)]
    return torch.tensor([score for score, _ in reader.loglikelihood(requests)])


@pytest.fixture(scope="module")
def tokenizer(tokenizer):
    """lm-eval shrinks the base model to the tokenizer before it loads an adapter, so the two are of one size."""
    full = copy.deepcopy(tokenizer)
    full.add_tokens([f"filler{i}" for i in range(VOCABULARY - len(full))])
    return full


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("route", ROUTES)
def test_an_adapter_is_scored_like_the_merged_model(route, tied, tokenizer, tmp_path):
    base = write_base(tmp_path / "base", tied, tokenizer)
    model = trained(base, tmp_path / "adapter", route, tied)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")

    found = scores(base, peft=str(tmp_path / "adapter"))
    assert (found - scores(base)).abs().max() > 1e-3
    assert_close(found, scores(str(tmp_path / "merged")), atol=1e-4)
    assert_close(outputs(merged), outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")))


def test_a_task_is_run_with_an_adapter(tokenizer, tmp_path):
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    class Tiny(ConfigurableTask):
        VERSION = 0

        def __init__(self):
            super().__init__(config={
                "task": "tiny",
                "output_type": "multiple_choice",
                "test_split": "test",
                "doc_to_text": "{{question}}",
                "doc_to_choice": ["is one tensor", "reads the embedding"],
                "doc_to_target": 0,
                "metric_list": [{"metric": "acc"}],
            })  # fmt: skip

        def download(self, dataset_kwargs=None, **kwargs):
            self.dataset = {"test": Dataset.from_dict({"question": ["a tied weight", "the head"]})}

    base = write_base(tmp_path / "base", True, tokenizer)
    trained(base, tmp_path / "adapter", "saved_embedding", True)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": base, "peft": str(tmp_path / "adapter"), "dtype": "float32", "max_length": 16},
        tasks=[Tiny()],
        device="cpu",
        bootstrap_iters=0,
    )
    assert 0 <= results["results"]["tiny"]["acc,none"] <= 1


def test_imports_are_those_that_make_test_checks():
    assert_imports_recorded("lm_eval")
