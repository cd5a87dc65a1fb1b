"""``offramp edge``."""

from __future__ import annotations

import sys
from functools import partial

from offramp.cli.server_options import CLOUD_TOKEN_VARIABLE, EVERYTHING_BEHIND, Edge, read_token
from offramp.errors import AuthenticationError, OffloadError
from offramp.offload.cloud import middle_model
from offramp.offload.edge import EdgeRunner
from offramp.offload.http_link import HttpLink
from offramp.runtime import Bundle, read_bundle
from offramp.runtime.bundle import find_bundle
from offramp.serving.served import RunnerModel
from offramp.serving.server import serve

_FIRST_LOOK_S = 5.0


def edge(asked: Edge) -> None:
    """Serve the whole model, or, on a machine between two others, what is behind a cut."""
    config = asked.server.config
    bundle = read_bundle(find_bundle(asked.run))
    name = asked.server.name_of(bundle.folder)
    runner = _connect(asked, bundle, name)
    try:
        whole = partial(RunnerModel, runner, bundle, keeps_deadlines=True)
        is_first = asked.starts_after == EVERYTHING_BEHIND
        serve([whole(name=name) if is_first else middle_model(runner, name)], config)
    finally:
        runner.close()


def _connect(asked: Edge, bundle: Bundle, name: str) -> EdgeRunner:
    """An edge part with a link to a cloud; one that is not there yet may come later."""
    link = HttpLink(
        asked.cloud,
        bundle,
        name=name,
        split_after=asked.split_after,
        token=read_token(asked.cloud_token_file, CLOUD_TOKEN_VARIABLE),
        ca_file=asked.cloud_ca,
    )
    try:
        runner = EdgeRunner(
            bundle,
            split_after=asked.split_after,
            link=link,
            starts_after=asked.starts_after,
            config=asked.offloading,
            threads=asked.server.threads,
        )
        try:
            link.check(timeout_s=_FIRST_LOOK_S)
        except AuthenticationError:
            raise
        except OffloadError as error:
            print(f"offramp: the cloud is not there yet: {error}", file=sys.stderr)
    except BaseException:
        link.close()
        raise
    return runner
