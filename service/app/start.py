"""What keeps the service from starting, told in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gma.service.http.keys import Keys
from gma.service.model_folder import ModelFolder
from gma.service.observe import traces
from gma.service.sessions.choice import store_of
from gma.service.settings import Settings

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview


class StartError(Exception):
    """The service can't start; the message says why in one line."""


def check(settings: Settings) -> None:
    """Raises StartError for files that can't be used, which a replica would tell less well."""
    try:
        if settings.api_keys_file:
            Keys.load(settings.api_keys_file)
        traces.check()
        store_of(settings)
    except ValueError as error:
        raise StartError(str(error)) from error


def check_model(settings: Settings) -> None:
    """Raises StartError for a model's folder that can't be used."""
    try:
        ModelFolder.of(settings)
    except (OSError, ValueError) as error:
        raise StartError(str(error)) from error


@contextmanager
def in_one_line() -> Iterator[None]:
    """What goes wrong within is raised as a StartError, whatever Ray or the system raised."""
    try:
        yield
    except StartError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise StartError(f"{type(error).__name__}: {lines[0]}") from error


def cannot_listen(host: str, port: int, error: OSError) -> StartError:
    """The error to raise if an address can't be listened on."""
    return StartError(
        f"can't listen on {host}:{port}: {error.strerror}. "
        "GMA_HOST and GMA_PORT choose another address"
    )


def reason(application: ApplicationStatusOverview) -> str:
    """Why an application of Serve's failed, in one line.

    That is a replica's StartError; or else the last exception of a deployment that failed; or else
    what Serve says of the application.
    """
    deployments = application.deployments
    messages = "\n".join(deployment.message for deployment in deployments.values())
    if told := re.search(rf"{StartError.__name__}: (.+)", messages):
        return told[1]
    for name, deployment in deployments.items():
        if deployment.status == "DEPLOY_FAILED" and deployment.message:
            return f"the deployment {name} failed: {last_exception(deployment.message)}"
    return " ".join(application.message.split())


def last_exception(message: str) -> str:
    """The first line of the last exception in a deployment's message.

    The message ends with the traceback of its constructor, or, if the replica's process ended, with
    the exception that its caller got.
    """
    frames = list(re.finditer(r'^  File ".+", line \d+.*$', message, re.MULTILINE))
    if not frames:
        return message.rstrip().rpartition("\n")[2]
    # A frame's source is indented; what was raised is not.
    raised = re.search(r"^\S.*$", message[frames[-1].end() :], re.MULTILINE)
    return raised[0] if raised else frames[-1][0].strip()
