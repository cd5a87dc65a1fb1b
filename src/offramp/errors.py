"""Every error that Offramp raises on purpose.

    OfframpError
      InvalidArgumentError(ValueError)     an argument is out of range or of the wrong kind
        ShapeError                         a tensor has the wrong shape
      BackboneCutError(ValueError)         the backbone cannot be cut there
      NotCalibratedError(RuntimeError)     a policy is needed and none was set
      InfeasibleTargetError(ValueError)    no thresholds reach the target; carries best_achievable
      DataError(ValueError)                a data set or file is unreadable or inconsistent
        DataNotFoundError(FileNotFoundError)
        InSampleError                      a report on the data that chose the thresholds
      TrainingDivergedError(RuntimeError)  the training loss is no longer finite
      ArtifactError(ValueError)            a run is corrupt, foreign, too new, or exists already
      ExportMismatchError(RuntimeError)    a bundle answers otherwise than the network it is of
      OffloadError(ConnectionError)        the other machine did not answer, or would not
        LinkTimeoutError                   no answer in time
        ServerBusyError                    the server takes no more work now; try again later
        AuthenticationError                the token is missing or wrong
      PayloadError(ValueError)             what came over a link is damaged or not allowed
      MissingExtraError(ImportError)       an optional dependency is missing; says what to install

Beside them stands FewSamplesWarning: a policy was chosen on samples that cannot tell its target.

A message says what was expected, what came, and what to do. The command line prints it as one
line and exits with code 2.
"""

from __future__ import annotations


class OfframpError(Exception):
    """Base of all errors that Offramp raises on purpose."""


class InvalidArgumentError(OfframpError, ValueError):
    """An argument is out of range or of the wrong kind."""


class ShapeError(InvalidArgumentError):
    """A tensor has the wrong shape."""


class BackboneCutError(OfframpError, ValueError):
    """The backbone cannot be cut at the requested place."""


class NotCalibratedError(OfframpError, RuntimeError):
    """A policy is needed and none was set."""


class InfeasibleTargetError(OfframpError, ValueError):
    """No thresholds reach the target.

    Args:
        message: What was asked and what is possible.
        best_achievable: The nearest value that can be reached, in the unit of the target.
    """

    def __init__(self, message: str, *, best_achievable: float) -> None:
        super().__init__(message)
        self.best_achievable = best_achievable


class DataError(OfframpError, ValueError):
    """A data set or an input file is unreadable or inconsistent."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A data set or an input file is not where it was looked for."""


class InSampleError(DataError):
    """A report was asked for on the data that chose the thresholds."""


class TrainingDivergedError(OfframpError, RuntimeError):
    """The training loss is no longer finite."""


class ArtifactError(OfframpError, ValueError):
    """A run folder or one of its files is corrupt, foreign, too new, or exists already."""


class ExportMismatchError(OfframpError, RuntimeError):
    """A bundle answers otherwise than the network it was exported from; says which exit."""


class OffloadError(OfframpError, ConnectionError):
    """Another machine did not answer, or would not."""


class LinkTimeoutError(OffloadError):
    """An answer did not come in time: the link or the server was too slow for the deadline."""


class ServerBusyError(OffloadError):
    """The server takes no more work now; trying again later may help."""


class AuthenticationError(OffloadError):
    """The server wants a token, and none or a wrong one was sent."""


class PayloadError(OfframpError, ValueError):
    """A payload of a link is damaged, too large, or of a kind that is not allowed."""


class MissingExtraError(OfframpError, ImportError):
    """An optional dependency is missing; the message holds the command that installs it."""


def missing_extra(what: str, error: ModuleNotFoundError) -> MissingExtraError:
    """Say which command installs the package that ``what`` needs.

    Args:
        what: A public name or a command, to begin the sentence.
        error: Raised by an import; one of Offramp's own modules is a fault and raised as it is.
    Returns:
        An error to raise, or to print.
    """
    package = (error.name or "").partition(".")[0]
    if package == "offramp":
        raise error
    extra = next((extra for extra, known in _EXTRAS.items() if package in known), "train")
    return MissingExtraError(
        f"{what} needs {error.name}, which is not installed: pip install 'offramp[{extra}]'"
    )


_EXTRAS = {
    "serve": ("aiohttp", "google", "grpc", "prometheus_client", "tritonclient", "zstandard"),
    "calibrate": ("pyarrow", "scipy"),
}
"""Packages by the extra that brings them; all others that may be missing come with ``train``."""


class FewSamplesWarning(UserWarning):
    """A policy was chosen on so few samples that they cannot tell whether its target holds."""


def reason(error: BaseException) -> str:
    """Quote an error in one line, for a message of ours.

    Args:
        error: Any exception.
    Returns:
        The first line of its text; its class where it has none.
    """
    return next(iter(str(error).splitlines()), type(error).__name__)
