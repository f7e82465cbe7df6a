# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Adapters that find their base model by themselves, from folders on disk."""

import json
from pathlib import Path

import pytest
import torch
from support.helpers import VOCABULARY, WIDTH, assert_equal, bert_classifier, llama, logits, refused, token_ids
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForSequenceClassification,
    get_peft_model,
)
from peft.auto import check_import_allowlist, get_default_import_allowlist


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Save a base model."""
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved_adapter(base: Path, task: str | None = "CAUSAL_LM", vocabulary: int | None = None) -> tuple[Path, PeftModel]:
    """Save an adapter with an effect beside its base model."""
    model = LlamaForCausalLM.from_pretrained(base)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary)
    config = LoraConfig(r=2, task_type=task, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(base.parent / "adapter", save_embedding_layers=vocabulary is not None)
    return base.parent / "adapter", adapted


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_base_and_adapter_are_loaded(base: Path) -> None:
    folder, adapted = saved_adapter(base)
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert type(model) is PeftModelForCausalLM
    assert type(model.get_base_model()) is LlamaForCausalLM
    assert not model.training
    assert_equal(logits(model, token_ids()), logits(adapted, token_ids()))


def test_options_reach_base_and_adapter(base: Path) -> None:
    folder, _ = saved_adapter(base)
    model = AutoPeftModelForCausalLM.from_pretrained(
        folder, "mine", True, dtype=torch.bfloat16, autocast_adapter_dtype=False, low_cpu_mem_usage=True
    )
    assert model.training and model.active_adapters == ["mine"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.get_nb_trainable_parameters()[0] > 0


def test_config_can_be_given(base: Path) -> None:
    folder, _ = saved_adapter(base)
    config = PeftConfig.from_pretrained(str(folder))
    config.lora_alpha = 80
    model = AutoPeftModelForCausalLM.from_pretrained(folder, config=config)
    assert model.peft_config["default"].lora_alpha == 80


def test_heads_of_a_task_are_loaded(tmp_path: Path) -> None:
    classifier = bert_classifier()
    classifier.save_pretrained(tmp_path / "base")
    classifier.name_or_path = str(tmp_path / "base")
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"])
    model = get_peft_model(classifier, config).eval()
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=classifier.config.num_labels
    )
    assert type(again) is PeftModelForSequenceClassification
    assert_equal(logits(again, token_ids()), logits(model, token_ids()))


def test_adapter_without_a_task(base: Path) -> None:
    folder, adapted = saved_adapter(base, task=None)
    model = AutoPeftModel.from_pretrained(folder)
    assert (type(model), type(model.get_base_model())) == (PeftModel, LlamaForCausalLM)
    assert_equal(logits(model, token_ids()), logits(adapted, token_ids()))
    assert type(AutoPeftModelForCausalLM.from_pretrained(folder)) is PeftModelForCausalLM
    # the tensors fit the class that the adapter was trained on, whatever the model is wanted for
    features = AutoPeftModelForFeatureExtraction.from_pretrained(folder)
    assert (type(features), type(features.get_base_model())) == (PeftModelForFeatureExtraction, LlamaForCausalLM)


def test_subfolder_is_that_of_the_adapter(base: Path) -> None:
    folder, adapted = saved_adapter(base)
    model = AutoPeftModelForCausalLM.from_pretrained(folder.parent, subfolder="adapter")
    assert_equal(logits(model, token_ids()), logits(adapted, token_ids()))


def save_tokenizer(folder: Path, tokens: int) -> None:
    words = {f"word{number}": number for number in range(tokens)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0"))).save_pretrained(folder)


def test_vocabulary_grows_to_a_tokenizer_that_was_saved_with_the_adapter(base: Path) -> None:
    folder, adapted = saved_adapter(base, vocabulary=VOCABULARY + 3)
    save_tokenizer(folder, VOCABULARY + 3)
    model = AutoPeftModelForCausalLM.from_pretrained(folder, strict=True)
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 3
    report = model.load_reports["default"]
    assert report.complete and report.resized == dict.fromkeys(
        ["model.embed_tokens.weight", "lm_head.weight"], ((VOCABULARY, WIDTH), (VOCABULARY + 3, WIDTH))
    )
    ids = torch.tensor([[1, VOCABULARY + 2]])
    assert_equal(logits(model, ids), logits(adapted, ids))


def test_vocabulary_with_room_to_spare_stays(base: Path) -> None:
    folder, _ = saved_adapter(base)
    save_tokenizer(folder, VOCABULARY - 3)
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY


GROWN = 40  # as a base model that was grown to a multiple of 8
ROWS = {
    "base": {"target_modules": ["q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "targets": {"target_modules": ["embed_tokens", "lm_head"]},
    "head": {"target_modules": ["lm_head"]},
}


@pytest.mark.parametrize("tokens", [None, VOCABULARY - 3, VOCABULARY + 3])
@pytest.mark.parametrize("rows", [GROWN, VOCABULARY - 2])
@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_rows_in_the_checkpoint_decide(base: Path, options: dict, rows: int, tokens: int | None) -> None:
    """The tokenizer has fewer tokens than a vocabulary that was grown to a multiple has rows."""
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows)
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **options)).eval()
    folder = base.parent / "adapter"
    adapted.save_pretrained(folder, save_embedding_layers=True)
    if tokens is not None:
        save_tokenizer(folder, tokens)
    again = AutoPeftModelForCausalLM.from_pretrained(folder, strict=True)
    assert logits(again, token_ids()).shape[-1] == rows
    assert_equal(logits(again, token_ids()), logits(adapted, token_ids()))
    assert again.load_reports["default"].resized == dict.fromkeys(
        ["model.embed_tokens.weight", "lm_head.weight"], ((VOCABULARY, WIDTH), (rows, WIDTH))
    )


def test_other_shapes_that_do_not_fit_are_refused(base: Path) -> None:
    folder, _ = saved_adapter(base, vocabulary=GROWN)
    edit_config(folder, r=3)
    with refused(None, RuntimeError, "another shape"):
        AutoPeftModelForCausalLM.from_pretrained(folder)


def test_another_task_is_refused(base: Path) -> None:
    folder, _ = saved_adapter(base)
    for cls in (AutoPeftModelForSeq2SeqLM, AutoPeftModel):
        with refused(None, ValueError, "CAUSAL_LM", "AutoPeftModelForCausalLM"):
            cls.from_pretrained(folder)


def test_nothing_is_imported_that_is_not_allowed(base: Path) -> None:
    folder, _ = saved_adapter(base, task=None)
    edit_config(folder, auto_mapping={"parent_library": "antigravity", "base_model_class": "Popen"})
    for cls in (AutoPeftModel, AutoPeftModelForCausalLM):
        with refused(None, ValueError, "'antigravity'", "import_allowlist"):
            cls.from_pretrained(folder)
    edit_config(folder, auto_mapping={"parent_library": "subprocess", "base_model_class": "Popen"})
    with refused(None, ValueError, "subprocess.Popen", "no class of models"):
        AutoPeftModel.from_pretrained(folder, import_allowlist=["subprocess"])


def test_allowlist_replaces_the_default(base: Path) -> None:
    folder, _ = saved_adapter(base, task=None)
    with refused(None, ValueError, "transformers"):
        AutoPeftModel.from_pretrained(folder, import_allowlist=["torch"])
    assert "transformers" in get_default_import_allowlist()
    assert check_import_allowlist(["a.b"], "a.b.c") and not check_import_allowlist(["a.b"], "a.bc")


def test_adapters_that_do_not_say_their_base(base: Path, tmp_path: Path) -> None:
    folder, _ = saved_adapter(base, task=None)
    edit_config(folder, auto_mapping=None)
    for cls in (AutoPeftModel, AutoPeftModelForCausalLM):
        with refused(None, ValueError, "auto_mapping", "PeftModel.from_pretrained"):
            cls.from_pretrained(folder)
    edit_config(folder, base_model_name_or_path=None)
    with refused(None, ValueError, "base_model_name_or_path"):
        AutoPeftModelForCausalLM.from_pretrained(folder)
    with refused(None, ValueError):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "nothing")


def test_classes_only_load() -> None:
    with refused(None, OSError, "AutoPeftModelForCausalLM.from_pretrained"):
        AutoPeftModelForCausalLM()
