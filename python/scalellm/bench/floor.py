"""The least time that a step, and a whole run, can take on a machine whose ceilings are known.

    t(op)   = max(bytes read / read bandwidth, operations / peak of their type)
    t(step) = sum of t(op): each op needs the one before it

    decode of B sequences with C tokens of context each
        a matrix [n, k]   its bytes once (of experts: of those hit); 2 B n k operations
        attention         B C KV bytes; 4 B C heads head_dim operations of bf16
    prefill of B prompts of P tokens
        a matrix [n, k]   its bytes once; 2 B P n k operations; logits of B rows
        attention         B P KV bytes; 4 B P (P + 1) / 2 heads head_dim operations of bf16

Only weights and keys and values are read from memory: activations are taken to stay in caches, and
norms, rotary, sampling, HTTP to cost nothing. int8 and int4 weights are multiplied as int8.
"""

from dataclasses import dataclass

from scalellm.bench.model_shape import MatrixShape, ModelShape, Precision


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a machine's cores do together at most; a peak of 0 is not known, and bounds nothing."""

    read_bytes_s: float
    int8_ops_s: float
    bf16_ops_s: float
    level: str = ""  # of the kernels' instructions
    threads: int = 0

    def peak(self, precision: Precision) -> float:
        """Operations a second of products with weights of `precision`."""
        return self.bf16_ops_s if precision == "bf16" else self.int8_ops_s


@dataclass(frozen=True, slots=True)
class Cost:
    """What an op must at least read, and compute with one type."""

    read_bytes: float
    ops: float
    precision: Precision

    def memory_s(self, ceilings: Ceilings) -> float:
        return self.read_bytes / ceilings.read_bytes_s

    def compute_s(self, ceilings: Ceilings) -> float:
        peak = ceilings.peak(self.precision)
        return self.ops / peak if peak > 0 else 0.0

    def floor_s(self, ceilings: Ceilings) -> float:
        return max(self.memory_s(ceilings), self.compute_s(ceilings))


@dataclass(frozen=True, slots=True)
class RunFloor:
    """The least a run of equal requests that arrive at once can take."""

    ttft_ms: float  # of the median request: half of the prompts come first
    tbt_ms: float  # mean over the answer
    output_tok_s: float


def matrix_cost(matrix: MatrixShape, rows: int, precision: Precision) -> Cost:
    """One layer's product with `rows` tokens."""
    return Cost(
        read_bytes=matrix.experts_hit(rows) * matrix.weight_bytes(precision),
        ops=2.0 * rows * matrix.experts_per_token * matrix.n * matrix.k,
        precision=precision,
    )


def decode_ms(
    shape: ModelShape,
    ceilings: Ceilings,
    precision: Precision,
    batch: int,
    context: float,
    kv: Precision = "bf16",
) -> float:
    """A step of one token of each of `batch` sequences with `context` tokens on the mean."""
    tokens = batch * context
    attention = Cost(tokens * shape.kv_bytes_per_token(kv), shape.attention_ops(1) * tokens, "bf16")
    return 1e3 * (
        _products_s(shape, ceilings, precision, batch, outputs=batch) + attention.floor_s(ceilings)
    )


def prefill_ms(
    shape: ModelShape,
    ceilings: Ceilings,
    precision: Precision,
    prompt_tokens: int,
    batch: int = 1,
    kv: Precision = "bf16",
) -> float:
    """All of `batch` prompts and their first tokens, in one step."""
    tokens = batch * prompt_tokens
    pairs = batch * prompt_tokens * (prompt_tokens + 1) // 2
    attention = Cost(tokens * shape.kv_bytes_per_token(kv), shape.attention_ops(pairs), "bf16")
    return 1e3 * (
        _products_s(shape, ceilings, precision, tokens, outputs=batch) + attention.floor_s(ceilings)
    )


def run_floor(
    shape: ModelShape,
    ceilings: Ceilings,
    precision: Precision,
    concurrency: int,
    input_tokens: int,
    output_tokens: int,
    kv: Precision = "bf16",
) -> RunFloor:
    """`concurrency` requests at once; the first token comes from the prompt's step."""
    half = (concurrency + 1) // 2
    prompts_ms = prefill_ms(shape, ceilings, precision, input_tokens, concurrency, kv)
    steps = output_tokens - 1
    # Contexts grow by one a step, and a step's time is linear in them but for the roofline's knee.
    decodes_ms = sum(
        decode_ms(shape, ceilings, precision, concurrency, input_tokens + step, kv)
        for step in range(1, output_tokens)
    )
    total_s = (prompts_ms + decodes_ms) / 1e3
    return RunFloor(
        ttft_ms=prefill_ms(shape, ceilings, precision, input_tokens, half, kv),
        tbt_ms=decodes_ms / steps if steps else 0.0,
        output_tok_s=concurrency * output_tokens / total_s,
    )


def _products_s(
    shape: ModelShape, ceilings: Ceilings, precision: Precision, rows: int, outputs: int
) -> float:
    layers = sum(
        matrix.layers * matrix_cost(matrix, rows, precision).floor_s(ceilings)
        for matrix in shape.matrices
    )
    return layers + matrix_cost(shape.output, outputs, precision).floor_s(ceilings)
