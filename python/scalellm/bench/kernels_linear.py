"""Times products with packed weights, of all formats and numbers of rows."""

from collections.abc import Callable, Iterator, Sequence

import torch

from scalellm import _core
from scalellm.bench.floor import Cost
from scalellm.bench.model_shape import MatrixShape, ModelShape, Precision
from scalellm.bench.timing import Timed, copies_of, median_s
from scalellm.kernels.linear.cpu import pack
from scalellm.kernels.linear.packed import MatrixLayout, PackedMatrix, aligned_bytes
from scalellm.layers.weights import MatrixSpec, Use
from scalellm.loader.packing import FORMAT_OF, Packing

_BF16, _SILU_MUL, _F32 = 0, 1, 2  # modes of _core.cpu_linear


def time_linears(
    shape: ModelShape, precisions: Sequence[Precision], rows: Sequence[int], seconds: float
) -> Iterator[Timed]:
    """Every matrix of the model at every number of rows; of experts one, as for its own rows."""
    for precision in precisions:
        for matrix in (*shape.matrices, shape.output):
            is_output = matrix == shape.output
            weights = _weights(matrix, precision, is_output)
            for count in rows:
                time_s = median_s(_products(weights, count, is_output), seconds) / len(weights)
                cost = Cost(
                    float(weights[0].layout.num_bytes),
                    2.0 * count * matrix.n * matrix.k,
                    precision,
                )
                size = f"{count} x {matrix.k} -> {matrix.n}"
                yield Timed(f"{precision} {matrix.name}", size, time_s, cost)


def product_of(
    matrix: MatrixShape, precision: Precision, rows: int
) -> tuple[Callable[[], None], int]:
    """What multiplies with each of some copies of a matrix, and how many these are."""
    weights = _weights(matrix, precision, is_output=False)
    return _products(weights, rows, is_output=False), len(weights)


def layout_of(matrix: MatrixShape, precision: Precision, is_output: bool) -> MatrixLayout:
    """As the loader lays such a matrix out."""
    if is_output:
        use = Use.OUTPUT
    elif matrix.gated:
        use = Use.GATED
    else:
        use = Use.ROW if matrix.row_parallel else Use.COLUMN
    quantization = next(name for name, format in FORMAT_OF.items() if format == precision)
    spec = MatrixSpec(((matrix.name, matrix.n),), matrix.k, use)
    return Packing(quantization).layout(spec)


def _weights(matrix: MatrixShape, precision: Precision, is_output: bool) -> list[PackedMatrix]:
    """Copies of one random weight, together larger than any cache."""
    layout = layout_of(matrix, precision, is_output)
    numbers = torch.rand(layout.n, layout.k, generator=torch.Generator().manual_seed(1))
    first = pack(numbers.sub_(0.5).bfloat16(), layout)
    found = [first]
    for _ in range(copies_of(layout.num_bytes) - 1):
        data = aligned_bytes(layout.num_bytes)
        found.append(PackedMatrix(layout, data.copy_(first.data)))
    return found


def _products(weights: Sequence[PackedMatrix], rows: int, is_output: bool) -> Callable[[], None]:
    """One with each weight. Memory for the result is there already, as in a recorded step."""
    layout = weights[0].layout
    mode = _F32 if is_output else _SILU_MUL if layout.gated else _BF16
    columns = layout.n // 2 if layout.gated else layout.n
    generator = torch.Generator().manual_seed(rows)
    x = torch.rand(rows, layout.k, generator=generator).sub_(0.5).bfloat16()
    out = torch.zeros(rows, columns, dtype=torch.float32 if is_output else torch.bfloat16)
    code = layout.code

    def all_in_turn() -> None:
        x_at, out_at = (x.data_ptr(), rows, layout.k), out.data_ptr()
        for weight in weights:
            data = weight.data
            _core.cpu_linear(code, mode, x_at, (data.data_ptr(), data.numel()), 0, out_at)

    return all_in_turn
