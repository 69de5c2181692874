"""Settings of one replica: what it loads, and how it computes."""

from dataclasses import dataclass
from pathlib import Path

from scalellm.errors import ConfigError
from scalellm.settings import check_fields, setting


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
        "as replicas of two shapes share each GPU during a switch, unless `--switch after`",
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
