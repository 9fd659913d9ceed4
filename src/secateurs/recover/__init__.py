"""Training that repairs a cut: all or few parameters, adapters, distillation, batch norm, rewinding, from scratch."""

from __future__ import annotations

from .adapters import Adapter, Adapters, adaptable, adapters_of, attach, merge, to_peft
from .batchnorm import recalibrate_batch_norm
from .distill import Distillation, distillation_loss
from .finetune import Epoch, History, Progress, fine_tune
from .rewinding import restore, rewind, rewound_rate, snapshot
from .schedules import get_rate, linear, steps_down
from .scratch import ScratchSchedule, reinitialize, scratch_epochs
from .trainable import create_biases, head_of, only_trained, trainable_parameters

__all__ = [
    "Adapter",
    "Adapters",
    "Distillation",
    "Epoch",
    "History",
    "Progress",
    "ScratchSchedule",
    "adaptable",
    "adapters_of",
    "attach",
    "create_biases",
    "distillation_loss",
    "fine_tune",
    "get_rate",
    "head_of",
    "linear",
    "merge",
    "only_trained",
    "recalibrate_batch_norm",
    "reinitialize",
    "restore",
    "rewind",
    "rewound_rate",
    "scratch_epochs",
    "snapshot",
    "steps_down",
    "to_peft",
    "trainable_parameters",
]
