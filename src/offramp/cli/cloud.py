"""``offramp cloud``."""

from __future__ import annotations

from offramp.cli.server_options import Cloud
from offramp.errors import InvalidArgumentError
from offramp.offload.cloud import cloud_models
from offramp.runtime import read_bundle
from offramp.runtime.bundle import find_bundle
from offramp.runtime.part import PartSession, cuts
from offramp.serving import server


def cloud(asked: Cloud) -> None:
    """Serve what is behind a cut until a signal comes."""
    config = asked.server.config
    bundle = read_bundle(find_bundle(asked.run))
    behind = cuts(bundle)[:-1]
    if asked.split_after not in behind:
        raise InvalidArgumentError(
            f"--split-after must be one of {', '.join(map(str, behind))}, the cuts of "
            f"{bundle.folder} with something behind them. Got {asked.split_after}."
        )
    session = PartSession(bundle, starts_after=asked.split_after, threads=asked.server.threads)
    server.serve(cloud_models(session, asked.server.name_of(bundle.folder)), config)
