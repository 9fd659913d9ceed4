"""The catalogue: one file a published system, in folders by the unit it prunes. Importing it registers them all."""

from .channels import rethinking_value, spa_obspa
from .language import (
    alps,
    ast,
    cfsp,
    compresso,
    d_pruner,
    dsnot,
    exact_obs,
    flap,
    l_admm,
    pat,
    perp,
    ria,
    sparsegpt,
    wanda,
    ziplm,
)
from .weights import global_magnitude, gradual_magnitude, granet, pdp, pq_index_sap, random_pruning, three_regime

__all__ = [
    "alps",
    "ast",
    "cfsp",
    "compresso",
    "d_pruner",
    "dsnot",
    "exact_obs",
    "flap",
    "global_magnitude",
    "gradual_magnitude",
    "granet",
    "l_admm",
    "loraprune",
    "pat",
    "pdp",
    "perp",
    "pq_index_sap",
    "random_pruning",
    "rethinking_value",
    "ria",
    "spa_obspa",
    "sparsegpt",
    "three_regime",
    "wanda",
    "ziplm",
]
