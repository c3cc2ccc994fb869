"""The errors of the server that have a status and a code of their own."""

from __future__ import annotations

from far_runtime.errors import FarError


class QueueFull(FarError):
    """The queue has no room for a request's pictures."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"the queue is full: {waiting} pictures are waiting; try again in {retry_after:.0f} s")
        self.retry_after = retry_after
        """Seconds after which there should be room."""


class ShuttingDown(FarError):
    """The server takes no more requests."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; try again in a moment, or send the request to another server")


class GenerationFailed(FarError):
    """A picture could not be drawn; the reason is for the server's log alone."""

    def __init__(self, message: str = "the server failed to draw this request; its log says why") -> None:
        super().__init__(message)


class OutOfRange(GenerationFailed):
    """The latents of a picture are not finite."""

    def __init__(self) -> None:
        super().__init__("the picture's latents are not finite; try less guidance, or another preset")


class DeadlineExceeded(FarError):
    """A picture was not drawn in time."""


class ModelNotFound(FarError):
    """The server has no model of that name."""
