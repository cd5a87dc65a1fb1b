"""``offramp serve``."""

from __future__ import annotations

from offramp.cli.server_options import Serve
from offramp.runtime import Session, read_bundle
from offramp.runtime.bundle import find_bundle
from offramp.serving import server
from offramp.serving.served import RunnerModel


def serve(asked: Serve) -> None:
    """Serve a bundle until a signal comes."""
    config = asked.server.config
    bundle = read_bundle(find_bundle(asked.run))
    session = Session(bundle, threads=asked.server.threads)
    server.serve([RunnerModel(session, bundle, name=asked.server.name_of(bundle.folder))], config)
