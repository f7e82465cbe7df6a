# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""mergekit merges models with adapters on them, and extracts an adapter from a merged model."""

import pytest
import torch
from support.client_runs import ROUTES, adapted, assert_imports_recorded, assert_merged, outputs, trained, write_base
from support.helpers import assert_close, differs
from transformers import AutoModelForCausalLM


CLIENT = "mergekit"
pytestmark = pytest.mark.own_environment


def run(config: dict, folder) -> None:
    """Merge, as `mergekit-yaml` does."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(lora_merge_cache=str(folder.parent / "cache"), copy_tokenizer=True)
    run_merge(MergeConfiguration.model_validate(config), str(folder), options)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_model_with_an_adapter_is_merged(route, tied, tokenizer, tmp_path):
    base = write_base(tmp_path / "base", tied, tokenizer)
    model = trained(base, tmp_path / "adapter", route, tied)
    config = {
        "merge_method": "passthrough",
        "models": [{"model": f"{base}+{tmp_path / 'adapter'}"}],
        "dtype": "float32",
    }
    run(config, tmp_path / "merged")
    assert_merged(tmp_path / "merged", model, tied)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("route", ["plain", "targeted", "saved_embedding"])
def test_half_of_two_adapters_is_the_mean_of_what_they_merge_to(route, tied, tokenizer, tmp_path):
    base = write_base(tmp_path / "base", tied, tokenizer)
    for name in ("one", "two"):
        torch.manual_seed(len(name) + ord(name[0]))
        trained(base, tmp_path / name, route, tied)
    parts = [{"model": f"{base}+{tmp_path / name}", "parameters": {"weight": 0.5}} for name in ("one", "two")]
    run({"merge_method": "linear", "models": parts, "dtype": "float32"}, tmp_path / "merged")

    one, two = (adapted(base, tmp_path / name).merge_and_unload().state_dict() for name in ("one", "two"))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (read.lm_head.weight is read.model.embed_tokens.weight) == tied
    for key, tensor in read.state_dict().items():
        assert_close(tensor, (one[key] + two[key]) / 2)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_extracted_adapter_is_read(tied, tokenizer, tmp_path):
    from click.testing import CliRunner
    from mergekit.scripts.extract_lora import main

    base = write_base(tmp_path / "base", tied, tokenizer)
    merged = trained(base, tmp_path / "adapter", "plain", tied).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    options = ["--base-model", base, "--model", str(tmp_path / "merged"), "--out-path", str(tmp_path / "out"),
               "--max-rank", "4", "--exclude-regex", "embed_tokens|lm_head"]  # fmt: skip
    result = CliRunner().invoke(main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    read = adapted(base, tmp_path / "out")
    assert differs(outputs(read), outputs(base))
    assert_close(outputs(read), outputs(merged), atol=1e-2)  # it writes bfloat16


def test_imports_are_those_that_make_test_checks():
    assert_imports_recorded("mergekit")
