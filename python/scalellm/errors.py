"""Every error that ScaleLLM raises on purpose.

    ScaleLLMError
    |-- ConfigError            a setting that cannot be: unknown, of the wrong type, out of range
    |-- ModelError             the model cannot be served
    |   |-- ModelNotFoundError     no such folder or hub id, or a file of it is missing
    |   |-- ModelFileError         a file is truncated, damaged, or does not fit the others
    |   |-- UnsupportedModelError  an architecture, dtype or feature that is not there
    |   `-- OutOfMemoryError       does not fit: says needed, available, and which flag helps
    |-- RequestError           a request's field is wrong (also a ValueError)
    |-- EngineError            an engine could not start, or ended while it was needed
    |-- ServeError             the deployment could not start or be kept running
    |   `-- AddressInUseError      the port or socket belongs to somebody else
    `-- EndpointError          a client command could not talk to an endpoint

The command line prints the message alone and exits with `exit_code`: 2 where the caller has to
change what was asked for, 1 where it was fine and failed.
"""

from typing import ClassVar


class ScaleLLMError(Exception):
    """Root of the tree; its message is one a user can act on."""

    exit_code: ClassVar[int] = 1


class ConfigError(ScaleLLMError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""

    exit_code = 2


class ModelError(ScaleLLMError):
    """The model cannot be served."""


class ModelNotFoundError(ModelError):
    """There is no such folder or hub id, or it lacks a needed file."""

    exit_code = 2


class ModelFileError(ModelError):
    """A file is truncated, damaged, or does not fit the configuration."""


class UnsupportedModelError(ModelError):
    """The architecture, or a feature it needs, is not implemented."""


class OutOfMemoryError(ModelError):
    """Weights or KV cache do not fit; the message says needed, available, and which flag helps."""


class RequestError(ScaleLLMError, ValueError):
    """A field of a request is wrong; the message names it, what it got and what is allowed."""

    exit_code = 2


class EngineError(ScaleLLMError):
    """An engine could not start, or ended while it was needed."""


class ServeError(ScaleLLMError):
    """The deployment could not start or could not be kept running."""


class AddressInUseError(ServeError):
    """The port or socket belongs to another process."""


class EndpointError(ScaleLLMError):
    """A client command could not reach an endpoint, or the endpoint refused."""
