"""Prompt banks: what is read from a text, what a file keeps, and what is refused."""
import pytest
import torch
from helpers_tiny import random_bank

from wanlite_model.errors import WanLiteError
from wanlite_model.prompts import PromptBank, parse_prompts, trim


def test_prompts_are_lines_without_blanks_comments_and_repetitions():
    assert parse_prompts("  a cat \n\n# not this\na dog\na cat\n") == ("a cat", "a dog")
    with pytest.raises(WanLiteError, match="no prompts"):
        parse_prompts(" \n# only a comment\n")


def test_padding_is_trimmed_and_comes_back_as_zeros():
    context = torch.zeros(1, 512, 4096)
    context[0, :3] = 1.0
    bank = PromptBank(prompts=("one", "two"), contexts=(context, torch.ones(5, 4096)), negative_text="", negative=torch.zeros(1, 512, 4096))
    assert [len(c) for c in bank.contexts] == [3, 5] and len(bank.negative) == 1
    assert torch.equal(bank.cond([0]).context[0], torch.ones(3, 4096))
    both = bank.cond([0, 1]).context
    assert both.shape == (2, 5, 4096) and not both[0, 3:].any()
    assert bank.negative_cond([0, 1, 0, 1]).context.shape == (4, 1, 4096)


def test_a_bank_survives_its_file(tmp_path):
    bank = random_bank(3)
    bank.save(tmp_path / "bank.safetensors")
    again = PromptBank.load(tmp_path / "bank.safetensors")
    assert again.prompts == bank.prompts and again.fingerprint == bank.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]


def test_the_fingerprint_follows_the_embeddings_and_not_the_spelling():
    bank = random_bank(3)
    renamed = PromptBank(prompts=("x", "y", "z"), contexts=bank.contexts, negative_text="other", negative=bank.negative)
    swapped = PromptBank(prompts=bank.prompts, contexts=bank.contexts[::-1], negative_text="", negative=bank.negative)
    unguided = PromptBank(prompts=bank.prompts, contexts=bank.contexts, negative_text="", negative=bank.negative * 2)
    assert renamed.fingerprint == bank.fingerprint
    assert len({bank.fingerprint, swapped.fingerprint, unguided.fingerprint}) == 3


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all", None])
def test_a_file_that_is_no_bank_gets_a_sentence(tmp_path, content):
    path = tmp_path / "bank.safetensors"
    if content is None:
        from safetensors.torch import save_file
        save_file({"weight": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(WanLiteError, match="not a WanLite prompt bank"):
        PromptBank.load(path)


@pytest.mark.parametrize("shape", [(1, 77, 768), (5, 1024), (2, 3, 4096)])
def test_an_embedding_that_is_not_wans_is_refused(shape):
    with pytest.raises(WanLiteError, match="umt5"):
        trim(torch.zeros(shape))


@pytest.mark.parametrize("context", [torch.full((2, 4096), float("nan")), torch.ones(0, 4096), torch.ones(2, 4096, dtype=torch.int64), torch.ones(5000, 4096)])
def test_an_embedding_that_is_empty_or_no_numbers_is_refused(context):
    with pytest.raises(WanLiteError, match="rows of .*Encode the prompts again"):
        trim(context)


def test_a_prompt_longer_than_wan_reads_is_refused_and_mere_padding_is_not():
    assert trim(torch.zeros(600, 4096)).shape == (1, 4096)
    with pytest.raises(WanLiteError, match="600 tokens.*512.*Shorten"):
        trim(torch.ones(600, 4096))


def test_a_bank_needs_a_prompt_and_an_embedding_for_each():
    with pytest.raises(WanLiteError, match="2 prompts and 1 embeddings"):
        PromptBank(prompts=("a", "b"), contexts=(torch.ones(1, 4096),), negative_text="", negative=torch.ones(1, 4096))
