# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""Adapters of several methods on one model: the order in which they compute, merging, ties, and what is refused."""

import copy
from itertools import permutations
from pathlib import Path

import pytest
import torch
from support.helpers import assert_close, assert_equal, differs, llama, logits, randomise, refused, token_ids, warned
from torch import nn

from peft import (
    AdaLoraConfig,
    BeftConfig,
    HiraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PromptTuningConfig,
    RoadConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
    weight_tying_report,
)
from peft.registry import PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners import MixedModel
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.mixed import COMPATIBLE_TUNER_TYPES


ADAPTERS = "lora_|hada_|lokr_|oft_"


def configs(**options: object) -> dict[str, PeftConfig]:
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    return {
        "lora": LoraConfig(r=2, **options),
        "loha": LoHaConfig(r=2, **options),
        "lokr": LoKrConfig(r=2, **options),
        "oft": OFTConfig(oft_block_size=4, **options),
    }


def mixed(names: tuple[str, ...], base: nn.Module | None = None, **options: object) -> PeftMixedModel:
    """A model with an adapter per method, all of them active and with an effect."""
    first, *others = names
    model = PeftMixedModel(llama() if base is None else base, configs(**options)[first], first)
    for name in others:
        model.add_adapter(name, configs(**options)[name])
    model.set_adapter(list(names))
    randomise(model, ADAPTERS)
    return model.eval()


class TestComputing:
    @pytest.mark.parametrize("names", list(permutations(("lora", "loha", "oft"))))
    def test_the_method_added_last_works_on_what_the_others_leave(self, names: tuple[str, ...]) -> None:
        net = nn.Sequential(nn.Linear(8, 8))
        weight = net[0].weight.detach().clone()
        model = mixed(names, net, target_modules=["0"])
        layers, layer = {}, net[0]
        while not isinstance(layer, nn.Linear):
            layers[next(iter(layer.available_adapters))] = layer
            layer = layer.base_layer
        for name in names:
            if name == "oft":
                weight = layers[name].transform_weight(name, weight)
            else:
                weight = weight + layers[name].get_delta_weight(name)
        x = torch.randn(3, 8)
        assert_close(model(x), nn.functional.linear(x, weight, layer.bias))

    def test_only_active_adapters_compute(self) -> None:
        model, ids = mixed(("lora", "oft", "lokr")), token_ids()
        together = logits(model, ids)
        for name in ("lora", "oft", "lokr"):
            model.set_adapter(name)
            assert differs(logits(model, ids), together)
        model.set_adapter(["lokr", "oft", "lora"])
        assert_equal(logits(model, ids), together)
        with model.disable_adapter():
            assert_equal(logits(model, ids), logits(llama(), ids))

    def test_a_weight_method_meets_the_adapters_inside(self) -> None:
        # on a convolution, OFT needs the weight itself, which is then not that of the base layer
        net = nn.Sequential(nn.Conv2d(4, 4, 3))
        model = mixed(("lora", "oft"), net, target_modules=["0"])
        x = torch.randn(2, 4, 6, 6)
        before = model(x)
        loss = before.pow(2).mean()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert_close(model.merge_and_unload()(x), before)

    def test_gradients_reach_all_active_adapters(self) -> None:
        model = mixed(("lora", "oft", "loha")).train()
        model(token_ids()).logits.pow(2).mean().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert {kind for kind in ("lora_", "oft_", "hada_") if any(kind in name for name in trained)} == {
            "lora_", "oft_", "hada_",
        }  # fmt: skip
        assert all(grad is not None and grad.abs().sum() > 0 for grad in trained.values())


class TestAdapters:
    def test_a_second_adapter_of_a_method_shares_its_layer(self) -> None:
        net = nn.Sequential(nn.Linear(8, 8))
        model = mixed(("lora", "loha"), net, target_modules=["0"])
        model.add_adapter("lora2", LoraConfig(r=3, target_modules=["0"]))
        model.add_adapter("loha2", LoHaConfig(r=3, target_modules=["0"]))
        assert isinstance(net[0], LoHaLayer) and isinstance(net[0].base_layer, LoraLayer)
        assert isinstance(net[0].base_layer.base_layer, nn.Linear)
        assert net[0].base_layer.available_adapters == {"lora", "lora2"}
        assert net[0].available_adapters == {"loha", "loha2"}

    def test_a_new_adapter_is_neither_active_nor_trained(self) -> None:
        model, ids = mixed(("lora",)), token_ids()
        before = logits(model, ids)
        model.add_adapter("loha", configs()["loha"])
        randomise(model, "hada_")
        assert model.active_adapters == ["lora"]
        assert_equal(logits(model, ids), before)
        assert not any(p.requires_grad for name, p in model.named_parameters() if "hada_" in name)

    def test_deleting(self) -> None:
        model, ids = mixed(("lora", "oft", "loha")), token_ids()
        model.set_adapter(["lora", "loha"])
        expected = logits(model, ids)
        model.set_adapter(["lora", "oft", "loha"])
        model.delete_adapter("oft")
        assert model.active_adapters == ["lora", "loha"]
        assert_equal(logits(model, ids), expected)
        with refused(model, ValueError, "'nobody'"):
            model.delete_adapter(["lora", "nobody"])
        model.merge_adapter(["loha"])
        with refused(model, ValueError, "'loha' is merged"):
            model.delete_adapter(["lora", "loha"])
        model.unmerge_adapter()
        model.delete_adapter(["lora"])
        assert list(model.peft_config) == model.active_adapters == ["loha"]

    @pytest.mark.parametrize("tied", [False, True])
    def test_a_method_that_was_gone_comes_last(self, tied: bool) -> None:
        targets = ["q_proj", "lm_head"]
        options = {"target_modules": targets, "ensure_weight_tying": tied}
        model, ids = mixed(("oft", "lora"), llama(tied=tied), **options), token_ids()
        model.delete_adapter("oft")
        assert not any("oft_" in name for name in model.state_dict())
        model.add_adapter("again", configs(**options)["oft"])
        model.set_adapter(["lora", "again"])
        randomise(model, ADAPTERS)
        fresh = mixed(("lora", "oft"), llama(tied=tied), **options)
        for name in ("lora", "again"):
            state = get_peft_model_state_dict(model, adapter_name=name)
            set_peft_model_state_dict(fresh, state, adapter_name="oft" if name == "again" else name)
        assert_close(logits(model, ids), logits(fresh, ids))

    def test_layers_stay_until_something_is_added(self) -> None:
        model = mixed(("lora", "loha"))
        model.delete_adapter("lora")
        assert any(".base_layer.base_layer." in name for name in model.state_dict())
        model.add_adapter("again", configs()["lora"])
        assert not any(".base_layer.base_layer.base_layer." in name for name in model.state_dict())

    def test_a_method_keeps_its_place_while_an_adapter_of_it_is_left(self) -> None:
        model, ids = mixed(("oft", "lora")), token_ids()
        model.add_adapter("second", configs()["oft"])
        randomise(model, "second")
        model.set_adapter(["second", "lora"])
        expected = logits(model, ids)
        model.delete_adapter("oft")
        assert_equal(logits(model, ids), expected)

    def test_names_that_are_not_there(self) -> None:
        model = mixed(("lora",))
        with refused(model, ValueError, "'nobody'", "'lora'"):
            model.set_adapter(["lora", "nobody"])
        with refused(model, ValueError, "'lora'"):
            model.add_adapter("lora", configs()["loha"])

    def test_unloading_gives_the_base_model_back(self) -> None:
        model, ids = mixed(("lora", "oft")), token_ids()
        base = model.unload()
        assert not any(isinstance(module, LoraLayer) for module in base.modules())
        assert_equal(logits(base, ids), logits(llama(), ids))

    def test_modules_to_save(self) -> None:
        model = mixed(("lora",))
        model.set_modules_to_save(LoraConfig(modules_to_save=["lm_head"]), "lora")
        assert "lora" in model.get_base_model().lm_head.modules_to_save

    @pytest.mark.parametrize(
        "route", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"lm_head": [3]}}]
    )
    def test_modules_to_save_are_tied_if_that_is_asked_for(self, route: dict) -> None:
        model, ids = mixed(("lora", "oft"), llama(tied=True)), token_ids()
        model.set_modules_to_save(LoraConfig(**route, ensure_weight_tying=True), "lora")
        randomise(model, "modules_to_save|trainable_tokens")
        report = weight_tying_report(model)
        assert report.holds and [row.route for row in report.rows if row.adapter == "lora"] == list(route)
        expected = logits(model, ids)
        merged = model.merge_and_unload()
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        assert_close(logits(merged, ids), expected)

    def test_modules_to_save_that_come_apart_are_warned_about_or_refused(self) -> None:
        model = mixed(("lora",), llama(tied=True), target_modules=["q_proj"])
        with warned("'lm_head'", "ensure_weight_tying=True"):
            model.set_modules_to_save(LoraConfig(modules_to_save=["lm_head"]), "lora")
        model = mixed(("lora",), llama(tied=True), target_modules=["lm_head"])
        with refused(model, TypeError, "'lm_head'", "'model.embed_tokens'"):
            model.set_modules_to_save(LoraConfig(modules_to_save=["embed_tokens"], ensure_weight_tying=True), "lora")

    def test_a_copy_is_a_model_of_its_own(self) -> None:
        model, ids = mixed(("lora", "oft")), token_ids()
        copied, before = copy.deepcopy(model), logits(model, ids)
        assert_equal(logits(copied, ids), before)
        copied.add_adapter("loha", configs()["loha"])
        copied.delete_adapter("lora")
        assert_equal(logits(model, ids), before)
        assert list(model.peft_config) == ["lora", "oft"]


class TestMerging:
    @pytest.mark.parametrize("names", list(permutations(("lora", "oft", "lokr"))))
    def test_merged_and_unmerged_compute_alike(self, names: tuple[str, ...]) -> None:
        model, ids = mixed(names), token_ids()
        before = logits(model, ids)
        model.merge_adapter()
        assert_close(logits(model, ids), before, atol=1e-4)
        model.unmerge_adapter()
        assert_close(logits(model, ids), before, atol=1e-4)
        assert_close(logits(model.merge_and_unload(), ids), before, atol=1e-4)

    def test_adapters_inside_are_merged_first_whatever_the_calls(self) -> None:
        model, ids = mixed(("lora", "oft")), token_ids()
        before = logits(model, ids)
        model.merge_adapter(["oft"])
        model.merge_adapter(["lora"])
        assert_close(logits(model, ids), before, atol=1e-4)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        assert [name for _, name in layer._merge_state.contributions] == ["lora", "oft"]

    def test_some_only(self) -> None:
        model, ids = mixed(("lora", "oft", "loha")), token_ids()
        model.set_adapter(["lora", "loha"])
        expected = logits(model, ids)
        model.set_adapter(["lora", "oft", "loha"])
        assert_close(logits(model.merge_and_unload(adapter_names=["lora", "loha"]), ids), expected, atol=1e-4)


class TestTies:
    @pytest.mark.parametrize("names", [("lora", "loha"), ("loha", "lora", "lokr")])
    def test_a_tie_is_kept_through_all_methods(self, names: tuple[str, ...]) -> None:
        options = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
        base, ids = llama(tied=True), token_ids()
        model = PeftMixedModel(base, LoraConfig(r=2, **options), "lora")
        # of these methods, LoRA adapts embeddings; the others take part from the linear end of the tie
        options["target_modules"] = ["lm_head", "q_proj"]
        for name in names:
            if name != "lora":
                model.add_adapter(name, configs(**options)[name])
        model.set_adapter(list(names))
        randomise(model, ADAPTERS)
        model.eval()
        before = logits(model, ids)
        merged = model.merge_and_unload()
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        assert_close(logits(merged, ids), before, atol=1e-4)

    def test_rotations_follow_the_effective_weight(self) -> None:
        base, ids = llama(tied=True), token_ids()
        model = PeftMixedModel(
            base, LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True), "lora"
        )
        model.add_adapter("oft", OFTConfig(oft_block_size=4, target_modules=["lm_head"], ensure_weight_tying=True))
        model.set_adapter(["lora", "oft"])
        randomise(model, ADAPTERS)
        model.eval()
        before = logits(model, ids)
        merged = model.merge_and_unload()
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        assert_close(logits(merged, ids), before, atol=1e-4)


class TestFiles:
    def save(self, folder: Path) -> dict[str, torch.Tensor]:
        """Save an adapter per method; each was trained alone."""
        outputs = {}
        for name, config in configs().items():
            model = get_peft_model(llama(), config, adapter_name="default").eval()
            randomise(model, ADAPTERS)
            model.save_pretrained(folder / name)
            outputs[name] = logits(model, token_ids())
        return outputs

    def test_adapters_are_loaded_one_after_the_other(self, tmp_path: Path) -> None:
        outputs = self.save(tmp_path)
        model = PeftMixedModel.from_pretrained(llama(), tmp_path / "lora", "lora")
        assert not model.training
        for name in ("loha", "oft"):
            result = model.load_adapter(tmp_path / name, name, low_cpu_mem_usage=name == "oft")
            assert result.unexpected_keys == []
        # its layer is inside those of other methods by now, which files do not know of
        model.load_adapter(tmp_path / "lora", "again")
        for name, expected in {**outputs, "again": outputs["lora"]}.items():
            if name != "lokr":
                model.set_adapter(name)
                assert_equal(logits(model, token_ids()), expected)

    def test_an_adapter_is_loaded_to_be_trained(self, tmp_path: Path) -> None:
        self.save(tmp_path)
        model = mixed(("lora",)).train()
        model.load_adapter(tmp_path / "loha", "loha", is_trainable=True)
        assert model.training
        assert any("loha" in name for name, p in model.named_parameters() if p.requires_grad)

    def test_tensors_are_collected_as_if_the_method_were_alone(self, tmp_path: Path) -> None:
        self.save(tmp_path)
        model = PeftMixedModel.from_pretrained(llama(), tmp_path / "lora", "lora")
        model.load_adapter(tmp_path / "loha", "loha")
        alone = PeftModel.from_pretrained(llama(), tmp_path / "lora")
        expected = get_peft_model_state_dict(alone)
        found = get_peft_model_state_dict(model, adapter_name="lora")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert_equal(found[key], tensor)

    def test_saving_is_refused(self, tmp_path: Path) -> None:
        model = mixed(("lora", "loha"))
        for call in (model.save_pretrained, model.create_or_update_model_card):
            with refused(model, NotImplementedError, "PeftModel that trained it", folder=tmp_path):
                call(str(tmp_path))

    def test_a_folder_without_an_adapter(self, tmp_path: Path) -> None:
        model = mixed(("lora",))
        with refused(model, ValueError):
            model.load_adapter(tmp_path / "nothing", "more")


class TestMethods:
    """The registry says which methods mix, and the model takes all of those."""

    def test_the_table_has_what_the_model_takes(self) -> None:
        names = {"ADALORA", "BEFT", "HIRA", "IA3", "LOHA", "LOKR", "LORA", "OFT", "ROAD", "SHIRA"}
        assert {method.value for method in PEFT_TYPE_TO_MIXED_MODEL_MAPPING} == names
        assert set(COMPATIBLE_TUNER_TYPES) == set(PEFT_TYPE_TO_MIXED_MODEL_MAPPING)

    @pytest.mark.parametrize("inside", [True, False])
    @pytest.mark.parametrize(
        "config",
        [
            BeftConfig(target_modules=["q_proj", "v_proj"]),
            HiraConfig(r=2, target_modules=["q_proj", "v_proj"]),
            IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=["v_proj"]),
            RoadConfig(group_size=4, target_modules=["q_proj", "v_proj"]),
            ShiraConfig(r=1, target_modules=["q_proj", "v_proj"]),
        ],
        ids=lambda config: config.peft_type.value,
    )
    def test_methods_around_and_inside_another(self, config: PeftConfig, inside: bool) -> None:
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        order = [config, lora] if inside else [lora, config]
        base, ids = llama(attention_bias=True), token_ids()
        plain = logits(base, ids)
        model = PeftMixedModel(base, order[0], "first")
        model.add_adapter("second", order[1])
        model.set_adapter(["first", "second"])
        randomise(model, f"lora_|{PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]}")
        model.eval()
        both = logits(model, ids)
        for name in ("first", "second"):
            model.set_adapter(name)
            assert differs(logits(model, ids), both) and differs(logits(model, ids), plain)
        model.set_adapter(["first", "second"])
        model.merge_adapter()
        assert_close(logits(model, ids), both)
        model.unmerge_adapter()
        assert_close(logits(copy.deepcopy(model).unload(), ids), plain)
        assert_close(logits(model.merge_and_unload(), ids), both)


class TestRefused:
    @pytest.mark.parametrize(
        "config",
        [
            VeraConfig(r=2, target_modules=["q_proj"]),
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        ],
    )
    def test_methods_that_cannot_be_mixed(self, config: PeftConfig) -> None:
        method = config.peft_type.value
        base = llama()
        with refused(base, ValueError, method, "LOHA, LOKR, LORA"):
            PeftMixedModel(base, config)
        model = mixed(("lora",))
        with refused(model, ValueError, method):
            model.add_adapter("more", config)

    def test_biases_exist_once(self) -> None:
        model = PeftMixedModel(llama(), LoraConfig(target_modules=["q_proj"], bias="all"), "one")
        with refused(model, ValueError, "biases exist once"):
            model.add_adapter("two", OFTConfig(oft_block_size=4, target_modules=["q_proj"], bias="all"))

    def test_combining_adapters(self) -> None:
        model = mixed(("lora", "loha"))
        with refused(model, NotImplementedError, "set_adapter"):
            model.base_model.add_weighted_adapter(["lora", "loha"], [1.0, 1.0], "both")

    def test_deleting_the_only_active_adapter_warns(self) -> None:
        model = mixed(("lora", "loha"))
        model.set_adapter("loha")
        with warned("'loha'", "'lora' is active now"):
            model.delete_adapter("loha")
        assert model.active_adapters == ["lora"]
        assert isinstance(model.base_model, MixedModel)


def test_two_adapters_of_a_method_that_hands_out_ranks() -> None:
    """Nobody hands out ranks in a mixed model, so both can be trained; a plain model refuses the second."""
    settings = AdaLoraConfig(init_r=2, target_r=1, total_step=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), settings, "a", mixed=True).eval()
    model.add_adapter("b", settings)
    outputs = {}
    for names in (["a"], ["b"], ["a", "b"]):
        model.set_adapter(names)
        assert model.active_adapters == names
        outputs[len(outputs)] = logits(model, token_ids())
    assert differs(outputs[2], outputs[0]) and differs(outputs[2], outputs[1])
    assert_close(logits(model.merge_and_unload(), token_ids()), outputs[2])
    plain = get_peft_model(llama(), settings, "a")
    with refused(plain, ValueError, "hands out the ranks of one adapter"):
        plain.add_adapter("b", settings)
