# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""The hub: reading adapters from its cache on disk, pushing them, and model cards. Nothing here uses a network."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError
from support.helpers import assert_equal, llama, logits, randomise, token_ids

import peft.utils.hub
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
)
from peft.utils.error import PeftPathError


REPO = "somebody/adapter"
IDS = token_ids()


def adapter_model(seed: int = 2, **config: Any) -> PeftModel:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], **config)).eval()
    randomise(model, seed=seed)
    return model


class Cache:
    """A folder laid out as the hub's client lays out what it has downloaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, repo: str, source: Path, revision: str = "main", commit: str = "c" * 40) -> None:
        root = self.folder / f"models--{repo.replace('/', '--')}"
        shutil.copytree(source, root / "snapshots" / commit)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / revision).write_text(commit)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A cache with an adapter: one at the revision `main`, with another in a subfolder, and one at `v1`."""
    cache = Cache(tmp_path / "hub")
    for seed, revision, digit in ((2, "main", "a"), (3, "v1", "b")):
        model = adapter_model(seed)
        model.add_adapter("other", LoraConfig(r=3, target_modules=["k_proj"]))
        randomise(model, seed=seed)
        model.save_pretrained(tmp_path / revision)
        cache.add(REPO, tmp_path / revision, revision, commit=digit * 40)
    return cache


# ------------------------------------------------------------------------------------------ reading
@pytest.mark.parametrize(
    "place", [{}, {"revision": "v1"}, {"subfolder": "other"}, {"revision": "v1", "subfolder": "other"}]
)
@pytest.mark.parametrize("options", [{}, {"local_files_only": True}, {"token": "hf_x", "torch_dtype": "auto"}])
def test_reading(cache: Cache, tmp_path: Path, place: dict[str, str], options: dict[str, Any]) -> None:
    """Config and tensors are those of the folder that the revision stands for."""
    folder = tmp_path / place.get("revision", "main") / place.get("subfolder", "")
    expected = logits(PeftModel.from_pretrained(llama(), folder), IDS)
    options = {**options, **place, "cache_dir": cache.folder}
    assert PeftConfig.from_pretrained(REPO, **options).r == (3 if "subfolder" in place else 2)
    assert load_peft_weights(REPO, device="cpu", **options).keys() == load_peft_weights(folder, device="cpu").keys()
    model = PeftModel.from_pretrained(llama(), REPO, **options)
    assert_equal(logits(model, IDS), expected)
    model.load_adapter(REPO, "second", **options)
    model.set_adapter("second")
    assert_equal(logits(model, IDS), expected)


def test_reading_a_pickle(cache: Cache, tmp_path: Path) -> None:
    model = adapter_model()
    model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    cache.add("somebody/old", tmp_path / "pickle")
    loaded = PeftModel.from_pretrained(llama(), "somebody/old", cache_dir=cache.folder)
    assert_equal(logits(loaded, IDS), logits(model, IDS))


def test_transformers_reads_it_too(cache: Cache, tmp_path: Path) -> None:
    model = llama()
    model.load_adapter(REPO, adapter_kwargs={"cache_dir": cache.folder, "revision": "v1"})
    assert_equal(logits(model, IDS), logits(PeftModel.from_pretrained(llama(), tmp_path / "v1"), IDS))


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_auto_model(cache: Cache, tmp_path: Path, task: str | None) -> None:
    """Base model and adapter both come from the cache, each at its own revision."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    cache.add("somebody/base", tmp_path / "base", revision="b2")
    model = adapter_model(task_type=task, base_model_name_or_path="somebody/base", revision="b2")
    model.save_pretrained(tmp_path / "tuned")
    cache.add("somebody/tuned", tmp_path / "tuned", revision="t3")
    auto_cls = AutoPeftModelForCausalLM if task else AutoPeftModel
    loaded = auto_cls.from_pretrained("somebody/tuned", revision="t3", cache_dir=cache.folder, local_files_only=True)
    assert_equal(logits(loaded, IDS), logits(model, IDS))
    assert loaded.peft_config["default"].revision == "b2"


@pytest.mark.parametrize(
    ("repo", "place"), [("somebody/nothing", {}), (REPO, {"revision": "v9"}), (REPO, {"subfolder": "nowhere"})]
)
def test_what_is_not_there(cache: Cache, repo: str, place: dict[str, str]) -> None:
    """A model that could not be given an adapter is as it was."""
    base = llama()
    before = set(base.state_dict())
    for read in (
        lambda: PeftConfig.from_pretrained(repo, cache_dir=cache.folder, **place),
        lambda: load_peft_weights(repo, cache_dir=cache.folder, **place),
        lambda: PeftModel.from_pretrained(base, repo, cache_dir=cache.folder, **place),
    ):
        with pytest.raises(PeftPathError, match=f"'{repo}'.*no local folder, and the hub answered"):
            read()
    assert set(base.state_dict()) == before


def test_options_reach_the_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What tells the client where and how to look is passed on; the rest is not."""
    adapter_model().save_pretrained(tmp_path)
    asked = []

    def stand_in_for_hf_hub_download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append((repo_id, filename, options))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stand_in_for_hf_hub_download)
    options = {"revision": "v1", "token": "hf_x", "cache_dir": "there", "subfolder": "deep", "force_download": True}
    PeftModel.from_pretrained(llama(), REPO, low_cpu_mem_usage=True, device_map="auto", **options)
    assert asked == [(REPO, name, options) for name in ("adapter_config.json", "adapter_model.safetensors")]


# ------------------------------------------------------------------------------------------ pushing
class StandInForHub:
    """Stands in for `huggingface_hub.HfApi`: keeps what is uploaded, instead of sending it."""

    def __init__(self, card: str | None = None) -> None:
        self.card, self.calls, self.files = card, {}, {}

    def __call__(self, token: Any = None) -> "StandInForHub":
        self.token = token
        return self

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        self.calls["create_repo"] = options
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls["create_branch"] = options

    def hf_hub_download(self, repo_id: str, filename: str, **options: Any) -> str:
        if self.card is None:
            raise EntryNotFoundError(f"no {filename} in {repo_id}")
        return self.card

    def upload_folder(self, repo_id: str, folder_path: str, **options: Any) -> str:
        self.calls["upload_folder"] = {"repo_id": repo_id, **options}
        folder = Path(folder_path)
        self.files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return f"https://hub/{repo_id}"

    def write(self, folder: Path) -> Path:
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> StandInForHub:
    hub = StandInForHub()
    monkeypatch.setattr(peft.utils.hub, "HfApi", hub)
    return hub


def test_pushing_a_model(hub: StandInForHub, tmp_path: Path) -> None:
    """What is uploaded is what `save_pretrained` writes, and is read back."""
    model = adapter_model()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["k_proj"]))
    assert model.push_to_hub("mine") == "https://hub/me/mine"
    model.save_pretrained(tmp_path / "saved")
    saved = {str(path.relative_to(tmp_path / "saved")) for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert set(hub.files) == saved
    loaded = PeftModel.from_pretrained(llama(), hub.write(tmp_path / "pushed"))
    assert_equal(logits(loaded, IDS), logits(model, IDS))


def test_options_of_pushing(hub: StandInForHub) -> None:
    adapter_model().push_to_hub(
        "mine",
        commit_message="First try",
        commit_description="More",
        private=True,
        token="hf_x",
        revision="v1",
        create_pr=True,
        tags=["poetry"],
        max_shard_size="5GB",
        safe_serialization=False,
    )
    assert hub.token == "hf_x"
    assert hub.calls == {
        "create_repo": {"private": True, "exist_ok": True},
        "create_branch": {"branch": "v1", "exist_ok": True},
        "upload_folder": {
            "repo_id": "me/mine",
            "commit_message": "First try",
            "commit_description": "More",
            "revision": "v1",
            "create_pr": True,
        },
    }
    assert "adapter_model.bin" in hub.files
    assert "- poetry\n" in hub.files["README.md"].decode()


def test_pushing_keeps_the_text_of_a_card(hub: StandInForHub, tmp_path: Path) -> None:
    card = "---\nlicense: mit\n---\n# Poems\n\n## How it was trained\n\nSlowly.\n"
    (tmp_path / "README.md").write_text(card)
    hub.card = str(tmp_path / "README.md")
    adapter_model().push_to_hub("mine", tags=["poetry"])
    pushed = hub.files["README.md"].decode()
    assert pushed.endswith(card.split("---\n")[-1])
    assert "license: mit" in pushed and "library_name: peft" in pushed and "- poetry" in pushed and "- lora" in pushed


def test_pushing_a_config(hub: StandInForHub, tmp_path: Path) -> None:
    config = LoraConfig(r=5, target_modules=["q_proj"])
    config.push_to_hub("mine")
    assert set(hub.files) == {"adapter_config.json"}
    assert hub.calls["upload_folder"]["commit_message"] == "Upload LoraConfig"
    assert PeftConfig.from_pretrained(hub.write(tmp_path)).r == 5


# ------------------------------------------------------------------------------------------ model cards
def card_of(folder: Path, base_name: str | None = None, **config: Any) -> huggingface_hub.ModelCard:
    model = adapter_model(**config)
    if base_name is not None:
        model.get_base_model().name_or_path = base_name
    model.save_pretrained(folder)
    return huggingface_hub.ModelCard.load(folder / "README.md")


def test_metadata(tmp_path: Path) -> None:
    card = card_of(tmp_path, "somebody/base", task_type="CAUSAL_LM")
    assert card.data.to_dict() == {
        "base_model": "somebody/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:somebody/base", "lora", "transformers"],
    }
    assert "Base model: somebody/base" in card.text and "Trained parameters: 128 of" in card.text


@pytest.mark.parametrize("name", ["", "/home/me/checkpoint-10", "./out put/model", "a/b/c"])
def test_a_path_is_no_base_model_for_others(tmp_path: Path, name: str) -> None:
    data = card_of(tmp_path, name).data
    assert data.base_model is None and data.tags == ["lora", "transformers"]


def test_metadata_of_the_user_win(tmp_path: Path) -> None:
    text = "---\nbase_model: my/base\npipeline_tag: summarization\nlanguage: de\ntags:\n- mine\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(text)
    card = card_of(tmp_path, "/tmp/checkpoint", task_type="CAUSAL_LM")
    assert card.data.base_model == "my/base" and card.data.pipeline_tag == "summarization"
    assert card.data.language == "de" and card.data.tags == ["lora", "mine", "transformers"]
    assert card.text.strip() == "# Mine"


def test_another_base_model(tmp_path: Path) -> None:
    """An adapter that was trained anew on another base model says so; words of the user stay."""
    card_of(tmp_path, "somebody/first")
    with open(tmp_path / "README.md", "a", encoding="utf-8") as file:
        file.write("\n## Mine\n")
    card = card_of(tmp_path, "somebody/second")
    assert card.data.base_model == "somebody/second"
    assert card.data.tags == ["base_model:adapter:somebody/second", "lora", "transformers"]
    assert card.text.rstrip().endswith("## Mine")
