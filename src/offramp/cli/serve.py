"""``offramp serve``."""

from __future__ import annotations

from offramp.cli.options import RunOrBundle
from offramp.cli.server_options import (
    GraceOption,
    GrpcPortOption,
    HostOption,
    HttpPortOption,
    MaxBatchOption,
    MaxDelayOption,
    MaxPayloadOption,
    MaxQueueOption,
    NameOption,
    ThreadsOption,
    TlsCertOption,
    TlsKeyOption,
    TokenFileOption,
    default_name,
    needs_extra,
    server_config,
)
from offramp.workflow.artifact import find_bundle


def serve(
    run: RunOrBundle,
    name: NameOption = None,
    host: HostOption = "127.0.0.1",
    http_port: HttpPortOption = 8000,
    grpc_port: GrpcPortOption = 8001,
    token_file: TokenFileOption = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    threads: ThreadsOption = None,
    max_payload_mb: MaxPayloadOption = 16.0,
    max_batch_rows: MaxBatchOption = 256,
    max_queue_rows: MaxQueueOption = 1024,
    max_delay_ms: MaxDelayOption = 2.0,
    grace_s: GraceOption = 10.0,
) -> None:
    """Serve a bundle over the Open Inference Protocol V2, HTTP and gRPC; tritonclient speaks it."""
    with needs_extra("serve", "serve"):
        from offramp.serving import server
    from offramp.runtime import Session, read_bundle
    from offramp.serving.served import RunnerModel

    config = server_config(
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        token_file=token_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        max_payload_mb=max_payload_mb,
        max_batch_rows=max_batch_rows,
        max_queue_rows=max_queue_rows,
        max_delay_ms=max_delay_ms,
        grace_s=grace_s,
    )
    bundle = read_bundle(find_bundle(run))
    session = Session(bundle, threads=threads)
    server.serve([RunnerModel(session, bundle, name=name or default_name(bundle.folder))], config)
