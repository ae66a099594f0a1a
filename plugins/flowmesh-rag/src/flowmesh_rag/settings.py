"""What the operator sets."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, field_validator

from flowmesh_core import CommaSeparated, NetworkPolicy
from flowmesh_rag.fields import Count

__all__ = ["RagSettings"]


class RagSettings(BaseModel):
    """What the operator decides.

    Attributes:
        folder: Root of embedded stores, absolute; each owner has a folder of its own in it.
        http_allow: Hosts that tasks may talk to; the variable that the core reads for downloads.
        trust_remote_code: Whether documents may have a repository's own code run; likewise.
        threads: Of the embedding model on a CPU; without it, as many as torch takes.
        max_file_bytes: The largest document that is read.
        max_pages: The most pages of one.
        max_text_chars: The longest text of one.
        max_chunks: The most chunks of one task.
    """

    folder: Path = Field(
        default=Path("~/.local/share/flowmesh/rag"), alias="FLOWMESH_RAG_DIR", validate_default=True
    )
    http_allow: CommaSeparated = Field(default=(), alias="FLOWMESH_HTTP_ALLOW")
    trust_remote_code: bool = Field(default=False, alias="FLOWMESH_TRUST_REMOTE_CODE")
    threads: Count | None = Field(default=None, alias="FLOWMESH_RAG_THREADS")
    max_file_bytes: Count = Field(default=64 * 2**20, alias="FLOWMESH_RAG_MAX_FILE_BYTES")
    max_pages: Count = Field(default=5000, alias="FLOWMESH_RAG_MAX_PAGES")
    max_text_chars: Count = Field(default=50_000_000, alias="FLOWMESH_RAG_MAX_TEXT_CHARS")
    max_chunks: Count = Field(default=200_000, alias="FLOWMESH_RAG_MAX_CHUNKS")

    @field_validator("folder")
    @classmethod
    def _is_absolute(cls, value: Path) -> Path:
        path = value.expanduser()
        if not path.is_absolute():  # an executor's process has another working folder
            raise ValueError(f"must be an absolute path, got {str(value)!r}")
        return path

    @property
    def policy(self) -> NetworkPolicy:
        """The operator's rules for the network."""
        return NetworkPolicy(allow=self.http_allow)
