"""Encoding: a corpus in, a store out."""

from reducio_latents.encode.add import add_column
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.report import EncodeReport, Tally
from reducio_latents.encode.run import encode_corpus, plan_corpus

__all__ = ["EncodeOptions", "EncodeReport", "Tally", "add_column", "encode_corpus", "plan_corpus"]
