"""Schedules are recorded, saved, and replayed on a plain network."""

import pytest
import torch
from torch import nn

from wellposed import Compose, Hyperparameter, Regularizer, TensorLoader, fit
from wellposed.tuning import ReplaySchedule, Schedule


def schedule():
    found = Schedule()
    found.record(0, {"a": torch.tensor(0.1), "b": torch.tensor([1.0, 2.0])})
    found.record(4, {"a": torch.tensor(0.2), "b": torch.tensor([3.0, 4.0])})
    found.record(8, {"a": 0.3, "b": [5.0, 6.0]})
    found.total = 10
    return found


def test_the_last_record_holds_until_the_next():
    found = schedule()
    values = [found.at(step / 10)["a"] for step in range(11)]
    assert values == pytest.approx([0.1] * 4 + [0.2] * 4 + [0.3] * 3)
    assert found.at(0.4)["b"] == [3.0, 4.0]


def test_it_survives_json():
    found = schedule()
    assert Schedule.from_json(found.to_json()) == found


class Reads(Regularizer):
    """Notes what the hyperparameters are in every step."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b, self.seen = a, b, []

    def on_batch(self, step):
        self.seen.append((round(float(self.a.value), 4), [round(v, 4) for v in self.b.value.tolist()]))


def test_a_plain_network_trains_under_the_schedule_by_the_share_of_training_done():
    a, b = Hyperparameter(0.5, 0.0, 1.0), Hyperparameter(1.0, shape=(2,))
    reads = Reads(a, b)
    method = Compose(ReplaySchedule(schedule(), {"a": a, "b": b}), reads)
    loader = TensorLoader(torch.randn(20, 3), torch.arange(20) % 2, batch_size=4)
    fit(nn.Linear(3, 2), loader, epochs=4, regularizer=method)
    expected = [(0.1, [1.0, 2.0])] * 8 + [(0.2, [3.0, 4.0])] * 8 + [(0.3, [5.0, 6.0])] * 4
    assert reads.seen == expected


def test_a_hyperparameter_that_is_left_out_keeps_its_value():
    a, b = Hyperparameter(0.5, 0.0, 1.0), Hyperparameter(1.0, shape=(2,))
    reads = Reads(a, b)
    loader = TensorLoader(torch.randn(8, 3), torch.arange(8) % 2, batch_size=4)
    fit(nn.Linear(3, 2), loader, epochs=1, regularizer=Compose(ReplaySchedule(schedule(), {"a": a}), reads))
    assert [seen[1] for seen in reads.seen] == [[1.0, 1.0]] * 2


def test_wrong_schedules_are_refused():
    with pytest.raises(ValueError, match="steps must ascend, got 3 after 8"):
        schedule().record(3, {})
    with pytest.raises(ValueError, match=r"progress must lie in \[0, 1\], got 1.5"):
        schedule().at(1.5)
    with pytest.raises(ValueError, match="nothing was recorded"):
        ReplaySchedule(Schedule(), {})
    with pytest.raises(ValueError, match=r"holds no 'c'; it has \['a', 'b'\]"):
        ReplaySchedule(schedule(), {"c": Hyperparameter(1.0)})
    with pytest.raises(ValueError, match="must hold steps, values and total"):
        Schedule.from_json("[]")
    with pytest.raises(ValueError, match="steps must ascend"):
        Schedule.from_json('{"steps": [2, 1], "values": [{}, {}], "total": 3}')
