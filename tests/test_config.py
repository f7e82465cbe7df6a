# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Configs: construction, checks, and the way to `adapter_config.json` and back."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from support.helpers import refused, warned
from support.method_options import REQUIRED

from peft import LoraConfig, PeftConfig, PeftType, PromptLearningConfig, TaskType, get_peft_config
from peft.configs.commits import installed_commit
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import (
    ArrowConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraRuntimeConfig,
    VeloraConfig,
)


pytestmark = pytest.mark.filterwarnings("error::peft.utils.warning.PeftWarning")


def saved_json(config: PeftConfig, folder: Path) -> dict[str, Any]:
    """Save a config and read the file as JSON."""
    config.save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def write_json(folder: Path, content: Any) -> str:
    """Write a config file by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


# ------------------------------------------------------------------------------------------ construction
def test_defaults() -> None:
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 8, 0.0, "none")
    assert config.peft_type == PeftType.LORA == "LORA"
    assert config.target_modules is None and config.inference_mode is False
    assert config.rank_pattern == {} and config.rank_pattern is not LoraConfig().rank_pattern


@pytest.mark.parametrize("given", [["b", "a"], ("b", "a"), {"a", "b"}])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_lists_of_names_become_sets(field: str, given: Any) -> None:
    assert getattr(LoraConfig(**{field: given}), field) == {"a", "b"}


@pytest.mark.parametrize(
    ("kwargs", "mention"),
    [
        ({"task_type": "POETRY"}, "CAUSAL_LM"),
        ({"target_modules": "q_proj|("}, "target_modules"),
        ({"exclude_modules": "*"}, "exclude_modules"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_pattern": "layers"}, "layers_pattern"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "layers_to_transform"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias"),
        ({"lora_bias": True, "use_dora": True}, "use_dora"),
        ({"init_lora_weights": "loftq"}, "loftq_config"),
        ({"use_dora": True, "megatron_config": {"a": 1}}, "megatron_core"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_values_that_contradict_each_other(kwargs: dict[str, Any], mention: str) -> None:
    with pytest.raises(ValueError, match=mention):
        LoraConfig(**kwargs)


@pytest.mark.parametrize("field", ["eva_config", "corda_config", "lora_ga_config", "arrow_config", "kasa_config"])
def test_nested_config_of_a_wrong_type(field: str) -> None:
    with pytest.raises(TypeError, match=field):
        LoraConfig(**{field: 3})


def test_nested_config_from_a_dictionary() -> None:
    config = LoraConfig(init_lora_weights="eva", eva_config={"rho": 1.5})
    assert config.eva_config == EvaConfig(rho=1.5)
    with pytest.raises(ValueError, match="rho"):
        LoraConfig(init_lora_weights="eva", eva_config={"rho": 0.5})


@pytest.mark.parametrize("settings", [LoftQConfig(), {"loftq_bits": 8}])
def test_settings_of_loftq_without_it_are_left_out(settings: LoftQConfig | dict[str, Any]) -> None:
    with warned("loftq_config", "init_lora_weights"):
        config = LoraConfig(loftq_config=settings)
    assert config.loftq_config == {}


@pytest.mark.parametrize(("init", "config_cls"), [("eva", EvaConfig), ("corda", CordaConfig)])
def test_initialisation_without_its_config_has_the_defaults(init: str, config_cls: type) -> None:
    with warned(f"init_lora_weights='{init}' without {init}_config"):
        config = LoraConfig(init_lora_weights=init)
    assert getattr(config, f"{init}_config") == config_cls()


@pytest.mark.parametrize(("init", "config_cls"), [("eva", EvaConfig), ("corda", CordaConfig)])
def test_config_of_an_initialisation_that_is_not_used(init: str, config_cls: type) -> None:
    with warned(f"{init}_config has no effect", "init_lora_weights"):
        config = LoraConfig(**{f"{init}_config": config_cls()})
    assert getattr(config, f"{init}_config") == config_cls()


@pytest.mark.parametrize(
    ("config_cls", "options"),
    [(VeloraConfig, {"init_type": "mean"}), (KasaConfig, {"beta": -1.0}), (KasaConfig, {"gamma": -1.0})],
)
def test_settings_of_a_variant_that_make_no_sense(config_cls: type, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(options)):
        config_cls(**options)


def test_names_of_experts_are_found_out_and_not_given() -> None:
    with pytest.raises(TypeError, match="task_adapter_names"):
        ArrowConfig(task_adapter_names=["a"])


def test_check_kwargs() -> None:
    assert LoraConfig.check_kwargs(r=3) == {"r": 3}
    with refused(None, TypeError, "LoraConfig", "rank"):
        LoraConfig.check_kwargs(rank=3)


def test_prompt_learning_is_told_apart() -> None:
    assert PromptLearningConfig().is_prompt_learning
    assert not LoraConfig().is_prompt_learning and not LoraConfig().is_adaption_prompt


# ------------------------------------------------------------------------------------------ dictionaries and files
def test_to_dict_leaves_out_what_holds_for_one_run() -> None:
    fields = LoraConfig(r=3, runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True)).to_dict()
    assert fields["r"] == 3 and fields["peft_type"] == "LORA"
    assert "runtime_config" not in fields


def test_file_is_the_same_on_each_run(tmp_path: Path) -> None:
    names = ["v_proj", "q_proj", "k_proj", "o_proj"]
    texts = []
    for i, order in enumerate((names, names[::-1])):
        LoraConfig(target_modules=order, task_type=TaskType.CAUSAL_LM).save_pretrained(tmp_path / str(i))
        texts.append((tmp_path / str(i) / "adapter_config.json").read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    content = json.loads(texts[0])
    assert content["target_modules"] == sorted(names)
    assert (content["task_type"], content["peft_type"]) == ("CAUSAL_LM", "LORA")
    assert list(content) == sorted(content)


def test_file_names_the_interface_version_and_no_runtime_fields(tmp_path: Path) -> None:
    content = saved_json(LoraConfig(runtime_config=LoraRuntimeConfig(True)), tmp_path / "deep" / "folder")
    assert content["peft_version"] == "0.21.2"
    assert "runtime_config" not in content
    assert set(content) == set(LoraConfig().to_dict())


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"r": 3, "target_modules": ["a", "b"], "exclude_modules": ["a.b"], "modules_to_save": ["c"]},
        {"target_modules": r".*\.q_proj", "rank_pattern": {"^a$": 2}, "alpha_pattern": {"b": 4}, "use_rslora": True},
        {"target_modules": ["a"], "layers_to_transform": [0, 2], "layers_pattern": "blocks", "bias": "lora_only"},
        {"task_type": "SEQ_CLS", "inference_mode": True, "revision": "main", "base_model_name_or_path": "x/y"},
        {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=3.0)},
        {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=2)},
    ],
)
@pytest.mark.parametrize("read_by", [PeftConfig, LoraConfig])
def test_round_trip_through_a_file(tmp_path: Path, kwargs: dict[str, Any], read_by: type) -> None:
    config = LoraConfig(**kwargs)
    config.save_pretrained(tmp_path)
    loaded = read_by.from_pretrained(tmp_path)
    assert type(loaded) is LoraConfig
    assert loaded.to_dict() == {**config.to_dict(), "peft_version": "0.21.2"}


def test_saving_does_not_change_the_config(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["a"])
    before = copy.deepcopy(config)
    config.save_pretrained(tmp_path, auto_mapping_dict={"parent_library": "here"})
    assert config == before
    assert PeftConfig.from_pretrained(str(tmp_path)).auto_mapping == {"parent_library": "here"}


def test_subfolder_and_replaced_fields(tmp_path: Path) -> None:
    LoraConfig(r=3).save_pretrained(tmp_path / "inner")
    config = PeftConfig.from_pretrained(tmp_path, subfolder="inner", inference_mode=True)
    assert (config.r, config.inference_mode) == (3, True)


@pytest.mark.parametrize("field", ["a_field_of_next_year", "runtime_config"])
def test_fields_that_the_class_does_not_read(tmp_path: Path, field: str) -> None:
    path = write_json(tmp_path, {"peft_type": "LORA", "r": 3, field: {"x": 1}})
    with warned(field, "LoraConfig", "ignored"):
        config = PeftConfig.from_pretrained(path)
    assert config == LoraConfig(r=3)


def test_get_peft_config() -> None:
    config = get_peft_config({"peft_type": "LORA", "r": 3, "target_modules": ["a"]})
    assert config == LoraConfig(r=3, target_modules=["a"])
    with refused(None, KeyError, "peft_type", "found r"):
        get_peft_config({"r": 3})
    with refused(None, KeyError, "WARP", "LORA"):
        get_peft_config({"peft_type": "WARP"})


def test_hub_id_reaches_the_hub_with_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    LoraConfig(r=5).save_pretrained(tmp_path)
    calls = []

    def download(repo: str, filename: str, **kwargs: Any) -> str:
        calls.append((repo, filename, kwargs))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    config = PeftConfig.from_pretrained("somebody/adapter", subfolder="sub", revision="v2", token="secret")
    assert config.r == 5 and config.revision is None
    assert calls == [
        ("somebody/adapter", "adapter_config.json", {"subfolder": "sub", "revision": "v2", "token": "secret"})
    ]


# ------------------------------------------------------------------------------------------ versions
def test_a_config_knows_its_version(tmp_path: Path) -> None:
    """So a config equals what is read back from its file, and a file of another version stays one of that."""
    for method, config_cls in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        assert config_cls(**REQUIRED.get(method, {})).peft_version == "0.21.2"
    config = LoraConfig(r=4)
    config.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path) == config
    assert PeftConfig.from_json_file(str(tmp_path / "adapter_config.json")) == config.to_dict()
    LoraConfig(peft_version="0.5").save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert again.peft_version == saved_json(again, tmp_path)["peft_version"] == "0.5"
    assert PeftConfig.from_pretrained(write_json(tmp_path, {"peft_type": "LORA"})).peft_version == "0.21.2"


def test_a_development_version_names_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.config.__version__", "0.30.0.dev1")
    for commit, expected in (("abc", "0.30.0.dev1@abc"), (None, "0.30.0.dev1@UNKNOWN")):
        monkeypatch.setattr("peft.config._get_commit_hash", {"peft": commit}.__getitem__)
        assert LoraConfig().peft_version == expected
    monkeypatch.setattr("peft.config._get_commit_hash", {}.__getitem__)
    with pytest.warns(UserWarning, match="commit of this development version"):
        assert LoraConfig().peft_version == "0.30.0.dev1@UNKNOWN"


def test_commit_of_an_installed_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "somewhere-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: somewhere\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_commit("somewhere") is None
    (folder / "direct_url.json").write_text('{"url": "https://host", "vcs_info": {"vcs": "git", "commit_id": "abc"}}')
    assert installed_commit("somewhere") == "abc"


@pytest.mark.parametrize("config_cls", [PeftConfig, LoraConfig, PromptLearningConfig])
def test_a_file_without_a_method_is_of_the_wrong_type(tmp_path: Path, config_cls: type) -> None:
    """Callers of the released package catch a TypeError, those of this one a KeyError."""
    for error in (TypeError, KeyError):
        with refused(None, error, "lacks peft_type", "found a"):
            config_cls.from_pretrained(write_json(tmp_path, {"a": 1}))
