"""How ranks divide a model's layers: one rule for each kind of layer, whatever the model.

    queries, keys, values   whole heads; a key-value head is on several ranks where there are more
    gate and up             columns, the same of both
    after either            groups along the inputs, of which layers like these have 8: a rank's
                            groups are one subtree of the tree that adds all of them up
    experts                 each like an MLP; or whole experts
    output layer            ids, in runs of 32
    embedding               the same ids, by torch's ranks; whole on every rank of the CPU's kernels
    norms, router           whole on every rank

The CPU's kernels have the embedding's table mapped: ranks share its pages, and only rows that are
read come in. Dividing it would save nothing there and cost an exchange.
"""

from dataclasses import dataclass, field

from scalellm.kernels.exchange import Exchange

GROUPS = 8  # runs of a row-parallel layer's inputs with scales of their own
_IDS = 32  # rows of a panel of packed weights


@dataclass(frozen=True, slots=True)
class Shard:
    """What rank `rank` of `ranks` has of each layer."""

    rank: int = 0
    ranks: int = 1
    expert_parallel: bool = False  # whole experts
    address: int = 0  # of `_core.Ranks`, for operators that meet the others; 0 for one rank
    exchange: Exchange | None = field(default=None, compare=False)  # of ranks that torch computes
    hosts: int = 1  # that the ranks are spread over, evenly

    @property
    def ranks_here(self) -> int:
        """On this rank's host."""
        return self.ranks // self.hosts

    @property
    def rank_here(self) -> int:
        """Its number among those."""
        return self.rank % self.ranks_here

    def columns(self, count: int) -> range:
        """Its columns of `count`, which `ranks` divides."""
        each = count // self.ranks
        return range(self.rank * each, (self.rank + 1) * each)

    def heads(self, count: int) -> range:
        """Its heads of `count`, which divides `ranks` or is divided by it."""
        if count >= self.ranks:
            return self.columns(count)
        head = self.rank * count // self.ranks
        return range(head, head + 1)

    def groups(self) -> range:
        """Its groups of a row-parallel layer's inputs."""
        return self.columns(GROUPS)

    def experts(self, count: int) -> range:
        """Its experts of `count`: all, unless experts are divided."""
        return self.columns(count) if self.expert_parallel else range(count)

    @property
    def expert_shares(self) -> int:
        """Ranks that divide the experts; 0 where each rank has all of them."""
        return self.ranks if self.expert_parallel and self.ranks > 1 else 0

    def id_bounds(self, vocab_size: int) -> list[int]:
        """Rank r has the ids from entry r to entry r + 1."""
        runs = -(-vocab_size // _IDS)
        firsts = [rank * runs // self.ranks * _IDS for rank in range(self.ranks)]
        return [*firsts, vocab_size]


WHOLE = Shard()
