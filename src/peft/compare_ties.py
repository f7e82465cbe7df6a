# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
`python -m peft.compare_ties` counts on how many small models a tie survives what is done with an adapter.

The file needs no other of this package, so it can be run with any interpreter that has some `peft` installed; with
`--python` it runs itself there as well, and prints both beside each other.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


VOCABULARY, WIDTH = 40, 16


@dataclass(frozen=True)
class Case:
    """
    A model with a tie.

    Attributes:
        name: its name.
        build: makes it, always with the same weights.
        sides: names of the modules at the input and the output side that hold the tied matrix.
        reopens: whether transformers can open it without an adapter.
    """

    name: str
    build: Callable[[], Any]
    sides: tuple[str, str]
    reopens: bool = True


# ------------------------------------------------------------------------------------------ the models
def _seeded(build: Callable[[], Any]) -> Callable[[], Any]:
    def seeded() -> Any:
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build().eval()
            with torch.no_grad():  # norms and biases start at 0 and 1, which would hide mistakes
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        return model

    return seeded


def _of_transformers(name: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        model_cls = getattr(transformers, name)
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return model_cls(model_cls.config_class(vocab_size=VOCABULARY, tie_word_embeddings=True, **ids, **options))

    return _seeded(build)


def _plain() -> Any:
    import torch
    from torch import nn

    class Plain(nn.Module):
        """An embedding, a hidden layer, and a head that shares the embedding."""

        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, WIDTH)
            self.hidden = nn.Linear(WIDTH, WIDTH)
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.head.weight = self.words.weight

        def forward(self, input_ids: Any) -> Any:
            return self.head(torch.tanh(self.hidden(self.words(input_ids))))

    return Plain()


def cases() -> list[Case]:
    """List the models: a decoder, older decoders, an encoder, an encoder and decoder, and one without a config."""
    llama = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    t5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    bert = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 24, "num_hidden_layers": 1}
    decoder = ("model.embed_tokens", "lm_head")
    return [
        Case("Llama", _of_transformers("LlamaForCausalLM", num_key_value_heads=1, **llama), decoder),
        Case("Qwen2", _of_transformers("Qwen2ForCausalLM", num_key_value_heads=1, **llama), decoder),
        Case("Gemma", _of_transformers("GemmaForCausalLM", num_key_value_heads=1, head_dim=8, **llama), decoder),
        Case("GPT-2", _of_transformers("GPT2LMHeadModel", n_embd=WIDTH, n_layer=1, n_head=2),
             ("transformer.wte", "lm_head")),
        Case("OPT", _of_transformers("OPTForCausalLM", num_attention_heads=2, **opt),
             ("model.decoder.embed_tokens", "lm_head")),
        Case("BERT", _of_transformers("BertForMaskedLM", **bert),
             ("bert.embeddings.word_embeddings", "cls.predictions.decoder")),
        Case("T5", _of_transformers("T5ForConditionalGeneration", **t5), ("shared", "lm_head")),
        Case("plain modules", _seeded(_plain), ("words", "head"), reopens=False),
    ]  # fmt: skip


def _logits(model: Any) -> Any:
    import torch

    ids = torch.arange(3, 13).reshape(2, 5)
    inputs = {"input_ids": ids}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(1)
    with torch.no_grad():
        found = model.eval()(**inputs)
    return getattr(found, "logits", found)


def _parameter(model: Any, name: str) -> Any:
    return model.get_submodule(name).weight


def _is_tied(model: Any, case: Case) -> bool:
    first, second = (_parameter(model, side) for side in case.sides)
    return first is second or first.data_ptr() == second.data_ptr()


# ------------------------------------------------------------------------------------------ what is done
class Run:
    """
    An adapter on one side of a tie, trained for a moment.

    Args:
        case: the model.
        side: name of the module.
        route: "modules_to_save" or "target_modules".
    """

    def __init__(self, case: Case, side: str, route: str) -> None:
        import torch

        import peft

        self.case = case
        other = next(
            name.rpartition(".")[2]
            for name, module in case.build().named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and name not in case.sides
        )
        named = side if route == "target_modules" else side.rpartition(".")[2]
        options = {"target_modules": [other, named] if route == "target_modules" else [other]}
        if route == "modules_to_save":
            options["modules_to_save"] = [named]
        self.config = peft.LoraConfig(r=4, ensure_weight_tying=True, **options)
        self.model = peft.get_peft_model(case.build(), copy.deepcopy(self.config))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in {id(p): p for p in self.model.parameters() if p.requires_grad}.values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        self.expected = _logits(self.model)

    def same(self, model: Any) -> bool:
        """Say whether a model gives the logits of the trained one."""
        import torch

        return torch.allclose(_logits(model), self.expected, atol=1e-4)


def _trained_matrices(run: Run) -> int:
    """Count the trained matrices of the vocabulary's size."""
    return sum(p.requires_grad and p.dim() == 2 and p.shape[0] == VOCABULARY for p in run.model.parameters())


def trained_once(run: Run) -> bool:
    """One matrix is trained, and all places use it, so that merging it changes no outputs."""
    return _trained_matrices(run) == 1 and run.same(run.model.merge_and_unload())


def second_adapter(run: Run) -> bool:
    """A second adapter is tied as well."""
    run.model.add_adapter("second", copy.deepcopy(run.config))
    run.model.set_adapter("second")
    return _trained_matrices(run) == 1


def reloaded(run: Run) -> bool:
    """Saved and loaded into a fresh base model, it computes the same."""
    import peft

    with tempfile.TemporaryDirectory() as folder:
        run.model.save_pretrained(folder)
        return run.same(peft.PeftModel.from_pretrained(run.case.build(), folder))


def merged(run: Run) -> bool:
    """Merged, it computes the same, and both sides are one parameter."""
    model = run.model.merge_and_unload()
    return run.same(model) and _is_tied(model, run.case)


def reopened(run: Run) -> bool | None:
    """Merged, saved and opened by transformers alone, it computes the same."""
    if not run.case.reopens:
        return None
    model = run.model.merge_and_unload()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return run.same(type(model).from_pretrained(folder))


def unloaded(run: Run) -> bool:
    """Without the adapter it is the base model."""
    import torch

    return torch.allclose(_logits(run.model.unload()), _logits(run.case.build()), atol=1e-5)


ROWS: list[tuple[str, str, Callable[[Run], bool | None]]] = [
    ("saved: one trained parameter, and merging agrees", "modules_to_save", trained_once),
    ("saved: a second adapter is tied as well", "modules_to_save", second_adapter),
    ("saved: reloaded, equal logits", "modules_to_save", reloaded),
    ("saved: merged, one parameter, equal logits", "modules_to_save", merged),
    ("saved: merged, reopened with transformers alone", "modules_to_save", reopened),
    ("saved: unload() gives the base model", "modules_to_save", unloaded),
    ("target: reloaded, equal logits", "target_modules", reloaded),
    ("target: merged, one parameter, equal logits", "target_modules", merged),
    ("target: merged, reopened with transformers alone", "target_modules", reopened),
    ("target: unload() gives the base model", "target_modules", unloaded),
]


def measure() -> dict[str, Any]:
    """Try everything on every model, from both sides; what raises has not passed."""
    import peft

    counts: dict[str, dict[str, list[int]]] = {}
    for title, route, check in ROWS:
        for index, side in enumerate(("input", "output")):
            passed = tried = 0
            for case in cases():
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        result = check(Run(case, case.sides[index], route))
                except Exception:  # whatever goes wrong, the user has no tied model
                    result = False
                if result is not None:
                    tried += 1
                    passed += bool(result)
            counts.setdefault(title, {})[side] = [passed, tried]
    return {"version": peft.__version__, "counts": counts}


def as_table(results: list[dict[str, Any]]) -> str:
    """Write the counts, a column for each package and side."""
    columns = [(result, side) for result in results for side in ("input", "output")]
    head = ["on how many models", *(f"{result['version']}, {side}" for result, side in columns)]
    rows = [[title, *("{} of {}".format(*r["counts"][title][side]) for r, side in columns)] for title, _, _ in ROWS]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def main(argv: list[str] | None = None) -> int:
    """
    Print the table.

    Args:
        argv: arguments without the program's name; those of the process if left out.

    Returns:
        0 if every model passes everything with the package of this interpreter, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m peft.compare_ties", description=__doc__.strip().splitlines()[0])
    parser.add_argument("--python", metavar="PATH", help="another interpreter, whose peft is tried as well")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    arguments = parser.parse_args(argv)
    results = []
    if arguments.python is not None:
        # whatever this process is told to import from is no business of the other one
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [arguments.python, __file__, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if not done.stdout.strip():
            print(f"error: {arguments.python} has printed no result: {done.stderr.strip()[-500:]}", file=sys.stderr)
            return 2
        results += json.loads(done.stdout.strip().splitlines()[-1])
    results.append(measure())
    print(json.dumps(results) if arguments.json else as_table(results))
    return int(any(passed < tried for sides in results[-1]["counts"].values() for passed, tried in sides.values()))


if __name__ == "__main__":
    if sys.path[0].endswith("peft"):  # run as a file: the folder of the package is no place to import from
        sys.path.pop(0)
    sys.exit(main())
