"""The calibrated cost of a step, in the place of the scheduler's learnt one."""

from scalellm.controller.blueprint.cost import StepCost
from scalellm.engine.step_time import StepShape, StepTime


class CalibratedStepTime(StepTime):
    """Predicts what will be; nothing is left to learn."""

    def __init__(self, cost: StepCost) -> None:
        super().__init__()
        self._cost = cost
        self.pace = 1.0  # what others on the same host make of every step's time

    def observe(self, shape: StepShape, elapsed_ms: float) -> None:
        """Measured steps do not change a calibration."""

    def predict_ms(self, shape: StepShape) -> float:
        if shape.tokens < 1:
            return 0.0
        ms = self._cost.step_ms(shape.tokens, shape.attended, shape.spans, shape.read)
        return self.pace * ms

    def largest_chunk(self, shape: StepShape, start: int, budget_ms: float) -> int:
        """Most tokens of one more span within the budget: the largest n of a growing cost."""
        low, high = 0, 1
        while self.predict_ms(shape.with_span(start, high)) <= budget_ms and high < 1 << 20:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.predict_ms(shape.with_span(start, middle)) <= budget_ms:
                low = middle
            else:
                high = middle
        return low
