"""What can go wrong in the service, as one tree of exceptions.

An error carries its HTTP status and `error_type`, the name that programs know it by, which is its
class's. `gma.service.http.middleware` is the only place that turns one into an answer. Errors cross
processes (a worker raises, a gateway answers), so every argument of a constructor is in `args`:
`gma.service.link.messages` calls the class with them.

    ServiceError              500   to clients, Internal
    ├── BadRequest            400
    │   ├── NotHttp
    │   ├── Empty
    │   ├── NotUtf8
    │   ├── NotJson
    │   └── Undecodable             not what its headers say, or damaged
    ├── Unauthorized          401   no key, or a wrong one
    ├── NotFound              404
    ├── UnknownModel          404
    ├── UnknownSession        404
    ├── MethodNotAllowed      405
    ├── Stalled               408   the client stopped sending
    ├── WrongOffset           409   also of two writers at once, to one of them
    ├── SessionGone           410   expired, or of another model
    ├── TooLarge              413
    ├── TooLong               413   in tokens
    ├── TargetTooLong         414
    ├── UnsupportedContent    415
    ├── Validation            422   well-formed, but not what the contract allows
    ├── BadSnapshot           422   of a session: damaged, forged, or of another model
    ├── Overloaded            429   nothing of the request was processed
    ├── AllowanceSpent        429   the key has sent as much as it may for now
    ├── HeadTooLarge          431
    ├── StepFailed            500   the forward pass that read the document failed
    ├── UnknownTransferCoding 501
    ├── NoSessions            501   none are kept here, or not of such a model
    ├── Unavailable           503
    │   ├── NotReady                starting
    │   ├── ShuttingDown            draining
    │   ├── StoreFailed             where sessions are kept
    │   ├── VersionMismatch         gateway and worker are of different releases
    │   └── UnknownDocument         the worker that held the document's state is gone, or dropped it
    ├── TooLate               504   the client's own deadline passed, or can't be met
    └── StoreFull             507   where sessions are kept
"""

import math
from typing import ClassVar

MOST_RETRY_S = 60
"""Of what is told a client that is to try again later: nobody knows what is in an hour."""


def retry_after(seconds: float) -> int:
    """So long as a client is told it: in whole seconds, from 1 to MOST_RETRY_S."""
    return max(1, math.ceil(min(seconds, MOST_RETRY_S)))


class ServiceError(Exception):
    """The root. `str(error)` is for the client: what is wrong and what to do about it."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "Internal"
    """The name that programs know it by. Every other error has its class's."""

    place: str | None = None
    """Which of a request's texts it is about, if there are several."""

    retry_after_s: int | None = None
    """Seconds until it is worth trying again; None if trying again will not help."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.error_type = cls.__name__

    @property
    def message(self) -> str:
        """All that the client is told: where, and what."""
        return f"{self.place}: {self}" if self.place else str(self)

    @property
    def headers(self) -> dict[str, str]:
        """What the HTTP answer's headers say about it."""
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


class BadRequest(ServiceError):
    """The request cannot be read at all."""

    status = 400


class NotHttp(BadRequest):
    """What came is not a request of HTTP/1.1, or can be read as one in two ways."""


class Empty(BadRequest):
    """A document without a single byte."""

    def __init__(self, message: str = "the document is empty: send at least one byte of text"):
        super().__init__(message)


class NotUtf8(BadRequest):
    """The text is not UTF-8."""

    def __init__(self, offset: int | None = None):
        """`offset` is the byte at which decoding fails, counted from the start of the document."""
        super().__init__(offset)
        self.offset = offset

    def __str__(self) -> str:
        where = "" if self.offset is None else f" at byte {self.offset}"
        return f"the text is not UTF-8{where}: convert it, for example with iconv -t utf-8"


class NotJson(BadRequest):
    """A body that says it is JSON and is not."""


class Undecodable(BadRequest):
    """What came is not compressed, or not a text or file, as the request's headers say, or it is
    damaged."""


class Unauthorized(ServiceError):
    """The request has no API key, or one that does not pass."""

    status = 401

    @property
    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class NotFound(ServiceError):
    """No such route."""

    status = 404


class UnknownModel(ServiceError):
    """No model of this name is served."""

    status = 404


class UnknownSession(ServiceError):
    """There is no such session, or it is another key's."""

    status = 404

    def __init__(
        self, message: str = "there is no such session, or another API key made it: make a new one"
    ):
        super().__init__(message)


class MethodNotAllowed(ServiceError):
    """The route exists, for another method."""

    status = 405

    def __init__(self, asked: str, allow: str):
        """`asked`: the method and the path; `allow`: the methods that the route has."""
        super().__init__(asked, allow)
        self.asked = asked
        self.allow = allow

    def __str__(self) -> str:
        return f"there is no {self.asked}: this route takes {self.allow}"

    @property
    def headers(self) -> dict[str, str]:
        return {"allow": self.allow}


class Stalled(ServiceError):
    """No more of the document came for as long as the service waits."""

    status = 408


class WrongOffset(ServiceError):
    """What is appended does not begin where the session ends: perhaps another writer was faster."""

    status = 409

    def __init__(self, offset: int):
        """`offset`: where it has to begin."""
        super().__init__(offset)
        self.offset = offset

    def __str__(self) -> str:
        return (
            f"the session has {self.offset} bytes: send what follows them, with Upload-Offset: "
            f"{self.offset}"
        )

    @property
    def headers(self) -> dict[str, str]:
        return {"upload-offset": str(self.offset)}


class SessionGone(ServiceError):
    """The session has expired, or what it was read by is no longer served."""

    status = 410


class TooLarge(ServiceError):
    """The document is larger than the limit."""

    status = 413

    def __init__(self, limit_bytes: int):
        super().__init__(limit_bytes)
        self.limit_bytes = limit_bytes

    def __str__(self) -> str:
        return (
            f"the document is larger than the limit of {self.limit_bytes} bytes: split the text, "
            "or raise GMA_MAX_DOCUMENT_BYTES where the service runs"
        )


class TooLong(ServiceError):
    """The document has more tokens than a worker keeps of a whole one."""

    status = 413

    def __init__(self, limit_tokens: int):
        super().__init__(limit_tokens)
        self.limit_tokens = limit_tokens

    def __str__(self) -> str:
        return (
            f"the document has more than {self.limit_tokens} tokens, and this model keeps all of "
            "a document while it reads it: split the text, ask for less with max_tokens, or raise "
            "GMA_PAGE_MEMORY where the service runs"
        )


class TargetTooLong(ServiceError):
    """A request's path and query are longer than the bound."""

    status = 414

    def __init__(self, limit_bytes: int):
        super().__init__(limit_bytes)
        self.limit_bytes = limit_bytes

    def __str__(self) -> str:
        return f"the request's path and query have more than {self.limit_bytes} bytes"


class UnsupportedContent(ServiceError):
    """A content type, or content coding, that the route does not read."""

    status = 415


class Validation(ServiceError):
    """Well-formed, but a field or parameter is unknown or out of range."""

    status = 422


class BadSnapshot(ServiceError):
    """What was sent is not a session's snapshot of this service and its model."""

    status = 422


class Overloaded(ServiceError):
    """Admission is full. Nothing of the request was processed."""

    status = 429
    retry_after_s = 1

    def __init__(self, message: str, retry_after_s: int = 1):
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        message: str = self.args[0]
        return message


class AllowanceSpent(ServiceError):
    """The key has sent as much as it may for now. Nothing of the request was processed."""

    status = 429
    retry_after_s = 1

    def __init__(self, allowance: str, retry_after_s: int):
        super().__init__(allowance, retry_after_s)
        self.allowance = allowance
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return (
            f"this API key's allowance of {self.allowance} is spent: try again in "
            f"{self.retry_after_s} s"
        )


class HeadTooLarge(ServiceError):
    """A request's headers, its trailers, or what stands before a chunk are more than the bound."""

    status = 431


class StepFailed(ServiceError):
    """The forward pass that read the document failed; other documents go on."""


class UnknownTransferCoding(ServiceError):
    """The body is sent in a way that is not undone here."""

    status = 501

    def __init__(self, message: str = "of transfer codings only chunked is read here: send that"):
        super().__init__(message)


class NoSessions(ServiceError):
    """Sessions are not kept here, or can't be with this model or what runs it."""

    status = 501


class Unavailable(ServiceError):
    """The service cannot answer now, and may soon."""

    status = 503
    retry_after_s = 1


class NotReady(Unavailable):
    """No worker has finished its warm-up yet."""

    retry_after_s = 5


class ShuttingDown(Unavailable):
    """The service finishes what it has and takes nothing new."""

    retry_after_s = 5


class UnknownDocument(Unavailable):
    """The worker does not hold the document: it never did, has finished it, or was replaced."""


class StoreFailed(Unavailable):
    """The store of sessions can't be read or written. Nothing of the session has changed."""


class VersionMismatch(Unavailable):
    """A gateway and a worker of different releases, which do not understand each other."""

    retry_after_s = 5


class TooLate(ServiceError):
    """The client's own deadline has passed, or is too soon for the document."""

    status = 504


class StoreFull(ServiceError):
    """The store of sessions has no room. Nothing of the session has changed."""

    status = 507

    def __init__(
        self,
        message: str = "the store of sessions is full, and the session is as it was: delete some",
    ):
        super().__init__(message)
