"""The trainers of both stages (UniCompress, section 3). They need `pip install "uc-adapters[train]"`: trl and datasets.

ReconstructionTrainer  stage 1 (eq. 8): extractors and decompressor learn by reconstruction; the language model is frozen.
JointTrainer           stage 2: LoRA learns from text and image tokens. It extends TRL's `SFTTrainer`.
DistillationTrainer    stage 2 with the dense base as a teacher.
"""

from .distillation import DistillationTrainer, teacher_collator, teacher_targets
from .joint import JointTrainer
from .reconstruction import ReconstructionStage, ReconstructionTrainer
from .resumable import TrainingError, last_checkpoint

__all__ = [
    "DistillationTrainer",
    "JointTrainer",
    "ReconstructionStage",
    "ReconstructionTrainer",
    "TrainingError",
    "last_checkpoint",
    "teacher_collator",
    "teacher_targets",
]
