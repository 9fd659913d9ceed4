"""Training that repairs a cut: fine-tuning, distillation, batch-norm statistics, rewinding, training from scratch."""

from __future__ import annotations

from .batchnorm import recalibrate_batch_norm
from .distill import Distillation, distillation_loss
from .finetune import Epoch, History, Progress, fine_tune
from .rewinding import restore, rewind, rewound_rate, snapshot
from .schedules import get_rate, steps_down
from .scratch import ScratchSchedule, reinitialize, scratch_epochs

__all__ = [
    "Distillation",
    "Epoch",
    "History",
    "Progress",
    "ScratchSchedule",
    "distillation_loss",
    "fine_tune",
    "get_rate",
    "recalibrate_batch_norm",
    "reinitialize",
    "restore",
    "rewind",
    "rewound_rate",
    "scratch_epochs",
    "snapshot",
    "steps_down",
]
