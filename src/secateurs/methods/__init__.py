"""The catalogue: one file a published system, in folders by the unit it prunes. Importing it registers them all."""

from .channels import rethinking_value, spa_obspa
from .language import perp, wanda
from .weights import global_magnitude, gradual_magnitude, granet, pdp, pq_index_sap, random_pruning, three_regime

__all__ = [
    "global_magnitude",
    "gradual_magnitude",
    "granet",
    "pdp",
    "perp",
    "pq_index_sap",
    "random_pruning",
    "rethinking_value",
    "spa_obspa",
    "three_regime",
    "wanda",
]
