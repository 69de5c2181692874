"""The Rust half: listener of the engine, text, gateway, load generator (crates/python-module)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, final

__version__: str

# ------------------------------------------------------------- engine listener (crates/engine-link)

@final
class Submission:
    """A validated Submit: ids are below the vocabulary, floats finite, lengths within the
    limits."""

    key: int  # unique in this engine process; names the request in emit() and in cancels
    trace_id: str
    prompt_ids: list[int]
    resume_ids: list[int]  # output of an earlier attempt; counts as output
    max_tokens: int
    min_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    priority: int
    deadline_us: int | None  # absolute, Unix microseconds
    arrival_us: int  # at the gateway, Unix microseconds
    received_us: int  # at the listener, Unix microseconds
    choice: int
    cache_salt: bytes
    prompt_logprobs: int | None
    temperature: float
    top_p: float
    top_k: int  # 0 is off
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: list[tuple[int, float]]
    seed: int
    logprobs: int | None

@final
class EngineListener:
    """Serves the engine protocol on a thread of its own; Python sees whole batches only."""

    address: str  # the bound address; names the real port when 0 was asked for
    def __init__(self, address: str, info: Mapping[str, Any]) -> None:
        """Bind `unix:PATH` or `HOST:PORT`. `info` holds DescribeResponse's fields by name,
        and optionally `max_waiting`: how many requests beyond `max_num_seqs` are taken.

        Raises OSError if the address is taken, ValueError on a bad one."""
    def poll(self, timeout_s: float) -> list[tuple[str, Any]]:
        """Wait for messages without the GIL; return all there are, [] after `timeout_s`.

        ("submit", Submission), ("cancel", key), ("drain", None), ("stop", None),
        ("kv_snapshot", None),
        ("calibrate", (ticket, [(decode_seqs, context_tokens, prefill_tokens), ...]))"""
    def emit(self, outputs: Sequence[tuple[Any, ...]], load: tuple[Any, ...]) -> None:
        """Hand over what one step did; never waits for a gateway.

        An output is (key, token_ids, finish_reason | None, cached_tokens, logprobs | None,
        prompt_logprobs | None, times | None, stop_token_id | None, error | None), where
        finish_reason is "eos" | "stop_token" | "length" | "cancelled" | "deadline" | "error",
        a logprob entry is (token_id, logprob, rank, top_ids, top_logprobs), a prompt logprob entry
        the same or None,
        times is (queued_us, first_scheduled_us, first_token_us, finished_us, preemptions, steps,
        prefill, decode), the last two as `note_step` has its phases.
        `load` is (running, waiting, backlog_tokens, kv_blocks_used, kv_blocks_total, step_ms,
        overhead_ms, steps, preemptions, (prefix_hit_tokens, prefix_query_tokens),
        (draft_tokens, accepted_draft_tokens), (step_cost, expert_use)), the last two
        engine/step_time.py's four coefficients and, None for a model without experts,
        executor/expert_use.py's. Also call it (with no outputs) when idle, at least every 200 ms:
        it is the sign of life of the loop."""
    def emit_kv(
        self, stored: Sequence[tuple[bytes, bytes]], removed: Sequence[bytes], snapshot: bool
    ) -> None:
        """Changes of the prefix cache, as (parent, hash) and hash."""
    def note_step(
        self,
        number: int,
        started_us: int,
        requests: int,
        tokens: int,
        phases: Sequence[tuple[str, int]],
        expert_use: tuple[int, int, int, Sequence[int], int] | None,
    ) -> None:
        """Where a step's time went: (phase, microseconds), one after the other; and which experts
        it used. The last steps are kept for profiles."""
    def answer_calibrate(self, ticket: int, step_ms: Sequence[float]) -> None: ...
    def drain(self) -> None:
        """Refuse new requests from now on; the next poll says ("drain", None)."""
    def close(self) -> None:
        """Stop listening, flush what was emitted for at most a second, and join the thread."""

# ---------------------------------------------------------------- text (crates/gateway/src/text)

def tokenizer_digest(folder: str) -> str:
    """Hex SHA-256 of what decides the token ids in a model folder (its tokenizer.json).

    Raises FileNotFoundError without one, ValueError if it cannot be read."""

@final
class Tokenizer:
    """The gateway's tokenizer and chat template of a Hugging Face folder."""

    vocab_size: int  # one more than the highest id
    eos_token_ids: list[int]
    has_chat_template: bool
    digest: str  # tokenizer_digest of the folder
    def __init__(self, folder: str) -> None:
        """Raises FileNotFoundError without a tokenizer.json, ValueError if a file is damaged."""
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises ValueError above 8 MiB of text."""
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids outside the vocabulary add nothing."""
    def token_text(self, id: int) -> tuple[str, bytes]:
        """One token as it reads within a text, and its bytes."""
    def apply_chat_template(
        self,
        messages_json: str,
        add_generation_prompt: bool = True,
        template: str | None = None,
        kwargs_json: str | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """As transformers renders it; `kwargs_json` is an object of template variables, `tools`
        among them.

        Raises ValueError if there is no template, or it fails or refuses the messages."""

@final
class Detokenizer:
    """Turns a stream of ids into text, never half a character; stops at stop strings."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """Stop strings that are complete within the first `min_tokens` ids do not stop."""
    def push(self, ids: Sequence[int]) -> tuple[str, bool]:
        """New text that is safe to show, and whether a stop string was met."""
    def finish(self) -> str:
        """What was held back."""

# ---------------------------------------------------------------- gateway (crates/gateway)

def run_gateway(config_toml: str, path: str | None = None) -> None:
    """Serve until SIGTERM or SIGINT has drained it; without the GIL. Raises OSError if the port is
    taken,
    ValueError on a bad configuration."""

# ---------------------------------------------------------------- routing (crates/routing)

def block_hashes(ids: Sequence[int], block_size: int, salt: bytes = b"") -> list[bytes]:
    """Names of a prompt's full blocks, 16 bytes each, that chain over everything before them: what
    an engine's KV events carry (engine.proto, KvEvents)."""

@final
class ReplicaLoad:
    """What is known of one replica that could take a request; 0 where nothing is known.

    `index` names the replica towards the router, below 128; `name` is the same in every gateway
    and decides where sessions go (default: the index). `backlog_tokens` are prompt tokens accepted
    and neither computed nor cached, `context_tokens` the lengths of the running requests together,
    `steps` how many the engine has run: a cost ages while they stand still. `cost` is what a step
    takes, (fixed_ms, token_ms, attended_ms, request_ms) as engine/step_time.py fits it.
    `own_requests` have no end yet, `own_tokens` of prompts no answer: what this gateway has sent
    and the replica's numbers may not show yet."""

    def __init__(
        self,
        index: int,
        *,
        name: str | None = None,
        running: int = 0,
        waiting: int = 0,
        backlog_tokens: int = 0,
        context_tokens: int = 0,
        step_ms: float = 0.0,
        steps: int = 0,
        max_num_seqs: int = 0,
        tensor_parallel_size: int = 1,
        block_size: int = 0,
        cost: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
        own_requests: int = 0,
        own_tokens: int = 0,
    ) -> None: ...

@final
class Route:
    """A chosen replica and why."""

    index: int
    policy: str
    reason: str  # only, load, prefix, cold, spread, session, moved, wide or narrow
    predicted_ms: float  # until the first token
    cached_tokens: int  # of the prompt, that the replica is believed to have

@final
class Router:
    """The gateway's routing of one model, with the clock given: the simulator's choices are those
    of the gateway. Times are milliseconds of any clock that never goes back."""

    def __init__(self, policy: str) -> None:
        """`policy` is least-load, prefix, shape or session. Raises ValueError for another."""
    def pick(
        self,
        replicas: Sequence[ReplicaLoad],
        prompt_tokens: int,
        now_ms: float,
        *,
        max_tokens: int | None = None,
        hashes: Sequence[bytes] | None = None,
        block_size: int = 0,
        session: str | None = None,
        batch: bool = False,
    ) -> Route | None:
        """The replica for a request that is sent there now; None without a replica.

        `hashes` name the prompt's full blocks (`block_hashes`; any 16 bytes will do in a
        simulation), of `block_size` tokens: replicas of another block size count as empty.

        Raises ValueError for a hash that has not 16 bytes."""
    def predict_first_token_ms(
        self, replicas: Sequence[ReplicaLoad], prompt_tokens: int, now_ms: float
    ) -> float | None:
        """The least predicted time until the first token; None while nothing was measured."""
    def observe_prefill(self, index: int, tokens: int, took_ms: float, now_ms: float) -> None:
        """A prompt's uncached tokens took this long, from scheduled to first token: what is known
        of a replica that tells no `cost`."""
    def observe_output(self, tokens: int, now_ms: float) -> None:
        """A request ended with so many output tokens."""
    def store(self, index: int, hashes: Sequence[bytes]) -> None:
        """A replica's prefix cache has these blocks now."""
    def remove(self, index: int, hashes: Sequence[bytes]) -> None:
        """A replica's prefix cache has these blocks no more."""
    def forget(self, index: int) -> None:
        """The replica of that index restarted, or is another one now."""

# ---------------------------------------------------------------- fake engine (crates/fake-engine)

def run_fake_endpoint(port: int, ttft_ms: float, tbt_ms: float) -> None: ...
def run_fake_engine(address: str, settings_json: str) -> None: ...

# ----------------------------------------------------------- load generator (crates/load-generator)

def accounts_request(url: str, request: str) -> str:
    """Ask the database of keys and usage what the JSON `request` says; the answer as JSON.

    Raises ValueError for what cannot be, OSError if the database does not answer.
    """

def run_load(plan_json: str, on_progress: Callable[[str], bool] | None = None) -> str:
    """Drive an endpoint as `plan_json` says, return the results as JSON; without the GIL."""

# --------------------------------------------------------------------------- crates/cpu-kernels
# Memory is given by address; Python answers for what it points to, sizes are checked.

_RowsAt = tuple[int, int, int]  # address, rows, elements from one row to the next
_SliceAt = tuple[int, int]  # address, elements
_View = tuple[int, int, int]  # of a plan: buffer, first column, columns

def cpu_level() -> str:
    """The best instructions of this processor that kernels use: portable, avx2 or avx512."""

def cpu_start(threads: int, nice: int) -> None:
    """Start the threads that kernels run on, the caller's included; a former set ends."""

def cpu_ceilings(seconds: float) -> dict[str, Any]:
    """What these threads do at most, each measured for about `seconds`: `level`, `threads`,
    `read_bytes_s`, and `int8_ops_s` and `bf16_ops_s`, None where kernels are portable."""

CPU_MATRIX_VERSION: Final[int]  # of the bytes that cpu_matrix_pack writes

def cpu_matrix_bytes(code: list[int]) -> int:
    """Bytes of a packed matrix. Raises ValueError for a layout that there is not."""

def cpu_matrix_pack(code: list[int], weight: int, out: int, size: int) -> None: ...
def cpu_matrix_pack_int4(
    code: list[int], weight: tuple[int, int, int], parts: int, out: _SliceAt
) -> None:
    """`weight`: addresses of numbers uint8 [n, k], scales float32 and zeros uint8 [n, parts]."""

def cpu_matrix_select(
    code: list[int], weight: _SliceAt, ranges: list[tuple[int, int]], out: _SliceAt
) -> None:
    """Copy rows (first, end) of a packed matrix, as a packed matrix. Raises ValueError."""

def cpu_linear(
    code: list[int], mode: int, x: _RowsAt, weight: _SliceAt, bias: int, out: int
) -> None: ...
def cpu_kv_block_bytes(code: list[int]) -> int:
    """Bytes of one KV block of one layer. Raises ValueError for a layout that there is not."""

def cpu_attention(
    qkv: _RowsAt,
    heads: int,
    norms: tuple[int, int],
    eps: float,
    angles: _SliceAt,
    cache: _SliceAt,
    kv: list[int],
    span_rows: _SliceAt,
    tables: _SliceAt,
    scale: float,
    window: int,
    out: int,
) -> None: ...
def cpu_experts(
    x: _SliceAt,
    logits: int,
    experts: list[tuple[_SliceAt, _SliceAt]],
    codes: tuple[list[int], list[int]],
    top: int,
    normalise: bool,
    among: tuple[int, bool],
    out: int,
) -> None: ...
def cpu_rms_norm(x: _RowsAt, weight: _SliceAt, eps: float, out: int) -> None: ...
def cpu_rotary_angles(
    positions: _SliceAt, frequencies: list[float], factor: float, out: int
) -> None: ...
def cpu_draw(scores: _RowsAt, vocab: int, draws: int) -> list[int | None]: ...
def cpu_logprobs(
    logits: _RowsAt, vocab: int, tokens: list[int], alternatives: list[int]
) -> list[tuple[int, float, int, list[int], list[float]]]: ...

MOST_RANKS: Final[int]

class Ranks:
    """The processes that compute a replica's steps together, as rank `rank` of `count` sees them.

    `file`: `bytes_for` zeros that all ranks map. Whatever waits for another rank raises
    ConnectionAbortedError once any rank gave up. `link_mb_s`: as if over so slow a link; 0: none.
    """

    def __init__(
        self,
        file: int,
        rank: int,
        count: int,
        letter_bytes: int,
        slot_bytes: int,
        link_mb_s: int = 0,
        links: list[int] | None = None,
    ) -> None:
        """`links`: descriptors of connections to all ranks, -1 for this one, which it takes over;
        `file` is this rank's alone then."""

    @staticmethod
    def bytes_for(count: int, letter_bytes: int, slot_bytes: int) -> int: ...
    @property
    def address(self) -> int:
        """What operators take; it means nothing without this object."""

    def send(self, letter: bytes) -> None:
        """Give every other rank a letter; of rank 0 alone."""

    def receive(self) -> bytes:
        """Wait for rank 0's next letter."""

    def gather(self, rows: int, bounds: list[int], out: int) -> None:
        """Bring this rank's columns `bounds[rank]` .. of float32 [rows, bounds[-1]] at `out` to the
        others, and theirs here; of ranks that have no memory in common."""

    def give_up(self) -> None:
        """Nobody waits for anybody any more, in any process."""

def cpu_linear_reduced(
    code: list[int], x: _RowsAt, weight: _SliceAt, bias: int, ranks: int, out: int
) -> None: ...
def cpu_logits_among(
    code: list[int], x: _RowsAt, weight: _SliceAt, bounds: list[int], ranks: int, out: int
) -> None: ...

# token ids, positions, logit rows, spans [n, 4], tables
_StepAt = tuple[_SliceAt, int, _SliceAt, _SliceAt, _SliceAt]

class CpuPlan:
    """A recorded step; `scalellm.executor.recording` makes them."""

    def __init__(self, ranks: Ranks | None = None) -> None: ...
    def __len__(self) -> int: ...
    def buffer(self, cols: int, f32: bool, outputs: bool) -> int: ...
    def embed(self, table: _RowsAt, out: _View) -> None: ...
    def pick(self, x: _View, out: _View) -> None: ...
    def angles(self, frequencies: list[float], factor: float, out: _View) -> None: ...
    def rms_norm(self, x: _View, weight: int, eps: float, out: _View) -> None: ...
    def add(self, a: _View, b: _View, out: _View) -> None: ...
    def linear(
        self, x: _View, code: list[int], weight: _SliceAt, bias: int, out: _View
    ) -> None: ...
    def reduced(
        self, x: _View, code: list[int], weight: _SliceAt, bias: int, out: _View
    ) -> None: ...
    def logits(self, x: _View, code: list[int], weight: _SliceAt, first: int) -> None: ...
    def attention(
        self,
        qkv: _View,
        heads: int,
        norms: tuple[int, int],
        eps: float,
        angles: _View,
        cache: _SliceAt,
        kv: list[int],
        scale: float,
        window: int,
        out: _View,
    ) -> None: ...
    def experts(
        self,
        x: _View,
        logits: _View,
        experts: list[tuple[list[int], _SliceAt, list[int], _SliceAt]],
        top: int,
        normalise: bool,
        division: int,
        out: _View,
    ) -> None: ...
    def finish(self) -> None: ...
    def logits_of(self, step: _StepAt, vocab_size: int, logits: int) -> None:
        """Raises ValueError for a step that contradicts itself."""
    def greedy_ids(self, step: _StepAt) -> list[int | None]:
        """The lowest id of each logit row's largest logit, None where that is not finite.

        Raises ValueError for a step that contradicts itself."""
    def draw_ids(self, step: _StepAt, draws: int) -> list[int | None]:
        """A token for each logit row, as as many rows of DRAW at `draws` say, None where logits are
        not finite.

        Raises ValueError for a step that contradicts itself, and for draws that need more than the
        64 largest logits."""
    def expert_use(self) -> tuple[int, int, int, list[int]]:
        """(layers, read, busiest, choices) of the proto's ExpertUse, since the plan was made."""
    def times_ms(self) -> dict[str, float]:
        """What each kind of operation took in the last step."""
