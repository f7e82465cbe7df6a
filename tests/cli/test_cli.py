# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The command line: what it says about adapters, and that a merge of files is the merge in memory."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.helpers import bert_classifier, gpt2, llama, opt
from torch import nn
from transformers import LlamaForSequenceClassification, MixtralConfig

from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    weight_tying_report,
)
from peft.cli import COMMANDS, main


WEIGHTS = "adapter_model.safetensors"
TARGETS = ["q_proj", "v_proj", "down_proj"]


def tied_llama() -> nn.Module:
    """A Llama whose head is its embedding."""
    return llama(tied=True)


def save(folder: Path, model: nn.Module, config: Any, **options: Any) -> tuple[str, str]:
    """Save a base model, and an adapter for it that has learned something."""
    base, adapter = str(folder / "base"), str(folder / "adapter")
    model.save_pretrained(base, max_shard_size=options.pop("max_shard_size", "5KB"))
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)
    adapted.save_pretrained(adapter, **options)
    return base, adapter


def rewrite(folder: str, change: Any) -> None:
    """Change the tensors of an adapter's file, whose header stays as it is."""
    path = Path(folder) / WEIGHTS
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, header)


def peft(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run a command; give its exit status and result."""
    status = main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------ in general
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_the_exit_statuses(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"  peft {command} " in text.partition("examples:")[2]
    assert "exit status:" in text


def test_help_loads_no_torch():
    code = "import sys, contextlib, peft.cli\nwith contextlib.suppress(SystemExit): peft.cli.main(['--help'])\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print(not {{'torch', 'transformers'}} & set(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("True\n")


@pytest.mark.parametrize("arguments", [["plan", "nowhere", "nowhere"], ["inspect", "nowhere"], ["diff", "a", "b"]])
def test_a_path_that_is_not_there_is_status_2(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and arguments[1] in captured.err
    assert captured.out == ""


def test_arguments_that_are_not_understood_are_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan"])
    assert stop.value.code == 2
    assert "MODEL" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ plan
class TestPlan:
    def test_says_what_get_peft_model_does(self, tmp_path, capsys):
        config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
        base, adapter = save(tmp_path, tied_llama(), config)
        status, found = peft(capsys, "plan", base, adapter)
        model = get_peft_model(tied_llama(), config)
        assert status == 0
        assert found["targets"] == model.targeted_module_names
        assert (found["trainable_parameters"], found["all_parameters"]) == model.get_nb_trainable_parameters()
        assert found["ties"] == weight_tying_report(model).to_dict()
        tensors = load_file(Path(adapter) / WEIGHTS)
        assert found["tensors"] == len(tensors)
        assert found["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def test_takes_files_and_needs_no_weights(self, tmp_path, capsys):
        llama().config.save_pretrained(tmp_path)
        LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM").save_pretrained(tmp_path)
        files = [str(tmp_path / name) for name in ("config.json", "adapter_config.json")]
        status, found = peft(capsys, "plan", *files)
        assert status == 0
        assert len(found["targets"]) == 6

    def test_names_that_come_near(self, tmp_path, capsys):
        llama().config.save_pretrained(tmp_path)
        LoraConfig(target_modules=["q_proj", "v_porj"]).save_pretrained(tmp_path)
        status, found = peft(capsys, "plan", str(tmp_path), str(tmp_path))
        assert status == 0
        assert "v_proj" in found["near_misses"]["v_porj"]
        assert any("v_porj" in warning for warning in found["warnings"])
        assert main(["plan", str(tmp_path), str(tmp_path)]) == 0
        captured = capsys.readouterr()
        assert "'v_porj' matches nothing" in captured.out
        assert captured.err.startswith("warning: ")

    def test_layers_of_experts_stand_for_parameters(self, tmp_path, capsys):
        MixtralConfig(hidden_size=64, intermediate_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
        targets = ["w1", "w2", "w3", "w4", "q_proj"]
        LoraConfig(target_modules=targets, task_type="CAUSAL_LM").save_pretrained(tmp_path)
        status, found = peft(capsys, "plan", str(tmp_path), str(tmp_path))
        assert status == 0
        experts = "model.layers.0.mlp.experts"
        assert found["target_parameters"] == [f"{experts}.gate_up_proj", f"{experts}.down_proj"]
        assert list(found["near_misses"]) == ["w4"]

    def test_what_would_be_refused_is_status_2(self, tmp_path, capsys):
        llama().config.save_pretrained(tmp_path)
        LoraConfig(target_modules=["q_porj"]).save_pretrained(tmp_path)
        status, found = peft(capsys, "plan", str(tmp_path), str(tmp_path))
        assert status == 2
        assert "q_proj" in found["error"]


# ------------------------------------------------------------------------------------------ inspect, diff
def test_inspect_says_what_the_file_holds(tmp_path, capsys):
    _, adapter = save(tmp_path, llama(), LoraConfig(r=4, target_modules=TARGETS, use_rslora=True))
    status, found = peft(capsys, "inspect", adapter)
    tensors = load_file(Path(adapter) / WEIGHTS)
    assert status == 0
    assert found["method"] == "LORA"
    assert found["settings"]["r"] == 4 and found["settings"]["use_rslora"] is True
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert {key: tuple(t["shape"]) for key, t in found["tensors"].items()} == {k: t.shape for k, t in tensors.items()}
    assert found["hashed"] == len(tensors)
    assert main(["inspect", adapter]) == 0
    assert "model.layers.*.self_attn.q_proj.lora_A.weight" in capsys.readouterr().out


class TestDiff:
    def test_an_adapter_does_not_differ_from_itself(self, tmp_path, capsys):
        _, adapter = save(tmp_path, llama(), LoraConfig(r=4, target_modules=TARGETS))
        status, found = peft(capsys, "diff", adapter, adapter)
        assert status == 0
        assert found["equal"] == 12 and not found["changed"]

    def test_says_what_differs(self, tmp_path, capsys):
        _, one = save(tmp_path / "1", llama(), LoraConfig(r=4, target_modules=TARGETS))
        _, other = save(tmp_path / "2", llama(), LoraConfig(r=4, lora_alpha=3, target_modules=[*TARGETS, "k_proj"]))
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        tensors = load_file(Path(one) / WEIGHTS)

        def change(new: dict[str, torch.Tensor]) -> None:
            new.update(tensors)
            new[key] = tensors[key].clone()
            new[key][0, 0] += 2

        rewrite(other, change)
        status, found = peft(capsys, "diff", one, other)
        assert status == 1
        assert set(found["settings"]) == {"lora_alpha", "target_modules"}
        assert list(found["changed"]) == [key]
        assert found["changed"][key]["largest"] == pytest.approx(2)
        assert len(found["only_in_b"]) == 4 and found["only_in_a"] == []
        assert main(["diff", one, other]) == 1
        assert key in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ verify
class TestVerify:
    def test_saving_writes_the_hash_of_every_tensor(self, tmp_path):
        _, adapter = save(tmp_path, llama(), LoraConfig(r=4, target_modules=TARGETS))
        with safe_open(Path(adapter) / WEIGHTS, "pt") as file:
            hashes = json.loads(file.metadata()["sha256"])
        tensors = load_file(Path(adapter) / WEIGHTS)
        expected = {key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in tensors.items()}
        assert hashes == expected

    @pytest.mark.parametrize(
        "make, config",
        [
            (llama, LoraConfig(r=4, target_modules=TARGETS, use_dora=True)),
            (opt, LoraConfig(r=4, target_modules=["q_proj"], bias="all")),
            (tied_llama, LoraConfig(r=4, target_modules=["lm_head"], ensure_weight_tying=True)),
            (tied_llama, LoraConfig(r=4, modules_to_save=["lm_head"], ensure_weight_tying=True)),
            (tied_llama, LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[1, 2])),
            (llama, VeraConfig(r=4, target_modules=["q_proj"])),
            (llama, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        ],
        ids=["dora", "biases", "tied target", "tied copy", "tokens", "vera", "prompt"],
    )
    @pytest.mark.parametrize("once", [False, True], ids=["all keys", "once"])
    def test_what_was_saved_is_whole(self, make, config, once, tmp_path, capsys):
        base, adapter = save(tmp_path, make(), config, deduplicate_tied=once)
        status, found = peft(capsys, "verify", adapter, "--base", base)
        assert found["problems"] == []
        assert status == 0

    @pytest.mark.parametrize(
        "change, problem",
        [
            (lambda t, key: t[key].mul_(2), "hash"),
            (lambda t, key: t[key].view(-1)[3:5].fill_(float("nan")), "2 of its 64 entries are not finite"),
            (lambda t, key: t.update({key: torch.zeros(3, 4)}), "shape 3x4"),
            (lambda t, key: t.pop(key), "is missing"),
            (lambda t, key: t.update({key + "2": t.pop(key)}), "belongs to nothing"),
        ],
        ids=["changed", "not finite", "shape", "missing", "renamed"],
    )
    def test_finds_what_is_wrong(self, change, problem, tmp_path, capsys):
        base, adapter = save(tmp_path, llama(), LoraConfig(r=4, target_modules=TARGETS))
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        rewrite(adapter, lambda tensors: change(tensors, key))
        status, found = peft(capsys, "verify", adapter, "--base", base)
        assert status == 1
        assert any(problem in found_one["problem"] for found_one in found["problems"])
        assert main(["verify", adapter, "--base", base]) == 1
        assert problem in capsys.readouterr().out

    def test_finds_ties_that_came_apart(self, tmp_path, capsys):
        config = LoraConfig(r=4, modules_to_save=["lm_head"], ensure_weight_tying=True)
        base, adapter = save(tmp_path, tied_llama(), config)
        rewrite(adapter, lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1))
        status, found = peft(capsys, "verify", adapter, "--base", base)
        assert status == 1
        assert {"tensor": "base_model.model.lm_head.weight"}.items() <= found["problems"][-1].items()
        assert "tied" in found["problems"][-1]["problem"]

    def test_files_without_hashes_are_no_problem(self, tmp_path, capsys):
        _, adapter = save(tmp_path, llama(), LoraConfig(r=4, target_modules=TARGETS))
        path = Path(adapter) / WEIGHTS
        save_file(load_file(path), path, {"format": "pt"})
        status, found = peft(capsys, "verify", adapter)
        assert status == 0
        assert found["hashes"] == "none in the file"


# ------------------------------------------------------------------------------------------ merge
CASES = {
    "lora": (llama, LoraConfig(r=4, target_modules=TARGETS)),
    "ranks": (llama, LoraConfig(r=4, target_modules=TARGETS, rank_pattern={"v_proj": 2}, use_rslora=True)),
    "dora": (llama, LoraConfig(r=4, target_modules=TARGETS, use_dora=True)),
    "tied embedding": (tied_llama, LoraConfig(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
    "tied head": (tied_llama, LoraConfig(target_modules=["lm_head", "q_proj"], ensure_weight_tying=True)),
    "tied copy": (tied_llama, LoraConfig(modules_to_save=["lm_head"], ensure_weight_tying=True)),
    "untied target": (tied_llama, LoraConfig(target_modules=["embed_tokens", "q_proj"])),
    "untied copy": (tied_llama, LoraConfig(modules_to_save=["lm_head"], target_modules=["q_proj"])),
    "tokens": (tied_llama, LoraConfig(target_modules=TARGETS, trainable_token_indices=[1, 2])),
    "conv1d": (gpt2, LoraConfig(target_modules=["c_attn", "wte"], fan_in_fan_out=True, ensure_weight_tying=True)),
    "all biases": (opt, LoraConfig(target_modules=["q_proj"], bias="all")),
    "ia3": (opt, IA3Config(target_modules=["q_proj", "fc2"], feedforward_modules=["fc2"])),
    "head": (bert_classifier, LoraConfig(target_modules=["query"], task_type="SEQ_CLS")),
    "loha": (llama, LoHaConfig(r=4, target_modules=TARGETS)),
    "oft": (llama, OFTConfig(oft_block_size=4, target_modules=["q_proj"])),
    "vera": (llama, VeraConfig(r=4, target_modules=["q_proj"])),
    "adalora": (llama, AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS)),
    "norms": (llama, LNTuningConfig(target_modules=["input_layernorm"])),
}


def in_memory(model_cls: type, base: str, adapter: str, out: Path) -> nn.Module:
    """Merge in memory, save, and load again."""
    model = PeftModel.from_pretrained(model_cls.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(out)
    return model_cls.from_pretrained(out)


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    """Check values, bit for bit, types, ties, and what the config says about ties."""
    one, other = a.state_dict(), b.state_dict()
    assert list(one) == list(other)
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert torch.equal(one[key], other[key]), key
    assert str(weight_tying_report(a)) == str(weight_tying_report(b))
    assert a.config.tie_word_embeddings == b.config.tie_word_embeddings


@pytest.mark.filterwarnings("ignore::peft.PeftWarning")
class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("case", CASES)
    def test_is_the_merge_in_memory(self, case, dtype, tmp_path, capsys):
        make, config = CASES[case]
        model = make().to(dtype)
        base, adapter = save(tmp_path, model, config)
        status, found = peft(capsys, "merge", base, adapter, str(tmp_path / "out"), "--no-progress")
        assert status == 0, found
        assert len(found["files"]) > 1
        merged, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        expected = in_memory(type(model), base, adapter, tmp_path / "memory")
        assert_same_model(merged, expected)
        bare = type(model).from_pretrained(base).state_dict()
        assert any(not torch.equal(bare[key], tensor) for key, tensor in merged.state_dict().items())

    def test_one_file_stays_one_file_and_others_come_along(self, tmp_path, capsys):
        base, adapter = save(tmp_path, llama(), LoraConfig(target_modules=TARGETS), max_shard_size="1GB")
        (Path(base) / "tokenizer.json").write_text("{}")
        (Path(base) / "pytorch_model.bin").write_text("old weights")
        status, found = peft(capsys, "merge", base, adapter, str(tmp_path / "out"), "--no-progress")
        assert status == 0
        assert found["files"] == ["model.safetensors"]
        present = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
        assert set(os.listdir(tmp_path / "out")) == present

    def test_a_head_that_the_base_lacks_is_added(self, tmp_path, capsys):
        base, _ = save(tmp_path, llama(), LoraConfig(target_modules=TARGETS))
        classifier = LlamaForSequenceClassification.from_pretrained(base)
        _, adapter = save(tmp_path / "task", classifier, LoraConfig(target_modules=TARGETS, task_type="SEQ_CLS"))
        status, found = peft(capsys, "merge", base, adapter, str(tmp_path / "out"), "--no-progress")
        assert status == 0
        assert (found["added"], found["left_out"]) == (["score.weight"], ["lm_head.weight"])
        merged = LlamaForSequenceClassification.from_pretrained(tmp_path / "out")
        assert_same_model(merged, in_memory(type(merged), base, adapter, tmp_path / "memory"))
        assert merged.config.architectures == ["LlamaForSequenceClassification"]

    def test_shows_progress_unless_told_not_to(self, tmp_path, capsys):
        base, adapter = save(tmp_path, llama(), LoraConfig(target_modules=TARGETS))
        assert main(["merge", base, adapter, str(tmp_path / "1")]) == 0
        assert "merging: 100%" in capsys.readouterr().err
        assert main(["merge", base, adapter, str(tmp_path / "2"), "--no-progress"]) == 0
        assert "merging" not in capsys.readouterr().err

    def test_goes_on_where_it_was_killed(self, tmp_path, capsys):
        base, adapter = save(tmp_path, llama(), LoraConfig(target_modules=TARGETS))
        out = tmp_path / "out"
        code = f"""
            import os, signal
            from peft.cli import _file_merge, main
            write, written = _file_merge.TensorWriter.copy, []
            finish = _file_merge._Progress.note
            def note(self, name):
                finish(self, name)
                written.append(name)
            def copy(self, *arguments):
                write(self, *arguments)
                if written:  # in the middle of the second file
                    os.kill(os.getpid(), signal.SIGKILL)
            _file_merge._Progress.note, _file_merge.TensorWriter.copy = note, copy
            main(["merge", {base!r}, {adapter!r}, {str(out)!r}])
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
        assert done.returncode == -signal.SIGKILL
        (first,) = out.glob("model-*.safetensors")
        before = first.stat()
        assert not (out / "config.json").exists()
        status, found = peft(capsys, "merge", base, adapter, str(out), "--no-progress")
        assert status == 0
        assert found["finished_before"] == [first.name]
        assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert not [name for name in os.listdir(out) if name.startswith(".") or "progress" in name]
        merged = type(llama()).from_pretrained(out)
        assert_same_model(merged, in_memory(type(merged), base, adapter, tmp_path / "memory"))

    def test_memory_is_at_most_the_largest_file_and_300_mb(self, tmp_path):
        model = llama(hidden_size=512, intermediate_size=4096, vocab_size=8192)
        base, adapter = save(tmp_path, model, LoraConfig(target_modules="all-linear"), max_shard_size="40MB")
        largest = max(path.stat().st_size for path in Path(base).glob("*.safetensors"))
        assert largest > 20e6
        code = f"""
            import resource
            import transformers
            import peft.peft_model, peft.cli._file_merge
            from peft import LoraModel
            transformers.LlamaForCausalLM, LoraModel
            peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            before = peak()
            assert peft.cli.main(["merge", {base!r}, {adapter!r}, {str(tmp_path / "out")!r}, "--no-progress"]) == 0
            print(peak() - before)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.splitlines()[-1]) <= largest + 300e6

    @pytest.mark.parametrize(
        "config, mentions",
        [
            (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "nothing to merge"),
            (LoraConfig(target_modules=TARGETS, init_lora_weights="pissa"), "merge_and_unload"),
            (LoraConfig(target_modules=TARGETS, layer_replication=[[0, 2], [0, 2]]), "merge_and_unload"),
        ],
        ids=["prompt", "pissa", "replication"],
    )
    def test_refuses_what_needs_the_whole_model(self, config, mentions, tmp_path, capsys):
        base, adapter = save(tmp_path, llama(), config)
        status, found = peft(capsys, "merge", base, adapter, str(tmp_path / "out"))
        assert status == 2
        assert mentions in found["error"]
        assert not (tmp_path / "out").exists()

    def test_refuses_folders_that_hold_something_else(self, tmp_path, capsys):
        base, adapter = save(tmp_path, llama(), LoraConfig(target_modules=TARGETS))
        before = sorted(os.listdir(base))
        status, found = peft(capsys, "merge", base, adapter, base)
        assert status == 2
        assert "not an empty folder" in found["error"]
        assert sorted(os.listdir(base)) == before
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "merge_in_progress.json").write_text('{"fingerprint": "other", "finished": []}')
        status, found = peft(capsys, "merge", base, adapter, str(tmp_path / "out"))
        assert status == 2
        assert "other files" in found["error"]

    def test_refuses_files_that_do_not_fit_the_config(self, tmp_path, capsys):
        base, adapter = save(tmp_path, llama(), LoraConfig(target_modules=TARGETS), max_shard_size="1GB")
        path = Path(base) / "model.safetensors"
        tensors = load_file(path)
        for change, mentions in (
            (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "shape (3,)"),
            (lambda t: t.update({"other.weight": t.pop("model.norm.weight")}), "otherwise than the model"),
        ):
            changed = dict(tensors)
            change(changed)
            save_file(changed, path, {"format": "pt"})
            status, found = peft(capsys, "merge", base, adapter, str(tmp_path / "out"))
            assert status == 2
            assert mentions in found["error"]
