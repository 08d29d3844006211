"""What a server allows."""

from dataclasses import dataclass

from sidlm.errors import SidError
from sidlm.post.tools import TOOL_FORMATS


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Limits and settings of a server. Raises SidError for one that cannot be."""

    name: str = "sid"
    """name of the model in the API"""
    max_body_bytes: int = 4_000_000
    """longest request; a longer one is answered with 413"""
    body_seconds: float = 30.0
    """time in which the whole of a request must arrive, else 408"""
    max_new_tokens: int = 4096
    """most tokens that one choice may ask for, and the number where none is asked for and the context has room"""
    max_choices: int = 8
    """most choices (`n`) or prompts of one request"""
    max_queue: int = 64
    """requests that may wait; one more is answered with 429"""
    request_seconds: float = 600.0
    """time for one choice, waiting included; then it ends as "length", or with 503 before its first token"""
    shutdown_seconds: float = 10.0
    """time that requests get to end when the server is told to stop"""
    tool_format: str = "json"
    """how the model is asked to call tools, see sidlm.post.tools"""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_new_tokens", "max_choices", "body_seconds", "request_seconds"):
            if getattr(self, name) <= 0:
                raise SidError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_queue < 0 or self.shutdown_seconds < 0:
            raise SidError("max_queue and shutdown_seconds must not be negative")
        if self.tool_format not in TOOL_FORMATS:
            raise SidError(f"tool_format must be one of {TOOL_FORMATS}, got {self.tool_format!r}")
