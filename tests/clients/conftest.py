# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""What the tests of real clients share. The name of each test says which client it ran with, and in which version."""

from importlib.metadata import PackageNotFoundError, version

import pytest


SENTENCES = [
    "a tied weight is one tensor under two names",
    "the head reads the embedding of the model",
    "an adapter learns a small change of a weight",
    "two names of one tensor stay one after training",
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Name every test after the client of its module."""
    name = metafunc.module.CLIENT
    try:
        metafunc.parametrize("client", [f"{name}-{version(name)}"], indirect=True)
    except PackageNotFoundError:
        missing = pytest.param(name, marks=pytest.mark.skip(reason=f"{name} is not installed"))
        metafunc.parametrize("client", [missing], indirect=True)


@pytest.fixture(autouse=True)
def client(request: pytest.FixtureRequest, record_property) -> str:
    """The client and its version, which reports in XML hold too."""
    record_property("client", request.param)
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer that knows the words of the sentences; it fits the models of `tied_models`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=list(special.values())))
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **special)


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """What there is to learn."""
    return SENTENCES
