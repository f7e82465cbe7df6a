# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The first stage: what is recorded, warned about or refused before a model is changed."""

import warnings

import pytest
import torch
from support.helpers import refused
from support.tied_models import TIED_MODELS, Transposed, llama
from torch import nn

from peft import LoHaConfig, LoraConfig, PeftError, PeftWarning, get_peft_model
from peft.tuners.lora.model import LoraModel


SIDES = {
    "inputs": lambda tied: [tied.inputs],
    "outputs": lambda tied: [tied.outputs],
    "both": lambda tied: [tied.inputs, tied.outputs],
    "both reversed": lambda tied: [tied.outputs, tied.inputs],
}


def inject(model: nn.Module, **config) -> tuple[LoraModel, list[str]]:
    """Inject, and give the tuner and the texts of warnings that speak of ties."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuner = LoraModel(model, LoraConfig(r=2, **config), "default")
    return tuner, [str(w.message) for w in caught if issubclass(w.category, PeftWarning) and "weight" in str(w.message)
                   and ("tying" in str(w.message) or "tied" in str(w.message))]  # fmt: skip


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", TIED_MODELS)
def test_followers_are_recorded_whatever_is_named(name, side):
    tied = TIED_MODELS[name]
    tuner, texts = inject(
        tied.build(), target_modules=tied.targets, modules_to_save=SIDES[side](tied), ensure_weight_tying=True
    )
    owner, *followers = [member.rpartition(".")[0] for member in tied.members]
    assert tuner.peft_config["default"].modules_to_tie == dict.fromkeys(followers, owner)
    assert texts == []


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", TIED_MODELS)
def test_one_warning_names_the_members_and_both_ways_out(name, side):
    tied = TIED_MODELS[name]
    tuner, texts = inject(tied.build(), target_modules=tied.targets, modules_to_save=SIDES[side](tied))
    assert tuner.peft_config["default"].modules_to_tie == {}
    assert len(texts) == 1
    assert all(repr(member) in texts[0] for member in tied.members)
    assert "ensure_weight_tying=True" in texts[0]
    assert "stay frozen" in texts[0]


@pytest.mark.parametrize("name", TIED_MODELS)
def test_silence_where_no_tie_is_reached(name):
    tied = TIED_MODELS[name]
    assert inject(tied.build(), target_modules=tied.targets)[1] == []


@pytest.mark.parametrize("name", TIED_MODELS)
def test_asking_for_ties_that_are_not_reached_gets_one_warning(name):
    tied = TIED_MODELS[name]
    texts = inject(tied.build(), target_modules=tied.targets, ensure_weight_tying=True)[1]
    assert len(texts) == 1
    assert "has no effect" in texts[0]
    assert repr(tied.members[0]) in texts[0]


@pytest.mark.parametrize("saved", [None, *(["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])])
def test_untied_model(saved):
    assert inject(llama(tie=False), target_modules=["q_proj"], modules_to_save=saved)[1] == []
    texts = inject(llama(tie=False), target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=True)[1]
    assert len(texts) == 1
    assert "no two modules of the model share a parameter" in texts[0]
    assert "tie_word_embeddings=False" in texts[0]


def test_tied_targets_get_one_warning():
    texts = inject(llama(), target_modules=["embed_tokens", "lm_head"])[1]
    assert len(texts) == 1
    assert "'model.embed_tokens', 'lm_head'" in texts[0]


def test_a_module_that_holds_the_whole_tie_needs_nothing():
    tied = TIED_MODELS["bert"]
    model = nn.ModuleDict({"inner": tied.build(), "other": nn.Linear(4, 4)})
    tuner, texts = inject(model, target_modules=["other"], modules_to_save=["inner"], ensure_weight_tying=True)
    assert tuner.peft_config["default"].modules_to_tie == {}
    assert texts == []


class TiedToTheModelItself(Transposed):
    """The tied matrix is a parameter of the model, not of a module that could be replaced."""

    def __init__(self) -> None:
        super().__init__()
        del self.project
        self.output_weight = self.lookup.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.tanh(self.hidden(self.lookup(input_ids))), self.output_weight)


def test_refusal_names_the_members_and_leaves_the_model_untouched():
    model = TiedToTheModelItself()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    wants_grad = {name: parameter.requires_grad for name, parameter in parameters.items()}
    config = LoraConfig(target_modules=["hidden"], modules_to_save=["lookup"], ensure_weight_tying=True)
    with pytest.raises(PeftError, match="'output_weight' stands on a module that") as refusal:
        LoraModel(model, config, "default")
    assert isinstance(refusal.value, ValueError)
    assert dict(model.named_modules()) == modules
    after = dict(model.named_parameters(remove_duplicate=False))
    assert {name: id(p) for name, p in after.items()} == {name: id(p) for name, p in parameters.items()}
    assert {name: parameter.requires_grad for name, parameter in after.items()} == wants_grad
    assert not hasattr(model, "peft_config")


def test_callers_config_is_not_written_to():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    LoraModel(llama(), config, "default")
    assert config.modules_to_tie is None


@pytest.mark.parametrize("difference", ["dtype", "shape"])
def test_a_declared_tie_that_is_none_is_named_with_what_was_found(difference):
    """Members on other devices, of other types or shapes cannot share a parameter, whatever the model declares."""
    model = llama()
    if difference == "dtype":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(torch.bfloat16))
    else:
        model.lm_head = nn.Linear(16, 50, bias=False)
    tuner, texts = inject(model, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    assert len(texts) == 1
    found = {"dtype": ("float32", "bfloat16"), "shape": ("(48, 16)", "(50, 16)")}[difference]
    assert all(part in texts[0] for part in (*found, "lm_head.weight", "embed_tokens.weight", "tie_weights()"))


def test_a_regex_that_reaches_half_a_group_is_told_of_the_other_half():
    tuner, texts = inject(llama(), target_modules=r".*(q_proj|lm_head)")
    assert len(texts) == 1 and "embed_tokens.weight" in texts[0]
    tuner, texts = inject(llama(), target_modules=r".*(q_proj|lm_head)", ensure_weight_tying=True)
    assert texts == []
    assert tuner.peft_config["default"].target_modules_to_tie == {"lm_head": "model.embed_tokens"}


@pytest.mark.parametrize("name", [name for name, tied in TIED_MODELS.items() if "c_attn" not in tied.targets])
def test_parameters_that_come_apart_are_named(name):
    tied = TIED_MODELS[name]
    for member in tied.members:
        texts = inject(tied.build(), target_modules=tied.targets, target_parameters=[member])[1]
        assert len(texts) == 1 and f"with others: {member!r} (tied: " in texts[0]


@pytest.mark.parametrize(
    ("config", "left_out", "reached"),
    [
        (LoraConfig(target_modules=["embed_tokens"], exclude_modules=["lm_head"]), "lm_head", "embed_tokens"),
        (LoHaConfig(target_modules=["lm_head"], exclude_modules=r".*embed_tokens"), "embed_tokens", "lm_head"),
    ],
    ids=["lora", "loha"],
)
def test_a_member_that_is_left_out_by_name_is_not_brought_in_by_its_tie(config, left_out, reached):
    model = llama()
    config.ensure_weight_tying = True
    with refused(model, ValueError, "exclude_modules leaves out", left_out, reached, "Leave one of the two"):
        get_peft_model(model, config)


def test_what_is_left_out_of_targets_can_follow_a_module_that_is_trained_in_full():
    tuner, texts = inject(
        llama(),
        target_modules=r".*(q_proj|lm_head)",
        exclude_modules=["lm_head"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    assert texts == [] and tuner.peft_config["default"].modules_to_tie == {"lm_head": "model.embed_tokens"}


def test_a_refusal_says_that_a_tie_has_brought_the_module_in():
    model, config = llama(), {"target_modules": ["q_proj", "lm_head"], "alora_invocation_tokens": [1, 2]}
    reason = "'model.embed_tokens' is not named in target_modules: it shares its weight with 'lm_head'"
    with refused(model, ValueError, "does not exist for Embedding", reason):
        get_peft_model(model, LoraConfig(**config, task_type="CAUSAL_LM", ensure_weight_tying=True))
    with pytest.raises(PeftError) as refusal:
        get_peft_model(model, LoraConfig(target_modules=["embed_tokens"], alora_invocation_tokens=[1, 2]))
    assert "tie" not in str(refusal.value)


@pytest.mark.filterwarnings("ignore:the config reaches modules that share")
@pytest.mark.parametrize(
    "route", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": {"embed_tokens": [3]}}], ids=str
)
def test_a_follower_that_another_adapter_has_adapted_is_refused(route):
    model = get_peft_model(llama(), LoraConfig(target_modules=["lm_head"]))
    with refused(model, TypeError, "reaches 'lm_head'", "shares its weight with 'model.embed_tokens'", "already"):
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"], **route, ensure_weight_tying=True))
