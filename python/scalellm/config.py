"""Settings: each declared once, here; flags, environment, file and docs follow from it.

    flag  >  environment SCALELLM_*  >  scalellm.toml  >  default

A setting is a field of one of the frozen dataclasses below. Its name gives the flag
(`max_num_seqs` -> `--max-num-seqs`), the environment variable (`SCALELLM_MAX_NUM_SEQS`) and the key
in the file (`max_num_seqs = 64`). `resolve` merges the four sources and keeps each value's origin.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from scalellm.errors import ConfigError
from scalellm.settings import SERVERS, Setting, declared, setting, suggestion

CONFIG_FILE = "scalellm.toml"
_CLIENTS = ("chat", "complete", "status", "bench", "profile")
_ACCOUNTS = ("keys", "usage")
_SHAPED = ("serve", "simulate")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine replica."""

    model: str = setting("demo", "Model: a folder, a hub id, or `demo`")
    served_model_name: str | None = setting(None, "Name in the API; default: the model as given")
    revision: str | None = setting(None, "Branch, tag or commit of a hub id")
    load_format: str = setting(
        "auto",
        "`dummy` makes random weights from config.json alone",
        choices=("auto", "dummy"),
    )
    dtype: str = setting(
        "auto",
        "Type of weights and activations; `auto`: the checkpoint's",
        choices=("auto", "float32", "bfloat16"),
    )
    device: str = setting(
        "auto",
        "Where the model runs; `auto`: a GPU if there is one",
        choices=("auto", "cpu", "cuda"),
    )
    quantization: str = setting(
        "auto",
        "Weights quantised at load, and inputs as they come: int8 and int4 on a CPU, fp8 on a GPU; "
        "`auto`: int8 on a CPU, unless --dtype is given, and a checkpoint's own int8 or int4",
        choices=("auto", "none", "int8", "int4", "fp8"),
    )
    kv_cache_dtype: str = setting(
        "auto",
        "Type of the KV cache; `auto`: the model's, and int8 beside int8 or int4 weights on a CPU",
        choices=("auto", "float32", "bfloat16", "int8", "fp8"),
    )
    max_model_len: int | None = setting(
        None, "Prompt and output tokens of one request; default: the model's limit", minimum=1
    )
    max_num_seqs: int = setting(256, "Requests computed in one step", minimum=1, maximum=65536)
    max_num_batched_tokens: int = setting(
        2048, "Tokens computed in one step", minimum=1, maximum=1 << 20
    )
    step_budget_ms: float | None = setting(
        None,
        "Predicted time of a step of prompts, without running streams; default: by device",
        above=0,
        maximum=60_000,
    )
    gpu_memory_utilization: float | None = setting(
        None,
        "Share of a GPU's memory that a replica uses; default: 0.9, with `--blueprint auto` 0.45, "
        "as replicas of two shapes share each GPU during a switch",
        above=0,
        maximum=1,
    )
    kv_cache_memory_bytes: int | None = setting(
        None,
        "Size of the KV cache, e.g. 4GiB; default: from the memory that is free",
        minimum=1,
        flag="--kv-cache-memory",
    )
    block_size: int = setting(16, "Tokens of one KV block", minimum=1, maximum=256)
    enable_prefix_caching: bool = setting(True, "Reuse the KV blocks of equal prompt beginnings")
    speculative: str = setting(
        "none",
        "`ngram`: guess each answer's next tokens from its own text and check them in one step; "
        "answers stay the same",
        choices=("none", "ngram"),
    )
    speculative_tokens: int = setting(
        7, "Most tokens guessed for one request in one step", minimum=1, maximum=31
    )
    max_preemptions: int = setting(
        3, "How often one request may be preempted before it is protected", minimum=0, maximum=1000
    )
    tensor_parallel_size: int = setting(
        1,
        "Ranks that share each layer, processes of a CPU host or a GPU each: 1, 2, 4 or 8, as the "
        "model's heads allow",
        minimum=1,
        maximum=8,
    )
    enable_expert_parallel: bool = setting(
        False, "Divide a mixture's experts over those ranks, instead of each expert"
    )
    first_device: int = setting(
        0,
        "The first of this host's GPUs that a replica's ranks have; `serve` gives each replica its "
        "own",
        ("engine",),
        minimum=0,
        maximum=1023,
    )
    nnodes: int = setting(
        1,
        "Hosts that a replica's ranks are spread over, evenly (docs/parallelism.md)",
        minimum=1,
        maximum=8,
    )
    node_rank: int = setting(
        0,
        "Which of these hosts this is; the first has the engine, the others its ranks alone",
        ("engine",),
        minimum=0,
        maximum=7,
    )
    master_addr: str | None = setting(
        None, "Address of the first of these hosts, as the others reach it; needed with --nnodes"
    )
    master_port: int = setting(
        29500, "Port that its rank waits for the others at", minimum=0, maximum=65535
    )
    link_mb_s: int = setting(
        0,
        "For tests and benchmarks: those processes exchange as over a link of so many MB/s; 0: by "
        "memory alone",
        minimum=0,
        maximum=1_000_000,
    )
    cpu_threads: int | None = setting(
        None,
        "Threads of one replica on a CPU, all its ranks together; default: all cores",
        minimum=1,
        maximum=1024,
    )
    packed_cache: str | None = setting(
        None,
        "Folder of weights laid out for the CPU, which replicas share; `none`: no files; default: "
        "scalellm/packed in the user's cache folder",
    )
    packed_cache_bytes: int = setting(
        64 << 30,
        "Most that this folder holds; the least recently used models go first",
        minimum=0,
        flag="--packed-cache-size",
    )
    enforce_eager: bool = setting(
        False, "Run every operation of a step from Python, not a recorded plan"
    )
    compute_nice: int = setting(
        5,
        "Niceness of a CPU engine's compute threads, so that gateway and link go first",
        minimum=0,
        maximum=19,
    )
    seed: int = setting(0, "Seed of dummy weights", minimum=0, maximum=2**63 - 1)
    listen: str = setting(
        "127.0.0.1:9000", "Address of the engine: unix:PATH or HOST:PORT", commands=("engine",)
    )
    model_path: Path = Path()  # the folder `model` stands for; set before an executor sees it

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def memory_share(self) -> float:
        """Of a GPU."""
        return 0.9 if self.gpu_memory_utilization is None else self.gpu_memory_utilization

    @property
    def first_host(self) -> str:
        """Where the ranks of several hosts meet. Raises ConfigError where nobody has said it."""
        if self.master_addr is None:
            raise ConfigError(
                f"--master-addr: missing, needed with --nnodes {self.nnodes}: the first host's "
                f"address, as the others reach it"
            )
        return self.master_addr


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
        "does not fit twice",
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


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything that `scalellm serve` takes."""

    engine: EngineConfig
    gateway: GatewayConfig
    deployment: DeploymentConfig
    log: LogConfig
    blueprint: BlueprintConfig = field(default_factory=BlueprintConfig)


GROUPS: tuple[type, ...] = (
    EngineConfig,
    GatewayConfig,
    DeploymentConfig,
    BlueprintConfig,
    LogConfig,
    ClientConfig,
)


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {name: found for group in GROUPS for name, found in declared(group).items()}
)

# What a [[models]] of the file may say of its model; all else holds for all models.
MODELS_KEY = "models"
OF_ONE_MODEL = frozenset(
    {*declared(EngineConfig), *declared(BlueprintConfig)} - {"listen"}
    | {"replicas", "blueprint", "routing", "chat_template", "safety_file"}
)


def check_fields(config: Any) -> None:
    """Check every setting of a config dataclass; ConfigError for the first that cannot be."""
    for entry in fields(config):
        if entry.metadata and entry.name in SETTINGS:
            object.__setattr__(
                config, entry.name, SETTINGS[entry.name].check(getattr(config, entry.name))
            )


@dataclass(frozen=True, slots=True)
class Value:
    """A resolved setting."""

    value: Any
    origin: str  # "default", "flag --port", "environment SCALELLM_PORT", "file scalellm.toml"


def resolve(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None
) -> dict[str, Value]:
    """Merge the sources; every setting is in the result.

    `flags` holds parsed values by setting name, only those given. `file` must exist when given.
    Raises ConfigError for unknown keys of the file and for values that cannot be.
    """
    values = {name: Value(found.default, "default") for name, found in SETTINGS.items()}
    if file is not None:
        origin = f"file {file}"
        for name, value in read_file(file).items():
            values[name] = Value(SETTINGS[name].check(value, origin), origin)
    for name, found in SETTINGS.items():
        if (text := environment.get(found.variable)) is not None:
            origin = f"environment {found.variable}"
            values[name] = Value(found.parse(text, origin), origin)
    for name, value in flags.items():
        origin = f"flag {SETTINGS[name].flag}"
        values[name] = Value(SETTINGS[name].check(value, origin), origin)
    return values


def read_file(file: Path) -> dict[str, Any]:
    """The keys of a scalellm.toml, without its `[[models]]`.

    Raises ConfigError when unreadable or a key is unknown."""
    found = _toml(file)
    found.pop(MODELS_KEY, None)
    for key in found:
        if key not in SETTINGS:
            raise ConfigError(f"{file}: unknown setting {key!r}{suggestion(key, SETTINGS)}")
    return found


def read_models(file: Path) -> list[dict[str, Value]]:
    """The settings in each of a scalellm.toml's `[[models]]`. Raises ConfigError."""
    sections = _toml(file).get(MODELS_KEY, [])
    if not isinstance(sections, list) or not all(isinstance(found, dict) for found in sections):
        raise ConfigError(f"{file}: {MODELS_KEY}: allowed are sections, [[{MODELS_KEY}]]")
    models = []
    for at, section in enumerate(sections):
        origin = f"file {file}, {MODELS_KEY}[{at}]"
        for key in section:
            if key not in OF_ONE_MODEL:
                why = "holds for all models" if key in SETTINGS else "unknown setting"
                near = suggestion(key, OF_ONE_MODEL)
                raise ConfigError(f"{file}: {MODELS_KEY}[{at}].{key}: {why}{near}")
        if "model" not in section:
            raise ConfigError(f"{file}: {MODELS_KEY}[{at}].model: missing")
        models.append(
            {
                name: Value(SETTINGS[name].check(value, origin), origin)
                for name, value in section.items()
            }
        )
    return models


def _toml(file: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from None


Config = TypeVar("Config")


def build(group: type[Config], values: Mapping[str, Value], **more: Any) -> Config:
    """Make one of GROUPS from resolved values."""
    return group(**{name: values[name].value for name in declared(group)}, **more)
