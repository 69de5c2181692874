"""The demo model quantised: it still adds, and expects the same texts.

`python -m scalellm.demo.quantised python/scalellm/demo/model` asks every held-out sum.
"""

import pytest

from scalellm.demo import model_folder
from scalellm.demo.quantised import Engine, quality

# Quantisation of weights -> most that it may cost: sums right, of all; loss, of the loss without.
COST = {"int8": (0.01, 0.01), "int4": (0.03, 0.04)}


def measure(*quantisation):
    return quality(Engine(model_folder(), *quantisation), stride=40, documents=60)


@pytest.fixture(scope="module")
def exact():
    return measure("none")


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("weights", COST)
def test_quantised_model_keeps_its_answers(exact, weights, kv_cache_dtype):
    found = measure(weights, kv_cache_dtype)
    sums, loss = COST[weights]
    assert exact.sums_right > 0.98
    assert found.sums_right >= exact.sums_right - sums
    assert found.answer_loss <= exact.answer_loss * (1 + loss)
    assert found.plain_loss <= exact.plain_loss * (1 + loss)
