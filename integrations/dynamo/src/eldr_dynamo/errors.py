"""What the errors of Dynamo's Python client mean.

The client forgets their types: it raises ValueError in a stream, and Exception before one, with the name of Dynamo's
class of errors (`ErrorClass`) in front of the text. If a ValueError were raised again, the frontend would blame the
client for it. Texts are those of Dynamo 1.6.
"""

from __future__ import annotations

from dataclasses import dataclass

# Nothing has been sent to the worker.
REFUSALS = ("TCP connection to ", "Worker removed before request could be sent")
# Classes in which the worker is to blame, with the reason in our metrics.
FAULTS = {"Unavailable": "failed", "Internal": "status"}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a worker did not complete a request.

    kind: Dynamo's class. text: for people.
    refused: whether nothing has been sent to the worker.
    fault: the reason in metrics, if the worker is to blame. Empty if not.
    """

    kind: str
    text: str
    refused: bool = False
    fault: str = ""


def read_error(error: Exception, sent: bool) -> Failure | None:
    """Return what an error of the client means. None if it is of a type of its own, which says all.

    sent: whether the worker has accepted the request.
    """
    if type(error) not in (Exception, ValueError):
        return None
    kind, _, text = str(error).partition(": ")
    refused = not sent and text.startswith(REFUSALS)
    return Failure(kind, text, refused, "refused" if refused else FAULTS.get(kind, ""))
