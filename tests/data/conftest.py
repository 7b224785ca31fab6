"""What the data tests share: real files, a real tokenizer, and a small word-level one."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = ["[UNK]", "[PAD]", "[END]", "a", "b", "c", "d", "e", "f", "good", "bad", "fine", "film", "is", "the", "not"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real texts, which is not part of the repository."""
    folder = Path(os.environ.get("SLIMTUNE_SHARED", ROOT.parent / "shared")) / "data" / "text"
    if not folder.is_dir():
        pytest.skip(f"the real texts are not here: {folder} (set SLIMTUNE_SHARED)")
    return folder


@pytest.fixture(scope="session")
def minilm():
    """The real tokenizer of the packaged MiniLM."""
    from slimtune.errors import ExtraError
    from slimtune.io.models import load_tokenizer

    try:
        return load_tokenizer("minilm")
    except ExtraError as error:
        pytest.skip(str(error))


@pytest.fixture
def words():
    """A tokenizer that ends a text with nothing, has [END], and no padding token, as GPT-2's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="[END]", model_max_length=512)
