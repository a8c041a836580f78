"""What downloading from the model hub can fail with."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError

# Wrong ids and answers that are no JSON are ValueErrors. The others are the hub's own error and what it descends from:
# OSError, and the root of the errors of whichever HTTP client the hub uses and lets through.
HUB_ERRORS = (
    ValueError,
    *(kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind is not Exception),
)


def reason_of(error: Exception) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
