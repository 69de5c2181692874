"""Sharded safetensors: checked as a whole before the first byte is used, then read by mmap."""

import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scalellm.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from scalellm.kernels.linear import Fp8Matrix
from scalellm.kernels.quantise import FP8, GROUP
from scalellm.layers.shard import WHOLE, Shard
from scalellm.layers.weights import MatrixSpec, PlainMatrices, Slice
from scalellm.loader.config import read_json
from scalellm.loader.quantised import (
    UNUSED,
    Grouped,
    Read,
    ScaledBytes,
    Scheme,
    Stored,
    WholeNumbers,
)
from scalellm.loader.staging import Staging

INDEX = "model.safetensors.index.json"
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I8": 1, "F8_E4M3": 1}
_NUMBERS = ("F64", "F32", "BF16", "F16")  # what is not quantised
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_SHOWN = 5  # tensors named in an error before "and N more"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its shard's header declares it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a folder, by name."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    scheme: Scheme | None = None  # how matrices are quantised, as far as they are

    @classmethod
    def open(cls, folder: Path, scheme: Scheme | None = None) -> Self:
        """Read and check every shard's header. Raises ModelNotFoundError, ModelFileError."""
        tensors: dict[str, StoredTensor] = {}
        shards, promised = _shards(folder)
        for shard in shards:
            for name, tensor in read_header(shard).items():
                if name in tensors:
                    raise ModelFileError(f"{name} is in both {tensors[name].file} and {shard}")
                tensors[name] = tensor
        if absent := sorted(promised - tensors.keys()):
            raise ModelFileError(f"{folder / INDEX} promises {_list(absent)}, in no shard")
        return cls(folder, tensors, scheme)

    def scheme_of(self, name: str) -> Scheme | None:
        """How the matrix `name`, with ".weight", is quantised; None if it is numbers."""
        if self.scheme is None or not name.endswith(".weight"):
            return None
        marker = f"{name.removesuffix('weight')}{self.scheme.marker}"
        return self.scheme if marker in self.tensors else None

    def int4_groups(self) -> dict[str, int]:
        """Of every matrix of int4 numbers, by its name without ".weight", how many inputs one after
        another share a scale."""
        found: dict[str, int] = {}
        if not isinstance(self.scheme, Grouped):
            return found
        with CheckpointSource(self, torch.float32, torch.device("cpu")) as source:
            for name in self.tensors:
                matrix, _, suffix = name.rpartition(".")
                if suffix == self.scheme.marker:
                    with suppress(KeyError):  # `check` names what is missing
                        group = self.scheme.int4_group(source.reader(matrix))
                        if group is not None:
                            found[matrix] = group
        return found

    @property
    def numbers(self) -> int:
        """How many numbers all tensors hold together."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str]) -> None:
        """Compare with the tensors that the configuration asks for.

        `ignored` names tensors that may be there and are not used. Raises ModelFileError, which
        names what is missing, unexpected or of another shape; UnsupportedModelError for a dtype.
        """
        complaints = []
        stored = self._stored(expected)
        if missing := [name for name in stored if name not in self.tensors]:
            complaints.append(f"missing {_list(missing)}")
        unexpected = [
            name
            for name in self.tensors
            if name not in stored and name not in ignored and not self._is_unused(name)
        ]
        if unexpected:
            complaints.append(f"unexpected {_list(unexpected)}")
        wrong = [
            f"{name} ({list(self.tensors[name].shape)}, config.json asks for {list(of.shapes[0])})"
            for name, of in stored.items()
            if name in self.tensors and self.tensors[name].shape not in of.shapes
        ]
        if wrong:
            complaints.append(f"of another shape {_list(wrong)}")
        if complaints:
            raise ModelFileError(
                f"{self.folder}: the weights do not fit config.json: {'; '.join(complaints)}"
            )
        for name, of in stored.items():
            if self.tensors[name].dtype not in of.dtypes:
                raise UnsupportedModelError(
                    f"{self.tensors[name].file}: {name} is stored as {self.tensors[name].dtype}; "
                    f"this version reads {', '.join(of.dtypes)}"
                )

    def _stored(self, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
        """The tensors that `expected` ones are stored as."""
        stored = {}
        for name, shape in expected.items():
            scheme = self.scheme_of(name)
            if scheme is None or len(shape) != 2:
                stored[name] = Stored((shape,), _NUMBERS)
                continue
            n, k = shape
            for suffix, of in scheme.tensors(n, k).items():
                stored[f"{name.removesuffix('weight')}{suffix}"] = of
        return stored

    def _is_unused(self, name: str) -> bool:
        """Whether a tensor that no layer asks for may be there."""
        matrix, _, suffix = name.rpartition(".")
        if self.scheme_of(f"{matrix}.weight") is not None and suffix == "bias":
            # Writers of quantised layers give all of them a bias.
            with CheckpointSource(self, torch.float32, torch.device("cpu")) as source:
                return not bool(source.stored(name).any())
        return suffix == "inv_freq" or (self.scheme is not None and suffix in UNUSED)


class CheckpointSource(PlainMatrices):
    """A WeightSource that copies from a checkpoint; a context manager that holds its files open."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard = WHOLE,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.shard = shard
        self._checkpoint = checkpoint
        self._files = ExitStack()
        self._open: dict[Path, Any] = {}
        self._staging = Staging(device) if device.type == "cuda" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def fill(self, out: Tensor, name: str) -> None:
        self._copy(out, self.stored(name))

    def fill_slice(self, out: Tensor, part: Slice) -> None:
        name = f"{part.name}.weight"
        scheme = self._checkpoint.scheme_of(name)
        if scheme is None:
            self._copy(out, part.of(self.stored(name)))
            return
        try:
            out.copy_(part.of(scheme.numbers(self.reader(part.name), *part.whole)))
        except ValueError as error:
            raise ModelFileError(f"{self._checkpoint.folder}: {name}: {error}") from None

    def _copy(self, out: Tensor, stored: Tensor) -> None:
        if self._staging is None:
            out.copy_(stored)
        else:
            self._staging.copy(out, stored)

    def int8(self, spec: MatrixSpec) -> tuple[Tensor, Tensor] | None:
        """int8 [n, k] and float32 scales [n] if these are what the checkpoint has for all parts."""
        parts = []
        for name, outputs in spec.parts:
            scheme = self._checkpoint.scheme_of(f"{name}.weight")
            read = self.reader(name)
            part = scheme.int8(read, outputs) if isinstance(scheme, ScaledBytes) else None
            if part is None:
                return None
            parts.append(part)
        weights, scales = zip(*parts, strict=True)
        return torch.cat(weights), torch.cat(scales)

    def int4(self, spec: MatrixSpec) -> WholeNumbers:
        """A matrix all of whose parts are in `int4_groups`, alike."""
        parts = []
        for name, outputs in spec.parts:
            scheme = self._checkpoint.scheme_of(f"{name}.weight")
            if not isinstance(scheme, Grouped):
                raise TypeError(f"{name} is no int4")
            parts.append(scheme.whole_numbers(self.reader(name), outputs, spec.k))
        return WholeNumbers(
            torch.cat([part.numbers for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat([part.zeros for part in parts]),
            parts[0].group,
        )

    def fp8(self, spec: MatrixSpec) -> Fp8Matrix | None:
        """The matrix as the checkpoint has it, if that is fp8 which a GPU multiplies, in all parts.

        Blocks of scales begin where parts do, and do not reach from one into the next."""
        weights, scales, parts = [], [], list(spec.parts_of(self.shard))
        for part in parts:
            name = f"{part.name}.weight"
            scheme = self._checkpoint.scheme_of(name)
            if not isinstance(scheme, ScaledBytes):
                return None
            found = scheme.fp8(self.reader(part.name), part.whole[0])
            if found is None:
                return None
            weight, of_weight = found
            rows, columns = part.rows, part.columns
            if scheme.block:
                ends = (rows.start, columns.start, rows.stop if part is not parts[-1] else 0)
                if any(end % GROUP for end in ends):
                    return None
                rows, columns = (
                    range(r.start // GROUP, -(-r.stop // GROUP)) for r in (rows, columns)
                )
                of_weight = of_weight[:, columns.start : columns.stop]
            weights.append(part.of(weight))
            scales.append(of_weight[rows.start : rows.stop])
        n, k = sum(map(len, weights)), len(parts[0].columns)
        data, first = torch.empty(n, k, dtype=torch.uint8, device=self.device), 0
        for weight in weights:
            self._copy(data[first : first + len(weight)], weight.view(torch.uint8))
            first += len(weight)
        return Fp8Matrix(data.view(FP8), torch.cat(scales).to(self.device))

    def reader(self, matrix: str) -> Read:
        """Reads one of the tensors that make a matrix, named without ".weight", by its suffix."""
        return lambda suffix: self.stored(f"{matrix}.{suffix}")

    def stored(self, name: str) -> Tensor:
        """The tensor as the checkpoint has it, on the CPU. Raises ModelFileError."""
        file = self._checkpoint.tensors[name].file
        try:
            if file not in self._open:
                self._open[file] = self._files.enter_context(safe_open(file, framework="pt"))
            tensor: Tensor = self._open[file].get_tensor(name)
        except SafetensorError as error:
            raise ModelFileError(f"{file}: {name} cannot be read: {error}") from None
        return tensor


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What a safetensors file declares, checked against its size.

        [u64 little endian: n][n bytes of JSON][tensors, back to back]

    Raises ModelFileError when it is truncated or its header makes no sense.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelFileError(
                f"{file} is truncated: its header has {length} bytes, the whole file {size}"
            )
        if length > _MAX_HEADER_BYTES:
            raise ModelFileError(
                f"{file} is no safetensors file: a header of {length} bytes, "
                f"where {_MAX_HEADER_BYTES} are allowed"
            )
        try:
            header = json.loads(stream.read(length))
            tensors = {
                name: _declared(entry) for name, entry in header.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelFileError(f"{file} is no safetensors file: {error!r}") from None
    end = max((offsets[1] for _, _, offsets in tensors.values()), default=0)
    if 8 + length + end != size:
        state = "is truncated" if 8 + length + end > size else "has extra bytes"
        raise ModelFileError(
            f"{file} {state}: {size} bytes where its header declares {8 + length + end}"
        )
    for name, (dtype, shape, (first, last)) in tensors.items():
        if dtype in _BYTES and last - first != prod(shape) * _BYTES[dtype]:
            raise ModelFileError(
                f"{file}: {name} has {last - first} bytes, which is not {dtype} {list(shape)}"
            )
    return {name: StoredTensor(file, dtype, shape) for name, (dtype, shape, _) in tensors.items()}


def _declared(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Type, shape and the first and last byte of one entry of a header. Raises ValueError."""
    dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    sizes = [*shape, first, last]
    if not isinstance(dtype, str) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{entry} describes no tensor")
    return dtype, tuple(shape), (first, last)


def _shards(folder: Path) -> tuple[list[Path], frozenset[str]]:
    """The shard files, and the tensor names that the index promises."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFileError(f"{folder / INDEX}: weight_map must name tensors and their files")
        for name in weight_map.values():
            if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
                raise ModelFileError(
                    f"{folder / INDEX}: weight_map names {name!r}, which is no file of the folder"
                )
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        if absent := [shard.name for shard in shards if not shard.is_file()]:
            raise ModelNotFoundError(
                f"{folder} lacks {len(absent)} of {len(shards)} shards: {_list(absent)}"
            )
        return shards, frozenset(weight_map)
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"], frozenset()
    # Mistral's repositories hold the weights a second time, under other names, in consolidated*.
    shards = sorted(
        path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated")
    )
    if shards:
        return shards, frozenset()
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ModelNotFoundError(
            f"{folder} has weights in torch's pickle format only, which can run code when read; "
            "convert it with transformers' save_pretrained"
        )
    raise ModelNotFoundError(
        f"{folder} has no *.safetensors; --load-format dummy serves random weights from config.json"
    )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
