"""Moved to reducio_latents.files: import from there; this module goes away."""

from reducio_latents.files import Buffer as Buffer
from reducio_latents.files import Files as Files
from reducio_latents.files import LocalFiles as LocalFiles
from reducio_latents.files import open_files as open_files
