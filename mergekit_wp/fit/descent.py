"""The descent of a fit: numbers under Adam within their bounds, the best look so far, and the curve of the loss.

P numbers. All that a killed run needs to go on is a handful of tensors.
"""

from __future__ import annotations

import torch

from mergekit_wp.fit_file import MOST, LossAt

SAME = 1e-3  # of a loss: less is no better


class Descent:
    """Numbers [P] under torch's Adam, kept within the bounds; the best look at them so far, and the curve.

    All of it is tensors (`tensors`), so that a killed run goes on from them (`restore`).
    looks  [steps + 1, 3] float64: step, mean loss of the fitted prompts since the look before, loss at the look
    """

    def __init__(self, number_P: torch.Tensor, point: LossAt, steps: int, rate: float):
        self.number_P = torch.nn.Parameter(number_P.clone(), requires_grad=False)
        self.optimizer = torch.optim.Adam([self.number_P], lr=rate, betas=(0.9, 0.99))
        self.best_P, self.since = number_P.clone(), torch.zeros(2, dtype=torch.float64)
        self.looks = torch.zeros(steps + 1, 3, dtype=torch.float64)
        self.looks[0, 1:] = torch.tensor([point.fitted, point.fitted if point.held_out is None else point.held_out])
        self.counts = torch.tensor([0, 1, 0])  # steps, looks, the best look

    step = property(lambda self: int(self.counts[0]))
    best_step = property(lambda self: int(self.looks[self.counts[2], 0]))
    last = property(lambda self: float(self.looks[self.counts[1] - 1, 2]))

    def advance(self, loss: float, gradient_P: torch.Tensor) -> None:
        """One step against the gradient, at which the loss of the step's prompts was `loss`."""
        self.number_P.grad = gradient_P
        self.optimizer.step()
        self.number_P.clamp_(0, MOST)
        self.counts[0] += 1
        self.since += torch.tensor([loss, 1.0])

    def look(self, loss: float) -> None:
        """Take down the loss of the prompts that decide, and keep the numbers if none were better."""
        at = int(self.counts[1])
        self.looks[at] = torch.tensor([float(self.step), float(self.since[0] / self.since[1]), loss])
        self.since.zero_()
        self.counts[1] += 1
        if loss < (1 - SAME) * float(self.looks[self.counts[2], 2]):
            self.counts[2] = at
            self.best_P = self.number_P.detach().clone()

    def stalled(self, patience: int) -> bool:
        """As many looks as that without a better one."""
        return int(self.counts[1] - 1 - self.counts[2]) >= patience

    def curve(self, held: bool) -> tuple[LossAt, ...]:
        rows = self.looks[: int(self.counts[1])].tolist()
        return tuple(LossAt(int(step), fitted, looked if held else None) for step, fitted, looked in rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        state = self.optimizer.state.get(self.number_P) or {
            "step": torch.zeros(()), "exp_avg": torch.zeros_like(self.number_P),
            "exp_avg_sq": torch.zeros_like(self.number_P),
        }  # fmt: skip
        own = {name: getattr(self, name) for name in ("best_P", "since", "looks", "counts")}
        return {"number_P": self.number_P.detach(), **state, **own}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `tensors` said."""
        self.number_P.copy_(tensors.pop("number_P"))
        self.optimizer.state[self.number_P] = {name: tensors.pop(name) for name in ("step", "exp_avg", "exp_avg_sq")}
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
