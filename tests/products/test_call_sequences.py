# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
Public calls in any order, for every method: hypothesis makes up the sequences.

A cell is a tiny language model, tied or not, with adapters of one method, or of two. After each call the model has to
compute what a fresh model computes into which the same adapters were merged; its base weights have to be what they
were, and where; the parameters that are trained have to be those that were asked for; a refused call must have changed
nothing. Methods enter by being registered.
"""

import copy
import pickle
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.effects import add_noise, rounding, size_that_matters
from support.helpers import seeded, snapshot
from support.method_options import OPTIONS, SECOND, is_mergeable, layered_methods, mergeable_methods
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
    weight_tying_report,
)
from peft.anatomy.walking import adapter_modules, bare_modules
from peft.registry import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import PeftError


VOCABULARY, WIDTH = 24, 16
NAMES = ("a", "b", "c")


# ------------------------------------------------------------------------------------------ cells
class TinyConfig(PretrainedConfig):
    """What transformers needs to know to tie the model below, and to resize its vocabulary."""

    model_type = "tiny"

    def __init__(self, tied: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.tie_word_embeddings = VOCABULARY, tied


class Tiny(PreTrainedModel):
    """An embedding, a hidden layer, a norm and a head, which is tied to the embedding if the config says so."""

    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self._tied_weights_keys = {"head.weight": "words.weight"} if config.tie_word_embeddings else {}
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Give the embedding."""
        return self.words

    def set_input_embeddings(self, module: nn.Module) -> None:
        """Replace it."""
        self.words = module

    def get_output_embeddings(self) -> nn.Module:
        """Give the head."""
        return self.head

    def set_output_embeddings(self, module: nn.Module) -> None:
        """Replace it."""
        self.head = module

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map (batch, length) token ids to scores of the vocabulary."""
        return self.head(torch.tanh(self.norm(self.hidden(self.words(ids)))))


@cache
def base(tied: bool) -> Tiny:
    """Build the model once, with weights of a size that matters; whoever changes it takes a copy."""
    with seeded():
        model = Tiny(TinyConfig(tied)).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=1.0 if parameter is model.norm.weight else 0.0, std=0.4)
    return model


@dataclass(frozen=True)
class Cell:
    """The methods of adapters "a" and "c", and of "b", by one route, on a tied model or not."""

    methods: tuple[str, str]
    tied: bool
    route: str = "targets"

    def __str__(self) -> str:
        return "-".join([*dict.fromkeys(self.methods), "tied" if self.tied else "untied", self.route])

    @property
    def mixed(self) -> bool:
        """Whether adapters of several methods meet."""
        return len(set(self.methods)) > 1

    def method(self, name: str) -> str:
        """Give the method of an adapter."""
        return self.methods[name == "b"]

    def config(self, name: str) -> Any:
        """Make the config of an adapter."""
        method, _, variant = self.method(name).partition("+")
        values = {**OPTIONS.get(method, {}), **(SECOND.get(method, {}) if name != "a" else {})}
        values["ensure_weight_tying"] = self.tied
        kinds = tuple(PEFT_TYPE_TO_TUNER_MAPPING[method].layer_classes)
        # of a tie one member is named, and the other follows
        wanted = ("hidden", "head") if self.tied else ("words", "hidden", "head")
        values["target_modules"] = [m for m in wanted if isinstance(base(self.tied).get_submodule(m), kinds)]
        if method == "TRAINABLE_TOKENS":  # some tokens are those of several adapters
            values.update(token_indices={"a": [3, 5, 7], "b": [5, 6], "c": [1, 3]}[name])
            values["target_modules"] = ["words", "head"]
        if self.route == "saved":
            values.update(target_modules=["hidden"], modules_to_save=["words"])
        elif self.route == "tokens":
            values.update(target_modules=["hidden"], trainable_token_indices={"words": [3, 5] if name == "a" else [5]})
        if variant == "dora":
            values.update(use_dora=True)
        return PEFT_TYPE_TO_CONFIG_MAPPING[method](**values)

    def start(self, model: nn.Module, name: str) -> Any:
        """Put the first adapter into a base model."""
        return get_peft_model(model, self.config(name), adapter_name=name, mixed=self.mixed)


def cells() -> list[Cell]:
    """List one cell per method, tied and not, and those of other routes, variants and pairs."""
    methods = [*mergeable_methods(), "LORA+dora"]
    found = [Cell((method, method), tied) for method in methods for tied in (False, True)]
    # what is no weight's is not followed by an embedding
    found += [Cell((method, method), False) for method in layered_methods() if not is_mergeable(method)]
    found += [Cell(("LORA", "LORA"), tied, route) for route in ("saved", "tokens") for tied in (False, True)]
    pairs = (("LORA", "OFT"), ("LOHA", "LORA+dora"))
    return found + [Cell(pair, tied) for pair in pairs for tied in (False, True)]


# ------------------------------------------------------------------------------------------ what is to be computed
def parameters_of(model: nn.Module, name: str) -> list[nn.Parameter]:
    """List the parameters of an adapter, each once."""
    found = {id(p): p for _, module in adapter_modules(model) for p in module.adapter_parameters(name)}
    return list(found.values())


@cache
def noise(cell: Cell, name: str) -> float:
    """Find once by how much the tensors of an adapter are moved, so that it matters."""
    model = cell.start(copy.deepcopy(base(cell.tied)), name)
    return size_that_matters(parameters_of(model, name), lambda: compute(model))


def tensors_of(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Copy an adapter's tensors."""
    return {
        key: tensor.detach().clone() for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items()
    }


def layers_of(model: Any) -> dict[str, list[BaseTunerLayer]]:
    """Find the adapter layers by the name of the layer that they are around."""
    names = {id(module): name for name, module in bare_modules(model.get_base_model())}
    found: dict[str, list[BaseTunerLayer]] = {}
    for _, module in adapter_modules(model):
        if isinstance(module, BaseTunerLayer):
            found.setdefault(names[id(module.get_base_layer())], []).append(module)
    return found


def in_effect(layers: list[BaseTunerLayer]) -> tuple[str, ...]:
    """List the adapters that count around one layer: those that are merged, and the active ones."""
    merged = [name for layer in layers for name in layer.merged_adapters]
    active = [name for layer in layers if not layer.disable_adapters for name in layer.active_adapters]
    return tuple(dict.fromkeys([*merged, *active]))


def compute(model: nn.Module) -> torch.Tensor:
    """Give the scores of every token of the base vocabulary, in double precision."""
    with torch.no_grad():
        return model.eval()(torch.arange(VOCABULARY)[None]).double()


class CallSequences(RuleBasedStateMachine):
    """One model, what has been done to it, and what therefore has to be true."""

    cell: Cell
    steps: int

    @initialize()
    def start(self) -> None:
        self.rows = VOCABULARY
        self.model = self.cell.start(copy.deepcopy(base(self.cell.tied)), "a").eval()
        self.numbers = iter(range(1, 1000))
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.saved: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}
        self.folder = tempfile.TemporaryDirectory()
        self.known: dict[Any, torch.Tensor] = {}
        self.order = [self.cell.method("a")]  # in which methods came to layers that several are around
        self.active, self.trained, self.disabled = ["a"], {"a"}, False
        self.moved("a")
        self.add("b")

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    # ---------------------------------------------------------------------------------- means
    def moved(self, name: str) -> None:
        """Give an adapter other values and remember them."""
        add_noise(parameters_of(self.model, name), noise(self.cell, name), next(self.numbers))
        self.remember(name, tensors_of(self.model, name))

    def remember(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors[name] = tensors
        self.known.clear()

    def assert_near(self, found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        """Fail if two outputs differ by more than rounding does, at each step of a sequence."""
        assert found.shape == expected.shape, what
        difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1)
        bound = self.steps * rounding(torch.float32)
        assert difference <= bound, f"{what}: off by {float(difference):.2g} of the greatest entry"

    def attempt(self, call: Callable[[], Any]) -> bool:
        """Call; say whether it was accepted. If it was refused, nothing may have changed."""
        before = snapshot(self.model)
        try:
            call()
        except PeftError:
            after = snapshot(self.model)
            assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == {}
            return False
        return True

    def merged_somewhere(self) -> bool:
        return any(layer.merged for layers in layers_of(self.model).values() for layer in layers)

    def fresh(self) -> Any:
        """Build a model with the same adapters, to which nothing else was ever done."""
        model = copy.deepcopy(base(self.cell.tied))
        if self.rows != VOCABULARY:
            resize(model, self.rows)
        names = sorted(self.tensors, key=lambda name: (self.order.index(self.cell.method(name)), name))
        made = self.cell.start(model, names[0])
        for name in names[1:]:
            made.add_adapter(name, self.cell.config(name))
        for name in names:
            set_peft_model_state_dict(made, self.tensors[name], adapter_name=name)
        return made

    def expected(self) -> torch.Tensor:
        """Compute with a fresh model, beside its weights and merged into them; the two have to agree."""
        effects = {name: in_effect(layers) for name, layers in layers_of(self.model).items()}
        key = (tuple(effects.items()), tuple(self.active), self.disabled)
        if key not in self.known:
            fresh = self.fresh()
            if self.disabled and not any(effects.values()):
                fresh.base_model.disable_adapter_layers()
                self.known[key] = compute(fresh)
                return self.known[key]
            fresh.base_model.set_adapter(self.active)
            for _, module in adapter_modules(fresh):
                if self.disabled and not isinstance(module, BaseTunerLayer):
                    module.enable_adapters(False)
            for name, layers in layers_of(fresh).items():
                for layer in layers:
                    layer.set_adapter(list(effects[name]))
            output = compute(fresh)
            try:
                fresh.base_model.merge_adapter()
            except PeftError:  # tokens that two adapters train: there is nothing to compare with
                self.known[key] = output
                return output
            self.assert_near(compute(fresh), output, "a fresh model, merged")
            # unloading takes saved modules although they are off, and a tie has one weight to give back
            if not self.disabled and effects.get("words") == effects.get("head"):
                self.assert_near(compute(fresh.merge_and_unload()), output, "a fresh model, merged and unloaded")
            self.known[key] = output
        return self.known[key]

    # ---------------------------------------------------------------------------------- calls
    @rule(name=st.sampled_from(NAMES))
    def add(self, name: str) -> None:
        new = name not in self.tensors
        accepted = self.attempt(lambda: self.model.add_adapter(name, self.cell.config(name)))
        if not new:
            assert not accepted, "an adapter that is there was replaced"
        elif accepted:
            if self.cell.method(name) not in self.order:
                self.order.append(self.cell.method(name))
            self.moved(name)

    @rule(names=st.permutations(NAMES), count=st.integers(1, 2))
    def set_adapter(self, names: list[str], count: int) -> None:
        names = [name for name in names if name in self.tensors][:count]
        if self.attempt(lambda: self.model.base_model.set_adapter(names)):
            self.active, self.trained = names, set(names)
        else:
            assert len(names) > 1, "one adapter that is there was refused"

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        if len(self.tensors) == 1 or not self.attempt(lambda: self.model.delete_adapter(name)):
            return
        del self.tensors[name]
        self.order = [method for method in self.order if method in map(self.cell.method, self.tensors)]
        self.known.clear()
        if self.active == [name]:
            self.active = list(self.model.active_adapters)
            assert len(self.active) == 1 and self.active[0] in self.tensors
            # one that was loaded to be used stays frozen
            self.trained = {n for n in self.active if any(p.requires_grad for p in parameters_of(self.model, n))}
        else:
            self.active = [other for other in self.active if other != name]
            self.trained.discard(name)

    @rule(name=st.sampled_from(NAMES))
    def write(self, name: str) -> None:
        if name in self.tensors and not self.merged_somewhere():
            self.moved(name)

    @rule(safe=st.booleans())
    def merge(self, safe: bool) -> None:
        self.attempt(lambda: self.model.base_model.merge_adapter(safe_merge=safe))

    @rule(place=st.integers(0, 1))
    def merge_one_adapter(self, place: int) -> None:
        self.attempt(lambda: self.model.base_model.merge_adapter([self.active[place % len(self.active)]]))

    @rule(place=st.integers(0, 5))
    def merge_one_layer(self, place: int) -> None:
        layers = [layer for around in layers_of(self.model).values() for layer in around]
        layer = layers[place % len(layers)]
        if any(map(layer.has_adapter, layer.active_adapters)):
            self.attempt(layer.merge)

    @rule()
    def unmerge(self) -> None:
        self.model.base_model.unmerge_adapter()
        assert not self.merged_somewhere()

    @rule(place=st.integers(0, 5))
    def unmerge_one_layer(self, place: int) -> None:
        layers = [layer for around in layers_of(self.model).values() for layer in around]
        layers[place % len(layers)].unmerge()
        assert not layers[place % len(layers)].merged

    @rule(how=st.sampled_from(["off", "on", "off for a while"]))
    def switch(self, how: str) -> None:
        if how == "off for a while":
            if not self.merged_somewhere():
                with self.model.disable_adapter():
                    assert all(layer.disable_adapters for layers in layers_of(self.model).values() for layer in layers)
            return
        self.disabled = how == "off"
        tuner = self.model.base_model
        tuner.disable_adapter_layers() if self.disabled else tuner.enable_adapter_layers()

    @rule(way=st.sampled_from(["copy", "pickle", "state dict", "move", torch.float32, torch.float64]))
    def carry(self, way: Any) -> None:
        if way == "copy":
            self.model = copy.deepcopy(self.model)
        elif way == "pickle":
            self.model = pickle.loads(pickle.dumps(self.model))
        elif way == "state dict":
            self.model.load_state_dict(copy.deepcopy(self.model.state_dict()))
        else:
            self.model.to("cpu" if way == "move" else way)

    @precondition(lambda self: not self.cell.mixed)
    @rule()
    def save(self) -> None:
        folder = Path(self.folder.name, str(next(self.numbers)))
        self.model.save_pretrained(folder)
        self.saved = {name: (folder / name, tensors) for name, tensors in self.tensors.items()}

    @precondition(lambda self: self.saved if hasattr(self, "saved") else False)
    @rule(name=st.sampled_from(NAMES), source=st.sampled_from(NAMES))
    def load(self, name: str, source: str) -> None:
        if source not in self.saved or self.cell.config(name) != self.cell.config(source):
            return
        folder, tensors = self.saved[source]
        if self.attempt(lambda: self.model.load_adapter(folder, name)):
            self.remember(name, tensors)

    @precondition(lambda self: not self.cell.mixed)
    @rule()
    def reload(self) -> None:
        if self.rows != VOCABULARY:
            return
        self.save()
        model = copy.deepcopy(base(self.cell.tied))
        names = list(self.saved)
        self.model = PeftModel.from_pretrained(model, self.saved[names[0]][0], names[0], is_trainable=True)
        for name in names[1:]:
            self.model.load_adapter(self.saved[name][0], name)
        self.model.base_model.set_adapter(self.active)
        self.trained, self.disabled = set(self.active), False

    @rule(kind=st.sampled_from(["target", "name", "set", "delete", "load", "tensors"]))
    def ask_for_the_impossible(self, kind: str) -> None:
        model, name = self.model, next(iter(self.tensors))
        config = self.cell.config("a")
        if kind == "target":
            config.target_modules = ["no_such_module"]
        calls = {
            "target": lambda: model.add_adapter("other", config),
            "name": lambda: model.add_adapter("a.b", config),
            "set": lambda: model.set_adapter("nobody"),
            "delete": lambda: model.delete_adapter("nobody"),
            "load": lambda: model.load_adapter(Path(self.folder.name, "nowhere"), "other"),
            "tensors": lambda: set_peft_model_state_dict(
                model, {key: torch.zeros(3, 1, 3) for key in self.tensors[name]}, adapter_name=name
            ),
        }
        assert not self.attempt(calls[kind]), f"an impossible {kind} was accepted"

    # ---------------------------------------------------------------------------------- what has to be true
    @invariant()
    def computes_what_a_fresh_model_does(self) -> None:
        self.assert_near(compute(self.model), self.expected(), "the model, beside a fresh one")

    @invariant()
    def knows_what_is_active(self) -> None:
        assert list(self.model.active_adapters) == self.active
        active = self.model.active_adapter
        assert ([active] if isinstance(active, str) else list(active)) == self.active
        assert set(self.model.peft_config) == set(self.tensors)

    @invariant()
    def trains_what_was_asked_for(self) -> None:
        if self.disabled:  # whether switching back on brings the flags back is seen then
            return
        of_adapters = set()
        for name in self.tensors:
            parameters = parameters_of(self.model, name)
            of_adapters.update(map(id, parameters))
            found = {parameter.requires_grad for parameter in parameters if parameter.is_floating_point()}
            wanted = name in self.trained
            assert found <= {wanted}, f"{name!r} should {'' if wanted else 'not '}be trained"
        assert not any(p.requires_grad for p in self.model.parameters() if id(p) not in of_adapters)

    @invariant()
    def keeps_the_base_model(self) -> None:
        weights = {name: layers[0].stored_weight() for name, layers in layers_of(self.model).items()}
        original = dict(base(self.cell.tied).named_parameters(remove_duplicate=False))
        for name, layers in layers_of(self.model).items():
            if not any(layer.merged for layer in layers):
                found = weights[name][:VOCABULARY].double()
                self.assert_near(found, original[f"{name}.weight"].double(), f"the base weight of {name}")
        if self.cell.tied and {in_weight(layers) for layers in self.members()} in ({()}, {}):
            report = weight_tying_report(self.model)
            assert report.rows and report.holds, str(report)

    def members(self) -> list[list[BaseTunerLayer]]:
        """Give the adapter layers around each member of the tie; none where the module is not adapted."""
        layers = layers_of(self.model)
        return [layers.get(name, []) for name in ("words", "head")]


def in_weight(layers: list[BaseTunerLayer]) -> tuple[str, ...]:
    """List what is merged into one base weight."""
    return tuple(name for layer in layers for name in layer.merged_adapters)


def resize(model: nn.Module, rows: int) -> None:
    """Give a model another number of tokens; new rows are the same each time."""
    with seeded():
        model.resize_token_embeddings(rows, mean_resizing=False)


def run(cell: Cell, examples: int, steps: int) -> None:
    """Run sequences on one cell."""
    machine = type("Sequences", (CallSequences,), {"cell": cell, "steps": steps})
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(seed(zlib.crc32(str(cell).encode()))(machine), settings=chosen)


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_short_sequences(cell: Cell) -> None:
    run(cell, examples=12, steps=10)


@pytest.mark.wide
@pytest.mark.parametrize("cell", cells(), ids=str)
def test_long_sequences(cell: Cell) -> None:
    run(cell, examples=100, steps=30)
