# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The config's part in weight tying: a saved field that asks for it, and a run-time record that is never saved."""

import json

import pytest

from peft import LoraConfig, PeftConfig


def test_tying_is_off_unless_asked_for():
    assert LoraConfig().ensure_weight_tying is False


@pytest.mark.parametrize("value", [True, False])
def test_field_survives_saving(tmp_path, value):
    LoraConfig(ensure_weight_tying=value).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).ensure_weight_tying is value


def test_files_without_the_field_mean_off(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    del content["ensure_weight_tying"]
    path.write_text(json.dumps(content))
    assert PeftConfig.from_pretrained(tmp_path).ensure_weight_tying is False


@pytest.mark.parametrize("value", [None, 1, "true"])
def test_only_booleans_are_taken(value):
    with pytest.raises(TypeError, match="ensure_weight_tying must be True or False"):
        LoraConfig(ensure_weight_tying=value)


def test_record_of_a_run_is_never_saved(tmp_path):
    config = LoraConfig(ensure_weight_tying=True)
    assert config.modules_to_tie is None
    config.modules_to_tie = {"lm_head": "model.embed_tokens"}
    config.save_pretrained(tmp_path)
    assert "modules_to_tie" not in config.to_dict()
    assert "modules_to_tie" not in (tmp_path / "adapter_config.json").read_text()
    assert PeftConfig.from_pretrained(tmp_path).modules_to_tie is None
