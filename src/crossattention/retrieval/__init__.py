"""RETRO's chunk database: chunks of text, their embeddings and nearest neighbours, searches; explicit files, restartable steps."""

from crossattention.retrieval.building import Built, Settings, build
from crossattention.retrieval.chunks import Chunks, cut, longest_common_run
from crossattention.retrieval.database import Database, Neighbours
from crossattention.retrieval.documents import Problems
from crossattention.retrieval.embed import ChunkTexts, Embedder, NgramConfig, NgramEmbedder, embedder_sha256

__all__ = [
    "Built",
    "ChunkTexts",
    "Chunks",
    "Database",
    "Embedder",
    "Neighbours",
    "NgramConfig",
    "NgramEmbedder",
    "Problems",
    "Settings",
    "build",
    "cut",
    "embedder_sha256",
    "longest_common_run",
]
