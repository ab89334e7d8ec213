"""What there is to encode: the videos of a folder, a pattern, a table or tars, and their clips."""

from reducio_latents.corpus.entry import VIDEO_EXTENSIONS, CorpusVideo
from reducio_latents.corpus.listing import corpus_root, list_corpus

__all__ = ["VIDEO_EXTENSIONS", "CorpusVideo", "corpus_root", "list_corpus"]
