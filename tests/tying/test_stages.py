# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What is saved, loaded, merged and unloaded is tied as well, and nothing that was trained is lost."""

import io
import json
import warnings

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tied_models import TIED_MODELS, TiedModel, llama
from test_record import SIDES
from test_tie import adapted, config_for, each_model, is_tied, train, trained
from torch import nn

from peft import LoraConfig, PeftModel, PeftWarning, get_peft_model
from peft.tying.groups import find_tied_groups


WEIGHTS = "adapter_model.safetensors"


def outputs(model: nn.Module, tied: TiedModel) -> torch.Tensor:
    """Run a model in eval mode."""
    with torch.no_grad():
        return tied.forward(model.eval())


def trained_model(tied: TiedModel, side: str = "inputs") -> PeftModel:
    """Make a model whose tied adapter has been trained for a few steps."""
    model = adapted(tied, side)
    train(model, tied)
    return model


def reload(tied: TiedModel, folder, **options) -> PeftModel:
    """Load an adapter on a fresh base; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        return PeftModel.from_pretrained(tied.build(), folder, **options)


def bare_members(model: nn.Module, tied: TiedModel) -> set[int]:
    """Give the ids of the parameters that stand at the members of a model without adapters."""
    return {id(dict(model.named_parameters(remove_duplicate=False))[member]) for member in tied.members}


@pytest.mark.parametrize("side", SIDES)
@each_model
def test_reloaded_adapter_is_tied_and_equal(tied, side, tmp_path):
    model = trained_model(tied, side)
    model.save_pretrained(tmp_path)
    again = reload(tied, tmp_path)
    assert is_tied(again, tied)
    assert torch.equal(outputs(again, tied), outputs(model, tied))


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
@pytest.mark.parametrize("deduplicate", [True, False])
@each_model
def test_every_way_of_writing_and_reading(tied, deduplicate, options, tmp_path):
    model = trained_model(tied)
    model.save_pretrained(tmp_path, deduplicate_tied=deduplicate)
    again = reload(tied, tmp_path, **options)
    assert is_tied(again, tied)
    assert not any(p.is_meta for p in again.parameters())
    assert torch.equal(outputs(again, tied), outputs(model, tied))
    assert trained(again, tied)[0].requires_grad == options.get("is_trainable", False)


@each_model
def test_file_holds_every_name_unless_asked_otherwise(tied, tmp_path):
    model = trained_model(tied)
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "once", deduplicate_tied=True)
    keys = {f"base_model.model.{member}" for member in tied.members}
    everything, once = load_file(tmp_path / "all" / WEIGHTS), load_file(tmp_path / "once" / WEIGHTS)
    assert keys <= set(everything)
    assert keys & set(once) == {f"base_model.model.{tied.members[0]}"}
    with safe_open(tmp_path / "once" / WEIGHTS, "pt") as file:
        table = json.loads(file.metadata()["tied_aliases"])
    assert set(table) == set(everything) - set(once)
    with safe_open(tmp_path / "all" / WEIGHTS, "pt") as file:
        assert "tied_aliases" not in file.metadata()


@pytest.mark.parametrize("kept", [0, -1], ids=["owner", "follower"])
@each_model
def test_one_name_in_the_file_is_enough(tied, kept, tmp_path):
    """Files of other writers may lack names; whichever is there fills the parameter."""
    model = trained_model(tied)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    keys = [f"base_model.model.{member}" for member in tied.members]
    save_file({key: t for key, t in tensors.items() if key not in keys or key == keys[kept]}, tmp_path / WEIGHTS)
    assert torch.equal(outputs(reload(tied, tmp_path), tied), outputs(model, tied))


@each_model
def test_where_names_disagree_the_owner_wins_with_one_warning(tied, tmp_path):
    model = trained_model(tied)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[f"base_model.model.{tied.members[-1]}"] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.warns(PeftWarning, match="the owner's values are used") as caught:
        again = PeftModel.from_pretrained(tied.build(), tmp_path)
    assert len([w for w in caught if issubclass(w.category, PeftWarning)]) == 1
    assert is_tied(again, tied)
    assert torch.equal(outputs(again, tied), outputs(model, tied))


def test_second_adapter_of_the_same_file_computes_the_same(tmp_path):
    tied = TIED_MODELS["gpt2"]
    model = trained_model(tied)
    model.save_pretrained(tmp_path)
    again = reload(tied, tmp_path)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert is_tied(again, tied, "second")
    assert torch.equal(outputs(again, tied), outputs(model, tied))
    with again.disable_adapter():
        assert torch.equal(outputs(again, tied), outputs(tied.build(), tied))


@pytest.mark.parametrize("side", SIDES)
@each_model
def test_merged_model_has_one_storage_and_computes_the_same(tied, side):
    model = trained_model(tied, side)
    expected = outputs(model, tied)
    before = {group.members for group in find_tied_groups(tied.build())}
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        merged = model.merge_and_unload()
    assert len(bare_members(merged, tied)) == 1
    assert {group.members for group in find_tied_groups(merged)} == before
    torch.testing.assert_close(outputs(merged, tied), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("name", [n for n, tied in TIED_MODELS.items() if hasattr(transformers, "AutoModel")])
def test_merged_model_survives_plain_saving(name, side, tmp_path):
    tied = TIED_MODELS[name]
    merged = trained_model(tied, side).merge_and_unload()
    expected = outputs(merged, tied)
    if isinstance(merged, transformers.PreTrainedModel):
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path, attn_implementation="eager")
        assert len(bare_members(again, tied)) == 1
    else:
        buffer = io.BytesIO()
        torch.save(merged.state_dict(), buffer)
        buffer.seek(0)
        again = tied.build()
        again.load_state_dict(torch.load(buffer))
    assert torch.equal(outputs(again, tied), expected)


@each_model
def test_merged_model_survives_torch_save(tied, tmp_path):
    merged = trained_model(tied).merge_and_unload()
    torch.save(merged, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert len(bare_members(again, tied)) == 1
    assert torch.equal(outputs(again, tied), outputs(merged, tied))


@each_model
def test_unload_gives_the_base_model_back(tied):
    model = tied.build()
    before = bare_members(model, tied)
    peft_model = get_peft_model(model, config_for(tied))
    train(peft_model, tied)
    bare = peft_model.unload()
    assert bare_members(bare, tied) == before
    assert torch.equal(outputs(bare, tied), outputs(tied.build(), tied))


def test_not_finite_copies_are_refused_by_safe_merge():
    model = adapted(TIED_MODELS["llama"])
    train(model, TIED_MODELS["llama"])
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    with torch.no_grad():
        trained(model, TIED_MODELS["llama"])[0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)
    assert is_tied(model, TIED_MODELS["llama"])
    assert weights
    assert all(torch.equal(dict(model.named_parameters())[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("side", ["inputs", "outputs", "both"])
@pytest.mark.parametrize("name", TIED_MODELS)
def test_adapted_apart_on_purpose_survives_plain_saving(name, side, tmp_path):
    """Without ensure_weight_tying a trained head is neither lost nor put in the place of the embedding."""
    tied = TIED_MODELS[name]
    config = config_for(tied, side)
    config.ensure_weight_tying = False
    with pytest.warns(PeftWarning, match="set ensure_weight_tying=True"):
        model = get_peft_model(tied.build(), config)
    train(model, tied)
    expected = outputs(model, tied)
    with pytest.warns(PeftWarning, match="no longer tied in the merged model") as caught:
        merged = model.merge_and_unload()
    assert len([w for w in caught if issubclass(w.category, PeftWarning)]) == 1
    torch.testing.assert_close(outputs(merged, tied), expected, rtol=1e-5, atol=1e-5)
    if isinstance(merged, transformers.PreTrainedModel):
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path, attn_implementation="eager")
        assert torch.equal(outputs(again, tied), outputs(merged, tied))


def test_grown_vocabulary_needs_no_copy_of_the_base_embedding(tmp_path):
    base = llama()
    base.resize_token_embeddings(60)
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(64, mean_resizing=False)
    base.name_or_path = str(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(base, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model.save_pretrained(tmp_path / "adapter")
    keys = [key for key in load_file(tmp_path / "adapter" / WEIGHTS) if "lora" not in key]
    assert sorted(keys) == ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
