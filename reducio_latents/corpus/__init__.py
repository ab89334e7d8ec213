"""What there is to encode: the videos of a folder, a pattern, a table or tars, by name."""

from reducio_latents.corpus.entry import VIDEO_EXTENSIONS, CorpusVideo, Scalar
from reducio_latents.corpus.listing import corpus_root, list_corpus
from reducio_latents.corpus.trees import join_url

__all__ = [
    "VIDEO_EXTENSIONS",
    "CorpusVideo",
    "Scalar",
    "corpus_root",
    "join_url",
    "list_corpus",
]
