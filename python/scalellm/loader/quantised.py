"""Checkpoints whose matrices are quantised already: their numbers, as `quantization_config` says.

method              a matrix [n, k] is stored as
compressed-tensors  weight int8 or e4m3 [n, k], weight_scale of a channel, of blocks, or of all
fp8                 weight e4m3 [n, k], weight_scale_inv of blocks [n / 128, k / 128], or
                    weight_scale of all
awq (gemm)          qweight int32 [k, n / 8], qzeros int32 [k / group, n / 8],
                    scales [k / group, n]; a word's nibbles, lowest first, are outputs
                    0, 2, 4, 6, 1, 3, 5, 7
gptq                qweight int32 [k / 8, n], qzeros int32 [k / group, n / 8],
                    scales [k / group, n], g_idx [k]; nibbles (bytes, if of 8 bits) in their
                    order, zeros less one

A number is stored * scale, or (stored - zero) * scale. What is quantised is told by the tensors,
not by the lists of modules that are not. Scales of inputs are left alone: a row's are found anew.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalellm.errors import ModelFileError, UnsupportedModelError
from scalellm.kernels.quantise import GROUP

SUPPORTED = (
    "compressed-tensors of int8 or fp8 weights (symmetric; scales of channels, tensors or blocks), "
    "fp8 (e4m3; scales of blocks or tensors), awq (4 bits, version gemm), gptq (4 or 8 bits)"
)
_FLOATS = ("F32", "BF16", "F16")
_AWQ_OUTPUT_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)

# Suffixes of tensors that may be there: scales of inputs, and of a cache of another type.
UNUSED = ("input_scale", "activation_scale", "input_zero_point", "k_scale", "v_scale")

# Reads the tensor with a suffix, of the matrix at hand.
Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a tensor of a quantised matrix may look like; the first shape is the usual one."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]  # as safetensors calls them


class Scheme(ABC):
    """One way to store quantised matrices."""

    description: str
    marker: str  # suffix of a tensor that quantised matrices have and others do not

    @abstractmethod
    def tensors(self, n: int, k: int) -> Mapping[str, Stored]:
        """By suffix, what a matrix [n, k] consists of."""

    @abstractmethod
    def numbers(self, read: Read, n: int, k: int) -> Tensor:
        """The matrix, float32 [n, k]."""


@dataclass(frozen=True, slots=True)
class ScaledBytes(Scheme):
    """Bytes of int8 or e4m3, symmetric, with scales of channels, of blocks, or one of all."""

    description: str
    dtype: str  # "I8" or "F8_E4M3"
    marker: str
    block: tuple[int, int] | None = None

    def tensors(self, n: int, k: int) -> Mapping[str, Stored]:
        scales: tuple[tuple[int, ...], ...] = ((n, 1), (n,), (1,), ())
        if self.block is not None:
            scales = ((-(-n // self.block[0]), -(-k // self.block[1])),)
        return {"weight": Stored(((n, k),), (self.dtype,)), self.marker: Stored(scales, _FLOATS)}

    def numbers(self, read: Read, n: int, k: int) -> Tensor:
        weight = read("weight").float()
        scale = read(self.marker).float()
        if self.block is not None:
            scale = scale.repeat_interleave(self.block[0], 0)[:n]
            scale = scale.repeat_interleave(self.block[1], 1)[:, :k]
        elif scale.numel() == n:
            scale = scale.view(n, 1)
        return weight * scale

    def int8(self, read: Read, n: int) -> tuple[Tensor, Tensor] | None:
        """int8 [n, k] and a scale for each channel, float32 [n], if these are the matrix."""
        if self.dtype != "I8" or self.block is not None:
            return None
        weight = read("weight")
        if bool((weight == -128).any()):
            return None  # the kernels' int8 ends at -127
        return weight, read(self.marker).float().flatten().expand(n).contiguous()

    def fp8(self, read: Read, n: int) -> tuple[Tensor, Tensor] | None:
        """e4m3 [n, k] and float32 scales, [n, 1] or of blocks, if a GPU's kernels take these."""
        if self.dtype != "F8_E4M3" or self.block not in (None, (GROUP, GROUP)):
            return None
        scale = read(self.marker).float()
        if self.block is None:
            return read("weight"), scale.view(-1, 1).expand(n, 1).contiguous()
        return read("weight"), scale


@dataclass(frozen=True, slots=True)
class WholeNumbers:
    """A matrix [n, k]: (numbers - zeros) * scales, of each input's group."""

    numbers: Tensor  # uint8 [n, k]
    scales: Tensor  # float32 [n, groups]
    zeros: Tensor  # uint8 [n, groups]
    group: Tensor  # of each input, int64 [k]


class Grouped(Scheme):
    """Whole numbers with a scale and a zero for each group of inputs."""

    @abstractmethod
    def whole_numbers(self, read: Read, n: int, k: int) -> WholeNumbers:
        """The matrix as it is stored."""

    @abstractmethod
    def int4_group(self, read: Read) -> int | None:
        """Inputs one after another that share a scale, if the numbers are of 4 bits."""

    def numbers(self, read: Read, n: int, k: int) -> Tensor:
        found = self.whole_numbers(read, n, k)
        zeros, scales = found.zeros.float()[:, found.group], found.scales[:, found.group]
        return (found.numbers.float() - zeros) * scales


@dataclass(frozen=True, slots=True)
class Awq(Grouped):
    """4 bits and zeros for each group of inputs (Lin et al., 2023), as AutoAWQ's gemm kernels."""

    group: int | None  # inputs with a scale; None for all of them
    description: str = "AWQ int4"
    marker: str = "qweight"

    def tensors(self, n: int, k: int) -> Mapping[str, Stored]:
        groups, words = _groups(k, self.group), -(-n // 8)
        return {
            "qweight": Stored(((k, words),), ("I32",)),
            "qzeros": Stored(((groups, words),), ("I32",)),
            "scales": Stored(((groups, n),), _FLOATS),
        }

    def whole_numbers(self, read: Read, n: int, k: int) -> WholeNumbers:
        numbers, zeros = (self._outputs(read(name), n) for name in ("qweight", "qzeros"))
        group = torch.arange(k) // (self.group or k)
        return WholeNumbers(numbers, read("scales").float().t(), zeros, group)

    def int4_group(self, read: Read) -> int | None:
        return self.group or len(read("qweight"))

    def _outputs(self, words: Tensor, n: int) -> Tensor:
        """[rows, n / 8] words to [n, rows] whole numbers."""
        nibbles = _parts_of_words(words, 4)
        out = torch.empty_like(nibbles)
        for nibble, output in enumerate(_AWQ_OUTPUT_OF_NIBBLE):
            out[..., output] = nibbles[..., nibble]
        return out.flatten(1)[:, :n].t()


@dataclass(frozen=True, slots=True)
class Gptq(Grouped):
    """4 or 8 bits and zeros for each group of inputs (Frantar et al., 2022), in any order."""

    bits: int
    group: int | None  # inputs with a scale; None for all of them
    zeros_less_one: bool  # all formats but gptq_v2
    description: str
    marker: str = "qweight"

    def tensors(self, n: int, k: int) -> Mapping[str, Stored]:
        groups, packed = _groups(k, self.group), 32 // self.bits
        return {
            "qweight": Stored(((-(-k // packed), n),), ("I32",)),
            "qzeros": Stored(((groups, -(-n // packed)),), ("I32",)),
            "scales": Stored(((groups, n),), _FLOATS),
            "g_idx": Stored(((k,),), ("I32",)),
        }

    def whole_numbers(self, read: Read, n: int, k: int) -> WholeNumbers:
        numbers = _parts_of_words(read("qweight").t().contiguous(), self.bits).flatten(1)
        words = read("qzeros")
        if self.zeros_less_one:  # taken from whole words, so that a zero of 0 borrowed
            words = words + sum(1 << place for place in range(0, 32, self.bits))
        zeros = _parts_of_words(words, self.bits).flatten(1)[:, :n]
        scales, group = read("scales").float(), read("g_idx").long()
        if bool(((group < 0) | (group >= len(scales))).any()):
            raise ValueError(f"g_idx names groups outside 0 .. {len(scales) - 1}")
        return WholeNumbers(numbers[:, :k], scales.t(), zeros.t(), group)

    def int4_group(self, read: Read) -> int | None:
        inputs = read("g_idx").long()
        group = self.group or len(inputs)
        in_order = torch.equal(inputs, torch.arange(len(inputs)) // group)
        return group if self.bits == 4 and in_order else None


def read_scheme(path: Path, raw: object) -> Scheme:
    """Of config.json's `quantization_config`. Raises UnsupportedModelError, which names it."""
    if not isinstance(raw, Mapping):
        raise ModelFileError(f"{path}: quantization_config must be an object, found {raw!r}")

    def refused(what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{path}: the checkpoint is quantised with {what}; this version reads {SUPPORTED}, and "
            "checkpoints of float32, bfloat16 and float16"
        )

    method = raw.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(raw, refused)
    if method == "fp8":
        if raw.get("fmt", "e4m3") != "e4m3":
            raise refused(f"fp8 of fmt {raw['fmt']!r}")
        block = raw.get("weight_block_size")
        if block is None:
            return ScaledBytes("fp8", "F8_E4M3", "weight_scale")
        return ScaledBytes("block fp8", "F8_E4M3", "weight_scale_inv", _block(block, refused))
    if method == "awq":
        version = str(raw.get("version", "gemm")).lower()
        if raw.get("bits", raw.get("w_bit")) != 4 or version != "gemm":
            raise refused(f"awq of {raw.get('bits')} bits, version {version}")
        return Awq(_group(raw.get("group_size", raw.get("q_group_size")), refused))
    if method == "gptq":
        bits = raw.get("bits")
        if not _is_size(bits) or bits not in (4, 8):
            raise refused(f"gptq of {bits} bits")
        version = raw.get("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise refused(f"gptq of checkpoint_format {version!r}")
        group = _group(raw.get("group_size"), refused)
        return Gptq(bits, group, version != "gptq_v2", f"GPTQ int{bits}")
    raise refused(repr(method) if method else "a method that quantization_config does not name")


def _compressed_tensors(
    raw: Mapping[str, Any], refused: Callable[[str], UnsupportedModelError]
) -> Scheme:
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise refused("compressed-tensors without config_groups")
    found = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        weights = weights if isinstance(weights, Mapping) else {}
        kind, bits = weights.get("type", "int"), weights.get("num_bits")
        strategy = weights.get("strategy", "tensor")
        if raw.get("format") in ("pack-quantized", "marlin-24", "sparse-24-bitmask"):
            raise refused(f"compressed-tensors of format {raw['format']}")
        if bits != 8 or kind not in ("int", "float"):
            raise refused(f"compressed-tensors of {kind} weights of {bits} bits")
        if not weights.get("symmetric", True):
            raise refused("compressed-tensors of asymmetric weights")
        if strategy not in ("tensor", "channel", "block"):
            raise refused(f"compressed-tensors with scales by {strategy}")
        block = None
        if strategy == "block":
            block = _block(weights.get("block_structure"), refused)
        found.add((kind, block))
    if len(found) > 1:
        raise refused("compressed-tensors of several kinds of weights")
    kind, block = found.pop()
    dtype, name = ("I8", "int8") if kind == "int" else ("F8_E4M3", "fp8")
    return ScaledBytes(f"compressed-tensors {name}", dtype, "weight_scale", block)


def _block(value: Any, refused: Callable[[str], UnsupportedModelError]) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(_is_size(size) for size in value):
        return value[0], value[1]
    raise refused(f"blocks of {value!r}")


def _group(value: Any, refused: Callable[[str], UnsupportedModelError]) -> int | None:
    if value == -1:
        return None
    if _is_size(value):
        return int(value)
    raise refused(f"groups of {value!r}")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _groups(k: int, group: int | None) -> int:
    return 1 if group is None else -(-k // group)


def _parts_of_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..] to uint8 [.., 32 / bits], lowest bits first."""
    parts = torch.empty(*words.shape, 32 // bits, dtype=torch.uint8)
    for part in range(32 // bits):
        parts[..., part] = (words >> part * bits) & ((1 << bits) - 1)
    return parts
