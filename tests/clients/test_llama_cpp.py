# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""llama.cpp's converter reads adapters that consist of factors, and writes the same numbers; it refuses others."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.client_runs import trained, write_base
from support.helpers import assert_close


CLIENT = "gguf"
pytestmark = pytest.mark.own_environment

# `make test-clients` unpacks the scripts, which no package installs, beside the environment.
SCRIPTS = Path(sys.prefix) / "llama.cpp"


def convert(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / script), "--outtype", "f32", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def tensors(file: Path) -> dict[str, torch.Tensor]:
    from gguf import GGUFReader

    return {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(file).tensors}


@pytest.fixture(autouse=True)
def scripts():
    if not SCRIPTS.is_dir():
        pytest.skip(f"{SCRIPTS} is not there: run `make test-clients`")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_factors_are_converted(tied, tokenizer, tmp_path):
    base = write_base(tmp_path / "base", tied, tokenizer)
    model = trained(base, tmp_path / "adapter", "plain", tied, target_modules=["v_proj", "down_proj"])
    result = convert("convert_lora_to_gguf.py", str(tmp_path / "adapter"), "--base", base,
                     "--outfile", str(tmp_path / "adapter.gguf"))  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = tensors(tmp_path / "adapter.gguf")
    assert len(found) == 8
    for part, name in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj")):
        layer = model.get_submodule(f"base_model.model.model.layers.1.{name}")
        assert_close(found[f"blk.1.{part}.weight.lora_a"], layer.lora_A["default"].weight.detach())
        assert_close(found[f"blk.1.{part}.weight.lora_b"], layer.lora_B["default"].weight.detach())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("route", ["saved_embedding", "tokens"])
def test_what_has_no_factors_is_refused_by_the_converter(route, tied, tokenizer, tmp_path):
    base = write_base(tmp_path / "base", tied, tokenizer)
    trained(base, tmp_path / "adapter", route, tied)
    result = convert("convert_lora_to_gguf.py", str(tmp_path / "adapter"), "--base", base,
                     "--outfile", str(tmp_path / "adapter.gguf"))  # fmt: skip
    assert result.returncode != 0
    assert "Not a lora_A or lora_B tensor" in result.stderr
