"""Import `Round` and `Trained`, argument and result of your own training function.

def train(round: Round) -> Trained:
    model = round.install(my_model())
    ...                                    # any loop, any trainer, on round.data
    return round.read(model, samples=len(round.data), steps=steps, loss=loss)

fedraclora.simulate(model=net, data=clients, train=train, method="fed_rac_lora")
"""

from fedraclora.training.own.round import Round
from fedraclora.training.results import Trained

__all__ = ["Round", "Trained"]
