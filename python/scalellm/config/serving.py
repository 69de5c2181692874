"""Settings of what is around the replicas: gateway, deployment, its shape, logs, and clients."""

from dataclasses import dataclass
from pathlib import Path

from scalellm.errors import ConfigError
from scalellm.settings import SERVERS, check_fields, setting

_CLIENTS = ("chat", "complete", "status", "bench", "profile")
_ACCOUNTS = ("keys", "usage")
_SHAPED = ("serve", "simulate")


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The HTTP front of `serve`."""

    host: str = setting("127.0.0.1", "Address to listen on", ("serve", "doctor"))
    port: int = setting(
        8000, "Port; 0 takes a free one", ("serve", "doctor"), minimum=0, maximum=65535
    )
    api_key: tuple[str, ...] = setting(
        (),
        "Key that clients must send; may be given several times",
        ("serve", *_CLIENTS),
        secret=True,
    )
    database_url: str | None = setting(
        None,
        "Keys, quotas and usage: postgres://..., sqlite:PATH, or sqlite for the user's data folder",
        ("serve", *_ACCOUNTS),
        secret=True,  # it may hold a password
    )
    database_down: str = setting(
        "open",
        "While that database does not answer, known keys go on (`open`) or get 503 (`closed`)",
        ("serve",),
        choices=("open", "closed"),
    )
    admin_key: tuple[str, ...] = setting(
        (),
        "Key for /admin/v1; without one it answers this machine alone",
        ("serve", "status", "profile", *_ACCOUNTS),
        secret=True,
    )
    otlp_endpoint: str | None = setting(
        None, "Collector of OpenTelemetry traces, OTLP over HTTP: http://HOST:4318", ("serve",)
    )
    otlp_sample_ratio: float = setting(
        1.0,
        "Of the requests whose client says nothing of tracing, the share that is traced",
        ("serve",),
        minimum=0,
        maximum=1,
    )
    chat_template: str | None = setting(
        None, "File with a chat template to use instead of the model's", ("serve",)
    )
    safety_file: str | None = setting(
        None, "File with safety hooks, checks of requests and answers (docs/safety.md)", ("serve",)
    )
    tls_cert: str | None = setting(
        None, "File with the certificate chain, in PEM; with it clients speak https", ("serve",)
    )
    tls_key: str | None = setting(None, "File with its private key, in PEM", ("serve",))
    max_body_bytes: int = setting(
        16 * 2**20, "Largest request body", ("serve",), minimum=1024, maximum=2**31
    )
    max_in_flight: int = setting(
        2048, "Choices generated at once, at most", ("serve",), minimum=1, maximum=1_000_000
    )
    max_queued: int = setting(
        1024,
        "Requests that may wait for their turn; more get 503",
        ("serve",),
        minimum=0,
        maximum=1_000_000,
    )
    routing: str = setting(
        "prefix",
        "How a replica is chosen: `prefix` by what it has cached and its load, `least-load` by "
        "load alone, `shape` by width, `session` to stay (docs/routing.md)",
        ("serve",),
        choices=("prefix", "least-load", "shape", "session"),
    )
    request_timeout_s: float = setting(
        3600.0, "Longest life of one request; 0: no limit", ("serve",), minimum=0, maximum=86_400
    )
    replay: bool = setting(
        True,
        "Requests whose replica dies go on at another one, or at the same once it is restarted",
        ("serve",),
    )
    replay_wait_s: float = setting(
        60.0, "How long they wait for that replica", ("serve",), minimum=0, maximum=86_400
    )
    replica_wait_s: float = setting(
        0.0,
        "How long a new request waits for a replica where none is there; 0: it gets 503",
        ("serve",),
        minimum=0,
        maximum=86_400,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("cert", "key") if self.tls_cert else ("key", "cert")
            raise ConfigError(f"--tls-{missing}: missing, needed with --tls-{given}")


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What is written to standard error."""

    log_level: str = setting(
        "info",
        "Least severity that is logged",
        ("serve", "engine", *_CLIENTS, "doctor"),
        choices=("debug", "info", "warning", "error"),
    )
    log_format: str = setting("text", "Form of log lines", SERVERS, choices=("text", "json"))

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class DeploymentConfig:
    """The process tree of `serve`."""

    replicas: int = setting(1, "Engines to run", ("serve",), minimum=1, maximum=1024)
    blueprint: str = setting(
        "static",
        "Whether the replicas' shape is fixed, or follows the load",
        ("serve",),
        choices=("static", "auto"),
    )
    launcher: str = setting(
        "local",
        "What starts the replicas: this machine, a Ray cluster, or Kubernetes, for which the Helm "
        "chart's values are printed (docs/launchers.md)",
        ("serve",),
        choices=("local", "ray", "kubernetes"),
    )
    ray_address: str = setting(
        "auto",
        "Ray cluster of `--launcher ray`: HOST:PORT of its head; `auto`: the one that this machine "
        "is part of",
        ("serve",),
    )
    drain_timeout_s: float = setting(
        30.0,
        "How long running requests may go on after the first Ctrl-C or SIGTERM",
        ("serve",),
        minimum=0,
        maximum=86_400,
        flag="--drain-timeout",
    )
    start_timeout_s: float = setting(
        1800.0, "How long an engine may take to load", ("serve",), above=0, maximum=86_400
    )
    hung_after_s: float = setting(
        30.0, "Age of a step after which an engine is killed", ("serve",), minimum=1, maximum=86_400
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class BlueprintConfig:
    """Which shape the deployment has, and what would make it change."""

    devices: int | None = setting(
        None,
        "Devices to divide among the replicas, GPUs or on a CPU cores; default: all, in a "
        "simulation those of the widest calibrated shape",
        _SHAPED,
        minimum=1,
        maximum=1024,
    )
    replica: tuple[str, ...] = setting(
        (), "tp=WIDTH,count=NUMBER: replicas of one shape; may be given several times", _SHAPED
    )
    objective: str = setting(
        "latency",
        "What `auto` improves: time a token takes, tokens a second, or requests within objectives",
        _SHAPED,
        choices=("latency", "throughput", "slo"),
    )
    slo_ttft_ms: float = setting(
        1000.0, "Objective for the time to first token", _SHAPED, above=0, maximum=3_600_000
    )
    slo_tbt_ms: float = setting(
        50.0, "Objective for the time between tokens", _SHAPED, above=0, maximum=3_600_000
    )
    min_stay_s: float = setting(
        30.0, "Least time between two changes of shape", _SHAPED, minimum=0, maximum=86_400
    )
    switch: str = setting(
        "auto",
        "When replicas of a new shape take memory: `beside` the old ones, which serve until then, "
        "or `after` they are gone, while requests wait; `auto`: after, where --kv-cache-memory "
        "does not fit twice on a CPU",
        ("serve",),
        choices=("auto", "beside", "after"),
    )
    hand_over_s: float = setting(
        20.0,
        "How long a replica of the old shape may take to hand its requests on, a few at a time; "
        "what is left then goes on at the new ones at once",
        ("serve",),
        minimum=0,
        maximum=25,
    )
    journal: str | None = setting(
        None,
        "File that each decision of `auto` is appended to, as JSON lines; `none`: no file; "
        "default: a new one in scalellm/journals in the user's state folder, in a simulation none",
        _SHAPED,
    )
    calibration: str | None = setting(
        None,
        "Costs of steps by shape: a file, or the name of a shipped one; default: measured at the "
        "first start and kept, in a simulation node-8gpu",
        _SHAPED,
    )

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def journal_file(self) -> Path | None:
        """The one that was asked for."""
        return None if self.journal is None or self.journal == "none" else Path(self.journal)


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Commands that talk to a running endpoint."""

    url: str = setting("http://127.0.0.1:8000", "Endpoint to talk to", (*_CLIENTS, *_ACCOUNTS))

    def __post_init__(self) -> None:
        check_fields(self)
